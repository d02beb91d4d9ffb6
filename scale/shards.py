"""
shards.py: a trillion tokens on disk, in an order that (seed, step) decides    (§4.1 "Data")

THE IDEA    What is the same in every epoch is computed once and written down: token ids, the VAE's
            latents, which documents share a row of T positions. What must differ from epoch to
            epoch is drawn when a row is read, and never stored: the order of the rows, caption or
            picture first, captions dropped. It is drawn from (seed, row number). So any rank knows
            at once which rows are its own at any step, and a checkpoint needs the step only.
A PICTURE   packed/  tokenizer.model | .json, vae.pt, index.json (written last: it lists and counts)
                     text-000000/  pairs-000000/  pairs-000001/ ...
            A shard is header.json and these arrays. Each of the first three says where the children
            of a row, document or part begin:

            rows       0     3       5 ...   row r has documents rows[r] .. rows[r+1]
            documents  0  1  2  4  5 ...     document d has parts documents[d] .. documents[d+1]
            parts      0  3  9  12  ...      part p has words parts[p] .. parts[p+1]; a document of
                                             text alone has one part
            words      uint16                the ids of the words. BOS, BOI, patches ... are laid
                                             out when a row is read
            latents    float16 (parts, c, h, w), pairs only: the picture of each part;
                       uint16 (parts, h, w) if a VQ-VAE made codes
            sums       uint32 (rows,)        crc32 of all that belongs to a row, checked whenever
                                             the row is read
THE RULE    row number g = (step * micro-batches + micro) * B + b       of an endless stream of rows
            It is text if floor((g+1) s) > floor(g s), else pairs. s makes text tokens : patches
            1 : 1. The j-th row of its kind is row shuffled(j mod n) of n, in the order of epoch
            floor(j / n).
SHAPES      B rows, T positions, M pictures, P patches per picture, latents (M, c, h, w)
PAPER/HERE  same: rows of 4096, 32,000 pieces, 1 : 1, captions first in 80%, else t <= 500.
            our choice: whole rows make 1 : 1, when they are read. So text and pictures have epochs
            of their own (the paper's pictures repeat, its text does not).
            our choice: only the mean of q(z | x) is stored: 16 KiB for a 256x256 picture, 57 TB for
            the paper's 3.5B. Its deviation would double that. With assets/scenes_vae.pt it is 0.005
            of the latents' own, less than the noise of the first diffusion step (0.006). float16
            rounds by 0.002 at most. Packing prints the deviation for your VAE.
            Some folders may come more often than others, and others in the last 1%: mixture.py.
READ NEXT   pack.py, feed.py        TEST  tests/test_shards.py
TRY IT      python -m scale.shards; python -m scale.shards packed
"""
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import vae as vae_module
from data import Pieces
from scale.mixture import Order, Source, check_folders
from sources.feed import digest
from support import checkpoint
from support.common import UserError, check_ordinary, read_json, run_command

KINDS = ("text", "pairs")

# The fields of a header.json and their types. Numbers are counts.
HEADER = {
    "kind": str,                # one of KINDS
    "settings": dict,           # what all shards of a folder must share
    "recipe": dict,             # settings, sources and options: what the content depends on
    "next": list,               # where the next shard begins: [number of a source, items read]
    "bytes": dict,              # {file name: size}
    "rows": int,
    "documents": int,
    "words": int,
    "positions": int,           # those that are filled
    "pictures": int,
    "skipped": int,             # items that could not be packed
    "problems": list,           # what was wrong with the first of them
    "deviation_squared": float,     # the VAE's, summed over the pictures
}
SETTINGS = {"text": ("seq_len", "tokenizer"),
            "pairs": ("seq_len", "tokenizer", "vae", "latent", "patch", "patches")}

# What reading needs to know of every shard. It stands in index.json, too.
COUNTS = ("rows", "positions", "pictures")

PACK_AGAIN = "delete it and run the packing command again, which packs it anew"


def fingerprint(thing):
    """16 hex digits that name a tokenizer, or a VAE, by its content."""
    if isinstance(thing, vae_module.VAE):
        # TRAP: x0_max goes by its older name here. With the new one, the shards that were packed
        # before the change would no longer fit their VAE.
        weights = {}
        for name, tensor in thing.state_dict().items():
            weights[name.replace("x0_max", "reach")] = tensor.cpu().contiguous()
        pieces = [name.encode() + weights[name].numpy().tobytes() for name in sorted(weights)]
        content = b"".join(pieces)
    elif isinstance(thing, Pieces):
        content = thing.model
    else:
        content = json.dumps(thing.vocabulary).encode()
    return hashlib.sha256(content).hexdigest()[:16]


# ---------------------------------------------------------------------------------------- one shard
class StoredArray:
    """An array in a .npy file. `array[a:b]` reads these items, and no others.

    file: its path. Raises ValueError if it is no .npy file."""

    # TRAP: a memory-mapped array keeps its file open. Six files a shard, and the thousand that a
    # system often allows are used up after 170 shards. Rows come from all shards, in any order.

    def __init__(self, file):
        self.file = file
        check_ordinary(file)                            # a pipe would wait for ever
        with open(file, "rb") as stream:
            np.lib.format.read_magic(stream)
            self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(stream)
            self.begin = stream.tell()                  # the first byte after the header

    def __getitem__(self, span):
        """The items of a slice. Raises ValueError if the array is shorter."""
        n, *item = self.shape
        if not 0 <= span.start <= span.stop <= n:
            raise ValueError(f"{self.file} has no items {span.start} to {span.stop}")
        size = math.prod(item) * self.dtype.itemsize    # bytes of one item
        # Without a buffer, which would be made, and filled, for a few numbers.
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.begin + int(span.start) * size)
            piece = stream.read(int(span.stop - span.start) * size)
        return np.frombuffer(piece, self.dtype).reshape(span.stop - span.start, *item)


def open_arrays(path):
    """{name: StoredArray} of a shard. Only their headers are read."""
    return {file.stem: StoredArray(file) for file in path.glob("*.npy")}


def cut_row(arrays, r):
    """Row r of a shard's arrays: (documents, latents, crc32 of all of it). A document is a list of
    parts, a part a list of ids. latents: those of the parts, or None."""
    # Each table says where the children begin, and, one place on, where they end.
    document_bounds = arrays["rows"][r: r + 2]
    part_bounds = arrays["documents"][document_bounds[0]: document_bounds[1] + 1]
    word_bounds = arrays["parts"][part_bounds[0]: part_bounds[-1] + 1]
    words = arrays["words"][word_bounds[0]: word_bounds[-1]]
    pieces = [document_bounds, part_bounds, word_bounds, words]
    latents = None
    if "latents" in arrays:
        latents = arrays["latents"][part_bounds[0]: part_bounds[-1]]
        pieces.append(latents)

    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece.tobytes(), crc)
    parts = split(words.tolist(), word_bounds)
    return split(parts, part_bounds), latents, crc


def split(items, bounds):
    """Cut a list into pieces. The pieces' bounds count from bounds[0]."""
    return [items[a:b] for a, b in itertools.pairwise(bounds - bounds[0])]


def read_header(path, settings=None):
    """The dict of a shard's header. Raises UserError, naming the shard, if it is missing, or broken
    as far as sizes tell, or was packed with other settings than these."""
    header = parse_header(path)
    check_sizes(path, header["bytes"])
    check_same_settings(path, header["settings"], settings or {})
    return header


def parse_header(path):
    """The dict of a shard's header.json. Raises UserError if it is missing, or is no header."""
    try:
        header = read_json(path / "header.json")
    except FileNotFoundError:
        raise UserError(missing(path)) from None
    except ValueError:
        header = None                       # cut short, or something else
    if not is_header(header):
        raise UserError(f"the shard {path} is broken (header.json cannot be read): {PACK_AGAIN}")
    return header


def missing(path):
    """The sentence about a shard that is not there."""
    return (f"the shard {path} is missing: copy it there, or run the packing command again, which "
            f"packs it anew")


def is_header(header):
    """Whether a parsed header.json has every field, each of its type."""
    if not isinstance(header, dict):
        return False
    for name, kind in HEADER.items():
        if not has_type(header.get(name), kind):
            return False
    if header["kind"] not in KINDS or header["rows"] == 0 or not are_settings(header["settings"]):
        return False
    if any(name not in header["settings"] for name in SETTINGS[header["kind"]]):
        return False
    if not has_type(header["recipe"].get("sources"), dict) or len(header["next"]) != 2:
        return False
    numbers = [*header["bytes"].values(), *header["next"]]
    return all(has_type(number, int) for number in numbers)


def are_settings(settings):
    """Whether the settings in a JSON file are of the types that packing writes: fingerprints are
    text, a latent is three whole numbers, all else is one."""
    if not isinstance(settings, dict):
        return False
    for name, value in settings.items():
        if name == "latent":
            if not isinstance(value, list) or len(value) != 3:
                return False
            if not all(has_type(number, int) for number in value):
                return False
        elif not has_type(value, str if name in ("tokenizer", "vae") else int):
            return False
    return True


def has_type(value, kind):
    """Whether a value from a JSON file has a type. Numbers must not be negative."""
    if kind not in (int, float):
        return isinstance(value, kind)
    if isinstance(value, bool):             # True is an int, too
        return False
    return isinstance(value, (int, kind)) and value >= 0


def check_sizes(path, sizes):
    """Raise UserError if a file of a shard is missing, or has another size than its header says."""
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            raise UserError(f"the shard {path} is broken ({name} has {found or 0:,} bytes, its "
                            f"header says {size:,}): {PACK_AGAIN}")


def check_same_settings(path, own, others):
    """Raise UserError if a shard, or a folder of shards, has other settings than the rest."""
    different = [name for name in own if others.get(name, own[name]) != own[name]]
    if different:
        first = different[0]
        raise UserError(f"{path} was packed with another {' and '.join(different)} "
                        f"({own[first]}) than the rest ({others[first]}): keep shards of different "
                        f"settings in different folders")


# ---------------------------------------------------------------------------------------- the order
def shuffled(k, n, key):
    """Which of n rows comes k-th in the order named `key`: a bijection of 0..n-1, without a list of
    n numbers."""
    # A Feistel network: of the two halves of k's bits, add (xor) a hash of one to the other and
    # swap, eight times. Each round can be undone, so no two numbers collide. A result beyond n goes
    # through again until one lands below n.
    # Eight rounds: with four, one of six rows came 6 standard errors too often at one place, in
    # 2000 epochs.
    half = max(1, ((n - 1).bit_length() + 1) // 2)          # bits of each half
    mask = (1 << half) - 1
    while True:
        left = k >> half
        right = k & mask
        for turn in range(8):
            content = f"{key} {turn} {right}".encode()
            hashed = hashlib.blake2b(content, digest_size=8).digest()
            mixed = left ^ (int.from_bytes(hashed) & mask)
            left = right
            right = mixed
        k = left << half | right
        if k < n:
            return k


# ------------------------------------------------------------------------------- a folder of shards
@dataclass
class Phase:
    """How rows are drawn during a part of a run.

    orders      {kind: mixture.Order}
    share       s, the share of rows of text, in units of 2^-32
    key         what tells its order from another phase's
    """
    orders: dict
    share: int
    key: str


def call(function):
    """What the function returns."""
    return function()


class Shards:
    """Packed shards as a stream of batches.

    folder                     what `pack` wrote, or a folder of several such folders
    drop, t_limit, noisiest    as in data.Documents
    text_only                  never a row of pairs (the Llama baseline)
    mixture                    {folder: how often its rows come per epoch}, see mixture.py
    at_the_end                 the same for the steps from last_from on, where it differs
    once                       calls a function once for all processes (distributed.from_rank_0)

    Opening reads index.json, and no file of any shard. A shard that is missing is named at once, a
    broken one when a row of it is read; `verify` finds it before."""

    def __init__(self, folder, drop=data.Documents.drop, t_limit=data.Documents.t_limit,
                 noisiest=data.Documents.noisiest, text_only=False, mixture=None,
                 at_the_end=None, last_from=None, once=call):
        self.folder = Path(folder)
        self.noise_rules = {"drop": drop, "t_limit": t_limit, "noisiest": noisiest}
        self.text_only = text_only
        self.open_arrays = functools.lru_cache(maxsize=4096)(open_arrays)

        indices = self.find_indices()
        # At the paper's size these are 283,000 shards, and 512 processes.
        self.counts, self.settings, self.content = once(lambda: read_indices(indices))
        self.patches = self.settings.get("patches", 0)
        self.codes = self.settings.get("codes", 0)          # 0: the shards hold latents
        self.vae_path = find_beside(indices, "vae.pt")
        self.tokenizer = self.read_tokenizer(indices)
        self.count_rows()
        # How rows are drawn: in the run, and in its last steps.
        self.folders = self.group_by_folder()
        weights = mixture or {}
        last_weights = weights | (at_the_end or {})
        check_folders(last_weights, list(self.folders), self.folder)
        self.phase = self.make_phase(weights)
        self.last_phase = None
        if last_weights != weights:
            self.last_phase = self.make_phase(last_weights, key=" last")
            self.last_from = last_from

    def find_indices(self):
        """The paths of the index.json of every packing in the folder. Raises UserError if there is
        none."""
        indices = sorted([*self.folder.glob("index.json"), *self.folder.glob("*/index.json")])
        if not indices:
            raise UserError(f"{self.folder} has no index.json: it holds no shards, or their "
                            f"packing has not finished; run `python -m scale.pack ... --out "
                            f"{self.folder}` (again)")
        return indices

    def read_tokenizer(self, indices):
        """The tokenizer that lies beside the shards. Raises UserError if it is not theirs."""
        path = find_beside(indices, "tokenizer.model", "tokenizer.json")
        tokenizer = checkpoint.load_tokenizer(path) if path else data.Words([])
        if fingerprint(tokenizer) != self.settings["tokenizer"]:
            found = fingerprint(tokenizer) if path else None
            raise UserError(f"the shards of {self.folder} were packed with another tokenizer "
                            f"({self.settings['tokenizer']}) than the one beside them ({found}): "
                            f"put theirs there")
        return tokenizer

    def total(self, kind, name):
        """The sum of a count of all shards of a kind."""
        return sum(counts[name] for counts in self.counts[kind].values())

    def count_rows(self):
        """Count rows and pictures: which shard has which rows, and which are held out."""
        self.paths = {kind: list(self.counts[kind]) for kind in KINDS}
        self.begins = {}                    # {kind: the first row of each shard; last, how many}
        for kind in KINDS:
            rows = [counts["rows"] for counts in self.counts[kind].values()]
            self.begins[kind] = np.cumsum([0, *rows])
        self.pictures = self.total("pairs", "pictures")
        # The last rows of pairs are never trained on: the conditioning gap is measured there.
        pairs = self.total("pairs", "rows")
        self.held_out_rows = min(16, pairs // 10)
        self.rows = {"text": self.total("text", "rows"), "pairs": pairs - self.held_out_rows}

    def group_by_folder(self):
        """{name of a packing's folder, as --mixture has it: {kind: the counts of its shards}}."""
        folders = {}
        for kind in KINDS:
            for path, counts in self.counts[kind].items():
                name = path.parent.relative_to(self.folder).as_posix()
                shards = folders.setdefault(name, {"text": [], "pairs": []})
                shards[kind].append(counts)
        return folders

    def make_phase(self, weights, key=""):
        """The Phase of a mixture {folder: weight}. key: what tells its order from another phase's.
        Raises UserError if no row is left."""
        orders = {}
        for kind in KINDS:
            sources = []
            first = 0
            for name, shards in self.folders.items():
                rows = sum(counts["rows"] for counts in shards[kind])
                known = min(rows, max(0, self.rows[kind] - first))      # the last are held out
                sources.append(Source(name, first, known))
                first += rows
            orders[kind] = Order(sources, weights)
            if self.rows[kind] and not orders[kind].n:
                raise UserError(f"--mixture leaves no {kind} of {self.folder} to learn from")
        return Phase(orders, self.text_share(weights), key)

    def text_share(self, weights):
        """s, the share of rows of text, in units of 2^-32, so that floor(g s) is exact. weights:
        {folder: how often its rows come}."""
        # Paper: §4.1, text tokens and patches 1 : 1. A row of pairs has `gap` more patches than
        # text tokens; text alone evens it out:   s * text = (1 - s) * gap.
        rows = dict.fromkeys(KINDS, 0)
        text = 0
        gap = 0
        for name, shards in self.folders.items():
            weight = weights.get(name, 1)
            for kind in KINDS:
                rows[kind] += weight * sum(counts["rows"] for counts in shards[kind])
            text += weight * sum(counts["positions"] for counts in shards["text"])
            for counts in shards["pairs"]:
                patches = self.patches * counts["pictures"]
                text_of_pairs = counts["positions"] - patches
                gap += weight * (patches - text_of_pairs)
        text /= max(1, rows["text"])                        # now of a row
        gap = max(0.0, gap / max(1, rows["pairs"]))
        if self.text_only or not self.rows["pairs"]:
            share = 1.0
        elif not self.rows["text"]:
            share = 0.0
        else:
            share = gap / (gap + text)
        return round(share * 2 ** 32)

    # ------------------------------------------------------------------------------------- reading
    def read_row(self, kind, k):
        """(documents, latents or codes) of row k of all rows of a kind, as they lie on disk. Raises
        UserError, naming the shard, if what lies there is not what was written."""
        shard = int(np.searchsorted(self.begins[kind], k, side="right")) - 1
        path = self.paths[kind][shard]
        r = k - int(self.begins[kind][shard])
        try:
            arrays = self.open_arrays(path)
            documents, latents, crc = cut_row(arrays, r)
            intact = crc == int(arrays["sums"][r: r + 1][0])
        except Exception:
            # numpy parses a file's header as Python: a damaged one raises anything, TokenError too.
            intact = False
        if not intact:
            read_header(path)                   # says more, if the shard is missing or cut short
            raise UserError(f"the shard {path} is broken (row {r} is not what was written): "
                            f"{PACK_AGAIN}")
        if self.codes and latents is not None:
            latents = latents.astype(np.int64)
        if latents is not None and not np.isfinite(latents).all():
            raise UserError(f"the shard {path} holds a latent that is not finite (row {r}): its "
                            f"VAE made it; pack again with another VAE")
        return documents, latents

    def draw_row(self, seed, g, phase=None):
        """(documents as data.lay_out takes them, latents or None) of row g of the endless stream.
        phase: how rows are drawn; None: as in the first steps."""
        phase = phase or self.phase
        # 1. Text or pairs? Of the g rows before this one, `before` were text. So it is the j-th of
        #    its kind, counting from 0.
        before = g * phase.share >> 32
        after = (g + 1) * phase.share >> 32
        kind, j = ("text", before) if after > before else ("pairs", g - before)

        # 2. Which row of that kind.
        order = phase.orders[kind]
        epoch, place = divmod(j, order.n)
        place = shuffled(place, order.n, f"{seed} {kind} {epoch}{phase.key}")
        documents, latents = self.read_row(kind, order.row(place, epoch))
        if kind == "text":
            return documents, None

        # 3. Pairs: in each document, caption or picture first.
        # TRAP: numpy takes [seed, g] and [seed, g, 0] for the same seed. The last number keeps this
        # stream apart from that of train.py.
        rng = np.random.default_rng([seed, g, 0, 1])
        drawn = []
        picture = 0                         # pictures are numbered over the row
        for captions in documents:
            caption_first = rng.random() < data.Documents.caption_first
            document = []
            for caption in captions:
                document += data.one_pair(caption, picture, caption_first, rng, **self.noise_rules)
                picture += 1
            drawn.append(document)
        return drawn, latents

    def batch(self, seed, step, micro, rows, micro_batches=1, view=None):
        """data.Batch of B = `rows` rows, with the latents' means. A pure function of its arguments.

        micro           which micro-batch of the step; micro_batches: of how many, over all ranks
        view            what a model reads in place of a document: function (document, latents or
                        codes of the row) -> document (chameleon.view). None: the document. This
                        file need not know the rivals."""
        first = (step * micro_batches + micro) * rows
        phase = self.phase
        if self.last_phase and step >= self.last_from:
            phase = self.last_phase
        sequences = []
        latents = [np.zeros((0, *self.settings.get("latent", (0, 0, 0))), np.float16)]
        for g in range(first, first + rows):
            documents, pictures = self.draw_row(seed, g, phase)
            if view:
                documents = [view(document, pictures) for document in documents]
            sequences.append([data.lay_out(document, self.tokenizer, self.patches)
                              for document in documents])
            if pictures is not None and not self.codes:
                latents.append(pictures)
        batch = data.to_batch(sequences, self.settings["seq_len"])
        batch.images = torch.arange(len(batch.images))      # the latents lie in reading order
        batch.latents = torch.from_numpy(np.concatenate(latents)).float()
        return batch

    def held_out(self, n):
        """(captions as lists of ids, latents or codes) of up to n pairs that `batch` never
        gives."""
        captions = []
        pictures = []
        for k in range(self.held_out_rows):
            documents, latents = self.read_row("pairs", self.rows["pairs"] + k)
            for document in documents:
                captions += document
            pictures.append(latents)
        pictures = torch.from_numpy(np.concatenate(pictures)[:n])
        return captions[:n], pictures if self.codes else pictures.float()

    def load_vae(self, path=""):
        """The VAE of the latents. path: one that must be the same; "": the one beside the shards.
        Raises UserError if it is another one."""
        path = path or self.vae_path or self.folder / "vae.pt"
        vae = checkpoint.load_vae(path, checkpoint.ANY_VAE)
        if fingerprint(vae) != self.settings["vae"]:
            raise UserError(f"the latents of {self.folder} were made by another VAE "
                            f"({self.settings['vae']}) than {path} ({fingerprint(vae)}): leave out "
                            f"--vae, or pack again with it")
        return vae

    # ------------------------------------------------------------------------ the user's mistakes
    def check_setting(self, name, value):
        """Raise UserError if the rows were packed with another number than the run has."""
        packed = self.settings.get(name, value)
        if packed != value:
            option = "--" + name.replace("_", "-")
            raise UserError(f"the shards of {self.folder} were packed with {option} {packed}, but "
                            f"here it is {value}: give {option} {packed}, or pack them again")

    def check_rows(self):
        """Raise UserError if there is nothing to learn from, or nothing to measure the gap on."""
        if self.text_only and self.rows["pairs"]:           # a Llama's gap is not measured
            if not self.rows["text"]:
                raise UserError(f"{self.folder} has no text, and a Llama reads nothing else: pack "
                                f"some with --text")
        elif not self.held_out_rows:
            raise UserError(f"{self.folder} has {self.rows['pairs']} rows of pairs; training needs "
                            f"at least ten, to keep a tenth (16 at most) for the conditioning gap; "
                            f"a Llama, to be compared with a Transfusion on the same folder: pack "
                            f"more with --pairs")

    def check_origin(self, path, tokenizer, vae, own_vae):
        """Raise UserError if a checkpoint, read from `path`, has another tokenizer or VAE than the
        shards. own_vae: the VAE of the shards."""
        other = None
        if fingerprint(tokenizer) != self.settings["tokenizer"]:
            other = "tokenizer"
        elif not same_in_16_bits(own_vae, vae):
            other = "VAE"
        if other:
            raise UserError(f"{path} has learned with another {other} than that of the shards of "
                            f"{self.folder}: pack them again with its own, or train anew without "
                            f"--init")


def read_indices(indices):
    """({kind: {path: {count: number}}}, settings, the name of their content) of all shards that
    these index.json list. Raises UserError if one is broken, or lists a shard that is missing, or
    has other settings than the rest."""
    counts = {kind: {} for kind in KINDS}
    settings = {}
    contents = []
    for path in indices:
        index = read_index(path)
        check_same_settings(path.parent, index["settings"], settings)
        settings |= index["settings"]
        contents.append(index["content"])
        # To list a folder is quick, to look into 283,000 others is not.
        present = set(os.listdir(path.parent))
        for name, of_shard in index["shards"].items():
            if name not in present:
                raise UserError(missing(path.parent / name))
            kind = of_shard["kind"]
            counts[kind][path.parent / name] = {name: of_shard[name] for name in COUNTS}
    content = contents[0] if len(contents) == 1 else digest(json.dumps(contents).encode())
    return counts, settings, content


def content_as_before(indices):
    """The name that the content of several folders had before their index.json counted: that of all
    headers, which are read for it. Runs that are older than 2026-11-26 go by this name."""
    headers = {kind: [] for kind in KINDS}
    for path in indices:
        for name in read_index(path)["shards"]:
            header = parse_header(path.parent / name)
            headers[header["kind"]].append(header)
    in_order = [*headers["text"], *headers["pairs"]]
    return digest(json.dumps(in_order, sort_keys=True).encode())


def read_index(path):
    """The dict of an index.json: see `make_index`. Raises UserError if it is broken."""
    try:
        index = read_json(path)
        if isinstance(index["shards"], list):           # an older packing lists names alone
            index = make_index(path.parent, index["shards"])
        intact = is_index(index)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(f"{path} is broken: run the packing command again, which writes it anew")
    return index


def is_index(index):
    """Whether a parsed index.json has every field that `make_index` gives it, each of its type."""
    shards = index["shards"]
    if not has_type(shards, dict) or not shards:
        return False
    if not are_settings(index["settings"]) or not has_type(index["content"], str):
        return False
    for counts in shards.values():
        if counts["kind"] not in KINDS or counts["rows"] == 0:
            return False
        if not all(has_type(counts[name], int) for name in COUNTS):
            return False
    return True


def make_index(folder, names):
    """What reading needs of all shards of a folder: {"shards": {name: {"kind": ..., count: ...}},
    "settings": ..., "content": 16 hex digits}. Raises UserError if a shard is missing or broken, or
    has other settings than the rest."""
    headers = {}
    settings = {}
    for name in names:
        headers[name] = read_header(folder / name, settings)
        settings |= headers[name]["settings"]
    shards = {}
    for name, header in headers.items():
        shards[name] = {field: header[field] for field in ("kind", *COUNTS)}
    content = digest(json.dumps(list(headers.values()), sort_keys=True).encode())
    return {"shards": shards, "settings": settings, "content": content}


def find_beside(indices, *names):
    """The first file of these names beside an index.json, or None."""
    for index in indices:
        for name in names:
            path = index.parent / name
            if path.exists():
                return path
    return None


def same_in_16_bits(one, two):
    """Whether two VAEs are the same, as far as the 16 bits of a model.pt can tell."""
    if one.config != two.config:
        return False
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        if a.is_floating_point():
            a = a.half()
            b = b.half()
        if not torch.equal(a, b):
            return False
    return True


# ------------------------------------------------------------------------------------- command line
def verify(folder):
    """Read every header of a folder of shards, and every row against its checksum. Raises UserError
    at the first that is not what was written."""
    shards = Shards(folder)
    for path in shards.find_indices():
        index = read_index(path)
        true = make_index(path.parent, list(index["shards"]))
        if true != {name: index[name] for name in true}:
            raise UserError(f"{path} is not what the shards beside it say: run the packing command "
                            f"again, which writes it anew")
    rows = {kind: int(shards.begins[kind][-1]) for kind in KINDS}
    for kind in KINDS:
        for k in tqdm(range(rows[kind]), desc=f"checking {kind}"):
            shards.read_row(kind, k)
    print(f"{folder}: {rows['text']:,} rows of text and {rows['pairs']:,} of pairs are what was "
          f"written; text takes {shards.phase.share / 2 ** 32:.1%} of the rows when read, so that "
          f"text tokens : patches = 1 : 1")


def show_order():
    """Print the order of ten rows, epoch by epoch."""
    print("the order of 10 rows:")
    for epoch in range(3):
        print(f"  epoch {epoch}: {[shuffled(k, 10, f'0 pairs {epoch}') for k in range(10)]}")


def main(argv=None):
    """Verify the folder that is named, or show the order of ten rows."""
    folders = sys.argv[1:] if argv is None else argv
    if folders:
        verify(folders[0])
    else:
        show_order()


if __name__ == "__main__":
    run_command(main)
