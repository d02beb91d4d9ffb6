"""
benchmark.py: how fast it is on this machine, in one run                              (issue 15)

THE IDEA    A share says more than a time. What the cores could do at most is measured first, on one
            large product of matrices. Then what a training step and a drawing do of it.
THE RULE    share = (numbers multiplied and added by a step, as FlopCounterMode counts them)
                    / (seconds of the step * peak)
            Attention's kernel and all that is not a product of matrices count as nothing.
PEER        If `transfusion-pytorch` is installed (it is not a requirement of ours), its step stands
            beside ours: the same documents, width, layers and heads, one step of each in turn.
TRY IT      python -m tests.benchmark                  about three minutes on two quiet cores
            python -m tests.benchmark --busy           one thread, and its CPU seconds instead of
                                                       time: for a machine that has other work
            python -m tests.benchmark --quick          to see that it runs
TEST        tests/test_benchmark.py
"""
import argparse
import dataclasses
import itertools
import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import data
import model as model_module
import sample
import train
import vae as vae_module
from config import parse_arguments
from diffusion import Diffusion
from patchify import patchify
from scale import distributed
from scale.run import build_feed, build_run
from support.checkpoint import Trained, load_trained
from support.common import ASSETS, keep_memory

ROOT = Path(__file__).resolve().parents[1]
CAPTION = "a red circle"

# What an operation of torch's is counted as, in "where a step's time goes": part of its name.
KINDS = {
    "products of matrices": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention's kernel": ("scaled_dot_product",),
    "copies (cat, copy, index, scatter)": ("cat", "copy_", "index", "scatter", "masked_select"),
    "the optimizer and the average": ("adamw", "lerp_", "Optimizer"),
    "element by element, norms, sums": ("aten::",),
    "PyTorch itself": ("",),
}


# ---------------------------------------------------------------------------------------- measuring
def median_of(call, clock, repeats):
    """Median seconds of a call, of so many, after one that does not count."""
    call()
    seconds = []
    for _ in range(repeats):
        began = clock()
        call()
        seconds.append(clock() - began)
    return statistics.median(seconds)


def measure_peak(clock, repeats):
    """Multiplications and additions per second in float32, of two matrices of 1024 x 1024."""
    a = torch.randn(1024, 1024)
    return 2 * 1024 ** 3 / median_of(lambda: a @ a, clock, 5 * repeats)


# Run by a small Python of its own: what a program started from here weighs begins with our weight.
WEIGH = """
import json, resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def run_command(words, folder):
    """(seconds, CPU seconds, peak MiB) of a program of this repository with its options, started in
    `folder`. It has as many threads as we have."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    program = [sys.executable, str(ROOT / words[0]), *words[1:]]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", WEIGH, *program], check=True, cwd=folder,
                          capture_output=True, env=os.environ | threads)
    seconds = time.perf_counter() - began
    return seconds, *json.loads(done.stdout)


# ----------------------------------------------------------------------------------- training steps
def make_run(width, folder):
    """scale.run.Run of the toy of --preset flow, with another width; heads of 32, as the toy's."""
    config, *_ = parse_arguments(["--preset", "flow", "--pairs", "400", "--out", str(folder)])
    diffusion = Diffusion(config.diffusion, shift=config.shift)
    feed = build_feed(config, folder, diffusion, None, False, lambda first_code: None)
    feed.shape = dataclasses.replace(feed.shape, width=width, heads=width // 32)
    return build_run(config, distributed.start(0), feed, diffusion, None)


def count_work(run, step):
    """Multiplications and additions in the matrix products of a step, and its tokens."""
    run.step = step
    with FlopCounterMode(display=False) as counter:
        tokens = train.train_step(run)["tokens"]
    return counter.get_total_flops(), tokens


def where_time_goes(run, steps):
    """{kind of KINDS: its share of the time of a few steps}."""
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        for _ in range(steps):
            train.train_step(run)
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in recording.key_averages():
        for kind, parts in KINDS.items():
            if any(part in event.key for part in parts):
                seconds[kind] += event.self_cpu_time_total
                break
    total = sum(seconds.values())
    return {kind: spent / total for kind, spent in seconds.items()}


def measure_step(width, clock, repeats, peak, folder):
    """A dict: tokens per second and share of the peak of a step, where the time goes, and, if the
    peer is installed, how many times faster we are."""
    run = make_run(width, folder)
    speeds = []                                         # tokens per second
    shares = []
    train.train_step(run)
    for step in range(1, repeats + 1):
        work, tokens = count_work(run, step)
        seconds = time_step(run, step, clock)           # the same batch once more, now timed
        speeds.append(tokens / seconds)
        shares.append(work / seconds / peak)
    found = {
        "tokens_per_s": statistics.median(speeds),
        "share_of_peak": statistics.median(shares),
        "where": where_time_goes(run, max(2, repeats // 2)),
    }
    peer = peer_step(run)
    if peer:
        found["times faster than the peer"] = times_faster(run, peer, clock, repeats)
        # The peer has a row for each document, as long as the longest. Here all are about equal, so
        # that it has no more padding than we have.
        run.feed.documents.text_share = 0.0
        run.feed.documents.another = 0.0
        name = "times faster than the peer, documents of one length"
        found[name] = times_faster(run, peer, clock, repeats)
    return found


def time_step(run, step, clock):
    """Seconds of our training step number `step`."""
    run.step = step
    began = clock()
    train.train_step(run)
    return clock() - began


def times_faster(run, peer, clock, repeats):
    """Median of (seconds of the peer's step / seconds of ours), on the same documents, in turn."""
    ratios = []
    for step in range(repeats + 1):
        ours = time_step(run, step, clock)
        documents = peer_documents(run, step)
        began = clock()
        peer(documents)
        ratios.append((clock() - began) / ours)
    return statistics.median(ratios[1:])                # the first one does not count


def peer_step(run):
    """A function that takes one training step of transfusion-pytorch, of our size, on documents as
    `peer_documents` makes them; None if it is not installed."""
    try:
        from transfusion_pytorch import Transfusion
    except ImportError:
        return None
    shape = run.feed.shape
    numbers = shape.latent[0] * shape.patch ** 2        # of a patch
    hidden = run.model.blocks[0].down.in_features
    side = shape.latent[1] // shape.patch
    peer = Transfusion(
        num_text_tokens=shape.vocabulary,
        dim_latent=numbers,
        modality_default_shape=(side, side),
        transformer={
            "dim": shape.width,
            "depth": shape.layers,
            "dim_head": shape.width // shape.heads,
            "heads": shape.heads,
            # It makes two thirds of this factor times the width, for it has three matrices, too.
            "ff_expansion_factor": 1.5 * hidden / shape.width,
        })
    optimizer = torch.optim.AdamW(peer.parameters_without_encoder_decoder(), lr=1e-3, fused=True)

    def step(documents):
        peer(documents).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), run.config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_documents(run, step):
    """The documents of our step as the peer wants them: lists of words, (n,) int64, and pictures,
    (h, w, numbers of a patch). It puts in BOS, BOI, EOI and EOS itself."""
    shape = run.feed.shape
    batch = run.feed.batch(run.config.seed, step, 0)
    side = shape.latent[1] // shape.patch
    patches = patchify(batch.latents, shape.patch).unflatten(1, (side, side))
    known = len(data.SPECIAL)
    documents = []
    for b in range(len(batch.tokens)):
        for d in batch.doc_id[b].unique():
            here = batch.doc_id[b] == d
            tokens = batch.tokens[b][here].tolist()
            images = batch.image_id[b][here].tolist()
            document = []
            # Neighbours of one kind: words, or the patches of one picture.
            for image, pairs in itertools.groupby(zip(images, tokens), key=operator.itemgetter(0)):
                words = [token for _, token in pairs if token >= known or token == data.DROP]
                if image >= 0:
                    document.append(patches[image])
                elif words:
                    document.append(torch.tensor(words))
            if document:                                # else it is padding
                documents.append(document)
    return documents


# ----------------------------------------------------------------------------------------- drawing
def measure_drawing(trained, clock, n, many, pictures):
    """{sampler and steps: pictures per second, with guidance}; of one picture also without a cache,
    as `write` does it (the network alone).

    n, many     how many steps are few, and how many the paper takes
    pictures    of a batch; a quarter of them in many steps"""
    found = {}
    for sampler, steps in (("ddpm", n), ("ddim", n), ("dpm++", n), ("ddpm", many)):
        batch = pictures if steps == n else max(1, pictures // 4)
        call = partial(sample.draw, trained, [CAPTION] * batch, steps=steps, sampler=sampler)
        seconds = median_of(call, clock, 3 if steps == n else 1)
        found[f"{sampler}, {steps} steps, batch of {batch}"] = batch / seconds
    # Without a cache: what `write` does in each step, whatever this model would write.
    tokens = sample.prompt_tokens(trained, [CAPTION], draw_now=True)
    tokens += [data.PATCH] * trained.model.config.patches
    picture = torch.zeros(trained.model.config.latent)
    call = torch.no_grad()(partial(sample.read_all, trained.model, tokens, [picture], 500))
    found[f"{n} steps, one picture, no cache"] = 1 / (2 * n * median_of(call, clock, 5))
    call = partial(sample.draw, trained, [CAPTION], steps=n, sampler="ddim")
    found[f"ddim, {n} steps, one picture"] = 1 / median_of(call, clock, 3)
    return found


def random_toy():
    """checkpoint.Trained of the shipped model's parts, but with a network of the first toy's size
    and random weights: speed asks for no more."""
    shipped = load_trained(ASSETS / "scenes.pt")
    toy = model_module.sized("toy", vocabulary=len(shipped.tokenizer), patch_position=True)
    network = model_module.Transfusion(toy).eval()
    return Trained(network, shipped.tokenizer, shipped.vae, shipped.diffusion)


def measure_encoding(clock, n):
    """Seconds to encode 60,000 pictures of 32 x 32 grey pixels, MNIST's training set, with a new
    VAE; from n of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 1), dtype=np.uint8)
    vae = vae_module.VAE(vae_module.VAEConfig(image_channels=1))
    call = partial(vae_module.encode_all, vae, pixels, progress=False)
    return median_of(call, clock, 3) * 60_000 / n


# -------------------------------------------------------------------------------------- the command
def parse(argv):
    """The options of a command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark",
                                     description="Measure how fast it is on this machine.")
    parser.add_argument("--busy", action="store_true",
                        help="one thread, CPU seconds: where other programs run, too")
    parser.add_argument("--quick", action="store_true", help="as little of each as there can be")
    parser.add_argument("--out", help="a .json for the numbers")
    return parser.parse_args(argv)


def main(argv=None):
    """Measure everything, print it line by line; returns the numbers."""
    args = parse(argv)
    keep_memory()                                       # as every program of ours does
    clock = time.perf_counter
    if args.busy:
        torch.set_num_threads(1)
        clock = time.thread_time
    repeats = 1 if args.quick else 11
    pictures = 2 if args.quick else 64
    few, many = (2, 3) if args.quick else (25, 250)
    numbers = {}

    def say(name, value):
        numbers[name] = value
        print(f"{name:52s} {value:,.3g}" if value < 100 else f"{name:52s} {value:,.0f}", flush=True)

    # 1. What the cores can do, and what a training step does of it.
    peak = measure_peak(clock, repeats)
    say("threads", torch.get_num_threads())
    say("peak, float32 product of matrices, GFLOP/s", peak / 1e9)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for width in (128, 256):
            step = measure_step(width, clock, repeats, peak, folder)
            for kind, share in step.pop("where").items():
                say(f"step, width {width}: time in {kind}", share)
            for name, value in step.items():
                say(f"step, width {width}: {name}", value)

        # 2. Pictures.
        models = {"toy": random_toy(), "scenes.pt": load_trained(ASSETS / "scenes.pt")}
        for name, trained in models.items():
            drawn = measure_drawing(trained, clock, few, many, pictures)
            for how, speed in drawn.items():
                say(f"pictures/s, {name}, {how}", speed)
        say("s to encode MNIST", measure_encoding(clock, 64 if args.quick else 2048))

        # 3. Whole commands, from the moment of typing.
        commands = {
            "sample.py, 25 steps, to the png": ["sample.py", CAPTION, "--steps", "25"],
            "train.py to its first step": ["train.py", "--steps", "1", "--samples", "0"],
        }
        for name, words in commands.items():
            if args.quick and words[0] == "train.py":
                words = [*words, "--pairs", "60"]
            seconds, cpu, memory = run_command(words, folder)
            say(f"{name}: s", seconds)
            say(f"{name}: CPU s", cpu)
            say(f"{name}: MiB at most", memory)
    if args.out:
        Path(args.out).write_text(json.dumps(numbers, indent=1))
    return numbers


if __name__ == "__main__":
    main()
