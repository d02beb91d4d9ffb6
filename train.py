"""
train.py: the loop                                                            (Transfusion §4.1 "Optimization", eq. 4)

THE IDEA    Draw documents, mix noise into their pictures, ask the transformer for the next words and for the noise, add the
            two losses, step. `python train.py` does it in six minutes on two cores and ends with a report and pictures;
            `torchrun ... train.py --preset 7b` runs the same lines on many GPUs (scale.py says how).
A PICTURE   data.Documents -> data.pack -> Batch --t, eps--> model.losses -> LM + 5 DDPM -> AdamW -> EMA -> evaluate.report
THE RULE    L = (sum of LM over all words) / words + lambda (sum of DDPM over all pictures) / pictures           eq. 4
            words and pictures are counted over all micro-batches of a step, on all ranks, before anything is divided.
OUT         out/<name>/: config.json, log.jsonl, curves.png, samples.png, report.json,
            model.pt (the averaged weights, all that sample.py needs), checkpoints/ (everything, to resume to the bit)
PAPER/HERE  same: AdamW (0.9, 0.95), decay 0.1, clip 1, warm-up, cosine to a twentieth, lambda = 5.
            our choice: no weight decay on vectors (norms, biases); sampling from an average of the weights (EMA);
            a toy learns at 1e-3 to 2e-3 where the paper's billions of parameters take 3e-4.
            The data of a step is a function of (seed, step, micro-batch), so a resumed run repeats an uninterrupted one.
READ NEXT   sample.py, evaluate.py        TRY IT  python train.py        TEST  tests/test_train.py
"""
import argparse
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
import evaluate
import scale
import scenes
import vae as vae_module
from diffusion import Diffusion, same_noise
from evaluate import plot_curves, plot_samples
from model import Transfusion, count, losses, sized
from patchify import PATCHES
from sample import Kit, save_kit


def option(default, help, choices=None):
    """A field of Config that is also a command-line option."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every number of a run. The defaults are the paper's process at toy size; PRESETS change numbers, not code."""
    data: str = option("scenes", "what to learn from", ("scenes", "mnist", "folder", "shards"))
    data_dir: str = option("", "folder of MNIST idx files, of pictures with captions.jsonl, or of packed shards")
    world: str = option("one", "which captions of scenes: one object, or all six categories", tuple(scenes.WORLDS))
    image_size: int = option(32, "pixels per side (folder)")
    pairs: int = option(20000, "how many scenes to draw (scenes)")
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
    documents: int = option(64, "documents per micro-batch (shards: rows)")
    accumulate: int = option(1, "micro-batches per step, over all processes together")
    checkpointing: bool = option(False, "compute activations again in the backward pass instead of keeping them")
    compile: bool = option(False, "torch.compile each block")
    shard: int = option(0, "among how many processes the weights are divided; 0: all")
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
TOY = dict(diffusion="flow", patch_position=True, documents=32, ema=0.999)
PRESETS = {
    "scenes": dict(TOY, shift=3.0, steps=4000),                         # one object, six minutes on two CPU cores
    # MNIST: flow's loss is larger than the eps loss; lambda = 2 gives it the share of the sum that 5 gives the latter.
    "mnist": dict(TOY, data="mnist", shift=2.0, lam=2.0, steps=2400, vae_steps=500),
    "folder": dict(TOY, data="folder", shift=2.0, steps=6000, vae_steps=2000),
    "six": dict(world="six", size="small", pairs=40000, steps=11000, seq_len=128, patch_position=True, diffusion="flow",
                shift=3.0, save_every=1000, gap_every=500),
}
# Paper §4.1, App. B.1: rows of 4096 tokens, 2M tokens a step, 250k steps; Config's ddpm, lambda 5, patch 2 are the paper's.
PAPER = dict(data="shards", seq_len=4096, documents=2, accumulate=256, steps=250000, lr=3e-4, warmup=4000, compile=True,
             ema=0.9999, save_every=1000, gap_every=1000, sample_steps=250, guidance=5.0)
PRESETS |= {size: dict(PAPER, size=size) for size in ("0.16b", "0.37b", "0.76b", "1.4b")}
PRESETS["7b"] = dict(PAPER, size="7b", accumulate=512, steps=500000, checkpointing=True)        # the flagship: 4M, 500k
AFTERWARDS = {"out", "log_every", "gap_every", "save_every", "samples", "sample_steps", "guidance", "sampler",
              "checkpointing", "compile", "shard"}      # may change on resume


# ------------------------------------------------------------------------------------------------------------ preparation
def find_vae(config, out):
    """(the VAE or None, its VAEConfig or None): given by name, kept in the run's folder, or shipped with the repository."""
    shipped = Path(__file__).parent / "assets" / f"{config.data}_vae.pt"
    path = Path(config.vae) if config.vae else next((p for p in (out / "vae.pt", shipped) if p.exists()), None)
    return vae_module.unpack_vae(vae_module.load(path, "vae")) if path else None


@dataclass
class Run:
    """Everything that a step needs. latents: (mean, deviation) of all pictures, each (N, c, h, w).
    On several ranks, model and average are divided among them: `average` holds tensors, and only `kit` can be asked."""
    config: Config
    ranks: scale.Ranks
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
        """The averaged model, whole on every rank, ready to sample. Every rank must call it."""
        average = scale.whole(lambda: Transfusion(self.average.config), self.average, self.ranks.dtype)
        return Kit(average.eval(), self.words, self.vae, self.diffusion)


def prepare(config, out, ranks=None):
    """The Run at step 0; trains a VAE if there is none, after everything that can be wrong has been checked."""
    ranks = ranks or scale.start(config.shard)
    scale.micro_batches(config.accumulate)              # can they be dealt out?
    pairs = data.load_pairs(config.data, config.data_dir or None, config.image_size, n=config.pairs, seed=config.seed,
                            categories=scenes.WORLDS[config.world])
    words, side, channels = data.Words(pairs.vocabulary()), *pairs.pixels.shape[2:]
    vae = find_vae(config, out)
    vae_config = vae.config if vae else vae_module.VAEConfig(image_channels=channels)
    f = 2 ** (len(vae_config.multipliers) - 1)
    if vae_config.image_channels != channels or side % f:
        raise data.UserError(f"the VAE takes pictures of {vae_config.image_channels} channels, with sides divisible by {f}; "
                             f"--data {config.data} has {channels} channels and {side} pixels")
    shape = sized(config.size, vocabulary=len(words), latent=(vae_config.z, side // f, side // f), patch=config.patch,
                  encoder=config.encoder, patch_position=config.patch_position, bidirectional=config.bidirectional,
                  context=config.seq_len)
    diffusion = Diffusion(config.diffusion, shift=config.shift)
    documents = data.Documents(pairs, shape.patches, drop=config.drop, t_limit=same_noise(diffusion, 500))
    longest = 2 + 2 * (max(len(caption.split()) for caption in pairs.captions) + shape.patches + 2)
    if longest > config.seq_len:
        raise data.UserError(f"the longest document, two captions and pictures, takes {longest} positions and does not fit in "
                             f"a context of {config.seq_len}: raise --seq-len or --patch")
    if vae is None:
        with scale.rank_0_first():
            if scale.rank() == 0:
                vae_module.save(out / "vae.pt", vae_module.pack_vae(
                    vae_module.train_vae(pairs.pixels, vae_config, config.vae_steps, seed=config.seed)))
            vae = find_vae(config, out)
    latents = vae_module.encode_all(vae.to(ranks.device), pairs.pixels, progress=scale.rank() == 0)
    torch.manual_seed(config.seed)
    make = lambda: Transfusion(shape)
    model = scale.spread(make, ranks, config.checkpointing, config.compile)
    average = scale.hold(make, {k: v.detach().clone() for k, v in model.state_dict().items()})
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == large] for large in (True, False))
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=config.decay), dict(params=vectors, weight_decay=0.0)],
                                  lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)          # Paper App. B.1
    return Run(config, ranks, model, average, optimizer, words, vae, diffusion, documents, latents)


# --------------------------------------------------------------------------------------------------------------- one step
def draw_batch(run, step, micro):
    """The Batch of a micro-batch, with latents, t and eps: a pure function of (seed, step, micro)."""
    rng = np.random.default_rng([run.config.seed, step, micro])
    rows = [data.lay_out(run.documents.draw(rng), run.words, run.documents.patches) for _ in range(run.config.documents)]
    batch, (mean, deviation) = data.pack(rows, run.config.seq_len), run.latents
    g = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
    normal = lambda: torch.randn(len(batch.images), *mean.shape[1:], generator=g)
    batch.latents = mean[batch.images] + deviation[batch.images] * normal()                       # a draw from q(z | x)
    batch.t = 1 + (torch.rand(len(batch.images), generator=g) * batch.t_max).long()               # uniform in 1..t_max
    batch.eps = normal()
    return batch.to(run.ranks.device)


def learning_rate(config, step):
    """Linear warm-up, then half a cosine down to a twentieth. Paper §4.1: 3e-4 to 1.5e-5."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))


def train_step(run):
    """One optimizer step. Returns a dict of this rank's sums (lm, words, tokens), per-picture losses, their t; grad_norm."""
    config, model = run.config, run.model.train()
    batches = [draw_batch(run, run.step, micro) for micro in scale.micro_batches(config.accumulate)]
    mine = sum(int(b.learn.sum()) for b in batches)
    words, pictures = scale.total([mine, sum(len(b.images) for b in batches)])      # TRAP: counted over the whole step, on
    lm_total, per_picture, t = 0.0, [], []                                          # all ranks, before dividing
    for k, batch in enumerate(batches):
        scale.sync_gradients(model, k == len(batches) - 1)
        lm, _, each = losses(model, batch, run.diffusion)
        loss = lm / words + config.lam * each.sum() / max(1, pictures)  # eq. 4
        (loss * scale.size()).backward()                                # gradients of ranks are averaged, ours must be added
        lm_total += lm.detach()
        per_picture.append(each.detach())
        t.append(batch.t)
    norm = scale.full(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, run.step)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    keep = min(config.ema, (1 + run.step) / (10 + run.step))            # the average forgets its random start quickly
    with torch.no_grad():                                               # else the average would remember every step's graph
        torch._foreach_lerp_(list(run.average.parameters()), list(run.model.parameters()), 1 - keep)
    return {"lm": lm_total.item(), "words": mine, "each": torch.cat(per_picture), "t": torch.cat(t), "grad_norm": norm.item(),
            "tokens": sum(int((b.tokens != data.PAD).sum()) for b in batches)}


# ------------------------------------------------------------------------------------------------------------ bookkeeping
def check_config(config, out):
    """Raise UserError if the run in `out` had another configuration, in a way that changes the run."""
    try:
        before = json.loads((out / "config.json").read_text())
        changed = [k for k, v in asdict(config).items() if before.get(k, v) != v and k not in AFTERWARDS]
    except (OSError, ValueError, AttributeError) as problem:
        raise data.UserError(f"{out}/config.json cannot be read ({problem}): is {out} the folder of a run?") from None
    if changed:
        raise data.UserError(f"{out} was trained with " + ", ".join(f"--{k.replace('_', '-')} {before[k]}" for k in changed) +
                             "; resume with the same options, or start a new run with another --out")


def summarize(window, run, seconds):
    """One line of log.jsonl from the dicts of the last steps. Every rank must call it."""
    each, t = (torch.cat([w[k] for w in window]).cpu() for k in ("each", "t"))
    width = run.diffusion.T // 5                                        # loss by noise level: the first thing to look at
    bins = [each, *(each[(t > lo) & (t <= lo + width)] for lo in range(0, run.diffusion.T, width))]
    lm, words, tokens, *pairs = scale.total([sum(w[k] for w in window) for k in ("lm", "words", "tokens")] +
                                            [x for b in bins for x in (b.sum().item(), len(b))])
    diffusion, *by_t = (total / n if n else None for total, n in zip(pairs[::2], pairs[1::2]))
    return {"step": run.step, "lm": lm / words, "diffusion": diffusion, "by_t": [b and round(b, 4) for b in by_t],
            "grad_norm": window[-1]["grad_norm"], "lr": learning_rate(run.config, run.step - 1),
            "tokens_per_s": round(tokens / seconds)}


# --------------------------------------------------------------------------------------------------------------- the loop
def fit(run, out, test):
    """Train to the last step, logging and saving. Returns (log, finished). Ctrl-C ends the step, saves, and stops."""
    config, log, window, began, stop, first = run.config, [], [], time.time(), [], scale.rank() == 0
    log_path, saver = out / "log.jsonl", scale.Saver(out, run.ranks)
    save = lambda: saver.save(run.step, run.model, run.average, run.optimizer)
    if run.step and log_path.exists():
        log = [row for row in map(json.loads, log_path.read_text().splitlines()) if row["step"] <= run.step]
    scale.wait()                                        # before rank 0 writes what the others read
    if first:
        log_path.write_text("".join(json.dumps(row) + "\n" for row in log))
    captions, latents = test.captions[:128], vae_module.encode_all(run.vae, test.pixels[:128], progress=False)[0]
    bar = tqdm(total=config.steps, initial=run.step, desc="training", mininterval=1, disable=not first)

    def on_ctrl_c(*_):                                  # TRAP: an exception here could fall between weights, average and count
        stop.append(True)
        if scale.size() == 1:                           # torchrun passes one Ctrl-C on twice, and kills what goes on for 30 s
            signal.signal(signal.SIGINT, signal.SIG_DFL)                # a second Ctrl-C stops at once
    in_main = threading.current_thread() is threading.main_thread()     # only there may Python catch a signal
    before = signal.signal(signal.SIGINT, on_ctrl_c) if in_main else None
    try:
        while run.step < config.steps and not any(scale.total([len(stop)])):        # all ranks stop at the same step
            with scale.explain_memory(run.average.config, count(run.average), config, run.ranks):
                window.append(train_step(run))
            bar.update()
            if run.step % config.log_every == 0 or run.step == config.steps:
                row = summarize(window, run, time.time() - began)
                if run.step % config.gap_every == 0 or run.step == config.steps:
                    row["gap"] = evaluate.conditioning_gap(run.kit().model, run.words, run.diffusion, captions, latents)
                if first:
                    left = bar.format_dict["elapsed"] / (run.step - bar.initial) * (config.steps - run.step)
                    log.append({**row, "seconds_left": round(left)})
                    with open(log_path, "a") as file:
                        file.write(json.dumps(log[-1]) + "\n")
                    bar.set_postfix(lm=f"{row['lm']:.3f}", diff=f"{row['diffusion'] or 0:.3f}",
                                    gap=next((f"{r['gap']:.3f}" for r in reversed(log) if "gap" in r), "-"))
                window, began = [], time.time()
            if run.step % config.save_every == 0:
                save()
        save()
    finally:
        saver.wait()
        if in_main:
            signal.signal(signal.SIGINT, before)
        bar.close()
    return log, run.step == config.steps


def parse_arguments(argv=None):
    """(Config, resume, overwrite) of a command line."""
    parser = argparse.ArgumentParser(description="Train a Transfusion model. `python train.py` alone trains the first toy.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a named set of options; default: that of --data")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in the run's folder")
    parser.add_argument("--overwrite", action="store_true", help="start anew although the run's folder has a checkpoint")
    kinds = {f.name: type(f.default) for f in fields(Config)}
    for f in fields(Config):
        more = dict(action=argparse.BooleanOptionalAction) if kinds[f.name] is bool else dict(type=kinds[f.name], choices=f.metadata["choices"])
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {f.default})", **more)
    given = vars(parser.parse_args(argv))
    preset, resume, overwrite = (given.pop(k) for k in ("preset", "resume", "overwrite"))
    preset = preset or given.get("data", "scenes")
    if preset == "shards":
        raise data.UserError("--data shards needs one of the paper's sizes: --preset 0.16b, 0.37b, 0.76b, 1.4b or 7b")
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
    out, began, ranks = Path(config.out), time.time(), scale.start(config.shard)
    complete, incomplete = scale.found(out)
    say = print if scale.rank() == 0 else lambda *_, **__: None
    if complete and not (resume or overwrite):
        raise data.UserError(f"{out} already holds a run: add --resume to go on with it, --overwrite to start anew, or "
                             f"name another folder with --out")
    if resume and not complete:
        raise data.UserError(f"there is nothing to resume: {out}/checkpoints has no complete checkpoint")
    if out.exists() and not out.is_dir():
        raise data.UserError(f"{out} is a file: name another folder with --out")
    if config.data == "shards":
        raise data.UserError("--data shards: reading packed shards is not here yet")
    if resume:
        check_config(config, out)
    with scale.rank_0_first():                          # it may download
        test = data.load_pairs(config.data, config.data_dir or None, config.image_size, split="test", n=256, seed=config.seed,
                               categories=scenes.WORLDS[config.world], progress=False)
    run = prepare(config, out, ranks)
    if resume:
        run.step = complete[-1]
        scale.load(out, run.step, ranks, run.model, run.average, run.optimizer)
        skipped = "".join(f" (step_{step:06d} was not finished: skipped)" for step in incomplete)
        say(f"resuming from {scale.folder_of(out, run.step)}{skipped}")
    if scale.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        for step in complete * (not resume):            # --overwrite
            scale.remove(scale.folder_of(out, step))
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
    say(f"{config.data}: {len(run.documents.pairs.captions):,} pictures, {len(run.words)} words; model: {count(run.average):,} "
        f"parameters, {run.average.config.patches} patches per picture; {config.steps - run.step} steps to go; "
        f"{scale.size()} processes on {ranks.device.type}; prepared in {time.time() - began:.0f} s")
    log, finished = fit(run, out, test)
    found, trained = None, time.time() - began
    if finished:
        kit = run.kit()
        if scale.rank() == 0:
            plot_curves(log, out / "curves.png")
            save_kit(out / "model.pt", kit)
        if config.samples:                              # drawn on all ranks
            found, lines, shown = evaluate.report(kit, config.data, scenes.WORLDS[config.world], test, config.samples,
                                                  config.seed, steps=config.sample_steps, guidance=config.guidance,
                                                  sampler=config.sampler)
            found["train_seconds"] = trained
            if scale.rank() == 0:
                plot_samples(shown, out / "samples.png")
                (out / "report.json").write_text(json.dumps(found, indent=1))
            say(*lines, sep="\n")
            say(f"trained in {trained:.0f} s, all in {time.time() - began:.0f} s; look at {out}/samples.png and {out}/curves.png")
        else:
            say(f"trained in {trained:.0f} s; wrote {out}/model.pt")
    else:
        say(f"stopped and saved at step {run.step}; the same command with --resume goes on from there")
    scale.stop()
    return found


if __name__ == "__main__":
    data.run_command(main)
