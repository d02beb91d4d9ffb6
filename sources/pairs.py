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
READ NEXT   scenes.py, mnist.py, folder.py, choose.py        TEST  tests/test_sources.py
"""
from dataclasses import dataclass, field
from typing import Callable

import numpy as np

from support.common import UserError

SPLITS = ("train", "test")


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
    judge: Callable | None = None

    def vocabulary(self):
        """Set of every word that this source can utter."""
        if self.words is not None:
            return self.words
        return words_of([*self.captions, *self.language])


def words_of(texts):
    """Set of every word in a list of texts."""
    words = set()
    for text in texts:
        words.update(text.split())
    return words


# ------------------------------------------------------------------------ what all sources agree on
def clean_caption(text, where):
    """A caption as it is learned: lower case, one space between words. Raises UserError for an
    empty one. where: its file and line, for the sentence."""
    caption = " ".join(text.lower().split())
    if not caption:
        # It would teach to draw without words, which only a dropped caption may do.
        raise UserError(f"{where}: the caption is empty")
    return caption


def in_split(k, split):
    """Whether item k of a folder belongs to a split: every tenth is for the test."""
    return (k % 10 == 9) == (split == "test")


def print_skipped(folder, problems, n, what):
    """Name the first of the items that were skipped, out of n. problems: a sentence for each."""
    if problems:
        first = "; ".join(problems[:5])
        more = " ..." if len(problems) > 5 else ""
        print(f"{folder}: skipped {len(problems)} of {n} {what}: {first}{more}")
