"""
model.py: one transformer, two heads, two losses, all sizes     (Transfusion §3, eq. 4; Table 8)

THE IDEA    Words become vectors by a table, patches of noisy pictures become vectors by an encoder.
            They stand in one row and go through one plain Llama. Where a word comes next, a linear
            layer names it. Where a patch stands, a decoder names the noise in it. Nothing inside
            the transformer knows which vector is which: all weights are shared.
A PICTURE      a   red  BOI [ p0 p1 p2 p3 ] EOI
               |    |    |    |  |  |  |     |      embedding table | patch encoder (told t)
             ================================       L blocks:  x + attention(norm(x))
               |    |    |    |  |  |  |     |                 x + swiglu(norm(x))
              red  BOI   .  [ noise ...  ]  EOS     word head | patch decoder
THE RULE    L = L_LM + lambda * L_DDPM,  lambda = 5                                          eq. 4
              L_LM    mean over the predicted words of -ln p(word | what is before)          eq. 1
              L_DDPM  mean over the pictures of mean (target - output)^2                     eq. 3
SHAPES      B rows, T positions, D width, N heads, K = D / N head width, V vocabulary,
            M pictures, P patches per picture, latents (M, c, h, w)
PAPER/HERE  same: Llama (RMSNorm before each block, SwiGLU, RoPE, no biases, untied embeddings), the
            sizes of Table 8, one t per picture.
            our choice: patches get RoPE positions in raster order, like every other position. With
            `patch_position` also a learned vector per place in the picture; docs/RESULTS.md "What
            it took" says what it bought.
            our choice: positions count from the start of each document, so packing changes nothing.
READ NEXT   train.py, sample.py
TRY IT      python model.py
NOTEBOOK    notebooks/0_one_sequence_one_forward.ipynb
TEST        tests/test_model.py (leaks by perturbation; block = transformers' Llama),
            tests/test_losses.py (both losses by hand)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention_mask import BlockMask, attend, dense_mask, intervals, tile_mask
from diffusion import loss as diffusion_loss
from patchify import PATCHES

# ------------------------------------------------------------------------------------------- sizes
SIZES = {                                   # name: (layers, width, heads)
    # Our choice: toys. mini and midi let experiments.py say what size does (Tables 5, 10, Fig. 5);
    # toy learns in minutes, small in an hour, on two CPU cores.
    "mini": (2, 64, 4),
    "midi": (3, 96, 4),
    "toy": (4, 128, 4),
    "small": (6, 128, 4),
    # Paper: Table 8.
    "0.16b": (16, 768, 12),
    "0.37b": (24, 1024, 16),
    "0.76b": (24, 1536, 24),
    "1.4b": (24, 2048, 16),
    "7b": (32, 4096, 32),
}
PAPER_SIZES = tuple(size for size in SIZES if size.endswith("b"))

PAPER_VOCABULARY = 32000 + 7                # Llama 2's pieces, and our data.SPECIAL
PAPER_LATENT = (8, 32, 32)                  # c, h, w of a picture of 256 x 256 (App. C)
PAPER_CODES = 16384                         # a Chameleon's picture is 32 x 32 of these (App. C)

# Channels, and residual blocks each way.
TOY_UNET = (64, 1)
# Paper: §4.1, the U-Net adds 0.27B parameters at every size. It is also said to add 106.1% to the
# 0.16B model and 3.8% to the 7B. The first does not fit (0.27 / 0.16 = 169%), the second does.
PAPER_UNET = (640, 12)

SHORT = 512                                 # up to here, rows have a dense mask on a GPU, too
WIDE = 1024                                 # from here on, a vocabulary is padded for the head


@dataclass
class ModelConfig:
    """The numbers of the network. Raises ValueError if they do not fit together."""
    vocabulary: int                         # V, special tokens included
    layers: int = 4                         # L
    width: int = 128                        # D
    heads: int = 4                          # N
    multiple: int = 256                     # the feed-forward width is a multiple of this
    latent: tuple = (4, 8, 8)               # c, h, w of one latent picture
    patch: int = 2                          # p: side of a patch in latent pixels
    encoder: str = "linear"                 # "linear" or "unet" (§4.3.3)
    unet: tuple = TOY_UNET                  # channels and blocks of the latter
    patch_position: bool = False            # add a learned vector per place in the picture
    context: int = 128                      # the longest row, in positions
    bidirectional: bool = True              # False: causal inside a picture too (Table 3)
    stable: bool = False                    # Chameleon's blocks (§4.1 "Baseline", Table 2)
    T: int = 1000                           # diffusion steps, as in diffusion.py: not positions

    def __post_init__(self):
        self.latent = tuple(self.latent)    # a checkpoint gives lists
        self.unet = tuple(self.unet)
        self.check_numbers()

    @property
    def patches(self):
        """P: how many positions a picture takes."""
        c, h, w = self.latent
        return (h // self.patch) * (w // self.patch)

    def check_numbers(self):
        """Raise ValueError for what would fail much later, inside a reshape."""
        c, h, w = self.latent
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be divisible by 2 x heads "
                             f"(2 x {self.heads}): RoPE turns pairs")
        if h % self.patch or w % self.patch:
            raise ValueError(f"latents of {h}x{w} cannot be cut into {self.patch}x{self.patch} "
                             f"patches: choose a --patch that divides both sides")
        if self.patches + 2 > self.context:
            raise ValueError(f"a picture of {self.patches} patches, with BOI and EOI, does not fit "
                             f"in a context of {self.context}: raise --seq-len or --patch")


# --------------------------------------------------------------------------------- one Llama block
def rope_tables(pos, K, theta=10000.0):
    """(cos, signed sin), each (B, 1, T, K), for positions pos (B, T): rotary embedding, Su et al.
    2021. What `rotate` wants.

    In Llama's layout: dimension i turns together with i + K/2, by the angle pos * theta^(-2i/K)."""
    two_i = torch.arange(0, K, 2, device=pos.device)                    # (K/2,)
    rate = theta ** (-two_i / K)                                        # (K/2,)
    angle = pos[:, None, :, None] * rate                                # (B, 1, T, K/2)
    cos = angle.cos()
    sin = angle.sin()
    # A turn takes the pair (a, b) to (a cos - b sin, b cos + a sin). The minus is put in here, once
    # for all layers.
    cos = torch.cat([cos, cos], dim=-1)                                 # (B, 1, T, K)
    signed_sin = torch.cat([-sin, sin], dim=-1)                         # (B, 1, T, K)
    return cos, signed_sin


def rotate(x, cos, sin):
    """x (B, N, T, K), each vector turned by its position. So q . k depends on how far q and k are
    apart, and not on where they are. cos, sin: (B, 1, T, K), from `rope_tables`."""
    half = x.shape[-1] // 2                                             # K/2
    partner = x.roll(half, dims=-1)                                     # b where a is, a where b is
    return x * cos.to(x) + partner * sin.to(x)


class Block(nn.Module):
    """One Llama layer, (B, T, D) -> (B, T, D).

    D          width
    N          heads
    multiple   the feed-forward width is a multiple of this
    stable     True: Chameleon's block, with a norm after each half (attention, feed-forward) in
               place of before it, and with norms of queries and keys"""

    def __init__(self, D, N, multiple=256, stable=False):
        super().__init__()
        # Llama: 8/3 of the width, because SwiGLU has three matrices where others have two. Rounded
        # up, because GPUs like multiples.
        hidden = multiple * math.ceil(8 * D / 3 / multiple)
        self.N = N
        self.stable = stable
        self.norm1 = nn.RMSNorm(D, eps=1e-5)
        self.norm2 = nn.RMSNorm(D, eps=1e-5)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)
        if stable:
            K = D // N
            self.norm_q = nn.LayerNorm(K)
            self.norm_k = nn.LayerNorm(K)

    def forward(self, x, rope, mask, cache=None, layer=None, slots=None):
        """x (B, T, D) -> (B, T, D).

        rope           (cos, sin) of `rope_tables`
        mask           (B, 1, T, keys) bool, or a BlockMask
        cache          Cache to write keys and values to, and to read all earlier ones from
        layer, slots   where in the cache: the number of this block, and (B, T) int64"""
        if self.stable:
            # Paper: §4.1 "Baseline", post-normalization: what each half *adds* has a fixed size.
            y = self.attention(x, rope, mask, cache, layer, slots)      # (B, T, D)
            x = x + self.norm1(y)
            return x + self.norm2(self.swiglu(x))                       # (B, T, D)

        # Paper: §4.1, "the standard settings from Llama": what each half *reads* has a fixed size.
        y = self.attention(self.norm1(x), rope, mask, cache, layer, slots)
        x = x + y                                                       # (B, T, D)
        return x + self.swiglu(self.norm2(x))                           # (B, T, D)

    def attention(self, x, rope, mask, cache, layer, slots):
        """(B, T, D) -> (B, T, D): who may look at whom is in the mask. Arguments as `forward`."""
        B, T, D = x.shape
        K = D // self.N
        qkv = self.qkv(x)                                               # (B, T, 3*D)
        qkv = qkv.view(B, T, 3, self.N, K)                              # (B, T, 3, N, K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # each (B, N, T, K)
        # Paper: §4.1 "Baseline", query-key normalization: the scores q . k cannot grow with the
        # weights, which makes a Chameleon's training unstable.
        if self.stable:
            q = self.norm_q(q)
            k = self.norm_k(k)
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        # Decoding: these T positions also look at all those before them.
        if cache is not None:
            k, v = cache.write(layer, slots, k, v)                      # each (B, N, S, K)
            keys = mask.shape[-1]                                       # how many slots are filled
            k = k[:, :, :keys]
            v = v[:, :, :keys]                                          # (B, N, keys, K)
        y = attend(q, k, v, mask)                                       # (B, N, T, K)
        y = y.transpose(1, 2)                                           # (B, T, N, K)
        y = y.reshape(B, T, D)                                          # the heads, side by side
        return self.out(y)                                              # (B, T, D)

    def swiglu(self, x):
        """(B, T, D) -> (B, T, D): each position by itself."""
        both = self.gate_up(x)                                          # (B, T, 2*hidden)
        gate, up = both.chunk(2, dim=-1)                                # each (B, T, hidden)
        h = F.silu(gate) * up                                           # (B, T, hidden)
        return self.down(h)                                             # (B, T, D)


class Cache:
    """Keys and values of every layer, in S slots for each of B rows, as tensors k and v of shape
    (layers, B, S, N, K). Position k of a document is in slot k.

    config   ModelConfig
    B, S     rows, and slots per row
    like     a tensor whose device and dtype they get"""

    # Paper: §3 "Inference", "x_{t-1}, which then overwrites x_t in the sequence". A slot may be
    # written again: so the patches of x_{t-1} take the slots of those of x_t.

    def __init__(self, config, B, S, like):
        K = config.width // config.heads
        shape = (config.layers, B, S, config.heads, K)      # a slot is in one piece of memory
        self.k = like.new_zeros(shape)
        self.v = like.new_zeros(shape)

    def write(self, layer, slots, k, v):
        """Put k, v (B, N, n, K) into slots (B, n) of a layer; return all keys and all values of the
        layer, each (B, N, S, K)."""
        row = torch.arange(len(slots), device=slots.device)             # (B,)
        row = row[:, None]                                              # (B, 1), beside (B, n)
        # Paper: §3, x_{t-1} takes the slots of x_t.
        self.k[layer, row, slots] = k.transpose(1, 2)                   # (B, n, N, K)
        self.v[layer, row, slots] = v.transpose(1, 2)                   # (B, n, N, K)
        keys = self.k[layer].transpose(1, 2)                            # (B, N, S, K)
        values = self.v[layer].transpose(1, 2)                          # (B, N, S, K)
        return keys, values

    def rows(self, index):
        """The chosen rows as a cache. index: a list of int copies them, and a row may come twice;
        a slice shares this cache's memory, so that what is written there is written here."""
        chosen = object.__new__(Cache)                                  # not `Cache(...)`: no zeros
        chosen.k = self.k[:, index]
        chosen.v = self.v[:, index]
        return chosen

    def overwrite(self, index, other):
        """Put all rows of the cache `other` in place of the chosen ones. index: list of int."""
        self.k[:, index] = other.k
        self.v[:, index] = other.v


class WordHead(nn.Linear):
    """The way out for words, (..., D) -> logits (..., V)."""

    def forward(self, x):
        """(..., D) -> (..., V)"""
        V = len(self.weight)
        if V < WIDE:
            return super().forward(x)
        # Our choice: rows of zeros make V a multiple of 128, which is what GPUs multiply fast; ours
        # is odd, 32,007. What these rows say is cut off again: it is never chosen, and no softmax
        # counts it. So the weights, and the files that hold them, are those without it.
        missing = -V % 128
        weight = F.pad(self.weight, (0, 0, 0, missing))                 # (multiple of 128, D)
        logits = F.linear(x, weight)                                    # (..., multiple of 128)
        return logits[..., :V]                                          # (..., V)


def patch_places(image_id, M, P):
    """(M*P,) int64: where the patches stand, counted through all rows.

    image_id   (B, T) int64, -1 for text
    M, P       how many pictures were given, of how many patches
    Raises ValueError if the rows have another number of them."""
    n = M * P
    is_patch = (image_id >= 0).flatten()                                # (B*T,)
    if is_patch.is_cuda:
        # To read a count from a GPU, Python waits for all that the GPU has to do. So the check runs
        # there, and stops the program later.
        torch._assert_async(is_patch.sum() == n, "the rows have other pictures than were given")
        return torch.nonzero_static(is_patch, size=n)[:, 0]
    places = is_patch.nonzero()[:, 0]
    if len(places) != n:
        raise ValueError(f"the rows have {len(places)} patch positions, but {M} pictures of {P} "
                         f"patches were given")
    return places


# --------------------------------------------------------------------------------- the whole model
class Transfusion(nn.Module):
    """The whole model: `forward` for training; `read` and `denoise` for decoding with a cache.
    config: ModelConfig."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.width

        # 1. The two ways in. (The patch encoder is also a way out.)
        self.embedding = nn.Embedding(config.vocabulary, D)
        unet = {}
        if config.encoder == "unet":
            unet = {"channels": config.unet[0], "blocks": config.unet[1]}
        make_encoder = PATCHES[config.encoder]
        c, _, _ = config.latent
        self.patch_encoder = make_encoder(c, config.patch, D, T=config.T, **unet)
        self.place = None
        if config.patch_position:
            self.place = nn.Parameter(torch.zeros(config.patches, D))

        # 2. The transformer.
        self.blocks = nn.ModuleList()
        for _ in range(config.layers):
            self.blocks.append(Block(D, config.heads, config.multiple, config.stable))

        # 3. The way out for words.
        # Paper: §4.1, "the standard settings from Llama". Llama's head has a matrix of its own: it
        # is not tied to the embedding table.
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.head = WordHead(D, config.vocabulary, bias=False)
        self.init_weights()

    def init_weights(self):
        """Draw the first weights."""
        # Our choice: all of it. The paper says only "we randomly initialize all model parameters".
        # The inside of the patch encoder keeps PyTorch's own start.
        config = self.config
        std = config.width ** -0.5
        # 1. A layer keeps the size of what it reads: 1/sqrt(D), which is Llama's 0.02 at D = 2500
        #    and more in a toy. What adds to the residual stream is smaller by sqrt(2L), so that
        #    depth does not make it grow. (Stable blocks norm that away.)
        smaller = std / math.sqrt(2 * config.layers)
        for block in self.blocks:
            nn.init.normal_(block.qkv.weight, std=std)
            nn.init.normal_(block.gate_up.weight, std=std)
            nn.init.normal_(block.out.weight, std=smaller)
            nn.init.normal_(block.down.weight, std=smaller)
        # 2. Words and patches enter the row with deviations of the same order: 0.5 for words and
        #    for places, about 1 for patches. Much smaller words are learned late: docs/RESULTS.md
        #    "What it took".
        nn.init.normal_(self.embedding.weight, std=0.5)
        if self.place is not None:
            nn.init.normal_(self.place, std=0.5)
        into = self.patch_encoder.into.weight           # (D, numbers), or a convolution's
        numbers = math.prod(into.shape[1:])             # how many each output reads
        nn.init.normal_(into, std=numbers ** -0.5)
        # 3. The outputs start near zero. So the losses start at those of knowing nothing: ln V for
        #    words, and for pictures the size of the target: 1 for eps, about 2 for flow's velocity.
        #    (With noise_skip eps is half known from the start: the mean of a^2, about 0.5.)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.patch_encoder.out.weight)
        nn.init.zeros_(self.patch_encoder.out.bias)

    # -------------------------------------------------------------------------- vectors in one row
    def encode_pictures(self, xt, t):
        """(vectors (M, P, D), what their decoding needs) of noisy latents.

        xt   (M, c, h, w)
        t    (M,) int64, the noise of each
        Raises ValueError for other shapes."""
        fits = xt.shape[1:] == self.config.latent
        # A single t would broadcast over all pictures without a word.
        one_t_each = t.shape == xt.shape[:1]
        if not (fits and one_t_each):
            shape = ", ".join(str(side) for side in self.config.latent)
            raise ValueError(f"pictures must be (M, {shape}) with one t each, "
                             f"got {tuple(xt.shape)} and t {tuple(t.shape)}")
        precision = self.patch_encoder.into.weight.dtype
        vectors, kept = self.patch_encoder.encode(xt.to(precision), t)  # (M, P, D)
        # Our choice: a vector per place, if asked for. RoPE tells how far two patches are apart in
        # the row; this tells which row and column of the picture they are in.
        if self.place is not None:
            vectors = vectors + self.place                              # (M, P, D)
        return vectors, kept

    def embed(self, tokens, image_id, xt, t):
        """(x (B, T, D), what the patch decoder needs): words by the table, patches by the encoder.

        tokens     (B, T) int64
        image_id   (B, T) int64, -1 for text; the patches of picture 0 come first, then those of 1
        xt         (M, c, h, w)
        t          (M,) int64
        Raises ValueError if the patch positions in the rows are not M x P."""
        vectors, kept = self.encode_pictures(xt, t)                     # (M, P, D)
        places = patch_places(image_id, len(xt), self.config.patches)   # (M*P,)
        x = self.embedding(tokens)                                      # (B, T, D)
        # TRAP: the first place gets the first vector, and so on. So pictures must be numbered in
        # the order of the rows, as data.to_batch numbers them.
        flat = vectors.to(x).reshape(-1, self.config.width)             # (M*P, D)
        rows = x.flatten(0, 1)                                          # (B*T, D)
        rows = rows.index_copy(0, places, flat)                         # (B*T, D)
        return rows.view_as(x), kept

    def rope_positions(self, pos, image_id):
        """Where RoPE sees the positions, (B, n) int64: at their number in the document.

        pos        (B, n) int64, counted from the start of each document
        image_id   (B, n) int64, which picture a position is a patch of, -1 for text"""
        # Our choice: patches stand one after another, in raster order, like words. So this gives
        # back pos. forks/rope_2d.diff puts them in two dimensions, here and in `rope_tables`.
        return pos

    def trunk(self, x, rope_pos, mask, cache=None, slots=None):
        """The transformer, (B, n, D) -> (B, n, D).

        x          (B, n, D)
        rope_pos   where RoPE sees each of the n: what `rope_positions` says
        mask       (B, n, keys) bool, or a BlockMask
        cache      Cache or None. With one, the mask speaks of the cache's slots, and
        slots      (B, n) int64 says where in the cache the n new keys and values go"""
        K = self.config.width // self.config.heads
        rope = rope_tables(rope_pos, K)                                 # each (B, 1, n, K)
        if not isinstance(mask, BlockMask):
            mask = mask[:, None]                                        # (B, 1, n, keys): all heads
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer, slots)               # (B, n, D)
        return x

    # ---------------------------------------------------------------------------------- training
    def forward(self, tokens, image_id, doc_id, has_loss, xt, t):
        """(logits (n, V), out (M, c, h, w)): logits at the n positions where `has_loss`, in reading
        order; out, the predicted noise, or velocity.

        tokens     (B, T) int64
        image_id   (B, T) int64, which picture a position is a patch of, -1 for text
        doc_id     (B, T) int64, which document
        has_loss   (B, T) bool
        xt         (M, c, h, w), noisy latents
        t          (M,) int64, their noise
        Raises ValueError as `embed` does; and as `tile_mask` does, when training on a GPU with
        T > 512 that is not a multiple of 128."""
        # 1. One row of vectors, words and patches.
        x, kept = self.embed(tokens, image_id, xt, t)                   # (B, T, D)

        # 2. Who may look at whom, made once for all layers.
        T = tokens.shape[1]
        lo, hi = intervals(image_id, doc_id, self.config.bidirectional)
        # Dense where FlexAttention cannot run or need not: on CPU it has no backward; rows that are
        # measured may be no multiple of 128; the mask of a toy's row of 512 is 0.25 MB.
        if x.is_cuda and self.training and T > SHORT:
            mask = tile_mask(lo, hi)
        else:
            mask = dense_mask(lo, hi)                                   # (B, T, T)

        # 3. The transformer.
        # Our choice: positions count from the start of the document. So a document gives the same
        # output wherever it stands in a row.
        pos = torch.arange(T, device=tokens.device) - lo                # (B, T)
        h = self.trunk(x, self.rope_positions(pos, image_id), mask)     # (B, T, D)

        # 4. The two heads. Logits only where a word is predicted: V is large, and half of the
        #    positions are patches.
        flat = h.flatten(0, 1)                                          # (B*T, D)
        places = patch_places(image_id, len(xt), self.config.patches)   # (M*P,)
        patches = flat.index_select(0, places)                          # (M*P, D)
        patches = patches.view(-1, self.config.patches, self.config.width)      # (M, P, D)
        out = self.patch_encoder.decode(patches, t, kept)               # (M, c, h, w)
        words = has_loss.flatten().nonzero()[:, 0]                      # (n,)
        predicting = flat.index_select(0, words)                        # (n, D)
        logits = self.head(self.norm(predicting))                       # (n, V)
        return logits, out

    # ------------------------------------------------------------------- decoding, with a cache
    def read(self, tokens, image_id, latents, pos, cache, t=0):
        """LM mode: append words, and perhaps finished pictures, to the cache. Returns logits
        (B, n, V).

        tokens     (B, n) int64
        image_id   (B, n) int64, -1 for text
        latents    (M, c, h, w), the finished pictures
        pos        (B, n) int64, counted from the start of the document; also the cache's slots
        cache      Cache
        t          their noise, an int"""
        # TRAP: a finished picture is clean. Read it at t = 0, not at a random t as in training.
        times = torch.full((len(latents),), t, device=pos.device)       # (M,)
        x, _ = self.embed(tokens, image_id, latents, times)             # (B, n, D)
        # `last`: which of these n tokens each may look up to, so of a patch its picture's last one.
        # `gather` turns that into a slot of the cache.
        one_document = torch.zeros_like(image_id)
        _, last = intervals(image_id, one_document, self.config.bidirectional)
        hi = pos.gather(1, last)                                        # (B, n)
        mask = self.mask_of_cache(pos, hi)                              # (B, n, keys)
        rope_pos = self.rope_positions(pos, image_id)
        h = self.trunk(x, rope_pos, mask, cache, pos)                   # (B, n, D)
        return self.head(self.norm(h))                                  # (B, n, V)

    def denoise(self, xt, t, pos, cache):
        """Diffusion mode: one forward of one picture per row against the cache. Returns the
        predicted noise, or velocity, (B, c, h, w).

        xt      (B, c, h, w), noisy latents
        t       (B,) int64, their noise
        pos     (B, P) int64, counted from the start of the document; also the cache's slots
        cache   Cache"""
        # Paper: §3 "Inference", "x_{t-1}, which then overwrites x_t". Keys and values go to pos,
        # over those of the step before.
        # TRAP: the last *noisy* step stays there, unless this is called once more with the finished
        # picture at t = 0.
        vectors, kept = self.encode_pictures(xt, t)                     # (B, P, D)
        hi = pos
        if self.config.bidirectional:
            hi = pos[:, -1:].expand_as(pos)                             # (B, P): the last patch
        mask = self.mask_of_cache(pos, hi)                              # (B, P, keys)
        one_picture = torch.zeros_like(pos)                             # (B, P): no other image_id
        rope_pos = self.rope_positions(pos, one_picture)
        h = self.trunk(vectors, rope_pos, mask, cache, pos)             # (B, P, D)
        return self.patch_encoder.decode(h, t, kept)                    # (B, c, h, w)

    def mask_of_cache(self, pos, hi):
        """(B, n, keys) bool: the n new positions look from the start of the cache, which holds one
        document per row, to hi (B, n). keys: as many slots as are filled."""
        lo = torch.zeros_like(pos)
        return dense_mask(lo, hi, keys=int(pos.max()) + 1)


# -------------------------------------------------------------------------------------- the losses
def losses(model, batch, diffusion, stable=False):
    """Both losses of a micro-batch: (LM sum, n_text, per_picture). Transfusion eq. 1 and eq. 3.

    model       Transfusion
    batch       data.Batch with latents, t and eps filled in
    diffusion   diffusion.Diffusion
    stable      add Chameleon's denominator loss to the first
    The LM sum is a scalar, over n_text predicted words; per_picture is (M,). A training step has
    counted its words before; whoever measures divides by n_text."""
    # TRAP: a mean of means gives the words of short batches more weight. So these are sums: micro-
    # batches and processes are added up first, and then `transfusion_loss` divides.

    # Paper: §3, the noise is added "before patchification". eq. 2.
    xt = diffusion.add_noise(batch.latents, batch.eps, batch.t)         # (M, c, h, w)
    # TRAP: the network is told the very t that made the noise.
    logits, out = model(batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, xt, batch.t)

    # eq. 1: position q predicts token q + 1. A document's last token never has a loss, so what the
    # roll brings round from the start of the row is not read.
    following = batch.tokens.roll(-1, dims=1)[batch.has_loss]           # (n_text,)
    lm_sum = F.cross_entropy(logits.float(), following, reduction="sum")
    if stable:
        lm_sum = lm_sum + z_loss(logits)

    # eq. 3.
    target = diffusion.target(batch.latents, batch.eps, batch.t)        # (M, c, h, w)
    predicted = diffusion.prediction(xt, out, batch.t)                  # (M, c, h, w)
    per_picture = diffusion_loss(target, predicted)                     # (M,)
    return lm_sum, len(following), per_picture


def z_loss(logits):
    """Chameleon's denominator loss, a sum over n words: 1e-5 (ln Z)^2, where Z is what the softmax
    divides by. logits: (n, V)."""
    # Paper: §4.1 "Baseline". The softmax does not see a number that is added to all logits, so they
    # could drift away together. This loss keeps Z near 1.
    # Our choice: 1e-5, as the Chameleon Team (2024) have it.
    log_z = logits.float().logsumexp(dim=-1)                            # (n,)
    return 1e-5 * log_z.square().sum()


def transfusion_loss(lm_sum, n_text, diff_sum, M, lam=5.0):
    """eq. 4: L = L_LM + lambda * L_DDPM, a scalar.

    lm_sum     LM loss summed over words (eq. 1)
    n_text     how many words
    diff_sum   diffusion loss summed over pictures (eq. 3)
    M          how many pictures
    lam        lambda"""
    # Paper: §3. "LM loss is computed per token, while diffusion loss is computed per image."
    # Paper: §4.1, lambda = 5.
    # TRAP: n_text and M count the *whole* step, all its micro-batches and all processes.
    M = max(1, M)                           # a step may have text alone, but never no word
    #      L_LM            + lambda * L_DDPM
    return lm_sum / n_text + lam * diff_sum / M


# ------------------------------------------------------------------------------------ making models
def sized(size, **rest):
    """ModelConfig of a row of SIZES. rest: its other fields.
    Raises ValueError for an unknown name."""
    if size not in SIZES:
        names = ", ".join(SIZES)
        raise ValueError(f"unknown size {size!r}: choose from {names}")
    layers, width, heads = SIZES[size]
    return ModelConfig(
        layers=layers,
        width=width,
        heads=heads,
        # Llama's 256 would make the toy's feed-forward layers a third wider, and slower.
        multiple=128 if size == "toy" else 256,
        unet=PAPER_UNET if size in PAPER_SIZES else TOY_UNET,
        **rest,
    )


def count(module):
    """How many parameters a module has."""
    return sum(weight.numel() for weight in module.parameters())


def paper_model(size, encoder="linear", patch=2, context=4096, codes=0, stable=False):
    """The Transfusion of a size of Table 8 with the paper's numbers, on the meta device: shapes
    only, so it takes no memory and no time.

    size      a name in PAPER_SIZES
    encoder   "linear" or "unet"
    patch     p
    context   T
    codes     how many more tokens a Chameleon has
    stable    whether the blocks are a Chameleon's"""
    config = sized(
        size,
        vocabulary=PAPER_VOCABULARY + codes,
        latent=PAPER_LATENT,
        patch=patch,
        encoder=encoder,
        context=context,
        stable=stable,
    )
    with torch.device("meta"):
        return Transfusion(config)


if __name__ == "__main__":
    print("size     layers  width  heads      Llama part      + linear 2x2     "
          "+ U-Net 2x2          4x4          8x8")
    channels, blocks = PAPER_UNET
    for size in PAPER_SIZES:
        layers, width, heads = SIZES[size]
        model = paper_model(size)
        linear = count(model.patch_encoder)
        llama = count(model) - linear
        print(f"{size:8s} {layers:5d} {width:7d} {heads:6d}", end=" ")
        print(f"{llama:16,d} {linear:17,d}", end="   ")
        for patch in (2, 4, 8):
            with torch.device("meta"):
                unet = PATCHES["unet"](8, patch, width, channels=channels, blocks=blocks)
            print(f"{count(unet):13,d}", end="")
        print()
    print(f"Words: {PAPER_VOCABULARY:,}, Llama 2's 32,000 and 7 of ours; "
          f"with 32,000 the Llama part of 7b has 6,738,415,616.")
