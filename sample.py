"""
sample.py: LM mode <-> diffusion mode                             (Transfusion §3 "Inference")

THE IDEA    Write words one at a time, until the model itself writes BOI. Then put a picture of
            pure noise there and denoise it, all patches at once. Close the finished picture with
            EOI and go on writing. One loop makes text, pictures, and any mixture of them.
A PICTURE   <bos> a red circle -> BOI | ~~~~    t = 1000: pure noise
                                      | ~:::    t = 996: overwrites t = 1000, position by position
                                      | ...
                                      | [##]    t = 0: what follows reads the finished picture
                                      | EOI  -> <eos>, or more words, or the next BOI
THE RULE    out = uncond + w (cond - uncond)                          guidance: §2.2, §4.1
              cond    reads  <bos> a      red    circle <boi> [ x_t ]
              uncond  reads  <bos> <drop> <drop> <drop> <boi> [ x_t ]    as long, same positions
TWICE       write     as the paper says it: one document, and every word and every step reads the
                      whole sequence anew.
            generate  the same for a batch, with a cache: the past is read once, and the patches'
                      keys and values are overwritten at every step. A test holds it to `write`.
IN PYTHON   trained = load_trained("assets/scenes.pt")
            pictures = draw(trained, ["a red circle", "three squares"])     # (2, 32, 32, 3) uint8
SHAPES      B rows (documents), P patches per picture, V vocabulary; latents (c, h, w) float32.
            A document is a list of str and latents. b is the number of a row.
PAPER/HERE  same: both modes, overwriting, BOI chosen by the model, EOI appended, greedy text, 250
            steps; guidance 3 (§4.3) by default.
            our choice: guidance drops the words since the last picture, not earlier ones.
            our choice: an edit (§4.5) may be guided over its words, its picture, or both. The
            unconditional row then reads noise, at t = 1000, in place of the picture.
READ NEXT   evaluate.py        TRY IT  python sample.py "a red circle left of a blue square"
NOTEBOOK    notebooks/6_write_and_draw.ipynb
TEST        tests/test_sample.py, tests/test_sample_batches.py, tests/test_sample_command_line.py
"""
import re
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import data
import diffusion
from data import BOI, BOS, DROP, EOI, EOS, PATCH
from diffusion import guide
from model import Cache
from support.checkpoint import decode_latents, device_of, encode_pixels, load_trained
from support.common import ASSETS, UserError, open_picture, pick_device, run_command

# Of the special tokens only BOI and EOS are predicted. EOI is appended, the others never follow.
NEVER_CHOSEN = [token for token in range(len(data.SPECIAL)) if token not in (BOI, EOS)]


# ------------------------------------------------------------ the algorithm, as the paper says it
@torch.no_grad()
def write(trained, prompt, max_words=64, max_pictures=1, temperature=0.0, top_p=1.0,
          guidance=3.0, steps=250, sampler="ddpm", seed=0):
    """The document that continues the prompt: a list of str and latents (c, h, w).

    LM mode adds tokens, and `if token == BOI` below switches to diffusion mode. One document, no
    cache, no batch: it is slow and says what happens; `generate` is fast, and with seed=[seed] it
    must give the same. Transfusion §3 "Inference".

    trained       checkpoint.Trained
    prompt        list of str (words) and latents (c, h, w) (finished pictures); may be empty
    max_words, max_pictures    when to stop, besides EOS and a full context; beyond the prompt
    temperature, top_p         of the words, see `choose`
    guidance, steps, sampler   of the pictures, see diffusion.py
    seed          of all chance in this document: of its words and of its noise
    Raises UserError for an unknown word, or a prompt longer than the context.
    """
    model = trained.model
    device = device_of(model)
    P = model.config.patches
    x0_max = float(trained.vae.x0_max)
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt_tokens(trained, prompt)             # <bos> a red circle
    finished = [picture.to(device) for picture in pictures_of(prompt)]

    def network(x, t):
        """What the model says about the picture being drawn: x (1, c, h, w), at step t. With
        guidance. `diffusion.sample`, below, calls this for every t."""
        # Paper: §3, x_{t-1} overwrites x_t. Here: x stands at the same PATCH tokens at every step.
        pictures = [*finished, x[0]]
        _, cond = read_all(model, tokens, pictures, t)                          # (M, c, h, w)
        if guidance == 1:
            return cond[-1:]
        _, uncond = read_all(model, drop_caption(tokens), pictures, t)
        return guide(cond[-1:], uncond[-1:], guidance)                          # (1, c, h, w)

    while max_words > 0 and len(tokens) < model.config.context:
        # LM mode: one more token, after all that stands there.
        logits, _ = read_all(model, tokens, finished)                           # (n, V)
        token = choose(logits[-1:], temperature=temperature, top_p=top_p, generators=[generator])
        token = token.item()
        tokens.append(token)
        if token == EOS:
            break
        if token == BOI:
            has_room = len(tokens) + P + 1 <= model.config.context      # for patches and EOI
            if max_pictures == 0 or not has_room:
                break                                   # BOI stays last: nothing follows it
            # Diffusion mode: P patches of pure noise, and denoise them where they stand.
            noise = torch.randn(1, *model.config.latent, generator=generator)   # (1, c, h, w)
            tokens += [PATCH] * P
            drawing = list(diffusion.sample(network, noise.to(device), trained.diffusion, steps,
                                            sampler, [generator], x0_max))
            _, x, _ = drawing[-1]                       # (t, x_t, x0 estimate) at t = 0
            finished.append(x[0])                       # from now on it is read at t = 0
            max_pictures -= 1
            # Paper: §3, EOI is appended, not predicted. Then back to LM mode.
            tokens.append(EOI)
        else:
            max_words -= 1
    return to_document(tokens, finished, trained.tokenizer)


# What `write` calls, in the order in which it does.
def prompt_tokens(trained, prompt, draw_now=False):
    """List of the ids of a prompt, BOS first, open at the end.

    prompt: list of str and latents. draw_now, for Decoder: a picture follows, BOI ends the list.
    Raises UserError for an unknown word, or if the prompt (and that picture) has no room."""
    check_list(prompt, 'each prompt is a list of words and pictures: [["a red circle"]]')
    config = trained.model.config
    parts = []
    for part in prompt:
        # The zeros are for training: which picture of the data, and its largest t.
        parts.append(part if isinstance(part, str) else ("image", 0, 0))
    # TRAP: a layout of its own would drift away from the one in training, with BOI twice, say. So
    # this is the same function (docs/PAPER.md §4.2).
    tokens = data.lay_out(parts, trained.tokenizer, config.patches, ends=False).tokens
    need = len(tokens)
    if draw_now:
        tokens.append(BOI)
        need += 1 + config.patches + 1                  # BOI, the patches, EOI
    check_fits(tokens, need, config.context)
    return tokens


def pictures_of(document):
    """The latents in a document, in order."""
    return [part for part in document if not isinstance(part, str)]


def read_all(model, tokens, pictures, t=0):
    """(logits (n, V), outputs (M, c, h, w)): one training forward over a whole document.

    tokens      list of n ids
    pictures    list of M latents; all are finished, t = 0, but the last one, which is at step t"""
    device = device_of(model)
    tokens = torch.tensor([tokens], device=device)                              # (1, n)
    same_document = torch.zeros_like(tokens)                                    # (1, n)
    # The model's has_loss says where logits are wanted. Here: everywhere.
    everywhere = torch.ones_like(tokens, dtype=torch.bool)                      # (1, n)
    # TRAP: only the picture being drawn is noisy. A finished one has t = 0, not some t as in
    # training: the model would take clean patches for noisy ones (docs/PAPER.md §4.7).
    times = torch.zeros(len(pictures), dtype=torch.long, device=device)         # (M,)
    times[-1:] = t                                      # a slice: there may be no picture
    latents = stack(pictures, model.config.latent).to(device)                   # (M, c, h, w)
    logits, out = model(tokens, image_ids(tokens), same_document, everywhere, latents, times)
    return logits, out.float()


def image_ids(tokens):
    """(B, n) int64: which picture a position is a patch of, counted over all rows; -1 for words.
    tokens: (B, n) int64. Two pictures are never neighbours: EOI and BOI stand between them."""
    patch = tokens == PATCH                                                     # (B, n)
    first = patch.clone()
    first[:, 1:] &= ~patch[:, :-1]                      # a patch after no patch opens a picture
    number = first.flatten().cumsum(0).view(tokens.shape) - 1
    return torch.where(patch, number, -1)


def stack(pictures, latent):
    """(M, c, h, w) of a list of M latents; latent: their shape, for M = 0."""
    return torch.stack(pictures) if pictures else torch.zeros(0, *latent)


def choose(logits, temperature=0.0, top_p=1.0, generators=None):
    """The next token of each row: (B,) int64.

    logits        (B, V)
    temperature   0 is greedy, as in the paper (App. B.1)
    top_p         keep the likeliest words, until their probabilities add up to top_p
    generators    None, or one per row: a row's words must not depend on its neighbours
    """
    logits = logits.float().clone()
    logits[:, NEVER_CHOSEN] = -torch.inf
    if temperature == 0:
        return logits.argmax(-1)                        # Paper: App. B.1, greedy
    p = (logits / temperature).softmax(-1)                                      # (B, V)
    p, order = p.sort(descending=True)                                          # (B, V) each
    likelier = p.cumsum(-1) - p                         # of all that are likelier, together
    p = p.masked_fill(likelier >= top_p, 0).cpu()       # so the word that crosses top_p is kept
    ranks = []                                          # 0 is the likeliest word
    for b, row in enumerate(p):
        generator = generators[b] if generators else None
        ranks.append(torch.multinomial(row, 1, generator=generator))
    ranks = torch.stack(ranks).to(order.device)                                 # (B, 1)
    return order.gather(1, ranks)[:, 0]


def drop_caption(tokens):
    """The tokens as the unconditional branch of guidance reads them: each word since the last
    finished picture, or since BOS, becomes <drop>. What follows the last BOI is being drawn."""
    boi = max(k for k, token in enumerate(tokens) if token == BOI)
    start = caption_start(tokens[:boi])
    # TRAP: BOI stays, and so does the length. In training a dropped caption is as long as the
    # caption was: the model has never seen a shorter row (docs/PAPER.md §4.8).
    dropped = [DROP] * (boi - start)
    return tokens[:start] + dropped + tokens[boi:]


def caption_start(tokens):
    """Where the words since the last finished picture begin: after the last EOI, or after BOS."""
    # Our choice: these are what guidance drops. Earlier words belong to earlier pictures.
    return 1 + max(k for k, token in enumerate(tokens) if token in (BOS, EOI))


def to_document(tokens, pictures, tokenizer):
    """List of str and latents: what the tokens say, with the pictures in it. The inverse of
    data.lay_out."""
    document = []
    words = []
    remaining = iter(pictures)
    for token in [*tokens, EOS]:                        # EOS: a document may end without it
        if token >= len(data.SPECIAL):
            words.append(token)
        elif token in (BOI, EOS) and words:             # the end of these words
            document.append(tokenizer.decode(words))
            words = []
        elif token == EOI:                              # the end of a picture
            document.append(next(remaining).cpu())
    return document


def check_list(value, sentence):
    """Raise UserError with the sentence for a text: Python would take it for a list of letters."""
    if isinstance(value, str):
        raise UserError(f"{sentence}, got the text {value!r}")


def check_fits(tokens, need, context):
    """Raise UserError if a prompt of these tokens needs more positions than the context has."""
    if need <= context:
        return
    # BOS, BOI, EOI and patches are not the user's to leave out: count words alone.
    words = sum(token >= len(data.SPECIAL) for token in tokens)
    fit = words - (need - context)                      # so many have room
    what = "its words" if PATCH in tokens else "it"
    advice = f"shorten {what} to {fit} tokens"
    if fit < 0:
        advice = "it has no room for these pictures"
    raise UserError(f"the prompt needs {need} positions, but this model's context is {context}: "
                    f"{advice}")


# ------------------------------------------------------------------- the same, fast: with a cache
# `write` reads the whole sequence for every word and every step. But nobody looks ahead, so what
# stands there never changes: its keys and values need computing once. They are the cache. What is
# left is one position for a word, and the P positions of the picture for a step.
GUIDE_OVER = ("words", "picture", "both")               # what guidance leaves out


class Decoder:
    """B documents under construction, and one cache. The two modes are `lm_step` and
    `diffusion_steps`; `grow` switches between them.

    tokens     B lists of ids; the patches of a picture are PATCH
    latents    B lists of finished pictures (c, h, w)
    cache      keys and values of all that stands in `tokens`
    logits     (B, V): what each row says comes next
    """

    def __init__(self, trained, prompts, draw_now=False, room=None):
        """prompts    list of B documents, each a list of str and latents
        draw_now   append BOI, so that the next thing is a picture
        room       how many positions follow the longest prompt, at most; None: the whole context
                   (64 rows of 4096 at 7B would be 275 GB of keys and values)
        Raises UserError as `prompt_tokens`."""
        self.trained = trained
        self.device = device_of(trained.model)
        # Rows may have any length: position k of a row is in slot k of its cache.
        self.tokens = [prompt_tokens(trained, prompt, draw_now) for prompt in prompts]
        self.latents = [pictures_of(prompt) for prompt in prompts]
        config = trained.model.config
        size = config.context
        if room is not None:
            longest = max(len(row) for row in self.tokens)
            size = min(size, longest + room)
        self.cache = Cache(config, len(prompts), size, trained.model.embedding.weight)
        # The whole prompts at once: words, and pictures at t = 0.
        pos = [list(range(len(row))) for row in self.tokens]
        self.logits = self.read(pos, self.tokens, self.latents, self.cache)

    @torch.no_grad()
    def read(self, pos, tokens, pictures, cache, t=0):
        """Read a stretch of each row into the cache; return the logits (B, V) after its last token.

        pos, tokens    B lists of positions, and of the ids that stand there
        pictures       B lists of the pictures in these stretches, which are at step t
        """
        model = self.trained.model
        # Rows differ in length. A short one repeats its last token, at the same position: that
        # writes the same keys and values once more and changes nothing.
        tokens = repeat_last(tokens).to(self.device)                            # (B, n)
        pos = repeat_last(pos).to(self.device)                                  # (B, n)
        in_order = []                                   # as they stand in the rows, row after row
        for row in pictures:
            in_order.extend(row)
        latents = stack(in_order, model.config.latent).to(self.device)          # (M, c, h, w)
        logits = model.read(tokens, image_ids(tokens), latents, pos, cache, t)  # (B, n, V)
        return logits[:, -1]                                                    # (B, V)

    def advance(self):
        """Read the last token of every row. A row that got no new one reads it again, at the same
        position: nothing changes."""
        pos = [[len(row) - 1] for row in self.tokens]
        last = [[row[-1]] for row in self.tokens]
        no_pictures = [[] for _ in self.tokens]
        self.logits = self.read(pos, last, no_pictures, self.cache)

    # ---------------------------------------------------------------------------------- LM mode
    def lm_step(self, active, generators=None, **choice):
        """One more token for each row in `active`, a list of row numbers; returns them as a list.
        generators: None, or one for every row of the batch. choice: as `choose`."""
        # Only generators of active rows advance. Otherwise the noise of a row that waits for its
        # picture would depend on its batch.
        if generators is not None:
            generators = [generators[b] for b in active]
        chosen = choose(self.logits[active], generators=generators, **choice).tolist()
        for b, token in zip(active, chosen):
            self.tokens[b].append(token)
        self.advance()
        return chosen

    # --------------------------------------------------------------------------- diffusion mode
    def unconditional(self, rows, over, noise, cache):
        """Make of a copied cache what the unconditional branch of guidance looks at: the same
        positions, BOI included, without what is left out. Returns the logits (rows, V) after BOI.

        rows     row numbers; their last token is BOI
        over     what is left out. "words": those since the last picture, each is <drop>. "picture":
                 that picture; noise stands there, at t = T. "both".
        noise    (rows, c, h, w), where the new pictures begin
        cache    a copy of these rows of the cache; what is left out is overwritten there
        Raises UserError if a picture is to be left out and there is none.
        """
        length = self.trained.model.config.patches + 2      # of a picture, with BOI and EOI
        pos = []
        tokens = []
        pictures = []
        for b, own in zip(rows, noise):
            row = self.tokens[b]
            start = caption_start(row)
            seen = row[start:]                          # the caption, and BOI
            if over in ("words", "both"):
                # TRAP: BOI is not dropped with the words (docs/PAPER.md §4.8).
                seen = [DROP] * (len(seen) - 1) + [BOI]
            if over in ("picture", "both"):
                # Our choice: there is no <drop> for patches, so noise takes the picture's place.
                check_follows_picture(row, start, over)
                seen = row[start - length: start] + seen
                start -= length                         # the picture is read again, as noise
                other = own.roll((1, 1), (1, 2))        # any noise but the new picture's own
                pictures.append([other.cpu()])
            else:
                pictures.append([])
            pos.append(list(range(start, len(row))))
            tokens.append(seen)
        # What stands before `start` is right already.
        return self.read(pos, tokens, pictures, cache, t=self.trained.diffusion.T)

    @torch.no_grad()
    def diffusion_steps(self, rows, noise, guidance=3.0, generator=None, over="words", **options):
        """Yields (t, x_t, x0 estimate), from T to 0: the next picture of each row. After the last
        one the pictures and EOI stand in the sequences and in the cache.

        rows         list of row numbers; their last token is BOI
        noise        (rows, c, h, w)
        guidance     w; 1 is the plain model and takes half the time
        generator    None, a torch.Generator, or a list with one per row: of ddpm's fresh noise
        over         what guidance leaves out, see `unconditional`
        options      steps, sampler: see diffusion.sample
        """
        model = self.trained.model
        P = model.config.patches
        n = len(rows)

        # 1. Where the patches go: the P positions after each row's BOI.
        starts = torch.tensor([len(self.tokens[b]) for b in rows])              # (n,)
        pos = starts[:, None] + torch.arange(P)                                 # (n, P)
        pos = pos.to(self.device)

        # 2. What they look at: a copy of the rows. Guidance needs a second one without the caption,
        #    in the same batch. The halves share memory with the whole.
        copies = 1 if guidance == 1 else 2
        cache = self.cache.rows(rows * copies)
        with_caption = cache.rows(slice(0, n))
        without_caption = cache.rows(slice(n, None))
        if guidance != 1:
            self.unconditional(rows, over, noise, without_caption)
        slots = pos.repeat(copies, 1)                                           # (copies n, P)

        def network(x, t):
            """The model's output for x (n, c, h, w) at step t, with guidance."""
            x = torch.cat([x] * copies)                 # (copies n, c, h, w)
            times = torch.full((len(x),), t, device=self.device)
            # Paper: §3, x_{t-1} overwrites x_t. Its keys and values go to the same slots.
            out = model.denoise(x, times, slots, cache).float()
            if guidance == 1:
                return out
            return guide(out[:n], out[n:], guidance)                            # (n, c, h, w)

        # 3. From noise to picture.
        x0_max = float(self.trained.vae.x0_max)
        denoising = diffusion.sample(network, noise.to(self.device), self.trained.diffusion,
                                     generator=generator, x0_max=x0_max, **options)
        for t, x, x0 in denoising:
            yield t, x, x0
        picture = x                                     # the last one

        # 4. One more forward, which puts the finished picture into the cache.
        # TRAP: without it the cache holds the keys of the last *noisy* step, and the words that
        # follow would describe that one (docs/PAPER.md §4.7).
        t = torch.zeros(n, dtype=torch.long, device=self.device)
        model.denoise(picture, t, pos, with_caption)
        self.cache.overwrite(rows, with_caption)

        # 5. The sequences get the picture and EOI. Then every row's logits say what follows.
        for b, own in zip(rows, picture):
            self.latents[b].append(own.cpu())
            self.tokens[b] += [PATCH] * P + [EOI]
        self.advance()

    def document(self, b):
        """Row b as a list of str and latents, in order."""
        return to_document(self.tokens[b], self.latents[b], self.trained.tokenizer)

    def events_per_picture(self, steps):
        """How many Events of mode "noise" a picture takes: one for each step, and the last x."""
        return steps + 1


def repeat_last(rows):
    """(B, n) int64 of B lists of int: each short one is filled up with its last number."""
    n = max(len(row) for row in rows)
    filled = []
    for row in rows:
        missing = n - len(row)
        filled.append(row + [row[-1]] * missing)
    return torch.tensor(filled)


def check_follows_picture(row, start, over):
    """Raise UserError if no picture stands right before position `start` of a row of ids."""
    if row[start - 1] != EOI:
        raise UserError(f"guidance over the {over} needs a picture before the words: "
                        "leave --guide-over out")


# ----------------------------------------- switching between the modes: `grow` is `write`'s loop
class Row:
    """One document while it grows: its number, its own random numbers, and what it may still do."""

    def __init__(self, decoder, b, seed, max_words, max_pictures):
        self.b = b
        self.tokens = decoder.tokens[b]                 # the decoder's list itself: it grows
        self.config = decoder.trained.model.config
        self.generator = torch.Generator().manual_seed(seed)
        self.words_left = max_words                     # BOI, EOI and EOS are not words
        self.pictures_left = max_pictures               # those of the prompt do not count

    def may_write(self):
        """Whether one more token is allowed, and has room."""
        return self.words_left > 0 and len(self.tokens) < self.config.context

    def may_draw(self):
        """Whether a picture is allowed after this BOI, and has room with its EOI."""
        need = self.config.patches + 1
        has_room = len(self.tokens) + need <= self.config.context
        return self.pictures_left > 0 and has_room


@dataclass
class Event:
    """One thing that happens while documents grow. A film, a trace or a notebook watches these.

    mode    "prompt": read into the cache. "word": LM mode, one more token for each row.
            "noise": diffusion mode, one step. "picture": it is finished, and EOI is appended."""
    mode: str
    rows: list                                          # row numbers
    filled: list                                        # positions that each has in the cache now
    tokens: list = None                                 # "word": the new ids
    t: int = None                                       # "noise": from T to 0
    x: torch.Tensor = None                              # "noise": x_t, (rows, c, h, w)
    x0: torch.Tensor = None                             # "noise": the estimate of x0


def grow(decoder, seeds, draw_now=False, max_words=64, max_pictures=1, temperature=0.0, top_p=1.0,
         **diffusing):
    """Yields Events: the algorithm of `write`, for a batch. Each row is in a mode of its own.
    Rows that wait for a picture are denoised together, once no row is writing: this changes the
    time and nothing else.

    seeds: one int per row. draw_now: every row waits for a picture, as the decoder was told.
    The other arguments: see `generate`, which runs this to its end."""
    rows = []
    for b, seed in enumerate(seeds):
        rows.append(Row(decoder, b, seed, max_words, max_pictures))
    generators = [row.generator for row in rows]

    def event(mode, rows, **fields):
        numbers = [row.b for row in rows]
        filled = [len(row.tokens) for row in rows]
        return Event(mode, numbers, filled, **fields)

    yield event("prompt", rows)
    writing = []                                        # rows in LM mode
    waiting = []                                        # rows whose last token is BOI
    if draw_now:
        waiting = rows
    else:
        writing = [row for row in rows if row.may_write()]
    # A row that is in neither list is finished: EOS, a limit, or a full context.

    while writing or waiting:
        if writing:
            # LM mode: one more token for every row that writes.
            numbers = [row.b for row in writing]
            tokens = decoder.lm_step(numbers, generators=generators, temperature=temperature,
                                     top_p=top_p)
            yield event("word", writing, tokens=tokens)
            still_writing = []
            for row, token in zip(writing, tokens):
                if token == BOI:
                    if row.may_draw():                  # else BOI is its last token
                        waiting.append(row)             # LM mode -> diffusion mode
                elif token != EOS:                      # a word
                    row.words_left -= 1
                    if row.may_write():
                        still_writing.append(row)
            writing = still_writing
        else:
            # Diffusion mode: one picture for every row that waits, all at once. Noise drawn for the
            # batch as a whole would make a picture depend on its neighbours, so each row has a
            # generator of its own.
            numbers = [row.b for row in waiting]
            own = [row.generator for row in waiting]
            latent = decoder.trained.model.config.latent
            noise = torch.stack([torch.randn(latent, generator=generator) for generator in own])
            for t, x, x0 in decoder.diffusion_steps(numbers, noise, generator=own, **diffusing):
                yield event("noise", waiting, t=t, x=x, x0=x0)
            yield event("picture", waiting)
            for row in waiting:
                row.pictures_left -= 1
                if row.may_write():
                    writing.append(row)                 # diffusion mode -> LM mode
            waiting = []


def generate(trained, prompts, draw_now=False, max_words=64, max_pictures=1, seed=0, first=0,
             progress=False, watch=None, decoder=Decoder, **options):
    """Documents that continue the prompts: B lists of str and latents. Transfusion §3 "Inference".

    prompts       B lists of str and latents (c, h, w)
    draw_now      the next thing is a picture, whatever the model would say
    max_words, max_pictures    when to stop, besides EOS and a full context; beyond the prompt
    seed          an int, or one per row
    first         the number of the first row, where these are a part of a longer list
    progress      show a bar for each picture
    watch         called with every Event
    decoder       the class that reads and draws: Decoder, or a rival's (chameleon.Decoder)
    options       temperature, top_p, steps, sampler, guidance, over
    """
    if len(prompts) == 0:
        return []
    # The cache has room for what may come, and not for the whole context: words, pictures with BOI
    # and EOI, and one token that ends the document, which is EOS or a BOI too many.
    pictures = max(1, max_pictures) if draw_now else max_pictures
    room = max_words + pictures * (trained.model.config.patches + 2) + 1
    growing = decoder(trained, prompts, draw_now, room=room)
    seeds = seed
    if not isinstance(seed, list):
        # Row k of a seed has the same number in every batch, and in no other seed's.
        seeds = [seed * 100003 + first + b for b in range(len(prompts))]
    total = growing.events_per_picture(options.get("steps", 250))
    # `grow` does the work; here it is watched, to its end.
    bar = tqdm(total=total, desc="drawing", disable=not progress, leave=False)
    for event in grow(growing, seeds, draw_now, max_words, max_pictures, **options):
        if event.mode == "noise":
            bar.update()
        elif event.mode == "picture":                   # there may be a next one
            bar.reset()
        if watch:
            watch(event)
    bar.close()
    return [growing.document(b) for b in range(len(prompts))]


# --------------------------------------------------------------------------- what it is used for
def draw(trained, captions, **options):
    """(M, h, w, 3) uint8: one picture per caption. options: as `generate`, without the limits."""
    check_list(captions, 'captions is a list: ["a red circle"]')
    prompts = [[caption] for caption in captions]
    # No word is written: the caption, BOI, one picture, EOI.
    documents = generate(trained, prompts, draw_now=True, max_words=0, **options)
    pictures = [document[-1] for document in documents]
    return decode_latents(trained, stack(pictures, trained.model.config.latent))


def edit(trained, latents, instructions, over="both", **options):
    """Latents (M, c, h, w) of the edited pictures: Transfusion §4.5.

    latents: (M, c, h, w) before; instructions: M strings; over: what guidance leaves out, see
    `Decoder.unconditional` (docs/RESULTS.md says what each gives); options: as `draw`."""
    # Paper: §4.5, fine-tuned on (picture, instruction, edited picture): a document of these three.
    check_list(instructions, 'instructions is a list: ["remove the circle"]')
    prompts = []
    for before, text in zip(latents, instructions):
        prompts.append([before, text])
    documents = generate(trained, prompts, draw_now=True, max_words=0, over=over, **options)
    return stack([document[-1] for document in documents], trained.model.config.latent)


def describe(trained, latents, **options):
    """Captions of pictures, list of M str. latents: (M, c, h, w), read at t = 0. options: as
    `generate`: temperature, top_p, seed."""
    prompts = [[picture] for picture in latents]
    # EOS ends a caption, and so does BOI: another picture would not belong to it.
    documents = generate(trained, prompts, max_pictures=0, **options)
    captions = []
    for document in documents:
        words = [part for part in document if isinstance(part, str)]
        captions.append(" ".join(words))
    return captions


# --------------------------------------------------------------------------------- command line
def read_picture(path, trained):
    """The latents (c, h, w) of an image file. Says so when the picture had to be converted.
    Raises UserError if the file cannot be read."""
    size = trained.model.config.latent[1] * trained.vae.f       # pixels on a side
    pixels = open_picture(path, size, say=True)
    return encode_pixels(trained, pixels[None])[0]


def read_prompt(text, trained):
    """A prompt as `generate` takes it: words, and pictures where a file stands in brackets, as in
    "[a.png] make the circle blue". Raises UserError if a file cannot be read."""
    prompt = []
    # A name may have brackets of its own, in pairs: [photo[1].png].
    for k, part in enumerate(re.split(r"\[((?:[^][]|\[[^][]*\])*)\]", text)):
        if k % 2 == 1:                                  # what stood in brackets
            prompt.append(read_picture(part, trained))
        elif part.strip():
            prompt.append(part.strip())
    return prompt


def check_model(args, trained, path, decoder):
    """Raise UserError if this model cannot do what the command line says, or not in this program.
    path: where the model comes from."""
    # That there are rivals is all that this file knows of them.
    if trained.kind == "llama":
        raise UserError(f"{path} is a llama: it knows words only")
    if trained.kind == "chameleon" and decoder is Decoder:
        raise UserError(f'{path} is a chameleon: python chameleon.py "..." --checkpoint {path}')
    if trained.kind == "transfusion" and decoder is not Decoder:
        raise UserError(f'{path} is a transfusion: python sample.py "..." --checkpoint {path}, or '
                        f"name a Chameleon's model.pt with --checkpoint")
    if trained.kind == "chameleon" and (args.edit or args.film or args.trace or args.guide_over):
        raise UserError(f"{path} is a chameleon: --edit, --film, --trace and --guide-over are for "
                        "Transfusion")


def check_room(trained, prompts, pictures):
    """Raise UserError if so many pictures do not fit after the longest prompt."""
    config = trained.model.config
    longest = max(len(prompt_tokens(trained, prompt)) for prompt in prompts)
    need = longest + pictures * (config.patches + 2) + 1                # and EOS
    if need > config.context:
        raise UserError(f"{pictures} pictures after this prompt need {need} positions, but the "
                        f"model's context is {config.context}: ask for fewer --pictures or "
                        "shorten the prompt")


def edit_in_turn(trained, pictures, instructions, **options):
    """Documents [picture, instruction, picture, instruction, picture, ...], one for each of the
    pictures: each instruction changes what the one before it has left."""
    for text in instructions:                           # all mistakes, before the first is drawn
        prompt_tokens(trained, [pictures[0], text], draw_now=True)
    documents = [[picture] for picture in pictures]
    for text in instructions:
        # Each edit is a fresh document with one picture, as in training.
        prompts = [[document[-1], text] for document in documents]
        edited = generate(trained, prompts, draw_now=True, max_words=0, **options)
        for document, (_, *new) in zip(documents, edited):
            document += new
    return documents


def run_task(args, trained, watch, decoder):
    """The documents that the command line asks for. watch, decoder: see `generate`."""
    writing = {"decoder": decoder, "watch": watch, "seed": args.seed,
               "temperature": args.temperature, "top_p": args.top_p}
    drawing = {"steps": args.steps, "sampler": args.sampler, "guidance": args.guidance,
               "over": args.guide_over or ("both" if args.edit else "words"), "progress": True}
    # Pictures are given: change them, or describe them.
    if args.image:
        pictures = [read_picture(path, trained) for path in args.image]
        if args.edit:                                   # Paper: §4.5
            return edit_in_turn(trained, pictures, args.edit, **writing, **drawing)
        prompts = [[picture] for picture in pictures]
        return generate(trained, prompts, max_pictures=0, **writing)
    # Words are given, perhaps with pictures among them: the model decides when to draw, or it is
    # told to draw at once.
    prompts = [read_prompt(text, trained) for text in args.prompts]
    if args.open:
        check_room(trained, prompts, args.pictures)
        return generate(trained, prompts, max_words=trained.model.config.context,
                        max_pictures=args.pictures, **writing, **drawing)
    return generate(trained, prompts, draw_now=True, max_words=0, **writing, **drawing)


def main(argv=None, decoder=Decoder):
    """Draw, describe, edit, or let the model decide, as the command line says. decoder: the class
    that reads and draws; chameleon.py calls this with its own."""
    # For those who write pictures, not for those who import `draw`.
    from support import figures, sample_options
    # 1. What is asked for, and of which model.
    args = sample_options.parse_arguments(argv, GUIDE_OVER)
    path = args.checkpoint or ASSETS / ("scenes_edit.pt" if args.edit else "scenes.pt")
    trained = load_trained(path, pick_device())
    check_model(args, trained, path, decoder)           # before minutes of drawing

    # 2. Words and pictures.
    began = time.time()
    steps = []                                          # Events of the denoising, for the film

    def watch(event):
        if event.mode == "noise":
            steps.append(event)
        if args.trace:
            figures.print_event(trained, event)

    documents = run_task(args, trained, watch, decoder)

    # 3. Save first, print after: whatever goes wrong with the words, the picture is there.
    lines = []
    for k, document in enumerate(documents):
        words = [part if isinstance(part, str) else "[picture]" for part in document]
        line = " ".join(words)
        if args.image:
            line = f"{args.image[k]}: {line}"
        lines.append(line)
    latents = []
    for document in documents:
        # Of an edit the last picture is shown, otherwise all, those of the prompt included.
        latents += document[-1:] if args.edit else pictures_of(document)
    if steps:                                           # else nothing was drawn
        pictures = decode_latents(trained, torch.stack(latents))
        sheet = pictures[0]
        if len(pictures) > 1:
            sheet = figures.grid(pictures, columns=min(8, len(pictures)), gap=1)
        out = args.out or sample_options.free_name()
        figures.save_picture(sheet, out)
        how_many = "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
        lines.append(f"wrote {out} ({how_many}, {time.time() - began:.1f} s)")
        if args.film:
            figures.save_film(trained, steps, args.film)
            lines.append(f"wrote {args.film}")
    elif not latents:
        lines.append("the model wrote words only; leave out --open to make it draw")
    for line in lines:
        print(line)


if __name__ == "__main__":
    run_command(main)
