"""
layout.py: the check of `lay_out`                                              (data.py, exercise 8)

THE IDEA    Lay out documents of growing difficulty. The first one that comes out wrong is the one
            to talk about: which tokens stand there, which of them are patches, which ask for the
            next one. Each list is compared place by place, and a wrong place has a name: BOI, the
            last patch, EOI.
A PICTURE   tokens     <bos>  a  red  circle  <boi>  .  .  .  .  <eoi>  <eos>
            image_id   -1    -1  -1   -1      -1     0  0  0  0  -1     -1
            has_loss   x      x  x    x                          x
PROPERTIES  in the order in which they are looked at: see PROPERTIES, below
READ NEXT   ../data.py        TEST  ../tests/test_exercises.py
"""
from dataclasses import dataclass

import torch

import data
from data import BOI, BOS, DROP, EOI, EOS, PATCH, lay_out
from exercises.trial import Advice, kind_of

FIELDS = ("tokens", "image_id", "has_loss", "images", "t_max", "t_min")
WORDS = data.Words("a red blue circle cross".split())
A_CIRCLE = [WORDS.ids[word] for word in ("a", "circle")]

# Name: (document, patches, ends). In the order of their difficulty.
DOCUMENTS = {
    "a caption and a picture":
        (["a red circle", ("image", 7, 1000)], 4, True),
    "a picture and its caption":
        ([("image", 3, 500), "a blue cross"], 3, True),
    "text alone":
        (["a red circle"], 4, True),
    # From here on image_id must count: with one picture 0 is always right.
    "two pictures":
        (["a circle", ("image", 5, 1000), "a cross", ("image", 2, 700)], 2, True),
    "two pictures and no text":
        ([("image", 4, 900), ("image", 6, 300)], 1, True),
    # What sampling lays out: a document that goes on.
    "a prompt, open at its end":
        (["a red"], 4, False),
    "a prompt that ends with a picture":
        (["a red", ("image", 1, 0)], 4, False),
    # What training lays out: words that are encoded already, and limits of t.
    "a caption as ids":
        ([A_CIRCLE, ("image", 7, 1000)], 4, True),
    "a picture with a t_min":
        (["a cross", ("image", 8, 1000, 1000)], 4, True),
    # For guidance.
    "a dropped caption":
        ([("dropped", "a red circle"), ("image", 7, 1000)], 4, True),
    "a dropped caption as ids":
        ([("dropped", A_CIRCLE), ("image", 7, 1000)], 4, True),
    "a dropped caption after a picture":
        (["a cross", ("image", 1, 1000), ("dropped", "a circle"), ("image", 2, 1000)], 2, True),
}


@dataclass
class Seen:
    """The answer's and the module's layout of one document: {field: list}."""
    name: str
    found: dict
    right: dict
    ends: bool

    def label(self, k):
        """What stands at place k, in words."""
        token = self.right["tokens"][k]
        if token == PATCH:
            return "a patch"
        if token >= len(data.SPECIAL):
            return f"the word {WORDS.vocabulary[token]!r}"
        return WORDS.vocabulary[token].strip("<>").upper()

    def at(self, token):
        """The places of a token."""
        tokens = self.right["tokens"]
        return [k for k, other in enumerate(tokens) if other == token]


def try_lay_out(trial):
    """The first document that the answer lays out wrongly, or the last one: a Seen."""
    for name, (document, patches, ends) in DOCUMENTS.items():
        # A copy: the student may change the list, which the trial says, but not ours.
        document = list(document)
        result = trial(document, WORDS, patches, ends)
        found = read_sequence(result)
        right = vars(lay_out(document, WORDS, patches, ends))
        seen = Seen(name, found, right, ends)

        # One document at a time: a second mistake is often the first one again.
        if found != right:
            break
    return seen


def read_sequence(result):
    """{field: list} of what should be a data.Sequence. Raises Advice for something else."""
    if result is None:
        raise Advice("Your function returns None: is `return` missing?")
    fields = ", ".join(FIELDS)
    found = {}
    for field in FIELDS:
        if not hasattr(result, field):
            raise Advice(f"Return a data.Sequence, with {fields}; you return {kind_of(result)} "
                         f"without `{field}`.")
        # A tensor or a tuple is as good as a list: the layout is the exercise, not its type.
        values = getattr(result, field)
        if isinstance(values, torch.Tensor):
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            raise Advice(f"`{field}` must be a list, but it is {kind_of(values)}.")
        found[field] = [number(value, field) for value in values]
    return found


def number(value, field):
    """A value of a field as int or bool. Raises Advice for something else."""
    if isinstance(value, str):
        raise Advice(f"`{field}` has the string {value!r} in it: words must be encoded, "
                     f"tokenizer.encode.")
    if isinstance(value, list) and field == "tokens":
        raise Advice(f"`{field}` has a list in it: extend it by the parts' ids, do not append the "
                     f"list.")
    try:
        return bool(value) if field == "has_loss" else int(value)
    except (TypeError, ValueError):
        raise Advice(f"`{field}` has {kind_of(value)} in it, and must have numbers.") from None


# --------------------------------------------------------------------------------------- properties
def right_tokens(seen):
    """The tokens: BOS, words, BOI, patches, EOI, EOS"""
    # What is missing is named before what is in a wrong place: without BOS all places are off.
    found = seen.found["tokens"]
    right = seen.right["tokens"]
    if found == right:
        return None
    where = f"(For {seen.name}: {spell(found)}; it should be {spell(right)}.)"

    # 1. The two ends.
    if BOS not in found or found[0] != BOS:
        return f"Each document begins with BOS. {where}"
    if found.count(BOS) > 1:
        return f"BOS stands at the start of the document only. {where}"
    if seen.ends and found[-1] != EOS:
        return f"EOS must end the document, if `ends`. {where}"
    if not seen.ends and EOS in found:
        return f"With ends=False the document stays open, so that it can go on: no EOS. {where}"
    if found.count(EOS) > right.count(EOS):
        return f"EOS stands at the end of the document only, not of each part. {where}"

    # 2. What stands around a picture, and its patches.
    if found.count(BOI) < right.count(BOI):
        return f"BOI must stand before each picture's patches. {where}"
    if found.count(EOI) < right.count(EOI):
        return f"EOI must stand after each picture's patches. {where}"
    too_many = found.count(EOI) > right.count(EOI) or found.count(BOI) > right.count(BOI)
    if too_many:
        return f"One BOI and one EOI for each picture, no more. {where}"
    other = {BOI: EOI, EOI: BOI}
    exchanged = [other.get(token, token) for token in found]
    if exchanged == right:
        return f"BOI and EOI are exchanged. {where}"
    if found.count(PATCH) != right.count(PATCH):
        return f"A picture takes `patches` places, each with the token PATCH. {where}"

    # 3. Captions that are dropped.
    if found.count(DROP) < right.count(DROP):
        if DROP in found:
            return f"A dropped caption has as many DROPs as it has words. {where}"
        return (f"A dropped caption must become DROPs, one for each of its words: both branches of "
                f"guidance then have equal positions. {where}")
    if found.count(DROP) > right.count(DROP) > 0:
        return ("A dropped caption has as many DROPs as it has words, or ids; yours has more: "
                f"len of a text counts its letters. {where}")

    # 4. All of them are there.
    if sorted(found) == sorted(right):
        return f"The tokens are right, but in another order: the parts come in theirs. {where}"
    return f"The tokens are not right yet. {where}"


def spell(tokens):
    """Tokens as words."""
    names = []
    for token in tokens[:16]:
        known = 0 <= token < len(WORDS)
        names.append(WORDS.vocabulary[token] if known else str(token))

    # A sentence with more than sixteen words in it is not read.
    if len(tokens) > 16:
        names.append("...")
    return " ".join(names)


def right_image_id(seen):
    """image_id: the number of the picture at its patches, -1 elsewhere"""
    found = seen.found["image_id"]
    right = seen.right["image_id"]
    if found == right:
        return None
    where = f"(For {seen.name}: {found}; it should be {right}.)"
    if len(found) != len(right):
        return f"image_id needs one number for each token. {where}"
    # TRAP: spans that are one position off (docs/PAPER.md §4.2). A BOI inside the block looks at
    # its picture; when sampling, BOI is there first.
    places = range(len(right))
    wrong = [k for k in places if found[k] != right[k]]
    boi = set(seen.at(BOI))
    eoi = set(seen.at(EOI))
    if set(wrong) <= boi:
        return ("BOI is no patch: it is text, image_id -1, and outside of the block that looks "
                f"both ways. {where}")
    if set(wrong) <= eoi:
        return f"EOI is no patch: it is text, image_id -1, and comes after the block. {where}"
    if set(wrong) <= boi | eoi:
        return f"BOI and EOI are no patches: they are text, image_id -1. {where}"

    # All text is 0: the usual start of a list of zeros.
    of_text = [found[k] for k in places if right[k] == -1]
    if not any(of_text):
        return f"Text has image_id -1; 0 is the first picture. {where}"

    # Only patches are wrong: how were the pictures counted?
    only_patches = all(right[k] >= 0 for k in wrong)
    if only_patches and all(found[k] == right[k] + 1 for k in wrong):
        return f"Pictures count from 0, in each document anew. {where}"
    images = seen.right["images"]
    if only_patches and all(found[k] == images[right[k]] for k in wrong):
        return ("image_id counts the pictures of this document, 0, 1, ...; you have the picture's "
                f"index in the data set, which belongs to `images`. {where}")
    if set(found) <= {-1, 0} and max(right) > 0:
        return f"All pictures have image_id 0, so their patches would see each other. {where}"
    first = wrong[0]
    return f"image_id is wrong at {seen.label(first)}, place {first}. {where}"


def right_has_loss(seen):
    """has_loss: whether a position predicts the next token"""
    found = seen.found["has_loss"]
    right = seen.right["has_loss"]
    if found == right:
        return None
    marks = "".join("x" if mark else "." for mark in found)
    wanted = "".join("x" if mark else "." for mark in right)
    where = f"(For {seen.name}: {marks}; it should be {wanted}.)"
    if len(found) != len(right):
        return f"has_loss needs one bool for each token. {where}"
    tokens = seen.right["tokens"]
    following = [*tokens[1:], None]                     # what comes next at each place
    places = range(len(right))
    extra = [k for k in places if found[k] and not right[k]]
    missing = [k for k in places if right[k] and not found[k]]
    last = len(right) - 1

    # 1. Two mistakes about all of them.
    if not any(found):
        return f"No position predicts anything: then no word is ever learned. {where}"
    if [not mark for mark in found] == right:
        return f"It is the other way round: True where a position predicts. {where}"
    if found == [False, *right[:-1]]:
        return ("You mark the tokens that are predicted. Mark those that predict: position q has "
                f"the loss of token q + 1. {where}")

    # 2. Where there must be none.
    if any(tokens[k] == BOI for k in extra):
        return ("BOI has no LM loss: a patch comes next, and that is the diffusion's business. "
                f"{where}")
    if any(tokens[k] == PATCH for k in extra):
        return ("A patch has no LM loss, not even the last one: EOI is appended when the diffusion "
                f"is done, and nothing predicts it. {where}")
    if any(tokens[k] == DROP for k in extra):
        return f"A dropped caption has no LM loss, or the model learns to write DROP. {where}"
    if any(following[k] == DROP for k in extra):
        return ("The token before a dropped caption must not learn to predict DROP: it has no loss "
                f"either. {where}")
    if last in extra:
        return f"The last token has nothing to predict: no loss there. {where}"

    # 3. Where there must be one.
    special = len(data.SPECIAL)
    words = [k for k in places if right[k] and tokens[k] >= special]
    if len(words) > 1 and set(words) <= set(missing):
        return ("Words have no loss here, so the model never learns to write: each predicts what "
                f"comes next. {where}")
    if any(tokens[k] == EOI for k in missing):
        return ("EOI predicts what follows the picture, a word, BOI or EOS: it has an LM loss. "
                f"{where}")
    if any(tokens[k] == BOS for k in missing):
        return f"BOS predicts the first word, or BOI: it has an LM loss. {where}"
    if any(following[k] == BOI for k in missing):
        return ("The word before BOI predicts it: that is how the model decides to draw. It has an "
                f"LM loss. {where}")
    if any(following[k] == EOS for k in missing):
        return f"The word before EOS predicts it: it has an LM loss. {where}"
    wrong = (extra + missing)[0]
    return f"has_loss is wrong at {seen.label(wrong)}, place {wrong}. {where}"


def right_pictures(seen):
    """images, t_max, t_min: one number per picture"""
    for field in ("images", "t_max", "t_min"):
        found = seen.found[field]
        right = seen.right[field]
        if found == right:
            continue
        where = f"(For {seen.name}: {found}; it should be {right}.)"
        if field == "t_min":
            return ('t_min is the fourth entry of ("image", index, t_max, t_min), and 1 if '
                    f"there is none. {where}")
        if len(found) != len(right):
            return f"`{field}` needs one entry for each picture of the document. {where}"
        if found == list(range(len(right))):
            return (f"`{field}` must have the pictures' indices in the data set, the second "
                    f'entry of ("image", index, t_max). {where}')
        return f'`{field}` is not what ("image", index, t_max) says. {where}'


PROPERTIES = (right_tokens, right_image_id, right_has_loss, right_pictures)
