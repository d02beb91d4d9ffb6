"""
test_vae.py: pictures in a small space, and its checkpoints     (vae.py; Transfusion App. C)

THE IDEA    Latents must arrive at unit deviation, or the diffusion's noise is too weak or too
            strong. A quantiser is three formulas, so each can be held to its definition. And a
            checkpoint is never half written, nor read if it is something else.
COMPARED    latents                 with N(0, 1), over a data set
            the nearest code        with all distances, computed one by one
            the codebook's loss     with its equation, written out, gradients too
            the paper's networks    with their number of parameters
RUN IT      pytest -n 0 tests/test_vae.py
            Each docstring names the bug that the test catches. "PAPER §4.11": docs/PAPER.md.
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
PAPERS_PARAMETERS = 83_709_419                          # App. C says 86M; the rest we do not know


@pytest.fixture(scope="module")
def pictures():
    """(200, 32, 32, 3) uint8: small scenes."""
    return scenes.load_scenes(200, 0, progress=False).pixels


@pytest.fixture(scope="module")
def trained(pictures):
    """A VAE after 30 steps: bad at drawing, but with a real distribution of latents."""
    return train_vae(pictures, TINY, steps=30, batch=16, seed=1, progress=False)


def random_pixels(shape):
    """A uint8 array of random grey levels."""
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def count_parameters(network):
    """How many numbers a network learns."""
    return sum(weight.numel() for weight in network.parameters())


# --------------------------------------------------------------------------------- shapes and sizes
@pytest.mark.parametrize("size, stages, channels", [
    (28, 3, 1),
    (32, 3, 3),
    (64, 4, 3),
    (256, 4, 3),
    (32, 1, 3),
])
@torch.no_grad()
def test_shapes(size, stages, channels):
    """Catches a stage too many or too few: latents must be 2 ** (stages - 1) times smaller, and
    must decode to the old size."""
    multipliers = (1,) * stages
    config = VAEConfig(image_channels=channels, channels=4, multipliers=multipliers, z=5)
    vae = VAE(config).eval()
    x = torch.rand(2, channels, size, size) * 2 - 1

    mean, deviation = vae.encode(x)
    assert vae.f == 2 ** (stages - 1)
    small = size // vae.f
    assert mean.shape == (2, 5, small, small)
    assert deviation.shape == (2, 5, small, small)
    assert (deviation > 0).all()

    drawn = vae.decode(mean)
    assert drawn.shape == x.shape
    assert drawn.abs().max() <= 1


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 3, 32, 30), (1, 1, 32, 32)])
def test_shapes_that_do_not_fit(shape):
    """Catches a picture whose size is rounded down, grey taken for colour, and an error that does
    not say what would fit."""
    height = shape[2]
    with pytest.raises(ValueError, match=f"divisible by 4.*{height}"):
        VAE(TINY).moments(torch.zeros(shape))


def test_the_papers_vae():
    """Catches any change of the plan of App. C: 256x256x3 becomes 32x32x8, with 86M parameters. (We
    have less by what our reading of it leaves out.)"""
    with torch.device("meta"):                          # shapes alone, no memory
        vae = VAE(vae_module.paper_config())
        mean, _ = vae.moments(torch.empty(1, 3, 256, 256))
        drawn = vae.decoder(mean)
    assert mean.shape == (1, 8, 32, 32)
    assert drawn.shape == (1, 3, 256, 256)
    assert count_parameters(vae) == PAPERS_PARAMETERS


@pytest.mark.parametrize("shape", [(3, 8, 8, 1), (2, 32, 32, 3)])
def test_pixels_and_floats(shape):
    """Catches rows taken for columns, a scale other than [-1, 1], and rounding down, which would
    lose a grey level at each pass."""
    M, h, w, c = shape
    pixels = random_pixels(shape)
    pixels[0, 0, 0] = 0                                 # the darkest, then the brightest
    pixels[0, 0, 1] = 255

    x = to_float(pixels)
    assert x.shape == (M, c, h, w)
    assert x.dtype == torch.float32
    assert x[0, :, 0, 0].eq(-1).all()
    assert x[0, :, 0, 1].eq(1).all()

    # Back again, to the nearest level: levels are 0.008 apart.
    assert (to_pixels(x) == pixels).all()
    assert (to_pixels(x + 0.003) == pixels).all()

    # What lies outside is clamped.
    outside = torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)
    assert to_pixels(outside).tolist() == [[[[0], [255]]]]


# --------------------------------------------------------- latents, what Transfusion learns to draw
@torch.no_grad()
def test_latents_have_unit_deviation(pictures, trained):
    """Catches latents that are not scaled (PAPER §4.11): a diffusion would be trained on latents
    far from N(0, 1) in scale."""
    mean, deviation = encode_all(trained, pictures, progress=False)
    assert mean.shape == (200, 4, 8, 8)
    assert deviation.shape == (200, 4, 8, 8)

    g = torch.Generator().manual_seed(0)
    z = mean + deviation * torch.randn(mean.shape, generator=g)
    assert z.mean((0, 2, 3)).abs().max() < 0.02         # of each channel
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.02

    # They did not have it by chance.
    raw, _ = trained.moments(to_float(pictures[:50]))
    assert (raw.std((0, 2, 3)) - 1).abs().max() > 0.05

    # Samplers clip by the largest.
    largest = mean.abs().max().item()
    assert trained.x0_max.item() == pytest.approx(largest, rel=1e-4)


@torch.no_grad()
def test_decode_undoes_what_encode_did_to_the_scale(pictures, trained):
    """Catches normalising twice, or only one way (PAPER §4.11): decode(encode(x)) must be what the
    decoder makes of the raw mean."""
    x = to_float(pictures[:16])
    mean, deviation = trained.encode(x)
    raw, logvar = trained.moments(x)

    from_raw = trained.decoder(raw).clamp(-1, 1)
    assert torch.allclose(trained.decode(mean), from_raw, atol=1e-4)

    raw_deviation = (0.5 * logvar).exp()
    scale = trained.scale.view(1, -1, 1, 1)
    assert torch.allclose(deviation * scale, raw_deviation, rtol=1e-4)

    assert not torch.allclose(mean, raw, atol=0.1)      # there was something to undo


def test_encode_all_encodes_all(pictures, trained):
    """Catches the last, short batch lost, or pictures out of order; and gradients that are kept for
    a whole data set."""
    many = np.concatenate([pictures, pictures[:90]])
    mean, _ = encode_all(trained, many, progress=False)
    assert len(mean) == 290
    assert not mean.requires_grad

    # The first 90 come again at the end.
    assert torch.allclose(mean[200:], mean[:90], atol=1e-4)
    # And one picture of the last batch, alone.
    with torch.no_grad():
        alone, _ = trained.encode(to_float(many[283:284]))
    assert torch.allclose(mean[283], alone[0], atol=1e-4)


# ------------------------------------------------------------ codes, what Chameleon learns to write
@pytest.fixture
def vq():
    """A VQ-VAE whose codes lie where its encoder's output does, so that many of them are used."""
    config = VAEConfig(channels=8, multipliers=(1, 2, 2), z=4, codes=40)
    vae = VAE(config).train()
    vae(torch.rand(4, 3, 16, 16) * 2 - 1)               # in training, the first look places them
    return vae.eval()


def test_the_papers_vqvae():
    """Catches a codebook of another width. App. C: the same network, but for the projection to 8
    dimensions, and 16,384 codes."""
    with torch.device("meta"):
        vae = VAE(vae_module.paper_config(codes=16_384))
    codebook = 16_384 * 8
    assert vae.quantiser.codebook.shape == (16_384, 8)

    # A VAE's last 1x1 convolution makes 16 channels: mean and log-variance. Here it makes 8.
    to_moments = 16 * 16 + 16
    to_vectors = 16 * 8 + 8
    wanted = PAPERS_PARAMETERS - to_moments + to_vectors + codebook
    assert count_parameters(vae) == wanted


def test_nearest_is_the_nearest():
    """Catches a forgotten |code|^2, so that the longest code wins; a sign; or a codebook
    transposed."""
    quantiser = Quantiser(50, 3)
    vectors = torch.randn(400, 3)
    lengths = torch.linspace(0.1, 3, 50)                # short codes and long ones
    quantiser.codebook.data *= lengths[:, None]

    differences = vectors[:, None] - quantiser.codebook[None]           # (400, 50, 3)
    wanted = differences.square().sum(2).argmin(1)                      # (400,)

    assert torch.equal(quantiser.nearest(vectors), wanted)
    assert len(wanted.unique()) > 20                    # it was no easy question


def test_straight_through():
    """Catches a gradient that stops at the quantiser, or passes it changed: d out / d e must be the
    identity, though out is made of codes alone."""
    quantiser = Quantiser(10, 4).eval()
    e = torch.randn(2, 4, 3, 5, requires_grad=True)                     # (M, z, h, w)
    out, codes, _ = quantiser(e)

    # Forward: codes alone.
    vectors = quantiser.codebook[codes]                                 # (M, h, w, z)
    assert torch.allclose(out, vectors.permute(0, 3, 1, 2), atol=1e-6)
    assert not torch.allclose(out, e, atol=0.1)

    # Backward: as if out were e. And the codebook learns nothing by this way.
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    assert torch.equal(e.grad, weight)
    assert quantiser.codebook.grad is None


def test_codebook_loss_by_hand():
    """Catches beta on the codebook's term, a lost stop-gradient, and sums for means. It is eq. 3 of
    van den Oord et al., with beta = 0.25."""
    quantiser = Quantiser(2, 2).eval()
    quantiser.codebook.data = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    places = torch.tensor([[0.1, 0.3], [0.7, 1.0]])     # two places, two numbers each
    e = places.T.reshape(1, 2, 1, 2).clone().requires_grad_()           # (M, z, h, w)

    _, codes, loss = quantiser(e)
    loss.backward()

    assert codes.flatten().tolist() == [0, 1]
    chosen = quantiser.codebook.detach()[codes.flatten()]
    mean_square = (places - chosen).square().mean().item()
    assert loss.item() == pytest.approx((1 + 0.25) * mean_square)

    # The derivative of a mean of four squares. The first term moves the codes, the second the
    # encoder.
    of_codes = 2 * (chosen - places) / 4
    of_places = 0.25 * 2 * (places - chosen) / 4
    assert torch.allclose(quantiser.codebook.grad, of_codes)
    assert torch.allclose(e.grad[0, :, 0].T, of_places)


def test_all_codes(vq, monkeypatch):
    """Catches a last batch lost, an order changed, and gradients that are kept for a whole data
    set."""
    pixels = random_pixels((20, 128, 128, 3))
    sizes = []                                          # of the batches

    def watched_to_float(batch):
        sizes.append(len(batch))
        return to_float(batch)

    with monkeypatch.context() as patch:
        patch.setattr(vae_module, "to_float", watched_to_float)
        codes = encode_all_codes(vq, pixels, progress=False)

    assert sizes == [4] * 5                             # as many as fit into a CPU's caches
    assert codes.shape == (20, 32, 32)
    assert not codes.requires_grad
    last = vq.encode_codes(to_float(pixels[17:]))
    assert torch.equal(codes[17:], last)


@torch.no_grad()
def test_codes_there_and_back(vq):
    """Catches rows taken for columns, and a sampler that decodes something else than what was
    trained."""
    x = torch.rand(3, 3, 16, 24) * 2 - 1                # not square
    codes = vq.encode_codes(x)
    assert codes.shape == (3, 4, 6)
    assert codes.dtype == torch.int64
    assert len(codes.unique()) > 5

    in_training = vq(x)[0].clamp(-1, 1)
    decoded = vq.decode_codes(codes)
    assert torch.allclose(decoded, in_training, atol=1e-5)
    assert torch.equal(decoded, vq.reconstruct(x))

    # Codes that are moved by one column are another picture.
    moved = vq.decode_codes(codes.roll(1, 2))
    assert not torch.allclose(moved, in_training, atol=1e-3)


def test_idle_codes_move_to_where_the_encoder_speaks():
    """Catches codes that stay dead, live codes that are moved, and a codebook that changes while
    evaluating."""
    quantiser = Quantiser(20, 3)
    e = torch.randn(2, 3, 4, 4)                                         # (M, z, h, w)
    places = e.permute(0, 2, 3, 1).reshape(-1, 3)                       # (M*h*w, z)
    before = quantiser.codebook.detach().clone()

    # 1. Evaluating changes nothing, though all codes begin as idle.
    quantiser.eval()(e)
    assert torch.equal(quantiser.codebook, before)
    assert quantiser.idle.eq(IDLE).all()
    assert not quantiser.uses.any()

    # 2. In training, two idle codes move, each to one of the encoder's vectors.
    quantiser.train()
    quantiser.idle[:] = 0
    quantiser.idle[[3, 7]] = IDLE
    _, codes, _ = quantiser(e, torch.Generator().manual_seed(0))
    moved = (quantiser.codebook != before).any(1)
    assert moved.nonzero().flatten().tolist() == [3, 7]
    for k in (3, 7):
        is_here = (places == quantiser.codebook[k]).all(1)
        assert is_here.any()

    # 3. The counts are those of the codes that were chosen.
    wanted = torch.bincount(codes.flatten(), minlength=20)
    assert torch.equal(quantiser.uses, wanted)
    assert torch.equal(quantiser.idle == 0, quantiser.uses > 0)
    assert quantiser.idle.max() == 1


def test_codebook_use_by_hand():
    """Catches an entropy in bits, a share of the used codes only, and NaN where nothing was
    counted."""
    # Four of six codes, equally often.
    use = codebook_use(torch.tensor([5, 5, 0, 0, 5, 5]))
    assert use == pytest.approx((4 / 6, 4.0))

    share, perplexity = codebook_use(torch.tensor([3, 1]))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert share == 1
    assert perplexity == pytest.approx(np.exp(entropy))

    share, _ = codebook_use(torch.zeros(4, dtype=torch.long))
    assert share == 0


@torch.no_grad()
def test_one_is_not_the_other(vq):
    """Catches a VQ-VAE whose codes are used as a VAE's mean, and numbers that are no codes. (torch
    would take -1 for the last code.)"""
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="encode_codes"):
        vq.encode(x)
    with pytest.raises(ValueError, match="without codes"):
        VAE(TINY).encode_codes(x)

    too_large = torch.full((1, 2, 2), 40)
    negative = torch.full((1, 2, 2), -1)
    no_picture = torch.zeros(4, dtype=torch.long)
    for wrong in (too_large, negative, no_picture):
        with pytest.raises(ValueError, match="between 0 and 39"):
            vq.decode_codes(wrong)


@pytest.mark.parametrize("codes", [1, -5])
def test_too_few_codes(codes):
    """Catches a codebook that says nothing."""
    with pytest.raises(UserError, match="at least 2"):
        VAEConfig(codes=codes)


def test_a_vqvae_has_a_kind_of_its_own(tmp_path, vq):
    """Catches a VQ-VAE that is given to train.py as its VAE: the sentence names both. Catches a
    codebook that is not saved, too."""
    path = tmp_path / "vae.pt"
    save(path, pack_vae(vq))
    with pytest.raises(UserError, match="'vqvae'.*'vae'"):
        load(path, "vae")

    again = unpack_vae(load(path, "vqvae"))
    x = torch.rand(2, 3, 16, 16)
    assert again.config == vq.config
    assert torch.equal(again.encode_codes(x), vq.encode_codes(x))


# -------------------------------------------------------------------------------------- checkpoints
def test_pack_and_unpack(tmp_path, trained):
    """Catches a checkpoint without the scale of its latents, one that returns in training mode, and
    files left beside it."""
    folder = tmp_path / "new/folder"                    # made by save
    save(folder / "vae.pt", pack_vae(trained))
    again = unpack_vae(load(folder / "vae.pt", "vae"))
    assert again.config == trained.config
    assert not again.training
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert os.listdir(folder) == ["vae.pt"]


def half_written(content, file, *rest):
    """What torch.save does when the disk fills up."""
    file.write(b"half of a checkpoint")
    raise OSError("no space left on device")


def test_save_is_atomic(tmp_path, monkeypatch):
    """Catches a crash while saving that destroys the last good checkpoint."""
    path = tmp_path / "last.pt"
    save(path, {"kind": "training", "step": 1})

    # The disk fills up: the file is the one before.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_written)
        with pytest.raises((OSError, UserError)):
            save(path, {"kind": "training", "step": 2})
    assert load(path, "training")["step"] == 1

    # There is room again: the new one takes its place, and nothing is left of the half one.
    save(path, {"kind": "training", "step": 3})
    assert load(path, "training")["step"] == 3
    assert os.listdir(tmp_path) == ["last.pt"]


class Malice:
    """Unpickled without weights_only, this makes a folder; it could as well delete one."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", [
    "truncated",
    "text",
    "empty",
    "missing",
    "folder",
    "other kind",
    "no dict",
    "pickle",
])
def test_files_that_are_no_checkpoint(tmp_path, content):
    """Catches a traceback, or worse, an executed pickle, where the user named the wrong file. The
    sentence must name the file."""
    path = tmp_path / "vae.pt"
    save(path, pack_vae(VAE(VAEConfig(channels=4, multipliers=(1,), z=1))))
    whole = path.read_bytes()
    path.unlink()

    if content == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "text":
        path.write_bytes(b"not a checkpoint\n")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "folder":
        path.mkdir()
    elif content == "other kind":
        torch.save({"kind": "model"}, path)
    elif content == "no dict":
        torch.save([1, 2], path)
    elif content == "pickle":
        torch.save({"kind": "vae", "x": Malice(tmp_path / "bad")}, path)

    with pytest.raises(UserError, match="vae.pt"):
        load(path, "vae")
    assert not (tmp_path / "bad").exists()


def test_the_wrong_kind_is_named(tmp_path):
    """Catches model.pt given for vae.pt, if the sentence does not say what it is and what is
    needed."""
    save(tmp_path / "model.pt", {"kind": "model"})
    with pytest.raises(UserError, match="'model'.*'vae'"):
        load(tmp_path / "model.pt", "vae")


# ----------------------------------------------------------------------------------------- pictures
def test_grid():
    """Catches pictures out of order, overlapping, or cut at the right edge. Grey ones must work,
    too."""
    levels = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1)
    pictures = levels * np.ones((5, 4, 6, 1), np.uint8)                 # picture k is all k + 1
    sheet = figures.grid(pictures, columns=3, gap=2)

    # Two rows of three, with gaps around them.
    assert sheet.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    for k in range(5):
        top = 2 + (k // 3) * 6
        left = 2 + (k % 3) * 8
        assert (sheet[top: top + 4, left: left + 6] == k + 1).all()

    # The sixth place is empty: background.
    assert (sheet[-6:, -8:] == 96).all()


@pytest.mark.parametrize("channels", range(4, 132, 4))
@torch.no_grad()
def test_every_width_that_train_takes(channels):
    """Catches groups that do not divide the channels: --vae-channels 36 has 144 of them in its last
    stage, and 32 groups ended in torch's words. Where 32 divide, as in the paper's VAE, they stay.
    """
    for multiplier in (1, 2, 4):
        width = channels * multiplier
        layer = vae_module.norm(width)
        assert width % layer.num_groups == 0
        assert width // layer.num_groups >= 4
        largest = min(32, width // 4)
        if width % largest == 0:
            assert layer.num_groups == largest
    if channels in (36, 44, 68):
        vae = VAE(VAEConfig(channels=channels, z=2)).eval()
        assert vae.reconstruct(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 8, 8)


@torch.no_grad()
def test_no_pictures():
    """Catches a crash, or a KL of NaN, where there is nothing to encode: documents of words alone.
    The shapes say what pictures would have had."""
    x = torch.zeros(0, 3, 32, 32)
    pixels = np.zeros((0, 32, 32, 3), dtype=np.uint8)
    vae = VAE(TINY)
    mean, deviation = encode_all(vae, pixels)
    assert mean.shape == deviation.shape == (0, 4, 8, 8)
    drawn, kl = vae(x)
    assert drawn.shape == x.shape
    assert kl == 0

    vq = VAE(VAEConfig(channels=8, multipliers=(1, 2, 2), codes=16))
    assert encode_all_codes(vq, pixels).shape == (0, 8, 8)
