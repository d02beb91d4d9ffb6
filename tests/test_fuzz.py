"""
test_fuzz.py: a small part of tests/fuzz.py                                                              (every reader, every option)

    python tests/fuzz.py --n 6000      is the whole; docs/RESULTS.md has its table
"""
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

FUZZ = Path(__file__).resolve().parent / "fuzz.py"


def test_bad_inputs_get_a_sentence(tmp_path):
    """Catches a traceback, a library's sentence, a hang, a gigabyte, or a changed file, for 150 bad and odd inputs of all kinds."""
    done = subprocess.run([sys.executable, str(FUZZ), "--n", "150", "--seed", "100000", "--jobs", "1", "--no-commands", "--json", "all.json"],
                          cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    outcomes = json.loads((tmp_path / "all.json").read_text())
    verdicts = Counter(outcome["verdict"] for outcome in outcomes)
    kinds = Counter(outcome["kind"] for outcome in outcomes)
    assert verdicts.keys() == {"accepted", "refused"} and min(verdicts.values()) > 25       # neither always the same
    assert len(kinds) == 11 and min(kinds.values()) >= 5


def test_a_bug_is_seen(tmp_path):
    """Catches a fuzzer that sees nothing: a reader that crashes, hangs, fills the memory, changes its file, or takes what is broken."""
    lines = [
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import fuzz",
        "def changes(given): (given / 'a').write_text('other')",
        "def fills(given): bytearray(2 ** 30 + 2 ** 28)[::4096] = b'x' * (2 ** 18 + 2 ** 16)",
        "def case(rng, given, shelf):",
        "    (given / 'a').write_text('a')",
        "    number = int(rng.bit_generator.seed_seq.entropy[0])",
        "    ways = [lambda: [][0], lambda: __import__('time').sleep(99), lambda: fills(given), lambda: changes(given), lambda: int('x'),",
        "            lambda: None, lambda: None, lambda: fuzz.open_picture('no.png', 8)]",
        "    return fuzz.Case(ways[number], fuzz.NEVER if number == 5 else fuzz.EITHER)",
        "fuzz.KINDS.clear(); fuzz.KINDS['planted'] = case; fuzz.WAIT_SECONDS = 1; fuzz.fill_shelf = lambda place: place",
        "sys.exit(fuzz.main(sys.argv[1:]))",
    ]
    (tmp_path / "planted.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "planted.py", str(FUZZ.parent), "--n", "8", "--jobs", "1", "--no-commands", "--json", "all.json"],
                          cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 6, done.stdout + done.stderr
    found = {outcome["number"]: outcome["verdict"] for outcome in json.loads((tmp_path / "all.json").read_text())}
    assert found == {0: "traceback", 1: "hang", 2: "memory", 3: "changed", 4: "library", 5: "wrong", 6: "accepted", 7: "refused"}
