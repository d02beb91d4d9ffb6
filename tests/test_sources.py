"""
test_sources.py: what there is to learn from       (sources/choose.py, sources/feed.py; §4.1)

THE IDEA    A source is a function with a name. Here: the scenes that are drawn from a seed, the
            rules that all sources share (a test split, a limit of memory), the choice of a source
            by its name, and what the feed checks before a training begins. Each kind of source has
            its own tests: test_scenes.py, test_mnist.py, test_picture_folder.py and others.
TRY IT      python -m pytest -n 0 tests/test_sources.py
"""
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

import vae as vae_module
from config import Config, parse_arguments
from diffusion import Diffusion
from sources import choose, edits, feed, scenes
from sources.pairs import Pairs, check_room, choose_test, hash_name, print_skipped, split_items
from support.common import UserError


# ------------------------------------------------------------------------------------------ scenes
def test_scenes_are_what_their_captions_say_and_depend_on_the_seed_only():
    """Catches pictures beside other captions, and a test split that repeats the training split.

    Also catches random numbers from a global generator."""
    train = choose.load_pairs("scenes", n=40, seed=5, progress=False)
    again = choose.load_pairs("scenes", n=40, seed=5, progress=False)
    test = choose.load_pairs("scenes", n=40, seed=5, split="test", progress=False)

    # The same seed, the same pairs.
    assert train.captions == again.captions
    assert (train.pixels == again.pixels).all()

    # No picture of the test split is in the training split.
    train_pictures = {picture.tobytes() for picture in train.pixels}
    test_pictures = {picture.tobytes() for picture in test.pixels}
    assert not train_pictures & test_pictures

    # Each caption is true of its picture.
    for pairs in (train, test):
        assert pairs.pixels.shape == (40, 32, 32, 3)
        assert pairs.pixels.dtype == np.uint8
        for text, picture in zip(pairs.captions, pairs.pixels):
            assert scenes.holds(scenes.read_caption(text), scenes.parse(picture)), text


def test_held_out_scenes():
    """Catches an evaluation set of unseen pairs that has seen ones in it."""
    pairs = scenes.load_scenes(20, 0, held_out=True, progress=False)
    held_out = [f"{color} {shape}" for color, shape in scenes.HELD_OUT]
    for text in pairs.captions:
        assert any(words in text for words in held_out), text


# -------------------------------------------------------------------------- what all sources share
@pytest.mark.parametrize("names, words", [
    ("a" * 9, "9 usable things, or 1 where"),
    ("a" * 10, "10 usable things, or 1 where"),
    ("ab" * 4 + "a", "9 usable things, or 2 where"),
])
def test_how_few_are_enough(names, words):
    """Catches ten that are refused, and nine that are not.

    Ten items of two pictures are the least. Here every letter is an item, and names its picture."""
    with pytest.raises(UserError, match=words):
        split_items("here", list(names), "train", "things")

    enough = list("a" * 9 + "b")
    train = split_items("here", enough, "train", "things")
    test = split_items("here", enough, "test", "things")
    assert sorted(train + test) == list(range(10))
    assert len(train) > 0
    assert len(test) > 0


def test_of_a_few_pictures_one_is_for_the_test():
    """Catches a small folder that has no test picture, or hardly any other."""
    # The rule is a hash that ten divides. None of these names has one.
    names = [name for name in map(str, range(99)) if hash_name(name) % 10 != 0]
    for n in (2, 9, 60):
        few = names[:n]
        assert choose_test(set(few)) == {min(few, key=hash_name)}


def test_five_problems_are_named(capsys):
    """Catches "..." where all are named, and hundreds of sentences."""
    for n in (0, 5, 6):
        print_skipped("here", [f"p{k}" for k in range(n)], 99, "things")

    assert capsys.readouterr().out.splitlines() == [
        "here: skipped 5 of 99 things: p0; p1; p2; p3; p4",
        "here: skipped 6 of 99 things: p0; p1; p2; p3; p4 ...",
    ]


@pytest.mark.parametrize("size", [32, 256])
def test_two_gigabytes_of_pictures_are_the_most(size):
    """Catches pictures that are counted in other units than bytes of three colours."""
    most = 2 ** 31 // (size * size * 3)

    check_room(most, size)

    sentence = f"{most + 1:,} pictures of {size}x{size} would take 2.0 GB .* at most {most:,}"
    with pytest.raises(UserError, match=sentence):
        check_room(most + 1, size)


# --------------------------------------------------------------------------- a source by its name
@pytest.mark.parametrize("name", ["bars", "Scenes", "", "mnits", None])
def test_an_unknown_source_gets_a_sentence(name):
    """Catches StopIteration or KeyError where a name is misspelt.

    Also catches a sentence that does not name the choices."""
    choices = "scenes, mnist, folder, documents, edits"
    with pytest.raises(UserError, match=f"no data set .*{choices}.*SOURCES"):
        choose.load_pairs(name)


def test_a_source_of_your_own_is_a_function_and_a_line(monkeypatch):
    """Catches a second table that a fork must find, and a source that is not told what it needs."""
    def load_bars(size=32, split="train", n=10, **unused):
        assert set(unused) == {"folder", "seed", "categories", "progress"}
        pixels = np.zeros((n, size, size, 3), np.uint8)
        return Pairs("bars", [f"{split} bar"] * n, pixels)

    monkeypatch.setitem(choose.SOURCES, "bars", load_bars)

    drawn = choose.load_pairs("bars", size=20, split="test", n=3)
    assert drawn.captions == ["test bar"] * 3
    assert drawn.pixels.shape == (3, 20, 20, 3)

    # A run's Config says the same things by other names.
    config = Config(data="bars", image_size=24, pairs=7)
    assert len(choose.load_source(config).captions) == 7
    assert choose.load_source(config, "test", 2).pixels.shape == (2, 24, 24, 3)


def test_a_source_gets_what_the_run_says(monkeypatch):
    """Catches an option of the run that does not reach its source.

    Also catches a progress bar for the test split, and defaults that are not a run's."""
    for name in ("scenes", "mnist"):
        monkeypatch.setitem(choose.SOURCES, name, lambda **given: given)

    config = Config(
        data="mnist",
        data_dir="there",
        image_size=24,
        pairs=7,
        seed=3,
        world="one",
    )
    assert choose.load_source(config) == dict(
        folder="there",
        size=24,
        split="train",
        n=7,
        seed=3,
        categories=scenes.WORLDS["one"],
        progress=True,
    )
    assert choose.load_source(Config(), "test", progress=True)["progress"] is False
    assert choose.load_source(Config(), progress=False)["progress"] is False
    assert choose.load_source(Config())["folder"] is None

    plain = choose.load_pairs("scenes")
    run = Config()
    assert plain["size"] == run.image_size
    assert plain["n"] == run.pairs
    assert plain["seed"] == run.seed


# --------------------------------------------------------- what is checked before a training begins
@pytest.mark.parametrize("side, channels, fits", [
    (32, 3, True),
    (32, 1, False),
    (30, 3, False),                                     # the VAE halves the sides: 30, 15, ...
    (30, 1, False),
])
def test_a_vae_reads_pictures_of_its_channels_and_sides(side, channels, fits):
    """Catches grey pictures for a VAE of colours, found out in the first step.

    Also catches sides that it cannot halve."""
    source = SimpleNamespace(pixels=np.zeros((1, side, side, channels), np.uint8))
    config = SimpleNamespace(data="folder", codes=0)

    expected = contextlib.nullcontext()
    if not fits:
        sentence = f"has {channels} channels and {side} pixels"
        expected = pytest.raises(UserError, match=sentence)
    with expected:
        feed.check_vae(config, vae_module.VAEConfig(), source)


@pytest.mark.parametrize("name, patch", [("transfusion", 2), ("chameleon", 1)])
def test_a_chameleon_has_a_code_for_every_place(name, patch):
    """Catches patches of codes, and pictures that are not cut into patches."""
    config = parse_arguments([])[0]
    config.model = name
    config.patch = 2
    shape = feed.shape_of(config, 30, (4, 8, 8), None)
    assert shape.patch == patch


@pytest.mark.parametrize("T", [10, 100, 1000, 4000])
@pytest.mark.parametrize("data", ["scenes", "edits"])
def test_one_T_decides_how_noisy_a_document_is(data, T):
    """Catches pictures of t = 1000 for a diffusion of 100 steps, which has no such t, and a limit
    of 500 of its 100 steps."""
    config = parse_arguments(["--data", data, "--preset", "flow"])[0]
    limits = feed.noise_limits(config, Diffusion(T=T))
    assert limits["noisiest"] == T
    share = 0.1 if data == "edits" else 0.5             # App. B.2: 500 of 1,000
    assert limits["t_limit"] == max(1, share * T)

    # What draws the documents listens to it.
    pairs = scenes.load_scenes(20, 0, progress=False)
    if data == "edits":
        pairs = edits.scene_edits(20, 0, progress=False)
    documents = feed.build_documents(config, pairs, 16, limits, None)
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(100):
        pictures = [part for part in documents.draw(rng) if part[0] == "image"]
        found |= {t_max for _, _, t_max, *_ in pictures}
    assert found == {limits["t_limit"], T}


def test_half_of_the_pictures_to_look_at_are_unseen():
    """Catches more pictures than were asked for: each costs seconds of every save."""
    source = SimpleNamespace(
        to_draw=lambda: [(["a", "circle"], 0)] * 9,
        pixels=None,
    )
    its_feed = SimpleNamespace(source=source, test=source, vae=None)

    prompts = feed.Feed.prompts(its_feed, 4)

    seen = ("a circle", ["a", "circle"])
    unseen = ("unseen: a circle", ["a", "circle"])
    assert prompts == [seen, seen, unseen, unseen]
