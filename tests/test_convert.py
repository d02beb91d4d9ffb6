"""
test_convert.py: do others read the same model?                       (support/convert.py; Transfusion §4.1 "the standard settings from Llama")
"""
import builtins
import json
import os

import pytest
import torch

from data import BOI, BOS, EOI, PATCH
from support import checkpoint, convert
from support.common import ASSETS, UserError

MODEL = ASSETS / "scenes.pt"


def equal(a, b):
    """Whether two contents of checkpoints are the same, tensors to the bit and in their type."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):       # a config has tuples, JSON lists
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("words", [None, b"a SentencePiece model \x00\xff"], ids=["words", "pieces"])
def test_there_and_back(tmp_path, words):
    """Catches a tensor rounded or renamed, a tokenizer in another order, and a part that is left behind."""
    pytest.importorskip("safetensors")
    content = checkpoint.load(MODEL, "model")
    content["origin"] = {"command": "python train.py", "commit": "abc", "torch": "2", "device": "1 x cpu", "began": 1.5, "seconds": 2.5}
    content["words"] = words or content["words"]
    checkpoint.save(tmp_path / "a.pt", content)
    convert.main([str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors")])
    convert.main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.pt")])
    assert equal(checkpoint.load(tmp_path / "c.pt", "model"), content)
    if not words:
        assert checkpoint.load_trained(tmp_path / "c.pt").origin.seconds == 2.5


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(transformers' Llama of the shipped model, its folder)."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("out") / "llama"
    convert.main([str(MODEL), str(folder)])
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), folder


@torch.no_grad()
def test_the_same_logits(llama):
    """Of words alone, at every position, and so the same text. Catches q for k, gate for up, another RoPE, another norm."""
    theirs, _ = llama
    ours = checkpoint.load_trained(MODEL)
    ids = torch.tensor([[BOS, *ours.tokenizer.encode("a red circle is left of a blue square . the blue square is right of")]])
    same_document = torch.zeros_like(ids)
    no_pictures = torch.zeros(0, *ours.model.config.latent)
    logits, _ = ours.model(ids, torch.full_like(ids, -1), same_document, torch.ones_like(ids, dtype=torch.bool), no_pictures,
                           torch.zeros(0, dtype=torch.long))
    found = theirs(ids).logits[0]
    assert found.shape == logits.shape and torch.allclose(found, logits, atol=2e-4)
    assert logits.std() > 1                             # there is something to compare


def test_the_same_words(llama):
    """Catches a tokenizer with other ids, or capitals that are unknown."""
    transformers = pytest.importorskip("transformers")
    _, folder = llama
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = checkpoint.load_trained(MODEL).tokenizer
    text = "A red circle  is left of a blue square ."
    assert theirs(text)["input_ids"] == [BOS, *ours.encode(text)]
    assert theirs.decode(ours.encode(text), skip_special_tokens=True) == "a red circle is left of a blue square ."
    assert theirs("<boi> <patch> <eoi>")["input_ids"] == [BOS, BOI, PATCH, EOI]
    assert set(theirs.backend_tokenizer.encode(text).type_ids) == {0}    # one text, not the second of two


@pytest.mark.parametrize("source, out, sentence", [
    ("model.pt", "model.pt", "there is no way"), ("model.safetensors", "x.pt", "there is no file model.safetensors"),
    ("absent.pt", "x.safetensors", "there is no checkpoint absent.pt"), ("other.safetensors", "x.pt", "is no model of this program"),
    ("garbage.safetensors", "x.pt", "is no model of this program"), ("pipe.safetensors", "x.pt", "is no model of this program"), ("stable.pt", "folder", "Chameleon's blocks")], ids=str)
def test_mistakes(tmp_path, monkeypatch, source, out, sentence):
    """Catches a traceback, and a file left behind by what failed."""
    library = pytest.importorskip("safetensors.torch")
    monkeypatch.chdir(tmp_path)
    library.save_file({"a": torch.zeros(2)}, "other.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 99)
    os.mkfifo(tmp_path / "pipe.safetensors")
    content = checkpoint.load(MODEL, "model")
    content["config"] = content["config"] | {"stable": True}
    width, heads = content["config"]["width"], content["config"]["heads"]
    for k in range(content["config"]["layers"]):
        for name in ("norm_q", "norm_k"):
            content["weights"] |= {f"blocks.{k}.{name}.weight": torch.ones(width // heads), f"blocks.{k}.{name}.bias": torch.zeros(width // heads)}
    checkpoint.save("stable.pt", content)
    with pytest.raises(UserError, match=sentence):
        convert.main([source, out])
    assert not (tmp_path / "x.pt").exists() and not (tmp_path / "folder").exists()


def test_without_the_library(tmp_path, monkeypatch):
    """Catches a traceback where safetensors is not installed."""
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="pip install safetensors"):
        convert.main([str(MODEL), str(tmp_path / "x.safetensors")])


def test_the_folder_is_plain(llama):
    """Catches a folder that needs our code: three names that transformers knows, and a tokenizer."""
    _, folder = llama
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama"
