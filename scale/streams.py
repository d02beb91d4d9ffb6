"""
streams.py: sources that do not fit in memory, one item at a time        (Transfusion §4.1 "Data")

THE IDEA    A source is a file, a folder or a tar. Its stream yields one document, or one captioned
            picture, after another. A picture is opened only when somebody asks for it. So packing
            that resumes passes over millions of items in seconds.
A PICTURE   a.jsonl | b.txt   --> (bytes so far, read), ...     read() -> ("a text", None)
            folder | c.tar    --> (bytes so far, read), ...     read() -> ("a caption", pixels)
                                                                pixels() -> (h, w, 3) uint8
THE RULE    `read` and `pixels` raise UserError if this one item is no good. Packing counts it,
            names it, and goes on. A source as a whole is checked before anything is packed.
READ NEXT   pack.py     TRY IT  python -m scale.streams     TEST  tests/test_streams.py
"""
import codecs
import functools
import hashlib
import io
import itertools
import os
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

import data
from sources import scenes
from sources.pairs import check_text, clean_caption
from support.common import UserError, check_ordinary, load_json, open_picture, run_command

ENDINGS = {"text": (".txt", ".jsonl"), "pairs": (".tar",)}          # of a source's file
PICTURES = (".jpg", ".jpeg", ".png", ".webp")                       # in a tar
CAPTIONS = (".txt", ".json")                                        # in a tar; the first counts
SCENES_AT_ONCE = 256                                                # they are drawn together
MOST_BYTES = 2 ** 26                                                # of one line, or of one member


# -------------------------------------------------------------------------------- one item per line
def texts_of(path):
    """The items of a file with one text per line: a .txt, or a .jsonl with {"text": ...}."""
    keys = ["text"] if path.suffix == ".jsonl" else []
    for so_far, line, where in lines_of(path):
        yield so_far, functools.partial(read_text, line, where, keys)


def pairs_of(folder, size):
    """The items of a folder of pictures with captions.jsonl."""
    for so_far, line, where in lines_of(folder / "captions.jsonl"):
        yield so_far, functools.partial(read_pair, line, where, folder, size)


def lines_of(path):
    """Yields (bytes read so far, line, where it is) for every line of a file that is not empty."""
    so_far = 0
    with open(path, "rb") as file:          # bytes, so that a bad line is one bad item
        for number in itertools.count(1):
            # A file without any line's end must not fill the memory: what is too long is passed
            # over, and `parse_line` says so.
            line = file.readline(MOST_BYTES + 1)
            so_far += len(line)
            rest = line
            while len(rest) > MOST_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MOST_BYTES + 1)
                so_far += len(rest)
            if not line:
                return
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield so_far, line, f"{path} line {number}"


def read_text(line, where, keys):
    """(text, None) of a line. keys: [key of the text] of a JSON line; [] of a plain one."""
    [text] = parse_line(line, where, keys)
    text = text.strip()
    check_text(text, where)
    return text, None


def read_pair(line, where, folder, size):
    """(caption, function that reads its picture) of a line of captions.jsonl."""
    text, name = parse_line(line, where, ["caption", "image"])
    # The picture is opened later, or never: collecting words and resuming pass over it.
    return clean_caption(text, where), functools.partial(open_picture, folder / name, size)


def parse_line(line, where, keys):
    """The strings under the keys of a JSON line; [the line] if there are no keys.

    line    bytes
    where   which line it is, for the sentence about a bad one"""
    if len(line) > MOST_BYTES:
        raise UserError(f"{where} is longer than {MOST_BYTES:,} bytes")
    try:
        text = line.decode("utf-8")
        if not keys:
            return [text]
        entry = load_json(text)
        values = [entry[key] for key in keys]
    except (ValueError, KeyError, TypeError):
        values = [None]
    if not all(isinstance(value, str) for value in values):
        wanted = "text in UTF-8"
        if keys:
            wanted = "{" + ", ".join(f'"{key}": ...' for key in keys) + "}"
        raise UserError(f"{where} is not {wanted}: {line[:40]!r}")
    return values


# ---------------------------------------------------------------------- a tar, as webdataset has it
def members_of(path, size):
    """The items of a tar in webdataset's layout: the files of one picture stand together, and have
    the same name up to the first dot."""
    try:
        # "r:": not a zipped one. Its few bytes could unpack to anything.
        with tarfile.open(path, "r:") as tar:
            files = (member for member in tar if member.isfile())
            # Neighbours only: a tar of a million pictures is never listed as a whole.
            for stem, group in itertools.groupby(files, stem_of):
                members = list(group)
                end = members[-1].offset_data + members[-1].size
                where = f"{path}:{stem}"
                yield end, functools.partial(read_members, tar, members, where, size)
    except Exception:
        # There is no common class: tarfile's own, OSError, UnicodeError, OverflowError.
        raise UserError(f"{path} is truncated or not a tar: fetch it again, or leave it "
                        f"out") from None


def stem_of(member):
    """The name of a tar's member, up to the first dot, with its folder."""
    name = PurePosixPath(member.name)
    return str(name.parent / name.name.split(".")[0])


def suffix_of(member):
    """The ending of the name of a tar's member, in small letters."""
    return PurePosixPath(member.name).suffix.lower()


def read_members(tar, members, where, size):
    """The item of a tar's members of one stem: a picture, and its caption in .txt, or in .json
    under "caption"."""
    picture = choose_member(members, PICTURES, where, "pictures")
    caption = None
    for suffix in CAPTIONS:                 # a .json beside a .txt has what else is known
        caption = caption or choose_member(members, [suffix], where, "captions")
    if not (picture and caption):
        raise UserError(f"{where} lacks a picture (.jpg, .png, .webp) or a caption (.txt, .json)")

    place = where + suffix_of(caption)
    keys = [] if suffix_of(caption) == ".txt" else ["caption"]
    content = read_member(tar, caption, place).removeprefix(codecs.BOM_UTF8)
    [text] = parse_line(content, place, keys)
    pixels = functools.partial(read_picture, tar, picture, where + suffix_of(picture), size)
    return clean_caption(text, place), pixels


def choose_member(members, suffixes, where, what):
    """The one of a tar's members of one stem that has one of these endings, or None. The plain name
    wins: k.png, not k.seg.png. Raises UserError if it is not clear which one is meant."""
    fits = [member for member in members if suffix_of(member) in suffixes]
    plain = [member for member in fits if PurePosixPath(member.name).name.count(".") == 1]
    candidates = plain or fits
    if len(candidates) > 1:
        # TRAP: the last one would be a mask or a depth map as likely as the picture.
        names = ", ".join(member.name for member in candidates)
        raise UserError(f"{where} has several {what} ({names}): it is not clear which one is meant")
    return candidates[0] if candidates else None


def read_member(tar, member, where):
    """The bytes of a tar's member. Raises UserError if they are too many, or full of holes."""
    if member.issparse():                   # a map of a million holes takes hours to follow
        raise UserError(f"{where} is a sparse file, which no picture or caption is")
    if member.size > MOST_BYTES:            # a few bytes of a sparse file can promise gigabytes
        raise UserError(f"{where} has more than {MOST_BYTES:,} bytes")
    return tar.extractfile(member).read()


def read_picture(tar, member, where, size):
    """(size, size, 3) uint8 of a picture in a tar. Raises UserError if it cannot be read."""
    file = io.BytesIO(read_member(tar, member, where))
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
    opened up. n: the size of the source "scenes". Raises UserError if there is no such source, if
    it is no text in UTF-8, or if it is named twice."""
    sources = {}
    places = {}                             # {place on disk: name that the command line gives it}
    for name in names:
        if name == "scenes":
            found = {name: n}
        elif is_text_or_tars(kind, Path(name)):
            found = find_inside(kind, Path(name))
        else:
            found = {name: size_of(kind, name)}
        for source, size in found.items():
            place = source if source == "scenes" else os.path.realpath(source)
            if place in places:
                raise UserError(f"--{kind} names {source} twice (also as {places[place]}): its "
                                f"documents would count double")
            places[place] = source
            sources[source] = size
            check_encoding(source)
    return sources


def check_encoding(source):
    """Raise UserError if a source is no file, no text at all, or text in UTF-16, as Windows'
    editors may save it."""
    if source == "scenes":
        return
    path = Path(source)
    if path.is_dir():
        path = path / "captions.jsonl"
    check_ordinary(path)
    if path.suffix == ".tar":
        return
    with open(path, "rb") as file:
        begin = file.read(2)
    if begin in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path} is text in UTF-16: save it as UTF-8")
    if begin.startswith(b"\0"):             # a disk image, or gigabytes that were never written
        raise UserError(f"{path} begins with a zero byte: it is not text")


def stamp_of(source, size):
    """[size, stamp] of a source: what a shard remembers of it. Other content has another stamp, the
    same file in another place has the same."""
    # Our choice: sizes and times of the last change, not the content. To read terabytes takes
    # hours, and packing must go on within seconds.
    if source == "scenes":
        return [size, ""]
    path = Path(source)
    files = [path]
    if path.is_dir():
        captions = path / "captions.jsonl"
        files = [captions, *pictures_named(captions)]
    stamp = hashlib.blake2b(digest_size=8)
    for file in files:
        try:
            status = file.stat()
            stamp.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
        except (OSError, ValueError):       # it is missing, or its name cannot be one
            stamp.update(b"missing ")
    return [size, stamp.hexdigest()]


def pictures_named(captions):
    """Yields the path of every picture that a captions.jsonl names."""
    for _, line, where in lines_of(captions):
        try:
            [name] = parse_line(line, where, ["image"])
        except UserError:                   # a bad line is counted and named when it is packed
            continue
        yield captions.parent / name


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
    if kind == "text":
        return texts_of(path)
    if path.is_dir():
        return pairs_of(path, args.image_size)
    return members_of(path, args.image_size)


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
    run_command(lambda _: main())
