"""
rewards.py: after "Right.", a picture drawn with the student's own function

THE IDEA    The function takes the place of the module's, and the shipped model draws with it: eight
            captions, eight pictures, a few steps. A parser reads the pictures and counts those that
            are as asked. It is a reward and no check: the right function draws eight of eight, but
            so do some wrong ones.
A PICTURE   guide      sample.guide         -> the student's,  then sample.draw
            losses     the last layer is emptied and trained again by the student's losses
            quantise   pictures become codes and pictures again, no transformer
SHAPES      pictures (8, 32, 32, 3) uint8
READ NEXT   ../sample.py        TEST  ../tests/test_exercises.py
"""
import contextlib
import functools
import io
import time
from unittest import mock

import numpy as np
import torch

import data
import diffusion
import model
import patchify
import sample
from diffusion import Diffusion, ddim_step, guide, respace
from exercises.trial import chance_restored, shorten
from sources import scenes
from support.checkpoint import decode_latents, encode_pixels, load_trained, load_vae
from support.common import ASSETS
from vae import to_float, to_pixels

CAPTIONS = (
    "a red circle left of a blue square", "a green cross above a pink circle", "three crosses",
    "a white square and a cyan triangle", "a cyan circle right of a red triangle", "four squares",
    "a blue cross below a white circle", "a yellow circle and a red square",
)
STEPS = 15                                              # enough for dpm++
GUIDANCE = 3.0


def draw(name, answer, folder):
    """Draw with an answer that is right. Returns (a sentence, the path of the picture file); the
    path is None if it could not be drawn with.

    name      one of checks.EXERCISES
    answer    the student's function
    folder    a Path: where the picture goes; made if it is not there"""
    from support import figures  # matplotlib: a second that checks need not
    began = time.time()
    quiet = contextlib.redirect_stdout(io.StringIO())   # the function may still print
    try:
        with chance_restored(), quiet:
            torch.manual_seed(0)
            pictures = DRAW_WITH[name](answer)
    except Exception as problem:
        return (f"But the shipped model cannot draw with it ({type(problem).__name__}: "
                f"{shorten(problem)})."), None
    samples = []
    for caption, picture in zip(CAPTIONS, pictures):
        is_right = scenes.holds(scenes.read_caption(caption), scenes.parse(picture))
        samples.append((caption, picture, is_right))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figures.plot_samples(samples, path, columns=4)
    count = sum(is_right for _, _, is_right in samples)
    return (f"Your `{name}` {WHAT[name]}: {count} of {len(samples)} as asked, in "
            f"{time.time() - began:.1f} s: {path}"), path


def show(path):
    """Show a picture file under a notebook's cell. Elsewhere, nothing: its path was printed."""
    try:
        from IPython import display, get_ipython
    except ImportError:
        return
    if get_ipython() is not None:
        display.display(display.Image(str(path)))


@functools.cache
def shipped():
    """The shipped checkpoint.Trained."""
    return load_trained(ASSETS / "scenes.pt")


def draw_all(sampler="dpm++", steps=STEPS, trained=None):
    """One picture for each of CAPTIONS, by sample.draw."""
    return sample.draw(trained or shipped(), list(CAPTIONS), steps=steps, sampler=sampler,
                       guidance=GUIDANCE)


# ------------------------------------------------------------------------ one way for each exercise
def with_intervals(answer):
    """Every mask of every forward is made from the student's intervals."""
    # Without the cache, which makes its masks itself.
    with mock.patch.object(model, "intervals", answer):
        # The model itself says BOI after each of these captions: none of them could go on.
        latents = []
        for k, caption in enumerate(CAPTIONS):
            *_, picture = sample.write(shipped(), [caption], seed=k, steps=STEPS, sampler="dpm++",
                                       guidance=GUIDANCE)
            latents.append(picture)
    return decode_latents(shipped(), torch.stack(latents))


def with_patchify(answer):
    """The noisy picture is cut by the student's function before the transformer reads it."""
    with mock.patch.object(patchify, "patchify", answer):
        return draw_all()


def with_cosine_alpha_bar(answer):
    """The path from noise to picture is the student's schedule."""
    # The shipped model has learned flow's noise levels. Each level of the cosine schedule is one of
    # them, times a number: x / (a + s), where flow's share of noise is s / (a + s).
    trained = shipped()
    learned = trained.diffusion
    path = Diffusion("ddpm")
    alpha_bar = answer(1000)
    path.a = alpha_bar.sqrt()
    path.s = (1 - alpha_bar).sqrt()
    latents = []
    for caption in CAPTIONS:
        # The row of one document, with places for its picture: no cache, as in sample.write.
        tokens = sample.prompt_tokens(trained, [caption], draw_now=True)
        tokens += [data.PATCH] * trained.model.config.patches

        def network(x, t, tokens=tokens):
            """The noise in x (1, c, h, w) at step t of the student's schedule."""
            a, s = path.at(t, x)
            share = (s / (a + s)).item()
            step = int((learned.s - share).abs().argmin())
            xt = x / (a + s)                            # as flow mixes it
            out = ask(tokens, [xt[0]], step)
            _, eps = learned.x0_and_eps(xt, out, step, float(trained.vae.x0_max))
            return eps

        noise = torch.randn(1, *trained.model.config.latent)
        *_, (_, x, _) = diffusion.sample(network, noise, path, STEPS, "dpm++",
                                         x0_max=float(trained.vae.x0_max))
        latents.append(x[0])
    return decode_latents(trained, torch.stack(latents))


def with_ancestral_step(answer):
    """Each of 50 steps is the student's."""
    with mock.patch.object(diffusion, "ancestral_step", answer):
        return draw_all("ddpm", steps=50)


def with_guide(answer):
    """At each step the student's function says where to go."""
    with mock.patch.object(sample, "guide", answer):
        return draw_all()


def with_losses(answer):
    """The last layer forgets all it knows, and learns it again from the student's losses."""
    trained = load_trained(ASSETS / "scenes.pt")        # a copy of its own, to be damaged
    layer = trained.model.patch_encoder.out
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    # One layer in a few seconds: all the others still know what they knew.
    trained.model.requires_grad_(False)
    layer.requires_grad_(True)

    pairs = scenes.load_scenes(200, seed=1, progress=False)
    latents = encode_pixels(trained, pairs.pixels)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    steps = 50
    for step in range(steps):
        batch = draw_batch(trained, pairs, latents, size=8)
        lm, words, each = answer(trained.model, batch, trained.diffusion)
        loss = model.transfusion_loss(lm, words, each.sum(), len(each))
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return draw_all(trained=trained)


def draw_batch(trained, pairs, latents, size):
    """A data.Batch of captions and their noisy pictures, as train.py makes it."""
    chosen = torch.randint(len(latents), (size,)).tolist()
    patches = trained.model.config.patches
    sequences = []
    for k in chosen:
        document = [pairs.captions[k], ("image", k, trained.diffusion.T)]
        sequences.append(data.lay_out(document, trained.tokenizer, patches))
    batch = data.pack(sequences, trained.model.config.context)
    batch.latents = latents[batch.images]
    batch.t = torch.randint(1, trained.diffusion.T + 1, (size,))
    batch.eps = torch.randn(batch.latents.shape)
    return batch


@torch.no_grad()
def with_quantise(answer):
    """Pictures become codes by the student's function, and are drawn back from them."""
    vae = load_vae(ASSETS / "scenes_vq.pt", "vqvae")
    rng = np.random.default_rng(0)
    pixels = []
    for caption in CAPTIONS:
        pixels.append(scenes.render(scenes.draw_scene(scenes.read_caption(caption), rng)))
    e = vae.run_encoder(to_float(np.stack(pixels)))
    vectors, _, _ = answer(e, vae.quantiser.codebook.detach(), 0.25)
    return to_pixels(vae.decoder(vectors))


def with_lay_out(answer):
    """Each prompt is laid out by the student's function."""
    with mock.patch.object(data, "lay_out", answer):
        return draw_all()


class Shipped:
    """The shipped model, as writing.write asks it: with a caption, and with guidance."""

    def __init__(self):
        trained = shipped()
        self.diffusion = trained.diffusion
        self.x0_max = float(trained.vae.x0_max)
        self.times = respace(trained.diffusion.T, 20)[:-1]
        self.patches = trained.model.config.patches
        self.latent = trained.model.config.latent
        self.context = trained.model.config.context

    @torch.no_grad()
    def next_token(self, tokens, pictures):
        """LM mode: the id that comes next, the likeliest one."""
        logits, _ = sample.read_all(shipped().model, tokens, list(pictures))
        return sample.choose(logits[-1:]).item()

    @torch.no_grad()
    def denoise(self, tokens, pictures, t):
        """Diffusion mode: the last picture, one step of DDIM cleaner."""
        following = [*self.times, 0][self.times.index(t) + 1]
        x = pictures[-1][None]
        x0, eps = self.diffusion.x0_and_eps(x, ask(tokens, pictures, t), t, self.x0_max)
        return ddim_step(self.diffusion, x0, eps, following)[0]


def ask(tokens, pictures, t):
    """What the shipped model says of the last picture at step t, with guidance: (1, c, h, w)."""
    network = shipped().model
    with torch.no_grad():
        _, cond = sample.read_all(network, tokens, list(pictures), t)
        _, uncond = sample.read_all(network, sample.drop_caption(tokens), list(pictures), t)
    return guide(cond[-1:], uncond[-1:], GUIDANCE)


def with_write(answer):
    """The student's function asks the shipped model, word by word and step by step."""
    tokenizer = shipped().tokenizer
    latents = []
    for k, caption in enumerate(CAPTIONS):
        prompt = [data.BOS, *tokenizer.encode(caption)]
        generator = torch.Generator().manual_seed(k)
        _, pictures = answer(Shipped(), prompt, generator, 8, 1)
        latents.append(pictures[0])
    return decode_latents(shipped(), torch.stack(latents))


DRAW_WITH = {
    "intervals": with_intervals,
    "patchify": with_patchify,
    "cosine_alpha_bar": with_cosine_alpha_bar,
    "ancestral_step": with_ancestral_step,
    "guide": with_guide,
    "losses": with_losses,
    "quantise": with_quantise,
    "lay_out": with_lay_out,
    "write": with_write,
}
WHAT = {
    "intervals": "makes the masks while the shipped model draws",
    "patchify": "cuts the pictures that the shipped model draws",
    "cosine_alpha_bar": "is the path along which the shipped model draws",
    "ancestral_step": "takes each of the 50 steps",
    "guide": "guides the shipped model",
    "losses": "has taught the last layer again, which had been emptied",
    "quantise": "makes pictures of 64 integers, and the shipped decoder draws them back",
    "lay_out": "lays out the prompts of the shipped model",
    "write": "writes and draws with the shipped model",
}
