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
    batch: data.Batch with t."""
    tokens = batch.tokens                                                   # (B, T)
    used = tokens != data.PAD
    patches = batch.image_id >= 0
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 5.4), sharex=True)

    # 1. What stands where.
    kind = torch.zeros_like(tokens)
    kind[used] = 1
    kind[tokens == data.BOI] = 2
    kind[tokens == data.EOI] = 2
    kind[patches] = 3
    colours = ListedColormap(["white", GREY, DARK, ORANGE])
    axes[0].imshow(kind, cmap=colours, vmin=0, vmax=3, aspect="auto")

    # 2. Which document. nan stays white.
    document = torch.where(used, batch.doc_id.float(), torch.nan)
    axes[1].imshow(document, cmap="tab10", vmin=0, vmax=9, aspect="auto")

    # 3. How noisy. Each patch asks its picture.
    level = torch.full(tokens.shape, torch.nan)
    picture_of_patch = batch.image_id[patches]
    level[patches] = batch.t[picture_of_patch].float()
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
    lm = [line["lm"] for line in log]
    diff = [line["diffusion"] for line in log]
    words.plot(steps, lm, color=DARK)
    words.set(title="words: nats per word", xlabel="step", ylim=(0, None))
    pictures.plot(steps, diff, color=ORANGE)
    pictures.set(title="pictures: diffusion loss", xlabel="step", ylim=(0, None))
    plt.show()


def draw_by_level(lines, simple):
    """The diffusion loss in five ranges of t, at several moments of a run.

    lines    dicts of its log
    simple   five numbers: the loss of one who knows only mean and deviation"""
    axis = one_panel(WIDTH, 4.2)
    # Three bars side by side in each range: early, later, last.
    shifts = (-0.27, 0, 0.27)
    colours = ("#bdc3c7", GREY, ORANGE)
    for line, shift, colour in zip(lines, shifts, colours):
        places = np.arange(5) + shift
        name = f"up to step {line['step']}"
        axis.bar(places, line["by_t"], 0.25, color=colour, label=name)
    for k, level in enumerate(simple):
        axis.plot([k - 0.42, k + 0.42], [level, level], color=DARK)
    axis.plot([], [], color=DARK, label="ᾱ: knows mean and deviation")
    names = []
    for first in range(1, 1000, 200):
        names.append(f"t = {first} .. {first + 199}")
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
        bare(axis)
        frame(axis, good)
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
    panel = ((gap, gaps, " {:.3f}"), (asked, right, " {} of 12"))
    for axis, numbers, form in panel:
        names = list(numbers)
        values = list(numbers.values())
        axis.barh(names, values, color=colours)
        for k, value in enumerate(values):
            axis.text(value, k, form.format(value), va="center")
        axis.invert_yaxis()
    longest = max(gaps.values())
    gap.set(title="conditioning gap", xlim=(0, 1.3 * longest), xticks=[])
    asked.set(title="pictures as asked", xlim=(0, 15), xticks=[], yticks=[])
    plt.show()


def draw_gaps(gaps):
    """The conditioning gap of some runs against the step. gaps: {name: {step: gap}}."""
    axis = one_panel(9, 3.8)
    for (name, by_step), colour in zip(gaps.items(), (ORANGE, DARK)):
        steps = list(by_step)
        values = list(by_step.values())
        axis.plot(steps, values, marker="o", color=colour, label=name)
    axis.set(xlabel="step", title="conditioning gap, ε with --noise-skip", ylim=(0, None))
    axis.legend()
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
