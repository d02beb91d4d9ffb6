"""
test_pack.py: packing, stopped and continued                (scale/pack.py; Transfusion §4.1 "Data")

THE IDEA    A packing of weeks is stopped, killed, moved and continued. Whatever happens, the folder
            must become the one of an uninterrupted packing, byte for byte; and the same command
            with other options, or other data, must be refused before it harms what is there.
            Where the items come from is in test_streams.py, what is read in test_shards.py.
TRY IT      pytest -n 0 tests/test_pack.py
"""
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from packing import (
    ROOT,
    Killed,
    command,
    picture,
    stored_texts,
)
from scale import pack, shards, streams
from support import checkpoint
from support.common import UserError, run_command
from test_damaged_files import full_disk
from test_errors import check_sentence, contents


# ---------------------------------------------------------------------------------------- one shard
def test_a_document_that_just_fits():
    """A row of 12 positions, pictures of 4 patches. Catches one position too few or too many, and a
    pair that leaves something behind although it was refused."""
    # 25 ids between BOS and EOS: 10, 10 and 5 of them.
    text = pack.ShardWriter("text", 0, 12, 4, None, 0.0)
    text.add(list(range(10, 35)))
    assert text.lengths == [12, 12, 7]
    assert text.positions == 31

    # BOS, 4 words, BOI, 4 patches, EOI, EOS: the document is full. The next one begins anew.
    pairs = pack.ShardWriter("pairs", 0, 12, 4, None, 0.999)
    pairs.add([10] * 4, "pixels")
    with pytest.raises(UserError, match="a caption of 5 tokens and 4 patches do not fit in 12"):
        pairs.add([10] * 5, "pixels")
    pairs.add([10], "pixels")
    assert pairs.lengths == [12, 9]
    assert pairs.positions == 21
    assert len(pairs.pixels) == 2

    # 9 and 7: they share a document.
    wide = pack.ShardWriter("pairs", 0, 16, 4, None, 0.999)
    wide.add([10], "pixels")
    wide.add([10], "pixels")
    assert wide.lengths == [16]
    assert wide.documents == [[0, 1]]


@pytest.mark.parametrize("what", ["latents", "disk"])
def test_a_shard_that_cannot_be_kept(vae_path, tmp_path, monkeypatch, what):
    """Catches latents beyond float16's range that are stored as infinities, one bad VAE that is
    counted as thousands of bad pictures, and numpy's "196608 requested and 0 written" for a full
    disk, with a .tmp that keeps it full."""
    if what == "latents":
        vae = checkpoint.load_vae(vae_path)
        vae.scale.fill_(1e-6)
        vae_path = tmp_path / "vae.pt"
        checkpoint.save(vae_path, checkpoint.pack_vae(vae))
        sentence = ("pairs-000000 was not written: the VAE makes latents that float16 cannot hold, "
                    "beyond 65,504")
    else:
        write = pack.ShardWriter.write

        def write_on_a_full_disk(*args):
            with full_disk(1000):
                write(*args)

        monkeypatch.setattr(pack.ShardWriter, "write", write_on_a_full_disk)
        sentence = "pairs-000000 could not be written"

    with pytest.raises(UserError, match=sentence):
        pack.main(command(vae_path, tmp_path / "packed", text=None, scenes=20))
    assert [path.name for path in (tmp_path / "packed").iterdir() if path.is_dir()] == []


# ---------------------------------------------------------------------------------- killed, resumed
@pytest.mark.parametrize("after", [0, 1, 4, 9, 13])
@pytest.mark.parametrize("where", ["before the rename", "in the middle of a file"])
def test_killed_and_resumed_is_byte_identical(
        packed, vae_path, tmp_path, monkeypatch, after, where):
    """Catches whatever a kill leaves behind that is taken for whole: the same command after it
    gives the folder of an uninterrupted packing, byte for byte."""
    out = tmp_path / "packed"
    if where == "before the rename":
        owner = os
        name = "replace"
        last = after
    else:
        owner = np
        name = "save"
        last = 4 * after                                # a shard has several files
    calls = itertools.count()
    real = getattr(owner, name)

    def dies(path, *rest, **options):
        if next(calls) == last:
            if name == "save":
                Path(path).write_bytes(b"half an arr")
            raise Killed
        return real(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            pack.main(command(vae_path, out))
    if after > 0:
        with pytest.raises(UserError, match="has not finished"):
            shards.Shards(out)

    pack.main(command(vae_path, out))
    assert contents(out) == contents(packed)
    pack.main(command(vae_path, out))                   # and once more: nothing is left to do
    assert contents(out) == contents(packed)


def test_a_real_kill(packed, vae_path, tmp_path):
    """SIGKILL to `python -m scale.pack`, then the same command line. Catches what a kill within
    one process does not show."""
    out = tmp_path / "packed"
    line = [sys.executable, "-m", "scale.pack", *command(vae_path, out)]
    # With as many threads as here: sums in another order end in other bits.
    threads = str(torch.get_num_threads())
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}

    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=environment)
    while process.poll() is None and not (out / "text-000001").exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was quicker than this test"
    assert 2 <= len(list(out.glob("*-*"))) < len(list(packed.glob("*-*")))

    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert "text tokens" in done.stdout
    assert "% full" in done.stdout
    assert contents(out) == contents(packed)


# ------------------------------------------------------------------- the same folder, other options
@pytest.mark.parametrize("options, words", [
    (dict(seq_len=48), ["seq_len", "64", "48", "--out"]),
    (dict(patch=4), ["patch"]),
    (dict(shard_rows=9), ["shard_rows"]),
    (dict(another=0.5), ["another"]),
    (dict(scenes=151), ["sources"]),
    (dict(vae="other"), ["another VAE", "--out"]),
    (dict(tokenizer="other"), ["another tokenizer", "--out"]),
])
def test_going_on_with_other_options_is_refused(
        capsys, own, packed, vae_path, other_vae, tmp_path, options, words):
    """Catches shards of two kinds in one folder: one sentence, and the folder is as it was."""
    other_words = tmp_path / "words.json"
    other_words.write_text(json.dumps([*shards.Shards(own).tokenizer.vocabulary, "zebra"]))
    others = {"vae": other_vae, "tokenizer": other_words}
    options = {name: others[name] if value == "other" else value
               for name, value in options.items()}

    line = command(**({"vae": vae_path, "out": own} | options))
    with pytest.raises(SystemExit) as stop:
        run_command(pack.main, line)

    captured = capsys.readouterr()
    check_sentence(stop.value.code, captured.out, captured.err, *words)
    assert contents(own) == contents(packed)


def test_more_sources_may_follow(vae_path, tmp_path):
    """The same command with one source more packs that one too. Catches a new source that is
    refused or ignored, and a change to the shards that are there."""
    out = tmp_path / "packed"
    for name in "ab":
        lines = [f"{name} text of some words number {k % 7}" for k in range(90)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    words = "a b text of some words number 0 1 2 3 4 5 6".split()
    (tmp_path / "words.json").write_text(json.dumps(words))
    options = dict(tokenizer=tmp_path / "words.json", pairs=None)

    pack.main(command(None, out, text=tmp_path / "a.txt", **options))
    before = contents(out)
    pack.main(command(None, out, text=[tmp_path / "a.txt", tmp_path / "b.txt"], **options))
    after = contents(out)

    assert len(after) > len(before)
    for path in before:
        if path.name != "index.json":
            assert after[path] == before[path], path
    texts = stored_texts(shards.Shards(out), "text")
    assert len(texts) == 180
    assert sum(text.startswith("b ") for text in texts) == 90


# ------------------------------------------------------------------------------ sources that change
def small_text(folder, out, **options):
    """The arguments that pack folder/a.txt, with words that are known."""
    words = folder / "words.json"
    words.write_text(json.dumps("one two three four five six".split()))
    return command(None, out, text=folder / "a.txt", pairs=None, tokenizer=words, **options)


def test_a_source_that_has_changed_since(tmp_path):
    """Catches success over the old data, where a file of the same size has other content, and a
    picture that was replaced."""
    # 1. A text. Another file beside it does not matter.
    text = tmp_path / "a.txt"
    text.write_text("one two three\n" * 20)
    pack.main(small_text(tmp_path, tmp_path / "out"))
    before = contents(tmp_path / "out")
    pack.main(small_text(tmp_path, tmp_path / "out"))
    (tmp_path / "b.txt").write_text("four five six\n")
    text.write_text("one two three\n" * 19 + "six two three\n")
    sentence = "text-000000 was packed from other sources .*a.txt has changed since.*--out"
    with pytest.raises(UserError, match=sentence):
        pack.main(small_text(tmp_path, tmp_path / "out"))
    assert contents(tmp_path / "out") == before

    # 2. A folder of pictures: those that captions.jsonl names, and no others.
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes(picture("red"))
    (folder / "captions.jsonl").write_text('{"image": "1.png", "caption": "one"}\n'
                                           '{"image": "no.png", "caption": "two"}\nnot json\n')
    stamp = streams.stamp_of(str(folder), 1)
    (folder / "2.png").write_bytes(picture("blue"))     # nobody names it
    (folder / "later").mkdir()
    assert streams.stamp_of(str(folder), 1) == stamp
    (folder / "1.png").write_bytes(picture("lime"))
    assert streams.stamp_of(str(folder), 1) != stamp


def test_the_same_source_in_another_place(tmp_path, monkeypatch):
    """Catches a packing that cannot go on because its data were moved, or are named by another
    path."""
    (tmp_path / "a.txt").write_text("one two three\n" * 20)
    pack.main(small_text(tmp_path, tmp_path / "out"))
    before = contents(tmp_path / "out")

    monkeypatch.chdir(tmp_path)
    pack.main(small_text(Path("."), "out"))             # by another path
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "moved/a.txt")
    pack.main(small_text(tmp_path / "moved", "out"))
    assert contents(tmp_path / "out") == before

    # An older header: it knows the sizes of its sources alone.
    header = tmp_path / "out/text-000000/header.json"
    kept = json.loads(header.read_text())
    sources = kept["recipe"]["sources"]
    kept["recipe"]["sources"] = {name: stamp[0] for name, stamp in sources.items()}
    header.write_text(json.dumps(kept))
    pack.main(small_text(tmp_path / "moved", "out"))


# ------------------------------------------------------------------------------ the user's mistakes
def test_what_is_missing_for_training_is_said(tmp_path, capsys, vae_path):
    """Catches hours of packing text alone, when training will ask for pairs, with --model llama as
    well."""
    (tmp_path / "a.txt").write_text("one two three\n" * 20)
    pack.main(small_text(tmp_path, tmp_path / "out"))
    sentence = "0 rows of pairs: train.py needs at least ten, for --model llama, too"
    assert sentence in capsys.readouterr().out

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
    """Catches a traceback, and a folder that is begun: one sentence, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    line = command(**({"vae": vae_path, "out": "out"} | options))
    with pytest.raises(SystemExit) as stop:
        run_command(pack.main, line)

    captured = capsys.readouterr()
    check_sentence(stop.value.code, captured.out, captured.err, *words)
    assert not list(tmp_path.iterdir())


def test_nothing_usable(capsys, tmp_path):
    """Sources without one good document. Catches an error that does not tell the first problem."""
    (tmp_path / "a.jsonl").write_text('{"words": 1}\n' * 3)
    (tmp_path / "words.json").write_text('["a"]')
    line = command(None, tmp_path / "out", text=tmp_path / "a.jsonl", pairs=None,
                   tokenizer=tmp_path / "words.json")
    sentence = "a.jsonl can be used; the first of 3 problems: .*line 1"
    with pytest.raises(UserError, match=sentence):
        pack.main(line)
