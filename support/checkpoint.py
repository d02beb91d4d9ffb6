"""
kit.py: a trained model in one small file

THE IDEA    To use a model one needs four things that fit each other: the network, the words it knows, the VAE whose latents
            it draws, and the noise process it has learned. They travel together, in 16 bits, as one model.pt.
A PICTURE   model.pt = {config, weights | words | vae | diffusion}  --load_kit-->  Kit  --> sample.py, evaluate.py, --init
SHAPES      pictures (M, h, w, 3 or 1) uint8  --encode_pixels-->  latents (M, c, h, w) float32  --decode_latents-->  pictures
READ NEXT   sample.py        TRY IT  python kit.py        TEST  tests/test_sample.py, tests/test_errors.py
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import data
import vae as vae_module
from diffusion import Diffusion
from model import ModelConfig, Transfusion, count
from shards import Pieces, dump_tokenizer, load_tokenizer


@dataclass
class Kit:
    """All that is needed to use a trained model: the network, its words, its VAE, its diffusion."""
    model: Transfusion
    words: data.Words | Pieces
    vae: vae_module.VAE
    diffusion: Diffusion
    kind: str = "transfusion"                           # or a rival's name (chameleon.py)
    text_share: float = -1.0                            # of its training: see data.Documents


def load_kit(path, device="cpu"):
    """The Kit of a model.pt. Raises UserError if the file is missing, damaged, or of another kind or shape."""
    content = vae_module.load(path, "model")
    try:
        model = Transfusion(ModelConfig(**content["config"]))
        model.load_state_dict({k: v.float() for k, v in content["weights"].items()})
        return Kit(model.eval().to(device), load_tokenizer(content["words"]), vae_module.unpack_vae(content["vae"]).to(device),
                   Diffusion(**content["diffusion"]), **content.get("about", {}))
    except (KeyError, TypeError, RuntimeError) as problem:
        raise data.UserError(f"{path} was written by another version of this program: "
                             f"{str(problem).splitlines()[0]}") from None


def save_kit(path, kit):
    """Write the Kit as one small file (weights in 16 bits: 2 bytes a parameter)."""
    half = lambda content: {k: v.half() if v.dtype == torch.float32 else v for k, v in content.items()}   # bfloat16 stays
    packed = vae_module.pack_vae(kit.vae)
    packed["weights"] = half(packed["weights"])
    vae_module.save(path, {"kind": "model", "config": vars(kit.model.config), "weights": half(kit.model.state_dict()),
                           "words": dump_tokenizer(kit.words), "vae": packed, "about": {"kind": kit.kind, "text_share": kit.text_share},
                           "diffusion": {"kind": kit.diffusion.kind, "T": kit.diffusion.T, "shift": kit.diffusion.shift}})


def device_of(model):
    """Where a model computes; a model that is a plain function does so on the CPU."""
    return next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else torch.device("cpu")


def find_vae(source, given="", kept=None, codes=False):
    """The VAE, or with `codes` the VQ-VAE, or None: of the file `given`, or `kept` by the run, or shipped for the data `source`."""
    shipped = data.ASSETS / f"{source}_{'vq' if codes else 'vae'}.pt"
    path = given or next((p for p in (kept, shipped) if p and p.exists()), None)
    return vae_module.load_vae(path, "vqvae" if codes else "vae") if path else None


@torch.no_grad()
def decode_latents(kit, latents):
    """(M, h, w, 3) uint8 pictures of latents (M, c, h, w), or of codes (M, h, w)."""
    decode = kit.vae.decode_codes if kit.vae.quantiser else kit.vae.decode
    pixels = vae_module.to_pixels(decode(latents.to(next(kit.vae.parameters()).device)))
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


@torch.no_grad()
def encode_pixels(kit, pixels):
    """Latents (M, c, h, w), or codes (M, h, w), of (M, h, w, 3 or 1) uint8 pictures; grey models read the mean of the channels."""
    if pixels.shape[-1] != kit.vae.config.image_channels:
        pixels = pixels.mean(-1, keepdims=True).round().astype(np.uint8)
    x = vae_module.to_float(pixels).to(next(kit.vae.parameters()).device)
    return (kit.vae.encode_codes(x) if kit.vae.quantiser else kit.vae.encode(x)[0]).cpu()


if __name__ == "__main__":
    for path in (data.ASSETS / "scenes.pt", data.ASSETS / "scenes_edit.pt"):
        kit = load_kit(path)
        print(f"{path.name:16s} {count(kit.model):,} parameters, {len(kit.words)} words, latents {kit.model.config.latent} as "
              f"{kit.model.config.patches} patches, {kit.diffusion.kind}, shift {kit.diffusion.shift:g}: {path.stat().st_size / 1e6:.1f} MB")
