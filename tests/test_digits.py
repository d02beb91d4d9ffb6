"""
test_digits.py: is it the digit that was asked for?                           (metrics/digits.py)

THE IDEA    A classifier reads the digits that a model drew. First the classifier: it must know real
            digits, and be saved where it is looked for. Then the score, of an artist who draws what
            was asked for, and of one who draws another digit.
TRY IT      pytest -n 0 tests/test_digits.py      one test needs the MNIST files
"""
from pathlib import Path

import numpy as np
import pytest

from metrics import digits, drawing
from sources import mnist
from sources.pairs import Pairs
from support.common import UserError

MNIST = Path(__file__).resolve().parents[2] / "shared/data/mnist"


# ----------------------------------------------------------------------------------- the classifier
@pytest.fixture(scope="module")
def unseen():
    """1000 test digits, if the files and the classifier are there."""
    if not digits.CLASSIFIER.exists():
        pytest.skip(f"{digits.CLASSIFIER} is missing: "
                    "python evaluate.py --data mnist --train-classifier makes it")
    if not MNIST.exists():
        pytest.skip(f"{MNIST} is not here: the real MNIST files were not given to this checkout")
    pairs = mnist.load_mnist(MNIST, "test")
    return Pairs("mnist", pairs.captions[:1000], pairs.pixels[:1000], labels=pairs.labels[:1000])


def test_the_judge_of_digits(unseen):
    """Catches a classifier saved badly, or fed another scale than it was trained on: then `digits`
    measures nothing."""
    net = digits.load_classifier()
    right = digits.classify(net, unseen.pixels) == unseen.labels
    assert right.mean() > 0.98

    in_colour = np.repeat(unseen.pixels[:100], 3, -1)
    right = digits.classify(net, in_colour) == unseen.labels[:100]
    assert right.mean() > 0.97


def test_the_shipped_judge_knows_ten_digits():
    """Catches a network of another shape than the file's. No data are needed."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(7, 32, 32, 1), dtype=np.uint8)
    found = digits.classify(digits.load_classifier(), pixels)
    assert found.shape == (7,)
    assert found.min() >= 0
    assert found.max() <= 9


def test_train_a_judge(tmp_path, capsys):
    """Catches a judge that is trained and not saved, or saved where it cannot be loaded from."""
    # Zeros are dark and ones are light: learned in seconds.
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    light = 190 * labels[:, None, None, None]
    pixels = (rng.integers(0, 60, (300, 32, 32, 1)) + light).astype(np.uint8)
    pairs = Pairs("mnist", ["the digit zero"] * 300, pixels, labels=labels)

    path = tmp_path / "judge.pt"
    digits.train_classifier(pairs, pairs, path, epochs=6)
    right = digits.classify(digits.load_classifier(path), pixels) == labels
    assert right.mean() > 0.95
    assert "judge.pt" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no checkpoint"):
        digits.load_classifier(tmp_path / "none.pt")


# ---------------------------------------------------------------------------------------- the score
def test_digits_of_a_perfect_and_of_a_confused_artist(monkeypatch):
    """Catches a score that does not look at what was asked for, captions compared with another
    picture's, and digits that are asked for more often than others."""
    # A picture is of one grey, which says its digit and its number: 20 * digit + number.
    labels = np.arange(60) % 10
    greys = (20 * labels + np.arange(60) // 10).astype(np.uint8)
    pixels = np.broadcast_to(greys[:, None, None, None], (60, 32, 32, 1))
    captions = [f"the digit {mnist.DIGITS[label]}" for label in labels]
    test = Pairs("mnist", captions, pixels, labels=labels)

    def draw(trained, prompts, guidance, seed, **drawing):
        if guidance == 1:                               # unguided, it draws another's digit
            prompts = prompts[1:] + prompts[:1]
        pictures = []
        for prompt in prompts:
            digit = mnist.DIGITS.index(prompt.split()[-1])
            pictures.append(np.full((32, 32, 3), 20 * digit, np.uint8))
        return np.stack(pictures)

    def describe(trained, pixels):
        texts = []
        for grey in pixels[:, 0, 0, 0]:
            name = mnist.DIGITS[grey // 20]
            if grey == 60:                              # a three, the first of six, is misread
                name = "two"
            texts.append(f"the digit {name}")
        return texts

    monkeypatch.setattr(digits, "load_classifier", lambda: None)
    monkeypatch.setattr(digits, "classify", lambda net, pixels: pixels[:, 0, 0, 0] // 20)
    monkeypatch.setattr(drawing, "draw", draw)
    monkeypatch.setattr(digits, "encode_pixels", lambda trained, pixels: pixels)
    monkeypatch.setattr(drawing, "describe", describe)
    found, shown = digits.digits(None, test, n=40)
    assert found == {
        "guided": 1.0,
        "unguided": 0.0,
        "captions": pytest.approx(59 / 60),
        "classifier": 1.0,
    }
    each_in_turn = [f"the digit {name}" for name in mnist.DIGITS]
    assert [text for text, *_ in shown] == each_in_turn * 4
