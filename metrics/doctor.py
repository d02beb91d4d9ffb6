"""
doctor.py: what is wrong with this model?                                 (ours; docs/PAPER.md §4)

THE IDEA    "It trained, and draws noise." The loss does not say why. But each usual reason shows in
            a number that is cheap to measure. So measure them all, in the order in which one hides
            the next, and name the first that is out of line.
A PICTURE   the VAE -> the schedule -> the cache -> is it trained? -> captions -> guidance -> noise
            A broken VAE spoils all that follows; without training no caption can be heard; ...
THE RULE    "no network" is the yardstick for "is it trained?": take every number of a latent for a
            Gaussian, with the mean and the deviation that it has over the pictures. Then the best
            guess of x0 is a formula. A network that is hardly better knows nothing of pictures.
PAPER/HERE  not in the paper. Our choice: all limits below; docs/RESULTS.md "The doctor" says what
            healthy models measure, and sick ones.
READ NEXT   gap.py        TRY IT  python -m metrics.doctor        TEST  tests/test_doctor.py
"""
import argparse
from dataclasses import dataclass, replace

import numpy as np
import torch

import sample
from diffusion import ddim_step, guide, loss
from metrics.gap import outputs, wrong_captions
from sources import choose, scenes
from sources.feed import probe
from support.checkpoint import decode_latents, encode_pixels, load_trained
from support.common import ASSETS, Parser, UserError, pick_device, run_command

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)                      # of T, where the losses are measured
STARTS = (0.25, 0.5, 0.75, 1.0)                         # of T, where redrawing begins

# Our choice: the limits.
LEAST_DB = 20                                           # of a picture, there and back
MOST_LEFT = 0.1                                         # of the picture, at t = T
SAME = 1e-2                                             # latents that differ by less
MOST_OF_NO_NETWORK = 0.8                                # of the loss of knowing no network
LEAST_Z = 3                                             # the gap, in its standard errors


# ---------------------------------------------------------------------------------------- measuring
@dataclass
class Patient:
    """A model, and N unseen pictures that it should know how to draw.

    trained    checkpoint.Trained
    pixels     (N, h, w, 3 or 1) uint8
    texts      N captions
    latents    (N, c, h, w) of the pictures
    before     (N, c, h, w) of the pictures before an edit, or None
    judge      function (caption, (h, w, 3) uint8) -> whether the one shows what the other says, or
               None: nobody can say
    """
    trained: object
    pixels: np.ndarray
    texts: list
    latents: torch.Tensor
    before: torch.Tensor | None
    judge: object

    @property
    def captions(self):
        """The captions, as ids."""
        return [self.trained.tokenizer.encode(text) for text in self.texts]

    def ask(self, texts, xt, t):
        """What the network says of noisy pictures xt (N, c, h, w) at t, an int, each beside its
        text: (N, c, h, w). No cache."""
        times = torch.full((len(xt),), t)
        trained = self.trained
        out, number = outputs(trained.model, trained.tokenizer, texts, xt, times, self.before)
        return out[number.argsort()]


def examine(patient, steps=12, guidance=3.0, seed=0):
    """Dict of all that `diagnose` looks at. steps, guidance: of redrawn pictures."""
    trained = patient.trained
    diffusion = trained.diffusion
    found = {
        "db": round_trip(trained, patient.pixels),
        "deviation": float(patient.latents.std()),
        "left": float(diffusion.a[diffusion.T]),
        "judged": patient.judge is not None,
    }
    found |= draw_thrice(patient, guidance)
    found |= losses(patient, seed)
    found["redrawn"] = {}
    for part in STARTS:
        t = round(part * diffusion.T)
        drawn = redraw(patient, t, steps, guidance, seed)
        found["redrawn"][t] = share_right(patient, drawn)
    return found


def round_trip(trained, pixels):
    """PSNR in dB of pictures (N, h, w, 3 or 1) uint8 that are encoded and decoded again."""
    back = decode_latents(trained, encode_pixels(trained, pixels)).astype(float)
    error = np.square(back - pixels).mean()             # grey pictures come back in 3 channels
    return float(10 * np.log10(255 ** 2 / max(error, 1e-9)))


def draw_thrice(patient, guidance):
    """The first picture, drawn from the same noise by sample.py, by it without guidance, and here
    without a cache. {"uncached", "unguided": the largest difference from the first drawing}."""
    trained = patient.trained
    prompt = [patient.texts[0]]
    before = patient.before
    if before is not None:
        before = before[:1]
        prompt.insert(0, before[0])

    def draw(w):
        """One latent (c, h, w)."""
        [document] = sample.generate(trained, [prompt], draw_now=True, max_words=0, seed=[0],
                                     steps=4, sampler="ddim", guidance=w)
        return document[-1]

    guided = draw(guidance)
    unguided = draw(1.0)
    # Without guidance: what is wrong with it must not look like a wrong cache.
    generator = torch.Generator().manual_seed(0)        # the noise that `generate` begins with
    noise = torch.randn(1, *guided.shape, generator=generator)
    first = replace(patient, texts=patient.texts[:1], before=before)
    uncached = denoise(first, noise, trained.diffusion.T, 4, 1.0)[0]
    return {
        "uncached": float((unguided - uncached).abs().max()),
        "unguided": float((unguided - guided).abs().max()),
    }


@torch.no_grad()
def losses(patient, seed):
    """eq. 3 by noise level, {"right", "dropped", "wrong", "no_network": one number per level}; and
    "z", by how many standard errors a wrong caption is worse than the right one."""
    diffusion = patient.trained.diffusion
    x0 = patient.latents
    captions = patient.captions
    texts = {
        "right": captions,
        "dropped": [("dropped", ids) for ids in captions],
        "wrong": wrong_captions(captions),
    }
    found = {"t": [], "right": [], "dropped": [], "wrong": [], "no_network": []}
    gaps = []                                           # (N,) for each level
    generator = torch.Generator().manual_seed(seed)
    for part in LEVELS:
        t = round(part * diffusion.T)
        eps = torch.randn(x0.shape, generator=generator)
        xt = diffusion.add_noise(x0, eps, t)
        target = diffusion.target(x0, eps, t)
        each = {}                                       # (N,) for each kind of text
        for name, said in texts.items():
            predicted = diffusion.prediction(xt, patient.ask(said, xt, t), t)
            each[name] = loss(target, predicted)
        each["no_network"] = loss(target, guess(diffusion, x0, xt, t))
        for name, values in each.items():
            found[name].append(float(values.mean()))
        found["t"].append(t)
        gaps.append(each["wrong"] - each["right"])
    gap = torch.stack(gaps).mean(0)                     # (N,): levels share their pictures
    error = gap.std() / len(gap) ** 0.5
    found["z"] = float(gap.mean() / error.clamp(min=1e-12))
    return found


def guess(diffusion, x0, xt, t):
    """What the best network says that knows no more of pictures than the mean and the deviation of
    every number in x0 (N, c, h, w): (N, c, h, w)."""
    a, s = diffusion.at(t, xt)
    mean = x0.mean(0)
    variance = x0.var(0)
    trust = a * variance / (a ** 2 * variance + s ** 2)
    best = mean + trust * (xt - a * mean)               # E[x0 | xt]
    return diffusion.target(best, (xt - a * best) / s, t)


def redraw(patient, t, steps, guidance, seed):
    """Latents (N, c, h, w): the pictures, noised up to t and denoised again."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(patient.latents.shape, generator=generator)
    if t == patient.trained.diffusion.T:                # drawing begins from noise alone
        return denoise(patient, eps, t, steps, guidance)
    xt = patient.trained.diffusion.add_noise(patient.latents, eps, t)
    return denoise(patient, xt, t, steps, guidance)


@torch.no_grad()
def denoise(patient, xt, t, steps, guidance):
    """(N, c, h, w) at t = 0 of xt at t: DDIM steps, guided over the words, without a cache.
    guidance: 1 is the plain model."""
    diffusion = patient.trained.diffusion
    x0_max = float(patient.trained.vae.x0_max)
    captions = patient.captions
    dropped = [("dropped", ids) for ids in captions]
    times = torch.linspace(t, 0, steps + 1).round().long().tolist()
    for now, then in zip(times, times[1:]):
        out = patient.ask(captions, xt, now)
        if guidance != 1:
            out = guide(out, patient.ask(dropped, xt, now), guidance)
        x0, eps = diffusion.x0_and_eps(xt, out, now, x0_max)
        xt = ddim_step(diffusion, x0, eps, then)
    return xt


def share_right(patient, drawn):
    """The share of redrawn latents (N, c, h, w) that are right: says the judge; without one, those
    that are nearer to their own picture than to all others."""
    if patient.judge:
        pictures = decode_latents(patient.trained, drawn)
        verdicts = []
        for text, picture in zip(patient.texts, pictures, strict=True):
            verdicts.append(bool(patient.judge(text, picture)))
        return float(np.mean(verdicts))
    distance = torch.cdist(drawn.flatten(1), patient.latents.flatten(1))        # (N, N)
    own = torch.arange(len(drawn))
    return float((distance.argmin(1) == own).float().mean())


# -------------------------------------------------------------------------------------- diagnosing
def diagnose(found):
    """One sentence. found: what `examine` measured."""
    of_no_network = sum(found["right"]) / sum(found["no_network"])
    quarter, *_, noise = found["redrawn"]               # t, of STARTS
    from_quarter = found["redrawn"][quarter]
    from_noise = found["redrawn"][noise]
    diseases = [
        (found["db"] < LEAST_DB,
         f"the VAE is broken: a picture comes back from it at {found['db']:.1f} dB; train it "
         f"longer, and give a model the VAE that it was trained with"),
        (found["left"] > MOST_LEFT,
         f"the schedule does not end in noise: at its last t there is {found['left']:.2f} of the "
         f"picture left, but a drawing begins with noise alone; take --shift 1 or more"),
        (found["uncached"] > SAME,
         f"the cache is wrong: with it another picture is drawn than without "
         f"(by {found['uncached']:.2g}); this is a bug of the code, not of the training"),
        (of_no_network > MOST_OF_NO_NETWORK,
         f"it is undertrained: its loss is {of_no_network:.0%} of what one reaches who knows no "
         f"more than the mean picture; train longer, or raise --lr"),
        (found["z"] < LEAST_Z,
         "it ignores its captions: a wrong one costs nothing; train longer, raise --shift, and "
         "look whether captions and pictures belong together"),
        (found["unguided"] < SAME,
         "guidance is off: with it the same is drawn as without; the row that leaves out the "
         "caption still reads it, which is a bug of the code, not of the training"),
        # Without a judge, few come out of noise as their own picture: others fit the caption, too.
        (found["judged"] and from_noise < from_quarter / 2,
         f"it finishes pictures and cannot begin them: from t = {quarter} on {from_quarter:.0%} "
         f"come out right, from noise {from_noise:.0%}; high noise is learned last: train longer, "
         f"or raise --shift"),
    ]
    for is_so, sentence in diseases:
        if is_so:
            return sentence
    if found["judged"]:
        more = "" if from_noise >= 0.9 else "; train longer for more"
        return f"nothing is wrong: from noise, {from_noise:.0%} come out right{more}"
    return f"nothing is wrong: from t = {quarter} on, {from_quarter:.0%} come out as themselves"


# ------------------------------------------------------------------------------------ command line
def find_patient(trained, name="scenes", folder=None, world="one", n=48, seed=0):
    """The Patient of a checkpoint.Trained and up to n unseen pictures. name: of their source;
    folder: where its files lie; world: which captions of scenes. Raises UserError if there are too
    few, or all captions say the same."""
    size = trained.model.config.latent[1] * trained.vae.f
    test = choose.load_pairs(name, folder, size=size, split="test", n=n, seed=seed,
                             categories=scenes.WORLDS[world], progress=False)
    texts, latents, before = probe(test, trained.vae, n)
    if len(set(texts)) < 2:
        raise UserError("the doctor needs unseen pictures with different captions: with a single "
                        "one nobody can say whether it is read")
    judge = judge_scene if name == "scenes" else getattr(test, "judge", None)
    return Patient(trained, test.pixels[:n], texts, latents, before, judge)


def judge_scene(caption, picture):
    """Whether a picture (h, w, 3) uint8 shows what a caption of the scenes world says."""
    return scenes.holds(scenes.read_caption(caption), scenes.parse(picture))


def describe(found):
    """What was measured, as lines of text."""
    lines = []

    def add(name, cells):
        lines.append(f"  {name:36s}" + "".join(f"{cell:>8s}" for cell in cells))

    add("VAE, there and back", [f"{found['db']:.1f} dB"])
    add("deviation of its latents (1)", [f"{found['deviation']:.2f}"])
    add("of the picture left at the last t", [f"{found['left']:.3f}"])
    add("drawn without the cache, differs by", [f"{found['uncached']:.0e}"])
    add("drawn without guidance, differs by", [f"{found['unguided']:.0e}"])
    add("at t =", [str(t) for t in found["t"]])
    for name, text in (("right", "  loss with its caption"), ("dropped", "  loss without it"),
                       ("wrong", "  loss with another's"), ("no_network", "  loss, no network")):
        add(text, [f"{value:.3f}" for value in found[name]])
    add("a wrong caption costs, in its errors", [f"{found['z']:.1f}"])
    add("redrawn from t =", [str(t) for t in found["redrawn"]])
    add("  right" if found["judged"] else "  nearest to its own picture",
        [f"{share:.0%}" for share in found["redrawn"].values()])
    return lines


def main(argv=None):
    """Examine a checkpoint as the command line says; print what is measured, and the diagnosis."""
    parser = Parser(
        prog="python -m metrics.doctor", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="What is wrong with this model? One sentence, and the numbers behind it.")
    add = parser.add_argument
    add("checkpoint", nargs="?", default=str(ASSETS / "scenes.pt"), help="a model.pt of train.py")
    add("--data", choices=choose.SOURCES, default="scenes", help="what it has learned from")
    add("--data-dir", help="folder of these data, as for train.py")
    add("--world", choices=scenes.WORLDS, default="one", help="which captions of scenes")
    add("--n", type=int, default=48, help="how many unseen pictures to look at")
    args = parser.parse_args(argv)
    if not 2 <= args.n <= 10_000:
        raise UserError(f"--n must be from 2 to 10,000, got {args.n}")

    trained = load_trained(args.checkpoint, pick_device())
    if trained.kind != "transfusion":
        raise UserError(f"{args.checkpoint} is a {trained.kind}: the doctor knows Transfusion only")
    found = examine(find_patient(trained, args.data, args.data_dir, args.world, args.n))
    print("\n".join([*trained.origin.lines(), *describe(found)]))
    print(f"diagnosis: {diagnose(found)}")


if __name__ == "__main__":
    run_command(main)
