"""
coco.py: pictures and captions, judged by the field's yardsticks              (Transfusion §4.1 "Evaluation", Table 7, App. B.1)

THE IDEA    A caption is good if it says what people say of the same picture: CIDEr counts the phrases that they share, rare ones
            most. Drawn pictures are good if, as a crowd, they cannot be told from real ones, and each fits its prompt: FID
            compares what a network sees in the two crowds, CLIP score what another one sees in a picture and in its prompt.
A PICTURE   photo --model--> "a cat on a mat"  --+-- CIDEr          prompt --model--> picture --+-- CLIP score
            five people's captions of it       --+                         real photos          --+-- FID
THE RULE    CIDEr-D   100 * mean over pictures, references, n = 1..4 of
                      10 exp(-(l - l')^2 / 72) sum over n-grams of min(g, g') g' / (|g| |g'|)            Vedantam et al. 2015
                      g, g' the counts of n-grams in the answer and a reference, each times ln(pictures / pictures that use
                      it); l, l' their lengths
            FID       |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)),  m, S: mean and covariance of the features    Heusel et al. 2017
            CLIP      100 * mean cosine of a picture's and its prompt's vectors                     Radford et al. 2021
SHAPES      pictures (n, h, w, 3) uint8; features (n, d) float
PAPER/HERE  same: greedy captions of Karpathy's test split (`--only captions`); n pictures drawn from one random caption each of the
            validation set, n = 30,000, in the ablations 5,000 (`--only pictures`); 250 steps, guidance as asked for.
            our choice: FID's real pictures are those whose captions are drawn. The paper does not say which CLIP it used.
            differs: COCO cuts words with a Java program; we take runs of letters and digits, with - . , : inside, in lower case.
            It makes "do n't" of "don't", we "don t".
            Two networks of others are needed, as files: Inception (inception-2015-12-05.pt, TorchScript, published with
            StyleGAN2-ADA) and CLIP (a folder of transformers'). Not run with them here: no network; the tests have stand-ins.
            Without Inception the distance is that of a VAE's latents, which toys need and nobody should call FID.
            GenEval judges with a detector of its own: `geneval` draws its prompts into the folders that its script reads.
READ NEXT   evaluate.py, where the scenes world needs no judge      TEST  tests/test_coco.py (ours = pycocoevalcap, scipy)
TRY IT      python coco.py;  python coco.py scenes --limit 200 --steps 25 --sampler dpm++
"""
import argparse
import functools
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import sample
from diffusion import SAMPLERS
from scale import distributed
from scale import streams
from sources import scenes
from support import checkpoint
from support.checkpoint import encode_pixels, load_trained
from support.common import ASSETS, UserError, read_lines, run_command


# ------------------------------------------------------------------------------------------------------------ the yardsticks
def ngrams(text):
    """[Counter of the text's n-grams, for n = 1, 2, 3, 4]."""
    words = re.findall(r"\w+(?:[-.,:]\w+)*", text.lower())
    return [Counter(tuple(words[k: k + n]) for k in range(len(words) - n + 1)) for n in (1, 2, 3, 4)]


def cider(answers, references):
    """CIDEr-D, times 100 as papers print it (1000 at most: each answer word by word all of its references). answers: a text per
    picture; references: a list of texts per picture. An n-gram's weight depends on how many of *these* pictures it is said of:
    numbers of different sets of pictures cannot be compared. Vedantam et al. 2015."""
    answers = [ngrams(text) for text in answers]
    references = [[ngrams(text) for text in texts] for texts in references]
    used = Counter(gram for texts in references for gram in {gram for text in texts for grams in text for gram in grams})
    tfidf = lambda grams: {gram: count * np.log(len(references) / max(1, used[gram])) for gram, count in grams.items()}
    size = lambda weights: np.sqrt(sum(w * w for w in weights.values()))
    total = 0.0
    for answer, texts in zip(answers, references):
        for text in texts:
            apart = sum(answer[0].values()) - sum(text[0].values())     # in words
            for mine, theirs in zip(map(tfidf, answer), map(tfidf, text)):
                if (sizes := size(mine) * size(theirs)) > 0:
                    shared = sum(min(w, theirs[gram]) * theirs[gram] for gram, w in mine.items() if gram in theirs)
                    total += 10 * np.exp(-apart ** 2 / 72) * shared / sizes / 4 / len(texts)          # sigma = 6
    return 100 * total / len(answers)


def frechet(real, drawn):
    """The Fréchet distance of two crowds of features (n, d), (m, d), as if both were Gaussian. FID, where Inception made them.
    Too high by about 1/n: compare crowds of one size. Heusel et al. 2017, eq. 6."""
    (m, S), (m2, S2) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (real, drawn))
    values, vectors = torch.linalg.eigh(S)
    half = vectors * values.clamp(min=0).sqrt() @ vectors.T             # S^(1/2): (S S2)^(1/2) has the eigenvalues of this
    root = torch.linalg.eigvalsh(half @ S2 @ half).clamp(min=0).sqrt().sum()           # symmetric one, which is found faster
    return max(0.0, float((m - m2).square().sum() + S.trace() + S2.trace() - 2 * root))             # rounding may fall below 0


def load_inception(path, device):
    """pictures (n, h, w, 3) uint8 -> (n, 2048) features, by the TorchScript file that StyleGAN2-ADA published; it resizes by itself.
    Raises UserError if there is no such file, or it is no TorchScript."""
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError):
        raise UserError(f"{path} is missing or not TorchScript: --inception must name inception-2015-12-05.pt, as published with "
                        f"StyleGAN2-ADA") from None
    return lambda pixels: net(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device), return_features=True).float().cpu()


def load_clip(folder, device):
    """(pictures (n, h, w, 3) uint8, n texts) -> (n,) cosines, by a CLIP model of transformers. Raises UserError if the library or the
    model is not there."""
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError:
        raise UserError("CLIP score needs transformers: pip install transformers==5.23.0") from None
    try:
        net = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
        prepare = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        raise UserError(f"{folder} has no CLIP model: --clip must name a folder that transformers' save_pretrained wrote, such as "
                        f"a download of openai/clip-vit-base-patch32") from None

    def cosines(pixels, texts):
        out = net(**prepare(text=texts, images=[Image.fromarray(p) for p in pixels], return_tensors="pt", padding=True, truncation=True,
                            max_length=net.config.text_config.max_position_embeddings).to(device))
        return torch.cosine_similarity(out.image_embeds, out.text_embeds).cpu()
    return cosines


# -------------------------------------------------------------------------------------------------------------- the pictures
def read_folder(folder, size, n, seed=0):
    """[(picture: () -> (h, w, 3) uint8, its captions)] of n random pictures of a folder with captions.jsonl, in which several lines may
    speak of one picture."""
    path, found = Path(folder) / "captions.jsonl", {}
    for number, line in read_lines(path, '{"image": file name, "caption": words}'):
        caption, picture = streams.read_line(line.encode(), f"{path} line {number}", ["caption", "image"], path.parent, size)
        found.setdefault(picture.args, (picture, []))[1].append(caption)
    order = np.random.default_rng([seed, 15]).permutation(len(found))[:n]
    return [list(found.values())[k] for k in sorted(order)]


def draw_scenes(categories, size, n, seed=0):
    """The same of n unseen scenes, each with up to five of the captions that are true of it and leave nothing unnamed."""
    rng, world, items = np.random.default_rng([seed, 16]), scenes.World(tuple(categories)), []
    claims = [item for category in categories for item in scenes.captions(category)]
    for _ in range(n):
        things = scenes.draw_scene(world.caption(rng)[1], rng, size)
        true = [text for text, claim in claims if scenes.holds(claim, things)]
        items.append((functools.partial(scenes.render, things, size), [true[k] for k in rng.permutation(len(true))[:5]]))
    return items


def vae_features(path, device):
    """pictures (n, h, w, 3) uint8 -> (n, c h w): the latents of a vae.pt. For toys: the same file for all models to be compared."""
    vae = checkpoint.load_vae(path).to(device)
    return lambda pixels: encode_pixels(SimpleNamespace(vae=vae), pixels).flatten(1)


def pictures_per_batch(trained):
    """How many pictures to draw at a time: 64, or as many as have 4 GB of keys and values, which guidance takes three times over."""
    config, number = trained.model.config, trained.model.embedding.weight.element_size()
    row = 3 * 2 * config.layers * config.width * (config.patches + 100) * number        # captions have fewer than 100 tokens
    return max(1, min(64, 2 ** 32 // row))


def check_prompts(trained, prompts):
    """Raise UserError for a prompt that the model cannot take, before the first one is drawn."""
    config = trained.model.config
    for text in prompts:
        if (need := len(trained.tokenizer.encode(text)) + config.patches + 3) > config.context:
            raise UserError(f"the caption {text[:40]!r} and its picture need {need} positions, but this model's context is {config.context}")


@torch.no_grad()
def judge(trained, items, features=None, clip=None, captions=True, seed=0, progress=True, **drawing):
    """(numbers, [(caption, references)]) of n items, as `read_folder` has them. Numbers: "n", "references" per picture; "cider", of
    `captions`; with `features`, pictures -> (n, d), "distance" of the drawn pictures and the real ones, "halves", of two halves of
    the real ones; with `clip`, pictures, texts -> cosines, "clip". Pictures that cannot be read are named and skipped. drawing: as
    `sample.draw`. Divided among the ranks: every one must call it. Raises UserError, before anything is drawn, for a prompt that
    the model cannot take."""
    rng, size = np.random.default_rng([seed, 17]), trained.model.config.latent[1] * trained.vae.f
    prompts = [texts[rng.integers(len(texts))] for _, texts in items]
    check_prompts(trained, prompts if features else [])
    blank = np.zeros((len(prompts[:2]), size, size, 3), np.uint8)
    if features:                                        # networks that do not fit fail now, not when the first pictures are drawn
        features(blank)
    if clip:
        clip(blank, prompts[:2])

    def work(part, first):
        said, references, real, drawn, fits, bad = [], [], [], [], [], []
        for k in tqdm(range(0, len(part), pictures_per_batch(trained)), desc="drawing and describing", disable=not progress or distributed.rank() > 0):
            there = []
            for n, ((picture, texts), prompt) in enumerate(part[k: k + pictures_per_batch(trained)], first + k):
                try:
                    there.append((picture(), texts, prompt, seed * 100003 + n))
                except UserError as problem:
                    bad.append(str(problem))
            if not there:
                continue
            photos, texts, asked, seeds = map(list, zip(*there))
            photos, references = np.stack(photos), references + texts
            said += sample.describe(trained, encode_pixels(trained, photos)) if captions else [""] * len(texts)
            if features:
                pictures = sample.draw(trained, asked, seed=seeds, **drawing)
                real.append(features(photos))
                drawn.append(features(pictures))
                fits += clip(pictures, asked).tolist() if clip else []
        return said, references, torch.cat(real) if real else None, torch.cat(drawn) if drawn else None, fits, bad

    parts = list(zip(*distributed.split_work(work, list(zip(items, prompts)))))
    said, references, fits, bad = (sum(parts[k], []) for k in (0, 1, 4, 5))
    if len(said) < 4:
        raise UserError(f"{len(said)} of {len(items)} pictures can be read, at least four are compared; " + "; ".join(bad[:3]))
    if bad and distributed.rank() == 0:
        print(f"skipped {len(bad)} of {len(items)} pictures: {'; '.join(bad[:5])}")
    found = {"n": len(said), "references": float(np.mean([len(texts) for texts in references]))}
    if captions:
        found["cider"] = float(cider(said, references))
    if features:
        real, drawn = (torch.cat([x for x in parts[k] if x is not None]) for k in (2, 3))
        found |= {"distance": frechet(real, drawn), "halves": frechet(real[::2], real[1::2]), "dimensions": real.shape[1]}
    return found | ({"clip": 100 * float(np.mean(fits))} if clip else {}), list(zip(said, references))


def geneval(trained, path, out, each=4, limit=None, seed=0, **drawing):
    """Draw GenEval's prompts as its own script wants them judged: out/00000/metadata.jsonl and samples/0000.png to 0003.png, for
    each line {"prompt": ..., ...} of its evaluation_metadata.jsonl. Finished folders are passed over, so that a stopped command
    goes on. Divided among the ranks. Returns how many prompts there are. App. B.1. Raises UserError if `out` has pictures of
    another model, or of other options."""
    lines = [line for _, line in read_lines(Path(path), 'prompt of GenEval, {"tag": ..., "include": ..., "prompt": ...}')][:limit]
    try:
        prompts = [" ".join(json.loads(line)["prompt"].split()) for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{path} is not GenEval\'s evaluation_metadata.jsonl: every line must be {{"prompt": ..., ...}}') from None
    check_prompts(trained, prompts)
    weights = hashlib.sha256(trained.model.head.weight.float().cpu().numpy().tobytes()).hexdigest()[:16]
    settings, kept = json.dumps({"model": weights, "seed": seed, "each": each, **drawing}), Path(out) / "settings.json"
    if kept.exists() and kept.read_text() != settings:
        raise UserError(f"{out} has pictures of {kept.read_text()}, these would be of {settings}: name another --out")
    folder = lambda k: Path(out) / f"{k:05d}"
    whole = lambda k: (folder(k) / "metadata.jsonl").exists() and (folder(k) / "metadata.jsonl").read_text() == lines[k]
    to_do = [k for k in range(len(lines)) if not whole(k)]
    distributed.wait()                                        # before the first writes, all must have looked
    if distributed.rank() == 0:
        Path(out).mkdir(parents=True, exist_ok=True)
        kept.write_text(settings)

    def work(part, _):
        for k in tqdm(part, desc="drawing for GenEval", disable=distributed.rank() > 0):
            (folder(k) / "samples").mkdir(parents=True, exist_ok=True)
            for j, picture in enumerate(sample.draw(trained, [prompts[k]] * each, seed=seed, first=each * k, **drawing)):
                Image.fromarray(picture).save(folder(k) / "samples" / f"{j:04d}.png")
            (folder(k) / "metadata.jsonl").write_text(lines[k])         # last: it says that the folder is whole
    distributed.split_work(work, to_do)
    return len(prompts)


# -------------------------------------------------------------------------------------------------------------- command line
def demo():
    """CIDEr of three answers, and what the distance of two crowds says."""
    references = [["a cat on a mat", "a black cat lies on a mat"], ["two dogs on a beach", "dogs run along the beach"]]
    for answer in ("a cat on a mat", "a cat", "a dog on a beach"):
        print(f"CIDEr of {answer!r:20} for {references[0]}: {2 * cider([answer, ''], references):6.1f}")
    crowd = torch.randn(10000, 8, generator=torch.Generator().manual_seed(0))
    for name, other in (("the same crowd", crowd), ("all moved by 1 in 8 dimensions", crowd + 1), ("half as varied", crowd / 2)):
        print(f"Fréchet distance to {name:31s} {frechet(crowd, other):6.3f}")


def main(argv=None):
    """Judge a model as the command line says and print the numbers."""
    parser = argparse.ArgumentParser(description="CIDEr, FID and CLIP score on captioned pictures; pictures for GenEval's own judge.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("pictures", nargs="?", help="a folder of pictures with captions.jsonl, one {\"image\": ..., \"caption\": ...} per line, "
                        "where several lines may speak of one picture; the word scenes; GenEval's evaluation_metadata.jsonl; "
                        "without it: a small example")
    parser.add_argument("--checkpoint", default=str(ASSETS / "scenes.pt"), help="a model.pt of train.py")
    parser.add_argument("--only", choices=("captions", "pictures"), help="CIDEr alone, or FID and CLIP score alone; default: all")
    parser.add_argument("--inception", help="inception-2015-12-05.pt (TorchScript): the distance is FID")
    parser.add_argument("--vae", default=str(ASSETS / "scenes_vae.pt"), help="without it: the vae.pt whose latents are compared")
    parser.add_argument("--clip", help="folder of a CLIP model of transformers: CLIP score, too")
    parser.add_argument("--world", choices=tuple(scenes.WORLDS), default="six", help="of scenes: which captions")
    parser.add_argument("--limit", type=int, default=30000, help="at most so many pictures (the paper: 30000, in its ablations 5000), or prompts")
    parser.add_argument("--steps", type=int, default=250, help="diffusion steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance weight")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="ddpm is the paper's")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures, prompts and noise")
    parser.add_argument("--out", default="out/geneval", help="of GenEval: folder of the pictures")
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args(argv)
    if args.pictures is None:
        return demo()
    if args.limit < 4 or not 0 <= args.guidance < np.inf or not 1 <= args.steps <= 1000:
        raise UserError("--limit must be at least 4, --guidance 0 or more, --steps between 1 and 1000")
    if args.json and not Path(args.json).parent.is_dir():
        raise UserError(f"cannot write {args.json}: its folder does not exist")
    drawing = dict(seed=args.seed, steps=args.steps, guidance=args.guidance, sampler=args.sampler)
    prompts, ranks = Path(args.pictures).suffix == ".jsonl", distributed.start()
    if prompts and (args.inception or args.clip or args.only or args.json):
        raise UserError("GenEval's pictures are judged by its own script: --inception, --clip, --only and --json are for a folder of pictures")
    trained = load_trained(args.checkpoint, ranks.device)
    trained.model.to(ranks.dtype)
    if trained.kind == "llama":
        raise UserError(f"{args.checkpoint} is a llama: it knows words only")
    if prompts:
        count = geneval(trained, args.pictures, args.out, limit=args.limit, **drawing)
        if distributed.rank() == 0:
            print(f"{count} prompts in {args.out}: judge them with GenEval's evaluation/evaluate_images.py")
        return count
    size = trained.model.config.latent[1] * trained.vae.f
    items = (draw_scenes(scenes.WORLDS[args.world], size, args.limit, args.seed) if args.pictures == "scenes" else
             read_folder(args.pictures, size, args.limit, args.seed))
    features = load_inception(args.inception, ranks.device) if args.inception else vae_features(args.vae, ranks.device)
    clip = load_clip(args.clip, ranks.device) if args.clip else None
    found, said = judge(trained, items, *((None, None) if args.only == "captions" else (features, clip)), args.only != "pictures", **drawing)
    if distributed.rank() == 0:
        print(f"n = {found['n']} pictures")
        if "cider" in found:
            for answer, texts in said[:3]:
                print(f"  it says: {answer}\n  people say: {'; '.join(texts)}")
            print(f"CIDEr {found['cider']:.1f} ({found['references']:.1f} references each)")
        if "distance" in found:
            few = f"; unreliable: the features have {found['dimensions']} dimensions" if found["n"] <= found["dimensions"] else ""
            print(f"{'FID' if args.inception else 'Fréchet distance of latents'} {found['distance']:.2f} (two halves of the real pictures: "
                  f"{found['halves']:.2f}{few})")
        if "clip" in found:
            print(f"CLIP score {found['clip']:.1f} ({Path(args.clip).name})")
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    run_command(main)
