"""
test_mixtures.py: are edits and documents of several parts counted rightly?  (metrics/mixtures.py)

THE IDEA    The judge is judged by stand-ins for the model, whose score is known: artists who draw
            what is asked, forget it, do nothing, or draw all anew; and writers who know where BOI
            stands, or do not.
COMPARED    the numbers of metrics.mixtures    with what each stand-in deserves
RUN IT      pytest -n 0 tests/test_mixtures.py
            Each docstring names the bug that the test catches; all are of docs/PAPER.md §4.12.
"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from data import BOI
from metrics import mixtures
from sources import edits, scenes
from support import checkpoint
from support.common import ASSETS

P = 16                                                  # patches per picture


@pytest.fixture(scope="module")
def trained():
    """Only a VAE, the shipped one: the editors below need no model."""
    return SimpleNamespace(vae=checkpoint.load_vae(ASSETS / "scenes_vae.pt"), model=None)


# ----------------------------------------------------------------------- documents of several parts
FIRST = "a red circle is left of a blue square ."       # the first half of a deduction


@pytest.mark.parametrize("document, right", [
    # Words and pictures alternate. 0 is any picture.
    (["a red circle", 0], True),
    ([0, "a red circle"], True),
    (["a circle", 0, "two squares", 0], True),
    (["a circle", 0, "two squares"], True),
    # A deduction must say the same from both sides.
    ([f"{FIRST} the blue square is right of the red circle ."], True),
    ([f"{FIRST} the blue square is left of the red circle ."], False),
    ([f"{FIRST} the red circle is left of the blue square ."], False),
    ([FIRST], False),
    ([". . . . ."], False),
    # Half of a pair, or nothing.
    (["a red circle"], False),
    ([0], False),
    ([], False),
    # Two pictures, or two captions, one after the other; words that are no caption.
    (["a circle", 0, 0], False),
    (["a circle", "a square", 0], False),
    (["a a circle", 0], False),
    (["a circle is", 0], False),
])
def test_well_formed(document, right):
    """Catches a document that is called well formed though training never shows it, and an error
    for one that a model may well write."""
    assert mixtures.well_formed(document) == right


def make_writer(tokenizer, always):
    """A stand-in for the model that says what comes next. always: None, it knows where BOI stands;
    True or False, it says BOI everywhere or nowhere."""
    follow = mixtures.next_words(scenes.all_claims())

    def answer(tokens, image_id, doc_id, has_loss, xt, t):
        # The captions are read together with their pictures, which are finished.
        assert (t == 0).all()
        assert len(xt) == len(t)
        logits = []
        for b, q in has_loss.nonzero().tolist():
            so_far = tuple(tokenizer.vocabulary[k] for k in tokens[b, 1: q + 1].tolist())
            # Beyond the caption nothing is known, and nothing is counted.
            may_follow = follow.get(so_far, {"<boi>"})
            says_boi = may_follow == {"<boi>"} if always is None else always
            token = torch.tensor(BOI if says_boi else tokenizer.ids["a"])
            row = torch.nn.functional.one_hot(token, len(tokenizer))
            logits.append(row.float())
        return torch.stack(logits), None

    answer.config = SimpleNamespace(patches=P, context=128)
    return answer


def make_artist(trained, forgets):
    """A stand-in for `sample.generate`. It draws the last caption of each prompt, or if it forgets,
    the first one. What it writes is well formed in a known share of documents."""
    rng = np.random.default_rng(2)
    pictures = {}                                       # caption: latents that were drawn for it

    def write(prompts, temperature):
        # Who begins by chance, without a prompt, errs twice as often.
        bad = 2 if temperature else 4
        documents = []
        for k, prompt in enumerate(prompts):
            assert bool(prompt) == (not temperature)
            caption = "a circle" if k % bad else "a circle is"
            documents.append([caption, 0])
        return documents

    def check_prompts(prompts):
        """Each is the caption before, what was drawn for that, and a caption."""
        first = [prompt[0] for prompt in prompts]
        last = [prompt[2] for prompt in prompts]
        assert first == [last[-1], *last[:-1]]
        for caption, picture, _ in prompts:
            assert any(torch.equal(picture, x) for x in pictures[caption])

    def generate(trained, prompts, draw_now=False, **options):
        if not draw_now:
            return write(prompts, options["temperature"])
        if len(prompts[0]) == 3:
            check_prompts(prompts)

        # Draw what is asked, or what was asked first.
        captions = []
        drawn = []
        for prompt in prompts:
            caption = prompt[0 if forgets else -1]
            scene = scenes.draw_scene(scenes.read_caption(caption), rng)
            captions.append(caption)
            drawn.append(scenes.render(scene))
        latents = list(mixtures.encode_pixels(trained, np.stack(drawn)))
        for caption, x in zip(captions, latents, strict=True):
            pictures.setdefault(caption, []).append(x)
        return [[*prompt, x] for prompt, x in zip(prompts, latents, strict=True)]

    return generate


@pytest.mark.parametrize("forgets, always", [
    (False, None),
    (True, None),
    (False, True),
    (False, False),
])
def test_mixtures(monkeypatch, trained, forgets, always):
    """Catches the numbers of one part given for another's, and pictures judged by the caption
    beside theirs."""
    tokenizer = data.Words(scenes.vocabulary())
    model = make_writer(tokenizer, always)
    monkeypatch.setattr(mixtures, "generate", make_artist(trained, forgets))
    stand_in = SimpleNamespace(vae=trained.vae, model=model, tokenizer=tokenizer)

    numbers = mixtures.mixing(stand_in, n=40)

    assert numbers["single"] == 1
    if forgets:                                         # it draws the other caption
        assert numbers["second"] < 0.5
    else:
        assert numbers["second"] == 1
    assert numbers["well_formed"] == 0.75
    assert numbers["sampled"] == 0.5
    if always is None:
        assert numbers["boi"] == 1
    else:                                               # right in some places, by chance
        assert 0.05 < numbers["boi"] < 0.95


# ------------------------------------------------------------------------------------------ editing
def test_a_hundred_at_a_time(monkeypatch):
    """Catches a picture that gets another's instruction, or the noise of one before it, where there
    are more than fit together."""
    seeds = []

    def edit(trained, before, texts, seed):
        assert before.flatten().tolist() == [float(text) for text in texts]
        assert len(texts) <= 100
        seeds.append(seed)
        return before + 0.5

    monkeypatch.setattr(mixtures, "edit", edit)
    pictures = torch.arange(205.0).view(-1, 1, 1, 1)    # picture k is the number k
    instructions = [str(k) for k in range(205)]
    edited = mixtures.change(None, pictures, instructions, 7, {})
    assert torch.equal(edited, pictures + 0.5)
    assert len(set(seeds)) == 3


@pytest.fixture
def editors(monkeypatch, trained):
    """A function (change, answer, size) that puts stand-ins in the model's place, which know the
    true scenes. It returns a list that fills with the seeds of their calls.

    change    function (before, text, after), all scenes but the text -> the scene that is drawn
    answer    function (text, after) -> what is said to "what changed ?"
    size      pixels per side"""
    real_scene_edits = edits.scene_edits
    encode = mixtures.encode_pixels

    def put(change, answer, size=32):
        truths = []                                     # the edits that are asked for
        seeds = []

        def scene_edits(*arguments, **options):
            truths[:] = [real_scene_edits(*arguments, **options)]
            return truths[0]

        def nearest(x, triples, place):
            """The (before, text, after) whose picture at this place, 0 or 2, a latent shows."""
            numbers = [triple[place] for triple in triples]
            latents = encode(trained, truths[0].pixels[numbers])
            distances = (latents - x).square().flatten(1).sum(1)
            return triples[int(distances.argmin())]

        def edit(trained, x, texts, seed=None, **drawing):
            seeds.append(seed)
            truth = truths[0]
            drawn = []
            for latent, text in zip(x, texts, strict=True):
                asked = [triple for triple in truth.triples() if triple[1] == text]
                before, _, after = nearest(latent, asked, 0)
                scene = change(truth.scenes[before], text, truth.scenes[after])
                drawn.append(scenes.render(scene, size))
            return encode(trained, np.stack(drawn))

        def generate(trained, prompts, **options):
            assert options["max_pictures"] == 0
            truth = truths[0]
            documents = []
            for x, y, *question in prompts:
                assert question == ["what changed ?"]
                before, text, after = nearest(x, truth.triples(), 0)
                # The second picture is the one that this edit leads to.
                from_here = [triple for triple in truth.triples() if triple[0] == before]
                _, _, shown = nearest(y, from_here, 2)
                assert shown == after
                reply = answer(text, truth.scenes[after])
                documents.append([x, y, f"what changed ? {reply}"])
            return documents

        monkeypatch.setattr(edits, "scene_edits", scene_edits)
        monkeypatch.setattr(mixtures, "edit", edit)
        monkeypatch.setattr(mixtures, "generate", generate)
        return seeds

    return put


def draws_what_is_asked(before, text, after):
    """The scene that a perfect editor draws."""
    return after


def says_what_was_done(text, after):
    """What a perfect editor answers."""
    return text


@pytest.mark.parametrize("size", [32, 48])
def test_editing_of_a_perfect_editor(editors, trained, size):
    """Catches a judge that fails true edits (single ones, chains, of any kind, in pictures of any
    size), that compares with another scene's truth, or that asks the same noise for every step.

    The pictures go through the shipped VAE, as a model's pictures do."""
    seeds = editors(draws_what_is_asked, says_what_was_done, size)
    n = 24 if size == 32 else 12
    numbers, results = mixtures.editing(trained, n=n, seed=3, size=size, progress=False)

    assert numbers["edits"] == 1.0
    assert numbers["kept"] == 1.0
    assert numbers["asked"] == 1.0
    assert numbers["chains"] >= 0.95                    # they go through the VAE three times
    assert set(numbers["kinds"]) == set(edits.KINDS)
    assert set(numbers["kinds"].values()) == {1.0}

    assert len(results) == n
    for _, picture, right in results:
        assert right
        assert picture.shape == (size, 2 * size + 2, 3)         # before, a line, after

    assert len(set(seeds)) == len(seeds)
    assert len(seeds) >= 4


def test_editing_of_one_who_does_nothing(editors, trained):
    """Catches a judge that does not look at what was asked, and a `kept` that drops with the edits:
    leaving all alone keeps all."""
    def does_nothing(before, text, after):
        return before

    def says_nothing(text, after):
        return ""

    editors(does_nothing, says_nothing)
    numbers, results = mixtures.editing(trained, n=24, seed=3, progress=False)
    assert numbers["edits"] == 0.0
    assert numbers["asked"] == 0.0
    assert numbers["kept"] == 1.0
    assert numbers["chains"] < 0.1
    assert not any(right for *_, right in results)


def test_editing_of_one_who_draws_it_anew(editors, trained):
    """Catches a `kept` that is blind to place: the right objects in the right cells, but each of
    them 3 pixels off. Catches answers that are no instruction, or one for another scene, too."""
    def draws_anew(before, text, after):
        drawn = []
        for thing in after:
            if thing in before:
                off = 3 if thing.x % 16 < 8 else -3     # to the middle of its cell, and beyond
                thing = thing._replace(x=thing.x + off, r=4.8)
            drawn.append(thing)
        return drawn

    def says_something_else(text, after):
        return "what a circle" if text.startswith("remove") else "remove the circle"

    editors(draws_anew, says_something_else)
    numbers, _ = mixtures.editing(trained, n=24, seed=3, progress=False)
    assert numbers["kept"] < 0.1
    assert numbers["edits"] < 0.5
    assert numbers["asked"] == 0.0


@pytest.mark.parametrize("n, seed", [
    (1, 18),                                            # one object: none is untouched
    (1, 6),                                             # two chains shorter than three come first
    (2, 0),
])
def test_editing_with_few_samples(editors, trained, n, seed):
    """Catches a division by nothing."""
    editors(draws_what_is_asked, says_what_was_done)
    numbers, results = mixtures.editing(trained, n=n, seed=seed, progress=False)
    assert numbers["edits"] == 1.0
    assert numbers["asked"] == 1.0
    assert numbers["chains"] == 1.0
    assert numbers["kept"] in (0.0, 1.0)
    assert len(results) == n
