"""
test_readme.py: every command that the README shows is run          (README.md, docs/SCALE.md)

THE IDEA    Commands run as they are written, one after another, in a copy of the working directory,
            on the checkpoints that are shipped. Trainings and drawings get fewer steps at the end
            of the line. What cannot be had here is listed with the reason. A command in neither
            list fails: whoever writes one into the README says here how it is tested.
HOW         Python starts once and forks for each command. To import torch for each of them would
            take minutes.
RUN IT      pytest -n 0 tests/test_readme.py                                          minutes
            pytest -n 0 tests/test_readme.py -k "place or found"                      no command
            runs
"""
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 400                             # seconds for one command, on a machine that may be busy

FEW = "--steps 1 --samples 2 --sample-steps 1 --pairs 40 --documents 2"
# {command: (what is appended, files that it must leave)}, in the order in which they run: some need
# what others left.
RUN = {
    'python sample.py "a red circle left of a blue square" --film film.gif':
        ("--steps 10", ["sample.png", "film.gif"]),
    'python sample.py "a red circle" "three squares" --steps 25 --sampler dpm++':
        ("--steps 2", ["sample_2.png"]),
    "python sample.py --image sample.png":
        ("", []),
    'python sample.py --image sample.png --edit "turn the circle into a cross" -o edited.png':
        ("--steps 2", ["edited.png"]),
    'python sample.py --open "" "" --temperature 1 --pictures 3 --trace':
        ("--steps 2", []),
    'python sample.py --open "[sample.png] [edited.png] what changed ?" '
    "--checkpoint assets/scenes_edit.pt":
        ("--steps 2", []),
    "python train.py":
        (FEW, ["out/scenes/model.pt", "out/scenes/samples.png", "out/scenes/report.json"]),
    "python train.py --preset flow":
        (FEW + " --samples 0", ["out/flow/model.pt"]),
    "python diffusion.py":
        ("", []),
    "python exercises/grade.py student.py":
        ("--no-reward", []),
    "python train.py --data mnist":
        (FEW + " --vae-steps 1 --samples 0", ["out/mnist/model.pt", "out/mnist/vae.pt"]),
    "python train.py --preset mnist-minute":
        (FEW + " --vae out/mnist/vae.pt --samples 0", ["out/mnist-minute/model.pt"]),
    "python train.py --preset edit":
        (FEW, ["out/edit/model.pt", "out/edit/report.json"]),
    "python train.py --no-noise-skip":
        (FEW + " --samples 0 --out out/plain", ["out/plain/model.pt"]),
    "python train.py --preset flagship --dry-run --gpus 512":
        ("", []),
    "python -m autoencoder.train":
        ("--steps 1", ["out/vae/vae.pt", "out/vae/reconstructions.png"]),
    "--data folder --data-dir my_pictures":
        (FEW + " --vae-steps 1", ["out/folder/model.pt"]),
    "python -m scale.pack --text a.jsonl --pairs pictures/ --tokenizer llama.model --vae vae.pt "
    "--out packed":
        ("--image-size 64 --out packed_llama", ["packed_llama/index.json"]),
    # docs/SCALE.md, "on a laptop"
    "python -m scale.pack --text scenes --pairs scenes --vae assets/scenes_vae.pt "
    "--seq-len 128 --image-size 32 --out packed":
        ("--scenes 90 --shard-rows 8", ["packed/index.json"]),
    "python train.py --data shards --data-dir packed --seq-len 128 --steps 50 --samples 0":
        ("--steps 1 --documents 2", ["out/shards/model.pt"]),
    "python -m scale.pack --text scenes --pairs scenes --vae assets/scenes_vq.pt "
    "--seq-len 160 --image-size 32 --out packed_codes":
        ("--scenes 90 --shard-rows 8", ["packed_codes/index.json"]),
    "python train.py --data shards --data-dir packed_codes --model chameleon "
    "--seq-len 160 --steps 50 --samples 0 --out out/codes":
        ("--steps 1 --documents 2", ["out/codes/model.pt"]),
}
# {command: why it does not run here}
ELSEWHERE = {
    "python -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt":
        ".ci/run installs so, for this very test",
    "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu":
        "a download of torch, where the one above has it",
    "jupyter lab":
        "a browser; tests/test_notebooks.py runs every notebook",
    "torchrun --standalone --nproc-per-node 8 train.py --preset 0.76b --data-dir packed":
        "eight GPUs",
    "torchrun --standalone --nproc-per-node 2 train.py --steps 50 --samples 0 --out out/two":
        "tests/test_distributed.py starts torchrun so, and compares the losses",
    "python -m notebooks.page":
        "a server that runs until Ctrl-C; tests/test_page.py clicks through it in a browser",
    "python -m metrics.doctor model.pt":
        "tests/test_doctor.py runs it, on healthy models and on sick ones",
    "python -m pytest":
        "it is what runs this",
}
LAPTOP = "## The same path on a laptop"                 # of docs/SCALE.md
PROGRAMS = ("python", "pip", "torchrun", "jupyter")


# ---------------------------------------------------------------------------- what is written there
def commands_of(text):
    """The commands of a page of markdown: the lines of its bash blocks, and what stands in
    backticks and starts like one. Options alone in backticks (three or more words, the first of
    which starts with --) are options of `python train.py`."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()

    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for snippet in re.findall(r"`([^`]+)`", rest):
        words = snippet.split()
        a_program = words[0] in PROGRAMS and len(words) > 1
        options = words[0].startswith("--") and len(words) > 2
        if a_program or options:
            lines.append(snippet)

    commands = [re.sub(r"\s+", " ", without_comment(line)).strip() for line in lines]
    return list(dict.fromkeys(command for command in commands if command))


def without_comment(line):
    """A line of a shell without the comment at its end. A # in quotes is none."""
    quoted = False
    for k, letter in enumerate(line):
        if letter == '"':
            quoted = not quoted
        if letter == "#" and not quoted and (k == 0 or line[k - 1].isspace()):
            return line[:k]
    return line


PAGE = """
see `python a.py x` and `a.py` and `--b`
or `--a 1 --b`.
```bash
python "b # c.py" \\
    --d   # e
# no

pip f
```
```
python no
```
"""


def test_commands_are_found():
    """Catches a test of nothing: blocks, continued lines, comments, backticks."""
    assert commands_of(PAGE) == ['python "b # c.py" --d', "pip f", "python a.py x", "--a 1 --b"]


def written():
    """The commands of README.md and of the laptop's part of docs/SCALE.md."""
    readme = (ROOT / "README.md").read_text()
    _, after = (ROOT / "docs/SCALE.md").read_text().split(LAPTOP)
    laptop, *_ = after.split("\n## ")                   # up to the next heading
    return commands_of(readme) + commands_of(laptop)


def test_every_command_has_its_place():
    """Catches a command that was added to the README, or changed, and is not run; and a test of a
    command that is gone."""
    pages = "README.md or docs/SCALE.md"
    commands = set(written())
    known = RUN.keys() | ELSEWHERE.keys()
    assert len(commands) > 20
    assert not commands - known, f"in {pages}, but neither in RUN nor in ELSEWHERE"
    assert not known - commands, f"in RUN or ELSEWHERE, but no longer in {pages}"


# ------------------------------------------------------------------------------------- running them
@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """{command: (exit status, what it printed, seconds, folder)} of all of RUN, run in a copy of
    the working directory."""
    copy = tmp_path_factory.mktemp("readme") / "copy"
    kept_out = shutil.ignore_patterns(
        ".git", "out", "data", "__pycache__", ".*_cache", "notebooks", "*.ipynb", "packed*",
    )
    shutil.copytree(ROOT, copy, ignore=kept_out)
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(Path(__file__).resolve()), str(copy)]           # `run_all`
    done = subprocess.run(line, cwd=copy, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((copy / "results.json").read_text())
    return {command: (*result, copy) for command, result in found.items()}


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs_as_it_is_written(command, results):
    """Catches a README that promises what does not run: a renamed option, a checkpoint that is not
    there, a traceback."""
    if "llama.model" in command and not importlib.util.find_spec("sentencepiece"):
        pytest.skip("pip install sentencepiece")
    status, said, _, copy = results[command]
    assert "Traceback" not in said, said
    if "grade.py" in command:                           # says how many are not written yet
        assert 0 < status <= 100, said
        assert "patchify" in said, said
    else:
        assert status == 0, said
    _, files = RUN[command]
    for name in files:
        assert (copy / name).stat().st_size > 0, said


# --------------------------------------------- in a process of its own: python tests/test_readme.py
def run_all(copy):
    """Run every command of RUN in the folder `copy`; write results.json there."""
    import experiments
    import train  # noqa: F401  imported once, for all that are forked
    from autoencoder import train as vae_training  # noqa: F401
    from metrics import coco, likelihood  # noqa: F401
    from scale import pack  # noqa: F401

    prepare(copy)
    # The rows of a table take no options from the command line: fewer steps here.
    experiments.BASES["flow"] = f"{FEW} --gap-every 1"
    results = {}
    for command, (more, _) in RUN.items():
        began = time.time()
        status, said = run_line(f"{command} {more}", copy)
        results[command] = (status, said[-3000:], round(time.time() - began, 1))
    (copy / "results.json").write_text(json.dumps(results, indent=1))


def prepare(copy):
    """What the README expects its readers to have: pictures of their own, a text, a tokenizer; and
    MNIST, without the download."""
    import test_edits  # noqa: F401
    import test_mnist
    import test_picture_folder
    from scale import streams

    for name in ("my_pictures", "pictures"):
        test_picture_folder.write_folder(copy / name, 12)
    test_mnist.write_mnist(copy / "data/mnist")
    (copy / "a.jsonl").write_text('{"text": "a red circle"}\n' * 20)
    shutil.copy(copy / "assets/scenes_vae.pt", copy / "vae.pt")
    student = "import torch\n\ndef patchify(x, p):\n    raise NotImplementedError\n"
    (copy / "student.py").write_text(student)
    try:
        import sentencepiece
    except ImportError:
        return
    texts = []
    for _, read in streams.scenes_of("text", "six", 100, 32):
        text, _ = read()
        texts.append(text)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(copy / "llama"),
        vocab_size=80,
        hard_vocab_limit=False,
        minloglevel=2,
    )


def run_line(line, copy):
    """(exit status, what it printed) of a command line of Python, in a fork that starts as the
    command would."""
    words = shlex.split(line)
    if words[0].startswith("--"):                       # options alone
        words = ["python", "train.py", *words]
    with open(copy / "said.txt", "w+") as said:
        status = fork(words[1:], said)
        said.seek(0)
        return status, said.read()


def fork(words, said):
    """The exit status of `python words...` in a fork of this process. said: an open file for what
    it prints."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()                 # a group of its own: what it starts can be ended with it
            # tqdm's own lock is shared between forks. If one is killed while it holds the lock, all
            # the others wait for ever.
            tqdm.set_lock(threading.RLock())
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", closefd=False)
            status = run_program(words)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    began = time.time()
    while time.time() - began < LIMIT:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)

    os.killpg(child, 9)
    os.waitpid(child, 0)
    said.write(f"\nkilled after {LIMIT} s")
    said.flush()
    return -9


def run_program(words):
    """Run a file or, after -m, a module as the main program. Returns its exit status."""
    try:
        if words[0] == "-m":
            sys.argv = [words[1], *words[2:]]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "experiments.py":
            import experiments

            # As it was imported, with the few steps of `run_all`.
            experiments.run_command(experiments.main, words[1:])
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
