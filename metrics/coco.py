"""
coco.py: pictures and captions, judged by the field's yardsticks    (Transfusion §4.1, App. B.1)

THE IDEA    A caption is good if it says what people say of the same picture: CIDEr counts the
            phrases that they share, rare ones most. Drawn pictures are good if, as a crowd, they
            cannot be told from real ones, and if each fits its prompt. FID compares what a network
            sees in the two crowds; CLIP score compares what another one sees in a picture and in
            its prompt.
A PICTURE   photo --model--> "a cat on a mat" --+-- CIDEr     prompt --model--> picture --+-- CLIP
            five people's captions of it      --+                        real photos    --+-- FID
THE RULE    CIDEr-D   100 * mean over pictures, references and n = 1..4 of
                      10 exp(-(l - l')^2 / 72) sum over n-grams of min(g, g') g' / (|g| |g'|)
                      g, g'  counts of n-grams in the answer and in a reference, each times
                             ln(pictures / pictures that use it);  l, l'  their lengths in words
                                                                          Vedantam et al. 2015
            FID       |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))               Heusel et al. 2017
                      m, S   mean and covariance of the features of a crowd
            CLIP      100 * mean cosine of a picture's vector and its prompt's
                                                                           Radford et al. 2021
SHAPES      pictures (N, h, w, 3) uint8; features (N, d) float
PAPER/HERE  same: greedy captions of Karpathy's test split (`--only captions`). Pictures drawn from
            one random caption each of the validation set, 30,000, in the ablations 5,000 (`--only
            pictures`), in 250 steps.
            our choice: FID's real pictures are those whose captions are drawn. The paper does not
            say which CLIP it used.
            differs: COCO cuts words with a Java program. We take runs of letters and digits, with
            - . , : inside, in lower case. It makes "do n't" of "don't", we "don t".
            Two networks of others are needed, as files: Inception (inception-2015-12-05.pt,
            TorchScript, published with StyleGAN2-ADA) and CLIP (a folder of transformers'). Not run
            with them here: no network; the tests have stand-ins. Without Inception the distance is
            that of a VAE's latents, which toys need and nobody should call FID.
            GenEval judges with a detector of its own: `draw_geneval` draws its prompts into the
            folders that its script reads.
READ NEXT   ../evaluate.py, where the scenes world needs no judge
TRY IT      python -m metrics.coco
            python -m metrics.coco scenes --limit 200 --steps 25 --sampler dpm++
TEST        tests/test_coco.py (ours = pycocoevalcap, scipy)
"""
import argparse
import functools
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import chameleon
import sample
from diffusion import SAMPLERS
from metrics import sweep
from scale import distributed
from sources import scenes
from sources.pairs import clean_caption, print_skipped
from support import checkpoint
from support.checkpoint import encode_pixels, load_trained
from support.common import (
    ASSETS,
    Parser,
    UserError,
    check_ordinary,
    check_seed,
    check_steps,
    check_writable,
    load_json,
    open_picture,
    read_json,
    read_lines,
    read_records,
    run_command,
    whole_file,
    write_image,
    write_json,
)

COMMAND = "python -m metrics.coco"


# ------------------------------------------------------------------------------------------ CIDEr
def ngrams(text):
    """[Counter of the text's n-grams, for n = 1, 2, 3, 4]."""
    words = re.findall(r"\w+(?:[-.,:]\w+)*", text.lower())
    counters = []
    for n in (1, 2, 3, 4):
        starts = range(len(words) - n + 1)
        counters.append(Counter(tuple(words[k: k + n]) for k in starts))
    return counters


def cider(answers, references):
    """CIDEr-D, times 100 as papers print it: 1000 at most, where each answer is word by word all of
    its references. Vedantam et al. 2015.

    answers: a text per picture; references: a list of texts per picture. An n-gram's weight depends
    on how many of *these* pictures it is said of, so numbers of different sets of pictures cannot
    be compared."""
    answers = [ngrams(text) for text in answers]
    references = [list(map(ngrams, texts)) for texts in references]

    # 1. Of how many pictures is an n-gram said? What is said of all of them counts for nothing.
    used = Counter()
    for texts in references:
        grams = set()
        for counters in texts:
            for counter in counters:
                grams.update(counter)
        used.update(grams)

    def weigh(counter):
        weights = {}
        for gram, count in counter.items():
            weights[gram] = count * np.log(len(references) / max(1, used[gram]))
        return weights

    # 2. Each answer against each of its references: the mean, not the best.
    total = 0.0
    for answer, texts in zip(answers, references, strict=True):
        for text in texts:
            # Too many words, or too few, cost: sigma = 6. Else a long answer would collect matches.
            surplus = sum(answer[0].values()) - sum(text[0].values())
            penalty = np.exp(-surplus ** 2 / 72)
            for own, other in zip(answer, text, strict=True):
                total += 10 * penalty * similarity(weigh(own), weigh(other)) / 4 / len(texts)
    return 100 * total / len(answers)


def similarity(own, other):
    """Cosine of two bags of n-grams {gram: weight}, in which no gram counts more often than it
    stands in `other`: saying a good word twice must not help."""
    sizes = length(own) * length(other)
    if sizes == 0:
        return 0.0
    shared = 0.0
    for gram, weight in own.items():
        if gram in other:
            shared += min(weight, other[gram]) * other[gram]
    return shared / sizes


def length(weights):
    """The length of a bag of n-grams as a vector."""
    return np.sqrt(sum(weight * weight for weight in weights.values()))


# ----------------------------------------------------------------------------- FID and CLIP score
def frechet(real, drawn):
    """The Fréchet distance of two crowds of features, (n, d) and (m, d), as if both were Gaussian.
    It is FID where Inception made them. Heusel et al. 2017, eq. 6.

    Too high by about 1/n: compare crowds of one size."""
    m, S = moments(real)
    m2, S2 = moments(drawn)
    # The root of S S2 is slow and need not be real. S^(1/2) S2 S^(1/2) has the same eigenvalues and
    # is symmetric, and the trace needs no more than these.
    values, vectors = torch.linalg.eigh(S)
    half = vectors * values.clamp(min=0).sqrt() @ vectors.T             # S^(1/2)
    root = torch.linalg.eigvalsh(half @ S2 @ half).clamp(min=0).sqrt().sum()
    distance = (m - m2).square().sum() + S.trace() + S2.trace() - 2 * root
    return max(0.0, float(distance))                    # rounding may make it negative


def moments(features):
    """(mean (d,), covariance (d, d)) of features (n, d), in float64: a difference of large numbers
    follows."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def load_inception(path, device):
    """A function: pictures (n, h, w, 3) uint8 -> features (n, 2048), by the TorchScript file that
    StyleGAN2-ADA published; it resizes by itself. Raises UserError if there is no such file."""
    try:
        check_ordinary(path)                            # a pipe would wait for ever
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, FileNotFoundError):
        raise UserError(f"{path} is missing or not TorchScript: --inception must name "
                        f"inception-2015-12-05.pt, as published with StyleGAN2-ADA") from None

    def features(pixels):
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
        return net(images, return_features=True).float().cpu()

    return features


def load_clip(folder, device):
    """A function: pictures (n, h, w, 3) uint8, n texts -> cosines (n,), by a CLIP model of
    transformers. Raises UserError if the library or the model is not there."""
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError:
        raise UserError("CLIP score needs transformers: pip install transformers==5.23.0") from None
    try:
        net = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
        prepare = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except Exception:                       # a damaged file raises what its reader happens to raise
        raise UserError(f"{folder} has no CLIP model: --clip must name a folder that "
                        f"transformers' save_pretrained wrote, such as a download of "
                        f"openai/clip-vit-base-patch32") from None

    def cosines(pixels, texts):
        images = [Image.fromarray(picture) for picture in pixels]
        # A prompt that is too long for CLIP is cut: the alternative is an error in the last hour.
        inputs = prepare(
            text=texts, images=images, return_tensors="pt", padding=True, truncation=True,
            max_length=net.config.text_config.max_position_embeddings,
        )
        out = net(**inputs.to(device))
        return torch.cosine_similarity(out.image_embeds, out.text_embeds).cpu()

    return cosines


def vae_features(path, device):
    """A function: pictures (n, h, w, 3) uint8 -> (n, c h w), the latents of a vae.pt. For toys. All
    models that are compared need the same file."""
    holder = SimpleNamespace(vae=checkpoint.load_vae(path).to(device))

    def features(pixels):
        return encode_pixels(holder, pixels).flatten(1)

    return features


# ---------------------------------------------------------------------- pictures and their captions
def read_folder(folder, size, n, seed=0):
    """n random pictures of a folder with captions.jsonl: [(picture, its captions)], in which a
    picture is a function () -> (size, size, 3) uint8. Several lines may speak of one picture.
    Raises UserError, naming the line, if one is no caption of a picture."""
    path = Path(folder) / "captions.jsonl"
    captions = {}                                       # of each picture, by the name of its file
    skipped = []
    records = read_records(path, ("image", "caption"))
    for number, (name, text) in records:
        try:
            caption = clean_caption(text, f"{path} line {number}")
        except UserError as problem:                    # no answer could share a phrase with it
            skipped.append(str(problem))
        else:
            captions.setdefault(name, []).append(caption)
    if distributed.rank() == 0:
        print_skipped(folder, skipped, len(records), "captions")

    # Any n of them: the first n of a folder that is sorted would be alike.
    rng = np.random.default_rng([seed, 15])
    chosen = rng.permutation(len(captions))[:n]
    names = list(captions)
    items = []
    for k in sorted(chosen):
        # Opened when its turn comes: 30,000 photos do not fit in memory.
        picture = functools.partial(open_picture, path.parent / names[k], size)
        items.append((picture, captions[names[k]]))
    return items


def draw_scenes(categories, size, n, seed=0):
    """The same of n unseen scenes, each with up to five of the captions that are true of it and
    leave nothing unnamed."""
    rng = np.random.default_rng([seed, 16])
    world = scenes.World(tuple(categories))
    claims = []
    for category in categories:
        claims.extend(scenes.captions(category))
    items = []
    for _ in range(n):
        _, claim = world.caption(rng)
        things = scenes.draw_scene(claim, rng, size)
        # Not only the caption that it was drawn for: people, too, say several things of a picture.
        true = [text for text, claim in claims if scenes.holds(claim, things)]
        order = rng.permutation(len(true))
        captions = [true[k] for k in order[:5]]
        items.append((functools.partial(scenes.render, things, size), captions))
    return items


# ------------------------------------------------------------------------------------- the judging
@dataclass
class Verdict:
    """What was found out about some pictures, in order. Each list has one entry per picture that
    could be read, except real and drawn: these have one tensor (n, d) per batch."""
    answers: list = field(default_factory=list)         # what the model says of a picture
    references: list = field(default_factory=list)      # what people say of it: lists of texts
    real: list = field(default_factory=list)            # features of the pictures
    drawn: list = field(default_factory=list)           # features of what the model drew
    cosines: list = field(default_factory=list)         # CLIP's, of a drawn picture and its prompt
    unreadable: list = field(default_factory=list)      # sentences, one per picture

    def add(self, other):
        """Append another's lists to ours."""
        for name, entries in vars(other).items():
            getattr(self, name).extend(entries)


def pictures_per_batch(trained):
    """How many pictures to draw at a time: 64, or as many as have 4 GB of keys and values."""
    config = trained.model.config
    number = trained.model.embedding.weight.element_size()
    positions = config.patches + 100                    # captions have fewer than 100 tokens
    caches = 3                                          # guidance takes three times as much
    row = caches * 2 * config.layers * config.width * positions * number
    return max(1, min(64, 2 ** 32 // row))


def check_prompts(trained, prompts):
    """Raise UserError for a prompt that the model cannot take, before the first one is drawn."""
    config = trained.model.config
    for text in prompts:
        need = len(trained.tokenizer.encode(text)) + config.patches + 3     # <bos>, BOI, EOI
        if need > config.context:
            raise UserError(f"the caption {text[:40]!r} and its picture need {need} positions, "
                            f"but this model's context is {config.context}")


def check_networks(trained, prompts, features, clip):
    """Run both networks once on black pictures: if they do not fit, they fail now, and not when the
    first pictures have been drawn."""
    size = trained.model.config.latent[1] * trained.vae.f
    texts = prompts[:2]
    blank = np.zeros((len(texts), size, size, 3), np.uint8)
    if features:
        features(blank)
    if clip:
        clip(blank, texts)


@torch.no_grad()
def measure(trained, items, features=None, clip=None, captions=True, seed=0, progress=True,
          **options):
    """(numbers, [(caption, references)]) of n items. Every process must call it.

    items       [(picture, captions)], as `read_folder` has them
    features    function pictures -> (n, d); adds "distance", of drawn and real pictures, "halves",
                of two halves of the real ones, and "dimensions"
    clip        function pictures, texts -> cosines; adds "clip"
    captions    whether to describe the pictures; adds "cider"
    options     as `sample.draw`
    Pictures that cannot be read are named and skipped. Raises UserError, before anything is drawn,
    for a prompt that the model cannot take."""
    # 1. Choose one caption of each picture as its prompt. Without features nothing is drawn, so no
    #    prompt needs to fit.
    rng = np.random.default_rng([seed, 17])
    prompts = [texts[rng.integers(len(texts))] for _, texts in items]
    check_prompts(trained, prompts if features else [])
    check_networks(trained, prompts, features, clip)

    # 2. Each process measures its part, batch by batch.
    def measure_part(part, first):
        verdict = Verdict()
        n = pictures_per_batch(trained)
        silent = not progress or distributed.rank() > 0
        for k in tqdm(range(0, len(part), n), desc="drawing and describing", disable=silent):
            # Noise belongs to a picture, whatever batch or process it falls to.
            noise = seed * 100003 + first + k
            batch = part[k: k + n]
            verdict.add(measure_batch(trained, batch, noise, features, clip, captions, options))
        return verdict

    verdict = Verdict()
    work = list(zip(items, prompts, strict=True))
    for part in distributed.split_work(measure_part, work):
        verdict.add(part)
    report_unreadable(verdict, len(items))

    # 3. The numbers, from the verdicts of all processes: none of them is a mean of means.
    numbers = {
        "n": len(verdict.answers),
        "references": float(np.mean([len(texts) for texts in verdict.references])),
    }
    if captions:
        numbers["cider"] = float(cider(verdict.answers, verdict.references))
    if features:
        real = torch.cat(verdict.real)
        numbers["distance"] = frechet(real, torch.cat(verdict.drawn))
        numbers["halves"] = frechet(real[::2], real[1::2])
        numbers["dimensions"] = real.shape[1]
    if clip:
        numbers["clip"] = 100 * float(np.mean(verdict.cosines))
    return numbers, list(zip(verdict.answers, verdict.references, strict=True))


def measure_batch(trained, batch, seed, features, clip, captions, options):
    """Verdict of a few items. batch: [((picture, captions), prompt)]; seed: of the first one's
    noise, the next has the next; the others as in `measure`."""
    verdict = Verdict()
    decoder = chameleon.decoder_of(trained)
    photos = []
    prompts = []
    seeds = []
    for j, ((picture, texts), prompt) in enumerate(batch):
        try:
            photos.append(picture())
        except UserError as problem:                    # one bad file is no reason to stop
            verdict.unreadable.append(str(problem))
            continue
        prompts.append(prompt)
        seeds.append(seed + j)
        verdict.references.append(texts)
    if not photos:
        return verdict

    photos = np.stack(photos)
    if captions:
        latents = encode_pixels(trained, photos)
        verdict.answers = sample.describe(trained, latents, decoder=decoder)
    else:
        verdict.answers = [""] * len(photos)
    if features:
        pictures = sample.draw(trained, prompts, seed=seeds, decoder=decoder, **options)
        verdict.real.append(features(photos))
        verdict.drawn.append(features(pictures))
        if clip:
            verdict.cosines = clip(pictures, prompts).tolist()
    return verdict


def report_unreadable(verdict, n):
    """Name the pictures that could not be read. n: how many there were. Raises UserError if too few
    are left to compare."""
    read = len(verdict.answers)
    if read < 4:
        raise UserError(f"{read} of {n} pictures can be read, at least four are compared; "
                        + "; ".join(verdict.unreadable[:3]))
    if verdict.unreadable and distributed.rank() == 0:
        print(f"skipped {len(verdict.unreadable)} of {n} pictures: "
              f"{'; '.join(verdict.unreadable[:5])}")


# ---------------------------------------------------------------------------------------- GenEval
@torch.no_grad()
def draw_geneval(trained, path, out, each=4, limit=None, seed=0, **options):
    """Draw GenEval's prompts as its own script wants them judged, and return how many there are.
    App. B.1. Every process must call it.

    path        its evaluation_metadata.jsonl, one {"prompt": ..., ...} per line
    out         for each line out/00000/metadata.jsonl and samples/0000.png to 0003.png
    each        pictures per prompt
    limit       at most so many prompts
    options     as `sample.draw`
    Finished folders are passed over, so that a stopped command goes on. Raises UserError if `out`
    has pictures of another model, or of other options."""
    # 1. All that can be wrong, before the first picture.
    lines, prompts = read_prompts(path, limit)
    check_prompts(trained, prompts)
    decoder = chameleon.decoder_of(trained)
    out = Path(out)
    settings = {"model": fingerprint(trained.model), "seed": seed, "each": each, **options}
    check_settings(out, settings)

    # 2. What is missing, seen alike by all processes: each takes its part of the same list.
    missing = [k for k, line in enumerate(lines) if not is_finished(folder_of(out, k), line)]
    distributed.wait()                                  # before the first writes, all have looked
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "settings.json", settings)

    # 3. Draw. `first` makes the noise that of the prompt's place, whatever is drawn before it.
    def draw_part(part, _):
        for k in tqdm(part, desc="drawing for GenEval", disable=distributed.rank() > 0):
            folder = folder_of(out, k)
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            pictures = sample.draw(trained, [prompts[k]] * each, seed=seed, first=each * k,
                                   decoder=decoder, **options)
            for j, picture in enumerate(pictures):
                write_image(folder / "samples" / f"{j:04d}.png", Image.fromarray(picture))
            # Last, for it says that the folder is whole.
            with whole_file(folder / "metadata.jsonl") as file:
                file.write(lines[k].encode())

    distributed.split_work(draw_part, missing)
    return len(prompts)


def read_prompts(path, limit):
    """(lines, prompts) of GenEval's evaluation_metadata.jsonl."""
    wanted = 'prompt of GenEval, {"tag": ..., "include": ..., "prompt": ...}'
    lines = [line for _, line in read_lines(Path(path), wanted)][:limit]
    prompts = []
    try:
        for line in lines:
            prompts.append(" ".join(load_json(line)["prompt"].split()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not GenEval's evaluation_metadata.jsonl: every line must be "
                        f'{{"prompt": ..., ...}}') from None
    if not prompts:
        raise UserError(f"{path} is empty: it must hold one {wanted} per line")
    return lines, prompts


def fingerprint(model):
    """A short name of a model's weights: another checkpoint has another one."""
    # The head alone: every step of training changes it, and a 7B's weights would take a minute.
    weights = model.head.weight.float().cpu().numpy()
    return hashlib.sha256(weights.tobytes()).hexdigest()[:16]


def check_settings(out, settings):
    """Raise UserError if the folder `out` has pictures that were drawn with other settings."""
    path = out / "settings.json"
    if not path.exists():
        return
    try:
        before = read_json(path)
    except ValueError:
        before = "settings that cannot be read"
    if before != settings:
        raise UserError(f"{out} has pictures of {before}, these would be of {settings}: name "
                        f"another --out")


def folder_of(out, k):
    """Where the pictures of prompt k lie."""
    return out / f"{k:05d}"


def is_finished(folder, line):
    """Whether the pictures of a prompt have all been drawn, and of this very line."""
    path = folder / "metadata.jsonl"
    return path.exists() and path.read_bytes() == line.encode()


# ---------------------------------------------------------------------------------- command line
def demo():
    """CIDEr of three answers, and what the distance of two crowds says."""
    references = [["a cat on a mat", "a black cat lies on a mat"],
                  ["two dogs on a beach", "dogs run along the beach"]]
    for answer in ("a cat on a mat", "a cat", "a dog on a beach"):
        value = 2 * cider([answer, ""], references)     # of two pictures; the other has no answer
        print(f"CIDEr of {answer!r:20} for {references[0]}: {value:6.1f}")
    crowd = torch.randn(10000, 8, generator=torch.Generator().manual_seed(0))
    others = {
        "the same crowd": crowd,
        "all moved by 1 in 8 dimensions": crowd + 1,
        "half as varied": crowd / 2,
    }
    for name, other in others.items():
        print(f"Fréchet distance to {name:31s} {frechet(crowd, other):6.3f}")


def parse_arguments(argv=None):
    """The options of the command line, checked."""
    parser = Parser(
        prog=COMMAND, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="CIDEr, FID and CLIP score on captioned pictures; pictures for GenEval's own "
                    "judge.")
    add = parser.add_argument
    add("pictures", nargs="?",
        help='a folder of pictures with captions.jsonl, one {"image": ..., "caption": ...} per '
             "line, where several lines may speak of one picture; the word scenes; GenEval's "
             "evaluation_metadata.jsonl; without it: a small example")
    add("--checkpoint", default=str(ASSETS / "scenes.pt"), help="a model.pt of train.py")
    add("--only", choices=("captions", "pictures"),
        help="CIDEr alone, or FID and CLIP score alone; default: all")
    add("--inception", help="inception-2015-12-05.pt (TorchScript): the distance is FID")
    add("--vae", default=str(ASSETS / "scenes_vae.pt"),
        help="without it: the vae.pt whose latents are compared")
    add("--clip", help="folder of a CLIP model of transformers: CLIP score, too")
    add("--world", choices=tuple(scenes.WORLDS), default="six", help="of scenes: which captions")
    add("--limit", type=int, default=30000,
        help="at most so many pictures (the paper: 30000, in its ablations 5000), or prompts")
    add("--steps", type=int, default=250, help="diffusion steps")
    add("--guidance", type=float, nargs="+", default=[3.0],
        help="guidance weight; several: a table of them, or of GenEval a folder for each")
    add("--sampler", choices=SAMPLERS, default="ddpm", help="ddpm is the paper's")
    add("--seed", type=int, default=0, help="seed of pictures, prompts and noise")
    add("--out", default="out/geneval", help="of GenEval: folder of the pictures")
    add("--json", help="also write the numbers here")
    args = parser.parse_args(argv)
    if args.pictures is not None:
        check_arguments(args)
    return args


def check_arguments(args):
    """Raise UserError for options that do not make sense, before any work is done."""
    if args.limit < 4:
        raise UserError(f"--limit must be at least 4, got {args.limit}")
    check_steps(args.steps)
    sweep.check_weights(args.guidance)
    check_seed(args.seed)
    if args.json is not None:
        check_writable(args.json, ".json")
    if is_geneval(args):
        if args.inception or args.clip or args.only or args.json:
            raise UserError("GenEval's pictures are judged by its own script: --inception, --clip, "
                            "--only and --json are for a folder of pictures")
        if not args.out or Path(args.out).is_file():
            raise UserError(f"cannot write into {args.out!r}: --out must name a folder")


def is_geneval(args):
    """Whether the command line names GenEval's prompts, and not pictures."""
    return Path(args.pictures).suffix == ".jsonl"


def distance_name(args):
    """What the distance of the two crowds is called: FID is Inception's alone."""
    return "FID" if args.inception else "Fréchet distance of latents"


def print_numbers(args, numbers, captions):
    """The numbers as lines. captions: [(what the model says, what people say)]."""
    print(f"n = {numbers['n']} pictures")
    if "cider" in numbers:
        for answer, texts in captions[:3]:
            print(f"  it says: {answer}\n  people say: {'; '.join(texts)}")
        print(f"CIDEr {numbers['cider']:.1f} ({numbers['references']:.1f} references each)")
    if "distance" in numbers:
        name = distance_name(args)
        doubt = ""
        if numbers["n"] <= numbers["dimensions"]:       # the covariance has not its full rank
            doubt = f"; unreliable: the features have {numbers['dimensions']} dimensions"
        print(f"{name} {numbers['distance']:.2f} (two halves of the real pictures: "
              f"{numbers['halves']:.2f}{doubt})")
    if "clip" in numbers:
        print(f"CLIP score {numbers['clip']:.1f} ({Path(args.clip).name})")


def main(argv=None):
    """Judge a model as the command line says, print the numbers, return them."""
    args = parse_arguments(argv)
    if args.pictures is None:
        return demo()
    ranks = distributed.start()
    trained = load_trained(args.checkpoint, ranks.device)
    trained.model.to(ranks.dtype)                       # bfloat16 on a GPU
    if trained.kind == "llama":
        raise UserError(f"{args.checkpoint} is a llama: it knows words only")
    options = {"seed": args.seed, "steps": args.steps, "sampler": args.sampler}
    if is_geneval(args):
        return draw_for_geneval(trained, args, options)

    size = trained.model.config.latent[1] * trained.vae.f
    if args.pictures == "scenes":
        items = draw_scenes(scenes.WORLDS[args.world], size, args.limit, args.seed)
    else:
        items = read_folder(args.pictures, size, args.limit, args.seed)
    if args.inception:
        features = load_inception(args.inception, ranks.device)
    else:
        features = vae_features(args.vae, ranks.device)
    clip = load_clip(args.clip, ranks.device) if args.clip else None
    if args.only == "captions":
        features = clip = None

    results, captions = measure_each(trained, items, features, clip, args, options)
    first = args.guidance[0]
    numbers = results if len(results) > 1 else results[first]
    if distributed.rank() == 0:
        if args.json:                                   # first: a caption may not be printable
            write_json(args.json, numbers)
        print_numbers(args, results[first], captions)
        if len(results) > 1:
            names = {"distance": distance_name(args), "clip": "CLIP score"}
            print(*sweep.table(results, names), sep="\n")
    return numbers


def measure_each(trained, items, features, clip, args, options):
    """({guidance weight: numbers}, captions): `measure` for each weight of the command line."""
    results = {}
    captions = None
    describe = args.only != "pictures"
    for weight in args.guidance:
        results[weight], answers = measure(trained, items, features, clip, describe,
                                           guidance=weight, **options)
        # Captions do not depend on guidance: those of the first weight are those of all.
        captions = captions or answers
        describe = False
    return results, captions


def draw_for_geneval(trained, args, options):
    """Draw GenEval's prompts as the command line says. Returns how many there are."""
    for weight in args.guidance:
        out = Path(args.out)
        if len(args.guidance) > 1:                      # a folder for each: it judges them apart
            out = out / f"guidance_{weight:g}"
        n = draw_geneval(trained, args.pictures, out, limit=args.limit, guidance=weight, **options)
        if distributed.rank() == 0:
            print(f"{n} prompts in {out}: judge them with GenEval's evaluation/evaluate_images.py")
    return n


if __name__ == "__main__":
    run_command(main)
