"""
idea.py: the one figure of the README, drawn by the shipped model            (the paper's Fig. 1, 4)

A PICTURE   left: one sequence and who may look at whom; right: the picture in it, from noise to x0
TRY IT      python -m docs.idea          writes docs/idea.png
"""
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import sample
from attention_mask import or_mask
from support.checkpoint import decode_latents, load_trained
from support.common import ASSETS

CAPTION = "a red circle"
WORD = "#34495e"
MARK = "#95a5a6"                                        # BOI and EOI
PATCH = "#e67e22"
HERE = Path(__file__).parent


def denoise(caption, moments):
    """[(t, (h, w, 3) uint8)]: a caption's picture on its way, after some numbers of 250 steps."""
    trained = load_trained(ASSETS / "scenes.pt")
    states = []

    def watch(event):
        if event.mode == "noise":
            states.append((event.t, event.x))

    sample.draw(trained, [caption], steps=250, watch=watch)
    chosen = []
    for k in moments:
        t, x = states[k]                                # x: (1, c, h, w)
        [picture] = decode_latents(trained, x)
        chosen.append((t, picture))
    return chosen


def draw_sequence(axis, tokens, colours):
    """The sequence as a row of boxes; x from 0 to len(tokens)."""
    look = {"ha": "center", "fontsize": 8.5}
    for k, (token, colour) in enumerate(zip(tokens, colours, strict=True)):
        box = Rectangle((k + 0.04, 0), 0.92, 1, color=colour)
        axis.add_patch(box)
        axis.text(k + 0.5, 0.5, token, va="center", color="white", **look)
    # What the words say, and the patches, each above the middle of its boxes.
    axis.text(1.5, 1.25, "say the next word", va="bottom", **look)
    axis.text(6, 1.25, "say their noise", va="bottom", **look)
    axis.set_xlim(0, len(tokens))
    axis.set_ylim(0, 1.9)
    axis.axis("off")


def draw_mask(axis, tokens, image_id):
    """Who (row) may look at whom (column): blue by order, orange because of the same picture."""
    # 1. 0: may not look. 1: may, by order. 2: may, only as a patch of the same picture.
    image_id = image_id[None]                           # (1, T): one row
    doc_id = torch.zeros_like(image_id)
    mask = or_mask(image_id, doc_id)[0]
    causal = or_mask(image_id, doc_id, bidirectional=False)[0]
    kinds = mask.int() + (mask & ~causal).int()         # (T, T)

    # 2. Cells that are as wide as the boxes of the sequence above, with lines between.
    T = len(tokens)
    colours = ListedColormap(["white", WORD, PATCH])
    box = (0, T, T, 0)                                  # x from 0 to T, y from T up to 0
    axis.imshow(kinds, cmap=colours, vmin=0, vmax=2, extent=box, aspect="auto")
    for k in range(T + 1):
        axis.axhline(k, color="#dddddd", linewidth=0.5)
        axis.axvline(k, color="#dddddd", linewidth=0.5)
    axis.set_xticks([])
    middles = [k + 0.5 for k in range(T)]
    axis.set_yticks(middles, tokens, fontsize=7.5)
    axis.tick_params(length=0)
    axis.set_xlabel("a row looks at a column: dark, what came before; orange, the same picture",
                    fontsize=9)


def main():
    """Draw docs/idea.png."""
    # 1. One sequence: a caption, a picture of four patches, and what follows.
    tokens = f"{CAPTION} BOI patch patch patch patch EOI and ...".split()
    is_patch = torch.tensor([token == "patch" for token in tokens])
    image_id = torch.where(is_patch, 0, -1)             # (T,)
    colour_of = {"patch": PATCH, "BOI": MARK, "EOI": MARK}
    colours = [colour_of.get(token, WORD) for token in tokens]

    # 2. At the left the sequence, and below it who may look at whom.
    figure = Figure(figsize=(11, 3.3), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    row, mask = left.subplots(2, 1, height_ratios=[1.7, 7])
    draw_sequence(row, tokens, colours)
    draw_mask(mask, tokens, image_id)

    # 3. At the right the picture on its way.
    states = denoise(CAPTION, moments=[0, 60, 120, 150, 180, 250])
    axes = right.subplots(2, 3)
    for axis, (t, picture) in zip(axes.flat, states, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(f"t = {t}", fontsize=9)
        axis.axis("off")
    right.suptitle(f'"{CAPTION}", BOI, and then its patches, drawn by the VAE', fontsize=9)
    figure.savefig(HERE / "idea.png")
    print(f"wrote {HERE / 'idea.png'}")


if __name__ == "__main__":
    main()
