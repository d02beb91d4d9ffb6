"""
feed.py: where a training step gets its batch from                          (Transfusion §4.1 "Data", App. B.2)

THE IDEA    A feed is built once, for the data at hand, and then asked for one micro-batch after another. It knows the
            documents, the tokenizer and the latents of all pictures; train.py knows none of these. This file builds the
            feed of data that fit in memory. scale/shards.py builds the same thing from packed shards.
A PICTURE   captions --Documents--> document --lay_out--> sequence --pack--> Batch --+--> batch(seed, step, micro)
            pixels   --VAE-------------------------------------------> latents ------+
THE RULE    batch(seed, step, micro) is a pure function: a resumed run sees what an uninterrupted one would have seen.
SHAPES      latents (N, c, h, w) float32 of all N pictures; a Batch as data.py has it, M pictures in it
READ NEXT   ../train.py        TEST  tests/test_train.py
"""
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch

import data
import vae as vae_module
from diffusion import same_noise
from model import sized
from sources import choose, edits
from support.common import UserError


# ----------------------------------------------------------------------------------------------- what training reads
@dataclass
class Feed:
    """Documents drawn from captioned pictures in memory.

    documents   draws one document at a time: data.Documents or edits.EditDocuments
    tokenizer   data.Words or data.Pieces
    vae         the VAE, or VQ-VAE, of the pictures
    shape       model.ModelConfig of the network that reads this feed
    latents     (mean, deviation) of q(z | x) of all pictures, each (N, c, h, w); empty for a rival
    codes       (N, h, w) int64, a Chameleon's pictures; None for the others
    rows        documents per micro-batch
    seq_len     T, positions per row
    view        how the model sees a document: function (document, codes) -> document (chameleon.view)
    test        unseen Pairs or Edits, for the conditioning gap and the report
    """
    documents: object
    tokenizer: object
    vae: vae_module.VAE
    shape: object
    latents: tuple
    codes: torch.Tensor | None
    rows: int
    seq_len: int
    view: Callable
    test: object

    @property
    def pictures(self):
        """How many pictures there are to learn from."""
        return len(self.documents.pairs.pixels)

    def batch(self, seed, step, micro):
        """data.Batch of a micro-batch, with latents, and with the generator that t and eps are to be drawn from."""
        rng = np.random.default_rng([seed, step, micro])
        drawn = [self.view(self.documents.draw(rng), self.codes) for _ in range(self.rows)]
        sequences = [data.lay_out(document, self.tokenizer, self.documents.patches) for document in drawn]
        batch = data.pack(sequences, self.seq_len)
        batch.generator = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
        # A latent is a draw from q(z | x), not its mean: the VAE's own noise is part of the data.
        mean, deviation = self.latents
        noise = torch.randn(len(batch.images), *mean.shape[1:], generator=batch.generator)
        batch.latents = mean[batch.images] + deviation[batch.images] * noise
        return batch

    def held_out(self, n):
        """(captions, latents or codes, latents before or None) of up to n unseen pictures: see `probe`."""
        return probe(self.test, self.vae, n)

    def captions(self, n):
        """Captions to draw for the report: none, for evaluate.py has those of the unseen pictures."""
        return []

    def describe(self):
        """What config.json says of the data beside the options: nothing."""
        return {}


def probe(pairs, vae, n):
    """What the conditioning gap is measured on (metrics/gap.py): (captions, latents, latents before or None) of the
    first n captioned pictures, or edits. A VQ-VAE gives codes in place of latents."""
    if vae.quantiser:
        return pairs.captions[:n], vae_module.encode_all_codes(vae, pairs.pixels[:n], progress=False), None

    def encode(index):
        return vae_module.encode_all(vae, pairs.pixels[index], progress=False)[0]

    if isinstance(pairs, edits.Edits):
        before, captions, after = map(list, zip(*pairs.triples()[:n]))
        return captions, encode(after), encode(before)
    return pairs.captions[:n], encode(np.arange(min(n, len(pairs.captions)))), None


# ------------------------------------------------------------------------------------------ building: check, then work
def build_feed(config, test, diffusion, start, vae, train_vae, view, progress=True):
    """The Feed of a run. Everything that can be wrong is checked before the VAE is trained.

    config      config.Config
    test        unseen Pairs or Edits
    diffusion   the run's noise process
    start       the checkpoint.Trained of --init, or None
    vae         the VAE to use, or None
    train_vae   function (pixels, VAEConfig) -> VAE, called if there is none
    view        function (first code's id) -> the Feed's view
    progress    whether to show bars
    Raises UserError if data, VAE, tokenizer and options do not fit together."""
    source = choose.load_source(config, "train", progress=progress)
    tokenizer = start.tokenizer if start else data.Words(source.vocabulary())
    tokenizer.encode(" ".join(sorted(source.vocabulary())))     # a word that --init does not know: say so now

    vae_config = vae.config if vae else new_vae_config(config, source)
    check_vae(config, vae_config, source)
    side = source.pixels.shape[2] // vae_config.f
    shape = shape_of(config, len(tokenizer) + vae_config.codes, (vae_config.z, side, side), start)
    documents = build_documents(config, source, shape.patches, noise_limits(config, diffusion))
    check_length(config, documents)

    vae = vae or train_vae(source.pixels, vae_config)
    if vae_config.codes:
        none = torch.zeros(0, *shape.latent)
        latents, codes = (none, none), vae_module.encode_all_codes(vae, source.pixels, progress)
    else:
        latents, codes = vae_module.encode_all(vae, source.pixels, progress), None
    return Feed(documents, tokenizer, vae, shape, latents, codes, config.documents, config.seq_len,
                view(len(tokenizer)), test)


def new_vae_config(config, source):
    """The VAEConfig of a VAE that is trained for these pictures."""
    codes = (config.codes or 512) if config.model == "chameleon" else 0
    return vae_module.VAEConfig(image_channels=source.pixels.shape[3], codes=codes)


def build_documents(config, source, patches, limits):
    """What draws the documents of a source. limits: `noise_limits`."""
    if config.data == "edits":
        return edits.EditDocuments(source, patches, config.seq_len, **limits)
    return data.Documents(source, patches, config.seq_len, text_share=config.text_share, **limits)


def noise_limits(config, diffusion):
    """The rules about noise that documents follow: {"drop": share of captions dropped, "t_limit": the largest t of a
    picture before its caption}. Paper App. B.2: t <= 500; the same amount of noise on a shifted schedule."""
    limit = 100 if config.data == "edits" else config.t_limit
    t_limit = diffusion.T if config.t_limit == 1000 else same_noise(diffusion, limit)
    return {"drop": config.drop, "t_limit": t_limit}


def shape_of(config, vocabulary, latent, start):
    """The ModelConfig of a run: that of the checkpoint it starts from, if there is one. vocabulary: how many tokens;
    latent: (c, h, w). Raises UserError if the checkpoint does not fit these data."""
    if start is None:
        patch = 1 if config.model == "chameleon" else config.patch          # a code for every place
        return sized(config.size, vocabulary=vocabulary, latent=latent, patch=patch, encoder=config.encoder,
                     stable=config.stable, patch_position=config.patch_position,
                     bidirectional=config.bidirectional, context=config.seq_len)
    shape = start.model.config
    if shape.latent != latent or shape.context < config.seq_len or shape.vocabulary != vocabulary:
        raise UserError(f"{config.init} has latents {shape.latent}, {shape.vocabulary} tokens and a context of "
                        f"{shape.context}, but these data have {latent}, {vocabulary} and {config.seq_len}: set "
                        f"--image-size and --seq-len to fit")
    return shape


def check_vae(config, vae_config, source):
    """Raise UserError if a VAE of this configuration cannot read these pictures."""
    side, channels = source.pixels.shape[2:]
    if vae_config.image_channels != channels or side % vae_config.f:
        raise UserError(f"the VAE takes pictures of {vae_config.image_channels} channels, with sides divisible by "
                        f"{vae_config.f}; --data {config.data} has {channels} channels and {side} pixels")
    if config.codes not in (0, vae_config.codes):
        raise UserError(f"this VQ-VAE has {vae_config.codes} codes, not {config.codes}: leave --codes out, or train "
                        f"another with python -m autoencoder.train --codes {config.codes} and name it with --vae")


def check_length(config, documents):
    """Raise UserError if the longest document does not fit in a row."""
    longest = documents.longest()
    if longest > config.seq_len:
        advice = "raise --seq-len" if config.model == "chameleon" else "raise --seq-len or --patch"
        raise UserError(f"the longest document takes {longest} positions and does not fit in a context of "
                        f"{config.seq_len}: {advice}")
