"""
test_mixtures.py: are edits and documents of several parts counted rightly?                   (metrics/mixtures.py; PAPER §4.12)

Measured with stand-ins for the model whose score is known: artists who draw what is asked, forget it, do nothing, or draw all
anew; writers who know where BOI stands or do not.
"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from data import BOI
from metrics import mixtures
from sources import edits, scenes
from support import checkpoint
from support.common import ASSETS

P = 16                                                  # patches per picture


@pytest.fixture(scope="module")
def trained():
    """Only a VAE, the shipped one: the editors below need no model."""
    return SimpleNamespace(vae=checkpoint.load_vae(ASSETS / "scenes_vae.pt"), model=None)


@pytest.mark.parametrize("document, right", [
    (["a red circle", 0], True), ([0, "a red circle"], True), (["a circle", 0, "two squares", 0], True), (["a circle", 0, "two squares"], True),
    (["a red circle is left of a blue square . the blue square is right of the red circle ."], True),
    (["a red circle is left of a blue square . the blue square is left of the red circle ."], False),
    (["a red circle is left of a blue square . the red circle is left of the blue square ."], False),
    (["a red circle is left of a blue square ."], False), ([". . . . ."], False), (["a red circle"], False), ([0], False), ([], False),
    (["a circle", 0, 0], False), (["a circle", "a square", 0], False), (["a a circle", 0], False), (["a circle is", 0], False)])
def test_well_formed(document, right):
    """Catches a document called well formed that training never shows, and an error for one that a model may well write."""
    assert mixtures.well_formed(document) == right


@pytest.mark.parametrize("forgets, always", [(False, None), (True, None), (False, True), (False, False)])
def test_mixtures(monkeypatch, trained, forgets, always):
    """With stand-ins: an artist who draws the last caption, or (forgets) the first one; a writer who knows where BOI stands,
    or puts it everywhere, or nowhere. Catches the numbers of one part given for another's, and pictures judged by the
    caption beside theirs."""
    rng, tokenizer = np.random.default_rng(2), data.Words(scenes.vocabulary())
    follow = mixtures.next_words(scenes.all_claims())
    pictures = {}                                       # caption: latents that were drawn for it

    def answer(tokens, image_id, doc_id, has_loss, xt, t):
        assert (t == 0).all() and len(xt) == len(t)     # finished pictures stand between the words
        rows = []
        for b, q in has_loss.nonzero().tolist():
            so_far = tuple(tokenizer.vocabulary[k] for k in tokens[b, 1: q + 1].tolist())
            after = follow.get(so_far, {"<boi>"})       # a deduction may follow a pair of colour and shape, a BOI as well
            boi = after == {"<boi>"} if always is None else always
            rows.append(torch.nn.functional.one_hot(torch.tensor(BOI if boi else tokenizer.ids["a"]), len(tokenizer)).float())
        return torch.stack(rows), None

    def generate(trained, prompts, draw_now=False, **options):
        if not draw_now:
            bad = 2 if options["temperature"] else 4    # who begins by chance errs twice as often
            assert all(bool(prompt) == (bad == 4) for prompt in prompts)
            return [["a circle", 0] if k % bad else ["a circle is", 0] for k in range(len(prompts))]
        if len(prompts[0]) == 3:                        # the caption before, and what was drawn for it
            last = [prompt[2] for prompt in prompts]
            assert [prompt[0] for prompt in prompts] == [last[-1], *last[:-1]]
            assert all(any(torch.equal(picture, x) for x in pictures[first]) for first, picture, _ in prompts)
        texts = [prompt[0 if forgets else -1] for prompt in prompts]
        drawn = [scenes.render(scenes.draw_scene(scenes.read_caption(text), rng)) for text in texts]
        latents = list(mixtures.encode_pixels(trained, np.stack(drawn)))
        for text, x in zip(texts, latents):
            pictures.setdefault(text, []).append(x)
        return [[*prompt, x] for prompt, x in zip(prompts, latents)]
    answer.config = SimpleNamespace(patches=P, context=128)
    monkeypatch.setattr(mixtures, "generate", generate)
    found = mixtures.mixing(SimpleNamespace(vae=trained.vae, model=answer, tokenizer=tokenizer), n=40)
    assert found["single"] == 1 and (found["second"] < 0.5 if forgets else found["second"] == 1)
    assert found["well_formed"] == 0.75 and found["sampled"] == 0.5
    assert found["boi"] == 1 if always is None else 0.05 < found["boi"] < 0.95


# ----------------------------------------------------------------------------------------------------------------- editing
def test_a_hundred_at_a_time(monkeypatch):
    """Catches a picture that gets another's instruction, or the noise of one before it, where there are more than fit together."""
    def edit(trained, before, texts, seed):
        assert before.flatten().tolist() == [float(text) for text in texts] and len(texts) <= 100
        seeds.append(seed)
        return before + 0.5

    seeds = []
    monkeypatch.setattr(mixtures, "edit", edit)
    numbers = torch.arange(205.0).view(-1, 1, 1, 1)
    edited = mixtures.change(None, numbers, [str(k) for k in range(205)], 7, {})
    assert torch.equal(edited, numbers + 0.5) and len(set(seeds)) == 3


@pytest.fixture
def editors(monkeypatch, trained):
    """A function (change, answer): put stand-ins for the model that know the true scenes. change(before, text, after), all
    scenes, returns the scene that is drawn; answer(text, after) what is said to "what changed ?". Returns the calls' seeds."""
    def put(change, answer, size=32):
        truth, real, seeds = [], edits.scene_edits, []

        def scene_edits(*a, **k):
            truth[:] = [real(*a, **k)]
            return truth[0]

        def nearest(x, candidates, picture):            # which of the candidate pictures a latent shows
            latents = encode(trained, truth[0].pixels[[c[picture] for c in candidates]])
            return candidates[int((latents - x).square().flatten(1).sum(1).argmin())]

        encode = mixtures.encode_pixels

        def edit(trained, x, said, seed=None, **drawing):
            seeds.append(seed)
            drawn, scene = [], truth[0].scenes
            for latent, text in zip(x, said):
                a, _, b = nearest(latent, [c for c in truth[0].triples() if c[1] == text], 0)
                drawn.append(scenes.render(change(scene[a], text, scene[b]), size))
            return encode(trained, np.stack(drawn))

        def generate(trained, prompts, **options):
            assert options["max_pictures"] == 0 and all(prompt[2:] == ["what changed ?"] for prompt in prompts)
            found = [nearest(x, truth[0].triples(), 0) for x, _, _ in prompts]
            assert all(nearest(y, [c for c in truth[0].triples() if c[0] == a], 2)[2] == b for (_, y, _), (a, _, b) in zip(prompts, found))
            return [[x, y, f"what changed ? {answer(text, truth[0].scenes[b])}"] for (x, y, _), (_, text, b) in zip(prompts, found)]
        monkeypatch.setattr(edits, "scene_edits", scene_edits)
        monkeypatch.setattr(mixtures, "edit", edit)
        monkeypatch.setattr(mixtures, "generate", generate)
        return seeds
    return put


@pytest.mark.parametrize("size", [32, 48])
def test_editing_of_a_perfect_editor(editors, trained, size):
    """Catches a judge that fails true edits (of single ones, of chains, of any kind, in pictures of any size), that compares with
    another scene's truth, or asks the same noise for every step; through the shipped VAE, as a model's pictures go."""
    seeds = editors(lambda before, text, after: after, lambda text, after: text, size)
    n = 24 if size == 32 else 12
    found, shown = mixtures.editing(trained, n=n, seed=3, size=size, progress=False)
    assert found["edits"] == found["kept"] == found["asked"] == 1.0 and found["chains"] >= 0.95         # 3 passages through the VAE
    assert set(found["kinds"]) == set(edits.KINDS) and set(found["kinds"].values()) == {1.0}
    assert len(shown) == n and all(right and picture.shape == (size, 2 * size + 2, 3) for _, picture, right in shown)
    assert len(set(seeds)) == len(seeds) >= 4


def test_editing_of_one_who_does_nothing(editors, trained):
    """Catches a judge that does not look at what was asked, and `kept` that drops with the edits: leaving all alone keeps all."""
    editors(lambda before, text, after: before, lambda text, after: "")
    found, shown = mixtures.editing(trained, n=24, seed=3, progress=False)
    assert found["edits"] == found["asked"] == 0.0 and found["kept"] == 1.0 and found["chains"] < 0.1
    assert not any(right for *_, right in shown)


def test_editing_of_one_who_draws_it_anew(editors, trained):
    """Catches `kept` blind to place: the right objects in the right cells, but each of them 3 pixels off."""
    def careless(before, text, after):
        return [t._replace(x=t.x + (3 if t.x % 16 < 8 else -3), r=4.8) if t in before else t for t in after]
    editors(careless, lambda text, after: "remove the circle" if not text.startswith("remove") else "what a circle")
    found, _ = mixtures.editing(trained, n=24, seed=3, progress=False)
    assert found["kept"] < 0.1 and found["edits"] < 0.5 and found["asked"] == 0.0


@pytest.mark.parametrize("n, seed", [(1, 18), (1, 6), (2, 0)])
def test_editing_with_few_samples(editors, trained, n, seed):
    """Catches a division by nothing: seed 18 begins with a picture of one object, so that none is untouched; seed 6 with two
    chains shorter than three."""
    editors(lambda before, text, after: after, lambda text, after: text)
    found, shown = mixtures.editing(trained, n=n, seed=seed, progress=False)
    assert found["edits"] == found["asked"] == found["chains"] == 1.0 and found["kept"] in (0.0, 1.0) and len(shown) == n
