"""
kit.py: a trained model in one small file

THE IDEA    To use a model one needs four things that fit each other: the network, the words it knows, the VAE whose latents
            it draws, and the noise process it has learned. They travel together, in 16 bits, as one model.pt.
A PICTURE   model.pt = {config, weights | words | vae | diffusion}  --load_kit-->  Kit  --> sample.py, evaluate.py, --init
SHAPES      pictures (M, h, w, 3 or 1) uint8  --encode_pixels-->  latents (M, c, h, w) float32  --decode_latents-->  pictures
READ NEXT   sample.py        TRY IT  python kit.py        TEST  tests/test_sample.py, tests/test_errors.py
"""
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
import vae as vae_module
from data import SPECIAL, Pieces
from diffusion import Diffusion
from model import ModelConfig, Transfusion, count
from vae import VAE, VAEConfig
from support.common import ASSETS, UserError


@dataclass
class Trained:
    """All that is needed to use a trained model: the network, its words, its VAE, its diffusion."""
    model: Transfusion
    tokenizer: data.Words | Pieces
    vae: vae_module.VAE
    diffusion: Diffusion
    kind: str = "transfusion"                           # or a rival's name (chameleon.py)
    text_share: float = -1.0                            # of its training: see data.Documents


def load_trained(path, device="cpu"):
    """The Kit of a model.pt. Raises UserError if the file is missing, damaged, or of another kind or shape."""
    content = load(path, "model")
    try:
        model = Transfusion(ModelConfig(**content["config"]))
        model.load_state_dict({new_name(k): v.float() for k, v in content["weights"].items()})
        return Trained(model.eval().to(device), load_tokenizer(content["words"]), unpack_vae(content["vae"]).to(device),
                   Diffusion(**content["diffusion"]), **content.get("about", {}))
    except (KeyError, TypeError, RuntimeError) as problem:
        raise UserError(f"{path} was written by another version of this program: "
                             f"{str(problem).splitlines()[0]}") from None


def save_trained(path, trained):
    """Write the Kit as one small file (weights in 16 bits: 2 bytes a parameter)."""
    half = lambda content: {k: v.half() if v.dtype == torch.float32 else v for k, v in content.items()}   # bfloat16 stays
    packed = pack_vae(trained.vae)
    packed["weights"] = half(packed["weights"])
    save(path, {"kind": "model", "config": vars(trained.model.config), "weights": half(trained.model.state_dict()),
                           "words": dump_tokenizer(trained.tokenizer), "vae": packed, "about": {"kind": trained.kind, "text_share": trained.text_share},
                           "diffusion": {"kind": trained.diffusion.kind, "T": trained.diffusion.T, "shift": trained.diffusion.shift}})


# Files written before these names were changed still load.
OLD_NAMES = {"words.": "embedding.", "pictures.": "patch_encoder.", "reach": "x0_max"}


def new_name(name):
    """Today's name of a tensor in an older file."""
    for old, new in OLD_NAMES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def device_of(model):
    """Where a model computes; a model that is a plain function does so on the CPU."""
    return next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else torch.device("cpu")


def find_vae(source, given="", kept=None, codes=False):
    """The VAE, or with `codes` the VQ-VAE, or None: of the file `given`, or `kept` by the run, or shipped for the data `source`."""
    shipped = ASSETS / f"{source}_{'vq' if codes else 'vae'}.pt"
    path = given or next((p for p in (kept, shipped) if p and p.exists()), None)
    return load_vae(path, "vqvae" if codes else "vae") if path else None


@torch.no_grad()
def decode_latents(trained, latents):
    """(M, h, w, 3) uint8 pictures of latents (M, c, h, w), or of codes (M, h, w)."""
    decode = trained.vae.decode_codes if trained.vae.quantiser else trained.vae.decode
    pixels = vae_module.to_pixels(decode(latents.to(next(trained.vae.parameters()).device)))
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


@torch.no_grad()
def encode_pixels(trained, pixels):
    """Latents (M, c, h, w), or codes (M, h, w), of (M, h, w, 3 or 1) uint8 pictures; grey models read the mean of the channels."""
    if pixels.shape[-1] != trained.vae.config.image_channels:
        pixels = pixels.mean(-1, keepdims=True).round().astype(np.uint8)
    x = vae_module.to_float(pixels).to(next(trained.vae.parameters()).device)
    return (trained.vae.encode_codes(x) if trained.vae.quantiser else trained.vae.encode(x)[0]).cpu()


def save(path, content):
    """Write a checkpoint so that the path holds either the old file or the whole new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load(path, kind):
    """The dict of a checkpoint. Raises UserError if it is missing, damaged, or not of the wanted kind ("vae", "model", ...), or
    of one of several."""
    kinds = (kind,) if isinstance(kind, str) else kind
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as problem:                        # zip, pickle and key errors: torch has no common class for them
        raise UserError(f"{path} is not a checkpoint of this program ({type(problem).__name__}): truncated, or "
                             f"another kind of file?") from None
    if not isinstance(content, dict) or content.get("kind") not in kinds:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} holds {found!r}, but a checkpoint of kind {' or '.join(map(repr, kinds))} is needed here")
    return content


def pack_vae(vae):
    """The VAE as plain data, for a checkpoint of kind "vae", or "vqvae" if it has codes."""
    return {"kind": "vqvae" if vae.config.codes else "vae", "config": asdict(vae.config), "weights": vae.state_dict()}


def unpack_vae(content):
    """The VAE of `pack_vae`'s dict."""
    vae = VAE(VAEConfig(**{**content["config"], "multipliers": tuple(content["config"]["multipliers"])}))
    vae.load_state_dict({new_name(k): v.float() for k, v in content["weights"].items()})
    return vae.eval()


ANY_VAE = ("vae", "vqvae")


def load_vae(path, kind="vae"):
    """The VAE of a vae.pt; kind "vqvae": the VQ-VAE; EITHER: what it is. Raises UserError as `load`, and if the file is another
    version's."""
    try:
        return unpack_vae(load(path, kind))
    except (KeyError, TypeError, RuntimeError) as problem:
        raise UserError(f"{path} was written by another version of this program: "
                             f"{str(problem).splitlines()[0]}") from None


def dump_tokenizer(words):
    """What a file or a checkpoint keeps of a tokenizer: the bytes of a SentencePiece model, or a list of words."""
    return words.model if isinstance(words, Pieces) else words.vocabulary


def load_tokenizer(kept):
    """Words or Pieces of `dump_tokenizer`'s result, or of a path that ends in .json (a list of words) or .model."""
    if isinstance(kept, Path) and kept.suffix == ".json":
        try:
            kept = list(map(str, json.loads(kept.read_text())))
        except (ValueError, TypeError):
            raise UserError(f"{kept} is not a list of words, as packing writes it") from None
    elif isinstance(kept, Path):
        kept = kept.read_bytes()
    if isinstance(kept, bytes):
        return Pieces(kept)
    words = data.Words(kept)
    if len(words) != len({*SPECIAL, *kept}) or set(words.vocabulary) != {*SPECIAL, *kept}:
        raise UserError("this tokenizer has words with capital letters: write those of a tokenizer.json in lower case; a checkpoint that has "
                        "them comes from an earlier version of this program, train it anew")
    return words



if __name__ == "__main__":
    for path in (ASSETS / "scenes.pt", ASSETS / "scenes_edit.pt"):
        trained = load_trained(path)
        print(f"{path.name:16s} {count(trained.model):,} parameters, {len(trained.tokenizer)} words, latents {trained.model.config.latent} as "
              f"{trained.model.config.patches} patches, {trained.diffusion.kind}, shift {trained.diffusion.shift:g}: {path.stat().st_size / 1e6:.1f} MB")
