"""
choose.py: a source by its name                                                     (Transfusion §4.1 "Data")

THE IDEA    train.py, evaluate.py and the VAE's training know a data set by its name. To add one of your own, write a function
            that returns Pairs (pairs.py) and name it here.
READ NEXT   pairs.py        TEST  tests/test_sources.py
"""
from pathlib import Path

from sources import edits, scenes
from sources.folder import load_folder
from sources.mnist import load_mnist
from sources.scenes import load_scenes
from support.common import UserError


def load_pairs(name, folder=None, size=32, split="train", n=20000, seed=0, categories=scenes.WORLDS["six"], progress=True):
    """Pairs by the name of their source: "scenes" (n of them, drawn from the seed), "mnist" or "folder".
    Raises UserError if the files are missing or broken."""
    if name == "scenes":
        stream = ("train", "test").index(split)             # splits differ by their stream of random numbers
        return load_scenes(n, [seed, stream], categories, size, progress=progress)
    if name == "mnist":
        return load_mnist(folder and Path(folder), split)
    if folder is None:
        raise UserError("--data folder needs --data-dir: the folder with captions.jsonl")
    return load_folder(folder, size, split)


def load_source(config, split="train", n=None, progress=True):
    """The Pairs, or Edits, that a config.Config names. n: how many, in place of config.pairs."""
    n = n or config.pairs
    folder = config.data_dir or None
    if config.data == "edits":
        return edits.load_edits(folder, config.image_size, split, n, config.seed)
    return load_pairs(config.data, folder, config.image_size, split, n, config.seed,
                      scenes.WORLDS[config.world], progress=progress and split == "train")
