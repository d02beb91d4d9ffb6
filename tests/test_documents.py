"""
test_documents.py: words and pictures of your own, in any mixture            (sources/documents.py; Transfusion §3, §4.1, App. B.2)

What a file may say, which documents belong together, which noise a picture of a mixture has, and one run from documents.jsonl
to sample.py --open.
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
    """A folder with documents.jsonl and red pictures 0.png, 1.png, ..."""
    folder.mkdir(exist_ok=True)
    for k in range(pictures):
        Image.new("RGB", (8, 8), (5 * k, 0, 0)).save(folder / f"{k}.png")
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def recipes(n=20):
    """Documents of two pictures each, none shared."""
    return [["beat two eggs", f"{2 * k}.png", "and fry them", f"{2 * k + 1}.png", "done"] for k in range(n)]


def test_what_a_line_says(tmp_path):
    """Catches a picture's name that is read as words, words that are taken for a file, and neighbours that are laid out apart."""
    lines = [["a  cat", "and", "0.png", "1.PNG", "save it as a .png file", "done"], ["words alone"], ["2.png"], *recipes(10)]
    (folder := write_documents(tmp_path / "mine", lines))
    Image.new("RGB", (8, 8)).save(folder / "1.PNG")
    both = [documents.load_documents(folder, 8, split) for split in ("train", "test")]
    found = {}
    for part in both:
        for document, line in zip(part.documents, part.lines, strict=True):
            shown = [p if isinstance(p, str) else int(part.pixels[p][0, 0, 0]) // 5 for p in document]
            found[int(line.split()[-1])] = shown
    assert found[1] == ["a cat and", 0, 0, "save it as a .png file done"] and found[2] == ["words alone"] and found[3] == [2]
    assert found[4] == ["beat two eggs", 0, "and fry them", 1, "done"] and len(found) == 13
    assert both[0].vocabulary() == both[1].vocabulary() >= {"alone", "eggs", ".png"}


@pytest.mark.parametrize("line", ['{"image": "0.png"}', "[]", '"0.png"', '["a cat", 7]', '["a cat", null]', '["a cat", ["0.png"]]', "[", "null"])
def test_broken_lines_are_named(tmp_path, line):
    """Catches a mistake in line 21 that is reported without its number, or learned from."""
    folder = write_documents(tmp_path / "mine", recipes())
    with open(folder / "documents.jsonl", "a") as file:
        file.write("\n" + line)
    with pytest.raises(UserError, match="documents.jsonl line 21 is no list of words and names of pictures"):
        documents.load_documents(folder, 8)


def test_bad_documents_are_counted_named_and_skipped(tmp_path, capsys):
    """Catches half a document: one without its second picture says something else."""
    lines = [*recipes(15), ["a cat", "absent.png"], ["", "0.png"], ["a cat", "broken.jpg", "done"]]
    folder = write_documents(tmp_path / "mine", lines)
    (folder / "broken.jpg").write_text("no picture")
    kept = documents.load_documents(folder, 8)
    said = capsys.readouterr().out
    assert "skipped 3 of 18 documents" in said and all(name in said for name in ("absent.png", "line 17: the caption is empty", "broken.jpg"))
    assert len(kept.documents) + len(documents.load_documents(folder, 8, "test").documents) == 15


@pytest.mark.parametrize("lines, words", [
    (None, "documents.jsonl is missing"), (recipes(9), "9 usable documents"), ([["words", "alone", str(k)] for k in range(20)], "names no picture")])
def test_folders_that_cannot_be_used(tmp_path, lines, words):
    """Catches a folder that fails in the middle of a run, or with a library's words."""
    folder = write_documents(tmp_path / "mine", lines or [])
    if lines is None:
        (folder / "documents.jsonl").unlink()
    with pytest.raises(UserError, match=words):
        documents.load_documents(folder, 8)
    with pytest.raises(UserError, match="--data documents needs --data-dir"):
        documents.load_documents()


def test_documents_that_share_a_picture_are_in_one_split(tmp_path):
    """Catches a test picture that was trained on in another document."""
    lines = [[f"a cat {k}", f"{k}.png", f"{k + 1}.png"] for k in range(0, 20)] + [["one", f"{k}.png"] for k in range(21, 40)]
    folder = write_documents(tmp_path / "mine", lines)
    sizes = []
    for split in ("train", "test"):
        texts = [document[0] for document in documents.load_documents(folder, 8, split).documents]
        cats = sum(text.startswith("a cat") for text in texts)
        sizes.append((cats, len(texts)))
    assert sorted(cats for cats, _ in sizes) == [0, 20] and sum(n for _, n in sizes) == 39 and min(n for _, n in sizes) >= 1


def drawn(document, n=4000, **options):
    """n draws of one document, as tuples, and how often each came."""
    source = Mixtures(np.zeros((3, 8, 8, 3), np.uint8), [document])
    mixed, rng = MixedDocuments(source, patches=4, tokenizer=WORDS, **options), np.random.default_rng(0)
    counts = {}
    for _ in range(n):
        key = tuple(mixed.draw(rng))
        counts[key] = counts.get(key, 0) + 1 / n
    return counts


def test_a_split_of_words_alone_has_pictures_of_the_right_shape():
    """Catches a test split without a picture whose pixels no VAE reads."""
    found = documents.number_pictures([[("words", "a"), ("picture", "0.png")], [("words", "b")]], [1], {"0.png": None}, ["one", "two"], 8)
    assert found.pixels.shape == (0, 8, 8, 3) and found.documents == [["b"]] and found.lines == ["two"]


def test_a_pair_stands_in_either_order():
    """§4.1, App. B.2: catches a pair that is never captioned, a limit on the wrong picture, and a caption that is never dropped."""
    for document in (["a cat", 1], [1, "a cat"]):
        counts = drawn(document)
        assert counts.keys() == {("a cat", ("image", 1, 1000)), (("dropped", "a cat"), ("image", 1, 1000)), (("image", 1, 500), "a cat")}
        assert counts["a cat", ("image", 1, 1000)] == pytest.approx(0.72, abs=0.03)
        assert counts[("image", 1, 500), "a cat"] == pytest.approx(0.2, abs=0.03)


def test_the_noise_of_a_mixture():
    """App. B.2: catches a first picture that is all noise to the words after it, a last picture that is never drawn from pure
    noise, one in the middle that is only drawn or only read, and words after the last picture that are dropped."""
    counts = drawn([0, "beat", 1, "fry", 2, "done"], drop=0.0)
    noises = {tuple(part[2] for part in document if isinstance(part, tuple)) for document in counts}
    assert noises == {(500, a, b) for a in (500, 1000) for b in (500, 1000)}
    assert sum(share for d, share in counts.items() if d[2][2] == 500) == pytest.approx(0.2, abs=0.03)
    counts = drawn(["beat", 0, "fry", 1], drop=0.1)
    assert {document[3] for document in counts} == {("image", 1, 1000)}
    assert sum(share for d, share in counts.items() if d[2] == ("dropped", "fry")) == pytest.approx(0.1, abs=0.02)
    assert all(document[-1] == "done" for document in drawn([0, "done"], caption_first=0.0)) and drawn(["done"]) == {("done",): pytest.approx(1)}


def test_the_longest_document():
    """Every draw fits in what `longest` says, in either order: catches a run that ends in the middle for want of room."""
    source = Mixtures(np.zeros((3, 8, 8, 3), np.uint8), [["a cat", 0], ["beat two eggs", 1, "and", 2], ["done"]])
    mixed = MixedDocuments(source, patches=4, tokenizer=WORDS)
    rng = np.random.default_rng(0)
    lengths = {len(data.lay_out(mixed.draw(rng), WORDS, 4).tokens) for _ in range(200)}
    assert mixed.lengths() == [2 + 2 + 6, 2 + 4 + 12, 3] and lengths == set(mixed.lengths()) and mixed.longest() == 18


def test_the_gaps_captions_are_the_words_right_before(tmp_path):
    """Catches a gap that compares a picture with the words after it, or counts one picture twice."""
    source = Mixtures(60 * np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3),
                      [["beat", 0, "fry", 1, "done"], [2, "one"], ["a cat", 3], ["cat", 3]])
    network = vae_module.VAE(vae_module.VAEConfig(channels=4, multipliers=(1, 1), z=2)).eval()
    captions, latents, before = feed.probe(source, network, 9)
    assert captions == ["beat", "fry", "cat"] and latents.shape == (3, 2, 4, 4) and before is None
    alone = torch.cat([feed.mean_latents(network, source.pixels[[k]]) for k in range(4)])
    assert torch.allclose(latents, alone[[0, 1, 3]], atol=1e-5) and (alone[3] - alone[2]).abs().max() > 1e-2
    words = Mixtures(np.zeros((0, 8, 8, 3), np.uint8), [["done"]])
    assert feed.probe(words, network, 9)[1].shape == (0, 2, 4, 4) and words.to_draw() == []
    assert source.to_draw() == [(["beat", 0, "fry"], 1), (["a cat"], 3), (["cat"], 3)]


def test_from_a_file_to_a_mixture_that_goes_on(tmp_path, monkeypatch, capsys):
    """Trains, reports, goes on after words and a picture, captions, draws. Catches a source that the loop, the report, --resume or
    sample.py did not think of, and a document that is too long without its line."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    tiny = vae_module.VAE(vae_module.VAEConfig(channels=4, multipliers=(1, 1), z=2))
    checkpoint.save(tmp_path / "vae.pt", checkpoint.pack_vae(tiny))
    folder = write_documents(tmp_path / "mine", recipes())
    command = ["--data", "documents", "--data-dir", str(folder), "--vae", str(tmp_path / "vae.pt"), "--image-size", "8", "--documents", "3",
               "--steps", "2", "--samples", "3", "--sample-steps", "1", "--out", str(tmp_path / "run"), "--seq-len", "64"]
    numbers = train.main(command)
    said = capsys.readouterr().out
    assert {"own_nearest", "unseen_nearest", "conditioning_gap", "vae"} <= numbers.keys() and 'sample.py --open "..."' in said
    assert (tmp_path / "run/samples.png").stat().st_size > 1000
    trained, picture = str(tmp_path / "run/model.pt"), str(folder / "3.png")
    for words in (["--open", f"beat two eggs [{picture}] and", "--pictures", "2"], ["--image", picture], ["fry them"]):
        sample.main([*words, "--checkpoint", trained, "--steps", "1", "-o", str(tmp_path / "out.png")])
    write_documents(folder, [[*line[:3], "done", line[3]] for line in recipes()])             # the same words, in another order
    with pytest.raises(UserError, match="has learned from other data; what differs: captions"):
        train.main([*command, "--resume"])
    lines = recipes()
    lines[7] = ["beat", "1.png"] * 12
    write_documents(folder, lines)
    with pytest.raises(UserError, match=re.escape(f"{folder}/documents.jsonl line 8: this document is too long; ")):
        train.main([*command, "--overwrite"])
