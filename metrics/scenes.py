"""
scenes.py: GenEval in miniature, captions, and text against its entropy       (Transfusion App. B.1)

THE IDEA    In the world of scenes nothing needs a judge. The parser reads a drawn picture back
            into objects, the grammar reads a written caption, and the language's entropy is a
            number that we know. So every number here is counted or computed.
A PICTURE   "a red circle left of a blue square" --model--> picture --parse--> red circle at 8,9;
                                                                               blue square at 24,8
                                                                               both there? left of?
THE RULE    `rule`     GenEval's: every named object is there, no counted one too often, and the
                       relation holds
            `exact`    the same, and nothing else is in the picture
            excess     (nats of the model - nats of a perfect one) / tokens, same documents.
                       The latter is -ln p of the grammar itself, so 0 is the best there is.
SHAPES      pictures (N, h, w, 3) uint8; a batch's fields as in data.py
PAPER/HERE  same: GenEval's six categories and its rule; captions of unseen pictures, greedy; a
            text task by ranked classification, 0-shot.
            our choice: in place of CIDEr the share of captions that are true, and in place of
            perplexity the excess, because our language has a floor that is known.
READ NEXT   ../sources/scenes.py, the world        TRY IT  python evaluate.py --n 60 --steps 25
TEST        tests/test_evaluate.py
"""
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from metrics import coco, drawing, likelihood
from metrics.questions import deduction_questions
from scale import distributed
from sources import scenes
from support.checkpoint import device_of, encode_pixels
from support.common import ASSETS, pick_device


# ---------------------------------------------------------------------------- pictures and captions
def geneval(trained, categories, n=50, held_out=False, seed=0, **options):
    """GenEval's numbers: ({category: {"rule", "exact": shares in 0..1, "n"}}, [(prompt, picture,
    exact)]). Every process must call it.

    categories  names of sources/scenes.py
    n           prompts per category
    held_out    ask only for pairs of colour and shape that training never shows
    options     as `sample.draw`: steps, guidance, sampler"""
    prompts = choose_prompts(categories, n, held_out, seed)
    pictures = []
    parts = range(0, len(prompts), 200)                 # 200 at a time: their caches take memory
    for k in tqdm(parts, desc="drawing", leave=False, disable=distributed.rank() > 0):
        texts = [text for text, _ in prompts[k: k + 200]]
        pictures += list(drawing.draw(trained, texts, seed=seed + k, **options))

    verdicts = {}                                       # category: [(rule, exact)]
    results = []
    for (text, claim), picture in zip(prompts, pictures, strict=True):
        things = scenes.parse(picture)
        rule = scenes.holds(claim, things, exact=False)
        exact = scenes.holds(claim, things, exact=True)
        verdicts.setdefault(claim.category, []).append((rule, exact))
        results.append((text, picture, exact))

    table = {}
    for category, rows in verdicts.items():
        rule, exact = np.mean(rows, axis=0)
        table[category] = {
            "rule": float(rule),
            "exact": float(exact),
            "n": len(rows),
        }
    return table, results


def crowd_distance(results, size=32, seed=0):
    """How far drawn pictures are, as a crowd, from real ones of the same captions: the Fréchet
    distance of the latents of the shipped VAE, whatever the model's own VAE is. It stands in for
    FID. Fewer pictures than latents' dimensions make it too large: compare equal numbers.

    results: `geneval`'s; size: pixels per side"""
    rng = np.random.default_rng([seed, 18])
    real = []
    for text, _, _ in results:
        things = scenes.draw_scene(scenes.read_caption(text), rng, size)
        real.append(scenes.render(things, size))
    drawn = [picture for _, picture, _ in results]
    features = coco.vae_features(ASSETS / "scenes_vae.pt", pick_device())
    features_real = features(np.stack(real))
    features_drawn = features(np.stack(drawn))
    return coco.frechet(features_real, features_drawn)


def choose_prompts(categories, n, held_out, seed):
    """[(text, Claim)]: n prompts of each category that has any; of held-out ones only two have."""
    rng = np.random.default_rng([seed, 7])
    prompts = []
    for category in categories:
        captions = scenes.captions(category, held_out)
        if captions:
            # Every caption in turn. Drawn with repetition, a model that knows half of them could
            # be lucky.
            order = rng.permutation(len(captions))
            for k in range(n):
                number = order[k % len(order)]
                prompts.append(captions[number])
    return prompts


def captioning(trained, categories, n=200, seed=0, size=32):
    """(share of captions of n unseen scenes that are true, [(caption, picture, true)]). True: what
    the caption says holds, and nothing in the picture is left unnamed. size: pixels per side.
    Every process must call it."""
    rng = np.random.default_rng([seed, 8])
    world = scenes.World(tuple(categories))
    truth = []                                          # the objects of each scene
    for _ in range(n):
        _, claim = world.caption(rng)
        truth.append(scenes.draw_scene(claim, rng, size))
    pictures = np.stack([scenes.render(things, size) for things in truth])
    captions = drawing.describe(trained, encode_pixels(trained, pictures))

    # A caption need not be the one that the scene was drawn for: several are true of a scene.
    right = []
    for text, things in zip(captions, truth, strict=True):
        claim = scenes.read_caption(text)
        right.append(claim is not None and scenes.holds(claim, things))
    results = list(zip(captions, pictures, right, strict=True))
    return float(np.mean(right)), results


# ------------------------------------------------------------------------------- text and its floor
def log_prob(documents, world, document):
    """ln p of the words of a document, in nats, exact: what a perfect model would reach.

    documents   the data.Documents that draws such documents
    world       the scenes.World of its captions
    document    text alone, or captions each followed by its picture"""
    if len(document) == 1:                              # a deduction, without a picture
        return float(np.log(documents.text_share) + world.deduction_log_prob())

    # First the layout: this is no text alone, captions come first, and there are so many pairs. A
    # model reads that off the markers. Then the words.
    captions = document[::2]
    odds = documents.pairs_odds()[len(captions) - 1]
    layout = np.log(1 - documents.text_share)
    layout += np.log(documents.caption_first)
    layout += np.log(odds)
    words = sum(world.caption_log_prob(text) for text in captions)
    return float(layout + words)


def excess_nats(trained, documents, world, n=500, seed=0):
    """(excess, entropy) in nats per token, over n unseen documents: the model's loss minus a
    perfect model's on the same documents; and the latter. documents, world: see `log_prob`."""
    rng = np.random.default_rng([seed, 9])
    chosen = []
    while len(chosen) < n:
        document = documents.draw(rng)
        # Only documents that begin with words: the probability of these is known exactly.
        if isinstance(document[0], str):
            chosen.append(restore_dropped(document))
    ideal = -sum(log_prob(documents, world, document) for document in chosen)

    total = 0.0
    tokens = 0
    for k in range(0, n, 100):
        nats, count = text_nats(trained, chosen[k: k + 100], seed=k)
        total += nats
        tokens += count
    return (total - ideal) / tokens, ideal / tokens


def restore_dropped(document):
    """The same document with its dropped captions put back: they have words, after all."""
    parts = []
    for part in document:
        if part[0] == "dropped":
            part = part[1]
        parts.append(part)
    return parts


@torch.no_grad()
def text_nats(trained, documents, seed=0):
    """(sum of nats, how many tokens) of the words of some documents, whose pictures are pure noise.
    seed: of that noise."""
    model = trained.model
    rows = []
    for document in documents:
        rows.append(data.lay_out(document, trained.tokenizer, model.config.patches))
    batch = data.pack(rows, model.config.context)

    # In these documents each picture stands behind its caption, and no word depends on one. So
    # the pictures need not be encoded: pure noise does, at t = T.
    M = len(batch.images)
    g = torch.Generator().manual_seed(seed)
    batch.latents = torch.randn(M, *model.config.latent, generator=g)
    batch.t = torch.full((M,), trained.diffusion.T)
    batch = batch.to(device_of(model))

    logits, _ = model(
        batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, batch.latents, batch.t,
    )
    following = batch.tokens.roll(-1, 1)[batch.has_loss]
    nats = F.cross_entropy(logits.float(), following, reduction="sum")
    return nats.item(), len(following)


def deduction_nats(trained, n=500, seed=0):
    """Nats per token above the entropy, of n documents of text alone ("a red circle is ...").
    Every process must call it."""
    rng = np.random.default_rng([seed, 14])
    world = scenes.World()
    pairs = scenes.captions("color_attr")
    partners = Counter(claim.objects[0] for _, claim in pairs)      # how many may stand second

    # Only what follows the first "is" counts. There the text cannot be a caption any more, so
    # models that were trained on another share of captions can be compared.
    begin = len("a red circle is".split())
    texts = [world.deduction(rng) for _ in range(n)]
    requests = []
    entropy = 0.0
    for text in texts:
        ids = trained.tokenizer.encode(text) + [data.EOS]
        requests.append((ids[:begin], ids[begin:]))
        first = tuple(text.split()[1:3])                # ("red", "circle")
        answers = len(scenes.RELATIONS) * partners[first]
        entropy += np.log(answers)                      # all of them equally likely

    results = likelihood.log_likelihood(trained.model, requests)
    total = -sum(log_p for log_p, _ in results)
    tokens = sum(len(answer) for _, answer in requests)
    return (total - entropy) / tokens


def deduction_accuracy(trained, n=200, seed=0):
    """Share of two-choice deductions in which the right relation is likelier than the wrong one.
    Chance: 0.5. Every process must call it."""
    questions = deduction_questions(n, seed)
    return likelihood.ranked(trained, questions)["acc"]
