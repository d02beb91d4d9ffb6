"""
stubs.py: the functions to write, without their lines

THE IDEA    A stub is the module's own function: its signature and its docstring. It is made from
            the module each time, so the two cannot drift apart. The solution is the module.
TRY IT      python exercises/stubs.py > student.py       a file to fill, for exercises/grade.py
TEST        tests/test_exercises.py holds those of the notebook to this file
"""
import inspect
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # the modules lie one folder up

from exercises.checks import TABLE

HEAD = '''"""
The eight exercises. Put your lines in place of each `raise NotImplementedError`, then

    python exercises/grade.py student.py

says what is wrong with them. All that is needed is imported here.
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange

from data import BOI, BOS, DROP, EOI, EOS, PATCH, Sequence
'''


def stub(exercise):
    """The source of a function without its lines: signature, docstring, NotImplementedError."""
    signature = inspect.signature(exercise.reference)
    docstring = inspect.getdoc(exercise.reference)
    body = f'"""{docstring}"""\nraise NotImplementedError'
    return f"def {exercise.name}{signature}:\n{textwrap.indent(body, '    ')}\n"


def page():
    """A file with all the stubs."""
    parts = [HEAD]
    for exercise in TABLE:
        head = (f"Exercise {exercise.number}: {exercise.minutes} minutes, difficulty "
                f"{exercise.difficulty} of 5. Transfusion {exercise.paper}.")
        comment = textwrap.fill(f"{head} {exercise.task}", 96)
        parts.append(textwrap.indent(comment, "# ", lambda line: True) + "\n" + stub(exercise))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
