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
              edits, shown (Figs. 6, 10)     edits, counted; documents of several parts                   mixtures.py
PAPER/HERE  same: GenEval's include / exclude / position rule, ranked classification, greedy captions.
            our choice: beside GenEval's rule the stricter `exact`: nothing unnamed may be in the picture.
READ NEXT   likelihood.py, coco.py: the paper's own, on files      TRY IT  python evaluate.py      TEST  tests/test_evaluate.py
"""
import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import chameleon
import data
import edits
import likelihood
import mixtures
import sample
import scale
import scenes
import sources
import vae as vae_module
from kit import decode_latents, device_of, encode_pixels, load_kit
from sample import OVER

CLASSIFIER = data.ASSETS / "mnist_classifier.pt"


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


def deduction_nats(kit, n=500, seed=0):
    """Nats per token above the entropy, of n text-only documents ("a red circle is ..."), from what follows the first "is" to
    the end: there no caption can be meant, so models that were trained on another share of them can be compared."""
    rng, world, pairs = np.random.default_rng([seed, 14]), scenes.World(), scenes.captions("color_attr")
    seconds = Counter(claim.objects[0] for _, claim in pairs)           # how many objects may stand second
    texts = [world.deduction(rng) for _ in range(n)]
    ids = [kit.words.encode(text) + [data.EOS] for text in texts]
    total = -sum(found for found, _ in likelihood.log_likelihood(kit.model, [(row[:4], row[4:]) for row in ids]))       # "a red circle is"
    entropy = sum(np.log(len(scenes.RELATIONS) * seconds[tuple(text.split()[1:3])]) for text in texts)
    return (total - entropy) / sum(len(row) - 4 for row in ids)


def deductions(kit, n=200, seed=0):
    """Share of two-choice deductions in which the right relation is likelier than the wrong one. Chance: 0.5."""
    return likelihood.ranked(kit, likelihood.read_questions("scenes", n, seed))["acc"]


def gap_probe(pairs, vae, n):
    """(captions, latents, latents before or None) of the first n captioned pictures, or edits, for `conditioning_gap`. With a
    VQ-VAE codes in place of latents."""
    if vae.quantiser:
        return pairs.captions[:n], vae_module.encode_all_codes(vae, pairs.pixels[:n], progress=False), None
    encode = lambda index: vae_module.encode_all(vae, pairs.pixels[index], progress=False)[0]
    if isinstance(pairs, edits.Edits):
        before, captions, after = map(list, zip(*pairs.triples()[:n]))
        return captions, encode(after), encode(before)
    return pairs.captions[:n], encode(np.arange(min(n, len(pairs.captions)))), None


@torch.no_grad()
def conditioning_gap(model, words, diffusion, captions, latents, before=None, seed=0):
    """Diffusion loss with a wrong caption minus that with the right one, same noise, same t: 0 means that the model
    ignores its caption, however good the loss looks (PAPER.md §4.12). captions: N str; latents (N, c, h, w); before: the
    latents of the pictures that stand before the captions, clean, where these are edits. Of codes (N, h, w) int64: nats."""
    if latents.dtype == torch.long:
        return chameleon.code_gap(model, words, captions, latents)
    g, N = torch.Generator().manual_seed(seed), len(captions)
    t = (torch.arange(N) * diffusion.T // N + 1)[torch.randperm(N, generator=g)]      # every noise level alike
    eps, means = torch.randn(latents.shape, generator=g), []
    noisy = diffusion.add_noise(latents, eps, t)
    for texts in (captions, data.wrong_captions(captions)):
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
    prompts, found = [f"the digit {sources.DIGITS[k]}" for k in asked], {}
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
def report(kit, name, categories=scenes.CATEGORIES, test=None, n=200, seed=0, held_out=True, texts=(), **drawing):
    """(dict of numbers, lines to print, list of (prompt, picture, right) to show). name: "scenes", "mnist", "edits", "mixtures",
    "folder" or "shards"; categories: those the model was trained on; test: sources.Pairs, unseen; texts: captions to draw, of
    shards, which keep no pixels; n: how many samples; drawing: as `sample.draw`."""
    began, shown, draws = time.time(), [], kit.kind != "llama"
    if not draws:
        found = {}
    elif name == "mnist":
        found, shown = digits(kit, test, n, seed, **drawing)
    elif name == "mixtures":
        found, shown = mixtures.mixing(kit, n, seed, categories, **drawing), []
    elif name == "edits" and test.scenes:
        found, shown = mixtures.editing(kit, n, seed, kit.model.config.latent[1] * kit.vae.f, **drawing)
    elif name == "edits":
        before, said, _ = map(list, zip(*test.triples()[:min(n, 24)]))
        drawn = decode_latents(kit, sample.edit(kit, encode_pixels(kit, test.pixels[before]), said, seed=seed, **drawing))
        found, shown = {}, [(t, mixtures.beside(a, b), True) for t, a, b in zip(said, test.pixels[before], drawn)]
    elif name == "scenes":
        asked = [c for c in categories if c in scenes.CATEGORIES]
        table, shown = geneval(kit, asked, -(-n // len(asked)), seed=seed, **drawing)
        found = {"geneval": table, "exact": float(np.mean([row["exact"] for row in table.values()])),
                 "rule": float(np.mean([row["rule"] for row in table.values()]))}
        if held_out:
            found["held_out"] = geneval(kit, asked, 50, held_out=True, seed=seed, **drawing)[0]
        found["captions"], _ = captioning(kit, categories, n, seed, kit.model.config.latent[1] * kit.vae.f)
    else:
        texts = list(texts or test.captions)[:min(n, 32)]
        found, shown = {}, [(t, p, True) for t, p in zip(texts, draw(kit, texts, seed=seed, **drawing))]
    if name == "scenes":
        if kit.kind == "transfusion":
            documents = data.Documents(sources.load_scenes(5000, [seed, 2], categories, progress=False), kit.model.config.patches,
                                       kit.model.config.context, text_share=kit.text_share)
            found["excess_nats"], found["entropy"] = excess_nats(kit, documents, 500, seed)
        found["alone"] = deduction_nats(kit, 500, seed)
        found["deductions"] = deductions(kit, n, seed)
    if test is not None and draws:
        found["conditioning_gap"] = conditioning_gap(kit.model, kit.words, kit.diffusion, *gap_probe(test, kit.vae, 256), seed=seed)
    found["seconds"] = time.time() - began
    return found, describe_report(found, drawing if draws else None), shown


def describe_report(found, drawing):
    """The report as lines of text."""
    lines = [f"pictures drawn with {drawing}" if drawing else "a Llama: words only"]
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
             "well_formed": "greedy documents that are well formed", "sampled": "the same, sampled at temperature 1"}
    lines += [f"  {text:40s} {found[key]:6.1%}" for key, text in words.items() if key in found]
    if "batch" in found:
        lines.append(f"  {'16 mixed prompts, batch against one by one':40s} {found['batch']:6.1f} times faster")
    if "excess_nats" in found:
        lines.append(f"  {'text loss above the language entropy':40s} {found['excess_nats']:6.3f} nats per token (entropy {found['entropy']:.3f})")
    if "alone" in found:
        lines.append(f"  {'text loss of deductions, likewise':40s} {found['alone']:6.4f} nats per token")
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
        return train_classifier(*(sources.load_mnist(args.data_dir, split) for split in ("train", "test")))
    if args.json and not Path(args.json).parent.is_dir():
        raise data.UserError(f"cannot write {args.json}: its folder does not exist")
    if args.n < 1 or not 0 <= args.guidance < np.inf:
        raise data.UserError("--n must be at least 1 and --guidance 0 or more")
    if args.guide_over != "both" and args.data != "edits":
        raise data.UserError(f"--guide-over {args.guide_over} is for --data edits: elsewhere no picture stands before the words")
    kit, categories = load_kit(args.checkpoint, vae_module.DEVICE), scenes.WORLDS[args.world]
    if kit.kind != "transfusion" and args.data in ("edits", "mixtures") or kit.kind == "llama" and args.data != "scenes":
        raise data.UserError(f"{args.checkpoint} is a {kit.kind}: it cannot be measured with --data {args.data}")
    some = dict(size=kit.model.config.latent[1] * kit.vae.f, split="test", n=256, seed=args.seed, progress=False)
    test, over = None, {}
    if args.data == "edits":
        test, over = edits.load_edits(args.data_dir, **some), dict(over=args.guide_over)
    elif args.data != "mixtures":
        test = sources.load_pairs(args.data, args.data_dir, categories=categories, **some)
    found, lines, _ = report(kit, args.data, categories, test, args.n, args.seed,
                             steps=args.steps, guidance=args.guidance, sampler=args.sampler, **over)
    print("\n".join(lines))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    data.run_command(main)
