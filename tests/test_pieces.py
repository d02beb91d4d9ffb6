"""
test_pieces.py: the paper's tokenizer, from packing to editing
                                                          (data.Pieces; Transfusion §4.1, §4.5)

THE IDEA    The paper's 32,000 pieces come from a SentencePiece model. A toy's words are one token
            each, so whoever counts words where tokens are meant is not found out by toys. Here a
            model of 300 pieces is trained, and goes the whole way: pack, train, fine-tune on
            captions, fine-tune on edits, sample.
TRY IT      pytest -n 0 tests/test_pieces.py
"""
import sys

import numpy as np
import pytest

import data
import model
import sample
import train
from data import BOS, EOS
from packing import (
    P,
    command,
    picture,
    stored_pairs,
    stored_texts,
    texts_of_world,
    to_words,
    training,
    write_json_lines,
)
from scale import pack, shards
from sources import choose
from support import checkpoint
from support.checkpoint import load_trained
from support.common import UserError


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Path of a SentencePiece model of 300 pieces, trained here."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="pip install sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    rng = np.random.default_rng(0)
    lines = texts_of_world("six", 300)
    for _ in range(300):
        lines.append("".join(rng.choice(list("abcdefgh "), 40)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "p"), vocab_size=300,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    return folder / "p.model"


@pytest.fixture
def trained(pieces, vae_path, tmp_path, monkeypatch):
    """Path of a tiny model that took one step on data packed in pieces: tmp_path/run/model.pt. The
    data are in tmp_path/packed."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    pack.main(command(vae_path, tmp_path / "packed", tokenizer=pieces, seq_len=192, shard_rows=2))
    train.main(training(tmp_path / "packed", tmp_path / "run", steps=1, documents=2, seq_len=192))
    return tmp_path / "run/model.pt"


# ------------------------------------------------------------------------------------ the tokenizer
def test_without_sentencepiece(monkeypatch):
    """Catches a traceback where the optional library is not there: the sentence says what to
    install."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        checkpoint.load_tokenizer(b"model")


def test_pieces(pieces):
    """Ids stand behind the special tokens, and any text comes back. Catches a text that can forge
    the layout, and a tokenizer that is more than its bytes."""
    tokenizer = checkpoint.load_tokenizer(pieces)
    special = len(data.SPECIAL)
    for text in ("a red circle", "<boi> <s> </s> <patch>", "Grüße, 世界 :-)"):
        ids = tokenizer.encode(text)
        assert min(ids) >= special
        assert max(ids) < len(tokenizer)
        assert tokenizer.decode([BOS, *ids, EOS]) == text

    assert tokenizer.vocabulary[:special] == list(data.SPECIAL)
    first = tokenizer.encode("a circle")[0]
    assert tokenizer.vocabulary[first].startswith("▁")

    again = checkpoint.load_tokenizer(checkpoint.dump_tokenizer(tokenizer))
    assert again.encode("a red circle") == tokenizer.encode("a red circle")
    assert shards.fingerprint(again) == shards.fingerprint(tokenizer)

    # Not a model: nothing, anything, and one that is as long as before but holds no UTF-8.
    not_text = pieces.read_bytes().replace("▁".encode(), b"\xe2\x28\xa1")
    for bad in (b"", b"garbage" * 9, not_text):
        with pytest.raises(UserError, match="not a SentencePiece model"):
            checkpoint.load_tokenizer(bad)


def test_words_that_capitals_told_apart():
    """Catches a checkpoint of an earlier version whose words move to other ids without a word."""
    words = [*data.SPECIAL, "blue", "red"]
    assert checkpoint.load_tokenizer(words).vocabulary == words
    for kept in (["Red", "red"], ["Red"]):
        with pytest.raises(UserError, match="capital letters"):
            checkpoint.load_tokenizer([*data.SPECIAL, *kept])


# -------------------------------------------------------------------------------- from file to file
def test_pieces_from_pack_to_checkpoint(pieces, vae_path, tmp_path, monkeypatch):
    """Pack with a SentencePiece model, and train two steps. Catches a text that is stored
    otherwise, and a model.pt that needs the tokenizer's file beside it."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    pack.main(command(vae_path, tmp_path / "packed", tokenizer=pieces, seq_len=192, shard_rows=2))
    assert (tmp_path / "packed/tokenizer.model").read_bytes() == pieces.read_bytes()
    stored = stored_texts(shards.Shards(tmp_path / "packed"), "text")
    assert sorted(stored) == sorted(texts_of_world("one", 150))

    train.main(training(tmp_path / "packed", tmp_path / "run", steps=2, documents=2, seq_len=192))
    tokenizer = load_trained(tmp_path / "run/model.pt").tokenizer
    assert tokenizer.decode(tokenizer.encode("a red circle")) == "a red circle"
    assert tokenizer.model == pieces.read_bytes()


def write_captions(folder, caption):
    """A folder of 12 pictures, each with this caption and its number."""
    folder.mkdir()
    entries = []
    for k in range(12):
        (folder / f"{k}.png").write_bytes(picture((20 * k, 0, 0)))
        entries.append({"image": f"{k}.png", "caption": f"{caption} {k}"})
    write_json_lines(folder / "captions.jsonl", entries)


def write_edits(folder, instruction):
    """A folder of 12 edits, each with this instruction and its number."""
    folder.mkdir()
    entries = []
    for k in range(12):
        (folder / f"{k}.png").write_bytes(picture((20 * k, 0, 0)))
        (folder / f"{k}_after.png").write_bytes(picture((20 * k, 99, 0)))
        entries.append({"before": f"{k}.png", "instruction": f"{instruction} {k}",
                        "after": f"{k}_after.png"})
    write_json_lines(folder / "edits.jsonl", entries)


def longest_of(tokenizer, text):
    """The most tokens that the text takes with one of the numbers of the two functions above."""
    return max(len(tokenizer.encode(f"{text} {k}")) for k in range(12))


def test_one_rule_for_capitals_and_spaces(pieces, vae_path, tmp_path):
    """Catches other ids for the same caption in packing, in fine-tuning on a folder, and in
    sampling. Only data.Words, whose vocabulary is in lower case, tells no capitals apart."""
    folder = tmp_path / "folder"
    write_captions(folder, " A  Red\nCIRCLE")

    # 1. Packed.
    pack.main(command(vae_path, tmp_path / "packed", text=None, pairs=folder, tokenizer=pieces,
                      seq_len=192, scenes=None))
    stream = shards.Shards(tmp_path / "packed")
    packed = sorted(ids for ids, _ in stored_pairs(stream))

    # 2. Read from the folder.
    read = []
    for split in ("train", "test"):
        for text in choose.load_pairs("folder", folder, 32, split).captions:
            read.append(stream.tokenizer.encode(text))
    assert packed == sorted(read)

    # 3. Typed.
    typed = []
    for k in range(12):
        [text] = sample.read_prompt(f" A Red CIRCLE {k} ", None)
        typed.append(stream.tokenizer.encode(text))
    assert packed == sorted(typed)

    words = data.Words(choose.load_pairs("folder", folder, 32).vocabulary())
    assert words.encode("a red circle 3") == words.encode("A RED Circle 3")


def test_lengths_are_measured_in_tokens(trained, tmp_path):
    """Catches fine-tuning with a SentencePiece tokenizer that ends in step 2, over a caption of few
    words and many tokens."""
    folder = tmp_path / "folder"
    write_captions(folder, "unforeseeable words")
    tokenizer = shards.Shards(tmp_path / "packed").tokenizer
    longest = longest_of(tokenizer, "unforeseeable words")
    assert longest > 6                                  # of three words
    need = longest + P + 4                              # BOS, BOI, EOI, EOS

    options = dict(data="folder", data_dir=folder, init=trained, out=tmp_path / "tuned",
                   documents=4, steps=2, samples=0, gap_every=2)
    sentence = (f"line 1[12]: a caption of {longest} tokens is too long.* "
                f"takes {need} positions")
    with pytest.raises(UserError, match=sentence):
        train.main(to_words(options | dict(seq_len=need - 1)))
    train.main(to_words(options | dict(seq_len=need)))


def test_editing_with_the_papers_tokenizer(pieces, trained, tmp_path, monkeypatch):
    """§4.5 at size: fine-tune on edits of the world and of a folder, all in pieces. Catches an
    instruction whose length is counted in words, found too long in step 2, and one that is
    lower-cased on its way."""
    folder = tmp_path / "folder"
    write_edits(folder, "Unforeseeably GREEN")
    tokenizer = shards.Shards(tmp_path / "packed").tokenizer
    longest = longest_of(tokenizer, "Unforeseeably GREEN")
    assert longest > 6                                  # of three words
    need = 2 * (P + 2) + longest + 2                    # two pictures with BOI and EOI; BOS, EOS

    # 1. Too long by one position: said before the first step.
    edit = dict(preset="edit", init=trained, documents=4, steps=2, samples=0, gap_every=2)
    mine = edit | dict(data_dir=folder)
    sentence = (f"edits.jsonl line 1[12]: a caption of {longest} tokens is too long.* "
                f"takes {need} positions")
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda run: pytest.fail("trained before it measured"))
        with pytest.raises(UserError, match=sentence):
            train.main(to_words(mine | dict(out=tmp_path / "short", seq_len=need - 1)))

    # 2. It just fits; and the world's own edits.
    train.main(to_words(mine | dict(out=tmp_path / "mine", seq_len=need)))
    train.main(to_words(edit | dict(out=tmp_path / "world", seq_len=192, pairs=40)))

    # 3. The tokenizer went along, and tells capitals apart.
    tuned = load_trained(tmp_path / "mine/model.pt").tokenizer
    assert tuned.model == pieces.read_bytes()
    [typed] = sample.read_prompt(" Unforeseeably  GREEN 3 ", None)
    wanted = tokenizer.encode("Unforeseeably GREEN 3")
    assert tuned.encode(typed) == wanted
    assert wanted != tokenizer.encode("unforeseeably green 3")
