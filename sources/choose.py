"""
choose.py: a source by its name                                            (Transfusion §4.1 "Data")

THE IDEA    train.py, evaluate.py and the VAE's training know a data set by its name. To add one of
            your own, write a function that returns Pairs (pairs.py) and name it in SOURCES.
A PICTURE   def load_bars(size=32, split="train", **unused):
                ...
                return Pairs("bars", captions, pixels, judge=reads_as)
            SOURCES = {..., "bars": load_bars}        python train.py --data bars --preset flow
            No preset is made for it, so name one. flow's VAE learns for 400 steps; folder's is for
            photographs, and learns for 4,500 before the first of --steps.
THE RULE    A source is called with all of these by name, and takes those that it needs:
              folder      where its files lie, or None      split   "train" or "test"
              size        pixels per side                   n       how many, if it draws them
              categories  kinds of caption (scenes)         seed    of its random numbers
              progress    whether to show bars
READ NEXT   pairs.py        TEST  tests/test_sources.py
"""
from pathlib import Path

from sources.documents import load_documents
from sources.edits import load_edits
from sources.folder import load_folder
from sources.mnist import load_mnist
from sources.scenes import WORLDS, load_split
from support.common import UserError

# Every command that has --data reads its choices from here.
SOURCES = {
    "scenes": load_split,
    "mnist": load_mnist,
    "folder": load_folder,
    "documents": load_documents,                        # Mixtures in place of Pairs
    "edits": load_edits,                                # Edits in place of Pairs
}
# What a folder of your own is known by.
OWN_FILES = {"folder": "captions.jsonl", "documents": "documents.jsonl", "edits": "edits.jsonl"}


def load_pairs(name, folder=None, size=32, split="train", n=20000, seed=0,
               categories=WORLDS["six"], progress=True):
    """Pairs, or Edits, by the name of their source: see THE RULE. Raises UserError for a name that
    is not in SOURCES, for a folder that would not be read, and if files are missing or broken."""
    if name not in SOURCES:
        raise UserError(f"there is no data set {name!r}: choose from {', '.join(SOURCES)}, or add "
                        f"yours to SOURCES in sources/choose.py")
    if folder:
        check_folder(name, folder)
    return SOURCES[name](folder=folder, size=size, split=split, n=n, seed=seed,
                         categories=categories, progress=progress)


def check_folder(name, folder):
    """Raise UserError if a folder is not read for these data, but would be for others."""
    if name == "scenes":
        raise UserError(f"scenes are drawn here and read from no --data-dir: say what is in "
                        f"{folder}, e.g. --data folder, or --data shards if it is packed")
    if name in OWN_FILES and not (Path(folder) / OWN_FILES[name]).exists():
        for other, file in OWN_FILES.items():
            if (Path(folder) / file).exists():
                raise UserError(f"{folder} has no {OWN_FILES[name]} but {file}: use --data {other}")


def load_source(config, split="train", n=None, progress=True):
    """The Pairs, or Edits, that a config.Config names. n: how many, in place of config.pairs."""
    return load_pairs(
        config.data,
        folder=config.data_dir or None,
        size=config.image_size,
        split=split,
        n=n or config.pairs,
        seed=config.seed,
        categories=WORLDS[config.world],
        progress=progress and split == "train",         # the test split takes a second
    )
