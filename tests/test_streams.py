"""
test_streams.py: where packed items come from           (scale/streams.py; Transfusion §4.1 "Data")

THE IDEA    Folders with captions.jsonl, tars in webdataset's layout, lines of text and of JSON,
            each read as a stream. Among millions of items some are bad: they are counted, named and
            skipped. What would be silently wrong, such as a mask that is taken for a picture, or
            text in UTF-16, must be refused.
TRY IT      pytest -n 0 tests/test_streams.py
"""
import json
import tarfile

import numpy as np
import pytest
import torch

import vae as vae_module
from packing import (
    command,
    picture,
    stored_pairs,
    stored_texts,
    write_json_lines,
    write_tar,
)
from scale import pack, shards, streams
from support.common import UserError, open_picture


# ----------------------------------------------------------------------------- every kind of source
def write_sources(place):
    """Make one of each kind of source, with good and bad items. Returns the paths (texts, folder of
    pictures, folder of tars)."""
    folder = place / "folder"
    folder.mkdir()
    (folder / "red.png").write_bytes(picture("red", size=(90, 40)))
    (folder / "cut.png").write_bytes(picture("red")[:50])
    write_json_lines(folder / "captions.jsonl", [
        {"image": "red.png", "caption": "All Red"},
        {"image": "cut.png", "caption": "cut"},                     # bad: half a file
        {"image": "no.png", "caption": "no"},                       # bad: no file
        {"caption": "nothing"},                                     # bad
        {"image": "red.png", "caption": "  "},                      # bad: an empty caption
        {"image": "red.png", "caption": "red again"},
        {"image": "red.png", "caption": "very " * 60},              # bad: too long
    ])

    tars = place / "tars"
    tars.mkdir()
    write_tar(tars / "0.tar", [
        ("b/1.jpg", picture("blue", "JPEG")),
        ("b/1.txt", b"blue one"),
        ("b/2.json", b'{"caption": "green two"}'),
        ("b/2.x.png", b""),                                         # not its picture: see below
        ("b/2.png", picture("lime")),
        ("b/3.jpg", picture("red", "JPEG")),                        # bad: no caption
        ("b/4.jpg", b"not a picture"),                              # bad
        ("b/4.txt", b"four"),
    ])

    texts = place / "texts"
    texts.mkdir()
    lines = b"One line\n\ntwo lines, really\n" + b"\xff\xfe bad\n"          # the last is no UTF-8
    (texts / "a.txt").write_bytes(lines)
    (texts / "b.jsonl").write_text('{"text": "from json"}\n\n{"words": "no"}\nnot json\n'
                                   '{"text": 7}\n{"text": "last"}')
    return texts, folder, tars


def test_sources(vae_path, tmp_path, capsys):
    """Catches an item of any kind of source that is lost or read otherwise, a bad one that is not
    counted, named and skipped, and pictures that reach the VAE otherwise than open_picture crops
    them."""
    texts, folder, tars = write_sources(tmp_path)
    total = pack.main(command(vae_path, tmp_path / "packed", text=texts, pairs=[folder, tars],
                              another=0))
    output = capsys.readouterr().out
    stream = shards.Shards(tmp_path / "packed")

    # 1. What is good is there.
    wanted = ["from json", "last", "one line", "two lines, really"]
    assert sorted(stored_texts(stream, "text")) == wanted
    wanted = ["all red", "blue one", "green two", "red again"]
    assert sorted(stored_texts(stream, "pairs")) == wanted

    # 2. What is bad was counted and named: 4 of the texts, 5 of the folder, 2 of the tar.
    assert total["skipped"] == 4 + 5 + 2
    assert "skipped 11" in output
    assert "a.txt line 4" in output
    assert "b.jsonl line 3" in output
    header = json.loads((tmp_path / "packed/pairs-000000/header.json").read_text())
    names = ["cut.png", "no.png", "captions.jsonl line 4", "the caption is empty", "60 tokens"]
    for name, problem in zip(names, header["problems"], strict=True):
        assert name in problem
        assert "BytesIO" not in problem

    # 3. The latent is that of the picture as it is opened anywhere else.
    vae = stream.load_vae()
    pixels = np.stack([open_picture(folder / "red.png", 32)])
    with torch.no_grad():
        mean, _ = vae.encode(vae_module.to_float(pixels))
    latents = {}
    for ids, latent in stored_pairs(stream):
        latents[stream.tokenizer.decode(ids)] = latent
    np.testing.assert_allclose(latents["all red"], mean[0], rtol=2 ** -10, atol=1e-4)
    assert not np.allclose(latents["blue one"], latents["green two"], atol=0.05)


@pytest.mark.parametrize("names", [
    ["a.txt", "a.txt"],
    ["a.txt", "./a.txt"],
    ["scenes", "scenes"],
    [".", "a.txt"],
    ["a.txt", "link.txt"],
])
def test_a_source_that_is_named_twice(tmp_path, monkeypatch, names):
    """Catches documents that count double, or one of two sources that vanishes, without a word."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one\n")
    if "link.txt" in names:
        (tmp_path / "link.txt").symlink_to("a.txt")

    second = names[1].strip("./")
    with pytest.raises(UserError, match=f"--text names .*{second} twice"):
        streams.find_sources("text", names, 5)


def test_scenes_come_in_groups(monkeypatch):
    """Catches a last group that is as large as the others: more pairs than were asked for."""
    monkeypatch.setattr(streams, "SCENES_AT_ONCE", 4)
    items = list(streams.scenes_of("pairs", "one", 6, 32))
    assert [so_far for so_far, _ in items] == [1, 2, 3, 4, 5, 6]

    # Fewer scenes are the first of more.
    captions = [read()[0] for _, read in items]
    first = [read()[0] for _, read in streams.scenes_of("pairs", "one", 4, 32)]
    assert captions[:4] == first


# --------------------------------------------------------------------------------------------- tars
def test_bad_members_of_a_tar_are_named(tmp_path):
    """Catches a picture that is named as <BytesIO object> and not by tar and stem, and a truncated
    tar that does not stop the packing, or is not named itself."""
    path = write_tar(tmp_path / "0.tar", [
        ("1.jpg", b"no picture"),
        ("1.txt", b"one"),
        ("2.png", picture("red")),
        ("2.txt", b"two"),
    ])

    assert len(list(streams.members_of(path, 32))) == 2
    items = streams.members_of(path, 32)
    text, pixels = next(items)[1]()
    assert text == "one"
    with pytest.raises(UserError, match="0.tar:1.jpg cannot be read"):
        pixels()
    text, pixels = next(items)[1]()
    assert text == "two"
    assert pixels().shape == (32, 32, 3)

    path.write_bytes(path.read_bytes()[:1800])
    with pytest.raises(UserError, match="0.tar is truncated"):
        list(streams.members_of(path, 32))
    path.write_text("no tar at all")
    with pytest.raises(UserError, match="0.tar is truncated or not a tar"):
        list(streams.members_of(path, 32))


def test_of_several_pictures_of_a_name_the_plain_one_is_meant(tmp_path):
    """Catches masks that are packed as the pictures, because the last file of a kind won, and a
    guess where nothing is plain."""
    red = picture("red")
    blue = picture("blue")
    path = write_tar(tmp_path / "0.tar", [
        # Beside a.png and a.txt, other files of the name are no matter.
        ("a.seg.png", blue),
        ("a.png", red),
        ("a.depth.jpg", blue),
        ("a.txt", b"one"),
        ("a.json", b'{"caption": "not this"}'),
        ("b.png", red),
        ("b.long.txt", b"not this"),
        ("b.txt", b"two"),
        # The only picture is meant, whatever its name.
        ("c.seg.png", red),
        ("c.txt", b"three"),
        # Not clear: two masks, two pictures, two captions.
        ("d.seg.png", red),
        ("d.depth.png", red),
        ("d.txt", b"four"),
        ("e.png", red),
        ("e.jpg", red),
        ("e.txt", b"five"),
        ("f.png", red),
        ("f.txt", b"six"),
        ("f.txt", b"six again"),
    ])

    texts = []
    problems = []
    for _, read in streams.members_of(path, 8):
        try:
            text, pixels = read()
            texts.append(text)
            assert pixels()[4, 4].tolist() == [255, 0, 0]           # red
        except UserError as problem:
            problems.append(str(problem))

    assert texts == ["one", "two", "three"]
    names = ["d.seg.png, d.depth.png", "e.png, e.jpg", "f.txt, f.txt"]
    for problem, both in zip(problems, names, strict=True):
        assert both in problem
        assert "not clear" in problem


# --------------------------------------------------------------------------------------------- text
@pytest.mark.parametrize("encoding, sentence", [
    ("utf-16", "is text in UTF-16"),
    ("utf-32", "is text in UTF-16"),
    ("utf-16-be", "begins with a zero byte"),
    ("utf-16-le", "NUL|nothing in .* can be used"),
])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_in_utf_16(tmp_path, name, encoding, sentence):
    """Catches words with a NUL behind each letter, packed as if they were text."""
    text = "one two\nthree four\n"
    if name == "a.jsonl":
        text = '{"text": "one two"}\n{"text": "three"}\n'
    (tmp_path / name).write_bytes(text.encode(encoding))

    with pytest.raises(UserError, match=sentence):
        pack.main(command(None, tmp_path / "out", text=tmp_path / name, pairs=None))
    assert not list(tmp_path.glob("out/text*"))


def test_a_bom_at_the_start_of_a_text(tmp_path):
    """Catches a word "\\ufeffone" in the vocabulary: some editors begin a file with these bytes."""
    bom = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(bom + b"one two\nthree\n")
    (tmp_path / "b.jsonl").write_bytes(bom + b'{"text": "one two"}\n')
    for name in ("a.txt", "b.jsonl"):
        _, read = next(streams.items_of("text", str(tmp_path / name), None))
        assert read() == ("one two", None)

    members = [("1.png", picture("red")), ("1.txt", bom + b"one two")]
    path = write_tar(tmp_path / "c.tar", members)
    items = streams.members_of(path, 8)                 # keeps the tar open
    _, read = next(items)
    text, _ = read()
    assert text == "one two"


def test_a_line_or_a_member_of_gigabytes(tmp_path, monkeypatch):
    """Catches a file without a line's end, or a sparse member of a tar, that fills the memory. The
    next line is read."""
    monkeypatch.setattr(streams, "MOST_BYTES", 10)

    # 1. Lines of 95, 9, 10 and 10 bytes. With its end, the third has 11.
    lines = "x" * 95 + "\n123456789\n" + "y" * 10 + "\n" + "z" * 10
    (tmp_path / "a.txt").write_text(lines)
    items = list(streams.items_of("text", str(tmp_path / "a.txt"), None))
    assert [so_far for so_far, _ in items] == [96, 106, 117, 127]
    for k in (0, 2):
        with pytest.raises(UserError, match=f"a.txt line {k + 1} is longer than 10 bytes"):
            items[k][1]()
    texts = [items[k][1]()[0] for k in (1, 3)]
    assert texts == ["123456789", "z" * 10]

    # 2. A member that is large.
    members = [("1.png", picture("red")), ("1.txt", b"one")]
    path = write_tar(tmp_path / "c.tar", members)
    items = streams.members_of(path, 8)
    text, pixels = next(items)[1]()
    assert text == "one"
    with pytest.raises(UserError, match="c.tar:1.png has more than 10 bytes"):
        pixels()

    # 3. A sparse one: no content, and a map that takes hours to follow.
    info = tarfile.TarInfo("1.png")
    info.sparse = [(k, 0) for k in range(10 ** 6)]
    with pytest.raises(UserError, match="sparse file"):
        streams.read_member(None, info, "c.tar:1.png")
