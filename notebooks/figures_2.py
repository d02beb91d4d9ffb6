"""
figures_2.py: what notebook 2 draws

THE IDEA    As in figures.py, one function per picture. A notebook takes this module under the name
            `figures`. So all of figures.py is imported here: what the notebooks share.
SHAPES      times and losses (n,); pictures (M, h, w, 3) uint8; a world of one pixel is
            (means, dev, weights), one mean and weight per kind of picture
HERE        Every `draw_...` calls plt.show() once, at its end.
TEST        tests/test_notebooks.py
"""
import matplotlib.pyplot as plt
import torch
from figures import *

from support.figures import grid


# ----------------------------------------------------------------- notebook 2: noise in, noise out
def draw_schedules(ddpm, flow):
    """What is mixed with what, and the signal-to-noise ratio with three shifts.
    ddpm, flow: diffusion.Diffusion."""
    mixture, ratio = panels(2, 4.4)
    times = range(ddpm.T + 1)
    inside = slice(1, -1)                   # without both ends, where the ratio is infinite or 0
    processes = ((ddpm, DARK, "cosine"), (flow, ORANGE, "flow"))
    shifts = ((1, "-"), (2, "--"), (4, ":"))
    for process, colour, name in processes:
        a = process.a
        s = process.s
        mixture.plot(times, a, color=colour, label=f"{name}: a, the picture")
        mixture.plot(times, s, "--", color=colour, label=f"{name}: s, the noise")
        for shift, style in shifts:
            snr = (a / s / shift).square()
            curve = snr[inside].log10()
            label = f"{name}, shift {shift}"
            ratio.plot(times[inside], curve, style, color=colour, label=label)
    mixture.set(xlabel="t", title="what is mixed with what", ylim=(-0.02, 1.35))
    mixture.legend(ncols=2, loc="upper center", fontsize=11)
    ratio.set(xlabel="t", title="log10 of the signal-to-noise ratio", ylim=(-4.5, 4))
    ratio.axhline(0, color=GREY, linewidth=1)
    ratio.legend(fontsize=11)
    plt.show()


def bin_averages(x, y, least, low=-2.2, high=2.6, bins=24):
    """(mean x, mean y) of the pairs in each bin of x that has at least so many, each (n,).
    x, y: tensors of one size; least: how many pairs a bin needs."""
    edges = torch.linspace(low, high, bins + 1)
    number = torch.bucketize(x.flatten(), edges)            # 0: below the first edge
    count = torch.bincount(number, minlength=bins + 2)
    sum_x = torch.bincount(number, x.flatten(), minlength=bins + 2)
    sum_y = torch.bincount(number, y.flatten(), minlength=bins + 2)
    enough = count >= least
    enough[0] = False
    enough[-1] = False                                      # beyond the last edge
    return (sum_x / count)[enough], (sum_y / count)[enough]


def draw_pairs(panels_by_t, network):
    """Pairs (xt, eps), their average, and the formula for it.

    panels_by_t   {t: (xt, eps, mean xt, mean eps)}
    network       function (x (n, 1, 1, 1), t) -> the formula's eps"""
    axes = panels(len(panels_by_t), 4.2, sharey=True)
    fine = torch.linspace(-3, 3, 300)
    few = slice(400)                        # as many pairs as a picture can show
    for axis, (t, pairs) in zip(axes, panels_by_t.items()):
        xt, eps, mean_xt, mean_eps = pairs
        x = xt.flatten()[few]
        y = eps.flatten()[few]
        axis.scatter(x, y, s=8, color=DARK, alpha=0.25, label="pairs (xt, ε)")
        formula = network(fine.view(-1, 1, 1, 1), t)
        axis.plot(fine, formula.flatten(), color=ORANGE, linewidth=3, label="formula")
        axis.plot(mean_xt, mean_eps, "o", color=RED, markersize=5, label="average of the pairs")
        axis.set(xlim=(-3, 3), ylim=(-3, 3))
        axis.set(xlabel="xt", title=f"t = {t}")
    axes[0].set_ylabel("ε")
    axes[0].legend(fontsize=11, loc="upper left", frameon=True)
    plt.show()


def draw_loss_by_level(times, simple, best):
    """The loss of a network that knows little and of the best possible one, against t."""
    axis = one_panel(9, 4)
    axis.plot(times, simple, color=DARK, linestyle="--", label="knows mean and deviation: ᾱ")
    axis.plot(times, best, color=ORANGE, label="the best possible network")
    axis.fill_between(times, best, simple, color=ORANGE, alpha=0.15)
    axis.set(xlabel="t", title="diffusion loss by noise level", ylim=(0, 1.05))
    axis.legend()
    plt.show()


def draw_mistakes(ddpm, flow):
    """How large a mistake in x0, and in eps, a mistake of 1 in each kind of answer becomes.
    ddpm, flow: diffusion.Diffusion."""
    t = torch.arange(1, 1000)
    a = ddpm.a[t]
    s = ddpm.s[t]
    one = torch.ones(len(t))
    # Answer: its mistake in x0, its mistake in eps, and how to draw it.
    answers = {
        "ε (the paper)": (s / a, one, ORANGE, "-"),
        "x0": (one, a / s, DARK, "-"),
        "v": (s, a, GREEN, "--"),
        "flow": (flow.s[t], flow.a[t], GREEN, "-"),
    }
    in_x0, in_eps = panels(2, 4.2, sharey=True)
    for name, (mistake_x0, mistake_eps, colour, style) in answers.items():
        in_x0.plot(t, mistake_x0, style, color=colour, label=f"answer: {name}")
        in_eps.plot(t, mistake_eps, style, color=colour)
    names = ((in_x0, "x0"), (in_eps, "ε"))
    for axis, name in names:
        axis.set(xlabel="t", yscale="log", ylim=(1e-3, 1e3))
        axis.set_title(f"becomes a mistake in {name} of")
    in_x0.set_ylabel("a mistake of 1 in the answer")
    in_x0.legend(fontsize=11, loc="upper left")
    plt.show()


def density(y, a, s, means, dev, weights):
    """q(xt) of the world of one pixel, at points y (n,): a sum of bells.
    a, s: of eq. 2; means, dev, weights: of the kinds of picture."""
    variance = a ** 2 * dev ** 2 + s ** 2
    total = torch.zeros(len(y))
    for weight, mean in zip(weights, means.flatten()):
        total += weight * bell(y, a * mean, variance)
    return total


def draw_paths(runs, process, world):
    """Paths of eight samples over the true density of xt, and where thousands of them end.

    runs      {title: (times (n,), paths (n, 8), ends (many,))}
    process   diffusion.Diffusion
    world     (means, dev, weights)"""
    # 1. Where xt may be at each t: the grey behind the paths.
    y = torch.linspace(-3, 3, 200)
    columns = []
    for t in range(1000, -1, -20):
        a = process.a[t]
        s = process.s[t]
        columns.append(density(y, a, s, *world))
    background = torch.stack(columns, dim=1)
    wanted = columns[-1]                    # at t = 0
    greys = plt.get_cmap("Greys", 8)

    # 2. Each run: its paths, and beside them where they end.
    axes = panels(6, 4.2, width_ratios=[3, 1] * 3, sharey=True)
    places = zip(axes[::2], axes[1::2], runs.items())
    for axis, beside, (title, (times, paths, ends)) in places:
        axis.imshow(background, extent=(1000, 0, -3, 3), origin="lower", aspect="auto",
                    cmap=greys, vmax=1)
        marker = "." if len(times) < 50 else None           # few steps: show each
        axis.plot(times, paths, linewidth=1.2, marker=marker)
        axis.set(xlim=(1000, 0), ylim=(-3, 3), xticks=(1000, 500, 0))
        axis.set(xlabel="t", title=title)
        beside.hist(ends.numpy(), bins=60, range=(-3, 3), density=True, color=ORANGE,
                    orientation="horizontal")
        beside.plot(wanted, y, color=DARK)
        beside.axis("off")
    plt.show()


def draw_chains(right, wrong, right_ends, wrong_ends, world):
    """Pictures of the right and of the wrong chain, and where both end in the world of one pixel.
    right, wrong: (4, h, w, 3) uint8; ..._ends: (many,); world: (means, dev, weights)."""
    first, second, ends = panels(3, 4, width_ratios=[1, 1, 1.2])
    first.imshow(grid(right, 2))
    first.set_title("β of the 250-step chain")
    second.imshow(grid(wrong, 2))
    second.set_title("β of the 1000-step chain")
    for axis in (first, second):
        axis.axis("off")

    bins = {"bins": 60, "range": (-3, 3), "density": True}
    outline = {"histtype": "step", "linewidth": 2}          # so that what is behind it shows
    ends.hist(right_ends.numpy(), color=ORANGE, label="right", **bins)
    ends.hist(wrong_ends.numpy(), color=RED, label="wrong", **bins, **outline)
    y = torch.linspace(-3, 3, 200)
    wanted = density(y, 1.0, 0.0, *world)   # all picture, no noise
    ends.plot(y, wanted, color=DARK, label="wanted")
    ends.legend(fontsize=11)
    ends.set(title="one pixel", yticks=[])
    plt.show()


def draw_guided(points, kinds, dev):
    """Samples of the world of two pixels for several guidance weights.
    points: {w: (n, 2)}; kinds: (2, 2), the centres; dev: deviation within a kind."""
    axes = panels(len(points), 3.6, sharey=True)
    few = slice(300)                        # as many points as a picture can show
    for axis, (w, found) in zip(axes, points.items()):
        for centre, colour in zip(kinds, (DARK, ORANGE)):
            for radius in (dev, 2 * dev):
                circle = plt.Circle(centre, radius, fill=False, color=colour, linewidth=2)
                axis.add_patch(circle)
        x, y = found.T
        axis.scatter(x[few], y[few], s=5, color=RED, alpha=0.5)
        axis.set(xlim=(-2.2, 2.8), ylim=(-2, 2), aspect="equal")
        mean = abs(x.mean())                # none is below 0 by more than chance
        spread = x.std()
        axis.set_title(f"w = {w}\nmean {mean:.2f}, dev. {spread:.2f}", fontsize=13)
    plt.show()
