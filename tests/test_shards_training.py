"""
test_shards_training.py: train.py on a packed folder      (scale/feed.py; Transfusion §4.1 "Data")

THE IDEA    The same train.py reads shards in place of pictures in memory. It must learn, resume to
            the bit, end with pictures; and refuse a folder that does not fit the run: the sizes of
            tensors often fit where their meaning does not. Then the rivals: a Chameleon, which
            reads codes, and a Llama, which reads text alone (§4.1 "Baseline").
TRY IT      pytest -n 0 tests/test_shards_training.py
"""
import collections
import hashlib
import itertools
import json
import shutil

import numpy as np
import pytest
import torch

import data
import model
import sample
import train
import vae as vae_module
from config import parse_arguments
from conftest import draw_batch, make_run
from data import BOI, BOS, DROP, EOI, EOS, PATCH
from packing import (
    Killed,
    T,
    command,
    documents_of,
    make_vae,
    same,
    stored_pairs,
    training,
)
from scale import pack, shards
from sources import scenes
from support import checkpoint
from support.checkpoint import load_trained
from support.common import UserError, run_command
from test_errors import check_sentence


@pytest.fixture
def toy(monkeypatch):
    """"toy" is one layer of width 32: nothing here looks at what such a model has learned."""
    monkeypatch.setitem(model.SIZES, "toy", (1, 32, 2))


def read_log(out):
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def make_training(folder, out, **options):
    """The Run at step 0 of a small training on a packed folder."""
    return make_run(parse_arguments(training(folder, out, **options))[0], out)


# ------------------------------------------------------------------------------------ the whole run
def test_training_on_shards(packed, tmp_path, monkeypatch):
    """Catches losses that do not fall, and a run that is interrupted and resumed and ends with
    other weights than the run in one go."""
    monkeypatch.setitem(model.SIZES, "toy", (2, 32, 2))
    options = dict(steps=40, lr=5e-3, log_every=10, gap_every=40, save_every=20)
    train.main(training(packed, tmp_path / "whole", **options))
    log = read_log(tmp_path / "whole")
    assert log[-1]["lm"] < 0.7 * log[0]["lm"]
    assert log[-1]["diffusion"] < 0.95 * log[0]["diffusion"]
    assert "gap" in log[-1]

    # Again, but the power fails in step 28; the last checkpoint is of step 20.
    real = train.train_step
    steps = itertools.count()

    def stops(run):
        if next(steps) == 27:
            raise Killed
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stops)
        with pytest.raises(Killed):
            train.main(training(packed, tmp_path / "again", **options))
    train.main(training(packed, tmp_path / "again", **options) + ["--resume"])

    whole = checkpoint.load(tmp_path / "whole/model.pt", "model")["weights"]
    again = checkpoint.load(tmp_path / "again/model.pt", "model")["weights"]
    for name, weight in whole.items():
        assert torch.equal(weight, again[name]), name


def test_a_run_on_shards_ends_with_pictures(packed, toy, tmp_path, monkeypatch, capsys):
    """Catches a run of weeks that shows nothing: the captions that were held out are drawn, in
    words, though shards keep ids."""
    captions = []
    real = sample.draw

    def draw(trained, texts, **more):
        captions.extend(texts)
        return real(trained, texts, **more)

    monkeypatch.setattr(sample, "draw", draw)
    train.main(training(packed, tmp_path / "run", steps=1, samples=3, sample_steps=2))

    stream = shards.Shards(packed)
    held_out, *_ = stream.held_out(3)
    assert len(captions) == 3
    assert captions == [stream.tokenizer.decode(ids) for ids in held_out]
    assert "a" in captions[0].split()
    assert (tmp_path / "run/samples.png").stat().st_size > 1000
    assert "samples.png" in capsys.readouterr().out


def test_draw_batch_takes_rows_and_latents(packed, toy, tmp_path):
    """Catches t beyond its limits, the same noise at every step, latents other than those stored,
    and micro-batches of a step that overlap."""
    run = make_training(packed, tmp_path / "run", accumulate=2)
    one = draw_batch(run, 1, 0)
    two = draw_batch(run, 1, 1)

    stream = shards.Shards(packed)
    direct = stream.batch(run.config.seed, 1, 1, rows=6, micro_batches=2)
    assert torch.equal(two.tokens, direct.tokens)
    assert torch.equal(two.latents, direct.latents)
    assert same(one, draw_batch(run, 1, 0))
    assert not torch.equal(one.tokens, two.tokens)

    for batch in (one, two):
        assert batch.tokens.shape == (6, T)
        assert batch.latents.shape == batch.eps.shape
        assert len(batch.t) == len(batch.latents)
        assert int(batch.t.min()) >= 1
        assert (batch.t <= batch.t_max).all()


def test_resume_in_smaller_pieces(packed, toy, tmp_path):
    """What "out of memory" advises: half the rows, twice as often, are the same rows. Catches a
    resume that refuses it, and one that takes another batch."""
    # 1. The same rows.
    one = make_training(packed, tmp_path / "one")
    two = make_training(packed, tmp_path / "two", documents=3, accumulate=2)
    pieces = [draw_batch(two, 1, micro).latents for micro in range(2)]
    assert torch.equal(draw_batch(one, 1, 0).latents, torch.cat(pieces))

    # 2. Accepted; half the rows alone are not.
    train.main(training(packed, tmp_path / "run", steps=2))
    smaller = training(packed, tmp_path / "run", steps=2, documents=3, accumulate=2)
    train.main([*smaller, "--resume"])
    half = training(packed, tmp_path / "run", steps=2, documents=3)
    with pytest.raises(UserError, match="--accumulate 2"):
        train.main([*half, "--resume"])


# ----------------------------------------------------------------------------- what does not belong
@pytest.mark.parametrize("options, words", [
    (dict(seq_len=48), ["--seq-len 64", "48"]),
    (dict(patch=4), ["--patch 2", "4"]),
    (dict(vae="other"), ["another VAE"]),
    (dict(data_dir="nowhere"), ["nowhere", "index.json"]),
    (dict(data_dir="text"), ["pairs", "at least ten"]),
])
def test_training_with_other_numbers(capsys, packed, other_vae, tmp_path, options, words):
    """Catches a run that begins although its numbers are not those of the shards: one sentence
    before anything is written."""
    if options.get("vae") == "other":
        options = dict(vae=other_vae)
    if options.get("data_dir") == "text":
        options = dict(data_dir=tmp_path / "packed")
        pack.main(command(None, tmp_path / "packed", pairs=None))
        capsys.readouterr()

    line = training(**({"folder": packed, "out": tmp_path / "run"} | options))
    with pytest.raises(SystemExit) as stop:
        run_command(train.main, line)

    captured = capsys.readouterr()
    check_sentence(stop.value.code, captured.out, captured.err, *words)
    assert not (tmp_path / "run").exists()


def rename_words(folder):
    """Give a packed folder a tokenizer of as many words, each spelt backwards."""
    special = len(data.SPECIAL)
    vocabulary = shards.Shards(folder).tokenizer.vocabulary
    words = data.Words([word[::-1] for word in vocabulary[special:]])
    (folder / "tokenizer.json").write_text(json.dumps(words.vocabulary))
    for file in (*folder.glob("*/header.json"), folder / "index.json"):
        content = json.loads(file.read_text())
        content["settings"]["tokenizer"] = shards.fingerprint(words)
        file.write_text(json.dumps(content))


def test_fine_tuning_on_shards_of_another_tokenizer_or_vae(
        packed, vae_path, other_vae, toy, tmp_path):
    """Catches --init and --resume that go on, without a word, with ids or latents that mean
    something else: the sizes fit."""
    train.main(training(packed, tmp_path / "run", steps=1))
    start = dict(init=tmp_path / "run/model.pt", steps=1)
    # Its own data: the 16 bits of model.pt are no other VAE.
    train.main(training(packed, tmp_path / "tuned", **start))

    for what, vae in (("VAE", other_vae), ("tokenizer", vae_path)):
        other = tmp_path / "new" / what
        pack.main(command(vae, other))
        if what == "tokenizer":
            rename_words(other)

        # --init
        with pytest.raises(UserError, match=f"run/model.pt has learned with another {what}"):
            train.main(training(other, tmp_path / "tuned2", **start))

        # --resume: the folder of its data holds others now.
        folder = tmp_path / "copy"
        line = training(folder, tmp_path / "again", steps=1)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(packed, folder)
        train.main([*line, "--overwrite"])
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
        sentence = f"again has learned from other data; what differs: {what.lower()}"
        with pytest.raises(UserError, match=sentence):
            train.main([*line, "--resume"])


def test_a_run_on_several_folders_of_an_earlier_version_goes_on(packed, vae_path, toy, tmp_path):
    """Catches a run that is refused with "has learned from other data", because the same data have
    another name since index.json counts, and any name that is let through."""
    shutil.copytree(packed, tmp_path / "both/a")
    pack.main(command(vae_path, tmp_path / "both/b", scenes=40))
    line = training(tmp_path / "both", tmp_path / "run", steps=1)
    train.main(line)

    # The name that an earlier version would have given to these data.
    headers = []
    for kind in ("text", "pairs"):
        files = sorted(tmp_path.glob(f"both/*/{kind}-*/header.json"))
        headers += [json.loads(file.read_text()) for file in files]
    assert len(headers) > 3
    content = json.dumps(headers, sort_keys=True).encode()
    older = hashlib.blake2b(content, digest_size=8).hexdigest()

    config = tmp_path / "run/config.json"
    kept = json.loads(config.read_text())
    today = kept["packed"]["content"]
    assert older != today

    def name_after_resuming(name):
        """The name that a run which was begun with `name` has in the end."""
        config.write_text(json.dumps(kept | {"packed": kept["packed"] | {"content": name}}))
        train.main([*line, "--resume"])
        return json.loads(config.read_text())["packed"]["content"]

    assert name_after_resuming(older) == today
    assert name_after_resuming(today) == today
    with pytest.raises(UserError, match="learned from other data; what differs: content"):
        name_after_resuming("0" * 16)


# --------------------------------------------------------------------------------------- the rivals
@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """The toy world in shards, packed with an untrained VQ-VAE: pictures of 8 x 8 codes of 19."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("coded")
    checkpoint.save(folder / "vq.pt", checkpoint.pack_vae(make_vae(codes=19)))
    pack.main(command(folder / "vq.pt", folder / "packed", seq_len=160))
    return folder / "packed"


@pytest.mark.parametrize("folder, options, words", [
    ("coded", dict(seq_len=160), ["hold codes", "--model chameleon"]),
    ("packed", dict(model="chameleon"), ["latents", "VQ-VAE"]),
    ("coded", dict(model="chameleon", seq_len=160, codes=18), ["19 codes, not 18"]),
    ("pictures", dict(model="llama"), ["no text", "--text"]),
])
def test_shards_of_another_kind(coded, packed, toy, tmp_path, folder, options, words):
    """Catches codes read as latents, latents as codes, and a vocabulary of another size."""
    folders = {"coded": coded, "packed": packed, "pictures": tmp_path / "pictures"}
    if folder == "pictures":
        pack.main(command(packed / "vae.pt", folders["pictures"], text=None))

    with pytest.raises(UserError) as mistake:
        train.main(training(folders[folder], tmp_path / "run", **options))
    for word in words:
        assert word in str(mistake.value)
    assert not (tmp_path / "run/model.pt").exists()


def test_codes_are_those_of_the_captions_pictures(coded):
    """Catches codes beside another caption, in another order, or rounded like latents."""
    stream = shards.Shards(coded)
    vq = checkpoint.load_vae(coded / "vae.pt", "vqvae")
    assert stream.codes == 19
    assert stream.patches == 64
    assert stream.settings["patch"] == 1

    # The same scenes, encoded here.
    pairs = scenes.load_scenes(150, [0, 0, 0], scenes.WORLDS["one"], progress=False)
    codes = vae_module.encode_all_codes(vq, pairs.pixels, False).numpy()            # (150, 8, 8)
    wanted = collections.Counter()
    for text, picture in zip(pairs.captions, codes):
        wanted[text, picture.tobytes()] += 1

    stored = collections.Counter()
    for ids, picture in stored_pairs(stream):
        assert picture.dtype == np.int64                # as read: what an embedding takes
        stored[stream.tokenizer.decode(ids), picture.tobytes()] += 1
    assert stored == wanted

    on_disk = np.load(sorted(coded.glob("pairs-*"))[0] / "latents.npy")
    assert on_disk.dtype == np.uint16
    assert on_disk.shape[1:] == (8, 8)


def caption_of(ids, begin):
    """The ids of the caption of the picture whose BOI is ids[begin], in a document of a Chameleon
    with 64 codes a picture: before it, or behind it if the document begins with a picture."""
    fences = [k for k, token in enumerate(ids) if token in (BOS, BOI, EOI, EOS)]
    fences.append(len(ids))
    end = fences.index(begin + 65)                      # BOI, codes, EOI
    if ids[1] == BOI:
        return ids[fences[end] + 1: fences[end + 1]]
    return ids[fences[end - 2] + 1: begin]


def test_a_chameleon_reads_codes(coded, toy, tmp_path):
    """Every picture of a batch is BOI, its own 64 codes, EOI, as stored with its caption; text and
    codes are 1 : 1; guidance's dropped captions are there. Catches the codes of a row's first
    document in its second one, and codes counted as words."""
    run = make_training(coded, tmp_path / "run", model="chameleon", patch=1, seq_len=160, lr=1e-3)
    V = len(run.feed.tokenizer)                         # codes stand behind the words
    stored = collections.defaultdict(set)               # {ids of a caption: its pictures' codes}
    for ids, picture in stored_pairs(run.feed.shards):
        stored[tuple(ids)].add(tuple((picture.flatten() + V).tolist()))

    words = 0
    codes = 0
    dropped = 0
    checked = 0
    several = 0                                         # checked in documents of several pictures
    for step in range(40):
        batch = draw_batch(run, step, 0)
        assert len(batch.images) == len(batch.latents) == 0
        assert (batch.image_id == -1).all()
        assert (batch.tokens != PATCH).all()
        for ids in itertools.chain(*documents_of(batch)):
            words += sum(token < V for token in ids)
            codes += sum(token >= V for token in ids)
            begins = [k for k, token in enumerate(ids) if token == BOI]
            for begin in begins:
                end = begin + 65
                assert ids[end] == EOI
                caption = caption_of(ids, begin)
                if DROP in caption:
                    dropped += 1
                    continue
                assert tuple(ids[begin + 1: end]) in stored[tuple(caption)]
                checked += 1
                several += len(begins) > 1

    assert words / codes == pytest.approx(1, abs=0.15)
    assert dropped > 5
    assert checked > 100
    assert several > 5


def test_the_rivals_learn_from_shards(coded, packed, toy, tmp_path, capsys):
    """From shards to model.pt. Catches a Chameleon's report that does not draw, or its log without
    a gap, and a Llama that reads pictures: it reads rows of text alone, of the same folder as a
    Transfusion."""
    # 1. A Chameleon.
    out = tmp_path / "c"
    line = training(coded, out, model="chameleon", patch=1, seq_len=160, steps=2, gap_every=2,
                    samples=2)
    train.main([*line, "--stable"])
    log = read_log(out)
    assert "gap" in log[-1]
    assert log[-1]["diffusion"] is None
    assert (out / "samples.png").stat().st_size > 1000
    assert f"look at {out}/samples.png and {out}/curves.png (" in capsys.readouterr().out

    # 2. A Llama: it draws no samples.png, so none is named.
    out = tmp_path / "l"
    train.main(training(packed, out, model="llama", steps=2, samples=2))
    assert f"look at {out}/curves.png (" in capsys.readouterr().out
    assert not (out / "samples.png").exists()
    assert load_trained(out / "model.pt").kind == "llama"

    # 3. What a Llama reads.
    run = make_training(packed, tmp_path / "other", model="llama")
    for step in range(20):
        tokens = draw_batch(run, step, 0).tokens
        assert not torch.isin(tokens, torch.tensor([BOI, PATCH])).any()
        is_word = tokens >= len(data.SPECIAL)
        assert is_word.float().mean() > 0.5
