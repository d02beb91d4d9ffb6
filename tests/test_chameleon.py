"""test_chameleon.py: the rivals read and write what they should              (chameleon.py; Transfusion §4.1 "Baseline", Table 2)

A tiny random Chameleon: pictures of 8x8 pixels are 4 x 4 codes out of 11. Its decoder, with a cache, must draw the codes that
one forward of the whole sequence would have it draw.
"""
import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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
from small_runs import log, small_run, write_files
from support import checkpoint
from support.checkpoint import Trained, decode_latents, encode_pixels, load_trained, save_trained
from support.common import ASSETS, Stopped, UserError
from vae import VAE, VAEConfig

WORDS, CODES = data.Words("a and blue circle red square the".split()), 11
V = len(WORDS)


@pytest.fixture
def trained(make_model):
    """A Trained with a random Chameleon, stable blocks included, and a VQ-VAE that has learned nothing."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=8, multipliers=(1, 2), codes=CODES))
    return Trained(make_model("linear", vocabulary=V + CODES, latent=(4, 4, 4), patch=1, stable=True, context=64).requires_grad_(False),
               WORDS, vae.eval(), Diffusion("ddpm"), "chameleon")


def generate(trained, prompts, **options):
    """sample.generate with the Chameleon's decoder."""
    return sample.generate(trained, prompts, decoder=Decoder, **options)


def some_codes(n, seed=0):
    """(n, 4, 4) int64."""
    return torch.randint(CODES, (n, 4, 4), generator=torch.Generator().manual_seed(seed))


def forward(trained, document, pictures):
    """Logits (n, V + K) at all n positions of a document, by one training forward. document: as `data.lay_out` takes it."""
    row = data.lay_out(view("chameleon", V)(document, pictures), WORDS, 0, ends=False)
    batch = data.pack([row], len(row.tokens))
    return trained.model(batch.tokens, batch.image_id, batch.doc_id, torch.ones_like(batch.has_loss), torch.zeros(0, 4, 4, 4),
                     torch.zeros(0, dtype=torch.long))[0]


def slowly(trained, text, seed, guidance):
    """The codes of a picture for a text, by one forward of the whole sequence for each code."""
    generator, codes = torch.Generator().manual_seed(seed), torch.zeros(1, 4, 4, dtype=torch.long)
    torch.randn(trained.model.config.latent, generator=generator)           # `grow` draws noise first, for both decoders alike
    for k in range(16):
        at = -2 - (16 - k)                                              # the position that predicts code k: BOI, code 0, ...
        logits = forward(trained, [text, ("image", 0, 0)], codes)[at, V:]
        if guidance != 1:
            without = forward(trained, [("dropped", text), ("image", 0, 0)], codes)[at, V:]
            logits = without + guidance * (logits - without)
        codes.view(-1)[k] = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    return codes[0]


# ----------------------------------------------------------------------------------------------------------------- layout
def test_what_each_model_reads():
    """Catches codes that overlap the words' ids, pictures in another order than raster, a loss that leaves out codes, and a
    Llama that sees <drop>, <boi>, or nothing of a dropped caption."""
    codes = some_codes(2)
    document = [("dropped", "a red circle"), ("image", 1, 1000), ("image", 0, 500), "the square"]
    row = data.lay_out(view("chameleon", V)(document, codes), WORDS, 0)
    spelled = [[BOI, *(V + codes[k].flatten()).tolist(), EOI] for k in (1, 0)]
    assert row.tokens == [BOS, DROP, DROP, DROP, *spelled[0], *spelled[1], *WORDS.encode("the square"), EOS]
    assert row.images == [] and set(row.image_id) == {-1} and min(spelled[0][1:-1]) >= V
    assert row.has_loss == [False] * 4 + [True] * 38 + [False]             # all of both pictures: from BOI, from codes, from EOI
    llama = data.lay_out(view("llama", None)(document, None), WORDS, 0)
    assert llama.tokens == [BOS, *WORDS.encode("a red circle the square"), EOS] and all(llama.has_loss[:-1])
    assert view("transfusion", None) is None            # the document itself


def test_codes_are_read_in_order(trained):
    """Catches a picture whose codes may look at later ones (Transfusion's mask), which would make them trivial to predict."""
    one, two = some_codes(1), some_codes(1)
    two[0, 2, 3] = (two[0, 2, 3] + 1) % CODES                           # the twelfth code
    a, b = (forward(trained, ["a circle", ("image", 0, 0)], codes) for codes in (one, two))
    changed = (a - b).abs().amax(-1) > 1e-6
    first = 1 + 2 + 1 + 11                                              # BOS, words, BOI, eleven codes
    assert not changed[:first].any() and changed[first:].all()


# --------------------------------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("guidance", [1.0, 2.0, 3.0])
def test_cached_is_uncached(trained, guidance):
    """Catches a code at the wrong place of the cache, a blind row of another length, guidance on words' logits too, and a
    first code that is not predicted by BOI."""
    drawn = generate(trained, [["a red circle"]], draw_now=True, max_words=0, seed=[5], guidance=guidance)[0]
    assert drawn[0] == "a red circle" and torch.equal(drawn[1], slowly(trained, "a red circle", 5, guidance))


def test_a_batch_is_its_rows(trained):
    """Rows of unequal length, one of them with a picture in its prompt, decode as they do alone, words and codes."""
    prompts = [["a red circle"], ["the"], ["a square", some_codes(1)[0], "and the blue circle"]]
    together = generate(trained, prompts, draw_now=True, max_words=3, max_pictures=2, seed=[1, 2, 3])
    for prompt, seed, row in zip(prompts, (1, 2, 3), together):
        alone = generate(trained, [prompt], draw_now=True, max_words=3, max_pictures=2, seed=[seed])[0]
        assert len(alone) == len(row) and all(a == b if isinstance(a, str) else torch.equal(a, b) for a, b in zip(alone, row))
        assert sum(not isinstance(part, str) for part in row) > sum(not isinstance(part, str) for part in prompt)


def test_after_a_picture_the_model_has_read_it(trained):
    """Catches a cache that keeps other codes than were drawn, or the blind branch's: what follows must read the picture."""
    decoder = Decoder(trained, [["a circle"], ["the red square"]], draw_now=True)
    left = []                                           # codes that are still to come, for the bar
    for t, *_ in decoder.diffusion_steps([0, 1], torch.zeros(2, 4, 4, 4), generator=[torch.Generator().manual_seed(k) for k in (0, 1)]):
        left.append(t)
    assert left == [*range(15, -1, -1)]
    for b, text in enumerate(["a circle", "the red square"]):
        whole = forward(trained, [text, ("image", 0, 0)], decoder.latents[b][0][None])
        assert torch.allclose(decoder.logits[b], whole[-1], atol=1e-5)


def test_words_and_codes_keep_apart(trained):
    """Catches a code in a caption, or a word in a picture: the random model likes either."""
    trained.model.head.weight[V:] += 5                                      # codes are the likeliest everywhere, or the unlikeliest
    for sign in (1, -1):
        trained.model.head.weight *= sign
        document = generate(trained, [[some_codes(1)[0]], ["a"]], max_words=4, max_pictures=1, temperature=1.0)
        text = " ".join(part for parts in document for part in parts if isinstance(part, str))
        assert all(word in WORDS.ids for word in text.split())
    codes = generate(trained, [["a"]], draw_now=True, max_words=0)[0][-1]
    assert codes.shape == (4, 4) and 0 <= codes.min() <= codes.max() < CODES


def test_codes_and_pixels(trained):
    """support/checkpoint.py's two functions serve both kinds of model: codes there and back are the codes."""
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    codes = encode_pixels(trained, pixels)
    assert codes.shape == (3, 4, 4) and codes.dtype == torch.long and decode_latents(trained, codes).shape == pixels.shape


# ------------------------------------------------------------------------------------------------ the network and its loss
def test_stable_block(make_model):
    """Post-norm and query-key norm, written out: catches a norm that is left out, or stands before the layer as Llama's does."""
    torch.manual_seed(1)
    block = model_module.Block(16, 2, 16, stable=True)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, pos = torch.randn(1, 5, 16), torch.arange(5)[None]
    rope, mask = model_module.rope_tables(pos, 8), torch.ones(5, 5).tril().bool()[None, None]
    q, k, v = block.qkv(x).view(1, 5, 3, 2, 8).unbind(2)
    q, k = (F.layer_norm(y, (8,), norm.weight, norm.bias) for y, norm in ((q, block.norm_q), (k, block.norm_k)))
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    q, k = model_module.rotate(q, *rope), model_module.rotate(k, *rope)
    y = ((q @ k.transpose(2, 3) / 8 ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(1, 5, 16)

    def norm(y, layer):
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight

    h = x + norm(block.out(y), block.norm1)
    gate, up = block.gate_up(h).chunk(2, -1)
    assert torch.allclose(block(x, rope, mask), h + norm(block.down(F.silu(gate) * up), block.norm2), atol=1e-5)


def test_stable_block_is_chameleons():
    """The published model's own layer (its 34B's, with norms after), random weights, norms included. transformers keeps a norm
    for each head; ours share one, so theirs get copies."""
    published = pytest.importorskip("transformers.models.chameleon.modeling_chameleon", reason="the second opinion needs `transformers`")
    from transformers import ChameleonConfig
    block, (D, N, K) = model_module.Block(32, 2, stable=True), (32, 2, 16)
    config = ChameleonConfig(hidden_size=D, intermediate_size=block.down.in_features, num_attention_heads=N, num_key_value_heads=N,
                             rms_norm_eps=1e-5, swin_norm=True, attn_implementation="eager")
    theirs = published.ChameleonSwinDecoderLayer(config, 0).eval()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    a, m = theirs.self_attn, theirs.mlp
    gate, up = block.gate_up.weight.chunk(2)
    for layer, weight in [*zip((a.q_proj, a.k_proj, a.v_proj), block.qkv.weight.chunk(3)), (a.o_proj, block.out.weight),
                          (m.gate_proj, gate), (m.up_proj, up), (m.down_proj, block.down.weight),
                          (theirs.input_layernorm, block.norm1.weight), (theirs.post_attention_layernorm, block.norm2.weight)]:
        layer.weight.data.copy_(weight)
    for layer, ours in ((a.q_norm, block.norm_q), (a.k_norm, block.norm_k)):
        layer.weight.data.copy_(ours.weight.expand(N, K))
        layer.bias.data.copy_(ours.bias.expand(N, K))
    x, pos, mask = torch.randn(2, 10, D), torch.arange(10).expand(2, 10), torch.ones(10, 10).tril().bool()
    wanted = theirs(x, attention_mask=torch.where(mask, 0.0, -torch.inf)[None, None], position_ids=pos,
                    position_embeddings=published.ChameleonRotaryEmbedding(config)(x, pos))
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    assert torch.allclose(block(x, model_module.rope_tables(pos, K), mask[None, None]), wanted, atol=1e-4)


def test_denominator_loss(trained):
    """1e-5 (ln Z)^2 per token, and only for the stable model. Catches Z without its logarithm, a mean in place of the sum."""
    row = data.lay_out(view("chameleon", V)(["a red circle", ("image", 0, 0)], some_codes(1)), WORDS, 0)
    batch = replace(data.pack([row], 32), latents=torch.zeros(0, 4, 4, 4), t=torch.zeros(0, dtype=torch.long), eps=torch.zeros(0, 4, 4, 4))
    trained.model.head.weight *= 100
    plain, n, each = model_module.losses(trained.model, batch, trained.diffusion)
    with_it, *_ = model_module.losses(trained.model, batch, trained.diffusion, stable=True)
    logits = forward(trained, ["a red circle", ("image", 0, 0)], some_codes(1))
    z = torch.log(torch.exp(logits.double()).sum(-1))                   # all but EOS predict something
    assert n == len(logits) == 22 and len(each) == 0
    assert (with_it - plain).item() == pytest.approx(1e-5 * z.square().sum().item(), rel=1e-3) and with_it > plain + 1e-3


def test_the_gap_tells_a_caption_that_is_heard(trained):
    """A model of codes that depend on the caption's first word alone has a gap; a deaf one has none. Catches right against
    right, and words that are counted as codes."""
    class Says(torch.nn.Module):
        def __init__(self, heard):
            super().__init__()
            self.config, self.heard, self.one = trained.model.config, heard, torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, image_id, doc_id, has_loss, xt, t):
            logits = torch.zeros(*tokens.shape, V + CODES)
            for b in range(len(tokens)):
                for q in range(1, tokens.shape[1]):
                    start = (doc_id[b] == doc_id[b, q]).nonzero()[0, 0]
                    logits[b, q, V + (3 if tokens[b, start + 1] == WORDS.ids["a"] else 7)] = 4.0 * self.heard
            return logits[has_loss], None
    captions, codes = ["a circle", "the circle", "a square"], torch.tensor([3, 7, 3]).view(3, 1, 1).expand(3, 4, 4)
    assert conditioning_gap(Says(True), WORDS, None, captions, codes) == pytest.approx(4.0 * 2 / 3)     # the third's other caption begins alike
    assert conditioning_gap(Says(False), WORDS, None, captions, codes) == 0


def test_the_gap_reads_what_training_lays_out(trained):
    """Against one forward of each document as training has it. Catches a missing BOI, or codes of another picture."""
    captions, codes = ["a circle", "the red square"], some_codes(2)

    def nats(text, k):
        at = len(text.split()) + 1                      # BOI, behind <bos> and the words
        logits = forward(trained, [text, ("image", k, 0)], codes)[at: at + 16].log_softmax(-1)
        return -logits.gather(1, codes[k].flatten()[:, None] + V).mean().item()
    wanted = sum(nats(captions[1 - k], k) - nats(captions[k], k) for k in range(2)) / 2
    assert conditioning_gap(trained.model, WORDS, None, captions, codes) == pytest.approx(wanted, abs=1e-5) and abs(wanted) > 1e-3


# ------------------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def tiny_vq(tmp_path_factory):
    """A file with an untrained VQ-VAE of pictures of 32 x 32: 8 x 8 codes of 19."""
    path = tmp_path_factory.mktemp("vq") / "vae.pt"
    torch.manual_seed(0)
    checkpoint.save(path, checkpoint.pack_vae(VAE(VAEConfig(channels=4, multipliers=(1, 1, 1), z=2, codes=19))))
    return path


def rival(name, vae, out, *more, **options):
    """The argument list of a small run of a rival."""
    given = dict(vae=vae, out=out, steps=4, samples=6, sample_steps=2, seq_len=160, gap_every=2, patch=2) | options
    return small_run(**(given if vae else {k: v for k, v in given.items() if k != "vae"})) + ["--model", name, *more]


def test_a_chameleon_from_training_to_picture(tiny_vq, tmp_path, capsys):
    """The same commands serve it: train, report, draw, describe; its loss has no diffusion part."""
    run = tmp_path / "run"
    train.main(rival("chameleon", tiny_vq, run, "--stable"))
    rows, found = log(run), json.loads((run / "report.json").read_text())
    assert all(row["diffusion"] is None for row in rows) and {"gap"} <= rows[-1].keys()
    assert {"exact", "captions", "alone", "deductions", "conditioning_gap"} <= found.keys() and "excess_nats" not in found
    assert (run / "samples.png").stat().st_size > 1000
    trained = load_trained(run / "model.pt")
    assert trained.model.config.stable and trained.model.config.vocabulary == len(trained.tokenizer) + 19 and trained.vae.config.codes == 19
    sample.main(["a red circle", "--checkpoint", str(run / "model.pt"), "-o", str(tmp_path / "x.png")], decoder=Decoder)
    sample.main(["--image", str(tmp_path / "x.png"), "--checkpoint", str(run / "model.pt")], decoder=Decoder)
    evaluate.main(["--checkpoint", str(run / "model.pt"), "--n", "3", "--world", "one"])
    said = capsys.readouterr().out
    assert "wrote" in said and "mean over categories, exact" in said and "language entropy" not in said


def test_a_chameleon_stops_and_goes_on(tiny_vq, tmp_path):
    """A run that was stopped after two steps ends as one that was not. Catches codes or their order drawn anew."""
    train.main(rival("chameleon", tiny_vq, tmp_path / "one", samples=0))
    with pytest.MonkeyPatch.context() as patch:
        real = train.train_step
        patch.setattr(train, "train_step", lambda run: (run.step == 1 and signal.raise_signal(signal.SIGINT), real(run))[1])
        with pytest.raises(Stopped):
            train.main(rival("chameleon", tiny_vq, tmp_path / "two", samples=0))
    train.main(rival("chameleon", tiny_vq, tmp_path / "two", "--resume", samples=0))
    one, two = (load_trained(tmp_path / name / "model.pt").model.state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_chameleon_of_digits(tmp_path):
    """The preset serves other data, without a VQ-VAE at hand: one is trained, with as many codes as asked."""
    write_files("mnist", tmp_path / "files")
    found = train.main(["--preset", "chameleon", "--data", "mnist", "--data-dir", str(tmp_path / "files"), "--documents", "6", "--steps", "2",
                        "--samples", "2", "--codes", "30", "--vae-steps", "2", "--out", str(tmp_path / "run")])
    assert load_trained(tmp_path / "run/model.pt").vae.config.codes == 30 and {"guided", "captions"} <= found.keys()


def test_a_llama_learns_words_alone(tmp_path):
    """Catches a picture in its documents, and a report that would ask it to draw."""
    run = tmp_path / "run"
    train.main(rival("llama", None, run))
    found = json.loads((run / "report.json").read_text())
    assert {"alone", "deductions"} <= found.keys() and not {"exact", "captions", "conditioning_gap"} & found.keys()
    assert all(row["diffusion"] is None and "gap" not in row for row in log(run)) and not (run / "samples.png").exists()


def mistakes(tiny_vq):
    return {
        "a VAE without codes": (["--model", "chameleon", "--vae", str(ASSETS / "scenes_vae.pt")], "vqvae"),
        "a VQ-VAE for Transfusion": (["--vae", str(tiny_vq)], "'vae'"),
        "edits": (["--model", "llama", "--preset", "edit"], "learns from scenes"),
        "patches that it has not": (["--model", "chameleon", "--encoder", "unet"], "is Transfusion's"),
        "init of another kind": (["--model", "chameleon", "--init", str(ASSETS / "scenes.pt")], "is a transfusion"),
        "codes that the file has not": (["--model", "chameleon", "--vae", str(tiny_vq), "--codes", "20"], "19 codes, not 20"),
        "codes for no one": (["--codes", "20"], "--model chameleon"),
        "a Llama of digits": (["--model", "llama", "--data", "mnist"], "learns from scenes"),
        "too many codes for the context": (["--model", "chameleon", "--vae", str(tiny_vq), "--seq-len", "40"], "context"),
        "noise limit": (["--t-limit", "0"], "--t-limit"),
        "text that there is not": (["--text-share", "0.5", "--data", "mnist"], "--text-share"),
    }


@pytest.mark.parametrize("what", mistakes(""))
def test_mistakes(tiny_vq, tmp_path, what):
    """One sentence that names what to change; nothing is written."""
    line, said = mistakes(tiny_vq)[what]
    with pytest.raises(ValueError, match=said):
        train.main([*line, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_each_program_has_its_models(trained, tmp_path, monkeypatch, capsys):
    """A Chameleon's file given to sample.py crashes, or draws noise; so does a Transfusion's given to chameleon.py. One sentence
    names the other program. Without arguments chameleon.py shows what each model reads."""
    monkeypatch.chdir(tmp_path)
    save_trained("chameleon.pt", trained)
    with pytest.raises(UserError, match=r'chameleon.pt is a chameleon: python chameleon.py "..." --checkpoint chameleon.pt$'):
        sample.main(["a circle", "--checkpoint", "chameleon.pt"])
    with pytest.raises(UserError, match=r"scenes.pt is a transfusion: python sample.py"):
        chameleon.main(["a circle", "--checkpoint", str(ASSETS / "scenes.pt")])
    assert list(tmp_path.iterdir()) == [tmp_path / "chameleon.pt"]
    chameleon.main(["a red circle", "--checkpoint", "chameleon.pt"])
    assert "wrote sample.png (1 picture," in capsys.readouterr().out and (tmp_path / "sample.png").exists()
    monkeypatch.setattr(chameleon, "demo", lambda: print("the demo"))
    monkeypatch.setattr("sys.argv", ["chameleon.py"])
    chameleon.main()
    assert capsys.readouterr().out == "the demo\n"


def test_what_a_chameleon_cannot_do(trained, tmp_path):
    """Edits and films of the noise belong to Transfusion, pictures not to a Llama; said before anything is drawn."""
    trained.vae = VAE(VAEConfig(channels=4, multipliers=(1, 2), codes=CODES)).eval()
    save_trained(tmp_path / "model.pt", trained)
    from PIL import Image
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    picture = ["--checkpoint", str(tmp_path / "model.pt"), "--out", str(tmp_path / "y.png")]
    for line in (["a circle", "--film", str(tmp_path / "f.png")], ["--image", str(tmp_path / "x.png"), "--edit", "the circle"]):
        with pytest.raises(UserError, match="Transfusion"):
            sample.main(line + picture, decoder=Decoder)
    for what in ("edits", "mixtures"):
        with pytest.raises(UserError, match="cannot be measured"):
            evaluate.main(["--checkpoint", str(tmp_path / "model.pt"), "--data", what])
    trained.kind = "llama"
    save_trained(tmp_path / "model.pt", trained)
    with pytest.raises(UserError, match="words only"):
        sample.main(["a circle", *picture], decoder=Decoder)
