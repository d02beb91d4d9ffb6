"""
test_trust.py: a run can be trusted             (scale/run.py, scale/distributed.py, support/, autoencoder/train.py; docs/PAPER.md §4.10)

No step is taken, and nothing is kept, with a number that is not finite. What is read is what was written. One run has one
folder. Whoever stops a run, or fills the disk, loses nothing.
"""
import contextlib
import copy
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import model
import train
import vae as vae_module
from autoencoder import train as vae_training
from config import parse_arguments
from conftest import make_run
from metrics import progress
from scale import distributed, pack, shards
from scale.run import last_good, words_of_culprit
from small_runs import log, same, small_run, states
from sources import choose, scenes
from support import checkpoint, common, figures, run_folder
from support.checkpoint import load_trained, load_vae
from support.common import UserError, run_command, whole_file

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def tiny_size():
    """In this file "toy" has 1 layer of width 32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.SIZES, "toy", (1, 32, 2))
        yield


@pytest.fixture(scope="module", autouse=True)
def few_scenes():
    """The test split has eight scenes: the training here is not measured."""
    real = choose.load_pairs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "load_pairs", lambda *a, **k: real(*a, **{**k, "n": min(k["n"], 60 if k["split"] == "train" else 12)}))
        yield


def untrained_vae(**changes):
    """A small untrained VAE: (3, 32, 32) -> (2, 8, 8). changes: values to fill its tensors with, by name."""
    torch.manual_seed(0)
    vae = vae_module.VAE(vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2))
    for name, value in changes.items():
        vae.state_dict()[name].fill_(value)
    return vae


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    """Path of an untrained VAE."""
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    checkpoint.save(path, checkpoint.pack_vae(untrained_vae()))
    return path


@pytest.fixture(scope="module")
def whole(tiny_vae, tmp_path_factory):
    """The folder of a run of six steps that nothing interrupted; checkpoints 4 and 6 are kept."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.main(small_run(vae=tiny_vae, out=out, save_every=2))
    return out


@pytest.fixture
def command(tiny_vae, tmp_path):
    """`small_run` with this test's own folder, the untrained VAE, and a checkpoint every two steps."""
    return lambda **options: small_run(**{"vae": tiny_vae, "out": tmp_path / "run", "save_every": 2, **options})


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the whole run, to be damaged."""
    return shutil.copytree(whole, tmp_path / "run")


def ends(capsys, main, argv, status):
    """Run a command line that must end with this status, without a traceback; returns the last line of stderr."""
    with pytest.raises(SystemExit) as stop:
        run_command(main, [str(word) for word in argv])
    err = capsys.readouterr().err
    assert stop.value.code == status and "Traceback" not in err
    return err.replace("\r", "\n").strip().splitlines()[-1]


def nothing_half_written(folder):
    """Whether no file of a write that failed, and no lock, is left in a folder."""
    return not [path for path in folder.rglob("*") if path.suffix == ".tmp" or path.name == ".lock"]


def kept_is_good(out):
    """Whether every checkpoint that is kept can be read, and is finite. Returns their steps."""
    complete, incomplete = distributed.list_checkpoints(out)
    for step in complete:
        folder = distributed.folder_of(out, step)
        assert distributed.damaged_files(folder) == []
        distributed.dcp.format_utils.dcp_to_torch_save(folder, out.parent / "state.pt")
        assert checkpoint.name_not_finite(torch.load(out.parent / "state.pt", weights_only=False)) == ""
    assert incomplete == [] and nothing_half_written(out)
    return complete


# ----------------------------------------------------------------------------------------------------------------- numbers
WAYS = {                                                # options, and a word of the sentence
    "rate": (dict(lr=1e6, warmup=0), "step|not finite"),
    "rate that overflows the weights": (dict(lr=1e38, warmup=0, save_every=1), "not finite|not taken"),
    "decay that overflows the weights": (dict(decay=1e300, warmup=0, save_every=1), "not finite|not taken"),
    "lambda": (dict(lam=1e308), "step 1 was not taken"),
    "lambda whose gradient overflows": (dict(lam=1e36), "step 1 was not taken"),
    "last step": (dict(lr=1e38, warmup=0, steps=1), "not finite"),
}
REFUSED = [("lr", "inf"), ("lr", "nan"), ("lam", "inf"), ("lam", "nan"), ("shift", "inf"), ("shift", "nan"), ("clip", "nan"),
           ("clip", "inf"), ("decay", "inf"), ("ema", "nan"), ("guidance", "nan"), ("seed", "-1"), ("accumulate", str(2 ** 64))]


@pytest.mark.parametrize("way", WAYS)
def test_options_that_lead_to_nan(command, tmp_path, capsys, way):
    """Catches a run that trains on NaN to its end with exit status 0, and overwrites its good checkpoints with it."""
    options, word = WAYS[way]
    sentence = ends(capsys, train.main, command(**options), 2)
    assert any(part in sentence for part in word.split("|")) and len(sentence) < 500
    kept = kept_is_good(tmp_path / "run")
    assert not (tmp_path / "run/model.pt").exists() and all(step < 6 for step in kept)


@pytest.mark.parametrize("name, value", REFUSED)
def test_options_out_of_range(name, value):
    """Catches NaN that comes in by the front door: no comparison with it is true. And whole numbers with which it hangs."""
    with pytest.raises(UserError, match=f"--{name} must be"):
        parse_arguments([f"--{name}={value}"])


def test_the_least_is_enough():
    """Catches a limit that refuses 1, where 1 is a number of steps or of documents."""
    names = ("steps", "log_every", "gap_every", "save_every", "documents", "accumulate")
    config = parse_arguments([f"--{name.replace('_', '-')}=1" for name in names])[0]
    assert all(getattr(config, name) == 1 for name in names)


@pytest.fixture
def run(command, tmp_path):
    """A Run at step 0."""
    return make_run(parse_arguments(command(lam=5.0))[0], tmp_path / "run")


def fill_latents(run):
    run.feed.latents[0][:] = math.nan


def one_latent(run):
    run.feed.latents[0][7, 0, 0, 0] = math.inf


def weight(run):
    run.model.embedding.weight.data[20:] = math.nan


def gradient(run):
    run.model.norm.weight.register_hook(lambda g: g * math.nan)


def gradient_overflows(run):
    run.model.norm.weight.register_hook(lambda g: g + 3e38)


def loss_alone(run):
    """With lambda 0 an infinite diffusion loss has a gradient of zero: 0 * inf is in the loss alone."""
    run.config.lam = 0.0
    run.model.patch_encoder.out.weight.data.fill_(1e30)


BROKEN = [fill_latents, one_latent, weight, gradient, gradient_overflows, loss_alone]


@pytest.mark.parametrize("plant", BROKEN)
def test_no_step_is_taken_on_nan(run, plant):
    """Catches a step that spoils the weights, the average or the optimizer before somebody looks at the loss."""
    train.train_step(run)
    before = {k: v.clone() for k, v in run.average.state_dict().items()}
    plant(run)
    weights = {k: v.clone() for k, v in run.model.state_dict().items()}
    moments = copy.deepcopy(run.optimizer.state_dict()["state"])
    with pytest.raises(UserError, match="step [2-9]+ was not taken.*micro-batch 0|step [2-9]+ was not taken.*losses are finite"):
        for _ in range(9):                              # the one latent is not drawn in every step
            train.train_step(run)
            weights = {k: v.clone() for k, v in run.model.state_dict().items()}
            before = {k: v.clone() for k, v in run.average.state_dict().items()}
            moments = copy.deepcopy(run.optimizer.state_dict()["state"])
    nan = {k: v for k, v in weights.items() if v.isfinite().all()}
    assert same(nan, {k: run.model.state_dict()[k] for k in nan}) == [] and same(before, run.average.state_dict()) == []
    now = run.optimizer.state_dict()["state"]
    assert all(same(moments[k], now[k]) == [] for k in moments)


def test_the_sentence_names_the_document(run, monkeypatch):
    """Catches a sentence that blames the first document of the batch, or counts a Chameleon's codes as words."""
    batch = run.feed.batch(3, 0, 0)
    picture = len(batch.latents) - 1
    row, position = (batch.image_id == picture).nonzero()[0].tolist()
    ids = batch.tokens[row][batch.doc_id[row] == batch.doc_id[row, position]]
    batch.latents[picture, 0, 2, 1] = -math.inf
    words = words_of_culprit(batch, run.feed.tokenizer)
    assert words == run.feed.tokenizer.decode(ids.tolist()) and (row, batch.doc_id[row, position]) != (0, batch.doc_id[0, 0])
    for n in (60, 61):                                  # a long document is cut
        with monkeypatch.context() as patch:
            patch.setattr(run.feed.tokenizer, "decode", lambda ids, n=n: "x" * n)
            assert words_of_culprit(batch, run.feed.tokenizer) == "x" * 60 + " ..." * (n > 60)
    batch.tokens[batch.tokens >= 7] = 10_000            # codes follow the words
    assert words_of_culprit(batch, run.feed.tokenizer) == ""


@pytest.mark.parametrize("where", ["optimizer", "average", "model"])
def test_nothing_that_is_not_finite_is_kept(run, tmp_path, where):
    """Catches a checkpoint that would resume into NaN: by a bad memory cell, or a last step that overflowed."""
    train.train_step(run)
    saver = distributed.Saver(tmp_path, run.ranks)
    saver.save(1, run.model, run.average, run.optimizer)
    if where == "optimizer":
        next(iter(run.optimizer.state.values()))["exp_avg_sq"][0] = math.inf
    else:
        next(getattr(run, where).parameters()).data[0] = math.nan
    with pytest.raises(UserError, match=f"step_000002 was not written, because {where}"):
        saver.save(2, run.model, run.average, run.optimizer)
    saver.wait()
    assert distributed.list_checkpoints(tmp_path) == ([1], [])
    if where == "average":
        with pytest.raises(UserError, match="model.pt was not written, because weights[.]"):
            checkpoint.save_trained(tmp_path / "model.pt", run.gather_trained())


def test_two_processes_stop_alike(tiny_vae, tmp_path):
    """Catches a process that stops alone, while the other waits for its gradients for ever, and two sentences for one fault: a
    loss of the second process is infinite, and with --lam 0 no gradient shows it to the first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common_part = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
                       PYTHONPATH=str(ROOT))
    line = [sys.executable, __file__, str(tiny_vae), str(tmp_path / "run")]
    started = [subprocess.Popen(line, env=dict(common_part, RANK=str(r), LOCAL_RANK=str(r)), stderr=subprocess.PIPE, text=True)
               for r in range(2)]
    sentences = []
    try:
        for process in started:
            _, err = process.communicate(timeout=150)   # one that waits for ever ends here
            assert process.returncode == 2 and "Traceback" not in err, err
            sentences.append(err.strip().splitlines()[-1])
    finally:
        for process in started:
            process.kill()
    assert sentences[0] == sentences[1] and "step 4 was not taken: the loss of micro-batch 1 is nan" in sentences[0]
    assert "step_000002 is still good" in sentences[0] and kept_is_good(tmp_path / "run") == [2]


def meet(vae, out):
    """What each of the two processes does."""
    torch.set_num_threads(1)
    real, micros = train.losses, []

    def losses(*args):
        micros.append(None)                             # one micro-batch per step and process
        lm, words, ddpm = real(*args)
        if distributed.rank() == 1 and len(micros) == 4:
            ddpm = ddpm + math.inf
        return lm, words, ddpm

    model.SIZES["toy"] = (1, 32, 2)
    train.losses = losses
    run_command(train.main, small_run(vae=vae, out=out, accumulate=2, save_every=2, lam=0))


@pytest.mark.parametrize("options, planted, words", [
    (dict(lr=1e30), None, "of the VAE was not taken"),
    (dict(kl_weight=1e308), None, "step 1 of the VAE was not taken"),
    (dict(), "weight", "step 3 of the VAE was not taken"),
    (dict(), "discriminator", "step 3 of the discriminator was not taken"),
], ids=str)
def test_the_vae_does_not_learn_from_nan(tmp_path, options, planted, words):
    """Catches the same in the VAE's training, and in its second player's: what was saved before is still good."""
    pixels = scenes.load_scenes(12, 0, progress=False).pixels
    critic = None
    if planted == "discriminator":
        critic = vae_training.losses.VAELoss(None, None, vae_training.losses.PatchGAN(width=4, layers=1), gan_start=0)
    real = vae_training.training_step

    def step(run, pixels):
        if run.step == 2 and planted == "weight":
            next(run.vae.parameters()).data[0] = math.nan
        if run.step == 2 and planted == "discriminator":
            hinge = critic.discriminator_loss
            critic.discriminator_loss = lambda *a: hinge(*a) * math.nan
        real(run, pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_training, "training_step", step)
        with pytest.raises(UserError, match=words):
            vae_training.train_vae(pixels, vae_module.VAEConfig(channels=4, multipliers=(1, 1), z=2), 20, batch=4, out=tmp_path,
                                   save_every=1, progress=False, vae_loss=critic, **options)
    if (tmp_path / "last.pt").exists():
        assert checkpoint.load(tmp_path / "last.pt", "vae training")["step"] <= 2 or options
    assert nothing_half_written(tmp_path)


def test_latents_that_are_not_finite(command, tmp_path, capsys):
    """A VAE whose scale is 0 has finite weights and infinite latents. Catches a run on them."""
    checkpoint.save(tmp_path / "flat.pt", checkpoint.pack_vae(untrained_vae(scale=0.0)))
    assert "step 1 was not taken: the loss of micro-batch 0" in ends(capsys, train.main, command(vae=tmp_path / "flat.pt"), 2)


def poison(content, name="weights"):
    """Make the first weight of a checkpoint's dict NaN."""
    first = next(tensor for tensor in content[name].values() if tensor.is_floating_point())
    first.view(-1)[0] = math.nan
    return content


def test_a_sentence_is_one_line():
    """Catches a name that clears the terminal, and a caption of 100,000 letters in a sentence."""
    assert common.one_sentence(ValueError("a\x1b[2J\nb")) == "a\\x1b[2J\\nb"
    assert common.one_sentence(ValueError("x" * 600)) == "x" * 600
    assert common.one_sentence(ValueError("x" * 300 + "y" * 600)) == "x" * 300 + " ... " + "y" * 250


def test_the_words_of_the_command_line_are_checked(monkeypatch, capsys):
    """Catches words with which argparse does not cope, on the real command line, from its first word on."""
    for word in ("--out=--", "-o=--", "-o--", "--o\x1b", "9" * 301):
        monkeypatch.setattr(sys, "argv", ["train.py", word])
        with pytest.raises(SystemExit):
            run_command(lambda _: pytest.fail("began"))
    assert capsys.readouterr().err.count("error: ") == 5
    monkeypatch.setattr(sys, "argv", ["train.py", "--a=b", "c=--", "- a circle --", "---", "-1", "--", "9" * 300])
    run_command(lambda _: None)


@pytest.mark.parametrize("documents, accumulate, same_rows", [(4, 2, True), (8, 1, True), (2, 4, True), (4, 1, False), (8, 2, False)])
def test_a_step_of_shards_may_be_cut_otherwise(tmp_path, documents, accumulate, same_rows):
    """Catches a resume after "out of memory" that is refused, and one whose steps have other rows."""
    def config_of(documents, accumulate):
        return parse_arguments(["--data", "shards", "--documents", str(documents), "--accumulate", str(accumulate)])[0]

    run_folder.write_config(tmp_path, config_of(4, 2), {})
    if same_rows:
        run_folder.check_same_run(tmp_path, config_of(documents, accumulate), set())
        return
    with pytest.raises(UserError, match="was trained with --"):
        run_folder.check_same_run(tmp_path, config_of(documents, accumulate), set())


@pytest.mark.parametrize("words, sentence", [(["a", 3], "is not a list of words"), ({"a": 1}, "is not a list of words"), (["a b"], "'a b', which is empty"),
                                             (["a", ""], "'', which is empty"), (["a", "b"], "")])
def test_a_tokenizer_is_a_list_of_words(tmp_path, words, sentence):
    """Catches a word that no text would ever have."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    if not sentence:
        assert checkpoint.read_words(tmp_path / "tokenizer.json") == words
        return
    with pytest.raises(UserError, match=sentence):
        checkpoint.read_words(tmp_path / "tokenizer.json")


def test_nobody_reads_on():
    """Catches a traceback of `python config.py | head -1`: whoever reads has gone away, and that is no mistake."""
    # 1 MB is more than a pipe holds; a few letters are only written as the program ends.
    command = "from support.common import run_command; run_command(lambda _: print('x' * {}))"
    demonstration = "from support.common import end_with_the_reader; end_with_the_reader(); print('x' * {})"
    for code, letters, status in [(command, 10 ** 6, 141), (command, 10, 141), (demonstration, 10, -signal.SIGPIPE)]:
        code = code.format(letters)
        program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        program.stdout.close()
        assert (program.stderr.read(), program.wait()) == (b"", status)


def test_what_is_read_is_finite(whole, tiny_vae, tmp_path, capsys):
    """Catches NaN that is read: from a model.pt (also as --init), a vae.pt, the state of a VAE's training, a checkpoint."""
    torch.save(poison(torch.load(whole / "model.pt", weights_only=True)), tmp_path / "model.pt")
    torch.save(poison(torch.load(tiny_vae, weights_only=True)), tmp_path / "vae.pt")
    torch.save({"kind": "vae training", "parts": [{"w": torch.tensor([1.0, math.inf])}]}, tmp_path / "last.pt")
    # Finite as it is stored; infinite in the float32 in which it is used.
    large = torch.load(tiny_vae, weights_only=True)
    name, tensor = next((name, tensor) for name, tensor in large["weights"].items() if tensor.is_floating_point())
    large["weights"][name] = torch.full_like(tensor, 1e300, dtype=torch.float64)
    torch.save(large, tmp_path / "large.pt")
    readers = ((load_trained, "model.pt"), (load_vae, "vae.pt"), (load_vae, "large.pt"), (partial(checkpoint.load, kind="vae training"), "last.pt"))
    for read, name in readers:
        with pytest.raises(UserError, match=f"{name} cannot be used, because .* is not finite"):
            read(tmp_path / name)
    sentence = ends(capsys, train.main, small_run(out=tmp_path / "x", preset="edit", init=tmp_path / "model.pt"), 2)
    assert "model.pt cannot be used" in sentence and not (tmp_path / "x").exists()


def test_a_checkpoint_that_is_not_finite_is_not_resumed(run, tmp_path, monkeypatch):
    """Catches NaN that an earlier version has saved: the checkpoint before it is used."""
    saver = distributed.Saver(tmp_path, run.ranks)
    for step in (1, 2):
        train.train_step(run)
        if step == 2:
            good = {k: v.clone() for k, v in run.average.state_dict().items()}
            next(run.average.parameters()).data[0, 0] = math.nan
            monkeypatch.setattr(distributed, "not_finite", lambda state: "")
        saver.save(step, run.model, run.average, run.optimizer)
    saver.wait()
    monkeypatch.undo()
    assert distributed.load_newest(tmp_path, run.ranks, run.model, run.average, run.optimizer) == 1
    assert all(p.isfinite().all() for p in run.average.parameters()) and same(good, dict(run.average.state_dict()))


def test_a_packed_latent_that_is_not_finite(tmp_path, capsys):
    """Its checksum is right: a VAE made it. Catches a row that is read as if nothing were wrong."""
    checkpoint.save(tmp_path / "vae.pt", checkpoint.pack_vae(untrained_vae()))
    argv = ["--text", "scenes", "--pairs", "scenes", "--scenes", "40", "--vae", tmp_path / "vae.pt", "--seq-len", "64", "--image-size",
            "32", "--shard-rows", "64", "--out", tmp_path / "packed"]
    encode = vae_module.VAE.encode

    def overflowing(vae, x):
        mean, deviation = encode(vae, x)
        mean[3, 0, 1, 1] = 1e9                          # too large for float16
        return mean, deviation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_module.VAE, "encode", overflowing)
        with np.errstate(over="ignore"):
            with pytest.raises(UserError, match="latents that float16 cannot hold"):
                pack.main([str(word) for word in argv])
            patch.setattr(np, "isfinite", lambda x: np.array(True))             # packed as before that was looked at
            pack.main([str(word) for word in argv])
    with pytest.raises(UserError, match="pairs-000000 holds a latent that is not finite"):
        shards.verify(tmp_path / "packed")
    packed = dict(data="shards", data_dir=tmp_path / "packed", size="toy", seq_len=64, documents=60, steps=4, samples=0, out=tmp_path / "run")
    argv = [word for k, v in packed.items() for word in ("--" + k.replace("_", "-"), v)]
    assert "pairs-000000" in ends(capsys, train.main, argv, 2)


@pytest.mark.parametrize("norms, wanted", [
    ([1.0] * 9 + [50.0], (100, 50.0)), ([1.0, 30.0] + [1.5] * 8, (92, 30.0)), ([4.9, 4.0] + [1.0] * 8, None), ([0.1] + [1.0] * 8, None), ([7.0], None), ([1.0, 2.0], None)],
    ids=str)
def test_a_spike_is_marked(norms, wanted):
    """Catches a jump of the gradient that no line of the log shows, because only the last step's norm is written; and a mark at
    every warm-up."""
    found = progress.spike([{"grad_norm": norm} for norm in norms], 100)
    assert found == ({"spike": {"step": wanted[0], "grad_norm": wanted[1]}} if wanted else {})


def test_a_spike_is_in_the_log(command, tmp_path):
    """Catches a mark that is computed and not written."""
    real = train.train_step

    def jump(run):
        taken = real(run)
        taken["grad_norm"] *= 1000 if run.step == 3 else 1
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", jump)
        train.main(command(log_every=6))
    assert log(tmp_path / "run")[0]["spike"]["step"] == 3


# --------------------------------------------------------------------------------------- what is read is what was written
def flip(path, at, n=64):
    """Change n bytes of a file."""
    content = bytearray(path.read_bytes())
    content[at: at + n] = bytes(b ^ 0x55 for b in content[at: at + n])
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.pt", "vae.pt"])
def test_flipped_bytes_are_seen(whole, tiny_vae, tmp_path, name):
    """torch.load does not compare the checksums of the zip file that it reads. Catches 64 bytes, or a single one, that are read
    as weights, in any tensor."""
    path, intact = tmp_path / name, whole / name if name == "model.pt" else tiny_vae
    read = load_trained if name == "model.pt" else load_vae
    with zipfile.ZipFile(intact) as file:
        largest = sorted((info for info in file.infolist() if "/data/" in info.filename), key=lambda info: -info.file_size)
    places = [(info.header_offset + 200 + k, n) for info in largest[:6] for k, n in ((0, 64), (info.file_size // 2, 1))]
    for at, n in places:
        shutil.copy(intact, path)
        flip(path, at, n)
        with pytest.raises(UserError, match=f"{name} is damaged.*is not what was written"):
            read(path)
    shutil.copy(intact, path)
    read(path)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "crc32_0.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(command, copied, whole, capsys, file):
    """Catches flipped bytes that are resumed from; a damaged checkpoint that is taken for finished when the run comes to that
    step again; and a run that ends otherwise than one without damage."""
    path = copied / "checkpoints/step_000006" / file
    flip(path, path.stat().st_size // 2, 64 if file != "crc32_0.json" else 4)
    train.main(command() + ["--resume"])
    said = capsys.readouterr().out
    assert "step_000006 is damaged" in said and "resuming from" in said and "step_000004" in said.split("resuming from")[1]
    assert same(states(whole), states(copied)) == [] and log(whole) == log(copied)
    assert kept_is_good(copied) == [4, 6] and (copied / "checkpoints/step_000006.damaged").exists()


def test_checksums_in_a_pipe(tmp_path):
    """Catches a resume that waits for ever: nobody writes into that pipe."""
    os.mkfifo(tmp_path / "crc32_0.json")
    assert distributed.read_checksums(tmp_path) == ({}, ["crc32_0.json"])


def test_no_whole_checkpoint(command, copied, capsys):
    """Catches a resume that starts from nothing, or touches anything, where all checkpoints are damaged."""
    for step in (4, 6):
        path = copied / f"checkpoints/step_{step:06d}/__0_0.distcp"
        path.write_bytes(path.read_bytes()[:-100])
    sentence = ends(capsys, train.main, command() + ["--resume"], 2)
    assert "step_000006 is damaged" in sentence and "no other checkpoint" in sentence
    assert distributed.list_checkpoints(copied) == ([4, 6], [])


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe\x00", b"[" * 100_000], ids=lambda c: str(c)[:12])
def test_a_lost_config_does_not_block_a_resume(command, copied, content):
    """Catches a run of weeks that cannot go on because a full disk has emptied config.json: every checkpoint has a copy."""
    (copied / "config.json").unlink()
    if content is not None:
        (copied / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="--lr "):
        train.main(command(lr=0.5) + ["--resume"])
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(copied / "checkpoints/step_000006")
    train.main(command() + ["--resume"])
    assert json.loads((copied / "config.json").read_text())["seed"] == 3


def test_a_config_that_cannot_be_read_anywhere(command, copied, capsys):
    """Catches a traceback, or options that are made up."""
    for path in copied.rglob("config.json"):
        path.write_text("{}" if path.parent == copied else "")
    (copied / "config.json").write_text('{"documents": "x", "accumulate": null}')
    assert "documents cannot be 'x'" in ends(capsys, train.main, command() + ["--resume"], 2)
    (copied / "config.json").write_text("")
    assert "config.json cannot be read" in ends(capsys, train.main, command() + ["--resume"], 2)


LINES = [b"{}", b'{"step": 1}', b"[1]", b"null", b"\xff\xfe{}", b'{"step": "2", "lm": 1}', b'{"step": 3, "lm": 0.', b"\x00" * 40,
         b'{"step": 2, "lm": 1.0, "diffusion": 1.0, "by_t": 3}', b'{"step": 2, "lm": "x", "diffusion": 1.0, "by_t": [1, 1, 1, 1, 1]}', b"[" * 100_000]


def test_a_damaged_log_does_not_block_a_resume(command, copied, whole):
    """Catches a KeyError after the whole training, because of a line that is no row of the log."""
    lines = (copied / "log.jsonl").read_bytes().splitlines()
    (copied / "log.jsonl").write_bytes(b"\n".join(line for pair in zip(lines, [*LINES[5:], *LINES[:5]]) for line in pair) + b"\n" + b"\n".join(LINES))
    shutil.rmtree(copied / "checkpoints/step_000006")
    train.main(command() + ["--resume"])
    assert log(whole) == log(copied) and (copied / "curves.png").stat().st_size > 5000
    (copied / "log.jsonl").write_bytes(b"")             # emptied
    shutil.rmtree(copied / "checkpoints/step_000006")
    train.main(command() + ["--resume"])
    assert [row["step"] for row in log(copied)] == [5, 6]


def test_a_log_of_the_steps_that_were_taken(tmp_path):
    """Catches a resume that is refused because somebody has deleted its log, rows of another run in a new one, and rows of steps that are
    taken again."""
    assert run_folder.Log(tmp_path, 5).rows == []       # there is none
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 2}\n{"step": 4, "lm": 1.0}\n{"step": "4"}\n[4]\n')
    assert run_folder.Log(tmp_path, 0).rows == []
    assert run_folder.Log(tmp_path, 3).rows == [{"step": 0}, {"step": 2}]
    assert run_folder.Log(tmp_path, 4, lambda row: "lm" in row).rows == [{"step": 4, "lm": 1.0}]


@pytest.mark.parametrize("kept, written, step, words", [([2, 4], [], 5, "step_000004 is still good"), ([2], [4], 4, "step_000004 is still good"),
                                                        ([2, 8], [], 5, "step_000002 is still good"), ([], [], 5, "no checkpoint yet")])
def test_the_last_good_checkpoint_is_named(tmp_path, kept, written, step, words):
    """Catches a sentence that forgets the checkpoint which is being written, or names one of later steps."""
    for number in kept + written:
        folder = distributed.folder_of(tmp_path, number)
        folder.mkdir(parents=True)
        if number in kept:
            (folder / ".metadata").touch()
    assert words in last_good(tmp_path, step)


def test_a_killed_run_keeps_no_checkpoint_too_many(command, copied):
    """Killed after the last checkpoint was written, before the old ones were deleted. Catches a third one that stays for ever."""
    shutil.copytree(copied / "checkpoints/step_000004", copied / "checkpoints/step_000002")
    train.main(command() + ["--resume"])
    assert distributed.list_checkpoints(copied) == ([4, 6], [])


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    """Catches a file of which half was written, a leftover, an old one that is lost when the new one fails, and content that a
    power cut would lose after the name was taken."""
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), whole_file(tmp_path / "a/x.json") as file:
            file.write(b"half")
            raise error
        assert list((tmp_path / "a").iterdir()) == []
    common.write_json(tmp_path / "a/x.json", {"a": 1})
    with pytest.raises(TypeError):
        common.write_json(tmp_path / "a/x.json", {"a": object()})
    assert json.loads((tmp_path / "a/x.json").read_text()) == {"a": 1} and nothing_half_written(tmp_path)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    common.write_json(tmp_path / "x.json", [1, 2])
    run_folder.Log(tmp_path, 0).add({"step": 1})
    assert synced == [len(json.dumps([1, 2], indent=1)), len('{"step": 1}\n')]


@pytest.mark.parametrize("change", [
    dict(weights=[]), dict(weights={}), dict(config=None), dict(words=7), dict(vae={}), dict(diffusion={"kind": "x"}), dict(layers=2 ** 63),
    dict(weight=None), dict(weight=torch.ones(32).to_sparse()), dict(weight=torch.ones(32, dtype=torch.complex64)),
    dict(about={"reach": 1})], ids=str)
def test_a_checkpoint_of_odd_content(whole, tmp_path, change):
    """Catches a traceback, or a model of 2^63 layers, built for ever."""
    content = torch.load(whole / "model.pt", weights_only=True)
    if "layers" in change:
        content["config"] |= change
    elif "weight" in change:
        content["weights"]["norm.weight"] = change["weight"]
    else:
        content |= change
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match="model.pt"):
        load_trained(tmp_path / "model.pt")


@pytest.mark.parametrize("name, tensor", [("norm.weight", torch.ones(31)), ("nor.weight", torch.ones(32))])
def test_a_tensor_without_a_place_is_named(whole, tmp_path, name, tensor):
    """Catches a library's list of everything that is missing in place of the one tensor that is wrong."""
    content = torch.load(whole / "model.pt", weights_only=True)
    content["weights"][name] = tensor
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=rf"{name} of the shape \({len(tensor)},\) has no place"):
        load_trained(tmp_path / "model.pt")


def test_names_of_older_files():
    """Catches a tensor of the shipped models that loses the rest of its name."""
    assert [checkpoint.new_name(name) for name in ("words.weight", "pictures.time.mlp.0.bias", "reach", "norm.weight")] == \
        ["embedding.weight", "patch_encoder.time.mlp.0.bias", "x0_max", "norm.weight"]


@pytest.mark.parametrize("options", [{"channels": True}, {"channels": 8.0}, {"multipliers": (1, 2.0)}, {"multipliers": 1}], ids=str)
def test_settings_of_a_file_have_types(options):
    """Catches True, which counts as 1, and a size that ends in a library's words; what a file does not say has its default."""
    assert checkpoint.typed(vae_module.VAEConfig, {"channels": 8, "multipliers": [1, 2]}).channels == 8
    with pytest.raises(TypeError, match=f"{next(iter(options))} cannot be"):
        checkpoint.typed(vae_module.VAEConfig, options)


@pytest.mark.parametrize("codes, vocabulary, right", [(0, 20, True), (0, 21, False), (8, 20, True), (8, 28, True), (8, 12, False), (8, 29, False)])
def test_a_network_knows_its_words_and_codes(whole, codes, vocabulary, right):
    """Catches a Chameleon that is refused, and a network whose ids mean another tokenizer's words."""
    trained = copy.copy(load_trained(whole / "model.pt"))
    trained.tokenizer = range(20)
    trained.vae = SimpleNamespace(config=dataclasses.replace(trained.vae.config, codes=codes), f=trained.vae.f)
    trained.model = SimpleNamespace(config=dataclasses.replace(trained.model.config, vocabulary=vocabulary))
    with contextlib.nullcontext() if right else pytest.raises(ValueError, match=f"knows {vocabulary} tokens"):
        checkpoint.check_together(trained)


# ----------------------------------------------------------------------------------------------------- one run, one folder
def test_a_second_training_is_refused(command, tmp_path, copied, capsys):
    """Catches two trainings that write one folder: a mixed log, one's config beside the other's weights."""
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with run_folder.lock(copied):
        for options in (["--resume"], ["--overwrite"]):
            assert "another training is at work" in ends(capsys, train.main, command() + options, 2)
        assert "another training" in ends(capsys, vae_training.main, ["--out", copied, "--overwrite"], 2)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    with run_folder.lock(tmp_path / "new/deeper"):
        assert (tmp_path / "new/deeper").exists()
    assert not (tmp_path / "new").exists()              # a run that was refused leaves no folder


HOLD = "import sys, time, pathlib; from support import run_folder\nwith run_folder.lock(pathlib.Path(sys.argv[1])):\n print('held', flush=True)\n time.sleep(600)"


def test_the_lock_dies_with_its_process(tmp_path):
    """Catches a lock that a killed run leaves behind: the folder could not be used again."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another training"), run_folder.lock(tmp_path / "run"):
        pass
    holder.kill()
    holder.wait()
    with run_folder.lock(tmp_path / "run"):
        pass
    assert nothing_half_written(tmp_path)


def test_a_file_without_a_run_is_not_overwritten(command, whole, tiny_vae, tmp_path, capsys):
    """Catches a model or a VAE of the user's that lies in the folder, lost to a new run without a word."""
    for name, source in (("model.pt", whole / "model.pt"), ("vae.pt", tiny_vae)):
        out = tmp_path / name
        out.mkdir()
        shutil.copy(source, out / name)
        assert f"already holds {name}" in ends(capsys, train.main, command(out=out), 2)
        assert "nothing to resume" in ends(capsys, train.main, command(out=out) + ["--resume"], 2)
    assert "already holds a vae.pt" in ends(capsys, vae_training.main, ["--out", out], 2)
    train.main(command(out=tmp_path / "model.pt", steps=1) + ["--overwrite"])
    assert kept_is_good(tmp_path / "model.pt") == [1]


def test_another_runs_vae_is_not_taken(command, tmp_path, tiny_vae, monkeypatch):
    """A run with its own VAE, then --overwrite with the shipped one. Catches a --resume that takes the VAE of the first: other
    latents, without a word. A VAE that the user names is not deleted, wherever it lies."""
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run/vae.pt", checkpoint.pack_vae(untrained_vae(scale=2.0)))
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path / "shelf")
    (tmp_path / "shelf").mkdir()
    shutil.copy(tiny_vae, tmp_path / "shelf/scenes_vae.pt")
    train.main(command(vae="", steps=1) + ["--overwrite"])
    assert not (tmp_path / "run/vae.pt").exists()
    shutil.copy(tiny_vae, tmp_path / "run/vae.pt")
    train.main(command(vae=tmp_path / "run/vae.pt", steps=1) + ["--overwrite"])
    assert (tmp_path / "run/vae.pt").exists()


# ------------------------------------------------------------------------------------------------------- Ctrl-C and SIGTERM
def press(patch, owner, name, number, at=1):
    """Send a signal to this process when owner.name is called for the at-th time."""
    real, calls = getattr(owner, name), []

    def call(*args, **options):
        calls.append(name)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return real(*args, **options)

    patch.setattr(owner, name, call)
    return calls


def test_a_run_that_is_stopped_at_every_stage(command, tmp_path, monkeypatch, capsys):
    """Stopped in the VAE's training, while pictures are encoded, in the loop, and in the report; by Ctrl-C and by SIGTERM.
    Catches work that is lost, a VAE or a step that is learned twice, and a run that ends otherwise than an uninterrupted one."""
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path)                 # no VAE is shipped
    short = dict(vae="", vae_steps=4, steps=3, samples=2, sample_steps=1)
    counted = dict(vae=0, train=0)
    vae_step, train_step = vae_training.training_step, train.train_step

    def count_vae(*args):
        counted["vae"] += 1
        return vae_step(*args)

    def count_train(*args):
        counted["train"] += 1
        return train_step(*args)

    monkeypatch.setattr(vae_training, "training_step", count_vae)
    monkeypatch.setattr(train, "train_step", count_train)
    stages = [
        (vae_training, "training_step", signal.SIGINT, 2, "vae/last.pt"),
        (vae_training, "training_step", signal.SIGTERM, 1, "vae/last.pt"),
        (vae_module, "encode_all", signal.SIGINT, 1, "goes on with the VAE"),
        (vae_module, "encode_all", signal.SIGTERM, 1, "goes on with the VAE"),
        (train, "train_step", signal.SIGTERM, 2, "saved at step 2"),
        (evaluate, "report", signal.SIGINT, 1, "from step 3"),
        (evaluate, "report", signal.SIGTERM, 1, "from step 3"),
    ]
    for k, (owner, name, number, at, words) in enumerate(stages):
        with monkeypatch.context() as patch:
            press(patch, owner, name, number, at)
            sentence = ends(capsys, train.main, command(**short) + ["--resume"] * (k > 0), 128 + number)
        assert sentence.startswith("stopped: ") and words in sentence and "--resume" in sentence
        assert (tmp_path / "run/reconstructions.png").stat().st_size > 1000             # the VAE can be looked at
        assert (tmp_path / "run/samples.png").exists() == (owner in (train, evaluate))
        assert nothing_half_written(tmp_path / "run")
    train.main(command(**short) + ["--resume"])
    assert counted == dict(vae=4, train=3) and not (tmp_path / "run/vae/last.pt").exists()
    train.main(command(**short, out=tmp_path / "whole"))
    assert same(states(tmp_path / "whole"), states(tmp_path / "run")) == []
    one, two = (checkpoint.load(tmp_path / name / "vae.pt", "vae")["weights"] for name in ("whole", "run"))
    assert same(one, two) == []
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "run"))
    assert {k: v for k, v in one.items() if "seconds" not in k} == {k: v for k, v in two.items() if "seconds" not in k}


def test_nothing_was_learned_yet(command, tmp_path, monkeypatch, capsys):
    """Catches advice to --resume where there is nothing to resume, and a folder that is left behind."""
    press(monkeypatch, choose, "load_pairs", signal.SIGTERM)
    assert "the same command starts again" in ends(capsys, train.main, command(), 143)
    assert not (tmp_path / "run").exists()


def test_a_run_may_end_early(command, tmp_path, copied, whole, capsys):
    """--resume --steps N. Catches a model that cannot be drawn with before the last step, and a rate that falls otherwise than it
    was planned when the run goes on after all."""
    (copied / "model.pt").unlink()
    shutil.rmtree(copied / "checkpoints/step_000006")
    train.main(command(steps=5) + ["--resume"])
    assert states(copied)["step"] == 5 and load_trained(copied / "model.pt")
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert f'python sample.py "..." --checkpoint {copied}/model.pt' in said
    assert "has already taken 5 steps" in ends(capsys, train.main, command(steps=3) + ["--resume"], 2)
    train.main(command() + ["--resume"])
    assert same(states(whole), states(copied)) == []
    with pytest.raises(UserError, match="--steps 6"):
        train.main(command(steps=9) + ["--resume"])


def test_a_stopped_run_can_be_drawn_with(command, tmp_path, monkeypatch, capsys):
    """Catches hours of training that leave nothing to look at, and a sentence that does not say how."""
    press(monkeypatch, train, "train_step", signal.SIGINT, at=2)
    sentence = ends(capsys, train.main, command(log_every=50), 130)
    assert sentence.endswith(f'python sample.py "..." --checkpoint {tmp_path}/run/model.pt') and "--resume --steps 2" in sentence
    assert load_trained(tmp_path / "run/model.pt")
    for part in ("chameleon", "llama"):
        run = make_run(parse_arguments(command(out=tmp_path / "other"))[0], tmp_path / "other")
        run.config.model = part
        assert part in run.how_to_use() or "likelihood" in run.how_to_use()


def test_the_first_picture_comes_with_the_first_save(command, tmp_path, monkeypatch):
    """Catches a long run that shows nothing before its end, and pictures of an earlier run that are taken for this one's."""
    real, folder, seen = train.train_step, tmp_path / "run", []

    def step(run):
        if run.step == 4:                               # whatever may go wrong
            raise RuntimeError("lost")
        seen.append((folder / "samples.png").exists() and (folder / "model.pt").exists())
        return real(run)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(RuntimeError, match="lost"):
        train.main(command(steps=6, save_every=2, samples=2, sample_steps=1))
    assert seen == [False, False, True, True] and load_trained(folder / "model.pt")
    weights = load_trained(folder / "model.pt").model.state_dict()
    whole = states(folder)
    assert whole["step"] == 4 and all(torch.equal(whole[f"average.{name}"].half(), w.half()) for name, w in weights.items())


def test_packing_goes_on(tmp_path, tiny_vae, monkeypatch, capsys):
    """Catches packing that SIGTERM ends without a word, and half a shard."""
    argv = ["--pairs", "scenes", "--text", "scenes", "--scenes", "40", "--vae", tiny_vae, "--seq-len", "64", "--image-size", "32",
            "--shard-rows", "4", "--out", tmp_path / "packed"]
    how = "the same command goes on where this one stopped"
    with monkeypatch.context() as patch:
        press(patch, pack.ShardWriter, "write", signal.SIGTERM, at=3)
        with pytest.raises(SystemExit) as stop:
            run_command(pack.main, [str(word) for word in argv], if_stopped=how)
    assert stop.value.code == 143 and how in capsys.readouterr().err and f'if_stopped="{how}"' in (ROOT / "scale/pack.py").read_text()
    pack.main([str(word) for word in argv])
    shards.verify(tmp_path / "packed")


@pytest.mark.parametrize("word", ["--checkpoint=--", "-1\n<boi>", "9" * 5000])
def test_words_that_argparse_repeats(capsys, word):
    """Catches an option that becomes an empty list, and a sentence of several lines, or of 5,000 digits."""
    sentence = ends(capsys, parse_arguments, ["--seed", word], 2)
    assert sentence.startswith("error: ") and len(sentence) < 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_a_sentence_in_every_program(capsys, number):
    """Catches a traceback of KeyboardInterrupt, another exit status, and a handler that stays."""
    before = signal.getsignal(signal.SIGTERM)
    assert ends(capsys, lambda argv: os.kill(os.getpid(), number), [], 128 + number).startswith("stopped: ")
    assert signal.getsignal(signal.SIGTERM) is before


# --------------------------------------------------------------------------------------------------------------- disk full
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
def test_a_full_disk_while_a_file_is_written(whole, tmp_path, n):
    """Catches a traceback without the cause, a .tmp that keeps the disk full, and an old model.pt or vae.pt that is lost."""
    trained = load_trained(whole / "model.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    shutil.copy(whole / "model.pt", tmp_path / "model.pt")
    writes = {"model.pt": lambda path: checkpoint.save_trained(path, trained),
              "vae.pt": lambda path: checkpoint.save(path, checkpoint.pack_vae(trained.vae)),
              "config.json": lambda path: common.write_json(path, list(range(2000))),
              "curves.png": lambda path: figures.plot_curves([dict(step=1, lm=1, diffusion=1, by_t=[1] * 5)], path),
              "a.bmp": lambda path: figures.save_picture(pixels, path)}
    for name, write in writes.items():
        with full_disk(n), pytest.raises(UserError, match=f"{name} could not be written .File too large"):
            write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"] and load_trained(tmp_path / "model.pt")


@pytest.mark.parametrize("name, n", [("checkpoint", 60_000), ("log.jsonl", 50)])
def test_a_full_disk_while_training(command, tmp_path, copied, whole, capsys, name, n):
    """Catches 25 lines of a library's traceback, half a checkpoint, and a run that cannot go on when there is room again."""
    shutil.rmtree(copied / "checkpoints/step_000006")
    target = (distributed.dcp, "async_save") if name == "checkpoint" else (run_folder.Log, "add")
    real = getattr(*target)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(*target, lambda *a, **k: (stack.enter_context(full_disk(n)), real(*a, **k))[1])
        with pytest.raises(UserError) as problem:
            train.main(command() + ["--resume"])
        stack.close()
    sentence = str(problem.value)
    assert "could not be written" in sentence and len(sentence.splitlines()) == 1 and "File too large" in sentence
    assert kept_is_good(copied) == [4]
    train.main(command() + ["--resume"])
    assert same(states(whole), states(copied)) == [] and log(whole) == log(copied)


def test_a_full_disk_in_the_vaes_training(tmp_path):
    """The same for last.pt."""
    pixels = scenes.load_scenes(12, 0, progress=False).pixels
    with full_disk(5000), pytest.raises(UserError, match="last.pt could not be written"):
        vae_training.train_vae(pixels, vae_module.VAEConfig(channels=4, multipliers=(1, 1), z=2), 2, batch=4, out=tmp_path, save_every=1,
                               progress=False)
    assert nothing_half_written(tmp_path) and not (tmp_path / "last.pt").exists()


if __name__ == "__main__":
    meet(Path(sys.argv[1]), Path(sys.argv[2]))


REPEAT = """
import resource, sys
import torch
from support.common import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    [torch.ones(2 ** 19) for _ in range(8)]
for _ in range(10):
    work()                                              # the heap grows to what it takes
before = faults()
for _ in range(20):
    work()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_memory_is_kept():
    """Eight arrays of 2 MB, twenty times: their 4,096 pages are fetched anew each time, or never again. Catches a call that does
    nothing."""
    pages = {}
    for how in ("kept", "as it is"):
        # From 64 KB on, arrays come from the system: without this, glibc decides by what it has freed before.
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run([sys.executable, "-c", REPEAT, how], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        pages[how] = int(done.stdout)
    assert pages["kept"] < 4096 and pages["as it is"] > 10 * 4096


HEAP = """
from support.common import keep_memory
keep_memory()
advised = 0
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:                          # the first line of a piece of memory
        begin, end = (int(place, 16) for place in line.split()[0].split("-"))
        heap = "[heap]" in line
    if heap and line.startswith("VmFlags") and " hg" in line:
        advised += end - begin
print(advised)
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a Linux with large pages")
def test_the_heap_may_have_large_pages():
    """Catches advice that is given for another part of memory, or for none."""
    done = subprocess.run([sys.executable, "-c", HEAP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 2 ** 27 < int(done.stdout) <= 2 ** 28 + 2 ** 24
