"""
quality.py: what of a picture survives the small space                   (ours; docs/PAPER.md §4.11)

THE IDEA    Whatever the transformer draws goes through the VAE's decoder, so no drawing can be
            better than a reconstruction. If faces are blurred there, or all purple is grey, no
            training of the transformer mends it. So look at reconstructions first: every run that
            trains a VAE leaves reconstructions.png and says these numbers.
A PICTURE   x       (o_o)  [##]  <3        pictures that the VAE has not seen
            x'      (o o)  [# ]  <3        drawn back                           reconstructions.png
THE RULE    PSNR        10 log10(255^2 / mean (x - x')^2)                          in decibels (dB)
            colour      c = x - grey(x), for pixels whose channels are far apart
            kept        sum c.c' / sum c.c     1: as strong as it was, 0: grey
                        of each of six hues, red to magenta; `least` is the worst of them
SHAPES      pixels (N, h, w, c) uint8
PAPER/HERE  not in the paper, which shows reconstructions. Below 25 dB small things are lost.
READ NEXT   train.py        TEST  tests/test_train_vae.py
"""
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from support.common import write_image
from support.figures import grid
from vae import batches, to_pixels

HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")            # every 60 degrees
COLOURFUL = 100                                         # largest minus smallest channel, of 255
COLUMNS = 16                                            # pictures in reconstructions.png
# Our choice: on small pictures, eyes and letters are lost below 25 dB.
LOW_PSNR = 25.0
LOW_COLOUR = 0.7                                        # a colour that is weaker looks wrong
RARE = 0.001                                            # a hue of fewer pixels says nothing


@dataclass
class Quality:
    """How near reconstructions are to their pictures.

    psnr        in dB, over all elements of all pictures
    error       mean absolute error in grey levels, 0 to 255
    colours     {hue: how much of it is kept}; empty for grey pictures
    """
    psnr: float
    error: float
    colours: dict

    @property
    def least(self):
        """(hue, how much is kept) of the one that is kept least; None for grey pictures."""
        if not self.colours:
            return None
        return min(self.colours.items(), key=lambda item: item[1])

    def describe(self):
        """One line: PSNR, error, and the colour that is kept least."""
        line = f"PSNR {self.psnr:.1f} dB, mean error {self.error:.2f} of 255"
        if self.least:
            hue, share = self.least
            line += f", of all hues {hue} is kept least: {max(0, share):.0%}"
        return line

    def bottleneck(self):
        """A sentence if drawings will suffer from this VAE; otherwise ""."""
        faults = []
        if self.psnr < LOW_PSNR:
            faults.append(f"small things are lost (PSNR below {LOW_PSNR:g} dB)")
        if self.least and self.least[1] < LOW_COLOUR:
            faults.append(f"{self.least[0]} turns grey")
        if not faults:
            return ""
        return (f"the VAE is the bottleneck: {' and '.join(faults)}, and no drawing can be better; "
                f"a new one with more --vae-steps, --vae-channels or --vae-z helps")


@torch.no_grad()
def reconstruct(vae, pixels):
    """(N, h, w, c) uint8: pixels (N, h, w, c) uint8, through the small space and back."""
    parts = [to_pixels(vae.reconstruct(x)) for x in batches(vae, pixels)]
    return np.concatenate(parts)


def measure(pixels, drawn):
    """The Quality of reconstructions. pixels, drawn: (N, h, w, c) uint8."""
    difference = drawn.astype(np.float64) - pixels
    square = max((difference ** 2).mean(), 1e-10)       # equal pictures: 148 dB, not infinity
    psnr = 10 * np.log10(255 ** 2 / square)
    colours = colours_kept(pixels, drawn) if pixels.shape[-1] == 3 else {}
    return Quality(float(psnr), float(np.abs(difference).mean()), colours)


def colours_kept(pixels, drawn):
    """{hue: how much of it is kept} of (N, h, w, 3) uint8 pictures and their reconstructions.
    Hues that hardly any pixel has are left out."""
    x = pixels.reshape(-1, 3).astype(np.float64)                            # (n, 3)
    x_hat = drawn.reshape(-1, 3).astype(np.float64)
    c = x - x.mean(1, keepdims=True)
    c_hat = x_hat - x_hat.mean(1, keepdims=True)

    # The angle on the colour wheel: 0 is red, and six equal parts follow.
    red, green, blue = x.T
    angle = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)
    hue = np.round(angle / (np.pi / 3)).astype(int) % 6                     # (n,)
    colourful = x.max(1) - x.min(1) > COLOURFUL
    kept = {}
    for k, name in enumerate(HUES):
        here = colourful & (hue == k)
        if here.mean() > RARE:
            kept[name] = float((c[here] * c_hat[here]).sum() / (c[here] ** 2).sum())
    return kept


def show(vae, pixels, path):
    """Save originals above their reconstructions, enlarged. Returns the Quality of all of them.
    pixels: (N, h, w, c) uint8, of which the first COLUMNS are shown."""
    drawn = reconstruct(vae, pixels)
    sheet = np.concatenate([pixels[:COLUMNS], drawn[:COLUMNS]])
    sheet = grid(sheet, min(COLUMNS, len(pixels)))
    height, width, _ = sheet.shape
    image = Image.fromarray(sheet)
    write_image(path, image.resize((2 * width, 2 * height), Image.Resampling.NEAREST))
    return measure(pixels, drawn)
