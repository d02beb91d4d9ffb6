"""
figures.py: what all the notebooks draw and check, so that their cells hold ideas

THE IDEA    A cell of a notebook says one thing and shows what it means. The fifteen lines of
            matplotlib that show it are here and in figures_0.py to figures_7.py, which notebooks
            take under the name `figures`. `draw_...` draws one picture and shows it; `expect`
            prints a number that we derived beside the number that we see.
A PICTURE   cell    lo, hi = intervals(image_id, doc_id)
                    figures.draw_interval(lo, hi, image_id, doc_id, labels)
            below   one picture
SHAPES      as in the modules: tokens, image_id, doc_id (1, T); a mask (T, T) bool;
            pictures (M, h, w, 3) uint8; latents (M, c, h, w)
HERE        Every `draw_...` calls plt.show() once. tests/test_notebooks.py counts on it: a cell
            has as many pictures below it as it has calls of `draw_...`. Where a call fills two
            lines, the first says what is drawn, the second how it looks.
TEST        tests/test_notebooks.py
"""
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap

import data
from attention_mask import or_mask
from sources import scenes

# One meaning per colour, in all notebooks: who has read one picture can read the next.
DARK = "#34495e"                            # words; what is plain, or known
ORANGE = "#e67e22"                          # patches; what the page is about
RED = "#e74c3c"                             # wrong
GREEN = "#27ae60"                           # right
GREY = "#95a5a6"                            # beside the point

WIDTH = 12                                  # inches, of a picture as wide as the page

# Large enough to be read from the last row of a lecture hall.
STYLE = {
    "figure.dpi": 80,                       # ten pages of PNGs: none may weigh a megabyte
    "figure.constrained_layout.use": True,  # makes room for labels: none is cut off
    "font.size": 14,
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "lines.linewidth": 2,
    "image.interpolation": "nearest",       # a pixel is a square: nothing is smoothed
}


# ------------------------------------------------------------------------- for all the notebooks
def start(*modules):
    """Set the style of all pictures, and print the first sentence of each module: what the page is
    about. modules: those that the notebook explains."""
    plt.rcParams.update(STYLE)
    torch.set_num_threads(1)                # models this small only wait for a second thread

    # The headline of a module docstring ends at the first empty line. It may fill two lines.
    for module in modules:
        headline, _, _ = module.__doc__.strip().partition("\n\n")
        print(" ".join(headline.split()))


def expect(what, expected, seen, within=0):
    """Print a number that we derived beside the number that we see.

    what        what it is a number of
    expected    int or float, derived
    seen        int, float or a tensor with one element, measured
    within      how far apart they may be"""
    # The cell may hand over a sum or a mean as it is, without .item().
    if isinstance(seen, torch.Tensor):
        seen = seen.item()
    close = abs(expected - seen) <= within

    # tests/test_notebooks.py looks for this sentence, and for "match: False".
    print(f"{what}: we expect {digits(expected)}, we see {digits(seen)}, match: {close}")


def digits(number):
    """A number as text: 16,384 or 0.976. number: int or float."""
    # What was counted is exact. What was measured is not: three digits are enough.
    if isinstance(number, int):
        return f"{number:,}"
    rounded = round(number, 3) + 0.0        # -0.0 + 0.0 is 0.0: nobody wants to read -0.000
    return f"{rounded:.3f}"


def as_asked(captions, pictures):
    """A list of bools: whether each picture is exactly what its caption says, to the parser of
    scenes. captions: n str; pictures: n of (h, w, 3) uint8."""
    right = []
    for caption, picture in zip(captions, pictures):
        # What the words claim, and what is seen: two readings that know nothing of each other.
        claim = scenes.read_caption(caption)
        seen = scenes.parse(picture)
        right.append(scenes.holds(claim, seen))
    return right


def name_positions(tokens, image_id, tokenizer):
    """What to write at each position, a list of T str: words as they are, patches as p0 p1 ... of
    the first picture, q0 q1 ... of the second.

    tokens, image_id    lists of T int
    tokenizer           data.Words"""
    labels = []
    so_far = {}                             # how many patches each picture has until here
    for token, picture in zip(tokens, image_id):
        word = tokenizer.vocabulary[token]
        # A patch has no word of its own: a letter for its picture, a number within it.
        if picture >= 0:
            k = so_far.get(picture, 0)
            so_far[picture] = k + 1
            letter = "pqrs"[picture]
            labels.append(f"{letter}{k}")
        # A mark stands out in capitals: BOI, not <boi>.
        elif token < len(data.SPECIAL):
            labels.append(word.strip("<>").upper())
        else:
            labels.append(word)
    return labels


# ---------------------------------------------------------------------------- parts of a picture
def panels(n, height, **options):
    """A list of n axes side by side, as wide as the page. height: in inches."""
    # squeeze=False: a row of axes also when n is 1.
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
    """A text whose middle is at (x, y). look: options of axis.text; ha and va may move it."""
    middle = {"ha": "center", "va": "center"}
    axis.text(x, y, text, **{**middle, **look})


def fill(axis, x, y, width, height, colour):
    """A filled box whose middle is at (x, y)."""
    # matplotlib wants the lower left corner.
    corner = (x - width / 2, y - height / 2)
    box = plt.Rectangle(corner, width, height, color=colour)
    axis.add_patch(box)


def frame(axis, good):
    """A green frame around a picture that is what was asked for, a red one around another.
    good: bool."""
    # bare() has hidden these lines. So: after bare().
    colour = GREEN if good else RED
    axis.spines[:].set(visible=True, linewidth=5, color=colour)


def plot_curves(axis, x, curves, colours, **look):
    """A line for each name, and a legend.

    x         n numbers
    curves    {name: n numbers}
    colours   one per name, or more
    look      options of axis.plot, for all lines"""
    for (name, values), colour in zip(curves.items(), colours):
        axis.plot(x, values, color=colour, label=name, **look)
    axis.legend()


def cut_lines(axis, positions, **look):
    """Horizontal and vertical lines at the same places, the cuts between patches.
    positions: numbers, in the units of the axes."""
    for k in positions:
        axis.axhline(k, color=GREY, **look)
        axis.axvline(k, color=GREY, **look)


def tile_channels(x):
    """The channels of a latent picture side by side in two rows, (2 h, c/2 w). x: (c, h, w)."""
    top, bottom = x.chunk(2)                                # each (c/2, h, w)

    # Side by side in one picture: all channels then share one scale of colours.
    above = torch.cat(list(top), dim=1)                     # (h, c/2 w)
    below = torch.cat(list(bottom), dim=1)
    return torch.cat([above, below], dim=0)                 # (2 h, c/2 w)


def show_numbers(axis, numbers, most=3, **look):
    """Numbers as colours, from red (-most) over white (0) to blue (most). Returns the image.
    numbers: (rows, columns)."""
    # Both ends are fixed, not taken from the numbers: so equal colours are equal numbers in two
    # pictures that stand side by side.
    return axis.imshow(numbers, cmap="RdBu", vmin=-most, vmax=most, **look)


def show_changes(axis, change, least=-2.5, **look):
    """Relative changes as colours, from white (10^least or less) to blue (1). Returns the image.
    change: (rows, columns)."""
    # Logarithms: a change of a thousandth is small, and still a leak that must be seen.
    shade = log_change(change)
    return axis.imshow(shade, cmap="Blues", vmin=least, vmax=0, **look)


def show_latents(axis, x):
    """The four channels of latents x (4, h, w), with lines between."""
    _, h, w = x.shape
    show_numbers(axis, tile_channels(x))

    # A pixel's middle is at a whole number, so the edge between two is at a half.
    axis.axhline(h - 0.5, color="black", linewidth=1.5)
    axis.axvline(w - 0.5, color="black", linewidth=1.5)


def show_mask(axis, image_id, doc_id, labels, fontsize=12):
    """Who may look at whom, for one row: dark = in order, orange = only as patches of the same
    picture. image_id, doc_id: (1, T); labels: T str."""
    # Two masks, so that the picture shows what the second half of the OR adds: the orange.
    causal = or_mask(image_id, doc_id, bidirectional=False)[0]
    mask = or_mask(image_id, doc_id)[0]
    kinds = kinds_of(mask, causal)                          # (T, T)
    show_kinds(axis, kinds)

    # A row reads as a sentence: this position looks at those.
    cell_lines(axis, len(labels))
    label_square(axis, labels, fontsize)
    axis.set_xlabel("... at whom")
    axis.set_ylabel("who looks ...")


def kinds_of(mask, causal):
    """(T, T) int: 0 = may not look, 1 = in order, 2 = only by "same picture". Both: (T, T) bool."""
    only_same_picture = mask & ~causal
    return mask.int() + only_same_picture.int()


def show_kinds(axis, kinds):
    """Cells of three kinds: 0 white, 1 dark, 2 orange. kinds: (rows, columns) int."""
    colours = ListedColormap(["white", DARK, ORANGE])
    axis.imshow(kinds, cmap=colours, vmin=0, vmax=2)


def cell_lines(axis, n, linewidth=0.5):
    """Light lines between n x n cells, not through them."""
    # The grid hangs on the minor ticks. The major ones, at the middles, carry the labels.
    edges = np.arange(n + 1) - 0.5
    axis.set_xticks(edges, minor=True)
    axis.set_yticks(edges, minor=True)
    axis.grid(which="minor", color="#dddddd", linewidth=linewidth)
    axis.tick_params(which="minor", length=0)


def label_square(axis, labels, fontsize=12):
    """The same labels on both sides of a square of cells, one per row and column."""
    places = range(len(labels))
    axis.set_xticks(places, labels, rotation=90, fontsize=fontsize)
    axis.set_yticks(places, labels, fontsize=fontsize)


def bell(y, mean=0.0, variance=1.0):
    """The density of N(mean, variance) at points y, (n,)."""
    height = 1 / (2 * torch.pi * variance) ** 0.5
    distance = (y - mean) ** 2 / (2 * variance)
    return height * torch.exp(-distance)


def log_change(change):
    """log10 of relative changes, for a colour scale. change: a tensor; the result has its shape."""
    # No change at all would be -infinity. Below 1e-4 every scale of ours is white.
    return change.clamp(min=1e-4).log10()


def draw_pictures(pictures, titles=None, row_names=None, columns=None):
    """Pictures in rows.

    pictures    list of (h, w, 3) uint8
    titles      list of str, over the first ones; or None
    row_names   one str per row, or None
    columns     how many in a row; None: all"""
    columns = columns or len(pictures)
    rows = math.ceil(len(pictures) / columns)
    side = min(2.6, 11 / columns)           # inches, of one picture
    size = (side * columns + 0.3, side * rows + 0.4)
    _, axes = plt.subplots(rows, columns, squeeze=False, figsize=size)

    # All places are made bare: in the last row some may stay empty.
    for axis in axes.flat:
        bare(axis)
    for axis, picture in zip(axes.flat, pictures):
        axis.imshow(picture)

    # Captions above, names of the rows at the left.
    for axis, title in zip(axes.flat, titles or []):
        axis.set_title(title, fontsize=13)
    for axis, name in zip(axes[:, 0], row_names or []):
        axis.set_ylabel(name)
    plt.show()


def draw_film(states, estimates, moments):
    """One picture on its way: x_t above, the estimate of x0 below.
    states, estimates: (n, h, w, 3) uint8; moments: n numbers, the t of each column."""
    _, axes = plt.subplots(2, len(moments), figsize=(WIDTH, 2.9))

    # Above: xt while the noise goes. Below: the network's guess at the same moment. The guess
    # is decided long before xt looks like a picture.
    for k, t in enumerate(moments):
        axes[0, k].imshow(states[k])
        axes[1, k].imshow(estimates[k])
        axes[0, k].set_title(f"t = {t}", fontsize=12)
    for axis in axes.flat:
        bare(axis)
    axes[0, 0].set_ylabel("xt")
    axes[1, 0].set_ylabel("x0 guess")
    plt.show()


def draw_codes(picture, codes, drawn):
    """A picture, the numbers of its codes, and the picture that they give.
    picture, drawn: (h, w, 3) uint8; codes: (h/f, w/f) int."""
    before, words, after = panels(3, 4.4, width_ratios=[1, 1.2, 1])
    before.imshow(picture)
    after.imshow(drawn)

    # Equal codes have equal colours, so that one sees where a word is used again. Which colour
    # means nothing: codes have no order. (There are nine colours: different codes may share one.)
    fixed = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(int(codes.max()) + 1, generator=fixed)
    words.imshow(shuffled[codes], cmap="Pastel1")
    for y, row in enumerate(codes.tolist()):
        for x, code in enumerate(row):
            write(words, x, y, code, fontsize=12)

    before.set_title("a picture")
    words.set_title(f"its {codes.numel()} words")
    after.set_title("drawn from the words")
    for axis in (before, words, after):
        bare(axis)
    plt.show()
