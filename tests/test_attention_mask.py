"""
test_attention_mask.py: who may look at whom           (attention_mask.py; Transfusion §3, Fig. 4)

THE IDEA    The rule fits in one line: the same document, and (not later, or the same picture). So
            we write it once more, position by position, in plain Python: `brute_force`. Every
            form that runs must equal it, on hundreds of random rows.
COMPARED    the OR form and the interval form     with brute_force
            attend, PyTorch's fused kernels       with attention_formula, the textbook's
            tile_mask, for FlexAttention          with dense_mask, and with PyTorch's own tiles
A ROW       is drawn as labels, one per position. (0, None) is a word of document 0, and (0, 2) is
            a patch of its picture 2. `to_ids` makes the model's image_id and doc_id of them.
RUN IT      pytest -n 0 tests/test_attention_mask.py
            Each docstring names the bug that the test catches. "PAPER §4.1": docs/PAPER.md.
"""
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

import data
from attention_mask import (
    TILE,
    attend,
    attention_formula,
    dense_mask,
    intervals,
    or_mask,
    tile_mask,
)


# -------------------------------------------------------------------------- random rows, small ones
def random_row(rng):
    """Labels of a row, one per position: (document, None) for a word, (document, picture) for a
    patch. rng: random.Random.

    The row has one to three documents of zero to three pictures. Pictures may touch each other, or
    the ends of their document. Padding is one more document."""
    labels = []
    for document in range(rng.randint(1, 3)):
        labels += [(document, None)] * rng.randint(0, 3)
        for picture in range(rng.randint(0, 3)):
            labels += [(document, picture)] * rng.randint(1, 4)
            labels += [(document, None)] * rng.choice([0, 0, 1, 2])
    padding = [("padding", None)] * rng.choice([0, 0, 3])
    return labels + padding


def to_ids(labels):
    """(image_id, doc_id) of a row, each (1, T) int64. Both count over the whole row: the second
    document's first picture is not picture 0 again."""
    documents = []
    pictures = []
    doc_id = []
    image_id = []
    for label in labels:
        document, picture = label
        if document not in documents:
            documents.append(document)
        doc_id.append(documents.index(document))

        if picture is None:
            image_id.append(-1)
            continue
        if label not in pictures:
            pictures.append(label)
        image_id.append(pictures.index(label))
    return torch.tensor([image_id]), torch.tensor([doc_id])


def rows(how_many=300):
    """A list of (labels, image_id, doc_id): random rows, without the empty ones."""
    rng = random.Random(0)
    found = []
    for _ in range(how_many):
        labels = random_row(rng)
        if labels:
            image_id, doc_id = to_ids(labels)
            found.append((labels, image_id, doc_id))
    return found


# ------------------------------------------------------------------------------ the rule, two forms
def brute_force(labels, bidirectional=True):
    """The rule, position by position: (T, T) bool. It knows the labels alone: no ids, no -1."""
    T = len(labels)
    mask = torch.zeros(T, T, dtype=torch.bool)
    for q in range(T):
        for k in range(T):
            doc_q, picture_q = labels[q]
            doc_k, picture_k = labels[k]
            same_picture = picture_q is not None and picture_q == picture_k
            may_look = k <= q or (bidirectional and same_picture)
            mask[q, k] = doc_q == doc_k and may_look
    return mask


def interval_mask(image_id, doc_id, bidirectional=True):
    """The interval form, spelled out: (B, T, T) bool."""
    lo, hi = intervals(image_id, doc_id, bidirectional)
    return dense_mask(lo, hi)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_mask_is_the_rule(bidirectional):
    """Catches any wrong mask (PAPER §4.1): one that asks only whether both are patches, that merges
    adjacent pictures, whose spans are one off, or whose documents see each other."""
    for labels, image_id, doc_id in rows():
        truth = brute_force(labels, bidirectional)                      # (T, T)

        or_form = or_mask(image_id, doc_id, bidirectional)              # (1, T, T)
        interval_form = interval_mask(image_id, doc_id, bidirectional)  # (1, T, T)

        assert torch.equal(or_form[0], truth), labels
        assert torch.equal(interval_form[0], truth), labels


def test_mask_as_drawn_in_the_docstring():
    """Catches a picture in attention_mask.py, which students look at, that says something else
    than the code."""
    drawn = """#.......
               ##......
               ###.....
               ######..
               ######..
               ######..
               #######.
               ########"""
    wanted = []
    for line in drawn.splitlines():
        wanted.append([cell == "#" for cell in line.strip()])

    #                         a  red BOI p0 p1 p2 EOI .
    image_id = torch.tensor([[-1, -1, -1, 0, 0, 0, -1, -1]])
    doc_id = torch.zeros_like(image_id)
    mask = interval_mask(image_id, doc_id)

    assert torch.equal(mask[0], torch.tensor(wanted))


def test_no_row_is_empty():
    """Catches a position that may look at nothing. Softmax over nothing is NaN, and one NaN spoils
    the whole batch (PAPER §4.1)."""
    for _, image_id, doc_id in rows():
        lo, hi = intervals(image_id, doc_id)
        T = lo.shape[1]
        pos = torch.arange(T)
        # Each position sees at least itself ...
        assert (lo <= pos).all()
        assert (pos <= hi).all()
        # ... and nothing outside the row.
        assert (0 <= lo).all()
        assert (hi < T).all()


def test_padding_of_a_packed_batch_looks_at_something():
    """Catches padding without a document of its own: either its rows of the mask are empty, or it
    reads the last document (PAPER §4.1)."""
    words = data.Words(["red"])
    with_picture = data.lay_out(["red red", ("image", 0, 1000)], words, patches=4)
    text_alone = data.lay_out(["red"], words, patches=4)
    batch = data.pack([with_picture, text_alone], T=20)

    mask = or_mask(batch.image_id, batch.doc_id)[0]                     # (20, 20)
    padding = batch.tokens[0] == data.PAD                               # (20,)
    assert padding.any()

    assert mask.any(dim=1).all()
    padding_sees_words = mask[padding][:, ~padding]
    words_see_padding = mask[~padding][:, padding]
    assert not padding_sees_words.any()
    assert not words_see_padding.any()


def test_text_alone_is_causal():
    """Catches -1 == -1: all words of a row would belong to "the same picture", and text would
    become bidirectional (PAPER §4.1)."""
    image_id = torch.full((1, 6), -1)
    doc_id = torch.zeros_like(image_id)
    causal = torch.ones(6, 6).tril().bool()
    for form in (or_mask, interval_mask):
        mask = form(image_id, doc_id)
        assert torch.equal(mask[0], causal)


def test_adjacent_pictures_stay_apart():
    """Catches two pictures without a word between them that become one: then picture 1 is painted
    knowing picture 2 (PAPER §4.1)."""
    image_id = torch.tensor([[0, 0, 1, 1]])
    doc_id = torch.zeros_like(image_id)
    mask = interval_mask(image_id, doc_id)[0]
    assert mask.int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]


def test_causal_ablation_differs_only_inside_pictures():
    """Catches `bidirectional=False` (Table 3) that changes nothing, or that changes words, too."""
    differences = 0
    for labels, image_id, doc_id in rows(50):
        both_ways = interval_mask(image_id, doc_id, bidirectional=True)[0]
        causal = interval_mask(image_id, doc_id, bidirectional=False)[0]
        for q, k in (both_ways != causal).nonzero().tolist():
            differences += 1
            _, picture = labels[q]
            assert labels[q] == labels[k]
            assert picture is not None
            assert k > q
    assert differences > 0


def test_rows_of_a_batch_are_independent():
    """Catches a cumulative maximum along the wrong axis: row 2's documents would start where row
    1's do."""
    image_ids = []
    doc_ids = []
    for labels, image_id, doc_id in rows(1000):
        if len(labels) == 12:                           # the rows of a batch have one length
            image_ids.append(image_id)
            doc_ids.append(doc_id)
    assert len(image_ids) > 3

    lo, hi = intervals(torch.cat(image_ids), torch.cat(doc_ids))        # (B, 12)

    for b, (image_id, doc_id) in enumerate(zip(image_ids, doc_ids, strict=True)):
        lo_alone, hi_alone = intervals(image_id, doc_id)                # (1, 12)
        assert lo_alone.tolist() == [lo[b].tolist()]
        assert hi_alone.tolist() == [hi[b].tolist()]


def test_mask_over_a_longer_cache():
    """Catches `keys` ignored: decoding against a cache needs more columns than there are new
    positions."""
    # Two new positions, 5 and 6, look at a cache of nine keys.
    mask = dense_mask(torch.tensor([[0, 0]]), torch.tensor([[5, 6]]), keys=9)
    assert mask.int().tolist() == [[
        [1, 1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 0],
    ]]


def test_inputs_are_left_alone():
    """Catches a mask that writes into the batch, and spoils the targets that are read from it
    afterwards."""
    for _, image_id, doc_id in rows(50):
        image_id_before = image_id.clone()
        doc_id_before = doc_id.clone()
        or_mask(image_id, doc_id)
        interval_mask(image_id, doc_id)
        assert torch.equal(image_id, image_id_before)
        assert torch.equal(doc_id, doc_id_before)


@pytest.mark.parametrize("shapes", [
    [(8,), (8,)],
    [(1, 8), (1, 7)],
    [(2, 8), (1, 8)],                                   # these two would broadcast
    [(1, 8, 1), (1, 8, 1)],
])
@pytest.mark.parametrize("form", [or_mask, intervals])
def test_wrong_shapes_raise(form, shapes):
    """Catches a shape that broadcasts, and gives the mask of another row without a word."""
    of_image_id, of_doc_id = shapes
    image_id = torch.zeros(of_image_id, dtype=torch.long)
    doc_id = torch.zeros(of_doc_id, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        form(image_id, doc_id)


def test_a_mask_without_a_place_for_heads_raises():
    """Catches a mask of (B, T, T) where B = N: PyTorch would take the mask of row n for head n,
    without a word."""
    q, k, v = torch.randn(3, 2, 2, 8, 4)                # B = N = 2
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must be \(B, 1, T, keys\), got \(2, 8, 8\)"):
        attend(q, k, v, mask)


# ------------------------------------------------------------- FlexAttention, on rows of many tiles
def long_rows(T=384, B=2, how_many=3, seed=0):
    """Yields `how_many` batches (image_id, doc_id), each (B, T): random documents end to end, then
    padding. Their pictures reach across tiles of 128."""
    rng = random.Random(seed)
    for _ in range(how_many):
        image_ids = []
        doc_ids = []
        for _ in range(B):
            image_id, doc_id = to_ids(long_row(rng, T))
            image_ids.append(image_id)
            doc_ids.append(doc_id)
        yield torch.cat(image_ids), torch.cat(doc_ids)


def long_row(rng, T):
    """Labels of one row of T positions, see `random_row`."""
    labels = []
    for document in range(99):                          # more than fit: they are cut off at `end`
        for picture in range(rng.randint(0, 2)):
            labels += [(document, None)] * rng.randint(0, 20)
            labels += [(document, picture)] * rng.randint(30, 160)
        labels += [(document, None)] * rng.randint(1, 60)
    end = rng.randint(T // 2, T)
    padding = [("padding", None)] * (T - end)
    return labels[:end] + padding


def queries_keys_values(B=2, T=384):
    """Random (q, k, v), each (B, 2, T, 16): two heads, sixteen numbers per head."""
    return torch.randn(3, B, 2, T, 16)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_attend_is_the_formula(bidirectional):
    """Catches a fused attention that is not the textbook's: another scale, the mask upside down
    (in other libraries True means hidden), or left out.

    With both masks, on packed rows with pictures; and with a cache, so more keys than queries."""
    for image_id, doc_id in long_rows():
        lo, hi = intervals(image_id, doc_id, bidirectional)
        dense = dense_mask(lo, hi)[:, None]                             # (B, 1, T, T)
        q, k, v = queries_keys_values()                                 # (B, N, T, K)
        by_hand = attention_formula(q, k, v, dense)

        for mask in (dense, tile_mask(lo, hi)):
            fused = attend(q, k, v, mask)
            assert torch.allclose(fused, by_hand, atol=2e-6)

        for n in (1, 100):                              # the last n queries, but the keys of all
            last = attend(q[:, :, -n:], k, v, dense[:, :, -n:])         # (B, N, n, K)
            assert torch.allclose(last, by_hand[:, :, -n:], atol=2e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_flex_is_dense(bidirectional):
    """Catches a rule for FlexAttention that is not the dense mask: rows of the batch mixed up, or
    spans one off. On packed rows, and on rows of text alone.

    On a CPU, FlexAttention's unfused reference asks the rule for every pair. Which tiles the GPU's
    kernel may skip is for the next tests."""
    text_alone = (torch.full((2, 384), -1), torch.zeros(2, 384, dtype=torch.long))
    for image_id, doc_id in [*long_rows(), text_alone]:
        lo, hi = intervals(image_id, doc_id, bidirectional)
        q, k, v = queries_keys_values()
        flex = attend(q, k, v, tile_mask(lo, hi))
        dense = attend(q, k, v, dense_mask(lo, hi)[:, None])
        assert torch.allclose(flex, dense, atol=2e-6)


def test_flex_gradients_are_dense(monkeypatch):
    """Catches a rule that the backward pass reads differently. (The GPU's kernel itself is tested
    in tests/on_gpu.py.)"""
    # FlexAttention refuses gradients on a CPU. Its unfused reference has them, once it is let.
    flex_attention = torch.nn.attention.flex_attention
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    image_id, doc_id = next(long_rows(seed=1))
    lo, hi = intervals(image_id, doc_id)
    q, k, v = queries_keys_values().requires_grad_()
    weights = torch.randn(2, 2, 384, 16)                # so that each output has its own gradient

    def gradients(mask):
        out = attend(q, k, v, mask)
        return torch.autograd.grad((out * weights).sum(), (q, k, v))

    of_flex = gradients(tile_mask(lo, hi))
    of_dense = gradients(dense_mask(lo, hi)[:, None])

    for flex, dense in zip(of_flex, of_dense, strict=True):
        assert torch.allclose(flex, dense, atol=2e-5)


def edge_cases():
    """Batches (image_id, doc_id), each (2, 512), whose parts end where tiles of 128 do, or one
    position beside: one off, and a tile is full that should not be, or the reverse."""
    one_document = torch.zeros(2, 512, dtype=torch.long)

    # A picture that fills a tile to its last position, and one that ends just beyond.
    edge = torch.full((2, 512), -1)
    edge[0, 128:256] = 0
    edge[1, 128:257] = 1

    # One that ends a position earlier, and a document that begins at the last position of a tile.
    early = torch.full((2, 512), -1)
    early[0, 128:255] = 0
    late_document = one_document.clone()
    late_document[1, 255:] = 1
    return [(edge, one_document), (early, late_document)]


def check_listed_tiles(counts, columns, wanted):
    """Assert that a BlockMask lists, in each row of tiles, just the wanted columns.

    counts    (B, 1, rows), how many it lists
    columns   (B, 1, rows, columns), the listed ones before all others
    wanted    (B, rows, columns) bool"""
    B, n_rows, _ = wanted.shape
    for b in range(B):
        for row in range(n_rows):
            how_many = counts[b, 0, row]
            listed = columns[b, 0, row, :how_many]
            truth = wanted[b, row].nonzero().flatten()
            assert sorted(listed.tolist()) == truth.tolist()


def test_tiles_are_the_dense_masks():
    """Catches tiles, worked out from the intervals, that are not those of the mask: skipped,
    partial or full. FlexAttention reads them by rows, and backwards by columns."""
    kinds = set()
    for image_id, doc_id in [*long_rows(T=512, how_many=10), *edge_cases()]:
        lo, hi = intervals(image_id, doc_id)
        mask = tile_mask(lo, hi)

        tiles = dense_mask(lo, hi)                                      # (B, 512, 512)
        tiles = tiles.unfold(1, TILE, TILE).unfold(2, TILE, TILE)       # (B, 4, 4, 128, 128)
        some = tiles.any(-1).any(-1)                                    # (B, 4, 4)
        full = tiles.all(-1).all(-1)                                    # (B, 4, 4)
        partial = some & ~full                                          # (B, 4, 4)

        # For each row of tiles, the columns of those that are computed ...
        check_listed_tiles(mask.kv_num_blocks, mask.kv_indices, partial)
        check_listed_tiles(mask.full_kv_num_blocks, mask.full_kv_indices, full)
        # ... and for each column its rows, which the backward pass reads.
        check_listed_tiles(mask.q_num_blocks, mask.q_indices, partial.mT)
        check_listed_tiles(mask.full_q_num_blocks, mask.full_q_indices, full.mT)

        kind = some.int() + full.int()                  # 0 skipped, 1 partial, 2 full
        kinds.update(kind.flatten().tolist())
    assert kinds == {0, 1, 2}                           # all three kinds were among them


def test_tile_mask_is_flex_attentions_own():
    """Catches tiles that are not those of PyTorch's create_block_mask, which asks the rule for
    every pair of positions."""
    for image_id, doc_id in long_rows(T=512, seed=2):
        lo, hi = intervals(image_id, doc_id)
        ours = tile_mask(lo, hi)
        theirs = create_block_mask(ours.mask_mod, B=2, H=None, Q_LEN=512, KV_LEN=512, device="cpu")

        assert ours.shape[0] == 2
        assert ours.seq_lengths == theirs.seq_lengths
        assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            our_count = getattr(ours, name)
            their_count = getattr(theirs, name)
            assert torch.equal(our_count, their_count), name


@pytest.mark.parametrize("T", [1, 96, 127, 129, 192, 4000])
def test_lengths_that_tiles_do_not_divide_raise(T):
    """Catches FlexAttention on a length that is not a multiple of 128 (PAPER §4.13). The dense mask
    takes any length."""
    image_id = torch.full((1, T), -1)
    doc_id = torch.zeros(1, T, dtype=torch.long)
    lo, hi = intervals(image_id, doc_id)
    assert dense_mask(lo, hi).shape == (1, T, T)

    next_multiple = -(-T // 128) * 128                  # rounded up
    sentence = f"rows of {T} positions .* multiple of 128, for example --seq-len {next_multiple}"
    with pytest.raises(ValueError, match=sentence):
        tile_mask(lo, hi)


def test_a_new_layout_compiles_nothing():
    """Catches a mask function that holds numbers of the layout. It would compile the kernel anew
    for every batch, which takes seconds each time."""
    torch._dynamo.reset()
    compiled = CompileCounter()                         # counts, and runs what it is given
    kernel = torch.compile(attend, backend=compiled)

    def check_kernel(image_id, doc_id, q, k, v):
        """Assert that the compiled kernel computes what attention under the dense mask does."""
        lo, hi = intervals(image_id, doc_id)
        flex = kernel(q, k, v, tile_mask(lo, hi))
        dense = attend(q, k, v, dense_mask(lo, hi)[:, None])
        assert torch.allclose(flex, dense, atol=2e-6)

    # 1. At scale: one shape, and another layout in every batch.
    q, k, v = queries_keys_values()
    for n, (image_id, doc_id) in enumerate(long_rows(how_many=4, seed=3)):
        check_kernel(image_id, doc_id, q, k, v)
        assert compiled.frame_count == 1, f"layout {n} was compiled anew"

    # 2. The toys: a batch has as many rows as its documents fill.
    for B in (3, 4, 5):
        image_id, doc_id = next(long_rows(B=B, seed=B))
        q, k, v = queries_keys_values(B)
        check_kernel(image_id, doc_id, q, k, v)
    assert compiled.frame_count == 2, "one kernel for the first B, one for all others"
