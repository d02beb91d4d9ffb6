"""
progress.py: one line of a training's log                                (ours; docs/PAPER.md §4.14)

THE IDEA    What to look at while a model trains: both losses, the diffusion loss by noise level,
            the gradient, the speed. A loss that stands still at high noise and falls at low noise
            is normal; one number for all levels hides that.
A PICTURE   by_t         t = 1..200  201..400  401..600  601..800  801..1000       python train.py
            step   50         0.92      0.62      0.34      0.12       0.02
            step 4500         0.07      0.02      0.02      0.01       0.01
THE RULE    Sums and counts are added up over all processes and then divided. A mean of means would
            weigh a process with few pictures as much as one with many.
            At every save there is a model.pt to draw with, and a dozen pictures of it.
            A step whose gradient is five times as long as the median of its line is named: "spike".
READ NEXT   ../train.py        TEST  tests/test_train.py, tests/test_not_finite.py
"""
from statistics import median

import torch

from metrics import drawing
from scale import distributed, plan
from scale.run import WHOLE_MODEL
from support import checkpoint, figures

BINS = 5                                                # noise levels that the log tells apart
# Our choice: in the toys' runs, the longest gradient of 50 steps had at most 1.9 times the median.
SPIKE = 5


def log_line(window, run, lr, seconds):
    """One line of log.jsonl, a dict. Every process must call it.

    window: what the last steps returned (train.train_step); lr: the last step's learning rate;
    seconds: how long these steps took."""
    # 1. The loss of every picture of these steps, and of those of each noise level.
    loss = torch.cat([step["each"] for step in window]).cpu()
    t = torch.cat([step["t"] for step in window]).cpu()
    width = run.diffusion.T // BINS
    groups = [loss]
    for low in range(0, run.diffusion.T, width):
        inside = (t > low) & (t <= low + width)
        groups.append(loss[inside])

    # 2. The sums of all processes, in one message.
    sums = []
    for name in ("lm", "words", "tokens"):
        sums.append(sum(step[name] for step in window))
    for group in groups:
        sums += [group.sum().item(), len(group)]
    lm, words, tokens, *pairs = distributed.total(sums)

    # 3. Means. None: no picture had such noise, or there was no picture at all.
    means = []
    totals = pairs[::2]
    counts = pairs[1::2]
    for total, n in zip(totals, counts, strict=True):
        means.append(total / n if n else None)
    diffusion, *by_t = means

    # 4. How fast, and how much of what the device could do.
    flops = plan.flops_per_token(run.average)
    device = plan.device_name(run.ranks.device)
    speed = tokens / seconds
    row = {
        "step": run.step,
        "lm": lm / words,
        "diffusion": diffusion,
        "by_t": [mean and round(mean, 4) for mean in by_t],
        "grad_norm": window[-1]["grad_norm"],
        "lr": lr,
        "tokens_per_s": round(speed),
        "mfu": plan.mfu(flops, speed, device, distributed.size()),
    }
    return row | spike(window, run.step)


def spike(window, step):
    """{"spike": {"step", "grad_norm"}} of the longest gradient of these steps, if it is far longer
    than most; else {}. step: the last of them. It was clipped, so the weights moved no further than
    ever, but the loss may need many steps to recover."""
    norms = [taken["grad_norm"] for taken in window]
    longest = max(norms)
    if longest <= SPIKE * median(norms):
        return {}
    first = step - len(norms) + 1
    at = first + norms.index(longest)
    return {"spike": {"step": at, "grad_norm": longest}}


def is_log_line(row):
    """Whether a dict that was read from log.jsonl is one of `log_line`'s, as far as curves.png
    needs it."""
    by_t = row.get("by_t")
    if not isinstance(by_t, list) or len(by_t) != BINS:
        return False
    # None where no picture was seen. The words' loss is always there, the gap now and then.
    of_pictures = [row.get("diffusion"), *by_t]
    numbers = [number for number in of_pictures if number is not None]
    numbers += [row.get("lm"), row.get("gap", 0.0)]
    return all(type(number) in (int, float) for number in numbers)


def summary(log):
    """What the progress bar shows of a support.run_folder.Log: {name: text}."""
    row = log.rows[-1]
    texts = {"lm": f"{row['lm']:.3f}", "diff": "-", "gap": "-"}
    if row["diffusion"] is not None:                    # a rival has none
        texts["diff"] = f"{row['diffusion']:.3f}"
    if log.last("gap") is not None:                     # it is not measured at every line
        texts["gap"] = f"{log.last('gap'):.3f}"
    if row["mfu"] is not None:                          # the peak of a CPU is not known
        texts["mfu"] = f"{row['mfu']:.1%}"
    return texts


def keep_model(run, out, draw=True):
    """Write model.pt and, with `draw`, a dozen pictures to samples.png, as of now. Returns the
    checkpoint.Trained. Every process must call it.

    run: scale.run.Run; out: its folder"""
    trained = run.gather_trained()

    # 1. Draw, all processes together. A Llama has no pictures.
    config = run.config
    shown = []
    if draw and config.samples and config.model != "llama":
        prompts = run.feed.prompts(12)
        with run.explain_memory(*WHOLE_MODEL):
            shown = drawing.glance(trained, prompts, config.seed, **run.drawing())

    # 2. Write, one process alone.
    if distributed.rank() == 0:
        checkpoint.save_trained(out / "model.pt", trained)
        if shown:
            figures.plot_samples(shown, out / "samples.png")
    return trained
