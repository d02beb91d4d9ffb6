"""
pack.py: text and pictures to shards             (Transfusion §4.1 "Data"; the format: shards.py)

THE IDEA    `python -m scale.pack` reads its sources as streams, one item at a time: the tokenizer
            makes ids of the text, the VAE makes latents of 64 pictures at once. When a shard has
            enough documents, they are packed first-fit into rows and written as a folder that
            appears whole or not at all. No more than one shard is ever in memory.
A PICTURE   a.jsonl | b.txt | folder | c.tar --> items --> ShardWriter --first_fit--> rows
                                                   ^                                    |
                                                   |         pairs-000007.tmp <---------+
                                                   |                |
                                                   |              rename --> pairs-000007
                                                   |                               |
                          where shard 8 begins --- "next": [source 2, item 41830] -+
THE RULE    Shard k is a function of the sources, the options, k, and the place where shard k - 1
            ended. So the same command goes on where a killed one stopped. It packs a missing or
            broken shard anew, to the same bytes.
PAPER/HERE  same: rows of 4096, pictures centre-cropped to 256x256, the Llama 2 tokenizer (any
            SentencePiece .model, by its path).
            our choice: text longer than a row is cut, and each piece has its own BOS and EOS.
            Captions are never cut: a pair that does not fit is skipped and counted, as are bad
            pictures and bad lines.
            our choice: after a pair, another follows in the same document with probability 0.1.
            Many machines pack at once by packing different sources, each into its own folder inside
            one. shards.py reads packed/*/ together, if tokenizer, VAE and sizes are the same, and
            mixture.py reads some of these folders more often. One command runs on one GPU.
READ NEXT   shards.py       TEST  tests/test_pack.py, tests/test_pieces.py
TRY IT      python -m scale.pack --text scenes --pairs scenes --vae assets/scenes_vae.pt
                   --seq-len 128 --image-size 32
            python train.py --data shards --data-dir packed --seq-len 128 --steps 200
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
from scale.shards import KINDS, cut_row, fingerprint, make_index, read_header
from scale.streams import collect_words, find_sources, items_of, stamp_of
from sources import scenes
from support import checkpoint
from support.common import (
    Parser,
    UserError,
    full_disk_named,
    pick_device,
    run_command,
    whole_file,
    write_json,
)

LARGEST = 2 ** 16                           # ids and codes are stored in 16 bits
AT_ONCE = 64                                # pictures that the VAE reads together


# ---------------------------------------------------------------------------------------- one shard
class ShardWriter:
    """A shard under construction: documents, in the order of the source.

    kind        "text" or "pairs"
    number      of the shard. It seeds the random numbers, so that packing again gives the same
                bytes
    T           positions per row
    patches     P, positions per picture
    vae         what makes latents, or codes, of pixels
    another     the chance that a pair is followed by another in the same document"""

    def __init__(self, kind, number, T, patches, vae, another):
        self.kind = kind
        self.T = T
        self.patches = patches
        self.vae = vae
        self.another = another
        self.rng = np.random.default_rng(number)

        # Texts and captions, in the order of the source. Rows are made when all are known.
        self.parts = []                     # ids of each text or caption
        self.documents = []                 # numbers of the parts of each document
        self.lengths = []                   # of each document, in positions
        self.positions = 0                  # of all documents
        self.continues = False              # whether the next pair joins the last document

        # Pictures, in the same order as the parts.
        self.pixels = []                    # of pictures that wait for the VAE
        self.latents = []                   # of all others
        self.deviation_squared = 0.0        # of q(z | x), summed over pictures

    def add(self, ids, pixels=None):
        """Add a text, or a caption and its picture. Raises UserError, and changes nothing, if the
        two do not fit in a row."""
        if self.kind == "text":
            self.add_text(ids)
        else:
            self.add_pair(ids, pixels)

    def add_text(self, ids):
        """Add a text, in as many documents as it takes."""
        room = self.T - 2                   # BOS and EOS
        for k in range(0, len(ids), room):
            piece = ids[k: k + room]
            self.add_part(piece, len(piece) + 2, new=True)

    def add_pair(self, ids, pixels):
        """Add a caption and its picture, in a new document or in the last one."""
        length = len(ids) + self.patches + 2                # BOI and EOI
        if length + 2 > self.T:                             # BOS and EOS
            raise UserError(f"a caption of {len(ids)} tokens and {self.patches} patches do not fit "
                            f"in {self.T} positions")
        if self.continues and self.lengths[-1] + length <= self.T:
            self.add_part(ids, length, new=False)
        else:
            self.add_part(ids, length + 2, new=True)
        # Our choice: some documents tell of several pictures.
        self.continues = self.rng.random() < self.another
        self.pixels.append(pixels)
        if len(self.pixels) == AT_ONCE:
            self.encode()

    def add_part(self, ids, length, new):
        """Add ids that take `length` positions, to a new document or to the last one."""
        if new:
            self.documents.append([])
            self.lengths.append(0)
        self.documents[-1].append(len(self.parts))
        self.parts.append(np.array(ids, np.uint16))
        self.lengths[-1] += length
        self.positions += length

    @torch.no_grad()
    def encode(self):
        """Turn the pixels that wait into latents, or into codes: only a few are ever in memory."""
        if not self.pixels:
            return
        device = next(self.vae.parameters()).device
        x = vae_module.to_float(np.stack(self.pixels)).to(device)
        self.pixels = []
        if self.vae.quantiser:              # a Chameleon's
            self.latents.append(self.vae.encode_codes(x).cpu().numpy().astype(np.uint16))
            return
        mean, deviation = self.vae.encode(x)
        self.latents.append(mean.half().cpu().numpy())
        self.deviation_squared += float(deviation.square().mean((1, 2, 3)).sum())

    def arrange(self):
        """{name: array} of the shard, as shards.py describes them: documents packed into rows, and
        everything in the order in which it is read."""
        rows = data.first_fit(self.lengths, self.T)
        documents = [self.documents[d] for d in itertools.chain(*rows)]
        order = list(itertools.chain(*documents))           # of the parts
        parts = [self.parts[p] for p in order]
        arrays = {"words": np.concatenate(parts), "rows": bounds(rows),
                  "documents": bounds(documents), "parts": bounds(parts)}
        if self.kind == "pairs":
            arrays["latents"] = np.concatenate(self.latents)[order]
        sums = []
        for r in range(len(rows)):
            _, _, crc = cut_row(arrays, r)
            sums.append(crc)
        arrays["sums"] = np.array(sums, np.uint32)
        return arrays

    def write(self, path, header):
        """Write the shard as a folder that appears whole or not at all. header: a dict of what is
        known beside the counts. Raises UserError if a latent does not fit in 16 bits, or the disk
        is full."""
        self.encode()
        arrays = self.arrange()
        if self.kind == "pairs" and not np.isfinite(arrays["latents"]).all():
            raise UserError(f"{path} was not written: the VAE makes latents that float16 cannot "
                            f"hold, beyond {np.finfo(np.float16).max:,.0f}; its training went "
                            f"wrong, or its scale: pack with another --vae")
        # A rename is all or nothing. So whoever finds the folder finds all of it.
        building = path.with_suffix(".tmp")
        shutil.rmtree(building, ignore_errors=True)         # left by a packing that was killed
        try:
            with full_disk_named(path):
                self.fill(building, arrays, header)
            shutil.rmtree(path, ignore_errors=True)         # a broken one of that name
            os.replace(building, path)
        finally:
            shutil.rmtree(building, ignore_errors=True)     # it would keep a full disk full

    def fill(self, folder, arrays, header):
        """Write a new folder with all that belongs to the shard. arrays: see `arrange`; header: see
        `write`."""
        folder.mkdir(parents=True)
        sizes = {}
        for name, array in arrays.items():
            file = folder / f"{name}.npy"
            np.save(file, array)
            sizes[file.name] = file.stat().st_size
        counts = {
            "rows": len(arrays["sums"]),
            "documents": len(self.documents),
            "words": len(arrays["words"]),
            "positions": self.positions,
            "pictures": sum(len(latents) for latents in self.latents),
            "deviation_squared": self.deviation_squared,
        }
        content = json.dumps({**header, **counts, "bytes": sizes}, indent=1)
        (folder / "header.json").write_text(content, encoding="utf-8")


def bounds(lists):
    """Where each list begins when they stand one after another, and where the last one ends."""
    lengths = [len(items) for items in lists]
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def read_items(stream, writer, full, encode, bar):
    """Read items into a ShardWriter until it has `full` positions.

    Returns (position after the last item, or None at the end of the stream; number of items
    skipped; what was wrong with the first five)."""
    position = None
    skipped = 0
    problems = []
    for position, so_far, read in stream:
        bar.update(so_far - bar.n)
        # A bad item among millions is counted and named. It does not end the packing.
        try:
            text, pixels = read()
            ids = encode(text)
            if ids:
                writer.add(ids, pixels() if pixels else None)
            elif pixels:
                source, item = position
                raise UserError(f"item {item} of source {source + 1} has an empty caption")
        except UserError as problem:
            skipped += 1
            if len(problems) < 5:
                problems.append(str(problem))
        if writer.positions >= full:
            break
    return position, skipped, problems


# --------------------------------------------------------------------------------------- all shards
def pack_kind(kind, sources, tokenizer, vae, settings, args):
    """Pack all text, or all pairs. Returns the headers of the shards.

    Each shard begins where the one before it ended, at [number of a source, items read of it]. A
    shard that is there and whole is passed over. One that is missing or broken is packed anew."""
    stamps = {name: stamp_of(name, size) for name, size in sources.items()}
    recipe = {**settings, "sources": stamps, "shard_rows": args.shard_rows,
              "another": args.another, "world": args.world}
    headers = []
    position = (0, 0)
    stream = None                           # opened when a shard is missing
    in_all = sum(sources.values())
    unit = " documents" if set(sources) == {"scenes"} else "B"             # what the sizes count
    with tqdm(total=in_all, unit=unit, unit_scale=True, desc=f"packing {kind}") as bar:
        while True:
            # 1. This shard may be there.
            path = Path(args.out) / f"{kind}-{len(headers):06d}"
            header = read_finished(path, recipe)
            if header:
                headers.append(header)
                position = header["next"]
                stream = None
                continue

            # 2. Otherwise read until it is full, or until the sources end.
            if stream is None:
                stream = items_from(position, kind, sources, args)
            writer = ShardWriter(kind, len(headers), args.seq_len, settings.get("patches"), vae,
                                 args.another)
            position, skipped, problems = read_items(
                stream, writer, args.shard_rows * args.seq_len, tokenizer.encode, bar)
            if not writer.documents:        # the end, or nothing but bad items up to it
                break

            # 3. Write it, with the recipe as far as it was used: more sources may follow later.
            used = dict(list(stamps.items())[: position[0] + 1])
            writer.write(path, {
                "settings": settings, "kind": kind, "next": position, "skipped": skipped,
                "problems": problems, "recipe": {**recipe, "sources": used}})
            headers.append(read_header(path))
            skipped_so_far = sum(header["skipped"] for header in headers)
            bar.set_postfix(shards=len(headers), skipped=skipped_so_far)
        bar.update(bar.total - bar.n)

    if not headers:
        names = ", ".join(list(sources)[:3])
        why = f"; the first of {skipped} problems: {problems[0]}" if problems else ", it is empty"
        raise UserError(f"--{kind}: nothing in {names} can be used{why}")
    # What was skipped after the last shard belongs to no shard. It is counted with the last.
    headers[-1]["skipped"] += skipped
    headers[-1]["problems"] += problems
    return headers


def items_from(position, kind, sources, args):
    """The items of all sources, from a position on. Yields ((number of the source, items read from
    it), size read from all sources, read)."""
    first_source, first_item = position
    begin = 0                               # of this source, in the size of all
    for k, (name, size) in enumerate(sources.items()):
        if k >= first_source:
            skip = first_item if k == first_source else 0
            items = itertools.islice(items_of(kind, name, args), skip, None)
            for n, (so_far, read) in enumerate(items, skip + 1):
                yield (k, n), begin + so_far, read
        begin += size


def read_finished(path, recipe):
    """The header of a shard that is there and whole, else None. Raises UserError if it was packed
    by another recipe."""
    try:
        header = read_header(path)
    except UserError:
        return None                         # it will be packed anew
    own = header["recipe"]
    different = [name for name in own if name != "sources" and recipe.get(name) != own[name]]
    if different:
        first = different[0]
        raise UserError(f"{path} was packed with another {' and '.join(different)} ({own[first]}, "
                        f"now {recipe.get(first)}): give the same options to go on, or name "
                        f"another --out")
    check_sources(path, own["sources"], recipe["sources"])
    return header


def check_sources(path, before, now):
    """Raise UserError if a shard was packed from other sources than those of the command line, or
    from the same files before they were changed. before, now: {name: streams.stamp_of it}."""
    # Sources that follow those of this shard may be new. The same file may have another name now.
    given = list(now.items())[: len(before)]
    for k, (name, stamp) in enumerate(before.items()):
        if isinstance(stamp, int):                      # an older shard remembers the size alone
            stamp = [stamp, given[k][1][1]] if k < len(given) else None
        if k == len(given) or given[k][1] != stamp:
            name_now = given[k][0] if k < len(given) else "none"
            change = f"{name} has changed since" if name == name_now else f"{name}, now {name_now}"
            raise UserError(f"{path} was packed from other sources ({change}): put them back and "
                            f"give them in the same order to go on, or name another --out")


# -------------------------------------------------------------------------------- beside the shards
def choose_tokenizer(args, sources):
    """The tokenizer that the command line asks for. Raises UserError if its ids do not fit in 16
    bits."""
    collected = Path(args.out) / "tokenizer.json"           # by an earlier packing into this folder
    if args.tokenizer != "words":
        tokenizer = checkpoint.load_tokenizer(Path(args.tokenizer))
    elif collected.exists():
        tokenizer = checkpoint.load_tokenizer(collected)
    else:
        tokenizer = collect_words(sources, args)
    if len(tokenizer) > LARGEST:
        raise UserError(f"{len(tokenizer):,} tokens do not fit in 16 bits: give a SentencePiece "
                        f"model with --tokenizer")
    return tokenizer


def put_tokenizer(out, tokenizer):
    """Put the tokenizer beside its shards. Raises UserError if there is another one."""
    if isinstance(tokenizer, Pieces):
        path = out / "tokenizer.model"
        content = tokenizer.model
    else:
        path = out / "tokenizer.json"
        content = json.dumps(tokenizer.vocabulary).encode()
    if path.exists():
        check_same(path, checkpoint.load_tokenizer(path), tokenizer, "tokenizer")
    else:
        with whole_file(path) as file:
            file.write(content)


def put_vae(out, vae, source):
    """Put the VAE beside its shards, as the file `source` has it. Raises UserError if there is
    another one."""
    path = out / "vae.pt"
    if path.exists():
        check_same(path, checkpoint.load_vae(path, checkpoint.ANY_VAE), vae, "VAE")
    else:
        with whole_file(path) as file:
            file.write(Path(source).read_bytes())


def check_same(path, existing, given, name):
    """Raise UserError if the file beside the shards is not what the command line gives."""
    if fingerprint(existing) != fingerprint(given):
        raise UserError(f"{path.parent} was packed with another {name} ({fingerprint(existing)}, "
                        f"this one is {fingerprint(given)}): name another --out")


def picture_settings(vae, args):
    """The settings of pairs, beside those of all shards. Raises UserError if the numbers do not go
    together."""
    f = vae.f                               # how many times smaller a latent picture is
    codes = vae.config.codes
    side = args.image_size // f
    patch = 1 if codes else args.patch      # a code for every place
    patches = (side // patch) ** 2
    if codes > LARGEST:
        raise UserError(f"{codes:,} codes do not fit in 16 bits: train a VQ-VAE of fewer")
    if vae.config.image_channels != 3 or args.image_size % f or side % patch:
        raise UserError(f"this VAE takes pictures of {vae.config.image_channels} channels and "
                        f"makes them {f} times smaller: they must have 3, and --image-size "
                        f"{args.image_size} must be divisible by {f} x --patch {patch}")
    if patches + 5 > args.seq_len:
        advice = "raise it" if codes else "raise it, or raise --patch"
        raise UserError(f"a picture takes {patches} patches; with four special tokens and a "
                        f"caption they do not fit in --seq-len {args.seq_len}: {advice}")
    settings = {"patch": patch, "image_size": args.image_size, "patches": patches,
                "latent": [vae.config.z, side, side], "vae": fingerprint(vae)}
    if codes:
        settings["codes"] = codes
    return settings


# ------------------------------------------------------------------------------------- command line
def parse_arguments(argv):
    """The options. Raises UserError if one is wrong in itself."""
    parser = Parser(
        prog="python -m scale.pack", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Pack text and captioned pictures into shards. The same command goes on where "
                    "a killed one stopped, and packs missing or broken shards anew.")
    add = parser.add_argument
    add("--text", action="append", default=[],
        help='.txt, or .jsonl with {"text": ...}, a document per line; a folder of them; or the '
             'word scenes (may be repeated)')
    add("--pairs", action="append", default=[],
        help="folder of pictures with captions.jsonl; .tar in webdataset's layout; a folder of "
             "them; or the word scenes (may be repeated)")
    add("--tokenizer", default="words",
        help="a SentencePiece .model; a tokenizer.json; or the word words: whole words, collected "
             "from the sources")
    add("--vae", default="",
        help="the vae.pt that makes the latents (pairs); a VQ-VAE's makes codes, for a Chameleon")
    add("--seq-len", type=int, default=4096, help="T, positions per row (the paper: 4096)")
    add("--patch", type=int, default=2, help="side of a patch, in latent pixels")
    add("--image-size", type=int, default=256, help="pixels per side, after centre-cropping")
    add("--shard-rows", type=int, default=1024,
        help="rows per shard, about; they are held in memory while it is packed")
    add("--another", type=float, default=0.1,
        help="after a pair, the chance of one more in the same document")
    add("--scenes", type=int, default=5000,
        help="how many texts, and how many pairs, the word scenes stands for")
    add("--world", choices=tuple(scenes.WORLDS), default="one", help="which captions of scenes")
    add("--out", default="packed", help="folder for the shards")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args):
    """Raise UserError if an option is out of range, or one is missing."""
    least = {"seq_len": 3, "patch": 1, "image_size": 1, "shard_rows": 1, "scenes": 1}
    for name, bound in least.items():
        value = getattr(args, name)
        if value < bound:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} must be at least {bound}, got {value}")
    if not 0 <= args.another < 1:
        raise UserError(f"--another must be at least 0 and below 1, got {args.another}")
    if not args.text + args.pairs:
        raise UserError("say what to pack: --text a.jsonl, --pairs folder, or --text scenes "
                        "--pairs scenes")
    if args.pairs and not args.vae:
        raise UserError("--pairs needs --vae: the vae.pt that turns pictures into latents "
                        "(`python -m autoencoder.train` trains one)")
    if args.tokenizer != "words" and Path(args.tokenizer).suffix not in (".json", ".model"):
        raise UserError(f"--tokenizer {args.tokenizer} is neither a .model, nor a .json, nor the "
                        f"word words")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"{args.out} is a file: name another folder with --out")


def main(argv=None):
    """Pack as the command line says. Returns the totals."""
    # 1. What is there? Everything that can be wrong is found here, before anything is written.
    args = parse_arguments(argv)
    out = Path(args.out)
    sources = {kind: find_sources(kind, getattr(args, kind), args.scenes) for kind in KINDS}
    vae = checkpoint.load_vae(args.vae, checkpoint.ANY_VAE) if args.pairs else None
    of_pictures = picture_settings(vae, args) if vae else {}
    tokenizer = choose_tokenizer(args, sources)

    # 2. Tokenizer and VAE: without them the shards mean nothing.
    put_tokenizer(out, tokenizer)
    if vae:
        put_vae(out, vae, args.vae)
        vae.to(pick_device())

    # 3. The shards.
    settings = {"version": 1, "seq_len": args.seq_len, "tokenizer": fingerprint(tokenizer)}
    settings_of = {"text": settings, "pairs": {**settings, **of_pictures}}
    headers = []
    for kind in KINDS:
        if sources[kind]:
            headers += pack_kind(kind, sources[kind], tokenizer, vae, settings_of[kind], args)

    # 4. The list of them, last: a folder with index.json is finished.
    total = add_up(headers, args.seq_len)
    index = make_index(out, shard_names(headers))
    write_json(out / "index.json", {**index, "totals": total})
    print_totals(out, args.seq_len, total, headers, vae)
    print_missing(headers)
    return total


def shard_names(headers):
    """The names of the shards, which are numbered by kind."""
    names = []
    for kind in KINDS:
        shards = sum(header["kind"] == kind for header in headers)
        names += [f"{kind}-{k:06d}" for k in range(shards)]
    return names


def add_up(headers, T):
    """The totals of all shards, as index.json has them."""
    total = {}
    for name in ("rows", "documents", "positions", "pictures", "skipped"):
        total[name] = sum(header[name] for header in headers)
    total["patches"] = 0
    for header in headers:
        total["patches"] += header["pictures"] * header["settings"].get("patches", 0)
    total["text_tokens"] = total["positions"] - total["patches"]
    total["bytes"] = sum(sum(header["bytes"].values()) for header in headers)
    squared = sum(header["deviation_squared"] for header in headers)
    total["deviation"] = (squared / max(1, total["pictures"])) ** 0.5
    total["shards"] = len(headers)
    total["filled"] = total["positions"] / (total["rows"] * T)
    return total


def print_totals(out, T, total, headers, vae):
    """Say what was packed, and what was left out."""
    print(f"{out}: {total['shards']} shards, {total['rows']:,} rows of {T} "
          f"({total['filled']:.1%} full), {total['documents']:,} documents, "
          f"{total['text_tokens']:,} text tokens, {total['patches']:,} patches of "
          f"{total['pictures']:,} pictures, {total['bytes'] / 1e9:.3f} GB")
    if vae and not vae.quantiser:
        print(f"the latents' means are stored; left out is the deviation of q(z | x), "
              f"{total['deviation']:.4f} of a latent's own")
    if total["skipped"]:
        problems = itertools.chain(*(header["problems"] for header in headers))
        first = "; ".join(itertools.islice(problems, 5))
        print(f"skipped {total['skipped']:,}: {first}")


def print_missing(headers):
    """Say what training will want beside these shards."""
    rows = dict.fromkeys(KINDS, 0)
    for header in headers:
        rows[header["kind"]] += header["rows"]
    if rows["pairs"] < 10:
        print(f"these are {rows['pairs']} rows of pairs: train.py needs at least ten, for --model "
              f"llama, too (the rivals are compared on one folder); pack text and --pairs together")
    elif not rows["text"]:
        print("these are pairs alone: text tokens and patches will not be 1 : 1, and --model llama "
              "has nothing to read; pack pairs and --text together")


if __name__ == "__main__":
    run_command(main, if_stopped="the same command goes on where this one stopped")
