"""
test_train_vae.py: two networks learn against each other
                                 (autoencoder/train.py; Transfusion App. C; docs/PAPER.md §4.11)

THE IDEA    The losses are held to formulas that others wrote. The discriminator must take steps of
            its own, with gradients of its own, from its step on. A run that is stopped and resumed
            must be the same run, to the bit. The command line must say which terms are on.
TRY IT      pytest -n 0 tests/test_train_vae.py
"""
import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from autoencoder import perceptual
from autoencoder import train as vae_training
from autoencoder.losses import PatchGAN, VAELoss
from autoencoder.perceptual import SmallNet, stand_ins
from autoencoder.processes import Processes
from autoencoder.train import (
    prepare_training,
    resume_training,
    save_training,
    toy_reconstruction,
    train_vae,
    training_step,
)
from sources import choose, scenes
from support.checkpoint import load, unpack_vae
from support.common import Stopped, UserError, finish_step_first
from vae import VAE, VAEConfig, to_float

TINY = VAEConfig(channels=8, multipliers=(1, 2, 2), z=4)
SMALL = dict(channels=4, multipliers=(1, 1), z=2)       # as small as it gets
OPTIONS = dict(steps=6, batch=4, lr=2e-3, kl_weight=1e-6, seed=0)


@pytest.fixture(scope="module")
def pictures():
    """(100, 32, 32, 3) uint8: small scenes."""
    return scenes.load_scenes(100, 0, progress=False).pixels


@pytest.fixture
def few(monkeypatch):
    """Little data, whatever is asked for, and a stand-in for the perceptual networks that has
    learned little."""
    load_pairs = choose.load_pairs
    train_small_net = perceptual.train_small_net

    def load_20(*args, n, **more):
        return load_pairs(*args, n=20, **more)

    def train_briefly(*args, seed):
        return train_small_net(*args, steps=2, batch=4, seed=seed)

    monkeypatch.setattr(choose, "load_pairs", load_20)
    monkeypatch.setattr(perceptual, "train_small_net", train_briefly)


def make_vae_loss(gan_start=2):
    """App. C's loss with small and untrained networks, the same each time."""
    torch.manual_seed(3)
    return VAELoss(*stand_ins(SmallNet(5)), PatchGAN(width=8, layers=2), gan_start)


def loss_if(judged):
    """App. C's loss, or None for the toy's."""
    return make_vae_loss() if judged else None


def flat(tensors):
    """All of them in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def weights(module):
    """A copy of a module's parameters, in one vector."""
    return flat(module.parameters()).detach().clone()


# --------------------------------------------------------------------------------- losses and rates
def test_the_toys_loss(pictures):
    """Catches a wrong KL (log-variance taken for deviation, a lost half), means where sums are
    meant, and a decoder that gets the mean in place of a draw."""
    vae = VAE(TINY)
    x = to_float(pictures[:6])
    with torch.no_grad():
        x_hat, kl = vae(x, torch.Generator().manual_seed(3))
        reconstruction = toy_reconstruction(x, x_hat)

        mean, logvar = vae.moments(x)
        q = Normal(mean, (0.5 * logvar).exp())
        wanted = kl_divergence(q, Normal(0.0, 1.0)).sum().item() / 6
        assert kl.item() == pytest.approx(wanted, rel=1e-5)

        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
        error = vae.decoder(mean + q.stddev * noise) - x
        wanted = (error.abs().sum() + (error ** 2).sum()).item() / 6
        assert reconstruction.item() == pytest.approx(wanted, rel=1e-5)


def test_loss_falls(pictures):
    """docs/PAPER.md §4.11, a VAE that does not learn. Catches an optimizer or a schedule that never
    moves a weight."""
    trained = train_vae(pictures, TINY, steps=20, batch=8, seed=1, progress=False)
    torch.manual_seed(1)
    fresh = VAE(TINY)
    x = to_float(pictures[:32])

    def loss(vae):
        x_hat, _ = vae(x, torch.Generator().manual_seed(0))
        return toy_reconstruction(x, x_hat).item()

    with torch.no_grad():
        assert loss(trained) < 0.7 * loss(fresh)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_any_number_of_steps(pictures, steps):
    """Catches a schedule that divides by zero for some numbers of steps."""
    train_vae(pictures[:8], VAEConfig(**SMALL), steps=steps, batch=2, progress=False)


def test_the_rate_rises_and_falls():
    """Catches a rate that starts at its height, that jumps, or that does not end near 0."""
    options = dict(steps=100, lr=2.0)
    rates = [vae_training.learning_rate(step, options) for step in range(100)]
    rise = [0.2 * k for k in range(1, 11)]              # a tenth of the steps
    assert rates[:10] == pytest.approx(rise, rel=0.03)
    assert np.argmax(rates) in (9, 10)
    for before, after in zip(rates[10:], rates[11:]):
        assert before > after
    assert rates[50] == pytest.approx(1.0)
    assert rates[-1] < 0.001

    # A long run rises for 5,000 steps.
    long = dict(steps=10 ** 6, lr=2.0)
    assert vae_training.learning_rate(2499, long) == pytest.approx(1.0, rel=1e-3)
    assert vae_training.learning_rate(4999, long) == pytest.approx(2.0, rel=1e-3)


def test_a_cpu_computes_in_32_bits():
    """Catches bfloat16 where it is slow, and where it would blur what this file compares."""
    ones = torch.ones(2, 2)
    with vae_training.bf16(torch.device("cpu")):
        assert (ones @ ones).dtype == torch.float32


def test_when_it_saves(pictures, tmp_path):
    """Catches a state that is saved at other steps than every save_every, and an end that is not
    saved."""
    steps = []

    def on_save(vae):
        steps.append(load(tmp_path / "last.pt", "vae training")["step"])

    train_vae(pictures[:8], VAEConfig(**SMALL), steps=5, batch=2, save_every=2, out=tmp_path,
              on_save=on_save, progress=False)
    assert steps == [2, 4, 5]


def test_training_repeats(pictures):
    """Catches global random numbers: `python train.py` would not repeat itself."""
    options = dict(steps=3, batch=4, seed=5, progress=False)
    one = train_vae(pictures[:32], VAEConfig(**SMALL), **options)
    torch.rand(7)
    np.random.rand(7)
    two = train_vae(pictures[:32], VAEConfig(**SMALL), **options)
    for a, b in zip(one.state_dict().values(), two.state_dict().values()):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------- the second player
@pytest.mark.parametrize("codes", [0, 12])
def test_the_discriminator_steps_from_its_step_on(pictures, codes):
    """docs/PAPER.md §4.11. Catches a discriminator that is never stepped, and one that is stepped
    before it judges."""
    vae_loss = make_vae_loss(gan_start=2)
    run = prepare_training(VAEConfig(**SMALL, codes=codes), vae_loss, OPTIONS)
    critic = run.vae_loss.discriminator
    for step in range(4):
        critic_before = weights(critic)
        vae_before = weights(run.vae)
        training_step(run, pictures)
        stayed = torch.equal(critic_before, weights(critic))
        assert stayed == (step < 2), step
        assert not torch.equal(vae_before, weights(run.vae))
        assert run.step == step + 1


def test_the_discriminators_gradient_is_its_own(pictures):
    """TRAP: the VAE's backward leaves gradients in the discriminator that would teach it to be
    fooled. Its step must use the hinge's gradient alone, of this batch and of this step's
    reconstructions."""
    run = prepare_training(VAEConfig(**SMALL), make_vae_loss(gan_start=0), OPTIONS)
    critic = run.vae_loss.discriminator
    hinge_loss = run.vae_loss.discriminator_loss
    seen = {}

    def watched(x, drawn):
        loss = hinge_loss(x, drawn)
        wanted = torch.autograd.grad(loss, list(critic.parameters()), retain_graph=True)
        seen.update(real=x, drawn=drawn, wanted=wanted)
        return loss

    run.vae_loss.discriminator_loss = watched
    for _ in range(2):
        training_step(run, pictures)
    for weight, wanted in zip(critic.parameters(), seen["wanted"]):
        assert torch.allclose(weight.grad, wanted, rtol=1e-4, atol=1e-8)
    assert seen["drawn"].requires_grad                  # a reconstruction, of this step
    assert not torch.equal(seen["drawn"], seen["real"])


def test_before_its_step_nothing_is_changed_by_it(pictures):
    """App. C. Catches a discriminator that is felt before its step, through the loss, the random
    numbers or the schedule."""

    def train(vae_loss):
        return weights(train_vae(pictures, VAEConfig(**SMALL), 4, batch=4, vae_loss=vae_loss,
                                 progress=False))

    without = VAELoss(*stand_ins(make_vae_loss().lpips.net))
    too_late = train(make_vae_loss(gan_start=4))        # four steps: 0 to 3
    never = train(without)
    in_the_last_step = train(make_vae_loss(gan_start=3))
    assert torch.equal(too_late, never)
    assert not torch.equal(too_late, in_the_last_step)


@pytest.mark.parametrize("judged", [False, True], ids=["toy", "paper"])
def test_the_prior_counts(pictures, judged):
    """The fifth term. Catches a KL that is logged and not added, and 1e-6 of a KL that is not a sum
    over the latent. The gradient must change by exactly weight times the gradient of the KL in
    nats; in App. C's means, divided by the number of a picture's elements."""
    # 1. The gradient without the KL, and with ten times it.
    x = pictures[:4]
    gradients = []
    for kl_weight in (0.0, 10.0):
        options = {**OPTIONS, "kl_weight": kl_weight, "lr": 0.0}
        vae_loss = make_vae_loss(9) if judged else None
        run = prepare_training(VAEConfig(**SMALL), vae_loss, options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: 0.0)
            training_step(run, x)
        gradients.append(flat(weight.grad for weight in run.vae.encoder.parameters()))
    without, with_it = gradients

    # 2. The gradient of the KL alone, of the same pictures.
    again = prepare_training(VAEConfig(**SMALL), None, OPTIONS)
    chosen = to_float(x[again.rng.integers(4, size=4)])                 # (4, 3, 32, 32)
    _, kl = again.vae(chosen, again.generator)
    wanted = 10.0 * flat(torch.autograd.grad(kl, list(again.vae.encoder.parameters())))
    if judged:
        wanted = wanted / chosen[0].numel()
    atol = 1e-3 * wanted.abs().max()
    assert torch.allclose(with_it - without, wanted, rtol=1e-2, atol=atol)


def test_a_vqvae_learns(pictures):
    """Catches a codebook that stays where it began, a loss that does not fall, and a codebook loss
    that nobody adds."""
    options = {**OPTIONS, "steps": 40, "lr": 1e-2}
    run = prepare_training(VAEConfig(**SMALL, codes=16), None, options)
    training_step(run, pictures)
    first = vae_training.log_line(run)
    codebook = run.vae.quantiser.codebook.detach().clone()
    while run.step < 40:
        training_step(run, pictures)

    row = vae_training.log_line(run)
    assert row["L1+L2"] < 0.7 * first["L1+L2"]
    assert row["codebook"] > 0
    assert not torch.allclose(codebook, run.vae.quantiser.codebook, atol=1e-3)
    assert 0 < row["codes_used"] <= 1                   # a share
    assert 1 <= row["perplexity"] <= 16
    assert not run.vae.quantiser.uses.any()             # counted anew for each line


# ------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("codes", [0, 12])
@pytest.mark.parametrize("judged", [False, True], ids=["toy", "paper"])
def test_resumed_is_uninterrupted(pictures, tmp_path, codes, judged):
    """Catches whatever a checkpoint forgets: an optimizer, the discriminator, its BatchNorm, random
    numbers, the sums of the log. The run is stopped between two lines of the log, after the
    discriminator has begun."""

    def train(out, **more):
        return train_vae(pictures, VAEConfig(**SMALL, codes=codes), steps=6, batch=4, log_every=2,
                         progress=False, vae_loss=loss_if(judged), out=tmp_path / out, **more)

    class AfterThree:
        """True when it is asked for the fourth time."""
        calls = 0

        def __bool__(self):
            self.calls += 1
            return self.calls > 3

    # 1. One run in one piece, another in two.
    whole = train("whole")
    assert train("two", stop=AfterThree()) is None
    torch.rand(5)
    np.random.rand(5)
    resumed = train("two", resume=True)

    # 2. The same weights, lines of the log, and state.
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    one, two = ((tmp_path / name / "log.jsonl").read_text() for name in ("whole", "two"))
    assert one == two
    assert [json.loads(line)["step"] for line in one.splitlines()] == [2, 4, 6]

    one, two = (load(tmp_path / name / "last.pt", "vae training")["parts"]
                for name in ("whole", "two"))
    assert len(one) == (4 if judged else 2)             # networks and their optimizers
    leaves = torch.utils._pytree.tree_leaves
    for a, b in zip(leaves(one), leaves(two), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
        else:
            assert a == b


def test_resume_with_other_options(pictures, tmp_path):
    """Catches a resume that mixes two runs. The sentence names the option and both values; the
    checkpoint stays."""
    run = prepare_training(VAEConfig(**SMALL), None, OPTIONS)
    training_step(run, pictures)
    save_training(run, tmp_path)
    kept = (tmp_path / "last.pt").read_bytes()
    other = prepare_training(VAEConfig(**SMALL), None, {**OPTIONS, "lr": 0.5})
    with pytest.raises(UserError, match="lr 0.002, not 0.5"):
        resume_training(other, tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == kept

    options = dict(batch=4, out=tmp_path / "x", progress=False)
    train_vae(pictures, VAEConfig(**SMALL), 4, **options)
    with pytest.raises(UserError, match="loss L1 .* L2, not L1 .* ID"):
        train_vae(pictures, VAEConfig(**SMALL), 4, vae_loss=make_vae_loss(), resume=True, **options)


CTRL_C = """
import os, signal
from support.common import finish_step_first
with finish_step_first() as pressed:
    assert not pressed
    os.kill(os.getpid(), signal.SIGINT)
    assert pressed
    print("the step is finished", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""


def test_ctrl_c_waits_for_the_step():
    """Catches a step torn apart by Ctrl-C, a program that a second Ctrl-C does not stop, and a
    signal handler left behind."""
    before = signal.getsignal(signal.SIGINT)
    with finish_step_first() as pressed:
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed
    assert signal.getsignal(signal.SIGINT) is before

    home = Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", CTRL_C], cwd=home, capture_output=True, text=True)
    assert ended.stdout == "the step is finished\n"
    assert ended.returncode == -signal.SIGINT


def test_ctrl_c_saves_what_can_be_resumed(tmp_path, few, monkeypatch):
    """Catches a command line that lets Ctrl-C end it in the middle of a step, or with nothing
    kept."""
    command = ["--steps", "4", "--out", str(tmp_path / "run")]
    real = vae_training.training_step

    def interrupted(run, pixels):
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        real(run, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(vae_training, "training_step", interrupted)
        with pytest.raises(Stopped, match="--resume goes on from there"):
            vae_training.main(command)
    assert not (tmp_path / "run/vae.pt").exists()
    assert load(tmp_path / "run/last.pt", "vae training")["step"] == 2

    vae_training.main([*command, "--resume"])
    vae_training.main(["--steps", "4", "--out", str(tmp_path / "whole")])
    resumed = load(tmp_path / "run/vae.pt", "vae")["weights"]
    whole = load(tmp_path / "whole/vae.pt", "vae")["weights"]
    for name in whole:
        assert torch.equal(resumed[name], whole[name])


# --------------------------------------------------------------------------------- the command line
def test_main_writes_a_vae_and_reconstructions(tmp_path, capsys, few):
    """Catches a command line that trains and then loses the result."""
    out = tmp_path / "run"
    as_little_as_may_be = ["--steps", "1", "--batch", "1", "--save-every", "1"]
    vae_training.main([*as_little_as_may_be, "--out", str(out)])
    vae = unpack_vae(load(out / "vae.pt", "vae"))
    assert vae.config.image_channels == 3
    assert (out / "reconstructions.png").stat().st_size > 1000

    said = capsys.readouterr().out
    assert "mean error" in said
    assert "loss: L1 + L2 + 1e-06 KL" in said


def test_main_with_the_papers_loss_and_codes(tmp_path, capsys, few):
    """Catches a run that does not say who judges it, and a VQ-VAE that does not say how many of its
    codes it used."""
    out = tmp_path / "run"
    command = ["--steps", "3", "--batch", "4", "--loss", "paper", "--gan-start", "1",
               "--codes", "16", "--out", str(out)]
    vae_training.main(command)
    vae = unpack_vae(load(out / "vae.pt", "vqvae"))
    assert vae.config.codes == 16

    said = capsys.readouterr().out
    assert "L1 + LPIPS + 0.2 ID + 0.5 GAN from step 1 + codebook" in said
    assert said.count("our small network") == 2         # for LPIPS, and for ID
    assert "of 16 codes used" in said
    row = json.loads((out / "log.jsonl").read_text())
    assert set(row) == {"step", "L1", "LPIPS", "ID", "GAN", "weight", "D", "codebook",
                        "codes_used", "perplexity"}

    with pytest.raises(UserError, match="--resume"):    # the folder holds a run
        vae_training.main(command)


def test_terms_without_weights_are_off_and_it_is_said():
    """Catches a run at the paper's size that trains without LPIPS or ID in silence, or with our toy
    network in their place."""
    pairs = scenes.load_scenes(3, 0, progress=False)
    args = argparse.Namespace(
        paper=True, lpips_weights=None, moco_weights=None, gan_start=50_000, seed=0)
    vae_loss, said = vae_training.build_loss(args, pairs)
    assert vae_loss.lpips is None
    assert vae_loss.identity is None
    assert vae_loss.describe() == "L1 + 0.5 GAN from step 50000"
    assert "LPIPS is OFF" in said
    assert "ID is OFF" in said
    parameters = sum(weight.numel() for weight in vae_loss.discriminator.parameters())
    assert parameters == 2_765_633


def test_paper_is_the_papers(capsys):
    """App. C's numbers are what --paper sets. Catches a default of the toy that stays."""
    with pytest.raises(SystemExit):
        vae_training.main(["--paper", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for number in ("1000000", "50000", "256", "1e-06", "paper"):
        assert f"(default: {number})" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_all_speaks(tmp_path, monkeypatch, rank):
    """Catches two processes that write over each other's lines, and none that speaks."""

    class SeenError(Exception):
        pass

    def see(args, silent):
        raise SeenError(silent)

    monkeypatch.setattr(vae_training, "start", lambda: Processes(rank, 2))
    monkeypatch.setattr(vae_training, "load_pictures", see)
    with pytest.raises(SeenError, match=str(rank > 0)):
        vae_training.main(["--steps", "1", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("arguments, words", [
    (["--codes", "1"], ["at least 2", "1"]),
    (["--codes", "-4"], ["at least 2"]),
    (["--batch", "0"], ["--batch"]),
    (["--lr", "nan"], ["--lr"]),
    (["--gan-start", "-1"], ["--gan-start"]),
    (["--paper", "--image-size", "100"], ["divisible by 8"]),
    (["--loss", "paper", "--image-size", "16"], ["at least 32", "16"]),
    (["--moco-weights", "moco.pth"], ["--loss paper"]),
    (["--loss", "paper", "--moco-weights", "absent.pth"], ["absent.pth"]),
    (["--loss", "paper", "--lpips-weights", "absent.pth,vgg.pth"], ["absent.pth"]),
    (["--resume"], ["nothing to resume", "last.pt"]),
], ids=" ".join)
def test_mistakes(tmp_path, monkeypatch, few, arguments, words):
    """Catches a traceback, a mistake that is found after the work is done, and a folder left
    behind."""

    def never(*_, **__):
        pytest.fail("trained before it looked at the options")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vae_training, "train_vae", never)
    with pytest.raises(UserError) as mistake:
        vae_training.main([*arguments, "--out", "run"])
    for word in words:
        assert word in str(mistake.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [32, 256])
def test_how_many_scenes(monkeypatch, size):
    """Catches `--paper` on scenes that holds 20,000 pictures of 256 x 256, which are 3.7 GB."""
    numbers = []

    def load_pairs(*_, n, **__):
        numbers.append(n)
        return scenes.load_scenes(1, 0, progress=False)

    monkeypatch.setattr(choose, "load_pairs", load_pairs)
    args = vae_training.parse_arguments(["--image-size", str(size)])
    vae_training.load_pictures(args, True)
    assert numbers[0] == {32: 20_000, 256: 1365}[size]
    assert numbers[0] * 3 * size ** 2 <= 2 ** 28        # bytes: 256 MB


# ------------------------------------------------------------------------------------- rare colours
GREY = torch.tensor([1.0, 1, 1]) / 3 ** 0.5             # two directions of colour, of length 1
GREEN = torch.tensor([1.0, -2, 1]) / 6 ** 0.5           # from green to magenta


def to_pixels(colours):
    """(40, 10, 10, 3) uint8: the pictures of 4000 colours (4000, 3)."""
    return colours.clip(0, 255).round().astype(np.uint8).reshape(40, 10, 10, 3)


def test_rare_colours_are_balanced():
    """Catches a balance that turns colours, that prefers grey to green, or that makes the whole
    loss larger. Catches one that takes the noise of grey photos for a colour."""
    # 1. Pictures that are mostly light and dark, and a little green and magenta.
    rng = np.random.default_rng(0)
    light = rng.normal(0, 60, (4000, 1))
    tint = rng.normal(0, 10, (4000, 1))
    pixels = to_pixels(128 + light + tint * [0.5, -1.0, 0.5])
    balance = vae_training.colour_balance(pixels)
    assert torch.allclose(balance, balance.T)

    # 2. Green counts for more, grey for less; neither is turned into another colour.
    grey = balance @ GREY
    green = balance @ GREEN
    assert grey.norm() < 1.0
    assert green.norm() > 2.0
    assert torch.dot(grey, GREY) / grey.norm() > 0.99
    assert torch.dot(green, GREEN) / green.norm() > 0.99
    # 3/4 of the way: the errors of a direction, times its balance, are left with the fourth root
    # of their ratio.
    ratio = (3 * light.var() / (1.5 * tint.var())) ** 0.5
    assert green.norm() / grey.norm() == pytest.approx(ratio ** 0.75, rel=0.1)

    # 3. The loss of a picture of one colour, with and without it.
    x = to_float(pixels)                                                # (40, 3, 10, 10)
    mean = x.mean((0, 2, 3), keepdim=True).expand_as(x)
    plain = toy_reconstruction(x, mean)
    balanced = toy_reconstruction(x, mean, balance)
    assert 0.7 < balanced / plain < 1.4
    assert torch.equal(plain, toy_reconstruction(x, mean, None))
    assert toy_reconstruction(x, x, balance) == 0

    # 4. Grey pictures. JPEG's noise, one level of 255, does not count as a colour.
    assert vae_training.colour_balance(pixels[..., :1]).shape == (1, 1)
    noise = rng.normal(0, 1, (4000, 3))
    balance = vae_training.colour_balance(to_pixels(128 + light + noise))
    assert (balance @ GREEN).norm() < 15 * (balance @ GREY).norm()


def test_balance_is_for_the_first_third(pictures, monkeypatch):
    """Catches a balance that stays until the end, where it costs 2 dB, and one that is never on."""
    seen = []

    def watched(x, x_hat, balance):
        seen.append(balance is not None)
        return toy_reconstruction(x, x_hat, balance)

    monkeypatch.setattr(vae_training, "toy_reconstruction", watched)
    train_vae(pictures, VAEConfig(**SMALL), steps=6, batch=4, progress=False, balance=True)
    assert seen == [True, True, False, False, False, False]


def test_balance_is_part_of_the_run(pictures, tmp_path):
    """Catches a balance that is measured and not used, and one that a resumed run may change."""
    options = dict(steps=3, batch=4, seed=5, progress=False)
    without = train_vae(pictures, VAEConfig(**SMALL), balance=False, **options)
    with_it = train_vae(pictures, VAEConfig(**SMALL), balance=True, **options)
    assert not torch.equal(weights(without), weights(with_it))

    train_vae(pictures, VAEConfig(**SMALL), out=tmp_path, **options)
    with pytest.raises(UserError, match="balance False, not True"):
        train_vae(pictures, VAEConfig(**SMALL), out=tmp_path, resume=True, balance=True, **options)
