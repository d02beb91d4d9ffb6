"""
patchify.py: a latent picture <-> a few vectors        (Transfusion §3 Fig. 3 "Latent Image Representation", §4.3.2-4.3.3)

THE IDEA    The transformer reads vectors in a row. Cut the noisy latent picture into squares of p x p, left to right, top
            to bottom, and make each a vector; afterwards make each vector a square again. Two ways to do it: one linear
            layer; or a small U-Net, whose convolutions already know that neighbouring pixels belong together.
A PICTURE   latent (c, 4, 4), p = 2          P = 4 vectors                              predicted noise (c, 4, 4)
              +---+---+
              | 0 | 1 |   encode      ->  [0] [1] [2] [3]  ->  transformer  ->  decode     ->  +---+---+
              +---+---+                    told t and xt                      told t (and,     | 0 | 1 |
              | 2 | 3 |                                                        U-Net, skips)   +---+---+
              +---+---+                                                                        | 2 | 3 |
THE RULE    linear   encode: Linear( patch + time(t) )              decode: Linear( RMSNorm(h) )                §3
            U-Net    encode: Down(xt, t) -> vectors, skips          decode: Up(vectors, t, skips)               §3, §4.1
SHAPES      M pictures, latents (M, c, h, w), patch side p, P = (h/p)(w/p) patches, vectors (M, P, D); t (M,) int64
PAPER/HERE  same: both encoders, the time added to the patch *before* the linear layer, U-Net blocks with self-attention
            inside and with plain LayerNorm where a diffusion U-Net has AdaLN; patch sides 1, 2, 4, 8.
            our choice: the numbers of the U-Net. 640 channels and twelve blocks each way, shared by the sizes that the patch
            side asks for (2x2: six and six; 8x8: three each), have the paper's 0.27B at every patch side and every width.
            our choice: skips, and time added inside each U-Net block (the paper is silent; LMFusion by overlapping
            authors writes Down(xt, t) and Up(h, t, h_in)).
READ NEXT   model.py        TRY IT  python patchify.py        TEST  tests/test_patchify.py
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def patchify(x, p):
    """(M, c, h, w) -> (M, P, c*p*p), in raster order. Raises ValueError if p does not divide h and w."""
    M, c, h, w = x.shape
    if h % p or w % p:
        raise ValueError(f"latents of {h}x{w} cannot be cut into {p}x{p} patches: {p} must divide both sides")
    return rearrange(x, "m c (h p) (w q) -> m (h w) (c p q)", p=p, q=p)


def unpatchify(patches, p, h):
    """(M, P, c*p*p) -> (M, c, h, w), the inverse of `patchify`; h: latent height."""
    return rearrange(patches, "m (h w) (c p q) -> m c (h p) (w q)", h=h // p, p=p, q=p)


class TimeEmbedding(nn.Module):
    """t (M,) int64 in 0..T -> (M, dim): sines and cosines of t at 64 frequencies, then two linear layers."""

    def __init__(self, dim, frequencies=64, T=1000):
        super().__init__()
        self.T, self.frequencies = T, frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, 256), nn.SiLU(), nn.Linear(256, dim))

    def forward(self, t):
        rate = torch.exp(-math.log(self.T * 10) * torch.arange(self.frequencies, device=t.device) / self.frequencies)
        angle = t.float()[:, None] * rate
        return self.mlp(torch.cat([angle.sin(), angle.cos()], -1).to(self.mlp[0].weight.dtype))


class LinearPatches(nn.Module):
    """One linear layer in, one out. c: latent channels, p: patch side, D: width of the transformer."""

    def __init__(self, c, p, D, T=1000):
        super().__init__()
        self.p = p
        self.time = TimeEmbedding(c * p * p, T=T)
        self.into = nn.Linear(c * p * p, D)
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.out = nn.Linear(D, c * p * p)

    def encode(self, xt, t):
        """(M, c, h, w), (M,) -> vectors (M, P, D), and what `decode` needs (here: the latent height)."""
        # Paper §3, footnote: "we add an embedding of the timestep t to every patch vector before the linear layer".
        return self.into(patchify(xt, self.p) + self.time(t)[:, None]), xt.shape[2]

    def decode(self, h, t, height):
        """Vectors (M, P, D) -> predicted noise (M, c, h, w)."""
        return unpatchify(self.out(self.norm(h)), self.p, height)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of (M, c, h, w)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class UNetBlock(nn.Module):
    """(M, c_in, h, w) -> (M, c, h, w): a residual block that is told the time, then, if asked, self-attention."""

    def __init__(self, c_in, c, time_dim, attention=False):
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(c_in), nn.Conv2d(c_in, c, 3, padding=1)
        self.time = nn.Linear(time_dim, c)
        self.norm2, self.conv2 = ChannelNorm(c), nn.Conv2d(c, c, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c, 1) if c_in != c else nn.Identity()
        self.attention = nn.MultiheadAttention(c, max(1, c // 64), batch_first=True) if attention else None
        self.norm3 = nn.LayerNorm(c) if attention else None

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        x = self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        if self.attention is not None:
            height = x.shape[2]
            seq = rearrange(x, "m c h w -> m (h w) c")
            y = self.norm3(seq)
            x = rearrange(seq + self.attention(y, y, y, need_weights=False)[0], "m (h w) c -> m c h w", h=height)
        return x


class UNetPatches(nn.Module):
    """U-Net down blocks in, up blocks out, halving the size log2(p) times. c: latent channels, p: patch side (a power
    of two), D: width of the transformer, channels: width of the U-Net, blocks: residual blocks on the way down, and again
    on the way up, shared evenly by the sizes, at least one each."""

    def __init__(self, c, p, D, T=1000, channels=64, blocks=1):
        super().__init__()
        levels = int(math.log2(p))
        if 2 ** levels != p:
            raise ValueError(f"the U-Net halves the size at each level, so the patch side must be a power of two, got {p}")
        blocks = max(1, blocks // (levels + 1))         # per size: more sizes do not make more parameters
        self.time = nn.Sequential(TimeEmbedding(channels, T=T), nn.SiLU())
        self.conv_in = nn.Conv2d(c, channels, 3, padding=1)
        block = lambda c_in, level: UNetBlock(c_in, channels, channels, attention=level == levels)
        self.down = nn.ModuleList([nn.ModuleList([block(channels, k) for _ in range(blocks)]) for k in range(levels + 1)])
        self.smaller = nn.ModuleList([nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(levels)])
        self.into, self.norm, self.back = nn.Linear(channels, D), nn.RMSNorm(D, eps=1e-5), nn.Linear(D, channels)
        self.up = nn.ModuleList([nn.ModuleList([block(2 * channels, k) for _ in range(blocks)]) for k in range(levels + 1)])
        self.larger = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(levels)])
        self.norm_out, self.out = ChannelNorm(channels), nn.Conv2d(channels, c, 3, padding=1)

    def encode(self, xt, t):
        """(M, c, h, w), (M,) -> vectors (M, P, D), and the skips that `decode` needs."""
        time, x, skips = self.time(t), self.conv_in(xt), []
        for level, blocks in enumerate(self.down):
            if level > 0:
                x = self.smaller[level - 1](x)
            for block in blocks:
                x = block(x, time)
                skips.append(x)
        return self.into(rearrange(x, "m c h w -> m (h w) c")), skips

    def decode(self, h, t, skips):
        """Vectors (M, P, D) and the skips of `encode` -> predicted noise (M, c, h, w)."""
        time, skips = self.time(t), list(skips)
        x = rearrange(self.back(self.norm(h)), "m (h w) c -> m c h w", h=skips[-1].shape[2])
        for level in reversed(range(len(self.up))):
            for block in self.up[level]:
                x = block(torch.cat([x, skips.pop()], 1), time)
            if level > 0:
                x = self.larger[level - 1](F.interpolate(x, scale_factor=2.0))
        return self.out(F.silu(self.norm_out(x)))


PATCHES = {"linear": LinearPatches, "unet": UNetPatches}


if __name__ == "__main__":
    x = torch.arange(16.0).view(1, 1, 4, 4)
    print("a latent of 4x4:\n", x[0, 0].int().numpy(), "\nits four 2x2 patches:\n", patchify(x, 2)[0].int().numpy())
    print("and back:", torch.equal(unpatchify(patchify(x, 2), 2, 4), x))
    for p in (1, 2, 4, 8):
        for name, kind in PATCHES.items():
            net, xt, t = kind(8, p, 512), torch.randn(1, 8, 32, 32), torch.tensor([500])
            h, kept = net.encode(xt, t)
            print(f"p = {p}  {name:6s} 32x32x8 -> {h.shape[1]:4d} vectors -> {tuple(net.decode(h, t, kept).shape[1:])}, "
                  f"{sum(w.numel() for w in net.parameters()):,} parameters")
