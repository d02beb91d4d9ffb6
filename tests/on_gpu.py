"""
on_gpu.py: everything that is claimed of a GPU, measured on one

    python tests/on_gpu.py --out gpu.json               one GPU, torch 2.11 or newer; about ten
                                                        minutes; exit status 1 if an aim is missed
    python tests/on_gpu.py --seconds 200                what is worth most, as far as it fits
    python tests/on_gpu.py --only "flex = dense,where time goes"
    python tests/on_gpu.py --tiny --device cpu          the same functions with tiny numbers, to see
                                                        that they run

Not a pytest file: pytest runs its tiny pass only (tests/test_plan.py). Each function measures one
thing. One that fails does not end the others, and the file is written anew after each. Steps of
training are those of train.train_step, on random rows: half of them text, half text and pictures.
The aims are the project's own. What a machine gave belongs into docs/SCALE.md, with its name.
"""
import argparse
import collections
import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))
import chameleon
import data
import train
from attention_mask import attend, dense_mask, intervals, tile_mask
from config import parse_arguments
from diffusion import Diffusion
from model import PAPER_LATENT, PAPER_VOCABULARY, count, sized
from sample import generate
from scale import distributed, plan
from scale.feed import Ahead
from scale.run import build_feed, build_run
from sources import scenes
from support.checkpoint import encode_pixels, load_trained
from support.common import ASSETS, UserError, run_command

ROOT = Path(__file__).resolve().parents[1]
GiB = 2 ** 30


@dataclasses.dataclass
class Numbers:
    """How much is measured. The defaults are the real sizes, for a GPU.

    T, kernel_T         positions per row; the same where the kernel is compared with the formula
    latent              (c, h, w) of a picture
    small, middle       rows of model.SIZES that fit in one GPU whole
    large               the one that does not fit; `layers` of its layers do
    rows                per step, of the small one, the middle one and the large one's layers
    steps               that are timed
    toy                 documents and steps of the toy, when precisions are compared
    sample_steps        diffusion steps per picture"""
    T: int = 4096
    kernel_T: int = 1024
    latent: tuple = PAPER_LATENT
    vocabulary: int = PAPER_VOCABULARY
    small: str = "0.16b"
    middle: str = "0.76b"
    large: str = "7b"
    layers: int = 4
    rows: tuple = (16, 8, 4)
    steps: int = 4
    toy: tuple = (32, 60)
    sample_steps: int = 25


TINY = Numbers(T=256, kernel_T=256, latent=(4, 16, 16), vocabulary=500, small="toy", middle="toy",
               large="toy", layers=2, rows=(2, 2, 2), steps=1, toy=(4, 3), sample_steps=2)


@dataclasses.dataclass
class Row:
    """One line of the report.

    value       a number, or None
    reached     whether the aim is; None: there is none, or it could not be measured
    meaning     what the number is
    more        a dict of further numbers, for the file"""
    value: float | None
    reached: bool | None
    meaning: str
    aim: object = "-"
    more: dict = dataclasses.field(default_factory=dict)


# --------------------------------------------------------------------------------- what is needed
def random_rows(shape, rows, seed):
    """A data.Batch of full rows of shape.context, with latents. Row 0, 2, ...: three documents of
    words. Row 1, 3, ...: two documents of captions of 20 words, each with its picture. Of one row,
    the seed says which."""
    rng = np.random.default_rng(seed)
    pair = shape.patches + 22               # 20 words, BOI, EOI

    def words(n):
        return rng.integers(len(data.SPECIAL), shape.vocabulary, n).tolist()

    def document(room, pictures):
        parts = []
        many = (room - 1 - int(rng.integers(1, 40))) // pair if pictures else 0
        for m in range(many):
            parts += [words(20), ("image", m, 1000)]
        parts.append(words(room - 2 - many * pair))             # BOS and EOS
        return data.lay_out(parts, None, shape.patches)

    laid_out = []
    for row in range(rows):
        pictures = (row + (seed if rows == 1 else 0)) % 2 == 1
        documents = 2 if pictures else 3
        cuts = [shape.context * k // documents for k in range(documents + 1)]
        laid_out.append([document(end - begin, pictures)
                         for begin, end in zip(cuts, cuts[1:], strict=False)])
    batch = data.to_batch(laid_out, shape.context)
    assert (batch.tokens != data.PAD).all()
    batch.latents = torch.randn(len(batch.images), *shape.latent,
                                generator=torch.Generator().manual_seed(seed))
    return batch


class RandomFeed:
    """`random_rows` as a feed: see sources/feed.py. Four micro-batches, again and again."""

    def __init__(self, shape, rows):
        self.shape = shape
        self.vae = torch.nn.Identity()
        self.kept = [random_rows(shape, rows, seed) for seed in range(4)]

    def batch(self, seed, step, micro):
        """data.Batch of a micro-batch."""
        generator = torch.Generator().manual_seed(1000 * step + micro)
        return dataclasses.replace(self.kept[(step + micro) % 4], generator=generator)

    def learned(self):
        """The share of the positions at which a word is learned."""
        has_loss = torch.cat([batch.has_loss.flatten() for batch in self.kept])
        return has_loss.float().mean().item()


@contextlib.contextmanager
def eager_on_cpu(device):
    """Inside, torch.compile compiles for a GPU only: a CPU's compiler takes minutes."""
    if device.type == "cuda":
        yield
        return
    with mock.patch("torch.compile", functools.partial(torch.compile, backend="eager")):
        yield


def random_run(n, ranks, size, rows, accumulate, *options, layers=None, **changes):
    """A scale.run.Run at step 0 that trains a size of model.SIZES on random rows.

    rows, accumulate    per micro-batch, and micro-batches per step
    options             of train.py's command line
    layers, changes     of model.ModelConfig, if not that of the size"""
    preset = size if size.endswith("b") else "shards"
    config, *_ = parse_arguments([
        "--preset", preset, "--documents", str(rows), "--accumulate", str(accumulate), *options])
    shape = sized(size, vocabulary=n.vocabulary, latent=n.latent, context=n.T,
                  encoder=config.encoder)
    shape = dataclasses.replace(shape, layers=layers or shape.layers, **changes)
    feed = RandomFeed(shape, rows)
    # Drawn on the GPU: 1B weights take ten seconds on a CPU.
    with torch.device(ranks.device), eager_on_cpu(ranks.device):
        return build_run(config, ranks, Ahead(feed), Diffusion(), None)


def wait(device):
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device):
    """Give back the memory of models that nobody uses. FSDP's are cycles of references, which `del`
    leaves alive."""
    torch._dynamo.reset()                   # compiled code may hold some, too
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def seconds(run, device, times, warmup=3):
    """Seconds per call of run()."""
    for _ in range(warmup):
        run()
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        run()
    wait(device)
    return (time.perf_counter() - began) / times


def memory(device):
    """(GiB in use now, GiB at most since `free`) on a GPU; (None, None) on a CPU."""
    if device.type != "cuda":
        return None, None
    now = torch.cuda.memory_allocated(device) / GiB
    return now, torch.cuda.max_memory_allocated(device) / GiB


# -------------------------------------------------------------------------------------- attention
def flex_is_dense(n, ranks):
    """Outputs and gradients of FlexAttention's kernel and of the dense mask, on packed rows,
    float32 and bfloat16."""
    device = ranks.device
    T = n.kernel_T
    shape = sized("toy", vocabulary=n.vocabulary, latent=(4, 16, 16), context=T)
    batch = random_rows(shape, 2, seed=1).to(device)
    lo, hi = intervals(batch.image_id, batch.doc_id)
    apart = {}
    worst = 0.0
    for dtype, allowed in ((torch.float32, 1e-2), (torch.bfloat16, 4e-2)):      # TF32 included
        q, k, v, weights = torch.randn(4, 2, 4, T, 64, device=device, dtype=dtype)
        flex = outputs_and_gradients(q, k, v, weights, tile_mask(lo, hi))
        dense = outputs_and_gradients(q, k, v, weights, dense_mask(lo, hi)[:, None])
        for name, one, two in zip("y q k v".split(), flex, dense, strict=False):
            difference = ((one - two).float().norm() / two.float().norm()).item()
            apart[f"{name} {dtype}"] = difference
            worst = max(worst, difference / allowed)
    return Row(worst, worst <= 1, "largest relative difference, in units of 0.01 (float32) or 0.04 "
               "(bfloat16)", 1, apart)


def outputs_and_gradients(q, k, v, weights, mask):
    """[attention's output, and on a GPU the gradients of q, k, v]. FlexAttention has no backward
    pass on a CPU."""
    cuda = q.device.type == "cuda"
    inputs = [x.clone().requires_grad_(cuda) for x in (q, k, v)]
    y = attend(*inputs, mask)
    if not cuda:
        return [y]
    return [y, *torch.autograd.grad((y * weights).sum(), inputs)]


def kernel_against_flash(n, ranks):
    """Forward and backward of one layer's attention: FlexAttention with pictures in the row,
    against causal flash."""
    device = ranks.device
    shape = sized(n.large, vocabulary=n.vocabulary, latent=n.latent, context=n.T)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    K = shape.width // shape.heads
    *inputs, weights = torch.randn(4, 1, shape.heads, n.T, K, device=device, dtype=dtype)
    inputs = [x.clone().requires_grad_(cuda) for x in inputs]

    def backward(y):
        if cuda:
            torch.autograd.grad(y, inputs, weights)

    def flash():
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            backward(F.scaled_dot_product_attention(*inputs, is_causal=True))

    took = {"flash": seconds(flash, device, 10)}
    batch = random_rows(shape, 1, seed=1).to(device)                # two documents, pictures
    one = torch.zeros_like(batch.doc_id)
    rows = {"two documents with pictures": (batch.image_id, batch.doc_id),
            "one causal document": (one - 1, one)}
    for name, ids in rows.items():
        mask = tile_mask(*intervals(*ids))

        def flex(mask=mask):
            backward(attend(*inputs, mask))

        took[name] = seconds(flex, device, 10)
    ratio = took["flash"] / took["one causal document"]
    return Row(ratio, ratio >= 0.6, "speed of FlexAttention's kernel / of a causal flash kernel, "
               "both on one causal document", 0.6, took)


# --------------------------------------------------------------------------------------- training
def train_case(n, ranks, size, rows, in_all, *options, aim=None, **changes):
    """The Row of one way to take a step: MFU, seconds, memory beside the plan's.

    rows, in_all    per micro-batch, and per step
    options         of train.py; changes: of the model's shape"""
    device = ranks.device
    began = time.perf_counter()
    run = random_run(n, ranks, size, rows, max(1, in_all // rows), *options, **changes)
    wait(device)
    built = time.perf_counter() - began

    taken = [train.train_step(run)]
    wait(device)
    first = time.perf_counter() - began - built
    taken.append(train.train_step(run))
    graphs = counters["stats"]["unique_graphs"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)      # without the compiler's own
    took = seconds(lambda: taken.append(train.train_step(run)), device, n.steps, warmup=1)
    rest, most = memory(device)

    tokens = run.config.accumulate * rows * n.T
    # The head works only where a word is learned. `flops_per_token` counts it at every place, as
    # the literature does; here that would flatter the MFU by a twentieth.
    flops = plan.flops_per_token(run.average)
    flops -= 6 * (1 - run.feed.learned()) * count(run.model.head)
    mfu = plan.mfu(flops, tokens / took, plan.device_name(device))
    lines = plan.memory(run.average, 1, rows, run.config.checkpointing, run.config.ema > 0,
                        ranks.dtype.itemsize)
    more = {
        "seconds": took, "tokens_per_s": tokens / took, "built": built, "first_step": first,
        "rest_GiB": rest, "peak_GiB": most, "plan_GiB": plan.total_bytes(lines) / GiB,
        "plan": {what: number / GiB for what, number, _ in lines},
        "new_graphs": counters["stats"]["unique_graphs"] - graphs,
        "losses": [[step["lm"] / step["words"], step["each"].mean().item()] for step in taken],
        "parameters": count(run.average),
    }
    finite = all(math.isfinite(loss) for losses in more["losses"] for loss in losses)
    reached = None if aim is None or mfu is None else mfu >= aim
    if not finite or more["new_graphs"]:
        reached = False
    memory_words = "" if most is None else f"{most:.1f} GiB, planned {more['plan_GiB']:.1f}; "
    return Row(mfu, reached, f"MFU; {tokens / took:,.0f} tokens/s; {memory_words}first step after "
               f"{built + first:.0f} s", aim or "-", more)


def case(which, rows, *options, aim=None, **changes):
    """A measurement: `train_case` of one of the three sizes. rows: per micro-batch; 0: as many as
    there are per step."""
    def measurement(n, ranks):
        size = (n.small, n.middle, n.large)[which]
        in_all = n.rows[which]
        if which == 2:
            changes["layers"] = n.layers
        return train_case(n, ranks, size, min(rows, in_all) or in_all, in_all, *options, aim=aim,
                          **changes)
    return measurement


def odd_vocabulary(n, ranks):
    """The small model, its vocabulary not padded to a multiple of 128."""
    with mock.patch("model.WIDE", math.inf):
        return train_case(n, ranks, n.small, n.rows[0] // 2, n.rows[0])


def where_time_goes(n, ranks):
    """Of the small model's step: which kernels take how long, how long the GPU has nothing to do,
    and where Python waits for the GPU."""
    device = ranks.device
    run = random_run(n, ranks, n.small, n.rows[0] // 2, 2)
    for _ in range(3):
        train.train_step(run)
    wait(device)
    if device.type != "cuda":
        return Row(None, None, "a GPU's only")

    # 1. Where Python waits.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train.train_step(run)
        torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter()
    for warning in caught:
        if "synchroniz" in str(warning.message):
            places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1

    # 2. Which kernels take how long.
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        began = time.perf_counter()
        train.train_step(run)
        wait(device)
        took = time.perf_counter() - began
    kernels = []
    for event in profile.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.append((event.self_device_time_total / 1e6, event.count, event.key[:90]))
    kernels.sort(reverse=True)
    busy = sum(time for time, _, _ in kernels) / took

    # 3. What the CPU does alone.
    def draw():
        batch = run.feed.batch(0, 1, 0)
        train.draw_noise(batch)
        return batch

    drawing = seconds(draw, device, 5, warmup=1)
    batch = draw()
    sending = seconds(lambda: batch.to(device), device, 5, warmup=1)
    more = {"seconds": took, "busy": busy, "kernels": kernels[:40], "syncs": dict(places),
            "drawing_a_micro_batch": drawing, "sending_it": sending}
    per_micro = sum(places.values()) / 2
    return Row(per_micro, per_micro <= 3, f"times that Python waits for the GPU, per micro-batch; "
               f"the GPU is busy {busy:.0%} of a step (profiled)", 3, more)


def dense_is_slower(n, ranks):
    """A step at the large width with the dense mask, against FlexAttention."""
    size, rows = n.large, n.rows[2]
    took = []
    for function in (tile_mask, dense_mask):
        with mock.patch("model.tile_mask", function):
            row = train_case(n, ranks, size, 1, rows, layers=n.layers)
        took.append(row.more["seconds"])
        free(ranks.device)
    ratio = took[1] / took[0]
    return Row(ratio, ratio >= 1.4, "time with the dense mask / with FlexAttention", 1.4)


def full_size(n, ranks):
    """The whole 7B with fp32 AdamW on one GPU: does it train, and in how much memory?"""
    device = ranks.device
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory / GiB
        if there < 120:
            return Row(None, None, f"skipped: needs about 110 GiB, this GPU has {there:.0f}",
                       "102-109")
    options = ("--checkpointing", "--ema", "0")
    return train_case(n, ranks, n.large, 1, 1, *options)


# ------------------------------------------------------------------- the same numbers as on the CPU
def toy_run(n, ranks, folder):
    """The Run of `python train.py --preset flow`, with few pictures."""
    documents, steps = n.toy
    config, *_ = parse_arguments([
        "--preset", "flow", "--pairs", "512", "--documents", str(documents), "--steps", str(steps),
        "--warmup", "10", "--out", str(folder)])
    diffusion = Diffusion(config.diffusion, shift=config.shift)
    view = functools.partial(chameleon.view, config.model)
    with mock.patch("sources.choose.load_source", small_source):
        feed = build_feed(config, Path(folder), diffusion, None, False, view)
    return build_run(config, ranks, feed, diffusion, None)


def small_source(config, split, n=None, progress=True):
    """512 pictures of one object each."""
    return scenes.load_scenes(512, seed=split != "train", categories=scenes.WORLDS["one"],
                              progress=False)


def curve(run, steps):
    """(steps, 2): both losses of so many steps."""
    rows = []
    for _ in range(steps):
        step = train.train_step(run)
        rows.append([step["lm"] / step["words"], step["each"].mean().item()])
    return torch.tensor(rows)


def toy_on_both(n, ranks):
    """The toy's losses in float32 on the CPU, in float32 here, and as train.py computes here."""
    device = ranks.device
    steps = n.toy[1]
    with tempfile.TemporaryDirectory() as folder:
        alone = distributed.Ranks(torch.device("cpu"))
        cpu = curve(toy_run(n, alone, folder), min(steps, 15))
        moved = toy_run(n, alone, folder)
        for module in (moved.model, moved.average):
            module.to(device)
        moved.ranks = distributed.Ranks(device)
        exact = curve(moved, steps)
        half = curve(toy_run(n, ranks, folder), steps)
    same = ((exact[:len(cpu)] - cpu).abs() / cpu).max().item()
    last = max(1, steps // 4)
    two, three = exact[-last:].mean(0), half[-last:].mean(0)
    apart = ((three - two).abs() / two).max().item()
    fine = same <= 1e-3 and apart <= 0.02
    return Row(apart, fine, f"relative, bfloat16 against float32 over the last quarter of {steps} "
               f"steps; float32 here against the CPU, {len(cpu)} steps: {same:.1e} (aim: 1e-3)",
               0.02, {"float32": two.tolist(), "as trained": three.tolist(), "cpu": same})


def sampling(n, ranks):
    """Prompts to the shipped model: the same picture as on the CPU? And 16 mixed prompts, as one
    batch and one at a time."""
    device = ranks.device
    trained = load_trained(ASSETS / "scenes.pt", device)
    options = dict(max_words=20, steps=n.sample_steps, sampler="dpm++")
    prompt = [["a red circle"]]
    here = generate(trained, prompt, draw_now=True, seed=1, **options)
    there = generate(load_trained(ASSETS / "scenes.pt"), prompt, draw_now=True, seed=1, **options)
    one, two = (first_picture(document[0]) for document in (here, there))
    apart = ((one.cpu() - two).norm() / two.norm()).item()

    pairs = scenes.load_scenes(16, 0, progress=False)
    pictures = encode_pixels(trained, pairs.pixels)
    prompts = []
    for k in range(16):                     # words; a picture; both; and a second caption
        caption = pairs.captions[k]
        after = pairs.captions[(k + 1) % 16]
        kinds = [[caption], [pictures[k]], [caption, pictures[k]], [caption, pictures[k], after]]
        prompts.append(kinds[k % 4])

    def write(numbers):
        generate(trained, [prompts[k] for k in numbers], seed=numbers, **options)

    def one_by_one():
        for k in range(4):                  # one of each kind
            write([k])

    # One call each before the clock runs: the first time is the kernels' first, too.
    alone = 4 * seconds(one_by_one, device, times=1, warmup=1)
    together = seconds(lambda: write(list(range(16))), device, times=1, warmup=1)
    faster = alone / together
    return Row(faster, faster >= 4 and apart <= 1e-2, f"times faster, 16 mixed prompts as one "
               f"batch ({together:.2f} s); the picture of one seed differs by {apart:.1e} from the "
               f"CPU's (aim: 0.01)", 4, {"together": together, "apart": apart})


def first_picture(document):
    """The first latent of a document."""
    return next(part for part in document if isinstance(part, torch.Tensor))


# -------------------------------------------------------------------------------------- whole runs
def chameleon_preset(n, ranks):
    """`train.py --preset chameleon`, whose rows of 160 positions are no multiple of 128."""
    with tempfile.TemporaryDirectory() as folder:
        train.main(["--preset", "chameleon", "--out", folder, "--pairs", "256", "--steps", "6",
                    "--documents", str(n.toy[0] // 2), "--samples", "0", "--log-every", "1"])
        losses = read_losses(folder)
    return Row(losses[-1][0], losses[-1][0] < losses[0][0], "its LM loss after 6 steps, from "
               f"{losses[0][0]:.3f}", "falls")


def a_whole_run(n, ranks):
    """train.py from the first step to the last, as it runs on this machine: FSDP, checkpoints,
    compiled blocks, FlexAttention. Then its last checkpoint is lost, and it is resumed:
    does it end with the same weights?"""
    compiled = ["--compile"] if ranks.device.type == "cuda" else []
    with tempfile.TemporaryDirectory() as folder:
        options = ["--out", folder, "--seq-len", "640", "--pairs", "256", "--steps", "4"]
        options += ["--documents", str(4 * n.toy[0]), "--save-every", "2", "--samples", "0"]
        options += compiled
        ends = []
        for resume in ([], ["--resume"]):
            train.main(options + resume)
            ends.append(load_trained(Path(folder) / "model.pt").model.state_dict())
            distributed.remove(distributed.folder_of(folder, 4))
    whole, resumed = ends
    apart = 0.0
    for name, weight in whole.items():
        size = weight.norm().clamp(min=1e-6)
        apart = max(apart, ((weight - resumed[name]).norm() / size).item())
    return Row(apart, apart <= 0.01, "largest relative difference of a weight, resumed against "
               "uninterrupted", 0.01)


def two_gpus(n, ranks):
    """Two processes with NCCL take the steps of one."""
    if ranks.device.type != "cuda" or torch.cuda.device_count() < 2:
        return Row(None, None, "skipped: needs two GPUs", 1e-2)
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            out = f"{folder}/{processes}"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                       "--nproc-per-node", str(processes), "train.py", "--accumulate", "2",
                       "--pairs", "256", "--steps", "6", "--documents", "16", "--samples", "0",
                       "--log-every", "1", "--out", out]
            subprocess.run(command, cwd=ROOT, check=True, timeout=120)
            ends.append(torch.tensor(read_losses(out)))
    apart = ((ends[1] - ends[0]).abs() / ends[0]).max().item()
    return Row(apart, apart <= 1e-2, "largest relative difference of a loss, 6 steps", 1e-2)


def read_losses(folder):
    """[(LM, diffusion loss or 0)] of the lines of a run's log."""
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["lm"], row["diffusion"] or 0.0) for row in rows]


# ------------------------------------------------------------------------------------- the report
# What is worth most comes first. The seconds are what an H100 with 16 CPU cores took, the last
# five guessed; the compiler takes most of them.
# `case`: 0 is the small size, 1 the middle one, 2 layers of the 7B.
NO_COMPILE = "--no-compile"
AGAIN = "--checkpointing"
MEASUREMENTS = {
    "flex = dense": (flex_is_dense, 18),
    "7B layers: 1 row": (case(2, 1, "--no-checkpointing", aim=0.46), 10),
    "7B layers: 1 row checkpointed": (case(2, 1, aim=0.36), 10),
    "0.16B: 8 rows": (case(0, 8, aim=0.4), 9),
    "where time goes": (where_time_goes, 5),
    "0.16B: 1 row": (case(0, 1), 15),
    "0.76B: 1 row": (case(1, 1), 13),
    "kernel against causal flash": (kernel_against_flash, 5),
    "Chameleon: rows of 160": (chameleon_preset, 8),
    "toy on both devices": (toy_on_both, 9),
    "0.76B: 8 rows checkpointed": (case(1, 8, AGAIN, aim=0.4), 14),
    "0.16B: 16 rows": (case(0, 0, aim=0.4), 10),
    "sampling": (sampling, 5),
    "0.16B U-Net: 4 rows": (case(0, 4, "--encoder", "unet"), 16),
    "0.76B: 4 rows": (case(1, 4, aim=0.4), 11),
    "7B layers: 4 rows checkpointed": (case(2, 4, aim=0.36), 11),
    "0.16B: 8 rows odd vocabulary": (odd_vocabulary, 4),
    "0.16B: 8 rows not compiled": (case(0, 8, NO_COMPILE), 9),
    "0.16B: 16 rows checkpointed": (case(0, 0, AGAIN), 12),
    "7B layers: 2 rows": (case(2, 2, "--no-checkpointing", aim=0.46), 10),
    "7B layers: 1 row not compiled": (case(2, 1, "--no-checkpointing", NO_COMPILE), 8),
    "0.16B: 2 rows": (case(0, 2), 12),
    "0.16B U-Net: 1 row": (case(0, 1, "--encoder", "unet"), 15),
    "train.py resumed": (a_whole_run, 20),
    "step against dense mask": (dense_is_slower, 25),
    "two GPUs": (two_gpus, 60),
    "memory of the 7B with AdamW": (full_size, 60),
}
VERDICTS = {True: "reached", False: "NOT REACHED", None: "-"}


def run_one(name, n, ranks):
    """The Row of one measurement, also if it fails: one must not cost the others."""
    function, _ = MEASUREMENTS[name]
    try:
        row = function(n, ranks)
    except Exception as problem:
        traceback.print_exc()
        lines = str(problem).splitlines() or [""]
        row = Row(None, False, f"{type(problem).__name__}: {lines[0]}", "runs",
                  {"traceback": traceback.format_exc()})
    free(ranks.device)
    return row


def measure(n, ranks, names, budget, report):
    """{name: Row as a dict} of the named measurements, printed as they come.

    budget      seconds; what would take longer than what is left of it is skipped
    report      called with the results after each"""
    results = {}
    began = time.monotonic()
    for name in names:
        start = time.monotonic()
        left = budget - (start - began)
        if MEASUREMENTS[name][1] > left:
            row = Row(None, None, f"skipped: {left:.0f} s are left")
        else:
            row = run_one(name, n, ranks)
        took = time.monotonic() - start
        results[name] = dataclasses.asdict(row) | {"took": took}
        number = "-" if row.value is None else f"{row.value:.3f}"
        print(f"{name:34s} {number:>8s}  aim {row.aim!s:8s} {VERDICTS[row.reached]:11s} "
              f"{row.meaning}  ({took:.0f} s)", flush=True)
        report(results)
    return results


def start(device):
    """The distributed.Ranks of a world of one, with a mesh: as train.py has it on a GPU."""
    if device.type == "cuda":
        return distributed.start()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return distributed.Ranks(device, dist.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)))


def parse(argv):
    """The command line's options. Raises UserError for a machine or a name that is not there."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the results here, as JSON, after each")
    parser.add_argument("--only", help="names of measurements, with commas between them")
    parser.add_argument("--seconds", type=float, default=math.inf, help="in all; what does not "
                        "fit is skipped")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true",
                        help="tiny numbers: only to see that everything runs")
    options = parser.parse_args(argv)
    options.names = options.only.split(",") if options.only else list(MEASUREMENTS)
    unknown = [name for name in options.names if name not in MEASUREMENTS]
    if unknown:
        raise UserError(f"there is no measurement {unknown[0]!r}: choose from "
                        f"{'; '.join(MEASUREMENTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU here; --tiny --device cpu only checks that the "
                        "script runs")
    if options.device == "cpu" and not options.tiny:
        raise UserError("the full sizes need a GPU: add --tiny to run on a CPU")
    return options


def main(argv=None):
    """Measure, print, write. Returns the results."""
    options = parse(argv)
    ranks = start(torch.device(options.device))
    about = {"device": plan.device_name(ranks.device), "torch": torch.__version__,
             "cores": os.cpu_count(), "tiny": options.tiny}
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)

    def report(results):
        if options.out:
            text = json.dumps(about | {"results": results}, indent=1)
            Path(options.out).write_text(text)

    try:
        n = TINY if options.tiny else Numbers()
        results = measure(n, ranks, options.names, options.seconds, report)
    finally:
        distributed.stop()
    if not options.tiny and any(row["reached"] is False for row in results.values()):
        sys.exit(1)
    return results


if __name__ == "__main__":
    run_command(main)
