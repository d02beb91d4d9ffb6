"""
experiments.py: the paper's tables in miniature   (Transfusion §4.2, §4.3; Tables 1-5, 9-11, Fig. 5)

THE IDEA    A table of the paper is a handful of runs that differ in one thing. So is a table here:
            a name and the options of train.py for each row, and what the paper says of its rows.
            All rows start from the same seeds and end with the same report. To start an experiment
            of your own, add a table.
A PICTURE   TABLES["3"]   row "linear, causal"         = train.py BASE --no-bidirectional
                          row "linear, bidirectional"  = train.py BASE
            python experiments.py 3 scaling --seeds 3
              -> out/experiments/<options>_seed<k>/report.json, all of them in results.json
              -> the table, mean +- deviation; a verdict on each of the paper's claims; plots
            A run that is finished is not run again. So tables share rows, and Ctrl-C loses nothing.
COLUMNS     the paper's                     here, in the one-object world
              C4, Wikipedia perplexity      text: nats per token of deductions, above their entropy
              Llama accuracy                (none: ranked deductions are all right in every row)
              CIDEr                         captions: share that is true of an unseen picture
              FID                           distance: Fréchet, of latents, drawn and real pictures
              CLIP                          exact: share of pictures that are exactly as asked
              (not in the paper)            loss: eq. 3, of unseen pictures. Another --diffusion,
                                            or --shift, is another scale.
PAPER/HERE  same: what is compared; DDPM, eps loss, lambda 5; guidance 5 in Table 1 and Fig. 5, else
            3; tokens per step, and the text among them, are equal in all rows.
            our choice: short runs of tiny models (docs/RESULTS.md says how short), with
            --noise-skip. --flow trains rectified flow instead.
            A toy says which way a change goes in a toy. That it agrees with the paper is a finding,
            not a law: docs/RESULTS.md says where it does not.
READ NEXT   metrics/verdicts.py, metrics/scaling.py, docs/RESULTS.md
TRY IT      python experiments.py                    TEST  tests/test_experiments.py
"""
import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import parse_arguments
from metrics import scaling, verdicts
from metrics.results import Results, check_options, read_report
from metrics.verdicts import Claim
from support.common import (
    Children,
    Parser,
    Stopped,
    UserError,
    read_json,
    run_command,
    signal_of,
    whole_file,
)

HERE = Path(__file__).parent
TRAIN = HERE / "train.py"
PAPER = HERE / "docs/results/paper_tables.json"         # the paper's own numbers, for the plots

# --------------------------------------------------------------------------------- what is compared
# The options of every row. A row's own options come after these, and win. What none of them names
# is one preset's: it stays, whatever the first run is.
BASES = {
    "paper": "--preset flow --diffusion ddpm --shift 1 --lam 5 --no-patch-position --noise-skip "
             "--documents 128 --steps 300 --pairs 8000 --samples 200 "
             "--gap-every 100000 --save-every 100000",
    "flow": "--preset flow --documents 32 --steps 1500 --samples 400 --gap-every 500 "
            "--save-every 500",
}

# Our choice: what is compared is what a token buys. In all rows a step has as many tokens, and as
# many documents of text alone, as the base has by the paper's 1 : 1: of 32 documents 12, with about
# 805 tokens. The rest is captioned pictures. How many that are depends on how many positions a
# picture takes: of 16, as in the base, there are 25. A row's documents are counted for a base of
# 32; if that has more, so has the row (`written_out`).
TOKENS = 805
PATCH_1 = "--patch 1 --seq-len 160 --documents 18 --text-share 0.635"       # 8 pictures of 64
PATCH_4 = "--patch 4 --documents 56 --text-share 0.212"                     # 55 pictures of 4
PATCH_8 = "--patch 8 --documents 75 --text-share 0.158"                     # 79 pictures of 1
CHAMELEON = "--preset chameleon --documents 18"                             # 8 pictures of 64 codes

# number: (title, {row: its options}, what the paper says of the rows: worse, then better). A table
# of yours may say nothing: [].  `--options "--steps 60"` tries it.
TABLES = {
    "1": ("Transfusion and Chameleon (Table 1)", {
        "Chameleon": f"{CHAMELEON} --guidance 5",
        "Transfusion": "--guidance 5",
    }, [
        Claim(1, "text", "Chameleon", "Transfusion"),
        Claim(2, "captions", "Chameleon", "Transfusion"),
        Claim(3, "distance", "Chameleon", "Transfusion"),
        Claim(3, "exact", "Chameleon", "Transfusion"),
    ]),
    "2": ("from Llama to Transfusion and to Chameleon (Table 2)", {
        "Llama": "--preset llama",
        "Transfusion: + diffusion": "--guidance 5",     # Table 1's: words need no guidance
        "+ stability modifications": "--preset llama --stable --lr 7e-4",
        "Chameleon: + loss on image tokens": f"{CHAMELEON} --guidance 5",
    }, [
        Claim(4, "text", "Transfusion: + diffusion", "Llama"),
        Claim(5, "text", "+ stability modifications", "Transfusion: + diffusion"),
        Claim(6, "text", "Chameleon: + loss on image tokens", "+ stability modifications"),
    ]),
    "3": ("attention inside a picture (Table 3)", {
        "linear, causal": "--no-bidirectional",
        "linear, bidirectional": "",
        "U-Net, causal": "--encoder unet --no-bidirectional",
        "U-Net, bidirectional": "--encoder unet",
    }, [
        Claim(7, "distance", "linear, causal", "linear, bidirectional"),
        Claim(7, "captions", "linear, causal", "linear, bidirectional"),
        Claim(7, "loss", "linear, causal", "linear, bidirectional"),
        Claim(8, "distance", "U-Net, causal", "U-Net, bidirectional"),
        Claim(8, "captions", "U-Net, causal", "U-Net, bidirectional"),
        Claim(8, "loss", "U-Net, causal", "U-Net, bidirectional"),
    ]),
    "4": ("patch size (Tables 4, 9)", {
        "linear, 1x1": PATCH_1,
        "linear, 2x2": "",
        "linear, 4x4": PATCH_4,
        "linear, 8x8": PATCH_8,
        "U-Net, 2x2": "--encoder unet",
        "U-Net, 4x4": f"--encoder unet {PATCH_4}",
        "U-Net, 8x8": f"--encoder unet {PATCH_8}",
    }, [
        Claim(9, "distance", "linear, 4x4", "linear, 2x2"),
        Claim(9, "distance", "linear, 8x8", "linear, 4x4"),
        Claim(9, "captions", "linear, 8x8", "linear, 2x2"),
        Claim(9, "captions", "U-Net, 2x2", "U-Net, 4x4"),
        Claim(9, "distance", "U-Net, 2x2", "U-Net, 4x4"),
        Claim(9, "text", "linear, 8x8", "linear, 2x2"),
        Claim(9, "text", "U-Net, 8x8", "U-Net, 2x2"),
    ]),
    "5": ("linear and U-Net by size (Tables 5, 10)", {
        "0.2M, linear": "--size mini",
        "0.2M, U-Net": "--size mini --encoder unet",
        "0.4M, linear": "--size midi",
        "0.4M, U-Net": "--size midi --encoder unet",
        "0.9M, linear": "",
        "0.9M, U-Net": "--encoder unet",
    }, [
        Claim(10, "distance", "0.2M, linear", "0.2M, U-Net"),
        Claim(10, "distance", "0.4M, linear", "0.4M, U-Net"),
        Claim(10, "distance", "0.9M, linear", "0.9M, U-Net"),
        Claim(10, "captions", "0.2M, linear", "0.2M, U-Net"),
        Claim(10, "captions", "0.9M, linear", "0.9M, U-Net"),
        Claim(10, "loss", "0.2M, linear", "0.2M, U-Net"),
        Claim(10, "loss", "0.9M, linear", "0.9M, U-Net"),
    ]),
    "11": ("noise limit of pictures before captions (Table 11)", {
        "none": "--t-limit 1000",
        "t <= 500": "",
        "U-Net, none": "--encoder unet --t-limit 1000",
        "U-Net, t <= 500": "--encoder unet",
    }, [
        Claim(11, "captions", "U-Net, none", "U-Net, t <= 500"),
        Claim(11, "captions", "none", "t <= 500"),
        Claim(11, "distance", "U-Net, none", "U-Net, t <= 500", alike=True),
        Claim(11, "text", "U-Net, none", "U-Net, t <= 500", alike=True),
    ]),
}

# Fig. 5: sizes N x budgets D x models. QUARTER and HALF: of the base's steps.
# Paper: guidance 5 in the controlled comparison (App. B.1).
MODELS = {"transfusion": "--guidance 5", "chameleon": f"{CHAMELEON} --guidance 5"}
SIZES = ("--size mini", "--size midi", "")
BUDGETS = ("--steps QUARTER", "--steps HALF", "")

COLUMNS = {                 # heading: (report.json's name, times, format, whether lower is better)
    "text": ("alone", 1, "{:.4f}", True),
    "captions": ("captions", 100, "{:.1f}%", False),
    "distance": ("distance", 1, "{:.1f}", True),
    "exact": ("exact", 100, "{:.1f}%", False),
    "loss": ("diffusion_loss", 1, "{:.4f}", True),
}
# What stands above the columns of the picture.
IN_THE_PAPER = {
    "text": "text, nats (C4 perplexity)",
    "captions": "captions, % (CIDEr)",
    "distance": "distance (FID)",
    "exact": "exact, % (CLIP)",
    "loss": "eq. 3",
}


# ------------------------------------------------------------------------------------------ one run
def written_out(base, options):
    """The options of a row after those of the base, as one line that names a run."""
    config, *_ = parse_arguments(base.split())
    options = options.replace("QUARTER", str(max(1, config.steps // 4)))
    words = options.replace("HALF", str(max(1, config.steps // 2))).split()
    if "--documents" in words:                          # counted for a base of 32
        k = words.index("--documents") + 1
        words[k] = str(max(1, int(words[k]) * config.documents // 32))
    return " ".join([*base.split(), *words])


def argv_of(base, options, seed, out):
    """The argument list of one run of train.py."""
    return [*written_out(base, options).split(), "--seed", str(seed), "--out", str(out)]


def folder_of(root, options, seed):
    """The folder of a run. It is named by its options, so that a row of two tables is one run."""
    name = "_".join(options.replace("--", "").split()) or "base"
    return Path(root) / f"{name}_seed{seed}"


def train_row(root, results, base, options, seed, children=None):
    """Train one row with one seed, unless its report is there, and keep its numbers in `results`
    (metrics.results.Results). children: the support.common.Children among which it runs.

    A run that was stopped goes on. Raises UserError, naming the log, if train.py fails; and if the
    folder holds a run of other options, because the row has changed since."""
    line = written_out(base, options)
    if results.get(line, seed):                         # finished, perhaps for another table
        return
    out = folder_of(root, options, seed)
    argv = argv_of(base, options, seed, out)
    report = out / "report.json"
    if report.exists():
        check_options(out, argv)
    else:
        train_in(argv, out, children or Children())
    names = [name for name, *_ in COLUMNS.values()]
    results.add(line, seed, read_report(report, names))


def train_in(argv, out, children):
    """Run train.py in its folder `out`. Raises UserError if it fails or is stopped."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN), *argv]
    if any(out.glob("checkpoints/step_*/.metadata")):   # a complete checkpoint
        command.append("--resume")
    # One core per run: two programs with two threads each would wait for one another.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # Several runs at a time would mix on the screen, so each writes to a file of its own.
    with open(out / "output.txt", "w", encoding="utf-8") as output:
        status = children.run(command, stdout=output, stderr=output, env=environment)
    if status != 0 or not (out / "report.json").exists():
        raise UserError(f"a row failed or was stopped; {out}/output.txt says how, and the same "
                        f"command goes on from there")


def train_all(root, results, base, runs, jobs):
    """Train all runs, `jobs` at a time. runs: list of (options, seed). The first that fails raises
    UserError; the others that run are finished first, those that wait are not started. After Ctrl-C
    or SIGTERM those that run save and stop."""
    pool = ThreadPoolExecutor(jobs)
    children = Children()
    try:
        futures = [pool.submit(train_row, root, results, base, *each, children) for each in runs]
        for future in tqdm(as_completed(futures), total=len(runs), desc="runs"):
            future.result()
    except KeyboardInterrupt as stop:
        children.stop()
        raise Stopped("every run is saved; the same command goes on from there",
                      [signal_of(stop)]) from None
    finally:
        pool.shutdown(cancel_futures=True)              # or the runs that wait would still start


# ---------------------------------------------------------------------------------------- one table
def values_of(reports):
    """One row's numbers, {heading: one per seed}. reports: the numbers of each seed's report.json.
    A heading without a number is left out: a Llama does not draw."""
    values = {}
    for heading, (name, times, *_) in COLUMNS.items():
        if reports and all(name in report for report in reports):
            values[heading] = [times * report[name] for report in reports]
    return values


def markdown(title, rows):
    """The table as lines of markdown, without columns of which no row has a number.
    rows: {name: {heading: numbers per seed}}."""
    headings = [name for name in COLUMNS if any(name in values for values in rows.values())]
    lines = [f"| {title} | " + " | ".join(headings) + " |", "|---" * (len(headings) + 1) + "|"]
    for name, values in rows.items():
        texts = []
        for heading in headings:
            _, _, form, _ = COLUMNS[heading]
            texts.append(cell_text(values.get(heading), form))
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return lines


def cell_text(numbers, form):
    """"98.0% ± 1.5" of one number per seed: mean and deviation. Nothing of None."""
    if numbers is None:
        return ""
    text = form.format(np.mean(numbers))
    if len(numbers) > 1:                                # one seed says nothing about the spread
        # "98.0% ± 1.5": the sign stands once.
        text += " ± " + form.format(np.std(numbers, ddof=1)).rstrip("%")
    return text


def read_rows(results, base, number, seeds):
    """{row: {heading: numbers per seed}} of a table, from the runs that are finished."""
    rows = {}
    for name, options in TABLES[number][1].items():
        line = written_out(base, options)
        found = [results.get(line, seed) for seed in range(seeds)]
        rows[name] = values_of([report for report in found if report])
    return rows


def make_table(root, results, base, number, seeds):
    """The lines of a table, with a verdict on each claim, kept in root/table_<number>.md, too."""
    title, _, claims = TABLES[number]
    rows = read_rows(results, base, number, seeds)
    plural = "s" if seeds > 1 else ""
    lines = markdown(f"{title}; {seeds} seed{plural}", rows)
    lower_is_better = {heading: lower for heading, (*_, lower) in COLUMNS.items()}
    if claims:                                          # a fork's table may have none
        lines += ["", *verdicts.judge(claims, rows, lower_is_better)]
    write_lines(Path(root) / f"table_{number}.md", lines)
    return lines


def scaling_runs():
    """Fig. 5's runs: list of (model, options)."""
    runs = []
    for budget in BUDGETS:
        for size in SIZES:
            for model, options in MODELS.items():
                runs.append((model, " ".join(f"{options} {size} {budget}".split())))
    return runs


def make_scaling(root, results, base, seeds):
    """The lines of Fig. 5's table, kept beside the runs, as is the figure."""
    points = []
    for model, options in scaling_runs():
        line = written_out(base, options)
        steps = parse_arguments(line.split())[0].steps
        tokens = steps * TOKENS * parse_arguments(base.split())[0].documents / 32
        for seed in range(seeds):
            if report := results.get(line, seed):
                values = {name: numbers[0] for name, numbers in values_of([report]).items()}
                values.pop("loss", None)                # of one model only
                flops = 6 * report["parameters"] * tokens
                points.append({"model": model, "flops": flops, "seed": seed, **values})
    lines = scaling.markdown(scaling.compare(points))
    scaling.plot(points, Path(root) / "scaling.png")
    write_lines(Path(root) / "scaling.txt", lines)
    return lines


def write_lines(path, lines):
    """Write lines of text, whole or not at all."""
    with whole_file(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


# --------------------------------------------------------------------------------- the command line
def parse_command(argv):
    """The command line's arguments, checked, and `base`. Raises UserError for a table that there is
    not."""
    parser = Parser(
        description="The paper's tables in miniature. Without a table: what there is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("tables", nargs="*", help=f"which: {', '.join(TABLES)}, all (of these), scaling (Fig. 5)")
    add("--seeds", type=int, default=1, help="runs per row: seeds 0, 1, ...")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on one core")
    add("--out", help="folder of the runs; default: out/experiments, or out/experiments_flow")
    add("--results", help="file of all numbers; default: results.json in that folder")
    add("--flow", action="store_true", help="rectified flow in place of the paper's DDPM")
    add("--options", default="", help='more options of train.py for every row: "--steps 300"')
    add("--no-train", action="store_true", help="make the tables of the runs that are finished")
    args = parser.parse_args(argv)

    args.base = f"{BASES['flow' if args.flow else 'paper']} {args.options}".strip()
    args.out = args.out or ("out/experiments_flow" if args.flow else "out/experiments")
    args.results = args.results or f"{args.out}/results.json"
    if "all" in args.tables:
        args.tables = [*TABLES, *(name for name in args.tables if name == "scaling")]
    for number in args.tables:
        if number not in (*TABLES, "scaling"):
            raise UserError(f"there is no table {number!r}: choose from {', '.join(TABLES)}, all "
                            f"or scaling")
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    check_rows(args.base)
    return args


def check_rows(base):
    """Raise UserError, before anything is trained, for a wrong option of the base or of a row."""
    parse_arguments(base.split())
    rows = [("scaling", *run) for run in scaling_runs()]
    for number, (_, options_of, _) in TABLES.items():
        rows += [(number, name, options) for name, options in options_of.items()]
    for number, name, options in rows:
        try:
            parse_arguments(argv_of(base, options, 0, "x"))
        except UserError as problem:
            raise UserError(f"table {number}, row {name!r}, after the base's options: "
                            f"{problem}") from None


def all_options(tables):
    """The options of every row of some tables, each once, although tables share rows."""
    options = []
    for number in tables:
        if number == "scaling":
            options += [line for _, line in scaling_runs()]
        else:
            options += TABLES[number][1].values()
    return list(dict.fromkeys(options))


def list_tables(base):
    """Print every table with its rows' commands."""
    print(f"BASE = {base}")
    for number, (title, rows, _) in TABLES.items():
        print(f"python experiments.py {number:3s} {title}")
        for name, options in rows.items():
            print(f"    {name:36s} train.py BASE {options}".rstrip())
    print("python experiments.py scaling  sizes (Fig. 5); QUARTER, HALF: of BASE's steps")
    for model, options in scaling_runs():
        print(f"    {model:36s} train.py BASE {options}")


def main(argv=None):
    """Train what is missing of some tables, and print them."""
    args = parse_command(argv)
    if not args.tables:
        list_tables(args.base)
        return

    # 1. The runs. All rows with seed 0 come first: if there is no time for all, each has some.
    began = time.time()
    results = Results(args.results)
    runs = []
    for seed in range(args.seeds):
        runs += [(options, seed) for options in all_options(args.tables)]
    if not args.no_train:
        train_all(args.out, results, args.base, runs, args.jobs)

    # 2. The tables.
    root = Path(args.out)
    root.mkdir(parents=True, exist_ok=True)
    shown = {}
    for number in args.tables:
        if number == "scaling":
            print(*make_scaling(root, results, args.base, args.seeds), "", sep="\n")
            continue
        print(*make_table(root, results, args.base, number, args.seeds), "", sep="\n")
        shown[f"Table {number}"] = read_rows(results, args.base, number, args.seeds)
    if shown:
        verdicts.plot_tables(shown, IN_THE_PAPER, read_json(PAPER), root / "tables.png")
    print(f"{len(runs)} runs, {time.time() - began:.0f} s; tables and runs are in {args.out}, "
          f"all numbers in {args.results}")


if __name__ == "__main__":
    run_command(main)
