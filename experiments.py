"""
experiments.py: the paper's tables in miniature                       (Transfusion §4.2, §4.3; Tables 1-5, 9-11, Fig. 5)

THE IDEA    A table of the paper is a handful of runs that differ in one thing. So is one here: a list of names and of options
            of train.py, run from the same seeds, measured by the same report. To start an experiment of your own, add one.
A PICTURE   TABLES["3"]   row "linear, causal"         = train.py BASE --no-bidirectional
                          row "linear, bidirectional"  = train.py BASE
            python experiments.py 3 --seeds 3  ->  out/experiments/<options>_seed<k>/report.json  ->  the table, mean +- deviation
            A run that is there is not run again, so tables share rows, and Ctrl-C loses nothing.
COLUMNS     the paper's                     here, of the one-object world
              C4, Wikipedia perplexity      text: nats per token of deductions, above their entropy
              Llama accuracy                (none: ranked deductions are all right in every row)
              CIDEr                         captions: share that is true of an unseen picture
              FID, CLIP                     exact: share of pictures that are exactly what was asked for
PAPER/HERE  same: what is compared; as many tokens per step in all rows, as much text among them; one set of seeds.
            our choice: flow in place of DDPM, as in all toys (README "What it took"), at half the steps of the first run, where
            differences still show; guidance 3 and 50 steps everywhere (the paper: 250; and 5 for its Table 1). A toy says which
            way a change goes in a toy. That it agrees with the paper is a finding, not a law; README says where it does not.
READ NEXT   the end of README, "Fork it"        TRY IT  python experiments.py        TEST  tests/test_experiments.py
"""
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import Config, parse_arguments
from support.common import UserError, run_command

HOME = Path(__file__).parent
BASE = "--steps 1500 --samples 400 --gap-every 500 --save-every 500"
# In all rows a step has about 805 tokens, 12 documents of text alone among them, as the base has by the paper's 1 : 1; the rest
# is captioned pictures: 8 of 64 patches or codes, 25 of 16, 55 of 4, 79 of 1. What is compared is what a token buys.
PATCHES = {1: "--patch 1 --seq-len 160 --documents 18 --text-share 0.635", 2: "", 4: "--patch 4 --documents 56 --text-share 0.212",
           8: "--patch 8 --documents 75 --text-share 0.158"}
UNET = "--encoder unet"
TABLES = {                                              # number: (title, {row: options of train.py, which win over BASE's})
    "1": ("Transfusion and Chameleon, by compute (Table 1, Fig. 5)", {
        f"{name}, {steps} steps": f"{options} {more}".strip() for name, options in (("Transfusion", ""), ("Chameleon", "--preset chameleon"))
        for steps, more in ((750, "--steps 750"), (1500, ""), (3000, "--steps 3000"))}),
    "2": ("from Llama to Transfusion and to Chameleon (Table 2)", {
        "Llama": "--preset llama", "Transfusion: + diffusion": "", "+ stability modifications": "--preset llama --stable --lr 7e-4",
        "Chameleon: + loss on image tokens": "--preset chameleon"}),
    "3": ("attention inside a picture (Table 3)", {
        "linear, causal": "--no-bidirectional", "linear, bidirectional": "",
        "U-Net, causal": f"{UNET} --no-bidirectional", "U-Net, bidirectional": UNET}),
    "4": ("patch size (Tables 4, 9)", {
        f"{name}, {p}x{p}": f"{options} {size}".strip() for name, options in (("linear", ""), ("U-Net", UNET))
        for p, size in PATCHES.items() if (name, p) != ("U-Net", 1)}),
    "5": ("linear and U-Net by size (Tables 5, 10)", {
        "0.8M, linear": "", "0.8M, U-Net": UNET, "1.6M, linear": "--size small", "1.6M, U-Net": f"--size small {UNET}"}),
    "11": ("noise limit of pictures before captions (Table 11)", {
        "t <= 500": "", "none": "--t-limit 1000", "U-Net, t <= 500": UNET, "U-Net, none": f"{UNET} --t-limit 1000"}),
}
COLUMNS = {                                             # heading: (how to find it in report.json, how to print it)
    "text": (lambda found: found["alone"], "{:.4f}"),
    "captions": (lambda found: 100 * found["captions"], "{:.1f}%"), "exact": (lambda found: 100 * found["exact"], "{:.1f}%"),
}


def argv_of(options, seed, out):
    """The argument list of one run of train.py."""
    return [*BASE.split(), *options.split(), "--seed", str(seed), "--out", str(out)]


def folder_of(root, options, seed):
    """Where a run lies: named by its options, so that a row of two tables is one run."""
    name = "_".join(options.replace("--", "").split()) or "base"
    return Path(root) / f"{name}_seed{seed}"


def train_row(root, options, seed):
    """Train one row with one seed, on one core, unless its report is there. Returns report.json's dict. A run that was stopped
    goes on. Raises UserError, naming the log, if train.py fails, and if the report is one of other options, since changed."""
    out = folder_of(root, options, seed)
    if (out / "report.json").exists():
        wanted = asdict(parse_arguments(argv_of(options, seed, out))[0])
        there = asdict(Config()) | json.loads((out / "config.json").read_text())
        if changed := [f"--{k.replace('_', '-')} {there[k]}" for k in wanted if there[k] != wanted[k]]:
            raise UserError(f"{out} was run with {', '.join(changed)}, which is no longer its row's: delete that folder, or name "
                                 f"another place with --out")
    if not (out / "report.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, str(HOME / "train.py"), *argv_of(options, seed, out),
                *(["--resume"] if any(out.glob("checkpoints/step_*/.metadata")) else [])]
        with open(out / "said.txt", "w") as said:       # two programs with two threads each would wait for one another
            status = subprocess.run(line, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        if status or not (out / "report.json").exists():
            raise UserError(f"a row failed or was stopped; {out}/said.txt says how, and the same command goes on from there")
    return json.loads((out / "report.json").read_text())


def measured(founds):
    """One row's cells: {heading: (mean, deviation over seeds)}; a heading that a run has not is left out."""
    cells = {}
    for heading, (get, _) in COLUMNS.items():
        try:
            values = [get(found) for found in founds]
        except KeyError:                                # a Llama draws nothing
            continue
        cells[heading] = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
    return cells


def parity(rows):
    """{heading: a sentence's end: at which share of the Chameleon's steps Transfusion is as good}, of Table 1's {row: cells}: Fig.
    5's "parity FLOP ratio", by a line between neighbours, in log steps. A step has as many tokens in both; its FLOPs are
    nearly alike (512 codes make the Chameleon's tables larger by a sixth of all parameters)."""
    steps = [750, 1500, 3000]
    ratios = {}
    for heading in ("text", "captions", "exact"):
        ours, theirs = ([rows[f"{name}, {n} steps"][heading][0] for n in steps] for name in ("Transfusion", "Chameleon"))
        sign, goal = (-1, theirs[-1]) if heading == "text" else (1, theirs[-1])
        better = [k for k, value in enumerate(ours) if sign * value >= sign * goal]
        if not better:
            ratios[heading] = "above 1"
        elif better[0] == 0:
            ratios[heading] = f"at most {steps[0] / steps[-1]:.2f}"
        else:
            k = better[0]
            share = (goal - ours[k - 1]) / (ours[k] - ours[k - 1])
            ratios[heading] = f"{np.exp(np.interp(share, [0, 1], np.log(steps[k - 1: k + 1]))) / steps[-1]:.2f}"
    return ratios


def markdown(title, rows, seeds):
    """The table as lines of markdown. rows: {name: cells}."""
    lines = [f"| {title}; {seeds} seed{'s' * (seeds > 1)} | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, cells in rows.items():
        shown = []
        for heading, (_, form) in COLUMNS.items():
            mean, deviation = cells.get(heading, (None, None))
            shown.append("" if mean is None else form.format(mean) + (f" ± {form.format(deviation).rstrip('%')}" if deviation is not None else ""))
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def main(argv=None):
    """Train what is missing of some tables and print them."""
    parser = argparse.ArgumentParser(description="The paper's tables in miniature. Without a table: what there is.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"which: {', '.join(TABLES)}, or all")
    parser.add_argument("--seeds", type=int, default=1, help="runs per row: seeds 0, 1, ...")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on one core")
    parser.add_argument("--out", default="out/experiments", help="folder of the runs")
    args = parser.parse_args(argv)
    wanted = list(TABLES) if args.tables == ["all"] else args.tables
    if unknown := [name for name in wanted if name not in TABLES]:
        raise UserError(f"there is no table {unknown[0]!r}: choose from {', '.join(TABLES)}, or all")
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    for number, (title, rows) in TABLES.items():
        for options in rows.values():
            parse_arguments(argv_of(options, 0, "x"))           # a wrong option: said before anything is trained
        if not wanted:
            print(f"python experiments.py {number:3s} {title}", *(f"    {name:36s} train.py {BASE} {options}" for name, options in rows.items()), sep="\n")
    runs = list(dict.fromkeys((options, seed) for seed in range(args.seeds) for name in wanted for options in TABLES[name][1].values()))
    began = time.time()
    pool = ThreadPoolExecutor(args.jobs)
    try:
        started = [pool.submit(train_row, args.out, *run) for run in runs]
        for done in tqdm(as_completed(started), total=len(runs), desc="runs", disable=not runs):
            done.result()
    except KeyboardInterrupt:                           # the runs have heard it, too, and save
        raise UserError("stopped: the same command goes on from there") from None
    finally:
        pool.shutdown(cancel_futures=True)              # or the rows that wait would still be trained
    for number in wanted:
        title, options = TABLES[number]
        rows = {name: measured([train_row(args.out, o, seed) for seed in range(args.seeds)]) for name, o in options.items()}
        lines = markdown(title, rows, args.seeds)
        if number == "1":
            lines += ["", "Share of its 3,000 steps at which Transfusion is as good as the Chameleon: " +
                      ", ".join(f"{heading} {ratio}" for heading, ratio in parity(rows).items())]
        (Path(args.out) / f"table_{number}.md").write_text("\n".join(lines) + "\n")
        print(*lines, "", sep="\n")
    if runs:
        print(f"{len(runs)} runs, {time.time() - began:.0f} s; tables and runs are in {args.out}")


if __name__ == "__main__":
    run_command(main)
