"""
scenes.py: a small world about which everything is known      (our stand-in for the data of §4.1 and for GenEval, App. B.1)

THE IDEA    Pictures of one to four coloured shapes, and sentences about them. We wrote the grammar, so the entropy of its
            language is a number. We wrote the renderer, so a picture can be read back exactly. Every metric of the paper
            thus has a toy version that is computed, not judged by another network.
A PICTURE   32x32 pixels, 2x2 cells; each cell holds at most one shape, moved and scaled a little.

                +-----+-----+
                |  o  |     |      "a red circle left of ..."  relations hold between neighbouring cells only
                +-----+-----+
                |     |  x  |      black background; colours are the corners of the RGB cube, and antialiasing only
                +-----+-----+      darkens, so `channel > 0.5` decodes the colour

THE RULES   Six kinds of caption, the six categories of GenEval:
                single_object  a circle                     counting    three squares
                two_object     a circle and a cross         position    a circle left of a square
                colors         a red circle                 color_attr  a red circle and a blue square
            and a seventh, ours, that joins the last two:   a red circle left of a blue square
            A caption is drawn uniformly from its category; then a scene is drawn that contains exactly what it says.
            Two colour-shape pairs are never shown and never named in training: pink triangle, yellow cross.
            Text alone is a short deduction: "a red circle is left of a blue square . the blue square is right of the
            red circle ."  The second sentence follows from the first: that is the toy version of the text suite.
SHAPES      a picture is (h, w, 3) uint8; a batch of pictures (M, h, w, 3). x grows to the right, y grows downwards.
READ NEXT   sources.py, data.py, which turns these captions and pictures into one sequence
TRY IT      python scenes.py        TEST  tests/test_scenes.py
"""
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from sources.pairs import Pairs

SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0),
           "pink": (1, 0, 1), "cyan": (0, 1, 1), "white": (1, 1, 1)}
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}     # where A lies, seen from B
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")       # GenEval's six
WORLDS = {"one": ("single_object", "colors"), "six": (*CATEGORIES, "color_position")}
HELD_OUT = {("pink", "triangle"), ("yellow", "cross")}       # composition, measured: both words are known, the pair is not


class Thing(NamedTuple):
    """One object of a picture: its colour and shape, its centre (x, y) and its half-size r in pixels."""
    colour: str
    shape: str
    x: float
    y: float
    r: float


class Claim(NamedTuple):
    """What a caption says: category, the (colour or None, shape) of each object it names, and a relation or None."""
    category: str
    objects: tuple
    relation: str | None = None


# ---------------------------------------------------------------------------------------------------------------- grammar
@lru_cache(maxsize=None)
def captions(category, held_out=False):
    """Every caption of a category, as a tuple of (text, Claim). `held_out`: only those that name a held-out pair."""
    every = [(c, s) for c in COLOURS for s in SHAPES]
    if category == "single_object":
        found = [(f"a {s}", ((None, s),), None) for s in SHAPES]
    elif category == "two_object":
        found = [(f"a {s} and a {z}", ((None, s), (None, z)), None) for s in SHAPES for z in SHAPES if s != z]
    elif category == "counting":
        found = [(f"{word} {many}", ((None, s),) * n, None) for word, n in NUMBERS.items() for many, s in PLURALS.items()]
    elif category == "colors":
        found = [(f"a {c} {s}", ((c, s),), None) for c, s in every]
    elif category == "position":
        found = [(f"a {s} {rel} a {z}", ((None, s), (None, z)), rel)
                 for s in SHAPES for z in SHAPES if s != z for rel in RELATIONS]
    elif category in ("color_attr", "color_position"):  # as in GenEval: two different objects of two different colours
        links = RELATIONS if category == "color_position" else ("and",)
        found = [(f"a {c} {s} {link} a {d} {z}", ((c, s), (d, z)), None if link == "and" else link)
                 for c, s in every for d, z in every if c != d and s != z for link in links]
    else:
        raise ValueError(f"unknown category {category!r}: choose from {', '.join(WORLDS['six'])}")
    found = [(text, Claim(category, objects, rel)) for text, objects, rel in found]
    return tuple((text, claim) for text, claim in found if held_out == any(o in HELD_OUT for o in claim.objects))


@lru_cache(maxsize=None)
def all_claims():
    """{caption text: Claim} over the whole grammar, held-out pairs included."""
    return {text: claim for cat in WORLDS["six"] for held in (False, True) for text, claim in captions(cat, held)}


def read_caption(text):
    """The Claim that a caption makes, or None if the sentence is not one of the grammar's."""
    return all_claims().get(" ".join(text.split()))


@dataclass(frozen=True)
class World:
    """The distribution of captions, scenes and deductions. `categories`: which kinds of caption to draw from."""
    categories: tuple = WORLDS["six"]

    def caption(self, rng, held_out=False):
        """(text, Claim): a category uniformly, then one of its captions uniformly. rng: numpy Generator."""
        kinds = [c for c in self.categories if captions(c, held_out)]
        options = captions(kinds[rng.integers(len(kinds))], held_out)
        return options[rng.integers(len(options))]

    def caption_log_prob(self, text):
        """ln p(caption), in nats: the language's own probability, exact because each caption has one category."""
        return -math.log(len(self.categories)) - math.log(len(captions(all_claims()[text].category)))

    def deduction(self, rng):
        """One text-only document (18 or 20 words): a fact about two objects, then the same fact seen from the other side."""
        group = deductions()[rng.integers(len(deductions()))]
        return group[rng.integers(len(group))]

    def deduction_log_prob(self):
        """ln p(deduction), in nats: the pair and the relation are uniform."""
        return -math.log(len(captions("color_attr"))) - math.log(len(RELATIONS))


@lru_cache(maxsize=None)
def deductions():
    """Every deduction there is, as a list of lists: for each pair of objects one per relation."""
    return [[deduction_text(claim.objects, relation) for relation in RELATIONS]
            for _, claim in captions("color_attr")]


def deduction_text(objects, rel, wrong=False):
    """The deduction as a string: the second sentence starts at the second object, so the relation turns around. `wrong`:
    the same words with the other relation, the losing answer of the two-choice test."""
    (c, s), (d, z) = objects
    return f"a {c} {s} is {rel} a {d} {z} . the {d} {z} is {rel if wrong else INVERSE[rel]} the {c} {s} ."


def vocabulary():
    """Every word of the world: captions, deductions, and edits (§4.5). One set for all, so that a model of any part of it can
    be fine-tuned on another."""
    texts = [*all_claims(), deduction_text((("red", "circle"), ("blue", "square")), "left of"),
             "make turn the into remove add move to with what changed ?"]
    return {word for text in texts for word in text.split()}


def draw_scene(claim, rng, size=32, allow_held_out=False):
    """A list of Things that is exactly what the Claim says; what it leaves open (colour, place, size) is random.
    Colours left open never complete a held-out pair, unless `allow_held_out`. Raises ValueError for a size below 20."""
    if size < 20:
        raise ValueError(f"scenes need pictures of at least 20 pixels, got {size}: smaller cells have no room for a shape")
    things, cell = [], size / 2
    if claim.relation:                                  # neighbouring cells: A lies towards the relation's arrow from B
        dx, dy = RELATIONS[claim.relation]
        free = int(rng.integers(2))                     # the row (left/right) or the column (above/below) they share
        spots = [((dx + 1) // 2, free), ((1 - dx) // 2, free)] if dx else [(free, (dy + 1) // 2), (free, (1 - dy) // 2)]
    else:
        spots = [(int(k) % 2, int(k) // 2) for k in rng.permutation(4)[: len(claim.objects)]]
    for (colour, shape), (col, row) in zip(claim.objects, spots):
        while colour is None or ((colour, shape) in HELD_OUT and not allow_held_out):
            colour = list(COLOURS)[rng.integers(len(COLOURS))]
        r = cell * rng.uniform(0.30, 0.38)              # 4.8 to 6.1 pixels at 32x32
        slack = cell / 2 - r - 1.0                      # a shape keeps a pixel from its cell's edge: shapes never touch
        x, y = (cell * (k + 0.5) + rng.uniform(-slack, slack) for k in (col, row))
        things.append(Thing(colour, shape, float(x), float(y), float(r)))
    return things


# --------------------------------------------------------------------------------------------------------------- renderer
def signed_distance(shape, dx, dy, r):
    """Distance to the outline of a shape of half-size r, in pixels, negative inside. dx, dy: arrays of offsets from its
    centre. Every shape fills its box [-r, r] x [-r, r], so a bounding box alone gives its centre and size back."""
    if shape == "circle":
        return np.hypot(dx, dy) - r
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - r
    if shape == "triangle":                             # apex at the top: two slanted half-planes and the base
        return np.maximum((2 * np.abs(dx) - dy - r) / math.sqrt(5), dy - r)
    arm = r / 3
    return np.minimum(np.maximum(np.abs(dx) - r, np.abs(dy) - arm), np.maximum(np.abs(dx) - arm, np.abs(dy) - r))


def render(things, size=32):
    """(size, size, 3) uint8: the picture of a scene. A pixel's brightness is the share of it that a shape covers."""
    y, x = np.mgrid[:size, :size] + 0.5
    picture = np.zeros((size, size, 3))
    for thing in things:
        cover = np.clip(0.5 - signed_distance(thing.shape, x - thing.x, y - thing.y, thing.r), 0, 1)
        picture = np.maximum(picture, cover[..., None] * np.array(COLOURS[thing.colour]))
    return (picture * 255).round().astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------- parser
def neighbours(picture):
    """(9, h, w): a picture beside its eight shifted copies, zeros beyond the edge."""
    wide = np.pad(picture, 1)
    return np.stack([wide[i: i + picture.shape[0], j: j + picture.shape[1]] for i in range(3) for j in range(3)])


def components(on):
    """Label the 8-connected regions of a boolean picture. on: (h, w) bool -> (h, w) int, 0 where off.
    Every pixel starts with its own number and takes the largest number next to it until nothing changes."""
    label = np.where(on, np.arange(1, on.size + 1).reshape(on.shape), 0)
    while True:
        grown = neighbours(label).max(0) * on
        if (grown == label).all():
            return label
        label = grown


def parse(picture, least=0.02):
    """The scene of a picture, as a list of Things: threshold, connected components, best-fitting template.
    picture: (h, w, 3) uint8. Regions smaller than `least` of the picture (20 of 1024 pixels) are dust, not objects.
    Raises ValueError for another shape or dtype. Inverse of render: same colours and shapes, centres within a pixel."""
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"parse needs an (h, w, 3) uint8 picture, got {picture.shape} {picture.dtype}")
    bits = picture > 127
    on = bits.any(-1)
    on &= neighbours(on).sum(0) >= 4                    # a corner of a square still has 4 lit pixels of 9; a speck has not
    label, things = components(on), []
    for k in np.unique(label[label > 0]):
        region = label == k
        if region.sum() < least * region.size:
            continue
        share = bits[region].mean(0)                    # per channel: how much of the region is lit
        colour = min(COLOURS, key=lambda c: np.abs(np.array(COLOURS[c]) - share).sum())
        shape, x, y, r = best_template(region, picture[..., np.flatnonzero(COLOURS[colour])].mean(-1) / 255)
        things.append(Thing(colour, shape, x, y, r))
    return things


def best_template(region, bright):
    """(shape, x, y, r) whose drawing is nearest, in squared error, to one region of a picture.
    region: (h, w) bool; bright: (h, w) in [0, 1]. Tried: all shapes, sizes and centres around the bounding box's own."""
    rows, cols = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    window = (slice(max(rows[0] - 2, 0), rows[-1] + 3), slice(max(cols[0] - 2, 0), cols[-1] + 3))
    y, x = np.mgrid[:region.shape[0], :region.shape[1]][(slice(None), *window)] + 0.5
    cx, cy = (cols[0] + cols[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    mid = 0.25 * (np.ptp(rows) + np.ptp(cols) + 2)
    dx, dy, r = (g.reshape(-1, 1, 1) for g in np.meshgrid(*[np.array([-0.5, 0, 0.5])] * 2, mid + np.array([-0.5, -0.25, 0, 0.25, 0.5])))
    errors = {}
    for shape in SHAPES:
        cover = np.clip(0.5 - signed_distance(shape, x - cx - dx, y - cy - dy, r), 0, 1)
        error = ((cover - bright[window]) ** 2).sum((1, 2))
        k = int(error.argmin())
        errors[shape] = (float(error[k]), cx + float(dx.flat[k]), cy + float(dy.flat[k]), float(r.flat[k]))
    shape = min(errors, key=lambda s: errors[s][0])
    return shape, *errors[shape][1:]


# --------------------------------------------------------------------------------------------- GenEval's rule, in miniature
def relation_holds(a, b, relation):
    """GenEval's position rule: take the offset of A's centre from B's, shrink each part by a tenth of the two sizes, divide
    by the length that it had; A is left of B if more than 0.5 of it then points left."""
    offset = np.array([a.x - b.x, a.y - b.y])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * 2 * (a.r + b.r), 0)
    return bool(shrunk @ np.array(RELATIONS[relation]) > 0.5 * np.hypot(*offset))


def holds(claim, things, exact=True):
    """Whether a Claim is true of a scene. GenEval's rule: every named object is there (include), a count is not exceeded
    (exclude), the relation holds for some pair. `exact` asks more: nothing that was not named may be there either."""
    fits = lambda thing, wanted: thing.shape == wanted[1] and wanted[0] in (None, thing.colour)
    if exact and len(things) != len(claim.objects):
        return False
    for wanted in set(claim.objects):
        there, need = sum(fits(thing, wanted) for thing in things), claim.objects.count(wanted)
        if there < need or (claim.category == "counting" and there > need):
            return False
    if claim.relation:
        first, second = claim.objects
        return any(relation_holds(a, b, claim.relation) for a in things for b in things
                   if a is not b and fits(a, first) and fits(b, second))
    return True


def load_scenes(n, seed, categories=WORLDS["six"], size=32, held_out=False, progress=True):
    """Pairs of n rendered scenes. held_out: only captions that name a held-out colour-shape pair (for evaluation)."""
    rng, world = np.random.default_rng(seed), World(tuple(categories))
    captions, pixels = [], np.empty((n, size, size, 3), dtype=np.uint8)
    for k in tqdm(range(n), desc="drawing scenes", disable=not progress, leave=False):
        text, claim = world.caption(rng, held_out)
        captions.append(text)
        pixels[k] = render(draw_scene(claim, rng, size, allow_held_out=held_out), size)
    return Pairs("scenes", captions, pixels, texts=deductions(), words=vocabulary())



if __name__ == "__main__":
    rng, world = np.random.default_rng(0), World()
    right = 0
    for category in CATEGORIES:
        text, claim = World((category,)).caption(rng)
        things = draw_scene(claim, rng)
        seen = parse(render(things))
        right += holds(claim, seen)
        print(f"{category:14s} {text:36s} parsed: {', '.join(f'{t.colour} {t.shape} at {t.x:.0f},{t.y:.0f}' for t in seen)}")
    print(f"{'text alone':14s} {world.deduction(rng)}")
    print(f"{right} of 6 captions hold of the parsed picture; a deduction carries {-world.deduction_log_prob():.2f} nats")
