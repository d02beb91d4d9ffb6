"""
mutants.py: plants bugs, one at a time, and asks whether a module's own tests see them

THE IDEA    A test that cannot fail proves nothing. So a copy of the repository gets one small bug, such as
            a comparison turned round, a sign swapped, a term dropped, an index shifted, a detach lost;
            then the tests of that module run. A bug that no test sees "survives" and is listed.
THE RULE    score = bugs seen / bugs planted; a bug that changes nothing (an equivalent one) has to be
            argued away by hand, in docs/RESULTS.md
TRY IT      python tests/mutants.py diffusion model --n 12 --seed 0
"""
import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
TESTS = {                                               # module: the tests that are its own
    "data": "test_data", "attention_mask": "test_attention_mask", "diffusion": "test_diffusion",
    "patchify": "test_patchify", "vae": "test_vae test_train_vae", "model": "test_model",
    "train": "test_train", "sample": "test_sample", "evaluate": "test_evaluate",
    "chameleon": "test_chameleon", "config": "test_errors test_train",
    "autoencoder/losses": "test_vae_losses test_train_vae",
    "autoencoder/perceptual": "test_vae_losses", "autoencoder/train": "test_train_vae test_trust",
    "sources/scenes": "test_scenes", "sources/edits": "test_edits", "sources/mnist": "test_sources",
    "sources/folder": "test_sources", "sources/feed": "test_train test_chameleon",
    "metrics/gap": "test_evaluate test_chameleon", "metrics/scenes": "test_evaluate",
    "metrics/digits": "test_evaluate", "metrics/mixtures": "test_mixtures",
    "metrics/likelihood": "test_likelihood", "metrics/questions": "test_questions",
    "metrics/coco": "test_coco",
    "scale/plan": "test_plan", "scale/shards": "test_shards", "scale/pack": "test_shards",
    "scale/streams": "test_shards", "scale/distributed": "test_distributed",
}
FLIPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
           ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
           ast.IsNot: ast.Is}
SWAPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
           ast.FloorDiv: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
TURNED = {"min": "max", "max": "min", "cumsum": "cumprod", "any": "all", "all": "any",
          "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "ones_like": "zeros_like"}
DROPPED = ("detach", "clamp", "sqrt", "square", "flip", "clone")


# ------------------------------------------------------------------------------------- planting
def places(tree):
    """[(node, kind)]: where a bug can be planted, and which."""
    found = []
    for node in ast.walk(tree):
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
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in TURNED:
                found.append((node, "function"))
            elif node.func.attr in DROPPED:
                found.append((node, "call dropped"))
    return found


def is_arithmetic(node):
    """Whether an expression is no text: texts are added up, too, but only in messages."""
    return not any(isinstance(part, (ast.JoinedStr, ast.Constant)) and
                   not isinstance(getattr(part, "value", 0), (int, float))
                   for part in ast.walk(node))


def ignored(tree):
    """Nodes in which a bug would be no bug: messages, docstrings, decorators, the demo at the end."""
    skip = set()
    for node in ast.walk(tree):
        demo = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
        message = isinstance(node, ast.Raise)
        printing = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("print", "tqdm")
        if demo or message or printing:
            skip |= {id(part) for part in ast.walk(node)}
    return skip


def plant(node, kind):
    """Change the node in place, or return the one to put there."""
    if kind == "comparison":
        node.ops[0] = FLIPPED[type(node.ops[0])]()
    elif kind == "operator":
        node.op = SWAPPED[type(node.op)]()
    elif kind == "number":
        node.value = node.value + 1 if isinstance(node.value, int) else node.value * 1.5
    elif kind == "and / or":
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif kind == "function":
        node.func.attr = TURNED[node.func.attr]
    return {"term dropped": getattr(node, "left", None), "sign dropped": getattr(node, "operand", None),
            "call dropped": getattr(getattr(node, "func", None), "value", None)}.get(kind, node)


class Put(ast.NodeTransformer):
    """Put `new` in place of `old`."""

    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        """The new node instead of the old one; the others stay."""
        return self.new if node is self.old else self.generic_visit(node)


def mutants(source, n, seed):
    """Up to n (line, kind, code before, source with one bug), chosen by the seed."""
    random.seed(seed)
    count = len(places(ast.parse(source)))
    order = random.sample(range(count), count)
    chosen = []
    for k in order:
        tree = ast.parse(source)
        node, kind = places(tree)[k]
        if id(node) in ignored(tree) or isinstance(getattr(node, "value", None), bool):
            continue
        line, before = node.lineno, ast.unparse(node)
        after = plant(node, kind)
        if after is not node:
            tree = Put(node, after).visit(tree)
        text = ast.unparse(ast.fix_missing_locations(tree))
        chosen.append((line, kind, f"{before}  ->  {ast.unparse(after)}", text))
        if len(chosen) == n:
            break
    return chosen


# -------------------------------------------------------------------------------------- running
def copy_of_the_house():
    """A copy of the repository without what is large and not needed."""
    copy = Path(tempfile.mkdtemp()) / "house"
    skip = shutil.ignore_patterns(".git", "out", "notebooks", "__pycache__", ".pytest_cache", "packed")
    shutil.copytree(HOME, copy, ignore=skip)
    return copy


def is_seen(copy, tests, seconds):
    """Whether one of the tests fails, or does not end."""
    files = [f"tests/{name}.py" for name in tests.split() if (copy / f"tests/{name}.py").exists()]
    line = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
            "-o", "addopts=", *files]
    try:
        done = subprocess.run(line, cwd=copy, timeout=seconds, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def main():
    """Plant bugs in the modules that the command line names; print which survive."""
    parser = argparse.ArgumentParser(description="Which planted bugs do a module's own tests see?")
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="default: all")
    parser.add_argument("--n", type=int, default=12, help="bugs per module")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    copy = copy_of_the_house()
    planted, seen = 0, 0
    for module in args.modules:
        path = copy / f"{module}.py"
        source = path.read_text()
        began = time.time()
        if is_seen(copy, TESTS[module], 1200):
            print(f"{module}: its tests fail without a bug; skipped")
            continue
        seconds = 60 + 5 * (time.time() - began)
        caught = 0
        for line, kind, change, text in (chosen := mutants(source, args.n, args.seed)):
            path.write_text(text)
            if is_seen(copy, TESTS[module], seconds):
                caught += 1
            else:
                print(f"  survives: {module}.py line {line}, {kind}: {change[:150]}", flush=True)
        path.write_text(source)
        print(f"{module}: {caught} of {len(chosen)} seen", flush=True)
        planted, seen = planted + len(chosen), seen + caught
    print(f"all: {seen} of {planted} seen ({seen / max(1, planted):.0%})")


if __name__ == "__main__":
    main()
