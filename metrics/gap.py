"""
gap.py: the conditioning gap
"""
from dataclasses import replace

import torch

import data
from data import BOI
from metrics.likelihood import log_likelihood
from support.checkpoint import device_of


def wrong_captions(captions):
    """For each of N captions the next one that is different, for the conditioning gap (PAPER.md §4.12)."""
    return [next((c for c in captions[k + 1:] + captions[:k] if c != own), own) for k, own in enumerate(captions)]


@torch.no_grad()
def conditioning_gap(model, words, diffusion, captions, latents, before=None, seed=0):
    """Diffusion loss with a wrong caption minus that with the right one, same noise, same t: 0 means that the model
    ignores its caption, however good the loss looks (PAPER.md §4.12). captions: N str; latents (N, c, h, w); before: the
    latents of the pictures that stand before the captions, clean, where these are edits. Of codes (N, h, w) int64: nats."""
    if latents.dtype == torch.long:
        return code_gap(model, words, captions, latents)
    g, N = torch.Generator().manual_seed(seed), len(captions)
    t = (torch.arange(N) * diffusion.T // N + 1)[torch.randperm(N, generator=g)]      # every noise level alike
    eps, means = torch.randn(latents.shape, generator=g), []
    noisy = diffusion.add_noise(latents, eps, t)
    for texts in (captions, wrong_captions(captions)):
        rows = [data.lay_out([*([("image", N + k, 0)] if before is not None else []), text, ("image", k, diffusion.T)],
                             words, model.config.patches) for k, text in enumerate(texts)]
        batch = data.pack(rows, model.config.context)
        k = batch.images
        all_x, all_t = (noisy, t) if before is None else (torch.cat([noisy, before]), torch.cat([t, torch.zeros_like(t)]))
        batch = replace(batch, latents=all_x[k], t=all_t[k]).to(device_of(model))
        out = model(batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, batch.latents, batch.t)[1].float().cpu()
        drawn, k = out[k < N], k[k < N]
        means.append((drawn - diffusion.target(latents[k], eps[k])).square().mean().item())
    return means[1] - means[0]


def code_gap(model, words, captions, codes):
    """The conditioning gap of a Chameleon: nats per code with a wrong caption minus those with the right one.
    captions: N str, or lists of ids; codes: (N, h, w) int64. Compare evaluate.conditioning_gap. Every rank must call it."""
    spelled, told = (codes.flatten(1) + len(words)).tolist(), []
    for texts in (captions, wrong_captions(captions)):
        ids = [text if isinstance(text, list) else words.encode(text) for text in texts]
        told.append(sum(nats for nats, _ in log_likelihood(model, [(row + [BOI], picture) for row, picture in zip(ids, spelled)])))
    return (told[0] - told[1]) / codes.numel()
