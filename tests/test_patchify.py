"""test_patchify.py: pictures to vectors and back, with both encoders. Bugs: docs/PAPER.md §4.3, §4.4, here "PAPER §4"."""
import pytest
import torch

from patchify import PATCHES, TimeEmbedding, UNetPatches, patchify, unpatchify

BOTH = tuple(PATCHES)                                   # and a fork's


def make(encoder, c=4, p=2, D=32):
    """A patch encoder whose layers, the output too, have random weights of ordinary size."""
    net = PATCHES[encoder](c, p, D)
    for weight in net.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return net.requires_grad_(False)


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 4, 8, 16), (1, 1, 16, 8)])
def test_unpatchify_undoes_patchify(shape, p):
    """Height and width, or channel and pixel, swapped on the way back: pictures come out scrambled."""
    x = torch.randn(shape)
    assert torch.equal(unpatchify(patchify(x, p), p, shape[2]), x)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patches_are_in_raster_order(p):
    """Patches column by column (Transfusion §3: left to right, top to bottom), or mixed up on a picture that is not square."""
    c, h, w = 3, 4, 8
    x = torch.randn(1, c, h, w)
    patches = patchify(x, p)
    assert patches.shape == (1, (h // p) * (w // p), c * p * p)
    for k in range(patches.shape[1]):
        row, column = k // (w // p), k % (w // p)
        square = x[0, :, row * p: (row + 1) * p, column * p: (column + 1) * p]
        assert torch.equal(patches[0, k], square.flatten())


@pytest.mark.parametrize("p", [3, 8])
def test_indivisible_pictures_raise(p):
    """The last rows and columns silently cut off."""
    with pytest.raises(ValueError, match=f"latents of 4x4 cannot be cut into {p}x{p} patches"):
        patchify(torch.zeros(1, 4, 4, 4), p)


def test_unet_needs_a_power_of_two():
    """A patch side of 3 rounded to 2 without a word."""
    with pytest.raises(ValueError, match="power of two, got 3"):
        UNetPatches(4, 3, 32)


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_unet_blocks_are_shared_by_the_sizes(p):
    """A U-Net that grows by a set of blocks with each halving: 8x8 patches would have twice the parameters of 2x2."""
    net = UNetPatches(4, p, 32, blocks=12)
    for way in (net.down, net.up):
        assert sum(len(blocks) for blocks in way) == 12 and len(way) == p.bit_length()
    assert [len(blocks) for blocks in UNetPatches(4, p, 32).down] == [1] * p.bit_length()   # the toy's: one each
    xt, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    vectors, kept = net.encode(xt, t)
    assert vectors.shape == (2, (8 // p) ** 2, 32) and net.decode(vectors, t, kept).shape == xt.shape


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("encoder", BOTH)
def test_shapes(encoder, p):
    """A patch size that gives another number of vectors than positions, or a picture of another size back: of one that is wide, too."""
    net, t = make(encoder, p=p), torch.tensor([3, 900])
    for h, w in ((8, 8), (8, 24), (16, 8)):
        xt = torch.randn(2, 4, h, w)
        vectors, kept = net.encode(xt, t)
        assert vectors.shape == (2, (h // p) * (w // p), 32)
        assert net.decode(vectors, t, kept).shape == xt.shape


def test_unets_attention_has_heads_of_64():
    """One head per channel, or one for all: §4.1's U-Net is wide. Catches a number that trains and is another network."""
    heads = [UNetPatches(4, 2, 32, channels=C).down[1][0].attention.num_heads for C in (32, 64, 256)]
    assert heads == [1, 1, 4]


@pytest.mark.parametrize("encoder", BOTH)
def test_no_picture_is_no_error(encoder):
    """A batch of text alone has M = 0 pictures, and must go through."""
    net, t = make(encoder), torch.zeros(0, dtype=torch.long)
    vectors, kept = net.encode(torch.zeros(0, 4, 8, 8), t)
    assert vectors.shape[0] == 0 and net.decode(torch.zeros(0, 16, 32), t, kept).shape == (0, 4, 8, 8)


@pytest.mark.parametrize("encoder", BOTH)
def test_time_matters_and_is_each_pictures_own(encoder):
    """t never passed on, or one t for the whole batch (PAPER §4.3)."""
    net, xt, t = make(encoder), torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([100, 600])
    vectors, kept = net.encode(xt, t)
    assert (vectors[0] - vectors[1]).abs().max() > 0.1                  # the same picture, another t
    for k in range(2):
        alone, _ = net.encode(xt[k: k + 1], t[k: k + 1])
        assert torch.allclose(vectors[k], alone[0], atol=1e-5)
    # Neighbouring t must be told apart too: one step of noise is all that lies between them.
    assert (net.encode(xt[:1], torch.tensor([500]))[0] - net.encode(xt[:1], torch.tensor([501]))[0]).abs().max() > 1e-3


def test_unet_decoder_is_told_the_time():
    """The up half of the U-Net runs without t."""
    net, xt = make("unet"), torch.randn(1, 4, 8, 8)
    vectors, skips = net.encode(xt, torch.tensor([500]))
    early, late = (net.decode(vectors, torch.tensor([t]), skips) for t in (100, 900))
    assert (early - late).abs().max() > 1e-2


def test_time_is_added_before_the_linear_layer():
    """Time added after the projection instead of before it (PAPER §4.4; Transfusion §3, footnote)."""
    net, xt, t = make("linear"), torch.randn(2, 4, 4, 4), torch.tensor([7, 700])
    vectors, _ = net.encode(xt, t)
    for m in range(2):
        for k in range(4):
            patch = patchify(xt, 2)[m, k] + net.time(t)[m]
            assert torch.allclose(vectors[m, k], net.into.weight @ patch + net.into.bias, atol=1e-5)


def test_linear_encoder_keeps_patches_apart():
    """Patch k's vector made of another patch's pixels, or decoded to another place."""
    net, xt, t = make("linear"), torch.randn(1, 4, 4, 8), torch.tensor([500])
    vectors, height = net.encode(xt, t)
    for k in range(8):
        row, column = 2 * (k // 4), 2 * (k % 4)
        changed = xt.clone()
        changed[0, :, row: row + 2, column: column + 2] += 1
        moved = (net.encode(changed, t)[0] - vectors)[0].abs().sum(-1) > 0
        assert moved.nonzero().flatten().tolist() == [k]
        poked = vectors.clone()
        poked[0, k] += torch.randn(32)
        difference = (net.decode(poked, t, height) - net.decode(vectors, t, height))[0].abs().sum(0) > 0
        where = difference.nonzero()
        assert (where[:, 0] // 2 * 4 + where[:, 1] // 2 == k).all() and len(where) == 4


def test_unet_skips_matter():
    """Skips collected but never used: fine detail has to squeeze through the transformer."""
    net, xt, t = make("unet"), torch.randn(1, 4, 8, 8), torch.tensor([500])
    vectors, skips = net.encode(xt, t)
    assert len(skips) == 2
    out = net.decode(vectors, t, skips)
    assert len(skips) == 2                              # decode must not eat the caller's list
    for k in range(2):
        without = [torch.zeros_like(s) if j == k else s for j, s in enumerate(skips)]
        assert (net.decode(vectors, t, without) - out).abs().max() > 1e-2, f"skip {k} is not read"


@pytest.mark.parametrize("encoder", BOTH)
def test_pictures_of_a_batch_are_independent(encoder):
    """A norm or attention over the batch: one picture's noise leaks into another's vectors."""
    net, xt, t = make(encoder), torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 1000])
    vectors, kept = net.encode(xt, t)
    changed = xt.clone()
    changed[1] += 1
    others, kept2 = net.encode(changed, t)
    assert torch.equal(vectors[0], others[0]) and torch.equal(vectors[2], others[2])
    out, out2 = net.decode(vectors, t, kept), net.decode(others, t, kept2)
    assert torch.equal(out[0], out2[0]) and torch.equal(out[2], out2[2]) and not torch.allclose(out[1], out2[1])


def test_time_embedding_is_sines_and_cosines_of_t():
    """Frequencies that are all too low or too high: some t look the same to the network."""
    embed = TimeEmbedding(8)
    embed.mlp = torch.nn.Sequential(torch.nn.Linear(128, 128, bias=False))             # leave out what is learned
    torch.nn.init.eye_(embed.mlp[0].weight)
    waves = embed(torch.arange(1001))
    assert waves.shape == (1001, 128) and torch.allclose(waves[:, :64] ** 2 + waves[:, 64:] ** 2, torch.ones(1001, 64), atol=1e-5)
    assert torch.allclose(waves[:, 0], torch.arange(1001.0).sin(), atol=1e-4)          # the fastest turns once in 2 pi steps
    distance = torch.cdist(waves, waves) + 9 * torch.eye(1001)
    assert distance.min() > 0.5                                                        # no two t are alike
    assert (waves[1000, 63] - waves[0, 63]).abs() > 0.1                                # the slowest still tells the ends apart


@pytest.mark.parametrize("encoder", BOTH)
def test_inputs_are_left_alone(encoder):
    """Noisy latents overwritten by the encoder, vectors by the decoder."""
    net, xt, t = make(encoder), torch.randn(1, 4, 8, 8), torch.tensor([500])
    before = xt.clone()
    vectors, kept = net.encode(xt, t)
    vectors_before = vectors.clone()
    net.decode(vectors, t, kept)
    assert torch.equal(xt, before) and torch.equal(vectors, vectors_before) and t.item() == 500
