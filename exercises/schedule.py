"""
schedule.py: the check of `cosine_alpha_bar`                             (diffusion.py, exercise 3)

THE IDEA    The table is T + 1 numbers from 1 down to almost 0. A wrong table is compared with what
            the usual mistakes make of the right one: its square root, its mirror image, itself
            without the clip. They differ by more than the eye sees: without the clip only the last
            number is wrong.
A PICTURE   1 ___
                 \\__        t = 0: clean, exactly 1
                    \\__     falls everywhere, as cos^2
                       \\_   t = T: 2e-9, and not 0, because the last beta is clipped
PROPERTIES  in the order in which they are looked at: see PROPERTIES, below
READ NEXT   ../diffusion.py        TEST  ../tests/test_exercises.py
"""
import math
from dataclasses import dataclass

import torch

from diffusion import cosine_alpha_bar
from exercises.trial import Advice, near, need_tensor


@dataclass
class Seen:
    """The answer's table for T = 1000, beside the right one; (T + 1,) float64 each."""
    table: torch.Tensor
    right: torch.Tensor
    trial: object


def try_cosine(trial):
    """The answer, tried with T = 1000 and with its defaults."""
    return Seen(need_table(trial(1000), 1000), cosine_alpha_bar(1000), trial)


def need_table(table, T):
    """The table as a tensor of T + 1 numbers. Raises Advice for something else."""
    table = need_tensor(table, "The table", like="float")
    # A table of T numbers may be betas, or alpha_bar without its first or last entry. The values
    # tell: betas are small first.
    if table.ndim != 1:
        raise Advice(f"Return one row of T + 1 numbers; yours has shape {tuple(table.shape)}.")
    small_first = len(table) > 1 and table[0] < 0.1 and table[-1] > table[0]
    if len(table) in (T, T + 1) and small_first and not is_near_turned(table, T):
        raise Advice("These are betas, one per step. alpha_bar[t] is what all the steps up to t "
                     "have kept: the product of (1 - beta).")
    if len(table) == T and table[0] == 1:
        raise Advice("T entries, but T + 1 are wanted: the last one, t = T, is missing.")
    if len(table) == T:
        raise Advice("T entries, but T + 1 are wanted: t = 0 is the clean picture, where "
                     f"alpha_bar is 1. Yours starts at {table[0]:.6f}.")
    if len(table) != T + 1:
        wanted = f"For T = {T} there are {T + 1} numbers, t = 0 to T; you return {len(table)}."
        if len(table) in (1000, 1001):
            wanted += " Is 1000 written into it?"
        raise Advice(wanted)
    return table.double()


def is_near_turned(table, T):
    """Whether this is nearly the right table turned round: from its end, or upside down."""
    right = cosine_alpha_bar(T)
    return len(table) == len(right) and near(table.flip(0), right, atol=0.02)


# --------------------------------------------------------------------------------------- properties
def starts_clean(seen):
    """alpha_bar[0] = 1"""
    table = seen.table
    if is_near_turned(table, 1000):
        # sin^2 is cos^2 from its end, but for the offset.
        upside_down = (table - (1 - seen.right)).abs().max()
        backwards = (table - seen.right.flip(0)).abs().max()
        if upside_down < backwards:
            return ("This is 1 - alpha_bar, the share of noise: alpha_bar starts at 1, the clean "
                    "picture, and falls.")
        return "It runs backwards: t = 0 is the clean picture, alpha_bar = 1, and t = T is noise."
    if abs(table[0] - 1) < 1e-9:
        return None
    if near(table[:-1], seen.right[1:], atol=1e-4) and not near(table[:-1], seen.right[:-1], 1e-9):
        return ("Off by one: your entry 0 is what belongs to t = 1. Entry 0 is the clean picture, "
                "1, and entry t is the product of (1 - beta) of the steps 1 .. t.")
    if abs(table[0] - 1) < 1e-3:
        return (f"alpha_bar[0] is {table[0]:.6f} and must be exactly 1: f(t) must be divided by "
                f"f(0).")
    return f"alpha_bar[0] is {table[0]:.4f} and must be 1: at t = 0 the picture is clean."


def falls(seen):
    """alpha_bar falls from t = 0 to T and stays above 0"""
    table = seen.table
    # Above 1 by rounding is no mistake, so a little is allowed.
    rises = (table.diff() > 1e-12).nonzero().flatten()
    if len(rises):
        t = int(rises[0])
        if t <= 1:
            return ("It rises from the start, and must fall: a sine for the cosine, f(t-1)/f(t) "
                    "for f(t)/f(t-1), or a sum (cumsum) for a product?")
        if t < 990:
            return (f"It rises again from t = {t} on: the angle goes beyond pi/2. cos^2 must reach "
                    f"0 at t = T, not before.")
        return (f"It rises again from t = {t} on, just before the end: the angle goes beyond pi/2. "
                f"Divide t/T + offset by 1 + offset, and let t go from 0 to T.")
    if near(table[1:], 1 - (1 - seen.right[1:] / seen.right[:-1]).cumsum(0), atol=1e-3):
        return ("This is 1 minus the sum of the betas, and falls below 0. Each step keeps a share "
                "of what the one before has kept: the product of (1 - beta), torch.cumprod.")
    if (table < 0).any():
        t = int((table < 0).nonzero()[0])
        return (f"It is negative from t = {t} on, but it is a share of variance, so it must be "
                f"between 0 and 1: is the cosine squared?")


def cosine_squared(seen):
    """cos^2, not another curve"""
    # All but the last entry, which the clip decides; that is the next property.
    table = seen.table
    if near(table[:-1], seen.right[:-1], atol=1e-6):
        return None
    advice = spoiled_curve(table, seen.right) or known_curve(table, seen.right)
    if advice:
        return advice

    # A curve without a name: show a few numbers.
    numbers = ", ".join(f"{table[k]:.4f} at t = {k} ({seen.right[k]:.4f})" for k in (250, 500, 750))
    return (f"Another curve than f(t) / f(0), f(t) = cos^2((t/T + offset) / (1 + offset) * pi/2): "
            f"you have {numbers}; in brackets what it should be.")


def spoiled_curve(table, right):
    """Advice, or None, on a table that was the right curve before something went wrong with it.
    table, right: (T + 1,) float64."""
    if (table[:-1] == 1).all():
        return "It stays at 1 until the end: is t // T, a whole number, taken for t / T?"
    if table[1] < 0.01:
        if table[1] < 0.0005:
            return ("Almost nothing is left after one step: alpha_bar is the product of 1 - beta, "
                    "not of beta.")
        return ("Almost nothing is left after one step: each beta is at *most* beta_max "
                "(clamp(max=...)), not at least.")
    floor = table.min().item()
    if floor > 1e-6 and near(table, right.clamp(min=floor), atol=1e-5):
        return (f"The clip is in the wrong place: it is on alpha_bar, which ends at {floor:.1g}. "
                f"Clip the betas, and multiply (1 - beta) up.")


def known_curve(table, right):
    """Advice, or None, on a table that is another curve, one that has a name. Arguments as
    `spoiled_curve`."""
    t = torch.arange(1001, dtype=torch.float64)
    if near(table ** 2, right, atol=1e-3):
        return ("This is the square root: cos, not cos^2. alpha_bar is the share of the variance; "
                "its root is the factor `a` of the picture.")
    if near(table, right ** 2, atol=1e-3):
        return "This is the square of it: cos^4, where cos^2 is wanted."
    power = (table[500].log() / right[500].log()).item()
    if abs(power - 1) > 0.1 and near(table, right ** power, atol=1e-3):
        return f"This is the right curve to the power of {power:.3g}: cos^2, no root and no square."
    if near(table, cosine_alpha_bar(1000, offset=0.0), atol=1e-5):
        return ("The offset is not used, or divided by T like t: t/T starts at 0.008, or the first "
                "betas are almost 0.")
    in_brackets = ((t + 0.008) / 1000 / 1.008 * math.pi / 2).cos() ** 2
    if near(table[:-1], in_brackets[:-1] / in_brackets[0], atol=1e-4):
        return "The offset is divided by T: it is (t/T + offset), not (t + offset)/T."
    if near(table, cosine_alpha_bar(1001)[:-1]):
        return "t is divided by T + 1. There are T + 1 entries, but t/T goes from 0 to 1."
    if near(table, torch.cumprod(right, 0), atol=0.02):
        return ("f itself is multiplied up: beta_t is 1 - f(t)/f(t-1), and the division is "
                "missing.")
    if table[-1] > 0.2:
        return (f"It ends at {table[-1]:.3f}, but at t = T nothing of the picture may be left: the "
                f"angle must be pi/2 there. Is pi/2 inside the cosine, and are the brackets right?")
    if near(table, 1 - t / 1000, atol=0.01):
        return "This is a straight line, 1 - t/T. Wanted is cos^2 of an angle that grows with t."
    betas = torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, 1000)]).double()
    if near(table, torch.cumprod(1 - betas, 0), atol=0.02):
        return ("This is the linear schedule, betas from 0.0001 to 0.02 (Ho et al. 2020). Wanted "
                "is the cosine one.")
    beta = 1 - right[1:] / right[:-1]
    if near(table[1:], 1 - beta, atol=1e-4):
        return ("These are 1 - beta, step by step. alpha_bar[t] is their product up to t "
                "(torch.cumprod).")

    lost = 1 - table[1:] / table[:-1]
    if beta[0] < lost[0] - 1e-6 and near(lost, beta.clamp(min=lost[0].item())):
        return (f"The first betas are raised to {lost[0]:.2g}: they have an upper limit, beta_max, "
                f"and no lower one.")


def last_beta_clipped(seen):
    """beta <= beta_max, at the end"""
    # f(T) is 4e-33 and not 0, by rounding. So without the clip nothing divides by zero, but the
    # first step of a sampler multiplies by 1e16.
    last = seen.table[-1].item()
    before = seen.table[-2].item()
    right = seen.right[-1].item()
    if math.isclose(last, right, rel_tol=1e-3):
        return None
    if last < 1e-12:
        return (f"No clip: alpha_bar[T] is {last:.1e}, and samplers divide by its root. The last "
                f"beta is 1 - f(T)/f(T-1) = 1: clip it at beta_max, then it is {right:.1e}.")
    return (f"The last step is wrong: alpha_bar[T-1] = {before:.2e} is right, alpha_bar[T] should "
            f"be {right:.2e} and is {last:.2e}. Which betas does the clip change?")


def any_number_of_steps(seen):
    """Any T"""
    for T in (10, 250):
        table = need_table(seen.trial(T), T)
        if not near(table, cosine_alpha_bar(T), atol=1e-7):
            return (f"Right for T = 1000, wrong for T = {T}: is 1000 written into it somewhere?")


def arguments_are_used(seen):
    """offset and beta_max are arguments"""
    # T = 100 and half of the betas clipped: here clipping the last one alone is not enough.
    if not near(need_table(seen.trial(100, 0.1), 100), cosine_alpha_bar(100, 0.1), atol=1e-7):
        return ("`offset` is an argument, and with offset = 0.1 the result is wrong: is 0.008 "
                "written into it, or does it stand in one place only?")
    table = need_table(seen.trial(100, 0.008, 0.5), 100)
    right = cosine_alpha_bar(100, 0.008, 0.5)
    if near(table, right, atol=1e-9):
        return None
    if near(table, cosine_alpha_bar(100), atol=1e-9):
        return ("`beta_max` is an argument: with beta_max = 0.5 nothing changes. Is 0.999 written "
                "in?")
    return ("With beta_max = 0.5, where several betas are clipped, the result is wrong: alpha_bar "
            "must be the product of all the clipped (1 - beta).")


def in_float64(seen):
    """float64"""
    table = seen.trial(1000)
    if table.dtype != torch.float64:
        return (f"The numbers are right, but in {table.dtype}. The end of the table is 2e-9, and "
                f"samplers divide by it: ask torch.arange for float64.")
    # Wrong by 6e-5 of itself at the end, where f(t-1) and f(t) differ most. float64: by 1e-12.
    if not near(table, seen.right, atol=0, rtol=1e-7):
        return ("The table is float64, but its numbers are those of float32: somewhere before the "
                "end it was computed in that. Ask torch.arange for float64, not the result.")


PROPERTIES = (starts_clean, falls, cosine_squared, last_beta_clipped, any_number_of_steps,
              arguments_are_used, in_float64)
