"""
test_data.py: from documents to batches                     (data.py; Transfusion §3, §4.1, App. B.2)

First the stream of documents, counted over many draws; then one document laid out by hand; then packing.
Bugs: docs/PAPER.md §4, here "PAPER §4".
"""
import itertools
from collections import Counter

import numpy as np
import pytest

import data
from data import BOI, BOS, DROP, EOI, EOS, PAD, PATCH, lay_out, pack
from metrics.scenes import log_prob
from sources import scenes
from sources.pairs import Pairs
from support.common import UserError

P = 4                                                   # patches per picture, in the tests by hand


def scene_pairs(categories=scenes.WORLDS["one"], n=4000, seed=0):
    """Pairs whose pictures are empty: what a stream of documents needs, without drawing anything."""
    rng, world = np.random.default_rng(seed), scenes.World(categories)
    captions = [world.caption(rng)[0] for _ in range(n)]
    return Pairs("scenes", captions, np.zeros((n, 1, 1, 3), np.uint8), scenes.deductions(), scenes.vocabulary())


WORLD = scenes.World(scenes.WORLDS["one"])              # whose captions these are
PAIRS = scene_pairs()
WORDS = data.Words(PAIRS.vocabulary())


def drawn(n=20000, seed=0, **options):
    """(Documents, n documents drawn from it)."""
    stream, rng = data.Documents(PAIRS, patches=16, **options), np.random.default_rng(seed)
    return stream, [stream.draw(rng) for _ in range(n)]


def close(count, n, p):
    """Whether `count` of n is what a coin of probability p may give (five deviations)."""
    return abs(count - n * p) <= 5 * np.sqrt(n * p * (1 - p))


def is_picture(part):
    """Whether a part of a document is a picture."""
    return part[0] == "image" and not isinstance(part, str)


# ------------------------------------------------------------------------------------------------ the stream of documents
def test_caption_comes_first_in_four_fifths_of_the_pairs():
    """PAPER §4.9, 80/20 reversed: catches pictures before their captions in 80% instead of 20%."""
    _, documents = drawn()
    pairs = [d for d in documents if any(map(is_picture, d))]
    assert close(sum(not is_picture(d[0]) for d in pairs), len(pairs), 0.8)
    for d in pairs:                                     # words and pictures alternate, in one order within a document
        assert [is_picture(part) for part in d] == [is_picture(d[0]), not is_picture(d[0])] * (len(d) // 2)


def test_noise_limit_is_for_pictures_before_their_caption_only():
    """PAPER §4.9, the noise limit on every picture: catches t <= 500 for pictures that follow their caption, and the reverse."""
    stream, documents = drawn()
    limits = {first: {part[2] for d in documents if is_picture(d[0]) == first for part in d if is_picture(part)}
              for first in (True, False)}
    assert limits == {True: {500}, False: {stream.noisiest}} and stream.noisiest == 1000


def test_the_picture_belongs_to_the_caption():
    """Catches a caption beside the next picture: the model then cannot learn to obey, while its losses fall (PAPER §4.12)."""
    _, documents = drawn(5000)
    for d in documents:
        if any(map(is_picture, d)):
            for a, b in zip(d[::2], d[1::2], strict=True):
                caption, picture = (b, a) if is_picture(a) else (a, b)
                assert PAIRS.captions[picture[1]] == (caption if isinstance(caption, str) else caption[1])


def test_captions_are_dropped_for_guidance():
    """PAPER §4.8, no caption dropout though sampling guides: catches none dropped, too many, or captions after pictures too."""
    for share in (0.1, 0.5):
        _, documents = drawn(drop=share)
        first = [part for d in documents if len(d) > 1 and not is_picture(d[0]) for part in d[::2]]
        after = [part for d in documents if is_picture(d[0]) for part in d[1::2]]
        assert close(sum(not isinstance(part, str) for part in first), len(first), share)
        assert all(isinstance(part, str) for part in after)


@pytest.mark.parametrize("context, most", [(96, 4), (85, 3), (64, 2), (43, 1), (20, 1), (4096, 4)])
def test_documents_hold_as_many_pairs_as_fit(context, most):
    """Catches a stream without stories of several pictures, though sampling can make them; one more pair than the context
    holds, or one fewer; and odds that are not those that `log_prob` states. A pair is 3 words, BOI, 16 patches, EOI here."""
    for share in (0.2, 0.5):
        stream, documents = drawn(8000, context=context, another=share)
        odds, pairs = stream.pairs_odds(), [len(d) // 2 for d in documents if len(d) > 1]
        assert stream.most == most == len(odds) and sum(odds) == pytest.approx(1)
        assert set(pairs) == set(range(1, most + 1))
        assert odds == pytest.approx([share ** k * (1 - share * (k < most - 1)) for k in range(most)])
        for n in range(1, most + 1):                    # n pairs are worth share^(n - 1) (1 - share); the last, what is left
            assert close(pairs.count(n), len(pairs), share ** (n - 1) * (1 - share * (n < most)))


@pytest.mark.parametrize("context, patches", [(96, 16), (64, 16), (21, 16), (128, 4)])
def test_longest_is_the_true_maximum(context, patches):
    """Catches a run that is refused although every document fits, or that stops hours later at one that does not."""
    captions = ["a circle", "a red circle left of a blue square"]
    two = Pairs("scenes", captions, np.zeros((2, 1, 1, 3), np.uint8), scenes.deductions())
    stream, rng = data.Documents(two, patches, context, another=0.7), np.random.default_rng(0)
    lengths = [len(lay_out(stream.draw(rng), WORDS, patches).tokens) for _ in range(3000)]
    assert max(lengths) == stream.longest()
    assert stream.longest() <= context or stream.most == 1


@pytest.mark.parametrize("patches", [16, 64])
@pytest.mark.parametrize("world", scenes.WORLDS)
def test_as_many_words_as_patches(world, patches):
    """Transfusion §4.1, text : image tokens = 1 : 1. Catches a mixture whose share of text alone was miscounted."""
    stream, rng = data.Documents(scene_pairs(scenes.WORLDS[world]), patches), np.random.default_rng(1)
    alone, words, pictures = [], [], []
    for _ in range(12000):
        sequence = lay_out(stream.draw(rng), WORDS, patches)
        if sequence.images:
            words.append(sequence.image_id.count(-1))
            pictures.append(patches * len(sequence.images))
        else:
            alone.append(len(sequence.tokens))
    s = stream.text_share
    assert close(len(alone), 12000, s)                  # the share itself, then the lengths: less noise than one quotient
    assert (s * np.mean(alone) + (1 - s) * np.mean(words)) / ((1 - s) * np.mean(pictures)) == pytest.approx(1, abs=0.015)


def test_a_source_without_text_alone_gives_only_pairs():
    """Catches a stream that asks MNIST, or a folder, for deductions."""
    stream = data.Documents(Pairs("mnist", ["the digit two"], np.zeros((1, 1, 1, 1), np.uint8)), patches=16)
    rng = np.random.default_rng(0)
    assert all(len(stream.draw(rng)) > 1 for _ in range(100))


def test_probabilities_of_documents_sum_to_what_they_cover():
    """Catches a wrong floor of the text loss: ln p, summed over every document with words first, by brute force."""
    stream = data.Documents(PAIRS, patches=16, context=65)
    texts = [text for category in WORLD.categories for text, _ in scenes.captions(category)]
    image, total = ("image", 0, 1000), 0.0
    assert stream.most == 3
    for n in range(1, 4):
        for said in itertools.product(texts, repeat=n) if n < 3 else [(a, b, texts[0]) for a in texts for b in texts]:
            document = [part for text in said for part in (text, image)]
            total += np.exp(log_prob(stream, WORLD, document)) / (np.exp(WORLD.caption_log_prob(texts[0])) if n == 3 else 1)
    alone = [scenes.deduction_text(claim.objects, rel) for _, claim in scenes.captions("color_attr") for rel in scenes.RELATIONS]
    text_only = sum(np.exp(log_prob(stream, WORLD, [text])) for text in alone)
    assert text_only == pytest.approx(stream.text_share)
    assert total == pytest.approx((1 - stream.text_share) * 0.8)


def test_documents_are_drawn_with_their_probability():
    """Catches a stream that speaks with other frequencies than `log_prob` states."""
    stream, documents = drawn(40000, drop=0.0)
    seen = Counter(tuple(part for part in d if isinstance(part, str)) for d in documents if isinstance(d[0], str))
    for caption, n in Counter(PAIRS.captions).items():  # the pairs are a sample of the language: their own share is meant
        expected = (1 - stream.text_share) * 0.8 * 0.8 * n / len(PAIRS.captions)
        assert close(seen[(caption,)], len(documents), expected), caption
        rarely = np.exp(log_prob(stream, WORLD, [caption, ("image", 0, 1000)]))
        assert rarely == pytest.approx(expected, rel=0.5)


def test_a_draw_is_a_function_of_its_generator():
    """Catches a stream with a memory or with a global random number in it: no run could be resumed or repeated."""
    stream = data.Documents(PAIRS, patches=16)
    once = [stream.draw(np.random.default_rng([7, k])) for k in range(200)]
    np.random.seed(1)
    other = data.Documents(PAIRS, patches=16)
    assert [other.draw(np.random.default_rng([7, k])) for k in reversed(range(200))][::-1] == once
    assert once != [stream.draw(np.random.default_rng([8, k])) for k in range(200)]


# ----------------------------------------------------------------------------------------------- document -> one sequence
def spell(sequence):
    """(tokens as words, image_id as digits, learn as x) of a Sequence: three strings to compare by eye."""
    return (" ".join({"<patch>": "#"}.get(WORDS.vocabulary[t], WORDS.vocabulary[t]) for t in sequence.tokens),
            " ".join("." if i < 0 else str(i) for i in sequence.image_id),
            " ".join("x" if x else "." for x in sequence.has_loss))


def test_lay_out_by_hand():
    """PAPER §4.2, spans one position off: catches any change of the layout, caption first."""
    sequence = lay_out(["a red circle", ("image", 7, 1000)], WORDS, P)
    assert spell(sequence) == ("<bos> a red circle <boi> # # # # <eoi> <eos>",
                               ". . . . . 0 0 0 0 . .",
                               "x x x x . . . . . x .")
    assert (sequence.images, sequence.t_max) == ([7], [1000])


def test_lay_out_two_pictures_by_hand():
    """PAPER §4.2: the same with pictures first, twice: ids count up, limits keep their picture."""
    sequence = lay_out([("image", 3, 500), "a circle", ("image", 9, 400), "a red circle"], WORDS, P)
    assert spell(sequence) == ("<bos> <boi> # # # # <eoi> a circle <boi> # # # # <eoi> a red circle <eos>",
                               ". . 0 0 0 0 . . . . 1 1 1 1 . . . . .",
                               "x . . . . . x x x . . . . . x x x x .")
    assert (sequence.images, sequence.t_max, sequence.t_min) == ([3, 9], [500, 400], [1, 1])
    blinded = lay_out([("image", 3, 1000, 1000), "a circle", ("image", 9, 1000)], WORDS, P)
    assert (blinded.t_max, blinded.t_min) == ([1000, 1000], [1000, 1])                # pure noise, and only the first one


def test_lay_out_dropped_captions_by_hand():
    """PAPER §4.8, LM loss on dropped captions: catches a loss on <drop>, on the way into it, and on BOI after it."""
    sequence = lay_out([("dropped", "a red circle"), ("image", 7, 1000), ("dropped", "a circle"), ("image", 8, 1000)], WORDS, P)
    assert spell(sequence) == ("<bos> <drop> <drop> <drop> <boi> # # # # <eoi> <drop> <drop> <boi> # # # # <eoi> <eos>",
                               ". . . . . 0 0 0 0 . . . . 1 1 1 1 . .",
                               ". . . . . . . . . . . . . . . . . x .")


def test_a_dropped_caption_keeps_every_position():
    """PAPER §4.8, guidance branches of different length: catches a dropped caption that is shorter, or takes BOI with it."""
    for text in ("a circle", "a red circle left of a blue square"):
        kept, dropped = (lay_out([part, ("image", 0, 1000)], WORDS, P) for part in (text, ("dropped", text)))
        assert kept.image_id == dropped.image_id
        n = len(text.split())
        assert dropped.tokens == [BOS] + [DROP] * n + kept.tokens[1 + n:]


def test_text_alone_and_prompts_by_hand():
    """PAPER §4.2, sampled layout other than the trained one: a prompt is the same row, left open, with nothing after it."""
    assert spell(lay_out(["a circle"], WORDS, P)) == ("<bos> a circle <eos>", ". . . .", "x x x .")
    assert spell(lay_out(["a circle"], WORDS, P, ends=False)) == ("<bos> a circle", ". . .", "x x .")
    assert spell(lay_out([], WORDS, P, ends=False)) == ("<bos>", ".", ".")
    document = ["a circle", ("image", 0, 0), "a red circle"]
    whole, open_ = lay_out(document, WORDS, P), lay_out(document, WORDS, P, ends=False)
    assert whole.tokens == open_.tokens + [EOS] and whole.image_id == open_.image_id + [-1]


def test_what_is_learned_in_any_document():
    """Transfusion §3: BOI is predicted, EOI and patches never, nothing from BOI, nothing after a document's last token."""
    _, documents = drawn(2000, drop=0.3, another=0.3)
    targets = Counter()
    for document in documents:
        sequence = lay_out(document, WORDS, 16)
        assert len(sequence.tokens) == len(sequence.image_id) == len(sequence.has_loss)
        assert sequence.has_loss[-1] is False
        for token, following, has_loss in zip(sequence.tokens[:-1], sequence.tokens[1:], sequence.has_loss[:-1], strict=True):
            predictable = following in (BOI, EOS) or following >= len(data.SPECIAL)
            assert has_loss == (predictable and token != DROP), (document, token, following)
            targets.update([following] * has_loss)
    assert {BOI, EOS} <= set(targets) and not {EOI, PATCH, DROP, PAD, BOS} & set(targets)


# ------------------------------------------------------------------------------------------------------------------- pack
def packed(n=60, T=128, seed=3):
    """(sequences, Batch) of n random documents; every picture of the batch has its own index and limits."""
    rng, stream = np.random.default_rng(seed), data.Documents(PAIRS, patches=16, another=0.3)
    sequences = [lay_out(stream.draw(rng), WORDS, 16) for _ in range(n)]
    k = 0
    for sequence in sequences:
        for m in range(len(sequence.images)):
            sequence.images[m], sequence.t_max[m], sequence.t_min[m], k = 100 + k, 1001 + k, 1 + k, k + 1
    return sequences, pack(sequences, T)


def unpack(batch):
    """The documents of a Batch, as (tokens, image ids of the batch, learn, images, t_max, t_min)."""
    found = []
    for b in range(len(batch.tokens)):
        for d in range(int(batch.doc_id[b].max()) + 1):
            here = batch.doc_id[b] == d
            tokens = batch.tokens[b][here].tolist()
            if tokens and tokens[0] != PAD:
                at = np.flatnonzero(here.numpy())
                assert (np.diff(at) == 1).all()         # a document is one stretch
                ids = batch.image_id[b][here].tolist()
                own = sorted({i for i in ids if i >= 0})
                found.append((tokens, ids, batch.has_loss[b][here].tolist(), *(x[own].tolist() for x in (batch.images, batch.t_max, batch.t_min))))
    return found


def test_pack_loses_nothing_and_cuts_nothing():
    """Catches a document that is cut at the end of a row, lost, doubled, or given another document's picture or limit."""
    sequences, batch = packed()

    def key(*parts):
        return tuple(map(tuple, parts))

    assert Counter(key(s.tokens, s.has_loss, s.images, s.t_max, s.t_min) for s in sequences) == \
           Counter(key(tokens, *rest) for tokens, _, *rest in unpack(batch))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 17, 300])
def test_first_fit_is_first_fit(n):
    """Catches a row with room that is left out, or a later one that is taken: asked here row by row, as the words say."""
    rng = np.random.default_rng(n)
    for longest, T in ((1, 1), (1, 4), (9, 9), (40, 50), (200, 210), (200, 2000)):
        lengths = rng.integers(1, longest + 1, n).tolist()
        rows = []
        for number in sorted(range(n), key=lambda k: -lengths[k]):                  # longest first, equals in their order
            for row in [*rows, []]:
                if sum(lengths[k] for k in row) + lengths[number] <= T:
                    break
            if not row:
                rows.append(row)
            row.append(number)
        assert data.first_fit(lengths, T) == rows


def test_pack_numbers_pictures_in_reading_order():
    """PAPER §4.1 and the model's scatter: catches picture ids that restart in a row, repeat, or disagree with `images`."""
    _, batch = packed()
    ids = batch.image_id[batch.image_id >= 0].tolist()
    assert ids == [m for m in range(len(batch.images)) for _ in range(16)]
    assert ((batch.tokens == PATCH) == (batch.image_id >= 0)).all()


def test_pack_fills_rows_and_marks_padding():
    """Catches padding that belongs to a document (it would be attended to), learns something, or fills half the batch."""
    sequences, batch = packed()
    pad = batch.tokens == PAD
    assert not batch.has_loss[pad].any() and (batch.image_id[pad] == -1).all()
    for b in range(len(batch.tokens)):
        ids = batch.doc_id[b]
        assert (ids.diff() >= 0).all() and (ids.diff() <= 1).all() and ids[0] == 0
        assert not set(ids[pad[b]].tolist()) & set(ids[~pad[b]].tolist())
    rows = -(-sum(len(s.tokens) for s in sequences) // 128)
    assert len(batch.tokens) <= rows + 1


def test_a_document_may_fill_its_row_exactly():
    """Catches the last token of a full row learning the first of the same row (roll), and a row without padding."""
    sequence = lay_out(["a red circle", ("image", 0, 1000)], WORDS, P)
    batch = pack([sequence, sequence], len(sequence.tokens))
    assert batch.tokens.shape == (2, len(sequence.tokens)) and not batch.has_loss[:, -1].any()
    assert batch.images.tolist() == [0, 0] and batch.image_id.max() == 1


def test_a_document_longer_than_the_context_is_an_error():
    """Catches a document that is silently cut: its picture would lose patches. The sentence says what to do."""
    sequence = lay_out(["a red circle", ("image", 0, 1000)], WORDS, 16)
    with pytest.raises(UserError, match="23 tokens.*context of 22.*--seq-len"):
        pack([sequence], len(sequence.tokens) - 1)


# ------------------------------------------------------------------------------------------------------------------ words
def test_words_roundtrip():
    """Catches ids that depend on the order of a set, and special tokens that the text can collide with."""
    words = data.Words({"red", "circle", "a", "<pad>"})
    assert words.vocabulary == [*data.SPECIAL, "a", "circle", "red"] and len(words) == len(data.SPECIAL) + 3
    assert words.decode(words.encode("a  red circle")) == words.decode(words.encode("A Red CIRCLE")) == "a red circle"
    assert data.Words({"Red", "red"}).vocabulary == [*data.SPECIAL, "red"]
    assert words.decode([BOS, *words.encode("a circle"), BOI, PATCH, EOI, EOS]) == "a circle"
    for text in scenes.all_claims():
        assert WORDS.decode(WORDS.encode(text)) == text
    again = data.Words(WORDS.vocabulary)                     # as a checkpoint gives it back
    assert again.vocabulary == WORDS.vocabulary


def test_unknown_word():
    """Catches an unknown word that becomes another one, or an error that does not help to find it."""
    with pytest.raises(UserError, match="'circel'.*nearest known word is 'circle'"):
        WORDS.encode("a red circel")
    with pytest.raises(UserError, match="'x'"):
        data.Words([]).encode("x")
    with pytest.raises(UserError, match="'purple'.*it knows .*circle, .*yellow"):      # "square" is nearest, and no help
        WORDS.encode("a purple circle")


@pytest.mark.parametrize("word", data.SPECIAL)
def test_special_tokens_cannot_be_written_in_a_text(word):
    """Catches a prompt or a caption file that smuggles in a marker: BOI without patches, or a padding that is read."""
    with pytest.raises(UserError, match=word):
        WORDS.encode(f"a {word} circle")


def test_every_world_has_the_same_words():
    """Catches checkpoints of two worlds, or of a small and a large sample, whose word ids differ."""
    six = scene_pairs(scenes.WORLDS["six"], n=3).vocabulary()
    assert six == PAIRS.vocabulary()
    assert {w for category in scenes.WORLDS["six"] for text, _ in scenes.captions(category, True) for w in text.split()} <= six
