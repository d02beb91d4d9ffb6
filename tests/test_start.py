"""
test_start.py: what does a run keep of the model that it starts from?
                                                     (support/start.py; Transfusion §4.5, --init)

THE IDEA    Fine-tuning may add words to a model, and nothing else about it may change.
COMPARED    a model with new words with a copy of itself without them; the README's way from a
            folder of captions to edits of it, run; and options that --init decides with those that
            the command line names.
RUN IT      pytest -n 0 tests/test_start.py
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
    network = make_model(vocabulary=len(SPECIAL) + 4).requires_grad_(False)
    return Trained(network, Words(OLD), None, Diffusion())


def run_model(trained, text):
    """(logits (T, V), what the model says of the picture) of a document: a text, then a noisy
    picture of four patches."""
    tokens = [BOS, *trained.tokenizer.encode(text), BOI, *[data.PATCH] * 4, data.EOI, EOS]
    row = torch.tensor([tokens])                        # (1, T)
    is_patch = row == data.PATCH
    image_id = torch.where(is_patch, 0, -1)
    doc_id = torch.zeros_like(row)
    g = torch.Generator().manual_seed(0)
    xt = torch.randn(1, 4, 4, 4, generator=g)           # (M, c, h, w)
    t = torch.tensor([300])
    return trained.model(row, image_id, doc_id, ~is_patch, xt, t)


# ---------------------------------------------------------------------------------------- new words
def test_new_words_change_no_old_one(trained):
    """Case 6. Catches rows that stay where they were while the sorted words move, a head that moves
    otherwise than the table, and new rows that are copies, or all alike."""
    before = copy.deepcopy(trained)
    added = start.add_words(trained, NEW, seed=3)
    words = trained.tokenizer
    table = trained.model.embedding
    head = trained.model.head

    # 1. The words are sorted, and everything has a row for each.
    assert added == ["black", "make", "zebra"]
    assert words.vocabulary == [*SPECIAL, *sorted({*OLD, "black", "make", "zebra"})]
    assert trained.model.config.vocabulary == len(words)
    assert table.num_embeddings == len(head.weight) == len(words)

    # 2. Old words have the scores that they had, at their new places. Pictures do not change.
    logits, out = run_model(trained, "a cat on a mat")
    old_logits, old_out = run_model(before, "a cat on a mat")
    places = [words.ids[word] for word in before.tokenizer.vocabulary]
    assert places != list(range(len(places)))           # they do move here
    assert torch.equal(out, old_out)
    assert torch.allclose(logits[:, places], old_logits, atol=1e-5)

    # 3. Old rows are the same. New ones resemble neither each other nor an old one.
    new = [words.ids[word] for word in ("black", "make", "zebra")]
    pairs = (
        (table.weight, before.model.embedding.weight),
        (head.weight, before.model.head.weight),
    )
    for weight, old_weight in pairs:
        rows = weight[new]
        assert torch.equal(weight[places], old_weight)
        assert torch.isfinite(rows).all()
        assert torch.pdist(rows).min() > 0.05
        assert torch.cdist(rows, old_weight).min() > 0.05

    assert start.add_words(trained, NEW, seed=3) == []  # now it knows them


def test_new_rows_begin_as_those_of_a_new_model(trained):
    """Catches new words that are likelier, or louder, than the words of a model that begins."""
    new = [f"word{k}" for k in range(500)]
    start.add_words(trained, new, seed=3)
    rows = [trained.tokenizer.ids[word] for word in new]
    fresh = model.Transfusion(trained.model.config)
    for part in ("embedding", "head"):
        deviation = getattr(trained.model, part).weight[rows].std().item()
        wanted = getattr(fresh, part).weight.std().item()
        assert deviation == pytest.approx(wanted, rel=0.05)


def test_twenty_new_words_are_named():
    """Catches a sentence of thousands of words, and "..." where all are named."""
    for n, more in ((20, False), (21, True)):
        new = [f"{k}" * 9 for k in range(n)]
        said = start.describe_words(new, data.Words(["cat", *new]))
        assert said.startswith(f"{n} words are new")
        assert (", ..." in said) == more
        commas = 20 if more else 19                     # between 20 words, and before "..."
        assert said.count(",") == commas


def test_new_words_are_the_same_on_every_process(trained):
    """Catches rows that are drawn by the global generator: the processes of a run, or a resumed
    run, would start from different models."""
    other = copy.deepcopy(trained)
    start.add_words(trained, NEW, seed=3)
    torch.rand(5)                                       # moves the global generator
    start.add_words(other, NEW, seed=3)
    assert same(trained.model.state_dict(), other.model.state_dict()) == []


def test_a_chameleons_codes_follow_the_last_word(make_model):
    """Catches codes of pictures that are read as the new words."""
    network = make_model(vocabulary=len(SPECIAL) + 4 + 6)       # 4 words, 6 codes
    rival = Trained(network, Words(OLD), None, Diffusion(), kind="chameleon")
    table = network.embedding.weight[-6:].clone()
    head = network.head.weight[-6:].clone()
    start.add_words(rival, NEW, seed=0)
    assert rival.model.config.vocabulary == len(rival.tokenizer) + 6
    assert torch.equal(rival.model.embedding.weight[-6:], table)
    assert torch.equal(rival.model.head.weight[-6:], head)


# --------------------------------------------------------- a folder of captions, then edits of it
def folder_of_captions(folder):
    """A dozen pictures with captions."""
    folder.mkdir()
    lines = []
    for k in range(12):
        Image.new("RGB", (32, 32), (20 * k, 0, 0)).save(folder / f"{k}.png")
        lines.append(json.dumps({"image": f"{k}.png", "caption": "A cat on a mat"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))


def small(*words):
    """An argument list with two steps: presets keep the rest."""
    few = ["--steps", 2, "--documents", 4, "--warmup", 1, "--samples", 0, "--gap-every", 2]
    return [str(word) for word in [*words, *few]]


def test_a_folder_of_captions_then_edits_of_it(tiny_vae, tmp_path, capsys):
    """Case 6: the README's two lines, with their presets. Catches instructions whose words the
    caption model does not know, and a fine-tuned model that cannot be loaded, resumed, or asked in
    its new words."""
    pictures = tmp_path / "pictures"
    edits = tmp_path / "edits"
    folder_of_captions(pictures)
    folder_of_edits(edits, "Make the cat black")
    learn = small(
        "--data", "folder", "--data-dir", pictures, "--vae", tiny_vae, "--out", tmp_path / "one",
    )
    edit = small(
        "--preset", "edit", "--data-dir", edits, "--init", tmp_path / "one/model.pt",
        "--out", tmp_path / "two", "--save-every", 1,
    )

    # 1. Train, then fine-tune.
    train.main(learn)
    capsys.readouterr()
    train.main(edit)
    sentence = "3 words are new to this model: black, make, the. They get new rows"
    assert sentence in capsys.readouterr().out

    # 2. The new model has the old words and the new ones.
    one = load_trained(tmp_path / "one/model.pt")
    two = load_trained(tmp_path / "two/model.pt")
    words = two.tokenizer
    assert set(words.vocabulary) - set(one.tokenizer.vocabulary) == {"black", "make", "the"}
    assert words.decode(words.encode("MAKE the cat black")) == "make the cat black"
    old_row = one.model.embedding.weight[one.tokenizer.ids["mat"]]
    row = two.model.embedding.weight[words.ids["mat"]]
    assert 0 < (row - old_row).abs().max() < 0.1        # moved by two steps only

    # 3. Killed while its last checkpoint was written, it resumes to the same bits.
    saved = states(tmp_path / "two")
    (tmp_path / "two/checkpoints/step_000002/.metadata").unlink()
    train.main([*edit, "--resume"])
    assert same(saved, states(tmp_path / "two")) == []


def test_a_misspelt_word_is_named(pretrained, tmp_path, capsys):
    """Catches a typo that becomes a new word although nobody is told; also in the test split."""
    folder_of_edits(tmp_path / "mine", "remove the circel", at=9)
    options = dict(data_dir=tmp_path / "mine", steps=1, gap_every=1)
    train.main(tuning(pretrained, tmp_path / "run", **options))
    assert "1 words are new to this model: circel (not circle?)" in capsys.readouterr().out


# ------------------------------------------------------------------------------ what --init decides
@pytest.mark.parametrize("option", [
    ["--diffusion", "ddpm"],
    ["--shift", "1"],
    ["--size", "small"],
    ["--encoder", "unet"],
    ["--patch", "2"],
    ["--no-patch-position"],
    ["--no-bidirectional"],
    ["--stable"],
    ["--vae", str(ASSETS / "scenes_vae.pt")],
], ids=" ".join)
def test_what_the_checkpoint_decides_cannot_be_asked_for(pretrained, tmp_path, option):
    """Case 49. Catches an option that is ignored while config.json records it."""
    name = option[0].replace("--no-", "--")
    sentence = f"{name}.* leave {name} out|VAE than .* leave --vae out"
    with pytest.raises(UserError, match=sentence):
        train.main([*tuning(pretrained, tmp_path / "run"), *option])
    assert not (tmp_path / "run").exists()


def test_what_the_checkpoint_decides_is_recorded(pretrained, tiny_vae, tmp_path):
    """Catches a config.json of a run that never was: the preset's shift in place of the
    checkpoint's. The same value may be named, and the run resumes."""
    vae = ["--vae", str(tiny_vae)]
    line = [*tuning(pretrained, tmp_path / "run", steps=2, save_every=1), *vae]
    train.main([*line, "--shift", "3", "--patch", "4"])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["size"] == "toy"
    assert config["patch"] == 4
    assert config["shift"] == 3.0
    assert config["diffusion"] == "flow"
    assert config["patch_position"] is True
    assert "named" not in config
    train.main([*line, "--resume"])

    # The shipped model, by its own preset.
    out = tmp_path / "x"
    config, *_ = parse_arguments(["--preset", "edit", "--out", str(out), "--pairs", "20"])
    make_run(config, out)
    assert (config.size, config.shift, config.patch) == ("small", 3.0, 2)


def test_decided_options_are_all_compared(trained):
    """Catches an option of the network's shape that was forgotten in one of the two lists."""
    config, *_ = parse_arguments([])
    assert set(start.decided_by(trained)) == start.DECIDED_BY_INIT
    assert start.DECIDED_BY_INIT <= set(vars(config))

    # Some options follow from the size, the data or the VAE: no command line names them.
    size = {"layers", "width", "heads", "multiple", "unet", "T"}
    data_and_vae = {"vocabulary", "context", "latent"}
    shape = set(vars(trained.model.config)) - size - data_and_vae
    assert shape <= start.DECIDED_BY_INIT

    odd = model.ModelConfig(vocabulary=9, layers=3, width=48, heads=2)
    assert start.size_of(model.sized("7b", vocabulary=9)) == "7b"
    assert start.size_of(odd) == "3 layers of width 48 with 2 heads"
