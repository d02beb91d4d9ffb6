"""
test_train.py: one step of the loop          (train.py; Transfusion §4.1, App. B; docs/PAPER.md §4)

THE IDEA    First what a step reads: random numbers, noise levels, latents. Then what it does: eq.
            4, the clipped gradient, AdamW and the average are held to formulas that are written
            out here. Last, what the log says about it. Whole runs are in test_train_runs.py and
            test_fine_tuning.py.
TRY IT      pytest -n 0 tests/test_train.py
"""
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import data
import diffusion
import model
import train
from config import Config, parse_arguments
from conftest import draw_batch, make_run
from metrics import progress
from scale.feed import Ahead
from small_runs import same
from support.common import UserError


@pytest.fixture
def prepared(command, tmp_path):
    """A function: the Run at step 0 of a small configuration."""

    def build(**options):
        config, *_ = parse_arguments(command(**options))
        return make_run(config, tmp_path / "run")

    return build


# ------------------------------------------------------------------------------------------ batches
def tensors(batch):
    """A Batch as a dict, without its generator, which has been used."""
    return {name: value for name, value in vars(batch).items() if name != "generator"}


def test_a_batch_is_a_function_of_seed_step_and_micro_batch(prepared):
    """Catches random numbers with a memory, which no resume can repeat. Catches micro-batches or
    steps that repeat each other."""
    run = prepared()
    keys = [(step, micro) for step in range(3) for micro in range(2)]
    first = {key: tensors(draw_batch(run, *key)) for key in keys}

    # Other random numbers are drawn in between, and the batches come in another order.
    torch.rand(5)
    np.random.rand(5)
    for key in reversed(keys):
        assert same(first[key], tensors(draw_batch(run, *key))) == []

    for a in keys:
        for b in keys:
            if a != b:
                assert "eps" in same(first[a], first[b])

    run.config.seed += 1
    assert "eps" in same(first[0, 0], tensors(draw_batch(run, 0, 0)))


def test_a_thread_draws_the_next_step(prepared, monkeypatch):
    """Catches a thread that draws other batches than the step would have drawn. Catches one that
    hides an error, or raises it before its batch is asked for."""
    run = prepared()
    real = type(run.feed).batch
    keys = [(step, micro) for step in (0, 1, 2, 4) for micro in range(2)]   # 4 after 2: a resume
    wanted = {key: tensors(draw_batch(run, *key)) for key in keys}
    asked = []

    def batch(feed, seed, step, micro):
        asked.append((step, micro))
        if step == 5:
            raise UserError("the shard of step 5 is broken")
        return real(feed, seed, step, micro)

    monkeypatch.setattr(type(run.feed), "batch", batch)
    run.feed = Ahead(run.feed)
    assert run.feed.tokenizer is run.feed.feed.tokenizer
    for key in keys:
        assert same(wanted[key], tensors(draw_batch(run, *key))) == []

    run.feed.thread.shutdown()                          # waits for all that was begun
    once_each = [(step, micro) for step in range(6) for micro in range(2)]
    assert sorted(asked) == once_each
    with pytest.raises(UserError, match="step 5"):
        run.feed.coming[run.config.seed, 5, 0].result()


def many_batches(run, n=60):
    """(t, t_max, latents, eps, picture indices) of all pictures of n batches."""
    batches = [draw_batch(run, step, 0) for step in range(n)]
    columns = []
    for name in ("t", "t_max", "latents", "eps", "images"):
        columns.append(torch.cat([getattr(batch, name) for batch in batches]))
    return columns


def test_noise_levels(prepared):
    """docs/PAPER.md §4.3 and §4.9. Catches one t for a whole batch, the limit 500 taken for t
    itself, t = 0 in training, and a T that is never reached."""
    run = prepared(documents=60)
    t, t_max, *_ = many_batches(run)
    assert set(t_max.tolist()) == {500, 1000}
    assert (t >= 1).all()
    assert (t <= t_max).all()
    for step in range(5):
        assert (draw_batch(run, step, 0).t_min == 1).all()      # pure noise is for edits: t_min = T

    for limit in (500, 1000):
        here = t[t_max == limit].double()
        assert len(here.unique()) > 150
        assert here.min() <= 0.02 * limit
        assert here.max() >= 0.98 * limit
        five_sigma = 5 / math.sqrt(12 * len(here))      # of a mean of uniform numbers
        assert abs(here.mean() / limit - 0.5) < five_sigma


def test_the_limit_belongs_to_pictures_before_their_caption(prepared):
    """docs/PAPER.md §4.9. Catches limits that packing shifts by one picture."""
    run = prepared(documents=40)
    for step in range(10):
        batch = draw_batch(run, step, 0)
        for m, limit in enumerate(batch.t_max.tolist()):
            row, first = (batch.image_id == m).nonzero()[0].tolist()
            # Before BOI stands at least BOS; more, if words or another picture come first.
            assert len(batch.tokens[row, : first - 1]) >= 1
            document = batch.doc_id[row] == batch.doc_id[row, first]
            second = batch.tokens[row][document][1]
            picture_leads = second == data.BOI
            assert picture_leads == (limit == 500)


SCHEDULES = [
    dict(),                                             # the paper's
    dict(shift=3.0),
    dict(diffusion="flow"),
    dict(diffusion="flow", shift=3.0),
]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_the_limit_is_a_level_of_noise(prepared, options):
    """docs/PAPER.md §4.9. Catches "t <= 500" left at 500 in a schedule that is noisier there than
    the paper's."""
    run = prepared(**options)
    limits = set()
    for step in range(8):
        limits |= set(draw_batch(run, step, 0).t_max.tolist())
    limits -= {1000}                                    # pictures after their caption have no limit
    assert len(limits) == 1
    limit = limits.pop()

    paper = diffusion.Diffusion()
    wanted = paper.s[500] / paper.a[500]                # noise to signal
    ratio = run.diffusion.s / run.diffusion.a
    assert ratio[limit] <= wanted < ratio[limit + 1]
    if not options:
        assert limit == 500


def test_latents_are_draws_from_the_encoder(prepared):
    """Catches another picture's latent, and a mean without its deviation. Catches one noise for
    both latent and eps: eps must be new."""
    run = prepared(documents=60)
    mean, deviation = run.feed.latents
    _, _, latents, eps, images = many_batches(run, 20)

    noise = (latents - mean[images]) / deviation[images]
    for z in (noise, eps):
        assert abs(z.mean()) < 0.02
        assert abs(z.std() - 1) < 0.02
    assert abs((noise * eps).mean()) < 0.02             # independent

    run.feed.latents = mean, torch.zeros_like(deviation)
    batch = draw_batch(run, 0, 0)
    assert torch.equal(batch.latents, mean[batch.images])


# ----------------------------------------------------------------------------------------- one step
def stop_before_step(run):
    """Make the optimizer do nothing but remember the gradients that it was given. Returns the list
    in which they will lie, one entry per step."""
    kept = []

    def step(*_):
        kept.append([weight.grad.clone() for weight in run.model.parameters()])

    run.optimizer.step = step
    return kept


def give(monkeypatch, run, batches):
    """Make the run's feed give these batches, one per micro-batch of a step. Their noise is drawn
    already."""
    run.micros = range(len(batches))
    monkeypatch.setattr(run.feed, "batch", lambda seed, step, micro: batches[micro])
    monkeypatch.setattr(train, "draw_noise", lambda batch: None)


def joined(a, b):
    """One Batch of two, row under row."""
    # The pictures of b come after those of a, so they get higher numbers; -1 is "no picture".
    ids = torch.where(b.image_id >= 0, b.image_id + len(a.images), -1)
    both = {"image_id": torch.cat([a.image_id, ids])}
    for name in ("tokens", "doc_id", "has_loss", "images", "t_max", "t_min", "latents", "t", "eps"):
        both[name] = torch.cat([getattr(a, name), getattr(b, name)])
    return data.Batch(**both)


def test_accumulation_equals_the_joint_batch(prepared, monkeypatch):
    """docs/PAPER.md §4.10. Catches a mean of micro-batch means: a step's gradient must not depend
    on how the step was cut into micro-batches."""
    run = prepared(accumulate=2, clip=1e9, drop=0.5)
    # This layer starts at zero, and would hide what the gradient does in the trunk.
    run.model.patch_encoder.out.weight.data.normal_(0, 0.1)

    # Two micro-batches of very different sizes: a mean of their means is far from the mean of all.
    large = draw_batch(run, 0, 0)
    run.feed.rows = 2
    small = draw_batch(run, 0, 1)
    assert int(large.has_loss.sum()) > 2 * int(small.has_loss.sum()) > 0
    assert len(large.images) > 2 * len(small.images) > 0

    results = []
    for batches in ([large, small], [joined(large, small)]):
        again = copy.copy(run)
        again.config = dataclasses.replace(run.config, accumulate=len(batches))
        again.model = copy.deepcopy(run.model)
        again.average = copy.deepcopy(run.average)
        again.optimizer = torch.optim.SGD(again.model.parameters(), lr=0.0)
        gradients = stop_before_step(again)
        give(monkeypatch, again, batches)
        result = train.train_step(again)
        results.append((gradients[0], result))

    (gradient_of_two, two), (gradient_of_one, one) = results
    assert two["words"] == one["words"]
    assert two["tokens"] == one["tokens"]
    assert two["lm"] == pytest.approx(one["lm"], rel=1e-5)
    assert torch.allclose(two["each"], one["each"], atol=1e-5)
    for a, b in zip(gradient_of_two, gradient_of_one):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_a_micro_batch_without_pictures(prepared, monkeypatch):
    """Catches a model that cannot read words alone: a small micro-batch may hold no picture."""
    run = prepared()
    patches = run.feed.documents.patches
    sequence = data.lay_out(["a red circle"], run.feed.tokenizer, patches)
    batch = data.pack([sequence], run.config.seq_len)
    batch.latents = torch.zeros(0, 2, 8, 8)
    batch.t = torch.zeros(0, dtype=torch.long)
    batch.eps = torch.zeros(0, 2, 8, 8)

    give(monkeypatch, run, [batch])
    result = train.train_step(run)
    assert result["words"] == 4                         # a red circle <eos>
    assert len(result["each"]) == 0
    assert math.isfinite(result["grad_norm"])


def test_the_loss_is_equation_4(prepared, monkeypatch):
    """Transfusion eq. 4. Catches a wrong lambda, and either loss divided by anything but its own
    count."""
    run = prepared(clip=1e9, lam=7.0)
    batch = draw_batch(run, 0, 0)
    kept = stop_before_step(run)
    give(monkeypatch, run, [batch])
    other = copy.deepcopy(run.model)
    train.train_step(run)

    lm, words, each = model.losses(other, batch, run.diffusion)
    assert words == int(batch.has_loss.sum())
    assert len(each) == len(batch.images)
    L = lm / words + 7.0 * each.mean()
    L.backward()
    for gradient, weight in zip(kept[0], other.parameters()):
        assert torch.allclose(gradient, weight.grad, rtol=1e-3, atol=1e-6)


def test_clipping_sees_the_whole_gradient(prepared):
    """docs/PAPER.md §4.10. Catches clipping in the middle of accumulation, and a gradient that is
    left over from the step before."""
    run = prepared(accumulate=2, clip=0.01)
    for _ in range(2):
        kept = stop_before_step(run)
        result = train.train_step(run)
        norm = torch.stack([gradient.norm() for gradient in kept[0]]).norm()
        assert result["grad_norm"] > 0.1                # before it was clipped
        assert norm.item() == pytest.approx(0.01, rel=1e-3)
        for weight in run.model.parameters():
            assert weight.grad is None or not weight.grad.any()


def test_what_the_log_keeps_is_no_part_of_the_graph(prepared):
    """Catches losses that are kept for the log with their graph: all activations of every step
    since the last line would stay in memory."""
    run = prepared(accumulate=2)
    result = train.train_step(run)
    assert len(result["each"]) > 0
    assert not result["each"].requires_grad
    for name in ("lm", "words", "tokens", "grad_norm"):
        assert isinstance(result[name], (int, float))


# ----------------------------------------------------------------------- the average of the weights
def test_average_by_hand(prepared):
    """Catches an average (EMA) that never moves, that copies the model, or that keeps its random
    start for a thousand steps."""
    run = prepared(ema=0.5)
    expected = [weight.detach().clone() for weight in run.average.parameters()]
    assert same(run.model.state_dict(), run.average.state_dict()) == []

    for step in range(1, 9):
        train.train_step(run)
        keep = min(0.5, (1 + step) / (10 + step))
        for k, weight in enumerate(run.model.parameters()):
            expected[k] = keep * expected[k] + (1 - keep) * weight.detach()
        for wanted, average in zip(expected, run.average.parameters()):
            assert torch.allclose(wanted, average, atol=1e-6)


def test_average_is_no_part_of_the_graph(prepared):
    """Catches an average that autograd watches: its graph, and the memory that it takes, would grow
    with every step of the run."""
    run = prepared()
    for _ in range(2):
        train.train_step(run)
    for weight in run.average.parameters():
        assert weight.grad_fn is None
        assert not weight.requires_grad


# ----------------------------------------------------------------------- the optimizer and its rate
def test_learning_rate():
    """Paper §4.1. Catches a warm-up that starts at 0 (a lost step), a jump where it ends, and a
    last rate that is not a twentieth of the highest."""
    config = Config(lr=3e-4, warmup=40, steps=400)
    rates = [train.learning_rate(config, step) for step in range(400)]

    first_step = 3e-4 / 40
    assert rates[0] == pytest.approx(first_step)
    assert max(rates) == pytest.approx(3e-4)
    for step in range(39):
        assert rates[step] < rates[step + 1]            # up to the end of the warm-up
    for step in range(40, 399):
        assert rates[step] > rates[step + 1]            # and down from there
    jumps = [abs(a - b) for a, b in zip(rates, rates[1:])]
    assert max(jumps) < 1.01 * first_step

    assert rates[220] == pytest.approx(3e-4 * (0.05 + 0.95 / 2))        # half way down
    assert rates[-1] == pytest.approx(1.5e-5, rel=0.01)                 # 3e-4 / 20
    assert train.learning_rate(Config(lr=1.0, warmup=0, steps=10), 0) == 1.0


def test_the_rate_of_this_step_is_used(prepared):
    """Catches a learning rate that never reaches the optimizer, or reaches it a step late."""
    run = prepared()
    for step in range(3):
        train.train_step(run)
        used = {group["lr"] for group in run.optimizer.param_groups}
        assert used == {train.learning_rate(run.config, step)}


def test_the_optimizer_is_the_papers(prepared):
    """Paper App. B.1. Catches other betas, and weight decay on norms and biases, or on nothing."""
    run = prepared(decay=0.1)
    names = {id(weight): name for name, weight in run.model.named_parameters()}
    decay = {}
    for group in run.optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95)
        assert group["eps"] == 1e-8
        for weight in group["params"]:
            decay[names[id(weight)]] = group["weight_decay"]

    assert set(decay) == set(names.values())            # no weight is forgotten
    for name, weight in run.model.named_parameters():
        matrix = weight.ndim >= 2                       # norms and biases are vectors
        assert decay[name] == (0.1 if matrix else 0.0)


def test_every_weight_learns(prepared):
    """Catches a part of the network that is cut off from both losses."""
    run = prepared()
    before = copy.deepcopy(run.model.state_dict())
    for _ in range(3):
        train.train_step(run)
    after = run.model.state_dict()
    still = [name for name in before if torch.equal(after[name], before[name])]
    assert still == []


# -------------------------------------------------------------------------------- a line of the log
def test_the_log_tells_the_truth(prepared):
    """Catches a logged loss that is a mean of means, or that is sorted into the wrong noise level.
    It is the first thing that people look at."""
    run = prepared()
    window = [
        # Two pictures of the lowest noise level, whose last t is 200.
        dict(lm=10.0, words=5, each=[1.0, 2.0], t=[1, 200], grad_norm=3.0, tokens=50),
        # One of the second level, whose first t is 201; but one word.
        dict(lm=2.0, words=1, each=[9.0], t=[201], grad_norm=4.0, tokens=10),
        # One of the last level.
        dict(lm=0.0, words=2, each=[5.0], t=[1000], grad_norm=6.0, tokens=20),
    ]
    for step in window:
        step["each"] = torch.tensor(step["each"])
        step["t"] = torch.tensor(step["t"])

    row = progress.log_line(window, run, lr=0.5, seconds=2.0)
    assert row["lm"] == pytest.approx(12 / 8)           # per word
    assert row["diffusion"] == pytest.approx(17 / 4)    # per picture
    assert row["by_t"] == [1.5, 9.0, None, None, 5.0]
    assert row["grad_norm"] == 6.0                      # of the last step
    assert row["lr"] == 0.5
    assert row["tokens_per_s"] == 40
