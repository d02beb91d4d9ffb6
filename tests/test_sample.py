"""test_sample.py: decoding with a cache must say what one training forward of the finished sequence says.
Bugs: docs/PAPER.md §4.2, §4.7, §4.8, here "PAPER §4"."""
import contextlib
import ctypes
import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from data import BOI, EOI, EOS, PATCH
from diffusion import SAMPLERS, Diffusion
from model import Transfusion, count, sized
from sample import Decoder, choose, generate
from support import checkpoint, figures, sample_options
from support.checkpoint import Trained
from support.common import ASSETS, UserError, run_command
from vae import VAE, VAEConfig

WORDS = data.Words("a and blue circle red square the".split())
BOTH = pytest.mark.parametrize("encoder", ["linear", "unet"])


@pytest.fixture
def make_trained(make_model):
    """A function (encoder, **ModelConfig) -> Trained with a tiny random model and a VAE that has learned nothing."""
    def make(encoder="linear", kind="ddpm", **options):
        vae = VAE(VAEConfig(channels=8, multipliers=(1, 2)))            # latents (4, 4, 4) of 8x8 pixels
        return Trained(make_model(encoder, vocabulary=len(WORDS), **options).requires_grad_(False), WORDS, vae.eval(), Diffusion(kind))
    return make


@pytest.fixture
def eager(monkeypatch):
    """A random model that seldom ends its document, and often draws: else there is little to compare."""
    real, lean = sample.choose, torch.zeros(len(WORDS))
    lean[EOS], lean[BOI] = -3.0, 1.0
    monkeypatch.setattr(sample, "choose", lambda logits, **choice: real(logits + lean, **choice))


def parts_of(document):
    """A document to compare: its words, and the places of its pictures."""
    return [part if isinstance(part, str) else "[picture]" for part in document]


def noise(how_many=1, seed=0):
    """Starting noise (n, 4, 4, 4); picture k is the same whatever n is."""
    return torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(100 * seed + k)) for k in range(how_many)])


def go_on(decoder, b, text):
    """Row b goes on with `text`, as if the model had chosen those words; "<boi>" opens a picture."""
    for word in text.split():
        decoder.tokens[b].append(WORDS.ids[word])
        decoder.advance()


def finish(steps):
    """Run a diffusion to its end; return the (t, x, x0) on the way."""
    return list(steps)


def uncached(trained, document, latents, t):
    """(logits (n, V) at all n positions of a laid-out document, picture outputs (M, c, h, w)) of one training forward.
    document: as `lay_out` takes it; latents: its pictures as the network reads them; t: of each."""
    row = data.lay_out(document, WORDS, trained.model.config.patches, ends=False)
    batch = data.pack([row], len(row.tokens))
    xt = torch.stack(latents) if latents else torch.zeros(0, 4, 4, 4)
    return trained.model(batch.tokens, batch.image_id, batch.doc_id, torch.ones_like(batch.has_loss), xt, torch.tensor(t, dtype=torch.long))


def as_layout(document):
    """(document with its pictures replaced by ("image", index, t_max), the pictures)."""
    pictures = [part for part in document if not isinstance(part, str)]
    counter = iter(range(len(pictures)))
    return [part if isinstance(part, str) else ("image", next(counter), 0) for part in document], pictures


def check_against_uncached(trained, decoder, b):
    """The logits of row b equal those of a training forward of all it holds so far, with every picture clean."""
    document, pictures = as_layout(decoder.document(b))
    assert data.lay_out(document, WORDS, 4, ends=False).tokens == decoder.tokens[b]
    logits, _ = uncached(trained, document, pictures, [0] * len(pictures))
    assert torch.allclose(decoder.logits[b], logits[-1], atol=1e-4)


# ------------------------------------------------------------------------------------------- fast = as the paper says it
def hold_to_write(trained, prompts, seeds, tolerance, **options):
    """Check `generate` of all prompts, in one batch, against `write` of each; return what `write` wrote."""
    slow = [sample.write(trained, prompt, seed=seed, **options) for prompt, seed in zip(prompts, seeds, strict=True)]
    for one, two in zip(slow, generate(trained, prompts, seed=seeds, **options), strict=True):
        assert parts_of(one) == parts_of(two)
        for x, y in zip(one, two, strict=True):
            assert isinstance(x, str) or (x - y).abs().max() < tolerance
    return slow


@BOTH
@pytest.mark.parametrize("kind, guidance, sampler", [("ddpm", 1, "ddpm"), ("ddpm", 3.0, "ddpm"), ("flow", 3.0, "dpm++")])
def test_generate_is_what_the_paper_says(make_trained, eager, encoder, kind, guidance, sampler):
    """The cache keeps the last *noisy* step (PAPER §4.7), a step is read at another t, guidance's unconditional branch has lost its BOI
    (PAPER §4.8), EOI is not read, a limit is one off, or noise and words are drawn in another order."""
    prompts = [["a red circle"], ["a", noise(seed=5)[0], "the square"], [], ["the", noise(seed=6)[0]]] * 2
    # With other seeds now and then one number of a DDPM's x0 at t = T is not clipped, and a[T] = 5e-5 makes much of an error of 1e-6.
    slow = hold_to_write(make_trained(encoder, kind), prompts, [*range(32, 40)], 5e-5, max_words=9, max_pictures=2, temperature=1.0, top_p=0.9,
                         guidance=guidance, sampler=sampler, steps=4)
    drawn = [len(sample.pictures_of(document)) - len(sample.pictures_of(prompt)) for document, prompt in zip(slow, prompts, strict=True)]
    # There is something to compare: two pictures in one document, words after the last, a picture in the prompt.
    assert sum(n == 2 for n in drawn) >= 3 and any(n == 2 and isinstance(d[-1], str) for n, d in zip(drawn, slow, strict=True))
    assert max(n for n, prompt in zip(drawn, prompts, strict=True) if sample.pictures_of(prompt)) == 2


@BOTH
def test_wide_pictures(make_trained, eager, encoder):
    """Latents of 4x8: height taken for width in the noise, the patches or the cache."""
    prompts = [["a red circle"], ["the", torch.randn(4, 4, 8)]]
    slow = hold_to_write(make_trained(encoder, latent=(4, 4, 8)), prompts, [32, 33], 5e-5, max_words=9, max_pictures=2, temperature=1.0,
                         steps=3)
    shapes = [part.shape for document in slow for part in sample.pictures_of(document)]
    assert set(shapes) == {(4, 4, 8)} and len(shapes) >= 2, shapes


def test_room_for_the_longest_prompt(make_trained):
    """Several prompts, measured by the shortest: the longest ends in the middle of a picture. P = 4, so two pictures take 12."""
    trained = make_trained(context=20)
    sample.check_room(trained, [["a"], ["the red circle and the square"]], 2)           # <bos>, six words, 12 and EOS: 20
    for prompts in ([["a"], ["the red circle and the blue square"]], [["the red circle and the blue square"], ["a"]]):
        with pytest.raises(UserError, match="need 21 positions"):
            sample.check_room(trained, prompts, 2)


@pytest.mark.parametrize("guidance", [1, 3.0])
def test_the_shipped_model_writes_what_the_paper_says(guidance):
    """The same of a model that has learned to draw, greedily: it says BOI itself, and then EOS."""
    trained = checkpoint.load_trained(ASSETS / "scenes.pt")
    prompts = [["a red circle left of a blue square"], ["a green triangle"], []]
    slow = hold_to_write(trained, prompts, [3, 4, 5], 1e-4, max_words=30, guidance=guidance, steps=6)
    assert parts_of(slow[0]) == ["a red circle left of a blue square", "[picture]"]
    (seen,) = hold_to_write(trained, [slow[0][1:]], [3], 1e-4, max_words=30, guidance=guidance, steps=6)
    assert len(seen) == 2 and len(seen[1].split()) > 3                  # the picture in the prompt, and what it says of it


# ------------------------------------------------------------------------------------------------------ cached = uncached
@BOTH
@pytest.mark.parametrize("guidance", [1, 3.0])
@pytest.mark.parametrize("sampler, kind", [("ddpm", "ddpm"), ("ddim", "flow")])
def test_cached_is_uncached_after_generated_pictures(make_trained, encoder, guidance, sampler, kind):
    """The cache keeps the last *noisy* step, or loses what came before; a finished picture is given another t than 0 (PAPER §4.7)."""
    trained = make_trained(encoder, kind)
    decoder = Decoder(trained, [["a red circle"]])
    check_against_uncached(trained, decoder, 0)
    for text, seed in (("and a <boi>", 1), ("the blue square <boi>", 2)):
        go_on(decoder, 0, text)
        finish(decoder.diffusion_steps([0], noise(seed=seed), guidance, torch.Generator().manual_seed(3), steps=4, sampler=sampler))
        check_against_uncached(trained, decoder, 0)
        go_on(decoder, 0, "the")
        check_against_uncached(trained, decoder, 0)
    decoder.lm_step([0])
    assert [type(part) for part in decoder.document(0)] == [str, torch.Tensor, str, torch.Tensor, str]


@BOTH
def test_a_different_picture_is_noticed(make_trained, encoder):
    """That the comparisons above can fail at all: the words after a picture do depend on it, and on its t."""
    trained = make_trained(encoder)
    layout = ["a red circle", ("image", 0, 0), "the"]
    clean, other, noisy = (uncached(trained, layout, [x], [t])[0] for x, t in ((noise()[0], 0), (noise(seed=1)[0], 0), (noise()[0], 250)))
    assert (clean[-1] - other[-1]).abs().max() > 1e-2 and (clean[-1] - noisy[-1]).abs().max() > 1e-2


@BOTH
def test_each_denoising_step_is_a_training_forward(make_trained, encoder, monkeypatch):
    """A context picture with a random t (PAPER §4.7); guidance whose blind branch is shorter, shifted, or has lost its BOI (PAPER §4.8);
    patches at other positions than in training (PAPER §4.2)."""
    trained, seen = make_trained(encoder), []
    decoder = Decoder(trained, [["a red circle"]])
    go_on(decoder, 0, "<boi>")
    finish(decoder.diffusion_steps([0], noise(), 1, steps=3, sampler="ddim"))
    go_on(decoder, 0, "the blue square <boi>")
    first, real = decoder.latents[0][0], trained.model.denoise

    def listening(xt, t, pos, cache):
        out = real(xt, t, pos, cache)
        seen.append((xt, t.tolist(), out))
        return out

    monkeypatch.setattr(trained.model, "denoise", listening)
    finish(decoder.diffusion_steps([0], noise(seed=1), 3.0, steps=3, sampler="ddim"))
    assert [t for _, t, _ in seen] == [[1000] * 2, [667] * 2, [333] * 2, [0]]           # the last one leaves the clean picture
    told = ["a red circle", ("image", 0, 0), "the blue square", ("image", 1, 0)]
    blind = ["a red circle", ("image", 0, 0), ("dropped", "the blue square"), ("image", 1, 0)]
    for xt, t, out in seen[:3]:
        assert torch.equal(xt[0], xt[1])
        for k, document in enumerate((told, blind)):
            _, wanted = uncached(trained, document, [first, xt[k]], [0, t[k]])
            assert torch.allclose(out[k], wanted[1], atol=1e-4), f"t = {t[k]}, {'blind' if k else 'told'}"
        assert not torch.allclose(out[0], out[1], atol=1e-2)                            # the caption matters


def test_guidance_mixes_the_two_branches(make_trained):
    """Guidance with told and blind swapped: 1 must be the plain model, 0 must not read the caption at all (PAPER §4.8)."""
    trained = make_trained()

    def picture(caption, guidance):
        decoder = Decoder(trained, [[caption]], draw_now=True)
        return finish(decoder.diffusion_steps([0], noise(), guidance, steps=4, sampler="ddim"))[-1][1]

    plain = picture("a red circle", 1)
    assert torch.allclose(picture("a red circle", 1 + 1e-9), plain, atol=1e-3)          # 1 + 1e-9 takes the path of two branches
    assert torch.allclose(picture("a red circle", 0), picture("the blue square", 0), atol=1e-4)
    assert (plain - picture("the blue square", 1)).abs().max() > 1e-2
    assert (plain - picture("a red circle", 3)).abs().max() > 1e-2


@BOTH
def test_guidance_leaves_the_sequence_alone(make_trained, encoder):
    """The blind branch forgets the caption in the real cache too, and the words that follow never heard of it (PAPER §4.8)."""
    trained = make_trained(encoder)
    decoder = Decoder(trained, [["a red circle"]], draw_now=True)
    finish(decoder.diffusion_steps([0], noise(), 5.0, steps=3, sampler="ddim"))
    go_on(decoder, 0, "and the square")
    check_against_uncached(trained, decoder, 0)


# ----------------------------------------------------------------------------------------------------------------- batches
@BOTH
def test_ragged_prompts_are_the_same_one_at_a_time(make_trained, encoder):
    """Padding that is read as text, positions counted from the row's end, a neighbour's picture."""
    trained = make_trained(encoder)
    prompts = [["a"], ["the blue square and a red circle"], [noise(seed=7)[0], "the square"], ["a", noise(seed=8)[0], noise(seed=9)[0], "red"]]
    together = Decoder(trained, prompts)
    alone = [Decoder(trained, [prompt]) for prompt in prompts]
    for b, decoder in enumerate(alone):
        assert torch.allclose(together.logits[b], decoder.logits[0], atol=1e-4)
        check_against_uncached(trained, together, b)
    for b, text in enumerate(("and a <boi>", "<boi>", "", "the <boi>")):
        go_on(together, b, text)
        go_on(alone[b], 0, text)
    rows = [3, 0, 1]                                    # not all of them draw, and not in order
    finish(together.diffusion_steps(rows, noise(3), 3.0, steps=3, sampler="ddim"))
    for k, b in enumerate(rows):
        finish(alone[b].diffusion_steps([0], noise(3)[k: k + 1], 3.0, steps=3, sampler="ddim"))
    for b, decoder in enumerate(alone):
        assert together.tokens[b] == decoder.tokens[0]
        assert all(torch.allclose(x, y, atol=1e-2) for x, y in zip(together.latents[b], decoder.latents[0]))
        assert torch.allclose(together.logits[b], decoder.logits[0], atol=1e-3)
        check_against_uncached(trained, together, b)


def test_lm_step_touches_only_active_rows(make_trained):
    """A finished row that goes on writing because its neighbour does."""
    trained = make_trained()
    decoder = Decoder(trained, [["a red"], ["the"]])
    before = list(decoder.tokens[0])
    (token,) = decoder.lm_step([1])
    assert decoder.tokens[0] == before and decoder.tokens[1][-1] == token
    for b in range(2):
        assert len(decoder.tokens[b]) == (3, 3)[b]
        lone = Decoder(trained, [["a red"]] if b == 0 else [["the"]])
        if b == 1:
            lone.lm_step([0])
        assert torch.allclose(decoder.logits[b], lone.logits[0], atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_its_neighbours(make_trained, sampler):
    """Noise drawn for the batch as a whole: the same prompt and seed give another picture in other company."""
    trained = make_trained()
    options = dict(draw_now=True, max_words=0, steps=4, seed=3, sampler=sampler)
    alone = generate(trained, [["a red circle"]], **options)[0][1]
    for neighbours in ([["the"]], [["a blue square"], ["and"]]):
        assert torch.allclose(generate(trained, [["a red circle"], *neighbours], **options)[0][1], alone, atol=1e-3)
    assert (generate(trained, [["a red circle"]], **{**options, "seed": 4})[0][1] - alone).abs().max() > 1e-2
    two = generate(trained, [["a red circle"], ["a red circle"]], **options)
    assert (two[0][1] - two[1][1]).abs().max() > 1e-2   # and two rows with the same words are not the same picture


# ------------------------------------------------------------------------------------------------------------ two modes
def script(monkeypatch, *rows):
    """Make the model "choose" the given words, one list per row; "<eos>" from then on."""
    queues = [[WORDS.ids[word] for word in row.split()] for row in rows]
    counts, now, real = [0] * len(rows), [], Decoder.lm_step

    def scripted(logits, **choice):                     # one row of logits per row that writes
        assert len(logits) == len(now)
        return torch.tensor([queues[b][0] if queues[b] else EOS for b in now])

    def lm_step(decoder, active, **choice):
        now[:] = active
        tokens = real(decoder, active, **choice)
        for b in active:
            counts[b] += 1
            queues[b][:1] = []
        return tokens

    monkeypatch.setattr(sample, "choose", scripted)
    monkeypatch.setattr(Decoder, "lm_step", lm_step)
    return counts


def test_the_model_switches_modes_itself(make_trained, monkeypatch):
    """BOI or EOI put in twice when sampling (PAPER §4.2), the text before or after a picture lost, rows waiting for each other."""
    trained = make_trained()
    script(monkeypatch, "red circle <boi> and a square <boi> the", "blue", "<boi> the")
    decoders, real = [], Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, *a, **o: decoders.append(self) or real(self, *a, **o))
    documents = generate(trained, [["a"], ["the"], ["a red circle"]], max_pictures=2, steps=2)
    shown = [[part if isinstance(part, str) else tuple(part.shape) for part in document] for document in documents]
    assert shown == [["a red circle", (4, 4, 4), "and a square", (4, 4, 4), "the"], ["the blue"], ["a red circle", (4, 4, 4), "the"]]
    for b, document in enumerate(documents):            # sampled layout = training layout
        assert decoders[0].tokens[b] == data.lay_out(as_layout(document)[0], WORDS, 4).tokens


def test_decoded_document_lays_out_as_it_was_sampled(make_trained):
    """Sampled layout is not the training layout (PAPER §4.2): one BOI, P patches, one EOI, nothing more."""
    decoder = Decoder(make_trained(), [["a red circle"]], draw_now=True)
    finish(decoder.diffusion_steps([0], noise(), 1, steps=2))
    assert decoder.tokens[0][-7:] == [WORDS.ids["circle"], BOI, PATCH, PATCH, PATCH, PATCH, EOI]
    document, pictures = as_layout(decoder.document(0))
    assert document == ["a red circle", ("image", 0, 0)] and len(pictures) == 1


def test_generate_stops(make_trained, monkeypatch):
    """A limit that is off by one, or a document that never ends."""
    trained = make_trained()
    script(monkeypatch, "a " * 99)
    assert generate(trained, [["the"]], max_words=5) == [["the a a a a a"]]
    script(monkeypatch, "a <boi> a <boi> a <boi> a")
    kinds = [type(part) for part in generate(trained, [["the"]], max_pictures=2, steps=2)[0]]
    assert kinds == [str, torch.Tensor, str, torch.Tensor, str]
    script(monkeypatch, "a " * 99)
    assert len(generate(trained, [[]], max_words=99)[0][0].split()) == trained.model.config.context - 1


def test_a_full_context_ends_the_document(make_trained):
    """A prompt, or a prompt with its picture, that fills the context to the last place: the next word is out of bounds."""
    trained = make_trained(context=12)
    assert generate(trained, [["a " * 11]]) == [[("a " * 11).strip()]]
    words, picture = generate(trained, [["a " * 5]], draw_now=True, steps=2)[0]              # 1 + 5 + BOI + 4 + EOI = 12
    assert words == "a a a a a" and picture.shape == (4, 4, 4)
    longer = generate(trained, [["a"], ["a " * 11]], max_pictures=0)                        # the other row still writes
    assert longer[1] == [("a " * 11).strip()] and longer[0][0].startswith("a")


def test_prompt_pictures_are_read_clean(make_trained, monkeypatch):
    """A picture in the prompt is given a random t, or noise (PAPER §4.7)."""
    trained, told = make_trained(), []
    real = trained.model.patch_encoder.encode
    monkeypatch.setattr(trained.model.patch_encoder, "encode", lambda x, t: told.append((x.clone(), t.tolist())) or real(x, t))
    latents = noise(2)
    Decoder(trained, [["a", latents[0], "red", latents[1]]])
    assert len(told) == 1 and told[0][1] == [0, 0] and torch.equal(told[0][0], latents)


def test_trajectory_starts_at_noise_and_ends_in_the_document(make_trained):
    """A film that shows other pictures than the one that is kept."""
    decoder, start, seen = Decoder(make_trained(), [["a"]], draw_now=True), noise(), []
    before = start.clone()
    for t, x, _ in decoder.diffusion_steps([0], start, 3.0, steps=4):
        seen.append((t, x))
    assert [t for t, _ in seen] == [1000, 750, 500, 250, 0]
    assert torch.equal(seen[0][1], before) and torch.equal(start, before)
    assert torch.equal(seen[-1][1][0], decoder.latents[0][0]) and seen[-1][1].abs().max() <= 4      # clipped to `reach`


# ---------------------------------------------------------------------------------------------------------- words, mistakes
def test_choose():
    """Greedy that is not, a top_p that drops the word crossing it, PAD or EOI written into a text."""
    V = len(WORDS)
    logits = torch.full((1, V), -9.0)
    logits[0, 8:11] = torch.tensor([0.5, 0.3, 0.2]).log()
    before = logits.clone()
    assert choose(logits).tolist() == [8]
    g = torch.Generator().manual_seed(0)

    def drawn(**options):
        return {choose(logits, generators=[g], **options).item() for _ in range(300)}

    assert drawn(temperature=1.0) >= {8, 9, 10}
    assert drawn(temperature=1.0, top_p=0.7) == {8, 9}  # 0.5 is not enough, so the second word is kept
    assert drawn(temperature=1.0, top_p=1e-6) == {8}
    assert drawn(temperature=0.01) == {8}
    assert torch.equal(logits, before)


def test_special_tokens_are_never_chosen():
    """EOI or PATCH as a word: only BOI and EOS may be predicted (PAPER §4.2)."""
    logits = torch.zeros(1, len(WORDS))
    logits[0, :len(data.SPECIAL)] = 50.0
    g, allowed = torch.Generator().manual_seed(0), {BOI, EOS}
    assert choose(logits).item() in allowed
    assert {choose(logits, temperature=1.0, generators=[g]).item() for _ in range(100)} == allowed


def test_too_long_a_prompt_raises(make_trained):
    """An index error deep in the cache instead of a sentence with the two numbers."""
    trained = make_trained(context=12)
    with pytest.raises(UserError, match="needs 13 positions, but this model's context is 12: shorten it to 11 tokens"):
        Decoder(trained, [["a " * 12]])
    with pytest.raises(UserError, match="needs 13 positions, but this model's context is 12: shorten it to 5 tokens"):
        Decoder(trained, [["a"], ["a " * 6]], draw_now=True)


@pytest.mark.parametrize("before, draw_now", [(0, False), (0, True), (1, False), (1, True), (2, False)])
def test_the_advice_to_shorten_is_right(make_trained, before, draw_now):
    """A number that counts BOS or BOI among the words: who follows the advice is told the same again."""
    trained = make_trained(context=20)
    with pytest.raises(UserError) as mistake:
        Decoder(trained, [[*noise(9)[:before], "a " * 30]], draw_now=draw_now)
    fit = int(re.search("shorten (?:it|its words) to ([0-9]+) tokens", str(mistake.value))[1])
    Decoder(trained, [[*noise(9)[:before], "a " * fit]], draw_now=draw_now)
    with pytest.raises(UserError, match=f"to {fit} tokens"):
        Decoder(trained, [[*noise(9)[:before], "a " * (fit + 1)]], draw_now=draw_now)


def test_unknown_words_raise(make_trained):
    """An unknown word left out of the prompt without a sound."""
    with pytest.raises(UserError, match="'purple' is not in this model's vocabulary of 7 words"):
        Decoder(make_trained(), [["a purple circle"]])


@pytest.mark.parametrize("word", data.SPECIAL)
def test_special_tokens_are_not_words(make_trained, word):
    """A prompt with "<eoi>" or "<patch>" in it forges the layout, and crashes far from here."""
    with pytest.raises(UserError, match="is not in this model's vocabulary"):
        generate(make_trained(), [[f"a {word} circle"]], max_words=2)


def test_prompts_are_left_alone(make_trained):
    """A prompt list that grows with what was generated: the second call continues the first one's answer."""
    trained, latent = make_trained(), noise()[0]
    prompts, before = [["a", latent, "red"]], latent.clone()
    generate(trained, prompts, max_words=3, steps=2)
    assert len(prompts) == 1 and len(prompts[0]) == 3 and torch.equal(latent, before)


# ------------------------------------------------------------------------------------ guidance over words, picture, both
BEFORE = [["a red circle", noise(seed=5)[0], "the blue square"], [noise(seed=6)[0], "the"]]


def seen_by_denoise(trained, monkeypatch):
    """Listen to every denoising forward: the list that (x, t, output) come to lie in."""
    seen, real = [], trained.model.denoise

    def listening(x, t, pos, cache):
        out = real(x, t, pos, cache)
        seen.append((x, t.tolist(), out))
        return out
    monkeypatch.setattr(trained.model, "denoise", listening)
    return seen


@BOTH
@pytest.mark.parametrize("over", sample.GUIDE_OVER)
def test_the_blind_branch_is_a_training_forward(make_trained, encoder, over, monkeypatch):
    """The unconditional branch of an edit: words that are still read, a picture that still is, one that is noise at another
    t than training had (t = T), a branch at other positions, an earlier picture or caption forgotten with the last (PAPER §4.8)."""
    trained = make_trained(encoder)
    decoder, seen, start = Decoder(trained, BEFORE, draw_now=True), seen_by_denoise(trained, monkeypatch), noise(2, seed=1)
    told, real = [], trained.model.read
    monkeypatch.setattr(trained.model, "read", lambda tokens, ids, latents, *a: told.append((latents.clone(), a[2:])) or real(tokens, ids, latents, *a))
    finish(decoder.diffusion_steps([0, 1], start, 3.0, steps=2, sampler="ddim", over=over))
    forgotten, t_read = told[0][0], told[0][1]          # the blind branch is read first
    assert len(forgotten) == (0 if over == "words" else 2) and (over == "words" or t_read == (1000,))
    for k, ((*_, picture, words), first) in enumerate(zip(BEFORE, (["a red circle"], []))):
        for m, (x, t, out) in enumerate(seen[:2]):
            assert torch.equal(x[k], x[2 + k])
            for row, blind in ((k, False), (2 + k, True)):
                gone = blind and over != "words"
                document = [*first, ("image", 0, 0), ("dropped", words) if blind and over != "picture" else words, ("image", 1, 0)]
                _, wanted = uncached(trained, document, [forgotten[k] if gone else picture, x[k]], [1000 if gone else 0, t[row]])
                assert torch.allclose(out[row], wanted[1], atol=1e-4), f"row {k}, step {m}, {'blind' if blind else 'told'}"
            assert not torch.allclose(out[k], out[2 + k], atol=1e-2)    # what was left out matters
    if over != "words":                                 # and it is noise of its own: not the picture's, not the new one's
        assert 0.5 < forgotten.std() < 1.5 and not any(torch.allclose(forgotten[k], x, atol=0.1) for k in range(2) for x in (start[k], BEFORE[k][-2]))


@BOTH
def test_guidance_one_is_the_same_over_anything(make_trained, encoder):
    """Guidance 1 is the plain model, whatever would have been left out; 0 reads nothing of what is; 3 tells them apart."""
    trained = make_trained(encoder)

    def edited(prompt, over, guidance):
        return generate(trained, [prompt], draw_now=True, max_words=0, steps=3, sampler="ddim", over=over, guidance=guidance)[0][-1]

    words, other = [BEFORE[1][0], "the blue square"], [BEFORE[1][0], "a red circle"]
    picture = [BEFORE[0][1], "the blue square"]
    plain = [edited(words, over, 1) for over in sample.GUIDE_OVER]
    assert all(torch.equal(x, plain[0]) for x in plain)
    for over in sample.GUIDE_OVER:
        assert torch.allclose(edited(words, over, 1 + 1e-9), plain[0], atol=1e-2)
        blind = edited(words, over, 0)
        assert torch.allclose(edited(other, over, 0), blind, atol=1e-3) == (over != "picture")
        assert torch.allclose(edited(picture, over, 0), blind, atol=1e-3) == (over != "words")
    strong = [edited(words, over, 3) for over in sample.GUIDE_OVER]
    assert all((strong[k] - strong[k - 1]).abs().max() > 1e-2 for k in range(3))


@pytest.mark.parametrize("prompt", [["a"], ["a red circle and the blue square"], [], ["a red circle", "and the blue square"]], ids=str)
@pytest.mark.parametrize("over", ["picture", "both"])
def test_guidance_over_a_picture_needs_one(make_trained, prompt, over):
    """An index error, or words forgotten in place of the picture that is not there. At guidance 1 nothing is left out."""
    options = dict(draw_now=True, max_words=0, steps=2, over=over)
    with pytest.raises(UserError, match="needs a picture before the words"):
        generate(make_trained(), [prompt], **options)
    with pytest.raises(UserError, match="needs a picture before the words"):         # one row of two
        generate(make_trained(), [[noise()[0], "a"], prompt], **options)
    assert generate(make_trained(), [prompt], guidance=1, **options)[0][-1].shape == (4, 4, 4)


# ------------------------------------------------------------------------------------------------- mixtures, and events
MIXED = [["a red circle"], [noise(seed=3)[0]], [noise(seed=4)[0], "the blue square"], [], ["a", noise(seed=5)[0], noise(seed=6)[0], "red"]]
GROWING = dict(max_words=9, max_pictures=2, steps=3, guidance=1.5, temperature=1.0, top_p=0.9)


def equal(one, two):
    """Whether two documents have the same words and, nearly, the same pictures."""
    return parts_of(one) == parts_of(two) and all(torch.allclose(x, y, atol=0.05) for x, y in zip(one, two) if not isinstance(x, str))


@BOTH
@pytest.mark.parametrize("kind, options", [("ddpm", dict()), ("flow", dict(temperature=0.7, top_p=1.0, guidance=1)), ("ddpm", dict(draw_now=True))], ids=str)
def test_mixed_prompts_are_the_same_one_at_a_time(make_trained, eager, encoder, kind, options):
    """A row that draws other noise, or says other words, because its neighbour is still writing: rows wait for each other,
    and each must have a generator that nobody else uses up, not even while it waits."""
    trained, options = make_trained(encoder, kind), {**GROWING, **options}
    seeds = [11, 3, 8, 5, 3]
    together = generate(trained, MIXED, seed=seeds, **options)
    for b, prompt in enumerate(MIXED):
        (alone,) = generate(trained, [prompt], seed=[seeds[b]], **options)
        assert equal(alone, together[b]), f"row {b}: {parts_of(alone)} alone, {parts_of(together[b])} in company"
    order = [3, 0, 4]                                   # other company, another order
    for b, document in zip(order, generate(trained, [MIXED[b] for b in order], seed=[seeds[b] for b in order], **options)):
        assert equal(document, together[b])
    grown = [len(parts_of(document)) - len(prompt) for document, prompt in zip(together, MIXED)]
    drawn = [sum(part == "[picture]" for part in parts_of(d)) - sum(part == "[picture]" for part in parts_of(p)) for d, p in zip(together, MIXED)]
    assert len(set(map(str, map(parts_of, together)))) == 5 and sum(grown) >= 5 and sum(n > 0 for n in drawn) >= 2, drawn


def test_a_seed_is_one_per_row(make_trained):
    """Two rows with one seed must be twins, with two seeds not; an int gives every row its own."""
    trained, prompts = make_trained(), [["a red circle"]] * 2
    twins = generate(trained, prompts, seed=[7, 7], **GROWING)
    assert equal(*twins)
    assert not equal(*generate(trained, prompts, seed=[7, 8], **GROWING)) and not equal(*generate(trained, prompts, seed=7, **GROWING))


def test_events_tell_the_truth(make_trained, eager):
    """A trace, a film or a notebook that shows another run than the one that happened: caches that did not grow so, steps of
    rows that were not drawn, a picture announced twice or too early."""
    trained = make_trained()
    decoder, modes, lengths, drawn, patches = Decoder(trained, MIXED), [], {}, {}, 4
    start, times = [len(row) for row in decoder.tokens], []
    for event in sample.grow(decoder, [11, 3, 8, 5, 3], **GROWING):
        modes.append(event.mode)
        assert event.filled == [len(decoder.tokens[b]) for b in event.rows] and sorted(set(event.rows)) == sorted(event.rows)
        before = {b: lengths.get(b, start[b]) for b in event.rows}
        if event.mode == "prompt":
            assert event.rows == list(range(5)) and event.filled == start and modes == ["prompt"]
        elif event.mode == "word":
            assert event.filled == [before[b] + 1 for b in event.rows]
            assert event.tokens == [decoder.tokens[b][-1] for b in event.rows]
        elif event.mode == "noise":                     # over the same places, from T to 0; BOI stands before them
            assert event.filled == [before[b] for b in event.rows]
            assert all(decoder.tokens[b][-1] == BOI for b in event.rows)
            assert event.x.shape == event.x0.shape == (len(event.rows), 4, 4, 4)
            times = times + [event.t] if modes[-2] == "noise" else [event.t]
            last = event
        else:
            assert times == [1000, 667, 333, 0] and event.rows == last.rows
            assert event.filled == [before[b] + patches + 1 for b in event.rows]
            for k, b in enumerate(event.rows):          # the picture is the last x, and stands in the document
                assert decoder.tokens[b][-patches - 2:] == [BOI] + [PATCH] * patches + [EOI]
                assert torch.equal(decoder.latents[b][-1], last.x[k])
                drawn[b] = drawn.get(b, 0) + 1
        lengths |= dict(zip(event.rows, event.filled))
    assert {"prompt", "word", "noise", "picture"} == set(modes) and modes.count("noise") == 4 * modes.count("picture") >= 8
    for b, prompt in enumerate(MIXED):
        given = sum(not isinstance(part, str) for part in prompt)
        assert len(decoder.latents[b]) == given + drawn.get(b, 0) and lengths[b] == len(decoder.tokens[b])


@pytest.mark.parametrize("max_words, max_pictures, context", [(0, 1, 64), (5, 0, 64), (30, 3, 64), (99, 9, 33), (99, 9, 20), (7, 1, 19)])
def test_limits_of_open_documents(make_trained, max_words, max_pictures, context):
    """More words or pictures than were allowed, positions beyond the context, a BOI that no picture follows although words do,
    a document that goes on after EOS."""
    decoder = Decoder(make_trained(context=context), [["a"], [], [noise()[0]], ["the red"]] * 3)
    start = [(len(row), len(pictures)) for row, pictures in zip(decoder.tokens, decoder.latents)]
    for _ in sample.grow(decoder, [200006 + b for b in range(len(decoder.tokens))], max_words=max_words, max_pictures=max_pictures, temperature=1.0, steps=2):
        pass
    full, opened = 0, 0
    for row, pictures, (n, given) in zip(decoder.tokens, decoder.latents, start):
        assert len(row) <= context and sum(token >= len(data.SPECIAL) for token in row[n:]) <= max_words
        assert given <= len(pictures) <= given + max_pictures
        assert row.count(PATCH) == 4 * len(pictures) and row.count(EOI) == len(pictures) and EOS not in row[:-1]
        closed = row[:-1] if row[-1] == BOI else row    # the last token may be a BOI that had no room, or came too often
        assert closed.count(BOI) == len(pictures)
        assert all(closed[k + 1: k + 6] == [PATCH] * 4 + [EOI] for k, token in enumerate(closed) if token == BOI)
        full, opened = full + (len(row) >= context - 5), opened + (len(pictures) > given)
    assert full or context > 33
    assert (opened > 0) == (max_pictures > 0 and max_words > 0)


@pytest.mark.parametrize("draw_now, max_words, max_pictures, size", [
    (True, 0, 1, 4 + 6 + 1), (True, 3, 0, 4 + 3 + 6 + 1), (False, 5, 0, 3 + 5 + 1), (True, 20, 3, 4 + 20 + 18 + 1), (False, 99, 9, 64)])
def test_the_cache_holds_what_may_come(make_trained, monkeypatch, draw_now, max_words, max_pictures, size):
    """A cache of the whole context, which at 4096 positions no GPU has room for; and one that is a position short: the same documents
    as with the whole. The longest prompt is <bos> the red; P = 4."""
    trained, sizes, made, real = make_trained(context=64), [], [], sample.Cache
    monkeypatch.setattr(sample, "Cache", lambda config, B, S, like: sizes.append(S) or real(config, B, S, like))

    class Roomy(Decoder):
        def __init__(self, trained, prompts, draw_now, room):
            super().__init__(trained, prompts, draw_now)

    for whole in (False, True):
        made.append(generate(trained, [["a"], [], ["the red"]] * 6, draw_now=draw_now, max_words=max_words, max_pictures=max_pictures,
                             temperature=1.0, steps=2, seed=3, decoder=Roomy if whole else Decoder))
    assert sizes == [size, 64]
    for short, long in zip(*made):
        assert parts_of(short) == parts_of(long)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(short, long) if not isinstance(a, str))


@BOTH
def test_the_second_picture_reads_the_first_one_clean(make_trained, encoder, monkeypatch):
    """PAPER §4.7 in one document that the model writes itself: while the second picture is denoised, the cache must hold the
    finished first one (t = 0), not its last noisy step, in the told and in the blind branch."""
    trained = make_trained(encoder)
    seen = seen_by_denoise(trained, monkeypatch)
    script(monkeypatch, "circle <boi> and a square <boi> the")
    (document,) = generate(trained, [["a red"]], max_pictures=2, steps=2, sampler="ddim", seed=1)
    assert parts_of(document) == ["a red circle", "[picture]", "and a square", "[picture]", "the"]
    first = document[1]
    assert [t[0] for _, t, _ in seen] == [1000, 500, 0, 1000, 500, 0]
    for x, t, out in seen[3:5]:
        for k, words in enumerate(("and a square", ("dropped", "and a square"))):
            _, wanted = uncached(trained, ["a red circle", ("image", 0, 0), words, ("image", 1, 0)], [first, x[k]], [0, t[k]])
            assert torch.allclose(out[k], wanted[1], atol=1e-4)
            _, noisy = uncached(trained, ["a red circle", ("image", 0, 0), words, ("image", 1, 0)], [seen[1][0][0], x[k]], [500, t[k]])
            assert not torch.allclose(out[k], noisy[1], atol=1e-3)


def test_a_film_ends_with_its_picture(tmp_path, monkeypatch):
    """Catches a film that stands still on another moment than the last, and a strip of other moments, or of another size."""
    monkeypatch.setattr(figures, "decode_latents", lambda trained, x: x.expand(-1, 8, 8, 3).to(torch.uint8).numpy())
    frames = [SimpleNamespace(t=t, x=torch.full((1, 1, 1, 1), 10.0 * t), x0=torch.zeros(1, 1, 1, 1)) for t in range(18, -1, -1)]
    figures.save_film(None, frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        film.seek(film.n_frames - 1)
        assert film.convert("L").getextrema() == (0, 0) and film.info["duration"] == 6 * 200      # Pillow keeps equal frames as one
        assert film.info["loop"] == 0                   # for ever
        film.seek(0)
        assert film.convert("L").getextrema() == (180, 180)
    figures.save_film(None, frames, tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (4 * (10 * 10 + 2), 4 * (2 * 10 + 2))
        greys = [strip.convert("L").getpixel((4 * (10 * k + 6), 4 * 6)) for k in range(10)]
    assert greys == list(range(180, -1, -20))


def test_a_title_has_two_lines_if_it_is_long():
    """Catches a short caption that is cut in two, and a single long word after an empty line."""
    assert figures.two_lines("a red circle") == "a red circle" and figures.two_lines("x" * 40) == "x" * 40
    assert figures.two_lines("a red circle above a blue square") == "a red circle\nabove a blue square"


def test_draw_draws_and_writes_nothing(monkeypatch):
    """Catches words after the picture: the last part of the document would be no picture."""
    asked = []

    def generate(trained, prompts, **options):
        asked.append((prompts, options))
        return [[*prompt, torch.tensor([float(len(prompt[0]))])] for prompt in prompts]

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample, "decode_latents", lambda trained, latents: latents)
    assert sample.draw(None, ["a", "abc"], steps=3).tolist() == [[1], [3]]
    assert asked == [([["a"], ["abc"]], dict(draw_now=True, max_words=0, steps=3))]


def test_edit_is_the_picture_after_the_words(make_trained):
    """An edit that gives back the picture before, or mixes up the rows of a batch."""
    trained, before, said = make_trained(), noise(2, seed=3), ["the blue square", "a red circle"]
    after = sample.edit(trained, before, said, steps=3, seed=[1, 2])
    assert after.shape == before.shape
    for k in range(2):
        (document,) = generate(trained, [[before[k], said[k]]], draw_now=True, max_words=0, steps=3, over="both", seed=[k + 1])
        assert torch.allclose(document[-1], after[k], atol=1e-2) and not torch.allclose(before[k], after[k], atol=1e-1)


# ----------------------------------------------------------------------------------------------------------- command line
@pytest.fixture
def here(make_trained, tmp_path, monkeypatch):
    """The trained model, saved as model.pt in this test's own folder, with pictures: plain.png is what the model reads, the others not."""
    trained, rng = make_trained(), np.random.default_rng(0)
    checkpoint.save_trained(tmp_path / "model.pt", trained)
    pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    Image.fromarray(pixels).resize((20, 12)).save(tmp_path / "wide.png")
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    monkeypatch.chdir(tmp_path)
    return checkpoint.load_trained(tmp_path / "model.pt")       # in 16 bits, as the command line loads it


def command_line(arguments):
    """Run sample.py's main on model.pt, in few steps."""
    sample.main([*arguments, "--checkpoint", "model.pt", "--steps", "2"])


def command(*arguments):
    """The same, with words as arguments."""
    command_line(arguments)


def test_prompts_with_pictures(here, capsys):
    """Words and pictures in another order than they were written, a picture read at another size or on its side, and a
    conversion that nobody is told of."""
    def read(text):
        return sample.read_prompt(text, here)

    parts = read("a red [plain.png] the  blue square [turned.png]")
    assert parts_of(parts) == ["a red", "[picture]", "the  blue square", "[picture]"]
    said = capsys.readouterr().out
    assert "turned.png: 8x8 RGB, converted to 8x8 RGB" in said and "plain.png" not in said
    pixels = np.asarray(Image.open("plain.png"))
    latents = checkpoint.encode_pixels(here, np.stack([pixels, np.rot90(pixels, -1)]))
    assert torch.allclose(parts[1], latents[0], atol=1e-5) and torch.allclose(parts[3], latents[1], atol=1e-5)
    assert parts_of(read("[wide.png][clear.png]")) == ["[picture]"] * 2 and read("a circle") == ["a circle"] and read(" ") == []
    said = capsys.readouterr().out
    assert "wide.png: 20x12 RGB, converted to 8x8 RGB" in said and "clear.png: 8x8 RGBA, converted" in said
    figures.save_picture(pixels, "drawn.png")                                       # enlarged, for the eye: read as it was drawn
    assert torch.equal(read("[drawn.png]")[0], parts[1]) and capsys.readouterr().out == ""
    touched = np.array(Image.open("drawn.png"))
    touched[-1, -1] ^= 255                                                          # one pixel, in a last row and column
    Image.fromarray(touched).save("touched.png")
    read("[touched.png]")
    assert "converted to 8x8 RGB" in capsys.readouterr().out
    Path("photo[1].png").write_bytes(Path("plain.png").read_bytes())               # as a browser names a second download
    assert torch.equal(read("[photo[1].png] and [plain.png]")[0], parts[1]) and len(read("[photo[1].png] and [plain.png]")) == 3
    with pytest.raises(UserError, match="absent.png"):
        read("a [absent.png]")


def sheet(path, k=None):
    """Picture k of a sheet that sample.py wrote of pictures of 8 x 8, or the only one, as it was before it was enlarged."""
    pixels = np.asarray(Image.open(path))[::8, ::8]
    return pixels if k is None else pixels[1: 9, 1 + 9 * k: 9 + 9 * k]


def test_command_line(here, tmp_path, capsys):
    """Every way to call sample.py, and what it leaves behind: the picture of the last edit (not of the first), a film, a trace
    with all modes."""
    command("a red circle", "the [plain.png] blue square", "--film", "film.gif", "--trace", "-o", "two.png")
    said = capsys.readouterr().out
    assert "a red circle [picture]" in said and "the [picture] blue square [picture]" in said and "wrote two.png (3 pictures" in said
    lines = [line for line in said.splitlines() if line.startswith("rows 0,1")]
    assert ["prompt read" in lines[0], "t = 1000" in lines[1], "t = 0" in lines[2], "t = 0, then <eoi>" in lines[3]] == [True] * 4
    assert "cache 5,11" in lines[0] and "cache 10,16" in lines[3] and len(lines) == 4
    assert Image.open("film.gif").n_frames > 2 and Image.open("two.png").size == (3 * 8 * 8 + 4 * 8, 8 * 8 + 2 * 8)
    capsys.readouterr()
    command("--image", "plain.png")
    assert capsys.readouterr().out.startswith("plain.png: [picture]") and not (tmp_path / "sample.png").exists()
    command("--image", "plain.png", "--image", "wide.png", "--edit", "the blue square", "--edit", "a red circle")
    assert "plain.png: [picture] the blue square [picture] a red circle [picture]" in capsys.readouterr().out
    latents = torch.stack([sample.read_picture(name, here) for name in ("plain.png", "wide.png")])
    for text in ("the blue square", "a red circle"):
        latents = sample.edit(here, latents, [text] * 2, steps=2, seed=0)
    for k, wanted in enumerate(checkpoint.decode_latents(here, latents).astype(int)):
        assert np.abs(sheet("sample.png", k).astype(int) - wanted).max() <= 2
    command("--image", "plain.png", "--edit", "the blue square", "-o", "one.png")
    (after,) = sample.edit(here, sample.read_picture("plain.png", here)[None], ["the blue square"], steps=2, seed=0)
    assert np.abs(sheet("one.png").astype(int) - checkpoint.decode_latents(here, after[None])[0]).max() <= 2


@pytest.mark.parametrize("line, kept", [
    (["--image", "sample.png", "--edit", "a red circle"], "sample.png"),
    (["[sample.png] a red circle"], "sample.png"),
    (["--image", "./sample.png", "--image", "sample_2.png", "--edit", "the square"], "sample_2.png"),
    (["a red circle"], "sample.png")], ids=str)
def test_a_default_overwrites_nothing(here, capsys, tmp_path, line, kept):
    """A picture of the user's that the edit of it has replaced, because nobody said -o."""
    for name in ("sample.png", kept):
        Image.new("RGB", (8, 8), "red").save(name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    command(*line)
    new = [path for path in tmp_path.iterdir() if path not in before]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert [path.name for path in new] == ["sample_2.png" if kept == "sample.png" else "sample_3.png"]
    assert f"wrote {new[0].name}" in capsys.readouterr().out
    command(*line, "-o", "sample.png")                  # who says so may overwrite
    assert (tmp_path / "sample.png").read_bytes() != before[tmp_path / "sample.png"]


@pytest.mark.parametrize("name", ["kreis_\u00fc.png", "photo[1].png", "\udcff.png"], ids=ascii)
def test_names_of_pictures(here, tmp_path, monkeypatch, name):
    """A drawn picture that is lost because stdout cannot print the name of another; brackets in a name that are read as a prompt's."""
    Image.new("RGB", (20, 12), "red").save(name)
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="ascii", write_through=True))
    run_command(command_line, ["--image", name, "--edit", "the blue square"])
    assert (tmp_path / "sample.png").exists() and b"converted" in said.getvalue()
    assert f"{name}: [picture] the blue square [picture]".encode("ascii", "backslashreplace") in said.getvalue()
    command("--image", name)


def test_figures_leave_a_notebook_alone():
    """Pictures under the wrong cell of a notebook: this module made a choice for all of the program when it was imported."""
    code = ("import sys, support.figures; support.figures.new_figure(2, 1); "
            "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(sample.__file__).parent)


def test_the_picture_is_saved_before_it_is_told_of(here, tmp_path, monkeypatch):
    """An output that is closed, or full, and the picture is gone."""
    def broken(*_, **__):
        raise OSError("no space left on device")
    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(OSError):
        command("a red circle", "--film", "film.png")
    assert (tmp_path / "sample.png").exists() and (tmp_path / "film.png").exists()


def test_open_command_line(here, tmp_path, capsys, monkeypatch):
    """A model that draws by itself, one that does not, and a film of a picture that was never drawn."""
    script(monkeypatch, "circle <boi> and <boi> a <boi>")
    command("a red", "--open", "--pictures", "2", "--film", "film.png")
    assert "a red circle [picture] and [picture] a" in capsys.readouterr().out and (tmp_path / "film.png").exists()
    script(monkeypatch, "circle")
    command("a red", "--open", "--film", "none.gif", "-o", "none.png")
    assert "a red circle" in capsys.readouterr().out and not list(tmp_path.glob("none.*"))
    script(monkeypatch, "circle")
    command("[plain.png] a red", "--open", "--film", "none.gif", "-o", "none.png")        # the only picture is the prompt's
    assert "[picture] a red circle" in capsys.readouterr().out and not (tmp_path / "none.gif").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux' /proc")
def test_reading_a_checkpoint_takes_one_copy_of_it(tmp_path):
    """First weights that are drawn for nothing, and 16 bits beside 32: ten bytes per parameter at the peak, 530 GB for eight processes that
    read the 7B. Here 0.16B, Table 8's smallest."""
    words = data.Words([f"w{k}" for k in range(32000)])
    shape = sized("0.16b", vocabulary=len(words), latent=(4, 8, 8), context=4096)
    with torch.device("meta"):
        empty = Transfusion(shape)
    shipped = checkpoint.load_trained(ASSETS / "scenes.pt")
    content = {"kind": "model", "config": vars(shape), "words": words.vocabulary, "vae": checkpoint.pack_vae(shipped.vae),
               "weights": {name: torch.full(tensor.shape, 0.5, dtype=torch.float16) for name, tensor in empty.state_dict().items()},
               "diffusion": {"kind": "ddpm", "T": 1000, "shift": 1.0}}
    torch.save(content, tmp_path / "model.pt")
    del content

    def memory(what):
        return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))

    with contextlib.suppress(AttributeError):           # musl has none
        ctypes.CDLL(None).malloc_trim(0)                # what is kept of `content` would hide as much of the peak
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")       # the peak counts from here on
    trained = checkpoint.load_trained(tmp_path / "model.pt")
    assert count(trained.model) > 1.6e8 and trained.model.head.weight.dtype == torch.float32
    assert (memory("VmHWM") - before) / count(trained.model) <= 4.5
    assert all(weight.requires_grad and not weight.is_meta and (weight == 0.5).all() for weight in trained.model.parameters())


@pytest.mark.parametrize("name, good, bad", [("seed", 0, -1), ("seed", 2 ** 32 - 1, 2 ** 32), ("guidance", 0, -0.1), ("temperature", 0, -0.1),
                                             ("top-p", 0.01, 0), ("top-p", 1, 1.01), ("steps", 1, 0), ("steps", 1000, 1001)])
def test_the_ends_of_the_options(name, good, bad):
    """Catches a range that ends one number too early or too late."""
    sample_options.parse_arguments(["a circle", f"--{name}={good}"], ("both",))
    with pytest.raises(UserError, match=f"--{name} must be"):
        sample_options.parse_arguments(["a circle", f"--{name}={bad}"], ("both",))
