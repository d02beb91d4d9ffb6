"""
plan.py: what a run will cost, before it runs                              (Transfusion §4.1 "Optimization", Table 8, App. B.1)

THE IDEA    Everything about a training run but its losses follows from a dozen numbers: how many parameters, how many FLOPs a
            token takes, what must lie in a GPU's memory at the worst moment, how many days, how many disks. Working it out
            takes a second and no GPU. Getting it wrong costs a week of five hundred of them.
A PICTURE   one GPU of G, while the backward pass is in block l

            [ weights | gradients | Adam m | Adam v ] / G        1/G of everything, fp32, for the whole run
            [ x0 x1 x2 ... xl ]                                  checkpoints: the rows between blocks, bf16
            [ block l ][ block l-1 ]                             all of two blocks, gathered in bf16: in use, and on its way
            [ d block l ][ d block l+1 ]                         the gradient being made (bf16), the one being sent (fp32)
            [ q k v ... gate up ... ]                            what block l keeps for its backward pass, made a second time
THE RULE    FLOPs per token = 6 N + 12 L d T                     N: parameters that multiply (no embedding table), L layers,
                                                                 d width, T positions. 2 per weight forward, 4 backward; and
                                                                 q k^T and p v over all T, twice as many as causality needs
            tokens/s = G * peak * MFU / (FLOPs per token)        MFU: model FLOPs utilization, the share of the peak that is
                                                                 the model's own arithmetic; recomputation does not count
PAPER/HERE  the paper says tokens and steps, not hardware: GPUs, memory, time are our arithmetic. Not measured by us: no GPU.
            Exact: parameters, FLOPs (a counter agrees, tests/test_plan.py). Estimates: memory (fragmentation and the CUDA
            context, about 1 GiB, come on top), MFU (an assumption), disk.
READ NEXT   train.py        TRY IT  python plan.py; python train.py --preset 7b --dry-run --gpus 512
TEST        tests/test_plan.py
"""
import math
import re
from functools import lru_cache

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from model import PAPER_CODES, PAPER_SIZES, count, paper_model
from patchify import PATCHES
from support.common import UserError

# Peak bf16 FLOP/s with fp32 accumulation, *dense*: the makers' data sheets print twice that, "with sparsity". A name is
# found if all its words are in torch.cuda.get_device_name(); the first that fits counts, so cut-down versions come first.
DEVICES = {
    "B200": 2250e12,                                    # HGX B200 data sheet: 36 PFLOPS sparse of 8 GPUs
    "H200 NVL": 835e12, "H200": 989e12,                 # H200 data sheet: 1671 and 1979 sparse
    "GH200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,       # H100 data sheet: 1513, 1671, 1979 sparse
    "A100": 312e12,                                     # A100 data sheet
    "L40S": 362e12, "L40": 181e12, "L4": 121e12,        # their data sheets: 733, 362, 242 sparse
    "A40": 150e12, "A10": 125e12,                       # their data sheets
    "RTX 4090": 165e12, "RTX 3090": 71e12,              # Ada and GA102 white papers; GeForce halves fp32 accumulation
}
GiB = 2 ** 30


# ------------------------------------------------------------------------------------------------------------- the device
def peak(device):
    """Peak dense bf16 FLOP/s of a device's name, or None if it is not known (a CPU, a part of a GPU, a laptop's)."""
    words = re.split(r"[\s-]+", device.upper())
    if {"LAPTOP", "MIG", "D"} & set(words):             # other chips, or parts of them, under the same name
        return None
    return next((flops for name, flops in DEVICES.items() if set(name.upper().split()) <= set(words)), None)


def device_name(device):
    """The name under which `peak` looks up a torch.device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def mfu(flops_per_token, tokens_per_second, device, gpus=1):
    """Model FLOPs utilization, 0 to 1, or None where the device's peak is not known. tokens_per_second: of all GPUs."""
    top = peak(device)
    return None if top is None else flops_per_token * tokens_per_second / (gpus * top)


# ------------------------------------------------------------------------------------------------------------- parameters
def parts(model):
    """{part: parameters}; they add up to count(model)."""
    found = {"embedding table": count(model.embedding), "blocks": count(model.blocks),
             "norm and head": count(model.norm) + count(model.head),
             f"patch encoder ({model.config.encoder})": count(model.patch_encoder)}
    return found if model.place is None else {**found, "place vectors": model.place.numel()}


# ------------------------------------------------------------------------------------------------------------------ FLOPs
def flops_per_token(model):
    """FLOPs that a position costs in training: 6 N + 12 L d T, and for the U-Net its share: text and patches are 1 : 1, so
    there is half a picture per P positions. The linear patch encoder is left out (0.005% of 7B)."""
    config = model.config
    N = count(model.blocks) + count(model.norm) + count(model.head)     # a table is looked up, not multiplied
    unet = encoder_costs(config)[0] / (2 * config.patches) if config.encoder == "unet" else 0
    return 6 * N + 12 * config.layers * config.width * config.context + unet


def encoder_costs(config):
    """(FLOPs, bytes kept for the backward pass in bf16) of the patch encoder for one picture, forward and backward: not a
    formula, but counted, by running it on the meta device."""
    return count_encoder(config.encoder, config.latent, config.patch, config.width, config.unet)


@lru_cache
def count_encoder(encoder, latent, patch, width, unet):
    """`encoder_costs` by plain numbers, so that it is counted once."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage                  # the storage itself too, so that no other gets its number
        return tensor

    with torch.device("meta"):
        body = dict(zip(("channels", "blocks"), unet)) if encoder == "unet" else {}
        net = PATCHES[encoder](latent[0], patch, width, **body).bfloat16()
        with FlopCounterMode(display=False) as counter:
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                t = torch.zeros(1, dtype=torch.long)
                vectors, skips = net.encode(torch.zeros(1, *latent, dtype=torch.bfloat16), t)
                out = net.decode(vectors, t, skips)
            out.sum().backward()
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    return counter.get_total_flops(), sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


# ----------------------------------------------------------------------------------------------------------------- memory
def block_bytes(width, hidden, number=2):
    """Bytes that a block keeps per position for its backward pass. number: bytes per number (bf16: 2). Width D, hidden H:
    norm1's output D, qkv 3D, q and k turned 2D, attention's output D and its transpose D, the sum D, norm2's output D,
    gate_up 2H, silu(gate) H, its product with up H."""
    return number * (10 * width + 4 * hidden)


def memory(model, gpus, rows=1, checkpointing=True, ema=False, number=2, patches=True):
    """[(what, bytes, how)] on one of the `gpus` GPUs among which the weights are divided, at the worst moment, with `rows` rows of T per GPU.
    number: bytes of what is computed with (bf16: 2). patches: False for the rivals, whose rows have none. How many micro-batches
    make a step does not matter: each one's gradients go to their owners at once."""
    config, W, block, blocks = model.config, count(model), count(model.blocks[0]), len(model.blocks)
    positions, hidden, V, D = rows * config.context, model.blocks[0].down.in_features, config.vocabulary, config.width
    lines = [("weights", 4 * W / gpus, "4 bytes x parameters / GPUs"),
             ("gradients", 4 * W / gpus, "4 bytes x parameters / GPUs"),
             ("AdamW", 8 * W / gpus, "2 x 4 bytes x parameters / GPUs")]
    if ema:
        lines.append(("average of the weights", 4 * W / gpus, "4 bytes x parameters / GPUs"))
    lines.append(("table and patch encoder, gathered", number * (V * D + count(model.patch_encoder)), f"{number} bytes each, for the whole step"))
    one = positions * block_bytes(D, hidden, number)
    if checkpointing:
        lines.append(("checkpoints", blocks * positions * number * D, f"L x rows x T x d x {number} bytes"))
    else:
        lines.append(("activations of the blocks", blocks * one, f"L x rows x T x (10 d + 4 hidden) x {number} bytes"))
    if patches:
        pictures = positions / (config.patches + 2)     # at most: BOI, patches, EOI, and no word
        lines.append(("activations of the patch encoder", pictures * encoder_costs(config)[1],
                      f"counted per picture, for {pictures:.1f} pictures, the most that fit"))
    # Two moments compete: the loss, with logits that autograd holds in fp32 three times over; and a block's backward pass.
    copies = 5 if config.stable else 3                  # the denominator loss keeps the logits, and has a gradient of its own
    loss = positions * V * 4 * copies + number * V * D
    backward = 3 * number * block + 4 * block + positions * 3 * hidden * number + (one if checkpointing else 0)
    lines.append(("at the worst moment: the loss", loss, f"head; logits, log-softmax, its gradient{', the denominator loss' * config.stable}: "
                  f"rows x T x V x {copies} x 4 bytes")
                 if loss > backward else
                 ("at the worst moment: a block's backward", backward, "two blocks gathered, two gradients (2 + 4 bytes), "
                  "MLP gradients" + (", activations again" if checkpointing else "")))
    return lines


def at_rest(model, gpus, ema=False):
    """Bytes on one of `gpus` GPUs between steps: weights and AdamW, and perhaps their average, all in float32."""
    return (16 if ema else 12) * count(model) / gpus


# --------------------------------------------------------------------------------------------------------------- the plan
def dry_run(config, gpus, share, device):
    """The lines of the plan of a train.Config. Raises UserError for the toys and for what cannot be run."""
    if config.size not in PAPER_SIZES:
        raise UserError(f"--dry-run plans the paper's sizes, {', '.join(PAPER_SIZES)}, not {config.size!r}: name one with --preset, e.g. "
                        f"--preset 0.76b, 0.76b-chameleon or 0.76b-llama; a toy is better run")
    codes = (config.codes or PAPER_CODES) * (config.model == "chameleon")
    model = paper_model(config.size, config.encoder, 1 if codes else config.patch, config.seq_len, codes, config.stable)
    return describe(model, config.documents, config.accumulate, config.steps, gpus, share, device, config.ema > 0, config.shard, config.model)


def describe(model, rows, micro_batches, steps, gpus, share=0.46, device="H100", ema=False, shard=0, kind="transfusion"):
    """The lines of the plan. rows: of T positions per micro-batch; micro_batches: per step, of all GPUs together; steps:
    of the optimizer; share: the MFU assumed; shard: among how many GPUs the weights are divided, 0: all; kind: "transfusion"
    or a rival (chameleon.py). Raises UserError for what cannot be run."""
    config, top = model.config, peak(device)
    if top is None:
        raise UserError(f"the peak of a {device!r} is not known: choose one of {', '.join(DEVICES)}")
    if gpus < 1 or not 0 < share <= 1:
        raise UserError(f"--gpus must be at least 1 and --mfu above 0 and at most 1, got {gpus} and {share}")
    if micro_batches % gpus:
        raise UserError(f"{micro_batches} micro-batches per step cannot be dealt evenly to {gpus} GPUs: choose --gpus that "
                        f"divides them, or another --accumulate")
    owners = shard or gpus
    if not 0 < owners <= gpus or gpus % owners:
        raise UserError(f"--shard {shard} must divide --gpus {gpus} (0: all of them)")
    flops, tokens = flops_per_token(model), rows * micro_batches * config.context
    N = count(model.blocks) + count(model.norm) + count(model.head)
    attention = 12 * config.layers * config.width * config.context
    speed = gpus * top * share / flops
    days = lambda total: total / speed / 86400
    row = lambda what, value, how="": f"  {what:41s}{value:>22s}   {how}".rstrip()
    text = tokens * steps / (1 if kind == "llama" else 2)
    pictures, latent = text / config.patches, 2 * (config.patches if kind == "chameleon" else math.prod(config.latent))
    seen = {"llama": "no pictures", "chameleon": f"pictures of {config.patches} codes", "transfusion":
            f"pictures of {' x '.join(map(str, config.latent))} in {config.patches} patches, {config.encoder} patch encoder"}[kind]
    lines = [f"{config.layers} layers, width {config.width}, {config.heads} heads, T = {config.context}, V = {config.vocabulary:,}; {seen}",
             "PARAMETERS (counted)"]
    lines += [row(part, f"{number:,}") for part, number in parts(model).items()]
    lines += [row("all", f"{count(model):,}"), "FLOPS PER TOKEN, forward and backward (exact; MFU counts these)",
              row("weights", f"{6 * N / 1e9:.2f} GFLOP", f"6 N, N = {N / 1e9:.4g}B, all that multiply"),
              row("attention", f"{attention / 1e9:.2f} GFLOP", "12 L d T"),
              row("transformer", f"{(6 * N + attention) / 1e9:.1f} GFLOP")]
    if config.encoder == "unet":
        lines += [row("U-Net", f"{(flops - 6 * N - attention) / 1e9:.2f} GFLOP", f"{encoder_costs(config)[0] / 1e12:.3g} TFLOP "
                      f"per picture (counted), half a picture per {config.patches} positions")]
    lines += ["BATCH", row("per GPU at a time", f"{rows} x {config.context}", "rows x T"),
              row("accumulated", f"{micro_batches // gpus}", "micro-batches per GPU and step"),
              row("per step", f"{tokens / 1e6:.2f}M tokens"),
              row("in all", f"{tokens * steps / 1e12:.3g}T tokens", f"{steps:,} steps"),
              f"MEMORY per GPU of {gpus}, weights divided among {owners} (estimate; fragmentation and the CUDA context, about 1 GiB, come on top)"]
    used = memory(model, owners, rows, True, ema, patches=kind == "transfusion")
    lines += [row(what, f"{b / GiB:.2f} GiB", how) for what, b, how in used]
    without = sum(b for _, b, _ in memory(model, owners, rows, False, ema, patches=kind == "transfusion"))
    lines += [row("all, with full checkpointing", f"{sum(b for _, b, _ in used) / GiB:.2f} GiB"),
              row("all, without checkpointing", f"{without / GiB:.2f} GiB"),
              row("between steps, to measure the gap", f"{(at_rest(model, owners, ema) + 2 * count(model)) / GiB:.2f} GiB",
                  "weights, AdamW" + (", average" if ema else "") + "; and a whole copy in bf16; its activations on top"),
              f"TIME on {gpus} {device} at {100 * share:.0f}% MFU (assumed) of {top / 1e12:.0f} TFLOP/s dense bf16",
              row("speed", f"{speed:,.0f} tokens/s", "GPUs x peak x MFU / FLOPs per token"),
              row("days for this run", f"{days(tokens * steps):.3g}", f"{days(1e12):.3g} per 1T tokens"),
              "DISK (estimate: nothing repeated" + (")" if kind == "llama" else "; text tokens : patches = 1 : 1)"),
              row("text", f"{text * 2 / 1e12:.3g} TB", f"{text / 1e12:.3g}T tokens x 2 bytes (uint16)")]
    if kind != "llama":
        lines.append(row("pictures", f"{pictures * latent / 1e12:.3g} TB", f"{pictures / 1e6:,.0f}M x {latent / 1024:g} KiB "
                         f"({'codes' if kind == 'chameleon' else 'means of the latents'}, 2 bytes a number); n epochs: 1/n of it"))
    lines += [row("one checkpoint", f"{at_rest(model, 1, ema) / 1e9:.3g} GB",
                  "weights, AdamW" + (", average" if ema else ""))]
    return lines


if __name__ == "__main__":
    for size in PAPER_SIZES:
        steps, sequences = (500_000, 1024) if size == "7b" else (250_000, 512)          # 4M and 2M tokens of rows of 4096
        print("\n".join([f"======== {size}", *describe(paper_model(size), 1, sequences, steps, gpus=512), ""]))
