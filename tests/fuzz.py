"""
fuzz.py: thousands of bad and odd inputs, each in a process of its own

    python tests/fuzz.py --n 6000               all kinds; exit status 1 if anything is wrong
    python tests/fuzz.py --only idx --n 200     one kind
    python tests/fuzz.py --case idx 17          one case again, with its traceback

THE IDEA    Whatever a file holds, and whatever stands on a command line: it is taken rightly, or
            refused with one sentence of ours and exit status 2. Nothing hangs, nothing takes a
            gigabyte, and no file that was given is changed.
A PICTURE   seed --KINDS[kind]--> files in given/, a command --fork, limits--> verdict --> the table
THE RULE    A case is a function of its kind and its number. Each runs in a fork of one process that
            has imported everything, so that thousands take minutes. A few run as real commands.
VERDICTS    accepted    it ran to its end, or to its first seconds of work
            refused     with one sentence of ours
            library     with a sentence of somebody else's, which seldom says what to do
            traceback   a bug           memory    over 1 GB
            hang        over 30 s of a core, or 10 s of waiting for what does not come
            changed     a file that was given, or that all cases share, is not what it was
            wrong       accepted although it is broken, or refused although it is right
"""
import argparse
import collections
import gzip
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import chameleon
import data
import evaluate
import experiments
import model
import sample
import train
import vae as vae_module
from autoencoder import train as vae_training
from diffusion import Diffusion
from metrics import coco, doctor, likelihood, questions, scaling
from scale import export, pack, shards, streams
from sources import edits, folder, mnist, scenes
from support import checkpoint
from support.common import UserError, open_picture, run_command

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 700 * 2 ** 20                      # bytes; every command has 300 MB of libraries
CPU_SECONDS = 30
WALL_SECONDS = 300
WAIT_SECONDS = 10                           # without computing: for a pipe, say
WORK_SECONDS = 0.5                          # of real work; then it counts as accepted
GOOD = ("accepted", "refused")
VERDICTS = (*GOOD, "library", "traceback", "memory", "hang", "changed", "wrong")
EITHER, MUST, NEVER = "either", "must be accepted", "must be refused"


class EnoughError(BaseException):
    """Raised when a command has begun its real work: all that it checks beforehand is done."""


# ------------------------------------------------------------------------------ one case, in a fork
@dataclass
class Outcome:
    """What became of a case. text: the sentence, or the traceback's last line; input: what was
    given, in a few words; seconds (of a core), megabytes (beside
    the libraries): what it took."""
    kind: str
    number: int
    verdict: str = "hang"
    text: str = ""
    input: str = ""
    seconds: float = 0.0
    megabytes: int = 0
    traceback: str = ""


class Running:
    """A case in a fork of its own, from its start on.

    kind, number    of the case        shelf   whole files of every kind
    keep            a folder to leave the input in, or None"""

    def __init__(self, kind, number, shelf, keep=None):
        self.outcome = Outcome(kind, number, text="it was killed: too much time")
        self.keep = keep
        self.place = Path(keep or tempfile.mkdtemp(prefix="fuzz_"))
        self.place.mkdir(exist_ok=True)
        self.answer = self.place / "answer.json"
        self.looked = time.time()
        self.lived = 0.0                                # seconds
        self.waited = 0.0                               # seconds since it was last seen to compute
        self.ticks = 0
        self.inherited = rss()
        self.child = os.fork()
        if self.child == 0:
            try:
                with_limits()
                outcome = judge(kind, number, shelf, self.place)
                self.answer.write_text(json.dumps(asdict(outcome)))
            except BaseException:                       # a bug of this script's
                self.outcome.verdict = "traceback"
                self.outcome.text = "in fuzz.py itself"
                self.outcome.traceback = traceback.format_exc()
                self.answer.write_text(json.dumps(asdict(self.outcome)))
            finally:
                os._exit(0)                             # no clean-up of what the parent still uses

    def poll(self):
        """The Outcome, or None while the case runs. It is killed if it takes too long, or waits for
        something that does not come."""
        done, _, usage = os.wait4(self.child, os.WNOHANG)
        if not done:
            fields = Path(f"/proc/{self.child}/stat").read_text().rsplit(")", 1)[1].split()
            ticks = int(fields[11]) + int(fields[12])
            # Where other programs have the processor, this one looks seldom: such a gap is
            # nobody's waiting.
            passed = min(0.1, time.time() - self.looked)
            self.looked = time.time()
            self.lived += passed
            if fields[0] == "S" and ticks == self.ticks:
                self.waited += passed
            else:
                self.waited = 0.0
            self.ticks = ticks
            if self.waited < WAIT_SECONDS and self.lived < WALL_SECONDS:
                return None
            os.killpg(self.child, signal.SIGKILL)
            _, _, usage = os.wait4(self.child, 0)
        about = self.place / "about.txt"
        if self.answer.exists():
            self.outcome = Outcome(**json.loads(self.answer.read_text()))
        elif about.exists():
            self.outcome.input = about.read_text()
        self.outcome.seconds = round(usage.ru_utime + usage.ru_stime, 2)
        self.outcome.megabytes = max(0, usage.ru_maxrss // 1024 - self.inherited // 2 ** 20)
        # A 7B does take gigabytes. Where they are not there, our sentence counts them.
        counted = self.outcome.text.startswith("out of memory: a process needs")
        counted = counted or any(size in self.outcome.input for size in model.PAPER_SIZES)
        if counted and self.outcome.verdict == "memory":
            self.outcome.verdict = "refused"
        if self.outcome.megabytes * 2 ** 20 > MEMORY and not counted:
            self.outcome.verdict = "memory"
        if not self.keep:
            shutil.rmtree(self.place, ignore_errors=True)
        return self.outcome


def rss():
    """Bytes of memory that this process holds: a fork holds them, too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_cases(cases, shelf, jobs, seconds=float("inf")):
    """Yields the Outcome of every (kind, number), `jobs` at a time; none is begun after some
    seconds."""
    waiting = list(cases)[::-1]
    running = []
    began = time.time()
    while waiting or running:
        if time.time() - began > seconds:
            waiting = []
        while waiting and len(running) < jobs:
            kind, number = waiting.pop()
            running.append(Running(kind, number, shelf))
        finished = False
        for case in list(running):
            outcome = case.poll()
            if outcome:
                running.remove(case)
                finished = True
                yield outcome
        if not finished:
            time.sleep(0.004)


def with_limits():
    """Limit this process: processor time, memory, no core file, no input from the terminal."""
    os.setsid()                                         # what it starts can be killed with it
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    # Address space, above what is mapped already: most of that is libraries and is never touched.
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)


def judge(kind, number, shelf, place):
    """Make the input of a case, run it, and say what became of it. In the child."""
    given = place / "given"
    given.mkdir(exist_ok=True)
    (place / "out").mkdir(exist_ok=True)
    rng = np.random.default_rng([number, zlib.crc32(kind.encode())])
    outcome = Outcome(kind, number)
    case = KINDS[kind](rng, given, shelf)
    outcome.input = case.about
    (place / "about.txt").write_text(case.about, encoding="utf-8", errors="backslashreplace")
    before = contents(given)
    shared = stamps(shelf)
    for path in case.own:
        before.pop(path, None)

    os.chdir(place / "out")
    said = open(place / "said.txt", "w+", encoding="utf-8", errors="backslashreplace")
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    sys.stdout = sys.stderr = said
    outcome.verdict, outcome.text, outcome.traceback = verdict_of(case.action, case.words)
    # A 7B was refused for want of memory: there must be some to look what became of the files.
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = contents(given)
    for path in [path for path in after if path not in before]:
        # What it was told to write, or lies in a folder in which it was told to.
        if any(path == own or path.startswith(f"{own}/") for own in case.own):
            after.pop(path)
    for path in case.own:
        after.pop(path, None)
    if after != before:
        outcome.verdict = "changed"
        outcome.text = f"a file that was given is not what it was: {differing(before, after)}"
    elif stamps(shelf) != shared:
        outcome.verdict = "changed"
        changed = differing(shared, stamps(shelf))
        outcome.text = f"a file that all cases share is not what it was: {changed}"
    elif outcome.verdict == "accepted" and case.wanted == NEVER:
        outcome.verdict = "wrong"
        outcome.text = "accepted, but it is broken"
    elif outcome.verdict == "refused" and case.wanted == MUST:
        outcome.verdict = "wrong"
    return outcome


def verdict_of(action, words):
    """(verdict, sentence, traceback) of a function that reads or runs something. words: of its
    command line."""
    raised = []

    def main(_):
        try:
            action()
        except BaseException as problem:
            raised.append(problem)
            raise

    # Through `run_command`, as every command line: what it makes of an error is tested, too.
    status = 0
    try:
        run_command(main, words)
    except SystemExit as stop:
        status = stop.code
        raised = raised or [UserError("refused before it began")]
    except EnoughError:
        return "accepted", "", ""
    except BaseException:
        text = traceback.format_exc()
        return "traceback", text.strip().splitlines()[-1][:300], text
    if status in (0, None):
        return "accepted", "", ""

    # What the user reads: the last line.
    sys.stderr.flush()
    lines = Path(sys.stderr.name).read_text().replace("\r", "\n").strip().split("\n")
    _, found, sentence = lines[-1].partition("error: ")
    trace = "".join(traceback.format_exception(raised[0]))
    if isinstance(raised[0], MemoryError):              # `run_command` has a sentence for it
        return "memory", sentence[:300], trace
    if status != 2 or not found:
        return "traceback", f"exit status {status}: {lines[-1]}"[:300], trace
    long = len(sentence) > 1000
    if isinstance(raised[0], SystemExit):               # argparse repeats what was typed
        long = False
    if not is_ours(raised[0]) or len(sentence) < 15 or long or not sentence.isprintable():
        return "library", sentence[:300], trace
    return "refused", sentence[:300], trace


def is_ours(problem):
    """Whether the sentence of an error is ours, not that of a library that we called."""
    if isinstance(problem, (UserError, SystemExit)):    # SystemExit: argparse, of an option of ours
        return True
    if isinstance(problem, OSError) and problem.strerror:
        return True                                     # support.common.one_sentence makes it ours
    frames = traceback.extract_tb(problem.__traceback__)
    last = frames[-1]
    return last.filename.startswith(str(ROOT)) and "raise " in (last.line or "raise ")


def contents(folder):
    """{path: what it is, and a hash of it} of all that lies in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        mark = stat.S_IFMT(status.st_mode)
        digest = ""
        if stat.S_ISREG(status.st_mode) and status.st_size < 2 ** 26:
            digest = hashlib.blake2b(path.read_bytes()).hexdigest()
        found[str(path)] = (mark, status.st_size, digest)
    return found


def stamps(folder):
    """{path: size and time of writing} of all that lies in a folder: quicker than `contents`."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


def differing(before, after):
    """The paths that two dicts do not have in common, or that differ."""
    paths = before.keys() | after.keys()
    return sorted(path for path in paths if before.get(path) != after.get(path))


def stop_after_a_while():
    """From the first real work on, let a case run for a moment only."""
    def enough(*_):
        raise EnoughError

    def on_first_call(module, name):
        work = getattr(module, name)

        def begin(*args, **options):
            signal.signal(signal.SIGVTALRM, enough)
            if signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0:
                signal.setitimer(signal.ITIMER_VIRTUAL, WORK_SECONDS)
            return work(*args, **options)

        setattr(module, name, begin)

    for module, name in WORK:
        on_first_call(module, name)


# Where the real work begins, whose length is the user's choice.
WORK = [(train, "train_step"), (sample, "generate"), (sample, "draw"), (pack, "pack_kind"),
        (vae_training, "train_vae"), (likelihood, "score"), (evaluate, "report"),
        (experiments, "train_all"), (scenes, "load_scenes"), (edits, "scene_edits"),
        (coco, "draw_scenes"), (questions, "deduction_questions"), (likelihood, "read_texts")]


# -------------------------------------------------------------------------- what inputs are made of
@dataclass
class Case:
    """An input. action: function () that reads it; wanted: EITHER, MUST or NEVER; about: the input
    in a few words."""
    action: object
    wanted: str = EITHER
    about: str = ""
    own: tuple = ()                                     # files that it is told to write
    words: tuple = ()                                   # of a command line


def pick(rng, options):
    """One of the options."""
    options = list(options)
    return options[rng.integers(len(options))]


def damage(rng, raw):
    """(bytes that are damaged in one of many ways, how)."""
    raw = bytearray(raw)
    n = len(raw)
    ways = ("flip", "flips", "cut", "longer", "insert", "delete", "zeros", "empty", "noise", "text",
            "twice", "head", "swap")
    how = pick(rng, ways)
    k = int(rng.integers(max(1, n)))
    if how == "flip" and n:
        raw[k] ^= 1 << rng.integers(8)
    elif how == "flips" and n:
        for k in rng.integers(n, size=int(rng.integers(2, 65))):
            raw[k] = rng.integers(256)
    elif how == "cut":
        raw = raw[:k]
    elif how == "longer":
        raw += rng.bytes(int(rng.integers(1, 3000)))
    elif how == "insert":
        raw[k:k] = rng.bytes(int(rng.integers(1, 300)))
    elif how == "delete":
        del raw[k: k + int(rng.integers(1, 300))]
    elif how == "zeros":
        raw[k: k + 200] = bytes(len(raw[k: k + 200]))
    elif how == "empty":
        raw = bytearray()
    elif how == "noise":
        raw = bytearray(rng.bytes(int(rng.integers(1, 3000))))
    elif how == "text":
        raw = bytearray(b"<html><body>404 not found</body></html>\n")
    elif how == "twice":
        raw = raw + raw
    elif how == "head" and n:                           # where the headers are
        for _ in range(int(rng.integers(1, 4))):
            raw[rng.integers(min(n, 64))] = rng.integers(256)
    elif how == "swap":
        raw = raw[k:] + raw[:k]
    return bytes(raw), how


ODD_TEXTS = (
    "", " ", "\0", "a\0b", "\ud800", "\u2028", "\x85", "\ufeffa", "a\nb", "猫", "<boi>", "[x]",
    "é" * 3000, "a" * 100000, "../../etc/passwd", "/dev/zero", "/", ".", "{}", "%s %d {0}",
    "$\\frac{$", "\x1b[31m", "NaN", "null", "-1", "\U0001f600",
)
ODD_VALUES = (
    None, True, False,
    0, -1, 1, 7, 2 ** 31, 2 ** 63, 2 ** 64, 10 ** 400, -2 ** 63,
    0.5, -0.0, 1e308, float("nan"), float("inf"),
    [], {}, [[]], [0], [None], {"a": 1},
    *ODD_TEXTS,
)


def nested(rng):
    """JSON that is nested deeply."""
    depth = int(pick(rng, (500, 5000, 100_000, 1_000_000)))
    return pick(rng, ("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth,
                      '{"a":' * depth + "1" + "}" * depth))


def odd_json(rng, value):
    """(text of JSON that differs from a value in one place, how). value: dict or list."""
    how = pick(rng, ("value", "value", "value", "value", "drop", "add", "type", "nested", "cut",
                     "digits", "twice", "root", "bom", "utf-16", "latin"))
    copied = json.loads(json.dumps(value))
    places = list(places_of(copied))
    holder, key = pick(rng, places) if places else ([copied], 0)
    if how == "value":
        holder[key] = pick(rng, ODD_VALUES)
    elif how == "drop":
        del holder[key]
    elif how == "add":
        if isinstance(holder, dict):
            holder["one more"] = pick(rng, ODD_VALUES)
        else:
            holder.append(pick(rng, ODD_VALUES))
    elif how == "type":
        holder[key] = [holder[key]]
    elif how == "root":
        copied = pick(rng, ODD_VALUES)
    text = json.dumps(copied)
    if how == "nested":
        text = pick(rng, (nested(rng), text[:-1] + ', "x": ' + nested(rng)))
    elif how == "cut":
        text = text[: rng.integers(len(text))]
    elif how == "digits":
        text = text.replace("1", "9" * 5000, 1)
    elif how == "twice":
        text = text + text
    if how == "utf-16":
        return text.encode("utf-16"), how
    if how == "bom":
        return b"\xef\xbb\xbf" + text.encode(), how
    if how == "latin":
        return text.encode("ascii") + "é".encode("latin-1"), how
    return text.encode("utf-8", "surrogatepass"), how


def places_of(value):
    """Yields (holder, key) of every place in parsed JSON."""
    keys = range(len(value)) if isinstance(value, list) else list(value)
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places_of(value[key])


def odd_file(rng, path):
    """Put something that is no file, or a file without an end, at a path. Returns what it is."""
    if path.exists() or path.is_symlink():
        path.unlink()
    what = pick(rng, ("pipe", "folder", "zero", "full", "loop", "sparse", "nothing", "empty"))
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "zero":
        path.symlink_to("/dev/zero")
    elif what == "full":
        path.symlink_to("/dev/full")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "sparse":
        with open(path, "wb") as file:
            file.truncate(5 * 2 ** 30)
    elif what == "empty":
        path.touch()
    return what


# --------------------------------------------------------------------------------------- the shelf
def fill_shelf(place):
    """Make whole files of every kind, once: cases are damaged copies of them. In a child."""
    child = os.fork()
    if child == 0:
        with open(place / "said.txt", "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        try:
            make_shelf(place)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit((place / "said.txt").read_text())
    return place


def make_shelf(place):
    """model.pt, vae.pt, vq.pt; pictures; folders of pictures, of edits, of MNIST; packed shards; a
    tokenizer of SentencePiece; a run with a checkpoint; reports."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    small = dict(channels=4, multipliers=(1, 1, 1), z=2)
    for name, codes in (("vae", 0), ("vq", 16)):
        network = vae_module.VAE(vae_module.VAEConfig(**small, codes=codes)).eval()
        checkpoint.save(place / f"{name}.pt", checkpoint.pack_vae(network))
    vae = checkpoint.load_vae(place / "vae.pt")
    words = data.Words(scenes.vocabulary())
    shape = model.ModelConfig(vocabulary=len(words), layers=1, width=16, heads=2, latent=(2, 8, 8),
                              patch=4, context=40)
    network = model.Transfusion(shape).eval()
    trained = checkpoint.Trained(network, words, vae, Diffusion())
    checkpoint.save_trained(place / "model.pt", trained)

    for mode, kind in PICTURES:
        noise = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).convert(mode).save(place / f"{mode}.{kind.lower()}", kind)
    write_pictures(place / "pictures", rng)
    write_mnist(place / "mnist", rng)
    (place / "a.txt").write_text("a red circle\na blue square\n" * 30)
    (place / "a.jsonl").write_text('{"text": "a red circle"}\n' * 30)
    question = {"context": "a red circle is", "choices": ["left of a square", "above"], "answer": 1}
    (place / "questions.jsonl").write_text((json.dumps(question) + "\n") * 3)
    (place / "prompts.jsonl").write_text('{"tag": "x", "prompt": "a red circle"}\n' * 2)
    with tarfile.open(place / "a.tar", "w") as tar:
        for k in range(4):
            tar.add(place / "pictures/0.png", f"x/{k}.png")
            add_text(tar, f"x/{k}.txt", "a red circle")
    pack.main(["--text", "scenes", "--pairs", "scenes", "--scenes", "60",
               "--vae", str(place / "vae.pt"), "--image-size", "32",
               "--seq-len", "64", "--shard-rows", "8",
               "--out", str(place / "packed")])
    add_pieces(place)
    model.SIZES["toy"] = (1, 16, 2)
    train.main([*small_run(place), "--steps", "3", "--out", str(place / "run")])
    shutil.rmtree(place / "run/checkpoints/step_000003")    # as if it had been stopped before
    (place / "run/model.pt").unlink()
    (place / "report.json").write_text(json.dumps(
        {"alone": 0.01, "captions": 0.9, "exact": 0.8, "geneval": {"colors": {"exact": 0.5}}}))


# (mode, format), as Pillow calls them.
PICTURES = [
    ("RGB", "PNG"), ("P", "PNG"), ("1", "PNG"), ("RGBA", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG"),
    ("RGB", "GIF"), ("RGB", "BMP"), ("RGB", "WEBP"), ("RGB", "TIFF"), ("RGB", "PPM"),
    ("RGB", "TGA"), ("RGB", "ICO"), ("RGB", "AVIF"), ("RGB", "DDS"), ("RGB", "PCX"),
    ("RGB", "JPEG2000"),
]


def small_run(place):
    """The options of a tiny run, without --steps and --out."""
    return ["--vae", str(place / "vae.pt"), "--patch", "4", "--seq-len", "64", "--pairs", "20",
            "--documents", "2", "--samples", "0", "--save-every", "1", "--log-every", "1"]


def write_pictures(folder, rng):
    """A folder with captions.jsonl and edits.jsonl."""
    folder.mkdir()
    captions = []
    triples = []
    for k in range(12):
        noise = rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)
        name = f"{k}.png"
        Image.fromarray(noise).save(folder / name)
        captions.append({"image": name, "caption": "a red circle"})
        triples.append({"before": name, "instruction": "make the circle red", "after": name})
    for name, entries in (("captions", captions), ("edits", triples)):
        lines = [json.dumps(entry) for entry in entries]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def write_mnist(folder, rng):
    """A tiny MNIST, gzipped."""
    folder.mkdir()
    for name in mnist.MNIST_FILES:
        shape = (6, 28, 28) if "images" in name else (6,)
        raw = idx_bytes(rng.integers(0, 10, shape))
        (folder / f"{name}.gz").write_bytes(gzip.compress(raw, mtime=0))


def idx_bytes(array):
    """The bytes of an idx file."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def add_text(tar, name, text):
    """Add a text to a tar."""
    info = tarfile.TarInfo(name)
    content = text.encode()
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def add_pieces(place):
    """A SentencePiece model, if the library is there."""
    try:
        import sentencepiece
    except ImportError:
        return
    lines = []
    for _, read in streams.scenes_of("text", "six", 200, 32):
        text, _ = read()
        lines.append(text)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(place / "pieces"), vocab_size=60,
        hard_vocab_limit=False, minloglevel=2)


# --------------------------------------------------------------------------------- kinds of inputs
def idx_case(rng, given, shelf):
    """MNIST's files: damaged, of other shapes, promising too much, or no files."""
    shutil.copytree(shelf / "mnist", given / "m")
    name = pick(rng, mnist.MNIST_FILES)
    path = given / f"m/{name}.gz"
    raw = gzip.decompress(path.read_bytes())
    zipped = rng.random() < 0.5
    how = pick(rng, ("damage", "damage", "damage zip", "shape", "promise", "odd", "bomb", "none"))
    wanted = EITHER
    if how == "damage":
        raw, how = damage(rng, raw)
    elif how == "shape":
        shapes = ((6, 28, 27), (6,), (6, 1), (5,), (5, 28, 28), (0, 28, 28), (0,), (28, 28),
                  (1, 1, 1, 1), (6, 10, 10), ())
        shape = pick(rng, shapes)
        raw = idx_bytes(rng.integers(0, 256, shape)) if shape else b"\0\0\x08\0\x07"
        how = str(shape)
        wanted = NEVER if shape != (6,) else EITHER
    elif how == "promise":
        sizes = [int(size) for size in rng.integers(0, 2 ** 32, int(rng.integers(0, 20)))]
        raw = struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes) + raw[16:]
        how = str(sizes)
        wanted = NEVER
    path.unlink()
    if not zipped:
        path = path.with_suffix("")
    packed = gzip.compress(raw, mtime=0) if zipped else raw
    if how == "damage zip":
        packed, how = damage(rng, packed)
    elif how == "bomb":
        packed = gzip.compress(raw + bytes(2 ** 27), mtime=0)
        wanted = NEVER if zipped else EITHER
    path.write_bytes(packed)
    if how == "odd":
        how = odd_file(rng, path)
        wanted = NEVER
    split = "train" if name.startswith("train") else "test"
    return Case(lambda: mnist.load_mnist(given / "m", split), wanted, f"{path.name}: {how}")


def lines_case(rng, given, shelf):
    """JSON lines and text lines, for every command that reads some."""
    name, keys, read, strict = pick(rng, LINES)
    source = shelf / name
    base = given / "folder"
    if source.parent == shelf:
        base.mkdir()
        shutil.copy(source, base)
    else:
        shutil.copytree(source.parent, base)
    path = base / source.name
    lines = path.read_bytes().split(b"\n")[:-1]
    k = int(rng.integers(len(lines)))
    wanted = EITHER
    ways = ["line"] * 4 + ["value"] * 2 + ["damage", "odd", "ends", "blank"]
    how = pick(rng, ways)
    if how == "line" and keys:
        lines[k], how = odd_json(rng, json.loads(lines[k]))
        if how in ("cut", "nested", "twice", "utf-16", "latin", "digits") and strict:
            wanted = EITHER if how in ("cut", "digits") else NEVER
    elif how == "value" and keys:
        entry = json.loads(lines[k])
        entry[pick(rng, keys)] = pick(rng, ODD_TEXTS)
        escaped = rng.random() < 0.5
        lines[k] = json.dumps(entry, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    elif how in ("line", "value"):
        lines[k] = pick(rng, ODD_TEXTS).encode("utf-8", "surrogatepass")
    end = b"\n"
    if how == "ends":
        end = pick(rng, (b"\r\n", b"\n\n \n", b"\r"))
        wanted = EITHER
    elif how == "blank":
        lines = [b"", *lines, b" ", b""]
        wanted = MUST
    raw = end.join(lines) + end
    if how == "damage":
        raw, how = damage(rng, raw)
    path.write_bytes(raw)
    if how == "odd":
        how = odd_file(rng, path)
        wanted = NEVER
    return Case(lambda: read(base, path, shelf), wanted, f"{path.name} line {k + 1}: {how}")


def read_text_stream(base, path, shelf):
    """Pack a file of text."""
    pack.main(["--text", str(path), "--seq-len", "32", "--out", "packed"])


def read_pairs_stream(base, path, shelf):
    """Pack a folder of pictures, or a tar."""
    source = base if path.suffix == ".jsonl" else path
    pack.main(["--pairs", str(source), "--vae", str(shelf / "vae.pt"), "--seq-len", "64",
               "--image-size", "16", "--patch", "1", "--out", "packed"])


def yardstick(what):
    """A function that runs metrics.likelihood on a file."""
    def read(base, path, shelf):
        likelihood.main([what, str(path), "--checkpoint", str(shelf / "model.pt")])
    return read


def read_geneval(base, path, shelf):
    """Draw GenEval's prompts."""
    coco.main([str(path), "--checkpoint", str(shelf / "model.pt"), "--steps", "1",
               "--out", "pictures"])


def read_photos(base, path, shelf):
    """Judge pictures by captions."""
    coco.main([str(base), "--checkpoint", str(shelf / "model.pt"), "--steps", "1",
               "--vae", str(shelf / "vae.pt"), "--limit", "5"])


def read_captions(base, path, shelf):
    """Load a folder of pictures with captions."""
    folder.load_folder(base, 8)


def read_edits(base, path, shelf):
    """Load a folder of edits."""
    edits.load_triples(base, 8)


# (file, its keys, function that reads it, whether any bad line is refused)
LINES = [
    ("pictures/captions.jsonl", ("image", "caption"), read_captions, True),
    ("pictures/captions.jsonl", ("image", "caption"), read_pairs_stream, False),
    ("pictures/captions.jsonl", ("image", "caption"), read_photos, True),
    ("pictures/edits.jsonl", ("before", "instruction", "after"), read_edits, True),
    ("a.jsonl", ("text",), read_text_stream, False),
    ("a.txt", (), read_text_stream, False),
    ("a.txt", (), yardstick("perplexity"), True),
    ("a.jsonl", ("text",), yardstick("perplexity"), True),
    ("questions.jsonl", ("context", "choices", "answer"), yardstick("choices"), True),
    ("prompts.jsonl", ("prompt", "tag"), read_geneval, True),
]


def picture_case(rng, given, shelf):
    """Pictures of many types, damaged; headers that promise too much; pipes and devices."""
    mode, kind = pick(rng, PICTURES)
    path = given / f"p.{kind.lower()}"
    raw = (shelf / f"{mode}.{kind.lower()}").read_bytes()
    how = pick(rng, ("damage", "damage", "damage", "damage", "odd", "bomb", "name"))
    if how == "damage":
        raw, how = damage(rng, raw)
    elif how == "bomb":
        sizes = ((13300, 13300), (60000, 60000), (1, 2 ** 31 - 1), (2 ** 31 - 1, 1), (0, 5),
                 (100000, 600))
        width, height = pick(rng, sizes)
        bits = int(pick(rng, (1, 8, 16)))
        colours = int(pick(rng, (0, 2, 6)))             # grey, RGB, RGBA
        header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
        raw = b"\x89PNG\r\n\x1a\n"
        raw += chunk(b"IHDR", header)
        raw += chunk(b"IDAT", zlib.compress(bytes(10 ** 6)))
        how = f"{width}x{height}"
    path.write_bytes(raw)
    if how == "odd":
        how = odd_file(rng, path)
    name = str(path)
    if how == "name":
        name = pick(rng, ODD_TEXTS)
    ways = [lambda: open_picture(name, int(pick(rng, (1, 8, 32)))),
            lambda: sample.main(["--image", name, "--checkpoint", str(shelf / "model.pt")])]
    return Case(pick(rng, ways), EITHER, f"{mode} {kind}: {how}")


def chunk(kind, content):
    """A chunk of a PNG."""
    length = struct.pack(">I", len(content))
    check = struct.pack(">I", zlib.crc32(kind + content))
    return length + kind + content + check


def shard_case(rng, given, shelf):
    """A folder of shards: headers, index, arrays, tokenizer, VAE."""
    shutil.copytree(shelf / "packed", given / "packed")
    files = sorted(path for path in (given / "packed").rglob("*") if path.is_file())
    headers = [path for path in files if path.suffix == ".json"]
    how = pick(rng, ("json", "json", "json", "json", "damage", "damage", "odd", "gone", "whole"))
    path = pick(rng, headers if how == "json" else files)
    wanted = EITHER
    if how == "json":
        raw, how = odd_json(rng, json.loads(path.read_text()))
        path.write_bytes(raw)
    elif how == "damage":
        raw, how = damage(rng, path.read_bytes())
        path.write_bytes(raw)
    elif how == "odd":
        how = odd_file(rng, path)
        wanted = NEVER
    elif how == "gone":
        path.unlink()
        wanted = NEVER
    elif how == "whole":
        wanted = MUST
    if path.name == "vae.pt":                           # the rows can be verified without it
        wanted = EITHER
    run = ["--data", "shards", "--data-dir", str(given / "packed"), "--seq-len", "64",
           "--documents", "1", "--steps", "1", "--samples", "0", "--out", "run"]
    main, argv = pick(rng, [(shards.main, [str(given / "packed")]), (train.main, run)])
    if wanted == NEVER and main == train.main and path.parent != given / "packed":
        wanted = EITHER                                 # a shard is opened when a row of it is read
    return Case(lambda: main(argv), wanted, f"{path.relative_to(given)}: {how}")


def tar_case(rng, given, shelf):
    """Tars of pictures: damaged, with odd names, odd members, zipped."""
    path = given / "a.tar"
    raw = (shelf / "a.tar").read_bytes()
    how = pick(rng, ("damage", "damage", "damage", "name", "kind", "zip", "odd"))
    if how == "damage":
        raw, how = damage(rng, raw)
    elif how in ("name", "kind"):
        raw = odd_tar(rng, shelf, how)
    elif how == "zip":
        raw = gzip.compress(raw)
        if rng.random() < 0.7:
            raw, _ = damage(rng, raw)
    path.write_bytes(raw)
    if how == "odd":
        how = odd_file(rng, path)
    return Case(lambda: read_pairs_stream(given, path, shelf), EITHER, f"a.tar: {how}")


ODD_NAMES = ("", "/", "../x", "x.y/z", "\u2028", "é" * 120, "x/" * 60, ".hidden", "a b", "x/1")
ODD_MEMBERS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
               tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE)


def odd_tar(rng, shelf, how):
    """The bytes of a tar with odd names or odd members."""
    file = io.BytesIO()
    form = pick(rng, (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for k in range(3):
            name = f"x/{k}"
            if how == "name":
                name = pick(rng, ODD_NAMES)
            picture = name + pick(rng, (".png", ".PNG", ".seg.png", ".jpg", ""))
            tar.add(shelf / "pictures/0.png", picture)
            caption = name + pick(rng, (".txt", ".json", ".cap.txt"))
            add_text(tar, caption, pick(rng, ("a red circle", '{"caption": "x"}', "")))
            if how == "kind":
                info = tarfile.TarInfo(name + pick(rng, (".png", ".txt")))
                info.type = pick(rng, ODD_MEMBERS)
                info.linkname = pick(rng, ("/etc/passwd", "../..", "x/0.png", info.name))
                info.size = int(pick(rng, (0, 10, 2 ** 33)))
                tar.addfile(info)
    return file.getvalue()


def tokenizer_case(rng, given, shelf):
    """A tokenizer.json, or a SentencePiece model, for packing."""
    shutil.copy(shelf / "a.txt", given)
    how = pick(rng, ("json", "json", "pieces", "odd", "words"))
    path = given / "words.json"
    vocabulary = ["a", "red", "circle", "blue", "square"]
    if how == "json":
        raw, how = odd_json(rng, vocabulary)
        path.write_bytes(raw)
    elif how == "words":
        words = [str(pick(rng, ODD_TEXTS)) for _ in range(int(rng.integers(0, 9)))]
        path.write_text(json.dumps(vocabulary + words))
        how = "odd words"
    elif how == "odd":
        how = odd_file(rng, path)
    elif (shelf / "pieces.model").exists():
        path = given / "pieces.model"
        raw, how = damage(rng, (shelf / "pieces.model").read_bytes())
        path.write_bytes(raw)
    argv = ["--text", str(given / "a.txt"), "--tokenizer", str(path), "--seq-len", "32",
            "--out", "packed"]
    return Case(lambda: pack.main(argv), EITHER, f"{path.name}: {how}")


def checkpoint_case(rng, given, shelf):
    """A model.pt or a vae.pt: damaged bytes, or whole files of odd content."""
    name = pick(rng, ("model.pt", "model.pt", "vae.pt", "vq.pt"))
    path = given / name
    raw = (shelf / name).read_bytes()
    wanted = EITHER
    ways = ["damage"] * 2 + ["content"] * 3 + ["odd", "weights", "whole"]
    how = pick(rng, ways)
    if how == "damage":
        damaged, how = damage(rng, raw)
        path.write_bytes(damaged)
    elif how == "content":
        content = torch.load(shelf / name, weights_only=True)
        how = odd_content(rng, content)
        torch.save(content, path)
    elif how == "weights":
        content = torch.load(shelf / name, weights_only=True)
        tensor = content["weights"][pick(rng, content["weights"])]
        if tensor.is_floating_point():
            tensor[(0,) * tensor.ndim] = float(pick(rng, ("nan", "inf", "-inf")))
            wanted = NEVER
        torch.save(content, path)
    else:
        path.write_bytes(raw)
        wanted = MUST if how == "whole" else NEVER
        if how == "odd":
            how = odd_file(rng, path)
    if name == "model.pt":
        trained = ["--checkpoint", str(path)]
        ways = [lambda: sample.main(["a red circle", "--steps", "1", *trained]),
                lambda: likelihood.main(["choices", "scenes", "--limit", "2", *trained]),
                lambda: doctor.main([str(path), "--n", "2"])]
    elif name == "vae.pt":
        argv = [*small_run(shelf), "--steps", "1", "--vae", str(path), "--out", "run"]
        ways = [lambda: train.main(argv)]
    else:
        ways = [lambda: checkpoint.load_vae(path, "vqvae")]
    return Case(pick(rng, ways), wanted, f"{name}: {how}")


def odd_content(rng, content):
    """Change a checkpoint's content in one place. Returns where."""
    holder = content
    key = pick(rng, content)
    trail = [key]
    while isinstance(holder[key], dict) and holder[key] and rng.random() < 0.85:
        holder = holder[key]
        key = pick(rng, holder)
        trail.append(str(key))
    value = holder[key]
    numbers = torch.zeros(2, 2, dtype=torch.int64)
    options = [*ODD_VALUES, torch.zeros(3), torch.zeros(0), numbers, b"bytes"]
    if isinstance(value, torch.Tensor):
        options += [value[:1], value.double(), value.to(torch.complex64)]
        options += [value.bool(), value[None], value.to_sparse()]
    if rng.random() < 0.15:
        del holder[key]
        return f"without {'/'.join(trail)}"
    holder[key] = pick(rng, options)
    return f"{'/'.join(trail)} = {str(holder[key])[:30]}"


def run_case_of_folder(rng, given, shelf):
    """A run's folder, gone on with: config.json, log.jsonl, the checkpoint's files."""
    # In out/, not in given/: to go on with a run changes its folder.
    run = given.parent / "out/run"
    shutil.copytree(shelf / "run", run)
    files = sorted(path for path in run.rglob("*") if path.is_file())
    how = pick(rng, ("config", "config", "log", "log", "file", "odd", "stray", "gone"))
    path = run / "config.json"
    if how == "config":
        raw, how = odd_json(rng, json.loads(path.read_text()))
        path.write_bytes(raw)
    elif how == "log":
        path = run / "log.jsonl"
        lines = path.read_bytes().split(b"\n")
        k = int(rng.integers(len(lines) - 1))
        lines[k], how = odd_json(rng, json.loads(lines[k]))
        path.write_bytes(b"\n".join(lines))
    elif how == "file":
        path = pick(rng, files)
        raw, how = damage(rng, path.read_bytes())
        path.write_bytes(raw)
    elif how == "odd":
        path = pick(rng, files)
        how = odd_file(rng, path)
    elif how == "gone":
        path = pick(rng, files)
        path.unlink()
    else:
        names = ("step_", "step_x", "step_000002.bak", "step_-00001", "step_1e5", "step_999999",
                 ".DS_Store", "step_000002 copy", "step_٣")
        path = run / "checkpoints" / pick(rng, names)
        path.mkdir()

    def resume():
        model.SIZES["toy"] = (1, 16, 2)
        train.main([*small_run(shelf), "--steps", "3", "--out", str(run), "--resume"])

    def write_model():
        export.main([str(run / "checkpoints/step_000002"), "--out", "exported.pt"])

    return Case(pick(rng, (resume, resume, write_model)), EITHER, f"{path.relative_to(run)}: {how}")


def report_case(rng, given, shelf):
    """report.json of finished experiments."""
    root = given.parent / "out"                         # tables are written there, too
    number = pick(rng, experiments.TABLES)
    _, rows, _ = experiments.TABLES[number]
    base = experiments.BASES["paper"]
    about = ""
    for k, options in enumerate(rows.values()):
        out = experiments.folder_of(root, options, 0)
        out.mkdir(exist_ok=True)
        config, *_ = experiments.parse_arguments(experiments.argv_of(base, options, 0, out))
        (out / "config.json").write_text(json.dumps(asdict(config)))
        raw = (shelf / "report.json").read_bytes()
        (out / "report.json").write_bytes(raw)
        if k == 0:
            path = out / pick(rng, ("report.json", "report.json", "config.json"))
            raw, about = odd_json(rng, json.loads(path.read_text()))
            path.write_bytes(raw)
            if rng.random() < 0.1:
                about = odd_file(rng, path)
    if rng.random() < 0.3:                              # or what was kept of earlier runs
        path = root / "results.json"
        options = experiments.written_out(base, "")
        finished = {"options": options, "seed": 0, "numbers": {"alone": 0.5}}
        raw, about = odd_json(rng, {"runs": [finished]})
        path.write_bytes(raw)

    def tables():
        results = experiments.Results(root / "results.json")
        for options in rows.values():
            if not (experiments.folder_of(root, options, 0) / "report.json").exists():
                raise EnoughError                       # it would be trained now
            experiments.train_row(root, results, base, options, 0)
        experiments.make_table(root, results, base, number, 1)

    return Case(tables, EITHER, f"{number}, {path.name}: {about}")


def scaling_case(rng, given, shelf):
    """A list of runs, and the numbers that --json wrote."""
    runs = []
    for k in range(4):
        runs.append({
            "model": scaling.RIVALS[k % 2],
            "parameters": 10 ** (6 + k // 2),
            "tokens": 1e9,
            "seed": 0,
            "files": {"toy": f"{k}.json"},
        })
        numbers = {"alone": 0.5 / (1 + k), "captions": 0.5 + k / 10, "exact": 0.1 * (1 + k)}
        (given / f"{k}.json").write_text(json.dumps(numbers))
    path = given / "runs.json"
    path.write_text(json.dumps(runs))
    target = pick(rng, (path, path, given / "0.json"))
    raw, how = odd_json(rng, json.loads(target.read_text()))
    target.write_bytes(raw)
    if rng.random() < 0.1:
        how = odd_file(rng, target)
    return Case(lambda: scaling.main([str(path)]), EITHER, f"{target.name}: {how}")


def prompt_case(rng, given, shelf):
    """What people may write to sample.py, with odd letters, brackets, and lengths."""
    picture = str(shelf / "RGB.png")
    words = ["a", "red", "circle", "A", "<boi>", "<eos>", "[", "]", "[]", "[x.png]", "purple"]
    words += [picture, f"[{picture}]", " " * 50, *ODD_TEXTS]
    parts = []
    for _ in range(int(rng.integers(0, 6))):
        parts.append(pick(rng, words))
    text = pick(rng, (" ", "", "\n")).join(parts)
    text = text.replace("\0", "")                       # no command line can hold it
    argv = [text, "--steps", "1", "--checkpoint", str(shelf / "model.pt")]
    if rng.random() < 0.4:
        argv.append("--open")
    if rng.random() < 0.2:
        argv = ["--image", str(shelf / "RGB.png"), "--edit", *argv]
    return Case(lambda: sample.main(argv), EITHER, " ".join(argv)[:80], words=tuple(argv))


# Odd values of options: for numbers, and for files and folders.
NUMBERS = (
    "-1", "0", "1", "2", "3", "many", "", " ", "1.5", "1e3", "nan", "inf", "-inf", "1e308",
    "1e-320", "0x10", "１２", "99999999999999999999", "2147483648", "1000000000", "1000000000000",
    "18446744073709551616", "-0.0", "1_000", "+5", "True", "9" * 5000,
)
PLACES = (
    "", " ", ".", "..", "/", "absent", "absent/x", "/dev/null", "/dev/full", "/dev/zero",
    "/proc/self/mem", "a\nb", "ü/猫", "x" * 300, "x/" * 3000, "[1]", "-", "--", "~", "\udcff",
    "con:", "GIVEN/pipe", "GIVEN/folder", "GIVEN/good.png", "GIVEN/text.json", "GIVEN/loop",
    "GIVEN/model.pt", "GIVEN/vae.pt", "GIVEN/pictures", "GIVEN/packed", "GIVEN/mnist",
)
# {option: what it writes}: a user may overwrite a file of that kind.
OUTPUTS = {"json": ".json", "out": ".png", "film": ".png"}


def flag_case(rng, given, shelf):
    """Every option of every command, with odd values, two at a time now and then."""
    program = pick(rng, PROGRAMS)
    main, base, parser = PROGRAMS[program]
    for name in ("model.pt", "vae.pt"):
        shutil.copy(shelf / name, given)
    for name in ("pictures", "packed", "mnist"):
        shutil.copytree(shelf / name, given / name)     # a command may be told to write there
    os.mkfifo(given / "pipe")
    (given / "folder").mkdir()
    (given / "good.png").write_bytes((shelf / "RGB.png").read_bytes())
    (given / "text.json").write_text("{}")
    (given / "loop").symlink_to("loop")

    argv = [word.replace("SHELF", str(shelf)) for word in base]
    wanted = EITHER
    actions = options_of(parser)
    own = []
    for _ in range(1 if rng.random() < 0.8 else 2):
        action = pick(rng, actions)
        value = None
        if action.nargs != 0:
            value = pick(rng, values_for(action)).replace("GIVEN", str(given)).replace("\0", "")
            suffix = ".pt" if program == "scale.export" else OUTPUTS.get(action.dest)
            if suffix == Path(value).suffix or action.dest == "out" and not Path(value).suffix:
                own.append(value)
        option = pick(rng, action.option_strings) if action.option_strings else None
        if option and value is None:
            argv.append(option)
        elif option:
            argv.append(f"{option}={value}" if rng.random() < 0.5 else option)
            if "=" not in argv[-1]:
                argv.append(value)
        else:
            argv.insert(0, value)

    def run():
        model.SIZES["toy"] = (1, 16, 2)
        stop_after_a_while()
        main(argv)

    return Case(run, wanted, f"{program} {' '.join(argv)}"[:2000], tuple(own), tuple(argv))


def values_for(action):
    """Odd values for an argparse option."""
    if action.type in (int, float):
        return NUMBERS
    if action.choices:
        return (*map(str, action.choices), "", "None", "scenes ", "x" * 300)
    return PLACES


def options_of(parser):
    """The argparse actions of a program: caught as it parses."""
    caught = []

    class Caught(Exception):
        pass

    def catch(self, *_):
        caught.append(self)
        raise Caught

    real = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = catch
    try:
        parser()
    except Caught:
        pass
    finally:
        argparse.ArgumentParser.parse_args = real
    return [action for action in caught[0]._actions if "--help" not in action.option_strings]


def program(main, *base):
    """(main, its cheap and right command line, a function that makes its argparse parser)."""
    return main, list(base), lambda: main(["x"])


MODEL = ("--checkpoint", "SHELF/model.pt")
PROGRAMS = {
    "sample.py": program(sample.main, "a red circle", "--steps", "1", *MODEL),
    "train.py": program(
        train.main, "--vae", "SHELF/vae.pt", "--patch", "4", "--seq-len", "64", "--pairs", "20",
        "--documents", "2", "--samples", "0", "--steps", "1", "--out", "run"),
    "train.py shards": program(
        train.main, "--data", "shards", "--data-dir", "SHELF/packed", "--seq-len", "64",
        "--steps", "1", "--samples", "0", "--out", "run"),
    "train.py dry": program(train.main, "--preset", "7b", "--dry-run", "--gpus", "512"),
    "evaluate.py": program(evaluate.main, "--n", "6", "--steps", "1", *MODEL),
    "experiments.py": program(experiments.main, "--seeds", "1", "--jobs", "1"),
    "scale.pack": program(
        pack.main, "--text", "scenes", "--pairs", "scenes", "--scenes", "20",
        "--vae", "SHELF/vae.pt", "--seq-len", "64", "--image-size", "32"),
    "autoencoder.train": program(vae_training.main, "--steps", "1", "--batch", "2"),
    "metrics.coco": program(
        coco.main, "scenes", "--limit", "4", "--steps", "1", "--vae", "SHELF/vae.pt", *MODEL),
    "metrics.likelihood": program(likelihood.main, *MODEL, "choices", "scenes", "--limit", "2"),
    "metrics.doctor": program(doctor.main, "SHELF/model.pt", "--n", "2"),
    "metrics.scaling": program(scaling.main),
    "scale.export": program(
        export.main, "SHELF/run/checkpoints/step_000002", "--out", "exported.pt"),
    "chameleon.py": program(chameleon.main, "a red circle", "--steps", "1", *MODEL),
}

KINDS = {
    "idx": idx_case,
    "lines": lines_case,
    "pictures": picture_case,
    "shards": shard_case,
    "tars": tar_case,
    "tokenizers": tokenizer_case,
    "checkpoints": checkpoint_case,
    "runs": run_case_of_folder,
    "reports": report_case,
    "scaling": scaling_case,
    "prompts": prompt_case,
    "flags": flag_case,
}
SHARE = {"flags": 4, "lines": 2}                        # of the cases; the others have 1 each


# ---------------------------------------------------------------------------- as real commands, too
def real_commands(shelf):
    """[Outcome] of a few cases as commands of their own: what a fork cannot show."""
    bad = shelf / "bad"
    bad.mkdir(exist_ok=True)
    (bad / "nested.jsonl").write_text("[" * 100_000)
    (bad / "cut.pt").write_bytes((shelf / "model.pt").read_bytes()[:2000])
    commands = [
        ["sample.py", "a circle", "--checkpoint", str(bad / "cut.pt")],
        ["sample.py", "--image", "/dev/zero"],
        ["train.py", "--seed", "-1"],
        ["evaluate.py", "--json", "."],
        ["experiments.py", "12"],
        ["-m", "scale.pack", "--text", str(bad / "nested.jsonl")],
        ["-m", "scale.shards", str(bad)],
        ["-m", "metrics.likelihood", "choices", str(bad / "nested.jsonl")],
        ["-m", "metrics.coco", str(bad)],
        ["-m", "autoencoder.train", "--steps", "0"],
    ]
    outcomes = []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for number, words in enumerate(commands):
        if words[0] != "-m":
            words = [str(ROOT / words[0]), *words[1:]]
        with tempfile.TemporaryDirectory() as out:
            done = subprocess.run(
                [sys.executable, *words],
                cwd=out,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=WALL_SECONDS,
            )
        last = (done.stderr.strip().splitlines() or [""])[-1]
        right = done.returncode == 2 and "error: " in last and "Traceback" not in done.stderr
        verdict = "refused" if right else "traceback"
        outcomes.append(Outcome("commands", number, verdict, last[:300], " ".join(words)))
    return outcomes


# ---------------------------------------------------------------------------------------- the table
def table(outcomes):
    """The verdicts by kind, as lines."""
    counts = collections.defaultdict(collections.Counter)
    for outcome in outcomes:
        counts[outcome.kind][outcome.verdict] += 1
        counts["all"][outcome.verdict] += 1
    lines = ["| kind | n | " + " | ".join(VERDICTS) + " |", "|---" * (len(VERDICTS) + 2) + "|"]
    for kind in [*(kind for kind in counts if kind != "all"), "all"]:
        row = counts[kind]
        cells = [f"{row[verdict]}" for verdict in VERDICTS]
        lines.append(f"| {kind} | {sum(row.values())} | " + " | ".join(cells) + " |")
    return lines


def describe(outcome):
    """What went wrong with a case, and how to run it again."""
    case = f"--case {outcome.kind} {outcome.number}"
    return (f"{outcome.verdict:9s} {case}: {outcome.input[:160]!r}\n"
            f"          {outcome.text[:200]!r}")


def keep(outcomes, path):
    """Write all outcomes to a JSON file, if a path is given."""
    if path:
        Path(path).write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))


def main(argv=None):
    """Run cases as the command line says. Returns how many went wrong."""
    parser = argparse.ArgumentParser(description="Thousands of bad and odd inputs.")
    add = parser.add_argument
    add("--n", type=int, default=6000, help="how many cases")
    add("--seed", type=int, default=0,
        help="the first case's number; n cases of other numbers: --seed n")
    add("--only", choices=tuple(KINDS), help="one kind alone")
    add("--case", nargs=2, metavar=("KIND", "NUMBER"), help="one case again, with its traceback")
    add("--keep", help="of --case: a new folder in which to leave the input")
    add("--json", help="also write all outcomes here")
    add("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    add("--seconds", type=float, default=float("inf"), help="begin no case after this time")
    add("--no-commands", action="store_true", help="leave out the ones that start a command")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="fuzz_shelf_") as place:
        shelf = fill_shelf(Path(place))
        if args.case:
            kind, number = args.case
            running = Running(kind, int(number), shelf, args.keep)
            while not (outcome := running.poll()):
                time.sleep(0.01)
            print(outcome.traceback)
            print(outcome.input, outcome.verdict, outcome.text, sep="\n")
            print(f"{outcome.seconds} s, {outcome.megabytes} MB")
            return int(outcome.verdict not in GOOD)

        kinds = []
        for kind in [args.only] if args.only else KINDS:
            kinds += [kind] * SHARE.get(kind, 1)
        numbers = collections.Counter()
        outcomes = []
        cases = []
        for k in range(args.n):
            kind = kinds[k % len(kinds)]
            cases.append((kind, args.seed + numbers[kind]))
            numbers[kind] += 1
        for outcome in run_cases(cases, shelf, args.jobs, args.seconds):
            outcomes.append(outcome)
            if outcome.verdict not in GOOD:
                print(describe(outcome), flush=True)
            if len(outcomes) % 100 == 0:
                keep(outcomes, args.json)               # a stop loses little
                print(f"{len(outcomes)} of {args.n}, {time.time() - began:.0f} s", file=sys.stderr)
        if not (args.only or args.no_commands):
            outcomes += real_commands(shelf)
    print(*table(outcomes), sep="\n")
    largest = max(outcome.megabytes for outcome in outcomes)
    print(f"{len(outcomes)} cases in {time.time() - began:.0f} s; the largest took {largest} MB")
    keep(outcomes, args.json)
    return sum(outcome.verdict not in GOOD for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
