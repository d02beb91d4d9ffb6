"""
test_damaged_files.py: what is read is what was written  (support/, scale/; docs/PAPER.md §4.10)

THE IDEA    Bytes of a checkpoint, of a model.pt or of a log are flipped, cut off, or replaced by
            something else. Whoever reads them must notice. A resumed run goes on from the newest
            checkpoint that is whole, and ends as if nothing had happened, to the bit. Then the disk
            is full: what was there before must still be there.
TRY IT      python -m pytest -n 0 tests/test_damaged_files.py
"""
import contextlib
import copy
import dataclasses
import json
import os
import resource
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
import vae as vae_module
from autoencoder import train as vae_training
from scale import distributed
from scale.run import last_good
from small_runs import check_kept, ends, log, nothing_half_written, same, states
from sources import scenes
from support import checkpoint, common, figures, run_folder
from support.checkpoint import load_trained, load_vae
from support.common import UserError, whole_file

pytestmark = pytest.mark.usefixtures("one_layer")


def flip(path, at, n=64):
    """Change n bytes of a file."""
    content = bytearray(path.read_bytes())
    for place in range(at, min(at + n, len(content))):
        content[place] ^= 0x55
    path.write_bytes(content)


# -------------------------------------------------------------------------------- flipped bytes
@pytest.mark.parametrize("name", ["model.pt", "vae.pt"])
def test_flipped_bytes_are_seen(whole_run, vae_file, tmp_path, name):
    """Catches 64 bytes, or a single one, that are read as weights, in any tensor.

    torch.load does not compare the checksums of the zip file that it reads."""
    path = tmp_path / name
    intact = whole_run / "model.pt"
    read = load_trained
    if name == "vae.pt":
        intact = vae_file
        read = load_vae

    # In each of the six largest tensors: 64 bytes at its begin, and one in its middle.
    with zipfile.ZipFile(intact) as file:
        tensors = [info for info in file.infolist() if "/data/" in info.filename]
    tensors.sort(key=lambda info: -info.file_size)
    places = []
    for info in tensors[:6]:
        begin = info.header_offset + 200
        places.append((begin, 64))
        places.append((begin + info.file_size // 2, 1))

    for at, n in places:
        shutil.copy(intact, path)
        flip(path, at, n)
        with pytest.raises(UserError, match=f"{name} is damaged.*is not what was written"):
            read(path)

    shutil.copy(intact, path)
    read(path)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "crc32_0.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
        short_run, copied_run, whole_run, capsys, file):
    """Catches flipped bytes that are resumed from, and a run that then ends otherwise.

    Also catches a damaged checkpoint that is taken for finished when the run comes to that step
    again."""
    path = copied_run / "checkpoints/step_000006" / file
    n = 4 if file == "crc32_0.json" else 64
    flip(path, path.stat().st_size // 2, n)

    train.main(short_run() + ["--resume"])

    printed = capsys.readouterr().out
    assert "step_000006 is damaged" in printed
    assert "resuming from" in printed
    assert "step_000004" in printed.split("resuming from")[1]
    assert same(states(whole_run), states(copied_run)) == []
    assert log(whole_run) == log(copied_run)
    assert check_kept(copied_run) == [4, 6]
    assert (copied_run / "checkpoints/step_000006.damaged").exists()


def test_checksums_in_a_pipe(tmp_path):
    """Catches a resume that waits for ever: nobody writes into that pipe."""
    os.mkfifo(tmp_path / "crc32_0.json")
    assert distributed.read_checksums(tmp_path) == ({}, ["crc32_0.json"])


def test_no_whole_checkpoint(short_run, copied_run, capsys):
    """Catches a resume that starts from nothing, or touches anything.

    Here all checkpoints are damaged."""
    for step in (4, 6):
        path = copied_run / f"checkpoints/step_{step:06d}/__0_0.distcp"
        path.write_bytes(path.read_bytes()[:-100])

    sentence = ends(capsys, train.main, short_run() + ["--resume"], 2)

    assert "step_000006 is damaged" in sentence
    assert "no other checkpoint" in sentence
    assert distributed.list_checkpoints(copied_run) == ([4, 6], [])


@pytest.mark.parametrize("kept, written, step, words", [
    ([2, 4], [], 5, "step_000004 is still good"),
    ([2], [4], 4, "step_000004 is still good"),
    ([2, 8], [], 5, "step_000002 is still good"),
    ([], [], 5, "no checkpoint yet"),
])
def test_the_last_good_checkpoint_is_named(tmp_path, kept, written, step, words):
    """Catches a sentence that forgets the checkpoint which is being written.

    Also catches one that names a checkpoint of later steps."""
    for number in kept + written:
        folder = distributed.folder_of(tmp_path, number)
        folder.mkdir(parents=True)
        if number in kept:
            (folder / ".metadata").touch()              # it is written last

    assert words in last_good(tmp_path, step)


def test_a_killed_run_keeps_no_checkpoint_too_many(short_run, copied_run):
    """Catches a third checkpoint that stays for ever.

    The run was killed after the last one was written, before the old ones were deleted."""
    checkpoints = copied_run / "checkpoints"
    shutil.copytree(checkpoints / "step_000004", checkpoints / "step_000002")

    train.main(short_run() + ["--resume"])

    assert distributed.list_checkpoints(copied_run) == ([4, 6], [])


# ------------------------------------------------------------------- a lost config, a damaged log
@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[]", b"\xff\xfe\x00", b"[" * 100_000],
    ids=lambda content: str(content)[:12],
)
def test_a_lost_config_does_not_block_a_resume(short_run, copied_run, content):
    """Catches a run of weeks that cannot go on because a full disk has emptied config.json.

    Every checkpoint has a copy of it."""
    config = copied_run / "config.json"
    config.unlink()
    if content is not None:
        config.write_bytes(content)

    # The options of the run are still known: another rate is refused.
    with pytest.raises(UserError, match="--lr "):
        train.main(short_run(lr=0.5) + ["--resume"])

    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(copied_run / "checkpoints/step_000006")
    train.main(short_run() + ["--resume"])
    assert json.loads(config.read_text())["seed"] == 3


def test_a_config_that_cannot_be_read_anywhere(short_run, copied_run, capsys):
    """Catches a traceback, or options that are made up."""
    for path in copied_run.rglob("config.json"):
        path.write_text("")
    config = copied_run / "config.json"

    config.write_text('{"documents": "x", "accumulate": null}')
    sentence = ends(capsys, train.main, short_run() + ["--resume"], 2)
    assert "documents cannot be 'x'" in sentence

    config.write_text("")
    sentence = ends(capsys, train.main, short_run() + ["--resume"], 2)
    assert "config.json cannot be read" in sentence


NO_ROWS = [                                             # lines that are no row of a log
    b"{}",
    b'{"step": 1}',
    b"[1]",
    b"null",
    b"\xff\xfe{}",
    b'{"step": "2", "lm": 1}',
    b'{"step": 3, "lm": 0.',
    b"\x00" * 40,
    b'{"step": 2, "lm": 1.0, "diffusion": 1.0, "by_t": 3}',
    b'{"step": 2, "lm": "x", "diffusion": 1.0, "by_t": [1, 1, 1, 1, 1]}',
    b"[" * 100_000,
]


def test_a_damaged_log_does_not_block_a_resume(short_run, copied_run, whole_run):
    """Catches a KeyError after the whole training, because of a line that is no row of the log."""
    path = copied_run / "log.jsonl"
    damaged = []
    for row, no_row in zip(path.read_bytes().splitlines(), NO_ROWS[5:] + NO_ROWS[:5]):
        damaged += [row, no_row]
    path.write_bytes(b"\n".join(damaged + NO_ROWS))
    shutil.rmtree(copied_run / "checkpoints/step_000006")

    train.main(short_run() + ["--resume"])

    assert log(whole_run) == log(copied_run)
    assert (copied_run / "curves.png").stat().st_size > 5000

    # An empty log: what is left are the rows of the steps that are taken again.
    path.write_bytes(b"")
    shutil.rmtree(copied_run / "checkpoints/step_000006")
    train.main(short_run() + ["--resume"])
    assert [row["step"] for row in log(copied_run)] == [5, 6]


def test_a_log_of_the_steps_that_were_taken(tmp_path):
    """Catches a resume that is refused because somebody has deleted its log.

    Also catches rows of another run in a new one, and rows of steps that are taken again."""
    assert run_folder.Log(tmp_path, 5).rows == []       # there is none

    lines = [
        '{"step": 0}',
        '{"step": 2}',
        '{"step": 4, "lm": 1.0}',
        '{"step": "4"}',
        "[4]",
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert run_folder.Log(tmp_path, 0).rows == []
    assert run_folder.Log(tmp_path, 3).rows == [{"step": 0}, {"step": 2}]
    with_lm = run_folder.Log(tmp_path, 4, lambda row: "lm" in row)
    assert with_lm.rows == [{"step": 4, "lm": 1.0}]


# -------------------------------------------------------------------- files of odd content
def save_changed(whole_run, path, change):
    """Write a run's model.pt after change(its content)."""
    content = torch.load(whole_run / "model.pt", weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize("change", [
    dict(weights=[]),
    dict(weights={}),
    dict(config=None),
    dict(words=7),
    dict(vae={}),
    dict(diffusion={"kind": "x"}),
    dict(layers=2 ** 63),
    dict(weight=None),
    dict(weight=torch.ones(32).to_sparse()),
    dict(weight=torch.ones(32, dtype=torch.complex64)),
    dict(about={"reach": 1}),
], ids=str)
def test_a_checkpoint_of_odd_content(whole_run, tmp_path, change):
    """Catches a traceback, or a model of 2^63 layers, built for ever."""
    def make_odd(content):
        if "layers" in change:
            content["config"] |= change
        elif "weight" in change:
            content["weights"]["norm.weight"] = change["weight"]
        else:
            content |= change

    save_changed(whole_run, tmp_path / "model.pt", make_odd)
    with pytest.raises(UserError, match="model.pt"):
        load_trained(tmp_path / "model.pt")


@pytest.mark.parametrize("name, tensor", [
    ("norm.weight", torch.ones(31)),
    ("nor.weight", torch.ones(32)),
])
def test_a_tensor_without_a_place_is_named(whole_run, tmp_path, name, tensor):
    """Catches a library's list of everything that is missing.

    The one tensor that is wrong must be named."""
    def add_tensor(content):
        content["weights"][name] = tensor

    save_changed(whole_run, tmp_path / "model.pt", add_tensor)
    sentence = rf"{name} of the shape \({len(tensor)},\) has no place"
    with pytest.raises(UserError, match=sentence):
        load_trained(tmp_path / "model.pt")


def test_names_of_older_files():
    """Catches a tensor of the shipped models that loses the rest of its name."""
    for old, new in (
        ("words.weight", "embedding.weight"),
        ("pictures.time.mlp.0.bias", "patch_encoder.time.mlp.0.bias"),
        ("reach", "x0_max"),
        ("norm.weight", "norm.weight"),
    ):
        assert checkpoint.new_name(old) == new


@pytest.mark.parametrize("options", [
    {"channels": True},
    {"channels": 8.0},
    {"multipliers": (1, 2.0)},
    {"multipliers": 1},
], ids=str)
def test_settings_of_a_file_have_types(options):
    """Catches True, which counts as 1, and a size that ends in a library's words.

    What a file does not say has its default."""
    good = {"channels": 8, "multipliers": [1, 2]}
    assert checkpoint.typed(vae_module.VAEConfig, good).channels == 8

    name = next(iter(options))
    with pytest.raises(TypeError, match=f"{name} cannot be"):
        checkpoint.typed(vae_module.VAEConfig, options)


@pytest.mark.parametrize("codes, vocabulary, right", [
    (0, 20, True),                                      # the tokenizer below has 20 words
    (0, 21, False),
    (8, 20, True),
    (8, 28, True),                                      # a Chameleon's: words, then codes
    (8, 12, False),
    (8, 29, False),
])
def test_a_network_knows_its_words_and_codes(whole_run, codes, vocabulary, right):
    """Catches a Chameleon that is refused, and ids that mean another tokenizer's words."""
    trained = copy.copy(load_trained(whole_run / "model.pt"))
    vae_config = dataclasses.replace(trained.vae.config, codes=codes)
    model_config = dataclasses.replace(trained.model.config, vocabulary=vocabulary)
    trained.tokenizer = range(20)
    trained.vae = SimpleNamespace(config=vae_config, f=trained.vae.f)
    trained.model = SimpleNamespace(config=model_config)

    expected = contextlib.nullcontext()
    if not right:
        expected = pytest.raises(ValueError, match=f"knows {vocabulary} tokens")
    with expected:
        checkpoint.check_together(trained)


@pytest.mark.parametrize("words, sentence", [
    (["a", 3], "is not a list of words"),
    ({"a": 1}, "is not a list of words"),
    (["a b"], "'a b', which is empty"),
    (["a", ""], "'', which is empty"),
    (["a", "b"], ""),
])
def test_a_tokenizer_is_a_list_of_words(tmp_path, words, sentence):
    """Catches a word that no text would ever have."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(words))
    if not sentence:
        assert checkpoint.read_words(path) == words
        return
    with pytest.raises(UserError, match=sentence):
        checkpoint.read_words(path)


# ------------------------------------------------------------------------- whole or not there
def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    """Catches a file of which half was written, and a leftover.

    Also catches an old file that is lost when the new one fails, and content that a power cut would
    lose after the name was taken."""
    path = tmp_path / "a/x.json"

    # 1. Interrupted: nothing is there.
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), whole_file(path) as file:
            file.write(b"half")
            raise error
        assert list(path.parent.iterdir()) == []

    # 2. The new content cannot be written: the old one is there.
    common.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        common.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert nothing_half_written(tmp_path)

    # 3. All of it is on the disk before the file gets its name.
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    common.write_json(tmp_path / "x.json", [1, 2])
    run_folder.Log(tmp_path, 0).add({"step": 1})
    assert synced == [len(json.dumps([1, 2], indent=1)), len('{"step": 1}\n')]


@contextlib.contextmanager
def full_disk(n):
    """Inside, no file can grow beyond n bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("n", [0, 3000])
def test_a_full_disk_while_a_file_is_written(whole_run, tmp_path, n):
    """Catches a traceback without the cause, and a .tmp that keeps the disk full.

    Also catches an old model.pt or vae.pt that is lost."""
    trained = load_trained(whole_run / "model.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    shutil.copy(whole_run / "model.pt", tmp_path / "model.pt")

    row = dict(step=1, lm=1, diffusion=1, by_t=[1] * 5)
    writes = {
        "model.pt": lambda path: checkpoint.save_trained(path, trained),
        "vae.pt": lambda path: checkpoint.save(path, checkpoint.pack_vae(trained.vae)),
        "config.json": lambda path: common.write_json(path, list(range(2000))),
        "curves.png": lambda path: figures.plot_curves([row], path),
        "a.bmp": lambda path: figures.save_picture(pixels, path),
    }
    for name, write in writes.items():
        sentence = f"{name} could not be written .File too large"
        with full_disk(n), pytest.raises(UserError, match=sentence):
            write(tmp_path / name)

    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert load_trained(tmp_path / "model.pt")


@pytest.mark.parametrize("name, n", [("checkpoint", 60_000), ("log.jsonl", 50)])
def test_a_full_disk_while_training(short_run, copied_run, whole_run, capsys, name, n):
    """Catches 25 lines of a library's traceback, and half a checkpoint.

    Also catches a run that cannot go on when there is room again."""
    # capsys: pytest keeps what is printed in memory. Otherwise that is a file, which would be full.
    shutil.rmtree(copied_run / "checkpoints/step_000006")
    target = (distributed.dcp, "async_save")
    if name == "log.jsonl":
        target = (run_folder.Log, "add")
    real = getattr(*target)

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        def fill_first(*args, **options):
            stack.enter_context(full_disk(n))           # from the first write on
            return real(*args, **options)

        patch.setattr(*target, fill_first)
        with pytest.raises(UserError) as problem:
            train.main(short_run() + ["--resume"])
        stack.close()

    sentence = str(problem.value)
    assert "could not be written" in sentence
    assert len(sentence.splitlines()) == 1
    assert "File too large" in sentence
    assert check_kept(copied_run) == [4]

    # There is room again.
    train.main(short_run() + ["--resume"])
    assert same(states(whole_run), states(copied_run)) == []
    assert log(whole_run) == log(copied_run)


def test_a_full_disk_in_the_vaes_training(tmp_path):
    """Catches half a last.pt, the state of a VAE's training."""
    pixels = scenes.load_scenes(12, 0, progress=False).pixels
    config = vae_module.VAEConfig(channels=4, multipliers=(1, 1), z=2)

    with full_disk(5000), pytest.raises(UserError, match="last.pt could not be written"):
        vae_training.train_vae(
            pixels, config, 2, batch=4, out=tmp_path, save_every=1, progress=False)

    assert nothing_half_written(tmp_path)
    assert not (tmp_path / "last.pt").exists()
