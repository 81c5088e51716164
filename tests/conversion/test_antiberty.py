"""A published BERT of another alphabet, with heads of its own: AntiBERTy, whose package has the weights."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.conversion import converted

from gluon_bert.run import load_run

CHAIN = "E V Q L V E S G G G L V [MASK] P G G S L R L S C A A S G F T F S "
CHAIN += "[MASK] Y A M S W V R Q A P G K G L E W V S"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of AntiBERTy in one folder, as a hub has them."""
    found = importlib.util.find_spec("antiberty")
    models = Path(found.origin).parent / "trained_models" if found else None
    if models is None or not models.is_dir():
        pytest.skip("needs the package antiberty 0.1.3, installed with --no-deps")
    folder = tmp_path_factory.mktemp("antiberty") / "folder"
    shutil.copytree(models / "AntiBERTy_md_smooth", folder)
    shutil.copy(models / "vocab.txt", folder)
    return folder


def test_antiberty_equals_transformers(folder, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs the extra test-others")
    transformers = pytest.importorskip("transformers", reason="needs the extra test-others")
    converted("--from", "huggingface", folder, "--to", tmp_path / "run")
    message = capsys.readouterr().out
    assert (
        "left out, because they are not in BERT's encoder and heads: cls.chain.bias" in message
        and "cased" in message
    )
    run = load_run(tmp_path / "run")
    assert run.untrained == ("nsp",)
    text = run.reader.text(CHAIN)
    model = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(folder)).eval()
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    missing, _ = model.load_state_dict(weights, strict=False)
    assert not [name for name in missing if "position_ids" not in name and "decoder" not in name]
    with torch.no_grad():
        found = model(torch.tensor(text.ids[None]).long(), output_hidden_states=True)
    _, vectors = run.token_vectors(CHAIN)
    np.testing.assert_allclose(vectors, found.hidden_states[-1][0].numpy(), atol=2e-5)
    probabilities = torch.softmax(found.logits[0, text.masks], dim=-1).numpy()
    for ours, theirs in zip(run.fill_mask(CHAIN, top=len(run.vocab)), probabilities):
        expected = [theirs[run.vocab.to_indices([token])[0]] for token, _ in ours]
        np.testing.assert_allclose([probability for _, probability in ours], expected, atol=1e-5)
