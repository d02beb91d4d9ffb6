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
import textwrap

import matplotlib.pyplot as plt
from figures import *

from support.checkpoint import decode_latents


# ---------------------------------------------------------------------------------- what is printed
def print_source(function, first, last):
    """Print a function's source, from the line that has `first` in it to the one with `last`."""
    lines = inspect.getsource(function).splitlines()
    begin = next(k for k, line in enumerate(lines) if first in line)
    end = next(k for k, line in enumerate(lines) if last in line)
    print(textwrap.dedent("\n".join(lines[begin: end + 1])))


def print_tokens(name, tokens, tokenizer):
    """One line: a name, then the tokens as words. A picture's patches are one [P patches].
    tokens: list of ids; tokenizer: data.Words."""
    words = [tokenizer.vocabulary[token] for token in tokens]
    text = " ".join(words)
    patches = words.count("<patch>")
    if patches:
        text = text.replace(" ".join(["<patch>"] * patches), f"[{patches} patches]")
    print(f"{name:14s} {text}")


@contextlib.contextmanager
def count_positions(model):
    """A list that, while it lasts, gets one number per forward: how many positions went through the
    blocks, over all rows."""
    counts = []

    def count(block, inputs):
        rows, length, _ = inputs[0].shape
        counts.append(rows * length)

    handle = model.blocks[0].register_forward_pre_hook(count)
    yield counts
    handle.remove()


def offer(function, **choices):
    """Widgets for a function's arguments where Jupyter has them; else a line that says what to do.

    function    gives pictures (M, h, w, 3) uint8
    choices     as ipywidgets.interact_manual"""
    if not importlib.util.find_spec("ipywidgets"):
        print("No ipywidgets here: change a value below and run the cell again.")
        return
    from ipywidgets import interact_manual

    @functools.wraps(function)              # the widgets are made of its arguments
    def draw_it(**values):
        draw_pictures(list(function(**values)))

    print("Choose, and press the button.")
    interact_manual(draw_it, **choices)


# ------------------------------------------------------------------------------------ what is seen
def draw_next_words(answers):
    """The likeliest next tokens at several places.
    answers: {words so far: {token: probability}}."""
    for axis, (text, likely) in zip(panels(len(answers), 3.4), answers.items()):
        names = list(likely)[::-1]
        colours = [ORANGE if name == "<boi>" else DARK for name in names]
        axis.barh(names, [likely[name] for name in names], color=colours)
        axis.set(xlim=(0, 1))
        axis.set_title(textwrap.fill(f"{text} ...", 16), fontsize=13)
    plt.show()


def draw_growth(events):
    """How far the cache is filled, event by event. events: list of sample.Event, of one row."""
    colours = {"prompt": GREY, "word": DARK, "noise": ORANGE, "picture": GREEN}
    names = {"prompt": "prompt read", "word": "a word", "noise": "a diffusion step",
             "picture": "picture finished"}
    axis = one_panel(WIDTH, 3.8)
    for mode, colour in colours.items():
        places = [k for k, event in enumerate(events) if event.mode == mode]
        heights = [events[k].filled[0] for k in places]
        axis.bar(places, heights, width=0.85, color=colour, label=names[mode])
    axis.set(xlabel="event", title="positions in the sequence")
    axis.legend(ncols=4, loc="upper left", fontsize=12)
    axis.set_ylim(0, 1.25 * max(event.filled[0] for event in events))
    plt.show()


def draw_costs(lengths, costs, title):
    """Two costs against the length of what stands before the picture. costs: {name: numbers}."""
    axis = one_panel(9, 3.8)
    plot_curves(axis, lengths, costs, (RED, GREEN), marker="o", markersize=9)
    axis.set(xlabel="positions before the picture", title=title, ylim=(0, None))
    plt.show()


def draw_judged(pictures, right, titles=None, row_names=None, columns=None):
    """Pictures in rows, framed green if they are what was asked for, else red.

    pictures    list of (h, w, 3) uint8
    right       as many bool; None: no frame
    titles      as many str, or None
    row_names   one str per row, or None"""
    columns = columns or len(pictures)
    rows = -(-len(pictures) // columns)     # rounded up
    side = min(2.4, WIDTH / columns)
    size = (side * columns, (side + (0.45 if titles else 0)) * rows)
    _, axes = plt.subplots(rows, columns, squeeze=False, figsize=size)
    for axis in axes.flat:
        bare(axis)
    for axis, picture, good in zip(axes.flat, pictures, right):
        axis.imshow(picture)
        if good is not None:
            frame(axis, good)
    width = int(side * 9)                   # letters that fit above a picture
    for axis, title in zip(axes.flat, titles or []):
        axis.set_title(textwrap.fill(title, width), fontsize=12)
    for axis, name in zip(axes[:, 0], row_names or []):
        axis.set_ylabel(name)
    plt.show()


def draw_document(trained, document):
    """A document as it reads: words and pictures, from left to right.
    document: list of str and latents (c, h, w)."""
    axes = panels(len(document), min(3.0, WIDTH / len(document)))
    for axis, part in zip(axes, document):
        bare(axis)
        if isinstance(part, str):
            axis.set(xlim=(0, 1), ylim=(0, 1))
            write(axis, 0.5, 0.5, textwrap.fill(part, 90 // len(document)), fontsize=14)
        else:
            axis.imshow(decode_latents(trained, part[None])[0])
    plt.show()


def draw_share(places, shares, xlabel, title):
    """A share, 0 to 1, against something."""
    axis = one_panel(9, 3.6)
    axis.plot(places, shares, marker="o", markersize=9, color=ORANGE)
    axis.set(xlabel=xlabel, title=title, ylim=(-0.04, 1.04))
    plt.show()
