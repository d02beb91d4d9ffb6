"""
test_start.py: what does a run keep of the model that it starts from?       (support/start.py; Transfusion §4.5, --init)

New words first, by themselves; then README's way from a folder of captions to edits; then options that --init decides.
"""
import copy
import json

import pytest
import torch
from PIL import Image

import data
import model
import train
from config import parse_arguments
from conftest import make_run
from data import BOI, BOS, EOS, SPECIAL, Words
from diffusion import Diffusion
from small_runs import folder_of_edits, same, states, tuning
from support import start
from support.checkpoint import Trained, load_trained
from support.common import ASSETS, UserError

pytestmark = pytest.mark.usefixtures("tiny_size")

OLD = ["a", "cat", "mat", "on"]
NEW = ["Black", "cat", "make", "zebra"]                 # before, between and behind the old ones


@pytest.fixture
def trained(make_model):
    """A Trained that knows the words of OLD, with a random network."""
    return Trained(make_model(vocabulary=len(SPECIAL) + 4).requires_grad_(False), Words(OLD), None, Diffusion())


def run_model(trained, text):
    """(logits (T, V), what the model says of the picture) of a document: a text, then a noisy picture."""
    tokens = [BOS, *trained.tokenizer.encode(text), BOI, *[data.PATCH] * 4, data.EOI, EOS]
    row = torch.tensor([tokens])
    is_patch = row == data.PATCH
    g = torch.Generator().manual_seed(0)
    xt = torch.randn(1, 4, 4, 4, generator=g)
    image_id = torch.where(is_patch, 0, -1)
    logits, out = trained.model(row, image_id, torch.zeros_like(row), ~is_patch, xt, torch.tensor([300]))
    return logits, out


# ---------------------------------------------------------------------------------------------------------- new words
def test_new_words_change_no_old_one(trained):
    """Case 6. Catches rows that stay where they were while the sorted words move, a head that moves otherwise than the table,
    and new rows that are copies, or all alike."""
    before = copy.deepcopy(trained)
    assert start.add_words(trained, NEW, seed=3) == ["black", "make", "zebra"]
    words = trained.tokenizer
    assert words.vocabulary == [*SPECIAL, *sorted({*OLD, "black", "make", "zebra"})]
    assert trained.model.config.vocabulary == len(words) == trained.model.embedding.num_embeddings == len(trained.model.head.weight)
    logits, out = run_model(trained, "a cat on a mat")
    old_logits, old_out = run_model(before, "a cat on a mat")
    assert torch.equal(out, old_out)
    places = [words.ids[word] for word in before.tokenizer.vocabulary]
    assert places != list(range(len(places)))           # they do move here
    assert torch.allclose(logits[:, places], old_logits, atol=1e-5)
    for weight, old_weight in ((trained.model.embedding.weight, before.model.embedding.weight), (trained.model.head.weight, before.model.head.weight)):
        assert torch.equal(weight[places], old_weight)
        rows = weight[[words.ids[word] for word in ("black", "make", "zebra")]]
        assert torch.isfinite(rows).all() and torch.pdist(rows).min() > 0.05
        assert torch.cdist(rows, old_weight).min() > 0.05
    assert start.add_words(trained, NEW, seed=3) == []  # now it knows them


def test_new_rows_begin_as_those_of_a_new_model(trained):
    """Catches new words that are likelier, or louder, than those of a model that begins."""
    new = [f"word{k}" for k in range(500)]
    start.add_words(trained, new, seed=3)
    rows = [trained.tokenizer.ids[word] for word in new]
    fresh = model.Transfusion(trained.model.config)
    for part in ("embedding", "head"):
        assert getattr(trained.model, part).weight[rows].std().item() == pytest.approx(getattr(fresh, part).weight.std().item(), rel=0.05)


def test_twenty_new_words_are_named():
    """Catches a sentence of thousands of words, and "..." where all are named."""
    for n, more in ((20, False), (21, True)):
        new = [f"{k}" * 9 for k in range(n)]
        said = start.describe_words(new, data.Words(["cat", *new]))
        assert said.startswith(f"{n} words are new") and (", ..." in said) == more and said.count(",") == 19 + more


def test_new_words_are_the_same_on_every_process(trained):
    """Catches rows from the global generator: processes of a run, or a resumed run, would start from different models."""
    other = copy.deepcopy(trained)
    start.add_words(trained, NEW, seed=3)
    torch.rand(5)
    start.add_words(other, NEW, seed=3)
    assert same(trained.model.state_dict(), other.model.state_dict()) == []


def test_a_chameleons_codes_follow_the_last_word(make_model):
    """Catches codes that are read as the new words."""
    rival = Trained(make_model(vocabulary=len(SPECIAL) + 4 + 6), Words(OLD), None, Diffusion(), kind="chameleon")
    codes = rival.model.embedding.weight[-6:].clone(), rival.model.head.weight[-6:].clone()
    start.add_words(rival, NEW, seed=0)
    assert rival.model.config.vocabulary == len(rival.tokenizer) + 6
    assert torch.equal(rival.model.embedding.weight[-6:], codes[0]) and torch.equal(rival.model.head.weight[-6:], codes[1])


# ----------------------------------------------------------------------------- a folder of captions, then edits of it
def folder_of_captions(folder):
    """A dozen pictures with captions."""
    folder.mkdir()
    lines = []
    for k in range(12):
        Image.new("RGB", (32, 32), (20 * k, 0, 0)).save(folder / f"{k}.png")
        lines.append(json.dumps({"image": f"{k}.png", "caption": "A cat on a mat"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))


def small(*words):
    """An argument list with few steps: presets keep the rest."""
    return [str(word) for word in [*words, "--steps", 2, "--documents", 4, "--warmup", 1, "--samples", 0, "--gap-every", 2]]


def test_a_folder_of_captions_then_edits_of_it(tiny_vae, tmp_path, capsys):
    """Case 6, README's two lines with their presets. Catches instructions whose words the caption model does not know, and a
    fine-tuned model that cannot be loaded, resumed, or asked in its new words."""
    folder_of_captions(tmp_path / "pictures")
    folder_of_edits(tmp_path / "edits", "Make the cat black")
    train.main(small("--data", "folder", "--data-dir", tmp_path / "pictures", "--vae", tiny_vae, "--out", tmp_path / "one"))
    capsys.readouterr()
    edit = small("--preset", "edit", "--data-dir", tmp_path / "edits", "--init", tmp_path / "one/model.pt", "--out", tmp_path / "two",
                 "--save-every", 1)
    train.main(edit)
    assert "3 words are new to this model: black, make, the. They get new rows" in capsys.readouterr().out
    one, two = (load_trained(tmp_path / name / "model.pt") for name in ("one", "two"))
    assert set(two.tokenizer.vocabulary) - set(one.tokenizer.vocabulary) == {"black", "make", "the"}
    assert two.tokenizer.decode(two.tokenizer.encode("MAKE the cat black")) == "make the cat black"
    k, old = two.tokenizer.ids["mat"], one.tokenizer.ids["mat"]
    assert 0 < (two.model.embedding.weight[k] - one.model.embedding.weight[old]).abs().max() < 0.1      # moved by two steps only
    saved = states(tmp_path / "two")
    checkpoint_of_2 = tmp_path / "two/checkpoints/step_000002"
    (checkpoint_of_2 / ".metadata").unlink()            # killed while it was written
    train.main([*edit, "--resume"])
    assert same(saved, states(tmp_path / "two")) == []


def test_a_misspelt_word_is_named(pretrained, tmp_path, capsys):
    """Catches a typo that becomes a new word without anybody reading of it; also in the test split."""
    folder_of_edits(tmp_path / "mine", "remove the circel", at=9)
    train.main(tuning(pretrained, tmp_path / "run", data_dir=tmp_path / "mine", steps=1, gap_every=1))
    assert "1 words are new to this model: circel (not circle?)" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- what --init decides
@pytest.mark.parametrize("option", [
    ["--diffusion", "ddpm"], ["--shift", "1"], ["--size", "small"], ["--encoder", "unet"], ["--patch", "2"], ["--no-patch-position"],
    ["--no-bidirectional"], ["--stable"], ["--vae", str(ASSETS / "scenes_vae.pt")]], ids=" ".join)
def test_what_the_checkpoint_decides_cannot_be_asked_for(pretrained, tmp_path, option):
    """Case 49. Catches an option that is ignored while config.json records it."""
    name = option[0].replace("--no-", "--")
    with pytest.raises(UserError, match=f"{name}.* leave {name} out|VAE than .* leave --vae out"):
        train.main([*tuning(pretrained, tmp_path / "run"), *option])
    assert not (tmp_path / "run").exists()


def test_what_the_checkpoint_decides_is_recorded(pretrained, tiny_vae, tmp_path):
    """Catches a config.json of a run that never was: the preset's shift in place of the checkpoint's. The same value may be
    named, and the run resumes."""
    options = [*tuning(pretrained, tmp_path / "run", steps=2, save_every=1), "--shift", "3", "--patch", "4", "--vae", str(tiny_vae)]
    train.main(options)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["size"], config["patch"], config["shift"], config["diffusion"], config["patch_position"]) == ("toy", 4, 3.0, "flow", True)
    assert "named" not in config
    train.main([*tuning(pretrained, tmp_path / "run", steps=2, save_every=1), "--vae", str(tiny_vae), "--resume"])
    config, *_ = parse_arguments(["--preset", "edit", "--out", str(tmp_path / "x"), "--pairs", "20"])
    make_run(config, tmp_path / "x")                    # the shipped model, by its own preset
    assert (config.size, config.shift, config.patch) == ("small", 3.0, 2)


def test_decided_options_are_all_compared(trained):
    """Catches an option of the network's shape that was forgotten in one of the two lists."""
    assert set(start.decided_by(trained)) == start.DECIDED_BY_INIT <= set(vars(parse_arguments([])[0]))
    shape = set(vars(trained.model.config)) - {"vocabulary", "layers", "width", "heads", "multiple", "latent", "unet", "context", "T"}
    assert shape <= start.DECIDED_BY_INIT
    assert start.size_of(model.sized("7b", vocabulary=9)) == "7b"
    odd = model.ModelConfig(vocabulary=9, layers=3, width=48, heads=2)
    assert start.size_of(odd) == "3 layers of width 48 with 2 heads"
