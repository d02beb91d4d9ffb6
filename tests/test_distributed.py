"""
test_distributed.py: two processes are one process                      (scale/distributed.py; docs/PAPER.md §4.10)

One start of two gloo processes (`work`, at the end) trains, is interrupted, resumes and draws, another of four trains; this
process does the same alone and compares. Micro-batches are made as unequal as can be: each has another number of documents, one has no picture.
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

sys.path.insert(0, str(Path(__file__).parent.parent))

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
MODELS = {"linear": [], "unet": ["--encoder", "unet"],                # what is trained
          "chameleon": ["--model", "chameleon", "--stable", "--vae", str(ASSETS / "scenes_vq.pt"), "--seq-len", "160"]}
MANY = {"unet": ["--shard", "1", "--checkpointing", "--compile"]}       # how, by several processes; --shard 1: a 2 x 1 mesh


@contextlib.contextmanager
def tiny_and_uneven():
    """A tiny "toy", and micro-batches of 1, 3, 5 documents and one of words alone."""
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "toy", (2, 32, 2))
        patch.setattr(Feed, "batch", uneven)
        # --compile: with graphs as on a GPU, but without the minutes of a CPU's compiler.
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        yield patch


def command(folder, out, *more):
    """The argument list of a run of 6 steps with 4 micro-batches each. It clips: the gradient's norm is above 1. (At ten
    times this learning rate the U-Net's loss explodes, and rounding errors with it: 1e-8, 1e-7, 1e-4, 1e-2.)"""
    return small_run(vae=folder / "vae.pt", out=folder / out, accumulate=4, save_every=3, gap_every=3) + list(more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which two processes have done all that `work` does: two_linear/, stopped_linear/, ..., pictures.npz."""
    folder = tmp_path_factory.mktemp("scale")
    torch.manual_seed(0)
    checkpoint.save(folder / "vae.pt", checkpoint.pack_vae(vae_module.VAE(vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2))))
    torchrun(2, folder)
    return folder


def torchrun(processes, folder):
    """Start `work` in so many processes and wait for them."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__, str(folder)]
    with open(folder / "said", "w") as said:
        started = subprocess.Popen(line, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            status = started.wait(timeout=600)          # about 20 s on a quiet core; a rank that waits for ever ends here
        except subprocess.TimeoutExpired:
            started.terminate()                         # TRAP: kill() would leave the two processes behind
            status = started.wait()
    assert status == 0, (folder / "said").read_text()[-3000:]


@pytest.fixture(scope="module")
def alone(folder):
    """A function: the folder of the same run by one process."""
    def run(encoder):
        out = folder / f"one_{encoder}"
        if not out.exists():
            with tiny_and_uneven():
                train.main(command(folder, f"one_{encoder}", *MODELS[encoder]))
        return out
    return run


def close(one, two, tolerance):
    """Whether two logs tell the same losses, gradient norms and gaps, line by line."""
    assert [row["step"] for row in one] == [row["step"] for row in two] and len(one) == 6
    for a, b in zip(one, two):
        for k in ("lm", "diffusion", "grad_norm", "gap"):
            assert (k in a) == (k in b) and abs((a.get(k) or 0) - (b.get(k) or 0)) <= tolerance * max(1, abs(a.get(k) or 0)), (a["step"], k)
    return True


def far(one, two):
    """The largest difference between the tensors of two checkpoints."""
    one, two = states(one), states(two)
    assert one.keys() == two.keys() and one["step"] == two["step"] == 6
    return max((one[k] - two[k]).abs().max().item() for k in one if k.split(".")[0] in ("model", "average"))


# -------------------------------------------------------------------------------------------------- two processes and one
@pytest.mark.parametrize("encoder", MODELS)
def test_two_processes_take_the_steps_of_one(folder, alone, encoder):
    """docs/PAPER.md §4.10: catches means of means, clipping by a rank's own norm, weights drawn by the
    shard, a rank with the other's data, and a hang where one rank has no picture."""
    two = folder / f"two_{encoder}"
    assert close(log(alone(encoder)), log(two), 1e-5) and (log(two)[-1]["grad_norm"] > 1.5 or encoder == "chameleon")
    assert far(alone(encoder), two) < 1e-3              # AdamW divides small gradients by their own size: 1e-7 becomes 1e-5


def test_four_processes_on_a_2d_mesh_take_the_steps_of_one(folder):
    """Many nodes, in miniature: 2 copies x 2 shards, 8 micro-batches. Catches gradients that are never added up between the
    copies, or, at the network's cost, after each micro-batch instead of once per step."""
    torchrun(4, folder)
    assert np.load(folder / "asked.npy").tolist() == [False, True] * 6  # 2 micro-batches per process and step
    with tiny_and_uneven():
        train.main(command(folder, "one_of_four", "--accumulate", "8"))
    assert close(log(folder / "one_of_four"), log(folder / "four"), 1e-5) and far(folder / "one_of_four", folder / "four") < 1e-3


def test_a_step_sends_two_small_messages(folder):
    """One before the forward, the counts of eq. 4; one after the backward, L and the gradient's norm. Catches one for each number:
    each is a wait for the slowest of 512 processes."""
    messages = json.loads((folder / "messages.json").read_text())
    assert messages == [2] * 6


def test_a_compiled_run_has_six_graphs(folder):
    """A block, and five for the shapes of the U-Net's. Catches a graph for every number of pictures, one for 0 and for 1, and one that breaks in
    two, with FSDP and checkpointing around it. That the numbers are those of plain code is in
    `test_two_processes_take_the_steps_of_one`: only two processes compile there."""
    graphs, breaks = json.loads((folder / "graphs.json").read_text())
    assert graphs == [6] * 6 and breaks == {}


def test_the_unet_compiles_once(make_model, monkeypatch):
    """--compile: a graph for every number of pictures, a break in the middle, or other outputs or gradients than the plain code's."""
    torch._dynamo.reset()
    compiled = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiled, fullgraph=True))     # fullgraph: no break inside
    plain = make_model("unet")
    fast = copy.deepcopy(plain)
    distributed.prepare_parts(fast, compiled=True)
    for M in (3, 5, 0, 1, 2, 9):
        xt, t, found = torch.randn(M, 4, 4, 4), torch.randint(1, 1001, (M,)), []
        for network in (plain.patch_encoder, fast.patch_encoder):
            vectors, kept = network.encode(xt, t)
            out = network.decode(vectors, t, kept)
            loss = (out ** 2).sum() + vectors.sum()
            found.append([vectors, out, *torch.autograd.grad(loss, list(network.parameters()))])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*found)) and (M == 0 or found[0][1].abs().sum() > 1)
    assert compiled.frame_count == 4, "two sizes, on the way down and up"


@pytest.mark.parametrize("encoder", MODELS)
def test_the_small_file_is_whole(folder, encoder):
    """Catches a model.pt that holds rank 0's shard, or the weights of another step."""
    average, trained = states(folder / f"two_{encoder}"), load_trained(folder / f"two_{encoder}/model.pt")
    for k, v in trained.model.state_dict().items():
        assert torch.allclose(v, average[f"average.{k}"], rtol=1e-3, atol=1e-6), k


def test_an_export_is_whole(folder):
    """Catches a model.pt of one rank's shards: one process reads what two have written."""
    two = folder / "two_linear"
    export.export(distributed.folder_of(two, 6), folder / "exported.pt")
    exported, last = (checkpoint.load(path, "model")["weights"] for path in (folder / "exported.pt", two / "model.pt"))
    assert same(exported, last) == []


def test_without_an_average_on_two(folder):
    """Catches --ema 0 that trains otherwise, saves the weights twice, or ends with other weights than the last ones."""
    one, two = states(folder / "two_linear"), states(folder / "two_without")
    weights = {k: v for k, v in two.items() if k.startswith("model.")}
    assert all(torch.equal(v, one[k]) for k, v in weights.items()) and not any(k.startswith("average.") for k in two)
    for k, v in load_trained(folder / "two_without/model.pt").model.state_dict().items():
        assert torch.allclose(v, weights[f"model.{k}"], rtol=1e-3, atol=1e-6), k


@pytest.mark.parametrize("encoder", MODELS)
def test_ctrl_c_on_one_rank_stops_both_and_resume_on_two_repeats(folder, encoder):
    """Catches ranks that stop at different steps (they would wait for ever), a checkpoint that training went on to change
    while it was being written, and whatever the checkpoint forgets: equal to the bit."""
    assert same(states(folder / f"two_{encoder}"), states(folder / f"stopped_{encoder}")) == []
    assert log(folder / f"two_{encoder}") == log(folder / f"stopped_{encoder}")


@pytest.mark.parametrize("encoder", MODELS)
def test_resume_on_one_what_two_have_saved(folder, capsys, encoder):
    """Catches state that depends on the number of ranks, and a half-written checkpoint that is taken for a whole one."""
    two, out = folder / f"two_{encoder}", f"resumed_{encoder}"
    shutil.copytree(two, folder / out)
    (folder / out / "checkpoints/step_000006/.metadata").unlink()       # killed while step 6 was being written
    assert distributed.list_checkpoints(folder / out) == ([3], [6])
    with tiny_and_uneven():
        train.main(command(folder, out, "--resume", *MODELS[encoder]))          # --shard and --checkpointing may change
    said = capsys.readouterr().out
    assert "resuming from" in said and "step_000003" in said and "step_000006 was not finished" in said
    assert close(log(folder / out), log(two), 1e-5) and distributed.list_checkpoints(folder / out) == ([3, 6], [])
    assert far(folder / out, two) < 1e-3


def test_pictures_do_not_depend_on_who_draws_them(folder):
    """Catches ranks that all draw with the same noise, or hand the pictures back in another order."""
    trained, two = load_trained(folder / "two_linear/model.pt"), np.load(folder / "pictures.npz")
    pictures = drawing.draw(trained, CAPTIONS, steps=3)
    assert np.abs(pictures.astype(int) - two["pictures"]).max() <= 1 and (pictures[1] != pictures[3]).any()
    assert drawing.describe(trained, torch.from_numpy(two["latents"])) == two["said"].tolist()


# ------------------------------------------------------------------------------------------------------------- checkpoints
def test_a_checkpoint_is_of_the_moment_of_saving(tmp_path, make_model):
    """Catches asynchronous saving of the live weights: what changes after `save` must not reach the file."""
    one, two = make_model(), make_model()
    optimizers = [torch.optim.AdamW(m.parameters()) for m in (one, two)]
    before = {k: v.clone() for k, v in one.state_dict().items()}
    saver = distributed.Saver(tmp_path, distributed.Ranks(torch.device("cpu")))
    saver.save(1, one, one, optimizers[0])
    with torch.no_grad():
        for p in one.parameters():
            p.add_(1)
    saver.wait()
    distributed.load(tmp_path, 1, saver.ranks, two, two, optimizers[1])
    assert same(before, dict(two.state_dict())) == []
    for step in (2, 3):
        saver.save(step, one, one, optimizers[0])
    saver.wait()
    assert distributed.list_checkpoints(tmp_path) == ([2, 3], [])        # the last two are kept


def test_other_names_among_checkpoints_are_left_alone(tmp_path):
    """Catches a copy such as step_000008.bak that ends the training at its next save, is resumed from, or is deleted as old."""
    strangers = ["step_000008.bak", "step_9", "step_0000010", "step_", "step_last", "steps", "step_-00001"]
    for step in (4, 8, 12, 16):
        distributed.folder_of(tmp_path, step).mkdir(parents=True)
        if step < 16:                                   # the last is not complete
            (distributed.folder_of(tmp_path, step) / ".metadata").touch()
    for name in strangers:
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / ".metadata").touch()
    (tmp_path / "checkpoints/step_000020").touch()      # a file
    assert distributed.list_checkpoints(tmp_path) == ([4, 8, 12], [16])
    distributed.Saver(tmp_path, distributed.Ranks(torch.device("cpu"))).delete_old()
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step_000008", "step_000012", "step_000020", *strangers}


# -------------------------------------------------------------------------------------------------------- the user's mistakes
@pytest.mark.parametrize("variables, words", [
    (dict(WORLD_SIZE="2"), ["RANK", "MASTER_ADDR", "torchrun --standalone"]),
    (dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost"), ["not MASTER_PORT:", "torchrun"]),
    (dict(RANK="zero", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1"), ["numbers"])], ids=str)
def test_missing_variables(monkeypatch, variables, words):
    """Catches a start by hand, or from a cluster's leftovers, that ends in a traceback or waits for ever."""
    for name in distributed.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as mistake:
        distributed.start()
    assert all(word in str(mistake.value) for word in words)


def test_sizes_that_do_not_fit(monkeypatch):
    """Catches ranks with unequal shares, and shards that are no part of the world."""
    with pytest.raises(UserError, match="--shard 3.*1"):
        distributed.start(3)
    monkeypatch.setattr(distributed, "size", lambda: 4)
    with pytest.raises(UserError, match="4 processes.*6 micro-batches.*--accumulate.*--documents"):
        distributed.micro_batches(6)
    shares = []
    for r in range(4):
        monkeypatch.setattr(distributed, "rank", lambda r=r: r)
        shares += distributed.micro_batches(8)
    assert sorted(shares) == list(range(8))


def test_weights_are_divided_within_a_machine(monkeypatch):
    """The 7B's weights, gathered twice per micro-batch between 64 machines: longer than the step itself."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [distributed.ranks_per_copy(shard, 512) for shard in (0, 4, 512)] == [8, 4, 512]
    assert distributed.ranks_per_copy(0, 12) == 12              # machines of different sizes: all of them
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert distributed.ranks_per_copy(0, 2) == 2


def test_a_step_fits_the_processes(tmp_path, monkeypatch):
    """`torchrun --nproc-per-node 2 train.py` refused, or a batch that is twice as large on two; a resumed run with another one."""
    ranks = distributed.Ranks(torch.device("cpu"))

    def divided(processes, *options, resume=False):
        monkeypatch.setattr(distributed, "size", lambda: processes)
        config = parse_arguments([*options, "--out", str(tmp_path)])[0]
        divide_step(config, tmp_path, ranks, resume)
        return config.documents, config.accumulate

    assert divided(1) == (64, 1) and divided(2) == (32, 2) and divided(3) == (22, 3)
    assert divided(2, "--accumulate", "4") == (64, 4)
    two = parse_arguments(["--documents", "32", "--accumulate", "2"])[0]
    run_folder.write_config(tmp_path, two, {})
    assert divided(1, resume=True) == (32, 2)           # as it was begun
    assert divided(1, "--documents", "96", resume=True) == (96, 1)      # another batch: `check_same_run` says so
    with pytest.raises(UserError, match="no(t|thing).*toy|a toy is better run"):
        divided(1, "--auto")
    with pytest.raises(UserError, match="--auto looks at a GPU's memory"):
        divided(1, "--auto", "--preset", "0.16b")


def test_auto_takes_what_the_dry_run_shows(tmp_path, monkeypatch, capsys):
    """A step of another size, a choice for a GPU that is not there, or a run that begins although nothing fits."""
    memory = 85e9                                       # what an H100 80GB says
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, memory))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    ranks = distributed.Ranks(torch.device("cuda", 0))
    config = parse_arguments(["--preset", "0.16b", "--auto", "--checkpointing"])[0]
    divide_step(config, tmp_path, ranks, resume=False)
    assert (config.documents, config.accumulate, config.checkpointing) == (16, 32, False)
    assert "16 rows per micro-batch, without checkpointing" in capsys.readouterr().out
    seven = parse_arguments(["--preset", "7b", "--auto"])[0]
    with pytest.raises(UserError, match="nothing fits in the 85 GB of a NVIDIA H100"):
        divide_step(seven, tmp_path, ranks, resume=False)
    asked = []                                          # is there an average, which takes memory?
    monkeypatch.setattr(plan, "choose", lambda *numbers: asked.append(numbers[6]) or (1, False, 1e9))
    for ema in ("0", "0.99"):
        divide_step(parse_arguments(["--preset", "0.16b", "--auto", "--ema", ema])[0], tmp_path, ranks, resume=False)
    assert asked == [False, True]


@pytest.mark.parametrize("ema, state", [(0.99, "weights, AdamW and average"), (0.0, "weights, AdamW")])
def test_memory_beside_training_counts_what_there_is(ema, state):
    """Catches an average that is held and not named when memory ran out, or one that is not there."""
    shape = model.sized("mini", vocabulary=20, latent=(4, 8, 8), patch=2)
    config = SimpleNamespace(ema=ema, shard=1)
    at_rest, now = distributed.needs_beside_training(shape, config, "the checkpoint is read", 4)
    n = model.count(model.Transfusion(shape))
    assert at_rest[0] == state and now == ("what happens now (the checkpoint is read)", 4 * n)
    assert at_rest[1] == n * (16 if ema else 12)        # float32: weight, two moments, average


@pytest.mark.parametrize("memory_error", [lambda: torch.empty(10 ** 15), lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA"))])
def test_out_of_memory(folder, tmp_path, monkeypatch, memory_error):
    """Catches a traceback where a smaller batch would do, and advice that names what is already so."""
    real = train.train_step
    with tiny_and_uneven():
        monkeypatch.setattr(train, "train_step", lambda run: memory_error())
        with pytest.raises(UserError, match=r"GB for activations.*--documents 3 --accumulate 8.*--checkpointing"):
            train.main(command(folder, "large"))
        with pytest.raises(UserError) as mistake:
            train.main(command(folder, "large", "--checkpointing"))
        assert "--checkpointing" not in str(mistake.value)
        for name, what in (("shard_model", "first weights"), ("gather_model", "whole copy")):       # where else memory may end
            with monkeypatch.context() as patch:
                patch.setattr(train, "train_step", real)
                patch.setattr(distributed, name, lambda *_, **__: memory_error())
                with pytest.raises(UserError, match=f"GB for what happens now.*{what}.*--ema 0") as mistake:
                    train.main(command(folder, f"large_{name}"))
                assert "--documents" not in str(mistake.value) and "--checkpointing" not in str(mistake.value)
        monkeypatch.setattr(train, "train_step", lambda run: (_ for _ in ()).throw(RuntimeError("a bug")))
        with pytest.raises(RuntimeError, match="a bug"):
            train.main(command(folder, "large"))


# ------------------------------------------------------------------------------------------ what the two processes do
class Messages(TorchDispatchMode):
    """n: how many all-reduces were sent inside, ours and those of DTensor."""
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:                            # what it sends comes here again, as a plain tensor
            return NotImplemented
        self.n += function.name().split("::")[1].replace("_", "").startswith("allreduce")
        return function(*args, **(kwargs or {}))


def work(folder):
    """Run by torchrun, in each of two processes; of four, one run on a mesh of 2 copies x 2 shards."""
    torch.set_num_threads(1)
    if os.environ["WORLD_SIZE"] == "4":
        asked, real = [], FSDPModule.set_requires_all_reduce
        with tiny_and_uneven() as patch:
            patch.setattr(FSDPModule, "set_requires_all_reduce", lambda self, last: asked.append(last) or real(self, last))
            train.main(command(folder, "four", "--shard", "2", "--accumulate", "8"))
        if os.environ["RANK"] == "0":
            np.save(folder / "asked.npy", np.array(asked))
        return
    with tiny_and_uneven() as patch:
        real, messages, graphs = train.train_step, [], []

        def count_messages(run):
            with Messages() as sent:
                taken = real(run)
            messages.append(sent.n)
            return taken

        def count_graphs(run):
            taken = real(run)
            graphs.append(counters["stats"]["unique_graphs"])
            return taken
        watched = {"linear": count_messages, "unet": count_graphs}
        for encoder, options in MODELS.items():
            with patch.context() as watch:
                watch.setattr(train, "train_step", watched.get(encoder, real))
                train.main(command(folder, f"two_{encoder}", *options, *MANY.get(encoder, [])))
        if distributed.rank() == 0:
            (folder / "messages.json").write_text(json.dumps(messages))
            (folder / "graphs.json").write_text(json.dumps([graphs, counters["graph_break"]]))
        train.main(command(folder, "two_without", "--ema", "0"))

        def step(run):
            if run.step == 3 and distributed.rank() == 1:     # Ctrl-C that reaches one of them only
                signal.raise_signal(signal.SIGINT)
            return real(run)
        for encoder, options in MODELS.items():
            options = options + MANY.get(encoder, [])
            stopped = folder / f"stopped_{encoder}"
            with patch.context() as press:
                press.setattr(train, "train_step", step)
                with pytest.raises(Stopped):
                    train.main(command(folder, stopped.name, *options))
            assert distributed.list_checkpoints(stopped) == ([3, 4], []) and load_trained(stopped / "model.pt")
            train.main(command(folder, stopped.name, "--resume", *options))
    trained = load_trained(folder / "two_linear/model.pt")
    latents = torch.randn(3, *trained.model.config.latent, generator=torch.Generator().manual_seed(0))
    pictures, said = drawing.draw(trained, CAPTIONS, steps=3), drawing.describe(trained, latents)
    if distributed.rank() == 0:
        np.savez(folder / "pictures.npz", pictures=pictures, latents=latents.numpy(), said=np.array(said))
    with pytest.raises(UserError if distributed.rank() == 0 else ZeroDivisionError, match="division by zero"):
        distributed.split_work(lambda part, first: 1 / (1 - first), [0] * 2)       # rank 1 fails: rank 0 must not wait for it
    assert distributed.from_rank_0(distributed.rank) == 0

    def refuse():
        raise UserError("seen by rank 0 alone")
    with pytest.raises(UserError, match="seen by rank 0 alone"):
        distributed.from_rank_0(refuse)
    distributed.wait()                                  # the default group: its patience ends here
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5), dist.group.WORLD)
    with distributed.rank_0_first():                    # a VAE is trained meanwhile, for longer than that
        time.sleep(1.5 * (distributed.rank() == 0))
    distributed.split_work(lambda part, first: part, [0] * distributed.size())     # a message just before the end: see distributed.stop


if __name__ == "__main__":
    work(Path(sys.argv[1]))
