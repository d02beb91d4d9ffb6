"""
on_gpu.py: everything that is claimed of a GPU, measured on one, in under ten minutes

    python tests/on_gpu.py --out gpu.json         one GPU, torch 2.11 or newer; exit status 0 if
                                                  every aim is reached
    python tests/on_gpu.py --tiny --device cpu    the same functions with tiny numbers, to see that
                                                  they run

Not a pytest file: pytest runs its tiny pass only (tests/test_plan.py). Each function measures one
thing and returns (value, aim, reached, what it means). The aims are the project's own. The numbers
of a machine belong into docs/SCALE.md, with its name. Written without a GPU at hand: nothing here
has been measured yet.
"""
import argparse
import functools
import gc
import json
import math
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import train
import vae
from attention_mask import attend, dense_mask, intervals, tile_mask
from diffusion import Diffusion
from model import PAPER_LATENT, ModelConfig, Transfusion, count, losses, sized
from sample import generate
from scale import distributed, plan
from sources import choose, scenes
from support import checkpoint
from support.checkpoint import encode_pixels, load_trained
from support.common import ASSETS, UserError, run_command

DIFFUSION = Diffusion()
GiB = 2 ** 30
FULL = dict(width=4096, heads=32, layers=6, T=4096, size="7b", words=32000, steps=10,
            kernel_T=1024, toy_steps=300, documents=64, sample_steps=25)
TINY = dict(width=64, heads=2, layers=2, T=1024, size="toy", words=500, steps=2,
            kernel_T=256, toy_steps=3, documents=4, sample_steps=2)


# --------------------------------------------------------------------------------- what is needed
@functools.cache
def vocabulary(words):
    """data.Words of that many made-up words and the special tokens."""
    return data.Words([f"w{k}" for k in range(words)])


def one_row(config, T, seed, documents=1):
    """A Batch of one full row of T: documents of captions of 20 words, each with its picture.
    Random, and always the same."""
    rng = np.random.default_rng(seed)
    words = vocabulary(config.vocabulary - len(data.SPECIAL))
    pair = config.patches + 22              # 20 words, BOI, EOI

    def text(n):
        numbers = rng.integers(len(data.SPECIAL), len(words), n)
        return " ".join(words.vocabulary[k] for k in numbers)

    cuts = [T * k // documents for k in range(documents + 1)]
    rows = []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        room = end - begin - 2              # without BOS and EOS
        pictures = (room - int(rng.integers(1, 40))) // pair
        document = []
        for m in range(pictures):
            document += [text(20), ("image", m, 1000)]
        document.append(text(room - pictures * pair))       # words up to the end
        rows.append(data.lay_out(document, words, config.patches))
    batch = data.pack(rows, T)
    M = len(batch.images)
    assert batch.tokens.shape == (1, T) and (batch.tokens != data.PAD).all() and M > 0

    g = torch.Generator().manual_seed(seed)
    batch.latents, batch.eps = torch.randn(2, M, *config.latent, generator=g)
    batch.t = torch.randint(1, 1001, (M,), generator=g)
    return batch


def on_one(config, device, checkpointing=False, compiled=False):
    """The model on one device as train.py has it on many: FSDP over one, weights in fp32,
    arithmetic in bf16 on a GPU."""
    with torch.device(device):
        model = Transfusion(config).train()
    backend = "inductor" if device.type == "cuda" else "eager"
    with mock.patch("torch.compile", functools.partial(torch.compile, backend=backend)):
        distributed.prepare_blocks(model, checkpointing, compiled)
    mesh = dist.init_device_mesh(device.type, (1,))
    distributed.shard_weights(model, distributed.Ranks(device, mesh))
    return model


def adamw(model, lr=3e-4):
    """The paper's optimizer."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8,
                             weight_decay=0.1, fused=True)


def step(model, optimizer, batch):
    """One step of training. Returns (LM loss per word, diffusion loss per picture)."""
    lm, words, per_picture = losses(model, batch, DIFFUSION)
    (lm / words + 5 * per_picture.sum() / max(1, len(per_picture))).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return lm.detach() / words, per_picture.detach().mean()


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


def seconds(run, device, times, warmup=3):
    """Seconds per call of run(k)."""
    for k in range(warmup):
        run(k)
    wait(device)
    began = time.perf_counter()
    for k in range(times):
        run(k)
    wait(device)
    return (time.perf_counter() - began) / times


def wide(n, context=None):
    """ModelConfig of the 7B's width with few layers: what a layer does, in less memory than 32."""
    return ModelConfig(vocabulary=n["words"] + len(data.SPECIAL), layers=n["layers"],
                       width=n["width"], heads=n["heads"], latent=PAPER_LATENT,
                       context=context or n["T"])


# -------------------------------------------------------------------------------------- attention
def flex_is_dense(n, device):
    """Outputs and gradients of FlexAttention's kernel and of the dense mask, on packed rows,
    float32 and bfloat16."""
    T = n["kernel_T"]
    config = ModelConfig(vocabulary=n["words"] + 7, latent=(4, 16, 16), context=T)
    worst = 0.0
    for dtype, allowed in ((torch.float32, 1e-2), (torch.bfloat16, 4e-2)):      # TF32 included
        batch = one_row(config, T, seed=1, documents=2).to(device)
        lo, hi = intervals(batch.image_id, batch.doc_id)
        q, k, v, weights = torch.randn(4, 1, 4, T, 64, device=device, dtype=dtype)
        flex = outputs_and_gradients(q, k, v, weights, tile_mask(lo, hi))
        dense = outputs_and_gradients(q, k, v, weights, dense_mask(lo, hi)[:, None])
        for one, two in zip(flex, dense, strict=True):
            difference = (one - two).float().norm() / two.float().norm()
            worst = max(worst, difference.item() / allowed)
    return worst, 1.0, worst <= 1.0, ("largest relative difference, in units of 0.01 (float32) or "
                                      "0.04 (bfloat16)")


def outputs_and_gradients(q, k, v, weights, mask):
    """[attention's output, and on a GPU the gradients of q, k, v]. FlexAttention has no backward
    pass on a CPU."""
    cuda = q.device.type == "cuda"
    inputs = [x.clone().requires_grad_(cuda) for x in (q, k, v)]
    y = attend(*inputs, mask)
    if not cuda:
        return [y]
    return [y, *torch.autograd.grad((y * weights).sum(), inputs)]


def kernel_against_flash(n, device):
    """Forward and backward of one layer's attention: FlexAttention with pictures in the row,
    against causal flash."""
    torch._dynamo.reset()                   # else the kernel fits several shapes, and is slower
    T = n["T"]
    K = n["width"] // n["heads"]
    batch = one_row(wide(n), T, seed=2).to(device)
    mask = tile_mask(*intervals(batch.image_id, batch.doc_id))
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    *inputs, weights = torch.randn(4, 1, n["heads"], T, K, device=device, dtype=dtype)
    inputs = [x.clone().requires_grad_(cuda) for x in inputs]

    def backward(y):
        if cuda:
            torch.autograd.grad(y, inputs, weights)

    def flash(_):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            backward(F.scaled_dot_product_attention(*inputs, is_causal=True))

    def flex(_):
        backward(attend(*inputs, mask))

    ratio = seconds(flash, device, n["steps"]) / seconds(flex, device, n["steps"])
    return ratio, 0.6, ratio >= 0.6, "speed of FlexAttention's kernel / of a causal flash kernel"


# --------------------------------------------------------------------------------------- training
def steps_of_width_7b(n, device, dense=False):
    """(seconds per step, graphs compiled after the warm-up, FLOPs per token): bf16, compiled,
    another layout each step. dense: with the dense mask instead of FlexAttention."""
    torch._dynamo.reset()
    config = wide(n)
    T = n["T"]
    model = on_one(config, device, compiled=True)
    optimizer = adamw(model)
    batches = [one_row(config, T, seed=k, documents=1 + k % 3).to(device) for k in range(4)]
    with mock.patch("model.tile_mask", dense_mask if dense else tile_mask):
        for k in range(3):
            step(model, optimizer, batches[k])
        before = counters["stats"]["unique_graphs"]

        def run(k):
            step(model, optimizer, batches[k % 4])

        took = seconds(run, device, n["steps"], warmup=1)
    # The head works only where a word is to be learned, here in an eighth of the places, and six
    # layers are few beside it. Counted at every place, as `flops_per_token` does, it would flatter
    # the MFU by a twelfth.
    learned = sum(int(batch.has_loss.sum()) for batch in batches) / (len(batches) * T)
    flops = plan.flops_per_token(model) - 6 * (1 - learned) * count(model.head)
    return took, counters["stats"]["unique_graphs"] - before, flops


def training_speed(n, device):
    """Three rows of the report from two models: MFU, recompiles, and the step against one with the
    dense mask."""
    flex, graphs, flops = steps_of_width_7b(n, device)
    mfu = plan.mfu(flops, n["T"] / flex, plan.device_name(device))
    free(device)
    dense, _, _ = steps_of_width_7b(n, device, dense=True)
    return {
        "MFU, 7B's width": (mfu, 0.46, None if mfu is None else mfu >= 0.46,
                            f"{n['layers']} layers, T = {n['T']}; aim at 0.5"),
        "recompiles over new layouts": (graphs, 0, graphs == 0,
                                        "graphs compiled after the warm-up"),
        "step against dense mask": (dense / flex, 1.4, dense / flex >= 1.4,
                                    "time with the dense mask / with FlexAttention"),
    }


def full_size(n, device):
    """The whole 7B with fp32 AdamW on one GPU: does it train, and in how much memory?"""
    cuda = device.type == "cuda"
    if cuda:
        memory = torch.cuda.get_device_properties(device).total_memory / GiB
        if memory < 120:
            return None, "102-109", None, f"skipped: needs about 110 GiB, this GPU has {memory:.0f}"
        torch.cuda.reset_peak_memory_stats(device)
    torch._dynamo.reset()
    config = sized(n["size"], vocabulary=n["words"] + len(data.SPECIAL), latent=PAPER_LATENT,
                   context=n["T"])
    model = on_one(config, device, checkpointing=True, compiled=True)
    optimizer = adamw(model, 1e-5)          # there is no warm-up: 3e-4 could overshoot
    batch = one_row(config, n["T"], seed=5).to(device)
    sums = []
    for _ in range(4):
        lm, diffusion = step(model, optimizer, batch)
        sums.append(lm.item() + diffusion.item())
    used = torch.cuda.max_memory_allocated(device) / GiB if cuda else None

    falls = all(map(math.isfinite, sums)) and sums[-1] < sums[0]
    reached = falls and (used is None or used <= 109)
    planned = plan.total_bytes(plan.memory(model, 1)) / GiB
    seen = ", ".join(f"{value:.3f}" for value in sums)
    return used, "102-109", reached, (f"GiB at most; the plan says {planned:.1f}; losses of one "
                                      f"batch: {seen}")


def toy_in_bf16(n, device):
    """The one-object toy, the same weights, batches and noise, in float32 and as above: do the
    losses stay together?"""
    pairs = choose.load_pairs("scenes", None, 32, n=512, seed=0, categories=scenes.WORLDS["one"],
                              progress=False)
    words = data.Words(pairs.vocabulary())
    encoder = checkpoint.load_vae(ASSETS / "scenes_vae.pt")
    mean, _ = vae.encode_all(encoder, pairs.pixels, progress=False)
    config = sized("toy", vocabulary=len(words), latent=tuple(mean.shape[1:]), context=128)
    documents = data.Documents(pairs, config.patches, drop=0.1, t_limit=500)

    def batch_of(k):
        rng = np.random.default_rng([0, k])
        g = torch.Generator().manual_seed(k)
        rows = [data.lay_out(documents.draw(rng), words, config.patches) for _ in range(32)]
        batch = data.pack(rows, 128)
        M = len(batch.images)
        batch.latents = mean[batch.images]
        batch.eps = torch.randn(M, *config.latent, generator=g)
        batch.t = 1 + (torch.rand(M, generator=g) * batch.t_max).long()
        return batch.to(device)

    def curve(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        rows = [torch.stack(step(model, optimizer, batch_of(k))) for k in range(n["toy_steps"])]
        return torch.stack(rows).cpu()      # (steps, 2): LM, diffusion

    torch.manual_seed(0)
    plain = Transfusion(config).to(device).train()
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    sharded = on_one(config, device)
    with torch.no_grad():                   # drawn on a GPU, the same seed gives other weights
        for name, p in sharded.named_parameters():
            p.to_local().copy_(start[name])

    quarter = max(1, n["toy_steps"] // 4)
    exact = curve(plain)[-quarter:].mean(0)
    half = curve(sharded)[-quarter:].mean(0)
    apart = ((half - exact).abs() / exact).max().item()
    return apart, 0.02, apart <= 0.02, (
        f"relative, over the last quarter of {n['toy_steps']} steps; float32 {exact[0]:.4f} and "
        f"{exact[1]:.4f}, bfloat16 {half[0]:.4f} and {half[1]:.4f}")


def a_whole_run(n, device):
    """train.py from the first step to the report, as it runs on this machine: FSDP, checkpoints,
    sampling. Then its last checkpoint is lost, and it is resumed: does it end with the same
    weights?"""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--out", folder, "--seq-len", "256", "--pairs", "256",
                   "--documents", str(n["documents"]), "--steps", "4", "--save-every", "2",
                   "--samples", "2", "--sample-steps", "2"]
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
    return apart, 0.01, apart <= 0.01, ("largest relative difference of a weight, resumed against "
                                        "uninterrupted")


# --------------------------------------------------------------------------------------- sampling
def mixed_batch(n, device):
    """16 mixed prompts to the shipped model, as one batch and one at a time. Two CPU cores, which a
    single picture keeps half busy already, reach 2.9."""
    trained = load_trained(ASSETS / "scenes.pt", device)
    pairs = scenes.load_scenes(16, 0, progress=False)
    pictures = encode_pixels(trained, pairs.pixels)

    prompts = []
    for k in range(16):                     # words; a picture; both; and a second caption
        caption = pairs.captions[k]
        after = pairs.captions[(k + 1) % 16]
        kinds = [[caption], [pictures[k]], [caption, pictures[k]], [caption, pictures[k], after]]
        prompts.append(kinds[k % 4])

    def write(numbers):
        generate(trained, [prompts[k] for k in numbers], seed=numbers, max_words=20,
                 steps=n["sample_steps"], sampler="dpm++")

    def one_by_one(_):
        for k in range(16):
            write([k])

    def together(_):
        write(list(range(16)))

    # One call each before the clock runs: the first time is the kernels' first, too.
    alone = seconds(one_by_one, device, times=1, warmup=1)
    faster = alone / seconds(together, device, times=1, warmup=1)
    return faster, 4, faster >= 4, f"times faster, {n['sample_steps']} steps"


# ------------------------------------------------------------------------------------- the report
MEASUREMENTS = {                            # small models first
    "FlexAttention is the dense mask": flex_is_dense,
    "kernel against causal flash": kernel_against_flash,
    "toy in bf16 against fp32": toy_in_bf16,
    "training speed": training_speed,       # three rows
    "memory of the 7B with AdamW": full_size,
    "16 mixed prompts as a batch": mixed_batch,
    "train.py resumed": a_whole_run,        # it leaves the process group: last
}
VERDICTS = {True: "reached", False: "NOT REACHED", None: "skipped"}


def measure(n, device):
    """{what: (value, aim, reached, meaning)} of everything above, printed as it comes."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    results = {}
    for name, function in MEASUREMENTS.items():
        began = time.time()
        try:
            answer = function(n, device)
        except Exception as problem:        # one row must not cost the others; it is not reached
            traceback.print_exc()
            lines = str(problem).splitlines() or [""]
            answer = None, "runs", False, f"{type(problem).__name__}: {lines[0]}"
        free(device)
        rows = answer if isinstance(answer, dict) else {name: answer}
        for what, (value, aim, reached, meaning) in rows.items():
            results[what] = dict(value=value, aim=aim, reached=reached, meaning=meaning)
            number = "-" if value is None else f"{value:.3f}"
            print(f"{what:34s} {number:>9s}   aim {aim!s:8s} {VERDICTS[reached]:12s} {meaning}",
                  flush=True)
        print(f"   ({time.time() - began:.0f} s)", flush=True)
    return results


def main(argv=None):
    """Measure, print, write. Returns the results."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the results here, as JSON")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true",
                        help="tiny numbers: only to see that everything runs")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU here; --tiny --device cpu only checks that the "
                        "script runs")
    if device.type == "cpu" and not options.tiny:
        raise UserError("the full sizes need a GPU: add --tiny to run on a CPU")
    if device.type == "cuda":
        device = torch.device("cuda", 0)

    name = plan.device_name(device)
    tiny = ", TINY: these numbers mean nothing" if options.tiny else ""
    print(f"{name}, torch {torch.__version__}{tiny}")
    results = measure(TINY if options.tiny else FULL, device)
    if options.out:
        about = dict(device=name, torch=torch.__version__, tiny=options.tiny, results=results)
        Path(options.out).write_text(json.dumps(about, indent=1))
    if not options.tiny and any(row["reached"] is False for row in results.values()):
        sys.exit(1)
    return results


if __name__ == "__main__":
    run_command(main)
