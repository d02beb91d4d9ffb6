"""
test_reference.py: does curves.png show what is normal?
                                                        (support/reference.py; docs/PAPER.md §4.14)

THE IDEA    A loss is compared with the log of a real run, which is kept in assets/logs. That helps
            only if the two runs are alike. So: which run finds which log, what is drawn of it, and
            what is said where there is none.
TRY IT      pytest -n 0 tests/test_reference.py
"""
import json

import pytest

import train
from config import parse_arguments
from support import checkpoint, figures, reference
from support.common import UserError


def config_of(*options):
    """The Config of a command line."""
    return parse_arguments(options)[0]


# ------------------------------------------------------------------------------------ what is kept
def test_a_first_run_has_a_reference():
    """The log of a real `python train.py --preset flow`. Catches one that is of another run, cut,
    or made up: it starts where knowing nothing starts, its gap opens, and the report's numbers
    stand at its end."""
    rows = reference.find(config_of("--preset", "flow"))
    assert [row["step"] for row in rows] == list(range(50, 3301, 50))
    first = rows[0]
    assert first["diffusion"] > 1.4
    assert first["lm"] > 2
    last = rows[-1]
    assert 0.2 < last["diffusion"] < 0.3
    assert 0.54 < last["lm"] < 0.58

    gaps = [row["gap"] for row in rows if "gap" in row]
    assert len(gaps) == 17
    assert gaps[0] < 0.06
    assert gaps[-1] > 0.15
    for row in rows:
        assert len(row["by_t"]) == 5                    # losses at five ranges of t


@pytest.mark.parametrize(
    "path", sorted(reference.LOGS.glob("*.jsonl")), ids=lambda path: path.name)
def test_every_reference_is_small_and_says_where_it_comes_from(path):
    """Catches a log that nobody can make again."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head, *rows = [json.loads(line) for line in lines]
    assert head["origin"]["command"].startswith("python train.py")
    assert head["origin"]["commit"]
    assert head["config"]["data"]
    assert len(rows) > 20
    assert path.stat().st_size < 30_000                 # bytes


# ----------------------------------------------------------------------------------- what is found
def test_only_runs_like_it_are_compared():
    """Catches the curve of another objective, or of other data, that is drawn as normal, and a run
    of another seed that finds none."""
    # 1. What changes nothing that is learned does not matter.
    assert reference.find(config_of("--preset", "flow", "--seed", "3", "--steps", "500",
                                    "--samples", "0", "--out", "out/mine"))

    # 2. Each of these has a log. The first run is the one without options.
    for run in ([], ["--data", "mnist"], ["--preset", "mnist-flow"],
                ["--preset", "mnist-minute"], ["--preset", "six-paper"],
                ["--preset", "llama"]):
        assert reference.find(config_of(*run)), run

    # 3. Numbers of a new VAE matter only where one is trained: digits have none in assets/. For
    #    scenes only another preset can say otherwise: the command line's would be refused.
    scenes = config_of()
    scenes.vae_steps = 20
    assert reference.find(scenes)
    assert not reference.find(config_of("--data", "mnist", "--vae-steps", "20"))

    # 4. These are other runs.
    for other in (["--lam", "2"], ["--diffusion", "ddpm"], ["--world", "six"], ["--size", "small"],
                  ["--data", "mnist"], ["--model", "llama"]):
        assert reference.find(config_of("--preset", "flow", *other)) == [], other


def test_how_a_step_is_cut_does_not_matter():
    """Catches a run in micro-batches that finds no reference, and one of half the batch that finds
    it."""
    run = config_of("--documents", "4", "--accumulate", "2")

    def is_like(documents, accumulate):
        other = config_of("--documents", documents, "--accumulate", accumulate)
        return reference.is_like(run, vars(other))

    # 8 documents in all: it is the same batch. 0: as many micro-batches as fit, one in a toy.
    assert is_like("8", "1")
    assert is_like("8", "0")
    assert is_like("2", "4")
    # Half of it, and twice as many.
    assert not is_like("4", "1")
    assert not is_like("8", "2")


def test_a_run_is_kept(tmp_path, monkeypatch):
    """Catches a reference that is not found again, and a folder without a finished run."""
    monkeypatch.setattr(reference, "LOGS", tmp_path / "logs")
    out = tmp_path / "mine"
    out.mkdir()
    with pytest.raises(UserError, match="mine is not the folder of a finished run"):
        reference.main([str(out)])

    # The folder of a finished run, with a number too long to keep and one that nobody needs.
    config = config_of("--lam", "2")
    options = vars(config) | {"learned": {"words": "a cat"}}
    (out / "config.json").write_text(json.dumps(options, default=list), encoding="utf-8")
    line = '{"step": 50, "lm": 0.123456, "diffusion": null, "by_t": [null], "lr": 1}\n'
    (out / "log.jsonl").write_text(line, encoding="utf-8")
    checkpoint.save(out / "model.pt", {"kind": "model", "origin": {"commit": "abc"}})
    reference.main([str(out), "--name", "lam2"])

    # config.json has all the words of the data; a reference has none.
    assert "cat" not in (tmp_path / "logs/lam2.jsonl").read_text(encoding="utf-8")
    kept = {"step": 50, "lm": 0.1235, "diffusion": None, "by_t": [None]}
    assert reference.find(config) == [kept]
    assert reference.find(config_of()) == []


# ------------------------------------------------------------------------------------ what is shown
def is_reference(line):
    """Whether a line of curves.png is the reference: dotted."""
    return line.get_linestyle() == ":"


def is_own(line):
    """Whether a line of curves.png is a curve of the run itself, and not a grey help line."""
    solid = line.get_linestyle() == "-" and line.get_color() != "grey"
    return solid and len(line.get_xdata()) > 1


def test_it_is_drawn_below(tmp_path, monkeypatch):
    """Every curve is drawn twice, once dotted. Catches a reference that is loaded and not drawn, or
    drawn under another's name."""
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    rows = reference.find(config_of("--preset", "flow"))
    # As if a run were the first rows of the reference itself.
    figures.plot_curves(rows[:9], tmp_path / "curves.png", rows)
    figures.plot_curves(rows[:9], tmp_path / "curves.png")
    with_it, without = drawn

    for axis, curves in zip(with_it.axes, (2, 5, 1), strict=True):      # losses, by noise, gap
        dotted = [line for line in axis.lines if is_reference(line) and len(line.get_xdata())]
        own = [line for line in axis.lines if is_own(line)]
        assert len(dotted) == len(own) == curves
        for before, line in zip(dotted, own, strict=True):
            begin = before.get_ydata()[:len(line.get_ydata())]
            assert list(begin) == list(line.get_ydata())
            assert before.get_color() == line.get_color()
            assert max(before.get_xdata()) == 3300

    # Without a reference, no dotted line has a point.
    for axis in without.axes:
        for line in axis.lines:
            if is_reference(line):
                assert len(line.get_xdata()) == 0


def test_the_last_line_says_whether_there_is_one(tmp_path, capsys):
    """Catches a user who waits for dotted lines that nobody has drawn, or takes their absence for a
    mistake."""
    small = ["--steps", "1", "--pairs", "20", "--documents", "2", "--samples", "2",
             "--sample-steps", "1", "--out", str(tmp_path / "run")]
    train.main(["--preset", "scenes", "--lam", "4", *small])
    sentence = "curves.png (your run alone: the log of a run like it is not kept here); python"
    assert sentence in capsys.readouterr().out

    rows = reference.find(config_of("--preset", "flow"))
    assert reference.describe(rows) == "dotted: a run like it"
