"""
data.py: a document becomes one sequence     (Transfusion §3 "Data Representation", §4.1, App. B.2)

THE IDEA    A document is a list of words and pictures. Laid out, it is one row of tokens. A picture
            takes as many positions as it has patches, between two special tokens, BOI and EOI. The
            same function lays out documents for training and prompts for sampling, so the two
            cannot drift apart.
A PICTURE   document   ["a red circle", picture 7]           (P = 4 patches here)

            pos        0      1  2    3       4      5  6  7  8  9      10
            tokens     <bos>  a  red  circle  <boi>  .  .  .  .  <eoi>  <eos>
            image_id   -1    -1  -1   -1      -1     0  0  0  0  -1     -1
            has_loss   x      x  x    x                          x

            x: this position predicts the next token. BOI does not, and no patch does.
THE RULES   Caption before picture in 80% of the pairs (§4.1).
            Text tokens : image patches = 1 : 1 (§4.1).
            A picture before its caption has noise t <= 500, any other t <= 1000 (App. B.2).
SHAPES      B rows, T positions, M pictures in the batch, P patches per picture;
            latents (M, c, h, w). All counting starts at 0.
PAPER/HERE  same: order, ratio, noise limit, the loss mask.
            our choice: several documents share a row; none is cut.
            our choice: captions are dropped in 10% of the caption-first pairs, for guidance. Each
            word becomes <drop> and BOI stays, so both branches of guidance have equal positions.
            our choice: after each pair another may follow in the same document, to teach stories
            of several pictures.
            our choice: the toys have whole words in lower case, not sub-words. The vocabulary is
            that of the data and travels in the checkpoint. Packed shards may have Llama's pieces.
READ NEXT   attention_mask.py
TRY IT      python data.py
NOTEBOOK    notebooks/0_one_sequence_one_forward.ipynb
TEST        tests/test_data.py
"""
import difflib
import itertools
from dataclasses import dataclass, field

import numpy as np
import torch

from support.common import UserError, end_with_the_reader

# Ids 0 to 6 in every vocabulary. Words, or pieces, follow from 7 on.
SPECIAL = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<drop>", "<patch>")
PAD, BOS, EOS, BOI, EOI, DROP, PATCH = range(len(SPECIAL))


# -------------------------------------------------------------------------------------- tokenizers
class Words:
    """A tokenizer whose tokens are whole words, in lower case. words: any iterable of strings."""

    # Differs from the paper: §4.1 has Llama 2's pieces. The toys know some forty words; a table of
    # 32,000 pieces would be most of their parameters. Pieces, below, is for larger data.

    def __init__(self, words):
        known = {word.lower() for word in words} - set(SPECIAL)
        # Sorted, because a set has another order in every process, and ids must not change.
        self.vocabulary = list(SPECIAL) + sorted(known)
        self.ids = {word: k for k, word in enumerate(self.vocabulary)}

    def __len__(self):
        return len(self.vocabulary)

    def encode(self, text):
        """List of ids of a text. Raises UserError for an unknown word, see `check_words`."""
        words = text.lower().split()
        self.check_words(words)
        return [self.ids[word] for word in words]

    def decode(self, ids):
        """The words of a list of ids, special tokens left out."""
        return " ".join(self.vocabulary[k] for k in ids if k >= len(SPECIAL))

    def check_words(self, words):
        """Raise UserError for the first unknown word. The sentence names the nearest known word,
        or the first sixty words, if none is near."""
        for word in words:
            # A special token is unknown too: "<boi>" in a prompt would forge the layout.
            if word in self.ids and word not in SPECIAL:
                continue
            known = self.vocabulary[len(SPECIAL):]
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
            if near:
                help = f"the nearest known word is {near[0]!r}"
            else:
                more = ", ..." if len(known) > 60 else ""
                help = f"it knows {', '.join(known[:60])}{more}"
            raise UserError(f"the word {word!r} is not in this model's vocabulary of "
                            f"{len(known)} words; {help}")


class Pieces:
    """A SentencePiece model, such as Llama 2's, with the methods of Words.

    model: the bytes of the .model file; they travel in the checkpoint.
    Raises UserError if sentencepiece is not installed, or if the bytes are something else."""

    # Paper: §4.1 uses the Llama 2 tokenizer, 32,000 pieces. Its piece k has id 7 + k here. Its own
    # <s> and </s> stay unused, because BOS and EOS do their work.

    def __init__(self, model):
        # Imported here, because only those who have such a model need it.
        try:
            import sentencepiece
        except ImportError:
            raise UserError("this tokenizer is a SentencePiece model: "
                            "pip install sentencepiece") from None
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            n = self.processor.get_piece_size()
            pieces = [self.processor.id_to_piece(k) for k in range(n)]
        except (RuntimeError, UnicodeDecodeError):
            pieces = []
        if not pieces:                                  # of no bytes at all the library makes this
            raise UserError("the tokenizer's file is not a SentencePiece model: "
                            "truncated, or of another kind?")
        self.model = model
        self.vocabulary = [*SPECIAL, *pieces]

    def __len__(self):
        return len(self.vocabulary)

    def encode(self, text):
        """List of ids of a text. "<boi>" in it is five letters: it cannot forge the layout."""
        return [len(SPECIAL) + k for k in self.processor.encode(text)]

    def decode(self, ids):
        """The text of a list of ids, special tokens left out."""
        pieces = [int(k) - len(SPECIAL) for k in ids if k >= len(SPECIAL)]
        return self.processor.decode(pieces)


def count_tokens(tokenizer, text):
    """How many tokens a text has; how many words, if tokenizer is None."""
    return len(tokenizer.encode(text) if tokenizer else text.split())


# ------------------------------------------------------------------------ document -> one sequence
@dataclass
class Sequence:
    """One laid-out document of n tokens and m pictures; see the picture above.

    tokens      n ids
    image_id    n numbers: which picture of this document a position is a patch of, -1 for text
    has_loss    n bools: whether the position predicts the next token
    images      m indices: which pictures of the data set these are, in reading order
    t_max       m numbers: the most noise that the picture may have
    t_min       m numbers: the least
    """
    tokens: list = field(default_factory=list)
    image_id: list = field(default_factory=list)
    has_loss: list = field(default_factory=list)
    images: list = field(default_factory=list)
    t_max: list = field(default_factory=list)
    t_min: list = field(default_factory=list)

    def add(self, tokens, image_id=-1, has_loss=True):
        """Append tokens that are all of one kind. tokens: list of ids."""
        self.tokens.extend(tokens)
        self.image_id.extend([image_id] * len(tokens))
        self.has_loss.extend([has_loss] * len(tokens))


def lay_out(document, tokenizer, patches, ends=True):
    """The Sequence of a document: its tokens, and where the LM loss is. BOI has none, see "3. A
    picture" below. Transfusion §3.

    document    a list of parts. A part is one of
                    "a red circle"                  words
                    [13, 9, 8]                      their ids, which packed shards have
                    ("dropped", "a red circle")     a caption that guidance leaves out; or its ids
                    ("image", index, t_max)         a picture of the data set; its t is 1 .. t_max
                    ("image", index, t_max, t_min)  the same, but its t is t_min .. t_max
    tokenizer   Words or Pieces
    patches     P, positions per picture
    ends        whether to close with EOS; a prompt stays open"""

    def encode(text):
        return text if isinstance(text, list) else tokenizer.encode(text)

    out = Sequence()
    out.add([BOS])

    for part in document:
        # 1. Words. Each predicts what follows it: another word, EOS, or BOI.
        if isinstance(part, (str, list)):
            out.add(encode(part))

        # 2. A dropped caption.
        # Our choice: as many <drop> as it has words, and BOI stays. So the picture has the same
        # position with its caption and without. Guidance compares the two.
        elif part[0] == "dropped":
            # TRAP: no LM loss on a dropped caption, nor at the token before it. Otherwise the model
            # learns to write <drop>.
            out.has_loss[-1] = False
            out.add([DROP] * len(encode(part[1])), has_loss=False)

        # 3. A picture.
        else:
            # Paper: §3. BOI is predicted, but has no LM loss of its own: a patch comes next.
            out.add([BOI], has_loss=False)
            out.add([PATCH] * patches, image_id=len(out.images), has_loss=False)
            # Paper: §3. EOI is appended when the diffusion is done. So nothing predicts it, not
            # even the last patch; but it does predict what follows the picture.
            out.add([EOI])
            kind, index, t_max, *t_min = part
            t_range_is_empty = t_min and t_min[0] > t_max
            if kind != "image" or t_range_is_empty:
                raise ValueError(f'wanted ("image", index, t_max, t_min) with t_min <= t_max, or '
                                 f'("dropped", caption), got {part}')
            out.images.append(index)
            out.t_max.append(t_max)
            out.t_min.append(t_min[0] if t_min else 1)

    # The last token has nothing to predict.
    if ends:
        out.add([EOS], has_loss=False)
    else:
        out.has_loss[-1] = False
    return out


# --------------------------------------------------------------------------- sequences -> one batch
@dataclass
class Batch:
    """What a training step sees.

    tokens      (B, T) int64
    image_id    (B, T) int64, which picture of the whole batch a position is a patch of, -1 for text
    doc_id      (B, T) int64, which document of its row; padding is one more document
    has_loss    (B, T) bool, whether position q predicts token q + 1
    images      (M,) int64, indices of the pictures in the data set, in reading order
    t_max       (M,) int64, the most noise that each may have
    t_min       (M,) int64, the least
    latents     (M, c, h, w) float32, filled in by the feed
    t, eps      (M,) int64 and (M, c, h, w) float32, the noise, filled in by train.draw_noise
    generator   where t and eps of this micro-batch are drawn from
    """
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
    generator: torch.Generator | None = None

    def to(self, device):
        """The same batch on another device; the generator stays where it is."""
        to_gpu = torch.device(device).type == "cuda"
        moved = dict(vars(self))
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                if to_gpu:                              # from there it travels while Python goes on
                    value = value.pin_memory()
                moved[name] = value.to(device, non_blocking=to_gpu)
        return Batch(**moved)


def first_fit(lengths, T):
    """Rows of T positions, each a list of the numbers of the documents in it.

    The longest document goes first, each into the first row that has room for it. There are as many
    rows as it takes, so that no document is cut or lost. lengths: list of int.
    Raises UserError if one is longer than T."""
    if max(lengths, default=0) > T:
        raise UserError(f"a document of {max(lengths)} tokens does not fit in a context of {T}: "
                        f"raise --seq-len")
    rows = []
    # What is left of each row. numpy asks all rows at once: a packed shard has a thousand.
    room = np.full(len(lengths), T)
    for number in sorted(range(len(lengths)), key=lambda k: lengths[k], reverse=True):
        has_room = room[: len(rows) + 1] >= lengths[number]     # the last of these is a new row
        first = int(has_room.argmax())                          # the first True
        if first == len(rows):
            rows.append([])
        rows[first].append(number)
        room[first] -= lengths[number]
    return rows


def pack(sequences, T):
    """The Batch of sequences, packed into rows of T positions by `first_fit`.
    Raises UserError if one is longer than T."""
    # Our choice: several documents share a row, as many as fit. One document per row would leave
    # half of the toys' positions to padding. The mask keeps the documents apart.
    lengths = [len(sequence.tokens) for sequence in sequences]
    rows = []
    for numbers in first_fit(lengths, T):
        rows.append([sequences[k] for k in numbers])
    return to_batch(rows, T)


def to_batch(rows, T):
    """The Batch of rows, each a list of sequences that fit in T positions together."""
    # 1. Rows of padding, which nothing learns from. In numpy, which takes small lists faster.
    shape = (len(rows), T)
    tokens = np.full(shape, PAD)
    image_id = np.full(shape, -1)
    doc_id = np.zeros(shape, dtype=np.int64)
    has_loss = np.zeros(shape, dtype=bool)
    images = []
    t_max = []
    t_min = []

    # 2. The documents, one after another.
    for b, row in enumerate(rows):
        start = 0
        for d, sequence in enumerate(row):
            span = slice(start, start + len(sequence.tokens))
            tokens[b, span] = sequence.tokens
            has_loss[b, span] = sequence.has_loss
            doc_id[b, span] = d
            # Each sequence counts its pictures from 0. The batch counts on: the model puts picture
            # m of the batch where image_id says m.
            own = np.array(sequence.image_id)
            image_id[b, span] = np.where(own >= 0, own + len(images), -1)
            images += sequence.images
            t_max += sequence.t_max
            t_min += sequence.t_min
            start = span.stop
        # TRAP: padding is a document of its own. It looks at itself, so no row of the mask is empty
        # and no softmax is NaN (docs/PAPER.md §4.1); and no document sees it.
        doc_id[b, start:] = len(row)

    return Batch(
        tokens=torch.from_numpy(tokens),
        image_id=torch.from_numpy(image_id),
        doc_id=torch.from_numpy(doc_id),
        has_loss=torch.from_numpy(has_loss),
        images=torch.tensor(images, dtype=torch.long),
        t_max=torch.tensor(t_max, dtype=torch.long),
        t_min=torch.tensor(t_min, dtype=torch.long),
    )


# ------------------------------------------------------------------------ the stream of documents
def one_pair(caption, k, caption_first, rng, drop, t_limit, noisiest):
    """The parts of a caption and its picture, in their order, as `lay_out` takes them. In either
    order, dropped or not, they take the same number of positions.

    caption         str, or the list of its ids
    k               index of the picture
    caption_first   which order
    rng             numpy Generator; decides whether the caption is dropped
    drop            the probability of that
    t_limit         the largest t of a picture that precedes its caption
    noisiest        the largest t of any other"""
    if not caption_first:
        # Paper: App. B.2. The caption is read off this picture, so the picture is not all noise.
        # TRAP: only pictures in this order have the limit, and it is a maximum, not their t.
        return [("image", k, t_limit), caption]
    if rng.random() < drop:
        caption = ("dropped", caption)
    return [caption, ("image", k, noisiest)]


@dataclass
class Documents:
    """Draws documents from sources.pairs.Pairs. A draw depends on the generator that it is given
    and on nothing else, so a resumed run sees the same documents."""
    pairs: object
    patches: int                            # P, to balance text and patches
    context: int = 96                       # a document holds as many pairs as fit, at most four
    # Paper: §4.1, "ordering the caption first 80% of the time".
    caption_first: float = 0.8
    # Paper: App. B.2, the noise limit of pictures that precede their caption.
    t_limit: int = 500
    noisiest: int = 1000                    # the largest t: pure noise
    # Our choice: the share of captions dropped. Guidance is in the paper, its training is not.
    drop: float = 0.1
    # Our choice: after each pair, the chance of one more in the same document.
    another: float = 0.2
    # The share of documents without pictures. Negative: what makes 1 : 1, see `text_for_1_to_1`.
    text_share: float = -1.0
    tokenizer: object = None                # measures captions and texts; None: in words

    def __post_init__(self):
        caption = max(count_tokens(self.tokenizer, text) for text in self.pairs.captions)
        self.pair = caption + self.patches + 2                  # longest pair, with BOI and EOI
        self.most = max(1, min(4, (self.context - 2) // self.pair))         # BOS and EOS take two
        if not self.pairs.texts:
            self.text_share = 0.0                               # this source has only captions
        elif self.text_share < 0:
            self.text_share = self.text_for_1_to_1()

    def text_for_1_to_1(self):
        """The share s of documents without pictures that makes text tokens : patches = 1 : 1."""
        # Paper: §4.1, "a 1:1 token ratio". A document of pairs has more patches than words.
        # Documents of text alone even it out:
        #     s * text_length + (1 - s) * pair_words = (1 - s) * pair_patches
        #     so  s = missing / (missing + text_length)  with  missing = pair_patches - pair_words.
        captions = self.pairs.captions[:5000]                   # enough for a mean
        words = float(np.mean([count_tokens(self.tokenizer, text) for text in captions]))
        texts = itertools.chain(*self.pairs.texts)
        lengths = [count_tokens(self.tokenizer, text) for text in texts]
        text_length = 2 + float(np.mean(lengths))               # BOS, EOS

        pairs_per_document = sum(k * p for k, p in enumerate(self.pairs_odds(), start=1))
        pair_words = 2 + pairs_per_document * (words + 2)       # BOS, EOS; BOI, EOI of each pair
        pair_patches = pairs_per_document * self.patches
        missing = max(pair_patches - pair_words, 0.0)
        return missing / (missing + text_length)

    def pairs_odds(self):
        """[p(one pair), p(two), ...]: each is `another` times the one before; the last has what is
        left. A list of `most` numbers."""
        odds = [self.another ** k * (1 - self.another) for k in range(self.most - 1)]
        return odds + [1 - sum(odds)]

    def longest(self):
        """How many positions the longest document takes."""
        return 2 + self.most * self.pair

    def draw(self, rng):
        """One document, as `lay_out` takes it. rng: numpy Generator."""
        # 1. Text alone: first a group, then one of its texts.
        if rng.random() < self.text_share:
            group = self.pairs.texts[rng.integers(len(self.pairs.texts))]
            return [group[rng.integers(len(group))]]

        # 2. Or pairs, each drawn by itself. All pairs of a document have the same order, so that a
        #    caption is never between two pictures of which either might be its own.
        # Paper: §4.1, the caption first in 80%.
        caption_first = rng.random() < self.caption_first
        how_many = 1 + int(rng.choice(self.most, p=self.pairs_odds()))
        document = []
        for _ in range(how_many):
            k = int(rng.integers(len(self.pairs.captions)))
            document += one_pair(self.pairs.captions[k], k, caption_first, rng,
                                 self.drop, self.t_limit, self.noisiest)
        return document


if __name__ == "__main__":
    end_with_the_reader()
    tokenizer = Words("a red circle".split())
    sequence = lay_out(["a red circle", ("image", 7, 1000)], tokenizer, patches=4)
    print("document  ['a red circle', picture 7]")
    rows = {
        "tokens": [tokenizer.vocabulary[token] for token in sequence.tokens],
        "image_id": sequence.image_id,
        "has_loss": ["x" if x else "" for x in sequence.has_loss],
    }
    for name, cells in rows.items():
        print(f"{name:9s}" + " ".join(f"{cell!s:8s}" for cell in cells))
