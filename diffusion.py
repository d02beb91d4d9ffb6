"""
diffusion.py: noise in, noise out                  (Transfusion §2.2 "Diffusion", eq. 2 and eq. 3)

THE IDEA    Mix a picture with noise, by an amount that grows with t. Train a network to say which
            noise was mixed in. Then start from noise alone, ask again and again, and each time take
            a little of the predicted noise away.
A PICTURE   t = 0            t = 250       t = 500       t = 750       t = 1000
            picture    ->    grain   ->    ghost   ->    hint    ->    noise     eq. 2, at once
            picture    <-    x(t-1)  <-    ...     <-    xt      <-    noise     samplers, by steps
THE RULE    xt = a[t] x0 + s[t] eps,   eps ~ N(0, 1)                                         eq. 2
              DDPM, cosine schedule:  a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar)
              rectified flow:         a = 1 - t/T,         s = t/T
            L_DDPM = mean over elements of (target - network(xt, t, context))^2              eq. 3
              DDPM: target = eps          flow: target = eps - x0
            A kind of diffusion is a row of KINDS: a schedule, which gives a and s, and a target.
TAKE IT     Copy this file: it needs no other of ours.
              d = Diffusion()
              t = torch.randint(1, d.T + 1, (M,))           # 1 .. T: at t = 0 there is no noise
              xt = d.add_noise(x0, eps, t)
              out = network(xt, t)
              L = loss(d.target(x0, eps, t), d.prediction(xt, out, t)).mean()
              *_, (_, x, _) = sample(network, xT, d)        # xT = torch.randn(M, c, h, w)
SHAPES      x0, xt, eps, out (M, c, h, w) float32; t (M,) int64 in 0 .. T.
            The tables a, s, alpha_bar have T + 1 entries. t = 0 is the clean picture, a = 1, s = 0;
            t = T = 1000 is noise. (diffusers counts from 0: its timestep + 1 is our t.)
PAPER/HERE  same: cosine schedule (offset 0.008, beta <= 0.999), T = 1000, eps loss, 250 sampling
            steps, guidance.
            our choice: eq. 3's norm is a mean over elements; estimates of x0 are clipped to the
            range that latents have.
            our choice: `noise_skip`: the network says v (Salimans & Ho 2022), and eps, of which the
            loss is, follows from v and xt.
            our choice: `flow`, which §3 names as future work, and `shift`, which moves the schedule
            to more noise (1 = the paper's). docs/RESULTS.md "What it took" says when they pay.
READ NEXT   patchify.py
TRY IT      python diffusion.py
NOTEBOOK    notebooks/2_noise_in_noise_out.ipynb
TEST        tests/test_diffusion.py (each sampler draws an exact Gaussian; schedule and steps equal
            those of `diffusers`)
"""
import itertools
import math

import torch

SAMPLERS = ("ddpm", "ddim", "dpm++")


# -------------------------------------------------------------------- noise in: the forward process
def cosine_alpha_bar(T=1000, offset=0.008, beta_max=0.999):
    """alpha_bar[t] for t = 0 .. T, (T + 1,) float64, about cos(t/T pi/2)^2; alpha_bar[0] = 1.
    Transfusion §2.2; Nichol & Dhariwal 2021, eq. 17."""
    t = torch.arange(T + 1, dtype=torch.float64)
    # The offset keeps the first betas from being almost 0.
    progress = (t / T + offset) / (1 + offset)                      # up to 1
    f = torch.cos(progress * math.pi / 2) ** 2                      # down to 0
    # The last betas come close to 1, a step that forgets everything, so they are clipped.
    # TRAP: the product of clipped betas is no longer f. Build alpha_bar from the betas.
    kept = f[1:] / f[:-1]
    beta = (1 - kept).clamp(max=beta_max)                           # beta[0] belongs to t = 1
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    one = torch.ones(1, dtype=torch.float64)                        # t = 0: the clean picture
    return torch.cat([one, alpha_bar])


def cosine(T, shift=1.0):
    """(a, s) of the paper's schedule, each (T + 1,) float64. shift: see `Diffusion`."""
    # Paper: §2.2, eq. 2.
    alpha_bar = cosine_alpha_bar(T)
    a = alpha_bar.sqrt()
    s = (1 - alpha_bar).sqrt() * shift
    # Divided by this, a^2 + s^2 = 1: the variance is preserved.
    scale = (a ** 2 + s ** 2).sqrt()
    return a / scale, s / scale


def straight(T, shift=1.0):
    """(a, s) of rectified flow, each (T + 1,) float64. shift: see `Diffusion`."""
    # Our choice: rectified flow. Paper: §3 leaves it "to future work".
    s = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    a = 1 - s
    s = s * shift
    # Divided by this, a + s = 1: a straight line from picture to noise.
    scale = a + s
    return a / scale, s / scale


# ------------------------------------------ what the network must say, and x0 from what it has said
# All of these take and give (M, c, h, w); a and s are those of eq. 2, shaped to multiply them.
# Neither target here needs a and s, but others do: forks/v_prediction.diff has one.
def eps_target(x0, eps, a, s):
    """The noise itself: the target of the paper's DDPM."""
    return eps                                          # Paper: eq. 3


def x0_from_eps(xt, out, a, s):
    """eq. 2, solved for x0."""
    return (xt - s * out) / a


def velocity_target(x0, eps, a, s):
    """Where xt moves as t grows: from the picture to the noise."""
    return eps - x0


def x0_from_velocity(xt, out, a, s):
    """xt - s (eps - x0) = (a + s) x0, and on a straight line a + s = 1."""
    return xt - s * out


# --------------------------------------------------------------------------------- the three tables
# A new schedule, or a new target, is a function or two above and a row here. config.py offers what
# KINDS has, and the tests try every row: they draw an exact Gaussian with each sampler.
# A schedule takes a from 1 down to about 0, s from 0 up to 1, and keeps their scale at every shift.
# With eps a[T] must stay above 0, because x0_from_eps divides by it. Some published schedules end
# at 0: clip alpha_bar there, or give them another target.
SCHEDULES = {
    "cosine": cosine,
    "straight": straight,
}
TARGETS = {                                 # what the network must say, x0 from what it has said
    "eps": (eps_target, x0_from_eps),
    "velocity": (velocity_target, x0_from_velocity),
}
KINDS = {                                   # a schedule and a target
    "ddpm": ("cosine", "eps"),
    "flow": ("straight", "velocity"),
}


class Diffusion:
    """The forward process, and what the network's output means.

    kind    a row of KINDS: "ddpm" (the paper) or "flow"
    T       how many steps there are
    shift   multiplies the noise-to-signal ratio s/a at every t; 1 leaves the schedule alone
    noise_skip    the noisy picture passes beside the network, see `prediction`; for "ddpm"
    Raises ValueError for another kind, and for noise_skip if the target is not eps."""

    def __init__(self, kind="ddpm", T=1000, shift=1.0, noise_skip=False):
        if kind not in KINDS:
            names = ", ".join(KINDS)
            raise ValueError(f"unknown diffusion {kind!r}: choose from {names}")
        schedule, target = KINDS[kind]
        if noise_skip and target != "eps":
            raise ValueError(f"noise_skip is for kinds whose network says eps, not for {kind!r}")
        self.kind = kind
        self.T = T
        self.shift = shift
        self.noise_skip = noise_skip
        # Tables of T + 1 numbers, in float64: samplers divide by a, which ends near 0.
        self.a, self.s = SCHEDULES[schedule](T, shift)
        self.on_gpu = {}                                # copies of them: see `tables`
        self.target_of, self.x0_from = TARGETS[target]

    def at(self, t, x):
        """(a, s) at t, shaped to multiply x. t: (M,) int64, or one int for all; x: (M, c, h, w).
        Raises ValueError for a t outside 0 .. T, if t is on the CPU."""
        t = torch.as_tensor(t)
        # A negative t would count from the table's end. On a GPU, to ask would be to wait for it.
        if t.device.type == "cpu" and ((t < 0) | (t > self.T)).any():
            raise ValueError(f"t must be between 0 and {self.T}, got {t.tolist()}")
        a, s = self.tables(t.device)                    # each (T + 1,)
        t = t.to(a.device)
        shape = (-1,) + (1,) * (x.ndim - 1)             # (M, 1, 1, 1)
        a = a[t].reshape(shape)                         # (M, 1, 1, 1)
        s = s[t].reshape(shape)
        return a.to(x), s.to(x)

    def tables(self, device):
        """(a, s), each (T + 1,) float64: on a GPU of Nvidia's, if t is there; else on the CPU, as
        some devices have no float64. device: that of t."""
        if device.type != "cuda":
            return self.a, self.s
        # Kept: to fetch t, or to send the tables, would be to wait for the GPU at every step.
        if device not in self.on_gpu:
            self.on_gpu[device] = (self.a.to(device), self.s.to(device))
        return self.on_gpu[device]

    def add_noise(self, x0, eps, t):
        """xt of eq. 2, (M, c, h, w). Its sqrt(alpha_bar) is a, see `cosine`.

        x0    (M, c, h, w), clean latents: noise comes before patchification
        eps   (M, c, h, w), normal noise
        t     (M,) int64, how much of it"""
        # TRAP: each picture has its own t, and the network must be told the very same one.
        a, s = self.at(t, x0)
        return a * x0 + s * eps

    def target(self, x0, eps, t):
        """What the network must say, (M, c, h, w): eps, or for flow the velocity eps - x0.
        The arguments are those of `add_noise`: some targets depend on how much noise there is."""
        a, s = self.at(t, x0)
        return self.target_of(x0, eps, a, s)

    def prediction(self, xt, out, t):
        """What the network predicts of the target, (M, c, h, w): its output, or with `noise_skip`
        output beside the noise that the picture shows by itself.

        xt    (M, c, h, w), what the network saw
        out   (M, c, h, w), its output
        t     (M,) int64, or one int for all"""
        if not self.noise_skip:
            return out                                  # Paper: eq. 3. For DDPM it is eps.
        # Our choice: the noisy picture passes beside the network, which only adds the rest, v.
        # That is exact: eps = s xt + a v, with v = a eps - s x0, the v of Salimans & Ho 2022. The
        # loss stays eq. 3, of eps. In terms of v it is a^2 (v - out)^2: little weight near t = T.
        # Why: near t = T, x0 = (xt - s eps) / a, and a is almost 0. So eps must be right to the
        # last digit, and a network has to copy xt through its RMSNorm to say it. With v,
        # x0 = a xt - s v: nothing is divided. Colours as asked went from 4% to 62%
        # (docs/RESULTS.md "The paper's own objective").
        a, s = self.at(t, xt)
        return s * xt + a * out

    def x0_and_eps(self, xt, out, t, x0_max=None):
        """The network's output, read as an estimate of (x0, eps), each (M, c, h, w).

        xt       (M, c, h, w), what the network saw
        out      (M, c, h, w), what it said
        t        (M,) int64, or one int for all
        x0_max   clip x0 to [-x0_max, x0_max]; None: do not"""
        a, s = self.at(t, xt)
        # 1. The x0 of which the network speaks.
        predicted = self.prediction(xt, out, t)
        x0 = self.x0_from(xt, predicted, a, s)
        # 2. Clip it.
        # Our choice: to the range that latents have. Near t = T, a is almost 0, and dividing by it
        # multiplies the network's error by thousands.
        if x0_max is not None:
            x0 = x0.clamp(-x0_max, x0_max)
        # 3. Solve eq. 2 for eps.
        # TRAP: with the *clipped* x0. Otherwise the two no longer mix to xt, and DDIM drifts.
        eps = (xt - a * x0) / s
        return x0, eps


def loss(target, out):
    """eq. 3, one number per picture: (M,) float32, the mean of (target - out)^2 over its elements.

    target   (M, c, h, w), what `Diffusion.target` says: eps, for the paper's DDPM
    out      (M, c, h, w), what the network says, in any precision"""
    # In float32: bfloat16 keeps 8 binary digits, too few to sum thousands of squares.
    error = target - out.float()                        # (M, c, h, w)
    # Our choice: the norm of eq. 3 is a mean, not a sum. A sum would grow with the size of the
    # picture, and lambda = 5 would mean something else for each.
    # Paper: §3, "diffusion loss is computed per image". So the mean ends at the picture.
    return error.square().flatten(1).mean(1)            # (M,)


# ---------------------------------------------------------------------- noise out: one reverse step
def guide(conditional, unconditional, w):
    """Classifier-free guidance, (M, c, h, w): w = 0 ignores the caption, w = 1 is the plain model,
    more exaggerates the caption. Ho & Salimans 2022; Transfusion §2.2."""
    # Paper: App. B.1. w = 5 in the controlled comparison, 3 in the ablations.
    return unconditional + w * (conditional - unconditional)


def respace(T, steps):
    """`steps` + 1 ints T = t_0 > t_1 > ... > 0, evenly spread.
    Raises ValueError unless 1 <= steps <= T."""
    # Paper: App. B.1. 250 steps of the 1,000 that the model is trained on.
    if not 1 <= steps <= T:
        raise ValueError(f"the number of sampling steps must be between 1 and {T}, got {steps}")
    times = torch.linspace(T, 0, steps + 1)
    return times.round().long().tolist()


def ancestral_step(diffusion, xt, x0, t, u, noise):
    """x_u of x_t: a draw from q(x_u | x_t, x0), (M, c, h, w). DDPM (Ho et al. 2020) eq. 6 and 7.

    xt      (M, c, h, w)
    x0      (M, c, h, w), the estimate
    t, u    int, u < t: from where to where
    noise   (M, c, h, w), normal noise; what it says does not matter at u = 0"""
    a_t, s_t = diffusion.at(t, xt)
    a_u, s_u = diffusion.at(u, xt)
    # Seen as one step of the chain, the jump from u to t multiplies by `keep` and adds noise of
    # variance `beta`. In DDPM, from u = t - 1, keep^2 is 1 - beta_t, and the rest is its eq. 7.
    # TRAP: the betas of the 1,000-step chain are wrong in a 250-step one.
    noise_t = s_t ** 2                                  # DDPM: 1 - alpha_bar_t
    noise_u = s_u ** 2
    keep = a_t / a_u                                    # DDPM: sqrt(alpha_bar_t / alpha_bar_u)
    beta = noise_t - keep ** 2 * noise_u
    # Bayes: the mean lies between what x_t says and what x0 says.
    from_xt = keep * noise_u / noise_t * xt
    from_x0 = a_u * beta / noise_t * x0
    # Our choice: this variance, DDPM's eq. 7. Their other one, beta itself, is larger.
    # TRAP: no noise on the last step. At u = 0, s_u = 0. (Rounding may leave a bit less than 0.)
    variance = (beta * noise_u / noise_t).clamp(min=0)
    return from_xt + from_x0 + variance.sqrt() * noise


def ddim_step(diffusion, x0, eps, u):
    """x_u by mixing the two estimates again, (M, c, h, w). DDIM (Song et al. 2021) eq. 12, with
    sigma = 0. For flow it is Euler's step. x0, eps: (M, c, h, w), the estimates; u: int."""
    a_u, s_u = diffusion.at(u, x0)
    return a_u * x0 + s_u * eps


def dpm_step(diffusion, xt, x0, x0_before, t, u, t_before):
    """x_u by DPM-Solver++(2M), (M, c, h, w). Lu et al. 2022, algorithm 2.

    xt          (M, c, h, w)
    x0          (M, c, h, w), the estimate at t
    x0_before   the estimate of the step before, at t_before; both None on the first step
    t, u        int, u < t: from where to where"""
    a_t, s_t = diffusion.at(t, xt)
    a_u, s_u = diffusion.at(u, xt)
    # Like DDIM, but x0 is drawn on along a straight line through the last two estimates. The line
    # is straight in ln(a/s), their lambda. The first and the last step are DDIM's.
    if x0_before is not None and u > 0:
        def log_ratio(k):
            return torch.log(diffusion.a[k] / diffusion.s[k])

        last_step = log_ratio(t) - log_ratio(t_before)
        this_step = log_ratio(u) - log_ratio(t)
        # Where a[T] = 0, on flow, ln(a/s) is -inf at T: the correction becomes 0.
        ratio = last_step / this_step
        change = x0 - x0_before
        x0 = x0 + change / (2 * ratio).to(x0)
    shrink = s_u / s_t
    return shrink * xt + (a_u - shrink * a_t) * x0


# ------------------------------------------------------------------------- noise out: all the steps
@torch.no_grad()
def sample(network, xT, diffusion, steps=250, sampler="ddpm", generator=None, x0_max=None):
    """Yields (t, x_t, x0 estimate), from the noisiest to t = 0. The last x is the picture.
    Transfusion §3 "Inference".     Usage: *trajectory, (_, x, _) = sample(...)

    network     function (x_t (M, c, h, w), t int) -> out (M, c, h, w), guidance included
    xT          (M, c, h, w) ~ N(0, 1)
    diffusion   what the network was trained with
    steps       how many of the T steps are taken
    sampler     "ddpm" (the paper), "ddim" or "dpm++" (fewer steps, no noise)
    generator   torch.Generator on the CPU, or a list with one per picture; only "ddpm" adds noise
    x0_max      see `Diffusion.x0_and_eps`
    Raises ValueError for an unknown sampler, or for steps outside 1 .. T."""
    if sampler not in SAMPLERS:
        names = ", ".join(SAMPLERS)
        raise ValueError(f"unknown sampler {sampler!r}: choose from {names}")
    times = respace(diffusion.T, steps)
    x = xT
    x0_before = None
    t_before = None

    for t, u in itertools.pairwise(times):              # from t to u < t
        # 1. Ask the network.
        # TRAP: it is told the t of what it sees, not the u of what comes next.
        out = network(x, t)
        x0, eps = diffusion.x0_and_eps(x, out, t, x0_max)
        yield t, x, x0

        # 2. Take a part of the predicted noise away.
        if sampler == "ddpm":
            noise = torch.zeros_like(x)
            if u > 0:                                   # the last step needs none
                noise = fresh_noise(x, generator)
            x = ancestral_step(diffusion, x, x0, t, u, noise)
        elif sampler == "ddim":
            x = ddim_step(diffusion, x0, eps, u)
        else:
            x = dpm_step(diffusion, x, x0, x0_before, t, u, t_before)
        x0_before = x0
        t_before = t
    yield 0, x, x


def fresh_noise(x, generator):
    """Normal noise of the shape of x, on its device. generator: as in `sample`."""
    # Drawn on the CPU, so that a seed draws the same picture on every machine. With a generator per
    # picture, its noise does not depend on the rest of its batch.
    if isinstance(generator, list):
        noises = []
        for own in generator:
            noises.append(torch.randn(x.shape[1:], generator=own))
        return torch.stack(noises).to(x)
    return torch.randn(x.shape, generator=generator).to(x)


if __name__ == "__main__":
    print("eq. 2: xt = a x0 + s eps")
    for kind in KINDS:
        d = Diffusion(kind)
        print(f"{kind}, t:     a      s")
        for t in range(0, 1001, 250):
            print(f"   {t:6d} {d.a[t]:6.3f} {d.s[t]:6.3f}")

    # A world where the best network is known: x0 ~ N(2, 0.5^2). There E[x0 | xt] is a formula, and
    # sampling must give back the mean 2 and the deviation 0.5.
    print("\nthe best network for x0 ~ N(2, 0.5^2), sampled: process, sampler, steps")
    mean = 2.0
    variance = 0.5 ** 2

    def best_network(x, t):
        """What no network can beat in this world, for the process d."""
        a, s = d.at(t, x)
        trust = a * variance / (a ** 2 * variance + s ** 2)
        x0 = mean + trust * (x - a * mean)
        eps = (x - a * x0) / s
        return d.target(x0, eps, t)

    for kind in KINDS:
        d = Diffusion(kind)
        for sampler, steps in (("ddpm", 250), ("ddim", 250), ("dpm++", 25)):
            g = torch.Generator().manual_seed(0)
            xT = torch.randn(20000, 1, 1, 1, generator=g)
            *_, last = sample(best_network, xT, d, steps, sampler, g)
            x = last[1]
            print(f"{kind} {sampler:5s} {steps:3d} steps: "
                  f"mean {x.mean():.3f} (2), deviation {x.std():.3f} (0.5)")
