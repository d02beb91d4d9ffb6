"""The notebooks run from top to bottom, and what is committed is what a run gives: outputs, no errors, every check true."""
import ast
import importlib
import inspect
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
ROOMS = ("", "sources/", "autoencoder/", "scale/", "metrics/", "support/")
MODULES = [f"{room}{path.stem}".replace("/", ".") for room in ROOMS
           for path in sorted((FOLDER.parent / room).glob("*.py")) if path.stem != "__init__"]


def code_cells(notebook):
    """The cells that have something to run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def printed(notebook):
    """All text that the cells put out, as one string."""
    return "\n".join(output.get("text", "") + "\n".join(text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))
                     for cell in code_cells(notebook) for output in cell.outputs)


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["1_who_may_look_at_whom", "2_noise_in_noise_out", "3_train_a_tiny_one"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert "match: True" in printed(notebook) and "match: False" not in printed(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    numbers = [cell.execution_count for cell in code_cells(notebook)]
    assert numbers == list(range(1, len(numbers) + 1)), "not the outputs of one run from top to bottom"
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    assert "match: True" in printed(notebook) and "match: False" not in printed(notebook)
    assert not [place for place in ("/work/", "/tmp/", "/home/", "/root/", "/Users/") if place in path.read_text()]
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_defines_nothing_that_a_module_has(path):
    """Notebooks import. Only an exercise's stub repeats a name, as my_<name>, with the module's arguments and docstring."""
    tree = ast.parse("\n".join("\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
                               for cell in code_cells(nbformat.read(path, as_version=4))))
    modules = [importlib.import_module(name) for name in MODULES]
    for node in [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]:
        taken = [m.__name__ for m in modules if getattr(getattr(m, node.name, None), "__module__", "") == m.__name__]
        assert node.name == "check" or not taken, f"{node.name} is defined in {taken} already"
        if node.name.startswith("my_"):
            solution, = {getattr(m, node.name[3:]) for m in modules if hasattr(m, node.name[3:])}
            assert [a.arg for a in node.args.args] == list(inspect.signature(solution).parameters)
            assert inspect.cleandoc(ast.get_docstring(node)) == inspect.cleandoc(solution.__doc__)
