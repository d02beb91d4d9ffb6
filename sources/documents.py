"""
documents.py: words and pictures of your own, in any mixture                  (Transfusion §3, §4.1)

THE IDEA    A caption and its picture are the simplest document. A recipe with four photos, a story,
            a page of a manual are documents, too. The model needs nothing new for them: it reads a
            list of words and pictures, and learns to write the one and to draw the other.
A PICTURE   documents.jsonl, one list per line; what ends in .png, .jpg, ... is a picture's name
                ["beat two eggs", "1.png", "fry them", "2.png"]
                ["a cat on a mat", "cat.jpg"]
                ["cat.jpg", "the cat is grey and asleep", "asleep.jpg"]
                ["words alone"]
THE RULES   A caption and a picture: the caption comes first in 80%            §4.1
            Any other document keeps its order.
            A picture that words follow must be seen: t <= 500                  App. B.2
              always, where it opens the document; else in 20%, so that it is also learned to be
              drawn from pure noise
            Words before a picture are dropped in 10%, for guidance.
SHAPES      pixels (N, size, size, 3) uint8, of all pictures of all documents
PAPER/HERE  same: the order of pairs, the noise limit and its reason.
            our choice: the 20% of pictures inside a document. The paper has pairs only.
            our choice: documents that share a picture are in one split; a tenth is the test split.
READ NEXT   ../sample.py        TRY IT  python train.py --data documents --data-dir my_documents
            python sample.py --open "[a.png] and then" --checkpoint out/documents/model.pt
TEST        tests/test_documents.py
"""
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data import count_tokens, one_pair
from sources.pairs import clean_caption, name_groups, read_usable, split_items, words_of
from support.common import UserError, load_json, open_picture, read_lines

WANTED = 'list of words and names of pictures, ["a cat", "cat.png", ...],'


@dataclass
class Mixtures:
    """Documents of words and pictures. It has what training asks of sources.pairs.Pairs.

    pixels      (N, h, w, 3) uint8, all pictures, each once
    documents   lists of str and numbers of pictures; no two strings are neighbours
    language    texts beyond these whose words must be known
    lines       where each document stands, file and line
    """
    pixels: np.ndarray
    documents: list
    language: list = field(default_factory=list)
    lines: list = field(default_factory=list)

    @property
    def captions(self):
        """All words: list of str."""
        texts = []
        for document in self.documents:
            texts += [part for part in document if isinstance(part, str)]
        return texts

    def to_draw(self):
        """[(what stands before a picture, the number of that picture)]: of every document its last
        picture, unless nothing stands before it. See metrics/folder.py."""
        found = []
        for document in self.documents:
            places = [k for k, part in enumerate(document) if not isinstance(part, str)]
            if places and places[-1] > 0:
                found.append((document[: places[-1]], document[places[-1]]))
        return found

    def captioned(self):
        """[(words, the number of the picture right after them)], for the conditioning gap."""
        found = []
        for document in self.documents:
            for part, following in zip(document, document[1:]):
                if isinstance(part, str):
                    found.append((part, following))
        return found

    def vocabulary(self):
        """Set of every word that this source can utter."""
        return words_of([*self.captions, *self.language])


# ------------------------------------------------------------------------------------------ reading
def load_documents(folder=None, size=32, split="train", **unused):
    """Mixtures of a folder with documents.jsonl. What is bad is counted, named and skipped, as in
    folder.py. The arguments are those of `folder.load_folder`.

    Raises UserError if the file is missing or broken, or if too few documents are left."""
    if folder is None:
        raise UserError("--data documents needs --data-dir: the folder with documents.jsonl")
    path = Path(folder) / "documents.jsonl"
    records = read_documents(path)
    pictures = {}                                       # name: pixels; read once

    def read(parts, line):
        document = read_parts(parts, line)              # a list of (kind, words or name)
        for kind, name in document:
            if kind == "picture" and name not in pictures:
                pictures[name] = open_picture(path.parent / name, size)
        return document

    documents, lines = read_usable(folder, path, records, read, "documents")

    # Documents of words alone have no picture to share: their words are their name.
    names = []
    for document in documents:
        named = [name for kind, name in document if kind == "picture"]
        names.append(named or [document[0][1]])
    chosen = split_items(folder, name_groups(names), split, "documents")
    if not pictures:
        raise UserError(f"{path} names no picture: words alone are no reason for a Transfusion")
    return number_pictures(documents, chosen, pictures, lines, size)


def number_pictures(documents, chosen, pictures, lines, size):
    """The Mixtures of the chosen documents, their pictures numbered.

    documents   lists of (kind, words or name)      chosen      which of them, a list of numbers
    pictures    {name: pixels}                      lines       where each document stands"""
    numbers = {}                                        # of the pictures of this split alone
    kept = []
    language = []
    for document in documents:
        language += [text for kind, text in document if kind == "words"]
    for k in chosen:
        document = []
        for kind, content in documents[k]:
            if kind == "picture":
                content = numbers.setdefault(content, len(numbers))
            document.append(content)
        kept.append(document)
    pixels = np.zeros((0, size, size, 3), np.uint8)     # a test split of words alone
    if numbers:
        pixels = np.stack([pictures[name] for name in numbers])
    return Mixtures(pixels, kept, language, [lines[k] for k in chosen])


def read_documents(path):
    """[(line number, list of strings)] of documents.jsonl. Raises UserError that names the first
    line that is something else."""
    records = []
    for number, line in read_lines(path, WANTED):
        try:
            parts = load_json(line)
        except ValueError:
            parts = None
        is_list = isinstance(parts, list) and len(parts) > 0
        if not is_list or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{path} line {number} is no {WANTED} but {line[:60]!r}")
        records.append((number, parts))
    return records


def read_parts(parts, line):
    """[("words", text) or ("picture", name)] of a line's strings. Neighbouring words become one
    text. line: file and number, for the sentence. Raises UserError for words that are no text."""
    document = []
    for part in parts:
        if is_picture(part):
            document.append(("picture", part))
            continue
        text = clean_caption(part, line)
        if document and document[-1][0] == "words":
            text = f"{document.pop()[1]} {text}"
        document.append(("words", text))
    return document


def is_picture(part):
    """Whether a string is the name of a picture: it ends like one that Pillow can read."""
    return Path(part).suffix.lower() in Image.registered_extensions()


# ---------------------------------------------------------------------------------------- documents
@dataclass
class MixedDocuments:
    """Draws documents from Mixtures, as data.Documents does from Pairs.

    pairs           Mixtures
    patches         P
    context         positions per row
    t_limit         the largest t of a picture that must be seen by the words after it
    noisiest        the largest t of any other: pure noise
    drop            share of the words before a picture that are dropped
    caption_first   share of pairs whose caption comes first
    tokenizer       measures words; None: in words
    """
    pairs: Mixtures
    patches: int
    context: int = 96
    t_limit: int = 500
    noisiest: int = 1000
    drop: float = 0.1
    caption_first: float = 0.8
    tokenizer: object = None

    def lengths(self):
        """How many positions each document takes."""
        found = []
        for document in self.pairs.documents:
            n = 2                                       # BOS, EOS
            for part in document:
                if isinstance(part, str):
                    n += count_tokens(self.tokenizer, part)
                else:
                    n += self.patches + 2               # BOI, EOI
            found.append(n)
        return found

    def longest(self):
        """Positions of the longest document."""
        return max(self.lengths())

    def draw(self, rng):
        """One document, as `data.lay_out` takes it. rng: numpy Generator."""
        document = self.pairs.documents[rng.integers(len(self.pairs.documents))]
        words = [part for part in document if isinstance(part, str)]
        pictures = [part for part in document if not isinstance(part, str)]
        # Paper: §4.1. A caption and its picture stand in either order.
        if len(words) == len(pictures) == 1:
            caption_first = rng.random() < self.caption_first
            return one_pair(words[0], pictures[0], caption_first, rng, self.drop, self.t_limit,
                            self.noisiest)

        laid = []
        last = len(document) - 1
        for k, part in enumerate(document):
            if isinstance(part, str):
                # As in sample.drop_caption: the words since the last picture.
                before_picture = k < last
                if before_picture and rng.random() < self.drop:
                    part = ("dropped", part)
                laid.append(part)
                continue
            # Paper: App. B.2. What follows cannot be learned from a picture that is all noise.
            # Our choice: inside a document a picture is both drawn and read. So it has the limit
            # in as many cases as a picture of a pair has: where no caption comes first.
            must_be_seen = k < last and (k == 0 or rng.random() >= self.caption_first)
            laid.append(("image", part, self.t_limit if must_be_seen else self.noisiest))
        return laid
