"""
test_sample.py: one document, word by word and picture by picture   (sample.py; §3 "Inference")

THE IDEA    Three ways to compute the same document must agree.
              sample.write      the algorithm as the paper says it: no cache, no batch
              sample.generate   the same with a cache: here it is held to `write`
              one training forward of the finished sequence: the cache is held to that
            The last comparison has no code in common with decoding, so it finds what both of the
            others get wrong.
BUGS        "PAPER §4.7" is docs/PAPER.md §4.7, where each bug was met by somebody.
SEE ALSO    tests/test_sample_batches.py: many documents, and where they stop;
            tests/test_sample_command_line.py
TRY IT      pytest -n 0 tests/test_sample.py
"""
import pytest
import torch

import data
import sample
from data import BOI, EOI, PATCH
from sample import Decoder, generate, pictures_of
from small_documents import (
    BOTH,
    WORDS,
    as_layout,
    check_against_uncached,
    finish,
    go_on,
    listen_to_denoise,
    noise,
    parts_of,
    script,
    uncached,
)
from support import checkpoint
from support.common import ASSETS, UserError


# --------------------------------------------------------------------- fast = as the paper says it
def hold_to_write(trained, prompts, seeds, tolerance, **options):
    """Check `generate` of all prompts, in one batch, against `write` of each; return what `write`
    wrote."""
    slow = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        slow.append(sample.write(trained, prompt, seed=seed, **options))
    fast = generate(trained, prompts, seed=seeds, **options)

    for one, two in zip(slow, fast, strict=True):
        assert parts_of(one) == parts_of(two)
        for x, y in zip(pictures_of(one), pictures_of(two), strict=True):
            assert (x - y).abs().max() < tolerance
    return slow


@BOTH
@pytest.mark.parametrize("kind, guidance, sampler", [
    ("ddpm", 1, "ddpm"),
    ("ddpm", 3.0, "ddpm"),
    ("flow", 3.0, "dpm++"),
])
def test_generate_is_what_the_paper_says(make_trained, eager, encoder, kind, guidance, sampler):
    """Catches a cache that keeps the last *noisy* step (PAPER §4.7), a step that is read at another
    t, an unconditional branch that has lost its BOI (PAPER §4.8), an EOI that is not read, a limit
    that is one off, and noise and words that are drawn in another order."""
    prompts = 2 * [
        ["a red circle"],
        ["a", noise(seed=5)[0], "the square"],
        [],
        ["the", noise(seed=6)[0]],
    ]
    # Other seeds than these now and then leave one number of a DDPM's x0 at t = T unclipped, and
    # a[T] = 5e-5 makes much of an error of 1e-6.
    seeds = list(range(32, 40))
    slow = hold_to_write(
        make_trained(encoder, kind),
        prompts,
        seeds,
        tolerance=5e-5,
        max_words=9,
        max_pictures=2,
        temperature=1.0,
        top_p=0.9,
        guidance=guidance,
        sampler=sampler,
        steps=4,
    )

    # There is something to compare: two pictures in one document, words after the last picture,
    # and two more pictures after one in the prompt.
    drawn = []
    for document, prompt in zip(slow, prompts, strict=True):
        drawn.append(len(pictures_of(document)) - len(pictures_of(prompt)))
    with_two = [document for n, document in zip(drawn, slow, strict=True) if n == 2]
    after_one = [n for n, prompt in zip(drawn, prompts, strict=True) if pictures_of(prompt)]
    assert len(with_two) >= 3
    assert any(isinstance(document[-1], str) for document in with_two)
    assert max(after_one) == 2


@BOTH
def test_wide_pictures(make_trained, eager, encoder):
    """Catches height that is taken for width in the noise, the patches or the cache: these latents
    are 4x8."""
    trained = make_trained(encoder, latent=(4, 4, 8))
    prompts = [["a red circle"], ["the", torch.randn(4, 4, 8)]]
    slow = hold_to_write(
        trained,
        prompts,
        [32, 33],
        tolerance=5e-5,
        max_words=9,
        max_pictures=2,
        temperature=1.0,
        steps=3,
    )
    shapes = []
    for document in slow:
        shapes += [picture.shape for picture in pictures_of(document)]
    assert set(shapes) == {(4, 4, 8)}
    assert len(shapes) >= 2, shapes


@pytest.mark.parametrize("guidance", [1, 3.0])
def test_the_shipped_model_writes_what_the_paper_says(guidance):
    """The same for a model that has learned to draw, with greedy words: it says BOI itself, and
    then EOS."""
    trained = checkpoint.load_trained(ASSETS / "scenes.pt")
    options = dict(tolerance=1e-4, max_words=30, guidance=guidance, steps=6)

    # 1. It draws what it is told.
    prompts = [["a red circle left of a blue square"], ["a green triangle"], []]
    slow = hold_to_write(trained, prompts, [3, 4, 5], **options)
    assert parts_of(slow[0]) == ["a red circle left of a blue square", "[picture]"]

    # 2. It describes what it has drawn: the picture in the prompt, and what it says of it.
    picture = slow[0][1]
    (described,) = hold_to_write(trained, [[picture]], [3], **options)
    assert len(described) == 2
    assert len(described[1].split()) > 3


# ------------------------------------------------------------------------------- cached = uncached
@BOTH
@pytest.mark.parametrize("guidance", [1, 3.0])
@pytest.mark.parametrize("sampler, kind", [("ddpm", "ddpm"), ("ddim", "flow")])
def test_cached_is_uncached_after_generated_pictures(
    make_trained, encoder, guidance, sampler, kind
):
    """Catches a cache that keeps the last *noisy* step or loses what came before, and a finished
    picture that is read at another t than 0 (PAPER §4.7)."""
    trained = make_trained(encoder, kind)
    decoder = Decoder(trained, [["a red circle"]])
    check_against_uncached(trained, decoder, 0)

    for text, seed in (("and a <boi>", 1), ("the blue square <boi>", 2)):
        go_on(decoder, 0, text)
        generator = torch.Generator().manual_seed(3)
        start = noise(seed=seed)
        finish(decoder.diffusion_steps(
            [0], start, guidance, generator, steps=4, sampler=sampler
        ))
        check_against_uncached(trained, decoder, 0)
        go_on(decoder, 0, "the")
        check_against_uncached(trained, decoder, 0)

    decoder.lm_step([0])
    kinds = [type(part) for part in decoder.document(0)]
    assert kinds == [str, torch.Tensor, str, torch.Tensor, str]


@BOTH
def test_a_different_picture_is_noticed(make_trained, encoder):
    """Shows that the comparisons above can fail at all: the words after a picture do depend on the
    picture, and on its t."""
    trained = make_trained(encoder)
    layout = ["a red circle", ("image", 0, 0), "the"]
    picture = noise()[0]
    another = noise(seed=1)[0]

    clean, _ = uncached(trained, layout, [picture], [0])
    other, _ = uncached(trained, layout, [another], [0])
    noisy, _ = uncached(trained, layout, [picture], [250])
    assert (clean[-1] - other[-1]).abs().max() > 1e-2
    assert (clean[-1] - noisy[-1]).abs().max() > 1e-2


@BOTH
def test_each_denoising_step_is_a_training_forward(make_trained, encoder, monkeypatch):
    """Catches a context picture with a random t (PAPER §4.7), a blind branch of guidance that is
    shorter, shifted or without its BOI (PAPER §4.8), and patches at other positions than in
    training (PAPER §4.2)."""
    # 1. A document with one picture, and words that ask for a second.
    trained = make_trained(encoder)
    decoder = Decoder(trained, [["a red circle"]])
    go_on(decoder, 0, "<boi>")
    finish(decoder.diffusion_steps([0], noise(), 1, steps=3, sampler="ddim"))
    go_on(decoder, 0, "the blue square <boi>")
    first = decoder.latents[0][0]

    # 2. Draw it with guidance, and listen. Each forward has a told row and a blind one.
    seen = listen_to_denoise(trained, monkeypatch)
    finish(decoder.diffusion_steps([0], noise(seed=1), 3.0, steps=3, sampler="ddim"))
    times = [t for _, t, _ in seen]
    assert times == [[1000] * 2, [667] * 2, [333] * 2, [0]]             # the last: clean, told only

    # 3. Each row is what training would compute for this document.
    told = ["a red circle", ("image", 0, 0), "the blue square", ("image", 1, 0)]
    blind = ["a red circle", ("image", 0, 0), ("dropped", "the blue square"), ("image", 1, 0)]
    for xt, t, out in seen[:3]:
        assert torch.equal(xt[0], xt[1])
        for k, document in enumerate((told, blind)):
            _, wanted = uncached(trained, document, [first, xt[k]], [0, t[k]])
            name = "blind" if k else "told"
            assert torch.allclose(out[k], wanted[1], atol=1e-4), f"t = {t[k]}, {name}"
        assert not torch.allclose(out[0], out[1], atol=1e-2)            # the caption matters


@BOTH
def test_the_second_picture_reads_the_first_one_clean(make_trained, encoder, monkeypatch):
    """PAPER §4.7 in one document that the model writes itself. While the second picture is denoised
    the cache must hold the finished first one (t = 0), in the told and in the blind branch. Catches
    a cache that holds its last noisy step."""
    trained = make_trained(encoder)
    seen = listen_to_denoise(trained, monkeypatch)
    script(monkeypatch, "circle <boi> and a square <boi> the")
    (document,) = generate(
        trained, [["a red"]], max_pictures=2, steps=2, sampler="ddim", seed=1
    )
    assert parts_of(document) == [
        "a red circle", "[picture]", "and a square", "[picture]", "the"
    ]
    assert [t[0] for _, t, _ in seen] == [1000, 500, 0, 1000, 500, 0]

    clean = document[1]
    noisy = seen[1][0][0]                               # the first picture at t = 500
    for x, t, out in seen[3:5]:                         # the second one
        for k, words in enumerate(("and a square", ("dropped", "and a square"))):
            layout = ["a red circle", ("image", 0, 0), words, ("image", 1, 0)]
            _, wanted = uncached(trained, layout, [clean, x[k]], [0, t[k]])
            assert torch.allclose(out[k], wanted[1], atol=1e-4)
            _, unwanted = uncached(trained, layout, [noisy, x[k]], [500, t[k]])
            assert not torch.allclose(out[k], unwanted[1], atol=1e-3)


def test_prompt_pictures_are_read_clean(make_trained, monkeypatch):
    """Catches a picture in the prompt that is given a random t, or noise (PAPER §4.7)."""
    trained = make_trained()
    told = []
    real = trained.model.patch_encoder.encode

    def listening(x, t):
        told.append((x.clone(), t.tolist()))
        return real(x, t)

    monkeypatch.setattr(trained.model.patch_encoder, "encode", listening)
    latents = noise(2)
    Decoder(trained, [["a", latents[0], "red", latents[1]]])

    assert len(told) == 1
    x, t = told[0]
    assert t == [0, 0]
    assert torch.equal(x, latents)


# ---------------------------------------------------------------------------------------- two modes
def test_the_model_switches_modes_itself(make_trained, monkeypatch):
    """Catches a BOI or EOI that is put in twice when sampling (PAPER §4.2), text before or after a
    picture that is lost, and rows that wait for each other."""
    trained = make_trained()
    script(
        monkeypatch,
        "red circle <boi> and a square <boi> the",
        "blue",
        "<boi> the",
    )
    decoders = []
    real = Decoder.__init__

    def remembering(self, *arguments, **options):
        decoders.append(self)
        real(self, *arguments, **options)

    monkeypatch.setattr(Decoder, "__init__", remembering)
    documents = generate(trained, [["a"], ["the"], ["a red circle"]], max_pictures=2, steps=2)

    assert [parts_of(document) for document in documents] == [
        ["a red circle", "[picture]", "and a square", "[picture]", "the"],
        ["the blue"],
        ["a red circle", "[picture]", "the"],
    ]
    for b, document in enumerate(documents):
        assert all(picture.shape == (4, 4, 4) for picture in pictures_of(document))
        # The layout in sampling is the layout in training.
        layout, _ = as_layout(document)
        assert decoders[0].tokens[b] == data.lay_out(layout, WORDS, 4).tokens


def test_decoded_document_lays_out_as_it_was_sampled(make_trained):
    """Catches a layout in sampling that is not the one in training (PAPER §4.2): it must be one
    BOI, P patches, one EOI, and nothing more."""
    decoder = Decoder(make_trained(), [["a red circle"]], draw_now=True)
    finish(decoder.diffusion_steps([0], noise(), 1, steps=2))
    circle = WORDS.ids["circle"]
    assert decoder.tokens[0][-7:] == [circle, BOI, PATCH, PATCH, PATCH, PATCH, EOI]

    document, pictures = as_layout(decoder.document(0))
    assert document == ["a red circle", ("image", 0, 0)]
    assert len(pictures) == 1


def test_trajectory_starts_at_noise_and_ends_in_the_document(make_trained):
    """Catches a film that shows other pictures than the one that is kept."""
    decoder = Decoder(make_trained(), [["a"]], draw_now=True)
    start = noise()
    before = start.clone()
    times = []
    pictures = []
    for t, x, _ in decoder.diffusion_steps([0], start, 3.0, steps=4):
        times.append(t)
        pictures.append(x)

    assert times == [1000, 750, 500, 250, 0]
    assert torch.equal(pictures[0], before)
    assert torch.equal(start, before)                   # the caller's noise is left alone
    assert torch.equal(pictures[-1][0], decoder.latents[0][0])
    assert pictures[-1].abs().max() <= 4                # clipped to `x0_max`


# ----------------------------------------------------------------------------- guidance over words
def test_guidance_mixes_the_two_branches(make_trained):
    """Catches told and blind swapped: guidance 1 must be the plain model, and 0 must not read the
    caption at all (PAPER §4.8)."""
    trained = make_trained()

    def picture(caption, guidance):
        decoder = Decoder(trained, [[caption]], draw_now=True)
        steps = finish(decoder.diffusion_steps([0], noise(), guidance, steps=4, sampler="ddim"))
        _, x, _ = steps[-1]
        return x

    plain = picture("a red circle", 1)
    almost = picture("a red circle", 1 + 1e-9)          # takes the path of two branches
    assert torch.allclose(almost, plain, atol=1e-3)

    blind = picture("a red circle", 0)
    assert torch.allclose(blind, picture("the blue square", 0), atol=1e-4)

    # Words and guidance do make a difference.
    assert (plain - picture("the blue square", 1)).abs().max() > 1e-2
    assert (plain - picture("a red circle", 3)).abs().max() > 1e-2


@BOTH
def test_guidance_leaves_the_sequence_alone(make_trained, encoder):
    """Catches a blind branch that forgets the caption in the real cache, too: the words that follow
    would never have heard of it (PAPER §4.8)."""
    trained = make_trained(encoder)
    decoder = Decoder(trained, [["a red circle"]], draw_now=True)
    finish(decoder.diffusion_steps([0], noise(), 5.0, steps=3, sampler="ddim"))
    go_on(decoder, 0, "and the square")
    check_against_uncached(trained, decoder, 0)


# -------------------------------------------------------------- guidance over words, picture, both
BEFORE = [                                              # each asks for an edit of its picture
    ["a red circle", noise(seed=5)[0], "the blue square"],
    [noise(seed=6)[0], "the"],
]


def listen_to_read(trained, monkeypatch):
    """Listen to every `read`: returns the list in which (latents, t) will lie."""
    seen = []
    real = trained.model.read

    def listening(tokens, image_id, latents, pos, cache, t=0):
        seen.append((latents.clone(), t))
        return real(tokens, image_id, latents, pos, cache, t)

    monkeypatch.setattr(trained.model, "read", listening)
    return seen


@BOTH
@pytest.mark.parametrize("over", sample.GUIDE_OVER)
def test_the_blind_branch_is_a_training_forward(make_trained, encoder, over, monkeypatch):
    """The unconditional branch of an edit (PAPER §4.8).

    Catches words or a picture that are still read although they are left out, a picture that is
    noise at another t than training had (t = T), a branch at other positions, and an earlier
    picture or caption that is forgotten with the last one."""
    without_words = over in ("words", "both")
    without_picture = over in ("picture", "both")
    trained = make_trained(encoder)
    decoder = Decoder(trained, BEFORE, draw_now=True)
    denoised = listen_to_denoise(trained, monkeypatch)
    read = listen_to_read(trained, monkeypatch)
    start = noise(2, seed=1)
    finish(decoder.diffusion_steps([0, 1], start, 3.0, steps=2, sampler="ddim", over=over))

    # 1. The blind branch is read first. Where a picture is left out, noise at T takes its place.
    replacement, t_read = read[0]
    if without_picture:
        assert len(replacement) == 2
        assert t_read == 1000
    else:
        assert len(replacement) == 0

    # 2. Each row of each forward is what training would compute. Rows 0, 1 are told; 2, 3 blind.
    for k, prompt in enumerate(BEFORE):
        *first, picture, words = prompt
        told = [*first, ("image", 0, 0), words, ("image", 1, 0)]
        blind = told
        if without_words:
            blind = [*first, ("image", 0, 0), ("dropped", words), ("image", 1, 0)]
        for step, (x, t, out) in enumerate(denoised[:2]):
            assert torch.equal(x[k], x[2 + k])

            _, wanted = uncached(trained, told, [picture, x[k]], [0, t[k]])
            assert torch.allclose(out[k], wanted[1], atol=1e-4), f"row {k}, {step}, told"

            context = [picture, x[k]]
            times = [0, t[2 + k]]
            if without_picture:
                context = [replacement[k], x[k]]
                times = [1000, t[2 + k]]
            _, wanted = uncached(trained, blind, context, times)
            assert torch.allclose(out[2 + k], wanted[1], atol=1e-4), f"row {k}, {step}, blind"

            assert not torch.allclose(out[k], out[2 + k], atol=1e-2)    # what is left out matters

    # 3. That noise is its own: neither the picture's, nor the new picture's.
    if without_picture:
        assert 0.5 < replacement.std() < 1.5
        for own in replacement:
            for k in range(2):
                assert not torch.allclose(own, start[k], atol=0.1)
                assert not torch.allclose(own, BEFORE[k][-2], atol=0.1)


@BOTH
def test_guidance_one_is_the_same_over_anything(make_trained, encoder):
    """Catches guidance that leaves out something else than it was told. Guidance 1 is the plain
    model, whatever would be left out; 0 reads nothing of what is; 3 tells the three apart."""
    trained = make_trained(encoder)

    def edited(prompt, over, guidance):
        (document,) = generate(
            trained,
            [prompt],
            draw_now=True,
            max_words=0,
            steps=3,
            sampler="ddim",
            over=over,
            guidance=guidance,
        )
        return document[-1]

    prompt = [BEFORE[1][0], "the blue square"]
    other_words = [BEFORE[1][0], "a red circle"]
    other_picture = [BEFORE[0][1], "the blue square"]

    plain, *others = [edited(prompt, over, 1) for over in sample.GUIDE_OVER]
    for other in others:
        assert torch.equal(other, plain)

    for over in sample.GUIDE_OVER:
        almost = edited(prompt, over, 1 + 1e-9)         # takes the path of two branches
        assert torch.allclose(almost, plain, atol=1e-2)

        blind = edited(prompt, over, 0)
        same = torch.allclose(edited(other_words, over, 0), blind, atol=1e-3)
        assert same == (over != "picture")
        same = torch.allclose(edited(other_picture, over, 0), blind, atol=1e-3)
        assert same == (over != "words")

    strong = [edited(prompt, over, 3) for over in sample.GUIDE_OVER]
    for k in range(3):
        assert (strong[k] - strong[k - 1]).abs().max() > 1e-2


@pytest.mark.parametrize("prompt", [
    ["a"],
    ["a red circle and the blue square"],
    [],
    ["a red circle", "and the blue square"],
], ids=str)
@pytest.mark.parametrize("over", ["picture", "both"])
def test_guidance_over_a_picture_needs_one(make_trained, prompt, over):
    """Catches an index error, and words that are forgotten in place of the picture that is not
    there. At guidance 1 nothing is left out."""
    options = dict(draw_now=True, max_words=0, steps=2, over=over)
    with pytest.raises(UserError, match="needs a picture before the words"):
        generate(make_trained(), [prompt], **options)
    with pytest.raises(UserError, match="needs a picture before the words"):
        generate(make_trained(), [[noise()[0], "a"], prompt], **options)                # one of two

    (document,) = generate(make_trained(), [prompt], guidance=1, **options)
    assert document[-1].shape == (4, 4, 4)


# ------------------------------------------------------------------------------- the caller's lists
def test_a_text_is_no_list(make_trained):
    """Catches a text where a list is wanted: Python takes it for a list of letters, and the model
    would complain of the word 'r', or draw the letter "a"."""
    trained = make_trained()
    sentence = "each prompt is a list of words and pictures: .*got the text 'a red circle'"
    with pytest.raises(UserError, match=sentence):
        generate(trained, ["a red circle"])
    with pytest.raises(UserError, match=sentence):
        sample.write(trained, "a red circle")
    with pytest.raises(UserError, match="each prompt is a list"):
        generate(trained, "a red circle")
    with pytest.raises(UserError, match="captions is a list: .*got the text 'a'"):
        sample.draw(trained, "a")
    with pytest.raises(UserError, match="instructions is a list: .*got the text 'a'"):
        sample.edit(trained, noise(), "a")


def test_no_documents(make_trained):
    """Catches a crash where a list is empty: no caption, no picture, no prompt. The shapes say what
    pictures would have had."""
    trained = make_trained()
    c, h, w = trained.model.config.latent
    f = trained.vae.f
    assert generate(trained, []) == []
    assert sample.draw(trained, []).shape == (0, f * h, f * w, 3)
    assert sample.edit(trained, noise()[:0], []).shape == (0, c, h, w)
    assert sample.describe(trained, noise()[:0]) == []
