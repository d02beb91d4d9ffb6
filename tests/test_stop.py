"""
test_stop.py: whoever stops a run loses nothing        (train.py, support/; docs/PAPER.md §4.10)

THE IDEA    Ctrl-C or SIGTERM is sent to a run at every stage: while the VAE learns, while pictures
            are encoded, in the loop, in the report. Then one sentence says how to go on, the exit
            status is 128 + the signal, and the run that goes on ends as one that nobody stopped, to
            the bit.
TRY IT      python -m pytest -n 0 tests/test_stop.py
"""
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import evaluate
import train
import vae as vae_module
from autoencoder import train as vae_training
from config import parse_arguments
from conftest import make_run
from scale import pack, shards
from small_runs import arguments, ends, nothing_half_written, same, states
from sources import choose
from support import checkpoint
from support.checkpoint import load_trained
from support.common import UserError, run_command

pytestmark = pytest.mark.usefixtures("one_layer")

ROOT = Path(__file__).resolve().parents[1]


def press(patch, owner, name, number, at=1):
    """Send a signal to this process when owner.name is called for the at-th time."""
    real = getattr(owner, name)
    calls = []

    def call(*args, **options):
        calls.append(name)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return real(*args, **options)

    patch.setattr(owner, name, call)


def count_calls(monkeypatch, owner, name):
    """A list that grows by one with every call of owner.name."""
    real = getattr(owner, name)
    calls = []

    def call(*args):
        calls.append(name)
        return real(*args)

    monkeypatch.setattr(owner, name, call)
    return calls


def report_of(out):
    """What a run's report.json says, without what depends on the clock."""
    report = json.loads((out / "report.json").read_text())
    return {key: value for key, value in report.items() if "seconds" not in key}


# ------------------------------------------------------------------------------------- at any stage
STAGES = [                                      # where, the signal, at which call, the words
    (vae_training, "training_step", signal.SIGINT, 2, "vae/last.pt"),
    (vae_training, "training_step", signal.SIGTERM, 1, "vae/last.pt"),
    (vae_module, "encode_all", signal.SIGINT, 1, "goes on with the VAE"),
    (vae_module, "encode_all", signal.SIGTERM, 1, "goes on with the VAE"),
    (train, "train_step", signal.SIGTERM, 2, "saved at step 2"),
    (evaluate, "report", signal.SIGINT, 1, "from step 3"),
    (evaluate, "report", signal.SIGTERM, 1, "from step 3"),
]


def test_a_run_that_is_stopped_at_every_stage(short_run, tmp_path, monkeypatch, capsys):
    """Catches work that is lost, and a VAE or a step that is learned twice.

    Also catches a run that ends otherwise than an uninterrupted one."""
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path)                 # no VAE is shipped
    short = dict(vae="", vae_steps=4, steps=3, samples=2, sample_steps=1)
    vae_steps = count_calls(monkeypatch, vae_training, "training_step")
    train_steps = count_calls(monkeypatch, train, "train_step")
    out = tmp_path / "run"
    command = short_run(**short)

    for owner, name, number, at, words in STAGES:
        with monkeypatch.context() as patch:
            press(patch, owner, name, number, at)
            sentence = ends(capsys, train.main, command, 128 + number)
        assert sentence.startswith("stopped: ")
        assert words in sentence
        assert "--resume" in sentence
        assert (out / "reconstructions.png").stat().st_size > 1000      # the VAE can be looked at
        assert (out / "samples.png").exists() == (owner in (train, evaluate))
        assert nothing_half_written(out)
        command = short_run(**short) + ["--resume"]

    train.main(command)
    assert len(vae_steps) == 4
    assert len(train_steps) == 3
    assert not (out / "vae/last.pt").exists()

    # The same run, without a stop.
    whole = tmp_path / "whole"
    train.main(short_run(**short, out=whole))
    assert same(states(whole), states(out)) == []
    vae = checkpoint.load(out / "vae.pt", "vae")
    whole_vae = checkpoint.load(whole / "vae.pt", "vae")
    assert same(whole_vae["weights"], vae["weights"]) == []
    assert report_of(whole) == report_of(out)


def test_nothing_was_learned_yet(short_run, tmp_path, monkeypatch, capsys):
    """Catches advice to --resume where there is nothing to resume, and a folder left behind."""
    press(monkeypatch, choose, "load_pairs", signal.SIGTERM)
    sentence = ends(capsys, train.main, short_run(), 143)
    assert "the same command starts again" in sentence
    assert not (tmp_path / "run").exists()


def test_packing_goes_on(tmp_path, vae_file, monkeypatch, capsys):
    """Catches packing that SIGTERM ends without a word, and half a shard."""
    command = arguments(dict(
        pairs="scenes",
        text="scenes",
        scenes=40,
        vae=vae_file,
        seq_len=64,
        image_size=32,
        shard_rows=4,
        out=tmp_path / "packed",
    ))
    how = "the same command goes on where this one stopped"

    with monkeypatch.context() as patch:
        press(patch, pack.ShardWriter, "write", signal.SIGTERM, at=3)
        with pytest.raises(SystemExit) as stop:
            run_command(pack.main, command, if_stopped=how)
    assert stop.value.code == 143
    assert how in capsys.readouterr().err
    # That is what the program itself passes.
    assert f'if_stopped="{how}"' in (ROOT / "scale/pack.py").read_text()

    pack.main(command)
    shards.verify(tmp_path / "packed")


# --------------------------------------------------------------------------- before the last step
def test_a_run_may_end_early(short_run, copied_run, whole_run, capsys):
    """--resume --steps N. Catches a model that cannot be drawn with before the last step.

    Also catches a rate that falls otherwise than planned when the run goes on after all."""
    (copied_run / "model.pt").unlink()
    shutil.rmtree(copied_run / "checkpoints/step_000006")

    # From step 4 to step 5, of 6.
    train.main(short_run(steps=5) + ["--resume"])
    assert states(copied_run)["step"] == 5
    assert load_trained(copied_run / "model.pt")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert f'python sample.py "..." --checkpoint {copied_run}/model.pt' in last

    # Back to step 3 there is no way.
    sentence = ends(capsys, train.main, short_run(steps=3) + ["--resume"], 2)
    assert "has already taken 5 steps" in sentence

    # On to its planned end, and no further: the rate has fallen.
    train.main(short_run() + ["--resume"])
    assert same(states(whole_run), states(copied_run)) == []
    with pytest.raises(UserError, match="--steps 6"):
        train.main(short_run(steps=9) + ["--resume"])


def test_a_stopped_run_can_be_drawn_with(short_run, tmp_path, monkeypatch, capsys):
    """Catches hours of training that leave nothing to look at.

    Also catches a sentence that does not say how to look."""
    press(monkeypatch, train, "train_step", signal.SIGINT, at=2)

    sentence = ends(capsys, train.main, short_run(log_every=50), 130)

    assert sentence.endswith(f'python sample.py "..." --checkpoint {tmp_path}/run/model.pt')
    assert "--resume --steps 2" in sentence
    assert load_trained(tmp_path / "run/model.pt")

    # Half of a rival is no use alone; a Llama is asked for likelihoods.
    for part in ("chameleon", "llama"):
        other = tmp_path / "other"
        run = make_run(parse_arguments(short_run(out=other))[0], other)
        run.config.model = part
        advice = run.how_to_use()
        assert part in advice or "likelihood" in advice


def test_the_first_picture_comes_with_the_first_save(short_run, tmp_path, monkeypatch):
    """Catches a long run that shows nothing before its end.

    Also catches pictures of an earlier run that are taken for this one's."""
    real = train.train_step
    out = tmp_path / "run"
    seen = []

    def step(run):
        if run.step == 4:                               # whatever may go wrong
            raise RuntimeError("lost")
        seen.append((out / "samples.png").exists() and (out / "model.pt").exists())
        return real(run)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(RuntimeError, match="lost"):
        train.main(short_run(steps=6, save_every=2, samples=2, sample_steps=1))

    assert seen == [False, False, True, True]           # saved after the second step
    assert load_trained(out / "model.pt")

    # model.pt holds the average of step 4, in half precision.
    saved = states(out)
    assert saved["step"] == 4
    for name, weight in load_trained(out / "model.pt").model.state_dict().items():
        assert torch.equal(saved[f"average.{name}"].half(), weight.half()), name
