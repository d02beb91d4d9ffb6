"""
mutants.py: plants bugs, one at a time, and asks whether a module's own tests see them

    python tests/mutants.py diffusion model --n 12          two modules, on one core
    python tests/mutants.py --jobs 16 --seconds 540 --json mutants.json     all of them, on 16
    python tests/mutants.py --table mutants.json            the score of each module, as a table

THE IDEA    A test that cannot fail proves nothing. So a copy of the repository gets one small bug:
            a comparison turned round, a sign swapped, a term dropped, an index shifted, a detach
            lost. Then the tests of that module run. A bug that no test sees "survives" and is
            listed.
A PICTURE   module --its tests, watched--> which test runs which line, and how long it takes
            module --one bug in line 41--> the tests that run line 41, the quickest first, until
                                           one fails
THE RULE    score = bugs seen / bugs planted. A bug that changes nothing (an equivalent one) has to
            be argued away by hand, in docs/RESULTS.md.
            Time is counted in processor seconds: another program beside this one makes no bug
            "seen".
"""
import argparse
import ast
import collections
import functools
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]

# {module: the tests that are its own}.
TESTS = {
    "data": "test_data",
    "attention_mask": "test_attention_mask",
    "diffusion": "test_diffusion",
    "patchify": "test_patchify",
    "vae": "test_vae test_train_vae",
    "model": "test_model test_losses test_chameleon",
    "train": "test_train test_train_runs test_fine_tuning",
    "sample": "test_sample test_sample_batches test_sample_command_line",
    "evaluate": "test_evaluate",
    "chameleon": "test_chameleon",
    "experiments": "test_experiments",
    "config": "test_not_finite test_errors test_train test_train_runs test_plan",
    "scale/run": "test_not_finite test_stop test_damaged_files test_train test_train_runs "
                 "test_fine_tuning test_distributed test_errors",
    "scale/distributed": "test_damaged_files test_not_finite test_distributed",
    "scale/plan": "test_plan",
    "scale/shards": "test_shards test_pack test_shards_training",
    "scale/pack": "test_pack test_streams test_shards test_pieces",
    "scale/streams": "test_streams test_pack",
    "scale/feed": "test_shards_training test_pieces test_train",
    "scale/export": "test_train_runs test_distributed",
    "scale/mixture": "test_mixture",
    "autoencoder/losses": "test_vae_losses test_train_vae",
    "autoencoder/perceptual": "test_vae_losses",
    "autoencoder/train": "test_not_finite test_stop test_damaged_files test_train_vae test_on_disk",
    "autoencoder/processes": "test_vae_processes",
    "autoencoder/quality": "test_folder",
    "sources/scenes": "test_scenes",
    "sources/edits": "test_edits",
    "sources/mnist": "test_mnist",
    "sources/folder": "test_picture_folder",
    "sources/pairs": "test_sources test_picture_folder test_data",
    "sources/on_disk": "test_on_disk",
    "sources/documents": "test_documents",
    "sources/choose": "test_sources test_errors test_stop",
    "sources/feed": "test_picture_folder test_sources test_train test_fine_tuning test_chameleon",
    "metrics/gap": "test_gap test_evaluate test_chameleon",
    "metrics/scenes": "test_evaluate",
    "metrics/digits": "test_digits test_evaluate",
    "metrics/drawing": "test_evaluate test_folder",
    "metrics/progress": "test_not_finite test_train test_train_runs",
    "metrics/mixtures": "test_mixtures",
    "metrics/doctor": "test_doctor",
    "metrics/likelihood": "test_likelihood test_errors",
    "metrics/questions": "test_questions",
    "metrics/coco": "test_coco",
    "metrics/sweep": "test_sweep",
    "metrics/folder": "test_folder",
    "metrics/verdicts": "test_verdicts",
    "metrics/results": "test_experiments",
    "metrics/scaling": "test_scaling",
    "support/start": "test_start",
    "support/common": "test_run_command test_damaged_files test_picture_files "
                      "test_picture_folder test_errors",
    "support/run_folder": "test_run_folder test_damaged_files test_picture_folder test_train_runs",
    "support/checkpoint": "test_damaged_files test_not_finite test_sample test_sample_command_line "
                          "test_errors",
    "support/figures": "test_folder test_reference test_sample_command_line test_train_runs",
    "support/sample_options": "test_sample_command_line test_errors",
    "support/convert": "test_convert",
    "support/origin": "test_origin",
    "support/reference": "test_reference",
    "notebooks/page": "test_page",
    "docs/voices": "test_house",
}
EXERCISES = ("checks", "codes", "grade", "guidance", "layout", "loss", "mask", "patches", "rewards",
             "schedule", "step", "stubs", "trial", "writing")
for exercise in EXERCISES:
    TESTS[f"exercises/{exercise}"] = "test_exercises"

# The bugs: {what stands in the source: what stands there instead}.
FLIPPED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
TURNED = {
    "min": "max",
    "max": "min",
    "cumsum": "cumprod",
    "any": "all",
    "all": "any",
    "minimum": "maximum",
    "maximum": "minimum",
    "zeros": "ones",
    "ones": "zeros",
    "zeros_like": "ones_like",
    "ones_like": "zeros_like",
}
# Calls that are left out: x.detach() becomes x.
DROPPED = ("detach", "clamp", "sqrt", "square", "flip", "clone", "round", "floor", "ceil", "sort",
           "exp", "log")

# Imported once, before any test runs in a fork.
HEAVY = ("numpy", "torch", "torch.nn.functional", "torch.distributed.checkpoint",
         "torch.distributed.fsdp", "PIL.Image", "einops", "tqdm", "matplotlib.pyplot", "filelock")

CPU_SECONDS = 20                            # at least, of one bug; more for slow tests
QUICK = 0.2                                 # seconds of a test that need not run the line
WAIT_SECONDS = 90                           # in which nothing computes: it waits for ever


# ------------------------------------------------------------------------------------- planting
def places(tree):
    """[(node, kind)]: where a bug can be planted, and which."""
    skip = ignored(tree)
    found = []
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.Compare) and type(node.ops[0]) in FLIPPED:
            found.append((node, "comparison"))
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED and is_arithmetic(node):
            found.append((node, "operator"))
            found.append((node, "term dropped"))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            found.append((node, "number"))
        elif isinstance(node, ast.BoolOp):
            found.append((node, "and / or"))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
            found.append((node, "sign dropped"))
        elif isinstance(node, ast.Call):
            if name_of(node) in TURNED:
                found.append((node, "function"))
            elif name_of(node) in DROPPED and kept_of(node) is not None:
                found.append((node, "call dropped"))
    return found


def name_of(call):
    """"clamp" of x.clamp(0) and of clamp(x, 0)."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def kept_of(call):
    """What is left of a call that is dropped: x of x.detach(), torch.sqrt(x), round(x)."""
    if isinstance(call.func, ast.Attribute):
        owner = getattr(call.func.value, "id", "")
        if owner not in ("torch", "np", "math", "F"):
            return call.func.value
    return call.args[0] if call.args else None


def is_arithmetic(node):
    """Whether an expression is no text or list: those are added up, too, but seldom compute."""
    texts = (ast.JoinedStr, ast.List, ast.ListComp, ast.Tuple)
    for part in ast.walk(node):
        if isinstance(part, texts):
            return False
        if isinstance(part, ast.Constant) and not isinstance(part.value, (int, float)):
            return False
    return True


def ignored(tree):
    """Ids of nodes in which a bug would be no bug: messages, what draws a figure, and what runs
    only when the file itself is run."""
    skip = set()
    shows = shown_only(tree)
    for node in ast.walk(tree):
        demo = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
        if isinstance(node, ast.FunctionDef):
            demo = node.name in shows or draws(node)
        message = isinstance(node, (ast.Raise, ast.JoinedStr))
        printing = isinstance(node, ast.Call) and name_of(node) in PRINTING
        if demo or message or printing:
            skip |= {id(part) for part in ast.walk(node)}
    return skip


PRINTING = ("print", "tqdm", "say", "UserError", "add_argument", "add")


def draws(function):
    """Whether a function, a node of ast, is given the axes of a figure or makes one."""
    for arg in function.args.args:
        if arg.arg in ("ax", "axis"):
            return True
    for part in ast.walk(function):
        if isinstance(part, ast.Call) and name_of(part) in ("Figure", "new_figure"):
            return True
    return False


@functools.cache
def words_of_the_house():
    """{name: how many of our files have it}."""
    counts = collections.Counter()
    for path in HOME.rglob("*.py"):
        counts.update(set(re.findall(r"\w+", path.read_text())))
    return counts


def shown_only(tree):
    """Names of the functions that print a demonstration: they are called where the file is run as a
    program, or by one another, and no other file has their name."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    names = {node.name for node in functions if words_of_the_house()[node.name] <= 1}
    for node in functions:
        if node.args.args and node.args.args[0].arg == "argv":
            names.discard(node.name)                    # a real program's
        elif node.name in ("main", "demo"):
            names.add(node.name)

    def shows(node):
        return isinstance(node, ast.If) or getattr(node, "name", "") in names

    # A function that real code uses is real, too; without it, the next one may turn out to be.
    while True:
        used = set()
        for node in tree.body:
            if not shows(node):
                used |= names_in(node)
        if not names & used:
            break
        names -= used

    called = set()
    for node in tree.body:
        if shows(node):
            called |= names_in(node)
    return names & called


def names_in(node):
    """The names that are used below a node of ast."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def plant(node, kind):
    """Change the node in place, or return the one to put there."""
    if kind == "comparison":
        node.ops[0] = FLIPPED[type(node.ops[0])]()
    elif kind == "operator":
        node.op = SWAPPED[type(node.op)]()
    elif kind == "number":
        if isinstance(node.value, int):
            node.value = node.value + 1
        else:
            node.value = node.value * 1.5 + (node.value == 0)
    elif kind == "and / or":
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif kind == "function":
        if isinstance(node.func, ast.Attribute):
            node.func.attr = TURNED[node.func.attr]
        else:
            node.func.id = TURNED[node.func.id]
    elif kind == "term dropped":
        return node.left
    elif kind == "sign dropped":
        return node.operand
    elif kind == "call dropped":
        return kept_of(node)
    return node


def mutants(source, n, seed):
    """Up to n bugs, chosen by the seed: dicts of "line", "lines" (first and last of the statement),
    "kind", "change" in words, and "text", the whole source with the bug."""
    tree = ast.parse(source)
    count = len(places(tree))
    order = random.Random(seed).sample(range(count), count)
    chosen = []
    for k in order[:n]:
        tree = ast.parse(source)
        node, kind = places(tree)[k]
        begin = offset(source, node.lineno, node.col_offset)
        end = offset(source, node.end_lineno, node.end_col_offset)
        lines = statement_of(tree, node)
        before = ast.unparse(node)
        after = ast.unparse(plant(node, kind))
        raw = source.encode()
        # Within brackets: it keeps its place among the other operators. Its lines stay, too.
        blank = "\n" * raw[begin:end].count(b"\n")
        text = raw[:begin] + f"({after}{blank})".encode() + raw[end:]
        chosen.append(dict(
            line=node.lineno,
            lines=lines,
            kind=kind,
            change=f"{before}  ->  {after}",
            text=text.decode(),
        ))
    return chosen


def offset(source, line, column):
    """Where a place of ast's, a line and its bytes, is in the bytes of a source."""
    lines = source.encode().split(b"\n")
    return sum(len(text) + 1 for text in lines[: line - 1]) + column


def statement_of(tree, node):
    """(first, last) line of the innermost statement around a node; of its head if it has a body."""
    inside = []
    for part in ast.walk(tree):
        if not isinstance(part, ast.stmt):
            continue
        if part.lineno <= node.lineno and node.end_lineno <= part.end_lineno:
            inside.append(part)
    inner = min(inside, key=lambda part: part.end_lineno - part.lineno)
    body = getattr(inner, "body", None)
    if body:
        return inner.lineno, max(node.end_lineno, body[0].lineno - 1)
    return inner.lineno, inner.end_lineno


# ---------------------------------------------------------------- the tests of a module, in a fork
class Watch:
    """A plugin of pytest's: which test runs which lines of the house, and the seconds it takes.

    house   the folder whose modules are watched, or None to watch nothing
    order   names of tests: these run, in this order; None: all"""

    def __init__(self, house, order):
        self.house = f"{house}/"
        self.order = order
        # {name of a test, "import" or "shared": {(path of a module, line)}}
        self.lines = collections.defaultdict(set)
        self.seconds = {}                               # {name of a test: what it takes of a core}
        self.starts = set()                             # tests that start a process: not watched
        self.failed = []
        self.now = self.lines["import"]
        self.name = "import"
        if house:
            sys.settrace(self.on_call)
            threading.settrace(self.on_call)
            sys.addaudithook(self.on_event)

    def on_call(self, frame, event, _):
        path = frame.f_code.co_filename
        if path.startswith(self.house) and "/tests/" not in path:
            return self.on_line
        return None

    def on_line(self, frame, event, _):
        self.now.add((frame.f_code.co_filename, frame.f_lineno))
        return self.on_line

    def on_event(self, event, _):
        if event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
            self.starts.add(self.name)

    def pytest_collection_modifyitems(self, items):
        if self.order is not None:
            place = {name: k for k, name in enumerate(self.order)}
            wanted = [item for item in items if item.nodeid in place]
            items[:] = sorted(wanted, key=lambda item: place[item.nodeid])

    def pytest_runtest_logstart(self, nodeid):
        self.name = nodeid
        self.began = cpu()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        self.now = self.lines["shared"]                 # a fixture may prepare it for all tests

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item):
        self.now = self.lines[item.nodeid]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item):
        self.now = self.lines["shared"]

    def pytest_runtest_logfinish(self, nodeid):
        self.seconds[nodeid] = cpu() - self.began

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)

    def seen(self):
        """What was watched, for JSON: "seconds", "starts", and by module the "lines" of a test."""
        by_test = {}
        for name, lines in self.lines.items():
            by_module = collections.defaultdict(list)
            for path, line in sorted(lines):
                module = path.removeprefix(self.house).removesuffix(".py")
                by_module[module].append(line)
            by_test[name] = by_module
        return dict(seconds=self.seconds, starts=sorted(self.starts), lines=by_test)


def tests_for(watched, module, first, last):
    """The names of the tests to run for a bug in these lines of a module: those that run one of
    them, the quickest first; then quick ones that do not. watched: one `Watch.seen` per file of
    tests."""
    wanted = set(range(first, last + 1))
    near = []
    far = []
    for file in watched:
        for name, seconds in file["seconds"].items():
            lines = set()
            for part in ("import", "shared", name):
                lines |= set(file["lines"].get(part, {}).get(module, ()))
            starts = name in file["starts"]
            if starts or wanted & lines:
                near.append((starts, seconds, name))
            elif seconds < QUICK:                       # a cached result hides what it ran through
                far.append((False, seconds, name))
    return [name for *_, name in sorted(near) + sorted(far)]


def cpu():
    """Processor seconds of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run_tests(house, files, order, seconds, answer):
    """Run tests in this process, a fork, and write what became of them to the file `answer`.

    files   of tests, without their folder
    order   the names of the tests; None: all of them, watched"""
    os.setsid()                                         # what it starts can be killed with it
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(house)
    said = os.open(house.parent / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    others = [path for path in sys.path if not path.startswith(str(HOME))]
    sys.path[:] = [str(house), str(house / "tests"), *others]
    os.environ["OMP_NUM_THREADS"] = "1"
    paths = [f"tests/{name}.py" for name in files]
    if order is not None:
        paths = [path for path in paths if any(test.startswith(f"{path}::") for test in order)]
    watch = Watch(house if order is None else None, order)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    options += ["--basetemp", str(house.parent / "pytest")]
    status = pytest.main([*options, *paths], plugins=[watch])
    sys.settrace(None)
    result = dict(status=int(status), failed=watch.failed[:1])
    if order is None:
        result |= watch.seen()
    answer.write_text(json.dumps(result))


class Running:
    """Tests at work in a fork.

    name            of the module in which the mutant is; without a mutant, of the file of tests
                    that is watched
    order, seconds  as in `run_tests`"""

    def __init__(self, house, name, mutant, order, seconds):
        self.house = house
        self.name = name
        self.mutant = mutant
        files = [name]
        if mutant:
            files = TESTS[name].split()
            self.path = house / f"{name}.py"
            self.source = self.path.read_text()
            put(self.path, mutant["text"])
        self.answer = house.parent / "answer.json"
        self.answer.unlink(missing_ok=True)
        self.seen_at = time.time()                      # when it was last seen to compute
        self.used = 0.0
        self.child = os.fork()
        if self.child == 0:
            try:
                run_tests(house, files, order, seconds, self.answer)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)

    def poll(self):
        """The dict of `run_tests`, or None while it runs; {"status": "hang"} if it did not end."""
        done, _, usage = os.wait4(self.child, os.WNOHANG)
        if not done:
            used = cpu_of_session(self.child)
            if used > self.used:
                self.used = used
                self.seen_at = time.time()
            if time.time() - self.seen_at < WAIT_SECONDS:
                return None
        try:
            os.killpg(self.child, signal.SIGKILL)       # a process that a test has left, too
        except ProcessLookupError:
            pass
        if not done:
            _, _, usage = os.wait4(self.child, 0)
        if self.mutant:
            put(self.path, self.source)
        result = {"status": "hang", "failed": []}
        if self.answer.exists():
            result = json.loads(self.answer.read_text())
        return result | {"cpu": round(usage.ru_utime + usage.ru_stime, 1)}


def put(path, text):
    """Write a source. Its time is always another one: Python must not take the compiled old one."""
    path.write_text(text)
    put.time = getattr(put, "time", 10 ** 9) + 10
    os.utime(path, (put.time, put.time))


def cpu_of_session(session):
    """Ticks that the living processes of a session have computed."""
    ticks = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                fields = Path(entry.path, "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:                             # it has just ended
                continue
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks


def copy_of_the_house(place):
    """A copy of the repository without what is large and not needed."""
    house = place / "house"
    skip = shutil.ignore_patterns(".git", "out", "__pycache__", ".pytest_cache", "packed")
    shutil.copytree(HOME, house, ignore=skip)
    return house


# -------------------------------------------------------------------------------------- all of them
def run_all(args, place):
    """Yields a dict for every bug of every module that is not in args.done."""
    free = [copy_of_the_house(place / str(k)) for k in range(args.jobs)]
    house = free[0]
    watched = {}                            # {file of tests: Watch.seen, or None while it runs}
    bugs = collections.deque(bugs_of(args, house))
    waiting = collections.deque()           # [(name, bug or None, tests, seconds)]
    running = []
    began = time.time()
    while running or waiting or bugs:
        while free and time.time() - began < args.seconds:
            if not waiting and bugs:
                prepare(bugs, watched, waiting)
            if not waiting:
                break
            running.append(Running(free.pop(), *waiting.popleft()))
        if not running:
            return
        for case in list(running):
            result = case.poll()
            if result is None:
                continue
            running.remove(case)
            free.append(case.house)
            if case.mutant:
                yield dict(
                    module=case.name,
                    line=case.mutant["line"],
                    kind=case.mutant["kind"],
                    change=case.mutant["change"],
                    seen=result["status"] != 0,
                    by=result["failed"],
                    cpu=result["cpu"],
                )
            elif result["status"] == 0:
                watched[case.name] = result
            else:
                said = (case.house.parent / "said.txt").read_text()[-2000:]
                failed = result["failed"]
                raise SystemExit(f"{case.name}: its tests fail without a bug ({failed})\n{said}")
        time.sleep(0.05)


def bugs_of(args, house):
    """Yields (module, bug), of every module that is asked for."""
    for module in args.modules:
        for bug in mutants((house / f"{module}.py").read_text(), args.n, args.seed):
            if (module, bug["line"], bug["change"]) not in args.done:
                yield module, bug


def prepare(bugs, watched, waiting):
    """Move the first bug to those that wait for a core, or, before it, the tests to be watched."""
    module, bug = bugs[0]
    files = TESTS[module].split()
    for name in files:
        if name not in watched:
            watched[name] = None
            waiting.append((name, None, None, 3000))
            return
    if all(watched[name] for name in files):
        bugs.popleft()
        order = tests_for([watched[name] for name in files], module, *bug["lines"])
        seconds = 0.0
        for name in order:                              # "tests/test_vae.py::test_shapes"
            file = name.split("/")[1].split(".py")[0]
            seconds += watched[file]["seconds"][name]
        waiting.append((module, bug, order, CPU_SECONDS + 3 * seconds))


def table(outcomes):
    """The score of each module, as lines of markdown."""
    planted = collections.Counter()
    seen = collections.Counter()
    for outcome in outcomes:
        for name in (outcome["module"], "all"):
            planted[name] += 1
            seen[name] += outcome["seen"]
    lines = ["| module | planted | seen | |", "|---|---|---|---|"]
    modules = [name for name in TESTS if planted[name]]
    for name in [*modules, "all"]:
        score = seen[name] / max(1, planted[name])
        lines.append(f"| {name} | {planted[name]} | {seen[name]} | {score:.0%} |")
    return lines


def main():
    """Plant bugs in the modules that the command line names; print which survive."""
    parser = argparse.ArgumentParser(description="Which planted bugs do a module's own tests see?")
    add = parser.add_argument
    add("modules", nargs="*", help="default: all")
    add("--n", type=int, default=12, help="bugs per module")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=1, help="how many at a time, each on a core")
    add("--seconds", type=float, default=1e9, help="start no more after this time")
    add("--json", help="write every outcome here; those that are there are not planted again")
    add("--table", help="only print the table of such a file")
    args = parser.parse_args()
    if args.table:
        print(*table(json.loads(Path(args.table).read_text())), sep="\n")
        return
    args.modules = args.modules or list(TESTS)
    for name in HEAVY:                                  # once, for all forks
        importlib.import_module(name)
    kept = Path(args.json) if args.json else None
    outcomes = json.loads(kept.read_text()) if kept and kept.exists() else []
    args.done = {(outcome["module"], outcome["line"], outcome["change"]) for outcome in outcomes}
    with tempfile.TemporaryDirectory(prefix="mutants_") as place:
        for outcome in run_all(args, Path(place)):
            outcomes.append(outcome)
            if kept:
                kept.write_text(json.dumps(outcomes, indent=1))
            if not outcome["seen"]:
                text = "  survives: {module}.py line {line}, {kind}: {change:.150}"
                print(text.format(**outcome), flush=True)
    print(*table(outcomes), sep="\n")


if __name__ == "__main__":
    main()
