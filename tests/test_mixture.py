"""
test_mixture.py: do some pictures come more often, and by as much as was said?       (scale/mixture.py; Transfusion §4.1 "Data")

Orders by themselves, then packed folders, then a run.
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
    keep = stream.read_row
    stream.read_row = lambda kind, k: counts[kind].update([k]) or keep(kind, k)
    for step in steps:
        stream.batch(0, step, 0, rows=rows)
    stream.read_row = keep
    return counts


def per_row(stream, counts, kind):
    """{folder: how often each of its rows was read, a mean}."""
    found = {}
    for source in stream.phase.orders[kind].sources:
        found[source.folder] = sum(counts[kind][source.first + k] for k in range(source.rows)) / source.rows
    return found


# ------------------------------------------------------------------------------------------------------------- one order
@pytest.mark.parametrize("weights", [{}, {"b": 3}, {"a": 0}, {"a": 0.5, "b": 2.4}, {"a": 1.5, "b": 0, "c": 0.2}])
def test_each_row_has_its_places(weights):
    """Catches a row of another folder, a weight that is rounded away, and a fraction that always takes the same rows."""
    sources = [Source("a", 0, 7), Source("b", 7, 10), Source("c", 17, 5)]
    order = Order(sources, weights)
    assert order.n == sum(round(source.rows * weights.get(source.folder, 1)) for source in sources)
    counts, epochs = collections.Counter(), 70          # a multiple of all numbers of rows
    for epoch in range(epochs):
        here = collections.Counter(order.row(place, epoch) for place in range(order.n))
        for source in sources:
            times = [here[source.first + k] for k in range(source.rows)]
            assert max(times) - min(times) <= 1         # as even as it can be
        counts += here
    for source in sources:
        wanted = epochs * round(source.rows * weights.get(source.folder, 1)) / source.rows
        assert [counts[source.first + k] for k in range(source.rows)] == [wanted] * source.rows
    assert sum(counts.values()) == epochs * order.n


def test_without_weights_nothing_changes(folders):
    """Catches another order, or another share of text, for the runs that name no mixture: they would not resume to the bit."""
    stream = shards.Shards(folders)
    for kind in shards.KINDS:
        n = stream.rows[kind]
        order = stream.phase.orders[kind]
        assert order.n == n and [order.row(place, 5) for place in range(n)] == list(range(n))
    text = stream.total("text", "positions") / stream.rows["text"]
    pairs = 2 * stream.patches * stream.pictures - stream.total("pairs", "positions")
    gap = pairs / stream.total("pairs", "rows")
    assert stream.phase.share == round(gap / (gap + text) * 2 ** 32)
    ones = shards.Shards(folders, mixture={"people": 1.0, "web": 1.0}, at_the_end={"people": 1.0}, last_from=2)
    assert all(same(stream.batch(1, step, 0, 8), ones.batch(1, step, 0, 8)) for step in range(4))


# ---------------------------------------------------------------------------------------------------------- packed folders
def test_people_are_seen_more_often(folders):
    """§4.1, "we upsample 80M Shutterstock images containing people". Catches weights of other folders, weights that the
    held-out rows shift, and held-out rows that are trained on."""
    stream = shards.Shards(folders, mixture={"people": 3, "web": 0.5})
    n = {kind: order.n for kind, order in stream.phase.orders.items()}
    steps = 4 * max(n.values())
    counts = rows_read(stream, range(steps))
    for kind in shards.KINDS:
        found = per_row(stream, counts, kind)
        assert found["people"] / found["beautiful"] == pytest.approx(3, rel=0.05)
        assert found["web"] / found["beautiful"] == pytest.approx(0.5, rel=0.1)
    assert max(counts["pairs"]) < stream.rows["pairs"] == sum(source.rows for source in stream.phase.orders["pairs"].sources)


def test_text_and_patches_stay_1_to_1(vae_path, tmp_path):
    """Catches a share of text that is measured without the weights: a folder of pictures that is read often would crowd it out."""
    pack.main(command(vae_path, tmp_path / "short", scenes=200))
    pack.main(command(vae_path, tmp_path / "wordy", text=None, scenes=200, world="six"))
    for weights in ({}, {"wordy": 6}, {"short": 6}):
        stream = shards.Shards(tmp_path, mixture=weights)
        patches = texts = 0
        for step in range(200):
            batch = stream.batch(2, step, 0, rows=8)
            patches += int((batch.image_id >= 0).sum())
            texts += int(((batch.image_id < 0) & (batch.tokens != 0)).sum())
        assert texts / patches == pytest.approx(1, abs=0.03), weights


def test_the_last_percent_is_another_mixture(folders):
    """§4.1, "upweight the portion of high-aesthetic images in the last 1%". Catches a phase that begins at the wrong step, that
    keeps the old order, or that depends on what was read before."""
    assert [mixture.last_from(steps) for steps in (100, 500_000, 250, 10)] == [99, 495_000, 247, 9]
    stream = shards.Shards(folders, mixture={"web": 0.5}, at_the_end={"beautiful": 8}, last_from=99)
    plain = shards.Shards(folders, mixture={"web": 0.5})
    assert same(stream.batch(0, 98, 0, 8), plain.batch(0, 98, 0, 8)) and not same(stream.batch(0, 99, 0, 8), plain.batch(0, 99, 0, 8))
    counts = rows_read(stream, range(99, 99 + 4 * stream.last_phase.orders["pairs"].n))
    found = per_row(stream, counts, "pairs")
    assert found["beautiful"] / found["people"] == pytest.approx(8, rel=0.1) and found["web"] / found["people"] == pytest.approx(0.5, rel=0.15)
    again = shards.Shards(folders, mixture={"web": 0.5}, at_the_end={"beautiful": 8}, last_from=99)
    assert same(again.batch(0, 120, 0, 8), stream.batch(0, 120, 0, 8))      # a resumed run begins here


# --------------------------------------------------------------------------------------------------------------- a run
def test_a_run_with_a_mixture(folders, tmp_path, monkeypatch, capsys):
    """Catches options that are not passed on, and a plan that nobody can read."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    seen = []
    real = shards.Shards.draw_row
    monkeypatch.setattr(shards.Shards, "draw_row", lambda self, seed, g, phase=None: seen.append(phase.key) or real(self, seed, g, phase))
    train.main(training(folders, tmp_path / "run", steps=3, documents=2, mixture="people=2", mixture_end="beautiful=5"))
    assert seen == ["", "", "", "", " last", " last"]
    said = capsys.readouterr().out
    assert "an epoch, pairs: beautiful " in said and "an epoch from step 2 on, text: " in said
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["mixture"], config["mixture_end"]) == ("people=2", "beautiful=5")
    with pytest.raises(UserError, match="--mixture people=2"):
        train.main(training(folders, tmp_path / "run", steps=3, documents=2, mixture="people=3", mixture_end="beautiful=5") + ["--resume"])


@pytest.mark.parametrize("options, words", [
    (["--mixture", "people"], "people=2,web=0.5, not 'people'"), (["--mixture", "people=-1"], "not 'people=-1'"),
    (["--mixture", "people=nan"], "not 'people=nan'"), (["--mixture", "=2"], "not '=2'"), (["--mixture-end", "web=x"], "--mixture-end wants"),
    (["--mixture", "web=1,web=2"], "names web twice"), (["--mixture", "peple=2"], "names peple, but the folders .* beautiful, people, web"),
    (["--mixture", "web=0,people=0,beautiful=0"], "leaves no text"), (["--data", "scenes", "--mixture", "web=2"], "for --data shards")])
def test_mixtures_that_cannot_be(folders, tmp_path, options, words):
    """Catches a misspelt folder that silently has a weight of 1."""
    with pytest.raises(UserError, match=words):
        train.main([*training(folders, tmp_path / "run"), *options])
    assert not (tmp_path / "run").exists()
