"""
sample.py: LM mode <-> diffusion mode                                                     (Transfusion §3 "Inference")

THE IDEA    Write words one at a time, until the model itself writes BOI. Then put a picture of pure noise there and denoise
            it, all patches at once, against the frozen memory of what came before. Put the finished picture into that
            memory, close it with EOI, and go on writing. One loop makes text, pictures, and any mixture of them.
A PICTURE   <bos> a red circle -> BOI | ~~~~  noise, t = 1000                       keys and values of the words: computed
                                      | ~:::  t = 996: overwrites the noise's keys  once, at the start; of the patches: at
                                      | ...   and values, in place                  every step, in the same places
                                      | [##]  t = 0: one more forward leaves the clean picture in the cache
                                      | EOI -> <eos>, or more words, or the next BOI
THE RULE    out = uncond + w (cond - uncond): one batch of two rows per picture, the second with the caption's words replaced
            by <drop>, so that both have the same length and positions.                              §2.2, §4.1
SHAPES      B prompts, each of its own length; latents (c, h, w) float32
PAPER/HERE  same: modes, overwriting, BOI by the model, EOI appended, greedy text, 250 steps, guidance 3 (§4.3) by default.
            our choice: with several pictures, the words dropped for guidance are those since the last picture.
READ NEXT   evaluate.py        TRY IT  python sample.py "a red circle left of a blue square"        TEST  tests/test_sample.py
"""
import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import vae as vae_module
from data import BOI, BOS, DROP, EOI, EOS, PATCH
from diffusion import SAMPLERS, Diffusion, guide, sample
from model import Cache, ModelConfig, Transfusion
from shards import Pieces, dump_tokenizer, load_tokenizer


@dataclass
class Kit:
    """All that is needed to use a trained model: the network, its words, its VAE, its diffusion."""
    model: Transfusion
    words: data.Words | Pieces
    vae: vae_module.VAE
    diffusion: Diffusion


def load_kit(path, device="cpu"):
    """The Kit of a model.pt. Raises UserError if the file is missing, damaged, or of another kind or shape."""
    content = vae_module.load(path, "model")
    try:
        model = Transfusion(ModelConfig(**content["config"]))
        model.load_state_dict({k: v.float() for k, v in content["weights"].items()})
        return Kit(model.eval().to(device), load_tokenizer(content["words"]), vae_module.unpack_vae(content["vae"]).to(device),
                   Diffusion(**content["diffusion"]))
    except (KeyError, TypeError, RuntimeError) as problem:
        raise data.UserError(f"{path} was written by another version of this program: "
                             f"{str(problem).splitlines()[0]}") from None


def save_kit(path, kit):
    """Write the Kit as one small file (weights in 16 bits: 2 bytes a parameter)."""
    half = lambda content: {k: v.half() if v.dtype == torch.float32 else v for k, v in content.items()}   # bfloat16 stays
    packed = vae_module.pack_vae(kit.vae)
    packed["weights"] = half(packed["weights"])
    vae_module.save(path, {"kind": "model", "config": vars(kit.model.config), "weights": half(kit.model.state_dict()),
                           "words": dump_tokenizer(kit.words), "vae": packed,
                           "diffusion": {"kind": kit.diffusion.kind, "T": kit.diffusion.T, "shift": kit.diffusion.shift}})


def choose(logits, temperature=0.0, top_p=1.0, generator=None):
    """Next tokens (B,) of logits (B, V). temperature 0 is greedy (§4.1); top_p keeps the likeliest words whose
    probabilities add up to top_p. Special tokens other than BOI and EOS cannot be chosen: they are never predicted."""
    logits = logits.float().clone()
    logits[:, [k for k in range(len(data.SPECIAL)) if k not in (BOI, EOS)]] = -torch.inf
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)                    # the word that crosses top_p is kept
    return order.gather(1, torch.multinomial(p.cpu(), 1, generator=generator).to(order))[:, 0]


def caption_span(tokens):
    """Positions of the words that guidance drops: those since the last picture (or BOS), before the final BOI."""
    start = max(k for k, token in enumerate(tokens) if token in (BOS, EOI)) + 1
    return range(start, len(tokens) - 1)


class Decoder:
    """Sequences under construction: B rows with one cache. tokens: B lists of ids, patches as PATCH; latents: B lists of
    finished pictures (c, h, w). `lm_step` and `diffusion_steps` are the two modes; `generate` switches between them."""

    def __init__(self, kit, prompts, draw_now=False):
        """prompts: list of documents, each a list of str and latents (c, h, w). draw_now: append BOI, so that the
        next thing is a picture. Raises UserError for an unknown word or a prompt longer than the context."""
        self.kit, self.tokens, self.latents = kit, [], []
        self.device = next(kit.model.parameters()).device
        config = kit.model.config
        for prompt in prompts:
            parts = [part if isinstance(part, str) else ("image", 0, 0) for part in prompt]
            row = data.lay_out(parts, kit.words, config.patches, ends=False)
            self.tokens.append(row.tokens + [BOI] * draw_now)
            self.latents.append([part for part in prompt if not isinstance(part, str)])
            need = len(self.tokens[-1]) + (config.patches + 1) * draw_now
            if need > config.context:
                raise data.UserError(f"the prompt needs {need} positions, but this model's context is {config.context}: "
                                     f"shorten it to {config.context - need + len(self.tokens[-1])} tokens")
        self.cache = Cache(config, len(prompts), config.context, kit.model.words.weight)
        self.logits = self.read([list(range(len(row))) for row in self.tokens], self.tokens, self.latents, self.cache)

    @torch.no_grad()
    def read(self, pos, tokens, latents, cache):
        """Read B stretches of tokens at their positions into the cache; return the logits (B, V) after each row's last.
        Rows may differ in length: a short one is filled up by repeating its last token in the same place, which
        writes the same keys and values once more and changes nothing."""
        n = max(map(len, tokens))
        fill = lambda row: torch.tensor(row + [row[-1]] * (n - len(row)))
        pos, tokens = torch.stack([fill(p) for p in pos]), torch.stack([fill(t) for t in tokens])
        opened = ((tokens == PATCH) & (tokens.roll(1, 1) != PATCH)).flatten().cumsum(0).view(tokens.shape)
        image_id = torch.where(tokens == PATCH, opened - 1, -1)
        flat = [latent for row in latents for latent in row]
        stacked = torch.stack(flat) if flat else torch.zeros(0, *self.kit.model.config.latent)
        return self.kit.model.read(*(x.to(self.device) for x in (tokens, image_id, stacked, pos)), cache)[:, -1]

    def lm_step(self, active, **choice):
        """LM mode: each row in `active` (list of int) gets one more token; returns them as a list."""
        following = choose(self.logits, **choice).tolist()
        for b in active:
            self.tokens[b].append(following[b])
        self.advance()
        return [following[b] for b in active]

    def advance(self):
        """Read the last token of every row (rows that got none read theirs again: nothing changes)."""
        self.logits = self.read([[len(row) - 1] for row in self.tokens], [[row[-1]] for row in self.tokens],
                                [[] for _ in self.tokens], self.cache)

    @torch.no_grad()
    def diffusion_steps(self, rows, noise, guidance=3.0, generator=None, **options):
        """Diffusion mode: draw the next picture of each row of `rows`, whose last token is BOI. noise: (len(rows), c, h, w).
        Yields (t, x_t, x0 estimate) from T to 0; then the pictures and EOI stand in the sequences and in the cache."""
        model, P, n = self.kit.model, self.kit.model.config.patches, len(rows)
        cache = self.cache.rows(rows * 2 if guidance != 1 else rows)
        pos = torch.stack([len(self.tokens[b]) + torch.arange(P) for b in rows]).to(self.device)
        if guidance != 1:                               # the second half of the cache forgets the caption, but keeps its length
            spans = [caption_span(self.tokens[b]) for b in rows]
            forget = [[*s, len(self.tokens[b]) - 1] for s, b in zip(spans, rows)]
            blind = self.cache.rows(rows)
            self.read(forget, [[DROP] * len(s) + [BOI] for s in spans], [[] for _ in rows], blind)
            cache.k[:, n:], cache.v[:, n:] = blind.k, blind.v
            pos2 = torch.cat([pos, pos])

        def network(x, t):
            if guidance == 1:
                return model.denoise(x, torch.full((n,), t, device=self.device), pos, cache)
            both = model.denoise(torch.cat([x, x]), torch.full((2 * n,), t, device=self.device), pos2, cache)
            return guide(both[:n], both[n:], guidance)

        for t, x, x0 in sample(network, noise.to(self.device), self.kit.diffusion, generator=generator,
                               reach=float(self.kit.vae.reach), **options):
            yield t, x, x0
        # TRAP: the cache still holds the keys of the last *noisy* step; what follows must read the finished picture, t = 0.
        clean = self.cache.rows(rows)
        model.denoise(x, torch.zeros(n, dtype=torch.long, device=self.device), pos, clean)
        self.cache.k[:, rows], self.cache.v[:, rows] = clean.k, clean.v
        for k, b in enumerate(rows):
            self.latents[b].append(x[k].cpu())
            self.tokens[b] += [PATCH] * P + [EOI]
        self.advance()

    def document(self, b):
        """Row b as a list of str and latents, in order: the inverse of `lay_out`."""
        parts, words, k = [], [], 0
        for token in self.tokens[b] + [BOI]:
            if token == BOI and words:
                parts, words = parts + [self.kit.words.decode(words)], []
            elif token == EOI:
                parts, k = parts + [self.latents[b][k]], k + 1
            elif token >= len(data.SPECIAL):
                words.append(token)
        return parts


def generate(kit, prompts, draw_now=False, max_words=64, max_pictures=1, seed=0, temperature=0.0, top_p=1.0,
             first=0, progress=False, watch=None, **diffusing):
    """Documents that continue the prompts, each a list of str and latents (c, h, w). Transfusion §3 "Inference".

    prompts, draw_now: see Decoder. max_words, max_pictures: when to stop, besides EOS; counted beyond the prompt.
    temperature, top_p: see `choose`. diffusing: steps, sampler, guidance. watch: called with (t, x_t, x0) at each step.
    Noise is drawn per row from (seed, row number), so a picture does not depend on its neighbours in the batch; `first`:
    the number of the first row, where these are a part of a longer list."""
    decoder, B = Decoder(kit, prompts, draw_now), len(prompts)
    words, pictures, context = [0] * B, [0] * B, kit.model.config.context
    generators = [torch.Generator().manual_seed(seed * 100003 + first + b) for b in range(B)]
    chooser = torch.Generator().manual_seed(seed)
    room = lambda b, extra: len(decoder.tokens[b]) + extra <= context
    writing = [b for b in range(B) if not draw_now]
    waiting = [b for b in range(B) if draw_now]
    while writing or waiting:
        writing = [b for b in writing if room(b, 1)]
        if writing:
            for b, token in zip(list(writing), decoder.lm_step(writing, temperature=temperature, top_p=top_p, generator=chooser)):
                words[b] += token >= len(data.SPECIAL)
                if token == BOI and pictures[b] < max_pictures and room(b, kit.model.config.patches + 1):
                    waiting.append(b)
                if token in (BOI, EOS) or words[b] >= max_words:
                    writing.remove(b)
            continue
        if not waiting:
            break
        noise = torch.stack([torch.randn(kit.model.config.latent, generator=generators[b]) for b in waiting])
        steps = decoder.diffusion_steps(waiting, noise, generator=[generators[b] for b in waiting], **diffusing)
        for state in tqdm(steps, total=diffusing.get("steps", 250) + 1, desc="denoising", disable=not progress, leave=False):
            if watch:
                watch(*state)
        for b in waiting:
            pictures[b] += 1
        writing = [b for b in waiting if pictures[b] < max_pictures or max_words > 0]
        waiting = []
    return [decoder.document(b) for b in range(B)]


@torch.no_grad()
def decode_latents(kit, latents):
    """(M, h, w, 3) uint8 pictures of latents (M, c, h, w)."""
    pixels = vae_module.to_pixels(kit.vae.decode(latents.to(next(kit.vae.parameters()).device)))
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


@torch.no_grad()
def encode_pixels(kit, pixels):
    """Latents (M, c, h, w) of (M, h, w, 3 or 1) uint8 pictures; grey models read the mean of the channels."""
    if pixels.shape[-1] != kit.vae.config.image_channels:
        pixels = pixels.mean(-1, keepdims=True).round().astype(np.uint8)
    return kit.vae.encode(vae_module.to_float(pixels).to(next(kit.vae.parameters()).device))[0].cpu()


def draw(kit, captions, **options):
    """(M, h, w, 3) uint8: one picture per caption. options: steps, sampler, guidance, seed, first, progress, watch."""
    documents = generate(kit, [[caption] for caption in captions], draw_now=True, max_words=0, **options)
    return decode_latents(kit, torch.stack([next(p for p in parts if not isinstance(p, str)) for parts in documents]))


def describe(kit, latents, **options):
    """Captions of pictures given as latents (M, c, h, w), read at t = 0. options: temperature, top_p, seed."""
    documents = generate(kit, [[latent] for latent in latents], max_pictures=0, **options)
    return [" ".join(part for part in parts if isinstance(part, str)) for parts in documents]


def save_picture(pixels, path, enlarge=8):
    """Save (h, w, 3) uint8, enlarged without smoothing so that small pictures can be seen."""
    Image.fromarray(pixels).resize((pixels.shape[1] * enlarge, pixels.shape[0] * enlarge), Image.Resampling.NEAREST).save(path)


def main(argv=None):
    """Draw, describe, or let the model decide, as the command line says."""
    parser = argparse.ArgumentParser(description="Words to a picture, a picture to words, or whatever the model decides.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompts", nargs="*", help="captions to draw; several are drawn as one batch")
    parser.add_argument("--checkpoint", default=str(Path(__file__).parent / "assets/scenes.pt"), help="a model.pt of train.py")
    parser.add_argument("--image", action="append", default=[], help="describe this picture instead (may be repeated)")
    parser.add_argument("--open", action="store_true", help="let the model decide itself when to draw (prompts may be \"\")")
    parser.add_argument("--out", "-o", default="sample.png", help="picture to write (several: side by side)")
    parser.add_argument("--film", help="also write the denoising, as .gif (a film) or .png (a strip)")
    parser.add_argument("--steps", type=int, default=250, help="diffusion steps, 1 to 1000; 25 do for --sampler dpm++")
    parser.add_argument("--guidance", type=float, default=3.0, help="0 ignores the caption, 1 is plain, 3 is the paper's (ablations)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="ddpm is the paper's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the words; 0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest words up to this probability")
    args = parser.parse_args(argv)
    if not args.prompts and not args.image:
        raise data.UserError('say what to draw, e.g. python sample.py "a red circle", or give a picture with --image')
    if args.guidance < 0 or args.temperature < 0 or not 0 < args.top_p <= 1:
        raise data.UserError("--guidance and --temperature must be 0 or more, --top-p above 0 and at most 1")
    if not 1 <= args.steps <= 1000:
        raise data.UserError(f"--steps must be between 1 and 1000, got {args.steps}")
    for path in filter(None, (args.out, args.film)):
        if not Path(path).parent.is_dir() or Path(path).suffix.lower() not in Image.registered_extensions():
            raise data.UserError(f"cannot write {path}: its folder must exist and its name end in .png or another picture type")
    kit, began = load_kit(args.checkpoint), time.time()
    writing = dict(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    if args.image:
        size = kit.model.config.latent[1] * kit.vae.f
        latents = encode_pixels(kit, np.stack([data.open_picture(path, size) for path in args.image]))
        for path, caption in zip(args.image, describe(kit, latents, **writing)):
            print(f"{path}: {caption}")
        return
    frames = []
    options = dict(steps=args.steps, guidance=args.guidance, sampler=args.sampler, progress=True,
                   watch=(lambda t, x, x0: frames.append((t, x.cpu(), x0.cpu()))) if args.film else None)
    documents = generate(kit, [[p] if p.strip() else [] for p in args.prompts], draw_now=not args.open,
                         max_words=64 if args.open else 0, **writing, **options)
    for parts in documents:
        print(" ".join(part if isinstance(part, str) else "[picture]" for part in parts))
    latents = [part for parts in documents for part in parts if not isinstance(part, str)]
    if not latents:
        return print("the model wrote words only; leave out --open to make it draw")
    pictures = decode_latents(kit, torch.stack(latents))
    save_picture(vae_module.grid(pictures, min(8, len(pictures)), gap=1) if len(pictures) > 1 else pictures[0], args.out)
    print(f"wrote {args.out} ({len(pictures)} pictures, {time.time() - began:.1f} s)")
    if args.film:
        shown = [frames[round(k * (len(frames) - 1) / 9)] for k in range(10)]     # ten moments; top xt, bottom the guess at x0
        rows = [decode_latents(kit, torch.cat([f[k][:1] for f in shown])) for k in (1, 2)]
        if Path(args.film).suffix.lower() == ".gif":
            films = [Image.fromarray(p).resize((256, 256), Image.Resampling.NEAREST) for p in rows[0]]
            films[0].save(args.film, save_all=True, append_images=films[1:] + [films[-1]] * 5, duration=200, loop=0)
        else:
            save_picture(vae_module.grid(np.concatenate(rows), 10), args.film, enlarge=4)
        print(f"wrote {args.film}")


if __name__ == "__main__":
    data.run_command(main)
