"""
test_scaling.py: lines in log-log, and how much less compute one needs
                                                           (metrics/scaling.py; Transfusion Fig. 5)

THE IDEA    Points are planted on known lines, ours at 0.4 of the rival's compute. The code must
            find 0.4 again, and its interval must cover 0.4 as often as it promises.
TRY IT      pytest -n 0 tests/test_scaling.py
"""
import json
import math

import numpy as np
import pytest

from metrics import scaling
from support.common import UserError

# Three sizes, each with three budgets.
FLOPS = [1e9, 2e9, 4e9, 3e9, 6e9, 12e9, 9e9, 18e9, 36e9]


def planted(noise=0.0, seeds=(0,), rng=None, ratio=0.4):
    """Points of two models on parallel lines; ours needs `ratio` of the compute.

    The loss falls with a slope of -0.3 and has noise, the standard deviation of its logarithm. The
    score rises with a slope of 0.2."""
    points = []
    for seed in seeds:
        for model, factor in (("transfusion", ratio), ("chameleon", 1.0)):
            for flops in FLOPS:
                x = flops / factor
                loss = 500 * x ** -0.3
                if noise:
                    loss *= math.exp(noise * rng.normal())
                score = 0.01 * x ** 0.2
                points.append({
                    "model": model,
                    "flops": flops,
                    "seed": seed,
                    "loss": loss,
                    "score": score,
                })
    return points


# -------------------------------------------------------------------------------- lines and ratios
def test_a_line_is_found():
    """Catches a slope or an intercept that is not that of least squares in log-log, and numbers
    that overflow."""
    values = [7 * flops ** -0.25 for flops in FLOPS]
    slope, intercept = scaling.fit_line(FLOPS, values)
    assert slope == pytest.approx(-0.25)
    assert math.exp(intercept) == pytest.approx(7)

    # Three points that are not on a line.
    flops = [1, 2, 5]
    values = [3, 2, 4]
    wanted = np.polyfit(np.log(flops), np.log(values), 1)
    assert scaling.fit_line(flops, values) == pytest.approx(tuple(wanted))

    # Whole numbers that are too large for an int64.
    large = [10 ** 30, 10 ** 31]
    assert scaling.fit_line(large, large) == pytest.approx((1, 0))


def test_parity_of_parallel_lines():
    """Catches a ratio upside down, and a metric that rises judged like one that falls."""
    result = scaling.compare(planted())
    loss = result["loss"]
    assert loss["ratio"] == pytest.approx(0.4)
    assert loss["slopes"] == pytest.approx([-0.3, -0.3])
    assert loss["points"] == [9, 9]
    assert result["score"]["ratio"] == pytest.approx(0.4)

    # One seed has no interval.
    assert loss["low"] is None
    assert "one seed" in scaling.markdown(result)[2]


def test_parity_is_at_the_rivals_largest_run():
    """Lines that are not parallel have another ratio at each height. The rival's F^-0.25 is 0.1 at
    its largest run, F = 10^4; ours, 2 F^-0.5, gets there at 400. Catches the ratio at the smallest
    run, or a mean of ratios."""
    ours = ([10, 100], [2 * f ** -0.5 for f in (10, 100)])
    rival = ([100, 10_000], [f ** -0.25 for f in (100, 10_000)])
    assert scaling.parity(ours, rival) == pytest.approx(400 / 10_000)

    flat = ([1, 2], [3, 3])                             # it gets nowhere
    assert math.isnan(scaling.parity(flat, rival))


# ------------------------------------------------------------------------------------ the interval
def test_the_interval_covers():
    """95% of the intervals over three seeds contain the true ratio. Catches a normal's 1.96 with
    two degrees of freedom, which would cover 81%, and a deviation of n in place of n - 1."""
    # 1. By experiment.
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(300):
        row = scaling.compare(planted(0.1, (0, 1, 2), rng))["loss"]
        hits.append(row["low"] <= 0.4 <= row["high"])
    assert 0.91 <= np.mean(hits) <= 0.985

    # 2. By hand: no interval for one seed; for three, 4.303 standard errors. The logarithms of
    # these have a standard deviation of ln 2.
    assert scaling.interval([0.5])[1:] == (None, None)
    middle, low, high = scaling.interval([0.1, 0.2, 0.4])
    half = 4.303 * math.log(2) / math.sqrt(3)
    assert middle == pytest.approx(0.2)
    assert low == pytest.approx(0.2 * math.exp(-half))
    assert high == pytest.approx(0.2 * math.exp(half))

    # 3. With twenty seeds, the normal's 1.96.
    middle, low, high = scaling.interval([1.0, math.e ** 2] * 10)
    standard_error = (20 / 19 / 20) ** 0.5
    assert math.log(high / low) == pytest.approx(2 * 1.96 * standard_error, rel=0.001)

    # 4. The table ends at ten seeds, nine degrees of freedom.
    for n, t in ((9, 2.306), (10, 2.262), (11, 1.96), (12, 1.96)):
        middle, low, high = scaling.interval([1.0] * (n - 1) + [2.0])
        half = t * math.log(2) / n
        assert math.log(high / middle) == pytest.approx(half)
        assert math.log(middle / low) == pytest.approx(half)


def test_students_t():
    """With x = sqrt(n) tan(angle), Student's density is cos(angle)^(n - 1). Catches a quantile that
    is another's, or mistyped."""
    for n, t in enumerate(scaling.T_QUANTILES, 1):      # n degrees of freedom
        angles = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
        density = np.cos(angles) ** (n - 1)
        inside = np.abs(angles) <= math.atan(t / math.sqrt(n))
        share = density[inside].sum() / density.sum()
        assert share == pytest.approx(0.95, abs=1e-4), n


# ---------------------------------------------------------------------------- too little to compare
def test_two_budgets_make_a_line():
    """Catches a comparison that wants more than a line needs, and one of a single budget."""
    points = planted()
    two = [point for point in points if point["flops"] in FLOPS[:2]]
    one = [point for point in points if point["flops"] == FLOPS[0]]
    assert scaling.compare(two)["loss"]["ratio"] == pytest.approx(0.4)
    assert scaling.compare(one) == {}


def test_a_zero_has_no_logarithm():
    """Catches a metric of 0 that makes the line infinite, or that is not left out alone."""
    points = planted()
    points[0]["score"] = 0.0
    score = scaling.compare(points)["score"]
    assert score["points"] == [8, 9]
    assert score["ratio"] == pytest.approx(0.4)


# ------------------------------------------------------------------------------------------- files
def test_files_of_any_size(tmp_path, capsys):
    """The real thing: what --json of evaluate, likelihood (also the suite's mean) and coco wrote.
    Catches a metric that is not found in them, and a count that is taken for one."""
    runs = []
    for model, factor in (("transfusion", 0.5), ("chameleon", 1.0)):
        for k, N in enumerate((1.6e8, 7.6e8, 7e9)):
            x = 6 * N * 5e11 / factor
            files = {
                "C4": {
                    "perplexity": 200 * x ** -0.06,
                    "tokens": 9,
                },
                "COCO": {
                    "cider": x ** 0.05,
                    "n": 30000,
                },
                "Llama": {
                    "piqa": {"acc": 0.7},
                    "mean": {"acc": x ** 0.01},
                },
            }
            names = {}
            for label, content in files.items():
                names[label] = f"{model}{k}{label}.json"
                (tmp_path / names[label]).write_text(json.dumps(content))
            runs.append({"model": model, "parameters": N, "tokens": 5e11, "files": names})
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(runs))
    figure = tmp_path / "fig.png"

    scaling.main([str(path), "-o", str(figure)])

    output = capsys.readouterr().out
    for metric in ("C4 perplexity", "COCO cider", "Llama acc"):
        row, = [line for line in output.splitlines() if line.startswith(f"| {metric} |")]
        assert "| 0.5 |" in row, output
    assert "tokens" not in output
    assert figure.stat().st_size > 5000                 # bytes


@pytest.mark.parametrize("content, sentence", [
    ("[", "does not list runs"),
    ('[{"model": "transfusion"}]', "does not list runs"),
    ("[]", "nothing to draw"),
    ('[{"model": "gpt", "parameters": 1, "tokens": 1, "files": {}}]',
     "must be transfusion or chameleon"),
    ('[{"model": "chameleon", "parameters": 0, "tokens": 1, "files": {}}]',
     "above 0"),
    ('[{"model": "chameleon", "parameters": 1, "tokens": 1, "files": {"a": "b.json"}}]',
     "no file"),
    (None, "no file"),
])
def test_mistakes(tmp_path, content, sentence):
    """Catches a traceback where a list of runs was mistyped."""
    path = tmp_path / "runs.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        scaling.main([str(path), "-o", str(tmp_path / "fig.png")])
