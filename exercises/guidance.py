"""
guidance.py: the check of `guide`                                        (diffusion.py, exercise 5)

THE IDEA    Guidance is linear in its two inputs, so two numbers say all about it: what it
            multiplies each of them with. They are read off at w = 0, 1, 1.5 and 3.
A PICTURE        uncond ------- cond ------------------------ w = 3
                 w = 0          w = 1                         three times as far, the same way
THE RULE    w          0       1       3
            cond       0       1       3
            uncond     1       0      -2
PROPERTIES  in the order in which they are looked at: see PROPERTIES, below
READ NEXT   ../diffusion.py        TEST  ../tests/test_exercises.py
"""
from dataclasses import dataclass

import torch

from exercises.trial import Advice, near, need_shape, need_tensor

WEIGHTS = (0.0, 1.0, 1.5, 3.0)


@dataclass
class Seen:
    """What the answer multiplies its two inputs with, at each weight.

    factors     (weights, 2) float64
    rest        (weights,) float64: how much of the result is no sum of the two, each times a number
    """
    factors: torch.Tensor
    rest: torch.Tensor

    def are(self, rows):
        """Whether the factors are these: a list of (of cond, of uncond), one for each weight."""
        return near(self.factors, torch.tensor(rows, dtype=torch.float64))


def try_guide(trial):
    """The answer, tried at each of WEIGHTS, on two random pictures."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = 3 * torch.randn(2, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    inputs = torch.stack([cond.flatten(), uncond.flatten()], dim=1)     # (n, 2)
    factors = []
    rest = []
    for w in WEIGHTS:
        result = need_tensor(trial(cond, uncond, w), f"The result at w = {w:g}", like="float")
        need_shape(result, cond.shape)
        if result.dtype.itemsize == 2:
            raise Advice(f"The dtype must stay {cond.dtype}; yours becomes {result.dtype}.")
        flat = result.double().flatten()[:, None]                       # (n, 1)
        found = torch.linalg.lstsq(inputs, flat).solution               # (2, 1)
        factors.append(found.flatten())
        rest.append((flat - inputs @ found).abs().max())
    factors = torch.stack(factors).round(decimals=6) + 0.0             # + 0: no "-0"
    return Seen(factors, torch.stack(rest))


# --------------------------------------------------------------------------------------- properties
def elementwise(seen):
    """Each element by itself: a sum of the two, each times a number"""
    if (seen.rest > 1e-4).any():
        w = WEIGHTS[int(seen.rest.argmax())]
        return (f"The result at w = {w:g} is no sum of the two answers, each times one number: is "
                "something clipped, averaged over elements, or chosen by a condition? Large "
                f"numbers may stay; the sampler clips x0.")


def uses_the_weight(seen):
    """w is used"""
    if seen.are([seen.factors[0].tolist()] * len(WEIGHTS)):
        cond, uncond = seen.factors[0].tolist()
        if near(seen.factors[0], torch.tensor([0.5, 0.5])):
            return ("This is the average of the two, whatever w is: guidance goes beyond the "
                    "conditional answer, away from the other.")
        return (f"w changes nothing: you return {cond:g} x conditional + {uncond:g} x "
                f"unconditional for every w.")


def both_inputs(seen):
    """Both inputs are used"""
    if (seen.factors[:, 1] == 0).all():
        return ("The unconditional answer is not used. Guidance strengthens the *difference* that "
                "the caption makes.")
    if (seen.factors[:, 0] == 0).all():
        return "The conditional answer is not used: then no caption is heard."


# What an answer returns at w, as (factor of cond, factor of uncond), and what that means.
KNOWN = (
    (lambda w: (1 + w, -w),
     "One too many: at w = 0 you already have the conditional answer. Some papers count so, with "
     "cond + w (cond - uncond); here w = 1 is the plain model: start at the unconditional answer."),
    (lambda w: (w - 1, 2 - w),
     "One too few: at w = 1 you return the unconditional answer. Is it w, not w - 1?"),
    (lambda w: (1 - w, w),
     "The two are swapped: at w = 1 you return the unconditional answer, and a larger w draws "
     "everything but what was asked for."),
    (lambda w: (w, 1),
     "The unconditional answer is not subtracted: w belongs to the difference, cond - uncond."),
    (lambda w: (1, w),
     "w multiplies the unconditional answer, and nothing is subtracted: w belongs to the "
     "difference, cond - uncond."),
    (lambda w: (w, -w),
     "This is w times the difference alone: it must be added to the unconditional answer."),
    (lambda w: (-w, 1 + w),
     "The difference has the wrong sign: away from the caption, as you have it, w = 3 draws what "
     "was not asked for. It is cond - uncond."),
    (lambda w: (2 - w, w - 1),
     "Right at w = 1, but a larger w goes back towards the unconditional answer: it must go away "
     "from it."),
    (lambda w: (w, -1),
     "w multiplies the conditional answer only: it belongs to the whole difference, and the "
     "unconditional answer comes in front."),
    (lambda w: (1, -w),
     "w multiplies the unconditional answer only: it belongs to the whole difference."),
    (lambda w: (min(w, 1), 1 - min(w, 1)),
     "Right for w = 0 and 1, but w is cut off at 1. Guidance goes on: at w = 3 it goes three times "
     "as far."),
    (lambda w: (int(w), 1 - int(w)), "w is made an int: at w = 1.5 you return what belongs to 1."),
    (lambda w: (w / (1 + w), 1 / (1 + w)),
     "The result is divided by 1 + w, so it never goes beyond the conditional answer."),
    (lambda w: (w ** 2, 1 - w ** 2), "w is squared: it multiplies the difference as it is."),
    (lambda w: (w, 1 + w),
     "w multiplies the sum of the two: it belongs to their difference, cond - uncond."),
    (lambda w: (w, 2 - w), "The unconditional answer is added once too often."),
)


def right_weights(seen):
    """w = 0 ignores the caption, w = 1 is the plain model, w = 3 exaggerates"""
    if seen.are([(w, 1 - w) for w in WEIGHTS]):
        return None
    for rule, advice in KNOWN:
        if seen.are([rule(w) for w in WEIGHTS]):
            return advice
    parts = []
    for w, (cond, uncond) in zip(WEIGHTS, seen.factors.tolist()):
        parts.append(f"w = {w:g}: {cond:g} x cond + {uncond:g} x uncond")
    seen_so_far = "You have " + "; ".join(parts) + "."
    sums = seen.factors.sum(1)
    if near(sums, torch.ones_like(sums)):
        far = "too far" if seen.factors[-1, 0] > WEIGHTS[-1] else "not as far as you should"
        return (f"You go along the right line, but {far}: at w, w times the way from the "
                f"unconditional answer to the conditional one. {seen_so_far}")
    return ("The two factors must add up to 1, w x cond + (1 - w) x uncond: is the result scaled, "
            "or a bracket missing? " + seen_so_far)


PROPERTIES = (elementwise, uses_the_weight, both_inputs, right_weights)
