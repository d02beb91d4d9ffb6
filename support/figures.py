"""
figures.py: what a run did, as pictures                   (the paper's Fig. 1, 2, 6, 7; our curves)

THE IDEA    Numbers convince, pictures explain. Everything that draws for people is here, so that
            the other files hold ideas. A training run leaves curves.png and samples.png; sample.py
            leaves a sheet of pictures, a film of the denoising, and a trace of the two modes.
A PICTURE   film.png    x_t   ~~~~  ~~~:  ~~::  ...  [##]       ten moments, from t = T to t = 0
                        x0    ....  :..:  :##:  ...  [##]       what the model believes at each
SHAPES      pictures (M, h, w, 3) uint8; documents and Events as sample.py has them
HERE        matplotlib's Figure is used without pyplot. No window opens and no backend is chosen,
            so a notebook that imports this keeps its own figures.
READ NEXT   sample.py        TRY IT  python sample.py "a red circle" --film film.png --trace
"""
import io
import math
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support.checkpoint import decode_latents
from support.common import whole_file, write_image


# -------------------------------------------------------------------------------- a training run
def plot_curves(log, path, reference=()):
    """Save curves.png: the losses, the diffusion loss by noise level, the conditioning gap. A rival
    has no diffusion loss and perhaps no gap: then these panels are left out.

    log         list of dicts, the lines of log.jsonl
    reference   those of a run like this one (reference.py), drawn below it, dotted; or nothing"""
    panels = [plot_losses]
    if any(row["diffusion"] is not None for row in log):
        panels.append(plot_levels)
    # It is measured now and then, and not at all where all captions are alike.
    if rows_with(log, "gap"):
        panels.append(plot_gap)
    width = 4.4 * len(panels)                           # inches
    figure = new_figure(width, 3.6)
    n = len(panels)
    (axes,) = figure.subplots(1, n, squeeze=False)      # one row of n

    # Each panel draws its own lines. What all of them share is done here.
    for axis, plot in zip(axes, panels):
        plot(axis, log, reference)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


# How the reference is drawn, below the run itself.
DOTTED = {"linestyle": ":", "alpha": 0.6, "zorder": 1}


def rows_with(log, name):
    """The rows that have a number of this name."""
    return [row for row in log if row.get(name) is not None]


def plot_number(axis, log, reference, name, color, **look):
    """One number of the log against the step; dotted, the reference's."""
    # The same colour for both: what is compared is a line with its own dots.
    for rows, look_of_rows in ((log, look), (reference, DOTTED)):
        rows = rows_with(rows, name)
        steps = [row["step"] for row in rows]
        values = [row[name] for row in rows]
        axis.plot(steps, values,
                  color=color, **look_of_rows)


def plot_losses(axis, log, reference):
    """Both losses in one panel."""
    # L = L_LM + 5 L_DDPM, and their scales differ, so on a log axis.
    plot_number(axis, log, reference, "lm", "C0", label="LM (nats per word)")
    title = "the loss"
    if rows_with(log, "diffusion"):
        plot_number(axis, log, reference, "diffusion", "C1", label="diffusion (mean square)")
        title = "the two losses"

    # An empty line: the legend names the dots once, not once per loss.
    if reference:
        axis.plot([], [], color="grey", label="a run like this one", **DOTTED)
    axis.set_title(title)
    axis.set_yscale("log")
    axis.legend(frameon=False)


def plot_levels(axis, log, reference):
    """The diffusion loss in five ranges of t."""
    from matplotlib import colormaps  # here, as in `new_figure`

    # One mean over all t hides that some noise levels still improve when others do not.
    for k in range(5):
        color = colormaps["viridis"](k / 5)
        for rows, look in ((log, {}), (reference, DOTTED)):
            steps = [row["step"] for row in rows]
            values = [row["by_t"][k] for row in rows]
            axis.plot(steps, values,
                      color=color, **look)

        # Named beside the panel: inside, the names would lie on the lines.
        first = 200 * k + 1
        last = first + 199
        height = 0.9 - 0.09 * k                         # as a share of the panel's
        axis.text(1.01, height, f"t {first}..{last}",
                  color=color, fontsize=8, transform=axis.transAxes)
    axis.set_title("diffusion loss by noise level")
    axis.set_yscale("log")


def plot_gap(axis, log, reference):
    """How much worse a wrong caption is than the right one."""
    plot_number(axis, log, reference, "gap", "C0", marker=".")
    # The line that a run must leave: there a caption changes nothing.
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_title("conditioning gap (0: caption ignored)")


def plot_samples(samples, path, columns=6, rows=4):
    """Save samples.png: pictures under their prompts. A red title marks a picture that does not
    show what its prompt says.

    samples: list of (prompt, (h, w, 3) uint8, whether it is right)."""
    # By chance: prompts come in turn, and every ninth of them could be the same three.
    rng = np.random.default_rng(0)
    order = rng.permutation(len(samples))
    most = columns * rows
    order = sorted(order[:most])
    chosen = [samples[k] for k in order]

    # The sheet is as high as the pictures that there are, not as those it has room for.
    _, first, _ = chosen[0]
    h, w, _ = first.shape
    rows = math.ceil(len(chosen) / columns)
    height = (2 * h / w + 0.4) * rows                   # in inches: pictures, and their titles
    figure = new_figure(2 * columns, height)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:                                   # the empty ones at the end, too
        axis.axis("off")

    # Over each picture what was asked; the colour says whether the picture shows it.
    for axis, (prompt, picture, right) in zip(axes, chosen):
        axis.imshow(picture, interpolation="nearest")
        color = "black" if right else "red"
        title = two_lines(prompt)
        # Captions from the web have dollar signs, which matplotlib would read as formulas.
        axis.set_title(title, parse_math=False,
                       fontsize=9, color=color)
    if not all(right for _, _, right in chosen):
        figure.supxlabel("red: not as asked", fontsize=8, color="red")
    save_figure(figure, path)


def new_figure(width, height):
    """An empty matplotlib Figure of so many inches."""
    # Imported here: it takes a third of a second, and what sample.py writes has no axes.
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path, dpi=110):
    """Write a matplotlib figure as a .png, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    with whole_file(path) as file:
        file.write(content.getvalue())


def two_lines(text, length=60):
    """A caption as a title: cut to a length, and in two lines if it is long."""
    text = textwrap.shorten(text, length, placeholder=" ...")
    words = text.split()
    is_short = len(text) <= 18
    if is_short or len(words) < 2:
        return text
    middle = len(words) // 2
    first = " ".join(words[:middle])
    second = " ".join(words[middle:])
    return f"{first}\n{second}"


# -------------------------------------------------------------------------------------- sampling
def save_picture(pixels, path, enlarge=8):
    """Save (h, w, 3) uint8, enlarged without smoothing so that small pictures can be seen."""
    h, w, _ = pixels.shape
    size = (w * enlarge, h * enlarge)
    image = Image.fromarray(pixels)
    write_image(path, image.resize(size, Image.Resampling.NEAREST))


def save_film(trained, frames, path):
    """Save the denoising of the first picture: a .gif, or ten moments side by side, x_t above and
    the estimate of x0 below.

    frames: the Events of mode "noise", of one picture or of several."""
    # 1. Ten moments of the first picture, from t = T to its t = 0.
    times = [event.t for event in frames]
    last = times.index(0)
    moments = []
    for k in range(10):
        nearest = round(k * last / 9)
        moments.append(frames[nearest])

    # 2. Latents to pixels. Of a batch only the first row is shown. x_t is no latent that the VAE
    #    has seen, but it decodes to something that looks as noisy as it is.
    states = [event.x[0].cpu() for event in moments]                # ten of (c, h, w)
    estimates = [event.x0[0].cpu() for event in moments]
    states = decode_latents(trained, torch.stack(states))           # (10, h, w, 3)
    estimates = decode_latents(trained, torch.stack(estimates))

    # 3. A strip, or a film.
    if Path(path).suffix.lower() != ".gif":
        both = np.concatenate([states, estimates])                  # (20, h, w, 3)
        strip = grid(both, columns=10)
        save_picture(strip, path, enlarge=4)
        return
    film = []
    for picture in states:
        image = Image.fromarray(picture)
        image = image.resize((256, 256), Image.Resampling.NEAREST)
        film.append(image)
    film += [film[-1]] * 5                              # the finished picture stays for a second
    first, *others = film
    write_image(path, first, save_all=True, append_images=others,
                duration=200, loop=0)                   # milliseconds; 0: for ever


def print_event(trained, event):
    """Print one line of --trace: the rows, how far the cache of each has grown, and the mode. Of
    the steps of a picture only the first and the last are printed."""
    # 1. What has just happened, in the paper's words.
    if event.mode == "prompt":
        what = "prompt read"
    elif event.mode == "word":
        names = [trained.tokenizer.vocabulary[token] for token in event.tokens]
        what = "LM mode: " + " | ".join(names)
    elif event.mode == "noise":
        if event.t not in (0, trained.diffusion.T):
            return
        patches = trained.model.config.patches
        what = f"diffusion mode: t = {event.t}, {patches} patches over the same places"
    else:
        what = "picture read again at t = 0, then <eoi>"

    # 2. To whom. While a picture is drawn, the cache of its row does not grow.
    rows = ",".join(str(b) for b in event.rows)
    filled = ",".join(str(n) for n in event.filled)
    tqdm.write(f"rows {rows:8s} cache {filled:12s} {what}")


def grid(pictures, columns, gap=2):
    """One (H, W, 3) uint8 picture of many (M, h, w, 1 or 3), in rows, on grey."""
    M, h, w, _ = pictures.shape
    rows = math.ceil(M / columns)

    # A place is a picture and the gap behind it; one more gap stands before the first.
    place_h = h + gap
    place_w = w + gap
    size = (rows * place_h + gap, columns * place_w + gap, 3)
    sheet = np.full(size, 96, dtype=np.uint8)
    for k, picture in enumerate(pictures):
        row, column = divmod(k, columns)
        y = gap + row * place_h
        x = gap + column * place_w
        sheet[y: y + h, x: x + w] = picture
    return sheet
