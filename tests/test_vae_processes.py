"""
test_vae_processes.py: two processes train the VAE that one would
                                                  (autoencoder/processes.py; Transfusion App. C)

THE IDEA    Two gloo processes are started once (`work`, at the end of this file), and train every
            kind of VAE. This process does the same alone. The logs and the weights must agree. Then
            the parts that this rests on: batch norms, shares of a batch, and an end for all.
TRY IT      pytest -n 0 tests/test_vae_processes.py
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


# ---------------------------------------------------------- one training, alone or in two processes
def make_loss(kind):
    """App. C's loss with small random networks, the GAN on from step 1; None for the toy's."""
    if kind == "toy":
        return None
    torch.manual_seed(3)
    lpips, identity = perceptual.stand_ins(perceptual.SmallNet(5))
    return VAELoss(lpips, identity, PatchGAN(3, width=8, layers=2), gan_start=1)


def train_one(kind, out, processes):
    """Train a few steps on pictures of noise; keeps log.jsonl, last.pt and vae.pt in `out`."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    codes = 12 if kind == "codes" else 0
    config = VAEConfig(channels=8, multipliers=(1, 1), z=2, codes=codes)
    vae = vae_training.train_vae(
        pixels, config, STEPS, batch=6, lr=1e-3, kl_weight=1.0, progress=False,
        vae_loss=make_loss(kind), out=out, log_every=1, processes=processes)
    if processes.rank == 0:
        checkpoint.save(out / "vae.pt", checkpoint.pack_vae(vae))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have trained every kind, in two_<kind>, and this one has, in
    one_<kind>."""
    folder = tmp_path_factory.mktemp("vaes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

    for kind in KINDS:
        (folder / f"one_{kind}").mkdir()
        train_one(kind, folder / f"one_{kind}", ALONE)
    return folder


def log(out):
    """The rows of log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------- two are one
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(folder, kind):
    """Every term of every step, and the weights at the end. Catches gradients or terms that are not
    averaged, other noise, the same half twice, batch norms and GAN weights of one part, and codes
    that only one process has seen."""
    one = log(folder / f"one_{kind}")
    two = log(folder / f"two_{kind}")
    assert len(one) == STEPS
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=1e-5), (a["step"], name)
    if kind != "toy":                                   # the discriminator was there
        assert {"D", "GAN", "weight"} <= one[-1].keys()

    def weights_of(run):
        return checkpoint.load(folder / run / "vae.pt", ("vae", "vqvae"))["weights"]

    first = weights_of(f"one_{kind}")
    second = weights_of(f"two_{kind}")
    for name in first:
        # A key's bias has no gradient, but that of rounding: softmax ignores it.
        if name.endswith("qkv.bias"):
            continue
        # AdamW divides a small gradient by its own size: 1e-8 becomes a part of the rate, 1e-3.
        difference = first[name].float() - second[name].float()
        assert difference.abs().max() < 5e-4, name


def test_one_and_two_go_on_with_each_other(folder):
    """Catches a state that depends on the number of processes: what two have saved, one resumes."""
    saved = checkpoint.load(folder / "two_paper/last.pt", "vae training")
    alone = checkpoint.load(folder / "one_paper/last.pt", "vae training")
    assert saved["step"] == STEPS
    assert saved["given"] == alone["given"]             # the options
    assert saved["rng"] == alone["rng"]
    assert torch.equal(saved["noise"], alone["noise"])
    for a, b in zip(saved["parts"], alone["parts"], strict=True):
        assert a.keys() == b.keys()


# -------------------------------------------------------------------------------------- batch norms
def test_alone_the_batch_norm_is_pytorchs():
    """Catches a norm that changes what one process trains."""
    ours = WholeBatchNorm(4)
    theirs = nn.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("scale", [1.0, 0.003])
def test_two_batch_norms_are_one(scale):
    """Two processes with the same part of a batch must do what PyTorch's norm does with both parts.
    Catches a wrong count of numbers, a lost epsilon, and a lost mean."""

    class Twins(Processes):
        """The average over two processes that have the same."""

        def average(self, x):
            return x

    ours = WholeBatchNorm(4)
    ours.processes = Twins(0, 2)
    theirs = nn.BatchNorm2d(4)
    x = 5 + scale * torch.randn(1, 4, 3, 3)
    both = theirs(torch.cat([x, x]))
    assert torch.allclose(ours(x), both[:1], atol=1e-3)
    assert torch.allclose(ours.running_mean, theirs.running_mean)
    assert torch.allclose(ours.running_var, theirs.running_var)


# ----------------------------------------------------------- shares of a batch, and one end for all
@pytest.mark.parametrize("flags, wanted", [
    ([True, False], True),
    ([False, False], False),
    ([True, True], True),
])
def test_if_one_must_stop_all_must(monkeypatch, flags, wanted):
    """Catches a process that waits for ever for one that has stopped."""
    monkeypatch.setattr(Processes, "gather", lambda self, x: torch.tensor(flags))
    assert Processes(0, 2).any(flags[0]) is wanted


def test_parts_of_a_batch():
    """Catches pictures that no process takes, and noise of another picture."""
    two = [Processes(rank, 2) for rank in range(2)]
    shares = [list(one.share([7, 3, 9, 1])) for one in two]
    assert shares == [[7, 3], [9, 1]]

    def generator():
        return torch.Generator().manual_seed(5)

    whole = torch.randn((4, 2, 3), generator=generator())
    parts = [one.draw((2, 2, 3), generator()) for one in two]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(ALONE.draw((4, 2, 3), generator()), whole)


def test_a_batch_that_cannot_be_shared(tmp_path, monkeypatch):
    """Catches the last picture of a batch that nobody reads."""
    monkeypatch.setattr(vae_training, "start", lambda: Processes(0, 3))
    with pytest.raises(UserError, match="3 processes cannot share --batch 32"):
        vae_training.main(["--out", str(tmp_path / "x"), "--steps", "1"])


# -------------------------------------------------------------- what each of the two processes does
def work(folder):
    """Train every kind."""
    processes = start()
    torch.set_num_threads(1)
    for kind in KINDS:
        out = folder / f"two_{kind}"
        if processes.rank == 0:
            out.mkdir()
        processes.any(False)                            # wait: the folder must be there
        train_one(kind, out, processes)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
