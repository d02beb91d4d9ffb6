"""
test_reference.py: does curves.png show what is normal?                             (support/reference.py; docs/PAPER.md §4.14)
"""
import json
from dataclasses import replace

import pytest

import train
from config import parse_arguments
from support import checkpoint, figures, reference
from support.common import UserError


def config_of(*options):
    """The Config of a command line."""
    return parse_arguments(options)[0]


def test_a_first_run_has_a_reference():
    """The log of a real `python train.py --preset flow`. Catches one that is of another run, cut, or made up: it starts where knowing nothing
    starts, its gap opens, and the report's numbers stand at its end."""
    rows = reference.find(config_of("--preset", "flow"))
    assert [row["step"] for row in rows] == list(range(50, 3301, 50))
    assert rows[0]["diffusion"] > 1.4 and rows[0]["lm"] > 2 and 0.2 < rows[-1]["diffusion"] < 0.3 and 0.54 < rows[-1]["lm"] < 0.58
    gaps = [row["gap"] for row in rows if "gap" in row]
    assert gaps[0] < 0.06 and gaps[-1] > 0.15 and len(gaps) == 17
    assert all(len(row["by_t"]) == 5 for row in rows)


@pytest.mark.parametrize("path", sorted(reference.LOGS.glob("*.jsonl")), ids=lambda path: path.name)
def test_every_reference_is_small_and_says_where_it_comes_from(path):
    """Catches a log that nobody can make again."""
    head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert head["origin"]["command"].startswith("python train.py") and head["origin"]["commit"] and head["config"]["data"]
    assert len(rows) > 20 and path.stat().st_size < 30_000


def test_only_runs_like_it_are_compared():
    """Catches the curve of another objective, or other data, drawn as normal; and a run of another seed that finds none."""
    assert reference.find(config_of("--preset", "flow", "--seed", "3", "--steps", "500", "--samples", "0", "--out", "out/mine"))
    runs = ([], ["--data", "mnist"], ["--preset", "mnist-flow"], ["--preset", "six-paper"], ["--preset", "llama"])     # [] is the first run
    assert all(reference.find(config_of(*run)) for run in runs)
    # Of a new VAE only where one is trained.
    assert reference.find(config_of("--vae-steps", "20")) and not reference.find(config_of("--data", "mnist", "--vae-steps", "20"))
    for other in (["--lam", "2"], ["--diffusion", "ddpm"], ["--world", "six"], ["--size", "small"], ["--data", "mnist"], ["--model", "llama"]):
        assert reference.find(config_of("--preset", "flow", *other)) == [], other


def test_how_a_step_is_cut_does_not_matter():
    """Catches a run in micro-batches that finds no reference, and one of half the batch that finds it."""
    run = config_of("--documents", "4", "--accumulate", "2")
    for documents, accumulate, alike in ((8, 1, True), (8, 0, True), (2, 4, True), (4, 1, False), (8, 2, False)):
        assert reference.is_like(run, vars(config_of("--documents", str(documents), "--accumulate", str(accumulate)))) == alike


def test_it_is_drawn_below(tmp_path, monkeypatch):
    """Every curve twice, once dotted. Catches a reference that is loaded and not drawn, or drawn under another's name."""
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    rows = reference.find(config_of("--preset", "flow"))
    figures.plot_curves(rows[:9], tmp_path / "curves.png", rows)
    figures.plot_curves(rows[:9], tmp_path / "curves.png")
    with_it, without = [[axis.lines for axis in figure.axes] for figure in drawn]
    for name, lines in zip(("losses", "noise", "gap"), with_it, strict=True):
        dotted = [line for line in lines if line.get_linestyle() == ":" and len(line.get_xdata())]
        own = [line for line in lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1 and line.get_color() != "grey"]
        assert len(dotted) == len(own) == {"losses": 2, "noise": 5, "gap": 1}[name]
        for before, line in zip(dotted, own, strict=True):
            assert list(before.get_ydata()[:len(line.get_ydata())]) == list(line.get_ydata()) and before.get_color() == line.get_color()
            assert max(before.get_xdata()) == 3300
    assert all(len(line.get_xdata()) == 0 for lines in without for line in lines if line.get_linestyle() == ":")


def test_the_last_line_says_whether_there_is_one(tmp_path, capsys):
    """Catches a user who waits for dotted lines that nobody has drawn, or takes their absence for a mistake."""
    small = ["--steps", "1", "--pairs", "20", "--documents", "2", "--samples", "2", "--sample-steps", "1", "--out", str(tmp_path / "run")]
    train.main(["--preset", "scenes", "--lam", "4", *small])
    assert "curves.png (your run alone: the log of a run like it is not kept here); python" in capsys.readouterr().out
    assert reference.describe(reference.find(config_of("--preset", "flow"))) == "dotted: a run like it"


def test_a_run_is_kept(tmp_path, monkeypatch):
    """Catches a reference that is not found again, and a folder without a finished run."""
    monkeypatch.setattr(reference, "LOGS", tmp_path / "logs")
    out = tmp_path / "mine"
    out.mkdir()
    with pytest.raises(UserError, match="mine is not the folder of a finished run"):
        reference.main([str(out)])
    config = replace(config_of("--lam", "2"))
    (out / "config.json").write_text(json.dumps(vars(config) | {"learned": {"words": "a cat"}}, default=list), encoding="utf-8")
    (out / "log.jsonl").write_text('{"step": 50, "lm": 0.123456, "diffusion": null, "by_t": [null], "lr": 1}\n', encoding="utf-8")
    checkpoint.save(out / "model.pt", {"kind": "model", "origin": {"commit": "abc"}})
    reference.main([str(out), "--name", "lam2"])
    assert "cat" not in (tmp_path / "logs/lam2.jsonl").read_text(encoding="utf-8")     # a folder's config.json has all its words
    assert reference.find(config) == [{"step": 50, "lm": 0.1235, "diffusion": None, "by_t": [None]}]
    assert reference.find(config_of()) == []
