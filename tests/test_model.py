"""
test_model.py: the whole network                                       (model.py; Transfusion §3)

THE IDEA    Three ways to find out whether a network does what it should, none of which trusts it.
            Perturbation: change one word or one picture. Only what may look at it may change.
            Equivalence: the same document alone, packed, in another row. Nothing may change.
            Second opinion: transformers' Llama with the same weights must say the same words.
SHAPES      The model has 2 layers of width 32. A picture is a latent of (4, 4, 4): P = 4 patches.
BUGS        "PAPER §4.1" is docs/PAPER.md §4.1, where each bug was met by somebody.
LOSSES      tests/test_losses.py
TRY IT      pytest -n 0 tests/test_model.py
"""
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import data
import model as model_module
from attention_mask import dense_mask, intervals, tile_mask
from data import PAD
from diffusion import Diffusion
from model import (
    PAPER_SIZES,
    PAPER_VOCABULARY,
    SIZES,
    Block,
    Cache,
    ModelConfig,
    Transfusion,
    count,
    losses,
    paper_model,
    rope_tables,
    sized,
)
from patchify import PATCHES, LinearPatches

WORDS = data.Words("a and blue circle red square the".split())

# Four documents, and four pictures. ("image", 1, 1000): picture 1, noised with any t up to 1000.
LONG = ["a red circle", ("image", 0, 1000), "and a blue square", ("image", 1, 1000), "the circle"]
SHORT = ["the square", ("image", 2, 1000)]
DROPPED = [("dropped", "a red square"), ("image", 3, 1000)]
TEXT = ["a red circle and a blue square"]

TIMES = (50, 400, 700, 990)                             # t of pictures 0 to 3


def make_batch(documents, T=48):
    """The packed data.Batch of documents, in rows of T positions, with latents, t and eps.

    A picture has the same latent, t and eps in every batch that it is in."""
    sequences = [data.lay_out(document, WORDS, patches=4) for document in documents]
    batch = data.pack(sequences, T)

    def normal(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(4, 4, 4, generator=generator)

    M = len(batch.images)
    batch.latents = torch.zeros(M, 4, 4, 4)
    batch.eps = torch.zeros(M, 4, 4, 4)
    batch.t = torch.zeros(M, dtype=torch.long)
    for m, picture in enumerate(batch.images):
        batch.latents[m] = normal(100 + int(picture))
        batch.eps[m] = normal(200 + int(picture))
        batch.t[m] = TIMES[picture]
    return batch


def run(model, batch, xt):
    """(logits (B, T, V), picture outputs (M, c, h, w)) of one training forward.

    The logits are those of *every* position: training asks only for those that have a loss."""
    everywhere = torch.ones_like(batch.has_loss)
    with torch.no_grad():
        logits, out = model(
            batch.tokens, batch.image_id, batch.doc_id, everywhere, xt, batch.t
        )
    B, T = batch.tokens.shape
    return logits.view(B, T, -1), out


def differs(a, b):
    """For each position (or picture), whether anything at all has changed, to the bit."""
    return (a != b).flatten(1).any(1).tolist()


def first_patch(batch, m):
    """Where picture m starts in row 0."""
    return int((batch.image_id[0] == m).nonzero()[0])


def heard_at(batch, k):
    """For each position of row 0, whether it may notice a change at position k: those of the same
    document may, from k on."""
    doc_id = batch.doc_id[0].tolist()
    return [doc_id[q] == doc_id[k] and q >= k for q in range(len(doc_id))]


# -------------------------------------------------------------------------- leaks, by perturbation
def test_a_word_changes_nothing_before_it(model):
    """Catches a mask that is built and never passed on, or that is a column off. The model would
    read the word that it should predict (PAPER §4.1)."""
    batch = make_batch([LONG, SHORT])
    assert len(batch.tokens) == 1                       # both documents share a row
    before, pictures_before = run(model, batch, batch.latents)

    is_word = batch.tokens[0] >= len(data.SPECIAL)
    for k in is_word.nonzero().flatten().tolist():
        # 1. Put another word at k, run, and put the old one back.
        old = batch.tokens[0, k].item()
        other = WORDS.ids["red"]
        if old == other:
            other = WORDS.ids["blue"]
        batch.tokens[0, k] = other
        after, pictures_after = run(model, batch, batch.latents)
        batch.tokens[0, k] = old

        # 2. Later positions of its document hear it, and no others.
        heard = heard_at(batch, k)
        assert differs(before[0], after[0]) == heard, (
            f"the word at {k} is heard at other positions than those after it"
        )

        # 3. A picture hears it if its patches come later.
        changed = differs(pictures_before, pictures_after)
        for m in range(3):
            assert changed[m] == heard[first_patch(batch, m)], f"word {k}, picture {m}"


def test_a_picture_changes_nothing_before_it(model):
    """Catches "both are patches" in place of "same picture": picture 2 leaks into picture 1. Also
    catches a BOI that sees its picture (PAPER §4.1)."""
    batch = make_batch([LONG, SHORT])
    before, pictures_before = run(model, batch, batch.latents)
    # Pictures 0 and 1 are in one document, 2 is in another: 1 depends on 0, and that is all.
    depends_on = {
        0: [True, True, False],                         # who changes when picture 0 does
        1: [False, True, False],
        2: [False, False, True],
    }

    for m in range(3):
        noisier = batch.latents.clone()
        noisier[m] += torch.randn(4, 4, 4)
        after, pictures_after = run(model, batch, noisier)

        heard = heard_at(batch, first_patch(batch, m))
        assert differs(before[0], after[0]) == heard, f"picture {m}"
        assert differs(pictures_before, pictures_after) == depends_on[m], f"picture {m}"


@pytest.mark.parametrize("bidirectional", [True, False])
def test_one_patch_is_heard_by_all_patches_of_its_picture(make_model, bidirectional):
    """Catches causal attention inside a picture although bidirectional was asked for, and the other
    way round (PAPER §4.1, Table 3)."""
    model = make_model(bidirectional=bidirectional)
    batch = make_batch([SHORT])
    _, before = run(model, batch, batch.latents)
    corners = [(0, 0), (0, 2), (2, 0), (2, 2)]          # of the four 2x2 patches, in raster order

    for k, (y, x) in enumerate(corners):
        changed = batch.latents.clone()
        changed[0, :, y: y + 2, x: x + 2] += 1
        _, after = run(model, batch, changed)

        different = before[0] != after[0]               # (4, 4, 4)
        heard = [bool(different[:, i: i + 2, j: j + 2].any()) for i, j in corners]
        if bidirectional:
            assert heard == [True, True, True, True]
        else:
            assert heard == [q >= k for q in range(4)]


def test_patches_know_their_place(make_model):
    """Catches patches of a picture that all share one position: the model could not tell left from
    right (PAPER §4.5)."""

    def swap_halves(x):
        left = x[..., :2]
        right = x[..., 2:]
        return torch.cat([right, left], dim=-1)

    model = make_model()
    batch = make_batch([SHORT])
    _, out = run(model, batch, batch.latents)
    _, out_of_swapped = run(model, batch, swap_halves(batch.latents))

    # Without places, the patches would only change places, and so would their outputs.
    assert (swap_halves(out_of_swapped) - out).abs().max() > 1e-2


def test_patch_position_is_added(make_model):
    """Catches a --patch-position that changes nothing, or that is one vector for all patches."""
    model = make_model(patch_position=True)
    batch = make_batch([SHORT])
    assert model.place.shape == (4, 32)                 # (P, D)

    _, before = run(model, batch, batch.latents)
    for k in range(4):
        with torch.no_grad():
            model.place[k] += torch.randn(32)
        _, after = run(model, batch, batch.latents)
        assert not torch.allclose(after, before, atol=1e-4), f"place {k} is not read"
        before = after


def test_places_are_not_slots(model, monkeypatch):
    """Catches a cache that writes keys to where RoPE sees them: with two patches at one place, one
    of the two would be lost."""
    batch = make_batch([SHORT], T=10)                   # <bos> the square <boi> . . . . <eoi> <eos>
    _, plain = run(model, batch, batch.latents)

    # 1. Let RoPE see two patches at each place.
    places = []

    def two_at_one_place(pos, image_id):
        places.append(torch.where(image_id >= 0, pos // 2, pos))
        return places[-1]

    monkeypatch.setattr(model, "rope_positions", two_at_one_place)
    _, wanted = run(model, batch, batch.latents)
    assert not torch.allclose(wanted, plain, atol=1e-3)                 # RoPE sees them there

    # 2. The same with a cache: the four words, then the picture.
    pos = torch.arange(10)[None]                                        # (1, 10)
    no_pictures = torch.zeros(0, 4, 4, 4)
    cache = Cache(model.config, 1, 10, model.head.weight)
    with torch.no_grad():
        model.read(batch.tokens[:, :4], batch.image_id[:, :4], no_pictures, pos[:, :4], cache)
        out = model.denoise(batch.latents, batch.t, pos[:, 4:8], cache)
    assert [row.tolist() for row in places] == [
        [[0, 1, 2, 3, 2, 2, 3, 3, 8, 9]],               # the training forward
        [[0, 1, 2, 3]],                                 # read
        [[2, 2, 3, 3]],                                 # denoise
    ]
    assert torch.allclose(out, wanted, atol=1e-5)


def test_packing_changes_nothing(model):
    """Catches documents in one row that see each other, and a second document whose positions start
    where the first one's ended."""
    batch = make_batch([LONG, SHORT, DROPPED], T=64)
    assert len(batch.tokens) == 1
    together, pictures_together = run(model, batch, batch.latents)

    m = 0                                               # the document's first picture
    for d, document in enumerate([LONG, DROPPED, SHORT]):               # `pack`: the longest first
        alone = make_batch([document], T=40)
        logits, out = run(model, alone, alone.latents)

        n = int((alone.tokens != PAD).sum())
        here = batch.doc_id[0] == d
        assert torch.allclose(together[0, here], logits[0, :n], atol=1e-4)
        assert torch.allclose(pictures_together[m: m + len(out)], out, atol=1e-4)
        m += len(out)
    assert m == 4


def test_pictures_go_to_their_own_places(model):
    """Catches pictures of two rows that are handed out in the wrong order: each row must give in
    the batch what it gives alone."""
    joint = make_batch([LONG, SHORT, DROPPED], T=31)
    assert len(joint.tokens) == 2
    logits, out = run(model, joint, joint.latents)

    m = 0                                               # the row's first picture
    for b, documents in enumerate([[LONG], [DROPPED, SHORT]]):
        alone = make_batch(documents, T=31)
        logits_alone, out_alone = run(model, alone, alone.latents)

        assert torch.equal(alone.tokens[0], joint.tokens[b])
        assert torch.allclose(logits[b], logits_alone[0], atol=1e-4)
        assert torch.allclose(out[m: m + len(out_alone)], out_alone, atol=1e-4)
        m += len(out_alone)


# -------------------------------------------------------------------------- mistakes of the caller
@pytest.mark.parametrize("how_many", [1, 3])
def test_wrong_number_of_pictures_raises(model, how_many):
    """Catches pictures beyond the places, or places beyond the pictures, silently left out."""
    batch = make_batch([DROPPED, SHORT])
    x = torch.randn(how_many, 4, 4, 4)
    t = torch.ones(how_many, dtype=torch.long)
    message = f"8 patch positions, but {how_many} pictures of 4 patches"
    with pytest.raises(ValueError, match=message):
        model(batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, x, t)


@pytest.mark.parametrize("shape, t", [
    ((2, 4, 8, 8), (2,)),
    ((2, 3, 4, 4), (2,)),
    ((2, 4, 4, 4), (1,)),
    ((2, 4, 4, 4), ()),
])
def test_wrong_picture_shapes_raise(model, shape, t):
    """Catches one t that broadcasts over all pictures (PAPER §4.3), or latents of another size."""
    with pytest.raises(ValueError, match=r"pictures must be \(M, 4, 4, 4\) with one t each"):
        model.encode_pictures(torch.zeros(shape), torch.ones(t, dtype=torch.long))


def test_impossible_configurations_raise():
    """Catches a width or a patch side that fails much later, inside a reshape."""
    with pytest.raises(ValueError, match="width 30 must be divisible"):
        ModelConfig(vocabulary=9, width=30, heads=2)

    with pytest.raises(ValueError, match="latents of 4x4 cannot be cut into 3x3"):
        ModelConfig(vocabulary=9, latent=(4, 4, 4), patch=3)

    message = ("a picture of 64 patches.* does not fit in a context of 65: "
               "raise --seq-len or --patch")
    with pytest.raises(ValueError, match=message):
        ModelConfig(vocabulary=9, latent=(4, 16, 16), context=65)
    # One position more, and BOI, 64 patches and EOI fit.
    assert ModelConfig(vocabulary=9, latent=(4, 16, 16), context=66).patches == 64

    with pytest.raises(ValueError, match="choose from mini, midi, toy, small"):
        sized("8b", vocabulary=9)


# --------------------------------------------------------------------------- Llama, second opinion
def llama(V, L, hidden, D=32, N=2):
    """transformers' LlamaForCausalLM with random weights in every layer, the norms too.

    V vocabulary, L layers, D width, N heads; hidden: as wide as our block's feed-forward layer."""
    transformers = pytest.importorskip(
        "transformers", reason="the second opinion on the block needs `transformers`"
    )
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=hidden,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=N,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    for weight in theirs.parameters():
        # Norms (one dimension) around 1, the rest around 0.
        mean = float(weight.ndim == 1)
        nn.init.normal_(weight, mean=mean, std=0.3)
    return theirs.requires_grad_(False)


def copy_layer(layer, block):
    """Weights of a transformers LlamaDecoderLayer into our Block."""
    a = layer.self_attn
    m = layer.mlp
    block.load_state_dict({
        "norm1.weight": layer.input_layernorm.weight,
        "norm2.weight": layer.post_attention_layernorm.weight,
        "qkv.weight": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
        "out.weight": a.o_proj.weight,
        "gate_up.weight": torch.cat([m.gate_proj.weight, m.up_proj.weight]),
        "down.weight": m.down_proj.weight,
    })


def test_block_is_llamas():
    """Catches a norm after in place of before, SwiGLU's halves swapped, RoPE in the other layout,
    q and k exchanged."""
    block = Block(32, 2)
    theirs = llama(V=9, L=1, hidden=block.down.in_features)
    layer = theirs.model.layers[0]
    copy_layer(layer, block)

    T = 10
    x = torch.randn(2, T, 32)                                           # (B, T, D)
    pos = torch.stack([torch.arange(10), torch.arange(30, 40)])         # (B, T)
    mask = torch.ones(T, T, dtype=torch.bool).tril()                    # (T, T), causal

    # Theirs is told by a number that is added to the scores: 0, may look; minus infinity, may not.
    wanted = layer(
        x,
        attention_mask=torch.where(mask, 0.0, -torch.inf)[None, None],
        position_embeddings=theirs.model.rotary_emb(x, pos),
    )
    if isinstance(wanted, tuple):                       # older releases give the scores, too
        wanted = wanted[0]
    ours = block(x, rope_tables(pos, 16), mask[None, None].expand(2, 1, T, T))
    assert torch.allclose(ours, wanted, atol=1e-4)


def test_text_model_is_llama(make_model):
    """Catches a final norm that is missing, tied embeddings, or layers in another order: words
    alone must come out as Llama's do."""
    model = make_model(vocabulary=len(WORDS))
    theirs = llama(V=len(WORDS), L=2, hidden=model.blocks[0].down.in_features)
    for layer, block in zip(theirs.model.layers, model.blocks, strict=True):
        copy_layer(layer, block)
    model.embedding.load_state_dict(theirs.model.embed_tokens.state_dict())
    model.norm.load_state_dict(theirs.model.norm.state_dict())
    model.head.load_state_dict(theirs.lm_head.state_dict())

    tokens = torch.randint(len(data.SPECIAL), len(WORDS), (2, 12))      # (B, T)
    text = torch.full_like(tokens, -1)                                  # image_id
    no_pictures = torch.zeros(0, 4, 4, 4)
    pos = torch.arange(12).expand(2, 12)
    cache = Cache(model.config, 2, 12, model.head.weight)
    with torch.no_grad():
        logits = model.read(tokens, text, no_pictures, pos, cache)      # (B, T, V)
    assert torch.allclose(logits, theirs(tokens).logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("D, N, hidden", [
    (768, 12, 2048),
    (1024, 16, 2816),
    (1536, 24, 4096),
    (2048, 16, 5632),
    (4096, 32, 11008),                                  # 7B
    (128, 4, 512),
])
def test_hidden_width_is_llamas(D, N, hidden):
    """Catches another width of the feed-forward layer than Llama's: 8/3 of D, rounded up to a
    multiple of 256."""
    with torch.device("meta"):
        block = Block(D, N)
    assert block.down.in_features == hidden
    assert block.gate_up.out_features == 2 * hidden
    assert 8 * D / 3 <= hidden < 8 * D / 3 + 256


# --------------------------------------------------------------------------------- sizes of Table 8
def test_parameter_counts():
    """Catches a bias, a tied embedding or another hidden size: the text part of 7B is Llama 2 7B
    to the last parameter (Table 8)."""
    assert PAPER_VOCABULARY == 32000 + len(data.SPECIAL)
    for size in PAPER_SIZES:
        model = paper_model(size)
        layers, D, _ = SIZES[size]

        # 1. The text part, without the rows of our special tokens in the table and in the head.
        pictures = count(model.patch_encoder)
        special = 2 * len(data.SPECIAL) * D
        text = count(model) - pictures - special

        # 2. The same, from Llama's description.
        hidden = 256 * math.ceil(8 * D / 3 / 256)
        attention = 4 * D * D
        feed_forward = 3 * D * hidden
        norms = 2 * D
        table_and_head = 2 * 32000 * D
        final_norm = D
        layer = attention + feed_forward + norms
        assert text == table_and_head + layers * layer + final_norm
        if size == "7b":
            assert text == 6_738_415_616
        assert text / 1e9 == pytest.approx(float(size[:-1]), rel=0.04), size

        # 3. The linear patch layers.
        assert pictures < 0.005 * count(model), (
            "linear: below 0.5% in every configuration (§4.1)"
        )


def test_sizes_are_table_8s():
    """Catches a typing error in the table of sizes."""
    assert {size: SIZES[size] for size in PAPER_SIZES} == {
        "0.16b": (16, 768, 12),
        "0.37b": (24, 1024, 16),
        "0.76b": (24, 1536, 24),
        "1.4b": (24, 2048, 16),
        "7b": (32, 4096, 32),
    }


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_unet_adds_the_papers_parameters(patch):
    """Catches another U-Net at another width or patch side: §4.1 has the same 0.27B "across all
    configurations"."""
    for size in PAPER_SIZES:
        unet = paper_model(size, "unet", patch).patch_encoder
        assert count(unet) == pytest.approx(0.27e9, rel=0.05), size

    # The toy keeps its own.
    toy = Transfusion(sized("toy", vocabulary=9, encoder="unet"))
    assert count(toy.patch_encoder) == 581_956
    # The feed-forward layers of toy are rounded up to a multiple of 128, those of small to 256.
    counts = [count(Transfusion(sized(size, vocabulary=9))) for size in ("toy", "small")]
    assert counts == [896_928, 1_618_336]


# ---------------------------------------------------------------------------------- FlexAttention
def test_flex_trunk_is_the_dense_trunk(make_model):
    """Catches layers that read the wrong form of the mask, or a first layer that spoils it for the
    next."""
    model = make_model()
    batch = make_batch([LONG, SHORT, LONG], T=128)
    B, T = batch.tokens.shape
    lo, hi = intervals(batch.image_id, batch.doc_id)                    # each (B, T)
    x = torch.randn(B, T, 32)                                           # (B, T, D)
    pos = torch.arange(128) - lo                                        # (B, T)
    with torch.no_grad():
        tiled = model.trunk(x, pos, tile_mask(lo, hi))
        dense = model.trunk(x, pos, dense_mask(lo, hi))
    assert torch.allclose(tiled, dense, atol=1e-5)


def test_blocks_compile_once(make_model):
    """Catches one compilation per layer or per layout: each takes many seconds, and there are 32
    layers and thousands of batches. Blocks are compiled one by one."""
    torch._dynamo.reset()
    model = make_model(layers=3)
    compiler = CompileCounter()
    for block in model.blocks:
        # fullgraph: an error if a part of the block cannot be compiled.
        block.forward = torch.compile(block.forward, backend=compiler, fullgraph=True)

    with torch.no_grad():
        for documents in (
            [LONG, SHORT, LONG],
            [SHORT, SHORT, LONG, DROPPED],
            [TEXT] * 5,
        ):
            batch = make_batch(documents, T=128)
            assert len(batch.tokens) == 1
            lo, hi = intervals(batch.image_id, batch.doc_id)
            pos = torch.arange(128) - lo
            model.trunk(torch.randn(1, 128, 32), pos, tile_mask(lo, hi))
            assert compiler.frame_count == 1, documents


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="FlexAttention has no backward on CPU"
)
def test_flex_trains_like_dense(make_model):
    """Catches a model that sees more in training than in measuring. On a GPU, training takes
    FlexAttention, measuring the dense mask: both must agree, forward and backward."""
    batch = make_batch([LONG, SHORT, LONG], T=640)
    inputs = [
        batch.tokens.cuda(),
        batch.image_id.cuda(),
        batch.doc_id.cuda(),
        batch.has_loss.cuda(),
        batch.latents.cuda(),
        batch.t.cuda(),
    ]
    torch.manual_seed(1)
    model = make_model().cuda()

    # 1. Outputs and gradients, once with FlexAttention, once with the dense mask.
    outcomes = []
    for training in (True, False):
        logits, out = model.train(training)(*inputs)
        total = logits.square().mean() + out.square().mean()
        gradients = torch.autograd.grad(total, list(model.parameters()))
        outcomes.append([logits, out, *gradients])
    for flex, dense in zip(*outcomes, strict=True):
        assert torch.allclose(flex, dense, atol=1e-3, rtol=1e-2)

    # 2. Rows of other lengths. FlexAttention wants tiles of 128.
    def cut(T):
        return [x[:, :T] if x.ndim == 2 else x for x in inputs]

    with pytest.raises(ValueError, match="multiple of 128"):
        model.train()(*cut(600))
    model.train()(*cut(160))            # short rows are dense: the Chameleons' 160 positions


# ----------------------------------------------------------------------- the way in and the way out
def test_a_wide_vocabulary_is_padded_and_nobody_sees_it(make_model, monkeypatch):
    """Catches padding that is chosen, that a softmax counts (ln 1152 in place of ln 1025), or that
    changes the files."""
    model = make_model(vocabulary=1025)
    batch = make_batch([LONG, SHORT])
    x = torch.ones(3, 32)
    # All logits of x are negative, so the padding's zeros would be the largest.
    with torch.no_grad():
        model.head.weight.copy_(-model.norm(torch.ones(32)))

    # 1. Note how many rows each matrix has.
    real = torch.nn.functional.linear
    rows = []

    def linear(x, weight, bias=None):
        rows.append(len(weight))
        return real(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)

    # 2. Once padded (1,025 words are above the limit), once as it is.
    outcomes = []
    for wide in (1024, 1026):
        monkeypatch.setattr(model_module, "WIDE", wide)
        logits = model.head(x)
        lm, _, _ = losses(model, batch, Diffusion())
        (gradient,) = torch.autograd.grad(lm, [model.head.weight])
        assert logits.shape == (3, 1025)
        assert gradient.shape == (1025, 32)
        outcomes.append((logits, lm, gradient))

    # 3. The padding was there, and made no difference.
    assert {1152, 1025} <= set(rows)
    for padded, plain in zip(*outcomes, strict=True):
        assert torch.allclose(padded, plain, rtol=1e-5, atol=1e-6)
    assert model.state_dict()["head.weight"].shape == (1025, 32)


@pytest.mark.parametrize("size", ["toy", "small"])
def test_first_weights_speak_equally_loudly(size):
    """Catches words that enter the row faintly beside patches: nothing fails, but the caption is
    heard late (docs/RESULTS.md "What it took"). And branches that make the row grow with depth."""
    torch.manual_seed(0)
    net = Transfusion(sized(size, vocabulary=500, patch_position=True))
    L = net.config.layers
    D = net.config.width

    # 1. The ways in: words and places are about as large as patches.
    x = torch.randn(64, *net.config.latent)
    t = torch.full((64,), 500)
    vectors, _ = net.patch_encoder.encode(x, t)
    patches = vectors.std().item()
    for table in (net.embedding.weight, net.place):
        assert 0.3 < table.std().item() / patches < 1
        assert table.std().item() == pytest.approx(0.5, rel=0.05)

    # 2. The layers: what reads the row keeps its size; what adds to it, 2L times, adds less.
    reads = D ** -0.5
    adds = (2 * L * D) ** -0.5
    for block in net.blocks:
        assert block.qkv.weight.std().item() == pytest.approx(reads, rel=0.05)
        assert block.gate_up.weight.std().item() == pytest.approx(reads, rel=0.05)
        assert block.out.weight.std().item() == pytest.approx(adds, rel=0.05)
        assert block.down.weight.std().item() == pytest.approx(adds, rel=0.05)


class ConvolutionIn(LinearPatches):
    """LinearPatches whose way in is a convolution, as a fork may have it. Without time."""

    def __init__(self, c, p, D, T=1000):
        super().__init__(c, p, D, T)
        self.into = nn.Conv2d(c, D, p, stride=p)

    def encode(self, xt, t):
        """See LinearPatches."""
        vectors = self.into(xt).flatten(2).mT                           # (M, P, D)
        return vectors, xt.shape[2]


def test_a_convolution_may_lead_in(monkeypatch):
    """A first layer that is no nn.Linear must start as loud as one that is. Catches a start that
    asks for the Linear's own `in_features`, and one that forgets the sides of the kernel."""
    monkeypatch.setitem(PATCHES, "convolution", ConvolutionIn)
    net = Transfusion(sized("toy", vocabulary=9, encoder="convolution"))
    xt = torch.randn(64, *net.config.latent)
    vectors, _ = net.encode_pictures(xt, torch.full((64,), 500))
    assert vectors.std().item() == pytest.approx(1, rel=0.1)
