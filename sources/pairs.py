"""
pairs.py: captioned pictures, and perhaps text alone                       (Transfusion §4.1 "Data")

THE IDEA    All that training and measuring ask of a data set: captions, pictures, and perhaps texts
            without a picture. So a source is a function that returns them, and a new data set is a
            new function.
A PICTURE   scenes: drawn from a seed        --+
            mnist:  four idx files           --+-->  Pairs(captions, pixels)
            folder: pictures, captions.jsonl --+
SHAPES      N captions; pixels (N, h, w, 3 or 1) uint8
PAPER/HERE  same: pictures are cropped at the centre and resized to a square.
            here: these sources fit in memory. A trillion tokens do not: scale/pack.py packs them to
            disk first.
READ NEXT   scenes.py, mnist.py, folder.py, choose.py        TEST  tests/test_sources.py,
            tests/test_picture_folder.py
"""
import hashlib
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Callable

import numpy as np
from tqdm import tqdm

from support.common import UserError

SPLITS = ("train", "test")
MOST_BYTES = 2 ** 31                                    # of all pictures that are drawn and held


@dataclass
class Pairs:
    """Captioned pictures, and perhaps text alone.

    name        of the source: "scenes", "mnist", "folder"
    captions    list of N str
    pixels      (N, h, w, 3 or 1) uint8
    texts       documents without a picture, in groups: a list of lists of str. One is drawn in
                two steps, first a group, then one of its texts. Empty: this source has none.
    words       set of every word that the source can utter; None: those of its captions
    labels      (N,) int, MNIST's classes, or None
    language    captions beyond these whose words must be known, too
    lines       where each caption stands, file and line, for a sentence about it; empty: in no file
    judge       function (caption, picture (h, w, 3 or 1) uint8) -> whether the picture shows what
                the caption says; evaluate.py counts with it. None: nobody can say
    """
    name: str
    captions: list
    pixels: np.ndarray
    texts: list = field(default_factory=list)
    words: set | None = None
    labels: np.ndarray | None = None
    language: list = field(default_factory=list)
    lines: list = field(default_factory=list)
    judge: Callable | None = None

    def vocabulary(self):
        """Set of every word that this source can utter."""
        if self.words is not None:
            return self.words
        return words_of([*self.captions, *self.language])

    def to_draw(self):
        """[(what stands before a picture, the number of that picture)]: see metrics/folder.py."""
        return [([caption], k) for k, caption in enumerate(self.captions)]


def words_of(texts):
    """Set of every word in a list of texts."""
    words = set()
    for text in texts:
        words.update(text.split())
    return words


# ------------------------------------------------------------------------ what all sources agree on
def check_room(n, size):
    """Raise UserError if n pictures of size x size pixels cannot be held in memory."""
    wanted = 3 * n * size ** 2
    if wanted > MOST_BYTES:
        most = MOST_BYTES // (3 * size ** 2)
        raise UserError(f"{n:,} pictures of {size}x{size} would take {wanted / 2 ** 30:,.1f} GB of "
                        f"memory: ask for fewer, at most {most:,}, or for smaller ones")


def clean_caption(text, where):
    """A caption as it is learned and asked for: one space between words. Raises UserError for an
    empty one, and for one that is no text. where: its file and line, for the sentence."""
    # Capitals stay: lower case is the rule of one tokenizer only (data.Words).
    caption = " ".join(text.split())
    if not caption:
        # It would teach to draw without words, which only a dropped caption may do.
        raise UserError(f"{where}: the caption is empty")
    check_text(caption, where)
    return caption


def check_text(text, where):
    """Raise UserError for a string that JSON can hold, but that is no text. where: for the
    sentence."""
    if "\0" in text:                                    # every second byte of UTF-16 is one
        raise UserError(f"{where} has a NUL character: is the file UTF-16? Save it as UTF-8")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:                          # "\ud800" alone
        raise UserError(f"{where} has half a character, which is no text") from None


def choose_test(names):
    """Which pictures of a folder are its test split: the set of their names, about a tenth.
    names: those of all pictures."""
    # Our choice: by a hash of the name. A picture that is added, or a line that moves, must not
    # bring a picture that was trained on into the test split. Nor may the split follow the order:
    # with ten classes in turn, every tenth line is of one class.
    hashes = {name: hash_name(name) for name in names}
    chosen = {name for name, number in hashes.items() if number % 10 == 0}
    if not chosen:
        # A few pictures only: the one of the smallest hash. If a smaller one is added, the first
        # goes over to training, which does no harm.
        least = min(hashes.values())
        chosen = {name for name, number in hashes.items() if number == least}
    return chosen


def hash_name(name):
    """A number from the name of a file: the same on every machine, on any day."""
    name = str(PurePosixPath(name))                     # "./cat.jpg" is "cat.jpg"
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def name_groups(names):
    """For each item, of which `names` lists the pictures, one name for all items that share
    pictures with it, directly or through others: (1.png, 2.png) and (2.png, 3.png) are in one
    group, and so in one split."""
    group_of = {}                                       # name of a picture: list of its group
    for first, *others in names:
        one = group_of.setdefault(first, [first])
        for name in others:
            other = group_of.setdefault(name, [name])
            if one is other:
                continue
            if len(one) < len(other):                   # the smaller moves into the larger
                one, other = other, one
            one += other
            for moved in other:
                group_of[moved] = one
    groups = {id(group): group for group in group_of.values()}          # each once
    first_name = {key: min(group) for key, group in groups.items()}
    return [first_name[id(group_of[first])] for first, *_ in names]


def split_items(folder, names, split, what):
    """The places in a folder's list that belong to a split, in a random order that is always the
    same. Raises UserError if there are too few.

    names       for each item the name of its picture: items of one picture stay together
    split       "train" or "test"
    what        the items are, in the plural, for the sentence"""
    different = set(names)
    if len(names) < 10 or len(different) < 2:
        raise UserError(f"{folder} has {len(names)} usable {what}, or {len(different)} where those "
                        f"that share a picture count once: it needs at least ten, and two that "
                        f"share none, one of them for the test split")
    in_test = choose_test(different)
    chosen = [k for k, name in enumerate(names) if (name in in_test) == (split == "test")]
    # Whoever takes the first few takes a sample: the conditioning gap does, and the VAE's scale.
    # In a folder that is sorted, by caption or by brightness, the first few are alike.
    order = np.random.default_rng([len(chosen), 18]).permutation(len(chosen))
    return [chosen[k] for k in order]


def read_usable(folder, path, records, read, what):
    """(items, lines): what read(record, line) makes of each record, and where each of them stands,
    file and line. A record for which it raises UserError is skipped, counted and named.

    folder, path    as the user calls the folder; the list in it
    records         [(line number, record)]
    what            the items are, in the plural, for the sentence"""
    items = []
    lines = []
    skipped = []                                        # a sentence for each
    for number, record in tqdm(records, desc=f"reading {folder}", leave=False):
        line = f"{path} line {number}"
        try:
            item = read(record, line)
        except UserError as problem:
            skipped.append(str(problem))
        else:
            items.append(item)
            lines.append(line)
    print_skipped(folder, skipped, len(records), what)
    return items, lines


def print_skipped(folder, problems, n, what):
    """Name the first of the items that were skipped, out of n. problems: a sentence for each."""
    if problems:
        first = "; ".join(problems[:5])
        more = " ..." if len(problems) > 5 else ""
        print(f"{folder}: skipped {len(problems)} of {n} {what}: {first}{more}")
