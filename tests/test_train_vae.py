"""
test_train_vae.py: two networks learn against each other           (autoencoder/train.py; Transfusion App. C; PAPER §4.11)

The loss against formulas that others wrote; a discriminator that takes steps of its own, with gradients of its own, from its
step on; a run that is stopped and resumed and is the same run; and a command line that says what is on.
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


def make_vae_loss(gan_start=2):
    """App. C's loss with small and untrained networks, the same each time."""
    torch.manual_seed(3)
    return VAELoss(*stand_ins(SmallNet(5)), PatchGAN(width=8, layers=2), gan_start)


def weights(module):
    """A copy of a module's parameters, in one vector."""
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


# ----------------------------------------------------------------------------------------------------------------- losses
def test_the_toys_loss(pictures):
    """Catches a wrong KL (log-variance taken for deviation, a lost half), means where sums are meant, a decoder fed the mean."""
    vae, x = VAE(TINY), to_float(pictures[:6])
    with torch.no_grad():
        x_hat, kl = vae(x, torch.Generator().manual_seed(3))
        recon = toy_reconstruction(x, x_hat)
        mean, logvar = vae.moments(x)
        q = Normal(mean, (0.5 * logvar).exp())
        assert kl.item() == pytest.approx(kl_divergence(q, Normal(0.0, 1.0)).sum().item() / 6, rel=1e-5)
        z = mean + q.stddev * torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
        error = vae.decoder(z) - x
        assert recon.item() == pytest.approx((error.abs().sum() + (error ** 2).sum()).item() / 6, rel=1e-5)


def test_loss_falls(pictures):
    """PAPER §4.11, a VAE that does not learn: catches an optimizer or a schedule that never moves a weight."""
    trained = train_vae(pictures, TINY, steps=20, batch=8, seed=1, progress=False)
    torch.manual_seed(1)
    fresh, x = VAE(TINY), to_float(pictures[:32])
    with torch.no_grad():
        before, after = (toy_reconstruction(x, vae(x, torch.Generator().manual_seed(0))[0]).item() for vae in (fresh, trained))
    assert after < 0.7 * before


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_any_number_of_steps(pictures, steps):
    """Catches a schedule that divides by zero for some numbers of steps."""
    train_vae(pictures[:8], VAEConfig(channels=4, multipliers=(1, 1), z=2), steps=steps, batch=2, progress=False)


def test_the_rate_rises_and_falls():
    """Catches a rate that starts at its height, that jumps, or that does not end near 0."""
    rates = [vae_training.learning_rate(step, dict(steps=100, lr=2.0)) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * k for k in range(1, 11)], rel=0.03) and np.argmax(rates) in (9, 10)
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and rates[50] == pytest.approx(1.0) and rates[-1] < 0.001
    assert vae_training.learning_rate(4999, dict(steps=10 ** 6, lr=2.0)) == pytest.approx(2.0, rel=1e-3)     # a long run: 5,000 steps
    assert vae_training.learning_rate(2499, dict(steps=10 ** 6, lr=2.0)) == pytest.approx(1.0, rel=1e-3)


def test_a_cpu_computes_in_32_bits():
    """Catches bfloat16 where it is slow, and where the tests of this file would hide it."""
    with vae_training.bf16(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_when_it_saves(pictures, tmp_path):
    """Catches a state that is saved at other steps than every save_every, and an end that is not saved."""
    steps = []
    run = dict(steps=5, batch=2, save_every=2, out=tmp_path, progress=False)
    train_vae(pictures[:8], VAEConfig(**SMALL), on_save=lambda _: steps.append(load(tmp_path / "last.pt", "vae training")["step"]), **run)
    assert steps == [2, 4, 5]


def test_training_repeats(pictures):
    """Catches global random numbers: `python train.py` would not repeat itself."""
    config = VAEConfig(channels=4, multipliers=(1, 1), z=2)
    one = train_vae(pictures[:32], config, steps=3, batch=4, seed=5, progress=False)
    torch.rand(7), np.random.rand(7)
    two = train_vae(pictures[:32], config, steps=3, batch=4, seed=5, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


# ------------------------------------------------------------------------------------------------------- the second player
@pytest.mark.parametrize("codes", [0, 12])
def test_the_discriminator_steps_from_its_step_on(pictures, codes):
    """PAPER §4.11, a discriminator that is never stepped: catches it, and one that is stepped before it judges."""
    run = prepare_training(VAEConfig(**SMALL, codes=codes), make_vae_loss(gan_start=2), OPTIONS)
    critic = run.vae_loss.discriminator
    for step in range(4):
        before, drawing = weights(critic), weights(run.vae)
        training_step(run, pictures)
        assert torch.equal(before, weights(critic)) == (step < 2), step
        assert not torch.equal(drawing, weights(run.vae)) and run.step == step + 1


def test_the_discriminators_gradient_is_its_own(pictures):
    """TRAP: the VAE's backward leaves gradients in the discriminator that would teach it to be fooled. Its step must use the
    hinge's gradient alone, of this batch and of the reconstructions of this step."""
    run, seen = prepare_training(VAEConfig(**SMALL), make_vae_loss(gan_start=0), OPTIONS), {}
    critic, hinge_loss = run.vae_loss.discriminator, run.vae_loss.discriminator_loss

    def watched(x, drawn):
        loss = hinge_loss(x, drawn)
        seen["wanted"] = torch.autograd.grad(loss, list(critic.parameters()), retain_graph=True)
        seen["drawn"], seen["real"] = drawn, x
        return loss

    run.vae_loss.discriminator_loss = watched
    for _ in range(2):
        training_step(run, pictures)
    assert all(torch.allclose(p.grad, wanted, rtol=1e-4, atol=1e-8) for p, wanted in zip(critic.parameters(), seen["wanted"]))
    assert seen["drawn"].requires_grad and not torch.equal(seen["drawn"], seen["real"])


def test_before_its_step_nothing_is_changed_by_it(pictures):
    """App. C: catches a discriminator that is felt before its step, through the loss, the random numbers or the schedule."""
    without = VAELoss(*stand_ins(make_vae_loss().lpips.net))
    one = train_vae(pictures, VAEConfig(**SMALL), 4, batch=4, vae_loss=make_vae_loss(gan_start=4), progress=False)
    two = train_vae(pictures, VAEConfig(**SMALL), 4, batch=4, vae_loss=without, progress=False)
    three = train_vae(pictures, VAEConfig(**SMALL), 4, batch=4, vae_loss=make_vae_loss(gan_start=3), progress=False)
    assert torch.equal(weights(one), weights(two)) and not torch.equal(weights(one), weights(three))


@pytest.mark.parametrize("judged", [False, True], ids=["toy", "paper"])
def test_the_prior_counts(pictures, judged):
    """The fifth term. Catches a KL that is logged and not added, and 1e-6 of a KL that is not a sum over the latent: the
    gradient must change by exactly weight times that of the KL in nats (per picture's elements, in App. C's means)."""
    x, gradients = pictures[:4], []
    for kl_weight in (0.0, 10.0):
        given = {**OPTIONS, "kl_weight": kl_weight, "lr": 0.0}
        run = prepare_training(VAEConfig(**SMALL), make_vae_loss(9) if judged else None, given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: 0.0)
            training_step(run, x)
        gradients.append(torch.cat([p.grad.flatten() for p in run.vae.encoder.parameters()]))
    again = prepare_training(VAEConfig(**SMALL), None, OPTIONS)
    chosen = to_float(x[again.rng.integers(4, size=4)])
    _, kl = again.vae(chosen, again.generator)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(kl, list(again.vae.encoder.parameters()))])
    wanted = 10.0 * wanted / (chosen[0].numel() if judged else 1)
    assert torch.allclose(gradients[1] - gradients[0], wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max())


def test_a_vqvae_learns(pictures):
    """Catches a codebook left where it began, a loss that does not fall, and a codebook loss that is not asked for."""
    run = prepare_training(VAEConfig(**SMALL, codes=16), None, {**OPTIONS, "steps": 40, "lr": 1e-2})
    training_step(run, pictures)
    first, book = vae_training.log_line(run), run.vae.quantiser.codebook.detach().clone()
    while run.step < 40:
        training_step(run, pictures)
    row = vae_training.log_line(run)
    assert row["L1+L2"] < 0.7 * first["L1+L2"] and row["codebook"] > 0
    assert not torch.allclose(book, run.vae.quantiser.codebook, atol=1e-3)
    assert 0 < row["codes_used"] <= 1 <= row["perplexity"] <= 16 and not run.vae.quantiser.uses.any()


# ------------------------------------------------------------------------------------------------------------------ resume
@pytest.mark.parametrize("codes", [0, 12])
@pytest.mark.parametrize("judged", [False, True], ids=["toy", "paper"])
def test_resumed_is_uninterrupted(pictures, tmp_path, codes, judged):
    """Catches whatever a checkpoint forgets: an optimizer, the discriminator, its BatchNorm, random numbers, the sums of the
    log. Stopped in the middle of a line of the log, after the discriminator has begun."""
    config = VAEConfig(**SMALL, codes=codes)
    options = dict(steps=6, batch=4, log_every=2, progress=False)
    whole = train_vae(pictures, config, vae_loss=loss_if(judged), out=tmp_path / "whole", **options)

    class AfterThree:
        calls = 0

        def __bool__(self):
            self.calls += 1
            return self.calls > 3

    assert train_vae(pictures, config, vae_loss=loss_if(judged), out=tmp_path / "two", stop=AfterThree(), **options) is None
    torch.rand(5), np.random.rand(5)
    vae_loss = loss_if(judged)
    resumed = train_vae(pictures, config, vae_loss=vae_loss, out=tmp_path / "two", resume=True, **options)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    one, two = ((tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "two"))
    assert one == two and [json.loads(row)["step"] for row in one] == [2, 4, 6]
    last = [load(tmp_path / name / "last.pt", "vae training")["parts"] for name in ("whole", "two")]
    assert len(last[0]) == (4 if judged else 2)
    for a, b in zip(*(torch.utils._pytree.tree_leaves(parts) for parts in last), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def loss_if(judged):
    return make_vae_loss() if judged else None


def test_resume_with_other_options(pictures, tmp_path):
    """Catches a resume that mixes two runs. The sentence names the option and both values; the checkpoint stays."""
    run = prepare_training(VAEConfig(**SMALL), None, OPTIONS)
    training_step(run, pictures)
    save_training(run, tmp_path)
    kept = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(UserError, match="lr 0.002, not 0.5"):
        resume_training(prepare_training(VAEConfig(**SMALL), None, {**OPTIONS, "lr": 0.5}), tmp_path)
    with pytest.raises(UserError, match="loss L1 .* L2, not L1 .* ID"):
        for vae_loss in (None, make_vae_loss()):
            train_vae(pictures, VAEConfig(**SMALL), 4, batch=4, vae_loss=vae_loss, out=tmp_path / "x", resume=bool(vae_loss),
                      progress=False)
    assert (tmp_path / "last.pt").read_bytes() == kept


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
    """Catches a step torn apart by Ctrl-C, a program that cannot be stopped, and a signal handler left behind."""
    before = signal.getsignal(signal.SIGINT)
    with finish_step_first() as pressed:
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed
    assert signal.getsignal(signal.SIGINT) is before
    ended = subprocess.run([sys.executable, "-c", CTRL_C], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ended.stdout == "the step is finished\n" and ended.returncode == -signal.SIGINT


def test_ctrl_c_saves_what_can_be_resumed(tmp_path, few, monkeypatch):
    """Catches a command line that lets Ctrl-C end it in the middle of a step, or with nothing kept."""
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
    one, two = (load(tmp_path / name / "vae.pt", "vae")["weights"] for name in ("run", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)


# ------------------------------------------------------------------------------------------------------------ command line
@pytest.fixture
def few(monkeypatch):
    """Little data, whatever is asked for, and a stand-in that has learnt little."""
    load_pairs, train_small_net = choose.load_pairs, perceptual.train_small_net
    monkeypatch.setattr(perceptual, "train_small_net", lambda *a, seed: train_small_net(*a, steps=2, batch=4, seed=seed))
    monkeypatch.setattr(choose, "load_pairs", lambda *args, n, **more: load_pairs(*args, n=20, **more))


def test_main_writes_a_vae_and_reconstructions(tmp_path, capsys, few):
    """Catches a command line that trains and then loses the result."""
    vae_training.main(["--steps", "1", "--batch", "1", "--save-every", "1", "--out", str(tmp_path / "run")])     # as little as may be
    vae, said = unpack_vae(load(tmp_path / "run/vae.pt", "vae")), capsys.readouterr().out
    assert vae.config.image_channels == 3 and (tmp_path / "run/reconstructions.png").stat().st_size > 1000
    assert "mean error" in said and "loss: L1 + L2 + 1e-06 KL" in said


def test_main_with_the_papers_loss_and_codes(tmp_path, capsys, few):
    """Catches a run that does not say who judges it, and a VQ-VAE that does not say how many of its codes it used."""
    command = ["--steps", "3", "--batch", "4", "--loss", "paper", "--gan-start", "1", "--codes", "16"]
    command += ["--out", str(tmp_path / "run")]
    vae_training.main(command)
    vae, said = unpack_vae(load(tmp_path / "run/vae.pt", "vqvae")), capsys.readouterr().out
    assert "L1 + LPIPS + 0.2 ID + 0.5 GAN from step 1 + codebook" in said and said.count("our small network") == 2
    assert "of 16 codes used" in said and vae.config.codes == 16
    row = json.loads((tmp_path / "run/log.jsonl").read_text())
    assert set(row) == {"step", "L1", "LPIPS", "ID", "GAN", "weight", "D", "codebook", "codes_used", "perplexity"}
    with pytest.raises(UserError, match="--resume"):
        vae_training.main(command)


def test_terms_without_weights_are_off_and_it_is_said():
    """Catches a run at the paper's size that trains without LPIPS or ID in silence, or with our toy network in their place."""
    pairs = scenes.load_scenes(3, 0, progress=False)
    args = argparse.Namespace(paper=True, lpips_weights=None, moco_weights=None, gan_start=50_000, seed=0)
    vae_loss, said = vae_training.build_loss(args, pairs)
    assert vae_loss.lpips is None and vae_loss.identity is None and vae_loss.describe() == "L1 + 0.5 GAN from step 50000"
    assert "LPIPS is OFF" in said and "ID is OFF" in said
    assert sum(p.numel() for p in vae_loss.discriminator.parameters()) == 2_765_633


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
], ids=lambda v: " ".join(v))
def test_mistakes(tmp_path, monkeypatch, few, arguments, words):
    """Catches a traceback, a mistake that is found after the work is done, and a folder left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vae_training, "train_vae", lambda *a, **k: pytest.fail("trained before it looked at the options"))
    with pytest.raises(UserError) as mistake:
        vae_training.main([*arguments, "--out", "run"])
    assert all(word in str(mistake.value) for word in words) and os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------ rare colours
def test_rare_colours_are_balanced():
    """Catches a balance that turns colours, prefers grey to green, or makes the whole loss larger; and one of grey pictures."""
    rng = np.random.default_rng(0)
    light, tint = rng.normal(0, 60, (4000, 1)), rng.normal(0, 10, (4000, 1))
    colours = 128 + light + tint * [0.5, -1.0, 0.5]                     # mostly light and dark, a little green and magenta
    pixels = colours.clip(0, 255).round().astype(np.uint8).reshape(40, 10, 10, 3)
    balance = vae_training.colour_balance(pixels)
    grey, green = torch.tensor([1.0, 1, 1]) / 3 ** 0.5, torch.tensor([1.0, -2, 1]) / 6 ** 0.5
    assert torch.allclose(balance, balance.T) and (balance @ grey).norm() < 1.0 < 2.0 < (balance @ green).norm()
    for colour in (grey, green):
        turned = balance @ colour
        assert torch.dot(turned, colour) / turned.norm() > 0.99
    # 3/4 of the way: the errors of a direction, times its balance, are left with the fourth root of their ratio.
    ratio = (3 * light.var() / (1.5 * tint.var())) ** 0.5
    assert (balance @ green).norm() / (balance @ grey).norm() == pytest.approx(ratio ** 0.75, rel=0.1)
    x = to_float(pixels)
    mean = x.mean((0, 2, 3), keepdim=True)
    plain, balanced = toy_reconstruction(x, mean.expand_as(x)), toy_reconstruction(x, mean.expand_as(x), balance)
    assert 0.7 < balanced / plain < 1.4 and torch.equal(plain, toy_reconstruction(x, mean.expand_as(x), None))
    assert toy_reconstruction(x, x, balance) == 0
    assert vae_training.colour_balance(pixels[..., :1]).shape == (1, 1)
    # JPEG's noise in a grey photo, one level of 255, does not count as a colour.
    noisy = (128 + light + rng.normal(0, 1, (4000, 3))).clip(0, 255).round().astype(np.uint8).reshape(40, 10, 10, 3)
    balance = vae_training.colour_balance(noisy)
    assert (balance @ green).norm() < 15 * (balance @ grey).norm()


def test_balance_is_for_the_first_third(pictures, monkeypatch):
    """Catches a balance that stays until the end, where it costs 2 dB, and one that is never on."""
    real, seen = toy_reconstruction, []
    monkeypatch.setattr(vae_training, "toy_reconstruction", lambda x, x_hat, balance: seen.append(balance is not None) or real(x, x_hat, balance))
    train_vae(pictures, VAEConfig(**SMALL), steps=6, batch=4, progress=False, balance=True)
    assert seen == [True, True, False, False, False, False]


def test_balance_is_part_of_the_run(pictures, tmp_path):
    """Catches a balance that is measured and not used, or that a resumed run may change."""
    options = dict(steps=3, batch=4, seed=5, progress=False)
    one, two = (train_vae(pictures, VAEConfig(**SMALL), balance=balance, **options) for balance in (False, True))
    assert not torch.equal(weights(one), weights(two))
    train_vae(pictures, VAEConfig(**SMALL), out=tmp_path, **options)
    with pytest.raises(UserError, match="balance False, not True"):
        train_vae(pictures, VAEConfig(**SMALL), out=tmp_path, resume=True, balance=True, **options)


@pytest.mark.parametrize("size", [32, 256])
def test_how_many_scenes(monkeypatch, size):
    """Catches `--paper` on scenes that holds 20,000 pictures of 256 x 256, 3.7 GB."""
    numbers = []
    monkeypatch.setattr(choose, "load_pairs", lambda *a, n, **k: numbers.append(n) or scenes.load_scenes(1, 0, progress=False))
    vae_training.load_pictures(vae_training.parse_arguments(["--image-size", str(size)]), True)
    assert numbers[0] == {32: 20_000, 256: 1365}[size] and numbers[0] * 3 * size ** 2 <= 2 ** 28
