"""test_plan.py: what a run costs: against independent estimates, a FLOP counter, and what autograd really keeps."""
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import on_gpu
import train
from config import PRESETS, parse_arguments
from model import (
    PAPER_SIZES,
    Block,
    ModelConfig,
    Transfusion,
    count,
    paper_model,
    rope_tables,
    sized,
)
from scale import plan
from support.common import UserError


def total(lines):
    """GiB of `plan.memory`'s lines."""
    return sum(size for _, size, _ in lines) / 2 ** 30


def number(lines, label, unit=""):
    """The number of the one line of a plan that starts with a label."""
    line, = [line for line in lines if line.strip().startswith(label)]
    return float(line.strip()[len(label):].split()[0].replace(",", "").rstrip("TM"))


@pytest.fixture(scope="module")
def seven():
    """The 7B model on the meta device."""
    return paper_model("7b")


def run_once(model, batch):
    """One forward and backward pass of random rows: tokens, image_id, doc_id, has_loss, xt, t."""
    logits, out = model(*batch)
    (logits.sum() + out.sum()).backward()


# ---------------------------------------------------------------------------------------------- the independent estimates
def test_seven_billion_on_512_gpus(seven):
    """Estimates made by others than this code: 46.1 GFLOP per token, 4.4 to 4.8 GiB, 2T tokens in 4.6 days at 46% MFU."""
    assert plan.flops_per_token(seven) / 1e9 == pytest.approx(46.1, abs=0.05)
    assert 4.4 * 0.9 <= total(plan.memory(seven, 512)) <= 4.8 * 1.1
    lines = plan.describe(plan.Plan(seven, 1, 1024, 500_000, gpus=512, mfu=0.46, device="H100", shard=512))
    assert number(lines, "days for this run") / number(lines, "in all") * 2 == pytest.approx(4.6, rel=0.1)
    assert number(lines, "transformer") == 46.1 and number(lines, "accumulated") == 2 and number(lines, "in all") == 2.1
    assert number(lines, "all, with full checkpointing") == pytest.approx(total(plan.memory(seven, 512)), abs=0.01)
    assert number(lines, "all, without checkpointing") > 15


def test_seven_billion_on_one_gpu(seven):
    """All of the 7B and its fp32 AdamW on one H200: 102 to 109 GiB, by others' estimate."""
    assert 102 * 0.95 <= total(plan.memory(seven, 1)) <= 109 * 1.05


def test_memory_moves_the_right_way(seven):
    """A sign or a divisor wrong somewhere, which the one total above would not show."""
    base = total(plan.memory(seven, 512))
    assert total(plan.memory(seven, 8)) > 3 * base                      # the state is shared by fewer
    assert base < total(plan.memory(seven, 512, rows=2)) < 2 * base     # activations double, gathered weights do not
    assert total(plan.memory(seven, 512, checkpointing=False)) > 4 * base
    assert total(plan.memory(seven, 1, ema=True)) - total(plan.memory(seven, 1)) == pytest.approx(4 * count(seven) / 2 ** 30)
    for gpus in (1, 8, 512):                            # weights, gradients, two moments: 16 bytes per parameter, shared
        assert sum(size for _, size, _ in plan.memory(seven, gpus)[:3]) == pytest.approx(16 * count(seven) / gpus)


def test_memory_by_hand(seven):
    """Catches checkpoints that are not the inputs of the blocks in 16 bits, and pictures that are not half of the rows, and one more."""
    lines = {what: size for what, size, _ in plan.memory(seven, 512)}
    assert lines["checkpoints"] == 32 * 4096 * 4096 * 2
    pictures = []
    for rows in (1, 2, 8):
        pictures.append(dict((what, size) for what, size, _ in plan.memory(seven, 512, rows=rows))["activations of the patch encoder"])
    assert [size / pictures[0] for size in pictures] == pytest.approx([1, 2, 5])


# ------------------------------------------------------------------------------------------------ against the real thing
@pytest.mark.parametrize("T", [32, 64])
def test_flops_are_those_counted(make_model, T):
    """6 N + 12 L d T with another N, a factor of two, or T missing. Text alone, so that the formula must hit exactly."""
    model = make_model(layers=3, width=64, heads=4, context=T, vocabulary=50).train()
    ids = torch.zeros(2, T, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:       # as plain matrix products
        run_once(model, (ids, ids - 1, ids, ids == 0, torch.zeros(0, 4, 4, 4), ids[0, :0]))
    vectors = sum(p.numel() for part in (model.blocks, model.norm) for p in part.parameters() if p.ndim == 1)
    # N holds the norms' vectors, as in the literature; they are no matrix products, and the counter leaves them out.
    assert counter.get_total_flops() == 2 * T * (plan.flops_per_token(model) - 6 * vectors)


def test_unet_flops_are_those_counted(make_model):
    """The U-Net's share forgotten, or per picture where it should be per position: text and patches are 1 : 1."""
    T, P = 48, 4
    model = make_model("unet", context=T).train()
    plain = make_model("linear", context=T)
    ids, image_id = torch.zeros(1, T, dtype=torch.long), torch.full((1, T), -1)
    for m in range(6):                                  # half of the positions are patches
        image_id[0, 8 * m: 8 * m + P] = m
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_once(model, (ids, image_id, ids, ids == 0, torch.randn(6, 4, 4, 4), torch.arange(6)))
    assert counter.get_total_flops() == pytest.approx(T * plan.flops_per_token(model), rel=0.01)
    assert plan.flops_per_token(model) > 1.5 * plan.flops_per_token(plain)              # else the line above says nothing


def kept_by(forward, besides):
    """Bytes that autograd keeps for the backward pass of forward(), besides the given tensors."""
    kept, known = {}, {x.untyped_storage().data_ptr() for x in besides}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        out = forward()
    del out
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in known)


def test_activations_are_those_that_autograd_keeps():
    """10 d + 4 hidden per position: something forgotten, or counted that is not kept."""
    D, T, block = 256, 64, Block(256, 4)
    x, rope = torch.randn(1, T, D, requires_grad=True), rope_tables(torch.arange(T)[None], D // 4)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    found = kept_by(lambda: block(x, rope, mask), [x, mask, *rope, *block.parameters()])
    assert plan.block_bytes(D, block.down.in_features, itemsize=4) * T == pytest.approx(found, rel=0.1)


def test_encoders_activations_are_those_that_autograd_keeps():
    """The count on the meta device is not what a real picture needs."""
    config = ModelConfig(vocabulary=9, latent=(4, 16, 16), encoder="unet", context=128)
    net, xt, t = Transfusion(config).patch_encoder.bfloat16(), torch.randn(1, 4, 16, 16).bfloat16(), torch.tensor([500])

    def forward():
        vectors, skips = net.encode(xt, t)
        return net.decode(vectors, t, skips)

    assert plan.encoder_costs(config)[1] == pytest.approx(kept_by(forward, [xt, t, *net.parameters()]), rel=0.15)


@pytest.mark.parametrize("encoder", ["linear", "unet"])
def test_weights_are_those_of_a_real_model(make_model, encoder):
    """A part left out of the table, or counted twice."""
    model = make_model(encoder, patch_position=True)
    real = sum(p.numel() * p.element_size() for p in model.parameters())
    assert dict((what, size) for what, size, _ in plan.memory(model, 1))["weights"] == real
    assert 4 * sum(plan.parts(model).values()) == real


# The most memory that steps took on an H100 80GB HBM3 (torch 2.11.0, tests/on_gpu.py, 2025-11): size, layers of it, rows per
# micro-batch, micro-batches, checkpointed, compiled, U-Net, GiB. With one micro-batch, the loss comes before the gradients.
MEASURED = [
    ("0.16b", 16, 1, 16, False, True, False, 6.4), ("0.16b", 16, 8, 2, False, True, False, 23.6), ("0.16b", 16, 16, 1, False, True, False, 43.3),
    ("0.16b", 16, 16, 1, True, True, False, 17.5), ("0.16b", 16, 8, 2, False, False, False, 25.7), ("0.16b", 16, 4, 4, False, True, True, 23.7),
    ("0.76b", 24, 1, 8, False, True, False, 21.5), ("0.76b", 24, 4, 2, False, True, False, 38.7), ("0.76b", 24, 8, 1, True, True, False, 21.0),
    ("7b", 4, 1, 4, False, True, False, 24.6), ("7b", 4, 1, 4, True, True, False, 22.4), ("7b", 4, 2, 2, False, True, False, 27.1),
    ("7b", 4, 4, 1, True, True, False, 23.4)]


@pytest.mark.parametrize("size, layers, rows, micro_batches, checkpointing, compiled, unet, GiB", MEASURED)
def test_memory_is_what_a_gpu_measured(size, layers, rows, micro_batches, checkpointing, compiled, unet, GiB):
    """A formula that a GPU contradicts: too little ends a run after its first step, too much leaves half of the memory unused."""
    config = sized(size, vocabulary=32007, latent=(8, 32, 32), context=4096, encoder="unet" if unet else "linear")
    config.layers = layers
    with torch.device("meta"):
        model = Transfusion(config)
    lines = plan.memory(model, 1, rows, checkpointing, ema=True, compiled=compiled)
    late = 4 * count(model) / 2 ** 30 if micro_batches == 1 else 0      # gradients that are not there yet
    assert 0.95 * GiB <= total(lines) <= (1.25 if unet else 1.16) * GiB + late


# ------------------------------------------------------------------------------------------------------------- the choice
def test_the_choice_is_the_fastest_that_fits(seven):
    """One row per micro-batch leaves an H100 idle (0.16B: 7.7% MFU, with 16 rows 39.5%); checkpointing where memory is left
    costs a quarter; rows that do not fit, or that do not divide a GPU's share of the step."""
    small = paper_model("0.16b")
    assert plan.choose(small, 512, 8, 8, 80e9, 989e12, ema=True)[:2] == (16, False)
    assert plan.choose(small, 24, 8, 8, 80e9, 989e12)[0] == 3           # of the 3 rows that each GPU has
    rows, checkpointing, used = plan.choose(seven, 512, 8, 8, 80e9, 989e12, ema=True)
    assert (rows, checkpointing) == (2, False) and used == sum(size for _, size, _ in plan.memory(seven, 8, 2, False, True))
    assert plan.choose(seven, 512, 8, 8, 40e9, 989e12, ema=True)[1]     # only with checkpointing
    assert plan.choose(seven, 512, 8, 8, 20e9, 989e12, ema=True) is None
    for capacity in (30e9, 50e9, 80e9):
        assert plan.choose(seven, 512, 8, 8, capacity, 989e12)[2] <= 0.9 * capacity


def test_dry_run_prints_the_choice(capsys):
    """A choice that nobody sees, or one for another GPU."""
    train.main(["--preset", "7b", "--dry-run", "--gpus", "8"])
    assert "fastest that fits in 80 GB" in (text := capsys.readouterr().out) and "--documents 2" in text and "--no-checkpointing" in text
    train.main(["--preset", "7b", "--dry-run", "--gpus", "4", "--device", "L4"])
    assert re.search("fastest that fits in 24 GB +none", capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------- MFU and its devices
@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200", 989e12),
    ("NVIDIA H200 NVL", 835e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100-PCIE-40GB", 312e12), ("NVIDIA B200", 2250e12),
    ("NVIDIA GH200 480GB", 989e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA A10", 125e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA A10G", None), ("Tesla T4", None), ("cpu", None), ("", None)])
def test_devices_are_found_by_name(name, peak):
    """A100 taken for A10, a laptop's or a divided chip for the whole one: an MFU that flatters or shames by a factor."""
    assert plan.peak(name) == peak


def test_memories_are_the_vendors():
    """Catches a device that is said to hold more than it does: the choice would not fit."""
    published = "B200 180, H200 NVL 141, H200 141, GH200 96, H100 PCIe 80, H100 NVL 94, H100 80, A100 80, L40S 48, L40 48, L4 24, A40 48, A10 24"
    published += ", RTX 4090 24, RTX 3090 24"
    assert [f"{name} {size}" for name, size in plan.GIGABYTES.items()] == published.split(", ")


def test_one_gpu_is_enough():
    """Catches a plan that is refused for a single GPU, or at the full peak."""
    plan.check_plan(plan.Plan(paper_model("0.16b"), 1, 8, 10, gpus=1, mfu=1.0))


def test_mfu_by_hand():
    """Tokens of all GPUs divided by the peak of one; or an MFU where the device is not known."""
    assert plan.mfu(46.1e9, 9871, "NVIDIA H100 80GB HBM3") == pytest.approx(0.46, abs=0.001)
    assert plan.mfu(46.1e9, 8 * 9871, "NVIDIA H100 80GB HBM3", gpus=8) == pytest.approx(0.46, abs=0.001)
    assert plan.mfu(46.1e9, 9871, "cpu") is None
    assert plan.device_name(torch.device("cpu")) == "cpu"


# ------------------------------------------------------------------------------------------------------ the command line
def test_dry_run_command(capsys, tmp_path, monkeypatch):
    """The issue's own command; it must touch no file, and say what is an estimate."""
    monkeypatch.chdir(tmp_path)
    train.main(["--preset", "7b", "--dry-run", "--gpus", "512"])
    text = capsys.readouterr().out
    for words in ("6,738,784,576", "46.1 GFLOP", "6 N", "12 L d T", "46% MFU (assumed)", "estimate", "512 H100"):
        assert words in text, words
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_rivals(capsys):
    """Catches a Chameleon planned with patches, latents on disk or Transfusion's vocabulary, and a Llama with pictures."""
    train.main(["--preset", "0.76b-chameleon", "--dry-run", "--gpus", "64"])
    text = capsys.readouterr().out
    with torch.device("meta"):
        wanted = count(Transfusion(sized("0.76b", vocabulary=32007 + 16384, latent=(8, 32, 32), patch=1, context=4096, stable=True)))
    for words in (f"{wanted:,}", "V = 48,391", "pictures of 1024 codes", "0.524T tokens", "256M x 2 KiB (codes"):
        assert words in text, words
    assert "activations of the patch encoder" not in text and "latents" not in text
    train.main(["--preset", "0.76b-llama", "--dry-run", "--gpus", "64"])
    text = capsys.readouterr().out
    assert "no pictures" in text and "0.262T tokens" in text and "activations of the patch encoder" not in text and "codes" not in text
    chameleon, llama = (parse_arguments(["--preset", f"0.37b-{rival}"])[0] for rival in ("chameleon", "llama"))
    assert (chameleon.model, chameleon.stable, chameleon.lr, chameleon.steps) == ("chameleon", True, 1e-4, 250000)
    assert (llama.model, llama.stable, llama.lr, llama.steps) == ("llama", False, 3e-4, 250000)
    assert 2 * llama.accumulate == chameleon.accumulate == 512          # Table 2: as much text a step, and nothing else
    plain, stable = (dict((what, size) for what, size, _ in plan.memory(paper_model("0.76b", stable=s), 64))["at the worst moment: the loss"]
                     for s in (False, True))
    assert stable - plain == 2 * 4 * 4096 * 32007                       # kept by the denominator loss, and its gradient


def test_the_first_run_has_the_papers_objective():
    """Catches one that trains flow, another schedule, lambda or noise limit, or draws without DDPM's steps: README says what it
    is. The same of digits, and of the preset that is named after the paper."""
    for line in (["--preset", "six-paper"], ["--data", "mnist"], []):
        config, *_ = parse_arguments(line)
        for name in ("diffusion", "shift", "lam", "t_limit", "patch_position", "sampler"):
            assert getattr(config, name) == getattr(type(config)(), name), name
    assert config.noise_skip and not type(config)().noise_skip          # ours: an option, not the default
    readme = Path(train.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert "trains the paper's own objective" in readme and parse_arguments(["--preset", "flow"])[0].diffusion == "flow"
    assert not parse_arguments(["--diffusion", "flow"])[0].noise_skip   # a preset's path is for its own eps loss


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_run(name):
    """Catches a preset that its own checks refuse, and patches that do not cut its latents."""
    config, *_ = parse_arguments(["--preset", name])
    side = 32 if config.size in PAPER_SIZES else config.image_size // 4
    assert config.model != "transfusion" or side % config.patch == 0


@pytest.mark.parametrize("size", PAPER_SIZES)
def test_presets_are_the_papers_budget(size):
    """Steps, batch, rate or loss of another run: 0.5T tokens in steps of 2M, with linear patches (§4.1)."""
    config, *_ = parse_arguments(["--preset", size])
    tokens = config.documents * config.accumulate * config.seq_len
    assert (config.size, config.seq_len, config.lr, config.warmup, config.clip) == (size, 4096, 3e-4, 4000, 1)
    assert (config.lam, config.patch, config.diffusion, config.shift) == (5, 2, "ddpm", 1)
    assert (tokens, config.steps, config.encoder) == (2 ** 21, 250_000, "linear")
    assert (config.sample_steps, config.guidance) == (250, 5)           # App. B.1
    assert math.isclose(train.learning_rate(config, config.steps), 1.5e-5)


def test_the_flagship_is_a_run_of_its_own():
    """Table 6's 7B reads 2T tokens through U-Net patches of 2x2 (§4.4). Catches a linear flagship, and Table 1's 7B with its
    budget: its rivals would have a quarter of the compute."""
    flagship, seven, chameleon = (parse_arguments(["--preset", name])[0] for name in ("flagship", "7b", "7b-chameleon"))
    differ = {name for name, value in vars(flagship).items() if vars(seven)[name] != value}
    assert differ == {"encoder", "accumulate", "steps", "out"}
    assert (flagship.size, flagship.encoder, flagship.patch, flagship.steps) == ("7b", "unet", 2, 500_000)
    assert flagship.documents * flagship.accumulate * flagship.seq_len == 2 ** 22
    assert (seven.steps, seven.accumulate) == (chameleon.steps, chameleon.accumulate)


@pytest.mark.parametrize("options, rate", [
    (["0.76b-llama"], 3e-4), (["0.76b-llama", "--stable"], 1e-4), (["0.76b", "--stable"], 1e-4), (["0.76b-chameleon"], 1e-4),
    (["0.76b-llama", "--stable", "--lr", "2e-4"], 2e-4), (["llama", "--stable"], 2e-3), (["0.76b-llama", "--no-stable"], 3e-4)])
def test_what_is_made_stable_learns_at_its_rate(options, rate):
    """Table 2's third row is a Llama with all of Chameleon's changes (§4.1), its rate of 1e-4 among them. A toy's rate is our
    own, and a rate that is given counts."""
    assert parse_arguments(["--preset", *options])[0].lr == rate

@pytest.mark.parametrize("options, words", [
    (["--preset", "scenes"], "not 'toy': name one with --preset"), (["--gpus", "0"], "--gpus must be at least 1"), (["--gpus", "500"], "divides"),
    (["--gpus", "512", "--shard", "7"], "--shard 7 must divide --gpus 512"), (["--gpus", "8", "--shard", "16"], "must divide"),
    (["--gpus", "2048"], "divides"), (["--mfu", "46"], "--mfu above 0 and at most 1"), (["--mfu", "0"], "--mfu"),
    (["--device", "abacus"], "choose one of B200"), (["--patch", "3"], "cannot be cut into 3x3"),
    (["--patch", "1", "--seq-len", "1024"], "does not fit in a context of 1024"), (["--size", "8b"], "'8b'")])
def test_impossible_plans_are_the_users_mistakes(options, words):
    """A traceback, or a plan of something that cannot run."""
    with pytest.raises(ValueError, match=words):
        train.main(["--preset", "7b", "--dry-run", *options])
    assert issubclass(UserError, ValueError)


def test_weights_divided_among_fewer(capsys):
    """A plan that ignores --shard: in groups of 8, each GPU of 512 holds an eighth of the state, not a 512th."""
    found = []
    for shard in ("512", "0"):                          # the default: the GPUs of one machine, 8
        train.main(["--preset", "7b", "--dry-run", "--gpus", "512", "--shard", shard])
        found.append({line.split()[0]: float(line.split("GiB")[0].split()[-1]) for line in capsys.readouterr().out.splitlines() if " GiB " in line})
    assert found[1]["AdamW"] == pytest.approx(64 * found[0]["AdamW"], rel=0.05) and found[1]["checkpoints"] == found[0]["checkpoints"]
    whole = 2 * found[1]["weights"] * 8 / 4             # the copy in bf16 does not get smaller with more owners
    for row, owners in zip(found, (512, 8)):
        assert row["between"] == pytest.approx(whole + 16 / 2 * whole / owners, rel=0.02)


@pytest.mark.parametrize("module, words", [
    ("scale.plan", ["======== 7b", "46.1 GFLOP"]), ("scale.distributed", ["rank 3: 3 7", "python -m scale.plan"]),
    ("scale.streams", ["pairs  item 3", "(32, 32, 3) pixels"]), ("scale.shards", ["the order of 10 rows", "epoch 2"])])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_each_file_shows_its_idea(capsys, tmp_path, monkeypatch, module, words):
    """`python -m scale.plan` and its like, from any folder, without touching a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module])
    runpy.run_module(module, run_name="__main__")
    text = capsys.readouterr().out
    assert all(word in text for word in words) and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- the GPU's script
def test_the_gpu_script_runs(tmp_path, monkeypatch):
    """A script for a machine that is not here rots unseen. On CPU its speeds mean nothing, and models stay with the dense
    mask, so that only the kernel's rows see FlexAttention; but what must be equal is. One that fails must not end the others."""
    monkeypatch.setitem(on_gpu.MEASUREMENTS, "breaks", (lambda n, ranks: 1 / 0, 0))
    names = ["flex = dense", "breaks", "7B layers: 1 row checkpointed", "0.16B U-Net: 4 rows", "where time goes", "toy on both devices",
             "two GPUs", "step against dense mask"]
    out = tmp_path / "gpu.json"
    found = on_gpu.main(["--tiny", "--device", "cpu", "--out", str(out), "--only", ",".join(names)])
    assert json.loads(out.read_text())["results"] == found and list(found) == names
    assert found["breaks"]["reached"] is False and "ZeroDivisionError" in found["breaks"]["meaning"]
    assert found["flex = dense"]["value"] < 0.5
    for name in names[2:4]:
        assert found[name]["more"]["new_graphs"] == 0 and len(found[name]["more"]["losses"]) == 4, name
    assert found["toy on both devices"]["value"] < 1e-4                 # on CPU all is float32: sharded by one = plain
    assert found["two GPUs"]["reached"] is None and found["step against dense mask"]["value"] > 0


def test_the_gpu_script_keeps_to_its_time(capsys):
    """Minutes of a lent machine are over, and what was measured is lost with them."""
    found = on_gpu.main(["--tiny", "--device", "cpu", "--seconds", "10", "--only", "flex = dense,kernel against causal flash"])
    assert "10 s are left" in found["flex = dense"]["meaning"] and found["kernel against causal flash"]["value"] > 0


def test_the_gpu_script_says_what_is_missing():
    """Hours of the full sizes on a CPU, or a traceback on a machine without a GPU."""
    with pytest.raises(UserError, match="add --tiny"):
        on_gpu.main(["--device", "cpu"])
    with pytest.raises(UserError, match="no measurement 'flex'"):
        on_gpu.main(["--only", "flex"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no GPU"):
            on_gpu.main([])
