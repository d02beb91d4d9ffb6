"""
test_vae.py: the small space and its checkpoints                                       (vae.py; Transfusion App. C; PAPER §4.11)

Shapes and the paper's size; the loss against formulas that others wrote; latents that arrive at unit deviation; and files
that are never half written, nor read if they are something else.
"""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import data
import vae as vae_module
from data import UserError
from vae import VAE, VAEConfig, encode_all, load, loss_terms, pack_vae, save, to_float, to_pixels, train_vae, unpack_vae

TINY = VAEConfig(channels=8, multipliers=(1, 2, 2), z=4)


@pytest.fixture(scope="module")
def pictures():
    """(200, 32, 32, 3) uint8: small scenes."""
    return data.load_scenes(200, 0, progress=False).pixels


@pytest.fixture(scope="module")
def trained(pictures):
    """A VAE after 30 steps: bad at drawing, but a real distribution of latents."""
    return train_vae(pictures, TINY, steps=30, batch=16, seed=1, progress=False)


# ------------------------------------------------------------------------------------------------------ shapes and sizes
@pytest.mark.parametrize("size, stages, channels", [(28, 3, 1), (32, 3, 3), (64, 4, 3), (256, 4, 3), (32, 1, 3)])
@torch.no_grad()
def test_shapes(size, stages, channels):
    """Catches a stage too many or too few: latents must be 2 ** (stages - 1) times smaller, and decode to the old size."""
    vae = VAE(VAEConfig(image_channels=channels, channels=4, multipliers=(1,) * stages, z=5)).eval()
    x = torch.rand(2, channels, size, size) * 2 - 1
    mean, deviation = vae.encode(x)
    assert vae.f == 2 ** (stages - 1)
    assert mean.shape == deviation.shape == (2, 5, size // vae.f, size // vae.f) and (deviation > 0).all()
    drawn = vae.decode(mean)
    assert drawn.shape == x.shape and drawn.abs().max() <= 1


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 3, 32, 30), (1, 1, 32, 32)])
def test_shapes_that_do_not_fit(shape):
    """Catches a picture whose size is rounded down, or grey taken for colour, and an error that does not say what would fit."""
    with pytest.raises(ValueError, match="divisible by 4.*" + str(shape[2])):
        VAE(TINY).moments(torch.zeros(shape))


def test_the_papers_vae():
    """App. C: 256x256x3 -> 32x32x8, 86M parameters with what our reading leaves out. Catches any change of the plan."""
    with torch.device("meta"):
        vae = VAE(vae_module.paper())
        mean, _ = vae.moments(torch.empty(1, 3, 256, 256))
        drawn = vae.decoder(mean)
    assert mean.shape == (1, 8, 32, 32) and drawn.shape == (1, 3, 256, 256)
    assert sum(p.numel() for p in vae.parameters()) == 83_709_419


@pytest.mark.parametrize("shape", [(3, 8, 8, 1), (2, 32, 32, 3)])
def test_pixels_and_floats(shape):
    """Catches rows taken for columns, a scale other than [-1, 1], and rounding down (a grey level lost at each pass)."""
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, 255
    x = to_float(pixels)
    assert x.shape == (shape[0], shape[3], *shape[1:3]) and x.dtype == torch.float32
    assert x[0, :, 0, 0].eq(-1).all() and x[0, :, 0, 1].eq(1).all()
    assert (to_pixels(x) == pixels).all() and (to_pixels(x + 0.003) == pixels).all()
    assert to_pixels(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).tolist() == [[[[0], [255]]]]


# ----------------------------------------------------------------------------------------------------------------- losses
def test_loss_terms(pictures):
    """Catches a wrong KL (log-variance taken for deviation, a lost half), means where sums are meant, a decoder fed the mean."""
    vae, x = VAE(TINY), to_float(pictures[:6])
    with torch.no_grad():
        recon, kl = loss_terms(vae, x, torch.Generator().manual_seed(3))
        mean, logvar = vae.moments(x)
        q = Normal(mean, (0.5 * logvar).exp())
        assert kl.item() == pytest.approx(kl_divergence(q, Normal(0.0, 1.0)).sum().item() / 6, rel=1e-5)
        z = mean + q.stddev * torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
        error = vae.decoder(z) - x
        assert recon.item() == pytest.approx((error.abs().sum() + (error ** 2).sum()).item() / 6, rel=1e-5)


def test_loss_falls(pictures, trained):
    """PAPER §4.11, a VAE that does not learn: catches an optimizer or a schedule that never moves a weight."""
    torch.manual_seed(1)
    fresh, x = VAE(TINY), to_float(pictures[:64])
    with torch.no_grad():
        before, after = (loss_terms(vae, x, torch.Generator().manual_seed(0))[0].item() for vae in (fresh, trained))
    assert after < 0.6 * before


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
def test_any_number_of_steps(pictures, steps):
    """Catches a schedule that divides by zero for some numbers of steps."""
    train_vae(pictures[:8], VAEConfig(channels=4, multipliers=(1, 1), z=2), steps=steps, batch=2, progress=False)


def test_training_repeats(pictures):
    """Catches global random numbers: `python train.py` would not repeat itself."""
    config = VAEConfig(channels=4, multipliers=(1, 1), z=2)
    one = train_vae(pictures[:32], config, steps=3, batch=4, seed=5, progress=False)
    torch.rand(7), np.random.rand(7)
    two = train_vae(pictures[:32], config, steps=3, batch=4, seed=5, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


# ---------------------------------------------------------------------------------------------------------------- latents
@torch.no_grad()
def test_latents_have_unit_deviation(pictures, trained):
    """PAPER §4.11, latents not scaled: catches a diffusion that is trained on latents far from N(0, 1) in scale."""
    mean, deviation = encode_all(trained, pictures, progress=False)
    assert mean.shape == deviation.shape == (200, 4, 8, 8)
    z = mean + deviation * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert z.mean((0, 2, 3)).abs().max() < 0.02
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.02
    raw = trained.moments(to_float(pictures[:50]))[0].std((0, 2, 3))
    assert (raw - 1).abs().max() > 0.05                 # they did not have it by chance
    assert trained.reach.item() == pytest.approx(mean.abs().max().item(), rel=1e-4)


@torch.no_grad()
def test_decode_undoes_what_encode_did_to_the_scale(pictures, trained):
    """PAPER §4.11: catches normalising twice, or only one way: decode(encode(x)) must be the decoder at the raw mean."""
    x = to_float(pictures[:16])
    mean, deviation = trained.encode(x)
    raw, logvar = trained.moments(x)
    assert torch.allclose(trained.decode(mean), trained.decoder(raw).clamp(-1, 1), atol=1e-4)
    assert torch.allclose(deviation * trained.scale.view(1, -1, 1, 1), (0.5 * logvar).exp(), rtol=1e-4)
    assert not torch.allclose(mean, raw, atol=0.1)


def test_encode_all_encodes_all(pictures, trained):
    """Catches the last, short batch lost, or pictures out of order; and gradients kept for a whole data set."""
    many = np.concatenate([pictures, pictures[:90]])
    mean, _ = encode_all(trained, many, progress=False)
    assert len(mean) == 290 and not mean.requires_grad
    assert torch.allclose(mean[200:], mean[:90], atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(mean[283], trained.encode(to_float(many[283:284]))[0][0], atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ checkpoints
def test_pack_and_unpack(tmp_path, trained):
    """Catches a checkpoint without the scale of its latents, or that returns in training mode."""
    save(tmp_path / "new/folder/vae.pt", pack_vae(trained))
    again = unpack_vae(load(tmp_path / "new/folder/vae.pt", "vae"))
    assert again.config == trained.config and not again.training
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert os.listdir(tmp_path / "new/folder") == ["vae.pt"]


def half_written(content, path, *rest):
    """What torch.save does when the disk fills up."""
    Path(path).write_bytes(b"half of a checkpoint")
    raise OSError("no space left on device")


def test_save_is_atomic(tmp_path, monkeypatch):
    """Catches a crash while saving that destroys the last good checkpoint."""
    save(tmp_path / "last.pt", {"kind": "training", "step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_written)
        with pytest.raises(OSError):
            save(tmp_path / "last.pt", {"kind": "training", "step": 2})
    assert load(tmp_path / "last.pt", "training")["step"] == 1
    save(tmp_path / "last.pt", {"kind": "training", "step": 3})
    assert load(tmp_path / "last.pt", "training")["step"] == 3 and os.listdir(tmp_path) == ["last.pt"]


class Malice:
    """Unpickled without weights_only, this makes a folder; it could as well delete one."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["truncated", "text", "empty", "missing", "folder", "other kind", "no dict", "pickle"])
def test_files_that_are_no_checkpoint(tmp_path, content):
    """Catches a traceback, or worse an executed pickle, where the user named the wrong file. The sentence names the file."""
    path = tmp_path / "vae.pt"
    save(path, pack_vae(VAE(VAEConfig(channels=4, multipliers=(1,), z=1))))
    whole = path.read_bytes()
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content in ("other kind", "no dict", "pickle"):
        wrong = {"other kind": {"kind": "model"}, "no dict": [1, 2], "pickle": {"kind": "vae", "x": Malice(tmp_path / "bad")}}
        torch.save(wrong[content], path)
    elif content != "missing":
        path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"not a checkpoint\n", "empty": b""}[content])
    with pytest.raises(UserError, match="vae.pt"):
        load(path, "vae")
    assert not (tmp_path / "bad").exists()


def test_the_wrong_kind_is_named(tmp_path):
    """Catches model.pt given for vae.pt: the sentence says what it is and what is needed."""
    save(tmp_path / "model.pt", {"kind": "model"})
    with pytest.raises(UserError, match="'model'.*'vae'"):
        load(tmp_path / "model.pt", "vae")


# ---------------------------------------------------------------------------------------------------------------- pictures
def test_grid():
    """Catches pictures out of order, overlapping, or cut at the right edge; grey ones must work too."""
    pictures = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((5, 4, 6, 1), np.uint8)
    sheet = vae_module.grid(pictures, columns=3, gap=2)
    assert sheet.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    for k in range(5):
        y, x = 2 + (k // 3) * 6, 2 + (k % 3) * 8
        assert (sheet[y: y + 4, x: x + 6] == k + 1).all()
    assert (sheet[-6:, -8:] == 96).all()


def test_main_writes_a_vae_and_reconstructions(tmp_path, capsys, monkeypatch):
    """Catches a command line that trains and then loses the result."""
    load_pairs = data.load_pairs
    monkeypatch.setattr(data, "load_pairs", lambda *args, n, **more: load_pairs(*args, n=20, **more))
    vae_module.main(["--steps", "3", "--out", str(tmp_path / "run")])
    vae = unpack_vae(load(tmp_path / "run/vae.pt", "vae"))
    assert vae.config.image_channels == 3 and (tmp_path / "run/reconstructions.png").stat().st_size > 1000
    assert "mean error" in capsys.readouterr().out
