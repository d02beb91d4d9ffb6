"""
data.py: one sequence of words and pictures                   (Transfusion §3 "Data Representation", §4.1 "Data", App. B.2)

THE IDEA    A document is a list of words and pictures. Laid out, it is one row of tokens in which every picture takes as
            many places as it has patches, fenced by two special tokens, BOI and EOI. The same function lays out documents
            for training and prompts for sampling, so the two cannot drift apart.
A PICTURE   document   ["a red circle", picture 7]           (P = 4 patches here)

              pos      0     1    2    3      4     5    6    7    8    9     10
              tokens   <bos> a    red  circle <boi> .    .    .    .    <eoi> <eos>
              image_id -1    -1   -1   -1     -1    0    0    0    0    -1    -1
              learn    x     x    x    x                                x             next-word loss where x
                                                                                      (never from BOI, never from a patch)
THE RULES   Caption before picture in 80% of the pairs (§4.1). Text tokens : image patches = 1 : 1 (§4.1).
            Noise limit t <= 500 where a picture comes before its caption, else T = 1000 (App. B.2).
SHAPES      B rows, T positions, M pictures in the batch, P patches per picture; latents (M, c, h, w). All counting from 0.
PAPER/HERE  same: order, ratio, noise limit, the loss mask, several documents packed in a row.
            our choice: captions dropped in 10% of the caption-first documents, for guidance. A dropped caption keeps its
            length: each word becomes <drop>, so both branches of guidance have the same positions, and BOI stays.
            our choice: after each pair another may follow in the same document, to teach stories of several pictures.
            our choice: words in lower case, not sub-words; the vocabulary is that of the data and travels in the checkpoint.
READ NEXT   attention_mask.py        TRY IT  python data.py        NOTEBOOK notebooks/1_who_may_look_at_whom.ipynb
TEST        tests/test_data.py
"""
import difflib
from dataclasses import dataclass, field

import numpy as np
import torch

from support.common import UserError

SPECIAL = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<drop>", "<patch>")
PAD, BOS, EOS, BOI, EOI, DROP, PATCH = range(len(SPECIAL))


# -------------------------------------------------------------------------------------------------------------- tokenizer
class Words:
    """A tokenizer whose tokens are whole words, in lower case. words: any iterable of strings; ids 0-6 are the special tokens."""

    def __init__(self, words):
        self.vocabulary = list(SPECIAL) + sorted({word.lower() for word in words} - set(SPECIAL))
        self.ids = {word: k for k, word in enumerate(self.vocabulary)}

    def __len__(self):
        return len(self.vocabulary)

    def encode(self, text):
        """List of ids. Raises UserError for an unknown word, naming it and the nearest known one, or sixty, if none is near."""
        for word in text.lower().split():
            if word not in self.ids or word in SPECIAL:                 # "<boi>" in a prompt would forge the layout
                known = self.vocabulary[len(SPECIAL):]
                near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
                raise UserError(f"the word {word!r} is not in this model's vocabulary of {len(known)} words; " +
                                (f"the nearest known word is {near[0]!r}" if near else
                                 f"it knows {', '.join(known[:60])}{', ...' if len(known) > 60 else ''}"))
        return [self.ids[word] for word in text.lower().split()]

    def decode(self, ids):
        """The words of a list of ids, special tokens left out."""
        return " ".join(self.vocabulary[k] for k in ids if k >= len(SPECIAL))


class Pieces:
    """A SentencePiece model behind the interface of data.Words: its piece k has id len(SPECIAL) + k. model: the bytes of
    the .model file, which travel in the checkpoint. The model's own <s>, </s> stay unused: BOS and EOS do their work."""

    def __init__(self, model):
        try:
            import sentencepiece
        except ImportError:
            raise UserError("this tokenizer is a SentencePiece model: pip install sentencepiece") from None
        try:
            self.model, self.processor = model, sentencepiece.SentencePieceProcessor(model_proto=model)
            assert self.processor.get_piece_size()
        except (RuntimeError, AssertionError):
            raise UserError("the tokenizer's file is not a SentencePiece model: truncated, or of another kind?") from None
        self.vocabulary = list(SPECIAL) + [self.processor.id_to_piece(k) for k in range(self.processor.get_piece_size())]

    def __len__(self):
        return len(self.vocabulary)

    def encode(self, text):
        """List of ids. "<boi>" in a text is letters like any others: it cannot forge the layout."""
        return [len(SPECIAL) + k for k in self.processor.encode(text)]

    def decode(self, ids):
        """The text of a list of ids, special tokens left out."""
        return self.processor.decode([int(k) - len(SPECIAL) for k in ids if k >= len(SPECIAL)])


# ----------------------------------------------------------------------------------------------- document -> one sequence
@dataclass
class Sequence:
    """One laid-out document: tokens, image_id, learn (all length n; see the picture above), the index of each of its
    pictures, in reading order, and the noise that it may have."""
    tokens: list = field(default_factory=list)
    image_id: list = field(default_factory=list)
    has_loss: list = field(default_factory=list)
    images: list = field(default_factory=list)
    t_max: list = field(default_factory=list)
    t_min: list = field(default_factory=list)


def lay_out(document, tokenizer, patches, ends=True):
    """Sequence of a document. document: list of str (words) | ("image", index, t_max, t_min = 1) | ("dropped", str). In place
    of a str may stand the list of its ids (packed shards have those). tokenizer: Words, or shards.Pieces.
    patches: P, places per picture. `ends`: close with EOS (a prompt stays open). Transfusion §3."""
    out = Sequence()

    def put(tokens, image_id=-1, has_loss=True):
        out.tokens.extend(tokens)
        out.image_id.extend([image_id] * len(tokens))
        out.has_loss.extend([has_loss] * len(tokens))

    encode = lambda text: text if isinstance(text, list) else tokenizer.encode(text)
    put([BOS])
    for part in document:
        if isinstance(part, (str, list)):
            put(encode(part))
        elif part[0] == "dropped":                      # TRAP: no LM loss on a dropped caption, nor from the token before it
            out.has_loss[-1] = False
            put([DROP] * len(encode(part[1])), has_loss=False)
        else:
            put([BOI], has_loss=False)                     # Paper §3: no LM loss where the input is BOI: a picture comes next
            put([PATCH] * patches, image_id=len(out.images), has_loss=False)
            put([EOI])                                  # EOI is put there, never predicted: no patch learns a next token
            out.images.append(part[1])
            out.t_max.append(part[2])
            out.t_min.append(part[3] if len(part) > 3 else 1)
    if ends:
        put([EOS], has_loss=False)
    else:
        out.has_loss[-1] = False                           # a prompt has no next token to learn
    return out


@dataclass
class Batch:
    """What a training step sees. tokens, image_id, doc_id: (B, T) int64; image_id counts pictures over the whole batch,
    -1 is text; doc_id counts documents within a row, padding has the last one. learn: (B, T) bool, whether position q
    predicts token q+1. images, t_max, t_min: (M,) int64, picture indices and noise limits in reading order.
    latents, eps: (M, c, h, w) float32, t: (M,) int64 — filled in by train.draw_batch."""
    tokens: torch.Tensor
    image_id: torch.Tensor
    doc_id: torch.Tensor
    has_loss: torch.Tensor
    images: torch.Tensor
    t_max: torch.Tensor
    t_min: torch.Tensor
    latents: torch.Tensor | None = None
    t: torch.Tensor | None = None
    eps: torch.Tensor | None = None
    generator: torch.Generator | None = None            # random numbers of this micro-batch, for t and eps

    def to(self, device):
        """The same batch on another device."""
        return Batch(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()})


def first_fit(lengths, T):
    """Rows of T positions, each a list of the numbers of the documents in it, longest first; as many rows as it takes,
    so that no document is ever cut or lost. lengths: list of int. Raises UserError if one is longer than T."""
    rows, room = [], []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if lengths[number] > T:
            raise UserError(f"a document of {lengths[number]} tokens does not fit in a context of {T}: raise --seq-len")
        k = next((k for k, space in enumerate(room) if space >= lengths[number]), len(rows))
        if k == len(rows):
            rows.append([])
            room.append(T)
        rows[k].append(number)
        room[k] -= lengths[number]
    return rows


def pack(sequences, T):
    """Batch of sequences packed first-fit into rows of T positions. Raises UserError if one is longer than T."""
    return to_batch([[sequences[k] for k in row] for row in first_fit([len(seq.tokens) for seq in sequences], T)], T)


def to_batch(rows, T):
    """Batch of rows, each a list of sequences that fit in T positions together."""
    shape = (len(rows), T)
    tokens, image_id, doc_id = np.full(shape, PAD), np.full(shape, -1), np.zeros(shape, dtype=np.int64)
    has_loss, images, t_max, t_min = np.zeros(shape, dtype=bool), [], [], []
    for b, row in enumerate(rows):
        at = 0
        for d, seq in enumerate(row):
            span = slice(at, at + len(seq.tokens))
            ids = np.array(seq.image_id)
            tokens[b, span], has_loss[b, span], doc_id[b, span] = seq.tokens, seq.has_loss, d
            image_id[b, span] = np.where(ids >= 0, ids + len(images), -1)
            images += seq.images
            t_max += seq.t_max
            t_min += seq.t_min
            at = span.stop
        doc_id[b, at:] = len(row)                       # padding is a document of its own: no row of the mask is empty
    return Batch(*(torch.from_numpy(np.asarray(a)) for a in (tokens, image_id, doc_id, has_loss)),
                 *(torch.tensor(numbers, dtype=torch.long) for numbers in (images, t_max, t_min)))


# ------------------------------------------------------------------------------------------------- the stream of documents
def one_pair(caption, k, caption_first, rng, drop, t_limit, T):
    """The parts of a caption and its picture k, in their order: the rules of §4.1 and App. B.2. Either order, dropped or
    not, takes the same number of positions. rng: decides whether the caption is dropped, with probability `drop`."""
    if caption_first:
        return [("dropped", caption) if rng.random() < drop else caption, ("image", k, T)]
    return [("image", k, t_limit), caption]             # TRAP: the limit is for these only, and it is a maximum, not the t


@dataclass
class Documents:
    """Draws documents from pairs, a sources.Pairs. Every draw is a function of the generator it is given and of nothing else."""
    pairs: object
    patches: int                                        # P, to balance text and patches
    context: int = 96                                   # T: a document holds as many pairs as fit, four at most
    caption_first: float = 0.8                          # Paper §4.1
    t_limit: int = 500                                  # Paper App. B.2: noise limit of pictures that precede their caption
    T: int = 1000                                       # diffusion steps
    drop: float = 0.1                                   # our choice: share of captions dropped, for guidance
    another: float = 0.2                                # our choice: after each pair, the chance of one more in the document
    text_share: float = -1.0                            # documents of text alone; negative: as many as 1 : 1 asks for

    def pairs_odds(self):
        """[p(one pair), p(two), ...], each `another` times the one before; the last has the rest."""
        odds = [self.another ** k * (1 - self.another) for k in range(self.most - 1)]
        return odds + [1 - sum(odds)]

    def longest(self):
        """Positions of the longest document."""
        return 2 + self.most * self.pair

    def __post_init__(self):
        self.pair = max(len(caption.split()) for caption in self.pairs.captions) + self.patches + 2
        self.most = max(1, min(4, (self.context - 2) // self.pair))
        # Paper §4.1: text tokens and image patches 1 : 1. A pair brings more patches than words, and text alone evens it
        # out; its share s solves  s * text_len + (1-s) * pair_words = (1-s) * pair_patches.
        if not self.pairs.texts:
            self.text_share = 0.0                       # a source without text alone has only its captions
        elif self.text_share < 0:
            words = float(np.mean([len(c.split()) for c in self.pairs.captions[:5000]]))
            n = sum(k * p for k, p in enumerate(self.pairs_odds(), 1))
            pair_words, pair_patches = 2 + n * (words + 2), n * self.patches
            text_len = 2 + float(np.mean([len(text.split()) for group in self.pairs.texts for text in group]))
            gap = max(pair_patches - pair_words, 0.0)
            self.text_share = gap / (gap + text_len)

    def draw(self, rng):
        """One document, as `lay_out` takes it. rng: numpy Generator."""
        if rng.random() < self.text_share:
            group = self.pairs.texts[rng.integers(len(self.pairs.texts))]
            return [group[rng.integers(len(group))]]
        caption_first, document = rng.random() < self.caption_first, []
        for _ in range(1 + int(rng.choice(self.most, p=self.pairs_odds()))):
            k = int(rng.integers(len(self.pairs.captions)))
            document += one_pair(self.pairs.captions[k], k, caption_first, rng, self.drop, self.t_limit, self.T)
        return document


if __name__ == "__main__":
    tokenizer = Words(["a red circle"] + "a red circle".split())
    sequence = lay_out(["a red circle", ("image", 7, 1000)], tokenizer, patches=4)
    print("document  ['a red circle', picture 7]")
    rows = {
        "tokens": [tokenizer.vocabulary[token] for token in sequence.tokens],
        "image_id": sequence.image_id,
        "has_loss": ["x" if x else "" for x in sequence.has_loss],
    }
    for name, cells in rows.items():
        print(f"{name:9s}" + " ".join(f"{cell!s:8s}" for cell in cells))
