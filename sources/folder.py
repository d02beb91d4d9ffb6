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
READ NEXT   pairs.py        TEST  tests/test_sources.py
"""
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sources.pairs import Pairs, clean_caption, print_skipped, split_items
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
    names = []
    captions = []
    lines = []
    pixels = []
    skipped = []                                        # a sentence for each
    for number, (name, text) in tqdm(records, desc=f"reading {folder}", leave=False):
        line = f"{path} line {number}"
        try:
            caption = clean_caption(text, line)
            pixels.append(open_picture(path.parent / name, size))
        except UserError as problem:
            skipped.append(str(problem))
        else:
            names.append(name)
            captions.append(caption)
            lines.append(line)
    print_skipped(folder, skipped, len(records), "pictures")

    chosen = split_items(folder, names, split, "pictures with captions")
    return Pairs(
        "folder",
        [captions[k] for k in chosen],
        np.stack([pixels[k] for k in chosen]),
        # The words of both splits must be known: the test split's gap is measured during training.
        language=captions,
        lines=[lines[k] for k in chosen],
    )
