"""
config.py: every number of a run                            (Transfusion §4.1, Table 8, App. B.1)

THE IDEA    A run is a `Config` and nothing else. The toy and the 7B on 512 GPUs differ in these
            numbers and run the same lines.
A PICTURE   Config's defaults  <-  PRESETS[--preset]  <-  options on the command line
            What is further right wins. The result is kept in out/<name>/config.json.
THE RULE    Every field of Config is an option of `python train.py`: seq_len is --seq-len.
PAPER/HERE  same: the defaults are the paper's process at toy size (DDPM, lambda 5, patch 2, 10%
            decay), and the presets named after a size have the paper's numbers.
            The first run, `python train.py`, has the paper's objective, too.
            differs: some toys take rectified flow; the reason stands above FLOW_DEFAULTS.
READ NEXT   train.py        TRY IT  python config.py        TEST  tests/test_train.py
"""
import argparse
import math
import textwrap
from dataclasses import dataclass, field, fields

from diffusion import KINDS, SAMPLERS
from model import PAPER_SIZES
from patchify import PATCHES
from sources.choose import SOURCES
from sources.scenes import WORLDS
from support.checkpoint import shipped_vae
from support.common import ASSETS, Parser, UserError, run_command

MODELS = ("transfusion", "chameleon", "llama")
DATA = (*SOURCES, "shards")


# ------------------------------------------------------------------------------------ the options
def option(default, help, choices=None, at_least=-math.inf, at_most=math.inf):
    """A field of Config that is also a command-line option. at_least, at_most: its range."""
    about = {"help": help, "choices": choices, "at_least": at_least, "at_most": at_most}
    return field(default=default, metadata=about)


@dataclass
class Config:
    """Every number of a run. The defaults are the paper's process at toy size."""

    # Which of the options below the command line names. No option, so it has no type.
    named = frozenset()

    # What is trained. The rivals read pictures as codes, or no pictures (§4.1, Table 2).
    model: str = option("transfusion", "Transfusion, or a rival; at a paper's size take its "
                        "preset, e.g. 0.76b-chameleon, which sets what belongs to it", MODELS)
    size: str = option("toy", "a row of model.SIZES")
    init: str = option("", "fine-tune this model.pt: its shape, VAE and diffusion stay (§4.5)")

    # What it learns from.
    data: str = option("scenes", "what to learn from", DATA)
    data_dir: str = option("", "folder of MNIST's files, of pictures and captions.jsonl (or "
                           "edits.jsonl, documents.jsonl), or of shards")
    # Paper: §4.1, the flagship reads people more often, and beautiful pictures in the last 1%.
    mixture: str = option("", "shards: how often folders in --data-dir are read per epoch, e.g. "
                          "people=2,web=0.5; any other: once")
    mixture_end: str = option("", "the same in the last 1% of the steps, e.g. beautiful=8")
    world: str = option("one", "captions of scenes: one object, or six categories", tuple(WORLDS))
    image_size: int = option(32, "pixels per side; not of mnist", at_least=1)
    pairs: int = option(20000, "how many pictures, or triples, to draw (scenes, edits, a fork's)",
                        at_least=1)

    # How it sees pictures.
    vae: str = option("", "a vae.pt to use; default: assets/<data>_vae.pt (_vq.pt), or a new one")
    # The next five are refused where a VAE is there already: see `check_new_vae`.
    vae_steps: int = option(400, "training steps of a new VAE", at_least=1)
    vae_lr: float = option(2e-3, "highest learning rate of a new VAE", at_least=0)
    vae_channels: int = option(8, "width of a new VAE's first stage", at_least=4)
    vae_z: int = option(4, "latent channels of a new VAE", at_least=1)
    vae_balance: bool = option(False, "of a new VAE: rare colours count as much as common ones")
    codes: int = option(0, "codes of a Chameleon's VQ-VAE (the paper: 16384); 0: as many as its "
                        "file has, or 512 for a new one", at_least=0)
    patch: int = option(2, "side of a patch, in latent pixels (§4.3.2)", at_least=1)
    encoder: str = option("linear", "patch encoder (§4.3.3)", tuple(PATCHES))
    # Our choice: the paper does not say whether a patch has a position beside RoPE's.
    patch_position: bool = option(False, "add a learned vector per place in the picture")
    # Table 3's ablation is --no-bidirectional.
    bidirectional: bool = option(True, "patches of one picture see each other (§4.3.1)")
    stable: bool = option(False, "Chameleon's query-key norm, post-norm and z-loss (Table 2)")

    # The noise (eq. 2, eq. 3) and the sum of the losses (eq. 4).
    diffusion: str = option("ddpm", "the paper's DDPM, or rectified flow", tuple(KINDS))
    shift: float = option(1.0, "noise-to-signal ratio of the schedule times this; 1: the paper's")
    # Our choice: without it a toy learns a caption late, and loses colours while drawing.
    noise_skip: bool = option(False, "eps = s xt + a out: the noisy picture passes beside the "
                              "network, which says the rest (ddpm)")
    lam: float = option(5.0, "lambda of eq. 4", at_least=0)
    # Paper: t <= 500 for the pictures that stand before their captions (App. B.2, Table 11).
    t_limit: int = option(500, "noise limit of pictures before their captions, as a t of the "
                          "paper's schedule; 1000: none", at_least=1, at_most=1000)

    # The documents of a step.
    # Our choice: the paper guides, and does not say how many captions it drops in training.
    drop: float = option(0.1, "share of captions dropped, for guidance", at_least=0, at_most=1)
    # Paper: as many text tokens as patches (§4.1).
    text_share: float = option(-1.0, "share of documents of text alone; -1: so many that text "
                               "tokens and patches are 1 : 1", at_least=-1, at_most=1)
    seq_len: int = option(96, "T, positions per row; documents are packed into rows", at_least=1)
    documents: int = option(64, "documents per micro-batch (shards: rows)", at_least=1)
    accumulate: int = option(0, "micro-batches per step, over all processes; 0: one for each, and "
                             "--documents is divided among them", at_least=0, at_most=10 ** 6)

    # The optimizer, AdamW.
    # Paper: 4,000 steps of warm-up to 3e-4, decay 0.1, the gradient clipped at 1 (App. B.1).
    # Our choice: a toy warms up for 100 steps, and its few weights learn at a larger rate.
    steps: int = option(1400, "optimizer steps", at_least=1)
    lr: float = option(2e-3, "peak learning rate; ends at a twentieth of it", at_least=0)
    warmup: int = option(100, "steps of linear warm-up", at_least=0)
    decay: float = option(0.1, "weight decay", at_least=0)
    clip: float = option(1.0, "gradient clipping, by global norm")
    # Our choice: pictures are drawn with an average of the weights.
    ema: float = option(0.998, "decay of the averaged weights; 0: no average, no second copy",
                        at_least=0, at_most=1)
    seed: int = option(0, "seed of weights, data and noise", at_least=0, at_most=2 ** 32 - 1)

    # How the processes share the work. None of these changes what is learned.
    checkpointing: bool = option(False, "recompute activations in the backward pass")
    compile: bool = option(False, "torch.compile each block, the U-Net's too")
    shard: int = option(0, "among how many processes the weights are divided; 0: those of one "
                        "machine")
    auto: bool = option(False, "choose the rows of a micro-batch, and --checkpointing, for the "
                        "GPU's memory (a paper's size; --dry-run shows the choice)")

    # What is written, and when.
    log_every: int = option(50, "steps between lines of log.jsonl", at_least=1)
    gap_every: int = option(200, "steps between measurements of the conditioning gap", at_least=1)
    save_every: int = option(500, "steps between checkpoints; the last two are kept", at_least=1)
    # Fig. 5 scores one run after several budgets: scale/export.py makes a model.pt of a checkpoint.
    keep_every: int = option(0, "steps between checkpoints that are kept for good; 0: none",
                             at_least=0)
    out: str = option("", "folder of this run; default: out/<preset>")

    # The report after the last step.
    samples: int = option(200, "pictures to draw for the report; 0: no report", at_least=0)
    sample_steps: int = option(50, "diffusion steps of these pictures", at_least=1, at_most=1000)
    guidance: float = option(3.0, "guidance of these pictures", at_least=0)
    sampler: str = option("ddpm", "sampler of these pictures", SAMPLERS)


# A resumed run may change these. They decide how it computes and what it writes, not what it
# learns (support/run_folder.py compares the rest).
# The data may lie in another folder by now: run_folder.check_same_data looks at what is in it.
MAY_CHANGE_ON_RESUME = {
    "out", "data_dir", "log_every", "gap_every", "save_every", "keep_every",
    "samples", "sample_steps", "guidance", "sampler",
    "checkpointing", "compile", "shard", "auto",
}


# ------------------------------------------------------------------------------- the toys' presets
# The first run, "mnist" and "six-paper" have the paper's objective.
# Paper: DDPM, cosine schedule, eps loss and lambda 5, which are Config's defaults.
# Our choice: --noise-skip; a rate of 4e-3; a patch as large as an object, so that a step has twice
# the pictures at the same price. docs/RESULTS.md "The paper's own objective" measures each.
EPS_DEFAULTS = dict(
    noise_skip=True,
    patch=4,
    lr=4e-3,
    ema=0.999,
    vae_steps=350,                                      # of digits; scenes have a VAE
)
# Differs from the paper: all other toys take its one alternative, rectified flow, with a noisier
# schedule. A caption is decided at high noise. There it moves the eps loss by 2% only, so that it
# is learned late (docs/RESULTS.md "What it took").
FLOW_DEFAULTS = dict(
    diffusion="flow",
    patch_position=True,
    documents=32,
    ema=0.999,
)
# Handwritten digits, with flow.
DIGITS_DEFAULTS = dict(
    FLOW_DEFAULTS,
    data="mnist",
    shift=2.0,
    lam=1.0,
    patch=4,
    documents=64,
)
# Pictures of your own have more in them than the toys' shapes: their VAE keeps 16 numbers of every
# 4 x 4 pixels, and rare colours (docs/RESULTS.md).
OWN_DEFAULTS = dict(
    FLOW_DEFAULTS,
    steps=8000,
    shift=2.0,
    vae_steps=4500,
    vae_lr=4e-3,
    vae_z=16,
    vae_balance=True,
    sample_steps=25,
    sampler="dpm++",
    guidance=4.0,
)
# All six categories of GenEval, in a larger model.
SIX_DEFAULTS = dict(
    world="six",
    size="small",
    pairs=40000,
    seq_len=128,
    gap_every=1000,
    save_every=1000,
)
PRESETS = {
    # The first run: one object, minutes on two CPU cores.
    "scenes": dict(
        EPS_DEFAULTS,
        steps=4500,
        text_share=0.05,                                # 1 : 1 would leave no text alone
        guidance=2.0,
    ),
    # The same with rectified flow.
    "flow": dict(
        FLOW_DEFAULTS,
        steps=3300,
        shift=3.0,
    ),
    # Handwritten digits.
    "mnist": dict(
        EPS_DEFAULTS,
        data="mnist",
        steps=4200,
    ),
    # The same with rectified flow.
    "mnist-flow": dict(
        DIGITS_DEFAULTS,
        steps=2250,
        vae_steps=350,
    ),
    # The same in a minute, its VAE included: for a class. Few steps want a higher rate and an
    # average that forgets sooner. Guidance 5 is the paper's for its comparisons (App. B.1).
    "mnist-minute": dict(
        DIGITS_DEFAULTS,
        steps=400,
        lr=4e-3,
        ema=0.996,
        vae_steps=150,
        log_every=10,
        gap_every=100,
        guidance=5.0,
    ),
    # Your own pictures, with captions.jsonl.
    "folder": dict(
        OWN_DEFAULTS,
        data="folder",
    ),
    # Your own documents, of words and pictures in any mixture.
    "documents": dict(
        OWN_DEFAULTS,
        data="documents",
        seq_len=192,
    ),
    # All six categories of GenEval.
    "six": dict(
        FLOW_DEFAULTS | SIX_DEFAULTS,
        steps=11000,
        shift=3.0,
        documents=64,
        ema=0.998,
    ),
    # The same with the paper's objective.
    "six-paper": dict(
        EPS_DEFAULTS | SIX_DEFAULTS,
        steps=12000,
        documents=96,
        text_share=0.15,
        guidance=2.0,
    ),
    # Paper: fine-tune on 8,000 triples (§4.5). Here the start is the shipped checkpoint of "six".
    "edit": dict(
        FLOW_DEFAULTS,
        data="edits",
        init=str(ASSETS / "scenes.pt"),
        pairs=8000,
        steps=4400,
        seq_len=92,                                     # two triples fill a row
        gap_every=1000,
        save_every=1000,
        sample_steps=25,
        sampler="dpm++",
        guidance=2.0,
    ),
    # The rivals (chameleon.py).
    # Paper: a Chameleon learns at a third of Transfusion's rate (§4.1).
    # Our choice: a step has as many tokens, and as much text, as a step of "flow".
    "chameleon": dict(
        FLOW_DEFAULTS,
        model="chameleon",
        stable=True,
        steps=3300,
        lr=7e-4,
        documents=18,
        text_share=0.635,
        seq_len=160,
        patch_position=False,
    ),
    "llama": dict(
        FLOW_DEFAULTS,
        model="llama",
        steps=3300,
        patch_position=False,
    ),
    # Packed shards, at toy size.
    "shards": dict(
        data="shards",
        documents=8,
    ),
}


# ----------------------------------------------------------------------------- the paper's presets
# Paper: rows of 4096 tokens, 2M tokens a step, 250k steps (§4.1, App. B.1). DDPM, lambda 5 and
# patch 2 are Config's defaults already.
PAPER_DEFAULTS = dict(
    data="shards",
    seq_len=4096,
    documents=1,
    accumulate=512,                                     # 512 rows of 4096: 2M tokens
    steps=250000,
    lr=3e-4,
    warmup=4000,
    sample_steps=250,
    guidance=5.0,
    # Our choice: the paper does not say.
    ema=0.9999,
    compile=True,
    gap_every=1000,
    save_every=1000,
)
# Paper: Chameleon's changes for stability come with a rate of 1e-4 (§4.1). So --stable sets it: the
# third row of Table 2 is --preset 0.76b-llama --stable.
STABLE_LR = 1e-4
# Paper: a Llama's step has the 1M text tokens of the others' 2M (Table 2, "Batch").
PAPER_RIVALS = {
    "chameleon": dict(model="chameleon", stable=True, lr=STABLE_LR),
    "llama": dict(model="llama", accumulate=256),
}
for size in PAPER_SIZES:
    run = dict(PAPER_DEFAULTS, size=size, checkpointing=size == "7b")   # 7B: to fit in memory
    PRESETS[size] = run
    for rival, changes in PAPER_RIVALS.items():
        PRESETS[f"{size}-{rival}"] = run | changes
# Paper: the flagship, Table 6 (§4.4): U-Net patches of 2x2, 500k steps of 4M tokens. "7b" is the
# 7B of Table 1 and Fig. 5: linear patches, a quarter of the tokens, as its rivals have them.
PRESETS["flagship"] = dict(PRESETS["7b"], encoder="unet", accumulate=1024, steps=500000)


# ------------------------------------------------------------------------------- the command line
def parse_arguments(argv=None):
    """(Config, resume, overwrite, plan) of a command line. plan: (GPUs, MFU, device) of --dry-run,
    or None. Raises UserError for numbers out of range and options that do not fit together."""
    given = vars(build_parser().parse_args(argv))       # only what the command line names
    preset = given.pop("preset")
    resume = given.pop("resume")
    overwrite = given.pop("overwrite")
    dry_run = given.pop("dry_run")
    plan = (given.pop("gpus"), given.pop("mfu"), given.pop("device"))

    if preset is None:
        preset = default_preset(given)
    options = {"out": f"out/{preset}", **PRESETS[preset], **given}
    if given.get("stable") and options.get("size") in PAPER_SIZES and "lr" not in given:
        options["lr"] = STABLE_LR
    _, target = KINDS[options.get("diffusion", "ddpm")]
    if target != "eps" and "noise_skip" not in given:   # a preset's is for its own eps loss
        options["noise_skip"] = False
    config = Config(**options)
    config.named = frozenset(given)
    check_ranges(config)
    check_together(config, given)
    if not resume:                                      # a run that goes on may have its own VAE
        check_new_vae(config)
    return config, resume, overwrite, plan if dry_run else None


def build_parser():
    """The argparse parser: one option per field of Config, and what is not part of a run."""
    parser = Parser(
        usage="python train.py [--preset NAME] [options]      (--help names them all)",
        description="Train a Transfusion model. `python train.py` alone trains the first toy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS),
        help="a named set of options; default: that of --model, or of --data")
    add("--resume", action="store_true",
        help="go on from the last complete checkpoint in the run's folder")
    add("--overwrite", action="store_true",
        help="start anew although the run's folder has a checkpoint")
    add("--dry-run", action="store_true",
        help="only print what the run will cost (a paper's size; no GPU needed)")
    add("--gpus", type=int, default=1, help="of --dry-run: how many")
    add("--mfu", type=float, default=0.43, help="of --dry-run: share of the GPUs' peak to assume")
    add("--device", default="H100", help="of --dry-run: a name in scale/plan.py's DEVICES")

    for f in fields(Config):
        kind = dict(type=f.type, choices=f.metadata["choices"])
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)      # --compile, --no-compile
        about = f.metadata["help"].replace("%", "%%")   # argparse fills in what follows a %
        add(option_name(f.name), help=f"{about} (default: {f.default})",
            default=argparse.SUPPRESS, **kind)          # SUPPRESS: leave out what is not given
    return parser


def option_name(name):
    """--seq-len of seq_len."""
    return "--" + name.replace("_", "-")


def default_preset(given):
    """The preset of a command line that names none: that of its --model, or of its --data.
    given: the options that were given. Raises UserError if there is none for these data."""
    if given.get("model", "transfusion") != "transfusion":
        return given["model"]
    data = given.get("data", "scenes")
    for name, options in PRESETS.items():
        if options.get("data", "scenes") == data:
            return name
    raise UserError(f"no preset is made for --data {data}: name one whose numbers it is to take: "
                    f"--preset flow, or --preset folder, whose VAE is larger and learns for "
                    f"{OWN_DEFAULTS['vae_steps']} steps first")


# ----------------------------------------------------------------------------- the user's mistakes
def check_ranges(config):
    """Raise UserError if a number is out of the range that its option names."""
    for f in fields(config):
        value = getattr(config, f.name)
        low = f.metadata["at_least"]
        high = f.metadata["at_most"]
        if low == -math.inf and high == math.inf:       # text, a switch, or any number
            continue
        if low <= value <= high and math.isfinite(value):           # neither is true of nan
            continue
        wanted = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise UserError(f"{option_name(f.name)} must be {wanted}, got {value}")
    for name in ("shift", "clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"{option_name(name)} must be above 0 and finite, got "
                            f"{getattr(config, name)}")


def check_together(config, given):
    """Raise UserError if options do not fit together. given: those of the command line alone."""
    unfit = {"transfusion": (), "chameleon": ("edits", "documents"),
             "llama": ("edits", "documents", "mnist", "folder")}
    if config.data in unfit[config.model]:
        fit = [name for name in DATA if name not in unfit[config.model]]
        raise UserError(f"--model {config.model} learns from {', '.join(fit)}; "
                        f"--data {config.data} is for Transfusion")
    if config.model != "transfusion" and config.encoder != "linear":
        raise UserError(f"--encoder {config.encoder} is Transfusion's: a {config.model} has no "
                        f"patches")
    if given.get("text_share", -1) > 0 and config.data != "scenes":
        raise UserError(f"--text-share is for --data scenes, not for {config.data}, which decides "
                        f"itself how much text there is")
    _, target = KINDS[config.diffusion]
    if config.noise_skip and target != "eps":
        raise UserError(f"--noise-skip is for a network that says eps, as with --diffusion ddpm, "
                        f"not for --diffusion {config.diffusion}")
    if config.codes and config.model != "chameleon":
        raise UserError(f"--codes is for --model chameleon, not for {config.model}")
    if not config.out:                                  # a dozen files among the user's own
        raise UserError("--out must name a folder, but it is empty")
    if config.data != "shards" and (config.mixture or config.mixture_end):
        raise UserError(f"--mixture is for --data shards, not for {config.data}")
    if config.keep_every % config.save_every:
        raise UserError(f"--keep-every {config.keep_every} must be a multiple of --save-every "
                        f"{config.save_every}: what is kept must be saved first")
    if config.vae_channels % 4:
        raise UserError(f"--vae-channels must be a multiple of 4, got {config.vae_channels}")
    if config.codes == 1:
        raise UserError("--codes must be at least 2, got 1: a picture of one code says nothing")


def check_new_vae(config):
    """Raise UserError if the command line describes a new VAE, and a new run would train none."""
    brings = config.init or config.vae
    if not brings and config.data == "shards":
        brings = f"the folder of shards {config.data_dir or 'packed'}"
    if not brings:
        shipped = shipped_vae(config.data, codes=config.model == "chameleon")
        brings = shipped if shipped.exists() else ""
    if not brings:
        return
    for name in ("vae_steps", "vae_lr", "vae_channels", "vae_z", "vae_balance"):
        if name in config.named:
            raise UserError(f"{option_name(name)} is for a new VAE, but {brings} brings its own: "
                            f"leave it out")


def main():
    """Print every preset as the options that it stands for."""
    print("python train.py --preset NAME is NAME's options below, and yours after them\n")
    for name, options in PRESETS.items():
        words = []
        for option, value in options.items():
            if isinstance(value, bool):
                words.append(option_name(option if value else f"no_{option}"))
            else:
                words.append(f"{option_name(option)}\u00a0{value}")     # kept on one line
        text = textwrap.fill("  ".join(words), 100, initial_indent=f"{name:16s}",
                             subsequent_indent=" " * 16, break_on_hyphens=False)
        print(text.replace("\u00a0", " "))


if __name__ == "__main__":
    run_command(lambda _: main())
