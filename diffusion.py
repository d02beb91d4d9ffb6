"""
diffusion.py: noise in, noise out                                        (Transfusion §2.2 "Diffusion", eq. 2 and 3)

THE IDEA    Mix a picture with noise, by an amount that grows with t. Train a network to say which noise was mixed in.
            Then start from noise alone, ask again and again, and each time take a little of the predicted noise away.
A PICTURE   t = 0            t = 250           t = 500           t = 750           t = 1000
            picture    ->    grain       ->    ghost       ->    hint        ->    noise          q(xt | x0), exact
            picture    <-    x(t-1)      <-    ...         <-    xt          <-    noise          samplers, step by step
THE RULE    xt = a[t] x0 + s[t] eps,   eps ~ N(0, 1)                                              eq. 2
              DDPM, cosine schedule:  a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar)                §2.2
              rectified flow:         a = 1 - t/T,         s = t/T                                §3 names it as future work
            L_DDPM = mean over elements of (target - network(xt, t, context))^2                   eq. 3
              DDPM: target = eps          flow: target = eps - x0
SHAPES      x0, xt, eps, out (M, c, h, w) float32; t (M,) int64 in 0..T. t = 0 is the clean picture (a = 1, s = 0), T = 1000
            is noise. The tables a, s, alpha_bar have T + 1 entries. (diffusers counts its timesteps from 0: theirs + 1 = ours.)
PAPER/HERE  same: cosine schedule (offset 0.008, beta <= 0.999), T = 1000, eps loss, 250 steps, guidance.
            our choice: eq. 3's norm is a mean over elements; x0 estimates are clipped to the range that latents have.
            `shift` moves the schedule to more noise (1 = the paper's); README "What it took" says when it pays.
READ NEXT   patchify.py        TRY IT  python diffusion.py        NOTEBOOK notebooks/2_noise_in_noise_out.ipynb
TEST        tests/test_diffusion.py (each sampler draws an exact Gaussian; schedule and steps equal those of `diffusers`)
"""
import math

import torch

SAMPLERS = ("ddpm", "ddim", "dpm++")


def cosine_alpha_bar(T=1000, offset=0.008, beta_max=0.999):
    """(T + 1,) float64: alpha_bar[t] for t = 0..T, alpha_bar[0] = 1. Nichol & Dhariwal 2021, eq. 17; Transfusion §2.2.
    Built from the betas, because clipping the last ones changes the product that follows."""
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + offset) / (1 + offset) * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=beta_max)                    # beta[0] belongs to t = 1
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])


class Diffusion:
    """The forward process and the meaning of the network's output. kind: "ddpm" (the paper) or "flow".
    shift: multiplies the noise-to-signal ratio s/a at every t; 1 leaves the schedule alone."""

    def __init__(self, kind="ddpm", T=1000, shift=1.0):
        if kind == "ddpm":
            alpha_bar = cosine_alpha_bar(T)
            a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt() * shift
            scale = (a ** 2 + s ** 2).sqrt()                           # a^2 + s^2 = 1: the variance is preserved
        elif kind == "flow":
            s = torch.linspace(0, 1, T + 1, dtype=torch.float64)
            a, s = 1 - s, s * shift
            scale = a + s                                              # a + s = 1: a straight line from picture to noise
        else:
            raise ValueError(f"unknown diffusion {kind!r}: choose 'ddpm' (the paper) or 'flow'")
        self.kind, self.T, self.shift = kind, T, shift
        self.a, self.s = a / scale, s / scale

    def at(self, t, x):
        """(a, s) at t, shaped to multiply x. t: (M,) int64 or int; x: (M, c, h, w)."""
        t = torch.as_tensor(t, device="cpu").reshape(-1, *[1] * (x.ndim - 1))
        return self.a[t].to(x), self.s[t].to(x)

    def add_noise(self, x0, eps, t):
        """xt of eq. 2. TRAP: each picture has its own t, and the network must be told the same one."""
        a, s = self.at(t, x0)
        return a * x0 + s * eps

    def target(self, x0, eps):
        """What the network must say: eps, or for flow the velocity eps - x0."""
        return eps if self.kind == "ddpm" else eps - x0

    def x0_and_eps(self, xt, out, t, x0_max=None):
        """The network's output at xt, read as an estimate of (x0, eps). reach: clip x0 to [-reach, reach]; eps is then
        what is left. Near t = T, x0 = (xt - s eps) / a divides by almost nothing, and an error of the network would be
        multiplied by thousands."""
        a, s = self.at(t, xt)
        x0 = (xt - s * out) / a if self.kind == "ddpm" else xt - s * out
        if x0_max is not None:
            x0 = x0.clamp(-x0_max, x0_max)
        return x0, (xt - a * x0) / s


def loss(target, out):
    """eq. 3, one number per picture: (M,), the mean over its elements of (target - out)^2. target: what `Diffusion.target`
    says, eps for the paper's DDPM; out: what the network says; both (M, c, h, w)."""
    return (target - out.float()).square().flatten(1).mean(1)


def same_noise(diffusion, t):
    """The last step of a schedule that is no noisier (s/a) than the paper's schedule is at t: t itself for the paper's.
    Serves the noise limit of App. B.2: "t <= 500" means a certain noise, and a shifted schedule has it earlier."""
    paper = Diffusion(T=diffusion.T)
    return int((diffusion.s / diffusion.a <= paper.s[t] / paper.a[t]).sum()) - 1


def guide(conditional, unconditional, w):
    """Classifier-free guidance (Ho & Salimans 2022): w = 0 ignores the caption, 1 is the plain model, more exaggerates it.
    Transfusion §4.1: w = 5 in the controlled comparison, 3 in the ablations."""
    return unconditional + w * (conditional - unconditional)


def respace(T, steps):
    """`steps` + 1 diffusion steps T = t_0 > t_1 > ... > 0, evenly spread (the paper: 250 of 1000).
    Raises ValueError unless 1 <= steps <= T."""
    if not 1 <= steps <= T:
        raise ValueError(f"the number of sampling steps must be between 1 and {T}, got {steps}")
    return torch.linspace(T, 0, steps + 1).round().long().tolist()


def ancestral_step(diffusion, xt, x0, t, u, noise):
    """x_u of x_t for u < t: a draw from q(x_u | x_t, x0). DDPM eq. 6-7, with the betas of the respaced chain: everything
    is computed from a and s at t and u. TRAP: betas of the 1000-step chain are wrong in a 250-step one."""
    (at, st), (au, su) = diffusion.at(t, xt), diffusion.at(u, xt)
    beta = st ** 2 - (at / au) ** 2 * su ** 2                          # variance that the chain adds from u to t
    mean = (at / au) * su ** 2 / st ** 2 * xt + au * beta / st ** 2 * x0
    return mean + (beta * su ** 2 / st ** 2).clamp(min=0).sqrt() * noise         # at u = 0, su = 0: no noise on the last step


def ddim_step(diffusion, x0, eps, u):
    """x_u by re-mixing the two estimates. DDIM (Song et al. 2021) eq. 12 with sigma = 0. For flow it is Euler's step."""
    au, su = diffusion.at(u, x0)
    return au * x0 + su * eps


def dpm_step(diffusion, xt, x0, x0_before, t, u, t_before):
    """x_u by DPM-Solver++(2M), Lu et al. 2022, algorithm 2: like DDIM, but x0 is extrapolated along a straight line in
    lambda = ln(a/s) through this estimate and the one before. First and last step are DDIM's."""
    (at, st), (au, su) = diffusion.at(t, xt), diffusion.at(u, xt)
    if x0_before is not None and u > 0:
        lam = [torch.log(diffusion.a[k] / diffusion.s[k]) for k in (t_before, t, u)]
        r = (lam[1] - lam[0]) / (lam[2] - lam[1])                      # infinite where a[T] = 0: no correction then
        x0 = x0 + (x0 - x0_before) / (2 * r).to(x0)
    return su / st * xt + (au - su / st * at) * x0


def fresh_noise(x, generator):
    """Normal noise like x. With one generator per picture, a picture's noise does not depend on the rest of the batch."""
    if isinstance(generator, list):
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generator]).to(x)
    return torch.randn(x.shape, generator=generator).to(x)


@torch.no_grad()
def sample(network, xT, diffusion, steps=250, sampler="ddpm", generator=None, x0_max=None):
    """Generator of (t, x_t, x0 estimate), from the noisiest to t = 0; the last x is the picture. Transfusion §3 Inference.

    network: function (x_t (M, c, h, w), t int) -> out (M, c, h, w), guidance included.   xT: (M, c, h, w) ~ N(0, 1).
    steps: how many of the T steps are taken. sampler: "ddpm" (the paper), "ddim" or "dpm++" (fewer steps, no noise).
    generator: torch.Generator of the noise on the CPU, or a list with one per picture; only "ddpm" adds noise.
    reach: see `x0_and_eps`.
    Raises ValueError for an unknown sampler or steps outside 1..T.     Usage: *trajectory, (_, x, _) = sample(...)"""
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose from {', '.join(SAMPLERS)}")
    times, x, before, t_before = respace(diffusion.T, steps), xT, None, None
    for t, u in zip(times[:-1], times[1:]):
        x0, eps = diffusion.x0_and_eps(x, network(x, t), t, x0_max)
        yield t, x, x0
        if sampler == "ddpm":
            noise = fresh_noise(x, generator) if u > 0 else torch.zeros_like(x)
            x = ancestral_step(diffusion, x, x0, t, u, noise)
        elif sampler == "ddim":
            x = ddim_step(diffusion, x0, eps, u)
        else:
            x = dpm_step(diffusion, x, x0, before, t, u, t_before)
        before, t_before = x0, t
    yield 0, x, x


if __name__ == "__main__":
    for kind in ("ddpm", "flow"):
        d = Diffusion(kind)
        print(f"{kind}: a, s at t = " + ", ".join(f"{t}: {d.a[t]:.3f} {d.s[t]:.3f}" for t in (0, 250, 500, 750, 1000)))
    # A world where the best network is known: x0 ~ N(2, 0.5^2). Then E[eps | xt] is a formula, and sampling must give back
    # the mean 2 and the deviation 0.5.
    mean, dev = 2.0, 0.5
    for kind in ("ddpm", "flow"):
        d = Diffusion(kind)

        def best(x, t):
            a, s = d.at(t, x)
            x0 = mean + a * dev ** 2 / (a ** 2 * dev ** 2 + s ** 2) * (x - a * mean)
            return d.target(x0, (x - a * x0) / s)

        for sampler, steps in (("ddpm", 250), ("ddim", 250), ("dpm++", 25)):
            g = torch.Generator().manual_seed(0)
            *_, (_, x, _) = sample(best, torch.randn(20000, 1, 1, 1, generator=g), d, steps, sampler, g)
            print(f"{kind} {sampler:5s} {steps:3d} steps: mean {x.mean():.3f} (2), deviation {x.std():.3f} (0.5)")
