"""
evaluate.py: one command for every number                     (Transfusion App. B.1, in miniature)

THE IDEA    A falling loss proves little: models with a leaking mask or a wrong t train with a
            beautiful curve. So measure what the model does. In the world of scenes that needs no
            judge: the parser reads the drawn picture, the grammar reads the written caption, and
            the entropy of the language is known.
THE TABLE   the paper's                    here                                     in metrics/
              GenEval                      the same six categories, by a parser     scenes
              CIDEr of captions            share of captions that are true          scenes
              C4, Wikipedia perplexity     excess nats over the language's entropy  scenes
              Llama suite, ranked 0-shot   two-choice deductions, ranked            scenes
              edits, shown (Figs. 6, 10)   edits, counted; mixed documents          mixtures
              (not in the paper)           conditioning gap: is the caption used?   gap
              (not in the paper)           digits that a classifier reads as asked  digits
              (not in the paper)           your own pictures, found among themselves  folder
              CIDEr, FID, CLIP, GenEval    the paper's own, on files                coco
              perplexity, Llama suite      the paper's own, on files                likelihood
THE RULE    checkpoint, kind of data  ->  REPORTS[kind]  ->  numbers, pictures  ->  lines of text
PAPER/HERE  same: GenEval's include / exclude / position rule, ranked classification, greedy
            captions.
            our choice: beside GenEval's rule the stricter `exact`: nothing unnamed may be there.
READ NEXT   metrics/scenes.py, metrics/gap.py        TRY IT  python evaluate.py --n 60 --steps 25
TEST        tests/test_evaluate.py, tests/test_gap.py, tests/test_digits.py
"""
import argparse
import math
import time
from dataclasses import dataclass

import numpy as np

import data
from diffusion import SAMPLERS
from metrics import digits, drawing, folder, mixtures, sweep
from metrics import scenes as scene_metrics
from metrics.gap import caption_losses
from sample import GUIDE_OVER
from sources import choose, mnist, scenes
from sources.feed import probe
from support.checkpoint import encode_pixels, load_trained
from support.common import (
    ASSETS,
    Parser,
    UserError,
    check_seed,
    check_steps,
    check_writable,
    pick_device,
    run_command,
    write_json,
)


# ------------------------------------------------------------------------- what there is to measure
@dataclass
class Job:
    """What is to be measured, and how.

    categories  of scenes: those that the model was trained on
    test        unseen Pairs or Edits, or None
    n           how many samples
    seed        of prompts and noise
    texts       captions to draw, of shards, which keep no pixels
    options     as `sample.draw`: steps, guidance, sampler
    train       the Pairs or Edits that it has learned from, or None: data of your own is judged
                by its own pictures
    """
    categories: tuple
    test: object
    n: int
    seed: int
    texts: list
    options: dict
    train: object = None


def report_scenes(trained, job):
    """GenEval, captions, and text. This report and the others return (dict of numbers, list of
    (prompt, picture, right) to show)."""
    # 1. GenEval: n prompts, shared evenly among those of its categories that were trained.
    #    Then 50 per category that name a pair of colour and shape which training never shows:
    #    both words are known, the pair is new.
    categories = [name for name in job.categories if name in scenes.CATEGORIES]
    n = math.ceil(job.n / len(categories))
    table, results = scene_metrics.geneval(trained, categories, n, False, job.seed, **job.options)
    unseen, _ = scene_metrics.geneval(trained, categories, 50, True, job.seed, **job.options)
    numbers = {
        "geneval": table,
        "exact": float(np.mean([row["exact"] for row in table.values()])),
        "rule": float(np.mean([row["rule"] for row in table.values()])),
        "held_out": unseen,
        "distance": scene_metrics.crowd_distance(results, picture_size(trained), job.seed),
    }

    # 2. Captions of unseen scenes, of all categories: the seventh, which GenEval lacks, too.
    size = picture_size(trained)
    share, _ = scene_metrics.captioning(trained, job.categories, job.n, job.seed, size)
    numbers["captions"] = share

    # 3. Text. A Chameleon's documents have codes in them, whose entropy nobody knows: no excess.
    if trained.kind == "transfusion":
        excess, entropy = measure_excess(trained, job)
        numbers["excess_nats"] = excess
        numbers["entropy"] = entropy
    return numbers | report_text(trained, job), results


def measure_excess(trained, job):
    """(excess, entropy) of metrics.scenes.excess_nats, of unseen documents."""
    # The mixture of documents is that of the model's training, from its share of text to how many
    # pairs fit in its context. On another mixture its loss would have another floor.
    config = trained.model.config
    pairs = scenes.load_scenes(5000, [job.seed, 2], job.categories, progress=False)
    documents = data.Documents(pairs, config.patches, config.context,
                               text_share=trained.text_share, tokenizer=trained.tokenizer)
    world = scenes.World(tuple(job.categories))
    return scene_metrics.excess_nats(trained, documents, world, 500, job.seed)


def report_text(trained, job):
    """Numbers about text alone. All three kinds of model can be compared by them."""
    return {
        "alone": scene_metrics.deduction_nats(trained, 500, job.seed),
        "deductions": scene_metrics.deduction_accuracy(trained, job.n, job.seed),
    }


def report_mnist(trained, job):
    """Digits, by a classifier."""
    return digits.digits(trained, job.test, job.n, job.seed, **job.options)


def report_edits(trained, job):
    """Edits: of scenes they are counted, of a user's own pictures shown."""
    if job.test.scenes:
        return mixtures.editing(trained, job.n, job.seed, picture_size(trained), **job.options)
    return report_own(trained, job)


def report_mixtures(trained, job):
    """Documents of several parts."""
    return mixtures.mixing(trained, job.n, job.seed, job.categories, **job.options), []


def report_pictures(trained, job):
    """Any other data. If they bring a judge (sources/pairs.py), pictures and captions are counted.
    Of shards, which keep no pixels, a few captions are drawn and shown."""
    judge = getattr(job.test, "judge", None)
    if job.test and judge is None:
        return report_own(trained, job)
    n = job.n if judge else min(job.n, 32)
    texts = list(job.texts or job.test.captions)[:n]
    pictures = drawing.draw(trained, texts, seed=job.seed, **job.options)
    results = []
    for text, picture in zip(texts, pictures, strict=True):
        right = bool(judge(text, picture)) if judge else True
        results.append((text, picture, right))
    if judge is None:
        return {}, results

    # The other way round: what the model writes about unseen pictures, before the same judge.
    unseen = job.test.pixels[:n]
    captions = drawing.describe(trained, encode_pixels(trained, unseen))
    is_true = [bool(judge(text, picture)) for text, picture in zip(captions, unseen, strict=True)]
    shares = {"judged": np.mean([right for *_, right in results]), "captions": np.mean(is_true)}
    return {key: float(share) for key, share in shares.items()}, results


def report_own(trained, job):
    """Data of your own, without a judge: no rule says what is right, but its own pictures do."""
    return folder.report_folder(trained, job.train, job.test, job.n, job.seed, **job.options)


# By the name of the data; what is not named here gets `report_pictures`. For a new kind of report
# write a function and name it here: all that it needs to know is in the Job.
REPORTS = {
    "scenes": report_scenes,
    "mnist": report_mnist,
    "edits": report_edits,
    "mixtures": report_mixtures,
}


def report(trained, name, categories=scenes.CATEGORIES, test=None, n=200, seed=0, texts=(),
           train=None, **options):
    """(dict of numbers, lines to print, list of (prompt, picture, right) to show). name: of the
    data, see REPORTS; the others as in Job. Every process must call it."""
    began = time.time()
    job = Job(categories, test, n, seed, texts, options, train)
    if trained.kind == "llama":                         # it knows words only, of scenes or others
        numbers = report_text(trained, job) if name == "scenes" else {}
        numbers["seconds"] = time.time() - began
        return numbers, describe_report(numbers, None), []

    measure = REPORTS.get(name, report_pictures)
    numbers, results = measure(trained, job)
    if test is not None:
        # TRAP: a model that ignores its captions has a fine loss and draws fine pictures, only not
        # the right ones. On data of your own, where nothing is counted, look at this number.
        captions, latents, before = probe(test, trained.vae, 256)
        losses = caption_losses(
            trained.model, trained.tokenizer, trained.diffusion, captions, latents, before, seed)
        numbers["conditioning_gap"] = None
        if losses is not None:                          # not all captions are alike
            right, wrong = losses
            numbers["conditioning_gap"] = wrong - right
            if trained.kind == "transfusion":           # a Chameleon's is of codes
                numbers["diffusion_loss"] = right
    numbers["seconds"] = time.time() - began
    return numbers, describe_report(numbers, options), results


def picture_size(trained):
    """Pixels per side of the model's pictures."""
    return trained.model.config.latent[1] * trained.vae.f


# ----------------------------------------------------------------------------- as lines of text
SHARES = {                                             # numbers in 0..1, in the order of the report
    "exact": "mean over categories, exact",
    "rule": "mean over categories, GenEval's rule",
    "guided": "guided digits read as asked",
    "unguided": "unguided digits read as asked",
    "judged": "pictures as asked, says the data's judge",
    "classifier": "the classifier on test digits",
    "captions": "captions true of unseen pictures",
    "deductions": "two-choice deductions (chance 50%)",
    "edits": "edits exactly as told",
    "kept": "untouched objects within 2 pixels",
    "chains": "chains of three edits that end right",
    "asked": "\"what changed ?\" answered right",
    "single": "pictures of single captions, exact",
    "second": "second pictures of documents, exact",
    "boi": "BOI where the language has it",
    "well_formed": "greedy documents that are well formed",
    "sampled": "the same, sampled at temperature 1",
}


def describe_report(numbers, options):
    """The numbers of a report as lines of text. options: how pictures were drawn, or None."""
    lines = ["a Llama: words only"]
    if options:
        settings = ", ".join(f"{name} {value}" for name, value in options.items())
        lines = [f"pictures drawn with {settings}"]

    # 1. What has a row per category.
    for key in ("geneval", "held_out"):
        for category, row in numbers.get(key, {}).items():
            lines.append(f"  {key:9s} {category:14s} exact {row['exact']:6.1%}   "
                         f"GenEval's rule {row['rule']:6.1%}   (n = {row['n']})")
    for kind, share in numbers.get("kinds", {}).items():
        lines.append(f"  edits     {kind:14s} exact {share:6.1%}")

    # 2. What is one number. A report has only some of them.
    def add(text, value):
        lines.append(f"  {text:40s} {value}")

    for key, text in SHARES.items():
        if key in numbers:
            add(text, f"{numbers[key]:6.1%}")
    if "excess_nats" in numbers:
        add("text loss above the language entropy",
            f"{numbers['excess_nats']:6.3f} nats per token (entropy {numbers['entropy']:.3f})")
    if "alone" in numbers:
        add("text loss of deductions, likewise", f"{numbers['alone']:6.4f} nats per token")
    for text, value in folder.describe(numbers):
        add(text, value)
    if "distance" in numbers:
        add("Fréchet distance of latents to real ones", f"{numbers['distance']:6.2f}")
    if "diffusion_loss" in numbers:
        add("eq. 3 of unseen pictures", f"{numbers['diffusion_loss']:6.4f}")
    if "conditioning_gap" in numbers:
        gap = numbers["conditioning_gap"]
        if gap is None:
            add("conditioning gap", "cannot be measured: all unseen captions say the same")
        else:
            add("conditioning gap", f"{gap:6.3f} (0 = the caption is ignored)")
    lines.append(f"  measured in {numbers['seconds']:.0f} s")
    return lines


# -------------------------------------------------------------------------------- command line
def parse_arguments(argv=None):
    """The options of the command line, checked."""
    parser = Parser(
        description="Measure a trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default=str(ASSETS / "scenes.pt"), help="a model.pt of train.py")
    add("--data", choices=(*choose.SOURCES, "mixtures"), default="scenes", help="what to measure")
    add("--data-dir", help="folder of the MNIST idx files, of captions.jsonl, edits.jsonl or "
                            "documents.jsonl")
    add("--world", choices=tuple(scenes.WORLDS), default="six", help="which captions of scenes")
    add("--n", type=int, default=600, help="pictures to draw, over all categories")
    add("--steps", type=int, default=250, help="diffusion steps, 1 to 1000")
    add("--guidance", type=float, nargs="+", default=[3.0],
        help="guidance weight; several: a table of them")
    add("--guide-over", default="both", choices=GUIDE_OVER,
        help="of --data edits: what guidance leaves out")
    add("--sampler", default="ddpm", choices=SAMPLERS, help="ddpm is the paper's")
    add("--seed", type=int, default=0, help="seed of prompts and noise")
    add("--json", help="also write the numbers here")
    add("--train-classifier", action="store_true",
        help="train the judge of MNIST digits anew, then stop")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args):
    """Raise UserError for options that do not make sense, before any work is done."""
    if args.n < 1:
        raise UserError(f"--n must be at least 1, got {args.n}")
    check_steps(args.steps)
    sweep.check_weights(args.guidance)
    check_seed(args.seed)
    if args.guide_over != "both" and args.data != "edits":
        raise UserError(f"--guide-over {args.guide_over} is for --data edits: elsewhere no "
                        f"picture stands before the words")
    if args.json is not None:
        check_writable(args.json, ".json")


def check_kind(trained, args):
    """Raise UserError if this kind of model cannot be measured with these data."""
    if trained.kind == "transfusion":
        return
    only_ours = args.data in ("documents", "edits", "mixtures")
    if only_ours or (trained.kind == "llama" and args.data != "scenes"):
        raise UserError(f"{args.checkpoint} is a {trained.kind}: it cannot be measured with "
                        f"--data {args.data}")


def load_data(trained, args, split):
    """The Pairs or Edits of a split that the command line names; None where the measure draws its
    own scenes, or needs no training split."""
    own = args.data_dir and args.data != "mnist"        # pictures of your own
    if args.data == "mixtures" or (split == "train" and not own):
        return None
    # Pictures of the model's own size: of another, the gap at the end could not be measured.
    return choose.load_pairs(args.data, args.data_dir, picture_size(trained), split, n=256,
                             seed=args.seed, categories=scenes.WORLDS[args.world], progress=False)


def main(argv=None):
    """Measure a checkpoint as the command line says and print the report."""
    args = parse_arguments(argv)
    if args.train_classifier:
        train = mnist.load_mnist(args.data_dir, "train")
        test = mnist.load_mnist(args.data_dir, "test")
        return digits.train_classifier(train, test)

    trained = load_trained(args.checkpoint, pick_device())
    check_kind(trained, args)
    test = load_data(trained, args, "test")
    train = load_data(trained, args, "train")
    options = {"steps": args.steps, "sampler": args.sampler}
    if args.data == "edits":
        options["over"] = args.guide_over
    results = {}
    for weight in args.guidance:
        numbers, lines, _ = report(trained, args.data, scenes.WORLDS[args.world], test, args.n,
                                   args.seed, train=train, guidance=weight, **options)
        results[weight] = numbers
    # Paper: App. B.1. For the flagship, guidance is tuned per benchmark.
    if len(results) > 1:
        numbers = results
        lines = sweep.table(results, SHARES)
    if args.json:                                       # first: nothing can be lost any more
        write_json(args.json, numbers)
    print("\n".join([*trained.origin.lines(), *lines]))


if __name__ == "__main__":
    run_command(main)
