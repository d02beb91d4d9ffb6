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
        a = process.a                                       # (T + 1,)
        s = process.s

        # Left: while the picture fades, the noise comes. Both start and end at the same places,
        # whatever the process; what differs is the way between.
        mixture.plot(times, a, "-",
                     color=colour, label=f"{name}: a, the picture")
        mixture.plot(times, s, "--",
                     color=colour, label=f"{name}: s, the noise")

        # Right: one number for both, a²/s². A shift divides a/s by the same factor at every t,
        # so it moves the whole curve down and leaves its form alone.
        for shift, style in shifts:
            snr = (a / s / shift).square()
            curve = snr[inside].log10()
            ratio.plot(times[inside], curve, style,
                       color=colour, label=f"{name}, shift {shift}")

    # Room above the curves for a legend.
    mixture.set_ylim(-0.02, 1.35)
    mixture.set_xlabel("t")
    mixture.set_title("what is mixed with what")
    mixture.legend(ncols=2, loc="upper center", fontsize=11)

    # At the grey line, 0, picture and noise are equally strong.
    ratio.axhline(0, color=GREY, linewidth=1)
    ratio.set_ylim(-4.5, 4)
    ratio.set_xlabel("t")
    ratio.set_title("log10 of the signal-to-noise ratio")
    ratio.legend(fontsize=11)
    plt.show()


def bin_averages(x, y, least, low=-2.2, high=2.6, bins=24):
    """(mean x, mean y) of the pairs in each bin of x that has at least so many, each (n,).

    x, y        tensors of one size
    least       how many pairs a bin needs
    low, high   where the first bin begins and the last one ends
    bins        how many there are"""
    x = x.flatten()
    y = y.flatten()

    # The bin of each pair. 0 lies below the first edge, the last number beyond the last edge.
    edges = torch.linspace(low, high, bins + 1)
    number = torch.bucketize(x, edges)
    numbers = bins + 2

    # Three sums over each bin: of ones, of x, of y.
    count = torch.bincount(number, minlength=numbers)
    sum_x = torch.bincount(number, x, minlength=numbers)
    sum_y = torch.bincount(number, y, minlength=numbers)
    mean_x = sum_x / count
    mean_y = sum_y / count

    # The mean of a few pairs is mostly chance. What lies outside is in no bin at all.
    enough = count >= least
    enough[0] = False
    enough[-1] = False
    return mean_x[enough], mean_y[enough]


def draw_pairs(panels_by_t, network):
    """Pairs (xt, eps), their average, and the formula for it.

    panels_by_t   {t: (xt, eps, mean xt, mean eps)}; the means as from bin_averages
    network       function (x (n, 1, 1, 1), t) -> the formula's eps"""
    n = len(panels_by_t)
    axes = panels(n, 4.2, sharey=True)
    fine = torch.linspace(-3, 3, 300)
    few = slice(400)                        # as many pairs as a picture can show
    for axis, (t, pairs) in zip(axes, panels_by_t.items()):
        xt, eps, mean_xt, mean_eps = pairs

        # The cloud is what a network is trained on: one xt belongs to many ε.
        x = xt.flatten()[few]
        y = eps.flatten()[few]
        axis.scatter(x, y,
                     s=8, color=DARK, alpha=0.25, label="pairs (xt, ε)")

        # The line is the best that it can answer. The red dots are the cloud's average, from all
        # the pairs; they know nothing of the formula, and lie on it.
        answer = network(fine.view(-1, 1, 1, 1), t).flatten()
        axis.plot(fine, answer,
                  color=ORANGE, linewidth=3, label="formula")
        axis.plot(mean_xt, mean_eps, "o",
                  color=RED, markersize=5, label="average of the pairs")

        # The same square at every t: the cloud turns from round to a line.
        axis.set_xlim(-3, 3)
        axis.set_ylim(-3, 3)
        axis.set_xlabel("xt")
        axis.set_title(f"t = {t}")
    axes[0].set_ylabel("ε")
    axes[0].legend(fontsize=11, loc="upper left", frameon=True)
    plt.show()


def draw_loss_by_level(times, simple, best):
    """The loss of a network that knows little and of the best possible one, against t.
    times, simple, best: n numbers each."""
    axis = one_panel(9, 4)
    axis.plot(times, simple, "--",
              color=DARK, label="knows mean and deviation: ᾱ")
    axis.plot(times, best, "-",
              color=ORANGE, label="the best possible network")

    # What there is to learn about pictures is the area between.
    axis.fill_between(times, best, simple,
                      color=ORANGE, alpha=0.15)
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("t")
    axis.set_title("diffusion loss by noise level")
    axis.legend()
    plt.show()


def draw_mistakes(ddpm, flow):
    """How large a mistake in x0, and in eps, a mistake of 1 in each kind of answer becomes.
    ddpm, flow: diffusion.Diffusion."""
    t = torch.arange(1, 1000)
    a = ddpm.a[t]
    s = ddpm.s[t]
    one = torch.ones(len(t))

    # The answer: its mistake in x0, its mistake in eps, and how to draw it. A mistake in x0 is
    # stretched by what stands before the answer in the page's table, "x0 is then".
    answers = {
        "ε (the paper)": (s / a, one, ORANGE, "-"),
        "x0": (one, a / s, DARK, "-"),
        "v": (s, a, GREEN, "--"),
        "flow": (flow.s[t], flow.a[t], GREEN, "-"),
    }
    in_x0, in_eps = panels(2, 4.2, sharey=True)
    for name, (mistake_x0, mistake_eps, colour, style) in answers.items():
        in_x0.plot(t, mistake_x0, style,
                   color=colour, label=f"answer: {name}")
        in_eps.plot(t, mistake_eps, style,
                    color=colour)

    # A logarithm, and the same on both sides: ε rises at the right of one panel as x0 does at
    # the left of the other. The two that never stretch a mistake stay below 1 in both.
    names = ((in_x0, "x0"), (in_eps, "ε"))
    for axis, name in names:
        axis.set_yscale("log")
        axis.set_ylim(1e-3, 1e3)
        axis.set_xlabel("t")
        axis.set_title(f"the mistake in {name}")
    in_x0.set_ylabel("if the answer is wrong by 1")
    in_x0.legend(fontsize=11, loc="upper left")
    plt.show()


def density(y, a, s, means, dev, weights):
    """q(xt) of the world of one pixel, at points y (n,): a sum of bells, (n,).

    a, s            how much picture and how much noise, as in eq. 2
    means, weights  one of each per kind of picture
    dev             deviation within a kind, the same for all"""
    # Eq. 2 makes a bell of a bell: its mean shrinks, and two independent variances add.
    variance = (a * dev) ** 2 + s ** 2
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
    background = torch.stack(columns, dim=1)                # (y, t)
    wanted = columns[-1]                    # at t = 0
    greys = plt.get_cmap("Greys", 8)        # eight steps, like the heights on a map

    # 2. Each run has a wide panel for its paths, and a narrow one for where they end.
    ratios = [3, 1] * 3
    axes = panels(6, 4.2, width_ratios=ratios, sharey=True)
    wide = axes[::2]
    narrow = axes[1::2]
    for axis, beside, title in zip(wide, narrow, runs):
        times, paths, ends = runs[title]
        axis.imshow(background,
                    extent=(1000, 0, -3, 3), origin="lower", aspect="auto",
                    cmap=greys, vmax=1)

        # 3. Eight paths from noise, at the left, to pictures. With few steps each is shown.
        marker = "." if len(times) < 50 else None
        axis.plot(times, paths,
                  linewidth=1.2, marker=marker)
        axis.set_xlim(1000, 0)
        axis.set_ylim(-3, 3)
        axis.set_xticks((1000, 500, 0))
        axis.set_xlabel("t")
        axis.set_title(title)

        # 4. Where all samples end, turned so that its height is the height of the paths. A
        # sampler is right if the orange fills the line.
        beside.hist(ends.numpy(),
                    bins=60, range=(-3, 3), density=True,
                    color=ORANGE, orientation="horizontal")
        beside.plot(wanted, y, color=DARK)
        beside.axis("off")
    axes[0].set_ylabel("xt")
    plt.show()


def draw_chains(right, wrong, right_ends, wrong_ends, world):
    """Pictures of the right and of the wrong chain, and where both end in the world of one pixel.

    right, wrong    (4, h, w, 3) uint8
    ..._ends        (many,)
    world           (means, dev, weights)"""
    first, second, ends = panels(3, 4, width_ratios=[1, 1, 1.2])

    # 1. What one would see: the pictures are there, the wrong ones under grain.
    first.imshow(grid(right, 2))
    first.set_title("β of the 250-step chain")
    second.imshow(grid(wrong, 2))
    second.set_title("β of the 1000-step chain")
    for axis in (first, second):
        axis.axis("off")

    # 2. What one would measure: both kinds are in their places, and too wide. The wrong one is
    # an outline, so that what is behind it shows.
    bins = {"bins": 60, "range": (-3, 3), "density": True}
    ends.hist(right_ends.numpy(), **bins,
              color=ORANGE, label="right")
    ends.hist(wrong_ends.numpy(), **bins,
              color=RED, label="wrong", histtype="step", linewidth=2)
    y = torch.linspace(-3, 3, 200)
    wanted = density(y, 1.0, 0.0, *world)   # all picture, no noise
    ends.plot(y, wanted, color=DARK, label="wanted")
    ends.set_yticks([])
    ends.set_title("one pixel")
    ends.legend(fontsize=11)
    plt.show()


def draw_guided(points, kinds, dev):
    """Samples of the world of two pixels for several guidance weights.

    points    {w: (n, 2)}
    kinds     (2, 2), the centres: first the other one, then the one asked for
    dev       deviation within a kind"""
    axes = panels(len(points), 3.8, sharey=True)
    few = slice(300)                        # as many points as a picture can show
    for axis, (w, found) in zip(axes, points.items()):
        # Where real pictures lie: circles at one and two deviations from each centre.
        for centre, colour in zip(kinds, (DARK, ORANGE)):
            look = {"fill": False, "color": colour, "linewidth": 2}
            near = plt.Circle(centre, dev, **look)
            far = plt.Circle(centre, 2 * dev, **look)
            axis.add_patch(near)
            axis.add_patch(far)

        # Where samples lie. With w they leave the dark kind, go past the centre of the orange
        # one, and crowd.
        x, y = found.T
        axis.scatter(x[few], y[few],
                     s=5, color=RED, alpha=0.5)
        axis.set_xlim(-2.2, 2.8)
        axis.set_ylim(-2, 2)
        axis.set_aspect("equal")
        axis.set_xlabel("first pixel")

        # The same in numbers, of the first pixel: it tells the kinds apart.
        mean = abs(x.mean())                # none is below 0 by more than chance
        spread = x.std()
        title = f"w = {w}\nmean {mean:.2f}, dev. {spread:.2f}"
        axis.set_title(title, fontsize=13)
    axes[0].set_ylabel("second pixel")
    plt.show()
