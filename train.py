"""
train.py: the loop                                                          (Transfusion §4.1 "Optimization", eq. 4)

THE IDEA    Draw documents, mix noise into their pictures, ask the transformer for the next words and for the noise, add
            the two losses, step. `python train.py` does it in five minutes on two cores and ends with a report and
            pictures. `torchrun ... train.py --preset 7b` runs the same lines on many GPUs.
A PICTURE   feed.batch --> t, eps --> model.losses --> eq. 4 --> backward --> AdamW --> average --> log, checkpoint
THE RULE    L = (sum of LM over all words) / words + lambda (sum of DDPM over all pictures) / pictures         eq. 4
            words and pictures are counted over all micro-batches of a step, on all processes, before dividing.
OUT         out/<name>/: config.json, log.jsonl, curves.png, samples.png, report.json,
            model.pt (the averaged weights, all that sample.py needs), checkpoints/ (everything, to resume to the bit)
PAPER/HERE  same: AdamW (0.9, 0.95), decay 0.1, clip 1, warm-up, cosine to a twentieth, lambda = 5.
            our choice: no weight decay on vectors (norms, biases); sampling from an average of the weights (EMA);
            a toy learns at 1e-3 to 2e-3, where the paper's billions of parameters take 3e-4.
READ NEXT   sample.py, evaluate.py        TRY IT  python train.py        NOTEBOOK notebooks/3_train_a_tiny_one.ipynb
TEST        tests/test_train.py (resumed = uninterrupted, accumulated = joint, 2 processes = 1)
"""
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import chameleon
import data
import evaluate
from config import MAY_CHANGE_ON_RESUME, parse_arguments
from diffusion import Diffusion
from metrics.gap import conditioning_gap
from metrics.progress import log_line, summary
from model import count, losses, transfusion_loss
from scale import distributed, plan
from scale.run import WHOLE_MODEL, build_feed, build_run
from sources import scenes
from support import checkpoint, figures, run_folder
from support.common import UserError, finish_step_first, run_command


# ------------------------------------------------------------------------------------------------------------- one step
def train_step(run):
    """One optimizer step: data in, weights changed. Returns a dict of this process's sums: "lm", "words", "tokens";
    "each" and "t", the loss and the noise level of every picture; and "grad_norm". Raises UserError, before the weights
    are touched, if the gradient is not finite."""
    config = run.config
    many = run.ranks.mesh is not None                   # several processes, or a GPU
    model = run.model.train()

    # 1. The batches of this step, a fixed set of micro-batches that the processes share out.
    batches = [run.feed.batch(config.seed, run.step, micro) for micro in run.micros]
    for batch in batches:
        draw_noise(batch)
    batches = [batch.to(run.ranks.device) for batch in batches]

    # 2. What the sums of eq. 4 are divided by. TRAP: counted over the whole step, on all processes. A mean of
    #    micro-batch means gives the words of short batches more weight.
    words = sum(int(batch.has_loss.sum()) for batch in batches)
    pictures = sum(len(batch.images) for batch in batches)
    all_words, all_pictures = distributed.total([words, pictures]) if many else (words, pictures)

    # 3. Forward and backward, one micro-batch at a time. The gradients add up.
    lm_sum, per_picture = 0.0, []
    for k, batch in enumerate(batches, 1):
        if many:
            distributed.last_of_step(model, k == len(batches))
        lm, _, each = losses(model, batch, run.diffusion, model.config.stable)
        loss = transfusion_loss(lm, all_words, each.sum(), all_pictures, config.lam)        # eq. 4
        # FSDP averages the gradients of the processes, but this loss is already divided by global counts: undo it.
        (loss * run.ranks.size).backward()
        lm_sum += lm.detach()
        per_picture.append(each.detach())

    # 4. Clip, step, average. Paper App. B.1: clip the norm of the whole gradient at 1.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    norm = distributed.gather(norm) if many else norm
    check_finite(norm, run)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, run.step)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    update_average(run)
    return {"lm": lm_sum.item(), "words": words, "tokens": sum(int((b.tokens != data.PAD).sum()) for b in batches),
            "each": torch.cat(per_picture), "t": torch.cat([b.t for b in batches]), "grad_norm": norm.item()}


def draw_noise(batch):
    """Fill in t (M,), uniform in t_min..t_max of each picture, and eps (M, c, h, w)."""
    spread = batch.t_max - batch.t_min + 1
    batch.t = batch.t_min + (torch.rand(len(spread), generator=batch.generator) * spread).long()
    batch.eps = torch.randn(batch.latents.shape, generator=batch.generator)


def learning_rate(config, step):
    """Linear warm-up, then half a cosine down to a twentieth. Paper §4.1: 3e-4 to 1.5e-5."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))


@torch.no_grad()                                        # else the average would remember every step's graph
def update_average(run):
    """Our choice: sample from an exponential moving average of the weights (EMA)."""
    if run.average is run.model:                        # --ema 0
        return
    keep = min(run.config.ema, (1 + run.step) / (10 + run.step))        # it forgets its random start quickly
    torch._foreach_lerp_(list(run.average.parameters()), list(run.model.parameters()), 1 - keep)


def check_finite(norm, run):
    """Raise UserError if the gradient's norm is not a number: a step with it would ruin every weight."""
    if not math.isfinite(norm):
        raise UserError(f"the gradient of step {run.step + 1} is not finite ({norm.item()}): nothing was learned from it, "
                        f"and the last checkpoint is still good; lower --lr, raise --warmup, or look at the data")


# ------------------------------------------------------------------------------------------------------------- the loop
def fit(run, out):
    """Train to the last step, logging and saving. Returns (log rows, finished). Ctrl-C ends the step, saves, and stops."""
    config = run.config
    first = distributed.rank() == 0                     # one process speaks and writes for all
    log = run_folder.Log(out, run.step)
    saver = distributed.Saver(out, run.ranks)
    probe = None if config.model == "llama" else run.feed.held_out(128)
    distributed.wait()                                  # before rank 0 writes what the others read
    if first:
        log.start()

    window, began = [], time.time()                     # what the steps since the last line of the log have returned
    bar = tqdm(total=config.steps, initial=run.step, desc="training", mininterval=1, disable=not first)
    try:
        with finish_step_first(alone=distributed.size() == 1) as pressed:
            while run.step < config.steps and not any(distributed.total([len(pressed)])):   # all stop at the same step
                window.append(train_step(run))
                bar.update()
                last = run.step == config.steps
                if run.step % config.log_every == 0 or last:
                    row = log_line(window, run, learning_rate(config, run.step - 1), time.time() - began)
                    if probe and (run.step % config.gap_every == 0 or last):
                        row["gap"] = measure_gap(run, probe)
                    if first:
                        log.add(row | {"seconds_left": seconds_left(bar)})
                        bar.set_postfix(summary(log))
                    window, began = [], time.time()
                if run.step % config.save_every == 0:
                    saver.save(run.step, run.model, run.average, run.optimizer)
            saver.save(run.step, run.model, run.average, run.optimizer)
    finally:
        saver.wait()
        bar.close()
    return log.rows, run.step == config.steps


def measure_gap(run, probe):
    """Does the model use its captions? See metrics/gap.py. Every process must call it."""
    with run.explain_memory(*WHOLE_MODEL):
        return conditioning_gap(run.gather_average(), run.feed.tokenizer, run.diffusion, *probe)


def seconds_left(bar):
    """How long the rest will take, by the speed of this session."""
    done = bar.n - bar.initial
    return round(bar.format_dict["elapsed"] / done * (bar.total - bar.n))


# -------------------------------------------------------------------------------------------------- after the last step
def report(run, out, trained):
    """Draw, caption, measure; write report.json and samples.png. Returns (numbers, lines to print)."""
    config = run.config
    drawing = {"steps": config.sample_steps, "guidance": config.guidance, "sampler": config.sampler}
    with run.explain_memory(*WHOLE_MODEL):
        numbers, lines, shown = evaluate.report(trained, config.data, scenes.WORLDS[config.world], run.feed.test,
                                                config.samples, config.seed, texts=run.feed.captions(32), **drawing)
    if distributed.rank() == 0 and shown:
        figures.plot_samples(shown, out / "samples.png")
    return numbers, lines


def main(argv=None):
    """Train as the command line says; returns the report's numbers."""
    config, resume, overwrite, planned = parse_arguments(argv)
    if planned:
        print("\n".join(plan.dry_run(config, *planned)))
        return None

    # 1. Is the folder free, or the same run's?
    began = time.time()
    out = Path(config.out)
    ranks = distributed.start(config.shard)
    distributed.micro_batches(config.accumulate)        # can they be dealt out? Said before anything is read
    say = print if distributed.rank() == 0 else lambda *_, **__: None
    complete, incomplete = distributed.list_checkpoints(out)
    run_folder.check_start(out, complete, resume, overwrite)
    if resume:
        run_folder.check_same_run(out, config, MAY_CHANGE_ON_RESUME)

    # 2. Data, then model.
    start = checkpoint.load_trained(config.init) if config.init else None
    if start and start.kind != config.model:
        raise UserError(f"{config.init} is a {start.kind}, not a {config.model}: --model must be what the checkpoint is")
    diffusion = start.diffusion if start else Diffusion(config.diffusion, shift=config.shift)
    feed = build_feed(config, out, diffusion, start, resume, partial(chameleon.view, config.model))
    run = build_run(config, ranks, feed, diffusion, start)
    if resume:
        run_folder.check_same_data(out, feed.describe())
        run.step = complete[-1]
        with run.explain_memory("the checkpoint is read", 0):
            distributed.load(out, run.step, ranks, run.model, run.average, run.optimizer)
        skipped = "".join(f" (step_{step:06d} was not finished: skipped)" for step in incomplete)
        say(f"resuming from {distributed.folder_of(out, run.step)}{skipped}")
    if distributed.rank() == 0:
        for step in complete if not resume else []:     # --overwrite
            distributed.remove(distributed.folder_of(out, step))
        run_folder.write_config(out, config, feed.describe())
    say(f"{config.data}: {feed.pictures:,} pictures, {len(feed.tokenizer)} words; model: {count(run.average):,} parameters, "
        f"{feed.shape.patches} patches per picture; {config.steps - run.step} steps to go; {distributed.size()} processes "
        f"on {ranks.device.type}; prepared in {time.time() - began:.0f} s")

    # 3. The loop.
    with run.explain_memory():
        log, finished = fit(run, out)
    if not finished:
        say(f"stopped and saved at step {run.step}; the same command with --resume goes on from there")
        return None
    seconds = time.time() - began

    # 4. A model to draw with, and what it can do.
    trained = run.gather_trained()
    if distributed.rank() == 0:
        figures.plot_curves(log, out / "curves.png")
        checkpoint.save_trained(out / "model.pt", trained)
    if not config.samples:
        say(f"trained in {seconds:.0f} s; wrote {out}/model.pt")
        return None
    numbers, lines = report(run, out, trained)
    numbers["train_seconds"] = seconds
    if distributed.rank() == 0:
        (out / "report.json").write_text(json.dumps(numbers, indent=1))
    say(*lines, sep="\n")
    samples = f"{out}/samples.png and " if (out / "samples.png").exists() else ""
    say(f"trained in {seconds:.0f} s, all in {time.time() - began:.0f} s; look at {samples}{out}/curves.png")
    return numbers


if __name__ == "__main__":
    run_command(main)
