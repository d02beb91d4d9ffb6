"""
verdicts.py: is a difference between two rows of a table more than luck?  (Transfusion §4, Tables)

THE IDEA    The paper prints one run per row. We train every row with several seeds and ask of each
            of its statements ("bidirectional attention is better"): could the seeds alone have
            made this difference? If the rows were the same model, any way of dealing the numbers
            to the two rows would be equally likely. So count the ways.
A PICTURE   causal 42 44 39   bidirectional 51 47 55      20 ways to deal six numbers to two rows;
            one is at least so far apart: p = 1/20 = 0.05             -> reproduced
THE RULE    exact permutation test, one-sided, of the difference of means           Fisher 1935
              p for the paper's direction <= 0.05     reproduced
              p for the other direction   <= 0.05     not reproduced
              neither                                 within noise
            A statement that two rows are alike is reproduced while both p are above 0.05: a weak
            word, for few seeds show little.
PAPER/HERE  not in the paper, which has one run per row. Our choice: no normal distribution is
            assumed, as a t-test would. Three seeds a row are the fewest with which p can reach
            0.05: then the rows must not overlap at all.
READ NEXT   ../experiments.py        TEST  tests/test_verdicts.py
"""
import itertools
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from support.figures import save_figure

LEVEL = 0.05


class Claim(NamedTuple):
    """What the paper says of two rows of a table.

    direction   its number in docs/RESULTS.md, 1 to 11
    metric      heading of a column
    worse       name of the row that is worse
    better      name of the row that is better
    alike       the paper says that they do not differ"""
    direction: int
    metric: str
    worse: str
    better: str
    alike: bool = False


def permutation_p(low, high):
    """How often chance alone would put the mean of `high` at least so far above that of `low`, if
    both were drawn from one distribution: 0 to 1. low, high: lists of numbers, one per seed.

    Exact: every way of dealing the numbers to two rows is tried. With 5 seeds these are 252."""
    numbers = [*low, *high]
    total = sum(numbers)
    n_low = len(low)
    n_high = len(high)

    def difference(hand):
        """Of the means, if these numbers were dealt to the row `high`, and the rest to `low`."""
        in_hand = sum(hand)
        mean_high = in_hand / n_high
        mean_low = (total - in_hand) / n_low
        return mean_high - mean_low

    # A sum in another order is rounded otherwise: equal must count as "at least so far".
    largest = max(abs(number) for number in numbers)
    tolerance = 1e-9 * (1 + largest)
    seen = difference(high) - tolerance

    # What was seen is one of these ways, so p is never 0.
    hands = list(itertools.combinations(numbers, n_high))
    as_far = [hand for hand in hands if difference(hand) >= seen]
    return len(as_far) / len(hands)


def verdict(worse, better, lower_is_better, alike=False):
    """(word, p) of a statement. worse, better: numbers per seed of the row that the paper calls so;
    p: of the paper's direction; where the paper says "alike", of the likelier direction."""
    # "Better" is the higher of the two, unless the metric is a loss.
    low, high = (better, worse) if lower_is_better else (worse, better)
    p = permutation_p(low, high)
    other = permutation_p(high, low)

    # Two rows that are said to be alike have no direction: either difference speaks against it.
    if alike:
        likelier = min(p, other)
        word = "not reproduced" if likelier <= LEVEL else "reproduced"
        return word, likelier

    # Three answers. "Within noise" says that the seeds are too few, not that the paper is wrong.
    if p <= LEVEL:
        return "reproduced", p
    if other <= LEVEL:
        return "not reproduced", p
    return "within noise", p


def judge(claims, values, lower_is_better):
    """One line of markdown per claim, after a heading.

    claims            list of Claim
    values            {row: {metric: numbers per seed}}
    lower_is_better   {metric: bool}"""
    lines = ["| | measure | worse → better, says the paper | here | p | verdict |",
             "|---|---|---|---|---|---|"]
    for claim in claims:
        worse = values[claim.worse].get(claim.metric)
        better = values[claim.better].get(claim.metric)
        if not worse or not better:                     # a row is not trained yet
            continue
        is_loss = lower_is_better[claim.metric]
        word, p = verdict(worse, better, is_loss, claim.alike)

        # The means are shown, though the test looks at every seed: a reader wants to know how far.
        arrow = "=" if claim.alike else "→"
        says = f"{claim.worse} {arrow} {claim.better}"
        from_mean = sum(worse) / len(worse)
        to_mean = sum(better) / len(better)
        here = f"{from_mean:.4g} → {to_mean:.4g}"
        lines.append(f"| {claim.direction} | {claim.metric} | {says} | {here} | {p:.2f} | "
                     f"**{word}** |")
    return lines


# --------------------------------------------------------------------------------------- the figure
def plot_tables(tables, headings, paper, path):
    """Save one picture of several tables: a dot per seed, mean and deviation, and at the right, in
    green, the paper's number.

    tables     {title: {row: {heading: numbers per seed}}}
    headings   {heading: what is written above the column}
    paper      {title: {row: {heading: number}}}, as far as it has them"""
    # A table is as high as it has rows, a column as wide as any other. In inches.
    heights = [1.2 + 0.3 * len(rows) for rows in tables.values()]
    width = 4 + 2.6 * len(headings)
    size = (width, sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(tables), len(headings),
                           squeeze=False, height_ratios=heights)
    for axes, (title, rows) in zip(grid, tables.items()):
        in_paper = paper.get(title, {})
        for axis, (heading, above) in zip(axes, headings.items()):
            plot_column(axis, rows, heading, in_paper)
            # The names of the rows stand once, at the left.
            names = list(rows) if axis is axes[0] else []
            axis.set_yticks(range(len(rows)), names)
            axis.set_title(f"{title}: {above}", fontsize=9)
    save_figure(figure, path, dpi=90)


def plot_column(axis, rows, heading, paper):
    """One column of a table: its rows from top to bottom.
    rows: {row: {heading: numbers per seed}}; paper: {row: {heading: number}}."""
    # A row is a dot per seed over a bar: its middle is the mean, its length the deviation. Rows
    # whose dots overlap cannot be told apart.
    for y, values in enumerate(rows.values()):
        numbers = values.get(heading, [])
        if not numbers:                                 # this row is not trained yet
            continue
        mean = np.mean(numbers)
        spread = 0.0
        if len(numbers) > 1:
            spread = np.std(numbers, ddof=1)
        axis.errorbar(mean, y, xerr=spread, fmt="|",
                      color="#2c3e50", markersize=14, capsize=3)
        heights = [y] * len(numbers)
        axis.plot(numbers, heights, "o",
                  color="#d35400", markersize=4, alpha=0.7)

    # The paper's numbers have another unit: they stand in a column of their own, at the right.
    low, high = axis.get_xlim()
    room = 0.3 * (high - low)
    axis.set_xlim(low, high + room)
    axis.set_ylim(len(rows) - 0.5, -0.5)                # the first row on top
    across = axis.get_yaxis_transform()                 # x as a share of the width, y as a row
    for y, row in enumerate(rows):
        number = paper.get(row, {}).get(heading)
        if number is None:
            continue
        axis.text(0.98, y, f"{number:g}", transform=across,
                  va="center", ha="right", fontsize=9, color="#16a085")
    axis.grid(axis="x", alpha=0.4)
    axis.tick_params(labelsize=8)
