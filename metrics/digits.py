"""
digits.py: drawn MNIST digits, judged by a classifier                             (ours; MNIST)

THE IDEA    Of handwriting we wrote no renderer, so nothing can be computed as it is for scenes.
            A small classifier that was trained on real digits reads the drawn ones: the share
            that it reads as asked says how well they are drawn.
A PICTURE   "the digit three" --model--> picture --classifier--> 3?  as asked
            test digit 3      --model--> "the digit three"?          as labelled
THE RULE    "guided" with guidance w, "unguided" with w = 1: guidance buys obedience
SHAPES      pixels (N, 32, 32, 1 or 3) uint8; the classifier reads (N, 1, 32, 32) in [-1, 1]
PAPER/HERE  not in the paper. It is the idea of FID and CLIP score, at a toy's size: another
            network judges. Its own accuracy on test digits is reported beside the numbers.
TRY IT      python evaluate.py --data mnist --train-classifier        TEST  tests/test_digits.py
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import vae as vae_module
from metrics import drawing
from sources import mnist
from support import checkpoint
from support.checkpoint import encode_pixels
from support.common import ASSETS

CLASSIFIER = ASSETS / "mnist_classifier.pt"


# ------------------------------------------------------------------------------------- the judge
def digit_network():
    """A small convolutional classifier, (N, 1, 32, 32) in [-1, 1] -> logits (N, 10)."""
    layers = []
    width = 1
    for wider in (16, 32, 64):                          # 32 x 32 -> 16 x 16 -> 8 x 8 -> 4 x 4
        layers.append(nn.Conv2d(width, wider, 3, padding=1))
        layers.append(nn.BatchNorm2d(wider))
        layers.append(nn.ReLU())
        layers.append(nn.MaxPool2d(2))
        width = wider
    numbers = width * 4 * 4                             # of the last map, as one row
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(numbers, 10))


def train_classifier(train, test, path=CLASSIFIER, epochs=3, seed=0):
    """Train the judge on Pairs `train`, save it in 16 bits, print its accuracy on Pairs `test`."""
    # 1. Train: a rate that climbs and falls once, for a few passes over the digits.
    torch.manual_seed(seed)
    net = digit_network()
    rng = np.random.default_rng(seed)
    steps = epochs * len(train.pixels) // 128
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="training the classifier"):
        k = rng.integers(len(train.pixels), size=128)
        logits = net(vae_module.to_float(train.pixels[k]))
        loss = F.cross_entropy(logits, torch.from_numpy(train.labels[k]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    # 2. Save. BatchNorm's counters are whole numbers, and stay so.
    weights = {}
    for name, tensor in net.state_dict().items():
        weights[name] = tensor.half() if tensor.is_floating_point() else tensor
    checkpoint.save(path, {"kind": "classifier", "weights": weights})

    # 3. Measure it as it will be used: read back from the file, in 16 bits.
    judge = load_classifier(path)
    right = classify(judge, test.pixels) == test.labels
    share = right.mean()
    print(f"wrote {path}: {share:.2%} of the test digits")


def load_classifier(path=CLASSIFIER):
    """The saved judge. Raises UserError if the file is missing or damaged."""
    weights = {}
    for name, tensor in checkpoint.load(path, "classifier")["weights"].items():
        weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    net = digit_network()
    net.load_state_dict(weights)
    return net.eval()


@torch.no_grad()
def classify(net, pixels):
    """(N,) int: the digit in each of (N, 32, 32, 1 or 3) uint8 pictures."""
    digits = []
    for k in range(0, len(pixels), 500):
        grey = pixels[k: k + 500, ..., :1]              # all channels of a drawn digit are alike
        logits = net(vae_module.to_float(grey))
        digits.append(logits.argmax(1))
    return torch.cat(digits).numpy()


# ----------------------------------------------------------------------------------- the numbers
def digits(trained, test, n=200, seed=0, guidance=3.0, **options):
    """({"guided", "unguided": share of n drawn digits that the classifier reads as asked,
    "captions": share of test digits captioned right, "classifier": its own accuracy}, [(prompt,
    guided picture, right)]).

    test: Pairs of unseen digits; options: as `sample.draw`. Every process must call it."""
    # 1. Draw, twice from the same noise: with guidance, and as the plain model answers.
    net = load_classifier()
    wanted = np.arange(n) % 10                          # every digit equally often
    prompts = [f"the digit {mnist.DIGITS[k]}" for k in wanted]

    def draw(w):
        pictures = drawing.draw(trained, prompts, guidance=w, seed=seed, **options)
        return pictures, classify(net, pictures) == wanted

    pictures, guided = draw(guidance)
    _, unguided = draw(1.0)

    # 2. Describe. Captions cost little beside pictures, so of a thousand, though fewer are drawn.
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(test.pixels))
    most = max(n, 1000)
    chosen = order[:most]
    captions = []
    for part in np.array_split(chosen, 4):              # in four parts: their caches take memory
        latents = encode_pixels(trained, test.pixels[part])
        captions += drawing.describe(trained, latents)
    right = []
    for text, k in zip(captions, chosen, strict=True):
        right.append(text == test.captions[k])

    # 3. How far the judge itself can be trusted: on real digits, whose labels are known.
    own = classify(net, test.pixels) == test.labels
    numbers = {
        "guided": float(guided.mean()),
        "unguided": float(unguided.mean()),
        "captions": float(np.mean(right)),
        "classifier": float(own.mean()),
    }
    return numbers, list(zip(prompts, pictures, guided, strict=True))
