"""
test_gap.py: does the model listen to its caption?             (metrics/gap.py; docs/PAPER.md §4.12)

THE IDEA    The conditioning gap is measured with models whose gap is known without measuring. One
            never looks at its caption: its gap is 0. Another reads it, and knows the picture by
            heart: its gap is a formula. Then a real network, with and without attention to words.
TRY IT      pytest -n 0 tests/test_gap.py
"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model as model_module
from diffusion import Diffusion
from metrics.gap import conditioning_gap
from sources import scenes

P = 16                                                  # patches per picture
WORLD = scenes.World(scenes.WORLDS["one"])
TEXTS = [text for text, _ in scenes.captions("colors")]
WORDS = data.Words({word for text in scenes.all_claims() for word in text.split()})


def code(text):
    """(1, 2, 2): the latent picture that belongs to a caption in these tests. It has a number for
    the caption's colour and one for its shape."""
    *_, colour, shape = text.split()
    colours = ["a", *scenes.COLOURS]                    # "a circle" has no colour
    number = colours.index(colour) - 3.0
    other = scenes.SHAPES.index(shape) - 1.5
    return torch.tensor([number, other, 1.0, -1.0]).view(1, 2, 2)


def codes(texts):
    """(N, 1, 2, 2): the pictures of N captions."""
    return torch.stack([code(text) for text in texts])


def reader(diffusion, obeys):
    """A model that reads the caption of each picture. If it obeys, it predicts the noise exactly,
    as long as the picture is `code` of the caption; otherwise it takes every picture for 0.
    read: the captions; levels: the t of every forward pass."""

    def answer(tokens, image_id, doc_id, has_loss, xt, t):
        answer.levels.append(t)
        x0 = torch.zeros_like(xt)
        for m in range(len(xt)):
            row, first = (image_id == m).nonzero()[0].tolist()
            before = tokens[row, :first]                # the caption is what its document has there
            same_document = doc_id[row, :first] == doc_id[row, first]
            caption = WORDS.decode(before[same_document].tolist())
            answer.read.append(caption)
            if obeys:
                x0[m] = code(caption)
        a, s = diffusion.at(t, xt)
        return None, (xt - a * x0) / s                  # eq. 2, solved for eps

    answer.read = []
    answer.levels = []
    answer.config = SimpleNamespace(patches=P, context=64)
    return answer


# ------------------------------------------------------------------------ models whose gap is known
def test_a_model_that_ignores_its_caption_has_no_gap():
    """docs/PAPER.md §4.12. Catches a gap that comes from other noise or another t, not from the
    caption."""
    captions = TEXTS[:12]
    model = reader(Diffusion(), obeys=False)
    assert conditioning_gap(model, WORDS, Diffusion(), captions, codes(captions)) == 0.0


def test_a_model_that_obeys_its_caption_has_a_gap():
    """docs/PAPER.md §4.12. Catches the sign turned around, and another picture's latent, noise or
    t: packing changes the order."""
    rng = np.random.default_rng(0)
    captions = [WORLD.caption(rng)[0] for _ in range(12)]
    diffusion = Diffusion()
    model = reader(diffusion, obeys=True)
    gap = conditioning_gap(model, WORDS, diffusion, captions, codes(captions))

    # What it read, first beside the right captions, then beside wrong ones: {t: caption}.
    # No two pictures have the same t, so t says which picture it was.
    t_right, t_wrong = model.levels
    right = dict(zip(t_right.tolist(), model.read[:12]))
    wrong = dict(zip(t_wrong.tolist(), model.read[12:]))
    assert sorted(right.values()) == sorted(captions)
    assert right.keys() == wrong.keys()
    assert len(right) == 12
    assert min(right) <= 100                            # every noise level alike
    assert max(right) > 900

    # Beside the wrong caption its eps is wrong by a/s times the difference of the two pictures.
    errors = []
    for t in right:
        ratio = diffusion.a[t] / diffusion.s[t]
        difference = code(right[t]) - code(wrong[t])
        errors.append(ratio ** 2 * difference.square().mean())
    wanted = torch.stack(errors).mean().item()
    assert gap == pytest.approx(wanted, rel=1e-3)
    assert gap > 0.01


def test_the_gap_of_a_noise_skip_is_eq_3s():
    """Catches a gap of the network's bare output. It must be that of the prediction, so that models
    with and without the path can be compared."""
    captions = TEXTS[:12]
    skip = Diffusion(noise_skip=True)
    says_eps = reader(skip, obeys=True)

    def says_v(*arguments):
        """The output whose prediction is says_eps': eps = s xt + a v."""
        xt, t = arguments[-2:]
        a, s = skip.at(t, xt)
        _, eps = says_eps(*arguments)
        return None, (eps - s * xt) / a

    says_v.config = says_eps.config
    plain = reader(Diffusion(), obeys=True)
    wanted = conditioning_gap(plain, WORDS, Diffusion(), captions, codes(captions))
    gap = conditioning_gap(says_v, WORDS, skip, captions, codes(captions))
    assert gap == pytest.approx(wanted, rel=1e-3)


# -------------------------------------------------------------------------------- the wrong caption
def test_one_picture_has_no_other_caption():
    """Catches an error where the test split has a single picture."""
    latents = torch.zeros(1, 4, 8, 8)
    assert conditioning_gap(None, WORDS, None, ["a circle"], latents) is None


def test_the_wrong_caption_is_wrong():
    """Catches a "wrong" caption that says the same as the right one: every such picture pulls the
    gap towards 0."""
    # The same strings again and again, as World.caption returns them.
    captions = [TEXTS[k] for k in (0, 0, 1, 1, 1, 2, 0)]
    model = reader(Diffusion(), obeys=True)
    conditioning_gap(model, WORDS, Diffusion(), captions, codes(captions))
    for right, wrong in zip(model.read[:7], model.read[7:]):
        assert right != wrong

    # There is no other: 0 would say that captions are ignored.
    alike = [TEXTS[0], TEXTS[0].upper(), TEXTS[0]]
    latents = torch.stack([code(TEXTS[0])] * 3)
    assert conditioning_gap(model, WORDS, Diffusion(), alike, latents) is None


# ----------------------------------------------------------------------------------- a real network
def test_the_gap_of_a_real_model_without_attention_to_words(monkeypatch, make_model):
    """docs/PAPER.md §4.1, a mask that is built and never passed on; and §4.12. Patches that see no
    word must give a gap of 0, others must not."""
    torch.manual_seed(0)
    network = make_model("linear", vocabulary=len(WORDS))
    diffusion = Diffusion()
    captions = TEXTS[:10]
    latents = torch.randn(10, *network.config.latent)
    assert abs(conditioning_gap(network, WORDS, diffusion, captions, latents)) > 1e-4

    side = network.config.patches                       # a picture's patches, side by side
    dense = model_module.dense_mask

    def pictures_only(lo, hi, keys=None):
        """dense_mask, but a patch looks at its own picture only. lo, hi: (B, T)."""
        pos = torch.arange(hi.shape[1])
        sees_ahead = hi > pos                           # a patch, but not the last of its picture
        is_last = torch.zeros_like(sees_ahead)
        is_last[:, 1:] = (hi == pos)[:, 1:] & sees_ahead[:, :-1]
        first = torch.where(sees_ahead | is_last, hi - side + 1, lo)
        return dense(first, hi, keys)

    monkeypatch.setattr(model_module, "dense_mask", pictures_only)
    assert abs(conditioning_gap(network, WORDS, diffusion, captions, latents)) < 1e-5


def test_the_gap_of_edits(make_model):
    """The gap of an edit: the wrong instruction beside the same clean picture, with the same noise.
    Catches a picture before that is noised, another's, behind the words, or left out: then the gap
    would measure the picture."""
    torch.manual_seed(0)
    network = make_model("linear", vocabulary=len(WORDS))
    diffusion = Diffusion()
    texts = TEXTS[:10]
    latents = torch.randn(10, *network.config.latent)
    before = torch.randn(10, *network.config.latent)

    read = []                                           # the arguments of every forward pass
    real = type(network).forward

    def forward(*arguments):
        read.append(arguments)
        return real(network, *arguments)

    network.forward = forward
    gap = conditioning_gap(network, WORDS, diffusion, texts, latents, before)
    assert abs(gap) > 1e-4
    assert len(read) == 2                               # beside the right, and the wrong texts

    for tokens, image_id, _, _, x, t in read:
        assert len(x) == 20
        levels = sorted(t.tolist())
        assert levels[:10] == [0] * 10                  # the pictures before are clean
        assert levels[10] > 0
        clean = {tuple(picture.flatten().tolist()) for picture in x[t == 0]}
        assert clean == {tuple(picture.flatten().tolist()) for picture in before}

        # In reading order: the picture before, then what is drawn, of one document.
        for m in range(0, 20, 2):
            assert t[m] == 0 < t[m + 1]
            row, first = (image_id == m).nonzero()[0].tolist()
            assert tokens[row, first - 2: first].tolist() == [data.BOS, data.BOI]   # before words
            k = (before - x[m]).abs().flatten(1).sum(1).argmin()        # whose picture it is
            a = diffusion.a[t[m + 1]].float()
            s = diffusion.s[t[m + 1]].float()
            eps = (x[m + 1] - a * latents[k]) / s       # if it is another's, then far from noise
            assert eps.abs().max() < 6
            assert abs(eps.std() - 1) < 0.5

    right, wrong = read
    assert torch.equal(right[4], wrong[4])              # the same pictures, in the same noise
    assert not torch.equal(right[0], wrong[0])          # other words
    other = conditioning_gap(network, WORDS, diffusion, texts, latents, before.roll(1, 0))
    assert abs(gap - other) > 1e-5
