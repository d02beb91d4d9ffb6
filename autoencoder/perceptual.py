"""
perceptual.py: what trained networks see
"""
import pickle
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support.common import UserError


class VGG16(nn.Module):
    """(M, 3, h, w) -> five maps of 64, 128, 256, 512, 512 channels: what each pooling layer is about to shrink, and the
    last. The layers are numbered as torchvision's `vgg16` numbers them ("features.28.weight")."""

    def __init__(self):
        super().__init__()
        layers, c = [], 3
        for stage, width in enumerate((64, 128, 256, 512, 512)):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(2 if stage < 2 else 3):
                layers, c = layers + [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()], width
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return [*maps, x]


class Bottleneck(nn.Module):
    """(M, c_in, h, w) -> (M, 4c, h/stride, w/stride): 1x1, 3x3, 1x1 around a shortcut. Names as published."""

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = nn.Conv2d(c, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c)
        self.downsample = nn.Identity() if c_in == 4 * c else nn.Sequential(nn.Conv2d(c_in, 4 * c, 1, stride, bias=False),
                                                                            nn.BatchNorm2d(4 * c))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.downsample(x) + self.bn3(self.conv3(h)))


class ResNet50(nn.Module):
    """(M, 3, h, w) -> four maps of 256, 512, 1024, 2048 channels, after each stage. Names as published."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
        c = 64
        for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
            stack = []
            for k in range(blocks):
                stack, c = stack + [Bottleneck(c, width, stride=2 if stage > 1 and k == 0 else 1)], 4 * width
            setattr(self, f"layer{stage}", nn.Sequential(*stack))

    def forward(self, x):
        x, maps = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, padding=1), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class SmallNet(nn.Module):
    """(M, 3, h, w) -> maps of 16, 32, 64, 64 channels: our stand-in on the toy, where VGG16 would be a sledgehammer.
    `words`: how many words it learns to see; the last map answers, so it knows what is shown, the first ones where."""

    def __init__(self, words):
        super().__init__()
        widths = (3, 16, 32, 64, 64)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, stride=1 + (k > 0), padding=1)
                                    for k, (a, b) in enumerate(zip(widths, widths[1:])))
        self.head = nn.Linear(widths[-1], words)

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = F.relu(stage(x))
            maps.append(x)
        return maps


def train_small_net(pixels, captions, steps=200, batch=64, seed=0):
    """A SmallNet that tells from a picture which words its caption has. pixels (N, h, w, c) uint8; captions: N strings.
    Returns (net, share of words told right on the last batch)."""
    rng = np.random.default_rng(seed)
    words = sorted({word for caption in captions for word in caption.split()})
    if not words:
        raise UserError("the captions hold no words from which the small network could learn: name --lpips-weights and "
                             "--moco-weights, or take --loss toy")
    column = {word: k for k, word in enumerate(words)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmallNet(len(words))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = rng.integers(len(pixels), size=batch)
        said = torch.zeros(batch, len(words))
        for row, k in enumerate(chosen):
            said[row, [column[word] for word in captions[k].split()]] = 1
        x = torch.from_numpy(pixels[chosen]).permute(0, 3, 1, 2).float() / 127.5 - 1
        answer = net.head(net(for_imagenet(x))[-1].mean((2, 3)))
        loss = F.binary_cross_entropy_with_logits(answer, said)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return net, ((answer > 0) == (said > 0)).float().mean().item()


def for_imagenet(x):
    """Pictures in [-1, 1] as networks trained on ImageNet want them: colour, and each channel at zero mean and unit
    deviation. (These are LPIPS' own shift and scale: the usual means 0.485 ... and deviations 0.229 ..., for [-1, 1].)"""
    mean, deviation = x.new_tensor([-0.030, -0.088, -0.188]), x.new_tensor([0.458, 0.448, 0.450])
    return (x.expand(-1, 3, -1, -1) - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1)


class FeatureDistance(nn.Module):
    """How differently a frozen network sees two pictures: LPIPS, and ID. net: pictures -> list of maps.
    weights: one (C,) tensor for each of its maps, or None for a map that does not count."""

    def __init__(self, net, weights):
        super().__init__()
        self.net = net.requires_grad_(False)
        self.used = [k for k, w in enumerate(weights) if w is not None]
        for k in self.used:
            self.register_buffer(f"weight{k}", weights[k].detach().clone().view(1, -1, 1, 1))
        self.train()

    def train(self, mode=True):
        """Always in evaluation mode. TRAP: in training mode a BatchNorm would follow the pictures it judges."""
        return super().train(False)

    def forward(self, x, y):
        """(M,) distances of two batches (M, c, h, w) in [-1, 1], c = 3 or 1."""
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"wanted two batches of one shape (M, 3 or 1, h, w), got {tuple(x.shape)} and {tuple(y.shape)}")
        seen_x, seen_y, total = self.net(for_imagenet(x)), self.net(for_imagenet(y)), 0
        for k in self.used:
            difference = (unit(seen_x[k]) - unit(seen_y[k])).square()                       # (M, C, h', w')
            total = total + (getattr(self, f"weight{k}") * difference).sum(1).mean((1, 2))
        return total


def unit(features):
    """Each place's channels as a vector of length 1, in float32. TRAP: sqrt(sum of squares) has a NaN gradient where
    all are 0 (a ReLU right before happens to hide it, nothing else does); vector_norm has gradient 0 there."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def cosine_weights(widths):
    """Weights for which FeatureDistance is the mean of 1 - cosine over the places and maps. |a - b|^2 = 2 (1 - cos).
    widths: channels of each map, None where one does not count."""
    n = sum(width is not None for width in widths)
    return [width and torch.full((width,), 0.5 / n) for width in widths]


def read_tensors(path):
    """The dict in a weights file. Raises UserError if it is missing or no such file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no weights file {path}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as problem:
        raise UserError(f"{path} is not a file of torch weights ({type(problem).__name__}): truncated, or another kind "
                             f"of file?") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, but a dict of named tensors is needed")
    return content


def fill(net, found, source, what):
    """Load the named tensors `found` into net; names that net does not have are ignored (a classifier's last layer).
    Raises UserError that names the first tensor missing or of another shape. source: for the sentence; what: the network."""
    for name, value in net.state_dict().items():
        if not isinstance(found.get(name), torch.Tensor):
            raise UserError(f"{source} has no tensor {name!r}: is it {what}? Its first is {next(iter(found), 'none')!r}")
        if tuple(found[name].shape) != tuple(value.shape):
            raise UserError(f"{source}: {name!r} is {tuple(found[name].shape)}, but in {what} it is {tuple(value.shape)}")
    net.load_state_dict({name: found[name] for name in net.state_dict()})


def load_lpips(paths):
    """FeatureDistance "LPIPS, VGG, version 0.1". paths: one file or several with commas between, in any order, that hold
    together torchvision's VGG16 ("features.0.weight" ...) and LPIPS' own five vectors ("lin0.model.1.weight" ...)."""
    found = {}
    for path in paths.split(","):
        found |= read_tensors(path.strip())
    net, weights = VGG16(), []
    fill(net, found, paths, "torchvision's VGG16, with LPIPS' vgg.pth after a comma")
    for k, width in enumerate((64, 128, 256, 512, 512)):
        w = found.get(f"lin{k}.model.1.weight")
        if w is None or tuple(w.shape) != (1, width, 1, 1):
            raise UserError(f"{paths}: LPIPS' own weights are two files, VGG16's and vgg.pth, and the second must have "
                                 f"'lin{k}.model.1.weight' of shape (1, {width}, 1, 1); found "
                                 f"{'none' if w is None else tuple(w.shape)}")
        weights.append(w.flatten())
    return FeatureDistance(net, weights)


def load_moco(path):
    """FeatureDistance "ID" from a MoCo v2 checkpoint: {"state_dict": {"module.encoder_q.conv1.weight": ..., ...}}."""
    found, prefix = read_tensors(path).get("state_dict"), "module.encoder_q."
    if not isinstance(found, dict) or not any(name.startswith(prefix) for name in found):
        raise UserError(f"{path} is not a MoCo v2 checkpoint: that has a 'state_dict' whose names begin with {prefix!r}")
    net, found = ResNet50(), {name[len(prefix):]: value for name, value in found.items() if name.startswith(prefix)}
    fill(net, found, path, "MoCo's ResNet-50")
    return FeatureDistance(net, cosine_weights((256, 512, 1024, 2048)))


def stand_ins(net):
    """(LPIPS, ID) of the toy, both from one SmallNet: where things are from its first maps, what they are from its last."""
    return tuple(FeatureDistance(net, cosine_weights(widths)) for widths in ((16, 32, 64, None), (None, None, None, 64)))
