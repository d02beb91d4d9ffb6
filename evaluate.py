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
from pathlib import Path

import numpy as np

import data
import sample
from metrics import mixtures
from metrics.digits import digits, train_classifier
from metrics.drawing import draw
from metrics.gap import conditioning_gap
from metrics.scenes import captioning, deduction_nats, deductions, excess_nats, geneval
from sample import GUIDE_OVER
from sources import choose, edits, mnist, scenes
from sources.feed import probe
from support.checkpoint import decode_latents, encode_pixels, load_trained
from support.common import ASSETS, pick_device, UserError, run_command


# ------------------------------------------------------------------------------------------------------------------ report
def report(trained, name, categories=scenes.CATEGORIES, test=None, n=200, seed=0, held_out=True, texts=(), **drawing):
    """(dict of numbers, lines to print, list of (prompt, picture, right) to show). name: "scenes", "mnist", "edits", "mixtures",
    "folder" or "shards"; categories: those the model was trained on; test: sources.Pairs, unseen; texts: captions to draw, of
    shards, which keep no pixels; n: how many samples; drawing: as `sample.draw`."""
    began, shown, draws = time.time(), [], trained.kind != "llama"
    if not draws:
        found = {}
    elif name == "mnist":
        found, shown = digits(trained, test, n, seed, **drawing)
    elif name == "mixtures":
        found, shown = mixtures.mixing(trained, n, seed, categories, **drawing), []
    elif name == "edits" and test.scenes:
        found, shown = mixtures.editing(trained, n, seed, trained.model.config.latent[1] * trained.vae.f, **drawing)
    elif name == "edits":
        before, said, _ = map(list, zip(*test.triples()[:min(n, 24)]))
        drawn = decode_latents(trained, sample.edit(trained, encode_pixels(trained, test.pixels[before]), said, seed=seed, **drawing))
        found, shown = {}, [(t, mixtures.beside(a, b), True) for t, a, b in zip(said, test.pixels[before], drawn)]
    elif name == "scenes":
        asked = [c for c in categories if c in scenes.CATEGORIES]
        table, shown = geneval(trained, asked, -(-n // len(asked)), seed=seed, **drawing)
        found = {"geneval": table, "exact": float(np.mean([row["exact"] for row in table.values()])),
                 "rule": float(np.mean([row["rule"] for row in table.values()]))}
        if held_out:
            found["held_out"] = geneval(trained, asked, 50, held_out=True, seed=seed, **drawing)[0]
        found["captions"], _ = captioning(trained, categories, n, seed, trained.model.config.latent[1] * trained.vae.f)
    else:
        texts = list(texts or test.captions)[:min(n, 32)]
        found, shown = {}, [(t, p, True) for t, p in zip(texts, draw(trained, texts, seed=seed, **drawing))]
    if name == "scenes":
        if trained.kind == "transfusion":
            world = scenes.World(tuple(categories))
            documents = data.Documents(scenes.load_scenes(5000, [seed, 2], categories, progress=False), trained.model.config.patches,
                                       trained.model.config.context, text_share=trained.text_share)
            found["excess_nats"], found["entropy"] = excess_nats(trained, documents, world, 500, seed)
        found["alone"] = deduction_nats(trained, 500, seed)
        found["deductions"] = deductions(trained, n, seed)
    if test is not None and draws:
        found["conditioning_gap"] = conditioning_gap(trained.model, trained.tokenizer, trained.diffusion, *probe(test, trained.vae, 256), seed=seed)
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
    parser.add_argument("--checkpoint", default=str(ASSETS / "scenes.pt"), help="a model.pt of train.py")
    parser.add_argument("--data", choices=("scenes", "mnist", "edits", "mixtures"), default="scenes", help="what to measure")
    parser.add_argument("--data-dir", help="folder of the MNIST idx files")
    parser.add_argument("--world", choices=tuple(scenes.WORLDS), default="six", help="which captions of scenes")
    parser.add_argument("--n", type=int, default=600, help="pictures to draw, over all categories")
    parser.add_argument("--steps", type=int, default=250, help="diffusion steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance weight")
    parser.add_argument("--guide-over", default="both", choices=GUIDE_OVER, help="of --data edits: what guidance leaves out")
    parser.add_argument("--sampler", default="ddpm", help="ddpm, ddim or dpm++")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and noise")
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_argument("--train-classifier", action="store_true", help="train the judge of MNIST digits anew, then stop")
    args = parser.parse_args(argv)
    if args.train_classifier:
        return train_classifier(*(mnist.load_mnist(args.data_dir, split) for split in ("train", "test")))
    if args.json and not Path(args.json).parent.is_dir():
        raise UserError(f"cannot write {args.json}: its folder does not exist")
    if args.n < 1 or not 0 <= args.guidance < np.inf:
        raise UserError("--n must be at least 1 and --guidance 0 or more")
    if args.guide_over != "both" and args.data != "edits":
        raise UserError(f"--guide-over {args.guide_over} is for --data edits: elsewhere no picture stands before the words")
    trained, categories = load_trained(args.checkpoint, pick_device()), scenes.WORLDS[args.world]
    if trained.kind != "transfusion" and args.data in ("edits", "mixtures") or trained.kind == "llama" and args.data != "scenes":
        raise UserError(f"{args.checkpoint} is a {trained.kind}: it cannot be measured with --data {args.data}")
    some = dict(size=trained.model.config.latent[1] * trained.vae.f, split="test", n=256, seed=args.seed, progress=False)
    test, over = None, {}
    if args.data == "edits":
        test, over = edits.load_edits(args.data_dir, **some), dict(over=args.guide_over)
    elif args.data != "mixtures":
        test = choose.load_pairs(args.data, args.data_dir, categories=categories, **some)
    found, lines, _ = report(trained, args.data, categories, test, args.n, args.seed,
                             steps=args.steps, guidance=args.guidance, sampler=args.sampler, **over)
    print("\n".join(lines))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_command(main)
