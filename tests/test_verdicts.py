"""test_verdicts.py: luck is called luck, and a difference a difference                                   (metrics/verdicts.py)"""
import itertools

import numpy as np
import pytest

from metrics import verdicts
from metrics.verdicts import Claim, permutation_p, verdict


def test_p_by_hand():
    """Three seeds that lie apart: one of twenty ways. Catches a two-sided p, and ways that are counted without the one seen."""
    assert permutation_p([1, 2, 3], [4, 5, 6]) == 1 / 20
    assert permutation_p([4, 5, 6], [1, 2, 3]) == 1
    assert permutation_p([1, 2], [3, 4]) == 1 / 6 and permutation_p([1], [2]) == 1 / 2
    # {1, 2, 4} and {3, 5, 6}: of the twenty sums of three, 14 and 15 are at least so high.
    assert permutation_p([1, 2, 4], [3, 5, 6]) == 2 / 20


def test_equal_numbers_are_no_difference():
    """Catches rounding that breaks ties: 0.1 + 0.2 is not 0.3."""
    assert permutation_p([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]) >= 0.5
    assert permutation_p([7.7] * 3, [7.7] * 3) == 1
    assert permutation_p([0.1, 0.8, 0.8], [0.3, 0.5, 0.4]) == 17 / 20      # unrounded sums would say 15


@pytest.mark.parametrize("scale", [1e-3 / 3, 1e6 / 3, 1e12 / 3, 1e12 / 7])
def test_the_unit_does_not_matter(scale):
    """Catches ties that are broken by rounding where numbers are large, and differences that vanish where they are small."""
    for low, high in (([0.1, 0.8, 0.8], [0.3, 0.5, 0.4]), ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]), ([1, 2, 4], [3, 5, 6])):
        assert permutation_p([scale * x for x in low], [scale * x for x in high]) == permutation_p(low, high)


def test_luck_alone_is_called_a_difference_in_a_twentieth():
    """Catches a test that cries wolf. Uneven numbers of seeds, too."""
    rng = np.random.default_rng(0)
    for n, m in ((3, 3), (4, 3)):
        draws = rng.normal(size=(1500, n + m))
        share = np.mean([permutation_p(list(row[:n]), list(row[n:])) <= 0.05 for row in draws])
        assert share <= 0.05 + 3 * (0.05 * 0.95 / 1500) ** 0.5


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_the_three_words(lower_is_better):
    """Planted data. Catches a loss that is judged like a score."""
    sign = -1 if lower_is_better else 1
    low, high, mixed = (list(sign * np.array(row)) for row in ([1, 2, 3], [4, 5, 6], [2, 4, 3.5]))
    assert verdict(low, high, lower_is_better) == ("reproduced", 0.05)
    assert verdict(high, low, lower_is_better) == ("not reproduced", 1)
    assert verdict(low, mixed, lower_is_better)[0] == "within noise"
    assert verdict(low, mixed, lower_is_better, alike=True)[0] == "reproduced"
    for a, b in itertools.permutations((low, high)):
        assert verdict(a, b, lower_is_better, alike=True) == ("not reproduced", 0.05)
    # Two seeds can never show it.
    assert verdict(low[:2], high[:2], lower_is_better)[0] == "within noise"


def test_lines_of_a_table():
    """A claim whose row is not trained yet is left out; the others name both rows, and means."""
    values = {"old": {"loss": [3.0, 4, 5]}, "new": {"loss": [1.0, 2, 2.5]}, "none": {}}
    claims = [Claim(7, "loss", "old", "new"), Claim(8, "loss", "old", "none"), Claim(9, "loss", "new", "old")]
    lines = verdicts.judge(claims, values, {"loss": True})
    assert len(lines) == 4 and "| 7 | loss | old → new | 4 → 1.833 | 0.05 | **reproduced** |" in lines
    assert "**not reproduced**" in lines[3] and "| 9 |" in lines[3]


def test_the_figure(tmp_path):
    """Rows without a number, and one seed, can be drawn."""
    tables = {"Table 1": {"a": {"x": [1.0, 2.0]}, "b": {}}, "Table 2": {"c": {"x": [3.0], "y": [1.0, 1.5]}}}
    verdicts.plot_tables(tables, {"x": "the x", "y": "the y"}, {"Table 1": {"a": {"x": 8.41}}}, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 5000
