"""
distributed.py: the same model on many GPUs            (Transfusion §4.1 "Optimization", App. B.1)

THE IDEA    A step is a fixed set of micro-batches. Deal them out to R processes ("ranks"), let each
            rank own a part of every weight, and add up gradients instead of averaging averages.
            Then any number of ranks takes the same step, and a run may stop on 2 and go on on 1.
            train.py calls what is here. One process without a GPU runs the same lines.
A PICTURE   --accumulate 8 on 4 ranks, --shard 2: a mesh of 2 copies x 2 shards

            rank  micro-batches  owns of weights, gradient, AdamW, average
             0    0 4            first half   | They gather a block's weights just before they need
             1    1 5            second half  | it, then forget them. Gradients go to their owners.
             2    2 6            first half   | Another copy, say on another node: only gradients
             3    3 7            second half  | travel between the copies.
THE RULE    L =            (sum of LM, all ranks) / (words, all ranks)                       eq. 4
              + lambda * (sum of DDPM, all ranks) / (pictures, all ranks)
            FSDP averages gradients over ranks, but this loss is already divided by global counts.
            So each rank's part of L is multiplied by R first.
START       one node:
                torchrun --standalone --nproc-per-node 8 train.py --preset 1.4b ...
            on each of 64 nodes:
                torchrun --nnodes 64 --nproc-per-node 8 --rdzv-backend c10d
                         --rdzv-endpoint HOST:29500 train.py --preset 7b ...
OUT         out/<name>/checkpoints/step_000500/: the format of torch.distributed.checkpoint, one
            file per rank, and .metadata, which is written when they are complete. Without it the
            checkpoint does not count. Then each rank adds the checksum of its file, which --resume
            compares. The last two are kept, and those of --keep-every. TRAP: torch unpickles
            .metadata, and what is unpickled may run code: resume only runs of your own.
PAPER/HERE  the paper says how large its batches are, not how they are divided: our choice, all of
            it. Run here: CPU and gloo, 1, 2 and 2 x 2 processes (tests); one H100 (docs/SCALE.md).
            Written, not run: NCCL between GPUs.
READ NEXT   ../train.py     TRY IT  python -m scale.distributed
TEST        tests/test_distributed.py (2 processes = 1 process), tests/test_damaged_files.py
"""
import atexit
import contextlib
import functools
import os
import re
import shutil
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from model import Transfusion, count
from patchify import UNetBlock
from scale import plan
from support.checkpoint import name_not_finite
from support.common import (
    UserError,
    is_out_of_memory,
    pick_device,
    read_json,
    run_command,
    write_json,
)

# One process saves in the same format, which torch finds worth a warning.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# What torchrun tells its processes. The first three are numbers.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = TORCHRUN[:3]


# ----------------------------------------------------------------------------- who and where we are
@dataclass
class Ranks:
    """Where this process computes.

    device  its torch.device
    mesh    which processes share the weights. None: this one is alone, with plain tensors
    saving  the process group that saves while training goes on. TRAP: on the default group, saving
            would wait for the messages of training, for ever
    """
    device: torch.device
    mesh: object = None
    saving: object = None

    @property
    def dtype(self):
        """What the network computes in: bfloat16 on a GPU, where it is twice as fast; float32 on a
        CPU, where attention in bfloat16 is seven times as slow."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def rank():
    """This process's number, 0..size()-1."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """R, how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(shard=0):
    """Join the other processes, if torchrun started some. Returns Ranks.

    shard: among how many ranks the weights are divided: see `ranks_per_copy`. Raises UserError if
    torchrun's variables are incomplete or the numbers do not fit."""
    # 1. Who is there?
    cuda = torch.cuda.is_available()
    torchrun = started_by_torchrun()
    processes = int(os.environ["WORLD_SIZE"]) if torchrun else 1
    local = int(os.environ["LOCAL_RANK"]) if torchrun else 0        # our number on this machine
    if shard < 0 or processes % (shard or 1):
        raise UserError(f"--shard {shard} must divide the number of processes, {processes} "
                        f"(0: those of one machine)")
    if not torchrun and not cuda:
        return Ranks(pick_device())

    # 2. One GPU for each process.
    device = torch.device("cpu")
    if cuda:
        check_gpus(local)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)

    # 3. Join. A single process with a GPU is a world of one: it runs the lines that 512 run.
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if torchrun:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
        atexit.register(stop)

    # 4. Who shares the weights? Neighbours, which are on one node: they talk most.
    shard = ranks_per_copy(shard, processes)
    if shard == processes:
        mesh = init_device_mesh(device.type, (processes,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device.type, (processes // shard, shard),
                                mesh_dim_names=("copy", "shard"))
    return Ranks(device, mesh, dist.new_group(backend="gloo"))


def ranks_per_copy(shard, processes):
    """Among how many of the processes the weights are divided, in groups of neighbours, each with a
    whole copy. shard: what --shard says; 0: those of one machine."""
    # Our choice: weights are gathered twice per micro-batch, gradients travel once per step. Within
    # a machine that is fast. Between machines, the 7B's weights would take longer than its step.
    local = os.environ.get("LOCAL_WORLD_SIZE", "")              # torchrun's
    if not shard and local.isdecimal() and int(local) and processes % int(local) == 0:
        return int(local)
    return shard or processes


def started_by_torchrun():
    """Whether torchrun has started this process. Raises UserError if its variables are incomplete.
    MASTER_ADDR alone does not count: clusters set it by habit."""
    if not any(name in os.environ for name in NUMBERS):
        return False
    example = "torchrun --standalone --nproc-per-node 2 train.py --accumulate 2"
    missing = [name for name in TORCHRUN if not os.environ.get(name)]
    if missing:
        present = [name for name in TORCHRUN if name in os.environ]
        raise UserError(f"some of torchrun's variables are set, but not {', '.join(missing)}: "
                        f"start with e.g. `{example}`, or `unset {' '.join(present)}` to train in "
                        f"one process")
    if not all(os.environ[name].isdecimal() for name in NUMBERS):
        raise UserError(f"{', '.join(NUMBERS)} must be numbers: start with e.g. `{example}`")
    return True


def check_gpus(local):
    """Raise UserError if this machine has no GPU for its process number `local`."""
    gpus = torch.cuda.device_count()
    if local >= gpus:
        raise UserError(f"this machine has {gpus} GPUs, but process {local} of it wants one of its "
                        f"own: lower --nproc-per-node")


def stop():
    """Leave the other processes, when Python ends.

    TRAP: gloo's threads free the tensors of the last messages. A thread that finds Python ending
    aborts the process ("terminate called without an active exception"), every third time without
    the pause. Joining the threads does not help: they live as long as the mesh, which the caches of
    DTensor keep."""
    if dist.is_initialized():
        dist.destroy_process_group()
        long_group.cache_clear()
        time.sleep(0.1)


def say(*words, **options):
    """Print, once for all processes."""
    if rank() == 0:
        print(*words, **options)


def wait():
    """Wait until all ranks are here."""
    if size() > 1:
        dist.barrier()


@contextlib.contextmanager
def rank_0_first():
    """What is inside happens on rank 0, then on the others: they find the file that it wrote. It
    may take hours, as the training of a VAE does."""
    if size() == 1:
        yield
        return
    # The group comes first, as in `split_work`.
    group = long_group()
    if rank() > 0:
        dist.barrier(group)
    yield
    if rank() == 0:
        dist.barrier(group)


# -------------------------------------------------------------------------------- dividing the work
def micro_batches(accumulate):
    """The numbers of this rank's micro-batches of a step: every k with k % R = rank.

    Together they are 0..accumulate-1 for any R, so the data of a step do not depend on R. 0: as
    many as there are ranks. Raises UserError if R does not divide them."""
    accumulate = accumulate or size()
    # TRAP: a rank with fewer micro-batches calls the model less often, and all wait for ever.
    if accumulate % size():
        raise UserError(f"{size()} processes cannot divide the {accumulate} micro-batches of a "
                        f"step evenly: make --accumulate a multiple of {size()} (and lower "
                        f"--documents to keep the batch as large as it was)")
    return range(rank(), accumulate, size())


def total(numbers, device="cpu"):
    """List of floats: each of `numbers`, summed over the ranks. Every rank must call it, with a
    list of the same length.

    device      what the message travels between. At every step: the GPUs. Main memories are slower
                the more ranks there are, 12 ms for 32 of them; but they wait longer for each other
    """
    if size() == 1:
        return [float(n) for n in numbers]
    # float64: counts stay exact, and losses lose nothing in the sum.
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def total_loss_and_norm(part, weights, mesh):
    """(L, the norm of the whole gradient), scalar tensors, in one message. It travels between the
    GPUs, and nobody waits for it. Every rank must call it.

    part      what this rank adds to L, a scalar tensor
    weights   those that have a gradient; this rank holds a shard of each"""
    norm = torch.nn.utils.get_total_norm([weight.grad.to_local() for weight in weights])
    # On a 2-D mesh every copy holds the whole gradient.
    copies = size() // mesh.shape[-1]
    # float64, as in `total`; and the square of a float32 may be too large for one.
    sums = torch.stack([part.double(), norm.double().square() / copies])
    dist.all_reduce(sums)
    L, squares = sums.unbind()
    return L.float(), squares.sqrt().float()


def from_rank_0(look):
    """What look() returns on rank 0, on every rank. For what ranks must not see differently, such
    as which files there are: on a disk that machines share, some see a file later."""
    if size() == 1:
        return look()
    seen = [None]
    if rank() == 0:
        try:
            seen = [(look(), None)]
        except UserError as mistake:        # all end with the same sentence
            seen = [(None, mistake)]
    dist.broadcast_object_list(seen, src=0)
    result, mistake = seen[0]
    if mistake:
        raise mistake
    return result


@functools.cache
def long_group():
    """A process group for work of hours. TRAP: the default group gives up after half an hour, even
    if one rank is merely slower."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def split_work(work, items):
    """Divide a list among the ranks. Returns [work(part, first), ...] of all parts, in order.

    first: the place of the part's first item in the list. Every rank must call this, and gets all
    results. It is for drawing and describing. The model that `work` uses must be whole."""
    begin = len(items) * rank() // size()
    end = len(items) * (rank() + 1) // size()
    if size() == 1:
        parts = [work(items, 0)] if len(items) else []
        return [part for part in parts if part is not None]
    # The group comes first: ranks meet to make it, and after the work some would come too late.
    group = long_group()
    result = None
    problem = None
    try:
        if begin < end:
            result = work(items[begin:end], begin)
    # TRAP: a rank that fails and leaves would let the others wait for it, up to a day.
    except Exception as own:
        problem = own
    results = [None] * size()
    dist.all_gather_object(results, (result, problem and describe(problem)), group)
    if problem:
        raise problem
    for other, (_, problem) in enumerate(results):
        if problem:
            raise UserError(f"process {other} could not do its part: {problem}")
    return [part for part, _ in results if part is not None]


def describe(problem):
    """One line that says what an exception is."""
    lines = str(problem).splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"


# ------------------------------------------------------------------------------- dividing the model
def shard_model(make, ranks, checkpointing=False, compiled=False):
    """The model of make(), its weights drawn once and divided among the ranks.

    checkpointing   keep only the inputs of blocks, and compute the rest again in the backward pass
    compiled        torch.compile each block (one is compiled, all use it) and those of the U-Net

    The order matters: shapes only -> activation checkpointing -> compile -> shard -> memory ->
    weights. "Shapes only" is the device "meta", on which 7B parameters take no memory."""
    if ranks.mesh is None:
        model = make()
        prepare_parts(model, checkpointing, compiled)
        return model

    # 1. The weights. TRAP: drawn shard by shard, they depend on the number of shards. Rank 0 draws
    #    them all, as one process would. At 7B that is 27 GB of one machine's main memory, once.
    weights = make().state_dict() if rank() == 0 else {}

    # 2. The model, without memory, and divided.
    with torch.device("meta"):
        model = make()
    buffers = [name for name, _ in model.named_buffers()]
    if buffers:
        raise ValueError(f"buffers are not drawn, and would be left empty: {buffers}")
    prepare_parts(model, checkpointing, compiled)
    shard_weights(model, ranks)

    # 3. Memory for this rank's part, then its weights from rank 0.
    model.to_empty(device=ranks.device)
    sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=sent)
    return model


def prepare_parts(model, checkpointing=False, compiled=False):
    """Replace the blocks' forward by one that is checkpointed, compiled, or both; and compile the
    U-Net's blocks, if there are any. The arguments are those of `shard_model`.

    Only `forward`: the parameters keep their names, and FSDP's hooks stay outside. So weights
    are gathered before, not within, what is computed again."""
    for block in model.blocks:
        if checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compiled:
            block.forward = torch.compile(block.forward)
    # One by one, too: a graph of a whole way of the U-Net keeps the compiler busy for many minutes.
    for block in model.patch_encoder.modules():
        if compiled and isinstance(block, UNetBlock):
            block.forward = compile_for_pictures(block.forward)


def compile_for_pictures(forward):
    """A U-Net block's forward, compiled for any number M of pictures: it changes from micro-batch
    to micro-batch. With fewer than two it runs as it is: torch makes graphs of their own for 0 and
    1. Blocks of the same shape share a graph."""
    compiled = torch.compile(forward)

    def call(x, time):
        if len(x) < 2:
            return forward(x, time)
        # Otherwise the first M would have a graph of its own.
        torch._dynamo.maybe_mark_dynamic(x, 0)
        torch._dynamo.maybe_mark_dynamic(time, 0)
        return compiled(x, time)

    return call


def shard_weights(model, ranks):
    """Divide the weights among the ranks, in place (FSDP): each block, then norm and head, then
    what is left, which is the embedding and the patch encoder. What is divided together is
    gathered together."""
    # TRAP: cast_forward_inputs would also round the noisy pictures and the tables of RoPE. The
    # model casts where it means to.
    precision = {"cast_forward_inputs": False}
    if ranks.dtype != torch.float32:
        # Weights travel and compute in bfloat16. Their owners keep and update them in float32, and
        # gradients are added in float32.
        precision |= {"param_dtype": ranks.dtype, "reduce_dtype": torch.float32}
    policy = MixedPrecisionPolicy(**precision)

    # TRAP: from the inside out. `fully_shard` takes what no earlier call has taken: with the whole
    # model first, no block would be a unit, and all weights would be gathered at once.
    for block in model.blocks:
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
    # The backward pass begins with norm and head: they stay gathered.
    fully_shard([model.norm, model.head], mesh=ranks.mesh, mp_policy=policy,
                reshard_after_forward=False)
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy)


def last_of_step(model, last):
    """Say whether the coming backward pass is the last of its step. Only then do the copies of a
    2-D mesh add up their gradients."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def gather(x):
    """The whole of a tensor of which each rank may hold a shard. Every rank must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def wrap_weights(make, tensors):
    """A module of make() around {name: tensor}, without gradients. Nothing is drawn or copied."""
    with torch.device("meta"):              # at 7B, weights that nobody uses would be 27 GB
        module = make()
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False)


def gather_model(make, module, dtype):
    """A plain, whole module with the weights of `module`, on every rank.

    Any rank may call any of its methods alone. Sampling does so: each rank calls other methods than
    forward, another number of times. On shards that would wait for ever. 7B in bfloat16 takes
    13.5 GB as long as it exists. A module that is whole already is returned as it is."""
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        return module
    weights = {name: gather(weight).to(dtype) for name, weight in module.state_dict().items()}
    return wrap_weights(make, weights)


# -------------------------------------------------------------------------------------- checkpoints
def folder_of(out, step):
    """The folder of a step's checkpoint."""
    return Path(out) / "checkpoints" / f"step_{step:06d}"


def list_checkpoints(out):
    """(steps of complete checkpoints, steps of incomplete ones), ascending.

    Complete: it has .metadata, which rank 0 writes last, when every rank's file is on the disk.
    Any other name is somebody's own, such as step_000008.bak, and is left alone."""
    complete = []
    incomplete = []
    for path in (Path(out) / "checkpoints").glob("step_*"):
        digits = re.fullmatch(r"step_([0-9]+)", path.name)
        if not digits or not path.is_dir():
            continue
        step = int(digits[1])
        if path != folder_of(out, step):                    # step_8, step_0000008
            continue
        if (path / ".metadata").exists():
            complete.append(step)
        else:
            incomplete.append(step)
    return sorted(complete), sorted(incomplete)


def remove(path):
    """Delete a checkpoint."""
    # Killed in between, it must not look complete.
    (path / ".metadata").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def state_of(model, average, optimizer):
    """Everything that a resumed run needs, by the names of parameters. It does not depend on the
    number of ranks."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    if average is not model:
        state["average"] = average.state_dict()
    return state


def not_finite(state):
    """The name of a number in the state of any rank that is NaN or infinite, or "". Every rank must
    call it."""
    broken = name_not_finite(state)
    if any(total([bool(broken)])):
        return broken or "a number on another process"
    return ""


class Saver:
    """Writes checkpoints while training goes on: the tensors are copied at once, and a thread
    writes the copy.

    keep        how many checkpoints stay, beside those that are kept for good
    keep_every  steps between the latter; 0: there are none"""

    def __init__(self, out, ranks, keep=2, keep_every=0):
        self.out = Path(out)
        self.ranks = ranks
        self.keep = keep
        self.keep_every = keep_every
        self.path = None                    # of the checkpoint that is being written
        self.future = None                  # it ends when that is done
        self.thread = ThreadPoolExecutor(1)

    def save(self, step, model, average, optimizer):
        """Begin to write the checkpoint of a step. Raises UserError if it is not finite, or if the
        one before could not be written."""
        self.wait()
        complete, _ = from_rank_0(lambda: list_checkpoints(self.out))
        if step in complete:
            self.delete_old()               # what a killed run had no time to delete
            return
        path = folder_of(self.out, step)
        state = state_of(model, average, optimizer)
        broken = not_finite(state)
        if broken:
            raise UserError(f"{path} was not written, because {broken} is not finite in it: lower "
                            f"--lr, or raise --warmup, in a new run; the checkpoints that are "
                            f"there are still good")
        with rank_0_first():
            remove(path)                    # what a killed run left half written
        writing = dcp.async_save(
            state, checkpoint_id=path, process_group=self.ranks.saving,
            no_dist=not dist.is_initialized())
        self.path = path
        self.future = self.thread.submit(self.finish, path, writing)

    def finish(self, path, writing):
        """Add a copy of the run's options, and checksums, to a checkpoint when it is complete.
        writing: the future of it."""
        writing.result()
        names = [file.name for file in path.glob(f"__{rank()}_*")]
        if rank() == 0:
            names.append(".metadata")
            if (self.out / "config.json").exists():
                shutil.copyfile(self.out / "config.json", path / "config.json")
        write_json(path / f"crc32_{rank()}.json", {name: crc32(path / name) for name in names})

    def wait(self):
        """Wait until the checkpoint that is being written is complete. Then delete all but the last
        few. Raises UserError if it could not be written."""
        if self.future is None:
            return
        future = self.future
        self.future = None                  # also if it fails: nobody shall wait for it again
        try:
            future.result()
        except (Exception, dcp.api.CheckpointException) as problem:     # the latter is no Exception
            if rank() == 0:
                remove(self.path)
            raise UserError(f"{self.path} could not be written ({cause_of(problem)}): is the disk "
                            f"full? what was saved before is still good") from None
        self.delete_old()

    def delete_old(self):
        """Delete all but the last complete checkpoints, and those that are kept for good."""
        if rank() > 0:
            return
        complete, incomplete = list_checkpoints(self.out)
        for step in complete[:-self.keep] + incomplete:
            for_good = self.keep_every and step % self.keep_every == 0
            if step in incomplete or not for_good:
                remove(folder_of(self.out, step))


def cause_of(problem):
    """One line that says what is behind an exception of torch.distributed.checkpoint."""
    while isinstance(problem, dcp.api.CheckpointException):
        problem, _ = next(iter(problem.failures.values()))          # of the first rank that failed
    if not isinstance(problem, OSError) and isinstance(problem.__context__, OSError):
        problem = problem.__context__
    return (str(problem) or type(problem).__name__).splitlines()[0]


def crc32(path):
    """The checksum of a file, read piece by piece."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return crc


def damaged_files(path):
    """The names of a checkpoint's files that are not what was written. Every rank must call it:
    they share the reading. A checkpoint without checksums is taken as it is: its run was killed
    before it could add them, or is an older one."""
    kept, damaged = from_rank_0(lambda: read_checksums(path))

    def differing(names, _):
        return [name for name in names if not (path / name).is_file()
                or crc32(path / name) != kept[name]]

    for names in split_work(differing, sorted(kept)):
        damaged += names
    return damaged


def read_checksums(path):
    """({file: its checksum} of a checkpoint, the names of lists of checksums that are damaged)."""
    kept = {}
    damaged = []
    for file in sorted(path.glob("crc32_*.json")):
        try:
            kept |= read_json(file)
        except (ValueError, TypeError, UserError):
            damaged.append(file.name)
    return kept, damaged


def load(out, step, ranks, model, average, optimizer):
    """Read the checkpoint of a step into the three, whatever number of ranks wrote it. Raises
    UserError if it cannot be read, is not what was written, or is not finite."""
    path = folder_of(out, step)
    damaged = damaged_files(path)
    if damaged:
        raise UserError(f"{path} is damaged: {damaged[0]} is not what was written")
    state = state_of(model, average, optimizer)             # dcp.load fills these tensors in place
    try:
        dcp.load(state, checkpoint_id=path, process_group=ranks.saving,
                 no_dist=not dist.is_initialized())
    except (torch.OutOfMemoryError, MemoryError):
        raise                               # not the checkpoint's fault
    except (Exception, dcp.api.CheckpointException) as problem:
        raise UserError(f"{path} cannot be read ({type(problem).__name__}): truncated, or of "
                        f"another model?") from None
    broken = not_finite(state)
    if broken:
        raise UserError(f"{path} cannot be used, because {broken} is not finite in it")
    set_state_dict(model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"])


def load_newest(out, ranks, model, average, optimizer):
    """Read the newest checkpoint that is whole. Returns its step. Newer ones are named, and put
    aside as step_000500.damaged. Raises UserError if none is whole."""
    complete, _ = from_rank_0(lambda: list_checkpoints(out))
    problems = {}
    for step in reversed(complete):
        try:
            load(out, step, ranks, model, average, optimizer)
        except UserError as problem:
            problems[step] = problem
            continue
        for bad, problem in problems.items():
            put_aside(folder_of(out, bad))
            say(f"{problem}; it is now step_{bad:06d}.damaged, and the run goes on from step "
                f"{step}")
        return step
    raise UserError(f"{problems[complete[-1]]}; there is no other checkpoint to go on from: start "
                    f"anew with --overwrite")


def put_aside(path):
    """Rename a checkpoint, so that the run writes that step again."""
    with rank_0_first():
        if rank() == 0:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


# ------------------------------------------------------------------------------------------- memory
@contextlib.contextmanager
def explain_memory(shape, config, ranks, activity="", bytes_per_parameter=0):
    """Turn "out of memory" into a UserError: what the memory is for, and which option to change.

    shape       model.ModelConfig          config      config.Config
    activity    what is going on, if it is not a step of training
    bytes_per_parameter     what that takes beside weights, AdamW and average"""
    try:
        yield
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        if activity:
            needs = needs_beside_training(shape, config, activity, bytes_per_parameter)
        else:
            needs = needs_of_step(shape, config, ranks, config.checkpointing)
        needed = ", ".join(f"{gigabytes(size)} for {what}" for what, size in needs)
        advice = " or ".join(memory_advice(shape, config, ranks, training=not activity))
        raise UserError(f"out of memory: a process needs about {needed}; try {advice}") from None


def needs_of_step(shape, config, ranks, checkpointing):
    """[(what, bytes)] of a training step on one process: see plan.memory."""
    lines = plan.memory(empty_model(shape), ranks_per_copy(config.shard, size()), config.documents,
                        checkpointing, config.ema > 0, ranks.dtype.itemsize,
                        config.model == "transfusion", config.compile)
    return [(what, number) for what, number, _ in lines]


def needs_beside_training(shape, config, activity, bytes_per_parameter):
    """[(what, bytes)] of something that happens between the steps, on one process."""
    model = empty_model(shape)
    state = "weights, AdamW and average" if config.ema > 0 else "weights, AdamW"
    needs = [(state, plan.at_rest(model, ranks_per_copy(config.shard, size()), config.ema > 0))]
    if bytes_per_parameter:
        needs.append((f"what happens now ({activity})", bytes_per_parameter * count(model)))
    return needs


def memory_advice(shape, config, ranks, training):
    """The options that would lower the memory, as a list of str. training: whether it ran out in a
    training step: then smaller micro-batches help."""
    advice = []
    if training and config.documents > 1:
        pieces = smallest_factor(config.documents)
        new_run = "" if config.data == "shards" else ", in a new run"
        advice.append(f"--documents {config.documents // pieces} --accumulate "
                      f"{pieces * config.accumulate} (the same batch in smaller pieces{new_run})")
    if training and not config.checkpointing:
        needs = needs_of_step(shape, config, ranks, checkpointing=True)
        in_all = gigabytes(sum(number for _, number in needs))
        advice.append(f"--checkpointing (in all {in_all})")
    shard = ranks_per_copy(config.shard, size())
    if shard < size():
        advice.append(f"--shard {2 * shard}")               # each process owns half as much
    if config.ema:
        advice.append("--ema 0 (no average, in a new run)")
    return [*advice, "more processes"]


def empty_model(shape):
    """The Transfusion of a ModelConfig, without memory."""
    with torch.device("meta"):
        return Transfusion(shape)


def smallest_factor(n):
    """The smallest factor of n that is above 1."""
    factor = 2
    while n % factor:
        factor += 1
    return factor


def gigabytes(number):
    """A number of bytes, in words."""
    return f"{number / 1e9:.1f} GB"


def main():
    """Show how a step is dealt out."""
    print("a step of 8 micro-batches, dealt out:")
    for R in (1, 2, 4):
        shares = []
        for r in range(R):
            numbers = " ".join(str(k) for k in range(r, 8, R))
            shares.append(f"rank {r}: {numbers}")
        print(f"  R = {R}   " + "   ".join(shares))
    print("what this costs in memory and time: python -m scale.plan")


if __name__ == "__main__":
    run_command(lambda _: main())
