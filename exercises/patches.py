"""
patches.py: the check of `patchify`                                       (patchify.py, exercise 2)

THE IDEA    In the picture every number is different, so each number that comes out says from which
            picture, channel, row and column it is. Whatever was mixed up can be read off.
A PICTURE   picture m, channel c, a latent of 4 x 6, p = 2; it is not square, or h and w could be
            exchanged unseen
                 0  1 |  2  3 |  4  5         vector 0 is  [0 1 6 7 | 24 25 30 31 | 48 49 54 55]
                 6  7 |  8  9 | 10 11                       channel 0   channel 1     channel 2
                ------+-------+------
                12 13 | 14 15 | 16 17         six vectors, in raster order
                18 19 | 20 21 | 22 23
PROPERTIES  in the order in which they are looked at: see PROPERTIES, below
READ NEXT   ../patchify.py        TEST  ../tests/test_exercises.py
"""
from dataclasses import dataclass

import torch

from exercises.trial import Advice, near, need_tensor
from patchify import patchify

M = 2
C = 3
H = 4
W = 6
P = 2
N = (H // P) * (W // P)                                 # vectors per picture
LENGTH = C * P * P                                      # numbers per vector


@dataclass
class Seen:
    """What comes out, and where each number is from.

    out             (M, N, LENGTH)
    m, c, y, x      (M, N, LENGTH) int64: picture, channel, row and column of each number
    block           (M, N, LENGTH) int64: the patch, in raster order, in which it lay
    trial           to ask more
    """
    out: torch.Tensor
    m: torch.Tensor
    c: torch.Tensor
    y: torch.Tensor
    x: torch.Tensor
    block: torch.Tensor
    trial: object


def try_patchify(trial):
    """The answer, tried on a picture whose numbers are all different."""
    size = M * C * H * W
    x = torch.arange(float(size)).view(M, C, H, W)
    out = need_tensor(trial(x, P))
    check_shape(out)
    if out.dtype != x.dtype:
        raise Advice(f"The dtype must stay {x.dtype}; yours becomes {out.dtype}.")
    # Each number once. Otherwise the places that are read off below would mean nothing.
    if not torch.equal(out.double().flatten().sort().values, torch.arange(size).double()):
        raise Advice("The numbers themselves are changed, lost, or there twice. Patchifying only "
                     "moves them: each number of the picture comes out once.")
    number = out.long()
    y = number // W % H
    x = number % W
    return Seen(out, m=number // (C * H * W), c=number // (H * W) % C, y=y, x=x,
                block=(y // P) * (W // P) + x // P, trial=trial)


def check_shape(out):
    """Raise Advice if the result has another shape than (M, N, LENGTH)."""
    # No two of these are alike for M, c, h, w = 2, 3, 4, 6, so a shape says how it came about.
    shape = tuple(out.shape)
    known = {
        (M, LENGTH, N): "The vectors stand in columns, as F.unfold leaves them: exchange the last "
                        "two dimensions.",
        (M * N, LENGTH): "The pictures have become one row of patches: keep M as the first "
                         "dimension.",
        (M, C * N, P * P): "Each channel was cut by itself. A patch has all channels of its place: "
                           "one vector of c*p*p numbers.",
        (M, H // P, W // P, LENGTH): "The patches still stand in rows and columns: make them one "
                                     "row of P vectors.",
        (M, N, C, P, P): "Each patch is still a small picture: make it one vector of c*p*p "
                         "numbers.",
        (M, N, P, P, C): "Each patch is still a small picture: make it one vector of c*p*p "
                         "numbers.",
        (N, LENGTH): "There are the patches of one picture only: M is missing.",
        (N, M, LENGTH): "The patches come before the pictures: M is the first dimension "
                        "(torch.stack(..., dim=1)).",
        (M, N * LENGTH): "All the patches of a picture have become one vector: P is a dimension of "
                         "its own (stack, not cat).",
        (M, C, N, P * P): "The channels are a dimension of their own. A patch has all channels of "
                          "its place: one vector of c*p*p numbers.",
        (M, P * P, C * (H // P) * (W // P)): "Each side is cut into p patches. p is the side of a "
                                             "patch, so there are h/p times w/p.",
        (M, H * W, C): "Each pixel has become a vector of its own: p is not used.",
        (M, C, H, W): "This is still a picture of (M, c, h, w): make it P vectors of c*p*p "
                      "numbers.",
    }
    if shape in known:
        raise Advice(f"{known[shape]} (For a picture of {(M, C, H, W)} and p = {P} you return "
                     f"{shape}, and it must be {(M, N, LENGTH)}.)")
    if shape != (M, N, LENGTH):
        raise Advice(f"A picture of {(M, C, H, W)} with p = {P} has {N} patches of {LENGTH} "
                     f"numbers, so the result must be {(M, N, LENGTH)}; yours is {shape}.")


# --------------------------------------------------------------------------------------- properties
def own_picture(seen):
    """Each vector is cut from its own picture"""
    own = torch.arange(M)[:, None, None]
    if (seen.m != own).any():
        return ("Patches of one picture lie among those of another: the first dimension must stay "
                "what it is.")


def not_a_plain_reshape(seen):
    """A patch is a square, not a stretch of memory"""
    # In memory a picture lies row by row. If the numbers still come in that order, none has moved.
    memory = seen.out.flatten()
    if torch.equal(memory, memory.sort().values):
        return ("This is a plain reshape: it cuts the memory into stretches, row by row, so that a "
                "vector holds no square. Split h and w first, then bring the halves together.")


def one_patch_per_vector(seen):
    """The pixels of a vector are those of one patch"""
    if (seen.block == seen.block[:, :, :1]).all():
        return None
    # "(p h)" for "(h p)" in a rearrange gives the right shape, and pixels from everywhere.
    rows = (seen.y == seen.y[:, :, :1]).all()
    if rows:
        return "A vector holds pixels of one row only, a strip: a patch is p high and p wide."
    first = seen.block[0, 0].unique().tolist()
    apart = (seen.y[0, 0] % (H // P) == seen.y[0, 0, 0] % (H // P)).all()
    if apart and (seen.x[0, 0] % (W // P) == seen.x[0, 0, 0] % (W // P)).all():
        return ("A vector holds pixels that lie apart, one from each patch: you split h into "
                "(p, h/p). It is (h/p, p): first which patch, then which row of it.")
    return (f"A vector must hold the pixels of one patch. Vector 0 has pixels of patches {first}: "
            "is the order of the dimensions right before they are joined?")


def raster_order(seen):
    """The patches stand in raster order: left to right, then top to bottom"""
    # Our choice: raster order, which the paper does not name. Decoding must use the same one.
    order = seen.block[0, :, 0]
    if torch.equal(order, torch.arange(N)):
        return None
    down = torch.arange(N).view(H // P, W // P).T.flatten()
    if torch.equal(order, down):
        return ("The patches run down the columns. Raster order runs along the rows, as one reads: "
                "left to right, then top to bottom.")
    if torch.equal(order, torch.arange(N).flip(0)):
        return "The patches stand in reverse: start at the top left."
    return (f"The patches stand in the order {order.tolist()}. Raster order is left to right, then "
            f"top to bottom: {list(range(N))}.")


def order_within(seen):
    """Within a vector: channel, then row, then column"""
    place = torch.stack([seen.c, seen.y % P, seen.x % P])[:, 0, 0]      # (3, LENGTH) of vector 0

    # Every order of the three is a sort by three keys. So ask by which one it is sorted.
    def sorted_by(*keys):
        """Whether the numbers of the vector are in this order, the slowest key first."""
        ranks = place[keys[0]] * 100 + place[keys[1]] * 10 + place[keys[2]]
        return bool((ranks.diff() > 0).all())

    c, y, x = range(3)
    if sorted_by(c, y, x):
        return None
    if sorted_by(y, x, c):
        return ("Channels last: the vector goes pixel by pixel. Its order is (c p p): all of "
                "channel 0 first, then channel 1. `unpatchify` counts on it.")
    if sorted_by(c, x, y):
        return ("Each patch is transposed: its pixels go column by column. Within a channel they "
                "go row by row.")
    if sorted_by(x, y, c):
        return ("Channels last, and each patch is transposed: the order is channel, then row, then "
                "column.")
    return "Within a vector the order is channel, then row, then column: (c p p). Yours is another."


def as_the_module(seen):
    """The same as the module, for any p and any size"""
    # A patch side of 3 and of 1, tall pictures, one channel: whatever the first picture had not.
    for shape, p in (((1, 2, 6, 9), 3), ((3, 1, 4, 2), 1), ((2, 2, 8, 4), 4), ((1, 4, 6, 4), 2)):
        size = torch.Size(shape).numel()
        x = torch.arange(float(size)).view(shape) / 3   # no number of these fits in 16 bits
        name = f"The result for a picture of {shape} and p = {p}"
        out = need_tensor(seen.trial(x, p), name)
        want = patchify(x, p)
        if out.shape == want.shape and near(out, want, rtol=1e-2) and not torch.equal(out, want):
            return "The numbers are rounded on the way: is there a dtype of 16 bits in it?"
        if not torch.equal(out, want):
            return (f"Right for {(M, C, H, W)} and p = {P}, wrong for {shape} and p = {p}: is a "
                    f"number written into it that must be computed, or are h and w taken for "
                    f"equal?")


def refuses_odd_sides(seen):
    """ValueError if p does not divide h and w"""
    for h, w in ((4, 5), (5, 4)):
        raised = seen.trial.raised(torch.zeros(1, 1, h, w), 2)
        if raised != "ValueError":
            return (f"All right but for one thing: a picture of {h} x {w} cannot be cut into 2 x 2 "
                    f"patches, and your function raises {raised}. Raise ValueError if p does not "
                    f"divide both sides; otherwise pixels are lost without a word.")


PROPERTIES = (own_picture, not_a_plain_reshape, one_patch_per_vector, raster_order, order_within,
              as_the_module, refuses_odd_sides)
