"""
test_patchify.py: a picture becomes a few vectors          (patchify.py; Transfusion §3, §4.3.3)

THE IDEA    Cutting and putting together are inverse, and in the order of reading. Beyond that an
            encoder has random weights here, and the tests ask what may depend on what: a vector on
            its own patch, on the time, and not on the other pictures of its batch.
COMPARED    unpatchify(patchify(x))    with x
            one linear vector          with its formula, patch by patch
            an output                  with the one after a single input has changed
RUN IT      pytest -n 0 tests/test_patchify.py
            Each docstring names the bug that the test catches. "PAPER §4.3": docs/PAPER.md.
"""
import pytest
import torch

from patchify import PATCHES, TimeEmbedding, UNetBlock, UNetPatches, patchify, unpatchify

BOTH = tuple(PATCHES)                                   # and a fork's


def make(encoder, c=4, p=2, D=32):
    """A patch encoder whose layers, the output too, have random weights of ordinary size."""
    # A new output layer may be all zeros: then nothing would depend on anything.
    net = PATCHES[encoder](c, p, D)
    for weight in net.parameters():
        if weight.ndim > 1:
            inputs = weight[0].numel()
            torch.nn.init.normal_(weight, std=inputs ** -0.5)
    return net.requires_grad_(False)


def largest_change(before, after):
    """By how much two tensors differ where they differ most."""
    return (after - before).abs().max()


# --------------------------------------------------------------------- cutting and putting together
@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 4, 8, 16), (1, 1, 16, 8)])
def test_unpatchify_undoes_patchify(shape, p):
    """Catches height and width, or channel and pixel, swapped on the way back: pictures would come
    out scrambled."""
    x = torch.randn(shape)
    height = shape[2]
    patches = patchify(x, p)
    assert torch.equal(unpatchify(patches, p, height), x)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patches_are_in_raster_order(p):
    """Catches patches that are read column by column, or mixed up where the picture is not square.
    Transfusion §3: left to right, top to bottom."""
    c = 3
    h = 4
    w = 8
    x = torch.randn(1, c, h, w)
    patches = patchify(x, p)
    per_row = w // p
    assert patches.shape == (1, (h // p) * per_row, c * p * p)

    for k in range(patches.shape[1]):
        top = k // per_row * p
        left = k % per_row * p
        square = x[0, :, top: top + p, left: left + p]                  # (c, p, p)
        assert torch.equal(patches[0, k], square.flatten())


@pytest.mark.parametrize("p", [3, 8])
def test_indivisible_pictures_raise(p):
    """Catches the last rows and columns cut off without a word."""
    with pytest.raises(ValueError, match=f"latents of 4x4 cannot be cut into {p}x{p} patches"):
        patchify(torch.zeros(1, 4, 4, 4), p)


# ----------------------------------------------------------------------- what both encoders must do
@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("encoder", BOTH)
def test_shapes(encoder, p):
    """Catches a patch size that gives another number of vectors than positions, or a picture of
    another size back, of a wide one, too."""
    net = make(encoder, p=p)
    t = torch.tensor([3, 900])
    for h, w in ((8, 8), (8, 24), (16, 8)):
        xt = torch.randn(2, 4, h, w)
        vectors, kept = net.encode(xt, t)
        out = net.decode(vectors, t, kept)
        assert vectors.shape == (2, (h // p) * (w // p), 32)
        assert out.shape == xt.shape


@pytest.mark.parametrize("encoder", BOTH)
def test_no_picture_is_no_error(encoder):
    """Catches an error for a batch of text alone: it has M = 0 pictures, and must go through."""
    net = make(encoder)
    t = torch.zeros(0, dtype=torch.long)
    vectors, kept = net.encode(torch.zeros(0, 4, 8, 8), t)
    out = net.decode(torch.zeros(0, 16, 32), t, kept)
    assert vectors.shape[0] == 0
    assert out.shape == (0, 4, 8, 8)


@pytest.mark.parametrize("encoder", BOTH)
def test_time_matters_and_is_each_pictures_own(encoder):
    """Catches a t that is never passed on, or one t for the whole batch (PAPER §4.3)."""
    net = make(encoder)
    xt = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)     # the same picture twice
    t = torch.tensor([100, 600])
    vectors, kept = net.encode(xt, t)
    assert largest_change(vectors[0], vectors[1]) > 0.1

    # Each has the vectors that it has alone.
    for k in range(2):
        alone, _ = net.encode(xt[k: k + 1], t[k: k + 1])
        assert torch.allclose(vectors[k], alone[0], atol=1e-5)

    # Neighbouring t must be told apart, too: one step of noise is all that lies between them.
    at_500, _ = net.encode(xt[:1], torch.tensor([500]))
    at_501, _ = net.encode(xt[:1], torch.tensor([501]))
    assert largest_change(at_500, at_501) > 1e-3


@pytest.mark.parametrize("encoder", BOTH)
def test_pictures_of_a_batch_are_independent(encoder):
    """Catches a norm, or attention, over the batch: one picture's noise would leak into another's
    vectors."""
    net = make(encoder)
    xt = torch.randn(3, 4, 8, 8)
    t = torch.tensor([1, 500, 1000])
    changed = xt.clone()
    changed[1] += 1                                     # the picture in the middle

    vectors, kept = net.encode(xt, t)
    vectors2, kept2 = net.encode(changed, t)
    assert torch.equal(vectors[0], vectors2[0])
    assert torch.equal(vectors[2], vectors2[2])

    out = net.decode(vectors, t, kept)
    out2 = net.decode(vectors2, t, kept2)
    assert torch.equal(out[0], out2[0])
    assert torch.equal(out[2], out2[2])
    assert not torch.allclose(out[1], out2[1])


@pytest.mark.parametrize("encoder", BOTH)
def test_inputs_are_left_alone(encoder):
    """Catches noisy latents that the encoder overwrites, or vectors that the decoder does."""
    net = make(encoder)
    xt = torch.randn(1, 4, 8, 8)
    t = torch.tensor([500])
    xt_before = xt.clone()
    vectors, kept = net.encode(xt, t)
    vectors_before = vectors.clone()
    net.decode(vectors, t, kept)
    assert torch.equal(xt, xt_before)
    assert torch.equal(vectors, vectors_before)
    assert t.item() == 500


# ----------------------------------------------------------------------------------- linear patches
def test_time_is_added_before_the_linear_layer():
    """Catches time added after the projection instead of before it (PAPER §4.4; Transfusion §3,
    footnote)."""
    net = make("linear")
    xt = torch.randn(2, 4, 4, 4)
    t = torch.tensor([7, 700])
    vectors, _ = net.encode(xt, t)                                      # (2, 4, 32)
    patches = patchify(xt, 2)                                           # (2, 4, 16)
    time = net.time(t)                                                  # (2, 16)
    for m in range(2):
        for k in range(4):
            told = patches[m, k] + time[m]
            by_hand = net.into.weight @ told + net.into.bias
            assert torch.allclose(vectors[m, k], by_hand, atol=1e-5)


def test_linear_encoder_keeps_patches_apart():
    """Catches a vector made of another patch's pixels, or decoded to another place."""
    net = make("linear")
    xt = torch.randn(1, 4, 4, 8)                        # 2 x 4 patches of 2 x 2
    t = torch.tensor([500])
    vectors, height = net.encode(xt, t)
    out = net.decode(vectors, t, height)
    for k in range(8):
        # 1. Change patch k of the picture: only vector k moves.
        top = 2 * (k // 4)
        left = 2 * (k % 4)
        changed = xt.clone()
        changed[0, :, top: top + 2, left: left + 2] += 1
        others, _ = net.encode(changed, t)
        moved = (others - vectors)[0].abs().sum(-1) > 0                 # (8,)
        assert moved.nonzero().flatten().tolist() == [k]

        # 2. Change vector k: only the four pixels of patch k move.
        poked = vectors.clone()
        poked[0, k] += torch.randn(32)
        out_poked = net.decode(poked, t, height)                        # (1, 4, 4, 8)
        moved = (out_poked - out)[0].abs().sum(0) > 0                   # (4, 8)
        pixels = moved.nonzero()                                        # (4, 2): y, x
        patch_of_pixel = pixels[:, 0] // 2 * 4 + pixels[:, 1] // 2
        assert len(pixels) == 4
        assert (patch_of_pixel == k).all()


# ------------------------------------------------------------------------------------ U-Net patches
def test_unet_needs_a_power_of_two():
    """Catches a patch side of 3 that is rounded to 2 without a word."""
    with pytest.raises(ValueError, match="power of two, got 3"):
        UNetPatches(4, 3, 32)


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_unet_blocks_are_shared_by_the_sizes(p):
    """Catches a U-Net that grows by a set of blocks with each halving: with 8x8 patches it would
    have twice the parameters that it has with 2x2."""
    sizes = p.bit_length()                              # 1, 2, 3, 4: one more for each halving

    # The paper's: twelve blocks each way, however many sizes share them.
    net = UNetPatches(4, p, 32, blocks=12)
    for way in (net.down, net.up):
        assert len(way) == sizes
        assert sum(len(blocks) for blocks in way) == 12

    # The toy's: one block at each size.
    toy = UNetPatches(4, p, 32)
    assert [len(blocks) for blocks in toy.down] == [1] * sizes

    # And it runs.
    xt = torch.randn(2, 4, 8, 8)
    t = torch.tensor([3, 900])
    vectors, kept = net.encode(xt, t)
    assert vectors.shape == (2, (8 // p) ** 2, 32)
    assert net.decode(vectors, t, kept).shape == xt.shape


def test_unets_attention_has_heads_of_64():
    """Catches one head per channel, or one for all, in the wide U-Net of §4.1. It would train, and
    be another network."""
    heads = []
    for channels in (32, 64, 256):
        net = UNetPatches(4, 2, 32, channels=channels)
        smallest = net.down[1][0]                       # the only size with attention
        heads.append(smallest.attention.num_heads)
    assert heads == [1, 1, 4]


def test_unet_decoder_is_told_the_time():
    """Catches an up half of the U-Net that runs without t."""
    net = make("unet")
    xt = torch.randn(1, 4, 8, 8)
    vectors, skips = net.encode(xt, torch.tensor([500]))
    early = net.decode(vectors, torch.tensor([100]), skips)
    late = net.decode(vectors, torch.tensor([900]), skips)
    assert largest_change(early, late) > 1e-2


def test_unet_skips_matter():
    """Catches skips that are collected but never used: fine detail would have to squeeze through
    the transformer."""
    net = make("unet")
    xt = torch.randn(1, 4, 8, 8)
    t = torch.tensor([500])
    vectors, skips = net.encode(xt, t)
    assert len(skips) == 2

    out = net.decode(vectors, t, skips)
    assert len(skips) == 2                              # decode must not eat the caller's list

    for k in range(2):
        without = list(skips)
        without[k] = torch.zeros_like(skips[k])
        out_without = net.decode(vectors, t, without)
        assert largest_change(out, out_without) > 1e-2, f"skip {k} is not read"


# --------------------------------------------------------------------------------------------- time
def test_time_embedding_is_sines_and_cosines_of_t():
    """Catches frequencies that are all too low or too high: some t would look the same to the
    network."""
    # Leave out what is learned: a layer that passes its input on shows the waves themselves.
    embed = TimeEmbedding(8)
    identity = torch.nn.Linear(128, 128, bias=False)
    torch.nn.init.eye_(identity.weight)
    embed.mlp = torch.nn.Sequential(identity)

    waves = embed(torch.arange(1001))                   # 64 sines, then 64 cosines
    assert waves.shape == (1001, 128)
    sines = waves[:, :64]
    cosines = waves[:, 64:]
    assert torch.allclose(sines ** 2 + cosines ** 2, torch.ones(1001, 64), atol=1e-5)

    # The fastest turns once in 2 pi steps.
    assert torch.allclose(sines[:, 0], torch.arange(1001.0).sin(), atol=1e-4)

    # No two t are alike. (Each is alike to itself: leave out the diagonal.)
    distance = torch.cdist(waves, waves) + 9 * torch.eye(1001)
    assert distance.min() > 0.5

    # The slowest still tells the ends apart.
    assert largest_change(sines[0, 63], sines[1000, 63]) > 0.1


@pytest.mark.parametrize("channels", [40, 64, 128, 200, 640])
def test_a_unet_of_any_width(channels):
    """Catches heads that do not divide the channels: 200 of them had 3. The toy's and the paper's
    widths keep one head for 64 channels."""
    block = UNetBlock(channels, channels, 8, attention=True)
    heads = block.attention.num_heads
    assert channels % heads == 0
    if channels % 64 == 0:
        assert heads == channels // 64
    x = torch.randn(1, channels, 2, 2)
    assert block(x, torch.zeros(1, 8)).shape == x.shape
