"""
show.py: what a run did, as pictures                                     (the figures of the paper: 1, 2, 6, 7; our own curves)

THE IDEA    Numbers convince, pictures explain. Everything that draws for people is here, so that the other files hold ideas.
            curves.png and samples.png of a training run; pages of words and pictures, films of the denoising, and a trace of
            the two modes, of `python sample.py`.
SHAPES      pictures (M, h, w, 3) uint8; documents and Events as sample.py has them
READ NEXT   sample.py        TRY IT  python sample.py "a red circle" --film film.png --page page.html --trace
"""
import base64
import html
import io
import textwrap
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support.checkpoint import decode_latents

matplotlib.use("Agg")                                   # files, no windows


# --------------------------------------------------------------------------------------------------------- of a training run
def plot_curves(log, path):
    """curves.png: both losses, the loss by noise level, the conditioning gap; of a rival what it has of them."""
    steps, gaps = [row["step"] for row in log], [(row["step"], row["gap"]) for row in log if "gap" in row]
    diffuses = any(row["diffusion"] is not None for row in log)
    panels = ["losses"] + ["noise"] * diffuses + ["gap"] * bool(gaps)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), constrained_layout=True, squeeze=False)
    axes = dict(zip(panels, axes[0]))
    axes["losses"].plot(steps, [row["lm"] for row in log], label="LM (nats per word)")
    axes["losses"].set_title("the two losses" if diffuses else "the loss")
    axes["losses"].set_yscale("log")
    if diffuses:
        axes["losses"].plot(steps, [row["diffusion"] for row in log], label="diffusion (mean square)")
        for k in range(5):
            axes["noise"].plot(steps, [row["by_t"][k] for row in log], label=f"t in {200 * k + 1}..{200 * k + 200}", color=plt.cm.viridis(k / 5))
        axes["noise"].set_title("diffusion loss by noise level")
        axes["noise"].set_yscale("log")
        axes["noise"].legend(frameon=False, fontsize=8)
    if gaps:
        axes["gap"].plot(*zip(*gaps), marker=".")
        axes["gap"].axhline(0, color="grey", linewidth=0.8)
        axes["gap"].set_title("conditioning gap (0: caption ignored)")
    for axis in axes.values():
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    axes["losses"].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_samples(shown, path, columns=6, rows=4):
    """samples.png: pictures under their prompts; a red title marks one that is not what was asked for."""
    # By chance: prompts come in turn, and every ninth of them could be the same three.
    chosen = [shown[k] for k in sorted(np.random.default_rng(0).permutation(len(shown))[:columns * rows])]
    tall = chosen[0][1].shape[0] / chosen[0][1].shape[1]
    figure, axes = plt.subplots(-(-len(chosen) // columns), columns, figsize=(2 * columns, (2 * tall + 0.4) * -(-len(chosen) // columns)),
                                squeeze=False, constrained_layout=True)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (text, picture, right) in zip(axes.flat, chosen):
        axis.imshow(picture, interpolation="nearest")
        text = textwrap.shorten(text, 60, placeholder=" ...")           # captions of the web are long ...
        halves = text.split() if len(text) > 18 else [text]
        middle = len(halves) // 2
        axis.set_title(" ".join(halves[:middle]) + "\n" + " ".join(halves[middle:]) if len(halves) > 1 else text,
                       fontsize=9, color="black" if right else "red", parse_math=False)          # ... and have dollar signs
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------ of sampling
def save_picture(pixels, path, enlarge=8):
    """Save (h, w, 3) uint8, enlarged without smoothing so that small pictures can be seen."""
    Image.fromarray(pixels).resize((pixels.shape[1] * enlarge, pixels.shape[0] * enlarge), Image.Resampling.NEAREST).save(path)


def save_page(trained, documents, path):
    """One HTML file that holds everything: the words and pictures of each document, in order."""
    rows = []
    for parts in documents:
        cells = []
        for part in parts:
            if isinstance(part, str):
                cells.append(f"<p>{html.escape(part)}</p>")
            else:
                file = io.BytesIO()
                Image.fromarray(decode_latents(trained, part[None])[0]).save(file, "PNG")
                cells.append(f'<img alt="picture" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">')
        rows.append("<section>" + "\n".join(cells) + "</section>")
    Path(path).write_text("<!doctype html><meta charset=utf-8><title>Transfusion</title><style>"
                          "body{font:18px/1.4 Georgia,serif;margin:2em auto;max-width:60em;background:#fafafa}"
                          "section{display:flex;flex-wrap:wrap;align-items:center;gap:.8em;padding:1em 0;border-bottom:1px solid #ccc}"
                          "p{max-width:12em;margin:0}img{width:128px;image-rendering:pixelated}</style>\n" + "\n".join(rows), encoding="utf-8")


def save_film(trained, frames, path):
    """The denoising of the first picture: a .gif, or ten moments side by side, x_t above and the guess at x0 below.
    frames: Events of mode "noise"."""
    last = next(k for k, event in enumerate(frames) if event.t == 0)
    shown = [frames[round(k * last / 9)] for k in range(10)]
    rows = [decode_latents(trained, torch.stack([f[0].cpu() for f in states]))
            for states in ([e.x for e in shown], [e.x0 for e in shown])]
    if Path(path).suffix.lower() == ".gif":
        films = [Image.fromarray(p).resize((256, 256), Image.Resampling.NEAREST) for p in rows[0]]
        films[0].save(path, save_all=True, append_images=films[1:] + [films[-1]] * 5, duration=200, loop=0)
    else:
        save_picture(grid(np.concatenate(rows), 10), path, enlarge=4)


def print_event(trained, event):
    """One line of --trace: the mode, the rows, and how far each row's cache has grown. Of the steps of a picture, the first
    and the last."""
    say = {"prompt": lambda: "prompt read", "picture": lambda: "picture read again at t = 0, then <eoi>",
           "word": lambda: "LM mode: " + " | ".join(trained.tokenizer.vocabulary[k] for k in event.tokens),
           "noise": lambda: f"diffusion mode: t = {event.t}, {trained.model.config.patches} patches over the same places"}[event.mode]
    if event.mode != "noise" or event.t in (0, trained.diffusion.T):
        tqdm.write(f"rows {','.join(map(str, event.rows)):8s} cache {','.join(map(str, event.filled)):12s} {say()}")


def grid(pictures, columns, gap=2):
    """One (H, W, 3) uint8 picture of many (M, h, w, 1 or 3), in rows, on grey."""
    M, h, w, _ = pictures.shape
    rows = -(-M // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 96, dtype=np.uint8)
    for k, picture in enumerate(pictures):
        y, x = gap + (k // columns) * (h + gap), gap + (k % columns) * (w + gap)
        sheet[y: y + h, x: x + w] = picture
    return sheet
