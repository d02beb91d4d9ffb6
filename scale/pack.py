"""
pack.py: text and pictures to shards                                  (Transfusion §4.1 "Data"; shards.py has the format)

THE IDEA    `python data.py pack` reads its sources as streams, one item at a time: tokens by the tokenizer, latents by the
            VAE, 64 pictures at once. When the documents of a shard are enough they are packed first-fit into rows and
            written as a folder that appears whole or not at all. No more than one shard is ever held in memory.
A PICTURE   a.jsonl | b.txt | folder | c.tar --> items --> Filling --first_fit--> pairs-000007.tmp --rename--> pairs-000007
                                                   ^                                                               |
                                                   +---- "next": [source 2, item 41830], where shard 8 begins -----+
THE RULE    shard k is a function of the sources, the options, k and the place where shard k - 1 ended. So the same command
            goes on where a killed one stopped, and packs a missing or broken shard anew, to the same bytes.
PAPER/HERE  same: 4096 positions, centre-cropped 256x256, the Llama 2 tokenizer (any SentencePiece .model, by its path).
            our choice: text longer than a row is cut; each piece has its own BOS and EOS. Captions are never cut: a pair
            that does not fit is skipped and counted, as are bad pictures and bad lines.
            our choice: after a pair, another follows in the same document with probability 0.1.
            Many machines pack at once by packing different sources, each into its own folder inside one: shards.py reads
            packed/*/ together, if tokenizer, VAE and sizes are the same. One command runs on one GPU.
READ NEXT   shards.py        TEST  tests/test_shards.py        TRY IT
            python data.py pack --text scenes --pairs scenes --vae assets/scenes_vae.pt --seq-len 128 --image-size 32
            python train.py --data shards --data-dir packed --seq-len 128 --documents 8 --steps 200
"""
import argparse
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import vae as vae_module
from data import Pieces
from scale.shards import cut_row, fingerprint, read_header
from scale.streams import collect_words, find_sources, items_of
from sources import scenes
from support import checkpoint
from support.checkpoint import load_tokenizer
from support.common import pick_device, UserError, run_command


# ---------------------------------------------------------------------------------------------------------------- packing
class Filling:
    """A shard under construction: documents in the order of the source."""

    def __init__(self, kind, number, T, patches, vae, another):
        self.kind, self.T, self.patches, self.vae, self.another = kind, T, patches, vae, another
        self.rng = np.random.default_rng(number)        # of the shard's number: repacking it gives the same bytes
        self.documents, self.lengths, self.parts = [], [], []            # lists of part numbers; positions; arrays of ids
        self.pixels, self.latents, self.square = [], [], 0.0             # square: sum of the squared deviations of q(z | x)
        self.positions, self.follows = 0, False

    def add(self, ids, pixels=None):
        """Append a text, in as many documents as it takes, or a caption and its picture. Raises UserError, and changes
        nothing, if they cannot share a row."""
        if self.kind == "text":
            for k in range(0, len(ids), self.T - 2):
                self.put(ids[k: k + self.T - 2], 2 + len(ids[k: k + self.T - 2]), new=True)          # BOS and EOS
            return
        length = len(ids) + 2 + self.patches            # BOI and EOI
        if length + 2 > self.T:
            raise UserError(f"a caption of {len(ids)} tokens and {self.patches} patches do not fit in {self.T} positions")
        new = not self.follows or self.lengths[-1] + length > self.T
        self.put(ids, length + 2 * new, new)
        self.follows = self.rng.random() < self.another # our choice: some documents tell of several pictures
        self.pixels.append(pixels)
        if len(self.pixels) == 64:
            self.encode()

    def put(self, ids, length, new):
        """One more part, of `length` positions, in a new document or in the last one."""
        if new:
            self.documents.append([])
            self.lengths.append(0)
        self.documents[-1].append(len(self.parts))
        self.parts.append(np.array(ids, np.uint16))
        self.lengths[-1] += length
        self.positions += length

    @torch.no_grad()
    def encode(self):
        """Pixels to latents, or to codes, so that no more than 64 pictures are ever held."""
        if self.pixels:
            x = vae_module.to_float(np.stack(self.pixels)).to(next(self.vae.parameters()).device)
            if self.vae.quantiser:                      # a Chameleon's
                self.latents.append(self.vae.encode_codes(x).cpu().numpy().astype(np.uint16))
            else:
                mean, deviation = self.vae.encode(x)
                self.latents.append(mean.half().cpu().numpy())
                self.square += float(deviation.square().mean((1, 2, 3)).sum())
            self.pixels = []

    def write(self, path, header):
        """The shard as a folder that appears whole or not at all. header: the dict of what is known beside the counts."""
        self.encode()
        rows = data.first_fit(self.lengths, self.T)
        documents = [self.documents[d] for row in rows for d in row]
        order = [p for document in documents for p in document]
        begin = lambda lengths: np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        arrays = {"words": np.concatenate([self.parts[p] for p in order]), "rows": begin([len(row) for row in rows]),
                  "documents": begin([len(d) for d in documents]), "parts": begin([len(self.parts[p]) for p in order])}
        if self.kind == "pairs":
            arrays["latents"] = np.concatenate(self.latents)[order]
        arrays["sums"] = np.array([cut_row(arrays, r)[2] for r in range(len(rows))], np.uint32)
        building = path.with_suffix(".tmp")
        shutil.rmtree(building, ignore_errors=True)     # left by a packing that was killed
        building.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(building / f"{name}.npy", array)
        sizes = {f"{name}.npy": (building / f"{name}.npy").stat().st_size for name in arrays}
        counts = {"rows": len(rows), "documents": len(documents), "words": len(arrays["words"]), "positions": self.positions,
                  "pictures": sum(map(len, self.latents)), "deviation_squared": self.square}
        (building / "header.json").write_text(json.dumps({**header, **counts, "bytes": sizes}, indent=1))
        shutil.rmtree(path, ignore_errors=True)         # a broken one of that name
        os.replace(building, path)


def packed_before(path, recipe):
    """The header of a shard that is there and whole, else None. Raises UserError if it comes of another recipe."""
    try:
        header = read_header(path)
    except UserError:
        return None                                     # it will be packed anew
    sources = dict(list(recipe["sources"].items())[: len(header["recipe"]["sources"])])              # later ones may be new
    other = [k for k, v in header["recipe"].items() if v != ({**recipe, "sources": sources}).get(k)]
    if other:
        raise UserError(f"{path} was packed with another {' and '.join(other)} ({header['recipe'][other[0]]}, now "
                        f"{recipe.get(other[0])}): give the same options to go on, or name another --out")
    return header


def fill(shard, stream, full, encode, bar):
    """Fill a shard from the stream until it has `full` positions. Returns (position after the last item, or None at the
    end of the stream; number of items skipped; what was wrong with the first five)."""
    position, skipped, problems = None, 0, []
    for position, upto, read in stream:
        bar.update(upto - bar.n)
        try:
            text, pixels = read()
            ids = encode(text)
            if ids:
                shard.add(ids, pixels and pixels())
            elif pixels:
                raise UserError(f"item {position[1]} of source {position[0] + 1} has an empty caption")
        except UserError as problem:
            skipped, problems = skipped + 1, (problems + [str(problem)])[:5]
        if shard.positions >= full:
            break
    return position, skipped, problems


def pack_kind(kind, sources, words, vae, settings, out, args):
    """Pack all text, or all pairs; returns the headers of the shards. Each begins where the one before it ended, at
    [source number, items read of it]; what is there and whole is passed over, what is missing or broken packed anew."""
    names, begins = list(sources), list(itertools.accumulate(sources.values(), initial=0))
    recipe = {**settings, "sources": sources, "shard_rows": args.shard_rows, "another": args.another, "world": args.world}

    def items(source, item):
        for k, name in enumerate(names[source:], source):
            skip = item if k == source else 0
            for n, (upto, read) in enumerate(itertools.islice(items_of(kind, name, args), skip, None), skip + 1):
                yield (k, n), begins[k] + upto, read

    headers, position, stream = [], (0, 0), None
    with tqdm(total=begins[-1], unit="B", unit_scale=True, desc=f"packing {kind}") as bar:
        while True:
            path = out / f"{kind}-{len(headers):06d}"
            if header := packed_before(path, recipe):
                headers, position, stream = headers + [header], header["next"], None
                continue
            stream = stream or items(*position)
            shard = Filling(kind, len(headers), args.seq_len, settings.get("patches"), vae, args.another)
            position, skipped, problems = fill(shard, stream, args.shard_rows * args.seq_len, words.encode, bar)
            told = {"skipped": skipped, "problems": problems}
            if not shard.documents:                     # the end, or nothing but bad items up to it
                break
            shard.write(path, {"settings": settings, "kind": kind, "next": position, **told,
                               "recipe": {**recipe, "sources": {k: sources[k] for k in names[: position[0] + 1]}}})
            headers.append(read_header(path))
            bar.set_postfix(shards=len(headers), skipped=sum(h["skipped"] for h in headers))
        bar.update(bar.total - bar.n)
    if not headers:
        raise UserError(f"--{kind}: nothing in {', '.join(names[:3])} can be used" +
                        (f"; the first of {skipped} problems: {problems[0]}" if problems else ", it is empty"))
    headers[-1] |= {"skipped": headers[-1]["skipped"] + skipped, "problems": headers[-1]["problems"] + problems}
    return headers


def keep(path, content, thing, what):
    """Put the tokenizer or the VAE beside its shards. Raises UserError if another one is there already."""
    if path.exists():
        there = load_tokenizer(path) if what == "tokenizer" else checkpoint.load_vae(path, checkpoint.ANY_VAE)
        if fingerprint(there) != fingerprint(thing):
            raise UserError(f"{path.parent} was packed with another {what} ({fingerprint(there)}, this one is "
                            f"{fingerprint(thing)}): name another --out")
    else:
        write_whole(path, content)


def write_whole(path, content):
    """Write bytes so that the path holds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_bytes(content)
    os.replace(path.with_suffix(".tmp"), path)


# ------------------------------------------------------------------------------------------------------------ command line
def parse_arguments(argv):
    """The options, each checked by itself."""
    parser = argparse.ArgumentParser(prog="data.py pack", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Pack text and captioned pictures into shards. The same command goes on "
                                                 "where a killed one stopped, and packs missing or broken shards anew.")
    add = parser.add_argument
    add("--text", action="append", default=[], help='.txt, or .jsonl with {"text": ...}, a document per line; a folder of '
                                                    'them; or the word scenes (may be repeated)')
    add("--pairs", action="append", default=[], help="folder of pictures with captions.jsonl; .tar in webdataset's layout; "
                                                     "a folder of them; or the word scenes (may be repeated)")
    add("--tokenizer", default="words", help="a SentencePiece .model; a tokenizer.json; or the word words: whole words, "
                                             "collected from the sources")
    add("--vae", default="", help="the vae.pt that makes the latents (pairs); a VQ-VAE's makes codes, for a Chameleon")
    add("--seq-len", type=int, default=4096, help="T, positions per row (the paper: 4096)")
    add("--patch", type=int, default=2, help="side of a patch, in latent pixels")
    add("--image-size", type=int, default=256, help="pixels per side, after centre-cropping")
    add("--shard-rows", type=int, default=1024, help="rows per shard, about; they are held in memory while it is packed")
    add("--another", type=float, default=0.1, help="after a pair, the chance of one more in the same document")
    add("--scenes", type=int, default=5000, help="how many texts, and how many pairs, the word scenes stands for")
    add("--world", choices=tuple(scenes.WORLDS), default="one", help="which captions of scenes")
    add("--out", default="packed", help="folder for the shards")
    args = parser.parse_args(argv)
    for name, least in (("seq_len", 3), ("patch", 1), ("image_size", 1), ("shard_rows", 1), ("scenes", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if not 0 <= args.another < 1:
        raise UserError(f"--another must be at least 0 and below 1, got {args.another}")
    if not args.text + args.pairs:
        raise UserError("say what to pack: --text a.jsonl, --pairs folder, or --text scenes --pairs scenes")
    if args.pairs and not args.vae:
        raise UserError("--pairs needs --vae: the vae.pt that turns pictures into latents (`python train_vae.py` trains one)")
    if args.tokenizer != "words" and Path(args.tokenizer).suffix not in (".json", ".model"):
        raise UserError(f"--tokenizer {args.tokenizer} is neither a .model, nor a .json, nor the word words")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"{args.out} is a file: name another folder with --out")
    return args


def picture_settings(vae, args):
    """What the header of pairs says beside the rest. Raises UserError if the numbers do not go together."""
    c, f, side, codes = vae.config.image_channels, vae.f, args.image_size // vae.f, vae.config.codes
    patch = 1 if codes else args.patch                  # a code for every place
    if codes > 2 ** 16:
        raise UserError(f"{codes:,} codes do not fit in 16 bits: train a VQ-VAE of fewer")
    if c != 3 or args.image_size % f or side % patch:
        raise UserError(f"this VAE takes pictures of {c} channels and makes them {f} times smaller: they must have 3, and "
                        f"--image-size {args.image_size} must be divisible by {f} x --patch {patch}")
    patches = (side // patch) ** 2
    if patches + 5 > args.seq_len:
        raise UserError(f"a picture takes {patches} patches; with four special tokens and a caption they do not fit in "
                        f"--seq-len {args.seq_len}: raise it{'' if codes else ', or raise --patch'}")
    return {"patch": patch, "image_size": args.image_size, "patches": patches,
            "latent": [vae.config.z, side, side], "vae": fingerprint(vae)} | ({"codes": codes} if codes else {})


def add_up(headers, T):
    """The totals of all shards."""
    total = {name: sum(h[name] for h in headers) for name in ("rows", "documents", "positions", "pictures", "skipped")}
    total["patches"] = sum(h["pictures"] * h["settings"].get("patches", 0) for h in headers)
    total["text_tokens"] = total["positions"] - total["patches"]
    total["bytes"] = sum(sum(h["bytes"].values()) for h in headers)
    total["deviation"] = (sum(h["deviation_squared"] for h in headers) / max(1, total["pictures"])) ** 0.5
    return total | {"shards": len(headers), "filled": total["positions"] / (total["rows"] * T)}


def main(argv=None):
    """Pack as the command line says; returns the totals."""
    args = parse_arguments(argv)
    out, sources = Path(args.out), {kind: find_sources(kind, getattr(args, kind), args.scenes) for kind in ("text", "pairs")}
    vae = checkpoint.load_vae(args.vae, checkpoint.ANY_VAE) if args.pairs else None
    pictures = picture_settings(vae, args) if vae else {}
    before = out / "tokenizer.json"
    words = (load_tokenizer(Path(args.tokenizer)) if args.tokenizer != "words" else
             load_tokenizer(before) if before.exists() else collect_words(sources, args))
    if len(words) > 2 ** 16:
        raise UserError(f"{len(words):,} tokens do not fit in 16 bits: give a SentencePiece model with --tokenizer")
    if isinstance(words, Pieces):
        keep(out / "tokenizer.model", words.model, words, "tokenizer")
    else:
        keep(before, json.dumps(words.vocabulary).encode(), words, "tokenizer")
    if vae:
        keep(out / "vae.pt", Path(args.vae).read_bytes(), vae, "VAE")
        vae.to(pick_device())
    settings, headers = {"version": 1, "seq_len": args.seq_len, "tokenizer": fingerprint(words)}, []
    for kind, found in sources.items():
        if found:
            headers += pack_kind(kind, found, words, vae, settings | (pictures if kind == "pairs" else {}), out, args)
    total = add_up(headers, args.seq_len)
    names = [f"{kind}-{k:06d}" for kind in sources for k in range(sum(h["kind"] == kind for h in headers))]
    write_whole(out / "index.json", json.dumps({"shards": names, "totals": total}, indent=1).encode())
    print(f"{out}: {total['shards']} shards, {total['rows']:,} rows of {args.seq_len} ({total['filled']:.1%} full), "
          f"{total['documents']:,} documents, {total['text_tokens']:,} text tokens, {total['patches']:,} patches of "
          f"{total['pictures']:,} pictures, {total['bytes'] / 1e9:.3f} GB")
    if vae and not vae.quantiser:
        print(f"the latents' means are stored; left out is the deviation of q(z | x), {total['deviation']:.4f} of a latent's own")
    if total["skipped"]:
        print(f"skipped {total['skipped']:,}: " + "; ".join(list(itertools.chain(*(h["problems"] for h in headers)))[:5]))
    return total


if __name__ == "__main__":
    run_command(main)
