"""
test_experiments.py: a table holds what its runs say           (experiments.py, metrics/results.py)

THE IDEA    First the tables themselves, without a run: every row is a run of train.py, differs from
            the base as its name says, and its claim points the way that the paper's numbers do.
            Then tables made from runs of four steps, and from numbers that are planted here. Last,
            what happens when a row fails, or when somebody stops the program.
TRY IT      pytest -n 0 tests/test_experiments.py
"""
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

TINY = ("--steps 4 --samples 6 --sample-steps 2 --gap-every 2 --save-every 2 --pairs 60 "
        "--documents 6 --warmup 1")
EVERY_BASE = pytest.mark.parametrize("base", experiments.BASES.values(), ids=experiments.BASES)


@pytest.fixture
def tiny(monkeypatch):
    """One table of two rows, each of which takes seconds."""
    rows = {"this way": "", "that way": "--preset llama"}
    claims = [Claim(1, "text", "this way", "that way")]
    monkeypatch.setitem(experiments.BASES, "paper", TINY)
    monkeypatch.setattr(experiments, "TABLES", {"9": ("a table", rows, claims)})


def config_of(base, options):
    """The Config of a row."""
    return parse_arguments(experiments.argv_of(base, options, 0, "x"))[0]


# --------------------------------------------------------------------------------- what is compared
@EVERY_BASE
def test_every_row_is_a_run(base):
    """Each row's options are train.py's, and no two rows of a table are the same run. Catches a
    typo that would show only after an hour."""
    samples = config_of(base, "").samples
    for number, (title, rows, claims) in experiments.TABLES.items():
        assert "Table" in title or not number.isdigit(), number         # a fork's has a name
        configs = [config_of(base, options) for options in rows.values()]
        assert len({str(config) for config in configs}) == len(rows), number
        for config in configs:
            assert config.seed == 0
            assert config.samples == samples

        for claim in claims:                            # it speaks of rows and columns that exist
            assert claim.worse in rows
            assert claim.better in rows
            assert claim.worse != claim.better
            assert claim.metric in experiments.COLUMNS

    # And each row differs from the base as its name says.
    def find(number, row):
        _, rows, _ = experiments.TABLES[number]
        return config_of(base, rows[row])

    assert find("1", "Transfusion").guidance == 5
    assert find("1", "Chameleon").guidance == 5

    llama = find("2", "Llama")
    stable = find("2", "+ stability modifications")
    changed = {name for name, value in vars(llama).items() if vars(stable)[name] != value}
    assert changed - {"named"} == {"stable", "lr"}
    assert llama.model == "llama"
    chameleon = find("2", "Chameleon: + loss on image tokens")
    assert chameleon.model == "chameleon"
    assert chameleon.stable

    assert find("3", "linear, causal").guidance == 3
    assert not find("3", "U-Net, causal").bidirectional
    assert find("4", "U-Net, 8x8").patch == 8

    _, rows, _ = experiments.TABLES["5"]
    sizes = [(find("5", row).size, find("5", row).encoder) for row in rows]
    assert sizes == [("mini", "linear"), ("mini", "unet"), ("midi", "linear"), ("midi", "unet"),
                     ("toy", "linear"), ("toy", "unet")]
    assert find("11", "none").t_limit == 1000


def test_the_base_is_the_papers():
    """DDPM, its schedule, lambda 5, no vector per place. Catches tables of flow under the paper's
    name."""
    config = config_of(experiments.BASES["paper"], "")
    assert config.diffusion == "ddpm"
    assert config.shift == 1
    assert config.lam == 5
    assert config.patch_position is False
    assert config.t_limit == 500

    flow = experiments.BASES["flow"]
    assert experiments.parse_command(["3", "--flow"]).base == flow
    assert parse_arguments(flow.split())[0].diffusion == "flow"


def test_the_directions_are_the_papers():
    """All eleven directions have a claim, and the paper's own numbers, where they are at hand,
    agree with each. Catches a claim that was written the wrong way round: then "reproduced" would
    mean the contrary."""
    paper = json.loads(experiments.PAPER.read_text())
    checked = 0
    directions = set()
    for number, (_, _, claims) in experiments.TABLES.items():
        rows = paper[f"Table {number}"]
        for claim in claims:
            directions.add(claim.direction)
            worse = rows.get(claim.worse, {}).get(claim.metric)
            better = rows.get(claim.better, {}).get(claim.metric)
            if worse is None or better is None or claim.alike:
                continue
            lower_is_better = experiments.COLUMNS[claim.metric][3]
            assert better != worse, claim
            assert (better < worse) == lower_is_better, claim
            checked += 1
    assert directions == set(range(1, 12))
    assert checked >= 18

    # A direction belongs to one table. A pair of rows belongs to one direction, whatever is
    # measured; but Table 1 has three directions for its only pair.
    of_table = {"1": {1, 2, 3}, "2": {4, 5, 6}, "3": {7, 8}, "4": {9}, "5": {10}, "11": {11}}
    for number, (_, _, claims) in experiments.TABLES.items():
        assert {claim.direction for claim in claims} == of_table[number]
        pairs = {(claim.worse, claim.better) for claim in claims}
        named = {(claim.worse, claim.better, claim.direction) for claim in claims}
        assert number == "1" or len(named) == len(pairs)
        measured = {(claim.worse, claim.better, claim.metric) for claim in claims}
        assert len(measured) == len(claims)


def test_a_quarter_and_a_half_of_the_bases_steps():
    """Catches budgets of Fig. 5 that are not those of its table, and batches that do not grow with
    the base's."""
    base = "--steps 100 --documents 64"
    options = "--log-every QUARTER --gap-every HALF --documents 16"
    line = experiments.written_out(base, options)
    assert line == "--steps 100 --documents 64 --log-every 25 --gap-every 50 --documents 32"
    assert "--warmup 1" in experiments.written_out("--steps 1", "--warmup QUARTER")     # never 0


def test_the_grid():
    """Fig. 5: three sizes, three budgets, two models, none twice. Its largest runs are Table 1's
    rows."""
    runs = experiments.scaling_runs()
    assert len(set(runs)) == 18
    steps = []
    for _, options in runs:
        line = experiments.written_out("--steps 1000", options)
        steps.append(parse_arguments(line.split())[0].steps)
    assert sorted(set(steps)) == [250, 500, 1000]
    assert steps.count(250) == 6

    _, rows, _ = experiments.TABLES["1"]
    largest = {options for _, options in runs} & set(rows.values())
    assert len(largest) == 2


def test_rows_are_shared():
    """A run is named by its options. Catches one run under two spellings: two programs would write
    to one folder at once."""
    options = experiments.all_options([*experiments.TABLES, "scaling"])
    for words in options:
        assert words == " ".join(words.split())
    folders = {experiments.folder_of("x", words, 0) for words in options}
    assert len(folders) == len(options)
    lines = {experiments.written_out("--steps 8", words) for words in options}
    assert len(lines) == len(options)


@EVERY_BASE
def test_a_step_is_as_large_in_every_row(base):
    """Tokens and text per step. Catches numbers that were found for other captions: once they
    were."""
    one = scenes.WORLDS["one"]
    pairs = scenes.load_scenes(500, seed=0, categories=one, progress=False)
    words = data.Words(pairs.vocabulary())
    rng = np.random.default_rng(0)
    times = parse_arguments(base.split())[0].documents / 32     # the numbers are those of 32
    rows = ("", experiments.PATCH_1, experiments.PATCH_4, experiments.PATCH_8,
            experiments.CHAMELEON)

    for options in rows:
        config = config_of(base, options)
        patch = 1 if config.model == "chameleon" else config.patch
        P = (8 // patch) ** 2                           # positions per picture, of 8 x 8 latents
        share = config.text_share
        documents = data.Documents(pairs, P, config.seq_len, text_share=share)
        lengths = []
        for _ in range(4000):
            sequence = data.lay_out(documents.draw(rng), words, P)
            lengths.append(len(sequence.tokens))
        tokens = config.documents * np.mean(lengths)
        text_alone = config.documents * documents.text_share
        assert tokens == pytest.approx(times * experiments.TOKENS, rel=0.04), options
        assert text_alone == pytest.approx(times * 11.8, rel=0.04), options


# ------------------------------------------------------------------------------ from runs to tables
def test_a_run_of_other_options_is_not_taken(tiny, tmp_path, monkeypatch):
    """Catches a table that mixes runs from before and after a change."""
    line = ["9", "--jobs", "1", "--out", str(tmp_path)]
    experiments.main(line)
    changed = TINY.replace("--warmup 1", "--warmup 2")
    monkeypatch.setitem(experiments.BASES, "paper", changed)
    with pytest.raises(UserError, match="--warmup 1"):
        experiments.main(line)


def test_a_table_from_nothing(tiny, tmp_path, capsys):
    """Runs are trained once, shared, and read again, also from results.json alone. Catches printed
    means that are not those of report.json."""
    # 1. The runs.
    runs = tmp_path / "runs"
    experiments.main(["9", "--seeds", "2", "--jobs", "1", "--out", str(runs)])
    said = capsys.readouterr().out
    folders = sorted(path.parent for path in runs.glob("*/report.json"))
    names = [path.name for path in folders]
    assert names == ["base_seed0", "base_seed1", "preset_llama_seed0", "preset_llama_seed1"]

    # 2. The table: mean and deviation of two seeds. A Llama draws and describes no picture.
    one, two = (json.loads((path / "report.json").read_text())["alone"] for path in folders[:2])
    mean = (one + two) / 2
    deviation = abs(one - two) / 2 ** 0.5
    assert f"| this way | {mean:.4f} ± {deviation:.4f} |" in said
    [llama] = [line for line in said.splitlines() if line.startswith("| that way")]
    cells = [cell.strip() for cell in llama.split("|")]
    assert cells[3] == ""
    assert cells[4] == ""
    assert "| 1 | text | this way → that way |" in said
    table = (runs / "table_9.md").read_text()
    assert table.strip() in said
    assert (runs / "tables.png").stat().st_size > 5000

    # 3. The same table from the file alone: nothing is trained.
    again = tmp_path / "again"
    results = str(runs / "results.json")
    experiments.main(["9", "--seeds", "2", "--out", str(again), "--results", results])
    assert not list(again.glob("*/"))
    assert (again / "table_9.md").read_text() == table


def test_the_grid_makes_a_figure(tmp_path, capsys, monkeypatch):
    """`scaling` takes N from the report, and D from the row's steps. Planted is a loss of
    (6 N D)^-0.3, and ours needs half the compute. Catches another exponent or ratio, and an N or D
    that is off by a factor."""
    # 1. Numbers of 18 runs with two seeds each.
    base = experiments.BASES["paper"]
    sizes = {"mini": 2e5, "midi": 4e5, "toy": 9e5}      # parameters
    advantage = {"transfusion": 2, "chameleon": 1}
    results = Results(tmp_path / "results.json")
    for model, options in experiments.scaling_runs():
        line = experiments.written_out(base, options)
        config, *_ = parse_arguments(line.split())
        parameters = sizes[config.size]
        flops = 6 * parameters * config.steps * experiments.TOKENS * 4      # of 128 documents
        numbers = {
            "alone": (flops * advantage[model]) ** -0.3,
            "captions": 0.0,
            "diffusion_loss": 0.1,
            "parameters": parameters,
        }
        for seed in range(2):
            results.add(line, seed, numbers)

    # 2. The figure.
    drawn = []
    real = experiments.scaling.plot

    def plot(points, path):
        drawn.extend(points)
        return real(points, path)

    monkeypatch.setattr(experiments.scaling, "plot", plot)
    experiments.main(["scaling", "--no-train", "--seeds", "2", "--out", str(tmp_path)])
    assert len(drawn) == 36
    for point in drawn:                                 # 6 N D itself, not only up to a factor
        flops = point["flops"] * advantage[point["model"]]
        assert point["text"] == pytest.approx(flops ** -0.3)
    assert (tmp_path / "scaling.png").stat().st_size > 5000

    # 3. The fitted exponents and the ratio of compute.
    said = capsys.readouterr().out
    assert "| text | -0.300 | -0.300 | 0.5 | 0.5 to 0.5 (2 seeds) |" in said
    assert "| loss |" not in said                       # only Transfusion has it
    assert "| captions |" not in said                   # zero has no logarithm


def test_tables_of_what_there_is(tiny, tmp_path, capsys):
    """Catches a machine that was taken away in the middle, and its numbers with it."""
    results = Results(tmp_path / "results.json")
    line = experiments.written_out(experiments.BASES["paper"], "")
    for seed, alone in enumerate((0.5, 0.25)):          # two of three seeds, of one of two rows
        report = {"alone": alone, "captions": float("nan"), "geneval": {}}
        results.add(line, seed, report)
    experiments.main(["9", "--seeds", "3", "--no-train", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "| this way | 0.3750 ± 0.1768 |\n| that way |  |\n" in said
    assert not list(tmp_path.glob("*_seed0"))           # no run was begun


def test_a_table_without_claims_has_no_verdicts(tiny, tmp_path, capsys, monkeypatch):
    """A table of one's own, of which the paper says nothing. Catches a heading with nothing below
    it."""
    monkeypatch.setitem(experiments.TABLES, "mine", ("my forks", {"the base": ""}, []))
    experiments.main(["mine", "9", "--no-train", "--out", str(tmp_path)])
    mine, papers = capsys.readouterr().out.split("| a table", 1)
    assert "| my forks" in mine
    assert "verdict" not in mine
    assert "verdict" in papers


# ------------------------------------------------------------------------------------- broken files
def results_file(numbers, seed="0"):
    """The text of a results.json with one run."""
    return '{"runs": [{"options": "", "seed": ' + seed + ', "numbers": {' + numbers + "}}]}"


@pytest.mark.parametrize("content", [
    "[",
    "{}",
    results_file('"alone": null'),
    results_file('"alone": 0.5, "exact": NaN'),
    results_file('"alone": 0.5', seed="Infinity"),
])
def test_broken_results(tmp_path, content):
    """Catches a traceback, and a table of numbers that are none."""
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="does not hold the numbers"):
        Results(tmp_path / "results.json")


@pytest.mark.parametrize("content, whole", [
    ('{"alone": 1}', True),
    ('{"exact": 0.5, "more": null}', True),
    ("{}", True),
    ('{"alone": 1, "exact": null}', False),
    ('{"alone": NaN}', False),
    ('{"alone": true}', False),
    ('{"alone": "1"}', False),
    ("[]", False),
    ("{", False),
])
def test_a_report_that_is_broken(tmp_path, content, whole):
    """Catches a table of numbers of which one is missing. A report may have fewer of them: a
    Llama's has."""
    path = tmp_path / "report.json"
    path.write_text(content)
    if whole:
        assert read_report(path, ["alone", "exact"]) == json.loads(content)
        return
    with pytest.raises(UserError, match="report.json is broken: delete it"):
        read_report(path, ["alone", "exact"])


# ------------------------------------------------------------ rows that fail, rows that are stopped
def test_a_row_that_fails_is_named(tiny, tmp_path, monkeypatch):
    """Catches a table of the rows that happened to work."""
    rows = {"broken": "--data folder --data-dir nowhere"}
    monkeypatch.setitem(experiments.TABLES, "9", ("a table", rows, []))
    with pytest.raises(UserError, match="output.txt"):
        experiments.main(["9", "--jobs", "1", "--out", str(tmp_path)])


def test_a_row_that_does_not_fit_is_named(tiny, monkeypatch):
    """A table of one's own, and one wrong option in it. Catches a sentence that names no row, and
    one that blames a row for a mistake in --options."""
    rows = {"no skip": "--diffusion flow --noise-skip"}
    monkeypatch.setitem(experiments.TABLES, "mine", ("a table", rows, []))
    with pytest.raises(UserError, match="table mine, row 'no skip'.*--noise-skip is for"):
        experiments.main([])
    with pytest.raises(UserError, match="^there is no option --stepz"):
        experiments.main(["--options", "--stepz 3"])


# Stands in for train.py: it works for a minute, and saves when it is told to stop.
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
    """SIGTERM, or Ctrl-C, to experiments.py alone. Catches one that waits for hours until its rows
    end, rows that go on without it, a row that is started after the stop, and one that is stopped
    twice: it would not save."""
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

    assert stop.value.code == 128 + number
    assert "stopped: " in capsys.readouterr().err.splitlines()[-1]
    began = [path.parent.name for path in tmp_path.glob("*/began")]
    saved = [path.parent.name for path in tmp_path.glob("*/saved")]
    assert began == ["base_seed0"]                      # --jobs 1, and no row after the stop
    assert saved == ["base_seed0"]


@pytest.mark.parametrize("line, sentence", [
    (["12"], "no table"),
    (["3", "--seeds", "0"], "--seeds"),
])
def test_mistakes(line, sentence):
    """Catches a traceback where the user mistyped."""
    with pytest.raises(UserError, match=sentence):
        experiments.main(line)
