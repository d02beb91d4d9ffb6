"""
test_shards.py: what is packed is what is trained on, in an order that anyone can compute
                                (scale/shards.py; Transfusion §4.1 "Data"; docs/PAPER.md §4.10)

THE IDEA    First the rows on disk against the same documents laid out in memory. Then the order,
            and the proportions of the paper. Then everything that may happen to a folder of shards:
            cut short, flipped, mixed up. How it is written is in test_pack.py, how a model learns
            from it in test_shards_training.py.
TRY IT      pytest -n 0 tests/test_shards.py
"""
import collections
import functools
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import vae as vae_module
from data import BOI, BOS, DROP, EOI, EOS, PAD, PATCH
from packing import (
    ROOT,
    P,
    T,
    all_rows,
    command,
    documents_of,
    same,
    stored_pairs,
    stored_texts,
    texts_of_world,
)
from scale import pack, shards, streams
from support import checkpoint
from support.common import UserError, run_command
from test_errors import check_sentence, contents


# ------------------------------------------------------------------------------ disk against memory
def test_every_item_of_the_sources_is_stored_once(packed, vae_path):
    """Catches a lost or doubled document, a caption with another's picture, and latents in the
    wrong order or precision."""
    stream = shards.Shards(packed)
    vae = checkpoint.load_vae(vae_path)

    # 1. Text: the same sentences, in any order.
    texts = texts_of_world("one", 150)
    assert len(set(texts)) > 20                         # else a doubled one would not show
    assert sorted(stored_texts(stream, "text")) == sorted(texts)

    # 2. Pairs: what the sources say, and the VAE makes of it, here.
    captions = []
    pixels = []
    for _, read in streams.scenes_of("pairs", "one", 150, 32):
        caption, read_pixels = read()
        captions.append(caption)
        pixels.append(read_pixels())
    with torch.no_grad():
        wanted, _ = vae.encode(vae_module.to_float(np.stack(pixels)))
    wanted = wanted.numpy()                             # (150, 2, 8, 8)

    # 3. Each stored latent is the nearest to one of these, and each is there.
    pairs = stored_pairs(stream)
    assert len(pairs) == 150
    nearest = []
    for _, latent in pairs:
        assert latent.dtype == np.float16
        distances = np.abs(wanted - latent).reshape(150, -1).max(1)
        nearest.append(int(distances.argmin()))
    assert sorted(nearest) == list(range(150))

    # 4. Beside it stands its own caption.
    for k, (ids, latent) in zip(nearest, pairs):
        assert stream.tokenizer.decode(ids) == captions[k]
        np.testing.assert_allclose(latent, wanted[k], rtol=2 ** -10, atol=1e-4)     # 11 bits


def as_parts(ids, batch, first, tokenizer):
    """A document as `data.lay_out` takes it, made again from its ids.

    first: the number of its first picture in the batch."""
    assert ids[0] == BOS
    assert ids[-1] == EOS
    parts = []
    words = []
    m = first
    for token in ids[1:]:
        if token in (BOI, EOS):                         # a text ends, if there was one
            if DROP in words:
                parts.append(("dropped", "a " * len(words)))
            elif words:
                parts.append(tokenizer.decode(words))
            words = []
        elif token == EOI:
            parts.append(("image", m, int(batch.t_max[m])))
            m += 1
        elif token != PATCH:
            words.append(token)
    return parts


def kind_of(part):
    """"text" or "image"."""
    return "image" if isinstance(part, tuple) and part[0] == "image" else "text"


def test_rows_are_what_data_lays_out_and_packs(packed):
    """A batch from disk is data.lay_out and data.pack of the same documents as text, token by
    token, `has_loss` by `has_loss`. Catches a second, diverging implementation of the layout, and
    any offset that is off by one."""
    stream = shards.Shards(packed)
    seen = collections.Counter()                        # {kinds of a document's parts: how often}

    for step in range(30):
        batch = stream.batch(5, step, 0, rows=2)
        m = 0                                           # pictures of the batch up to here
        for b, documents in enumerate(documents_of(batch)):
            # Lay out and pack the row's documents in memory.
            sequences = []
            for ids in documents:
                parts = as_parts(ids, batch, m, stream.tokenizer)
                kinds = tuple(kind_of(part) for part in parts)
                seen[kinds] += 1
                m += kinds.count("image")
                sequences.append(data.lay_out(parts, stream.tokenizer, P))
            one = data.pack(sequences, T)

            # The same row: pack puts the longest document first.
            assert len(one.tokens) == 1
            order = np.argsort([-len(ids) for ids in documents], kind="stable")
            assert [documents[k] for k in order] == documents_of(one)[0]
            for name in ("tokens", "has_loss", "doc_id"):
                assert torch.equal(getattr(one, name)[0], getattr(batch, name)[b]), name
            assert torch.equal(one.image_id[0] >= 0, batch.image_id[b] >= 0)

        # The pictures are numbered in reading order, P positions each.
        assert m == len(batch.images) == len(batch.latents)
        assert batch.images.tolist() == list(range(m))
        image_id = batch.image_id[batch.image_id >= 0].view(-1, P)
        assert torch.equal(image_id, torch.arange(m)[:, None].expand(m, P))

    assert seen[("text",)]
    assert seen[("text", "image")]
    assert seen[("image", "text")]
    assert seen[("text", "image", "text", "image")]


def test_latents_follow_their_places(packed):
    """Catches latents of a batch that are not those stored with the captions of its rows, also in
    rows that are read after rows of text."""
    stream = shards.Shards(packed, drop=0.0)
    by_caption = collections.defaultdict(list)
    for ids, latent in stored_pairs(stream):
        by_caption[tuple(ids)].append(latent)

    for step in range(20):
        batch = stream.batch(1, step, 0, rows=3)
        m = 0
        for tokens in itertools.chain(*documents_of(batch)):
            # The captions of a document, and its pictures, each in the order of reading.
            captions = []
            latents = []
            words = []
            for token in tokens[1:]:
                if token in (BOI, EOS) and words:
                    captions.append(tuple(words))
                    words = []
                elif token == EOI:
                    latents.append(batch.latents[m].numpy())
                    m += 1
                elif token >= len(data.SPECIAL):
                    words.append(token)
            for caption, latent in zip(captions, latents):
                assert any((latent == stored).all() for stored in by_caption[caption])
        assert m == len(batch.latents)


def test_long_texts_are_cut_and_nothing_is_lost(tmp_path):
    """Texts of every length around T. Catches a row of more than T positions, and pieces that are
    not the text when they are put together."""
    texts = []
    for n in (1, T - 3, T - 2, T - 1, T, 2 * T - 4, 2 * T - 3, 5 * T):
        texts.append([f"w{(7 * n + k) % 50}" for k in range(n)])
    (tmp_path / "a.txt").write_text("\n\n".join(" ".join(text) for text in texts))

    total = pack.main(command(None, tmp_path / "packed", text=tmp_path / "a.txt", pairs=None,
                              shard_rows=1))

    stream = shards.Shards(tmp_path / "packed")
    for documents, _ in all_rows(stream, "text"):
        lengths = [2 + len(ids) for ids in itertools.chain(*documents)]         # BOS and EOS
        assert sum(lengths) <= T
    pieces = []
    for text in texts:
        pieces += [text[k: k + T - 2] for k in range(0, len(text), T - 2)]
    stored = [text.split() for text in stored_texts(stream, "text")]
    assert sorted(stored) == sorted(pieces)
    assert total["rows"] == len(all_rows(stream, "text"))
    assert total["text_tokens"] == sum(2 + len(piece) for piece in pieces)

    batch = stream.batch(0, 0, 0, rows=total["rows"])
    assert batch.tokens.shape == (total["rows"], T)
    assert len(batch.latents) == len(batch.images) == 0


# ---------------------------------------------------------------------------------------- the order
@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 1000, 4097])
def test_the_order_is_a_bijection(n):
    """Catches a row that is never read, or read twice in an epoch."""
    order = [shards.shuffled(k, n, "0 pairs 3") for k in range(n)]
    assert sorted(order) == list(range(n))


def test_orders_differ_and_are_even():
    """Catches a row that comes at one place more often than at another, over epochs, and epochs,
    seeds or kinds that share an order."""
    # 1. Six rows have 720 orders, of which 2000 draws hit 675 on average.
    orders = []
    for epoch in range(2000):
        orders.append(tuple(shards.shuffled(k, 6, f"0 text {epoch}") for k in range(6)))
    assert len(set(orders)) > 600

    # 2. How often each row comes at each place: 2000 / 6, within 5 standard deviations.
    counts = np.zeros((6, 6))
    for order in orders:
        counts[np.arange(6), order] += 1                # (place, row)
    assert abs(counts - 2000 / 6).max() < 5 * np.sqrt(2000 * 5 / 36)

    # 3. Long orders: none is another's, and neighbours are torn apart.
    long = {}
    for key in ("0 text 0", "0 text 1", "1 text 0", "0 pairs 0"):
        long[key] = tuple(shards.shuffled(k, 500, key) for k in range(500))
    assert len(set(long.values())) == 4
    for order in long.values():
        assert abs(np.corrcoef(order, range(500))[0, 1]) < 0.2
        assert np.mean(np.abs(np.diff(order)) == 1) < 0.02


def test_a_batch_is_a_function_of_its_arguments(packed):
    """A step's rows are the same for 1, 2 or 8 micro-batches, for any number of ranks that share
    them, in any order of calls, in a process that starts in the middle. That makes resuming exact
    at any world size. Catches a state that remembers what was read before."""
    first = shards.Shards(packed)
    second = shards.Shards(packed)
    whole = [first.batch(3, step, 0, rows=8) for step in range(4)]

    for micros in (2, 4, 8):
        for step in (3, 1):
            # Two ranks, each with every other micro-batch; rank 1 comes first.
            parts = {}
            for rank in (1, 0):
                for micro in range(rank, micros, 2):
                    parts[micro] = second.batch(3, step, micro, rows=8 // micros,
                                                micro_batches=micros)
            for name in ("tokens", "latents", "t_max"):
                joined = torch.cat([getattr(parts[micro], name) for micro in range(micros)])
                assert torch.equal(joined, getattr(whole[step], name)), name

    # Another seed, another step: other rows.
    assert not same(first.batch(4, 0, 0, rows=8), whole[0])
    assert not same(whole[0], whole[1])


def note_rows(stream):
    """{kind: [numbers of the rows that the stream will read from now on]}."""
    numbers = {"text": [], "pairs": []}
    real = stream.read_row

    def read_row(kind, k):
        numbers[kind].append(k)
        return real(kind, k)

    stream.read_row = read_row
    return numbers


def test_an_epoch_reads_each_row_once(packed):
    """Catches an epoch that leaves out a row, or reads one that is held out, and a next epoch in
    the same order. It is so for each kind."""
    stream = shards.Shards(packed)
    read = note_rows(stream)
    assert stream.held_out_rows == 7
    assert stream.rows["pairs"] == int(stream.begins["pairs"][-1]) - 7

    # Two epochs of the larger kind take no more rows than this.
    steps = 2 * sum(stream.rows.values()) * 2
    for step in range(steps):
        stream.draw_row(0, step)
    for kind, n in stream.rows.items():
        assert len(read[kind]) >= 2 * n
        first = read[kind][:n]
        second = read[kind][n: 2 * n]
        assert sorted(first) == sorted(second) == list(range(n))
        assert first != second

    # A Llama's: every row is one of text, and none is passed over.
    alone = shards.Shards(packed, text_only=True)
    read = note_rows(alone)
    for step in range(alone.rows["text"]):
        alone.draw_row(0, step)
    assert sorted(read["text"]) == list(range(alone.rows["text"]))
    assert read["pairs"] == []


# ------------------------------------------------------------------------------ the paper's numbers
def test_proportions(vae_path, tmp_path):
    """Over many rows, text tokens : patches = 1 : 1 within 2%. Captions come first in 80% of the
    documents, and are dropped in 10% of those. The noise limit holds where the picture is first,
    and only there. All this is drawn anew each epoch, and lengths stay. Catches another number."""
    pack.main(command(vae_path, tmp_path, scenes=600, shard_rows=64))
    stream = shards.Shards(tmp_path, drop=0.1, t_limit=321, noisiest=900)

    # 1. Count.
    patches = 0
    texts = 0
    documents = 0                                       # with pictures
    caption_first = 0
    dropped = 0
    for step in range(300):
        batch = stream.batch(2, step, 0, rows=8)
        patches += int((batch.image_id >= 0).sum())
        texts += int(((batch.image_id < 0) & (batch.tokens != PAD)).sum())
        m = 0                                           # pictures of the batch up to here
        for tokens in itertools.chain(*documents_of(batch)):
            n = tokens.count(BOI)
            if n == 0:
                continue
            documents += 1
            if tokens[1] == BOI:
                assert batch.t_max[m: m + n].tolist() == [321] * n
                assert DROP not in tokens
            else:
                caption_first += 1
                dropped += tokens[1] == DROP
                assert batch.t_max[m: m + n].tolist() == [900] * n
            m += n
        assert m == len(batch.images)

    # 2. Compare, shares within 4 standard deviations.
    def tolerance(share, n):
        return 4 * np.sqrt(share * (1 - share) / n)

    assert texts / patches == pytest.approx(1, abs=0.02)
    assert documents > 3000
    assert abs(caption_first / documents - 0.8) < tolerance(0.8, documents)
    assert abs(dropped / caption_first - 0.1) < tolerance(0.1, caption_first)

    # 3. One and the same row over its epochs: {its latents: the ways in which it was laid out}.
    ways = collections.defaultdict(set)
    for g in range(6 * sum(stream.rows.values())):
        laid, latents = stream.draw_row(2, g)
        if latents is None:
            continue
        lengths = []
        for document in laid:
            sequence = data.lay_out(document, stream.tokenizer, stream.patches)
            lengths.append(len(sequence.tokens))
        words_first = tuple(isinstance(document[0], list) for document in laid)
        dropped_first = tuple(document[0][0] == "dropped" for document in laid)
        ways[latents.tobytes()].add((tuple(lengths), words_first, dropped_first))
    for drawn in ways.values():
        assert len({lengths for lengths, _, _ in drawn}) == 1
    assert np.mean([len(drawn) > 1 for drawn in ways.values()]) > 0.7


# ------------------------------------------------------------------------------------------ opening
def test_opening_reads_no_shard(packed, tmp_path, monkeypatch):
    """Catches opening that reads 283,000 shards times 512 processes, each a header and five sizes:
    all that reading needs stands in index.json. An older one, which lists names alone, says the
    same."""
    whole = shards.Shards(packed)
    index = json.loads((packed / "index.json").read_text())

    # 1. The same shards with an index of names alone.
    older = tmp_path / "older"
    older.mkdir()
    for path in packed.iterdir():
        (older / path.name).symlink_to(path)
    (older / "index.json").unlink()
    (older / "index.json").write_text(json.dumps({"shards": list(index["shards"])}))
    named = shards.Shards(older)
    assert named.rows == whole.rows
    assert named.content == whole.content
    assert named.settings == whole.settings

    # 2. The index counts what the headers count.
    headers = [json.loads((packed / name / "header.json").read_text()) for name in index["shards"]]
    for name in ("rows", "pictures"):
        total = sum(whole.total(kind, name) for kind in ("text", "pairs"))
        assert sum(header[name] for header in headers) == total

    # 3. With an index of today, nothing else is read.
    monkeypatch.setattr(shards, "read_header", lambda *_: pytest.fail("opening read a header"))
    monkeypatch.setattr(shards, "open_arrays", lambda *_: pytest.fail("opening read an array"))
    assert shards.Shards(packed).rows == whole.rows


def test_only_one_process_reads_the_index(packed, monkeypatch):
    """Catches 512 processes that read 30 MB each: one reads them, and tells the others what
    counts, in a short message."""
    messages = []

    def look_and_tell(look):
        messages.append(look())
        return messages[0]

    one = shards.Shards(packed, once=look_and_tell)
    monkeypatch.setattr(shards, "read_index", lambda *_: pytest.fail("it read the index, too"))
    other = shards.Shards(packed, once=lambda look: messages[0])

    assert other.rows == one.rows
    assert other.content == one.content
    counts = messages[0][0]
    assert len(pickle.dumps(messages[0])) < 1000 * len(counts["pairs"]) + 3000      # bytes

    batches = [stream.batch(0, 3, 0, rows=2) for stream in (one, other)]
    assert torch.equal(batches[0].tokens, batches[1].tokens)
    assert torch.equal(batches[0].latents, batches[1].latents)


def test_pieces_of_arrays_are_read_and_no_file_stays_open(packed):
    """Catches memory-mapped arrays, which keep their files open: after 170 shards a limit of 1,024
    is reached, and the next shard "is broken". Catches also an array that is read as a whole: a
    trillion tokens do not fit in memory."""
    # 1. Any piece is that of the array.
    files = itertools.chain(*((packed / f"{kind}-000000").glob("*.npy")
                              for kind in ("text", "pairs")))
    for file in files:
        array = np.load(file)
        n = len(array)
        stored = shards.StoredArray(file)
        assert stored.dtype == array.dtype
        assert "array" not in vars(stored)
        for a, b in ((0, n), (1, 3), (2, 2), (n - 1, n)):
            assert np.array_equal(stored[a:b], array[a:b])
        for span in (slice(-1, 1), slice(2, 1), slice(0, n + 1)):
            with pytest.raises(ValueError):
                stored[span]

    # 2. After all shards were read, as many files are open as before.
    stream = shards.Shards(packed)
    before = len(os.listdir("/dev/fd"))
    for kind in ("text", "pairs"):
        all_rows(stream, kind)
    assert len(list(packed.glob("*-*"))) > 10
    assert len(os.listdir("/dev/fd")) == before


# ----------------------------------------------------------------------------- breaking and mending
LEFT_OUT = object()


def edit_header(shard, **changes):
    """Change fields of a shard's header.json; LEFT_OUT leaves one out."""
    header = json.loads((shard / "header.json").read_text()) | changes
    header = {name: value for name, value in header.items() if value is not LEFT_OUT}
    (shard / "header.json").write_text(json.dumps(header))


def cut_words(shard):
    """Leave out the last three bytes of words.npy."""
    file = shard / "words.npy"
    file.write_bytes(file.read_bytes()[:-3])


def put_pipe(shard):
    """Put a pipe where parts.npy was: whoever reads it waits for ever."""
    (shard / "parts.npy").unlink()
    os.mkfifo(shard / "parts.npy")


def put_header(text):
    """A function (shard) that writes this into its header.json."""
    return lambda shard: (shard / "header.json").write_text(text)


def remove(name):
    """A function (shard) that deletes one of its files."""
    return lambda shard: (shard / name).unlink()


# {what is wrong with a header: its fields}
HEADERS = {
    "no kind": dict(kind=LEFT_OUT),
    "another kind": dict(kind="sounds"),
    "kind of another type": dict(kind=["pairs"]),
    "bytes a list": dict(bytes=[]),
    "bytes not numbers": dict(bytes={"words.npy": "many"}),
    "settings a number": dict(settings=1),
    "settings empty": dict(settings={}),
    "rows null": dict(rows=None),
    "rows negative": dict(rows=-1),
    "rows zero": dict(rows=0),
    "rows true": dict(rows=True),
    "rows in words": dict(rows="nine"),
    "positions a list": dict(positions=[]),
    "no pictures": dict(pictures=LEFT_OUT),
    "no recipe": dict(recipe=LEFT_OUT),
    "recipe without sources": dict(recipe={}),
    "next null": dict(next=None),
    "next too short": dict(next=[0]),
}
# {what is wrong with a shard: (function that makes it so, words of the sentence)}
HARMS = {
    "no folder": (shutil.rmtree, ["is missing"]),
    "header cut": (put_header("{"), ["is broken", "header.json"]),
    "no header": (remove("header.json"), ["is missing"]),
    "no array": (remove("latents.npy"), ["is broken", "latents.npy"]),
    "truncated": (cut_words, ["is broken", "words.npy"]),
    "a pipe": (put_pipe, ["is broken", "parts.npy"]),
    "header a list": (put_header("[1, 2]"), ["is broken", "header.json"]),
    "header nested": (put_header("[" * 100_000), ["is broken", "header.json"]),
}
for problem, fields in HEADERS.items():
    HARMS[problem] = (functools.partial(edit_header, **fields), ["is broken", "header.json"])


@pytest.mark.parametrize("harm, words", HARMS.values(), ids=HARMS)
def test_broken_shards_are_named_and_mended(own, packed, vae_path, harm, words):
    """Catches a missing shard that is not named at opening, before a day of training; a broken one
    that is named neither by `python -m scale.shards packed` nor when its row is read; and a packing
    command that does not make the same bytes again."""

    def read_pairs(folder):
        all_rows(shards.Shards(folder), "pairs")

    shard = own / "pairs-000001"
    harm(shard)

    looks = [shards.verify if shard.exists() else shards.Shards]
    if words != ["is missing"] and words[-1] != "header.json":
        looks.append(read_pairs)                        # reading needs no header
    for look in looks:
        with pytest.raises(UserError) as problem:
            look(own)
        for word in [*words, "pairs-000001", "packing command again"]:
            assert word in str(problem.value)

    pack.main(command(vae_path, own))
    assert contents(own) == contents(packed)


def flip_bit(raw, place):
    """The same bytes, but for one bit of the byte at this place."""
    return raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1:]


@pytest.mark.parametrize("name", ["words", "parts", "documents", "rows", "sums", "latents"])
def test_a_flipped_bit_is_found(own, name):
    """Same sizes, wrong content. Catches a row that is read without its checksum, wherever in the
    shard the wrong bit is."""
    path = own / f"pairs-000002/{name}.npy"
    raw = path.read_bytes()
    end = len(raw)
    begin = end - np.load(path).nbytes                  # after the array's header

    rng = np.random.default_rng(0)
    for place in [begin, end - 1, *rng.integers(begin, end, size=4)]:
        path.write_bytes(flip_bit(raw, place))
        with pytest.raises(UserError, match="pairs-000002 is broken"):
            all_rows(shards.Shards(own), "pairs")
        with pytest.raises(SystemExit):
            run_command(lambda _: shards.verify(own))

    path.write_bytes(raw)
    all_rows(shards.Shards(own), "pairs")               # nothing else was wrong


def test_a_flipped_bit_is_found_without_asserts(own, tmp_path):
    """Catches a check that is an assert: `python -O` leaves it out, and a damaged shard "is what
    was written". Catches also a command that does not work from another folder."""
    path = own / "text-000001/words.npy"
    raw = path.read_bytes()
    path.write_bytes(flip_bit(raw, len(raw) - 1))

    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONOPTIMIZE": "1"}
    done = subprocess.run([sys.executable, "-m", "scale.shards", own], cwd=tmp_path,
                          env=environment, capture_output=True, text=True)

    check_sentence(done.returncode, done.stdout, done.stderr, "text-000001 is broken",
                   "not what was written")


def broken_indices(index):
    """What an index.json may say that is none. index: the dict of a good one."""
    name = next(iter(index["shards"]))
    counts = index["shards"][name]
    texts = ['{"shards": [', '{"shards": 3}', '{"shards": [1]}', '{"shards": []}', "[]",
             f'{{"shards": {{"{name}": 3}}}}']

    changes = [dict(shards={}), dict(settings=3), dict(content=None)]
    for setting in (dict(latent=[4]), dict(latent=4), dict(latent=[4, 8, 0.5]), dict(vae=7),
                    dict(patch="2")):
        changes.append(dict(settings=index["settings"] | setting))
    for count in (dict(rows=-1), dict(rows=0), dict(rows=True), dict(positions="nine"),
                  dict(kind="sounds"), dict(kind=["pairs"])):
        changes.append(dict(shards={name: counts | count}))
    return texts + [json.dumps(index | change) for change in changes]


def test_an_unfinished_or_broken_index(own, tmp_path):
    """Catches a traceback, and a wrong reason, where index.json is not what it should be."""
    file = own / "index.json"
    index = json.loads(file.read_text())

    for content in broken_indices(index):
        file.write_text(content)
        with pytest.raises(UserError, match="index.json is broken"):
            shards.Shards(own)

    # Not broken, but not what the shard says.
    name = next(iter(index["shards"]))
    index["shards"][name]["rows"] += 1
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match="not what the shards beside it say"):
        shards.verify(own)

    # None: packing has not finished, or it is no such folder.
    file.unlink()
    with pytest.raises(UserError, match="has not finished"):
        shards.Shards(own)
    with pytest.raises(UserError, match="no index.json"):
        shards.Shards(tmp_path / "nowhere")


# ----------------------------------------------------------------------------------- other settings
def test_mixed_folders(packed, own, vae_path, other_vae, tmp_path):
    """Several packings in one folder are read as one, if tokenizer, VAE and sizes agree. Catches
    a row that is lost between them, and a folder that does not fit and is not named."""
    both = tmp_path / "both"
    shutil.copytree(packed, both / "a")
    pack.main(command(vae_path, both / "b", scenes=40))

    # 1. All rows of both.
    one = shards.Shards(both / "a")
    two = shards.Shards(both / "b")
    stream = shards.Shards(both)
    for kind in ("text", "pairs"):
        n = int(one.begins[kind][-1]) + int(two.begins[kind][-1])
        assert int(stream.begins[kind][-1]) == n
    wanted = [str(documents) for documents, _ in all_rows(one, "text") + all_rows(two, "text")]
    read = [str(documents) for documents, _ in all_rows(stream, "text")]
    assert sorted(read) == sorted(wanted)

    # 2. The second one packed otherwise.
    words = tmp_path / "words.json"
    words.write_text(json.dumps([*stream.tokenizer.vocabulary, "zebra"]))
    for name, option in (("vae", dict(vae=other_vae)), ("seq_len", dict(seq_len=48)),
                         ("patch", dict(patch=4)), ("tokenizer", dict(tokenizer=words))):
        shutil.rmtree(both / "b")
        options = dict(vae=vae_path, out=both / "b", scenes=40)
        pack.main(command(**(options | option)))
        with pytest.raises(UserError, match=f"both/b was packed with another .*{name}"):
            shards.Shards(both)


def test_other_tokenizer_and_other_vae(own, packed, other_vae, vae_path, tmp_path):
    """Catches files beside the shards, or a --vae of the command, that are not those of the shards
    and are taken without a word."""
    stream = shards.Shards(own)
    vae = stream.settings["vae"]
    assert shards.fingerprint(stream.load_vae()) == vae
    assert shards.fingerprint(stream.load_vae(vae_path)) == vae

    # The VAE.
    with pytest.raises(UserError, match="another VAE"):
        stream.load_vae(other_vae)
    shutil.copy(other_vae, own / "vae.pt")
    with pytest.raises(UserError, match="another VAE"):
        shards.Shards(own).load_vae()

    # The tokenizer: another one, and none.
    words = own / "tokenizer.json"
    words.write_text(json.dumps([*stream.tokenizer.vocabulary, "zebra"]))
    with pytest.raises(UserError, match="another tokenizer"):
        shards.Shards(own)
    words.unlink()
    with pytest.raises(UserError, match="another tokenizer"):
        shards.Shards(own)
