"""
figures_0.py: what notebooks 0 and 1 draw

THE IDEA    As in figures.py, one function per picture. A notebook takes this module under the name
            `figures`. So all of figures.py is imported here: what the notebooks share.
SHAPES      tokens, image_id, doc_id (1, T); a mask (T, T) bool; latents (M, c, h, w)
HERE        Every `draw_...` calls plt.show() once, at its end.
TEST        tests/test_notebooks.py
"""
import contextlib
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
from figures import *

import data


# ---------------------------------------------------------- notebook 0: one sequence, one forward
def draw_sequence(sequence, tokenizer):
    """One laid-out document as a row of boxes: words dark, patches orange.
    sequence: data.Sequence; tokenizer: data.Words."""
    labels = name_positions(sequence.tokens, sequence.image_id, tokenizer)
    axis = one_panel(WIDTH, 2.3)
    for pos, label in enumerate(labels):
        picture = sequence.image_id[pos]
        colour = ORANGE if picture >= 0 else DARK
        fill(axis, pos, 0.5, 0.94, 1, colour)
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
    last = axes[3]
    show_numbers(last, vectors[0], aspect="auto")
    last.set(xlabel="D", ylabel="P")
    titles = ("pixels", "latents x0,\n4 channels", f"xt, t = {int(t)}", "vectors")
    for axis, title in zip(axes, titles):
        axis.set(xticks=[], yticks=[])
        axis.set_title(title)
    plt.show()


def draw_row(x, labels, image_id):
    """The row of vectors that the transformer reads.
    x (1, T, D); labels: T str; image_id (1, T)."""
    axis = one_panel(WIDTH, 4.6)
    show_numbers(axis, x[0], most=1.5, aspect="auto")
    axis.set_yticks(range(len(labels)), labels)
    for tick, picture in zip(axis.get_yticklabels(), image_id[0]):
        colour = ORANGE if picture >= 0 else DARK
        tick.set_color(colour)
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
    probabilities = logits[0].softmax(0)                    # (V,)
    words.bar(range(V), probabilities, color=DARK)
    # Whoever knows nothing gives every word the same.
    alike = 1 / V
    words.axhline(alike, color=ORANGE, label=f"1 / V = {alike:.3f}")
    words.set(xlabel="word", title="the next word after BOS: probabilities")
    words.legend(loc="lower right", frameon=True)
    show_latents(noise, out[0])
    noise.set(xticks=[], yticks=[], title="the predicted noise: all 0")
    plt.show()


def draw_loudness(scales, lm, ddpm, V):
    """First losses against the deviation of the outputs: derived lines, measured points.
    scales, lm, ddpm: as many numbers each."""
    words, pictures = panels(2, 3.8)
    sigma = np.linspace(0, max(scales), 50)
    # 1. Words: random logits add half their variance to ln V.
    nothing = np.log(V)
    derived = nothing + sigma ** 2 / 2
    words.plot(sigma, derived, color=GREY, label="ln V + σ²/2, derived")
    words.plot(scales, lm, "o", color=DARK, markersize=9, label="measured")
    words.axhline(nothing, color=GREEN, linestyle="--", label="ln V: knows nothing")
    words.set(title="first LM loss", xlabel="σ, deviation of the logits")
    # 2. Pictures: what is said at random adds its own variance to that of the noise, 1.
    derived = 1 + sigma ** 2
    pictures.plot(sigma, derived, color=GREY, label="1 + σ², derived")
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
    beside = T - 0.2                        # x, at the right of the square
    axis.text(beside, -1.1, "lo .. hi", va="center")
    intervals = zip(lo[0].tolist(), hi[0].tolist())
    for q, (first, last) in enumerate(intervals):
        # Red: it may look ahead, at the rest of its own picture.
        colour = RED if last > q else "black"
        interval = f"{first} .. {last}"
        axis.text(beside, q, interval, va="center", color=colour)
    plt.show()


def draw_packed(batch, tokenizer):
    """The mask of a packed row, with the name of each document beside its triangle.
    batch: data.Batch of one row; tokenizer: data.Words."""
    tokens = batch.tokens[0].tolist()
    image_id = batch.image_id[0].tolist()
    labels = name_positions(tokens, image_id, tokenizer)
    axis = one_panel(10, 9.8)
    show_mask(axis, batch.image_id, batch.doc_id, labels, fontsize=11)
    doc_id = batch.doc_id[0]
    for k in doc_id.unique().tolist():
        places = (doc_id == k).nonzero().flatten().tolist()
        first = places[0]
        last = places[-1]
        name = f"document {k}"
        if tokens[first] == data.PAD:
            name = "padding"
        # At the right of its triangle, as long as there is room.
        at_right = last < len(labels) - 10
        x = last + 1 if at_right else first - 1
        side = "left" if at_right else "right"
        middle = (first + last) / 2
        write(axis, x, middle, name, ha=side, color=GREY, fontsize=15)
    plt.show()


def draw_weights(weights, titles, labels):
    """Attention weights, one square per title. weights: list of (T, T); rows sum to 1."""
    axes = panels(len(weights), 6)
    for axis, weight, title in zip(axes, weights, titles):
        image = axis.imshow(weight, cmap="Blues", vmin=0, vmax=0.5)
        label_square(axis, labels)
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
        image = show_changes(axis, change[None], aspect="auto")
        changed_too = change > 1e-5         # less is rounding
        must_not = changed_too & ~right
        for k in must_not.nonzero().flatten().tolist():
            corner = (k - 0.46, -0.44)
            look = {"fill": False, "edgecolor": RED, "linewidth": 3}
            box = plt.Rectangle(corner, 0.92, 0.88, **look)
            axis.add_patch(box)
        should_have = right & ~changed_too
        for k in should_have.nonzero().flatten().tolist():
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
    show_changes(network, influence)
    label_square(network, labels)
    network.set(xlabel="who was changed", ylabel="who noticed")
    network.set_title("measured in the network", loc="left")
    show_mask(mask, image_id, doc_id, labels)
    mask.set_title("the mask", loc="left")
    plt.show()
