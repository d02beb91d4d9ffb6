"""
experiments.py: the paper's tables in miniature   (Transfusion §4.2, §4.3; Tables 1-5, 9-11, Fig. 5)

THE IDEA    A table of the paper is a handful of runs that differ in one thing. So is a table here:
            a name and the options of train.py for each row. All rows start from the same seeds and
            end with the same report. To start an experiment of your own, add a table.
A PICTURE   TABLES["3"]   row "linear, causal"         = train.py BASE --no-bidirectional
                          row "linear, bidirectional"  = train.py BASE
            python experiments.py 3 --seeds 3
              -> out/experiments/<options>_seed<k>/report.json  -> the table, mean +- deviation
            A run that is finished is not run again. So tables share rows, and Ctrl-C loses nothing.
COLUMNS     the paper's                     here, in the one-object world
              C4, Wikipedia perplexity      text: nats per token of deductions, above their entropy
              Llama accuracy                (none: ranked deductions are all right in every row)
              CIDEr                         captions: share that is true of an unseen picture
              FID, CLIP                     exact: share of pictures that are exactly as asked
PAPER/HERE  same: what is compared; tokens per step, and the text among them, are equal in all rows.
            our choice: flow in place of DDPM, as in all toys (config.py says why); half the steps
            of the first run, where differences still show; guidance 3 and 50 steps everywhere (the
            paper: 250 steps, and guidance 5 for its Table 1).
            A toy says which way a change goes in a toy. That it agrees with the paper is a finding,
            not a law: docs/RESULTS.md says where it does not.
READ NEXT   docs/RESULTS.md     TRY IT  python experiments.py      TEST  tests/test_experiments.py
"""
import argparse
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import Config, option_name, parse_arguments
from support.common import (
    Children,
    Stopped,
    UserError,
    read_json,
    run_command,
    signal_of,
    whole_file,
)

TRAIN = Path(__file__).parent / "train.py"

# --------------------------------------------------------------------------------- what is compared
# The options of every row. A row's own options come after these, and win.
BASE = "--steps 1500 --samples 400 --gap-every 500 --save-every 500"

# Our choice: what is compared is what a token buys. In all rows a step has about 805 tokens and 12
# documents of text alone, as the base has by the paper's 1 : 1. The rest is captioned pictures. How
# many that are depends on how many positions a picture takes: of 16, as in the base, there are 25.
PATCH_1 = "--patch 1 --seq-len 160 --documents 18 --text-share 0.635"       # 8 pictures of 64
PATCH_4 = "--patch 4 --documents 56 --text-share 0.212"                     # 55 pictures of 4
PATCH_8 = "--patch 8 --documents 75 --text-share 0.158"                     # 79 pictures of 1

TABLES = {                                          # number: (title, {row: its options})
    "1": ("Transfusion and Chameleon, by compute (Table 1, Fig. 5)", {
        "Transfusion, 750 steps": "--steps 750",
        "Transfusion, 1500 steps": "",
        "Transfusion, 3000 steps": "--steps 3000",
        "Chameleon, 750 steps": "--preset chameleon --steps 750",
        "Chameleon, 1500 steps": "--preset chameleon",
        "Chameleon, 3000 steps": "--preset chameleon --steps 3000",
    }),
    "2": ("from Llama to Transfusion and to Chameleon (Table 2)", {
        "Llama": "--preset llama",
        "Transfusion: + diffusion": "",
        "+ stability modifications": "--preset llama --stable --lr 7e-4",
        "Chameleon: + loss on image tokens": "--preset chameleon",
    }),
    "3": ("attention inside a picture (Table 3)", {
        "linear, causal": "--no-bidirectional",
        "linear, bidirectional": "",
        "U-Net, causal": "--encoder unet --no-bidirectional",
        "U-Net, bidirectional": "--encoder unet",
    }),
    "4": ("patch size (Tables 4, 9)", {
        "linear, 1x1": PATCH_1,
        "linear, 2x2": "",
        "linear, 4x4": PATCH_4,
        "linear, 8x8": PATCH_8,
        "U-Net, 2x2": "--encoder unet",
        "U-Net, 4x4": f"--encoder unet {PATCH_4}",
        "U-Net, 8x8": f"--encoder unet {PATCH_8}",
    }),
    "5": ("linear and U-Net by size (Tables 5, 10)", {
        "0.8M, linear": "",
        "0.8M, U-Net": "--encoder unet",
        "1.6M, linear": "--size small",
        "1.6M, U-Net": "--size small --encoder unet",
    }),
    "11": ("noise limit of pictures before captions (Table 11)", {
        "t <= 500": "",
        "none": "--t-limit 1000",
        "U-Net, t <= 500": "--encoder unet",
        "U-Net, none": "--encoder unet --t-limit 1000",
    }),
}

COLUMNS = {                                         # heading: (report.json's name, times, format)
    "text": ("alone", 1, "{:.4f}"),
    "captions": ("captions", 100, "{:.1f}%"),
    "exact": ("exact", 100, "{:.1f}%"),
}


# ------------------------------------------------------------------------------------------ one run
def argv_of(options, seed, out):
    """The argument list of one run of train.py."""
    return [*BASE.split(), *options.split(), "--seed", str(seed), "--out", str(out)]


def folder_of(root, options, seed):
    """The folder of a run. It is named by its options, so that a row of two tables is one run."""
    name = "_".join(options.replace("--", "").split()) or "base"
    return Path(root) / f"{name}_seed{seed}"


def train_row(root, options, seed, children=None):
    """Train one row with one seed, unless its report is there. Returns report.json's dict.
    children: the support.common.Children among which it runs.

    A run that was stopped goes on. Raises UserError, naming the log, if train.py fails; and if the
    folder holds a run of other options, because the row has changed since."""
    out = folder_of(root, options, seed)
    report = out / "report.json"
    if report.exists():                                 # finished, perhaps for another table
        check_options(out, argv_of(options, seed, out))
        return read_report(report)

    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN), *argv_of(options, seed, out)]
    if any(out.glob("checkpoints/step_*/.metadata")):   # a complete checkpoint
        command.append("--resume")
    # One core per run: two programs with two threads each would wait for one another.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # Several runs at a time would mix on the screen, so each writes to a file of its own.
    with open(out / "output.txt", "w") as output:
        status = (children or Children()).run(command, stdout=output, stderr=output,
                                              env=environment)
    if status != 0 or not report.exists():
        raise UserError(f"a row failed or was stopped; {out}/output.txt says how, and the same "
                        f"command goes on from there")
    return read_report(report)


def read_report(path):
    """The dict of a report.json. Raises UserError if it is something else."""
    try:
        report = read_json(path)
        # A Llama's report has fewer columns; those that it has must be numbers.
        values = [report[name] for name, *_ in COLUMNS.values() if name in report]
        whole = isinstance(report, dict) and all(map(is_number, values))
    except (OSError, ValueError, TypeError, OverflowError):
        whole = False
    if not whole:
        raise UserError(f"{path} is broken: delete it, and the same command measures that run "
                        f"again")
    return report


def is_number(value):
    """Whether a value from a JSON file is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def check_options(out, argv):
    """Raise UserError if the run in `out` had other options than `argv`: a table must not mix runs
    from before and after a change of its row."""
    wanted = asdict(parse_arguments(argv)[0])
    try:
        kept = asdict(Config()) | read_json(out / "config.json")
    except (OSError, ValueError, TypeError):
        raise UserError(f"{out}/config.json is missing or broken: delete that folder, and the same "
                        f"command runs this row again") from None
    changed = [name for name in wanted if kept[name] != wanted[name]]
    if changed:
        options = ", ".join(f"{option_name(name)} {kept[name]}" for name in changed)
        raise UserError(f"{out} was run with {options}, which is no longer its row's: delete that "
                        f"folder, or name another place with --out")


def train_all(root, runs, jobs):
    """Train all runs, `jobs` at a time. runs: list of (options, seed). The first that fails raises
    UserError; the others that run are finished first, those that wait are not started. After Ctrl-C
    or SIGTERM those that run save and stop."""
    pool = ThreadPoolExecutor(jobs)
    children = Children()
    try:
        futures = [pool.submit(train_row, root, *run, children) for run in runs]
        for future in tqdm(as_completed(futures), total=len(runs), desc="runs"):
            future.result()
    except KeyboardInterrupt as stop:
        children.stop()
        raise Stopped("every run is saved; the same command goes on from there",
                      [signal_of(stop)]) from None
    finally:
        pool.shutdown(cancel_futures=True)              # or the runs that wait would still start


# ---------------------------------------------------------------------------------------- one table
def measure(reports):
    """One row's cells: {heading: (mean, deviation over seeds; None for one seed)}. reports: the
    dict of report.json for each seed. A heading without a number is left out: a Llama does not
    draw."""
    cells = {}
    for heading, (name, times, _) in COLUMNS.items():
        if not all(name in report for report in reports):
            continue
        values = [times * report[name] for report in reports]
        deviation = None                                # one seed says nothing about the spread
        if len(values) > 1:
            deviation = float(np.std(values, ddof=1))
        cells[heading] = (float(np.mean(values)), deviation)
    return cells


def parity(rows):
    """At which share of the Chameleon's steps Transfusion is as good: {heading: text}. rows: Table
    1's {row: cells}. This is Fig. 5's "parity FLOP ratio", read off a line between neighbouring
    runs, in log steps.

    A step has as many tokens in both models. Its FLOPs are nearly alike: 512 codes make the
    Chameleon's tables larger by a sixth of all parameters."""
    steps = [750, 1500, 3000]
    ratios = {}
    for heading in COLUMNS:
        if not all(heading in cells for cells in rows.values()):
            continue
        ours = [rows[f"Transfusion, {n} steps"][heading][0] for n in steps]
        goal = rows[f"Chameleon, {steps[-1]} steps"][heading][0]
        lower_is_better = heading == "text"

        # The first of our runs that reaches the goal.
        first = None
        for k, value in enumerate(ours):
            reached = value <= goal if lower_is_better else value >= goal
            if reached:
                first = k
                break
        if first is None:
            ratios[heading] = "above 1"
        elif first == 0:
            ratios[heading] = f"at most {steps[0] / steps[-1]:.2f}"
        else:
            before = ours[first - 1]
            share = (goal - before) / (ours[first] - before)            # of the way, 0 to 1
            low = math.log(steps[first - 1])
            high = math.log(steps[first])
            ratios[heading] = f"{math.exp(low + share * (high - low)) / steps[-1]:.2f}"
    return ratios


def markdown(title, rows, seeds):
    """The table as lines of markdown. rows: {name: cells}."""
    plural = "s" if seeds > 1 else ""
    # The first column is the row's name, the others are COLUMNS.
    lines = [f"| {title}; {seeds} seed{plural} | " + " | ".join(COLUMNS) + " |",
             "|---" * (len(COLUMNS) + 1) + "|"]
    for name, cells in rows.items():
        texts = [cell_text(cells.get(heading), form) for heading, (_, _, form) in COLUMNS.items()]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return lines


def cell_text(cell, form):
    """"98.0% ± 1.5" of a cell (mean, deviation or None); nothing of None."""
    if cell is None:
        return ""
    mean, deviation = cell
    text = form.format(mean)
    if deviation is not None:
        # "98.0% ± 1.5": the sign stands once.
        text += " ± " + form.format(deviation).rstrip("%")
    return text


def make_table(root, number, seeds):
    """The lines of a table whose runs are finished, kept in root/table_<number>.md, too."""
    title, options_of = TABLES[number]
    rows = {}
    for name, options in options_of.items():
        rows[name] = measure([train_row(root, options, seed) for seed in range(seeds)])
    lines = markdown(title, rows, seeds)
    if number == "1":
        ratios = [f"{heading} {ratio}" for heading, ratio in parity(rows).items()]
        lines += ["", "Share of its 3,000 steps at which Transfusion is as good as the Chameleon: "
                  + ", ".join(ratios)]
    with whole_file(Path(root) / f"table_{number}.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    return lines


# --------------------------------------------------------------------------------- the command line
def parse_command(argv):
    """The command line's arguments, checked. Raises UserError for a table that there is not."""
    parser = argparse.ArgumentParser(
        description="The paper's tables in miniature. Without a table: what there is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("tables", nargs="*", help=f"which: {', '.join(TABLES)}, or all")
    add("--seeds", type=int, default=1, help="runs per row: seeds 0, 1, ...")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on one core")
    add("--out", default="out/experiments", help="folder of the runs")
    args = parser.parse_args(argv)

    if args.tables == ["all"]:
        args.tables = list(TABLES)
    for number in args.tables:
        if number not in TABLES:
            raise UserError(f"there is no table {number!r}: choose from {', '.join(TABLES)}, or "
                            f"all")
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    # A wrong option in TABLES must be found before anything is trained.
    for _, rows in TABLES.values():
        for options in rows.values():
            parse_arguments(argv_of(options, 0, "x"))
    return args


def list_tables():
    """Print every table with its rows' commands."""
    for number, (title, rows) in TABLES.items():
        print(f"python experiments.py {number:3s} {title}")
        for name, options in rows.items():
            print(f"    {name:36s} train.py {BASE} {options}")


def main(argv=None):
    """Train what is missing of some tables, and print them."""
    args = parse_command(argv)
    if not args.tables:
        list_tables()
        return

    # 1. The runs, each once, although tables share them; all rows with seed 0 come first.
    runs = []
    for seed in range(args.seeds):
        for number in args.tables:
            for options in TABLES[number][1].values():
                if (options, seed) not in runs:
                    runs.append((options, seed))
    began = time.time()
    train_all(args.out, runs, args.jobs)

    # 2. The tables.
    for number in args.tables:
        print(*make_table(args.out, number, args.seeds), "", sep="\n")
    print(f"{len(runs)} runs, {time.time() - began:.0f} s; tables and runs are in {args.out}")


if __name__ == "__main__":
    run_command(main)
