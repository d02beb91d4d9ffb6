"""
train.py: the loop                                                            (Transfusion §4.1 "Optimization", eq. 4)

THE IDEA    Draw documents, mix noise into their pictures, ask the transformer for the next words and for the noise, add the
            two losses, step. `python train.py` does it in five minutes on two cores and ends with a report and pictures;
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
import json
import math
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import chameleon
import data
import edits
import evaluate
import plan
import scale
import scenes
import sources
import vae as vae_module
from diffusion import Diffusion, same_noise
from kit import Kit, find_vae, load_kit, save_kit
from model import Transfusion, count, losses, sized
from presets import AFTERWARDS, Config, parse_arguments
from shards import Shards
from show import plot_curves, plot_samples
from train_vae import train_vae


# ------------------------------------------------------------------------------------------------------------ preparation
WHOLE = "a whole copy of the model is measured", 2      # what for, and bytes per parameter: see scale.explain_memory


@dataclass
class Run:
    """Everything that a step needs. latents: (mean, deviation) of all pictures, each (N, c, h, w); None: in the shards.
    codes: (N, h, w), of all pictures, for a Chameleon.
    On several ranks, model and average are divided among them: `average` holds tensors, and only `kit` can be asked. With
    --ema 0 the average is the model itself."""
    config: Config
    ranks: scale.Ranks
    model: Transfusion
    average: Transfusion
    optimizer: torch.optim.Optimizer
    words: data.Words
    vae: vae_module.VAE
    diffusion: Diffusion
    documents: data.Documents | edits.EditDocuments | Shards
    latents: tuple | None
    codes: torch.Tensor | None = None
    step: int = 0

    def kit(self):
        """The averaged model, whole on every rank, ready to sample. Every rank must call it."""
        average = scale.whole(lambda: Transfusion(self.average.config), self.average, self.ranks.dtype)
        return Kit(average.eval(), self.words, self.vae, self.diffusion, self.config.model, self.config.text_share)

    def explain_memory(self, *what):
        """`scale.explain_memory` for this run."""
        return scale.explain_memory(self.average.config, self.config, self.ranks, *what)

    def devices(self):
        """(name of this rank's device, how many of them): what MFU is measured against."""
        return plan.device_name(self.ranks.device), scale.size()


def load_source(config, split="train", n=None):
    """The Pairs, or Edits, that the configuration names; None for shards, which keep no pixels."""
    if config.data == "shards":
        return None
    if config.data == "edits":
        return edits.load_edits(config.data_dir or None, config.image_size, split, n or config.pairs, config.seed)
    return sources.load_pairs(config.data, config.data_dir or None, config.image_size, split, n or config.pairs, config.seed,
                              scenes.WORLDS[config.world], progress=split == "train" and scale.rank() == 0)


def prepare(config, out, ranks=None, resume=False):
    """The Run at step 0; trains a VAE if there is none, after everything that can be wrong has been checked. resume: the VAE
    that this run trained is in `out`; without it, what lies there is another run's."""
    ranks = ranks or scale.start(config.shard)
    scale.micro_batches(config.accumulate)              # can they be dealt out?
    start = load_kit(config.init) if config.init else None
    diffusion = start.diffusion if start else Diffusion(config.diffusion, shift=config.shift)
    noise = dict(drop=config.drop, t_limit=diffusion.T if config.t_limit == 1000 else
                 same_noise(diffusion, 100 if config.data == "edits" else config.t_limit))
    coded = config.model == "chameleon"
    if start and start.kind != config.model:
        raise data.UserError(f"{config.init} is a {start.kind}, not a {config.model}: --model must be what the checkpoint is")
    if config.data == "shards":                         # tokens and latents are ready, whatever their number
        documents = Shards(config.data_dir or "packed", **noise, text_only=config.model == "llama")
        if config.model == "transfusion" and documents.codes:
            raise data.UserError(f"the shards of {documents.folder} hold codes, which are for --model chameleon: pack latents, with the --vae "
                                 f"of a VAE")
        if coded and not documents.codes:
            raise data.UserError(f"the shards of {documents.folder} hold latents, which are for Transfusion: pack codes, with the --vae of a "
                                 f"VQ-VAE (train_vae.py --codes)")
        if coded and config.codes not in (0, documents.codes):
            raise data.UserError(f"the shards of {documents.folder} hold {documents.codes} codes, not {config.codes}: leave --codes out")
        documents.must_have(seq_len=config.seq_len, **({"patch": config.patch} if config.model == "transfusion" else {}))
        words, vae, latent = documents.words, documents.vae(config.vae), tuple(documents.settings["latent"])
        if start:
            documents.must_be_of(config.init, start.words, start.vae, vae)
        if resume:
            check_shards(documents, out)
        vae.to(ranks.device)
        shape = shape_of(config, len(words) + documents.codes * coded, latent, start)
        return assemble(config, ranks, shape, start, words, vae, diffusion, documents, None)
    pairs = load_source(config)
    words, side, channels = start.words if start else data.Words(pairs.vocabulary()), *pairs.pixels.shape[2:]
    words.encode(" ".join(sorted(pairs.vocabulary())))  # a word that --init does not know: say so now
    vae = start.vae if start else find_vae(config.data, config.vae, out / "vae.pt" if resume else None, coded)
    vae_config = vae.config if vae else vae_module.VAEConfig(image_channels=channels, codes=(config.codes or 512) * coded)
    f = 2 ** (len(vae_config.multipliers) - 1)
    if vae_config.image_channels != channels or side % f:
        raise data.UserError(f"the VAE takes pictures of {vae_config.image_channels} channels, with sides divisible by {f}; "
                             f"--data {config.data} has {channels} channels and {side} pixels")
    if config.codes not in (0, vae_config.codes):
        raise data.UserError(f"this VQ-VAE has {vae_config.codes} codes, not {config.codes}: leave --codes out, or train another with "
                             f"train_vae.py --codes {config.codes} and name it with --vae")
    shape = shape_of(config, len(words) + vae_config.codes, (vae_config.z, side // f, side // f), start)
    kind, more = (edits.EditDocuments, {}) if config.data == "edits" else (data.Documents, dict(text_share=config.text_share))
    documents = kind(pairs, shape.patches, config.seq_len, **more, **noise)
    if documents.longest() > config.seq_len:
        raise data.UserError(f"the longest document takes {documents.longest()} positions and does not fit in a context of "
                             f"{config.seq_len}: raise --seq-len{'' if coded else ' or --patch'}")
    if vae is None:
        with scale.rank_0_first():
            if scale.rank() == 0:
                vae_module.save(out / "vae.pt", vae_module.pack_vae(train_vae(pairs.pixels, vae_config, config.vae_steps, seed=config.seed)))
            vae = find_vae(config.data, out / "vae.pt", codes=coded)
    vae, said, none = vae.to(ranks.device), scale.rank() == 0, torch.zeros(0, *shape.latent)
    latents = (none, none) if coded else vae_module.encode_all(vae, pairs.pixels, progress=said)
    codes = vae_module.encode_all_codes(vae, pairs.pixels, progress=said) if coded else None
    return assemble(config, ranks, shape, start, words, vae, diffusion, documents, latents, codes)


def shape_of(config, vocabulary, latent, start):
    """The ModelConfig of a run: that of the checkpoint it starts from, if there is one."""
    if start is None:
        patch = 1 if config.model == "chameleon" else config.patch      # a code for every place
        return sized(config.size, vocabulary=vocabulary, latent=latent, patch=patch, encoder=config.encoder, stable=config.stable,
                     patch_position=config.patch_position, bidirectional=config.bidirectional, context=config.seq_len)
    shape = start.model.config
    if shape.latent != latent or shape.context < config.seq_len or shape.vocabulary != vocabulary:
        raise data.UserError(f"{config.init} has latents {shape.latent}, {shape.vocabulary} tokens and a context of {shape.context}, "
                             f"but these data have {latent}, {vocabulary} and {config.seq_len}: set --image-size and --seq-len to fit")
    return shape


def assemble(config, ranks, shape, start, words, vae, diffusion, documents, latents, codes=None):
    """The Run at step 0: the model with its first weights, or those of the Kit `start`; its average, its optimizer."""
    torch.manual_seed(config.seed)
    make = lambda: Transfusion(shape)
    with scale.explain_memory(shape, config, ranks, "process 0 draws the first weights in main memory", 4):
        model = scale.spread((lambda: start.model.train()) if start else make, ranks, config.checkpointing, config.compile)
        # --ema 0 keeps no second copy: at 7B on one GPU that is 27 GB
        average = scale.hold(make, {k: v.detach().clone() for k, v in model.state_dict().items()}) if config.ema else model
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == large] for large in (True, False))
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=config.decay), dict(params=vectors, weight_decay=0.0)],
                                  lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)          # Paper App. B.1
    return Run(config, ranks, model, average, optimizer, words, vae, diffusion, documents, latents, codes)


# --------------------------------------------------------------------------------------------------------------- one step
def draw_batch(run, step, micro):
    """The Batch of a micro-batch, with latents, t and eps: a pure function of (seed, step, micro)."""
    rng = np.random.default_rng([run.config.seed, step, micro])
    see = lambda document, codes: chameleon.seen_by(run.config.model, document, codes, len(run.words))
    if run.latents is None:                             # whole rows, with their latents or codes
        batch = run.documents.batch(run.config.seed, step, micro, run.config.documents, run.config.accumulate, see)
    else:
        drawn = [see(run.documents.draw(rng), run.codes) for _ in range(run.config.documents)]
        rows = [data.lay_out(document, run.words, run.documents.patches) for document in drawn]
        batch = data.pack(rows, run.config.seq_len)
    g = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
    normal = lambda: torch.randn(len(batch.images), *run.average.config.latent, generator=g)
    if run.latents is not None:
        mean, deviation = run.latents
        batch.latents = mean[batch.images] + deviation[batch.images] * normal()                   # a draw from q(z | x)
    spread = batch.t_max - batch.t_min + 1
    batch.t = batch.t_min + (torch.rand(len(batch.images), generator=g) * spread).long()          # uniform in t_min..t_max
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
    for k, batch in enumerate(batches, 1):
        scale.last_of_step(model, k == len(batches))
        lm, _, each = losses(model, batch, run.diffusion, run.average.config.stable)
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
    if run.average is not run.model:
        keep = min(config.ema, (1 + run.step) / (10 + run.step))        # the average forgets its random start quickly
        with torch.no_grad():                                           # else the average would remember every step's graph
            torch._foreach_lerp_(list(run.average.parameters()), list(run.model.parameters()), 1 - keep)
    return {"lm": lm_total.item(), "words": mine, "each": torch.cat(per_picture), "t": torch.cat(t), "grad_norm": norm.item(),
            "tokens": sum(int((b.tokens != data.PAD).sum()) for b in batches)}


# ------------------------------------------------------------------------------------------------------------ bookkeeping
def check_config(config, out):
    """Raise UserError if the run in `out` had another configuration, in a way that changes the run."""
    try:
        before = json.loads((out / "config.json").read_text())
        before = asdict(Config()) | before              # an older run lacks the newest options
        changed = [k for k, v in asdict(config).items() if before[k] != v and k not in AFTERWARDS]
        if config.data == "shards" and before["documents"] * before["accumulate"] == config.documents * config.accumulate:
            changed = [k for k in changed if k not in ("documents", "accumulate")]      # the same rows in smaller pieces
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise data.UserError(f"{out}/config.json cannot be read ({problem}): is {out} the folder of a run?") from None
    if changed:
        raise data.UserError(f"{out} was trained with " + ", ".join(f"--{k.replace('_', '-')} {before[k]}" for k in changed) +
                             "; resume with the same options, or start a new run with another --out")


def check_shards(documents, out):
    """Raise UserError if the run in `out` has learned from shards of another tokenizer, VAE, or layout than `documents`."""
    before = json.loads((out / "config.json").read_text()).get("packed") or {}
    other = [k for k, v in before.items() if documents.settings.get(k) != v]
    if other:
        raise data.UserError(f"{out} has learned from shards with another {' and '.join(other)} ({before[other[0]]}, now "
                             f"{documents.settings.get(other[0])}): put those back, or start a new run with another --out")


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
            "tokens_per_s": round(tokens / seconds), "mfu": plan.mfu(plan.flops_per_token(run.average), tokens / seconds, *run.devices())}


# --------------------------------------------------------------------------------------------------------------- the loop
def fit(run, out, test):
    """Train to the last step, logging and saving. Returns (log, finished). Ctrl-C ends the step, saves, and stops."""
    config, log, window, began, stop, first = run.config, [], [], time.time(), [], scale.rank() == 0
    log_path, saver = out / "log.jsonl", scale.Saver(out, run.ranks)
    save = lambda: saver.save(run.step, run.model, run.average, run.optimizer)
    if run.step and log_path.exists():
        lines = [line for line in log_path.read_text().splitlines() if line.endswith("}")]     # a killed run may leave half of one
        log = [row for row in map(json.loads, lines) if row["step"] <= run.step]
    scale.wait()                                        # before rank 0 writes what the others read
    if first:
        log_path.write_text("".join(json.dumps(row) + "\n" for row in log))
    probe = None if config.model == "llama" else evaluate.gap_probe(test, run.vae, 128) if test else run.documents.held_out(128)
    bar = tqdm(total=config.steps, initial=run.step, desc="training", mininterval=1, disable=not first)

    def on_ctrl_c(*_):                                  # TRAP: an exception here could fall between weights, average and count
        stop.append(True)
        if scale.size() == 1:                           # torchrun passes one Ctrl-C on twice, and kills what goes on for 30 s
            signal.signal(signal.SIGINT, signal.SIG_DFL)                # a second Ctrl-C stops at once
    in_main = threading.current_thread() is threading.main_thread()     # only there may Python catch a signal
    before = signal.signal(signal.SIGINT, on_ctrl_c) if in_main else None
    try:
        while run.step < config.steps and not any(scale.total([len(stop)])):        # all ranks stop at the same step
            with run.explain_memory():
                window.append(train_step(run))
            bar.update()
            if run.step % config.log_every == 0 or run.step == config.steps:
                row = summarize(window, run, time.time() - began)
                if probe and (run.step % config.gap_every == 0 or run.step == config.steps):
                    with run.explain_memory(*WHOLE):
                        row["gap"] = evaluate.conditioning_gap(run.kit().model, run.words, run.diffusion, *probe)
                if first:
                    left = bar.format_dict["elapsed"] / (run.step - bar.initial) * (config.steps - run.step)
                    log.append({**row, "seconds_left": round(left)})
                    with open(log_path, "a") as file:
                        file.write(json.dumps(log[-1]) + "\n")
                    bar.set_postfix(lm=f"{row['lm']:.3f}", diff="-" if row["diffusion"] is None else f"{row['diffusion']:.3f}",
                                    mfu="-" if row["mfu"] is None else f"{row['mfu']:.1%}",
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


def main(argv=None):
    """Train as the command line says; returns the report's numbers."""
    config, resume, overwrite, planned = parse_arguments(argv)
    if planned:
        return print("\n".join(plan.dry_run(config, *planned)))
    out, began, ranks = Path(config.out), time.time(), scale.start(config.shard)
    complete, incomplete = scale.found(out)
    say = print if scale.rank() == 0 else lambda *_, **__: None
    if complete and not (resume or overwrite):
        raise data.UserError(f"{out} already holds a run: add --resume to go on with it, --overwrite to start anew, or "
                             f"name another folder with --out")
    if resume and not complete:
        raise data.UserError(f"there is nothing to resume: {out}/checkpoints has no complete checkpoint")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())         # before anything is trained
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise data.UserError(f"{out} cannot be written: {there} is {'read-only' if there.is_dir() else 'a file'}; name another "
                             f"folder with --out")
    if resume:
        check_config(config, out)
    with scale.rank_0_first():                          # it may download
        test = load_source(config, "test", n=256)
    run = prepare(config, out, ranks, resume)
    if resume:
        run.step = complete[-1]
        with run.explain_memory("the checkpoint is read", 0):
            scale.load(out, run.step, ranks, run.model, run.average, run.optimizer)
        skipped = "".join(f" (step_{step:06d} was not finished: skipped)" for step in incomplete)
        say(f"resuming from {scale.folder_of(out, run.step)}{skipped}")
    if scale.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        for step in complete * (not resume):            # --overwrite
            scale.remove(scale.folder_of(out, step))
        packed = {} if test else {"packed": run.documents.settings}
        (out / "config.json").write_text(json.dumps(asdict(config) | packed, indent=1))
    pictures = len(run.documents.pairs.pixels) if test else run.documents.pictures
    say(f"{config.data}: {pictures:,} pictures, {len(run.words)} words; model: {count(run.average):,} "
        f"parameters, {run.average.config.patches} patches per picture; {config.steps - run.step} steps to go; "
        f"{scale.size()} processes on {ranks.device.type}; prepared in {time.time() - began:.0f} s")
    log, finished = fit(run, out, test)
    found, trained = None, time.time() - began
    if finished:
        with run.explain_memory(*WHOLE):
            kit = run.kit()
        if scale.rank() == 0:
            plot_curves(log, out / "curves.png")
            save_kit(out / "model.pt", kit)
        if config.samples:                              # drawn on all ranks; shards keep no pixels to compare with
            texts = [] if test else [run.words.decode(ids) for ids in run.documents.held_out(32)[0]]
            with run.explain_memory(*WHOLE):
                found, lines, shown = evaluate.report(kit, config.data, scenes.WORLDS[config.world], test, config.samples,
                                                      config.seed, texts=texts, steps=config.sample_steps,
                                                      guidance=config.guidance, sampler=config.sampler)
            found["train_seconds"] = trained
            if scale.rank() == 0:
                (out / "report.json").write_text(json.dumps(found, indent=1))
                if shown:
                    plot_samples(shown, out / "samples.png")
            say(*lines, sep="\n")
            say(f"trained in {trained:.0f} s, all in {time.time() - began:.0f} s; look at {f'{out}/samples.png and ' if shown else ''}{out}/curves.png")
        else:
            say(f"trained in {trained:.0f} s; wrote {out}/model.pt")
    else:
        say(f"stopped and saved at step {run.step}; the same command with --resume goes on from there")
    return found


if __name__ == "__main__":
    data.run_command(main)
