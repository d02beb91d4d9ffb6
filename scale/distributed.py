"""
scale.py: the same model on many GPUs                                         (Transfusion §4.1 "Optimization", App. B.1)

THE IDEA    A step is a fixed set of micro-batches. Deal them out to R processes ("ranks"), let each rank own a part of every
            weight, and add up gradients instead of averaging averages: then any number of ranks takes the same step, and a
            run may stop on 2 and go on on 1. train.py calls what is here; one process without a GPU runs the same lines.
A PICTURE   --accumulate 8 on 4 ranks, --shard 2: a mesh of 2 copies x 2 shards

            rank   micro-batches   owns of weights, gradient, AdamW, average
             0     0 4             first half   | they gather a block's weights just before it is needed, forget them after
             1     1 5             second half  | it, and send every gradient to its owner
             2     2 6             first half   | another copy, say on another node: only gradients travel between the
             3     3 7             second half  | copies
THE RULE    L = (sum of LM, all ranks) / (words, all ranks) + lambda (sum of DDPM, all ranks) / (pictures, all ranks)    eq. 4
            FSDP takes the mean of the ranks' gradients, so each rank's part of L is multiplied by R first.
START       torchrun --standalone --nproc-per-node 8 train.py --preset 1.4b ...                                  one node
            torchrun --nnodes 64 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py --preset 7b
                     --shard 8 ...                                                                      on each of 64 nodes
OUT         out/<name>/checkpoints/step_000500/: torch.distributed.checkpoint's format, one file per rank and .metadata,
            written last: without it the checkpoint does not count. The last two are kept.
PAPER/HERE  the paper says how large its batches are, not how they are divided: all of this is our choice.
            Run here: CPU and gloo, 1, 2 and 2 x 2 processes (tests). Written for CUDA and NCCL, not run: no GPU here.
READ NEXT   train.py        TRY IT  python scale.py        TEST  tests/test_scale.py (2 processes = 1 process)
"""
import atexit
import contextlib
import functools
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from model import Transfusion, count
from scale import plan
from support.common import UserError, pick_device

warnings.filterwarnings("ignore", message="torch.distributed is disabled")          # one process saves, too
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")       # what torchrun tells its processes


# --------------------------------------------------------------------------------------------------- who and where we are
@dataclass
class Ranks:
    """Where this process computes. mesh: who shares the weights; None: this process alone, on the CPU, with plain tensors.
    saving: the process group of asynchronous saving. TRAP: on the default group it waits for training's messages, for ever."""
    device: torch.device
    mesh: object = None
    saving: object = None

    @property
    def size(self):
        """R, how many processes there are."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def dtype(self):
        """What the network computes in: bfloat16 on a GPU, where it is twice as fast; float32 on a CPU, where it is slower."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def rank():
    """This process's number, 0..size()-1."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """R, how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(shard=0):
    """Join the other processes, if torchrun started some -> Ranks. shard: among how many ranks the weights are divided;
    0: all of them; fewer: groups of neighbours, each with a whole copy. Raises UserError if torchrun's variables are
    incomplete or the sizes do not fit."""
    cuda, line = torch.cuda.is_available(), "torchrun --standalone --nproc-per-node 2 train.py --accumulate 2"
    if any(name in os.environ for name in TORCHRUN[:3]):                # MASTER_ADDR alone is a habit of clusters
        if missing := [name for name in TORCHRUN if not os.environ.get(name)]:
            raise UserError(f"some of torchrun's variables are set, but not {', '.join(missing)}: start with e.g. `{line}`, "
                            f"or `unset {' '.join(n for n in TORCHRUN if n in os.environ)}` to train in one process")
        if not all(os.environ[name].isdecimal() for name in TORCHRUN[:3]):
            raise UserError(f"{', '.join(TORCHRUN[:3])} must be numbers: start with e.g. `{line}`")
        local, alone, joining = int(os.environ["LOCAL_RANK"]), False, {}
    else:                                                               # one GPU is a world of one
        local, alone, joining = 0, not cuda, dict(rank=0, world_size=1, store=dist.HashStore())
    world = 1 if joining else int(os.environ["WORLD_SIZE"])
    if shard < 0 or world % (shard or 1):
        raise UserError(f"--shard {shard} must divide the number of processes, {world} (0: all of them)")
    if alone:
        return Ranks(pick_device())
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"this machine has {torch.cuda.device_count()} GPUs, but process {local} of it wants one of its own: "
                        f"lower --nproc-per-node")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **joining)
        atexit.register(stop)
    shape = (world,) if shard in (0, world) else (world // shard, shard)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("shard",) if len(shape) == 1 else ("copy", "shard"))
    return Ranks(device, mesh, dist.new_group(backend="gloo"))


def stop():
    """Leave the other processes, when Python ends. TRAP: the last messages' tensors are freed by gloo's threads; one that finds
    Python ending aborts the process ("terminate called without an active exception"), every third time without the pause.
    Joining the threads does not help: they live as long as the mesh, which DTensor's caches keep."""
    if dist.is_initialized():
        dist.destroy_process_group()
        long_group.cache_clear()
        time.sleep(0.1)


def wait():
    """Wait until all ranks are here."""
    if size() > 1:
        dist.barrier()


@contextlib.contextmanager
def rank_0_first():
    """What is inside happens on rank 0, then on the others: they find the file that rank 0 has written."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


# ------------------------------------------------------------------------------------------------------- dividing the work
def micro_batches(accumulate):
    """This rank's micro-batches of a step: k with k % R = rank. Together they are 0..accumulate-1 whatever R is, so that
    the data of a step do not depend on it. TRAP: a rank with fewer would call the model less often, and all would wait."""
    if accumulate % size():
        raise UserError(f"{size()} processes cannot divide the {accumulate} micro-batches of a step evenly: make --accumulate "
                        f"a multiple of {size()} (and lower --documents to keep the batch as large as it was)")
    return range(rank(), accumulate, size())


def total(numbers):
    """List of floats: each of `numbers` summed over the ranks. Every rank must call it, with as many."""
    if size() == 1:
        return [float(n) for n in numbers]
    summed = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.tolist()


@functools.cache
def long_group():
    """A process group for work of hours. TRAP: the default group gives up after half an hour, also when a rank is merely slower."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def split_work(work, items):
    """List of work(part, first) of all ranks' parts of a list, in order: `first` is the place of the part's first item.
    Every rank must call it and gets the whole list. For drawing and describing; the model of the work must be whole."""
    a, b = (len(items) * k // size() for k in (rank(), rank() + 1))
    group = long_group() if size() > 1 else None
    found = work(items[a:b], a) if a < b else None
    everyone = [found]
    if group:
        everyone = [None] * size()
        dist.all_gather_object(everyone, found, group)
    return [part for part in everyone if part is not None]


# ------------------------------------------------------------------------------------------------------ dividing the model
def shard_model(make, ranks, checkpointing=False, compiled=False):
    """The model of make(), its weights drawn once and divided among the ranks. checkpointing: keep only the blocks' inputs
    and compute the rest again in the backward pass. compiled: torch.compile each block; one is compiled, all use it.

    The order matters: shapes only ("meta": 7B parameters take no memory) -> activation checkpointing -> compile -> shard
    the blocks, then norm and head, then what is left -> memory -> weights."""
    if ranks.mesh is None:
        model = make()
        prepare_blocks(model, checkpointing, compiled)
        return model
    # TRAP: weights drawn shard by shard depend on the number of shards. Rank 0 draws them all, as one process would, and
    # hands out the shards. At 7B that is 27 GB of one machine's main memory, once.
    drawn = make().state_dict() if rank() == 0 else {}
    with torch.device("meta"):
        model = make()
    if buffers := [name for name, _ in model.named_buffers()]:
        raise ValueError(f"buffers are not drawn, and would be left empty: {buffers}")
    prepare_blocks(model, checkpointing, compiled)
    # Weights travel and compute in bfloat16; their owners keep and update them in float32, and gradients are added in it.
    # TRAP: cast_forward_inputs would also round the noisy pictures and RoPE's tables; the model casts where it means to.
    half = dict(param_dtype=ranks.dtype, reduce_dtype=torch.float32) if ranks.dtype != torch.float32 else {}
    how = dict(mesh=ranks.mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False, **half))
    for block in model.blocks:
        fully_shard(block, **how)
    fully_shard([model.norm, model.head], reshard_after_forward=False, **how)       # the backward pass starts with them
    fully_shard(model, **how)                                           # embeddings and patch encoder
    model.to_empty(device=ranks.device)
    set_model_state_dict(model, drawn, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


def prepare_blocks(model, checkpointing, compiled):
    """Replace the blocks' forward. Only `forward`: the parameters keep their names, and FSDP's hooks stay outside, so that
    weights are gathered before, not within, what is computed again."""
    for block in model.blocks:
        if checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compiled:
            block.forward = torch.compile(block.forward)


def last_of_step(model, last):
    """Whether the coming backward pass is the last of its step: only then do the copies of a 2-D mesh add up their gradients."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def gather(x):
    """The whole of a tensor of which each rank may hold a shard. Every rank must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def wrap_weights(make, tensors):
    """A module of make() around given tensors {name: tensor}, without gradients, without drawing or copying any."""
    with torch.device("meta"):
        module = make()
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False)


def gather_model(make, module, dtype):
    """A plain, whole module with the weights of `module`, on every rank: anything may be called on it, by one rank alone.
    Sampling calls other methods than forward, a different number of times on each rank; on shards that would not end.
    7B in bfloat16 takes 13.5 GB for as long as it is held. A module that is whole already is returned as it is."""
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        return module
    return wrap_weights(make, {k: gather(v).to(dtype) for k, v in module.state_dict().items()})


# ------------------------------------------------------------------------------------------------------------- checkpoints
def folder_of(out, step):
    """Where the checkpoint of a step lies."""
    return Path(out) / "checkpoints" / f"step_{step:06d}"


def list_checkpoints(out):
    """(steps of complete checkpoints, steps of incomplete ones), ascending. Complete: .metadata is written last, by rank 0,
    when every rank's file is on the disk."""
    both = [], []
    for path in (Path(out) / "checkpoints").glob("step_*"):
        both[not (path / ".metadata").exists()].append(int(path.name[5:]))
    return sorted(both[0]), sorted(both[1])


def remove(path):
    """Delete a checkpoint, its .metadata first: killed in between, it must not look complete."""
    (path / ".metadata").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def state_of(model, average, optimizer):
    """Everything that a resumed run needs, by the parameters' names: it does not depend on the number of ranks."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments} | ({} if average is model else {"average": average.state_dict()})


class Saver:
    """Writes checkpoints while training goes on: the tensors are copied at once, and a thread writes the copy."""

    def __init__(self, out, ranks, keep=2):
        self.out, self.ranks, self.keep, self.writing = Path(out), ranks, keep, None

    def save(self, step, *parts):
        """Begin to write the checkpoint of a step. parts: model, average, optimizer."""
        self.wait()
        if step in list_checkpoints(self.out)[0]:
            return
        path = folder_of(self.out, step)
        with rank_0_first():
            remove(path)                                                # what a killed run left half written
        self.writing = path, dcp.async_save(state_of(*parts), checkpoint_id=path, process_group=self.ranks.saving,
                                            no_dist=not dist.is_initialized())

    def wait(self):
        """Wait until the checkpoint that is being written is complete; then delete all but the last few."""
        if self.writing is None:
            return
        (path, future), self.writing = self.writing, None
        try:
            future.result()
        except (Exception, dcp.api.CheckpointException) as problem:     # the latter is no Exception
            raise UserError(f"{path} could not be written ({problem}): is the disk full?") from None
        if rank() == 0:
            complete, incomplete = list_checkpoints(self.out)
            for step in complete[:-self.keep] + incomplete:
                remove(folder_of(self.out, step))


def load(out, step, ranks, model, average, optimizer):
    """Read the checkpoint of a step into the three, whatever number of ranks wrote it."""
    path, state = folder_of(out, step), state_of(model, average, optimizer)
    try:
        dcp.load(state, checkpoint_id=path, process_group=ranks.saving, no_dist=not dist.is_initialized())
    except (torch.OutOfMemoryError, MemoryError):
        raise                                           # not the checkpoint's fault
    except (Exception, dcp.api.CheckpointException) as problem:
        raise UserError(f"{path} cannot be read ({type(problem).__name__}): truncated, or of another model? Delete this folder "
                        f"to go on from the checkpoint before it") from None
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


# ------------------------------------------------------------------------------------------------------------------ memory
@contextlib.contextmanager
def explain_memory(shape, config, ranks, beside=None, each=0):
    """Turn "out of memory" into a UserError: what the memory is for (plan.py), and which option to change.
    shape: ModelConfig; config: presets.Config. beside: what is done, if it is not a step of training, and `each`: how many
    bytes per parameter that takes beside weights, AdamW and average."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
        if not isinstance(problem, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(problem):
            raise
        with torch.device("meta"):
            model = Transfusion(shape)
        owners, number, gb = config.shard or size(), ranks.dtype.itemsize, lambda n: f"{n / 1e9:.1f} GB"
        use = lambda checkpointing: plan.memory(model, owners, config.documents, checkpointing, config.ema > 0, number, patches=config.model == "transfusion")
        needs, advice = [(what, bytes) for what, bytes, _ in use(config.checkpointing)], []
        if beside:
            needs = [("weights, AdamW" + " and average" * (config.ema > 0), plan.at_rest(model, owners, config.ema > 0)),
                     *([(f"what happens now ({beside})", each * count(model))] if each else [])]
        elif config.documents > 1:
            p = next(p for p in range(2, config.documents + 1) if config.documents % p == 0)
            advice.append(f"--documents {config.documents // p} --accumulate {p * config.accumulate} (the same batch in smaller "
                          f"pieces{'' if config.data == 'shards' else ', in a new run'})")
        if not (beside or config.checkpointing):
            advice.append(f"--checkpointing (in all {gb(sum(bytes for _, bytes, _ in use(True)))})")
        if config.shard not in (0, size()):
            advice.append(f"--shard {2 * config.shard}")
        if config.ema:
            advice.append("--ema 0 (no average, in a new run)")
        raise UserError("out of memory: a process needs about " + ", ".join(f"{gb(bytes)} for {what}" for what, bytes in needs) +
                        "; try " + " or ".join([*advice, "more processes"])) from None


if __name__ == "__main__":
    print("a step of 8 micro-batches, dealt out:")
    for R in (1, 2, 4):
        print(f"  R = {R}   " + "   ".join(f"rank {r}: {' '.join(map(str, range(r, 8, R)))}" for r in range(R)))
    print("what this costs in memory and time: python plan.py")
