"""
vae.py: pictures in a small space                             (Transfusion §2.3 "Latent Image Representation", App. C)

THE IDEA    Pixels are wasteful: most of them can be guessed from their neighbours. A convolutional network squeezes an
            h x w picture into a latent picture f times smaller on each side, a second one draws it back, and the
            transformer only ever sees the latents. Noise on the code (a variational autoencoder) keeps the space smooth,
            so that a slightly wrong latent still decodes to a sensible picture.
A PICTURE   (3, 32, 32) -> encoder -> mean, log-variance (4, 8, 8) -> sample z -> decoder -> (3, 32, 32)
                              stage: [ResBlock] x blocks, then half the size; middle: ResBlock, attention, ResBlock
THE RULE    L = L1(x, x') + L2(x, x') + kl_weight * KL( N(mean, var) || N(0, 1) )
            App. C has L1 + LPIPS + 0.5 GAN + 0.2 ID + 1e-6 KL. The toy's L2 stands where LPIPS does: L1 alone is content
            with the median, and the median of a mostly black picture is black (whole objects stay missing for long).
            latents for the transformer: (z - shift) / scale, so that each has about zero mean and unit deviation
SHAPES      pictures (M, c, h, w) float32 in [-1, 1]; latents (M, z, h/f, w/f) float32, f = 2 ** (number of stages - 1)
PAPER/HERE  same: the network's plan; with `paper()` it has the paper's numbers (channel 128, multipliers 1 2 4 4, z = 8).
            our choice: the scale of the latents (the paper is silent), AdamW, sums over pixels divided by pictures.
READ NEXT   patchify.py        TRY IT  python vae.py --data scenes        TEST  tests/test_vae.py
"""
import argparse
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import data


@dataclass
class VAEConfig:
    """The numbers of the network. The defaults are the toy's: 32x32 pixels to 8x8x4 latents with 0.17M parameters."""
    image_channels: int = 3
    channels: int = 8                                   # width of the first stage
    multipliers: tuple = (1, 2, 4)                      # width of each stage, in units of `channels`
    blocks: int = 1                                     # residual blocks per stage (the decoder has one more)
    z: int = 4                                          # latent channels
    attention: bool = True                              # in the middle, at the smallest size


def paper():
    """The VAEConfig of App. C: 256x256x3 to 32x32x8."""
    return VAEConfig(channels=128, multipliers=(1, 2, 4, 4), blocks=2, z=8)


def norm(channels):
    """GroupNorm over up to 32 groups of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """(M, c_in, h, w) -> (M, c_out, h, w): two convolutions around a shortcut."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """(M, c, h, w) -> same: one head, every pixel looks at every pixel."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.out = norm(c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        M, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(M, 3, c, h * w).transpose(2, 3).unbind(1)      # each (M, h*w, c)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(M, c, h, w))


def middle(c, attention):
    """The blocks at the smallest size."""
    return [ResBlock(c, c), *([Attention(c)] if attention else []), ResBlock(c, c)]


class VAE(nn.Module):
    """Encoder and decoder, and the buffers `shift`, `scale` (z,) that normalise the latents, `reach`: the largest
    normalised latent seen on training pictures, by which samplers clip."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths = [config.channels * m for m in config.multipliers]
        down, c = [nn.Conv2d(config.image_channels, widths[0], 3, padding=1)], widths[0]
        for stage, width in enumerate(widths):
            for _ in range(config.blocks):
                down, c = down + [ResBlock(c, width)], width
            if stage < len(widths) - 1:
                down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
        down += middle(c, config.attention)
        down += [norm(c), nn.SiLU(), nn.Conv2d(c, 2 * config.z, 3, padding=1), nn.Conv2d(2 * config.z, 2 * config.z, 1)]
        up = [nn.Conv2d(config.z, config.z, 1), nn.Conv2d(config.z, c, 3, padding=1)] + middle(c, config.attention)
        for stage, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                up, c = up + [ResBlock(c, width)], width
            if stage > 0:
                up += [nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)]
        up += [norm(c), nn.SiLU(), nn.Conv2d(c, config.image_channels, 3, padding=1)]
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up)
        self.register_buffer("shift", torch.zeros(config.z))
        self.register_buffer("scale", torch.ones(config.z))
        self.register_buffer("reach", torch.tensor(4.0))
        self.to(memory_format=torch.channels_last)      # a quarter faster on CPU

    @property
    def f(self):
        """How many times smaller the latents are, per side."""
        return 2 ** (len(self.config.multipliers) - 1)

    def moments(self, x):
        """Raw (mean, log-variance), each (M, z, h/f, w/f). Raises ValueError for a shape that f does not divide."""
        M, c, h, w = x.shape
        if c != self.config.image_channels or h % self.f or w % self.f:
            raise ValueError(f"this VAE takes (M, {self.config.image_channels}, h, w) with h and w divisible by {self.f}, "
                             f"got {tuple(x.shape)}")
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, x):
        """Normalised latents: (mean, deviation) of q(z | x), each (M, z, h/f, w/f)."""
        mean, logvar = self.moments(x)
        shift, scale = self.shift.view(1, -1, 1, 1), self.scale.view(1, -1, 1, 1)
        return (mean - shift) / scale, torch.exp(0.5 * logvar) / scale

    def decode(self, latents):
        """Pictures in [-1, 1] of normalised latents."""
        return self.decoder(latents * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)).clamp(-1, 1)


def to_float(pixels):
    """(M, h, w, c) uint8 array -> (M, c, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(x):
    """(M, c, h, w) float in [-1, 1] -> (M, h, w, c) uint8 array."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def loss_terms(vae, x, generator=None):
    """(reconstruction, KL), each summed over a picture's elements and averaged over pictures. App. C."""
    mean, logvar = vae.moments(x)
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator, device=x.device)
    error = vae.decoder(z) - x
    recon = (error.abs() + error.square()).sum() / len(x)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / len(x)
    return recon, kl


@torch.no_grad()
def encode_all(vae, pixels, progress=True):
    """Normalised (mean, deviation) of all pictures, each (N, z, h/f, w/f), computed once before training."""
    vae.eval()
    device = next(vae.parameters()).device
    parts = [[x.cpu() for x in vae.encode(to_float(pixels[k: k + 256]).to(device))]
             for k in tqdm(range(0, len(pixels), 256), desc="encoding pictures", disable=not progress, leave=False)]
    return torch.cat([m for m, _ in parts]), torch.cat([s for _, s in parts])


def train_vae(pixels, config, steps=400, batch=32, lr=2e-3, kl_weight=1e-6, seed=0, progress=True):
    """A trained VAE. pixels: (N, h, w, c) uint8. Warm-up and cosine decay, then shift, scale and reach are measured."""
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    vae = VAE(config).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    rate = lambda k: min((k + 1) / (0.1 * steps), 0.5 + 0.5 * np.cos(np.pi * k / steps))         # warm-up, then cosine to 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    bar = tqdm(range(steps), desc="training the VAE", disable=not progress)
    for _ in bar:
        x = to_float(pixels[rng.integers(len(pixels), size=batch)]).contiguous(memory_format=torch.channels_last)
        recon, kl = loss_terms(vae, x, generator)
        optimizer.zero_grad(set_to_none=True)
        (recon + kl_weight * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0 * x[0].numel())
        optimizer.step()
        schedule.step()
        bar.set_postfix(L1=f"{recon.item() / x[0].numel():.4f}", KL=f"{kl.item():.0f}")
    mean, deviation = encode_all(vae, pixels[:4096], progress=False)
    # TRAP: diffusion assumes latents of about unit deviation; unscaled ones make the noise schedule wrong without a sign of it
    vae.shift.copy_(mean.mean((0, 2, 3)))
    vae.scale.copy_((mean.var((0, 2, 3)) + deviation.square().mean((0, 2, 3))).sqrt())
    vae.reach.fill_(encode_all(vae, pixels[:4096], progress=False)[0].abs().max().item())
    return vae.eval()


def save(path, content):
    """Write a checkpoint so that the path holds either the old file or the whole new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load(path, kind):
    """The dict of a checkpoint. Raises UserError if it is missing, damaged, or not of the wanted kind ("vae", "model", ...)."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise data.UserError(f"there is no checkpoint {path}") from None
    except Exception as problem:                        # zip, pickle and key errors: torch has no common class for them
        raise data.UserError(f"{path} is not a checkpoint of this program ({type(problem).__name__}): truncated, or "
                             f"another kind of file?") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise data.UserError(f"{path} holds {found!r}, but a checkpoint of kind {kind!r} is needed here")
    return content


def pack_vae(vae):
    """The VAE as plain data, for a checkpoint."""
    return {"kind": "vae", "config": asdict(vae.config), "weights": vae.state_dict()}


def unpack_vae(content):
    """The VAE of `pack_vae`'s dict."""
    vae = VAE(VAEConfig(**{**content["config"], "multipliers": tuple(content["config"]["multipliers"])}))
    vae.load_state_dict({k: v.float() for k, v in content["weights"].items()})
    return vae.eval()


def grid(pictures, columns, gap=2):
    """One (H, W, 3) uint8 picture of many (M, h, w, 1 or 3), in rows, on grey."""
    M, h, w, _ = pictures.shape
    rows = -(-M // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 96, dtype=np.uint8)
    for k, picture in enumerate(pictures):
        y, x = gap + (k // columns) * (h + gap), gap + (k % columns) * (w + gap)
        sheet[y: y + h, x: x + w] = picture
    return sheet


@torch.no_grad()
def show_reconstructions(vae, pixels, path, columns=16):
    """Save originals above their reconstructions, enlarged; return the mean absolute error in grey levels (0-255)."""
    mean, _ = vae.encode(to_float(pixels))
    drawn = to_pixels(vae.decode(mean))
    sheet = grid(np.concatenate([pixels[:columns], drawn[:columns]]), columns)
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(path)
    return float(np.abs(drawn.astype(int) - pixels).mean())


def main(argv=None):
    """Train a VAE as the command line says; save it and a picture of its reconstructions."""
    parser = argparse.ArgumentParser(description="Train the VAE and show reconstructions.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", choices=("scenes", "mnist", "folder"), default="scenes", help="what to learn from")
    parser.add_argument("--data-dir", help="folder of MNIST idx files, or of pictures with captions.jsonl")
    parser.add_argument("--image-size", type=int, default=32, help="pixels per side (scenes, folder)")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of 32 pictures")
    parser.add_argument("--kl-weight", type=float, default=1e-6, help="weight of the KL term; App. C has 1e-6")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and noise")
    parser.add_argument("--out", default="out/vae", help="folder for vae.pt and reconstructions.png")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.image_size < 1 or not args.kl_weight >= 0:
        raise data.UserError("--steps and --image-size must be at least 1, --kl-weight 0 or more")
    if args.image_size % 4:
        raise data.UserError(f"--image-size must be divisible by 4, got {args.image_size}: the latents are 4 times smaller")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise data.UserError(f"{args.out} is a file: name another folder with --out")
    pairs = data.load_pairs(args.data, args.data_dir, args.image_size, n=20000, seed=args.seed)
    test = data.load_pairs(args.data, args.data_dir, args.image_size, split="test", n=256, seed=args.seed)
    began = time.time()
    vae = train_vae(pairs.pixels, VAEConfig(image_channels=pairs.pixels.shape[-1]), args.steps,
                    kl_weight=args.kl_weight, seed=args.seed)
    save(Path(args.out) / "vae.pt", pack_vae(vae))
    error = show_reconstructions(vae, test.pixels[:256], Path(args.out) / "reconstructions.png")
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {time.time() - began:.0f} s; mean error on unseen "
          f"pictures {error:.2f} of 255; wrote {args.out}/vae.pt and reconstructions.png")


if __name__ == "__main__":
    data.run_command(main)
