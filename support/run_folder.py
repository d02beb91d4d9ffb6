"""
run_folder.py: what one training run keeps in its folder

THE IDEA    Everything that a run leaves behind lies in out/<name>/. Before any work is done the folder is asked three things: can
            it be written, does it hold another run, and, on --resume, is it the same run? Then it keeps the log.
A PICTURE   out/<name>/  config.json   log.jsonl   curves.png   samples.png   report.json   model.pt   checkpoints/
READ NEXT   ../train.py        TEST  tests/test_train.py, tests/test_errors.py
"""
import json
import os
from dataclasses import asdict
from pathlib import Path

from support.common import UserError


# ------------------------------------------------------------------------------------------------- before any work is done
def check_writable(out):
    """Raise UserError if nothing can be written to the folder `out`, whether or not it exists already."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{out} cannot be written: {there} is a file; name another folder with --out")
    if not os.access(there, os.W_OK):
        raise UserError(f"{out} cannot be written: {there} is read-only; name another folder with --out")


def check_start(out, complete, resume, overwrite):
    """Raise UserError if the folder does not fit the wish. complete: steps of the checkpoints that are there;
    resume, overwrite: what the command line asks for."""
    if complete and not (resume or overwrite):
        raise UserError(f"{out} already holds a run: add --resume to go on with it, --overwrite to start anew, or "
                        f"name another folder with --out")
    if resume and not complete:
        raise UserError(f"there is nothing to resume: {out}/checkpoints has no complete checkpoint")
    check_writable(out)


def check_same_run(out, config, may_change):
    """Raise UserError if the run in `out` had another configuration, in a way that changes the run.
    config: config.Config; may_change: names of the fields that may differ."""
    default = asdict(type(config)())                        # an older run lacks the newest options
    try:
        before = default | json.loads((out / "config.json").read_text())
        changed = [k for k, v in asdict(config).items() if before[k] != v and k not in may_change]
        same_rows = before["documents"] * before["accumulate"] == config.documents * config.accumulate
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise UserError(f"{out}/config.json cannot be read ({problem}): is {out} the folder of a run?") from None
    if config.data == "shards" and same_rows:               # the same rows in smaller pieces
        changed = [k for k in changed if k not in ("documents", "accumulate")]
    if changed:
        options = ", ".join(f"--{k.replace('_', '-')} {before[k]}" for k in changed)
        raise UserError(f"{out} was trained with {options}; resume with the same options, or start a new run with "
                        f"another --out")


def check_same_data(out, described):
    """Raise UserError if the run in `out` has learned from shards of another tokenizer, VAE, or layout.
    described: what the feed says of itself (`Feed.describe`)."""
    before = json.loads((out / "config.json").read_text()).get("packed") or {}
    now = described.get("packed", {})
    other = [k for k, v in before.items() if now.get(k) != v]
    if other:
        raise UserError(f"{out} has learned from shards with another {' and '.join(other)} ({before[other[0]]}, now "
                        f"{now.get(other[0])}): put those back, or start a new run with another --out")


# ----------------------------------------------------------------------------------------------------------------- the log
def write_config(out, config, described):
    """Write config.json: every option, and what the feed says of its data."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(config) | described, indent=1))


class Log:
    """log.jsonl: one dict per line. rows: those up to the step at which the run goes on."""

    def __init__(self, out, step):
        self.path = Path(out) / "log.jsonl"
        self.rows = []
        if step and self.path.exists():
            lines = self.path.read_text().splitlines()
            whole = [json.loads(line) for line in lines if line.endswith("}")]      # a killed run may leave half a line
            self.rows = [row for row in whole if row["step"] <= step]

    def start(self):
        """Write what is kept. Only rank 0 calls this, and `add`."""
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row):
        """Append a line."""
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def last(self, name):
        """The newest value under a name, or None."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)
