"""
test_edits.py: a picture, an instruction, a picture         (sources/edits.py; Transfusion §4.5)

THE IDEA    Three parts. The grammar of instructions and the judge of edits, on random scenes: each
            is held to the other. Then the documents that are learned from, counted over many draws:
            shares must be those stated. Then folders of the user's own triples, and their mistakes.
BUGS        "PAPER §4.8" is docs/PAPER.md §4.8, where each bug was met by somebody.
TRY IT      pytest -n 0 tests/test_edits.py
"""
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import data
from sources import edits, pairs, scenes
from sources.edits import (
    KINDS,
    NEAR,
    EditDocuments,
    apply,
    carry_out,
    cell_of,
    find,
    judge,
    judge_end,
    name_of,
    propose,
)
from sources.scenes import COLOURS, HELD_OUT, SHAPES, Thing
from support.common import UserError

# A scene of three, each at the centre of a cell:   red circle      blue square
#                                                   green square    (free)
RED = Thing("red", "circle", 8, 8, 5)                   # colour, shape, x, y, radius
BLUE = Thing("blue", "square", 24, 8, 5)
GREEN = Thing("green", "square", 8, 24, 5)
WORDS = data.Words(scenes.load_scenes(1, 0, progress=False).vocabulary())


def random_edits(n=600, seed=0, size=32):
    """n random (before, instruction, rng): scenes of all categories, every kind in turn."""
    rng = np.random.default_rng(seed)
    world = scenes.World()
    found = []
    while len(found) < n:
        _, claim = world.caption(rng)
        before = scenes.draw_scene(claim, rng, size)
        kind = KINDS[len(found) % len(KINDS)]
        text = propose(before, kind, rng, size)
        if text:                                        # else this scene allows none of that kind
            found.append((before, text, rng))
    return found


# ------------------------------------------------------------------------------- grammar <-> judge
@pytest.mark.parametrize("size", [32, 64])
def test_what_is_proposed_can_be_done(size):
    """Catches an instruction that does not fit its scene, that changes more or less than one
    object, that asks for what is there already, or whose words no model knows; and a scene whose
    objects share a cell or leave it."""
    cell = size / 2
    for k, (before, text, rng) in enumerate(random_edits(300, size=size)):
        kind = KINDS[k % len(KINDS)]
        after = carry_out(before, text, rng, size)
        assert edits.kind_of(text) == kind
        assert WORDS.encode(text)

        # 1. One object changes.
        gone = set(before) - set(after)
        new = set(after) - set(before)
        assert len(gone) == (kind != "add"), text
        assert len(new) == (kind != "remove"), text

        # 2. Each object has a cell to itself, and stays inside it.
        assert len(after) >= 1, text
        assert len({cell_of(thing, size) for thing in after}) == len(after), text
        for thing in after:
            margin = thing.r + 0.9
            for place in (thing.x, thing.y):
                inside = margin <= place % cell <= cell - margin
                assert inside, f"{text}: {thing} leaves its cell"

        # 3. The judge agrees.
        exact, kept, untouched = judge(before, text, after, size)
        assert exact
        assert kept == untouched == len(set(before) & set(after))


def test_the_judge_reads_pictures():
    """Catches a judge that is stricter than the parser: what the renderer draws and the parser
    reads must still be right."""
    for before, text, rng in random_edits(80, seed=1):
        picture = scenes.render(carry_out(before, text, rng))
        exact, kept, untouched = judge(before, text, scenes.parse(picture))
        assert exact, text
        assert kept == untouched, text


def single_mistakes(before, text, after):
    """[(what is wrong, a scene)]: the ways to get an edit wrong by one mistake."""
    extra = Thing("white", "cross", 16, 16, 5)
    wrong = [("nothing done", before), ("one too many", [*after, extra])]
    taken = {cell_of(thing) for thing in after}

    for k, thing in enumerate(after):
        rest = after[:k] + after[k + 1:]
        wrong.append(("one missing", rest))

        def instead(name, rest=rest, thing=thing, **change):
            wrong.append((name, [*rest, thing._replace(**change)]))

        instead("colour", colour=next(c for c in COLOURS if c != thing.colour))
        instead("shape", shape=next(s for s in SHAPES if s != thing.shape))
        for x in (0, 1):
            for y in (0, 1):
                if (x, y) not in taken:
                    instead(f"cell {x}{y}", x=16 * x + 8, y=16 * y + 8)
        # What was told to move may stand anywhere in its cell. The others may not stray.
        if thing in before or text.startswith(("make", "turn")):
            for d in (-3, 3):
                instead(f"strayed {d}", x=thing.x + d, y=thing.y - 1)
                instead(f"strayed up {d}", y=thing.y + d)
    return wrong


def test_the_judge_rejects_every_single_mistake():
    """Catches a judge that lets pass: nothing done, a wrong colour or shape, an object too many or
    missing, an untouched object that strayed or was lost, and what was added or moved in another
    cell than it was told."""
    tried = Counter()
    rng = np.random.default_rng(2)
    for before, text, _ in random_edits(400, seed=2):
        after = carry_out(before, text, rng)
        for name, seen in single_mistakes(before, text, after):
            exact, _, _ = judge(before, text, seen)
            assert not exact, f"{text!r}, {name}: {seen}"
            tried[name] += 1
    assert len(tried) == 13, tried                      # 5, four cells, four ways to stray
    assert min(tried.values()) > 50, tried


def test_kept_counts_the_untouched_objects_that_stand_in_place():
    """Catches `kept` that counts the changed object, that counts strayed ones, or that is 0 where
    the edit itself failed. The judge says (exact, kept, untouched)."""
    before = [RED, BLUE, GREEN]

    # Nothing is done: all the others are in place.
    assert judge(before, "make the circle blue", before) == (False, 2, 2)

    # One strayed too far, one just not.
    after = [
        RED._replace(colour="blue"),
        BLUE._replace(x=24 + NEAR + 1),
        GREEN._replace(y=24 - NEAR),
    ]
    assert judge(before, "make the circle blue", after) == (False, 1, 2)

    assert judge(before, "remove the circle", [BLUE, GREEN]) == (True, 2, 2)
    assert judge(before, "remove the circle", []) == (False, 0, 2)

    _, kept, untouched = judge(before, "add a white cross right of the green square", before)
    assert kept == 3
    assert untouched == 3

    after = [RED._replace(colour="blue")]
    assert judge([RED], "make the circle blue", after) == (True, 0, 0)


def test_names_are_unambiguous():
    """Catches a name that fits two objects, a longer one than needed, and twins that get a name at
    all."""
    rng = np.random.default_rng(3)
    world = scenes.World()
    lengths = Counter()                                 # {words in a name: how many}
    for _ in range(600):
        _, claim = world.caption(rng)
        things = scenes.draw_scene(claim, rng)
        for k, thing in enumerate(things):
            same_shape = [other for other in things if other.shape == thing.shape]
            twins = [other for other in same_shape if other.colour == thing.colour]
            name = name_of(things, k)
            if name is None:
                lengths[0] += 1
                assert len(twins) > 1
            else:
                lengths[len(name.split())] += 1
                assert len(twins) == 1
                assert find(things, name) == k
                assert (name == thing.shape) == (len(same_shape) == 1)
    for n in (0, 1, 2):
        assert lengths[n] > 20


def test_held_out_pairs_are_never_asked_for():
    """PAPER: composition, measured. Catches fine-tuning that shows, or names, what evaluation calls
    unseen."""
    found = edits.scene_edits(1500, seed=4, size=20, progress=False)
    shown = set()
    for things in found.scenes:
        shown |= {(thing.colour, thing.shape) for thing in things}
    assert not shown & HELD_OUT

    # There are chances to name one: a triangle that becomes pink, for instance.
    kinds = Counter(edits.kind_of(text) for text in found.captions)
    assert min(kinds[kind] for kind in KINDS) > 100
    for colour, shape in HELD_OUT:
        for text in found.captions:
            assert f"{colour} {shape}" not in text


BAD = [                                                 # a sentence, what its error says
    # Names that fit no object, or two.
    ("remove the triangle", "0 objects"),
    ("make the square red", "2 objects"),
    ("make the green circle red", "0 objects"),
    # Places beyond the edge, or taken.
    ("add a red cross left of the circle", "no room left of the circle"),
    ("move the green square right of the circle", "taken"),
    ("add a red cross above the circle", "no room"),
    ("add a red cross right of the circle", "taken"),
    ("move the blue square below the circle", "taken"),
    ("add a red cross below the square", "2 objects"),
    # Nonsense, and half a sentence.
    ("make the circle purple", "not an instruction"),
    ("turn the circle into a star", "not an instruction"),
    ("turn the circle into square", "not an instruction"),
    ("add a cross below the blue square", "not an instruction"),
    ("add red cross below the blue square", "not an instruction"),
    ("move the circle", "not an instruction"),
    ("add a red cross", "not an instruction"),
    ("circle", "not an instruction"),
    ("a red circle", "not an instruction"),
    ("remove the", None),
    ("make the blue", None),
    ("", None),
    ("remove circle", "not an instruction"),
    ("remove the red blue circle", "0 objects"),
    ("remove the circle above the blue square", "0 objects"),
    ("make the circle", "not an instruction"),
    ("what changed ?", "not an instruction"),
]


@pytest.mark.parametrize("text, words", BAD, ids=[text or "nothing" for text, _ in BAD])
def test_what_is_no_instruction_here_raises(text, words):
    """Catches nonsense that is carried out: a place beyond the edge or taken, a name that fits none
    or two, half a sentence. `mixtures.editing` counts what raises as a wrong answer to "what
    changed ?"."""
    with pytest.raises(ValueError, match=words):
        apply([RED, BLUE, GREEN], text)


def test_apply_by_hand():
    """Catches left for right, above for below, and columns for rows (y grows downwards)."""
    # 1. From the upper left cell: right, and below. What is added may stand anywhere in its cell
    #    (8 pixels off), what is there already may not.
    for where, (x, y) in {
        "right of the circle": (24, 8),
        "below the circle": (8, 24),
    }.items():
        goal = apply([RED], f"add a white cross {where}")
        (_, near), (thing, anywhere) = goal
        assert (thing.colour, thing.shape) == ("white", "cross")
        assert (thing.x, thing.y) == (x, y)
        assert near == NEAR
        assert anywhere == 8

        goal = apply([RED, GREEN._replace(x=24)], f"move the square {where}")
        moved, _ = goal[1]
        assert moved == GREEN._replace(x=x, y=y)

    # 2. From the lower right cell: left, and above.
    low = Thing("red", "circle", 24, 24, 5)
    for where, (x, y) in {
        "left of the circle": (8, 24),
        "above the circle": (24, 8),
    }.items():
        thing, _ = apply([low], f"add a white cross {where}")[1]
        assert (thing.x, thing.y) == (x, y)

    # 3. What changes no place.
    goal = apply([RED, BLUE], "turn the circle into a cross")
    assert goal == [(RED._replace(shape="cross"), NEAR), (BLUE, NEAR)]
    goal = apply([RED, BLUE, GREEN], "make the blue square red")
    assert goal[1] == (BLUE._replace(colour="red"), NEAR)
    goal = apply([RED, BLUE], "remove the square")
    assert goal == [(RED, NEAR)]


def test_a_moved_object_keeps_its_size():
    """Catches a "move" that changes more than a place. (What is added is of any size that
    pretraining has.)"""
    rng = np.random.default_rng(4)
    moved = 0
    while moved < 40:
        _, claim = scenes.World(("color_attr",)).caption(rng)
        things = scenes.draw_scene(claim, rng)
        text = propose(things, "move", rng)
        if text:
            after = carry_out(things, text, rng)
            assert sorted(t.r for t in after) == sorted(t.r for t in things)
            moved += 1


def test_judge_end_on_chains():
    """Catches an end that is judged by its last edit only, an added object that is held to a place
    which no instruction named, and a first one that may drift along a chain."""
    found = edits.scene_edits(240, seed=5, single=0, progress=False)
    rng = np.random.default_rng(5)
    lengths = Counter(len(texts) for _, texts in found.chains)
    assert lengths[3] > 60

    old_ones = 0
    new_ones = 0
    for pictures, texts in found.chains:
        first = found.scenes[pictures[0]]
        last = found.scenes[pictures[-1]]

        # 1. The end itself is right; with an object missing it is not.
        assert judge_end(first, last, last)
        assert not judge_end(first, last, last[1:])

        # 2. The same words, carried out once more, give other places in the same cells.
        if len(texts) == 3:
            again = first
            for text in texts:
                again = carry_out(again, text, rng)
            assert judge_end(first, last, again), texts

        for k, thing in enumerate(last):
            # 3. An object that has been there from the start may not stray. Another one may.
            d = 3 if thing.x % 16 < 8 else -3           # into its cell
            strayed = [*last[:k], thing._replace(x=thing.x + d), *last[k + 1:]]
            is_old = (thing.x, thing.y) in [(other.x, other.y) for other in first]
            assert judge_end(first, last, strayed) == (not is_old)
            old_ones += is_old
            new_ones += not is_old

            # 4. None may have another colour.
            colour = "red" if thing.colour == "white" else "white"
            recoloured = [*last[:k], thing._replace(colour=colour), *last[k + 1:]]
            assert not judge_end(first, last, recoloured)
    assert old_ones > 30
    assert new_ones > 30


# ------------------------------------------------------------------------------------- scene_edits
def test_scene_edits_are_chains_of_what_they_say():
    """Catches pictures of another scene, an instruction beside another picture, a test split that
    repeats the training split, a wrong number of triples, and chains where single edits are
    meant."""
    found = edits.load_edits(n=150, seed=6, progress=False)
    again = edits.load_edits(n=150, seed=6, progress=False)
    test = edits.load_edits(n=150, seed=6, split="test", progress=False)

    # 1. A function of the seed; the splits share no picture.
    assert found.chains == again.chains
    assert (found.pixels == again.pixels).all()
    in_training = {picture.tobytes() for picture in found.pixels}
    in_test = {picture.tobytes() for picture in test.pixels}
    assert not in_training & in_test

    # 2. As many triples as asked for; each picture stands in one chain.
    assert len(found.triples()) == 150
    assert len(found.captions) == 150
    assert len(found.pixels) == len(found.scenes)
    numbers = []
    for pictures, _ in found.chains:
        numbers += pictures
    assert sorted(numbers) == list(range(len(found.pixels)))

    # 3. Each instruction is what happens between its two scenes, and these are the pictures.
    for a, text, b in found.triples():
        exact, kept, untouched = judge(found.scenes[a], text, found.scenes[b])
        assert exact
        assert kept == untouched
    for k in range(0, 150, 10):
        assert (scenes.render(found.scenes[k]) == found.pixels[k]).all()

    # 4. Half are alone by design, and a third of the rest, too.
    lengths = Counter(len(texts) for _, texts in found.chains)
    assert set(lengths) == {1, 2, 3}
    assert lengths[1] > lengths[2] + lengths[3]


# --------------------------------------------------------------------------------------- documents
SOURCE = edits.scene_edits(400, seed=7, size=20, progress=False)


def is_picture(part):
    """Whether a part of a document is a picture."""
    return not isinstance(part, str) and part[0] == "image"


def drawn(n=12000, seed=0, **options):
    """(EditDocuments, n documents drawn from it)."""
    stream = EditDocuments(SOURCE, patches=4, **options)
    rng = np.random.default_rng(seed)
    return stream, [stream.draw(rng) for _ in range(n)]


def close(count, n, p):
    """Whether `count` of n is what a coin of probability p may give (five deviations)."""
    return abs(count - n * p) < 5 * np.sqrt(n * p * (1 - p))


def check_question(document, stream, after):
    """[before, after, "what changed ? ..."]: both pictures have the limit of those that are read.
    """
    (_, a, *limits), (_, b, *other_limits), text = document
    assert text.startswith("what changed ? ")
    assert after[a, text.removeprefix("what changed ? ")] == b
    assert limits == [stream.t_limit]
    assert other_limits == [stream.t_limit]


def check_edit(document, stream, after):
    """[before, instruction, after]: the first picture has its noise limit, or is pure noise, t from
    `noisiest` to `noisiest`; the one that is drawn has any noise."""
    (_, a, *limits), text, (_, b, *other_limits) = document
    if not isinstance(text, str):
        _, text = text                                  # ("dropped", words)
    assert after[a, text] == b
    assert limits in ([stream.t_limit], [stream.noisiest] * 2)
    assert other_limits == [stream.noisiest]


def test_documents_of_edits():
    """Catches an instruction between other pictures than its own, a first picture without its
    noise limit or a drawn one with it (PAPER §4.9), a blinded picture that is not pure noise, words
    that are dropped where the picture is asked for, and shares that are not those stated: guidance
    over a branch that was never trained is noise (PAPER §4.8)."""
    after = {(a, text): b for a, text, b in SOURCE.triples()}
    for options in (dict(), dict(drop=0.4, questions=0.5, t_limit=300)):
        # 1. Each document.
        stream, documents = drawn(**options)
        asked = 0
        told = 0
        blind = 0                                       # of those told: without the picture
        mute = 0                                        # without the words
        both = 0                                        # without either
        for document in documents:
            if isinstance(document[-1], str):
                asked += 1
                check_question(document, stream, after)
            else:
                told += 1
                check_edit(document, stream, after)
                is_blind = document[0][2] == stream.noisiest
                is_mute = not isinstance(document[1], str)
                blind += is_blind
                mute += is_mute
                both += is_blind and is_mute

        # 2. The shares. Words and picture are dropped independently.
        assert close(asked, len(documents), stream.questions)
        assert close(blind, told, stream.drop)
        assert close(mute, told, stream.drop)
        assert close(both, told, stream.drop ** 2)

    # 3. Without drops and questions.
    _, documents = drawn(3000, drop=0.0, questions=0.0)
    for document in documents:
        before, text, _ = document
        assert before[2:] == (100,)
        assert isinstance(text, str)


def test_what_is_learned_of_an_edit():
    """§4.5, both losses. Catches an instruction, or an answer to "what changed ?", that has no
    loss, and a loss on what was dropped (PAPER §4.8)."""

    def learned(document):
        """The tokens that have to be predicted, as words."""
        row = data.lay_out(document, WORDS, 4)
        words = []
        for following, has_loss in zip(row.tokens[1:], row.has_loss):
            if has_loss:
                words.append(WORDS.vocabulary[following])
        return " ".join(words)

    before = ("image", 0, 500)
    noise = ("image", 0, 1000, 1000)
    after = ("image", 1, 1000)
    text = "make the circle blue"
    assert learned([before, text, after]) == "<boi> make the circle blue <boi> <eos>"
    assert learned([noise, text, after]) == "<boi> make the circle blue <boi> <eos>"
    assert learned([before, ("dropped", text), after]) == "<boi> <eos>"

    question = [before, ("image", 1, 500), "what changed ? remove the circle"]
    assert learned(question) == "<boi> <boi> what changed ? remove the circle <eos>"


@pytest.mark.parametrize("n, single, questions", [
    (60, 0.5, 0.2),
    (60, 1.0, 0.5),
    (30, 0.0, 0.2),
    (60, 1.0, 0.0),
])
def test_longest_is_the_true_maximum(n, single, questions):
    """Catches a document that does not fit, found out in the middle of a run: a question is longer
    than a single edit."""
    source = edits.scene_edits(n, seed=8, single=single, size=20, progress=False)
    stream = EditDocuments(source, patches=4, questions=questions)
    rng = np.random.default_rng(0)
    longest = 0
    for _ in range(3000):
        row = data.lay_out(stream.draw(rng), WORDS, 4)
        longest = max(longest, len(row.tokens))
    assert longest == stream.longest()


def test_every_document_is_made_of_known_words():
    """Catches a vocabulary without the question's own words: training on edits alone would stop at
    its first question."""
    words = data.Words(SOURCE.vocabulary())
    stream = EditDocuments(SOURCE, patches=4, questions=0.5)
    rng = np.random.default_rng(9)
    for _ in range(300):
        assert data.lay_out(stream.draw(rng), words, 4).tokens
    # Pretraining has reserved all of them.
    assert SOURCE.vocabulary() <= set(WORDS.vocabulary)


def test_a_draw_is_a_function_of_its_generator():
    """Catches a stream with a memory: no run could be resumed."""
    stream = EditDocuments(SOURCE, patches=4)

    def draw(k):
        return stream.draw(np.random.default_rng([7, k]))

    once = [draw(k) for k in range(100)]
    backwards = [draw(k) for k in reversed(range(100))]
    assert backwards[::-1] == once


# ------------------------------------------------------------------------------ folders of triples
def line_of(before, instruction, after):
    """A line of edits.jsonl."""
    return json.dumps({"before": before, "instruction": instruction, "after": after})


def write_triples(folder, n=12, extra=(), shade=lambda k: 10 * k):
    """A folder of n triples. Picture k before is one grey, shade(k); after, it is 5 brighter.

    extra   more lines of edits.jsonl"""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(n):
        for name, grey in (("a", shade(k)), ("b", shade(k) + 5)):
            Image.new("RGB", (20, 24), (grey,) * 3).save(folder / f"{k}{name}.png")
        lines.append(line_of(f"{k}a.png", f"Make  it {k % 3}", f"{k}b.png"))
    lines += extra
    (folder / "edits.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return folder


def test_folder_of_triples(tmp_path):
    """Catches before and after exchanged, an instruction beside other pictures, a test split inside
    the training split, and words that only the test split says (its gap is measured during
    training)."""
    write_triples(tmp_path, 21)
    train = edits.load_edits(tmp_path, 8, "train")
    test = edits.load_edits(tmp_path, 8, "test")

    numbers = []
    for found in (train, test):
        # 1. Grey says which picture it is.
        for (a, text, b), line in zip(found.triples(), found.lines, strict=True):
            k = int(found.pixels[a].max()) // 10
            numbers.append(k)
            assert (found.pixels[a] == 10 * k).all()
            assert (found.pixels[b] == 10 * k + 5).all()
            assert text == f"Make it {k % 3}"
            assert line.endswith(f"edits.jsonl line {k + 1}")
        # 2. No other pictures, and all words of the folder.
        assert found.pixels.shape == (2 * len(found.captions), 8, 8, 3)
        assert found.pixels.dtype == np.uint8
        assert found.scenes is None
        assert found.vocabulary() == {"Make", "it", "0", "1", "2"}

    # 3. Each triple is in one split.
    assert sorted(numbers) == list(range(21))
    assert 1 <= len(test.captions) <= 6

    # 4. A folder has no language to be asked in, so there are no questions.
    stream = EditDocuments(train, patches=4, questions=0.9)
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert is_picture(stream.draw(rng)[-1])


def test_a_word_of_the_test_split_is_known(tmp_path):
    """Catches a run that ends hours later, at its first conditioning gap, because a triple of the
    test split has a word of its own."""
    # 1. Give a triple of the test split other words.
    write_triples(tmp_path, 12)
    where = edits.load_triples(tmp_path, 8, "test").lines[0]            # "... edits.jsonl line 10"
    number = int(where.split()[-1])
    lines = (tmp_path / "edits.jsonl").read_text().split("\n")
    triple = json.loads(lines[number - 1])
    triple["instruction"] = "blur everything"
    lines[number - 1] = json.dumps(triple)
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))

    # 2. The training split knows them, too.
    train = edits.load_triples(tmp_path, 8, "train")
    test = edits.load_triples(tmp_path, 8, "test")
    assert "blur everything" in test.captions
    assert "blur everything" not in train.captions
    assert {"blur", "everything"} <= train.vocabulary()
    assert train.vocabulary() == test.vocabulary()


def test_triples_that_share_pictures_are_in_one_split(tmp_path):
    """Catches a test picture that was trained on as another triple's before or after, or in a chain
    of them."""
    # 1. Names of pictures -> the group of each triple: the least name that it hangs together with.
    names = [
        ("1", "2"), ("3", "4"), ("2", "5"), ("6", "4"), ("5", "6"),     # one group, seen at the end
        ("7", "8"), ("7", "9"),
        ("x", "y"),
    ]
    assert pairs.name_groups(names) == ["1", "1", "1", "1", "1", "7", "7", "x"]
    assert pairs.name_groups(names[::-1]) == ["x", "7", "7", "1", "1", "1", "1", "1"]

    # 2. Ten chains of four pictures, each picture of another shade.
    lines = []
    for k in range(40):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k}.png")
        if k % 4 != 3:                                  # the last of a chain
            lines.append(line_of(f"{k}.png", "go on", f"{k + 1}.png"))
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))

    def chains(split):
        """Which chains the pictures of a split come from."""
        found = edits.load_triples(tmp_path, 8, split)
        return {int(picture.max()) // 4 for picture in found.pixels}

    train = chains("train")
    test = chains("test")
    assert train | test == set(range(10))
    assert not train & test
    assert test


def test_missing_and_broken_pictures_are_counted_named_and_skipped(tmp_path, capsys):
    """Catches one bad file that ends the run, vanishes without a word, or shifts the instructions
    beside it."""
    write_triples(tmp_path, 12, [
        line_of("absent.png", "bad", "0b.png"),
        line_of("0a.png", "bad", "gone.png"),
        line_of("0a.png", "bad", "text.png"),
        line_of("cut.png", "bad", "0b.png"),
    ])
    (tmp_path / "text.png").write_text("not a picture")
    whole = (tmp_path / "0a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])

    found = edits.load_triples(tmp_path, 8)
    printed = capsys.readouterr().out
    assert len(found.language) == 12
    assert "bad" not in found.language
    assert "skipped 4 of 16" in printed
    for name in ("absent.png", "gone.png", "text.png", "cut.png"):
        assert name in printed
    for a, _, b in found.triples():
        assert (found.pixels[b] - found.pixels[a] == 5).all()


def test_empty_instructions_are_counted_named_and_skipped(tmp_path, capsys):
    """Catches an edit without words that is learned as if it had some. The rule is that of
    captions."""
    write_triples(tmp_path, 12, [line_of("0a.png", " ", "0b.png")])
    found = edits.load_triples(tmp_path, 8)
    printed = capsys.readouterr().out
    assert len(found.language) == 12
    assert "" not in found.language
    assert "skipped 1 of 13 triples" in printed
    assert "edits.jsonl line 13: the caption is empty" in printed


@pytest.mark.parametrize("line", [
    "{not json",
    '{"before": "0a.png", "after": "0b.png"}',
    '{"before": "0a.png", "instruction": "x"}',
    "7",
    '["0a.png", "x", "0b.png"]',
    "null",
    '{"before": null, "instruction": "x", "after": "0b.png"}',
    '{"before": "0a.png", "instruction": null, "after": "0b.png"}',
    "[" * 100_000,
], ids=lambda line: line[:40])
def test_broken_lines_are_named(tmp_path, line):
    """Catches a mistake in line 13 that is reported without its number, or trained on."""
    write_triples(tmp_path, 12, [line])
    with pytest.raises(UserError, match="edits.jsonl line 13"):
        edits.load_triples(tmp_path, 8)


def test_folders_that_cannot_be_used(tmp_path):
    """Catches a missing file, or nine triples (no test split), that are found out in the middle of
    a run."""
    with pytest.raises(UserError, match="edits.jsonl is missing.*instruction"):
        edits.load_triples(tmp_path)
    write_triples(tmp_path, 9)
    with pytest.raises(UserError, match="at least ten"):
        edits.load_triples(tmp_path, 8, "test")
