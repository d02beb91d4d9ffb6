"""
sources.py: captioned pictures, wherever they come from                 (Transfusion §4.1 "Data", "Latent Image Representation")

THE IDEA    All that training and measuring ask of a data set is a list of captions and an array of pictures. So a source is a
            function that returns those two, and a new data set is a new function.
A PICTURE   scenes: drawn from a seed        --+
            mnist:  four idx files           --+-->  Pairs(captions: N str, pixels: (N, h, w, 3 or 1) uint8)
            folder: pictures, captions.jsonl --+
PAPER/HERE  same: pictures are cropped at the centre and resized to a square.
            here: these sources fit in memory; a trillion tokens do not, and are packed to disk first (streams.py, pack.py).
READ NEXT   data.py, which makes documents of them      TRY IT  python sources.py      TEST  tests/test_sources.py
"""
import gzip
import hashlib
import http.client
import json
import struct
import urllib.request
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

import scenes
from data import UserError


@dataclass
class Pairs:
    """Captioned pictures, and perhaps text alone. captions: list of N str; pixels: (N, h, w, 3 or 1) uint8.
    world: the scenes.World that writes text-only documents and knows the language's entropy, or None.
    labels: (N,) int, MNIST's classes, or None. language: captions beyond these whose words must be known, too."""
    name: str
    captions: list
    pixels: np.ndarray
    world: object = None
    labels: np.ndarray | None = None
    language: list = field(default_factory=list)

    def vocabulary(self):
        """Every word that this source can utter."""
        if self.world:
            return scenes.vocabulary()
        return {word for text in [*self.captions, *self.language] for word in text.split()}


def load_scenes(n, seed, categories=scenes.WORLDS["six"], size=32, held_out=False, progress=True):
    """Pairs of n rendered scenes. held_out: only captions that name a held-out colour-shape pair (for evaluation)."""
    rng, world = np.random.default_rng(seed), scenes.World(tuple(categories))
    captions, pixels = [], np.empty((n, size, size, 3), dtype=np.uint8)
    for k in tqdm(range(n), desc="drawing scenes", disable=not progress, leave=False):
        text, claim = world.caption(rng, held_out)
        captions.append(text)
        pixels[k] = scenes.render(scenes.draw_scene(claim, rng, size, allow_held_out=held_out), size)
    return Pairs("scenes", captions, pixels, world)


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


def crop_and_resize(image, size):
    """(size, size, 3) uint8 of any PIL image: centre-cropped to a square, resized, as in Transfusion §4.1.
    Transparency is laid on black; an EXIF rotation is applied."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                      # 16 bits of grey: Pillow's own conversion would clip it to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return np.array(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))       # a copy: torch warns of read-only ones


def open_picture(path, size, say=False):
    """(size, size, 3) uint8 of an image file; `say` tells when that is not what the file holds. Raises UserError, naming
    the file, if it cannot be read as a picture."""
    try:
        with Image.open(path) as image:
            if say and (image.size, image.mode, image.getexif().get(0x0112, 1)) != ((size, size), "RGB", 1):
                print(f"{path}: {image.size[0]}x{image.size[1]} {image.mode}, converted to {size}x{size} RGB")
            return crop_and_resize(image, size)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise UserError(f"{path} cannot be read as a picture ({problem}): is it truncated or of another type?") from None


def read_lines(path, wanted):
    """[(line number, line)] of a JSON-lines file, empty ones left out. Raises UserError, saying what is wanted in it."""
    try:
        return [line for line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line[1].strip()]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: it must hold one {wanted} per line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: save it as UTF-8") from None


def load_folder(folder, size=32, split="train"):
    """Pairs of a folder of pictures with captions.jsonl: one {"image": "cat.jpg", "caption": "a cat"} per line.
    Every tenth pair is the test split. Pictures that cannot be read are counted, named and skipped."""
    path = Path(folder) / "captions.jsonl"
    lines = read_lines(path, '{"image": file name, "caption": words}')
    captions, pixels, bad = [], [], []
    for number, line in tqdm(lines, desc=f"reading {folder}", leave=False):
        try:
            entry = json.loads(line)
            name, caption = entry["image"], " ".join(entry["caption"].lower().split())
            path.parent / name                          # a name that is no string is the same kind of mistake
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} line {number} is not {{\"image\": ..., \"caption\": ...}}: {line[:60]!r}") from None
        try:
            pixels.append(open_picture(path.parent / name, size))
            captions.append(caption)
        except UserError as problem:
            bad.append(str(problem))
    if bad:
        print(f"{folder}: skipped {len(bad)} of {len(lines)} pictures: {'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}")
    keep = [k for k in range(len(captions)) if (k % 10 == 9) == (split == "test")]
    if not keep:
        raise UserError(f"{folder} has no usable {split} pair: it needs at least ten readable pictures with captions")
    return Pairs("folder", [captions[k] for k in keep], np.stack([pixels[k] for k in keep]), language=captions)


def load_pairs(name, folder=None, size=32, split="train", n=20000, seed=0, categories=scenes.WORLDS["six"], progress=True):
    """Pairs by the name of their source: "scenes" (n of them, drawn from the seed), "mnist" or "folder"."""
    if name == "scenes":                                # splits differ by their stream of random numbers
        return load_scenes(n, [seed, ("train", "test").index(split)], categories, size, progress=progress)
    if name == "mnist":
        return load_mnist(folder and Path(folder), split)
    if folder is None:
        raise UserError("--data folder needs --data-dir: the folder with captions.jsonl")
    return load_folder(folder, size, split)


if __name__ == "__main__":
    pairs = load_scenes(8, seed=0, progress=False)
    for caption, picture in zip(pairs.captions, pairs.pixels):
        print(f"{caption:45s} {picture.shape} {picture.dtype}, "
              + ", ".join(f"{t.colour} {t.shape} at ({t.x:.0f}, {t.y:.0f})" for t in scenes.parse(picture)))
