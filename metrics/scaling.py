"""
scaling.py: straight lines in log-log, and how much less compute one needs    (Transfusion Fig. 5)

THE IDEA    Train two kinds of model at several sizes N and token counts D. Each run is a point: its
            compute 6 N D, and what it reaches. On logarithmic axes the points of one kind lie near
            a straight line. Where the other kind's line reaches the same height, one reads off how
            much compute it takes to be as good.
A PICTURE   log loss |  o                         o  Chameleon      F   the FLOPs of its largest run
                     |  x   ` o                   x  Transfusion    f   where Transfusion's line is
                     |    ` x    ` o  <- its goal                       as low as the Chameleon's
                     |        ` x . . .                             f / F = parity FLOP ratio
                     +----------f----F--- log FLOPs
THE RULE    log metric = slope log FLOPs + intercept, by least squares         §4.2
            parity FLOP ratio = exp((goal - intercept) / slope) / F, where goal is the height of the
            rival's line at F
SHAPES      a point is a dict: "model", "flops", perhaps "seed", and a number per metric
PAPER/HERE  same: 6 N D, log-log lines, the ratio at the rival's largest run.
            our choice: one ratio per seed, and from them a 95% interval (Student's t of log
            ratios). The paper gives no interval. A metric of 0 has no logarithm: it is left out.
READ NEXT   ../experiments.py
TRY IT      python -m metrics.scaling runs.json       runs.json: a list of {"model": "transfusion",
            "parameters": 7e9, "tokens": 5e11, "files": {"C4": "c4.json", "COCO": "coco.json"}};
            the files are what --json of evaluate, metrics.likelihood and metrics.coco wrote
TEST        tests/test_scaling.py
"""
import itertools
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from support.common import Parser, UserError, check_writable, read_json, run_command
from support.figures import save_figure

RIVALS = ("transfusion", "chameleon")
ABOUT = ("model", "flops", "seed")                      # of a point: what is not a metric
# What is taken from the files of evaluate, metrics.likelihood and metrics.coco.
TAKEN = ("alone", "captions", "exact", "perplexity", "acc", "cider", "distance", "clip")

# Student's t, 97.5%, for 1, 2, ... degrees of freedom. Beyond them the normal distribution's.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


# -------------------------------------------------------------------------------- lines and ratios
def fit_line(flops, values):
    """(slope, intercept) of ln value over ln FLOPs, by least squares. flops, values: positive
    numbers, at two or more different FLOPs."""
    # As floats: numpy has no logarithm of a whole number of more than 19 digits.
    x = np.log(np.asarray(flops, float))
    y = np.log(np.asarray(values, float))
    dx = x - x.mean()
    dy = y - y.mean()
    shared = (dx * dy).sum()
    slope = shared / (dx ** 2).sum()
    # The line goes through the middle of the points.
    intercept = y.mean() - slope * x.mean()
    return float(slope), float(intercept)


def parity(ours, rival):
    """The share of the rival's largest FLOPs at which our line reaches its height there.

    ours, rival: each (flops, values), two lists. nan where our line is flat, so that it never
    does."""
    slope, intercept = fit_line(*ours)
    rival_slope, rival_intercept = fit_line(*rival)
    if slope == 0:
        return math.nan

    # The goal is read from the rival's line, not from its last run: one run is luck, too.
    most = math.log(max(rival[0]))
    goal = rival_slope * most + rival_intercept
    # Far outside of what was measured the number says only "much less", or "much more".
    log_ratio = (goal - intercept) / slope - most
    return math.exp(max(-50.0, min(50.0, log_ratio)))


def interval(ratios):
    """(geometric mean, low, high) of one ratio per seed: 95%, by Student's t of their logarithms.
    With one seed low and high are None."""
    # Logarithms, for "half" and "twice" are equally far from 1.
    logs = np.log(ratios)
    mean = float(logs.mean())
    ratio = math.exp(mean)
    n = len(logs)
    if n < 2:
        return ratio, None, None

    # With few seeds the deviation itself is uncertain, so t is larger than the normal 1.96.
    freedom = n - 1
    t = 1.96
    if freedom <= len(T_QUANTILES):
        t = T_QUANTILES[freedom - 1]
    deviation = float(logs.std(ddof=1))
    half = t * deviation / math.sqrt(n)
    low = math.exp(mean - half)
    high = math.exp(mean + half)
    return ratio, low, high


def select(points, model, metric, seed=None):
    """(flops, values) of a model's points that have the metric, above 0. seed: None for all."""
    flops = []
    values = []
    for point in points:
        if point["model"] != model:
            continue
        if seed is not None and point.get("seed", 0) != seed:
            continue
        if point.get(metric, 0) > 0:                    # 0 has no logarithm
            flops.append(point["flops"])
            values.append(point[metric])
    return flops, values


def compare(points):
    """{metric: {"slopes": (ours, the rival's), "ratio", "low", "high", "seeds", "points"}} for
    every metric with at least two FLOPs per model and seed."""
    seeds = sorted({point.get("seed", 0) for point in points})
    metrics = []                                        # in the order in which they first appear
    for point in points:
        metrics += [name for name in point if name not in (*ABOUT, *metrics)]

    result = {}
    for metric in metrics:
        # 1. A ratio per seed. Through fewer than two different FLOPs there is no line.
        ratios = []
        for seed in seeds:
            ours = select(points, RIVALS[0], metric, seed)
            rival = select(points, RIVALS[1], metric, seed)
            budgets = [len(set(flops)) for flops, _ in (ours, rival)]
            if min(budgets) >= 2:
                ratios.append(parity(ours, rival))
        if not ratios:
            continue

        # 2. What the seeds say together.
        ratio, low, high = interval(ratios)
        both = [select(points, model, metric) for model in RIVALS]
        result[metric] = {
            "slopes": [fit_line(*line)[0] for line in both],
            "ratio": ratio,
            "low": low,
            "high": high,
            "seeds": len(ratios),
            "points": [len(flops) for flops, _ in both],
        }
    return result


def markdown(result):
    """`compare`'s result as lines of a table."""
    lines = ["| metric | slope, Transfusion | slope, Chameleon | parity FLOP ratio | 95% |",
             "|---|---|---|---|---|"]
    for metric, row in result.items():
        ours, rival = row["slopes"]
        ratio = row["ratio"]

        # One seed has no spread, so no interval either.
        between = "one seed"
        if row["low"] is not None:
            seeds = row["seeds"]
            between = f"{range_of(row)} ({seeds} seeds)"
        lines.append(f"| {metric} | {ours:+.3f} | {rival:+.3f} | {ratio:.3g} | {between} |")
    return lines


def range_of(row):
    """The 95% interval of a metric's ratio, as text. row: of `compare`'s result."""
    low = row["low"]
    high = row["high"]
    return f"{low:.2g} to {high:.2g}"


# --------------------------------------------------------------------------------------- the figure
def plot(points, path):
    """Save Fig. 5 of some points: one panel per metric, a dot per run, a line per model."""
    result = compare(points)
    if not result:
        raise UserError("there is no metric with two budgets of both models: nothing to draw")
    n = len(result)
    figure = Figure(figsize=(3.6 * n, 3.6), layout="constrained")
    (axes,) = figure.subplots(1, n, squeeze=False)
    colours = ("#d35400", "#16a085")
    markers = ("o", "s")
    for axis, (metric, row) in zip(axes, result.items()):
        # 1. The runs of each model, and their line: y = exp(intercept) x^slope.
        for model, colour, marker in zip(RIVALS, colours, markers):
            flops, values = select(points, model, metric)
            axis.plot(flops, values, marker,
                      color=colour, alpha=0.5, markersize=4)
            slope, intercept = fit_line(flops, values)
            ends = np.array([min(flops), max(flops)])
            line = np.exp(intercept) * ends ** slope
            name = model.capitalize()
            axis.plot(ends, line,
                      color=colour, label=f"{name}, slope {slope:+.2f}")

        # 2. What the lines say.
        ratio = row["ratio"]
        title = f"{metric}: parity at {ratio:.2g}"
        if row["low"] is not None:
            title += f"\n95%: {range_of(row)}"
        axis.set_title(title, fontsize=9)

        # 3. Logarithmic axes, on which such a law is a straight line.
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("FLOPs, 6 N D")
        axis.xaxis.set_minor_formatter(NullFormatter())         # they would run into each other
        axis.legend(fontsize=8)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------- the real thing
def read_points(path):
    """The points of a JSON file: a list of runs, each with "model", "parameters", "tokens", perhaps
    "seed", and "files", {name: file}, which count from the list's own folder. Raises UserError."""
    wanted = ('[{"model": "transfusion", "parameters": 7e9, "tokens": 5e11, '
              '"files": {"C4": "c4.json"}}, ...]')
    folder = Path(path).parent
    points = []
    try:
        for run in read_json(path):
            N = float(run["parameters"])
            D = float(run["tokens"])
            point = {"model": run["model"], "seed": run.get("seed", 0), "flops": 6 * N * D}
            for label, name in run["files"].items():
                content = read_json(folder / name)
                point |= numbers_of(label, content)
            points.append(point)
    except FileNotFoundError as problem:
        raise UserError(f"there is no file {problem.filename}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as problem:
        kind = type(problem).__name__
        raise UserError(f"{path} does not list runs as {wanted} ({kind}: {problem})") from None

    # The list can be read, and may still say what cannot be.
    for point in points:
        if point["model"] not in RIVALS or not 0 < point["flops"] < math.inf:
            raise UserError(f"{path}: a run's model must be {' or '.join(RIVALS)}, its parameters "
                            f"and tokens above 0; got {point}")
        if type(point["seed"]) is not int:
            raise UserError(f"{path}: a run's seed must be a whole number, got {point['seed']!r}")
    return points


def numbers_of(label, content):
    """{"C4 perplexity": number} of a file that --json wrote. label: its name, "C4"; content: its
    dict. Of the Llama suite the mean over its tasks is taken."""
    numbers = {}
    for name, value in content.get("mean", content).items():
        # type, not isinstance: True is an int, and no number of ours.
        is_number = type(value) in (int, float)
        if name in TAKEN and is_number and math.isfinite(value):
            numbers[f"{label} {name}"] = value
    return numbers


def demo():
    """Print what the lines say of made-up runs: one model needs 0.4 of the other's compute."""
    rng = np.random.default_rng(0)
    points = []
    budgets = (1e15, 2e15, 4e15)
    for seed, flops in itertools.product(range(3), budgets):
        for model, share in zip(RIVALS, (0.4, 1)):
            worth = flops / share                       # as many of the rival's FLOPs
            noise = math.exp(0.02 * rng.normal())
            loss = 5000 * worth ** -0.25 * noise
            points.append({"model": model, "flops": flops, "seed": seed, "loss": loss})
    print("made-up losses, parity at 0.4 and noise of 2%:", *markdown(compare(points)), sep="\n")


def main(argv=None):
    """Print the table of some runs of any size, and draw the figure. Without a file: the demo."""
    parser = Parser(prog="python -m metrics.scaling",
                    description="Scaling laws of runs of any size (Fig. 5).")
    parser.add_argument("runs", nargs="?", help="a JSON file of runs: see the top of this file")
    parser.add_argument("-o", "--out", default="scaling.png", help="the figure")
    args = parser.parse_args(argv)
    if args.runs is None:
        return demo()
    check_writable(args.out, ".png")
    points = read_points(args.runs)
    plot(points, args.out)
    lines = markdown(compare(points))
    print(*lines, f"\nthe figure is {args.out}", sep="\n")


if __name__ == "__main__":
    run_command(main)
