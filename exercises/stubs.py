"""
stubs.py: the functions to write, without their lines

THE IDEA    A stub is the module's own function: its signature and its docstring. It is made from
            the module, so the two cannot drift apart. The solution is the module.
TRY IT      python exercises/stubs.py > student.py       a file to fill, for exercises/grade.py
            python exercises/stubs.py --notebook         exercises.ipynb anew: its stubs are empty
TEST        tests/test_exercises.py holds the notebook to this file
"""
import inspect
import json
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # the modules lie one folder up

from exercises.checks import TABLE
from support.common import end_with_the_reader

NOTEBOOK = Path(__file__).with_name("exercises.ipynb")

# What an answer may need.
IMPORTS = """\
import math

import torch
import torch.nn.functional as F
from einops import rearrange

from data import BOI, BOS, DROP, EOI, EOS, PATCH, Sequence
"""

PAGE = '''\
"""
The eight exercises. Put your lines in place of each `raise NotImplementedError`. Then

    python exercises/grade.py student.py

says what is wrong with them. All that is needed is imported here.
"""
'''

NOTEBOOK_HEAD = """\
# Eight exercises

Write functions of this codebase yourself. Each has a stub, with the signature and the docstring of
the module's own function, and a check that says *what* is wrong with your lines. A check takes a
few hundredths of a second. After "Right." your function draws eight pictures with the shipped
model, which takes a few seconds.

Any right answer passes, however it is written. The solution is the module; look there afterwards.
The paper is Transfusion, arXiv 2408.11039. Start wherever you like: nothing builds on another.

| | write | minutes | difficulty (of 5) |
|---|---|---|---|
"""

NOTEBOOK_IMPORTS = """\
import sys

sys.path.insert(0, "..")                                # the modules lie one folder up

"""


def stub(exercise):
    """The source of a function without its lines: signature, docstring, NotImplementedError."""
    signature = inspect.signature(exercise.reference)
    docstring = inspect.getdoc(exercise.reference)
    body = f'"""{docstring}"""\nraise NotImplementedError'
    return f"def {exercise.name}{signature}:\n{textwrap.indent(body, '    ')}\n"


def page():
    """A Python file with all the stubs."""
    parts = [PAGE + IMPORTS]
    for exercise in TABLE:
        text = (f"Exercise {exercise.number}: {exercise.minutes} minutes, difficulty "
                f"{exercise.difficulty} of 5. Transfusion {exercise.paper}. {exercise.task}")
        comment = textwrap.indent(textwrap.fill(text, 96), "# ")
        parts.append(comment + "\n" + stub(exercise))
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------- the notebook
def cells():
    """The notebook's cells, a list of (kind, source): for each exercise a text, a stub, a check."""
    head = NOTEBOOK_HEAD
    for exercise in TABLE:
        head += (f"| {exercise.number} | `{exercise.name}` | {exercise.minutes} | "
                 f"{exercise.difficulty} |\n")
    parts = [("markdown", head),
             ("code", NOTEBOOK_IMPORTS + IMPORTS + "from exercises.checks import check\n")]
    for exercise in TABLE:
        parts.append(("markdown", describe(exercise)))
        parts.append(("code", stub(exercise)))
        parts.append(("code", f'check("{exercise.name}", {exercise.name})\n'))
    return parts


def describe(exercise):
    """What to do, where the paper speaks of it, how long it takes, and what is checked."""
    checked = "\n".join(f"* {name}" for name in exercise.property_names())
    return (f"## {exercise.number} · `{exercise.name}`\n\n"
            f"*{exercise.minutes} minutes, difficulty {exercise.difficulty} of 5. Transfusion "
            f"{exercise.paper}.*\n\n{exercise.task}\n\nChecked, in this order:\n\n{checked}\n")


def notebook():
    """exercises.ipynb as a dict: all stubs empty, nothing run."""
    found = []
    for number, (kind, source) in enumerate(cells()):
        cell = {"cell_type": kind, "id": f"cell-{number:02d}", "metadata": {},
                "source": source.strip().splitlines(keepends=True)}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        found.append(cell)
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    return {"cells": found, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
            "nbformat": 4, "nbformat_minor": 5}


def main(argv):
    """Print a file of stubs, or with --notebook write the notebook."""
    if argv == ["--notebook"]:
        NOTEBOOK.write_text(json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n",
                            encoding="utf-8")
        print(f"wrote {NOTEBOOK}")
    else:
        print(page(), end="")


if __name__ == "__main__":
    end_with_the_reader()
    main(sys.argv[1:])
