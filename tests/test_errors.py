"""
test_errors.py: the user's mistakes                                                                      (every command line)

One sentence on stderr that says what was wrong, exit status 2, no traceback, and nothing written or damaged. Most tests call
main() in this process, through support.common.run_command as the command line does; a few start a real one.
"""
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
MAINS = {"sample.py": sample.main, "train.py": train.main, "evaluate.py": evaluate.main,
         "autoencoder.train": vae_training.main, "metrics.likelihood": likelihood.main, "metrics.coco": coco.main}


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """A folder with model.pt, vae.pt, and files that are something else. Tests read it; none may change it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shelf")
    vae = vae_module.VAE(vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2)).eval()
    words = data.Words(scenes.load_scenes(1, 0, progress=False).vocabulary())
    network = Transfusion(sized("toy", vocabulary=len(words), latent=(2, 8, 8), patch=4, context=24)).eval()
    checkpoint.save_trained(folder / "model.pt", checkpoint.Trained(network, words, vae, Diffusion()))
    checkpoint.save(folder / "vae.pt", checkpoint.pack_vae(vae))
    whole, content = (folder / "model.pt").read_bytes(), torch.load(folder / "model.pt", weights_only=True)
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "edits").mkdir()
    (folder / "edits/edits.jsonl").write_text("")
    torch.save({**content, "config": {**content["config"], "experts": 8}}, folder / "newer.pt")
    torch.save({k: v for k, v in content.items() if k != "words"}, folder / "older.pt")
    torch.save({**content, "config": {**content["config"], "width": 64}}, folder / "narrower.pt")
    torch.save({**content["vae"], "config": {**content["vae"]["config"], "experts": 8}}, folder / "newer_vae.pt")
    torch.save({**content["vae"], "config": {**content["vae"]["config"], "channels": 8}}, folder / "wider_vae.pt")
    Image.new("RGB", (40, 30), "red").save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:60])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    return folder


def contents(folder):
    """{path: bytes} of everything under a folder."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def check_sentence(status, out, err, *words):
    """Exit status 2; the last line of stderr is one sentence that holds all the words; no traceback anywhere."""
    assert status == 2, err
    assert "Traceback" not in err + out
    lines = err.replace("\r", "\n").strip().splitlines()
    assert err.count("error: ") == 1 and "error: " in lines[-1] and 20 < len(lines[-1]) < 350     # it may name a vocabulary
    for word in words:
        assert word in lines[-1], f"{word!r} is not in {lines[-1]!r}"


def mistake(capsys, monkeypatch, folder, program, arguments, *words):
    """Run a command line in `folder` (in this process) that must fail with a sentence and change nothing there."""
    before = contents(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        run_command(MAINS[program], [str(a) for a in arguments])
    captured = capsys.readouterr()
    check_sentence(stop.value.code, captured.out, captured.err, *words)
    assert contents(folder) == before


# -------------------------------------------------------------------------------------------------------------- sample.py
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
    (["a circle and a square " * 8], ["context is 24: shorten it to 17 tokens"]),     # a prompt longer than the context
    (["[GOOD] " + "a circle " * 8], ["context is 24: shorten its words to 11 tokens"]),
    (["[GOOD] [GOOD] [GOOD] a circle"], ["context is 24: it has no room for these pictures"]),
    (["a circle", "--out", "nowhere/picture.png"], ["nowhere/picture.png"]),
    (["a circle", "--out", "picture.docx"], ["picture.docx", ".png"]),
    (["a circle", "--film", "nowhere/film.gif"], ["nowhere/film.gif"]),
    (["a circle", "--out", "picture.psd"], ["picture.psd", ".png"]),                  # Pillow reads it, but cannot write it
    (["--image", "GOOD", "--film", "film.gif"], ["--film", "only describes"]),
    (["a circle", "--guidance", "nan"], ["--guidance"]),
    (["a circle", "--open", "--temperature", "nan"], ["--temperature"]),
    (["a circle", "--seed", "10000000000000000"], ["--seed"]),
    (["--image", "absent.png"], ["absent.png"]),
    (["a circle", "--page", "page.html"], ["--page"]),                                # there is no such option any more
    (["a circle [absent.png]"], ["absent.png"]),
    (["[GOOD] a red circel"], ["'circel'", "'circle'"]),
    (["a circle", "--image", "GOOD"], ["--image", "["]),
    (["--edit", "remove the circle"], ["--edit", "--image"]),
    (["a circle", "--edit", "remove the circle"], ["--edit", "--image"]),
    (["--image", "absent.png", "--edit", "remove the circle"], ["absent.png"]),
    (["--image", "GOOD", "--edit", "remove the circel"], ["'circel'", "'circle'"]),
    (["--image", "GOOD", "--edit", "remove the circle", "--edit", "paint it"], ["'paint'"]),           # the second, before the first is drawn
    (["--image", "GOOD", "--edit", "make the red circle blue " * 3], ["context is 24"]),
    (["a circle", "--open", "--pictures", "0"], ["--pictures"]),
    (["a circle", "--pictures", "2"], ["--pictures belongs to --open"]),
    (["--image", "GOOD", "--open"], ["--open takes prompts"]),
    (["a circle", "--open", "--pictures", "4"], ["4 pictures", "need 28", "context is 24", "--pictures"]),
    (["[GOOD] a circle", "--open", "--pictures", "3"], ["need 28", "context is 24"]),
    (["a circle", "--guide-over", "noise"], ["--guide-over", "noise", "words"]),
    (["a circle", "--guide-over", "picture"], ["--guide-over", "picture"]),
], ids=lambda v: " ".join(v)[:40] if v and isinstance(v, list) else "nothing")
def test_sample(capsys, monkeypatch, tmp_path, shelf, arguments, words):
    """Catches a traceback, a wrong picture, or a wrong file where the user mistyped."""
    arguments = [a.replace("GOOD", str(shelf / "good.png")) for a in arguments]
    monkeypatch.setattr(sample.diffusion, "sample", lambda *a, **k: pytest.fail("drew before it looked at the options"))
    mistake(capsys, monkeypatch, tmp_path, "sample.py", [*arguments, "--checkpoint", shelf / "model.pt"], *words)


@pytest.mark.parametrize("name", ["cut.png", "text.png", "empty.png", "model.pt"])
def test_sample_reads_pictures_only(capsys, monkeypatch, tmp_path, shelf, name):
    """Catches half a picture that is described as if it were whole, and a file that is no picture."""
    arguments = ["--image", shelf / name, "--checkpoint", shelf / "model.pt"]
    mistake(capsys, monkeypatch, tmp_path, "sample.py", arguments, name, "picture")


@pytest.mark.parametrize("program, first", [("sample.py", ["a circle"]), ("evaluate.py", ["--n", "6", "--steps", "2"])])
@pytest.mark.parametrize("name", ["absent.pt", "truncated.pt", "text.pt", "good.png", "vae.pt", "newer.pt", "older.pt",
                                  "narrower.pt"])
def test_checkpoints(capsys, monkeypatch, tmp_path, shelf, program, first, name):
    """Catches another kind of checkpoint, another version's, or half of one: the file is named."""
    mistake(capsys, monkeypatch, tmp_path, program, [*first, "--checkpoint", shelf / name], name)


# ------------------------------------------------------------------------------------------------------ train.py
SMALL = ["--steps", "2", "--samples", "0", "--pairs", "20", "--documents", "2", "--patch", "4", "--out", "run", "--seq-len", "96"]


@pytest.mark.parametrize("arguments, words", [
    (["--out", ""], ["--out must name a folder"]),
    (["--preset", "six-papr"], ["--preset", "six-papr", "did you mean six-paper?"]),
    (["--preset", "xyzzy"], ["--preset", "xyzzy", "--help"]),                         # no list of 30 names
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
    (["--samples", "2", "--sample-steps", "0"], ["--sample-steps"]),                  # before the training, not after it
    (["--samples", "2", "--sample-steps", "1001"], ["--sample-steps"]),
    (["--image-size", "0"], ["--image-size"]),
    (["--image-size", "256", "--pairs", "20000"], ["20,000", "256x256", "3.7 GB", "at most 10,922"]),
    (["--data", "edits", "--init", "", "--image-size", "256", "--pairs", "20000"], ["40,000", "256x256"]),
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
    (["--data", "folder", "--data-dir", "EDITS"], ["has no captions.jsonl but edits.jsonl: use --data edits"]),
    (["--data", "edits", "--init", "", "--data-dir", "absent"], ["edits.jsonl"]),
    (["--preset", "edit", "--init", "absent.pt"], ["absent.pt"]),
    (["--preset", "edit", "--init", "VAE"], ["vae.pt", "'model'"]),
    (["--preset", "edit", "--init", "MODEL"], ["model.pt", "context of 24", "--seq-len"]),
    (["--preset", "edit", "--init", "MODEL", "--seq-len", "24", "--image-size", "48"], ["model.pt", "latents", "--image-size"]),
    (["--preset", "edit", "--init", "MODEL", "--seq-len", "24"], ["context of 24"]),  # a chain does not fit: say how long it is
    (["--resume"], ["nothing to resume"]),
    (["--diffusion", "flow", "--noise-skip"], ["--noise-skip", "--diffusion ddpm", "flow"]),
    (["--preset", "scenes", "--stepz", "3"], ["--stepz"]),
], ids=lambda v: " ".join(v)[:40])
def test_train(capsys, monkeypatch, tmp_path, shelf, arguments, words):
    """Catches a traceback, minutes of work before the mistake is found, and a folder left behind by a run that never was."""
    arguments = [{"MODEL": shelf / "model.pt", "VAE": shelf / "vae.pt", "NEWER_VAE": shelf / "newer_vae.pt",
                  "WIDER_VAE": shelf / "wider_vae.pt", "EDITS": shelf / "edits"}.get(a, a) for a in arguments]
    mistake(capsys, monkeypatch, tmp_path, "train.py", [*SMALL, "--vae", shelf / "vae.pt", *arguments], *words)


def test_data_without_a_preset():
    """Catches StopIteration where a fork has a data set of its own, and no preset for it."""
    with pytest.raises(UserError, match="--data photos.*--preset"):
        config.default_preset({"data": "photos"})


def folder_of_pictures(folder, n=12, last='{"image": "0.png", "caption": "red"}'):
    """A small folder for --data folder; last: one more line of captions.jsonl."""
    for k in range(n):
        Image.new("RGB", (8, 8), "red").save(folder / f"{k}.png")
    lines = [json.dumps({"image": f"{k}.png", "caption": "red"}) for k in range(n)]
    (folder / "captions.jsonl").write_text("\n".join([*lines, last]))


@pytest.mark.parametrize("last, words", [('{"image": "0.png", "caption": "red"', ["captions.jsonl line 13"]),
                                         ('{"picture": "0.png"}', ["captions.jsonl line 13"])], ids=["broken", "other keys"])
def test_captions_file(capsys, monkeypatch, tmp_path, shelf, last, words):
    """Catches a broken line in a long file that is not named."""
    folder_of_pictures(tmp_path, last=last)
    arguments = [*SMALL, "--vae", shelf / "vae.pt", "--data", "folder", "--data-dir", tmp_path]
    mistake(capsys, monkeypatch, tmp_path, "train.py", arguments, *words)


def test_too_few_pictures(capsys, monkeypatch, tmp_path, shelf):
    """Catches a data set without a test split that is found out after the VAE has been trained."""
    folder_of_pictures(tmp_path, n=3)
    monkeypatch.setattr("scale.run.train_vae", lambda *a, **k: pytest.fail("trained a VAE first"))
    mistake(capsys, monkeypatch, tmp_path, "train.py", [*SMALL, "--data", "folder", "--data-dir", tmp_path], "at least ten")


@pytest.mark.parametrize("program", ["train.py", "autoencoder.train"])
def test_out_is_a_file(capsys, monkeypatch, tmp_path, shelf, program):
    """Catches a run that fails at its end because it cannot write, and a file of the user's that is overwritten."""
    (tmp_path / "run").write_text("precious")
    load_pairs = choose.load_pairs
    monkeypatch.setattr(choose, "load_pairs", lambda *a, **k: load_pairs(*a, **{**k, "n": 20}))
    arguments = [*SMALL, "--vae", shelf / "vae.pt"] if program == "train.py" else ["--steps", "2", "--out", "run"]
    mistake(capsys, monkeypatch, tmp_path, program, arguments, "run")


def test_out_below_a_file(capsys, monkeypatch, tmp_path, shelf):
    """Catches a folder that cannot be made, which is found out after the VAE has been trained."""
    folder_of_pictures(tmp_path)
    monkeypatch.setattr("scale.run.train_vae", lambda *a, **k: pytest.fail("trained a VAE first"))
    mistake(capsys, monkeypatch, tmp_path, "train.py", [*SMALL, "--data", "folder", "--data-dir", tmp_path, "--out", "0.png/run"], "0.png/run")


def test_out_cannot_be_written(capsys, monkeypatch, tmp_path, shelf):
    """Catches a traceback where the user may not write."""
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    mistake(capsys, monkeypatch, tmp_path, "train.py", [*SMALL, "--vae", shelf / "vae.pt", "--out", "locked/run"], "locked/run")


def test_resume_with_a_changed_option(capsys, monkeypatch, tmp_path, shelf):
    """Catches a resume that mixes two runs, or damages the first one while refusing."""
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, "--vae", str(shelf / "vae.pt")])
    mistake(capsys, monkeypatch, tmp_path, "train.py", [*SMALL, "--vae", shelf / "vae.pt", "--lr", "1", "--resume"], "--lr")
    mistake(capsys, monkeypatch, tmp_path, "train.py", [*SMALL, "--vae", shelf / "vae.pt"], "--resume", "--overwrite")
    path = next((tmp_path / "run/checkpoints/step_000002").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:1000])
    mistake(capsys, monkeypatch, tmp_path, "train.py", [*SMALL, "--vae", shelf / "vae.pt", "--resume"], "step_000002", "damaged")


@pytest.mark.parametrize("program, arguments, words", [
    ("autoencoder.train", ["--steps", "0", "--out", "run"], ["--steps"]),
    ("autoencoder.train", ["--image-size", "33", "--steps", "2", "--out", "run"], ["divisible by 4"]),
    ("autoencoder.train", ["--image-size", "16", "--steps", "2", "--out", "run"], ["at least 20 pixels"]),
    ("autoencoder.train", ["--data", "folder", "--data-dir", "absent", "--out", "run"], ["captions.jsonl"]),
    ("autoencoder.train", ["--kl-weight", "-1", "--steps", "2", "--out", "run"], ["--kl-weight"]),
    ("autoencoder.train", ["--seed=-1", "--steps", "2", "--out", "run"], ["--seed must be between 0"]),
    ("evaluate.py", ["--n", "0"], ["--n"]),
    ("evaluate.py", ["--guidance", "-1"], ["--guidance"]),
    ("evaluate.py", ["--sampler", "euler"], ["euler", "ddpm"]),
    ("evaluate.py", ["--steps", "0"], ["0"]),
    ("evaluate.py", ["--steps", "1001"], ["--steps must be between 1 and 1000, got 1001"]),
    ("evaluate.py", ["--world", "seven"], ["--world", "seven"]),
    ("evaluate.py", ["--json", "nowhere/numbers.json"], ["nowhere/numbers.json"]),
    ("evaluate.py", ["--json", "model.pt"], ["model.pt", "must end in .json"]),
    ("evaluate.py", ["--data", "mnist", "--data-dir", "absent"], ["absent"]),
], ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else v)
def test_vae_and_evaluate(capsys, monkeypatch, tmp_path, shelf, program, arguments, words):
    """Catches a traceback, or a mistake found out after the work is done."""
    load_pairs = choose.load_pairs
    monkeypatch.setattr(choose, "load_pairs", lambda *a, **k: load_pairs(*a, **{**k, "n": 20}))
    monkeypatch.setattr(scene_metrics, "captioning", lambda *a, **k: pytest.fail("measured before it looked at the options"))
    few = ["--checkpoint", shelf / "model.pt", "--n", "6", "--steps", "2"] if program == "evaluate.py" else []
    mistake(capsys, monkeypatch, tmp_path, program, [*few, *arguments], *words)


@pytest.mark.parametrize("program, arguments, words", [
    ("metrics.likelihood", ["perplexity"], ["say what to read", "perplexity a.jsonl"]),
    ("metrics.likelihood", ["perplexity", "absent.txt"], ["absent.txt", ".jsonl"]),
    ("metrics.likelihood", ["perplexity", "SHELF/words.txt"], ["'purple'"]),
    ("metrics.likelihood", ["choices"], ["choices questions.jsonl"]),
    ("metrics.likelihood", ["choices", "scenes", "b.jsonl"], ["b.jsonl", '"answer"']),
    ("metrics.likelihood", ["choices", "scenes", "--include-path", "."], ["--include-path is for", "suite"]),
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
    ("metrics.coco", ["scenes", "--limit", "8", "--inception", "SHELF/text.pt"], ["text.pt", "inception-2015-12-05.pt"]),
    ("metrics.coco", ["scenes", "--limit", "8", "--vae", "SHELF/text.pt"], ["text.pt"]),
], ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else v)
def test_yardsticks(capsys, monkeypatch, tmp_path, shelf, program, arguments, words):
    """Catches a traceback, and a mistake that is found out after an hour of drawing."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)   # as if it were not installed
    monkeypatch.setattr(sample, "draw", lambda *_, **__: pytest.fail("drew before it looked"))
    (shelf / "words.txt").write_text("a red circle\na purple circle\n")
    arguments = [a.replace("SHELF", str(shelf)) for a in arguments]
    mistake(capsys, monkeypatch, tmp_path, program, [*arguments, "--checkpoint", shelf / "model.pt"], *words)


# ------------------------------------------------------------------------------------------------------- real command lines
@pytest.mark.parametrize("program, arguments, words", [
    ("sample.py", ["a purple circle", "--checkpoint", "MODEL"], ["'purple'"]),
    ("train.py", ["--steps", "0"], ["--steps"]),
    ("evaluate.py", ["--checkpoint", "absent.pt"], ["absent.pt"]),
    ("autoencoder.train", ["--data", "folder"], ["--data-dir"])], ids=lambda v: v if isinstance(v, str) else "")
def test_real_command_lines(tmp_path, shelf, program, arguments, words):
    """Catches a program that is not run through `run_command`, or needs to be started in its own folder."""
    arguments = [str(shelf / "model.pt") if a == "MODEL" else a for a in arguments]
    command = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    done = subprocess.run([sys.executable, *command, *arguments], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    check_sentence(done.returncode, done.stdout, done.stderr, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", MAINS)
def test_help_names_every_option_with_its_default(program, capsys):
    """Catches a --help that breaks (a stray % in a text does it) or hides a default."""
    with pytest.raises(SystemExit) as stop:
        MAINS[program](["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and said.count("default:") >= 4


def test_bugs_keep_their_traceback():
    """Catches a `run_command` that hides our own mistakes behind a polite sentence."""
    def broken(argv):
        raise KeyError("a bug")
    with pytest.raises(KeyError):
        run_command(broken)


@pytest.mark.parametrize("fill", [lambda argv: bytearray(2 ** 60), lambda argv: torch.empty(2 ** 60)])
def test_memory_that_runs_out_anywhere_has_a_sentence(capsys, fill):
    """Catches one that ends in a traceback, as AdamW's did where no `explain_memory` was around it."""
    with pytest.raises(SystemExit) as stop:
        run_command(fill)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory: ")


def test_the_models_answer_when_nothing_is_wrong(monkeypatch, tmp_path, shelf, capsys):
    """Catches checks so strict that nothing passes: the same commands, without the mistakes."""
    monkeypatch.chdir(tmp_path)
    model = ["--checkpoint", str(shelf / "model.pt")]
    run_command(sample.main, ["a red circle", "a circle", "--steps", "2", "--film", "film.png", *model])
    assert {p.name for p in tmp_path.iterdir()} == {"sample.png", "film.png"}
    run_command(sample.main, ["--image", str(shelf / "good.png"), *model])
    assert "good.png: " in capsys.readouterr().out
