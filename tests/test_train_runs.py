"""
test_train_runs.py: whole runs of the loop           (train.py; Transfusion §4.1, App. B, Fig. 5)

THE IDEA    A run of six steps is compared with another one, to the bit: interrupted and resumed,
            crashed and resumed, exported on its way. Where a command would damage a run that is
            there, it must refuse and leave every file as it was. Then what a run leaves behind,
            with every ablation and on every kind of data.
TRY IT      pytest -n 0 tests/test_train_runs.py
"""
import json
import shutil
import signal

import pytest
import torch

import data
import train
from config import Config, parse_arguments
from conftest import make_run
from scale import distributed, export
from small_runs import interrupt, log, same, save_tiny_vae, small_run, states, write_files
from support import checkpoint
from support.checkpoint import load_trained
from support.common import Stopped, UserError

pytestmark = pytest.mark.usefixtures("tiny_size")       # nothing here looks at what was learned


@pytest.fixture(scope="module")
def whole(tiny_size, tiny_vae, tmp_path_factory):
    """The folder of a run that nothing interrupted: what every resumed run must equal."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.main(small_run(vae=tiny_vae, out=out))
    return out


def weights_of(path):
    """{name: tensor} of a model.pt, as the file has them: 16 bits."""
    return checkpoint.load(path, "model")["weights"]


def vae_weights_of(path):
    """{name: tensor} of a vae.pt."""
    return checkpoint.load(path, "vae")["weights"]


# ------------------------------------------------------------------------------------------- resume
def test_resume_equals_uninterrupted(command, tmp_path, whole, monkeypatch):
    """Catches a resume that loses the average, the optimizer, the step count, or lines of the log:
    all must be equal to the bit."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, at=3)
        with pytest.raises(Stopped, match="step 3.*--resume"):
            train.main(command())
    assert states(out)["step"] == 3
    assert load_trained(out / "model.pt")               # there is a model to draw with

    train.main(command() + ["--resume"])
    assert same(states(whole), states(out)) == []
    assert log(whole) == log(out)
    assert same(weights_of(whole / "model.pt"), weights_of(out / "model.pt")) == []


def test_resume_after_a_crash(command, tmp_path, whole, monkeypatch):
    """Catches a crash (no Ctrl-C, nothing saved) after the last checkpoint: the log must not hold
    two lines of one step, and a half-written line must not stop the resumed run."""
    out = tmp_path / "run"
    real = train.train_step

    def crash_in_step_6(run):
        if run.step >= 5:
            raise ZeroDivisionError
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", crash_in_step_6)
        with pytest.raises(ZeroDivisionError):
            train.main(command(save_every=2))
    assert states(out)["step"] == 4                     # saved after step 4,
    assert len(log(out)) == 5                           # but logged until step 5
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lm": 0.')

    train.main(command(save_every=2) + ["--resume"])
    assert same(states(whole), states(out)) == []
    assert log(whole) == log(out)


PLACES = {                                              # in a step: whose function is called there
    "losses": (train, "losses"),
    "optimizer": (torch.optim.AdamW, "step"),
    "average": (torch, "_foreach_lerp_"),
}


@pytest.mark.parametrize("where", PLACES)
def test_ctrl_c_in_the_middle_of_a_step(command, tmp_path, whole, monkeypatch, where):
    """Catches Ctrl-C between the optimizer's update, the count of steps and the average: a resume
    would repeat one of them, or skip it."""
    out = tmp_path / "run"
    owner, name = PLACES[where]
    real = getattr(owner, name)
    calls = []

    def press():
        calls.append(name)
        if len(calls) == 3:                             # in the third step
            signal.raise_signal(signal.SIGINT)          # what Ctrl-C sends

    def press_before(*args, **more):
        press()
        return real(*args, **more)

    def press_after(*args, **more):
        result = real(*args, **more)
        press()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, press_before if where == "average" else press_after)
        with pytest.raises(Stopped):
            train.main(command())
    assert states(out)["step"] in (2, 3)

    train.main(command() + ["--resume"])
    assert same(states(whole), states(out)) == []


# ---------------------------------------------------------------------- a run that is there already
def folder(path):
    """{name: content} of every file in a run's folder."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path): file.read_bytes() for file in files}


def test_an_existing_run_is_not_overwritten(command, tmp_path, whole):
    """Catches yesterday's run lost to a second `python train.py`. --overwrite starts anew."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with pytest.raises(UserError, match="--resume.*--overwrite.*--out"):
        train.main(command(steps=2, seed=4))
    assert folder(out) == folder(whole)

    train.main(command(steps=2, seed=4) + ["--overwrite"])
    assert json.loads((out / "config.json").read_text())["seed"] == 4
    assert [row["step"] for row in log(out)] == [1, 2]
    assert states(out)["step"] == 2


OTHERS = [("lr", 0.1), ("documents", 7), ("steps", 9), ("drop", 0.3), ("patch", 2)]


@pytest.mark.parametrize("option, value", OTHERS)
def test_resume_with_another_configuration_is_refused(command, tmp_path, whole, option, value):
    """Catches a resumed run that is neither the old one nor a new one. Nothing of the old one may
    be touched."""
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match=f"--{option} "):
        train.main(command(**{option: value}) + ["--resume"])
    assert folder(tmp_path / "run") == folder(whole)


def test_an_option_that_an_old_run_did_not_know(command, tmp_path, whole):
    """An old run's config.json lacks the newest options: they had their defaults. Catches a
    Transfusion that goes on as a Llama."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    options = json.loads((out / "config.json").read_text())
    for name in ("t_limit", "stable"):
        options.pop(name)
    (out / "config.json").write_text(json.dumps(options))

    with pytest.raises(UserError, match="--t-limit 500"):
        train.main(command(t_limit=900) + ["--resume"])
    train.main(command() + ["--resume"])


def test_resume_may_change_what_does_not_change_the_run(command, tmp_path, whole):
    """Catches a resume that refuses another --save-every. A finished run that is resumed only
    writes its results again."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    train.main(command(save_every=7, log_every=2) + ["--resume"])
    assert same(states(whole), states(out)) == []
    assert log(whole) == log(out)


def test_nothing_to_resume(command, tmp_path):
    """Catches --resume with a misspelt --out that quietly starts from nothing."""
    with pytest.raises(UserError, match="nothing to resume"):
        train.main(command("absent") + ["--resume"])
    assert not (tmp_path / "absent").exists()


# -------------------------------------------------------------------------- checkpoints and exports
def test_without_an_average(command, tmp_path):
    """Catches --ema 0 that still holds a second copy of the weights, or that ends with other
    weights than a run whose average forgets at once."""
    none = tmp_path / "none"
    forgets = tmp_path / "forgets"
    train.main(command("none", ema=0, save_every=3))
    train.main(command("forgets", ema=1e-9, save_every=3))
    one = load_trained(none / "model.pt").model.state_dict()
    two = load_trained(forgets / "model.pt").model.state_dict()
    assert same(one, two) == []

    run = make_run(parse_arguments(command(ema=0))[0], tmp_path / "run")
    assert run.average is run.model
    train.train_step(run)
    assert not run.gather_trained().model.training

    # Resumed from step 3, it ends in the same state.
    distributed.remove(distributed.folder_of(none, 6))
    train.main(command("none", ema=0, save_every=3) + ["--resume"])
    wanted = states(forgets)
    wanted = {name: wanted[name] for name in wanted if not name.startswith("average.")}
    assert same(states(none), wanted) == []


def test_a_kept_checkpoint_becomes_a_model(command, tmp_path, monkeypatch):
    """Fig. 5 scores one run after several budgets. Catches a checkpoint of --keep-every that is
    deleted, and any other that is kept. Catches an export of other weights than the average, of the
    newest step instead of the one asked for, or only after the run's end."""
    out = tmp_path / "run"
    averages = {}                                       # {step: the averaged weights after it}
    real = train.train_step

    def step(run):
        if run.step == 5:                               # an export while the run goes on
            (out / "model.pt").unlink(missing_ok=True)  # and whatever model.pt it has by now
            path = str(distributed.folder_of(out, 2))
            export.main([path, "-o", str(out / "on_its_way.pt")])
        result = real(run)
        weights = run.average.state_dict()
        averages[run.step] = {name: weight.half() for name, weight in weights.items()}
        return result

    monkeypatch.setattr(train, "train_step", step)
    train.main(command(save_every=1, keep_every=2, steps=7))
    kept, half_written = distributed.list_checkpoints(out)
    assert kept == [2, 4, 6, 7]
    assert half_written == []

    for number in (4, 7):
        export.main([str(distributed.folder_of(out, number))])
    assert same(weights_of(out / "on_its_way.pt"), averages[2]) == []
    assert same(weights_of(out / "model_000004.pt"), averages[4]) == []
    assert same(weights_of(out / "model_000007.pt"), averages[7]) == []

    # An export is as complete as the model.pt that the run itself wrote.
    last = checkpoint.load(out / "model.pt", "model")
    exported = checkpoint.load(out / "model_000007.pt", "model")
    assert last.keys() == exported.keys()
    for name in ("words", "diffusion", "about"):
        assert last[name] == exported[name]
    early = load_trained(out / "model_000004.pt").model.config
    assert early == load_trained(out / "model.pt").model.config


def test_exports_that_cannot_be(command, tmp_path):
    """Catches a traceback, and weights of a checkpoint that is half written or damaged."""
    train.main(command(save_every=2, ema=0))
    out = tmp_path / "run"
    fourth = str(distributed.folder_of(out, 4))
    sixth = str(distributed.folder_of(out, 6))

    with pytest.raises(UserError, match="has .*step_000004, .*step_000006"):
        export.main([str(out)])
    with pytest.raises(UserError, match="not a complete checkpoint"):
        export.main([str(out / "checkpoints/step_000005")])
    with pytest.raises(UserError, match="--keep-every 3 must be a multiple of --save-every 2"):
        train.main(command("other", save_every=2, keep_every=3))
    for name in ("", "text.json"):                      # an empty name is not the default
        with pytest.raises(UserError, match="its name must end in .pt"):
            export.main([fourth, "--out", name])

    [weights] = distributed.folder_of(out, 4).glob("__0_*")
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match="is damaged"):
        export.main([fourth])

    # A run of an earlier version has no parts.pt: what it would say is taken from model.pt.
    (out / "parts.pt").unlink()
    export.main([sixth])
    # Without an average, the model itself is exported.
    assert same(weights_of(out / "model.pt"), weights_of(out / "model_000006.pt")) == []
    (out / "model.pt").unlink()
    with pytest.raises(UserError, match="has no parts.pt"):
        export.main([sixth])


# ------------------------------------------------------------------------- what a run leaves behind
def test_what_a_run_leaves_behind(command, tmp_path, capsys, monkeypatch):
    """Catches a run without its files, with a log that lacks a number, or with a model that
    sample.py cannot load. Catches a run of the paper's objective that is called rectified flow, and
    one that a second Ctrl-C does not end at once."""
    real = train.finish_step_first
    alone = []

    def finish_step_first(**how):
        alone.append(how)
        return real(**how)

    monkeypatch.setattr(train, "finish_step_first", finish_step_first)
    train.main(command(log_every=2))
    assert alone == [{"alone": True}]                   # then a second Ctrl-C ends it at once

    # 1. The files.
    out = tmp_path / "run"
    files = {path.name for path in out.iterdir()}
    assert files == {"config.json", "log.jsonl", "curves.png", "model.pt", "parts.pt",
                     "checkpoints"}
    assert (out / "curves.png").stat().st_size > 5000
    options = json.loads((out / "config.json").read_text())
    assert options["seed"] == 3
    assert options["documents"] == 6
    options.pop("learned")
    assert Config(**options)

    # 2. The log.
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    numbers = {"step", "lm", "diffusion", "by_t", "grad_norm", "lr", "tokens_per_s", "seconds_left"}
    for row in rows:
        assert numbers <= set(row)
        assert len(row["by_t"]) == 5
        assert row["lm"] > 0
        assert row["tokens_per_s"] > 0                  # not divided by the time of day
    assert "gap" in rows[-1]
    config = parse_arguments(command(log_every=2))[0]
    used = [train.learning_rate(config, step) for step in (1, 3, 5)]
    assert [row["lr"] for row in rows] == used          # of the step just taken, not of the next

    # 3. The model: the averaged weights, in 16 bits.
    trained = load_trained(out / "model.pt")
    saved = states(out)
    for name, weight in trained.model.state_dict().items():
        assert torch.allclose(weight, saved[f"average.{name}"], rtol=1e-3, atol=1e-6), name
    assert trained.tokenizer.vocabulary[:7] == list(data.SPECIAL)
    assert trained.diffusion.kind == "ddpm"

    # 4. What it said.
    said = capsys.readouterr().out
    assert "model.pt" in said
    assert "rectified flow" not in said


def test_losses_fall(command, tmp_path):
    """docs/PAPER.md §4.14, "is this loss normal?". Forty steps on sixty scenes must already bring
    both losses down."""
    train.main(command(steps=40, documents=12, lr=0.02, warmup=5, log_every=10, gap_every=40))
    first, *_, last = log(tmp_path / "run")
    assert last["lm"] < 0.7 * first["lm"]
    assert last["diffusion"] < first["diffusion"] < 1.3     # 1: it predicts zeros


# --------------------------------------------------------------- every ablation, every kind of data
ABLATIONS = [
    ["--diffusion", "flow"],
    ["--noise-skip"],
    ["--encoder", "unet"],
    ["--patch-position"],
    ["--no-bidirectional"],
]


@pytest.mark.parametrize("options", ABLATIONS, ids=" ".join)
def test_every_ablation_runs(command, tmp_path, options):
    """Catches an option that nobody has run to its end, and one that is read and not passed on to
    the model that is trained, saved and loaded."""
    train.main(command(steps=2) + options)
    trained = load_trained(tmp_path / "run/model.pt")
    config = trained.model.config
    is_on = {
        "--diffusion": trained.diffusion.kind == options[-1],
        "--noise-skip": trained.diffusion.noise_skip,
        "--encoder": config.encoder == options[-1],
        "--patch-position": config.patch_position,
        "--no-bidirectional": not config.bidirectional,
    }
    assert is_on[options[0]]


@pytest.mark.parametrize("size", [32, 48])
def test_a_run_ends_with_its_report(command, tmp_path, size):
    """Catches a report that breaks after hours of training: a run must end with report.json and
    samples.png, at any size."""
    numbers = train.main(command(steps=2, samples=2, sample_steps=2, image_size=size, seq_len=128))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report.keys() == numbers.keys()
    assert numbers.keys() >= {"geneval", "exact", "rule", "captions", "excess_nats", "entropy",
                              "deductions", "conditioning_gap"}
    assert (tmp_path / "run/samples.png").stat().st_size > 1000


@pytest.mark.parametrize("source", ["mnist", "folder"])
def test_a_run_on_files(tmp_path, source):
    """Catches a grey picture, or a world without grammar, that train.py, its report or its VAE did
    not think of."""
    files = tmp_path / "files"
    write_files(source, files)
    grey = source == "mnist"
    save_tiny_vae(tmp_path / "vae.pt", image_channels=1 if grey else 3)

    options = small_run(data=source, data_dir=files, vae=tmp_path / "vae.pt", out=tmp_path / "run",
                        steps=2, samples=2, sample_steps=2)
    numbers = train.main(options)
    assert (tmp_path / "run/samples.png").stat().st_size > 1000
    assert "conditioning_gap" in numbers
    if grey:
        assert {"guided", "unguided", "captions"} <= numbers.keys()


def test_the_vae_is_trained_when_there_is_none(tmp_path, monkeypatch):
    """Catches a VAE trained on the spot that is not kept: a resumed run would read other latents
    than those it learned from."""
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path)     # no VAE is shipped
    path = tmp_path / "run/vae.pt"
    options = small_run(out=tmp_path / "run", steps=2, vae_steps=3)
    train.main(options)
    kept = vae_weights_of(path)
    train.main(options + ["--resume"])
    assert same(kept, vae_weights_of(path)) == []

    # model.pt brings the same VAE, in 16 bits.
    packed = checkpoint.load(tmp_path / "run/model.pt", "model")["vae"]["weights"]
    for name, weight in kept.items():
        if weight.is_floating_point():
            weight = weight.half()
        assert torch.equal(weight, packed[name])

    # Another run must not take the VAE that lies there.
    for change in (["--vae-steps", "2"], ["--vae-lr", "1e-3"]):
        train.main(options + ["--overwrite", *change])
        assert same(kept, vae_weights_of(path)) != []
