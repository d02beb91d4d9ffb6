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

# For as many rows or parts as a page compares.
COLOURS = (DARK, ORANGE, GREEN, RED, GREY, "#8e44ad", "#2980b9")


# ------------------------------------------------------------- notebook 7: the rival and the tables
def draw_views(views, per_row=36):
    """A document as each model reads it: words dark, patches orange, codes green.
    views: {name: list of (label, kind)}, kind one of "word", "patch", "code"; per_row: boxes."""
    colour_of = {"word": DARK, "patch": ORANGE, "code": GREEN}
    axis = one_panel(WIDTH, 4.2)

    # One box is one position, of one size for all models: so length on the page is length of the
    # sequence, and that is what the models differ in.
    y = 0                                   # of the row that is drawn; it falls
    for name, boxes in views.items():
        n = len(boxes)
        write(axis, -1, y, f"{name}\n{n} positions", ha="right")
        for k, (label, kind) in enumerate(boxes):
            # A long sequence goes on below.
            x = k % per_row
            if k and x == 0:
                y -= 1
            colour = colour_of[kind]
            fill(axis, x, y, 0.86, 0.8, colour)
            write(axis, x, y, label, color="white", fontsize=10, rotation=90)
        y -= 1.6                            # a gap before the next model

    axis.set_xlim(-7, per_row)              # at the left: room for the names
    axis.set_ylim(y + 0.8, 0.8)
    axis.axis("off")
    plt.show()


def draw_two_masks(masks):
    """Masks side by side: dark = allowed by order, orange = allowed only by "same picture".
    masks: {title: (T, T) bool}."""
    axes = panels(len(masks), 5.2)
    for axis, (title, mask) in zip(axes, masks.items()):
        # What is allowed by order lies on the diagonal or left of it. The orange is the rest: the
        # rival, which reads a picture as words, has none.
        causal = mask.tril()
        kinds = kinds_of(mask, causal)
        show_kinds(axis, kinds)
        axis.set_title(title)
        axis.set_xlabel("... at whom")
        axis.set_ylabel("who looks ...")
    plt.show()


def draw_drift(constants, spreads):
    """The loss of the same words when a constant is added to all logits.
    constants: n numbers; spreads: {number format: n losses}."""
    axis = one_panel(9, 4)
    colours = (GREEN, RED)
    markers = ("o", "s")

    # Softmax does not know the constant, so a line must be flat. One of them is not: there the
    # number format has no digits left for the differences between logits.
    for name, colour, marker in zip(spreads, colours, markers):
        values = spreads[name]
        axis.plot(constants, values, marker=marker,
                  color=colour, label=name)

    # symlog: a logarithm that can show 0 as well.
    axis.set_xscale("symlog")
    axis.set_xlabel("added to all logits")
    axis.set_title("loss, nats per word")
    axis.legend()
    plt.show()


def draw_sharpness(factors, entropies, most):
    """How widely attention looks, when the matrices of queries and keys grow.

    factors     n numbers, by which they were multiplied
    entropies   {name: n numbers}
    most        the entropy of looking at all keys alike"""
    axis = one_panel(9, 4)

    # At the dotted line attention looks at everything, at 0 at a single key. A network that has
    # fallen to 0 hardly learns to look elsewhere.
    colours = (RED, GREEN)
    plot_curves(axis, factors, entropies, colours, marker="o")
    axis.axhline(most, color=GREY, linestyle=":")

    axis.set_xscale("log")
    axis.set_ylim(0, most * 1.15)
    axis.set_xlabel("weights of queries and keys, times")
    axis.set_title("entropy of attention, nats (dotted: all keys alike)")
    # The factors themselves under the points, not powers of ten.
    names = [f"{factor:g}" for factor in factors]
    axis.set_xticks(factors, names)
    axis.minorticks_off()
    plt.show()


def draw_seeds(columns):
    """The numbers of a table, each seed a dot.
    columns: {heading: {row name: list of numbers, one per seed}}."""
    axes = panels(len(columns), 4)
    for axis, (heading, rows) in zip(axes, columns.items()):
        # A row's dots, and a thin line between the outermost: its spread. Look at the distance of
        # two rows beside the length of their lines; a mean alone would not show it.
        for y, (values, colour) in enumerate(zip(rows.values(), COLOURS)):
            heights = [y] * len(values)
            axis.plot(values, heights, "-",
                      color=colour, linewidth=1)
            axis.plot(values, heights, "o",
                      color=colour, markersize=11)

        # Downwards, in the order of the table.
        n = len(rows)
        axis.set_ylim(n - 0.5, -0.5)
        axis.set_title(heading)

        # The names of the rows stand once, at the left. The ticks stay: they lead the eye.
        names = list(rows) if axis is axes[0] else [""] * n
        axis.set_yticks(range(n), names)
        axis.grid(axis="x", alpha=0.4)
        axis.margins(x=0.15)                # no dot on the frame
    plt.show()


def draw_least_p(by_seeds):
    """The smallest p that a shuffle test can give. by_seeds: {seeds per row: p}."""
    axis = one_panel(9, 3.8)
    usual = 0.05                            # what most people call significant
    axis.axhline(usual, color=DARK, linestyle=":")
    for seeds, p in by_seeds.items():
        # A red bar: with so few seeds no result, however clear, gets below the line.
        colour = GREEN if p < usual else RED
        name = str(seeds)                   # as text: one place per bar
        axis.bar(name, p, color=colour, width=0.6)

        # Its number stands above the bar, and above the dotted line.
        above = max(p, usual) + 0.03
        axis.text(name, above, f"{p:.3f}", ha="center")

    axis.set_ylim(0, 1.1)
    axis.set_xlabel("seeds per row")
    axis.set_title("the smallest p there is")
    plt.show()


def draw_parity(steps, ours, rival, share):
    """Two curves of loss against steps, and how far left of the rival's end ours reaches it.
    ours, rival: one loss per entry of steps; share: of the rival's last step."""
    axis = one_panel(9, 4.6)
    axis.plot(steps, rival, marker="o",
              color=GREEN, label="Chameleon")
    axis.plot(steps, ours, marker="o",
              color=ORANGE, label="Transfusion")

    # The arrow starts at the rival's end and goes left, at the same loss, to where our line is as
    # low. Its length is the saving: along steps, not along the loss.
    end = steps[-1]
    goal = rival[-1]
    as_low = share * end
    look = {"arrowstyle": "->", "color": DARK, "linewidth": 2}
    axis.annotate("", (as_low, goal), (end, goal), arrowprops=look)
    write(axis, as_low, goal + 0.0025, f"× {share:.2f}", color=DARK)

    # Each run has twice the steps of the one before: on a logarithm they are equally far apart.
    axis.set_xscale("log")
    axis.set_ylim(0, None)
    axis.set_xlabel("steps")
    axis.set_title("text, nats above the entropy")
    axis.set_xticks(steps, steps)
    axis.minorticks_off()
    axis.legend()
    plt.show()


# -------------------------------------------------------------------------------- notebook 8: to 7B
def draw_parts(by_size):
    """What the parameters of each size consist of, in per cent.
    by_size: {size: {part: its parameters}}."""
    axis = one_panel(WIDTH, 4)
    first = next(iter(by_size.values()))
    sizes = list(by_size)
    so_far = np.zeros(len(sizes))           # where the next part begins, in each bar
    colours = (GREY, DARK, GREEN, ORANGE)
    for name, colour in zip(first, colours):
        # In per cent: the sizes lie a factor of forty apart, and what changes is the mixture.
        shares = []
        for numbers in by_size.values():
            whole = sum(numbers.values())
            share = 100 * numbers[name] / whole
            shares.append(share)
        axis.barh(sizes, shares, left=so_far,
                  color=colour, label=name)
        so_far += shares

    axis.invert_yaxis()                     # the smallest above
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of all parameters")
    # Above the bars: inside there is no free place.
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncol=4)
    plt.show()


def draw_attention_share(lengths, shares):
    """Attention's share of the FLOPs against the length of the rows.
    lengths: n numbers; shares: {size: n shares}."""
    axis = one_panel(9, 4)
    plot_curves(axis, lengths, shares, COLOURS, marker="o")

    # Where a curve crosses a half, attention costs as much as everything else. At the paper's
    # length all of them are still below.
    axis.axhline(0.5, color=GREY, linestyle=":")
    axis.axvline(4096, color=GREY, linestyle=":")
    axis.set_xscale("log")
    axis.set_ylim(0, 1)
    axis.set_xlabel("T, positions per row (dotted: the paper's 4096)")
    axis.set_title("attention's share of the FLOPs")
    axis.set_xticks(lengths, lengths)
    axis.minorticks_off()
    plt.show()


def draw_memory(bars, limit):
    """What a GPU must hold, a stack per case. bars: {case: {what: GiB}}; limit: a GPU's GiB."""
    axis = one_panel(WIDTH, 4.6)
    cases = list(bars)
    top = np.zeros(len(cases))              # how high each stack is so far

    # Every name once, in the order in which they first appear: not every case has every part.
    names = []
    for parts in bars.values():
        names += [name for name in parts if name not in names]

    # One part after another on all stacks, so that a part has one colour and one legend.
    for name, colour in zip(names, COLOURS):
        sizes = [parts.get(name, 0) for parts in bars.values()]
        axis.bar(cases, sizes, bottom=top, width=0.6,
                 color=colour, label=name)
        top += sizes

    # The sum above each stack, and the red line that it must stay below.
    for k, size in enumerate(top):
        text = f"{size:.1f}"
        axis.text(k, size + 1.5, text, ha="center")
    axis.axhline(limit, color=RED, linestyle=":")
    highest = max(top.max(), limit)
    axis.set_ylim(0, 1.1 * highest)
    title = f"GiB per GPU at the worst moment (dotted: the {limit} of an H100)"
    axis.set_title(title)
    axis.legend()
    plt.show()


def draw_tiles(tiles):
    """Tiles of a mask: white = skipped, dark = full, orange = in between.
    tiles: {title: (n, n) int: 0, 1, 2}."""
    axes = panels(len(tiles), 4.7)
    for axis, (title, kinds) in zip(axes, tiles.items()):
        # The same colours as for a mask, one level up: a cell is 128 x 128 pairs. White ones cost
        # nothing; only in orange ones must each pair be looked at.
        show_kinds(axis, kinds)
        n = len(kinds)
        cell_lines(axis, n, linewidth=0.4)
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
    plt.show()


def draw_dealing(hands):
    """Which process takes which micro-batch. hands: {processes: {process: list of numbers}}."""
    axis = one_panel(WIDTH, 2.6)

    # A line per number R of processes. The batches have the same places in all lines, because they
    # are the same: only the hands change, and those are the colours.
    y = 0
    for processes, by_rank in hands.items():
        write(axis, -0.7, y, f"R = {processes}", ha="right")
        for process, colour in zip(by_rank, COLOURS):
            for k in by_rank[process]:
                label = f"batch {k}\nprocess {process}"
                fill(axis, k, y, 0.94, 0.8, colour)
                write(axis, k, y, label, color="white", fontsize=11)
        y -= 1                              # the next line stands below

    axis.set_xlim(-1.6, 7.6)
    axis.set_ylim(y + 0.5, 0.5)
    bare(axis)
    plt.show()
