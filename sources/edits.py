"""
edits.py: a picture, an instruction, a picture                              (Transfusion §4.5 "Image Editing", Fig. 6)

THE IDEA    A model that has learned to draw after words has never had to draw after a picture *and* words. The paper
            fine-tunes it on 8,000 triples (picture, instruction, edited picture), and then it edits. Nothing in the model
            changes: an edit is one more document, with the first picture as context and the second one to be drawn.
A PICTURE   <bos> BOI [ before ] EOI make the circle blue BOI [ after ] EOI <eos>
            <bos> BOI [ before ] EOI BOI [ after ] EOI what changed ? make the circle blue <eos>      the same, asked back
THE RULES   Instructions of the `scenes` world; each names its object so that only one fits ("the circle", or "the red
            circle" where there are two):
              make the circle blue            recolour        remove the circle                        remove
              turn the circle into a square   reshape         add a red cross left of the circle       add
                                                              move the circle above the square         move
            An edit is right if the picture holds exactly what it should: what was not named stands within 2 pixels of its
            place; what was added or moved stands in the cell that the instruction means.
PAPER/HERE  same: fine-tuning on 8,000 triples; the data are learned with both losses, as in pretraining.
            our choice: the first picture is nearly clean in training (t <= 100 of the paper's schedule; App. B.2 has 500 for
            captions), because what is to be copied must be seen; a chain of edits is one edit after the other.
            our choice: a quarter of the documents ask "what changed ?". Of the others, in one of ten the instruction is
            dropped, in one of ten the first picture is pure noise, so that guidance can be over words, over the picture, or
            both (`sample.edit`).
READ NEXT   sample.py        TRY IT  python edits.py        TEST  tests/test_edits.py
"""
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sources import scenes
from sources.scenes import COLOURS, HELD_OUT, RELATIONS, SHAPES, Thing
from support.common import UserError, open_picture, read_lines

KINDS = ("recolour", "reshape", "remove", "add", "move")
NEAR = 2.0                                              # pixels that an untouched object may be off


# ---------------------------------------------------------------------------------------------------------------- grammar
def kind_of(instruction):
    """Which of KINDS an instruction is, by its first word."""
    return dict(zip(("make", "turn", "remove", "add", "move"), KINDS))[instruction.split()[0]]


def cell_of(thing, size=32):
    """(column, row) of the 2x2 cell that holds a Thing's centre."""
    return int(thing.x * 2 >= size), int(thing.y * 2 >= size)


def name_of(things, k):
    """The shortest name that fits only things[k]: "circle" or "red circle"; None if it has a twin."""
    same = [t for t in things if t.shape == things[k].shape]
    if len(same) == 1:
        return things[k].shape
    alike = sum(t.colour == things[k].colour for t in same)
    return f"{things[k].colour} {things[k].shape}" if alike == 1 else None


def find(things, words):
    """The index of the only Thing that words ("circle" or "red circle") name. Raises ValueError if not exactly one fits."""
    *colour, shape = words.split()
    fits = [k for k, t in enumerate(things) if t.shape == shape and colour in ([], [t.colour])]
    if len(fits) != 1:
        raise ValueError(f"{len(fits)} objects of the picture are a {words!r}: an instruction must name exactly one")
    return fits[0]


def apply(things, instruction, size=32):
    """The scene that an instruction asks for: a list of (Thing, tolerance), in which tolerance is the largest offset in
    x and in y, in pixels, that the Thing's centre may have. An added or moved Thing is centred in its cell, and may be
    anywhere in it. Raises ValueError for a sentence that is no instruction, or that does not fit the picture."""
    verb, *rest = instruction.split()
    goal = [(t, NEAR) for t in things]
    place = None
    for relation in RELATIONS:                          # "... left of the circle": the neighbouring cell
        if verb in ("add", "move") and f" {relation} the " in instruction:
            what, anchor = instruction.split(f" {relation} the ")
            rest, (dx, dy) = what.split()[1:], RELATIONS[relation]
            column, row = cell_of(things[find(things, anchor)], size)
            place = (column + dx, row + dy)
            if not all(0 <= k <= 1 for k in place):
                raise ValueError(f"there is no room {relation} the {anchor}: it stands at the picture's edge")
    if verb == "make" and len(rest) >= 3 and rest[0] == "the" and rest[-1] in COLOURS:
        k = find(things, " ".join(rest[1:-1]))
        goal[k] = (things[k]._replace(colour=rest[-1]), NEAR)
    elif verb == "turn" and len(rest) >= 5 and rest[0] == "the" and rest[-3:-1] == ["into", "a"] and rest[-1] in SHAPES:
        k = find(things, " ".join(rest[1:-3]))
        goal[k] = (things[k]._replace(shape=rest[-1]), NEAR)
    elif verb == "remove" and len(rest) >= 2 and rest[0] == "the":
        del goal[find(things, " ".join(rest[1:]))]
    elif place and verb == "add" and len(rest) == 3 and rest[0] == "a" and rest[1] in COLOURS and rest[2] in SHAPES:
        goal.append((Thing(rest[1], rest[2], *((k + 0.5) * size / 2 for k in place), 0.17 * size), size / 4))
    elif place and verb == "move" and len(rest) >= 2 and rest[0] == "the":
        k = find(things, " ".join(rest[1:]))
        goal[k] = (things[k]._replace(x=(place[0] + 0.5) * size / 2, y=(place[1] + 0.5) * size / 2), size / 4)
    else:
        raise ValueError(f"{instruction!r} is not an instruction of this world: see the rules in edits.py")
    cells = [cell_of(t, size) for t, _ in goal]
    if len(set(cells)) < len(cells):
        raise ValueError(f"{instruction!r}: that place is taken")
    return goal


def propose(things, kind, rng, size=32):
    """A random instruction of one of KINDS that fits the scene, or None if there is none. It never asks for a held-out
    colour-shape pair. rng: numpy Generator."""
    names, any_of = [name_of(things, k) for k in range(len(things))], lambda options: options[rng.integers(len(options))]
    known = [k for k, name in enumerate(names) if name]
    if not known:
        return None
    k = any_of(known)
    thing, name = things[k], names[k]
    if kind == "recolour":
        return f"make the {name} {any_of([c for c in COLOURS if c != thing.colour and (c, thing.shape) not in HELD_OUT])}"
    if kind == "reshape":
        return f"turn the {name} into a {any_of([s for s in SHAPES if s != thing.shape and (thing.colour, s) not in HELD_OUT])}"
    if kind == "remove":
        return f"remove the {name}" if len(things) > 1 else None        # an empty picture says nothing about the edit
    taken, options = {cell_of(t, size) for t in things}, []
    for anchor in known:
        column, row = cell_of(things[anchor], size)
        for relation, (dx, dy) in RELATIONS.items():
            if 0 <= column + dx <= 1 and 0 <= row + dy <= 1 and (column + dx, row + dy) not in taken and (kind == "add" or anchor != k):
                options.append(f"{relation} the {names[anchor]}")
    if not options:
        return None
    if kind == "move":
        return f"move the {name} {any_of(options)}"
    colour, shape = any_of([(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT])
    return f"add a {colour} {shape} {any_of(options)}"


def carry_out(things, instruction, rng, size=32):
    """The scene after an instruction: `apply`, with a random place in its cell for what was added or moved."""
    after = []
    for thing, tolerance in apply(things, instruction, size):
        if tolerance != NEAR:
            r = size / 2 * rng.uniform(0.30, 0.38) if instruction.startswith("add ") else thing.r
            slack = size / 4 - r - 1.0                  # as in scenes.draw_scene
            thing = thing._replace(r=r, x=thing.x + rng.uniform(-slack, slack), y=thing.y + rng.uniform(-slack, slack))
        after.append(thing)
    return after


def compare(goal, seen):
    """[bool] for each (Thing, tolerance) of goal: whether it is in the parsed scene `seen`; and whether nothing else is."""
    free, found = list(seen), []
    for wanted, tolerance in goal:
        near = [t for t in free if (t.colour, t.shape) == (wanted.colour, wanted.shape)
                and max(abs(t.x - wanted.x), abs(t.y - wanted.y)) <= tolerance]
        found.append(bool(near))
        if near:
            free.remove(near[0])
    return found, not free


def judge(before, instruction, seen, size=32):
    """(exact, kept, untouched): whether the parsed scene `seen` is what the instruction asked for and nothing else; of how
    many untouched objects how many stand in place (same colour, same shape, within 2 pixels)."""
    goal = apply(before, instruction, size)
    found, alone = compare(goal, seen)
    still = [wanted in before for wanted, _ in goal]
    return all(found) and alone, sum(f and s for f, s in zip(found, still)), sum(still)


def judge_end(first, last, seen, size=32):
    """Whether `seen` is the scene `last` that a chain of edits of `first` leads to: an object that stands where one stood
    at first must be within 2 pixels of it, any other in its cell."""
    places = {(t.x, t.y) for t in first}
    centre = lambda t: t._replace(x=(cell_of(t, size)[0] + 0.5) * size / 2, y=(cell_of(t, size)[1] + 0.5) * size / 2)
    found, alone = compare([(t, NEAR) if (t.x, t.y) in places else (centre(t), size / 4) for t in last], seen)
    return all(found) and alone


# ----------------------------------------------------------------------------------------------------------------- triples
@dataclass
class Edits:
    """Chains of edits: pictures and the instructions between them. A triple is a chain of one; training takes triples.
    pixels: (N, h, w, 3) uint8, all pictures; chains: list of ([indices of n + 1 pictures], [n instructions]).
    scenes: the true scene of each picture, or None. Has the fields of sources.Pairs that training asks for."""
    pixels: np.ndarray
    chains: list
    scenes: list | None = None
    name: str = "edits"
    world: object = None
    labels: object = None
    language: list = field(default_factory=list)        # instructions beyond these whose words must be known

    @property
    def captions(self):
        """All instructions: list of str."""
        return [text for _, said in self.chains for text in said]

    def triples(self):
        """[(index of the picture before, instruction, index of the picture after)] of all chains."""
        return [(a, text, b) for pictures, said in self.chains for a, text, b in zip(pictures, said, pictures[1:])]

    def vocabulary(self):
        """Every word that this source can utter."""
        if self.scenes:
            return scenes.vocabulary()
        return {word for text in [*self.captions, *self.language] for word in text.split()}


def scene_edits(n=8000, seed=0, longest=3, single=0.5, size=32, progress=True):
    """Edits with n triples in the `scenes` world: a share `single` alone, the others in chains of 1 to `longest` (`single`
    = 0: all of `longest`, as far as they go). The first scenes are those of pretraining; the kind of each edit is uniform
    over the kinds that fit."""
    rng, world, chains, states, left = np.random.default_rng([*np.atleast_1d(seed), 11]), scenes.World(), [], [], n
    bar = tqdm(total=n, desc="drawing edits", disable=not progress, leave=False)
    while left > 0:
        things = scenes.draw_scene(world.caption(rng)[1], rng, size)
        length = (1 if rng.random() < single else int(rng.integers(1, longest + 1))) if single else longest
        chain, said = [things], []
        while len(said) < min(length, left):
            options = [text for kind in KINDS if (text := propose(chain[-1], kind, rng, size))]
            if not options:                             # nothing in it can be named: only twins
                break
            said.append(options[rng.integers(len(options))])
            chain.append(carry_out(chain[-1], said[-1], rng, size))
        if said:
            chains.append((list(range(len(states), len(states) + len(chain))), said))
            states += chain
            left -= len(said)
            bar.update(len(said))
    bar.close()
    return Edits(np.stack([scenes.render(things, size) for things in states]), chains, states)


def load_triples(folder, size=32, split="train"):
    """Edits of a folder of your own: edits.jsonl with one {"before": file, "instruction": words, "after": file} per line.
    Every tenth triple is the test split. A triple with a missing or broken picture is counted, named and skipped."""
    path = Path(folder) / "edits.jsonl"
    lines = read_lines(path, '{"before": file name, "instruction": words, "after": file name}')
    pixels, chains, bad = [], [], []
    for number, line in tqdm(lines, desc=f"reading {folder}", leave=False):
        try:
            entry = json.loads(line)
            names, text = [path.parent / entry[k] for k in ("before", "after")], " ".join(entry["instruction"].lower().split())
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} line {number} is not {{\"before\": ..., \"instruction\": ..., \"after\": ...}}: "
                                 f"{line[:60]!r}") from None
        try:
            two = [open_picture(name, size) for name in names]
        except UserError as problem:
            bad.append(str(problem))
            continue
        chains.append(([len(pixels), len(pixels) + 1], [text]))
        pixels += two
    if bad:
        print(f"{folder}: skipped {len(bad)} of {len(lines)} triples: {'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}")
    kept = [chain for k, chain in enumerate(chains) if (k % 10 == 9) == (split == "test")]
    if not kept:
        raise UserError(f"{folder} has no usable {split} triple: it needs at least ten with readable pictures")
    return Edits(np.stack(pixels), kept, language=[text for _, said in chains for text in said])


def load_edits(folder=None, size=32, split="train", n=8000, seed=0, progress=True):
    """Edits of a folder, or of the `scenes` world if there is none. Splits differ by their stream of random numbers."""
    if folder:
        return load_triples(folder, size, split)
    return scene_edits(n, [seed, ("train", "test").index(split)], size=size, progress=progress)


@dataclass
class EditDocuments:
    """Draws documents from Edits, as data.Documents does from Pairs."""
    pairs: Edits
    patches: int                                        # P
    context: int = 128                                  # T
    t_limit: int = 100                                  # noise limit of a picture that precedes its text
    T: int = 1000
    drop: float = 0.1                                   # share of edits without instruction, and without first picture
    asked: float = 0.25                                 # our choice: share that asks "what changed ?" instead (scenes only; README, "What it took")

    def __post_init__(self):
        self.triples = self.pairs.triples()

    def longest(self):
        """Positions of the longest document."""
        extra = 3 if self.pairs.scenes and self.asked else 0            # what changed ?
        return 2 + 2 * (self.patches + 2) + extra + max(len(text.split()) for _, text, _ in self.triples)

    def draw(self, rng):
        """One document, as `data.lay_out` takes it. rng: numpy Generator."""
        before, text, after = self.triples[rng.integers(len(self.triples))]
        if self.pairs.scenes and rng.random() < self.asked:
            return [("image", before, self.t_limit), ("image", after, self.t_limit), f"what changed ? {text}"]
        blind, mute = rng.random() < self.drop, rng.random() < self.drop
        return [("image", before, self.T, self.T) if blind else ("image", before, self.t_limit),
                ("dropped", text) if mute else text, ("image", after, self.T)]


if __name__ == "__main__":
    found, rng = scene_edits(12, seed=1, progress=False), np.random.default_rng(0)
    for pictures, said in found.chains[:6]:
        show = lambda k: ", ".join(f"{t.colour} {t.shape} {cell_of(t)}" for t in found.scenes[k])
        print(f"\n  {show(pictures[0])}")
        for k, before, text in zip(pictures[1:], pictures, said):
            exact, kept, untouched = judge(found.scenes[before], text, scenes.parse(found.pixels[k]))
            print(f"    {text}\n  {show(k)}        right: {exact}, in place: {kept} of {untouched}")
    print("\na document:", EditDocuments(found, patches=16).draw(rng))
