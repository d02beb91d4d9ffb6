"""test_diffusion.py: the schedule, the samplers, and `diffusers` as a second opinion. Bugs: docs/PAPER.md §4.3, §4.6, here "PAPER §4"."""
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

# What is tried with every row of KINDS is tried with a new one at once.
OURS = ("ddpm", "flow")                                 # by hand: what these two rows say
MEAN, DEV = 2.0, 0.5                                    # the Gaussian world of the sampler tests


def pictures(how_many=3):
    """Random latents (M, 4, 2, 2) and noise of the same shape."""
    return torch.randn(how_many, 4, 2, 2), torch.randn(how_many, 4, 2, 2)


def best_network(d):
    """The perfect network of a world where x0 ~ N(MEAN, DEV^2) in each element: E[target | xt] is a formula."""
    def network(x, t):
        a, s = d.a[t].item(), d.s[t].item()
        x0 = MEAN + a * DEV ** 2 / (a ** 2 * DEV ** 2 + s ** 2) * (x - a * MEAN)
        return d.target(x0, (x - a * x0) / s, t)
    return network


def total(d):
    """a + s of a straight line, otherwise a^2 + s^2: (T + 1,), which must be 1 whatever the shift."""
    straight = torch.allclose(d.a + d.s, torch.ones_like(d.a))
    return d.a + d.s if straight else d.a ** 2 + d.s ** 2


# --------------------------------------------------------------------------------------------------------------- schedule
def test_closed_form_is_the_iterated_chain():
    """A schedule one step off, or clipped betas without the product that follows from them (PAPER §4.6)."""
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    d, mean, variance = Diffusion("ddpm"), 1.0, 0.0
    assert d.a[0] == 1 and d.s[0] == 0
    for t in range(1, 1001):                            # x_t = sqrt(1 - beta) x_(t-1) + sqrt(beta) noise, one step at a time
        beta = min(1 - f(t) / f(t - 1), 0.999)
        mean, variance = mean * math.sqrt(1 - beta), (1 - beta) * variance + beta
        assert d.a[t].item() == pytest.approx(mean, rel=1e-6), t
        assert d.s[t].item() == pytest.approx(math.sqrt(variance), rel=1e-6), t


@pytest.mark.parametrize("kind", KINDS)
def test_schedule_runs_from_picture_to_noise(kind):
    """t counted from 1 in one place and from 0 in another: t = 0 must be the clean picture, T the noise (PAPER §4.6)."""
    d = Diffusion(kind)
    assert len(d.a) == len(d.s) == 1001
    assert d.a[0] == 1 and d.s[0] == 0 and d.s[1000] > 0.999
    assert d.a[1000] < (1e-3 if kind in OURS else 1e-2)                 # others end with a trace of the picture: linear betas
    assert (d.a.diff() < 0).all() and (d.s.diff() >= 0).all()
    assert torch.allclose(total(d), torch.ones_like(d.a))


def test_the_two_schedules_of_ours():
    """The paper's schedule with a + s = 1, or rectified flow with a^2 + s^2 = 1: both would pass for the other."""
    ddpm, flow = Diffusion("ddpm", shift=2.0), Diffusion("flow", shift=2.0)
    assert torch.allclose(ddpm.a ** 2 + ddpm.s ** 2, torch.ones_like(ddpm.a))
    assert torch.allclose(flow.a + flow.s, torch.ones_like(flow.a))


def test_every_row_of_the_tables_is_used():
    """A schedule or a target that no kind takes: nothing here would have tried it."""
    assert {schedule for schedule, _ in KINDS.values()} == set(SCHEDULES)
    assert {target for _, target in KINDS.values()} == set(TARGETS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_picture_has_its_own_t(kind):
    """One t for the whole batch (PAPER §4.3)."""
    d, (x0, eps), t = Diffusion(kind), pictures(), torch.tensor([1, 500, 1000])
    together = d.add_noise(x0, eps, t)
    for k in range(3):
        assert torch.allclose(together[k], d.a[t[k]].item() * x0[k] + d.s[t[k]].item() * eps[k], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_network_output_is_read_as_it_is_trained(kind):
    """Trained on one target, sampled as if it were another: the exact target must give back exactly x0 and eps."""
    d, (x0, eps), t = Diffusion(kind), pictures(), torch.tensor([10, 500, 900])
    xt = d.add_noise(x0, eps, t)
    found_x0, found_eps = d.x0_and_eps(xt, d.target(x0, eps, t), t)
    assert torch.allclose(found_x0, x0, atol=1e-4) and torch.allclose(found_eps, eps, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_x0_can_be_read_from_pure_noise(kind):
    """A schedule that ends at a[T] = 0, with a target from which x0 is divided by a: drawing would
    begin at infinity (a fork's did)."""
    d = Diffusion(kind)
    xt = torch.ones(1, 4, 2, 2)
    x0, eps = d.x0_and_eps(xt, torch.zeros_like(xt), d.T)
    assert x0.isfinite().all()
    assert eps.isfinite().all()


def test_noise_skip_reads_the_output_as_v():
    """A path beside the network that changes what eq. 3 asks: with out = v = a eps - s x0 it must predict eps exactly, and
    give back x0, near t = T too, where another a or s, or a sign, is multiplied by thousands. Off, the output is eps."""
    d, plain, (x0, eps), t = Diffusion(noise_skip=True), Diffusion(), pictures(), torch.tensor([1, 500, 1000])
    xt, (a, s) = d.add_noise(x0, eps, t), d.at(t, x0)
    v = a * eps - s * x0
    assert torch.equal(d.target(x0, eps, t), eps)                       # the loss stays the paper's
    assert torch.allclose(d.prediction(xt, v, t), eps, atol=1e-5)
    assert torch.allclose(d.x0_and_eps(xt, v, t)[0], x0, atol=1e-2)
    assert torch.equal(plain.prediction(xt, v, t), v)
    # An error of 1% in the output: without the path x0 is lost at t = 1000, with it x0 is off by 1%.
    off = 0.01 * torch.ones_like(x0[2:])
    assert (d.x0_and_eps(xt[2:], v[2:] + off, 1000)[0] - x0[2:]).abs().max() < 0.02
    assert (plain.x0_and_eps(xt[2:], eps[2:] + off, 1000)[0] - x0[2:]).abs().min() > 100
    with pytest.raises(ValueError, match="'flow'"):
        Diffusion("flow", noise_skip=True)


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_keeps_the_estimates_consistent(kind):
    """x0 clipped but eps left: the two no longer mix to xt, and DDIM drifts away from the chain."""
    d, t = Diffusion(kind), torch.tensor([200, 600, 1000])
    xt, out = pictures()
    x0, eps = d.x0_and_eps(xt, 5 * out, t, x0_max=1.5)
    assert x0.abs().max() <= 1.5
    assert torch.allclose(d.add_noise(x0, eps, t), xt, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_shift_multiplies_noise_to_signal(kind):
    """A shift that lowers the noise, moves t = 0, or leaves a and s on another curve."""
    plain, more = Diffusion(kind), Diffusion(kind, shift=3.0)
    assert torch.equal(Diffusion(kind, shift=1.0).s, plain.s)
    assert torch.allclose(more.s / more.a, 3 * plain.s / plain.a)
    assert (more.s >= plain.s).all() and (more.a <= plain.a).all() and (more.s[1:-1] > plain.s[1:-1]).any()
    assert more.a[0] == 1 and more.s[0] == 0
    assert torch.allclose(total(more), torch.ones_like(more.a))


def test_unknown_kind_raises():
    """A spelling mistake that trains something else."""
    with pytest.raises(ValueError, match="choose from ddpm, flow"):
        Diffusion("edm")


@pytest.mark.parametrize("kind", OURS)
def test_loss_by_hand(kind):
    """eq. 3 as a sum (lambda = 5 then means another thing for each size of picture), as a root, over the whole batch, or
    without its square: number by number, in plain loops."""
    d, (x0, eps) = Diffusion(kind), pictures(3)
    out = torch.randn(3, 4, 2, 2)
    each = loss(d.target(x0, eps, torch.tensor([10, 500, 900])), out)
    assert each.shape == (3,)
    for m in range(3):
        errors = []
        for e, x, o in zip(eps[m].flatten().tolist(), x0[m].flatten().tolist(), out[m].flatten().tolist(), strict=True):
            wanted = e if kind == "ddpm" else e - x
            errors.append((wanted - o) ** 2)
        assert each[m].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_loss_is_each_pictures_own():
    """A mean over the batch: every picture has the same number, and the log of losses by t says nothing."""
    eps, out = pictures(4)
    each = loss(eps, out)
    out[2] += 1
    assert ((loss(eps, out) != each).tolist()) == [False, False, True, False]
    assert loss(eps[:0], out[:0]).shape == (0,)         # a batch of text alone
    wide = loss(eps.repeat(1, 1, 4, 4), out.repeat(1, 1, 4, 4))
    assert torch.allclose(wide, loss(eps, out))         # the size of a picture does not matter


def test_loss_is_computed_in_float32():
    """Squares summed in bfloat16, as the network computes: 8 bits lose what is left to learn."""
    eps, out = torch.randn(2, 1, 64, 64), torch.randn(2, 1, 64, 64).bfloat16()
    each = loss(eps, out)
    assert each.dtype == torch.float32
    exact = (eps.double() - out.double()).square().flatten(1).mean(1)
    assert torch.allclose(each.double(), exact, rtol=1e-5)


@pytest.mark.parametrize("T", [1000, 200])
@pytest.mark.parametrize("kind, shift", [("ddpm", 1.0), ("ddpm", 3.0), ("flow", 1.0), ("flow", 2.0)])
def test_same_noise_is_the_papers_noise(kind, shift, T):
    """The noise limit t <= 500 (App. B.2) taken by number on another schedule: more noise than the paper allows, or one step
    less than it does; or compared with a schedule of another length."""
    d, paper = Diffusion(kind, T=T, shift=shift), Diffusion("ddpm", T=T)
    for t in (1, T // 10, T // 2, 9 * T // 10):
        k = same_noise(d, t)
        limit = paper.s[t] / paper.a[t]
        assert d.s[k] / d.a[k] <= limit < d.s[k + 1] / d.a[k + 1]
        assert k == t or (kind, shift) != ("ddpm", 1.0)


# -------------------------------------------------------------------------------------------------------------- respacing
def test_respaced_steps_are_a_subset():
    """250 of 1000 steps that begin below T, end above 0, or repeat one (PAPER §4.6)."""
    assert respace(1000, 250) == list(range(1000, -1, -4))
    assert respace(1000, 3) == [1000, 667, 333, 0] and respace(10, 4) == [10, 8, 5, 2, 0]       # to the nearest: 666.7, 7.5, 2.5
    for steps in (1, 2, 3, 7, 25, 333, 667, 999, 1000):
        times = respace(1000, steps)
        assert len(times) == steps + 1 and times[0] == 1000 and times[-1] == 0
        assert all(type(t) is int and t > u for t, u in itertools.pairwise(times))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t, u", [(1000, 996), (1000, 500), (500, 499), (500, 496), (500, 4), (4, 0)])
def test_ancestral_step_keeps_the_marginals(kind, t, u):
    """Betas of the 1000-step chain used in a 250-step one (PAPER §4.6): if x_t ~ q(x_t | x0), then x_u must be ~ q(x_u | x0)."""
    d, one, none = Diffusion(kind), torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)

    def step(xt, x0, noise):
        return ancestral_step(d, xt, x0, t, u, noise).item()

    # The step is linear, so its coefficients can be read off; a and s of the x_u it makes follow from them.
    signal = step(d.a[t].float() * one, one, none)
    variance = step(d.s[t].float() * one, none, none) ** 2 + step(none, none, one) ** 2
    assert signal == pytest.approx(d.a[u].item(), abs=1e-5)
    assert variance == pytest.approx(d.s[u].item() ** 2, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_last_step_adds_no_noise(kind):
    """Noise on the last step: every picture comes out grainy (PAPER §4.6)."""
    d, (xt, x0) = Diffusion(kind), pictures()
    assert torch.allclose(ancestral_step(d, xt, x0, 4, 0, torch.full_like(xt, 1e4)), x0, atol=1e-5)
    for sampler in SAMPLERS:
        *_, (_, _, x0), (t, x, _) = sample(best_network(d), xt, d, 5, sampler)
        assert t == 0 and torch.allclose(x, x0, atol=1e-5), sampler


def test_every_other_step_adds_noise(monkeypatch):
    """Noise left out of a step that is not the last: of t = 2 to 1, say. In T = 6 steps it is drawn five times."""
    drawn = []
    real = diffusion.fresh_noise
    monkeypatch.setattr(diffusion, "fresh_noise", lambda x, generator: drawn.append(x) or real(x, generator))
    d = Diffusion(T=6)
    *_, (t, _, _) = sample(lambda x, t: torch.zeros_like(x), torch.randn(1, 1, 2, 2), d, 6)
    assert t == 0 and len(drawn) == 5


# --------------------------------------------------------------------------------------------------------------- samplers
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler, steps", [("ddpm", 250), ("ddim", 250), ("dpm++", 25), ("dpm++", 250)])
def test_sampler_draws_the_gaussian_it_was_told_of(kind, sampler, steps):
    """Any wrong coefficient in a sampler: with the perfect network it must give back the mean and the deviation."""
    d = Diffusion(kind)
    g = torch.Generator().manual_seed(0)
    *_, (_, x, _) = sample(best_network(d), torch.randn(20000, 1, 1, 1, generator=g), d, steps, sampler, g)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.015)           # 4 standard errors of 20000 draws
    assert x.std().item() == pytest.approx(DEV, abs=0.012)


def test_second_order_beats_first_order():
    """DPM-Solver++(2M) with its correction lost or turned round: still converges, but no better than DDIM."""
    d, xT = Diffusion("ddpm"), torch.linspace(-2, 2, 64).view(-1, 1, 1, 1)

    def last(sampler, steps):
        return list(sample(best_network(d), xT, d, steps, sampler))[-1][1]

    exact = last("ddim", 1000)
    errors = {sampler: (last(sampler, 25) - exact).abs().mean().item() for sampler in ("ddim", "dpm++")}
    assert errors["dpm++"] < 0.5 * errors["ddim"], errors


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_network_is_told_the_t_of_its_input(sampler):
    """The network told u or an index instead of t (PAPER §4.3), or called twice a step."""
    d, told = Diffusion("ddpm"), []
    xT, _ = pictures()

    def network(x, t):
        told.append((t, x))
        return best_network(d)(x, t)

    trajectory = list(sample(network, xT, d, 8, sampler))
    assert [t for t, _ in told] == [1000, 875, 750, 625, 500, 375, 250, 125]
    assert [t for t, _, _ in trajectory] == [1000, 875, 750, 625, 500, 375, 250, 125, 0]
    assert all(x is seen for (_, x), (_, seen, _) in zip(told, trajectory[:-1], strict=True))


def test_ddim_on_flow_is_eulers_method():
    """Flow sampled backwards or at the wrong pace: the step is dx = velocity * dt."""
    d, (xt, velocity) = Diffusion("flow"), pictures()
    x0, eps = d.x0_and_eps(xt, velocity, 600)
    assert torch.allclose(ddim_step(d, x0, eps, 550), xt - 0.05 * velocity, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_seed_same_picture_and_input_left_alone(sampler):
    """Noise from the global generator (no seed repeats a picture), or xT overwritten while sampling."""
    d, (xT, _) = Diffusion("ddpm"), pictures()
    before = xT.clone()

    def draw():
        return list(sample(best_network(d), xT, d, 6, sampler, torch.Generator().manual_seed(5)))[-1][1]

    first = draw()
    torch.randn(7)
    assert torch.equal(first, draw()) and torch.equal(xT, before)


def test_guidance_ends():
    """Guidance with its branches swapped or its scale off by one: 1 is the plain model, 0 ignores the caption (PAPER §4.8)."""
    conditional, unconditional = pictures()
    assert torch.allclose(guide(conditional, unconditional, 1.0), conditional, atol=1e-6)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    assert torch.allclose(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional, atol=1e-5)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_steps_raise(steps):
    """No step at all returns the noise as if it were a picture."""
    d = Diffusion("ddpm")
    with pytest.raises(ValueError, match=f"between 1 and 1000, got {steps}"):
        list(sample(best_network(d), pictures()[0], d, steps))


def test_unknown_sampler_raises():
    """A spelling mistake that falls through to another sampler."""
    d = Diffusion("ddpm")
    with pytest.raises(ValueError, match="choose from ddpm, ddim, dpm"):
        list(sample(best_network(d), pictures()[0], d, 5, "euler"))


# --------------------------------------------------------------------------------- a second opinion: diffusers' schedulers
def diffusers_scheduler(name, **options):
    """A scheduler on the paper's schedule. Their timestep index + 1 = our t; "trailing" spacing starts at T as we do."""
    diffusers = pytest.importorskip("diffusers", reason="the second opinion on schedule and samplers needs `diffusers`")
    return getattr(diffusers, name)(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing",
                                    **options)


def test_schedule_equals_diffusers():
    """A schedule one step off, in their eyes (PAPER §4.6)."""
    theirs = diffusers_scheduler("DDPMScheduler").alphas_cumprod
    assert torch.allclose(cosine_alpha_bar()[1:].float(), theirs, rtol=1e-3, atol=1e-7)


def test_add_noise_equals_diffusers():
    """eq. 2 with a and s swapped or squared."""
    (x0, eps), t = pictures(5), torch.tensor([1, 2, 500, 999, 1000])
    theirs = diffusers_scheduler("DDPMScheduler").add_noise(x0, eps, t - 1)
    assert torch.allclose(Diffusion("ddpm").add_noise(x0, eps, t), theirs, atol=1e-5)


@pytest.mark.parametrize("steps", [250, 1000])
def test_ddpm_step_equals_diffusers(steps):
    """Posterior mean or deviation wrong, on the full chain and on the respaced one (PAPER §4.6)."""
    d, scheduler = Diffusion("ddpm"), diffusers_scheduler("DDPMScheduler", clip_sample=False)
    scheduler.set_timesteps(steps)
    times = respace(1000, steps)
    assert times[:-1] == [int(t) + 1 for t in scheduler.timesteps]
    for k in (steps // 4, steps // 2, steps - 2, steps - 1):
        t, u, (xt, eps) = times[k], times[k + 1], pictures()
        x0, _ = d.x0_and_eps(xt, eps, t)
        noise = torch.randn(xt.shape, generator=torch.Generator().manual_seed(k))       # the noise that they will draw
        theirs = scheduler.step(eps, t - 1, xt, generator=torch.Generator().manual_seed(k)).prev_sample
        assert torch.allclose(ancestral_step(d, xt, x0, t, u, noise), theirs, atol=1e-4), (t, u)


@pytest.mark.parametrize("steps", [50, 1000])
def test_ddim_step_equals_diffusers(steps):
    """DDIM's re-mixing at the wrong t."""
    d, scheduler = Diffusion("ddpm"), diffusers_scheduler("DDIMScheduler", clip_sample=False)
    scheduler.set_timesteps(steps)
    times = respace(1000, steps)
    for k in (steps // 4, steps // 2, steps - 1):
        t, u, (xt, out) = times[k], times[k + 1], pictures()
        theirs = scheduler.step(out, t - 1, xt).prev_sample
        assert torch.allclose(ddim_step(d, *d.x0_and_eps(xt, out, t), u), theirs, atol=1e-4), (t, u)


@pytest.mark.filterwarnings("ignore:__array__")         # theirs, about numpy 2
def test_dpm_steps_equal_diffusers():
    """DPM-Solver++(2M): the ratio of the two step lengths upside down, or the correction missing or half of it."""
    d, scheduler = Diffusion("ddpm"), diffusers_scheduler("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++",
                                                          solver_order=2, solver_type="midpoint", final_sigmas_type="zero")
    scheduler.set_timesteps(25)
    assert [int(t) + 1 for t in scheduler.timesteps] == respace(1000, 25)[:-1]
    xT, _ = pictures()
    ours = [x for _, x, _ in sample(best_network(d), xT, d, 25, "dpm++")]
    theirs = [xT]
    for t in scheduler.timesteps:
        theirs.append(scheduler.step(best_network(d)(theirs[-1], int(t) + 1), t, theirs[-1]).prev_sample)
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.allclose(a, b, atol=2e-3), k
