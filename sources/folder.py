"""
folder.py: a folder of your own pictures                                   (Transfusion §4.1 "Data")

THE IDEA    Pictures, and one text file that says which caption belongs to which. What is bad is
            counted, named and skipped: one broken file among thousands must not end a run.
A PICTURE   my_pictures/  cat.jpg  dog.png  captions.jsonl: {"image": "cat.jpg", "caption": "a cat"}
                                                            {"image": "dog.png", "caption": "a dog"}
SHAPES      pixels (N, size, size, 3) uint8
PAPER/HERE  same: pictures are cropped at the centre and resized to a square.
            our choice: a tenth of the pictures, by a hash of their names, is the test split. The
            pairs come in a random order, which is always the same.
READ NEXT   pairs.py        TEST  tests/test_picture_folder.py
"""
from pathlib import Path

import numpy as np

from sources.pairs import Pairs, clean_caption, read_usable, split_items
from support.common import UserError, open_picture, read_records


def load_folder(folder=None, size=32, split="train", **unused):
    """Pairs of a folder of pictures with captions.jsonl.

    folder      the folder
    size        pixels per side
    split       "train" or "test"
    Raises UserError if the file is missing or broken, or if too few pairs are left."""
    if folder is None:
        raise UserError("--data folder needs --data-dir: the folder with captions.jsonl")
    path = Path(folder) / "captions.jsonl"
    records = read_records(path, ("image", "caption"))

    def read(record, line):
        name, text = record
        caption = clean_caption(text, line)
        return name, caption, open_picture(path.parent / name, size)

    items, lines = read_usable(folder, path, records, read, "pictures")
    names = [name for name, _, _ in items]
    captions = [caption for _, caption, _ in items]
    chosen = split_items(folder, names, split, "pictures with captions")
    return Pairs(
        "folder",
        [captions[k] for k in chosen],
        np.stack([items[k][2] for k in chosen]),
        # The words of both splits must be known: the test split's gap is measured during training.
        language=captions,
        lines=[lines[k] for k in chosen],
    )
