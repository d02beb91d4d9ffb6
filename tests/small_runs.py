"""
small_runs.py: what the tests of training share

THE IDEA    A run of train.py that takes seconds: 6 steps of a network of 2 layers, with a VAE that
            was never trained. No test that uses it looks at pictures. What two such runs leave
            behind is compared to the bit.
HERE        command lines   small_run, tuning
            models          save_tiny_vae, save_tiny_model (conftest.py has fixtures of them)
            comparisons     states, log, same
            folders         write_files, folder_of_edits
            trust           small_world, untrained_vae, ends, nothing_half_written, check_kept
"""
import contextlib
import json
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
from scale import distributed
from sources import choose, mnist, scenes
from support import checkpoint
from support.common import run_command


# ------------------------------------------------------------------------------------ command lines
def arguments(options):
    """["--save-every", "100", ...] of {"save_every": 100, ...}."""
    words = []
    for name, value in options.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def small_run(**options):
    """The argument list of a small run. Options, as keywords, replace those below."""
    small = dict(
        size="toy",
        diffusion="ddpm",
        shift=1,
        patch=4,
        pairs=60,
        documents=6,
        steps=6,
        warmup=2,
        samples=0,
        log_every=1,
        gap_every=6,
        save_every=100,
        seq_len=96,
        seed=3,
    )
    if not options.keys() & {"preset", "data", "model"}:
        small["preset"] = "flow"                        # whatever the first run of a reader is
    return arguments(small | options)


def tuning(pretrained, out, **options):
    """The argument list of a small fine-tuning run."""
    small = dict(
        preset="edit",
        init=pretrained,
        out=out,
        pairs=40,
        documents=6,
        steps=4,
        warmup=1,
        samples=0,
        log_every=1,
        gap_every=2,
        save_every=100,
        seed=3,
    )
    return arguments(small | options)


def interrupt(monkeypatch, at):
    """Press Ctrl-C while step number `at` is running."""
    real = train.train_step

    def step(run):
        if run.step == at - 1:
            signal.raise_signal(signal.SIGINT)
        return real(run)

    monkeypatch.setattr(train, "train_step", step)


# ------------------------------------------------------------------------------------------- models
def save_tiny_vae(path, image_channels=3):
    """Write the smallest VAE: (image_channels, 32, 32) -> (2, 8, 8). It was never trained."""
    config = vae_module.VAEConfig(
        image_channels=image_channels, channels=4, multipliers=(1, 1, 1), z=2)
    checkpoint.save(path, checkpoint.pack_vae(vae_module.VAE(config)))


def save_tiny_model(path, vae_path):
    """Write a model.pt that was never trained: "toy", 32x32 pixels, flow, context 128."""
    words = data.Words(scenes.load_scenes(1, 0, progress=False).vocabulary())
    shape = model.sized("toy", vocabulary=len(words), latent=(2, 8, 8), patch=4,
                        patch_position=True, context=128)
    network = model.Transfusion(shape)
    # It starts at zero: the picture output would not depend on the rest of the network.
    network.patch_encoder.out.weight.data.normal_(0, 0.1)
    vae = checkpoint.load_vae(vae_path)
    flow = diffusion.Diffusion("flow", shift=3.0)
    checkpoint.save_trained(path, checkpoint.Trained(network, words, vae, flow))


# --------------------------------------------------------------------------- what a run left behind
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
    path = out.parent / "state.pt"
    dcp_to_torch_save(distributed.folder_of(out, step), path)
    saved = torch.load(path, weights_only=False)

    found = flatten({name: saved[name] for name in ("model", "average") if name in saved})
    found |= flatten(saved["optimizer"]["state"])
    found["step"] = step
    groups = saved["optimizer"]["param_groups"]
    found["lr"] = [group.pop("lr") for group in groups]
    found["groups"] = groups                            # betas, eps, weight decay, which parameters
    return found


def log(out):
    """The lines of log.jsonl, without what depends on the clock."""
    rows = []
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        row.pop("tokens_per_s", None)
        row.pop("seconds_left", None)
        rows.append(row)
    return rows


def same(one, two):
    """The names under which two dicts of tensors or numbers differ, be it by a bit."""

    def differ(a, b):
        if isinstance(a, torch.Tensor):
            return not torch.equal(a, b)
        return a != b

    changed = [name for name in one if name not in two or differ(one[name], two[name])]
    added = [name for name in two if name not in one]
    return changed + added


# ---------------------------------------------------------------------------- pictures of one's own
def write_files(source, files):
    """Make a folder of twelve pictures of noise, as `source` has them: "mnist" or "folder"."""
    rng = np.random.default_rng(0)
    files.mkdir()
    if source == "mnist":
        images = rng.integers(0, 256, (12, 28, 28)).astype(np.uint8)
        labels = np.arange(12).astype(np.uint8) % 10
        for name in mnist.MNIST_FILES:
            array = images if "images" in name else labels
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (files / name).write_bytes(head + array.tobytes())
        return
    lines = []
    for k in range(12):
        pixels = rng.integers(0, 256, (40, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(files / f"{k}.png")
        lines.append(json.dumps({"image": f"{k}.png", "caption": f"picture {k}"}))
    (files / "captions.jsonl").write_text("\n".join(lines))


def folder_of_edits(folder, text, n=12, at=None):
    """A folder of n triples; the instruction number `at` (or all) is `text`."""
    folder.mkdir()
    lines = []
    for k in range(n):
        before = f"{k}.png"
        after = f"{k}_after.png"
        Image.new("RGB", (32, 32), (20 * k, 0, 0)).save(folder / before)
        Image.new("RGB", (32, 32), (20 * k, 0, 99)).save(folder / after)
        instruction = text if at in (None, k) else "remove the circle"
        lines.append(json.dumps({"before": before, "instruction": instruction, "after": after}))
    (folder / "edits.jsonl").write_text("\n".join(lines))


# -------------------------------------------------------- runs that are stopped, damaged or spoiled
@contextlib.contextmanager
def small_world():
    """Inside, "toy" has 1 layer of width 32, and a split has few scenes."""
    real = choose.load_pairs

    def load_few(*args, **options):
        most = 60 if options["split"] == "train" else 12
        options["n"] = min(options["n"], most)
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "toy", (1, 32, 2))
        patch.setattr(choose, "load_pairs", load_few)
        yield


def untrained_vae(**changes):
    """A VAE that was never trained: (3, 32, 32) -> (2, 8, 8).

    changes: values to fill its tensors with, by name"""
    torch.manual_seed(0)
    config = vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2)
    vae = vae_module.VAE(config)
    for name, value in changes.items():
        vae.state_dict()[name].fill_(value)
    return vae


def ends(capsys, main, argv, status):
    """Run a command line that must end with this status, without a traceback.

    Returns the last line of stderr."""
    with pytest.raises(SystemExit) as stop:
        run_command(main, [str(word) for word in argv])
    err = capsys.readouterr().err
    assert stop.value.code == status
    assert "Traceback" not in err
    return err.replace("\r", "\n").strip().splitlines()[-1]


def nothing_half_written(folder):
    """Whether no file of a write that failed, and no lock, is left in a folder."""
    for path in folder.rglob("*"):
        if path.suffix == ".tmp" or path.name == ".lock":
            return False
    return True


def check_kept(out):
    """The steps of a run's checkpoints. Fails if one cannot be read, or is not finite."""
    complete, incomplete = distributed.list_checkpoints(out)
    for step in complete:
        folder = distributed.folder_of(out, step)
        assert distributed.damaged_files(folder) == []
        distributed.dcp.format_utils.dcp_to_torch_save(folder, out.parent / "state.pt")
        state = torch.load(out.parent / "state.pt", weights_only=False)
        assert checkpoint.name_not_finite(state) == ""
    assert incomplete == []
    assert nothing_half_written(out)
    return complete
