"""
voices.py: what the code says of itself, collected

THE IDEA    Comments speak in four voices: what the paper says, what we chose because it is silent,
            where we differ from it, and which bugs others shipped. This collects them in one page.
TRY IT      python -m docs.voices          writes docs/VOICES.md
TEST        tests/test_house.py            holds the page against the code
"""
import ast
import tokenize
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
PAGE = HOME / "docs" / "VOICES.md"
ROOMS = ("", "sources", "autoencoder", "scale", "metrics", "support")
VOICES = {
    "Our choice:": "Our choices, where the paper is silent",
    "Differs from the paper:": "Where we differ from the paper",
    "TRAP:": "Traps: real mistakes that others made, or that we made first",
    "Paper:": "What the paper says",
}


def source_files():
    """Every .py file outside the tests, concept files first."""
    return [path for room in ROOMS for path in sorted((HOME / room).glob("*.py"))]


def comments(path):
    """[(line number, column, text)] of a file's comments, without the "# "."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    return [(*token.start, token.string.removeprefix("#").strip())
            for token in tokens if token.type == tokenize.COMMENT]


def function_at(path, line):
    """The dotted name of the innermost function or class around a line, "" at the top level."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        kinds = ast.FunctionDef, ast.ClassDef
        if isinstance(node, kinds) and node.lineno <= line <= node.end_lineno:
            names.append((node.lineno, node.name))
    return ".".join(name for _, name in sorted(names))


def passages(path):
    """[(voice, text, line number)] of a file: a comment that begins with a voice, and the comments
    below it in the same column."""
    found = []
    before = (-1, -1)                                   # line and column of the comment above
    for line, column, text in comments(path):
        voice = next((voice for voice in VOICES if text.startswith(voice)), None)
        if voice:
            found.append([voice, text.removeprefix(voice).strip(), line])
        elif found and before == (line - 1, column):
            found[-1][1] += " " + text
        else:
            continue
        before = (line, column)
    return found


def collect():
    """The page as text."""
    lines = ["# What the code says of itself", "",
             "Collected from the comments by `python -m docs.voices`; a test keeps it so.", ""]
    everything = []
    for path in source_files():
        for voice, text, line in passages(path):
            everything.append((path, voice, text, line))
    for voice, title in VOICES.items():
        lines += [f"## {title}", ""]
        for path, spoken, text, line in everything:
            if spoken == voice:
                module = path.relative_to(HOME).with_suffix("").as_posix().replace("/", ".")
                name = f"{module}.{function_at(path, line)}".rstrip(".")
                lines.append(f"- `{name}`: {text}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(collect(), encoding="utf-8")
    print(f"wrote {PAGE}")
