"""
test_house.py: the house stays in order                                            (every file)

THE IDEA    What is kept by no test is lost by the tenth change. Kept here: which file may import
            which, how many files a reader must open, what the README promises, and how comments
            speak.
COMPARED    the files themselves, read as text and as syntax trees, with the tables below.
RUN IT      pytest -n 0 tests/test_house.py
"""
import ast
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import mutants
from conftest import make_run
from docs import voices

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("sources", "autoencoder", "scale", "metrics", "support", "docs", "exercises", "notebooks")
GROUND_FLOOR = ("data", "attention_mask", "diffusion", "patchify", "vae", "model")
# What the README calls a concept file: one idea of the paper each.
CONCEPT_FILES = (*GROUND_FLOOR, "train", "sample", "chameleon")

# A file may import what stands on its own line, and below it.
LINES = [
    {"train", "evaluate", "experiments", "docs", "exercises", "notebooks"},
    {"chameleon", "metrics"},
    {"sample", "scale", "autoencoder", "config"},
    {"sources", "support"},
    {"model"},
    {"data", "attention_mask", "diffusion", "patchify", "vae"},
    {"support.common"},
]
# These know less than their line allows: these files, and the files of these rooms.
ONLY = {
    "attention_mask": set(),
    "diffusion": set(),
    "patchify": set(),
    "vae": {"support.common"},
    "data": {"support.common"},
    "model": {"attention_mask", "patchify", "diffusion"},
    "support": {*GROUND_FLOOR, "support"},
    "sample": {*GROUND_FLOOR, "support"},
}
# The ground floor knows no command line, no file format, no group of processes.
NOT_ON_THE_GROUND_FLOOR = {"argparse", "json", "pickle", "csv", "PIL", "torch.distributed"}


# ------------------------------------------------------------------------------- reading the files
def module_name(path):
    """scale.plan of ROOT/scale/plan.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def our_files():
    """{module name: path} of every .py file outside the tests, without the rooms' __init__.py."""
    paths = [*ROOT.glob("*.py")]
    for room in ROOMS:
        paths += (ROOT / room).rglob("*.py")
    return {module_name(path): path for path in sorted(paths) if path.stem != "__init__"}


FILES = our_files()


def imported_names(path):
    """Every (dotted name, name in it or "") that a file imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [(node.module, alias.name) for alias in node.names]
    return names


def imports(path):
    """The set of our modules that a file imports."""
    found = set()
    for module, name in imported_names(path):
        found |= {module, f"{module}.{name}"} & set(FILES)
    return found


ARROWS = {name: imports(path) for name, path in FILES.items()}


def line_of(name):
    """On which of LINES a module stands: by its own name, or by its room's."""
    for number, line in enumerate(LINES):
        if name in line:
            return number
    room = name.split(".")[0]
    return next(number for number, line in enumerate(LINES) if room in line)


def circle(arrows):
    """A circle in {name: names}, as a list of names, or []."""
    finished = set()

    def walk(name, way):
        if name in way:
            return [*way[way.index(name):], name]
        if name not in finished:
            for other in sorted(arrows[name]):
                if found := walk(other, [*way, name]):
                    return found
            finished.add(name)
        return []

    for name in arrows:
        if found := walk(name, []):
            return found
    return []


# -------------------------------------------------------------------------------------- the arrows
def test_no_circle_of_imports():
    """Catches two files that cannot be read, or used, one without the other."""
    assert len(FILES) > 30
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]      # the test sees one
    assert circle(ARROWS) == []


def test_no_circle_of_rooms():
    """Catches rooms that need each other."""
    def room_of(name):
        # support.common is a room of its own: it stands below everything.
        return name if name == "support.common" else name.split(".")[0]

    rooms = {}
    for name, others in ARROWS.items():
        room = room_of(name)
        needed = {room_of(other) for other in others}
        rooms.setdefault(room, set()).update(needed - {room})
    assert circle(rooms) == []


@pytest.mark.parametrize("name", FILES)
def test_arrows_point_down(name):
    """Catches a file that imports what stands above it."""
    above = sorted(other for other in ARROWS[name] if line_of(other) < line_of(name))
    assert above == []

    only = ONLY.get(name, ONLY.get(name.split(".")[0]))
    if only is not None:
        strangers = []
        for other in ARROWS[name]:
            room = other.split(".")[0]
            if other not in only and room not in only:
                strangers.append(other)
        assert strangers == []


@pytest.mark.parametrize("name", GROUND_FLOOR)
def test_the_ground_floor_knows_ideas_only(name):
    """Catches a command line, a file format or a group of processes in a file that explains an
    idea."""
    modules = set()
    for module, inner in imported_names(FILES[name]):
        modules |= {module, f"{module}.{inner}"}        # import torch.x, or from torch import x
    assert modules & NOT_ON_THE_GROUND_FLOOR == set()


@pytest.mark.parametrize("name", CONCEPT_FILES)
def test_no_concept_file_is_imported_for_its_error(name):
    """Catches `from data import UserError`, which makes one idea depend on another for nothing."""
    errors = []
    for module, inner in imported_names(FILES[name]):
        if module in CONCEPT_FILES and inner.endswith("Error"):
            errors.append((module, inner))
    assert errors == []


def test_twelve_doors():
    """Catches a newcomer who stands before more files than he can choose from."""
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_every_module_can_get_a_bug():
    """Catches a module whose tests nobody has tried with planted bugs, because it is missing in the
    table of tests/mutants.py."""
    drawing = {"docs.idea"} | {name for name in FILES if name.startswith("notebooks.figures")}
    tried = {name.replace("/", ".") for name in mutants.TESTS}
    assert set(FILES) - drawing == tried
    for names in mutants.TESTS.values():
        assert all((ROOT / f"tests/{name}.py").exists() for name in names.split())


WHAT_SAMPLE_LOADS = """
import json, sys
import sample
print(json.dumps([getattr(module, "__file__", None) for module in list(sys.modules.values())]))
"""


def test_sample_loads_little():
    """Catches a `python sample.py` that loads data sets, shards or the training of a VAE for a list
    of words."""
    line = [sys.executable, "-c", WHAT_SAMPLE_LOADS]
    answer = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [Path(path) for path in json.loads(answer.stdout) if path]
    loaded = {name for name, path in FILES.items() if path in paths}
    rooms = {name.split(".")[0] for name in loaded}
    assert "sample" in loaded
    assert not rooms & {"sources", "scale", "metrics", "autoencoder"}
    assert len(loaded - {"sample"}) <= 9, sorted(loaded)


def test_a_step_passes_through_seven_files(tmp_path):
    """Catches a plain training step that its reader must follow through half of the house."""
    # Imported here: the other tests only read the files, also those that are broken.
    import train
    from config import parse_arguments

    config, *_ = parse_arguments(["--pairs", "20", "--documents", "4", "--out", str(tmp_path)])
    run = make_run(config, tmp_path)
    touched = set()                                     # files of which a function was called

    def watch(frame, event, _):
        if event == "call":
            touched.add(frame.f_code.co_filename)

    sys.setprofile(watch)
    try:
        train.train_step(run)
    finally:
        sys.setprofile(None)

    files = sorted(name for name, path in FILES.items() if str(path) in touched)
    assert "train" in files
    assert "model" in files
    assert len(files) <= 7, files


# -------------------------------------------------------------------------------- what is promised
def resolve(name):
    """What a dotted name such as `scale.plan.describe` or `data.Batch.tokens` stands for. Raises
    LookupError if there is no such thing. A dataclass's field without a default counts."""
    # The longest beginning that is a file; what follows is in that file.
    parts = name.split(".")
    cut = 0
    for k in range(len(parts) + 1):
        if ".".join(parts[:k]) in FILES:
            cut = k
    if cut == 0:
        raise LookupError(name)
    thing = importlib.import_module(".".join(parts[:cut]))
    for part in parts[cut:]:
        if part in getattr(thing, "__annotations__", {}):
            return None
        if not hasattr(thing, part):
            raise LookupError(name)
        thing = getattr(thing, part)
    return thing


def dotted_names(text):
    """Every `file.function` in back quotes whose first part is a file or a room of ours."""
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)(?:\([^`]*\))?`", text)
    ours = {name.split(".")[0] for name in FILES}
    endings = {"py", "md", "pt", "png", "gif", "jsonl", "json", "model", "ipynb", "txt"}
    found = []
    for name in names:
        first, *_, last = name.split(".")
        if first in ours and last not in endings:
            found.append(name)
    return found


PAGES = ["README.md", "docs/PAPER.md", "docs/RESULTS.md", "docs/SCALE.md", "docs/TEACHING.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_name_on_a_page_exists(page):
    """Catches a map that leads to a function of last month's name."""
    if not (ROOT / page).exists():
        pytest.skip(f"there is no {page}")
    names = dotted_names((ROOT / page).read_text())
    if page == "README.md" and not names:
        pytest.skip("README has no map yet")

    missing = []
    for name in names:
        try:
            resolve(name)
        except LookupError:
            missing.append(name)
    assert missing == []
    assert page != "README.md" or len(names) >= 20


def test_the_map_names_tests_that_exist():
    """The rows of README's map: | in the paper | `file.function` | notebook | test |. Catches a
    test or a notebook that has another name by now."""
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\|[^|]*\| `[\w.]+`[^|]*\|([^|]*)\| (\w+) \|$", readme, re.M)
    assert len(rows) >= 20
    for notebook, test in rows:
        assert (ROOT / f"tests/{test}.py").exists(), test
        number = notebook.strip()
        if number:
            assert list((ROOT / "notebooks").glob(f"{number}_*.ipynb")), number


def test_the_readme_can_be_read():
    """Catches a front door that grew into a corridor."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 175
    assert [number for number, line in enumerate(lines, 1) if len(line) > 110] == []


def test_the_readme_says_what_the_results_say():
    """Catches a number at the front door whose run was repeated, or never made."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = (ROOT / "docs/RESULTS.md").read_text(encoding="utf-8")
    below = readme.split("## What it reaches", 1)[1]
    rows = [line for line in below.split("\n## ", 1)[0].splitlines() if line.startswith("|")]
    numbers = re.findall(r"\d+\.\d+|\d:\d\d", " ".join(rows))     # 96.5, 4:43
    assert len(numbers) > 10
    measured = re.findall(r"\d+\.\d+|\d:\d\d", results)
    assert [number for number in numbers if number not in measured] == []


# --------------------------------------------------------------------------------- how files speak
VOICES = ("# Paper: ", "# Our choice: ", "# Differs from the paper: ", "# TRAP: ")


def comments(path):
    """[(line number, comment)] of a Python file."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


@pytest.mark.parametrize("name", FILES)
def test_comments_speak_in_four_voices(name):
    """README says that they can be found with grep. Catches `# Paper §4.1: ...`, which grep does
    not find."""
    almost = re.compile(r"#\W*(paper|our choice|differs|trap)\b(?!')", re.I)
    strange = []
    for number, text in comments(FILES[name]):
        if almost.match(text) and not text.startswith(VOICES):
            strange.append((number, text))
    assert strange == []


def test_every_voice_is_heard():
    """Catches a voice that the README names and no concept file uses."""
    texts = []
    for name in CONCEPT_FILES:
        texts += [text for _, text in comments(FILES[name])]
    for voice in VOICES:
        assert [text for text in texts if text.startswith(voice)], voice


def test_the_page_of_voices_is_up_to_date():
    """docs/VOICES.md is collected from the comments. Catches a comment that was changed since."""
    page = voices.PAGE.read_text(encoding="utf-8")
    assert page.strip() == voices.collect().strip(), "run: python -m docs.voices"


def without_docstring(tree, where=""):
    """Names of the public functions, classes and methods of a syntax tree that have no docstring.
    `forward` needs none: its class says what it does."""
    names = []
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        a_forward = where and node.name == "forward"
        if not ast.get_docstring(node) and not a_forward:
            names.append(where + node.name)
        # Not into functions: one inside another is its own business.
        if isinstance(node, ast.ClassDef):
            names += without_docstring(node, f"{node.name}.")
    return names


@pytest.mark.parametrize("name", FILES)
def test_everything_public_has_a_docstring(name):
    """Catches a file, function, class or method that does not say what it is."""
    tree = ast.parse(FILES[name].read_text())
    assert ast.get_docstring(tree)
    assert without_docstring(tree) == []


def recipe(name):
    """The code below TAKE IT in the docstring of a concept file."""
    tree = ast.parse(FILES[name].read_text())
    below = ast.get_docstring(tree).split("TAKE IT", 1)[1]
    _, *lines = below.split("\nSHAPES", 1)[0].splitlines()
    return textwrap.dedent("\n".join(lines))


@pytest.mark.parametrize("name, result, shape", [
    ("attention_mask", "out", (2, 3, 6, 4)),            # as q: (B, N, T, K)
    ("diffusion", "x", (2, 4, 8, 8)),                   # as x0
    ("patchify", "out", (2, 4, 8, 8)),
])
def test_the_recipe_of_a_file_works(name, result, shape):
    """Whoever takes one file elsewhere starts from these lines. Catches a name, an order or a shape
    that has changed since they were written."""
    x0 = torch.randn(2, 4, 8, 8)
    q = torch.randn(2, 3, 6, 4)
    given = {
        "c": 4, "p": 2, "D": 32, "M": 2, "torch": torch,
        "x0": x0, "eps": x0, "xt": x0, "xT": x0, "t": torch.tensor([1, 1000]),
        "network": lambda xt, t: xt,
        "q": q, "k": q, "v": q,
        "image_id": torch.tensor([[-1, 0, 0, 0, -1, -1], [-1, -1, 1, 1, -1, -1]]),
        "doc_id": torch.zeros(2, 6, dtype=torch.long),
    }
    names = vars(importlib.import_module(name)) | given
    exec(recipe(name), names)
    assert names[result].shape == shape
    assert names[result].isfinite().all()


def test_two_lines_of_python_draw(monkeypatch):
    """The two lines in the docstring of sample.py, as they stand. Catches a name that has moved."""
    monkeypatch.chdir(ROOT)
    sample = importlib.import_module("sample")
    below = sample.__doc__.split("IN PYTHON", 1)[1].split("\nSHAPES", 1)[0]
    lines = [line.strip() for line in below.splitlines()]

    names = dict(vars(sample))
    exec("\n".join(lines), names)
    assert names["pictures"].shape == (2, 32, 32, 3)
    assert str(names["pictures"].dtype) == "uint8"


# Files and names of the house before this one, and of places that are not in the repository.
OLD_NAMES = re.compile("|".join([
    r"\bDESIGN\b",
    r"\.\./shared",
    r"(?<![\"'])/work/",
    r"\bdata\.py pack",
    r"\b[Kk]it\b",
    r"\bpresets\.Config\b",
    r"\btrain\.(?:Config|prepare|draw_batch|load_source)\b",
]))
# GenEval's own script, and what a student writes.
ELSEWHERE = {"evaluation/evaluate_images.py", "student.py"}
FILE_NAME = re.compile(r"(?<![\w/.*<-])((?:\.\./|[\w-]+/)*[\w-]+\.(?:py|md|ipynb))\b")


def prose(path):
    """The docstrings and comments of a Python file, as one text. The code of a test may name files
    that it makes itself."""
    parts = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            parts.append(ast.get_docstring(node) or "")
    parts += [text for _, text in comments(path)]
    return "\n".join(parts)


def texts():
    """{path: text} of everything that people read: code, tests, pages, and the cells of the
    notebooks."""
    paths = [*FILES.values(), *(ROOT / "docs").glob("*.md")]
    for name in ("README.md", "requirements.txt", "pyproject.toml", ".ci/run"):
        paths.append(ROOT / name)
    everything = {path: path.read_text() for path in paths}
    for path in (ROOT / "tests").glob("*.py"):
        if path != Path(__file__):
            everything[path] = prose(path)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        sources = ["".join(cell["source"]) for cell in cells]
        everything[path] = "\n".join(sources)
    return everything


TEXTS = texts()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_named_exists(path):
    """Catches "READ NEXT kit.py" after kit.py has gone. A file is named from the root, or from
    beside the file that names it."""
    missing = []
    for number, line in enumerate(TEXTS[path].splitlines(), 1):
        for name in FILE_NAME.findall(line):
            exists = (ROOT / name).exists() or (path.parent / name).exists()
            if not exists and name not in ELSEWHERE:
                missing.append((number, name))
        for old in OLD_NAMES.findall(line):
            missing.append((number, old))
    assert missing == []


# ------------------------------------------------------------ commands from another working folder
def has_main(path):
    """Whether a file does something when it is run."""
    return '\nif __name__ == "__main__":' in path.read_text()


def our_programs():
    """Names of all modules that are run, without those of the rooms that are read."""
    names = []
    for name, path in FILES.items():
        room = name.split(".")[0]
        if has_main(path) and room not in ("docs", "notebooks", "exercises"):
            names.append(name)
    return names


PROGRAMS = our_programs()
# Those that have options. The others show their idea.
COMMANDS = {
    "train",
    "sample",
    "evaluate",
    "experiments",
    "scale.pack",
    "scale.export",
    "metrics.likelihood",
    "metrics.coco",
    "metrics.doctor",
    "support.convert",
    "support.reference",
    "autoencoder.train",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{program: (its CompletedProcess, names of the files that it wrote)}. Each was run in an empty
    folder: commands with --help, demos as they are."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(name):
        place = folder / name
        place.mkdir()
        start = ["-m", name] if "." in name else [str(FILES[name])]
        options = ["--help"] if name in COMMANDS else []
        done = subprocess.run(
            [sys.executable, *start, *options],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done, [path.name for path in place.iterdir()]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(PROGRAMS, pool.map(run, PROGRAMS)))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_from_anywhere(name, answers):
    """Catches a program that finds its files only in its own folder, a demo that breaks, and one
    that leaves files behind."""
    done, written = answers[name]
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout) > 100
    assert written == []
    if name in COMMANDS:
        assert "usage:" in done.stdout


# These four import no furniture.
WITHOUT_FURNITURE = {"attention_mask", "diffusion", "patchify", "model"}


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - WITHOUT_FURNITURE))
def test_a_program_may_lose_its_reader(name):
    """Catches a program that ends in a traceback as `python -u vae.py | head -1`."""
    begun = FILES[name].read_text().split('\nif __name__ == "__main__":')[1]
    assert "run_command(" in begun or "end_with_the_reader()" in begun


def test_every_command_is_a_program():
    """Catches a command of the README that has no command line any more."""
    assert COMMANDS <= set(PROGRAMS)
