"""
test_vae_processes.py: two processes train the VAE that one would        (autoencoder/processes.py, sources/on_disk.py; App. C)

One start of two gloo processes (`work`, at the end) trains every kind; this process does the same alone and compares.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from autoencoder import perceptual
from autoencoder import train as vae_training
from autoencoder.losses import PatchGAN, VAELoss
from autoencoder.processes import ALONE, Processes, WholeBatchNorm, start
from support import checkpoint
from support.common import UserError
from vae import VAEConfig

KINDS = ("toy", "paper", "codes")
STEPS = 3


def make_loss(kind):
    """App. C's loss with small random networks, the GAN on from step 1; None for the toy's."""
    if kind == "toy":
        return None
    torch.manual_seed(3)
    lpips, identity = perceptual.stand_ins(perceptual.SmallNet(5))
    return VAELoss(lpips, identity, PatchGAN(3, width=8, layers=2), gan_start=1)


def train_one(kind, out, processes):
    """Train a few steps on pictures of noise; keeps log.jsonl, last.pt and vae.pt in `out`."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    config = VAEConfig(channels=8, multipliers=(1, 1), z=2, codes=12 if kind == "codes" else 0)
    vae = vae_training.train_vae(pixels, config, STEPS, batch=6, lr=1e-3, kl_weight=1.0, progress=False, vae_loss=make_loss(kind), out=out,
                                 log_every=1, processes=processes)
    if processes.rank == 0:
        checkpoint.save(out / "vae.pt", checkpoint.pack_vae(vae))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have trained every kind, in two_<kind>, and this one has, in one_<kind>."""
    folder = tmp_path_factory.mktemp("vaes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        (folder / f"one_{kind}").mkdir()
        train_one(kind, folder / f"one_{kind}", ALONE)
    return folder


def log(out):
    """The rows of log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(folder, kind):
    """Every term of every step, and the weights at the end. Catches gradients or terms that are not averaged, other noise,
    the same half twice, batch norms and GAN weights of one part, and codes that only one process has seen."""
    one, two = log(folder / f"one_{kind}"), log(folder / f"two_{kind}")
    assert len(one) == STEPS and [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=1e-5), (a["step"], name)
    assert kind == "toy" or {"D", "GAN", "weight"} <= one[-1].keys()
    kinds = ("vae", "vqvae")
    first, second = (checkpoint.load(folder / f"{n}_{kind}/vae.pt", kinds)["weights"] for n in ("one", "two"))
    for name in first:
        if name.endswith("qkv.bias"):                   # a key's bias has no gradient, but that of rounding: softmax ignores it
            continue
        # AdamW divides a small gradient by its own size: 1e-8 becomes a part of the rate, 1e-3.
        assert (first[name].float() - second[name].float()).abs().max() < 5e-4, name


def test_one_and_two_go_on_with_each_other(folder):
    """Catches a state that depends on the number of processes: what two have saved, one resumes."""
    saved = checkpoint.load(folder / "two_paper/last.pt", "vae training")
    alone = checkpoint.load(folder / "one_paper/last.pt", "vae training")
    assert saved["given"] == alone["given"] and saved["step"] == STEPS and saved["rng"] == alone["rng"]
    assert torch.equal(saved["noise"], alone["noise"])
    for a, b in zip(saved["parts"], alone["parts"], strict=True):
        assert a.keys() == b.keys()


def test_alone_the_batch_norm_is_pytorchs():
    """Catches a norm that changes what one process trains."""
    ours, theirs = WholeBatchNorm(4), nn.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.running_var, theirs.running_var)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("scale", [1.0, 0.003])
def test_two_batch_norms_are_one(scale):
    """Two processes with the same part: as PyTorch's norm of both parts. Catches other counts of numbers, an epsilon or a mean lost."""
    class Twins(Processes):
        def average(self, x):
            return x

    ours, theirs = WholeBatchNorm(4), nn.BatchNorm2d(4)
    ours.processes = Twins(0, 2)
    x = 5 + scale * torch.randn(1, 4, 3, 3)
    both = theirs(torch.cat([x, x]))
    assert torch.allclose(ours(x), both[:1], atol=1e-3)
    assert torch.allclose(ours.running_mean, theirs.running_mean) and torch.allclose(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("flags, wanted", [([True, False], True), ([False, False], False), ([True, True], True)])
def test_if_one_must_stop_all_must(monkeypatch, flags, wanted):
    """Catches a process that waits forever for one that has stopped."""
    monkeypatch.setattr(Processes, "gather", lambda self, x: torch.tensor(flags))
    assert Processes(0, 2).any(flags[0]) is wanted


def test_parts_of_a_batch():
    """Catches pictures that no process takes, and noise of another picture."""
    two = [Processes(rank, 2) for rank in range(2)]
    assert [list(one.share([7, 3, 9, 1])) for one in two] == [[7, 3], [9, 1]]
    whole = torch.randn((4, 2, 3), generator=torch.Generator().manual_seed(5))
    parts = [one.draw((2, 2, 3), torch.Generator().manual_seed(5)) for one in two]
    assert torch.equal(torch.cat(parts), whole) and torch.equal(ALONE.draw((4, 2, 3), torch.Generator().manual_seed(5)), whole)


def test_a_batch_that_cannot_be_shared(tmp_path, monkeypatch):
    """Catches the last picture of a batch that nobody reads."""
    monkeypatch.setattr(vae_training, "start", lambda: Processes(0, 3))
    with pytest.raises(UserError, match="3 processes cannot share --batch 32"):
        vae_training.main(["--out", str(tmp_path / "x"), "--steps", "1"])


def work(folder):
    """Both processes: train every kind."""
    processes = start()
    torch.set_num_threads(1)
    for kind in KINDS:
        out = folder / f"two_{kind}"
        if processes.rank == 0:
            out.mkdir()
        processes.any(False)                            # the folder is there
        train_one(kind, out, processes)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
