"""
digits.py: MNIST, judged by a classifier
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import vae as vae_module
from metrics.drawing import describe, draw
from sources import mnist
from support import checkpoint
from support.checkpoint import encode_pixels
from support.common import ASSETS


CLASSIFIER = ASSETS / "mnist_classifier.pt"


def digit_network():
    """A small convolutional classifier of 32x32 grey pictures, (M, 1, 32, 32) in [-1, 1] -> (M, 10)."""
    conv = lambda a, b: [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*conv(1, 16), *conv(16, 32), *conv(32, 64), nn.Flatten(), nn.Linear(64 * 16, 10))


def train_classifier(train, test, path=CLASSIFIER, epochs=3, seed=0):
    """Train the judge of drawn digits, save it in 16 bits, print its test accuracy."""
    torch.manual_seed(seed)
    net, rng = digit_network(), np.random.default_rng(seed)
    steps = epochs * len(train.pixels) // 128
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="training the classifier"):
        k = rng.integers(len(train.pixels), size=128)
        loss = F.cross_entropy(net(vae_module.to_float(train.pixels[k])), torch.from_numpy(train.labels[k]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    checkpoint.save(path, {"kind": "classifier", "weights": {k: v.half() if v.is_floating_point() else v
                                                             for k, v in net.state_dict().items()}})
    print(f"wrote {path}: {(classify(load_classifier(path), test.pixels) == test.labels).mean():.2%} of the test digits")


def load_classifier(path=CLASSIFIER):
    """The saved judge."""
    net = digit_network()
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in checkpoint.load(path, "classifier")["weights"].items()})
    return net.eval()


@torch.no_grad()
def classify(net, pixels):
    """(M,) int: the digit in each of (M, 32, 32, 1 or 3) uint8 pictures."""
    return torch.cat([net(vae_module.to_float(pixels[k: k + 500, ..., :1])).argmax(1) for k in range(0, len(pixels), 500)]).numpy()


def digits(trained, test, n=200, seed=0, guidance=3.0, **drawing):
    """{"guided", "unguided": share of n drawn digits that the classifier reads as asked, "captions": share of n
    test digits captioned right, "classifier": its accuracy on the test digits}; and the guided pictures."""
    net, asked = load_classifier(), np.arange(n) % 10
    prompts, found = [f"the digit {mnist.DIGITS[k]}" for k in asked], {}
    for name, w in (("guided", guidance), ("unguided", 1.0)):
        pictures = draw(trained, prompts, guidance=w, seed=seed, **drawing)
        right = classify(net, pictures) == asked
        found[name] = float(right.mean())
        if name == "guided":
            shown = list(zip(prompts, pictures, right))
    chosen = np.random.default_rng(seed).permutation(len(test.pixels))[: max(n, 1000)]
    said = sum((describe(trained, encode_pixels(trained, test.pixels[part])) for part in np.array_split(chosen, 4)), [])
    found["captions"] = float(np.mean([text == test.captions[k] for text, k in zip(said, chosen)]))
    found["classifier"] = float((classify(net, test.pixels) == test.labels).mean())
    return found, shown
