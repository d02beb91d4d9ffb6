"""
test_run_folder.py: one run has one folder           (support/run_folder.py; docs/PAPER.md §4.10)

THE IDEA    Two trainings in one folder would mix their logs, and leave one's options beside the
            other's weights. So a second one is refused while the first is at work. A new run
            overwrites nothing that lies there unless it is told to, and takes no other run's VAE.
TRY IT      python -m pytest -n 0 tests/test_run_folder.py
"""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from autoencoder import train as vae_training
from config import parse_arguments
from small_runs import check_kept, ends, nothing_half_written, untrained_vae
from support import checkpoint, run_folder
from support.common import UserError

pytestmark = pytest.mark.usefixtures("one_layer")

ROOT = Path(__file__).resolve().parents[1]


def contents(folder):
    """{path: bytes} of every file in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------- the lock
def test_a_second_training_is_refused(short_run, tmp_path, copied_run, capsys):
    """Catches two trainings that write one folder.

    Their log would be mixed, and one's config would lie beside the other's weights."""
    before = contents(copied_run)

    with run_folder.lock(copied_run):
        for option in ("--resume", "--overwrite"):
            sentence = ends(capsys, train.main, short_run() + [option], 2)
            assert "another training is at work" in sentence
        command = ["--out", copied_run, "--overwrite"]
        assert "another training" in ends(capsys, vae_training.main, command, 2)
    assert contents(copied_run) == before

    # The lock makes the folder; a run that was refused leaves none.
    with run_folder.lock(tmp_path / "new/deeper"):
        assert (tmp_path / "new/deeper").exists()
    assert not (tmp_path / "new").exists()


HOLD = """
import pathlib, sys, time
from support import run_folder
with run_folder.lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_dies_with_its_process(tmp_path):
    """Catches a lock that a killed run leaves behind: the folder could not be used again."""
    out = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(out)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another training"), run_folder.lock(out):
        pass

    holder.kill()
    holder.wait()

    with run_folder.lock(out):
        pass
    assert nothing_half_written(tmp_path)


# ------------------------------------------------------------------------- what lies there already
def test_a_file_without_a_run_is_not_overwritten(short_run, whole_run, vae_file, tmp_path, capsys):
    """Catches a model or a VAE of the user's that is lost to a new run without a word."""
    for name, source in (("model.pt", whole_run / "model.pt"), ("vae.pt", vae_file)):
        out = tmp_path / name
        out.mkdir()
        shutil.copy(source, out / name)
        command = short_run(out=out)
        assert f"already holds {name}" in ends(capsys, train.main, command, 2)
        assert "nothing to resume" in ends(capsys, train.main, command + ["--resume"], 2)

    sentence = ends(capsys, vae_training.main, ["--out", tmp_path / "vae.pt"], 2)
    assert "already holds a vae.pt" in sentence

    # Who says --overwrite gets what they ask for.
    train.main(short_run(out=tmp_path / "model.pt", steps=1) + ["--overwrite"])
    assert check_kept(tmp_path / "model.pt") == [1]


def test_another_runs_vae_is_not_taken(short_run, tmp_path, vae_file, monkeypatch):
    """Catches a --resume that takes the VAE of the run before: other latents, without a word.

    The run before had its own VAE; this one has the shipped one, and --overwrite. A VAE that the
    user names is not deleted, wherever it lies."""
    out = tmp_path / "run"
    out.mkdir()
    checkpoint.save(out / "vae.pt", checkpoint.pack_vae(untrained_vae(scale=2.0)))
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    shutil.copy(vae_file, shelf / "scenes_vae.pt")
    monkeypatch.setattr(checkpoint, "ASSETS", shelf)

    train.main(short_run(vae="", steps=1) + ["--overwrite"])
    assert not (out / "vae.pt").exists()

    shutil.copy(vae_file, out / "vae.pt")
    train.main(short_run(vae=out / "vae.pt", steps=1) + ["--overwrite"])
    assert (out / "vae.pt").exists()


# ------------------------------------------------------------------------------------- the same run
@pytest.mark.parametrize("documents, accumulate, same_rows", [
    (4, 2, True),                                       # as it was begun: 8 rows per step
    (8, 1, True),
    (2, 4, True),
    (4, 1, False),
    (8, 2, False),
])
def test_a_step_of_shards_may_be_cut_otherwise(tmp_path, documents, accumulate, same_rows):
    """Catches a resume after "out of memory" that is refused.

    Also catches one whose steps have other rows."""
    def config_of(documents, accumulate):
        words = [
            "--data", "shards",
            "--documents", str(documents),
            "--accumulate", str(accumulate),
        ]
        return parse_arguments(words)[0]

    run_folder.write_config(tmp_path, config_of(4, 2), {})
    if same_rows:
        run_folder.check_same_run(tmp_path, config_of(documents, accumulate), set())
        return
    with pytest.raises(UserError, match="was trained with --"):
        run_folder.check_same_run(tmp_path, config_of(documents, accumulate), set())
