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
            our choice: with several pictures, the words dropped for guidance are those since the last picture. An edit
            (§4.5) may be guided over its words, its picture (the blind row then reads pure noise, t = 1000, there), or both.
READ NEXT   evaluate.py        TRY IT  python sample.py "a red circle left of a blue square"        TEST  tests/test_sample.py
"""
import argparse
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
from data import BOI, BOS, DROP, EOI, EOS, PATCH
from diffusion import SAMPLERS, guide, sample
from model import Cache
from support import figures
from support.checkpoint import decode_latents, encode_pixels, load_trained
from support.common import ASSETS, pick_device, UserError, open_picture, run_command


def choose(logits, temperature=0.0, top_p=1.0, generators=None):
    """Next tokens (B,) of logits (B, V). temperature 0 is greedy (§4.1); top_p keeps the likeliest words whose
    probabilities add up to top_p; generators: one per row, so that a row's words do not depend on its neighbours.
    Special tokens other than BOI and EOS cannot be chosen: they are never predicted."""
    logits = logits.float().clone()
    logits[:, [k for k in range(len(data.SPECIAL)) if k not in (BOI, EOS)]] = -torch.inf
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0).cpu()              # the word that crosses top_p is kept
    picked = torch.stack([torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators or [None] * len(p))])
    return order.gather(1, picked.to(order.device))[:, 0]


GUIDE_OVER = ("words", "picture", "both")


class Decoder:
    """Sequences under construction: B rows with one cache. tokens: B lists of ids, patches as PATCH; latents: B lists of
    finished pictures (c, h, w). `lm_step` and `diffusion_steps` are the two modes; `generate` switches between them."""

    def __init__(self, trained, prompts, draw_now=False, room=None):
        """prompts: list of documents, each a list of str and latents (c, h, w). draw_now: append BOI, so that the next thing is
        a picture. room: how many positions will follow the longest prompt, at most; None: the whole context (64 rows of 4096 at
        7B would be 275 GB of keys and values). Raises UserError for an unknown word or a prompt longer than the context."""
        self.trained, self.tokens, self.latents = trained, [], []
        self.device = next(trained.model.parameters()).device
        config = trained.model.config
        for prompt in prompts:
            parts = [part if isinstance(part, str) else ("image", 0, 0) for part in prompt]
            row = data.lay_out(parts, trained.tokenizer, config.patches, ends=False)
            self.tokens.append(row.tokens + [BOI] * draw_now)
            self.latents.append([part for part in prompt if not isinstance(part, str)])
            need = len(self.tokens[-1]) + (config.patches + 1) * draw_now
            if need > config.context:
                raise UserError(f"the prompt needs {need} positions, but this model's context is {config.context}: "
                                     f"shorten it to {config.context - need + len(self.tokens[-1])} tokens")
        most = config.context if room is None else min(config.context, max(map(len, self.tokens)) + room)
        self.cache = Cache(config, len(prompts), most, trained.model.embedding.weight)
        self.logits = self.read([list(range(len(row))) for row in self.tokens], self.tokens, self.latents, self.cache)

    @torch.no_grad()
    def read(self, pos, tokens, latents, cache, t=0):
        """Read B stretches of tokens at their positions into the cache, their pictures at noise t; return the logits (B, V)
        after each row's last. Rows may differ in length: a short one is filled up by repeating its last token in the same
        place, which writes the same keys and values once more and changes nothing."""
        n = max(map(len, tokens))
        fill = lambda row: torch.tensor(row + [row[-1]] * (n - len(row)))
        pos, tokens = torch.stack([fill(p) for p in pos]), torch.stack([fill(t) for t in tokens])
        opened = ((tokens == PATCH) & (tokens.roll(1, 1) != PATCH)).flatten().cumsum(0).view(tokens.shape)
        image_id = torch.where(tokens == PATCH, opened - 1, -1)
        flat = [latent for row in latents for latent in row]
        stacked = torch.stack(flat) if flat else torch.zeros(0, *self.trained.model.config.latent)
        return self.trained.model.read(*(x.to(self.device) for x in (tokens, image_id, stacked, pos)), cache, t)[:, -1]

    def events_per_picture(self, steps):
        """How many Events of mode "noise" a picture of so many diffusion steps takes."""
        return steps + 1

    def lm_step(self, active, generators=None, **choice):
        """LM mode: each row in `active` (list of int) gets one more token; returns them as a list. generators: one per row;
        those of other rows are left alone, or a row that waits for its picture would get other noise in other company."""
        following = choose(self.logits[active], generators=generators and [generators[b] for b in active], **choice).tolist()
        for b, token in zip(active, following):
            self.tokens[b].append(token)
        self.advance()
        return following

    def advance(self):
        """Read the last token of every row (rows that got none read theirs again: nothing changes)."""
        self.logits = self.read([[len(row) - 1] for row in self.tokens], [[row[-1]] for row in self.tokens],
                                [[] for _ in self.tokens], self.cache)

    def blind(self, rows, over, noise):
        """The cache of `rows` as the unconditional branch of guidance has it: the same positions, without the words since
        the last picture (each is <drop>), without that picture (it is `noise`, at t = T), or without both. BOI stays.
        Raises UserError if the picture is to be forgotten and there is none. Returns (cache, logits (rows, V) after BOI)."""
        cache, pos, tokens, pictures = self.cache.rows(rows), [], [], []
        for k, b in enumerate(rows):
            row = self.tokens[b]
            words = max(k for k, token in enumerate(row) if token in (BOS, EOI)) + 1         # where the caption starts
            start = words if over == "words" else words - self.trained.model.config.patches - 2
            if row[words - 1] != EOI and over != "words":
                raise UserError(f"guidance over the {over} needs a picture before the words: leave --guide-over out")
            pos.append(list(range(start, len(row))))
            tokens.append(row[start: words] + (row[words: -1] if over == "picture" else [DROP] * (len(row) - 1 - words)) + [BOI])
            pictures.append([] if over == "words" else [noise[k].cpu()])
        return cache, self.read(pos, tokens, pictures, cache, t=self.trained.diffusion.T)

    @torch.no_grad()
    def diffusion_steps(self, rows, noise, guidance=3.0, generator=None, over="words", **options):
        """Diffusion mode: draw the next picture of each row of `rows`, whose last token is BOI. noise: (len(rows), c, h, w).
        over: what guidance leaves out, see `blind`.
        Yields (t, x_t, x0 estimate) from T to 0; then the pictures and EOI stand in the sequences and in the cache."""
        model, P, n = self.trained.model, self.trained.model.config.patches, len(rows)
        cache = self.cache.rows(rows * 2 if guidance != 1 else rows)
        pos = torch.stack([len(self.tokens[b]) + torch.arange(P) for b in rows]).to(self.device)
        if guidance != 1:                               # the second half of the cache forgets the caption, but keeps its length
            blind, _ = self.blind(rows, over, noise.roll((1, 1), (2, 3)))   # any noise but the new picture's
            cache.k[:, n:], cache.v[:, n:] = blind.k, blind.v
            pos2 = torch.cat([pos, pos])

        def network(x, t):
            if guidance == 1:
                return model.denoise(x, torch.full((n,), t, device=self.device), pos, cache).float()
            both = model.denoise(torch.cat([x, x]), torch.full((2 * n,), t, device=self.device), pos2, cache).float()
            return guide(both[:n], both[n:], guidance)

        for t, x, x0 in sample(network, noise.to(self.device), self.trained.diffusion, generator=generator,
                               x0_max=float(self.trained.vae.x0_max), **options):
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
                parts, words = parts + [self.trained.tokenizer.decode(words)], []
            elif token == EOI:
                parts, k = parts + [self.latents[b][k]], k + 1
            elif token >= len(data.SPECIAL):
                words.append(token)
        return parts


@dataclass
class Event:
    """One thing that happens while documents grow. mode: "prompt" (read into the cache), "word" (LM mode: one token
    each), "noise" (diffusion mode: one step) or "picture" (finished, with EOI, clean in the cache). rows: which rows of the
    batch; filled: how many positions of the cache each of them has now. tokens: the new ids, of "word". t, x, x0: of "noise"."""
    mode: str
    rows: list
    filled: list
    tokens: list = None
    t: int = None
    x: torch.Tensor = None
    x0: torch.Tensor = None


def grow(decoder, seeds, draw_now=False, max_words=64, max_pictures=1, temperature=0.0, top_p=1.0, **diffusing):
    """Generator of Events: the algorithm of Transfusion §3 "Inference", for a batch. Each row is in a mode of its own; rows
    that wait for a picture are denoised together once no row is writing, which changes the time and nothing else.
    seeds: one int per row; the other arguments as `generate`, which runs it to the end."""
    B, config = len(decoder.tokens), decoder.trained.model.config
    words, pictures = [0] * B, [0] * B
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    event = lambda mode, rows, **more: Event(mode, list(rows), [len(decoder.tokens[b]) for b in rows], **more)
    room = lambda b, extra: len(decoder.tokens[b]) + extra <= config.context
    writing, waiting = ([], list(range(B))) if draw_now else (list(range(B)), [])
    yield event("prompt", range(B))
    while writing or waiting:
        writing = [b for b in writing if room(b, 1) and words[b] < max_words]
        if writing:
            rows, tokens = writing, decoder.lm_step(writing, temperature=temperature, top_p=top_p, generators=generators)
            yield event("word", rows, tokens=tokens)
            words = [n + sum(b == row and token >= len(data.SPECIAL) for row, token in zip(rows, tokens)) for b, n in enumerate(words)]
            waiting += [b for b, token in zip(rows, tokens)
                        if token == BOI and pictures[b] < max_pictures and room(b, config.patches + 1)]
            writing = [b for b, token in zip(rows, tokens) if token not in (BOI, EOS)]
        elif waiting:
            noise = torch.stack([torch.randn(config.latent, generator=generators[b]) for b in waiting])
            for t, x, x0 in decoder.diffusion_steps(waiting, noise, generator=[generators[b] for b in waiting], **diffusing):
                yield event("noise", waiting, t=t, x=x, x0=x0)
            for b in waiting:
                pictures[b] += 1
            yield event("picture", waiting)
            writing, waiting = [b for b in waiting if max_words > 0], []


def generate(trained, prompts, draw_now=False, max_words=64, max_pictures=1, seed=0, first=0, progress=False, watch=None, decoder=None,
             **options):
    """Documents that continue the prompts, each a list of str and latents (c, h, w). Transfusion §3 "Inference".

    prompts, draw_now: see Decoder. max_words, max_pictures: when to stop, besides EOS; counted beyond the prompt.
    options: temperature, top_p (see `choose`), steps, sampler, guidance, over. watch: called with every Event.
    seed: an int, or one per row. Noise and words of a row come from its own generator, so that a row does not depend on
    its neighbours in the batch. first: the number of the first row, where these are a part of a longer list."""
    decoder = (decoder or Decoder)(trained, prompts, draw_now, room=max_words + max(max_pictures, draw_now) * (trained.model.config.patches + 2) + 1)
    seeds = seed if isinstance(seed, list) else [seed * 100003 + first + b for b in range(len(prompts))]
    steps = decoder.events_per_picture(options.get("steps", 250))
    bar = tqdm(total=steps, desc="drawing", disable=not progress, leave=False)
    for event in grow(decoder, seeds, draw_now, max_words, max_pictures, **options):
        if event.mode == "noise":
            bar.update()
        elif event.mode == "picture":
            bar.reset()
        if watch:
            watch(event)
    bar.close()
    return [decoder.document(b) for b in range(len(prompts))]


def draw(trained, captions, **options):
    """(M, h, w, 3) uint8: one picture per caption. options: steps, sampler, guidance, seed, first, progress, watch."""
    documents = generate(trained, [[caption] for caption in captions], draw_now=True, max_words=0, **options)
    return decode_latents(trained, torch.stack([next(p for p in parts if not isinstance(p, str)) for parts in documents]))


def edit(trained, latents, instructions, over="both", **options):
    """Latents (M, c, h, w) of the edited pictures, given those before and one instruction each (§4.5). options: as `draw`,
    and over: what guidance leaves out, "words", "picture" or "both" (README says what each gives)."""
    documents = generate(trained, [[x, text] for x, text in zip(latents, instructions)], draw_now=True, max_words=0, over=over, **options)
    return torch.stack([parts[-1] for parts in documents])


def describe(trained, latents, **options):
    """Captions of pictures given as latents (M, c, h, w), read at t = 0. options: temperature, top_p, seed."""
    documents = generate(trained, [[latent] for latent in latents], max_pictures=0, **options)
    return [" ".join(part for part in parts if isinstance(part, str)) for parts in documents]


def read_prompt(text, trained):
    """A prompt as `generate` takes it: words, and pictures where a file stands in brackets: "[a.png] make the circle blue".
    Raises UserError if a file cannot be read; says so when a picture had to be converted."""
    size, parts = trained.model.config.latent[1] * trained.vae.f, []
    for k, part in enumerate(re.split(r"\[([^\]]*)\]", text)):
        if k % 2:
            parts.append(encode_pixels(trained, open_picture(part, size, say=True)[None])[0])
        elif part.strip():
            parts.append(part.strip())
    return parts


def parse_arguments(argv=None):
    """The options of a command line, checked."""
    parser = argparse.ArgumentParser(description="Words to a picture, a picture to words, any mixture, or whatever the model decides.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompts", nargs="*", help="what to draw; several are drawn as one batch; [file.png] puts a picture among the words")
    parser.add_argument("--checkpoint", help="a model.pt of train.py; default: assets/scenes.pt, with --edit assets/scenes_edit.pt")
    parser.add_argument("--image", action="append", default=[], help="describe this picture, or --edit it (may be repeated)")
    parser.add_argument("--edit", action="append", default=[], help="change --image as told; repeated: one after the other")
    parser.add_argument("--open", action="store_true", help="let the model decide itself when to draw (prompts may be \"\")")
    parser.add_argument("--pictures", type=int, default=1, help="with --open: at most so many pictures per document")
    parser.add_argument("--out", "-o", default="sample.png", help="picture to write (several: side by side)")
    parser.add_argument("--page", help="also write words and pictures, in order, as one .html page")
    parser.add_argument("--film", help="also write the denoising, as .gif (a film) or .png (a strip)")
    parser.add_argument("--trace", action="store_true", help="print the modes and the growing cache")
    parser.add_argument("--steps", type=int, default=250, help="diffusion steps, 1 to 1000; 25 do for --sampler dpm++")
    parser.add_argument("--guidance", type=float, default=3.0, help="0 ignores the caption, 1 is plain, 3 is the paper's (ablations)")
    parser.add_argument("--guide-over", choices=GUIDE_OVER, help="what guidance leaves out; default: with --edit both, else words")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="ddpm is the paper's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the words; 0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest words up to this probability")
    args = parser.parse_args(argv)
    if args.edit and not args.image:
        raise UserError('--edit needs the picture to change: --image in.png --edit "make the circle blue"')
    if not args.prompts and not args.image:
        raise UserError('say what to draw, e.g. python sample.py "a red circle", or give a picture with --image')
    if args.prompts and args.image:
        raise UserError('--image stands alone or with --edit; to put pictures among words, write "[in.png] make the circle blue"')
    if (args.open and args.image) or (args.pictures != 1 and not args.open):
        raise UserError("--open takes prompts, not --image (write \"[in.png] and words\"), and --pictures belongs to --open")
    if args.film and args.image and not args.edit:
        raise UserError("--film shows a picture being drawn; --image without --edit only describes one")
    if not 0 <= args.seed < 2 ** 32:
        raise UserError(f"--seed must be between 0 and {2 ** 32 - 1}, got {args.seed}")
    if not (0 <= args.guidance < np.inf and 0 <= args.temperature < np.inf and 0 < args.top_p <= 1):
        raise UserError("--guidance and --temperature must be 0 or more, --top-p above 0 and at most 1")
    if not 1 <= args.steps <= 1000 or args.pictures < 1:
        raise UserError(f"--steps must be between 1 and 1000 and --pictures at least 1, got {args.steps} and {args.pictures}")
    written = {end for end, kind in Image.registered_extensions().items() if kind in Image.SAVE}       # some can only be read
    for path, kinds in ((args.out, written), (args.film, written), (args.page, (".html",))):
        if path and (not Path(path).parent.is_dir() or Path(path).suffix.lower() not in kinds):
            raise UserError(f"cannot write {path}: its folder must exist and its name end in "
                                 f"{'.html' if path == args.page else '.png or another picture type'}")
    return args


def main(argv=None, decoder=None):
    """Draw, describe, edit, or let the model decide, as the command line says."""
    args = parse_arguments(argv)
    shipped = ASSETS / ("scenes_edit.pt" if args.edit else "scenes.pt")
    trained, began, frames = load_trained(args.checkpoint or shipped, pick_device()), time.time(), []

    if trained.kind == "llama" or (trained.kind == "chameleon" and (args.edit or args.film or args.trace or args.guide_over)):
        raise UserError(f"{args.checkpoint} is a {trained.kind}: " + ("it knows words only" if trained.kind == "llama" else
                             "--edit, --film, --trace and --guide-over are for Transfusion"))

    def watch(event):
        if event.mode == "noise":
            frames.append(event)
        if args.trace:
            figures.print_event(trained, event)

    writing = dict(decoder=decoder, temperature=args.temperature, top_p=args.top_p, seed=args.seed, watch=watch)
    drawing = dict(steps=args.steps, guidance=args.guidance, over=args.guide_over or ("both" if args.edit else "words"),
                   sampler=args.sampler, progress=True)
    if args.edit:
        documents = [read_prompt(f"[{path}]", trained) for path in args.image]
        trained.tokenizer.encode(" ".join(args.edit))           # an unknown word in the last one: say so before the first is drawn
        for text in args.edit:                          # each edit is a fresh document of one picture, as it was trained
            after = generate(trained, [[parts[-1], text] for parts in documents], draw_now=True, max_words=0, **writing, **drawing)
            documents = [parts + new[1:] for parts, new in zip(documents, after)]
    elif args.image:
        documents = generate(trained, [read_prompt(f"[{path}]", trained) for path in args.image], max_pictures=0, **writing)
    else:
        config, prompts = trained.model.config, [read_prompt(text, trained) for text in args.prompts]
        need = args.pictures * (config.patches + 2) + max(len(data.lay_out(
            [p if isinstance(p, str) else ("image", 0, 0) for p in parts], trained.tokenizer, config.patches).tokens) for parts in prompts)
        if args.open and need > config.context:
            raise UserError(f"{args.pictures} pictures after this prompt need {need} positions, but the model's context "
                                 f"is {config.context}: ask for fewer --pictures or shorten the prompt")
        documents = generate(trained, prompts, draw_now=not args.open, max_words=config.context if args.open else 0,
                             max_pictures=args.pictures, **writing, **drawing)
    for name, parts in zip(args.image or args.prompts, documents):
        print((f"{name}: " if args.image else "") + " ".join(part if isinstance(part, str) else "[picture]" for part in parts))
    if args.page:
        figures.save_page(trained, documents, args.page)
        print(f"wrote {args.page}")
    latents = [part for parts in documents for part in (parts[-1:] if args.edit else parts) if not isinstance(part, str)]
    if args.image and not args.edit:
        return
    if not frames:                                      # nothing was drawn: an answer about the prompt's pictures, or words alone
        return None if latents else print("the model wrote words only; leave out --open to make it draw")
    pictures = decode_latents(trained, torch.stack(latents))
    figures.save_picture(figures.grid(pictures, min(8, len(pictures)), gap=1) if len(pictures) > 1 else pictures[0], args.out)
    print(f"wrote {args.out} ({len(pictures)} pictures, {time.time() - began:.1f} s)")
    if args.film:
        figures.save_film(trained, frames, args.film)
        print(f"wrote {args.film}")


if __name__ == "__main__":
    run_command(main)
