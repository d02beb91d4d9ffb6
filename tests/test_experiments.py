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
from metrics.results import Results, read_report
from metrics.verdicts import Claim
from sources import scenes
from support.common import UserError, run_command

TINY = "--steps 4 --samples 6 --sample-steps 2 --gap-every 2 --save-every 2 --pairs 60 --documents 6 --warmup 1"


@pytest.fixture
def tiny(monkeypatch):
    """One table of two rows, of seconds."""
    monkeypatch.setitem(experiments.BASES, "paper", TINY)
    monkeypatch.setattr(experiments, "TABLES", {"9": ("a table", {"this way": "", "that way": "--preset llama"},
                                                      [Claim(1, "text", "this way", "that way")])})


@pytest.mark.parametrize("base", experiments.BASES.values(), ids=experiments.BASES)
def test_every_row_is_a_run(base):
    """Each row's options are train.py's; within a table no two rows are the same run; and each differs from the base as its
    name says. Catches a typo that would show only after an hour."""
    def config_of(options):
        return parse_arguments(experiments.argv_of(base, options, 0, "x"))[0]

    for number, (title, rows, claims) in experiments.TABLES.items():
        configs = [config_of(options) for options in rows.values()]
        assert len({str(config) for config in configs}) == len(rows) and "Table" in title, number
        assert all(config.seed == 0 and config.samples == config_of("").samples for config in configs)
        for claim in claims:                            # a claim speaks of rows and columns that there are
            assert claim.worse in rows and claim.better in rows and claim.metric in experiments.COLUMNS and claim.worse != claim.better

    def find(number, row):
        return config_of(experiments.TABLES[number][1][row])

    a, b = find("2", "Llama"), find("2", "+ stability modifications")
    assert {k for k, v in vars(a).items() if vars(b)[k] != v} - {"named"} == {"stable", "lr"} and a.model == "llama"
    assert [(find("5", row).size, find("5", row).encoder) for row in experiments.TABLES["5"][1]] == \
           [(size, encoder) for size in ("mini", "midi", "toy") for encoder in ("linear", "unet")]
    assert find("2", "Chameleon: + loss on image tokens").model == "chameleon" and find("2", "Chameleon: + loss on image tokens").stable
    assert find("1", "Transfusion").guidance == find("1", "Chameleon").guidance == 5 and find("3", "linear, causal").guidance == 3
    assert not find("3", "U-Net, causal").bidirectional and find("4", "U-Net, 8x8").patch == 8 and find("11", "none").t_limit == 1000


def test_the_base_is_the_papers():
    """DDPM, its schedule, lambda 5, no vector per place. Catches tables of flow under the paper's name."""
    config, *_ = parse_arguments(experiments.argv_of(experiments.BASES["paper"], "", 0, "x"))
    assert (config.diffusion, config.shift, config.lam, config.patch_position, config.t_limit) == ("ddpm", 1, 5, False, 500)
    assert experiments.parse_command(["3", "--flow"]).base == experiments.BASES["flow"]
    assert parse_arguments(experiments.BASES["flow"].split())[0].diffusion == "flow"


def test_the_directions_are_the_papers():
    """All eleven directions have a claim, and the paper's own numbers, where they are at hand, agree with each. Catches a claim
    that was written the wrong way round: then "reproduced" would mean the contrary."""
    paper, checked = json.loads(experiments.PAPER.read_text()), 0
    directions = set()
    for number, (_, _, claims) in experiments.TABLES.items():
        for claim in claims:
            directions.add(claim.direction)
            rows = paper[f"Table {number}"]
            worse, better = (rows.get(row, {}).get(claim.metric) for row in (claim.worse, claim.better))
            if worse is not None and better is not None and not claim.alike:
                lower_is_better = experiments.COLUMNS[claim.metric][3]
                assert (better < worse) == lower_is_better and better != worse, claim
                checked += 1
    assert directions == set(range(1, 12)) and checked >= 18
    # A direction belongs to one table, and a pair of its rows to one direction, whatever is measured; Table 1 has three of them.
    of_table = {"1": {1, 2, 3}, "2": {4, 5, 6}, "3": {7, 8}, "4": {9}, "5": {10}, "11": {11}}
    for number, (_, _, claims) in experiments.TABLES.items():
        assert {claim.direction for claim in claims} == of_table[number]
        pairs = {(claim.worse, claim.better, claim.direction) for claim in claims}
        assert number == "1" or len(pairs) == len({pair[:2] for pair in pairs})
        assert len({(claim.worse, claim.better, claim.metric) for claim in claims}) == len(claims)


def test_a_quarter_and_a_half_of_the_bases_steps():
    """Catches budgets of Fig. 5 that are not those of its table, and batches that do not grow with the base's."""
    line = experiments.written_out("--steps 100 --documents 64", "--log-every QUARTER --gap-every HALF --documents 16")
    assert line == "--steps 100 --documents 64 --log-every 25 --gap-every 50 --documents 32"
    assert "--warmup 1" in experiments.written_out("--steps 1", "--warmup QUARTER")


def test_the_grid():
    """Fig. 5: three sizes, three budgets, two models, none twice. Its largest runs are Table 1's rows."""
    runs = experiments.scaling_runs()
    assert len(set(runs)) == 18
    written = [experiments.written_out("--steps 1000", options) for _, options in runs]
    steps = [parse_arguments(line.split())[0].steps for line in written]
    assert sorted(set(steps)) == [250, 500, 1000] and steps.count(250) == 6
    largest = {options for _, options in runs} & set(experiments.TABLES["1"][1].values())
    assert len(largest) == 2


def test_rows_are_shared():
    """A run is named by its options. Catches one run under two spellings: two programs would write to one folder at once."""
    options = experiments.all_options([*experiments.TABLES, "scaling"])
    assert all(o == " ".join(o.split()) for o in options)
    assert len({experiments.folder_of("x", o, 0) for o in options}) == len(options)
    assert len({experiments.written_out("--steps 8", o) for o in options}) == len(options)


@pytest.mark.parametrize("base", experiments.BASES.values(), ids=experiments.BASES)
def test_a_step_is_as_large_in_every_row(base):
    """Tokens and text per step. Catches numbers that were found for other captions (as they were once)."""
    pairs, steps = scenes.load_scenes(500, seed=0, categories=scenes.WORLDS["one"], progress=False), []
    words, rng = data.Words(pairs.vocabulary()), np.random.default_rng(0)
    for options in [*("", experiments.PATCH_1, experiments.PATCH_4, experiments.PATCH_8), experiments.CHAMELEON]:
        config, *_ = parse_arguments(experiments.argv_of(base, options, 0, "x"))
        P = (8 // (1 if config.model == "chameleon" else config.patch)) ** 2
        stream = data.Documents(pairs, P, config.seq_len, text_share=config.text_share)
        tokens = np.mean([len(data.lay_out(stream.draw(rng), words, P).tokens) for _ in range(4000)])
        steps.append((config.documents * tokens, config.documents * stream.text_share))
    times = parse_arguments(base.split())[0].documents / 32
    assert all(tokens == pytest.approx(times * experiments.TOKENS, rel=0.04) and alone == pytest.approx(times * 11.8, rel=0.04)
               for tokens, alone in steps), steps


def test_a_run_of_other_options_is_not_taken(tiny, tmp_path, monkeypatch):
    """Catches a table that mixes runs from before and after a change."""
    line = ["9", "--jobs", "1", "--out", str(tmp_path)]
    experiments.main(line)
    monkeypatch.setitem(experiments.BASES, "paper", TINY.replace("--warmup 1", "--warmup 2"))
    with pytest.raises(UserError, match="--warmup 1"):
        experiments.main(line)


def test_a_table_from_nothing(tiny, tmp_path, capsys):
    """Runs are trained once, shared, and read again, also from results.json alone; the printed means are those of report.json."""
    experiments.main(["9", "--seeds", "2", "--jobs", "1", "--out", str(tmp_path / "runs")])
    first = capsys.readouterr().out
    folders = sorted(path.parent for path in tmp_path.glob("runs/*/report.json"))
    assert [path.name for path in folders] == ["base_seed0", "base_seed1", "preset_llama_seed0", "preset_llama_seed1"]
    one, two = (json.loads((path / "report.json").read_text())["alone"] for path in folders[:2])
    assert f"| this way | {(one + two) / 2:.4f} ± {abs(one - two) / 2 ** 0.5:.4f} |" in first
    llama = next(line for line in first.splitlines() if "that way" in line).split("|")
    assert llama[3].strip() == llama[4].strip() == "" and (tmp_path / "runs/table_9.md").read_text().strip() in first
    assert "| 1 | text | this way → that way |" in first and (tmp_path / "runs/tables.png").stat().st_size > 5000

    kept = tmp_path / "runs/results.json"
    experiments.main(["9", "--seeds", "2", "--out", str(tmp_path / "again"), "--results", str(kept)])
    assert not list(tmp_path.glob("again/*/")) and (tmp_path / "again/table_9.md").read_text() == (tmp_path / "runs/table_9.md").read_text()


def test_the_grid_makes_a_figure(tmp_path, capsys, monkeypatch):
    """`scaling` takes N from the report, D from the row's steps. Planted: a loss of (6 N D)^-0.3, ours with half the compute."""
    base, results = experiments.BASES["paper"], Results(tmp_path / "results.json")
    for model, options in experiments.scaling_runs():
        line = experiments.written_out(base, options)
        config, *_ = parse_arguments(line.split())
        parameters = {"mini": 2e5, "midi": 4e5, "toy": 9e5}[config.size]
        flops = 6 * parameters * config.steps * experiments.TOKENS * 4
        text = (flops * (2 if model == "transfusion" else 1)) ** -0.3
        for seed in range(2):
            results.add(line, seed, {"alone": text, "captions": 0.0, "diffusion_loss": 0.1, "parameters": parameters})
    real, drawn = experiments.scaling.plot, []
    monkeypatch.setattr(experiments.scaling, "plot", lambda points, path: drawn.extend(points) or real(points, path))
    experiments.main(["scaling", "--no-train", "--seeds", "2", "--out", str(tmp_path)])
    for point in drawn:                                 # 6 N D itself, not only up to a factor
        assert point["text"] == pytest.approx((point["flops"] * (2 if point["model"] == "transfusion" else 1)) ** -0.3)
    assert len(drawn) == 36
    said = capsys.readouterr().out
    assert "| text | -0.300 | -0.300 | 0.5 | 0.5 to 0.5 (2 seeds) |" in said and (tmp_path / "scaling.png").stat().st_size > 5000
    assert "| loss |" not in said and "| captions |" not in said         # of Transfusion only; zero has no logarithm


def test_tables_of_what_there_is(tiny, tmp_path, capsys):
    """Catches a machine that was taken away in the middle, and its numbers with it."""
    base, results = experiments.BASES["paper"], Results(tmp_path / "results.json")
    for seed, alone in enumerate((0.5, 0.25)):
        results.add(experiments.written_out(base, ""), seed, {"alone": alone, "captions": float("nan"), "geneval": {}})
    experiments.main(["9", "--seeds", "3", "--no-train", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "| this way | 0.3750 ± 0.1768 |\n| that way |  |\n" in said and not list(tmp_path.glob("*_seed0"))


@pytest.mark.parametrize("content", ["[", "{}", '{"runs": [{"options": "", "seed": 0, "numbers": {"alone": null}}]}',
                                     '{"runs": [{"options": "", "seed": 0, "numbers": {"alone": 0.5, "exact": NaN}}]}',
                                     '{"runs": [{"options": "", "seed": Infinity, "numbers": {"alone": 0.5}}]}'])
def test_broken_results(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="does not hold the numbers"):
        Results(tmp_path / "results.json")


@pytest.mark.parametrize("content, whole", [('{"alone": 1}', True), ('{"exact": 0.5, "more": null}', True), ("{}", True), ('{"alone": 1, "exact": null}', False),
                                            ('{"alone": NaN}', False), ('{"alone": true}', False), ('{"alone": "1"}', False), ("[]", False), ("{", False)])
def test_a_report_that_is_broken(tmp_path, content, whole):
    """Catches a table of numbers of which one is missing. A report may have fewer of them: a Llama's has."""
    (tmp_path / "report.json").write_text(content)
    if whole:
        assert read_report(tmp_path / "report.json", ["alone", "exact"]) == json.loads(content)
        return
    with pytest.raises(UserError, match="report.json is broken: delete it"):
        read_report(tmp_path / "report.json", ["alone", "exact"])


def test_a_row_that_fails_is_named(tiny, tmp_path, monkeypatch):
    """Catches a table of the rows that happened to work."""
    monkeypatch.setitem(experiments.TABLES, "9", ("a table", {"broken": "--data folder --data-dir nowhere"}, []))
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


@pytest.mark.parametrize("line, sentence", [(["12"], "no table"), (["3", "--seeds", "0"], "--seeds")])
def test_mistakes(line, sentence):
    """Catches a traceback where the user mistyped."""
    with pytest.raises(UserError, match=sentence):
        experiments.main(line)
