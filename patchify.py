"""
patchify.py: a latent picture <-> a few vectors      (Transfusion §3, Fig. 3; §4.3.2, §4.3.3)

THE IDEA    The transformer reads vectors in a row. Cut the noisy latent picture into squares of
            p x p, left to right, top to bottom, and make each a vector. Afterwards make each vector
            a square again. Two ways to do it: one linear layer; or a small U-Net, whose
            convolutions already know that neighbouring pixels belong together.
A PICTURE   linear: latent (c, 4, 4), p = 2, P = 4 vectors                predicted noise (c, 4, 4)
              +---+---+                                                         +---+---+
              | 0 | 1 |  encode                                         decode  | 0 | 1 |
              +---+---+  -----> [0] [1] [2] [3] -> transformer -> ...   ----->  +---+---+
              | 2 | 3 |    ^                                                    | 2 | 3 |
              +---+---+    t                                                    +---+---+

            U-Net: latent (c, 8, 8), p = 2, so two sizes; P = 16 vectors
                   xt (c, 8, 8)                                predicted noise (c, 8, 8)
                     | conv_in                                      ^ norm_out, out
              t -> down[0], 8 x 8  - - - - - - skips - - - - - ->  up[0], 8 x 8  <- t
                     | smaller[0]                                   ^ larger[0]
              t -> down[1], 4 x 4  - - - - - - skips - - - - - ->  up[1], 4 x 4  <- t
                     | into                                         ^ norm, back
                   16 vectors  ------->  transformer  ------->  16 vectors
THE RULE    linear   encode: Linear( patch + time(t) )        decode: Linear( RMSNorm(vector) )
            U-Net    encode: Down(xt, t) -> vectors, skips    decode: Up(vectors, t, skips)
TAKE IT     Copy this file: it needs no other of ours.
              net = LinearPatches(c, p, D)                  # or UNetPatches
              vectors, kept = net.encode(xt, t)
              out = net.decode(vectors, t, kept)
SHAPES      M pictures, latents (M, c, h, w), patch side p, P = (h/p)(w/p) patches, D width of the
            transformer, vectors (M, P, D); t (M,) int64. C channels of the U-Net.
PAPER/HERE  same: both encoders; the time added to the patch *before* the linear layer; U-Net blocks
            with self-attention inside, and with plain LayerNorm where a diffusion U-Net has AdaLN;
            patch sides 1, 2, 4, 8.
            our choice: the numbers of the U-Net. 640 channels and twelve blocks each way, spread
            evenly over log2(p) + 1 sizes: p = 2 has 2 sizes of 6 blocks, p = 8 has 4 of 3. They
            have the paper's 0.27B parameters at every patch side and every width.
            our choice: skips, and time inside each block. The paper does not say. LMFusion, by some
            of its authors, writes Down(xt, t) and Up(h, t, h_in).
READ NEXT   model.py
TRY IT      python patchify.py
NOTEBOOK    notebooks/3_a_picture_becomes_a_few_vectors.ipynb
TEST        tests/test_patchify.py
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


# --------------------------------------------------------------------- cutting and putting together
def patchify(x, p):
    """Squares of p x p, left to right, top to bottom: (M, c, h, w) -> (M, P, c*p*p).
    Raises ValueError if p does not divide h and w."""
    M, c, h, w = x.shape
    if h % p or w % p:
        raise ValueError(f"latents of {h}x{w} cannot be cut into {p}x{p} patches: "
                         f"{p} must divide both sides")
    # Paper: §3, "sequenced left-to-right top-to-bottom".
    return rearrange(x, "m c (row y) (col x) -> m (row col) (c y x)", y=p, x=p)


def unpatchify(patches, p, h):
    """The inverse of `patchify`: (M, P, c*p*p) -> (M, c, h, w).

    patches   (M, P, c*p*p)
    p         patch side
    h         height of the latent; its width follows from P"""
    rows = h // p
    return rearrange(patches, "m (row col) (c y x) -> m c (row y) (col x)", row=rows, y=p, x=p)


class TimeEmbedding(nn.Module):
    """t (M,) int64 in 0 .. T -> (M, dim): sines and cosines of t, then two linear layers.

    dim           how many numbers to make of t
    frequencies   how many sines, and as many cosines
    T             the largest t"""

    def __init__(self, dim, frequencies=64, T=1000):
        super().__init__()
        self.T = T
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(2 * frequencies, 256),
            nn.SiLU(),
            nn.Linear(256, dim),
        )

    def forward(self, t):
        # Waves with periods from 6 steps, which tell neighbours apart, up to 60 T, which tell the
        # beginning from the end.
        k = torch.arange(self.frequencies, device=t.device)             # (frequencies,)
        fall = math.log(self.T * 10)
        rate = torch.exp(-fall * k / self.frequencies)                  # from 1 to 1 / (10 T)
        angle = t.float()[:, None] * rate                               # (M, frequencies)
        sines = angle.sin()
        cosines = angle.cos()
        waves = torch.cat([sines, cosines], dim=-1)                     # (M, 2 * frequencies)
        # In bfloat16, 501 would be 500. So only the layers compute in the network's precision.
        precision = self.mlp[0].weight.dtype
        return self.mlp(waves.to(precision))                            # (M, dim)


# ----------------------------------------------------------------------------------- linear patches
class LinearPatches(nn.Module):
    """One linear layer in, one out. Another encoder has what this one has: the same arguments,
    `encode`, `decode`, and two layers that model.py starts by hand, `into` the transformer and
    `out` of it.

    c   channels of the latents
    p   patch side
    D   width of the transformer
    T   diffusion steps"""

    def __init__(self, c, p, D, T=1000):
        super().__init__()
        self.p = p
        numbers = c * p * p                             # of a patch
        self.time = TimeEmbedding(numbers, T=T)         # as many, so that they can be added
        self.into = nn.Linear(numbers, D)
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.out = nn.Linear(D, numbers)

    def encode(self, xt, t):
        """Noisy latents (M, c, h, w) at t (M,) -> (vectors (M, P, D), what is kept for `decode`:
        h, the height)."""
        # TRAP: the noise is in xt before it is cut. Noise on patches is another process.
        patches = patchify(xt, self.p)                                  # (M, P, c*p*p)
        # Paper: §3, footnote. "We add an embedding of the timestep t to every patch vector before
        # the linear layer."
        # TRAP: before the linear layer, not after it.
        time = self.time(t)                                             # (M, c*p*p)
        patches = patches + time[:, None]                               # (M, P, c*p*p)
        vectors = self.into(patches)                                    # (M, P, D)
        height = xt.shape[2]
        return vectors, height

    def decode(self, vectors, t, kept):
        """Vectors (M, P, D), and what `encode` kept -> what the network says, (M, c, h, w)."""
        # The vectors know the time already: all patches were told. t is for UNetPatches.decode.
        patches = self.out(self.norm(vectors))                          # (M, P, c*p*p)
        return unpatchify(patches, self.p, h=kept)                      # (M, c, h, w)


# ------------------------------------------------------------------------------------ U-Net patches
class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of (M, C, h, w)."""

    # Paper: §3, footnote. Plain layer norm in place of the U-Net's AdaLN.
    # Our choice: t is added between the convolutions. AdaLN let t scale what the norm gives, and a
    # plain norm has no place for it.

    def forward(self, x):
        pixels = x.permute(0, 2, 3, 1)                                  # (M, h, w, C)
        pixels = super().forward(pixels)                                # (M, h, w, C)
        return pixels.permute(0, 3, 1, 2)                               # (M, C, h, w)


class UNetBlock(nn.Module):
    """(M, c_in, h, w), time (M, time_dim) -> (M, C, h, w). A residual block that is told the time,
    then, if asked, self-attention among the pixels.

    c_in        channels in
    C           channels out
    time_dim    how many numbers the time has
    attention   whether there is self-attention"""

    def __init__(self, c_in, C, time_dim, attention=False):
        super().__init__()
        self.norm1 = ChannelNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, C, 3, padding=1)
        self.time = nn.Linear(time_dim, C)
        self.norm2 = ChannelNorm(C)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1)
        # Where the number of channels changes, x itself must change too before it can be added.
        self.shortcut = nn.Identity()
        if c_in != C:
            self.shortcut = nn.Conv2d(c_in, C, 1)
        self.attention = None
        self.norm3 = None
        if attention:
            heads = max(1, C // 64)                     # of about 64 channels each
            while C % heads:
                heads -= 1
            self.attention = nn.MultiheadAttention(C, heads, batch_first=True)
            self.norm3 = nn.LayerNorm(C)

    def forward(self, x, time):
        # 1. Two convolutions. The time enters between them: one number per channel, for all pixels.
        shift = self.time(time)                                         # (M, C)
        h = F.silu(self.norm1(x))                                       # (M, c_in, h, w)
        h = self.conv1(h)                                               # (M, C, h, w)
        h = h + shift[:, :, None, None]                                 # (M, C, h, w)
        h = F.silu(self.norm2(h))                                       # (M, C, h, w)
        h = self.conv2(h)                                               # (M, C, h, w)
        x = self.shortcut(x) + h                                        # (M, C, h, w)
        if self.attention is None:
            return x

        # 2. Every pixel looks at every pixel of its own picture.
        height = x.shape[2]
        pixels = rearrange(x, "m c h w -> m (h w) c")                   # (M, h*w, C)
        y = self.norm3(pixels)
        y, _ = self.attention(y, y, y, need_weights=False)              # (M, h*w, C)
        pixels = pixels + y
        return rearrange(pixels, "m (h w) c -> m c h w", h=height)      # (M, C, h, w)


class UNetPatches(nn.Module):
    """U-Net down blocks in, up blocks out. The way down halves the size log2(p) times, so that one
    pixel is left of each patch.

    c          channels of the latents
    p          patch side, a power of two
    D          width of the transformer
    T          diffusion steps
    channels   C, width of the U-Net
    blocks     residual blocks on the way down, and again on the way up. The sizes share them
               evenly, at least one each
    Raises ValueError if p is not a power of two."""

    def __init__(self, c, p, D, T=1000, channels=64, blocks=1):
        super().__init__()
        C = channels
        halvings = int(math.log2(p))
        if 2 ** halvings != p:
            raise ValueError(f"the U-Net halves the size at each level, so the patch side must be "
                             f"a power of two, got {p}")
        sizes = halvings + 1
        # Paper: §4.1, 0.27B "across all configurations". So more sizes must not mean more blocks.
        per_size = max(1, blocks // sizes)

        def blocks_of(k, c_in):
            """The blocks at size k: 0 is the full size. Only the smallest size has attention: it
            has few pixels, so there it is cheap."""
            is_smallest = k == halvings
            column = nn.ModuleList()
            for _ in range(per_size):
                column.append(UNetBlock(c_in, C, C, attention=is_smallest))
            return column

        embedding = TimeEmbedding(C, T=T)
        self.time = nn.Sequential(embedding, nn.SiLU())
        self.conv_in = nn.Conv2d(c, C, 3, padding=1)

        # The way down: down[0] at full size, down[1] at half of it, and so on.
        self.down = nn.ModuleList()
        for k in range(sizes):
            self.down.append(blocks_of(k, C))
        self.smaller = nn.ModuleList()
        for _ in range(halvings):
            self.smaller.append(nn.Conv2d(C, C, 3, stride=2, padding=1))

        # To the transformer and back.
        self.into = nn.Linear(C, D)
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.back = nn.Linear(D, C)

        # The way up: up[k] works at the size of down[k] and reads its skips, so twice the channels.
        self.up = nn.ModuleList()
        for k in range(sizes):
            self.up.append(blocks_of(k, 2 * C))
        self.larger = nn.ModuleList()
        for _ in range(halvings):
            self.larger.append(nn.Conv2d(C, C, 3, padding=1))
        self.norm_out = ChannelNorm(C)
        self.out = nn.Conv2d(C, c, 3, padding=1)

    def encode(self, xt, t):
        """Noisy latents (M, c, h, w) at t (M,) -> (vectors (M, P, D), what is kept for `decode`:
        the skips)."""
        time = self.time(t)                                             # (M, C)
        x = self.conv_in(xt)                                            # (M, C, h, w)
        skips = []
        for k, blocks in enumerate(self.down):
            if k > 0:
                x = self.smaller[k - 1](x)                              # half of each side
            for block in blocks:
                x = block(x, time)                                      # the time enters here
                skips.append(x)
        # Each side was halved log2(p) times, so one pixel is one patch.
        pixels = rearrange(x, "m c h w -> m (h w) c")                   # (M, P, C)
        return self.into(pixels), skips                                 # (M, P, D)

    def decode(self, vectors, t, kept):
        """Vectors (M, P, D), and what `encode` kept -> what the network says, (M, c, h, w)."""
        skips = list(kept)                                              # a copy: the caller's stays
        time = self.time(t)                                             # (M, C)
        pixels = self.back(self.norm(vectors))                          # (M, P, C)
        height = skips[-1].shape[2]                                     # h/p
        x = rearrange(pixels, "m (h w) c -> m c h w", h=height)         # (M, C, h/p, w/p)

        # Our choice: skips. Each up block also reads what the down block of the same size wrote, so
        # fine detail need not squeeze through the transformer. Last in, first out.
        for k in reversed(range(len(self.up))):
            for block in self.up[k]:
                skip = skips.pop()                                      # (M, C, ...)
                x = torch.cat([x, skip], dim=1)                         # (M, 2C, ...)
                x = block(x, time)                                      # the time enters here
            if k > 0:
                x = F.interpolate(x, scale_factor=2.0)                  # twice each side
                x = self.larger[k - 1](x)
        x = F.silu(self.norm_out(x))                                    # (M, C, h, w)
        return self.out(x)                                              # (M, c, h, w)


PATCHES = {"linear": LinearPatches, "unet": UNetPatches}


if __name__ == "__main__":
    x = torch.arange(16.0).view(1, 1, 4, 4)
    patches = patchify(x, 2)
    print("a latent of 4x4:\n", x[0, 0].int().numpy())
    print("its four 2x2 patches:\n", patches[0].int().numpy())
    back = unpatchify(patches, 2, h=4)
    print("and back:", torch.equal(back, x))

    xt = torch.randn(1, 8, 32, 32)                      # a picture of 256 x 256
    t = torch.tensor([500])
    for p in (1, 2, 4, 8):
        for name, kind in PATCHES.items():
            net = kind(8, p, 512)
            vectors, kept = net.encode(xt, t)
            out = net.decode(vectors, t, kept)
            P = vectors.shape[1]
            shape = tuple(out.shape[1:])
            size = sum(weight.numel() for weight in net.parameters())
            print(f"p = {p}  {name:6s} 32x32x8 -> {P:4d} vectors", end="")
            print(f" -> {shape}, {size:,} parameters")
