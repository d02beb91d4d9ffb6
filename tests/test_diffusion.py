"""
test_diffusion.py: noise in, noise out                (diffusion.py; Transfusion §2.2, eq. 2, eq. 3)

THE IDEA    A wrong schedule or a wrong sampler still trains, and still draws something. So the
            tests compare with what is known by other means.
COMPARED    the schedule           with the chain of 1,000 small steps that it stands for
            eq. 3                  with plain loops, number by number
            one reverse step       with what it must leave as it was: the distribution of xt
            each sampler           with a Gaussian world, where the perfect network is a formula
            all of these           with `diffusers`, the second opinion at the end
            What is tried with every row of KINDS is tried with a new row at once: a fork that adds
            a schedule or a target needs no new test.
RUN IT      pytest -n 0 tests/test_diffusion.py
            Each docstring names the bug that the test catches. "PAPER §4.6": docs/PAPER.md.
"""
import itertools
import math

import pytest
import torch

import diffusion
from diffusion import (
    KINDS,
    SAMPLERS,
    SCHEDULES,
    TARGETS,
    Diffusion,
    ancestral_step,
    cosine_alpha_bar,
    ddim_step,
    guide,
    loss,
    respace,
    sample,
)
from sources.feed import same_noise

OURS = ("ddpm", "flow")                                 # the rows of KINDS that we check by hand

# The Gaussian world of the sampler tests: each element of x0 is drawn from N(MEAN, DEV^2).
MEAN = 2.0
DEV = 0.5


def pictures(how_many=3):
    """Random latents and noise of the same shape, each (M, 4, 2, 2). M: how_many."""
    x0 = torch.randn(how_many, 4, 2, 2)
    eps = torch.randn(how_many, 4, 2, 2)
    return x0, eps


def best_network(d):
    """The perfect network of the Gaussian world. There E[x0 | xt] is a formula, and with it the
    target. d: Diffusion."""
    def network(x, t):
        a = d.a[t].item()
        s = d.s[t].item()
        trust = a * DEV ** 2 / (a ** 2 * DEV ** 2 + s ** 2)
        x0 = MEAN + trust * (x - a * MEAN)
        eps = (x - a * x0) / s
        return d.target(x0, eps, t)
    return network


def last_picture(*arguments):
    """What sampling ends with, (M, c, h, w). arguments: those of `sample`."""
    trajectory = list(sample(*arguments))
    _, x, _ = trajectory[-1]
    return x


# ------------------------------------------------------------------------------------- the schedule
def total(d):
    """What must be 1 at every t, whatever the shift, (T + 1,): a + s of a straight line, otherwise
    a^2 + s^2."""
    straight = torch.allclose(d.a + d.s, torch.ones_like(d.a))
    if straight:
        return d.a + d.s
    return d.a ** 2 + d.s ** 2


def test_closed_form_is_the_iterated_chain():
    """Catches a schedule that is one step off, or that clips the betas without the product that
    follows from them (PAPER §4.6)."""
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    d = Diffusion("ddpm")
    assert d.a[0] == 1
    assert d.s[0] == 0

    # One step of the chain at a time: x_t = sqrt(1 - beta) x_(t-1) + sqrt(beta) noise.
    signal = 1.0                                        # what is left of x0
    variance = 0.0                                      # of the noise
    for t in range(1, 1001):
        beta = min(1 - f(t) / f(t - 1), 0.999)
        signal = signal * math.sqrt(1 - beta)
        variance = (1 - beta) * variance + beta
        assert d.a[t].item() == pytest.approx(signal, rel=1e-6), t
        assert d.s[t].item() == pytest.approx(math.sqrt(variance), rel=1e-6), t


@pytest.mark.parametrize("kind", KINDS)
def test_schedule_runs_from_picture_to_noise(kind):
    """Catches t counted from 1 in one place and from 0 in another: t = 0 must be the clean picture,
    and t = T the noise (PAPER §4.6)."""
    d = Diffusion(kind)
    assert len(d.a) == 1001
    assert len(d.s) == 1001

    # The picture at one end, noise at the other.
    assert d.a[0] == 1
    assert d.s[0] == 0
    assert d.s[1000] > 0.999
    # Schedules of a fork may end with a trace of the picture, as linear betas do.
    trace = 1e-3 if kind in OURS else 1e-2
    assert d.a[1000] < trace

    # In between, less and less picture, and more and more noise.
    assert (d.a.diff() < 0).all()
    assert (d.s.diff() >= 0).all()
    assert torch.allclose(total(d), torch.ones_like(d.a))


def test_the_two_schedules_of_ours():
    """Catches the paper's schedule with a + s = 1, or rectified flow with a^2 + s^2 = 1: `total`
    would take either for the other."""
    ddpm = Diffusion("ddpm", shift=2.0)
    flow = Diffusion("flow", shift=2.0)
    assert torch.allclose(ddpm.a ** 2 + ddpm.s ** 2, torch.ones_like(ddpm.a))
    assert torch.allclose(flow.a + flow.s, torch.ones_like(flow.a))


def test_every_row_of_the_tables_is_used():
    """Catches a schedule or a target that no kind takes: nothing here would have tried it."""
    schedules = {schedule for schedule, _ in KINDS.values()}
    targets = {target for _, target in KINDS.values()}
    assert schedules == set(SCHEDULES)
    assert targets == set(TARGETS)


@pytest.mark.parametrize("kind", KINDS)
def test_shift_multiplies_noise_to_signal(kind):
    """Catches a shift that lowers the noise, moves t = 0, or leaves a and s on another curve."""
    plain = Diffusion(kind)
    more = Diffusion(kind, shift=3.0)
    assert torch.equal(Diffusion(kind, shift=1.0).s, plain.s)
    assert torch.allclose(more.s / more.a, 3 * plain.s / plain.a)

    # More noise everywhere, but for the two ends.
    assert (more.s >= plain.s).all()
    assert (more.a <= plain.a).all()
    assert (more.s[1:-1] > plain.s[1:-1]).any()

    # Still a schedule: it begins at the picture, and preserves what it preserved.
    assert more.a[0] == 1
    assert more.s[0] == 0
    assert torch.allclose(total(more), torch.ones_like(more.a))


def test_unknown_kind_raises():
    """Catches a spelling mistake that trains something else."""
    with pytest.raises(ValueError, match="choose from ddpm, flow"):
        Diffusion("edm")


@pytest.mark.parametrize("T", [1000, 200])
@pytest.mark.parametrize("kind, shift", [
    ("ddpm", 1.0),
    ("ddpm", 3.0),
    ("flow", 1.0),
    ("flow", 2.0),
])
def test_same_noise_is_the_papers_noise(kind, shift, T):
    """Catches the noise limit t <= 500 (App. B.2) taken by number on another schedule, where it is
    more noise than the paper allows; a limit that is one step too low; and a comparison with a
    schedule of another length."""
    d = Diffusion(kind, T=T, shift=shift)
    paper = Diffusion("ddpm", T=T)
    for t in (1, T // 10, T // 2, 9 * T // 10):
        k = same_noise(d, t)
        # k is the last step that has no more noise than the paper's schedule at t.
        limit = paper.s[t] / paper.a[t]
        assert d.s[k] / d.a[k] <= limit
        assert limit < d.s[k + 1] / d.a[k + 1]
        if (kind, shift) == ("ddpm", 1.0):              # the paper's own schedule
            assert k == t


# ------------------------------------------------------------- eq. 2, and what the network must say
@pytest.mark.parametrize("kind", KINDS)
def test_each_picture_has_its_own_t(kind):
    """Catches one t for the whole batch (PAPER §4.3)."""
    d = Diffusion(kind)
    x0, eps = pictures()
    t = torch.tensor([1, 500, 1000])
    together = d.add_noise(x0, eps, t)
    for k in range(3):
        a = d.a[t[k]].item()
        s = d.s[t[k]].item()
        alone = a * x0[k] + s * eps[k]                  # eq. 2
        assert torch.allclose(together[k], alone, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_network_output_is_read_as_it_is_trained(kind):
    """Catches a network that is trained on one target, and sampled as if it said another. What it
    says when it is right must give back exactly x0 and eps."""
    d = Diffusion(kind)
    x0, eps = pictures()
    t = torch.tensor([10, 500, 900])
    xt = d.add_noise(x0, eps, t)

    right = d.target(x0, eps, t)
    found_x0, found_eps = d.x0_and_eps(xt, right, t)

    assert torch.allclose(found_x0, x0, atol=1e-4)
    assert torch.allclose(found_eps, eps, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_x0_can_be_read_from_pure_noise(kind):
    """Catches a schedule that ends at a[T] = 0 with a target from which x0 is divided by a: drawing
    would begin at infinity. (A fork's did.)"""
    d = Diffusion(kind)
    xt = torch.ones(1, 4, 2, 2)
    out = torch.zeros_like(xt)
    x0, eps = d.x0_and_eps(xt, out, d.T)
    assert x0.isfinite().all()
    assert eps.isfinite().all()


def test_noise_skip_reads_the_output_as_v():
    """Catches a path beside the network that changes what eq. 3 asks. With out = v = a eps - s x0
    it must predict eps exactly.

    It must give back x0, too, even near t = T, where another a or s, or another sign, is multiplied
    by thousands. Without the path, the output is eps."""
    d = Diffusion(noise_skip=True)
    plain = Diffusion()
    x0, eps = pictures()
    t = torch.tensor([1, 500, 1000])
    xt = d.add_noise(x0, eps, t)
    a, s = d.at(t, x0)
    v = a * eps - s * x0

    # 1. The loss stays the paper's: its target is eps, with the path and without.
    assert torch.equal(d.target(x0, eps, t), eps)
    assert torch.allclose(d.prediction(xt, v, t), eps, atol=1e-5)
    assert torch.equal(plain.prediction(xt, v, t), v)

    # 2. x0 is found.
    found_x0, _ = d.x0_and_eps(xt, v, t)
    assert torch.allclose(found_x0, x0, atol=1e-2)

    # 3. An error of 1% in the output at t = 1000: with the path x0 is off by 1%, without it x0 is
    #    lost. Only the last of the three pictures has t = 1000.
    error = 0.01 * torch.ones_like(x0[2:])
    with_path, _ = d.x0_and_eps(xt[2:], v[2:] + error, 1000)
    without, _ = plain.x0_and_eps(xt[2:], eps[2:] + error, 1000)
    assert (with_path - x0[2:]).abs().max() < 0.02
    assert (without - x0[2:]).abs().min() > 100

    # 4. Flow's network does not say eps.
    with pytest.raises(ValueError, match="'flow'"):
        Diffusion("flow", noise_skip=True)


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_keeps_the_estimates_consistent(kind):
    """Catches x0 clipped but eps left as it was: the two no longer mix to xt, and DDIM drifts away
    from the chain. Catches a range whose two ends are one, too."""
    d = Diffusion(kind)
    t = torch.tensor([200, 600, 1000])
    xt, out = pictures()
    wild = 5 * out                                      # so that there is much to clip

    x0, eps = d.x0_and_eps(xt, wild, t, x0_max=1.5)

    assert x0.abs().max() <= 1.5
    assert torch.allclose(d.add_noise(x0, eps, t), xt, atol=1e-4)

    # What lies inside the range is left alone.
    unclipped, _ = d.x0_and_eps(xt, wild, t)
    inside = unclipped.abs() < 1.5
    assert inside.any()
    assert torch.equal(x0[inside], unclipped[inside])


# -------------------------------------------------------------------------------------------- eq. 3
@pytest.mark.parametrize("kind", OURS)
def test_loss_by_hand(kind):
    """Catches eq. 3 as a sum (lambda = 5 would mean something else for each size of picture), as a
    root, over the whole batch, or without its square. By plain loops, number by number."""
    d = Diffusion(kind)
    x0, eps = pictures(3)
    out = torch.randn(3, 4, 2, 2)
    t = torch.tensor([10, 500, 900])

    losses = loss(d.target(x0, eps, t), out)

    assert losses.shape == (3,)
    for m in range(3):
        clean_numbers = x0[m].flatten().tolist()
        noise_numbers = eps[m].flatten().tolist()
        out_numbers = out[m].flatten().tolist()
        squares = []
        for x, e, o in zip(clean_numbers, noise_numbers, out_numbers, strict=True):
            target = e if kind == "ddpm" else e - x
            squares.append((target - o) ** 2)
        mean = sum(squares) / len(squares)
        assert losses[m].item() == pytest.approx(mean, rel=1e-5)


def test_loss_is_each_pictures_own():
    """Catches a mean over the batch: every picture would have the same number, and the log of
    losses by t would say nothing."""
    eps, out = pictures(4)
    before = loss(eps, out)
    out[2] += 1
    after = loss(eps, out)
    assert (after != before).tolist() == [False, False, True, False]

    # A batch of text alone has no picture.
    assert loss(eps[:0], out[:0]).shape == (0,)

    # The size of a picture does not matter: here each is repeated 4 x 4 times.
    large = loss(eps.repeat(1, 1, 4, 4), out.repeat(1, 1, 4, 4))
    assert torch.allclose(large, after)


def test_loss_is_computed_in_float32():
    """Catches squares summed in bfloat16, as the network computes: its 8 bits lose what is left to
    learn."""
    eps = torch.randn(2, 1, 64, 64)
    out = torch.randn(2, 1, 64, 64).bfloat16()
    losses = loss(eps, out)
    assert losses.dtype == torch.float32

    exact = (eps.double() - out.double()).square().flatten(1).mean(1)
    assert torch.allclose(losses.double(), exact, rtol=1e-5)


# --------------------------------------------------------------------------------- one reverse step
def test_respaced_steps_are_a_subset():
    """Catches 250 steps of 1,000 that begin below T, end above 0, or repeat one (PAPER §4.6)."""
    assert respace(1000, 250) == list(range(1000, -1, -4))
    # To the nearest: these are 666.7 and 333.3; then 7.5 and 2.5, each halfway between two.
    assert respace(1000, 3) == [1000, 667, 333, 0]
    assert respace(10, 4) == [10, 8, 5, 2, 0]

    for steps in (1, 2, 3, 7, 25, 333, 667, 999, 1000):
        times = respace(1000, steps)
        assert len(times) == steps + 1
        assert times[0] == 1000
        assert times[-1] == 0
        for t, u in itertools.pairwise(times):
            assert type(t) is int
            assert t > u


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t, u", [
    (1000, 996),
    (1000, 500),
    (500, 499),
    (500, 496),
    (500, 4),
    (4, 0),
])
def test_ancestral_step_keeps_the_marginals(kind, t, u):
    """Catches betas of the 1,000-step chain in a 250-step one (PAPER §4.6).

    If x_t is drawn from q(x_t | x0), then x_u must be a draw from q(x_u | x0): a[u] of x0, and
    noise of variance s[u]^2."""
    d = Diffusion(kind)
    one = torch.ones(1, 1, 1, 1)
    none = torch.zeros(1, 1, 1, 1)

    def step(xt, x0, noise):
        return ancestral_step(d, xt, x0, t, u, noise).item()

    # The step is linear in xt, x0 and noise, so its parts can be asked for one by one:
    # what becomes of x0, which is in xt, too; of the noise in xt; and of the fresh noise.
    a = d.a[t].float()
    s = d.s[t].float()
    signal = step(a * one, one, none)
    old_noise = step(s * one, none, none)
    fresh_noise = step(none, none, one)

    variance = old_noise ** 2 + fresh_noise ** 2
    assert signal == pytest.approx(d.a[u].item(), abs=1e-5)
    assert variance == pytest.approx(d.s[u].item() ** 2, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_last_step_adds_no_noise(kind):
    """Catches noise on the last step: every picture would come out grainy (PAPER §4.6)."""
    d = Diffusion(kind)
    xt, x0 = pictures()

    # The step to u = 0 ignores the noise that it is given, however much that is.
    much_noise = torch.full_like(xt, 1e4)
    x = ancestral_step(d, xt, x0, 4, 0, much_noise)
    assert torch.allclose(x, x0, atol=1e-5)

    # So every sampler ends with its last estimate of x0.
    for sampler in SAMPLERS:
        trajectory = list(sample(best_network(d), xt, d, 5, sampler))
        _, _, last_estimate = trajectory[-2]
        t, x, _ = trajectory[-1]
        assert t == 0
        assert torch.allclose(x, last_estimate, atol=1e-5), sampler


def test_every_other_step_adds_noise(monkeypatch):
    """Catches noise left out of a step that is not the last, such as the one from t = 2 to t = 1.
    In T = 6 steps it must be drawn five times."""
    calls = []
    real_noise = diffusion.fresh_noise

    def counted_noise(x, generator):
        calls.append(x)
        return real_noise(x, generator)

    def network(x, t):
        return torch.zeros_like(x)

    monkeypatch.setattr(diffusion, "fresh_noise", counted_noise)
    d = Diffusion(T=6)
    xT = torch.randn(1, 1, 2, 2)
    trajectory = list(sample(network, xT, d, 6))
    t, _, _ = trajectory[-1]
    assert t == 0
    assert len(calls) == 5


def test_ddim_on_flow_is_eulers_method():
    """Catches flow sampled backwards, or at the wrong pace: the step is dx = velocity * dt."""
    d = Diffusion("flow")
    xt, velocity = pictures()
    x0, eps = d.x0_and_eps(xt, velocity, 600)
    x = ddim_step(d, x0, eps, 550)
    # From t = 600 to 550 of 1,000, dt is -0.05.
    assert torch.allclose(x, xt - 0.05 * velocity, atol=1e-5)


def test_guidance_ends():
    """Catches guidance with its branches swapped, or its scale off by one: 1 is the plain model,
    and 0 ignores the caption (PAPER §4.8)."""
    conditional, unconditional = pictures()
    at_0 = guide(conditional, unconditional, 0.0)
    at_1 = guide(conditional, unconditional, 1.0)
    at_3 = guide(conditional, unconditional, 3.0)
    assert torch.equal(at_0, unconditional)
    assert torch.allclose(at_1, conditional, atol=1e-6)
    assert torch.allclose(at_3, 3 * conditional - 2 * unconditional, atol=1e-5)


# ------------------------------------------------------------------------------ samplers, all steps
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler, steps", [
    ("ddpm", 250),
    ("ddim", 250),
    ("dpm++", 25),
    ("dpm++", 250),
])
def test_sampler_draws_the_gaussian_it_was_told_of(kind, sampler, steps):
    """Catches any wrong coefficient in a sampler: with the perfect network, it must give back the
    mean and the deviation of the Gaussian world."""
    d = Diffusion(kind)
    g = torch.Generator().manual_seed(0)
    xT = torch.randn(20000, 1, 1, 1, generator=g)
    x = last_picture(best_network(d), xT, d, steps, sampler, g)
    # 4 standard errors of 20,000 draws, and a little more.
    assert x.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x.std().item() == pytest.approx(DEV, abs=0.012)


def test_second_order_beats_first_order():
    """Catches DPM-Solver++(2M) with its correction lost or turned round: it would still converge,
    but no better than DDIM."""
    d = Diffusion("ddpm")
    xT = torch.linspace(-2, 2, 64).view(-1, 1, 1, 1)
    exact = last_picture(best_network(d), xT, d, 1000, "ddim")
    errors = {}
    for sampler in ("ddim", "dpm++"):
        x = last_picture(best_network(d), xT, d, 25, sampler)
        errors[sampler] = (x - exact).abs().mean().item()
    assert errors["dpm++"] < 0.5 * errors["ddim"], errors


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_network_is_told_the_t_of_its_input(sampler):
    """Catches a network that is told u, or an index, instead of t (PAPER §4.3), or that is called
    twice a step."""
    d = Diffusion("ddpm")
    xT, _ = pictures()
    calls = []

    def network(x, t):
        calls.append((t, x))
        return best_network(d)(x, t)

    trajectory = list(sample(network, xT, d, 8, sampler))

    times = [1000, 875, 750, 625, 500, 375, 250, 125]
    assert [t for t, _ in calls] == times
    assert [t for t, _, _ in trajectory] == [*times, 0]
    for (_, x_told), (_, x_shown, _) in zip(calls, trajectory[:-1], strict=True):
        assert x_told is x_shown


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_seed_same_picture_and_input_left_alone(sampler):
    """Catches noise from the global generator, so that no seed repeats a picture; and an xT that is
    overwritten while sampling."""
    d = Diffusion("ddpm")
    xT, _ = pictures()
    before = xT.clone()

    def draw():
        g = torch.Generator().manual_seed(5)
        return last_picture(best_network(d), xT, d, 6, sampler, g)

    first = draw()
    torch.randn(7)                                      # someone else draws in between
    second = draw()
    assert torch.equal(first, second)
    assert torch.equal(xT, before)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_steps_raise(steps):
    """Catches a sampler that takes no step at all, and returns the noise as if it were a
    picture."""
    d = Diffusion("ddpm")
    xT, _ = pictures()
    with pytest.raises(ValueError, match=f"between 1 and 1000, got {steps}"):
        list(sample(best_network(d), xT, d, steps))


def test_unknown_sampler_raises():
    """Catches a spelling mistake that falls through to another sampler."""
    d = Diffusion("ddpm")
    xT, _ = pictures()
    with pytest.raises(ValueError, match="choose from ddpm, ddim, dpm"):
        list(sample(best_network(d), xT, d, 5, "euler"))


# -------------------------------------------------- a second opinion: the schedulers of `diffusers`
def diffusers_scheduler(name, **options):
    """A scheduler of theirs on the paper's schedule. Their timestep index + 1 is our t."""
    why = "the second opinion on schedule and samplers needs `diffusers`"
    diffusers = pytest.importorskip("diffusers", reason=why)
    scheduler = getattr(diffusers, name)
    return scheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",                    # it starts at T, as we do
        **options,
    )


def test_schedule_equals_diffusers():
    """Catches a schedule that is one step off, in their eyes (PAPER §4.6)."""
    theirs = diffusers_scheduler("DDPMScheduler").alphas_cumprod
    ours = cosine_alpha_bar()[1:].float()               # without t = 0, which they leave out
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-7)


def test_add_noise_equals_diffusers():
    """Catches eq. 2 with a and s swapped or squared."""
    x0, eps = pictures(5)
    t = torch.tensor([1, 2, 500, 999, 1000])
    ours = Diffusion("ddpm").add_noise(x0, eps, t)
    theirs = diffusers_scheduler("DDPMScheduler").add_noise(x0, eps, t - 1)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("steps", [250, 1000])
def test_ddpm_step_equals_diffusers(steps):
    """Catches a wrong mean or deviation of the posterior, on the full chain and on the respaced one
    (PAPER §4.6)."""
    d = Diffusion("ddpm")
    scheduler = diffusers_scheduler("DDPMScheduler", clip_sample=False)
    scheduler.set_timesteps(steps)
    times = respace(1000, steps)
    assert times[:-1] == [int(t) + 1 for t in scheduler.timesteps]

    for k in (steps // 4, steps // 2, steps - 2, steps - 1):
        t = times[k]
        u = times[k + 1]
        xt, eps = pictures()

        # Both draw the same noise: k is the seed.
        g = torch.Generator().manual_seed(k)
        theirs = scheduler.step(eps, t - 1, xt, generator=g).prev_sample
        g = torch.Generator().manual_seed(k)
        noise = torch.randn(xt.shape, generator=g)
        x0, _ = d.x0_and_eps(xt, eps, t)
        ours = ancestral_step(d, xt, x0, t, u, noise)

        assert torch.allclose(ours, theirs, atol=1e-4), (t, u)


@pytest.mark.parametrize("steps", [50, 1000])
def test_ddim_step_equals_diffusers(steps):
    """Catches DDIM that mixes its estimates again at the wrong t."""
    d = Diffusion("ddpm")
    scheduler = diffusers_scheduler("DDIMScheduler", clip_sample=False)
    scheduler.set_timesteps(steps)
    times = respace(1000, steps)

    for k in (steps // 4, steps // 2, steps - 1):
        t = times[k]
        u = times[k + 1]
        xt, out = pictures()
        theirs = scheduler.step(out, t - 1, xt).prev_sample
        x0, eps = d.x0_and_eps(xt, out, t)
        ours = ddim_step(d, x0, eps, u)
        assert torch.allclose(ours, theirs, atol=1e-4), (t, u)


@pytest.mark.filterwarnings("ignore:__array__")         # theirs, about numpy 2
def test_dpm_steps_equal_diffusers():
    """Catches DPM-Solver++(2M) with the ratio of its two step lengths upside down, or with its
    correction missing or halved. One step builds on the last, so the whole way is compared."""
    d = Diffusion("ddpm")
    scheduler = diffusers_scheduler(
        "DPMSolverMultistepScheduler",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(25)
    assert [int(t) + 1 for t in scheduler.timesteps] == respace(1000, 25)[:-1]
    network = best_network(d)
    xT, _ = pictures()

    ours = [x for _, x, _ in sample(network, xT, d, 25, "dpm++")]
    theirs = [xT]
    for t in scheduler.timesteps:
        x = theirs[-1]
        out = network(x, int(t) + 1)
        theirs.append(scheduler.step(out, t, x).prev_sample)

    for k, (our_x, their_x) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.allclose(our_x, their_x, atol=2e-3), k


@pytest.mark.parametrize("t", [-1, 101, torch.tensor([5, -1]), torch.tensor([101, 5])])
def test_a_t_that_no_table_has(t):
    """Catches t = -1, which Python takes for the last entry: pure noise in place of an error."""
    d = Diffusion(T=100)
    x = torch.zeros(2, 1, 1, 1)
    with pytest.raises(ValueError, match="t must be between 0 and 100"):
        d.at(t, x)
    for edge in (0, 100, torch.tensor([0, 100])):
        d.at(edge, x)
