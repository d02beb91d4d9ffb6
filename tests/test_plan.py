"""
test_plan.py: what a run will cost      (scale/plan.py; Transfusion §4.1, App. B.1; docs/SCALE.md)

THE IDEA    A plan is arithmetic, and arithmetic about 7B parameters cannot be tried out here. So it
            is compared with what others have estimated, with what a FLOP counter counts and
            autograd keeps in small models, and with what an H100 has measured.
ALSO HERE   the presets, which are the paper's budgets, and a tiny pass of tests/on_gpu.py.
TRY IT      pytest -n 0 tests/test_plan.py
"""
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
from config import PRESETS, Config, parse_arguments
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

GIB = 2 ** 30
H100 = dict(capacity=80e9, flops=989e12)                # what `plan.choose` is told of one


def total(lines):
    """GiB, summed over the lines of `plan.memory`, which are (what, bytes, how)."""
    return sum(size for _, size, _ in lines) / GIB


def sizes(lines):
    """{what: bytes} of the lines of `plan.memory`."""
    return {what: size for what, size, _ in lines}


def number(lines, label):
    """The number in the one line of a plan that starts with a label."""
    line, = [line for line in lines if line.strip().startswith(label)]
    first_word = line.strip()[len(label):].split()[0]
    return float(first_word.replace(",", "").rstrip("TM"))


def preset(name, *options):
    """The Config of `train.py --preset NAME ...`."""
    return parse_arguments(["--preset", name, *options])[0]


@pytest.fixture(scope="module")
def seven():
    """The 7B model on the meta device, where it takes no memory."""
    return paper_model("7b")


def run_once(model, batch):
    """One forward and backward pass of random rows: tokens, image_id, doc_id, has_loss, xt, t."""
    logits, out = model(*batch)
    (logits.sum() + out.sum()).backward()


# ----------------------------------------------------------------------- the independent estimates
def test_seven_billion_on_512_gpus(seven):
    """Estimates made by others than this code: 46.1 GFLOP per token, 4.4 to 4.8 GiB per GPU, 2T
    tokens in 4.6 days at 46% MFU. Catches a formula that is wrong by a factor."""
    assert plan.flops_per_token(seven) / 1e9 == pytest.approx(46.1, abs=0.05)
    memory = total(plan.memory(seven, 512))
    assert 4.4 * 0.9 <= memory <= 4.8 * 1.1

    run = plan.Plan(seven, 1, 1024, 500_000, gpus=512, mfu=0.46, device="H100", shard=512)
    lines = plan.describe(run)
    days_per_trillion = number(lines, "days for this run") / number(lines, "in all")
    assert days_per_trillion * 2 == pytest.approx(4.6, rel=0.1)
    assert number(lines, "transformer") == 46.1         # GFLOP
    assert number(lines, "accumulated") == 2            # micro-batches per GPU: 1024 rows / 512
    assert number(lines, "in all") == 2.1               # T tokens: 1024 * 4096 * 500,000
    assert number(lines, "all, with full checkpointing") == pytest.approx(memory, abs=0.01)
    assert number(lines, "all, without checkpointing") > 15


def test_seven_billion_on_one_gpu(seven):
    """All of the 7B and its fp32 AdamW on one H200: 102 to 109 GiB, by others' estimate."""
    assert 102 * 0.95 <= total(plan.memory(seven, 1)) <= 109 * 1.05


def test_memory_moves_the_right_way(seven):
    """Catches a wrong sign or divisor, which the one total above would not show."""
    base = total(plan.memory(seven, 512))
    # On fewer GPUs, each holds more of the state.
    assert total(plan.memory(seven, 8)) > 3 * base
    # With twice the rows, activations double; the weights that are gathered do not.
    assert base < total(plan.memory(seven, 512, rows=2)) < 2 * base
    assert total(plan.memory(seven, 512, checkpointing=False)) > 4 * base

    # The average is one more fp32 copy of the weights.
    average = total(plan.memory(seven, 1, ema=True)) - total(plan.memory(seven, 1))
    assert average == pytest.approx(4 * count(seven) / GIB)

    # Weights, gradients and two moments: 16 bytes per parameter, shared by the GPUs.
    for gpus in (1, 8, 512):
        state = plan.memory(seven, gpus)[:3]
        assert sum(size for _, size, _ in state) == pytest.approx(16 * count(seven) / gpus)


def test_memory_by_hand(seven):
    """Catches checkpoints that are not the inputs of the blocks in 16 bits, and a patch encoder
    that is planned for too few or too many rows of pictures."""
    lines = sizes(plan.memory(seven, 512))
    assert lines["checkpoints"] == 32 * 4096 * 4096 * 2         # layers, positions, width, bytes

    pictures = []
    for rows in (1, 2, 8):
        lines = sizes(plan.memory(seven, 512, rows=rows))
        pictures.append(lines["activations of the patch encoder"])
    # Rows of text and of pictures take turns: of 8 rows at most 5 have pictures, 4 and one more.
    ratios = [size / pictures[0] for size in pictures]
    assert ratios == pytest.approx([1, 2, 5])


# ------------------------------------------------------------------------- against the real thing
@pytest.mark.parametrize("T", [32, 64])
def test_flops_are_those_counted(make_model, T):
    """Catches 6 N + 12 L d T with another N, with a factor of two, or without T. There is text
    alone here, so the formula must hit exactly."""
    model = make_model(layers=3, width=64, heads=4, context=T, vocabulary=50).train()
    tokens = torch.zeros(2, T, dtype=torch.long)
    no_pictures = torch.zeros(0, 4, 4, 4)
    no_t = tokens[0, :0]

    # SDPBackend.MATH: attention as plain matrix products, which the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_once(model, (tokens, tokens - 1, tokens, tokens == 0, no_pictures, no_t))

    # N contains the norms' vectors, as in the literature. They are no matrix products, and the
    # counter leaves them out.
    vectors = 0
    for part in (model.blocks, model.norm):
        vectors += sum(weight.numel() for weight in part.parameters() if weight.ndim == 1)
    per_token = plan.flops_per_token(model) - 6 * vectors
    assert counter.get_total_flops() == 2 * T * per_token


def test_unet_flops_are_those_counted(make_model):
    """Catches a U-Net whose share is forgotten, or counted per picture where it should be per
    position: text and patches are 1 : 1."""
    T = 48
    P = 4
    model = make_model("unet", context=T).train()
    plain = make_model("linear", context=T)
    tokens = torch.zeros(1, T, dtype=torch.long)
    image_id = torch.full((1, T), -1)
    for m in range(6):                                  # half of the positions are patches
        image_id[0, 8 * m: 8 * m + P] = m
    pictures = torch.randn(6, 4, 4, 4)
    t = torch.arange(6)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_once(model, (tokens, image_id, tokens, tokens == 0, pictures, t))

    per_token = plan.flops_per_token(model)
    assert counter.get_total_flops() == pytest.approx(T * per_token, rel=0.01)
    # Else the line above would say nothing about the U-Net.
    assert per_token > 1.5 * plan.flops_per_token(plain)


def kept_by(forward, besides):
    """Bytes that autograd keeps for the backward pass of forward(), besides the given tensors."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x        # views of one storage are kept once
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        out = forward()
    del out
    known = {x.untyped_storage().data_ptr() for x in besides}
    return sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in known)


def test_activations_are_those_that_autograd_keeps():
    """Catches 10 d + 4 hidden per position that forgets something, or counts what is not kept."""
    D = 256
    T = 64
    block = Block(D, 4)
    x = torch.randn(1, T, D, requires_grad=True)
    rope = rope_tables(torch.arange(T)[None], D // 4)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()

    kept = kept_by(lambda: block(x, rope, mask), [x, mask, *rope, *block.parameters()])

    planned = T * plan.block_bytes(D, block.down.in_features, itemsize=4)
    assert planned == pytest.approx(kept, rel=0.1)


def test_encoders_activations_are_those_that_autograd_keeps():
    """Catches a count on the meta device that is not what a real picture needs."""
    config = ModelConfig(vocabulary=9, latent=(4, 16, 16), encoder="unet", context=128)
    network = Transfusion(config).patch_encoder.bfloat16()
    xt = torch.randn(1, 4, 16, 16).bfloat16()
    t = torch.tensor([500])

    def forward():
        vectors, skips = network.encode(xt, t)
        return network.decode(vectors, t, skips)

    kept = kept_by(forward, [xt, t, *network.parameters()])
    assert plan.encoder_costs(config)[1] == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize("encoder", ["linear", "unet"])
def test_weights_are_those_of_a_real_model(make_model, encoder):
    """Catches a part that the table leaves out, or counts twice."""
    model = make_model(encoder, patch_position=True)
    real = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert sizes(plan.memory(model, 1))["weights"] == real
    assert 4 * sum(plan.parts(model).values()) == real


# The most memory that steps took on an H100 80GB HBM3 (torch 2.11.0, tests/on_gpu.py, 2025-11).
# With one micro-batch, the worst moment, the loss, comes before the gradients.
# size, layers of it, rows per micro-batch, micro-batches, checkpointing, compiled, U-Net, GiB
MEASURED = [
    ("0.16b", 16, 1, 16, False, True, False, 6.4),
    ("0.16b", 16, 8, 2, False, True, False, 23.6),
    ("0.16b", 16, 16, 1, False, True, False, 43.3),
    ("0.16b", 16, 16, 1, True, True, False, 17.5),
    ("0.16b", 16, 8, 2, False, False, False, 25.7),
    ("0.16b", 16, 4, 4, False, True, True, 23.7),
    ("0.76b", 24, 1, 8, False, True, False, 21.5),
    ("0.76b", 24, 4, 2, False, True, False, 38.7),
    ("0.76b", 24, 8, 1, True, True, False, 21.0),
    ("7b", 4, 1, 4, False, True, False, 24.6),
    ("7b", 4, 1, 4, True, True, False, 22.4),
    ("7b", 4, 2, 2, False, True, False, 27.1),
    ("7b", 4, 4, 1, True, True, False, 23.4),
]


@pytest.mark.parametrize(
    "size, layers, rows, micro_batches, checkpointing, compiled, unet, GiB", MEASURED)
def test_memory_is_what_a_gpu_measured(
        size, layers, rows, micro_batches, checkpointing, compiled, unet, GiB):
    """Catches a formula that a GPU contradicts. Too little ends a run after its first step, too
    much leaves half of the memory unused."""
    encoder = "unet" if unet else "linear"
    config = sized(size, vocabulary=32007, latent=(8, 32, 32), context=4096, encoder=encoder)
    config.layers = layers
    with torch.device("meta"):
        model = Transfusion(config)

    planned = total(plan.memory(model, 1, rows, checkpointing, ema=True, compiled=compiled))

    most = (1.25 if unet else 1.16) * GiB
    if micro_batches == 1:                              # no gradients yet: the plan has them
        most += 4 * count(model) / GIB
    assert 0.95 * GiB <= planned <= most


# -------------------------------------------------------------------------------------- the choice
def test_the_choice_is_the_fastest_that_fits(seven):
    """Catches one row per micro-batch, which leaves an H100 idle (0.16B: 7.7% MFU, with 16 rows
    39.5%); checkpointing where memory is left, which costs a quarter; rows that do not fit, or that
    do not divide a GPU's share of the step."""
    small = paper_model("0.16b")
    rows, checkpointing, _ = plan.choose(small, 512, 8, 8, **H100, ema=True)
    assert rows == 16
    assert not checkpointing
    assert plan.choose(small, 24, 8, 8, **H100)[0] == 3         # of the 3 rows that each GPU has

    rows, checkpointing, used = plan.choose(seven, 512, 8, 8, **H100, ema=True)
    assert rows == 2
    assert not checkpointing
    assert used == sum(size for _, size, _ in plan.memory(seven, 8, 2, False, True))

    # Half the memory: only with checkpointing. A quarter: not at all.
    assert plan.choose(seven, 512, 8, 8, 40e9, 989e12, ema=True)[1]
    assert plan.choose(seven, 512, 8, 8, 20e9, 989e12, ema=True) is None

    for capacity in (30e9, 50e9, 80e9):
        used = plan.choose(seven, 512, 8, 8, capacity, 989e12)[2]
        assert used <= 0.9 * capacity                   # the rest is for what no plan sees


def test_dry_run_prints_the_choice(capsys):
    """Catches a choice that nobody sees, or one for another GPU."""
    train.main(["--preset", "7b", "--dry-run", "--gpus", "8"])
    output = capsys.readouterr().out
    assert "fastest that fits in 80 GB" in output
    assert "--documents 2" in output
    assert "--no-checkpointing" in output

    train.main(["--preset", "7b", "--dry-run", "--gpus", "4", "--device", "L4"])
    output = capsys.readouterr().out
    assert re.search("fastest that fits in 24 GB +none", output)


# ----------------------------------------------------------------------------- MFU and its devices
@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A100-PCIE-40GB", 312e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA A10", 125e12),
    ("NVIDIA GeForce RTX 4090", 165e12),
    # None: not in the table, though its name contains one that is.
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ("NVIDIA A10G", None),
    ("Tesla T4", None),
    ("cpu", None),
    ("", None),
])
def test_devices_are_found_by_name(name, peak):
    """Catches an A100 that is taken for an A10, and a laptop's or a divided chip that is taken for
    the whole one: an MFU that flatters or shames by a factor."""
    assert plan.peak(name) == peak


def test_memories_are_the_vendors():
    """Catches a device that is said to hold more than it does: the choice would not fit."""
    published = """B200 180, H200 NVL 141, H200 141, GH200 96, H100 PCIe 80, H100 NVL 94, H100 80,
        A100 80, L40S 48, L40 48, L4 24, A40 48, A10 24, RTX 4090 24, RTX 3090 24"""
    ours = [f"{name} {size}" for name, size in plan.GIGABYTES.items()]
    assert ours == re.split(r",\s+", published)


def test_one_gpu_is_enough():
    """Catches a plan that is refused for a single GPU, or at the full peak."""
    plan.check_plan(plan.Plan(paper_model("0.16b"), 1, 8, 10, gpus=1, mfu=1.0))


def test_mfu_by_hand():
    """Catches tokens of all GPUs that are divided by the peak of one, and an MFU where the device
    is not known. 46.1e9 FLOPs per token * 9871 tokens/s = 0.46 * 989e12."""
    name = "NVIDIA H100 80GB HBM3"
    assert plan.mfu(46.1e9, 9871, name) == pytest.approx(0.46, abs=0.001)
    assert plan.mfu(46.1e9, 8 * 9871, name, gpus=8) == pytest.approx(0.46, abs=0.001)
    assert plan.mfu(46.1e9, 9871, "cpu") is None
    assert plan.device_name(torch.device("cpu")) == "cpu"


# -------------------------------------------------------------------------------- the command line
def test_dry_run_command(capsys, tmp_path, monkeypatch):
    """Catches a dry run that touches a file, or that does not say what is an estimate."""
    monkeypatch.chdir(tmp_path)
    train.main(["--preset", "7b", "--dry-run", "--gpus", "512"])
    output = capsys.readouterr().out
    for words in ("6,738,784,576", "46.1 GFLOP", "6 N", "12 L d T", "43% MFU (assumed)",
                  "estimate", "512 H100"):
        assert words in output, words
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_rivals(capsys):
    """Catches a Chameleon that is planned with patches, with latents on disk or with Transfusion's
    vocabulary, and a Llama that is planned with pictures."""
    # 1. A Chameleon: its pictures are 1024 of 16,384 codes, which are words of its vocabulary.
    vocabulary = 32007 + 16384
    train.main(["--preset", "0.76b-chameleon", "--dry-run", "--gpus", "64"])
    output = capsys.readouterr().out
    config = sized("0.76b", vocabulary=vocabulary, latent=(8, 32, 32), patch=1, context=4096,
                   stable=True)
    with torch.device("meta"):
        parameters = count(Transfusion(config))
    for words in (f"{parameters:,}", f"V = {vocabulary:,}", "pictures of 1024 codes",
                  "0.524T tokens", "256M x 2 KiB (codes"):
        assert words in output, words
    assert "activations of the patch encoder" not in output
    assert "latents" not in output

    # 2. A Llama: half the tokens, and no picture anywhere.
    train.main(["--preset", "0.76b-llama", "--dry-run", "--gpus", "64"])
    output = capsys.readouterr().out
    assert "no pictures" in output
    assert "0.262T tokens" in output
    assert "activations of the patch encoder" not in output
    assert "codes" not in output

    # 3. Table 2: as much text in a step, and nothing else.
    chameleon = preset("0.37b-chameleon")
    assert chameleon.model == "chameleon"
    assert chameleon.stable is True
    assert chameleon.lr == 1e-4
    assert chameleon.steps == 250000
    llama = preset("0.37b-llama")
    assert llama.model == "llama"
    assert llama.stable is False
    assert llama.lr == 3e-4
    assert llama.steps == 250000
    assert 2 * llama.accumulate == chameleon.accumulate == 512

    # 4. Chameleon's loss on the softmax's denominator keeps the logits in fp32, and their gradient.
    worst = []
    for stable in (False, True):
        lines = sizes(plan.memory(paper_model("0.76b", stable=stable), 64))
        worst.append(lines["at the worst moment: the loss"])
    assert worst[1] - worst[0] == 2 * 4 * 4096 * 32007


def test_the_first_run_has_the_papers_objective():
    """Catches a first run that trains flow, that has another schedule, lambda or noise limit, or
    that draws without DDPM's steps: README says what it is. The same of digits, and of the preset
    that is named after the paper."""
    papers = Config()
    for line in (["--preset", "six-paper"], ["--data", "mnist"], []):
        config = parse_arguments(line)[0]
        for name in ("diffusion", "shift", "lam", "t_limit", "patch_position", "sampler"):
            assert getattr(config, name) == getattr(papers, name), name

    # --noise-skip is ours: an option, not the default.
    assert config.noise_skip
    assert not papers.noise_skip
    assert not parse_arguments(["--diffusion", "flow"])[0].noise_skip   # it is for the eps loss

    readme = Path(train.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert "trains eq. 3, the paper's ε loss" in readme
    assert preset("flow").diffusion == "flow"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_run(name):
    """Catches a preset that its own checks refuse, and patches that do not cut its latents."""
    config = preset(name)
    if config.model == "transfusion":
        side = 32 if config.size in PAPER_SIZES else config.image_size // 4
        assert side % config.patch == 0


@pytest.mark.parametrize("size", PAPER_SIZES)
def test_presets_are_the_papers_budget(size):
    """Catches steps, batch, rate or loss of another run: 0.5T tokens in steps of 2M, with linear
    patches (§4.1)."""
    config = preset(size)
    assert config.size == size
    assert config.seq_len == 4096
    assert config.lr == 3e-4
    assert config.warmup == 4000
    assert config.clip == 1
    assert config.lam == 5
    assert config.patch == 2
    assert config.diffusion == "ddpm"
    assert config.shift == 1
    assert config.documents * config.accumulate * config.seq_len == 2 ** 21
    assert config.steps == 250_000
    assert config.encoder == "linear"
    assert config.sample_steps == 250                   # App. B.1
    assert config.guidance == 5                         # App. B.1
    assert math.isclose(train.learning_rate(config, config.steps), 1.5e-5)


def test_the_flagship_is_a_run_of_its_own():
    """Table 6's 7B reads 2T tokens through U-Net patches of 2x2 (§4.4). Catches a linear flagship,
    and Table 1's 7B with the flagship's budget: its rivals would have a quarter of the compute."""
    flagship = preset("flagship")
    seven = preset("7b")
    chameleon = preset("7b-chameleon")

    different = {name for name, value in vars(flagship).items() if vars(seven)[name] != value}
    assert different == {"encoder", "accumulate", "steps", "out"}
    assert flagship.size == "7b"
    assert flagship.encoder == "unet"
    assert flagship.patch == 2
    assert flagship.steps == 500_000
    assert flagship.documents * flagship.accumulate * flagship.seq_len == 2 ** 22

    assert seven.steps == chameleon.steps
    assert seven.accumulate == chameleon.accumulate


@pytest.mark.parametrize("options, rate", [
    (["0.76b-llama"], 3e-4),
    (["0.76b-llama", "--stable"], 1e-4),
    (["0.76b", "--stable"], 1e-4),
    (["0.76b-chameleon"], 1e-4),
    (["0.76b-llama", "--stable", "--lr", "2e-4"], 2e-4),
    (["llama", "--stable"], 2e-3),
    (["0.76b-llama", "--no-stable"], 3e-4),
])
def test_what_is_made_stable_learns_at_its_rate(options, rate):
    """Table 2's third row is a Llama with all of Chameleon's changes (§4.1), its rate of 1e-4 among
    them. Catches the old rate. A toy's rate is our own, and a rate that is given counts."""
    assert preset(*options).lr == rate


@pytest.mark.parametrize("options, words", [
    (["--preset", "scenes"], "not 'toy': name one with --preset"),
    (["--gpus", "0"], "--gpus must be at least 1"),
    (["--gpus", "500"], "divides"),
    (["--gpus", "512", "--shard", "7"], "--shard 7 must divide --gpus 512"),
    (["--gpus", "8", "--shard", "16"], "must divide"),
    (["--gpus", "2048"], "divides"),
    (["--mfu", "46"], "--mfu above 0 and at most 1"),
    (["--mfu", "0"], "--mfu"),
    (["--device", "abacus"], "choose one of B200"),
    (["--patch", "3"], "cannot be cut into 3x3"),
    (["--patch", "1", "--seq-len", "1024"], "does not fit in a context of 1024"),
    (["--size", "8b"], "'8b'"),
])
def test_impossible_plans_are_the_users_mistakes(options, words):
    """Catches a traceback, and a plan of something that cannot run."""
    with pytest.raises(ValueError, match=words):
        train.main(["--preset", "7b", "--dry-run", *options])
    assert issubclass(UserError, ValueError)


def test_weights_divided_among_fewer(capsys):
    """Catches a plan that ignores --shard: in groups of 8, each GPU of 512 holds an eighth of the
    state, not a 512th."""

    def memory(shard):
        """{first word of the line: GiB} of the plan."""
        train.main(["--preset", "7b", "--dry-run", "--gpus", "512", "--shard", shard])
        row = {}
        for line in capsys.readouterr().out.splitlines():
            if " GiB " in line:
                row[line.split()[0]] = float(line.split("GiB")[0].split()[-1])
        return row

    by_all = memory("512")
    by_machine = memory("0")                            # the default: the GPUs of one machine, 8
    assert by_machine["AdamW"] == pytest.approx(64 * by_all["AdamW"], rel=0.05)
    assert by_machine["checkpoints"] == by_all["checkpoints"]

    # Between steps: a whole copy in bf16, which does not get smaller with more owners, and 16 bytes
    # per parameter, where the copy has 2.
    whole = 2 * by_machine["weights"] * 8 / 4
    assert by_all["between"] == pytest.approx(whole + 16 / 2 * whole / 512, rel=0.02)
    assert by_machine["between"] == pytest.approx(whole + 16 / 2 * whole / 8, rel=0.02)


@pytest.mark.parametrize("module, words", [
    ("scale.plan", ["======== 7b", "46.1 GFLOP"]),
    ("scale.distributed", ["rank 3: 3 7", "python -m scale.plan"]),
    ("scale.streams", ["pairs  item 3", "(32, 32, 3) pixels"]),
    ("scale.shards", ["the order of 10 rows", "epoch 2"]),
])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_each_file_shows_its_idea(capsys, tmp_path, monkeypatch, module, words):
    """Catches a `python -m scale.plan`, or one of its like, that works in one folder only or that
    touches a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module])
    runpy.run_module(module, run_name="__main__")
    output = capsys.readouterr().out
    for word in words:
        assert word in output
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- the GPU's script
def test_the_gpu_script_runs(tmp_path, monkeypatch):
    """A script for a machine that is not here rots unseen: this runs it, tiny, on a CPU.

    Its speeds mean nothing here, and models stay with the dense mask, so that only the kernel's
    rows see FlexAttention. But what must be equal is equal. Catches a measurement that fails and
    ends the others, too."""
    monkeypatch.setitem(on_gpu.MEASUREMENTS, "breaks", (lambda n, ranks: 1 / 0, 0))
    names = ["flex = dense", "breaks", "7B layers: 1 row checkpointed", "0.16B U-Net: 4 rows",
             "where time goes", "toy on both devices", "two GPUs", "step against dense mask"]
    out = tmp_path / "gpu.json"

    results = on_gpu.main(["--tiny", "--device", "cpu", "--out", str(out),
                           "--only", ",".join(names)])

    assert json.loads(out.read_text())["results"] == results
    assert list(results) == names
    assert results["breaks"]["reached"] is False
    assert "ZeroDivisionError" in results["breaks"]["meaning"]
    assert results["flex = dense"]["value"] < 0.5
    for name in names[2:4]:
        assert results[name]["more"]["new_graphs"] == 0, name
        assert len(results[name]["more"]["losses"]) == 4, name
    # On a CPU all is float32: sharded by one = plain.
    assert results["toy on both devices"]["value"] < 1e-4
    assert results["two GPUs"]["reached"] is None
    assert results["step against dense mask"]["value"] > 0


def test_the_gpu_script_keeps_to_its_time(capsys):
    """Catches a script that goes on when the minutes of a lent machine are over: what was measured
    would be lost with them."""
    names = "flex = dense,kernel against causal flash"
    results = on_gpu.main(["--tiny", "--device", "cpu", "--seconds", "10", "--only", names])
    assert "10 s are left" in results["flex = dense"]["meaning"]
    assert results["kernel against causal flash"]["value"] > 0


def test_the_gpu_script_says_what_is_missing():
    """Catches hours of the full sizes on a CPU, and a traceback on a machine without a GPU."""
    with pytest.raises(UserError, match="add --tiny"):
        on_gpu.main(["--device", "cpu"])
    with pytest.raises(UserError, match="no measurement 'flex'"):
        on_gpu.main(["--only", "flex"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no GPU"):
            on_gpu.main([])
