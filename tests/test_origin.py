"""
test_origin.py: a model.pt says where it comes from                     (support/origin.py; ours)

THE IDEA    A run of one step is trained, and its file must name the command as it was typed, the
            commit of the code, the version of torch, the device and the seconds. Commits are asked
            of small repositories that the tests make. Older and damaged files get a sentence.
TRY IT      python -m pytest -n 0 tests/test_origin.py
"""
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
import train
from support import checkpoint, origin
from support.common import ASSETS, UserError

ROOT = Path(__file__).resolve().parents[1]
FEW = ["--pairs", "40", "--documents", "2", "--steps", "1", "--samples", "0"]


def git(folder, *words):
    """Run git in a folder, as someone."""
    someone = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *someone, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# -------------------------------------------------------------------------------------- the commit
@pytest.fixture
def repository(tmp_path):
    """A repository with a train.py in it."""
    if not shutil.which("git"):
        pytest.skip("there is no git")
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.py").write_text("1\n", encoding="utf-8")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    return folder


def test_the_commit(repository, tmp_path, monkeypatch):
    """Catches changed code that passes for a commit's, and notes that count as a change.

    Also catches the commit of somebody's repository around a copy, and an error where there is no
    git."""
    commit = git(repository, "rev-parse", "--short", "HEAD")

    (repository / "notes.txt").write_text("not code", encoding="utf-8")
    assert origin.commit_of(repository) == commit

    (repository / "train.py").write_text("2\n", encoding="utf-8")
    assert origin.commit_of(repository) == f"{commit} (changed)"

    # A copy without its history, in a repository of something else.
    copy = repository / "copy"
    copy.mkdir()
    (copy / "train.py").write_text("1\n", encoding="utf-8")
    assert origin.commit_of(copy) == ""

    assert origin.commit_of(tmp_path) == ""             # outside of any repository

    monkeypatch.setenv("PATH", str(copy))               # no git
    assert origin.commit_of(repository) == ""


def test_it_is_the_commit_of_this_code(monkeypatch):
    """Catches the commit of the folder in which the repository lies."""
    monkeypatch.setattr(origin, "commit_of", str)       # the "commit" is the folder's name

    found = origin.begin("python train.py", torch.device("cpu"))

    assert found.commit == str(ROOT)
    assert found.device.startswith("1 x cpu")
    assert found.seconds == 0


# ----------------------------------------------------------------------------------------- the run
def test_a_run_writes_it_and_evaluate_prints_it(tmp_path, capsys, monkeypatch):
    """Catches a command that lost an option or its quotes, and seconds that are not the run's.

    Also catches a file that forgets on the way."""
    monkeypatch.setattr(origin, "commit_of", lambda folder: "abc1234 (changed)")
    monkeypatch.setattr(evaluate, "load_data", lambda *_: None)
    monkeypatch.setattr(evaluate, "report", lambda *args, **options: ({}, ["  measured"], []))
    out = tmp_path / "my run"                           # the space needs quotes

    # 1. A run writes it.
    began = time.time()
    train.main([*FEW, "--out", str(out)])
    found = checkpoint.load_trained(out / "model.pt").origin
    assert found.command == f"python train.py {' '.join(FEW)} --out '{out}'"
    assert found.commit == "abc1234 (changed)"
    assert found.torch == torch.__version__
    assert found.device.startswith("1 x cpu")
    assert 0 < found.seconds <= time.time() - began
    assert began <= found.began

    # 2. Saved again it is the same: its seconds do not grow any more.
    trained = checkpoint.load_trained(out / "model.pt")
    checkpoint.save_trained(tmp_path / "again.pt", trained)
    assert checkpoint.load_trained(tmp_path / "again.pt").origin == found
    parts = checkpoint.load(out / "parts.pt", "parts")
    assert parts["origin"]["command"] == found.command

    # 3. evaluate.py prints it.
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(out / "model.pt"), "--n", "6"])
    printed = capsys.readouterr().out
    assert (f"trained by: {found.command}\n"
            f"  commit abc1234 (changed), torch {torch.__version__}, 1 x cpu") in printed


def test_the_command_is_what_was_typed(monkeypatch):
    """Catches a first option that is lost, of the real command line."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "my run"])
    assert origin.command_line("train.py", None) == "python train.py --out 'my run'"

    words = ["--steps", "3"]                            # what a notebook passes to main
    assert origin.command_line("train.py", words) == "python train.py --steps 3"


# ----------------------------------------------------------------------------------- the processor
@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists(),
    reason="only Linux names its processor there",
)
def test_the_processor_is_named():
    """Catches a piece of /proc/cpuinfo that is not the model's name.

    "GenuineIntel", "25", or a line with its key stand there, too."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = set()
    for line in lines:
        if line.startswith("model name"):
            names.add(line.split(":", 1)[1].strip())

    found = origin.name_of(torch.device("cpu")).removeprefix("cpu ")
    assert not names or found in names                  # some processors have no name there


@pytest.mark.parametrize("processor, name", [("arm", "cpu arm"), ("", "cpu a machine")])
def test_a_processor_of_another_system(monkeypatch, processor, name):
    """Catches an error where there is no /proc/cpuinfo, as on macOS and Windows.

    Also catches a name that is left out."""
    def no_such_file(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", no_such_file)
    monkeypatch.setattr(origin.platform, "processor", lambda: processor)
    monkeypatch.setattr(origin.platform, "machine", lambda: "a machine")
    assert origin.name_of(torch.device("cpu")) == name


# -------------------------------------------------------------------------- older and damaged files
def test_older_files_say_nothing(capsys):
    """Catches a file of yesterday that is refused."""
    found = checkpoint.load_trained(ASSETS / "scenes.pt").origin
    assert found == origin.Origin()
    assert found == found.until_now()
    assert found.lines() == [
        "this file does not say how it was trained; of those in assets/ docs/RESULTS.md does",
    ]


def test_a_command_cannot_speak_to_the_terminal():
    """Catches a file whose command clears the screen, or pretends to be three lines."""
    command = "python train.py --out \x1b[2J\nall is well"

    lines = origin.Origin(command=command, began=1.0).lines()

    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert "\\x1b" in lines[0]


@pytest.mark.parametrize("damaged", [
    {"command": 3},
    {"seconds": "long"},
    {"began": None},
    {"new": ""},
    [],
    "x",
], ids=str)
def test_a_damaged_origin_is_a_sentence(tmp_path, damaged):
    """Catches a traceback, hours later, when it is printed."""
    content = checkpoint.load(ASSETS / "scenes.pt", "model") | {"origin": damaged}
    checkpoint.save(tmp_path / "model.pt", content)
    with pytest.raises(UserError, match="another version"):
        checkpoint.load_trained(tmp_path / "model.pt")
