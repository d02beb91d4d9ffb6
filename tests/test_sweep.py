"""
test_sweep.py: which guidance is best, for which number?                       (metrics/sweep.py; Transfusion App. B.1)
"""
import json

import pytest

import evaluate
import sample
from metrics import coco, sweep
from support.common import UserError

RESULTS = {1.0: {"distance": 9.0, "clip": 20.0, "cider": 3.0}, 5.0: {"distance": 7.5, "clip": 24.0, "cider": 3.0},
           8.0: {"distance": 8.0, "clip": 24.0, "cider": 3.0}}


def test_the_best_of_each_number():
    """Catches the highest FID called the best, of a tie the strongest guidance, a number that no guidance moves, and a tie in all of them that shows none."""
    assert sweep.best(RESULTS, "distance") == 5 and sweep.best(RESULTS, "clip") == 5 and sweep.best(RESULTS, "cider") == 1
    lines = sweep.table(RESULTS, {"distance": "FID", "clip": "CLIP score", "cider": "CIDEr", "exact": "exact"})
    assert [line.split() for line in lines[:3]] == [["guidance", "1", "5", "8", "best"], ["FID", "9", "7.5*", "8", "5"],
                                                    ["CLIP", "score", "20", "24*", "24", "5"]]
    assert len(lines) == 4 and "another --seed" in lines[3]
    assert sweep.table(RESULTS, {"cider": "CIDEr"}) == ["with every weight: CIDEr 3"]


@pytest.mark.parametrize("command", [evaluate.main, lambda argv: coco.main(["scenes", *argv])], ids=["evaluate", "coco"])
@pytest.mark.parametrize("weights, words", [(["1", "-1"], "got -1"), (["2", "2.0"], "twice"), (["nan"], "got nan")])
def test_weights_that_make_no_sense(command, weights, words):
    """Catches one found out after the pictures of the first."""
    with pytest.raises(UserError, match=words):
        command(["--guidance", *weights])
    sweep.check_weights([0, 0.5, 1])                    # these do


def test_one_command_sweeps_a_report(tmp_path, capsys, monkeypatch):
    """evaluate.py: the same job for each weight, a table, and all numbers in the file."""
    jobs = []

    def measure(trained, job):                          # the real one takes minutes
        jobs.append(job)
        return {"exact": 0.9 - abs(job.options["guidance"] - 4) / 10, "captions": 0.5}, []
    monkeypatch.setitem(evaluate.REPORTS, "scenes", measure)
    monkeypatch.setattr(evaluate, "caption_losses", lambda *a: None)
    evaluate.main(["--guidance", "1", "4", "6", "--n", "6", "--json", str(tmp_path / "n.json")])
    written = json.loads((tmp_path / "n.json").read_text())
    assert written.keys() == {"1.0", "4.0", "6.0"} and written["1.0"]["exact"] == pytest.approx(0.6)
    assert [job.options.pop("guidance") for job in jobs] == [1, 4, 6] and jobs[0].options == jobs[1].options == jobs[2].options
    assert len({(job.n, job.seed, job.test is jobs[0].test) for job in jobs}) == 1
    assert [line.split()[-4:] for line in capsys.readouterr().out.splitlines() if "exact" in line] == [["0.6", "0.9*", "0.7", "4"]]


def test_one_command_sweeps_the_yardsticks(tmp_path, capsys, monkeypatch):
    """metrics.coco: captions once, pictures for each weight; GenEval's in folders of their own."""
    described = []
    real = sample.describe
    monkeypatch.setattr(sample, "describe", lambda *a, **more: described.append(1) or real(*a, **more))
    found = coco.main(["scenes", "--guidance", "1", "4", "--limit", "6", "--steps", "1", "--json", str(tmp_path / "n.json")])
    assert found.keys() == {1.0, 4.0} and found[1.0]["distance"] != found[4.0]["distance"] and len(described) == 1
    assert "cider" in found[1.0] and "cider" not in found[4.0]
    said = capsys.readouterr().out
    assert "CIDEr" in said and "Fréchet distance of latents" in said and "*" in said
    assert json.loads((tmp_path / "n.json").read_text())["4.0"] == found[4.0]
    (tmp_path / "g.jsonl").write_text('{"prompt": "a red circle"}')
    coco.main([str(tmp_path / "g.jsonl"), "--guidance", "1", "4", "--steps", "1", "--out", str(tmp_path / "geneval")])
    assert {path.name for path in (tmp_path / "geneval").iterdir()} == {"guidance_1", "guidance_4"}
    assert (tmp_path / "geneval/guidance_4/00000/samples/0003.png").exists()
