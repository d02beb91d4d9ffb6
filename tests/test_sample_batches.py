"""
test_sample_batches.py: many documents at once, and where they stop     (sample.py; §3 "Inference")

THE IDEA    A document must not depend on its neighbours: what a prompt and a seed give alone, they
            give in every batch. That is harder than it sounds, since rows have different lengths,
            are in different modes and wait for each other.
            Then the limits: words, pictures, the context, the cache. And the caller's mistakes.
BUGS        "PAPER §4.2" is docs/PAPER.md §4.2, where each bug was met by somebody.
TRY IT      pytest -n 0 tests/test_sample_batches.py
"""
import re

import pytest
import torch

import data
import sample
from data import BOI, EOI, EOS, PATCH
from diffusion import SAMPLERS
from sample import Decoder, choose, generate, pictures_of
from small_documents import (
    BOTH,
    WORDS,
    check_against_uncached,
    finish,
    go_on,
    noise,
    parts_of,
    script,
)
from support.common import UserError


# -------------------------------------------------------------------------- alone and in a batch
@BOTH
def test_ragged_prompts_are_the_same_one_at_a_time(make_trained, encoder):
    """Catches padding that is read as text, positions that are counted from the row's end, and a
    neighbour's picture."""
    trained = make_trained(encoder)
    prompts = [
        ["a"],
        ["the blue square and a red circle"],
        [noise(seed=7)[0], "the square"],
        ["a", noise(seed=8)[0], noise(seed=9)[0], "red"],
    ]

    # 1. The prompts.
    together = Decoder(trained, prompts)
    alone = [Decoder(trained, [prompt]) for prompt in prompts]
    for b, decoder in enumerate(alone):
        assert torch.allclose(together.logits[b], decoder.logits[0], atol=1e-4)
        check_against_uncached(trained, together, b)

    # 2. More words, and a picture for three of the four, not in order.
    for b, text in enumerate(("and a <boi>", "<boi>", "", "the <boi>")):
        go_on(together, b, text)
        go_on(alone[b], 0, text)
    rows = [3, 0, 1]
    start = noise(3)
    finish(together.diffusion_steps(rows, start, 3.0, steps=3, sampler="ddim"))
    for k, b in enumerate(rows):
        own = start[k: k + 1]
        finish(alone[b].diffusion_steps([0], own, 3.0, steps=3, sampler="ddim"))

    # 3. Still the same.
    for b, decoder in enumerate(alone):
        assert together.tokens[b] == decoder.tokens[0]
        for x, y in zip(together.latents[b], decoder.latents[0]):
            assert torch.allclose(x, y, atol=1e-2)
        assert torch.allclose(together.logits[b], decoder.logits[0], atol=1e-3)
        check_against_uncached(trained, together, b)


def test_lm_step_touches_only_active_rows(make_trained):
    """Catches a finished row that goes on writing because its neighbour does."""
    trained = make_trained()
    decoder = Decoder(trained, [["a red"], ["the"]])
    before = list(decoder.tokens[0])
    (token,) = decoder.lm_step([1])

    assert decoder.tokens[0] == before
    assert decoder.tokens[1][-1] == token
    assert len(decoder.tokens[0]) == 3                  # <bos> a red
    assert len(decoder.tokens[1]) == 3                  # <bos> the, and one more

    lone = Decoder(trained, [["a red"]])
    assert torch.allclose(decoder.logits[0], lone.logits[0], atol=1e-4)
    lone = Decoder(trained, [["the"]])
    lone.lm_step([0])
    assert torch.allclose(decoder.logits[1], lone.logits[0], atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_its_neighbours(make_trained, sampler):
    """Catches noise that is drawn for the batch as a whole: the same prompt and seed would give
    another picture in other company."""
    trained = make_trained()

    def pictures(prompts, seed=3):
        documents = generate(
            trained, prompts, draw_now=True, max_words=0, steps=4, seed=seed, sampler=sampler
        )
        return [document[1] for document in documents]

    (alone,) = pictures([["a red circle"]])
    for neighbours in ([["the"]], [["a blue square"], ["and"]]):
        first, *_ = pictures([["a red circle"], *neighbours])
        assert torch.allclose(first, alone, atol=1e-3)

    (other,) = pictures([["a red circle"]], seed=4)
    assert (other - alone).abs().max() > 1e-2

    # Two rows with the same words do not give the same picture.
    one, two = pictures([["a red circle"], ["a red circle"]])
    assert (one - two).abs().max() > 1e-2


# ---------------------------------------------------------------------------- mixtures, and events
MIXED = [
    ["a red circle"],
    [noise(seed=3)[0]],
    [noise(seed=4)[0], "the blue square"],
    [],
    ["a", noise(seed=5)[0], noise(seed=6)[0], "red"],
]
SEEDS = [11, 3, 8, 5, 3]
GROWING = dict(max_words=9, max_pictures=2, steps=3, guidance=1.5, temperature=1.0, top_p=0.9)


def equal(one, two):
    """Whether two documents have the same words and, nearly, the same pictures."""
    if parts_of(one) != parts_of(two):
        return False
    for x, y in zip(pictures_of(one), pictures_of(two)):
        if not torch.allclose(x, y, atol=0.05):
            return False
    return True


@BOTH
@pytest.mark.parametrize("kind, options", [
    ("ddpm", dict()),
    ("flow", dict(temperature=0.7, top_p=1.0, guidance=1)),
    ("ddpm", dict(draw_now=True)),
], ids=str)
def test_mixed_prompts_are_the_same_one_at_a_time(make_trained, eager, encoder, kind, options):
    """Catches a row that draws other noise, or says other words, because its neighbour is still
    writing. Rows wait for each other, and each must have a generator that nobody else uses up, not
    even while it waits."""
    trained = make_trained(encoder, kind)
    options = {**GROWING, **options}
    together = generate(trained, MIXED, seed=SEEDS, **options)

    # 1. Alone.
    for b, prompt in enumerate(MIXED):
        (alone,) = generate(trained, [prompt], seed=[SEEDS[b]], **options)
        assert equal(alone, together[b]), (
            f"row {b}: {parts_of(alone)} alone, {parts_of(together[b])} in company"
        )

    # 2. In other company, and in another order.
    order = [3, 0, 4]
    prompts = [MIXED[b] for b in order]
    seeds = [SEEDS[b] for b in order]
    for b, document in zip(order, generate(trained, prompts, seed=seeds, **options)):
        assert equal(document, together[b])

    # 3. There was something to compare.
    grown = 0                                           # parts, of all rows
    with_pictures = 0                                   # rows
    for document, prompt in zip(together, MIXED):
        grown += len(document) - len(prompt)
        with_pictures += len(pictures_of(document)) > len(pictures_of(prompt))
    different = {str(parts_of(document)) for document in together}
    assert len(different) == 5
    assert grown >= 5
    assert with_pictures >= 2


def test_a_seed_is_one_per_row(make_trained):
    """Catches a seed that is not the row's own: two rows with one seed must be twins, with two
    seeds not; an int gives every row its own, which no row of another int has."""
    trained = make_trained()
    prompts = [["a red circle"]] * 2
    assert equal(*generate(trained, prompts, seed=[7, 7], **GROWING))
    assert not equal(*generate(trained, prompts, seed=[7, 8], **GROWING))
    seven = generate(trained, prompts, seed=7, **GROWING)
    eight = generate(trained, prompts, seed=8, **GROWING)
    assert not equal(*seven)
    assert not equal(seven[1], eight[0])                # as seed + row would have it


def test_events_tell_the_truth(make_trained, eager):
    """Catches a trace, a film or a notebook that shows another run than the one that happened:
    caches that did not grow so, steps of rows that were not drawn, and a picture that is announced
    twice or too early."""
    trained = make_trained()
    P = 4
    decoder = Decoder(trained, MIXED)
    start = [len(row) for row in decoder.tokens]
    lengths = dict(enumerate(start))                    # {row: how long the last event left it}
    drawn = dict.fromkeys(range(5), 0)                  # {row: how many pictures}
    modes = []
    times = []                                          # t of the picture in progress

    for event in sample.grow(decoder, SEEDS, **GROWING):
        modes.append(event.mode)
        # What is filled is what stands there, and no row is named twice.
        assert event.filled == [len(decoder.tokens[b]) for b in event.rows]
        assert len(set(event.rows)) == len(event.rows)
        before = [lengths[b] for b in event.rows]

        if event.mode == "prompt":
            assert event.rows == [0, 1, 2, 3, 4]
            assert event.filled == start
            assert modes == ["prompt"]                  # the first event

        elif event.mode == "word":
            assert event.filled == [n + 1 for n in before]
            assert event.tokens == [decoder.tokens[b][-1] for b in event.rows]

        elif event.mode == "noise":
            # Over the same places, from T to 0; BOI stands before them.
            assert event.filled == before
            for b in event.rows:
                assert decoder.tokens[b][-1] == BOI
            assert event.x.shape == (len(event.rows), 4, 4, 4)
            assert event.x0.shape == (len(event.rows), 4, 4, 4)
            if modes[-2] != "noise":
                times = []
            times.append(event.t)
            last = event

        else:
            # The picture is the last x, and it stands in the document.
            assert times == [1000, 667, 333, 0]
            assert event.rows == last.rows
            assert event.filled == [n + P + 1 for n in before]
            for k, b in enumerate(event.rows):
                assert decoder.tokens[b][-P - 2:] == [BOI] + [PATCH] * P + [EOI]
                assert torch.equal(decoder.latents[b][-1], last.x[k])
                drawn[b] += 1

        lengths.update(zip(event.rows, event.filled))

    assert set(modes) == {"prompt", "word", "noise", "picture"}
    assert modes.count("noise") == 4 * modes.count("picture")
    assert modes.count("noise") >= 8
    for b, prompt in enumerate(MIXED):
        assert len(decoder.latents[b]) == len(pictures_of(prompt)) + drawn[b]
        assert len(decoder.tokens[b]) == lengths[b]


# ------------------------------------------------------------------------------------------- limits
def test_generate_stops(make_trained, monkeypatch):
    """Catches a limit that is off by one, and a document that never ends."""
    trained = make_trained()

    script(monkeypatch, "a " * 99)
    assert generate(trained, [["the"]], max_words=5) == [["the a a a a a"]]

    script(monkeypatch, "a <boi> a <boi> a <boi> a")
    (document,) = generate(trained, [["the"]], max_pictures=2, steps=2)
    kinds = [type(part) for part in document]
    assert kinds == [str, torch.Tensor, str, torch.Tensor, str]

    # The context is full: <bos>, and words.
    script(monkeypatch, "a " * 99)
    ((words,),) = generate(trained, [[]], max_words=99)
    assert len(words.split()) == trained.model.config.context - 1


def test_a_full_context_ends_the_document(make_trained):
    """Catches a word out of bounds after a prompt, or a prompt with its picture, that fills the
    context to the last place."""
    trained = make_trained(context=12)
    eleven = ("a " * 11).strip()                        # and <bos>: 12
    assert generate(trained, [[eleven]]) == [[eleven]]

    # <bos> and 5 words and BOI and 4 patches and EOI: 12.
    ((words, picture),) = generate(trained, [["a " * 5]], draw_now=True, steps=2)
    assert words == "a a a a a"
    assert picture.shape == (4, 4, 4)

    # The other row still writes.
    short, full = generate(trained, [["a"], [eleven]], max_pictures=0)
    assert full == [eleven]
    assert short[0].startswith("a")


@pytest.mark.parametrize("max_words, max_pictures, context", [
    (0, 1, 64),
    (5, 0, 64),
    (30, 3, 64),
    (99, 9, 33),
    (99, 9, 20),
    (7, 1, 19),
])
def test_limits_of_open_documents(make_trained, max_words, max_pictures, context):
    """Catches more words or pictures than were allowed, positions beyond the context, a BOI that no
    picture follows although words do, and a document that goes on after EOS."""
    trained = make_trained(context=context)
    decoder = Decoder(trained, [["a"], [], [noise()[0]], ["the red"]] * 3)
    start = []                                          # of each row: positions, pictures
    for row, pictures in zip(decoder.tokens, decoder.latents):
        start.append((len(row), len(pictures)))

    seeds = [200006 + b for b in range(12)]
    for _ in sample.grow(
        decoder,
        seeds,
        max_words=max_words,
        max_pictures=max_pictures,
        temperature=1.0,
        steps=2,
    ):
        pass

    full = 0                                            # rows without room for a picture
    with_new_pictures = 0                               # rows
    for row, pictures, (n, given) in zip(decoder.tokens, decoder.latents, start):
        # 1. The limits.
        words = sum(token >= len(data.SPECIAL) for token in row[n:])
        assert len(row) <= context
        assert words <= max_words
        assert given <= len(pictures) <= given + max_pictures

        # 2. The layout: BOI, P patches, EOI; EOS last if at all.
        assert row.count(PATCH) == 4 * len(pictures)
        assert row.count(EOI) == len(pictures)
        assert EOS not in row[:-1]
        closed = row
        if row[-1] == BOI:                              # it had no room, or came too often
            closed = row[:-1]
        assert closed.count(BOI) == len(pictures)
        for k, token in enumerate(closed):
            if token == BOI:
                assert closed[k + 1: k + 6] == [PATCH] * 4 + [EOI]

        full += len(row) >= context - 5
        with_new_pictures += len(pictures) > given

    # 3. The limits were met.
    assert full or context > 33
    may_draw = max_pictures > 0 and max_words > 0
    assert (with_new_pictures > 0) == may_draw


# The longest prompt below is <bos> the red, with draw_now also BOI; a picture is 6 = BOI, 4, EOI;
# 1 is for EOS, or a BOI too many.
@pytest.mark.parametrize("draw_now, max_words, max_pictures, size", [
    (True, 0, 1, 4 + 6 + 1),
    (True, 3, 0, 4 + 3 + 6 + 1),
    (False, 5, 0, 3 + 5 + 1),
    (True, 20, 3, 4 + 20 + 18 + 1),
    (False, 99, 9, 64),
])
def test_the_cache_holds_what_may_come(
    make_trained, monkeypatch, draw_now, max_words, max_pictures, size
):
    """Catches a cache of the whole context, for which no GPU has room at 4,096 positions, and one
    that is a position short: the documents must be those of a cache of the whole context."""
    trained = make_trained(context=64)
    sizes = []
    real = sample.Cache

    def noting(config, B, S, like):
        sizes.append(S)
        return real(config, B, S, like)

    monkeypatch.setattr(sample, "Cache", noting)

    class Roomy(Decoder):
        """A Decoder whose cache has the whole context."""

        def __init__(self, trained, prompts, draw_now, room):
            super().__init__(trained, prompts, draw_now)

    def write(decoder):
        return generate(
            trained,
            [["a"], [], ["the red"]] * 6,
            draw_now=draw_now,
            max_words=max_words,
            max_pictures=max_pictures,
            temperature=1.0,
            steps=2,
            seed=3,
            decoder=decoder,
        )

    tight = write(Decoder)
    roomy = write(Roomy)
    assert sizes == [size, 64]
    for one, two in zip(tight, roomy):
        assert parts_of(one) == parts_of(two)
        for x, y in zip(pictures_of(one), pictures_of(two)):
            assert torch.allclose(x, y, atol=1e-5)


def test_room_for_the_longest_prompt(make_trained):
    """Catches several prompts that are measured by the shortest: the longest would end in the
    middle of a picture. P = 4, so two pictures take 12."""
    trained = make_trained(context=20)
    short = ["a"]
    fits = ["the red circle and the square"]            # <bos>, six words, 12 and EOS: 20
    too_long = ["the red circle and the blue square"]
    sample.check_room(trained, [short, fits], 2)
    for prompts in ([short, too_long], [too_long, short]):
        with pytest.raises(UserError, match="need 21 positions"):
            sample.check_room(trained, prompts, 2)


# -------------------------------------------------------------------------- words, and mistakes
def test_choose():
    """Catches a greedy choice that is not, a top_p that drops the word that crosses it, and PAD or
    EOI written into a text."""
    logits = torch.full((1, len(WORDS)), -9.0)                          # (B, V)
    logits[0, 8:11] = torch.tensor([0.5, 0.3, 0.2]).log()
    before = logits.clone()
    assert choose(logits).tolist() == [8]

    generator = torch.Generator().manual_seed(0)

    def drawn(**options):
        return {choose(logits, generators=[generator], **options).item() for _ in range(300)}

    assert drawn(temperature=1.0) >= {8, 9, 10}
    assert drawn(temperature=1.0, top_p=0.7) == {8, 9}  # 0.5 is not enough: the second is kept
    assert drawn(temperature=1.0, top_p=1e-6) == {8}
    assert drawn(temperature=0.01) == {8}
    assert torch.equal(logits, before)


def test_special_tokens_are_never_chosen():
    """Catches EOI or PATCH as a word: only BOI and EOS may be predicted (PAPER §4.2)."""
    logits = torch.zeros(1, len(WORDS))
    logits[0, :len(data.SPECIAL)] = 50.0
    assert choose(logits).item() in {BOI, EOS}

    generator = torch.Generator().manual_seed(0)
    chosen = set()
    for _ in range(100):
        chosen.add(choose(logits, temperature=1.0, generators=[generator]).item())
    assert chosen == {BOI, EOS}


def test_too_long_a_prompt_raises(make_trained):
    """Catches an index error deep in the cache, in place of a sentence with the two numbers."""
    trained = make_trained(context=12)
    message = "needs 13 positions, but this model's context is 12: shorten it to {} tokens"
    with pytest.raises(UserError, match=message.format(11)):
        Decoder(trained, [["a " * 12]])
    with pytest.raises(UserError, match=message.format(5)):
        Decoder(trained, [["a"], ["a " * 6]], draw_now=True)


@pytest.mark.parametrize("before, draw_now", [
    (0, False),
    (0, True),
    (1, False),
    (1, True),
    (2, False),
])
def test_the_advice_to_shorten_is_right(make_trained, before, draw_now):
    """Catches a number that counts BOS or BOI among the words: who follows the advice would be told
    the same again. before: how many pictures stand in the prompt."""
    trained = make_trained(context=20)
    pictures = noise(9)[:before]

    def read(words):
        Decoder(trained, [[*pictures, "a " * words]], draw_now=draw_now)

    with pytest.raises(UserError) as mistake:
        read(30)
    advice = re.search("shorten (?:it|its words) to ([0-9]+) tokens", str(mistake.value))
    fit = int(advice[1])

    read(fit)
    with pytest.raises(UserError, match=f"to {fit} tokens"):
        read(fit + 1)


def test_unknown_words_raise(make_trained):
    """Catches an unknown word that is left out of the prompt without a sound."""
    message = "'purple' is not in this model's vocabulary of 7 words"
    with pytest.raises(UserError, match=message):
        Decoder(make_trained(), [["a purple circle"]])


@pytest.mark.parametrize("word", data.SPECIAL)
def test_special_tokens_are_not_words(make_trained, word):
    """Catches a prompt with "<eoi>" or "<patch>" in it that forges the layout, and crashes far from
    here."""
    with pytest.raises(UserError, match="is not in this model's vocabulary"):
        generate(make_trained(), [[f"a {word} circle"]], max_words=2)


def test_prompts_are_left_alone(make_trained):
    """Catches a prompt list that grows with what was generated: a second call would continue the
    first one's answer."""
    latent = noise()[0]
    before = latent.clone()
    prompts = [["a", latent, "red"]]
    generate(make_trained(), prompts, max_words=3, steps=2)
    assert len(prompts) == 1
    assert len(prompts[0]) == 3
    assert torch.equal(latent, before)
