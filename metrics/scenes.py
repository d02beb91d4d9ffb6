"""
scenes.py: GenEval in miniature
"""
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from metrics import likelihood
from metrics.drawing import describe, draw
from scale import distributed
from sources import scenes
from support.checkpoint import device_of, encode_pixels


def geneval(trained, categories, n=50, held_out=False, seed=0, **drawing):
    """{category: {"rule", "exact": shares in 0..1, "n"}} over n prompts each; also the prompts and pictures, as
    (text, picture, exact). held_out: only prompts that name a colour-shape pair never seen in training."""
    rng, prompts = np.random.default_rng([seed, 7]), []
    for category in categories:
        if options := scenes.captions(category, held_out):             # every caption in turn, so that n prompts cover them
            order = rng.permutation(len(options))
            prompts += [options[order[k % len(options)]] for k in range(n)]
    pictures = np.concatenate([draw(trained, [text for text, _ in prompts[k: k + 200]], seed=seed + k, **drawing)
                               for k in tqdm(range(0, len(prompts), 200), desc="drawing", leave=False, disable=distributed.rank() > 0)])
    seen = [scenes.parse(picture) for picture in pictures]
    verdicts = [[scenes.holds(claim, things, exact) for exact in (False, True)] for (_, claim), things in zip(prompts, seen)]
    table = {}
    for category in dict.fromkeys(claim.category for _, claim in prompts):
        rows = [v for v, (_, claim) in zip(verdicts, prompts) if claim.category == category]
        table[category] = {"rule": float(np.mean([v[0] for v in rows])), "exact": float(np.mean([v[1] for v in rows])),
                           "n": len(rows)}
    return table, [(text, picture, v[1]) for (text, _), picture, v in zip(prompts, pictures, verdicts)]


def captioning(trained, categories, n=200, seed=0, size=32):
    """(share of greedy captions of n unseen scenes that are true, list of (caption, picture, true)). True: GenEval's rule
    holds, and nothing in the picture is left unnamed. size: pixels per side."""
    rng, world = np.random.default_rng([seed, 8]), scenes.World(tuple(categories))
    drawn = [scenes.draw_scene(world.caption(rng)[1], rng, size) for _ in range(n)]
    pictures = np.stack([scenes.render(things, size) for things in drawn])
    said = describe(trained, encode_pixels(trained, pictures))
    true = [(claim := scenes.read_caption(text)) is not None and scenes.holds(claim, things)
            for text, things in zip(said, drawn)]
    return float(np.mean(true)), list(zip(said, pictures, true))


def log_prob(documents, world, document):
    """ln p of a caption-first or text-only document's words, in nats: what a perfect model would reach. Exact.
    documents: the data.Documents that draws such documents; world: the scenes.World of its captions."""
    if isinstance(document[0], str) and len(document) == 1:
        return float(np.log(documents.text_share) + world.deduction_log_prob())
    captions = document[::2]
    share = np.log(1 - documents.text_share) + np.log(documents.caption_first) + np.log(documents.pairs_odds()[len(captions) - 1])
    return float(share + sum(world.caption_log_prob(text) for text in captions))


@torch.no_grad()
def excess_nats(trained, documents, world, n=500, seed=0):
    """(excess, entropy) in nats per token: the model's loss on n unseen documents minus the loss of a perfect model, on
    the same documents; and the latter. Text-only and caption-first documents: their words' probability is known exactly."""
    rng, chosen = np.random.default_rng([seed, 9]), []
    while len(chosen) < n:
        document = documents.draw(rng)
        if isinstance(document[0], str):
            chosen.append([part[1] if part[0] == "dropped" else part for part in document])
    sequences = [data.lay_out(document, trained.tokenizer, trained.model.config.patches) for document in chosen]
    ideal, total, words = -sum(log_prob(documents, world, document) for document in chosen), 0.0, 0
    for k in range(0, n, 100):                                          # pictures are noise (t = T): no word depends on them
        batch = data.pack(sequences[k: k + 100], trained.model.config.context)
        noise = torch.randn(len(batch.images), *trained.model.config.latent, generator=torch.Generator().manual_seed(k))
        batch = replace(batch, latents=noise, t=torch.full((len(noise),), trained.diffusion.T)).to(device_of(trained.model))
        logits, _ = trained.model(batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, batch.latents, batch.t)
        total += F.cross_entropy(logits.float(), batch.tokens.roll(-1, 1)[batch.has_loss], reduction="sum").item()
        words += int(batch.has_loss.sum())
    return (total - ideal) / words, ideal / words


def deduction_nats(trained, n=500, seed=0):
    """Nats per token above the entropy, of n text-only documents ("a red circle is ..."), from what follows the first "is" to
    the end: there no caption can be meant, so models that were trained on another share of them can be compared."""
    rng, world, pairs = np.random.default_rng([seed, 14]), scenes.World(), scenes.captions("color_attr")
    seconds = Counter(claim.objects[0] for _, claim in pairs)           # how many objects may stand second
    texts = [world.deduction(rng) for _ in range(n)]
    ids = [trained.tokenizer.encode(text) + [data.EOS] for text in texts]
    total = -sum(found for found, _ in likelihood.log_likelihood(trained.model, [(row[:4], row[4:]) for row in ids]))       # "a red circle is"
    entropy = sum(np.log(len(scenes.RELATIONS) * seconds[tuple(text.split()[1:3])]) for text in texts)
    return (total - entropy) / sum(len(row) - 4 for row in ids)


def deductions(trained, n=200, seed=0):
    """Share of two-choice deductions in which the right relation is likelier than the wrong one. Chance: 0.5."""
    return likelihood.ranked(trained, likelihood.read_questions("scenes", n, seed))["acc"]
