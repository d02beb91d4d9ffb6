"""
vae.py: pictures in a small space                             (Transfusion §2.3 "Latent Image Representation", App. C)

THE IDEA    Pixels are wasteful: most of them can be guessed from their neighbours. A convolutional network squeezes an
            h x w picture into a latent picture f times smaller on each side, a second one draws it back, and the
            transformer only ever sees the latents. Noise on the code (a variational autoencoder) keeps the space smooth,
            so that a slightly wrong latent still decodes to a sensible picture. Chameleon, the paper's rival, wants words
            instead: its VQ-VAE is the same network with a quantiser in the middle, which replaces each place's vector by
            the nearest of a few learnt ones, so that a picture becomes a grid of integers.
A PICTURE   (3, 32, 32) -> encoder -> mean, log-variance (4, 8, 8) -> sample z -> decoder -> (3, 32, 32)
                                               or: vector z -> nearest code, 0 .. codes-1 (8, 8) -> its vector -> decoder
            stage: [ResBlock] x blocks, then half the size; middle: ResBlock, attention, ResBlock
THE RULE    z = mean + deviation * noise;   KL( N(mean, var) || N(0, 1) ) = 1/2 sum (mean^2 + var - 1 - ln var)
            latents for the transformer: (z - shift) / scale, so that each has about zero mean and unit deviation
            VQ-VAE: code = argmin_k |e - c_k|, and in place of the KL  mean |sg(e) - c|^2 + 0.25 mean |e - sg(c)|^2
            (sg: no gradient; van den Oord et al. 2017, eq. 3). The rest of the loss: vae_losses.py.
SHAPES      pictures (M, c, h, w) float32 in [-1, 1]; latents (M, z, h/f, w/f) float32, f = 2 ** (number of stages - 1);
            codes (M, h/f, w/f) int64, 0 .. codes-1
PAPER/HERE  same: the network's plan; with `paper()` it has the paper's numbers (channel 128, multipliers 1 2 4 4, z = 8),
            and 83,709,419 parameters (the paper says 86M); the quantiser after a projection to z = 8, 16,384 codes.
            our choice: the scale of the latents (the paper is silent), sums over pixels divided by pictures; codes start
            at, and when idle for 100 steps move to, what the encoder says (else most of them are never used).
READ NEXT   vae_losses.py, train_vae.py, patchify.py        TRY IT  python vae.py, python train_vae.py
TEST        tests/test_vae.py
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support.common import UserError


BETA = 0.25                                             # Paper App. C: commitment
IDLE = 100                                              # our choice: steps without use after which a code moves elsewhere


@dataclass
class VAEConfig:
    """The numbers of the network. The defaults are the toy's: 32x32 pixels to 8x8x4 latents with 0.17M parameters."""
    image_channels: int = 3
    channels: int = 8                                   # width of the first stage
    multipliers: tuple = (1, 2, 4)                      # width of each stage, in units of `channels`
    blocks: int = 1                                     # residual blocks per stage (the decoder has one more)
    z: int = 4                                          # latent channels
    attention: bool = True                              # in the middle, at the smallest size
    codes: int = 0                                      # 0: a VAE; else a VQ-VAE with that many codes (App. C: 16,384)

    def __post_init__(self):
        if self.codes < 0 or self.codes == 1:
            raise UserError(f"a VQ-VAE needs at least 2 codes (0 means: a VAE, no codes), got {self.codes}")

    @property
    def f(self):
        """How many times smaller the latents are, per side."""
        return 2 ** (len(self.multipliers) - 1)


def paper(codes=0):
    """The VAEConfig of App. C: 256x256x3 to 32x32x8. codes: 16_384 for its VQ-VAE."""
    return VAEConfig(channels=128, multipliers=(1, 2, 4, 4), blocks=2, z=8, codes=codes)


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


class Quantiser(nn.Module):
    """(M, z, h, w) -> the same with each place's vector replaced by the nearest of `codes` learnt ones.
    Buffers: `idle`, steps since a code was last chosen; `uses`, how often, since someone set it to 0."""

    def __init__(self, codes, z):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codes, z))
        self.register_buffer("idle", torch.full((codes,), IDLE))        # so all are placed at the first training step
        self.register_buffer("uses", torch.zeros(codes, dtype=torch.long))

    @torch.no_grad()
    def nearest(self, vectors):
        """(n,) int64: the code nearest to each of (n, z) vectors. |e - c|^2 / 2 without |e|^2, which all codes share."""
        with torch.autocast(vectors.device.type, enabled=False):        # in bf16 near codes would tie
            return (self.codebook.square().sum(1) / 2 - vectors.float() @ self.codebook.T).argmin(1)

    @torch.no_grad()
    def revive(self, vectors, generator=None):
        """Put idle codes on vectors of this batch, drawn at random. Without it a code that starts far from every vector
        is never the nearest, so it never learns."""
        dead = (self.idle >= IDLE).nonzero().squeeze(1)
        drawn = torch.randint(len(vectors), (len(dead),), generator=generator).to(vectors.device)
        self.codebook[dead], self.idle[dead] = vectors[drawn].float(), 0

    def forward(self, e, generator=None):
        """(vectors (M, z, h, w) for the decoder, codes (M, h, w), codebook loss). van den Oord et al. 2017, eq. 3.
        generator: for reviving codes, in training."""
        M, z, h, w = e.shape
        vectors = e.permute(0, 2, 3, 1).reshape(-1, z)
        if self.training:
            self.revive(vectors, generator)
        codes = self.nearest(vectors)
        if self.training:
            uses = torch.bincount(codes, minlength=len(self.codebook))
            self.uses += uses
            self.idle.add_(1).masked_fill_(uses > 0, 0)
        chosen = self.codebook[codes]
        # TRAP: beta belongs to the term that moves the encoder; a much-copied implementation had it on the other one
        loss = (chosen - vectors.detach()).square().mean() + BETA * (vectors - chosen.detach()).square().mean()
        straight = vectors + (chosen - vectors).detach()    # straight-through: codes forward, the gradient to the vectors
        return straight.view(M, h, w, z).permute(0, 3, 1, 2), codes.view(M, h, w), loss


def codebook_use(uses):
    """(share of codes used, perplexity) of how often each was: (codes,) int. Perplexity: exp of the entropy, so that n
    codes used equally often give n."""
    p = uses.double() / uses.sum().clamp(min=1)
    return (uses > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()


class VAE(nn.Module):
    """Encoder and decoder; with config.codes a VQ-VAE. Buffers `shift`, `scale` (z,) normalise the latents; `reach`: the
    largest normalised latent seen on training pictures, by which samplers clip."""

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
        out = config.z if config.codes else 2 * config.z                # VQ-VAE: projected to z, else mean and log-variance
        down += [norm(c), nn.SiLU(), nn.Conv2d(c, 2 * config.z, 3, padding=1), nn.Conv2d(2 * config.z, out, 1)]
        up = [nn.Conv2d(config.z, config.z, 1), nn.Conv2d(config.z, c, 3, padding=1)] + middle(c, config.attention)
        for stage, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                up, c = up + [ResBlock(c, width)], width
            if stage > 0:
                up += [nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)]
        up += [norm(c), nn.SiLU(), nn.Conv2d(c, config.image_channels, 3, padding=1)]
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up)
        self.quantiser = Quantiser(config.codes, config.z) if config.codes else None
        self.register_buffer("shift", torch.zeros(config.z))
        self.register_buffer("scale", torch.ones(config.z))
        self.register_buffer("x0_max", torch.tensor(4.0))
        self.to(memory_format=torch.channels_last)      # a quarter faster on CPU

    @property
    def f(self):
        """How many times smaller the latents are, per side."""
        return self.config.f

    def squeeze(self, x):
        """The encoder's output. Raises ValueError for a shape that f does not divide."""
        M, c, h, w = x.shape
        if c != self.config.image_channels or h % self.f or w % self.f:
            raise ValueError(f"this VAE takes (M, {self.config.image_channels}, h, w) with h and w divisible by {self.f}, "
                             f"got {tuple(x.shape)}")
        return self.encoder(x)

    def moments(self, x):
        """Raw (mean, log-variance), each (M, z, h/f, w/f)."""
        if self.quantiser:
            raise ValueError("a VQ-VAE has no mean and variance: use encode_codes")
        mean, logvar = self.squeeze(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def forward(self, x, generator=None):
        """(drawn, prior): the picture drawn back from a random latent of q(z | x), or from its codes, not yet clamped; and
        the KL in nats per picture, or the codebook loss. generator: a CPU generator, so that every device sees one noise."""
        if self.quantiser:
            vectors, _, loss = self.quantiser(self.squeeze(x), generator)
            return self.decoder(vectors), loss
        mean, logvar = (part.float() for part in self.moments(x))
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator).to(x.device)
        return self.decoder(z), 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / len(x)

    def encode(self, x):
        """Normalised latents: (mean, deviation) of q(z | x), each (M, z, h/f, w/f)."""
        mean, logvar = self.moments(x)
        shift, scale = self.shift.view(1, -1, 1, 1), self.scale.view(1, -1, 1, 1)
        return (mean - shift) / scale, torch.exp(0.5 * logvar) / scale

    def decode(self, latents):
        """Pictures in [-1, 1] of normalised latents."""
        return self.decoder(latents * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)).clamp(-1, 1)

    def encode_codes(self, x):
        """(M, h/f, w/f) int64: a picture's words, in 0 .. codes-1. In raster order: `.flatten(1)`."""
        if not self.quantiser:
            raise ValueError("this is a VAE, without codes: use encode, or train one with VAEConfig(codes=...)")
        e = self.squeeze(x).permute(0, 2, 3, 1)
        return self.quantiser.nearest(e.reshape(-1, self.config.z)).view(e.shape[:3])

    def decode_codes(self, codes):
        """Pictures in [-1, 1] of codes (M, h/f, w/f)."""
        if codes.ndim != 3 or (len(codes) and not 0 <= codes.min() <= codes.max() < self.config.codes):
            raise ValueError(f"wanted codes (M, h, w) between 0 and {self.config.codes - 1}, got {tuple(codes.shape)}")
        return self.decoder(self.quantiser.codebook[codes].permute(0, 3, 1, 2)).clamp(-1, 1)

    def reconstruct(self, x):
        """Pictures in [-1, 1], drawn back as well as it can: from the mean latent, or from the codes."""
        return self.decode_codes(self.encode_codes(x)) if self.quantiser else self.decode(self.encode(x)[0])


def to_float(pixels):
    """(M, h, w, c) uint8 array -> (M, c, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(x):
    """(M, c, h, w) float in [-1, 1] -> (M, h, w, c) uint8 array."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def batches(vae, pixels, progress=False):
    """pixels (N, h, w, c) uint8 in order, as float batches on the VAE's device, each as large as 256 pictures of 32 x 32."""
    n = max(1, 2 ** 18 // (pixels.shape[1] * pixels.shape[2]))
    for k in tqdm(range(0, len(pixels), n), desc="encoding pictures", disable=not progress, leave=False):
        yield to_float(pixels[k: k + n]).to(vae.shift.device)


@torch.no_grad()
def encode_all(vae, pixels, progress=True):
    """Normalised (mean, deviation) of all pictures, each (N, z, h/f, w/f), computed once before training."""
    vae.eval()
    parts = [[part.cpu() for part in vae.encode(x)] for x in batches(vae, pixels, progress)]
    return torch.cat([m for m, _ in parts]), torch.cat([s for _, s in parts])


@torch.no_grad()
def encode_all_codes(vae, pixels, progress=True):
    """Codes of all pictures, (N, h/f, w/f) int64, computed once before a Chameleon is trained."""
    vae.eval()
    return torch.cat([vae.encode_codes(x).cpu() for x in batches(vae, pixels, progress)])


# ------------------------------------------------------------------------------------------------------------ checkpoints
if __name__ == "__main__":
    for shown in (VAEConfig(), VAEConfig(codes=512), paper(), paper(codes=16_384)):
        with torch.device("meta"):                      # shapes without memory: the paper's network costs nothing here
            network = VAE(shown)
        print(f"{'VQ-VAE' if shown.codes else 'VAE':7s}{sum(p.numel() for p in network.parameters()):11,} parameters; a picture "
              f"of 256 x 256 becomes {256 // network.f} x {256 // network.f} "
              + (f"words out of {shown.codes:,}" if shown.codes else f"vectors of {shown.z} numbers"))
