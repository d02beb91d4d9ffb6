"""
figures.py: what the notebooks draw and check, so that their cells hold ideas

THE IDEA    A cell of a notebook says one thing and shows what it means. The fifteen lines of
            matplotlib that show it are here. `draw_...` draws one picture and shows it; `expect`
            prints a number that we derived beside the number that we see.
A PICTURE   cell    lo, hi = intervals(image_id, doc_id)
                    figures.draw_interval(lo, hi, image_id, doc_id, labels)
            below   one picture
SHAPES      as in the modules: tokens, image_id, doc_id (1, T); a mask (T, T) bool;
            pictures (M, h, w, 3) uint8; latents (M, c, h, w)
HERE        Every `draw_...` calls plt.show() once. tests/test_notebooks.py counts on it: a cell
            has as many pictures below it as it has calls of `draw_...`.
TEST        tests/test_notebooks.py
"""
import contextlib
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap

import data
from attention_mask import draw_mask
from support.figures import grid

# One meaning per colour, in all notebooks.
DARK = "#34495e"                            # words; what is plain, or known
ORANGE = "#e67e22"                          # patches; what the page is about
RED = "#e74c3c"                             # wrong
GREEN = "#27ae60"                           # right
GREY = "#95a5a6"                            # beside the point

WIDTH = 12                                  # inches, of a picture as wide as the page

# Large enough to be read from the last row of a lecture hall.
STYLE = {
    "figure.dpi": 80,
    "figure.constrained_layout.use": True,
    "font.size": 14,
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "lines.linewidth": 2,
    "image.interpolation": "nearest",
}


# ------------------------------------------------------------------------- for all the notebooks
def start(*modules):
    """Set the style of all pictures, and print the first sentence of each module: what the page is
    about. modules: those that the notebook explains."""
    plt.rcParams.update(STYLE)
    torch.set_num_threads(1)                # models this small only wait for a second thread
    for module in modules:
        headline, _, _ = module.__doc__.strip().partition("\n\n")
        print(" ".join(headline.split()))


def expect(what, expected, seen, within=0):
    """Print a number that we derived beside the number that we see.

    what        what it is a number of
    expected    int or float, derived
    seen        int, float or a tensor with one element, measured
    within      how far apart they may be"""
    if isinstance(seen, torch.Tensor):
        seen = seen.item()
    close = abs(expected - seen) <= within
    print(f"{what}: we expect {digits(expected)}, we see {digits(seen)}, match: {close}")


def digits(number):
    """A number as text: 16,384 or 0.976."""
    if isinstance(number, int):
        return f"{number:,}"
    return f"{number:.3f}"


def name_positions(tokens, image_id, tokenizer):
    """What to write at each position, a list of T str: words as they are, patches as p0 p1 ... of
    the first picture, q0 q1 ... of the second.

    tokens, image_id    lists of T int
    tokenizer           data.Words"""
    labels = []
    so_far = {}                             # how many patches each picture has until here
    for token, picture in zip(tokens, image_id):
        word = tokenizer.vocabulary[token]
        if picture >= 0:
            k = so_far.get(picture, 0)
            so_far[picture] = k + 1
            labels.append("pqrs"[picture] + str(k))
        elif token < len(data.SPECIAL):
            labels.append(word.strip("<>").upper())
        else:
            labels.append(word)
    return labels


# ---------------------------------------------------------------------------- parts of a picture
def panels(n, height, **options):
    """A list of n axes side by side, as wide as the page. height: in inches."""
    _, axes = plt.subplots(1, n, figsize=(WIDTH, height), squeeze=False, **options)
    return list(axes[0])


def one_panel(width, height):
    """The axes of a picture of its own. width, height: in inches."""
    _, axis = plt.subplots(figsize=(width, height))
    return axis


def bare(axis):
    """No ticks, no frame: for pictures."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def write(axis, x, y, text, **look):
    """A text whose middle is at (x, y)."""
    axis.text(x, y, text, **{"ha": "center", "va": "center", **look})


def fill(axis, x, y, width, height, colour):
    """A filled box whose middle is at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    axis.add_patch(plt.Rectangle(corner, width, height, color=colour))


def cut_lines(axis, positions, **look):
    """Horizontal and vertical lines, the cuts between patches."""
    for k in positions:
        axis.axhline(k, color=GREY, **look)
        axis.axvline(k, color=GREY, **look)


def tile_channels(x):
    """The channels of a latent picture side by side in two rows, (2 h, c/2 w). x: (c, h, w)."""
    top, bottom = x.chunk(2)
    rows = [torch.cat(list(half), dim=1) for half in (top, bottom)]
    return torch.cat(rows, dim=0)


def show_latents(axis, x):
    """The four channels of latents x (4, h, w), with lines between."""
    _, h, w = x.shape
    axis.imshow(tile_channels(x), cmap="RdBu", vmin=-3, vmax=3)
    axis.axhline(h - 0.5, color="black", linewidth=1.5)
    axis.axvline(w - 0.5, color="black", linewidth=1.5)


def show_mask(axis, image_id, doc_id, labels, fontsize=12):
    """The mask of attention_mask.draw_mask with larger labels. image_id, doc_id: (1, T)."""
    draw_mask(image_id[0], doc_id[0], labels, axis)
    axis.tick_params(labelsize=fontsize)


def log_change(change):
    """log10 of relative changes, for a colour scale."""
    return change.clamp(min=1e-4).log10()


def draw_pictures(pictures, titles=None, row_names=None, columns=None):
    """Pictures in rows.

    pictures    list of (h, w, 3) uint8
    titles      list of str, over the first ones; or None
    row_names   one str per row, or None
    columns     how many in a row; None: all"""
    columns = columns or len(pictures)
    rows = -(-len(pictures) // columns)     # rounded up
    side = min(2.6, 11 / columns)
    size = (side * columns + 0.3, side * rows + 0.4)
    _, axes = plt.subplots(rows, columns, squeeze=False, figsize=size)
    for axis in axes.flat:
        bare(axis)
    for axis, picture in zip(axes.flat, pictures):
        axis.imshow(picture)
    for axis, title in zip(axes.flat, titles or []):
        axis.set_title(title, fontsize=13)
    for axis, name in zip(axes[:, 0], row_names or []):
        axis.set_ylabel(name)
    plt.show()


# ---------------------------------------------------------- notebook 0: one sequence, one forward
def draw_sequence(sequence, tokenizer):
    """One laid-out document as a row of boxes: words dark, patches orange.
    sequence: data.Sequence; tokenizer: data.Words."""
    labels = name_positions(sequence.tokens, sequence.image_id, tokenizer)
    axis = one_panel(WIDTH, 2.3)
    for pos, label in enumerate(labels):
        picture = sequence.image_id[pos]
        fill(axis, pos, 0.5, 0.94, 1, ORANGE if picture >= 0 else DARK)
        write(axis, pos, 1.4, pos, color=GREY)
        write(axis, pos, 0.5, label, color="white", fontsize=13)
        write(axis, pos, -0.4, picture)
        if sequence.has_loss[pos]:
            write(axis, pos, -1.0, "x")

    heights = {"pos": 1.4, "token": 0.5, "image_id": -0.4, "has_loss": -1.0}
    for name, y in heights.items():
        write(axis, -0.8, y, name, ha="right", color=DARK)
    axis.set(xlim=(-2.4, len(labels) - 0.4), ylim=(-1.4, 1.8))
    axis.axis("off")
    plt.show()


def draw_way(pixels, x0, xt, vectors, t):
    """The way of one picture: pixels, latents, noisy latents, vectors.
    pixels (h, w, 3) uint8; x0, xt (1, 4, h, w); vectors (1, P, D)."""
    axes = panels(4, 3.4, width_ratios=[1, 1, 1, 1.7])
    axes[0].imshow(pixels)
    show_latents(axes[1], x0[0])
    show_latents(axes[2], xt[0])
    axes[3].imshow(vectors[0], cmap="RdBu", vmin=-3, vmax=3, aspect="auto")
    axes[3].set(xlabel="D", ylabel="P")
    titles = ("pixels", "latents x0,\n4 channels", f"xt, t = {int(t)}", "vectors")
    for axis, title in zip(axes, titles):
        axis.set(xticks=[], yticks=[])
        axis.set_title(title)
    plt.show()


def draw_row(x, labels, image_id):
    """The row of vectors that the transformer reads.
    x (1, T, D); labels: T str; image_id (1, T)."""
    axis = one_panel(WIDTH, 4.6)
    axis.imshow(x[0], cmap="RdBu", vmin=-1.5, vmax=1.5, aspect="auto")
    axis.set_yticks(range(len(labels)), labels)
    for tick, picture in zip(axis.get_yticklabels(), image_id[0]):
        tick.set_color(ORANGE if picture >= 0 else DARK)
    axis.set_xlabel("D, the width")
    axis.set_title("one row per position: words dark, patches orange")
    plt.show()


def draw_one_mask(image_id, doc_id, labels):
    """Who may look at whom, for one row. image_id, doc_id (1, T); labels: T str."""
    axis = one_panel(6.4, 6.4)
    show_mask(axis, image_id, doc_id, labels)
    axis.set_title("dark: causal    orange: the same picture")
    plt.show()


@contextlib.contextmanager
def print_shapes(blocks):
    """While it lasts, every part of the first block, and every other block, prints its name and the
    shape of what it gives. blocks: nn.ModuleList."""
    handles = []
    for name, part in blocks.named_modules():
        number, _, inside = name.partition(".")
        # The parts of the other blocks are the same again.
        if name and (number == "0" or not inside):
            handles.append(part.register_forward_hook(partial(print_shape, name)))
    yield
    for handle in handles:
        handle.remove()


def print_shape(name, part, inputs, output):
    """A hook: one line on what a part of a network gives."""
    kind = type(part).__name__
    print(f"{name:12s} {kind:10s} {tuple(output.shape)}")


def draw_first_answers(logits, out, V):
    """What an untrained model answers: probabilities of the next word at one position, and the
    predicted noise. logits (n, V); out (1, 4, h, w)."""
    words, noise = panels(2, 3.4, width_ratios=[2.6, 1])
    words.bar(range(V), logits[0].softmax(0), color=DARK)
    words.axhline(1 / V, color=ORANGE, label=f"1 / V = {1 / V:.3f}")
    words.set(xlabel="word", title="the next word after BOS: probabilities")
    words.legend(loc="lower right", frameon=True)
    show_latents(noise, out[0])
    noise.set(xticks=[], yticks=[], title="the predicted noise: all 0")
    plt.show()


def draw_loudness(scales, lm, ddpm, V):
    """First losses against the deviation of the outputs: derived lines, measured points.
    scales, lm, ddpm: as many numbers each."""
    fine = np.linspace(0, max(scales), 50)
    words, pictures = panels(2, 3.8)
    words.plot(fine, np.log(V) + fine ** 2 / 2, color=GREY, label="ln V + σ²/2, derived")
    words.plot(scales, lm, "o", color=DARK, markersize=9, label="measured")
    words.axhline(np.log(V), color=GREEN, linestyle="--", label="ln V: knows nothing")
    words.set(title="first LM loss", xlabel="σ, deviation of the logits")
    pictures.plot(fine, 1 + fine ** 2, color=GREY, label="1 + σ², derived")
    pictures.plot(scales, ddpm, "o", color=ORANGE, markersize=9, label="measured")
    pictures.axhline(1, color=GREEN, linestyle="--", label="1: says no noise")
    pictures.set(title="first diffusion loss", xlabel="σ, deviation of the output")
    for axis in (words, pictures):
        axis.legend(loc="upper left")
    plt.show()


# --------------------------------------------------------------- notebook 1: who may look at whom
def mark_differences(axis, mask, right):
    """Mark where a drawn mask is wrong: red cells are too much, red crosses are missing.
    mask, right: (T, T) bool."""
    too_much = mask & ~right
    missing = right & ~mask
    for q, k in too_much.nonzero().tolist():
        fill(axis, k, q, 1, 1, RED)
    for q, k in missing.nonzero().tolist():
        fill(axis, k, q, 1, 1, "white")
        axis.plot(k, q, "x", color=RED, markersize=9, markeredgewidth=2)


def draw_rules(rules, right, image_id, doc_id, labels):
    """Four masks, marked where they differ from the right one.
    rules: {title: (1, T, T) bool}; right: (1, T, T) bool."""
    _, axes = plt.subplots(2, 2, figsize=(WIDTH, 12.4))
    for axis, (title, mask) in zip(axes.flat, rules.items()):
        show_mask(axis, image_id, doc_id, labels)
        mark_differences(axis, mask[0], right[0])
        axis.set_title(title, loc="left", fontsize=15)
        axis.set(xlabel="", ylabel="")
    axes[1, 0].set(xlabel="... at whom", ylabel="who looks ...")
    plt.show()


def draw_interval(lo, hi, image_id, doc_id, labels):
    """The right mask, with hi as a stair and both numbers beside each position.
    lo, hi, image_id, doc_id: (1, T)."""
    T = len(labels)
    axis = one_panel(8, 7.2)
    show_mask(axis, image_id, doc_id, labels)
    # A step of the stair stands on the right edge of the last cell that q may look at.
    edges = np.arange(T + 1) - 0.5
    axis.stairs(hi[0] + 0.5, edges, orientation="horizontal", baseline=None, color=RED,
                linewidth=3)
    write(axis, 10.5, 2.5, "the stair is hi", color=RED, fontsize=16)
    axis.text(T - 0.2, -1.1, "lo .. hi", va="center")
    for q, (first, last) in enumerate(zip(lo[0].tolist(), hi[0].tolist())):
        colour = RED if last > q else "black"
        axis.text(T - 0.2, q, f"{first} .. {last}", va="center", color=colour)
    plt.show()


def draw_packed(batch, tokenizer):
    """The mask of a packed row, with the name of each document beside its triangle.
    batch: data.Batch of one row; tokenizer: data.Words."""
    labels = name_positions(batch.tokens[0].tolist(), batch.image_id[0].tolist(), tokenizer)
    axis = one_panel(10, 9.8)
    show_mask(axis, batch.image_id, batch.doc_id, labels, fontsize=11)
    for k in batch.doc_id[0].unique().tolist():
        places = (batch.doc_id[0] == k).nonzero().flatten().tolist()
        first = places[0]
        last = places[-1]
        name = f"document {k}"
        if batch.tokens[0, first] == data.PAD:
            name = "padding"
        # At the right of its triangle, as long as there is room.
        at_right = last < len(labels) - 10
        x = last + 1 if at_right else first - 1
        side = "left" if at_right else "right"
        write(axis, x, (first + last) / 2, name, ha=side, color=GREY, fontsize=15)
    plt.show()


def draw_weights(weights, titles, labels):
    """Attention weights, one square per title. weights: list of (T, T); rows sum to 1."""
    axes = panels(len(weights), 6)
    places = range(len(labels))
    for axis, weight, title in zip(axes, weights, titles):
        image = axis.imshow(weight, cmap="Blues", vmin=0, vmax=0.5)
        axis.set_xticks(places, labels, rotation=90, fontsize=12)
        axis.set_yticks(places, labels, fontsize=12)
        axis.set_title(title)
    plt.colorbar(image, ax=axes, shrink=0.7)
    plt.show()


def draw_who_noticed(noticed, right, labels, changed):
    """How much each position's result changed when one input did, one line per rule.

    noticed   {title: (T,)}, relative changes
    right     (T,) bool: who may notice
    changed   the position that was changed"""
    figure, axes = plt.subplots(len(noticed), 1, figsize=(WIDTH, 5.6), sharex=True)
    for axis, (title, change) in zip(axes, noticed.items()):
        heat = log_change(change)[None]
        image = axis.imshow(heat, cmap="Blues", vmin=-2.5, vmax=0, aspect="auto")
        heard = change > 1e-5               # less is rounding
        for k in (heard & ~right).nonzero().flatten().tolist():
            frame = plt.Rectangle((k - 0.46, -0.44), 0.92, 0.88, fill=False, edgecolor=RED,
                                  linewidth=3)
            axis.add_patch(frame)
        for k in (~heard & right).nonzero().flatten().tolist():
            axis.plot(k, 0, "x", color=RED, markersize=12, markeredgewidth=3)
        axis.set_yticks([])
        axis.set_title(title, loc="left")
    axes[-1].set_xticks(range(len(labels)), labels)
    figure.colorbar(image, ax=axes, label="change, log10")
    figure.suptitle(f"{labels[changed]} was changed. Who noticed?"
                    "    red frame: must not have    red cross: should have", fontsize=14)
    plt.show()


def draw_influence(influence, image_id, doc_id, labels):
    """Who noticed whom in the network, beside the mask. influence: (T, T)."""
    network, mask = panels(2, 6.2)
    places = range(len(labels))
    network.imshow(log_change(influence), cmap="Blues", vmin=-2.5, vmax=0)
    network.set_xticks(places, labels, rotation=90, fontsize=12)
    network.set_yticks(places, labels, fontsize=12)
    network.set(xlabel="who was changed", ylabel="who noticed")
    network.set_title("measured in the network", loc="left")
    show_mask(mask, image_id, doc_id, labels)
    mask.set_title("the mask", loc="left")
    plt.show()


# ----------------------------------------------------------------- notebook 2: noise in, noise out
def draw_schedules(ddpm, flow):
    """What is mixed with what, and the signal-to-noise ratio with three shifts.
    ddpm, flow: diffusion.Diffusion."""
    mixture, ratio = panels(2, 4.4)
    times = range(ddpm.T + 1)
    for process, colour, name in ((ddpm, DARK, "cosine"), (flow, ORANGE, "flow")):
        mixture.plot(times, process.a, color=colour, label=f"{name}: a, the picture")
        mixture.plot(times, process.s, "--", color=colour, label=f"{name}: s, the noise")
        for shift, style in ((1, "-"), (2, "--"), (4, ":")):
            # Without both ends, where the ratio is infinite or 0.
            snr = (process.a / process.s / shift).square()[1:-1]
            label = f"{name}, shift {shift}"
            ratio.plot(times[1:-1], snr.log10(), style, color=colour, label=label)
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
    for axis, (t, (xt, eps, mean_xt, mean_eps)) in zip(axes, panels_by_t.items()):
        few = slice(400)                    # as many as a picture can show
        axis.scatter(xt.flatten()[few], eps.flatten()[few], s=8, color=DARK, alpha=0.25,
                     label="pairs (xt, ε)")
        formula = network(fine.view(-1, 1, 1, 1), t).flatten()
        axis.plot(fine, formula, color=ORANGE, linewidth=3, label="formula")
        axis.plot(mean_xt, mean_eps, "o", color=RED, markersize=5, label="average of the pairs")
        axis.set(xlim=(-3, 3), ylim=(-3, 3), xlabel="xt", title=f"t = {t}")
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
    for axis, name in ((in_x0, "x0"), (in_eps, "ε")):
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
        bell = torch.exp(-(y - a * mean) ** 2 / (2 * variance))
        total += weight * bell / np.sqrt(2 * np.pi * variance)
    return total


def draw_paths(runs, process, world):
    """Paths of eight samples over the true density of xt, and where thousands of them end.

    runs      {title: (times (n,), paths (n, 8), ends (many,))}
    process   diffusion.Diffusion
    world     (means, dev, weights)"""
    y = torch.linspace(-3, 3, 200)
    columns = []
    for t in range(1000, -1, -20):
        columns.append(density(y, process.a[t], process.s[t], *world))
    background = torch.stack(columns, dim=1)
    axes = panels(6, 4.2, width_ratios=[3, 1] * 3, sharey=True)
    for axis, beside, title in zip(axes[::2], axes[1::2], runs):
        times, paths, ends = runs[title]
        axis.imshow(background, extent=(1000, 0, -3, 3), origin="lower", aspect="auto",
                    cmap=plt.get_cmap("Greys", 8), vmax=1)
        axis.plot(times, paths, linewidth=1.2, marker="." if len(times) < 50 else None)
        axis.set(xlim=(1000, 0), ylim=(-3, 3), xlabel="t", title=title, xticks=(1000, 500, 0))
        beside.hist(ends.numpy(), bins=60, range=(-3, 3), density=True, color=ORANGE,
                    orientation="horizontal")
        beside.plot(columns[-1], y, color=DARK)
        beside.axis("off")
    plt.show()


def draw_film(states, estimates, moments):
    """One picture on its way: x_t above, the estimate of x0 below.
    states, estimates: (n, h, w, 3) uint8; moments: n numbers."""
    _, axes = plt.subplots(2, len(moments), figsize=(WIDTH, 2.9))
    for k, t in enumerate(moments):
        axes[0, k].imshow(states[k])
        axes[1, k].imshow(estimates[k])
        axes[0, k].set_title(f"{t}", fontsize=13)
    for axis in axes.flat:
        bare(axis)
    axes[0, 0].set_ylabel("xt")
    axes[1, 0].set_ylabel("x0 guess")
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
    ends.hist(right_ends.numpy(), color=ORANGE, label="right", **bins)
    ends.hist(wrong_ends.numpy(), color=RED, label="wrong", histtype="step", linewidth=2, **bins)
    y = torch.linspace(-3, 3, 200)
    ends.plot(y, density(y, 1.0, 0.0, *world), color=DARK, label="wanted")
    ends.legend(fontsize=11)
    ends.set(title="one pixel", yticks=[])
    plt.show()


def draw_guided(points, kinds, dev):
    """Samples of the world of two pixels for several guidance weights.
    points: {w: (n, 2)}; kinds: (2, 2), the centres; dev: deviation within a kind."""
    axes = panels(len(points), 3.6, sharey=True)
    for axis, (w, found) in zip(axes, points.items()):
        for centre, colour in zip(kinds, (DARK, ORANGE)):
            for radius in (dev, 2 * dev):
                circle = plt.Circle(centre, radius, fill=False, color=colour, linewidth=2)
                axis.add_patch(circle)
        x, y = found.T
        axis.scatter(x[:300], y[:300], s=5, color=RED, alpha=0.5)
        axis.set(xlim=(-2.2, 2.8), ylim=(-2, 2), aspect="equal")
        mean = abs(x.mean())                # none is below 0 by more than chance
        axis.set_title(f"w = {w}\nmean {mean:.2f}, dev. {x.std():.2f}", fontsize=13)
    plt.show()


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
    for axis, (title, owner) in zip(panels(len(owners), 5.8), owners.items()):
        axis.imshow(owner, cmap="tab20", vmin=0, vmax=19)
        for k in owner.unique().tolist():
            y, x = (owner == k).nonzero().float().mean(0).tolist()      # the middle of its pixels
            write(axis, x, y, k, fontsize=15)
        axis.set_title(title)
        bare(axis)
    plt.show()


def draw_raster(picture, p):
    """A picture with the number of each patch, in raster order. picture: (h, w, 3) uint8."""
    h, w, _ = picture.shape
    columns = w // p
    axis = one_panel(5, 5)
    axis.imshow(picture // 2 + 30, extent=(0, w, h, 0))     # darker, so that numbers stand out
    cut_lines(axis, range(0, h + 1, p), linewidth=1)
    for k in range(h // p * columns):
        row, column = divmod(k, columns)
        write(axis, (column + 0.5) * p, (row + 0.5) * p, k, color="white", fontsize=17)
    bare(axis)
    axis.set_title("raster order")
    plt.show()


def draw_waves(waves, step):
    """The sines and cosines that code t.
    waves: (n, 2 * frequencies); step: from one t to the next."""
    n, numbers = waves.shape
    axis = one_panel(WIDTH, 3.8)
    image = axis.imshow(waves.T, cmap="RdBu", vmin=-1, vmax=1, aspect="auto",
                        extent=(0, step * (n - 1), numbers, 0))
    axis.set(xlabel="t", ylabel="sines, then cosines", title="a column is the code of one t")
    plt.colorbar(image)
    plt.show()


def draw_told(times, losses_by_t):
    """The loss of a trained model that is told a t, against that t.
    losses_by_t: {true t: one loss per told t}."""
    axis = one_panel(9, 4.2)
    for (true, curve), colour in zip(losses_by_t.items(), (GREEN, ORANGE, DARK)):
        axis.plot(times, curve, marker="o", color=colour, label=f"true t = {true}")
        axis.axvline(true, color=colour, linestyle=":")
    axis.set(xlabel="the t that the model is told", title="diffusion loss", ylim=(0, None))
    axis.legend(loc="upper center")
    plt.show()


def draw_reach(reaches, pixel, p):
    """Which vectors change when one latent pixel does.
    reaches: {title: (P,)}, relative changes; pixel: (y, x); p: patch side."""
    _, axes = plt.subplots(1, len(reaches), figsize=(10, 4.2))
    y, x = pixel
    for axis, (title, change) in zip(axes, reaches.items()):
        side = int(len(change) ** 0.5)                      # patches per row
        heat = log_change(change).view(side, side)
        image = axis.imshow(heat, cmap="Blues", vmin=-4, vmax=0,
                            extent=(0, side * p, side * p, 0))
        cut_lines(axis, range(0, side * p + 1, p), linewidth=1)
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
    for (name, curve), colour in zip(curves.items(), (DARK, ORANGE, RED, GREEN)):
        means = np.convolve(curve, window, mode="valid")
        steps = range(smooth, len(curve) + 1)
        axis.plot(steps, means, color=colour, label=name)
    axis.set(xlabel=xlabel, title=title, ylim=(0, None))
    axis.legend()
    plt.show()


def draw_fid(by_encoder):
    """FID against the patch side. by_encoder: {name: {p: FID}}."""
    axis = one_panel(9, 4.2)
    for (name, by_side), colour in zip(by_encoder.items(), (DARK, ORANGE)):
        places = [f"{p}×{p}\n{(32 // p) ** 2} vectors" for p in by_side]
        axis.plot(places, list(by_side.values()), marker="o", markersize=9, color=colour,
                  label=name)
    axis.set(title="FID of the paper's Table 4: lower is better", ylim=(0, 50))
    axis.legend()
    plt.show()


# --------------------------------------------------------------------- notebook 4: a small space
def draw_latents(pixels, latents):
    """Pictures above their latents, channel by channel.
    pixels (n, h, w, 3) uint8; latents (n, 4, h/f, w/f)."""
    n = len(pixels)
    _, axes = plt.subplots(2, n, figsize=(WIDTH, 2 * WIDTH / n + 0.4))
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
    y = np.linspace(-8, 6, 300)
    bell = np.exp(-y ** 2 / 2) / np.sqrt(2 * np.pi)
    for axis, latents, title in zip(axes, (raw, normalised), titles):
        for k, channel in enumerate(latents.unbind(1)):
            axis.hist(channel.flatten().numpy(), bins=120, range=(-8, 6), density=True,
                      histtype="step", linewidth=2, label=f"channel {k}")
        axis.plot(y, bell, color="black", linestyle=":", label="N(0, 1)")
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


def draw_codes(picture, codes, drawn):
    """A picture, the numbers of its codes, and the picture that they give.
    picture, drawn: (h, w, 3) uint8; codes: (h/f, w/f) int."""
    axes = panels(3, 4.4, width_ratios=[1, 1.2, 1])
    axes[0].imshow(picture)
    # The colour says only which codes are equal.
    shuffled = torch.randperm(int(codes.max()) + 1, generator=torch.Generator().manual_seed(0))
    axes[1].imshow(shuffled[codes], cmap="Pastel1")
    for y, row in enumerate(codes.tolist()):
        for x, code in enumerate(row):
            write(axes[1], x, y, code, fontsize=12)
    axes[2].imshow(drawn)
    for axis, title in zip(axes, ("a picture", "its 64 words", "drawn from the words")):
        axis.set_title(title)
        bare(axis)
    plt.show()


def draw_codebooks(runs, points):
    """Points, and the codes that were learned for them: used ones, and dead ones as crosses.
    runs: {title: (codebook (K, 2), uses (K,))}; points: (n, 2)."""
    axes = panels(len(runs), 6, sharey=True)
    for axis, (title, (codebook, uses)) in zip(axes, runs.items()):
        alive = codebook[uses > 0]
        dead = codebook[uses == 0]
        axis.scatter(*points[:600].T, s=6, color=GREY, alpha=0.4)
        axis.scatter(*alive.T, s=130, color=ORANGE, edgecolor="black", label="used")
        axis.scatter(*dead.T, s=110, color=RED, marker="x", linewidth=3, label="dead")
        axis.set_title(f"{title}: {len(alive)} of {len(codebook)} used")
        axis.set_aspect("equal")
        axis.legend(loc="upper right")
    plt.show()


def draw_answers(answers):
    """What a critic says during its training. answers: {name: one number per step}."""
    axis = one_panel(9, 3.8)
    for (name, values), colour in zip(answers.items(), (GREEN, RED)):
        axis.plot(values, color=colour, label=name)
    for margin in (-1, 1):                  # an answer beyond it costs nothing
        axis.axhline(margin, color=GREY, linestyle=":")
    axis.set(xlabel="step", title="the critic's answer: above 0 means real")
    axis.legend()
    plt.show()

# ----------------------------------------------------------------------- notebook 5: train one
def draw_batch(batch):
    """What a step sees, one panel per tensor: tokens, documents, noise levels.
    batch: data.Batch with t."""
    words = batch.tokens != data.PAD                                        # (B, T)
    markers = (batch.tokens == data.BOI) | (batch.tokens == data.EOI)
    patches = batch.image_id >= 0
    kind = words.int() + markers.int() + 2 * patches.int()                  # 0, 1, 2 or 3
    documents = torch.where(words, batch.doc_id.float(), torch.nan)
    level = torch.full(batch.tokens.shape, torch.nan)
    level[patches] = batch.t[batch.image_id[patches]].float()
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 5.4), sharex=True)
    axes[0].imshow(kind, cmap=ListedColormap(["white", GREY, DARK, ORANGE]), vmin=0, vmax=3,
                   aspect="auto")
    axes[1].imshow(documents, cmap="tab10", vmin=0, vmax=9, aspect="auto")
    image = axes[2].imshow(level, cmap="viridis", vmin=0, vmax=1000, aspect="auto")
    figure.colorbar(image, ax=axes[2], label="t", pad=0.01)
    titles = ("tokens: grey words, dark BOI and EOI, orange patches, white padding",
              "doc_id: one colour per document of a row",
              "t: one noise level per picture, the same for all its patches")
    for axis, title in zip(axes, titles):
        axis.set_title(title, loc="left")
        axis.set(yticks=range(len(kind)), ylabel="row")
    axes[2].set_xlabel("position")
    plt.show()


def draw_levels(after, before):
    """How often each noise level was drawn. after: t of the pictures that stand behind their
    captions, before: of those in front of them; each (n,)."""
    axes = panels(2, 3.2, sharex=True)
    cases = (("caption first", after, DARK), ("picture first", before, ORANGE))
    for axis, (title, t, colour) in zip(axes, cases):
        axis.hist(t.numpy(), bins=20, range=(0, 1000), color=colour)
        axis.set(title=f"{title}: {len(t)} pictures", xlabel="t", ylabel="how often")
    plt.show()


def draw_rate(steps, rates):
    """The learning rate against the step: two lists of as many numbers."""
    axis = one_panel(9, 3)
    axis.plot(steps, rates, color=ORANGE)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axis.set(xlabel="step", title="learning rate", ylim=(0, None))
    plt.show()


def draw_log(log):
    """Both losses of a run against the step. log: list of dicts, the lines of metrics.progress."""
    words, pictures = panels(2, 3.6)
    steps = [line["step"] for line in log]
    words.plot(steps, [line["lm"] for line in log], color=DARK)
    words.set(title="words: nats per word", xlabel="step", ylim=(0, None))
    pictures.plot(steps, [line["diffusion"] for line in log], color=ORANGE)
    pictures.set(title="pictures: diffusion loss", xlabel="step", ylim=(0, None))
    plt.show()


def draw_by_level(lines, simple):
    """The diffusion loss in five ranges of t, at several moments of a run.

    lines    dicts of its log
    simple   five numbers: the loss of one who knows only mean and deviation"""
    axis = one_panel(WIDTH, 4.2)
    for k, (line, colour) in enumerate(zip(lines, ("#bdc3c7", GREY, ORANGE))):
        places = np.arange(5) + 0.27 * (k - 1)
        axis.bar(places, line["by_t"], 0.25, color=colour, label=f"up to step {line['step']}")
    for k, level in enumerate(simple):
        axis.plot([k - 0.42, k + 0.42], [level, level], color=DARK)
    axis.plot([], [], color=DARK, label="ᾱ: knows mean and deviation")
    names = [f"t = {200 * k + 1} .. {200 * k + 200}" for k in range(5)]
    axis.set_xticks(range(5), names)
    axis.set(title="diffusion loss by noise level", ylim=(0, 1.35))
    axis.legend(ncols=2, loc="upper center")
    plt.show()


def draw_answers_to(captions, learned, drawn, right):
    """The pictures that were learned from, and below them what was drawn for their captions: in a
    green frame if it is what was asked for, in a red one if not.

    captions   n str              learned   (n, h, w, 3) uint8
    drawn      (k n, h, w, 3)     right     k n bools"""
    columns = len(captions)
    rows = 1 + len(drawn) // columns
    _, axes = plt.subplots(rows, columns, figsize=(8, 2 * rows + 0.4))
    for axis, picture, caption in zip(axes[0], learned, captions):
        axis.imshow(picture)
        axis.set_title(caption, fontsize=13)
        bare(axis)
    for axis, picture, good in zip(axes[1:].flat, drawn, right):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color=GREEN if good else RED, linewidth=4)
    axes[0, 0].set_ylabel("learned")
    for axis in axes[1:, 0]:
        axis.set_ylabel("drawn")
    plt.show()


def draw_worth(times, curves):
    """How much a caption is worth at each noise level. curves: {name: one number per t}."""
    axis = one_panel(WIDTH, 4.4)
    looks = {"ε": ORANGE, "flow": GREEN}
    for name, curve in curves.items():
        style = "--" if "shift" in name else "-"
        mean = sum(curve) / len(curve)
        colour = looks[name.partition(",")[0]]
        axis.plot(times, curve, style, color=colour, label=f"{name}: mean {mean:.4f}")
    axis.set(xlabel="t", title="what the caption can lower the loss by, pictures known by heart")
    axis.legend()
    plt.show()


def draw_runs(gaps, right):
    """The gap of several runs, and how many of 12 pictures were as asked. Both: {name: number}."""
    gap, asked = panels(2, 3.6)
    colours = [ORANGE if name.startswith("ε") else GREEN for name in gaps]
    for axis, numbers, form in ((gap, gaps, "{:.3f}"), (asked, right, "{} of 12")):
        axis.barh(list(numbers), list(numbers.values()), color=colours)
        for k, number in enumerate(numbers.values()):
            axis.text(number, k, " " + form.format(number), va="center")
        axis.invert_yaxis()
    gap.set(title="conditioning gap", xlim=(0, 1.3 * max(gaps.values())))
    asked.set(title="pictures as asked", xlim=(0, 15), yticks=[])
    plt.show()


def draw_read(times, nats, chance, limit):
    """What a caption costs behind a picture of noise t.

    nats     one number per t           chance   what it costs without any picture
    limit    the largest t of such pictures in training"""
    axis = one_panel(WIDTH, 4.2)
    axis.axvspan(limit, 1000, color=GREY, alpha=0.25, label="not in training")
    axis.plot(times, nats, "o-", color=DARK, label="caption, given the picture")
    axis.axhline(chance, color=ORANGE, linestyle="--", label="caption, given nothing")
    axis.set(xlabel="t of the picture in front of it", title="nats per caption", ylim=(0, None))
    axis.legend(loc="upper left")
    plt.show()
