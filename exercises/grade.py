"""
grade.py: one line of advice for each function of a file, or a table for a folder of files

THE IDEA    A submission is code that may do anything: raise, print, exit, or never end. So each of
            its functions is tried in a process of its own, which has ten seconds. The processes are
            forks of this one, which has imported everything already; they start at once.
A PICTURE   grade.py --+-- fork: import student.py, check intervals   ->  verdict, as JSON
                       +-- fork: import student.py, check patchify    ->  ...
                       +-- ...                                        ->  10 s are over: killed
            then, for each that is right and unless --no-reward, a fork that draws with it
TRY IT      python exercises/stubs.py > student.py       then fill in some of it, and
            python exercises/grade.py student.py         one line each; --json for programs
            python exercises/grade.py folder/            one table for all *.py in it
EXIT        how many of the eight exercises are not right; for a folder, how many submissions are
            not right in all; 100 if there is nothing to grade
TEST        tests/test_exercises.py
"""
import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # the modules lie one folder up

import torch

from exercises.checks import EXERCISES, verdict
from exercises.trial import NotWritten, TooLong, Verdict, place, shorten, time_limit

LIMIT = 10.0                                            # seconds for a check, its import included
IMPORT_LIMIT = 8.0                                      # so that a slow import is called one
REWARD_LIMIT = 30.0                                     # and for a picture
MEMORY = 4 * 2 ** 30                                    # bytes that an answer may ask for
NOTHING_TO_GRADE = 100                                  # exit status; more than there are exercises


# ------------------------------------------------------------------------- in a process of its own
def try_function(path, name, connection):
    """Import a submission and send the Verdict on one of its functions, as JSON."""
    be_quiet()
    try:
        answer = load_function(path, name)
        said = verdict(name, answer)
        if said.status == "right" and answer is EXERCISES[name].reference:
            said.advice = "Right. (It is the module's own function, imported.)"
    except NotWritten:
        said = Verdict("not written", f"Not written yet: the file has no function `{name}`.")
    except BrokenFile as problem:
        said = Verdict("broken file", str(problem))
    connection.send_bytes(json.dumps(asdict(said)).encode())


def draw_with(path, name, folder, connection):
    """Import a submission, draw with one of its functions, and send what came out, as JSON."""
    be_quiet()
    from exercises import rewards
    sentence, picture = rewards.draw(name, load_function(path, name), folder)
    found = {"reward": sentence, "picture": picture and str(picture)}
    connection.send_bytes(json.dumps(found).encode())


def be_quiet():
    """Send to nowhere what this process prints, and let it not take all the machine's memory."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):                            # those of C code, too
        os.dup2(nowhere, stream)
    # A loop that appends for ten seconds would fill the memory of the teacher's laptop.
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):          # Windows has no limits, macOS not this one
        pass


class BrokenFile(Exception):
    """The submission cannot be imported. The message says why."""


def load_function(path, name):
    """A submission's function. Raises BrokenFile, or NotWritten if there is none of that name."""
    # At the end, so that a submission's data.py does not take the place of ours.
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location("student", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["student"] = module                     # dataclasses and pickle look there
    try:
        with time_limit(IMPORT_LIMIT):
            spec.loader.exec_module(module)
    except SyntaxError as problem:
        line = f" in line {problem.lineno}" if problem.lineno else ""
        raise BrokenFile(f"it is not Python{line}: {shorten(problem.msg)}") from None
    except SystemExit:
        raise BrokenFile("it ends the program (exit)") from None
    except TooLong:
        raise BrokenFile("it does not come to its end: is there a loop outside of the "
                         "functions?") from None
    except Exception as problem:
        kind = type(problem).__name__
        raise BrokenFile(f"{kind}: {shorten(problem)}{place(problem, str(path))}") from None
    if not hasattr(module, name):
        raise NotWritten
    return getattr(module, name)


# ---------------------------------------------------------------------------------- in this process
def in_forks(target, arguments, limit):
    """What each call of `target` sends back, as a list of dicts; a str where nothing came back.

    target      function (*one of arguments, connection)
    arguments   list of tuples; each call has a process of its own, all at the same time
    limit       seconds until those that still run are killed"""
    # Windows cannot fork: there each process imports everything anew.
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if can_fork else "spawn")
    processes = []
    for each in arguments:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=target, args=(*each, there), daemon=True)
        process.start()
        there.close()                                   # else its end would never be seen here
        processes.append((process, here))

    results = []
    deadline = time.monotonic() + limit
    try:
        for _, here in processes:
            results.append(receive(here, deadline, limit))
    finally:
        for process, _ in processes:
            process.kill()
            process.join()
    return results


def receive(connection, deadline, limit):
    """The dict that a process has sent until the deadline, or a str that says why there is none."""
    if not connection.poll(max(0.0, deadline - time.monotonic())):
        return (f"It does not end: stopped after {limit:.0f} seconds. A right answer takes a few "
                f"thousandths of one.")
    try:
        return json.loads(connection.recv_bytes())
    except (EOFError, ValueError):
        return "It ended the whole process: an exit, or more memory than there is?"


def grade(path, reward=False):
    """The verdicts on one submission: a list of dicts, one for each function.

    path      a Path
    reward    whether to draw with what is right, into out/exercises/<name of the file>/"""
    names = list(EXERCISES)
    rows = []
    for name, found in zip(names, in_forks(try_function, [(path, name) for name in names], LIMIT)):
        if isinstance(found, str):
            found = asdict(Verdict("wrong", found))
        row = {"exercise": EXERCISES[name].number, "name": name, "reward": "", "picture": None}
        rows.append(row | found)
    if reward:
        folder = Path("out/exercises") / path.stem
        for row in rows:
            if row["status"] == "right":                # one by one: each wants the whole machine
                found, = in_forks(draw_with, [(path, row["name"], folder)], REWARD_LIMIT)
                row.update({"reward": found} if isinstance(found, str) else found)
    return rows


def count_wrong(rows):
    """How many of the eight exercises are not right. The last one has two functions."""
    return len({row["exercise"] for row in rows if row["status"] != "right"})


# ------------------------------------------------------------------------------------------ reports
def report(path, rows):
    """The lines to print for one submission."""
    total = len({row["exercise"] for row in rows})
    lines = []
    if all(row["status"] == "broken file" for row in rows):
        lines.append(f"{path} cannot be imported: {rows[0]['advice']}.")
    else:
        for row in rows:
            lines.append(f"{row['exercise']} {row['name']:17s} {row['advice']}")
            if row["reward"]:
                lines.append(" " * 20 + row["reward"])
    lines.append(f"{total - count_wrong(rows)} of {total} right")
    return lines


def table(submissions):
    """The lines of a table: one row for each submission. submissions: {file name: rows}."""
    marks = {"right": "right", "wrong": "wrong", "not written": "-", "broken file": "broken"}
    width = max(len("submission"), *(len(file) for file in submissions))
    heads = [f"{name:6s}" for name in EXERCISES]        # as wide as the widest mark
    lines = [f"{'submission':{width}s}  {'  '.join(heads)}  right"]
    for file, rows in submissions.items():
        cells = []
        for row, head in zip(rows, heads):
            cells.append(marks[row["status"]].ljust(len(head)))
        total = len({row["exercise"] for row in rows})
        right = total - count_wrong(rows)
        lines.append(f"{file:{width}s}  {'  '.join(cells)}  {right} of {total}")
    return lines


def parse_arguments(argv):
    """(paths of the submissions, whether they come from a folder, args). Exits with 100 if there
    is nothing to grade."""
    parser = argparse.ArgumentParser(
        description="Say what is wrong with the functions of a file, or of each file of a folder.")
    parser.add_argument("submission", type=Path, help="student.py, or a folder of such files")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--no-reward", action="store_true",
                        help="do not draw with what is right (a folder never does)")

    def stop(message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(NOTHING_TO_GRADE)

    parser.error = stop
    args = parser.parse_args(argv)
    place = args.submission
    if place.is_dir():
        paths = sorted(place.glob("*.py"))
        if not paths:
            stop(f"there is no *.py in {place}")
        return [path.resolve() for path in paths], True, args
    if not place.is_file():
        stop(f"there is no file {place}: write one with python exercises/stubs.py > student.py")
    if place.suffix != ".py":
        stop(f"{place} must be a Python file, whose name ends in .py")
    return [place.resolve()], False, args


def main(argv=None):
    """Grade as the command line says. Returns the exit status."""
    paths, is_folder, args = parse_arguments(argv)
    torch.set_num_threads(1)                            # a fork of a process with threads may hang
    if not is_folder:
        rows = grade(paths[0], reward=not args.no_reward)
        lines = [json.dumps(rows, indent=1)] if args.json else report(args.submission, rows)
        print(*lines, sep="\n")
        return count_wrong(rows)

    submissions = {}
    for path in paths:
        submissions[path.name] = grade(path)
    lines = [json.dumps(submissions, indent=1)] if args.json else table(submissions)
    print(*lines, sep="\n")
    return min(NOTHING_TO_GRADE - 1, sum(count_wrong(rows) > 0 for rows in submissions.values()))


if __name__ == "__main__":
    sys.exit(main())
