"""
train.py: the loop                                                            (Transfusion §4.1 "Optimization", eq. 4)

THE IDEA    Draw documents, mix noise into their pictures, ask the transformer for the next words and for the noise, add the
            two losses, step. `python train.py` does it in six minutes on two cores and ends with a report and pictures.
A PICTURE   data.Documents -> data.pack -> Batch --t, eps--> model.losses -> LM + 5 DDPM -> AdamW -> EMA -> evaluate.report
THE RULE    L = (sum of LM over all words) / words + lambda (sum of DDPM over all pictures) / pictures           eq. 4
            words and pictures are counted over all micro-batches of a step before anything is divided.
OUT         out/<name>/: config.json, log.jsonl, curves.png, samples.png, report.json,
            model.pt (the averaged weights, all that sample.py needs), last.pt (everything, to resume to the bit)
PAPER/HERE  same: AdamW (0.9, 0.95), decay 0.1, clip 1, warm-up, cosine to a twentieth, lambda = 5.
            our choice: no weight decay on vectors (norms, biases); sampling from an average of the weights (EMA);
            a toy learns at 1e-3 to 2e-3 where the paper's billions of parameters take 3e-4.
            The data of a step is a function of (seed, step, micro-batch), so a resumed run repeats an uninterrupted one.
READ NEXT   sample.py, evaluate.py        TRY IT  python train.py        TEST  tests/test_train.py
"""
import argparse
import copy
import json
import math
import signal
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import edits
import evaluate
import scenes
import vae as vae_module
from diffusion import Diffusion, same_noise
from model import Transfusion, count, losses, sized
from patchify import PATCHES
from sample import ASSETS, Kit, load_kit, save_kit


def option(default, help, choices=None):
    """A field of Config that is also a command-line option."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every number of a run. The defaults are the paper's process at toy size; PRESETS change numbers, not code."""
    data: str = option("scenes", "what to learn from", ("scenes", "mnist", "folder", "edits"))
    data_dir: str = option("", "folder of MNIST idx files, of pictures with captions.jsonl, or of edits.jsonl")
    init: str = option("", "fine-tune this model.pt: its shape, words, VAE and diffusion are kept (§4.5)")
    world: str = option("one", "which captions of scenes: one object, or all six categories", tuple(scenes.WORLDS))
    image_size: int = option(32, "pixels per side (folder)")
    pairs: int = option(20000, "how many scenes to draw, or triples (scenes, edits)")
    vae: str = option("", "a vae.pt to use; default: assets/<data>_vae.pt if there is one, else one is trained first")
    vae_steps: int = option(400, "training steps of that VAE")
    size: str = option("toy", "a row of model.SIZES")
    patch: int = option(2, "side of a patch, in latent pixels (§4.3.2)")
    encoder: str = option("linear", "patch encoder (§4.3.3)", tuple(PATCHES))
    patch_position: bool = option(False, "add a learned vector per place in the picture")
    bidirectional: bool = option(True, "patches of a picture see each other; --no-bidirectional is Table 3's ablation")
    diffusion: str = option("ddpm", "the paper's DDPM, or rectified flow", ("ddpm", "flow"))
    shift: float = option(1.0, "move the noise schedule: noise-to-signal ratio times this (1: the paper's)")
    lam: float = option(5.0, "lambda of eq. 4")
    drop: float = option(0.1, "share of captions dropped, for guidance")
    seq_len: int = option(96, "T, positions per row: documents are packed into rows of this length")
    documents: int = option(64, "documents per micro-batch")
    accumulate: int = option(1, "micro-batches per step")
    steps: int = option(1400, "optimizer steps")
    lr: float = option(2e-3, "peak learning rate; ends at a twentieth of it (the paper: 3e-4, ends at 1.5e-5)")
    warmup: int = option(100, "steps of linear warm-up (the paper: 4000)")
    decay: float = option(0.1, "weight decay")
    clip: float = option(1.0, "gradient clipping, by global norm")
    ema: float = option(0.998, "decay of the averaged weights")
    seed: int = option(0, "seed of weights, data and noise")
    log_every: int = option(50, "steps between lines of log.jsonl")
    gap_every: int = option(200, "steps between measurements of the conditioning gap")
    save_every: int = option(500, "steps between checkpoints")
    samples: int = option(200, "pictures to draw for the report; 0: no report")
    sample_steps: int = option(50, "diffusion steps of the report's pictures")
    guidance: float = option(3.0, "guidance of the report's pictures")
    sampler: str = option("ddpm", "sampler of the report's pictures", ("ddpm", "ddim", "dpm++"))
    out: str = option("", "folder of this run; default: out/<preset>")


# Differs from the paper: the toys take its one alternative, rectified flow, with a noisier schedule. With the eps loss a
# caption, which is decided at high noise, moves the loss by 2% only, and these short runs end before it is learned
# (README "What it took"). `--diffusion ddpm --shift 1 --lam 5 --no-patch-position` is the paper's way, and Config's default.
# Flow's loss is larger than the eps loss: lambda = 2 gives it the share of the sum that 5 gives the latter.
TOY = dict(diffusion="flow", patch_position=True, lam=2.0, documents=32, ema=0.999)
PRESETS = {
    "scenes": dict(TOY, shift=3.0, steps=4000),                         # one object, six minutes on two CPU cores
    "mnist": dict(TOY, data="mnist", shift=2.0, steps=2400, vae_steps=500),
    "folder": dict(TOY, data="folder", shift=2.0, steps=6000, vae_steps=2000),
    # §4.5: 8,000 triples. Few epochs at a low rate: the model is to learn what an instruction is, not a new world.
    "edit": dict(data="edits", init=str(ASSETS / "scenes.pt"), pairs=8000, steps=2500, lr=1e-3, documents=32, seq_len=128, lam=2.0, ema=0.998),
    "six": dict(TOY, world="six", size="small", pairs=40000, shift=3.0, steps=20000, seq_len=128, save_every=1000, gap_every=1000),
}
AFTERWARDS = {"out", "log_every", "gap_every", "save_every", "samples", "sample_steps", "guidance", "sampler"}   # may change on resume


# ------------------------------------------------------------------------------------------------------------ preparation
def find_vae(config, out):
    """(the VAE or None, its VAEConfig or None): given by name, kept in the run's folder, or shipped with the repository."""
    shipped = ASSETS / f"{config.data}_vae.pt"
    path = Path(config.vae) if config.vae else next((p for p in (out / "vae.pt", shipped) if p.exists()), None)
    return vae_module.unpack_vae(vae_module.load(path, "vae")) if path else None


@dataclass
class Run:
    """Everything that a step needs. latents: (mean, deviation) of all pictures, each (N, c, h, w)."""
    config: Config
    model: Transfusion
    average: Transfusion
    optimizer: torch.optim.Optimizer
    words: data.Words
    vae: vae_module.VAE
    diffusion: Diffusion
    documents: data.Documents
    latents: tuple
    step: int = 0

    def kit(self):
        """The averaged model, ready to sample."""
        return Kit(self.average.eval(), self.words, self.vae, self.diffusion)


def load_source(config, split="train", n=None):
    """The Pairs, or Edits, that the configuration names."""
    if config.data == "edits":
        return edits.load_edits(config.data_dir or None, config.image_size, split, n or config.pairs, config.seed)
    return data.load_pairs(config.data, config.data_dir or None, config.image_size, split, n or config.pairs, config.seed,
                           scenes.WORLDS[config.world], progress=split == "train")


def prepare(config, out):
    """The Run at step 0; trains a VAE if there is none, after everything that can be wrong has been checked."""
    start, pairs = load_kit(config.init) if config.init else None, load_source(config)
    words, side, channels = start.words if start else data.Words(pairs.vocabulary()), *pairs.pixels.shape[2:]
    words.encode(" ".join(sorted(pairs.vocabulary())))  # a word that --init does not know: say so now
    vae = start.vae if start else find_vae(config, out)
    vae_config = vae.config if vae else vae_module.VAEConfig(image_channels=channels)
    f = 2 ** (len(vae_config.multipliers) - 1)
    if vae_config.image_channels != channels or side % f:
        raise data.UserError(f"the VAE takes pictures of {vae_config.image_channels} channels, with sides divisible by {f}; "
                             f"--data {config.data} has {channels} channels and {side} pixels")
    shape = start.model.config if start else sized(
        config.size, vocabulary=len(words), latent=(vae_config.z, side // f, side // f), patch=config.patch,
        encoder=config.encoder, patch_position=config.patch_position, bidirectional=config.bidirectional, context=config.seq_len)
    if shape.latent[1] * f != side or shape.context < config.seq_len:
        raise data.UserError(f"{config.init} reads pictures of {shape.latent[1] * f} pixels in a context of {shape.context}: "
                             f"set --image-size and --seq-len to that")
    diffusion = start.diffusion if start else Diffusion(config.diffusion, shift=config.shift)
    kind = edits.EditDocuments if config.data == "edits" else data.Documents
    documents = kind(pairs, shape.patches, config.seq_len, drop=config.drop, t_limit=same_noise(diffusion, 500))
    if documents.longest() > config.seq_len:
        raise data.UserError(f"the longest document takes {documents.longest()} positions and does not fit in "
                             f"a context of {config.seq_len}: raise --seq-len or --patch")
    if vae is None:
        vae = vae_module.train_vae(pairs.pixels, vae_config, config.vae_steps, seed=config.seed)
        vae_module.save(out / "vae.pt", vae_module.pack_vae(vae))
    latents = vae_module.encode_all(vae, pairs.pixels)
    torch.manual_seed(config.seed)
    model = start.model.train() if start else Transfusion(shape)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == large] for large in (True, False))
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=config.decay), dict(params=vectors, weight_decay=0.0)],
                                  lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)          # Paper App. B.1
    return Run(config, model, copy.deepcopy(model).requires_grad_(False), optimizer, words, vae, diffusion, documents, latents)


# --------------------------------------------------------------------------------------------------------------- one step
def draw_batch(run, step, micro):
    """The Batch of a micro-batch, with latents, t and eps: a pure function of (seed, step, micro)."""
    rng = np.random.default_rng([run.config.seed, step, micro])
    rows = [data.lay_out(run.documents.draw(rng), run.words, run.documents.patches) for _ in range(run.config.documents)]
    batch, (mean, deviation) = data.pack(rows, run.config.seq_len), run.latents
    g = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
    normal = lambda: torch.randn(len(batch.images), *mean.shape[1:], generator=g)
    batch.latents = mean[batch.images] + deviation[batch.images] * normal()                       # a draw from q(z | x)
    batch.t = batch.t_min + (torch.rand(len(batch.images), generator=g) * (batch.t_max - batch.t_min + 1)).long()    # uniform
    batch.eps = normal()
    return batch


def learning_rate(config, step):
    """Linear warm-up, then half a cosine down to a twentieth. Paper §4.1: 3e-4 to 1.5e-5."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))


def train_step(run):
    """One optimizer step. Returns a dict of its sums: lm, words, per-picture losses and their t, grad_norm, tokens."""
    config, model = run.config, run.model.train()
    batches = [draw_batch(run, run.step, micro) for micro in range(config.accumulate)]
    words = sum(int(b.learn.sum()) for b in batches)                    # TRAP: counted over the whole step, before dividing
    pictures = max(1, sum(len(b.images) for b in batches))
    lm_total, per_picture, t = 0.0, [], []
    for batch in batches:
        lm, _, each = losses(model, batch, run.diffusion)
        (lm / words + config.lam * each.sum() / pictures).backward()    # eq. 4
        lm_total += lm.item()
        per_picture.append(each.detach())
        t.append(batch.t)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, run.step)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    keep = min(config.ema, (1 + run.step) / (10 + run.step))            # the average forgets its random start quickly
    with torch.no_grad():                                               # else the average would remember every step's graph
        torch._foreach_lerp_(list(run.average.parameters()), list(run.model.parameters()), 1 - keep)
    return {"lm": lm_total, "words": words, "each": torch.cat(per_picture), "t": torch.cat(t), "grad_norm": norm.item(),
            "tokens": sum(int((b.tokens != data.PAD).sum()) for b in batches)}


# ------------------------------------------------------------------------------------------------------------ bookkeeping
def save_run(run, out):
    """Write last.pt: everything that a resumed run needs to repeat the uninterrupted one to the bit."""
    vae_module.save(out / "last.pt", {"kind": "training", "config": asdict(run.config), "step": run.step,
                                      "model": run.model.state_dict(), "average": run.average.state_dict(),
                                      "optimizer": run.optimizer.state_dict()})


def load_run(config, out):
    """The dict of last.pt. Raises UserError if the configuration has changed in a way that changes the run."""
    saved = vae_module.load(out / "last.pt", "training")
    changed = [k for k, v in asdict(config).items() if saved["config"].get(k, v) != v and k not in AFTERWARDS]
    if changed:
        raise data.UserError(f"{out}/last.pt was trained with " +
                             ", ".join(f"--{k.replace('_', '-')} {saved['config'][k]}" for k in changed) +
                             "; resume with the same options, or start a new run with another --out")
    return saved


def resume_run(run, saved):
    """Load the dict of last.pt into the Run."""
    run.model.load_state_dict(saved["model"])
    run.average.load_state_dict(saved["average"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.step = saved["step"]


def summarize(window, run, seconds):
    """One line of log.jsonl from the dicts of the last steps."""
    each, t = (torch.cat([w[k] for w in window]) for k in ("each", "t"))
    edges = range(0, run.diffusion.T, run.diffusion.T // 5)             # loss by noise level: the first thing to look at
    bins = [each[(t > lo) & (t <= lo + run.diffusion.T // 5)] for lo in edges]
    return {"step": run.step, "lm": sum(w["lm"] for w in window) / sum(w["words"] for w in window),
            "diffusion": each.mean().item(), "by_t": [round(b.mean().item(), 4) if len(b) else None for b in bins],
            "grad_norm": window[-1]["grad_norm"], "lr": learning_rate(run.config, run.step - 1),
            "tokens_per_s": round(sum(w["tokens"] for w in window) / seconds)}


def plot_curves(log, path):
    """curves.png: both losses, the loss by noise level, the conditioning gap."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    steps = [row["step"] for row in log]
    axes[0].plot(steps, [row["lm"] for row in log], label="LM (nats per word)")
    axes[0].plot(steps, [row["diffusion"] for row in log], label="diffusion (mean square)")
    axes[0].set_title("the two losses")
    for k in range(5):
        axes[1].plot(steps, [row["by_t"][k] for row in log], label=f"t in {200 * k + 1}..{200 * k + 200}", color=plt.cm.viridis(k / 5))
    axes[1].set_title("diffusion loss by noise level")
    gaps = [(row["step"], row["gap"]) for row in log if "gap" in row]
    axes[2].plot(*zip(*gaps) if gaps else ([], []), marker=".")
    axes[2].axhline(0, color="grey", linewidth=0.8)
    axes[2].set_title("conditioning gap (0: caption ignored)")
    for axis in axes:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    axes[1].legend(frameon=False, fontsize=8)
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_samples(shown, path, columns=6, rows=4):
    """samples.png: pictures under their prompts; a red title marks one that is not what was asked for."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    chosen = [shown[k] for k in np.linspace(0, len(shown) - 1, min(len(shown), columns * rows)).astype(int)]
    figure, axes = plt.subplots(-(-len(chosen) // columns), columns, figsize=(2 * columns, 2.2 * -(-len(chosen) // columns)),
                                squeeze=False, constrained_layout=True)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (text, picture, right) in zip(axes.flat, chosen):
        axis.imshow(picture, interpolation="nearest")
        halves = text.split() if len(text) > 18 else [text]
        middle = len(halves) // 2
        axis.set_title(" ".join(halves[:middle]) + "\n" + " ".join(halves[middle:]) if len(halves) > 1 else text,
                       fontsize=9, color="black" if right else "red")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------- the loop
def fit(run, out, test):
    """Train to the last step, logging and saving. Returns (log, finished). Ctrl-C ends the step, saves, and stops."""
    config, log, window, began, stop = run.config, [], [], time.time(), []
    log_path = out / "log.jsonl"
    if run.step and log_path.exists():
        log = [row for row in map(json.loads, log_path.read_text().splitlines()) if row["step"] <= run.step]
    log_path.write_text("".join(json.dumps(row) + "\n" for row in log))
    probe = evaluate.gap_probe(test, run.vae, 128)
    bar = tqdm(total=config.steps, initial=run.step, desc="training", mininterval=1)

    def on_ctrl_c(*_):                                  # TRAP: an exception here could fall between weights, average and count
        stop.append(True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # a second Ctrl-C stops at once
    in_main = threading.current_thread() is threading.main_thread()     # only there may Python catch a signal
    before = signal.signal(signal.SIGINT, on_ctrl_c) if in_main else None
    try:
        while run.step < config.steps and not stop:
            window.append(train_step(run))
            bar.update()
            if run.step % config.log_every == 0 or run.step == config.steps:
                row = summarize(window, run, time.time() - began)
                if run.step % config.gap_every == 0 or run.step == config.steps:
                    row["gap"] = evaluate.conditioning_gap(run.average.eval(), run.words, run.diffusion, *probe)
                row["seconds_left"] = round(bar.format_dict["elapsed"] / (run.step - bar.initial) * (config.steps - run.step))
                log.append(row)
                with open(log_path, "a") as file:
                    file.write(json.dumps(row) + "\n")
                bar.set_postfix(lm=f"{row['lm']:.3f}", diff=f"{row['diffusion']:.3f}",
                                gap=next((f"{r['gap']:.3f}" for r in reversed(log) if "gap" in r), "-"))
                window, began = [], time.time()
            if run.step % config.save_every == 0:
                save_run(run, out)
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)
        bar.close()
    save_run(run, out)
    return log, run.step == config.steps


def parse_arguments(argv=None):
    """(Config, resume, overwrite) of a command line."""
    parser = argparse.ArgumentParser(description="Train a Transfusion model. `python train.py` alone trains the first toy.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a named set of options; default: that of --data")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in the run's folder")
    parser.add_argument("--overwrite", action="store_true", help="start anew although the run's folder has a checkpoint")
    kinds = {f.name: type(f.default) for f in fields(Config)}
    for f in fields(Config):
        more = dict(action=argparse.BooleanOptionalAction) if kinds[f.name] is bool else dict(type=kinds[f.name], choices=f.metadata["choices"])
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {f.default})", **more)
    given = vars(parser.parse_args(argv))
    preset, resume, overwrite = (given.pop(k) for k in ("preset", "resume", "overwrite"))
    preset = preset or next(name for name in PRESETS if PRESETS[name].get("data", "scenes") == given.get("data", "scenes"))
    config = Config(**{"out": f"out/{preset}", **PRESETS[preset], **given})
    for name in ("steps", "documents", "accumulate", "seq_len", "pairs", "vae_steps", "log_every", "gap_every", "save_every", "patch", "image_size"):
        if getattr(config, name) < 1:
            raise data.UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    for name in ("lr", "lam", "guidance", "warmup", "samples", "decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise data.UserError(f"--{name} must be 0 or more, got {getattr(config, name)}")
    for name, top in (("drop", 1), ("ema", 1), ("sample_steps", 1000)):
        if not (name == "sample_steps") <= getattr(config, name) <= top:
            raise data.UserError(f"--{name.replace('_', '-')} must be at most {top} and not below "
                                 f"{int(name == 'sample_steps')}, got {getattr(config, name)}")
    if not (config.shift > 0 and config.clip > 0):
        raise data.UserError("--shift and --clip must be above 0")
    return config, resume, overwrite


def main(argv=None):
    """Train as the command line says; returns the report's numbers."""
    config, resume, overwrite = parse_arguments(argv)
    out, began = Path(config.out), time.time()
    if (out / "last.pt").exists() and not (resume or overwrite):
        raise data.UserError(f"{out} already holds a run: add --resume to go on with it, --overwrite to start anew, or "
                             f"name another folder with --out")
    if resume and not (out / "last.pt").exists():
        raise data.UserError(f"there is nothing to resume: {out}/last.pt does not exist")
    if out.exists() and not out.is_dir():
        raise data.UserError(f"{out} is a file: name another folder with --out")
    saved = load_run(config, out) if resume else None
    test = load_source(config, "test", n=256)
    run = prepare(config, out)
    if resume:
        resume_run(run, saved)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
    print(f"{config.data}: {len(run.documents.pairs.captions):,} pictures, {len(run.words)} words; model: {count(run.model):,} "
          f"parameters, {run.model.config.patches} patches per picture; {config.steps - run.step} steps to go; "
          f"prepared in {time.time() - began:.0f} s")
    log, finished = fit(run, out, test)
    if not finished:
        return print(f"stopped and saved at step {run.step}; the same command with --resume goes on from there")
    plot_curves(log, out / "curves.png")
    save_kit(out / "model.pt", run.kit())
    trained = time.time() - began
    if not config.samples:
        return print(f"trained in {trained:.0f} s; wrote {out}/model.pt")
    found, lines, shown = evaluate.report(run.kit(), config.data, scenes.WORLDS[config.world], test, config.samples, config.seed,
                                          steps=config.sample_steps, guidance=config.guidance, sampler=config.sampler)
    found["train_seconds"] = trained
    plot_samples(shown, out / "samples.png")
    (out / "report.json").write_text(json.dumps(found, indent=1))
    print("\n".join(lines))
    print(f"trained in {trained:.0f} s, all in {time.time() - began:.0f} s; look at {out}/samples.png and {out}/curves.png")
    return found


if __name__ == "__main__":
    data.run_command(main)
