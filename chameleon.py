"""
chameleon.py: the rivals: pictures as words, and no pictures at all              (Transfusion §4.1 "Baseline", §4.2, Table 2)

THE IDEA    Chameleon: name each place of a latent picture by the nearest of a few learnt codes (vae.py's VQ-VAE). A picture
            is then a sentence of h x w words, and a plain language model with one softmax over words and codes reads and
            writes both: no diffusion, no second loss, no mask but the causal one. What the codes do not say is lost.
            Llama: the same documents without their pictures. What do pictures cost the words?
A PICTURE   a document    ["a red circle", picture 7]
            Transfusion   <bos> a red circle <boi> [ 16 noisy vectors, denoised together ] <eoi> <eos>
            Chameleon     <bos> a red circle <boi> c17 c401 c17 c17 ... c9 (64, one by one) <eoi> <eos>
            Llama         <bos> a red circle <eos>
THE RULES   Chameleon  L = mean over words and codes of -ln p(next | before) + 1e-5 (ln Z)^2         Z: the softmax's denominator
            a block    x + norm(attention(x)); x + norm(swiglu(x)), queries and keys normalised      `model.Block`, stable
            guidance   logits = uncond + w (cond - uncond), the code drawn from their softmax         §4.1
SHAPES      codes (N, h, w) int64, 0 .. K-1; as tokens V .. V+K-1, after the V words; the model's vocabulary is V + K
PAPER/HERE  same: a VQ-VAE with the VAE's plan, data and steps (assets/scenes_vq.pt: `train_vae.py --codes 512`), query-key
            norm, post-norm, denominator loss, a third of the learning rate, guidance; four codes for each of Transfusion's
            patches, so fewer pictures for as many tokens. Both rivals go through train.py's one loop.
            our choice: LayerNorm for queries and keys, and 1e-5, as the Chameleon Team (2024) have it; BOI predicts the first
            code, and the last code EOI, with loss. Codes are drawn at temperature 1 from the whole softmax.
            Of packed shards (data.py pack --vae vq.pt) the Chameleon reads codes, the Llama the rows of text alone.
            our choice: codes have RoPE's positions only. The patch encoder stays in both rivals, unused: 35,000 parameters of
            the toy's million.
READ NEXT   experiments.py, which compares them        TRY IT  python chameleon.py        TEST  tests/test_chameleon.py
"""
import functools

import numpy as np
import torch

import data
import sample
import vae
from data import BOI, EOI, PATCH
from sources import scenes
from support.checkpoint import find_vae
from support.common import UserError


def view(kind, first):
    """How a model of this kind sees a document: a function (document, codes) -> document. kind: "transfusion", which sees
    it as it is, "chameleon" or "llama"; first: V, the id of the first code; codes: (N, h, w) int64 of all pictures."""
    if kind == "transfusion":
        return as_it_is
    if kind == "llama":
        return words_alone
    return functools.partial(spell_pictures, first=first)


def as_it_is(document, codes=None):
    """Transfusion's view: the document itself (see data.lay_out)."""
    return document


def words_alone(document, codes=None):
    """A Llama's view: the words alone, also those that were dropped, for it has nothing to guide."""
    parts = []
    for part in document:
        if not isinstance(part, tuple):
            parts.append(part)
        elif part[0] == "dropped":
            parts.append(part[1])
    return parts


def spell_pictures(document, codes, first):
    """A Chameleon's view: in place of each picture the list of its token ids, BOI, the codes in raster order, EOI."""
    parts = []
    for part in document:
        if isinstance(part, tuple) and part[0] == "image":
            ids = codes[part[1]].flatten() + first
            parts.append([BOI, *ids.tolist(), EOI])
        else:
            parts.append(part)
    return parts


class Decoder(sample.Decoder):
    """sample.Decoder for pictures made of codes: the same documents, cache, guidance and loop, another `diffusion_steps`. The
    pictures in `latents` are codes (h, w) int64."""

    @property
    def first(self):
        """V: the id of the first code."""
        return len(self.trained.tokenizer)

    def read(self, pos, tokens, pictures, cache, t=0):
        """As sample.Decoder's, but a picture's places hold its codes. Returns logits (B, V + K)."""
        spelled = []
        for row, own in zip(tokens, pictures):
            codes = iter((torch.stack(list(own)).flatten() + self.first).tolist() if len(own) else ())
            spelled.append([next(codes) if token == PATCH else token for token in row])
        return super().read(pos, spelled, [[] for _ in tokens], cache, t)

    def events_per_picture(self, steps):
        """One Event per code."""
        return self.trained.model.config.patches

    def lm_step(self, active, generators=None, **choice):
        """LM mode, for words: codes stand inside pictures only."""
        self.logits = self.logits[:, : self.first]
        return super().lm_step(active, generators, **choice)

    @torch.no_grad()
    def diffusion_steps(self, rows, noise, guidance=3.0, generator=None, over="words", **diffusing):
        """In place of diffusion: write the next picture of each row of `rows`, whose last token is BOI, code by code, in raster
        order. noise: its shape (len(rows), c, h, w) alone counts; diffusing: steps and sampler, for which there is no use.
        generator: None, or one per row. Yields (codes to go, None, None); then pictures and EOI stand in the sequences."""
        if over != "words":
            raise UserError(f"--guide-over {over} is for Transfusion: a Chameleon's guidance leaves out words")
        n, P, guided, generators = len(rows), self.trained.model.config.patches, guidance != 1, generator or [None] * len(rows)
        copies = 2 if guided else 1                     # of each row: with its caption, and without
        cache, logits, chosen = self.cache.rows(rows * copies), self.logits[rows], []
        if guided:
            blind, without = self.blind(rows, over, noise)
            cache.k[:, n:], cache.v[:, n:], logits = blind.k, blind.v, torch.cat([logits, without])
        for k in range(P):
            logits = logits[:, self.first:].float()
            if guided:
                logits = logits[n:] + guidance * (logits[:n] - logits[n:])
            p = logits.softmax(-1).cpu()
            chosen.append(torch.stack([torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators)]))     # (n, 1)
            yield P - 1 - k, None, None
            ids = (chosen[-1] + self.first).tolist() * copies
            logits = super().read([[len(self.tokens[b]) + k] for b in rows] * copies, ids, [[] for _ in ids], cache)
        self.cache.k[:, rows], self.cache.v[:, rows] = cache.k[:, :n], cache.v[:, :n]
        for b, codes in zip(rows, torch.cat(chosen, 1).view(n, *noise.shape[2:])):
            self.latents[b].append(codes)
            self.tokens[b] += [PATCH] * P + [EOI]
        self.advance()


def decoder_of(trained):
    """The class that decodes with this checkpoint.Trained: sample.Decoder, or the Chameleon's."""
    return Decoder if trained.kind == "chameleon" else sample.Decoder


if __name__ == "__main__":
    pairs = scenes.load_scenes(2000, seed=0, progress=False)
    words, vq = data.Words(pairs.vocabulary()), find_vae("scenes", codes=True)
    codes = vae.encode_all_codes(vq, pairs.pixels, progress=False)
    for kind in ("transfusion", "chameleon", "llama"):
        row = data.lay_out(view(kind, len(words))([pairs.captions[0], ("image", 0, 1000)], codes), words, 16)
        names = [words.vocabulary[t] if t < len(words) else f"c{t - len(words)}" for t in row.tokens]
        print(f"{kind:12s} {len(row.tokens):3d} tokens: {' '.join(names[:14])}{' ...' if len(names) > 14 else ''}")
    error = np.abs(vae.to_pixels(vq.decode_codes(codes[:256])).astype(int) - pairs.pixels[:256]).mean()
    print(f"{vq.config.codes} codes draw pictures back with an error of {error:.1f} of 255")
