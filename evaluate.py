"""
evaluate.py: the toy's own numbers, in one place                                          (Transfusion App. B.1, in miniature)

THE IDEA    A falling loss proves little: models with a leaking mask or a wrong t train with a beautiful curve. So measure what
            the model does. In the `scenes` world that needs no judge: the parser reads the drawn picture, the grammar reads
            the written caption, and the entropy of the language is known.
THE TABLE   the paper's                      here
              GenEval                        the same six categories and rule, by the exact parser        `geneval`
              CIDEr of captions              share of captions that are true of the picture               `captioning`
              C4 / Wikipedia perplexity      excess nats per token over the language's own entropy        `excess_nats`
              Llama suite, ranked 0-shot     two-choice deductions, ranked by likelihood                  `deductions`
              (not in the paper)             conditioning gap: does the model use its caption at all?     `conditioning_gap`
              (MNIST)                        digits that a separate classifier reads as asked             `digits`
PAPER/HERE  same: GenEval's include / exclude / position rule, ranked classification, greedy captions.
            our choice: beside GenEval's rule the stricter `exact`: nothing unnamed may be in the picture.
READ NEXT   train.py, which ends with this report      TRY IT  python evaluate.py      TEST  tests/test_evaluate.py
"""
import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import edits
import sample
import scale
import scenes
import vae as vae_module
from sample import OVER, decode_latents, encode_pixels, generate, load_kit
from sample import edit as sample_edit

CLASSIFIER = data.ASSETS / "mnist_classifier.pt"


def device_of(model):
    """Where a model computes; a model that is a plain function does so on the CPU."""
    return next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else torch.device("cpu")


def draw(kit, captions, **options):
    """`sample.draw`, divided among the ranks: the same pictures as one process draws."""
    return np.concatenate(scale.divided(lambda part, first: sample.draw(kit, part, first=first, **options), captions))


def describe(kit, latents):
    """`sample.describe`, divided among the ranks."""
    return sum(scale.divided(lambda part, first: sample.describe(kit, part), latents), [])


def geneval(kit, categories, n=50, held_out=False, seed=0, **drawing):
    """{category: {"rule", "exact": shares in 0..1, "n"}} over n prompts each; also the prompts and pictures, as
    (text, picture, exact). held_out: only prompts that name a colour-shape pair never seen in training."""
    rng, prompts = np.random.default_rng([seed, 7]), []
    for category in categories:
        if options := scenes.captions(category, held_out):             # every caption in turn, so that n prompts cover them
            order = rng.permutation(len(options))
            prompts += [options[order[k % len(options)]] for k in range(n)]
    pictures = np.concatenate([draw(kit, [text for text, _ in prompts[k: k + 200]], seed=seed + k, **drawing)
                               for k in tqdm(range(0, len(prompts), 200), desc="drawing", leave=False, disable=scale.rank() > 0)])
    seen = [scenes.parse(picture) for picture in pictures]
    verdicts = [[scenes.holds(claim, things, exact) for exact in (False, True)] for (_, claim), things in zip(prompts, seen)]
    table = {}
    for category in dict.fromkeys(claim.category for _, claim in prompts):
        rows = [v for v, (_, claim) in zip(verdicts, prompts) if claim.category == category]
        table[category] = {"rule": float(np.mean([v[0] for v in rows])), "exact": float(np.mean([v[1] for v in rows])),
                           "n": len(rows)}
    return table, [(text, picture, v[1]) for (text, _), picture, v in zip(prompts, pictures, verdicts)]


def captioning(kit, categories, n=200, seed=0, size=32):
    """(share of greedy captions of n unseen scenes that are true, list of (caption, picture, true)). True: GenEval's rule
    holds, and nothing in the picture is left unnamed. size: pixels per side."""
    rng, world = np.random.default_rng([seed, 8]), scenes.World(tuple(categories))
    drawn = [scenes.draw_scene(world.caption(rng)[1], rng, size) for _ in range(n)]
    pictures = np.stack([scenes.render(things, size) for things in drawn])
    said = describe(kit, encode_pixels(kit, pictures))
    true = [(claim := scenes.read_caption(text)) is not None and scenes.holds(claim, things)
            for text, things in zip(said, drawn)]
    return float(np.mean(true)), list(zip(said, pictures, true))


@torch.no_grad()
def excess_nats(kit, documents, n=500, seed=0):
    """(excess, entropy) in nats per token: the model's loss on n unseen documents minus the loss of a perfect model, on
    the same documents; and the latter. Text-only and caption-first documents: their words' probability is known exactly."""
    rng, chosen = np.random.default_rng([seed, 9]), []
    while len(chosen) < n:
        document = documents.draw(rng)
        if isinstance(document[0], str):
            chosen.append([part[1] if part[0] == "dropped" else part for part in document])
    sequences = [data.lay_out(document, kit.words, kit.model.config.patches) for document in chosen]
    ideal, total, words = -sum(documents.log_prob(document) for document in chosen), 0.0, 0
    for k in range(0, n, 100):                                          # pictures are noise (t = T): no word depends on them
        batch = data.pack(sequences[k: k + 100], kit.model.config.context)
        noise = torch.randn(len(batch.images), *kit.model.config.latent, generator=torch.Generator().manual_seed(k))
        batch = replace(batch, latents=noise, t=torch.full((len(noise),), kit.diffusion.T)).to(device_of(kit.model))
        logits, _ = kit.model(batch.tokens, batch.image_id, batch.doc_id, batch.learn, batch.latents, batch.t)
        total += F.cross_entropy(logits.float(), batch.tokens.roll(-1, 1)[batch.learn], reduction="sum").item()
        words += int(batch.learn.sum())
    return (total - ideal) / words, ideal / words


@torch.no_grad()
def deductions(kit, n=200, seed=0):
    """Share of two-choice deductions in which the right relation is likelier than the wrong one. Chance: 0.5."""
    rng, right = np.random.default_rng([seed, 10]), 0
    pairs = scenes.captions("color_attr")
    for _ in range(n):
        (_, claim), rel = pairs[rng.integers(len(pairs))], list(scenes.RELATIONS)[rng.integers(4)]
        scores = []
        for wrong in (False, True):
            sequence = data.lay_out([scenes.deduction_text(claim.objects, rel, wrong)], kit.words, kit.model.config.patches)
            none = dict(latents=torch.zeros(0, *kit.model.config.latent), t=torch.zeros(0, dtype=torch.long))
            batch = replace(data.pack([sequence], len(sequence.tokens)), **none).to(device_of(kit.model))
            logits, _ = kit.model(batch.tokens, batch.image_id, batch.doc_id, batch.learn, batch.latents, batch.t)
            scores.append(-F.cross_entropy(logits.float(), batch.tokens[0, 1:]).item())
        right += scores[0] > scores[1]
    return right / n


def gap_probe(pairs, vae, n):
    """(captions, latents, latents before or None) of the first n captioned pictures, or edits, for `conditioning_gap`."""
    encode = lambda index: vae_module.encode_all(vae, pairs.pixels[index], progress=False)[0]
    if isinstance(pairs, edits.Edits):
        before, captions, after = map(list, zip(*pairs.triples()[:n]))
        return captions, encode(after), encode(before)
    return pairs.captions[:n], encode(np.arange(min(n, len(pairs.captions)))), None


@torch.no_grad()
def conditioning_gap(model, words, diffusion, captions, latents, before=None, seed=0):
    """Diffusion loss with a wrong caption minus that with the right one, same noise, same t: 0 means that the model
    ignores its caption, however good the loss looks (PAPER.md §4.12). captions: N str; latents (N, c, h, w); before: the
    latents of the pictures that stand before the captions, clean, where these are edits."""
    g, N = torch.Generator().manual_seed(seed), len(captions)
    t = (torch.arange(N) * diffusion.T // N + 1)[torch.randperm(N, generator=g)]      # every noise level alike
    eps, means = torch.randn(latents.shape, generator=g), []
    other = [next((c for c in captions[k + 1:] + captions[:k] if c != own), own)          # the next different caption
             for k, own in enumerate(captions)]
    noisy = diffusion.add_noise(latents, eps, t)
    for texts in (captions, other):
        rows = [data.lay_out([*([("image", N + k, 0)] if before is not None else []), text, ("image", k, diffusion.T)],
                             words, model.config.patches) for k, text in enumerate(texts)]
        batch = data.pack(rows, model.config.context)
        k = batch.images
        all_x, all_t = (noisy, t) if before is None else (torch.cat([noisy, before]), torch.cat([t, torch.zeros_like(t)]))
        batch = replace(batch, latents=all_x[k], t=all_t[k]).to(device_of(model))
        out = model(batch.tokens, batch.image_id, batch.doc_id, batch.learn, batch.latents, batch.t)[1].float().cpu()
        drawn, k = out[k < N], k[k < N]
        means.append((drawn - diffusion.target(latents[k], eps[k])).square().mean().item())
    return means[1] - means[0]


# ------------------------------------------------------------------------------------------------------------------ editing
def beside(before, after):
    """(h, 2w + 2, 3) uint8: two pictures of (h, w, 3), a white line between them."""
    return np.concatenate([before, np.full_like(before[:, :2], 255), after], 1)


def editing(kit, n=200, seed=0, size=32, progress=True, **drawing):
    """Numbers of edits of unseen scenes: {"edits": share of n single edits after which the picture holds exactly what the
    instruction asks for, "kept": share of untouched objects that stand within 2 pixels of their place, "chains": share of n
    chains of three edits that end in the right scene, "asked": share of n questions "what changed ?" answered with an
    instruction that does lead from the one picture to the other, "kinds": {kind: exact}}; and (instruction, before |
    after, exact) to show. Each edit of a chain starts from the model's own picture. drawing: as `sample.edit`."""
    found = edits.scene_edits(max(4 * n, 60), [seed, 12], single=0, size=size, progress=False)
    pixels = lambda index: np.stack([found.pixels[k] for k in index])
    change = lambda x, said, seed: torch.cat([sample_edit(kit, x[k: k + 100], said[k: k + 100], seed=seed + k, **drawing)
                                              for k in range(0, len(said), 100)])
    before, said, after = map(list, zip(*[(pictures[0], texts[0], pictures[1]) for pictures, texts in found.chains[:n]]))
    drawn = decode_latents(kit, change(encode_pixels(kit, pixels(before)), said, seed))
    verdicts = [edits.judge(found.scenes[a], text, scenes.parse(picture), size) for a, text, picture in zip(before, said, drawn)]
    table = {kind: [v[0] for v, text in zip(verdicts, said) if edits.kind_of(text) == kind] for kind in edits.KINDS}
    shown = [(text, beside(a, b), v[0]) for text, a, b, v in zip(said, pixels(before), drawn, verdicts)]

    two = [encode_pixels(kit, pixels(index)) for index in (before, after)]
    answers, asked = generate(kit, [[a, b, "what changed ?"] for a, b in zip(*two)], max_pictures=0), []
    for answer, a, b in zip(answers, before, after):
        try:
            asked.append(edits.judge(found.scenes[a], answer[-1].removeprefix("what changed ? "), found.scenes[b], size)[0])
        except ValueError:                              # no instruction, or one that does not fit the picture
            asked.append(False)

    threes = [chain for chain in found.chains if len(chain[1]) == 3][:n]
    latents = encode_pixels(kit, pixels([pictures[0] for pictures, _ in threes]))
    for step in tqdm(range(3), desc="editing", disable=not progress, leave=False):
        latents = change(latents, [texts[step] for _, texts in threes], seed + 1000 * (step + 1))
    ends = [edits.judge_end(found.scenes[pictures[0]], found.scenes[pictures[-1]], scenes.parse(picture), size)
            for (pictures, _), picture in zip(threes, decode_latents(kit, latents))]
    return {"edits": float(np.mean([v[0] for v in verdicts])), "kept": sum(v[1] for v in verdicts) / max(1, sum(v[2] for v in verdicts)),
            "chains": float(np.mean(ends)), "asked": float(np.mean(asked)),
            "kinds": {kind: float(np.mean(v)) for kind, v in table.items() if v}}, shown


# ----------------------------------------------------------------------------------------------------------------- mixtures
def next_words(texts):
    """{words so far, a tuple: set of what may follow} over texts; "<boi>" follows a whole text."""
    table = {}
    for text in texts:
        words = (*text.split(), "<boi>")
        for k, word in enumerate(words):
            table.setdefault(words[:k], set()).add(word)
    return table


def well_formed(document):
    """Whether words and pictures alternate, and every stretch of words is a caption; or a deduction is all there is."""
    kinds = [isinstance(part, str) for part in document]
    words = document[0].split() if kinds == [True] else []
    end = words.index(".") if "." in words else 0
    if end > 4:
        a, b = words[1:3], words[end - 2: end]          # "a red circle is ... a blue square ."
        return any(document[0] == scenes.deduction_text((a, b), rel) for rel in scenes.RELATIONS)
    return len(document) > 1 and all(a != b for a, b in zip(kinds, kinds[1:])) and \
        all(scenes.read_caption(part) for part in document if isinstance(part, str))


@torch.no_grad()
def mixtures(kit, n=200, seed=0, categories=scenes.WORLDS["six"], **drawing):
    """Numbers about documents of several parts: {"single", "second": share of n pictures that are exactly what their caption
    says, alone, and, the same captions, after another caption and its picture; "boi": share of places in unseen captions
    at which the likeliest token is rightly BOI or rightly not, where the language leaves no choice; "well_formed": share of
    n open documents at temperature 1; "batch": how many times faster 16 mixed prompts are together than one at a time}."""
    rng, world = np.random.default_rng([seed, 13]), scenes.World(tuple(categories))
    texts, claims = zip(*[world.caption(rng) for _ in range(n)])
    exact = lambda latents: float(np.mean([scenes.holds(claim, scenes.parse(picture))
                                           for claim, picture in zip(claims, decode_latents(kit, latents))]))
    run = lambda prompts, seed: torch.stack([parts[-1] for k in range(0, n, 100) for parts in generate(
        kit, prompts[k: k + 100], draw_now=True, max_words=0, seed=seed + k, **drawing)])
    single = run([[text] for text in texts], seed)
    second = run([[texts[k - 1], single[k - 1], texts[k]] for k in range(n)], seed + 1000)

    follow, right = next_words([text for text in scenes.all_claims()] +
                               [scenes.deduction_text(claim.objects, "left of").split(" is ")[0] + " is" for _, claim in scenes.captions("color_attr")]), []
    for k in range(0, n, 50):
        rows = [data.lay_out([text, ("image", j, 0)], kit.words, kit.model.config.patches) for j, text in enumerate(texts[k: k + 50])]
        batch = data.pack(rows, max(len(row.tokens) for row in rows))
        batch = replace(batch, latents=single[k: k + 50][batch.images], t=torch.zeros_like(batch.images)).to(device_of(kit.model))
        logits, _ = kit.model(batch.tokens, batch.image_id, batch.doc_id, batch.learn, batch.latents, batch.t)
        said = torch.full_like(batch.tokens, -1)
        said[batch.learn] = logits.argmax(-1)
        for b, row in zip(said.tolist(), batch.tokens.tolist()):
            words = tuple(kit.words.words[w] for w in row[1: row.index(data.BOI)])
            for m in range(len(words) + 1):
                options = follow[words[:m]]
                if options == {"<boi>"} or "<boi>" not in options:
                    right.append((b[m] == data.BOI) == (options == {"<boi>"}))

    opened = [parts for k in range(0, n, 50) for parts in generate(
        kit, [[]] * min(50, n - k), max_words=kit.model.config.context, max_pictures=4, temperature=1.0, seed=seed + k, **drawing)]
    mixed = [[[texts[k % n]], [single[k % n]], [texts[k % n], single[k % n]], [texts[k % n], single[k % n], texts[(k + 1) % n]]][k % 4]
             for k in range(16)]
    options, times = dict(max_words=20, **drawing), []
    for groups in ([[k] for k in range(16)], [list(range(16))]):
        began = time.time()
        for group in groups:
            generate(kit, [mixed[k] for k in group], seed=list(group), **options)
        times.append(time.time() - began)
    return {"single": exact(single), "second": exact(second), "boi": float(np.mean(right)),
            "well_formed": float(np.mean([well_formed(parts) for parts in opened])), "batch": times[0] / times[1]}


# ------------------------------------------------------------------------------------------------------------------- MNIST
def digit_network():
    """A small convolutional classifier of 32x32 grey pictures, (M, 1, 32, 32) in [-1, 1] -> (M, 10)."""
    conv = lambda a, b: [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*conv(1, 16), *conv(16, 32), *conv(32, 64), nn.Flatten(), nn.Linear(64 * 16, 10))


def train_classifier(train, test, path=CLASSIFIER, epochs=3, seed=0):
    """Train the judge of drawn digits, save it in 16 bits, print its test accuracy."""
    torch.manual_seed(seed)
    net, rng = digit_network(), np.random.default_rng(seed)
    steps = epochs * len(train.pixels) // 128
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="training the classifier"):
        k = rng.integers(len(train.pixels), size=128)
        loss = F.cross_entropy(net(vae_module.to_float(train.pixels[k])), torch.from_numpy(train.labels[k]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    vae_module.save(path, {"kind": "classifier", "weights": {k: v.half() if v.is_floating_point() else v
                                                             for k, v in net.state_dict().items()}})
    print(f"wrote {path}: {(classify(load_classifier(path), test.pixels) == test.labels).mean():.2%} of the test digits")


def load_classifier(path=CLASSIFIER):
    """The saved judge."""
    net = digit_network()
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in vae_module.load(path, "classifier")["weights"].items()})
    return net.eval()


@torch.no_grad()
def classify(net, pixels):
    """(M,) int: the digit in each of (M, 32, 32, 1 or 3) uint8 pictures."""
    return torch.cat([net(vae_module.to_float(pixels[k: k + 500, ..., :1])).argmax(1) for k in range(0, len(pixels), 500)]).numpy()


def digits(kit, test, n=200, seed=0, guidance=3.0, **drawing):
    """{"guided", "unguided": share of n drawn digits that the classifier reads as asked, "captions": share of n
    test digits captioned right, "classifier": its accuracy on the test digits}; and the guided pictures."""
    net, asked = load_classifier(), np.arange(n) % 10
    prompts, found = [f"the digit {data.DIGITS[k]}" for k in asked], {}
    for name, w in (("guided", guidance), ("unguided", 1.0)):
        pictures = draw(kit, prompts, guidance=w, seed=seed, **drawing)
        right = classify(net, pictures) == asked
        found[name] = float(right.mean())
        if name == "guided":
            shown = list(zip(prompts, pictures, right))
    chosen = np.random.default_rng(seed).permutation(len(test.pixels))[: max(n, 1000)]
    said = sum((describe(kit, encode_pixels(kit, test.pixels[part])) for part in np.array_split(chosen, 4)), [])
    found["captions"] = float(np.mean([text == test.captions[k] for text, k in zip(said, chosen)]))
    found["classifier"] = float((classify(net, test.pixels) == test.labels).mean())
    return found, shown


# ------------------------------------------------------------------------------------------------------------------ report
def report(kit, name, categories=scenes.CATEGORIES, test=None, n=200, seed=0, held_out=True, **drawing):
    """(dict of numbers, lines to print, list of (prompt, picture, right) to show). name: "scenes", "mnist" or "folder";
    categories: those the model was trained on; test: data.Pairs, unseen; n: how many samples; drawing: as `sample.draw`."""
    began = time.time()
    if name == "mnist":
        found, shown = digits(kit, test, n, seed, **drawing)
    elif name == "mixtures":
        found, shown = mixtures(kit, n, seed, categories, **drawing), []
    elif name == "edits" and test.scenes:
        found, shown = editing(kit, n, seed, kit.model.config.latent[1] * kit.vae.f, **drawing)
    elif name == "edits":
        before, texts, _ = map(list, zip(*test.triples()[:min(n, 24)]))
        drawn = decode_latents(kit, sample_edit(kit, encode_pixels(kit, test.pixels[before]), texts, seed=seed, **drawing))
        found, shown = {}, [(t, beside(a, b), True) for t, a, b in zip(texts, test.pixels[before], drawn)]
    elif name == "scenes":
        asked = [c for c in categories if c in scenes.CATEGORIES]
        table, shown = geneval(kit, asked, -(-n // len(asked)), seed=seed, **drawing)
        found = {"geneval": table, "exact": float(np.mean([row["exact"] for row in table.values()])),
                 "rule": float(np.mean([row["rule"] for row in table.values()]))}
        if held_out:
            found["held_out"] = geneval(kit, asked, 50, held_out=True, seed=seed, **drawing)[0]
        found["captions"], _ = captioning(kit, categories, n, seed, kit.model.config.latent[1] * kit.vae.f)
        documents = data.Documents(data.load_scenes(5000, [seed, 2], categories, progress=False), kit.model.config.patches,
                                   kit.model.config.context)
        found["excess_nats"], found["entropy"] = excess_nats(kit, documents, 500, seed)
        found["deductions"] = deductions(kit, n, seed)
    else:
        texts = [test.captions[k] for k in range(min(n, 32, len(test.captions)))]
        found, shown = {}, [(t, p, True) for t, p in zip(texts, draw(kit, texts, seed=seed, **drawing))]
    if test is not None:
        found["conditioning_gap"] = conditioning_gap(kit.model, kit.words, kit.diffusion, *gap_probe(test, kit.vae, 256), seed=seed)
    found["seconds"] = time.time() - began
    return found, describe_report(found, drawing), shown


def describe_report(found, drawing):
    """The report as lines of text."""
    lines = [f"pictures drawn with {drawing}"]
    for key in ("geneval", "held_out"):
        for category, row in found.get(key, {}).items():
            lines.append(f"  {key:9s} {category:14s} exact {row['exact']:6.1%}   GenEval's rule {row['rule']:6.1%}   (n = {row['n']})")
    lines += [f"  edits     {kind:14s} exact {share:6.1%}" for kind, share in found.get("kinds", {}).items()]
    words = {"exact": "mean over categories, exact", "rule": "mean over categories, GenEval's rule",
             "guided": "guided digits read as asked", "unguided": "unguided digits read as asked",
             "classifier": "the classifier on test digits", "captions": "captions true of unseen pictures",
             "deductions": "two-choice deductions (chance 50%)", "edits": "edits exactly as told",
             "kept": "untouched objects within 2 pixels", "chains": "chains of three edits that end right",
             "asked": "\"what changed ?\" answered right", "single": "pictures of single captions, exact",
             "second": "second pictures of documents, exact", "boi": "BOI where the language has it",
             "well_formed": "open documents that are well formed"}
    lines += [f"  {text:40s} {found[key]:6.1%}" for key, text in words.items() if key in found]
    if "batch" in found:
        lines.append(f"  {'16 mixed prompts, batch against one by one':40s} {found['batch']:6.1f} times faster")
    if "excess_nats" in found:
        lines.append(f"  {'text loss above the language entropy':40s} {found['excess_nats']:6.3f} nats per token (entropy {found['entropy']:.3f})")
    if "conditioning_gap" in found:
        lines.append(f"  {'conditioning gap':40s} {found['conditioning_gap']:6.3f} (0 = the caption is ignored)")
    return lines + [f"  measured in {found['seconds']:.0f} s"]


def main(argv=None):
    """Measure a checkpoint as the command line says and print the report."""
    parser = argparse.ArgumentParser(description="Measure a trained model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default=str(data.ASSETS / "scenes.pt"), help="a model.pt of train.py")
    parser.add_argument("--data", choices=("scenes", "mnist", "edits", "mixtures"), default="scenes", help="what to measure")
    parser.add_argument("--data-dir", help="folder of the MNIST idx files")
    parser.add_argument("--world", choices=tuple(scenes.WORLDS), default="six", help="which captions of scenes")
    parser.add_argument("--n", type=int, default=600, help="pictures to draw, over all categories")
    parser.add_argument("--steps", type=int, default=250, help="diffusion steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance weight")
    parser.add_argument("--guide-over", default="both", choices=OVER, help="of --data edits: what guidance leaves out")
    parser.add_argument("--sampler", default="ddpm", help="ddpm, ddim or dpm++")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and noise")
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_argument("--train-classifier", action="store_true", help="train the judge of MNIST digits anew, then stop")
    args = parser.parse_args(argv)
    if args.train_classifier:
        return train_classifier(*(data.load_mnist(args.data_dir, split) for split in ("train", "test")))
    if args.json and not Path(args.json).parent.is_dir():
        raise data.UserError(f"cannot write {args.json}: its folder does not exist")
    if args.n < 1 or not 0 <= args.guidance < np.inf:
        raise data.UserError("--n must be at least 1 and --guidance 0 or more")
    if args.guide_over != "both" and args.data != "edits":
        raise data.UserError(f"--guide-over {args.guide_over} is for --data edits: elsewhere no picture stands before the words")
    kit, categories = load_kit(args.checkpoint, vae_module.DEVICE), scenes.WORLDS[args.world]
    some = dict(size=kit.model.config.latent[1] * kit.vae.f, split="test", n=256, seed=args.seed, progress=False)
    test, over = None, {}
    if args.data == "edits":
        test, over = edits.load_edits(args.data_dir, **some), dict(over=args.guide_over)
    elif args.data != "mixtures":
        test = data.load_pairs(args.data, args.data_dir, categories=categories, **some)
    found, lines, _ = report(kit, args.data, categories, test, args.n, args.seed,
                             steps=args.steps, guidance=args.guidance, sampler=args.sampler, **over)
    print("\n".join(lines))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    data.run_command(main)
