"""
test_picture_folder.py: a folder of your own pictures  (sources/folder.py, sources/pairs.py; §4.1)

THE IDEA    Small folders of coloured pictures with a captions.jsonl are written and loaded. The
            colour of a picture says which number it has, so a caption beside the wrong picture is
            seen. Then lines, captions and pictures are spoiled: what is bad is named and skipped,
            and what no run could use is refused before any work. The last part trains one step.
TRY IT      python -m pytest -n 0 tests/test_picture_folder.py
"""
import json

import numpy as np
import pytest
from PIL import Image

import model
import train
import vae as vae_module
from sources import choose, feed, folder
from sources.pairs import Pairs
from support import checkpoint, common
from support.common import UserError


def color_of(k):
    """The colour of picture number k: its red says the number."""
    return (10 * k, 255 - 10 * k, 128)


def write_folder(folder, n=12, extra=()):
    """A folder of n small pictures of different sizes and types, with captions.jsonl.

    extra: more lines"""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(n):
        kind = ("png", "jpg", "gif", "bmp")[k % 4]
        name = f"{k}.{kind}"
        picture = Image.new("RGB", (20 + 3 * k, 40 - k), color_of(k))
        options = {"quality": 95} if kind == "jpg" else {}
        picture.save(folder / name, **options)
        # Two spaces, which must become one.
        lines.append(json.dumps({"image": name, "caption": f"Picture  number {k % 3}"}))

    text = "\n".join([*lines, *extra]) + "\n\n"
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")
    return folder


def write_named(folder, names, each=1):
    """A folder whose captions are the pictures' names, each said `each` times."""
    folder.mkdir(exist_ok=True)
    lines = []
    for name in names:
        Image.new("RGB", (8, 8), "red").save(folder / name)
        for k in range(each):
            lines.append(json.dumps({"image": name, "caption": f"{name} {k}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))


def caption_line(image, caption, **options):
    """A line of captions.jsonl. options: of json.dumps."""
    return json.dumps({"image": image, "caption": caption}, **options)


# ---------------------------------------------------------------------- pictures and their captions
def test_folder_of_pictures(tmp_path):
    """Catches captions beside other pictures or lines, and double spaces.

    Also catches a test split inside the training split."""
    write_folder(tmp_path, 21)

    train = choose.load_pairs("folder", tmp_path, 16, "train")
    test = choose.load_pairs("folder", tmp_path, 16, "test")

    numbers = []
    for pairs in (train, test):
        assert pairs.pixels.shape == (len(pairs.captions), 16, 16, 3)
        together = zip(pairs.captions, pairs.pixels, pairs.lines, strict=True)
        for caption, picture, line in together:
            k = round(picture[..., 0].mean() / 10)
            color = picture.reshape(-1, 3).mean(0)
            assert np.abs(color - color_of(k)).max() < 4                # jpg is not exact
            assert caption == f"Picture number {k % 3}"
            assert line.endswith(f"captions.jsonl line {k + 1}")
            numbers.append(k)

    # Every picture is in one of the splits, and in one only.
    assert sorted(numbers) == list(range(21))
    assert 1 <= len(test.captions) <= 6
    words = {"Picture", "number", "0", "1", "2"}
    assert train.vocabulary() == test.vocabulary() == words


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"], ids=ascii)
def test_lines_end_at_a_newline_alone(tmp_path, mark):
    """Catches splitlines(), which cuts in the middle of a caption.

    JSON allows these marks in a string, the last two escaped."""
    caption = mark
    if mark < " ":
        caption = json.dumps(mark).strip('"')
    line = '{"image": "0.png", "caption": "a cat' + caption + 'on a mat"}'
    write_folder(tmp_path, 10, [line])

    assert "a cat on a mat" in folder.load_folder(tmp_path, 16).language


def test_a_bom_and_the_line_ends_of_windows(tmp_path):
    """Catches the invisible mark that Windows puts at a file's start.

    It made the first line unreadable."""
    write_folder(tmp_path, 10)
    path = tmp_path / "captions.jsonl"
    windows = "\ufeff" + path.read_text().replace("\n", "\r\n")
    path.write_text(windows, encoding="utf-8", newline="")

    captions = [f"Picture number {k % 3}" for k in range(10)]
    assert folder.load_folder(tmp_path, 16).language == captions


def test_captions_in_other_scripts(tmp_path):
    """Catches a reader that takes the machine's own encoding, which on Windows is not UTF-8.

    Also catches bytes that are no text at all."""
    write_folder(tmp_path, 10, [caption_line("0.png", "ein Kätzchen 猫", ensure_ascii=False)])
    assert "ein Kätzchen 猫" in folder.load_folder(tmp_path, 16).language

    (tmp_path / "captions.jsonl").write_bytes(b"\xff\xfe\x00\x01\n")
    with pytest.raises(UserError, match="captions.jsonl"):
        folder.load_folder(tmp_path, 16)


# ------------------------------------------------------------------------------- the two splits
def splits_of(folder):
    """{name of a picture: the splits that have it}, of a folder of `write_named`."""
    splits = {}
    for split in ("train", "test"):
        for caption in choose.load_pairs("folder", folder, 8, split).captions:
            name = caption.split()[0]
            splits.setdefault(name, set()).add(split)
    return splits


def test_all_captions_of_a_picture_are_in_one_split(tmp_path):
    """Catches test pictures that were trained on.

    With five lines for each picture, a split of every tenth line has them all."""
    write_named(tmp_path, [f"{k}.png" for k in range(16)], each=5)

    splits = splits_of(tmp_path)

    assert len(splits) == 16
    assert all(len(found) == 1 for found in splits.values())
    assert {"train"} in splits.values()
    assert {"test"} in splits.values()


def test_a_picture_that_is_added_moves_no_other_into_the_test_split(tmp_path):
    """Catches a split by place in the list.

    One line on top, and a resumed run would be measured on what it has learned."""
    (tmp_path / "a").mkdir()                            # a/../x.png needs it
    names = [f"{k}.png" for k in range(12)]
    write_named(tmp_path, names)
    before = splits_of(tmp_path)

    for new in ("new.png", "a/../x.png", "z.png", "00.png", "cat 7.png"):
        names.insert(0, new)
        write_named(tmp_path, names)
        now = splits_of(tmp_path)
        for name in before:
            moved = before[name] == {"train"} and now[name] == {"test"}
            assert not moved, name
        before = now


def test_a_tenth_is_the_test_split_whatever_the_order_of_classes(tmp_path):
    """Catches a split by place where ten classes come in turn.

    Every tenth line would be of one class, which was never trained."""
    write_named(tmp_path, [f"{'abcdefghij'[k % 10]}{k}.png" for k in range(400)])

    classes = []
    for name, found in splits_of(tmp_path).items():
        if found == {"test"}:
            classes.append(name[0])

    assert 20 <= len(classes) <= 60                     # about 40
    assert len(set(classes)) >= 8


def test_a_sorted_folder_comes_in_a_random_order_that_is_always_the_same(tmp_path):
    """Catches a probe, or a VAE's scale, of a sorted folder's first few pictures.

    They would be all alike."""
    write_named(tmp_path, [f"{'ab'[k >= 100]}{k}.png" for k in range(200)])

    one = choose.load_pairs("folder", tmp_path, 8)
    two = choose.load_pairs("folder", tmp_path, 8)

    assert one.captions == two.captions
    assert one.captions != sorted(one.captions)
    # Half of all captions begin with an "a": so do about half of the first 64.
    assert 20 <= sum(caption.startswith("a") for caption in one.captions[:64]) <= 44


def tiny_vae():
    """An untrained VAE that halves the sides twice: (3, 8, 8) -> (2, 2, 2)."""
    config = vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2)
    return vae_module.VAE(config)


def test_the_probe_has_each_picture_once():
    """Catches a "wrong" caption that is another one of the very picture.

    The gap would say that captions are ignored."""
    vae = tiny_vae().eval()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    # Four pictures, each with three captions: "0 0", "1 0", "2 0", "3 0", "0 1", ...
    captions = []
    for n in range(3):
        captions += [f"{k} {n}" for k in range(4)]
    pairs = Pairs("folder", captions, np.concatenate([pixels] * 3))

    captions, latents, _ = feed.probe(pairs, vae, 100)
    assert captions == ["0 0", "1 0", "2 0", "3 0"]
    assert len(latents) == 4

    captions, _, _ = feed.probe(pairs, vae, 2)
    assert captions == ["0 0", "1 0"]


# ------------------------------------------------------------------------ what is bad in a folder
def test_bad_pictures_are_counted_named_and_skipped(tmp_path, capsys):
    """Catches one bad file among thousands that ends the run, or vanishes without a word.

    Also catches captions that move to other pictures because one is missing."""
    bad = ("text.png", "cut.png", "absent.png", "folder.png")
    write_folder(tmp_path, 12, [caption_line(name, "bad") for name in bad])
    (tmp_path / "text.png").write_text("not a picture")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.png").mkdir()

    pairs = folder.load_folder(tmp_path, 16)

    printed = capsys.readouterr().out
    assert len(pairs.captions) == len(pairs.pixels) == len(pairs.lines)
    assert len(pairs.captions) > 5
    assert "bad" not in pairs.captions
    test = folder.load_folder(tmp_path, 16, "test")
    assert len(pairs.captions) + len(test.captions) == 12
    assert "skipped 4 of 16" in printed
    for name in bad:
        assert name in printed


@pytest.mark.parametrize("line", [
    "{not json",
    '{"image": "0.png"}',
    '{"caption": "a cat"}',
    '["0.png", "a cat"]',
    "7",
    "null",
    '{"image": null, "caption": "a cat"}',
    '{"image": "0.png", "caption": null}',
])
def test_broken_caption_lines_are_named(tmp_path, line):
    """Catches a mistake in line 13 that is reported without its number.

    Also catches one that is trained on: null would become the word "none"."""
    write_folder(tmp_path, 12, [line])
    with pytest.raises(UserError, match="captions.jsonl line 13"):
        folder.load_folder(tmp_path, 16)


@pytest.mark.parametrize("line", [
    "[" * 100_000,
    '{"image": "0.png", "caption": ' + "[" * 100_000,
    '{"image": "0.png", "caption": ' + "9" * 5000 + "}",
], ids=["nested", "nested value", "long number"])
def test_json_that_python_cannot_read(tmp_path, line):
    """Catches RecursionError, and a limit of Python's own, as a traceback.

    Also catches a sentence without the line's number."""
    write_folder(tmp_path, 12, [line])
    with pytest.raises(UserError, match="captions.jsonl line 13 is not"):
        folder.load_folder(tmp_path, 16)


def test_numbers_that_are_no_float():
    """Catches a log with a number of 401 digits.

    Where it is drawn it would end in an OverflowError."""
    assert common.load_json("[1, -7, 18446744073709551616]") == [1, -7, 2 ** 64]

    for text in (str(10 ** 400), f'{{"loss": {-10 ** 308}}}'):
        with pytest.raises(ValueError, match="it has a number of (401|310) digits"):
            common.load_json(text)


@pytest.mark.parametrize("caption, problem", [
    ("", "line 13: the caption is empty"),
    ("  ", "line 13: the caption is empty"),
    ("\n", "line 13: the caption is empty"),
    ("\u3000", "line 13: the caption is empty"),        # a wide space
    ("a\0cat", "line 13 has a NUL character"),
    ("a \ud83d", "line 13 has half a character"),
], ids=ascii)
def test_captions_that_say_nothing_are_counted_named_and_skipped(
        tmp_path, capsys, caption, problem):
    """Catches a picture that is trained on without words as if it had some.

    Also catches characters that cannot be printed or encoded."""
    write_folder(tmp_path, 12, [caption_line("0.png", caption)])

    pairs = folder.load_folder(tmp_path, 16)

    printed = capsys.readouterr().out
    assert len(pairs.language) == 12
    assert caption not in pairs.language
    assert "skipped 1 of 13 pictures" in printed
    assert problem in printed


def test_folders_that_cannot_be_used(tmp_path):
    """Catches a missing file, or nine pictures, found out in the middle of a run.

    Nine pictures are too few for a test split."""
    with pytest.raises(UserError, match="captions.jsonl is missing"):
        folder.load_folder(tmp_path)
    with pytest.raises(UserError, match="--data folder needs --data-dir"):
        choose.load_pairs("folder")

    write_folder(tmp_path, 9)
    too_few = ("9 usable pictures with captions, or 9 where those that share a picture count once: "
               "it needs at least ten")
    for split in ("train", "test"):
        with pytest.raises(UserError, match=too_few):
            folder.load_folder(tmp_path, 16, split)

    # Twenty captions, but one picture: it cannot be in both splits.
    write_named(tmp_path / "one", ["only.png"], each=20)
    with pytest.raises(UserError, match="20 usable .* or 1 where .* two that share none"):
        folder.load_folder(tmp_path / "one", 16)


# ----------------------------------------------------------------- what training says of a folder
@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A function that trains one step of a tiny model on a folder; further options come last."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    checkpoint.save(tmp_path / "vae.pt", checkpoint.pack_vae(tiny_vae()))

    def train_on(folder, *options, data="folder"):
        words = (
            "--data", data,
            "--data-dir", folder,
            "--vae", tmp_path / "vae.pt",
            "--image-size", 16,
            "--patch", 1,
            "--seq-len", 48,
            "--documents", 2,
            "--samples", 0,
            "--steps", 1,
            "--out", tmp_path / "run",
            *options,
        )
        train.main([str(word) for word in words])
    return train_on


def place_of_first(folder, split="train"):
    """The sentence's name for the line of the first pair of a split, and its place: 0, 1, ..."""
    line = choose.load_pairs("folder", folder, 16, split).lines[0]
    return line, int(line.split()[-1]) - 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_caption_that_is_too_long_is_named_before_any_work(tmp_path, monkeypatch, tiny, split):
    """Catches a run that ends at its first gap, over a caption of the test split.

    By then the VAE is trained. Also catches a sentence without the line's number."""
    folder = write_folder(tmp_path / "mine", 20)
    line, k = place_of_first(folder, split)
    path = folder / "captions.jsonl"
    lines = path.read_text().split("\n")
    lines[k] = json.dumps({**json.loads(lines[k]), "caption": "number " * 90})
    path.write_text("\n".join(lines))
    monkeypatch.setattr(vae_module, "encode_all", lambda *_: pytest.fail("worked before it looked"))

    sentence = (f"{line}: a caption of 90 tokens is too long; the longest document takes 110 "
                f"positions.*context of 48: shorten it")
    with pytest.raises(UserError, match=sentence):
        tiny(folder)


def test_an_instruction_that_is_too_long_is_named(tmp_path, tiny):
    """Catches the same mistake in edits.jsonl: 30 times three words, in two of the lines."""
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = []
    for k in range(20):
        name = f"{k}.png"
        Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / name)
        times = 30 if k in (3, 7) else 1
        edit = {"before": name, "instruction": "make it red " * times, "after": name}
        lines.append(json.dumps(edit))
    (folder / "edits.jsonl").write_text("\n".join(lines))

    too_long = "edits.jsonl line (4|8): a caption of 90 tokens is too long"
    with pytest.raises(UserError, match=too_long):
        tiny(folder, "--patch", 2, "--init", "", data="edits")


def test_what_has_changed_in_the_data_is_named_at_resume(tmp_path, tiny):
    """Catches words that move to other ids without a sentence.

    Also catches test pictures that have become training pictures."""
    folder = write_folder(tmp_path / "mine", 20)
    tiny(folder)
    path = folder / "captions.jsonl"
    whole = path.read_text()
    _, k = place_of_first(folder)
    entry = json.loads(whole.split("\n")[k])

    # One change at a time: a new word, a caption of known words, another picture.
    other = "3.bmp" if entry["image"] == "7.bmp" else "7.bmp"
    for change, words in [
        ({"caption": "Picture numbre 1"}, "words, captions .*new: numbre"),
        ({"caption": "number number 1"}, "captions .*, now "),
        ({"image": other}, ".*pixels .*, now "),
    ]:
        lines = whole.split("\n")
        lines[k] = json.dumps({**entry, **change})
        path.write_text("\n".join(lines))
        sentence = f"run has learned from other data; what differs: {words}.*--out"
        with pytest.raises(UserError, match=sentence):
            tiny(folder, "--resume")

    # One more line.
    path.write_text(caption_line("7.bmp", "one more") + "\n" + whole)
    with pytest.raises(UserError, match="words, pictures, .*new: more, one"):
        tiny(folder, "--resume")

    # A run that did not write down what it has learned from.
    config = tmp_path / "run/config.json"
    kept = json.loads(config.read_text())
    del kept["learned"]
    config.write_text(json.dumps(kept))
    with pytest.raises(UserError, match="earlier version"):
        tiny(folder, "--resume")


def test_the_same_data_may_lie_elsewhere_at_resume(tmp_path, monkeypatch, tiny):
    """Catches a resume that is refused because the folder was moved, or has another path."""
    folder = write_folder(tmp_path / "mine", 20)
    tiny(folder)

    monkeypatch.chdir(tmp_path)
    tiny("./mine", "--resume")

    folder.rename(tmp_path / "moved")
    tiny("moved", "--resume")


def test_captions_that_all_say_the_same_have_no_gap(tmp_path, tiny, capsys):
    """Catches a gap of 0.000, "the caption is ignored", where nothing could be compared.

    Capitals and spaces are no difference to the tokenizer Words."""
    folder = write_folder(tmp_path / "mine", 20)
    path = folder / "captions.jsonl"
    lines = []
    for k, line in enumerate(path.read_text().split("\n")):
        if line:
            caption = ("A cat", "a  cat")[k % 2]
            lines.append(json.dumps({**json.loads(line), "caption": caption}))
    path.write_text("\n".join(lines))

    tiny(folder, "--samples", 2, "--sample-steps", 1)

    rows = (tmp_path / "run/log.jsonl").read_text().split("\n")
    gaps = [json.loads(row)["gap"] for row in rows if row]
    assert gaps == [None]
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["conditioning_gap"] is None
    printed = capsys.readouterr().out
    assert "cannot be measured: all unseen captions say the same" in printed
