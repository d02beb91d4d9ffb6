"""
reference.py: is my loss normal?                                         (ours; docs/PAPER.md §4.14)

THE IDEA    A loss is normal if others had the same at this step. So the repository keeps the log of
            a real run, and curves.png draws yours over it.
A PICTURE   assets/logs/scenes.jsonl    {"config": {...}, "origin": {...}}     which run it was
                                        {"step": 50, "lm": 1.9429, ...}        lines of its log
THE RULE    A run is compared with one that differs from it in nothing but the seed, the number of
            steps, and what changes nothing that is learned. For all others there is no reference.
READ NEXT   figures.py
TRY IT      python -m support.reference out/scenes      keeps that run's log as a reference
TEST        tests/test_reference.py
"""
import json
from dataclasses import asdict
from pathlib import Path

from support import checkpoint
from support.common import (
    ASSETS,
    Parser,
    UserError,
    load_json,
    read_json,
    read_lines,
    run_command,
    whole_file,
)

LOGS = ASSETS / "logs"
KEPT = ("step", "lm", "diffusion", "by_t", "gap")       # of a line of log.jsonl

# Runs that differ in these alone can be compared. With other steps, the rate falls otherwise.
MAY_DIFFER = {
    "seed", "steps", "out", "data_dir", "log_every", "gap_every", "save_every", "samples",
    "sample_steps", "guidance", "sampler", "checkpointing", "compile", "shard",
    "keep_every",
}
# Those of a new VAE do not matter where assets/ has one.
OF_A_NEW_VAE = {"vae_steps", "vae_lr", "vae_channels", "vae_z", "vae_balance"}


def find(config):
    """The rows of the log of a run like this one: a list of dicts with the names in KEPT. Empty if
    none is kept. config: config.Config."""
    for path in sorted(LOGS.glob("*.jsonl")):
        (_, head), *lines = read_lines(path, "row of a log")
        if is_like(config, load_json(head)["config"]):
            return [load_json(line) for _, line in lines]
    return []


def describe(rows):
    """What to say of curves.png. rows: those that `find` has found."""
    if rows:
        return "dotted: a run like it"
    return "your run alone: the log of a run like it is not kept here"


def is_like(config, other):
    """Whether a config.Config says the same as the options of another run, a dict, but for those
    that may differ."""
    own = asdict(config)
    other = asdict(type(config)()) | other              # an older run lacks the newest options
    for options in (own, other):
        # How a step is cut into micro-batches does not matter. 0: as many as fit, one in a toy.
        options["documents"] *= options.pop("accumulate") or 1
    ignored = set(MAY_DIFFER)
    if config.model == "llama":                         # it has no pictures: lambda is not used
        ignored.add("lam")
    if (ASSETS / f"{config.data}_vae.pt").exists():
        ignored |= OF_A_NEW_VAE
    return all(own[name] == other[name] for name in own if name not in ignored)


def keep(out, name=None):
    """Keep the log of the run in the folder `out` as a reference. Returns its path. name: of the
    reference; default: that of the folder. Raises UserError if it is no folder of a run."""
    out = Path(out)
    try:
        options = read_json(out / "config.json")
        # Not what the feed adds of its data: of a folder these are all its words.
        config = {name: value for name, value in options.items() if not isinstance(value, dict)}
        origin = checkpoint.load(out / "model.pt", "model").get("origin", {})
        rows = [load_json(line) for _, line in read_lines(out / "log.jsonl", "row of a log")]
    except (OSError, ValueError) as problem:
        raise UserError(f"{out} is not the folder of a finished run: {problem}") from None
    path = LOGS / f"{name or out.name}.jsonl"
    with whole_file(path) as file:
        for row in [{"config": config, "origin": origin}, *map(short, rows)]:
            file.write(json.dumps(row).encode() + b"\n")
    return path


def short(row):
    """A row of a log as a reference keeps it: what is drawn, in four digits."""
    kept = {}
    for name in KEPT:
        if name in row:
            kept[name] = round(row[name], 4) if isinstance(row[name], float) else row[name]
    return kept


def main(argv=None):
    """Keep the log of the run that the command line names."""
    parser = Parser(
        prog="python -m support.reference",
        description="Keep the log of a finished run as the reference that curves.png shows.")
    parser.add_argument("out", help="the run's folder, e.g. out/scenes")
    parser.add_argument("--name", help="of the reference; default: that of the folder")
    args = parser.parse_args(argv)
    print(f"wrote {keep(args.out, args.name)}")


if __name__ == "__main__":
    run_command(main)
