"""
test_documents.py: words and pictures of your own, in any mixture        (sources/documents.py; §3)

THE IDEA    A line of documents.jsonl is a document: words and names of pictures, in any order. Here
            is what a line may say, which documents stand in one split, and how much noise a picture
            in a mixture has (App. B.2: at most t = 500 where words after it describe it). The last
            test goes the whole way, from a file to `sample.py --open`.
TRY IT      python -m pytest -n 0 tests/test_documents.py
"""
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import sample
import train
import vae as vae_module
from sources import documents, feed
from sources.documents import MixedDocuments, Mixtures
from support import checkpoint
from support.common import UserError

WORDS = data.Words("beat two eggs and fry them a cat done one".split())


def write_documents(folder, lines, pictures=40):
    """A folder with documents.jsonl and red pictures 0.png, 1.png, ... Red says the number."""
    folder.mkdir(exist_ok=True)
    for k in range(pictures):
        Image.new("RGB", (8, 8), (5 * k, 0, 0)).save(folder / f"{k}.png")
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def recipes(n=20):
    """Documents of two pictures each, none shared."""
    lines = []
    for k in range(n):
        first = f"{2 * k}.png"
        second = f"{2 * k + 1}.png"
        lines.append(["beat two eggs", first, "and fry them", second, "done"])
    return lines


def tiny_vae():
    """An untrained VAE that halves the sides once: (3, 8, 8) -> (2, 4, 4)."""
    return vae_module.VAE(vae_module.VAEConfig(channels=4, multipliers=(1, 1), z=2))


def black(n):
    """(n, 8, 8, 3) uint8 of black pictures."""
    return np.zeros((n, 8, 8, 3), np.uint8)


# --------------------------------------------------------------------------------- what a line says
def test_what_a_line_says(tmp_path):
    """Catches a picture's name that is read as words, and words that are taken for a file.

    Also catches neighbours that are laid out apart: two pieces of words become one."""
    lines = [
        ["a  cat", "and", "0.png", "1.PNG", "save it as a .png file", "done"],
        ["words alone"],
        ["2.png"],
        *recipes(10),
    ]
    folder = write_documents(tmp_path / "mine", lines)
    Image.new("RGB", (8, 8)).save(folder / "1.PNG")     # black, as 0.png is

    train = documents.load_documents(folder, 8, "train")
    test = documents.load_documents(folder, 8, "test")

    # {number of a line: its document}, where a picture is the number that its red says.
    found = {}
    for part in (train, test):
        for document, line in zip(part.documents, part.lines, strict=True):
            shown = []
            for piece in document:
                if not isinstance(piece, str):
                    piece = int(part.pixels[piece][0, 0, 0]) // 5
                shown.append(piece)
            found[int(line.split()[-1])] = shown

    assert len(found) == 13
    assert found[1] == ["a cat and", 0, 0, "save it as a .png file done"]
    assert found[2] == ["words alone"]
    assert found[3] == [2]
    assert found[4] == ["beat two eggs", 0, "and fry them", 1, "done"]
    assert train.vocabulary() == test.vocabulary()
    assert train.vocabulary() >= {"alone", "eggs", ".png"}


@pytest.mark.parametrize("line", [
    '{"image": "0.png"}',
    "[]",
    '"0.png"',
    '["a cat", 7]',
    '["a cat", null]',
    '["a cat", ["0.png"]]',
    "[",
    "null",
])
def test_broken_lines_are_named(tmp_path, line):
    """Catches a mistake in line 21 that is reported without its number, or learned from."""
    folder = write_documents(tmp_path / "mine", recipes())
    with open(folder / "documents.jsonl", "a") as file:
        file.write("\n" + line)

    sentence = "documents.jsonl line 21 is no list of words and names of pictures"
    with pytest.raises(UserError, match=sentence):
        documents.load_documents(folder, 8)


def test_bad_documents_are_counted_named_and_skipped(tmp_path, capsys):
    """Catches half a document: one without its second picture says something else."""
    bad = [
        ["a cat", "absent.png"],
        ["", "0.png"],
        ["a cat", "broken.jpg", "done"],
    ]
    folder = write_documents(tmp_path / "mine", recipes(15) + bad)
    (folder / "broken.jpg").write_text("no picture")

    train = documents.load_documents(folder, 8)

    printed = capsys.readouterr().out
    assert "skipped 3 of 18 documents" in printed
    for problem in ("absent.png", "line 17: the caption is empty", "broken.jpg"):
        assert problem in printed
    test = documents.load_documents(folder, 8, "test")
    assert len(train.documents) + len(test.documents) == 15


@pytest.mark.parametrize("lines, words", [
    (None, "documents.jsonl is missing"),
    (recipes(9), "9 usable documents"),
    ([["words", "alone", str(k)] for k in range(20)], "names no picture"),
])
def test_folders_that_cannot_be_used(tmp_path, lines, words):
    """Catches a folder that fails in the middle of a run, or with a library's words."""
    folder = write_documents(tmp_path / "mine", lines or [])
    if lines is None:
        (folder / "documents.jsonl").unlink()

    with pytest.raises(UserError, match=words):
        documents.load_documents(folder, 8)
    with pytest.raises(UserError, match="--data documents needs --data-dir"):
        documents.load_documents()


# ----------------------------------------------------------------------------------- the two splits
def test_documents_that_share_a_picture_are_in_one_split(tmp_path):
    """Catches a test picture that was trained on in another document."""
    # A chain of cats, each sharing a picture with the next; the others share none.
    chain = [[f"a cat {k}", f"{k}.png", f"{k + 1}.png"] for k in range(0, 20)]
    alone = [["one", f"{k}.png"] for k in range(21, 40)]
    folder = write_documents(tmp_path / "mine", chain + alone)

    cats = []
    sizes = []
    for split in ("train", "test"):
        part = documents.load_documents(folder, 8, split)
        texts = [document[0] for document in part.documents]
        cats.append(sum(text.startswith("a cat") for text in texts))
        sizes.append(len(texts))

    assert sorted(cats) == [0, 20]
    assert sum(sizes) == 39
    assert min(sizes) >= 1


def test_a_split_of_words_alone_has_pictures_of_the_right_shape():
    """Catches a test split without a picture whose pixels no VAE reads."""
    pieces = [
        [("words", "a"), ("picture", "0.png")],
        [("words", "b")],
    ]

    found = documents.number_pictures(pieces, [1], {"0.png": None}, ["one", "two"], 8)

    assert found.pixels.shape == (0, 8, 8, 3)
    assert found.documents == [["b"]]
    assert found.lines == ["two"]


# ------------------------------------------------------------------- order, noise and dropped words
def shares_of(document, n=4000, **options):
    """{a draw of one document, as a tuple: how often it came}, of n draws. The shares sum to 1."""
    source = Mixtures(black(3), [document])
    mixed = MixedDocuments(source, patches=4, tokenizer=WORDS, **options)
    rng = np.random.default_rng(0)
    shares = {}
    for _ in range(n):
        drawn = tuple(mixed.draw(rng))
        shares[drawn] = shares.get(drawn, 0) + 1 / n
    return shares


def share_where(shares, is_so):
    """The share of those draws of which is_so(draw)."""
    return sum(share for drawn, share in shares.items() if is_so(drawn))


def test_a_pair_stands_in_either_order():
    """§4.1, App. B.2. Catches a pair that is never captioned, and a limit on the wrong picture.

    Also catches a caption that is never dropped."""
    to_draw = ("a cat", ("image", 1, 1000))             # 80% x 90%
    dropped = (("dropped", "a cat"), ("image", 1, 1000))                # 80% x 10%
    to_caption = (("image", 1, 500), "a cat")           # 20%, with at most half of the noise

    for document in (["a cat", 1], [1, "a cat"]):
        shares = shares_of(document)
        assert shares.keys() == {to_draw, dropped, to_caption}
        assert shares[to_draw] == pytest.approx(0.72, abs=0.03)
        assert shares[to_caption] == pytest.approx(0.2, abs=0.03)


def test_the_noise_of_a_mixture():
    """App. B.2. Catches a first picture that is all noise to the words after it.

    Also catches a last picture that is never drawn from pure noise, one in the middle that is only
    drawn or only read, and words after the last picture that are dropped."""
    shares = shares_of([0, "beat", 1, "fry", 2, "done"], drop=0.0)
    noises = set()
    for drawn in shares:
        noises.add(tuple(piece[2] for piece in drawn if isinstance(piece, tuple)))
    assert noises == {
        (500, 500, 500),
        (500, 500, 1000),
        (500, 1000, 500),
        (500, 1000, 1000),
    }
    read = share_where(shares, lambda drawn: drawn[2][2] == 500)
    assert read == pytest.approx(0.2, abs=0.03)

    # No words follow the last picture: nobody reads it.
    shares = shares_of(["beat", 0, "fry", 1], drop=0.1)
    assert {drawn[3] for drawn in shares} == {("image", 1, 1000)}
    dropped = share_where(shares, lambda drawn: drawn[2] == ("dropped", "fry"))
    assert dropped == pytest.approx(0.1, abs=0.02)

    # Words after the last picture ask for no picture: they are never dropped.
    for drawn in shares_of([0, "done"], caption_first=0.0):
        assert drawn[-1] == "done"
    assert shares_of(["done"]) == {("done",): pytest.approx(1)}


def test_the_longest_document():
    """Catches a run that ends in the middle for want of room.

    Every draw must fit in what `longest` says, in either order."""
    lines = [
        ["a cat", 0],
        ["beat two eggs", 1, "and", 2],
        ["done"],
    ]
    mixed = MixedDocuments(Mixtures(black(3), lines), patches=4, tokenizer=WORDS)

    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(200):
        layout = data.lay_out(mixed.draw(rng), WORDS, 4)
        lengths.add(len(layout.tokens))

    # BOS and EOS, the words, and for each picture BOI, 4 patches, EOI.
    assert mixed.lengths() == [2 + 2 + 6, 2 + 4 + 12, 3]
    assert lengths == set(mixed.lengths())
    assert mixed.longest() == 18


# ------------------------------------------------------------------------------------------ the gap
def test_the_gaps_captions_are_the_words_right_before():
    """Catches a gap that compares a picture with the words after it, or counts one twice."""
    grey = 60 * np.arange(4, dtype=np.uint8)
    pixels = np.zeros((4, 8, 8, 3), np.uint8) + grey[:, None, None, None]
    lines = [
        ["beat", 0, "fry", 1, "done"],
        [2, "one"],
        ["a cat", 3],
        ["cat", 3],
    ]
    source = Mixtures(pixels, lines)
    network = tiny_vae().eval()

    captions, latents, before = feed.probe(source, network, 9)
    assert captions == ["beat", "fry", "cat"]
    assert latents.shape == (3, 2, 4, 4)
    assert before is None

    # They are the latents of pictures 0, 1 and 3, and those of 2 would be others.
    alone = torch.cat([feed.mean_latents(network, source.pixels[[k]]) for k in range(4)])
    assert torch.allclose(latents, alone[[0, 1, 3]], atol=1e-5)
    assert (alone[3] - alone[2]).abs().max() > 1e-2

    # What is drawn to look at has all that stands before the picture.
    assert source.to_draw() == [(["beat", 0, "fry"], 1), (["a cat"], 3), (["cat"], 3)]

    words = Mixtures(black(0), [["done"]])
    _, latents, _ = feed.probe(words, network, 9)
    assert latents.shape == (0, 2, 4, 4)
    assert words.to_draw() == []


# ------------------------------------------------------------------------------------ the whole way
def test_from_a_file_to_a_mixture_that_goes_on(tmp_path, monkeypatch, capsys):
    """Catches a source that the loop, the report, --resume or sample.py did not think of.

    Also catches a document that is too long and named without its line."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    checkpoint.save(tmp_path / "vae.pt", checkpoint.pack_vae(tiny_vae()))
    folder = write_documents(tmp_path / "mine", recipes())
    out = tmp_path / "run"
    command = [
        "--data", "documents",
        "--data-dir", str(folder),
        "--vae", str(tmp_path / "vae.pt"),
        "--image-size", "8",
        "--documents", "3",
        "--steps", "2",
        "--samples", "3",
        "--sample-steps", "1",
        "--out", str(out),
        "--seq-len", "64",
    ]

    # 1. Train and report.
    numbers = train.main(command)
    printed = capsys.readouterr().out
    assert {"own_nearest", "unseen_nearest", "conditioning_gap", "vae"} <= numbers.keys()
    assert 'sample.py --open "..."' in printed
    assert (out / "samples.png").stat().st_size > 1000

    # 2. Go on after words and a picture, caption, draw.
    picture = str(folder / "3.png")
    for words in (
        ["--open", f"beat two eggs [{picture}] and", "--pictures", "2"],
        ["--image", picture],
        ["fry them"],
    ):
        options = ["--checkpoint", str(out / "model.pt"), "--steps", "1"]
        sample.main([*words, *options, "-o", str(tmp_path / "out.png")])

    # 3. The same words in another order are other data.
    moved = [[*line[:3], "done", line[3]] for line in recipes()]
    write_documents(folder, moved)
    with pytest.raises(UserError, match="has learned from other data; what differs: captions"):
        train.main([*command, "--resume"])

    # 4. A document that does not fit is named.
    lines = recipes()
    lines[7] = ["beat", "1.png"] * 12
    write_documents(folder, lines)
    sentence = f"{folder}/documents.jsonl line 8: this document is too long; "
    with pytest.raises(UserError, match=re.escape(sentence)):
        train.main([*command, "--overwrite"])
