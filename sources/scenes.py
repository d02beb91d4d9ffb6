"""
scenes.py: a small world about which everything is known
                          (our stand-in for the data of Transfusion §4.1 and for GenEval, App. B.1)

THE IDEA    Pictures of one to four coloured shapes, and sentences about them. We wrote the grammar,
            so the entropy of its language is a number. We wrote the renderer, so a picture can be
            read back exactly. Every metric of the paper thus has a toy version that is computed,
            not judged by another network.
A PICTURE   32x32 pixels, 2x2 cells; each cell holds at most one shape, moved and scaled a little.

                +-----+-----+
                |  o  |     |      "a red circle left of ..."  neighbouring cells only
                +-----+-----+
                |     |  x  |      Background is black. Colours are the corners of the RGB cube, and
                +-----+-----+      antialiasing only darkens, so `channel > 0.5` reads the colour.

THE RULES   Six kinds of caption, the six categories of GenEval:
                single_object  a circle                 counting    three squares
                two_object     a circle and a cross     position    a circle left of a square
                colors         a red circle             color_attr  a red circle and a blue square
            and a seventh, ours, that joins the last two:   a red circle left of a blue square
            First a caption is drawn uniformly from its category. Then a scene is drawn that
            contains exactly what the caption says.
            Two colour-shape pairs are never shown and never named in training: pink triangle,
            yellow cross.
            Text alone is a short deduction: "a red circle is left of a blue square . the blue
            square is right of the red circle ."  The second sentence follows from the first: that
            is the toy version of the text suite.
SHAPES      a picture is (h, w, 3) uint8; a batch of pictures (M, h, w, 3). x grows to the right,
            y grows downwards.
READ NEXT   pairs.py; ../data.py, which turns these captions and pictures into one sequence
TRY IT      python -m sources.scenes        TEST  tests/test_scenes.py
"""
import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from sources.pairs import SPLITS, Pairs, check_room, words_of
from support.common import end_with_the_reader

SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {
    "circles": "circle",
    "squares": "square",
    "triangles": "triangle",
    "crosses": "cross",
}
COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "pink": (1, 0, 1),
    "cyan": (0, 1, 1),
    "white": (1, 1, 1),
}
NUMBERS = {"two": 2, "three": 3, "four": 4}

RELATIONS = {                                           # where A lies, seen from B: (columns, rows)
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
INVERSE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}

# GenEval's six categories.
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
WORLDS = {                                              # --world
    "one": ("single_object", "colors"),
    "six": (*CATEGORIES, "color_position"),
}

# Composition, measured: training has both words, but never this pair of them.
HELD_OUT = {("pink", "triangle"), ("yellow", "cross")}


class Thing(NamedTuple):
    """One object of a picture: its colour and shape, its centre (x, y) and its half-size r in
    pixels."""
    colour: str
    shape: str
    x: float
    y: float
    r: float


class Claim(NamedTuple):
    """What a caption says: its category, the (colour or None, shape) of each object that it names,
    and a relation or None."""
    category: str
    objects: tuple
    relation: str | None = None


# ------------------------------------------------------------------------------------------ grammar
def sentences(category):
    """Yields every (text, objects, relation) of a category, as in a Claim. Raises ValueError for
    an unknown category."""
    # The order of the loops must not change: random numbers choose captions by their place in it.
    if category == "single_object":
        for shape in SHAPES:
            yield f"a {shape}", [(None, shape)], None
    elif category == "two_object":
        for one, other in itertools.permutations(SHAPES, 2):
            objects = [(None, one), (None, other)]
            yield f"a {one} and a {other}", objects, None
    elif category == "counting":
        for word, n in NUMBERS.items():
            for plural, shape in PLURALS.items():
                yield f"{word} {plural}", [(None, shape)] * n, None
    elif category == "colors":
        for colour, shape in itertools.product(COLOURS, SHAPES):
            yield f"a {colour} {shape}", [(colour, shape)], None
    elif category == "position":
        for one, other in itertools.permutations(SHAPES, 2):
            objects = [(None, one), (None, other)]
            for relation in RELATIONS:
                yield f"a {one} {relation} a {other}", objects, relation
    elif category == "color_attr":
        for one, other, objects in different_objects():
            yield f"a {one} and a {other}", objects, None
    elif category == "color_position":
        for one, other, objects in different_objects():
            for relation in RELATIONS:
                yield f"a {one} {relation} a {other}", objects, relation
    else:
        known = ", ".join(WORLDS["six"])
        raise ValueError(f"unknown category {category!r}: choose from {known}")


def different_objects():
    """Yields ("red circle", "blue square", [their (colour, shape)]) for every two objects that
    differ in both, as GenEval asks of color_attr."""
    known = itertools.product(COLOURS, SHAPES)
    for one, other in itertools.permutations(known, 2):
        if all(a != b for a, b in zip(one, other)):
            yield " ".join(one), " ".join(other), [one, other]


@lru_cache(maxsize=None)
def captions(category, held_out=False):
    """Every caption of a category, as a tuple of (text, Claim). held_out: only those that name a
    held-out pair, in place of those that name none."""
    chosen = []
    for text, objects, relation in sentences(category):
        names_held_out = any(pair in HELD_OUT for pair in objects)
        if names_held_out == held_out:
            chosen.append((text, Claim(category, tuple(objects), relation)))
    return tuple(chosen)


@lru_cache(maxsize=None)
def all_claims():
    """{caption text: Claim} over the whole grammar, held-out pairs included."""
    claims = {}
    for category in WORLDS["six"]:
        claims.update(captions(category))
        claims.update(captions(category, held_out=True))
    return claims


def read_caption(text):
    """The Claim that a caption makes, or None if the sentence is not one of the grammar's."""
    return all_claims().get(" ".join(text.split()))


@dataclass(frozen=True)
class World:
    """The distribution of captions, scenes and deductions. categories: which kinds of caption to
    draw from."""
    categories: tuple = WORLDS["six"]

    def caption(self, rng, held_out=False):
        """(text, Claim): a category uniformly, then one of its captions uniformly.
        rng: numpy Generator."""
        kinds = [category for category in self.categories if captions(category, held_out)]
        kind = kinds[rng.integers(len(kinds))]
        options = captions(kind, held_out)
        return options[rng.integers(len(options))]

    def caption_log_prob(self, text):
        """ln p(caption), in nats: the language's own probability."""
        # Exact, because every caption belongs to one category only.
        options = captions(all_claims()[text].category)
        return -math.log(len(self.categories)) - math.log(len(options))

    def deduction(self, rng):
        """One text-only document of 18 or 20 words: a fact about two objects, then the same fact
        seen from the other side."""
        groups = deductions()
        group = groups[rng.integers(len(groups))]       # the two objects
        return group[rng.integers(len(group))]          # the relation

    def deduction_log_prob(self):
        """ln p(deduction), in nats: the two objects and the relation are uniform."""
        groups = deductions()
        return -math.log(len(groups)) - math.log(len(RELATIONS))


@lru_cache(maxsize=None)
def deductions():
    """Every deduction there is, as a list of lists: for each two objects one per relation."""
    groups = []
    for _, claim in captions("color_attr"):
        groups.append([deduction_text(claim.objects, relation) for relation in RELATIONS])
    return groups


def deduction_text(objects, relation, wrong=False):
    """The deduction as a string. wrong: the same words with the other relation in the second
    sentence, the losing answer of the two-choice test."""
    one, other = (" ".join(thing) for thing in objects)
    # The second sentence starts at the second object, so the relation turns around.
    turned = relation if wrong else INVERSE[relation]
    fact = f"a {one} is {relation} a {other} ."
    return f"{fact} the {other} is {turned} the {one} ."


def vocabulary():
    """Set of every word of the world: captions, deductions, and edits (§4.5)."""
    # One set for all, so that a model of any part of it can be fine-tuned on another.
    deduction = deduction_text((("red", "circle"), ("blue", "square")), "left of")
    edits = "make turn the into remove add move to with what changed ?"
    return words_of([*all_claims(), deduction, edits])


# ------------------------------------------------------------------------------------------- scenes
def draw_scene(claim, rng, size=32, allow_held_out=False):
    """A list of Things that is exactly what the Claim says. What it leaves open (colour, place,
    size) is random. Colours left open never complete a held-out pair, unless `allow_held_out`.
    Raises ValueError for a size below 20."""
    if size < 20:
        raise ValueError(f"scenes need pictures of at least 20 pixels, got {size}: smaller cells "
                         f"have no room for a shape")
    things = []
    cell = size / 2
    cells = choose_cells(claim, rng)
    for (colour, shape), (column, row) in zip(claim.objects, cells):
        forbidden = set() if allow_held_out else HELD_OUT
        while colour is None or (colour, shape) in forbidden:
            colour = list(COLOURS)[rng.integers(len(COLOURS))]
        r = cell * rng.uniform(0.30, 0.38)              # 4.8 to 6.1 pixels at 32x32
        slack = cell / 2 - r - 1.0                      # a pixel to the cell's edge: never touching
        dx = rng.uniform(-slack, slack)
        dy = rng.uniform(-slack, slack)
        x = cell * (column + 0.5) + dx
        y = cell * (row + 0.5) + dy
        thing = Thing(colour, shape, x, y, r)
        things.append(thing)
    return things


def choose_cells(claim, rng):
    """The (column, row) of each object of a Claim."""
    if claim.relation is None:
        order = rng.permutation(4).tolist()
        cells = [(k % 2, k // 2) for k in order]
        return cells[: len(claim.objects)]
    # Neighbouring cells. Left and right share a row, above and below share a column: any of two.
    shared = int(rng.integers(2))
    return {
        "left of": [(0, shared), (1, shared)],
        "right of": [(1, shared), (0, shared)],
        "above": [(shared, 0), (shared, 1)],
        "below": [(shared, 1), (shared, 0)],
    }[claim.relation]


def load_scenes(n, seed, categories=WORLDS["six"], size=32, held_out=False, progress=True):
    """Pairs of n rendered scenes. held_out: only captions that name a held-out colour-shape pair
    (for evaluation)."""
    rng = np.random.default_rng(seed)
    world = World(tuple(categories))
    texts = []
    check_room(n, size)
    pixels = np.empty((n, size, size, 3), dtype=np.uint8)
    for k in tqdm(range(n), desc="drawing scenes", disable=not progress, leave=False):
        text, claim = world.caption(rng, held_out)
        things = draw_scene(claim, rng, size, allow_held_out=held_out)
        texts.append(text)
        pixels[k] = render(things, size)
    return Pairs("scenes", texts, pixels, texts=deductions(), words=vocabulary())


def load_split(split="train", n=20000, seed=0, categories=WORLDS["six"], size=32, progress=True,
               **unused):
    """Pairs of n scenes of a split, "train" or "test"."""
    # A stream of random numbers for each split: they share no picture.
    return load_scenes(n, [seed, SPLITS.index(split)], categories, size, progress=progress)


# ----------------------------------------------------------------------------------------- renderer
def signed_distance(shape, dx, dy, r):
    """Distance to the outline of a shape of half-size r, in pixels, negative inside.
    dx, dy: arrays of offsets from its centre."""
    # Every shape fills its box [-r, r] x [-r, r], so a bounding box alone gives centre and size.
    if shape == "circle":
        return np.hypot(dx, dy) - r
    if shape == "square":
        return box(dx, dy, r, r)
    if shape == "triangle":                             # apex at the top: two slanted sides, a base
        sides = 2 * np.abs(dx) - dy - r
        return np.maximum(sides / math.sqrt(5), dy - r)
    lying = box(dx, dy, r, r / 3)                       # a cross: two bars
    standing = box(dx, dy, r / 3, r)
    return np.minimum(lying, standing)


def box(dx, dy, half_width, half_height):
    """Signed distance to a box around the centre."""
    beside = np.abs(dx) - half_width
    above = np.abs(dy) - half_height
    return np.maximum(beside, above)


def render(things, size=32):
    """(size, size, 3) uint8: the picture of a scene."""
    y, x = np.mgrid[:size, :size] + 0.5                 # the pixels' centres
    picture = np.zeros((size, size, 3))
    for thing in things:
        distance = signed_distance(thing.shape, x - thing.x, y - thing.y, thing.r)
        # A pixel is as bright as the share of it that the shape covers.
        cover = np.clip(0.5 - distance, 0, 1)                               # (size, size)
        colour = np.array(COLOURS[thing.colour])
        picture = np.maximum(picture, cover[..., None] * colour)
    return (picture * 255).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------- parser
def parse(picture, least=0.02):
    """The scene of a picture, as a list of Things. The inverse of `render`: the same colours and
    shapes, centres within a pixel.

    picture     (h, w, 3) uint8
    least       smaller regions than this share of the picture (20 of 1024 pixels) are dust
    Raises ValueError for another shape or dtype."""
    if picture.shape[2:] != (3,) or picture.dtype != np.uint8:
        raise ValueError(f"parse needs an (h, w, 3) uint8 picture, got {picture.shape} "
                         f"{picture.dtype}")
    # 1. Threshold. A corner of a square still has 4 lit pixels of 9 around it; a speck has not.
    bits = picture > 127                                                    # (h, w, 3)
    on = bits.any(-1)                                                       # (h, w)
    on &= neighbours(on).sum(0) >= 4

    # 2. Connected regions.
    label = components(on)                                                  # (h, w)
    palette = np.array(list(COLOURS.values()))                              # (7, 3)
    things = []
    for k in np.unique(label[label > 0]):
        region = label == k
        if region.sum() < least * region.size:
            continue

        # 3. Its colour: for each channel, the share of the region's pixels that have it lit.
        share = bits[region].mean(0)                                        # (3,)
        distances = np.abs(palette - share).sum(1)                          # (7,)
        colour = list(COLOURS)[distances.argmin()]

        # 4. Its shape, place and size: the best of many drawings.
        lit = np.flatnonzero(COLOURS[colour])
        bright = picture[..., lit].mean(-1) / 255                           # (h, w)
        shape, x, y, r = best_template(region, bright)
        things.append(Thing(colour, shape, x, y, r))
    return things


def neighbours(picture):
    """(9, h, w): a picture (h, w) beside its eight shifted copies, zeros beyond the edge."""
    h, w = picture.shape
    wide = np.pad(picture, 1)
    shifted = []
    for i, j in itertools.product(range(3), range(3)):
        shifted.append(wide[i: i + h, j: j + w])
    return np.stack(shifted)


def components(on):
    """Label the 8-connected regions of a picture: (h, w) bool -> (h, w) int, 0 where off."""
    # Every pixel starts with its own number and takes the largest number next to it, until nothing
    # changes.
    numbers = np.arange(1, on.size + 1)
    label = np.where(on, numbers.reshape(on.shape), 0)
    while True:
        grown = neighbours(label).max(0) * on
        if (grown == label).all():
            return label
        label = grown


def best_template(region, bright):
    """(shape, x, y, r) whose drawing is nearest, in squared error, to one region of a picture.
    region: (h, w) bool; bright: (h, w) in [0, 1]."""
    # 1. The bounding box gives a first guess.
    rows = np.flatnonzero(region.any(1))
    columns = np.flatnonzero(region.any(0))
    centre_x = (columns[0] + columns[-1] + 1) / 2
    centre_y = (rows[0] + rows[-1] + 1) / 2
    width = np.ptp(columns) + 1
    height = np.ptp(rows) + 1
    half = (width + height) / 4

    # 2. Around the guess: 3 x 3 centres, 5 sizes.
    nudges = np.array([-0.5, 0, 0.5])
    sizes = np.array([-0.5, -0.25, 0, 0.25, 0.5])
    grid = np.meshgrid(nudges, nudges, half + sizes)
    dx, dy, r = (values.reshape(-1, 1, 1) for values in grid)               # each (45, 1, 1)

    # 3. The part of the picture to compare with: the box, and two pixels around it.
    top = max(rows[0] - 2, 0)
    left = max(columns[0] - 2, 0)
    wanted = bright[top: rows[-1] + 3, left: columns[-1] + 3]               # (h', w')
    h, w = wanted.shape
    y, x = np.mgrid[:h, :w] + 0.5
    x += left - centre_x
    y += top - centre_y

    # 4. Draw every shape in all 45 ways.
    least = math.inf
    for shape in SHAPES:
        distance = signed_distance(shape, x - dx, y - dy, r)                # (45, h', w')
        cover = np.clip(0.5 - distance, 0, 1)
        error = ((cover - wanted) ** 2).sum((1, 2))                         # (45,)
        k = int(error.argmin())
        if error[k] < least:
            least = error[k]
            best = shape, k
    shape, k = best
    x = centre_x + dx.flat[k]
    y = centre_y + dy.flat[k]
    return shape, x, y, float(r.flat[k])


# --------------------------------------------------------------------- GenEval's rule, in miniature
def relation_holds(a, b, relation):
    """Whether Thing a lies as `relation` says, seen from b: GenEval's position rule."""
    # Take the offset of a's centre from b's, and shrink each part by a tenth of the two sizes.
    # Divide by the length that it had. More than 0.5 of it must point in the relation's direction.
    offset = np.array([a.x - b.x, a.y - b.y])
    length = np.hypot(*offset)
    tenth = 0.1 * 2 * (a.r + b.r)
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - tenth, 0)
    direction = np.array(RELATIONS[relation])
    return bool(shrunk @ direction > 0.5 * length)


def is_a(thing, wanted):
    """Whether a Thing is the (colour or None, shape) of a Claim."""
    colour, shape = wanted
    return thing.shape == shape and colour in (None, thing.colour)


def holds(claim, things, exact=True):
    """Whether a Claim is true of a scene, by GenEval's rule. exact asks more: nothing that was not
    named may be there either."""
    if exact and len(things) != len(claim.objects):
        return False
    # Include: every named object is there. Exclude: a count is not exceeded.
    for wanted in set(claim.objects):
        count = sum(is_a(thing, wanted) for thing in things)
        needed = claim.objects.count(wanted)
        if count < needed:
            return False
        if claim.category == "counting" and count > needed:
            return False
    if claim.relation is None:
        return True
    # The relation holds for some two of them.
    first, second = claim.objects
    for a, b in itertools.permutations(things, 2):
        named = is_a(a, first) and is_a(b, second)
        if named and relation_holds(a, b, claim.relation):
            return True
    return False


if __name__ == "__main__":
    end_with_the_reader()
    rng = np.random.default_rng(0)
    world = World()
    right = 0
    for category in CATEGORIES:
        text, claim = World((category,)).caption(rng)
        seen = parse(render(draw_scene(claim, rng)))
        right += holds(claim, seen)
        objects = []
        for thing in seen:
            objects.append(f"{thing.colour} {thing.shape} at {thing.x:.0f},{thing.y:.0f}")
        parsed = ", ".join(objects)
        print(f"{category:14s} {text:36s} parsed: {parsed}")
    print(f"{'text alone':14s} {world.deduction(rng)}")
    nats = -world.deduction_log_prob()
    print(f"{right} of 6 captions hold of the parsed picture; a deduction carries {nats:.2f} nats")
