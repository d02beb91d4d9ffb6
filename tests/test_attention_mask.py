"""test_attention_mask.py: who may look at whom, on random rows. Each test names the bug it is for (docs/PAPER.md §4, here "PAPER §4")."""
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


def random_row(rng):
    """Labels of a row, one per position: (document, None) for a word, (document, picture) for a patch. One to three
    documents of zero to three pictures; pictures may touch each other, or the ends; padding is one more document."""
    labels = []
    for document in range(rng.randint(1, 3)):
        parts = [(document, None)] * rng.randint(0, 3)
        for picture in range(rng.randint(0, 3)):
            parts += [(document, picture)] * rng.randint(1, 4)
            parts += [(document, None)] * rng.choice([0, 0, 1, 2])
        labels += parts
    return labels + [("padding", None)] * rng.choice([0, 0, 3])


def to_ids(labels):
    """image_id, doc_id (1, T) of a row: pictures are numbered over the row, documents too."""
    pictures = list(dict.fromkeys(label for label in labels if label[1] is not None))
    documents = list(dict.fromkeys(label[0] for label in labels))
    image_id = [pictures.index(label) if label[1] is not None else -1 for label in labels]
    return torch.tensor([image_id]), torch.tensor([[documents.index(label[0]) for label in labels]])


def rows(how_many=300):
    """Random rows that are not empty, as (labels, image_id, doc_id)."""
    rng = random.Random(0)
    drawn = [random_row(rng) for _ in range(how_many)]
    return [(labels, *to_ids(labels)) for labels in drawn if labels]


def brute_force(labels, bidirectional=True):
    """The rule, position by position, from the labels alone: no ids, no -1."""
    def may_look(q, k):
        (doc_q, picture_q), (doc_k, picture_k) = labels[q], labels[k]
        same_picture = picture_q is not None and picture_q == picture_k
        return doc_q == doc_k and (k <= q or (bidirectional and same_picture))
    return torch.tensor([[may_look(q, k) for k in range(len(labels))] for q in range(len(labels))])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_mask_is_the_rule(bidirectional):
    """Any wrong mask (PAPER §4.1): "both are patches", adjacent pictures merged, spans one off, documents seeing each other."""
    for labels, image_id, doc_id in rows():
        truth = brute_force(labels, bidirectional)
        assert torch.equal(or_mask(image_id, doc_id, bidirectional)[0], truth), labels
        assert torch.equal(dense_mask(*intervals(image_id, doc_id, bidirectional))[0], truth), labels


def test_mask_as_drawn_in_the_docstring():
    """The picture that students look at says something else than the code."""
    drawn = """#.......
               ##......
               ###.....
               ######..
               ######..
               ######..
               #######.
               ########"""
    image_id = torch.tensor([[-1, -1, -1, 0, 0, 0, -1, -1]])
    wanted = torch.tensor([[cell == "#" for cell in line.strip()] for line in drawn.splitlines()])
    assert torch.equal(dense_mask(*intervals(image_id, torch.zeros_like(image_id)))[0], wanted)


def test_no_row_is_empty():
    """A position that may look at nothing: softmax over nothing is NaN, and one NaN spoils the whole batch (PAPER §4.1)."""
    for _, image_id, doc_id in rows():
        lo, hi = intervals(image_id, doc_id)
        pos = torch.arange(lo.shape[1])
        assert (lo <= pos).all() and (pos <= hi).all()
        assert (0 <= lo).all() and (hi < lo.shape[1]).all()


def test_padding_of_a_packed_batch_looks_at_something():
    """Padding without a document of its own: empty rows, or padding that reads the last document (PAPER §4.1)."""
    words = data.Words(["red"])
    documents = [["red red", ("image", 0, 1000)], ["red"]]
    batch = data.pack([data.lay_out(document, words, 4) for document in documents], T=20)
    mask, padding = or_mask(batch.image_id, batch.doc_id)[0], batch.tokens[0] == data.PAD
    assert padding.any() and mask.any(1).all()
    assert not mask[padding][:, ~padding].any() and not mask[~padding][:, padding].any()


def test_text_alone_is_causal():
    """-1 == -1: all words of a row belong to "the same picture", and text becomes bidirectional (PAPER §4.1)."""
    image_id = torch.full((1, 6), -1)
    for mask in (or_mask(image_id, image_id + 1), dense_mask(*intervals(image_id, image_id + 1))):
        assert torch.equal(mask[0], torch.ones(6, 6).tril().bool())


def test_adjacent_pictures_stay_apart():
    """Two pictures without a word between them become one, and picture 1 is painted knowing picture 2 (PAPER §4.1)."""
    image_id = torch.tensor([[0, 0, 1, 1]])
    mask = dense_mask(*intervals(image_id, torch.zeros_like(image_id)))[0]
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_causal_ablation_differs_only_inside_pictures():
    """`bidirectional=False` (Table 3) changes nothing, or changes words too."""
    for labels, image_id, doc_id in rows(50):
        both, causal = (dense_mask(*intervals(image_id, doc_id, b))[0] for b in (True, False))
        for q, k in (both != causal).nonzero().tolist():
            assert labels[q] == labels[k] and labels[q][1] is not None and k > q


def test_rows_of_a_batch_are_independent():
    """A cumulative maximum along the wrong axis: row 2's documents start where row 1's do."""
    same_length = [row for row in rows(1000) if len(row[0]) == 12]
    image_id, doc_id = (torch.cat([row[k] for row in same_length]) for k in (1, 2))
    lo, hi = intervals(image_id, doc_id)
    assert len(lo) > 3
    for b, (_, image_id, doc_id) in enumerate(same_length):
        assert [x.tolist() for x in intervals(image_id, doc_id)] == [[lo[b].tolist()], [hi[b].tolist()]]


def test_mask_over_a_longer_cache():
    """`keys` ignored: decoding against a cache needs more columns than there are new positions."""
    mask = dense_mask(torch.tensor([[0, 0]]), torch.tensor([[5, 6]]), keys=9)
    assert mask.int().tolist() == [[[1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0]]]


def test_inputs_are_left_alone():
    """A mask that writes into the batch spoils the targets that are read from it afterwards."""
    for _, image_id, doc_id in rows(50):
        before = image_id.clone(), doc_id.clone()
        or_mask(image_id, doc_id)
        dense_mask(*intervals(image_id, doc_id))
        assert torch.equal(image_id, before[0]) and torch.equal(doc_id, before[1])


@pytest.mark.parametrize("shapes", [[(8,), (8,)], [(1, 8), (1, 7)], [(2, 8), (1, 8)], [(1, 8, 1), (1, 8, 1)]])
@pytest.mark.parametrize("form", [or_mask, intervals])
def test_wrong_shapes_raise(form, shapes):
    """A shape that broadcasts gives a mask of the wrong row without a word."""
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        form(*(torch.zeros(shape, dtype=torch.long) for shape in shapes))


def test_a_mask_without_a_place_for_heads_raises():
    """(B, T, T) where B = N: PyTorch would take the mask of row n for head n, without a word."""
    q, k, v = torch.randn(3, 2, 2, 8, 4)                # B = N = 2
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must be \(B, 1, T, keys\), got \(2, 8, 8\)"):
        attend(q, k, v, mask)


# ------------------------------------------------------------------------------------------------------- FlexAttention
def long_rows(T=384, B=2, how_many=3, seed=0):
    """Batches (image_id, doc_id), each (B, T), of random documents end to end, with padding, pictures across tiles."""
    rng = random.Random(seed)
    for _ in range(how_many):
        batch = []
        for _ in range(B):
            labels = []
            for document in range(99):
                for picture in range(rng.randint(0, 2)):
                    labels += [(document, None)] * rng.randint(0, 20) + [(document, picture)] * rng.randint(30, 160)
                labels += [(document, None)] * rng.randint(1, 60)
            end = rng.randint(T // 2, T)                # the rest is padding, a document of its own
            batch.append(to_ids(labels[:end] + [("padding", None)] * (T - end)))
        yield tuple(torch.cat([row[k] for row in batch]) for k in (0, 1))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_attend_is_the_formula(bidirectional):
    """The fused attention is not the one in the textbook: another scale, the mask upside down (True = hidden, as other
    libraries have it) or left out. Both masks, on packed rows with pictures; and a cache of more keys than queries."""
    for image_id, doc_id in long_rows():
        lo, hi = intervals(image_id, doc_id, bidirectional)
        dense = dense_mask(lo, hi)[:, None]                                                 # (B, 1, T, T)
        q, k, v = torch.randn(3, 2, 2, 384, 16)                                             # N = 2, K = 16
        by_hand = attention_formula(q, k, v, dense)
        for mask in (dense, tile_mask(lo, hi)):
            assert torch.allclose(attend(q, k, v, mask), by_hand, atol=2e-6)
        for n in (1, 100):                              # the last n positions against the keys of all
            assert torch.allclose(attend(q[:, :, -n:], k, v, dense[:, :, -n:]), by_hand[:, :, -n:], atol=2e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_flex_is_dense(bidirectional):
    """FlexAttention's rule != the dense mask: rows of the batch mixed up, spans one off. On packed and on padded rows. On
    CPU its unfused reference asks the rule for every pair; which tiles the GPU's kernel may skip is the next tests' matter."""
    for image_id, doc_id in [*long_rows(), (torch.full((2, 384), -1), torch.zeros(2, 384, dtype=torch.long))]:
        lo, hi = intervals(image_id, doc_id, bidirectional)
        q, k, v = torch.randn(3, 2, 2, 384, 16)
        flex, dense = attend(q, k, v, tile_mask(lo, hi)), attend(q, k, v, dense_mask(lo, hi)[:, None])
        assert torch.allclose(flex, dense, atol=2e-6)


def test_flex_gradients_are_dense(monkeypatch):
    """A rule that the backward pass reads differently. FlexAttention refuses gradients on CPU; its unfused reference has
    them once let. (The kernel itself: tests/on_gpu.py.)"""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    image_id, doc_id = next(long_rows(seed=1))
    lo, hi = intervals(image_id, doc_id)
    q, k, v = torch.randn(3, 2, 2, 384, 16).requires_grad_()
    weights, found = torch.randn(2, 2, 384, 16), []
    for mask in (tile_mask(lo, hi), dense_mask(lo, hi)[:, None]):
        found.append(torch.autograd.grad((attend(q, k, v, mask) * weights).sum(), (q, k, v)))
    for flex, dense in zip(*found, strict=True):
        assert torch.allclose(flex, dense, atol=2e-5)


def test_tiles_are_the_dense_masks():
    """The tiles worked out from the intervals are not those of the mask: skipped, in between, full; either way around."""
    kinds = set()
    # A picture that fills one tile to its last position, and one that ends just beyond: off by one, a tile is not full.
    edge = torch.full((2, 512), -1)
    edge[0, 128:256] = 0
    edge[1, 128:257] = 1
    # One that ends a position earlier, and a document that begins at the last position of a tile.
    early = torch.full((2, 512), -1)
    early[0, 128:255] = 0
    late = torch.zeros(2, 512, dtype=torch.long)
    late[1, 255:] = 1
    for image_id, doc_id in [*long_rows(T=512, how_many=10), (edge, torch.zeros_like(edge)), (early, late)]:
        lo, hi = intervals(image_id, doc_id)
        tiles, mask = dense_mask(lo, hi).unfold(1, TILE, TILE).unfold(2, TILE, TILE), tile_mask(lo, hi)
        some, full = tiles.any(-1).any(-1), tiles.all(-1).all(-1)                           # (B, 4, 4)
        for counts, columns, wanted in ((mask.kv_num_blocks, mask.kv_indices, some & ~full),
                                        (mask.full_kv_num_blocks, mask.full_kv_indices, full),
                                        (mask.q_num_blocks, mask.q_indices, (some & ~full).mT),
                                        (mask.full_q_num_blocks, mask.full_q_indices, full.mT)):
            for b in range(2):
                for i in range(4):
                    assert sorted(columns[b, 0, i, : counts[b, 0, i]].tolist()) == wanted[b, i].nonzero().flatten().tolist()
        kinds |= set((some.int() + full.int()).flatten().tolist())
    assert kinds == {0, 1, 2}                           # all three kinds were among them


def test_tile_mask_is_flex_attentions_own():
    """Our tiles against create_block_mask, which asks the rule for every pair of positions."""
    for image_id, doc_id in long_rows(T=512, seed=2):
        lo, hi = intervals(image_id, doc_id)
        ours = tile_mask(lo, hi)
        theirs = create_block_mask(ours.mask_mod, B=2, H=None, Q_LEN=512, KV_LEN=512, device="cpu")
        assert ours.shape[0] == 2 and ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("T", [1, 96, 127, 129, 192, 4000])
def test_lengths_that_tiles_do_not_divide_raise(T):
    """PAPER §4.13: FlexAttention on a length that is not a multiple of 128. The dense mask takes any."""
    lo, hi = intervals(torch.full((1, T), -1), torch.zeros(1, T, dtype=torch.long))
    assert dense_mask(lo, hi).shape == (1, T, T)
    with pytest.raises(ValueError, match=f"rows of {T} positions .* multiple of 128, for example --seq-len {-(-T // 128) * 128}"):
        tile_mask(lo, hi)


def test_a_new_layout_compiles_nothing():
    """A mask function that closes over numbers of the layout compiles the kernel anew for every batch, seconds each."""
    torch._dynamo.reset()
    compiled = CompileCounter()
    kernel = torch.compile(attend, backend=compiled)
    q, k, v = torch.randn(3, 2, 2, 384, 16)
    for n, (image_id, doc_id) in enumerate(long_rows(how_many=4, seed=3)):
        lo, hi = intervals(image_id, doc_id)
        assert torch.allclose(kernel(q, k, v, tile_mask(lo, hi)), attend(q, k, v, dense_mask(lo, hi)[:, None]), atol=2e-6)
        assert compiled.frame_count == 1, f"layout {n} was compiled anew"
    for B in (3, 4, 5):                                 # the toys: as many rows as the documents of a batch fill
        image_id, doc_id = next(long_rows(B=B, seed=B))
        lo, hi = intervals(image_id, doc_id)
        q, k, v = torch.randn(3, B, 2, 384, 16)
        assert torch.allclose(kernel(q, k, v, tile_mask(lo, hi)), attend(q, k, v, dense_mask(lo, hi)[:, None]), atol=2e-6)
    assert compiled.frame_count == 2, "one kernel for the first B, one for all others"
