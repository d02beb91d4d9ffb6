"""
test_sources.py: captioned pictures, from a seed, from idx files, from a folder                       (sources/; Transfusion §4.1)

The files that users have, good and bad: each mistake is named, and what can be used is used.
"""
import gzip
import hashlib
import http.client
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sources import choose, folder, mnist, scenes
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
    """Catches captions beside other pictures, a test split inside the training split, capital letters and double spaces."""
    write_folder(tmp_path, 21)
    train, test = (choose.load_pairs("folder", tmp_path, 16, split) for split in ("train", "test"))
    assert train.pixels.shape == (19, 16, 16, 3) and test.pixels.shape == (2, 16, 16, 3)
    for pairs, numbers in ((train, [k for k in range(21) if k % 10 != 9]), (test, [9, 19])):
        assert pairs.captions == [f"picture number {k % 3}" for k in numbers]
        for k, picture in zip(numbers, pairs.pixels):
            assert np.abs(picture.reshape(-1, 3).mean(0) - [10 * k, 255 - 10 * k, 128]).max() < 4
    assert train.vocabulary() == {"picture", "number", "0", "1", "2"}


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
    assert len(pairs.captions) == len(pairs.pixels) == 11 and "bad" not in pairs.captions
    assert "skipped 4 of 16" in said and all(name in said for name in ("text.png", "cut.png", "absent.png", "folder.png"))


@pytest.mark.parametrize("line", ["{not json", '{"image": "0.png"}', '{"caption": "a cat"}', '["0.png", "a cat"]', "7", "null",
                                  '{"image": null, "caption": "a cat"}', '{"image": "0.png", "caption": null}'])
def test_broken_caption_lines_are_named(tmp_path, line):
    """Catches a mistake in line 13 that is reported without its number, or trained on (null becomes the word "none")."""
    write_folder(tmp_path, 12, [line])
    with pytest.raises(UserError, match="captions.jsonl line 13"):
        folder.load_folder(tmp_path, 16)


def test_captions_in_other_scripts(tmp_path):
    """Catches a reader that takes the machine's own encoding (on Windows not UTF-8), and bytes that are no text at all."""
    write_folder(tmp_path, 10, [json.dumps({"image": "0.png", "caption": "ein Kätzchen 猫"}, ensure_ascii=False)])
    assert "ein kätzchen 猫" in folder.load_folder(tmp_path, 16).captions
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
    with pytest.raises(UserError, match="at least ten"):
        folder.load_folder(tmp_path, 16, "test")
