"""
train.py: the loop                                (Transfusion §4.1 "Optimization", App. B.1, eq. 4)

THE IDEA    Draw documents, mix noise into their pictures, ask the transformer for the next words
            and for the noise, add the two losses, step. `torchrun ... train.py --preset 7b` runs
            the same lines on many GPUs.
A PICTURE   feed.batch -> t, eps -> model.losses -> eq. 4 -> backward -> AdamW -> average
                                                                        every so often: log, save
THE RULE    L = (sum of LM) / words  +  lambda (sum of DDPM) / pictures                    eq. 4
            Words and pictures are counted over all micro-batches of a step, on all processes.
OUT         out/<name>/   config.json, log.jsonl, curves.png, samples.png, report.json,
                          model.pt       the averaged weights: all that sample.py needs
                          checkpoints/   everything, to resume to the bit; with parts.pt, for
                                         scale/export.py, each is a model.pt while the run goes on
PAPER/HERE  same: AdamW (0.9, 0.95), decay 0.1, clip 1, warm-up, cosine to a twentieth, lambda = 5.
            our choice: sampling from an average of the weights (EMA).
            toys: `python train.py` alone takes five minutes on two cores. Some presets train
            rectified flow, where "the noise" is a velocity (config.py says why). Rates are 7e-4 to
            4e-3, where billions of parameters take 3e-4.
READ NEXT   sample.py, evaluate.py          TRY IT  python train.py
NOTEBOOK    notebooks/5_train_one.ipynb
TEST        tests/test_train.py (one step: accumulated = joint), tests/test_train_runs.py (resumed =
            uninterrupted), tests/test_distributed.py (2 processes = 1)
"""
import math
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import chameleon
import data
import evaluate
from config import parse_arguments
from metrics.gap import conditioning_gap
from metrics.progress import is_log_line, keep_model, log_line, summary
from model import count, losses, transfusion_loss
from scale import distributed, plan
from scale.distributed import say
from scale.run import WHOLE_MODEL, prepare, sole_run
from sources import scenes
from support import figures, reference, run_folder
from support.common import Stopped, finish_step_first, run_command, write_json
from support.origin import command_line


# ---------------------------------------------------------------------------------------- one step
def train_step(run):
    """One optimizer step: batches in, weights changed. run: scale.run.Run.

    Returns a dict of this process's part of the step: the sums "lm", "words", "tokens"; "each" and
    "t" (M,), the diffusion loss and the noise level of every picture; and "grad_norm".
    Raises UserError, before any weight is touched, if the gradient or a loss is not finite."""
    model = run.model.train()
    sharded = run.ranks.mesh is not None                # weights are divided: several processes
    processes = distributed.size() if sharded else 1

    # 1. Draw documents. A step is a fixed set of micro-batches, each a pure function of (seed,
    #    step, micro): a resumed run sees the same data as one that was never stopped, on any number
    #    of processes. This process takes its own share of them.
    batches = [run.feed.batch(run.config.seed, run.step, micro) for micro in run.micros]

    # 2. Count what eq. 4 divides by. Before the batches leave: to ask a GPU is to wait for it.
    # TRAP: counted over the whole step and over all processes, before anything is divided. A mean
    # of micro-batch means would give the words of short batches more weight (docs/PAPER.md §4.10).
    words = sum(int(batch.has_loss.sum()) for batch in batches)
    pictures = sum(len(batch.latents) for batch in batches)
    tokens = sum(int((batch.tokens != data.PAD).sum()) for batch in batches)
    all_words, all_pictures = total(run, [words, pictures])

    # 3. Noise, forward, two losses, their sum, backward. One micro-batch at a time: only one set of
    #    activations is in memory. The gradients add up in the weights. A GPU still computes with
    #    one micro-batch while the noise of the next is drawn.
    lm_sum = 0.0
    diff_each = []
    parts = []
    for k, batch in enumerate(batches, 1):
        if sharded:                                     # gradients travel after the last one only
            distributed.last_of_step(model, k == len(batches))
        draw_noise(batch)                               # t and eps, one of each per picture
        batch = batch.to(run.ranks.device)
        # Paper: eq. 1, a sum over words, and eq. 3, one number per picture.
        lm, _, diff = losses(model, batch, run.diffusion, model.config.stable)      # (), _, (M,)
        # Paper: eq. 4. This micro-batch's part of it: the parts add up to L.
        part = transfusion_loss(lm, all_words, diff.sum(), all_pictures, run.config.lam)
        # FSDP averages gradients over processes, but this loss is already divided by global
        # counts: undo the average.
        (part * processes).backward()
        # Detached, or the log would keep the whole graph alive. The log has eq. 3 as it is: a fork
        # that gives some pictures more weight does so in the sum above.
        lm_sum += lm.detach()
        diff_each.append(diff.detach())
        parts.append(part.detach())

    # 4. Clip the gradient, see that all is finite, step.
    L, norm = clip_gradient(run, sum(parts))
    lm_sum, L, norm, *parts = torch.stack([lm_sum, L, norm, *parts]).tolist()   # one wait for a GPU
    check_finite(run, batches, L, norm, parts)
    update_weights(run)
    return {
        "lm": lm_sum,
        "words": words,
        "tokens": tokens,
        "each": torch.cat(diff_each),
        "t": torch.cat([batch.t for batch in batches]),
        "grad_norm": norm,
    }


# What `train_step` calls, in the order in which it does.
def draw_noise(batch):
    """Give every picture its noise level t (M,) int64, and its noise eps (M, c, h, w)."""
    # Paper: App. B.2. t is uniform, but for a picture that precedes its caption only up to 500:
    # a caption cannot be learned from pure noise. On flow's schedule the limit is the t with as
    # much noise (sources.feed.same_noise: about 250). It comes with the document (t_max); t_min is
    # 1 unless an edit wants pure noise.
    # TRAP: one t per picture, not one per batch; and the network must be told the very t that the
    # noise has. Both mistakes train with a falling loss (docs/PAPER.md §4.3).
    spread = batch.t_max - batch.t_min + 1                                      # (M,)
    share = torch.rand(len(spread), generator=batch.generator)                  # (M,) in [0, 1)
    batch.t = batch.t_min + (share * spread).long()                             # (M,)
    batch.eps = torch.randn(batch.latents.shape, generator=batch.generator)     # (M, c, h, w)


def total(run, numbers):
    """Each of these numbers, summed over all processes. Every process must call it."""
    if run.ranks.mesh is None:                          # this process is alone
        return numbers
    return distributed.total(numbers, run.ranks.device)


def clip_gradient(run, part):
    """Scale the gradient down to the norm config.clip, if it is longer. Returns (L of eq. 4, the
    norm that the gradient had), scalar tensors.

    part    a scalar tensor, what this process's micro-batches add to L"""
    # Paper: App. B.1 clips the gradient's norm at 1.
    # TRAP: the norm of the whole gradient, so after all micro-batches and over all processes.
    weights = [weight for weight in run.model.parameters() if weight.grad is not None]
    if run.ranks.mesh is None:
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])
    else:
        part, norm = distributed.total_loss_and_norm(part, weights, run.ranks.mesh)
    torch.nn.utils.clip_grads_with_norm_(weights, run.config.clip, norm)
    return part, norm


def check_finite(run, batches, L, norm, parts):
    """Raise UserError if the step must not be taken: some process has a number that is not finite.

    batches   list of this process's data.Batch
    L, norm   floats, the whole loss, and the norm of the whole gradient
    parts     list of floats, what each batch adds to L"""
    # TRAP: one step with NaN ruins every weight, and then all that is saved. The losses, too: with
    # --lam 0 a loss can be infinite while the gradient is finite.
    if not (math.isfinite(L) and math.isfinite(norm)):  # sums of all: if one must stop, all do
        raise run.not_finite(norm, batches, parts)


def update_weights(run):
    """AdamW's step, at the rate of this step; then the average of the weights."""
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.config, run.step)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)           # frees the memory before the next forward
    run.step += 1
    update_average(run)


def learning_rate(config, step):
    """The rate of a step, counted from 0: linear warm-up to lr, then half a cosine to lr / 20."""
    # Paper: App. B.1, 4,000 steps of warm-up to 3e-4, then down to 1.5e-5.
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)       # 0 to 1
    wave = 0.5 * (1 + math.cos(math.pi * share))                                # 1 to 0
    return config.lr * (0.05 + 0.95 * wave)


@torch.no_grad()                                        # else it would remember every step's graph
def update_average(run):
    """Move the averaged weights a little towards the new ones."""
    # Our choice: pictures are drawn by this average (EMA). It is steadier than the weights of any
    # one step, whose last move still follows a single batch.
    if run.average is run.model:                        # --ema 0: no second copy
        return
    # Early on it must forget quickly, or the random first weights would stay in it for long.
    keep = min(run.config.ema, (1 + run.step) / (10 + run.step))
    averages = list(run.average.parameters())
    weights = list(run.model.parameters())
    # average += (1 - keep) * (weight - average), for all tensors in one call.
    torch._foreach_lerp_(averages, weights, 1 - keep)


# ---------------------------------------------------------------------------------------- the loop
def fit(run, out, signals):
    """Train to the last step, logging and saving. run: scale.run.Run; out: its folder; signals: see
    `asked_to_stop`. Returns the rows of the log."""
    config = run.config
    first = distributed.rank() == 0                     # one process speaks and writes for all
    log = run_folder.Log(out, run.step, is_log_line)
    saver = distributed.Saver(out, run.ranks, keep_every=config.keep_every)
    # (captions, latents, latents before) of pictures that are never trained on. A Llama has none.
    probe = None if config.model == "llama" else run.feed.held_out(128)
    distributed.wait()                                  # all have read log.jsonl: now rewrite it
    if first:
        log.start()
    bar = tqdm(total=run.end, initial=run.step, desc="training", mininterval=1, disable=not first)

    window = []                                         # what the steps since the last line gave
    began = time.time()
    try:
        while run.step < run.end and not asked_to_stop(signals, run.ranks.device):
            window.append(train_step(run))
            bar.update()
            last = run.step == run.end

            # A line of the log. The gap costs two forwards and, when weights are divided, a whole
            # copy of the model.
            if run.step % config.log_every == 0 or last:
                lr = learning_rate(config, run.step - 1)                # of the step just taken
                row = log_line(window, run, lr, time.time() - began)
                if probe and (run.step % config.gap_every == 0 or last):
                    row["gap"] = measure_gap(run, probe)
                if first:
                    log.add(row | {"seconds_left": seconds_left(bar)})
                    bar.set_postfix(summary(log))
                window = []
                began = time.time()

            # Everything that a resumed run needs. It is written while training goes on. And what
            # one can draw with and look at, long before a long run ends.
            if run.step % config.save_every == 0:
                saver.save(run.step, run.model, run.average, run.optimizer)
                if not last:                            # then the report draws more
                    paused = time.time()
                    keep_model(run, out)
                    began += time.time() - paused       # the log's speed is that of the steps
        saver.save(run.step, run.model, run.average, run.optimizer)         # unless just saved
    finally:
        saver.wait()                                    # also after an error: never half of a file
        bar.close()
    return log.rows


def asked_to_stop(signals, device="cpu"):
    """Whether any process was told to stop. signals: a list, empty until Ctrl-C or SIGTERM. Every
    process must call it. device: see `distributed.total`."""
    # All stop after the same step: one that went on would wait for the others' gradients for ever.
    return any(distributed.total([len(signals)], device))


def measure_gap(run, probe):
    """How much worse a wrong caption is than the right one (metrics/gap.py). 0: captions are
    ignored, and no loss curve would show it. Every process must call this."""
    with run.explain_memory(*WHOLE_MODEL):
        return conditioning_gap(run.gather_average(), run.feed.tokenizer, run.diffusion, *probe)


def seconds_left(bar):
    """How long the rest will take, at the speed so far."""
    steps = bar.n - bar.initial                         # without those before --resume
    return round(bar.format_dict["elapsed"] / steps * (bar.total - bar.n))


# ----------------------------------------------------------------------------------- the whole run
def report(run, out, trained):
    """Draw, caption, measure; write samples.png. Returns (dict of numbers, lines to print)."""
    config = run.config
    with run.explain_memory(*WHOLE_MODEL):
        numbers, lines, shown = evaluate.report(
            trained, config.data, scenes.WORLDS[config.world], run.feed.test, config.samples,
            config.seed, texts=run.feed.captions(32), train=run.feed.source, **run.drawing())
    if distributed.rank() == 0 and shown:
        figures.plot_samples(shown, out / "samples.png")
    return numbers, lines


def main(argv=None):
    """Train as the command line says. Returns the report's numbers, or None without a report."""
    config, resume, overwrite, planned = parse_arguments(argv)
    if planned:                                         # --dry-run: what it would cost
        print("\n".join(plan.dry_run(config, *planned)))
        return None

    with sole_run(config):                              # no other training writes to its folder
        return train(config, resume, overwrite, command_line("train.py", argv))


def train(config, resume, overwrite, command):
    """All of `main` after the command line. config: config.Config; command: that line."""
    # 1. Data, model, optimizer. Every mistake of the user's is found here, before the first step.
    began = time.time()
    out = Path(config.out)
    view = partial(chameleon.view, config.model)        # how a rival sees a document
    run = prepare(config, out, resume, overwrite, view, command)
    feed = run.feed
    to_go = run.end - run.step
    prepared = time.time() - began
    say(f"{config.data}: {feed.pictures:,} pictures, {len(feed.tokenizer)} words; "
        f"model: {count(run.average):,} parameters, {feed.shape.patches} patches per picture; "
        f"{to_go} steps to go on {distributed.size()} x {run.ranks.device.type}; "
        f"prepared in {prepared:.0f} s")
    if config.model == "transfusion" and run.diffusion.kind == "flow":
        say("It trains rectified flow, which the paper leaves to future work")

    # 2. The loop. Ctrl-C ends the step and saves.
    with run.explain_memory(), finish_step_first(alone=distributed.size() == 1) as signals:
        log = fit(run, out, signals)
    stopped = asked_to_stop(signals)

    # 3. A model to draw with, also after Ctrl-C.
    seconds = time.time() - began
    trained = keep_model(run, out, draw=stopped)
    like = reference.find(config)                       # the log of a run like this one
    if distributed.rank() == 0 and log:
        figures.plot_curves(log, out / "curves.png", like)
    if stopped:
        distributed.wait()                              # torchrun ends all when the first one ends
        raise Stopped(f"saved at step {run.step}; the same command with --resume goes on, with "
                      f"--resume --steps {run.step} it ends here; {run.how_to_use()}", signals)
    if not config.samples:
        say(f"trained in {seconds:.0f} s; {run.how_to_use()}")
        return None

    # 4. What it can do. The report draws on all processes.
    numbers, lines = report(run, out, trained)
    numbers["parameters"] = count(run.average)
    numbers["train_seconds"] = seconds
    if distributed.rank() == 0:
        write_json(out / "report.json", numbers)
    say(*lines, sep="\n")
    pictures = "" if config.model == "llama" else f"{out}/samples.png and "     # it draws none
    say(f"trained in {seconds:.0f} s, all in {time.time() - began:.0f} s; look at {pictures}"
        f"{out}/curves.png ({reference.describe(like)}); {run.how_to_use()}")
    return numbers


if __name__ == "__main__":
    run_command(main)
