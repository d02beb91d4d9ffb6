"""
step.py: the check of `ancestral_step`                                   (diffusion.py, exercise 4)

THE IDEA    A step is linear in xt, x0 and noise, so three numbers say all about it: what it
            multiplies each of them with. They are read off at six jumps, for DDPM and for flow. The
            usual mistakes leave their mark on these numbers.
A PICTURE   from t = 500 to u = 400              xt        x0      noise
              DDPM, right                      0.608     0.377     0.407
              DDPM, beta of one step only      0.608     0.005     0.047
            A jump in the middle teaches most. From 1000 to 996 all of them are nearly 0 or 1.
PROPERTIES  in the order in which they are looked at: see PROPERTIES, below
READ NEXT   ../diffusion.py        TEST  ../tests/test_exercises.py
"""
import functools
from dataclasses import dataclass

import torch

from diffusion import Diffusion, ancestral_step, ddim_step
from exercises.trial import Advice, near, need_shape, need_tensor

# From t to u. The first one is the one that advice is about.
MIDDLE = (500, 400)
JUMPS = (MIDDLE, (1000, 996), (500, 496), (300, 299), (4, 0), (1, 0))
LAST_STEPS = ((4, 0), (1, 0))
NAMES = {"ddpm": "DDPM", "flow": "flow"}


@dataclass
class Seen:
    """The three factors of DDPM at every jump: {jump: (3,) float64}.

    seen, right   the answer's and the module's
    diffusion     DDPM
    trial         to ask more
    """
    seen: dict
    right: dict
    diffusion: Diffusion
    trial: object

    def fits(self, jump):
        """Whether the three factors are right there."""
        return near(self.seen[jump], self.right[jump])


def factors(step, diffusion, t, u):
    """What a step multiplies xt, x0 and noise with: (3,) float64."""
    # Three pictures of one pixel. In the first one only xt is 1, in the second only x0, and so on.
    xt, x0, noise = torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1, 1)
    result = need_tensor(step(diffusion, xt, x0, t, u, noise), like="float")
    if result.shape != xt.shape:
        raise Advice(f"The result must have the shape of xt, {tuple(xt.shape)}, not "
                     f"{tuple(result.shape)}: did you sum over something?")
    return result.double().flatten()


def all_factors(step, kind):
    """The factors of a step at every jump: {jump: (3,) float64}. Raises Advice."""
    diffusion = Diffusion(kind)
    found = {}
    for t, u in JUMPS:
        try:
            found[t, u] = factors(step, diffusion, t, u)
        except Advice as problem:
            raise Advice(explain_failure(str(problem), kind, t, u)) from None
    return found


@functools.cache
def right_factors(kind):
    """The module's factors at every jump."""
    return all_factors(ancestral_step, kind)


def try_step(trial):
    """The answer, tried at six jumps with DDPM. Flow is tried once that is right."""
    diffusion = Diffusion("ddpm")
    try:
        seen = all_factors(trial, "ddpm")
    except Advice:
        check_direction(trial, diffusion)
        check_neighbours(trial, diffusion)
        raise
    return Seen(seen, right_factors("ddpm"), diffusion, trial)


def check_direction(trial, diffusion):
    """Raise Advice if the answer is right when t and u are exchanged."""
    try:
        found = factors(trial, diffusion, 400, 500)
    except Advice:
        return
    if near(found, factors(ancestral_step, diffusion, 500, 400)):
        raise Advice("t and u are exchanged: xt is at t, and the step goes down to u < t.")


def check_neighbours(trial, diffusion):
    """Raise Advice if the answer takes the factors of the t before, or of the t after."""
    # diffusers counts its steps from 0: its timestep + 1 is our t.
    try:
        found = factors(trial, diffusion, *MIDDLE)
    except Advice:
        return
    for shift in (-1, 1):
        if near(found, factors(ancestral_step, diffusion, 500 + shift, 400 + shift)):
            raise Advice("Off by one: these are the factors of the neighbouring t. The tables have "
                         "T + 1 entries, and entry 0 is the clean picture.")


def explain_failure(problem, kind, t, u):
    """One sentence more about a step that gives no number."""
    where = f"(From t = {t} to u = {u}, {NAMES[kind]}.)"
    if "NaN" in problem or "infinite" in problem:
        if kind == "flow" and t == 1000:
            return (f"{problem} At t = T, flow has a = 0, so nothing may be divided by a of t. "
                    f"{where}")
        if u == 0:
            return (f"{problem} At u = 0 there is no noise, s = 0, so nothing may be divided by s "
                    f"of u. {where}")
        return f"{problem} Is some variance below 0? {where}"
    return problem


# --------------------------------------------------------------------------------------- properties
def moves(seen):
    """The step moves from t to u"""
    xt, x0, _ = seen.seen[MIDDLE].tolist()
    # Answers that are no step at all. They have round factors at every jump.
    everywhere = torch.stack([seen.seen[jump] for jump in JUMPS])       # (6, 3)
    if near(everywhere, torch.tensor([1.0, 0.0, 0.0]).expand(6, 3)):
        return "You return xt as it is: the step must go to u, where there is less noise."
    if near(everywhere, torch.tensor([0.0, 1.0, 0.0]).expand(6, 3)):
        return ("You return x0, the estimate, at once. A step goes to u only: the estimate is poor "
                "while there is much noise, and gets better on the way.")
    if abs(xt) < 1e-9 and x0 != 0:
        return ("xt is not used: you mix x0 with fresh noise. A draw from q(x_u | x_t, x0) also "
                "keeps a part of xt.")
    if abs(x0) < 1e-9:
        return "x0 is not used: the mean of x_u lies between what x_t says and what x0 says."


def noise_is_added(seen):
    """Noise is added, the noise that is given"""
    if any(factors[2] != 0 for factors in seen.seen.values()):
        return None
    a = seen.diffusion.a[500]
    s = seen.diffusion.s[500]
    # DDIM mixes x0 again with the very noise that xt has: eps = (xt - a x0) / s.
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for_xt = ddim_step(seen.diffusion, 0 * one, one / s, 400).item()
    for_x0 = ddim_step(seen.diffusion, one, -one * a / s, 400).item()
    if near(seen.seen[MIDDLE][:2], torch.tensor([for_xt, for_x0])):
        return ("This is DDIM: it adds no noise and keeps that of xt. The ancestral step draws "
                "from q(x_u | x_t, x0), with fresh noise.")
    return ("No noise is added anywhere. q(x_u | x_t, x0) has a variance, and a draw from it needs "
            "`noise` times its root.")


def from_t_to_u(seen):
    """From t to u, not from u to t"""
    if not seen.fits(MIDDLE):
        check_direction(seen.trial, seen.diffusion)


def step_of_one_or_jump(seen):
    """beta is that of the jump, not of one step"""
    # TRAP: the betas of the 1,000-step chain in a chain of 250 (docs/PAPER.md §4.6). Each step
    # takes too little noise away, and nothing complains.
    if seen.fits(MIDDLE):
        return None
    if seen.fits((300, 299)) and seen.fits((1, 0)):
        return ("Right for a step of one, wrong for a jump: your beta belongs to the 1000-step "
                "chain. In a chain of 250 the variance from u to t must be computed from a and s "
                "at u and t. " + numbers(seen.seen, "ddpm"))
    if seen.fits((500, 496)) and seen.fits((4, 0)):
        return ("Right for a step of four, wrong for other jumps: u is not used, or the 4 of a "
                "chain of 250 is written in. " + numbers(seen.seen, "ddpm"))


def last_step_is_clean(seen):
    """No noise on the last step"""
    # TRAP: noise on the last step (docs/PAPER.md §4.6). `if t > 1` is right in the chain of 1,000
    # steps only; in one of 250 the last step starts at t = 4.
    jump, one = [abs(seen.seen[last][2].item()) for last in LAST_STEPS]
    if max(jump, one) < 1e-6:
        return None
    if one < 1e-6:
        return ("Noise is added on a last step that is a jump, from t = 4 to 0. The last step is "
                "where u is 0, not where t is 1.")
    if max(jump, one) < 0.006 and near(torch.tensor(jump), torch.tensor(one)):
        return (f"A little noise is left on the last step, {one:.4f} of it: the variance must be 0 "
                f"there. Is it clamped to something above 0?")
    return ("Noise is added on the last step. At u = 0 the picture is finished: the noise's factor "
            "must be 0 there, and it is if the variance is that of q(x_u | x_t, x0), "
            "beta * s_u^2 / s_t^2.")


def off_by_one(seen):
    """Entry t of the tables is step t"""
    if not seen.fits(MIDDLE):
        check_neighbours(seen.trial, seen.diffusion)


def noise_factor(seen):
    """The noise's factor is the root of the variance of q(x_u | x_t, x0)"""
    found = seen.seen[MIDDLE]
    right = seen.right[MIDDLE]
    if near(found[2], right[2]) or not near(found[:2], right[:2]):
        return None                                     # a wrong mean is named first, below
    s_t = seen.diffusion.s[500]
    s_u = seen.diffusion.s[400]
    if near(found[2], right[2] ** 2):
        return "The mean is right. The noise is multiplied by the variance: take its square root."
    if near(found[2], right[2] * s_t / s_u):
        return ("The mean is right. The noise has the variance beta, that of x_t given x_u. Here "
                "x0 is known too, and leaves less: beta * s_u^2 / s_t^2.")
    if near(found[2], -right[2]):
        return "The mean is right. The noise is subtracted, and must be added."
    if near(found[2], s_u):
        return ("The mean is right. You add all the noise that x_u has, s_u, but a part of it "
                "comes with xt already: the variance is beta * s_u^2 / s_t^2.")
    if found[2] == 0:
        return "The mean is right. No noise is added here; only the last step, u = 0, has none."
    return ("The mean is right. The noise's factor is not: it is the root of beta * s_u^2 / s_t^2. "
            + numbers(seen.seen, "ddpm"))


def mean(seen):
    """The mean: what x_t says and what x0 says, each with its weight"""
    found = seen.seen[MIDDLE]
    right = seen.right[MIDDLE]
    if near(found[:2], right[:2]):
        return None
    # keep: how much of x_u is left in x_t.
    a_t = seen.diffusion.a[500]
    a_u = seen.diffusion.a[400]
    s_u = seen.diffusion.s[400]
    s_t = seen.diffusion.s[500]
    keep = a_t / a_u
    for_xt, for_x0 = right[:2]
    # The factors that the usual mistakes have instead: of xt, of x0.
    known = (
        (for_x0, for_xt,
         "The factors of xt and x0 have changed places. Near t = 0 the step must believe x0."),
        (for_xt / s_u ** 2 * right_beta(seen), a_u * s_u ** 2 / s_t ** 2,
         "The two weights have changed places: s_u^2 / s_t^2 belongs to xt, beta / s_t^2 to x0."),
        (for_xt, for_x0 / a_u,
         "xt is right, but x0 lacks its factor a_u: x_u has only that much of the clean picture."),
        (for_xt, for_x0 * keep,
         "xt is right, but x0 has the factor a_t: at u there is a_u of the clean picture."),
        (for_xt * s_t / s_u, for_x0 * s_t,
         "The weights have s where s^2 belongs: s is the noise's factor, s^2 its variance."),
        (keep.sqrt() * (1 - a_u) / (1 - a_t), a_u.sqrt() * (1 - keep) / (1 - a_t),
         "You take a for alpha_bar. `diffusion.at` gives the factor of the picture, a, and a^2 is "
         "alpha_bar: alpha_t is (a_t / a_u)^2."),
        (a_t * s_u ** 2 / s_t ** 2, a_u * (s_t ** 2 - a_t ** 2 * s_u ** 2) / s_t ** 2,
         "You have a_t where a_t / a_u belongs: a_t is what x_t has of x0, a_t / a_u of x_u."),
        (for_xt * s_t ** 2, for_x0 * s_t ** 2,
         "Both weights of the mean must be divided by s_t^2."),
        (1 / keep, -right_beta(seen) / s_t / keep,
         "This is the formula for a network's eps (Ho et al. 2020, eq. 11), with x0 in its place: "
         "x0 is the picture. Use eq. 7."),
        (for_xt / keep, for_x0,
         "x0 is right, but xt lacks the factor a_t / a_u: that much of x_u is left in x_t."),
        (for_xt / keep ** 2, for_x0, "x0 is right, but xt has the factor a_t / a_u upside down."),
        (for_xt * keep, for_x0, "x0 is right, but xt has the factor a_t / a_u twice."),
        (for_xt, a_u * (s_t ** 2 - s_u ** 2) / s_t ** 2,
         "beta is not s_t^2 - s_u^2: on the way from u to t the noise that is there already "
         "shrinks by (a_t / a_u)^2."),
        (for_xt, a_u * (s_t ** 2 - keep * s_u ** 2) / s_t ** 2,
         "xt is right. In beta = s_t^2 - (a_t / a_u)^2 s_u^2 the square of a_t / a_u is missing."),
        (for_xt / keep ** 2, a_u * (s_t ** 2 - s_u ** 2 / keep ** 2) / s_t ** 2,
         "a_t / a_u is upside down: x_t has that much of x_u, which is less than all."),
    )
    for of_xt, of_x0, advice in known:
        if near(found[:2], torch.stack([of_xt, of_x0])):
            return f"{advice} {numbers(seen.seen, 'ddpm')}"
    squares = diffusion_of_squares(seen.diffusion)
    if near(found, factors(ancestral_step, squares, 500, 400), rtol=1e-3):
        return ("`diffusion.at` gives a and s, factors of the picture and of the noise. Variances "
                "are their squares. " + numbers(seen.seen, "ddpm"))


def right_beta(seen):
    """The variance that the chain adds from u = 400 to t = 500."""
    keep = seen.diffusion.a[500] / seen.diffusion.a[400]
    return seen.diffusion.s[500] ** 2 - keep ** 2 * seen.diffusion.s[400] ** 2


def diffusion_of_squares(diffusion):
    """A Diffusion whose tables give, squared, what the right one's give."""
    other = Diffusion(diffusion.kind)
    other.s = diffusion.s.sqrt()
    return other


def every_jump(seen):
    """Right for DDPM, at every jump"""
    if not seen.fits(MIDDLE):
        return "Not yet. " + numbers(seen.seen, "ddpm")
    for jump in JUMPS:
        if not seen.fits(jump):
            t, u = jump
            return (f"Right from t = 500 to 400, wrong from t = {t} to {u}. "
                    + numbers(seen.seen, "ddpm", jump))


def flow_too(seen):
    """Right for flow, where a^2 + s^2 is not 1"""
    # 1 - (a_t / a_u)^2 is DDPM's beta, as most pages have it. With flow, which the shipped weights
    # have learned, it draws nothing that was asked for.
    try:
        found = all_factors(seen.trial, "flow")
    except Advice as problem:
        return f"Right for DDPM, wrong for flow. {problem}"
    for jump in JUMPS:
        if not near(found[jump], right_factors("flow")[jump]):
            return ("Right for DDPM, wrong for flow. There a + s = 1, and a^2 + s^2 is not: a beta "
                    "of 1 - (a_t/a_u)^2, or 1 - a^2 for s^2, holds for DDPM only. The noise of x_t "
                    "is s_t^2 in all. " + numbers(found, "flow", jump))


def elementwise(seen):
    """Every element of every picture, in float32"""
    generator = torch.Generator().manual_seed(0)
    xt, x0, noise = torch.randn(3, 2, 3, 4, 5, generator=generator)
    for kind in NAMES:
        diffusion = Diffusion(kind)
        result = need_tensor(seen.trial(diffusion, xt, x0, 700, 690, noise), like="float")
        need_shape(result, xt.shape)
        if result.dtype != xt.dtype:
            return (f"The numbers are right, but xt is {xt.dtype} and the result {result.dtype}: "
                    f"the network could not read it. `diffusion.at(t, xt)` has the dtype of xt.")
        if not near(result, ancestral_step(diffusion, xt, x0, 700, 690, noise), atol=1e-4):
            return (f"Right for single numbers, wrong for pictures ({NAMES[kind]}): is something "
                    f"clipped, or averaged over elements?")


def numbers(found, kind, jump=MIDDLE):
    """The three factors of a jump, and which of them are right."""
    parts = []
    for name, a, b in zip(("xt", "x0", "noise"), found[jump], right_factors(kind)[jump]):
        if near(a, b):
            parts.append(f"{name} x {a:.4f} (right)")
        else:
            parts.append(f"{name} x {a:.4f} (should be {b:.4f})")
    t, u = jump
    return f"From t = {t} to u = {u}, {NAMES[kind]}, your step is {', '.join(parts)}."


PROPERTIES = (moves, noise_is_added, from_t_to_u, step_of_one_or_jump, last_step_is_clean,
              off_by_one, noise_factor, mean, every_jump, flow_too, elementwise)
