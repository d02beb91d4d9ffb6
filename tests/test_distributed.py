"""
test_distributed.py: two processes are one process      (scale/distributed.py; docs/PAPER.md §4.10)

THE IDEA    One start of two gloo processes trains, is interrupted, resumes and draws (`work`, at
            the end of this file). Another start of four trains on a mesh. Then this process does
            the same alone, and the tests compare: logs, weights, checkpoints, pictures.
UNEVEN      A mean of means is the mean if every part is equally large. So the micro-batches are as
            unequal as can be: each has another number of documents, and one has no picture.
TRY IT      pytest -n 0 tests/test_distributed.py       about a minute on a quiet core
"""
import contextlib
import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))       # torchrun starts this file by its path

import model
import train
import vae as vae_module
from config import parse_arguments
from metrics import drawing
from scale import distributed, export, plan
from scale.run import divide_step
from small_runs import log, same, small_run, states
from sources.feed import Feed
from support import checkpoint, run_folder
from support.checkpoint import load_trained
from support.common import ASSETS, Stopped, UserError

CAPTIONS = ["a red circle", "a circle", "a blue square", "a circle", "a white cross"]
CHAMELEON = ["--model", "chameleon", "--stable", "--seq-len", "160"]

# What is trained: {name: options}.
MODELS = {
    "linear": [],
    "unet": ["--encoder", "unet"],
    "chameleon": [*CHAMELEON, "--vae", str(ASSETS / "scenes_vq.pt")],
}
# How several processes train it; one process does without. --shard 1: a mesh of 2 x 1.
MANY = {"unet": ["--shard", "1", "--checkpointing", "--compile"]}


@contextlib.contextmanager
def tiny_and_uneven():
    """Inside, "toy" is tiny, and micro-batches have 1, 3, 5 documents, then one of words alone."""
    real = Feed.batch

    def uneven(feed, seed, step, micro):
        share = feed.documents.text_share
        feed.rows = 1 + 2 * (micro % 3)
        if micro == 3:
            feed.documents.text_share = 1.0
        try:
            return real(feed, seed, step, micro)
        finally:
            feed.documents.text_share = share

    # --compile: with graphs as on a GPU, but without the minutes of a CPU's compiler.
    compile_eagerly = functools.partial(torch.compile, backend="eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "toy", (2, 32, 2))
        patch.setattr(Feed, "batch", uneven)
        patch.setattr(torch, "compile", compile_eagerly)
        yield patch


def command(folder, out, *more):
    """The argument list of a run of 6 steps with 4 micro-batches each.

    It clips, because the gradient's norm is above 1. (Do not raise its learning rate: at ten times
    this one the U-Net's loss explodes, and rounding errors with it: 1e-8, 1e-7, 1e-4, 1e-2.)"""
    small = small_run(vae=folder / "vae.pt", out=folder / out,
                      accumulate=4, save_every=3, gap_every=3)
    return small + list(more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which two processes have done all that `work` does.

    It has a folder for each of their runs (two_linear/, stopped_linear/, ...), what they counted
    (messages.json, graphs.json) and what they drew (pictures.npz)."""
    folder = tmp_path_factory.mktemp("scale")
    torch.manual_seed(0)
    vae = vae_module.VAE(vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2))
    checkpoint.save(folder / "vae.pt", checkpoint.pack_vae(vae))
    torchrun(2, folder)
    return folder


def torchrun(processes, folder):
    """Start `work` in so many processes and wait for them."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--nproc-per-node", str(processes), __file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = folder / "output.txt"
    with open(output, "w") as file:
        started = subprocess.Popen(line, stdout=file, stderr=file, env=environment)
        try:
            # About 20 s on a quiet core. A rank that waits for ever ends here.
            status = started.wait(timeout=600)
        except subprocess.TimeoutExpired:
            started.terminate()                         # TRAP: kill() would leave its two processes
            status = started.wait()
    assert status == 0, output.read_text()[-3000:]


@pytest.fixture(scope="module")
def alone(folder):
    """A function (encoder) -> the folder of the same run, done by one process: this one."""

    def run(encoder):
        out = folder / f"one_{encoder}"
        if not out.exists():
            with tiny_and_uneven():
                train.main(command(folder, out.name, *MODELS[encoder]))
        return out

    return run


def check_close(one, two, tolerance):
    """Assert that two logs tell the same losses, gradient norms and gaps, line by line."""
    steps = [row["step"] for row in one]
    assert steps == [row["step"] for row in two]
    assert len(steps) == 6

    for a, b in zip(one, two):
        for name in ("lm", "diffusion", "grad_norm", "gap"):
            where = (a["step"], name)
            assert (name in a) == (name in b), where
            first = a.get(name) or 0                    # a Chameleon's diffusion loss is None
            second = b.get(name) or 0
            assert abs(first - second) <= tolerance * max(1, abs(first)), where


def largest_difference(one, two):
    """Between the weights, and their averages, in the last checkpoints of two runs."""
    one = states(one)
    two = states(two)
    assert one.keys() == two.keys()
    assert one["step"] == two["step"] == 6

    differences = []
    for name, weight in one.items():
        if name.split(".")[0] in ("model", "average"):
            differences.append((weight - two[name]).abs().max().item())
    return max(differences)


# --------------------------------------------------------------------------- two processes and one
@pytest.mark.parametrize("encoder", MODELS)
def test_two_processes_take_the_steps_of_one(folder, alone, encoder):
    """docs/PAPER.md §4.10. Catches means of means, clipping by a rank's own norm, first weights
    that are drawn by the shard, a rank that reads the other's data, and a hang where one rank has
    no picture."""
    one = alone(encoder)
    two = folder / f"two_{encoder}"

    check_close(log(one), log(two), 1e-5)
    # AdamW divides small gradients by their own size: a difference of 1e-7 becomes 1e-5.
    assert largest_difference(one, two) < 1e-3

    if encoder != "chameleon":                          # its gradient is too small to be clipped
        assert log(two)[-1]["grad_norm"] > 1.5


def test_four_processes_on_a_2d_mesh_take_the_steps_of_one(folder):
    """Many nodes, in miniature: 2 copies x 2 shards, 8 micro-batches. Catches gradients that are
    never added up between the copies, or, at the network's cost, after each micro-batch instead of
    once per step."""
    torchrun(4, folder)
    with tiny_and_uneven():
        train.main(command(folder, "one_of_four", "--accumulate", "8"))

    # Each process has 2 micro-batches per step, and 6 steps. Only the second one is followed by an
    # all-reduce.
    all_reduce = np.load(folder / "all_reduce.npy").tolist()
    assert all_reduce == [False, True] * 6

    one = folder / "one_of_four"
    four = folder / "four"
    check_close(log(one), log(four), 1e-5)
    assert largest_difference(one, four) < 1e-3


def test_a_step_sends_two_small_messages(folder):
    """One message before the forward pass has the counts of eq. 4, one after the backward pass has
    L and the gradient's norm. Catches a message for each number: each is a wait for the slowest of
    512 processes."""
    messages = json.loads((folder / "messages.json").read_text())
    assert messages == [2] * 6


def test_a_compiled_run_has_six_graphs(folder):
    """One graph for a block, and five for the shapes of the U-Net's. Catches another graph for
    every number of pictures, one for 0 and one for 1, and one that breaks in two, with FSDP and
    checkpointing around it.

    That the numbers are those of plain code is in `test_two_processes_take_the_steps_of_one`: only
    the two processes compile there."""
    graphs, breaks = json.loads((folder / "graphs.json").read_text())
    assert graphs == [6] * 6
    assert breaks == {}


def test_the_unet_compiles_once(make_model, monkeypatch):
    """Catches a graph for every number of pictures under --compile, a break in the middle of one,
    and outputs or gradients that differ from the plain code's."""
    torch._dynamo.reset()
    compiled = CompileCounterWithBackend("eager")
    # fullgraph: a break inside is an error.
    compile_and_count = functools.partial(torch.compile, backend=compiled, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_and_count)
    plain = make_model("unet")
    fast = copy.deepcopy(plain)
    distributed.prepare_parts(fast, compiled=True)

    for M in (3, 5, 0, 1, 2, 9):
        xt = torch.randn(M, 4, 4, 4)
        t = torch.randint(1, 1001, (M,))
        results = []
        for network in (plain.patch_encoder, fast.patch_encoder):
            vectors, kept = network.encode(xt, t)
            out = network.decode(vectors, t, kept)
            loss = (out ** 2).sum() + vectors.sum()
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            results.append([vectors, out, *gradients])

        for a, b in zip(*results):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
        if M > 0:                                       # else the lines above compare zeros
            out = results[0][1]
            assert out.abs().sum() > 1

    assert compiled.frame_count == 4, "two sizes, on the way down and up"


@pytest.mark.parametrize("encoder", MODELS)
def test_the_small_file_is_whole(folder, encoder):
    """Catches a model.pt that holds rank 0's shard, or the weights of another step."""
    average = states(folder / f"two_{encoder}")
    trained = load_trained(folder / f"two_{encoder}/model.pt")

    for name, weight in trained.model.state_dict().items():
        wanted = average[f"average.{name}"]
        assert torch.allclose(weight, wanted, rtol=1e-3, atol=1e-6), name       # model.pt: 16 bits


def test_an_export_is_whole(folder):
    """Catches a model.pt of one rank's shards: one process reads what two have written."""
    two = folder / "two_linear"
    export.export(distributed.folder_of(two, 6), folder / "exported.pt")

    exported = checkpoint.load(folder / "exported.pt", "model")
    last = checkpoint.load(two / "model.pt", "model")
    assert same(exported["weights"], last["weights"]) == []


def test_without_an_average_on_two(folder):
    """Catches --ema 0 that trains otherwise, saves the weights twice, or ends with other weights
    than the last ones."""
    with_average = states(folder / "two_linear")
    without = states(folder / "two_without")
    weights = {name: w for name, w in without.items() if name.startswith("model.")}

    for name, weight in weights.items():
        assert torch.equal(weight, with_average[name])
    assert not any(name.startswith("average.") for name in without)

    trained = load_trained(folder / "two_without/model.pt")
    for name, weight in trained.model.state_dict().items():
        last = weights[f"model.{name}"]
        assert torch.allclose(weight, last, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("encoder", MODELS)
def test_ctrl_c_on_one_rank_stops_both_and_resume_on_two_repeats(folder, encoder):
    """Catches ranks that stop at different steps (they would wait for ever), a checkpoint that
    training went on to change while it was being written, and whatever the checkpoint forgets. The
    resumed run equals the uninterrupted one to the bit."""
    whole = folder / f"two_{encoder}"
    stopped = folder / f"stopped_{encoder}"
    assert same(states(whole), states(stopped)) == []
    assert log(whole) == log(stopped)


@pytest.mark.parametrize("encoder", MODELS)
def test_resume_on_one_what_two_have_saved(folder, capsys, encoder):
    """Catches state that depends on the number of ranks, and a half-written checkpoint that is
    taken for a whole one."""
    two = folder / f"two_{encoder}"
    resumed = folder / f"resumed_{encoder}"
    shutil.copytree(two, resumed)
    # As if it had been killed while step 6 was being written.
    (resumed / "checkpoints/step_000006/.metadata").unlink()
    assert distributed.list_checkpoints(resumed) == ([3], [6])

    with tiny_and_uneven():                             # --shard and --checkpointing may change
        train.main(command(folder, resumed.name, "--resume", *MODELS[encoder]))

    output = capsys.readouterr().out
    assert "resuming from" in output
    assert "step_000003" in output
    assert "step_000006 was not finished" in output
    check_close(log(resumed), log(two), 1e-5)
    assert distributed.list_checkpoints(resumed) == ([3, 6], [])
    assert largest_difference(resumed, two) < 1e-3


def test_pictures_do_not_depend_on_who_draws_them(folder):
    """Catches ranks that all draw with the same noise, or that hand the pictures back in another
    order."""
    trained = load_trained(folder / "two_linear/model.pt")
    two = np.load(folder / "pictures.npz")

    pictures = drawing.draw(trained, CAPTIONS, steps=3)
    difference = np.abs(pictures.astype(int) - two["pictures"])
    assert difference.max() <= 1                        # of 255: rounding
    # The same caption, "a circle", with other noise.
    assert (pictures[1] != pictures[3]).any()

    descriptions = drawing.describe(trained, torch.from_numpy(two["latents"]))
    assert descriptions == two["descriptions"].tolist()


# ------------------------------------------------------------------------------------- checkpoints
def test_a_checkpoint_is_of_the_moment_of_saving(tmp_path, make_model):
    """Catches asynchronous saving of the live weights: what changes after `save` must not reach the
    file."""
    one = make_model()
    two = make_model()
    optimizers = [torch.optim.AdamW(network.parameters()) for network in (one, two)]
    before = {name: weight.clone() for name, weight in one.state_dict().items()}
    saver = distributed.Saver(tmp_path, distributed.Ranks(torch.device("cpu")))

    # Save, and change the weights while that happens.
    saver.save(1, one, one, optimizers[0])
    with torch.no_grad():
        for weight in one.parameters():
            weight.add_(1)
    saver.wait()
    distributed.load(tmp_path, 1, saver.ranks, two, two, optimizers[1])
    assert same(before, dict(two.state_dict())) == []

    # The last two are kept.
    for step in (2, 3):
        saver.save(step, one, one, optimizers[0])
    saver.wait()
    assert distributed.list_checkpoints(tmp_path) == ([2, 3], [])


def test_other_names_among_checkpoints_are_left_alone(tmp_path):
    """Catches a copy such as step_000008.bak that ends the training at its next save, is resumed
    from, or is deleted as old."""
    strangers = ["step_000008.bak", "step_9", "step_0000010", "step_",
                 "step_last", "steps", "step_-00001"]
    checkpoints = tmp_path / "checkpoints"
    for step in (4, 8, 12, 16):
        distributed.folder_of(tmp_path, step).mkdir(parents=True)
        if step < 16:                                   # the last is not complete
            (distributed.folder_of(tmp_path, step) / ".metadata").touch()
    for name in strangers:
        (checkpoints / name).mkdir()
        (checkpoints / name / ".metadata").touch()
    (checkpoints / "step_000020").touch()               # a file

    assert distributed.list_checkpoints(tmp_path) == ([4, 8, 12], [16])
    distributed.Saver(tmp_path, distributed.Ranks(torch.device("cpu"))).delete_old()

    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"step_000008", "step_000012", "step_000020", *strangers}


# ------------------------------------------------------------------------------ the user's mistakes
WORLD = dict(LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost")


@pytest.mark.parametrize("variables, words", [
    (dict(WORLD_SIZE="2"), ["RANK", "MASTER_ADDR", "torchrun --standalone"]),
    (dict(RANK="0", **WORLD), ["not MASTER_PORT:", "torchrun"]),
    (dict(RANK="zero", **WORLD, MASTER_PORT="1"), ["numbers"]),
], ids=str)
def test_missing_variables(monkeypatch, variables, words):
    """Catches a start by hand, or from a cluster's leftovers, that ends in a traceback or waits for
    ever."""
    for name in distributed.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(UserError) as mistake:
        distributed.start()
    for word in words:
        assert word in str(mistake.value)


def test_sizes_that_do_not_fit(monkeypatch):
    """Catches ranks with unequal shares, and shards that are no part of the world."""
    with pytest.raises(UserError, match="--shard 3.*1"):
        distributed.start(3)

    monkeypatch.setattr(distributed, "size", lambda: 4)
    wanted = "4 processes.*6 micro-batches.*--accumulate.*--documents"
    with pytest.raises(UserError, match=wanted):
        distributed.micro_batches(6)

    # 8 micro-batches among 4 processes: every one is somebody's.
    shares = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares += distributed.micro_batches(8)
    assert sorted(shares) == list(range(8))


def test_weights_are_divided_within_a_machine(monkeypatch):
    """Catches the 7B's weights that are gathered twice per micro-batch between 64 machines: that
    takes longer than the step itself."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    divided = [distributed.ranks_per_copy(shard, 512) for shard in (0, 4, 512)]
    assert divided == [8, 4, 512]
    # 12 processes on machines of 8: the machines differ in size, so all share the weights.
    assert distributed.ranks_per_copy(0, 12) == 12

    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert distributed.ranks_per_copy(0, 2) == 2


def test_a_step_fits_the_processes(tmp_path, monkeypatch):
    """Catches `torchrun --nproc-per-node 2 train.py` that is refused, a batch that is twice as
    large on two processes, and a resumed run with another batch."""
    ranks = distributed.Ranks(torch.device("cpu"))

    def divided(processes, *options, resume=False):
        """(documents, accumulate) of a run on so many processes."""
        monkeypatch.setattr(distributed, "size", lambda: processes)
        config = parse_arguments([*options, "--out", str(tmp_path)])[0]
        divide_step(config, tmp_path, ranks, resume)
        return config.documents, config.accumulate

    # A new run has the 64 documents of the preset, rounded up.
    assert divided(1) == (64, 1)
    assert divided(2) == (32, 2)
    assert divided(3) == (22, 3)
    assert divided(2, "--accumulate", "4") == (64, 4)   # as it was said

    # A run that was begun with 2 x 32 documents goes on with these, on one process, too.
    two = parse_arguments(["--documents", "32", "--accumulate", "2"])[0]
    run_folder.write_config(tmp_path, two, {})
    assert divided(1, resume=True) == (32, 2)
    # It is another batch; `check_same_run` will say so.
    assert divided(1, "--documents", "96", resume=True) == (96, 1)

    # --auto is for the paper's sizes, and for GPUs.
    with pytest.raises(UserError, match="no(t|thing).*toy|a toy is better run"):
        divided(1, "--auto")
    with pytest.raises(UserError, match="--auto looks at a GPU's memory"):
        divided(1, "--auto", "--preset", "0.16b")


def test_auto_takes_what_the_dry_run_shows(tmp_path, monkeypatch, capsys):
    """Catches a step of another size, a choice for a GPU that is not there, and a run that begins
    although nothing fits."""
    memory = 85e9                                       # what an H100 80GB says
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, memory))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    ranks = distributed.Ranks(torch.device("cuda", 0))

    config = parse_arguments(["--preset", "0.16b", "--auto", "--checkpointing"])[0]
    divide_step(config, tmp_path, ranks, resume=False)
    assert config.documents == 16
    assert config.accumulate == 32
    assert config.checkpointing is False
    assert "16 rows per micro-batch, without checkpointing" in capsys.readouterr().out

    seven = parse_arguments(["--preset", "7b", "--auto"])[0]
    with pytest.raises(UserError, match="nothing fits in the 85 GB of a NVIDIA H100"):
        divide_step(seven, tmp_path, ranks, resume=False)

    # Is the average, which takes memory, taken into account?
    averages = []

    def choose(*numbers):
        averages.append(numbers[6])
        return 1, False, 1e9

    monkeypatch.setattr(plan, "choose", choose)
    for ema in ("0", "0.99"):
        config = parse_arguments(["--preset", "0.16b", "--auto", "--ema", ema])[0]
        divide_step(config, tmp_path, ranks, resume=False)
    assert averages == [False, True]


@pytest.mark.parametrize("ema, state", [
    (0.99, "weights, AdamW and average"),
    (0.0, "weights, AdamW"),
])
def test_memory_beside_training_counts_what_there_is(ema, state):
    """Catches an average that is held and not named when memory ran out, or one that is named and
    not there."""
    shape = model.sized("mini", vocabulary=20, latent=(4, 8, 8), patch=2)
    config = SimpleNamespace(ema=ema, shard=1)
    at_rest, now = distributed.needs_beside_training(shape, config, "the checkpoint is read", 4)

    n = model.count(model.Transfusion(shape))
    assert at_rest[0] == state
    assert at_rest[1] == n * (16 if ema else 12)        # float32: weight, two moments, average
    assert now == ("what happens now (the checkpoint is read)", 4 * n)


def throw(error):
    """Raise an error, where only an expression may stand."""
    raise error


@pytest.mark.parametrize("memory_error", [
    lambda: torch.empty(10 ** 15),                      # main memory: a petabyte
    lambda: throw(torch.OutOfMemoryError("CUDA")),      # a GPU's
])
def test_out_of_memory(folder, tmp_path, monkeypatch, memory_error):
    """Catches a traceback where a smaller batch would do, and advice that names what is already
    so."""
    real = train.train_step
    with tiny_and_uneven():
        # In a step: a smaller micro-batch helps, and checkpointing unless it is on.
        monkeypatch.setattr(train, "train_step", lambda run: memory_error())
        advice = r"GB for activations.*--documents 3 --accumulate 8.*--checkpointing"
        with pytest.raises(UserError, match=advice):
            train.main(command(folder, "large"))
        with pytest.raises(UserError) as mistake:
            train.main(command(folder, "large", "--checkpointing"))
        assert "--checkpointing" not in str(mistake.value)

        # Beside the steps: neither helps.
        for name, what in (("shard_model", "first weights"), ("gather_model", "whole copy")):
            with monkeypatch.context() as patch:
                patch.setattr(train, "train_step", real)
                patch.setattr(distributed, name, lambda *_, **__: memory_error())
                advice = f"GB for what happens now.*{what}.*--ema 0"
                with pytest.raises(UserError, match=advice) as mistake:
                    train.main(command(folder, f"large_{name}"))
                assert "--documents" not in str(mistake.value)
                assert "--checkpointing" not in str(mistake.value)

        # Any other error stays what it is.
        monkeypatch.setattr(train, "train_step", lambda run: throw(RuntimeError("a bug")))
        with pytest.raises(RuntimeError, match="a bug"):
            train.main(command(folder, "large"))


# --------------------------------------------------------------------- what the other processes do
class Messages(TorchDispatchMode):
    """Counts, in `n`, how many all-reduces are sent inside: ours and those of DTensor."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:                # what it sends comes here again, as a plain tensor
            return NotImplemented
        operation = function.name().split("::")[1].replace("_", "")
        if operation.startswith("allreduce"):
            self.n += 1
        return function(*args, **(kwargs or {}))


def options_of(encoder):
    """How several processes train a model of MODELS: its options, and theirs."""
    return MODELS[encoder] + MANY.get(encoder, [])


def train_on_a_mesh(folder):
    """One run of four processes, 2 copies x 2 shards: four/. all_reduce.npy says, micro-batch by
    micro-batch, whether gradients are added up between the copies."""
    all_reduce = []
    real = FSDPModule.set_requires_all_reduce

    def note(self, last):
        all_reduce.append(last)
        return real(self, last)

    with tiny_and_uneven() as patch:
        patch.setattr(FSDPModule, "set_requires_all_reduce", note)
        train.main(command(folder, "four", "--shard", "2", "--accumulate", "8"))
    if os.environ["RANK"] == "0":
        np.save(folder / "all_reduce.npy", np.array(all_reduce))


def train_all(folder, patch):
    """A run of each model, two_linear/ ... two_chameleon/, and two_without/ without an average.
    messages.json: what the first sends in each step. graphs.json: how often the second compiles."""
    real = train.train_step
    messages = []
    graphs = []

    def count_messages(run):
        with Messages() as sent:
            result = real(run)
        messages.append(sent.n)
        return result

    def count_graphs(run):
        result = real(run)
        graphs.append(counters["stats"]["unique_graphs"])
        return result

    watched = {"linear": count_messages, "unet": count_graphs}
    for encoder in MODELS:
        with patch.context() as watch:
            watch.setattr(train, "train_step", watched.get(encoder, real))
            train.main(command(folder, f"two_{encoder}", *options_of(encoder)))
    if distributed.rank() == 0:
        (folder / "messages.json").write_text(json.dumps(messages))
        (folder / "graphs.json").write_text(json.dumps([graphs, counters["graph_break"]]))

    train.main(command(folder, "two_without", "--ema", "0"))


def stop_and_resume_all(folder, patch):
    """The same runs, each stopped in step 4 and resumed: stopped_linear/ ..."""
    real = train.train_step

    def press_ctrl_c(run):
        if run.step == 3 and distributed.rank() == 1:   # it reaches one of the two only
            signal.raise_signal(signal.SIGINT)
        return real(run)

    for encoder in MODELS:
        stopped = folder / f"stopped_{encoder}"
        line = command(folder, stopped.name, *options_of(encoder))
        with patch.context() as press:
            press.setattr(train, "train_step", press_ctrl_c)
            with pytest.raises(Stopped):
                train.main(line)
        assert distributed.list_checkpoints(stopped) == ([3, 4], [])
        assert load_trained(stopped / "model.pt")
        train.main([*line, "--resume"])


def draw_and_describe(folder):
    """Both draw CAPTIONS and describe three random latents: pictures.npz."""
    trained = load_trained(folder / "two_linear/model.pt")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, *trained.model.config.latent, generator=generator)

    pictures = drawing.draw(trained, CAPTIONS, steps=3)
    descriptions = drawing.describe(trained, latents)
    if distributed.rank() == 0:
        np.savez(folder / "pictures.npz", pictures=pictures, latents=latents.numpy(),
                 descriptions=np.array(descriptions))


def fail_and_wait():
    """Errors, and work that takes long: what must reach the other process, and must not hang."""
    # 1. Rank 1 fails. Rank 0 must not wait for it, and says what happened there.
    error = UserError if distributed.rank() == 0 else ZeroDivisionError
    with pytest.raises(error, match="division by zero"):
        distributed.split_work(lambda part, first: 1 / (1 - first), [0] * 2)

    # 2. Rank 0 alone looks, and its mistake is everyone's.
    assert distributed.from_rank_0(distributed.rank) == 0
    with pytest.raises(UserError, match="seen by rank 0 alone"):
        distributed.from_rank_0(lambda: throw(UserError("seen by rank 0 alone")))

    # 3. Rank 0 works for longer than the default group waits, as when it trains a VAE.
    distributed.wait()                                  # the default group: its patience ends here
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5), dist.group.WORLD)
    with distributed.rank_0_first():
        if distributed.rank() == 0:
            time.sleep(1.5)

    # 4. A message just before the end: see `distributed.stop`.
    distributed.split_work(lambda part, first: part, [0] * distributed.size())


def work(folder):
    """What torchrun runs in each of two processes, or of four."""
    torch.set_num_threads(1)
    if os.environ["WORLD_SIZE"] == "4":
        train_on_a_mesh(folder)
        return
    with tiny_and_uneven() as patch:
        train_all(folder, patch)
        stop_and_resume_all(folder, patch)
    draw_and_describe(folder)
    fail_and_wait()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
