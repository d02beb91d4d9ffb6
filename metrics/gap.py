"""
gap.py: the conditioning gap: does the model read its caption?           (ours; docs/PAPER.md §4.12)

THE IDEA    A model can draw with a falling loss and never look at its caption: any picture is much
            like the others, and of the eps loss a caption is worth 2%. So ask directly. Denoise the
            same noisy picture once with its own caption and once with another picture's. If nothing
            changes, the caption is ignored.
A PICTURE   "a red circle"    + noisy red circle  --model-->  loss 0.32   (right)
            "a blue square"   + noisy red circle  --model-->  loss 0.71   (wrong)      gap 0.38
THE RULE    gap = eq. 3 with a wrong caption - eq. 3 with the right one, same noise, same t
            Chameleon: -ln p(codes | wrong caption) + ln p(codes | right caption), nats per code
SHAPES      N pictures: latents (N, c, h, w) float32, or a Chameleon's codes (N, h, w) int64
PAPER/HERE  not in the paper. Our choice: t is spread evenly over 1..T, so that few pictures do.
            0 means that captions are ignored. Its size depends on the data: compare models on the
            same pictures only.
READ NEXT   likelihood.py, which a Chameleon's gap uses        TEST  tests/test_gap.py
"""
import torch

import data
from data import BOI
from metrics.likelihood import log_likelihood
from support.checkpoint import device_of


def wrong_captions(captions):
    """For each of N captions the next one in the list that says something else; where all of
    them are alike, the caption itself. captions: lists of ids, or str."""
    wrong = []
    for k, own in enumerate(captions):
        # TRAP: many pictures share a caption. A "wrong" one that says the same would pull the
        # gap towards 0.
        others = captions[k + 1:] + captions[:k]
        wrong.append(next((caption for caption in others if caption != own), own))
    return wrong


def as_ids(tokenizer, captions):
    """The captions as lists of ids. captions: N str, or lists of ids already."""
    ids = []
    for caption in captions:
        ids.append(caption if isinstance(caption, list) else tokenizer.encode(caption))
    return ids


@torch.no_grad()
def conditioning_gap(model, tokenizer, diffusion, captions, latents, before=None, seed=0):
    """Diffusion loss (eq. 3) with a wrong caption minus that with the right one. 0: the model
    ignores its caption, however good the loss looks. None: it cannot be measured, because all
    captions say the same. A Chameleon's is in nats, see `code_losses`.

    model       model.Transfusion
    tokenizer   data.Words or data.Pieces
    captions    N str, or lists of ids
    latents     (N, c, h, w) float32, or codes (N, h, w) int64
    before      of edits: (N, c, h, w), the pictures that stand before the captions; else None
    seed        of the noise"""
    losses = caption_losses(model, tokenizer, diffusion, captions, latents, before, seed)
    if losses is None:
        return None
    right, wrong = losses
    return wrong - right


@torch.no_grad()
def caption_losses(model, tokenizer, diffusion, captions, latents, before=None, seed=0):
    """(right, wrong): the loss of N pictures beside their own captions, and beside others': eq. 3,
    or a Chameleon's nats per code. None, and the arguments, as of `conditioning_gap`."""
    # As ids: "A cat" and "a cat" say the same to a tokenizer of lower case.
    captions = as_ids(tokenizer, captions)
    if all(caption == captions[0] for caption in captions):
        return None
    if latents.dtype == torch.long:
        return code_losses(model, tokenizer, captions, latents)

    # One t and one noise per picture, drawn once: the two losses differ by the caption alone.
    N = len(captions)
    g = torch.Generator().manual_seed(seed)
    levels = torch.arange(N) * diffusion.T // N + 1     # every noise level alike, 1..T
    t = levels[torch.randperm(N, generator=g)]
    eps = torch.randn(latents.shape, generator=g)
    xt = diffusion.add_noise(latents, eps, t)
    target = diffusion.target(latents, eps, t)
    losses = []
    for texts in (captions, wrong_captions(captions)):
        out, number = outputs(model, tokenizer, texts, xt, t, before)
        predicted = diffusion.prediction(xt[number], out, t[number])
        losses.append((predicted - target[number]).square().mean().item())
    right, wrong = losses
    return right, wrong


@torch.no_grad()
def outputs(model, tokenizer, texts, xt, t, before=None):
    """(out (N, c, h, w) float32, number (N,)): what the model says about noisy pictures, each
    beside its text. out[j] is about picture number[j]: packing changes the order.

    texts    N parts of a document, as data.lay_out takes them: ids, or ("dropped", ids)
    xt, t    (N, c, h, w), and (N,) int64
    before   (N, c, h, w) pictures before the texts, clean, or None"""
    N = len(texts)
    pictures = xt                                       # numbers 0..N-1: these are denoised
    if before is not None:                              # numbers N..2N-1: clean, so t = 0
        pictures = torch.cat([xt, before])
        t = torch.cat([t, torch.zeros_like(t)])
    rows = []
    for k, text in enumerate(texts):
        document = [text, ("image", k, 1)]
        if before is not None:
            document.insert(0, ("image", N + k, 0))
        rows.append(data.lay_out(document, tokenizer, model.config.patches))

    batch = data.pack(rows, model.config.context)
    number = batch.images
    batch.latents = pictures[number]
    batch.t = t[number]
    batch = batch.to(device_of(model))
    _, out = model(
        batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, batch.latents, batch.t,
    )
    denoised = number < N
    return out.float().cpu()[denoised], number[denoised]


def code_losses(model, tokenizer, captions, codes):
    """(right, wrong) of a Chameleon: nats per code beside the right captions, and beside wrong
    ones. Every process must call it.

    captions: N str, or lists of ids; codes: (N, h, w) int64, 0..K-1."""
    captions = as_ids(tokenizer, captions)
    # A code's token follows the V words. There is no noise here: a likelihood needs none.
    pictures = (codes.flatten(1) + len(tokenizer)).tolist()

    nats = []
    for texts in (captions, wrong_captions(captions)):
        requests = []
        for ids, picture in zip(texts, pictures, strict=True):
            requests.append((ids + [BOI], picture))
        log_p = sum(log_p for log_p, _ in log_likelihood(model, requests))
        nats.append(-log_p / codes.numel())
    right, wrong = nats
    return right, wrong
