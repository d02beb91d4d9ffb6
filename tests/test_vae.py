"""
test_vae.py: the small space and its checkpoints                                       (vae.py; Transfusion App. C; PAPER §4.11)

Shapes and the paper's size; latents that arrive at unit deviation; a quantiser against brute force and against its loss
written out by hand; and files that are never half written, nor read if they are something else.
"""
import os

import numpy as np
import pytest
import torch

import vae as vae_module
from autoencoder.train import train_vae
from sources import scenes
from support import figures
from support.checkpoint import load, pack_vae, save, unpack_vae
from support.common import UserError
from vae import (
    IDLE,
    VAE,
    Quantiser,
    VAEConfig,
    codebook_use,
    encode_all,
    encode_all_codes,
    to_float,
    to_pixels,
)

TINY = VAEConfig(channels=8, multipliers=(1, 2, 2), z=4)


@pytest.fixture(scope="module")
def pictures():
    """(200, 32, 32, 3) uint8: small scenes."""
    return scenes.load_scenes(200, 0, progress=False).pixels


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
        vae = VAE(vae_module.paper_config())
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
    assert trained.x0_max.item() == pytest.approx(mean.abs().max().item(), rel=1e-4)


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


# -------------------------------------------------------------------------------------------------------------- quantiser
@pytest.fixture
def vq():
    """A VQ-VAE whose codes lie where its encoder's output does, so that many of them are used."""
    vae = VAE(VAEConfig(channels=8, multipliers=(1, 2, 2), z=4, codes=40)).train()
    vae(torch.rand(4, 3, 16, 16) * 2 - 1)               # one training step's look places the codes
    return vae.eval()


def test_the_papers_vqvae():
    """App. C: same network but for the projection to 8 dimensions, and 16,384 codes. Catches a codebook of another width."""
    with torch.device("meta"):
        vae = VAE(vae_module.paper_config(codes=16_384))
    assert vae.quantiser.codebook.shape == (16_384, 8)
    projection = 16 * 8 + 8 - (16 * 16 + 16)            # a 1x1 convolution to 8 channels, not to mean and log-variance
    assert sum(p.numel() for p in vae.parameters()) == 83_709_419 + projection + 16_384 * 8


def test_nearest_is_the_nearest():
    """Catches a forgotten |c|^2 (the longest code wins then), a sign, or a codebook transposed."""
    quantiser, vectors = Quantiser(50, 3), torch.randn(400, 3)
    quantiser.codebook.data *= torch.linspace(0.1, 3, 50)[:, None]
    wanted = (vectors[:, None] - quantiser.codebook[None]).square().sum(2).argmin(1)
    assert torch.equal(quantiser.nearest(vectors), wanted) and len(wanted.unique()) > 20


def test_straight_through():
    """Catches a gradient that stops at the quantiser, or passes it changed: d out / d e must be the identity, though out is
    made of codes alone."""
    quantiser, e = Quantiser(10, 4).eval(), torch.randn(2, 4, 3, 5, requires_grad=True)
    out, codes, _ = quantiser(e)
    assert torch.allclose(out, quantiser.codebook[codes].permute(0, 3, 1, 2), atol=1e-6) and not torch.allclose(out, e, atol=0.1)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    assert torch.equal(e.grad, weight) and quantiser.codebook.grad is None


def test_codebook_loss_by_hand():
    """van den Oord et al. eq. 3 with beta = 0.25. Catches beta on the codebook's term, a lost stop-gradient, sums for means."""
    quantiser = Quantiser(2, 2).eval()
    quantiser.codebook.data = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    places = torch.tensor([[0.1, 0.3], [0.7, 1.0]])     # two places, two numbers each
    e = places.T.reshape(1, 2, 1, 2).clone().requires_grad_()
    _, codes, loss = quantiser(e)
    chosen = quantiser.codebook.detach()[codes.flatten()]
    loss.backward()
    assert codes.flatten().tolist() == [0, 1]
    assert loss.item() == pytest.approx(1.25 * (places - chosen).square().mean().item())
    assert torch.allclose(quantiser.codebook.grad, 2 * (chosen - places) / 4)
    assert torch.allclose(e.grad[0, :, 0].T, 0.25 * 2 * (places - chosen) / 4)


def test_all_codes(vq):
    """Catches a last batch lost, an order changed, and gradients kept for a whole data set."""
    pixels, sizes = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3)).astype(np.uint8), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_module, "to_float", lambda p: (sizes.append(len(p)), to_float(p))[1])
        codes = encode_all_codes(vq, pixels, progress=False)
    assert sizes == [4] * 5 and codes.shape == (20, 32, 32) and not codes.requires_grad
    assert torch.equal(codes[17:], vq.encode_codes(to_float(pixels[17:])))


@torch.no_grad()
def test_codes_there_and_back(vq):
    """Catches rows taken for columns, and a sampler that decodes something else than what was trained."""
    x = torch.rand(3, 3, 16, 24) * 2 - 1
    codes = vq.encode_codes(x)
    assert codes.shape == (3, 4, 6) and codes.dtype == torch.int64 and len(codes.unique()) > 5
    drawn = vq(x)[0].clamp(-1, 1)
    assert torch.allclose(vq.decode_codes(codes), drawn, atol=1e-5) and torch.equal(vq.reconstruct(x), vq.decode_codes(codes))
    assert not torch.allclose(vq.decode_codes(codes.roll(1, 2)), drawn, atol=1e-3)


def test_idle_codes_move_to_where_the_encoder_speaks():
    """Catches codes that stay dead, live codes that are moved, and a codebook that changes while evaluating."""
    quantiser, e = Quantiser(20, 3), torch.randn(2, 3, 4, 4)
    places = e.permute(0, 2, 3, 1).reshape(-1, 3)
    before = quantiser.codebook.detach().clone()
    quantiser.eval()(e)
    assert torch.equal(quantiser.codebook, before) and quantiser.idle.eq(IDLE).all() and not quantiser.uses.any()
    quantiser.train()
    quantiser.idle[:] = 0
    quantiser.idle[[3, 7]] = IDLE
    _, codes, _ = quantiser(e, torch.Generator().manual_seed(0))
    moved = (quantiser.codebook != before).any(1).nonzero().flatten().tolist()
    assert moved == [3, 7] and all((places == quantiser.codebook[k]).all(1).any() for k in moved)
    assert torch.equal(quantiser.uses, torch.bincount(codes.flatten(), minlength=20))
    assert ((quantiser.idle == 0) == (quantiser.uses > 0)).all() and quantiser.idle.max() == 1


def test_codebook_use_by_hand():
    """Catches an entropy in bits, a share of the used codes only, and NaN where nothing was counted."""
    assert codebook_use(torch.tensor([5, 5, 0, 0, 5, 5])) == pytest.approx((4 / 6, 4.0))
    share, perplexity = codebook_use(torch.tensor([3, 1]))
    assert perplexity == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))) and share == 1
    assert codebook_use(torch.zeros(4, dtype=torch.long))[0] == 0


@torch.no_grad()
def test_one_is_not_the_other(vq):
    """Catches a VQ-VAE whose codes are used as a VAE's mean, and codes that are none (torch would take -1 for the last)."""
    with pytest.raises(ValueError, match="encode_codes"):
        vq.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="without codes"):
        VAE(TINY).encode_codes(torch.zeros(1, 3, 16, 16))
    for wrong in (torch.full((1, 2, 2), 40), torch.full((1, 2, 2), -1), torch.zeros(4, dtype=torch.long)):
        with pytest.raises(ValueError, match="between 0 and 39"):
            vq.decode_codes(wrong)


@pytest.mark.parametrize("codes", [1, -5])
def test_too_few_codes(codes):
    """Catches a codebook that says nothing."""
    with pytest.raises(UserError, match="at least 2"):
        VAEConfig(codes=codes)


def test_a_vqvae_has_a_kind_of_its_own(tmp_path, vq):
    """Catches a VQ-VAE given to train.py as its VAE: the sentence names both. And a codebook that is not saved."""
    save(tmp_path / "vae.pt", pack_vae(vq))
    with pytest.raises(UserError, match="'vqvae'.*'vae'"):
        load(tmp_path / "vae.pt", "vae")
    again, x = unpack_vae(load(tmp_path / "vae.pt", "vqvae")), torch.rand(2, 3, 16, 16)
    assert torch.equal(again.encode_codes(x), vq.encode_codes(x)) and again.config == vq.config


# ------------------------------------------------------------------------------------------------------------ checkpoints
def test_pack_and_unpack(tmp_path, trained):
    """Catches a checkpoint without the scale of its latents, or that returns in training mode."""
    save(tmp_path / "new/folder/vae.pt", pack_vae(trained))
    again = unpack_vae(load(tmp_path / "new/folder/vae.pt", "vae"))
    assert again.config == trained.config and not again.training
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert os.listdir(tmp_path / "new/folder") == ["vae.pt"]


def half_written(content, file, *rest):
    """What torch.save does when the disk fills up."""
    file.write(b"half of a checkpoint")
    raise OSError("no space left on device")


def test_save_is_atomic(tmp_path, monkeypatch):
    """Catches a crash while saving that destroys the last good checkpoint."""
    save(tmp_path / "last.pt", {"kind": "training", "step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_written)
        with pytest.raises((OSError, UserError)):
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
    sheet = figures.grid(pictures, columns=3, gap=2)
    assert sheet.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    for k in range(5):
        y, x = 2 + (k // 3) * 6, 2 + (k % 3) * 8
        assert (sheet[y: y + 4, x: x + 6] == k + 1).all()
    assert (sheet[-6:, -8:] == 96).all()
