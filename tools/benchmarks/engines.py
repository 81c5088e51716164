"""Networks of other packages with a run's weights, as backends of a Predictor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gluon_bert import runtime
from gluon_bert.conversion.converter import to_foreign_names
from gluon_bert.conversion.huggingface import CONFIG, bert_config, write_huggingface
from gluon_bert.conversion.weight_names import HUGGINGFACE
from gluon_bert.data.tokenizer import PaddedBatch
from gluon_bert.errors import InputError
from gluon_bert.fileio import read_json, write_json
from gluon_bert.inference.predictor import Outputs
from gluon_bert.model.parameters import weights_of
from gluon_bert.run import Run

# The prefix of BertModel's parameters in transformers' BertForPreTraining.
BERT_PREFIX = "bert."


class TransformersNetwork:
    """A backend of transformers.BertModel, without masked words and next sentences."""

    def __init__(self, net: Any, bf16: bool = False) -> None:
        import torch
        from transformers import BertConfig, BertModel

        config = net.config
        if config.norm != "post":
            raise InputError(
                "--against transformers needs norm post, got pre: its BertModel has no pre-LayerNorm"
            )
        self._torch = torch
        torch.set_num_threads(_num_threads())
        self._model = BertModel(BertConfig(**bert_config(config, net.vocab_size))).eval()
        if not config.embedding_norm:
            self._model.embeddings.LayerNorm = torch.nn.Identity()
        arrays = to_foreign_names(weights_of(net), HUGGINGFACE)
        weights = {
            name[len(BERT_PREFIX) :]: torch.from_numpy(array)
            for name, array in arrays.items()
            if name.startswith(BERT_PREFIX)
        }
        self._model.load_state_dict(weights, strict=True)
        if bf16:
            self._model = self._model.to(torch.bfloat16)

    def __call__(self, texts: PaddedBatch) -> Outputs:
        """Return the outputs as arrays."""
        torch = self._torch
        tokens, segments = (torch.from_numpy(array).long() for array in (texts.tokens, texts.token_types))
        real = torch.arange(tokens.shape[1]) < torch.from_numpy(texts.valid_length)[:, None]
        with torch.inference_mode():
            found = self._model(input_ids=tokens, token_type_ids=segments, attention_mask=real)
        return Outputs(found.last_hidden_state.float().numpy(), found.pooler_output.float().numpy())


class CTranslate2Network:
    """A backend of ctranslate2.Encoder, converted from the run's files for transformers.

    folder: an existing folder for both models. compute_type: float32 or int8, for the weights of dense
    layers.
    """

    def __init__(self, run: Run, folder: Path, compute_type: str) -> None:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        write_huggingface(run, folder / "transformers")
        settings = folder / "transformers" / CONFIG
        # The converter reads this attribute, which BertConfig of transformers 5 has no longer.
        write_json(settings, {**read_json(settings), "position_embedding_type": "absolute"})
        TransformersConverter(str(folder / "transformers")).convert(str(folder / "model"))
        self._package = ctranslate2
        self._encoder = ctranslate2.Encoder(
            str(folder / "model"), device="cpu", compute_type=compute_type, intra_threads=_num_threads()
        )

    def __call__(self, texts: PaddedBatch) -> Outputs:
        """Return the outputs as arrays."""
        view = self._package.StorageView.from_array
        found = self._encoder.forward_batch(
            view(texts.tokens.astype(np.int32)),
            view(texts.valid_length.astype(np.int32)),
            token_type_ids=texts.token_types.astype(int).tolist(),
        )
        pooled = None if found.pooler_output is None else np.array(found.pooler_output)
        return Outputs(np.array(found.last_hidden_state), pooled)


def _num_threads() -> int:
    return int(runtime.versions()["threads"])
