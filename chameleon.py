"""
chameleon.py: the rivals: pictures as words, or none   (Transfusion §4.1 "Baseline", §4.2, Table 2)

THE IDEA    Chameleon: name each place of a latent picture by the nearest of a few learned codes
            (the VQ-VAE in vae.py). A picture is then a sentence of h x w words. A plain language
            model with one softmax over words and codes reads and writes both. There is no
            diffusion, no second loss, no mask but the causal one. What the codes do not say is
            lost.
            Llama: the same documents without their pictures. What do pictures cost the words?
A PICTURE   a document    ["a red circle", picture 7]
            Transfusion   <bos> a red circle <boi> [ 16 vectors, denoised together ] <eoi> <eos>
            Chameleon     <bos> a red circle <boi> c17 c401 ... c9 (64, one by one) <eoi> <eos>
            Llama         <bos> a red circle <eos>
THE RULES   loss       mean over words and codes of -ln p(next | before)  +  1e-5 (ln Z)^2
                       Z is the softmax's denominator: `z_loss` in model.py
            a block    x + norm(attention(x)), then x + norm(swiglu(x)), with queries and keys
                       normalised: `Block` in model.py, stable=True
            guidance   logits = uncond + w (cond - uncond); the next code is drawn from them
SHAPES      V words and K codes; codes (N, h, w) int64 in 0 .. K-1. As tokens: V .. V+K-1.
PAPER/HERE  same: a VQ-VAE with the VAE's plan, data and steps; query-key norm, post-norm,
            denominator loss, a third of the learning rate, guidance. A picture takes four codes for
            each of Transfusion's patches, so there are fewer pictures in as many tokens. train.py
            trains both rivals.
            our choice: LayerNorm for queries and keys, and 1e-5, as in Chameleon Team (2024, §2.3).
            All heads share its gain: neither paper says (transformers' has one a head).
            our choice: no dropout. Transfusion's §4.1 names none. Chameleon Team (2024, §2.3) train
            their 7B with dropout of 0.1, and their 34B, which has this post-norm, without.
            our choice: BOI predicts the first code and the last code predicts EOI, both with loss.
            Codes are drawn at temperature 1 from the whole softmax.
            our choice: codes have RoPE's positions only. The patch encoder stays in both rivals,
            unused: 35,000 parameters of the toy's million.
READ NEXT   experiments.py, which compares them        TEST  tests/test_chameleon.py
TRY IT      python chameleon.py        python chameleon.py "a red circle" --checkpoint model.pt
"""
import functools
import sys

import numpy as np
import torch

import data
import sample
import vae
from data import BOI, EOI, PATCH
from support.checkpoint import find_vae
from support.common import UserError, run_command


# ---------------------------------------------------------------------------- what each one reads
def view(kind, first):
    """How a model of this kind sees a document: a function (document, codes) -> document, as
    data.lay_out takes it; None for "transfusion", which sees the document itself.

    kind     "transfusion", "chameleon" or "llama"
    first    V, the id of the first code
    codes    (N, h, w) int64 of all pictures; only a Chameleon looks at them
    """
    # The feed calls this once and wraps it around its documents (sources/feed.py), so neither the
    # layout nor the training loop knows who reads.
    if kind == "transfusion":                           # not a rival: here for the loop's sake
        return None
    if kind == "llama":
        return words_alone
    return functools.partial(spell_pictures, first=first)


def words_alone(document, codes=None):
    """A Llama's view: all words. Dropped ones count as well: a Llama has nothing to guide."""
    parts = []
    for part in document:
        if not isinstance(part, tuple):
            parts.append(part)
        elif part[0] == "dropped":                      # ("dropped", words)
            parts.append(part[1])
        # What is left is a picture, and is left out: markers and all.
    return parts


def spell_pictures(document, codes, first):
    """A Chameleon's view: in place of each picture stands a list of token ids: BOI, its codes in
    raster order, EOI."""
    parts = []
    for part in document:
        if isinstance(part, tuple) and part[0] == "image":
            number = part[1]                            # of the picture; its t_max has no meaning
            ids = codes[number].flatten() + first                               # (h*w,)
            # data.lay_out takes a list for words: each id has a loss, and the mask is causal.
            parts.append([BOI, *ids.tolist(), EOI])
        else:
            parts.append(part)
    return parts


# ------------------------------------------------------------------------------ how it is decoded
class Decoder(sample.Decoder):
    """sample.Decoder for a Chameleon: the same documents, cache, guidance and modes. In place of
    diffusion it writes code after code. The pictures in `latents` are codes (h, w)."""

    @property
    def first(self):
        """V: the id of the first code."""
        return len(self.trained.tokenizer)

    def read(self, pos, tokens, pictures, cache, t=0):
        """As sample.Decoder.read, but the codes of a picture stand where its PATCH tokens are, and
        they are read as words. Returns logits (B, V + K)."""
        spelled = []
        for row, own in zip(tokens, pictures):
            codes = []
            for picture in own:
                codes += (picture.flatten() + self.first).tolist()
            codes = iter(codes)                         # one for each PATCH, in reading order
            spelled.append([next(codes) if token == PATCH else token for token in row])
        none = [[] for _ in tokens]                     # to the network there are no pictures
        return super().read(pos, spelled, none, cache, t)

    def events_per_picture(self, steps):
        """One Event per code, whatever the number of diffusion steps."""
        return self.trained.model.config.patches

    def lm_step(self, active, generators=None, **choice):
        """LM mode, as sample.Decoder's: it writes words."""
        # A code may be likelier than any word, but it has no meaning outside a picture, and no
        # tokenizer can decode it.
        self.logits = self.logits[:, : self.first]                              # (B, V)
        return super().lm_step(active, generators, **choice)

    @torch.no_grad()
    def diffusion_steps(self, rows, noise, guidance=3.0, generator=None, over="words", **diffusing):
        """In place of diffusion: the next picture of each row, code by code, in raster order.
        Yields (codes to go, None, None); then pictures and EOI stand in the sequences.

        rows         list of n row numbers; their last token is BOI
        noise        (n, c, h, w): only its shape is used
        generator    None, or a list with one per row: the codes are drawn from it
        diffusing    steps and sampler: not used
        Raises UserError if guidance should leave out more than words.
        """
        if over != "words":
            raise UserError(f"--guide-over {over} is for Transfusion: a Chameleon's guidance "
                            "leaves out words")
        n = len(rows)
        P = self.trained.model.config.patches           # one code each
        generators = generator or [None] * n

        # 1. As in sample.Decoder: with guidance, the second half of the batch has no caption.
        copies = 1 if guidance == 1 else 2
        cache = self.cache.rows(rows * copies)
        logits = self.logits[rows]                      # what BOI says comes next: the first code
        if guidance != 1:
            without_caption = self.unconditional(rows, over, noise, cache.rows(slice(n, None)))
            logits = torch.cat([logits, without_caption])                       # (2n, V + K)

        # 2. One code after another, from the whole softmax over codes (our choice: temperature 1).
        pictures = []
        for k in range(P):
            logits = logits[:, self.first:].float()                             # (copies n, K)
            if guidance != 1:
                # Paper: App. B.1 guides both. Here it mixes logits; Transfusion's mixes noise.
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + guidance * (conditional - unconditional)
            p = logits.softmax(-1).cpu()                                        # (n, K)
            drawn = []
            for row, own in zip(p, generators):
                drawn.append(torch.multinomial(row, 1, generator=own))
            drawn = torch.stack(drawn)                                          # (n, 1)
            pictures.append(drawn)
            yield P - 1 - k, None, None
            # Both halves of the cache read the code, each code at its own place after BOI.
            pos = [[len(self.tokens[b]) + k] for b in rows]
            ids = (drawn + self.first).tolist()
            none = [[]] * (n * copies)
            logits = super().read(pos * copies, ids * copies, none, cache)      # (copies n, V + K)

        # 3. The codes are in the cache already: of both halves the first is the one that read
        #    the caption. The pictures and EOI go into the sequences.
        self.cache.overwrite(rows, cache.rows(slice(0, n)))
        codes = torch.cat(pictures, 1).view(n, *noise.shape[2:])                # (n, h, w)
        for b, picture in zip(rows, codes):
            self.latents[b].append(picture)
            self.tokens[b] += [PATCH] * P + [EOI]
        self.advance()


def decoder_of(trained):
    """The class that decodes with this checkpoint.Trained: sample.Decoder, or the Chameleon's."""
    return Decoder if trained.kind == "chameleon" else sample.Decoder


# ----------------------------------------------------------------------------------- command line
def demo():
    """Print one document as each of the three models reads it, and what the codes lose."""
    from sources import scenes
    pairs = scenes.load_scenes(2000, seed=0, progress=False)
    tokenizer = data.Words(pairs.vocabulary())
    vq = find_vae("scenes", codes=True)
    codes = vae.encode_all_codes(vq, pairs.pixels, progress=False)              # (2000, 8, 8)
    V = len(tokenizer)
    # 1. The three views of one document.
    for kind in ("transfusion", "chameleon", "llama"):
        document = [pairs.captions[0], ("image", 0, 1000)]
        if rival := view(kind, V):
            document = rival(document, codes)
        tokens = data.lay_out(document, tokenizer, patches=16).tokens
        names = [tokenizer.vocabulary[token] if token < V else f"c{token - V}" for token in tokens]
        if len(names) > 14:
            names[14:] = ["..."]
        print(f"{kind:12s} {len(tokens):3d} tokens: {' '.join(names)}")
    # 2. What is lost: pixels, through the codes and back.
    pixels = pairs.pixels[:256].astype(int)
    again = vae.to_pixels(vq.decode_codes(codes[:256])).astype(int)
    error = np.abs(again - pixels).mean()
    print(f"{vq.config.codes} codes draw pictures back with an error of {error:.1f} of 255")


def main(argv=None):
    """With arguments: sample.py's command line, for a Chameleon's model.pt. Without: the demo."""
    argv = sys.argv[1:] if argv is None else argv
    if argv:
        sample.main(argv, decoder=Decoder)
    else:
        demo()


if __name__ == "__main__":
    run_command(main)
