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
    sequence: data.Sequence of T positions; tokenizer: data.Words."""
    labels = name_positions(sequence.tokens, sequence.image_id, tokenizer)
    axis = one_panel(WIDTH, 2.3)

    # Four lines of text, one below the other: y of each. The names stand at the left.
    heights = {"pos": 1.4, "token": 0.5, "image_id": -0.4, "has_loss": -1.0}
    for name, y in heights.items():
        write(axis, -0.8, y, name, ha="right", color=DARK)

    # One column per position. The boxes are the sequence; what we know of it stands around it.
    for pos, label in enumerate(labels):
        picture = sequence.image_id[pos]
        colour = ORANGE if picture >= 0 else DARK
        fill(axis, pos, heights["token"], 0.94, 1, colour)
        write(axis, pos, heights["pos"], pos, color=GREY)
        write(axis, pos, heights["token"], label,
              color="white", fontsize=13)
        write(axis, pos, heights["image_id"], picture)
        # A cross or nothing: the gaps, at BOI, the patches and EOS, are what there is to see.
        if sequence.has_loss[pos]:
            write(axis, pos, heights["has_loss"], "x")

    # At the left there is room for the names.
    T = len(labels)
    axis.set_xlim(-2.4, T - 0.4)
    axis.set_ylim(-1.4, 1.8)
    axis.axis("off")
    plt.show()


def draw_way(pixels, x0, xt, vectors, t):
    """The way of one picture: pixels, latents, noisy latents, vectors.
    pixels (h, w, 3) uint8; x0, xt (1, 4, h, w); vectors (1, P, D)."""
    axes = panels(4, 3.4, width_ratios=[1, 1, 1, 1.7])
    first, small, noisy, last = axes
    first.imshow(pixels)
    first.set_title("pixels")

    # Latents are no colours. Their four channels are drawn as four squares of numbers, the same
    # way before and after the noise: so one can see what of x0 is left in xt.
    show_latents(small, x0[0])
    small.set_title("latents x0,\n4 channels")
    show_latents(noisy, xt[0])
    noisy.set_title(f"xt, t = {int(t)}")

    # One row per patch: from here on a picture is a few vectors.
    show_numbers(last, vectors[0], aspect="auto")
    last.set_title("vectors")
    last.set_xlabel("D")
    last.set_ylabel("P")

    # No ticks: the colours are to be compared, not to be read off.
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    plt.show()


def draw_row(x, labels, image_id):
    """The row of vectors that the transformer reads.
    x (1, T, D); labels: T str; image_id (1, T)."""
    axis = one_panel(WIDTH, 4.6)
    show_numbers(axis, x[0], most=1.5, aspect="auto")       # the embeddings are small numbers
    axis.set_yticks(range(len(labels)), labels)

    # Only the labels tell a word from a patch: to the transformer a row is a row.
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
    # The title is the legend: a box with two colours would take more room.
    axis.set_title("dark: causal    orange: the same picture")
    plt.show()


@contextlib.contextmanager
def print_shapes(blocks):
    """While it lasts, every part of the first block, and every other block, prints its name and the
    shape of what it gives. blocks: nn.ModuleList."""
    handles = []
    for name, part in blocks.named_modules():
        number, _, inside = name.partition(".")
        # Of block 0 all parts. The parts of the other blocks would be the same again.
        wanted = number == "0" or not inside
        if name and wanted:
            say = partial(print_shape, name)
            handles.append(part.register_forward_hook(say))
    yield

    # The hooks go, or every later forward of the page would print as well.
    for handle in handles:
        handle.remove()


def print_shape(name, part, inputs, output):
    """A hook: print one line on what a part of a network gives.

    name            of the part in its network; PyTorch gives the rest
    part, inputs    the nn.Module, and what went into it
    output          the tensor that came out"""
    kind = type(part).__name__
    shape = tuple(output.shape)
    print(f"{name:12s} {kind:10s} {shape}")


def draw_first_answers(logits, out, V):
    """What an untrained model answers: probabilities of the next word at one position, and the
    predicted noise. logits (n, V); out (1, 4, h, w)."""
    words, noise = panels(2, 3.4, width_ratios=[2.6, 1])

    # 1. The words: bars that all end near one line. Who knows nothing gives every word the same.
    probabilities = logits[0].softmax(0)                    # (V,)
    words.bar(range(V), probabilities, color=DARK)
    alike = 1 / V
    name = f"1 / V = {alike:.3f}"
    words.axhline(alike, color=ORANGE, label=name)
    words.set_xlabel("word")
    words.set_title("the next word after BOS: probabilities")
    # The legend has a frame: it stands on the bars.
    words.legend(loc="lower right", frameon=True)

    # 2. The noise: white is 0, and all of it is white.
    show_latents(noise, out[0])
    noise.set_xticks([])
    noise.set_yticks([])
    noise.set_title("the predicted noise: all 0")
    plt.show()


def draw_loudness(scales, lm, ddpm, V):
    """First losses against the deviation of the outputs: derived lines, measured points.
    scales, lm, ddpm: n numbers each; V: words in the vocabulary."""
    words, pictures = panels(2, 3.8)
    loudest = max(scales)
    sigma = np.linspace(0, loudest, 50)
    measured = {"marker": "o", "linestyle": "", "markersize": 9, "label": "measured"}
    bound = {"color": GREEN, "linestyle": "--"}

    # 1. Words: random logits add half their variance to ln V.
    nothing = np.log(V)
    derived = nothing + sigma ** 2 / 2
    words.plot(sigma, derived,
               color=GREY, label="ln V + σ²/2, derived")
    words.plot(scales, lm, color=DARK, **measured)
    words.axhline(nothing, label="ln V: knows nothing", **bound)
    words.set_title("first LM loss")
    words.set_xlabel("σ, deviation of the logits")

    # 2. Pictures: what is said at random adds its own variance to that of the noise, 1.
    derived = 1 + sigma ** 2
    pictures.plot(sigma, derived,
                  color=GREY, label="1 + σ², derived")
    pictures.plot(scales, ddpm, color=ORANGE, **measured)
    pictures.axhline(1, label="1: says no noise", **bound)
    pictures.set_title("first diffusion loss")
    pictures.set_xlabel("σ, deviation of the output")

    # The points lie on the grey lines: the derivation holds. The lowest lies on the green one,
    # at σ = 0: before anything is learned, it is best to say nothing.
    for axis in (words, pictures):
        axis.legend(loc="upper left")
    plt.show()


# --------------------------------------------------------------- notebook 1: who may look at whom
def mark_differences(axis, mask, right):
    """Mark where a drawn mask is wrong: red cells are too much, red crosses are missing.
    mask, right: (T, T) bool."""
    # A leak: q looks at k, and must not.
    too_much = mask & ~right
    for q, k in too_much.nonzero().tolist():
        fill(axis, k, q, 1, 1, RED)

    # A gap: q should look at k. The cell below shows the right mask, so it is painted over.
    missing = right & ~mask
    cross = {"marker": "x", "color": RED, "markersize": 9, "markeredgewidth": 2}
    for q, k in missing.nonzero().tolist():
        fill(axis, k, q, 1, 1, "white")
        axis.plot(k, q, **cross)


def draw_rules(rules, right, image_id, doc_id, labels):
    """Four masks, marked where they differ from the right one.

    rules               {title: (1, T, T) bool}, four of them
    right               (1, T, T) bool
    image_id, doc_id    (1, T)
    labels              T str"""
    _, axes = plt.subplots(2, 2, figsize=(WIDTH, 12.4))
    for axis, (title, mask) in zip(axes.flat, rules.items()):
        # The right mask four times. Only the red is the rule's own: its mistakes.
        show_mask(axis, image_id, doc_id, labels)
        mark_differences(axis, mask[0], right[0])
        axis.set_title(title, loc="left", fontsize=15)
        axis.set_xlabel("")
        axis.set_ylabel("")

    # One corner says how to read all four.
    corner = axes[1, 0]
    corner.set_xlabel("... at whom")
    corner.set_ylabel("who looks ...")
    plt.show()


def draw_interval(lo, hi, image_id, doc_id, labels):
    """The right mask, with hi as a stair and both numbers beside each position.
    lo, hi, image_id, doc_id: (1, T); labels: T str."""
    T = len(labels)
    axis = one_panel(8, 7.2)
    show_mask(axis, image_id, doc_id, labels)

    # A step of the stair stands on the right edge of the last cell that q may look at. Every
    # coloured cell lies left of the stair: so one number per row is enough to say the mask.
    edges = np.arange(T + 1) - 0.5
    steps = hi[0] + 0.5
    look = {"color": RED, "linewidth": 3, "orientation": "horizontal", "baseline": None}
    axis.stairs(steps, edges, **look)
    write(axis, 10.5, 2.5, "the stair is hi",
          color=RED, fontsize=16)

    # The numbers themselves, at the right of the square.
    beside = T - 0.2                        # x
    axis.text(beside, -1.1, "lo .. hi", va="center")
    firsts = lo[0].tolist()
    lasts = hi[0].tolist()
    for q in range(T):
        first = firsts[q]
        last = lasts[q]
        # Red: it may look ahead, at the rest of its own picture.
        colour = RED if last > q else "black"
        interval = f"{first} .. {last}"
        axis.text(beside, q, interval,
                  color=colour, va="center")
    plt.show()


def draw_packed(batch, tokenizer):
    """The mask of a packed row, with the name of each document beside its triangle.
    batch: data.Batch of one row; tokenizer: data.Words."""
    tokens = batch.tokens[0].tolist()
    image_id = batch.image_id[0].tolist()
    labels = name_positions(tokens, image_id, tokenizer)
    axis = one_panel(10, 9.8)
    show_mask(axis, batch.image_id, batch.doc_id, labels, fontsize=11)

    # Each document is a triangle of its own, and between two triangles all is white.
    doc_id = batch.doc_id[0]                # (T,)
    for k in doc_id.unique().tolist():
        here = doc_id == k
        places = here.nonzero().flatten().tolist()
        first = places[0]
        last = places[-1]

        # The rest of the row is filled up. To the mask that is one more document.
        padding = tokens[first] == data.PAD
        name = "padding" if padding else f"document {k}"

        # At the right of its triangle, as long as there is room.
        at_right = last < len(labels) - 10
        x = last + 1 if at_right else first - 1
        side = "left" if at_right else "right"
        middle = (first + last) / 2
        write(axis, x, middle, name,
              ha=side, color=GREY, fontsize=15)
    plt.show()


def draw_weights(weights, titles, labels):
    """Attention weights, one square per title.
    weights: list of (T, T), whose rows sum to 1; titles: as many str; labels: T str."""
    axes = panels(len(weights), 6)
    for axis, weight, title in zip(axes, weights, titles):
        # Darkest from 0.5: the first rows have few places to look at, and would outshine the rest.
        image = axis.imshow(weight, cmap="Blues", vmin=0, vmax=0.5)
        label_square(axis, labels)
        axis.set_title(title)

    # One scale for all squares: their colours can be compared.
    plt.colorbar(image, ax=axes, shrink=0.7)
    plt.show()


def draw_who_noticed(noticed, right, labels, changed):
    """How much each position's result changed when one input did, one line per rule.

    noticed   {title: (T,)}, relative changes
    right     (T,) bool: who may notice
    labels    T str
    changed   the position that was changed"""
    rows = len(noticed)
    figure, axes = plt.subplots(rows, 1, sharex=True,
                                figsize=(WIDTH, 5.6))
    for axis, (title, change) in zip(axes, noticed.items()):
        # A strip of T cells: the bluer, the more this position noticed.
        image = show_changes(axis, change[None], aspect="auto")
        axis.set_yticks([])
        axis.set_title(title, loc="left")
        changed_too = change > 1e-5         # less is rounding

        # A frame, not a filled cell: how much leaked must stay visible.
        must_not = changed_too & ~right
        look = {"fill": False, "edgecolor": RED, "linewidth": 3}
        for k in must_not.nonzero().flatten().tolist():
            corner = (k - 0.46, -0.44)
            box = plt.Rectangle(corner, 0.92, 0.88, **look)
            axis.add_patch(box)

        # Where something should be blue and is white, there is room for a cross.
        should_have = right & ~changed_too
        for k in should_have.nonzero().flatten().tolist():
            axis.plot(k, 0, "x", color=RED, markersize=12, markeredgewidth=3)

    # All strips share their columns, their colours, and one sentence on how to read them.
    axes[-1].set_xticks(range(len(labels)), labels)
    figure.colorbar(image, ax=axes, label="change, log10")
    question = f"{labels[changed]} was changed. Who noticed?"
    legend = "red frame: must not have    red cross: should have"
    title = f"{question}    {legend}"
    figure.suptitle(title, fontsize=14)
    plt.show()


def draw_influence(influence, image_id, doc_id, labels):
    """Who noticed whom in the network, beside the mask.
    influence: (T, T), relative changes; image_id, doc_id: (1, T); labels: T str."""
    network, mask = panels(2, 6.2)

    # Left: a whole network was asked. Nothing in this square comes from the mask's code.
    show_changes(network, influence)
    label_square(network, labels)
    network.set_xlabel("who was changed")
    network.set_ylabel("who noticed")
    network.set_title("measured in the network", loc="left")

    # Right: what we wanted. Both must have the same white cells.
    show_mask(mask, image_id, doc_id, labels)
    mask.set_title("the mask", loc="left")
    plt.show()
