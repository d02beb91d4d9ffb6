"""
data.py: one sequence of words and pictures                   (Transfusion §3 "Data Representation", §4.1 "Data", App. B.2)

THE IDEA    A document is a list of words and pictures. Laid out, it is one row of tokens in which every picture takes as
            many places as it has patches, fenced by two special tokens, BOI and EOI. The same function lays out documents
            for training and prompts for sampling, so the two cannot drift apart.
A PICTURE   document   ["a red circle", picture 7]           (P = 4 patches here)

              pos      0     1    2    3      4     5    6    7    8    9     10
              tokens   <bos> a    red  circle <boi> .    .    .    .    <eoi> <eos>
              image_id -1    -1   -1   -1     -1    0    0    0    0    -1    -1
              learn    x     x    x    x                                x             next-word loss where x
                                                                                      (never from BOI, never from a patch)
THE RULES   Caption before picture in 80% of the pairs (§4.1). Text tokens : image patches = 1 : 1 (§4.1).
            Noise limit t <= 500 where a picture comes before its caption, else T = 1000 (App. B.2).
SHAPES      B rows, T positions, M pictures in the batch, P patches per picture; latents (M, c, h, w). All counting from 0.
PAPER/HERE  same: order, ratio, noise limit, the loss mask, several documents packed in a row.
            our choice: captions dropped in 10% of the caption-first documents, for guidance. A dropped caption keeps its
            length: each word becomes <drop>, so both branches of guidance have the same positions, and BOI stays.
            our choice: after each pair another may follow in the same document, to teach stories of several pictures.
            our choice: words, not sub-words; the vocabulary is that of the data and travels in the checkpoint.
READ NEXT   attention_mask.py        TRY IT  python data.py        NOTEBOOK notebooks/1_who_may_look_at_whom.ipynb
TEST        tests/test_data.py
"""
import difflib
import gzip
import hashlib
import http.client
import json
import struct
import sys
import urllib.request
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import scenes

ASSETS = Path(__file__).parent / "assets"               # what the repository ships
SPECIAL = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<drop>", "<patch>")
PAD, BOS, EOS, BOI, EOI, DROP, PATCH = range(len(SPECIAL))


class UserError(ValueError):
    """A mistake of the user's, with one sentence that says what to do. `run_command` prints it and exits with 2."""


def run_command(main, argv=None):
    """Run a command line's main(argv). A user's mistake (ValueError, OSError) becomes one sentence on stderr and exit
    status 2; anything else is a bug of ours and keeps its traceback."""
    try:
        main(argv)
    except (ValueError, OSError) as mistake:
        sys.exit(print(f"error: {mistake}", file=sys.stderr) or 2)


# -------------------------------------------------------------------------------------------------------------- tokenizer
class Words:
    """A tokenizer whose tokens are whole words. words: any iterable of strings; ids 0-6 are the special tokens."""

    def __init__(self, words):
        self.words = list(SPECIAL) + sorted(set(words) - set(SPECIAL))
        self.ids = {word: k for k, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    def encode(self, text):
        """List of ids. Raises UserError for an unknown word, naming it and the nearest known one."""
        for word in text.split():
            if word not in self.ids or word in SPECIAL:                 # "<boi>" in a prompt would forge the layout
                near = difflib.get_close_matches(word, self.words[len(SPECIAL):], n=1, cutoff=0.0)
                raise UserError(f"the word {word!r} is not in this model's vocabulary of {len(self) - len(SPECIAL)} words; "
                                f"the nearest known word is {near[0]!r}" if near else f"the vocabulary has no word {word!r}")
        return [self.ids[word] for word in text.split()]

    def decode(self, ids):
        """The words of a list of ids, special tokens left out."""
        return " ".join(self.words[k] for k in ids if k >= len(SPECIAL))


# ----------------------------------------------------------------------------------------------- document -> one sequence
@dataclass
class Sequence:
    """One laid-out document: tokens, image_id, learn (all length n; see the picture above), the index of each of its
    pictures, in reading order, and the noise that it may have."""
    tokens: list = field(default_factory=list)
    image_id: list = field(default_factory=list)
    learn: list = field(default_factory=list)
    images: list = field(default_factory=list)
    t_max: list = field(default_factory=list)
    t_min: list = field(default_factory=list)


def lay_out(document, tokenizer, patches, ends=True):
    """Sequence of a document. document: list of str (words) | ("image", index, t_max, t_min = 1) | ("dropped", str). In place
    of a str may stand the list of its ids (packed shards have those). tokenizer: Words, or shards.Pieces.
    patches: P, places per picture. `ends`: close with EOS (a prompt stays open). Transfusion §3."""
    out = Sequence()

    def put(tokens, image_id=-1, learn=True):
        out.tokens.extend(tokens)
        out.image_id.extend([image_id] * len(tokens))
        out.learn.extend([learn] * len(tokens))

    encode = lambda text: text if isinstance(text, list) else tokenizer.encode(text)
    put([BOS])
    for part in document:
        if isinstance(part, (str, list)):
            put(encode(part))
        elif part[0] == "dropped":                      # TRAP: no LM loss on a dropped caption, nor from the token before it
            out.learn[-1] = False
            put([DROP] * len(encode(part[1])), learn=False)
        else:
            put([BOI], learn=False)                     # Paper §3: no LM loss where the input is BOI: a picture comes next
            put([PATCH] * patches, image_id=len(out.images), learn=False)
            put([EOI])                                  # EOI is put there, never predicted: no patch learns a next token
            out.images.append(part[1])
            out.t_max.append(part[2])
            out.t_min.append(part[3] if len(part) > 3 else 1)
    if ends:
        put([EOS], learn=False)
    else:
        out.learn[-1] = False                           # a prompt has no next token to learn
    return out


@dataclass
class Batch:
    """What a training step sees. tokens, image_id, doc_id: (B, T) int64; image_id counts pictures over the whole batch,
    -1 is text; doc_id counts documents within a row, padding has the last one. learn: (B, T) bool, whether position q
    predicts token q+1. images, t_max, t_min: (M,) int64, picture indices and noise limits in reading order.
    latents, eps: (M, c, h, w) float32, t: (M,) int64 — filled in by train.draw_batch."""
    tokens: torch.Tensor
    image_id: torch.Tensor
    doc_id: torch.Tensor
    learn: torch.Tensor
    images: torch.Tensor
    t_max: torch.Tensor
    t_min: torch.Tensor
    latents: torch.Tensor | None = None
    t: torch.Tensor | None = None
    eps: torch.Tensor | None = None

    def to(self, device):
        """The same batch on another device."""
        return Batch(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()})


def first_fit(lengths, T):
    """Rows of T positions, each a list of the numbers of the documents in it, longest first; as many rows as it takes,
    so that no document is ever cut or lost. lengths: list of int. Raises UserError if one is longer than T."""
    rows, room = [], []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if lengths[number] > T:
            raise UserError(f"a document of {lengths[number]} tokens does not fit in a context of {T}: raise --seq-len")
        k = next((k for k, space in enumerate(room) if space >= lengths[number]), len(rows))
        if k == len(rows):
            rows.append([])
            room.append(T)
        rows[k].append(number)
        room[k] -= lengths[number]
    return rows


def pack(sequences, T):
    """Batch of sequences packed first-fit into rows of T positions. Raises UserError if one is longer than T."""
    return to_batch([[sequences[k] for k in row] for row in first_fit([len(seq.tokens) for seq in sequences], T)], T)


def to_batch(rows, T):
    """Batch of rows, each a list of sequences that fit in T positions together."""
    shape = (len(rows), T)
    tokens, image_id, doc_id = np.full(shape, PAD), np.full(shape, -1), np.zeros(shape, dtype=np.int64)
    learn, images, t_max, t_min = np.zeros(shape, dtype=bool), [], [], []
    for b, row in enumerate(rows):
        at = 0
        for d, seq in enumerate(row):
            span = slice(at, at + len(seq.tokens))
            ids = np.array(seq.image_id)
            tokens[b, span], learn[b, span], doc_id[b, span] = seq.tokens, seq.learn, d
            image_id[b, span] = np.where(ids >= 0, ids + len(images), -1)
            images += seq.images
            t_max += seq.t_max
            t_min += seq.t_min
            at = span.stop
        doc_id[b, at:] = len(row)                       # padding is a document of its own: no row of the mask is empty
    return Batch(*(torch.from_numpy(np.asarray(a)) for a in (tokens, image_id, doc_id, learn)),
                 *(torch.tensor(numbers, dtype=torch.long) for numbers in (images, t_max, t_min)))


# ----------------------------------------------------------------------------------------------------------------- sources
@dataclass
class Pairs:
    """Captioned pictures, and perhaps text alone. captions: list of N str; pixels: (N, h, w, 3 or 1) uint8.
    world: the scenes.World that writes text-only documents and knows the language's entropy, or None.
    labels: (N,) int, MNIST's classes, or None. language: captions beyond these whose words must be known, too."""
    name: str
    captions: list
    pixels: np.ndarray
    world: object = None
    labels: np.ndarray | None = None
    language: list = field(default_factory=list)

    def vocabulary(self):
        """Every word that this source can utter."""
        if self.world:
            return scenes.vocabulary()
        return {word for text in [*self.captions, *self.language] for word in text.split()}


def load_scenes(n, seed, categories=scenes.WORLDS["six"], size=32, held_out=False, progress=True):
    """Pairs of n rendered scenes. held_out: only captions that name a held-out colour-shape pair (for evaluation)."""
    rng, world = np.random.default_rng(seed), scenes.World(tuple(categories))
    captions, pixels = [], np.empty((n, size, size, 3), dtype=np.uint8)
    for k in tqdm(range(n), desc="drawing scenes", disable=not progress, leave=False):
        text, claim = world.caption(rng, held_out)
        captions.append(text)
        pixels[k] = scenes.render(scenes.draw_scene(claim, rng, size, allow_held_out=held_out), size)
    return Pairs("scenes", captions, pixels, world)


MNIST_FILES = {                                         # name: md5 of the .gz, as published with the data set
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873", "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3", "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c"}
MNIST_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def fetch_mnist(folder, mirrors=MNIST_MIRRORS):
    """Download the four files into `folder`, each from the first mirror that answers with the right md5."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, md5 in tqdm(MNIST_FILES.items(), desc=f"downloading MNIST to {folder}"):
        problems = []
        for mirror in mirrors:
            try:
                raw = urllib.request.urlopen(f"{mirror}{name}.gz", timeout=30).read()
            except (OSError, http.client.HTTPException) as problem:
                problems.append(f"{mirror}: {problem}")
                continue
            if hashlib.md5(raw).hexdigest() == md5:
                (folder / f"{name}.tmp").write_bytes(raw)               # a killed download must not look like a file
                (folder / f"{name}.tmp").replace(folder / f"{name}.gz")
                break
            problems.append(f"{mirror}: wrong checksum")
        else:
            raise UserError(f"could not download {name}.gz ({'; '.join(problems)}); put the four MNIST idx files in a "
                            f"folder yourself and name it with --data-dir")


def read_idx(folder, name):
    """Array of an idx file, gzipped or raw. Raises UserError if it is missing, truncated or something else."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.exists()), None)
    if path is None:
        raise UserError(f"{folder} has no {name}(.gz): --data-dir must name a folder with the four MNIST idx files")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, dims = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{dims}I", raw[4: 4 + 4 * dims])
        assert zero == 0 and kind == 8 and len(raw) == 4 + 4 * dims + int(np.prod(shape))
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, struct.error, zlib.error, AssertionError):
        raise UserError(f"{path} is truncated or not an idx file: delete it and download it again") from None


def load_mnist(folder=None, split="train"):
    """Pairs of MNIST digits, padded from 28x28 to 32x32, with captions in words: "the digit seven".
    folder: where the idx files lie; None: ./data/mnist, downloaded there at first use."""
    if folder is None:
        folder = Path("data/mnist")
        if not all((folder / f"{n}.gz").exists() or (folder / n).exists() for n in MNIST_FILES):
            fetch_mnist(folder)
    folder, stem = Path(folder), {"train": "train", "test": "t10k"}[split]
    images, labels = read_idx(folder, f"{stem}-images-idx3-ubyte"), read_idx(folder, f"{stem}-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} images but {len(labels)} labels; the files do not belong together")
    pixels = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]
    return Pairs("mnist", [f"the digit {DIGITS[k]}" for k in labels], pixels, labels=labels.astype(np.int64))


def crop_and_resize(image, size):
    """(size, size, 3) uint8 of any PIL image: centre-cropped to a square, resized, as in Transfusion §4.1.
    Transparency is laid on black; an EXIF rotation is applied."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                      # 16 bits of grey: Pillow's own conversion would clip it to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return np.array(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))       # a copy: torch warns of read-only ones


def open_picture(path, size, say=False):
    """(size, size, 3) uint8 of an image file; `say` tells when that is not what the file holds. Raises UserError, naming
    the file, if it cannot be read as a picture."""
    try:
        with Image.open(path) as image:
            if say and (image.size, image.mode, image.getexif().get(0x0112, 1)) != ((size, size), "RGB", 1):
                print(f"{path}: {image.size[0]}x{image.size[1]} {image.mode}, converted to {size}x{size} RGB")
            return crop_and_resize(image, size)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise UserError(f"{path} cannot be read as a picture ({problem}): is it truncated or of another type?") from None


def read_lines(path, wanted):
    """[(line number, line)] of a JSON-lines file, empty ones left out. Raises UserError, saying what is wanted in it."""
    try:
        return [line for line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line[1].strip()]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it must hold one {wanted} per line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: save it as UTF-8") from None


def load_folder(folder, size=32, split="train"):
    """Pairs of a folder of pictures with captions.jsonl: one {"image": "cat.jpg", "caption": "a cat"} per line.
    Every tenth pair is the test split. Pictures that cannot be read are counted, named and skipped."""
    path = Path(folder) / "captions.jsonl"
    lines = read_lines(path, '{"image": file name, "caption": words}')
    captions, pixels, bad = [], [], []
    for number, line in tqdm(lines, desc=f"reading {folder}", leave=False):
        try:
            entry = json.loads(line)
            name, caption = entry["image"], " ".join(entry["caption"].lower().split())
            path.parent / name                          # a name that is no string is the same kind of mistake
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} line {number} is not {{\"image\": ..., \"caption\": ...}}: {line[:60]!r}") from None
        try:
            pixels.append(open_picture(path.parent / name, size))
            captions.append(caption)
        except UserError as problem:
            bad.append(str(problem))
    if bad:
        print(f"{folder}: skipped {len(bad)} of {len(lines)} pictures: {'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}")
    keep = [k for k in range(len(captions)) if (k % 10 == 9) == (split == "test")]
    if not keep:
        raise UserError(f"{folder} has no usable {split} pair: it needs at least ten readable pictures with captions")
    return Pairs("folder", [captions[k] for k in keep], np.stack([pixels[k] for k in keep]), language=captions)


def load_pairs(name, folder=None, size=32, split="train", n=20000, seed=0, categories=scenes.WORLDS["six"], progress=True):
    """Pairs by the name of their source: "scenes" (n of them, drawn from the seed), "mnist" or "folder"."""
    if name == "scenes":                                # splits differ by their stream of random numbers
        return load_scenes(n, [seed, ("train", "test").index(split)], categories, size, progress=progress)
    if name == "mnist":
        return load_mnist(folder and Path(folder), split)
    if folder is None:
        raise UserError("--data folder needs --data-dir: the folder with captions.jsonl")
    return load_folder(folder, size, split)


# ------------------------------------------------------------------------------------------------- the stream of documents
def one_pair(caption, k, caption_first, rng, drop, t_limit, T):
    """The parts of a caption and its picture k, in their order: the rules of §4.1 and App. B.2. Either order, dropped or
    not, takes the same number of positions. rng: decides whether the caption is dropped, with probability `drop`."""
    if caption_first:
        return [("dropped", caption) if rng.random() < drop else caption, ("image", k, T)]
    return [("image", k, t_limit), caption]             # TRAP: the limit is for these only, and it is a maximum, not the t


@dataclass
class Documents:
    """Draws documents from Pairs. Every draw is a function of the generator it is given and of nothing else."""
    pairs: Pairs
    patches: int                                        # P, to balance text and patches
    context: int = 96                                   # T: a document holds as many pairs as fit, four at most
    caption_first: float = 0.8                          # Paper §4.1
    t_limit: int = 500                                  # Paper App. B.2: noise limit of pictures that precede their caption
    T: int = 1000                                       # diffusion steps
    drop: float = 0.1                                   # our choice: share of captions dropped, for guidance
    another: float = 0.2                                # our choice: after each pair, the chance of one more in the document

    def pairs_odds(self):
        """[p(one pair), p(two), ...], each `another` times the one before; the last has the rest."""
        odds = [self.another ** k * (1 - self.another) for k in range(self.most - 1)]
        return odds + [1 - sum(odds)]

    def longest(self):
        """Positions of the longest document."""
        return 2 + self.most * self.pair

    def __post_init__(self):
        self.pair = max(len(caption.split()) for caption in self.pairs.captions) + self.patches + 2
        self.most = max(1, min(4, (self.context - 2) // self.pair))
        # Paper §4.1: text tokens and image patches 1 : 1. A pair brings more patches than words, and text alone evens it
        # out; its share s solves  s * text_len + (1-s) * pair_words = (1-s) * pair_patches.
        if self.pairs.world:
            words = float(np.mean([len(c.split()) for c in self.pairs.captions[:5000]]))
            n = sum(k * p for k, p in enumerate(self.pairs_odds(), 1))
            pair_words, pair_patches = 2 + n * (words + 2), n * self.patches
            text_len = 2 + self.pairs.world.deduction_words()
            gap = max(pair_patches - pair_words, 0.0)
            self.text_share = gap / (gap + text_len)
        else:
            self.text_share = 0.0                       # a source without text alone has only its captions

    def draw(self, rng):
        """One document, as `lay_out` takes it. rng: numpy Generator."""
        if rng.random() < self.text_share:
            return [self.pairs.world.deduction(rng)]
        caption_first, document = rng.random() < self.caption_first, []
        for _ in range(1 + int(rng.choice(self.most, p=self.pairs_odds()))):
            k = int(rng.integers(len(self.pairs.captions)))
            document += one_pair(self.pairs.captions[k], k, caption_first, rng, self.drop, self.t_limit, self.T)
        return document

    def log_prob(self, document):
        """ln p of a caption-first or text-only document's words, in nats: what a perfect model would reach. Exact."""
        world, p = self.pairs.world, 1 - self.text_share
        if isinstance(document[0], str) and len(document) == 1:
            return float(np.log(self.text_share) + world.deduction_log_prob())
        texts = document[::2]
        shares = np.log(p) + np.log(self.caption_first) + np.log(self.pairs_odds()[len(texts) - 1])
        return float(shares + sum(world.caption_log_prob(text) for text in texts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["pack"]:                       # text and pictures to shards on disk
        import pack as packing
        sys.exit(run_command(packing.main, sys.argv[2:]))
    pairs = load_scenes(50, seed=0, progress=False)
    words, stream, rng = Words(pairs.vocabulary()), Documents(pairs, patches=16), np.random.default_rng(0)
    for _ in range(4):
        document = stream.draw(rng)
        sequence = lay_out(document, words, patches=4)
        print("\ndocument", document)
        for name, cells in (("tokens", [words.words[t] for t in sequence.tokens]), ("image_id", sequence.image_id),
                            ("learn", ["x" if x else "" for x in sequence.learn])):
            print(f"{name:9s}" + " ".join(f"{str(c):8s}" for c in cells[:16]) + (" ..." if len(cells) > 16 else ""))
    drawn = [lay_out(stream.draw(rng), words, 16) for _ in range(2000)]
    patches = sum(i >= 0 for s in drawn for i in s.image_id)
    print(f"\n{len(words)} words; 2000 documents: {sum(len(s.tokens) for s in drawn) - patches} text tokens, {patches} patches")
