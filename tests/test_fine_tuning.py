"""
test_fine_tuning.py: a trained model learns to edit              (train.py --init; Transfusion §4.5)

THE IDEA    A tiny model.pt is made by hand, and the loop goes on from it: with its words, its
            shape, its VAE and its diffusion. Its documents are triples: a picture, an instruction,
            the picture after it. Sometimes the first picture is blinded, for guidance.
TRY IT      pytest -n 0 tests/test_fine_tuning.py
"""
import json
import math

import pytest
import torch

import data
import train
from config import parse_arguments
from conftest import draw_batch, make_run
from small_runs import folder_of_edits, interrupt, log, same, states, tuning
from support.checkpoint import load_trained
from support.common import Stopped, UserError


def test_fine_tuning_starts_from_its_model(pretrained, tmp_path):
    """§4.5. Catches a fine-tuned model that started from nothing, or that has other words, another
    shape, VAE or diffusion than --init. Catches a fine-tuning that moves no weight, or only those
    of the average."""
    out = tmp_path / "run"
    config = parse_arguments(tuning(pretrained, out))[0]
    start = load_trained(pretrained)
    weights = start.model.state_dict()
    run = make_run(config, out)
    assert same(run.model.state_dict(), weights) == []
    assert same(run.average.state_dict(), weights) == []

    train.main(tuning(pretrained, out))
    trained = load_trained(out / "model.pt")
    assert trained.model.config == start.model.config
    assert trained.tokenizer.vocabulary == start.tokenizer.vocabulary
    assert trained.diffusion.kind == "flow"
    assert trained.diffusion.shift == 3.0
    assert same(trained.vae.state_dict(), start.vae.state_dict()) == []

    saved = states(out)
    for part in ("model", "average"):
        moved = []
        for name, weight in weights.items():
            change = saved[f"{part}.{name}"] - weight
            moved.append(change.abs().max().item())
        assert min(moved) > 0
        assert max(moved) < 0.1                         # four steps from its start

    rows = log(out)
    assert all(row["lm"] > 0 for row in rows)
    assert ["gap" in row for row in rows] == [False, True] * 2      # --gap-every 2


def test_fine_tuning_resumes_to_the_bit(pretrained, tmp_path, monkeypatch):
    """Catches a resume that starts again from --init, or that draws other documents."""
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    train.main(tuning(pretrained, whole))

    with monkeypatch.context() as patch:
        interrupt(patch, at=2)
        with pytest.raises(Stopped):
            train.main(tuning(pretrained, out))
    assert states(out)["step"] == 2
    train.main(tuning(pretrained, out) + ["--resume"])
    assert same(states(whole), states(out)) == []
    assert log(whole) == log(out)

    with pytest.raises(UserError, match="--init"):      # another model to start from
        train.main(tuning(whole / "model.pt", out) + ["--resume"])


def test_blinded_pictures_are_pure_noise(pretrained, tmp_path):
    """docs/PAPER.md §4.8. Guidance over the picture needs a branch that never saw it. Catches a
    blinded picture with a little of itself left in, and limits that packing shifts to another
    picture."""
    options = tuning(pretrained, tmp_path / "run", documents=60, drop=0.3)
    run = make_run(parse_arguments(options)[0], tmp_path / "run")
    batches = [draw_batch(run, step, 0) for step in range(25)]
    t = torch.cat([batch.t for batch in batches])
    t_min = torch.cat([batch.t_min for batch in batches])
    t_max = torch.cat([batch.t_max for batch in batches])

    # A picture comes before its words, or after them, or it is blinded.
    limit = run.feed.documents.t_limit
    assert limit < 500                                  # flow with shift 3 is noisier at 500
    ranges = set(zip(t_min.tolist(), t_max.tolist()))
    assert ranges == {(1, limit), (1, 1000), (1000, 1000)}
    blinded = t_min == 1000
    assert (t[blinded] == 1000).all()
    assert 0.03 < blinded.double().mean() < 0.3

    # The others have a t that is uniform in its range.
    for top in (limit, 1000):
        here = t[~blinded & (t_max == top)].double()
        assert 1 <= here.min() <= 0.02 * top + 1
        assert 0.98 * top <= here.max() <= top
        five_sigma = 5 / math.sqrt(12 * len(here))      # of a mean of uniform numbers
        assert abs(here.mean() / top - 0.5) < five_sigma + 1 / top

    # The blinded picture is the first of its document, before any word.
    for batch in batches:
        for m in (batch.t_min == 1000).nonzero().flatten().tolist():
            row, first = (batch.image_id == m).nonzero()[0].tolist()
            assert batch.tokens[row, first - 1] == data.BOI
            assert batch.tokens[row, first - 2] == data.BOS


def test_fine_tuning_ends_with_its_report(pretrained, tmp_path):
    """Catches a report that breaks after the training: it must have pictures of before and after,
    and every number of §4.5."""
    options = tuning(pretrained, tmp_path / "run", steps=1, samples=2, sample_steps=1)
    numbers = train.main(options)
    assert numbers.keys() >= {"edits", "kept", "chains", "asked", "kinds", "conditioning_gap"}
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report.keys() == numbers.keys()
    assert (tmp_path / "run/samples.png").stat().st_size > 1000


def test_edits_from_nothing(command, tmp_path):
    """--data edits without a preset and without --init. Catches a KeyError, and a tokenizer without
    the words that its documents need."""
    train.main(command(data="edits", init="", steps=2, pairs=40))
    trained = load_trained(tmp_path / "run/model.pt")
    assert "changed" in trained.tokenizer.ids


def test_fine_tuning_on_a_folder(pretrained, tmp_path):
    """Catches a source without a grammar that the loop or its report did not think of."""
    folder_of_edits(tmp_path / "mine", "make the circle blue")
    options = tuning(pretrained, tmp_path / "run", data_dir=tmp_path / "mine", steps=2, samples=2,
                     sample_steps=2)
    numbers = train.main(options)
    assert "conditioning_gap" in numbers
    assert (tmp_path / "run/samples.png").stat().st_size > 1000
