"""
model.py: one transformer, two heads, two losses, all sizes in one table         (Transfusion §3 "Model", eq. 4; Table 8)

THE IDEA    Words become vectors by a table, patches of noisy pictures become vectors by an encoder. They stand in one row and
            go through one plain Llama. Where a word comes next, a linear layer names it; where a patch stands, a decoder
            names the noise in it. Nothing inside the transformer knows which vector is which: all weights are shared.
A PICTURE      a   red  BOI [ p0 p1 p2 p3 ] EOI
               |    |    |    |  |  |  |     |        embedding table | patch encoder (told t)
             ================================         L blocks:  x + attention(norm(x));  x + swiglu(norm(x))
               |    |    .    |  |  |  |     |
              red  BOI       [ noise ... ]   EOS      word head | patch decoder
THE RULE    L = L_LM + lambda * L_DDPM,  lambda = 5                                                          eq. 4
              L_LM    mean over the predicted words of -ln p(word | everything before)                       eq. 1
              L_DDPM  mean over the pictures of mean (target - output)^2                                     eq. 3
SHAPES      B rows, T positions, D width, N heads, K = D / N head width, V vocabulary, M pictures, P patches per picture
PAPER/HERE  same: Llama (RMSNorm before each block, SwiGLU, RoPE, no biases, untied), sizes of Table 8, one t per picture.
            our choice: patches get RoPE positions in raster order, like every other position; with `patch_position` also
            a learned vector per place in the picture (README "What it took" says what it bought).
            our choice: positions count from the start of each document, so packing changes nothing.
READ NEXT   train.py, sample.py        TRY IT  python model.py        NOTEBOOK notebooks/3_train_a_tiny_one.ipynb
TEST        tests/test_model.py (leaks by perturbation; block = transformers' Llama; cached = uncached)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention_mask import BlockMask, attend, dense_mask, intervals, tile_mask
from diffusion import loss
from patchify import PATCHES

SIZES = {                                               # name: layers, width, heads
    "toy": (4, 128, 4), "small": (6, 128, 4),           # ours: minutes, and an hour, on two CPU cores
    "0.16b": (16, 768, 12), "0.37b": (24, 1024, 16), "0.76b": (24, 1536, 24), "1.4b": (24, 2048, 16), "7b": (32, 4096, 32)}
#                                                         Paper Table 8
PAPER_SIZES = tuple(size for size in SIZES if size.endswith("b"))
PAPER_VOCABULARY = 32000 + 7                            # Llama 2's pieces, and our special tokens (data.SPECIAL)
PAPER_LATENT = (8, 32, 32)                              # c, h, w of a picture of 256 x 256 (App. C)
PAPER_CODES = 16384                                     # of its VQ-VAE: a Chameleon's picture is 32 x 32 of these
# Paper §4.1: the U-Net adds 0.27B at every size. Its +106.1% for the 0.16B model does not fit that (0.27 / 0.16 = +169%), its
# +3.8% for the 7B does. We take the 0.27B.
TOY_UNET, PAPER_UNET = (64, 1), (640, 12)               # channels, blocks each way


@dataclass
class ModelConfig:
    """The numbers of the network."""
    vocabulary: int                                     # V, special tokens included
    layers: int = 4                                     # L
    width: int = 128                                    # D
    heads: int = 4                                      # N
    multiple: int = 256                                 # the feed-forward width is 8/3 D, rounded up to a multiple of this
    latent: tuple = (4, 8, 8)                           # c, h, w of one latent picture
    patch: int = 2                                      # p: side of a patch in latent pixels
    encoder: str = "linear"                             # "linear" or "unet" (§4.3.3)
    unet: tuple = TOY_UNET                              # channels and blocks of the latter
    patch_position: bool = False                        # add a learned vector per place in the picture
    context: int = 128                                  # T: the longest sequence
    bidirectional: bool = True                          # False: causal attention inside a picture too (Table 3)
    stable: bool = False                                # Chameleon's stability modifications (§4.1 "Baseline", Table 2)
    T: int = 1000                                       # diffusion steps

    def __post_init__(self):
        self.latent, self.unet = tuple(self.latent), tuple(self.unet)
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be divisible by 2 x heads (2 x {self.heads}): RoPE turns pairs")
        if self.latent[1] % self.patch or self.latent[2] % self.patch:
            raise ValueError(f"latents of {self.latent[1]}x{self.latent[2]} cannot be cut into {self.patch}x{self.patch} "
                             f"patches: choose a --patch that divides both sides")
        if self.patches + 2 > self.context:
            raise ValueError(f"a picture of {self.patches} patches, with BOI and EOI, does not fit in a context of "
                             f"{self.context}: raise --seq-len or --patch")

    @property
    def patches(self):
        """P: how many positions a picture takes."""
        return (self.latent[1] // self.patch) * (self.latent[2] // self.patch)


def rope_tables(pos, K, theta=10000.0):
    """(cos, sin), each (B, 1, T, K), of positions pos (B, T). Rotary embedding, Su et al. 2021, in Llama's layout:
    dimension i turns together with i + K/2, by the angle pos * theta^(-2i/K)."""
    angle = pos[:, None, :, None] * theta ** (-torch.arange(0, K, 2, device=pos.device) / K)         # (B, 1, T, K/2)
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def rotate(x, cos, sin):
    """x (B, N, T, K) turned by its position."""
    half = x.shape[-1] // 2
    return x * cos.to(x) + torch.cat([-x[..., half:], x[..., :half]], -1) * sin.to(x)


class Cache:
    """Keys and values of every layer, for S positions of B rows. A position may be overwritten: during diffusion the
    patches of x_{t-1} overwrite those of x_t, in place, as §3 "Inference" has it."""

    def __init__(self, config, B, S, like):
        shape = (config.layers, B, config.heads, S, config.width // config.heads)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)

    def write(self, layer, pos, k, v):
        """Put k, v (B, N, n, K) at positions pos (B, n); return all keys and values, each (B, N, S, K)."""
        row = torch.arange(len(pos), device=pos.device)[:, None]
        self.k[layer, row, :, pos], self.v[layer, row, :, pos] = k.transpose(1, 2), v.transpose(1, 2)
        return self.k[layer], self.v[layer]

    def rows(self, index):
        """A new cache with the chosen rows. index: list of int."""
        other = object.__new__(Cache)
        other.k, other.v = self.k[:, index].clone(), self.v[:, index].clone()
        return other


class Block(nn.Module):
    """One Llama layer. (B, T, D) -> (B, T, D). stable: Chameleon's: norms after the layers, not before, and of queries and keys."""

    def __init__(self, D, N, multiple=256, stable=False):
        super().__init__()
        hidden = multiple * math.ceil(8 * D / 3 / multiple)     # Llama: 8/3 of the width, rounded up to a multiple of 256
        self.N, self.stable = N, stable
        self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate_up, self.down = nn.Linear(D, 2 * hidden, bias=False), nn.Linear(hidden, D, bias=False)
        if stable:
            self.norm_q, self.norm_k = nn.LayerNorm(D // N), nn.LayerNorm(D // N)

    def forward(self, x, rope, mask, cache=None, layer=None, pos=None):
        if self.stable:
            x = x + self.norm1(self.attention(x, rope, mask, cache, layer, pos))
            return x + self.norm2(self.swiglu(x))
        x = x + self.attention(self.norm1(x), rope, mask, cache, layer, pos)
        return x + self.swiglu(self.norm2(x))

    def attention(self, x, rope, mask, cache, layer, pos):
        """(B, T, D) -> (B, T, D): who may look at whom is in the mask."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.N, D // self.N).permute(2, 0, 3, 1, 4)               # each (B, N, T, K)
        if self.stable:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = (kv[:, :, : mask.shape[-1]] for kv in cache.write(layer, pos, k, v))
        y = attend(q, k, v, mask)                                                                      # (B, N, T, K)
        return self.out(y.transpose(1, 2).reshape(B, T, D))

    def swiglu(self, x):
        """(B, T, D) -> (B, T, D)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Transfusion(nn.Module):
    """The whole model. See `forward` for training and `read`, `denoise` for decoding with a cache."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        body = dict(zip(("channels", "blocks"), config.unet)) if config.encoder == "unet" else {}
        self.patch_encoder = PATCHES[config.encoder](config.latent[0], config.patch, config.width, T=config.T, **body)
        self.place = nn.Parameter(torch.zeros(config.patches, config.width)) if config.patch_position else None
        self.blocks = nn.ModuleList([Block(config.width, config.heads, config.multiple, config.stable) for _ in range(config.layers)])
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.init_weights()

    def init_weights(self):
        """Our choice; the paper is silent. Words, places and patches enter the row about equally loud, and a layer keeps the
        size of what it reads: deviation 1/sqrt(D), which is Llama's 0.02 at D = 2500 and more in a toy. What adds to the
        residual stream is smaller by sqrt(2L), so that depth does not make it grow (stable blocks norm that away). The outputs
        start near zero, so that the losses start at those of knowing nothing: ln V for words, 1 for saying "no noise"."""
        std = self.config.width ** -0.5
        for block in self.blocks:                                       # the patch encoder keeps PyTorch's own start
            for layer in (block.qkv, block.gate_up):
                nn.init.normal_(layer.weight, std=std)
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=std / math.sqrt(2 * self.config.layers))
        nn.init.normal_(self.embedding.weight, std=0.5)
        if self.place is not None:
            nn.init.normal_(self.place, std=0.5)
        nn.init.normal_(self.patch_encoder.into.weight, std=self.patch_encoder.into.in_features ** -0.5)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.patch_encoder.out.weight)
        nn.init.zeros_(self.patch_encoder.out.bias)

    def encode_pictures(self, xt, t):
        """Vectors (M, P, D) of noisy latents xt (M, c, h, w) at t (M,), and what their decoding needs."""
        if xt.shape[1:] != self.config.latent or t.shape != xt.shape[:1]:
            raise ValueError(f"pictures must be (M, {', '.join(map(str, self.config.latent))}) with one t each, "
                             f"got {tuple(xt.shape)} and t {tuple(t.shape)}")
        vectors, kept = self.patch_encoder.encode(xt.to(self.patch_encoder.into.weight.dtype), t)
        return (vectors if self.place is None else vectors + self.place), kept

    def trunk(self, x, pos, mask, cache=None):
        """The transformer. x (B, n, D), pos (B, n) int64, mask (B, n, keys) bool or a BlockMask -> (B, n, D). With a
        cache, pos also says where the n new keys and values go, and the mask speaks of the cache's positions."""
        rope = rope_tables(pos, self.config.width // self.config.heads)
        mask = mask if isinstance(mask, BlockMask) else mask[:, None]                                  # for all N heads
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer, pos)
        return x

    def embed(self, tokens, image_id, xt, t):
        """(x (B, T, D), what the patch decoder needs): words by the table, patches by the encoder, in reading order.
        Raises ValueError if the patch positions in the rows are not M x P."""
        is_patch, (vectors, kept) = image_id >= 0, self.encode_pictures(xt, t)
        if int(is_patch.sum()) != len(xt) * self.config.patches:
            raise ValueError(f"the rows have {int(is_patch.sum())} patch positions, but {len(xt)} pictures of "
                             f"{self.config.patches} patches were given")
        x = self.embedding(tokens)
        return x.masked_scatter(is_patch[..., None], vectors.to(x).reshape(-1, self.config.width)), kept

    def forward(self, tokens, image_id, doc_id, has_loss, xt, t):
        """Training: (logits (n, V) at the n positions where `learn`, in reading order; output (M, c, h, w), the
        predicted noise or velocity). tokens, image_id, doc_id (B, T) int64, learn (B, T) bool; xt (M, c, h, w), t (M,).
        Raises ValueError as `embed`, and on a GPU in training mode as `tile_mask`: T > 128 must be a multiple of 128."""
        x, kept = self.embed(tokens, image_id, xt, t)                                                  # (B, T, D)
        lo, hi = intervals(image_id, doc_id, self.config.bidirectional)
        pos = torch.arange(tokens.shape[1], device=tokens.device) - lo                                 # within a document
        # One mask for all layers. Flex has no backward on CPU and takes multiples of 128 only, so measuring stays dense; and
        # so do the toys' short rows, where the whole mask is smaller than one of flex's tiles.
        flex = x.is_cuda and self.training and tokens.shape[1] > 128
        h = self.trunk(x, pos, tile_mask(lo, hi) if flex else dense_mask(lo, hi))
        out = self.patch_encoder.decode(h[image_id >= 0].view(-1, self.config.patches, self.config.width), t, kept)
        return self.head(self.norm(h[has_loss])), out

    # ------------------------------------------------------------------------------------------ decoding, with a cache
    def read(self, tokens, image_id, latents, pos, cache, t=0):
        """LM mode: append words, and perhaps finished pictures, to the cache. tokens, image_id, pos (B, n) int64,
        latents (M, c, h, w), clean: t = 0 -> logits (B, n, V). Positions count from the start of the document."""
        x, _ = self.embed(tokens, image_id, latents, torch.full((len(latents),), t, device=pos.device))
        _, last = intervals(image_id, torch.zeros_like(image_id), self.config.bidirectional)
        hi = pos.gather(1, last)                                        # from places in this call to places in the cache
        h = self.trunk(x, pos, dense_mask(torch.zeros_like(pos), hi, int(pos.max()) + 1), cache)
        return self.head(self.norm(h))

    def denoise(self, xt, t, pos, cache):
        """Diffusion mode: one forward of one picture per row against the cache. xt (B, c, h, w), t (B,), pos (B, P) ->
        output (B, c, h, w). The patches' keys and values go to pos, over those of the step before; calling it with the
        finished picture at t = 0 leaves the clean picture in the cache."""
        vectors, kept = self.encode_pictures(xt, t)
        hi = pos[:, -1:].expand_as(pos) if self.config.bidirectional else pos
        h = self.trunk(vectors, pos, dense_mask(torch.zeros_like(pos), hi, int(pos.max()) + 1), cache)
        return self.patch_encoder.decode(h, t, kept)


def losses(model, batch, diffusion, stable=False):
    """Both losses of a micro-batch, as sums and not as means, so that micro-batches and ranks can be added up before
    dividing (TRAP: a mean of means weighs words in short batches more).

    batch       data.Batch with latents, t and eps filled in
    diffusion   diffusion.Diffusion
    stable      add Chameleon's denominator loss to the first (§4.1 "Baseline")
    Returns (LM sum over words, number of words, per-picture losses (M,)). Transfusion eq. 1 and 3."""
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)         # noise first, patches after (§3)
    logits, out = model(batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, xt, batch.t)
    # eq. 1. `has_loss` is never set on a document's last token, so rolling past the end is never read.
    following = batch.tokens.roll(-1, 1)[batch.has_loss]                # (n,)
    lm = F.cross_entropy(logits.float(), following, reduction="sum")
    if stable:
        lm = lm + z_loss(logits)
    per_picture = loss(diffusion.target(batch.latents, batch.eps), out)     # eq. 3: (M,)
    return lm, int(batch.has_loss.sum()), per_picture


def z_loss(logits):
    """Chameleon's denominator loss, a sum over n words: 1e-5 (ln Z)^2, Z the sum that the softmax divides by. It keeps
    Z near 1, so that logits (n, V) cannot drift away together. Chameleon Team 2024; Transfusion §4.1 "Baseline"."""
    return 1e-5 * logits.float().logsumexp(-1).square().sum()


def transfusion_loss(lm, words, ddpm, pictures, lam=5.0):
    """eq. 4: L = L_LM + lambda * L_DDPM, a scalar. lm: LM loss summed over words (eq. 1); ddpm: diffusion loss summed over
    pictures (eq. 3). words, pictures: how many there are in the *whole* step, over all micro-batches and processes."""
    return lm / words + lam * ddpm / max(1, pictures)


def sized(size, **rest):
    """ModelConfig of a row of SIZES. Raises ValueError for an unknown name."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: choose from {', '.join(SIZES)}")
    layers, width, heads = SIZES[size]
    multiple = 128 if size == "toy" else 256            # Llama's 256 would make the smallest one half as wide again: slower
    return ModelConfig(layers=layers, width=width, heads=heads, multiple=multiple, unet=PAPER_UNET if size in PAPER_SIZES else TOY_UNET, **rest)


def count(module):
    """How many parameters."""
    return sum(p.numel() for p in module.parameters())


def paper_model(size, encoder="linear", patch=2, context=4096, codes=0, stable=False):
    """The Transfusion of a size of Table 8 with the paper's numbers, on the meta device: shapes, no memory, no time. A Chameleon
    has codes, and is stable."""
    shape = sized(size, vocabulary=PAPER_VOCABULARY + codes, stable=stable, latent=PAPER_LATENT, context=context, encoder=encoder, patch=patch)
    with torch.device("meta"):
        return Transfusion(shape)


if __name__ == "__main__":
    print("size     layers  width  heads      Llama part      + linear 2x2     + U-Net 2x2          4x4          8x8")
    for size in PAPER_SIZES:
        model, (channels, blocks) = paper_model(size), PAPER_UNET
        with torch.device("meta"):
            unets = [count(PATCHES["unet"](8, p, model.config.width, channels=channels, blocks=blocks)) for p in (2, 4, 8)]
        linear = count(model.patch_encoder)
        print(f"{size:8s} {model.config.layers:5d} {model.config.width:7d} {model.config.heads:6d} {count(model) - linear:16,d} "
              f"{linear:17,d} {unets[0]:15,d} {unets[1]:12,d} {unets[2]:12,d}")
    print(f"Words: {PAPER_VOCABULARY:,}, Llama 2's 32,000 and 7 of ours; with 32,000 the Llama part of 7b has 6,738,415,616.")
