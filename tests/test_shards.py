"""
test_shards.py: what is packed is what is trained on, in an order that anyone can compute        (scale/shards.py, scale/pack.py)

First the rows on disk against the same documents laid out in memory, then the order, then the proportions of the paper, then
everything that may go wrong with a folder: killed, cut short, flipped, mixed up. At the end train.py on a packed folder.
"""
import collections
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import sample
import train
import vae as vae_module
from config import parse_arguments
from conftest import draw_batch, make_run
from data import BOI, BOS, DROP, EOI, EOS, PAD, PATCH
from scale import pack, shards, streams
from sources import choose, scenes
from support import checkpoint
from support.checkpoint import load_trained
from support.common import UserError, open_picture, run_command
from test_errors import check_sentence, contents
from test_trust import full_disk

ROOT = Path(__file__).resolve().parents[1]
T, P = 64, 16                                           # latents of 8x8 in patches of 2x2


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory):
    """Path of an untrained VAE: (3, 32, 32) -> (2, 8, 8), with latents of about unit size."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    vae = vae_module.VAE(vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2))
    vae.scale.fill_(0.1)
    checkpoint.save(path, checkpoint.pack_vae(vae))
    return path


def command(vae, out, **options):
    """The argument list of a small packing, with options as keywords; None leaves one out."""
    small = dict(text="scenes", pairs="scenes", scenes=150, vae=vae, seq_len=T, patch=2, image_size=32, shard_rows=8, out=out)
    given = {k: v for k, v in {**small, **options}.items() if v is not None}
    return [str(word) for k, vs in given.items() for v in (vs if isinstance(vs, list) else [vs])
            for word in ("--" + k.replace("_", "-"), v)]


@pytest.fixture(scope="module")
def packed(vae_path, tmp_path_factory):
    """A folder of the toy world in shards, packed without interruption. Tests read it; none may change it."""
    out = tmp_path_factory.mktemp("packed") / "packed"
    pack.main(command(vae_path, out))
    return out


@pytest.fixture
def own(packed, tmp_path):
    """A copy of that folder to break."""
    return Path(shutil.copytree(packed, tmp_path / "packed"))


def all_rows(stream, kind):
    """Every stored row of a kind: [(documents, latents)]."""
    return [stream.read_row(kind, k) for k in range(int(stream.begins[kind][-1]))]


def same(a, b):
    """Whether two Batches agree in everything."""
    return all(torch.equal(v, getattr(b, k)) for k, v in vars(a).items() if isinstance(v, torch.Tensor))


def documents_of(batch):
    """The documents of each row as (list of ids, ...) of a Batch, padding left out."""
    return [[batch.tokens[b, batch.doc_id[b] == d].tolist() for d in range(int(batch.doc_id[b].max()) + 1)
             if int(batch.tokens[b, batch.doc_id[b] == d][0]) != PAD] for b in range(len(batch.tokens))]


@pytest.mark.parametrize("what", ["latents", "disk"])
def test_a_shard_that_cannot_be_kept(vae_path, tmp_path, monkeypatch, what):
    """Catches latents beyond float16's range that are stored as infinities, one bad VAE counted as thousands of bad pictures, and
    numpy's "196608 requested and 0 written" for a full disk, with a .tmp that keeps it full."""
    vae = checkpoint.load_vae(vae_path)
    if what == "latents":
        vae.scale.fill_(1e-6)
        checkpoint.save(tmp_path / "vae.pt", checkpoint.pack_vae(vae))
        with pytest.raises(UserError, match="pairs-000000 was not written: the VAE makes latents that float16 cannot hold, beyond 65,504"):
            pack.main(command(tmp_path / "vae.pt", tmp_path / "packed", text=None, scenes=20))
    else:
        write = pack.ShardWriter.write

        def write_on_a_full_disk(*args):
            with full_disk(1000):
                write(*args)

        monkeypatch.setattr(pack.ShardWriter, "write", write_on_a_full_disk)
        with pytest.raises(UserError, match="pairs-000000 could not be written"):
            pack.main(command(vae_path, tmp_path / "packed", text=None, scenes=20))
    assert [path.name for path in (tmp_path / "packed").iterdir() if path.is_dir()] == []


# ------------------------------------------------------------------------------------------------------- disk against memory
def test_every_item_of_the_sources_is_stored_once(packed, vae_path):
    """Catches a lost or doubled document, a caption with another's picture, latents in the wrong order or precision."""
    stream, vae = shards.Shards(packed), checkpoint.load_vae(vae_path)
    said = [read()[0] for _, read in streams.scenes_of("text", "one", 150, 32)]
    told = [stream.tokenizer.decode(part) for documents, _ in all_rows(stream, "text") for parts in documents for part in parts]
    assert sorted(told) == sorted(said) and len(set(said)) > 20
    items = [(text, pixels()) for _, read in streams.scenes_of("pairs", "one", 150, 32) for text, pixels in [read()]]
    with torch.no_grad():
        wanted = vae.encode(vae_module.to_float(np.stack([pixels for _, pixels in items])))[0].numpy()
    found = [(stream.tokenizer.decode(part), latent) for documents, latents in all_rows(stream, "pairs")
             for part, latent in zip(itertools.chain(*documents), latents, strict=True)]
    assert len(found) == 150 and found[0][1].dtype == np.float16
    nearest = [int(np.abs(wanted - latent).reshape(150, -1).max(1).argmin()) for _, latent in found]
    assert sorted(nearest) == list(range(150))
    for k, (caption, latent) in zip(nearest, found):
        assert caption == items[k][0]
        np.testing.assert_allclose(latent, wanted[k], rtol=2 ** -10, atol=1e-4)          # float16 has 11 bits


def test_rows_are_what_data_lays_out_and_packs(packed):
    """Token by token, `has_loss` by `has_loss`: a batch from disk = data.lay_out and data.pack of the same documents as text.
    Catches a second, diverging implementation of the layout, and any offset that is off by one."""
    stream, seen = shards.Shards(packed), collections.Counter()
    for step in range(30):
        batch, at = stream.batch(5, step, 0, rows=2), 0
        for b, documents in enumerate(documents_of(batch)):
            in_memory = []
            for tokens in documents:
                assert tokens[0] == BOS and tokens[-1] == EOS
                words, parts, k = [], [], 0
                for token in tokens[1:-1]:              # the document again as `lay_out` takes it, from its tokens
                    if token == BOI:
                        parts += [words] * bool(words)
                        words = []
                    elif token == EOI:
                        parts, k = parts + [("image", at, int(batch.t_max[at]))], k + 1
                        at += 1
                    elif token != PATCH:
                        words.append(token)
                parts += [words] * bool(words)
                parts = [part if isinstance(part, tuple) else stream.tokenizer.decode(part) if DROP not in part else
                         ("dropped", "a " * len(part)) for part in parts]
                in_memory.append(parts)
                seen[tuple("image" if isinstance(p, tuple) and p[0] == "image" else "text" for p in parts)] += 1
            one = data.pack([data.lay_out(parts, stream.tokenizer, P) for parts in in_memory], T)
            assert len(one.tokens) == 1
            order = np.argsort([-len(d) for d in documents], kind="stable")              # pack puts the longest first
            assert [documents[k] for k in order] == documents_of(one)[0]
            for name in ("tokens", "has_loss", "doc_id"):
                assert torch.equal(getattr(one, name)[0], getattr(batch, name)[b]), name
            assert torch.equal(one.image_id[0] >= 0, batch.image_id[b] >= 0)
        assert at == len(batch.images) == len(batch.latents) and batch.images.tolist() == list(range(at))
        ids = batch.image_id[batch.image_id >= 0].view(-1, P)
        assert torch.equal(ids, torch.arange(at)[:, None].expand(at, P))                 # numbered in reading order
    assert seen[("text",)] and seen[("text", "image")] and seen[("image", "text")] and seen[("text", "image") * 2]


def test_latents_follow_their_places(packed):
    """The latents of a batch are those stored with the captions of its rows, also in rows read after text rows."""
    stream = shards.Shards(packed, drop=0.0)
    by_caption = collections.defaultdict(list)
    for documents, latents in all_rows(stream, "pairs"):
        for part, latent in zip(itertools.chain(*documents), latents):
            by_caption[tuple(part)].append(latent)
    for step in range(20):
        batch = stream.batch(1, step, 0, rows=3)
        m = 0
        for tokens in itertools.chain(*documents_of(batch)):
            texts, pictures, words = [], [], []
            for token in tokens[1:]:
                if token in (BOI, EOS) and words:
                    texts, words = texts + [tuple(words)], []
                elif token == EOI:
                    pictures, m = pictures + [batch.latents[m].numpy()], m + 1
                elif token >= len(data.SPECIAL):
                    words.append(token)
            for text, picture in zip(texts, pictures):
                assert any((picture == latent).all() for latent in by_caption[text])
        assert m == len(batch.latents)


def test_long_texts_are_cut_and_nothing_is_lost(tmp_path):
    """Texts of every length around T: no row has more than T positions, the pieces together are the text."""
    texts = [[f"w{(7 * n + k) % 50}" for k in range(n)] for n in (1, T - 3, T - 2, T - 1, T, 2 * T - 4, 2 * T - 3, 5 * T)]
    (tmp_path / "a.txt").write_text("\n\n".join(" ".join(text) for text in texts))
    total = pack.main(command(None, tmp_path / "packed", text=tmp_path / "a.txt", pairs=None, shard_rows=1))
    stream, stored = shards.Shards(tmp_path / "packed"), []
    for k in range(total["rows"]):
        documents, _ = stream.read_row("text", k)
        assert sum(2 + len(part) for parts in documents for part in parts) <= T
        stored += [stream.tokenizer.decode(part).split() for parts in documents for part in parts]
    pieces = [text[k: k + T - 2] for text in texts for k in range(0, len(text), T - 2)]
    assert sorted(stored) == sorted(pieces)
    assert total["text_tokens"] == sum(2 + len(piece) for piece in pieces)
    batch = stream.batch(0, 0, 0, rows=total["rows"])
    assert batch.tokens.shape == (total["rows"], T) and len(batch.latents) == len(batch.images) == 0


# ----------------------------------------------------------------------------------------------------------------- the order
@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 1000, 4097])
def test_the_order_is_a_bijection(n):
    """Catches a row that is never read, or read twice in an epoch."""
    assert sorted(shards.shuffled(k, n, "0 pairs 3") for k in range(n)) == list(range(n))


def test_orders_differ_and_are_even():
    """Every row comes at every place equally often, over epochs; epochs, seeds and kinds have orders of their own."""
    orders = [tuple(shards.shuffled(k, 6, f"0 text {epoch}") for k in range(6)) for epoch in range(2000)]
    assert len(set(orders)) > 600                       # of 720, of which 2000 draws hit 675
    counts = np.array([[sum(o[place] == row for o in orders) for row in range(6)] for place in range(6)])
    assert abs(counts - 2000 / 6).max() < 5 * np.sqrt(2000 * 5 / 36)
    long = {key: tuple(shards.shuffled(k, 500, key) for k in range(500)) for key in ("0 text 0", "0 text 1", "1 text 0", "0 pairs 0")}
    assert len(set(long.values())) == 4
    for order in long.values():                         # neighbours are torn apart
        assert abs(np.corrcoef(order, range(500))[0, 1]) < 0.2 and np.mean(np.abs(np.diff(order)) == 1) < 0.02


def test_a_batch_is_a_function_of_its_arguments(packed):
    """A step's rows are the same for 1, 2 or 8 micro-batches, for any number of ranks that share them, in any order of
    calls, in a process that starts in the middle: what makes resuming exact at any world size."""
    first, second = shards.Shards(packed), shards.Shards(packed)
    whole = [first.batch(3, step, 0, rows=8) for step in range(4)]
    for micros in (2, 4, 8):
        for step in (3, 1):
            ranks = [[second.batch(3, step, micro, rows=8 // micros, micro_batches=micros) for micro in range(rank, micros, 2)]
                     for rank in (1, 0)]                # two ranks, each with every other micro-batch
            parts = [b for pair in zip(ranks[1], ranks[0]) for b in pair]
            assert torch.equal(torch.cat([b.tokens for b in parts]), whole[step].tokens)
            assert torch.equal(torch.cat([b.latents for b in parts]), whole[step].latents)
            assert torch.equal(torch.cat([b.t_max for b in parts]), whole[step].t_max)
    assert not same(first.batch(4, 0, 0, rows=8), whole[0]) and not same(whole[0], whole[1])


def test_an_epoch_reads_each_row_once(packed):
    """Of each kind, without the held-out rows, which are never read; the next epoch has them in another order."""
    stream, read = shards.Shards(packed), {"text": [], "pairs": []}
    keep = stream.read_row
    stream.read_row = lambda kind, k: read[kind].append(k) or keep(kind, k)
    steps = 2 * sum(stream.rows.values()) * 2
    for step in range(steps):
        stream.draw_row(0, step)
    assert stream.held_out_rows == 7 and stream.rows["pairs"] == int(stream.begins["pairs"][-1]) - 7
    for kind, n in stream.rows.items():
        assert len(read[kind]) >= 2 * n
        assert sorted(read[kind][:n]) == sorted(read[kind][n: 2 * n]) == list(range(n)) and read[kind][:n] != read[kind][n: 2 * n]
    alone = shards.Shards(packed, text_only=True)       # a Llama's: every row is one of text, and none is passed over
    alone.read_row = lambda kind, k: read[f"alone {kind}"].append(k) or keep(kind, k)
    read["alone text"] = []
    for step in range(alone.rows["text"]):
        alone.draw_row(0, step)
    assert sorted(read["alone text"]) == list(range(alone.rows["text"]))


def test_a_document_that_just_fits():
    """A row of 12 positions, pictures of 4 patches. Catches one position too few or too many, and a pair that leaves something behind
    although it was refused."""
    text = pack.ShardWriter("text", 0, 12, 4, None, 0.0)
    text.add(list(range(10, 35)))                       # 25 ids between BOS and EOS: 10, 10 and 5 of them
    assert text.lengths == [12, 12, 7] and text.positions == 31
    pairs = pack.ShardWriter("pairs", 0, 12, 4, None, 0.999)
    pairs.add([10] * 4, "pixels")                       # BOS, 4 words, BOI, 4 patches, EOI, EOS
    with pytest.raises(UserError, match="a caption of 5 tokens and 4 patches do not fit in 12 positions"):
        pairs.add([10] * 5, "pixels")
    pairs.add([10], "pixels")                           # the first document is full
    assert pairs.lengths == [12, 9] and pairs.positions == 21 and len(pairs.pixels) == 2
    wide = pack.ShardWriter("pairs", 0, 16, 4, None, 0.999)
    wide.add([10], "pixels")
    wide.add([10], "pixels")                            # 9 and 7: they share a document
    assert wide.lengths == [16] and wide.documents == [[0, 1]]


# ------------------------------------------------------------------------------------------------------- the paper's numbers
def test_proportions(vae_path, tmp_path):
    """Over many rows: text tokens : patches = 1 : 1 within 2%; captions first in 80%; dropped in 10% of those; the noise
    limit where the picture is first, and only there. Drawn anew each epoch, with lengths preserved."""
    pack.main(command(vae_path, tmp_path, scenes=600, shard_rows=64))
    stream = shards.Shards(tmp_path, drop=0.1, t_limit=321, noisiest=900)
    patches = texts = 0
    first = dropped = documents = 0
    for step in range(300):
        batch = stream.batch(2, step, 0, rows=8)
        patches += int((batch.image_id >= 0).sum())
        texts += int(((batch.image_id < 0) & (batch.tokens != PAD)).sum())
        m = 0
        for tokens in itertools.chain(*documents_of(batch)):
            n = tokens.count(BOI)
            if n:
                picture_first = tokens[1] == BOI
                assert batch.t_max[m: m + n].tolist() == [321 if picture_first else 900] * n
                documents, first, dropped = documents + 1, first + (not picture_first), dropped + (tokens[1] == DROP)
                assert not (picture_first and DROP in tokens)
                m += n
        assert m == len(batch.images)
    assert texts / patches == pytest.approx(1, abs=0.02)

    def sigma(p, n):
        return 4 * np.sqrt(p * (1 - p) / n)

    assert abs(first / documents - 0.8) < sigma(0.8, documents) and documents > 3000
    assert abs(dropped / first - 0.1) < sigma(0.1, first)
    orders = collections.defaultdict(set)               # of one and the same row, over its epochs
    for g in range(6 * sum(stream.rows.values())):
        laid, latents = stream.draw_row(2, g)
        if latents is not None:
            lengths = tuple(len(data.lay_out(d, stream.tokenizer, stream.patches).tokens) for d in laid)
            orders[latents.tobytes()].add((lengths, tuple(isinstance(d[0], list) for d in laid), tuple(d[0][0] == "dropped" for d in laid)))
    assert all(len({lengths for lengths, _, _ in drawn}) == 1 for drawn in orders.values())
    assert np.mean([len(drawn) > 1 for drawn in orders.values()]) > 0.7


# ------------------------------------------------------------------------------------------------ opening, breaking, mending
def test_opening_reads_no_shard(packed, monkeypatch):
    """283,000 shards times 512 processes, each a header and five sizes: all that reading needs stands in index.json. An older one,
    which lists names alone, says the same."""
    whole = shards.Shards(packed)
    index = json.loads((packed / "index.json").read_text())
    (older := packed.parent / "older").mkdir()
    for path in packed.iterdir():
        (older / path.name).symlink_to(path)
    (older / "index.json").unlink()
    (older / "index.json").write_text(json.dumps({"shards": list(index["shards"])}))
    named = shards.Shards(older)
    assert named.rows == whole.rows and named.content == whole.content and named.settings == whole.settings
    headers = [json.loads((packed / name / "header.json").read_text()) for name in index["shards"]]
    for name in ("rows", "pictures"):
        assert sum(h[name] for h in headers) == sum(whole.total(kind, name) for kind in ("text", "pairs"))
    monkeypatch.setattr(shards, "read_header", lambda *_: pytest.fail("opening read a header"))
    monkeypatch.setattr(shards, "open_arrays", lambda *_: pytest.fail("opening read an array"))
    assert shards.Shards(packed).rows == whole.rows


def test_pieces_of_arrays_are_read_and_no_file_stays_open(packed):
    """Catches memory-mapped arrays, which keep their files open: after 170 shards a limit of 1,024 is reached, and the next shard
    "is broken". Also an array that is read as a whole: a trillion tokens do not fit in memory."""
    for kind in ("text", "pairs"):
        for file in (packed / f"{kind}-000000").glob("*.npy"):
            array = np.load(file)
            stored = shards.StoredArray(file)
            assert stored.dtype == array.dtype and "array" not in vars(stored)
            for a, b in ((0, len(array)), (1, 3), (2, 2), (len(array) - 1, len(array))):
                assert np.array_equal(stored[a:b], array[a:b])
            for span in (slice(-1, 1), slice(2, 1), slice(0, len(array) + 1)):
                with pytest.raises(ValueError):
                    stored[span]
    stream, before = shards.Shards(packed), len(os.listdir("/dev/fd"))
    for kind in ("text", "pairs"):
        all_rows(stream, kind)
    assert len(list(packed.glob("*-*"))) > 10 and len(os.listdir("/dev/fd")) == before


class Killed(BaseException):
    """Stands for a power cut: nothing may catch it."""


@pytest.mark.parametrize("after", [0, 1, 4, 9, 13])
@pytest.mark.parametrize("where", ["before the rename", "in the middle of a file"])
def test_killed_and_resumed_is_byte_identical(packed, vae_path, tmp_path, monkeypatch, after, where):
    """The same command after a kill gives the folder of an uninterrupted packing, byte for byte."""
    calls, name, owner = itertools.count(), *(("replace", os) if where.startswith("before") else ("save", np))
    keep, limit = getattr(owner, name), after if name == "replace" else 4 * after

    def dies(path, *rest, **options):
        if next(calls) == limit:
            if name == "save":
                Path(path).write_bytes(b"half an arr")
            raise Killed
        return keep(path, *rest, **options)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            pack.main(command(vae_path, tmp_path / "packed"))
    if after:
        with pytest.raises(UserError, match="has not finished"):
            shards.Shards(tmp_path / "packed")
    pack.main(command(vae_path, tmp_path / "packed"))
    assert contents(tmp_path / "packed") == contents(packed)
    pack.main(command(vae_path, tmp_path / "packed"))   # and once more: nothing left to do
    assert contents(tmp_path / "packed") == contents(packed)


def test_a_real_kill(packed, vae_path, tmp_path):
    """SIGKILL to `python -m scale.pack`, then the same command line."""
    line = [sys.executable, "-m", "scale.pack", *command(vae_path, tmp_path / "packed")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}      # sums in another order end in other bits
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    while process.poll() is None and not (tmp_path / "packed/text-000001").exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was quicker than this test"
    assert 2 <= len(list((tmp_path / "packed").glob("*-*"))) < len(list(packed.glob("*-*")))
    done = subprocess.run(line, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "text tokens" in done.stdout and "% full" in done.stdout
    assert contents(tmp_path / "packed") == contents(packed)


def edit_header(path, **changes):
    """Change fields of a shard's header; LEFT_OUT leaves one out."""
    header = json.loads((path / "header.json").read_text()) | changes
    header = {name: value for name, value in header.items() if value is not LEFT_OUT}
    (path / "header.json").write_text(json.dumps(header))


LEFT_OUT = object()
HEADERS = {
    "no kind": dict(kind=LEFT_OUT), "another kind": dict(kind="sounds"), "kind of another type": dict(kind=["pairs"]),
    "bytes a list": dict(bytes=[]), "bytes not numbers": dict(bytes={"words.npy": "many"}),
    "settings a number": dict(settings=1), "settings empty": dict(settings={}),
    "rows null": dict(rows=None), "rows negative": dict(rows=-1), "rows zero": dict(rows=0), "rows true": dict(rows=True),
    "rows in words": dict(rows="nine"), "positions a list": dict(positions=[]), "no pictures": dict(pictures=LEFT_OUT),
    "no recipe": dict(recipe=LEFT_OUT), "recipe without sources": dict(recipe={}), "next null": dict(next=None),
    "next too short": dict(next=[0]),
}


@pytest.mark.parametrize("harm, words", [
    (lambda p: shutil.rmtree(p), ["is missing"]),
    (lambda p: (p / "header.json").write_text("{"), ["is broken", "header.json"]),
    (lambda p: (p / "header.json").unlink(), ["is missing"]),
    (lambda p: (p / "latents.npy").unlink(), ["is broken", "latents.npy"]),
    (lambda p: (p / "words.npy").write_bytes((p / "words.npy").read_bytes()[:-3]), ["is broken", "words.npy"]),
    (lambda p: ((p / "parts.npy").unlink(), os.mkfifo(p / "parts.npy")), ["is broken", "parts.npy"]),
    (lambda p: (p / "header.json").write_text("[1, 2]"), ["is broken", "header.json"]),
    (lambda p: (p / "header.json").write_text("[" * 100_000), ["is broken", "header.json"]),
    *[(lambda p, changes=changes: edit_header(p, **changes), ["is broken", "header.json"]) for changes in HEADERS.values()],
], ids=["no folder", "header cut", "no header", "no array", "truncated", "a pipe", "header a list", "header nested", *HEADERS])
def test_broken_shards_are_named_and_mended(own, packed, vae_path, harm, words):
    """A missing shard at opening, before a day of training; a broken one by `python -m scale.shards packed`, or when its row is
    read; and the packing command makes the same bytes again."""
    harm(own / "pairs-000001")
    look = shards.verify if (own / "pairs-000001").exists() else shards.Shards
    looks = [look] if words[-1] == "header.json" or words == ["is missing"] else [look, lambda own: all_rows(shards.Shards(own), "pairs")]
    for look in looks:
        with pytest.raises(UserError) as found:
            look(own)
        assert all(word in str(found.value) for word in [*words, "pairs-000001", "packing command again"])
    pack.main(command(vae_path, own))
    assert contents(own) == contents(packed)


@pytest.mark.parametrize("name", ["words", "parts", "documents", "rows", "sums", "latents"])
def test_a_flipped_bit_is_found(own, name):
    """Same sizes, wrong content: the row's checksum finds it when the row is read, wherever in the shard it is."""
    path, rng = own / f"pairs-000002/{name}.npy", np.random.default_rng(0)
    raw, n = path.read_bytes(), np.load(path).nbytes
    for place in [len(raw) - n, len(raw) - 1, *rng.integers(len(raw) - n, len(raw), size=4)]:
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1:])
        with pytest.raises(UserError, match="pairs-000002 is broken"):
            all_rows(shards.Shards(own), "pairs")
        with pytest.raises(SystemExit):
            run_command(lambda _: shards.verify(own))
    path.write_bytes(raw)
    all_rows(shards.Shards(own), "pairs")


def test_a_flipped_bit_is_found_without_asserts(own, tmp_path):
    """Catches a check that is an assert: `python -O` leaves it out, and a damaged shard "is what was written". Also that the
    command works from another folder."""
    path = own / "text-000001/words.npy"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 16]))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONOPTIMIZE": "1"}
    done = subprocess.run([sys.executable, "-m", "scale.shards", own], cwd=tmp_path, env=env, capture_output=True, text=True)
    check_sentence(done.returncode, done.stdout, done.stderr, "text-000001 is broken", "not what was written")


def test_an_unfinished_or_broken_index(own, tmp_path):
    """No index: packing has not finished. A broken one: named."""
    index = json.loads((own / "index.json").read_text())
    name, counts = next(iter(index["shards"].items()))
    wrong = [index["settings"] | change for change in (dict(latent=[4]), dict(latent=4), dict(latent=[4, 8, 0.5]), dict(vae=7), dict(patch="2"))]
    changes = [dict(shards={}), dict(settings=3), dict(content=None), *(dict(settings=settings) for settings in wrong), *({"shards": {name: counts | change}} for change in (
        dict(rows=-1), dict(rows=0), dict(rows=True), dict(positions="nine"), dict(kind="sounds"), dict(kind=["pairs"])))]
    for content in ('{"shards": [', '{"shards": 3}', '{"shards": [1]}', '{"shards": []}', "[]", f'{{"shards": {{"{name}": 3}}}}',
                    *(json.dumps(index | change) for change in changes)):
        (own / "index.json").write_text(content)
        with pytest.raises(UserError, match="index.json is broken"):
            shards.Shards(own)
    index["shards"][name]["rows"] += 1                  # not broken, but not what the shard says
    (own / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not what the shards beside it say"):
        shards.verify(own)
    (own / "index.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        shards.Shards(own)
    with pytest.raises(UserError, match="no index.json"):
        shards.Shards(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------- other settings
@pytest.fixture
def other_vae(vae_path, tmp_path):
    """Path of a VAE that differs in one number."""
    content = torch.load(vae_path, weights_only=True)
    content["weights"]["shift"][0] += 1e-3
    checkpoint.save(tmp_path / "other.pt", content)
    return tmp_path / "other.pt"


def test_mixed_folders(packed, own, vae_path, other_vae, tmp_path):
    """Several packings in one folder are read as one, if tokenizer, VAE and sizes agree; else the odd shard is named."""
    both = tmp_path / "both"
    shutil.copytree(packed, both / "a")
    pack.main(command(vae_path, both / "b", scenes=40))
    one, two, stream = shards.Shards(both / "a"), shards.Shards(both / "b"), shards.Shards(both)
    assert all(int(stream.begins[k][-1]) == int(one.begins[k][-1]) + int(two.begins[k][-1]) for k in ("text", "pairs"))
    assert sorted(str(d) for d, _ in all_rows(stream, "text")) == sorted(str(d) for s in (one, two) for d, _ in all_rows(s, "text"))
    for options, word in ((dict(vae=other_vae), "vae"), (dict(seq_len=48), "seq_len"), (dict(patch=4), "patch"),
                          (dict(tokenizer=tmp_path / "words.json"), "tokenizer")):
        (tmp_path / "words.json").write_text(json.dumps([*stream.tokenizer.vocabulary, "zebra"]))
        shutil.rmtree(both / "b")
        pack.main(command(**{"vae": vae_path, "out": both / "b", "scenes": 40, **options}))
        with pytest.raises(UserError, match=f"both/b was packed with another .*{word}"):
            shards.Shards(both)


def test_other_tokenizer_and_other_vae(own, packed, other_vae, vae_path, tmp_path):
    """The files beside the shards, or the --vae of the command, are not those of the shards."""
    stream = shards.Shards(own)
    assert shards.fingerprint(stream.load_vae()) == shards.fingerprint(stream.load_vae(vae_path)) == stream.settings["vae"]
    with pytest.raises(UserError, match="another VAE"):
        stream.load_vae(other_vae)
    shutil.copy(other_vae, own / "vae.pt")
    with pytest.raises(UserError, match="another VAE"):
        shards.Shards(own).load_vae()
    (own / "tokenizer.json").write_text(json.dumps([*stream.tokenizer.vocabulary, "zebra"]))
    with pytest.raises(UserError, match="another tokenizer"):
        shards.Shards(own)
    (own / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="another tokenizer"):
        shards.Shards(own)


@pytest.mark.parametrize("options, words", [
    (dict(seq_len=48), ["seq_len", "64", "48", "--out"]),
    (dict(patch=4), ["patch"]),
    (dict(shard_rows=9), ["shard_rows"]),
    (dict(another=0.5), ["another"]),
    (dict(scenes=151), ["sources"]),
    (dict(vae="other"), ["another VAE", "--out"]),
    (dict(tokenizer="other"), ["another tokenizer", "--out"]),
])
def test_going_on_with_other_options_is_refused(capsys, own, packed, vae_path, other_vae, tmp_path, options, words):
    """One sentence, and the folder is as it was."""
    (tmp_path / "words.json").write_text(json.dumps([*shards.Shards(own).tokenizer.vocabulary, "zebra"]))
    options = {k: {"vae": other_vae, "tokenizer": tmp_path / "words.json"}[k] if v == "other" else v for k, v in options.items()}
    with pytest.raises(SystemExit) as stop:
        run_command(pack.main, command(**{"vae": vae_path, "out": own, **options}))
    captured = capsys.readouterr()
    check_sentence(stop.value.code, captured.out, captured.err, *words)
    assert contents(own) == contents(packed)


def test_more_sources_may_follow(vae_path, tmp_path):
    """The same command with one source more packs that one too, and leaves the shards that are there alone."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} text of some words number {k % 7}" for k in range(90)))
    (tmp_path / "words.json").write_text(json.dumps("a b text of some words number 0 1 2 3 4 5 6".split()))
    options = dict(tokenizer=tmp_path / "words.json", pairs=None, vae=None)
    pack.main(command(out=tmp_path / "packed", text=tmp_path / "a.txt", **options))
    before = contents(tmp_path / "packed")
    pack.main(command(out=tmp_path / "packed", text=[tmp_path / "a.txt", tmp_path / "b.txt"], **options))
    after = contents(tmp_path / "packed")
    assert all(after[path] == before[path] for path in before if path.name != "index.json") and len(after) > len(before)
    told = [shards.Shards(tmp_path / "packed").tokenizer.decode(d[0]) for d in
            itertools.chain(*(documents for documents, _ in all_rows(shards.Shards(tmp_path / "packed"), "text")))]
    assert len(told) == 180 and sum(text.startswith("b ") for text in told) == 90


# ------------------------------------------------------------------------------------------------------------------- sources
def picture(color, kind="PNG", size=(40, 30)):
    """The bytes of a picture."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def test_sources(vae_path, tmp_path, capsys):
    """Folders with captions.jsonl, tars in webdataset's layout, text lines and JSON lines, read as streams; what is bad is
    counted, named and skipped, and pictures reach the VAE as support.common.open_picture crops them."""
    folder, tars, texts = tmp_path / "folder", tmp_path / "tars", tmp_path / "texts"
    for path in (folder, tars, texts):
        path.mkdir()
    (folder / "red.png").write_bytes(picture("red", size=(90, 40)))
    (folder / "cut.png").write_bytes(picture("red")[:50])
    entries = [{"image": "red.png", "caption": "All Red"}, {"image": "cut.png", "caption": "cut"}, {"image": "no.png", "caption": "no"},
               {"caption": "nothing"}, {"image": "red.png", "caption": "  "}, {"image": "red.png", "caption": "red again"},
               {"image": "red.png", "caption": "very " * 60}]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    members = {"b/1.jpg": picture("blue", "JPEG"), "b/1.txt": b"blue one", "b/2.json": b'{"caption": "green two"}', "b/2.x.png": b"",
               "b/2.png": picture("lime"), "b/3.jpg": picture("red", "JPEG"), "b/4.jpg": b"not a picture", "b/4.txt": b"four"}
    with tarfile.open(tars / "0.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (texts / "a.txt").write_bytes("One line\n\ntwo lines, really\n".encode() + b"\xff\xfe bad\n")
    (texts / "b.jsonl").write_text('{"text": "from json"}\n\n{"words": "no"}\nnot json\n{"text": 7}\n{"text": "last"}')
    total = pack.main(command(vae_path, tmp_path / "packed", text=texts, pairs=[folder, tars], another=0))
    stream, out = shards.Shards(tmp_path / "packed"), capsys.readouterr().out

    def texts_of(kind):
        return sorted(stream.tokenizer.decode(part) for documents, _ in all_rows(stream, kind) for part in itertools.chain(*documents))

    assert texts_of("text") == ["from json", "last", "one line", "two lines, really"]
    assert texts_of("pairs") == ["all red", "blue one", "green two", "red again"]
    assert total["skipped"] == 4 + 5 + 2 and "skipped 11" in out and "a.txt line 4" in out and "b.jsonl line 3" in out
    problems = json.loads((tmp_path / "packed/pairs-000000/header.json").read_text())["problems"]
    for name, problem in zip(["cut.png", "no.png", "captions.jsonl line 4", "the caption is empty", "60 tokens"], problems, strict=True):
        assert name in problem and "BytesIO" not in problem
    vae = stream.load_vae()
    with torch.no_grad():
        red = vae.encode(vae_module.to_float(np.stack([open_picture(folder / "red.png", 32)])))[0][0]
    latents = {stream.tokenizer.decode(p): x for ds, xs in all_rows(stream, "pairs") for p, x in zip(itertools.chain(*ds), xs)}
    np.testing.assert_allclose(latents["all red"], red, rtol=2 ** -10, atol=1e-4)
    assert not np.allclose(latents["blue one"], latents["green two"], atol=0.05)


def test_bad_members_of_a_tar_are_named(tmp_path):
    """By tar and stem, not as <BytesIO object>; a truncated tar stops the packing and is named itself."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("1.jpg", b"no picture"), ("1.txt", b"one"), ("2.png", picture("red")), ("2.txt", b"two")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (_, one), (_, two) = streams.members_of(path, 32)
    with tarfile.open(path) as tar:
        items = streams.members_of(path, 32)
        text, pixels = next(items)[1]()
        assert text == "one"
        with pytest.raises(UserError, match="0.tar:1.jpg cannot be read"):
            pixels()
        text, pixels = next(items)[1]()
        assert text == "two" and pixels().shape == (32, 32, 3)
    path.write_bytes(path.read_bytes()[:1800])
    with pytest.raises(UserError, match="0.tar is truncated"):
        list(streams.members_of(path, 32))
    path.write_text("no tar at all")
    with pytest.raises(UserError, match="0.tar is truncated or not a tar"):
        list(streams.members_of(path, 32))


def write_tar(path, members):
    """A tar of {name: bytes}; a name may stand in it twice."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_of_several_pictures_of_a_name_the_plain_one_is_meant(tmp_path):
    """Catches masks that are packed as the pictures, because the last file of a kind won; and a guess where nothing is plain."""
    red, blue = picture("red"), picture("blue")
    path = write_tar(tmp_path / "0.tar", [
        ("a.seg.png", blue), ("a.png", red), ("a.depth.jpg", blue), ("a.txt", b"one"), ("a.json", b'{"caption": "not this"}'),
        ("b.png", red), ("b.long.txt", b"not this"), ("b.txt", b"two"),
        ("c.seg.png", red), ("c.txt", b"three"),
        ("d.seg.png", red), ("d.depth.png", red), ("d.txt", b"four"),
        ("e.png", red), ("e.jpg", red), ("e.txt", b"five"),
        ("f.png", red), ("f.txt", b"six"), ("f.txt", b"six again")])
    texts, problems = [], []
    for _, read in streams.members_of(path, 8):
        try:
            text, pixels = read()
            texts.append(text)
            assert pixels()[4, 4].tolist() == [255, 0, 0]
        except UserError as problem:
            problems.append(str(problem))
    assert texts == ["one", "two", "three"]
    for problem, names in zip(problems, ["d.seg.png, d.depth.png", "e.png, e.jpg", "f.txt, f.txt"], strict=True):
        assert names in problem and "not clear" in problem


@pytest.mark.parametrize("names", [["a.txt", "a.txt"], ["a.txt", "./a.txt"], ["scenes", "scenes"], [".", "a.txt"], ["a.txt", "link.txt"]])
def test_a_source_that_is_named_twice(tmp_path, monkeypatch, names):
    """Catches documents that count double, or one of two sources that vanishes, without a word."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one\n")
    if "link.txt" in names:
        (tmp_path / "link.txt").symlink_to("a.txt")
    with pytest.raises(UserError, match=f"--text names .*{names[1].strip('./')} twice"):
        streams.find_sources("text", names, 5)


def small_text(folder, out, **options):
    """The arguments that pack folder/a.txt with words that are known."""
    (folder / "words.json").write_text(json.dumps("one two three four five six".split()))
    return command(None, out, text=folder / "a.txt", pairs=None, tokenizer=folder / "words.json", **options)


def test_a_source_that_has_changed_since(tmp_path):
    """Catches success over the old data, where a file of the same size has other content; and a picture that was replaced."""
    (tmp_path / "a.txt").write_text("one two three\n" * 20)
    pack.main(small_text(tmp_path, tmp_path / "out"))
    before = contents(tmp_path / "out")
    pack.main(small_text(tmp_path, tmp_path / "out"))
    (tmp_path / "b.txt").write_text("four five six\n")
    (tmp_path / "a.txt").write_text("one two three\n" * 19 + "six two three\n")
    with pytest.raises(UserError, match="text-000000 was packed from other sources .*a.txt has changed since.*--out"):
        pack.main(small_text(tmp_path, tmp_path / "out"))
    assert contents(tmp_path / "out") == before

    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes(picture("red"))
    (folder / "captions.jsonl").write_text('{"image": "1.png", "caption": "one"}\n{"image": "no.png", "caption": "two"}\nnot json\n')
    stamp = streams.stamp_of(str(folder), 1)
    (folder / "2.png").write_bytes(picture("blue"))     # nobody names it
    (folder / "later").mkdir()
    assert streams.stamp_of(str(folder), 1) == stamp
    (folder / "1.png").write_bytes(picture("lime"))
    assert streams.stamp_of(str(folder), 1) != stamp


def test_the_same_source_in_another_place(tmp_path, monkeypatch):
    """Catches a packing that cannot go on because its data were moved, or are named by another path."""
    (tmp_path / "a.txt").write_text("one two three\n" * 20)
    pack.main(small_text(tmp_path, tmp_path / "out"))
    before = contents(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    pack.main(small_text(Path("."), "out"))
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "moved/a.txt")
    pack.main(small_text(tmp_path / "moved", "out"))
    assert contents(tmp_path / "out") == before
    header = tmp_path / "out/text-000000/header.json"   # as before stamps: sizes alone
    kept = json.loads(header.read_text())
    kept["recipe"]["sources"] = {name: stamp[0] for name, stamp in kept["recipe"]["sources"].items()}
    header.write_text(json.dumps(kept))
    pack.main(small_text(tmp_path / "moved", "out"))


@pytest.mark.parametrize("encoding, sentence", [("utf-16", "is text in UTF-16"), ("utf-32", "is text in UTF-16"), ("utf-16-be", "begins with a zero byte"),
                                                ("utf-16-le", "NUL|nothing in .* can be used")])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_in_utf_16(tmp_path, name, encoding, sentence):
    """Catches words with a NUL behind each letter, packed as if they were text."""
    text = "one two\nthree four\n" if name == "a.txt" else '{"text": "one two"}\n{"text": "three"}\n'
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=sentence):
        pack.main(command(None, tmp_path / "out", text=tmp_path / name, pairs=None))
    assert not list(tmp_path.glob("out/text*"))


def test_a_bom_at_the_start_of_a_text(tmp_path):
    """Catches a word "\\ufeffa" in the vocabulary."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone two\nthree\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one two"}\n')
    for name in ("a.txt", "b.jsonl"):
        assert next(streams.items_of("text", str(tmp_path / name), None))[1]() == ("one two", None)
    path = write_tar(tmp_path / "c.tar", [("1.png", picture("red")), ("1.txt", b"\xef\xbb\xbfone two")])
    items = streams.members_of(path, 8)
    assert next(items)[1]()[0] == "one two"


def test_scenes_come_in_groups(monkeypatch):
    """Catches a last group that is as large as the others: more pairs than were asked for."""
    monkeypatch.setattr(streams, "SCENES_AT_ONCE", 4)
    items = list(streams.scenes_of("pairs", "one", 6, 32))
    assert [so_far for so_far, _ in items] == [1, 2, 3, 4, 5, 6]
    begun = [read()[0] for _, read in streams.scenes_of("pairs", "one", 4, 32)]
    assert [read()[0] for _, read in items][:4] == begun


def test_a_line_or_a_member_of_gigabytes(tmp_path, monkeypatch):
    """Catches a file without a line's end, or a sparse member of a tar, that fills the memory. The next line is read."""
    monkeypatch.setattr(streams, "MOST_BYTES", 10)
    (tmp_path / "a.txt").write_text("x" * 95 + "\n123456789\n" + "y" * 10 + "\n" + "z" * 10)
    items = list(streams.items_of("text", str(tmp_path / "a.txt"), None))
    assert [so_far for so_far, _ in items] == [96, 106, 117, 127]
    for k in (0, 2):                                    # with its end, the third has 11 bytes
        with pytest.raises(UserError, match=f"a.txt line {k + 1} is longer than 10 bytes"):
            items[k][1]()
    assert [items[k][1]()[0] for k in (1, 3)] == ["123456789", "z" * 10]
    path = write_tar(tmp_path / "c.tar", [("1.png", picture("red")), ("1.txt", b"one")])
    items = streams.members_of(path, 8)
    text, pixels = next(items)[1]()
    assert text == "one"
    info = tarfile.TarInfo("1.png")
    info.sparse = [(k, 0) for k in range(10 ** 6)]      # no content, and a map that takes hours to follow
    with pytest.raises(UserError, match="sparse file"):
        streams.read_member(None, info, "c.tar:1.png")
    with pytest.raises(UserError, match="c.tar:1.png has more than 10 bytes"):
        pixels()


def test_what_is_missing_for_training_is_said(tmp_path, capsys, vae_path):
    """Catches hours of packing text alone, when training will ask for pairs, with --model llama as well."""
    (tmp_path / "a.txt").write_text("one two three\n" * 20)
    pack.main(small_text(tmp_path, tmp_path / "out"))
    assert "0 rows of pairs: train.py needs at least ten, for --model llama, too" in capsys.readouterr().out
    pack.main(command(vae_path, tmp_path / "pairs", text=None))
    assert "these are pairs alone" in capsys.readouterr().out
    pack.main(command(vae_path, tmp_path / "both", scenes=100))
    assert "these are" not in capsys.readouterr().out


@pytest.mark.parametrize("options, words", [
    (dict(text=None, pairs=None), ["say what to pack"]),
    (dict(text="absent.jsonl"), ["absent.jsonl: there is no such"]),
    (dict(pairs="absent"), ["absent", "captions.jsonl"]),
    (dict(text="."), ["no .txt or .jsonl"]),
    (dict(pairs="."), ["no .tar", "captions.jsonl"]),
    (dict(vae=None), ["--vae", "python -m autoencoder.train"]),
    (dict(vae="absent.pt"), ["absent.pt"]),
    (dict(image_size=30), ["--image-size 30", "divisible"]),
    (dict(patch=3), ["--patch 3"]),
    (dict(patch=1), ["64 patches", "--seq-len 64", "raise"]),
    (dict(seq_len=2), ["--seq-len", "at least 3"]),
    (dict(another=1), ["--another"]),
    (dict(shard_rows=0), ["--shard-rows"]),
    (dict(tokenizer="bert.bin"), ["bert.bin", ".model"]),
    (dict(tokenizer="absent.model"), ["absent.model"]),
    (dict(world="twelve"), ["--world", "twelve"]),
])
def test_mistakes(capsys, monkeypatch, tmp_path, vae_path, options, words):
    """One sentence, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_command(pack.main, command(**{"vae": vae_path, "out": "out", **options}))
    captured = capsys.readouterr()
    check_sentence(stop.value.code, captured.out, captured.err, *words)
    assert not list(tmp_path.iterdir())


def test_nothing_usable(capsys, tmp_path):
    """Sources without one good document: the first problem is told."""
    (tmp_path / "a.jsonl").write_text('{"words": 1}\n' * 3)
    (tmp_path / "words.json").write_text('["a"]')
    with pytest.raises(UserError, match="a.jsonl can be used; the first of 3 problems: .*line 1"):
        pack.main(command(None, tmp_path / "out", text=tmp_path / "a.jsonl", pairs=None, tokenizer=tmp_path / "words.json"))


# ------------------------------------------------------------------------------------------------------------ SentencePiece
def test_without_sentencepiece(monkeypatch):
    """The extra is optional: the sentence says what to install."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        checkpoint.load_tokenizer(b"model")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Path of a SentencePiece model of 300 pieces, trained here."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="pip install sentencepiece")
    path, rng = tmp_path_factory.mktemp("pieces"), np.random.default_rng(0)
    lines = [read()[0] for _, read in streams.scenes_of("text", "six", 300, 32)] + ["".join(rng.choice(list("abcdefgh "), 40)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(path / "p"), vocab_size=300,
                                             byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    return path / "p.model"


def test_pieces(pieces):
    """Ids stand behind the special tokens; any text comes back; no text can forge the layout; the bytes are all of it."""
    words = checkpoint.load_tokenizer(pieces)
    for text in ("a red circle", "<boi> <s> </s> <patch>", "Grüße, 世界 :-)"):
        ids = words.encode(text)
        assert min(ids) >= len(data.SPECIAL) and max(ids) < len(words) and words.decode([BOS, *ids, EOS]) == text
    assert words.vocabulary[: len(data.SPECIAL)] == list(data.SPECIAL)
    assert [words.vocabulary[k] for k in words.encode("a circle")][0].startswith("▁")
    again = checkpoint.load_tokenizer(checkpoint.dump_tokenizer(words))
    assert again.encode("a red circle") == words.encode("a red circle") and shards.fingerprint(again) == shards.fingerprint(words)
    not_text = pieces.read_bytes().replace("▁".encode(), b"\xe2\x28\xa1")              # as long as before
    for bad in (b"", b"garbage" * 9, not_text):
        with pytest.raises(UserError, match="not a SentencePiece model"):
            checkpoint.load_tokenizer(bad)


def test_words_that_capitals_told_apart():
    """Catches a checkpoint of an earlier version whose words move to other ids without a word."""
    assert checkpoint.load_tokenizer([*data.SPECIAL, "blue", "red"]).vocabulary == [*data.SPECIAL, "blue", "red"]
    for kept in (["Red", "red"], ["Red"]):
        with pytest.raises(UserError, match="capital letters"):
            checkpoint.load_tokenizer([*data.SPECIAL, *kept])


def test_pieces_from_pack_to_checkpoint(pieces, vae_path, tmp_path, monkeypatch):
    """Pack with a SentencePiece model, train two steps, and the model.pt alone holds the tokenizer."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    pack.main(command(vae_path, tmp_path / "packed", tokenizer=pieces, seq_len=192, shard_rows=2))
    assert (tmp_path / "packed/tokenizer.model").read_bytes() == pieces.read_bytes()
    stream = shards.Shards(tmp_path / "packed")
    told = [stream.tokenizer.decode(part) for documents, _ in all_rows(stream, "text") for parts in documents for part in parts]
    assert sorted(told) == sorted(read()[0] for _, read in streams.scenes_of("text", "one", 150, 32))
    train.main(training(tmp_path / "packed", tmp_path / "run", steps=2, documents=2, seq_len=192))
    words = load_trained(tmp_path / "run/model.pt").tokenizer
    assert words.decode(words.encode("a red circle")) == "a red circle" and words.model == pieces.read_bytes()


def test_one_rule_for_capitals_and_spaces(pieces, vae_path, tmp_path):
    """Catches other ids for the same caption in packing, in fine-tuning on a folder, and in sampling. Only data.Words, whose
    vocabulary is in lower case, tells no capitals apart."""
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = []
    for k in range(12):
        (folder / f"{k}.png").write_bytes(picture((20 * k, 0, 0)))
        lines.append(json.dumps({"image": f"{k}.png", "caption": f" A  Red\nCIRCLE {k}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    pack.main(command(vae_path, tmp_path / "packed", text=None, pairs=folder, tokenizer=pieces, seq_len=192, scenes=None))
    stream = shards.Shards(tmp_path / "packed")
    packed = sorted(part for documents, _ in all_rows(stream, "pairs") for part in itertools.chain(*documents))
    own = [text for split in ("train", "test") for text in choose.load_pairs("folder", folder, 32, split).captions]
    assert packed == sorted(stream.tokenizer.encode(text) for text in own)
    prompts = [sample.read_prompt(f" A Red CIRCLE {k} ", None) for k in range(12)]
    assert packed == sorted(stream.tokenizer.encode(text) for [text] in prompts)
    words = data.Words(choose.load_pairs("folder", folder, 32).vocabulary())
    assert words.encode("a red circle 3") == words.encode("A RED Circle 3")


def test_lengths_are_measured_in_tokens(pieces, vae_path, tmp_path, monkeypatch):
    """Catches fine-tuning with a SentencePiece tokenizer that ends in step 2, over a caption of few words and many tokens."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    pack.main(command(vae_path, tmp_path / "packed", tokenizer=pieces, seq_len=192, shard_rows=2))
    train.main(training(tmp_path / "packed", tmp_path / "run", steps=1, documents=2, seq_len=192))
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = []
    for k in range(12):
        (folder / f"{k}.png").write_bytes(picture((20 * k, 0, 0)))
        lines.append(json.dumps({"image": f"{k}.png", "caption": f"unforeseeable words {k}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    options = ["--data", "folder", "--data-dir", folder, "--init", tmp_path / "run/model.pt", "--out", tmp_path / "tuned", "--documents", 4,
               "--steps", 2, "--samples", 0, "--gap-every", 2]
    longest = max(len(shards.Shards(tmp_path / "packed").tokenizer.encode(f"unforeseeable words {k}")) for k in range(12))
    need = longest + P + 4
    assert longest > 6
    with pytest.raises(UserError, match=f"line 1[12]: a caption of {longest} tokens is too long.* takes {need} positions"):
        train.main([str(word) for word in [*options, "--seq-len", need - 1]])
    train.main([str(word) for word in [*options, "--seq-len", need]])


def test_editing_with_the_papers_tokenizer(pieces, vae_path, tmp_path, monkeypatch):
    """§4.5 at size: pack, train, fine-tune on edits of the world and of a folder, all in pieces. Catches an instruction whose
    length is counted in words, found too long in step 2, and one that is lower-cased on its way."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    pack.main(command(vae_path, tmp_path / "packed", tokenizer=pieces, seq_len=192, shard_rows=2))
    train.main(training(tmp_path / "packed", tmp_path / "run", steps=1, documents=2, seq_len=192))
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = []
    for k in range(12):
        (folder / f"{k}.png").write_bytes(picture((20 * k, 0, 0)))
        (folder / f"{k}_after.png").write_bytes(picture((20 * k, 99, 0)))
        lines.append(json.dumps({"before": f"{k}.png", "instruction": f"Unforeseeably GREEN {k}", "after": f"{k}_after.png"}))
    (folder / "edits.jsonl").write_text("\n".join(lines))
    tokenizer = shards.Shards(tmp_path / "packed").tokenizer
    longest = max(len(tokenizer.encode(f"Unforeseeably GREEN {k}")) for k in range(12))
    need = 2 * (P + 2) + longest + 2
    edit = ["--preset", "edit", "--init", tmp_path / "run/model.pt", "--documents", 4, "--steps", 2, "--samples", 0, "--gap-every", 2]
    mine = [*edit, "--data-dir", folder]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda run: pytest.fail("trained before it measured"))
        with pytest.raises(UserError, match=f"edits.jsonl line 1[12]: a caption of {longest} tokens is too long.* takes {need} positions"):
            train.main([str(word) for word in [*mine, "--out", tmp_path / "short", "--seq-len", need - 1]])
    train.main([str(word) for word in [*mine, "--out", tmp_path / "mine", "--seq-len", need]])
    train.main([str(word) for word in [*edit, "--out", tmp_path / "world", "--seq-len", 192, "--pairs", 40]])
    tuned = load_trained(tmp_path / "mine/model.pt").tokenizer
    assert tuned.model == pieces.read_bytes() and longest > 6
    [first] = sample.read_prompt(" Unforeseeably  GREEN 3 ", None)
    assert tuned.encode(first) == tokenizer.encode("Unforeseeably GREEN 3") != tokenizer.encode("unforeseeably green 3")


# ------------------------------------------------------------------------------------------------------------------ training
def training(folder, out, **options):
    """The argument list of a small training on a packed folder."""
    small = dict(data="shards", data_dir=folder, size="toy", patch=2, seq_len=T, documents=6, steps=6, warmup=2, log_every=2,
                 gap_every=6, save_every=3, samples=0, out=out)
    return [str(word) for k, v in {**small, **options}.items() for word in ("--" + k.replace("_", "-"), v)]


def test_training_on_shards(packed, tmp_path, monkeypatch):
    """train.py on packed scenes: the losses fall; interrupted and resumed gives the weights of the run in one go."""
    monkeypatch.setitem(model.SIZES, "toy", (2, 32, 2))
    train.main(training(packed, tmp_path / "whole", steps=40, lr=5e-3, log_every=10, gap_every=40, save_every=20))
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert log[-1]["lm"] < 0.7 * log[0]["lm"] and log[-1]["diffusion"] < 0.95 * log[0]["diffusion"] and "gap" in log[-1]
    keep, steps = train.train_step, itertools.count()

    def stops(run):
        if next(steps) == 27:
            raise Killed
        return keep(run)
    options = dict(steps=40, lr=5e-3, log_every=10, gap_every=40, save_every=20)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stops)
        with pytest.raises(Killed):
            train.main(training(packed, tmp_path / "again", **options))
    train.main(training(packed, tmp_path / "again", **options) + ["--resume"])
    a, b = (checkpoint.load(tmp_path / f"{name}/model.pt", "model")["weights"] for name in ("whole", "again"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_run_on_shards_ends_with_pictures(packed, tmp_path, monkeypatch, capsys):
    """Catches a run of weeks that shows nothing: the captions that were held out are drawn, in words, though shards keep ids."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    drawn, draw = [], sample.draw
    monkeypatch.setattr(sample, "draw", lambda trained, texts, **more: drawn.extend(texts) or draw(trained, texts, **more))
    train.main(training(packed, tmp_path / "run", steps=1, samples=3, sample_steps=2))
    stream = shards.Shards(packed)
    assert len(drawn) == 3 and drawn == [stream.tokenizer.decode(ids) for ids in stream.held_out(3)[0]] and "a" in drawn[0].split()
    assert (tmp_path / "run/samples.png").stat().st_size > 1000 and "samples.png" in capsys.readouterr().out


def test_fine_tuning_on_shards_of_another_tokenizer_or_vae(packed, vae_path, other_vae, tmp_path, monkeypatch):
    """Catches --init and --resume that go on, without a word, with ids or latents that mean something else: the sizes fit."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    train.main(training(packed, tmp_path / "run", steps=1))
    start = dict(init=tmp_path / "run/model.pt", steps=1)
    train.main(training(packed, tmp_path / "tuned", **start))           # its own: model.pt's 16 bits are no other VAE
    words = data.Words([word[::-1] for word in shards.Shards(packed).tokenizer.vocabulary[len(data.SPECIAL):]])
    for what, options in (("VAE", dict(vae=other_vae)), ("tokenizer", dict(vae=vae_path))):
        out = tmp_path / "new" / what
        pack.main(command(**options, out=out))
        if what == "tokenizer":                         # as many words, spelt otherwise
            (out / "tokenizer.json").write_text(json.dumps(words.vocabulary))
            for file in (*out.glob("*/header.json"), out / "index.json"):
                content = json.loads(file.read_text())
                content["settings"]["tokenizer"] = shards.fingerprint(words)
                file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"run/model.pt has learned with another {what}"):
            train.main(training(out, tmp_path / "tuned2", **start))
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(packed, tmp_path / "copy")
        train.main(training(tmp_path / "copy", tmp_path / "again", steps=1) + ["--overwrite"])
        shutil.rmtree(tmp_path / "copy")
        shutil.copytree(out, tmp_path / "copy")
        with pytest.raises(UserError, match=f"again has learned from other data; what differs: {what.lower()}"):
            train.main(training(tmp_path / "copy", tmp_path / "again", steps=1) + ["--resume"])


def test_only_one_process_reads_the_index(packed, monkeypatch):
    """512 processes would read 30 MB each: one reads them, and tells the others what counts."""
    told = []
    one = shards.Shards(packed, once=lambda look: told.append(look()) or told[0])
    monkeypatch.setattr(shards, "read_index", lambda *_: 1 / 0)
    other = shards.Shards(packed, once=lambda look: told[0])
    assert other.rows == one.rows and other.content == one.content and len(pickle.dumps(told[0])) < 1000 * len(told[0][0]["pairs"]) + 3000
    batches = [stream.batch(0, 3, 0, rows=2) for stream in (one, other)]
    assert torch.equal(batches[0].tokens, batches[1].tokens) and torch.equal(batches[0].latents, batches[1].latents)


def test_resume_in_smaller_pieces(packed, tmp_path, monkeypatch):
    """What "out of memory" advises: half the rows, twice as often, are the same rows. Catches a resume that refuses it."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    train.main(training(packed, tmp_path / "run", steps=2))
    one = make_run(parse_arguments(training(packed, tmp_path / "one"))[0], tmp_path / "one")
    two = make_run(parse_arguments(training(packed, tmp_path / "two", documents=3, accumulate=2))[0], tmp_path / "two")
    pieces = [draw_batch(two, 1, micro).latents for micro in range(2)]
    assert torch.equal(draw_batch(one, 1, 0).latents, torch.cat(pieces))
    train.main(training(packed, tmp_path / "run", steps=2, documents=3, accumulate=2) + ["--resume"])
    with pytest.raises(UserError, match="--accumulate 2"):
        train.main(training(packed, tmp_path / "run", steps=2, documents=3) + ["--resume"])


def test_a_run_on_several_folders_of_an_earlier_version_goes_on(packed, vae_path, tmp_path, monkeypatch):
    """Catches a run that is refused with "has learned from other data", because the same data have another name since index.json
    counts; and any name that is let through."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    shutil.copytree(packed, tmp_path / "both/a")
    pack.main(command(vae_path, tmp_path / "both/b", scenes=40))
    line = training(tmp_path / "both", tmp_path / "run", steps=1)
    train.main(line)
    headers = [json.loads(file.read_text()) for kind in ("text", "pairs") for file in sorted(tmp_path.glob(f"both/*/{kind}-*/header.json"))]
    older = hashlib.blake2b(json.dumps(headers, sort_keys=True).encode(), digest_size=8).hexdigest()
    config = tmp_path / "run/config.json"
    kept = json.loads(config.read_text())
    today = kept["packed"]["content"]

    def begun_with(content):
        config.write_text(json.dumps(kept | {"packed": kept["packed"] | {"content": content}}))
        train.main([*line, "--resume"])
        return json.loads(config.read_text())["packed"]["content"]

    assert len(headers) > 3 and older != today and begun_with(older) == begun_with(today) == today
    with pytest.raises(UserError, match="learned from other data; what differs: content"):
        begun_with("0" * 16)


# -------------------------------------------------------------------------------------------------------------- the rivals
@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A folder of the toy world in shards, packed with an untrained VQ-VAE: pictures of 8 x 8 codes of 19."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("coded")
    checkpoint.save(folder / "vq.pt", checkpoint.pack_vae(vae_module.VAE(vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2, codes=19))))
    pack.main(command(folder / "vq.pt", folder / "packed", seq_len=160))
    return folder / "packed"


def test_codes_are_those_of_the_captions_pictures(coded):
    """Catches codes beside another caption, in another order, or rounded like latents."""
    stream, vq = shards.Shards(coded), checkpoint.load_vae(coded / "vae.pt", "vqvae")
    assert (stream.codes, stream.patches, stream.settings["patch"]) == (19, 64, 1)
    pairs = scenes.load_scenes(150, [0, 0, 0], scenes.WORLDS["one"], progress=False)
    wanted = collections.Counter((text, codes.tobytes()) for text, codes in zip(pairs.captions, vae_module.encode_all_codes(vq, pairs.pixels, False).numpy()))
    found = [(stream.tokenizer.decode(part), codes) for documents, pictures in all_rows(stream, "pairs")
             for part, codes in zip(itertools.chain(*documents), pictures, strict=True)]
    assert collections.Counter((text, codes.tobytes()) for text, codes in found) == wanted and found[0][1].dtype == np.int64
    arrays = {p.stem: np.load(p) for p in sorted(coded.glob("pairs-*"))[0].glob("*.npy")}
    assert arrays["latents"].dtype == np.uint16 and arrays["latents"].shape[1:] == (8, 8)


def test_a_chameleon_reads_codes(coded, tmp_path, monkeypatch):
    """Every picture of a batch is BOI, its own 64 codes, EOI, as stored with its caption; 1 : 1; guidance's dropped captions are
    there. Catches the codes of a row's first document in its second one, and codes counted as words."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    options = dict(model="chameleon", patch=1, seq_len=160, lr=1e-3)
    run = make_run(parse_arguments(training(coded, tmp_path / "run", **options))[0], tmp_path / "run")
    V, stored, dropped, several, checked = len(run.feed.tokenizer), collections.defaultdict(set), 0, 0, 0
    for documents, pictures in all_rows(run.feed.shards, "pairs"):
        for part, codes in zip(itertools.chain(*documents), pictures):
            stored[tuple(part)].add(tuple((codes.flatten() + V).tolist()))
    text = codes = 0
    for step in range(40):
        batch = draw_batch(run, step, 0)
        assert len(batch.images) == len(batch.latents) == 0 and (batch.image_id == -1).all() and (batch.tokens != data.PATCH).all()
        for ids in itertools.chain(*documents_of(batch)):
            ids = list(ids)
            text, codes = text + sum(k < V for k in ids), codes + sum(k >= V for k in ids)
            starts = [k for k, token in enumerate(ids) if token == data.BOI]
            fences = [k for k, token in enumerate(ids) if token in (data.BOS, data.BOI, data.EOI, data.EOS)] + [len(ids)]
            for k in starts:
                assert ids[k + 65] == data.EOI
                end = fences.index(k + 65)              # BOS or EOI, words, BOI, codes, EOI, words, BOI or EOS
                words = ids[fences[end + 0] + 1: fences[end + 1]] if ids[1] == data.BOI else ids[fences[end - 2] + 1: k]
                dropped += data.DROP in words
                if data.DROP not in words:
                    assert tuple(ids[k + 1: k + 65]) in stored[tuple(words)]
                    checked, several = checked + 1, several + (len(starts) > 1)
    assert text / codes == pytest.approx(1, abs=0.15) and dropped > 5 and checked > 100 and several > 5


def test_the_rivals_learn_from_shards(coded, packed, tmp_path, monkeypatch, capsys):
    """From shards to model.pt: a Chameleon's report draws, its log has a gap; a Llama reads rows of text alone, of the same folder as
    a Transfusion."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    train.main(training(coded, tmp_path / "c", model="chameleon", patch=1, seq_len=160, steps=2, gap_every=2, samples=2) + ["--stable"])
    log = [json.loads(line) for line in (tmp_path / "c/log.jsonl").read_text().splitlines()]
    assert "gap" in log[-1] and log[-1]["diffusion"] is None and (tmp_path / "c/samples.png").stat().st_size > 1000
    assert f"look at {tmp_path}/c/samples.png and {tmp_path}/c/curves.png (" in capsys.readouterr().out
    train.main(training(packed, tmp_path / "l", model="llama", steps=2, samples=2))
    assert f"look at {tmp_path}/l/curves.png (" in capsys.readouterr().out              # it draws no samples.png: do not name one
    trained = load_trained(tmp_path / "l/model.pt")
    assert trained.kind == "llama" and not (tmp_path / "l/samples.png").exists()
    run = make_run(parse_arguments(training(packed, tmp_path / "other", model="llama"))[0], tmp_path / "other")
    for step in range(20):
        tokens = draw_batch(run, step, 0).tokens
        assert not torch.isin(tokens, torch.tensor([data.BOI, data.PATCH])).any() and (tokens >= len(data.SPECIAL)).float().mean() > 0.5


@pytest.mark.parametrize("folder, options, words", [
    ("coded", dict(seq_len=160), ["hold codes", "--model chameleon"]),
    ("packed", dict(model="chameleon"), ["latents", "VQ-VAE"]),
    ("coded", dict(model="chameleon", seq_len=160, codes=18), ["19 codes, not 18"]),
    ("pictures", dict(model="llama"), ["no text", "--text"])])
def test_shards_of_another_kind(coded, packed, tmp_path, monkeypatch, folder, options, words):
    """Catches codes read as latents, latents as codes, and a vocabulary of another size."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    if folder == "pictures":
        pack.main(command(packed / "vae.pt", tmp_path / "pictures", text=None))
    with pytest.raises(UserError) as mistake:
        train.main(training({"coded": coded, "packed": packed, "pictures": tmp_path / "pictures"}[folder], tmp_path / "run", **options))
    assert all(word in str(mistake.value) for word in words) and not (tmp_path / "run/model.pt").exists()


def test_draw_batch_takes_rows_and_latents(packed, tmp_path, monkeypatch):
    """t within its limits, fresh noise per step, latents as stored; micro-batches of a step do not overlap."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))
    config, *_ = parse_arguments(training(packed, tmp_path / "run", accumulate=2))
    run = make_run(config, tmp_path / "run")
    one, two = draw_batch(run, 1, 0), draw_batch(run, 1, 1)
    direct = shards.Shards(packed).batch(config.seed, 1, 1, rows=6, micro_batches=2)
    assert torch.equal(two.tokens, direct.tokens) and torch.equal(two.latents, direct.latents)
    assert same(one, draw_batch(run, 1, 0)) and not torch.equal(one.tokens, two.tokens)
    for batch in (one, two):
        assert batch.tokens.shape == (6, T) and batch.latents.shape == batch.eps.shape and len(batch.t) == len(batch.latents)
        assert int(batch.t.min()) >= 1 and bool((batch.t <= batch.t_max).all())


@pytest.mark.parametrize("options, words", [
    (dict(seq_len=48), ["--seq-len 64", "48"]),
    (dict(patch=4), ["--patch 2", "4"]),
    (dict(vae="other"), ["another VAE"]),
    (dict(data_dir="nowhere"), ["nowhere", "index.json"]),
    (dict(data_dir="text"), ["pairs", "at least ten"]),
])
def test_training_with_other_numbers(capsys, packed, other_vae, tmp_path, options, words):
    """One sentence before anything is written."""
    options = {k: other_vae if v == "other" else v for k, v in options.items()}
    if options.get("data_dir") == "text":
        options["data_dir"] = tmp_path / "packed"
        pack.main(command(None, tmp_path / "packed", pairs=None))
        capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(train.main, training(**{"folder": packed, "out": tmp_path / "run", **options}))
    captured = capsys.readouterr()
    check_sentence(stop.value.code, captured.out, captured.err, *words)
    assert not (tmp_path / "run").exists()
