"""test_model.py: the whole network: who is heard by whom, both losses by hand, and Llama as a second opinion.
Bugs: docs/PAPER.md §4.1, §4.3, §4.4, §4.5, §4.10, here "PAPER §4"."""
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import data
import model as model_module
from attention_mask import dense_mask, intervals, tile_mask
from data import BOI, BOS, DROP, EOI, EOS, PAD, PATCH
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
    transfusion_loss,
    z_loss,
)
from patchify import PATCHES, LinearPatches

WORDS = data.Words("a and blue circle red square the".split())
LONG = ["a red circle", ("image", 0, 1000), "and a blue square", ("image", 1, 1000), "the circle"]
SHORT = ["the square", ("image", 2, 1000)]
DROPPED = [("dropped", "a red square"), ("image", 3, 1000)]
TEXT = ["a red circle and a blue square"]


def make_batch(documents, T=48):
    """The packed Batch of documents, with latents, t and eps. A picture has the same three in every batch it is in."""
    batch = data.pack([data.lay_out(document, WORDS, patches=4) for document in documents], T)

    def normal(index, offset):
        return torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(int(index + offset)))

    batch.latents = torch.stack([normal(k, 100) for k in batch.images]) if len(batch.images) else torch.zeros(0, 4, 4, 4)
    batch.eps = torch.stack([normal(k, 200) for k in batch.images]) if len(batch.images) else torch.zeros(0, 4, 4, 4)
    batch.t = torch.tensor([(50, 400, 700, 990)[k] for k in batch.images], dtype=torch.long)
    return batch


def run(model, batch, xt):
    """(logits (B, T, V) at *every* position, picture outputs (M, c, h, w)) of one training forward."""
    everywhere = torch.ones_like(batch.has_loss)
    with torch.no_grad():
        logits, out = model(batch.tokens, batch.image_id, batch.doc_id, everywhere, xt, batch.t)
    return logits.view(*batch.tokens.shape, -1), out


def differs(a, b):
    """For each position (or picture), whether anything at all has changed, to the bit."""
    return (a != b).flatten(1).any(1).tolist()


# ------------------------------------------------------------------------------------------------ leaks, by perturbation
def test_a_word_changes_nothing_before_it(model):
    """The mask is built and never passed on, or is a column off: the model reads the word it should predict (PAPER §4.1)."""
    batch = make_batch([LONG, SHORT])
    assert len(batch.tokens) == 1                       # both documents share a row
    before, pictures = run(model, batch, batch.latents)
    for k in (batch.tokens[0] >= len(data.SPECIAL)).nonzero().flatten().tolist():
        old = batch.tokens[0, k].item()
        batch.tokens[0, k] = WORDS.ids["red"] if old != WORDS.ids["red"] else WORDS.ids["blue"]
        after, pictures_after = run(model, batch, batch.latents)
        batch.tokens[0, k] = old
        same_document = batch.doc_id[0] == batch.doc_id[0, k]
        heard = [bool(same_document[q]) and q >= k for q in range(48)]
        assert differs(before[0], after[0]) == heard, f"the word at {k} is heard at other positions than those after it"
        for m in range(3):
            first = (batch.image_id[0] == m).nonzero()[0].item()
            assert differs(pictures, pictures_after)[m] == heard[first], f"word {k}, picture {m}"


def test_a_picture_changes_nothing_before_it(model):
    """"Both are patches" instead of "same picture": picture 2 leaks into picture 1; or BOI sees the picture (PAPER §4.1)."""
    batch = make_batch([LONG, SHORT])
    before, pictures = run(model, batch, batch.latents)
    for m in range(3):
        noisier = batch.latents.clone()
        noisier[m] += torch.randn(4, 4, 4)
        after, pictures_after = run(model, batch, noisier)
        place = (batch.image_id[0] == m).nonzero().flatten()
        same_document = batch.doc_id[0] == batch.doc_id[0, place[0]]
        assert differs(before[0], after[0]) == [bool(same_document[q]) and q >= place[0] for q in range(48)], f"picture {m}"
        # Pictures 0 and 1 are one document, 2 is another: 1 depends on 0, and that is all.
        assert differs(pictures, pictures_after) == [m == 0, m in (0, 1), m == 2], f"picture {m}"


@pytest.mark.parametrize("bidirectional", [True, False])
def test_one_patch_is_heard_by_all_patches_of_its_picture(make_model, bidirectional):
    """Causal attention inside a picture although bidirectional was asked for, and the other way round (PAPER §4.1, Table 3)."""
    model, batch = make_model(bidirectional=bidirectional), make_batch([SHORT])
    _, before = run(model, batch, batch.latents)
    corners = [(0, 0), (0, 2), (2, 0), (2, 2)]          # of the four 2x2 patches, in raster order
    for k, (y, x) in enumerate(corners):
        changed = batch.latents.clone()
        changed[0, :, y: y + 2, x: x + 2] += 1
        _, after = run(model, batch, changed)
        heard = [bool((before[0] != after[0])[:, i: i + 2, j: j + 2].any()) for i, j in corners]
        assert heard == ([True] * 4 if bidirectional else [q >= k for q in range(4)])


def test_patches_know_their_place(make_model):
    """All patches of a picture share one position: the model cannot tell left from right (PAPER §4.5)."""
    model, batch = make_model(), make_batch([SHORT])
    turned = torch.cat([batch.latents[..., 2:], batch.latents[..., :2]], -1)            # the left half and the right half
    out, out_turned = (run(model, batch, xt)[1] for xt in (batch.latents, turned))
    assert (torch.cat([out_turned[..., 2:], out_turned[..., :2]], -1) - out).abs().max() > 1e-2


def test_patch_position_is_added(make_model):
    """--patch-position changes nothing, or is the same vector for every patch."""
    model, batch = make_model(patch_position=True), make_batch([SHORT])
    assert model.place.shape == (4, 32)
    _, before = run(model, batch, batch.latents)
    for k in range(4):
        with torch.no_grad():
            model.place[k] += torch.randn(32)
        _, after = run(model, batch, batch.latents)
        assert not torch.allclose(after, before, atol=1e-4), f"place {k} is not read"
        before = after


def test_places_are_not_slots(model, monkeypatch):
    """A cache that writes keys where RoPE sees them: with two patches at one place, one would be lost."""
    places = []

    def two_at_one_place(pos, image_id):
        places.append(torch.where(image_id >= 0, pos // 2, pos))
        return places[-1]

    batch = make_batch([SHORT], T=10)                   # <bos> the square <boi> . . . . <eoi> <eos>
    _, plain = run(model, batch, batch.latents)
    monkeypatch.setattr(model, "rope_positions", two_at_one_place)
    _, wanted = run(model, batch, batch.latents)
    assert not torch.allclose(wanted, plain, atol=1e-3)                 # RoPE sees them
    pos, cache = torch.arange(10)[None], Cache(model.config, 1, 10, model.head.weight)
    with torch.no_grad():
        model.read(batch.tokens[:, :4], batch.image_id[:, :4], torch.zeros(0, 4, 4, 4), pos[:, :4], cache)
        out = model.denoise(batch.latents, batch.t, pos[:, 4:8], cache)
    assert [row.tolist() for row in places] == [[[0, 1, 2, 3, 2, 2, 3, 3, 8, 9]], [[0, 1, 2, 3]], [[2, 2, 3, 3]]]
    assert torch.allclose(out, wanted, atol=1e-5)


def test_packing_changes_nothing(model):
    """Documents in one row see each other, or the second one's positions start where the first one's ended."""
    batch = make_batch([LONG, SHORT, DROPPED], T=64)
    together, pictures = run(model, batch, batch.latents)
    assert len(batch.tokens) == 1
    m = 0
    for d, document in enumerate([LONG, SHORT, DROPPED][k] for k in (0, 2, 1)):         # `pack` puts the longest first
        alone = make_batch([document], T=40)
        logits, out = run(model, alone, alone.latents)
        n = int((alone.tokens != PAD).sum())
        assert torch.allclose(together[0, batch.doc_id[0] == d], logits[0, :n], atol=1e-4)
        assert torch.allclose(pictures[m: m + len(out)], out, atol=1e-4)
        m += len(out)
    assert m == 4


def test_pictures_go_to_their_own_places(model):
    """Two rows whose pictures are handed out in the wrong order: each row alone must give what it gives in the batch."""
    joint = make_batch([LONG, SHORT, DROPPED], T=31)
    assert len(joint.tokens) == 2
    logits, out = run(model, joint, joint.latents)
    m = 0
    for b, documents in enumerate(([LONG], [DROPPED, SHORT])):
        alone = make_batch(documents, T=31)
        logits_alone, out_alone = run(model, alone, alone.latents)
        assert torch.equal(alone.tokens[0], joint.tokens[b])
        assert torch.allclose(logits[b], logits_alone[0], atol=1e-4)
        assert torch.allclose(out[m: m + len(out_alone)], out_alone, atol=1e-4)
        m += len(out_alone)


# ------------------------------------------------------------------------------------------------------------- the losses
@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_network_is_told_the_t_that_noised_the_picture(model, kind, monkeypatch):
    """The t that noises is not the t that is told; or one t per batch; or noise comes after patchification (PAPER §4.3, §4.4)."""
    batch, d, told = make_batch([LONG, SHORT]), Diffusion(kind), {}

    def spy(name, real):
        def listening(x, t, *kept):
            told[name] = x, t
            return real(x, t, *kept)
        monkeypatch.setattr(model.patch_encoder, name, listening)

    spy("encode", model.patch_encoder.encode)
    spy("decode", model.patch_encoder.decode)
    losses(model, batch, d)
    assert told["encode"][1].tolist() == told["decode"][1].tolist() == batch.t.tolist() == [50, 400, 700]
    for m, t in enumerate(batch.t.tolist()):            # eq. 2 on the latent picture, one by one
        mixed = d.a[t].item() * batch.latents[m] + d.s[t].item() * batch.eps[m]
        assert torch.allclose(told["encode"][0][m], mixed, atol=1e-5)


def test_noise_skip_adds_the_noisy_picture_before_eq_3(model):
    """Sampled with the path beside the network but trained without it: the loss falls, and what is drawn is noise."""
    batch, d = make_batch([LONG, SHORT]), Diffusion(noise_skip=True)
    _, _, per_picture = losses(model, batch, d)
    xt = d.add_noise(batch.latents, batch.eps, batch.t)
    _, out = run(model, batch, xt)
    a, s = d.at(batch.t, xt)
    by_hand = (batch.eps - s * xt - a * out).square().flatten(1).mean(1)
    assert torch.allclose(per_picture, by_hand, rtol=1e-5)
    assert not torch.allclose(per_picture, losses(model, batch, Diffusion())[2], rtol=1e-2)


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_losses_by_hand(model, kind):
    """A target one place off, loss where the input is BOI or a patch, EOI as a target, loss on dropped captions (PAPER §4.8),
    a sum where a mean is meant: everything once more in plain loops, from the paper's words (§3, eq. 1-4)."""
    documents, d = [LONG, SHORT, DROPPED], Diffusion(kind)
    batch = make_batch(documents, T=64)
    lm, words, per_picture = losses(model, batch, d)
    logits, out = run(model, batch, d.add_noise(batch.latents, batch.eps, batch.t))
    tokens, by_hand, how_many = batch.tokens[0].tolist(), 0.0, 0
    for k in range(len(tokens) - 1):
        now, then = tokens[k], tokens[k + 1]
        if now in (BOI, PATCH, EOS, PAD):               # what comes next is a picture, EOI, another document, or nothing
            continue
        if now == DROP or then == DROP:                 # our choice: a dropped caption teaches no word, nor its BOI
            continue
        row = logits[0, k].double()
        by_hand -= (row[then] - row.exp().sum().log()).item()
        how_many += 1
    assert words == how_many and lm.item() == pytest.approx(by_hand, rel=1e-4)
    assert per_picture.shape == (4,)
    for m in range(4):
        eps, x0 = batch.eps[m].flatten().tolist(), batch.latents[m].flatten().tolist()
        wanted = eps if kind == "ddpm" else [e - x for e, x in zip(eps, x0, strict=True)]
        error = [(w - o) ** 2 for w, o in zip(wanted, out[m].flatten().tolist(), strict=True)]
        assert per_picture[m].item() == pytest.approx(sum(error) / len(error), rel=1e-4)


def test_what_is_learned():
    """LM loss where the input is BOI or a patch, EOI predicted, BOI or a word never predicted (§3; PAPER §4.8)."""
    batch = make_batch([LONG, SHORT, DROPPED], T=64)
    tokens, has_loss = batch.tokens[0].tolist(), batch.has_loss[0].tolist()
    inputs = [tokens[k] for k in range(64) if has_loss[k]]
    targets = [tokens[k + 1] for k in range(64) if has_loss[k]]
    assert not {BOI, PATCH, EOS, PAD, DROP} & set(inputs)
    assert not {EOI, PATCH, BOS, PAD, DROP} & set(targets)
    assert targets.count(BOI) == 3 and targets.count(EOS) == 3          # the dropped caption's BOI is not learned
    written = [token for token in tokens if token >= len(data.SPECIAL)]
    assert [token for token in targets if token >= len(data.SPECIAL)] == written


def test_micro_batches_add_up(model):
    """A mean of means: words in short batches weigh more, pictures in small ones too (PAPER §4.10)."""
    d = Diffusion()
    lm, words, per_picture = losses(model, make_batch([LONG, SHORT, DROPPED, TEXT], T=80), d)
    parts = [losses(model, make_batch(documents, T), d) for documents, T in (([LONG], 30), ([SHORT], 10), ([DROPPED, TEXT], 22))]
    assert sum(part[1] for part in parts) == words
    assert sum(part[0] for part in parts).item() == pytest.approx(lm.item(), rel=1e-5)
    assert torch.allclose(torch.cat([part[2] for part in parts]).sort().values, per_picture.sort().values, atol=1e-4)


def test_transfusion_loss_by_hand():
    """eq. 4 with lambda on the other loss, a loss divided by the other's count, or a step of text alone that divides by 0."""
    lm_sum, diff_sum = torch.tensor(30.0), torch.tensor(8.0)
    assert transfusion_loss(lm_sum, 10, diff_sum, 4).item() == pytest.approx(30 / 10 + 5 * 8 / 4)
    assert transfusion_loss(lm_sum, 10, diff_sum, 4, lam=2.0).item() == pytest.approx(30 / 10 + 2 * 8 / 4)
    assert transfusion_loss(lm_sum, 10, torch.tensor(0.0), 0).item() == pytest.approx(3)
    assert transfusion_loss(lm_sum, 10, diff_sum, 1).item() == pytest.approx(30 / 10 + 5 * 8)          # a step with one picture


def test_transfusion_loss_adds_up_over_micro_batches(model):
    """A mean of micro-batch means (PAPER §4.10): gradients of two micro-batches, divided by the step's counts, are those of one."""
    d, gradients = Diffusion(), []
    step = [LONG, SHORT, DROPPED, TEXT]
    for micro_batches in ([(step, 80)], [([LONG], 30), ([SHORT], 10), ([DROPPED, TEXT], 22)]):
        model.zero_grad()
        parts = [losses(model, make_batch(documents, T), d) for documents, T in micro_batches]
        n_text, M = sum(part[1] for part in parts), sum(len(part[2]) for part in parts)
        for lm_sum, _, per_picture in parts:
            transfusion_loss(lm_sum, n_text, per_picture.sum(), M).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for whole, summed in zip(*gradients, strict=True):
        assert torch.allclose(whole, summed, rtol=1e-3, atol=1e-4 * whole.abs().max().item())


def test_denominator_loss_by_hand():
    """Z without its logarithm, a mean in place of the sum, or bfloat16 (8 bits of a number near 10, squared)."""
    logits = (3 * torch.randn(5, 16)).bfloat16()
    by_hand = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits.tolist())
    assert z_loss(logits).item() == pytest.approx(1e-5 * by_hand, rel=1e-5)


@pytest.mark.parametrize("encoder", ["linear", "unet"])
def test_losses_at_the_start(encoder):
    """"Is this loss normal?" (PAPER §4.14): ln V before any learning, and the size of the noise itself."""
    model = Transfusion(ModelConfig(vocabulary=len(WORDS), latent=(4, 4, 4), layers=2, width=64, heads=2, encoder=encoder))
    batch = make_batch([LONG, SHORT, DROPPED])
    lm, words, per_picture = losses(model, batch, Diffusion())
    assert lm.item() / words == pytest.approx(math.log(len(WORDS)), abs=0.1)
    assert torch.allclose(per_picture, batch.eps.square().flatten(1).mean(1)) and 0.7 < per_picture.mean() < 1.3


@pytest.mark.parametrize("encoder", ["linear", "unet"])
def test_one_batch_is_learned_by_heart(encoder):
    """Something that no gradient reaches: a model that cannot memorise one document has a broken wire."""
    model = Transfusion(ModelConfig(vocabulary=len(WORDS), latent=(4, 4, 4), layers=2, width=64, heads=2, encoder=encoder))
    batch, d = make_batch([LONG], T=30), Diffusion()
    optimizer, history = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(60):
        lm, words, per_picture = losses(model, batch, d)
        history.append((lm.item() / words, per_picture.mean().item()))
        optimizer.zero_grad()
        (lm / words + per_picture.mean()).backward()
        optimizer.step()
    missing = [name for name, w in model.named_parameters() if w.grad is None or not w.grad.any()]
    assert not missing, f"no gradient reaches {missing}"
    assert history[-1][0] < 0.05 * history[0][0] and history[-1][1] < 0.3 * history[0][1], (history[0], history[-1])


@pytest.mark.parametrize("encoder", ["linear", "unet"])
def test_text_alone_is_a_batch(make_model, encoder):
    """A batch without any picture crashes: with small batches it is only a question of time until one is drawn."""
    model = make_model(encoder)
    lm, words, per_picture = losses(model, make_batch([TEXT]), Diffusion())
    (lm / words + per_picture.sum()).backward()
    assert words == 8 and per_picture.shape == (0,) and model.head.weight.grad.any()


def test_inputs_are_left_alone(model):
    """A forward that writes into the batch: the second use of the same batch is another one."""
    batch, before = make_batch([LONG, SHORT]), make_batch([LONG, SHORT])
    losses(model, batch, Diffusion())
    for name, value in vars(before).items():
        if name != "generator":                         # none here: t and eps are drawn already
            assert torch.equal(getattr(batch, name), value), name


# ------------------------------------------------------------------------------------------------- mistakes of the caller
@pytest.mark.parametrize("how_many", [1, 3])
def test_wrong_number_of_pictures_raises(model, how_many):
    """Pictures beyond the places (or places beyond the pictures) silently left out."""
    batch = make_batch([DROPPED, SHORT])
    x = torch.randn(how_many, 4, 4, 4)
    with pytest.raises(ValueError, match=f"8 patch positions, but {how_many} pictures of 4 patches"):
        model(batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, x, torch.ones(how_many, dtype=torch.long))


@pytest.mark.parametrize("shape, t", [((2, 4, 8, 8), (2,)), ((2, 3, 4, 4), (2,)), ((2, 4, 4, 4), (1,)), ((2, 4, 4, 4), ())])
def test_wrong_picture_shapes_raise(model, shape, t):
    """One t that broadcasts over all pictures (PAPER §4.3), or latents of another size."""
    with pytest.raises(ValueError, match=r"pictures must be \(M, 4, 4, 4\) with one t each"):
        model.encode_pictures(torch.zeros(shape), torch.ones(t, dtype=torch.long))


def test_impossible_configurations_raise():
    """A width or a patch side that fails much later, inside a reshape."""
    with pytest.raises(ValueError, match="width 30 must be divisible"):
        ModelConfig(vocabulary=9, width=30, heads=2)
    with pytest.raises(ValueError, match="latents of 4x4 cannot be cut into 3x3"):
        ModelConfig(vocabulary=9, latent=(4, 4, 4), patch=3)
    with pytest.raises(ValueError, match="a picture of 64 patches.* does not fit in a context of 65: raise --seq-len or --patch"):
        ModelConfig(vocabulary=9, latent=(4, 16, 16), context=65)
    assert ModelConfig(vocabulary=9, latent=(4, 16, 16), context=66).patches == 64
    with pytest.raises(ValueError, match="choose from mini, midi, toy, small"):
        sized("8b", vocabulary=9)


# --------------------------------------------------------------------------------------------------- Llama, second opinion
def llama(V, L, hidden, D=32, N=2):
    """transformers' LlamaForCausalLM, with `hidden` as wide as our block's, random weights in every layer, the norms too."""
    transformers = pytest.importorskip("transformers", reason="the second opinion on the block needs `transformers`")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=hidden, num_hidden_layers=L, num_attention_heads=N,
        num_key_value_heads=N, rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=64,
        tie_word_embeddings=False, attn_implementation="eager")).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.3)            # norms around 1, the rest around 0
    return theirs.requires_grad_(False)


def copy_layer(layer, block):
    """Weights of a transformers LlamaDecoderLayer into our Block."""
    a, m = layer.self_attn, layer.mlp
    block.load_state_dict({
        "norm1.weight": layer.input_layernorm.weight, "norm2.weight": layer.post_attention_layernorm.weight,
        "qkv.weight": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]), "out.weight": a.o_proj.weight,
        "gate_up.weight": torch.cat([m.gate_proj.weight, m.up_proj.weight]), "down.weight": m.down_proj.weight})


def test_block_is_llamas():
    """Norm after instead of before, SwiGLU's halves swapped, RoPE in the other layout, q and k exchanged."""
    block = Block(32, 2)
    theirs = llama(V=9, L=1, hidden=block.down.in_features)
    copy_layer(theirs.model.layers[0], block)
    x, pos, T = torch.randn(2, 10, 32), torch.stack([torch.arange(10), torch.arange(30, 40)]), 10
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    wanted = theirs.model.layers[0](x, attention_mask=torch.where(mask, 0.0, -torch.inf)[None, None],
                                    position_embeddings=theirs.model.rotary_emb(x, pos))
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    ours = block(x, rope_tables(pos, 16), mask[None, None].expand(2, 1, T, T))
    assert torch.allclose(ours, wanted, atol=1e-4)


def test_text_model_is_llama(make_model):
    """The final norm missing, embeddings tied, layers in another order: words alone must come out as Llama's do."""
    model = make_model(vocabulary=len(WORDS))
    theirs = llama(V=len(WORDS), L=2, hidden=model.blocks[0].down.in_features)
    for layer, block in zip(theirs.model.layers, model.blocks, strict=True):
        copy_layer(layer, block)
    for ours, weight in ((model.embedding, theirs.model.embed_tokens), (model.norm, theirs.model.norm), (model.head, theirs.lm_head)):
        ours.load_state_dict(weight.state_dict())
    tokens = torch.randint(len(data.SPECIAL), len(WORDS), (2, 12))
    pos, cache = torch.arange(12).expand(2, 12), Cache(model.config, 2, 12, model.head.weight)
    with torch.no_grad():
        logits = model.read(tokens, torch.full_like(tokens, -1), torch.zeros(0, 4, 4, 4), pos, cache)
    assert torch.allclose(logits, theirs(tokens).logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("D, N, hidden", [(768, 12, 2048), (1024, 16, 2816), (1536, 24, 4096), (2048, 16, 5632), (4096, 32, 11008),
                                          (128, 4, 512)])
def test_hidden_width_is_llamas(D, N, hidden):
    """8/3 of the width, rounded up to a multiple of 256, as Llama has it (7B: 11008)."""
    with torch.device("meta"):
        block = Block(D, N)
    assert block.down.in_features == hidden and block.gate_up.out_features == 2 * hidden
    assert 8 * D / 3 <= hidden < 8 * D / 3 + 256


def test_parameter_counts():
    """A bias, a tied embedding or another hidden size: the 7B text part is Llama 2 7B to the last parameter (Table 8)."""
    assert PAPER_VOCABULARY == 32000 + len(data.SPECIAL)
    for size in PAPER_SIZES:
        model = paper_model(size)
        layers, D, _ = SIZES[size]
        text = count(model) - count(model.patch_encoder) - 2 * len(data.SPECIAL) * D         # with Llama 2's 32,000 pieces alone
        hidden = 256 * math.ceil(8 * D / 3 / 256)
        assert text == 2 * 32000 * D + layers * (4 * D * D + 3 * D * hidden + 2 * D) + D
        if size == "7b":
            assert text == 6_738_415_616
        assert text / 1e9 == pytest.approx(float(size[:-1]), rel=0.04), size
        assert count(model.patch_encoder) < 0.005 * count(model), "linear: below 0.5% in every configuration (§4.1)"


def test_sizes_are_table_8s():
    """A typing error in the table of sizes."""
    assert {size: SIZES[size] for size in PAPER_SIZES} == {
        "0.16b": (16, 768, 12), "0.37b": (24, 1024, 16), "0.76b": (24, 1536, 24), "1.4b": (24, 2048, 16), "7b": (32, 4096, 32)}


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_unet_adds_the_papers_parameters(patch):
    """Another U-Net at another width or patch side: §4.1 has the same 0.27B "across all configurations"."""
    for size in PAPER_SIZES:
        assert count(paper_model(size, "unet", patch).patch_encoder) == pytest.approx(0.27e9, rel=0.05), size
    assert count(Transfusion(sized("toy", vocabulary=9, encoder="unet")).patch_encoder) == 581_956       # the toy keeps its own
    # The toys' feed-forward layers are rounded to 128, and to 256.
    assert [count(Transfusion(sized(size, vocabulary=9))) for size in ("toy", "small")] == [896_928, 1_618_336]


# ------------------------------------------------------------------------------------------------------- FlexAttention
def test_flex_trunk_is_the_dense_trunk(make_model):
    """Layers that read the wrong form of the mask, or a first layer that spoils it for the next."""
    model, batch = make_model(), make_batch([LONG, SHORT, LONG], T=128)
    lo, hi = intervals(batch.image_id, batch.doc_id)
    x, pos = torch.randn(*batch.tokens.shape, 32), torch.arange(128) - lo
    with torch.no_grad():
        assert torch.allclose(model.trunk(x, pos, tile_mask(lo, hi)), model.trunk(x, pos, dense_mask(lo, hi)), atol=1e-5)


def test_blocks_compile_once(make_model):
    """A compile per layer or per layout: 32 layers, or every batch, times many seconds. Blocks are compiled one by one."""
    torch._dynamo.reset()
    model, compiled = make_model(layers=3), CompileCounter()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=compiled, fullgraph=True)      # fullgraph: no break inside
    with torch.no_grad():
        for documents in ([LONG, SHORT, LONG], [SHORT, SHORT, LONG, DROPPED], [TEXT] * 5):
            batch = make_batch(documents, T=128)
            assert len(batch.tokens) == 1
            lo, hi = intervals(batch.image_id, batch.doc_id)
            model.trunk(torch.randn(1, 128, 32), torch.arange(128) - lo, tile_mask(lo, hi))
            assert compiled.frame_count == 1, documents


def test_a_wide_vocabulary_is_padded_and_nobody_sees_it(make_model, monkeypatch):
    """Padding that is chosen, that a softmax counts (ln 1152 in place of ln 1025), or that changes the files."""
    model, batch = make_model(vocabulary=1025), make_batch([LONG, SHORT])
    with torch.no_grad():
        model.head.weight.copy_(-model.norm(torch.ones(32)))            # the padding's zeros would be the largest logits
    x = torch.ones(3, 32)
    real, rows, found = torch.nn.functional.linear, [], []

    def linear(x, weight, bias=None):
        rows.append(len(weight))
        return real(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    for wide in (1024, 1026):                           # padded, as it is
        monkeypatch.setattr(model_module, "WIDE", wide)
        logits = model.head(x)
        lm, _, _ = losses(model, batch, Diffusion())
        gradient, = torch.autograd.grad(lm, [model.head.weight])
        found.append((logits, lm, gradient))
        assert logits.shape == (3, 1025) and gradient.shape == (1025, 32)
    assert {1152, 1025} <= set(rows)
    for padded, plain in zip(*found, strict=True):
        assert torch.allclose(padded, plain, rtol=1e-5, atol=1e-6)
    assert model.state_dict()["head.weight"].shape == (1025, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has no backward on CPU")
def test_flex_trains_like_dense(make_model):
    """On a GPU, training takes FlexAttention, measuring the dense mask: both must see the same, forward and backward."""
    found, batch = [], make_batch([LONG, SHORT, LONG], T=640)
    inputs = [x.cuda() for x in (batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, batch.latents, batch.t)]
    torch.manual_seed(1)
    model = make_model().cuda()
    for training in (True, False):
        logits, out = model.train(training)(*inputs)
        found.append([logits, out, *torch.autograd.grad(logits.square().mean() + out.square().mean(), list(model.parameters()))])
    for flex, dense in zip(*found, strict=True):
        assert torch.allclose(flex, dense, atol=1e-3, rtol=1e-2)
    with pytest.raises(ValueError, match="multiple of 128"):
        model.train()(*[x[:, :600] if x.ndim == 2 else x for x in inputs])
    model.train()(*[x[:, :160] if x.ndim == 2 else x for x in inputs])  # short rows are dense: the Chameleons' 160 positions


@pytest.mark.parametrize("size", ["toy", "small"])
def test_first_weights_speak_equally_loudly(size):
    """Words that enter the row faintly beside patches: nothing fails, but the caption is heard late (docs/RESULTS.md "What it took").
    And branches that add up to a row that grows with depth."""
    torch.manual_seed(0)
    net = Transfusion(sized(size, vocabulary=500, patch_position=True))
    L, D = net.config.layers, net.config.width
    patches = net.patch_encoder.encode(torch.randn(64, *net.config.latent), torch.full((64,), 500))[0].std().item()
    for vectors in (net.embedding.weight, net.place):
        assert 0.3 < vectors.std().item() / patches < 1
        assert vectors.std().item() == pytest.approx(0.5, rel=0.05)
    for block in net.blocks:
        for layer, expected in ((block.qkv, D ** -0.5), (block.gate_up, D ** -0.5), (block.out, (2 * L * D) ** -0.5), (block.down, (2 * L * D) ** -0.5)):
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)


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
