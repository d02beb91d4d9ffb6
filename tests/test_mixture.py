"""
test_mixture.py: do some pictures come more often, and by as much as was said?
                                                (scale/mixture.py; Transfusion §4.1 "Data")

THE IDEA    A folder of weight 3 must be read three times as often as one of weight 1, row by row,
            and nothing else may change: the order of a run without weights, the rows that are held
            out, text and patches 1 : 1. First orders by themselves, then packed folders, then a
            run.
TRY IT      pytest -n 0 tests/test_mixture.py
"""
import collections
import json

import pytest

import model
import train
from packing import command, same, training
from scale import mixture, pack, shards
from scale.mixture import Order, Source
from support.common import UserError


@pytest.fixture(scope="module")
def folders(vae_path, tmp_path_factory):
    """Three packings of scenes within one folder. The last has the rows that are held out."""
    out = tmp_path_factory.mktemp("mixture")
    for name, n in (("beautiful", 30), ("people", 60), ("web", 120)):
        pack.main(command(vae_path, out / name, scenes=n, shard_rows=4))
    return out


def rows_read(stream, steps, rows=8):
    """Counters {kind: {number of the row: how often it was read}} of some steps' batches."""
    counts = {kind: collections.Counter() for kind in shards.KINDS}
    real = stream.read_row

    def read_row(kind, k):
        counts[kind][k] += 1
        return real(kind, k)

    stream.read_row = read_row
    for step in steps:
        stream.batch(0, step, 0, rows=rows)
    stream.read_row = real
    return counts


def per_row(stream, counts, kind):
    """{folder: how often each of its rows was read, a mean}."""
    means = {}
    for source in stream.phase.orders[kind].sources:
        numbers = range(source.first, source.first + source.rows)
        means[source.folder] = sum(counts[kind][k] for k in numbers) / source.rows
    return means


# ---------------------------------------------------------------------------------------- one order
@pytest.mark.parametrize("weights", [
    {},
    {"b": 3},
    {"a": 0},
    {"a": 0.5, "b": 2.4},
    {"a": 1.5, "b": 0, "c": 0.2},
])
def test_each_row_has_its_places(weights):
    """Catches a row of another folder, a weight that is rounded away, and a fraction that always
    takes the same rows."""
    sources = [Source("a", 0, 7), Source("b", 7, 10), Source("c", 17, 5)]
    # How many places each folder has in an epoch.
    places = {}
    for source in sources:
        places[source.folder] = round(source.rows * weights.get(source.folder, 1))
    order = Order(sources, weights)
    assert order.n == sum(places.values())

    counts = collections.Counter()
    epochs = 70                                         # a multiple of all numbers of rows
    for epoch in range(epochs):
        here = collections.Counter(order.row(place, epoch) for place in range(order.n))
        for source in sources:
            times = [here[source.first + k] for k in range(source.rows)]
            assert max(times) - min(times) <= 1         # as even as it can be
        counts += here

    # Over the epochs it is even: each row of a folder came equally often.
    for source in sources:
        times = [counts[source.first + k] for k in range(source.rows)]
        wanted = epochs * places[source.folder] / source.rows
        assert times == [wanted] * source.rows
    assert sum(counts.values()) == epochs * order.n


def test_without_weights_nothing_changes(folders):
    """Catches another order, or another share of text, for the runs that name no mixture: they
    would not resume to the bit."""
    stream = shards.Shards(folders)
    for kind in shards.KINDS:
        n = stream.rows[kind]
        order = stream.phase.orders[kind]
        assert order.n == n
        assert [order.row(place, 5) for place in range(n)] == list(range(n))

    # The share of rows of text, by hand: it fills what pictures leave to text.
    text = stream.total("text", "positions") / stream.rows["text"]
    pairs = 2 * stream.patches * stream.pictures - stream.total("pairs", "positions")
    gap = pairs / stream.total("pairs", "rows")
    assert stream.phase.share == round(gap / (gap + text) * 2 ** 32)

    # Weights of 1 are no weights.
    ones = shards.Shards(folders, mixture={"people": 1.0, "web": 1.0},
                         at_the_end={"people": 1.0}, last_from=2)
    for step in range(4):
        assert same(stream.batch(1, step, 0, 8), ones.batch(1, step, 0, 8))


# ----------------------------------------------------------------------------------- packed folders
def test_people_are_seen_more_often(folders):
    """§4.1, "we upsample 80M Shutterstock images containing people". Catches weights of other
    folders, weights that the held-out rows shift, and held-out rows that are trained on."""
    stream = shards.Shards(folders, mixture={"people": 3, "web": 0.5})
    orders = stream.phase.orders
    steps = 4 * max(order.n for order in orders.values())
    counts = rows_read(stream, range(steps))

    for kind in shards.KINDS:
        means = per_row(stream, counts, kind)
        assert means["people"] / means["beautiful"] == pytest.approx(3, rel=0.05)
        assert means["web"] / means["beautiful"] == pytest.approx(0.5, rel=0.1)

    # The rows that are held out have the numbers behind these.
    rows = stream.rows["pairs"]
    assert rows == sum(source.rows for source in orders["pairs"].sources)
    assert max(counts["pairs"]) < rows


def test_text_and_patches_stay_1_to_1(vae_path, tmp_path):
    """Catches a share of text that is measured without the weights: a folder of pictures that is
    read often would crowd it out."""
    pack.main(command(vae_path, tmp_path / "short", scenes=200))
    pack.main(command(vae_path, tmp_path / "wordy", text=None, scenes=200, world="six"))
    for weights in ({}, {"wordy": 6}, {"short": 6}):
        stream = shards.Shards(tmp_path, mixture=weights)
        patches = 0
        texts = 0
        for step in range(200):
            batch = stream.batch(2, step, 0, rows=8)
            is_patch = batch.image_id >= 0
            is_padding = batch.tokens == 0
            patches += int(is_patch.sum())
            texts += int((~is_patch & ~is_padding).sum())
        assert texts / patches == pytest.approx(1, abs=0.03), weights


def test_the_last_percent_is_another_mixture(folders):
    """§4.1, "upweight the portion of high-aesthetic images in the last 1%". Catches a phase that
    begins at the wrong step, that keeps the old order, or that depends on what was read before."""
    begins = [mixture.last_from(steps) for steps in (100, 500_000, 250, 10)]
    assert begins == [99, 495_000, 247, 9]

    web = {"web": 0.5}
    beautiful = {"beautiful": 8}
    stream = shards.Shards(folders, mixture=web, at_the_end=beautiful, last_from=99)
    plain = shards.Shards(folders, mixture=web)
    assert same(stream.batch(0, 98, 0, 8), plain.batch(0, 98, 0, 8))
    assert not same(stream.batch(0, 99, 0, 8), plain.batch(0, 99, 0, 8))

    # The weights of the last percent come on top of those of the run.
    steps = 4 * stream.last_phase.orders["pairs"].n
    counts = rows_read(stream, range(99, 99 + steps))
    means = per_row(stream, counts, "pairs")
    assert means["beautiful"] / means["people"] == pytest.approx(8, rel=0.1)
    assert means["web"] / means["people"] == pytest.approx(0.5, rel=0.15)

    # A resumed run begins in the middle of it.
    again = shards.Shards(folders, mixture=web, at_the_end=beautiful, last_from=99)
    assert same(again.batch(0, 120, 0, 8), stream.batch(0, 120, 0, 8))


# -------------------------------------------------------------------------------------------- a run
def test_a_run_with_a_mixture(folders, tmp_path, monkeypatch, capsys):
    """Catches options that are not passed on, and a plan that nobody can read."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    phases = []
    real = shards.Shards.draw_row

    def draw_row(self, seed, g, phase=None):
        phases.append(phase.key)
        return real(self, seed, g, phase)

    monkeypatch.setattr(shards.Shards, "draw_row", draw_row)
    options = dict(steps=3, documents=2, mixture_end="beautiful=5")
    train.main(training(folders, tmp_path / "run", mixture="people=2", **options))

    # Three steps of two rows; the last step is another phase.
    assert phases == ["", "", "", "", " last", " last"]
    output = capsys.readouterr().out
    assert "an epoch, pairs: beautiful " in output
    assert "an epoch from step 2 on, text: " in output
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["mixture"] == "people=2"
    assert config["mixture_end"] == "beautiful=5"

    other = training(folders, tmp_path / "run", mixture="people=3", **options)
    with pytest.raises(UserError, match="--mixture people=2"):
        train.main([*other, "--resume"])


@pytest.mark.parametrize("options, words", [
    (["--mixture", "people"], "people=2,web=0.5, not 'people'"),
    (["--mixture", "people=-1"], "not 'people=-1'"),
    (["--mixture", "people=nan"], "not 'people=nan'"),
    (["--mixture", "=2"], "not '=2'"),
    (["--mixture-end", "web=x"], "--mixture-end wants"),
    (["--mixture", "web=1,web=2"], "names web twice"),
    (["--mixture", "peple=2"], "names peple, but the folders .* beautiful, people, web"),
    (["--mixture", "web=0,people=0,beautiful=0"], "leaves no text"),
    (["--data", "scenes", "--mixture", "web=2"], "for --data shards"),
])
def test_mixtures_that_cannot_be(folders, tmp_path, options, words):
    """Catches a misspelt folder that silently has a weight of 1."""
    with pytest.raises(UserError, match=words):
        train.main([*training(folders, tmp_path / "run"), *options])
    assert not (tmp_path / "run").exists()
