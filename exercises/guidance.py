"""
guidance.py: the check of `guide`                                        (diffusion.py, exercise 5)

THE IDEA    Guidance is linear in its two inputs, so two numbers say all about it: what it
            multiplies each of them with. They are read off at w = 0, 1 and 3.
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

from diffusion import guide
from exercises.trial import near, need_shape, need_tensor

WEIGHTS = (0.0, 1.0, 3.0)


@dataclass
class Seen:
    """What the answer multiplies its two inputs with, at each weight: (3, 2) float64."""
    factors: torch.Tensor
    trial: object

    def are(self, rows):
        """Whether the factors are these: a list of (of cond, of uncond), one for each weight."""
        return near(self.factors, torch.tensor(rows, dtype=torch.float64))


def try_guide(trial):
    """The answer, tried at three weights."""
    # Two pictures of one pixel. In the first one only cond is 1, in the second only uncond.
    cond, uncond = torch.eye(2, dtype=torch.float64).view(2, 2, 1, 1, 1)
    rows = []
    for w in WEIGHTS:
        result = need_tensor(trial(cond, uncond, w), f"The result at w = {w:g}", like="float")
        need_shape(result, cond.shape)
        rows.append(result.double().flatten())
    return Seen(torch.stack(rows), trial)


# --------------------------------------------------------------------------------------- properties
def uses_the_weight(seen):
    """w is used"""
    if seen.are([seen.factors[0].tolist()] * 3):
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


def three_weights(seen):
    """w = 0 ignores the caption, w = 1 is the plain model, w = 3 exaggerates"""
    if seen.are([(0, 1), (1, 0), (3, -2)]):
        return None
    known = (
        ([(1, 0), (2, -1), (4, -3)],
         "One too many: at w = 0 you already have the conditional answer. Some papers count so, "
         "with cond + w (cond - uncond); here w = 1 is the plain model: start at the unconditional "
         "answer."),
        ([(1, 0), (0, 1), (-2, 3)],
         "The two are swapped: at w = 1 you return the unconditional answer, and a larger w draws "
         "everything but what was asked for."),
        ([(0, 1), (1, 1), (3, 1)],
         "The unconditional answer is not subtracted: w belongs to the difference, cond - uncond."),
        ([(0, 0), (1, -1), (3, -3)],
         "This is w times the difference alone: it must be added to the unconditional answer."),
        ([(0, 1), (-1, 2), (-3, 4)],
         "The difference has the wrong sign: away from the caption, as you have it, w = 3 draws "
         "what was not asked for. It is cond - uncond."),
        ([(0, -1), (1, -1), (3, -1)],
         "w multiplies the conditional answer only: it belongs to the whole difference, and the "
         "unconditional answer comes in front."),
        ([(1, 0), (1, -1), (1, -3)],
         "w multiplies the unconditional answer only: it belongs to the whole difference."),
        ([(1, 0), (0, -1), (-2, -3)],
         "The weights of the two are (1 - w) and -w: exchange them, and mind the sign."),
        ([(0, 1), (1, 0), (1, 0)],
         "Right for w = 0 and 1, but w is cut off at 1. Guidance goes on: at w = 3 it goes three "
         "times as far."),
        ([(0, 1), (0.5, 0.5), (0.75, 0.25)],
         "The result is divided by 1 + w, so it never goes beyond the conditional answer."),
        ([(0, 1), (1, 0), (9, -8)],
         "w is squared: it multiplies the difference as it is."),
        ([(0, 2), (1, 1), (3, -1)],
         "The unconditional answer is added once too often."),
    )
    for rows, advice in known:
        if seen.are(rows):
            return advice
    if seen.are([(-1, 2), (0, 1), (2, -1)]):
        return "One too few: at w = 1 you return the unconditional answer. Is it w, not w - 1?"
    parts = []
    for w, (cond, uncond) in zip(WEIGHTS, seen.factors.tolist()):
        parts.append(f"w = {w:g}: {cond:g} x cond + {uncond:g} x uncond")
    return ("Not yet. You have " + "; ".join(parts) + ". It must be w x cond + (1 - w) x uncond.")


def plain_numbers(seen):
    """Nothing is clipped, scaled or averaged"""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = 3 * torch.randn(2, 2, 3, 4, 5, generator=generator)
    for w in (3.0, 5):
        result = need_tensor(seen.trial(cond, uncond, w), like="float")
        need_shape(result, cond.shape)
        right = guide(cond, uncond, w)
        if near(result, right, atol=1e-4):
            continue
        if result.abs().max() < right.abs().max():
            return ("Right for small numbers, but large ones are cut off or scaled down. Guidance "
                    "leaves them; the sampler clips x0.")
        return "Right for single numbers, wrong for pictures: each element goes by itself."


PROPERTIES = (uses_the_weight, both_inputs, three_weights, plain_numbers)
