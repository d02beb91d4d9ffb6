"""
test_vae_losses.py: who judges a reconstruction, and how             (autoencoder/losses.py,
                          autoencoder/perceptual.py; Transfusion App. C; docs/PAPER.md §4.11)

THE IDEA    Distances must be distances, and losses must equal arithmetic done by hand. We have no
            published weights, so files are written here that have their names and shapes, but
            random numbers. Our ResNet-50 is compared with the reference library's. The
            discriminator must count from its step on, and not before.
TRY IT      pytest -n 0 tests/test_vae_losses.py
"""
import math
import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, cosine_similarity, max_pool2d

from autoencoder import losses
from autoencoder.losses import PatchGAN, VAELoss, adaptive_weight, appendix_c, hinge
from autoencoder.perceptual import (
    VGG16,
    FeatureDistance,
    ResNet50,
    SmallNet,
    cosine_weights,
    for_imagenet,
    load_lpips,
    load_moco,
    load_tensors,
    stand_ins,
    train_small_net,
)
from support.common import UserError

# The convolutions among the layers of torchvision's vgg16.features, and their output channels.
VGG_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


# ---------------------------------------------------------------------- files as they are published
def published_vgg():
    """A state dict like torchvision's vgg16, with random numbers. It is written from the published
    plan of the network and not from our class."""
    found = {}
    c = 3
    for layer, width in zip(VGG_LAYERS, VGG_WIDTHS):
        scale = (2 / (9 * c)) ** 0.5                    # so that activations keep their size
        found[f"features.{layer}.weight"] = torch.randn(width, c, 3, 3) * scale
        found[f"features.{layer}.bias"] = torch.randn(width) * 0.1
        c = width
    found["classifier.0.weight"] = torch.zeros(1)       # is in the file, and must be left out
    found["classifier.0.bias"] = torch.zeros(1)
    return found


def published_lins():
    """A state dict like LPIPS' weights/v0.1/vgg.pth: non-negative."""
    found = {}
    for k, width in enumerate((64, 128, 256, 512, 512)):
        found[f"lin{k}.model.1.weight"] = torch.rand(1, width, 1, 1)
    return found


def published_moco():
    """A checkpoint like MoCo v2's: ResNet-50 with a projection head, trained under
    DistributedDataParallel."""
    found = {}

    def put(name, out, c, kernel, norm):
        scale = (2 / (c * kernel ** 2)) ** 0.5
        found[f"{name}.weight"] = torch.randn(out, c, kernel, kernel) * scale
        found[f"{norm}.weight"] = 0.5 + torch.rand(out)
        found[f"{norm}.bias"] = torch.randn(out) * 0.1
        found[f"{norm}.running_mean"] = torch.randn(out) * 0.1
        found[f"{norm}.running_var"] = 0.5 + torch.rand(out)
        found[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    put("conv1", 64, 3, 7, "bn1")
    c = 64
    stages = ((64, 3), (128, 4), (256, 6), (512, 3))    # (width, blocks)
    for stage, (width, blocks) in enumerate(stages, 1):
        for k in range(blocks):
            block = f"layer{stage}.{k}."
            put(block + "conv1", width, c, 1, block + "bn1")
            put(block + "conv2", width, width, 3, block + "bn2")
            put(block + "conv3", 4 * width, width, 1, block + "bn3")
            if k == 0:
                put(block + "downsample.0", 4 * width, c, 1, block + "downsample.1")
            c = 4 * width
    # torchvision's resnet50 has 320 entries, two of them of its classifier.
    assert len(found) == 318
    found["fc.0.weight"] = torch.zeros(2048, 2048)      # the projection head
    found["fc.2.weight"] = torch.zeros(128, 2048)

    state = {"module.encoder_q." + name: value for name, value in found.items()}
    state["module.queue"] = torch.zeros(128, 4)
    state["module.encoder_k.conv1.weight"] = torch.zeros(64, 3, 7, 7)
    return {"epoch": 800, "arch": "resnet50", "state_dict": state}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with vgg16.pth, vgg.pth and moco.pth.tar in their published formats, with random
    numbers in them."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(published_vgg(), folder / "vgg16.pth")
        torch.save(published_lins(), folder / "vgg.pth")
        torch.save(published_moco(), folder / "moco.pth.tar")
    return folder


@pytest.fixture(scope="module")
def lpips(files):
    """LPIPS of the two files that it needs."""
    return load_lpips(f"{files}/vgg16.pth,{files}/vgg.pth")


@pytest.fixture
def vae_loss():
    """App. C's loss for pictures of 16 x 16: an untrained small network, and a small discriminator
    that comes in at step 10."""
    return VAELoss(*stand_ins(SmallNet(5)), PatchGAN(width=8, layers=2), gan_start=10)


def pictures(*shape):
    """Random pictures in [-1, 1]."""
    return torch.rand(*shape) * 2 - 1


# -------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize("make, parameters", [
    (PatchGAN, 2_765_633),
    (VGG16, 14_714_688),
    (ResNet50, 23_508_032),
    (lambda: SmallNet(5), 448 + 4_640 + 18_496 + 36_928 + 325),        # its five layers
])
def test_parameter_counts(make, parameters):
    """The published sizes, without classifiers. Catches a layer, a bias or a norm too many or too
    few."""
    with torch.device("meta"):
        network = make()
    assert sum(weight.numel() for weight in network.parameters()) == parameters


def test_patchgan_answers_for_patches():
    """Isola et al.: 256 x 256 pixels get 30 x 30 answers, and each answer sees 70 x 70 pixels.
    Catches a stride, or a number of layers, that is off."""
    with torch.device("meta"):
        assert PatchGAN()(torch.empty(1, 3, 256, 256)).shape == (1, 1, 30, 30)

    for weight in PatchGAN().parameters():              # Isola et al.: normal, 0.02
        assert weight.ndim != 4 or weight.std().item() == pytest.approx(0.02, rel=0.05)

    # Which pixels have a gradient from one answer? In training mode all would: BatchNorm's.
    critic = PatchGAN().eval()
    x = pictures(1, 3, 128, 128).requires_grad_()
    critic(x)[0, 0, 7, 7].backward()
    seen = x.grad.abs().sum(1)[0].nonzero()             # (pixels, 2): row and column
    sides = seen.max(0).values - seen.min(0).values + 1
    assert sides.tolist() == [70, 70]


# ---------------------------------------------------------------------------------------- distances
@torch.no_grad()
def test_lpips_is_a_distance(lpips):
    """Catches a picture that is far from itself, a distance that depends on the order, and one that
    sees nothing."""
    x = pictures(2, 3, 32, 32)
    y = pictures(2, 3, 32, 32)
    assert lpips(x, x).tolist() == [0, 0]
    assert torch.allclose(lpips(x, y), lpips(y, x), rtol=1e-4)
    assert (lpips(x, y) > 0.01).all()
    nearer = x + 0.1 * (y - x)
    assert (lpips(x, nearer) < lpips(x, y)).all()


@torch.no_grad()
def test_lpips_by_hand(lpips, files):
    """Zhang et al. eq. 1, written out. Catches features taken before the ReLU or after the pooling,
    or not of unit length. Catches squared weights, sums over places, and a wrong order of the
    files."""
    x = pictures(2, 3, 32, 32)
    y = pictures(2, 3, 32, 32)
    vgg = torch.load(files / "vgg16.pth")
    lins = torch.load(files / "vgg.pth")
    mean = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]        # LPIPS' own normalisation
    std = torch.tensor([0.458, 0.448, 0.450])[:, None, None]

    def maps(z):
        z = (z - mean) / std
        kept = []
        for layer in VGG_LAYERS:
            if layer in (5, 10, 17, 24):                # the first convolution after a pooling
                kept.append(z)
                z = max_pool2d(z, 2)
            weight = vgg[f"features.{layer}.weight"]
            bias = vgg[f"features.{layer}.bias"]
            z = conv2d(z, weight, bias, padding=1).relu()
        return [*kept, z]

    def unit(features):                                                 # (M, c, h, w)
        return features / features.square().sum(1, keepdim=True).sqrt()

    wanted = torch.zeros(2)
    for k, (a, b) in enumerate(zip(maps(x), maps(y))):
        weighted = (unit(a) - unit(b)) ** 2 * lins[f"lin{k}.model.1.weight"]
        wanted += weighted.sum(1).mean((1, 2))                          # (M,)
    assert torch.allclose(lpips(x, y), wanted, rtol=1e-3)

    other_order = load_lpips(f"{files}/vgg.pth, {files}/vgg16.pth")
    assert torch.equal(other_order(x, y), lpips(x, y))


class Features(nn.Module):
    """A network with two maps: its input, and features that never fire. It has no ReLU, which would
    hide a NaN gradient."""

    def forward(self, x):
        return [x, 0 * x]


@torch.no_grad()
def test_cosine_weights_give_one_minus_cosine():
    """Our ID: the mean of 1 - cosine. Catches a factor 2, and a map that counts though it should
    not."""
    x = pictures(3, 3, 8, 8)
    y = pictures(3, 3, 8, 8)
    cosine = cosine_similarity(for_imagenet(x), for_imagenet(y))        # (M, h, w)
    wanted = (1 - cosine).mean((1, 2))                                  # (M,)

    one_map = FeatureDistance(Features(), cosine_weights((3, None)))
    assert torch.allclose(one_map(x, y), wanted, atol=1e-6)
    two_maps = FeatureDistance(Features(), cosine_weights((3, 3)))      # the second: no distance
    assert torch.allclose(two_maps(x, y), wanted / 2, atol=1e-6)


def test_a_distances_weights_are_its_own():
    """Catches a distance that changes with the tensor that it was made from."""
    given = torch.ones(3)
    distance = FeatureDistance(Features(), [given, None])
    x = pictures(1, 3, 8, 8)
    y = pictures(1, 3, 8, 8)
    before = distance(x, y)
    given.zero_()
    assert torch.equal(distance(x, y), before)
    assert before > 0


def test_features_that_never_fire_have_a_gradient():
    """TRAP: d sqrt(s) at s = 0 is infinite. Catches a NaN gradient where all features of a place
    are 0."""
    distance = FeatureDistance(Features(), cosine_weights((3, 3)))
    y = pictures(2, 3, 8, 8).requires_grad_()
    distance(pictures(2, 3, 8, 8), y).sum().backward()
    assert y.grad.isfinite().all()
    assert y.grad.abs().max() > 0


@torch.no_grad()
def test_grey_is_a_colour_and_shapes_must_agree(lpips):
    """Catches grey MNIST pictures that make it fail, and a batch of one that is compared with all
    by broadcasting."""
    x = pictures(2, 1, 32, 32)
    y = pictures(2, 1, 32, 32)
    x_in_colour = x.expand(-1, 3, -1, -1)
    y_in_colour = y.expand(-1, 3, -1, -1)
    assert torch.allclose(lpips(x, y), lpips(x_in_colour, y_in_colour))

    white = for_imagenet(torch.ones(1, 1, 1, 1)).flatten().tolist()
    statistics = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))       # ImageNet's mean and std
    assert white == pytest.approx([(1 - mean) / std for mean, std in statistics], rel=2e-3)

    for wrong in (x[:1], x.expand(-1, 2, -1, -1), x[0]):
        with pytest.raises(ValueError, match="one shape"):
            lpips(x, wrong)


def test_judges_do_not_learn(files):
    """Catches a BatchNorm that follows the drawn pictures, and perceptual weights that an optimizer
    could reach."""
    identity = load_moco(files / "moco.pth.tar")
    before = {name: value.clone() for name, value in identity.state_dict().items()}
    y = pictures(2, 3, 32, 32).requires_grad_()
    training = VAELoss(identity=identity).train()
    training.identity(pictures(2, 3, 32, 32), y).sum().backward()

    for name, value in identity.state_dict().items():
        assert torch.equal(value, before[name])
    assert y.grad.abs().max() > 0                       # but the VAE learns from them
    assert not any(weight.requires_grad for weight in identity.parameters())


RENAMED = {                                             # transformers' names: torchvision's
    "shortcut.convolution": "downsample.0",
    "shortcut.normalization": "downsample.1",
    "layer.0.convolution": "conv1",
    "layer.0.normalization": "bn1",
    "layer.1.convolution": "conv2",
    "layer.1.normalization": "bn2",
    "layer.2.convolution": "conv3",
    "layer.2.normalization": "bn3",
    "embedder.embedder.convolution": "conv1",           # before the first stage
    "embedder.embedder.normalization": "bn1",
}


def name_in_torchvision(name):
    """"layer2.0.conv1.weight" of "encoder.stages.1.layers.0.layer.0.convolution.weight"."""
    prefix = ""
    if not name.startswith("embedder."):
        _, _, stage, _, block, name = name.split(".", 5)
        prefix = f"layer{int(stage) + 1}.{block}."
    inner, leaf = name.rsplit(".", 1)
    return f"{prefix}{RENAMED[inner]}.{leaf}"


def test_resnet_is_the_references():
    """Every stage of our ResNet-50 equals transformers'. Catches a stride on the wrong convolution,
    and a missing shortcut."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers, the reference, is not installed")
    theirs = transformers.ResNetModel(transformers.ResNetConfig()).eval()
    ours = ResNet50().eval()

    same_weights = {}                                   # under their names, and under ours
    found = {}
    for name, value in theirs.state_dict().items():
        if value.ndim == 1:                             # norms, as if they had been trained
            value = torch.rand_like(value) + 0.5
        same_weights[name] = value
        found[name_in_torchvision(name)] = value
    theirs.load_state_dict(same_weights)
    load_tensors(ours, found, "transformers", "ResNet-50")

    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        stages = theirs(x, output_hidden_states=True).hidden_states[1:]
        for mine, their in zip(ours(x), stages, strict=True):
            assert torch.allclose(mine, their, rtol=1e-3, atol=1e-4 * their.abs().max())


# -------------------------------------------------------------------------------- published weights
@torch.no_grad()
def test_moco_in_its_published_format(files):
    """Catches a prefix that is not taken off, the key encoder taken for the query's, and running
    statistics that are not loaded."""
    identity = load_moco(files / "moco.pth.tar")
    state = torch.load(files / "moco.pth.tar")["state_dict"]
    for name, value in identity.net.state_dict().items():
        assert torch.equal(value, state["module.encoder_q." + name]), name

    x = pictures(2, 3, 64, 64)
    y = pictures(2, 3, 64, 64)
    wanted = 0
    for a, b in zip(identity.net(for_imagenet(x)), identity.net(for_imagenet(y))):
        wanted += 1 - cosine_similarity(a, b).mean((1, 2))              # (M,), of one stage
    assert torch.allclose(identity(x, y), wanted / 4, rtol=1e-3)
    assert identity(x, x).tolist() == [0, 0]


@pytest.mark.parametrize("which, words", [
    ("absent.pth,vgg.pth", ["no weights file", "absent.pth"]),
    ("text.pth,vgg.pth", ["text.pth", "not a file of torch weights"]),
    ("list.pth", ["list.pth", "dict"]),
    ("vgg16.pth", ["vgg.pth", "lin0.model.1.weight", "none"]),          # half of what LPIPS needs
    ("vgg.pth", ["features.0.weight", "VGG16"]),
    ("moco.pth.tar", ["features.0.weight", "VGG16"]),
    ("narrow.pth,vgg.pth", ["features.0.weight", "(32, 3, 3, 3)", "(64, 3, 3, 3)"]),
    ("vgg16.pth,alex.pth", ["lin1.model.1.weight", "(1, 192, 1, 1)", "(1, 128, 1, 1)"]),
])
def test_wrong_lpips_files(files, which, words):
    """Catches a traceback, and a distance by half a network. The sentence names file, tensor and
    shapes."""
    (files / "text.pth").write_text("not weights\n")
    torch.save([1, 2], files / "list.pth")
    torch.save({"features.0.weight": torch.zeros(32, 3, 3, 3)}, files / "narrow.pth")
    alex = {}                                           # LPIPS' weights for AlexNet
    for k, width in enumerate((64, 192, 384, 256, 256)):
        alex[f"lin{k}.model.1.weight"] = torch.zeros(1, width, 1, 1)
    torch.save(alex, files / "alex.pth")

    paths = [str(files / name) for name in which.split(",")]
    with pytest.raises(UserError) as mistake:
        load_lpips(",".join(paths))
    for word in words:
        assert word in str(mistake.value)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "folder"])
def test_weights_that_are_no_file(tmp_path, what):
    """Catches a command that waits for ever for a pipe that says nothing."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="not a file"):
        load_moco(tmp_path / what)


V3 = {"module.base_encoder.conv1.weight": torch.zeros(1)}               # MoCo v3's name
NARROW = {"module.encoder_q.conv1.weight": torch.zeros(64, 3, 3, 3)}    # another network's shape
FIRST = {"module.encoder_q.conv1.weight": torch.zeros(64, 3, 7, 7)}     # and nothing after it


@pytest.mark.parametrize("content, words", [
    (None, ["no weights file"]),
    ({"features.0.weight": torch.zeros(1)}, ["MoCo v2", "module.encoder_q."]),
    ({"state_dict": V3}, ["MoCo v2", "module.encoder_q."]),
    ({"state_dict": NARROW}, ["conv1.weight", "(64, 3, 7, 7)"]),
    ({"state_dict": FIRST}, ["bn1.weight", "ResNet-50"]),
])
def test_wrong_moco_files(tmp_path, content, words):
    """Catches another version's checkpoint, or another network's, taken for MoCo v2's ResNet-50."""
    if content:
        torch.save(content, tmp_path / "moco.pth")
    with pytest.raises(UserError) as mistake:
        load_moco(tmp_path / "moco.pth")
    for word in [*words, "moco.pth"]:
        assert word in str(mistake.value)


# ------------------------------------------------------------------------------------ the adversary
def test_hinge_by_hand():
    """Catches real and drawn exchanged, a lost half, and answers beyond the margin that still
    count."""
    real = torch.tensor([2.0, 0.5])                     # beyond the margin 1, and 0.5 short of it
    drawn = torch.tensor([-3.0, 0.25])                  # beyond, and 1.25 short
    assert hinge(real, drawn).item() == 0.5 * (0 + 0.5) / 2 + 0.5 * (0 + 1.25) / 2
    assert hinge(torch.tensor([1.0]), torch.tensor([-1.0])) == 0
    assert hinge(torch.tensor([0.0]), torch.tensor([0.0])) == 1


def test_adaptive_weight_by_hand():
    """Esser et al. eq. 7. Catches the ratio upside down, squared norms, a missing bound, and a
    weight with a gradient."""
    last = nn.Parameter(torch.zeros(2, 2))
    reconstruction = 3 * last.sum()                     # its gradient: four times 3, of norm 6
    gan = (last * torch.tensor([[0.3, 0.4], [0.0, 0.0]])).sum()         # of norm 0.5
    weight = adaptive_weight(reconstruction, gan, last)
    assert weight.item() == pytest.approx(6 / (0.5 + 1e-4))
    assert not weight.requires_grad

    assert adaptive_weight(3 * last.sum(), 0 * last.sum(), last).item() == 1e4
    assert adaptive_weight(0 * last.sum(), last.sum(), last) == 0


def test_appendix_c_by_hand():
    """App. C's weights, read off the function's gradient. Catches a weight that is another, and the
    VQ-VAE's codebook loss at 1e-6."""
    terms = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0], requires_grad=True)
    loss = appendix_c(*terms)
    loss.backward()
    assert terms.grad.tolist() == pytest.approx([1, 1, 0.5, 0.2, 1e-6])
    assert loss.item() == pytest.approx(2 + 3 + 2.5 + 1.4 + 11e-6)
    assert appendix_c(2, 3, 5, 7, 11, kl_weight=1.0) == pytest.approx(2 + 3 + 2.5 + 1.4 + 11)


def reconstruct():
    """(last layer of a decoder, pictures, their reconstructions): random, (4, 3, 16, 16) each."""
    last = nn.Conv2d(4, 3, 3, padding=1)
    x = pictures(4, 3, 16, 16)
    x_hat = last(torch.randn(4, 4, 16, 16))
    return last, x, x_hat


def test_the_gan_pulls_as_hard_as_its_weight_says(vae_loss):
    """App. C. With its weight 0.5, the GAN's gradient at the last layer is half as long as that of
    L1 + LPIPS + 0.2 ID."""
    last, x, x_hat = reconstruct()
    reconstruction, _ = vae_loss(x, x_hat, 0, 0, last.weight, step=9)   # before the GAN comes in
    both, terms = vae_loss(x, x_hat, 0, 0, last.weight, step=10)

    pull, = torch.autograd.grad(reconstruction, last.weight, retain_graph=True)
    all_of_it, = torch.autograd.grad(both, last.weight, retain_graph=True)
    push = all_of_it - pull
    assert push.norm().item() == pytest.approx(0.5 * pull.norm().item(), rel=0.02)

    wanted = reconstruction + 0.5 * terms["weight"] * terms["GAN"]
    assert both.item() == pytest.approx(wanted.item(), rel=1e-5)
    answer = vae_loss.discriminator(x_hat).mean()
    assert terms["GAN"].item() == pytest.approx(-answer.item(), rel=1e-5)


def test_before_its_step_the_discriminator_is_silent(vae_loss):
    """App. C, GAN from step 50,000 on. Catches a term that counts early, be it faintly, and one
    that is off by a step."""
    last, x, x_hat = reconstruct()

    def asked(*_):
        pytest.fail("asked before its step")

    vae_loss.discriminator.register_forward_hook(asked)
    loss, terms = vae_loss(x, x_hat, 0, 0, last.weight, step=9)
    assert "GAN" not in terms
    l1 = (x - x_hat).abs().mean()
    wanted = l1 + vae_loss.lpips(x, x_hat).mean() + 0.2 * vae_loss.identity(x, x_hat).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)

    assert not vae_loss.gan_is_on(9)
    assert vae_loss.gan_is_on(10)
    assert VAELoss().gan_start == 50_000


@pytest.mark.parametrize("position", range(5), ids=["L1", "LPIPS", "GAN", "ID", "KL"])
def test_every_term_counts(vae_loss, monkeypatch, position):
    """Catches a term that is computed, logged, and never added: without it the gradient must be
    another."""
    last = nn.Conv2d(4, 3, 3, padding=1)
    x = pictures(4, 3, 16, 16)
    features = torch.randn(4, 4, 16, 16)
    gradients = []
    for share in (1.0, 0.0):                            # with the term, and without it

        def partly(*terms, share=share):
            terms = list(terms)
            terms[position] = share * terms[position]
            return appendix_c(*terms)

        monkeypatch.setattr(losses, "appendix_c", partly)
        kl = last.weight.square().sum()                 # any function of the weights does
        loss, _ = vae_loss(x, last(features), kl, 1.0, last.weight, step=10)
        gradients.append(torch.autograd.grad(loss, last.weight)[0])

    with_it, without = gradients
    assert (with_it - without).norm() > 1e-3 * with_it.norm()


def test_the_discriminators_loss_is_its_own(vae_loss):
    """TRAP: reconstructions that are not detached. Catches a discriminator step that also trains
    the VAE to please it."""
    drawn = pictures(4, 3, 16, 16).requires_grad_()
    loss = vae_loss.discriminator_loss(pictures(4, 3, 16, 16), drawn)
    loss.backward()
    assert drawn.grad is None
    for weight in vae_loss.discriminator.parameters():
        if weight.ndim == 4:                            # the convolutions do learn
            assert weight.grad.abs().sum() > 0
    assert loss.item() == pytest.approx(1, abs=0.2)     # no opinion yet: hinge of answers near 0


def test_a_discriminator_learns_to_tell():
    """Catches a hinge whose sign is turned: the discriminator would learn to take the drawn for
    real."""
    critic = PatchGAN(width=8, layers=2)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=5e-3)
    vae_loss = VAELoss(discriminator=critic)
    x = pictures(8, 3, 16, 16)
    blurred = avg_pool2d(x, 3, 1, 1)
    for _ in range(15):
        optimizer.zero_grad()
        vae_loss.discriminator_loss(x, blurred).backward()
        optimizer.step()
    assert critic(x).mean() > critic(blurred).mean() + 0.5


def test_describe_says_what_is_on(vae_loss):
    """Catches a run that says it has a term which is off."""
    assert vae_loss.describe() == "L1 + LPIPS + 0.2 ID + 0.5 GAN from step 10"
    assert VAELoss().describe() == "L1"
    assert VAELoss(identity=vae_loss.identity).describe() == "L1 + 0.2 ID"


# -------------------------------------------------------------------------------- the toy's network
def test_the_small_network_learns_what_captions_say():
    """Catches a stand-in that sees nothing: two colours that it learned to name must be further
    apart than two pictures of one colour."""
    # 1. Ninety pictures of one colour each, lighter or darker.
    rng = np.random.default_rng(0)
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    names = [list(colours)[k] for k in rng.integers(3, size=90)]
    pixels = []
    for name in names:
        pixels.append(np.full((16, 16, 3), colours[name]) * rng.uniform(0.3, 1))
    pixels = np.stack(pixels).astype(np.uint8)
    captions = [f"a {name} thing" for name in names]

    # 2. It learns them, from random numbers of its own: the run's are not touched.
    kept = torch.get_rng_state()
    net, right = train_small_net(pixels, captions, steps=60, batch=16)
    assert right > 0.95
    assert torch.equal(torch.get_rng_state(), kept)
    again, _ = train_small_net(pixels, captions, steps=60, batch=16)
    for a, b in zip(net.parameters(), again.parameters()):
        assert torch.equal(a, b)

    # 3. What the distance makes of them.
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1        # (90, 3, 16, 16)
    _, identity = stand_ins(net)
    two_of_each = {}
    for colour in colours:
        two_of_each[colour] = [k for k in range(90) if names[k] == colour][:2]

    def distance(a, b):
        return identity(x[[a]], x[[b]]).item()

    same = [distance(a, b) for a, b in two_of_each.values()]
    other = []
    for one in colours:
        for two in colours:
            if one != two:
                other.append(distance(two_of_each[one][0], two_of_each[two][0]))
    assert min(other) > 5 * max(same)
    assert not math.isnan(max(same))
