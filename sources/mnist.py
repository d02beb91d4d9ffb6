"""
mnist.py: handwritten digits with captions in words                        (Transfusion §4.1 "Data")

THE IDEA    Real pictures, small enough for a laptop. A caption says the digit's name: "the digit
            seven". Four idx files hold them; they are downloaded at first use.
A PICTURE   idx: 0 0 8 n | n sizes of 4 bytes | the numbers, one byte each; perhaps gzipped
SHAPES      pictures (N, 28, 28) uint8, padded to (N, 32, 32, 1); labels (N,) uint8, 0..9
READ NEXT   pairs.py        TEST  tests/test_mnist.py
"""
import gzip
import hashlib
import http.client
import math
import struct
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sources.pairs import Pairs
from support.common import UserError, check_ordinary

MNIST_FILES = {                                         # name: md5 of the published .gz
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST_BYTES = 2 ** 28                                    # five times MNIST's largest file, unpacked


def load_mnist(folder=None, split="train", **unused):
    """Pairs of MNIST digits, padded from 28x28 to 32x32, with captions in words.

    folder      where the idx files lie; None: ./data/mnist, downloaded there at first use
    split       "train" or "test"
    Raises UserError if the files are missing, broken, or of another data set."""
    if folder is None:
        folder = Path("data/mnist")
        if not all(find_idx(folder, name) for name in MNIST_FILES):
            fetch_mnist(folder)
    folder = Path(folder)
    stem = {"train": "train", "test": "t10k"}[split]
    images = read_idx(folder, f"{stem}-images-idx3-ubyte")
    labels = read_idx(folder, f"{stem}-labels-idx1-ubyte")
    check_digits(f"{folder}/{stem}-...", images, labels)
    # A VAE halves the size twice, a patch once more: 32 can be halved, 28 not as often.
    pixels = np.pad(images, ((0, 0), (2, 2), (2, 2)))                       # (N, 32, 32)
    captions = [f"the digit {DIGITS[label]}" for label in labels]
    return Pairs("mnist", captions, pixels[..., None], labels=labels.astype(np.int64))


def check_digits(files, images, labels):
    """Raise UserError if two idx files do not hold MNIST's digits and their labels."""
    if images.ndim == 1 and labels.ndim == 3:
        raise UserError(f"{files}: the files of images and labels are exchanged")
    if images.shape[1:] != (28, 28):
        raise UserError(f"{files}: the images have the shape {images.shape}, but MNIST's are "
                        f"(N, 28, 28)")
    if labels.ndim != 1:
        raise UserError(f"{files}: the labels have the shape {labels.shape}, but MNIST's are (N,)")
    if len(images) != len(labels):
        raise UserError(f"{files}: {len(images)} images but {len(labels)} labels; the files do not "
                        f"belong together")
    if len(images) == 0:
        raise UserError(f"{files}: the files hold no images")
    if labels.max() > 9:
        raise UserError(f"{files}: there is a label {labels.max()}, but a digit is 0 to 9; letters "
                        f"(EMNIST) need a source of their own")


# ---------------------------------------------------------------------------------------- idx files
def find_idx(folder, name):
    """The path of an idx file, gzipped or raw; None if there is none."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.exists():
            return path
    return None


def read_idx(folder, name):
    """Array of uint8 of an idx file, gzipped or raw. Raises UserError if it is missing, truncated
    or something else."""
    path = find_idx(folder, name)
    if path is None:
        raise UserError(f"{folder} has no {name}(.gz): --data-dir must name a folder with the four "
                        f"MNIST idx files")
    check_ordinary(path)
    unpack = gzip.open if path.suffix == ".gz" else open
    try:
        with unpack(path, "rb") as file:
            zero, kind, ndim = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
            size = math.prod(shape)
            # One more than promised shows a file that is too long. All of it could be gigabytes:
            # gzip packs them into a few kilobytes.
            raw = file.read(min(size, MOST_BYTES) + 1)
    except (OSError, EOFError, struct.error, zlib.error):
        raise UserError(f"{path} is truncated or not an idx file: delete it and download it "
                        f"again") from None
    is_idx = zero == 0 and kind == 8 and 1 <= ndim <= 3                     # 8: of one byte each
    if is_idx and size > MOST_BYTES:
        raise UserError(f"{path} promises an array of {' x '.join(map(str, shape))} bytes: that is "
                        f"not MNIST, or the file is damaged")
    if not is_idx or len(raw) != size:
        raise UserError(f"{path} is truncated or not an idx file: delete it and download it again")
    return np.frombuffer(raw, np.uint8).reshape(shape)


# ----------------------------------------------------------------------------------------- download
def fetch_mnist(folder, mirrors=MNIST_MIRRORS):
    """Download the four files into `folder`. Raises UserError if no mirror has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, md5 in tqdm(MNIST_FILES.items(), desc=f"downloading MNIST to {folder}"):
        raw = fetch_file(f"{name}.gz", md5, mirrors)
        unfinished = folder / f"{name}.tmp"             # a killed download looks like no file
        unfinished.write_bytes(raw)
        unfinished.replace(folder / f"{name}.gz")


def fetch_file(name, md5, mirrors):
    """The bytes of a file, from the first mirror that answers with the right md5."""
    problems = []
    for mirror in mirrors:
        try:
            raw = urllib.request.urlopen(f"{mirror}{name}", timeout=30).read()
        except (OSError, http.client.HTTPException) as problem:
            problems.append(f"{mirror}: {problem}")
            continue
        if hashlib.md5(raw).hexdigest() == md5:
            return raw
        problems.append(f"{mirror}: wrong checksum")
    raise UserError(f"could not download {name} ({'; '.join(problems)}); put the four MNIST idx "
                    f"files in a folder yourself and name it with --data-dir")
