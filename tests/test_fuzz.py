"""
test_fuzz.py: a small part of tests/fuzz.py                                                              (every reader, every option)

    python tests/fuzz.py --n 6000      is the whole; docs/RESULTS.md has its table
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
    """Catches a traceback, a library's sentence, a hang, a gigabyte, or a changed file, for 48 bad and odd inputs of all kinds."""
    wrong, outcomes = outcomes_of(tmp_path, "--n", "48", "--seed", "100000")
    assert wrong == 0, capfd.readouterr().out
    verdicts = Counter(outcome["verdict"] for outcome in outcomes)
    kinds = Counter(outcome["kind"] for outcome in outcomes)
    assert verdicts.keys() == {"accepted", "refused"} and min(verdicts.values()) > 8        # neither always the same
    assert len(kinds) == 12 and min(kinds.values()) >= 3


def test_a_bug_is_seen(tmp_path, monkeypatch):
    """Catches a fuzzer that sees nothing: a reader that crashes, hangs, fills the memory, changes its file or one that all share, or takes what is broken."""
    def fills():
        bytearray(2 ** 30 + 2 ** 28)[::4096] = b"x" * (2 ** 18 + 2 ** 16)

    def case(rng, given, shelf):
        (given / "a").write_text("a")
        number = int(rng.bit_generator.seed_seq.entropy[0])
        ways = [lambda: [][0], lambda: time.sleep(99), fills, lambda: (given / "a").write_text("other"), lambda: int("x"),
                lambda: None, lambda: None, lambda: open_picture("no.png", 8), lambda: (shelf / "b").write_text("other")]
        return fuzz.Case(ways[number], fuzz.NEVER if number == 5 else fuzz.EITHER)

    monkeypatch.setattr(fuzz, "KINDS", {"planted": case})
    monkeypatch.setattr(fuzz, "WAIT_SECONDS", 1)
    monkeypatch.setattr(fuzz, "fill_shelf", lambda place: place)
    wrong, outcomes = outcomes_of(tmp_path, "--n", "9")
    assert wrong == 7
    found = {outcome["number"]: outcome["verdict"] for outcome in outcomes}
    assert found == {0: "traceback", 1: "hang", 2: "memory", 3: "changed", 4: "library", 5: "wrong", 6: "accepted", 7: "refused", 8: "changed"}
