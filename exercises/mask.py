"""
mask.py: the check of `intervals`                                   (attention_mask.py, exercise 1)

THE IDEA    Try the answer on rows that have one of everything: two documents, pictures that touch,
            a picture at the start and one at the end, a picture of one patch, padding. The right
            interval of each position is known. So a wrong one is first named by its kind: which
            positions are wrong, and what do they have in common?
A PICTURE   . text   0 1 2 patches of pictures 0, 1, 2   | a new document   : padding
            ..000.|1.223333.|4.555
PROPERTIES  in the order in which they are looked at: see PROPERTIES, below
READ NEXT   ../attention_mask.py        TEST  ../tests/test_exercises.py
"""
from dataclasses import dataclass

import torch

from attention_mask import intervals
from exercises.trial import Advice, need_several, need_shape, need_tensor

# The last document of a row may be padding, which is text with a number of its own.
ROWS = (
    "..000.|1.223333.|4.555",
    "66..|.7.8888..|99aa|:::",
    "....................",
)
PADDING = 17                                            # where ":::" starts, in row 1


def read_layout(rows):
    """(image_id, doc_id), each (B, T) int64, of rows as drawn above."""
    image_id = []
    doc_id = []
    for row in rows:
        pictures = []
        documents = []
        for number, document in enumerate(row.split("|")):
            pictures += [int(cell, 36) if cell.isalnum() else -1 for cell in document]
            documents += [number] * len(document)
        image_id.append(pictures)
        doc_id.append(documents)
    return torch.tensor(image_id), torch.tensor(doc_id)


@dataclass
class Seen:
    """What the answer says of one layout, beside what is right. All (B, T).

    lo, hi                  the answer's
    right_lo, right_hi      the module's
    causal_lo, causal_hi    the answer's with bidirectional=False
    pos                     the position itself
    is_patch                bool
    first                   the first patch of q's picture; of text, q
    start, end              the first and the last position of q's document
    trial                   to ask more
    """
    lo: torch.Tensor
    hi: torch.Tensor
    right_lo: torch.Tensor
    right_hi: torch.Tensor
    causal_lo: torch.Tensor
    causal_hi: torch.Tensor
    pos: torch.Tensor
    is_patch: torch.Tensor
    first: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    trial: object

    def place(self, wrong):
        """Where something is wrong first, and what the answer says there. wrong: (B, T) bool."""
        b, q = wrong.nonzero()[0].tolist()
        kind = "a patch" if self.is_patch[b, q] else "text"
        said = f"{self.lo[b, q]} .. {self.hi[b, q]}"
        return f"(First in row {b}, at position {q}, {kind}: you say {said}.)"


def try_intervals(trial):
    """The answer, tried on ROWS."""
    image_id, doc_id = read_layout(ROWS)
    lo, hi = need_intervals(trial(image_id, doc_id), image_id)
    causal_lo, causal_hi = need_intervals(trial(image_id, doc_id, False), image_id)
    right_lo, right_hi = intervals(image_id, doc_id)
    pos = torch.arange(image_id.shape[1]).expand_as(image_id)

    # The module's function, asked about the row read backwards, says where a picture begins and
    # where a document ends.
    back_lo, back_hi = intervals(image_id.flip(1), doc_id.flip(1))
    last = image_id.shape[1] - 1
    return Seen(lo, hi, right_lo, right_hi, causal_lo, causal_hi, pos, image_id >= 0,
                first=(last - back_hi).flip(1), start=right_lo, end=(last - back_lo).flip(1),
                trial=trial)


def need_intervals(result, image_id):
    """(lo, hi) of a result, each (B, T) int64. Raises Advice for something else."""
    B, T = image_id.shape
    if isinstance(result, torch.Tensor) and result.shape == (B, T, T):
        raise Advice("You return a mask, a square for each row. Wanted are two numbers for each "
                     "position, (lo, hi): the first and the last position it may look at.")
    lo, hi = need_several(result, ("lo", "hi"))
    parts = []
    for name, part in (("`lo`", lo), ("`hi`", hi)):
        part = need_tensor(part, name, like="int")
        need_shape(part, (B, T), name)
        parts.append(part.long())
    return parts


# --------------------------------------------------------------------------------------- properties
def in_this_order(seen):
    """lo comes first, then hi"""
    swapped = torch.equal(seen.lo, seen.right_hi) and torch.equal(seen.hi, seen.right_lo)
    if swapped:
        return "Both are right, but in the wrong order: return (lo, hi)."


def looks_and_is_looked_at(seen):
    """The interval is what q may look at, not who may look at q"""
    # A column of the mask in place of a row. Who may look at q: the patches of its picture, from
    # the first one on, and all that follows.
    if torch.equal(seen.hi, seen.end) and torch.equal(seen.lo, seen.first):
        return ("q and k are exchanged: this is who may look *at* q, from its own picture to the "
                "end of the document. Wanted is at whom q may look.")


def allowed_and_blocked(seen):
    """The interval is what is allowed, not what is blocked"""
    # What is blocked lies on both sides of what is allowed, so an interval can only be one side.
    some = seen.right_hi < seen.end                     # where anything is blocked on the right
    after = (seen.lo == seen.right_hi + 1)[some].all()
    before = torch.equal(seen.hi, seen.right_lo - 1)
    if after or before:
        return ("The convention is inverted: these are the positions that q may *not* look at. "
                "Here lo .. hi is what is allowed.")


def or_not_and(seen):
    """A patch sees what came before OR its own picture, not AND"""
    # Words see nothing with AND, or only themselves: they are not asked. The patches tell.
    patch = seen.is_patch
    from_first = (seen.lo == seen.first)[patch].all()
    if from_first and (seen.hi == seen.pos)[patch].all():
        return ("A patch sees only what is before it AND in its own picture. The rule says OR: "
                "all of its document before it, and all of its own picture.")
    if from_first and (seen.hi == seen.right_hi)[patch].all():
        return ("A patch sees its own picture and nothing else. It must also see what came before "
                "the picture, such as its caption: lo is the start of the document.")


def pictures_of_any_size(seen):
    """Pictures may have any number of patches"""
    # All pictures of one model have P patches. But nothing here says so, and a third modality, or
    # a picture of another size, has another number.
    lengths = (seen.hi - seen.first + 1)[seen.is_patch].unique().tolist()
    if len(lengths) == 1 and lengths[0] > 1:
        return (f"All pictures are taken for {lengths[0]} patches long. They may differ: a picture "
                f"ends where its id changes.")


def sees_itself(seen):
    """lo <= q <= hi"""
    text = ~seen.is_patch
    padding = seen.start == PADDING
    # TRAP: a softmax over nothing is NaN (docs/PAPER.md §4.1). So this comes before what is seen.
    blind = (seen.lo > seen.pos) | (seen.hi < seen.pos)
    if not blind.any():
        return None
    if not (blind & ~padding).any():
        return ("Padding may look at nothing. A softmax over nothing is NaN, and spoils the whole "
                "batch: padding is a document like any other. " + seen.place(blind))
    if (seen.hi == seen.pos - 1)[text & (seen.pos > seen.start)].all():
        return "Each position must also see itself: k <= q, not k < q. " + seen.place(blind)
    from_0 = (seen.lo == 0).all()
    if from_0 and torch.equal(seen.hi, seen.right_hi - seen.right_lo):
        return ("You count from the start of each document. Count from the start of the row: "
                "`lo` and `hi` are places in it. " + seen.place(blind))
    if torch.equal(seen.lo, seen.right_lo + 1) and torch.equal(seen.hi, seen.right_hi + 1):
        return "Everything is one too large: positions count from 0."
    if torch.equal(seen.hi, seen.right_hi - seen.right_lo + 1):
        return ("hi is how many positions q sees. It must be the last one of them, a place in the "
                "row.")
    if (seen.hi == seen.first)[seen.is_patch].all():
        return "hi of a patch is the first patch of its picture, and must be the last one."
    return ("Here a position may not look at itself, so some softmax may be over nothing: "
            "lo <= q <= hi must hold everywhere. " + seen.place(blind))


def each_row_its_own(seen):
    """Each row of the batch has its own layout"""
    # Before the properties of single positions: with the rows mixed up, they would all be wrong,
    # and none of their sentences would fit.
    wrong = (seen.lo != seen.right_lo) | (seen.hi != seen.right_hi)
    same = torch.equal(seen.lo, seen.lo[:1].expand_as(seen.lo))
    same = same and torch.equal(seen.hi, seen.hi[:1].expand_as(seen.hi))
    if same and not wrong[0].any():
        return ("Every row gets the intervals of row 0. Each row has its own layout: work along "
                "dim 1 of all rows. " + seen.place(wrong))
    if wrong[0].any():
        return None
    T = seen.pos.shape[1]
    if (seen.lo[1:] >= T).any() or (seen.hi[1:] >= T).any():
        return ("From row 1 on your positions go beyond T: you count over the whole batch. Each "
                "row starts at 0 again. " + seen.place(wrong))
    # Row 0 has all that may be difficult, but padding.
    if (wrong & (seen.start != PADDING)).any():
        return ("Row 0 is right, and a later row is not, though nothing in it is more difficult: "
                "does something look at row 0 only? " + seen.place(wrong))


def restarts(seen):
    """lo is the start of q's own document"""
    wrong = seen.lo != seen.right_lo
    if not wrong.any():
        return None
    other = seen.lo < seen.right_lo
    if (seen.lo == 0).all():
        return ("lo is 0 everywhere, so documents that share a row see each other: lo starts "
                "anew with each document. " + seen.place(other))
    if (wrong == seen.is_patch).all() or not (wrong & ~seen.is_patch).any():
        return "lo is wrong for patches only: what came before the picture? " + seen.place(wrong)
    if (seen.lo == seen.right_lo - 1)[seen.right_lo > 0].all():
        return ("lo is one too small: it is the last position of the document before. "
                + seen.place(other))
    if (seen.lo == seen.pos)[~seen.is_patch].all():
        return ("A word sees only itself, and nothing that came before it: lo is the start of the "
                "document. " + seen.place(wrong))
    if other.any():
        return ("Here a position sees another document: lo must be the start of its own. "
                + seen.place(other))
    return ("Here a position does not see all that came before it in its document: does lo "
            "restart at pictures, or look back a few positions only? " + seen.place(wrong))


def hi_is_included(seen):
    """hi is the last position, and included"""
    if torch.equal(seen.hi, seen.right_hi + 1):
        return ("hi is one too large everywhere: here hi itself is included, unlike the end of a "
                "Python slice.")


def text_does_not_look_ahead(seen):
    """Text looks at nothing that comes later"""
    # A word that sees the next one learns to copy it: the loss falls to nothing, and the model
    # knows nothing. Four ways that lead there, the widest first.
    text = ~seen.is_patch
    ahead = text & (seen.hi > seen.pos)
    if not ahead.any():
        return None
    if torch.equal(seen.hi, seen.end):
        return ("Everything in a document sees everything: words must not see what comes next, or "
                "the model learns to copy it. " + seen.place(ahead))
    if (seen.hi == seen.pos + 1)[text].all():
        return ("hi of a word is one too large: hi is included, so it is q itself. "
                + seen.place(ahead))
    # Where the next position is a patch, this is BOI.
    T = seen.pos.shape[1]
    following = (seen.pos + 1).clamp(max=T - 1)
    before_picture = text & seen.is_patch.gather(1, following) & (seen.pos < seen.end)
    if not (ahead & ~before_picture).any():
        return ("The position right before a picture looks into it: the block is one too wide. "
                "BOI is text, and sees no patch. " + seen.place(ahead))
    # A prefix-LM: all that stands before a picture's end may look up to that end.
    ends = seen.is_patch.gather(1, seen.hi.clamp(0, T - 1))
    if ends[ahead].all():
        return ("This is a prefix-LM: words before a picture look ahead to its end. Only patches "
                "see ahead, and only in their own picture; a word has hi = q. " + seen.place(ahead))
    first_ones = ahead & ~ahead.roll(1, 1)
    like_before = (seen.hi == seen.hi.roll(1, 1))[ahead].all()
    if like_before and (seen.is_patch.roll(1, 1) & (seen.pos > 0))[first_ones].all():
        return ("Words after a picture are taken for more patches of it. Pictures may have any "
                "number of them: one ends where image_id changes. " + seen.place(ahead))
    return ("A word sees later words. Text has image_id -1, and -1 == -1: being equal is not "
            "enough, it must be a picture's. " + seen.place(ahead))


def own_picture_only(seen):
    """A patch sees no later picture"""
    beyond = seen.is_patch & (seen.hi > seen.right_hi)
    if not beyond.any():
        return None
    T = seen.pos.shape[1]
    if (seen.hi == seen.right_hi + 1)[beyond].all():
        return ("A patch sees one position too many, the one after its picture: EOI is text. "
                + seen.place(beyond))
    following = seen.is_patch.gather(1, (seen.right_hi + 1).clamp(max=T - 1))
    touching = following & (seen.right_hi < seen.end)
    if not (beyond & ~touching).any():
        return ("Two pictures that touch are taken for one: a picture ends where its id changes, "
                "not where text begins. " + seen.place(beyond))
    if seen.is_patch.gather(1, seen.hi.clamp(0, T - 1))[beyond].all():
        return ("A patch sees a later picture. `Both are patches` is not enough: they must be of "
                "the same picture. " + seen.place(beyond))
    return "A patch looks beyond the end of its picture, to text. " + seen.place(beyond)


def whole_picture(seen):
    """A patch sees its picture to the end"""
    short = seen.is_patch & (seen.hi < seen.right_hi)
    if not short.any():
        return None
    if torch.equal(seen.causal_hi, seen.right_hi):
        return "`bidirectional` is upside down: True lets the patches of a picture see each other."
    if (seen.hi == seen.pos)[seen.is_patch].all():
        return ("Causal inside pictures, too: a patch must see the later patches of its own "
                "picture. hi is the picture's last patch. " + seen.place(short))
    if (seen.hi == (seen.right_hi - 1).maximum(seen.pos))[seen.is_patch].all():
        return "A patch sees all of its picture but the last patch. " + seen.place(short)
    return "A patch does not see its picture to the end. " + seen.place(short)


def flag(seen):
    """With bidirectional=False pictures are read like words"""
    if torch.equal(seen.causal_lo, seen.right_lo) and torch.equal(seen.causal_hi, seen.pos):
        return None
    if torch.equal(seen.causal_hi, seen.hi) and torch.equal(seen.causal_lo, seen.lo):
        return ("`bidirectional` changes nothing. With bidirectional=False a patch is read like a "
                "word: hi = q.")
    return ("With bidirectional=False every position looks from the start of its document to "
            "itself, patches too.")


def as_the_module(seen):
    """The same as the module, in every row"""
    wrong = (seen.lo != seen.right_lo) | (seen.hi != seen.right_hi)
    if wrong.any():
        return "Not yet. " + seen.place(wrong)
    for rows in ((".",), ("000",), ("00|11", "....")):
        image_id, doc_id = read_layout(rows)
        lo, hi = need_intervals(seen.trial(image_id, doc_id), image_id)
        right_lo, right_hi = intervals(image_id, doc_id)
        if not (torch.equal(lo, right_lo) and torch.equal(hi, right_hi)):
            return (f"Right for long rows, wrong for the short {' and '.join(rows)} "
                    f"(digits are patches, dots are text). Does the end of the row end a picture, "
                    f"and its start begin a document?")


def refuses_other_shapes(seen):
    """ValueError if the shapes differ"""
    image_id, doc_id = read_layout(ROWS)
    raised = seen.trial.raised(image_id, doc_id[:1])
    if raised != "ValueError":
        return ("All right but for one thing: for doc_id of shape (1, T) beside image_id (3, T) "
                f"it raises {raised}, and must raise ValueError. Otherwise it broadcasts, and row "
                f"0 speaks for all.")


PROPERTIES = (
    in_this_order, looks_and_is_looked_at, allowed_and_blocked, or_not_and, each_row_its_own,
    pictures_of_any_size, sees_itself, restarts, hi_is_included, text_does_not_look_ahead,
    own_picture_only, whole_picture, flag, as_the_module, refuses_other_shapes,
)
