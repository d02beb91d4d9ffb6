"""
test_convert.py: do others read the same model?
                    (support/convert.py; Transfusion §4.1 "the standard settings from Llama")

THE IDEA    A model in another format is the same model: the same weights, words and answers.
COMPARED    a checkpoint with itself after the way to safetensors and back; and what transformers'
            Llama makes of our weights and words with what our model makes of them.
RUN IT      pytest -n 0 tests/test_convert.py
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


# ----------------------------------------------------------------------------------- safetensors
def equal(a, b):
    """Whether two contents of checkpoints are the same: tensors to the bit, and of one type."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))       # a config has tuples, JSON lists
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


PIECES = b"a SentencePiece model \x00\xff"


@pytest.mark.parametrize("words", [None, PIECES], ids=["words", "pieces"])
def test_there_and_back(tmp_path, words):
    """Catches a tensor that is rounded or renamed, a tokenizer in another order, and a part that is
    left behind."""
    pytest.importorskip("safetensors")
    content = checkpoint.load(MODEL, "model")
    content["origin"] = {
        "command": "python train.py",
        "commit": "abc",
        "torch": "2",
        "device": "1 x cpu",
        "began": 1.5,
        "seconds": 2.5,
    }
    content["words"] = words or content["words"]
    checkpoint.save(tmp_path / "a.pt", content)

    convert.main([str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors")])
    convert.main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.pt")])

    assert equal(checkpoint.load(tmp_path / "c.pt", "model"), content)
    if not words:
        assert checkpoint.load_trained(tmp_path / "c.pt").origin.seconds == 2.5


# ------------------------------------------------------------------------------ transformers' Llama
@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(transformers' Llama of the shipped model, its folder)."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("out") / "llama"
    convert.main([str(MODEL), str(folder)])
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return theirs, folder


@torch.no_grad()
def test_the_same_logits(llama):
    """A text without pictures has the same logits at every position, and so the same continuation.
    Catches q for k, gate for up, another RoPE, another norm."""
    theirs, _ = llama
    ours = checkpoint.load_trained(MODEL)
    text = "a red circle is left of a blue square . the blue square is right of"
    ids = torch.tensor([[BOS, *ours.tokenizer.encode(text)]])           # (1, T)

    no_image = torch.full_like(ids, -1)
    one_document = torch.zeros_like(ids)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    no_pictures = torch.zeros(0, *ours.model.config.latent)
    no_t = torch.zeros(0, dtype=torch.long)
    logits, _ = ours.model(ids, no_image, one_document, everywhere, no_pictures, no_t)
    found = theirs(ids).logits[0]                                       # (T, V), as ours

    assert found.shape == logits.shape
    assert torch.allclose(found, logits, atol=2e-4)
    assert logits.std() > 1                             # there is something to compare


def test_the_same_words(llama):
    """Catches a tokenizer with other ids, and capitals that are unknown to it."""
    transformers = pytest.importorskip("transformers")
    _, folder = llama
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = checkpoint.load_trained(MODEL).tokenizer
    text = "A red circle  is left of a blue square ."
    plain = "a red circle is left of a blue square ."

    assert theirs(text)["input_ids"] == [BOS, *ours.encode(text)]
    assert theirs.decode(ours.encode(text), skip_special_tokens=True) == plain
    assert theirs("<boi> <patch> <eoi>")["input_ids"] == [BOS, BOI, PATCH, EOI]
    # One text, not the second of two.
    assert set(theirs.backend_tokenizer.encode(text).type_ids) == {0}


def test_the_folder_is_plain(llama):
    """Catches a folder that needs our code. It has three names that transformers knows, and a
    tokenizer."""
    _, folder = llama
    names = sorted(path.name for path in folder.iterdir())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert names == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert config["model_type"] == "llama"


# ------------------------------------------------------------------------------------- mistakes
def stable_content():
    """The shipped checkpoint, as if its blocks were Chameleon's: with a norm of q and k each."""
    content = checkpoint.load(MODEL, "model")
    config = content["config"] | {"stable": True}
    K = config["width"] // config["heads"]
    for k in range(config["layers"]):
        for name in ("norm_q", "norm_k"):
            content["weights"][f"blocks.{k}.{name}.weight"] = torch.ones(K)
            content["weights"][f"blocks.{k}.{name}.bias"] = torch.zeros(K)
    content["config"] = config
    return content


@pytest.mark.parametrize("source, out, sentence", [
    ("model.pt", "model.pt", "there is no way"),
    ("model.safetensors", "x.pt", "there is no file model.safetensors"),
    ("absent.pt", "x.safetensors", "there is no checkpoint absent.pt"),
    ("other.safetensors", "x.pt", "is no model of this program"),
    ("garbage.safetensors", "x.pt", "is no model of this program"),
    ("pipe.safetensors", "x.pt", "is no model of this program"),
    ("stable.pt", "folder", "Chameleon's blocks"),
], ids=str)
def test_mistakes(tmp_path, monkeypatch, source, out, sentence):
    """Catches a traceback, and a file that is left behind although the command has failed."""
    library = pytest.importorskip("safetensors.torch")
    monkeypatch.chdir(tmp_path)
    library.save_file({"a": torch.zeros(2)}, "other.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 99)
    os.mkfifo(tmp_path / "pipe.safetensors")
    checkpoint.save("stable.pt", stable_content())

    with pytest.raises(UserError, match=sentence):
        convert.main([source, out])
    assert not (tmp_path / "x.pt").exists()
    assert not (tmp_path / "folder").exists()


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
