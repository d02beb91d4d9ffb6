"""
origin.py: where a model comes from                                   (ours: the paper has no such)

THE IDEA    A model.pt is found again after months. Which code has made it, by which command, on
            what, and how long did that take? The file itself says so, and evaluate.py prints it.
A PICTURE   python train.py --preset scenes
            commit 81e4ae2 (changed), torch 2.13.0, 1 x cpu AMD EPYC, 2026-11-25, 256 s
THE RULE    The commit is asked for before the first step: while a run goes on, files may change,
            but not the code that runs. Outside git there is none. What an older model.pt does not
            say stays empty.
READ NEXT   checkpoint.py        TRY IT  python evaluate.py        TEST  tests/test_origin.py
"""
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from support.common import one_sentence

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Origin:
    """Where a model comes from.

    command   the command line that trained it, after --resume the last one
    commit    of the code, with " (changed)" if files of it were changed since; "" outside git
    torch     the version of PyTorch
    device    how many, and which
    began     when, in seconds since 1970
    seconds   how long the command has taken, until the file was written
    """
    command: str = ""
    commit: str = ""
    torch: str = ""
    device: str = ""
    began: float = 0.0
    seconds: float = 0.0

    def until_now(self):
        """The same, with the seconds that have passed, if it is known when it began."""
        if not self.began:
            return self
        return replace(self, seconds=time.time() - self.began)

    def lines(self):
        """Two lines of text, or one where nothing is known."""
        if not self.command:
            return ["this file does not say how it was trained; of those in assets/ "
                    "docs/RESULTS.md does"]
        day = time.strftime("%Y-%m-%d", time.gmtime(self.began))
        commit = f"commit {self.commit}" if self.commit else "no commit is known"
        lines = [f"trained by: {self.command}",
                 f"  {commit}, torch {self.torch}, {self.device}, {day}, {self.seconds:.0f} s"]
        return [one_sentence(line) for line in lines]   # a file may hold codes that terminals obey


def command_line(program, argv):
    """A command as one would type it. program: e.g. "train.py"; argv: its options, or None for
    those that Python was started with."""
    options = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", program, *options])


def begin(command, device, n=1):
    """The Origin of a model whose training begins now. device: torch.device; n: how many."""
    return Origin(
        command=command,
        commit=commit_of(ROOT),
        torch=str(torch.__version__),                   # its own class would be no plain data
        device=f"{n} x {name_of(device)}",
        began=time.time(),
    )


def commit_of(folder):
    """The commit of the code in a folder, short, with " (changed)" if a file that git knows has
    changed since. "" if the folder is not under git, or there is no git."""
    def git(*words):
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True,
                              timeout=20, check=True)
        return done.stdout.strip()

    try:
        # TRAP: a copy without .git inside somebody's repository would get that one's commit. So:
        # does git know this very file?
        git("ls-files", "--error-unmatch", "train.py")
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit} (changed)" if changed else commit


def name_of(device):
    """What a torch.device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        cpu = text.split("model name")[1].split("\n")[0].strip("\t :")
    except (OSError, IndexError):                       # another system than Linux
        pass
    return f"{device.type} {cpu}"
