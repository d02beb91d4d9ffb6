"""
figures_5.py: what notebook 5 draws

THE IDEA    As in figures.py, one function per picture. A notebook takes this module under the name
            `figures`. So all of figures.py is imported here: what the notebooks share.
SHAPES      a log is a list of dicts, the lines of metrics.progress; pictures (M, h, w, 3) uint8
HERE        Every `draw_...` calls plt.show() once, at its end.
TEST        tests/test_notebooks.py
"""
import matplotlib.pyplot as plt
import numpy as np
import torch
from figures import *
from matplotlib.colors import ListedColormap

import data


# ----------------------------------------------------------------------- notebook 5: train one
def draw_batch(batch):
    """What a step sees, one panel per tensor: tokens, documents, noise levels.
    batch: data.Batch with t; its rows are B of T positions."""
    tokens = batch.tokens                                   # (B, T)
    used = tokens != data.PAD
    patches = batch.image_id >= 0

    # The panels share their columns: what stands below a token is said of that token.
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 5.4), sharex=True)
    what, whose, how_noisy = axes

    # 1. What stands where. An orange stretch is a picture, dark at both ends.
    kind = torch.zeros_like(tokens)         # 0: padding
    kind[used] = 1                          # a word, if nothing below says otherwise
    kind[tokens == data.BOI] = 2
    kind[tokens == data.EOI] = 2
    kind[patches] = 3
    colours = ListedColormap(["white", GREY, DARK, ORANGE])
    what.imshow(kind, aspect="auto",
                cmap=colours, vmin=0, vmax=3)
    what.set_title("tokens: grey words, dark BOI and EOI, orange patches, white padding",
                   loc="left")

    # 2. Which document: a row is packed from several. Padding belongs to none; nan stays white.
    document = torch.where(used, batch.doc_id.float(), torch.nan)
    whose.imshow(document, aspect="auto",
                 cmap="tab10", vmin=0, vmax=9)
    whose.set_title("doc_id: one colour per document of a row",
                    loc="left")

    # 3. How noisy. Each patch asks its picture, so a stretch has one colour.
    level = torch.full(tokens.shape, torch.nan)
    picture_of_patch = batch.image_id[patches]
    level[patches] = batch.t[picture_of_patch].float()
    image = how_noisy.imshow(level, aspect="auto",
                             cmap="viridis", vmin=0, vmax=1000)
    how_noisy.set_title("t: one noise level per picture, the same for all its patches",
                        loc="left")
    how_noisy.set_xlabel("position")
    figure.colorbar(image, ax=how_noisy, label="t", pad=0.01)

    # Rows have whole numbers; by itself matplotlib would write 0.5 between two.
    rows = range(len(kind))
    for axis in axes:
        axis.set_yticks(rows)
        axis.set_ylabel("row")
    plt.show()


def draw_levels(after, before):
    """How often each noise level was drawn. after: t of the pictures that stand behind their
    captions, before: of those in front of them; each (n,)."""
    # The same axis of t: one fills it, the other ends half way. That is the limit of App. B.2.
    axes = panels(2, 3.2, sharex=True)
    cases = (("caption first", after, DARK), ("picture first", before, ORANGE))
    for axis, (title, t, colour) in zip(axes, cases):
        axis.hist(t.numpy(), bins=20, range=(0, 1000),
                  color=colour)
        # The heights are not shared: the second case is rarer. The titles say how rare.
        axis.set_title(f"{title}: {len(t)} pictures")
        axis.set_xlabel("t")
        axis.set_ylabel("how often")
    plt.show()


def draw_rate(steps, rates):
    """The learning rate against the step: two lists of as many numbers."""
    axis = one_panel(9, 3)
    axis.plot(steps, rates, color=ORANGE)

    # To see: a straight way up, then half a wave of a cosine. It is drawn from 0, to show that
    # the cosine ends above it: the last steps still learn.
    axis.set_ylim(0, None)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axis.set_xlabel("step")
    axis.set_title("learning rate")
    plt.show()


def draw_log(log):
    """Both losses of a run against the step. log: list of dicts, the lines of metrics.progress."""
    # A panel each: nats and squares have no common axis.
    words, pictures = panels(2, 3.6)
    steps = [line["step"] for line in log]
    lm = [line["lm"] for line in log]
    diff = [line["diffusion"] for line in log]

    # Both fall steeply and then seem to stand still. What is learned after that does not show
    # here; the next pictures of the page look for it.
    words.plot(steps, lm, color=DARK)
    words.set_title("words: nats per word")
    pictures.plot(steps, diff, color=ORANGE)
    pictures.set_title("pictures: diffusion loss")
    for axis in (words, pictures):
        axis.set_ylim(0, None)
        axis.set_xlabel("step")
    plt.show()


def draw_by_level(lines, simple):
    """The diffusion loss in five ranges of t, at several moments of a run.

    lines    three dicts of its log
    simple   five numbers: the loss of one who knows only mean and deviation"""
    axis = one_panel(WIDTH, 4.2)
    ranges = np.arange(5)

    # 1. Three bars side by side in each range: early, later, last. Only the last has a colour.
    shifts = (-0.27, 0, 0.27)
    colours = ("#bdc3c7", GREY, ORANGE)
    for line, shift, colour in zip(lines, shifts, colours):
        places = ranges + shift
        step = line["step"]
        axis.bar(places, line["by_t"], 0.25,
                 color=colour, label=f"up to step {step}")

    # 2. A line over each range: the loss of one who has never looked at a picture. As far as a bar
    # stays below it, something was learned. The empty line names it in the legend once, not five
    # times.
    for k, level in enumerate(simple):
        left = k - 0.42
        right = k + 0.42
        axis.plot([left, right], [level, level], color=DARK)
    axis.plot([], [], color=DARK, label="ᾱ: knows mean and deviation")

    # t from 1 to 1000 in fifths, as metrics.progress has them.
    names = []
    for first in range(1, 1000, 200):
        last = first + 199
        names.append(f"t = {first} .. {last}")
    axis.set_xticks(ranges, names)
    axis.set_ylim(0, 1.35)                  # room for the legend
    axis.set_title("diffusion loss by noise level")
    axis.legend(ncols=2, loc="upper center")
    plt.show()


def draw_answers_to(captions, learned, drawn, right):
    """The pictures that were learned from, and below them what was drawn for their captions: in a
    green frame if it is what was asked for, in a red one if not.

    captions   n str              learned   (n, h, w, 3) uint8
    drawn      (k n, h, w, 3)     right     k n bools"""
    # One row to compare with, then as many as were drawn for each caption.
    columns = len(captions)
    rows = 1 + len(drawn) // columns
    height = 2 * rows + 0.4
    _, axes = plt.subplots(rows, columns, figsize=(8, height))
    for axis in axes.flat:
        bare(axis)

    # 1. One column per caption. At its top is the picture that it had in training.
    for axis, picture, caption in zip(axes[0], learned, captions):
        axis.imshow(picture)
        axis.set_title(caption, fontsize=13)

    # 2. Below is what the model draws for it. The frame is the parser's verdict: is it what was
    # asked for? It need not be the picture above.
    places = axes[1:].flat
    for axis, picture, good in zip(places, drawn, right):
        axis.imshow(picture)
        frame(axis, good)

    axes[0, 0].set_ylabel("learned")
    for axis in axes[1:, 0]:
        axis.set_ylabel("drawn")
    plt.show()


def draw_worth(times, curves):
    """How much a caption is worth at each noise level.
    times: n numbers; curves: {"ε", "flow" or either with ", shift ...": n numbers}."""
    axis = one_panel(WIDTH, 4.4)
    colours = {"ε": ORANGE, "flow": GREEN}
    for name, curve in curves.items():
        # A process has one colour. With another shift of its noise it is dashed.
        process, _, shift = name.partition(",")
        style = "--" if shift else "-"

        # The mean over t is the gap that this process can reach: the area below its curve.
        mean = sum(curve) / len(curve)
        axis.plot(times, curve, style,
                  color=colours[process], label=f"{name}: mean {mean:.4f}")
    axis.set_xlabel("t")
    axis.set_title("what the caption can lower the loss by, pictures known by heart")
    axis.legend()
    plt.show()


def draw_runs(gaps, right):
    """The gap of several runs, and how many of 12 pictures were as asked. Both: {name: number}."""
    gap, asked = panels(2, 3.6)

    # The colour is the process, as in draw_worth.
    colours = [ORANGE if name.startswith("ε") else GREEN for name in gaps]

    # One row per run, through both panels: a run that has a gap draws what was asked for.
    cases = ((gap, gaps, " {:.3f}"), (asked, right, " {} of 12"))
    for axis, numbers, form in cases:
        names = list(numbers)
        values = list(numbers.values())
        axis.barh(names, values, color=colours)
        # Its number stands at the end of each bar, so no ticks are needed.
        for k, value in enumerate(values):
            text = form.format(value)
            axis.text(value, k, text, va="center")
        axis.invert_yaxis()                 # the first run above
        axis.set_xticks([])

    # Room at the right for the numbers. The names of the runs stand once, at the left.
    longest = max(gaps.values())
    gap.set_xlim(0, 1.3 * longest)
    gap.set_title("conditioning gap")
    asked.set_xlim(0, 15)
    asked.set_yticks([])
    asked.set_title("pictures as asked")
    plt.show()


def draw_gaps(gaps):
    """The conditioning gap of some runs against the step. gaps: {name: {step: gap}}."""
    axis = one_panel(9, 3.8)
    colours = (ORANGE, DARK)
    for name, colour in zip(gaps, colours):
        by_step = gaps[name]
        steps = list(by_step)
        values = list(by_step.values())
        axis.plot(steps, values, marker="o",
                  color=colour, label=name)

    # From 0, where the caption is ignored. To see: both leave it early, and go on rising after
    # the loss has long seemed to stand still.
    axis.set_ylim(0, None)
    axis.set_xlabel("step")
    axis.set_title("conditioning gap, ε with --noise-skip")
    axis.legend()
    plt.show()


def draw_read(times, nats, chance, limit):
    """What a caption costs behind a picture of noise t.

    nats     one number per t           chance   what it costs without any picture
    limit    the largest t of such pictures in training"""
    axis = one_panel(WIDTH, 4.2)

    # Grey: pictures as noisy as this never stood in front of a caption in training.
    axis.axvspan(limit, 1000,
                 color=GREY, alpha=0.25, label="not in training")

    # Below the dashed line the picture helps. Where the curve reaches it, nothing can be read.
    axis.plot(times, nats, "o-",
              color=DARK, label="caption, given the picture")
    axis.axhline(chance, linestyle="--",
                 color=ORANGE, label="caption, given nothing")
    axis.set_ylim(0, None)
    axis.set_xlabel("t of the picture in front of it")
    axis.set_title("nats per caption")
    axis.legend(loc="upper left")
    plt.show()
