"""
feed.py: where a training step gets its batch from, when the data are packed shards       (Transfusion §4.1 "Data")

THE IDEA    The same feed as sources/feed.py, for data that do not fit in memory: token ids and latents are read from disk, whole
            rows at a time. train.py cannot tell the two apart.
READ NEXT   shards.py        TEST  tests/test_shards.py
"""
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch

from scale.shards import Shards
from sources.feed import noise_limits, shape_of
from support.common import UserError


@dataclass
class ShardFeed:
    """Rows of packed shards. shape: model.ModelConfig of the network that reads them; rows: per micro-batch; micros:
    micro-batches per step, over all processes; view: see sources.feed.Feed."""
    shards: Shards
    vae: object
    shape: object
    rows: int
    micros: int
    view: Callable
    test: None = None                                       # shards keep no pixels to compare with

    @property
    def tokenizer(self):
        """The tokenizer of the shards."""
        return self.shards.tokenizer

    @property
    def pictures(self):
        """How many pictures there are to learn from."""
        return self.shards.pictures

    def batch(self, seed, step, micro):
        """data.Batch of a micro-batch, with latents, and with the generator that t and eps are to be drawn from."""
        rng = np.random.default_rng([seed, step, micro])
        batch = self.shards.batch(seed, step, micro, self.rows, self.micros, self.view)
        batch.generator = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
        return batch

    def held_out(self, n):
        """(captions as lists of ids, latents or codes, None) of up to n pairs that `batch` never gives."""
        return *self.shards.held_out(n), None

    def captions(self, n):
        """Up to n unseen captions, to draw for the report."""
        return [self.tokenizer.decode(ids) for ids in self.shards.held_out(n)[0]]

    def describe(self):
        """What config.json says of the data: the settings they were packed with."""
        return {"packed": self.shards.settings}


def build_feed(config, diffusion, start, view):
    """The ShardFeed of a run. The arguments are those of sources.feed.build_feed. Raises UserError if the shards are
    missing or broken, or do not fit the options."""
    text_only = config.model == "llama"
    shards = Shards(config.data_dir or "packed", **noise_limits(config, diffusion), text_only=text_only)
    check_codes(config, shards)
    shards.must_have(seq_len=config.seq_len)
    if config.model == "transfusion":
        shards.must_have(patch=config.patch)
    vae = shards.vae(config.vae)
    if start:
        shards.must_be_of(config.init, start.tokenizer, start.vae, vae)
    codes = shards.codes if config.model == "chameleon" else 0
    shape = shape_of(config, len(shards.tokenizer) + codes, tuple(shards.settings["latent"]), start)
    return ShardFeed(shards, vae, shape, config.documents, config.accumulate, view(len(shards.tokenizer)))


def check_codes(config, shards):
    """Raise UserError if the shards hold codes where latents are needed, or latents where codes are."""
    if config.model == "transfusion" and shards.codes:
        raise UserError(f"the shards of {shards.folder} hold codes, which are for --model chameleon: pack latents, with "
                        f"the --vae of a VAE")
    if config.model == "chameleon" and not shards.codes:
        raise UserError(f"the shards of {shards.folder} hold latents, which are for Transfusion: pack codes, with the "
                        f"--vae of a VQ-VAE (python -m autoencoder.train --codes)")
    if config.model == "chameleon" and config.codes not in (0, shards.codes):
        raise UserError(f"the shards of {shards.folder} hold {shards.codes} codes, not {config.codes}: leave --codes out")
