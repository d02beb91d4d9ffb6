"""
results.py: the numbers of many runs in one small file                      (ours; experiments.py)

THE IDEA    A table needs a few numbers of each run, and these are worth keeping when the runs'
            folders are gone. So all of them are written into one results.json, anew whenever a run
            ends: a machine that is taken away in the middle loses only what it was working on.
A PICTURE   out/experiments/base_seed0/report.json  \
            out/experiments/base_seed1/report.json   >  results.json  ->  tables, verdicts, figures
            docs/results/paper.json  (committed)    /
THE RULE    A run is known by its options, written out, and its seed. A row whose options have
            changed is another run.
READ NEXT   ../experiments.py        TEST  tests/test_experiments.py
"""
import math
import threading
from dataclasses import asdict
from pathlib import Path

from config import Config, option_name, parse_arguments
from support.common import UserError, read_json, write_json

# What is kept of a report: these, if they are there.
KEPT = ("alone", "captions", "exact", "rule", "distance", "diffusion_loss", "conditioning_gap",
        "deductions", "parameters", "train_seconds", "seconds")


class Results:
    """The numbers of finished runs: a file, read when it is made. Raises UserError if the file is
    something else."""

    def __init__(self, path):
        self.path = Path(path)
        self.lock = threading.Lock()                    # runs end in several threads
        self.runs = {}                                  # {(options, seed): numbers}
        if not self.path.exists():
            return
        try:
            for run in read_json(self.path)["runs"]:
                numbers = run["numbers"]
                if not all(map(is_number, numbers.values())):
                    raise ValueError(f"a number is missing in {run}")
                self.runs[str(run["options"]), int(run["seed"])] = numbers
        except (OSError, ValueError, ArithmeticError, LookupError, TypeError,
                AttributeError) as problem:
            raise UserError(f"{self.path} does not hold the numbers of runs ({problem}): delete "
                            f"it, and it is made anew from the runs' folders") from None

    def get(self, options, seed):
        """The numbers of a run, or None."""
        return self.runs.get((options, seed))

    def add(self, options, seed, report):
        """Keep a run's numbers, in the file, too. report: the dict of its report.json."""
        numbers = {name: report[name] for name in KEPT if is_number(report.get(name))}
        with self.lock:
            self.runs[options, seed] = numbers
            runs = []
            for (line, number), found in sorted(self.runs.items()):
                runs.append({"options": line, "seed": number, "numbers": found})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"runs": runs})


def is_number(value):
    """Whether a value from a JSON file is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def read_report(path, names):
    """The dict of a report.json. names: of numbers that it must hold, if it has them at all. Raises
    UserError if it is something else."""
    try:
        report = read_json(path)
        # A Llama's report has fewer numbers.
        values = [report[name] for name in names if name in report]
        whole = isinstance(report, dict) and all(map(is_number, values))
    except (OSError, ValueError, TypeError, OverflowError):
        whole = False
    if not whole:
        raise UserError(f"{path} is broken: delete it, and the same command measures that run "
                        f"again")
    return report


def check_options(out, argv):
    """Raise UserError if the run in `out` had other options than `argv`: a table must not mix runs
    from before and after a change of its row."""
    wanted = asdict(parse_arguments(argv)[0])
    try:
        kept = asdict(Config()) | read_json(out / "config.json")
    except (OSError, ValueError, TypeError):
        raise UserError(f"{out}/config.json is missing or broken: delete that folder, and the same "
                        f"command runs this row again") from None
    changed = [name for name in wanted if kept[name] != wanted[name]]
    if changed:
        options = ", ".join(f"{option_name(name)} {kept[name]}" for name in changed)
        raise UserError(f"{out} was run with {options}, which is no longer its row's: delete that "
                        f"folder, or name another place with --out")
