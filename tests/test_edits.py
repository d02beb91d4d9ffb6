"""
test_edits.py: a picture, an instruction, a picture                       (sources/edits.py; Transfusion §4.5; PAPER §4.8, §4.9)

First the grammar of instructions and its judge, on random scenes; then the documents that are learned from, counted over
many draws; then folders of the user's own triples.
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

RED, BLUE = Thing("red", "circle", 8, 8, 5), Thing("blue", "square", 24, 8, 5)        # the circle stands left of the square
GREEN = Thing("green", "square", 8, 24, 5)
WORDS = data.Words(scenes.load_scenes(1, 0, progress=False).vocabulary())


def random_edits(n=600, seed=0, size=32):
    """n random (before, instruction, rng): scenes of all categories, every kind in turn."""
    rng, world, found = np.random.default_rng(seed), scenes.World(), []
    while len(found) < n:
        before = scenes.draw_scene(world.caption(rng)[1], rng, size)
        if text := propose(before, KINDS[len(found) % len(KINDS)], rng, size):
            found.append((before, text, rng))
    return found


# ------------------------------------------------------------------------------------------------- grammar <-> judge
@pytest.mark.parametrize("size", [32, 64])
def test_what_is_proposed_can_be_done(size):
    """Catches an instruction that does not fit its scene, that changes more or less than one object, that asks for what is
    there already, or whose words no model knows; and a scene whose objects share a cell or leave it."""
    for k, (before, text, rng) in enumerate(random_edits(300, size=size)):
        kind = KINDS[k % len(KINDS)]
        after = carry_out(before, text, rng, size)
        assert edits.kind_of(text) == kind and WORDS.encode(text)
        assert len(set(before) - set(after)) == (kind != "add") and len(set(after) - set(before)) == (kind != "remove"), text
        assert len({cell_of(t, size) for t in after}) == len(after) >= 1, text
        for t in after:
            cell = size / 2
            assert all(t.r + 0.9 <= place % cell <= cell - t.r - 0.9 for place in (t.x, t.y)), f"{text}: {t} leaves its cell"
        exact, kept, untouched = judge(before, text, after, size)
        assert exact and kept == untouched == len(set(before) & set(after))


def test_the_judge_reads_pictures():
    """Catches a judge stricter than the parser: what the renderer draws and the parser reads must still be right."""
    for before, text, rng in random_edits(80, seed=1):
        exact, kept, untouched = judge(before, text, scenes.parse(scenes.render(carry_out(before, text, rng))))
        assert exact and kept == untouched, text


def test_the_judge_rejects_every_single_mistake():
    """Catches a judge that lets pass: nothing done, a wrong colour or shape, an object too many or missing, an untouched
    object that strayed or was lost, and what was added or moved in another cell than it was told."""
    tried, rng = Counter(), np.random.default_rng(2)
    for before, text, _ in random_edits(400, seed=2):
        after = carry_out(before, text, rng)
        wrong = {"nothing done": before, "one too many": after + [Thing("white", "cross", 16, 16, 5)]}
        for k, t in enumerate(after):
            rest = after[:k] + after[k + 1:]
            wrong[f"{k} missing"] = rest
            wrong[f"{k} in another colour"] = rest + [t._replace(colour=next(c for c in COLOURS if c != t.colour))]
            wrong[f"{k} in another shape"] = rest + [t._replace(shape=next(s for s in SHAPES if s != t.shape))]
            column, row = cell_of(t)
            other = [(x, y) for x in (0, 1) for y in (0, 1) if (x, y) not in {cell_of(o) for o in rest} | {(column, row)}]
            wrong |= {f"{k} in another cell {x}{y}": rest + [t._replace(x=16 * x + 8, y=16 * y + 8)] for x, y in other}
            if t in before or text.startswith(("make", "turn")):        # what was told to move may stand anywhere in its cell
                wrong |= {f"{k} {d} strayed": rest + [t._replace(x=t.x + d, y=t.y - 1)] for d in (-3, 3)}
                wrong |= {f"{k} {d} strayed up": rest + [t._replace(y=t.y + d)] for d in (-3, 3)}
        for name, seen in wrong.items():
            assert not judge(before, text, seen)[0], f"{text!r}, {name}: {seen}"
            tried[name.split(" ", 1)[-1]] += 1
    assert min(tried.values()) > 50, tried


def test_kept_counts_the_untouched_objects_that_stand_in_place():
    """Catches `kept` that counts the changed object, that counts strayed ones, or that is 0 where the edit itself failed."""
    before = [RED, BLUE, GREEN]
    assert judge(before, "make the circle blue", before) == (False, 2, 2)             # nothing done: all the others in place
    moved = [RED._replace(colour="blue"), BLUE._replace(x=24 + NEAR + 1), GREEN._replace(y=24 - NEAR)]
    assert judge(before, "make the circle blue", moved) == (False, 1, 2)
    assert judge(before, "remove the circle", [BLUE, GREEN]) == (True, 2, 2)
    assert judge(before, "remove the circle", []) == (False, 0, 2)
    assert judge(before, "add a white cross right of the green square", before)[1:] == (3, 3)
    assert judge([RED], "make the circle blue", [RED._replace(colour="blue")]) == (True, 0, 0)


def test_names_are_unambiguous():
    """Catches a name that fits two objects, a longer one than needed, and twins that get a name at all."""
    rng, world, named = np.random.default_rng(3), scenes.World(), Counter()
    for _ in range(600):
        things = scenes.draw_scene(world.caption(rng)[1], rng)
        for k, t in enumerate(things):
            name, fits = name_of(things, k), [(t.colour, t.shape) == (o.colour, o.shape) for o in things]
            named[len(name.split()) if name else 0] += 1
            if name is None:
                assert sum(fits) > 1
            else:
                assert find(things, name) == k and sum(fits) == 1
                assert (name == t.shape) == (sum(o.shape == t.shape for o in things) == 1)
    assert min(named[n] for n in (0, 1, 2)) > 20


def test_held_out_pairs_are_never_asked_for():
    """PAPER: composition, measured. Catches fine-tuning that shows, or names, what evaluation calls unseen."""
    found = edits.scene_edits(1500, seed=4, size=20, progress=False)
    assert not {(t.colour, t.shape) for things in found.scenes for t in things} & HELD_OUT
    asked = Counter(edits.kind_of(text) for text in found.captions)
    assert min(asked[kind] for kind in KINDS) > 100
    for colour, shape in HELD_OUT:                      # and the chance is there: a triangle that becomes pink, for instance
        assert not any(f"{colour} {shape}" in text for text in found.captions)


BAD = [("remove the triangle", "0 objects"), ("make the square red", "2 objects"), ("make the green circle red", "0 objects"),
       ("add a red cross left of the circle", "no room left of the circle"), ("move the green square right of the circle", "taken"),
       ("add a red cross above the circle", "no room"), ("add a red cross right of the circle", "taken"),
       ("move the blue square below the circle", "taken"), ("add a red cross below the square", "2 objects"),
       ("make the circle purple", "not an instruction"), ("turn the circle into a star", "not an instruction"),
       ("turn the circle into square", "not an instruction"), ("add a cross below the blue square", "not an instruction"),
       ("add red cross below the blue square", "not an instruction"), ("move the circle", "not an instruction"),
       ("add a red cross", "not an instruction"), ("circle", "not an instruction"), ("a red circle", "not an instruction"),
       ("remove the", None), ("make the blue", None), ("", None), ("remove circle", "not an instruction"),
       ("remove the red blue circle", "0 objects"), ("remove the circle above the blue square", "0 objects"),
       ("make the circle", "not an instruction"), ("what changed ?", "not an instruction")]


@pytest.mark.parametrize("text, words", BAD, ids=[text or "nothing" for text, _ in BAD])
def test_what_is_no_instruction_here_raises(text, words):
    """Catches nonsense that is carried out: a place beyond the edge or taken, a name that fits none or two, half a sentence.
    `mixtures.editing` counts what raises as a wrong answer to "what changed ?"."""
    with pytest.raises(ValueError, match=words):
        apply([RED, BLUE, GREEN], text)


def test_apply_by_hand():
    """Catches left for right, above for below, and columns for rows (y grows downwards)."""
    places = {"right of the circle": (24, 8), "below the circle": (8, 24)}
    for where, (x, y) in places.items():
        (_, near), (thing, anywhere) = apply([RED], f"add a white cross {where}")
        assert (thing.colour, thing.shape, thing.x, thing.y) == ("white", "cross", x, y) and (near, anywhere) == (NEAR, 8)
        assert apply([RED, GREEN._replace(x=24)], f"move the square {where}")[1][0] == GREEN._replace(x=x, y=y)
    low = Thing("red", "circle", 24, 24, 5)
    for where, (x, y) in {"left of the circle": (8, 24), "above the circle": (24, 8)}.items():
        thing = apply([low], f"add a white cross {where}")[1][0]
        assert (thing.x, thing.y) == (x, y)
    assert apply([RED, BLUE], "turn the circle into a cross") == [(RED._replace(shape="cross"), NEAR), (BLUE, NEAR)]
    assert apply([RED, BLUE, GREEN], "make the blue square red")[1] == (BLUE._replace(colour="red"), NEAR)
    assert apply([RED, BLUE], "remove the square") == [(RED, NEAR)]


def test_a_moved_object_keeps_its_size():
    """"move" changes a place, and nothing else; what is added is of any size that pretraining has."""
    rng, moved = np.random.default_rng(4), 0
    while moved < 40:
        things = scenes.draw_scene(scenes.World(("color_attr",)).caption(rng)[1], rng)
        if (text := propose(things, "move", rng)):
            assert sorted(t.r for t in carry_out(things, text, rng)) == sorted(t.r for t in things)
            moved += 1


def test_judge_end_on_chains():
    """Catches an end that is judged by its last edit only, an added object held to a place that no instruction named, and
    a first one that may drift along a chain."""
    found, rng, strayed, elsewhere = edits.scene_edits(240, seed=5, single=0, progress=False), np.random.default_rng(5), 0, 0
    assert Counter(len(said) for _, said in found.chains)[3] > 60
    for pictures, said in found.chains:
        first, last = found.scenes[pictures[0]], found.scenes[pictures[-1]]
        assert judge_end(first, last, last) and not judge_end(first, last, last[1:])
        if len(said) == 3:
            again = first
            for text in said:                           # the same words, carried out once more: other places in the same cells
                again = carry_out(again, text, rng)
            assert judge_end(first, last, again), said
        for k, t in enumerate(last):
            moved = last[:k] + [t._replace(x=t.x + (3 if t.x % 16 < 8 else -3))] + last[k + 1:]
            old = any((t.x, t.y) == (o.x, o.y) for o in first)
            assert judge_end(first, last, moved) == (not old)
            strayed, elsewhere = strayed + old, elsewhere + (not old)
            recoloured = last[:k] + [t._replace(colour="white" if t.colour != "white" else "red")] + last[k + 1:]
            assert not judge_end(first, last, recoloured)
    assert strayed > 30 and elsewhere > 30


# ------------------------------------------------------------------------------------------------------------- scene_edits
def test_scene_edits_are_chains_of_what_they_say():
    """Catches pictures of another scene, an instruction beside another picture, a test split that repeats the training
    split, a wrong number of triples, and chains where single edits are meant."""
    found, again = (edits.load_edits(n=150, seed=6, progress=False) for _ in range(2))
    test = edits.load_edits(n=150, seed=6, split="test", progress=False)
    assert found.chains == again.chains and (found.pixels == again.pixels).all()
    assert not {p.tobytes() for p in found.pixels} & {p.tobytes() for p in test.pixels}
    assert len(found.triples()) == len(found.captions) == 150 and len(found.pixels) == len(found.scenes)
    assert sorted(k for pictures, _ in found.chains for k in pictures) == list(range(len(found.pixels)))
    for a, text, b in found.triples():
        exact, kept, untouched = judge(found.scenes[a], text, found.scenes[b])
        assert exact and kept == untouched
    for k in range(0, 150, 10):
        assert (scenes.render(found.scenes[k]) == found.pixels[k]).all()
    lengths = Counter(len(said) for _, said in found.chains)
    assert set(lengths) == {1, 2, 3} and lengths[1] > lengths[2] + lengths[3]         # half alone, a third of the rest, too


# --------------------------------------------------------------------------------------------------------------- documents
SOURCE = edits.scene_edits(400, seed=7, size=20, progress=False)


def is_picture(part):
    """Whether a part of a document is a picture."""
    return not isinstance(part, str) and part[0] == "image"


def drawn(n=12000, seed=0, **options):
    """(EditDocuments, n documents drawn from it)."""
    stream, rng = EditDocuments(SOURCE, patches=4, **options), np.random.default_rng(seed)
    return stream, [stream.draw(rng) for _ in range(n)]


def close(count, n, p):
    """Whether `count` of n is what a coin of probability p may give (five deviations)."""
    return abs(count - n * p) < 5 * np.sqrt(n * p * (1 - p))


def test_documents_of_edits():
    """Catches an instruction between other pictures than its own, a first picture without its noise limit or a drawn one
    with it (PAPER §4.9), a blinded picture that is not pure noise, words dropped where the picture is asked for, and shares
    that are not those stated: guidance over a branch that was never trained is noise (PAPER §4.8)."""
    known = {(a, text): b for a, text, b in SOURCE.triples()}
    for options in (dict(), dict(drop=0.4, questions=0.5, t_limit=300)):
        stream, documents = drawn(**options)
        asked = [d for d in documents if isinstance(d[-1], str)]
        told = [d for d in documents if not isinstance(d[-1], str)]
        assert close(len(asked), len(documents), stream.questions)
        for d in asked:
            (_, a, *limits), (_, b, *other), text = d
            assert text.startswith("what changed ? ") and known[a, text.removeprefix("what changed ? ")] == b
            assert limits == other == [stream.t_limit]
        for d in told:
            (_, a, *limits), text, (_, b, *other) = d
            assert known[a, text if isinstance(text, str) else text[1]] == b
            assert other == [stream.noisiest] and limits in ([stream.t_limit], [stream.noisiest] * 2)     # drawn: any noise
        blind, mute = ([d[0][2] == stream.noisiest for d in told], [not isinstance(d[1], str) for d in told])
        assert close(sum(blind), len(told), stream.drop) and close(sum(mute), len(told), stream.drop)
        assert close(sum(a and b for a, b in zip(blind, mute)), len(told), stream.drop ** 2)      # one by one, and both
    _, without = drawn(3000, drop=0.0, questions=0.0)
    assert all(d[0][2:] == (100,) and all(isinstance(text, str) for text in d[1::2]) for d in without)


def test_what_is_learned_of_an_edit():
    """§4.5, both losses: the instruction is learned, the answer to "what changed ?" is, what was dropped is not (PAPER §4.8)."""
    def spell(document):
        s = data.lay_out(document, WORDS, 4)
        return " ".join(WORDS.vocabulary[following] for following, has_loss in zip(s.tokens[1:], s.has_loss) if has_loss)
    before, after = ("image", 0, 500), ("image", 1, 1000)
    assert spell([before, "make the circle blue", after]) == "<boi> make the circle blue <boi> <eos>"
    assert spell([("image", 0, 1000, 1000), "make the circle blue", after]) == "<boi> make the circle blue <boi> <eos>"
    assert spell([before, ("dropped", "make the circle blue"), after]) == "<boi> <eos>"
    assert spell([before, ("image", 1, 500), "what changed ? remove the circle"]) == "<boi> <boi> what changed ? remove the circle <eos>"


@pytest.mark.parametrize("n, single, questions", [(60, 0.5, 0.2), (60, 1.0, 0.5), (30, 0.0, 0.2), (60, 1.0, 0.0)])
def test_longest_is_the_true_maximum(n, single, questions):
    """Catches a document that does not fit, found out in the middle of a run: a question is longer than a single edit."""
    source, rng = edits.scene_edits(n, seed=8, single=single, size=20, progress=False), np.random.default_rng(0)
    stream = EditDocuments(source, patches=4, questions=questions)
    longest = max(len(data.lay_out(stream.draw(rng), WORDS, 4).tokens) for _ in range(3000))
    assert longest == stream.longest()


def test_every_document_is_made_of_known_words():
    """Catches a vocabulary without the question's own words: training on edits alone would stop at its first question."""
    words, rng = data.Words(SOURCE.vocabulary()), np.random.default_rng(9)
    stream = EditDocuments(SOURCE, patches=4, questions=0.5)
    assert all(data.lay_out(stream.draw(rng), words, 4).tokens for _ in range(300))
    assert SOURCE.vocabulary() <= set(WORDS.vocabulary)      # all that pretraining has reserved for them


def test_a_draw_is_a_function_of_its_generator():
    """Catches a stream with a memory: no run could be resumed."""
    stream = EditDocuments(SOURCE, patches=4)
    once = [stream.draw(np.random.default_rng([7, k])) for k in range(100)]
    assert [stream.draw(np.random.default_rng([7, k])) for k in reversed(range(100))][::-1] == once


# ------------------------------------------------------------------------------------------------------ folders of triples
def write_triples(folder, n=12, extra=(), shade=lambda k: 10 * k):
    """A folder of n triples: pictures of one grey each, before and after, and edits.jsonl; extra: more lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(n):
        for name, grey in (("a", shade(k)), ("b", shade(k) + 5)):
            Image.new("RGB", (20, 24), (grey,) * 3).save(folder / f"{k}{name}.png")
        lines.append(json.dumps({"before": f"{k}a.png", "instruction": f"Make  it {k % 3}", "after": f"{k}b.png"}))
    (folder / "edits.jsonl").write_text("\n".join([*lines, *extra]) + "\n\n", encoding="utf-8")
    return folder


def test_folder_of_triples(tmp_path):
    """Catches before and after exchanged, an instruction beside other pictures, a test split inside the training split, and
    words that only the test split says (its gap is measured during training)."""
    write_triples(tmp_path, 21)
    train, test = (edits.load_edits(tmp_path, 8, split) for split in ("train", "test"))
    numbers = []
    for found in (train, test):
        for (a, text, b), line in zip(found.triples(), found.lines, strict=True):
            k = int(found.pixels[a].max()) // 10
            assert (found.pixels[a] == 10 * k).all() and (found.pixels[b] == 10 * k + 5).all()
            assert text == f"Make it {k % 3}" and line.endswith(f"edits.jsonl line {k + 1}")
            numbers.append(k)
        assert found.pixels.shape == (2 * len(found.captions), 8, 8, 3) and found.pixels.dtype == np.uint8      # no other's
        assert found.scenes is None and found.vocabulary() == {"Make", "it", "0", "1", "2"}
    assert sorted(numbers) == list(range(21)) and 1 <= len(test.captions) <= 6
    stream, rng = EditDocuments(train, patches=4, questions=0.9), np.random.default_rng(0)
    assert all(is_picture(stream.draw(rng)[-1]) for _ in range(50))     # a folder has no language to be asked in


def test_a_word_of_the_test_split_is_known(tmp_path):
    """Catches a run that ends hours later, at its first conditioning gap, because triple ten has a word of its own."""
    write_triples(tmp_path, 12)
    own = edits.load_triples(tmp_path, 8, "test").lines[0].split()[-1]
    lines = (tmp_path / "edits.jsonl").read_text().split("\n")
    lines[int(own) - 1] = json.dumps({**json.loads(lines[int(own) - 1]), "instruction": "blur everything"})
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    train, test = (edits.load_triples(tmp_path, 8, split) for split in ("train", "test"))
    assert "blur everything" in test.captions and "blur everything" not in train.captions
    assert {"blur", "everything"} <= train.vocabulary() == test.vocabulary()


def test_triples_that_share_pictures_are_in_one_split(tmp_path):
    """Catches a test picture that was trained on as another triple's before, or after, or in a chain of them."""
    names = [("1", "2"), ("3", "4"), ("2", "5"), ("6", "4"), ("5", "6"), ("7", "8"), ("7", "9"), ("x", "y")]
    assert pairs.name_groups(names) == ["1", "1", "1", "1", "1", "7", "7", "x"]
    assert pairs.name_groups(names[::-1]) == ["x", "7", "7", "1", "1", "1", "1", "1"]
    for k in range(40):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k}.png")
    chains = [{"before": f"{k}.png", "instruction": "go on", "after": f"{k + 1}.png"} for k in range(39) if k % 4 != 3]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, chains)))
    train, test = (edits.load_triples(tmp_path, 8, split) for split in ("train", "test"))
    shades = [{int(picture.max()) // 4 for picture in found.pixels} for found in (train, test)]     # the chain of each picture
    assert shades[0] | shades[1] == set(range(10)) and not shades[0] & shades[1] and shades[1]


def test_missing_and_broken_pictures_are_counted_named_and_skipped(tmp_path, capsys):
    """Catches one bad file that ends the run, vanishes without a word, or shifts the instructions beside it."""
    bad = [("absent.png", "0b.png"), ("0a.png", "gone.png"), ("0a.png", "text.png"), ("cut.png", "0b.png")]
    write_triples(tmp_path, 12, [json.dumps({"before": a, "instruction": "bad", "after": b}) for a, b in bad])
    (tmp_path / "text.png").write_text("not a picture")
    whole = (tmp_path / "0a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    found, said = edits.load_triples(tmp_path, 8), capsys.readouterr().out
    assert len(found.language) == 12 and "bad" not in found.language and "skipped 4 of 16" in said
    assert all(name in said for name in ("absent.png", "gone.png", "text.png", "cut.png"))
    assert all((found.pixels[b] - found.pixels[a] == 5).all() for a, _, b in found.triples())


def test_empty_instructions_are_counted_named_and_skipped(tmp_path, capsys):
    """Catches an edit that is learned without words as if it had some: the rule is that of captions."""
    write_triples(tmp_path, 12, [json.dumps({"before": "0a.png", "instruction": " ", "after": "0b.png"})])
    found, said = edits.load_triples(tmp_path, 8), capsys.readouterr().out
    assert len(found.language) == 12 and "" not in found.language
    assert "skipped 1 of 13 triples" in said and "edits.jsonl line 13: the caption is empty" in said


@pytest.mark.parametrize("line", ["{not json", '{"before": "0a.png", "after": "0b.png"}', '{"before": "0a.png", "instruction": "x"}', "7",
                                  '["0a.png", "x", "0b.png"]', "null", '{"before": null, "instruction": "x", "after": "0b.png"}',
                                  '{"before": "0a.png", "instruction": null, "after": "0b.png"}', "[" * 100_000], ids=lambda line: line[:40])
def test_broken_lines_are_named(tmp_path, line):
    """Catches a mistake in line 13 that is reported without its number, or trained on."""
    write_triples(tmp_path, 12, [line])
    with pytest.raises(UserError, match="edits.jsonl line 13"):
        edits.load_triples(tmp_path, 8)


def test_folders_that_cannot_be_used(tmp_path):
    """Catches a missing file, or nine triples (no test split), found out in the middle of a run."""
    with pytest.raises(UserError, match="edits.jsonl is missing.*instruction"):
        edits.load_triples(tmp_path)
    write_triples(tmp_path, 9)
    with pytest.raises(UserError, match="at least ten"):
        edits.load_triples(tmp_path, 8, "test")
