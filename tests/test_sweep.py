"""
test_sweep.py: which guidance is best, for which number?   (metrics/sweep.py; Transfusion App. B.1)

THE IDEA    "Tuned per benchmark", says the paper of guidance. So one command measures with several
            weights, and a table marks the best of each number: the lowest FID, the highest CLIP.
COMPARED    the table         with one written by hand
            both commands     with the jobs that they must do: one per weight, alike otherwise
RUN IT      pytest -n 0 tests/test_sweep.py
            Each docstring names the bug that the test catches.
"""
import json

import pytest

import evaluate
import sample
from metrics import coco, sweep
from support.common import UserError

# {weight: numbers}. The lower distance is the better one; clip has a tie; cider never moves.
RESULTS = {
    1.0: {"distance": 9.0, "clip": 20.0, "cider": 3.0},
    5.0: {"distance": 7.5, "clip": 24.0, "cider": 3.0},
    8.0: {"distance": 8.0, "clip": 24.0, "cider": 3.0},
}


def test_the_best_of_each_number():
    """Catches the highest FID called the best, the strongest guidance called the best of a tie, a
    number that no guidance moves, and a tie of all weights that shows nothing."""
    assert sweep.best(RESULTS, "distance") == 5
    assert sweep.best(RESULTS, "clip") == 5
    assert sweep.best(RESULTS, "cider") == 1

    names = {"distance": "FID", "clip": "CLIP score", "cider": "CIDEr", "exact": "exact"}
    lines = sweep.table(RESULTS, names)                 # nobody measured "exact"
    assert len(lines) == 4
    assert lines[0].split() == ["guidance", "1", "5", "8", "best"]
    assert lines[1].split() == ["FID", "9", "7.5*", "8", "5"]
    assert lines[2].split() == ["CLIP", "score", "20", "24*", "24", "5"]
    assert "another --seed" in lines[3]

    assert sweep.table(RESULTS, {"cider": "CIDEr"}) == ["with every weight: CIDEr 3"]


def coco_main(argv):
    """`python -m metrics.coco scenes ...`"""
    return coco.main(["scenes", *argv])


@pytest.mark.parametrize("command", [evaluate.main, coco_main], ids=["evaluate", "coco"])
@pytest.mark.parametrize("weights, words", [
    (["1", "-1"], "got -1"),
    (["2", "2.0"], "twice"),
    (["nan"], "got nan"),
])
def test_weights_that_make_no_sense(command, weights, words):
    """Catches one that is found out only after the pictures of the first."""
    with pytest.raises(UserError, match=words):
        command(["--guidance", *weights])
    sweep.check_weights([0, 0.5, 1])                    # these do make sense


def test_one_command_sweeps_a_report(tmp_path, capsys, monkeypatch):
    """Catches evaluate.py with another job for each weight, no table, or numbers that are not all
    in the file."""
    jobs = []

    def measure(trained, job):                          # the real one takes minutes
        jobs.append(job)
        exact = 0.9 - abs(job.options["guidance"] - 4) / 10             # best at 4
        return {"exact": exact, "captions": 0.5}, []

    monkeypatch.setitem(evaluate.REPORTS, "scenes", measure)
    monkeypatch.setattr(evaluate, "caption_losses", lambda *a: None)
    path = tmp_path / "n.json"
    evaluate.main(["--guidance", "1", "4", "6", "--n", "6", "--json", str(path)])

    # 1. The file has all weights.
    numbers = json.loads(path.read_text())
    assert numbers.keys() == {"1.0", "4.0", "6.0"}
    assert numbers["1.0"]["exact"] == pytest.approx(0.6)

    # 2. The jobs differ in their guidance, and in nothing else.
    assert [job.options.pop("guidance") for job in jobs] == [1, 4, 6]
    first = jobs[0]
    for job in jobs:
        assert job.options == first.options
        assert job.n == first.n
        assert job.seed == first.seed
        assert job.test is first.test

    # 3. The table.
    printed = capsys.readouterr().out
    rows = [line.split()[-4:] for line in printed.splitlines() if "exact" in line]
    assert rows == [["0.6", "0.9*", "0.7", "4"]]


def test_one_command_sweeps_the_yardsticks(tmp_path, capsys, monkeypatch):
    """Catches metrics.coco that describes pictures anew for each weight, which guidance does not
    change; that draws the same pictures; or whose folders for GenEval overwrite one another."""
    calls = []
    real_describe = sample.describe

    def counted_describe(*arguments, **options):
        calls.append(1)
        return real_describe(*arguments, **options)

    monkeypatch.setattr(sample, "describe", counted_describe)

    # 1. Numbers: captions once, pictures for each weight.
    path = tmp_path / "n.json"
    numbers = coco.main(["scenes", "--guidance", "1", "4", "--limit", "6", "--steps", "1",
                         "--json", str(path)])
    assert numbers.keys() == {1.0, 4.0}
    assert numbers[1.0]["distance"] != numbers[4.0]["distance"]
    assert len(calls) == 1
    assert "cider" in numbers[1.0]
    assert "cider" not in numbers[4.0]

    printed = capsys.readouterr().out
    assert "CIDEr" in printed
    assert "Fréchet distance of latents" in printed
    assert "*" in printed
    assert json.loads(path.read_text())["4.0"] == numbers[4.0]

    # 2. GenEval's pictures: a folder for each weight.
    prompts = tmp_path / "g.jsonl"
    prompts.write_text('{"prompt": "a red circle"}')
    out = tmp_path / "geneval"
    coco.main([str(prompts), "--guidance", "1", "4", "--steps", "1", "--out", str(out)])
    assert {folder.name for folder in out.iterdir()} == {"guidance_1", "guidance_4"}
    assert (out / "guidance_4/00000/samples/0003.png").exists()
