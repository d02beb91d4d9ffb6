"""
figures_7.py: what notebooks 7 and 8 draw

THE IDEA    As in figures.py, one function per picture. A notebook takes this module under the name
            `figures`. So all of figures.py is imported here: what the notebooks share.
SHAPES      masks (T, T) bool; tiles (T/128, T/128) int; pictures (M, h, w, 3) uint8
HERE        Every `draw_...` calls plt.show() once, at its end.
TEST        tests/test_notebooks.py
"""
import matplotlib.pyplot as plt
import numpy as np
from figures import *

COLOURS = (DARK, ORANGE, GREEN, RED, GREY, "#8e44ad", "#2980b9")


# ------------------------------------------------------------- notebook 7: the rival and the tables
def draw_views(views, per_row=36):
    """A document as each model reads it: words dark, patches orange, codes green.
    views: {name: list of (label, kind)}, kind one of "word", "patch", "code"."""
    colour_of = {"word": DARK, "patch": ORANGE, "code": GREEN}
    axis = one_panel(WIDTH, 4.2)
    y = 0
    for name, boxes in views.items():
        write(axis, -1, y, f"{name}\n{len(boxes)} positions", ha="right")
        for k, (label, kind) in enumerate(boxes):
            if k and k % per_row == 0:                      # a long sequence goes on below
                y -= 1
            fill(axis, k % per_row, y, 0.92, 0.8, colour_of[kind])
            write(axis, k % per_row, y, label, color="white", fontsize=10, rotation=90)
        y -= 1.6
    axis.set(xlim=(-7, per_row), ylim=(y + 0.8, 0.8))
    axis.axis("off")
    plt.show()


def draw_two_masks(masks):
    """Masks side by side: dark = allowed by order, orange = allowed only by "same picture".
    masks: {title: (T, T) bool}."""
    axes = panels(len(masks), 5.2)
    for axis, (title, mask) in zip(axes, masks.items()):
        causal = mask.tril()                                # row by row, up to itself
        show_kinds(axis, kinds_of(mask, causal))
        axis.set(title=title, xlabel="... at whom", ylabel="who looks ...")
    plt.show()


def draw_drift(constants, spreads):
    """The loss of the same words when a constant is added to all logits.
    spreads: {number format: one loss per constant}."""
    axis = one_panel(9, 4)
    looks = zip(spreads.items(), (GREEN, RED), ("o", "s"))
    for (name, values), colour, marker in looks:
        axis.plot(constants, values, color=colour, marker=marker, label=name)
    axis.set(xscale="symlog", xlabel="added to all logits", title="loss, nats per word")
    axis.legend()
    plt.show()


def draw_sharpness(factors, entropies, most):
    """How widely attention looks, when the matrices of queries and keys grow.
    entropies: {name: one number per factor}; most: the entropy of looking at all keys alike."""
    axis = one_panel(9, 4)
    plot_curves(axis, factors, entropies, (RED, GREEN), marker="o")
    axis.axhline(most, color=GREY, linestyle=":")
    axis.set(xscale="log", xlabel="weights of queries and keys, times", ylim=(0, most * 1.15),
             title="entropy of attention, nats (dotted: all keys alike)")
    axis.set_xticks(factors, [f"{factor:g}" for factor in factors])
    axis.minorticks_off()
    plt.show()


def draw_seeds(columns):
    """The numbers of a table, each seed a dot.
    columns: {heading: {row name: list of numbers, one per seed}}."""
    axes = panels(len(columns), 4)
    for axis, (heading, rows) in zip(axes, columns.items()):
        for y, (values, colour) in enumerate(zip(rows.values(), COLOURS)):
            heights = [y] * len(values)
            axis.plot(values, heights, "-", color=colour, linewidth=1)
            axis.plot(values, heights, "o", color=colour, markersize=11)
        n = len(rows)
        axis.set(title=heading, ylim=(n - 0.5, -0.5))
        # The names of the rows stand once, at the left.
        names = list(rows) if axis is axes[0] else [""] * n
        axis.set_yticks(range(n), names)
        axis.grid(axis="x", alpha=0.4)
        axis.margins(x=0.15)
    plt.show()


def draw_least_p(by_seeds):
    """The smallest p that a shuffle test can give. by_seeds: {seeds per row: p}."""
    axis = one_panel(9, 3.8)
    for seeds, p in by_seeds.items():
        colour = GREEN if p < 0.05 else RED
        axis.bar(str(seeds), p, color=colour, width=0.6)
        above = max(p, 0.05) + 0.03         # the bar, and the dotted line
        axis.text(str(seeds), above, f"{p:.3f}", ha="center")
    axis.axhline(0.05, color=DARK, linestyle=":")
    axis.set(xlabel="seeds per row", ylim=(0, 1.1), title="the smallest p there is")
    plt.show()


def draw_parity(steps, ours, rival, share):
    """Two curves of loss against steps, and how far left of the rival's end ours reaches it.
    ours, rival: one loss per entry of steps; share: of the rival's last step."""
    axis = one_panel(9, 4.6)
    axis.plot(steps, rival, color=GREEN, marker="o", label="Chameleon")
    axis.plot(steps, ours, color=ORANGE, marker="o", label="Transfusion")
    # From the rival's end to where ours is as low.
    end = steps[-1]
    goal = rival[-1]
    as_low = share * end
    look = {"arrowstyle": "->", "color": DARK, "linewidth": 2}
    axis.annotate("", (as_low, goal), (end, goal), arrowprops=look)
    write(axis, as_low, goal + 0.0025, f"× {share:.2f}", color=DARK)
    axis.set(xscale="log", xlabel="steps", ylim=(0, None))
    axis.set(title="text, nats above the entropy")
    axis.set_xticks(steps, steps)
    axis.minorticks_off()
    axis.legend()
    plt.show()


# -------------------------------------------------------------------------------- notebook 8: to 7B
def draw_parts(by_size):
    """Of what the parameters of each size consist, in per cent.
    by_size: {size: {part: its parameters}}."""
    axis = one_panel(WIDTH, 4)
    names = list(next(iter(by_size.values())))
    bottom = np.zeros(len(by_size))
    for name, colour in zip(names, (GREY, DARK, GREEN, ORANGE)):
        share = []
        for numbers in by_size.values():
            whole = sum(numbers.values())
            share.append(100 * numbers[name] / whole)
        axis.barh(list(by_size), share, left=bottom, color=colour, label=name)
        bottom += share
    axis.invert_yaxis()
    axis.set(xlabel="% of all parameters", xlim=(0, 100))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncol=4)
    plt.show()


def draw_attention_share(lengths, shares):
    """Attention's share of the FLOPs against the length of the rows.
    shares: {size: one share per length}."""
    axis = one_panel(9, 4)
    plot_curves(axis, lengths, shares, COLOURS, marker="o")
    axis.axhline(0.5, color=GREY, linestyle=":")
    axis.axvline(4096, color=GREY, linestyle=":")
    axis.set(xscale="log", xlabel="T, positions per row (dotted: the paper's 4096)", ylim=(0, 1),
             title="attention's share of the FLOPs")
    axis.set_xticks(lengths, lengths)
    axis.minorticks_off()
    plt.show()


def draw_memory(bars, limit):
    """What a GPU must hold, a stack per case. bars: {case: {what: GiB}}; limit: a GPU's GiB."""
    axis = one_panel(WIDTH, 4.6)
    bottom = np.zeros(len(bars))
    # Every name once, in the order in which they first appear.
    names = []
    for parts in bars.values():
        names += [name for name in parts if name not in names]
    cases = list(bars)
    for name, colour in zip(names, COLOURS):
        sizes = [parts.get(name, 0) for parts in bars.values()]
        axis.bar(cases, sizes, bottom=bottom, color=colour, width=0.6, label=name)
        bottom += sizes
    for k, size in enumerate(bottom):
        axis.text(k, size + 1.5, f"{size:.1f}", ha="center")
    axis.axhline(limit, color=RED, linestyle=":")
    highest = max(bottom.max(), limit)
    axis.set(ylim=(0, 1.1 * highest))
    axis.set(title=f"GiB per GPU at the worst moment (dotted: the {limit} of an H100)")
    axis.legend()
    plt.show()


def draw_tiles(tiles):
    """Tiles of a mask: white = skipped, dark = full, orange = in between.
    tiles: {title: (n, n) int: 0, 1, 2}."""
    axes = panels(len(tiles), 4.7)
    for axis, (title, kinds) in zip(axes, tiles.items()):
        show_kinds(axis, kinds)
        cell_lines(axis, len(kinds), linewidth=0.4)
        axis.set_title(title)
        axis.set(xticks=[], yticks=[])
    plt.show()


def draw_dealing(hands):
    """Which process takes which micro-batch. hands: {processes: {process: list of numbers}}."""
    axis = one_panel(WIDTH, 2.6)
    for y, (processes, by_rank) in enumerate(hands.items()):
        for (process, numbers), colour in zip(by_rank.items(), COLOURS):
            for k in numbers:
                fill(axis, k, -y, 0.94, 0.8, colour)
                write(axis, k, -y, f"batch {k}\nprocess {process}", color="white", fontsize=11)
        write(axis, -0.7, -y, f"of {processes}", ha="right")
    axis.set(xlim=(-1.6, 7.6), ylim=(0.5 - len(hands), 0.5))
    bare(axis)
    plt.show()
