"""
sweep.py: which guidance is best, for each benchmark                        (Transfusion App. B.1)

THE IDEA    Guidance trades variety for obedience, and each benchmark wants another amount: FID
            little, a count of obeyed prompts more. The flagship's is tuned per benchmark. Several
            weights after --guidance, and the same pictures are drawn with each of them, from the
            same noise; the table says which weight is best for which number.
A PICTURE   --guidance 1 3 5        1.0     3.0     5.0    best
            FID                   14.20   9.10*  12.70     3.0
            CLIP score            21.00  24.10   24.60*    5.0
PAPER/HERE  same: 5 in the controlled comparison, 3 in the ablations, tuned for the flagship.
            TRAP: the best of several numbers flatters itself. Tune with one --seed, report the
            chosen weight with another.
READ NEXT   coco.py, ../evaluate.py        TEST  tests/test_sweep.py
TRY IT      python evaluate.py --guidance 1 3 5 --n 60 --steps 25
            python -m metrics.coco scenes --guidance 1 3 5 --limit 64 --steps 25 --only pictures
"""
import math

from support.common import UserError

# Numbers of a report of which less is better; of all others that are shown, more.
LESS = ("distance",)


def check_weights(weights):
    """Raise UserError for guidance weights, a list of float, that do not make sense."""
    for weight in weights:
        if not 0 <= weight < math.inf:
            raise UserError(f"--guidance must be 0 or more, got {weight}")
    if len(set(weights)) < len(weights):
        raise UserError("--guidance names a weight twice")


def best(results, name):
    """The weight with the best number of a name. Of a tie, the smallest: less guidance distorts
    less. results: {weight: {name: number}}."""
    sign = -1 if name in LESS else 1
    return max(sorted(results), key=lambda weight: sign * results[weight][name])


def table(results, names):
    """The lines of a table: a row for each number that depends on the weight.

    results    {weight: {name: number}}
    names      {name of a number: how it is called}; what the results lack is left out"""
    lines = []
    for name, text in names.items():
        values = {weight: numbers.get(name) for weight, numbers in results.items()}
        if len(set(values.values())) == 1:              # captions do not depend on guidance
            continue
        chosen = best(results, name)
        line = f"{text:42s}"
        for weight, value in values.items():
            mark = "*" if weight == chosen else " "
            line += f"{value:10.4g}{mark}"
        lines.append(line + f"{chosen:8g}")
    # A tie in all of them hides nothing: the pictures took minutes.
    if not lines:
        numbers = next(iter(results.values()))
        return [f"with every weight: {text} {numbers[name]:.4g}"
                for name, text in names.items() if name in numbers]

    head = f"{'guidance':42s}"
    for weight in results:
        head += f"{weight:10g} "
    lines.insert(0, head + "    best")
    lines.append("the best of several numbers flatters itself: report it with another --seed")
    return lines
