"""
test_train.py: the loop                                          (train.py; Transfusion §4.1, App. B; docs/PAPER.md §4.3, §4.9, §4.10)

The batches first, then one step against its formula, then whole runs: interrupted and resumed to the bit, refused where
they would damage what is there.
"""
import copy
import dataclasses
import json
import math
import shutil
import signal
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import data
import diffusion
import model
import train
import vae as vae_module
from config import Config, parse_arguments
from conftest import draw_batch, make_run
from metrics import progress
from scale import distributed, export
from scale.feed import Ahead
from sources import mnist, scenes
from support import checkpoint
from support.checkpoint import load_trained
from support.common import Stopped, UserError


@pytest.fixture(scope="module", autouse=True)
def tiny_size():
    """In this file "toy" has 2 layers of width 32: nothing here looks at what a model has learned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "toy", (2, 32, 2))
        yield


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    """Path of an untrained VAE: (3, 32, 32) -> (2, 8, 8). It stands in for a trained one; no test looks at pictures."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    checkpoint.save(path, checkpoint.pack_vae(vae_module.VAE(vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2))))
    return path


def small_run(**options):
    """The argument list of a small run, with options as keywords."""
    small = dict(size="toy", diffusion="ddpm", shift=1, patch=4, pairs=60, documents=6, steps=6, warmup=2, samples=0,
                 log_every=1, gap_every=6, save_every=100, seq_len=96, seed=3)
    if not options.keys() & {"preset", "data", "model"}:                       # whatever the first run is
        small["preset"] = "flow"
    return [word for k, v in {**small, **options}.items() for word in ("--" + k.replace("_", "-"), str(v))]


@pytest.fixture
def command(tiny_vae, tmp_path):
    """`small_run` with this test's own folder and the untrained VAE."""
    return lambda out="run", **options: small_run(**{"vae": tiny_vae, "out": tmp_path / out, **options})


@pytest.fixture(scope="module")
def whole(tiny_vae, tmp_path_factory):
    """The folder of a run that nothing interrupted: what every resumed run must equal."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.main(small_run(vae=tiny_vae, out=out))
    return out


@pytest.fixture
def prepared(command, tmp_path):
    """A function: the Run at step 0 of a small configuration."""
    def build(**options):
        config, *_ = parse_arguments(command(**options))
        return make_run(config, tmp_path / "run")
    return build


def flatten(value, name=""):
    """{"model.embedding.weight": tensor} of dicts within dicts."""
    if not isinstance(value, dict):
        return {name: value}
    flat = {}
    for key in value:
        flat |= flatten(value[key], f"{name}.{key}" if name else str(key))
    return flat


def states(out):
    """Everything in the last checkpoint that must be repeated: {name: tensor or number}."""
    step = distributed.list_checkpoints(out)[0][-1]
    dcp_to_torch_save(distributed.folder_of(out, step), out.parent / "state.pt")
    saved = torch.load(out.parent / "state.pt", weights_only=False)
    return {**flatten({k: saved[k] for k in ("model", "average") if k in saved}), **flatten(saved["optimizer"]["state"]), "step": step,
            "groups": [{k: v for k, v in group.items() if k != "lr"} for group in saved["optimizer"]["param_groups"]],
            "lr": [group["lr"] for group in saved["optimizer"]["param_groups"]]}


def log(out):
    """The lines of log.jsonl, without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds_left")} for row in rows]


def same(one, two):
    """The names under which two dicts of tensors or numbers differ, to the bit."""
    def differ(a, b):
        return not torch.equal(a, b) if isinstance(a, torch.Tensor) else a != b

    return [k for k in one if k not in two or differ(one[k], two[k])] + [k for k in two if k not in one]


# --------------------------------------------------------------------------------------------------------------- batches
def tensors(batch):
    """A Batch as a dict, without its generator, which has been used."""
    return {k: v for k, v in vars(batch).items() if k != "generator"}


def test_a_batch_is_a_function_of_seed_step_and_micro_batch(prepared):
    """Catches random numbers with a memory, which no resume can repeat, and micro-batches or steps that repeat each other."""
    run = prepared()
    first = {(s, m): tensors(draw_batch(run, s, m)) for s in range(3) for m in range(2)}
    torch.rand(5), np.random.rand(5)
    again = {key: tensors(draw_batch(run, *key)) for key in reversed(first)}
    assert all(same(first[key], again[key]) == [] for key in first)
    assert all("eps" in same(first[a], first[b]) for a in first for b in first if a != b)
    run.config.seed += 1
    assert "eps" in same(first[0, 0], tensors(draw_batch(run, 0, 0)))


def test_a_thread_draws_the_next_step(prepared, monkeypatch):
    """Catches a thread that draws other batches than the step would have, that hides what is wrong with one, or names it too early."""
    run, asked = prepared(), []
    real = type(run.feed).batch

    def batch(feed, seed, step, micro):
        asked.append((step, micro))
        if step == 5:
            raise UserError("the shard of step 5 is broken")
        return real(feed, seed, step, micro)

    wanted = {(s, m): tensors(draw_batch(run, s, m)) for s in (0, 1, 2, 4) for m in range(2)}
    monkeypatch.setattr(type(run.feed), "batch", batch)
    run.feed = Ahead(run.feed)
    assert run.feed.tokenizer is run.feed.feed.tokenizer
    for step, micro in wanted:                          # after 2 comes 4, as after a resume
        assert same(wanted[step, micro], tensors(draw_batch(run, step, micro))) == []
    run.feed.thread.shutdown()                          # when all that was begun is done
    assert sorted(asked) == [(s, m) for s in range(6) for m in range(2)]        # each once
    with pytest.raises(UserError, match="step 5"):
        run.feed.coming[run.config.seed, 5, 0].result()


def many_batches(run, n=60):
    """(t, t_max, latents, eps, picture indices) of all pictures of n batches."""
    batches = [draw_batch(run, step, 0) for step in range(n)]
    return [torch.cat([getattr(b, name) for b in batches]) for name in ("t", "t_max", "latents", "eps", "images")]


def test_noise_levels(prepared):
    """docs/PAPER.md §4.3 and §4.9: catches t per batch, the limit as a fixed t, t = 0 in training, and T never reached."""
    run = prepared(documents=60)
    t, t_max, *_ = many_batches(run)
    assert set(t_max.tolist()) == {500, 1000} and (t >= 1).all() and (t <= t_max).all()
    assert all((draw_batch(run, step, 0).t_min == 1).all() for step in range(5))    # no picture of a pair is blinded
    for limit in (500, 1000):
        here = t[t_max == limit].double()
        assert len(here.unique()) > 150 and here.min() <= 0.02 * limit and here.max() >= 0.98 * limit
        assert abs(here.mean() / limit - 0.5) < 5 * 0.2887 / math.sqrt(len(here))     # uniform


def test_the_limit_belongs_to_pictures_before_their_caption(prepared):
    """docs/PAPER.md §4.9: catches the limits shifted by one picture on their way through packing."""
    run = prepared(documents=40)
    for step in range(10):
        batch = draw_batch(run, step, 0)
        for m, limit in enumerate(batch.t_max.tolist()):
            row, first = (batch.image_id == m).nonzero()[0].tolist()
            opened = batch.tokens[row, : first - 1]     # before BOI: BOS only, or an earlier picture, if the picture leads
            document = batch.doc_id[row] == batch.doc_id[row, first]
            second = batch.tokens[row][document][1]
            assert (second == data.BOI) == (limit == 500) and len(opened) >= 1


@pytest.mark.parametrize("options", [dict(), dict(shift=3.0), dict(diffusion="flow"), dict(diffusion="flow", shift=3.0)], ids=str)
def test_the_limit_is_a_level_of_noise(prepared, options):
    """docs/PAPER.md §4.9: catches "t <= 500" left at 500 in a schedule that is noisier there than the paper's."""
    run, paper = prepared(**options), diffusion.Diffusion()
    limits = {int(m) for step in range(8) for m in draw_batch(run, step, 0).t_max} - {1000}
    assert len(limits) == 1
    limit, ratio = limits.pop(), run.diffusion.s / run.diffusion.a      # of noise to signal
    assert ratio[limit] <= paper.s[500] / paper.a[500] < ratio[limit + 1]
    assert limit == 500 or options


def test_latents_are_draws_from_the_encoder(prepared):
    """Catches another picture's latent, the mean without its deviation, and one noise for both: eps must be new."""
    run = prepared(documents=60)
    mean, deviation = run.feed.latents
    _, _, latents, eps, images = many_batches(run, 20)
    noise = (latents - mean[images]) / deviation[images]
    for z in (noise, eps):
        assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    assert abs((noise * eps).mean()) < 0.02
    run.feed.latents = mean, torch.zeros_like(deviation)
    batch = draw_batch(run, 0, 0)
    assert torch.equal(batch.latents, mean[batch.images])


# --------------------------------------------------------------------------------------------------------------- one step
def stop_before_step(run):
    """Make the optimizer do nothing but remember the gradients it was given; returns the list that they come to lie in."""
    kept = []
    run.optimizer.step = lambda *a: kept.append([p.grad.clone() for p in run.model.parameters()])
    return kept


def give(monkeypatch, run, batches):
    """Make the run's feed give these batches, one per micro-batch of a step. Their noise is drawn already."""
    run.micros = range(len(batches))
    monkeypatch.setattr(run.feed, "batch", lambda seed, step, micro: batches[micro])
    monkeypatch.setattr(train, "draw_noise", lambda batch: None)


def joined(a, b):
    """One Batch of two, row under row."""
    ids = torch.where(b.image_id >= 0, b.image_id + len(a.images), -1)
    names = ("tokens", "doc_id", "has_loss", "images", "t_max", "t_min", "latents", "t", "eps")
    return data.Batch(image_id=torch.cat([a.image_id, ids]), **{k: torch.cat([getattr(a, k), getattr(b, k)]) for k in names})


def test_accumulation_equals_the_joint_batch(prepared, monkeypatch):
    """docs/PAPER.md §4.10, mean of micro-batch means: the gradient of a step must not depend on how it was cut into micro-batches."""
    run = prepared(accumulate=2, clip=1e9, drop=0.5)
    run.model.patch_encoder.out.weight.data.normal_(0, 0.1)                  # it starts at zero and would hide the trunk's part
    large = draw_batch(run, 0, 0)
    run.feed.rows = 2
    small = draw_batch(run, 0, 1)
    assert int(large.has_loss.sum()) > 2 * int(small.has_loss.sum()) > 0 and len(large.images) > 2 * len(small.images) > 0
    found = []
    for batches in ([large, small], [joined(large, small)]):
        again = copy.copy(run)
        again.config = dataclasses.replace(run.config, accumulate=len(batches))
        again.model, again.average = copy.deepcopy(run.model), copy.deepcopy(run.average)
        again.optimizer = torch.optim.SGD(again.model.parameters(), lr=0.0)
        gradients = stop_before_step(again)
        give(monkeypatch, again, batches)
        found.append((gradients, train.train_step(again)))
    (g1, told1), (g2, told2) = found
    assert told1["words"] == told2["words"] and told1["lm"] == pytest.approx(told2["lm"], rel=1e-5)
    assert torch.allclose(told1["each"], told2["each"], atol=1e-5) and told1["tokens"] == told2["tokens"]
    for a, b in zip(g1[0], g2[0]):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_a_micro_batch_without_pictures(prepared, monkeypatch):
    """Catches a model that cannot read words alone: a small micro-batch may hold no picture at all."""
    run = prepared()
    batch = data.pack([data.lay_out(["a red circle"], run.feed.tokenizer, run.feed.documents.patches)], run.config.seq_len)
    batch.latents, batch.t, batch.eps = torch.zeros(0, 2, 8, 8), torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, 8, 8)
    give(monkeypatch, run, [batch])
    told = train.train_step(run)
    assert told["words"] == 4 and len(told["each"]) == 0 and math.isfinite(told["grad_norm"])


def test_the_loss_is_equation_4(prepared, monkeypatch):
    """Transfusion eq. 4: catches a wrong lambda, or either loss divided by anything but its own count."""
    run = prepared(clip=1e9, lam=7.0)
    batch = draw_batch(run, 0, 0)
    kept = stop_before_step(run)
    give(monkeypatch, run, [batch])
    other = copy.deepcopy(run.model)
    train.train_step(run)
    lm, words, each = model.losses(other, batch, run.diffusion)
    (lm / words + 7.0 * each.mean()).backward()
    assert words == int(batch.has_loss.sum()) and len(each) == len(batch.images)
    for a, p in zip(kept[0], other.parameters()):
        assert torch.allclose(a, p.grad, rtol=1e-3, atol=1e-6)


def test_clipping_sees_the_whole_gradient(prepared):
    """docs/PAPER.md §4.10: catches clipping in the middle of accumulation, or a gradient left over from the step before."""
    run = prepared(accumulate=2, clip=0.01)
    for _ in range(2):
        kept = stop_before_step(run)
        told = train.train_step(run)
        norm = torch.stack([g.norm() for g in kept[0]]).norm().item()
        assert told["grad_norm"] > 0.1 and norm == pytest.approx(0.01, rel=1e-3)
        assert all(p.grad is None or not p.grad.any() for p in run.model.parameters())


def test_average_by_hand(prepared):
    """Catches an average (EMA) that never moves, copies the model, or keeps its random start for a thousand steps."""
    run = prepared(ema=0.5)
    expected = [p.detach().clone() for p in run.average.parameters()]
    assert same(run.model.state_dict(), run.average.state_dict()) == []
    for step in range(1, 9):
        train.train_step(run)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = [keep * e + (1 - keep) * p.detach() for e, p in zip(expected, run.model.parameters())]
        for e, p in zip(expected, run.average.parameters()):
            assert torch.allclose(e, p, atol=1e-6)


def test_average_is_no_part_of_the_graph(prepared):
    """Catches an average that autograd watches: its graph would grow with every step of the run, and memory with it."""
    run = prepared()
    for _ in range(2):
        train.train_step(run)
    assert all(p.grad_fn is None and not p.requires_grad for p in run.average.parameters())


def test_learning_rate():
    """Paper §4.1: catches a warm-up that starts at 0 (a step lost), a jump where it ends, and another end than a twentieth."""
    config = Config(lr=3e-4, warmup=40, steps=400)
    rates = [train.learning_rate(config, step) for step in range(400)]
    assert rates[0] == pytest.approx(3e-4 / 40) and max(rates) == pytest.approx(3e-4)
    assert all(a < b for a, b in zip(rates[:39], rates[1:40])) and all(a > b for a, b in zip(rates[40:], rates[41:]))
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) < 1.01 * 3e-4 / 40
    assert rates[220] == pytest.approx(3e-4 * (0.05 + 0.95 / 2))       # half way down
    assert rates[-1] == pytest.approx(1.5e-5, rel=0.01)                # 3e-4 to 1.5e-5
    assert train.learning_rate(Config(lr=1.0, warmup=0, steps=10), 0) == 1.0


def test_the_rate_of_this_step_is_used(prepared):
    """Catches a learning rate that is computed and never given to the optimizer, or comes a step late."""
    run = prepared()
    for step in range(3):
        train.train_step(run)
        assert {group["lr"] for group in run.optimizer.param_groups} == {train.learning_rate(run.config, step)}


def test_the_optimizer_is_the_papers(prepared):
    """Paper App. B.1: catches other betas, and weight decay on norms and biases, or on nothing."""
    run = prepared(decay=0.1)
    names = {id(p): name for name, p in run.model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert set(decay) == set(names.values())
    assert all((decay[name] == 0.1) == (p.ndim >= 2) and decay[name] in (0.0, 0.1) for name, p in run.model.named_parameters())
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in run.optimizer.param_groups)


def test_every_weight_learns(prepared):
    """Catches a part of the network that is cut off from both losses."""
    run = prepared()
    before = copy.deepcopy(run.model.state_dict())
    for _ in range(3):
        train.train_step(run)
    still = [k for k, v in run.model.state_dict().items() if torch.equal(v, before[k])]
    assert still == []


# ------------------------------------------------------------------------------------------------------------- whole runs
def interrupt(monkeypatch, at):
    """Press Ctrl-C while step number `at` is running."""
    real = train.train_step

    def step(run):
        if run.step == at - 1:
            signal.raise_signal(signal.SIGINT)
        return real(run)
    monkeypatch.setattr(train, "train_step", step)


def test_resume_equals_uninterrupted(command, tmp_path, whole, monkeypatch):
    """Catches a resume that loses the average, the optimizer, the step count, or the lines of the log: all equal to the bit."""
    with monkeypatch.context() as patch:
        interrupt(patch, at=3)
        with pytest.raises(Stopped, match="step 3.*--resume"):
            train.main(command())
    out = tmp_path / "run"
    assert states(out)["step"] == 3 and load_trained(out / "model.pt")          # a model to draw with
    train.main(command() + ["--resume"])
    assert same(states(whole), states(out)) == [] and log(whole) == log(out)
    one, two = (checkpoint.load(path / "model.pt", "model")["weights"] for path in (whole, out))
    assert same(one, two) == []


def test_resume_after_a_crash(command, tmp_path, whole, monkeypatch):
    """Catches a crash (no Ctrl-C, nothing saved) after the last checkpoint: the log must not hold two lines of one step, and
    a line of which only half was written must not stop the resumed run."""
    real, out = train.train_step, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda run: real(run) if run.step < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(command(save_every=2))
    assert states(out)["step"] == 4 and len(log(out)) == 5
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lm": 0.')
    train.main(command(save_every=2) + ["--resume"])
    assert same(states(whole), states(out)) == [] and log(whole) == log(out)


@pytest.mark.parametrize("where", ["losses", "optimizer", "average"])
def test_ctrl_c_in_the_middle_of_a_step(command, tmp_path, whole, monkeypatch, where):
    """Catches Ctrl-C between the optimizer's update, the count of steps and the average: a resume would repeat or skip one."""
    places = {"losses": (train, "losses"), "optimizer": (torch.optim.AdamW, "step"), "average": (torch, "_foreach_lerp_")}
    (owner, name) = places[where]
    real, calls, out = getattr(owner, name), [], tmp_path / "run"

    def call(*args, **more):
        calls.append(name)
        found = real(*args, **more) if where != "average" else None     # "average": the signal comes just before it
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)          # what Ctrl-C sends
        return real(*args, **more) if where == "average" else found
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        with pytest.raises(Stopped):
            train.main(command())
    assert states(out)["step"] in (2, 3)
    train.main(command() + ["--resume"])
    assert same(states(whole), states(out)) == []


def folder(path):
    """{name: content} of every file in a run's folder."""
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_an_existing_run_is_not_overwritten(command, tmp_path, whole):
    """Catches yesterday's run lost to a second `python train.py`; --overwrite starts anew."""
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match="--resume.*--overwrite.*--out"):
        train.main(command(steps=2, seed=4))
    assert folder(tmp_path / "run") == folder(whole)
    train.main(command(steps=2, seed=4) + ["--overwrite"])
    assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 4
    assert [row["step"] for row in log(tmp_path / "run")] == [1, 2] and states(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("option, value", [("lr", 0.1), ("documents", 7), ("steps", 9), ("drop", 0.3), ("patch", 2)])
def test_resume_with_another_configuration_is_refused(command, tmp_path, whole, option, value):
    """Catches a resumed run that is neither the old one nor a new one; nothing of the old one may be touched."""
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match=f"--{option} "):
        train.main(command(**{option: value}) + ["--resume"])
    assert folder(tmp_path / "run") == folder(whole)


def test_an_option_that_an_old_run_did_not_know(command, tmp_path, whole):
    """Its config.json says nothing of the newest options: they had their defaults. Catches a Transfusion that goes on as a Llama."""
    shutil.copytree(whole, tmp_path / "run")
    kept = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps({k: v for k, v in kept.items() if k not in ("t_limit", "stable")}))
    with pytest.raises(UserError, match="--t-limit 500"):
        train.main(command(t_limit=900) + ["--resume"])
    train.main(command() + ["--resume"])


def test_resume_may_change_what_does_not_change_the_run(command, tmp_path, whole):
    """Catches a resume that refuses another --save-every; a finished run resumed only writes its results again."""
    shutil.copytree(whole, tmp_path / "run")
    train.main(command(save_every=7, log_every=2) + ["--resume"])
    assert same(states(whole), states(tmp_path / "run")) == [] and log(whole) == log(tmp_path / "run")


def test_without_an_average(command, tmp_path):
    """Catches --ema 0 that still holds a second copy of the weights, or that ends with other weights than one that does not
    remember (an average that forgets at once)."""
    train.main(command("none", ema=0, save_every=3))
    train.main(command("forgets", ema=1e-9, save_every=3))
    one, two = (load_trained(tmp_path / name / "model.pt").model.state_dict() for name in ("none", "forgets"))
    assert same(one, two) == []
    run = make_run(parse_arguments(command(ema=0))[0], tmp_path / "run")
    assert run.average is run.model
    train.train_step(run)
    assert not run.gather_trained().model.training
    distributed.remove(distributed.folder_of(tmp_path / "none", 6))
    train.main(command("none", ema=0, save_every=3) + ["--resume"])
    none, forgets = states(tmp_path / "none"), states(tmp_path / "forgets")
    assert same(none, {k: v for k, v in forgets.items() if not k.startswith("average.")}) == []


def test_a_kept_checkpoint_becomes_a_model(command, tmp_path, monkeypatch):
    """Fig. 5 scores one run after several budgets. Catches a checkpoint of --keep-every that is deleted, or any other that is
    kept; an export of other weights than the average, of the newest step, or only after the run's end."""
    out = tmp_path / "run"
    averages, real = {}, train.train_step

    def step(run):
        if run.step == 5:                               # while it trains, and whatever model.pt it has by now
            (out / "model.pt").unlink(missing_ok=True)
            export.main([str(distributed.folder_of(out, 2)), "-o", str(out / "on_its_way.pt")])
        result = real(run)
        averages[run.step] = {name: weight.half() for name, weight in run.average.state_dict().items()}
        return result
    monkeypatch.setattr(train, "train_step", step)
    train.main(command(save_every=1, keep_every=2, steps=7))
    assert distributed.list_checkpoints(out) == ([2, 4, 6, 7], [])
    for number in (4, 7):
        export.main([str(distributed.folder_of(out, number))])
    for name, number in (("on_its_way.pt", 2), ("model_000004.pt", 4), ("model_000007.pt", 7)):
        assert same(checkpoint.load(out / name, "model")["weights"], averages[number]) == []
    last, exported = (checkpoint.load(out / name, "model") for name in ("model.pt", "model_000007.pt"))
    assert last.keys() == exported.keys() and last["words"] == exported["words"]
    assert last["diffusion"] == exported["diffusion"] and last["about"] == exported["about"]
    assert load_trained(out / "model_000004.pt").model.config == load_trained(out / "model.pt").model.config


def test_exports_that_cannot_be(command, tmp_path):
    """Catches a traceback, and weights of a checkpoint that is half written or damaged."""
    train.main(command(save_every=2, ema=0))
    out = tmp_path / "run"
    with pytest.raises(UserError, match="has .*step_000004, .*step_000006"):
        export.main([str(out)])
    with pytest.raises(UserError, match="not a complete checkpoint"):
        export.main([str(out / "checkpoints/step_000005")])
    with pytest.raises(UserError, match="--keep-every 3 must be a multiple of --save-every 2"):
        train.main(command("other", save_every=2, keep_every=3))
    for name in ("", "text.json"):                      # an empty name is not the default
        with pytest.raises(UserError, match="its name must end in .pt"):
            export.main([str(distributed.folder_of(out, 4)), "--out", name])
    [weights] = distributed.folder_of(out, 4).glob("__0_*")
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match="is damaged"):
        export.main([str(distributed.folder_of(out, 4))])
    (out / "parts.pt").unlink()
    export.main([str(distributed.folder_of(out, 6))])   # a run of an earlier version has model.pt alone
    last, exported = (checkpoint.load(out / name, "model")["weights"] for name in ("model.pt", "model_000006.pt"))
    assert same(last, exported) == []                   # without an average, the model itself
    (out / "model.pt").unlink()
    with pytest.raises(UserError, match="has no parts.pt"):
        export.main([str(distributed.folder_of(out, 6))])


def test_nothing_to_resume(command, tmp_path):
    """Catches --resume with a misspelt --out that quietly starts from nothing."""
    with pytest.raises(UserError, match="nothing to resume"):
        train.main(command("absent") + ["--resume"])
    assert not (tmp_path / "absent").exists()


def test_what_a_run_leaves_behind(command, tmp_path, capsys, monkeypatch):
    """Catches a run without its files, with a log that lacks a number, or with a model that sample.py cannot load; and one of the paper's
    objective that is called another's, or that a second Ctrl-C does not end at once."""
    real, alone = train.finish_step_first, []
    monkeypatch.setattr(train, "finish_step_first", lambda **how: alone.append(how) or real(**how))
    train.main(command(log_every=2))
    assert alone == [{"alone": True}]
    out = tmp_path / "run"
    assert {p.name for p in out.iterdir()} == {"config.json", "log.jsonl", "curves.png", "model.pt", "parts.pt", "checkpoints"}
    config = json.loads((out / "config.json").read_text())
    assert config["seed"] == 3 and config["documents"] == 6 and Config(**{name: config[name] for name in config if name != "learned"})
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all({"step", "lm", "diffusion", "by_t", "grad_norm", "lr", "tokens_per_s", "seconds_left"} <= set(row) for row in rows)
    assert all(len(row["by_t"]) == 5 and row["lm"] > 0 for row in rows) and "gap" in rows[-1]
    assert all(row["tokens_per_s"] > 0 for row in rows)                 # not divided by the time of day
    used = [train.learning_rate(parse_arguments(command(log_every=2))[0], step) for step in (1, 3, 5)]
    assert [row["lr"] for row in rows] == used          # of the step just taken, not of the next one
    assert (out / "curves.png").stat().st_size > 5000
    trained, average = load_trained(out / "model.pt"), states(out)
    for k, v in trained.model.state_dict().items():         # the averaged weights, in 16 bits
        assert torch.allclose(v, average[f"average.{k}"], rtol=1e-3, atol=1e-6), k
    assert trained.tokenizer.vocabulary[:7] == list(data.SPECIAL) and trained.diffusion.kind == "ddpm"
    said = capsys.readouterr().out
    assert "model.pt" in said and "rectified flow" not in said


def test_the_log_tells_the_truth(prepared):
    """Catches a logged loss that is a mean of means, or sorted into the wrong noise level: the first thing to look at."""
    run = prepared()
    steps = [(10.0, 5, [1.0, 2.0], [1, 200], 3.0, 50), (2.0, 1, [9.0], [201], 4.0, 10), (0.0, 2, [5.0], [1000], 6.0, 20)]
    window = [dict(lm=lm, words=words, each=torch.tensor(each), t=torch.tensor(t), grad_norm=norm, tokens=tokens)
              for lm, words, each, t, norm, tokens in steps]
    row = progress.log_line(window, run, lr=0.5, seconds=2.0)
    assert row["lm"] == pytest.approx(12 / 8) and row["diffusion"] == pytest.approx(17 / 4)
    assert row["by_t"] == [1.5, 9.0, None, None, 5.0]
    assert row["grad_norm"] == 6.0 and row["lr"] == 0.5 and row["tokens_per_s"] == 40


def test_losses_fall(command, tmp_path):
    """docs/PAPER.md §4.14, "is this loss normal?": forty steps on sixty scenes must already bring both losses down."""
    train.main(command(steps=40, documents=12, lr=0.02, warmup=5, log_every=10, gap_every=40))
    rows = log(tmp_path / "run")
    assert rows[-1]["lm"] < 0.7 * rows[0]["lm"] and rows[-1]["diffusion"] < rows[0]["diffusion"] < 1.3


ABLATIONS = [["--diffusion", "flow"], ["--noise-skip"], ["--encoder", "unet"], ["--patch-position"], ["--no-bidirectional"]]


@pytest.mark.parametrize("options", ABLATIONS, ids=" ".join)
def test_every_ablation_runs(command, tmp_path, options):
    """Catches an option that nobody has run to its end, or that is read and not passed on: trained, saved, loaded."""
    train.main(command(steps=2) + options)
    trained = load_trained(tmp_path / "run/model.pt")
    config = trained.model.config
    assert options in [["--diffusion", trained.diffusion.kind], ["--encoder", config.encoder],
                       ["--noise-skip"] * trained.diffusion.noise_skip, ["--patch-position"] * config.patch_position,
                       ["--no-bidirectional"] * (not config.bidirectional)]


@pytest.mark.parametrize("size", [32, 48])
def test_a_run_ends_with_its_report(command, tmp_path, size):
    """Catches a report that breaks after hours of training: a run must end with report.json and samples.png, at any size."""
    found = train.main(command(steps=2, samples=2, sample_steps=2, image_size=size, seq_len=128))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report.keys() == found.keys()
    assert found.keys() >= {"geneval", "exact", "rule", "captions", "excess_nats", "entropy", "deductions", "conditioning_gap"}
    assert (tmp_path / "run/samples.png").stat().st_size > 1000


def write_files(source, files):
    """Make a folder of twelve pictures of noise, as `source` has them: "mnist" or "folder"."""
    rng = np.random.default_rng(0)
    files.mkdir()
    if source == "mnist":
        images, labels = rng.integers(0, 256, (12, 28, 28)).astype(np.uint8), np.arange(12).astype(np.uint8) % 10
        for name in mnist.MNIST_FILES:
            array = images if "images" in name else labels
            (files / name).write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())
    else:
        for k in range(12):
            Image.fromarray(rng.integers(0, 256, (40, 30, 3)).astype(np.uint8)).save(files / f"{k}.png")
        lines = [json.dumps({"image": f"{k}.png", "caption": f"picture {k}"}) for k in range(12)]
        (files / "captions.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("source", ["mnist", "folder"])
def test_a_run_on_files(tmp_path, source):
    """Catches a grey picture, or a world without grammar, that train.py, its report or its VAE did not think of."""
    files = tmp_path / "files"
    write_files(source, files)
    grey = vae_module.VAEConfig(image_channels=1 if source == "mnist" else 3, channels=4, multipliers=(1, 1, 1), z=2)
    checkpoint.save(tmp_path / "vae.pt", checkpoint.pack_vae(vae_module.VAE(grey)))
    found = train.main(small_run(data=source, data_dir=files, vae=tmp_path / "vae.pt", out=tmp_path / "run", steps=2,
                                 samples=2, sample_steps=2))
    assert (tmp_path / "run/samples.png").stat().st_size > 1000 and "conditioning_gap" in found
    assert source == "folder" or {"guided", "unguided", "captions"} <= found.keys()


def test_the_vae_is_trained_when_there_is_none(tmp_path, monkeypatch):
    """Catches a VAE trained on the spot that is not kept: a resumed run would read other latents than it learned from."""
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path)      # no VAE is shipped
    options = small_run(out=tmp_path / "run", steps=2, vae_steps=3)
    train.main(options)
    kept = checkpoint.load(tmp_path / "run/vae.pt", "vae")["weights"]
    train.main(options + ["--resume"])
    assert same(kept, checkpoint.load(tmp_path / "run/vae.pt", "vae")["weights"]) == []
    packed = checkpoint.load(tmp_path / "run/model.pt", "model")["vae"]["weights"]
    assert all(torch.equal(v.half() if v.is_floating_point() else v, packed[k]) for k, v in kept.items())
    for change in (["--vae-steps", "2"], ["--vae-lr", "1e-3"]):             # another run must not take the VAE that lies there
        train.main(options + ["--overwrite", *change])
        assert same(kept, checkpoint.load(tmp_path / "run/vae.pt", "vae")["weights"]) != []


# ------------------------------------------------------------------------------------------------------------ fine-tuning
@pytest.fixture(scope="module")
def pretrained(tiny_vae, tmp_path_factory):
    """Path of a tiny model.pt of 32x32 pixels, rectified flow, context 128: what --init starts from."""
    torch.manual_seed(1)
    words, path = data.Words(scenes.load_scenes(1, 0, progress=False).vocabulary()), tmp_path_factory.mktemp("pretrained") / "model.pt"
    shape = model.sized("toy", vocabulary=len(words), latent=(2, 8, 8), patch=4, patch_position=True, context=128)
    network = model.Transfusion(shape)
    network.patch_encoder.out.weight.data.normal_(0, 0.1)
    vae = checkpoint.load_vae(tiny_vae)
    checkpoint.save_trained(path, checkpoint.Trained(network, words, vae, diffusion.Diffusion("flow", shift=3.0)))
    return path


def tuning(pretrained, out, **options):
    """The argument list of a small fine-tuning run."""
    small = dict(preset="edit", init=pretrained, out=out, pairs=40, documents=6, steps=4, warmup=1, samples=0, log_every=1, gap_every=2,
                 save_every=100, seed=3)
    return [word for k, v in {**small, **options}.items() for word in ("--" + k.replace("_", "-"), str(v))]


def test_fine_tuning_starts_from_its_model(pretrained, tmp_path):
    """§4.5: catches a fine-tuned model that started from nothing, that has other words, another shape, VAE or diffusion than
    --init, and a fine-tuning that moves no weight, or the average only."""
    run, start = make_run(parse_arguments(tuning(pretrained, tmp_path / "run"))[0], tmp_path / "run"), load_trained(pretrained)
    assert same(run.model.state_dict(), start.model.state_dict()) == same(run.average.state_dict(), start.model.state_dict()) == []
    train.main(tuning(pretrained, tmp_path / "run"))
    trained, saved = load_trained(tmp_path / "run/model.pt"), states(tmp_path / "run")
    assert trained.model.config == start.model.config and trained.tokenizer.vocabulary == start.tokenizer.vocabulary
    assert (trained.diffusion.kind, trained.diffusion.shift) == ("flow", 3.0) and same(trained.vae.state_dict(), start.vae.state_dict()) == []
    for part in ("model", "average"):
        moved = [(saved[f"{part}.{k}"] - v).abs().max().item() for k, v in start.model.state_dict().items()]
        assert min(moved) > 0 and max(moved) < 0.1
    assert all(row["lm"] > 0 for row in log(tmp_path / "run")) and ["gap" in row for row in log(tmp_path / "run")] == [False, True] * 2


def test_fine_tuning_resumes_to_the_bit(pretrained, tmp_path, monkeypatch):
    """Catches a resume that starts again from --init, or draws other documents."""
    train.main(tuning(pretrained, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt(patch, at=2)
        with pytest.raises(Stopped):
            train.main(tuning(pretrained, tmp_path / "run"))
    assert states(tmp_path / "run")["step"] == 2
    train.main(tuning(pretrained, tmp_path / "run") + ["--resume"])
    assert same(states(tmp_path / "whole"), states(tmp_path / "run")) == [] and log(tmp_path / "whole") == log(tmp_path / "run")
    with pytest.raises(UserError, match="--init"):
        train.main(tuning(tmp_path / "whole/model.pt", tmp_path / "run") + ["--resume"])


def test_blinded_pictures_are_pure_noise(pretrained, tmp_path):
    """docs/PAPER.md §4.8: guidance over the picture needs a branch that never saw it: catches a blinded picture with a little of
    itself left in, or limits that reach another picture on their way through packing."""
    run = make_run(parse_arguments(tuning(pretrained, tmp_path / "run", documents=60, drop=0.3))[0], tmp_path / "run")
    batches = [draw_batch(run, step, 0) for step in range(25)]
    t, t_min, t_max = (torch.cat([getattr(b, name) for b in batches]) for name in ("t", "t_min", "t_max"))
    limit = run.feed.documents.t_limit
    assert set(zip(t_min.tolist(), t_max.tolist())) == {(1, limit), (1, 1000), (1000, 1000)} and limit < 500
    assert (t[t_min == 1000] == 1000).all() and 0.03 < (t_min == 1000).double().mean() < 0.3
    for top in (limit, 1000):
        here = t[(t_min == 1) & (t_max == top)].double()
        assert here.min() >= 1 and here.max() <= top and here.min() <= 0.02 * top + 1 and here.max() >= 0.98 * top
        assert abs(here.mean() / top - 0.5) < 5 * 0.2887 / math.sqrt(len(here)) + 1 / top
    for batch in batches:                               # blinded: the first picture of its document, before any word
        for m in (batch.t_min == 1000).nonzero().flatten().tolist():
            row, first = (batch.image_id == m).nonzero()[0].tolist()
            assert batch.tokens[row, first - 1] == data.BOI and batch.tokens[row, first - 2] == data.BOS


def test_fine_tuning_ends_with_its_report(pretrained, tmp_path):
    """Catches a report that breaks after the training: pictures of before and after, and every number of §4.5."""
    found = train.main(tuning(pretrained, tmp_path / "run", steps=1, samples=2, sample_steps=1))
    assert found.keys() >= {"edits", "kept", "chains", "asked", "kinds", "conditioning_gap"}
    assert json.loads((tmp_path / "run/report.json").read_text()).keys() == found.keys()
    assert (tmp_path / "run/samples.png").stat().st_size > 1000


def test_edits_from_nothing(command, tmp_path):
    """Catches --data edits without a preset and without --init: a KeyError, or words that its documents need and it lacks."""
    train.main(command(data="edits", init="", steps=2, pairs=40))
    assert "changed" in load_trained(tmp_path / "run/model.pt").tokenizer.ids


def test_fine_tuning_on_a_folder(pretrained, tmp_path):
    """Catches a source without a grammar that the loop or its report did not think of."""
    folder_of_edits(tmp_path / "mine", "make the circle blue")
    found = train.main(tuning(pretrained, tmp_path / "run", data_dir=tmp_path / "mine", steps=2, samples=2, sample_steps=2))
    assert "conditioning_gap" in found and (tmp_path / "run/samples.png").stat().st_size > 1000


def folder_of_edits(folder, text, n=12, at=None):
    """A folder of n triples; the instruction number `at` (or all) is `text`."""
    folder.mkdir()
    for k in range(n):
        Image.new("RGB", (32, 32), (20 * k, 0, 0)).save(folder / f"{k}.png")
        Image.new("RGB", (32, 32), (20 * k, 0, 99)).save(folder / f"{k}_after.png")
    lines = [{"before": f"{k}.png", "instruction": text if at in (None, k) else "remove the circle", "after": f"{k}_after.png"} for k in range(n)]
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
