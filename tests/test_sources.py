"""
test_sources.py: captioned pictures, from a seed, from idx files, from a folder                       (sources/; Transfusion §4.1)

The files that users have, good and bad: each mistake is named, and what can be used is used.
"""
import contextlib
import gzip
import hashlib
import http.client
import json
import os
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile

import model
import train
import vae as vae_module
from config import Config, parse_arguments
from sources import choose, feed, folder, mnist, scenes
from sources.pairs import Pairs, check_room, choose_test, hash_name, print_skipped, split_items
from support import checkpoint, common
from support.common import UserError, crop_and_resize, open_picture


# ---------------------------------------------------------------------------------------------------------------- scenes
def test_scenes_are_what_their_captions_say_and_depend_on_the_seed_only():
    """Catches pictures beside other captions, a test split that repeats the training split, and global random numbers."""
    train, again = (choose.load_pairs("scenes", n=40, seed=5, progress=False) for _ in range(2))
    test = choose.load_pairs("scenes", n=40, seed=5, split="test", progress=False)
    assert train.captions == again.captions and (train.pixels == again.pixels).all()
    assert not {p.tobytes() for p in train.pixels} & {p.tobytes() for p in test.pixels}
    for pairs in (train, test):
        assert pairs.pixels.shape == (40, 32, 32, 3) and pairs.pixels.dtype == np.uint8
        for text, picture in zip(pairs.captions, pairs.pixels):
            assert scenes.holds(scenes.read_caption(text), scenes.parse(picture)), text


def test_held_out_scenes():
    """Catches an evaluation set of unseen pairs that has seen ones in it."""
    pairs = scenes.load_scenes(20, 0, held_out=True, progress=False)
    assert all(any(f"{c} {s}" in text for c, s in scenes.HELD_OUT) for text in pairs.captions)


# ----------------------------------------------------------------------------------------------------------------- MNIST
def idx(array):
    """The bytes of an idx file: two zeros, 8 for uint8, the number of dimensions, their sizes, the numbers."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


DIGITS = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
LABELS = np.array([7, 2, 1, 0, 4])


def write_mnist(folder, zipped=True, images=DIGITS, labels=LABELS):
    """A folder with the four files of a tiny MNIST; returns {name: bytes}."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in mnist.MNIST_FILES:
        raw = idx(images if "images" in name else labels)
        files[name + ".gz" * zipped] = gzip.compress(raw, mtime=0) if zipped else raw
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return files


@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "raw"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_from_files(tmp_path, zipped, split):
    """Catches a wrong header, a transposed picture, a caption that is not the label's, padding on one side only."""
    write_mnist(tmp_path, zipped)
    pairs = mnist.load_mnist(tmp_path, split)
    assert pairs.pixels.shape == (5, 32, 32, 1) and pairs.pixels.dtype == np.uint8
    assert (pairs.pixels[:, 2:30, 2:30, 0] == DIGITS).all()
    frame = pairs.pixels.copy()
    frame[:, 2:30, 2:30] = 0
    assert frame.sum() == 0
    assert pairs.captions == ["the digit seven", "the digit two", "the digit one", "the digit zero", "the digit four"]
    assert pairs.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "raw"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "other", "empty", "flipped"])
def test_damaged_mnist_files(tmp_path, damage, zipped):
    """Catches a traceback, or silently missing digits, where a download broke off or a file is something else."""
    files = write_mnist(tmp_path, zipped)
    name = "train-images-idx3-ubyte" + ".gz" * zipped
    raw = bytearray(files[name])
    flipped = raw.copy()
    flipped[len(raw) // 2 if zipped else 2] ^= 0xFF
    (tmp_path / name).write_bytes({"truncated": raw[:-100], "longer": raw + b"more", "other": b"<html>not found</html>",
                                   "empty": b"", "flipped": flipped}[damage])
    with pytest.raises(UserError, match=name):
        mnist.load_mnist(tmp_path)


@pytest.mark.parametrize("place", range(10, 60, 3))
def test_a_flipped_bit_in_a_gz_file(tmp_path, place):
    """Catches zlib's own error class, which is neither an OSError nor an EOFError, escaping as a traceback."""
    raw = bytearray(gzip.compress(idx(LABELS), mtime=0))
    raw[min(place, len(raw) - 1)] ^= 0xFF
    (tmp_path / "labels.gz").write_bytes(raw)
    with pytest.raises(UserError, match="labels.gz"):
        mnist.read_idx(tmp_path, "labels")


def test_mnist_files_that_do_not_belong_together(tmp_path):
    """Catches labels of another split beside the pictures, and a folder without the files."""
    write_mnist(tmp_path / "a", labels=LABELS[:4])
    with pytest.raises(UserError, match="5 images but 4 labels"):
        mnist.load_mnist(tmp_path / "a")
    with pytest.raises(UserError, match="--data-dir must name a folder"):
        mnist.load_mnist(tmp_path / "nowhere")


@pytest.mark.parametrize("images, labels, words", [
    (DIGITS, LABELS + 17, "label 24.*0 to 9"),                                        # EMNIST's letters are 1 to 26
    (DIGITS, LABELS + 3, "label 10.*0 to 9"),
    (DIGITS, LABELS[:, None], r"labels have the shape \(5, 1\)"),
    (DIGITS[:, :10, :10], LABELS, r"images have the shape \(5, 10, 10\).*28, 28"),
    (DIGITS[0], LABELS, r"images have the shape \(28, 28\)"),
    (DIGITS[:0], LABELS[:0], "hold no images"),
    (LABELS, DIGITS, "exchanged"),
])
@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "raw"])
def test_idx_files_that_are_not_mnist(tmp_path, zipped, images, labels, words):
    """Catches a traceback, or a training on something else, where whole idx files hold another data set."""
    write_mnist(tmp_path, zipped, images, labels)
    with pytest.raises(UserError, match=words) as mistake:
        mnist.load_mnist(tmp_path)
    assert str(tmp_path) in str(mistake.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "raw"])
@pytest.mark.parametrize("shape", [(2 ** 31, 2 ** 31, 4), (2 ** 32 - 1,) * 3, (2 ** 29,), (1,) * 70, ()])
def test_absurd_dimensions(tmp_path, shape, zipped):
    """Catches sizes whose product overflows to 0, an array that fills the memory, and numpy's own words."""
    raw = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + b"\0"
    (tmp_path / f"images{'.gz' * zipped}").write_bytes(gzip.compress(raw) if zipped else raw)
    with pytest.raises(UserError, match="images.*(promises an array|not an idx file)"):
        mnist.read_idx(tmp_path, "images")


def test_a_gz_file_is_unpacked_no_further_than_it_promises(tmp_path, monkeypatch):
    """Catches a file of kilobytes that unpacks to gigabytes."""
    with gzip.open(tmp_path / "labels.gz", "wb") as file:
        file.write(idx(LABELS) + bytes(2 ** 24))
    sizes, read = [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: (sizes.append(size), read(self, size))[1])
    with pytest.raises(UserError, match="labels.gz"):
        mnist.read_idx(tmp_path, "labels")
    assert len(sizes) == 3 and 0 < min(sizes) <= max(sizes) == len(LABELS) + 1


def test_the_largest_idx_file(tmp_path, monkeypatch):
    """Catches a limit that refuses a file of just that size, or takes a larger one."""
    (tmp_path / "labels").write_bytes(idx(LABELS))
    for most, taken in ((len(LABELS), True), (len(LABELS) - 1, False)):
        monkeypatch.setattr(mnist, "MOST_BYTES", most)
        if taken:
            assert mnist.read_idx(tmp_path, "labels").tolist() == LABELS.tolist()
            continue
        with pytest.raises(UserError, match="promises an array of 5 bytes"):
            mnist.read_idx(tmp_path, "labels")


def test_the_real_mnist():
    """Catches a reader that only reads what this file wrote: 60,000 and 10,000 real digits, the first labels known."""
    folder = Path(__file__).resolve().parents[2] / "shared/data/mnist"
    if not folder.exists():
        pytest.skip(f"{folder} is not here: the real MNIST files were not given to this checkout")
    train, test = (mnist.load_mnist(folder, split) for split in ("train", "test"))
    assert train.pixels.shape == (60000, 32, 32, 1) and test.pixels.shape == (10000, 32, 32, 1)
    assert train.labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3] and test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert 0.13 < train.pixels[:, 2:30, 2:30].mean() / 255 < 0.132


def mirror(folder, monkeypatch):
    """A folder that serves a tiny MNIST by file://, whose checksums become the published ones; returns (URL, {name: bytes})."""
    files = write_mnist(folder)
    monkeypatch.setattr(mnist, "MNIST_FILES", {name[:-3]: hashlib.md5(raw).hexdigest() for name, raw in files.items()})
    return folder.as_uri() + "/", files


def test_download_falls_through_to_the_mirror_that_works(tmp_path, monkeypatch):
    """Catches a download that stops at the first mirror: one is gone, one serves something else, one is right."""
    good, files = mirror(tmp_path / "good", monkeypatch)
    liar = tmp_path / "liar"
    liar.mkdir()
    for name in files:
        (liar / name).write_bytes(b"<html>please log in</html>")
    out = tmp_path / "out/mnist"
    mnist.fetch_mnist(out, (f"file://{tmp_path}/gone/", liar.as_uri() + "/", good))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files
    assert (mnist.load_mnist(out).labels == LABELS).all()


@pytest.mark.parametrize("there", [0, 1, 4])
def test_what_is_missing_is_downloaded(tmp_path, monkeypatch, there):
    """Catches a download that was stopped after the first file and is taken for the whole, and one of what is there."""
    monkeypatch.chdir(tmp_path)
    asked = []
    for name in list(write_mnist(tmp_path / "data/mnist"))[there:]:
        (tmp_path / "data/mnist" / name).unlink()
    monkeypatch.setattr(mnist, "fetch_mnist", lambda folder: asked.append(folder) or write_mnist(folder))
    assert (mnist.load_mnist().labels == LABELS).all() and len(asked) == (there < 4)


def test_download_falls_through_a_mirror_that_hangs_up(tmp_path, monkeypatch):
    """Catches http.client's errors (a connection cut in mid-file), which are not OSErrors, ending the download."""
    good, files = mirror(tmp_path / "good", monkeypatch)
    real = mnist.urllib.request.urlopen

    class HangsUp:
        def read(self):
            raise http.client.IncompleteRead(b"half")
    monkeypatch.setattr(mnist.urllib.request, "urlopen", lambda url, **kw: HangsUp() if "broken" in url else real(url, **kw))
    mnist.fetch_mnist(tmp_path / "out", ("http://broken/", good))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == files


def test_download_that_fails_says_so_and_leaves_nothing_wrong_behind(tmp_path, monkeypatch):
    """Catches a file with a wrong checksum that is kept and read later."""
    mirror(tmp_path / "good", monkeypatch)
    monkeypatch.setattr(mnist, "MNIST_FILES", dict.fromkeys(mnist.MNIST_FILES, "0" * 32))
    with pytest.raises(UserError, match="wrong checksum.*--data-dir"):
        mnist.fetch_mnist(tmp_path / "out", ((tmp_path / "good").as_uri() + "/",))
    assert list((tmp_path / "out").iterdir()) == []


# ------------------------------------------------------------------------------------------------------ folder of pictures
def striped(w=60, h=20, mode="RGB"):
    """A wide picture: left third red, middle green, right blue. Its centre square is green."""
    picture = np.zeros((h, w, 3), np.uint8)
    for k in range(3):
        picture[:, k * w // 3: (k + 1) * w // 3, k] = 255
    return Image.fromarray(picture).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "YCbCr", "I", "F", "I;16"])
@pytest.mark.parametrize("w, h", [(60, 20), (20, 60), (7, 5), (16, 16)])
def test_any_picture_becomes_a_square_of_three_channels(mode, w, h):
    """Catches a mode, or a shape, that ends in an error or in another array."""
    picture = crop_and_resize(Image.new(mode, (w, h)), 16)
    assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_centre_crop(mode):
    """Transfusion §4.1, centre-cropped: catches a squeezed picture, or its left end."""
    wide = crop_and_resize(striped(mode=mode), 16)
    high = crop_and_resize(striped(mode="RGB").rotate(90, expand=True).convert(mode), 16)
    for picture in (wide, high):
        assert (np.abs(picture[2:-2, 2:-2].astype(int) - [0, 255, 0]).max(-1) < 8).all()


def test_resize_keeps_the_directions():
    """Catches rows and columns swapped, or a picture turned upside down."""
    corner = np.zeros((40, 40, 3), np.uint8)
    corner[:20, 20:] = 255                              # top right
    small = crop_and_resize(Image.fromarray(corner), 8)
    assert small[1, 6].min() > 250 and max(small[1, 1].max(), small[6, 6].max(), small[6, 1].max()) < 5


def test_transparency_is_laid_on_black():
    """Catches the arbitrary colour that hides under a transparent pixel."""
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert crop_and_resize(clear, 16).max() == 0
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([255, 0, 0] + [0] * 765)
    palette.info["transparency"] = 0
    assert crop_and_resize(palette, 16).max() == 0


def test_sixteen_bit_pictures(tmp_path):
    """Catches 16-bit grey (scanners, microscopes) clipped to white: Pillow's own conversion does that."""
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    picture = open_picture(tmp_path / "deep.png", 32)
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    assert picture[0].max() < 20 and abs(int(picture[16, 16, 0]) - 128) < 10 and picture[-1].min() > 235


def test_exif_rotation(tmp_path):
    """Catches photographs from telephones that lie on their side."""
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, :16] = 255                               # bright on the left; orientation 6 turns it clockwise: bright on top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    turned = open_picture(tmp_path / "photo.jpg", 32)
    assert turned[4].min() > 240 and turned[-4].max() < 15


def png_header(width, height, depth=1):
    """A PNG of black pixels, one bit each: a few kilobytes for millions of them."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    rows = bytes(height * (1 + (width * depth + 7) // 8))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("width, height", [(8001, 8000), (13300, 13300), (60000, 60000)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch, width, height):
    """Catches a file of 21 kB that decodes to 2 GB; also where Pillow warns, and where it raises an error of its own."""
    (tmp_path / "bomb.png").write_bytes(png_header(8001, 8000).replace(struct.pack(">II", 8001, 8000), struct.pack(">II", width, height)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match="bomb.png cannot be read as a picture"):
        open_picture(tmp_path / "bomb.png", 32)


def test_the_limit_is_the_limit(tmp_path, monkeypatch):
    """Catches a picture of just so many pixels that is refused."""
    monkeypatch.setattr(common, "MOST_PIXELS", 400)
    (tmp_path / "20.png").write_bytes(png_header(20, 20))
    (tmp_path / "21.png").write_bytes(png_header(20, 21))
    assert open_picture(tmp_path / "20.png", 8).max() == 0
    with pytest.raises(UserError, match="20x21 pixels"):
        open_picture(tmp_path / "21.png", 8)


def test_pipes_devices_and_folders_are_no_pictures(tmp_path):
    """Catches a program that waits for a pipe forever, or reads /dev/zero to its end."""
    os.mkfifo(tmp_path / "pipe.png")
    for name in (tmp_path / "pipe.png", str(tmp_path / "pipe.png"), "/dev/zero", "/dev/null", tmp_path):
        with pytest.raises(UserError, match=f"{name} cannot be read as a picture.*not a file"):
            open_picture(name, 32)


def exif(tag, kind, count, value):
    """The bytes of an EXIF block with orientation 6 and one more entry. value: 4 bytes."""
    entries = sorted([(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (tag, kind, count, value)])
    ifd = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + ifd + struct.pack("<I", 0)


@pytest.mark.parametrize("entry", [
    (0x0100, 9, 1, struct.pack("<i", -5)), (0x0103, 2, 4, b"abc\0"), (0x0103, 11, 1, struct.pack("<f", 1.5)),
    (0x011A, 2, 4, b"abc\0"), (0x8825, 9, 1, struct.pack("<i", -5))], ids=["negative", "text", "fraction", "ratio", "pointer"])
def test_garbage_in_exif(tmp_path, entry):
    """Catches struct.error and TypeError, which are neither OSErrors nor ValueErrors, ending in a traceback."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photo.jpg", exif=exif(*entry))
    with pytest.raises(UserError, match="photo.jpg cannot be read as a picture"):
        open_picture(tmp_path / "photo.jpg", 32)


def test_a_dds_of_an_unknown_kind(tmp_path):
    """Catches Pillow's NotImplementedError."""
    header = struct.pack("<7I", 124, 0x1007, 32, 32, 0, 0, 0) + bytes(44) + struct.pack("<2I4s10I", 32, 4, b"ABCD", *[0] * 5, 0x1000, *[0] * 4)
    (tmp_path / "texture.dds").write_bytes(b"DDS " + header + bytes(5000))
    with pytest.raises(UserError, match="texture.dds cannot be read as a picture"):
        open_picture(tmp_path / "texture.dds", 32)


@pytest.mark.filterwarnings("ignore::UserWarning")       # Pillow's, of damaged TIFFs
@pytest.mark.parametrize("kind", ["AVIF", "PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damaged_pictures_of_any_type(tmp_path, kind):
    """Catches a decoder's own error. A damaged picture is either read, or named."""
    Image.fromarray(DIGITS[0]).convert("RGB").save(tmp_path / "whole", kind)
    whole = (tmp_path / "whole").read_bytes()
    refused = 0
    for place in range(0, len(whole), 1 + len(whole) // 150):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            assert open_picture(tmp_path / "damaged", 8).shape == (8, 8, 3)
        except UserError as problem:
            assert "damaged cannot be read as a picture" in str(problem)
            refused += 1
    assert refused > 0


def write_folder(folder, n=12, extra=()):
    """A folder of n small pictures of different sizes and types, with captions.jsonl; extra: more lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(n):
        name = f"{k}.{('png', 'jpg', 'gif', 'bmp')[k % 4]}"
        picture = Image.new("RGB", (20 + 3 * k, 40 - k), (10 * k, 255 - 10 * k, 128))
        picture.save(folder / name, **({"quality": 95} if name.endswith("jpg") else {}))
        lines.append(json.dumps({"image": name, "caption": f"Picture  number {k % 3}"}))
    (folder / "captions.jsonl").write_text("\n".join([*lines, *extra]) + "\n\n", encoding="utf-8")
    return folder


def test_folder_of_pictures(tmp_path):
    """Catches captions beside other pictures or lines, a test split inside the training split, and double spaces."""
    write_folder(tmp_path, 21)
    train, test = (choose.load_pairs("folder", tmp_path, 16, split) for split in ("train", "test"))
    numbers = []
    for pairs in (train, test):
        assert pairs.pixels.shape == (len(pairs.captions), 16, 16, 3)
        for caption, picture, line in zip(pairs.captions, pairs.pixels, pairs.lines, strict=True):
            k = round(picture[..., 0].mean() / 10)
            assert np.abs(picture.reshape(-1, 3).mean(0) - [10 * k, 255 - 10 * k, 128]).max() < 4
            assert caption == f"Picture number {k % 3}" and line.endswith(f"captions.jsonl line {k + 1}")
            numbers.append(k)
    assert sorted(numbers) == list(range(21)) and 1 <= len(test.captions) <= 6
    assert train.vocabulary() == test.vocabulary() == {"Picture", "number", "0", "1", "2"}


def splits_of(folder):
    """{name of a picture: the splits that have it} of a folder whose captions are the pictures' names."""
    splits = {}
    for split in ("train", "test"):
        for caption in choose.load_pairs("folder", folder, 8, split).captions:
            splits.setdefault(caption.split()[0], set()).add(split)
    return splits


def write_named(folder, names, each=1):
    """A folder whose captions are the pictures' names, each said `each` times."""
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), "red").save(folder / name)
    lines = [json.dumps({"image": name, "caption": f"{name} {k}"}) for name in names for k in range(each)]
    (folder / "captions.jsonl").write_text("\n".join(lines))


def test_all_captions_of_a_picture_are_in_one_split(tmp_path):
    """Catches test pictures that were trained on: with five lines for each, every tenth line took them all."""
    write_named(tmp_path, [f"{k}.png" for k in range(16)], each=5)
    splits = splits_of(tmp_path)
    assert len(splits) == 16 and all(len(found) == 1 for found in splits.values())
    assert {"train"} in splits.values() and {"test"} in splits.values()


def test_a_picture_that_is_added_moves_no_other_into_the_test_split(tmp_path):
    """Catches a split by place in the list: one line on top, and a resumed run is measured on what it has learned."""
    names = [f"{k}.png" for k in range(12)]
    write_named(tmp_path, names)
    before = splits_of(tmp_path)
    for new in ("new.png", "a/../x.png", "z.png", "00.png", "cat 7.png"):
        (tmp_path / "a").mkdir(exist_ok=True)
        names.insert(0, new)
        write_named(tmp_path, names)
        now = splits_of(tmp_path)
        assert not [name for name in before if before[name] == {"train"} and now[name] == {"test"}]
        before = now


def test_a_tenth_is_the_test_split_whatever_the_order_of_classes(tmp_path):
    """Catches ten classes in turn: every tenth line is one class, which was never trained."""
    write_named(tmp_path, [f"{'abcdefghij'[k % 10]}{k}.png" for k in range(400)])
    splits = splits_of(tmp_path)
    tested = [name[0] for name, found in splits.items() if found == {"test"}]
    assert 20 <= len(tested) <= 60 and len(set(tested)) >= 8


def test_a_sorted_folder_comes_in_a_random_order_that_is_always_the_same(tmp_path):
    """Catches a probe, or a VAE's scale, of the first few of a folder that is sorted by caption: they are all alike."""
    write_named(tmp_path, [f"{'ab'[k >= 100]}{k}.png" for k in range(200)])
    one, two = (choose.load_pairs("folder", tmp_path, 8) for _ in range(2))
    assert one.captions == two.captions != sorted(one.captions)
    assert 20 <= sum(caption.startswith("a") for caption in one.captions[:64]) <= 44


def test_the_probe_has_each_picture_once(tmp_path):
    """Catches a "wrong" caption that is another one of the very picture: the gap would say that captions are ignored."""
    vae = vae_module.VAE(vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    pairs = Pairs("folder", [f"{k} {n}" for n in range(3) for k in range(4)], np.concatenate([pixels] * 3))
    captions, latents, _ = feed.probe(pairs, vae, 100)
    assert captions == ["0 0", "1 0", "2 0", "3 0"] and len(latents) == 4
    assert feed.probe(pairs, vae, 2)[0] == ["0 0", "1 0"]


def test_bad_pictures_are_counted_named_and_skipped(tmp_path, capsys):
    """Catches one bad file among thousands that ends the run, vanishes without a word, or shifts the captions."""
    lines = [json.dumps({"image": name, "caption": "bad"}) for name in ("text.png", "cut.png", "absent.png", "folder.png")]
    write_folder(tmp_path, 12, lines)
    (tmp_path / "text.png").write_text("not a picture")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.png").mkdir()
    pairs = folder.load_folder(tmp_path, 16)
    said = capsys.readouterr().out
    assert len(pairs.captions) == len(pairs.pixels) == len(pairs.lines) > 5 and "bad" not in pairs.captions
    assert len(pairs.captions) + len(folder.load_folder(tmp_path, 16, "test").captions) == 12
    assert "skipped 4 of 16" in said and all(name in said for name in ("text.png", "cut.png", "absent.png", "folder.png"))


@pytest.mark.parametrize("line", ["{not json", '{"image": "0.png"}', '{"caption": "a cat"}', '["0.png", "a cat"]', "7", "null",
                                  '{"image": null, "caption": "a cat"}', '{"image": "0.png", "caption": null}'])
def test_broken_caption_lines_are_named(tmp_path, line):
    """Catches a mistake in line 13 that is reported without its number, or trained on (null becomes the word "none")."""
    write_folder(tmp_path, 12, [line])
    with pytest.raises(UserError, match="captions.jsonl line 13"):
        folder.load_folder(tmp_path, 16)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"image": "0.png", "caption": ' + "[" * 100_000, '{"image": "0.png", "caption": ' + "9" * 5000 + "}"],
                         ids=["nested", "nested value", "long number"])
def test_json_that_python_cannot_read(tmp_path, line):
    """Catches RecursionError, and a limit of Python's own, as a traceback or without the line's number."""
    write_folder(tmp_path, 12, [line])
    with pytest.raises(UserError, match="captions.jsonl line 13 is not"):
        folder.load_folder(tmp_path, 16)


def test_numbers_that_are_no_float():
    """Catches a log with a number of 401 digits that ends in an OverflowError where it is drawn."""
    assert common.load_json("[1, -7, 18446744073709551616]") == [1, -7, 2 ** 64]
    for text in (str(10 ** 400), f'{{"loss": {-10 ** 308}}}'):
        with pytest.raises(ValueError, match="it has a number of (401|310) digits"):
            common.load_json(text)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"], ids=ascii)
def test_lines_end_at_a_newline_alone(tmp_path, mark):
    """Catches splitlines(), which cuts in the middle of a caption; JSON allows these marks in a string, the last two escaped."""
    caption = json.dumps(mark)[1:-1] if mark < " " else mark
    write_folder(tmp_path, 10, ['{"image": "0.png", "caption": "a cat' + caption + 'on a mat"}'])
    assert "a cat on a mat" in folder.load_folder(tmp_path, 16).language


def test_a_bom_and_the_line_ends_of_windows(tmp_path):
    """Catches the invisible mark that Windows puts at a file's start: it made the first line unreadable."""
    write_folder(tmp_path, 10)
    lines = (tmp_path / "captions.jsonl").read_text().replace("\n", "\r\n")
    (tmp_path / "captions.jsonl").write_text("\ufeff" + lines, encoding="utf-8", newline="")
    assert folder.load_folder(tmp_path, 16).language == [f"Picture number {k % 3}" for k in range(10)]


@pytest.mark.parametrize("caption, problem", [
    ("", "line 13: the caption is empty"), ("  ", "line 13: the caption is empty"), ("\n", "line 13: the caption is empty"),
    ("\u3000", "line 13: the caption is empty"), ("a\0cat", "line 13 has a NUL character"), ("a \ud83d", "line 13 has half a character")],
    ids=ascii)
def test_captions_that_say_nothing_are_counted_named_and_skipped(tmp_path, capsys, caption, problem):
    """Catches a picture that is trained on without words as if it had some, and characters that cannot be printed or encoded."""
    write_folder(tmp_path, 12, [json.dumps({"image": "0.png", "caption": caption})])
    pairs = folder.load_folder(tmp_path, 16)
    assert len(pairs.language) == 12 and caption not in pairs.language
    assert "skipped 1 of 13 pictures" in (said := capsys.readouterr().out) and problem in said


def test_captions_in_other_scripts(tmp_path):
    """Catches a reader that takes the machine's own encoding (on Windows not UTF-8), and bytes that are no text at all."""
    write_folder(tmp_path, 10, [json.dumps({"image": "0.png", "caption": "ein Kätzchen 猫"}, ensure_ascii=False)])
    assert "ein Kätzchen 猫" in folder.load_folder(tmp_path, 16).language
    (tmp_path / "captions.jsonl").write_bytes(b"\xff\xfe\x00\x01\n")
    with pytest.raises(UserError, match="captions.jsonl"):
        folder.load_folder(tmp_path, 16)


def test_folders_that_cannot_be_used(tmp_path):
    """Catches a missing file, or nine pictures (no test split), found out in the middle of a run."""
    with pytest.raises(UserError, match="captions.jsonl is missing"):
        folder.load_folder(tmp_path)
    with pytest.raises(UserError, match="--data folder needs --data-dir"):
        choose.load_pairs("folder")
    write_folder(tmp_path, 9)
    for split in ("train", "test"):
        with pytest.raises(UserError, match="9 usable pictures with captions, or 9 where those that share a picture count once: it needs at least ten"):
            folder.load_folder(tmp_path, 16, split)
    write_named(tmp_path / "one", ["only.png"], each=20)
    with pytest.raises(UserError, match="20 usable .* or 1 where .* two that share none"):
        folder.load_folder(tmp_path / "one", 16)


# ---------------------------------------------------------------------------------------- what training says of a folder
@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A function that trains one step of a tiny model on a folder; further options come last."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    vae = vae_module.VAE(vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2))
    checkpoint.save(tmp_path / "vae.pt", checkpoint.pack_vae(vae))

    def train_on(folder, *options, data="folder"):
        train.main([str(word) for word in (
            "--data", data, "--data-dir", folder, "--vae", tmp_path / "vae.pt", "--image-size", 16, "--patch", 1, "--seq-len", 48,
            "--documents", 2, "--samples", 0, "--steps", 1, "--out", tmp_path / "run", *options)])
    return train_on


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_caption_that_is_too_long_is_named_before_any_work(tmp_path, monkeypatch, tiny, split):
    """Catches a run that ends at its first gap, after the VAE was trained, over a caption of the test split; and no line's number."""
    folder = write_folder(tmp_path / "mine", 20)
    line = choose.load_pairs("folder", folder, 16, split).lines[0]
    lines = (folder / "captions.jsonl").read_text().split("\n")
    k = int(line.split()[-1]) - 1
    lines[k] = json.dumps({**json.loads(lines[k]), "caption": "number " * 90})
    (folder / "captions.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(vae_module, "encode_all", lambda *_: pytest.fail("worked before it looked"))
    with pytest.raises(UserError, match=f"{line}: a caption of 90 tokens is too long; the longest document takes 110 positions.*"
                                        f"context of 48: shorten it"):
        tiny(folder)


def test_an_instruction_that_is_too_long_is_named(tmp_path, tiny):
    """Catches the same of edits.jsonl, and how many others there are."""
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = []
    for k in range(20):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / f"{k}.png")
        text = "make it red " * (30 if k in (3, 7) else 1)
        lines.append(json.dumps({"before": f"{k}.png", "instruction": text, "after": f"{k}.png"}))
    (folder / "edits.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="edits.jsonl line (4|8): a caption of 90 tokens is too long"):
        tiny(folder, "--patch", 2, "--init", "", data="edits")


def test_what_has_changed_in_the_data_is_named_at_resume(tmp_path, tiny):
    """Catches words that move to other ids without a sentence, and test pictures that have become training pictures."""
    folder = write_folder(tmp_path / "mine", 20)
    tiny(folder)
    whole = (folder / "captions.jsonl").read_text()
    line = int(choose.load_pairs("folder", folder, 16).lines[0].split()[-1]) - 1

    def write(change):
        lines = whole.split("\n")
        lines[line] = json.dumps(change(json.loads(lines[line])))
        (folder / "captions.jsonl").write_text("\n".join(lines))

    for change, words in [
            (lambda entry: {**entry, "caption": "Picture numbre 1"}, "words, captions .*new: numbre"),
            (lambda entry: {**entry, "caption": "number number 1"}, "captions .*, now "),
            (lambda entry: {**entry, "image": "7.bmp" if entry["image"] != "7.bmp" else "3.bmp"}, ".*pixels .*, now ")]:
        write(change)
        with pytest.raises(UserError, match=f"run has learned from other data; what differs: {words}.*--out"):
            tiny(folder, "--resume")
    (folder / "captions.jsonl").write_text(json.dumps({"image": "7.bmp", "caption": "one more"}) + "\n" + whole)
    with pytest.raises(UserError, match="words, pictures, .*new: more, one"):
        tiny(folder, "--resume")
    kept = json.loads((tmp_path / "run/config.json").read_text())
    del kept["learned"]
    (tmp_path / "run/config.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match="earlier version"):
        tiny(folder, "--resume")


def test_the_same_data_may_lie_elsewhere_at_resume(tmp_path, monkeypatch, tiny):
    """Catches a resume that is refused because the folder is named by another path, or was moved."""
    folder = write_folder(tmp_path / "mine", 20)
    tiny(folder)
    monkeypatch.chdir(tmp_path)
    tiny("./mine", "--resume")
    folder.rename(tmp_path / "moved")
    tiny("moved", "--resume")


def test_captions_that_all_say_the_same_have_no_gap(tmp_path, tiny, capsys):
    """Catches a gap of 0.000, "the caption is ignored", where nothing could be compared; capitals are no difference to Words."""
    folder = write_folder(tmp_path / "mine", 20)
    lines = [json.dumps({**json.loads(line), "caption": ("A cat", "a  cat")[k % 2]})
             for k, line in enumerate((folder / "captions.jsonl").read_text().split("\n")) if line]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    tiny(folder, "--samples", 2, "--sample-steps", 1)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().split("\n") if line]
    assert [row["gap"] for row in rows] == [None]
    assert json.loads((tmp_path / "run/report.json").read_text())["conditioning_gap"] is None
    assert "cannot be measured: all unseen captions say the same" in capsys.readouterr().out


@pytest.mark.parametrize("names, words", [("a" * 9, "9 usable things, or 1 where"), ("a" * 10, "10 usable things, or 1 where"),
                                          ("ab" * 4 + "a", "9 usable things, or 2 where")])
def test_how_few_are_enough(names, words):
    """Catches ten that are refused, and nine that are not: ten of two pictures are the least."""
    with pytest.raises(UserError, match=words):
        split_items("here", list(names), "train", "things")
    parts = [split_items("here", list("a" * 9 + "b"), split, "things") for split in ("train", "test")]
    assert sorted(parts[0] + parts[1]) == list(range(10)) and min(len(part) for part in parts) > 0


def test_of_a_few_pictures_one_is_for_the_test():
    """Catches a small folder that has no test picture, or hardly any other."""
    names = [name for name in map(str, range(99)) if hash_name(name) % 10 != 0]       # none is of the tenth
    for n in (2, 9, 60):
        assert choose_test(set(names[:n])) == {min(names[:n], key=hash_name)}


def test_five_problems_are_named(capsys):
    """Catches "..." where all are named, and hundreds of sentences."""
    for n in (0, 5, 6):
        print_skipped("here", [f"p{k}" for k in range(n)], 99, "things")
    assert capsys.readouterr().out.splitlines() == ["here: skipped 5 of 99 things: p0; p1; p2; p3; p4",
                                                    "here: skipped 6 of 99 things: p0; p1; p2; p3; p4 ..."]


@pytest.mark.parametrize("size", [32, 256])
def test_two_gigabytes_of_pictures_are_the_most(size):
    """Catches pictures that are counted in other units than bytes of three colours."""
    most = 2 ** 31 // (size * size * 3)
    check_room(most, size)
    with pytest.raises(UserError, match=f"{most + 1:,} pictures of {size}x{size} would take 2.0 GB .* at most {most:,}"):
        check_room(most + 1, size)


# -------------------------------------------------------------------------------------------------- a source by its name
@pytest.mark.parametrize("name", ["bars", "Scenes", "", "mnits", None])
def test_an_unknown_source_gets_a_sentence(name):
    """Catches StopIteration or KeyError where a name is misspelt, and a sentence that does not name the choices."""
    with pytest.raises(UserError, match="no data set .*scenes, mnist, folder, documents, edits.*SOURCES"):
        choose.load_pairs(name)


def test_a_source_of_your_own_is_a_function_and_a_line(monkeypatch):
    """Catches a second table that a fork must find, and a source that is not told what it may need."""
    def load_bars(size=32, split="train", n=10, **unused):
        assert set(unused) == {"folder", "seed", "categories", "progress"}
        return Pairs("bars", [f"{split} bar"] * n, np.zeros((n, size, size, 3), np.uint8))

    monkeypatch.setitem(choose.SOURCES, "bars", load_bars)
    drawn = choose.load_pairs("bars", size=20, split="test", n=3)
    assert drawn.captions == ["test bar"] * 3 and drawn.pixels.shape == (3, 20, 20, 3)
    config = Config(data="bars", image_size=24, pairs=7)
    assert len(choose.load_source(config).captions) == 7 and choose.load_source(config, "test", 2).pixels.shape == (2, 24, 24, 3)


def test_a_source_gets_what_the_run_says(monkeypatch):
    """Catches an option of the run that does not reach its source, bars for the test split, and defaults that are not a run's."""
    for name in ("scenes", "mnist"):
        monkeypatch.setitem(choose.SOURCES, name, lambda **given: given)
    given = choose.load_source(Config(data="mnist", data_dir="there", image_size=24, pairs=7, seed=3, world="one"))
    assert given == dict(folder="there", size=24, split="train", n=7, seed=3, categories=scenes.WORLDS["one"], progress=True)
    assert choose.load_source(Config(), "test", progress=True)["progress"] is False
    assert choose.load_source(Config(), progress=False)["progress"] is False and choose.load_source(Config())["folder"] is None
    plain, run = choose.load_pairs("scenes"), Config()
    assert (plain["size"], plain["n"], plain["seed"]) == (run.image_size, run.pairs, run.seed)


@pytest.mark.parametrize("side, channels, fits", [(32, 3, True), (32, 1, False), (30, 3, False), (30, 1, False)])
def test_a_vae_reads_pictures_of_its_channels_and_sides(side, channels, fits):
    """Catches grey pictures for a VAE of colours, found out in the first step, and sides that it cannot halve."""
    source = SimpleNamespace(pixels=np.zeros((1, side, side, channels), np.uint8))
    config = SimpleNamespace(data="folder", codes=0)
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match=f"has {channels} channels and {side} pixels"):
        feed.check_vae(config, vae_module.VAEConfig(), source)


@pytest.mark.parametrize("name, patch", [("transfusion", 2), ("chameleon", 1)])
def test_a_chameleon_has_a_code_for_every_place(name, patch):
    """Catches patches of codes, and pictures that are not cut into patches."""
    config = parse_arguments([])[0]
    config.model, config.patch = name, 2
    assert feed.shape_of(config, 30, (4, 8, 8), None).patch == patch


def test_half_of_the_pictures_to_look_at_are_unseen():
    """Catches more pictures than were asked for: each costs seconds of every save."""
    source = SimpleNamespace(to_draw=lambda: [(["a", "circle"], 0)] * 9, pixels=None)
    found = feed.Feed.prompts(SimpleNamespace(source=source, test=source, vae=None), 4)
    assert found == [("a circle", ["a", "circle"])] * 2 + [("unseen: a circle", ["a", "circle"])] * 2
