"""test_experiments.py: a table holds what its runs say                                                    (experiments.py)"""
import json
import os
import signal
import threading
import time

import numpy as np
import pytest

import data
import experiments
from config import parse_arguments
from sources import scenes
from support.common import UserError, run_command

TINY = "--steps 2 --samples 6 --sample-steps 2 --gap-every 2 --save-every 2 --pairs 60 --documents 6 --warmup 1"


@pytest.fixture
def tiny(monkeypatch):
    """One table of two rows, of seconds."""
    monkeypatch.setattr(experiments, "BASE", TINY)
    monkeypatch.setattr(experiments, "TABLES", {"9": ("a table", {"this way": "", "that way": "--preset llama --seed 4"})})


def test_every_row_is_a_run():
    """Each row's options are train.py's; within a table no two rows are the same run; and each differs from the base as its
    name says. Catches a typo that would show only after an hour."""
    for number, (title, rows) in experiments.TABLES.items():
        configs = [parse_arguments(experiments.argv_of(options, 0, "x"))[0] for options in rows.values()]
        assert len({str(config) for config in configs}) == len(rows) and "Table" in title, number
        assert all(config.seed == 0 and config.samples == 400 for config in configs)
    def find(number, row):
        return parse_arguments(experiments.argv_of(experiments.TABLES[number][1][row], 0, "x"))[0]

    a, b = find("2", "Llama"), find("2", "+ stability modifications")
    assert {k for k, v in vars(a).items() if vars(b)[k] != v} == {"stable", "lr"} and a.model == "llama"
    assert [(find("5", row).size, find("5", row).encoder) for row in experiments.TABLES["5"][1]] == \
           [(size, encoder) for size in ("toy", "small") for encoder in ("linear", "unet")]
    assert find("2", "Chameleon: + loss on image tokens").model == "chameleon" and find("2", "Chameleon: + loss on image tokens").stable
    assert find("1", "Transfusion, 750 steps").steps == 750 and find("1", "Chameleon, 1500 steps").steps == 1500
    assert not find("3", "U-Net, causal").bidirectional and find("4", "U-Net, 8x8").patch == 8 and find("11", "none").t_limit == 1000


def test_rows_are_shared():
    """A run is named by its options. Catches one run under two spellings: two programs would write to one folder at once."""
    options = {o for _, rows in experiments.TABLES.values() for o in rows.values()}
    assert all(o == " ".join(o.split()) for o in options)
    assert len({experiments.folder_of("x", o, 0) for o in options}) == len(options)


def test_a_step_is_as_large_in_every_row():
    """Tokens and text per step. Catches numbers that were found for other captions (as they were once)."""
    pairs, steps = scenes.load_scenes(500, seed=0, categories=scenes.WORLDS["one"], progress=False), []
    words, rng = data.Words(pairs.vocabulary()), np.random.default_rng(0)
    for options in [*("", experiments.PATCH_1, experiments.PATCH_4, experiments.PATCH_8), "--preset chameleon"]:
        config, *_ = parse_arguments(experiments.argv_of(options, 0, "x"))
        P = (8 // (1 if config.model == "chameleon" else config.patch)) ** 2
        stream = data.Documents(pairs, P, config.seq_len, text_share=config.text_share)
        tokens = np.mean([len(data.lay_out(stream.draw(rng), words, P).tokens) for _ in range(8000)])
        steps.append((config.documents * tokens, config.documents * stream.text_share))
    assert all(tokens == pytest.approx(805, rel=0.04) and alone == pytest.approx(11.8, rel=0.04) for tokens, alone in steps), steps


def test_a_run_of_other_options_is_not_taken(tiny, tmp_path, monkeypatch):
    """Catches a table that mixes runs from before and after a change."""
    line = ["9", "--jobs", "1", "--out", str(tmp_path)]
    experiments.main(line)
    monkeypatch.setattr(experiments, "BASE", TINY.replace("--warmup 1", "--warmup 2"))
    with pytest.raises(UserError, match="--warmup 1"):
        experiments.main(line)


def test_a_table_from_nothing(tiny, tmp_path, capsys):
    """Runs are trained once, shared, and read again; the printed means are those of report.json."""
    experiments.main(["9", "--seeds", "2", "--jobs", "1", "--out", str(tmp_path)])
    first = capsys.readouterr().out
    folders = sorted(path.parent for path in tmp_path.glob("*/report.json"))
    assert [path.name for path in folders] == ["base_seed0", "base_seed1", "preset_llama_seed_4_seed0", "preset_llama_seed_4_seed1"]
    times = [(path / "report.json").stat().st_mtime_ns for path in folders]
    experiments.main(["9", "--seeds", "2", "--out", str(tmp_path)])
    assert [(path / "report.json").stat().st_mtime_ns for path in folders] == times
    one, two = (json.loads((path / "report.json").read_text())["alone"] for path in folders[:2])
    assert f"| this way | {(one + two) / 2:.4f} ± {abs(one - two) / 2 ** 0.5:.4f} |" in first
    llama = next(line for line in first.splitlines() if "that way" in line).split("|")
    assert llama[3].strip() == llama[4].strip() == "" and (tmp_path / "table_9.md").read_text().strip() in first


def test_a_row_that_fails_is_named(tiny, tmp_path, monkeypatch):
    """Catches a table of the rows that happened to work."""
    monkeypatch.setitem(experiments.TABLES, "9", ("a table", {"broken": "--data folder --data-dir nowhere"}))
    with pytest.raises(UserError, match="output.txt"):
        experiments.main(["9", "--jobs", "1", "--out", str(tmp_path)])


ROW = """
import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
def save(*_):
    time.sleep(0.2)                                     # the end of its step
    (out / "saved").write_text("x")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(out / "began").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_rows_save(tiny, tmp_path, monkeypatch, capsys, number):
    """SIGTERM, or Ctrl-C, to experiments.py alone. Catches one that waits for hours until its rows end, rows that go on without
    it, a row that is started after the stop, and one that is stopped twice: it would not save."""
    (tmp_path / "row.py").write_text(ROW)
    monkeypatch.setattr(experiments, "TRAIN", tmp_path / "row.py")

    def stop_when_it_works():
        end = time.monotonic() + 60
        while not list(tmp_path.glob("*/began")) and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop_when_it_works)
    thread.start()
    with pytest.raises(SystemExit) as stop:
        run_command(experiments.main, ["9", "--jobs", "1", "--out", str(tmp_path)])
    thread.join()
    assert stop.value.code == 128 + number and "stopped: " in capsys.readouterr().err.splitlines()[-1]
    assert [path.parent.name for path in tmp_path.glob("*/saved")] == ["base_seed0"] == [path.parent.name for path in tmp_path.glob("*/began")]


def test_parity():
    """Between 750 and 1500 steps, halfway up, in log compute. Catches a ratio upside down, and for a loss the wrong sign."""
    def cell(text, captions, exact):
        return {"text": (text, None), "captions": (captions, None), "exact": (exact, None)}

    rows = {"Transfusion, 750 steps": cell(0.04, 50, 40), "Transfusion, 1500 steps": cell(0.02, 90, 80), "Transfusion, 3000 steps": cell(0.01, 95, 90),
            "Chameleon, 750 steps": cell(0.5, 1, 1), "Chameleon, 1500 steps": cell(0.1, 2, 2), "Chameleon, 3000 steps": cell(0.03, 30, 95)}
    found = experiments.parity(rows)
    assert found == {"text": f"{750 * 2 ** 0.5 / 3000:.2f}", "captions": "at most 0.25", "exact": "above 1"}


@pytest.mark.parametrize("line, sentence", [(["12"], "no table"), (["3", "--seeds", "0"], "--seeds")])
def test_mistakes(line, sentence):
    """Catches a traceback where the user mistyped."""
    with pytest.raises(UserError, match=sentence):
        experiments.main(line)
