"""
loss.py: the check of `losses`                                               (model.py, exercise 6)

THE IDEA    The network is a fake. It remembers what it is told: which noisy pictures, which t. And
            its answers are known numbers that ask for gradients. The gradient of a loss says what
            the loss counts: at each position which word it wants, and how much; for each picture
            which target, and whether it is squared. So most mistakes are read off, not guessed.
A PICTURE            tokens, xt, t ...                 logits, out
            losses  ------------------>  FakeModel  ------------------>  losses -> lm, words, each
                                         remembers                         gradient of lm w.r.t.
                                                                           logits: a row is 0 where
                                                                           a position is not counted
PROPERTIES  in the order in which they are looked at: see PROPERTIES, below
READ NEXT   ../model.py        TEST  ../tests/test_exercises.py
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
from diffusion import Diffusion
from exercises.trial import Advice, near, need_several, need_tensor
from model import losses

PATCHES = 4
LATENT = (2, 4, 6)                                      # c, h, w; patches of 4 x 3, if one asks
DOCUMENTS = (
    ["a red circle", ("image", 0, 1000)],
    [("image", 1, 1000), "two crosses"],
    ["a blue circle is left of a red cross"],
    ["a cross", ("image", 2, 1000), "a circle"],
)
WORDS = data.Words("a red blue circle circles is left of cross crosses two".split())


def make_batch():
    """A data.Batch of two rows, with four documents and three pictures, each at its own t."""
    sequences = [data.lay_out(document, WORDS, PATCHES) for document in DOCUMENTS]
    batch = data.pack(sequences, 28)
    generator = torch.Generator().manual_seed(0)
    batch.latents = torch.randn(3, *LATENT, generator=generator)
    batch.eps = torch.randn(3, *LATENT, generator=generator)
    batch.t = torch.tensor([100, 400, 900])
    return batch


class FakeModel:
    """Stands for model.Transfusion, with the same call. It remembers what it is told.

    logits, out    (B, T, V) and (M, c, h, w): what it answers, whatever it is asked
    calls          list of dicts: the arguments of each call
    """
    remembers = True

    def __init__(self, batch):
        generator = torch.Generator().manual_seed(1)
        B, T = batch.tokens.shape
        self.logits = torch.randn(B, T, len(WORDS), generator=generator).requires_grad_()
        self.out = torch.randn(batch.latents.shape, generator=generator).requires_grad_()
        self.calls = []

    def __call__(self, tokens, image_id, doc_id, has_loss, xt, t):
        told = {"tokens": tokens, "image_id": image_id, "doc_id": doc_id,
                "has_loss": has_loss, "xt": xt, "t": t}
        self.calls.append(told)
        self.check(told)
        return self.logits[has_loss], self.out

    forward = __call__

    def check(self, told):
        """Raise Advice for arguments that the real network would not take."""
        tokens, has_loss, xt, t = told["tokens"], told["has_loss"], told["xt"], told["t"]
        for name, value in told.items():
            if not isinstance(value, torch.Tensor):
                raise Advice(f"The network is told something as `{name}` that is no tensor.")
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise Advice("The network's arguments come in another order: model(tokens, image_id, "
                         "doc_id, has_loss, xt, t).")
        if tokens.shape != self.logits.shape[:2]:
            raise Advice(f"The network must see the whole rows, {tuple(self.logits.shape[:2])}, "
                         f"not {tuple(tokens.shape)}: shift the targets, not its input.")
        if has_loss.shape != tokens.shape or has_loss.dtype != torch.bool:
            raise Advice("The fourth argument of the network is has_loss: (B, T) bool.")
        if xt.shape != self.out.shape:
            raise Advice(f"The network takes pictures (M, c, h, w), here {tuple(self.out.shape)}, "
                         f"not {tuple(xt.shape)}. Patches are made inside.")
        if t.shape != xt.shape[:1]:
            raise Advice(f"The network must be told one t for each picture, "
                         f"({len(xt)},), not {tuple(t.shape)}.")


@dataclass
class Seen:
    """What an answer makes of the batch.

    batch, diffusion, model     what it was given
    lm, words, each             what it returned
    word_gradient               (B, T, V), that of lm with respect to the logits
    picture_gradient            (M, c, h, w), that of each picture's loss with respect to out
    right                       the module's (lm, words, each)
    """
    batch: data.Batch
    diffusion: Diffusion
    model: FakeModel
    lm: torch.Tensor
    words: object
    each: torch.Tensor
    word_gradient: torch.Tensor
    picture_gradient: torch.Tensor
    right: tuple


def try_losses(trial):
    """The answer, tried with DDPM and with flow: {kind: Seen}."""
    return {kind: try_kind(trial, kind) for kind in ("ddpm", "flow")}


def try_kind(trial, kind):
    """The answer, tried with one diffusion process."""
    batch = make_batch()
    diffusion = Diffusion(kind)
    model = FakeModel(batch)
    lm, words, each = need_several(trial(model, batch, diffusion), ("lm", "words", "per_picture"))
    if not model.calls:
        raise Advice("The network is never asked: call model(tokens, image_id, doc_id, has_loss, "
                     "xt, t).")
    if len(model.calls) > 1:
        raise Advice(f"The network is asked {len(model.calls)} times. One forward gives both, the "
                     f"logits and the noise: that is the point of one transformer.")
    need_tensor(lm, "The LM loss", like="float")
    need_tensor(each, "The diffusion loss", like="float")
    if lm.shape == (len(batch.images),) and each.ndim == 0:
        raise Advice("The first and the last result are exchanged: (lm, words, per_picture).")
    if lm.numel() != 1:
        raise Advice(f"The LM loss must be one number, the sum over all words, but it has shape "
                     f"{tuple(lm.shape)}.")
    check_pictures(each, len(batch.images))
    return Seen(batch, diffusion, model, lm, words, each,
                word_gradient=gradient(lm.sum(), model.logits, "LM"),
                picture_gradient=gradient(each.sum(), model.out, "diffusion"),
                right=losses(FakeModel(batch), batch, diffusion))


def check_pictures(each, M):
    """Raise Advice unless the diffusion loss is one number per picture."""
    if each.ndim == 0:
        raise Advice("The diffusion loss is one number for all pictures. Return one per picture, "
                     "(M,): batches differ in how many they have, and the log wants each with its "
                     "t.")
    if each.shape != (M,):
        raise Advice(f"The diffusion loss must be one number per picture, ({M},), but it has shape "
                     f"{tuple(each.shape)}: take the mean over c, h and w.")


def gradient(loss, of, name):
    """The gradient of a loss, a tensor like `of`. Raises Advice if there is none."""
    if not loss.requires_grad:
        raise Advice(f"The {name} loss has no gradient, so nothing could learn from it: is there "
                     f"an .item(), a .detach(), or a no_grad on its way?")
    found, = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
    if found is None:
        raise Advice(f"The {name} loss does not depend on what the network says.")
    return found


# ------------------------------------------------------------------------ what the network was told
def noisy_picture(seen):
    """The network sees xt of eq. 2"""
    # Paper: §3, the noise is added "before patchification": to the whole latent.
    for kind, one in seen.items():
        batch = one.batch
        told = one.model.calls[0]["xt"].detach()
        right = one.diffusion.add_noise(batch.latents, batch.eps, batch.t)
        if near(told, right, atol=1e-5):
            continue
        if near(told, batch.latents):
            return ("The network sees the clean pictures. It must see xt, with noise in it: "
                    "diffusion.add_noise.")
        if near(told, batch.eps):
            return "The network sees the noise alone, not xt."
        if near(told, one.diffusion.add_noise(batch.eps, batch.latents, batch.t)):
            return "x0 and eps are exchanged in add_noise(x0, eps, t)."
        for t in batch.t:
            one_for_all = t.expand(len(batch.t))
            if near(told, one.diffusion.add_noise(batch.latents, batch.eps, one_for_all)):
                return (f"All pictures have the same noise level, t = {t}. Each has a t of its "
                        f"own: batch.t is (M,).")
        for shift in (-1, 1):
            if near(told, one.diffusion.add_noise(batch.latents, batch.eps, batch.t + shift)):
                return "xt is made at the t next to the one in batch.t."
        return (f"What the network sees is not xt = a x0 + s eps ({kind}), with batch.latents, "
                f"batch.eps and batch.t.")


def told_its_t(seen):
    """The network is told the t that the noise has"""
    # TRAP: the network is told another t than the noise has, or one t for the whole batch
    # (docs/PAPER.md §4.3). It still trains, as it can guess the noise level from the picture.
    for one in seen.values():
        told = one.model.calls[0]["t"]
        right = one.batch.t
        if torch.equal(told, right):
            continue
        if told.is_floating_point() and near(told * one.diffusion.T, right):
            return "The network is told t / T. It wants t itself, an int: it divides by itself."
        if torch.equal(told.long(), right):
            return "The network is told t as floating point; t is int64."
        if (told == told[0]).all():
            return (f"The network is told t = {told[0]} for all pictures, but each has noise of "
                    f"its own level: {right.tolist()}.")
        if torch.equal(told, one.diffusion.T - right):
            return "The network is told T - t: t = 0 is the clean picture, t = T is noise."
        if torch.equal(told, right.flip(0)):
            return "The network is told the t of other pictures: the order is exchanged."
        shift = (told - right).tolist()
        if len(set(shift)) == 1:
            return (f"The network is told t {'+' if shift[0] > 0 else '-'} {abs(shift[0]):g}, but "
                    f"the noise has t. batch.t and our tables count alike: t = 0 is clean.")
        return f"The network is told t = {told.tolist()}, but the noise has t = {right.tolist()}."


def told_the_rest(seen):
    """The network sees the rows as they are"""
    for one in seen.values():
        told = one.model.calls[0]
        if not torch.equal(told["tokens"], one.batch.tokens):
            return ("The network sees other tokens than the batch has: shift the targets, not its "
                    "input.")
        for name in ("image_id", "doc_id"):
            if not torch.equal(told[name], getattr(one.batch, name)):
                return f"The network is told another {name} than the batch has."


# ---------------------------------------------------------------------------- what the losses count
def counted_positions(seen):
    """Only positions with has_loss are counted"""
    # A position that is not counted has no gradient at all.
    one = seen["ddpm"]
    batch = one.batch
    counted = one.word_gradient.abs().sum(-1) > 0
    extra = counted & ~batch.has_loss
    missing = batch.has_loss & ~counted
    if (extra & (batch.tokens == data.BOI)).any() and not (extra & (batch.image_id >= 0)).any():
        return ("BOI is asked for the next word, but a patch comes next: it has no LM loss. "
                "`has_loss` says who has one.")
    if (extra & (batch.image_id >= 0)).any():
        return ("Patches are asked for the next word. They are asked for noise only: `has_loss` "
                "says which positions have an LM loss.")
    if extra.any():
        return ("Padding, or the end of a document, is asked for the next word: `has_loss` says "
                "which positions have an LM loss.")
    if missing.any():
        b, q = missing.nonzero()[0].tolist()
        return (f"Some positions with has_loss are not counted, first in row {b} at {q}: is a row "
                f"one too short, or the wrong end cut off?")


def next_word(seen):
    """Position q is asked for token q + 1"""
    one = seen["ddpm"]
    batch = one.batch
    if one.lm.item() < 0:
        return "The LM loss has the wrong sign: it is -ln p, and positive."
    # A network that is asked for its own token reads it off its input, and learns nothing.
    # Cross-entropy's gradient is p - 1 at the word that is wanted, and p > 0 at all others.
    wanted = one.word_gradient.argmin(-1)[batch.has_loss]
    following = batch.tokens.roll(-1, 1)[batch.has_loss]
    if torch.equal(wanted, following):
        return None
    if torch.equal(wanted, batch.tokens[batch.has_loss]):
        return ("Not shifted: each position is asked for its own token, which it can see. Position "
                "q is asked for token q + 1.")
    if torch.equal(wanted, batch.tokens.roll(1, 1)[batch.has_loss]):
        return ("Shifted the wrong way: position q is asked for token q - 1, which it has seen. "
                "Roll by -1.")
    among = batch.tokens[batch.has_loss]
    if torch.equal(wanted, among.roll(-1)):
        return ("You choose the positions first and shift then, so that the last word before a "
                "picture is asked for EOI's follower: shift the whole rows first.")
    if torch.equal(wanted, batch.tokens.flatten().roll(1).view_as(batch.tokens)[batch.has_loss]):
        return "Shifted the wrong way, and over the ends of rows."
    return "The words that are asked for are not those that come next: token q + 1 at position q."


def sum_of_words(seen):
    """The LM loss is a sum"""
    # By what it is too large or too small says what it was divided by.
    one = seen["ddpm"]
    lm, words, _ = one.right
    ratio = one.lm.item() / lm.item()
    if abs(ratio - 1) < 1e-4:
        return None
    if abs(ratio - 1 / words) < 1e-5:
        return ("The LM loss is a mean. Return the sum: a mean of means weighs words in short "
                "batches more. eq. 4 divides once, by the words of the whole step.")
    B, T = one.batch.tokens.shape
    for count, what in ((B * T, "positions"), (B, "rows"), (B * (T - 1), "positions")):
        if abs(ratio - 1 / count) < 1e-5:
            return f"The LM loss is divided by the number of {what}. Return the plain sum."
    if abs(ratio - 1 / math.log(2)) < 1e-4:
        return "The LM loss is in bits: take the natural logarithm."
    following = one.batch.tokens.roll(-1, 1)[one.batch.has_loss]
    twice = one.model.logits[one.batch.has_loss].softmax(-1)
    if near(one.lm, F.cross_entropy(twice, following, reduction="sum")):
        return ("The softmax is taken twice: F.cross_entropy takes the logits as they are.")
    logits = one.model.logits[one.batch.has_loss]
    if near(one.lm, F.nll_loss(logits.log_softmax(0), following, reduction="sum")):
        return "The softmax is over the positions: it must be over the words, the last dimension."
    if near(one.lm, F.nll_loss(logits, following, reduction="sum")):
        return ("The softmax is missing: a logit is no log of a probability. F.cross_entropy takes "
                "logits, F.nll_loss their log_softmax.")
    return f"The LM loss is {one.lm.item():.2f} and should be {lm.item():.2f}."


def number_of_words(seen):
    """How many words were counted"""
    one = seen["ddpm"]
    _, right, _ = one.right
    words = one.words
    if isinstance(words, torch.Tensor) and words.numel() == 1:
        words = words.item()
    if not isinstance(words, (int, float)) or isinstance(words, bool):
        return "The second result must be a number: how many words the sum is over."
    if words != right:
        return (f"The number of words must be that of the positions with has_loss, {right}; you "
                f"return {words}.")


def squared_error(seen):
    """The diffusion loss is a squared error"""
    # The gradient of |x| is a sign, everywhere of the same size. That of x^2 grows with x.
    one = seen["ddpm"]
    size = one.model.out[0].numel()
    steps = (one.picture_gradient * size).abs()
    if near(steps, torch.ones_like(steps), atol=1e-3) or near(steps / size, torch.ones_like(steps)):
        return "This is L1, the absolute error: eq. 3 squares it."
    if near(one.each.detach() ** 2, one.right[2].detach()):
        return "The root is taken of the squared error: eq. 3 has none."


def target_is_right(seen):
    """The target is what diffusion.target says"""
    for kind, one in seen.items():
        eps = one.batch.eps
        x0 = one.batch.latents
        if pulls_to(one, eps if kind == "ddpm" else eps - x0):
            continue
        if pulls_to(one, x0):
            return f"The target is the clean picture x0; it is the noise, eps ({kind})."
        if pulls_to(one, one.model.calls[0]["xt"].detach()):
            return "The target is xt, which the network sees. It is the noise in it, eps."
        if kind == "ddpm" and pulls_to(one, eps - x0):
            return "The target is that of flow, for DDPM, too: ask diffusion.target."
        if kind == "ddpm":
            return ("The diffusion loss is not the squared error of what the network says against "
                    "eps (DDPM).")
        if pulls_to(one, eps):
            return ("Right for DDPM, but the target of flow is not eps: ask diffusion.target, "
                    "which knows the process.")
        if pulls_to(one, x0 - eps):
            return "The target of flow has the wrong sign: it is eps - x0. Ask diffusion.target."
        return "Right for DDPM, wrong for flow: its target is eps - x0."


def pulls_to(one, target):
    """Whether each picture's loss is a squared error to this target, with any factor."""
    error = (one.model.out - target).detach().flatten(1)                # (M, n)
    gradient = one.picture_gradient.flatten(1)                          # (M, n)
    factor = (gradient * error).sum(1) / error.square().sum(1)          # (M,)
    return near(gradient, factor[:, None] * error, atol=1e-5)


def mean_per_picture(seen):
    """One mean per picture"""
    # Our choice: the norm of eq. 3 is a mean over elements (diffusion.loss says why).
    one = seen["ddpm"]
    each = one.each.detach()
    right = one.right[2].detach()
    size = one.model.out[0].numel()
    if near(each, right, atol=1e-5):
        return None
    if near(each, right * size, atol=1e-3):
        return ("The error of a picture is a sum over its elements. Take the mean: a sum grows "
                "with the picture, and lambda = 5 would mean something else for each size.")
    if near(each, right / len(right)):
        return ("Each picture's loss is divided by the number of pictures: eq. 4 does that, once, "
                "over the whole step.")
    if near(each, 5 * right):
        return "lambda is in it already: eq. 4 multiplies by it."
    if near(each, each[:1].expand_as(each)):
        return "All pictures get the same number, the mean of all: each has its own."
    a, s = one.diffusion.at(one.batch.t, each)
    if near(each, right * (s / a) ** 2, rtol=1e-2):
        return ("You compare estimates of x0. That weighs each picture by (s/a)^2 of its t; eq. 3 "
                "compares what the network says, the noise, with the noise.")
    if near(each.sort().values, right.sort().values):
        return "The losses stand in another order than the pictures."
    ratio = each / right
    if not near(ratio, ratio[:1].expand_as(ratio), rtol=1e-3):
        return (f"Each picture's loss is weighted, by {numbers(ratio)}: eq. 3 weighs all t alike.")
    return f"The losses per picture are {numbers(each)} and should be {numbers(right)}."


def numbers(each):
    """A few numbers as text."""
    return ", ".join(f"{value:.3f}" for value in each.tolist())


def as_the_module(seen):
    """The same as the module, for flow too"""
    for kind, one in seen.items():
        lm, words, each = one.right
        if not (near(one.lm, lm, atol=1e-3) and near(one.each, each, atol=1e-4)):
            return f"Not yet: with {kind} the numbers are not those of the module."
        if not near(one.lm.detach(), seen["ddpm"].lm.detach()):
            return "The LM loss depends on the diffusion process."


PROPERTIES = (noisy_picture, told_its_t, told_the_rest, counted_positions, next_word, sum_of_words,
              number_of_words, squared_error, target_is_right, mean_per_picture, as_the_module)
