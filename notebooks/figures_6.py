"""
figures_6.py: what notebooks 6 and 9 draw and check, beside figures.py

THE IDEA    Documents of words and pictures, and what the parser says of them. A notebook takes this
            module under the name `figures`. So all of figures.py is imported here: what the
            notebooks share.
SHAPES      pictures (M, h, w, 3) uint8; a document is a list of str and latents (c, h, w)
HERE        Every `draw_...` calls plt.show() once. tests/test_notebooks.py counts on it.
TEST        tests/test_notebooks.py
"""
import contextlib
import functools
import importlib.util
import inspect
import math
import textwrap

import matplotlib.pyplot as plt
from figures import *

from support.checkpoint import decode_latents


# ---------------------------------------------------------------------------------- what is printed
def print_source(function, first, last):
    """Print a function's source, from the line that has `first` in it to the one with `last`."""
    # From the module itself, whenever the cell runs: a copy on the page would grow old.
    lines = inspect.getsource(function).splitlines()
    begin = next(k for k, line in enumerate(lines) if first in line)
    end = next(k for k, line in enumerate(lines) if last in line)
    part = lines[begin: end + 1]

    # To the left margin: it is one level deep in its function, and a page is narrow.
    text = textwrap.dedent("\n".join(part))
    print(text)


def print_tokens(name, tokens, tokenizer):
    """One line: a name, then the tokens as words. A picture's patches are one [P patches].
    tokens: list of ids; tokenizer: data.Words."""
    words = [tokenizer.vocabulary[token] for token in tokens]
    text = " ".join(words)

    # A line of sixteen times <patch> would hide the words around it.
    patches = words.count("<patch>")
    if patches:
        in_full = " ".join(["<patch>"] * patches)
        text = text.replace(in_full, f"[{patches} patches]")
    print(f"{name:14s} {text}")


@contextlib.contextmanager
def count_positions(model):
    """A list that, while it lasts, gets one number per forward: how many positions went through the
    blocks, over all rows. model: model.Transfusion."""
    counts = []

    def count(block, inputs):
        rows, length, _ = inputs[0].shape                   # (B, T, D)
        counts.append(rows * length)

    # Before the first block: the others see the same positions again. Counted, not timed: the
    # number is the same on every machine.
    handle = model.blocks[0].register_forward_pre_hook(count)
    yield counts
    handle.remove()


def offer(function, **choices):
    """Widgets for a function's arguments where Jupyter has them; else a line that says what to do.

    function    gives pictures (M, h, w, 3) uint8
    choices     as ipywidgets.interact_manual"""
    # requirements.txt does not ask for ipywidgets. The page works without.
    if not importlib.util.find_spec("ipywidgets"):
        print("No ipywidgets here: change a value below and run the cell again.")
        return
    from ipywidgets import interact_manual

    # ipywidgets looks at the arguments of what it gets, to make the widgets: wraps hands them on.
    @functools.wraps(function)
    def draw_it(**values):
        pictures = function(**values)
        draw_pictures(list(pictures))

    # manual: a picture takes seconds, too long to follow a slider.
    print("Choose, and press the button.")
    interact_manual(draw_it, **choices)


# ------------------------------------------------------------------------------------ what is seen
def draw_next_words(answers):
    """The likeliest next tokens at several places.
    answers: {words so far: {token: probability}}."""
    axes = panels(len(answers), 3.4)
    for axis, (text, likely) in zip(axes, answers.items()):
        # Bars are drawn from below; the likeliest is to stand above.
        names = list(likely)
        names.reverse()
        lengths = [likely[name] for name in names]

        # One of the tokens is no word. Orange: here the model asks for a picture.
        colours = [ORANGE if name == "<boi>" else DARK for name in names]
        axis.barh(names, lengths, color=colours)
        axis.set_xlim(0, 1)

        # The words so far are the title: the bars go on from there.
        title = textwrap.fill(f"{text} ...", 16)
        axis.set_title(title, fontsize=13)
    plt.show()


def draw_growth(events):
    """How far the cache is filled, event by event. events: list of sample.Event, of one row."""
    colours = {"prompt": GREY, "word": DARK, "noise": ORANGE, "picture": GREEN}
    names = {"prompt": "prompt read", "word": "a word", "noise": "a diffusion step",
             "picture": "picture finished"}
    axis = one_panel(WIDTH, 3.8)

    # To see: each word makes the bars one higher. Diffusion steps leave the height as it is,
    # because each of them writes over the one before.
    for mode, colour in colours.items():
        places = [k for k, event in enumerate(events) if event.mode == mode]
        heights = [events[k].filled[0] for k in places]
        axis.bar(places, heights, width=0.85,
                 color=colour, label=names[mode])

    # A quarter more than the highest bar, for the legend.
    highest = max(event.filled[0] for event in events)
    axis.set_ylim(0, 1.25 * highest)
    axis.set_xlabel("event")
    axis.set_title("positions in the sequence")
    axis.legend(ncols=4, loc="upper left", fontsize=12)
    plt.show()


def draw_costs(lengths, costs, title):
    """Two costs against the length of what stands before the picture.
    lengths: n numbers; costs: {name: n numbers}, first the wasteful way."""
    axis = one_panel(9, 3.8)
    colours = (RED, GREEN)
    plot_curves(axis, lengths, costs, colours,
                marker="o", markersize=9)

    # From 0, so that the slopes can be compared: one line rises, the other should hardly.
    axis.set_ylim(0, None)
    axis.set_xlabel("positions before the picture")
    axis.set_title(title)
    plt.show()


def draw_judged(pictures, right, titles=None, row_names=None, columns=None):
    """Pictures in rows, framed green if they are what was asked for, else red.

    pictures    list of (h, w, 3) uint8
    right       as many bool; None in a place: no frame there
    titles      as many str, or None
    row_names   one str per row, or None
    columns     how many in a row; None: all"""
    columns = columns or len(pictures)
    rows = math.ceil(len(pictures) / columns)
    side = min(2.4, WIDTH / columns)        # inches, of one picture
    above = 0.45 if titles else 0           # for a title
    size = (side * columns, (side + above) * rows)
    _, axes = plt.subplots(rows, columns, squeeze=False, figsize=size)
    for axis in axes.flat:
        bare(axis)

    # None: a picture that was given, not asked for. There is nothing to judge.
    for axis, picture, good in zip(axes.flat, pictures, right):
        axis.imshow(picture)
        if good is not None:
            frame(axis, good)

    # A caption is longer than its picture is wide, so it is broken into lines.
    width = int(side * 9)                   # letters that fit above a picture
    for axis, title in zip(axes.flat, titles or []):
        text = textwrap.fill(title, width)
        axis.set_title(text, fontsize=12)
    for axis, name in zip(axes[:, 0], row_names or []):
        axis.set_ylabel(name)
    plt.show()


def draw_document(trained, document):
    """A document as it reads: words and pictures, from left to right.
    trained: checkpoint.Trained; document: list of str and latents (c, h, w)."""
    n = len(document)
    height = min(3.0, WIDTH / n)
    axes = panels(n, height)
    width = 90 // n                         # letters of a line that fit into one part

    # Each part has a place of the same size: to the model both are a stretch of the sequence.
    for axis, part in zip(axes, document):
        bare(axis)
        if isinstance(part, str):
            axis.set_xlim(0, 1)
            axis.set_ylim(0, 1)
            text = textwrap.fill(part, width)
            write(axis, 0.5, 0.5, text, fontsize=14)
        else:
            latents = part[None]                            # (1, c, h, w)
            pixels = decode_latents(trained, latents)[0]
            axis.imshow(pixels)
    plt.show()


def draw_share(places, shares, xlabel, title):
    """A share, 0 to 1, against something. places, shares: n numbers each."""
    axis = one_panel(9, 3.6)
    axis.plot(places, shares, marker="o", markersize=9,
              color=ORANGE)

    # All of the range, and a little more, or a point at 0 or 1 would be cut in half.
    axis.set_ylim(-0.04, 1.04)
    axis.set_xlabel(xlabel)
    axis.set_title(title)
    plt.show()
