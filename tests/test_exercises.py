"""
test_exercises.py: the checks of the exercises are checked                          (exercises/)

THE IDEA    A check that nobody has tried passes wrong answers. So right answers must pass, and each
            usual wrong one must get the advice that fits it. Whatever an answer does (raise, print,
            run for ever, end the process), a student gets one sentence and never a traceback.
COMPARED    the checks' verdicts with the answers of exercise_answers.py, of which each has the
            words that its advice must contain.
RUN IT      pytest -n 0 tests/test_exercises.py
"""
import ast
import functools
import inspect
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import data
import diffusion
import patchify
from exercise_answers import RIGHT, WRONG
from exercises import checks, grade, rewards, stubs, trial
from exercises.checks import EXERCISES, verdict


# ------------------------------------------------------------------------ right, wrong, and advice
def cases(table):
    """[(exercise, what)] of WRONG or RIGHT, for parametrize."""
    pairs = []
    for name, answers in table.items():
        pairs += [(name, what) for what in answers]
    return pairs


@functools.cache
def verdict_on_wrong(name, what):
    """The Verdict on one of WRONG; two tests ask for it."""
    answer, _ = WRONG[name][what]
    return verdict(name, answer)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_module_is_right(name):
    """Catches a check that refuses our own function."""
    said = verdict(name, EXERCISES[name].reference)
    assert (said.status, said.advice) == ("right", "Right.")


@pytest.mark.parametrize(("name", "what"), cases(RIGHT))
def test_another_right_answer_is_right(name, what):
    """Catches a check that wants our lines, and not what they compute."""
    said = verdict(name, RIGHT[name][what])
    assert (said.status, said.advice) == ("right", "Right.")


@pytest.mark.parametrize(("name", "what"), cases(WRONG))
def test_wrong_answers_get_the_advice_that_fits(name, what):
    """Catches a wrong answer that passes, and advice that belongs to another mistake."""
    _, words = WRONG[name][what]
    said = verdict_on_wrong(name, what)
    assert said.status == "wrong"
    assert all(word in said.advice for word in words), said.advice
    assert "\n" not in said.advice
    assert len(said.advice) < 600


@pytest.mark.parametrize("name", EXERCISES)
def test_there_are_enough_wrong_answers(name):
    """At least eight each, and "Not yet" for at most one in eight. Catches an exercise whose checks
    were hardly tried, and advice that says nothing."""
    said = [verdict_on_wrong(name, what).advice for what in WRONG[name]]
    assert len(said) >= 8
    assert len(RIGHT[name]) >= 2
    assert sum("Not yet" in advice for advice in said) <= len(said) / 8
    assert len(set(said)) >= 0.6 * len(said)            # advice of its own, not one for all


@pytest.mark.parametrize("name", EXERCISES)
def test_a_check_takes_40_ms(name):
    """Catches a check that makes a student wait."""
    verdict(name, EXERCISES[name].reference)            # warm
    times = []
    for _ in range(20):                                 # the host has other guests: take the best
        before = time.process_time()
        verdict(name, EXERCISES[name].reference)
        times.append(time.process_time() - before)
    assert min(times) < 0.04


def test_eight_exercises():
    """Catches an exercise that was lost, and one that checks fewer than four properties."""
    numbers = {exercise.number for exercise in checks.TABLE}
    assert sorted(numbers) == list(range(1, 9))
    assert set(EXERCISES) == {
        "intervals",
        "patchify",
        "cosine_alpha_bar",
        "ancestral_step",
        "guide",
        "losses",
        "quantise",
        "lay_out",                                      # the eighth has two functions
        "write",
    }
    for exercise in checks.TABLE:
        names = exercise.property_names()
        assert len(names) >= 4
        assert len(set(names)) == len(names)
        assert all(names)


def test_the_numbers_are_those_of_a_jump_that_teaches():
    """Catches advice on a jump of one step, in which both answers are nearly the same."""
    answer, _ = WRONG["ancestral_step"]["beta of the 1000-step chain"]
    advice = verdict("ancestral_step", answer).advice
    assert "From t = 500 to u = 400, DDPM" in advice

    answer, _ = WRONG["ancestral_step"]["beta = 1 - (at/au)^2"]
    advice = verdict("ancestral_step", answer).advice
    assert "From t = 500 to u = 400, flow" in advice


# ------------------------------------------------------------------------------ nothing gets out
class Rude:
    """Something that no check expects."""

    def __eq__(self, other):
        raise RuntimeError("no")

    def __len__(self):
        raise RuntimeError("no")

    def __getattr__(self, name):
        raise RuntimeError("no")

    __hash__ = None


class OwnException(BaseException):
    """No Exception, and no word can be had from it."""

    def __str__(self):
        raise RuntimeError("no")


def raises(problem):
    """An answer that raises."""
    def answer(*inputs):
        raise problem
    return answer


def forever(*inputs):
    """An answer that calls itself without end."""
    return forever(*inputs)


def gives(value):
    """An answer that returns a value, whatever it is given."""
    return lambda *inputs: value


def noisy(*inputs):
    """An answer that prints and returns None."""
    print("hello")
    print("world")


# {what: an answer}, tried with every exercise.
ZOO = {
    # What is no answer of the right kind.
    "None": gives(None),
    "a number": gives(3),
    "a string": gives("abc"),
    "a list": gives([1, 2]),
    "a dict": gives({}),
    "a pair of None": gives((None, None)),
    "three of None": gives((None,) * 3),
    "a generator": lambda *inputs: (x for x in inputs),
    "a class": dict,
    "an empty sequence": gives(data.Sequence()),
    "lists in a pair": gives(([1], [2])),
    # Tensors, some of them of a right shape.
    "a scalar": gives(torch.tensor(1.0)),
    "an empty tensor": gives(torch.zeros(0)),
    "NaN": gives(torch.full((2, 6, 12), math.nan)),
    "infinite": gives(torch.full((1001,), math.inf)),
    "complex": gives(torch.zeros(3, 3, dtype=torch.complex64)),
    "bools": gives(torch.zeros(3, 20, dtype=torch.bool)),
    "two scalars": gives((torch.tensor(1), torch.tensor(2))),
    "three scalars": gives((torch.tensor(1.0),) * 3),
    "numpy": gives(np.zeros((2, 6, 12))),
    "a meta tensor": gives(torch.zeros(2, 6, 12, device="meta")),
    "sparse": gives(torch.zeros(1001).to_sparse()),
    "a huge tensor": lambda *inputs: torch.zeros(10 ** 14),
    "the inputs": lambda *inputs: inputs,
    "the first input": lambda *inputs: inputs[0],
    # What resists being looked at.
    "something rude": gives(Rude()),
    "two rude things": gives((Rude(), Rude())),
    "three rude things": gives((Rude(), Rude(), Rude())),
    "a sequence of rude things": gives(data.Sequence(tokens=[Rude()])),
    "rude itself": Rude(),
    # What cannot be called so.
    "no function": 5,
    "a module": math,
    "too few parameters": lambda x: x,
    "too many": lambda a, b, c, d, e, f, g, h: a,
    # What does not return.
    "ValueError": raises(ValueError("no")),
    "KeyError": raises(KeyError("x" * 5000)),
    "an exception without a word": raises(RuntimeError()),
    "an exception with newlines": raises(ValueError("a\nb\n" * 100)),
    "exit": raises(SystemExit(0)),
    "StopIteration": raises(StopIteration()),
    "MemoryError": raises(MemoryError()),
    "AssertionError": raises(AssertionError()),
    "an exception of its own": raises(OwnException()),
    "endless recursion": forever,
    "prints": noisy,
}


@pytest.mark.parametrize("name", EXERCISES)
def test_nothing_raises_out_of_a_check(name, capsys):
    """Catches a traceback in a student's notebook, for 45 answers that no check expects."""
    for what, answer in ZOO.items():
        said = verdict(name, answer)
        assert said.status == "wrong", what
        assert said.advice, what
        assert "\n" not in said.advice, what
        assert len(said.advice) < 600, what
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_is_not_written_yet(name):
    """Catches a stub that counts as a wrong answer, or as an exception."""
    scope = {}
    exec(stubs.IMPORTS + stubs.stub(EXERCISES[name]), scope)
    said = verdict(name, scope[name])
    assert said.status == "not written"
    assert "Not written yet" in said.advice


def test_an_exception_comes_with_its_line():
    """Catches advice that does not say where the student's code stopped."""
    def answer(conditional, unconditional, w):
        return conditional + nonsense  # noqa: F821

    said = verdict("guide", answer)
    assert "NameError" in said.advice
    assert "return conditional + nonsense" in said.advice


@pytest.mark.parametrize("problem", [
    SystemExit("no"),
    OwnException(),
    AssertionError(),
    NotImplementedError(),
])
def test_what_is_raised_for_a_wrong_shape_does_not_get_out(problem):
    """An answer should raise for a shape that cannot be cut, but not just anything. Catches a check
    that waits for one kind of exception and lets the others out."""
    def answer(x, p):
        if x.shape[2] % p or x.shape[3] % p:
            raise problem
        return patchify.patchify(x, p)

    assert f"raises {type(problem).__name__}" in verdict("patchify", answer).advice


def test_an_endless_loop_gets_advice(monkeypatch):
    """Catches a check that never comes back."""
    monkeypatch.setattr(trial, "LIMIT", 0.2)

    def answer(conditional, unconditional, w):
        while True:
            pass

    assert "does not end" in verdict("guide", answer).advice


def test_a_right_answer_that_prints_is_right():
    """Catches a print for debugging that makes a right answer wrong, or that gets lost."""
    def answer(conditional, unconditional, w):
        print("w is", w)
        return unconditional + w * (conditional - unconditional)

    said = verdict("guide", answer)
    assert said.status == "right"
    assert "prints" in said.advice
    assert said.printed.startswith("w is 0.0")


def random_state():
    """The state of the three global generators, as lists and numbers."""
    numpy_state = np.random.get_state()[1].tolist()
    return torch.get_rng_state().tolist(), numpy_state, random.getstate()


@pytest.mark.parametrize(("chance", "words"), [
    (lambda: torch.manual_seed(0), "torch.manual_seed"),
    (lambda: torch.rand(1), "random numbers of its own"),
    (lambda: np.random.seed(0), "random numbers"),
    (lambda: np.random.rand(), "random numbers"),
    (lambda: random.seed(0), "random numbers"),
])
def test_chance_is_not_the_answers_business(chance, words):
    """Catches an answer that seeds or uses a global generator, and a check that leaves it moved."""
    def answer(conditional, unconditional, w):
        chance()
        return unconditional + w * (conditional - unconditional)

    torch.manual_seed(5)
    before = random_state()
    assert words in verdict("guide", answer).advice
    assert random_state() == before


def test_tables_that_an_answer_changes_are_noticed():
    """Catches an answer that writes into the schedule: the next exercise would compute with it."""
    def answer(diffusion_, xt, x0, t, u, noise):
        diffusion_.s *= 1.1
        return diffusion.ancestral_step(diffusion_, xt, x0, t, u, noise)

    assert "input `diffusion`" in verdict("ancestral_step", answer).advice


def test_check_prints_the_advice(capsys):
    """Catches a check that says nothing, and a student's own print that is swallowed."""
    def answer(conditional, unconditional, w):
        print("hm")
        return conditional

    checks.check("guide", answer, reward=False)
    printed = capsys.readouterr().out
    assert "hm" in printed
    assert "w changes nothing" in printed

    checks.check("guide", diffusion.guide, reward=False)
    assert capsys.readouterr().out == "Right.\n"


# ------------------------------------------------------------------------------------- the notebook
def test_the_notebook_has_the_stubs_of_today():
    """Catches a notebook that shows the function of last week. `python exercises/stubs.py
    --notebook` writes it anew."""
    assert json.loads(stubs.NOTEBOOK.read_text(encoding="utf-8")) == stubs.notebook()


def test_stubs_have_no_lines_of_the_solution():
    """Catches a stub that gives the answer away, or asks for other parameters than the module."""
    for exercise in checks.TABLE:
        tree = ast.parse(stubs.stub(exercise)).body[0]
        parameters = [argument.arg for argument in tree.args.args]
        assert len(tree.body) == 2                      # a docstring, and `raise`
        assert isinstance(tree.body[1], ast.Raise)
        assert ast.get_docstring(tree) == inspect.getdoc(exercise.reference)
        assert parameters == list(inspect.signature(exercise.reference).parameters)


def test_the_notebook_runs_from_top_to_bottom():
    """Catches a notebook that stops before a student has written a line."""
    notebook = nbformat.reads(json.dumps(stubs.notebook()), as_version=4)
    nbformat.validate(notebook)
    place = {"metadata": {"path": str(stubs.NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=place).execute()

    printed = ""                                        # a line may come in two outputs
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            printed += output["text"]
    line = "Not written yet: put your lines in place of `raise NotImplementedError`.\n"
    assert printed == line * len(EXERCISES)


# --------------------------------------------------------------------------------------- the grader
# A submission without a mistake.
GOOD = """
from attention_mask import intervals
from data import lay_out
from diffusion import ancestral_step, cosine_alpha_bar, guide
from exercises.codes import quantise
from exercises.writing import write
from model import losses
from patchify import patchify
print("I print while I am imported")
"""
# A submission in which nearly every function does its worst.
BAD = """
import os, sys, time
def intervals(image_id, doc_id, bidirectional=True):
    while True: pass
def patchify(x, p):
    os._exit(3)
def cosine_alpha_bar(T=1000, offset=0.008, beta_max=0.999):
    sys.exit(1)
def ancestral_step(diffusion, xt, x0, t, u, noise):
    raise KeyError("x")
def guide(c, u, w):
    print("guide is right, and prints")
    return u + w * (c - u)
def losses(model, batch, diffusion, stable=False):
    while True:
        try: time.sleep(1)
        except: pass
def quantise(e, codebook, beta=0.25):
    import signal
    os.kill(os.getpid(), signal.SIGKILL)
lay_out = 5
"""


@pytest.fixture
def quick(monkeypatch):
    """Endless loops are given up sooner."""
    monkeypatch.setattr(trial, "LIMIT", 0.5)
    monkeypatch.setattr(grade, "LIMIT", 3.0)
    monkeypatch.setattr(grade, "IMPORT_LIMIT", 1.0)


def grade_file(tmp_path, capsys, source, *options):
    """(exit status, what is printed) of a submission."""
    path = tmp_path / "student.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    status = grade.main([str(path), "--no-reward", *options])
    printed = capsys.readouterr()
    assert printed.err == ""
    return status, printed.out


def test_the_modules_own_functions_are_graded_right(tmp_path, capsys):
    """Catches a grader that refuses what the checks accept, or lets a submission print."""
    status, printed = grade_file(tmp_path, capsys, GOOD)
    assert status == 0
    assert "8 of 8 right" in printed
    assert "imported" in printed
    assert "I print" not in printed


def test_bad_functions_do_not_stop_the_others(tmp_path, capsys, quick):
    """Catches a grader that a function can hang, end or fool, and a student who gets no point for
    the function that is right."""
    before = time.monotonic()
    status, printed = grade_file(tmp_path, capsys, BAD)
    assert time.monotonic() - before < 15

    lines = {line.split()[1]: line for line in printed.splitlines()}
    wanted = {
        "intervals": "does not end",
        "patchify": "ended the whole process",
        "cosine_alpha_bar": "exit",
        "ancestral_step": 'KeyError: \'x\' (line 10: raise KeyError("x"))',
        "guide": "Right. (It also prints",
        "losses": "does not end",
        "quantise": "ended the whole process",
        "lay_out": "not a function but an int",
        "write": "Not written yet",
    }
    for name, words in wanted.items():
        assert words in lines[name], lines[name]
    assert status == 7                                  # all but guide
    assert "Traceback" not in printed


@pytest.mark.parametrize(("source", "words"), [
    ("def f(:", "not Python in line 1"),
    ("import nosuchthing", "No module named 'nosuchthing' (line 1"),
    (b"\x00\xff" * 100, "not Python"),
    ("while True: pass", "loop outside"),
    ("exit()", "ends the program"),
    ("x = 1 / 0", "ZeroDivisionError: division by zero (line 1: x = 1 / 0)"),
])
def test_a_file_that_cannot_be_imported_gets_a_sentence(tmp_path, capsys, quick, source, words):
    """Catches a traceback of the grader's for a file of the student's."""
    status, printed = grade_file(tmp_path, capsys, source)
    assert status == 8
    assert words in printed
    assert "cannot be imported" in printed
    assert len(printed.splitlines()) == 2
    assert "Traceback" not in printed


def test_nothing_written_is_eight_exercises(tmp_path, capsys):
    """The exit status counts what is missing. Catches an empty file, or one of stubs, that gets
    points."""
    for source in ("", stubs.page()):
        status, _ = grade_file(tmp_path, capsys, source)
        assert status == 8


def test_the_last_exercise_has_two_functions(tmp_path, capsys):
    """Catches a point for half of it."""
    half = "from data import lay_out"
    status, printed = grade_file(tmp_path, capsys, half)
    assert status == 8
    assert "Right." in printed

    status, _ = grade_file(tmp_path, capsys, half + "\nfrom exercises.writing import write")
    assert status == 7


# Guidance without its scale: wrong.
UNGUIDED = "def guide(c, u, w):\n    return c"


def test_json(tmp_path, capsys):
    """Catches a table that another program cannot read."""
    _, printed = grade_file(tmp_path, capsys, UNGUIDED, "--json")
    rows = json.loads(printed)
    assert [row["name"] for row in rows] == list(EXERCISES)
    row = rows[4]
    assert (row["exercise"], row["status"], row["failed"]) == (5, "wrong", "w is used")


def test_a_folder_gives_one_table(tmp_path, capsys):
    """Catches a class of which one broken file hides the others."""
    (tmp_path / "anna.py").write_text(GOOD)
    (tmp_path / "ben.py").write_text(UNGUIDED)
    (tmp_path / "carla.py").write_text("def f(:")
    assert grade.main([str(tmp_path)]) == 2             # submissions that are not all right

    lines = capsys.readouterr().out.splitlines()
    head, anna, ben, carla = [line.split() for line in lines]
    assert head == ["submission", *EXERCISES, "right"]
    assert anna == ["anna.py", *["right"] * 9, "8", "of", "8"]
    assert ben == ["ben.py", *["-"] * 4, "wrong", *["-"] * 4, "0", "of", "8"]
    assert carla == ["carla.py", *["broken"] * 9, "0", "of", "8"]


def test_a_submission_cannot_hide_our_modules(tmp_path, capsys):
    """Catches a student's data.py that is imported in place of ours, and a helper file beside the
    submission that cannot be imported."""
    (tmp_path / "data.py").write_text("raise RuntimeError('the wrong data.py')")
    (tmp_path / "helper.py").write_text("def between(c, u, w):\n    return u + w * (c - u)")
    source = "from helper import between as guide\nfrom data import lay_out"
    status, printed = grade_file(tmp_path, capsys, source)
    assert status == 7
    assert printed.count("Right.") == 2


@pytest.mark.parametrize("arguments", [
    ["nothing.py"],
    ["."],
    [],
    ["a.py", "b.py"],
    [__file__ + "x"],
])
def test_nothing_to_grade(tmp_path, monkeypatch, capsys, arguments):
    """Catches a status that a script would take for a number of exercises."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        grade.main(arguments)
    assert stopped.value.code == 100
    assert capsys.readouterr().err.startswith("error: ")


def test_from_another_folder_with_a_reward(tmp_path):
    """Catches a grader that must be started where it lies, and a right answer that draws
    nothing."""
    (tmp_path / "student.py").write_text("from diffusion import guide")
    line = [sys.executable, str(Path(grade.__file__)), "student.py"]
    answer = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 7
    assert answer.stderr == ""
    assert "guides the shipped model: 8 of 8 as asked" in answer.stdout
    assert (tmp_path / "out/exercises/student/guide.png").exists()


# ------------------------------------------------------------------------------------------ rewards
@pytest.mark.parametrize("name", EXERCISES)
def test_a_right_answer_draws_what_is_asked(name, tmp_path):
    """Catches a reward that is slow, or that does not use the student's function."""
    answer = RIGHT["write"]["a loop"] if name == "write" else EXERCISES[name].reference
    before = time.process_time()
    sentence, path = rewards.draw(name, answer, tmp_path)
    assert time.process_time() - before < 6
    assert "8 of 8 as asked" in sentence
    assert path.exists()
    assert str(path) in sentence


@pytest.mark.parametrize(("name", "what"), [
    ("guide", "swapped"),
    ("ancestral_step", "beta = 1 - (at/au)^2"),
])
def test_wrong_answers_draw_something_else(name, what, tmp_path):
    """Why the checks are strict: what these would draw. Catches a reward that draws with our
    function."""
    answer, _ = WRONG[name][what]
    sentence, _ = rewards.draw(name, answer, tmp_path)
    before, _ = sentence.split(" of 8")                 # "... 3 of 8 as asked"
    assert int(before[-1]) <= 3


def test_a_reward_that_cannot_be_drawn_is_a_sentence(tmp_path):
    """Catches a traceback in place of a picture."""
    sentence, path = rewards.draw("guide", raises(RuntimeError("no")), tmp_path)
    assert path is None
    assert "cannot draw with it (RuntimeError: no)" in sentence
