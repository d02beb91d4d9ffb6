"""
edits.py: a picture, an instruction, a picture           (Transfusion §4.5 "Image Editing", Fig. 6)

THE IDEA    A model that has learned to draw after words has never had to draw after a picture *and*
            words. The paper fine-tunes it on 8,000 triples (picture, instruction, edited picture),
            and then it edits. Nothing in the model changes. An edit is one more document: the first
            picture is context, the second one is to be drawn.
A PICTURE   <bos> BOI [ before ] EOI make the circle blue BOI [ after ] EOI <eos>
            the same, asked back:
            <bos> BOI [ before ] EOI BOI [ after ] EOI what changed ? make the circle blue <eos>
THE RULES   Instructions of the `scenes` world. Each names its object so that only one fits: "the
            circle", or "the red circle" where there are two circles.
              recolour   make the circle blue             remove  remove the circle
              reshape    turn the circle into a square    add     add a red cross left of the circle
                                                          move    move the circle above the square
            An edit is right if the picture holds exactly what it should: what was not named stands
            within 2 pixels of its place; what was added or moved stands in the cell that the
            instruction means.
SHAPES      pixels (N, h, w, 3) uint8. x grows to the right, y grows downwards.
PAPER/HERE  same: fine-tuning on 8,000 triples, with both losses, as in pretraining.
            our choice: the first picture is nearly clean in training (t <= 100 of the paper's
            schedule; App. B.2 has 500 for captions), because what is to be copied must be seen. A
            chain of edits is one edit after the other.
            our choice: a quarter of the documents ask "what changed ?". Of the others, one in ten
            has its instruction dropped, and one in ten has pure noise as its first picture. So
            guidance can be over words, over the picture, or both (`sample.edit`).
READ NEXT   ../sample.py        TEST  tests/test_edits.py, tests/test_start.py
TRY IT      python -m sources.edits
            your own: captions first, then edits (words that are new to the first model may follow)
            python train.py --data folder --data-dir my_pictures
            python train.py --preset edit --data-dir my_edits --init out/folder/model.pt
"""
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import count_tokens
from sources import scenes
from sources.pairs import (
    SPLITS,
    check_room,
    clean_caption,
    name_groups,
    read_usable,
    split_items,
    words_of,
)
from sources.scenes import COLOURS, HELD_OUT, RELATIONS, SHAPES, Thing
from support.common import open_picture, read_records, run_command

KINDS = ("recolour", "reshape", "remove", "add", "move")
VERBS = ("make", "turn", "remove", "add", "move")       # the first word of each kind
NEAR = 2.0                                              # pixels that an untouched object may be off


# ------------------------------------------------------------------------------------ naming things
def kind_of(instruction):
    """Which of KINDS an instruction is, by its first word."""
    verb = instruction.split()[0]
    return KINDS[VERBS.index(verb)]


def cell_of(thing, size=32):
    """(column, row) of the 2x2 cell that holds a Thing's centre."""
    column = int(thing.x >= size / 2)
    row = int(thing.y >= size / 2)
    return column, row


def centre_of(cell, size=32):
    """(x, y), in pixels, of the centre of a cell (column, row)."""
    column, row = cell
    return (column + 0.5) * size / 2, (row + 0.5) * size / 2


def name_of(things, k):
    """The shortest name that fits only things[k]: "circle" or "red circle"; None if it has a
    twin."""
    thing = things[k]
    # An instruction with a longer name than needed would teach that colour always matters.
    same_shape = [other for other in things if other.shape == thing.shape]
    if len(same_shape) == 1:
        return thing.shape
    twins = [other for other in same_shape if other.colour == thing.colour]
    if len(twins) == 1:
        return f"{thing.colour} {thing.shape}"
    return None


def find(things, words):
    """The index of the only Thing that words ("circle" or "red circle") name. Raises ValueError if
    not exactly one fits."""
    *colour, shape = words.split()
    fits = []
    # colour is [] or ["red"]; two words before the shape fit nothing.
    for k, thing in enumerate(things):
        if thing.shape == shape and colour in ([], [thing.colour]):
            fits.append(k)
    if len(fits) != 1:
        raise ValueError(f"{len(fits)} objects of the picture are a {words!r}: an instruction must "
                         f"name exactly one")
    return fits[0]


# ------------------------------------------------------------------------ what an instruction means
def apply(things, instruction, size=32):
    """The scene that an instruction asks for: a list of (Thing, tolerance). tolerance is the
    largest offset in x and in y, in pixels, that the Thing's centre may have. An added or moved
    Thing is centred in its cell, and may be anywhere in it.
    Raises ValueError for a sentence that is no instruction, or that does not fit the picture."""
    verb, *words = instruction.split()
    goal = [(thing, NEAR) for thing in things]
    place = None
    if verb in ("add", "move"):
        words, place = read_place(things, instruction, size)

    # The five sentences of THE RULES. `name` is one word or two: "circle", "red circle".
    match verb, words:
        case "make", ["the", *name, colour] if name and colour in COLOURS:
            k = find(things, " ".join(name))
            goal[k] = things[k]._replace(colour=colour), NEAR
        case "turn", ["the", *name, "into", "a", shape] if name and shape in SHAPES:
            k = find(things, " ".join(name))
            goal[k] = things[k]._replace(shape=shape), NEAR
        case "remove", ["the", *name] if name:
            del goal[find(things, " ".join(name))]
        case "add", ["a", colour, shape] if place and colour in COLOURS and shape in SHAPES:
            x, y = centre_of(place, size)
            goal.append((Thing(colour, shape, x, y, 0.17 * size), size / 4))
        case "move", ["the", *name] if place and name:
            k = find(things, " ".join(name))
            x, y = centre_of(place, size)
            goal[k] = things[k]._replace(x=x, y=y), size / 4
        case _:
            raise ValueError(f"{instruction!r} is not an instruction of this world: see the rules "
                             f"in sources/edits.py")

    # Two objects in one cell would touch, and the parser would read them as one.
    cells = [cell_of(thing, size) for thing, _ in goal]
    if len(set(cells)) < len(cells):
        raise ValueError(f"{instruction!r}: that place is taken")
    return goal


def read_place(things, instruction, size):
    """(words before the place, its cell) of "... left of the circle": the neighbouring cell. The
    cell is None if no place is named. Raises ValueError if there is no room."""
    for relation, (dx, dy) in RELATIONS.items():
        if f" {relation} the " in instruction:
            what, anchor = instruction.split(f" {relation} the ")
            column, row = cell_of(things[find(things, anchor)], size)
            cell = (column + dx, row + dy)
            if not is_inside(cell):
                raise ValueError(f"there is no room {relation} the {anchor}: it stands at the "
                                 f"picture's edge")
            return what.split()[1:], cell
    return instruction.split()[1:], None


def is_inside(cell):
    """Whether a (column, row) is one of the picture's 2x2 cells."""
    return all(0 <= k <= 1 for k in cell)


# ----------------------------------------------------------------------------- drawing instructions
def propose(things, kind, rng, size=32):
    """A random instruction of one of KINDS that fits the scene, or None if there is none. It never
    asks for a held-out colour-shape pair. rng: numpy Generator."""
    def choose(options):
        return options[rng.integers(len(options))]

    # 1. An object that can be named.
    names = [name_of(things, k) for k in range(len(things))]
    known = [k for k, name in enumerate(names) if name]
    if not known:
        return None
    k = choose(known)
    thing = things[k]
    name = names[k]

    # 2. What happens to it.
    if kind == "recolour":
        return f"make the {name} {choose(new_colours(thing))}"
    if kind == "reshape":
        return f"turn the {name} into a {choose(new_shapes(thing))}"
    if kind == "remove":
        # The last object stays: an empty picture says nothing about the edit.
        return f"remove the {name}" if len(things) > 1 else None

    # 3. "add" and "move" need a place. What is moved cannot be its own anchor.
    anchors = known if kind == "add" else [anchor for anchor in known if anchor != k]
    places = free_places(things, anchors, names, size)
    if not places:
        return None
    if kind == "move":
        return f"move the {name} {choose(places)}"
    seen = [pair for pair in itertools.product(COLOURS, SHAPES) if pair not in HELD_OUT]
    colour, shape = choose(seen)
    return f"add a {colour} {shape} {choose(places)}"


def new_colours(thing):
    """The colours that a Thing may take: not its own, and no held-out pair."""
    return [colour for colour in COLOURS
            if colour != thing.colour and (colour, thing.shape) not in HELD_OUT]


def new_shapes(thing):
    """The shapes that a Thing may take: not its own, and no held-out pair."""
    return [shape for shape in SHAPES
            if shape != thing.shape and (thing.colour, shape) not in HELD_OUT]


def free_places(things, anchors, names, size):
    """List of "left of the circle", for every free cell beside an anchor. anchors: indices of
    things; names: of all things."""
    taken = {cell_of(thing, size) for thing in things}
    places = []
    for anchor in anchors:
        column, row = cell_of(things[anchor], size)
        for relation, (dx, dy) in RELATIONS.items():
            cell = (column + dx, row + dy)
            if is_inside(cell) and cell not in taken:
                places.append(f"{relation} the {names[anchor]}")
    return places


def carry_out(things, instruction, rng, size=32):
    """The scene after an instruction: `apply`, with a random place in its cell for what was added
    or moved."""
    after = []
    for thing, tolerance in apply(things, instruction, size):
        if tolerance != NEAR:                           # it was added or moved
            r = thing.r                                 # a move changes the place, and nothing else
            if instruction.startswith("add "):
                r = size / 2 * rng.uniform(0.30, 0.38)
            slack = size / 4 - r - 1.0                  # as in scenes.draw_scene
            x = thing.x + rng.uniform(-slack, slack)
            y = thing.y + rng.uniform(-slack, slack)
            thing = thing._replace(x=x, y=y, r=r)
        after.append(thing)
    return after


# ------------------------------------------------------------------------------------------ judging
def compare(goal, seen):
    """(for each (Thing, tolerance) of goal whether it is in the parsed scene `seen`, whether
    nothing else is)."""
    left = list(seen)
    present = []
    for wanted, tolerance in goal:
        near = [thing for thing in left if is_near(thing, wanted, tolerance)]
        present.append(bool(near))
        if near:
            left.remove(near[0])                        # it can be one object of the goal only
    return present, not left


def is_near(thing, wanted, tolerance):
    """Whether a Thing has the wanted colour and shape, and stands within tolerance in x and y."""
    if (thing.colour, thing.shape) != (wanted.colour, wanted.shape):
        return False
    dx = abs(thing.x - wanted.x)
    dy = abs(thing.y - wanted.y)
    return max(dx, dy) <= tolerance


def judge(before, instruction, seen, size=32):
    """(exact, kept, untouched). exact: whether the parsed scene `seen` is what the instruction
    asked for and nothing else. kept: how many of the `untouched` objects stand in place, with the
    same colour and shape, within 2 pixels."""
    goal = apply(before, instruction, size)
    present, alone = compare(goal, seen)
    # An edit that failed may still have kept the rest: both are counted.
    kept = 0
    untouched = 0
    for (wanted, _), here in zip(goal, present):
        if wanted in before:
            untouched += 1
            kept += here
    return all(present) and alone, kept, untouched


def judge_end(first, last, seen, size=32):
    """Whether `seen` is the scene `last` that a chain of edits of `first` leads to. An object that
    stands where one stood at first must be within 2 pixels of it, any other in its cell."""
    # Small drifts of single edits would add up along a chain: the first scene is the measure.
    places = {(thing.x, thing.y) for thing in first}
    goal = []
    for thing in last:
        if (thing.x, thing.y) in places:
            goal.append((thing, NEAR))
        else:
            x, y = centre_of(cell_of(thing, size), size)
            goal.append((thing._replace(x=x, y=y), size / 4))
    present, alone = compare(goal, seen)
    return all(present) and alone


# ------------------------------------------------------------------------------------------ triples
@dataclass
class Edits:
    """Chains of edits: pictures and the instructions between them. A triple is a chain of one;
    training takes triples. It has what training asks of sources.pairs.Pairs.

    pixels      (N, h, w, 3) uint8, all pictures
    chains      list of ([indices of n + 1 pictures], [n instructions])
    scenes      the true scene of each picture, or None
    language    instructions beyond these whose words must be known
    lines       where each triple stands, file and line, for a sentence about it; empty: in no file
    """
    pixels: np.ndarray
    chains: list
    scenes: list | None = None
    language: list = field(default_factory=list)
    lines: list = field(default_factory=list)

    @property
    def captions(self):
        """All instructions: list of str."""
        return [text for _, text, _ in self.triples()]

    def triples(self):
        """[(index of the picture before, instruction, index of the picture after)]."""
        triples = []
        for pictures, instructions in self.chains:
            triples += zip(pictures, instructions, pictures[1:])
        return triples

    def to_draw(self):
        """[(what stands before a picture, the number of that picture)]: see metrics/folder.py."""
        return [([before, text], after) for before, text, after in self.triples()]

    def vocabulary(self):
        """Set of every word that this source can utter."""
        if self.scenes:
            return scenes.vocabulary()
        return words_of([*self.captions, *self.language])


def scene_edits(n=8000, seed=0, longest=3, single=0.5, size=32, progress=True):
    """Edits with n triples in the `scenes` world.

    single      share of triples that stand alone. The others are in chains of 1 to `longest`;
                single = 0: all of `longest`, as far as they go
    The first scenes are those of pretraining. The kind of each edit is uniform over the kinds that
    fit."""
    check_room(2 * n, size)                             # a triple alone has two pictures
    rng = np.random.default_rng([*np.atleast_1d(seed), 11])
    world = scenes.World()
    chains = []
    states = []                                         # the scene of every picture
    left = n
    bar = tqdm(total=n, desc="drawing edits", disable=not progress, leave=False)
    while left > 0:
        _, claim = world.caption(rng)
        things = scenes.draw_scene(claim, rng, size)
        length = longest
        if single:
            alone = rng.random() < single
            length = 1 if alone else int(rng.integers(1, longest + 1))
        chain, instructions = draw_chain(things, min(length, left), rng, size)
        if instructions:
            first = len(states)
            chains.append((list(range(first, first + len(chain))), instructions))
            states += chain
            left -= len(instructions)
            bar.update(len(instructions))
    bar.close()
    pixels = np.stack([scenes.render(things, size) for things in states])
    return Edits(pixels, chains, states)


def draw_chain(things, length, rng, size):
    """([n + 1 scenes], [n instructions]) that start at a scene; n is `length`, or less where
    nothing can be named any more."""
    chain = [things]
    instructions = []
    while len(instructions) < length:
        options = []
        for kind in KINDS:
            text = propose(chain[-1], kind, rng, size)
            if text:
                options.append(text)
        if not options:                                 # only twins are left
            break
        text = options[rng.integers(len(options))]
        instructions.append(text)
        chain.append(carry_out(chain[-1], text, rng, size))
    return chain, instructions


def load_triples(folder, size=32, split="train"):
    """Edits of a folder of your own, with edits.jsonl: one {"before": file, "instruction": words,
    "after": file} per line. What is bad is counted, named and skipped, as in folder.py."""
    path = Path(folder) / "edits.jsonl"
    records = read_records(path, ("before", "instruction", "after"))

    def read(record, line):
        before, text, after = record
        instruction = clean_caption(text, line)
        pictures = [open_picture(path.parent / name, size) for name in (before, after)]
        return (before, after), instruction, pictures

    triples, lines = read_usable(folder, path, records, read, "triples")
    names = [both for both, _, _ in triples]
    instructions = [instruction for _, instruction, _ in triples]

    # Of this split alone: a VAE that is trained on these pictures must not see those of the test.
    pixels = []
    chains = []
    chosen = split_items(folder, name_groups(names), split, "triples")
    for k in chosen:
        _, instruction, pictures = triples[k]
        first = len(pixels)
        pixels += pictures
        chains.append(([first, first + 1], [instruction]))
    # The words of both splits must be known: the test split's gap is measured during training.
    return Edits(np.stack(pixels), chains, language=instructions, lines=[lines[k] for k in chosen])


def load_edits(folder=None, size=32, split="train", n=8000, seed=0, progress=True, **unused):
    """Edits of a folder, or of the `scenes` world if there is none."""
    if folder:
        return load_triples(folder, size, split)
    # A stream of random numbers for each split: they share no picture.
    return scene_edits(n, [seed, SPLITS.index(split)], size=size, progress=progress)


# ---------------------------------------------------------------------------------------- documents
@dataclass
class EditDocuments:
    """Draws documents from Edits, as data.Documents does from Pairs.

    pairs       Edits
    patches     P
    context     positions per row
    t_limit     the largest t of a picture that precedes its text
    noisiest    the largest t of any other: pure noise
    drop        share of edits without instruction, and without first picture
    questions   share that asks "what changed ?" instead (scenes only)
    tokenizer   measures instructions; None: in words
    """
    pairs: Edits
    patches: int
    context: int = 128
    t_limit: int = 100
    noisiest: int = 1000
    drop: float = 0.1
    questions: float = 0.25                             # Our choice: see docs/RESULTS.md
    tokenizer: object = None

    def __post_init__(self):
        self.triples = self.pairs.triples()

    def longest(self):
        """Positions of the longest document."""
        question = "what changed ? " if self.pairs.scenes and self.questions else ""
        tokens = max(count_tokens(self.tokenizer, question + text) for text in self.pairs.captions)
        pictures = 2 * (self.patches + 2)               # each between BOI and EOI
        return 2 + pictures + tokens                    # all between BOS and EOS

    def draw(self, rng):
        """One document, as `data.lay_out` takes it. rng: numpy Generator."""
        before, text, after = self.triples[rng.integers(len(self.triples))]
        first = ("image", before, self.t_limit)
        # A folder has no language of its own in which to be asked.
        if self.pairs.scenes and rng.random() < self.questions:
            return [first, ("image", after, self.t_limit), f"what changed ? {text}"]

        # Guidance needs a model that has also learned to draw without the words, without the first
        # picture, and without both. A picture that is pure noise says nothing.
        if rng.random() < self.drop:
            first = ("image", before, self.noisiest, self.noisiest)
        if rng.random() < self.drop:
            text = ("dropped", text)
        return [first, text, ("image", after, self.noisiest)]


def demo():
    """Draw a few chains of edits, and judge each edit by its picture."""
    edits = scene_edits(12, seed=1, progress=False)

    def describe(k):
        names = [f"{thing.colour} {thing.shape} {cell_of(thing)}" for thing in edits.scenes[k]]
        return ", ".join(names)

    for pictures, instructions in edits.chains[:6]:
        print(f"\n  {describe(pictures[0])}")
        for before, text, after in zip(pictures, instructions, pictures[1:]):
            seen = scenes.parse(edits.pixels[after])
            exact, kept, untouched = judge(edits.scenes[before], text, seen)
            print(f"    {text}")
            print(f"  {describe(after)}        right: {exact}, in place: {kept} of {untouched}")
    rng = np.random.default_rng(0)
    print("\na document:", EditDocuments(edits, patches=16).draw(rng))


if __name__ == "__main__":
    run_command(lambda _: demo())
