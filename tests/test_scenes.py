"""
test_scenes.py: can the toy world be trusted as a judge?                       (sources/scenes.py; Transfusion App. B.1, GenEval)

Every number that evaluate.py reports rests on four things, tested here in this order: the parser reads back what the renderer
drew; a caption is true of its own picture and of no other; held-out pairs never reach training; and the grammar's
probabilities are the probabilities with which it speaks.
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


def random_scenes(n, seed=0, size=32):
    """n scenes, all categories in turn, a tenth of them with held-out pairs: list of (claim, things)."""
    rng, found = np.random.default_rng(seed), []
    for k in range(n):
        category = EVERY[k % len(EVERY)]
        held_out = k % 10 == 9 and bool(scenes.captions(category, True))
        claim = World((category,)).caption(rng, held_out)[1]
        found.append((claim, scenes.draw_scene(claim, rng, size, allow_held_out=held_out)))
    return found


def offsets(things, seen):
    """(dx, dy, dr) of each seen thing from the drawn one of the same colour and shape that is nearest; None if the two
    lists are not one and the same set of objects."""
    left, found = list(seen), []
    for a in things:
        same = [b for b in left if (b.colour, b.shape) == (a.colour, a.shape)]
        if not same:
            return None
        b = min(same, key=lambda b: math.hypot(b.x - a.x, b.y - a.y))
        left.remove(b)
        found.append((b.x - a.x, b.y - a.y, b.r - a.r))
    return None if left else found


# ------------------------------------------------------------------------------------------------- renderer <-> parser
def test_parser_inverts_renderer():
    """Catches a parser that is off by half a pixel, drops, merges or renames an object: every score would be wrong."""
    errors = []
    for _, things in random_scenes(300):
        found = offsets(things, scenes.parse(scenes.render(things)))
        assert found is not None, f"{things} was read as {scenes.parse(scenes.render(things))}"
        errors += found
    errors = np.abs(np.array(errors))
    assert errors[:, :2].max() <= 1.0 and errors[:, 2].max() <= 1.0
    assert errors.mean(0).max() < 0.35                  # and without a bias of half a pixel


def test_parser_inverts_renderer_at_another_size():
    """Catches pixel counts written into the parser that hold for 32x32 only."""
    for _, things in random_scenes(28, seed=1, size=64):
        found = offsets(things, scenes.parse(scenes.render(things, 64)))
        assert found is not None and np.abs(found)[:, :2].max() <= 1.0


@pytest.mark.parametrize("damage", ["noise", "blur"])
def test_parser_forgives_what_a_model_does_to_a_picture(damage):
    """Catches a judge that only reads perfect pictures: a drawn one is a little noisy and a little soft."""
    rng, right, drawn = np.random.default_rng(2), 0, random_scenes(200, seed=2)
    for _, things in drawn:
        picture = scenes.render(things)
        if damage == "noise":
            picture = np.clip(picture + rng.normal(0, 0.2 * 255, picture.shape), 0, 255).astype(np.uint8)
        else:
            picture = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7)))
        found = offsets(things, scenes.parse(picture))
        right += found is not None and np.abs(found)[:, :2].max() <= 1.0
    assert right >= 0.99 * len(drawn)


def test_antialiasing_only_darkens():
    """Catches a renderer that mixes colours at an edge, where `channel > 0.5` would then read a colour nobody drew."""
    for colour, rgb in COLOURS.items():
        picture = scenes.render([Thing(colour, "circle", 15.7, 16.2, 5.3)])
        off = np.array(rgb) == 0
        assert picture.max() == 255 and picture[..., off].sum() == 0
        lit = picture[..., ~off]
        assert (lit == lit[..., :1]).all()              # all its channels fade together


def test_parser_overlooks_dust_and_refuses_other_arrays():
    """Catches specks counted as objects, and float or grey pictures read as if they were uint8 RGB."""
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    assert scenes.parse(picture) == []
    picture[3:5, 3:5] = 255
    assert scenes.parse(picture) == []
    for wrong in (picture / 255, picture[..., 0], picture[..., :1]):
        with pytest.raises(ValueError, match="uint8"):
            scenes.parse(wrong)


# ------------------------------------------------------------------------------------------------- captions <-> scenes
def meaning(claim):
    """What a claim says, apart from the order it says it in: A left of B is B right of A; A and B is B and A."""
    if claim.relation is None:
        return Counter(claim.objects)
    first, second = claim.objects
    return min((first, claim.relation, second), (second, INVERSE[claim.relation], first), key=str)


@pytest.mark.parametrize("category", EVERY)
def test_a_caption_is_true_of_its_own_scene_and_of_no_other(category):
    """Catches a scene that says more, less or the mirror image of its caption, and a judge that lets it pass."""
    rng = np.random.default_rng(3)
    options = scenes.captions(category)
    chosen = [options[k] for k in rng.permutation(len(options))[:40]]
    drawn = [(claim, scenes.parse(scenes.render(scenes.draw_scene(claim, rng)))) for _, claim in chosen]
    for text, claim in chosen:
        assert scenes.read_caption(text) == claim
        for other, things in drawn:
            same = meaning(claim) == meaning(other)
            assert scenes.holds(claim, things, exact=True) == same, f"{text!r} of {things}"
            if same:
                assert scenes.holds(claim, things, exact=False)


def test_a_scene_has_exactly_the_named_objects():
    """Catches draw_scene adding, losing or recolouring an object."""
    for claim, things in random_scenes(140, seed=4):
        assert len(things) == len(claim.objects)
        for thing, (colour, shape) in zip(things, claim.objects):
            assert thing.shape == shape and colour in (None, thing.colour)


def test_read_caption():
    """Catches a reader of captions that accepts a sentence which the grammar does not have."""
    assert scenes.read_caption("  a red   circle ") == Claim("colors", (("red", "circle"),))
    for text in ("", "a red", "red circle", "a circle left of a circle", "a pink", "five circles"):
        assert scenes.read_caption(text) is None


RED, BLUE = Thing("red", "circle", 8, 8, 5), Thing("blue", "square", 24, 8, 5)        # the circle stands left of the square
GREEN = Thing("green", "square", 8, 24, 5)
TRUTH = [                                               # caption, scene, GenEval's rule, exact
    ("a circle", [], False, False),
    ("a circle", [RED], True, True),
    ("a circle", [BLUE], False, False),
    ("a circle", [RED, BLUE], True, False),             # GenEval asks that it be there, not that nothing else is
    ("a circle", [RED, RED._replace(y=24)], True, False),
    ("a red circle", [RED], True, True),
    ("a blue circle", [RED], False, False),
    ("a red circle", [RED, RED._replace(colour="blue", y=24)], True, False),
    ("a circle and a square", [RED, BLUE], True, True),
    ("a circle and a square", [RED], False, False),
    ("a circle and a square", [RED, BLUE, GREEN], True, False),
    ("a red circle and a blue square", [RED, BLUE], True, True),
    ("a blue circle and a red square", [RED, BLUE], False, False),                    # attributes swapped
    ("a red circle and a green square", [RED, BLUE], False, False),
    ("two squares", [BLUE, GREEN], True, True),
    ("two squares", [BLUE], False, False),
    ("two squares", [BLUE, GREEN, GREEN._replace(x=24)], False, False),               # GenEval's "exclude": not three
    ("two squares", [BLUE, GREEN, RED], True, False),   # ... but a circle may be there
    ("three squares", [BLUE, GREEN], False, False),
    ("a circle left of a square", [RED, BLUE], True, True),
    ("a circle right of a square", [RED, BLUE], False, False),
    ("a circle above a square", [RED, BLUE], False, False),
    ("a square right of a circle", [RED, BLUE], True, True),
    ("a square left of a circle", [RED, BLUE], False, False),
    ("a circle above a square", [RED, GREEN], True, True),
    ("a square below a circle", [RED, GREEN], True, True),
    ("a square above a circle", [RED, GREEN], False, False),
    ("a circle left of a square", [RED, BLUE, GREEN], True, False),                   # one pair is enough for the rule
    ("a circle left of a square", [RED, GREEN], False, False),
    ("a red circle left of a blue square", [RED, BLUE], True, True),
    ("a blue circle left of a red square", [RED, BLUE], False, False)]


@pytest.mark.parametrize("text, things, rule, exact", TRUTH, ids=lambda v: v if isinstance(v, str) else "")
def test_truth_table(text, things, rule, exact):
    """Catches the wrong verdict, worked out by hand: include, exclude, colour, relation."""
    claim = scenes.read_caption(text)
    assert scenes.holds(claim, things, exact=False) == rule
    assert scenes.holds(claim, things, exact=True) == exact


@pytest.mark.parametrize("dx, dy, true", [
    (-16, 0, {"left of"}), (16, 0, {"right of"}), (0, -16, {"above"}), (0, 16, {"below"}),
    (-16, -16, {"left of", "above"}), (16, 16, {"right of", "below"}),                # a diagonal is both
    (-16, 5, {"left of"}), (-5, 16, {"below"}),
    (0, 0, set()), (-2, 0, set()), (1.9, -2, set())])   # nearer than a tenth of the sizes (20): no relation at all
def test_relations_by_hand(dx, dy, true):
    """Catches a flipped axis (y grows downwards), a wrong angle, or two objects on one spot counted as left of each other."""
    a, b = Thing("red", "circle", 16 + dx, 16 + dy, 5), Thing("blue", "square", 16, 16, 5)
    assert {rel for rel in RELATIONS if scenes.relation_holds(a, b, rel)} == true


def test_relation_is_divided_by_the_whole_offset():
    """Catches a rule wider than GenEval's, which shrinks the offset by the sizes but divides by the length before that."""
    a, b = Thing("red", "circle", 9.5, 14, 5), Thing("blue", "square", 0, 0, 5)
    assert scenes.relation_holds(a, b, "below")         # (14 - 2) / |(9.5, 14)| = 0.71
    assert not scenes.relation_holds(a, b, "right of")  # (9.5 - 2) / |(9.5, 14)| = 0.44, but 0.53 of |(7.5, 12)|


# ----------------------------------------------------------------------------------------------------------- held out
def test_held_out_pairs_never_reach_training():
    """Catches a leak: then `held_out` measures memory, not composition. Colours left open leak most easily."""
    rng, world = np.random.default_rng(5), World(EVERY)
    for _ in range(3000):
        text, claim = world.caption(rng)
        pairs = {(t.colour, t.shape) for t in scenes.draw_scene(claim, rng)} | set(claim.objects)
        assert not pairs & HELD_OUT, text
        words = world.deduction(rng)
        assert not any(f"{colour} {shape}" in words for colour, shape in HELD_OUT), words
    for category in EVERY:
        assert not any(f"{c} {s}" in text for text, _ in scenes.captions(category) for c, s in HELD_OUT)


def test_held_out_pairs_are_there_when_asked_for():
    """Catches an evaluation of unseen pairs that quietly asks for seen ones, or draws the pair in another colour."""
    rng, world, named = np.random.default_rng(6), World(EVERY), Counter()
    for _ in range(300):
        text, claim = world.caption(rng, held_out=True)
        assert set(claim.objects) & HELD_OUT, text
        things = scenes.draw_scene(claim, rng, allow_held_out=True)
        assert scenes.holds(claim, things), text
        named.update(set(claim.objects) & HELD_OUT)
    assert set(named) == HELD_OUT


# ------------------------------------------------------------------------------------------- the language's own entropy
@pytest.mark.parametrize("categories", [WORLDS["one"], EVERY, CATEGORIES, ("counting",)], ids=len)
def test_caption_probabilities_sum_to_one(categories):
    """Catches a wrong floor under the text loss: excess nats are measured from it."""
    texts = [text for category in categories for text, _ in scenes.captions(category)]
    assert len(texts) == len(set(texts))                # a sentence of two categories would be counted twice
    assert sum(math.exp(World(categories).caption_log_prob(text)) for text in texts) == pytest.approx(1)


def test_captions_are_drawn_with_their_probability():
    """Catches a grammar that speaks with other frequencies than those it states."""
    rng, world, n = np.random.default_rng(7), World(WORLDS["one"]), 20000
    seen = Counter(world.caption(rng)[0] for _ in range(n))
    texts = [text for category in world.categories for text, _ in scenes.captions(category)]
    assert set(seen) == set(texts)
    for text in texts:
        p = math.exp(world.caption_log_prob(text))
        assert abs(seen[text] - n * p) < 5 * math.sqrt(n * p), text


@pytest.mark.parametrize("name", WORLDS)
def test_deductions_are_drawn_with_their_probability(name):
    """Catches a wrong number of deductions, two of them with the same words, or a relation that is never told."""
    world, rng, n = World(WORLDS[name]), np.random.default_rng(8), 4000
    texts = {scenes.deduction_text(claim.objects, rel) for _, claim in scenes.captions("color_attr") for rel in RELATIONS}
    assert len(texts) * math.exp(world.deduction_log_prob()) == pytest.approx(1)
    drawn = [world.deduction(rng) for _ in range(n)]
    assert set(drawn) <= texts and len(set(drawn)) > 0.6 * min(n, len(texts))
    wanted = np.mean([len(text.split()) for text in texts])
    assert np.mean([len(text.split()) for text in drawn]) == pytest.approx(wanted, abs=0.1)
    assert all(text.split()[1:3] != text.split(" . the ")[1].split()[:2] for text in drawn)       # always from the other side
    for rel in RELATIONS:
        assert abs(sum(f" is {rel} a " in text for text in drawn) - n / 4) < 5 * math.sqrt(n / 4)


@pytest.mark.parametrize("rel", RELATIONS)
def test_deductions_follow(rel):
    """Catches a second sentence that does not follow from the first, and a `wrong` one that does or changes more words."""
    def arrow(text):                                    # "... red circle is left of a blue square": the arrow blue -> red
        for word, (dx, dy) in RELATIONS.items():
            if f" is {word} " in text:
                a, b = text.split(f" is {word} ")
                key = tuple(a.split()[-2:]), tuple(b.split()[-2:])
                return (key, (dx, dy)) if key[0] < key[1] else (key[::-1], (-dx, -dy))
    right = scenes.deduction_text((("red", "circle"), ("blue", "square")), rel)
    wrong = scenes.deduction_text((("red", "circle"), ("blue", "square")), rel, wrong=True)
    fact, told, end = right.split(".")
    assert end == "" and arrow(fact.strip()) == arrow(told.strip())
    assert told.split()[1:3] == ["blue", "square"]       # the second sentence starts at the second object
    fact_wrong, told_wrong, _ = wrong.split(".")
    assert fact_wrong == fact and arrow(told_wrong.strip()) != arrow(told.strip())
    others = [[word for word in text.split() if word not in "left right of above below".split()] for text in (told_wrong, told)]
    assert others[0] == others[1]
