"""
perceptual.py: what trained networks see in a picture                           (Transfusion App. C)

THE IDEA    Show two pictures to a frozen network and compare what it sees, layer by layer, instead
            of comparing pixels. LPIPS asks VGG16, with weights that people's judgements have
            taught. ID asks the ResNet-50 of MoCo v2. On the toy both ask `SmallNet`, which learns
            in seconds to tell the words of a caption.
A PICTURE   x ---+                     maps of x ---+
                 +--> a frozen network              +--> unit length at each place --> distance
            y ---+                     maps of y ---+
THE RULE    D(x, y) = sum over maps, mean over places of  sum_c  w_c (x_c / |x| - y_c / |y|)^2
            With w = 1/2 that is 1 - cosine, because |a - b|^2 = 2 (1 - cos) for unit vectors.
SHAPES      pictures (M, c, h, w) float32 in [-1, 1], c = 3 or 1; a map (M, C, h', w');
            a distance (M,)
PAPER/HERE  same: the networks and their published names, so that the published files load.
            our choice: what ID compares (losses.py says it).
READ NEXT   losses.py        TEST  tests/test_vae_losses.py
"""
import pickle
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sources.pairs import words_of
from support.common import UserError, check_ordinary
from vae import to_float

VGG_WIDTHS = (64, 128, 256, 512, 512)                   # channels of VGG16's five maps
RESNET_WIDTHS = (256, 512, 1024, 2048)                  # channels of ResNet-50's four maps


# --------------------------------------------------------------------------------- the two networks
class VGG16(nn.Module):
    """(M, 3, h, w) -> five maps of 64, 128, 256, 512, 512 channels: what each pooling layer is
    about to shrink, and the last."""

    def __init__(self):
        super().__init__()
        # Layers are numbered as torchvision's `vgg16` numbers them: "features.28.weight" is the
        # name of a tensor in the published file.
        layers = []
        c = 3
        for stage, width in enumerate(VGG_WIDTHS):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(2 if stage < 2 else 3):
                layers.append(nn.Conv2d(c, width, 3, padding=1))
                layers.append(nn.ReLU())
                c = width
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        maps.append(x)
        return maps


class Bottleneck(nn.Module):
    """(M, c_in, h, w) -> (M, 4c, h/stride, w/stride): convolutions of 1x1, 3x3, 1x1 beside a
    shortcut. Names as published."""

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv3 = nn.Conv2d(c, 4 * c, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * c)
        self.downsample = nn.Identity()
        if c_in != 4 * c:
            shortcut = nn.Conv2d(c_in, 4 * c, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * c))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))                                 # (M, c, h, w)
        h = F.relu(self.bn2(self.conv2(h)))                                 # (M, c, h/s, w/s)
        h = self.bn3(self.conv3(h))                                         # (M, 4c, h/s, w/s)
        return F.relu(self.downsample(x) + h)


class ResNet50(nn.Module):
    """(M, 3, h, w) -> four maps of 256, 512, 1024, 2048 channels, one after each stage. Names as
    published."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = resnet_stage(64, 64, blocks=3, stride=1)
        self.layer2 = resnet_stage(256, 128, blocks=4, stride=2)
        self.layer3 = resnet_stage(512, 256, blocks=6, stride=2)
        self.layer4 = resnet_stage(1024, 512, blocks=3, stride=2)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))                                 # (M, 64, h/2, w/2)
        x = F.max_pool2d(x, 3, 2, padding=1)                                # (M, 64, h/4, w/4)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


def resnet_stage(c_in, c, blocks, stride):
    """Sequential: (M, c_in, h, w) -> (M, 4c, h/stride, w/stride). Only the first block shrinks."""
    stack = [Bottleneck(c_in, c, stride)]
    for _ in range(blocks - 1):
        stack.append(Bottleneck(4 * c, c, stride=1))
    return nn.Sequential(*stack)


# ------------------------------------------------------------------------------------- the distance
class FeatureDistance(nn.Module):
    """How differently a frozen network sees two pictures: LPIPS, and ID. net: pictures -> list of
    maps. weights: one (C,) tensor for each of its maps, or None for a map that does not count."""

    def __init__(self, net, weights):
        super().__init__()
        self.net = net.requires_grad_(False)
        self.used = []                                  # numbers of the maps that count
        for k, weight in enumerate(weights):
            if weight is not None:
                self.used.append(k)
                weight = weight.detach().clone()
                self.register_buffer(f"weight{k}", weight.view(1, -1, 1, 1))
        self.train()

    def train(self, mode=True):
        """Always in evaluation mode."""
        # TRAP: in training mode a BatchNorm would follow the pictures that it should judge.
        return super().train(False)

    def forward(self, x, y):
        """(M,) distances of two batches (M, c, h, w) in [-1, 1], c = 3 or 1."""
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"wanted two batches of one shape (M, 3 or 1, h, w), "
                             f"got {tuple(x.shape)} and {tuple(y.shape)}")
        maps_x = self.net(for_imagenet(x))
        maps_y = self.net(for_imagenet(y))
        total = 0
        for k in self.used:
            weight = getattr(self, f"weight{k}")                            # (1, C, 1, 1)
            difference = unit(maps_x[k]) - unit(maps_y[k])                  # (M, C, h', w')
            distance = (weight * difference.square()).sum(1)                # (M, h', w')
            total = total + distance.mean((1, 2))                           # (M,)
        return total


def for_imagenet(x):
    """Pictures in [-1, 1] as networks trained on ImageNet want them: in colour, with each channel
    at zero mean and unit deviation."""
    # LPIPS' own numbers: the usual means 0.485 ... and deviations 0.229 ..., moved to [-1, 1].
    mean = x.new_tensor([-0.030, -0.088, -0.188])[:, None, None]            # (3, 1, 1)
    deviation = x.new_tensor([0.458, 0.448, 0.450])[:, None, None]
    return (x.expand(-1, 3, -1, -1) - mean) / deviation


def unit(features):
    """Each place's channels as a vector of length 1, in float32. features: (M, C, h', w')."""
    # TRAP: sqrt(sum of squares) has a NaN gradient where all are 0. A ReLU right before happens to
    # hide it, nothing else does. vector_norm has gradient 0 there.
    features = features.float()
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)        # (M, 1, h', w')
    return features / (length + 1e-10)


def cosine_weights(widths):
    """Weights for which FeatureDistance is the mean of 1 - cosine over the places and maps.
    widths: channels of each map, None for one that does not count."""
    counted = [width for width in widths if width is not None]
    share = 0.5 / len(counted)                          # |a - b|^2 = 2 (1 - cos), hence the half
    weights = []
    for width in widths:
        weights.append(None if width is None else torch.full((width,), share))
    return weights


# -------------------------------------------------------------------------------- published weights
def read_tensors(path):
    """The dict in a weights file. Raises UserError if it is missing or no such file."""
    try:
        check_ordinary(path)                            # a pipe would wait for ever
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no weights file {path}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError,
            pickle.UnpicklingError, zipfile.BadZipFile) as problem:
        raise UserError(f"{path} is not a file of torch weights ({type(problem).__name__}): "
                        f"truncated, or another kind of file?") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, but a dict of named tensors is "
                        f"needed")
    return content


def load_tensors(net, tensors, source, network):
    """Load a dict of named tensors into net. Names that net does not have are ignored: a
    classifier's last layer is of no use here.

    source, network     what the sentence calls the file and the network
    Raises UserError that names the first tensor missing or of another shape."""
    for name, value in net.state_dict().items():
        tensor = tensors.get(name)
        if not isinstance(tensor, torch.Tensor):
            first = next(iter(tensors), "none")
            raise UserError(f"{source} has no tensor {name!r}: is it {network}? Its first is "
                            f"{first!r}")
        if tensor.shape != value.shape:
            raise UserError(f"{source}: {name!r} is {tuple(tensor.shape)}, but in {network} it is "
                            f"{tuple(value.shape)}")
    net.load_state_dict({name: tensors[name] for name in net.state_dict()})


def load_lpips(paths):
    """FeatureDistance "LPIPS, VGG, version 0.1". paths: one file, or several with commas between,
    in any order. Together they hold torchvision's VGG16 ("features.0.weight" ...) and LPIPS' own
    five vectors ("lin0.model.1.weight" ...)."""
    tensors = {}
    for path in paths.split(","):
        tensors |= read_tensors(path.strip())
    net = VGG16()
    load_tensors(net, tensors, paths, "torchvision's VGG16, with LPIPS' vgg.pth after a comma")
    weights = []
    for k, width in enumerate(VGG_WIDTHS):
        name = f"lin{k}.model.1.weight"
        weight = tensors.get(name)
        shape = "none" if weight is None else tuple(weight.shape)
        if shape != (1, width, 1, 1):
            raise UserError(f"{paths}: LPIPS' own weights are two files, VGG16's and vgg.pth, and "
                            f"the second must have {name!r} of shape (1, {width}, 1, 1); found "
                            f"{shape}")
        weights.append(weight.flatten())
    return FeatureDistance(net, weights)


def load_moco(path):
    """FeatureDistance "ID" from a MoCo v2 checkpoint:
    {"state_dict": {"module.encoder_q.conv1.weight": ..., ...}}."""
    prefix = "module.encoder_q."                        # encoder_k is its slow copy
    state_dict = read_tensors(path).get("state_dict")
    tensors = {}
    if isinstance(state_dict, dict):
        for name, value in state_dict.items():
            if name.startswith(prefix):
                tensors[name.removeprefix(prefix)] = value
    if not tensors:
        raise UserError(f"{path} is not a MoCo v2 checkpoint: that has a 'state_dict' whose names "
                        f"begin with {prefix!r}")
    net = ResNet50()
    load_tensors(net, tensors, path, "MoCo's ResNet-50")
    return FeatureDistance(net, cosine_weights(RESNET_WIDTHS))


# ------------------------------------------------------------------------------- the toy's stand-in
class SmallNet(nn.Module):
    """(M, 3, h, w) -> maps of 16, 32, 64, 64 channels: our stand-in on the toy, where VGG16 would
    be a sledgehammer. words: how many words it learns to see."""

    def __init__(self, words):
        super().__init__()
        self.stages = nn.ModuleList([
            nn.Conv2d(3, 16, 3, stride=1, padding=1),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
        ])
        self.head = nn.Linear(64, words)

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = F.relu(stage(x))
            maps.append(x)
        return maps

    def guess_words(self, x):
        """(M, words) logits: which words a caption of x has. x: (M, 3, h, w)."""
        last = self(x)[-1]                                                  # (M, 64, h/8, w/8)
        return self.head(last.mean((2, 3)))


def train_small_net(pixels, captions, steps=200, batch=64, seed=0):
    """A SmallNet that tells from a picture which words its caption has. pixels (N, h, w, c) uint8;
    captions: N strings. Returns (net, share of words told right on the last batch)."""
    words = sorted(words_of(captions))
    if not words:
        raise UserError("the captions hold no words from which the small network could learn: name "
                        "--lpips-weights and --moco-weights, or take --loss toy")
    column = {word: k for k, word in enumerate(words)}
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):             # leaves the caller's random numbers alone
        torch.manual_seed(seed)
        net = SmallNet(len(words))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = rng.integers(len(pixels), size=batch)
        truth = torch.zeros(batch, len(words))                              # 1 where it is said
        for row, k in enumerate(chosen):
            truth[row, [column[word] for word in captions[k].split()]] = 1
        logits = net.guess_words(for_imagenet(to_float(pixels[chosen])))    # (batch, words)
        loss = F.binary_cross_entropy_with_logits(logits, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    right = (logits > 0) == (truth > 0)
    return net, right.float().mean().item()


def stand_ins(net):
    """(LPIPS, ID) of the toy, both from one SmallNet."""
    # The first maps know where things are; the last one answers, so it knows what they are.
    lpips = FeatureDistance(net, cosine_weights((16, 32, 64, None)))
    identity = FeatureDistance(net, cosine_weights((None, None, None, 64)))
    return lpips, identity
