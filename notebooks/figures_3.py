"""
figures_3.py: what notebooks 3 and 4 draw

THE IDEA    As in figures.py, one function per picture. A notebook takes this module under the name
            `figures`. So all of figures.py is imported here: what the notebooks share.
SHAPES      pictures (M, h, w, 3) uint8; latents (M, c, h, w); vectors (M, P, D)
HERE        Every `draw_...` calls plt.show() once, at its end.
TEST        tests/test_notebooks.py
"""
import matplotlib.pyplot as plt
import numpy as np
import torch
from figures import *


# ---------------------------------------------------- notebook 3: a picture becomes a few vectors
def draw_cuts(picture, sides):
    """The same picture cut into patches of several sides. picture: (h, w, 3) uint8."""
    h, w, _ = picture.shape
    for axis, p in zip(panels(len(sides), 3.5), sides):
        axis.imshow(picture, extent=(0, w, h, 0))
        cut_lines(axis, range(0, h + 1, p), linewidth=0.6)
        patches = (h // p) * (w // p)
        axis.set_title(f"p = {p}: {patches:,} patches")
        bare(axis)
    plt.show()


def draw_owners(owners):
    """Which vector holds which pixel of the first channel. owners: {title: (h, w) int}."""
    axes = panels(len(owners), 5.8)
    for axis, (title, owner) in zip(axes, owners.items()):
        axis.imshow(owner, cmap="tab20", vmin=0, vmax=19)
        for k in owner.unique().tolist():
            pixels = (owner == k).nonzero().float()
            y, x = pixels.mean(0).tolist()                  # their middle
            write(axis, x, y, k, fontsize=15)
        axis.set_title(title)
        bare(axis)
    plt.show()


def draw_raster(picture, p):
    """A picture with the number of each patch, in raster order. picture: (h, w, 3) uint8."""
    h, w, _ = picture.shape
    columns = w // p
    axis = one_panel(5, 5)
    darker = picture // 2 + 30              # so that numbers stand out
    axis.imshow(darker, extent=(0, w, h, 0))
    cut_lines(axis, range(0, h + 1, p), linewidth=1)
    for k in range(h // p * columns):
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
    axis = one_panel(WIDTH, 3.8)
    last = step * (n - 1)                   # the largest t
    image = show_numbers(axis, waves.T, most=1, aspect="auto", extent=(0, last, numbers, 0))
    axis.set(xlabel="t", ylabel="sines, then cosines", title="a column is the code of one t")
    plt.colorbar(image)
    plt.show()


def draw_told(times, losses_by_t):
    """The loss of a trained model that is told a t, against that t.
    losses_by_t: {true t: one loss per told t}."""
    axis = one_panel(9, 4.2)
    colours = (GREEN, ORANGE, DARK)
    for (true, curve), colour in zip(losses_by_t.items(), colours):
        axis.plot(times, curve, marker="o", color=colour, label=f"true t = {true}")
        axis.axvline(true, color=colour, linestyle=":")
    axis.set(xlabel="the t that the model is told", title="diffusion loss", ylim=(0, None))
    axis.legend(loc="upper center", frameon=True)           # it stands on a dotted line
    plt.show()


def draw_reach(reaches, pixel, p):
    """Which vectors change when one latent pixel does.
    reaches: {title: (P,)}, relative changes; pixel: (y, x); p: patch side."""
    _, axes = plt.subplots(1, len(reaches), figsize=(10, 4.2))
    y, x = pixel
    for axis, (title, change) in zip(axes, reaches.items()):
        side = int(len(change) ** 0.5)                      # patches per row
        h = side * p
        square = change.view(side, side)
        image = show_changes(axis, square, least=-4, extent=(0, h, h, 0))
        cut_lines(axis, range(0, h + 1, p), linewidth=1)
        axis.plot(x + 0.5, y + 0.5, "s", color=RED, markersize=14)
        axis.set_title(title)
        bare(axis)
    plt.colorbar(image, ax=axes, label="change, log10")
    plt.show()


def arrow(axis, start, end, colour=DARK, style="-"):
    """An arrow from one point to another."""
    look = {"arrowstyle": "->", "color": colour, "linewidth": 2, "linestyle": style}
    axis.annotate("", xy=end, xytext=start, arrowprops=look)


def draw_unet(latent, skips, vectors):
    """The U-Net as a U: the way down, the transformer, the way up, and the skips between.

    latent    (c, h, w)
    skips     list of (C, h, w), from first to last
    vectors   (P, D)"""
    axis = one_panel(WIDTH, 6.2)
    left = 2                                # x of the way down
    right = 10                              # x of the way up
    depth = 1.25                            # from one size to the next
    bottom = -depth * len(skips)

    def box(x, y, text, colour, width=2.6):
        fill(axis, x, y, width, 0.64, colour)
        write(axis, x, y, text, color="white", fontsize=13)

    # 1. In and out.
    box(left, 0.9, f"xt {latent}", GREY)
    box(right, 0.9, f"predicted noise {latent}", GREY, width=3.4)
    arrow(axis, (left, 0.55), (left, 0.35))
    arrow(axis, (right, 0.35), (right, 0.55))

    # 2. Each size: a block on either way, a skip between them, and the time into both.
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

    # 3. From one size to the next.
    for k in range(len(skips) - 1):
        y = -depth * k
        arrow(axis, (left, y - 0.35), (left, y - 0.9))
        arrow(axis, (right, y - 0.9), (right, y - 0.35))
        write(axis, 2.2, y - 0.63, "half the size", ha="left", fontsize=12)
        write(axis, 9.8, y - 0.63, "twice the size", ha="right", fontsize=12)

    # 4. The transformer below.
    P, D = vectors
    box(6, bottom, f"transformer: {P} vectors of {D}", DARK, width=4.6)
    arrow(axis, (left, bottom + 0.9), (3.6, bottom + 0.1))
    arrow(axis, (8.4, bottom + 0.1), (right, bottom + 0.9))
    axis.set(xlim=(-0.3, 12.3), ylim=(bottom - 0.5, 1.4))
    axis.axis("off")
    plt.show()


def draw_curves(curves, title, xlabel="step", smooth=10):
    """Losses against the step, each the mean of the last few. curves: {name: list of numbers}."""
    axis = one_panel(9, 4.2)
    window = np.ones(smooth) / smooth
    colours = (DARK, ORANGE, RED, GREEN)
    means = {}
    for name, curve in curves.items():
        means[name] = np.convolve(curve, window, mode="valid")
        steps = range(smooth, len(curve) + 1)               # all curves are of one length
    plot_curves(axis, steps, means, colours)
    axis.set(xlabel=xlabel, title=title, ylim=(0, None))
    plt.show()


def draw_fid(by_encoder):
    """FID against the patch side. by_encoder: {name: {p: FID}}."""
    axis = one_panel(9, 4.2)
    for (name, by_side), colour in zip(by_encoder.items(), (DARK, ORANGE)):
        places = []
        for p in by_side:
            vectors = (32 // p) ** 2        # a latent is 32 x 32
            places.append(f"{p}×{p}\n{vectors} vectors")
        fids = list(by_side.values())
        axis.plot(places, fids, marker="o", markersize=9, color=colour, label=name)
    axis.set(title="FID of the paper's Table 4: lower is better", ylim=(0, 50))
    axis.legend()
    plt.show()


# --------------------------------------------------------------------- notebook 4: a small space
def draw_latents(pixels, latents):
    """Pictures above their latents, channel by channel.
    pixels (n, h, w, 3) uint8; latents (n, 4, h/f, w/f)."""
    n = len(pixels)
    side = WIDTH / n                        # inches, of one picture
    _, axes = plt.subplots(2, n, figsize=(WIDTH, 2 * side + 0.4))
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
    axes = panels(2, 3.8, sharex=True, sharey=True)
    titles = ("latents, raw", "latents, (z − shift) / scale")
    bins = {"bins": 120, "range": (-8, 6), "density": True}
    outline = {"histtype": "step", "linewidth": 2}
    y = torch.linspace(-8, 6, 300)
    for axis, latents, title in zip(axes, (raw, normalised), titles):
        for k, channel in enumerate(latents.unbind(1)):
            numbers = channel.flatten().numpy()
            axis.hist(numbers, label=f"channel {k}", **bins, **outline)
        axis.plot(y, bell(y), color="black", linestyle=":", label="N(0, 1)")
        axis.set(title=title, yticks=[], ylim=(0, 1))
    axes[0].legend(loc="upper right", fontsize=11)
    plt.show()


def draw_snr(snr, sizes):
    """The signal-to-noise ratio against t of latents of several sizes.
    snr: (T + 1,), for latents of mean square 1; sizes: {name: mean square}."""
    axis = one_panel(9, 4)
    times = range(1, len(snr) - 1)          # without the ends, where it is infinite or 0
    # Where each label stands: (side, x, y) from the point, off both curves.
    places = (("right", -15, 0.3), ("left", 15, 2.0))
    looks = zip(sizes.items(), (GREEN, RED), places)
    for (name, size), colour, (side, dx, y) in looks:
        curve = (snr * size)[1:-1]
        axis.plot(times, curve, color=colour, label=name)
        even = int((curve >= 1).sum())      # the last t where the picture is as strong
        axis.plot(even, 1, "o", color=colour, markersize=10)
        write(axis, even + dx, y, f"t = {even}", ha=side, color=colour)
    axis.axhline(1, color=GREY, linewidth=1)
    axis.set(xlabel="t", yscale="log", ylim=(1e-3, 1e3), title="signal-to-noise ratio")
    axis.legend()
    plt.show()


def draw_codebooks(runs, points):
    """Points, and the codes that were learned for them: used ones, and dead ones as crosses.
    runs: {title: (codebook (K, 2), uses (K,))}; points: (n, 2)."""
    axes = panels(len(runs), 6, sharey=True)
    few = points[:600]                      # as many as a picture can show
    for axis, (title, (codebook, uses)) in zip(axes, runs.items()):
        alive = codebook[uses > 0]
        dead = codebook[uses == 0]
        circle = {"s": 130, "color": ORANGE, "edgecolor": "black"}
        cross = {"s": 110, "color": RED, "marker": "x", "linewidth": 3}
        axis.scatter(*few.T, s=6, color=GREY, alpha=0.4)
        axis.scatter(*alive.T, label="used", **circle)
        axis.scatter(*dead.T, label="dead", **cross)
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
    plot_curves(axis, range(len(first)), answers, (GREEN, RED))
    for margin in (-1, 1):                  # an answer beyond it costs nothing
        axis.axhline(margin, color=GREY, linestyle=":")
    axis.set(xlabel="step", title="the critic's answer: above 0 means real")
    plt.show()
