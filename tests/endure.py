"""
endure.py: kills a hundred runs at random, and lets one run for 20,000 steps

    python tests/endure.py kill --n 100         train.py, packing, and a VAE's training
    python tests/endure.py soak --steps 20000   a long run's memory, open files, threads and log

THE IDEA    Whoever trains for weeks is killed: by a full queue, a power cut, an operator. What was
            killed and begun again must end as if nothing had happened, to the bit, and leave
            nothing lying about. And what is fine for a minute may leak for a week.
A PICTURE   begin --SIGKILL--> again, --resume --SIGKILL--> ... --> its end
            begin ------------------- undisturbed ----------------> its end, the same
THE RULE    A kill comes at any time of a run, every third as soon as a file is being written.
            docs/RESULTS.md has the numbers.
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
import train
import vae as vae_module
from autoencoder import train as vae_training
from scale import distributed, pack
from small_runs import log, same, states
from sources import choose
from support import checkpoint
from support.common import run_command

KEPT_ASIDE = {"seconds", "train_seconds"}               # of a report: what depends on the clock


# ------------------------------------------------------------------------------------- one program
def begin(main, argv, said):
    """Start main(argv) in a fork: everything is imported already. Returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        file = open(said, "w")
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        run_command(main, argv)
        file.flush()
        os._exit(0)
    except SystemExit as stop:
        sys.stderr.flush()
        os._exit(stop.code)
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def status_of(child):
    """The exit status of a child that has ended."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def is_writing(folder):
    """Whether a file or a checkpoint in a folder is half written."""
    for path in folder.rglob("*"):
        if path.suffix == ".tmp":
            return True
        if path.name.startswith("step_") and not (path / ".metadata").exists():
            return True
    return False


class Program:
    """What is killed. name; main; argv: a function (folder) -> its arguments; ends: a function
    (folder) -> what must be the same in the end."""

    def __init__(self, name, main, argv, ends):
        self.name = name
        self.main = main
        self.argv = argv
        self.ends = ends

    def run(self, folder, more=()):
        """Run it to its end. Returns (exit status, what it said)."""
        said = folder.with_suffix(".txt")
        status = status_of(begin(self.main, [*self.argv(folder), *more], said))
        return status, said.read_text()

    def again(self, folder):
        """The options with which a user goes on after a kill: what the program itself asks for."""
        if self.name == "scale.pack":                   # the same command goes on
            return []
        saved = list(folder.glob("checkpoints/step_*/.metadata"))
        for name in ("vae.pt", "vae/last.pt", "last.pt"):
            if (folder / name).exists():
                saved.append(name)
        return ["--resume"] if saved else []


def programs(shelf):
    """The three programs, at their smallest."""
    def writing_to(options):
        """A function (folder) -> the options, and --out with that folder."""
        return lambda out: [*options, "--out", str(out)]

    run = ["--pairs", "40", "--documents", "2", "--seq-len", "64", "--patch", "4"]
    run += ["--vae-steps", "6", "--steps", "8"]
    run += ["--save-every", "2", "--log-every", "1", "--gap-every", "4"]
    run += ["--samples", "2", "--sample-steps", "2"]

    packing = ["--text", "scenes", "--pairs", "scenes", "--scenes", "200"]
    packing += ["--vae", str(shelf / "vae.pt"), "--image-size", "32"]
    packing += ["--seq-len", "64", "--shard-rows", "8"]

    learning = ["--steps", "8", "--batch", "4", "--save-every", "1"]

    return [
        Program("train.py", train.main, writing_to(run), ends_of_run),
        Program("scale.pack", pack.main, writing_to(packing), ends_of_packing),
        Program("autoencoder.train", vae_training.main, writing_to(learning), ends_of_vae),
    ]


def ends_of_run(out):
    """{what: value} of a finished run: the last checkpoint to the bit, the log, the report, the
    names of all files."""
    found = {f"state {name}": value for name, value in states(out).items()}
    for name in ("model", "vae"):
        content = checkpoint.load(out / f"{name}.pt", name)
        found |= {f"{name}.pt {key}": tensor for key, tensor in content["weights"].items()}
    report = json.loads((out / "report.json").read_text())
    found["report"] = {key: value for key, value in report.items() if key not in KEPT_ASIDE}
    found["log"] = log(out)
    found["files"] = files_of(out)
    return found


def ends_of_packing(out):
    """The same of packed shards: every byte."""
    found = {}
    for path in out.rglob("*"):
        if path.is_file():
            digest = hashlib.blake2b(path.read_bytes()).hexdigest()
            found[str(path.relative_to(out))] = digest
    return found


def ends_of_vae(out):
    """The same of a VAE."""
    return dict(checkpoint.load(out / "vae.pt", "vae")["weights"]) | {"files": files_of(out)}


def files_of(out):
    """The names of all files and folders."""
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


def save_small_vae(path):
    """Write the smallest VAE, with random weights."""
    small = vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2)
    checkpoint.save(path, checkpoint.pack_vae(vae_module.VAE(small)))


# ------------------------------------------------------------------------------------------- kills
def kill(args):
    """Kill args.n times, and print a line per program. Returns how many runs ended wrongly."""
    torch.manual_seed(0)
    model.SIZES["toy"] = (1, 16, 2)
    checkpoint.ASSETS = Path("/nowhere")                # no VAE is shipped: the run trains its own
    load_pairs = choose.load_pairs

    def load_few_pairs(*given, **options):
        options["n"] = min(options["n"], 40)
        return load_pairs(*given, **options)

    choose.load_pairs = load_few_pairs
    rng = random.Random(args.seed)
    results = {}
    with tempfile.TemporaryDirectory(prefix="endure_") as place:
        shelf = Path(place)
        save_small_vae(shelf / "vae.pt")
        for program, share in zip(programs(shelf), (0.6, 0.2, 0.2)):
            began = time.time()
            status, said = program.run(shelf / "whole")
            seconds = time.time() - began
            assert status == 0, said

            wanted = program.ends(shelf / "whole")
            n = round(share * args.n)
            counts = killed(program, wanted, shelf / "run", n, seconds, rng)
            results[program.name] = counts
            print(json.dumps({program.name: counts}), flush=True)
            shutil.rmtree(shelf / "whole")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    wrong = 0
    for counts in results.values():
        wrong += counts["different"] + counts["refused"] + counts["left over"]
    return wrong


def killed(program, wanted, out, n, seconds, rng):
    """Kill a program n times, about three times per run, and compare every end. Returns counts."""
    what = ("kills", "while writing", "runs", "identical", "different", "refused", "left over")
    counts = dict.fromkeys(what, 0)
    while counts["kills"] < n or out.exists():
        more = program.again(out) if out.exists() else []
        child = begin(program.main, [*program.argv(out), *more], out.with_suffix(".txt"))
        done = 0
        if counts["kills"] < n and rng.random() < 0.8:
            done = kill_at_random(child, out, seconds, counts["kills"] % 3 == 0, rng, counts)
        if not done:
            status = status_of(child)
        else:
            child, status = done
            status = os.waitstatus_to_exitcode(status)
        if status == -signal.SIGKILL:
            continue
        counts["runs"] += 1
        if status != 0:
            counts["refused"] += 1
            print(out.with_suffix(".txt").read_text()[-600:], file=sys.stderr)
        else:
            found = program.ends(out)
            differing = same(wanted, found)
            counts["left over"] += "files" in differing
            counts["identical"] += not differing
            counts["different"] += bool(differing)
            if differing:
                print(program.name, differing[:5], file=sys.stderr)
        shutil.rmtree(out)
    return counts


def kill_at_random(child, out, seconds, while_writing, rng, counts):
    """Send SIGKILL at some time of the run; with `while_writing`, as soon after it as a file is
    half written. Returns what os.waitpid says; the child may have ended before."""
    moment = time.time() + rng.uniform(0, 1.1 * seconds)
    while True:
        done = os.waitpid(child, os.WNOHANG)
        if done[0]:
            return done
        writing = while_writing and is_writing(out)
        if time.time() > moment and (writing or not while_writing):
            break
        time.sleep(0.0005 if while_writing else 0.005)
    os.kill(child, signal.SIGKILL)
    done = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(done[1]) == -signal.SIGKILL:
        counts["kills"] += 1
        counts["while writing"] += writing
    return done


# -------------------------------------------------------------------------------------------- soak
def soak(args):
    """Train the smallest model for many steps, and print what it holds, from the first tenth to the
    last."""
    model.SIZES["toy"] = (1, 16, 2)
    rows = []
    with tempfile.TemporaryDirectory(prefix="endure_") as place:
        out = Path(place) / "run"
        torch.manual_seed(0)
        save_small_vae(Path(place) / "vae.pt")
        argv = ["--vae", f"{place}/vae.pt", "--pairs", "40", "--documents", "1"]
        argv += ["--seq-len", "32", "--patch", "8", "--steps", str(args.steps), "--samples", "0"]
        argv += ["--save-every", "500", "--log-every", "50", "--gap-every", "1000"]
        argv += ["--out", str(out)]

        began = time.time()
        child = begin(train.main, argv, Path(place) / "said.txt")
        while True:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if done:
                break
            rows.append(look(child, out))
            time.sleep(max(0.5, (time.time() - began) / 400))

        said = (Path(place) / "said.txt").read_text()
        assert os.waitstatus_to_exitcode(status) == 0, said[-1000:]
        lines = (out / "log.jsonl").read_bytes().split(b"\n")[:-1]
        kept, _ = distributed.list_checkpoints(out)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())

    rows = [row for row in rows if row and row["step"] > 0]
    tenth = max(1, len(rows) // 10)
    seconds = usage.ru_utime + usage.ru_stime
    print(f"{args.steps} steps, {seconds:.0f} s of a core; {len(rows)} looks")
    for name in ("megabytes", "files", "threads"):
        medians = ""
        for k in (1, 5, 9):                             # the second, the sixth and the last tenth
            part = [row[name] for row in rows[k * tenth: (k + 1) * tenth]]
            medians += f"  {np.median(part):8.1f}"
        largest = max(row[name] for row in rows)
        print(f"{name:10s}{medians}   largest {largest}")
    print(f"log: {len(lines)} lines; "
          f"bytes of the tenth line {len(lines[9])}, of the last {len(lines[-1])}; "
          f"said {len(said)} bytes; checkpoints kept {kept}; the folder {size / 1e6:.1f} MB")
    return 0


def look(child, out):
    """What a process holds now, or None if it is gone."""
    try:
        status = Path(f"/proc/{child}/status").read_text()
        files = len(os.listdir(f"/proc/{child}/fd"))
        lines = 0
        if (out / "log.jsonl").exists():
            lines = (out / "log.jsonl").read_bytes().count(b"\n")
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "VmRSS" not in values:
        return None
    return {
        "step": 50 * lines,                             # --log-every 50
        "files": files,
        "threads": int(values["Threads"]),
        "megabytes": int(values["VmRSS"].split()[0]) / 1024,
    }


def main():
    """Do what the command line says. Exit status 1 if an end was another one."""
    parser = argparse.ArgumentParser(description="Kill runs at random, or let one run for long.")
    add = parser.add_argument
    add("what", choices=("kill", "soak"))
    add("--n", type=int, default=100, help="kills")
    add("--steps", type=int, default=20_000, help="of the soak")
    add("--seed", type=int, default=0)
    add("--json", help="write the counts of the kills here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    return {"kill": kill, "soak": soak}[args.what](args)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
