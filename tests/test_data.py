"""
test_data.py: a document becomes one sequence        (data.py; Transfusion §3, §4.1, App. B.2)

THE IDEA    A wrong layout trains as well as a right one: the losses fall, and nothing is said. So
            small documents are laid out by hand, and what is random is counted.
COMPARED    the stream of documents    with the odds that it states, over thousands of draws
            one document, laid out     with three lines of text, written by hand
            a packed batch             with the documents that went into it, found in it again
RUN IT      pytest -n 0 tests/test_data.py
            Each docstring names the bug that the test catches. "PAPER §4.9": docs/PAPER.md.
"""
from collections import Counter

import numpy as np
import pytest

import data
from data import BOI, BOS, DROP, EOI, EOS, PAD, PATCH, lay_out, pack
from metrics.scenes import log_prob
from sources import scenes
from sources.pairs import Pairs
from support.common import UserError

P = 4                                                   # patches per picture, in rows by hand


def empty_pictures(n):
    """n pictures of one pixel, (n, 1, 1, 3) uint8: no document depends on what they show."""
    return np.zeros((n, 1, 1, 3), np.uint8)


def scene_pairs(categories=scenes.WORLDS["one"], n=4000, seed=0):
    """Pairs of n captions and empty pictures: a stream of documents needs no drawing."""
    rng = np.random.default_rng(seed)
    world = scenes.World(categories)
    captions = []
    for _ in range(n):
        caption = world.caption(rng)[0]
        captions.append(caption)
    return Pairs("scenes", captions, empty_pictures(n), scenes.deductions(), scenes.vocabulary())


WORLD = scenes.World(scenes.WORLDS["one"])              # whose captions PAIRS has
PAIRS = scene_pairs()
WORDS = data.Words(PAIRS.vocabulary())


def drawn(n=20000, seed=0, **options):
    """(a Documents, a list of n documents drawn from it). options: those of Documents."""
    stream = data.Documents(PAIRS, patches=16, **options)
    rng = np.random.default_rng(seed)
    documents = [stream.draw(rng) for _ in range(n)]
    return stream, documents


def close(count, n, p):
    """Whether `count` of n is what a coin of probability p may give (five deviations)."""
    deviation = np.sqrt(n * p * (1 - p))
    return abs(count - n * p) <= 5 * deviation


def is_picture(part):
    """Whether a part of a document is a picture. Others are captions: a text, or a dropped one."""
    return not isinstance(part, str) and part[0] == "image"


def has_picture(document):
    """Whether a document has pictures; the others are text alone."""
    return any(is_picture(part) for part in document)


# -------------------------------------------------------------------------- the stream of documents
def test_caption_comes_first_in_four_fifths_of_the_pairs():
    """Catches 80 to 20 reversed: pictures before their captions in 80% instead of 20% (PAPER
    §4.9)."""
    _, documents = drawn()
    with_pairs = [d for d in documents if has_picture(d)]
    caption_first = [d for d in with_pairs if not is_picture(d[0])]
    assert close(len(caption_first), len(with_pairs), 0.8)

    # Captions and pictures alternate, in one order within a document.
    for d in with_pairs:
        picture_first = is_picture(d[0])
        one_pair = [picture_first, not picture_first]
        assert [is_picture(part) for part in d] == one_pair * (len(d) // 2)


def test_noise_limit_is_for_pictures_before_their_caption_only():
    """Catches the noise limit on every picture (PAPER §4.9): t <= 500 for those that follow their
    caption; and the reverse."""
    stream, documents = drawn()
    limits = {True: set(), False: set()}                # is the picture first?
    for d in documents:
        for part in d:
            if is_picture(part):
                _, _, t_max = part
                limits[is_picture(d[0])].add(t_max)
    assert limits[True] == {500}
    assert limits[False] == {stream.noisiest}
    assert stream.noisiest == 1000


def test_the_picture_belongs_to_the_caption():
    """Catches a caption beside the next picture. The model could then not learn to obey, while its
    losses fall (PAPER §4.12)."""
    _, documents = drawn(5000)
    for d in documents:
        if not has_picture(d):
            continue
        pictures = [part for part in d if is_picture(part)]
        captions = [part for part in d if not is_picture(part)]
        for picture, caption in zip(pictures, captions, strict=True):
            if not isinstance(caption, str):            # ("dropped", caption)
                caption = caption[1]
            index = picture[1]
            assert PAIRS.captions[index] == caption


def test_captions_are_dropped_for_guidance():
    """Catches no caption dropout though sampling guides (PAPER §4.8), too much of it, and captions
    that are dropped after their picture, too."""
    for share in (0.1, 0.5):
        _, documents = drawn(drop=share)
        before_picture = []
        after_picture = []
        for d in documents:
            if is_picture(d[0]):
                after_picture += d[1::2]
            elif has_picture(d):
                before_picture += d[::2]
        dropped = [caption for caption in before_picture if not isinstance(caption, str)]
        assert close(len(dropped), len(before_picture), share)
        assert all(isinstance(caption, str) for caption in after_picture)


@pytest.mark.parametrize("context, most", [
    (96, 4),
    (85, 3),
    (64, 2),
    (43, 1),
    (20, 1),
    (4096, 4),
])
def test_documents_hold_as_many_pairs_as_fit(context, most):
    """Catches a stream without stories of several pictures, though sampling can make them; one more
    pair than the context holds, or one fewer; and odds that are not those that `log_prob` states.

    Here a pair is at most 3 words, BOI, 16 patches and EOI."""
    for share in (0.2, 0.5):
        stream, documents = drawn(8000, context=context, another=share)

        # After each pair another one may follow, until there are `most`.
        wanted = []
        for more in range(most):
            odds = share ** more
            if more < most - 1:
                odds = odds * (1 - share)
            wanted.append(odds)

        # What the stream states.
        stated = stream.pairs_odds()
        assert stream.most == most
        assert len(stated) == most
        assert sum(stated) == pytest.approx(1)
        assert stated == pytest.approx(wanted)

        # What it does.
        pairs = [len(d) // 2 for d in documents if len(d) > 1]
        assert set(pairs) == set(range(1, most + 1))
        for n, odds in enumerate(wanted, start=1):
            assert close(pairs.count(n), len(pairs), odds)


@pytest.mark.parametrize("context, patches", [(96, 16), (64, 16), (21, 16), (128, 4)])
def test_longest_is_the_true_maximum(context, patches):
    """Catches a run that is refused although every document fits, or that stops hours later at one
    that does not."""
    captions = ["a circle", "a red circle left of a blue square"]
    pairs = Pairs("scenes", captions, empty_pictures(2), scenes.deductions())
    stream = data.Documents(pairs, patches, context, another=0.7)
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(3000):
        sequence = lay_out(stream.draw(rng), WORDS, patches)
        lengths.append(len(sequence.tokens))
    assert max(lengths) == stream.longest()
    assert stream.longest() <= context or stream.most == 1


@pytest.mark.parametrize("patches", [16, 64])
@pytest.mark.parametrize("world", scenes.WORLDS)
def test_as_many_words_as_patches(world, patches):
    """Catches a share of text alone that was miscounted. Transfusion §4.1: text tokens : image
    patches = 1 : 1."""
    stream = data.Documents(scene_pairs(scenes.WORLDS[world]), patches)
    rng = np.random.default_rng(1)
    alone = []                                          # lengths of documents of text alone
    words = []                                          # and of the others: their text tokens
    pictures = []                                       # and their patches
    for _ in range(12000):
        sequence = lay_out(stream.draw(rng), WORDS, patches)
        if sequence.images:
            words.append(sequence.image_id.count(-1))
            pictures.append(patches * len(sequence.images))
        else:
            alone.append(len(sequence.tokens))

    # The share itself, then the lengths: together they have less noise than one quotient.
    s = stream.text_share
    assert close(len(alone), 12000, s)
    text_tokens = s * np.mean(alone) + (1 - s) * np.mean(words)
    image_patches = (1 - s) * np.mean(pictures)
    assert text_tokens / image_patches == pytest.approx(1, abs=0.015)


def test_a_source_without_text_alone_gives_only_pairs():
    """Catches a stream that asks MNIST, or a folder of pictures, for texts that they do not
    have."""
    pairs = Pairs("mnist", ["the digit two"], np.zeros((1, 1, 1, 1), np.uint8))
    stream = data.Documents(pairs, patches=16)
    rng = np.random.default_rng(0)
    for _ in range(100):
        document = stream.draw(rng)
        assert len(document) > 1


def test_probabilities_of_documents_sum_to_what_they_cover():
    """Catches a wrong floor of the text loss, ln p: by brute force, summed over every document with
    words first."""
    stream = data.Documents(PAIRS, patches=16, context=65)
    assert stream.most == 3

    def probability(*captions):
        """Of the document that has these captions, each before its picture."""
        document = []
        for caption in captions:
            document += [caption, ("image", 0, 1000)]
        return np.exp(log_prob(stream, WORLD, document))

    # 1. Documents of one, two and three pairs, the caption first.
    texts = []
    for category in WORLD.categories:
        for text, _ in scenes.captions(category):
            texts.append(text)
    total = 0.0
    # All triples would be too many. One third caption, divided by how likely it is among all
    # captions, stands for all of them.
    share_of_third = np.exp(WORLD.caption_log_prob(texts[0]))
    for a in texts:
        total += probability(a)
        for b in texts:
            total += probability(a, b)
            total += probability(a, b, texts[0]) / share_of_third
    assert total == pytest.approx((1 - stream.text_share) * 0.8)

    # 2. Documents of text alone.
    text_only = 0.0
    for _, claim in scenes.captions("color_attr"):
        for relation in scenes.RELATIONS:
            text = scenes.deduction_text(claim.objects, relation)
            text_only += np.exp(log_prob(stream, WORLD, [text]))
    assert text_only == pytest.approx(stream.text_share)


def test_documents_are_drawn_with_their_probability():
    """Catches a stream that speaks with other frequencies than `log_prob` states."""
    stream, documents = drawn(40000, drop=0.0)
    seen = Counter()                                    # of documents with words first: their texts
    for d in documents:
        if isinstance(d[0], str):
            seen[tuple(part for part in d if isinstance(part, str))] += 1

    for caption, n in Counter(PAIRS.captions).items():
        # The pairs are a sample of the language, so a caption's share is that in the sample.
        share = n / len(PAIRS.captions)
        # Not text alone; the caption first; and one pair only.
        expected = (1 - stream.text_share) * 0.8 * 0.8 * share
        assert close(seen[(caption,)], len(documents), expected), caption

        # In the whole language its probability is about that.
        document = [caption, ("image", 0, 1000)]
        probability = np.exp(log_prob(stream, WORLD, document))
        assert probability == pytest.approx(expected, rel=0.5)


def test_a_draw_is_a_function_of_its_generator():
    """Catches a stream with a memory, or with a global random number in it: no run could be resumed
    or repeated."""
    def draw(stream, seed, k):
        return stream.draw(np.random.default_rng([seed, k]))

    stream = data.Documents(PAIRS, patches=16)
    once = [draw(stream, 7, k) for k in range(200)]

    # Another stream, another global seed, and in reverse order.
    np.random.seed(1)
    other = data.Documents(PAIRS, patches=16)
    backwards = [draw(other, 7, k) for k in reversed(range(200))]
    assert backwards[::-1] == once

    assert once != [draw(stream, 8, k) for k in range(200)]


# ------------------------------------------------------------------------- document -> one sequence
def spell(sequence):
    """A Sequence as three strings, to compare by eye: tokens as words, with # for a patch; image_id
    as digits; has_loss as x."""
    words = []
    for token in sequence.tokens:
        word = WORDS.vocabulary[token]
        words.append("#" if word == "<patch>" else word)
    image_id = ["." if i < 0 else str(i) for i in sequence.image_id]
    has_loss = ["x" if x else "." for x in sequence.has_loss]
    return " ".join(words), " ".join(image_id), " ".join(has_loss)


def test_lay_out_by_hand():
    """Catches any change of the layout, such as spans one position off (PAPER §4.2). The caption
    comes first here."""
    sequence = lay_out(["a red circle", ("image", 7, 1000)], WORDS, P)
    assert spell(sequence) == (
        "<bos> a red circle <boi> # # # # <eoi> <eos>",
        ". . . . . 0 0 0 0 . .",
        "x x x x . . . . . x .",
    )
    assert sequence.images == [7]
    assert sequence.t_max == [1000]


def test_lay_out_two_pictures_by_hand():
    """Catches the same with pictures first, and two of them: ids that do not count up, limits that
    go to another picture (PAPER §4.2)."""
    document = [("image", 3, 500), "a circle", ("image", 9, 400), "a red circle"]
    sequence = lay_out(document, WORDS, P)
    assert spell(sequence) == (
        "<bos> <boi> # # # # <eoi> a circle <boi> # # # # <eoi> a red circle <eos>",
        ". . 0 0 0 0 . . . . 1 1 1 1 . . . . .",
        "x . . . . . x x x . . . . . x x x x .",
    )
    assert sequence.images == [3, 9]
    assert sequence.t_max == [500, 400]
    assert sequence.t_min == [1, 1]

    # Pure noise, and only the first one.
    blinded = lay_out([("image", 3, 1000, 1000), "a circle", ("image", 9, 1000)], WORDS, P)
    assert blinded.t_max == [1000, 1000]
    assert blinded.t_min == [1000, 1]


def test_lay_out_dropped_captions_by_hand():
    """Catches LM loss on dropped captions (PAPER §4.8): on <drop>, on the way into it, and on BOI
    after it."""
    document = [
        ("dropped", "a red circle"), ("image", 7, 1000),
        ("dropped", "a circle"), ("image", 8, 1000),
    ]
    sequence = lay_out(document, WORDS, P)
    assert spell(sequence) == (
        "<bos> <drop> <drop> <drop> <boi> # # # # <eoi> <drop> <drop> <boi> # # # # <eoi> <eos>",
        ". . . . . 0 0 0 0 . . . . 1 1 1 1 . .",
        ". . . . . . . . . . . . . . . . . x .",
    )


def test_a_dropped_caption_keeps_every_position():
    """Catches guidance whose two branches differ in length (PAPER §4.8): a dropped caption that is
    shorter, or that takes BOI with it."""
    for text in ("a circle", "a red circle left of a blue square"):
        kept = lay_out([text, ("image", 0, 1000)], WORDS, P)
        dropped = lay_out([("dropped", text), ("image", 0, 1000)], WORDS, P)
        n = len(text.split())
        assert dropped.tokens == [BOS] + [DROP] * n + kept.tokens[1 + n:]
        assert dropped.image_id == kept.image_id


def test_text_alone_and_prompts_by_hand():
    """Catches a sampled layout that is not the trained one (PAPER §4.2): a prompt is the same row,
    left open, with nothing after it."""
    whole = lay_out(["a circle"], WORDS, P)
    prompt = lay_out(["a circle"], WORDS, P, ends=False)
    nothing = lay_out([], WORDS, P, ends=False)
    assert spell(whole) == ("<bos> a circle <eos>", ". . . .", "x x x .")
    assert spell(prompt) == ("<bos> a circle", ". . .", "x x .")
    assert spell(nothing) == ("<bos>", ".", ".")

    document = ["a circle", ("image", 0, 0), "a red circle"]
    whole = lay_out(document, WORDS, P)
    prompt = lay_out(document, WORDS, P, ends=False)
    assert whole.tokens == prompt.tokens + [EOS]
    assert whole.image_id == prompt.image_id + [-1]


def test_what_is_learned_in_any_document():
    """Catches a BOI that nobody predicts, an EOI or a patch that somebody does, a loss at BOI, and
    one at a document's last token. Transfusion §3."""
    _, documents = drawn(2000, drop=0.3, another=0.3)
    learned = set()                                     # tokens that some position predicts
    for document in documents:
        sequence = lay_out(document, WORDS, 16)
        tokens = sequence.tokens
        has_loss = sequence.has_loss
        assert len(tokens) == len(sequence.image_id)
        assert len(tokens) == len(has_loss)
        assert has_loss[-1] is False

        for pos in range(len(tokens) - 1):
            token = tokens[pos]
            following = tokens[pos + 1]
            is_word = following >= len(data.SPECIAL)
            predictable = is_word or following in (BOI, EOS)
            wanted = predictable and token != DROP
            assert has_loss[pos] == wanted, (document, token, following)
            if has_loss[pos]:
                learned.add(following)

    assert {BOI, EOS} <= learned
    assert not {EOI, PATCH, DROP, PAD, BOS} & learned


# --------------------------------------------------------------------------- sequences -> one batch
def packed(n=60, T=128, seed=3):
    """(sequences, Batch) of n random documents. Every picture of the batch has its own index and
    its own limits, so that none can pass for another."""
    rng = np.random.default_rng(seed)
    stream = data.Documents(PAIRS, patches=16, another=0.3)
    sequences = [lay_out(stream.draw(rng), WORDS, 16) for _ in range(n)]
    k = 0
    for sequence in sequences:
        for m in range(len(sequence.images)):
            sequence.images[m] = 100 + k
            sequence.t_max[m] = 1001 + k
            sequence.t_min[m] = 1 + k
            k += 1
    return sequences, pack(sequences, T)


def unpack(batch):
    """The documents that are found in a Batch, as data.Sequences. Their image_id are the batch's
    own."""
    found = []
    for b in range(len(batch.tokens)):
        last = int(batch.doc_id[b].max())
        for d in range(last + 1):
            here = batch.doc_id[b] == d                 # (T,) bool
            tokens = batch.tokens[b][here].tolist()
            if not tokens or tokens[0] == PAD:
                continue
            positions = np.flatnonzero(here.numpy())
            assert (np.diff(positions) == 1).all()      # a document is one stretch
            image_id = batch.image_id[b][here].tolist()
            own = sorted(set(image_id) - {-1})          # which pictures of the batch
            found.append(data.Sequence(
                tokens=tokens,
                image_id=image_id,
                has_loss=batch.has_loss[b][here].tolist(),
                images=batch.images[own].tolist(),
                t_max=batch.t_max[own].tolist(),
                t_min=batch.t_min[own].tolist(),
            ))
    return found


def test_pack_loses_nothing_and_cuts_nothing():
    """Catches a document that is cut at the end of a row, lost, doubled, or given another
    document's picture or limit."""
    sequences, batch = packed()

    def count(documents):
        """How often each document is there, whatever their order."""
        counts = Counter()
        for s in documents:
            parts = (s.tokens, s.has_loss, s.images, s.t_max, s.t_min)
            counts[tuple(tuple(part) for part in parts)] += 1
        return counts

    assert count(sequences) == count(unpack(batch))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 17, 300])
def test_first_fit_is_first_fit(n):
    """Catches a row with room that is left out, or a later one that is taken. Asked here row by
    row, as the words say."""
    rng = np.random.default_rng(n)
    for longest, T in ((1, 1), (1, 4), (9, 9), (40, 50), (200, 210), (200, 2000)):
        lengths = rng.integers(1, longest + 1, n).tolist()
        rows = []
        # The longest first; those of equal length in their order.
        for number in sorted(range(n), key=lambda k: -lengths[k]):
            for row in [*rows, []]:                     # the last is a new row
                filled = sum(lengths[k] for k in row)
                if filled + lengths[number] <= T:
                    break
            if not row:
                rows.append(row)
            row.append(number)
        assert data.first_fit(lengths, T) == rows


def test_pack_numbers_pictures_in_reading_order():
    """Catches picture ids that restart in a row, repeat, or disagree with `images` (PAPER §4.1).
    The model puts picture m where they say m."""
    _, batch = packed()
    is_patch = batch.image_id >= 0
    wanted = []
    for m in range(len(batch.images)):
        wanted += [m] * 16
    assert batch.image_id[is_patch].tolist() == wanted
    assert ((batch.tokens == PATCH) == is_patch).all()


def test_pack_fills_rows_and_marks_padding():
    """Catches padding that belongs to a document, which would attend to it; padding that learns
    something; and padding that fills half of the batch."""
    sequences, batch = packed()
    padding = batch.tokens == PAD
    assert not batch.has_loss[padding].any()
    assert (batch.image_id[padding] == -1).all()

    for b in range(len(batch.tokens)):
        doc_id = batch.doc_id[b]
        # Documents are numbered from left to right.
        assert doc_id[0] == 0
        assert (doc_id.diff() >= 0).all()
        assert (doc_id.diff() <= 1).all()
        # Padding is in none of theirs.
        of_padding = set(doc_id[padding[b]].tolist())
        of_documents = set(doc_id[~padding[b]].tolist())
        assert not of_padding & of_documents

    positions = sum(len(s.tokens) for s in sequences)
    fewest = -(-positions // 128)                       # rounded up
    assert len(batch.tokens) <= fewest + 1


def test_a_document_may_fill_its_row_exactly():
    """Catches an error for a row without padding, and the last token of a full row that learns the
    first of the same row, as a roll would have it."""
    sequence = lay_out(["a red circle", ("image", 0, 1000)], WORDS, P)
    T = len(sequence.tokens)
    batch = pack([sequence, sequence], T)
    assert batch.tokens.shape == (2, T)
    assert not batch.has_loss[:, -1].any()
    assert batch.images.tolist() == [0, 0]
    assert batch.image_id.max() == 1


def test_a_document_longer_than_the_context_is_an_error():
    """Catches a document that is silently cut: its picture would lose patches. The sentence says
    what to do."""
    sequence = lay_out(["a red circle", ("image", 0, 1000)], WORDS, 16)
    with pytest.raises(UserError, match="23 tokens.*context of 22.*--seq-len"):
        pack([sequence], len(sequence.tokens) - 1)


# --------------------------------------------------------------------------------------- tokenizers
def test_words_roundtrip():
    """Catches ids that depend on the order of a set, and special tokens that words of the data can
    collide with."""
    words = data.Words({"red", "circle", "a", "<pad>"})
    assert words.vocabulary == [*data.SPECIAL, "a", "circle", "red"]
    assert len(words) == len(data.SPECIAL) + 3
    assert data.Words({"Red", "red"}).vocabulary == [*data.SPECIAL, "red"]

    # Spaces and capitals do not matter, and special tokens are no text.
    for text in ("a  red circle", "A Red CIRCLE"):
        assert words.decode(words.encode(text)) == "a red circle"
    a_circle = words.encode("a circle")
    assert words.decode([BOS, *a_circle, BOI, PATCH, EOI, EOS]) == "a circle"

    for text in scenes.all_claims():
        assert WORDS.decode(WORDS.encode(text)) == text

    again = data.Words(WORDS.vocabulary)                # as a checkpoint gives it back
    assert again.vocabulary == WORDS.vocabulary


def test_unknown_word():
    """Catches an unknown word that becomes another one, and an error that does not help to find
    it."""
    with pytest.raises(UserError, match="'circel'.*nearest known word is 'circle'"):
        WORDS.encode("a red circel")
    with pytest.raises(UserError, match="'x'"):
        data.Words([]).encode("x")
    # The nearest to "purple" would be "square", which is no help: it shows what it knows.
    with pytest.raises(UserError, match="'purple'.*it knows .*circle, .*yellow"):
        WORDS.encode("a purple circle")


@pytest.mark.parametrize("word", data.SPECIAL)
def test_special_tokens_cannot_be_written_in_a_text(word):
    """Catches a prompt, or a file of captions, that smuggles in a special token: a BOI without
    patches, or a padding that is read."""
    with pytest.raises(UserError, match=word):
        WORDS.encode(f"a {word} circle")


def test_every_world_has_the_same_words():
    """Catches checkpoints of two worlds, or of a small and a large sample, whose word ids
    differ."""
    six = scene_pairs(scenes.WORLDS["six"], n=3).vocabulary()
    assert six == PAIRS.vocabulary()

    # Also the words of captions that are held out.
    for category in scenes.WORLDS["six"]:
        for text, _ in scenes.captions(category, True):
            assert set(text.split()) <= six


@pytest.mark.parametrize("part", [
    ("imgae", 0, 1000),
    ("dropt", "a circle", 3),
    ("image", 0, 500, 501),
])
def test_a_part_that_is_none(part):
    """Catches a misspelt part that is laid out as a picture, and a picture whose t_min is above its
    t_max: train.draw_noise would draw a t out of range."""
    with pytest.raises(ValueError, match=f'wanted .*"image", index.*t_min.*{part[0]}'):
        lay_out(["a circle", part], WORDS, P)

    # t_max = 0: a finished picture, which sampling lays out. t_min may be t_max.
    assert lay_out([("image", 0, 0)], WORDS, P).t_max == [0]
    assert lay_out([("image", 0, 500, 500)], WORDS, P).t_min == [500]
