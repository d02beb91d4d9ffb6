"""
test_not_finite.py: no step on NaN or infinity, nothing kept  (scale/run.py; docs/PAPER.md §4.10)

THE IDEA    A number that is not finite is planted in every place where one could come from: an
            option, a latent, a weight, a gradient, a loss, a file. Then three things must hold: no
            step is taken with it, no file keeps it, and one sentence says where it was.
            A spike of the gradient is finite: it is only marked in the log.
TRY IT      python -m pytest -n 0 tests/test_not_finite.py
            (two processes of one run: this file run as a program is one of them)
"""
import copy
import math
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import train
import vae as vae_module
from autoencoder import train as vae_training
from config import parse_arguments
from conftest import make_run
from metrics import progress
from scale import distributed, pack, shards
from scale.run import words_of_culprit
from small_runs import (
    arguments,
    check_kept,
    ends,
    log,
    nothing_half_written,
    same,
    small_run,
    untrained_vae,
)
from sources import scenes
from support import checkpoint
from support.checkpoint import load_trained, load_vae
from support.common import UserError, run_command

pytestmark = pytest.mark.usefixtures("one_layer")

ROOT = Path(__file__).resolve().parents[1]


def clone(state):
    """A copy of a dict of tensors that later steps do not change."""
    return {name: tensor.clone() for name, tensor in state.items()}


# ---------------------------------------------------------------------------------------- options
WAYS = {                                                # options, and what the sentence may say
    "rate": (
        dict(lr=1e6, warmup=0),
        ["step", "not finite"],
    ),
    "rate that overflows the weights": (
        dict(lr=1e38, warmup=0, save_every=1),
        ["not finite", "not taken"],
    ),
    "decay that overflows the weights": (
        dict(decay=1e300, warmup=0, save_every=1),
        ["not finite", "not taken"],
    ),
    "lambda": (
        dict(lam=1e308),
        ["step 1 was not taken"],
    ),
    "lambda whose gradient overflows": (
        dict(lam=1e36),
        ["step 1 was not taken"],
    ),
    "last step": (
        dict(lr=1e38, warmup=0, steps=1),
        ["not finite"],
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_options_that_lead_to_nan(short_run, tmp_path, capsys, way):
    """Catches a run that trains on NaN to its end with exit status 0.

    It would overwrite its good checkpoints with it."""
    options, words = WAYS[way]

    sentence = ends(capsys, train.main, short_run(**options), 2)

    assert any(part in sentence for part in words)
    assert len(sentence) < 500
    kept = check_kept(tmp_path / "run")
    assert all(step < 6 for step in kept)
    assert not (tmp_path / "run/model.pt").exists()


@pytest.mark.parametrize("name, value", [
    ("lr", "inf"),
    ("lr", "nan"),
    ("lam", "inf"),
    ("lam", "nan"),
    ("shift", "inf"),
    ("shift", "nan"),
    ("clip", "nan"),
    ("clip", "inf"),
    ("decay", "inf"),
    ("ema", "nan"),
    ("guidance", "nan"),
    ("seed", "-1"),
    ("accumulate", str(2 ** 64)),
])
def test_options_out_of_range(name, value):
    """Catches NaN that comes in by the front door: no comparison with it is true.

    Also catches whole numbers with which the run would hang."""
    with pytest.raises(UserError, match=f"--{name} must be"):
        parse_arguments([f"--{name}={value}"])


def test_the_least_is_enough():
    """Catches a limit that refuses 1, where 1 is a number of steps or of documents."""
    names = ("steps", "log_every", "gap_every", "save_every", "documents", "accumulate")
    words = [f"--{name.replace('_', '-')}=1" for name in names]
    config = parse_arguments(words)[0]
    for name in names:
        assert getattr(config, name) == 1, name


# --------------------------------------------------------------------------------- in a training
@pytest.fixture
def run(short_run, tmp_path):
    """A Run at step 0."""
    config = parse_arguments(short_run(lam=5.0))[0]
    return make_run(config, tmp_path / "run")


def fill_latents(run):
    """Every picture is NaN."""
    run.feed.latents[0][:] = math.nan


def one_latent(run):
    """One number of one picture is infinite."""
    run.feed.latents[0][7, 0, 0, 0] = math.inf


def weight(run):
    """The embedding of some words is NaN."""
    run.model.embedding.weight.data[20:] = math.nan


def gradient(run):
    """Losses are finite, a gradient is NaN."""
    run.model.norm.weight.register_hook(lambda grad: grad * math.nan)


def gradient_overflows(run):
    """Each number of a gradient is finite; their squares add up to infinity."""
    run.model.norm.weight.register_hook(lambda grad: grad + 3e38)


def loss_alone(run):
    """The diffusion loss is infinite. Its gradient is zero, because lambda is."""
    run.config.lam = 0.0
    run.model.patch_encoder.out.weight.data.fill_(1e30)


@pytest.mark.parametrize(
    "plant",
    [fill_latents, one_latent, weight, gradient, gradient_overflows, loss_alone],
)
def test_no_step_is_taken_on_nan(run, plant):
    """Catches a step that spoils the weights, the average or the optimizer.

    The loss must be looked at before, not after."""
    train.train_step(run)
    average = clone(run.average.state_dict())
    plant(run)
    weights = clone(run.model.state_dict())
    moments = copy.deepcopy(run.optimizer.state_dict()["state"])

    sentence = "step [2-9]+ was not taken.*(micro-batch 0|losses are finite)"
    with pytest.raises(UserError, match=sentence):
        for _ in range(9):                              # the one latent is not drawn in every step
            train.train_step(run)
            average = clone(run.average.state_dict())
            weights = clone(run.model.state_dict())
            moments = copy.deepcopy(run.optimizer.state_dict()["state"])

    # All is as it was before the step that was not taken. What was planted is not compared: NaN
    # does not equal NaN.
    assert same(average, run.average.state_dict()) == []
    finite = {name: tensor for name, tensor in weights.items() if tensor.isfinite().all()}
    now = run.model.state_dict()
    assert same(finite, {name: now[name] for name in finite}) == []
    moments_now = run.optimizer.state_dict()["state"]
    for k in moments:
        assert same(moments[k], moments_now[k]) == []


def test_the_sentence_names_the_document(run, monkeypatch):
    """Catches a sentence that blames the first document of the batch.

    Also catches one that counts a Chameleon's codes as words."""
    batch = run.feed.batch(3, 0, 0)
    tokenizer = run.feed.tokenizer

    # Spoil the last picture of the batch, and find the document that it stands in.
    picture = len(batch.latents) - 1
    batch.latents[picture, 0, 2, 1] = -math.inf
    row, position = (batch.image_id == picture).nonzero()[0].tolist()
    document = batch.doc_id[row, position]
    ids = batch.tokens[row][batch.doc_id[row] == document]
    assert (row, document) != (0, batch.doc_id[0, 0])   # it is not the first one

    assert words_of_culprit(batch, tokenizer) == tokenizer.decode(ids.tolist())

    # A long document is cut.
    for n, words in ((60, "x" * 60), (61, "x" * 60 + " ...")):
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "decode", lambda ids, n=n: "x" * n)
            assert words_of_culprit(batch, tokenizer) == words

    batch.tokens[batch.tokens >= 7] = 10_000            # codes follow the words
    assert words_of_culprit(batch, tokenizer) == ""


@pytest.mark.parametrize("where", ["optimizer", "average", "model"])
def test_nothing_that_is_not_finite_is_kept(run, tmp_path, where):
    """Catches a checkpoint that would resume into NaN.

    A bad memory cell, or a last step that overflowed, can make one."""
    train.train_step(run)
    saver = distributed.Saver(tmp_path, run.ranks)
    saver.save(1, run.model, run.average, run.optimizer)

    if where == "optimizer":
        moments = next(iter(run.optimizer.state.values()))
        moments["exp_avg_sq"][0] = math.inf
    else:
        network = getattr(run, where)
        next(network.parameters()).data[0] = math.nan

    with pytest.raises(UserError, match=f"step_000002 was not written, because {where}"):
        saver.save(2, run.model, run.average, run.optimizer)
    saver.wait()
    assert distributed.list_checkpoints(tmp_path) == ([1], [])

    if where == "average":
        with pytest.raises(UserError, match="model.pt was not written, because weights[.]"):
            checkpoint.save_trained(tmp_path / "model.pt", run.gather_trained())


# ------------------------------------------------------------------------------- in two processes
def test_two_processes_stop_alike(vae_file, tmp_path):
    """Catches a process that stops alone, while the other waits for its gradients for ever.

    Also catches two sentences for one fault. A loss of the second process is infinite, and with
    --lam 0 no gradient shows it to the first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = dict(
        os.environ,
        WORLD_SIZE="2",
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(ROOT),
    )
    line = [sys.executable, __file__, str(vae_file), str(tmp_path / "run")]
    started = []
    for rank in range(2):
        env = dict(both, RANK=str(rank), LOCAL_RANK=str(rank))
        process = subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True)
        started.append(process)

    sentences = []
    try:
        for process in started:
            _, err = process.communicate(timeout=150)   # one that waits for ever ends here
            assert process.returncode == 2, err
            assert "Traceback" not in err, err
            sentences.append(err.strip().splitlines()[-1])
    finally:
        for process in started:
            process.kill()

    assert sentences[0] == sentences[1]
    assert "step 4 was not taken: the loss of micro-batch 1 is nan" in sentences[0]
    assert "step_000002 is still good" in sentences[0]
    assert check_kept(tmp_path / "run") == [2]


def meet(vae, out):
    """What each of the two processes does."""
    torch.set_num_threads(1)
    real = train.losses
    micros = []                                         # one micro-batch per step and process

    def losses(*args):
        micros.append(None)
        lm, words, ddpm = real(*args)
        if distributed.rank() == 1 and len(micros) == 4:
            ddpm = ddpm + math.inf
        return lm, words, ddpm

    model.SIZES["toy"] = (1, 32, 2)
    train.losses = losses
    run_command(train.main, small_run(vae=vae, out=out, accumulate=2, save_every=2, lam=0))


# ------------------------------------------------------------------------------ the VAE's training
@pytest.mark.parametrize("options, planted, words", [
    (dict(lr=1e30), None, "of the VAE was not taken"),
    (dict(kl_weight=1e308), None, "step 1 of the VAE was not taken"),
    (dict(), "weight", "step 3 of the VAE was not taken"),
    (dict(), "discriminator", "step 3 of the discriminator was not taken"),
], ids=str)
def test_the_vae_does_not_learn_from_nan(tmp_path, options, planted, words):
    """Catches NaN in the VAE's training, and in that of its second player.

    What was saved before must still be good."""
    pixels = scenes.load_scenes(12, 0, progress=False).pixels
    critic = None
    if planted == "discriminator":
        gan = vae_training.losses.PatchGAN(width=4, layers=1)
        critic = vae_training.losses.VAELoss(None, None, gan, gan_start=0)
    real = vae_training.training_step

    def step(run, pixels):
        if run.step == 2 and planted == "weight":
            next(run.vae.parameters()).data[0] = math.nan
        if run.step == 2 and planted == "discriminator":
            hinge = critic.discriminator_loss
            critic.discriminator_loss = lambda *args: hinge(*args) * math.nan
        real(run, pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_training, "training_step", step)
        with pytest.raises(UserError, match=words):
            vae_training.train_vae(
                pixels,
                vae_module.VAEConfig(channels=4, multipliers=(1, 1), z=2),
                20,
                batch=4,
                out=tmp_path,
                save_every=1,
                progress=False,
                vae_loss=critic,
                **options,
            )

    if (tmp_path / "last.pt").exists():
        kept = checkpoint.load(tmp_path / "last.pt", "vae training")
        assert kept["step"] <= 2 or options             # the bug is planted at step 2
    assert nothing_half_written(tmp_path)


def test_latents_that_are_not_finite(short_run, tmp_path, capsys):
    """A VAE whose scale is 0 has finite weights and infinite latents. Catches a run on them."""
    flat = tmp_path / "flat.pt"
    checkpoint.save(flat, checkpoint.pack_vae(untrained_vae(scale=0.0)))

    sentence = ends(capsys, train.main, short_run(vae=flat), 2)

    assert "step 1 was not taken: the loss of micro-batch 0" in sentence


# ---------------------------------------------------------------------------------- in what is read
def first_weight(content):
    """(name, tensor) of the first weight in a checkpoint's dict that is no whole number."""
    for name, tensor in content["weights"].items():
        if tensor.is_floating_point():
            return name, tensor
    raise AssertionError("no weight")


def write_poisoned(path, source):
    """A copy of a checkpoint of which one weight is NaN."""
    content = torch.load(source, weights_only=True)
    _, tensor = first_weight(content)
    tensor.view(-1)[0] = math.nan
    torch.save(content, path)


def test_what_is_read_is_finite(whole_run, vae_file, tmp_path, capsys):
    """Catches NaN that is read: from a model.pt (also as --init), a vae.pt, or a last.pt.

    last.pt is the state of a VAE's training."""
    write_poisoned(tmp_path / "model.pt", whole_run / "model.pt")
    write_poisoned(tmp_path / "vae.pt", vae_file)
    parts = [{"w": torch.tensor([1.0, math.inf])}]
    torch.save({"kind": "vae training", "parts": parts}, tmp_path / "last.pt")

    # Finite as it is stored; infinite in the float32 in which it is used.
    large = torch.load(vae_file, weights_only=True)
    name, tensor = first_weight(large)
    large["weights"][name] = torch.full_like(tensor, 1e300, dtype=torch.float64)
    torch.save(large, tmp_path / "large.pt")

    for read, name in (
        (load_trained, "model.pt"),
        (load_vae, "vae.pt"),
        (load_vae, "large.pt"),
        (partial(checkpoint.load, kind="vae training"), "last.pt"),
    ):
        with pytest.raises(UserError, match=f"{name} cannot be used, because .* is not finite"):
            read(tmp_path / name)

    options = small_run(out=tmp_path / "x", preset="edit", init=tmp_path / "model.pt")
    assert "model.pt cannot be used" in ends(capsys, train.main, options, 2)
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_that_is_not_finite_is_not_resumed(run, tmp_path, monkeypatch):
    """Catches NaN that an earlier version has saved: the checkpoint before it must be used."""
    saver = distributed.Saver(tmp_path, run.ranks)
    train.train_step(run)
    saver.save(1, run.model, run.average, run.optimizer)
    first = clone(run.average.state_dict())

    train.train_step(run)
    second = clone(run.average.state_dict())
    next(run.average.parameters()).data[0, 0] = math.nan
    monkeypatch.setattr(distributed, "not_finite", lambda state: "")
    saver.save(2, run.model, run.average, run.optimizer)
    saver.wait()
    monkeypatch.undo()

    step = distributed.load_newest(tmp_path, run.ranks, run.model, run.average, run.optimizer)

    assert step == 1
    loaded = run.average.state_dict()
    assert all(tensor.isfinite().all() for tensor in loaded.values())
    assert same(first, loaded) == []
    assert same(second, loaded) != []


def test_a_packed_latent_that_is_not_finite(tmp_path, capsys):
    """Catches a row that is read as if nothing were wrong.

    Its checksum is right: a VAE made it, and the packing of an earlier version wrote it."""
    vae_path = tmp_path / "vae.pt"
    checkpoint.save(vae_path, checkpoint.pack_vae(untrained_vae()))
    packing = arguments(dict(
        text="scenes",
        pairs="scenes",
        scenes=40,
        vae=vae_path,
        seq_len=64,
        image_size=32,
        shard_rows=64,
        out=tmp_path / "packed",
    ))
    encode = vae_module.VAE.encode

    def overflowing(vae, x):
        mean, deviation = encode(vae, x)
        mean[3, 0, 1, 1] = 1e9                          # too large for float16
        return mean, deviation

    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore"):
        patch.setattr(vae_module.VAE, "encode", overflowing)
        with pytest.raises(UserError, match="latents that float16 cannot hold"):
            pack.main(packing)
        # Packed as before that was looked at.
        patch.setattr(np, "isfinite", lambda x: np.array(True))
        pack.main(packing)

    with pytest.raises(UserError, match="pairs-000000 holds a latent that is not finite"):
        shards.verify(tmp_path / "packed")
    training = arguments(dict(
        data="shards",
        data_dir=tmp_path / "packed",
        size="toy",
        seq_len=64,
        documents=60,
        steps=4,
        samples=0,
        out=tmp_path / "run",
    ))
    assert "pairs-000000" in ends(capsys, train.main, training, 2)


# -------------------------------------------------------------------------- a spike of the gradient
@pytest.mark.parametrize("norms, wanted", [
    ([1.0] * 9 + [50.0], (100, 50.0)),
    ([1.0, 30.0] + [1.5] * 8, (92, 30.0)),
    ([4.9, 4.0] + [1.0] * 8, None),                     # a warm-up
    ([0.1] + [1.0] * 8, None),
    ([7.0], None),
    ([1.0, 2.0], None),
], ids=str)
def test_a_spike_is_marked(norms, wanted):
    """Catches a jump of the gradient that no line of the log shows.

    Only the last step's norm is written. Also catches a mark at every warm-up."""
    rows = [{"grad_norm": norm} for norm in norms]
    expected = {}
    if wanted:
        step, norm = wanted
        expected = {"spike": {"step": step, "grad_norm": norm}}

    assert progress.spike(rows, 100) == expected


def test_a_spike_is_in_the_log(short_run, tmp_path):
    """Catches a mark that is computed and not written."""
    real = train.train_step

    def jump(run):
        taken = real(run)
        if run.step == 3:
            taken["grad_norm"] *= 1000
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", jump)
        train.main(short_run(log_every=6))

    assert log(tmp_path / "run")[0]["spike"]["step"] == 3


if __name__ == "__main__":
    meet(Path(sys.argv[1]), Path(sys.argv[2]))
