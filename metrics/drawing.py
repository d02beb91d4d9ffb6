"""
drawing.py: many pictures and captions, divided among the ranks
"""
import numpy as np

import chameleon
import sample
from scale import distributed


def draw(trained, captions, **options):
    """`sample.draw`, divided among the ranks: the same pictures as one process draws."""
    return np.concatenate(distributed.split_work(lambda part, first: sample.draw(trained, part, first=first, decoder=chameleon.decoder_of(trained), **options), captions))


def describe(trained, latents):
    """`sample.describe`, divided among the ranks."""
    return sum(distributed.split_work(lambda part, first: sample.describe(trained, part, decoder=chameleon.decoder_of(trained)), latents), [])
