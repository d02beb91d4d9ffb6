"""
feed.py: where a training step gets its batch from             (Transfusion §4.1 "Data", App. B.2)

THE IDEA    A feed is built once, for the data at hand. Then train.py asks it for one micro-batch
            after another. The feed knows the documents, the tokenizer and the latents of all
            pictures; train.py knows none of these. This file builds the feed of data that fit in
            memory. scale/feed.py builds the same thing from packed shards.
A PICTURE   captions --Documents--> document --lay_out--> sequence --pack--> Batch --+--> batch(...)
            pixels   --VAE-------------------------------------------> latents ------+
THE RULE    batch(seed, step, micro) is a pure function: a resumed run sees what an uninterrupted
            one would have seen.
SHAPES      latents (N, c, h, w) float32 of all N pictures; a Batch as data.py has it, M pictures in
            it
READ NEXT   ../train.py        TEST  tests/test_train.py
"""
import hashlib
import json
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch

import data
import vae as vae_module
from diffusion import Diffusion
from model import sized
from sources import choose, edits
from sources import documents as mixed
from support.common import UserError
from support.start import add_words, describe_words


# ------------------------------------------------------------------------------ what training reads
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
    view        how the model sees a document: function (document, codes) -> document, made by
                chameleon.view; None: the document itself
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
    view: Callable | None
    test: object

    @property
    def source(self):
        """The Pairs or Edits that are learned from."""
        return self.documents.pairs

    @property
    def pictures(self):
        """How many pictures there are to learn from."""
        return len(self.source.pixels)

    def batch(self, seed, step, micro):
        """data.Batch of a micro-batch, with latents, and with the generator that t and eps are to
        be drawn from."""
        # All random numbers of a micro-batch come from these three: no state, nothing to save.
        rng = np.random.default_rng([seed, step, micro])
        sequences = []
        for _ in range(self.rows):
            document = self.documents.draw(rng)
            if self.view:
                document = self.view(document, self.codes)
            sequence = data.lay_out(document, self.tokenizer, self.documents.patches)
            sequences.append(sequence)
        batch = data.pack(sequences, self.seq_len)
        batch.generator = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))

        # A latent is a draw from q(z | x), not its mean: the VAE's own noise is part of the data.
        mean, deviation = self.latents                                      # each (N, c, h, w)
        M = len(batch.images)
        noise = torch.randn(M, *mean.shape[1:], generator=batch.generator)  # (M, c, h, w)
        batch.latents = mean[batch.images] + deviation[batch.images] * noise
        return batch

    def held_out(self, n):
        """(captions, latents or codes, latents before or None) of up to n unseen pictures: see
        `probe`."""
        return probe(self.test, self.vae, n)

    def captions(self, n):
        """Captions to draw for the report: none. evaluate.py has those of the unseen pictures."""
        return []

    def prompts(self, n):
        """[(title, prompt)] of up to n pictures to look at early, half of them unseen. A prompt is
        a list of str and latents (c, h, w)."""
        found = []
        for name, source in (("", self.source), ("unseen: ", self.test)):
            for parts, _ in source.to_draw()[: n // 2]:
                words = [part for part in parts if isinstance(part, str)]
                numbers = [part for part in parts if not isinstance(part, str)]
                # A rival's pictures are codes; only Transfusion learns from edits and documents.
                latents = iter(mean_latents(self.vae, source.pixels[numbers]) if numbers else [])
                prompt = [part if isinstance(part, str) else next(latents) for part in parts]
                found.append((name + " ".join(words), prompt))
        return found

    def describe(self):
        """What config.json says of the data beside the options. A resumed run compares it: the
        same data may lie in another folder now, and other data in this one."""
        pairs = self.documents.pairs
        content = pairs.captions
        if isinstance(pairs, mixed.Mixtures):
            content = pairs.documents
        words = " ".join(self.tokenizer.vocabulary[len(data.SPECIAL):])
        if isinstance(self.tokenizer, data.Pieces):
            words = digest(self.tokenizer.model)
        return {"learned": {
            "words": words,                             # first: of all changes it says most
            "pictures": len(content),
            "captions": digest(json.dumps(content).encode()),
            "pixels": digest(np.ascontiguousarray(pairs.pixels)),
        }}

    def describe_as_before(self):
        """What an earlier version of this program said otherwise of the same data: nothing."""
        return {}


def digest(content):
    """16 hex digits that name some bytes, or an array, by its content."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def probe(pairs, vae, n):
    """What the conditioning gap is measured on (metrics/gap.py), of the first n captioned pictures
    or edits: (captions, latents, latents of the pictures before; None if there are none).
    A VQ-VAE gives codes in place of latents."""
    if isinstance(pairs, edits.Edits):
        before, captions, after = map(list, zip(*pairs.triples()[:n]))
        latents = mean_latents(vae, pairs.pixels[after])
        return captions, latents, mean_latents(vae, pairs.pixels[before])
    if isinstance(pairs, mixed.Mixtures):
        captioned = {picture: words for words, picture in pairs.captioned()}        # each once
        numbers = list(captioned)[:n]
        captions = [captioned[k] for k in numbers]
        return captions, mean_latents(vae, pairs.pixels[numbers]), None

    numbers = first_different(pairs.pixels, n)
    captions = [pairs.captions[k] for k in numbers]
    pixels = pairs.pixels[numbers]
    if vae.quantiser:
        return captions, vae_module.encode_all_codes(vae, pixels, progress=False), None
    return captions, mean_latents(vae, pixels), None


def first_different(pixels, n):
    """The numbers of the first n pictures of (N, h, w, c) that are not the same as one before."""
    # A picture may have five captions. Another one of its own would be no wrong caption.
    seen = set()
    numbers = []
    for k, picture in enumerate(pixels):
        content = picture.tobytes()
        if content not in seen:
            seen.add(content)
            numbers.append(k)
        if len(numbers) == n:
            break
    return numbers


def mean_latents(vae, pixels):
    """(N, c, h, w): the means of q(z | x), so that every measurement sees the same latents."""
    mean, _ = vae_module.encode_all(vae, pixels, progress=False)
    return mean


# ----------------------------------------------------------------------- building: check, then work
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
    # 1. Check. A mistake found here costs seconds; after the VAE's training it costs minutes.
    source = choose.load_source(config, "train", progress=progress)
    vocabulary = source.vocabulary()
    if start:
        new = add_words(start, vocabulary, config.seed)
        tokenizer = start.tokenizer
        if new and progress:
            print(describe_words(new, tokenizer))
    else:
        tokenizer = data.Words(vocabulary)
    vae_config = vae.config if vae else new_vae_config(config, source)
    check_vae(config, vae_config, source)
    side = source.pixels.shape[2] // vae_config.f
    latent = (vae_config.z, side, side)
    tokens = len(tokenizer) + vae_config.codes          # a Chameleon's codes are tokens, too
    shape = shape_of(config, tokens, latent, start)
    limits = noise_limits(config, diffusion)
    documents = build_documents(config, source, shape.patches, limits, tokenizer)
    check_length(config, documents)
    # The gap is measured on unseen captions: one that is too long would end the run, hours later.
    check_length(config, build_documents(config, test, shape.patches, limits, tokenizer))

    # 2. Work. Pictures are encoded once: the VAE learns no more.
    if vae is None:
        vae = train_vae(source.pixels, vae_config)
    if vae_config.codes:
        none = torch.zeros(0, *latent)
        latents = (none, none)
        codes = vae_module.encode_all_codes(vae, source.pixels, progress)
    else:
        latents = vae_module.encode_all(vae, source.pixels, progress)
        codes = None
    return Feed(documents, tokenizer, vae, shape, latents, codes, config.documents, config.seq_len,
                view(len(tokenizer)), test)


def new_vae_config(config, source):
    """The VAEConfig of a VAE that is trained for these pictures."""
    codes = (config.codes or 512) if config.model == "chameleon" else 0
    return vae_module.VAEConfig(image_channels=source.pixels.shape[3], codes=codes,
                                channels=config.vae_channels, z=config.vae_z)


def build_documents(config, source, patches, limits, tokenizer):
    """What draws the documents of a source. limits: `noise_limits`."""
    if config.data == "edits":
        return edits.EditDocuments(source, patches, config.seq_len, tokenizer=tokenizer, **limits)
    if config.data == "documents":
        return mixed.MixedDocuments(source, patches, config.seq_len, tokenizer=tokenizer, **limits)
    return data.Documents(source, patches, config.seq_len, text_share=config.text_share,
                          tokenizer=tokenizer, **limits)


def noise_limits(config, diffusion):
    """The rules about noise that documents follow: {"drop": share of captions dropped,
    "t_limit": the largest t of a picture before its caption, "noisiest": that of any other}."""
    # Paper: App. B.2. t <= 500 where the picture comes first: its caption must be able to see it.
    # Our choice: 100 before an edit. On a shifted schedule, the t with the same amount of noise.
    limit = 100 if config.data == "edits" else config.t_limit
    if config.t_limit == 1000:                          # no limit at all: the ablation of Table 11
        t_limit = diffusion.T
    else:
        share = limit / 1000                            # of the paper's 1,000 steps
        t_limit = same_noise(diffusion, max(1, round(share * diffusion.T)))
    return {"drop": config.drop, "t_limit": t_limit, "noisiest": diffusion.T}


def same_noise(diffusion, t):
    """The last step of `diffusion` that is no noisier (s/a) than the paper's schedule is at t: an
    int, and t itself for the paper's own schedule."""
    paper = Diffusion(T=diffusion.T)
    limit = paper.s[t] / paper.a[t]
    no_noisier = diffusion.s / diffusion.a <= limit     # (T + 1,), True up to that step
    return int(no_noisier.sum()) - 1


def shape_of(config, tokens, latent, start):
    """The ModelConfig of a run: that of the checkpoint it starts from, if there is one.

    tokens      how many there are       latent      (c, h, w)
    start       checkpoint.Trained of --init, or None
    Raises UserError if the checkpoint does not fit these data."""
    if start is None:
        patch = 1 if config.model == "chameleon" else config.patch          # a code for every place
        return sized(
            config.size,
            vocabulary=tokens,
            latent=latent,
            patch=patch,
            encoder=config.encoder,
            stable=config.stable,
            patch_position=config.patch_position,
            bidirectional=config.bidirectional,
            context=config.seq_len,
        )
    shape = start.model.config
    same = shape.latent == latent and shape.vocabulary == tokens
    if not same or shape.context < config.seq_len:
        raise UserError(f"{config.init} has latents {shape.latent}, {shape.vocabulary} tokens and "
                        f"a context of {shape.context}, but these data have {latent}, {tokens} and "
                        f"{config.seq_len}: set --image-size and --seq-len to fit")
    return shape


# ------------------------------------------------------------------------------ the user's mistakes
def check_vae(config, vae_config, source):
    """Raise UserError if a VAE of this configuration cannot read these pictures."""
    side, channels = source.pixels.shape[2:]
    if vae_config.image_channels != channels or side % vae_config.f:
        raise UserError(f"the VAE takes pictures of {vae_config.image_channels} channels, with "
                        f"sides divisible by {vae_config.f}; --data {config.data} has {channels} "
                        f"channels and {side} pixels")
    if config.codes not in (0, vae_config.codes):
        raise UserError(f"this VQ-VAE has {vae_config.codes} codes, not {config.codes}: leave "
                        f"--codes out, or train another with python -m autoencoder.train --codes "
                        f"{config.codes} and name it with --vae")


def check_length(config, documents):
    """Raise UserError if the longest document does not fit in a row. It names the line of the
    longest caption, if the captions come from a file."""
    longest = documents.longest()
    if longest <= config.seq_len:
        return
    # A Chameleon has a code for every place: it has no patches to enlarge.
    advice = "raise --seq-len" if config.model == "chameleon" else "raise --seq-len or --patch"
    where = ""
    pairs = documents.pairs
    if isinstance(pairs, mixed.Mixtures):
        lengths = documents.lengths()
        too_many = sum(length > config.seq_len for length in lengths)
        where = f"{pairs.lines[lengths.index(longest)]}: this document is too long"
        where += f", and so are {too_many - 1} more; " if too_many > 1 else "; "
        advice = f"cut it in two, or {advice}"
    elif pairs.lines:
        lengths = [data.count_tokens(documents.tokenizer, text) for text in pairs.captions]
        k = int(np.argmax(lengths))
        room = config.seq_len - (longest - lengths[k])
        too_many = sum(length > room for length in lengths)
        where = f"{pairs.lines[k]}: a caption of {lengths[k]} tokens is too long"
        where += f", and so are {too_many - 1} more; " if too_many > 1 else "; "
        advice = f"shorten it, or {advice}"
    raise UserError(f"{where}the longest document takes {longest} positions and does not fit in a "
                    f"context of {config.seq_len}: {advice}")
