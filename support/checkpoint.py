"""
checkpoint.py: a trained model in one small file

THE IDEA    To use a model one needs four things that fit each other: the network, the tokenizer it
            was trained with, the VAE whose latents it draws, and the noise process it has learned.
            They travel together, in 16 bits, as one model.pt.
A PICTURE   model.pt = {config, weights | words | vae | diffusion | about}
                |  load_trained
                v
            Trained(model, tokenizer, vae, diffusion)  -->  sample.py, evaluate.py, train.py --init
THE RULE    Every file is a dict with a "kind": "model", "parts" (a model without weights), "vae" or
            "vqvae" (or "vae training", in autoencoder/train.py). It is read with weights_only: a
            file cannot run code. What is read is what was written (each part has a checksum), and
            every number of it is finite.
SHAPES      pictures (M, h, w, 3 or 1) uint8 --encode_pixels--> latents (M, c, h, w) float32
            latents (M, c, h, w) --decode_latents--> pictures (M, h, w, 3) uint8
READ NEXT   sample.py        TRY IT  python -m support.checkpoint
TEST        tests/test_sample_command_line.py, tests/test_vae.py, tests/test_errors.py,
            tests/test_damaged_files.py
"""
import math
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import data
import vae as vae_module
from data import SPECIAL, Pieces
from diffusion import Diffusion
from model import ModelConfig, Transfusion, count
from support.common import (
    ASSETS,
    UserError,
    end_with_the_reader,
    read_json,
    read_whole,
    whole_file,
)
from support.origin import Origin
from vae import VAE, VAEConfig

ANY_VAE = ("vae", "vqvae")                              # for `load_vae`: either kind
WHO_WRITES = {                                          # for the user who named another file
    "model": ": a model.pt of train.py",
    "vae": ": a vae.pt of python -m autoencoder.train",
    "vqvae": ": a vae.pt of python -m autoencoder.train --codes 512",
}

KINDS = ("transfusion", "chameleon", "llama")           # of models: ours, and the rivals
MOST = 2 ** 20                                          # diffusion steps, or positions, of a file

# What a dict that does not fit this program ends in, while a model is built from it.
UNFIT = (LookupError, TypeError, AttributeError, RuntimeError, ValueError, ArithmeticError)

# Parts of the network had other names in older files, which still load: old start, new start.
OLD_NAMES = {"words.": "embedding.", "pictures.": "patch_encoder.", "reach": "x0_max"}


# ------------------------------------------------------------------------------- any checkpoint
def save(path, content):
    """Write a checkpoint, so that the path holds the old file or the whole new one. A program that
    is stopped in the middle never leaves half of one. content: a dict with a "kind". Raises
    UserError, and writes nothing, if a number in it is not finite or the disk is full."""
    broken = name_not_finite(content)
    if broken:
        raise UserError(f"{path} was not written, because {broken} is not finite in it: this "
                        f"training went wrong; lower its learning rate, or go back to an earlier "
                        f"checkpoint")
    with whole_file(path) as file:
        torch.save(content, file)


def load(path, kind):
    """The dict of a checkpoint. kind: the one that is wanted, or a tuple of several. Raises
    UserError if the file is missing, damaged, or of another kind, or a number in it is not
    finite."""
    kinds = (kind,) if isinstance(kind, str) else kind
    check_undamaged(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:                        # pickle, key: there is no common class
        raise no_checkpoint(path, problem) from None
    found = content.get("kind") if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or found not in kinds:
        wanted = " or ".join(repr(name) for name in kinds)
        raise UserError(f"{path} holds {found!r}, but a checkpoint of kind {wanted} is needed "
                        f"here{WHO_WRITES.get(kinds[0], '')}")
    broken = name_not_finite(content)
    if broken:
        raise UserError(f"{path} cannot be used, because {broken} is not finite in it: its "
                        f"training went wrong; take an earlier checkpoint")
    return content


def check_undamaged(path):
    """Raise UserError if a checkpoint is missing, or is not what was written."""
    if not Path(path).exists():
        raise UserError(f"there is no checkpoint {path}")
    if not Path(path).is_file():                        # a pipe would wait forever
        raise UserError(f"{path} is not a checkpoint of this program: it is not a file")
    # TRAP: a checkpoint is a zip file with a checksum for each tensor, but torch.load does not look
    # at them. It would read flipped bytes as weights.
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except Exception as problem:                        # truncated, or no zip file at all
        raise no_checkpoint(path, problem) from None
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} in it is not what was written; copy the "
                        f"file here again, or take another checkpoint")


def no_checkpoint(path, problem):
    """UserError for a file that cannot be read as a checkpoint."""
    return UserError(f"{path} is not a checkpoint of this program ({type(problem).__name__}): "
                     f"truncated, or another kind of file?")


def name_not_finite(content, name=""):
    """The name of the first number or tensor, in dicts and lists within each other, that is NaN or
    infinite; "" if all are finite. Of a tensor that is divided among processes, this one's part is
    looked at."""
    if isinstance(content, dict):
        parts = content.items()
    elif isinstance(content, (list, tuple)):
        parts = enumerate(content)
    else:
        return "" if is_finite(content) else name
    for key, part in parts:
        broken = name_not_finite(part, f"{name}.{key}" if name else str(key))
        if broken:
            return broken
    return ""


def is_finite(value):
    """Whether a number, or every number of a tensor, is finite. Anything else is, too."""
    if isinstance(value, float):
        return math.isfinite(value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return True
    if value.layout is not torch.strided:               # sparse: `build` refuses it
        return True
    if hasattr(value, "to_local"):                      # a tensor of scale/distributed.py
        value = value.to_local()
    if value.dtype == torch.float64:
        value = value.float()                           # as it is used: 1e300 becomes infinite
    return bool(value.isfinite().all())


def new_name(name):
    """Today's name of a tensor in an older file."""
    for old, new in OLD_NAMES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def of_another_version(path, problem):
    """UserError for a file whose numbers or names do not fit this program."""
    if isinstance(problem, UserError):                  # it says itself what to do
        return problem
    reason = (str(problem) or type(problem).__name__).splitlines()[0]
    return UserError(f"{path} was written by another version of this program: {reason}")


# ------------------------------------------------------------------------------ a trained model
@dataclass
class Trained:
    """All that is needed to use a trained model."""
    model: Transfusion
    tokenizer: data.Words | Pieces
    vae: VAE
    diffusion: Diffusion
    kind: str = "transfusion"                           # or a rival's name (chameleon.py)
    text_share: float = -1.0                            # of its training: see data.Documents
    origin: Origin = field(default_factory=Origin)      # where it comes from


def load_trained(path, device="cpu"):
    """The Trained of a model.pt. Raises UserError if the file is missing, damaged, or of another
    kind or shape."""
    content = load(path, "model")
    try:
        check_counts(content["config"], content["weights"])
        config = typed(ModelConfig, content["config"])
        model = build(Transfusion, config, content["weights"])
        tokenizer = load_tokenizer(content["words"])
        vae = unpack_vae(content["vae"])
        diffusion = Diffusion(**content["diffusion"])
        about = content.get("about", {})                # the oldest files have none
        origin = typed(Origin, content.get("origin", {}))
        trained = Trained(model.eval(), tokenizer, vae, diffusion, **about, origin=origin)
        check_together(trained)
    except UNFIT as problem:
        raise of_another_version(path, problem) from None
    model.to(device)
    vae.to(device)
    return trained


class NoFirstWeights(TorchFunctionMode):
    """Inside, torch.nn.init draws nothing. On shapes alone there is nothing to draw, but the first
    time it is asked to, torch imports its whole compiler: more than a second of "python sample.py".
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def build(kind, config, weights):
    """A module of a class, made from its config, with weights from a file. Raises RuntimeError if
    the weights do not fit.

    weights     {name: tensor in 16 bits}; it is emptied. At 7B, all of it beside all of the module
                would be 40 GB for each process that reads the file. So it is never more than the
                module and one tensor."""
    # Shapes only: no first weights are drawn, and a config that was damaged may ask for terabytes.
    with torch.device("meta"), NoFirstWeights():
        module = kind(config)
    wanted = module.state_dict()
    today = {}
    for old in list(weights):
        name = new_name(old)
        tensor = weights.pop(old)
        if name not in wanted or wanted[name].shape != tensor.shape:
            raise RuntimeError(f"{name} of the shape {tuple(tensor.shape)} has no place")
        if tensor.layout is not torch.strided or tensor.is_complex():
            raise RuntimeError(f"{name} is sparse or complex")
        # 16 bits are for the disk only.
        today[name] = tensor.to(wanted[name].dtype, copy=True,
                                memory_format=torch.contiguous_format)
    module.load_state_dict(today, assign=True)
    return module


def check_counts(config, weights):
    """Raise ValueError if a file has fewer tensors than its config has layers or blocks. To build
    2^63 layers would take forever."""
    for name in ("layers", "blocks", "unet", "multipliers"):
        numbers = config.get(name, 0)
        for number in numbers if isinstance(numbers, (list, tuple)) else [numbers]:
            if number > max(1024, len(weights)):        # the U-Net's numbers are channels, too
                raise ValueError(f"it has {len(weights)} tensors, but {name} is {numbers!r:.60}")


def typed(kind, options):
    """An object of a dataclass of settings. Raises TypeError if one of the options, from a file, is
    not of its field's type: a size of -0.0 would end far from here, in a library's words."""
    for known in fields(kind):
        value = options.get(known.name, known.default)
        if known.type is tuple and type(value) in (list, tuple):
            right = all(type(number) is int for number in value)
        else:
            right = type(value) is known.type
        if known.name in options and not right:
            raise TypeError(f"{known.name} cannot be {value!r:.60}")
    return kind(**options)


def check_together(trained):
    """Raise ValueError if parts of a model.pt do not go together."""
    config = trained.model.config
    if trained.kind not in KINDS:
        raise ValueError(f"a model of the kind {trained.kind!r:.60} is not known")
    if type(trained.text_share) not in (int, float):
        raise ValueError(f"its share of text cannot be {trained.text_share!r:.60}")
    diffusion = trained.diffusion
    if type(diffusion.T) is not int or not 1 <= diffusion.T <= MOST or config.context > MOST:
        raise ValueError(f"it cannot have {diffusion.T!r:.60} diffusion steps and a context of "
                         f"{config.context}")
    if type(diffusion.shift) not in (int, float) or diffusion.shift <= 0:
        raise ValueError(f"the shift of its schedule cannot be {diffusion.shift!r:.60}")
    if type(diffusion.noise_skip) is not bool:
        raise ValueError(f"its noise_skip cannot be {diffusion.noise_skip!r:.60}")
    words = len(trained.tokenizer)
    codes = trained.vae.config.codes
    if config.vocabulary not in (words, words + codes):
        raise ValueError(f"its network knows {config.vocabulary} tokens, but its tokenizer has "
                         f"{words} and its VAE {codes} codes")
    if config.latent[0] != trained.vae.config.z:
        raise ValueError(f"its network draws latents of {config.latent[0]} channels, its VAE has "
                         f"{trained.vae.config.z}")


def save_trained(path, trained):
    """Write a Trained as one small file: 2 bytes per parameter."""
    weights = in_16_bits(trained.model.state_dict())
    save(path, parts_of(trained) | {"kind": "model", "weights": weights})


def parts_of(trained):
    """All of a Trained but its network's weights: a dict of kind "parts". With the weights of a
    checkpoint (scale/export.py) it is a model.pt."""
    diffusion = trained.diffusion
    # The VAE travels with the model: latents of another one would be noise to it.
    vae = pack_vae(trained.vae)
    vae["weights"] = in_16_bits(vae["weights"])
    return {
        "kind": "parts",
        "config": vars(trained.model.config),
        "words": dump_tokenizer(trained.tokenizer),     # ids have a meaning in this order only
        "vae": vae,
        "diffusion": {
            "kind": diffusion.kind,
            "T": diffusion.T,
            "shift": diffusion.shift,
            "noise_skip": diffusion.noise_skip,
        },
        "about": {"kind": trained.kind, "text_share": trained.text_share},
        "origin": asdict(trained.origin),
    }


def in_16_bits(weights):
    """The same dict with its float32 tensors as float16; bfloat16 stays what it is."""
    halved = {}
    for name, tensor in weights.items():
        halved[name] = tensor.half() if tensor.dtype == torch.float32 else tensor
    return halved


def device_of(model):
    """Where a model computes. A model that is a plain function does so on the CPU."""
    if not isinstance(model, nn.Module):
        return torch.device("cpu")
    return next((p.device for p in model.parameters()), None)


# -------------------------------------------------------------------------------------- its VAE
def pack_vae(vae):
    """The VAE as plain data, for a checkpoint of kind "vae", or "vqvae" if it has codes."""
    kind = "vqvae" if vae.config.codes else "vae"
    return {"kind": kind, "config": asdict(vae.config), "weights": vae.state_dict()}


def unpack_vae(content):
    """The VAE of `pack_vae`'s dict."""
    config = dict(content["config"])
    config["multipliers"] = tuple(config["multipliers"])        # a file may hold a list
    check_counts(config, content["weights"])
    return build(VAE, typed(VAEConfig, config), content["weights"]).eval()


def load_vae(path, kind="vae"):
    """The VAE of a vae.pt. kind: "vae", "vqvae", or ANY_VAE. Raises UserError as `load`, and if the
    file is from another version."""
    content = load(path, kind)
    try:
        return unpack_vae(content)
    except UNFIT as problem:
        raise of_another_version(path, problem) from None


def shipped_vae(source, codes=False):
    """The path of the VAE, or with `codes` of the VQ-VAE, that is shipped for these data. There may
    be no such file. source: name of the data."""
    return ASSETS / f"{source}_{'vq' if codes else 'vae'}.pt"


def find_vae(source, given="", kept=None, codes=False):
    """The VAE, or with `codes` the VQ-VAE, or None if there is none.

    source    name of the data, for which a VAE may be shipped
    given     a file that the user names; it comes first
    kept      the file that a run keeps, which comes before the shipped one
    """
    kind = "vqvae" if codes else "vae"
    for path in (given, kept, shipped_vae(source, codes)):
        # A file that the user names must exist: `load_vae` says so if it does not.
        if path and (path == given or path.exists()):
            return load_vae(path, kind)
    return None


@torch.no_grad()
def encode_pixels(trained, pixels):
    """Latents (M, c, h, w), or a VQ-VAE's codes (M, h, w), of pictures (M, h, w, 3 or 1) uint8.
    A model of grey pictures reads the mean of the channels."""
    vae = trained.vae
    if pixels.shape[-1] != vae.config.image_channels:   # a grey model, a picture in colour
        pixels = pixels.mean(-1, keepdims=True).round().astype(np.uint8)
    x = vae_module.to_float(pixels).to(device_of(vae))
    if vae.quantiser:
        return vae.encode_codes(x).cpu()
    mean, *_ = vae.encode(x)                            # Our choice: the mean, without its noise
    return mean.cpu()


@torch.no_grad()
def decode_latents(trained, latents):
    """(M, h, w, 3) uint8 pictures of latents (M, c, h, w), or of codes (M, h, w)."""
    vae = trained.vae
    if len(latents) == 0:
        h, w = latents.shape[-2:]
        return np.zeros((0, h * vae.f, w * vae.f, 3), dtype=np.uint8)
    latents = latents.to(device_of(vae))
    x = vae.decode_codes(latents) if vae.quantiser else vae.decode(latents)
    pixels = vae_module.to_pixels(x)
    if pixels.shape[-1] == 1:                           # grey: everything that shows expects RGB
        pixels = np.repeat(pixels, 3, -1)
    return pixels


# -------------------------------------------------------------------------------- its tokenizer
def dump_tokenizer(tokenizer):
    """What a file keeps of a tokenizer: a SentencePiece model's bytes, or a list of words."""
    return tokenizer.model if isinstance(tokenizer, Pieces) else tokenizer.vocabulary


def load_tokenizer(kept):
    """Words or Pieces. kept: what `dump_tokenizer` gave, or a path: .json (a list of words) or
    .model (SentencePiece). Raises UserError if it is something else."""
    # 1. From a path to what is in it.
    if isinstance(kept, Path) and kept.suffix == ".json":
        kept = read_words(kept)
    elif isinstance(kept, Path):
        kept = read_model(kept)
    # 2. Bytes are a SentencePiece model, a list is words.
    if isinstance(kept, bytes):
        return Pieces(kept)
    words = data.Words(kept)
    # 3. data.Words puts words in lower case and in order. A list with capitals would come out
    #    shorter, or in another order, and an id would mean another word than in training.
    known = {*SPECIAL, *kept}
    if len(words) != len(known) or set(words.vocabulary) != known:
        raise UserError("this tokenizer has words with capital letters: write those of a "
                        "tokenizer.json in lower case; a checkpoint that has them comes from an "
                        "earlier version of this program, train it anew")
    return words


def read_model(path):
    """The bytes of a SentencePiece .model. Raises UserError if there is no such file."""
    try:
        return read_whole(path)
    except FileNotFoundError as problem:
        raise UserError(f"the tokenizer is missing: {problem}") from None


def read_words(path):
    """The list of words in a tokenizer.json. Raises UserError if there is none."""
    try:
        words = read_json(path)
    except (OSError, ValueError) as problem:
        raise UserError(f"the tokenizer {path} cannot be read: {problem}") from None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{path} is not a list of words, as packing writes it")
    for word in words:
        if word.split() != [word]:                      # no text would ever have it as one word
            raise UserError(f"{path} has the word {word!r}, which is empty or has a space in it")
    return words


if __name__ == "__main__":
    end_with_the_reader()
    for path in [ASSETS / f"{name}.pt" for name in ("scenes", "scenes_edit", "scenes_paper")]:
        trained = load_trained(path)
        config = trained.model.config
        print(f"{path.name:16s} {path.stat().st_size / 1e6:.1f} MB: "
              f"{count(trained.model):,} parameters, {len(trained.tokenizer)} words, "
              f"latents {config.latent} as {config.patches} patches, "
              f"{trained.diffusion.kind}, shift {trained.diffusion.shift:g}")
