"""
attention_mask.py: who may look at whom             (Transfusion §3 "Transfusion Attention", Fig. 4)

THE IDEA    Words are read in order, so a word may look only at what came before it. A picture has
            no order, so its patches may all look at each other, and at what came before the
            picture. Everything after it may look at the picture.
A PICTURE   two words, a picture of three patches, a word      (row = who looks, column = at whom)

                       a  red BOI p0 p1 p2 EOI .
                  a    #
                  red  #  #
                  BOI  #  #   #
                  p0   #  #   #  #  O  O            O = allowed only because both are patches of the
                  p1   #  #   #  #  #  O                same picture: blank in a causal mask
                  p2   #  #   #  #  #  #
                  EOI  #  #   #  #  #  #   #
                  .    #  #   #  #  #  #   #  #
THE RULE    look(q, k) = same document AND ( k <= q  OR  same picture )            the OR form
            Patches of a picture are neighbours in the row, so what q may look at has no holes:
            look(q, k) = lo[q] <= k <= hi[q]                                       the interval form
              lo[q] = the first position of q's document
              hi[q] = the last position of q's picture if q is a patch, else q
            The two are equal (tests/test_attention_mask.py tries random layouts). The OR form
            explains. The interval form runs: two numbers per position, and the same code for
            training and for decoding with a cache.
TWO MASKS   dense_mask: a bool per pair (q, k), for PyTorch's ordinary attention. On CPU, and for
            decoding.
            tile_mask: for FlexAttention, the fused kernel of training on a GPU. It skips what
            nobody may look at. Both are made from the same (lo, hi), and tests compare them.
TAKE IT     Copy this file: it needs no other of ours.
              lo, hi = intervals(image_id, doc_id)
              mask = dense_mask(lo, hi)[:, None]            # (B, 1, T, T): for all heads alike
              out = attend(q, k, v, mask)
SHAPES      B rows, T positions, N heads, K head width.
            image_id (B, T) int64: which picture a position is a patch of, -1 for text.
            doc_id (B, T) int64: which document. A mask is (B, T, T) bool, True = may look.
PAPER/HERE  same: causal everywhere, bidirectional within one picture. `bidirectional=False` is the
            ablation of Table 3.
            our choice: BOI and EOI are text, so causal; documents in one row do not see each other.
            our choice: FlexAttention. At T = 4096 a dense mask takes 16 MiB per row, and attention
            under it skips nothing.
READ NEXT   diffusion.py
TRY IT      python attention_mask.py
NOTEBOOK    notebooks/1_who_may_look_at_whom.ipynb
TEST        tests/test_attention_mask.py
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

TILE = 128                                  # side of FlexAttention's tiles, its own default


# ----------------------------------------------------------------------------- the rule, two forms
def or_mask(image_id, doc_id, bidirectional=True):
    """The mask in the words of the paper, (B, T, T) bool: same_document & (causal | same_picture).
    Large: for teaching and for tests.

    image_id        (B, T) int64
    doc_id          (B, T) int64
    bidirectional   False: causal inside a picture too
    Raises ValueError if the shapes differ. Transfusion §3."""
    B, T = check_shapes(image_id, doc_id)

    def same(ids):
        of_q = ids[:, :, None]                                          # (B, T, 1)
        of_k = ids[:, None, :]                                          # (B, 1, T)
        return of_q == of_k                                             # (B, T, T)

    # 1. The three relations of who looks, q, down, and at whom, k, across.
    pos = torch.arange(T, device=image_id.device)
    q = pos[:, None]                                                    # (T, 1)
    k = pos[None, :]                                                    # (1, T)
    causal = k <= q                                                     # (T, T)
    # Our choice: documents in one row do not see each other. The paper does not say how it packs.
    same_document = same(doc_id)                                        # (B, T, T)
    # TRAP: the ids must be equal AND be a picture's. "Both are patches" lets picture 2 leak into
    # picture 1. Equality alone has -1 == -1, and all text becomes bidirectional.
    is_patch = (image_id >= 0)[:, :, None]                              # (B, T, 1)
    same_picture = same(image_id) & is_patch                            # (B, T, T)

    # 2. The rule.
    # Paper: §3. Causal for every element, and bidirectional within each image.
    # Our choice: BOI and EOI are no part of the image, so they are causal.
    if bidirectional:
        return same_document & (causal | same_picture)                  # (B, T, T)
    # Paper: Table 3, the ablation: an image is read in order, like words.
    return same_document & causal                                       # (B, T, T)


def intervals(image_id, doc_id, bidirectional=True):
    """(lo, hi), each (B, T) int64: position q may look at lo[q] .. hi[q], both included.

    image_id        (B, T) int64; the patches of a picture must be neighbours
    doc_id          (B, T) int64
    bidirectional   False: causal inside a picture too
    Raises ValueError if the shapes differ."""
    # TRAP: a position that may look at nothing is a softmax over nothing, which is NaN, and one NaN
    # spoils the whole batch. Here lo[q] <= q <= hi[q] always: each position sees itself.
    B, T = check_shapes(image_id, doc_id)
    pos = torch.arange(T, device=image_id.device)                       # (T,)
    pos = pos.expand(B, T)                                              # (B, T)

    # 1. lo: mark where documents start. The latest start so far is q's own.
    starts = changes(doc_id)                                            # (B, T)
    marks = torch.where(starts, pos, 0)                                 # (B, T)
    lo = marks.cummax(dim=1).values                                     # (B, T)

    # 2. hi, in the ablation: each position's own. Otherwise only a word's, see 3.
    if not bidirectional:
        return lo, pos.clone()

    # 3. hi of a patch: where its picture ends. Two pictures may touch, so another id ends one, too.
    #        image_id   -1   0   0  -1
    #        begins      T   T   F   T        a document, a picture or text begins here
    #        ends        T   F   T   T        something begins at the next position, or the row ends
    #        hi          0   2   2   3
    begins = starts | changes(image_id)                                 # (B, T)
    # The roll brings begins[0], which is True, to the last place: the end of the row is an end.
    ends = begins.roll(-1, dims=1)                                      # (B, T)
    # The next end from q on is q's own. It is the smallest one to the right, so look from there.
    end_marks = torch.where(ends, pos, T)                               # (B, T)
    from_right = end_marks.flip(1)                                      # (B, T)
    next_end = from_right.cummin(dim=1).values                          # (B, T)
    next_end = next_end.flip(1)                                         # (B, T)
    hi = torch.where(image_id >= 0, next_end, pos)                      # (B, T)
    return lo, hi


def changes(ids):
    """(B, T) bool: where an id differs from the one before it. At the first position, True."""
    own = ids[:, 1:]                                                    # (B, T-1)
    before = ids[:, :-1]                                                # (B, T-1)
    new = torch.ones_like(ids, dtype=torch.bool)                        # (B, T)
    new[:, 1:] = own != before
    return new


def check_shapes(image_id, doc_id):
    """(B, T) of two id tensors, or a ValueError that names their shapes."""
    # A shape that broadcasts would give the mask of another row without a word.
    if image_id.ndim != 2 or image_id.shape != doc_id.shape:
        raise ValueError(f"image_id and doc_id must both be (B, T), "
                         f"got {tuple(image_id.shape)} and {tuple(doc_id.shape)}")
    return image_id.shape


# ------------------------------------------------------------------------ two masks for two kernels
def dense_mask(lo, hi, keys=None):
    """The interval form spelled out, (B, T, keys) bool.

    lo, hi   (B, T) int64
    keys     how many keys there are; None: T. Decoding has more, those in the cache."""
    if keys is None:
        keys = lo.shape[1]
    k = torch.arange(keys, device=lo.device)                            # (keys,)
    from_lo = lo[..., None] <= k                                        # (B, T, keys)
    up_to_hi = k <= hi[..., None]                                       # (B, T, keys)
    return from_lo & up_to_hi


def tile_mask(lo, hi):
    """The interval form for FlexAttention, a BlockMask of shape (B, any heads, T, T).

    It cuts the T x T pairs into tiles of 128 x 128:

        o . . .        .  no pair may look: the tile is skipped
        # o . .        #  all pairs may look: no mask is computed
        # # o o        o  some may: the kernel asks  lo <= k <= hi  for each pair
        # # # o

    About half of the tiles of a causal row are skipped, and more of a packed row. A picture that
    goes on into the next tile turns one "." into an "o".
    Make it once per micro-batch, for all layers. lo, hi: (B, T) int64.
    Raises ValueError unless T is a multiple of 128."""
    B, T = lo.shape
    # TRAP: the kernel's tiles would reach beyond the row (docs/PAPER.md §4.13).
    if T % TILE:
        longer = math.ceil(T / TILE) * TILE
        raise ValueError(f"rows of {T} positions cannot be cut into FlexAttention's tiles of "
                         f"{TILE}: training on a GPU needs a multiple of {TILE}, "
                         f"for example --seq-len {longer}")

    # Compare the interval of each q with the first and the last key of each column of tiles. These
    # are T * T/128 comparisons. FlexAttention's own create_block_mask knows nothing of intervals
    # and makes all T * T.
    first = torch.arange(0, T, TILE, device=lo.device)                  # (T/128,)
    last = first + TILE - 1                                             # (T/128,)
    low = lo.view(B, -1, TILE, 1)                                       # (B, T/128, 128, 1)
    high = hi.view(B, -1, TILE, 1)                                      # (B, T/128, 128, 1)
    meets = (low <= last) & (first <= high)                             # (B, T/128, 128, T/128)
    covers = (low <= first) & (last <= high)                            # (B, T/128, 128, T/128)
    some = meets.any(dim=2)                 # any q of it: o or #         (B, T/128, T/128)
    full = covers.all(dim=2)                # every q of it: #            (B, T/128, T/128)
    partial = some & ~full                  # o                           (B, T/128, T/128)

    # TRAP: what `look` uses must keep its shape from batch to batch. A number that changes with the
    # layout, such as how many pictures there are, would compile the kernel anew for every batch.
    lo = lo.int()
    hi = hi.int()

    def look(b, head, q, k):
        from_lo = lo[b, q] <= k
        up_to_hi = k <= hi[b, q]
        return from_lo & up_to_hi

    some_look = list_tiles(partial)         # in each of these `look` is asked
    all_look = list_tiles(full)             # in these it is not
    return BlockMask.from_kv_blocks(*some_look, *all_look, BLOCK_SIZE=TILE, mask_mod=look)


def list_tiles(chosen):
    """Chosen tiles (B, rows, columns) bool, in the form that BlockMask wants: how many in each row,
    (B, 1, rows) int32, and their columns before all others, (B, 1, rows, columns) int32."""
    how_many = chosen.sum(dim=-1, dtype=torch.int32)                    # (B, rows)
    # A stable sort of ones before zeros leaves the chosen columns in order.
    columns = chosen.int().argsort(dim=-1, descending=True, stable=True)
    columns = columns.int()                                             # (B, rows, columns)
    return how_many[:, None], columns[:, None]


# ------------------------------------------------------------------------------ attention under it
def attention_formula(q, k, v, mask):
    """softmax(q k^T / sqrt(K)) v under the mask, written out: (B, N, T, K). For reading and for
    tests. `attend` computes the same, faster.

    q      (B, N, T, K)
    k, v   (B, N, keys, K)
    mask   (B, 1, T, keys) bool"""
    K = q.shape[-1]
    score = q @ k.transpose(-1, -2)                                     # (B, N, T, keys)
    score = score / math.sqrt(K)            # else wider heads have larger scores
    score = score.masked_fill(~mask, -math.inf)                         # exp(-inf) = 0
    weight = score.softmax(dim=-1)          # sums to 1 over the keys
    return weight @ v                                                   # (B, N, T, K)


def attend(q, k, v, mask):
    """`attention_formula` by PyTorch's fused kernels: (B, N, T, K). The formula holds N x T x keys
    scores at once, most of its memory. The kernels hold a few tiles of them.

    q      (B, N, T, K)
    k, v   (B, N, keys, K)
    mask   (B, 1, T, keys) bool, or a BlockMask; that has no backward on CPU, says torch 2.13
    Raises ValueError for a mask of other dimensions."""
    if not isinstance(mask, BlockMask):
        # PyTorch takes (B, T, keys) for one mask per head, without a word where B = N.
        if mask.ndim != 4:
            raise ValueError(f"a mask must be (B, 1, T, keys), got {tuple(mask.shape)}")
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, N, T, K)
    # Inside torch.compile, that compiler fuses the kernel; otherwise we must. On CPU the tests use
    # PyTorch's unfused one.
    if q.is_cuda and not torch.compiler.is_compiling():
        return fused_kernel()(q, k, v, block_mask=mask)                 # (B, N, T, K)
    return flex_attention(q, k, v, block_mask=mask)                     # (B, N, T, K)


@functools.cache
def fused_kernel():
    """FlexAttention compiled, once per process and not before it is needed: it takes seconds."""
    # At scale B and T never change, so there is one kernel. The toys' number of rows does change:
    # PyTorch compiles a second kernel, for any B.
    # TRAP: dynamic=False compiles one for each B. After eight of them it gives up and goes on
    # without a word, unfused and slow.
    return torch.compile(flex_attention)


if __name__ == "__main__":
    row = "a red BOI p0 p1 p2 EOI and BOI q0 q1 EOI EOS".split()
    pictures = {"p0": 0, "p1": 0, "p2": 0, "q0": 1, "q1": 1}
    ids = [pictures.get(word, -1) for word in row]
    image_id = torch.tensor([ids])
    doc_id = torch.zeros_like(image_id)
    lo, hi = intervals(image_id, doc_id)
    mask = dense_mask(lo, hi)[0]
    causal = or_mask(image_id, doc_id, bidirectional=False)[0]

    names = " ".join(f"{word:3s}" for word in row)
    print("row: who looks; column: at whom; O: only because both are patches of one picture\n")
    print(f"            {names}     lo  hi")
    for q, word in enumerate(row):
        cells = []
        for k in range(len(row)):
            if causal[q, k]:
                cells.append(" # ")
            elif mask[q, k]:
                cells.append(" O ")
            else:
                cells.append(" . ")
        line = " ".join(cells)
        interval = f"{lo[0, q]:2d}  {hi[0, q]:2d}"
        print(f"      {word:4s}  {line}     {interval}")

    or_form = or_mask(image_id, doc_id)[0]
    print(f"\nOR form == interval form: {torch.equal(or_form, mask)}")
