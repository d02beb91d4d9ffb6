"""
test_verdicts.py: luck is called luck, and a difference a difference         (metrics/verdicts.py)

THE IDEA    Two rows of a table are three seeds each. If luck alone had dealt the six numbers to the
            two rows, how often would they lie so far apart? That share is p, and it can be counted.
COMPARED    p              with counting by hand
            the verdict    with planted data, and with pure luck, 1,500 times
RUN IT      pytest -n 0 tests/test_verdicts.py
            Each docstring names the bug that the test catches.
"""
import itertools

import numpy as np
import pytest

from metrics import verdicts
from metrics.verdicts import Claim, permutation_p, verdict


# ------------------------------------------------------------------------------------------------ p
def test_p_by_hand():
    """Catches a two-sided p, and a count that leaves out the way that was seen."""
    # Three seeds that lie apart: one of twenty ways.
    assert permutation_p([1, 2, 3], [4, 5, 6]) == 1 / 20
    assert permutation_p([4, 5, 6], [1, 2, 3]) == 1
    # Two seeds each: one of six ways. One seed each: one of two.
    assert permutation_p([1, 2], [3, 4]) == 1 / 6
    assert permutation_p([1], [2]) == 1 / 2
    # 3 + 5 + 6 = 14. Of the twenty sums of three, two are at least so high, 14 and 15.
    assert permutation_p([1, 2, 4], [3, 5, 6]) == 2 / 20


def test_equal_numbers_are_no_difference():
    """Catches rounding that breaks ties: 0.1 + 0.2 is not 0.3."""
    assert permutation_p([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]) >= 0.5
    assert permutation_p([7.7] * 3, [7.7] * 3) == 1
    # Unrounded sums would say 15 of 20.
    assert permutation_p([0.1, 0.8, 0.8], [0.3, 0.5, 0.4]) == 17 / 20


@pytest.mark.parametrize("scale", [1e-3 / 3, 1e6 / 3, 1e12 / 3, 1e12 / 7])
def test_the_unit_does_not_matter(scale):
    """Catches ties that are broken by rounding where numbers are large, and differences that vanish
    where they are small."""
    pairs = [
        ([0.1, 0.8, 0.8], [0.3, 0.5, 0.4]),
        ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]),
        ([1, 2, 4], [3, 5, 6]),
    ]
    for low, high in pairs:
        scaled_low = [scale * x for x in low]
        scaled_high = [scale * x for x in high]
        assert permutation_p(scaled_low, scaled_high) == permutation_p(low, high)


def test_luck_alone_is_called_a_difference_in_a_twentieth():
    """Catches a test that cries wolf, with uneven numbers of seeds, too."""
    rng = np.random.default_rng(0)
    repeats = 1500
    deviation = (0.05 * 0.95 / repeats) ** 0.5          # of a share of 5% among so many
    for n, m in ((3, 3), (4, 3)):
        false_alarms = 0
        for row in rng.normal(size=(repeats, n + m)):
            p = permutation_p(list(row[:n]), list(row[n:]))
            false_alarms += int(p <= 0.05)
        assert false_alarms / repeats <= 0.05 + 3 * deviation


# ------------------------------------------------------------------------------------- the verdicts
@pytest.mark.parametrize("lower_is_better", [False, True])
def test_the_three_words(lower_is_better):
    """Catches a loss that is judged like a score. The data are planted."""
    sign = -1 if lower_is_better else 1
    low = [sign * x for x in (1, 2, 3)]
    high = [sign * x for x in (4, 5, 6)]
    mixed = [sign * x for x in (2, 4, 3.5)]

    # The claim: the second row is better.
    assert verdict(low, high, lower_is_better) == ("reproduced", 0.05)
    assert verdict(high, low, lower_is_better) == ("not reproduced", 1)
    word, _ = verdict(low, mixed, lower_is_better)
    assert word == "within noise"

    # The claim: they are alike.
    word, _ = verdict(low, mixed, lower_is_better, alike=True)
    assert word == "reproduced"
    for a, b in itertools.permutations((low, high)):
        assert verdict(a, b, lower_is_better, alike=True) == ("not reproduced", 0.05)

    # Two seeds can never show it.
    word, _ = verdict(low[:2], high[:2], lower_is_better)
    assert word == "within noise"


def test_lines_of_a_table():
    """Catches a claim whose row is not trained yet, which must be left out, and lines that do not
    name both rows and their means."""
    values = {
        "old": {"loss": [3.0, 4, 5]},
        "new": {"loss": [1.0, 2, 2.5]},
        "none": {},
    }
    claims = [
        Claim(7, "loss", "old", "new"),
        Claim(8, "loss", "old", "none"),
        Claim(9, "loss", "new", "old"),
    ]
    lines = verdicts.judge(claims, values, {"loss": True})
    assert len(lines) == 4                              # two of head, and claims 7 and 9
    assert "| 7 | loss | old → new | 4 → 1.833 | 0.05 | **reproduced** |" in lines
    assert "**not reproduced**" in lines[3]
    assert "| 9 |" in lines[3]


def test_the_figure(tmp_path):
    """Catches an error for rows without a number, and for a row of one seed."""
    tables = {
        "Table 1": {"a": {"x": [1.0, 2.0]}, "b": {}},
        "Table 2": {"c": {"x": [3.0], "y": [1.0, 1.5]}},
    }
    names = {"x": "the x", "y": "the y"}
    of_the_paper = {"Table 1": {"a": {"x": 8.41}}}
    path = tmp_path / "t.png"
    verdicts.plot_tables(tables, names, of_the_paper, path)
    assert path.stat().st_size > 5000                   # bytes
