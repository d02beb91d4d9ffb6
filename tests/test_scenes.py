"""
test_scenes.py: can the toy world be trusted as a judge?
                                          (sources/scenes.py; Transfusion App. B.1, GenEval)

THE IDEA    Every number that evaluate.py reports rests on four things, tested here in this order:
              the parser reads back what the renderer drew;
              a caption is true of its own picture and of no other;
              held-out pairs never reach training;
              the grammar's probabilities are those with which it speaks.
TRY IT      pytest -n 0 tests/test_scenes.py
"""
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sources import scenes
from sources.scenes import (
    CATEGORIES,
    COLOURS,
    HELD_OUT,
    INVERSE,
    RELATIONS,
    WORLDS,
    Claim,
    Thing,
    World,
)

EVERY = WORLDS["six"]                                   # GenEval's six categories and ours

# A scene of three, each at the centre of a cell:   red circle      blue square
#                                                   green square
RED = Thing("red", "circle", 8, 8, 5)                   # colour, shape, x, y, half-size
BLUE = Thing("blue", "square", 24, 8, 5)
GREEN = Thing("green", "square", 8, 24, 5)


def random_scenes(n, seed=0, size=32):
    """n scenes, all categories in turn, a tenth of them with held-out pairs: list of (claim,
    things)."""
    rng = np.random.default_rng(seed)
    found = []
    for k in range(n):
        category = EVERY[k % len(EVERY)]
        # Not every category has captions with held-out pairs.
        held_out = k % 10 == 9 and bool(scenes.captions(category, True))
        _, claim = World((category,)).caption(rng, held_out)
        things = scenes.draw_scene(claim, rng, size, allow_held_out=held_out)
        found.append((claim, things))
    return found


def offsets(things, seen):
    """[(dx, dy, dr)]: how far each drawn thing is from the nearest seen one of the same colour and
    shape. None if the two lists are not one and the same set of objects."""
    left = list(seen)
    found = []
    for a in things:
        same = [b for b in left if (b.colour, b.shape) == (a.colour, a.shape)]
        if not same:
            return None
        distances = [math.hypot(b.x - a.x, b.y - a.y) for b in same]
        b = same[distances.index(min(distances))]
        left.remove(b)
        found.append((b.x - a.x, b.y - a.y, b.r - a.r))
    if left:
        return None
    return found


def all_texts(categories):
    """Every caption of these categories, without those that name a held-out pair."""
    texts = []
    for category in categories:
        texts += [text for text, _ in scenes.captions(category)]
    return texts


# ----------------------------------------------------------------------------- renderer <-> parser
def test_parser_inverts_renderer():
    """Catches a parser that is off by half a pixel, or that drops, merges or renames an object:
    every score would be wrong."""
    errors = []
    for _, things in random_scenes(300):
        seen = scenes.parse(scenes.render(things))
        found = offsets(things, seen)
        assert found is not None, f"{things} was read as {seen}"
        errors += found

    errors = np.abs(np.array(errors))                   # (objects, 3): dx, dy, dr
    assert errors[:, :2].max() <= 1.0
    assert errors[:, 2].max() <= 1.0
    assert errors.mean(0).max() < 0.35                  # and no bias of half a pixel


def test_parser_inverts_renderer_at_another_size():
    """Catches pixel counts written into the parser that hold for 32x32 only."""
    for _, things in random_scenes(28, seed=1, size=64):
        found = offsets(things, scenes.parse(scenes.render(things, 64)))
        assert found is not None
        assert np.abs(found)[:, :2].max() <= 1.0


@pytest.mark.parametrize("damage", ["noise", "blur"])
def test_parser_forgives_what_a_model_does_to_a_picture(damage):
    """Catches a judge that reads perfect pictures only: a drawn one is a little noisy and a little
    soft."""
    rng = np.random.default_rng(2)
    drawn = random_scenes(200, seed=2)
    right = 0
    for _, things in drawn:
        picture = scenes.render(things)
        if damage == "noise":
            noise = rng.normal(0, 0.2 * 255, picture.shape)
            picture = np.clip(picture + noise, 0, 255).astype(np.uint8)
        else:
            blur = ImageFilter.GaussianBlur(0.7)
            picture = np.asarray(Image.fromarray(picture).filter(blur))
        found = offsets(things, scenes.parse(picture))
        if found is not None and np.abs(found)[:, :2].max() <= 1.0:
            right += 1
    assert right >= 0.99 * len(drawn)


def test_antialiasing_only_darkens():
    """Catches a renderer that mixes colours at an edge, where `channel > 0.5` would then read a
    colour that nobody drew."""
    for colour, rgb in COLOURS.items():
        picture = scenes.render([Thing(colour, "circle", 15.7, 16.2, 5.3)])
        off = np.array(rgb) == 0                        # the channels without light
        assert picture.max() == 255
        assert picture[..., off].sum() == 0
        lit = picture[..., ~off]
        assert (lit == lit[..., :1]).all()              # all its channels fade together


def test_parser_overlooks_dust_and_refuses_other_arrays():
    """Catches specks that are counted as objects, and float or grey pictures that are read as if
    they were uint8 RGB."""
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    assert scenes.parse(picture) == []
    picture[3:5, 3:5] = 255
    assert scenes.parse(picture) == []

    for wrong in (picture / 255, picture[..., 0], picture[..., :1]):
        with pytest.raises(ValueError, match="uint8"):
            scenes.parse(wrong)


# ----------------------------------------------------------------------------- captions <-> scenes
def meaning(claim):
    """What a claim says, apart from the order in which it says it: A left of B is B right of A; A
    and B is B and A."""
    if claim.relation is None:
        return Counter(claim.objects)
    first, second = claim.objects
    one_way = (first, claim.relation, second)
    other_way = (second, INVERSE[claim.relation], first)
    return min(one_way, other_way, key=str)


@pytest.mark.parametrize("category", EVERY)
def test_a_caption_is_true_of_its_own_scene_and_of_no_other(category):
    """Catches a scene that says more, less or the mirror image of its caption, and a judge that
    lets it pass."""
    # 1. Forty captions, and a picture of each, as the parser reads it.
    rng = np.random.default_rng(3)
    options = scenes.captions(category)
    chosen = [options[k] for k in rng.permutation(len(options))[:40]]
    drawn = []
    for _, claim in chosen:
        picture = scenes.render(scenes.draw_scene(claim, rng))
        drawn.append((claim, scenes.parse(picture)))

    # 2. Each caption, of each picture.
    for text, claim in chosen:
        assert scenes.read_caption(text) == claim
        for other, things in drawn:
            same = meaning(claim) == meaning(other)
            exact = scenes.holds(claim, things, exact=True)
            assert exact == same, f"{text!r} of {things}"
            if same:
                assert scenes.holds(claim, things, exact=False)


def test_a_scene_has_exactly_the_named_objects():
    """Catches draw_scene that adds, loses or recolours an object."""
    for claim, things in random_scenes(140, seed=4):
        assert len(things) == len(claim.objects)
        for thing, (colour, shape) in zip(things, claim.objects):
            assert thing.shape == shape
            assert colour in (None, thing.colour)       # None: the caption leaves it open


def test_read_caption():
    """Catches a reader of captions that accepts a sentence which the grammar does not have."""
    assert scenes.read_caption("  a red   circle ") == Claim("colors", (("red", "circle"),))
    for text in (
        "",
        "a red",
        "red circle",
        "a circle left of a circle",
        "a pink",
        "five circles",
    ):
        assert scenes.read_caption(text) is None


TRUTH = [                                               # caption, scene, GenEval's rule, exact
    ("a circle", [], False, False),
    ("a circle", [RED], True, True),
    ("a circle", [BLUE], False, False),
    # GenEval asks that it be there, not that nothing else is.
    ("a circle", [RED, BLUE], True, False),
    ("a circle", [RED, RED._replace(y=24)], True, False),
    ("a red circle", [RED], True, True),
    ("a blue circle", [RED], False, False),
    ("a red circle", [RED, RED._replace(colour="blue", y=24)], True, False),

    ("a circle and a square", [RED, BLUE], True, True),
    ("a circle and a square", [RED], False, False),
    ("a circle and a square", [RED, BLUE, GREEN], True, False),
    ("a red circle and a blue square", [RED, BLUE], True, True),
    # The attributes are swapped.
    ("a blue circle and a red square", [RED, BLUE], False, False),
    ("a red circle and a green square", [RED, BLUE], False, False),

    ("two squares", [BLUE, GREEN], True, True),
    ("two squares", [BLUE], False, False),
    # GenEval's "exclude": not three. But a circle may be there.
    ("two squares", [BLUE, GREEN, GREEN._replace(x=24)], False, False),
    ("two squares", [BLUE, GREEN, RED], True, False),
    ("three squares", [BLUE, GREEN], False, False),

    ("a circle left of a square", [RED, BLUE], True, True),
    ("a circle right of a square", [RED, BLUE], False, False),
    ("a circle above a square", [RED, BLUE], False, False),
    ("a square right of a circle", [RED, BLUE], True, True),
    ("a square left of a circle", [RED, BLUE], False, False),
    ("a circle above a square", [RED, GREEN], True, True),
    ("a square below a circle", [RED, GREEN], True, True),
    ("a square above a circle", [RED, GREEN], False, False),
    # One pair is enough for the rule.
    ("a circle left of a square", [RED, BLUE, GREEN], True, False),
    ("a circle left of a square", [RED, GREEN], False, False),
    ("a red circle left of a blue square", [RED, BLUE], True, True),
    ("a blue circle left of a red square", [RED, BLUE], False, False),
]


def only_words(value):
    """The id of a parameter: its text, if it is one."""
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize("text, things, rule, exact", TRUTH, ids=only_words)
def test_truth_table(text, things, rule, exact):
    """Catches a wrong verdict, worked out by hand: include, exclude, colour, relation."""
    claim = scenes.read_caption(text)
    assert scenes.holds(claim, things, exact=False) == rule
    assert scenes.holds(claim, things, exact=True) == exact


@pytest.mark.parametrize("dx, dy, true", [
    (-16, 0, {"left of"}),
    (16, 0, {"right of"}),
    (0, -16, {"above"}),
    (0, 16, {"below"}),
    # A diagonal is both.
    (-16, -16, {"left of", "above"}),
    (16, 16, {"right of", "below"}),
    (-16, 5, {"left of"}),
    (-5, 16, {"below"}),
    # Nearer than a tenth of the sizes (20): no relation at all.
    (0, 0, set()),
    (-2, 0, set()),
    (1.9, -2, set()),
])
def test_relations_by_hand(dx, dy, true):
    """Catches a flipped axis (y grows downwards), a wrong angle, and two objects on one spot that
    are counted as left of each other."""
    a = Thing("red", "circle", 16 + dx, 16 + dy, 5)
    b = Thing("blue", "square", 16, 16, 5)
    found = {relation for relation in RELATIONS if scenes.relation_holds(a, b, relation)}
    assert found == true


def test_relation_is_divided_by_the_whole_offset():
    """Catches a rule wider than GenEval's, which shrinks the offset by the sizes but divides by the
    length before that."""
    a = Thing("red", "circle", 9.5, 14, 5)
    b = Thing("blue", "square", 0, 0, 5)
    # Below: (14 - 2) / |(9.5, 14)| = 0.71.
    assert scenes.relation_holds(a, b, "below")
    # Right of: (9.5 - 2) / |(9.5, 14)| = 0.44. Divided by |(7.5, 12)| it would be 0.53.
    assert not scenes.relation_holds(a, b, "right of")


# ---------------------------------------------------------------------------------------- held out
def names_held_out(text):
    """Whether a text names a pair of HELD_OUT."""
    return any(f"{colour} {shape}" in text for colour, shape in HELD_OUT)


def test_held_out_pairs_never_reach_training():
    """Catches a leak: `held_out` would measure memory, not composition. Colours that a caption
    leaves open leak most easily."""
    rng = np.random.default_rng(5)
    world = World(EVERY)
    for _ in range(3000):
        text, claim = world.caption(rng)
        things = scenes.draw_scene(claim, rng)
        drawn = {(thing.colour, thing.shape) for thing in things}
        assert not drawn & HELD_OUT, text
        assert not set(claim.objects) & HELD_OUT, text
        deduction = world.deduction(rng)
        assert not names_held_out(deduction), deduction

    for text in all_texts(EVERY):
        assert not names_held_out(text)


def test_held_out_pairs_are_there_when_asked_for():
    """Catches an evaluation of unseen pairs that quietly asks for seen ones, or draws the pair in
    another colour."""
    rng = np.random.default_rng(6)
    world = World(EVERY)
    named = set()
    for _ in range(300):
        text, claim = world.caption(rng, held_out=True)
        pairs = set(claim.objects) & HELD_OUT
        assert pairs, text
        named |= pairs
        things = scenes.draw_scene(claim, rng, allow_held_out=True)
        assert scenes.holds(claim, things), text
    assert named == HELD_OUT


# ----------------------------------------------------------------------- the language's own entropy
@pytest.mark.parametrize(
    "categories", [WORLDS["one"], EVERY, CATEGORIES, ("counting",)], ids=len
)
def test_caption_probabilities_sum_to_one(categories):
    """Catches a wrong floor under the text loss: excess nats are measured from it."""
    world = World(categories)
    texts = all_texts(categories)
    assert len(texts) == len(set(texts))                # none belongs to two categories
    total = sum(math.exp(world.caption_log_prob(text)) for text in texts)
    assert total == pytest.approx(1)


def test_captions_are_drawn_with_their_probability():
    """Catches a grammar that speaks with other frequencies than those it states."""
    rng = np.random.default_rng(7)
    world = World(WORLDS["one"])
    n = 20000
    seen = Counter()
    for _ in range(n):
        text, _ = world.caption(rng)
        seen[text] += 1

    texts = all_texts(world.categories)
    assert set(seen) == set(texts)
    for text in texts:
        p = math.exp(world.caption_log_prob(text))
        assert abs(seen[text] - n * p) < 5 * math.sqrt(n * p), text     # five deviations


@pytest.mark.parametrize("name", WORLDS)
def test_deductions_are_drawn_with_their_probability(name):
    """Catches a wrong number of deductions, two of them with the same words, and a relation that is
    never told."""
    world = World(WORLDS[name])
    rng = np.random.default_rng(8)
    n = 4000

    # 1. All there are, each as probable as it says.
    texts = set()
    for _, claim in scenes.captions("color_attr"):
        for relation in RELATIONS:
            texts.add(scenes.deduction_text(claim.objects, relation))
    assert len(texts) * math.exp(world.deduction_log_prob()) == pytest.approx(1)

    # 2. Those that are drawn: many different ones, none too long or too short.
    drawn = [world.deduction(rng) for _ in range(n)]
    assert set(drawn) <= texts
    assert len(set(drawn)) > 0.6 * min(n, len(texts))
    wanted = np.mean([len(text.split()) for text in texts])
    lengths = [len(text.split()) for text in drawn]
    assert np.mean(lengths) == pytest.approx(wanted, abs=0.1)

    # 3. "a red circle is ... . the blue square is ...": always from the other side.
    for text in drawn:
        fact, told = text.split(" . the ")
        assert fact.split()[1:3] != told.split()[:2]

    # 4. Each relation in a quarter of them (five deviations).
    for relation in RELATIONS:
        count = sum(f" is {relation} a " in text for text in drawn)
        assert abs(count - n / 4) < 5 * math.sqrt(n / 4)


def arrow(sentence):
    """What a sentence says, whichever side it is told from: ((one, other), (dx, dy)), where one is
    the first of the two in the alphabet, and lies in this direction from the other.

    "the red circle is left of a blue square" and "the blue square is right of a red circle" are
    both ((blue square, red circle), (1, 0))."""
    for relation, (dx, dy) in RELATIONS.items():
        if f" is {relation} " in sentence:
            a, b = sentence.split(f" is {relation} ")
            one = tuple(a.split()[-2:])
            other = tuple(b.split()[-2:])
            if one < other:
                return (one, other), (dx, dy)
            return (other, one), (-dx, -dy)


@pytest.mark.parametrize("rel", RELATIONS)
def test_deductions_follow(rel):
    """Catches a second sentence that does not follow from the first, and a `wrong` one that does,
    or that changes more words."""
    objects = (("red", "circle"), ("blue", "square"))
    right = scenes.deduction_text(objects, rel)
    wrong = scenes.deduction_text(objects, rel, wrong=True)

    # 1. The second sentence says the same, and starts at the second object.
    fact, told, end = right.split(".")
    assert end == ""
    assert arrow(fact.strip()) == arrow(told.strip())
    assert told.split()[1:3] == ["blue", "square"]

    # 2. The wrong one says something else, of the same fact.
    fact_wrong, told_wrong, _ = wrong.split(".")
    assert fact_wrong == fact
    assert arrow(told_wrong.strip()) != arrow(told.strip())

    # 3. Only words of place differ.
    def other_words(text):
        places = "left right of above below".split()
        return [word for word in text.split() if word not in places]

    assert other_words(told_wrong) == other_words(told)
