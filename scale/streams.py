"""
streams.py: sources that do not fit in memory, one item at a time        (Transfusion §4.1 "Data")

THE IDEA    A source is a file, a folder or a tar. Its stream yields one document, or one captioned
            picture, after another. A picture is opened only when somebody asks for it. So packing
            that resumes passes over millions of items in seconds.
A PICTURE   a.jsonl | b.txt   --> (bytes so far, read), ...     read() -> ("a text", None)
            folder | c.tar    --> (bytes so far, read), ...     read() -> ("a caption", pixels)
                                                                pixels() -> (h, w, 3) uint8
THE RULE    `read` and `pixels` raise UserError if this one item is no good. Packing counts it,
            names it, and goes on.
READ NEXT   pack.py     TRY IT  python -m scale.streams     TEST  tests/test_shards.py
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

ENDINGS = {"text": (".txt", ".jsonl"), "pairs": (".tar",)}          # of a source's file
PICTURES = (".jpg", ".jpeg", ".png", ".webp")                       # in a tar; the first counts
SCENES_AT_ONCE = 256                                                # they are drawn together


# -------------------------------------------------------------------------------- one item per line
def lines_of(path, keys, folder=None, size=None):
    """The items of a file with one document per line. The arguments are those of `read_line`."""
    so_far = 0
    with open(path, "rb") as file:          # bytes, so that a bad line is one bad item
        for number, line in enumerate(file, 1):
            so_far += len(line)
            if line.strip():
                where = f"{path} line {number}"
                yield so_far, functools.partial(read_line, line, where, keys, folder, size)


def read_line(line, where, keys, folder=None, size=None):
    """The item of one line: (text, None), or (caption, function that reads its picture).

    line    bytes: a text, if there are no keys, else JSON
    where   which line it is, for the sentence about a bad one
    keys    [key of the text], or [key of the caption, key of the picture's name]
    folder  of the pictures, which are read in (size, size). None: text alone"""
    try:
        if not keys:                        # a line of a .txt
            return line.decode("utf-8").strip(), None
        entry = json.loads(line)
        text = entry[keys[0]].strip()
        if folder is None:
            return text, None
        # The picture is opened later, or never: collecting words and resuming pass over it.
        return text, functools.partial(open_picture, folder / entry[keys[1]], size)
    except (ValueError, KeyError, TypeError, AttributeError):
        wanted = "text in UTF-8"
        if keys:
            wanted = "{" + ", ".join(f'"{key}": ...' for key in keys) + "}"
        raise UserError(f"{where} is not {wanted}: {line[:40]!r}") from None


# ---------------------------------------------------------------------- a tar, as webdataset has it
def members_of(path, size):
    """The items of a tar in webdataset's layout: the files of one picture stand together, and have
    the same name up to the first dot."""
    try:
        with tarfile.open(path) as tar:
            files = (member for member in tar if member.isfile())
            # Neighbours only: a tar of a million pictures is never listed as a whole.
            for stem, group in itertools.groupby(files, stem_of):
                members = list(group)
                end = members[-1].offset_data + members[-1].size
                where = f"{path}:{stem}"
                yield end, functools.partial(read_members, tar, members, where, size)
    except (tarfile.TarError, EOFError, zlib.error):
        raise UserError(f"{path} is truncated or not a tar: fetch it again, or leave it "
                        f"out") from None


def stem_of(member):
    """The name of a tar's member, up to the first dot, with its folder."""
    name = PurePosixPath(member.name)
    return str(name.parent / name.name.split(".")[0])


def suffix_of(member):
    """The ending of the name of a tar's member."""
    return PurePosixPath(member.name).suffix


def read_members(tar, members, where, size):
    """The item of a tar's members of one stem: a picture, and its caption in .txt, or in .json
    under "caption"."""
    by_suffix = {suffix_of(member).lower(): member for member in members}
    picture = first_of(by_suffix, PICTURES)
    caption = first_of(by_suffix, (".txt", ".json"))
    if not (picture and caption):
        raise UserError(f"{where} lacks a picture (.jpg, .png, .webp) or a caption (.txt, .json)")
    keys = [] if ".txt" in by_suffix else ["caption"]
    content = tar.extractfile(caption).read()
    text, _ = read_line(content, where + suffix_of(caption), keys)
    return text, functools.partial(read_member, tar, picture, where + suffix_of(picture), size)


def first_of(table, keys):
    """The value of the first of these keys that a dict has, or None."""
    for key in keys:
        if key in table:
            return table[key]
    return None


def read_member(tar, member, where, size):
    """(size, size, 3) uint8 of a picture in a tar. Raises UserError if it cannot be read."""
    file = io.BytesIO(tar.extractfile(member).read())
    try:
        return open_picture(file, size)
    except UserError as problem:
        # The name of the picture, in place of the name of the bytes.
        raise UserError(str(problem).replace(str(file), where)) from None


# ------------------------------------------------------------------------------------ the toy world
def scenes_of(kind, world, n, size):
    """n items of the toy world: deductions (text), or captioned pictures (pairs). Their order and
    content depend on nothing else."""
    if kind == "text":
        for k in range(n):
            rng = np.random.default_rng([0, 1, k])
            text = scenes.World(scenes.WORLDS[world]).deduction(rng)
            yield k + 1, functools.partial(read_scene, text)
        return
    # Each group has a seed of its own, so packing may resume in the middle.
    for begin in range(0, n, SCENES_AT_ONCE):
        many = min(SCENES_AT_ONCE, n - begin)
        pairs = scenes.load_scenes(many, [0, 0, begin], scenes.WORLDS[world], size, progress=False)
        for k in range(many):
            yield begin + k + 1, functools.partial(read_scene, pairs.captions[k], pairs.pixels[k])


def read_scene(text, pixels=None):
    """The item of a scene, which was drawn already."""
    if pixels is None:
        return text, None
    return text, lambda: pixels


# -------------------------------------------------------------------------------------- all sources
def find_sources(kind, names, n):
    """{source: its size} of the names on the command line, in order. Folders of text or of tars are
    opened up. n: the size of the source "scenes". Raises UserError if there is no such source."""
    sources = {}
    for name in names:
        if name == "scenes":
            sources[name] = n
        elif is_text_or_tars(kind, Path(name)):
            sources |= find_inside(kind, Path(name))
        else:
            sources[name] = size_of(kind, name)
    return sources


def is_text_or_tars(kind, path):
    """Whether a path is a folder of several sources. A folder of pictures is one source."""
    if not path.is_dir():
        return False
    return kind == "text" or not (path / "captions.jsonl").exists()


def find_inside(kind, folder):
    """{source: its size} of a folder of text or of tars."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in ENDINGS[kind]]
    if not files:
        pictures = " and no captions.jsonl" if kind == "pairs" else ""
        raise UserError(f"{folder} has no {' or '.join(ENDINGS[kind])} file{pictures}")
    return {str(path): path.stat().st_size for path in files}


def size_of(kind, name):
    """The size of one source in bytes: a file, or a folder of pictures, of which the captions
    count."""
    path = Path(name)
    if path.is_dir():
        return (path / "captions.jsonl").stat().st_size
    if path.is_file() and path.suffix in ENDINGS[kind]:
        return path.stat().st_size
    others = ""
    if kind == "pairs":
        others = ' (or folder of pictures with captions.jsonl, or the word "scenes")'
    raise UserError(f"{name}: there is no such {' or '.join(ENDINGS[kind])} file or folder of "
                    f"them{others}")


def items_of(kind, source, args):
    """The stream of one source. args: the options image_size and, for scenes, world and scenes."""
    path = Path(source)
    if source == "scenes":
        return scenes_of(kind, args.world, args.scenes, args.image_size)
    if path.is_dir():
        return lines_of(path / "captions.jsonl", ["caption", "image"], path, args.image_size)
    if kind == "pairs":
        return members_of(path, args.image_size)
    return lines_of(path, ["text"] if path.suffix == ".jsonl" else [])


def collect_words(sources, args):
    """data.Words of all that the sources say: one pass over their text, without opening a picture.
    sources: {kind: {source: size}}."""
    words = set()
    for kind in sources:
        for source in sources[kind]:
            words |= words_of(kind, source, args)
    return data.Words(words)


def words_of(kind, source, args):
    """The set of all words of one source."""
    if source == "scenes":                  # the whole language: all worlds share one vocabulary
        return scenes.vocabulary()
    words = set()
    bar = tqdm(items_of(kind, source, args), desc=f"collecting the words of {source}", leave=False)
    for _, read in bar:
        try:
            text, _ = read()
        except UserError:                   # it is counted and named when it is packed
            continue
        words.update(text.split())
    return words


def main():
    """Print three items of either kind."""
    for kind in ("text", "pairs"):
        for number, read in scenes_of(kind, "six", 3, 32):
            text, pixels = read()
            picture = f" and {pixels().shape} pixels" if pixels else ""
            print(f"{kind:6s} item {number}: {text!r}{picture}")


if __name__ == "__main__":
    main()
