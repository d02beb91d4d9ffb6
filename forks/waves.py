"""
waves.py: words, pictures and waves in one transformer                 (a fork; Transfusion §3, §6)

THE IDEA    Nothing in the paper's recipe belongs to pictures. A modality is a latent of some shape,
            a way to cut it into vectors and back, and three tokens: one that opens it, one that
            holds its places, one that closes it. Here is a third one: short sound waves, beside
            words and pictures, in one model. No file of the core is changed.
A PICTURE   <bos> a fast saw   <bow> [ w0 w1 ... w7 ]  <eow> <eos>            64 samples, P = 8
            <bos> a red circle <boi> [ p0 p1 ... p15 ] <eoi> a slow sine <bow> [ w0 ... w7 ] ...
            The model itself decides after a caption whether BOI or BOW follows.
THE RULE    L = LM sum / words + lambda * (pictures' eq. 3 + waves' eq. 3) / (pictures + waves)
WHAT IT     1. `Modality`: three tokens and a shape. The tokens are words of the vocabulary.
TAKES       2. `lay_out`: data.lay_out knows one kind of picture, so it is written again.
            3. `Hearing`: Transfusion with a second encoder; embed and forward once for each kind.
            4. `losses`: eq. 3 for each kind, in one sum.
            5. `write`: the mode switch of sample.write, with two ways into diffusion mode.
            Packing, mask, trunk, noise, samplers, guidance and both patch encoders are the core's.
SHAPES      pictures (M, 4, 8, 8), as the shipped VAE has them; waves (M, 8, 1, 8): a wave of 64
            samples as 8 places of 8 numbers, so that the linear encoder with p = 1 reads it.
            A *block* is a picture or a wave; blocks are numbered as data.to_batch numbers pictures.
TRY IT      python -m forks.waves           three minutes on one core; out/waves/waves.png
TEST        tests/test_forks.py
"""
import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import vae as vae_module
from attention_mask import dense_mask, intervals
from data import BOI, BOS, DROP, EOI, EOS, PATCH
from diffusion import Diffusion, guide, loss, sample
from model import Transfusion, sized, transfusion_loss
from patchify import PATCHES
from sources import scenes
from sources.feed import same_noise
from support import checkpoint
from support.common import ASSETS, run_command

# ---------------------------------------------------------------------------------- what is heard
SAMPLES = 64
PACES = {"slow": 2, "brisk": 4, "fast": 7}              # periods per wave
FORMS = ("sine", "square", "triangle", "saw")
SOUNDS = []
for form in FORMS:
    SOUNDS += [f"a {pace} {form}" for pace in PACES]


def make_wave(caption, phase):
    """(64,) float32: the wave of a caption such as "a fast saw". phase: 0 to 1."""
    _, pace, form = caption.split()
    x = torch.arange(SAMPLES) / SAMPLES * PACES[pace] + phase
    x = x % 1                                           # where in its period each sample is
    if form == "sine":
        y = torch.sin(2 * torch.pi * x)
    elif form == "square":
        y = (x < 0.5) * 2.0 - 1
    elif form == "triangle":
        y = 4 * (x - 0.5).abs() - 1
    else:
        y = 2 * x - 1
    return 1.5 * y                                      # a deviation of about 1, as latents have


def hear(wave):
    """The caption of the nearest wave of all that could have been made. wave: (64,) float32."""
    # The judge. It needs no network: there are 12 captions, and 64 phases say enough.
    distances = {}
    for caption in SOUNDS:
        phases = torch.stack([make_wave(caption, k / 64) for k in range(64)])           # (64, 64)
        distances[caption] = float((phases - wave).square().mean(dim=1).min())
    return min(distances, key=distances.get)


def to_latents(waves):
    """(M, 64) samples -> (M, 8, 1, 8): place k holds samples 8k to 8k + 7 as its 8 channels."""
    return waves.view(-1, 8, 1, 8).transpose(1, 3)


def to_samples(latents):
    """The inverse of `to_latents`: (M, 8, 1, 8) -> (M, 64)."""
    return latents.transpose(1, 3).reshape(-1, SAMPLES)


# ------------------------------------------------------------------------------------- modalities
@dataclass
class Modality:
    """What a model must know of a kind of block: the tokens that open it, hold its P places, and
    close it; and the shape (c, h, w) of its latents."""
    begin: int
    place: int
    end: int
    shape: tuple
    patches: int


def make_tokenizer():
    """data.Words of both worlds. The waves' three tokens are words in it, which nobody may say."""
    words = set(scenes.vocabulary()) | {"<bow>", "<wave>", "<eow>"}
    for caption in SOUNDS:
        words.update(caption.split())
    return data.Words(words)


def make_modalities(tokenizer):
    """{"picture": Modality, "wave": Modality}."""
    ids = tokenizer.ids
    return {
        "picture": Modality(BOI, PATCH, EOI, (4, 8, 8), patches=16),
        "wave": Modality(ids["<bow>"], ids["<wave>"], ids["<eow>"], (8, 1, 8), patches=8),
    }


# ------------------------------------------------------------------------- document -> one sequence
def lay_out(document, tokenizer, modalities, ends=True):
    """The data.Sequence of a document: data.lay_out, for two kinds of block.

    document   list of str, ("dropped", str), and (kind, index, t_max)"""
    out = data.Sequence()
    out.add([BOS])
    for part in document:
        if isinstance(part, str):
            out.add(tokenizer.encode(part))
        elif part[0] == "dropped":
            # TRAP: no loss on a dropped caption, nor at the token before it (data.lay_out).
            out.has_loss[-1] = False
            words = tokenizer.encode(part[1])
            out.add([DROP] * len(words), has_loss=False)
        else:
            kind, index, t_max = part
            modality = modalities[kind]
            out.add([modality.begin], has_loss=False)
            # `image_id` means "which block": the mask lets the places of one block see each other.
            number = len(out.images)
            out.add([modality.place] * modality.patches, image_id=number, has_loss=False)
            out.add([modality.end])
            out.images.append(index)
            out.t_max.append(t_max)
            out.t_min.append(1)
    if ends:
        out.add([EOS], has_loss=False)
    else:
        out.has_loss[-1] = False
    return out


@dataclass
class World:
    """Captions and latents of both kinds: {"picture": ..., "wave": ...}."""
    captions: dict
    latents: dict
    t_limit: int                                        # App. B.2

    def draw(self, rng):
        """A document: a pair of one kind, or now and then a pair of each. rng: numpy Generator."""
        kinds = ["picture", "wave"]
        rng.shuffle(kinds)
        if rng.random() < 0.8:
            kinds = kinds[:1]
        caption_first = rng.random() < 0.8              # Paper: §4.1
        document = []
        for kind in kinds:
            k = int(rng.integers(len(self.captions[kind])))
            pair = data.one_pair(self.captions[kind][k], k, caption_first, rng,
                                 drop=0.1, t_limit=self.t_limit, noisiest=1000)
            for part in pair:
                if part[0] == "image":                  # ("image", k, t_max): of which kind?
                    part = (kind, *part[1:])
                document.append(part)
        return document


def make_world(vae, diffusion, n, seed):
    """The World of n pictures and n waves."""
    pairs = scenes.load_scenes(n, seed, scenes.WORLDS["one"], progress=False)
    mean, _ = vae_module.encode_all(vae, pairs.pixels, False)
    rng = np.random.default_rng(seed)
    captions = [SOUNDS[k] for k in rng.integers(len(SOUNDS), size=n)]
    waves = [make_wave(caption, float(rng.random())) for caption in captions]
    return World(
        captions={"picture": pairs.captions, "wave": captions},
        latents={"picture": mean, "wave": to_latents(torch.stack(waves))},
        t_limit=same_noise(diffusion, 500),
    )


# -------------------------------------------------------------------------------------- the model
class Hearing(Transfusion):
    """A Transfusion with ears: one more encoder, the same trunk.

    config       ModelConfig, whose latent and patch are the pictures'
    modalities   see `make_modalities`"""

    def __init__(self, config, modalities):
        super().__init__(config)
        self.modalities = modalities
        c, h, w = modalities["wave"].shape
        self.wave_encoder = PATCHES["linear"](c, 1, config.width, T=config.T)
        # As the core begins: the output says "no noise", so the first loss is that of knowing
        # nothing.
        nn.init.normal_(self.wave_encoder.into.weight, std=c ** -0.5)
        nn.init.zeros_(self.wave_encoder.out.weight)
        nn.init.zeros_(self.wave_encoder.out.bias)

    def encode(self, kind, xt, t):
        """(vectors (M, P, D), what `decode` needs) of the noisy latents of a kind."""
        if kind == "picture":
            return self.encode_pictures(xt, t)
        return self.wave_encoder.encode(xt, t)

    def decode(self, kind, h, t, kept):
        """Vectors h (M, P, D) -> what the network says of each latent, (M, c, h, w)."""
        encoder = self.patch_encoder if kind == "picture" else self.wave_encoder
        return encoder.decode(h, t, kept)

    def forward(self, tokens, block_id, doc_id, has_loss, xt, t):
        """(logits (n, V), {kind: out (M, c, h, w)}). As Transfusion.forward, but xt and t are dicts
        with an entry for each kind."""
        D = self.config.width
        x = self.embedding(tokens)                                      # (B, T, D)
        kept = {}
        for kind, modality in self.modalities.items():
            vectors, kept[kind] = self.encode(kind, xt[kind], t[kind])  # (M, P, D)
            here = tokens == modality.place                             # (B, T)
            x = x.masked_scatter(here[..., None], vectors.reshape(-1, D))

        # The mask asks only which block a position belongs to, not of which kind the block is.
        lo, hi = intervals(block_id, doc_id)
        pos = torch.arange(tokens.shape[1]) - lo                        # (B, T)
        h = self.trunk(x, self.rope_positions(pos, block_id), dense_mask(lo, hi))

        out = {}
        for kind, modality in self.modalities.items():
            here = h[tokens == modality.place].view(-1, modality.patches, D)        # (M, P, D)
            out[kind] = self.decode(kind, here, t[kind], kept[kind])    # (M, c, h, w)
        return self.head(self.norm(h[has_loss])), out


# --------------------------------------------------------------------------------------- training
def losses(model, batch, world, diffusion, generator):
    """(LM sum, how many words, (M,) eq. 3 of every block) of a data.Batch: model.losses."""
    # 1. A t for every block, in reading order, and then the blocks of each kind by themselves.
    share = torch.rand(len(batch.images), generator=generator)          # (M,)
    times = 1 + (share * batch.t_max).long()                            # (M,)
    in_block = batch.image_id >= 0                                      # (B, T)
    place = torch.zeros(len(batch.images), dtype=torch.long)            # (M,): the token in it
    place[batch.image_id[in_block]] = batch.tokens[in_block]
    x0 = {}
    eps = {}
    t = {}
    xt = {}
    for kind, modality in model.modalities.items():
        own = place == modality.place                   # (M,): which blocks are of this kind
        x0[kind] = world.latents[kind][batch.images[own]]
        eps[kind] = torch.randn(x0[kind].shape, generator=generator)
        t[kind] = times[own]
        xt[kind] = diffusion.add_noise(x0[kind], eps[kind], t[kind])

    # 2. One forward; eq. 1 and eq. 3.
    logits, out = model(batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, xt, t)
    following = batch.tokens.roll(-1, dims=1)[batch.has_loss]
    lm_sum = F.cross_entropy(logits, following, reduction="sum")
    per_block = []
    for kind in model.modalities:
        target = diffusion.target(x0[kind], eps[kind], t[kind])
        per_block.append(loss(target, out[kind]))
    return lm_sum, len(following), torch.cat(per_block)


def train(model, world, tokenizer, diffusion, steps, seed):
    """The average of the model's weights over its last steps (EMA), a Hearing; AdamW, warm-up, half
    a cosine, 32 documents a step."""
    weights = model.parameters()
    optimizer = torch.optim.AdamW(weights, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = OneCycleLR(optimizer, 2e-3, total_steps=steps + 1, pct_start=0.1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc="training")
    for step in bar:
        rng = np.random.default_rng([seed, step])
        rows = []
        for _ in range(32):
            document = world.draw(rng)
            rows.append(lay_out(document, tokenizer, model.modalities))
        batch = data.pack(rows, model.config.context)
        lm_sum, words, per_block = losses(model, batch, world, diffusion, generator)
        total = transfusion_loss(lm_sum, words, per_block.sum(), len(per_block))
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if step % 20 == 0:
            lm = lm_sum.item() / words
            eq3 = per_block.mean().item()
            bar.set_postfix(lm=f"{lm:.3f}", eq3=f"{eq3:.3f}")
    return average.module.eval()


# --------------------------------------------------------------------------------------- inference
class Document:
    """A document that grows: its tokens, the block of each, and the latents of the blocks."""

    def __init__(self, model, tokenizer, prompt):
        """prompt: list of str, and of (kind, latent)."""
        self.model = model
        parts = []
        for part in prompt:
            if not isinstance(part, str):               # its number and t_max are for training
                part = (part[0], 0, 0)
            parts.append(part)
        sequence = lay_out(parts, tokenizer, model.modalities, ends=False)
        self.tokens = sequence.tokens
        self.block_id = sequence.image_id
        self.blocks = [part for part in prompt if not isinstance(part, str)]

    def add(self, tokens, block=-1):
        """Append tokens of one kind. block: the number of the block that they are places of."""
        self.tokens += tokens
        self.block_id += [block] * len(tokens)

    def read(self, t=0, blind=False):
        """(logits (V,) of what comes next, {kind: outputs}): one forward over all that stands here.
        t: the step of the last block; the others are finished. blind: without the last caption."""
        row = self.drop_caption() if blind else self.tokens
        tokens = torch.tensor([row])
        xt = {}
        times = {}
        for kind, modality in self.model.modalities.items():
            own = [latent for name, latent in self.blocks if name == kind]
            xt[kind] = torch.stack(own) if own else torch.zeros(0, *modality.shape)
            times[kind] = torch.zeros(len(own), dtype=torch.long)
        if self.blocks:
            kind, _ = self.blocks[-1]
            times[kind][-1] = t
        block_id = torch.tensor([self.block_id])
        same_document = torch.zeros_like(tokens)
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        logits, out = self.model(tokens, block_id, same_document, everywhere, xt, times)
        return logits[-1], out

    def drop_caption(self):
        """The tokens with <drop> for each word between the last block and the one before."""
        start = len(self.tokens) - 1
        while self.block_id[start] >= 0:                # back over the places of the last block
            start -= 1
        tokens = list(self.tokens)
        word = start - 1                                # `start` is its BOI or BOW, which stays
        while tokens[word] >= len(data.SPECIAL) and tokens[word] not in self.ends():
            tokens[word] = DROP
            word -= 1
        return tokens

    def ends(self):
        """The tokens that close a block."""
        return [modality.end for modality in self.model.modalities.values()]


@torch.no_grad()
def write(model, tokenizer, diffusion, prompt, max_blocks=1, max_words=8, guidance=2.0, steps=25,
          seed=0):
    """The list of str and (kind, latent) that the model adds to a prompt: sample.write with two
    ways into diffusion mode. Words are greedy."""
    document = Document(model, tokenizer, prompt)
    generator = torch.Generator().manual_seed(seed)
    begins = {modality.begin: kind for kind, modality in model.modalities.items()}
    never = [k for k in range(len(data.SPECIAL)) if k not in (BOI, EOS)]
    for modality in model.modalities.values():
        never += [modality.place, modality.end]         # these are put there, never written
    added = []
    while True:
        # LM mode: one more token.
        logits, _ = document.read()
        logits[never] = -torch.inf
        token = int(logits.argmax())
        if token in begins and max_blocks > 0:
            # Diffusion mode. The token that was written says of which kind.
            kind = begins[token]
            latent = draw_block(document, kind, diffusion, guidance, steps, generator)
            added.append((kind, latent))
            max_blocks -= 1
        elif token == EOS or token in begins or max_words == 0:
            return added
        else:
            document.add([token])
            added.append(tokenizer.decode([token]))
            max_words -= 1


def draw_block(document, kind, diffusion, guidance, steps, generator):
    """Diffusion mode: append a block of a kind to a Document, denoised where it stands. Returns its
    latent (c, h, w). The other arguments are those of `write`."""
    modality = document.model.modalities[kind]
    noise = torch.randn(1, *modality.shape, generator=generator)        # (1, c, h, w)
    document.add([modality.begin])
    document.add([modality.place] * modality.patches, block=len(document.blocks))
    document.blocks.append((kind, noise[0]))

    def network(x, t):
        document.blocks[-1] = (kind, x[0])              # x_{t-1} overwrites x_t
        _, cond = document.read(t)
        _, blind = document.read(t, blind=True)
        return guide(cond[kind][-1:], blind[kind][-1:], guidance)

    *_, (_, x, _) = sample(network, noise, diffusion, steps, "dpm++", x0_max=4.0)
    document.blocks[-1] = (kind, x[0])
    document.add([modality.end])
    return x[0]


# ------------------------------------------------------------------------------ what it has learned
def measure(model, tokenizer, diffusion, vae):
    """(dict of shares, [(caption, wave (64,), right)], [(caption, picture, right)])."""
    # 1. Words to waves, and words to pictures. The model chooses the kind itself.
    waves = []
    pictures = []
    chose = []
    texts = SOUNDS + [text for text, _ in scenes.captions("colors")[:12]]
    for k, text in enumerate(texts):
        kind = "wave" if text in SOUNDS else "picture"
        document = write(model, tokenizer, diffusion, [text], max_words=0, seed=k)
        chose.append(bool(document) and document[0][0] == kind)
        if not chose[-1]:
            continue
        latent = document[0][1]
        if kind == "wave":
            wave = to_samples(latent[None])[0]
            waves.append((text, wave, hear(wave) == text))
        else:
            with torch.no_grad():
                picture = vae_module.to_pixels(vae.decode(latent[None]))[0]
            claim = scenes.read_caption(text)
            pictures.append((text, picture, scenes.holds(claim, scenes.parse(picture))))

    # 2. Waves to words.
    heard = []
    for k, text in enumerate(SOUNDS):
        (latent,) = to_latents(make_wave(text, k / len(SOUNDS))[None])
        words = write(model, tokenizer, diffusion, [("wave", latent)], max_blocks=0)
        heard.append(" ".join(words) == text)

    # Of all that were asked for: a block of the wrong kind is wrong.
    n_pictures = len(texts) - len(SOUNDS)
    numbers = {
        "right kind of block after a caption": np.mean(chose),
        "waves as asked": sum(right for *_, right in waves) / len(SOUNDS),
        "pictures as asked": sum(right for *_, right in pictures) / n_pictures,
        "captions of waves": np.mean(heard),
    }
    return numbers, waves, pictures


def plot(waves, pictures, path):
    """Save the drawn waves and pictures under their captions; a red caption was not obeyed."""
    columns = 6
    rows = (len(SOUNDS) + 12) // columns
    figure = Figure(figsize=(2.1 * columns, 1.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, (text, wave, right) in zip(axes, waves):
        axis.plot(wave, color="tab:blue", linewidth=1.5)
        axis.axhline(0, color="lightgrey", linewidth=0.8, zorder=0)
        axis.set_ylim(-3, 3)
        axis.set_title(text, fontsize=9, color="black" if right else "red")
    for axis, (text, picture, right) in zip(axes[len(SOUNDS):], pictures):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(text, fontsize=9, color="black" if right else "red")
    figure.savefig(path, dpi=110)


def main(argv=None):
    """Train the model of three modalities, draw, and say how much is right."""
    parser = argparse.ArgumentParser(
        prog="python -m forks.waves",
        description="Words, pictures and waves in one transformer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--pairs", type=int, default=4000, help="pictures to draw, and waves")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--out", default="out/waves", help="folder of waves.png")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    modalities = make_modalities(tokenizer)
    vae = checkpoint.load_vae(ASSETS / "scenes_vae.pt")
    config = sized("toy", vocabulary=len(tokenizer), patch_position=True, context=64)
    model = Hearing(config, modalities)
    diffusion = Diffusion("flow", shift=3.0)            # Our choice: see docs/RESULTS.md
    world = make_world(vae, diffusion, args.pairs, args.seed)
    model = train(model, world, tokenizer, diffusion, args.steps, args.seed)

    numbers, waves, pictures = measure(model, tokenizer, diffusion, vae)
    for name, share in numbers.items():
        print(f"  {name:36s} {share:6.1%}")
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    plot(waves, pictures, folder / "waves.png")
    print(f"wrote {folder}/waves.png")
    return numbers


if __name__ == "__main__":
    run_command(main)
