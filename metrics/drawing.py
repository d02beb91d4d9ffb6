"""
drawing.py: many pictures and captions, divided among processes               (Transfusion App. B.1)

THE IDEA    A measure needs hundreds of pictures, and drawing them takes most of its time. So each
            process draws a part, and then every process has the whole list. The noise of a
            picture depends on its place in the whole list, so the pictures do not depend on how
            many processes there are.
A PICTURE   captions  0 1 2 | 3 4 5
                      rank 0  rank 1         each draws its own part, from `first` on
            pictures  0 1 2 3 4 5            both have all of them
THE RULE    the decoder must fit the model: a Chameleon writes codes, it does not denoise
SHAPES      pictures (N, h, w, 3) uint8; latents (N, c, h, w) float32, or codes (N, h, w) int64
READ NEXT   ../sample.py, ../chameleon.py        TEST  tests/test_distributed.py
"""
import numpy as np
import torch

import chameleon
import sample
from scale import distributed
from support.checkpoint import decode_latents

TOGETHER = 100                                          # pictures in a batch: caches take memory


def draw(trained, captions, **options):
    """(N, h, w, 3) uint8: one picture per caption, the same as one process draws.

    trained: checkpoint.Trained; captions: list of N str; options: as `sample.draw`.
    Every process must call it."""
    decoder = chameleon.decoder_of(trained)

    # Without `first`, the second process would draw from the noise of the first one again.
    def draw_part(part, first):
        return sample.draw(trained, part, first=first, decoder=decoder, **options)

    return np.concatenate(distributed.split_work(draw_part, captions))


def draw_after(trained, prompts, **options):
    """(N, h, w, 3) uint8: the picture that follows each prompt.

    prompts: N lists of str and latents (c, h, w); options: as `sample.generate`.
    Every process must call it."""
    decoder = chameleon.decoder_of(trained)

    def draw_part(part, first):
        pictures = []
        for k in range(0, len(part), TOGETHER):
            documents = sample.generate(
                trained, part[k: k + TOGETHER], draw_now=True, max_words=0, first=first + k,
                decoder=decoder, **options)
            latents = torch.stack([document[-1] for document in documents])
            pictures.extend(decode_latents(trained, latents))
        return pictures

    return np.stack([picture for part in distributed.split_work(draw_part, prompts)
                     for picture in part])


def glance(trained, prompts, seed, **options):
    """[(title, picture, True)] of a few pictures: to look at a model before anyone judges it.

    prompts: [(title, list of str and latents)]; options: as `sample.generate`.
    Every process must call it."""
    if not prompts:
        return []
    pictures = draw_after(trained, [prompt for _, prompt in prompts], seed=seed, **options)
    return [(title, picture, True) for (title, _), picture in zip(prompts, pictures, strict=True)]


def describe(trained, latents):
    """List of N str: a caption for each picture.

    trained: checkpoint.Trained; latents: (N, c, h, w), or codes (N, h, w).
    Every process must call it."""
    decoder = chameleon.decoder_of(trained)

    # Paper: App. B.1. Words are greedy, which is `sample.describe`'s default. So no random number
    # is drawn here, and no caption depends on its place in the list.
    def describe_part(part, first):
        return sample.describe(trained, part, decoder=decoder)

    captions = []
    for part in distributed.split_work(describe_part, latents):
        captions += part
    return captions
