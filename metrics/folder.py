"""
folder.py: what a model has learned of your own pictures                                     (ours)

THE IDEA    No parser reads photos, and no other network is at hand. But the folder itself can
            judge. Ask for a caption that was trained on: of all pictures that were learned from,
            the nearest to the drawing should be the caption's own. And captions that were never
            trained on show what it makes of them.
A PICTURE   "a red cross" --model--> drawing --nearest of 1,592--> its own picture?  right
            [a hand] "make it dark" --> drawing --nearest of that hand's pictures--> the dark one?
            a test picture --model--> "a red cross on white" --CIDEr--> what the folder says of it
THE RULE    nearest: smallest mean square of the difference in pixels
            of captions and documents: among all pictures of the split
            of edits: among the first picture itself and all that it becomes in this folder
SHAPES      pixels (N, h, w, c) uint8
PAPER/HERE  not in the paper, whose CIDEr is on COCO (metrics/coco.py). On trained captions the
            share says how much was learned, not how well new ones are drawn: look at both.
READ NEXT   gap.py, ../autoencoder/quality.py        TEST  tests/test_folder.py
"""
from dataclasses import dataclass

import numpy as np
import torch

from autoencoder import quality
from data import Words
from metrics import drawing
from metrics.coco import cider
from metrics.mixtures import beside
from sources.edits import Edits
from sources.pairs import Pairs, words_of
from support.checkpoint import encode_pixels

SHOWN = 12                                              # of each split in samples.png
CHUNK = 4096                                            # pictures that are compared at a time


@dataclass
class Ask:
    """One picture to draw.

    parts       what stands before it: strings, and numbers of pictures
    target      the number of the picture that belongs there
    rivals      the numbers of the pictures that it is told from
    """
    parts: list
    target: int
    rivals: list


def report_folder(trained, train, test, n=200, seed=0, **options):
    """(dict of numbers, [(prompt, picture, right)] to show) of data of your own.

    train, test     Pairs, Edits or documents: what it has learned from (or None), and what not
    n               how many pictures to draw of each, at most
    options         as `sample.draw`
    Every process must call it."""
    numbers = {}
    shown = []
    new_words = set()
    numbers["target"] = "the edit asked for" if isinstance(test, Edits) else "its own picture"
    if train:
        new_words = words_in(trained, test) - words_in(trained, train)
        numbers["new_words"] = sorted(new_words)

    # The same questions about what was trained on and about what was not: the first say whether
    # there was enough training, the second what it is good for.
    for name, source in (("own", train), ("unseen", test)):
        asks = asks_of(source)[:n] if source else []
        if asks:
            drawn = draw(trained, source, asks, seed, options)
            results = []
            for picture, ask in zip(drawn, asks, strict=True):
                right = is_nearest(picture, ask, source)
                title = title_of(ask, name == "unseen", new_words)
                results.append((title, beside_truth(picture, ask, source), right))
            rights = [right for *_, right in results]
            chances = [1 / len(ask.rivals) for ask in asks]
            numbers[f"{name}_nearest"] = float(np.mean(rights))
            numbers[f"{name}_n"] = len(asks)
            numbers[f"{name}_chance"] = float(np.mean(chances))
            shown += results[:SHOWN]
        if asks and isinstance(source, Pairs):
            numbers[f"{name}_cider"] = measure_cider(trained, source, n)

    unseen = test.pixels[:256]
    if len(unseen):                                     # a test split of words alone has none
        reached = quality.measure(unseen, quality.reconstruct(trained.vae, unseen))
        numbers["vae"] = vars(reached)
    return numbers, shown


def words_in(trained, source):
    """The set of words of a source, as the model's tokenizer tells them apart."""
    words = words_of(source.captions)
    if isinstance(trained.tokenizer, Words):            # it has no capitals
        words = {word.lower() for word in words}
    return words


# ----------------------------------------------------------------------------- what there is to ask
def asks_of(source):
    """List of Ask: every picture of a source that something stands before."""
    rivals = range(len(source.pixels))
    families = edit_families(source) if isinstance(source, Edits) else None
    asks = []
    for parts, target in source.to_draw():
        if families:
            first = content(source, parts[0])
            rivals = families[first]
        asks.append(Ask(parts, target, rivals))
    return asks


def edit_families(source):
    """{content of a picture: the numbers of it and of all pictures that its edits lead to}."""
    families = {}
    for before, _, after in source.triples():
        family = families.setdefault(content(source, before), [before])
        family.append(after)
    return families


def content(source, k):
    """The bytes of picture k: an edited picture comes once for each of its edits."""
    return source.pixels[k].tobytes()


def title_of(ask, unseen, new_words):
    """What stands above a drawn picture. A word that no training caption has is marked: (zebra?)"""
    words, _ = split_parts(ask)
    text = " ".join(words)
    if not unseen:
        return text
    words = []
    for word in text.split():
        is_new = word in new_words or word.lower() in new_words
        words.append(f"({word}?)" if is_new else word)
    return f"unseen: {' '.join(words)}"


def beside_truth(picture, ask, source):
    """Side by side: the last picture of the prompt, if it has one; what was drawn; what belongs
    there."""
    _, before = split_parts(ask)
    last = source.pixels[before[-1:]]                   # (1, h, w, c), or none
    return beside(*last, picture, source.pixels[ask.target])


def split_parts(ask):
    """(words, numbers of pictures): the two kinds of parts of an Ask, two lists."""
    words = []
    pictures = []
    for part in ask.parts:
        if isinstance(part, str):
            words.append(part)
        else:
            pictures.append(part)
    return words, pictures


# ----------------------------------------------------------------------------- is it the right one?
def draw(trained, source, asks, seed, options):
    """(M, h, w, 3) uint8: what the model draws for each Ask."""
    # 1. The pictures in the prompts, each once, by their numbers.
    numbers = set()
    for ask in asks:
        _, pictures = split_parts(ask)
        numbers.update(pictures)
    latents = {}
    if numbers:
        numbers = sorted(numbers)
        encoded = encode_pixels(trained, source.pixels[numbers])            # (n, c, h, w)
        latents = dict(zip(numbers, encoded))

    # 2. Prompts with latents in place of the numbers.
    prompts = []
    for ask in asks:
        prompts.append([latents.get(part, part) for part in ask.parts])
    return drawing.draw_after(trained, prompts, seed=seed, **options)


def is_nearest(picture, ask, source):
    """Whether of all rivals the nearest to a drawn picture is the one that was asked for, or one
    that looks the same or belongs to the same words."""
    # A picture may have five captions, and "a cat" many pictures: none of these is a mistake.
    place = nearest(picture, source.pixels, ask.rivals)
    k = ask.rivals[place]
    if content(source, k) == content(source, ask.target):
        return True
    if not isinstance(source, Pairs):
        return False
    return source.captions[k] == source.captions[ask.target]


def nearest(picture, pixels, numbers):
    """The place in the list `numbers` of the picture that is nearest to (h, w, 3) uint8. pixels:
    (N, h, w, c) uint8."""
    wanted = torch.from_numpy(picture).float()
    distances = []
    for start in range(0, len(numbers), CHUNK):         # a chunk at a time: photos take memory
        chosen = list(numbers[start: start + CHUNK])
        others = torch.from_numpy(pixels[chosen]).float()                   # (n, h, w, c)
        difference = others - wanted
        distances.append(difference.square().mean((1, 2, 3)))               # (n,)
    return int(torch.cat(distances).argmin())


def measure_cider(trained, source, n):
    """CIDEr of what the model says of up to n pictures, against all captions that they have here.
    None if there are too few to compare. source: Pairs."""
    references = {}                                     # of each picture, by its content
    first = {}
    for k, caption in enumerate(source.captions):
        references.setdefault(content(source, k), []).append(caption)
        first.setdefault(content(source, k), k)
    chosen = list(references)[:n]
    if len(chosen) < 4:
        return None
    numbers = [first[key] for key in chosen]
    latents = encode_pixels(trained, source.pixels[numbers])
    answers = drawing.describe(trained, latents)
    return float(cider(answers, [references[key] for key in chosen]))


# --------------------------------------------------------------------------------- as lines of text
def describe(numbers):
    """[(what, value)] of the numbers of `report_folder`, in the order of the report."""
    lines = []
    for name, text in {"own": "trained", "unseen": "unseen"}.items():
        share = numbers.get(f"{name}_nearest")
        if share is not None:
            n = numbers[f"{name}_n"]
            chance = numbers[f"{name}_chance"]
            lines.append((f"nearest is {numbers['target']}, {text}",
                          f"{share:6.1%} (n = {n}; by chance {chance:.1%})"))
    for name, text in {"own": "trained", "unseen": "unseen"}.items():
        score = numbers.get(f"{name}_cider")
        if score is not None:
            lines.append((f"CIDEr of captions, {text} pictures", f"{score:6.1f}"))
    new = numbers.get("new_words")
    if new:
        first = ", ".join(new[:6])
        if len(new) > 6:
            first += ", ..."
        lines.append(("words in no training caption", f"{len(new):6d} ({first})"))
    if "vae" in numbers:
        reached = quality.Quality(**numbers["vae"])
        lines.append(("the VAE, on unseen pictures", reached.describe()))
        if reached.bottleneck():
            lines.append(("", reached.bottleneck()))
    return lines
