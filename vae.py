"""
vae.py: pictures in a small space           (Transfusion §2.3 "Latent Image Representation", App. C)

THE IDEA    Pixels are wasteful: most of them can be guessed from their neighbours. One
            convolutional network squeezes a picture into a latent picture, f times smaller on each
            side. A second one draws it back. The transformer only ever sees the latents.
            A VAE (variational autoencoder) adds noise to its latents. That keeps the space smooth,
            so a slightly wrong latent still decodes to a sensible picture.
            Chameleon, the paper's rival, wants words instead. Its VQ-VAE is the same network with a
            quantiser in the middle. It replaces each place's vector by the nearest of a few learned
            ones, its code. So a picture becomes a grid of integers.
A PICTURE   x (3, 32, 32) -> encoder -> mean, log-variance -> a drawn latent (4, 8, 8)
                                                                             -> decoder -> x'
            VQ-VAE:          encoder -> e (4, 8, 8) -> codes, integers (8, 8)
                                                    -> their vectors (4, 8, 8) -> decoder -> x'
            encoder: ResBlocks, half the size, and so on; then ResBlock, attention, ResBlock
THE RULE    VAE:     latent = mean + deviation * noise
                     KL( N(mean, var) || N(0, 1) ) = 1/2 sum (mean^2 + var - 1 - ln var)
                     for the transformer: (latent - shift) / scale, with unit deviation
            VQ-VAE:  code = argmin_k |e - codebook[k]|,    chosen = codebook[code]
                     mean (sg(e) - chosen)^2 + 0.25 mean (e - sg(chosen))^2 in place of the KL
                     (sg: no gradient flows through it; van den Oord et al. 2017, eq. 3)
            The rest of the loss, how near x' is to x, is in autoencoder/losses.py.
SHAPES      M pictures; f = 2 ** (number of stages - 1); z, how many channels latents have
            pictures x (M, c, h, w) float32 in [-1, 1]
            latents (M, z, h/f, w/f) float32; codes (M, h/f, w/f) int64, 0 .. codes-1
PAPER/HERE  same: the network's plan. `paper_config()` has the paper's numbers, and 83,709,419
            parameters (the paper says 86M). 16,384 codes, after a projection to z = 8 numbers.
            our choice: the scale of the latents; the KL of a picture is a sum over its latents.
            our choice: each code starts at an encoder output. After 100 steps without use it jumps
            to another one. Otherwise most codes are never chosen.
READ NEXT   autoencoder/losses.py, autoencoder/train.py, patchify.py        TRY IT  python vae.py
NOTEBOOK    notebooks/4_a_small_space.ipynb
TEST        tests/test_vae.py
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from support.common import UserError, end_with_the_reader

BETA = 0.25                                             # Paper: App. C, weight of commitment
IDLE = 100                                              # Our choice: a code unused so long jumps


@dataclass
class VAEConfig:
    """The numbers of the network. The defaults are the toy's: a picture of 32 x 32 pixels becomes
    latents of 8 x 8 x 4, with 0.17M parameters."""
    image_channels: int = 3
    channels: int = 8                                   # width of the first stage
    multipliers: tuple = (1, 2, 4)                      # width of each stage, in `channels`
    blocks: int = 1                                     # ResBlocks per stage; decoder: one more
    z: int = 4                                          # latent channels
    attention: bool = True                              # in the middle, at the smallest size
    codes: int = 0                                      # of a VQ-VAE; 0: it is a VAE

    def __post_init__(self):
        if self.codes < 0 or self.codes == 1:
            raise UserError(f"a VQ-VAE needs at least 2 codes (0 means: a VAE, no codes), "
                            f"got {self.codes}")

    @property
    def f(self):
        """How many times smaller the latents are, per side."""
        return 2 ** (len(self.multipliers) - 1)


def paper_config(codes=0):
    """The VAEConfig of App. C: 256 x 256 x 3 to 32 x 32 x 8. codes: 16_384 for its VQ-VAE."""
    return VAEConfig(channels=128, multipliers=(1, 2, 4, 4), blocks=2, z=8, codes=codes)


# ------------------------------------------------------------------------------------------- blocks
def norm(channels):
    """GroupNorm over up to 32 groups of at least 4 channels. channels: a multiple of 4."""
    # Not BatchNorm: the latents of a picture must not depend on its neighbours in the batch.
    groups = min(32, channels // 4)
    while channels % groups:                            # of 144 channels: 24 groups of 6
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """(M, c_in, h, w) -> (M, c_out, h, w): two convolutions beside a shortcut."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Identity()
        if c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                               # (M, c_out, h, w)
        h = self.conv2(F.silu(self.norm2(h)))                               # (M, c_out, h, w)
        return self.shortcut(x) + h


class Attention(nn.Module):
    """(M, c, h, w) -> the same: one head, in which every place looks at every place."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        M, c, h, w = x.shape
        qkv = self.qkv(self.norm(x))                                        # (M, 3*c, h, w)
        qkv = qkv.view(M, 3, c, h * w)                                      # (M, 3, c, h*w)
        qkv = qkv.transpose(2, 3)                                           # (M, 3, h*w, c)
        # The dimension of the one head stays: without it PyTorch takes its slow, unfused path.
        q, k, v = qkv.split(1, dim=1)                                       # each (M, 1, h*w, c)
        out = F.scaled_dot_product_attention(q, k, v)                       # (M, 1, h*w, c)
        out = out.transpose(2, 3)                                           # (M, 1, c, h*w)
        out = out.reshape(M, c, h, w)                                       # (M, c, h, w)
        return x + self.out(out)


def middle_blocks(c, attention):
    """Layers at the smallest size. A convolution sees 3 x 3 places; attention sees all of them."""
    layers = [ResBlock(c, c)]
    if attention:
        layers.append(Attention(c))
    layers.append(ResBlock(c, c))
    return layers


def build_encoder(config):
    """Pictures (M, c, h, w) -> what the encoder says of each place: mean and log-variance,
    (M, 2 z, h/f, w/f); or a VQ-VAE's vector e, (M, z, h/f, w/f)."""
    z = config.z
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    c = widths[0]
    layers = [nn.Conv2d(config.image_channels, c, 3, padding=1)]
    for stage, width in enumerate(widths):
        for _ in range(config.blocks):
            layers.append(ResBlock(c, width))
            c = width
        if stage < len(widths) - 1:                     # between stages: half the size
            layers.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
    layers += middle_blocks(c, config.attention)
    layers += [norm(c), nn.SiLU()]
    # The way out of Esser et al. 2021: down to 2 z channels, then a 1 x 1 that only mixes them.
    layers.append(nn.Conv2d(c, 2 * z, 3, padding=1))
    # Paper: App. C. The VQ-VAE projects to z numbers, then quantises. All else is as in the VAE.
    out = z if config.codes else 2 * z
    layers.append(nn.Conv2d(2 * z, out, 1))
    return nn.Sequential(*layers)


def build_decoder(config):
    """Raw latents (M, z, h/f, w/f) -> pictures (M, c, h, w): the encoder's plan, turned around."""
    z = config.z
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    c = widths[-1]
    layers = [nn.Conv2d(z, z, 1)]
    layers.append(nn.Conv2d(z, c, 3, padding=1))
    layers += middle_blocks(c, config.attention)
    for stage, width in reversed(list(enumerate(widths))):
        for _ in range(config.blocks + 1):              # one more: drawing is harder than reading
            layers.append(ResBlock(c, width))
            c = width
        if stage > 0:                                   # between stages: twice the size
            # First larger, then convolved: a transposed convolution would leave a checkerboard.
            layers.append(nn.Upsample(scale_factor=2))
            layers.append(nn.Conv2d(c, c, 3, padding=1))
    layers += [norm(c), nn.SiLU()]
    layers.append(nn.Conv2d(c, config.image_channels, 3, padding=1))
    return nn.Sequential(*layers)


# ---------------------------------------------------------------------------------------- quantiser
class Quantiser(nn.Module):
    """(M, z, h, w) -> the same, but each place has the nearest of `codes` learned vectors.

    codebook    (codes, z), the learned vectors
    idle        (codes,) steps since a code was last chosen
    uses        (codes,) how often a code was chosen, since someone last set it to 0
    """

    def __init__(self, codes, z):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codes, z))
        # All codes begin as idle, so the first training step places every one of them.
        self.register_buffer("idle", torch.full((codes,), IDLE))
        self.register_buffer("uses", torch.zeros(codes, dtype=torch.long))

    def forward(self, e, generator=None):
        """(vectors for the decoder (M, z, h, w), codes (M, h, w) int64, loss: a scalar).
        e: (M, z, h, w), the encoder's output. generator: for placing idle codes, in training.
        Straight-through is the line `straight = ...` below. van den Oord et al. 2017, eq. 3."""
        M, z, h, w = e.shape
        vectors = rearrange(e, "m z h w -> (m h w) z")                      # (M*h*w, z)
        # Bookkeeping that is ours, here and at the end: it keeps all codes in use.
        if self.training:
            self.revive(vectors, generator)

        codes = self.nearest(vectors)                                       # (M*h*w,)
        chosen = self.codebook[codes]                                       # (M*h*w, z)

        # Paper: App. C. The first term pulls each code to the vectors that chose it. The second,
        # the commitment, keeps the encoder near its codes. beta = 0.25.
        # TRAP: beta belongs to the term that moves the encoder. A much-copied implementation had
        # it on the other one.
        codebook_loss = (chosen - vectors.detach()).square().mean()
        commitment = (vectors - chosen.detach()).square().mean()
        loss = codebook_loss + BETA * commitment

        # Straight-through: argmin has no gradient. Forward, this line is `chosen`. Backward, it is
        # `vectors`: the decoder's gradient reaches the encoder as if nothing had been rounded.
        straight = vectors + (chosen - vectors).detach()                    # (M*h*w, z)

        if self.training:
            self.count(codes)
        straight = straight.view(M, h, w, z)
        straight = rearrange(straight, "m h w z -> m z h w")                # (M, z, h, w)
        return straight, codes.view(M, h, w), loss

    @torch.no_grad()
    def nearest(self, vectors):
        """(n,) int64: the code nearest to each of the vectors (n, z)."""
        # |e - code|^2 / 2 = |e|^2 / 2 - e.code + |code|^2 / 2. All codes share |e|^2, so it is left
        # out. This is one matrix product. The differences e - code themselves would be n x codes x
        # z numbers: half a GB for one picture of the paper's.
        with torch.autocast(vectors.device.type, enabled=False):            # bf16: near codes tie
            half_length = self.codebook.square().sum(1) / 2                 # (codes,)
            distance = half_length - vectors.float() @ self.codebook.T      # (n, codes)
            return distance.argmin(1)

    @torch.no_grad()
    def revive(self, vectors, generator=None):
        """Put idle codes on vectors of this batch, drawn at random. vectors: (n, z)."""
        # A code far from every vector is never the nearest, so no gradient ever moves it.
        dead = (self.idle >= IDLE).nonzero().squeeze(1)                     # their numbers
        size = (len(dead),)
        chosen = torch.randint(len(vectors), size, generator=generator)     # which vectors
        chosen = chosen.to(vectors.device)
        self.codebook[dead] = vectors[chosen].float()
        self.idle[dead] = 0

    @torch.no_grad()
    def count(self, codes):
        """Keep `uses` and `idle` up to date. codes: (n,) int64, those of one batch."""
        uses = torch.bincount(codes, minlength=len(self.codebook))
        self.uses += uses
        self.idle += 1
        self.idle[uses > 0] = 0


def codebook_use(uses):
    """(share of codes used, perplexity) of how often each code was used: (codes,) int. Perplexity
    is exp(entropy), so that n codes used equally often give n."""
    total = uses.sum().clamp(min=1)
    p = uses.double() / total
    share = (uses > 0).double().mean()
    entropy = torch.special.entr(p).sum()               # entr(0) = 0, where -p log p would be NaN
    return share.item(), entropy.exp().item()


# ---------------------------------------------------------------------------------------------- VAE
class VAE(nn.Module):
    """Encoder and decoder; with config.codes a VQ-VAE.

    shift, scale    (z,) normalise the latents
    x0_max          the largest normalised latent seen on training pictures; samplers clip by it
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config)
        self.quantiser = None
        if config.codes:
            self.quantiser = Quantiser(config.codes, config.z)
        # Measured after training (autoencoder.train.measure_latents); saved with the weights.
        self.register_buffer("shift", torch.zeros(config.z))
        self.register_buffer("scale", torch.ones(config.z))
        self.register_buffer("x0_max", torch.tensor(4.0))
        self.to(memory_format=torch.channels_last)      # a quarter faster on CPU

    @property
    def f(self):
        """How many times smaller the latents are, per side."""
        return self.config.f

    def forward(self, x, generator=None, draw=torch.randn):
        """(x', prior). x': x drawn back from a random latent, or from its codes, not clamped.
        prior: the KL in nats per picture, or the codebook loss.
        generator: a CPU generator, so that every device sees the same noise.
        draw: function (shape, generator=) -> that noise."""
        if self.quantiser:
            e = self.run_encoder(x)                                         # (M, z, h/f, w/f)
            vectors, _, codebook_loss = self.quantiser(e, generator)
            return self.decoder(vectors), codebook_loss

        mean, logvar = self.moments(x)                                      # each (M, z, h/f, w/f)
        mean = mean.float()                             # bf16 is too coarse for the KL's exp()
        logvar = logvar.float()
        deviation = torch.exp(0.5 * logvar)
        noise = draw(mean.shape, generator=generator)
        latents = mean + deviation * noise.to(x.device)                     # (M, z, h/f, w/f)

        # Our choice: summed over a picture's latents, averaged over pictures; so it is in nats.
        each = mean.square() + logvar.exp() - 1 - logvar                    # (M, z, h/f, w/f)
        kl = 0.5 * each.sum() / max(1, len(x))          # of no pictures: 0
        return self.decoder(latents), kl

    def run_encoder(self, x):
        """The encoder's output. Raises ValueError for a shape that f does not divide."""
        M, c, h, w = x.shape
        channels = self.config.image_channels
        if c != channels or h % self.f or w % self.f:
            raise ValueError(f"this VAE takes (M, {channels}, h, w) with h and w divisible by "
                             f"{self.f}, got {tuple(x.shape)}")
        return self.encoder(x)

    def moments(self, x):
        """Raw (mean, log-variance), each (M, z, h/f, w/f)."""
        if self.quantiser:
            raise ValueError("a VQ-VAE has no mean and variance: use encode_codes")
        both = self.run_encoder(x)                                          # (M, 2 z, h/f, w/f)
        mean, logvar = both.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)              # a wild first step must not overflow exp()

    # ----------------------------------------------------- latents, what Transfusion learns to draw
    def encode(self, x):
        """Normalised latents: (mean, deviation) of q(latent | x), each (M, z, h/f, w/f)."""
        mean, logvar = self.moments(x)
        shift = self.shift[:, None, None]                                   # (z, 1, 1)
        scale = self.scale[:, None, None]
        mean = (mean - shift) / scale
        deviation = torch.exp(0.5 * logvar) / scale     # a width, not a place: no shift
        return mean, deviation

    def decode(self, latents):
        """Pictures (M, c, h, w) in [-1, 1] of normalised latents (M, z, h/f, w/f)."""
        shift = self.shift[:, None, None]                                   # (z, 1, 1)
        scale = self.scale[:, None, None]
        x = self.decoder(latents * scale + shift)                           # (M, c, h, w)
        return x.clamp(-1, 1)

    # -------------------------------------------------------- codes, what Chameleon learns to write
    def encode_codes(self, x):
        """(M, h/f, w/f) int64 in 0 .. codes-1: a picture's words; `.flatten(1)` is raster order."""
        if not self.quantiser:
            raise ValueError("this is a VAE, without codes: use encode, or train one with "
                             "VAEConfig(codes=...)")
        e = self.run_encoder(x)                                             # (M, z, h/f, w/f)
        M, z, h, w = e.shape
        vectors = rearrange(e, "m z h w -> (m h w) z")                      # (M*h*w, z)
        codes = self.quantiser.nearest(vectors)                             # (M*h*w,)
        return codes.view(M, h, w)

    def decode_codes(self, codes):
        """Pictures (M, c, h, w) in [-1, 1] of codes (M, h/f, w/f)."""
        last = self.config.codes - 1
        unknown = (codes < 0) | (codes > last)          # indexing would take -1 for the last code
        if codes.ndim != 3 or unknown.any():
            raise ValueError(f"wanted codes (M, h, w) between 0 and {last}, "
                             f"got {tuple(codes.shape)}")
        vectors = self.quantiser.codebook[codes]                            # (M, h/f, w/f, z)
        vectors = rearrange(vectors, "m h w z -> m z h w")
        return self.decoder(vectors).clamp(-1, 1)                           # (M, c, h, w)

    def reconstruct(self, x):
        """Pictures in [-1, 1], drawn back as well as it can: from mean latents, or from codes."""
        if self.quantiser:
            return self.decode_codes(self.encode_codes(x))
        mean, _ = self.encode(x)
        return self.decode(mean)


# -------------------------------------------------------------------------- pictures there and back
def to_float(pixels):
    """(M, h, w, c) uint8 array -> (M, c, h, w) float32 in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(pixels))                      # (M, h, w, c)
    x = x.permute(0, 3, 1, 2).float()                                       # (M, c, h, w)
    return x / 127.5 - 1


def to_pixels(x):
    """(M, c, h, w) float in [-1, 1] -> (M, h, w, c) uint8 array."""
    levels = (x.clamp(-1, 1) + 1) * 127.5
    levels = levels.round().byte()                      # .byte() alone cuts off: always darker
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def batches(vae, pixels, progress=False):
    """Yields pixels (N, h, w, c) uint8, in order, as float (n, c, h, w) on the VAE's device."""
    N, h, w, c = pixels.shape
    # So many fit in memory: 256 of 32 x 32. On a CPU 64, which its caches hold: a fifth faster.
    on_cpu = vae.shift.device.type == "cpu"
    most = 2 ** 16 if on_cpu else 2 ** 18               # pixels at once
    n = max(1, most // (h * w))
    starts = range(0, max(1, N), n)                     # no pictures: one batch of none
    for k in tqdm(starts, desc="encoding pictures", disable=not progress, leave=False):
        x = to_float(pixels[k: k + n])
        yield x.to(vae.shift.device)


@torch.no_grad()
def encode_all(vae, pixels, progress=True):
    """Normalised (mean, deviation) of all pictures, each (N, z, h/f, w/f)."""
    # Once, before the transformer's training: the VAE is frozen by then.
    vae.eval()
    means = []
    deviations = []
    for x in batches(vae, pixels, progress):
        mean, deviation = vae.encode(x)
        means.append(mean.cpu())
        deviations.append(deviation.cpu())
    return torch.cat(means), torch.cat(deviations)


@torch.no_grad()
def encode_all_codes(vae, pixels, progress=True):
    """Codes of all pictures, (N, h/f, w/f) int64, computed once before a Chameleon is trained."""
    vae.eval()
    codes = []
    for x in batches(vae, pixels, progress):
        codes.append(vae.encode_codes(x).cpu())
    return torch.cat(codes)


# ------------------------------------------------------------------------------------ python vae.py
def describe(config):
    """One line on the network of a configuration, without the memory that it would take."""
    with torch.device("meta"):
        network = VAE(config)
    parameters = sum(weight.numel() for weight in network.parameters())
    kind = "VQ-VAE" if config.codes else "VAE"
    side = 256 // config.f
    if config.codes:
        small = f"{side} x {side} words out of {config.codes:,}"
    else:
        fewer = 3 * config.f ** 2 // config.z
        small = f"{side} x {side} x {config.z} numbers, {fewer} times fewer"
    return f"{kind:6s} {parameters:11,} parameters: 256 x 256 x 3 becomes {small}"


def show_quantising():
    """Quantise three vectors with a codebook of four, and print what happens to them."""
    quantiser = Quantiser(4, 2).eval()
    corners = [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    quantiser.codebook.data = torch.tensor(corners)
    vectors = torch.tensor([[0.1, 0.2], [0.9, 0.8], [0.2, 1.1]])
    e = rearrange(vectors, "w z -> 1 z 1 w").requires_grad_()
    straight, codes, loss = quantiser(e)
    straight.sum().backward()
    print("\nfour codes at the corners of a square; each vector goes to the nearest one:")
    for (a, b), code in zip(vectors, codes.flatten(), strict=True):
        x, y = quantiser.codebook[code]
        print(f"  ({a:.1f}, {b:.1f}) -> code {code} = ({x:.0f}, {y:.0f})")
    print(f"codebook loss + {BETA} commitment = {loss:.4f}")
    gradient = e.grad.unique().tolist()
    print(f"straight-through: d sum / d e = {gradient}, as if nothing had been rounded")


if __name__ == "__main__":
    end_with_the_reader()
    print(describe(VAEConfig()))
    print(describe(VAEConfig(codes=512)))
    print(describe(paper_config()))
    print(describe(paper_config(codes=16_384)))
    show_quantising()
