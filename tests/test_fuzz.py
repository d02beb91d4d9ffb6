"""
test_fuzz.py: a small part of tests/fuzz.py                         (every reader, every option)

THE IDEA    Whatever file or option a user gives, the answer is a result or one clear sentence. Here
            are 48 random cases. The whole is `python tests/fuzz.py --n 6000`; docs/RESULTS.md has
            its table. A second test plants bugs, to see that the fuzzer sees them.
RUN IT      pytest -n 0 tests/test_fuzz.py
"""
import json
import time
from collections import Counter

import fuzz
from support.common import open_picture


def outcomes_of(tmp_path, *argv):
    """(how many cases went wrong, [dict of each]) of fuzz.py with these options."""
    path = tmp_path / "all.json"
    wrong = fuzz.main([*argv, "--jobs", "1", "--no-commands", "--json", str(path)])
    return wrong, json.loads(path.read_text())


def test_bad_inputs_get_a_sentence(tmp_path, capfd):
    """Catches a traceback, a library's own sentence, a hang, a gigabyte, or a changed file, for 48
    bad and odd inputs of all kinds."""
    wrong, outcomes = outcomes_of(tmp_path, "--n", "48", "--seed", "100000")
    assert wrong == 0, capfd.readouterr().out
    verdicts = Counter(outcome["verdict"] for outcome in outcomes)
    kinds = Counter(outcome["kind"] for outcome in outcomes)
    assert verdicts.keys() == {"accepted", "refused"}
    assert min(verdicts.values()) > 8                   # it does not always say the same
    assert len(kinds) == 12
    assert min(kinds.values()) >= 3


def fill_memory():
    """Take 1.25 GiB, and touch each page of it: memory that is not touched is not taken."""
    bytearray(2 ** 30 + 2 ** 28)[::4096] = b"x" * (2 ** 18 + 2 ** 16)


def test_a_bug_is_seen(tmp_path, monkeypatch):
    """Catches a fuzzer that sees nothing: a reader that crashes, hangs, fills the memory, changes
    its file or one that all share, or takes what is broken."""
    def case(rng, given, shelf):
        """The case of one number. given: a folder of its own; shelf: one that all share."""
        (given / "a").write_text("a")
        ways = [
            (lambda: [][0], fuzz.EITHER),
            (lambda: time.sleep(99), fuzz.EITHER),
            (fill_memory, fuzz.EITHER),
            (lambda: (given / "a").write_text("other"), fuzz.EITHER),
            (lambda: int("x"), fuzz.EITHER),            # ValueError: a sentence, but not ours
            (lambda: None, fuzz.NEVER),                 # accepts what must be refused
            (lambda: None, fuzz.EITHER),
            (lambda: open_picture("no.png", 8), fuzz.EITHER),
            (lambda: (shelf / "b").write_text("other"), fuzz.EITHER),
        ]
        number = int(rng.bit_generator.seed_seq.entropy[0])
        return fuzz.Case(*ways[number])

    monkeypatch.setattr(fuzz, "KINDS", {"planted": case})
    monkeypatch.setattr(fuzz, "WAIT_SECONDS", 1)
    monkeypatch.setattr(fuzz, "fill_shelf", lambda place: place)
    wrong, outcomes = outcomes_of(tmp_path, "--n", "9")

    found = {outcome["number"]: outcome["verdict"] for outcome in outcomes}
    assert found == {
        0: "traceback",
        1: "hang",
        2: "memory",
        3: "changed",
        4: "library",
        5: "wrong",
        6: "accepted",                                  # these two are as they should be
        7: "refused",
        8: "changed",
    }
    assert wrong == 7
