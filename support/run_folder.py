"""
run_folder.py: what one training run keeps in its folder

THE IDEA    Everything that a run leaves behind lies in out/<name>/. Before any work is done, the
            folder is checked: it can be written, it holds no other run, and on --resume it holds
            the same run. Then it keeps the log.
A PICTURE   out/<name>/  config.json   log.jsonl   curves.png   samples.png   report.json
                         model.pt      checkpoints/
READ NEXT   train.py        TEST  tests/test_train.py, tests/test_errors.py
"""
import json
import os
from dataclasses import asdict
from pathlib import Path

from support.common import UserError, load_json


# ------------------------------------------------------------------------- before any work is done
def check_folder(out):
    """Raise UserError if nothing can be written to the folder `out`, which need not exist yet."""
    exists = out.absolute()
    while not exists.exists():                          # the part of its path that is there
        exists = exists.parent
    if not exists.is_dir():
        raise UserError(f"{out} cannot be written: {exists} is a file; name another folder with "
                        f"--out")
    if not os.access(exists, os.W_OK):
        raise UserError(f"{out} cannot be written: {exists} is read-only; name another folder with "
                        f"--out")


def check_start(out, complete, resume, overwrite):
    """Raise UserError if the folder does not fit what the command line asks for. complete: the
    steps of its checkpoints; resume, overwrite: whether the options were given."""
    if complete and not (resume or overwrite):
        raise UserError(f"{out} already holds a run: add --resume to go on with it, --overwrite to "
                        f"start anew, or name another folder with --out")
    if resume and not complete:
        raise UserError(f"there is nothing to resume: {out}/checkpoints has no complete checkpoint")
    check_folder(out)


def check_same_run(out, config, may_change):
    """Raise UserError if the run in `out` had another configuration, in a way that changes the run.
    config: config.Config; may_change: names of the fields that may differ."""
    before = read_config(out, config)
    now = asdict(config)
    changed = [name for name in now if now[name] != before[name] and name not in may_change]

    # A step of packed shards may be cut into other micro-batches: it has the same rows.
    same_rows = (before["documents"] * before["accumulate"] == config.documents * config.accumulate)
    if config.data == "shards" and same_rows:
        changed = [name for name in changed if name not in ("documents", "accumulate")]
    if changed:
        options = ", ".join(f"--{name.replace('_', '-')} {before[name]}" for name in changed)
        raise UserError(f"{out} was trained with {options}; resume with the same options, or start "
                        f"a new run with another --out")


def read_config(out, config):
    """The options of the run in `out`: {name: value}. An older run lacks the newest options: they
    had their defaults. Raises UserError if config.json is missing or damaged."""
    default = asdict(type(config)())
    try:
        return default | load_json((out / "config.json").read_text())
    except (OSError, ValueError, TypeError) as problem:
        raise UserError(f"{out}/config.json cannot be read ({problem}): is {out} the folder of a "
                        f"run?") from None


def check_same_data(out, described):
    """Raise UserError if the run in `out` has learned from other data: other captions or pictures,
    or shards with another tokenizer, VAE, or layout. described: what the feed says of its data
    (`describe`)."""
    kept = load_json((out / "config.json").read_text())
    for part, now in described.items():
        before = kept.get(part)
        if before is None and kept.get("data_dir"):
            raise UserError(f"{out} was begun by an earlier version of this program, which split "
                            f"folders into training and test otherwise: start a new run with "
                            f"another --out")
        changed = [name for name, value in (before or {}).items() if now.get(name) != value]
        if changed:
            first = changed[0]
            example = difference(before[first], now.get(first))
            raise UserError(f"{out} has learned from {kept.get('data')} with another "
                            f"{' and '.join(changed)} ({example}): put those back, or start a new "
                            f"run with another --out")


def difference(before, now):
    """What two values of the data's description differ in, in a few words."""
    if isinstance(before, str) and isinstance(now, str):
        words = set(before.split())
        words_now = set(now.split())
        if len(words) > 1 and words != words_now:       # a vocabulary
            gone = sorted(words - words_now)
            new = sorted(words_now - words)
            return f"gone: {', '.join(gone[:5]) or 'none'}; new: {', '.join(new[:5]) or 'none'}"
    return f"{before}, now {now}"


# ----------------------------------------------------------------------------------------- the log
def write_config(out, config, described):
    """Write config.json: every option, and what the feed says of its data."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(config) | described, indent=1))


class Log:
    """log.jsonl: one dict per line. rows: those up to the step at which the run goes on, which are
    read when the Log is made."""

    def __init__(self, out, step):
        self.path = Path(out) / "log.jsonl"
        self.rows = []
        if step == 0 or not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            if not line.endswith("}"):                  # a run that was killed left half a line
                continue
            row = json.loads(line)
            if row["step"] <= step:                     # what came later is done again
                self.rows.append(row)

    def start(self):
        """Write the rows that are kept. Only rank 0 calls this, and `add`."""
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row):
        """Append a row, at once: a crash loses nothing that was logged."""
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def last(self, name):
        """The newest value under a name, or None."""
        for row in reversed(self.rows):
            if name in row:
                return row[name]
        return None
