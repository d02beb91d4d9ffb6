"""
test_run_command.py: how every program of ours ends                     (support/common.py)

THE IDEA    `run_command` stands around the main() of every program. A mistake, a signal, or a
            reader that has gone away ends in one line and an exit status that a shell knows. Before
            main() it looks at the words of the command line, and has the C library keep memory.
TRY IT      python -m pytest -n 0 tests/test_run_command.py
"""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from config import parse_arguments
from small_runs import ends
from support import common
from support.common import run_command

ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------- one line, no more
def test_a_sentence_is_one_line():
    """Catches a name that clears the terminal, and a caption of 100,000 letters in a sentence."""
    def sentence(text):
        return common.one_sentence(ValueError(text))

    assert sentence("a\x1b[2J\nb") == "a\\x1b[2J\\nb"
    assert sentence("x" * 600) == "x" * 600
    assert sentence("x" * 300 + "y" * 600) == "x" * 300 + " ... " + "y" * 250


def test_the_words_of_the_command_line_are_checked(monkeypatch, capsys):
    """Catches words with which argparse does not cope.

    They come from the real command line, from its first word on."""
    for word in ("--out=--", "-o=--", "-o--", "--o\x1b", "9" * 301):
        monkeypatch.setattr(sys, "argv", ["train.py", word])
        with pytest.raises(SystemExit):
            run_command(lambda _: pytest.fail("began"))
    assert capsys.readouterr().err.count("error: ") == 5

    # These are odd, too, but they are right.
    words = ["--a=b", "c=--", "- a circle --", "---", "-1", "--", "9" * 300]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    run_command(lambda _: None)


@pytest.mark.parametrize("word", ["--checkpoint=--", "-1\n<boi>", "9" * 5000])
def test_words_that_argparse_repeats(capsys, word):
    """Catches an option that becomes an empty list.

    Also catches a sentence of several lines, or of 5,000 digits."""
    sentence = ends(capsys, parse_arguments, ["--seed", word], 2)
    assert sentence.startswith("error: ")
    assert len(sentence) < 100


# ------------------------------------------------------------------------------- how a program ends
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_a_sentence_in_every_program(capsys, number):
    """Catches a traceback of KeyboardInterrupt, another exit status, and a handler that stays."""
    before = signal.getsignal(signal.SIGTERM)

    def main(argv):
        os.kill(os.getpid(), number)

    assert ends(capsys, main, [], 128 + number).startswith("stopped: ")
    assert signal.getsignal(signal.SIGTERM) is before


PROGRAM = "from support.common import run_command; run_command(lambda _: print('x' * {}))"
DEMONSTRATION = ("from support.common import end_with_the_reader; end_with_the_reader(); "
                 "print('x' * {})")


def test_nobody_reads_on():
    """Catches a traceback of `python config.py | head -1`.

    Whoever reads has gone away, and that is no mistake."""
    # 1 MB is more than a pipe holds; a few letters are only written as the program ends.
    for code, letters, status in [
        (PROGRAM, 10 ** 6, 141),
        (PROGRAM, 10, 141),
        (DEMONSTRATION, 10, -signal.SIGPIPE),
    ]:
        command = [sys.executable, "-c", code.format(letters)]
        program = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        program.stdout.close()
        assert program.stderr.read() == b""
        assert program.wait() == status


# --------------------------------------------------------------------------------- what is freed
def number_printed_by(code, *words, **environment):
    """The number that a program of Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


REPEAT = """
import resource
import sys
import torch
from support.common import keep_memory

if sys.argv[1] == "kept":
    keep_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

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
    """Catches a `keep_memory` that does nothing.

    Eight arrays of 2 MB, twenty times: their 4,096 pages are fetched anew each time, or never
    again."""
    # From 64 KB on, arrays come from the system: without this, glibc decides by what it has freed
    # before.
    from_the_system = dict(MALLOC_MMAP_THRESHOLD_="65536")

    kept = number_printed_by(REPEAT, "kept", **from_the_system)
    as_it_is = number_printed_by(REPEAT, "as it is", **from_the_system)

    assert kept < 4096
    assert as_it_is > 10 * 4096


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


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="a Linux with large pages",
)
def test_the_heap_may_have_large_pages():
    """Catches advice that is given for another part of memory, or for none."""
    advised = number_printed_by(HEAP)
    assert 2 ** 27 < advised <= 2 ** 28 + 2 ** 24       # 256 MiB are kept
