"""
test_chameleon.py: the rivals read and write what they should
                                              (chameleon.py; Transfusion §4.1 "Baseline", Table 2)

THE IDEA    A tiny random Chameleon: a picture of 8x8 pixels is 4x4 codes, each one of 11. Its
            decoder, which has a cache, must draw the codes that one forward of the whole sequence
            for each code would have it draw. Its blocks are written out once more, and compared
            with transformers' Chameleon. Then whole runs of both rivals, and the user's mistakes.
TRY IT      pytest -n 0 tests/test_chameleon.py
"""
import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import chameleon
import data
import evaluate
import model as model_module
import sample
import train
from chameleon import Decoder, view
from data import BOI, BOS, DROP, EOI, EOS
from diffusion import Diffusion
from metrics.gap import conditioning_gap
from sample import pictures_of
from small_runs import log, small_run, write_files
from support import checkpoint
from support.checkpoint import Trained, decode_latents, encode_pixels, load_trained, save_trained
from support.common import ASSETS, Stopped, UserError
from vae import VAE, VAEConfig

WORDS = data.Words("a and blue circle red square the".split())
V = len(WORDS)                                          # words; the first code has id V
K = 11                                                  # codes


@pytest.fixture
def trained(make_model):
    """A Trained with a random Chameleon, stable blocks included, and a VQ-VAE that has learned
    nothing."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=8, multipliers=(1, 2), codes=K))
    model = make_model(
        "linear", vocabulary=V + K, latent=(4, 4, 4), patch=1, stable=True, context=64
    )
    return Trained(
        model.requires_grad_(False), WORDS, vae.eval(), Diffusion("ddpm"), "chameleon"
    )


def generate(trained, prompts, **options):
    """sample.generate with the Chameleon's decoder."""
    return sample.generate(trained, prompts, decoder=Decoder, **options)


def some_codes(n, seed=0):
    """(n, 4, 4) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(K, (n, 4, 4), generator=generator)


def forward(trained, document, pictures):
    """Logits (n, V + K) at all n positions of a document, by one training forward.

    document   as `data.lay_out` takes it
    pictures   (M, 4, 4) codes"""
    spelled = view("chameleon", V)(document, pictures)
    row = data.lay_out(spelled, WORDS, 0, ends=False)
    batch = data.pack([row], len(row.tokens))
    everywhere = torch.ones_like(batch.has_loss)
    no_pictures = torch.zeros(0, 4, 4, 4)
    no_t = torch.zeros(0, dtype=torch.long)
    logits, _ = trained.model(
        batch.tokens, batch.image_id, batch.doc_id, everywhere, no_pictures, no_t
    )
    return logits


def slowly(trained, text, seed, guidance):
    """The codes of a picture for a text, (4, 4): one forward of the whole sequence per code."""
    generator = torch.Generator().manual_seed(seed)
    # `grow` draws noise first, for both decoders alike.
    torch.randn(trained.model.config.latent, generator=generator)
    codes = torch.zeros(1, 4, 4, dtype=torch.long)
    for k in range(16):
        # The position that predicts code k is BOI, code 0, ... Behind it stand 16 - k codes, EOI.
        at = -2 - (16 - k)
        logits = forward(trained, [text, ("image", 0, 0)], codes)[at, V:]               # (K,)
        if guidance != 1:
            blind = forward(trained, [("dropped", text), ("image", 0, 0)], codes)[at, V:]
            logits = blind + guidance * (logits - blind)
        p = logits.softmax(-1)
        codes.view(-1)[k] = torch.multinomial(p, 1, generator=generator)
    return codes[0]


# ------------------------------------------------------------------------------------------ layout
def test_what_each_model_reads():
    """Catches codes that overlap the words' ids, pictures in another order than raster, a loss that
    leaves out codes, and a Llama that sees <drop>, <boi>, or nothing of a dropped caption."""
    codes = some_codes(2)
    document = [("dropped", "a red circle"), ("image", 1, 1000), ("image", 0, 500), "the square"]

    # 1. The Chameleon.
    row = data.lay_out(view("chameleon", V)(document, codes), WORDS, 0)
    ids = (V + codes.flatten(1)).tolist()               # of two pictures, 16 each
    assert row.tokens == [
        BOS, DROP, DROP, DROP,
        BOI, *ids[1], EOI,
        BOI, *ids[0], EOI,
        *WORDS.encode("the square"), EOS,
    ]
    assert row.images == []
    assert set(row.image_id) == {-1}
    assert min(ids[1]) >= V
    # All of both pictures has a loss: at BOI, at the codes, at EOI. Then the words.
    assert row.has_loss == [False] * 4 + [True] * (2 * 18 + 2) + [False]

    # 2. The Llama.
    row = data.lay_out(view("llama", None)(document, None), WORDS, 0)
    assert row.tokens == [BOS, *WORDS.encode("a red circle the square"), EOS]
    assert all(row.has_loss[:-1])

    # 3. Transfusion reads the document itself.
    assert view("transfusion", None) is None


def test_codes_are_read_in_order(trained):
    """Catches a picture whose codes may look at later ones, as Transfusion's mask allows: they
    would be trivial to predict."""
    one = some_codes(1)
    two = some_codes(1)
    two[0, 2, 3] = (two[0, 2, 3] + 1) % K               # the twelfth code

    before = forward(trained, ["a circle", ("image", 0, 0)], one)
    after = forward(trained, ["a circle", ("image", 0, 0)], two)
    changed = (before - after).abs().amax(-1) > 1e-6
    first = 1 + 2 + 1 + 11                              # BOS, words, BOI, eleven codes
    assert not changed[:first].any()
    assert changed[first:].all()


# ---------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("guidance", [1.0, 2.0, 3.0])
def test_cached_is_uncached(trained, guidance):
    """Catches a code at the wrong place of the cache, a blind row of another length, guidance on
    the words' logits, too, and a first code that is not predicted by BOI."""
    (document,) = generate(
        trained, [["a red circle"]], draw_now=True, max_words=0, seed=[5], guidance=guidance
    )
    assert document[0] == "a red circle"
    assert torch.equal(document[1], slowly(trained, "a red circle", 5, guidance))


def test_a_batch_is_its_rows(trained):
    """Catches rows that disturb each other: rows of unequal length, one of them with a picture in
    its prompt, must decode as they do alone, words and codes."""
    prompts = [
        ["a red circle"],
        ["the"],
        ["a square", some_codes(1)[0], "and the blue circle"],
    ]
    options = dict(draw_now=True, max_words=3, max_pictures=2)
    together = generate(trained, prompts, seed=[1, 2, 3], **options)
    for prompt, seed, row in zip(prompts, (1, 2, 3), together):
        (alone,) = generate(trained, [prompt], seed=[seed], **options)
        assert len(alone) == len(row)
        for a, b in zip(alone, row):
            if isinstance(a, str):
                assert a == b
            else:
                assert torch.equal(a, b)
        assert len(pictures_of(row)) > len(pictures_of(prompt))


def test_after_a_picture_the_model_has_read_it(trained):
    """Catches a cache that keeps other codes than were drawn, or those of the blind branch: what
    follows must read the picture."""
    decoder = Decoder(trained, [["a circle"], ["the red square"]], draw_now=True)
    generators = [torch.Generator().manual_seed(k) for k in (0, 1)]
    shape = torch.zeros(2, 4, 4, 4)
    codes_to_go = []                                    # what the progress bar shows
    for left, *_ in decoder.diffusion_steps([0, 1], shape, generator=generators):
        codes_to_go.append(left)
    assert codes_to_go == list(range(15, -1, -1))

    for b, text in enumerate(["a circle", "the red square"]):
        picture = decoder.latents[b][0]
        whole = forward(trained, [text, ("image", 0, 0)], picture[None])
        assert torch.allclose(decoder.logits[b], whole[-1], atol=1e-5)


def test_words_and_codes_keep_apart(trained):
    """Catches a code in a caption, or a word in a picture: the random model likes either."""
    # Make codes the likeliest everywhere, then the unlikeliest.
    trained.model.head.weight[V:] += 5
    for sign in (1, -1):
        trained.model.head.weight *= sign
        documents = generate(
            trained, [[some_codes(1)[0]], ["a"]], max_words=4, max_pictures=1, temperature=1.0
        )
        for document in documents:
            for part in document:
                if isinstance(part, str):
                    assert all(word in WORDS.ids for word in part.split())

    (document,) = generate(trained, [["a"]], draw_now=True, max_words=0)
    codes = document[-1]
    assert codes.shape == (4, 4)
    assert 0 <= codes.min()
    assert codes.max() < K


def test_codes_and_pixels(trained):
    """Catches a function of support/checkpoint.py that serves one kind of model only: pixels become
    codes, and codes become pixels."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    codes = encode_pixels(trained, pixels)
    assert codes.shape == (3, 4, 4)
    assert codes.dtype == torch.long
    assert decode_latents(trained, codes).shape == pixels.shape


# ------------------------------------------------------------------------- the network and its loss
def test_stable_block(make_model):
    """Post-norm and query-key norm, written out. Catches a norm that is left out, or that stands
    before the layer as Llama's does."""
    torch.manual_seed(1)
    block = model_module.Block(16, 2, 16, stable=True)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    x = torch.randn(1, 5, 16)                                           # (B, T, D)
    rope = model_module.rope_tables(torch.arange(5)[None], 8)
    mask = torch.ones(5, 5).tril().bool()[None, None]                   # (B, 1, T, T)

    def rms_norm(y, layer):
        size = (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return y / size * layer.weight

    def heads(y, layer):
        """Queries or keys (B, T, N, K), normalised and turned: (B, N, T, K)."""
        y = F.layer_norm(y, (8,), layer.weight, layer.bias)
        return model_module.rotate(y.transpose(1, 2), *rope)

    # 1. Attention: norms of queries and keys, then a norm of what attention adds.
    q, k, v = block.qkv(x).view(1, 5, 3, 2, 8).unbind(2)                # each (B, T, N, K)
    q = heads(q, block.norm_q)                                          # (B, N, T, K)
    k = heads(k, block.norm_k)                                          # (B, N, T, K)
    v = v.transpose(1, 2)                                               # (B, N, T, K)
    scores = q @ k.transpose(2, 3) / 8 ** 0.5                           # (B, N, T, T)
    scores = scores.masked_fill(~mask, -torch.inf)
    y = scores.softmax(-1) @ v                                          # (B, N, T, K)
    y = y.transpose(1, 2).reshape(1, 5, 16)                             # (B, T, D)
    h = x + rms_norm(block.out(y), block.norm1)

    # 2. Feed-forward, and a norm of what it adds.
    gate, up = block.gate_up(h).chunk(2, -1)
    y = block.down(F.silu(gate) * up)
    wanted = h + rms_norm(y, block.norm2)
    assert torch.allclose(block(x, rope, mask), wanted, atol=1e-5)


def copy_block(block, theirs):
    """Weights of our stable Block into a transformers ChameleonSwinDecoderLayer."""
    attention = theirs.self_attn
    mlp = theirs.mlp
    q, k, v = block.qkv.weight.chunk(3)
    gate, up = block.gate_up.weight.chunk(2)
    for layer, weight in [
        (attention.q_proj, q),
        (attention.k_proj, k),
        (attention.v_proj, v),
        (attention.o_proj, block.out.weight),
        (mlp.gate_proj, gate),
        (mlp.up_proj, up),
        (mlp.down_proj, block.down.weight),
        (theirs.input_layernorm, block.norm1.weight),
        (theirs.post_attention_layernorm, block.norm2.weight),
    ]:
        layer.weight.data.copy_(weight)

    # They keep a norm for each head; ours share one, so theirs get copies.
    N = block.N
    for layer, ours in ((attention.q_norm, block.norm_q), (attention.k_norm, block.norm_k)):
        layer.weight.data.copy_(ours.weight.expand(N, -1))
        layer.bias.data.copy_(ours.bias.expand(N, -1))


def test_stable_block_is_chameleons():
    """The second opinion: the published model's own layer (its 34B's, with norms after) with random
    weights, norms included. Catches what test_stable_block and the block get wrong together."""
    published = pytest.importorskip(
        "transformers.models.chameleon.modeling_chameleon",
        reason="the second opinion needs `transformers`",
    )
    from transformers import ChameleonConfig

    D = 32                                              # width
    N = 2                                               # heads
    block = model_module.Block(D, N, stable=True)
    config = ChameleonConfig(
        hidden_size=D,
        intermediate_size=block.down.in_features,
        num_attention_heads=N,
        num_key_value_heads=N,
        rms_norm_eps=1e-5,
        swin_norm=True,
        attn_implementation="eager",
    )
    theirs = published.ChameleonSwinDecoderLayer(config, 0).eval()
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    copy_block(block, theirs)

    x = torch.randn(2, 10, D)                                           # (B, T, D)
    pos = torch.arange(10).expand(2, 10)                                # (B, T)
    mask = torch.ones(10, 10).tril().bool()                             # (T, T)
    # Theirs is told by a number that is added to the scores: 0, may look; minus infinity, may not.
    wanted = theirs(
        x,
        attention_mask=torch.where(mask, 0.0, -torch.inf)[None, None],
        position_ids=pos,
        position_embeddings=published.ChameleonRotaryEmbedding(config)(x, pos),
    )
    if isinstance(wanted, tuple):                       # older releases give the scores, too
        wanted = wanted[0]
    ours = block(x, model_module.rope_tables(pos, D // N), mask[None, None])
    assert torch.allclose(ours, wanted, atol=1e-4)


def test_denominator_loss(trained):
    """1e-5 (ln Z)^2 per token, and only for the stable model. Catches Z without its logarithm, and
    a mean in place of the sum."""
    document = ["a red circle", ("image", 0, 0)]
    codes = some_codes(1)
    row = data.lay_out(view("chameleon", V)(document, codes), WORDS, 0)
    batch = replace(
        data.pack([row], 32),
        latents=torch.zeros(0, 4, 4, 4),
        t=torch.zeros(0, dtype=torch.long),
        eps=torch.zeros(0, 4, 4, 4),
    )
    trained.model.head.weight *= 100                    # ln Z far from 0
    losses = model_module.losses
    plain, words, per_picture = losses(trained.model, batch, trained.diffusion)
    stable, _, _ = losses(trained.model, batch, trained.diffusion, stable=True)

    # All positions but that of EOS predict something, and these are all that `forward` gives.
    logits = forward(trained, document, codes)
    log_z = torch.log(torch.exp(logits.double()).sum(-1))
    by_hand = 1e-5 * log_z.square().sum().item()
    assert words == 22
    assert len(logits) == 22
    assert len(per_picture) == 0
    assert (stable - plain).item() == pytest.approx(by_hand, rel=1e-3)
    assert stable > plain + 1e-3


# ---------------------------------------------------------------------------- the conditioning gap
def test_the_gap_tells_a_caption_that_is_heard(trained):
    """Catches right against right, and words that are counted as codes. A model whose codes depend
    on the caption's first word alone has a gap; a deaf one has none."""

    class Says(torch.nn.Module):
        """After "a" it expects code 3 everywhere, after another first word code 7."""

        def __init__(self, heard):
            super().__init__()
            self.config = trained.model.config
            self.heard = heard                          # False: it expects nothing
            self.one = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, image_id, doc_id, has_loss, xt, t):
            B, T = tokens.shape
            logits = torch.zeros(B, T, V + K)
            for b in range(B):
                for q in range(1, T):
                    start = (doc_id[b] == doc_id[b, q]).nonzero()[0, 0]
                    first_word = tokens[b, start + 1]
                    code = 3 if first_word == WORDS.ids["a"] else 7
                    logits[b, q, V + code] = 4.0 * self.heard
            return logits[has_loss], None

    captions = ["a circle", "the circle", "a square"]
    codes = torch.tensor([3, 7, 3]).view(3, 1, 1).expand(3, 4, 4)
    # The third picture's other caption begins as its own does: there it has no gap.
    gap = conditioning_gap(Says(True), WORDS, None, captions, codes)
    assert gap == pytest.approx(4.0 * 2 / 3)
    assert conditioning_gap(Says(False), WORDS, None, captions, codes) == 0


def test_the_gap_reads_what_training_lays_out(trained):
    """Against one forward of each document as training has it. Catches a missing BOI, and codes of
    another picture."""
    captions = ["a circle", "the red square"]
    codes = some_codes(2)

    def nats(text, k):
        """Nats per code of picture k after a text."""
        boi = len(text.split()) + 1                     # behind <bos> and the words
        logits = forward(trained, [text, ("image", k, 0)], codes)
        log_p = logits[boi: boi + 16].log_softmax(-1)                   # (16, V + K)
        ids = V + codes[k].flatten()                                    # (16,)
        return -log_p.gather(1, ids[:, None]).mean().item()

    wanted = 0.0
    for k in range(2):
        wrong = nats(captions[1 - k], k)
        right = nats(captions[k], k)
        wanted += (wrong - right) / 2
    gap = conditioning_gap(trained.model, WORDS, None, captions, codes)
    assert gap == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted) > 1e-3


# -------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def tiny_vq(tmp_path_factory):
    """A file with an untrained VQ-VAE for pictures of 32x32 pixels: 8x8 codes, each one of 19."""
    path = tmp_path_factory.mktemp("vq") / "vae.pt"
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=4, multipliers=(1, 1, 1), z=2, codes=19))
    checkpoint.save(path, checkpoint.pack_vae(vae))
    return path


def rival(name, vae, out, *more, **options):
    """The argument list of a small run of a rival. vae: a path, or None for a model without."""
    given = dict(
        vae=vae,
        out=out,
        steps=4,
        samples=6,
        sample_steps=2,
        seq_len=160,
        gap_every=2,
        patch=2,
    )
    given.update(options)
    if vae is None:
        del given["vae"]
    return small_run(**given) + ["--model", name, *more]


def test_a_chameleon_from_training_to_picture(tiny_vq, tmp_path, capsys):
    """Catches a command that does not serve a Chameleon: train, report, draw, describe, evaluate.
    Its loss has no diffusion part."""
    run = tmp_path / "run"
    model = str(run / "model.pt")
    picture = str(tmp_path / "x.png")

    # 1. Train and report.
    train.main(rival("chameleon", tiny_vq, run, "--stable"))
    rows = log(run)
    assert all(row["diffusion"] is None for row in rows)
    assert "gap" in rows[-1]
    report = json.loads((run / "report.json").read_text())
    assert {"exact", "captions", "alone", "deductions", "conditioning_gap"} <= report.keys()
    assert "excess_nats" not in report
    assert (run / "samples.png").stat().st_size > 1000

    # 2. What was saved.
    trained = load_trained(model)
    assert trained.model.config.stable
    assert trained.model.config.vocabulary == len(trained.tokenizer) + 19
    assert trained.vae.config.codes == 19

    # 3. Draw, describe, evaluate.
    sample.main(["a red circle", "--checkpoint", model, "-o", picture], decoder=Decoder)
    sample.main(["--image", picture, "--checkpoint", model], decoder=Decoder)
    evaluate.main(["--checkpoint", model, "--n", "3", "--world", "one"])
    printed = capsys.readouterr().out
    assert "wrote" in printed
    assert "mean over categories, exact" in printed
    assert "language entropy" not in printed


def test_a_chameleon_stops_and_goes_on(tiny_vq, tmp_path):
    """Catches codes, or their order, that are drawn anew: a run that was stopped after two steps
    must end as one that was not."""
    train.main(rival("chameleon", tiny_vq, tmp_path / "one", samples=0))

    with pytest.MonkeyPatch.context() as patch:
        real = train.train_step

        def interrupted(run):
            if run.step == 1:
                signal.raise_signal(signal.SIGINT)
            return real(run)

        patch.setattr(train, "train_step", interrupted)
        with pytest.raises(Stopped):
            train.main(rival("chameleon", tiny_vq, tmp_path / "two", samples=0))
    train.main(rival("chameleon", tiny_vq, tmp_path / "two", "--resume", samples=0))

    one = load_trained(tmp_path / "one" / "model.pt").model.state_dict()
    two = load_trained(tmp_path / "two" / "model.pt").model.state_dict()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_a_chameleon_of_digits(tmp_path):
    """Catches a preset that serves scenes only. There is no VQ-VAE at hand, so one is trained, with
    as many codes as asked."""
    write_files("mnist", tmp_path / "files")
    report = train.main([
        "--preset", "chameleon",
        "--data", "mnist",
        "--data-dir", str(tmp_path / "files"),
        "--documents", "6",
        "--steps", "2",
        "--samples", "2",
        "--codes", "30",
        "--vae-steps", "2",
        "--out", str(tmp_path / "run"),
    ])
    assert load_trained(tmp_path / "run/model.pt").vae.config.codes == 30
    assert {"guided", "captions"} <= report.keys()


def test_a_llama_learns_words_alone(tmp_path):
    """Catches a picture in a Llama's documents, and a report that would ask it to draw."""
    run = tmp_path / "run"
    train.main(rival("llama", None, run))

    report = json.loads((run / "report.json").read_text())
    assert {"alone", "deductions"} <= report.keys()
    assert not {"exact", "captions", "conditioning_gap"} & report.keys()
    for row in log(run):
        assert row["diffusion"] is None
        assert "gap" not in row
    assert not (run / "samples.png").exists()


# ------------------------------------------------------------------------------ the user's mistakes
def mistakes(tiny_vq):
    """{what is wrong: (command line of train.py, what the sentence must contain)}"""
    vq = str(tiny_vq)
    chameleon = ["--model", "chameleon"]
    llama = ["--model", "llama"]
    scenes_vae = str(ASSETS / "scenes_vae.pt")
    scenes = str(ASSETS / "scenes.pt")
    return {
        "a VAE without codes": ([*chameleon, "--vae", scenes_vae], "vqvae"),
        "a VQ-VAE for Transfusion": (["--vae", vq], "'vae'"),
        "edits": ([*llama, "--preset", "edit"], "learns from scenes"),
        "patches that it has not": ([*chameleon, "--encoder", "unet"], "is Transfusion's"),
        "init of another kind": ([*chameleon, "--init", scenes], "is a transfusion"),
        "codes that the file has not": (
            [*chameleon, "--vae", vq, "--codes", "20"], "19 codes, not 20"
        ),
        "codes for no one": (["--codes", "20"], "--model chameleon"),
        "a Llama of digits": ([*llama, "--data", "mnist"], "learns from scenes"),
        "too many codes for the context": (
            [*chameleon, "--vae", vq, "--seq-len", "40"], "context"
        ),
        "noise limit": (["--t-limit", "0"], "--t-limit"),
        "text that there is not": (
            ["--text-share", "0.5", "--data", "mnist"], "--text-share"
        ),
    }


@pytest.mark.parametrize("what", mistakes(""))
def test_mistakes(tiny_vq, tmp_path, what):
    """Catches a mistake that has no sentence which names what to change, or that leaves files
    behind."""
    line, sentence = mistakes(tiny_vq)[what]
    with pytest.raises(ValueError, match=sentence):
        train.main([*line, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_each_program_has_its_models(trained, tmp_path, monkeypatch, capsys):
    """Catches a Chameleon's file that makes sample.py crash or draw noise, and a Transfusion's
    given to chameleon.py: one sentence must name the other program. Without arguments chameleon.py
    shows what each model reads."""
    monkeypatch.chdir(tmp_path)
    save_trained("chameleon.pt", trained)

    # 1. The wrong program.
    sentence = (r"chameleon.pt is a chameleon: "
                r'python chameleon.py "..." --checkpoint chameleon.pt$')
    with pytest.raises(UserError, match=sentence):
        sample.main(["a circle", "--checkpoint", "chameleon.pt"])
    with pytest.raises(UserError, match=r"scenes.pt is a transfusion: python sample.py"):
        chameleon.main(["a circle", "--checkpoint", str(ASSETS / "scenes.pt")])
    assert list(tmp_path.iterdir()) == [tmp_path / "chameleon.pt"]

    # 2. The right one.
    chameleon.main(["a red circle", "--checkpoint", "chameleon.pt"])
    assert "wrote sample.png (1 picture," in capsys.readouterr().out
    assert (tmp_path / "sample.png").exists()

    # 3. No arguments.
    monkeypatch.setattr(chameleon, "demo", lambda: print("the demo"))
    monkeypatch.setattr("sys.argv", ["chameleon.py"])
    chameleon.main()
    assert capsys.readouterr().out == "the demo\n"


def test_what_a_chameleon_cannot_do(trained, tmp_path):
    """Catches a request that fails after minutes of drawing. Edits and films of the noise belong to
    Transfusion, pictures not to a Llama; this is said before anything is drawn."""
    model = str(tmp_path / "model.pt")
    picture = str(tmp_path / "x.png")
    where = ["--checkpoint", model, "--out", str(tmp_path / "y.png")]
    trained.vae = VAE(VAEConfig(channels=4, multipliers=(1, 2), codes=K)).eval()
    save_trained(model, trained)
    Image.new("RGB", (8, 8)).save(picture)

    for line in (
        ["a circle", "--film", str(tmp_path / "f.png")],
        ["--image", picture, "--edit", "the circle"],
    ):
        with pytest.raises(UserError, match="Transfusion"):
            sample.main(line + where, decoder=Decoder)
    for what in ("edits", "mixtures"):
        with pytest.raises(UserError, match="cannot be measured"):
            evaluate.main(["--checkpoint", model, "--data", what])

    trained.kind = "llama"
    save_trained(model, trained)
    with pytest.raises(UserError, match="words only"):
        sample.main(["a circle", *where], decoder=Decoder)
