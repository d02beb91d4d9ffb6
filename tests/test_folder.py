"""
test_folder.py: what a model has learned of your own pictures              (metrics/folder.py; ours)

THE IDEA    Artists whose drawings are known, perfect and not, draw what a folder's captions say.
            The report must say how many drawings are nearest to the right picture. The second part
            is autoencoder/quality.py: reconstructions that lose a known colour, or by a known
            error. See docs/PAPER.md §4.11.
TRY IT      python -m pytest -n 0 tests/test_folder.py
"""
import colorsys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from autoencoder import quality
from metrics import drawing, folder
from sources.edits import Edits
from sources.pairs import Pairs


def pictures(n, seed=0):
    """(n, 8, 8, 3) uint8 of noise: no two are near each other."""
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def draw_black(prompt):
    """The drawing of an artist who knows nothing."""
    return np.zeros((8, 8, 3), np.uint8)


def trained():
    """What report_folder asks of a model: a tokenizer and a VAE.

    Its reconstructions are the pictures themselves: see `artist`."""
    return SimpleNamespace(tokenizer=data.Words([]), vae=SimpleNamespace())


@pytest.fixture
def artist(monkeypatch):
    """A function that makes an artist: it draws what `paint(prompt)` returns, and says `caption`.

    Pictures in prompts are numbers."""
    def make(paint, caption="a cat"):
        def draw_after(trained, prompts, **options):
            return np.stack([paint(prompt) for prompt in prompts])

        def describe(trained, latents):
            return [caption] * len(latents)

        monkeypatch.setattr(drawing, "draw_after", draw_after)
        monkeypatch.setattr(drawing, "describe", describe)
        monkeypatch.setattr(folder, "encode_pixels", lambda trained, pixels: pixels)
        monkeypatch.setattr(quality, "reconstruct", lambda vae, pixels: pixels)

    return make


# --------------------------------------------------------------------- the nearest of all pictures
@pytest.mark.parametrize("wrong, chunk", [(0, 4096), (3, 4096), (3, 2)])
def test_drawings_among_the_folders_own_pictures(monkeypatch, artist, wrong, chunk):
    """Catches an artist who draws the neighbour's picture and is called right.

    Also catches pictures that are lost because they are compared in chunks."""
    monkeypatch.setattr(folder, "CHUNK", chunk)
    train = Pairs("folder", [f"cat {k}" for k in range(10)], pictures(10))
    test = Pairs("folder", ["dog 1", "dog 2"], pictures(2, 1))
    truth = dict(zip(train.captions + test.captions, [*train.pixels, *test.pixels]))
    neighbours = {f"cat {k}": train.pixels[k + 1] for k in range(wrong)}

    def paint(prompt):
        picture = neighbours.get(prompt[0], truth[prompt[0]])
        near = picture.astype(int) + 20                 # not the same
        return np.clip(near, 0, 255).astype(np.uint8)

    artist(paint)
    numbers, shown = folder.report_folder(trained(), train, test, n=50)

    assert numbers["own_nearest"] == pytest.approx(1 - wrong / 10)
    assert numbers["own_n"] == 10
    assert numbers["unseen_nearest"] == 1.0
    assert numbers["unseen_n"] == 2
    row = ("nearest is its own picture, unseen", "100.0% (n = 2; by chance 50.0%)")
    assert row in folder.describe(numbers)

    assert [right for *_, right in shown] == [k >= wrong for k in range(10)] + [True, True]
    for k, (_, sheet, _) in enumerate(shown[:10]):
        # What was drawn (8 pixels), a white line (2), and what it should be (8).
        assert sheet.shape == (8, 18, 3)
        assert (sheet[:, 8:10] == 255).all()
        assert np.array_equal(sheet[:, 10:], train.pixels[k])


def test_pictures_that_are_the_same_are_the_right_one(artist):
    """Catches two captions of one picture, of which one is called wrong.

    Also catches two pictures of one caption, of which one is."""
    three = pictures(3)
    train = Pairs("folder", ["a", "b", "c", "c"], three[[0, 0, 1, 2]])
    drawn = {"a": 0, "b": 0, "c": 2}

    artist(lambda prompt: three[drawn[prompt[0]]])
    numbers, _ = folder.report_folder(trained(), train, train, n=9)

    assert numbers["own_nearest"] == 1.0


def test_an_edit_is_told_from_the_other_edits_of_its_picture(artist):
    """Catches an edit that is compared with all pictures, and one that changes nothing.

    Also catches the wrong one of two tones."""
    pixels = pictures(4)                                # 0 -> 1 or 2; 3 belongs to nobody else
    edits = Edits(pixels[[0, 1, 0, 2, 3, 3]], [
        ([0, 1], ["make it light"]),
        ([2, 3], ["make it dark"]),
        ([4, 5], ["keep it"]),
    ])

    for chosen, share in (
        (dict(light=1, dark=2), 1.0),
        (dict(light=2, dark=2), 2 / 3),
        (dict(light=0, dark=0), 1 / 3),                 # as it was before the edit
    ):
        artist(lambda prompt, chosen=chosen: pixels[chosen.get(prompt[1].split()[-1], 3)])
        numbers, shown = folder.report_folder(trained(), edits, edits)

        assert numbers["own_nearest"] == pytest.approx(share)
        assert "own_cider" not in numbers
        # By chance: the mean of 1/3, 1/3 and 1/2, as the rivals are 3, 3 and 2.
        row = ("nearest is the edit asked for, trained", f"{share:6.1%} (n = 3; by chance 38.9%)")
        assert row in folder.describe(numbers)
        _, sheet, _ = shown[0]
        assert sheet.shape == (8, 28, 3)
        assert np.array_equal(sheet[:, :8], pixels[0])  # what was to be edited

    # Of all pictures 3 is the nearest, but it is no rival of these.
    def paint_mixed(prompt):
        wanted = {"light": 1, "dark": 2}.get(prompt[1].split()[-1], 3)
        return (0.6 * pixels[3] + 0.4 * pixels[wanted]).astype(np.uint8)

    artist(paint_mixed)
    numbers, _ = folder.report_folder(trained(), edits, edits)
    assert numbers["own_nearest"] == 1.0


# --------------------------------------------------------------------------- what is shown and said
def test_beside_a_drawing_stands_the_picture_before_it():
    """Catches the first picture of a long document beside a drawing that follows the second."""
    pixels = pictures(4)
    ask = folder.Ask([0, "then", 1, "then"], 2, [])

    sheet = folder.beside_truth(pixels[3], ask, SimpleNamespace(pixels=pixels))

    assert sheet.shape == (8, 28, 3)
    assert np.array_equal(sheet[:, 0:8], pixels[1])     # the one before
    assert np.array_equal(sheet[:, 10:18], pixels[3])   # what was drawn
    assert np.array_equal(sheet[:, 20:28], pixels[2])   # what it should be


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pictures_in_pieces(monkeypatch, n):
    """Catches a piece that is drawn twice or not at all.

    Also catches one that begins again with the first picture's noise."""
    def generate(trained, prompts, first, **options):
        # Each picture is "drawn" from noise number first + k.
        return [[text, torch.tensor(first + k)] for k, text in enumerate(prompts)]

    monkeypatch.setattr(drawing, "TOGETHER", 2)
    monkeypatch.setattr(drawing.chameleon, "decoder_of", lambda trained: None)
    monkeypatch.setattr(drawing.sample, "generate", generate)
    monkeypatch.setattr(drawing, "decode_latents", lambda trained, latents: latents.numpy())

    assert drawing.draw_after(None, list("abcde"[:n])).tolist() == list(range(n))
    titles = [title for title, *_ in drawing.glance(None, [("x", ["a"])] * n, 0)]
    assert titles == ["x"] * n
    assert drawing.glance(None, [], 0) == []


def test_words_that_were_never_learned_are_marked(artist):
    """Catches a test caption that is shown as a failure although its word was never learned.

    No training caption has it. Capitals are no difference."""
    train = Pairs("folder", ["A cat", "a dog"], pictures(2))
    test = Pairs("folder", ["a Zebra", "A Dog"], pictures(2, 1))
    artist(draw_black)

    numbers, shown = folder.report_folder(trained(), train, test)

    assert numbers["new_words"] == ["zebra"]
    titles = [title for title, *_ in shown]
    assert titles == ["A cat", "a dog", "unseen: a (Zebra?)", "unseen: A Dog"]
    assert ("words in no training caption", "     1 (zebra)") in folder.describe(numbers)

    # At most six are named.
    for n, more in ((6, False), (7, True)):
        _, words = folder.describe({"new_words": list("abcdefghi"[:n])})[0]
        assert (", ..." in words) == more

    # Without the training split nobody can know.
    alone, shown = folder.report_folder(trained(), None, test)
    assert "own_nearest" not in alone
    assert shown[0][0] == "unseen: a Zebra"


def test_cider_takes_all_captions_of_a_picture(artist):
    """Catches captions of one picture that are counted as pictures.

    Also catches a score of too few pictures."""
    captions = ["a cat", "the grey cat", "a dog", "one horse", "two birds"]
    train = Pairs("folder", captions, pictures(4)[[0, 0, 1, 2, 3]])
    test = Pairs("folder", captions[:2], pictures(2))
    artist(draw_black, caption="a cat")

    numbers, _ = folder.report_folder(trained(), train, test)

    # Four pictures: the first has two captions, each of the others one.
    references = [captions[:2]] + [[caption] for caption in captions[2:]]
    wanted = 100 * folder.cider(["a cat"] * 4, references) / 100
    assert numbers["own_cider"] == pytest.approx(wanted)
    assert numbers["own_cider"] > 0
    assert numbers["unseen_cider"] is None


# ------------------------------------------------------------------- what a VAE keeps of a picture
HUES = np.array([
    [250, 0, 0],
    [250, 250, 0],
    [0, 250, 0],
    [0, 250, 250],
    [0, 0, 250],
    [250, 0, 250],
], np.uint8)
ALL = HUES[None].repeat(6, 0)[None]                     # (1, 6, 6, 3): each of six hues in a column


def test_psnr():
    """Catches natural logarithms, an amplitude for a square, and infinity where nothing is lost."""
    x = pictures(3)
    same = quality.measure(x, x)
    assert same.psnr > 100
    assert same.error == 0

    off = np.where(x < 128, x + 10, x - 10).astype(np.uint8)            # by 10 everywhere
    lossy = quality.measure(x, off)
    assert lossy.psnr == pytest.approx(20 * np.log10(255 / 10))
    assert lossy.error == 10


@pytest.mark.parametrize("k", range(6))
def test_the_colour_that_is_lost_is_named(k):
    """Catches a hue under another's name.

    Also catches a mean over all hues, in which one that is lost does not show."""
    name = quality.HUES[k]
    kept = quality.measure(ALL, ALL)
    assert kept.colours == pytest.approx(dict.fromkeys(quality.HUES, 1.0))
    assert kept.bottleneck() == ""

    # One hue turns grey; the five others are kept.
    grey = ALL.copy()
    grey[..., k, :] = HUES[k].mean()
    found = quality.measure(ALL, grey)
    assert found.least == (name, pytest.approx(0.0))
    assert sorted(found.colours.values())[1:] == [pytest.approx(1.0)] * 5
    assert f"{name} turns grey" in found.bottleneck()
    assert "PSNR below 25 dB" in found.bottleneck()

    half = (ALL.astype(int) + grey) // 2
    found = quality.measure(ALL, half.astype(np.uint8))
    assert found.colours[name] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("degrees", [-28, 28])
@pytest.mark.parametrize("k", range(6))
def test_a_hue_is_a_sixth_of_the_wheel(k, degrees):
    """Catches a border between two hues that is not half-way, at 30 degrees from each."""
    turn = (60 * k + degrees) % 360 / 360
    colour = [250 * part for part in colorsys.hsv_to_rgb(turn, 1, 1)]
    x = np.full((1, 4, 4, 3), colour).astype(np.uint8)
    assert list(quality.measure(x, x).colours) == [quality.HUES[k]]


def test_the_picture_of_reconstructions(monkeypatch, tmp_path):
    """Catches reconstructions above their originals, or beside others'.

    Also catches a sheet for more of them than there are."""
    monkeypatch.setattr(quality, "reconstruct", lambda vae, pixels: 255 - pixels)
    x = pictures(3)

    assert quality.show(None, x, tmp_path / "sheet.png").error > 1

    # Lines of 2 pixels around pictures of 8; each pixel is drawn twice as large.
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (2 + 2 * 10), 2 * (2 + 3 * 10), 3)
    for row, wanted in enumerate([x, 255 - x]):
        for column in range(3):
            top = 2 * (2 + 10 * row)
            left = 2 * (2 + 10 * column)
            tile = sheet[top: top + 16, left: left + 16]
            enlarged = np.kron(wanted[column], np.ones((2, 2, 1), np.uint8))
            assert np.array_equal(tile, enlarged)


def test_grey_pictures_have_no_colours():
    """Catches a MNIST run whose VAE is said to lose red."""
    x = pictures(2)[..., :1]
    assert quality.measure(x, x).colours == {}
    assert "hue" not in quality.measure(x, x).describe()

    black = np.zeros((1, 4, 4, 3), np.uint8)
    assert quality.measure(black, black).colours == {}
    assert quality.measure(black, black).least is None
