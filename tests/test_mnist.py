"""
test_mnist.py: handwritten digits from idx files          (sources/mnist.py; Transfusion §4.1)

THE IDEA    A tiny MNIST of five random digits is written with `idx` below, read back, and compared
            pixel by pixel. The same files are then cut off, lengthened, damaged or swapped: each
            mistake must become one sentence that names the file. Downloads come from folders of
            this machine, by file://.
TRY IT      python -m pytest -n 0 tests/test_mnist.py
"""
import gzip
import hashlib
import http.client
import struct
from pathlib import Path

import numpy as np
import pytest

from sources import mnist
from support.common import UserError

DIGITS = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
LABELS = np.array([7, 2, 1, 0, 4])

gz_or_raw = pytest.mark.parametrize("zipped", [True, False], ids=["gz", "raw"])


def header(shape):
    """How an idx file begins: two zeros, 8 for uint8, the number of dimensions, their sizes."""
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)


def idx(array):
    """The bytes of an idx file: the header, then the numbers."""
    return header(array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder, zipped=True, images=DIGITS, labels=LABELS):
    """A folder with the four files of a tiny MNIST; returns {name: bytes}."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in mnist.MNIST_FILES:
        raw = idx(images if "images" in name else labels)
        if zipped:
            files[f"{name}.gz"] = gzip.compress(raw, mtime=0)
        else:
            files[name] = raw

    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return files


# -------------------------------------------------------------------------------- good files
@gz_or_raw
@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_from_files(tmp_path, zipped, split):
    """Catches a wrong header, a transposed picture, and padding on one side only.

    Also catches a caption that names another digit than its label."""
    write_mnist(tmp_path, zipped)

    pairs = mnist.load_mnist(tmp_path, split)

    assert pairs.pixels.shape == (5, 32, 32, 1)
    assert pairs.pixels.dtype == np.uint8
    # The 28 x 28 digit stands in the middle of 32 x 32, and its frame of two pixels is black.
    assert (pairs.pixels[:, 2:30, 2:30, 0] == DIGITS).all()
    frame = pairs.pixels.copy()
    frame[:, 2:30, 2:30] = 0
    assert frame.sum() == 0

    assert pairs.captions == [
        "the digit seven",
        "the digit two",
        "the digit one",
        "the digit zero",
        "the digit four",
    ]
    assert pairs.labels.tolist() == LABELS.tolist()


def test_the_real_mnist():
    """Catches a reader that reads only what this file wrote.

    The real data set has 60,000 and 10,000 digits, and its first labels are known."""
    folder = Path(__file__).resolve().parents[2] / "shared/data/mnist"
    if not folder.exists():
        pytest.skip(f"{folder} is not here: the real MNIST files were not given to this checkout")

    train = mnist.load_mnist(folder, "train")
    test = mnist.load_mnist(folder, "test")

    assert train.pixels.shape == (60000, 32, 32, 1)
    assert test.pixels.shape == (10000, 32, 32, 1)
    assert train.labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    # 0.1307 is the mean of MNIST that everybody normalises with.
    assert 0.13 < train.pixels[:, 2:30, 2:30].mean() / 255 < 0.132


# ----------------------------------------------------------------------------- damaged files
def flip(raw, place):
    """The bytes with one of them inverted."""
    changed = bytearray(raw)
    changed[place] ^= 0xFF
    return changed


@gz_or_raw
@pytest.mark.parametrize("damage", ["truncated", "longer", "other", "empty", "flipped"])
def test_damaged_mnist_files(tmp_path, damage, zipped):
    """Catches a traceback, or silently missing digits, after a broken download.

    "other" is a file that is something else: a page of a web server."""
    files = write_mnist(tmp_path, zipped)
    name = "train-images-idx3-ubyte"
    if zipped:
        name += ".gz"
    raw = files[name]

    # Without compression only the header can show a flipped byte: 2 is the place of the type.
    place = len(raw) // 2 if zipped else 2
    damaged = {
        "truncated": raw[:-100],
        "longer": raw + b"more",
        "other": b"<html>not found</html>",
        "empty": b"",
        "flipped": flip(raw, place),
    }
    (tmp_path / name).write_bytes(damaged[damage])

    with pytest.raises(UserError, match=name):
        mnist.load_mnist(tmp_path)


@pytest.mark.parametrize("place", range(10, 60, 3))
def test_a_flipped_bit_in_a_gz_file(tmp_path, place):
    """Catches zlib.error as a traceback: it is neither an OSError nor an EOFError."""
    raw = gzip.compress(idx(LABELS), mtime=0)
    damaged = flip(raw, min(place, len(raw) - 1))
    (tmp_path / "labels.gz").write_bytes(damaged)

    with pytest.raises(UserError, match="labels.gz"):
        mnist.read_idx(tmp_path, "labels")


# ----------------------------------------------------------- whole files that are not MNIST's
def test_mnist_files_that_do_not_belong_together(tmp_path):
    """Catches labels of another split beside the pictures, and a folder without the files."""
    write_mnist(tmp_path / "a", labels=LABELS[:4])

    with pytest.raises(UserError, match="5 images but 4 labels"):
        mnist.load_mnist(tmp_path / "a")

    with pytest.raises(UserError, match="--data-dir must name a folder"):
        mnist.load_mnist(tmp_path / "nowhere")


@pytest.mark.parametrize("images, labels, words", [
    (DIGITS, LABELS + 17, "label 24.*0 to 9"),          # EMNIST's letters are 1 to 26
    (DIGITS, LABELS + 3, "label 10.*0 to 9"),
    (DIGITS, LABELS[:, None], r"labels have the shape \(5, 1\)"),
    (DIGITS[:, :10, :10], LABELS, r"images have the shape \(5, 10, 10\).*28, 28"),
    (DIGITS[0], LABELS, r"images have the shape \(28, 28\)"),
    (DIGITS[:0], LABELS[:0], "hold no images"),
    (LABELS, DIGITS, "exchanged"),
])
@gz_or_raw
def test_idx_files_that_are_not_mnist(tmp_path, zipped, images, labels, words):
    """Catches a traceback, or a training on the wrong thing.

    These idx files are whole, but they hold another data set."""
    write_mnist(tmp_path, zipped, images, labels)

    with pytest.raises(UserError, match=words) as mistake:
        mnist.load_mnist(tmp_path)
    assert str(tmp_path) in str(mistake.value)


# -------------------------------------------------------------------- files that are too large
@gz_or_raw
@pytest.mark.parametrize("shape", [
    (2 ** 31, 2 ** 31, 4),                              # the product is 2^64: 0 in 64 bits
    (2 ** 32 - 1,) * 3,
    (2 ** 29,),
    (1,) * 70,                                          # numpy has at most 64 dimensions
    (),
])
def test_absurd_dimensions(tmp_path, shape, zipped):
    """Catches sizes whose product overflows to 0, and an array that fills the memory.

    Also catches an error in numpy's own words."""
    raw = header(shape) + b"\0"
    if zipped:
        (tmp_path / "images.gz").write_bytes(gzip.compress(raw))
    else:
        (tmp_path / "images").write_bytes(raw)

    with pytest.raises(UserError, match="images.*(promises an array|not an idx file)"):
        mnist.read_idx(tmp_path, "images")


def test_a_gz_file_is_unpacked_no_further_than_it_promises(tmp_path, monkeypatch):
    """Catches a file of kilobytes that unpacks to gigabytes."""
    with gzip.open(tmp_path / "labels.gz", "wb") as file:
        file.write(idx(LABELS) + bytes(2 ** 24))

    sizes = []
    read = gzip.GzipFile.read

    def watched_read(self, size=-1):
        sizes.append(size)
        return read(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read", watched_read)
    with pytest.raises(UserError, match="labels.gz"):
        mnist.read_idx(tmp_path, "labels")

    # Three reads: the four first bytes, the sizes, and the numbers with one byte too many.
    assert len(sizes) == 3
    assert min(sizes) > 0                               # -1 would read to the end
    assert max(sizes) == len(LABELS) + 1


def test_the_largest_idx_file(tmp_path, monkeypatch):
    """Catches a limit that refuses a file of exactly that size, or takes a larger one."""
    (tmp_path / "labels").write_bytes(idx(LABELS))

    monkeypatch.setattr(mnist, "MOST_BYTES", len(LABELS))
    assert mnist.read_idx(tmp_path, "labels").tolist() == LABELS.tolist()

    monkeypatch.setattr(mnist, "MOST_BYTES", len(LABELS) - 1)
    with pytest.raises(UserError, match="promises an array of 5 bytes"):
        mnist.read_idx(tmp_path, "labels")


# -------------------------------------------------------------------------------- the download
def mirror(folder, monkeypatch):
    """A folder that serves a tiny MNIST by file://; returns (its URL, {name: bytes}).

    From then on the checksums of its files are the published ones."""
    files = write_mnist(folder)
    checksums = {}
    for name, raw in files.items():
        checksums[name.removesuffix(".gz")] = hashlib.md5(raw).hexdigest()
    monkeypatch.setattr(mnist, "MNIST_FILES", checksums)
    return folder.as_uri() + "/", files


def files_of(folder):
    """{name: bytes} of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_download_falls_through_to_the_mirror_that_works(tmp_path, monkeypatch):
    """Catches a download that stops at the first mirror.

    One mirror is gone, one serves something else, one is right."""
    good, files = mirror(tmp_path / "good", monkeypatch)
    liar = tmp_path / "liar"
    liar.mkdir()
    for name in files:
        (liar / name).write_bytes(b"<html>please log in</html>")

    out = tmp_path / "out/mnist"
    mirrors = (f"file://{tmp_path}/gone/", liar.as_uri() + "/", good)
    mnist.fetch_mnist(out, mirrors)

    assert files_of(out) == files
    assert (mnist.load_mnist(out).labels == LABELS).all()


@pytest.mark.parametrize("there", [0, 1, 4])
def test_what_is_missing_is_downloaded(tmp_path, monkeypatch, there):
    """Catches a download that stopped after the first file and passes for the whole.

    With four files there, catches a download of what is there already."""
    monkeypatch.chdir(tmp_path)
    names = list(write_mnist(tmp_path / "data/mnist"))
    for name in names[there:]:
        (tmp_path / "data/mnist" / name).unlink()

    downloads = []

    def fetch_mnist(folder):
        downloads.append(folder)
        write_mnist(folder)

    monkeypatch.setattr(mnist, "fetch_mnist", fetch_mnist)
    assert (mnist.load_mnist().labels == LABELS).all()
    assert len(downloads) == (0 if there == 4 else 1)


def test_download_falls_through_a_mirror_that_hangs_up(tmp_path, monkeypatch):
    """Catches http.client's errors, which are not OSErrors, at the end of a download.

    The connection to the first mirror is cut in the middle of a file."""
    good, files = mirror(tmp_path / "good", monkeypatch)
    real = mnist.urllib.request.urlopen

    class HangsUp:
        def read(self):
            raise http.client.IncompleteRead(b"half")

    def urlopen(url, **options):
        if "broken" in url:
            return HangsUp()
        return real(url, **options)

    monkeypatch.setattr(mnist.urllib.request, "urlopen", urlopen)
    mnist.fetch_mnist(tmp_path / "out", ("http://broken/", good))

    assert files_of(tmp_path / "out") == files


def test_download_that_fails_says_so_and_leaves_nothing_wrong_behind(tmp_path, monkeypatch):
    """Catches a file with a wrong checksum that is kept and read later."""
    url, _ = mirror(tmp_path / "good", monkeypatch)
    wrong = dict.fromkeys(mnist.MNIST_FILES, "0" * 32)
    monkeypatch.setattr(mnist, "MNIST_FILES", wrong)

    with pytest.raises(UserError, match="wrong checksum.*--data-dir"):
        mnist.fetch_mnist(tmp_path / "out", (url,))
    assert list((tmp_path / "out").iterdir()) == []
