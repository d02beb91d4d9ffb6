"""
sources.py: captioned pictures, wherever they come from                 (Transfusion §4.1 "Data", "Latent Image Representation")

THE IDEA    All that training and measuring ask of a data set is a list of captions and an array of pictures. So a source is a
            function that returns those two, and a new data set is a new function.
A PICTURE   scenes: drawn from a seed        --+
            mnist:  four idx files           --+-->  Pairs(captions: N str, pixels: (N, h, w, 3 or 1) uint8)
            folder: pictures, captions.jsonl --+
PAPER/HERE  same: pictures are cropped at the centre and resized to a square.
            here: these sources fit in memory; a trillion tokens do not, and are packed to disk first (streams.py, pack.py).
READ NEXT   data.py, which makes documents of them      TRY IT  python sources.py      TEST  tests/test_sources.py
"""
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sources.pairs import Pairs
from support.common import UserError, open_picture, read_lines


def load_folder(folder, size=32, split="train"):
    """Pairs of a folder of pictures with captions.jsonl: one {"image": "cat.jpg", "caption": "a cat"} per line.
    Every tenth pair is the test split. Pictures that cannot be read are counted, named and skipped."""
    path = Path(folder) / "captions.jsonl"
    lines = read_lines(path, '{"image": file name, "caption": words}')
    captions, pixels, bad = [], [], []
    for number, line in tqdm(lines, desc=f"reading {folder}", leave=False):
        try:
            entry = json.loads(line)
            name, caption = entry["image"], " ".join(entry["caption"].lower().split())
            path.parent / name                          # a name that is no string is the same kind of mistake
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} line {number} is not {{\"image\": ..., \"caption\": ...}}: {line[:60]!r}") from None
        try:
            pixels.append(open_picture(path.parent / name, size))
            captions.append(caption)
        except UserError as problem:
            bad.append(str(problem))
    if bad:
        print(f"{folder}: skipped {len(bad)} of {len(lines)} pictures: {'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}")
    keep = [k for k in range(len(captions)) if (k % 10 == 9) == (split == "test")]
    if not keep:
        raise UserError(f"{folder} has no usable {split} pair: it needs at least ten readable pictures with captions")
    return Pairs("folder", [captions[k] for k in keep], np.stack([pixels[k] for k in keep]), language=captions)
