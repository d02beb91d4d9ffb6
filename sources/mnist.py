"""
mnist.py: handwritten digits with captions in words
"""
import gzip
import hashlib
import http.client
import struct
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sources.pairs import Pairs
from support.common import UserError


MNIST_FILES = {                                         # name: md5 of the .gz, as published with the data set
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873", "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3", "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c"}


MNIST_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def fetch_mnist(folder, mirrors=MNIST_MIRRORS):
    """Download the four files into `folder`, each from the first mirror that answers with the right md5."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, md5 in tqdm(MNIST_FILES.items(), desc=f"downloading MNIST to {folder}"):
        problems = []
        for mirror in mirrors:
            try:
                raw = urllib.request.urlopen(f"{mirror}{name}.gz", timeout=30).read()
            except (OSError, http.client.HTTPException) as problem:
                problems.append(f"{mirror}: {problem}")
                continue
            if hashlib.md5(raw).hexdigest() == md5:
                (folder / f"{name}.tmp").write_bytes(raw)               # a killed download must not look like a file
                (folder / f"{name}.tmp").replace(folder / f"{name}.gz")
                break
            problems.append(f"{mirror}: wrong checksum")
        else:
            raise UserError(f"could not download {name}.gz ({'; '.join(problems)}); put the four MNIST idx files in a "
                            f"folder yourself and name it with --data-dir")


def read_idx(folder, name):
    """Array of an idx file, gzipped or raw. Raises UserError if it is missing, truncated or something else."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.exists()), None)
    if path is None:
        raise UserError(f"{folder} has no {name}(.gz): --data-dir must name a folder with the four MNIST idx files")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, dims = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{dims}I", raw[4: 4 + 4 * dims])
        assert zero == 0 and kind == 8 and len(raw) == 4 + 4 * dims + int(np.prod(shape))
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, struct.error, zlib.error, AssertionError):
        raise UserError(f"{path} is truncated or not an idx file: delete it and download it again") from None


def load_mnist(folder=None, split="train"):
    """Pairs of MNIST digits, padded from 28x28 to 32x32, with captions in words: "the digit seven".
    folder: where the idx files lie; None: ./data/mnist, downloaded there at first use."""
    if folder is None:
        folder = Path("data/mnist")
        if not all((folder / f"{n}.gz").exists() or (folder / n).exists() for n in MNIST_FILES):
            fetch_mnist(folder)
    folder, stem = Path(folder), {"train": "train", "test": "t10k"}[split]
    images, labels = read_idx(folder, f"{stem}-images-idx3-ubyte"), read_idx(folder, f"{stem}-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} images but {len(labels)} labels; the files do not belong together")
    pixels = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]
    return Pairs("mnist", [f"the digit {DIGITS[k]}" for k in labels], pixels, labels=labels.astype(np.int64))
