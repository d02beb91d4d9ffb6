"""
figures_3.py: what notebooks 3 and 4 draw

THE IDEA    As in figures.py, one function per picture. A notebook takes this module under the name
            `figures`. So all of figures.py is imported here: what the notebooks share.
SHAPES      pictures (M, h, w, 3) uint8; latents (M, c, h, w); vectors (M, P, D)
HERE        Every `draw_...` calls plt.show() once, at its end.
TEST        tests/test_notebooks.py
"""
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from figures import *


# ---------------------------------------------------- notebook 3: a picture becomes a few vectors
def draw_cuts(picture, sides):
    """The same picture cut into patches of several sides.
    picture: (h, w, 3) uint8; sides: patch sides p, in pixels."""
    h, w, _ = picture.shape
    axes = panels(len(sides), 3.5)
    for axis, p in zip(axes, sides):
        # extent: x and y count pixels from the corner, so that a cut lies between two pixels.
        axis.imshow(picture, extent=(0, w, h, 0))
        cuts = range(0, h + 1, p)
        cut_lines(axis, cuts, linewidth=0.6)

        # Half the side is four times as many vectors: the price of a finer cut.
        patches = (h // p) * (w // p)
        axis.set_title(f"p = {p}: {patches:,} patches")
        bare(axis)
    plt.show()


def draw_owners(owners):
    """Which vector holds which pixel of the first channel. owners: {title: (h, w) int}."""
    axes = panels(len(owners), 5.8)
    for axis, (title, owner) in zip(axes, owners.items()):
        # One colour per vector: a patch must be a square of one colour.
        axis.imshow(owner,
                    cmap="tab20", vmin=0, vmax=19)

        # Its number, once, in the middle of its pixels, whatever form they have.
        for k in owner.unique().tolist():
            mine = owner == k
            pixels = mine.nonzero().float()                 # (pixels, 2)
            y, x = pixels.mean(0).tolist()
            write(axis, x, y, k, fontsize=15)
        axis.set_title(title)
        bare(axis)
    plt.show()


def draw_raster(picture, p):
    """A picture with the number of each patch, in raster order.
    picture: (h, w, 3) uint8; p: patch side, in pixels."""
    h, w, _ = picture.shape
    rows = h // p
    columns = w // p
    axis = one_panel(5, 5)

    # The picture is darkened, so that white numbers stand out.
    darker = picture // 2 + 30
    axis.imshow(darker, extent=(0, w, h, 0))
    cuts = range(0, h + 1, p)
    cut_lines(axis, cuts, linewidth=1)

    # Left to right, then down, as one reads: the order in which the row of vectors has them.
    for k in range(rows * columns):
        row, column = divmod(k, columns)
        x = (column + 0.5) * p
        y = (row + 0.5) * p
        write(axis, x, y, k, color="white", fontsize=17)
    bare(axis)
    axis.set_title("raster order")
    plt.show()


def draw_waves(waves, step):
    """The sines and cosines that code t.
    waves: (n, 2 * frequencies); step: from one t to the next."""
    n, numbers = waves.shape
    last = step * (n - 1)                   # the largest t
    axis = one_panel(WIDTH, 3.8)

    # Turned, so that t runs to the right. In the upper half the fast waves stand above the slow
    # ones: a fast one tells neighbours apart, a slow one tells early from late.
    image = show_numbers(axis, waves.T, most=1,
                         aspect="auto", extent=(0, last, numbers, 0))
    axis.set_xlabel("t")
    axis.set_ylabel("sines, then cosines")
    axis.set_title("a column is the code of one t")
    plt.colorbar(image)
    plt.show()


def draw_told(times, losses_by_t):
    """The loss of a trained model that is told a t, against that t.
    times: the n that it is told; losses_by_t: {true t: n losses}."""
    axis = one_panel(9, 4.2)
    colours = (GREEN, ORANGE, DARK)
    for true, colour in zip(losses_by_t, colours):
        # A valley whose bottom is at the dotted line: the truth is what helps most.
        curve = losses_by_t[true]
        axis.plot(times, curve, marker="o",
                  color=colour, label=f"true t = {true}")
        axis.axvline(true, linestyle=":", color=colour)

    axis.set_ylim(0, None)
    axis.set_xlabel("the t that the model is told")
    axis.set_title("diffusion loss")
    # The legend has a frame: it stands on a dotted line.
    axis.legend(loc="upper center", frameon=True)
    plt.show()


def draw_reach(reaches, pixel, p):
    """Which vectors change when one latent pixel does.
    reaches: {title: (P,)}, relative changes; pixel: (y, x); p: patch side."""
    n = len(reaches)
    _, axes = plt.subplots(1, n, figsize=(10, 4.2))
    y, x = pixel
    for axis, (title, change) in zip(axes, reaches.items()):
        # The vectors, back in the places of their patches: bluer is changed more.
        side = math.isqrt(len(change))                      # patches per row
        h = side * p
        square = change.view(side, side)
        image = show_changes(axis, square, least=-4,
                             extent=(0, h, h, 0))
        cuts = range(0, h + 1, p)
        cut_lines(axis, cuts, linewidth=1)

        # Red: the one pixel that was changed, at its middle.
        axis.plot(x + 0.5, y + 0.5, "s",
                  color=RED, markersize=14)
        axis.set_title(title)
        bare(axis)
    plt.colorbar(image, ax=axes, label="change, log10")
    plt.show()


def arrow(axis, start, end, colour=DARK, style="-"):
    """An arrow from one point to another. start, end: (x, y); style: of the line."""
    # matplotlib draws an arrow from a text to a place. Ours has no text.
    look = {"arrowstyle": "->", "color": colour, "linewidth": 2, "linestyle": style}
    axis.annotate("", xy=end, xytext=start, arrowprops=look)


def draw_unet(latent, skips, vectors):
    """The U-Net as a U: the way down, the transformer, the way up, and the skips between.

    latent    a shape, (c, h, w)
    skips     shapes, (C, h, w) each, from first to last
    vectors   a shape, (P, D)"""
    axis = one_panel(WIDTH, 6.2)

    # The plan. Height on the page is size: large pictures above, the few vectors at the bottom.
    left = 2                                # x of the way down
    right = 10                              # x of the way up
    depth = 1.25                            # from one size to the next
    bottom = -depth * len(skips)

    def box(x, y, text, colour, width=2.6):
        fill(axis, x, y, width, 0.64, colour)
        write(axis, x, y, text, color="white", fontsize=13)

    # 1. In and out, grey: they have the same shape.
    box(left, 0.9, f"xt {latent}", GREY)
    box(right, 0.9, f"predicted noise {latent}", GREY, width=3.4)
    arrow(axis, (left, 0.55), (left, 0.35))
    arrow(axis, (right, 0.35), (right, 0.55))

    # 2. Each size: a block on either way, a skip between them, and the time into both. The skip
    # is dashed red because it goes past the transformer. It carries what the vectors cannot.
    for k, shape in enumerate(skips):
        y = -depth * k
        box(left, y, f"down[{k}] {shape}", ORANGE)
        box(right, y, f"up[{k}] {shape}", ORANGE)
        arrow(axis, (3.4, y), (8.6, y), RED, "--")
        write(axis, 6, y + 0.2, "skip", color=RED)
        write(axis, 0, y, "t", color=GREEN, fontsize=17)
        arrow(axis, (0.1, y), (0.65, y), GREEN)
        write(axis, 12, y, "t", color=GREEN, fontsize=17)
        arrow(axis, (11.9, y), (11.35, y), GREEN)

    # 3. From one size to the next: down at the left, up at the right.
    for k in range(len(skips) - 1):
        y = -depth * k
        above = y - 0.35                    # the lower edge of this box
        below = y - 0.9                     # the upper edge of the next one
        arrow(axis, (left, above), (left, below))
        arrow(axis, (right, below), (right, above))
        middle = y - 0.63
        write(axis, 2.2, middle, "half the size", ha="left", fontsize=12)
        write(axis, 9.8, middle, "twice the size", ha="right", fontsize=12)

    # 4. The transformer below: both ways meet in it.
    P, D = vectors
    box(6, bottom, f"transformer: {P} vectors of {D}", DARK, width=4.6)
    above = bottom + 0.9                    # the last boxes of both ways
    beside = bottom + 0.1
    arrow(axis, (left, above), (3.6, beside))
    arrow(axis, (8.4, beside), (right, above))

    axis.set_xlim(-0.3, 12.3)
    axis.set_ylim(bottom - 0.5, 1.4)
    axis.axis("off")
    plt.show()


def draw_curves(curves, title, xlabel="step", smooth=10):
    """Losses against the step, each the mean of the last few.
    curves: {name: n numbers}; smooth: over how many steps the mean goes."""
    axis = one_panel(9, 4.2)

    # One step's loss says more about its batch than about the model, so each point is a mean of
    # the last few steps. Before there are so many, there is no point.
    window = np.ones(smooth) / smooth
    means = {}
    for name, curve in curves.items():
        means[name] = np.convolve(curve, window, mode="valid")
        last = len(curve)                   # the same for all
    steps = range(smooth, last + 1)
    colours = (DARK, ORANGE, RED, GREEN)
    plot_curves(axis, steps, means, colours)

    # From 0, or a small difference would look like a large one.
    axis.set_ylim(0, None)
    axis.set_xlabel(xlabel)
    axis.set_title(title)
    plt.show()


def draw_fid(by_encoder):
    """FID against the patch side. by_encoder: {name: {p: FID}}."""
    axis = one_panel(9, 4.2)
    colours = (DARK, ORANGE)
    for name, colour in zip(by_encoder, colours):
        by_side = by_encoder[name]

        # Every place says what it costs: the side, and how many vectors that leaves.
        places = []
        for p in by_side:
            vectors = (32 // p) ** 2        # a latent of the paper's is 32 x 32
            places.append(f"{p}×{p}\n{vectors} vectors")
        fids = list(by_side.values())
        axis.plot(places, fids, marker="o", markersize=9,
                  color=colour, label=name)

    # From 0: that one line stays flat while the other doubles is the result.
    axis.set_ylim(0, 50)
    axis.set_title("FID of the paper's Table 4: lower is better")
    axis.legend()
    plt.show()


# --------------------------------------------------------------------- notebook 4: a small space
def draw_latents(pixels, latents):
    """Pictures above their latents, channel by channel.
    pixels (n, h, w, 3) uint8; latents (n, 4, h/f, w/f)."""
    n = len(pixels)
    side = WIDTH / n                        # inches, of one picture
    height = 2 * side + 0.4
    _, axes = plt.subplots(2, n, figsize=(WIDTH, height))

    # Each latent stands below its picture, in the same size: one can still find the objects.
    for k in range(n):
        axes[0, k].imshow(pixels[k])
        show_latents(axes[1, k], latents[k])
    for axis in axes.flat:
        bare(axis)
    axes[0, 0].set_ylabel("pixels")
    axes[1, 0].set_ylabel("latents")
    plt.show()


def draw_channels(raw, normalised):
    """How the numbers of each latent channel are spread, before and after shift and scale.
    raw, normalised: (M, z, h, w)."""
    # Both panels share their axes: one can see that a channel was moved, and made narrower.
    axes = panels(2, 3.8, sharex=True, sharey=True)
    cases = {"latents, raw": raw, "latents, (z − shift) / scale": normalised}
    bins = {"bins": 120, "range": (-8, 6), "density": True}
    y = torch.linspace(-8, 6, 300)
    for axis, title in zip(axes, cases):
        # Outlines: four filled histograms would hide one another.
        channels = cases[title].unbind(1)                   # each (M, h, w)
        for k, channel in enumerate(channels):
            numbers = channel.flatten().numpy()
            axis.hist(numbers, **bins,
                      histtype="step", linewidth=2, label=f"channel {k}")

        # What the noise is made for: mean 0, deviation 1. The channels' peaks are cut off, or the
        # bell would look flat.
        axis.plot(y, bell(y), ":",
                  color="black", label="N(0, 1)")
        axis.set_ylim(0, 1)
        axis.set_yticks([])
        axis.set_title(title)
    axes[0].legend(loc="upper right", fontsize=11)
    plt.show()


def draw_snr(snr, sizes):
    """The signal-to-noise ratio against t of latents of several sizes.
    snr: (T + 1,), for latents of mean square 1; sizes: {name: mean square}."""
    axis = one_panel(9, 4)
    last = len(snr) - 1
    times = range(1, last)                  # without the ends, where it is infinite or 0
    colours = (GREEN, RED)
    # Where each label stands: (side, x, y) from the point, off both curves.
    places = (("right", -15, 0.3), ("left", 15, 2.0))
    for name, colour, place in zip(sizes, colours, places):
        # Larger latents: the same curve, higher at every t.
        curve = sizes[name] * snr[1:-1]
        axis.plot(times, curve,
                  color=colour, label=name)

        # Where it crosses 1, picture and noise are equally strong. With larger latents this point
        # moves to the right: more steps are spent where hardly anything is hidden.
        stronger = curve >= 1
        even = int(stronger.sum())          # the last t where the picture is as strong
        axis.plot(even, 1, "o",
                  color=colour, markersize=10)
        side, dx, y = place
        write(axis, even + dx, y, f"t = {even}",
              ha=side, color=colour)

    axis.axhline(1, color=GREY, linewidth=1)
    axis.set_yscale("log")
    axis.set_ylim(1e-3, 1e3)
    axis.set_xlabel("t")
    axis.set_title("signal-to-noise ratio")
    axis.legend()
    plt.show()


def draw_codebooks(runs, points):
    """Points, and the codes that were learned for them: used ones, and dead ones as crosses.
    runs: {title: (codebook (K, 2), uses (K,))}; points: (n, 2)."""
    axes = panels(len(runs), 6, sharey=True)
    few = points[:600]                      # as many as a picture can show
    for axis, title in zip(axes, runs):
        codebook, uses = runs[title]
        alive = codebook[uses > 0]
        dead = codebook[uses == 0]

        # The points lie in groups. A good codebook has a circle in each of them; a cross stands
        # where no point is nearest to it.
        axis.scatter(*few.T,
                     s=6, color=GREY, alpha=0.4)
        axis.scatter(*alive.T, label="used",
                     s=130, color=ORANGE, edgecolor="black")
        axis.scatter(*dead.T, label="dead",
                     s=110, color=RED, marker="x", linewidth=3)

        # How much of the codebook is alive: the number to watch in a run.
        used = len(alive)
        K = len(codebook)
        axis.set_title(f"{title}: {used} of {K} used")
        axis.set_aspect("equal")
        axis.legend(loc="upper right")
    plt.show()


def draw_answers(answers):
    """What a critic says during its training. answers: {name: one number per step}."""
    axis = one_panel(9, 3.8)
    first = next(iter(answers.values()))
    steps = range(len(first))
    plot_curves(axis, steps, answers, (GREEN, RED))

    # The dotted lines are the margins of the hinge loss: an answer beyond its own costs nothing.
    # So once all answers are there, the two curves go no further.
    for margin in (-1, 1):
        axis.axhline(margin, color=GREY, linestyle=":")
    axis.set_xlabel("step")
    axis.set_title("the critic's answer: above 0 means real")
    plt.show()
