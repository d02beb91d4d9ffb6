"""
test_evaluate.py: do the numbers measure what they say?        (evaluate.py, metrics/scenes.py,
                                                  metrics/drawing.py; Transfusion App. B.1)

THE IDEA    A metric is tested with models whose score is known without measuring: one that knows
            the language by heart, one that knows nothing, an artist who draws exactly what was
            asked for, one who confuses captions, and one who adds something. Then the whole report,
            of stand-ins and of shipped models. The conditioning gap is in test_gap.py, MNIST in
            test_digits.py.
TRY IT      pytest -n 0 tests/test_evaluate.py
"""
import ast
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import chameleon
import data
import evaluate
import model as model_module
import sample
import vae as vae_module
from data import BOI
from diffusion import Diffusion
from metrics import coco, drawing, likelihood
from metrics import scenes as scene_metrics
from sources import edits, scenes
from sources.pairs import Pairs
from support import checkpoint
from support.common import ASSETS, UserError

# Patches per picture. With fewer patches than words, no document would be text alone.
P = 16
WORLD = scenes.World(scenes.WORLDS["one"])


# --------------------------------------------------------------------------------------------- text
@pytest.fixture(scope="module")
def documents():
    """Documents about one object, with one pair or two: so few that all of them can be listed."""
    rng = np.random.default_rng(0)
    captions = [WORLD.caption(rng)[0] for _ in range(500)]
    pixels = np.zeros((500, 1, 1, 3), np.uint8)
    pairs = Pairs("scenes", captions, pixels, texts=scenes.deductions(), words=scenes.vocabulary())
    return data.Documents(pairs, patches=P, context=44)


def stub(answer, documents, **more):
    """A Trained whose model is a plain function of (tokens, image_id, doc_id, has_loss, xt, t)."""
    answer.config = SimpleNamespace(patches=P, context=128, latent=(1, 2, 2))
    tokenizer = data.Words(documents.pairs.vocabulary())
    return SimpleNamespace(
        model=answer, tokenizer=tokenizer, vae=None, diffusion=Diffusion(), **more)


def all_documents():
    """Every document of the language: a deduction, a caption and its picture, or two such pairs."""
    image = ("image", 0, 1000)
    texts = []
    for category in WORLD.categories:
        texts += [text for text, _ in scenes.captions(category)]

    every = []
    for _, claim in scenes.captions("color_attr"):
        for relation in scenes.RELATIONS:
            every.append([scenes.deduction_text(claim.objects, relation)])
    for a in texts:
        every.append([a, image])
        for b in texts:
            every.append([a, image, b, image])
    return every


class Oracle:
    """A model that has read every document of the language. After any beginning it knows the exact
    distribution of the next token.

    counts   {beginning, a tuple of ids: {next id: probability, not normalised}}
    levels   the t of every forward pass"""

    def __init__(self, documents):
        assert documents.most == 2                      # pairs in a document
        tokenizer = data.Words(documents.pairs.vocabulary())
        self.V = len(tokenizer)
        self.counts = {}
        self.levels = []
        for document in all_documents():
            tokens = data.lay_out(document, tokenizer, P).tokens
            p = np.exp(scene_metrics.log_prob(documents, WORLD, document))
            for k in range(1, len(tokens)):
                after = self.counts.setdefault(tuple(tokens[:k]), {})
                after[tokens[k]] = after.get(tokens[k], 0.0) + p
        # Or a picture comes first: 20% of the documents that have any.
        self.counts[(data.BOS,)][BOI] = (1 - documents.text_share) * 0.2

    def __call__(self, tokens, image_id, doc_id, has_loss, xt, t):
        self.levels.append(t)
        rows = []
        for row, pos in has_loss.nonzero().tolist():
            start = (doc_id[row] == doc_id[row, pos]).nonzero()[0].item()
            beginning = tuple(tokens[row, start: pos + 1].tolist())
            after = self.counts.get(beginning, {BOI: 1.0})      # not true: no word follows
            p = torch.tensor(list(after.values()))
            logits = torch.full((self.V,), -1e4)
            logits[list(after)] = p.log().float()
            rows.append(logits)
        return torch.stack(rows), None


@pytest.fixture(scope="module")
def oracle(documents):
    """A Trained with the Oracle."""
    return stub(Oracle(documents), documents)


@pytest.fixture
def ignorant(documents):
    """A Trained that finds every token equally likely."""
    V = len(data.Words(documents.pairs.vocabulary()))

    def answer(tokens, image_id, doc_id, has_loss, xt, t):
        return torch.zeros(int(has_loss.sum()), V), None

    return stub(answer, documents)


def test_a_perfect_model_has_no_excess(documents, oracle):
    """Catches a wrong floor, a word that is lost or counted twice, and log-probabilities of other
    documents than those that the model read."""
    excess, entropy = scene_metrics.excess_nats(oracle, documents, WORLD, n=150, seed=1)
    assert excess == pytest.approx(0, abs=1e-4)
    assert 0.1 < entropy < 2
    for t in oracle.model.levels:                       # pictures are pure noise:
        assert (t == 1000).all()                        # no word depends on them


def test_an_ignorant_model_has_the_excess_of_a_uniform_one(documents, ignorant):
    """Catches an excess per document, or per position, where nats per word are meant."""
    excess, entropy = scene_metrics.excess_nats(ignorant, documents, WORLD, n=150, seed=1)
    V = len(ignorant.tokenizer)
    assert excess == pytest.approx(np.log(V) - entropy, abs=1e-4)
    assert excess > 1


def test_text_alone(oracle, ignorant):
    """Deductions, whatever their share of the documents is. Catches an entropy that counts the
    first object, too."""
    # A model that knows them has no nats to spare.
    assert scene_metrics.deduction_nats(oracle, n=150) == pytest.approx(0, abs=1e-4)

    # One that knows nothing has ln V for each of 15 or 17 tokens, <eos> included; a perfect one
    # has only the choice of a relation, of four, and of a second object. There are 26 first
    # objects: 28 pairs of colour and shape, two of them held out.
    V = len(ignorant.tokenizer)
    choices = len(scenes.captions("color_attr")) / 26 * 4
    wanted = np.log(V) - np.log(choices) / 16
    assert scene_metrics.deduction_nats(ignorant, n=150) == pytest.approx(wanted, abs=0.006)


def test_deductions_are_ranked_by_likelihood(documents, oracle):
    """Catches a two-choice test that compares with the wrong sign, or that ranks an ending which is
    not the wrong one."""
    assert scene_metrics.deduction_accuracy(oracle, n=25) == 1.0

    def says_the_contrary(*arguments):
        logits, _ = oracle.model(*arguments)
        return -logits, None

    contrary = stub(says_the_contrary, documents)
    assert scene_metrics.deduction_accuracy(contrary, n=25) == 0.0


# ------------------------------------------------------------------------------------------ GenEval
def artist(seed=0, confuse=False):
    """A `draw` that renders a scene of each caption. If confused, of another caption."""
    rng = np.random.default_rng(seed)

    def draw(trained, texts, seed=None, **drawing):
        if confuse:
            texts = [texts[k] for k in np.roll(np.arange(len(texts)), 1 + len(texts) // 3)]
        pictures = []
        for text in texts:
            claim = scenes.read_caption(text)
            things = scenes.draw_scene(claim, rng, allow_held_out=True)
            pictures.append(scenes.render(things))
        return np.stack(pictures)

    return draw


@pytest.mark.parametrize("held_out", [False, True])
def test_geneval_of_a_perfect_artist(monkeypatch, held_out):
    """Catches a judge that fails true pictures, that asks for seen pairs where unseen ones are
    meant, or that counts badly."""
    monkeypatch.setattr(drawing, "draw", artist())
    six = scenes.WORLDS["six"]
    table, shown = scene_metrics.geneval(None, six, n=9, held_out=held_out)

    # Not every category names a held-out pair.
    categories = [name for name in six if scenes.captions(name, held_out)]
    assert list(table) == categories
    for row in table.values():
        assert row == {"rule": 1.0, "exact": 1.0, "n": 9}

    assert len(shown) == 9 * len(categories)
    for text, picture, right in shown:
        assert right
        assert scenes.holds(scenes.read_caption(text), scenes.parse(picture))
        names_held_out = any(f"{colour} {shape}" in text for colour, shape in scenes.HELD_OUT)
        assert names_held_out == held_out


def test_geneval_of_a_confused_artist(monkeypatch):
    """Catches a judge that looks at the pictures and not at the captions."""
    monkeypatch.setattr(drawing, "draw", artist(confuse=True))
    table, shown = scene_metrics.geneval(None, scenes.CATEGORIES, n=12)
    exact = np.mean([row["exact"] for row in table.values()])
    assert exact < 0.15                                 # by luck
    for row in table.values():
        assert row["exact"] <= row["rule"]
    assert np.mean([right for *_, right in shown]) == pytest.approx(exact)


def test_geneval_of_a_careless_artist(monkeypatch):
    """Catches `rule` and `exact` mixed up: something unnamed in the picture breaks only the
    second."""
    rng = np.random.default_rng(1)
    draw_scene = scenes.draw_scene
    quarters = [(8, 8), (8, 24), (24, 8), (24, 24)]

    def is_free(place, things):
        x, y = place
        return all(abs(thing.x - x) + abs(thing.y - y) > 10 for thing in things)

    def draw(trained, texts, **drawing):
        """What was asked for, and a white cross in a free place."""
        pictures = []
        for text in texts:
            things = draw_scene(scenes.read_caption(text), rng)
            free = [place for place in quarters if is_free(place, things)]
            cross = scenes.Thing("white", "cross", *free[0], 5)
            pictures.append(scenes.render([*things, cross]))
        return np.stack(pictures)

    monkeypatch.setattr(drawing, "draw", draw)
    table, _ = scene_metrics.geneval(None, ("single_object", "colors"), n=10)
    for row in table.values():
        assert row["rule"] == 1.0
        assert row["exact"] == 0.0


def test_geneval_asks_every_caption_in_turn(monkeypatch):
    """Catches prompts drawn with repetition: a model that knows half of them could be lucky."""
    monkeypatch.setattr(drawing, "draw", artist())
    _, shown = scene_metrics.geneval(None, ("single_object", "counting"), n=12)
    texts = [text for text, *_ in shown]
    for category, times in (("single_object", 3), ("counting", 1)):
        counts = {texts.count(text) for text, _ in scenes.captions(category)}
        assert counts == {times}


def test_geneval_of_more_than_fit_together(monkeypatch):
    """Catches a prompt between two batches that is never drawn, and a batch with the noise of the
    one before."""
    asked = []
    seeds = []

    def draw(trained, texts, seed):
        asked.extend(texts)
        seeds.append(seed)
        return np.zeros((len(texts), 32, 32, 3), np.uint8)

    monkeypatch.setattr(drawing, "draw", draw)
    table, shown = scene_metrics.geneval(None, ("single_object",), n=403)
    assert [text for text, *_ in shown] == asked
    assert len(seeds) == 3                              # 200 + 200 + 3
    assert len(set(seeds)) == 3
    assert table == {"single_object": {"rule": 0.0, "exact": 0.0, "n": 403}}


# ----------------------------------------------------------------------------------------- captions
def test_captions_are_judged_by_the_picture(monkeypatch):
    """Catches captions compared with a text where truth is meant, nonsense that passes, and other
    pictures than those shown."""
    monkeypatch.setattr(scene_metrics, "encode_pixels", lambda trained, pixels: pixels)

    def say(kind, thing):
        if kind == "true":
            return f"a {thing.colour} {thing.shape}"
        if kind == "vague":                             # true all the same
            return f"a {thing.shape}"
        if kind == "nonsense":
            return f"a {thing.colour}"
        other = scenes.SHAPES[scenes.SHAPES.index(thing.shape) - 1]
        return f"a {thing.colour} {other}"

    scores = {}
    for kind in ("true", "vague", "nonsense", "false"):

        def describe(trained, pixels, kind=kind):
            return [say(kind, scenes.parse(picture)[0]) for picture in pixels]

        monkeypatch.setattr(drawing, "describe", describe)
        scores[kind], rows = scene_metrics.captioning(None, ("colors",), n=20)
        assert len(rows) == 20
        assert np.mean([true for *_, true in rows]) == scores[kind]
    assert scores == {"true": 1.0, "vague": 1.0, "nonsense": 0.0, "false": 0.0}


# --------------------------------------------------------------------------- how pictures are drawn
@pytest.mark.parametrize("kind, decoder", [
    ("transfusion", sample.Decoder),
    ("chameleon", chameleon.Decoder),
])
def test_the_decoder_fits_the_model(monkeypatch, kind, decoder):
    """Catches a Chameleon that is made to denoise."""
    taken = []

    def draw(trained, texts, decoder, **_):
        taken.append(decoder)
        return np.zeros((len(texts), 2, 2, 3), np.uint8)

    def describe(trained, latents, decoder):
        taken.append(decoder)
        return ["a circle"] * len(latents)

    monkeypatch.setattr(sample, "draw", draw)
    monkeypatch.setattr(sample, "describe", describe)
    trained = SimpleNamespace(kind=kind)
    assert drawing.draw(trained, ["a circle", "a square"], steps=2).shape == (2, 2, 2, 3)
    assert drawing.describe(trained, torch.zeros(3, 1, 2, 2)) == ["a circle"] * 3
    assert taken == [decoder] * 2


def test_what_follows_is_drawn_in_pieces(monkeypatch):
    """Catches pictures in another order than their prompts, one left out between two batches, noise
    that depends on the batch, and words that are written after the picture."""
    asked = []

    def generate(trained, prompts, **options):
        """A document per prompt, at whose end is a "picture" of the prompt's number."""
        asked.append(options)
        documents = []
        for prompt in prompts:
            documents.append([*prompt, torch.tensor([float(prompt[0])])])
        return documents

    monkeypatch.setattr(drawing, "TOGETHER", 2)
    monkeypatch.setattr(chameleon, "decoder_of", lambda trained: "its decoder")
    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(drawing, "decode_latents", lambda trained, latents: latents.numpy())
    pictures = drawing.draw_after(None, [[str(k)] for k in range(5)], seed=3)
    assert pictures.tolist() == [[0], [1], [2], [3], [4]]
    wanted = []
    for first in (0, 2, 4):
        wanted.append(
            dict(draw_now=True, max_words=0, first=first, decoder="its decoder", seed=3))
    assert asked == wanted


# --------------------------------------------------------------------------------- the whole report
def test_how_much_is_measured(monkeypatch):
    """n pictures, shared among the categories, and 50 unseen pairs of each; n captions; 500 texts
    of 5,000 scenes. Catches n per category, which is hours for minutes, and numbers of other sets
    than docs/RESULTS.md has."""
    asked = []

    def geneval(trained, names, n, unseen, *_, **__):
        asked.append((n, unseen))
        return {"colors": {"exact": 1.0, "rule": 1.0}}, []

    def captioning(trained, names, n, *_):
        asked.append(n)
        return 1.0, []

    def excess_nats(trained, documents, world, n, seed):
        asked.append((n, len(documents.pairs.captions)))
        return 0.0, 1.0

    monkeypatch.setattr(scene_metrics, "geneval", geneval)
    monkeypatch.setattr(scene_metrics, "captioning", captioning)
    monkeypatch.setattr(scene_metrics, "excess_nats", excess_nats)
    monkeypatch.setattr(scene_metrics, "crowd_distance", lambda *_: 0.0)
    monkeypatch.setattr(evaluate, "report_text", lambda *_: {})
    config = SimpleNamespace(patches=16, context=96, latent=(4, 8, 8))
    trained = SimpleNamespace(
        kind="transfusion",
        text_share=0.5,
        tokenizer=data.Words(scenes.vocabulary()),
        vae=SimpleNamespace(f=4),
        model=SimpleNamespace(config=config),
    )
    job = evaluate.Job(("single_object", "two_object"), None, 7, 0, [], {})
    evaluate.report_scenes(trained, job)
    assert asked == [(4, False), (50, True), 7, (500, 5000)]            # 7 / 2, rounded up


def test_a_llama_is_asked_about_words_it_knows(documents):
    """Catches a Llama of other text that is asked about scenes, or to draw, when its training is
    over."""
    llama = stub(lambda *_: pytest.fail("asked"), documents, kind="llama")
    numbers, lines, shown = evaluate.report(llama, "shards", test=object(), steps=2)
    assert numbers.keys() == {"seconds"}
    assert 0 <= numbers["seconds"] < 600                # not the time of day
    assert len(lines) == 2
    assert shown == []


@pytest.mark.parametrize("judged", [True, False])
def test_data_of_ones_own_bring_their_judge(monkeypatch, judged):
    """Catches a new source that must be named in REPORTS, too. Catches a judge that sees another
    picture than it is asked about, and a picture counted as right because nobody can say."""
    trained = checkpoint.load_trained(ASSETS / "scenes.pt")
    captions = ["a red circle", "a blue square", "a green circle"]
    pixels = np.empty((3, 32, 32, 3), np.uint8)
    pixels[:] = np.arange(3)[:, None, None, None]       # picture k has the grey k
    asked = []

    def judge(caption, picture):
        grey = picture[0, 0, 0]
        asked.append((caption, grey))
        return "circle" in caption and grey != 0

    # The model draws the pictures in the opposite order, and misreads the last one.
    test = Pairs("bars", captions, pixels, judge=judge if judged else None)
    monkeypatch.setattr(drawing, "draw", lambda trained, texts, **_: pixels[::-1][: len(texts)])
    monkeypatch.setattr(drawing, "draw_after", drawing.draw)
    monkeypatch.setattr(
        drawing, "describe", lambda trained, latents: ["circle", "circle", "square"])
    numbers, lines, shown = evaluate.report(trained, "bars", test=test, n=3, steps=2)

    if not judged:
        assert [text for text, *_ in shown] == [f"unseen: {text}" for text in captions]
        assert asked == []
        assert numbers.keys() == {
            "target", "unseen_nearest", "unseen_n", "unseen_chance", "unseen_cider", "vae",
            "conditioning_gap", "diffusion_loss", "seconds"}
        return

    assert [text for text, *_ in shown] == captions
    drawn = list(zip(captions, (2, 1, 0)))
    described = [("circle", 0), ("circle", 1), ("square", 2)]
    assert asked == drawn + described
    assert [right for *_, right in shown] == [True, False, False]
    assert numbers["judged"] == pytest.approx(1 / 3)
    assert numbers["captions"] == pytest.approx(1 / 3)
    assert any("the data's judge" in line and "33.3%" in line for line in lines)


def test_edits_of_ones_own_pictures():
    """Nobody can say which edit of a photo is right. So they are shown, the old picture, the new
    one and the wanted one, and found among each other."""
    trained = checkpoint.load_trained(ASSETS / "scenes_edit.pt")
    pairs = scenes.load_scenes(4, 0, progress=False)
    texts = ["make the circle blue", "remove the square"]
    test = edits.Edits(pairs.pixels, [([0, 1], texts[:1]), ([2, 3], texts[1:])])
    numbers, lines, shown = evaluate.report(
        trained, "edits", test=test, n=5, steps=2, sampler="dpm++", train=test)

    assert {"own_nearest", "unseen_nearest", "vae", "conditioning_gap"} <= numbers.keys()
    assert numbers["new_words"] == []
    once_each = ("conditioning gap", "the VAE, on unseen pictures")
    assert sum(any(words in line for words in once_each) for line in lines) == 2

    assert [text for text, *_ in shown] == texts + [f"unseen: {text}" for text in texts]
    for k, (_, picture, _) in enumerate(shown):
        assert picture.shape == (32, 100, 3)            # three of 32, and two gaps
        old = pairs.pixels[2 * (k % 2)]
        assert np.array_equal(picture[:, :32], old)


def test_the_checkpoint_of_the_papers_objective_draws_as_asked():
    """Catches a shipped file that is flow's, or that has lost its path for the noise: then nothing
    that it draws is right."""
    trained = checkpoint.load_trained(ASSETS / "scenes_paper.pt")
    assert trained.diffusion.kind == "ddpm"
    assert trained.diffusion.shift == 1.0
    assert trained.diffusion.noise_skip is True
    table, _ = scene_metrics.geneval(
        trained, ("colors", "counting"), n=8, steps=25, sampler="dpm++", guidance=2.0)
    assert table["colors"]["exact"] >= 0.75, table
    assert table["counting"]["exact"] >= 0.75, table


# --------------------------------------------------------------------------------- the command line
@pytest.mark.parametrize("what", ["scenes", "edits"])
def test_the_command_line_takes_the_models_size(tmp_path, monkeypatch, capsys, what):
    """Catches test pictures of 32 pixels for a model of another size: the gap, measured last, could
    not be."""
    # 1. A model of 48 x 48 pixels.
    torch.manual_seed(0)
    config = vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2)
    vae = vae_module.VAE(config).eval()
    words = data.Words(scenes.vocabulary())
    shape = model_module.sized(
        "toy", vocabulary=len(words), latent=(2, 12, 12), patch=6, context=96)
    network = model_module.Transfusion(shape).eval()
    path = tmp_path / "model.pt"
    checkpoint.save_trained(path, checkpoint.Trained(network, words, vae, Diffusion()))

    # 2. All that takes long is left out.
    table = {"colors": {"rule": 0.0, "exact": 0.0, "n": 1}}
    monkeypatch.setattr(scene_metrics, "deduction_accuracy", lambda *a, **k: 0.5)
    monkeypatch.setattr(scene_metrics, "excess_nats", lambda *a, **k: (0.0, 1.0))
    monkeypatch.setattr(scene_metrics, "geneval", lambda *a, **k: (table, []))
    monkeypatch.setattr(scene_metrics, "crowd_distance", lambda *a, **k: 0.0)

    found = tmp_path / "found.json"
    evaluate.main(["--checkpoint", str(path), "--data", what, "--n", "2", "--steps", "1",
                   "--json", str(found)])
    assert abs(json.loads(found.read_text())["conditioning_gap"]) < 1


SCENES = {"geneval", "held_out", "exact", "rule", "captions", "excess_nats", "entropy", "alone",
          "deductions", "conditioning_gap", "diffusion_loss", "distance"}
MIXTURES = {"single", "second", "boi", "well_formed", "sampled"}
EDITS = {"edits", "kept", "chains", "asked", "kinds", "conditioning_gap", "diffusion_loss"}


@pytest.mark.parametrize(
    "what, numbers", [("scenes", SCENES), ("mixtures", MIXTURES), ("edits", EDITS)])
def test_the_command_line_on_a_shipped_model(tmp_path, capsys, what, numbers):
    """Catches what stand-ins hide: a real model's weights want gradients, and its documents are
    real ones."""
    path = tmp_path / "numbers.json"
    model = ASSETS / ("scenes_edit.pt" if what == "edits" else "scenes.pt")
    evaluate.main(["--data", what, "--checkpoint", str(model), "--n", "3", "--steps", "2",
                   "--sampler", "dpm++", "--json", str(path)])
    found = json.loads(path.read_text())
    said = capsys.readouterr().out
    assert found.keys() == numbers | {"seconds"}
    assert "steps 2, sampler dpm++" in said
    assert "measured in" in said

    for key, text in evaluate.SHARES.items():
        assert (text in said) == (key in numbers)
        if key in numbers:
            assert 0 <= found[key] <= 1
    if "conditioning_gap" in numbers:
        assert found["conditioning_gap"] > 0.1          # it listens
    if what == "scenes":
        assert abs(found["excess_nats"]) < 0.05
        assert found["captions"] > 0.5
        assert found["deductions"] == 1.0


@pytest.mark.parametrize("name, own, loads", [
    ("folder", True, True),
    ("edits", True, True),
    ("edits", False, False),
    ("mnist", True, False),
    ("scenes", False, False),
])
def test_which_training_data_are_loaded(monkeypatch, name, own, loads):
    """Catches pictures of one's own that are judged without those of their training, and a training
    split that is loaded for nothing."""
    monkeypatch.setattr(evaluate.choose, "load_pairs", lambda *_, **__: "loaded")
    config = SimpleNamespace(latent=(4, 8, 8))
    trained = SimpleNamespace(model=SimpleNamespace(config=config), vae=SimpleNamespace(f=4))
    line = ["--data", name]
    if own:
        line += ["--data-dir", "here"]
    args = evaluate.parse_arguments(line)
    assert evaluate.load_data(trained, args, "train") == ("loaded" if loads else None)
    assert evaluate.load_data(trained, args, "test") == "loaded"


@pytest.mark.parametrize("name, good, bad", [
    ("n", 1, 0),
    ("steps", 1000, 1001),
    ("steps", 1, 0),
    ("seed", 0, -1),
    ("seed", 2 ** 32 - 1, 2 ** 32),
])
def test_the_ends_of_the_options(name, good, bad):
    """Catches a range that ends one number too early or too late."""
    evaluate.parse_arguments([f"--{name}={good}"])
    with pytest.raises(UserError, match=f"--{name} must be"):
        evaluate.parse_arguments([f"--{name}={bad}"])


NOT_TO_BE_WRITTEN = ["", ".", "/dev/full", "nowhere/numbers.json", "file/numbers.json"]


@pytest.mark.parametrize("path", NOT_TO_BE_WRITTEN)
@pytest.mark.parametrize("module, line", [
    (evaluate, []),
    (likelihood, ["choices", "scenes"]),
    (coco, ["scenes"]),
])
def test_where_the_numbers_go_is_checked_first(tmp_path, monkeypatch, module, line, path):
    """Catches a mistake that is found out when all has been measured."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")                  # so "file/..." is in no folder
    monkeypatch.setattr(module, "load_trained", lambda *_, **__: pytest.fail("began to work"))
    with pytest.raises(UserError, match="cannot write"):
        module.main([*line, "--json", path])


def test_checks_are_raised():
    """Catches a check that PYTHONOPTIMIZE=1 takes away: an assert in what judges."""
    home = Path(evaluate.__file__).parent
    for path in [home / "evaluate.py", *(home / "metrics").glob("*.py")]:
        tree = ast.parse(path.read_text())
        lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        assert not lines, f"{path} asserts in lines {lines}"
