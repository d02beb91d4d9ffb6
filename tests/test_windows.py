"""
test_windows.py: what would stop a user of Windows or macOS         (every file; not run there)

THE IDEA    Nobody runs this repository on Windows here. What is known to fail there can be looked
            for all the same: names of files, modules that only Unix has, text in the system's own
            encoding (ruff's PLW1514), and a lock that cannot be deleted while it is held.
RUN IT      pytest -n 0 tests/test_windows.py
"""
import ast
import re
import subprocess
from pathlib import Path

import pytest

from support import run_folder
from support.common import UserError
from test_house import FILES, ROOT

UNIX = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "syslog"}
UNIX_CALLS = {                                          # of os and signal
    "fork",
    "killpg",
    "setsid",
    "getuid",
    "geteuid",
    "mkfifo",
    "alarm",
    "setitimer",
    "sched_getaffinity",
}


def unix_names(node):
    """Names that only Unix has, in one node of a syntax tree: `import fcntl`, `from fcntl import
    flock`, `os.fork`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in UNIX]
    if isinstance(node, ast.ImportFrom) and node.module in UNIX:
        return [node.module]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id in ("os", "signal") and node.attr in UNIX_CALLS:
            return [node.attr]
    return []


def unguarded(tree):
    """[(line, name)] of what only Unix has, outside of `try` and of a function that asks with
    hasattr first."""
    found = []

    def walk(node, guarded):
        if isinstance(node, ast.FunctionDef):
            guarded = guarded or "hasattr(" in ast.unparse(node)
        if not guarded:
            found.extend((node.lineno, name) for name in unix_names(node))
        for child in ast.iter_child_nodes(node):
            walk(child, guarded or isinstance(node, ast.Try))

    walk(tree, False)
    return found


EXAMPLE = """\
import fcntl
def f():
    os.fork()
try:
    import pwd
except ImportError:
    pass
"""


def test_unguarded_is_seen():
    """Catches a search that finds nothing."""
    assert unguarded(ast.parse(EXAMPLE)) == [(1, "fcntl"), (3, "fork")]


@pytest.mark.parametrize("name", FILES)
def test_nothing_needs_unix(name):
    """Catches a program that ends in an ImportError or AttributeError on Windows."""
    assert unguarded(ast.parse(FILES[name].read_text(encoding="utf-8"))) == []


def test_names_that_every_system_takes():
    """Catches a file that cannot be checked out on Windows (a colon, a reserved name), or that
    another hides on a Mac (case)."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not under git")
    names = listed.stdout.splitlines()
    assert len(names) > 100
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert not re.search(r'[<>:"|?*\\]|[ .]$', name), name
        assert not re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)", Path(name).stem, re.I), name


def test_the_lock_where_open_files_cannot_be_deleted(tmp_path, monkeypatch):
    """Windows does not delete a file that is open. Catches a run that ends in a PermissionError
    there, or keeps its folder locked."""
    def refuse(self, missing_ok=False):
        raise PermissionError(13, "in use", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(2):                                  # the first one leaves its file
        with run_folder.lock(tmp_path / "out"):
            with pytest.raises(UserError, match="another training"):
                with run_folder.lock(tmp_path / "out"):
                    pass
