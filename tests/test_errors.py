"""
test_errors.py: the user's mistakes                                         (every command line)

THE IDEA    Each case is a command line with one mistake in it, and words that the answer must hold.
            The answer is one sentence on stderr and exit status 2, without a traceback, and nothing
            is written or damaged. Most tests call main() in this process, through `run_command`, as
            the command line does; a few start a real one.
TRY IT      python -m pytest -n 0 tests/test_errors.py -k test_sample
"""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import config
import data
import evaluate
import sample
import train
import vae as vae_module
from autoencoder import train as vae_training
from diffusion import Diffusion
from metrics import coco, likelihood
from metrics import scenes as scene_metrics
from model import Transfusion, sized
from sources import choose, scenes
from support import checkpoint
from support.common import UserError, run_command

ROOT = Path(__file__).resolve().parents[1]
MAINS = {
    "sample.py": sample.main,
    "train.py": train.main,
    "evaluate.py": evaluate.main,
    "autoencoder.train": vae_training.main,
    "metrics.likelihood": likelihood.main,
    "metrics.coco": coco.main,
}


def name_of_case(value):
    """A part of a test's name: the arguments, and nothing else at length."""
    return " ".join(value)[:40]


def name_of_program_case(value):
    """The same where a program's name stands before its arguments."""
    return name_of_case(value) if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------- the shelf
@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """A folder with model.pt, vae.pt, and files that are something else.

    Tests read it; none may change it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shelf")
    write_checkpoints(folder)
    write_pictures(folder)
    (folder / "edits").mkdir()
    (folder / "edits/edits.jsonl").write_text("")
    return folder


def write_checkpoints(folder):
    """model.pt and vae.pt, of untrained networks, and others that are damaged or do not fit."""
    vae_config = vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2)
    vae = vae_module.VAE(vae_config).eval()
    words = data.Words(scenes.load_scenes(1, 0, progress=False).vocabulary())
    config = sized("toy", vocabulary=len(words), latent=(2, 8, 8), patch=4, context=24)
    network = Transfusion(config).eval()
    checkpoint.save_trained(
        folder / "model.pt", checkpoint.Trained(network, words, vae, Diffusion()))
    checkpoint.save(folder / "vae.pt", checkpoint.pack_vae(vae))

    whole = (folder / "model.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("not a checkpoint")

    model = torch.load(folder / "model.pt", weights_only=True)
    write_changed(folder / "newer.pt", model, experts=8)
    write_changed(folder / "narrower.pt", model, width=64)
    write_changed(folder / "newer_vae.pt", model["vae"], experts=8)
    write_changed(folder / "wider_vae.pt", model["vae"], channels=8)
    del model["words"]
    torch.save(model, folder / "older.pt")


def write_changed(path, content, **options):
    """A checkpoint with other options in its "config" than its weights have."""
    torch.save({**content, "config": {**content["config"], **options}}, path)


def write_pictures(folder):
    """good.png, and three files that are no whole picture."""
    Image.new("RGB", (40, 30), "red").save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:60])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")


# ------------------------------------------------------------------------------- what must be true
def contents(folder):
    """{path: bytes} of everything under a folder. A folder in it has None."""
    found = {}
    for path in folder.rglob("*"):
        found[path.relative_to(folder)] = path.read_bytes() if path.is_file() else None
    return found


def check_sentence(status, out, err, *words):
    """Exit status 2; the last line of stderr is one sentence that holds all the words.

    There is no traceback anywhere."""
    assert status == 2, err
    assert "Traceback" not in err + out
    assert err.count("error: ") == 1
    sentence = err.replace("\r", "\n").strip().splitlines()[-1]
    assert "error: " in sentence
    assert 20 < len(sentence) < 350                     # it may name a vocabulary
    for word in words:
        assert word in sentence, f"{word!r} is not in {sentence!r}"


def mistake(capsys, monkeypatch, folder, program, arguments, *words):
    """Run a command line in `folder`, in this process.

    It must fail with a sentence, and change nothing there."""
    before = contents(folder)
    monkeypatch.chdir(folder)

    with pytest.raises(SystemExit) as stop:
        run_command(MAINS[program], [str(word) for word in arguments])

    captured = capsys.readouterr()
    check_sentence(stop.value.code, captured.out, captured.err, *words)
    assert contents(folder) == before


def few_pictures(monkeypatch):
    """Let every source have 20 pictures."""
    load_pairs = choose.load_pairs

    def load_few(*args, **options):
        return load_pairs(*args, **{**options, "n": 20})

    monkeypatch.setattr(choose, "load_pairs", load_few)


def fail_if_called(sentence):
    """A function that ends a test with this sentence."""
    return lambda *args, **options: pytest.fail(sentence)


# ---------------------------------------------------------------------------------------- sample.py
@pytest.mark.parametrize("arguments, words", [
    ([], ["say what to draw"]),
    (["a red circel"], ["'circel'", "'circle'"]),
    (["a <boi> circle"], ["<boi>"]),
    (["a circle", "--steps", "0"], ["between 1 and 1000", "0"]),
    (["a circle", "--steps", "1001"], ["between 1 and 1000"]),
    (["a circle", "--steps", "many"], ["--steps must be a whole number, got 'many'"]),
    (["a circle", "--stepz=3"], ["there is no option --stepz: did you mean --steps?"]),
    (["a circle", "--film", "film.mp4"], ["film.mp4", ".gif"]),
    (["a circle []"], ["there is no file ''"]),
    (["a circle and bad.png"], ["--image bad.png", "[bad.png]"]),
    (["a circle", "--guidance", "-1"], ["--guidance"]),
    (["a circle", "--temperature", "-1"], ["--temperature"]),
    (["a circle", "--top-p", "0"], ["--top-p"]),
    (["a circle", "--sampler", "euler"], ["--sampler", "euler", "ddpm"]),
    (["a circle", "--stepz", "3"], ["--stepz"]),
    # Prompts that are longer than the context.
    (["a circle and a square " * 8], ["context is 24: shorten it to 17 tokens"]),
    (["[GOOD] " + "a circle " * 8], ["context is 24: shorten its words to 11 tokens"]),
    (["[GOOD] [GOOD] [GOOD] a circle"], ["context is 24: it has no room for these pictures"]),
    (["a circle", "--out", "nowhere/picture.png"], ["nowhere/picture.png"]),
    (["a circle", "--out", "picture.docx"], ["picture.docx", ".png"]),
    (["a circle", "--film", "nowhere/film.gif"], ["nowhere/film.gif"]),
    # Pillow reads it, but cannot write it.
    (["a circle", "--out", "picture.psd"], ["picture.psd", ".png"]),
    (["--image", "GOOD", "--film", "film.gif"], ["--film", "only describes"]),
    (["a circle", "--guidance", "nan"], ["--guidance"]),
    (["a circle", "--open", "--temperature", "nan"], ["--temperature"]),
    (["a circle", "--seed", "10000000000000000"], ["--seed"]),
    (["--image", "absent.png"], ["absent.png"]),
    (["a circle", "--page", "page.html"], ["--page"]),  # there is no such option any more
    (["a circle [absent.png]"], ["absent.png"]),
    (["[GOOD] a red circel"], ["'circel'", "'circle'"]),
    (["a circle", "--image", "GOOD"], ["--image", "["]),
    (["--edit", "remove the circle"], ["--edit", "--image"]),
    (["a circle", "--edit", "remove the circle"], ["--edit", "--image"]),
    (["--image", "absent.png", "--edit", "remove the circle"], ["absent.png"]),
    (["--image", "GOOD", "--edit", "remove the circel"], ["'circel'", "'circle'"]),
    # The second edit, before the first is drawn.
    (["--image", "GOOD", "--edit", "remove the circle", "--edit", "paint it"], ["'paint'"]),
    (["--image", "GOOD", "--edit", "make the red circle blue " * 3], ["context is 24"]),
    (["a circle", "--open", "--pictures", "0"], ["--pictures"]),
    (["a circle", "--pictures", "2"], ["--pictures belongs to --open"]),
    (["--image", "GOOD", "--open"], ["--open takes prompts"]),
    (
        ["a circle", "--open", "--pictures", "4"],
        ["4 pictures", "need 28", "context is 24", "--pictures"],
    ),
    (["[GOOD] a circle", "--open", "--pictures", "3"], ["need 28", "context is 24"]),
    (["a circle", "--guide-over", "noise"], ["--guide-over", "noise", "words"]),
    (["a circle", "--guide-over", "picture"], ["--guide-over", "picture"]),
], ids=lambda value: name_of_case(value) if value else "nothing")
def test_sample(capsys, monkeypatch, tmp_path, shelf, arguments, words):
    """Catches a traceback, a wrong picture, or a wrong file where the user mistyped."""
    arguments = [word.replace("GOOD", str(shelf / "good.png")) for word in arguments]
    arguments += ["--checkpoint", shelf / "model.pt"]
    drew = fail_if_called("drew before it looked at the options")
    monkeypatch.setattr(sample.diffusion, "sample", drew)

    mistake(capsys, monkeypatch, tmp_path, "sample.py", arguments, *words)


@pytest.mark.parametrize("name", ["cut.png", "text.png", "empty.png", "model.pt"])
def test_sample_reads_pictures_only(capsys, monkeypatch, tmp_path, shelf, name):
    """Catches half a picture that is described as if it were whole, and a file that is none."""
    arguments = ["--image", shelf / name, "--checkpoint", shelf / "model.pt"]
    mistake(capsys, monkeypatch, tmp_path, "sample.py", arguments, name, "picture")


@pytest.mark.parametrize("program, first", [
    ("sample.py", ["a circle"]),
    ("evaluate.py", ["--n", "6", "--steps", "2"]),
])
@pytest.mark.parametrize("name", [
    "absent.pt",
    "truncated.pt",
    "text.pt",
    "good.png",
    "vae.pt",
    "newer.pt",
    "older.pt",
    "narrower.pt",
])
def test_checkpoints(capsys, monkeypatch, tmp_path, shelf, program, first, name):
    """Catches another kind of checkpoint, another version's, or half of one: it must be named."""
    arguments = [*first, "--checkpoint", shelf / name]
    mistake(capsys, monkeypatch, tmp_path, program, arguments, name)


# ----------------------------------------------------------------------------------------- train.py
SMALL = [
    "--steps", "2",
    "--samples", "0",
    "--pairs", "20",
    "--documents", "2",
    "--patch", "4",
    "--out", "run",
    "--seq-len", "96",
]


@pytest.mark.parametrize("arguments, words", [
    (["--out", ""], ["--out must name a folder"]),
    (["--preset", "six-papr"], ["--preset", "six-papr", "did you mean six-paper?"]),
    (["--preset", "xyzzy"], ["--preset", "xyzzy", "--help"]),           # no list of 30 names
    (["--size", "70b"], ["70b", "toy"]),
    (["--encoder", "vit"], ["--encoder", "vit", "unet"]),
    (["--steps", "0"], ["--steps", "at least 1"]),
    (["--patch", "0"], ["--patch", "at least 1"]),
    (["--patch", "3"], ["8x8", "3x3", "--patch"]),
    (["--seq-len", "8"], ["context of 8", "--seq-len"]),
    (["--lr", "-1"], ["--lr"]),
    (["--lr", "nan"], ["--lr"]),
    (["--drop", "1.5"], ["--drop"]),
    (["--ema", "2"], ["--ema"]),
    (["--warmup", "-5"], ["--warmup"]),
    (["--guidance", "-1"], ["--guidance"]),
    (["--samples", "-1"], ["--samples"]),
    (["--samples", "2", "--sample-steps", "0"], ["--sample-steps"]),    # before the training
    (["--samples", "2", "--sample-steps", "1001"], ["--sample-steps"]),
    (["--image-size", "0"], ["--image-size"]),
    (
        ["--image-size", "256", "--pairs", "20000"],
        ["20,000", "256x256", "3.7 GB", "at most 10,922"],
    ),
    (
        ["--data", "edits", "--init", "", "--image-size", "256", "--pairs", "20000"],
        ["40,000", "256x256"],                          # two pictures per edit
    ),
    (["--image-size", "16"], ["at least 20 pixels"]),
    (["--data", "edits", "--init", "", "--image-size", "16"], ["at least 20 pixels"]),
    (["--image-size", "33"], ["33", "divisible by 4"]),
    (["--vae", "absent.pt"], ["absent.pt"]),
    (["--vae", "MODEL"], ["model.pt", "'vae'"]),
    (["--vae", "NEWER_VAE"], ["newer_vae.pt", "another version"]),
    (["--vae", "WIDER_VAE"], ["wider_vae.pt", "another version"]),
    (["--data", "mnist", "--data-dir", "absent"], ["absent", "--data-dir"]),
    (["--data", "folder"], ["--data-dir"]),
    (["--data", "photos"], ["--data", "photos", "scenes"]),
    (["--data", "folder", "--data-dir", "absent"], ["captions.jsonl"]),
    (["--data-dir", "packed"], ["packed", "--data shards"]),
    (["--vae-z", "8"], ["--vae-z", "vae.pt brings its own"]),
    (
        ["--data", "folder", "--data-dir", "EDITS"],
        ["has no captions.jsonl but edits.jsonl: use --data edits"],
    ),
    (["--data", "edits", "--init", "", "--data-dir", "absent"], ["edits.jsonl"]),
    (["--preset", "edit", "--init", "absent.pt"], ["absent.pt"]),
    (["--preset", "edit", "--init", "VAE"], ["vae.pt", "'model'"]),
    (["--preset", "edit", "--init", "MODEL"], ["model.pt", "context of 24", "--seq-len"]),
    (
        ["--preset", "edit", "--init", "MODEL", "--seq-len", "24", "--image-size", "48"],
        ["model.pt", "latents", "--image-size"],
    ),
    # A chain of edits does not fit: say how long it is.
    (["--preset", "edit", "--init", "MODEL", "--seq-len", "24"], ["context of 24"]),
    (["--resume"], ["nothing to resume"]),
    (["--diffusion", "flow", "--noise-skip"], ["--noise-skip", "--diffusion ddpm", "flow"]),
    (["--preset", "scenes", "--stepz", "3"], ["--stepz"]),
], ids=name_of_case)
def test_train(capsys, monkeypatch, tmp_path, shelf, arguments, words):
    """Catches a traceback, and minutes of work before the mistake is found.

    Also catches a folder left behind by a run that never was."""
    on_the_shelf = {
        "MODEL": shelf / "model.pt",
        "VAE": shelf / "vae.pt",
        "NEWER_VAE": shelf / "newer_vae.pt",
        "WIDER_VAE": shelf / "wider_vae.pt",
        "EDITS": shelf / "edits",
    }
    arguments = [on_the_shelf.get(word, word) for word in arguments]
    command = [*SMALL, "--vae", shelf / "vae.pt", *arguments]
    mistake(capsys, monkeypatch, tmp_path, "train.py", command, *words)


NEW_VAE = ("--vae-steps=9", "--vae-lr=9", "--vae-channels=8", "--vae-z=16", "--vae-balance")


@pytest.mark.parametrize("option", NEW_VAE)
def test_options_of_a_new_vae_where_one_is_shipped(option):
    """Catches an option that is ignored: scenes_vae.pt has 4 latent channels, and config.json would
    say 16. The paths of pictures, codes and shards each find another VAE."""
    name = option.split("=")[0]
    for options, owner in (
        (["--data", "scenes"], "scenes_vae.pt"),
        (["--model", "chameleon"], "scenes_vq.pt"),
        (["--data", "shards", "--data-dir", "mine"], "mine"),
    ):
        with pytest.raises(UserError, match=f"{name} is for a new VAE, but .*{owner} brings its"):
            config.parse_arguments([*options, option])


@pytest.mark.parametrize("option", NEW_VAE)
def test_options_of_a_new_vae_where_one_is_trained(option):
    """Catches a refusal where the option counts: digits have no VAE, and a run that goes on has
    trained its own."""
    name = option.split("=")[0].removeprefix("--").replace("-", "_")
    for words in (["--data", "mnist"], ["--data", "scenes", "--resume"]):
        options, *_ = config.parse_arguments([*words, option])
        assert getattr(options, name) in (9, 8, 16, True)


def test_data_without_a_preset():
    """Catches StopIteration where a fork has a data set of its own, and no preset for it."""
    with pytest.raises(UserError, match="--data photos.*--preset"):
        config.default_preset({"data": "photos"})


def folder_of_pictures(folder, n=12, last='{"image": "0.png", "caption": "red"}'):
    """A small folder for --data folder; last: one more line of captions.jsonl."""
    lines = []
    for k in range(n):
        Image.new("RGB", (8, 8), "red").save(folder / f"{k}.png")
        lines.append(json.dumps({"image": f"{k}.png", "caption": "red"}))
    (folder / "captions.jsonl").write_text("\n".join([*lines, last]))


@pytest.mark.parametrize("last, words", [
    ('{"image": "0.png", "caption": "red"', ["captions.jsonl line 13"]),
    ('{"picture": "0.png"}', ["captions.jsonl line 13"]),
], ids=["broken", "other keys"])
def test_captions_file(capsys, monkeypatch, tmp_path, shelf, last, words):
    """Catches a broken line in a long file that is not named."""
    folder_of_pictures(tmp_path, last=last)
    data_options = ["--data", "folder", "--data-dir", tmp_path]
    command = [*SMALL, "--vae", shelf / "vae.pt", *data_options]
    mistake(capsys, monkeypatch, tmp_path, "train.py", command, *words)


def test_too_few_pictures(capsys, monkeypatch, tmp_path, shelf):
    """Catches a data set without a test split, found out after the VAE has been trained."""
    folder_of_pictures(tmp_path, n=3)
    monkeypatch.setattr("scale.run.train_vae", fail_if_called("trained a VAE first"))
    command = [*SMALL, "--data", "folder", "--data-dir", tmp_path]
    mistake(capsys, monkeypatch, tmp_path, "train.py", command, "at least ten")


@pytest.mark.parametrize("program", ["train.py", "autoencoder.train"])
def test_out_is_a_file(capsys, monkeypatch, tmp_path, shelf, program):
    """Catches a run that fails at its end because it cannot write.

    Also catches a file of the user's that is overwritten."""
    (tmp_path / "run").write_text("precious")
    few_pictures(monkeypatch)
    command = ["--steps", "2", "--out", "run"]
    if program == "train.py":
        command = [*SMALL, "--vae", shelf / "vae.pt"]
    mistake(capsys, monkeypatch, tmp_path, program, command, "run")


def test_out_below_a_file(capsys, monkeypatch, tmp_path, shelf):
    """Catches a folder that cannot be made, found out after the VAE has been trained."""
    folder_of_pictures(tmp_path)
    monkeypatch.setattr("scale.run.train_vae", fail_if_called("trained a VAE first"))
    command = [*SMALL, "--data", "folder", "--data-dir", tmp_path, "--out", "0.png/run"]
    mistake(capsys, monkeypatch, tmp_path, "train.py", command, "0.png/run")


def test_out_cannot_be_written(capsys, monkeypatch, tmp_path, shelf):
    """Catches a traceback where the user may not write."""
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    command = [*SMALL, "--vae", shelf / "vae.pt", "--out", "locked/run"]
    mistake(capsys, monkeypatch, tmp_path, "train.py", command, "locked/run")


def test_resume_with_a_changed_option(capsys, monkeypatch, tmp_path, shelf):
    """Catches a resume that mixes two runs, or damages the first one while refusing."""
    command = [*SMALL, "--vae", str(shelf / "vae.pt")]

    def refused(options, *words):
        mistake(capsys, monkeypatch, tmp_path, "train.py", [*command, *options], *words)

    monkeypatch.chdir(tmp_path)
    train.main(command)

    refused(["--lr", "1", "--resume"], "--lr")
    refused([], "--resume", "--overwrite")

    path = next((tmp_path / "run/checkpoints/step_000002").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:1000])
    refused(["--resume"], "step_000002", "damaged")


# ----------------------------------------------------------------------------- the other programs
@pytest.mark.parametrize("program, arguments, words", [
    ("autoencoder.train", ["--steps", "0", "--out", "run"], ["--steps"]),
    (
        "autoencoder.train",
        ["--image-size", "33", "--steps", "2", "--out", "run"],
        ["divisible by 4"],
    ),
    (
        "autoencoder.train",
        ["--image-size", "16", "--steps", "2", "--out", "run"],
        ["at least 20 pixels"],
    ),
    (
        "autoencoder.train",
        ["--data", "folder", "--data-dir", "absent", "--out", "run"],
        ["captions.jsonl"],
    ),
    ("autoencoder.train", ["--kl-weight", "-1", "--steps", "2", "--out", "run"], ["--kl-weight"]),
    (
        "autoencoder.train",
        ["--seed=-1", "--steps", "2", "--out", "run"],
        ["--seed must be between 0"],
    ),
    ("evaluate.py", ["--n", "0"], ["--n"]),
    ("evaluate.py", ["--guidance", "-1"], ["--guidance"]),
    ("evaluate.py", ["--sampler", "euler"], ["euler", "ddpm"]),
    ("evaluate.py", ["--steps", "0"], ["0"]),
    ("evaluate.py", ["--steps", "1001"], ["--steps must be between 1 and 1000, got 1001"]),
    ("evaluate.py", ["--world", "seven"], ["--world", "seven"]),
    ("evaluate.py", ["--json", "nowhere/numbers.json"], ["nowhere/numbers.json"]),
    ("evaluate.py", ["--json", "model.pt"], ["model.pt", "must end in .json"]),
    ("evaluate.py", ["--data", "mnist", "--data-dir", "absent"], ["absent"]),
], ids=name_of_program_case)
def test_vae_and_evaluate(capsys, monkeypatch, tmp_path, shelf, program, arguments, words):
    """Catches a traceback, or a mistake found out after the work is done."""
    few_pictures(monkeypatch)
    measured = fail_if_called("measured before it looked at the options")
    monkeypatch.setattr(scene_metrics, "captioning", measured)
    few = []
    if program == "evaluate.py":
        few = ["--checkpoint", shelf / "model.pt", "--n", "6", "--steps", "2"]

    mistake(capsys, monkeypatch, tmp_path, program, [*few, *arguments], *words)


@pytest.mark.parametrize("program, arguments, words", [
    ("metrics.likelihood", ["perplexity"], ["say what to read", "perplexity a.jsonl"]),
    ("metrics.likelihood", ["perplexity", "absent.txt"], ["absent.txt", ".jsonl"]),
    ("metrics.likelihood", ["perplexity", "SHELF/words.txt"], ["'purple'"]),
    ("metrics.likelihood", ["choices"], ["choices questions.jsonl"]),
    ("metrics.likelihood", ["choices", "scenes", "b.jsonl"], ["b.jsonl", '"answer"']),
    (
        "metrics.likelihood",
        ["choices", "scenes", "--include-path", "."],
        ["--include-path is for", "suite"],
    ),
    ("metrics.likelihood", ["suite", "piqa", "--include-path", "nowhere"], ["no folder nowhere"]),
    ("metrics.likelihood", ["choices", "absent.jsonl"], ["absent.jsonl", '"answer"']),
    ("metrics.likelihood", ["choices", "scenes", "--limit", "0"], ["--limit"]),
    ("metrics.likelihood", ["choices", "scenes", "--json", "nowhere/numbers.json"], ["nowhere"]),
    ("metrics.likelihood", ["suite"], ["pip install lm-eval"]),
    ("metrics.coco", ["absent"], ["absent/captions.jsonl"]),
    ("metrics.coco", ["SHELF/good.png"], ["good.png/captions.jsonl"]),
    ("metrics.coco", ["absent.jsonl"], ["absent.jsonl", "GenEval"]),
    ("metrics.coco", ["scenes", "--limit", "3"], ["--limit"]),
    ("metrics.coco", ["metadata.jsonl", "--clip", "clip"], ["its own script", "--clip"]),
    ("metrics.coco", ["scenes", "--limit", "8", "--sampler", "euler"], ["euler", "ddpm"]),
    (
        "metrics.coco",
        ["scenes", "--limit", "8", "--inception", "SHELF/text.pt"],
        ["text.pt", "inception-2015-12-05.pt"],
    ),
    ("metrics.coco", ["scenes", "--limit", "8", "--vae", "SHELF/text.pt"], ["text.pt"]),
], ids=name_of_program_case)
def test_yardsticks(capsys, monkeypatch, tmp_path, shelf, program, arguments, words):
    """Catches a traceback, and a mistake that is found out after an hour of drawing."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)   # as if it were not installed
    monkeypatch.setattr(sample, "draw", fail_if_called("drew before it looked"))
    (shelf / "words.txt").write_text("a red circle\na purple circle\n")
    arguments = [word.replace("SHELF", str(shelf)) for word in arguments]
    arguments += ["--checkpoint", shelf / "model.pt"]

    mistake(capsys, monkeypatch, tmp_path, program, arguments, *words)


# ------------------------------------------------------------------------------- real command lines
@pytest.mark.parametrize("program, arguments, words", [
    ("sample.py", ["a purple circle", "--checkpoint", "MODEL"], ["'purple'"]),
    ("train.py", ["--steps", "0"], ["--steps"]),
    ("evaluate.py", ["--checkpoint", "absent.pt"], ["absent.pt"]),
    ("autoencoder.train", ["--data", "folder"], ["--data-dir"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_real_command_lines(tmp_path, shelf, program, arguments, words):
    """Catches a program that is not run through `run_command`.

    Also catches one that needs to be started in its own folder."""
    arguments = [str(shelf / "model.pt") if word == "MODEL" else word for word in arguments]
    command = ["-m", program]
    if program.endswith(".py"):
        command = [str(ROOT / program)]

    done = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )

    check_sentence(done.returncode, done.stdout, done.stderr, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", MAINS)
def test_help_names_every_option_with_its_default(program, capsys):
    """Catches a --help that breaks (a stray % in a text does it) or hides a default."""
    with pytest.raises(SystemExit) as stop:
        MAINS[program](["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert printed.count("default:") >= 4


def modules_with_options():
    """The names of all modules in folders that have a command line, as in "scale.pack"."""
    found = []
    for room in ("autoencoder", "forks", "metrics", "notebooks", "scale", "sources", "support"):
        for path in sorted((ROOT / room).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            if "Parser(\n" in text or "Parser(prog" in text or "Parser(desc" in text:
                found.append(f"{room}.{path.stem}")
    return found


@pytest.mark.parametrize("name", [
    name for name in modules_with_options() if name != "support.sample_options"     # of sample.py
])
def test_help_says_how_to_start_it(name, monkeypatch, capsys):
    """Catches "usage: train.py" of autoencoder/train.py, which sends the reader to another program:
    argparse takes the name of the file."""
    program = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    with pytest.raises(SystemExit):
        program.main()
    assert capsys.readouterr().out.startswith(f"usage: python -m {name} ")


def test_bugs_keep_their_traceback():
    """Catches a `run_command` that hides our own mistakes behind a polite sentence."""
    def broken(argv):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_command(broken)


@pytest.mark.parametrize("fill", [
    lambda argv: bytearray(2 ** 60),                    # Python's MemoryError
    lambda argv: torch.empty(2 ** 60),                  # a plain RuntimeError
])
def test_memory_that_runs_out_anywhere_has_a_sentence(capsys, fill):
    """Catches a traceback, as AdamW's memory had one where no `explain_memory` was around it."""
    with pytest.raises(SystemExit) as stop:
        run_command(fill)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory: ")


def test_the_models_answer_when_nothing_is_wrong(monkeypatch, tmp_path, shelf, capsys):
    """Catches checks so strict that nothing passes: the same commands, without the mistakes."""
    monkeypatch.chdir(tmp_path)
    model = ["--checkpoint", str(shelf / "model.pt")]

    options = ["--steps", "2", "--film", "film.png"]
    run_command(sample.main, ["a red circle", "a circle", *options, *model])
    assert {path.name for path in tmp_path.iterdir()} == {"sample.png", "film.png"}

    run_command(sample.main, ["--image", str(shelf / "good.png"), *model])
    assert "good.png: " in capsys.readouterr().out
