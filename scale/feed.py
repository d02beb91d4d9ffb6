"""
feed.py: batches from packed shards                                   (Transfusion §4.1 "Data")

THE IDEA    The same feed as sources/feed.py, for data that do not fit in memory. Token ids and
            latents are read from disk, whole rows at a time. train.py cannot tell the two apart.
A PICTURE   packed/ --shards.Shards--> rows of documents, latents --lay_out--> Batch
READ NEXT   shards.py       TEST  tests/test_shards_training.py
"""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch

from scale import distributed
from scale.mixture import last_from, read_weights
from scale.shards import Shards, content_as_before
from sources.feed import noise_limits, shape_of
from support.common import UserError


@dataclass
class ShardFeed:
    """What training reads, from packed shards.

    shards          the folder of shards
    vae             the VAE, or VQ-VAE, of the shards
    shape           model.ModelConfig of the network that reads this feed
    rows            per micro-batch
    micro_batches   per step, over all processes
    view            how the model sees a document: see sources.feed.Feed
    test, source    None: shards keep no pixels to compare with
    """
    shards: Shards
    vae: object
    shape: object
    rows: int
    micro_batches: int
    view: Callable
    test: None = None
    source: None = None

    @property
    def tokenizer(self):
        """The tokenizer of the shards."""
        return self.shards.tokenizer

    @property
    def pictures(self):
        """How many pictures there are to learn from."""
        return self.shards.pictures

    def batch(self, seed, step, micro):
        """data.Batch of a micro-batch, with latents, and with the generator from which t and eps
        are to be drawn. A pure function: a resumed run reads what an uninterrupted one would."""
        batch = self.shards.batch(seed, step, micro, self.rows, self.micro_batches, self.view)
        # Noise must not depend on how many processes there are: it has the micro-batch's own seed.
        rng = np.random.default_rng([seed, step, micro])
        batch.generator = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
        return batch

    def held_out(self, n):
        """(captions as lists of ids, latents or codes, None) of up to n pairs that `batch` never
        gives. The conditioning gap is measured on them."""
        captions, pictures = self.shards.held_out(n)
        return captions, pictures, None                     # no picture before: these are no edits

    def captions(self, n):
        """Up to n unseen captions, to draw for the report."""
        ids, _ = self.shards.held_out(n)
        return [self.tokenizer.decode(caption) for caption in ids]

    def prompts(self, n):
        """[(title, prompt)] of up to n pictures to look at early."""
        return [(caption, [caption]) for caption in self.captions(n)]

    def describe(self):
        """What config.json says of the data: the settings they were packed with, and the name of
        their content."""
        return {"packed": self.shards.settings | {"content": self.shards.content}}

    def describe_as_before(self):
        """What an earlier version of this program said otherwise of the same data."""
        indices = self.shards.find_indices()
        content = distributed.from_rank_0(lambda: content_as_before(indices))
        return {"packed": {"content": content}}


class Ahead:
    """A feed whose next batches are drawn by a thread, while a GPU computes with these. `batch` is
    a pure function, so they are the same batches. feed: any feed, of memory or of shards."""

    def __init__(self, feed):
        self.feed = feed
        self.thread = ThreadPoolExecutor(1)
        self.coming = {}                    # {(seed, step, micro): the future of that batch}

    def __getattr__(self, name):
        return getattr(self.feed, name)

    def batch(self, seed, step, micro):
        """The data.Batch of a micro-batch: see the feed's own. What is wrong with a batch is said
        when it is asked for."""
        future = self.coming.pop((seed, step, micro), None)
        batch = future.result() if future else self.feed.batch(seed, step, micro)
        following = (seed, step + 1, micro)
        self.coming[following] = self.thread.submit(self.feed.batch, *following)
        return batch


def build_feed(config, diffusion, start, view):
    """The ShardFeed of a run. The arguments are those of sources.feed.build_feed. Raises UserError
    if the shards are missing or broken, or do not fit the options."""
    # 1. The rows, and whether they are what this model reads.
    limits = noise_limits(config, diffusion)
    shards = Shards(
        config.data_dir or "packed", **limits, text_only=config.model == "llama",
        mixture=read_weights(config.mixture),
        at_the_end=read_weights(config.mixture_end, "--mixture-end"),
        last_from=last_from(config.steps), once=distributed.from_rank_0)
    say_mixture(config, shards)
    check_codes(config, shards)
    shards.check_setting("seq_len", config.seq_len)
    if config.model == "transfusion":
        shards.check_setting("patch", config.patch)
    shards.check_rows()

    # 2. The VAE and the tokenizer give ids and latents their meaning: a model that was trained with
    #    others would read nonsense of the right size.
    vae = shards.load_vae(config.vae)
    if start:
        shards.check_origin(config.init, start.tokenizer, start.vae, vae)

    # 3. The network. A Chameleon has one vocabulary for words and codes: the first code follows the
    #    last word.
    words = len(shards.tokenizer)
    codes = shards.codes if config.model == "chameleon" else 0
    shape = shape_of(config, words + codes, tuple(shards.settings["latent"]), start)
    return ShardFeed(shards, vae, shape, config.documents, config.accumulate, view(words))


def say_mixture(config, shards):
    """Print how often the rows of each folder come, if that is not once per epoch."""
    phases = {}
    if config.mixture:
        phases["an epoch"] = shards.phase
    if shards.last_phase:
        phases[f"an epoch from step {shards.last_from:,} on"] = shards.last_phase
    for name, phase in phases.items():
        for kind, order in phase.orders.items():
            if order.n:
                distributed.say(f"{name}, {kind}: {order.describe()}")


def check_codes(config, shards):
    """Raise UserError if the shards hold codes where latents are needed, or latents where codes
    are."""
    if config.model == "transfusion" and shards.codes:
        raise UserError(f"the shards of {shards.folder} hold codes, which are for --model "
                        f"chameleon: pack latents, with the --vae of a VAE")
    if config.model == "chameleon" and not shards.codes:
        raise UserError(f"the shards of {shards.folder} hold latents, which are for Transfusion: "
                        f"pack codes, with the --vae of a VQ-VAE (python -m autoencoder.train "
                        f"--codes)")
    if config.model == "chameleon" and config.codes not in (0, shards.codes):
        raise UserError(f"the shards of {shards.folder} hold {shards.codes} codes, not "
                        f"{config.codes}: leave --codes out")
