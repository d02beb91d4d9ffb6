"""
start.py: what a run takes over from the model that it starts from      (Transfusion §4.5, `--init`)

THE IDEA    Fine-tuning goes on with a trained model: its network, noise process, VAE and tokenizer
            stay. So the options that describe them are the checkpoint's. One thing may grow: the
            words of new data get new rows of the embedding table and of the head.
A PICTURE   words       a  cat  mat  on            a  black  cat  make  mat  on
            rows        0   1    2    3    -->     0    new   1    new   2    3
            The tokenizer keeps its words sorted, so rows move; each takes its word along.
THE RULE    Old words have the vectors, and as next words the scores, that they had.
            An option that the checkpoint decides is taken over. If the command line names another
            value, it is refused: it would be ignored.
PAPER/HERE  our choice: all of it. §4.5 fine-tunes with the same 32,000 pieces, which spell any
            word. Only whole words (data.Words) can be new.
READ NEXT   checkpoint.py        TEST  tests/test_start.py
"""
import dataclasses
import difflib

import torch
from torch import nn

import data
from model import SIZES
from support.common import UserError

# The options that a checkpoint decides, see `decided_by`.
DECIDED_BY_INIT = {"size", "encoder", "patch", "patch_position", "bidirectional", "stable",
                   "diffusion", "shift", "noise_skip"}


# ------------------------------------------------------------------------------- the run's options
def decided_by(start):
    """{option of config.Config: its value} for all that a checkpoint.Trained decides."""
    shape = start.model.config
    options = {
        "size": size_of(shape),
        "encoder": shape.encoder,
        "patch": shape.patch,
        "patch_position": shape.patch_position,
        "bidirectional": shape.bidirectional,
        "stable": shape.stable,
        "diffusion": start.diffusion.kind,
        "shift": start.diffusion.shift,
        "noise_skip": start.diffusion.noise_skip,
    }
    if start.kind != "transfusion":
        del options["patch"]                            # a code for every place, or no pictures
    return options


def size_of(shape):
    """The name of a ModelConfig's row of model.SIZES; its numbers, if there is no such row."""
    numbers = (shape.layers, shape.width, shape.heads)
    for name, row in SIZES.items():
        if row == numbers:
            return name
    return "{} layers of width {} with {} heads".format(*numbers)


def take_over(config, start):
    """Set the options of a run that its first checkpoint decides. Raises UserError for one that the
    command line names with another value.

    config    config.Config, changed in place          start    checkpoint.Trained of --init"""
    for name, value in decided_by(start).items():
        asked = getattr(config, name)
        if name in config.named and asked != value:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{config.init} has {option} {value}, not {asked}, and fine-tuning "
                            f"cannot change that: leave {option} out, or train a new model "
                            f"without --init")
        setattr(config, name, value)


# ---------------------------------------------------------------------------------------- new words
def add_words(start, words, seed):
    """Teach a checkpoint.Trained words, in place. Returns the list of those that are new to it.

    words    any iterable of str          seed    of the new rows"""
    old = start.tokenizer
    if isinstance(old, data.Pieces):                    # pieces spell every word
        return []
    tokenizer = data.Words([*old.vocabulary, *words])
    new = [word for word in tokenizer.vocabulary if word not in old.ids]
    if not new:
        return []

    # Where each row of the old model goes. A Chameleon's codes follow the last word.
    model = start.model
    codes = model.config.vocabulary - len(old)
    places = [tokenizer.ids[word] for word in old.vocabulary]
    places += range(len(tokenizer), len(tokenizer) + codes)
    # Our choice: new rows begin as those of a new model (Transfusion.init_weights). With a small
    # row of the head a new word is as likely as an old one that never fits.
    generator = torch.Generator().manual_seed(seed)
    total = len(tokenizer) + codes
    model.embedding.weight = widen(model.embedding.weight, total, places, 0.5, generator)
    model.head.weight = widen(model.head.weight, total, places, 0.02, generator)
    model.embedding.num_embeddings = total
    model.head.out_features = total
    model.config = dataclasses.replace(model.config, vocabulary=total)
    start.tokenizer = tokenizer
    return new


def widen(weight, total, places, std, generator):
    """A parameter of `total` rows (total, D). Row k of the old weight (n, D) is row places[k] of
    it. The others are drawn, with deviation std."""
    n, D = weight.shape
    wider = torch.randn(total, D, generator=generator) * std
    wider[places] = weight.detach()
    return nn.Parameter(wider)


def describe_words(new, tokenizer):
    """What the user should read about a list of new words: a misspelt one is new, too.
    tokenizer: data.Words that knows them."""
    known = [word for word in tokenizer.vocabulary if word not in new]
    names = []
    for word in new[:20]:
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
        names.append(f"{word} (not {near[0]}?)" if near else word)
    more = ", ..." if len(new) > 20 else ""
    return (f"{len(new)} words are new to this model: {', '.join(names)}{more}. They get new rows "
            f"of its table and of its head")
