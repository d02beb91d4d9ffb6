"""
run_folder.py: what one training run keeps in its folder

THE IDEA    Everything that a run leaves behind lies in out/<name>/. Before any work is done, the
            folder is checked: it can be written, no other training writes to it, it holds no other
            run, and on --resume it holds the same run. Then it keeps the log.
A PICTURE   out/<name>/  config.json   log.jsonl   curves.png   samples.png   report.json
                         model.pt      checkpoints/
                         parts.pt      what model.pt has beside its weights
                         vae.pt, vae/  if the run trains its own VAE
                         .lock         while it trains
READ NEXT   train.py
TEST        tests/test_run_folder.py, tests/test_train_runs.py, tests/test_damaged_files.py
"""
import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from support.common import UserError, load_json, read_json, read_whole, whole_file, write_json


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


@contextlib.contextmanager
def lock(out):
    """Keep every other training out of the folder `out` for as long as the `with` lasts, or the
    process lives. Raises UserError if another one is at work there."""
    check_folder(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    file_lock = FileLock(out / ".lock")                 # the system frees it when the process dies
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another training is at work in {out}: wait until it ends, stop it, or "
                        f"name another folder with --out") from None
    try:
        yield
    finally:
        # Removed while it is held. Otherwise it could be another training's lock by now.
        with contextlib.suppress(PermissionError):      # Windows: not while it is open
            (out / ".lock").unlink(missing_ok=True)
        file_lock.release()
        for folder in made:                             # a run that was refused leaves no folder
            with contextlib.suppress(OSError):          # it is not empty: there was a run
                folder.rmdir()


def check_start(out, complete, resume, overwrite):
    """Raise UserError if the folder does not fit what the command line asks for. complete: the
    steps of its checkpoints; resume, overwrite: whether the options were given."""
    if complete and not (resume or overwrite):
        raise UserError(f"{out} already holds a run: add --resume to go on with it, --overwrite to "
                        f"start anew, or name another folder with --out")
    begun = complete or has_begun_vae(out)
    if resume and not begun:
        raise UserError(f"there is nothing to resume: {out}/checkpoints has no complete checkpoint")
    kept = [name for name in ("model.pt", "vae.pt", "vae/last.pt") if (out / name).exists()]
    if kept and not (resume or overwrite):
        go_on = "--resume to go on, " if begun else ""
        raise UserError(f"{out} already holds {kept[0]}, but no checkpoint of a run: add {go_on}"
                        f"--overwrite to lose it, or name another folder with --out")
    check_folder(out)


def has_begun_vae(out):
    """Whether a run in `out` was stopped during, or after, the training of its VAE."""
    kept = (out / "vae.pt").exists() or (out / "vae/last.pt").exists()
    return kept and (out / "config.json").exists()


def check_same_run(out, config, may_change):
    """Raise UserError if the run in `out` had another configuration, in a way that changes the run.
    config: config.Config; may_change: names of the fields that may differ."""
    before = read_config(out, config)
    now = asdict(config)
    changed = [name for name in now if now[name] != before[name] and name not in may_change]

    # A run may end early. Then its rate falls as it was planned.
    if config.steps < before["steps"]:
        changed.remove("steps")

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
    options = default | {k: v for k, v in read_kept(out).items() if k in default}
    for name, value in options.items():
        number = isinstance(value, int) and isinstance(default[name], float)
        if type(value) is not type(default[name]) and not number:
            raise UserError(f"{out}/config.json was changed by hand: {name} cannot be {value!r}")
    return options


def read_kept(out):
    """The dict of config.json. A full disk, or a power cut, may have emptied it: every checkpoint
    has a copy. Raises UserError if none can be read."""
    copies = sorted(out.glob("checkpoints/step_*/config.json"))
    problem = "it is missing"
    for path in (out / "config.json", *reversed(copies)):
        try:
            kept = read_json(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as reason:
            problem = reason
            continue
        if isinstance(kept, dict):
            return kept
        problem = f"it holds a {type(kept).__name__}"
    raise UserError(f"{out}/config.json cannot be read ({problem}): is {out} the folder of a run?")


def check_same_data(out, described, describe_as_before):
    """Raise UserError if the run in `out` has learned from other data: other captions or pictures,
    or shards with another tokenizer, VAE, or layout.

    described           what the feed says of its data (`describe`)
    describe_as_before  function () -> what earlier versions said otherwise. It may take minutes, so
                        it is called only if something differs"""
    kept = read_kept(out)
    for part, now in described.items():
        before = kept.get(part)
        if before is None and kept.get("data_dir"):
            raise UserError(f"{out} was begun by an earlier version of this program, which split "
                            f"folders into training and test otherwise: start a new run with "
                            f"another --out")
        changed = [name for name, value in (before or {}).items() if now.get(name) != value]
        if changed:
            earlier = describe_as_before().get(part, {})
            changed = [name for name in changed if earlier.get(name) != before[name]]
        if changed:
            first = changed[0]
            example = difference(before[first], now.get(first))
            raise UserError(f"{out} has learned from other data; what differs: "
                            f"{', '.join(changed)} ({example}): put those back, or start a new "
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
    write_json(out / "config.json", asdict(config) | described)


class Log:
    """log.jsonl: one dict per line. rows: those up to the step at which the run goes on, which are
    read when the Log is made.

    fits    function (dict) -> whether it is a row that this program wrote"""

    def __init__(self, out, step, fits=None):
        self.path = Path(out) / "log.jsonl"
        self.rows = []
        if step == 0 or not self.path.exists():
            return
        # A killed run leaves half a line, a power cut perhaps zeros. Such a line is left out: it is
        # no reason to lose the run.
        for line in read_whole(self.path).split(b"\n"):
            try:
                row = load_json(line)
            except ValueError:
                continue
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                continue
            if row["step"] <= step and (fits is None or fits(row)):     # what came later is done
                self.rows.append(row)                                   # again

    def start(self):
        """Write the rows that are kept. Only rank 0 calls this, and `add`."""
        with whole_file(self.path) as file:
            for row in self.rows:
                file.write(json.dumps(row).encode() + b"\n")

    def add(self, row):
        """Append a row, at once: a crash loses nothing that was logged."""
        self.rows.append(row)
        try:
            with open(self.path, "ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as problem:
            raise UserError(f"{self.path} could not be written ({problem.strerror}): what was "
                            f"saved before is still good; make room, then go on") from None

    def last(self, name):
        """The newest value under a name, or None."""
        for row in reversed(self.rows):
            if name in row:
                return row[name]
        return None
