"""
test_notebooks.py: do the notebooks run, and is each of them a page to learn from?
(notebooks/)

THE IDEA    A notebook is checked as a program and as a page. As a program it runs from top to
            bottom, and what is committed is what a run gives. As a page it keeps the house's rules:
            short cells, each with its own result or picture; numbers that were derived before they
            are seen; formulas that can be read offline.
RUN IT      pytest -n 0 tests/test_notebooks.py -k "not runs"       seconds; the rest takes minutes
"""
import ast
import importlib
import re
import resource
import statistics
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FIGURES = sorted(FOLDER.glob("figures*.py"))
ROOMS = ("", "sources/", "autoencoder/", "scale/", "metrics/", "support/")


def all_modules():
    """The names of our modules, such as "data" and "scale.plan"."""
    names = []
    for room in ROOMS:
        for path in sorted((FOLDER.parent / room).glob("*.py")):
            if path.stem != "__init__":
                names.append(f"{room}{path.stem}".replace("/", "."))
    return names


# --------------------------------------------------------------------------------- parts of a page
def name_of(path):
    """A notebook's or module's name, as the name of its test."""
    return path.stem


def read(path):
    """The notebook in a file."""
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    """The cells that have something to run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def text_cells(path):
    """The words of a page: the source of its markdown cells."""
    return [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]


def pictures(cell):
    """How many pictures a cell put out."""
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def printed(notebook):
    """All text that the cells put out, as one string."""
    texts = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            texts.append(output.get("text", ""))
            for kind, text in output.get("data", {}).items():
                if kind.startswith("text/"):
                    texts.append(text)
    return "\n".join(texts)


def plain(cell):
    """A cell's source without IPython's own lines."""
    return "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))


# --------------------------------------------------------------------------------- which there are
def test_there_are_these():
    """Catches a page that was lost, and two with one number."""
    names = [path.stem for path in NOTEBOOKS]
    assert names[:5] == [
        "0_one_sequence_one_forward",
        "1_who_may_look_at_whom",
        "2_noise_in_noise_out",
        "3_a_picture_becomes_a_few_vectors",
        "4_a_small_space",
    ]
    numbers = [int(name.split("_")[0]) for name in names]
    assert numbers == list(range(len(names)))


# ---------------------------------------------------------------------------------------- they run
def cpu_of_children():
    """Seconds of CPU that the processes started here and ended since have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_runs(path):
    """Every cell runs, every number is the one that was derived, and nobody waits long."""
    notebook = read(path)
    committed = read(path)
    place = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place)

    before = cpu_of_children()
    client.execute()                                    # fills in the outputs of `notebook`
    seconds = cpu_of_children() - before

    assert 1 < seconds < 90             # not wall time: the other half of the tests runs beside it
    said = printed(notebook)
    assert "match: True" in said
    assert "match: False" not in said
    assert said.count("match: True") == printed(committed).count("match: True")
    drawn = [pictures(cell) for cell in code_cells(notebook)]
    assert drawn == [pictures(cell) for cell in code_cells(committed)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_committed_outputs(path):
    """Catches a page that was committed without its outputs, with those of several runs, with an
    error or a warning, with a path of somebody's machine, or with pictures that are too large."""
    notebook = read(path)
    cells = code_cells(notebook)
    numbers = [cell.execution_count for cell in cells]
    in_turn = list(range(1, len(numbers) + 1))
    assert numbers == in_turn, "not the outputs of one run from top to bottom"

    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"

    said = printed(notebook)
    assert sum(pictures(cell) for cell in cells) >= 5
    assert "match: True" in said
    assert "match: False" not in said

    # Not the whole file: among a million letters of a picture's base64, "/tmp/" stands by chance.
    text = "\n".join(cell.source for cell in notebook.cells) + said
    places = ("/work/", "/tmp/", "/home/", "/root/", "/Users/")
    assert not [place for place in places if place in text]
    assert path.stat().st_size < 1_000_000


# ----------------------------------------------------------------------------- their code is ideas
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_cells_are_short(path):
    """Catches a cell that says two things, and a line that a projector cuts off."""
    lengths = []
    for cell in code_cells(read(path)):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert [line for line in lines if len(line) > 95] == []
        lengths.append(len(lines))
    assert statistics.median(lengths) <= 8
    assert max(lengths) <= 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_every_cell_shows_something(path):
    """Catches a cell that only prepares, and a picture that lands under another cell than its
    own."""
    for number, cell in enumerate(code_cells(read(path)), 1):
        assert cell.outputs, f"cell {number} neither prints nor draws"
        calls = re.findall(r"\bfigures\.draw_\w+\(|\bplt\.show\(", cell.source)
        count = f"cell {number} calls for {len(calls)} pictures and has {pictures(cell)}"
        assert pictures(cell) == len(calls), count


@pytest.mark.parametrize("path", FIGURES, ids=name_of)
def test_every_drawing_is_shown_once(path):
    """The test above counts on this: each figures.draw_... ends with its one plt.show()."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            shown = ast.unparse(node).count("plt.show()")
            assert shown == node.name.startswith("draw_"), node.name
            if shown:
                assert ast.unparse(node.body[-1]) == "plt.show()", node.name


@pytest.mark.parametrize("path", FIGURES, ids=name_of)
def test_every_drawing_is_used(path):
    """Catches a drawing whose cell has gone."""
    used = []
    for notebook in NOTEBOOKS:
        used += [cell.source for cell in code_cells(read(notebook))]
    source = "\n".join(used)
    functions = re.findall(r"^def (draw_\w+)", path.read_text(), re.M)
    assert [name for name in functions if f"figures.{name}(" not in source] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_first_cell_finds_the_modules(path):
    """One line makes the modules known, wherever the repository lies; and no page draws by
    itself."""
    first, *others = [plain(cell) for cell in code_cells(read(path))]
    assert 'sys.path.insert(0, "..")' in first
    assert "figures.start(" in first
    assert not [source for source in others if "sys.path" in source]
    assert not [source for source in [first, *others] if "matplotlib" in source]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_defines_nothing_that_a_module_has(path):
    """Notebooks import. What they define themselves has a name of its own."""
    modules = [importlib.import_module(name) for name in all_modules()]
    source = "\n".join(plain(cell) for cell in code_cells(read(path)))
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        for module in modules:
            # What a module has only imported does not count as its own.
            namesake = getattr(module, node.name, None)
            its_own = getattr(namesake, "__module__", "") == module.__name__
            assert not its_own, f"{node.name} is defined in {module.__name__} already"


# -------------------------------------------------------------------------- their words are a page
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_opens_and_ends_as_a_page(path):
    """A page opens with its question, the paper's section, minutes, and what the reader will be
    able to do. It ends with what to keep, what to try, and what is next."""
    first, *_, last = text_cells(path)
    number = path.stem.split("_")[0]
    title = rf"# {number} · .+\n\n\*\*.+\?\*\*\n"
    assert re.match(title, first), "the title, then the question"
    opening = (
        r"\*\*In the paper:\*\* .*(§|App\.)",
        r"\*\*Modules:\*\* .*\.py",
        r"\*\*Minutes:\*\* \d+",
        r"The cells run in \d+ seconds",
        r"\*\*Before:\*\*",
        r"\*\*Afterwards you can\*\*",
    )
    for part in opening:
        assert re.search(part, first), part
    for part in ("**What to keep.**", "**Try this.**", "**Next:**"):
        assert part in last, part


def test_the_teachers_table_says_what_the_pages_say():
    """docs/TEACHING.md has a table: | notebook | needs | minutes | ... Catches a class that is
    planned by another page's minutes."""
    table = (FOLDER.parent / "docs/TEACHING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) [a-z][^|]*\| ([\d, ]*)\| (\d+) \|", table, re.M)
    assert [int(number) for number, _, _ in rows] == list(range(len(NOTEBOOKS)))
    for path, (_, needs, minutes) in zip(NOTEBOOKS, rows, strict=True):
        first, *_ = text_cells(path)
        # Up to a link: what follows it helps, but is not needed.
        before = re.search(r"\*\*Before:\*\* ([^\[\n]*)", first)[1]
        assert f"**Minutes:** {minutes}." in first, path
        assert re.findall(r"\d", before) == re.findall(r"\d", needs), path


def test_typed_tables_say_what_the_results_say():
    """A table that is typed, and not printed by a cell, is a copy of docs/RESULTS.md. Catches a
    copy that went stale when a run was repeated."""
    results = (FOLDER.parent / "docs/RESULTS.md").read_text(encoding="utf-8")
    measured = re.findall(r"\d+\.\d+", results)
    compared = 0
    for path in NOTEBOOKS:
        for text in text_cells(path):
            if "docs/RESULTS.md" not in text:
                continue
            rows = [line for line in text.splitlines() if line.startswith("|")]
            for number in re.findall(r"\d+\.\d+", " ".join(rows)):
                assert number in measured, (path.name, number)
                compared += 1
    assert compared > 20                                # else nothing was found to compare


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_predicts_fails_and_checks(path):
    """Predict, naive, see it fail, right, see it work; and at least three numbers are derived
    first."""
    words = "\n".join(text_cells(path))
    checks = re.findall(r"^.+: we expect .+, we see .+, match: True$", printed(read(path)), re.M)
    assert words.count("**Predict") >= 3
    assert re.search(r"[Nn]aive", words)
    assert len(checks) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_formulas_can_be_read_offline(path):
    """Catches LaTeX: without a network, and in an editor, it stays a riddle."""
    words = "\n".join(text_cells(path))
    assert "$" not in words
    assert "\\" not in words


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_links_lead_somewhere(path):
    """Catches the next notebook under its old name."""
    words = "\n".join(text_cells(path))
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", words):
        assert link.startswith("https://") or (FOLDER / link).exists(), link
