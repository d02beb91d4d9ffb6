"""
test_vae_losses.py: who judges a reconstruction, and how   (autoencoder/losses.py, autoencoder/perceptual.py; Transfusion App. C; PAPER §4.11)

Distances that are distances; losses against arithmetic done by hand; published names and shapes of weights that we do not
have; a ResNet against the reference library's; a discriminator that counts from its step on, and not before.
"""
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

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

VGG_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)          # the convolutions among torchvision's vgg16.features
VGG_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def published_vgg():
    """A state dict like torchvision's vgg16, with random numbers, written from its published plan and not from our class."""
    found, c = {}, 3
    for layer, width in zip(VGG_LAYERS, VGG_WIDTHS):
        found[f"features.{layer}.weight"] = torch.randn(width, c, 3, 3) * (2 / (9 * c)) ** 0.5
        found[f"features.{layer}.bias"], c = torch.randn(width) * 0.1, width
    return found | {"classifier.0.weight": torch.zeros(1), "classifier.0.bias": torch.zeros(1)}


def published_lins():
    """A state dict like LPIPS' weights/v0.1/vgg.pth: non-negative."""
    return {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1) for k, width in enumerate((64, 128, 256, 512, 512))}


def published_moco():
    """A checkpoint like MoCo v2's: ResNet-50 with a projection head, trained under DistributedDataParallel."""
    found = {}

    def put(name, out, c, kernel, norm):
        found[name + ".weight"] = torch.randn(out, c, kernel, kernel) * (2 / (c * kernel ** 2)) ** 0.5
        found.update({f"{norm}.weight": 0.5 + torch.rand(out), f"{norm}.bias": torch.randn(out) * 0.1,
                      f"{norm}.running_mean": torch.randn(out) * 0.1, f"{norm}.running_var": 0.5 + torch.rand(out),
                      f"{norm}.num_batches_tracked": torch.tensor(7)})

    put("conv1", 64, 3, 7, "bn1")
    c = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for k in range(blocks):
            block = f"layer{stage}.{k}."
            put(block + "conv1", width, c, 1, block + "bn1")
            put(block + "conv2", width, width, 3, block + "bn2")
            put(block + "conv3", 4 * width, width, 1, block + "bn3")
            if k == 0:
                put(block + "downsample.0", 4 * width, c, 1, block + "downsample.1")
            c = 4 * width
    assert len(found) == 318                            # torchvision's resnet50 has 320 entries, two of them of its classifier
    head = {"fc.0.weight": torch.zeros(2048, 2048), "fc.2.weight": torch.zeros(128, 2048)}
    return {"epoch": 800, "arch": "resnet50", "state_dict": {
        **{"module.encoder_q." + name: value for name, value in (found | head).items()}, "module.queue": torch.zeros(128, 4),
        "module.encoder_k.conv1.weight": torch.zeros(64, 3, 7, 7)}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with vgg16.pth, vgg.pth and moco.pth.tar in their published formats, random numbers in them."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, content in (("vgg16.pth", published_vgg()), ("vgg.pth", published_lins()), ("moco.pth.tar", published_moco())):
            torch.save(content, folder / name)
    return folder


@pytest.fixture(scope="module")
def lpips(files):
    return load_lpips(f"{files}/vgg16.pth,{files}/vgg.pth")


@pytest.fixture
def vae_loss():
    """App. C's loss for pictures of 16 x 16: an untrained small network and a small critic that comes in at step 10."""
    return VAELoss(*stand_ins(SmallNet(5)), PatchGAN(width=8, layers=2), gan_start=10)


def pictures(*shape):
    """Random pictures in [-1, 1]."""
    return torch.rand(*shape) * 2 - 1


# ------------------------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize("make, parameters", [(PatchGAN, 2_765_633), (VGG16, 14_714_688), (ResNet50, 23_508_032),
                                              (lambda: SmallNet(5), 448 + 4_640 + 18_496 + 36_928 + 325)])
def test_parameter_counts(make, parameters):
    """The published sizes (without classifiers). Catches a layer, a bias or a norm too many or too few."""
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == parameters


def test_patchgan_answers_for_patches():
    """Isola et al.: 256 x 256 pixels get 30 x 30 answers, each from 70 x 70 pixels. Catches a stride or layer off."""
    with torch.device("meta"):
        assert PatchGAN()(torch.empty(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    for weight in PatchGAN().parameters():              # Isola et al.: normal, 0.02
        assert weight.ndim != 4 or weight.std().item() == pytest.approx(0.02, rel=0.05)
    critic, x = PatchGAN().eval(), pictures(1, 3, 128, 128).requires_grad_()
    critic(x)[0, 0, 7, 7].backward()                    # eval: in training mode BatchNorm lets everything see everything
    seen = x.grad.abs().sum(1)[0].nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


# --------------------------------------------------------------------------------------------------------------- distances
@torch.no_grad()
def test_lpips_is_a_distance(lpips):
    """Catches a distance of a picture from itself, one that depends on the order, and one that sees nothing."""
    x, y = pictures(2, 3, 32, 32), pictures(2, 3, 32, 32)
    assert lpips(x, x).tolist() == [0, 0]
    assert torch.allclose(lpips(x, y), lpips(y, x), rtol=1e-4) and (lpips(x, y) > 0.01).all()
    nearer = x + 0.1 * (y - x)
    assert (lpips(x, nearer) < lpips(x, y)).all()


@torch.no_grad()
def test_lpips_by_hand(lpips, files):
    """Zhang et al. eq. 1, written out: catches features taken before the ReLU or after the pooling, or not of unit length;
    squares of the weights; sums over places; a wrong order of the files."""
    x, y = pictures(2, 3, 32, 32), pictures(2, 3, 32, 32)
    found, lins = torch.load(files / "vgg16.pth"), torch.load(files / "vgg.pth")

    def maps(z):
        z = (z - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        kept = []
        for layer in VGG_LAYERS:
            if layer in (5, 10, 17, 24):
                kept.append(z)
                z = nn.functional.max_pool2d(z, 2)
            z = nn.functional.conv2d(z, found[f"features.{layer}.weight"], found[f"features.{layer}.bias"], padding=1).relu()
        return [*kept, z]

    wanted = torch.zeros(2)
    for k, (a, b) in enumerate(zip(maps(x), maps(y))):
        a, b = (m / m.square().sum(1, keepdim=True).sqrt() for m in (a, b))
        wanted += ((a - b) ** 2 * lins[f"lin{k}.model.1.weight"]).sum(1).mean((1, 2))
    assert torch.allclose(lpips(x, y), wanted, rtol=1e-3)
    assert torch.equal(load_lpips(f"{files}/vgg.pth, {files}/vgg16.pth")(x, y), lpips(x, y))


class Features(nn.Module):
    """A network whose two maps are its input, and features that never fire (no ReLU, which would hide a NaN gradient)."""

    def forward(self, x):
        return [x, 0 * x]


@torch.no_grad()
def test_cosine_weights_give_one_minus_cosine():
    """Our ID: the mean of 1 - cosine. Catches a factor 2, and a map that counts though it should not."""
    x, y = pictures(3, 3, 8, 8), pictures(3, 3, 8, 8)
    wanted = (1 - nn.functional.cosine_similarity(for_imagenet(x), for_imagenet(y))).mean((1, 2))
    assert torch.allclose(FeatureDistance(Features(), cosine_weights((3, None)))(x, y), wanted, atol=1e-6)
    assert torch.allclose(FeatureDistance(Features(), cosine_weights((3, 3)))(x, y), wanted / 2, atol=1e-6)


def test_a_distances_weights_are_its_own():
    """Catches a distance that changes with the tensor that it was made from."""
    given = torch.ones(3)
    distance, x, y = FeatureDistance(Features(), [given, None]), pictures(1, 3, 8, 8), pictures(1, 3, 8, 8)
    before = distance(x, y)
    given.zero_()
    assert torch.equal(distance(x, y), before) and before > 0


def test_features_that_never_fire_have_a_gradient():
    """TRAP: d sqrt(s) at s = 0 is infinite. Catches a NaN gradient where all features of a place are 0."""
    distance, y = FeatureDistance(Features(), cosine_weights((3, 3))), pictures(2, 3, 8, 8).requires_grad_()
    distance(pictures(2, 3, 8, 8), y).sum().backward()
    assert y.grad.isfinite().all() and y.grad.abs().max() > 0


@torch.no_grad()
def test_grey_is_a_colour_and_shapes_must_agree(lpips):
    """Catches MNIST falling over, and a batch of one compared with all by broadcasting."""
    x, y = pictures(2, 1, 32, 32), pictures(2, 1, 32, 32)
    assert torch.allclose(lpips(x, y), lpips(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))
    assert for_imagenet(torch.ones(1, 1, 1, 1)).flatten().tolist() == pytest.approx(
        [(1 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))], rel=2e-3)
    for wrong in (x[:1], x.expand(-1, 2, -1, -1), x[0]):
        with pytest.raises(ValueError, match="one shape"):
            lpips(x, wrong)


def test_judges_do_not_learn(files):
    """Catches a BatchNorm that follows the drawn pictures, and perceptual weights that an optimizer could reach."""
    identity = load_moco(files / "moco.pth.tar")
    before = {name: value.clone() for name, value in identity.state_dict().items()}
    y = pictures(2, 3, 32, 32).requires_grad_()
    VAELoss(identity=identity).train().identity(pictures(2, 3, 32, 32), y).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in identity.state_dict().items())
    assert y.grad.abs().max() > 0 and not any(p.requires_grad for p in identity.parameters())


def test_resnet_is_the_references():
    """Every stage of our ResNet-50 equals transformers'. Catches a stride on the wrong convolution, a shortcut too few."""
    transformers = pytest.importorskip("transformers", reason="transformers, the reference, is not installed")
    theirs = transformers.ResNetModel(transformers.ResNetConfig()).eval()
    ours, found = ResNet50().eval(), {}
    renamed = {"shortcut.convolution": "downsample.0", "shortcut.normalization": "downsample.1"}
    for k in range(3):
        renamed |= {f"layer.{k}.convolution": f"conv{k + 1}", f"layer.{k}.normalization": f"bn{k + 1}"}
    for name, value in theirs.state_dict().items():
        if value.ndim == 1:                             # running statistics as if it had been trained
            value = torch.rand_like(value) + 0.5
        if name.startswith("embedder."):
            name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
        else:
            _, _, stage, _, block, *rest = name.split(".")
            inner, leaf = ".".join(rest[:-1]), rest[-1]
            name = f"layer{int(stage) + 1}.{block}.{renamed[inner]}.{leaf}"
        found[name] = value
    theirs.load_state_dict(dict(zip(theirs.state_dict(), found.values())))
    load_tensors(ours, found, "transformers", "ResNet-50")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = theirs(x, output_hidden_states=True).hidden_states[1:]
        for mine, their in zip(ours(x), wanted, strict=True):
            assert torch.allclose(mine, their, rtol=1e-3, atol=1e-4 * their.abs().max())


# ------------------------------------------------------------------------------------------------------- published weights
@torch.no_grad()
def test_moco_in_its_published_format(files):
    """Catches a prefix not taken off, the key encoder taken for the query's, and running statistics not loaded."""
    identity, found = load_moco(files / "moco.pth.tar"), torch.load(files / "moco.pth.tar")["state_dict"]
    for name, value in identity.net.state_dict().items():
        assert torch.equal(value, found["module.encoder_q." + name]), name
    x, y = pictures(2, 3, 64, 64), pictures(2, 3, 64, 64)
    seen = zip(*(identity.net(for_imagenet(z)) for z in (x, y)))
    wanted = sum(1 - nn.functional.cosine_similarity(a, b).mean((1, 2)) for a, b in seen)
    assert torch.allclose(identity(x, y), wanted / 4, rtol=1e-3) and identity(x, x).tolist() == [0, 0]


@pytest.mark.parametrize("which, words", [
    ("absent.pth,vgg.pth", ["no weights file", "absent.pth"]),
    ("text.pth,vgg.pth", ["text.pth", "not a file of torch weights"]),
    ("list.pth", ["list.pth", "dict"]),
    ("vgg16.pth", ["vgg.pth", "lin0.model.1.weight", "none"]),                        # half of what LPIPS needs
    ("vgg.pth", ["features.0.weight", "VGG16"]),
    ("moco.pth.tar", ["features.0.weight", "VGG16"]),
    ("narrow.pth,vgg.pth", ["features.0.weight", "(32, 3, 3, 3)", "(64, 3, 3, 3)"]),
    ("vgg16.pth,alex.pth", ["lin1.model.1.weight", "(1, 192, 1, 1)", "(1, 128, 1, 1)"]),
])
def test_wrong_lpips_files(files, which, words):
    """Catches a traceback, or a distance by half a network. The sentence names file, tensor and shapes."""
    (files / "text.pth").write_text("not weights\n")
    torch.save([1, 2], files / "list.pth")
    torch.save({"features.0.weight": torch.zeros(32, 3, 3, 3)}, files / "narrow.pth")
    alex = {f"lin{k}.model.1.weight": torch.zeros(1, w, 1, 1) for k, w in enumerate((64, 192, 384, 256, 256))}
    torch.save(alex, files / "alex.pth")
    with pytest.raises(UserError) as mistake:
        load_lpips(",".join(str(files / name) for name in which.split(",")))
    assert all(word in str(mistake.value) for word in words) and "\n" not in str(mistake.value)


@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "folder"])
def test_weights_that_are_no_file(tmp_path, what):
    """Catches a command that waits for ever for what a pipe does not say."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="not a file"):
        load_moco(tmp_path / what)


@pytest.mark.parametrize("content, words", [
    (None, ["no weights file"]),
    ({"features.0.weight": torch.zeros(1)}, ["MoCo v2", "module.encoder_q."]),
    ({"state_dict": {"module.base_encoder.conv1.weight": torch.zeros(1)}}, ["MoCo v2", "module.encoder_q."]),     # v3
    ({"state_dict": {"module.encoder_q.conv1.weight": torch.zeros(64, 3, 3, 3)}}, ["conv1.weight", "(64, 3, 7, 7)"]),
    ({"state_dict": {"module.encoder_q.conv1.weight": torch.zeros(64, 3, 7, 7)}}, ["bn1.weight", "ResNet-50"]),
])
def test_wrong_moco_files(tmp_path, content, words):
    """Catches another version's checkpoint, or another network's, taken for MoCo v2's ResNet-50."""
    if content:
        torch.save(content, tmp_path / "moco.pth")
    with pytest.raises(UserError) as mistake:
        load_moco(tmp_path / "moco.pth")
    assert all(word in str(mistake.value) for word in [*words, "moco.pth"])


# ---------------------------------------------------------------------------------------------------------- the adversary
def test_hinge_by_hand():
    """Catches real and drawn exchanged, a lost half, and answers beyond the margin that still count."""
    assert hinge(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])).item() == 0.5 * (0 + 0.5) / 2 + 0.5 * (0 + 1.25) / 2
    assert hinge(torch.tensor([1.0]), torch.tensor([-1.0])) == 0 and hinge(torch.tensor([0.0]), torch.tensor([0.0])) == 1


def test_adaptive_weight_by_hand():
    """Esser et al. eq. 7. Catches the ratio upside down, squared norms, a missing bound, a weight with a gradient."""
    last = nn.Parameter(torch.zeros(2, 2))
    weight = adaptive_weight(3 * last.sum(), (last * torch.tensor([[0.3, 0.4], [0.0, 0.0]])).sum(), last)
    assert weight.item() == pytest.approx(6 / (0.5 + 1e-4)) and not weight.requires_grad
    assert adaptive_weight(3 * last.sum(), 0 * last.sum(), last).item() == 1e4
    assert adaptive_weight(0 * last.sum(), last.sum(), last) == 0


def test_appendix_c_by_hand():
    """App. C's weights, read off the function. Catches a weight that is another, and the VQ-VAE's codebook loss at 1e-6."""
    terms = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0], requires_grad=True)
    loss = appendix_c(*terms)
    loss.backward()
    assert terms.grad.tolist() == pytest.approx([1, 1, 0.5, 0.2, 1e-6])
    assert loss.item() == pytest.approx(2 + 3 + 2.5 + 1.4 + 11e-6)
    assert appendix_c(2, 3, 5, 7, 11, kl_weight=1.0) == pytest.approx(2 + 3 + 2.5 + 1.4 + 11)


def test_the_gan_pulls_as_hard_as_its_weight_says(vae_loss):
    """App. C: with 0.5, the GAN's gradient at the last layer is half as long as that of L1 + LPIPS + 0.2 ID."""
    last, x = nn.Conv2d(4, 3, 3, padding=1), pictures(4, 3, 16, 16)
    x_hat = last(torch.randn(4, 4, 16, 16))
    reconstruction, _ = vae_loss(x, x_hat, 0, 0, last.weight, step=9)
    both, terms = vae_loss(x, x_hat, 0, 0, last.weight, step=10)
    pull, all_of_it = (torch.autograd.grad(loss, last.weight, retain_graph=True)[0] for loss in (reconstruction, both))
    assert (all_of_it - pull).norm().item() == pytest.approx(0.5 * pull.norm().item(), rel=0.02)
    assert both.item() == pytest.approx((reconstruction + 0.5 * terms["weight"] * terms["GAN"]).item(), rel=1e-5)
    assert terms["GAN"].item() == pytest.approx(-vae_loss.discriminator(x_hat).mean().item(), rel=1e-5)


def test_before_its_step_the_discriminator_is_silent(vae_loss):
    """App. C, GAN from step 50,000 on. Catches a term that counts early, be it faintly, and one off by a step."""
    last, x = nn.Conv2d(4, 3, 3, padding=1), pictures(4, 3, 16, 16)
    x_hat = last(torch.randn(4, 4, 16, 16))
    vae_loss.discriminator.register_forward_hook(lambda *_: pytest.fail("asked before its step"))
    loss, terms = vae_loss(x, x_hat, 0, 0, last.weight, step=9)
    wanted = (x - x_hat).abs().mean() + vae_loss.lpips(x, x_hat).mean() + 0.2 * vae_loss.identity(x, x_hat).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6) and "GAN" not in terms
    assert not vae_loss.gan_is_on(9) and vae_loss.gan_is_on(10) and VAELoss().gan_start == 50_000


@pytest.mark.parametrize("position", range(5), ids=["L1", "LPIPS", "GAN", "ID", "KL"])
def test_every_term_counts(vae_loss, monkeypatch, position):
    """Catches a term that is computed, logged, and never added: without it the gradient must be another."""
    last, x, features = nn.Conv2d(4, 3, 3, padding=1), pictures(4, 3, 16, 16), torch.randn(4, 4, 16, 16)
    gradients = []
    for share in (1.0, 0.0):
        def partly(*terms, share=share):
            terms = list(terms)
            terms[position] = share * terms[position]
            return appendix_c(*terms)
        monkeypatch.setattr(losses, "appendix_c", partly)
        kl = last.weight.square().sum()                 # any function of the weights does
        loss, _ = vae_loss(x, last(features), kl, 1.0, last.weight, step=10)
        gradients.append(torch.autograd.grad(loss, last.weight)[0])
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


def test_the_discriminators_loss_is_its_own(vae_loss):
    """TRAP: reconstructions not detached. Catches a discriminator step that also trains the VAE to please it."""
    drawn = pictures(4, 3, 16, 16).requires_grad_()
    loss = vae_loss.discriminator_loss(pictures(4, 3, 16, 16), drawn)
    loss.backward()
    assert drawn.grad is None and all(p.grad.abs().sum() > 0 for p in vae_loss.discriminator.parameters() if p.ndim == 4)
    assert loss.item() == pytest.approx(1, abs=0.2)     # no opinion yet: hinge of answers near 0


def test_a_discriminator_learns_to_tell():
    """Catches a hinge whose sign is turned, so that it learns to take the drawn for real."""
    critic = PatchGAN(width=8, layers=2)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=5e-3)
    vae_loss, x = VAELoss(discriminator=critic), pictures(8, 3, 16, 16)
    blurred = nn.functional.avg_pool2d(x, 3, 1, 1)
    for _ in range(15):
        optimizer.zero_grad()
        vae_loss.discriminator_loss(x, blurred).backward()
        optimizer.step()
    assert critic(x).mean() > critic(blurred).mean() + 0.5


def test_describe_says_what_is_on(vae_loss):
    """Catches a run that says it has a term which is off."""
    assert vae_loss.describe() == "L1 + LPIPS + 0.2 ID + 0.5 GAN from step 10"
    assert VAELoss().describe() == "L1" and VAELoss(identity=vae_loss.identity).describe() == "L1 + 0.2 ID"


# -------------------------------------------------------------------------------------------------------- the toy's network
def test_the_small_network_learns_what_captions_say():
    """Catches a stand-in that sees nothing: colours it learnt to name must be further apart than two pictures of one."""
    rng = np.random.default_rng(0)
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    names = [list(colours)[k] for k in rng.integers(3, size=90)]
    pixels = np.stack([np.full((16, 16, 3), colours[name]) * rng.uniform(0.3, 1) for name in names]).astype(np.uint8)
    kept = torch.get_rng_state()
    net, right = train_small_net(pixels, [f"a {name} thing" for name in names], steps=60, batch=16)
    assert right > 0.95 and torch.equal(torch.get_rng_state(), kept)
    again, _ = train_small_net(pixels, [f"a {name} thing" for name in names], steps=60, batch=16)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))
    x, (_, identity) = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, stand_ins(net)
    of = {name: [k for k in range(90) if names[k] == name][:2] for name in colours}
    same = max(identity(x[[a]], x[[b]]).item() for a, b in of.values())
    other = min(identity(x[[of[one][0]]], x[[of[two][0]]]).item() for one in colours for two in colours if one != two)
    assert other > 5 * same and not math.isnan(same)
