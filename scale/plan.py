"""
plan.py: what a run will cost, before it runs   (Transfusion §4.1 "Optimization", Table 8, App. B.1)

THE IDEA    Everything about a training run except its losses follows from a dozen numbers: how
            many parameters, how many FLOPs per token, what must fit in a GPU's memory at the worst
            moment, how many days, how many disks. Working it out takes a second and no GPU. A
            mistake costs a week of five hundred of them.
A PICTURE   one GPU of G, while the backward pass is in block l

            [ weights | gradients | Adam m | Adam v ] / G    1/G of everything, fp32, all the time
            [ x0 x1 x2 ... xl ]                checkpoints: the rows between blocks, bf16
            [ block l ][ block l-1 ]           all of two blocks, bf16: one in use, one on its way
            [ d block l ][ d block l+1 ]       gradients: one is made (bf16), one is sent (fp32)
            [ q k v ... gate up ... ]          what block l keeps for its backward pass, made again
THE RULE    FLOPs per token = 6 N + 12 L d T
                N: parameters that multiply (no embedding table), L layers, d width, T positions.
                A weight takes 2 FLOPs forward and 4 backward. q k^T and p v are counted over all
                T, twice what causality needs.
            tokens/s = G * peak * MFU / (FLOPs per token)
                MFU: model FLOPs utilization, the share of the peak that is the model's own
                arithmetic. Recomputation does not count.
PAPER/HERE  the paper says tokens and steps, not hardware. GPUs, memory, time: our arithmetic.
            Exact: parameters, FLOPs (a counter agrees, tests/test_plan.py). Estimates: memory
            (fragmentation and the CUDA context, about 1 GiB, come on top), disk. MFU is assumed.
READ NEXT   shards.py, distributed.py       TEST  tests/test_plan.py
TRY IT      python -m scale.plan; python train.py --preset 7b --dry-run --gpus 512
"""
import math
import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from model import PAPER_CODES, PAPER_SIZES, Transfusion, count, paper_model
from patchify import PATCHES
from support.common import UserError, run_command

# Peak bf16 FLOP/s with fp32 accumulation, *dense*: the makers' data sheets print twice that, "with
# sparsity". A name is found if all its words are in torch.cuda.get_device_name(). The first that
# fits counts, so cut-down versions come first.
DEVICES = {
    "B200": 2250e12,                        # HGX B200 data sheet: 36 PFLOPS sparse of 8 GPUs
    "H200 NVL": 835e12, "H200": 989e12,     # H200 data sheet: 1671 and 1979 sparse
    "GH200": 989e12,                        # H100 data sheet, these four: 1979, 1513, 1671, 1979
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,                        # sparse
    "A100": 312e12,                         # A100 data sheet
    "L40S": 362e12, "L40": 181e12, "L4": 121e12,        # their data sheets: 733, 362, 242 sparse
    "A40": 150e12, "A10": 125e12,           # their data sheets
    "RTX 4090": 165e12, "RTX 3090": 71e12,  # Ada and GA102 white papers: fp32 sums run at half rate
}
# Memory of one of them in GB, as their data sheets have it; the larger one where there are two.
GIGABYTES = {
    "B200": 180, "H200 NVL": 141, "H200": 141, "GH200": 96, "H100 PCIe": 80, "H100 NVL": 94,
    "H100": 80, "A100": 80, "L40S": 48, "L40": 48, "L4": 24, "A40": 48, "A10": 24, "RTX 4090": 24,
    "RTX 3090": 24,
}
MACHINE = 8                     # GPUs in one machine, where it is planned
GiB = 2 ** 30

# Measured on one H100 with torch 2.11 (docs/SCALE.md). Only `choose` needs the last three.
COMPILED = 0.9                  # what compiled blocks keep of the activations of plain ones
LAUNCH = 4.3e-3                 # seconds: a layer of a micro-batch takes Python so long, forward
                                # and backward, however few rows there are
GATHER = 15e-12                 # seconds per parameter of a micro-batch: gather, add up gradients
RATE = 0.5                      # of the peak, of the arithmetic alone


# --------------------------------------------------------------------------------------- the device
def peak(device):
    """Peak dense bf16 FLOP/s of a device's name. None if it is not known, as of a CPU."""
    return find_device(DEVICES, device)


def find_device(table, device):
    """The entry of a device's name in a table by name, or None."""
    words = set(re.split(r"[\s-]+", device.upper()))
    # TRAP: a smaller chip, or a part of a chip, has the name of the whole one in its own. Its MFU
    # would be wrong by a factor.
    if words & {"LAPTOP", "MIG", "D"}:
        return None
    for name, entry in table.items():
        if set(name.upper().split()) <= words:
            return entry
    return None


def device_name(device):
    """The name under which `peak` looks up a torch.device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def mfu(flops_per_token, tokens_per_second, device, gpus=1):
    """Model FLOPs utilization, 0 to 1. None where the device's peak is not known.
    device: its name; tokens_per_second: of all GPUs together."""
    flops = peak(device)
    if flops is None:
        return None
    return flops_per_token * tokens_per_second / (gpus * flops)


# --------------------------------------------------------------------------------------- parameters
def parts(model):
    """{part: its parameters}. They add up to count(model)."""
    numbers = {
        "embedding table": count(model.embedding),
        "blocks": count(model.blocks),
        "norm and head": count(model.norm) + count(model.head),
        f"patch encoder ({model.config.encoder})": count(model.patch_encoder),
    }
    if model.place is not None:
        numbers["place vectors"] = model.place.numel()
    return numbers


def multiplied(model):
    """N: how many parameters a token is multiplied with. A table is looked up, not multiplied."""
    return count(model.blocks) + count(model.norm) + count(model.head)


# -------------------------------------------------------------------------------------------- FLOPs
def flops_per_token(model):
    """FLOPs that a position costs in training: 6 N + 12 L d T, and the U-Net's share."""
    return 6 * multiplied(model) + attention_flops(model) + unet_flops(model)


def attention_flops(model):
    """12 L d T: the two products q k^T and p v, forward and backward."""
    config = model.config
    return 12 * config.layers * config.width * config.context


def unet_flops(model):
    """The U-Net's FLOPs per position. The linear patch encoder is left out (0.005% of 7B)."""
    config = model.config
    if config.encoder != "unet":
        return 0
    flops, _ = encoder_costs(config)
    # Paper: §4.1, text tokens and patches are 1 : 1. So every 2 P positions have one picture.
    return flops / (2 * config.patches)


def encoder_costs(config):
    """(FLOPs, bytes kept for the backward pass in bf16) of the patch encoder for one picture.
    No formula: it runs forward and backward on the meta device, and both are counted.
    config: ModelConfig."""
    return count_encoder(config.encoder, config.latent, config.patch, config.width, config.unet)


@lru_cache
def count_encoder(encoder, latent, patch, width, unet):
    """`encoder_costs` of plain numbers, so that each kind is counted once."""
    saved = {}                              # every storage that autograd keeps, by its address

    def remember(tensor):
        # The storage itself is kept too. Otherwise another one might get its address.
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    def give_back(tensor):
        return tensor

    with torch.device("meta"):
        size = {"channels": unet[0], "blocks": unet[1]} if encoder == "unet" else {}
        net = PATCHES[encoder](latent[0], patch, width, **size).bfloat16()
        picture = torch.zeros(1, *latent, dtype=torch.bfloat16)
        t = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            with saved_tensors_hooks(remember, give_back):
                vectors, skips = net.encode(picture, t)
                output = net.decode(vectors, t, skips)
            output.sum().backward()

    # The weights are saved for the backward pass as well, but they are counted elsewhere.
    for weight in net.parameters():
        saved.pop(weight.untyped_storage()._cdata, None)
    return counter.get_total_flops(), sum(storage.nbytes() for storage in saved.values())


# ------------------------------------------------------------------------------------------- memory
def memory(model, gpus, rows=1, checkpointing=True, ema=False, itemsize=2, patches=True,
           compiled=True):
    """[(what, bytes, how)]: what one GPU must hold at the worst moment of a step.

    gpus            among how many the weights are divided
    rows            of T positions, per GPU and micro-batch. How many micro-batches make a step
                    does not matter: the gradients of each go to their owners at once
    checkpointing   whether blocks keep only their inputs
    ema             whether there is an average of the weights
    itemsize        bytes per number of what is computed (bf16: 2)
    patches         False for the rivals, whose rows have none
    compiled        whether blocks are compiled"""
    positions = rows * model.config.context
    lines = state_memory(model, gpus, ema)
    gathered = count(model.embedding) + count(model.patch_encoder)
    lines.append(("table and patch encoder, gathered", itemsize * gathered,
                  f"{itemsize} bytes each, for the whole step"))
    lines.append(block_memory(model, positions, checkpointing, itemsize, compiled))
    text = rows
    if patches:
        # A row is text or pictures, half of each, and they take turns (scale/shards.py). A single
        # row may be either.
        text = math.ceil(rows / 2)
        pictures = min(rows, rows // 2 + 1)
        lines.append(encoder_memory(model, pictures * model.config.context))
    # Two moments compete: the loss, and a block's backward pass.
    moments = [backward_memory(model, positions, checkpointing, itemsize),
               loss_memory(model, text * model.config.context, itemsize)]
    lines.append(max(moments, key=lambda line: line[1]))
    return lines


def state_memory(model, gpus, ema):
    """The lines of `memory` for what exists during the whole run, divided among the GPUs."""
    W = count(model)
    lines = [
        ("weights", 4 * W / gpus, "4 bytes x parameters / GPUs"),
        ("gradients", 4 * W / gpus, "4 bytes x parameters / GPUs"),
        ("AdamW", 8 * W / gpus, "2 x 4 bytes x parameters / GPUs"),
    ]
    if ema:
        lines.append(("average of the weights", 4 * W / gpus, "4 bytes x parameters / GPUs"))
    return lines


def block_memory(model, positions, checkpointing, itemsize, compiled):
    """The line of `memory` for what all blocks keep from the forward pass."""
    width = model.config.width
    L = len(model.blocks)
    if checkpointing:
        size = L * positions * itemsize * width
        return "checkpoints", size, f"L x rows x T x d x {itemsize} bytes"
    size = L * positions * block_bytes(width, hidden_width(model), itemsize)
    how = f"L x rows x T x (10 d + 4 hidden) x {itemsize} bytes"
    if compiled:
        size *= COMPILED
        how += f" x {COMPILED} (measured)"
    return "activations of the blocks", size, how


def block_bytes(width, hidden, itemsize=2):
    """Bytes that a block keeps per position for its backward pass.

    10 d: the output of norm1, q k v (3 d), q and k turned (2 d), the output of attention, its
    transpose, the sum, the output of norm2. 4 hidden: gate and up (2 hidden), silu(gate), its
    product with up."""
    return itemsize * (10 * width + 4 * hidden)


def hidden_width(model):
    """The width of a block's feed-forward part."""
    return model.blocks[0].down.in_features


def encoder_memory(model, positions):
    """The line of `memory` for what the patch encoder keeps from the forward pass."""
    _, size = encoder_costs(model.config)
    # At most this many fit: BOI, patches, EOI, and no word.
    pictures = positions / (model.config.patches + 2)
    return ("activations of the patch encoder", pictures * size,
            f"counted per picture, for {pictures:.1f} pictures, the most that come together")


def loss_memory(model, positions, itemsize):
    """The line of `memory` for the moment of the loss: logits as they are computed, then in fp32,
    and copies of those. positions: at how many a word is learned, at most."""
    config = model.config
    # Logits, log-softmax and its gradient. The denominator loss keeps the logits, and has another
    # gradient.
    copies = 5 if config.stable else 3
    denominator = ", the denominator loss" if config.stable else ""
    per_logit = 4 * copies + (itemsize if itemsize < 4 else 0)
    size = positions * config.vocabulary * per_logit + itemsize * count(model.head)
    how = (f"head; logits, log-softmax, its gradient{denominator}: "
           f"rows of text x T x V x {per_logit} bytes")
    return "at the worst moment: the loss", size, how


def backward_memory(model, positions, checkpointing, itemsize):
    """The line of `memory` for the moment of a block's backward pass."""
    weights = count(model.blocks[0])
    hidden = hidden_width(model)
    # Two blocks gathered and one gradient, as computed; one gradient on its way, in fp32.
    size = 3 * itemsize * weights + 4 * weights + positions * 3 * hidden * itemsize
    how = "two blocks gathered, two gradients (2 + 4 bytes), MLP gradients"
    if checkpointing:                       # the block's activations are computed once more
        size += positions * block_bytes(model.config.width, hidden, itemsize)
        how += ", activations again"
    return "at the worst moment: a block's backward", size, how


def at_rest(model, gpus, ema=False):
    """Bytes on one of `gpus` GPUs between steps: weights, AdamW's two moments, and perhaps the
    average, all in float32."""
    numbers_per_parameter = 4 if ema else 3
    return 4 * numbers_per_parameter * count(model) / gpus


# --------------------------------------------------------------------------------------- the choice
def micro_batch_seconds(model, rows, checkpointing, flops):
    """About how long a micro-batch of `rows` takes on a GPU whose peak is `flops`. For comparing
    choices, not for promising days."""
    work = rows * model.config.context * flops_per_token(model) / (RATE * flops)
    launch = LAUNCH * len(model.blocks)
    if checkpointing:                       # the forward pass twice
        work *= 4 / 3
        launch *= 4 / 3
    return max(launch, work + GATHER * count(model))


def choose(model, rows_per_step, gpus, owners, capacity, flops, ema=False, patches=True,
           compiled=True):
    """(rows per micro-batch, checkpointing, bytes) of the fastest step that fits, or None.

    rows_per_step   of all GPUs together; the rows of a micro-batch must divide a GPU's part of it
    gpus, owners    how many GPUs, and among how many the weights are divided
    capacity        bytes of memory of one GPU; a tenth is left for fragmentation and the context
    flops           its peak
    ema, patches, compiled    see `memory`"""
    own = rows_per_step // gpus
    fitting = []
    for rows in range(1, own + 1):
        if own % rows:
            continue
        for checkpointing in (False, True):
            lines = memory(model, owners, rows, checkpointing, ema, 2, patches, compiled)
            used = total_bytes(lines)
            if used <= 0.9 * capacity:
                per_row = micro_batch_seconds(model, rows, checkpointing, flops) / rows
                fitting.append((per_row, rows, checkpointing, used))
    if not fitting:
        return None
    _, *chosen = min(fitting)
    return tuple(chosen)


# ----------------------------------------------------------------------------------------- the plan
@dataclass
class Plan:
    """A run that is planned.

    model           a Transfusion; it may be on the meta device
    rows            of T positions, per micro-batch
    micro_batches   per step, of all GPUs together
    steps           of the optimizer
    gpus            how many
    mfu             the model FLOPs utilization that is assumed
    device          the GPUs' name, one of DEVICES
    ema             whether there is an average of the weights
    shard           among how many GPUs the weights are divided; 0: those of one machine
    kind            "transfusion" or a rival (chameleon.py)
    """
    model: Transfusion
    rows: int
    micro_batches: int
    steps: int
    gpus: int
    mfu: float = 0.43                                   # four layers of the 7B, docs/SCALE.md
    device: str = "H100"
    ema: bool = False
    shard: int = 0
    kind: str = "transfusion"

    @property
    def owners(self):
        """Among how many GPUs the weights are divided."""
        return self.shard or math.gcd(self.gpus, MACHINE)

    @property
    def tokens_per_step(self):
        """How many positions a step reads."""
        return self.rows * self.micro_batches * self.model.config.context

    @property
    def tokens(self):
        """How many positions the run reads."""
        return self.tokens_per_step * self.steps

    @property
    def text_tokens(self):
        """How many of them are text. Paper: §4.1, half. A Llama reads nothing else."""
        return self.tokens / (1 if self.kind == "llama" else 2)

    def memory(self, checkpointing):
        """`memory` of one GPU."""
        return memory(self.model, self.owners, self.rows, checkpointing, self.ema,
                      patches=self.kind == "transfusion")


def dry_run(config, gpus, mfu, device):
    """The lines of the plan of a config.Config. Raises UserError for a toy, and for what cannot
    run."""
    return describe(Plan(
        model_of(config, "--dry-run"), config.documents, config.accumulate or gpus, config.steps,
        gpus, mfu, device, ema=config.ema > 0, shard=config.shard, kind=config.model))


def model_of(config, option):
    """The Transfusion of a config.Config at a paper's size, without memory. option: who asks.
    Raises UserError for a toy."""
    if config.size not in PAPER_SIZES:
        raise UserError(f"{option} plans the paper's sizes, {', '.join(PAPER_SIZES)}, not "
                        f"{config.size!r}: name one with --preset, e.g. --preset 0.76b, "
                        f"0.76b-chameleon or 0.76b-llama; a toy is better run")
    codes = 0
    patch = config.patch
    if config.model == "chameleon":
        codes = config.codes or PAPER_CODES
        patch = 1                           # a code for every place
    return paper_model(config.size, config.encoder, patch, config.seq_len, codes, config.stable)


def describe(plan):
    """The lines of a Plan, heading by heading. Raises UserError for what cannot run."""
    check_plan(plan)
    return [
        describe_model(plan),
        *describe_parameters(plan.model),
        *describe_flops(plan.model),
        *describe_batch(plan),
        *describe_memory(plan),
        *describe_time(plan),
        *describe_disk(plan),
    ]


def check_plan(plan):
    """Raise UserError if the plan's numbers do not go together."""
    if peak(plan.device) is None:
        raise UserError(f"the peak of a {plan.device!r} is not known: choose one of "
                        f"{', '.join(DEVICES)}")
    if plan.gpus < 1 or not 0 < plan.mfu <= 1:
        raise UserError(f"--gpus must be at least 1 and --mfu above 0 and at most 1, got "
                        f"{plan.gpus} and {plan.mfu}")
    if plan.micro_batches % plan.gpus:
        raise UserError(f"{plan.micro_batches} micro-batches per step cannot be dealt evenly to "
                        f"{plan.gpus} GPUs: choose --gpus that divides them, or another "
                        f"--accumulate")
    if not 0 < plan.owners <= plan.gpus or plan.gpus % plan.owners:
        raise UserError(f"--shard {plan.shard} must divide --gpus {plan.gpus} (0: those of one "
                        f"machine)")


def row(what, value, how=""):
    """One line of the plan, in three columns."""
    return f"  {what:41s}{value:>22s}   {how}".rstrip()


def describe_model(plan):
    """The headline: the model's shape and what it sees."""
    config = plan.model.config
    if plan.kind == "llama":
        pictures = "no pictures"
    elif plan.kind == "chameleon":
        pictures = f"pictures of {config.patches} codes"
    else:
        latent = " x ".join(map(str, config.latent))
        pictures = (f"pictures of {latent} in {config.patches} patches, "
                    f"{config.encoder} patch encoder")
    return (f"{config.layers} layers, width {config.width}, {config.heads} heads, "
            f"T = {config.context}, V = {config.vocabulary:,}; {pictures}")


def describe_parameters(model):
    """The lines about parameters."""
    lines = ["PARAMETERS (counted)"]
    for part, number in parts(model).items():
        lines.append(row(part, f"{number:,}"))
    lines.append(row("all", f"{count(model):,}"))
    return lines


def describe_flops(model):
    """The lines about FLOPs per token."""
    N = multiplied(model)
    attention = attention_flops(model)
    lines = [
        "FLOPS PER TOKEN, forward and backward (exact; MFU counts these)",
        row("weights", f"{6 * N / 1e9:.2f} GFLOP", f"6 N, N = {N / 1e9:.4g}B, all that multiply"),
        row("attention", f"{attention / 1e9:.2f} GFLOP", "12 L d T"),
        row("transformer", f"{(6 * N + attention) / 1e9:.1f} GFLOP"),
    ]
    if model.config.encoder == "unet":
        per_picture, _ = encoder_costs(model.config)
        lines.append(row("U-Net", f"{unet_flops(model) / 1e9:.2f} GFLOP",
                         f"{per_picture / 1e12:.3g} TFLOP per picture (counted), "
                         f"half a picture per {model.config.patches} positions"))
    return lines


def describe_batch(plan):
    """The lines about how many tokens are read at a time, per step and in all."""
    return [
        "BATCH",
        row("per GPU at a time", f"{plan.rows} x {plan.model.config.context}", "rows x T"),
        row("accumulated", f"{plan.micro_batches // plan.gpus}", "micro-batches per GPU and step"),
        row("per step", f"{plan.tokens_per_step / 1e6:.2f}M tokens"),
        row("in all", f"{plan.tokens / 1e12:.3g}T tokens", f"{plan.steps:,} steps"),
    ]


def describe_memory(plan):
    """The lines about the memory of one GPU."""
    lines = [f"MEMORY per GPU of {plan.gpus}, weights divided among {plan.owners} (estimate; "
             f"fragmentation and the CUDA context, about 1 GiB, come on top)"]
    used = plan.memory(checkpointing=True)
    for what, size, how in used:
        lines.append(row(what, f"{size / GiB:.2f} GiB", how))
    lines.append(row("all, with full checkpointing", f"{total_bytes(used) / GiB:.2f} GiB"))
    without = total_bytes(plan.memory(checkpointing=False))
    lines.append(row("all, without checkpointing", f"{without / GiB:.2f} GiB"))

    # The conditioning gap is measured on a whole copy in bf16, on every GPU: see
    # distributed.gather_model.
    between = at_rest(plan.model, plan.owners, plan.ema) + 2 * count(plan.model)
    lines.append(row("between steps, to measure the gap", f"{between / GiB:.2f} GiB",
                     f"{state_name(plan)}; and a whole copy in bf16; its activations on top"))
    lines.append(describe_choice(plan))
    return lines


def describe_choice(plan):
    """The line that names the fastest micro-batch that fits: what --auto takes."""
    gigabytes = find_device(GIGABYTES, plan.device)
    chosen = choose(plan.model, plan.rows * plan.micro_batches, plan.gpus, plan.owners,
                    1e9 * gigabytes, peak(plan.device), plan.ema, plan.kind == "transfusion")
    what = f"the fastest that fits in {gigabytes} GB"
    if chosen is None:
        return row(what, "none", "more GPUs, a larger --shard, or --ema 0")
    rows, checkpointing, used = chosen
    again = "--checkpointing" if checkpointing else "--no-checkpointing"
    return row(what, f"{used / GiB:.2f} GiB",
               f"--documents {rows} --accumulate {plan.rows * plan.micro_batches // rows} {again}; "
               f"or --auto")


def describe_time(plan):
    """The lines about speed and days."""
    flops = peak(plan.device)
    tokens_per_second = plan.gpus * flops * plan.mfu / flops_per_token(plan.model)
    tokens_per_day = tokens_per_second * 86400
    return [
        f"TIME on {plan.gpus} {plan.device} at {100 * plan.mfu:.0f}% MFU (assumed) of "
        f"{flops / 1e12:.0f} TFLOP/s dense bf16",
        row("speed", f"{tokens_per_second:,.0f} tokens/s", "GPUs x peak x MFU / FLOPs per token"),
        row("days for this run", f"{plan.tokens / tokens_per_day:.3g}",
            f"{1e12 / tokens_per_day:.3g} per 1T tokens"),
    ]


def describe_disk(plan):
    """The lines about data and checkpoints on disk."""
    ratio = "" if plan.kind == "llama" else "; text tokens : patches = 1 : 1"
    text = plan.text_tokens
    checkpoint = at_rest(plan.model, 1, plan.ema)
    lines = [
        f"DISK (estimate: nothing repeated{ratio})",
        row("text", f"{2 * text / 1e12:.3g} TB", f"{text / 1e12:.3g}T tokens x 2 bytes (uint16)"),
    ]
    if plan.kind != "llama":
        lines.append(describe_pictures(plan))
    lines.append(row("one checkpoint", f"{checkpoint / 1e9:.3g} GB", state_name(plan)))
    return lines


def describe_pictures(plan):
    """The line about the disk that packed pictures take."""
    config = plan.model.config
    pictures = plan.text_tokens / config.patches            # as many patches as text tokens
    if plan.kind == "chameleon":
        what = "codes"
        size = 2 * config.patches                           # uint16
    else:
        what = "means of the latents"
        size = 2 * math.prod(config.latent)                 # float16
    return row("pictures", f"{pictures * size / 1e12:.3g} TB",
               f"{pictures / 1e6:,.0f}M x {size / 1024:g} KiB ({what}, 2 bytes a number); "
               f"n epochs: 1/n of it")


def state_name(plan):
    """What `at_rest` counts, in words."""
    return "weights, AdamW, average" if plan.ema else "weights, AdamW"


def total_bytes(lines):
    """The sum of the bytes of `memory`'s lines."""
    return sum(size for _, size, _ in lines)


def main():
    """Print what each of the paper's runs costs."""
    # Paper: §4.1, 250k steps of 2M tokens: 512 rows of 4096.
    plans = {size: Plan(paper_model(size), 1, 512, 250_000, gpus=512) for size in PAPER_SIZES}
    # Paper: §4.4, the flagship: U-Net patches, and twice both.
    plans["flagship"] = Plan(paper_model("7b", "unet"), 1, 1024, 500_000, gpus=512)
    for name, plan in plans.items():
        print(f"======== {name}")
        print(*describe(plan), "", sep="\n")


if __name__ == "__main__":
    run_command(lambda _: main())
