"""
streams.py: sources that do not fit in memory, one item at a time                              (Transfusion §4.1 "Data")

THE IDEA    A source is a file, a folder, a tar. Its stream yields one document, or one captioned picture, after another, and
            opens a picture only when it is asked to. So packing that resumes passes over millions of items in seconds.
A PICTURE   a.jsonl | b.txt       --> (bytes so far, read), (bytes so far, read), ...       read() -> ("a text", None)
            folder | c.tar        --> (bytes so far, read), (bytes so far, read), ...       read() -> ("a caption", pixels)
                                                                                            pixels() -> (h, w, 3) uint8
THE RULE    `read` and `pixels` raise UserError if this one item is no good: packing counts it, names it, and goes on.
READ NEXT   pack.py        TRY IT  python streams.py        TEST  tests/test_shards.py
"""
import functools
import io
import itertools
import json
import tarfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

import data
from sources import scenes
from support.common import UserError, open_picture


def read_line(raw, where, keys, folder=None, size=None):
    """The item of one line: text (no keys), or JSON with the text under keys[0] and a picture's name under keys[1]."""
    try:
        entry = json.loads(raw) if keys else raw.decode("utf-8")
        text = (entry[keys[0]] if keys else entry).strip()
        return text, functools.partial(open_picture, folder / entry[keys[1]], size) if folder else None
    except (ValueError, KeyError, TypeError, AttributeError):
        wanted = "{" + ", ".join(f'"{key}": ...' for key in keys) + "}" if keys else "text in UTF-8"
        raise UserError(f"{where} is not {wanted}: {raw[:40]!r}") from None


def lines_of(path, keys, folder=None, size=None):
    """The items of a file with one document per line."""
    upto = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            upto += len(raw)
            if raw.strip():
                yield upto, functools.partial(read_line, raw, f"{path} line {number}", keys, folder, size)


def read_member(tar, files, where, size):
    """The item of a tar's files of one stem: a picture, and its caption in .txt, or in .json under "caption"."""
    kinds = {PurePosixPath(member.name).suffix.lower(): member for member in files}
    picture = next((kinds[k] for k in (".jpg", ".jpeg", ".png", ".webp") if k in kinds), None)
    caption = kinds.get(".txt") or kinds.get(".json")
    if not (picture and caption):
        raise UserError(f"{where} lacks a picture (.jpg, .png, .webp) or a caption (.txt, .json)")
    raw, name = tar.extractfile(caption).read(), f"{where}{PurePosixPath(caption.name).suffix}"
    text, _ = read_line(raw, name, ["caption"] if ".txt" not in kinds else [])

    def pixels():
        file = io.BytesIO(tar.extractfile(picture).read())
        try:
            return open_picture(file, size)
        except UserError as problem:                    # the name of the picture instead of that of the bytes
            raise UserError(str(problem).replace(str(file), f"{where}{PurePosixPath(picture.name).suffix}")) from None
    return text, pixels


def members_of(path, size):
    """The items of a tar in webdataset's layout: the files of one picture stand together and share their stem."""
    try:
        with tarfile.open(path) as tar:
            stem = lambda member: str(PurePosixPath(member.name).parent / PurePosixPath(member.name).name.split(".")[0])
            for name, files in itertools.groupby((m for m in tar if m.isfile()), stem):
                files = list(files)
                end = files[-1].offset_data + files[-1].size
                yield end, functools.partial(read_member, tar, files, f"{path}:{name}", size)
    except (tarfile.TarError, EOFError, zlib.error):
        raise UserError(f"{path} is truncated or not a tar: fetch it again, or leave it out") from None


def scenes_of(kind, world, n, size):
    """n items of the toy world: deductions (text), or pictures with captions (pairs)."""
    for k in range(n):
        if kind == "pairs" and k % 256 == 0:
            drawn = scenes.load_scenes(min(256, n - k), [0, 0, k], scenes.WORLDS[world], size, progress=False)
        text = (drawn.captions[k % 256] if kind == "pairs" else
                scenes.World(scenes.WORLDS[world]).deduction(np.random.default_rng([0, 1, k])))
        yield k + 1, lambda: (text, (lambda: drawn.pixels[k % 256]) if kind == "pairs" else None)


def find_sources(kind, names, n):
    """{source: its size} of the names on the command line, folders of text or tars opened up, in order."""
    found, kinds = {}, {"text": (".txt", ".jsonl"), "pairs": (".tar",)}[kind]
    for name in names:
        path = Path(name)
        if name == "scenes":
            found[name] = n
        elif path.is_dir() and not (kind == "pairs" and (path / "captions.jsonl").exists()):
            inside = {str(p): p.stat().st_size for p in sorted(path.iterdir()) if p.suffix in kinds}
            if not inside:
                raise UserError(f"{path} has no {' or '.join(kinds)} file{' and no captions.jsonl' * (kind == 'pairs')}")
            found |= inside
        elif path.is_dir() or path.is_file() and path.suffix in kinds:
            found[name] = (path / "captions.jsonl" if path.is_dir() else path).stat().st_size
        else:
            raise UserError(f"{name}: there is no such " + " or ".join(kinds) + " file or folder of them"
                            + ' (or folder of pictures with captions.jsonl, or the word "scenes")' * (kind == "pairs"))
    return found


def items_of(kind, source, args):
    """The stream of one source."""
    path = Path(source)
    if source == "scenes":
        return scenes_of(kind, args.world, args.scenes, args.image_size)
    if path.is_dir():
        return lines_of(path / "captions.jsonl", ["caption", "image"], path, args.image_size)
    return members_of(path, args.image_size) if kind == "pairs" else lines_of(path, ["text"] * (path.suffix == ".jsonl"))


def collect_words(named, args):
    """Words of all that the sources say, named = {kind: {source: size}}: one pass over their text, without opening a picture."""
    found = set()
    for kind, source in ((kind, source) for kind in named for source in named[kind]):
        if source == "scenes":                          # the whole language, so that all worlds share one vocabulary
            found |= scenes.vocabulary()
            continue
        for _, read in tqdm(items_of(kind, source, args), desc=f"collecting the words of {source}", leave=False):
            try:
                found.update(read()[0].split())
            except UserError:                           # it will be counted and named when it is packed
                continue
    return data.Words(found)


if __name__ == "__main__":
    for kind in ("text", "pairs"):
        for upto, read in scenes_of(kind, "six", 3, 32):
            text, pixels = read()
            print(f"{kind:6s} item {upto}: {text!r}" + (f" and {pixels().shape} pixels" if pixels else ""))
