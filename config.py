"""
presets.py: every number of a run                                              (Transfusion §4.1, Table 8, App. B.1)

THE IDEA    A run is a `Config`, and nothing else: the toy and the 7B on 512 GPUs differ in these numbers and run the same lines.
            Config's defaults are the paper's process at toy size; a preset is a named set of changes; every field is also an
            option of `python train.py`, which wins over both.
A PICTURE   Config's default  <-  PRESETS[--preset]  <-  options on the command line        kept in out/<name>/config.json
READ NEXT   train.py        TRY IT  python presets.py        TEST  tests/test_train.py, tests/test_errors.py
"""
import argparse
import math
from dataclasses import dataclass, field, fields

from model import PAPER_SIZES
from patchify import PATCHES
from scale import plan
from sources import scenes
from support.common import ASSETS, UserError


MODELS = ("transfusion", "chameleon", "llama")


def option(default, help, choices=None):
    """A field of Config that is also a command-line option."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every number of a run. The defaults are the paper's process at toy size; PRESETS change numbers, not code."""
    model: str = option("transfusion", "Transfusion, or a rival: pictures as codes, or no pictures (§4.1, Table 2); at the paper's sizes "
                        "take --preset 0.76b-chameleon, 0.76b-llama, which set what belongs to it", MODELS)
    data: str = option("scenes", "what to learn from", ("scenes", "mnist", "folder", "edits", "shards"))
    data_dir: str = option("", "folder of MNIST idx files, of pictures with captions.jsonl, of edits.jsonl, or of shards")
    init: str = option("", "fine-tune this model.pt: its shape, words, VAE and diffusion are kept (§4.5)")
    world: str = option("one", "which captions of scenes: one object, or all six categories", tuple(scenes.WORLDS))
    image_size: int = option(32, "pixels per side (scenes, folder, edits)")
    pairs: int = option(20000, "how many scenes to draw, or triples (scenes, edits)")
    vae: str = option("", "a vae.pt to use; default: assets/<data>_vae.pt (_vq.pt) if there is one, else one is trained first")
    vae_steps: int = option(400, "training steps of that VAE")
    codes: int = option(0, "codes of a Chameleon's VQ-VAE (the paper: 16384); 0: as its file has, or 512 for a new one")
    size: str = option("toy", "a row of model.SIZES")
    patch: int = option(2, "side of a patch, in latent pixels (§4.3.2)")
    encoder: str = option("linear", "patch encoder (§4.3.3)", tuple(PATCHES))
    patch_position: bool = option(False, "add a learned vector per place in the picture")
    bidirectional: bool = option(True, "patches of a picture see each other; --no-bidirectional is Table 3's ablation")
    stable: bool = option(False, "Chameleon's query-key norm, post-norm and denominator loss (Table 2)")
    diffusion: str = option("ddpm", "the paper's DDPM, or rectified flow", ("ddpm", "flow"))
    shift: float = option(1.0, "move the noise schedule: noise-to-signal ratio times this (1: the paper's)")
    lam: float = option(5.0, "lambda of eq. 4")
    drop: float = option(0.1, "share of captions dropped, for guidance")
    text_share: float = option(-1.0, "share of documents of text alone; -1: text tokens and patches 1 : 1 (§4.1)")
    t_limit: int = option(500, "noise limit of pictures that precede their captions, as a t of the paper's schedule; 1000: none (Table 11)")
    seq_len: int = option(96, "T, positions per row: documents are packed into rows of this length")
    documents: int = option(64, "documents per micro-batch (shards: rows)")
    accumulate: int = option(1, "micro-batches per step, over all processes together")
    checkpointing: bool = option(False, "compute activations again in the backward pass instead of keeping them")
    compile: bool = option(False, "torch.compile each block")
    shard: int = option(0, "among how many processes the weights are divided; 0: all")
    steps: int = option(1400, "optimizer steps")
    lr: float = option(2e-3, "peak learning rate; ends at a twentieth of it (the paper: 3e-4, ends at 1.5e-5)")
    warmup: int = option(100, "steps of linear warm-up (the paper: 4000)")
    decay: float = option(0.1, "weight decay")
    clip: float = option(1.0, "gradient clipping, by global norm")
    ema: float = option(0.998, "decay of the averaged weights; 0: no average, no second copy")
    seed: int = option(0, "seed of weights, data and noise")
    log_every: int = option(50, "steps between lines of log.jsonl")
    gap_every: int = option(200, "steps between measurements of the conditioning gap")
    save_every: int = option(500, "steps between checkpoints")
    samples: int = option(200, "pictures to draw for the report; 0: no report")
    sample_steps: int = option(50, "diffusion steps of the report's pictures")
    guidance: float = option(3.0, "guidance of the report's pictures")
    sampler: str = option("ddpm", "sampler of the report's pictures", ("ddpm", "ddim", "dpm++"))
    out: str = option("", "folder of this run; default: out/<preset>")


# Differs from the paper: the toys take its one alternative, rectified flow, with a noisier schedule. With the eps loss a
# caption, which is decided at high noise, moves the loss by 2% only, and these short runs end before it is learned
# (README "What it took"). `--diffusion ddpm --shift 1 --lam 5 --no-patch-position` is the paper's way, and Config's default.
# Flow's loss is larger than the eps loss: lambda = 2 gives it the share of the sum that 5 gives the latter.
TOY = dict(diffusion="flow", patch_position=True, lam=2.0, documents=32, ema=0.999)
PRESETS = {
    "scenes": dict(TOY, shift=3.0, lam=5.0, steps=3300),                # one object, minutes on two CPU cores
    "mnist": dict(TOY, data="mnist", shift=2.0, lam=1.0, patch=4, documents=64, steps=2250, vae_steps=350),
    "folder": dict(TOY, data="folder", shift=2.0, steps=6000, vae_steps=2000),
    "six": dict(TOY, world="six", size="small", lam=5.0, documents=64, pairs=40000, shift=3.0, steps=11000, seq_len=128,
                ema=0.998, save_every=1000, gap_every=1000),
    # §4.5: 8,000 triples, from the shipped checkpoint of `six`; two of them fill a row
    "edit": dict(TOY, data="edits", init=str(ASSETS / "scenes.pt"), lam=5.0, pairs=8000, steps=4400, seq_len=92, gap_every=1000,
                 save_every=1000, sample_steps=25, sampler="dpm++", guidance=2.0),
    # the rivals (chameleon.py): as many tokens and as much text a step as the first toy; a third of the learning rate (§4.1)
    "chameleon": dict(TOY, model="chameleon", stable=True, lr=7e-4, documents=18, text_share=0.635, seq_len=160, steps=3300,
                      patch_position=False),
    "llama": dict(TOY, model="llama", steps=3300, patch_position=False),
    "shards": dict(data="shards", documents=8),
}
# Paper §4.1, App. B.1: rows of 4096 tokens, 2M tokens a step, 250k steps; Config's ddpm, lambda 5, patch 2 are the paper's.
PAPER = dict(data="shards", seq_len=4096, documents=1, accumulate=512, steps=250000, lr=3e-4, warmup=4000, compile=True,
             ema=0.9999, save_every=1000, gap_every=1000, sample_steps=250, guidance=5.0)
PRESETS |= {size: dict(PAPER, size=size) for size in PAPER_SIZES}
PRESETS["7b"] = dict(PAPER, size="7b", accumulate=1024, steps=500000, checkpointing=True)       # the flagship: 4M, 500k
# Paper §4.1, Table 2 ("Batch"): a Llama's steps have the 1M text tokens of the others' 2M. Its third row is --preset 0.76b-llama
# --stable. The 7B of Table 1 is --preset 7b --accumulate 512 --steps 250000: as long as its rivals here, a quarter of the flagship.
RIVALS = {"chameleon": dict(model="chameleon", stable=True, lr=1e-4), "llama": dict(model="llama", accumulate=256)}
PRESETS |= {f"{size}-{rival}": dict(PAPER, size=size, checkpointing=size == "7b") | RIVALS[rival] for size in PAPER_SIZES for rival in RIVALS}
MAY_CHANGE_ON_RESUME = {"out", "log_every", "gap_every", "save_every", "samples", "sample_steps", "guidance", "sampler",
              "checkpointing", "compile", "shard"}      # may change on resume (and see train.check_config)


def parse_arguments(argv=None):
    """(Config, resume, overwrite, None or the GPUs, MFU, device of --dry-run) of a command line."""
    parser = argparse.ArgumentParser(usage="python train.py [--preset NAME] [options]      (--help names them all)",
                                     description="Train a Transfusion model. `python train.py` alone trains the first toy.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a named set of options; default: that of --data")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in the run's folder")
    parser.add_argument("--overwrite", action="store_true", help="start anew although the run's folder has a checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="only print what the run will cost (a paper's size; no GPU needed)")
    parser.add_argument("--gpus", type=int, default=1, help="of --dry-run: how many")
    parser.add_argument("--mfu", type=float, default=0.46, help="of --dry-run: share of the GPUs' peak to assume")
    parser.add_argument("--device", default="H100", help=f"of --dry-run: {', '.join(plan.DEVICES)}")
    kinds = {f.name: type(f.default) for f in fields(Config)}
    for f in fields(Config):
        more = dict(action=argparse.BooleanOptionalAction) if kinds[f.name] is bool else dict(type=kinds[f.name], choices=f.metadata["choices"])
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {f.default})", **more)
    given = vars(parser.parse_args(argv))
    preset, resume, overwrite, dry = (given.pop(k) for k in ("preset", "resume", "overwrite", "dry_run"))
    planned = tuple(given.pop(k) for k in ("gpus", "mfu", "device"))
    rival = given.get("model", MODELS[0])
    preset = preset or (rival if rival != MODELS[0] else
                        next(name for name in PRESETS if PRESETS[name].get("data", "scenes") == given.get("data", "scenes")))
    config = Config(**{"out": f"out/{preset}", **PRESETS[preset], **given})
    for name in ("steps", "documents", "accumulate", "seq_len", "pairs", "vae_steps", "log_every", "gap_every", "save_every", "patch", "image_size"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    for name in ("lr", "lam", "guidance", "warmup", "samples", "decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"--{name} must be 0 or more, got {getattr(config, name)}")
    for name, top in (("drop", 1), ("ema", 1), ("sample_steps", 1000)):
        if not (name == "sample_steps") <= getattr(config, name) <= top:
            raise UserError(f"--{name.replace('_', '-')} must be at most {top} and not below "
                                 f"{int(name == 'sample_steps')}, got {getattr(config, name)}")
    if config.model != MODELS[0] and (config.data == "edits" or config.model == "llama" and config.data in ("mnist", "folder")):
        raise UserError(f"--model {config.model} learns from scenes{'' if config.model == 'llama' else ', mnist, a folder'} or shards; "
                             f"the rest is for Transfusion")
    if config.model != MODELS[0] and config.encoder != "linear":
        raise UserError(f"--encoder {config.encoder} is Transfusion's: a {config.model} has no patches")
    if config.text_share > 1 or (given.get("text_share", 0) > 0 and config.data != "scenes"):
        raise UserError(f"--text-share must be at most 1, and is for --data scenes, got {config.text_share}")
    if config.codes == 1 or config.codes < 0 or (config.codes and config.model != "chameleon"):
        raise UserError(f"--codes must be at least 2 and is for --model chameleon, got {config.codes}")
    if not 1 <= config.t_limit <= 1000:
        raise UserError(f"--t-limit must be between 1 and 1000, got {config.t_limit}")
    if not (config.shift > 0 and config.clip > 0):
        raise UserError("--shift and --clip must be above 0")
    return config, resume, overwrite, planned if dry else None


if __name__ == "__main__":
    for name, numbers in PRESETS.items():
        print(f"{name:15s} " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in numbers.items()))
