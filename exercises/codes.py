"""
codes.py: quantising, the exercise and its check                                (vae.py, exercise 7)

THE IDEA    Three things must be right: which code is the nearest, what the decoder gets, and where
            the gradients go. The third is not seen in any number that comes out. So the check asks
            autograd: of the vectors, and of the loss, with respect to the encoder and the codebook.
A PICTURE              forward                               backward
            e ----> nearest code c ----> decoder        e <-- as if it were not there -- decoder
            loss = |sg(e) - c|^2 + beta |e - sg(c)|^2   c <-- codebook term  e <-- beta x commitment
PROPERTIES  in the order in which they are looked at: see PROPERTIES, below
READ NEXT   ../vae.py        TEST  ../tests/test_exercises.py
"""
from dataclasses import dataclass
from unittest import mock

import torch

import vae
from exercises.trial import Advice, near, need_several, need_shape, need_tensor

# h and w are not alike, or an exchange would be unseen.
M = 2
Z = 3
H = 2
W = 4
CODES = 6
BETA = 0.25


def quantise(e, codebook, beta=0.25):
    """(vectors for the decoder (M, z, h, w), codes (M, h, w) int64, loss: a scalar).

    e           (M, z, h, w), the encoder's output
    codebook    (codes, z), the learned vectors
    beta        weight of the commitment, the term that moves the encoder

    Each place of a picture gets the nearest of the learned vectors: code = argmin_k |e - c_k|.
    loss = mean |sg(e) - c|^2 + beta mean |e - sg(c)|^2, where sg lets no gradient through.
    Straight-through: the decoder's gradient reaches e as if nothing had been rounded; the codebook
    gets none of it. van den Oord et al. 2017, eq. 3; Transfusion App. C."""
    # The module has this as a layer, with a codebook of its own, drawn at random.
    with torch.random.fork_rng(devices=[]):
        layer = vae.Quantiser(*codebook.shape).eval()
    del layer.codebook
    layer.codebook = codebook
    with mock.patch.object(vae, "BETA", beta):
        return layer(e)


@dataclass
class Seen:
    """What an answer makes of some vectors.

    e, codebook                 what it was given
    vectors, codes, loss        what it returned
    right                       the module's three
    gradients, right_gradients  {"vectors" or "loss", "e" or "codebook": tensor}
    trial                       to ask more
    """
    e: torch.Tensor
    codebook: torch.Tensor
    vectors: torch.Tensor
    codes: torch.Tensor
    loss: torch.Tensor
    right: tuple
    gradients: dict
    right_gradients: dict
    trial: object

    def gradient_is(self, what, of, factor=1.0):
        """Whether a gradient is `factor` times the right one."""
        return near(self.gradients[what, of], factor * self.right_gradients[what, of])

    def loss_pulls(self, e, codebook):
        """Whether the loss pulls e, and the codebook, so many times as hard as it should."""
        return self.gradient_is("loss", "e", e) and self.gradient_is("loss", "codebook", codebook)


def make_vectors():
    """(e, codebook): codes of different lengths, so that the nearest is not the most alike."""
    generator = torch.Generator().manual_seed(5)
    e = torch.randn(M, Z, H, W, generator=generator)
    codebook = torch.randn(CODES, Z, generator=generator)
    codebook = codebook * torch.linspace(0.3, 2.5, CODES)[:, None]
    return e.requires_grad_(), codebook.requires_grad_()


def try_quantise(trial):
    """The answer, tried on two small pictures."""
    e, codebook = make_vectors()
    result = trial(e, codebook, BETA)
    vectors, codes, loss = need_several(result, ("vectors", "codes", "loss"))
    need_tensor(vectors, "The first result, the vectors,", like="float")
    need_tensor(codes, "The second result, the codes,", like="int")
    need_tensor(loss, "The third result, the loss,", like="float")
    check_shapes(vectors, codes, loss)
    right = quantise(e, codebook, BETA)
    return Seen(e, codebook, vectors, codes, loss, right,
                gradients_of(vectors, loss, e, codebook),
                gradients_of(right[0], right[2], e, codebook), trial)


def check_shapes(vectors, codes, loss):
    """Raise Advice for results of another shape."""
    if codes.shape == (M, W, H):
        raise Advice("The codes are transposed: (M, h, w), rows first.")
    if codes.shape == (M * H * W,):
        raise Advice(f"The codes are still one long row: make them (M, h, w), {(M, H, W)}.")
    if codes.shape == (M, H * W):
        raise Advice("The codes of a picture stand in one row: make them a grid, (M, h, w).")
    if codes.shape[-1:] == (CODES,):
        raise Advice("The codes are one-hot: return their numbers, (M, h, w), from 0 on.")
    need_shape(codes, (M, H, W), "The codes")
    if vectors.shape == (M, H, W, Z):
        raise Advice("The vectors have z last: bring it back, (M, z, h, w).")
    need_shape(vectors, (M, Z, H, W), "The vectors")
    if loss.ndim:
        raise Advice(f"The loss must be one number, a mean, but it has shape {tuple(loss.shape)}.")


def gradients_of(vectors, loss, e, codebook):
    """{(what, of): gradient}, zeros where there is none."""
    found = {}
    # A weight of its own for each number, so that an exchange of places is seen.
    weights = torch.linspace(1, 2, vectors.numel()).view_as(vectors)
    for what, value in (("vectors", (vectors * weights).sum()), ("loss", loss)):
        for of, tensor in (("e", e), ("codebook", codebook)):
            gradient = None
            if value.requires_grad:
                gradient, = torch.autograd.grad(value, tensor, retain_graph=True, allow_unused=True)
            found[what, of] = torch.zeros_like(tensor) if gradient is None else gradient
    return found


def nearest_by(e, codebook, score):
    """(M, h, w): the codes for which a score is smallest. score: function (vectors, codebook)."""
    vectors = e.detach().permute(0, 2, 3, 1).reshape(-1, Z)
    return score(vectors, codebook.detach()).argmin(1).view(M, H, W)


# --------------------------------------------------------------------------------------- properties
def nearest_code(seen):
    """The code is the nearest one"""
    right = seen.right[1]
    if torch.equal(seen.codes, right):
        return None

    # 1. What the codes would be if another measure were the smallest.
    def dot(v, c):
        return -v @ c.T

    def cosine(v, c):
        return -(v / v.norm(dim=1, keepdim=True)) @ (c / c.norm(dim=1, keepdim=True)).T

    def l1(v, c):
        return torch.cdist(v, c, p=1)

    def farthest(v, c):
        return -torch.cdist(v, c)

    def half(v, c):
        return c.square().sum(1) - v @ c.T

    known = (
        (dot, "This is the code with the largest dot product, and long codes always win. Nearest "
              "is the smallest |e - c|^2 = |e|^2 - 2 e.c + |c|^2."),
        (cosine, "This is the code with the most similar direction: lengths count, too. Nearest is "
                 "the smallest |e - c|."),
        (l1, "This is the nearest code by the sum of absolute differences; wanted is the ordinary "
             "distance, with squares."),
        (farthest, "These are the codes that are farthest away: argmin, not argmax."),
        (half, "The 2 is missing in |e|^2 - 2 e.c + |c|^2."),
    )
    for score, advice in known:
        if torch.equal(seen.codes, nearest_by(seen.e, seen.codebook, score)):
            return advice

    # 2. What they would be of vectors that are not those of one place.
    flat = seen.e.detach().reshape(-1, Z)
    if torch.equal(seen.codes, torch.cdist(flat, seen.codebook.detach()).argmin(1).view(M, H, W)):
        return ("The vectors are torn: in (M, z, h, w) the z numbers of one place do not lie side "
                "by side in memory. First bring z to the end (permute), then make rows of z.")
    swapped = right.transpose(1, 2).reshape(M, H, W)
    if torch.equal(seen.codes, swapped):
        return "The codes are right, but stand column by column: h comes before w."
    if seen.codes.min() < 0 or seen.codes.max() >= CODES:
        return (f"Codes must be 0 to {CODES - 1}; yours go from {seen.codes.min()} to "
                f"{seen.codes.max()}.")
    wrong = (seen.codes != right).nonzero()
    m, y, x = wrong[0].tolist()
    return (f"{len(wrong)} of {right.numel()} codes are not the nearest, first that of picture {m} "
            f"at row {y}, column {x}: {seen.codes[m, y, x]} is farther than {right[m, y, x]}.")


def in_int64(seen):
    """Codes are int64"""
    if seen.codes.dtype != torch.int64:
        return f"The codes must be int64, to index with; yours are {seen.codes.dtype}."


def decoder_gets_codes(seen):
    """The decoder gets the chosen vectors"""
    # Forward only; where gradients go is the next property.
    vectors = seen.vectors.detach()
    right = seen.right[0].detach()
    if near(vectors, right, atol=1e-5):
        return None
    e = seen.e.detach()
    if near(vectors, e):
        return ("The decoder gets e itself, as if nothing were quantised. Forward, the vectors "
                "must be the chosen codes; only the gradient passes e's way.")
    if near(vectors, 2 * e - right, atol=1e-5):
        return ("The straight-through line has the wrong sign: e + (c - e).detach(), so that "
                "forward c is left.")
    torn = right.permute(0, 2, 3, 1).reshape(M, Z, H, W)
    if near(vectors, torn, atol=1e-5):
        return ("The vectors are torn on the way back: rows of z were viewed as (M, z, h, w). View "
                "them as (M, h, w, z), then permute.")
    if near(vectors, right - e, atol=1e-5) or near(vectors, e - right, atol=1e-5):
        return "The decoder gets the difference of e and its codes, not the codes."
    return ("The vectors are not the codes that were chosen: vectors[m, :, y, x] = codebook[code], "
            "one code and no mixture of several.")


def straight_through(seen):
    """Straight-through: the decoder's gradient reaches e, and not the codebook"""
    # What comes out is right by now, so only the gradients can tell.
    to_e = seen.gradients["vectors", "e"]
    to_codebook = seen.gradients["vectors", "codebook"]
    if (to_e == 0).all():
        if (to_codebook != 0).any():
            return ("No straight-through: argmin has no gradient, so the decoder cannot teach the "
                    "encoder. Forward it must be c, backward e: e + (c - e).detach().")
        return ("The decoder's gradient ends here: nothing reaches the encoder. Only the "
                "difference c - e may be detached.")
    if (to_codebook != 0).any():
        return ("The decoder's gradient moves the codebook, too: detach c in the straight-through "
                "line. The codebook learns by its own term of the loss.")
    if not seen.gradient_is("vectors", "e"):
        return ("The decoder's gradient reaches e, but not unchanged: it must be as if nothing had "
                "been rounded.")


def both_terms(seen):
    """Two terms: the codes move to the vectors, the vectors to the codes"""
    # The first term alone moves the codebook, the second alone moves the encoder.
    to_e = seen.gradients["loss", "e"]
    to_codebook = seen.gradients["loss", "codebook"]
    if (to_e == 0).all() and (to_codebook == 0).all():
        return "The loss has no gradient at all: too much is detached."
    if (to_codebook == 0).all():
        return ("The codebook term is missing: nothing moves the codes to the vectors that chose "
                "them, mean |sg(e) - c|^2. Is sg on both sides, or is c taken after the "
                "straight-through line, which lets no gradient through?")
    if (to_e == 0).all():
        return ("The commitment is missing: nothing keeps the encoder near its codes, "
                "beta mean |e - sg(c)|^2.")


def beta_on_the_encoder(seen):
    """beta is the weight of the encoder's term"""
    # TRAP: with beta on the other term the loss has the same kind of value, and it trains.
    known = (                                           # how hard it pulls e, the codebook
        (1, 1, None),
        (1 / BETA, BETA,
         "beta is on the other term: it belongs to the commitment, which moves the encoder. (A "
         "much-copied implementation had this bug for years.)"),
        ((1 + BETA) / BETA, 1 + BETA,
         "Nothing is detached in the loss, so each term moves both. sg(e) in the first, sg(c) in "
         "the second: .detach()."),
        ((1 + BETA) / BETA, 1,
         "The codebook term moves the encoder, too: sg(e), .detach(), is missing there."),
        (1, 1 + BETA,
         "The commitment moves the codebook, too: sg(c), .detach(), is missing there."),
        (1 / BETA, 1, "beta is not used: the encoder's term has weight 1."),
        (-1, 1, "The commitment is subtracted, and must be added."),
        (M, M, "The pictures' losses are added: the mean is over the pictures, too."),
        (1, BETA, "beta is on both terms: only the commitment has it."),
        (Z * M * H * W, Z * M * H * W,
         "The loss is a sum. Take the mean over all elements, or it grows with the picture."),
        (Z * H * W, Z * H * W,
         "The squares are summed within a picture: the mean is over all elements."),
        (Z, Z, "The squares are summed over z and averaged over places: the mean is over both."),
        (0.5, 0.5, "The loss is half of what it must be."),
        (-1, -1, "The loss has the wrong sign."),
    )
    for e, codebook, advice in known:
        if seen.loss_pulls(e, codebook):
            return advice
    e = seen.e.detach()
    distance = (e - seen.right[0].detach()).norm(dim=1).mean()
    if near(seen.loss.detach(), (1 + BETA) * distance):
        return "These are distances, |e - c|. The loss has their squares, as a mean over elements."
    if near(seen.loss.detach(), (1 + BETA) * (e - seen.right[0].detach()).abs().mean()):
        return "This is L1, the absolute difference: both terms square it."
    if seen.gradient_is("loss", "codebook"):
        return ("The codebook term is right, the commitment is not: beta mean |e - sg(c)|^2, with "
                "beta = 0.25.")
    if seen.gradient_is("loss", "e"):
        return "The commitment is right, the codebook term is not: mean |sg(e) - c|^2, weight 1."
    return ("Neither term of the loss is right: mean |sg(e) - c|^2 + beta mean |e - sg(c)|^2, "
            "where sg is .detach().")


def value_of_the_loss(seen):
    """The loss has the right value"""
    loss = seen.loss.item()
    right = seen.right[2].item()
    if abs(loss - right) > 1e-4 * right:
        return f"The gradients are right, but the loss is {loss:.4f} and should be {right:.4f}."


def beta_is_an_argument(seen):
    """Any beta, any codebook"""
    e, codebook = make_vectors()
    codebook = codebook.detach()[:4].requires_grad_()
    e = e.detach()[:1].requires_grad_()
    vectors, codes, loss = need_several(seen.trial(e, codebook, 2.0), ("vectors", "codes", "loss"))
    right = quantise(e, codebook, 2.0)
    if not torch.equal(need_tensor(codes), right[1]) or not near(need_tensor(vectors), right[0]):
        return "Right for 6 codes and 2 pictures, wrong for 4 codes and 1: is a number written in?"
    if not near(need_tensor(loss), right[2]):
        return "`beta` is an argument: with beta = 2 the loss is wrong. Is 0.25 written into it?"


PROPERTIES = (nearest_code, in_int64, decoder_gets_codes, straight_through, both_terms,
              beta_on_the_encoder, value_of_the_loss, beta_is_an_argument)
