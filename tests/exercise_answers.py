"""Answers to the exercises, right and wrong ones: test_exercises.py holds the checks to them.
Spoilers!"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import attention_mask
import data
import diffusion
import patchify as patchify_module
from data import BOI, BOS, DROP, EOI, EOS, PAD, PATCH
from exercises.checks import EXERCISES

# Wrong answers: {exercise: {what is wrong: (answer, words that its advice must have)}}.
WRONG = {name: {} for name in EXERCISES}
# Right answers, written in another way than the module's.
RIGHT = {name: {} for name in EXERCISES}


def wrong(name, what, *words):
    """Decorator: a wrong answer to an exercise, and words that the advice must have."""
    def keep(answer):
        assert what not in WRONG[name]
        WRONG[name][what] = (answer, words)
        return answer
    return keep


def right(name, what):
    """Decorator: a right answer to an exercise."""
    def keep(answer):
        RIGHT[name][what] = answer
        return answer
    return keep


# ---------------------------------------------------------------------------------------- intervals
def loops(image_id, doc_id, q_sees_k):
    """(lo, hi) of a rule q_sees_k(q, k, images, documents), by looking at every pair."""
    lo, hi = torch.zeros_like(image_id), torch.zeros_like(image_id)
    T = image_id.shape[1]
    for b, (images, documents) in enumerate(zip(image_id.tolist(), doc_id.tolist())):
        for q in range(T):
            seen = [k for k in range(T) if q_sees_k(q, k, images, documents)]
            lo[b, q], hi[b, q] = (seen[0], seen[-1]) if seen else (q + 1, q)
    return lo, hi


def rule(what, *words, flag=True):
    """Decorator: a rule (q, k, images, documents) -> bool as a wrong answer to `intervals`."""
    def keep(q_sees_k):
        def answer(image_id, doc_id, bidirectional=True):
            if not bidirectional and flag:
                return attention_mask.intervals(image_id, doc_id, False)
            return loops(image_id, doc_id, q_sees_k)
        return wrong("intervals", what, *words)(answer)
    return keep


@right("intervals", "from the OR form")
def from_or(image_id, doc_id, bidirectional=True):
    if image_id.shape != doc_id.shape:
        raise ValueError("shapes")
    mask = attention_mask.or_mask(image_id, doc_id, bidirectional)
    T = image_id.shape[1]
    return mask.int().argmax(-1), T - 1 - mask.flip(-1).int().argmax(-1)


@right("intervals", "two loops")
def two_loops(image_id, doc_id, bidirectional=True):
    if image_id.shape != doc_id.shape:
        raise ValueError("shapes")

    def sees(q, k, images, documents):
        same = bidirectional and images[q] == images[k] >= 0
        return documents[q] == documents[k] and (k <= q or same)
    return loops(image_id, doc_id, sees)


def same_doc(q, k, documents):
    return documents[q] == documents[k]


def same_picture(q, k, images):
    return images[q] == images[k] >= 0


@rule("documents forgotten", "anew with each document")
def _(q, k, i, d):
    return k <= q or same_picture(q, k, i)


@rule("q and k exchanged", "q and k are exchanged")
def _(q, k, i, d):
    return same_doc(q, k, d) and (q <= k or same_picture(q, k, i))


@rule("AND for OR", "AND", "OR")
def _(q, k, i, d):
    return same_doc(q, k, d) and k <= q and same_picture(q, k, i)


@rule("AND for OR, words see themselves", "AND", "OR")
def _(q, k, i, d):
    return q == k or (same_doc(q, k, d) and k <= q and same_picture(q, k, i))


@rule("inverted convention", "inverted", "not")
def _(q, k, i, d):
    return same_doc(q, k, d) and k > q and not same_picture(q, k, i)


@wrong("intervals", "inverted, to the end of the row", "inverted")
def _(image_id, doc_id, bidirectional=True):
    lo, hi = attention_mask.intervals(image_id, doc_id, bidirectional)
    return hi + 1, torch.full_like(hi, hi.shape[1] - 1)


@wrong("intervals", "inverted: blocked is what comes before", "inverted")
def _(image_id, doc_id, bidirectional=True):
    lo, hi = attention_mask.intervals(image_id, doc_id, bidirectional)
    return torch.zeros_like(lo), lo - 1


@rule("prefix-LM", "prefix-LM")
def _(q, k, i, d):
    last = max([p for p in range(len(i)) if i[p] >= 0 and d[p] == d[q]], default=-1)
    return same_doc(q, k, d) and (k <= q or (q <= last and k <= last))


@rule("prefix-LM up to the next picture", "prefix-LM")
def _(q, k, i, d):
    later = [p for p in range(q, len(i)) if i[p] >= 0 and d[p] == d[q]]
    end = max([p for p in range(len(i)) if later and i[p] == i[later[0]]], default=-1)
    return same_doc(q, k, d) and (k <= q or k <= end)


@rule("text is bidirectional", "-1 == -1")
def _(q, k, i, d):
    if not same_doc(q, k, d):
        return False
    if k <= q:
        return True
    if i[q] != i[k] or i[q] >= 0 and -1 in i[q: k]:
        return False
    return all(x == i[q] for x in i[q: k])


@rule("both are patches", "same picture")
def _(q, k, i, d):
    return same_doc(q, k, d) and (k <= q or (i[q] >= 0 and i[k] >= 0))


@rule("touching pictures are one", "touch")
def _(q, k, i, d):
    return same_doc(q, k, d) and (k <= q or all(x >= 0 for x in i[q: k + 1]))


@rule("causal only", "Causal")
def _(q, k, i, d):
    return same_doc(q, k, d) and k <= q


@rule("only its own picture", "nothing else")
def _(q, k, i, d):
    return same_doc(q, k, d) and (same_picture(q, k, i) or (i[q] < 0 and k <= q))


@rule("everything", "Everything")
def _(q, k, i, d):
    return same_doc(q, k, d)


@rule("k < q", "k <= q")
def _(q, k, i, d):
    return same_doc(q, k, d) and (k < q or same_picture(q, k, i))


@rule("BOI joins the block", "block is one too wide")
def _(q, k, i, d):
    last = len(i) - 1
    boi = i[q] < 0 and i[min(q + 1, last)] >= 0 and same_doc(q, min(q + 1, last), d)
    return same_doc(q, k, d) and (k <= q or same_picture(q, k, i) or (boi and i[k] == i[q + 1]))


@rule("words see only themselves", "only itself")
def _(q, k, i, d):
    return same_doc(q, k, d) and (q == k or (i[q] >= 0 and (k <= q or same_picture(q, k, i))))


@rule("lo restarts at each picture", "restart at pictures")
def _(q, k, i, d):
    start = max([p for p in range(q + 1) if i[p] >= 0 and i[p] != i[q]], default=-1)
    return same_doc(q, k, d) and (start < k <= q or same_picture(q, k, i))


def from_module(what, *words):
    """Decorator: a change (lo, hi, image_id, doc_id, bidirectional) of what the module returns."""
    def keep(change):
        def answer(image_id, doc_id, bidirectional=True):
            lo, hi = attention_mask.intervals(image_id, doc_id, bidirectional)
            return change(lo, hi, image_id, doc_id, bidirectional)
        return wrong("intervals", what, *words)(answer)
    return keep


@from_module("hi exclusive", "included")
def _(lo, hi, *_):
    return lo, hi + 1


@from_module("swapped", "order")
def _(lo, hi, *_):
    return hi, lo


@wrong("intervals", "flag forgotten", "`bidirectional` changes nothing")
def _(image_id, doc_id, bidirectional=True):
    return attention_mask.intervals(image_id, doc_id)


@from_module("padding sees nothing", "Padding", "NaN")
def _(lo, hi, image_id, doc_id, _):
    last = doc_id.max(1, keepdim=True).values
    padding = (doc_id == last) & (last > 2)
    return torch.where(padding, 1, lo), torch.where(padding, 0, hi)


@from_module("row 0 speaks for all", "row 0")
def _(lo, hi, *_):
    return lo[:1].expand_as(lo).clone(), hi[:1].expand_as(hi).clone()


@from_module("counts over the batch", "whole batch")
def _(lo, hi, *_):
    B, T = lo.shape
    offset = torch.arange(B)[:, None] * T
    return lo + offset, hi + offset


@from_module("counts within the document", "start of the row")
def _(lo, hi, *_):
    return lo - lo, hi - lo


@from_module("the last patch is missing", "last patch")
def _(lo, hi, image_id, doc_id, bidirectional):
    pos = torch.arange(lo.shape[1]).expand_as(lo)
    return lo, torch.maximum(hi - 1, pos)


@from_module("one too many after the picture", "one position too many")
def _(lo, hi, image_id, doc_id, bidirectional):
    pos = torch.arange(lo.shape[1]).expand_as(lo)
    if not bidirectional:
        return lo, hi
    return lo, torch.where(image_id >= 0, (hi + 1).clamp(max=lo.shape[1] - 1), pos)


@from_module("lo one too small", "one too small")
def _(lo, hi, *_):
    return (lo - 1).clamp(min=0), hi


@from_module("a mask", "mask")
def _(lo, hi, *_):
    return attention_mask.dense_mask(lo, hi)


@from_module("floats", "dtype int")
def _(lo, hi, *_):
    return lo.float(), hi.float()


@from_module("broadcasts", "ValueError")
def _(lo, hi, *_):
    return lo, hi


@wrong("intervals", "shapes may differ", "ValueError")
def _(image_id, doc_id, bidirectional=True):
    return attention_mask.intervals(image_id, doc_id.expand_as(image_id), bidirectional)


@wrong("intervals", "False drops the documents", "bidirectional=False")
def _(image_id, doc_id, bidirectional=True):
    lo, hi = attention_mask.intervals(image_id, doc_id)
    pos = torch.arange(lo.shape[1]).expand_as(lo)
    return (lo, hi) if bidirectional else (torch.zeros_like(lo), pos)


@from_module("one-based", "count from 0")
def _(lo, hi, *_):
    return lo + 1, hi + 1


@from_module("hi of words exclusive", "hi of a word")
def _(lo, hi, image_id, doc_id, bidirectional):
    return lo, torch.where(image_id < 0, hi + 1, hi)


@from_module("a window of five", "a few positions")
def _(lo, hi, *_):
    return torch.maximum(lo, torch.arange(lo.shape[1]) - 4), hi


@wrong("intervals", "rolled over the ends of the row", "end of the row")
def _(image_id, doc_id, bidirectional=True):
    T = image_id.shape[1]
    pos = torch.arange(T).expand_as(image_id)
    lo = torch.where(doc_id != doc_id.roll(1, 1), pos, 0).cummax(1).values
    ends = (image_id != image_id.roll(-1, 1)) | (doc_id != doc_id.roll(-1, 1))
    next_end = torch.where(ends, pos, T).flip(1).cummin(1).values.flip(1)
    return lo, torch.where(image_id >= 0, next_end, pos) if bidirectional else pos


@from_module("hi is the first patch", "first patch")
def _(lo, hi, image_id, doc_id, bidirectional):
    B, T = lo.shape
    for b in range(B):
        for q in range(T):
            if bidirectional and image_id[b, q] >= 0:
                hi[b, q] = (image_id[b] == image_id[b, q]).nonzero().min()
    return lo, hi


@from_module("all pictures have three patches", "3 patches long")
def _(lo, hi, image_id, doc_id, bidirectional):
    B, T = lo.shape
    for b in range(B):
        for q in range(T):
            if bidirectional and image_id[b, q] >= 0:
                hi[b, q] = (image_id[b] == image_id[b, q]).nonzero().min() + 2
    return lo, hi


@from_module("a length", "how many positions")
def _(lo, hi, *_):
    return lo, hi - lo + 1


@from_module("lists", "tensor", "list")
def _(lo, hi, *_):
    return lo.tolist(), hi.tolist()


@wrong("intervals", "the flag is upside down", "upside down")
def _(image_id, doc_id, bidirectional=True):
    return attention_mask.intervals(image_id, doc_id, not bidirectional)


@wrong("intervals", "documents of row 0", "row 0")
def _(image_id, doc_id, bidirectional=True):
    lo, hi = attention_mask.intervals(image_id, doc_id, bidirectional)
    return torch.stack([(doc_id[0] == d).int().argmax() for d in doc_id.flatten()]).view_as(lo), hi


del WRONG["intervals"]["broadcasts"]                    # it is right


@wrong("intervals", "another default", "the default of the stub, True")
def _(image_id, doc_id, bidirectional=False):
    return attention_mask.intervals(image_id, doc_id, bidirectional)


@from_module("every picture has four patches", "one ends where image_id changes")
def _(lo, hi, image_id, doc_id, bidirectional):
    if image_id.shape != doc_id.shape or not bidirectional:
        return lo, hi
    hi = torch.arange(hi.shape[1]).repeat(len(hi), 1)
    for b, row in enumerate(image_id.tolist()):
        q = 0
        while q < len(row):
            more = 4 if row[q] >= 0 else 1
            hi[b, q: q + more] = min(q + more, len(row)) - 1
            q += more
    return lo, hi


# ----------------------------------------------------------------------------------------- patchify
def checked(x, p):
    if x.shape[2] % p or x.shape[3] % p:
        raise ValueError("p must divide both sides")
    return x.shape


@right("patchify", "two loops")
def _(x, p):
    M, c, h, w = checked(x, p)
    rows = []
    for y in range(0, h, p):
        for k in range(0, w, p):
            rows.append(x[:, :, y: y + p, k: k + p].reshape(M, -1))
    return torch.stack(rows, 1)


@right("patchify", "unfold")
def _(x, p):
    checked(x, p)
    return F.unfold(x, p, stride=p).transpose(1, 2)


def arranged(what, pattern, *words):
    """A wrong answer to patchify: an arrangement, as einops writes it."""
    def answer(x, p):
        checked(x, p)
        return rearrange(x, pattern, p=p, q=p)
    wrong("patchify", what, *words)(answer)


IN = "m c (h p) (w q) -> "
arranged("column-major", IN + "m (w h) (c p q)", "columns", "Raster order")
arranged("channels last", IN + "m (h w) (p q c)", "Channels last")
arranged("transposed within", IN + "m (h w) (c q p)", "transposed")
arranged("transposed within, channels last", IN + "m (h w) (q p c)", "Channels last", "transposed")
arranged("row, channel, column", IN + "m (h w) (p c q)", "channel, then row, then column")
arranged("vectors in columns", IN + "m (c p q) (h w)", "columns", "exchange")
arranged("pictures merged", IN + "(m h w) (c p q)", "keep M")
arranged("each channel by itself", IN + "m (c h w) (p q)", "all channels")
arranged("a grid", IN + "m h w (c p q)", "one row of P vectors")
arranged("small pictures", IN + "m (h w) c p q", "one vector")
arranged("channels apart", IN + "m c (h w) (p q)", "all channels")
arranged("one pixel of each patch", "m c (p h) (q w) -> m (h w) (c p q)", "lie apart")
arranged("pixels", "m c (h p) (w q) -> m (h p w q) c", "p is not used")
arranged("still a picture", "m c (h p) (w q) -> m c (h p) (w q)", "still a picture")


@wrong("patchify", "plain reshape", "plain reshape")
def _(x, p):
    M, c, h, w = checked(x, p)
    return x.reshape(M, h * w // p ** 2, c * p * p)


@wrong("patchify", "split, but not brought together", "plain reshape")
def _(x, p):
    M, c, h, w = checked(x, p)
    return x.view(M, c, h // p, p, w // p, p).reshape(M, -1, c * p * p)


@wrong("patchify", "h and w exchanged", "Raster", "order")
def _(x, p):
    M, c, h, w = checked(x, p)
    squares = x.view(M, c, h // p, p, w // p, p).permute(0, 4, 2, 1, 3, 5)
    return squares.reshape(M, -1, c * p * p)


@wrong("patchify", "reversed", "reverse")
def _(x, p):
    return patchify_module.patchify(x, p).flip(1)


@wrong("patchify", "no error", "ValueError")
def _(x, p):
    M, c, h, w = x.shape
    x = x[:, :, : h // p * p, : w // p * p]
    return patchify_module.patchify(x, p)


@wrong("patchify", "only h is tested", "ValueError")
def _(x, p):
    M, c, h, w = x.shape
    if h % p:
        raise ValueError("h")
    return F.unfold(x, p, stride=p).transpose(1, 2)


@wrong("patchify", "p = 2 written in", "written into it")
def _(x, p):
    checked(x, p)
    return F.unfold(x, 2, stride=2).transpose(1, 2)


@wrong("patchify", "square pictures only", "h and w taken for equal", "h and w")
def _(x, p):
    M, c, h, w = checked(x, p)
    if h > w:
        x = x.transpose(2, 3)
    return F.unfold(x, p, stride=p).transpose(1, 2)


@wrong("patchify", "the mean of each patch", "numbers")
def _(x, p):
    checked(x, p)
    return F.avg_pool2d(x, p).flatten(2).transpose(1, 2).repeat(1, 1, p * p)


@wrong("patchify", "normalised", "changed")
def _(x, p):
    return patchify_module.patchify(x - x.mean(), p)


@wrong("patchify", "overlapping", "must be")
def _(x, p):
    checked(x, p)
    return F.unfold(x, p, stride=1).transpose(1, 2)


@wrong("patchify", "pictures mixed", "another")
def _(x, p):
    patches = patchify_module.patchify(x, p).transpose(0, 1)
    return patches.reshape(x.shape[0], -1, x.shape[1] * p * p)


@right("patchify", "pixel_unshuffle")
def _(x, p):
    checked(x, p)
    return F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)


@wrong("patchify", "in 16 bits", "rounded")
def _(x, p):
    return patchify_module.patchify(x.half(), p).float()


@wrong("patchify", "whole numbers", "dtype")
def _(x, p):
    return patchify_module.patchify(x, p).long()


def squares(x, p):
    """The patches of all pictures, (M, c*p*p) each, in raster order."""
    M, c, h, w = checked(x, p)
    found = []
    for y in range(0, h, p):
        for k in range(0, w, p):
            found.append(x[:, :, y: y + p, k: k + p].reshape(M, -1))
    return found


@wrong("patchify", "a list", "list")
def _(x, p):
    return squares(x, p)


@wrong("patchify", "stacked in front", "dim=1")
def _(x, p):
    return torch.stack(squares(x, p))


@wrong("patchify", "cat for stack", "stack, not cat")
def _(x, p):
    return torch.cat(squares(x, p), 1)


@wrong("patchify", "one picture only", "M is missing")
def _(x, p):
    return torch.stack(squares(x, p), 1)[0]


@wrong("patchify", "assert", "AssertionError")
def _(x, p):
    assert x.shape[2] % p == 0 and x.shape[3] % p == 0
    return F.unfold(x, p, stride=p).transpose(1, 2)


@wrong("patchify", "unfolded, but not permuted", "order of the dimensions")
def _(x, p):
    M, c, h, w = checked(x, p)
    return x.unfold(2, p, p).unfold(3, p, p).reshape(M, -1, c * p * p)


@wrong("patchify", "snake", "[0, 1, 2, 5, 4, 3]")
def _(x, p):
    M, c, h, w = checked(x, p)
    grid = patchify_module.patchify(x, p).view(M, h // p, w // p, -1).clone()
    grid[:, 1::2] = grid[:, 1::2].flip(2)
    return grid.flatten(1, 2)


@wrong("patchify", "p patches per side", "the side of a patch")
def _(x, p):
    checked(x, p)
    return rearrange(x, "m c (p h) (q w) -> m (p q) (c h w)", p=p, q=p)


# --------------------------------------------------------------------------------- cosine_alpha_bar
def curve(t, T, offset):
    return torch.cos((t / T + offset) / (1 + offset) * math.pi / 2) ** 2


def steps(T):
    return torch.arange(T + 1, dtype=torch.float64)


def product(beta):
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])


def betas(T, offset, beta_max):
    f = curve(steps(T), T, offset)
    return (1 - f[1:] / f[:-1]).clamp(max=beta_max)


@right("cosine_alpha_bar", "a loop")
def _(T=1000, offset=0.008, beta_max=0.999):
    def f(t):
        return math.cos((t / T + offset) / (1 + offset) * math.pi / 2) ** 2
    table = [1.0]
    for t in range(1, T + 1):
        table.append(table[-1] * (1 - min(beta_max, 1 - f(t) / f(t - 1))))
    return torch.tensor(table, dtype=torch.float64)


@right("cosine_alpha_bar", "kept, not lost")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = curve(torch.linspace(0, T, T + 1, dtype=torch.float64), T, offset)
    kept = torch.cat([torch.ones(1).double(), (f[1:] / f[:-1]).clamp(min=1 - beta_max)])
    return kept.log().cumsum(0).exp()


def schedule(what, *words):
    return wrong("cosine_alpha_bar", what, *words)


@schedule("T entries", "T + 1")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(T, offset, beta_max))[1:]


@schedule("the last entry missing", "T + 1")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(T, offset, beta_max))[:-1]


@schedule("not divided by f(0)", "f(0)")
def _(T=1000, offset=0.008, beta_max=0.999):
    return curve(steps(T), T, offset)


@schedule("no clip", "clip")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = curve(steps(T), T, offset)
    return f / f[0]


@schedule("clip on alpha_bar", "clip is in the wrong place")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = curve(steps(T), T, offset)
    return (f / f[0]).clamp(min=1 - beta_max)


@schedule("cos, not cos^2", "cos^2", "root")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = curve(steps(T), T, offset).sqrt()
    return product((1 - f[1:] / f[:-1]).clamp(max=beta_max))


@schedule("the factor a", "root")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(T, offset, beta_max)).sqrt()


@schedule("betas", "betas")
def _(T=1000, offset=0.008, beta_max=0.999):
    return betas(T, offset, beta_max)


@schedule("betas with a zero in front", "betas")
def _(T=1000, offset=0.008, beta_max=0.999):
    return torch.cat([torch.zeros(1).double(), betas(T, offset, beta_max)])


@schedule("1 - betas", "product")
def _(T=1000, offset=0.008, beta_max=0.999):
    return torch.cat([torch.ones(1).double(), 1 - betas(T, offset, beta_max)])


@schedule("1000 written in", "1000")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(1000, offset, beta_max))


@schedule("1000 in the fraction", "1000")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = curve(steps(T), 1000, offset)
    return product((1 - f[1:] / f[:-1]).clamp(max=beta_max))


@schedule("1 - alpha_bar", "1 - alpha_bar")
def _(T=1000, offset=0.008, beta_max=0.999):
    return 1 - product(betas(T, offset, beta_max))


@schedule("backwards", "backwards")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(T, offset, beta_max)).flip(0)


@schedule("no offset", "offset")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(T, 0.0, beta_max))


@schedule("offset written in", "`offset` is an argument")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(T, 0.008, beta_max))


@schedule("beta_max written in", "`beta_max` is an argument")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(T, offset, 0.999))


@schedule("only the last one clipped", "several betas")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = curve(steps(T), T, offset)
    table = f / f[0]
    table[-1] = table[-2] * (1 - beta_max)
    return table


@schedule("pi for pi/2", "beyond pi/2")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = torch.cos((steps(T) / T + offset) / (1 + offset) * math.pi) ** 2
    return f / f[0]


@schedule("not divided by 1 + offset", "1 + offset")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = torch.cos((steps(T) / T + offset) * math.pi / 2) ** 2
    return f / f[0]


@schedule("the linear schedule", "linear")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(torch.linspace(1e-4, 0.02, T, dtype=torch.float64))


@schedule("a straight line", "straight line")
def _(T=1000, offset=0.008, beta_max=0.999):
    return 1 - steps(T) / T


@schedule("float32", "float64")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(T, offset, beta_max)).float()


@schedule("shifted by one", "Off by one")
def _(T=1000, offset=0.008, beta_max=0.999):
    table = product(betas(T, offset, beta_max))
    return torch.cat([table[1:], table[-1:] / 2])


@schedule("cos^4", "cos^4")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(T, offset, beta_max)) ** 2


@schedule("numpy", "torch tensor")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(T, offset, beta_max)).numpy()


@schedule("degrees", "angle", "cos^2")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = torch.cos((steps(T) / T + offset) / (1 + offset) * 90) ** 2
    return f / f[0]


def from_f(f, beta_max):
    return product((1 - f[1:] / f[:-1]).clamp(max=beta_max))


@right("cosine_alpha_bar", "numpy")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = np.cos((np.arange(T + 1) / T + offset) / (1 + offset) * np.pi / 2) ** 2
    kept = np.maximum(f[1:] / f[:-1], 1 - beta_max)
    return torch.from_numpy(np.concatenate([[1.0], np.cumprod(kept)]))


@schedule("a root too many", "power of 0.25")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(T, offset, beta_max)) ** 0.25


@schedule("t / (T + 1)", "T + 1")
def _(T=1000, offset=0.008, beta_max=0.999):
    return from_f(curve(steps(T), T + 1, offset), beta_max)


@schedule("clamp from below", "at *most*")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = curve(steps(T), T, offset)
    return product((1 - f[1:] / f[:-1]).clamp(min=beta_max))


@schedule("a sum", "cumsum")
def _(T=1000, offset=0.008, beta_max=0.999):
    return torch.cat([torch.ones(1).double(), torch.cumsum(1 - betas(T, offset, beta_max), 0)])


@schedule("the product of betas", "not of beta")
def _(T=1000, offset=0.008, beta_max=0.999):
    return torch.cat([torch.ones(1).double(), torch.cumprod(betas(T, offset, beta_max), 0)])


@schedule("a sine", "sine")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = 1 - curve(steps(T), T, offset)
    return f / f[0]


@schedule("the fraction upside down", "f(t-1)/f(t)")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = curve(steps(T), T, offset)
    return product((1 - f[:-1] / f[1:]).clamp(max=beta_max))


@schedule("no fraction", "division is missing")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product((1 - curve(steps(T), T, offset)[1:]).clamp(max=beta_max))


@schedule("pi/2 outside", "pi/2 inside the cosine")
def _(T=1000, offset=0.008, beta_max=0.999):
    return from_f((torch.cos((steps(T) / T + offset) / (1 + offset)) * math.pi / 2) ** 2, beta_max)


@schedule("brackets", "brackets")
def _(T=1000, offset=0.008, beta_max=0.999):
    return from_f(torch.cos((steps(T) / T + offset) / 1 + offset * math.pi / 2) ** 2, beta_max)


@schedule("t // T", "t // T")
def _(T=1000, offset=0.008, beta_max=0.999):
    return from_f(curve(steps(T) // T * T, T, offset), beta_max)


@schedule("float32 called float64", "those of float32")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = curve(torch.arange(T + 1), T, offset)
    kept = 1 - (1 - f[1:] / f[:-1]).clamp(max=beta_max)
    return torch.cat([torch.ones(1), kept.cumprod(0)]).double()


@schedule("1 minus the sum of betas", "sum of the betas")
def _(T=1000, offset=0.008, beta_max=0.999):
    return 1 - torch.cat([torch.zeros(1), betas(T, offset, beta_max).cumsum(0)])


@schedule("another default", "`offset` must have the default")
def _(T=1000, offset=0.08, beta_max=0.999):
    return product(betas(T, offset, beta_max))


@schedule("(t + offset) / T", "(t/T + offset)")
def _(T=1000, offset=0.008, beta_max=0.999):
    return from_f(torch.cos((steps(T) + offset) / T / (1 + offset) * math.pi / 2) ** 2, beta_max)


@schedule("t from 1", "from 0 to T")
def _(T=1000, offset=0.008, beta_max=0.999):
    f = curve(steps(T) + 1, T, offset)
    return f / f[0]


@schedule("betas clipped from below, too", "no lower one")
def _(T=1000, offset=0.008, beta_max=0.999):
    return product(betas(T, offset, beta_max).clamp(min=1e-4))


# ----------------------------------------------------------------------------------- ancestral_step
def step(what, *words):
    return wrong("ancestral_step", what, *words)


@right("ancestral_step", "by precision")
def _(diffusion, xt, x0, t, u, noise):
    if u == 0:
        return x0.clone()
    (at, st), (au, su) = diffusion.at(t, xt), diffusion.at(u, xt)
    k = at / au
    beta = st ** 2 - k ** 2 * su ** 2
    precision = 1 / su ** 2 + k ** 2 / beta
    mean = (au * x0 / su ** 2 + k * xt / beta) / precision
    return mean + noise / precision ** 0.5


@right("ancestral_step", "as DDIM with its sigma")
def _(diffusion, xt, x0, t, u, noise):
    (at, st), (au, su) = diffusion.at(t, xt), diffusion.at(u, xt)
    variance = (su ** 2 / st ** 2 * (st ** 2 - (at / au) ** 2 * su ** 2)).clamp(min=0)
    eps = (xt - at * x0) / st
    return au * x0 + (su ** 2 - variance).clamp(min=0).sqrt() * eps + variance.sqrt() * noise


@right("ancestral_step", "by signal-to-noise ratios")
def _(diffusion, xt, x0, t, u, noise):
    (at, st), (au, su) = diffusion.at(t, xt), diffusion.at(u, xt)
    old = (at * su / (au * st)) ** 2                    # what is left of the old ratio
    return at / au * (su / st) ** 2 * xt + au * (1 - old) * x0 + su * (1 - old).sqrt() * noise


def general(diffusion, xt, x0, t, u, noise, beta):
    """The step with a beta of one's own."""
    (at, st), (au, su) = diffusion.at(t, xt), diffusion.at(u, xt)
    mean = at / au * su ** 2 / st ** 2 * xt + au * beta / st ** 2 * x0
    return mean + (beta * su ** 2 / st ** 2).clamp(min=0).sqrt() * noise


@step("beta = 1 - (at/au)^2", "Right for DDPM, wrong for flow")
def _(diffusion, xt, x0, t, u, noise):
    (at, _), (au, _) = diffusion.at(t, xt), diffusion.at(u, xt)
    return general(diffusion, xt, x0, t, u, noise, 1 - (at / au) ** 2)


@step("1 - a^2 for s^2", "Right for DDPM, wrong for flow")
def _(diffusion, xt, x0, t, u, noise):
    (at, _), (au, _) = diffusion.at(t, xt), diffusion.at(u, xt)
    k = at / au
    nt, nu = 1 - at ** 2, 1 - au ** 2
    beta = nt - k ** 2 * nu
    return k * nu / nt * xt + au * beta / nt * x0 + (beta * nu / nt).clamp(min=0).sqrt() * noise


@step("beta of the 1000-step chain", "1000-step chain")
def _(diffusion, xt, x0, t, u, noise):
    (at, _), (ab, _) = diffusion.at(t, xt), diffusion.at(t - 1, xt)
    return general(diffusion, xt, x0, t, u, noise, 1 - (at / ab) ** 2)


@step("a step to t - 1", "1000-step chain")
def _(diffusion_, xt, x0, t, u, noise):
    return diffusion.ancestral_step(diffusion_, xt, x0, t, t - 1, noise)


@step("variance beta", "last step")
def _(diffusion_, xt, x0, t, u, noise):
    (at, st), (au, su) = diffusion_.at(t, xt), diffusion_.at(u, xt)
    beta = st ** 2 - (at / au) ** 2 * su ** 2
    return diffusion.ancestral_step(diffusion_, xt, x0, t, u, 0 * noise) + beta.sqrt() * noise


@step("variance beta, none at the end", "variance beta")
def _(diffusion_, xt, x0, t, u, noise):
    (at, st), (au, su) = diffusion_.at(t, xt), diffusion_.at(u, xt)
    beta = st ** 2 - (at / au) ** 2 * su ** 2
    noise = noise if u > 0 else 0 * noise
    return diffusion.ancestral_step(diffusion_, xt, x0, t, u, 0 * noise) + beta.sqrt() * noise


@step("no noise only if t == 1", "where u is 0")
def _(diffusion_, xt, x0, t, u, noise):
    mean = diffusion.ancestral_step(diffusion_, xt, x0, t, u, 0 * noise)
    if t == 1:
        return mean
    spread = diffusion.ancestral_step(diffusion_, 0 * xt, 0 * x0, t, max(u, 1), noise)
    return mean + spread


@step("own noise", "random numbers of its own")
def _(diffusion_, xt, x0, t, u, noise):
    return diffusion.ancestral_step(diffusion_, xt, x0, t, u, torch.randn_like(xt))


@step("own noise, seeded", "seeds")
def _(diffusion_, xt, x0, t, u, noise):
    torch.manual_seed(0)
    return diffusion.ancestral_step(diffusion_, xt, x0, t, u, noise)


@step("returns xt", "xt as it is")
def _(diffusion, xt, x0, t, u, noise):
    return xt


@step("returns x0", "x0")
def _(diffusion, xt, x0, t, u, noise):
    return x0


@step("x0 and fresh noise", "xt is not used")
def _(diffusion, xt, x0, t, u, noise):
    a, s = diffusion.at(u, xt)
    return a * x0 + s * noise


@step("DDIM", "DDIM")
def _(diffusion_, xt, x0, t, u, noise):
    a, s = diffusion_.at(t, xt)
    return diffusion.ddim_step(diffusion_, x0, (xt - a * x0) / s, u)


@step("no noise", "No noise")
def _(diffusion_, xt, x0, t, u, noise):
    return diffusion.ancestral_step(diffusion_, xt, x0, t, u, 0 * noise)


@step("no square root", "square root")
def _(diffusion_, xt, x0, t, u, noise):
    (at, st), (au, su) = diffusion_.at(t, xt), diffusion_.at(u, xt)
    beta = st ** 2 - (at / au) ** 2 * su ** 2
    mean = diffusion.ancestral_step(diffusion_, xt, x0, t, u, 0 * noise)
    return mean + beta * su ** 2 / st ** 2 * noise


@step("all the noise of u", "comes with xt already")
def _(diffusion_, xt, x0, t, u, noise):
    _, su = diffusion_.at(u, xt)
    return diffusion.ancestral_step(diffusion_, xt, x0, t, u, 0 * noise) + su * noise


@step("noise subtracted", "subtracted")
def _(diffusion_, xt, x0, t, u, noise):
    return diffusion.ancestral_step(diffusion_, xt, x0, t, u, -noise)


@step("xt and x0 exchanged", "changed places")
def _(diffusion_, xt, x0, t, u, noise):
    return diffusion.ancestral_step(diffusion_, x0, xt, t, u, noise)


@step("t and u exchanged", "are exchanged")
def _(diffusion_, xt, x0, t, u, noise):
    return diffusion.ancestral_step(diffusion_, xt, x0, u, t, noise)


@step("off by one", "Off by one")
def _(diffusion_, xt, x0, t, u, noise):
    return diffusion.ancestral_step(diffusion_, xt, x0, max(t - 1, 1), max(u - 1, 0), noise)


@step("a_u forgotten", "a_u")
def _(diffusion, xt, x0, t, u, noise):
    (at, st), (au, su) = diffusion.at(t, xt), diffusion.at(u, xt)
    beta = st ** 2 - (at / au) ** 2 * su ** 2
    mean = at / au * su ** 2 / st ** 2 * xt + beta / st ** 2 * x0
    return mean + (beta * su ** 2 / st ** 2).clamp(min=0).sqrt() * noise


@step("keep forgotten", "a_t / a_u")
def _(diffusion, xt, x0, t, u, noise):
    (at, st), (au, su) = diffusion.at(t, xt), diffusion.at(u, xt)
    beta = st ** 2 - (at / au) ** 2 * su ** 2
    mean = su ** 2 / st ** 2 * xt + au * beta / st ** 2 * x0
    return mean + (beta * su ** 2 / st ** 2).clamp(min=0).sqrt() * noise


@step("keep upside down", "upside down")
def _(diffusion, xt, x0, t, u, noise):
    (at, st), (au, su) = diffusion.at(t, xt), diffusion.at(u, xt)
    beta = st ** 2 - (at / au) ** 2 * su ** 2
    keep = (au / at).nan_to_num(posinf=0)
    mean = keep * su ** 2 / st ** 2 * xt + au * beta / st ** 2 * x0
    return mean + (beta * su ** 2 / st ** 2).clamp(min=0).sqrt() * noise


@step("beta = st^2 - su^2", "shrinks by")
def _(diffusion, xt, x0, t, u, noise):
    (_, st), (_, su) = diffusion.at(t, xt), diffusion.at(u, xt)
    return general(diffusion, xt, x0, t, u, noise, st ** 2 - su ** 2)


@step("s taken for a variance", "squares")
def _(diffusion, xt, x0, t, u, noise):
    (at, st), (au, su) = diffusion.at(t, xt), diffusion.at(u, xt)
    beta = st - (at / au) ** 2 * su
    mean = at / au * su / st * xt + au * beta / st * x0
    return mean + (beta * su / st).clamp(min=0).sqrt() * noise


def changed_step(what, *words):
    """Decorator: a function (at, st, au, su) -> factors of xt, x0 and noise as a wrong answer."""
    def keep(weights):
        def answer(diffusion, xt, x0, t, u, noise):
            for_xt, for_x0, for_noise = weights(*diffusion.at(t, xt), *diffusion.at(u, xt))
            return for_xt * xt + for_x0 * x0 + for_noise * noise
        return wrong("ancestral_step", what, *words)(answer)
    return keep


def beta_of(at, st, au, su):
    return st ** 2 - (at / au) ** 2 * su ** 2


def spread(at, st, au, su, least=0.0):
    return (beta_of(at, st, au, su) * su ** 2 / st ** 2).clamp(min=least).sqrt()


@changed_step("weights exchanged", "weights have changed places")
def _(at, st, au, su):
    beta = beta_of(at, st, au, su)
    return at / au * beta / st ** 2, au * su ** 2 / st ** 2, spread(at, st, au, su)


@changed_step("a_t for a_u", "has the factor a_t")
def _(at, st, au, su):
    beta = beta_of(at, st, au, su)
    return at / au * su ** 2 / st ** 2, at * beta / st ** 2, spread(at, st, au, su)


@changed_step("keep twice", "twice")
def _(at, st, au, su):
    beta = beta_of(at, st, au, su)
    return (at / au) ** 2 * su ** 2 / st ** 2, au * beta / st ** 2, spread(at, st, au, su)


@changed_step("keep not squared in beta", "square of a_t / a_u is missing")
def _(at, st, au, su):
    beta = st ** 2 - at / au * su ** 2
    std = (beta * su ** 2 / st ** 2).clamp(min=0).sqrt()
    return at / au * su ** 2 / st ** 2, au * beta / st ** 2, std


@changed_step("keep upside down everywhere", "upside down")
def _(at, st, au, su):
    keep = (au / at).nan_to_num(posinf=0)
    beta = st ** 2 - keep ** 2 * su ** 2
    std = (beta * su ** 2 / st ** 2).clamp(min=0).sqrt()
    return keep * su ** 2 / st ** 2, au * beta / st ** 2, std


@changed_step("variance clamped at 1e-5", "little noise is left")
def _(at, st, au, su):
    beta = beta_of(at, st, au, su)
    return at / au * su ** 2 / st ** 2, au * beta / st ** 2, spread(at, st, au, su, 1e-5)


@step("four steps at a time", "step of four")
def _(diffusion_, xt, x0, t, u, noise):
    return diffusion.ancestral_step(diffusion_, xt, x0, t, max(t - 4, 0), noise) if t > 1 else x0


@step("a pair", "tuple")
def _(diffusion_, xt, x0, t, u, noise):
    return diffusion.ancestral_step(diffusion_, xt, x0, t, u, noise), noise


@step("wrong for flow only: an error", "Right for DDPM, wrong for flow")
def _(diffusion_, xt, x0, t, u, noise):
    if diffusion_.kind != "ddpm":
        raise KeyError(diffusion_.kind)
    return diffusion.ancestral_step(diffusion_, xt, x0, t, u, noise)


@step("summed", "sum")
def _(diffusion_, xt, x0, t, u, noise):
    return diffusion.ancestral_step(diffusion_, xt, x0, t, u, noise).sum(0)


@step("clipped", "clipped")
def _(diffusion_, xt, x0, t, u, noise):
    return diffusion.ancestral_step(diffusion_, xt, x0.clamp(-1, 1), t, u, noise)


@step("in place", "input `xt`")
def _(diffusion_, xt, x0, t, u, noise):
    xt *= 0.5
    return diffusion.ancestral_step(diffusion_, 2 * xt, x0, t, u, noise)


@changed_step("s for s^2 in the mean", "s^2 its variance")
def _(at, st, au, su):
    return at / au * su / st, au * beta_of(at, st, au, su) / st, spread(at, st, au, su)


@changed_step("a taken for alpha_bar", "a for alpha_bar")
def _(at, st, au, su):
    alpha = at / au
    noise = ((1 - alpha) * (1 - au) / (1 - at)).sqrt()
    return alpha.sqrt() * (1 - au) / (1 - at), au.sqrt() * (1 - alpha) / (1 - at), noise


@changed_step("x0 taken for eps", "x0 is the picture")
def _(at, st, au, su):
    keep = (at / au).clamp(min=1e-9)
    return 1 / keep, -beta_of(at, st, au, su) / st / keep, spread(at, st, au, su)


@step("the t before, and NaN at u = 0", "Off by one")
def _(diffusion_, xt, x0, t, u, noise):
    (at, st), (au, su) = diffusion_.at(t - 1, xt), diffusion_.at(u - 1, xt)
    var = beta_of(at, st, au, su)
    mean = (at / au * su ** 2 * xt + au * var * x0) / st ** 2
    return mean + (var * su ** 2 / st ** 2).sqrt() * noise


@step("float64", "the result torch.float64")
def _(diffusion_, xt, x0, t, u, noise):
    return diffusion.ancestral_step(diffusion_, xt.double(), x0.double(), t, u, noise.double())


@changed_step("a_t for a_t / a_u", "a_t / a_u belongs")
def _(at, st, au, su):
    beta = st ** 2 - at ** 2 * su ** 2
    return at * su ** 2 / st ** 2, au * beta / st ** 2, (beta * su ** 2 / st ** 2).sqrt()


@changed_step("not divided by s_t^2", "divided by s_t^2")
def _(at, st, au, su):
    return at / au * su ** 2, au * beta_of(at, st, au, su), spread(at, st, au, su)


# -------------------------------------------------------------------------------------------- guide
@right("guide", "lerp")
def _(conditional, unconditional, w):
    return torch.lerp(unconditional, conditional, w)


@right("guide", "two weights")
def _(c, u, scale):
    return scale * c + (1 - scale) * u


def line(what, *words):
    return wrong("guide", what, *words)


@line("w + 1", "One too many")
def _(c, u, w):
    return c + w * (c - u)


@line("swapped", "swapped")
def _(c, u, w):
    return c + w * (u - c)


@line("no subtraction", "not subtracted")
def _(c, u, w):
    return u + w * c


@line("average", "average")
def _(c, u, w):
    return (c + u) / 2


@line("the difference alone", "alone")
def _(c, u, w):
    return w * (c - u)


@line("wrong sign", "wrong sign")
def _(c, u, w):
    return u - w * (c - u)


@line("brackets", "whole difference")
def _(c, u, w):
    return w * c - u


@line("brackets, the other way", "whole difference")
def _(c, u, w):
    return c - w * u


@line("w forgotten", "w changes nothing")
def _(c, u, w):
    return c - u


@line("conditional only", "w changes nothing")
def _(c, u, w):
    return c


@line("conditional, scaled", "not used")
def _(c, u, w):
    return w * c


@line("w cut off at 1", "cut off at 1")
def _(c, u, w):
    return u + min(w, 1) * (c - u)


@line("w squared", "squared")
def _(c, u, w):
    return u + w ** 2 * (c - u)


@line("a proper mean", "divided by 1 + w")
def _(c, u, w):
    return (u + w * c) / (1 + w)


@line("clipped", "clipped")
def _(c, u, w):
    return (u + w * (c - u)).clamp(-3, 3)


@line("w - 1", "One too few")
def _(c, u, w):
    return u + (w - 1) * (c - u)


@line("(1 + w) times", "One too many")
def _(c, u, w):
    return u + (1 + w) * (c - u)


@line("back from w = 1 on", "Right at w = 1")
def _(c, u, w):
    return c + (w - 1) * (u - c)


@line("the other one is scaled", "nothing is subtracted")
def _(c, u, w):
    return c + w * u


@line("half of w", "not as far")
def _(c, u, w):
    return u + w / 2 * (c - u)


@line("whole numbers only", "int")
def _(c, u, w):
    return u + int(w) * (c - u)


@line("rescaled", "scaled")
def _(c, u, w):
    guided = u + w * (c - u)
    return guided * c.std() / guided.std()


@line("a condition", "condition")
def _(c, u, w):
    return torch.where(c > u, u + w * (c - u), c)


@line("averaged over pictures", "averaged")
def _(c, u, w):
    return u + w * (c - u).mean(0, keepdim=True)


@line("summed", "shape")
def _(c, u, w):
    return (u + w * (c - u)).sum(1)


@line("in place", "input `unconditional`")
def _(c, u, w):
    u += w * (c - u)
    return u


@line("the sum for the difference", "sum of the two")
def _(c, u, w):
    return u + w * (c + u)


@line("too far at a large w", "but too far")
def _(c, u, w):
    return c + (w if w > 1 else w - 1) * (c - u)


@line("16 bits", "torch.float16")
def _(c, u, w):
    return u.half() + w * (c - u).half()


# ------------------------------------------------------------------------------------------- losses
def told(model, batch, diffusion, latents=None, eps=None, t=None, xt=None):
    """One forward of the network, with what is given in place of what the batch has."""
    t = batch.t if t is None else t
    if xt is None:
        xt = diffusion.add_noise(batch.latents, batch.eps, t)
    return model(batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, xt, t)


def lm_loss(logits, batch, reduction="sum"):
    return F.cross_entropy(logits, batch.tokens.roll(-1, 1)[batch.has_loss], reduction=reduction)


def per_picture(out, batch, diffusion):
    target = batch.eps if diffusion.kind == "ddpm" else batch.eps - batch.latents
    return (out - target).square().flatten(1).mean(1)


def all_three(logits, out, batch, diffusion):
    return (lm_loss(logits, batch), int(batch.has_loss.sum()), per_picture(out, batch, diffusion))


@right("losses", "log-softmax, and every position asked")
def _(model, batch, diffusion, stable=False):
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)
    everywhere = torch.ones_like(batch.has_loss)
    logits, out = model(batch.tokens, batch.image_id, batch.doc_id, everywhere, xt, batch.t)
    B, T = batch.tokens.shape
    p = logits.view(B, T, -1).log_softmax(-1)[:, :-1]
    lm = 0
    for b in range(B):
        for q in range(T - 1):
            if batch.has_loss[b, q]:
                lm = lm - p[b, q, batch.tokens[b, q + 1]]
    target = diffusion.target(batch.latents, batch.eps, batch.t)
    each = torch.stack([F.mse_loss(x, y) for x, y in zip(out, target)])
    return lm, batch.has_loss.sum(), each


@right("losses", "by keyword")
def _(model, batch, diffusion, stable=False):
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)
    logits, out = model(tokens=batch.tokens, image_id=batch.image_id, doc_id=batch.doc_id,
                        has_loss=batch.has_loss, xt=xt, t=batch.t)
    return all_three(logits, out, batch, diffusion)


def loss(what, *words):
    return wrong("losses", what, *words)


@loss("mean of means", "mean")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    _, n, each = all_three(logits, out, batch, diffusion)
    return lm_loss(logits, batch, "mean"), n, each


@loss("not shifted", "Not shifted")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    _, n, each = all_three(logits, out, batch, diffusion)
    return F.cross_entropy(logits, batch.tokens[batch.has_loss], reduction="sum"), n, each


@loss("shifted the wrong way", "wrong way")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    _, n, each = all_three(logits, out, batch, diffusion)
    targets = batch.tokens.roll(1, 1)[batch.has_loss]
    return F.cross_entropy(logits, targets, reduction="sum"), n, each


@loss("chosen first, shifted then", "shift the whole rows first")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    _, n, each = all_three(logits, out, batch, diffusion)
    return F.cross_entropy(logits, batch.tokens[batch.has_loss].roll(-1), reduction="sum"), n, each


def with_mask(mask, model, batch, diffusion):
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)
    logits, out = model(batch.tokens, batch.image_id, batch.doc_id, mask, xt, batch.t)
    lm = F.cross_entropy(logits, batch.tokens.roll(-1, 1)[mask], reduction="sum")
    return lm, int(mask.sum()), per_picture(out, batch, diffusion)


@loss("loss at BOI", "BOI")
def _(model, batch, diffusion, stable=False):
    return with_mask(batch.has_loss | (batch.tokens == BOI), model, batch, diffusion)


@loss("loss at patches", "Patches")
def _(model, batch, diffusion, stable=False):
    return with_mask(batch.has_loss | (batch.image_id >= 0), model, batch, diffusion)


@loss("loss everywhere", "has_loss")
def _(model, batch, diffusion, stable=False):
    return with_mask(torch.ones_like(batch.has_loss), model, batch, diffusion)


@loss("loss on padding", "Padding")
def _(model, batch, diffusion, stable=False):
    return with_mask(batch.has_loss | (batch.tokens == PAD), model, batch, diffusion)


@loss("no loss at EOI", "not counted")
def _(model, batch, diffusion, stable=False):
    return with_mask(batch.has_loss & (batch.tokens != EOI), model, batch, diffusion)


@loss("target x0", "clean picture x0")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    lm, n, _ = all_three(logits, out, batch, diffusion)
    return lm, n, (out - batch.latents).square().flatten(1).mean(1)


@loss("target eps for flow", "flow")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    lm, n, _ = all_three(logits, out, batch, diffusion)
    return lm, n, (out - batch.eps).square().flatten(1).mean(1)


@loss("flow's target turned round", "wrong sign")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    lm, n, _ = all_three(logits, out, batch, diffusion)
    target = batch.eps if diffusion.kind == "ddpm" else batch.latents - batch.eps
    return lm, n, (out - target).square().flatten(1).mean(1)


@loss("clean picture in", "clean pictures")
def _(model, batch, diffusion, stable=False):
    return all_three(*told(model, batch, diffusion, xt=batch.latents), batch, diffusion)


@loss("noise in", "noise alone")
def _(model, batch, diffusion, stable=False):
    return all_three(*told(model, batch, diffusion, xt=batch.eps), batch, diffusion)


@loss("x0 and eps exchanged", "exchanged")
def _(model, batch, diffusion, stable=False):
    xt = diffusion.add_noise(batch.eps, batch.latents, batch.t)
    return all_three(*told(model, batch, diffusion, xt=xt), batch, diffusion)


@loss("t + 1 told", "t + 1")
def _(model, batch, diffusion, stable=False):
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)
    return all_three(*told(model, batch, diffusion, xt=xt, t=batch.t + 1), batch, diffusion)


@loss("t / T told", "t / T")
def _(model, batch, diffusion, stable=False):
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)
    return all_three(*told(model, batch, diffusion, xt=xt, t=batch.t / 1000), batch, diffusion)


@loss("one t per batch", "same noise level")
def _(model, batch, diffusion, stable=False):
    t = batch.t[:1].expand_as(batch.t)
    return all_three(*told(model, batch, diffusion, t=t), batch, diffusion)


@loss("one t told", "t = 100 for all")
def _(model, batch, diffusion, stable=False):
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)
    t = batch.t[:1].expand_as(batch.t)
    return all_three(*told(model, batch, diffusion, xt=xt, t=t), batch, diffusion)


@loss("L1", "L1")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    lm, n, _ = all_three(logits, out, batch, diffusion)
    target = diffusion.target(batch.latents, batch.eps, batch.t)
    return lm, n, (out - target).abs().flatten(1).mean(1)


@loss("one number for all pictures", "one per picture")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    lm, n, each = all_three(logits, out, batch, diffusion)
    return lm, n, each.mean()


@loss("a sum over elements", "sum over its elements")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    lm, n, each = all_three(logits, out, batch, diffusion)
    return lm, n, each * out[0].numel()


@loss("not reduced", "mean over c, h and w")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    lm, n, each = all_three(logits, out, batch, diffusion)
    return lm, n, (out - diffusion.target(batch.latents, batch.eps, batch.t)).square()


@loss("lambda", "lambda")
def _(model, batch, diffusion, stable=False):
    lm, n, each = all_three(*told(model, batch, diffusion), batch, diffusion)
    return lm, n, 5 * each


@loss("item", "no gradient")
def _(model, batch, diffusion, stable=False):
    lm, n, each = all_three(*told(model, batch, diffusion), batch, diffusion)
    return torch.tensor(lm.item()), n, each


@loss("all positions counted", "number of words")
def _(model, batch, diffusion, stable=False):
    lm, n, each = all_three(*told(model, batch, diffusion), batch, diffusion)
    return lm, batch.tokens.numel(), each


@loss("one loss", "3 things")
def _(model, batch, diffusion, stable=False):
    lm, n, each = all_three(*told(model, batch, diffusion), batch, diffusion)
    return lm / n + 5 * each.mean()


@loss("asked twice", "2 times")
def _(model, batch, diffusion, stable=False):
    logits, _ = told(model, batch, diffusion)
    _, out = told(model, batch, diffusion)
    return all_three(logits, out, batch, diffusion)


@loss("softmax twice", "twice")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    _, n, each = all_three(logits, out, batch, diffusion)
    return lm_loss(logits.softmax(-1), batch), n, each


@loss("input shifted", "shift the targets")
def _(model, batch, diffusion, stable=False):
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)
    logits, out = model(batch.tokens[:, :-1], batch.image_id[:, :-1], batch.doc_id[:, :-1],
                        batch.has_loss[:, :-1], xt, batch.t)
    return all_three(logits, out, batch, diffusion)


@right("losses", "by hand")
def _(model, batch, diffusion, stable=False):
    t = batch.t.view(-1, 1, 1, 1)
    xt = diffusion.a[t].float() * batch.latents + diffusion.s[t].float() * batch.eps
    logits, out = model.forward(
        batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, xt, batch.t)
    b, q = batch.has_loss.nonzero(as_tuple=True)
    lm = (logits.logsumexp(-1) - logits.gather(-1, batch.tokens[b, q + 1][:, None])[:, 0]).sum()
    target = batch.eps if diffusion.kind == "ddpm" else batch.eps - batch.latents
    return lm, len(b), ((out - target) ** 2).sum((1, 2, 3)) / out[0].numel()


@loss("ln p", "wrong sign")
def _(model, batch, diffusion, stable=False):
    lm, n, each = all_three(*told(model, batch, diffusion), batch, diffusion)
    return -lm, n, each


@loss("T - t told", "T - t")
def _(model, batch, diffusion, stable=False):
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)
    return all_three(*told(model, batch, diffusion, xt=xt, t=1000 - batch.t), batch, diffusion)


@loss("Huber", "squared error")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    lm, n, _ = all_three(logits, out, batch, diffusion)
    target = diffusion.target(batch.latents, batch.eps, batch.t)
    return lm, n, F.smooth_l1_loss(out, target, reduction="none").flatten(1).mean(1)


@loss("one number, repeated", "All pictures get the same number")
def _(model, batch, diffusion, stable=False):
    lm, n, each = all_three(*told(model, batch, diffusion), batch, diffusion)
    return lm, n, each.mean().expand(len(each))


@loss("the root", "root")
def _(model, batch, diffusion, stable=False):
    lm, n, each = all_three(*told(model, batch, diffusion), batch, diffusion)
    return lm, n, each.sqrt()


@loss("weighted", "weighted")
def _(model, batch, diffusion, stable=False):
    lm, n, each = all_three(*told(model, batch, diffusion), batch, diffusion)
    return lm, n, each * torch.tensor([1.0, 2.0, 3.0])


@loss("results exchanged", "exchanged")
def _(model, batch, diffusion, stable=False):
    lm, n, each = all_three(*told(model, batch, diffusion), batch, diffusion)
    return each, n, lm


@loss("estimates of x0", "estimates of x0")
def _(model, batch, diffusion, stable=False):
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)
    logits, out = told(model, batch, diffusion)
    x0, _ = diffusion.x0_and_eps(xt, out, batch.t)
    return (lm_loss(logits, batch), int(batch.has_loss.sum()),
            (x0 - batch.latents).square().flatten(1).mean(1))


@loss("arguments in another order", "another order")
def _(model, batch, diffusion, stable=False):
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)
    return model(xt, batch.t, batch.tokens, batch.image_id, batch.doc_id, batch.has_loss)


@loss("one number per word", "one number")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    _, n, each = all_three(logits, out, batch, diffusion)
    return lm_loss(logits, batch, "none"), n, each


@loss("fresh noise", "random numbers")
def _(model, batch, diffusion, stable=False):
    eps = torch.randn_like(batch.latents)
    logits, out = told(model, batch, diffusion, xt=diffusion.add_noise(batch.latents, eps, batch.t))
    return all_three(logits, out, batch, diffusion)


@loss("no softmax", "softmax is missing")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    _, n, each = all_three(logits, out, batch, diffusion)
    return F.nll_loss(logits, batch.tokens.roll(-1, 1)[batch.has_loss], reduction="sum"), n, each


@loss("softmax over the positions", "over the words")
def _(model, batch, diffusion, stable=False):
    logits, out = told(model, batch, diffusion)
    _, n, each = all_three(logits, out, batch, diffusion)
    following = batch.tokens.roll(-1, 1)[batch.has_loss]
    return F.nll_loss(logits.log_softmax(0), following, reduction="sum"), n, each


# ----------------------------------------------------------------------------------------- quantise
def parts(e, codebook):
    """(vectors (n, z), chosen (n, z), codes (n,), back: rows -> (M, z, h, w))."""
    M, z, h, w = e.shape
    vectors = e.permute(0, 2, 3, 1).reshape(-1, z)
    nearest = torch.cdist(vectors, codebook).argmin(1)

    def back(rows):
        return rows.view(M, h, w, z).permute(0, 3, 1, 2)
    return vectors, codebook[nearest], nearest, back


def quantised(e, codebook, beta, codes=None, straight=None, first=None, second=None,
              weights=(1, None)):
    """The right answer, with parts of one's own: functions (vectors, chosen) -> rows or loss."""
    vectors, chosen, nearest, back = parts(e, codebook)
    if codes is not None:
        nearest = codes(vectors, codebook)
        chosen = codebook[nearest]
    out = vectors + (chosen - vectors).detach() if straight is None else straight(vectors, chosen)
    one = (chosen - vectors.detach()).square().mean() if first is None else first(vectors, chosen)
    two = (vectors - chosen.detach()).square().mean() if second is None else second(vectors, chosen)
    M, z, h, w = e.shape
    k, m = weights
    return back(out), nearest.view(M, h, w), k * one + (beta if m is None else m) * two


@right("quantise", "differences")
def _(e, codebook, beta=0.25):
    distance = (e[:, None] - codebook[None, :, :, None, None]).square().sum(2)
    code = distance.argmin(1)
    chosen = codebook[code].permute(0, 3, 1, 2)
    loss = F.mse_loss(chosen, e.detach()) + beta * F.mse_loss(e, chosen.detach())
    return chosen.detach() + e - e.detach(), code, loss


@right("quantise", "by rows")
def _(e, codebook, beta=0.25):
    return quantised(e, codebook, beta)


def quantiser(what, *words, **changes):
    """A wrong answer to quantise."""
    def answer(e, codebook, beta=0.25):
        return quantised(e, codebook, beta, **changes)

    wrong("quantise", what, *words)(answer)


quantiser("dot product", "dot product", codes=lambda v, c: (v @ c.T).argmax(1))
quantiser("cosine", "direction",
          codes=lambda v, c: (F.normalize(v) @ F.normalize(c).T).argmax(1))
quantiser("absolute differences", "absolute", codes=lambda v, c: torch.cdist(v, c, p=1).argmin(1))
quantiser("argmax", "argmin", codes=lambda v, c: torch.cdist(v, c).argmax(1))
quantiser("the 2 forgotten", "2 is missing",
          codes=lambda v, c: (c.square().sum(1) - v @ c.T).argmin(1))
quantiser("no straight-through", "No straight-through", straight=lambda v, c: c)
quantiser("everything detached", "ends here", straight=lambda v, c: c.detach())
quantiser("straight-through the wrong way", "wrong sign",
          straight=lambda v, c: v + (v - c).detach())
quantiser("nothing quantised", "as if nothing were quantised", straight=lambda v, c: v)
quantiser("the codebook gets it too", "moves the codebook",
          straight=lambda v, c: v + c - v.detach())
quantiser("beta on the other term", "other term", weights=(0.25, 1))
quantiser("codebook term missing", "codebook term is missing", first=lambda v, c: 0)
quantiser("commitment missing", "commitment is missing", second=lambda v, c: 0)
quantiser("nothing detached", "Nothing is detached",
          first=lambda v, c: (v - c).square().mean(), second=lambda v, c: (v - c).square().mean())
quantiser("beta not used", "beta is not used", weights=(1, 1))
quantiser("beta on both", "both terms", weights=(0.25, 0.25))
quantiser("sums", "sum", weights=(48, 12))
quantiser("summed over z", "summed over z", weights=(3, 0.75))
quantiser("beta written in", "0.25 written", weights=(1, 0.25))
quantiser("both detached", "no gradient",
          first=lambda v, c: (v - c).detach().square().mean(),
          second=lambda v, c: (v - c).detach().square().mean())
quantiser("sg on the wrong sides", "other term",
          first=lambda v, c: (v - c.detach()).square().mean(),
          second=lambda v, c: (c - v.detach()).square().mean())


class Through(torch.autograd.Function):
    """Forward the codes, backward as if it were not there."""

    @staticmethod
    def forward(ctx, e, codes):
        return codes.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@right("quantise", "with a backward of its own")
def _(e, codebook, beta=0.25):
    M, z, h, w = e.shape
    vectors = e.flatten(2).transpose(1, 2).reshape(-1, z)
    code = torch.cdist(vectors, codebook).argmin(1)
    chosen = F.one_hot(code, len(codebook)).float() @ codebook
    chosen = chosen.view(M, h * w, z).transpose(1, 2).view(M, z, h, w)
    loss = (chosen - e.detach()).pow(2).mean() + beta * (chosen.detach() - e).pow(2).mean()
    return Through.apply(e, chosen), code.view(M, h, w), loss


@wrong("quantise", "no permute", "torn")
def _(e, codebook, beta=0.25):
    M, z, h, w = e.shape
    v = e.reshape(-1, z)
    code = torch.cdist(v, codebook).argmin(1)
    c = codebook[code]
    loss = (c - v.detach()).square().mean() + beta * (v - c.detach()).square().mean()
    return (v + (c - v).detach()).view(M, z, h, w), code.view(M, h, w), loss


@wrong("quantise", "no permute back", "torn on the way back")
def _(e, codebook, beta=0.25):
    v, c, code, back = parts(e, codebook)
    M, z, h, w = e.shape
    _, codes_, loss = quantised(e, codebook, beta)
    return (v + (c - v).detach()).view(M, z, h, w), codes_, loss


@wrong("quantise", "flat codes", "long row")
def _(e, codebook, beta=0.25):
    vectors, code, loss = quantised(e, codebook, beta)
    return vectors, code.flatten(), loss


@wrong("quantise", "codes transposed", "transposed")
def _(e, codebook, beta=0.25):
    vectors, code, loss = quantised(e, codebook, beta)
    return vectors, code.transpose(1, 2), loss


@wrong("quantise", "z last", "z last")
def _(e, codebook, beta=0.25):
    vectors, code, loss = quantised(e, codebook, beta)
    return vectors.permute(0, 2, 3, 1), code, loss


@wrong("quantise", "loss not reduced", "one number")
def _(e, codebook, beta=0.25):
    vectors, code, loss = quantised(e, codebook, beta)
    return vectors, code, loss.expand(3)


@wrong("quantise", "order of results", "codes")
def _(e, codebook, beta=0.25):
    vectors, code, loss = quantised(e, codebook, beta)
    return vectors, loss, code


quantiser("pictures added", "over the pictures", weights=(2, 0.5))
quantiser("distances", "distances", first=lambda v, c: (c - v.detach()).norm(dim=1).mean(),
          second=lambda v, c: (v - c.detach()).norm(dim=1).mean())
quantiser("a mixture", "mixture", straight=lambda v, c: v + (c.flip(0) - v).detach())
quantiser("no sg in the codebook term", "sg(e)", first=lambda v, c: (c - v).square().mean())
quantiser("no sg in the commitment", "sg(c)", second=lambda v, c: (c - v).square().mean())
quantiser("commitment subtracted", "subtracted", weights=(1, -0.25))
quantiser("straight-through and back", "as if nothing were quantised",
          straight=lambda v, c: c + (v - c))
quantiser("vectors made of length 1", "not the nearest",
          codes=lambda v, c: torch.cdist(F.normalize(v), c).argmin(1))


@wrong("quantise", "terms after the straight-through line", "after the straight-through line")
def _(e, codebook, beta=0.25):
    v, c, code, back = parts(e, codebook)
    c = v + (c - v).detach()
    M, z, h, w = e.shape
    to_codes = (c - v.detach()).square().mean()
    to_vectors = (v - c.detach()).square().mean()
    return back(c), code.view(M, h, w), to_codes + beta * to_vectors


@wrong("quantise", "codes in a row", "grid")
def _(e, codebook, beta=0.25):
    vectors, code, loss = quantised(e, codebook, beta)
    return vectors, code.flatten(1), loss


@wrong("quantise", "one-hot", "one-hot")
def _(e, codebook, beta=0.25):
    vectors, code, loss = quantised(e, codebook, beta)
    return vectors, F.one_hot(code, len(codebook)), loss


@wrong("quantise", "the codebook moved in place", "input `codebook`")
def _(e, codebook, beta=0.25):
    vectors, code, loss = quantised(e, codebook, beta)
    with torch.no_grad():
        codebook[0] += 1
    return vectors, code, loss


quantiser("L1", "L1", first=lambda v, c: (c - v.detach()).abs().mean(),
          second=lambda v, c: (v - c.detach()).abs().mean())


@wrong("quantise", "another default", "the default of the stub, 0.25; yours says 1.0")
def _(e, codebook, beta=1.0):
    return quantised(e, codebook, beta)


@wrong("quantise", "no default", "yours has none")
def _(e, codebook, beta):
    return quantised(e, codebook, beta)


# ------------------------------------------------------------------------------------------ lay_out
class Options:
    """How one step of laying out may go wrong: the right answer, with things to change."""
    boi_loss = False
    patch_loss = False
    last_patch_loss = False
    eoi_loss = True
    boi_in = False
    eoi_in = False
    bos = True
    eos = True
    same_image = False
    first_image = 0
    data_index = False
    drop_loss = False
    before_drop = False
    drop = DROP
    one_drop = False
    boi = BOI
    eoi = EOI
    extra = 0
    t_min = 1
    last_loss = False
    text_image = -1


def laid_out(document, tokenizer, patches, ends, o):
    """A right lay_out, unless `o` says otherwise."""
    tokens, image, has, images, t_max, t_min = [], [], [], [], [], []

    def add(new, picture, mark):
        tokens.extend(new)
        image.extend([picture] * len(new))
        has.extend([mark] * len(new))

    if o.bos:
        add([BOS], o.text_image, True)
    for part in document:
        if isinstance(part, str):
            add(tokenizer.encode(part), o.text_image, True)
        elif isinstance(part, list):
            add(part, o.text_image, True)
        elif part[0] == "dropped":
            n = len(part[1]) if isinstance(part[1], list) else len(tokenizer.encode(part[1]))
            if has and not o.before_drop:
                has[-1] = False
            add([o.drop] * (1 if o.one_drop else n), o.text_image, o.drop_loss)
        else:
            number = 0 if o.same_image else len(images) + o.first_image
            number = part[1] if o.data_index else number
            if o.boi is not None:
                add([o.boi], number if o.boi_in else o.text_image, o.boi_loss)
            add([PATCH] * (patches + o.extra), number, o.patch_loss)
            has[-1] = has[-1] or o.last_patch_loss
            if o.eoi is not None:
                add([o.eoi], number if o.eoi_in else o.text_image, o.eoi_loss)
            images.append(part[1])
            t_max.append(part[2])
            t_min.append(part[3] if len(part) > 3 and o.t_min == 1 else o.t_min)
    if o.eos and (ends or o.eos == "always"):
        add([EOS], o.text_image, o.last_loss)
    elif has:
        has[-1] = o.last_loss
    return data.Sequence(tokens, image, has, images, t_max, t_min)


@right("lay_out", "by hand")
def _(document, tokenizer, patches, ends=True):
    return laid_out(document, tokenizer, patches, ends, Options)


@right("lay_out", "from the end")
def _(document, tokenizer, patches, ends=True):
    """Marks afterwards: whoever stands before a token that is predicted."""
    sequence = laid_out(document, tokenizer, patches, ends, Options)
    following = sequence.tokens[1:] + [PATCH]
    sequence.has_loss = [after not in (PATCH, DROP, EOI) and own not in (DROP, PATCH) for own, after
                         in zip(sequence.tokens, following)]
    return sequence


def layout(what, *words, **changes):
    """A wrong answer to lay_out."""
    o = type("Changed", (Options,), changes)

    def answer(document, tokenizer, patches, ends=True):
        return laid_out(document, tokenizer, patches, ends, o)

    wrong("lay_out", what, *words)(answer)


layout("loss at BOI", "BOI has no LM loss", boi_loss=True)
layout("EOI predicted by a patch", "not even the last one", last_patch_loss=True)
layout("loss at patches", "A patch has no LM loss", patch_loss=True)
layout("no loss at EOI", "EOI predicts", eoi_loss=False)
layout("BOI inside the block", "BOI is no patch", boi_in=True)
layout("EOI inside the block", "EOI is no patch", eoi_in=True)
layout("both inside the block", "BOI and EOI are no patches", boi_in=True, eoi_in=True)
layout("no BOS", "BOS", bos=False)
layout("no EOS", "EOS must end", eos=False)
layout("always EOS", "ends=False", eos="always")
layout("no BOI", "BOI must stand", boi=None)
layout("no EOI", "EOI must stand", eoi=None)
layout("BOI and EOI exchanged", "exchanged", boi=EOI, eoi=BOI)
layout("all pictures are picture 0", "image_id 0", same_image=True)
layout("pictures count from 1", "count from 0", first_image=1)
layout("index of the data set", "data set", data_index=True)
layout("text has image_id 0", "-1", text_image=0)
layout("one patch too many", "`patches` places", extra=1)
layout("loss at DROP", "write DROP", drop_loss=True)
layout("loss before DROP", "token before a dropped caption", before_drop=True)
layout("one DROP", "as many DROPs", one_drop=True)
layout("PAD for DROP", "must become DROPs", drop=PAD)
layout("t_min 0", "t_min", t_min=0)
layout("the last token learns", "nothing to predict", last_loss=True)


def after(what, *words):
    """Decorator: a change (sequence, document) of the module's answer."""
    def keep(change):
        def answer(document, tokenizer, patches, ends=True):
            sequence = data.lay_out(document, tokenizer, patches, ends)
            return change(sequence, document)
        return wrong("lay_out", what, *words)(answer)
    return keep


@after("marks the predicted", "that are predicted")
def _(sequence, document):
    sequence.has_loss = [False] + sequence.has_loss[:-1]
    return sequence


@after("marks turned round", "other way round")
def _(sequence, document):
    sequence.has_loss = [not mark for mark in sequence.has_loss]
    return sequence


@after("a dict", "data.Sequence")
def _(sequence, document):
    return vars(sequence)


@after("tokens only", "data.Sequence")
def _(sequence, document):
    return sequence.tokens


@after("images count on", "data set")
def _(sequence, document):
    sequence.images = list(range(len(sequence.images)))
    return sequence


@after("t_max forgotten", "t_max")
def _(sequence, document):
    sequence.t_max = []
    return sequence


@after("the document emptied", "input `document`")
def _(sequence, document):
    document.clear()
    return sequence


def unmark(following):
    """A change of the module's answer: whoever predicts this token has no loss."""
    def change(sequence, document):
        pairs = zip(sequence.has_loss, [*sequence.tokens[1:], PAD])
        sequence.has_loss = [mark and token != following for mark, token in pairs]
        return sequence
    return change


after("BOI is not predicted", "decides to draw")(unmark(BOI))
after("EOS is not predicted", "EOS")(unmark(EOS))


@after("the prompt's last word learns", "nothing to predict")
def _(sequence, document):
    sequence.has_loss[-1] = sequence.tokens[-1] != EOS
    return sequence


@after("nothing is learned", "ever learned")
def _(sequence, document):
    sequence.has_loss = [False] * len(sequence.tokens)
    return sequence


@after("t_max is always 1000", "t_max")
def _(sequence, document):
    sequence.t_max = [1000] * len(sequence.t_max)
    return sequence


@after("images as parts", "tuple")
def _(sequence, document):
    sequence.images = [("image", k) for k in sequence.images]
    return sequence


@after("image_id too short", "one number for each token")
def _(sequence, document):
    sequence.image_id = sequence.image_id[1:]
    return sequence


@wrong("lay_out", "pictures last", "another order")
def _(document, tokenizer, patches, ends=True):
    words_first = sorted(document, key=lambda part: not isinstance(part, (str, list)))
    return data.lay_out(words_first[::-1], tokenizer, patches, ends)


@wrong("lay_out", "always four patches", "`patches` places")
def _(document, tokenizer, patches, ends=True):
    return data.lay_out(document, tokenizer, 4, ends)


@wrong("lay_out", "dropped captions are read", "must become DROPs")
def _(document, tokenizer, patches, ends=True):
    document = [part[1] if part[0] == "dropped" else part for part in document]
    return data.lay_out(document, tokenizer, patches, ends)


@wrong("lay_out", "words as strings", "encode")
def _(document, tokenizer, patches, ends=True):
    sequence = data.Sequence()
    sequence.add([BOS])
    for part in document:
        sequence.add(part.split() if isinstance(part, str) else [PATCH])
    return sequence


@wrong("lay_out", "one DROP per letter", "counts its letters")
def _(document, tokenizer, patches, ends=True):
    changed = []
    for part in document:
        if part[0] == "dropped":
            part = ("dropped", [0] * len(part[1]))
        changed.append(part)
    return data.lay_out(changed, tokenizer, patches, ends)


@wrong("lay_out", "dropped ids encoded", "AttributeError")
def _(document, tokenizer, patches, ends=True):
    changed = []
    for part in document:
        if part[0] == "dropped":
            part = ("dropped", tokenizer.encode(part[1]))
        changed.append(part)
    return data.lay_out(changed, tokenizer, patches, ends)


@after("words have no loss", "Words have no loss")
def _(sequence, document):
    sequence.has_loss = [mark and token < len(data.SPECIAL)
                         for mark, token in zip(sequence.has_loss, sequence.tokens)]
    return sequence


# -------------------------------------------------------------------------------------------- write
def written(model, tokens, generator, max_words, max_pictures, **o):
    """A right answer to `write`, unless `o` says otherwise."""
    tokens = list(tokens)
    pictures = []
    while max_words > 0 and len(tokens) < model.context:
        token = model.next_token(tokens, pictures)
        tokens.append(token)
        if token == EOS:
            break
        if token == BOI:
            need = model.patches + o.get("room", 1)
            if (max_pictures == 0 or len(tokens) + need > model.context) and not o.get("no_limit"):
                if not o.get("pass_over"):
                    break
                tokens.pop()
                max_words -= 1
                continue
            if o.get("same_noise"):
                generator = torch.Generator().manual_seed(generator.initial_seed())
            noise = torch.randn(model.latent, generator=generator)
            if o.get("zeros"):
                noise = torch.zeros(model.latent)
            if o.get("extra_dimension"):
                noise = noise[None]
            tokens += [PATCH] * model.patches
            if o.get("early_eoi"):
                tokens.append(EOI)
            pictures.append(noise)
            times = [*model.times, *o.get("more_times", ())]
            if o.get("backwards"):
                times = times[::-1]
            if o.get("one_step"):
                times = times[:1]
            for t in times:
                if o.get("noise_each_step"):
                    pictures[-1] = torch.randn(model.latent, generator=generator)
                x = model.denoise(tokens, pictures[-1:] if o.get("last_only") else pictures, t)
                if o.get("average"):
                    x = (x + pictures[-1]) / 2
                if o.get("append"):
                    pictures.append(x)
                elif not o.get("keep_noise"):
                    pictures[-1] = x
            if not o.get("no_count"):
                max_pictures -= 1
            if o.get("ask_eoi"):
                tokens.append(model.next_token(tokens, pictures))
            elif not o.get("early_eoi") and not o.get("no_eoi"):
                tokens += [EOI] * (2 if o.get("two_eoi") else 1)
            if o.get("stop"):
                break
            if o.get("boi_counts"):
                max_words -= 1
        elif not o.get("no_word_count"):
            max_words -= 1
    return tokens, pictures


@right("write", "recursion")
def recursive(model, tokens, generator, max_words=64, max_pictures=1, pictures=()):
    if max_words <= 0 or len(tokens) >= model.context:
        return list(tokens), list(pictures)
    token = model.next_token(list(tokens), list(pictures))
    tokens = [*tokens, token]
    if token == EOS:
        return tokens, list(pictures)
    if token != BOI:
        return recursive(model, tokens, generator, max_words - 1, max_pictures, pictures)
    row = tokens + [PATCH] * model.patches + [EOI]
    if max_pictures == 0 or len(row) > model.context:
        return tokens[:-1], list(pictures)
    x = torch.randn(model.latent, generator=generator)
    for t in model.times:
        x = model.denoise(row[:-1], [*pictures, x], t)
    return recursive(model, row, generator, max_words, max_pictures - 1, [*pictures, x])


@right("write", "a loop")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    return written(model, tokens, generator, max_words, max_pictures)


def switch(what, *words, **changes):
    """A wrong answer to write."""
    wrong("write", what, *words)(
        lambda model, tokens, generator, max_words=64, max_pictures=1:
        written(model, tokens, generator, max_words, max_pictures, **changes))


switch("stops after the picture", "stops after the picture", stop=True)
switch("EOI twice", "twice", two_eoi=True)
switch("EOI predicted", "not predicted", ask_eoi=True)
switch("no EOI", "append it", no_eoi=True)
switch("the same noise twice", "same noise", same_noise=True)
switch("EOI before the picture is finished", "still being denoised", early_eoi=True)
switch("x appended at each step", "grows with each step", append=True)
switch("x thrown away", "same picture", keep_noise=True)
switch("times turned round", "wrong way round", backwards=True)
switch("one step", "every t", one_step=True)
switch("max_pictures not counted", "max_pictures", no_count=True)
switch("max_words not counted", "max_words", no_word_count=True)
switch("BOI counts as a word", "max_words counts words", boi_counts=True)
switch("no room for EOI", "does not fit", room=0)
switch("a BOI too many is passed over", "thrown away", pass_over=True)
switch("too much room", "filled to its end", room=2)
switch("noise at each step", "not for each step", noise_each_step=True)
switch("earlier pictures not shown", "the earlier ones", last_only=True)
switch("averaged with the step before", "as it is", average=True)
switch("zeros for noise", "zeros", zeros=True)
switch("t = 0 too", "t = 0", more_times=(0,))
switch("a picture with a dimension more", "(c, h, w)", extra_dimension=True)


@wrong("write", "words only", "No picture is drawn")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    tokens = list(tokens)
    for _ in range(max_words):
        if len(tokens) >= model.context:
            break
        token = model.next_token(tokens, [])
        if token == BOI:
            continue
        tokens.append(token)
        if token == EOS:
            break
    return tokens, []


@wrong("write", "asks on after BOI", "After BOI")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    tokens = list(tokens)
    for _ in range(max_words):
        token = model.next_token(tokens, [])
        tokens.append(token)
        if token == EOS:
            break
    return tokens, []


@wrong("write", "EOS is not kept", "EOS is missing")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    tokens, pictures = written(model, tokens, generator, max_words, max_pictures)
    return [token for token in tokens if token != EOS], pictures


@wrong("write", "never stops", "never stops")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    tokens = list(tokens)
    while True:
        tokens.append(model.next_token([BOS], []))


@wrong("write", "the world's noise", "random numbers")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    return written(model, tokens, None, max_words, max_pictures)


@wrong("write", "the prompt grows", "input `tokens`")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    out, pictures = written(model, tokens, generator, max_words, max_pictures)
    tokens += out[len(tokens):]
    return tokens, pictures


@wrong("write", "the new part only", "start with the tokens")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    out, pictures = written(model, tokens, generator, max_words, max_pictures)
    return out[len(tokens):], pictures


@wrong("write", "no patches", "places in `tokens`")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    tokens = list(tokens)
    while True:
        token = model.next_token(tokens, [])
        tokens.append(token)
        if token == EOS or len(tokens) >= model.context:
            return tokens, []
        if token == BOI:
            model.denoise(tokens, [torch.randn(model.latent, generator=generator)], 1000)


@wrong("write", "always EOS at the end", "has not said it")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    tokens, pictures = written(model, tokens, generator, max_words, max_pictures)
    return tokens + [EOS] * (tokens[-1] != EOS), pictures


@wrong("write", "the prompt counts as words", "tokens that were there before")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    return written(model, tokens, generator, max_words - len(tokens), max_pictures)


@wrong("write", "tokens only", "2 things")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    return written(model, tokens, generator, max_words, max_pictures)[0]


@wrong("write", "pictures clamped", "finished")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    tokens, pictures = written(model, tokens, generator, max_words, max_pictures)
    return tokens, [x.clamp(-0.1, 0.1) for x in pictures]


@wrong("write", "a generator of its own", "another generator")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    return written(model, tokens, torch.Generator().manual_seed(0), max_words, max_pictures)


@wrong("write", "after EOS goes on", "After EOS")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    tokens = list(tokens)
    for _ in range(max_words):
        tokens.append(model.next_token(tokens, []))
    return tokens, []


@wrong("write", "a BOI too many passed over for ever", "BOI of a picture too many")
def _(model, tokens, generator, max_words=64, max_pictures=1):
    tokens, pictures = written(model, tokens, generator, max_words, max_pictures)
    while tokens[-1] == BOI:
        model.next_token(tokens[:-1], pictures)
    return tokens, pictures


@wrong("write", "another default", "`max_words` must have the default")
def _(model, tokens, generator, max_words=100, max_pictures=1):
    return written(model, tokens, generator, max_words, max_pictures)
