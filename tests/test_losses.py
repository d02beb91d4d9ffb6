"""
test_losses.py: both losses, by hand       (model.losses, model.transfusion_loss; §3, eq. 1 to 4)

THE IDEA    The losses are computed once more, in plain loops, from the words of the paper. Then
            what must hold for any right loss: it adds up over micro-batches, it starts where theory
            says, it can be brought down, and its gradient reaches every weight.
BUGS        "PAPER §4.1" is docs/PAPER.md §4.1, where each bug was met by somebody.
DOCUMENTS   LONG, SHORT, DROPPED and TEXT, and the model, are those of tests/test_model.py.
TRY IT      pytest -n 0 tests/test_losses.py
"""
import math

import pytest
import torch

import data
from data import BOI, BOS, DROP, EOI, EOS, PAD, PATCH
from diffusion import Diffusion
from model import ModelConfig, Transfusion, losses, transfusion_loss, z_loss
from test_model import DROPPED, LONG, SHORT, TEXT, WORDS, make_batch, run

# One training step, whole and as three micro-batches: (documents, T).
STEP = ([LONG, SHORT, DROPPED, TEXT], 80)
MICRO_BATCHES = [([LONG], 30), ([SHORT], 10), ([DROPPED, TEXT], 22)]


def fresh_model(encoder):
    """A small model with the weights that training starts from: see conftest.make_model for the
    other one, in which everything is loud."""
    config = ModelConfig(
        vocabulary=len(WORDS), latent=(4, 4, 4), layers=2, width=64, heads=2, encoder=encoder
    )
    return Transfusion(config)


# ---------------------------------------------------------------------------- what the network gets
@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_network_is_told_the_t_that_noised_the_picture(model, kind, monkeypatch):
    """Catches a t that noises and is not the t that is told, one t for the whole batch, and noise
    that comes after patchification (PAPER §4.3, §4.4)."""
    batch = make_batch([LONG, SHORT])
    diffusion = Diffusion(kind)

    # 1. Note what the patch encoder is given.
    told = {}

    def listen_to(name):
        real = getattr(model.patch_encoder, name)

        def listening(x, t, *kept):
            told[name] = (x, t)
            return real(x, t, *kept)

        monkeypatch.setattr(model.patch_encoder, name, listening)

    listen_to("encode")
    listen_to("decode")
    losses(model, batch, diffusion)

    # 2. It is told each picture's own t, on both ways.
    xt, t_in = told["encode"]
    _, t_out = told["decode"]
    assert batch.t.tolist() == [50, 400, 700]
    assert t_in.tolist() == [50, 400, 700]
    assert t_out.tolist() == [50, 400, 700]

    # 3. eq. 2 on the latent pictures, one by one.
    for m, t in enumerate(batch.t.tolist()):
        a = diffusion.a[t].item()
        s = diffusion.s[t].item()
        mixed = a * batch.latents[m] + s * batch.eps[m]
        assert torch.allclose(xt[m], mixed, atol=1e-5)


def test_noise_skip_adds_the_noisy_picture_before_eq_3(model):
    """Catches a path beside the network that sampling has and training has not: the loss would
    fall, and what is drawn would be noise."""
    batch = make_batch([LONG, SHORT])
    diffusion = Diffusion(noise_skip=True)
    _, _, per_picture = losses(model, batch, diffusion)

    # By hand: the prediction is s * xt + a * (what the network says).
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)
    _, out = run(model, batch, xt)
    a, s = diffusion.at(batch.t, xt)
    error = batch.eps - s * xt - a * out
    by_hand = error.square().flatten(1).mean(1)
    assert torch.allclose(per_picture, by_hand, rtol=1e-5)

    # The path makes a difference.
    _, _, without = losses(model, batch, Diffusion())
    assert not torch.allclose(per_picture, without, rtol=1e-2)


# -------------------------------------------------------------------------------- eq. 1 and eq. 3
@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_losses_by_hand(model, kind):
    """Both losses once more in plain loops, from the paper's words (§3, eq. 1-4).

    Catches a target one place off, a loss where the input is BOI or a patch, EOI as a target, a
    loss on dropped captions (PAPER §4.8), and a sum where a mean is meant."""
    diffusion = Diffusion(kind)
    batch = make_batch([LONG, SHORT, DROPPED], T=64)
    lm, words, per_picture = losses(model, batch, diffusion)
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)
    logits, out = run(model, batch, xt)

    # 1. eq. 1: minus the log-probability of each next word.
    tokens = batch.tokens[0].tolist()
    by_hand = 0.0
    how_many = 0
    for k in range(len(tokens) - 1):
        now = tokens[k]
        following = tokens[k + 1]
        if now in (BOI, PATCH, EOS, PAD):
            continue                    # a picture, EOI, another document or nothing comes next
        if now == DROP or following == DROP:
            continue                    # our choice: a dropped caption teaches no word, nor its BOI
        row = logits[0, k].double()                                     # (V,)
        log_z = row.exp().sum().log()
        by_hand -= (row[following] - log_z).item()
        how_many += 1
    assert words == how_many
    assert lm.item() == pytest.approx(by_hand, rel=1e-4)

    # 2. eq. 3: the mean over a picture's numbers of the squared error.
    assert per_picture.shape == (4,)
    for m in range(4):
        eps = batch.eps[m].flatten().tolist()
        x0 = batch.latents[m].flatten().tolist()
        predicted = out[m].flatten().tolist()
        total = 0.0
        for k in range(len(eps)):
            wanted = eps[k] if kind == "ddpm" else eps[k] - x0[k]       # flow: the velocity
            total += (wanted - predicted[k]) ** 2
        assert len(predicted) == len(eps) == len(x0) == 64
        assert per_picture[m].item() == pytest.approx(total / 64, rel=1e-4)


def test_what_is_learned():
    """Catches an LM loss where the input is BOI or a patch, an EOI that is predicted, and a BOI or
    a word that never is (§3; PAPER §4.8)."""
    batch = make_batch([LONG, SHORT, DROPPED], T=64)
    tokens = batch.tokens[0].tolist()
    has_loss = batch.has_loss[0].tolist()
    inputs = [tokens[k] for k in range(64) if has_loss[k]]
    targets = [tokens[k + 1] for k in range(64) if has_loss[k]]

    assert not {BOI, PATCH, EOS, PAD, DROP} & set(inputs)
    assert not {EOI, PATCH, BOS, PAD, DROP} & set(targets)
    assert targets.count(BOI) == 3                      # of four: not the dropped caption's
    assert targets.count(EOS) == 3                      # one per document

    # Every word is a target, once.
    written = [token for token in tokens if token >= len(data.SPECIAL)]
    assert [token for token in targets if token >= len(data.SPECIAL)] == written


def test_denominator_loss_by_hand():
    """Catches Z without its logarithm, a mean in place of the sum, and a square in bfloat16, which
    has 8 bits for a number near 10."""
    logits = (3 * torch.randn(5, 16)).bfloat16()                        # (n, V)
    by_hand = 0.0
    for row in logits.tolist():
        Z = sum(math.exp(x) for x in row)
        by_hand += math.log(Z) ** 2
    assert z_loss(logits).item() == pytest.approx(1e-5 * by_hand, rel=1e-5)


# ------------------------------------------------------------------------ eq. 4, over a whole step
def test_micro_batches_add_up(model):
    """Catches a mean of means: words in short batches would weigh more, and so would pictures in
    small ones (PAPER §4.10)."""
    diffusion = Diffusion()
    lm, words, per_picture = losses(model, make_batch(*STEP), diffusion)

    lm_sum = 0.0
    n_text = 0
    pictures = []
    for documents, T in MICRO_BATCHES:
        part = losses(model, make_batch(documents, T), diffusion)
        lm_sum += part[0]
        n_text += part[1]
        pictures.append(part[2])

    assert n_text == words
    assert lm_sum.item() == pytest.approx(lm.item(), rel=1e-5)
    # `pack` puts the documents in another order, so the pictures are compared sorted.
    parts = torch.cat(pictures).sort().values
    assert torch.allclose(parts, per_picture.sort().values, atol=1e-4)


def test_transfusion_loss_by_hand():
    """Catches lambda on the other loss, a loss divided by the other's count, and a step of text
    alone that divides by 0."""
    lm_sum = torch.tensor(30.0)
    diff_sum = torch.tensor(8.0)

    loss = transfusion_loss(lm_sum, 10, diff_sum, 4)
    assert loss.item() == pytest.approx(30 / 10 + 5 * 8 / 4)

    loss = transfusion_loss(lm_sum, 10, diff_sum, 4, lam=2.0)
    assert loss.item() == pytest.approx(30 / 10 + 2 * 8 / 4)

    loss = transfusion_loss(lm_sum, 10, torch.tensor(0.0), 0)           # a step without a picture
    assert loss.item() == pytest.approx(3)

    loss = transfusion_loss(lm_sum, 10, diff_sum, 1)                    # a step with one
    assert loss.item() == pytest.approx(30 / 10 + 5 * 8)


def test_transfusion_loss_adds_up_over_micro_batches(model):
    """Catches a mean of micro-batch means (PAPER §4.10): gradients of three micro-batches, each
    divided by the counts of the whole step, add up to those of one batch."""
    diffusion = Diffusion()
    gradients = []
    for micro_batches in ([STEP], MICRO_BATCHES):
        model.zero_grad()
        parts = []
        for documents, T in micro_batches:
            parts.append(losses(model, make_batch(documents, T), diffusion))
        n_text = sum(words for _, words, _ in parts)
        M = sum(len(per_picture) for _, _, per_picture in parts)
        for lm_sum, _, per_picture in parts:
            transfusion_loss(lm_sum, n_text, per_picture.sum(), M).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])

    for whole, summed in zip(*gradients, strict=True):
        largest = whole.abs().max().item()
        assert torch.allclose(whole, summed, rtol=1e-3, atol=1e-4 * largest)


# ---------------------------------------------------------------------------------------- learning
@pytest.mark.parametrize("encoder", ["linear", "unet"])
def test_losses_at_the_start(encoder):
    """"Is this loss normal?" (PAPER §4.14). Before any learning it is ln V for words, all of which
    are equally likely; for pictures it is the size of the noise itself, since the output is 0."""
    model = fresh_model(encoder)
    batch = make_batch([LONG, SHORT, DROPPED])
    lm, words, per_picture = losses(model, batch, Diffusion())

    assert lm.item() / words == pytest.approx(math.log(len(WORDS)), abs=0.1)
    noise = batch.eps.square().flatten(1).mean(1)
    assert torch.allclose(per_picture, noise)
    assert 0.7 < per_picture.mean() < 1.3


@pytest.mark.parametrize("encoder", ["linear", "unet"])
def test_one_batch_is_learned_by_heart(encoder):
    """Catches a wire that is broken: a model that cannot memorise one document has a part that no
    gradient reaches."""
    model = fresh_model(encoder)
    batch = make_batch([LONG], T=30)
    diffusion = Diffusion()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    text_losses = []
    picture_losses = []
    for _ in range(60):
        lm, words, per_picture = losses(model, batch, diffusion)
        text_losses.append(lm.item() / words)
        picture_losses.append(per_picture.mean().item())
        optimizer.zero_grad()
        (lm / words + per_picture.mean()).backward()
        optimizer.step()

    missing = []
    for name, weight in model.named_parameters():
        if weight.grad is None or not weight.grad.any():
            missing.append(name)
    assert not missing, f"no gradient reaches {missing}"
    assert text_losses[-1] < 0.05 * text_losses[0], text_losses
    assert picture_losses[-1] < 0.3 * picture_losses[0], picture_losses


@pytest.mark.parametrize("encoder", ["linear", "unet"])
def test_text_alone_is_a_batch(make_model, encoder):
    """Catches a batch without any picture that crashes. With small batches it is only a question of
    time until one is drawn."""
    model = make_model(encoder)
    lm, words, per_picture = losses(model, make_batch([TEXT]), Diffusion())
    (lm / words + per_picture.sum()).backward()
    assert words == 8
    assert per_picture.shape == (0,)
    assert model.head.weight.grad.any()


def test_inputs_are_left_alone(model):
    """Catches a forward that writes into the batch: the second use of a batch would see another."""
    batch = make_batch([LONG, SHORT])
    before = make_batch([LONG, SHORT])
    losses(model, batch, Diffusion())
    for name, value in vars(before).items():
        if name != "generator":                         # none here: t and eps are drawn already
            assert torch.equal(getattr(batch, name), value), name
