"""
attention_mask.py: who may look at whom                        (Transfusion §3 "Transfusion Attention", Fig. 4; Table 3)

THE IDEA    Words are read in order, so a word may look only at what came before it. A picture has no order, so its patches
            may all look at each other, and at what came before the picture. Everything after it may look at the picture.
A PICTURE   two words, a picture of three patches, a word         (row = who looks, column = at whom)

                       a  red BOI p0 p1 p2 EOI .
                  a    #
                  red  #  #
                  BOI  #  #   #
                  p0   #  #   #  #  O  O               O = allowed only because they are patches of the same picture;
                  p1   #  #   #  #  #  O                   a plain causal mask has a blank there
                  p2   #  #   #  #  #  #
                  EOI  #  #   #  #  #  #   #
                  .    #  #   #  #  #  #   #  #
THE RULE    look(q, k) = same document AND ( k <= q  OR  same picture )                              the OR form
            Patches of a picture are neighbours in the row, so what q may look at has no holes:
            look(q, k) = lo[q] <= k <= hi[q]                                                         the interval form
              lo[q] = the first position of q's document
              hi[q] = the last position of q's picture if q is a patch, else q
            The two are equal (tests/test_attention_mask.py tries random layouts). The OR form explains; the interval form
            is what runs: two numbers per position, the same code for training and for decoding with a cache.
TWO FORMS   dense_mask: a bool per pair (q, k), for PyTorch's ordinary attention. On CPU, and for decoding.
            tile_mask: for FlexAttention, CUDA training's fused kernel. The row of T is cut into tiles of 128 x 128 pairs:
              . nothing to look at: skipped      # all of it: no mask is computed      o in between: lo <= k <= hi is asked

                       o . . .        about half of the tiles of a causal row are skipped; packing skips more;
                       # o . .        a picture that ends in the next tile turns one "." into an "o"
                       # # o o
                       # # # o
            Both are made of the same (lo, hi), and tests/test_attention_mask.py holds one against the other.
SHAPES      B rows, T positions. image_id (B, T) int64: which picture a position is a patch of, -1 for text.
            doc_id (B, T) int64: which document. A mask is (B, T, T) bool, True = may look; it needs no batch of heads.
PAPER/HERE  same: causal everywhere, bidirectional within one picture (`bidirectional=False` is the ablation of Table 3).
            our choice: BOI and EOI are text, so causal; documents packed in one row do not see each other.
            our choice: FlexAttention. The dense mask at T = 4096 is 16 MiB per row and its attention skips nothing.
READ NEXT   diffusion.py        TRY IT  python attention_mask.py        NOTEBOOK notebooks/1_who_may_look_at_whom.ipynb
TEST        tests/test_attention_mask.py
"""
import functools

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

TILE = 128                                              # side of FlexAttention's tiles, its own default


def or_mask(image_id, doc_id, bidirectional=True):
    """(B, T, T) bool, the mask in the words of the paper. Slow to build and large: for teaching and for tests.
    image_id, doc_id: (B, T) int64. Raises ValueError if their shapes differ."""
    B, T = check(image_id, doc_id)
    pos = torch.arange(T, device=image_id.device)
    causal = pos[None, :, None] >= pos[None, None, :]                                        # (1, T, T)
    # TRAP: "both are patches" would let picture 2's patches leak into picture 1; and -1 == -1 would make all text
    # bidirectional, so the id must be compared AND be a picture's.
    same_picture = (image_id[:, :, None] == image_id[:, None, :]) & (image_id >= 0)[:, :, None]
    same_document = doc_id[:, :, None] == doc_id[:, None, :]
    return same_document & (causal | same_picture) if bidirectional else same_document & causal.expand(B, T, T)


def intervals(image_id, doc_id, bidirectional=True):
    """(lo, hi), each (B, T) int64: position q may look at lo[q]..hi[q], both included. lo[q] <= q <= hi[q] always, so
    no row of the mask is empty (an empty row is a softmax over nothing: NaN).
    image_id, doc_id: (B, T) int64; the patches of a picture must be neighbours. Raises ValueError if shapes differ."""
    B, T = check(image_id, doc_id)
    pos = torch.arange(T, device=image_id.device).expand(B, T)
    new = torch.ones_like(doc_id, dtype=torch.bool)
    new[:, 1:] = doc_id[:, 1:] != doc_id[:, :-1]
    lo = torch.where(new, pos, 0).cummax(dim=1).values                  # the latest start of a document so far
    if not bidirectional:
        return lo, pos.clone()
    last = torch.ones_like(new)                                         # q is the last patch of its picture
    last[:, :-1] = (image_id[:, 1:] != image_id[:, :-1]) | new[:, 1:]
    end = torch.where(last, pos, T).flip(1).cummin(dim=1).values.flip(1)                     # the next such q
    return lo, torch.where(image_id >= 0, end, pos)


def dense_mask(lo, hi, keys=None):
    """(B, T, keys) bool: the interval form spelled out. lo, hi: (B, T) int64; keys: how many, T by default."""
    k = torch.arange(keys or lo.shape[1], device=lo.device)
    return (lo[..., None] <= k) & (k <= hi[..., None])


def tile_mask(lo, hi):
    """BlockMask of shape (B, any heads, T, T): the interval form for FlexAttention. Make it once per micro-batch, for all
    layers. lo, hi: (B, T) int64. Raises ValueError unless T is a multiple of 128.
    Tile (i, j) is skipped if no q in it has an interval that meets the tile's keys, and full if every q's covers them.
    This needs (B, T, T/128) comparisons; FlexAttention's own create_block_mask, which knows no intervals, makes all T * T."""
    B, T = lo.shape
    if T % TILE:                                        # TRAP: the kernel's tiles would reach beyond the row (PAPER.md §4.13)
        raise ValueError(f"rows of {T} positions cannot be cut into FlexAttention's tiles of {TILE}: training on a GPU "
                         f"needs a multiple of {TILE}, for example --seq-len {-(-T // TILE) * TILE}")
    first = torch.arange(0, T, TILE, device=lo.device)                                       # (T/128,) keys, of each column
    last = first + TILE - 1
    low, high = (x.view(B, T // TILE, TILE, 1) for x in (lo, hi))
    some = ((low <= last) & (first <= high)).any(2)                                          # (B, T/128, T/128)
    full = ((low <= first) & (last <= high)).all(2)
    lo, hi = lo.int(), hi.int()

    def look(b, head, q, k):
        # TRAP: what this function closes over must be tensors of one shape. A number that changes with the layout, such
        # as how many pictures there are, would compile the kernel anew for every batch.
        return (lo[b, q] <= k) & (k <= hi[b, q])

    return BlockMask.from_kv_blocks(*in_order(some & ~full), *in_order(full), BLOCK_SIZE=TILE, mask_mod=look)


def in_order(tiles):
    """(how many (B, 1, rows), which columns first (B, 1, rows, columns)), int32, of chosen tiles (B, rows, columns) bool."""
    columns = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None]


@functools.cache                                        # torch.compile itself costs seconds, so not before it is needed
def fused_kernel():
    """FlexAttention compiled, once per process. At scale B and T never change, so neither does the kernel. The toys' number
    of rows does: PyTorch compiles a second kernel, for any B. TRAP: dynamic=False compiles one for each B, gives up after
    eight, and goes on without a word, unfused and slow."""
    return torch.compile(flex_attention)


def attend(q, k, v, mask):
    """Attention: softmax(q k^T / sqrt(K)) v under the mask. q (B, N, T, K), k, v (B, N, keys, K) -> (B, N, T, K).
    mask: (B, 1, T, keys) bool, or a BlockMask; the latter has no backward on CPU (torch 2.13 says so itself)."""
    if not isinstance(mask, BlockMask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # In a block that is being compiled, that compiler fuses the kernel; on CPU PyTorch's unfused one serves the tests.
    fused = q.is_cuda and not torch.compiler.is_compiling()
    return (fused_kernel() if fused else flex_attention)(q, k, v, block_mask=mask)


def check(image_id, doc_id):
    """(B, T) of two id tensors, or a ValueError that names the shapes."""
    if image_id.ndim != 2 or image_id.shape != doc_id.shape:
        raise ValueError(f"image_id and doc_id must both be (B, T), got {tuple(image_id.shape)} and {tuple(doc_id.shape)}")
    return image_id.shape


def draw_mask(image_id, doc_id, labels=None, ax=None):
    """Draw one row's mask with matplotlib and return the axes: dark = causal, orange = allowed by "same picture" only.
    image_id, doc_id: (T,) int64. labels: T strings for the axes."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    ax = ax or plt.subplots(figsize=(6, 6))[1]
    both, causal = (or_mask(image_id[None], doc_id[None], b)[0].int() for b in (True, False))
    ax.imshow(both * 2 - causal, cmap=ListedColormap(["white", "#34495e", "#e67e22"]), vmin=0, vmax=2)
    T = len(image_id)
    ax.set_xticks(torch.arange(T + 1) - 0.5, minor=True)
    ax.set_yticks(torch.arange(T + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="#dddddd", linewidth=0.5)
    ax.tick_params(which="minor", length=0)
    if labels:
        ax.set_xticks(range(T), labels, rotation=90, fontsize=8)
        ax.set_yticks(range(T), labels, fontsize=8)
    ax.set_xlabel("... at whom")
    ax.set_ylabel("who looks ...")
    return ax


if __name__ == "__main__":
    row = "a red BOI p0 p1 p2 EOI and BOI q0 q1 EOI EOS".split()
    image_id = torch.tensor([[{"p": 0, "q": 1}.get(w[0], -1) if w[1:].isdigit() else -1 for w in row]])
    doc_id = torch.zeros_like(image_id)
    lo, hi = intervals(image_id, doc_id)
    mask, causal = dense_mask(lo, hi)[0], or_mask(image_id, doc_id, bidirectional=False)[0]
    print("            " + " ".join(f"{w:3s}" for w in row) + "     lo  hi")
    for q, word in enumerate(row):
        cells = " ".join(" # " if causal[q, k] else " O " if mask[q, k] else " . " for k in range(len(row)))
        print(f"      {word:4s}  {cells}     {lo[0, q]:2d}  {hi[0, q]:2d}")
    print(f"\nOR form == interval form: {torch.equal(or_mask(image_id, doc_id)[0], mask)}")
