"""
shards.py: a trillion tokens on disk, in an order that is a pure function of (seed, step)     (Transfusion §4.1 "Data")

THE IDEA    Whatever is the same in every epoch is computed once and written down: token ids, the VAE's latents, which
            documents share a row of T positions. Whatever must differ from epoch to epoch (the order of the rows, caption
            or picture first, captions dropped) is drawn at reading time from (seed, row number) and never stored. So any
            rank can say at once which rows are its own at any step, and a checkpoint needs to hold the step only.
A PICTURE   packed/  tokenizer.model | .json, vae.pt, index.json (written last: it says which shards there must be)
                     text-000000/  pairs-000000/  pairs-000001/ ...   one shard = header.json and five or six .npy arrays
            rows       0     3       5 ...      row r has documents rows[r] .. rows[r+1]        (each table says where its
            documents  0  1  2  4  5 ...        document d has parts documents[d] .. [d+1]       children begin; text has
            parts      0  3  9  12  ...         part p has words parts[p] .. [p+1]               one part per document)
            words      uint16, the ids of the text alone: BOS, BOI, patches ... are laid out when read
            latents    float16 (parts, c, h, w): the picture of part p (pairs only); by a VQ-VAE its codes, uint16 (parts, h, w)
            sums       crc32 of all that belongs to row r, checked whenever the row is read
THE RULE    row number g = (step * micro-batches + micro) * B + b      of an endless stream of rows
            from the text if floor((g+1) s) > floor(g s), else from the pairs; s such that text tokens : patches = 1 : 1
            the j-th row of its kind is row shuffled(j mod n) of n, in the order of epoch floor(j / n)
SHAPES      B rows, T positions, M pictures, P patches per picture, latents (M, c, h, w)
PAPER/HERE  same: 4096 positions, 32,000 pieces, 1 : 1, captions first in 80%, t <= 500 where not.
            our choice: 1 : 1 is made of whole rows when read, so text and pictures have epochs of their own (the paper's
            pictures repeat, its text does not).
            our choice: only the mean of q(z | x) is stored: 16 KiB for a 256x256 picture, 57 TB for the paper's 3.5B; its
            deviation would double that. With assets/scenes_vae.pt we measured it at 0.005 of the latents' own, less than
            the noise of the first diffusion step (0.006); float16 rounds by 0.002 at most. Packing prints it for your VAE.
            left out: the up-weighting of beautiful pictures in the last 1%, which would be a third kind with its own s.
READ NEXT   plan.py, scale.py      TRY IT  python shards.py; python shards.py packed      TEST  tests/test_shards.py
"""
import functools
import hashlib
import itertools
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import vae as vae_module
from data import Pieces
from support import checkpoint
from support.checkpoint import load_tokenizer
from support.common import UserError, run_command


# -------------------------------------------------------------------------------------------------------------- tokenizer
def fingerprint(thing):
    """16 hex digits that name a tokenizer, or a VAE, by its content."""
    if isinstance(thing, vae_module.VAE):
        # under its older name, so that shards packed before the change still fit their VAE
        state = sorted((name.replace("x0_max", "reach"), tensor) for name, tensor in thing.state_dict().items())
        content = b"".join(k.encode() + v.cpu().contiguous().numpy().tobytes() for k, v in state)
    else:
        content = thing.model if isinstance(thing, Pieces) else json.dumps(thing.vocabulary).encode()
    return hashlib.sha256(content).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------- reading
def cut_row(arrays, r):
    """(documents, each a list of lists of ids; latents of its pictures or None; crc32 of all of it) of row r of a shard."""
    row = np.asarray(arrays["rows"][r: r + 2])
    starts = np.asarray(arrays["documents"][row[0]: row[1] + 1])
    begins = np.asarray(arrays["parts"][starts[0]: starts[-1] + 1])
    words = np.asarray(arrays["words"][begins[0]: begins[-1]])
    latents = np.asarray(arrays["latents"][starts[0]: starts[-1]]) if "latents" in arrays else None
    crc = 0
    for array in (row, starts, begins, words) + (() if latents is None else (latents,)):
        crc = zlib.crc32(array.tobytes(), crc)
    texts = [words[a: b].tolist() for a, b in itertools.pairwise(begins - begins[0])]
    return [texts[a: b] for a, b in itertools.pairwise(starts - starts[0])], latents, crc


def read_header(path, settings=None):
    """The dict of a shard's header. Raises UserError, naming the shard, if it is missing, or broken as far as sizes tell,
    or was packed with other settings."""
    again = "delete it and run the packing command again, which packs it anew"
    try:
        header = json.loads((path / "header.json").read_text())
        sizes, found = header["bytes"], header["settings"]
    except FileNotFoundError:
        raise UserError(f"the shard {path} is missing: copy it there, or run the packing command again, which packs it "
                        f"anew") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"the shard {path} is broken (header.json cannot be read): {again}") from None
    for name, size in sizes.items():
        have = (path / name).stat().st_size if (path / name).exists() else None
        if have != size:
            raise UserError(f"the shard {path} is broken ({name} has {have or 0:,} bytes, its header says {size:,}): {again}")
    other = [k for k in found if settings and settings.get(k, found[k]) != found[k]]
    if other:
        raise UserError(f"the shard {path} was packed with another {' and '.join(other)} ({found[other[0]]}) than the rest "
                        f"({settings[other[0]]}): keep shards of different settings in different folders")
    return header


def shuffled(k, n, key):
    """Which of n rows comes k-th in the order named `key`: a bijection of 0..n-1, without a list of n numbers."""
    # A Feistel network: of the two halves of k's bits, add (xor) a hash of one to the other and swap, eight times. Each
    # round can be undone, so no two numbers collide. A result beyond n goes through again until one lands below n.
    # Eight rounds: with four, one of six rows came 6 standard errors too often at one place, in 2000 epochs.
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    while True:
        left, right = k >> half, k & (1 << half) - 1
        for turn in range(8):
            digest = hashlib.blake2b(f"{key} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(digest) & (1 << half) - 1
        k = left << half | right
        if k < n:
            return k


class Shards:
    """Packed shards as a stream of batches. folder: what `pack` wrote, or a folder of several such folders. drop, t_limit,
    T: as in data.Documents; text_only: never a row of pairs (the Llama baseline). Opening reads headers only; arrays are memory-mapped when a row of theirs is wanted."""

    def __init__(self, folder, drop=data.Documents.drop, t_limit=data.Documents.t_limit, T=data.Documents.T, text_only=False):
        self.folder, self.rules, self.settings, self.text_only = Path(folder), dict(drop=drop, t_limit=t_limit, T=T), {}, text_only
        found = sorted([*self.folder.glob("index.json"), *self.folder.glob("*/index.json")])
        if not found:
            raise UserError(f"{folder} has no index.json: it holds no shards, or their packing has not finished; run "
                            f"`python data.py pack ... --out {folder}` (again)")
        headers = {"text": {}, "pairs": {}}
        for index in found:
            for name in self.parse(index):
                header = read_header(index.parent / name, self.settings)
                self.settings |= header["settings"]
                headers[header["kind"]][index.parent / name] = header
        beside = lambda names: next((p for index in found for name in names for p in index.parent.glob(name)), None)
        self.vae_path, tokenizer = beside(["vae.pt"]), beside(["tokenizer.model", "tokenizer.json"])
        self.tokenizer = load_tokenizer(tokenizer) if tokenizer else data.Words([])
        if fingerprint(self.tokenizer) != self.settings["tokenizer"]:
            raise UserError(f"the shards of {folder} were packed with another tokenizer ({self.settings['tokenizer']}) than "
                            f"the one beside them ({tokenizer and fingerprint(self.tokenizer)}): put theirs there")
        self.patches, self.codes = self.settings.get("patches", 0), self.settings.get("codes", 0)
        self.paths = {kind: list(headers[kind]) for kind in headers}
        self.begins = {kind: np.cumsum([0] + [h["rows"] for h in headers[kind].values()]) for kind in headers}
        total = lambda kind, name: sum(h[name] for h in headers[kind].values())
        self.pictures = total("pairs", "pictures")
        # The last rows of pairs are never trained on: the conditioning gap is measured there.
        self.held = min(16, total("pairs", "rows") // 10)
        self.rows = {"text": total("text", "rows"), "pairs": total("pairs", "rows") - self.held}
        # Paper §4.1: text tokens and patches 1 : 1. A row of pairs has `gap` patches more than text tokens; text alone
        # evens it out. Its share s solves  s * text = (1 - s) * gap  and is kept in units of 2^-32: floor(g s) is exact.
        text = total("text", "positions") / max(1, self.rows["text"])
        gap = (2 * self.patches * self.pictures - total("pairs", "positions")) / max(1, total("pairs", "rows"))
        share = 1.0 if text_only or not self.rows["pairs"] else 0.0 if not self.rows["text"] else max(0.0, gap) / (max(0.0, gap) + text)
        self.share = round(share * 2 ** 32)
        self.arrays = functools.lru_cache(maxsize=256)(self.arrays)

    @staticmethod
    def parse(index):
        """The names of the shards that an index.json lists."""
        try:
            return json.loads(index.read_text())["shards"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{index} is broken: run the packing command again, which writes it anew") from None

    def arrays(self, path):
        """The memory-mapped arrays of a shard; nothing is read yet."""
        return {file.stem: np.load(file, mmap_mode="r") for file in path.glob("*.npy")}

    def stored(self, kind, k):
        """(documents, latents or codes) of row k of all rows of a kind, as they lie on disk. Raises UserError, naming the shard, if
        what lies there is not what was written."""
        shard = int(np.searchsorted(self.begins[kind], k, side="right")) - 1
        path, r = self.paths[kind][shard], k - int(self.begins[kind][shard])
        try:
            arrays = self.arrays(path)
            documents, latents, crc = cut_row(arrays, r)
            assert crc == arrays["sums"][r]
            latents = latents.astype(np.int64) if self.codes and latents is not None else latents
        except (AssertionError, IndexError, KeyError, ValueError, OSError):
            raise UserError(f"the shard {path} is broken (row {r} is not what was written): delete it and run the packing "
                            f"command again, which packs it anew") from None
        return documents, latents

    def row(self, seed, g):
        """(documents as `lay_out` takes them, latents or None) of row g of the endless stream."""
        before, after = g * self.share >> 32, (g + 1) * self.share >> 32
        kind, j = ("text", before) if after > before else ("pairs", g - before)
        epoch, k = divmod(j, self.rows[kind])
        documents, latents = self.stored(kind, shuffled(k, self.rows[kind], f"{seed} {kind} {epoch}"))
        if kind == "text":
            return documents, None
        # TRAP: numpy takes [seed, g] and [seed, g, 0] for the same seed; the last number keeps this stream from train.py's
        rng, laid, begin = np.random.default_rng([seed, g, 0, 1]), [], 0
        for texts in documents:
            caption_first = rng.random() < data.Documents.caption_first
            laid.append([part for k, text in enumerate(texts, begin)
                         for part in data.one_pair(text, k, caption_first, rng, **self.rules)])
            begin += len(texts)
        return laid, latents

    def batch(self, seed, step, micro, rows, micros=1, see=lambda document, pictures: document):
        """data.Batch of B = rows rows, with the latents' means, a pure function of the arguments. micros: how many
        micro-batches a step has in all, over all ranks; micro: which of them this is. see: what a model reads in place of a
        document, given the row's latents or codes (chameleon.seen_by): this file need not know the rivals."""
        drawn = [self.row(seed, (step * micros + micro) * rows + b) for b in range(rows)]
        batch = data.to_batch([[data.lay_out(see(document, latents), self.tokenizer, self.patches) for document in documents]
                               for documents, latents in drawn], self.settings["seq_len"])
        batch.images = torch.arange(len(batch.images))  # the pictures lie in the order in which they are read
        none = np.zeros((0, *self.settings.get("latent", (0, 0, 0))), np.float16)
        batch.latents = torch.from_numpy(np.concatenate([none] + [l for _, l in drawn if l is not None and not self.codes])).float()
        return batch

    def held_out(self, most):
        """(captions as lists of ids, latents or codes) of up to `most` pairs that `batch` never gives."""
        rows = [self.stored("pairs", self.rows["pairs"] + k) for k in range(self.held)]
        captions = [text for documents, _ in rows for texts in documents for text in texts]
        pictures = torch.from_numpy(np.concatenate([latents for _, latents in rows])[:most])
        return captions[:most], pictures if self.codes else pictures.float()

    def must_have(self, **wanted):
        """Raise UserError if the rows were packed with other numbers than these, or if there are no pictures in them."""
        for name, value in wanted.items():
            if self.settings.get(name, value) != value:
                option = "--" + name.replace("_", "-")
                raise UserError(f"the shards of {self.folder} were packed with {option} {self.settings[name]}, but here it is "
                                f"{value}: give {option} {self.settings[name]}, or pack them again")
        if self.text_only and self.rows["pairs"]:       # no gap will be measured
            if not self.rows["text"]:
                raise UserError(f"{self.folder} has no text, and a Llama reads nothing else: pack some with --text")
        elif not self.held:
            raise UserError(f"{self.folder} has {self.rows['pairs']} rows of pairs; training needs at least ten, to keep a "
                            f"tenth (16 at most) for the conditioning gap; a Llama, to be compared with a Transfusion on the same "
                            f"folder: pack more with --pairs")

    def must_be_of(self, path, words, vae, mine):
        """Raise UserError if the words or the VAE of a checkpoint, read from `path`, are not those of the shards. mine: the
        VAE of the shards."""
        rounded = lambda v: [x.half() if x.is_floating_point() else x for x in v.state_dict().values()]
        same = mine.config == vae.config and all(map(torch.equal, rounded(mine), rounded(vae)))      # model.pt keeps 16 bits
        for what, fits in (("tokenizer", fingerprint(words) == self.settings["tokenizer"]), ("VAE", same)):
            if not fits:
                raise UserError(f"{path} has learned with another {what} than that of the shards of {self.folder}: pack them "
                                f"again with its own, or train anew without --init")

    def vae(self, path=""):
        """The VAE of the latents, from beside the shards or from the path of one that must be the same."""
        path = path or self.vae_path or self.folder / "vae.pt"
        vae = checkpoint.load_vae(path, checkpoint.ANY_VAE)
        if fingerprint(vae) != self.settings["vae"]:
            raise UserError(f"the latents of {self.folder} were made by another VAE ({self.settings['vae']}) than {path} "
                            f"({fingerprint(vae)}): leave out --vae, or pack again with it")
        return vae


def check(folder):
    """Read every row of a folder of shards against its checksum."""
    shards = Shards(folder)
    for kind in shards.paths:
        for k in tqdm(range(int(shards.begins[kind][-1])), desc=f"checking {kind}"):
            shards.stored(kind, k)
    print(f"{folder}: {shards.begins['text'][-1]:,} rows of text and {shards.begins['pairs'][-1]:,} of pairs are what was "
          f"written; text takes {shards.share / 2 ** 32:.1%} of the rows when read, so that text tokens : patches = 1 : 1")


def demo():
    """The order of ten rows, epoch by epoch."""
    print("the order of 10 rows:")
    for epoch in range(3):
        print(f"  epoch {epoch}: {[shuffled(k, 10, f'0 pairs {epoch}') for k in range(10)]}")


if __name__ == "__main__":
    run_command(lambda argv: check(argv[0]) if argv else demo(), sys.argv[1:])
