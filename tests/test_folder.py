"""
test_folder.py: what a model has learned of your own pictures       (metrics/folder.py, autoencoder/quality.py; docs/PAPER.md §4.11)

Artists whose drawings are known, perfect and not, against the folder's own pictures; and reconstructions that lose what we know.
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


def trained():
    """What report_folder asks of a model: a tokenizer and a VAE, whose reconstructions are the pictures themselves."""
    return SimpleNamespace(tokenizer=data.Words([]), vae=SimpleNamespace())


@pytest.fixture
def artist(monkeypatch):
    """A function that makes an artist: it draws what `paint(prompt)` returns, and says `caption`. Pictures in prompts are numbers."""
    def make(paint, caption="a cat"):
        monkeypatch.setattr(drawing, "draw_after", lambda trained, prompts, **options: np.stack([paint(p) for p in prompts]))
        monkeypatch.setattr(drawing, "describe", lambda trained, latents: [caption] * len(latents))
        monkeypatch.setattr(folder, "encode_pixels", lambda trained, pixels: pixels)
        monkeypatch.setattr(quality, "reconstruct", lambda vae, pixels: pixels)
    return make


@pytest.mark.parametrize("wrong, chunk", [(0, 4096), (3, 4096), (3, 2)])
def test_drawings_among_the_folders_own_pictures(monkeypatch, artist, wrong, chunk):
    """Catches an artist who draws the neighbour's picture and is called right, and pictures that are compared in chunks and lost."""
    monkeypatch.setattr(folder, "CHUNK", chunk)
    train, test = Pairs("folder", [f"cat {k}" for k in range(10)], pictures(10)), Pairs("folder", ["dog 1", "dog 2"], pictures(2, 1))
    truth = dict(zip(train.captions + test.captions, [*train.pixels, *test.pixels]))

    def paint(prompt):
        k = train.captions.index(prompt[0]) if prompt[0] in train.captions else 99
        picture = truth[prompt[0]] if k >= wrong else train.pixels[k + 1]
        return np.clip(picture.astype(int) + 20, 0, 255).astype(np.uint8)           # near it, and not the same

    artist(paint)
    numbers, shown = folder.report_folder(trained(), train, test, n=50)
    assert numbers["own_nearest"] == pytest.approx(1 - wrong / 10) and numbers["own_n"] == 10
    assert numbers["unseen_nearest"] == 1.0 and numbers["unseen_n"] == 2
    assert ("nearest is its own picture, unseen", "100.0% (n = 2; by chance 50.0%)") in folder.describe(numbers)
    assert [right for *_, right in shown] == [k >= wrong for k in range(10)] + [True, True]
    for k, (_, picture, _) in enumerate(shown[:10]):                                # drawn | a line | what it should be
        assert picture.shape == (8, 18, 3) and np.array_equal(picture[:, 10:], train.pixels[k]) and (picture[:, 8:10] == 255).all()


def test_pictures_that_are_the_same_are_the_right_one(artist):
    """Catches five captions of one picture, of which four are called wrong, and two pictures of one caption."""
    three = pictures(3)
    train = Pairs("folder", ["a", "b", "c", "c"], three[[0, 0, 1, 2]])
    artist(lambda prompt: three[{"a": 0, "b": 0, "c": 2}[prompt[0]]])
    assert folder.report_folder(trained(), train, train, n=9)[0]["own_nearest"] == 1.0


def test_an_edit_is_told_from_the_other_edits_of_its_picture(artist):
    """Catches an edit that is compared with all pictures, one that left the picture as it was, and the wrong one of two tones."""
    pixels = pictures(4)                                # 0 -> 1 or 2; 3 belongs to nobody else
    edits = Edits(pixels[[0, 1, 0, 2, 3, 3]], [([0, 1], ["make it light"]), ([2, 3], ["make it dark"]), ([4, 5], ["keep it"])])
    for chosen, share in ((dict(light=1, dark=2), 1.0), (dict(light=2, dark=2), 2 / 3), (dict(light=0, dark=0), 1 / 3)):
        artist(lambda prompt, chosen=chosen: pixels[chosen.get(prompt[1].split()[-1], 3)])
        numbers, shown = folder.report_folder(trained(), edits, edits)
        assert numbers["own_nearest"] == pytest.approx(share) and "own_cider" not in numbers
        assert ("nearest is the edit asked for, trained", f"{share:6.1%} (n = 3; by chance 38.9%)") in folder.describe(numbers)     # of 3, 3, 2
        assert shown[0][1].shape == (8, 28, 3) and np.array_equal(shown[0][1][:, :8], pixels[0])
    artist(lambda prompt: (0.6 * pixels[3] + 0.4 * pixels[{"light": 1, "dark": 2}.get(prompt[1].split()[-1], 3)]).astype(np.uint8))
    assert folder.report_folder(trained(), edits, edits)[0]["own_nearest"] == 1.0   # nearest of all is 3, which is no rival of these


def test_beside_a_drawing_stands_the_picture_before_it():
    """Catches the first picture of a long document beside a drawing that follows the second."""
    pixels = pictures(4)
    sheet = folder.beside_truth(pixels[3], folder.Ask([0, "then", 1, "then"], 2, []), SimpleNamespace(pixels=pixels))
    assert sheet.shape == (8, 28, 3)
    for place, k in ((0, 1), (10, 3), (20, 2)):
        assert np.array_equal(sheet[:, place: place + 8], pixels[k])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pictures_in_pieces(monkeypatch, n):
    """Catches a piece that is drawn twice or not at all, and one that begins again with the first picture's noise."""
    def generate(trained, prompts, first, **options):
        return [[text, torch.tensor(first + k)] for k, text in enumerate(prompts)]      # "drawn" from noise number first + k

    monkeypatch.setattr(drawing, "TOGETHER", 2)
    monkeypatch.setattr(drawing.chameleon, "decoder_of", lambda trained: None)
    monkeypatch.setattr(drawing.sample, "generate", generate)
    monkeypatch.setattr(drawing, "decode_latents", lambda trained, latents: latents.numpy())
    assert drawing.draw_after(None, list("abcde"[:n])).tolist() == list(range(n))
    assert [title for title, *_ in drawing.glance(None, [("x", ["a"])] * n, 0)] == ["x"] * n and drawing.glance(None, [], 0) == []


def test_words_that_were_never_learned_are_marked(artist):
    """Catches a test caption that is shown as a failure although no training caption has its word. Capitals are no difference."""
    train, test = Pairs("folder", ["A cat", "a dog"], pictures(2)), Pairs("folder", ["a Zebra", "A Dog"], pictures(2, 1))
    artist(lambda prompt: np.zeros((8, 8, 3), np.uint8))
    numbers, shown = folder.report_folder(trained(), train, test)
    assert numbers["new_words"] == ["zebra"]
    assert [title for title, *_ in shown] == ["A cat", "a dog", "unseen: a (Zebra?)", "unseen: A Dog"]
    assert ("words in no training caption", "     1 (zebra)") in folder.describe(numbers)
    for n, more in ((6, False), (7, True)):
        assert (", ..." in folder.describe({"new_words": list("abcdefghi"[:n])})[0][1]) == more
    alone, shown = folder.report_folder(trained(), None, test)                      # without the training split nobody can know
    assert "own_nearest" not in alone and shown[0][0] == "unseen: a Zebra"


def test_cider_takes_all_captions_of_a_picture(artist):
    """Catches captions of one picture that are counted as pictures, and a score of too few of them."""
    captions = ["a cat", "the grey cat", "a dog", "one horse", "two birds"]
    train = Pairs("folder", captions, pictures(4)[[0, 0, 1, 2, 3]])
    artist(lambda prompt: np.zeros((8, 8, 3), np.uint8), caption="a cat")
    numbers, _ = folder.report_folder(trained(), train, Pairs("folder", captions[:2], pictures(2)))
    assert numbers["own_cider"] == pytest.approx(100 * folder.cider(["a cat"] * 4, [captions[:2]] + [[c] for c in captions[2:]]) / 100)
    assert numbers["own_cider"] > 0 and numbers["unseen_cider"] is None


# ---------------------------------------------------------------------------------------------- what a VAE keeps of a picture
HUES = np.array([[250, 0, 0], [250, 250, 0], [0, 250, 0], [0, 250, 250], [0, 0, 250], [250, 0, 250]], np.uint8)
ALL = HUES[None].repeat(6, 0)[None]                     # (1, 6, 6, 3): each of six hues in a column


def test_psnr():
    """Against the formula, and no infinity: catches natural logarithms, and an amplitude for a square."""
    x = pictures(3)
    assert quality.measure(x, x).psnr > 100 and quality.measure(x, x).error == 0
    off = np.where(x < 128, x + 10, x - 10).astype(np.uint8)
    assert quality.measure(x, off).psnr == pytest.approx(20 * np.log10(25.5)) and quality.measure(x, off).error == 10


@pytest.mark.parametrize("k", range(6))
def test_the_colour_that_is_lost_is_named(k):
    """Catches a hue under another's name, and a mean over all hues, in which one that is lost does not show."""
    kept = quality.measure(ALL, ALL)
    assert kept.colours == pytest.approx(dict.fromkeys(quality.HUES, 1.0)) and kept.bottleneck() == ""
    grey = ALL.copy()
    grey[..., k, :] = HUES[k].mean()
    found = quality.measure(ALL, grey)
    assert found.least == (quality.HUES[k], pytest.approx(0.0)) and sorted(found.colours.values())[1:] == [pytest.approx(1.0)] * 5
    assert f"{quality.HUES[k]} turns grey" in found.bottleneck() and "PSNR below 25 dB" in found.bottleneck()
    half = (ALL.astype(int) + grey) // 2
    assert quality.measure(ALL, half.astype(np.uint8)).colours[quality.HUES[k]] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("degrees", [-28, 28])
@pytest.mark.parametrize("k", range(6))
def test_a_hue_is_a_sixth_of_the_wheel(k, degrees):
    """Catches a border between two hues that is not half-way."""
    colour = colorsys.hsv_to_rgb((60 * k + degrees) % 360 / 360, 1, 1)
    x = np.full((1, 4, 4, 3), [250 * part for part in colour]).astype(np.uint8)
    assert list(quality.measure(x, x).colours) == [quality.HUES[k]]


def test_the_picture_of_reconstructions(monkeypatch, tmp_path):
    """Catches reconstructions above their originals, or beside others', and a sheet for more of them than there are."""
    monkeypatch.setattr(quality, "reconstruct", lambda vae, pixels: 255 - pixels)
    x = pictures(3)
    assert quality.show(None, x, tmp_path / "sheet.png").error > 1
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (2 + 2 * 10), 2 * (2 + 3 * 10), 3)                    # lines of 2 pixels around pictures of 8
    for row, column in np.ndindex(2, 3):
        y, x0 = 2 * (2 + 10 * row), 2 * (2 + 10 * column)
        tile = sheet[y: y + 16, x0: x0 + 16]
        assert np.array_equal(tile, np.kron(255 - x[column] if row else x[column], np.ones((2, 2, 1), np.uint8)))


def test_grey_pictures_have_no_colours():
    """Catches a MNIST run whose VAE is said to lose red."""
    x = pictures(2)[..., :1]
    assert quality.measure(x, x).colours == {} and "hue" not in quality.measure(x, x).describe()
    black = np.zeros((1, 4, 4, 3), np.uint8)
    assert quality.measure(black, black).colours == {} and quality.measure(black, black).least is None
