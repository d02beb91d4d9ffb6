"""
progress.py: one line of a training's log

THE IDEA    What to look at while a model trains: both losses, the diffusion loss by noise level, the gradient, the speed. A loss that
            stands still at high noise and falls at low noise is normal; one number for all levels hides that.
READ NEXT   ../train.py        TEST  tests/test_train.py
"""
import torch

from scale import distributed, plan

BINS = 5                                                # noise levels of the diffusion loss in the log


def log_line(window, run, lr, seconds):
    """One line of log.jsonl, a dict. window: what the last steps returned (train.train_step); lr: of the last step;
    seconds: how long they took. Every process must call it."""
    each = torch.cat([step["each"] for step in window]).cpu()
    t = torch.cat([step["t"] for step in window]).cpu()
    width = run.diffusion.T // BINS
    groups = [each]
    for low in range(0, run.diffusion.T, width):
        groups.append(each[(t > low) & (t <= low + width)])

    # The sums of all processes, in one message.
    sums = [sum(step[name] for step in window) for name in ("lm", "words", "tokens")]
    for group in groups:
        sums += [group.sum().item(), len(group)]
    lm, words, tokens, *pairs = distributed.total(sums)

    means = [total / n if n else None for total, n in zip(pairs[::2], pairs[1::2])]
    diffusion, *by_t = means
    return {
        "step": run.step,
        "lm": lm / words,
        "diffusion": diffusion,
        "by_t": [mean and round(mean, 4) for mean in by_t],
        "grad_norm": window[-1]["grad_norm"],
        "lr": lr,
        "tokens_per_s": round(tokens / seconds),
        "mfu": plan.mfu(plan.flops_per_token(run.average), tokens / seconds,
                        plan.device_name(run.ranks.device), distributed.size()),
    }


def summary(log):
    """What the progress bar shows of a support.run_folder.Log: {name: text}."""
    row = log.rows[-1]
    shown = {"lm": f"{row['lm']:.3f}", "diff": "-", "mfu": "-", "gap": "-"}
    if row["diffusion"] is not None:
        shown["diff"] = f"{row['diffusion']:.3f}"
    if row["mfu"] is not None:
        shown["mfu"] = f"{row['mfu']:.1%}"
    if log.last("gap") is not None:
        shown["gap"] = f"{log.last('gap'):.3f}"
    return shown
