"""The baselines transformers and transformers-bf16 of `benchmark.py train`: BertForPreTraining, plainly.

Arguments: the file of prepared batches, fp32 or bf16. The network scores all positions; labels of -100
leave out those that are not masked. Attention is PyTorch's scaled_dot_product_attention, AdamW is fused.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Iterator

import numpy as np
import torch
import transformers
from protocol import Step, serve

LOW = {"fp32": None, "bf16": torch.bfloat16}[sys.argv[2]]


def prepare() -> tuple[Iterator[Step], dict[str, Any]]:
    """Return the steps and details to report."""
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with np.load(sys.argv[1]) as file:
        arrays = dict(file)
    config = json.loads(str(arrays["config"]))
    model = config["model"]
    net = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=int(arrays["vocab_size"]),
            hidden_size=model["units"],
            num_hidden_layers=model["num_layers"],
            num_attention_heads=model["num_heads"],
            intermediate_size=model["ffn_units"],
            hidden_act=model["activation"],
            hidden_dropout_prob=model["dropout"],
            attention_probs_dropout_prob=model["dropout"],
            max_position_embeddings=model["max_positions"],
            layer_norm_eps=model["norm_epsilon"],
        )
    )
    software = f"transformers {transformers.__version__}, torch {torch.__version__}, {sys.argv[2]}"
    return steps(net.train(), arrays, config["train"]), {"software": software}


def batches(arrays: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return the arguments of the network for one batch after another."""
    number = 0
    while f"tokens-{number}" in arrays:
        tokens = torch.from_numpy(arrays[f"tokens-{number}"].astype(np.int64))
        rows, columns = arrays[f"masked_positions-{number}"]
        labels = torch.full_like(tokens, -100)
        labels[rows, columns] = torch.from_numpy(arrays[f"masked_ids-{number}"].astype(np.int64))
        lengths = torch.from_numpy(arrays[f"valid_length-{number}"].astype(np.int64))
        yield {
            "input_ids": tokens,
            "token_type_ids": torch.from_numpy(arrays[f"token_types-{number}"].astype(np.int64)),
            "attention_mask": (torch.arange(tokens.shape[1]) < lengths[:, None]).long(),
            "labels": labels,
            "next_sentence_label": torch.from_numpy(
                arrays[f"next_sentence_labels-{number}"].astype(np.int64)
            ),
        }
        number += 1


def steps(net: Any, arrays: dict[str, Any], train: dict[str, Any]) -> Iterator[Step]:
    """Take one step after another."""
    betas = train["beta1"], train["beta2"]
    decay = train["weight_decay"]
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=train["lr"], betas=betas, eps=train["epsilon"], weight_decay=decay, fused=True
    )
    for batch in batches(arrays):
        with torch.autocast("cpu", dtype=LOW or torch.bfloat16, enabled=LOW is not None):
            found = net(**batch)
        optimizer.zero_grad(set_to_none=True)
        found.loss.backward()
        if train["clip_norm"]:
            torch.nn.utils.clip_grad_norm_(net.parameters(), train["clip_norm"])
        optimizer.step()
        labels = batch["next_sentence_label"]
        scores = found.seq_relationship_logits.detach().float()
        nsp = torch.nn.functional.cross_entropy(scores, labels).item()
        yield len(labels), found.loss.item() - nsp, nsp


if __name__ == "__main__":
    serve(prepare)
