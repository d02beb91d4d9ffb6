"""test_scaling.py: lines in log-log, and how much less compute one needs                                (metrics/scaling.py)"""
import json
import math

import numpy as np
import pytest

from metrics import scaling
from support.common import UserError

FLOPS = [1e9, 2e9, 4e9, 3e9, 6e9, 12e9, 9e9, 18e9, 36e9]        # three sizes, three budgets


def planted(noise=0.0, seeds=(0,), rng=None, ratio=0.4):
    """Points of two models on lines of slopes -0.3 and -0.3; ours needs `ratio` of the compute. A second metric rises."""
    points = []
    for seed in seeds:
        for model, factor in (("transfusion", ratio), ("chameleon", 1.0)):
            for flops in FLOPS:
                error = math.exp(noise * rng.normal()) if noise else 1
                points.append({"model": model, "flops": flops, "seed": seed, "loss": 500 * (flops / factor) ** -0.3 * error,
                               "score": 0.01 * (flops / factor) ** 0.2})
    return points


def test_a_line_is_found():
    slope, intercept = scaling.fit_line(FLOPS, [7 * flops ** -0.25 for flops in FLOPS])
    assert slope == pytest.approx(-0.25) and math.exp(intercept) == pytest.approx(7)
    wanted = np.polyfit(np.log([1, 2, 5]), np.log([3, 2, 4]), 1)
    assert scaling.fit_line([1, 2, 5], [3, 2, 4]) == pytest.approx(tuple(wanted))
    assert scaling.fit_line([10 ** 30, 10 ** 31], [10 ** 30, 10 ** 31]) == pytest.approx((1, 0))       # no int64


def test_parity_of_parallel_lines():
    """Catches a ratio upside down, and a metric that rises judged like one that falls."""
    result = scaling.compare(planted())
    assert result["loss"]["ratio"] == pytest.approx(0.4) and result["score"]["ratio"] == pytest.approx(0.4)
    assert result["loss"]["slopes"] == pytest.approx([-0.3, -0.3]) and result["loss"]["points"] == [9, 9]
    assert result["loss"]["low"] is None and "one seed" in scaling.markdown(result)[2]


def test_parity_is_at_the_rivals_largest_run():
    """Lines that are not parallel: 2 F^-0.5 reaches F^-0.25 (F = 10^4: 0.1) at 400. Catches the smallest run's, or a mean's."""
    ours = ([10, 100], [2 * f ** -0.5 for f in (10, 100)])
    rival = ([100, 10_000], [f ** -0.25 for f in (100, 10_000)])
    assert scaling.parity(ours, rival) == pytest.approx(400 / 10_000)
    assert math.isnan(scaling.parity(([1, 2], [3, 3]), rival))


def test_the_interval_covers():
    """95% of the intervals over three seeds have the true ratio in them. Catches a normal's 1.96 with two degrees of freedom,
    which would cover 81%, and a deviation of n in place of n - 1."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(300):
        row = scaling.compare(planted(0.1, (0, 1, 2), rng))["loss"]
        hits.append(row["low"] <= 0.4 <= row["high"])
    assert 0.91 <= np.mean(hits) <= 0.985
    assert scaling.interval([0.5])[1:] == (None, None)
    middle, low, high = scaling.interval([0.1, 0.2, 0.4])
    half = 4.303 * math.log(2) / math.sqrt(3)
    assert (middle, low, high) == pytest.approx((0.2, 0.2 * math.exp(-half), 0.2 * math.exp(half)))
    middle, low, high = scaling.interval([1.0, math.e ** 2] * 10)                   # with twenty seeds, the normal's
    assert math.log(high / low) == pytest.approx(2 * 1.96 * (20 / 19 / 20) ** 0.5, rel=0.001)
    for n in (9, 10, 11, 12):                           # about where the table ends
        middle, low, high = scaling.interval([1.0] * (n - 1) + [2.0])
        t = 2.262 if n == 10 else 2.306 if n == 9 else 1.96
        assert math.log(high / middle) == pytest.approx(t * math.log(2) / n) == pytest.approx(math.log(middle / low))


def test_students_t():
    """With x = sqrt(n) tan(angle), Student's density is cos(angle)^(n - 1). Catches a quantile that is another's, or mistyped."""
    for n, t in enumerate(scaling.T_QUANTILES, 1):
        angles = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
        density = np.cos(angles) ** (n - 1)
        inside = np.abs(angles) <= math.atan(t / math.sqrt(n))
        assert density[inside].sum() / density.sum() == pytest.approx(0.95, abs=1e-4), n


def test_two_budgets_make_a_line():
    """Catches a comparison that wants more than a line needs, and one of a single budget."""
    points = [point for point in planted() if point["flops"] in FLOPS[:2]]
    assert scaling.compare(points)["loss"]["ratio"] == pytest.approx(0.4)
    assert scaling.compare([point for point in points if point["flops"] == FLOPS[0]]) == {}


def test_a_zero_has_no_logarithm():
    points = planted()
    points[0]["score"] = 0.0
    result = scaling.compare(points)
    assert result["score"]["points"] == [8, 9] and result["score"]["ratio"] == pytest.approx(0.4)


def test_files_of_any_size(tmp_path, capsys):
    """The real thing: what --json of evaluate, likelihood (also the suite's mean) and coco wrote."""
    runs = []
    for model, factor in (("transfusion", 0.5), ("chameleon", 1.0)):
        for k, N in enumerate((1.6e8, 7.6e8, 7e9)):
            x = 6 * N * 5e11 / factor
            files = {"C4": {"perplexity": 200 * x ** -0.06, "tokens": 9}, "COCO": {"cider": x ** 0.05, "n": 30000},
                     "Llama": {"piqa": {"acc": 0.7}, "mean": {"acc": x ** 0.01}}}
            for label, content in files.items():
                (tmp_path / f"{model}{k}{label}.json").write_text(json.dumps(content))
            runs.append({"model": model, "parameters": N, "tokens": 5e11,
                         "files": {label: f"{model}{k}{label}.json" for label in files}})
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    scaling.main([str(tmp_path / "runs.json"), "-o", str(tmp_path / "fig.png")])
    said = capsys.readouterr().out
    for metric in ("C4 perplexity", "COCO cider", "Llama acc"):
        assert any(line.startswith(f"| {metric} |") and "| 0.5 |" in line for line in said.splitlines()), said
    assert "tokens" not in said and (tmp_path / "fig.png").stat().st_size > 5000


@pytest.mark.parametrize("content, sentence", [
    ("[", "does not list runs"), ('[{"model": "transfusion"}]', "does not list runs"), ("[]", "nothing to draw"),
    ('[{"model": "gpt", "parameters": 1, "tokens": 1, "files": {}}]', "must be transfusion or chameleon"),
    ('[{"model": "chameleon", "parameters": 0, "tokens": 1, "files": {}}]', "above 0"),
    ('[{"model": "chameleon", "parameters": 1, "tokens": 1, "files": {"a": "b.json"}}]', "no file"), (None, "no file")])
def test_mistakes(tmp_path, content, sentence):
    """Catches a traceback where a list of runs was mistyped."""
    if content is not None:
        (tmp_path / "runs.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        scaling.main([str(tmp_path / "runs.json"), "-o", str(tmp_path / "fig.png")])
