"""
common.py: what every room needs

THE IDEA    A user's mistake becomes one sentence, before any work is done. Here are the error that
            carries the sentence, Ctrl-C that waits for the end of a step and reaches the programs
            that this one has started, files that are written whole or not at all, the choice of a
            device, and the readers of files that come from elsewhere: pictures, and JSON lines.
READ NEXT   checkpoint.py        TEST  tests/test_run_command.py,
            tests/test_picture_files.py, tests/test_damaged_files.py
"""
import argparse
import contextlib
import ctypes
import difflib
import io
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

ASSETS = Path(__file__).resolve().parents[1] / "assets"                 # what the repository ships
MOST_PIXELS = 64_000_000                                # of a picture file: 192 MB when decoded
MOST_BYTES = 2 ** 27                                    # of a text file that is read as a whole
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3             # glibc's malloc.h
MADV_HUGEPAGE = 14                                      # Linux's mman.h
LARGE_PAGE = 2 ** 21                                    # bytes
KEPT = 2 ** 28                                          # bytes of the heap


class UserError(ValueError):
    """A mistake of the user's, with one sentence that says what to do. `run_command` prints it and
    exits with 2."""


# -------------------------------------------------------------------------------- running a command
class Stopped(KeyboardInterrupt):
    """The user has stopped the program, by Ctrl-C or by SIGTERM.

    sentence    how to go on
    signals     the signals that came, if any: see `finish_step_first`"""

    def __init__(self, sentence="", signals=()):
        super().__init__(sentence)
        self.signals = list(signals)


def run_command(main, argv=None, if_stopped=""):
    """Run a command line's main(argv). A user's mistake (ValueError, OSError), or memory that runs
    out, becomes one sentence on stderr and exit status 2. Ctrl-C becomes one, too, with status 130,
    and SIGTERM with 143. If nobody reads on, as in `... | head`, it ends in silence, with 141.
    Anything else is a bug of ours and keeps its traceback.

    if_stopped      how to go on after Ctrl-C, where the program has not said it"""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A name may have letters that a terminal in ASCII cannot show: spell them out. They are
            # no reason to lose what was drawn.
            stream.reconfigure(errors="backslashreplace")
    keep_memory()
    try:
        with hear_sigterm():
            check_words(sys.argv[1:] if argv is None else argv)
            main(argv)
        # Here, not as Python exits: a reader that has gone away is only noticed now.
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer goes nowhere, or Python would try again and complain.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        sys.exit(141)                                   # as a shell counts: 128 + SIGPIPE
    except (ValueError, OSError) as mistake:
        print(f"error: {one_sentence(mistake)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        # Where memory is likely to run out, `scale.distributed.explain_memory` says more.
        print("error: out of memory: end other programs, or ask for less at a time",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        sentence = str(stop) or if_stopped or "nothing is left half written"
        print(f"\nstopped: {sentence}", file=sys.stderr)
        sys.exit(128 + signal_of(stop))                 # as a shell counts: 130 or 143


def is_out_of_memory(problem):
    """Whether an exception says that memory is short."""
    # On a CPU, torch raises a plain RuntimeError.
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(problem)


def end_with_the_reader():
    """For a demonstration, which has no command line: if nobody reads on, as in `... | head`, it
    ends at once and in silence, by SIGPIPE, which a shell counts as 141."""
    if hasattr(signal, "SIGPIPE"):                      # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def keep_memory():
    """Let the C library keep what it frees, up to 256 MiB, for what comes next, and have it in
    large pages. No number changes."""
    # Otherwise glibc gives arrays of a megabyte back to the system, and fetches them again page by
    # page: 36,000 times while 1,024 digits are encoded, a fifth of the time.
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2 ** 25)         # smaller arrays share the heap; its most
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)            # so much may lie idle at the heap's end
    except (AttributeError, OSError, TypeError):
        return                                          # macOS, musl, Windows: another allocator
    ask_for_large_pages(libc)


def ask_for_large_pages(libc):
    """Let Linux give the heap pages of 2 MiB where it has some, in place of 4 KiB: a processor
    remembers where a few thousand pages lie, and looks up the others. libc: a ctypes.CDLL."""
    # The heap grows at once by what it will keep. Until it is used, that is no memory.
    libc.mallopt(M_TOP_PAD, KEPT)
    libc.malloc.restype = ctypes.c_void_p
    libc.sbrk.restype = ctypes.c_void_p
    first = libc.malloc(LARGE_PAGE)
    if first:
        libc.free(ctypes.c_void_p(first))
        begin = math.ceil(first / LARGE_PAGE) * LARGE_PAGE
        length = libc.sbrk(0) - begin                   # below 0: this heap lies elsewhere
        if length > 0:
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_HUGEPAGE)


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistake gets one sentence of ours, with the nearest of many names."""

    def error(self, message):
        """Raises UserError. argparse's own would print the usage first, which hides the mistake."""
        message = message.removeprefix("argument ")
        wrong_type = re.fullmatch(r"(.*): invalid (int|float) value: (.*)", message, re.DOTALL)
        unknown = re.fullmatch(r"unrecognized arguments: (--[^ =]*).*", message, re.DOTALL)
        if wrong_type:
            option, kind, value = wrong_type.groups()
            number = "a whole number" if kind == "int" else "a number"
            raise UserError(f"{option} must be {number}, got {value}")
        if unknown:
            option = unknown[1]
            near = difflib.get_close_matches(option, self._option_string_actions, n=1)
            advice = f"did you mean {near[0]}?" if near else "--help names all options"
            raise UserError(f"there is no option {option}: {advice}")
        raise UserError(f"{message}; --help names all options")

    def _check_value(self, action, value):
        # argparse has no open door for this. The name is the same in Python 3.11 to 3.14.
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        option = "/".join(action.option_strings) or action.dest
        near = difflib.get_close_matches(str(value), choices, n=1)
        if len(choices) <= 10:
            advice = f"choose from {', '.join(choices)}"
        elif near:
            advice = f"did you mean {near[0]}?"
        else:
            advice = "--help names all that it can be"
        raise UserError(f"{option} cannot be {value!r:.60}: {advice}")


def check_words(words):
    """Raise UserError for words of a command line with which argparse does not cope."""
    for word in map(str, words):
        option = word.startswith("-") and " " not in word and word.strip("-")
        if option and word.endswith("--"):              # --out=-- and -o--: it makes an empty list
            raise UserError(f"{word} gives no value: two dashes end the options")
        if word.startswith("-") and not word.isprintable():             # it repeats them raw
            raise UserError(f"{word} is no option: it has letters that cannot be printed")
        if word.isdigit() and len(word) > 300:
            raise UserError(f"a number of {len(word)} digits is out of every option's range")


def one_sentence(mistake):
    """What an error says, on one line, and not for pages."""
    text = str(mistake)
    if isinstance(mistake, OSError) and mistake.strerror:
        # Python's own has a number in it: "[Errno 36] File name too long: ...".
        text = f"{mistake.filename or 'a file'} cannot be read or written: {mistake.strerror}"
    # Names and captions stand in sentences. One may have a line's end in it, or codes that a
    # terminal would obey, or 100,000 letters.
    letters = [letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text]
    line = "".join(letters)
    return line if len(line) <= 600 else f"{line[:300]} ... {line[-250:]}"


def signal_of(stop):
    """The signal behind a KeyboardInterrupt: SIGTERM, or that of Ctrl-C."""
    signals = getattr(stop, "signals", [])
    return signals[0] if signals else signal.SIGINT


@contextlib.contextmanager
def hear_sigterm():
    """Inside, SIGTERM raises Stopped wherever the program is, as Ctrl-C raises KeyboardInterrupt.
    So what is open is closed, and the user reads how to go on."""
    def on_sigterm(number, _):
        raise Stopped(signals=[number])

    with handled([signal.SIGTERM], on_sigterm):
        yield


@contextlib.contextmanager
def finish_step_first(alone=True):
    """A list that is empty until Ctrl-C or SIGTERM comes, so that a step is finished first. Then it
    holds the signal's number. alone: a second one stops at once."""
    # TRAP: left alone, Ctrl-C raises an exception anywhere. It could fall between the weights,
    # their average and the step's count, and a resumed run would be another run.
    signals = []

    def on_signal(number, _):
        signals.append(number)
        # Not so under torchrun: it passes one Ctrl-C on twice, and kills what goes on for 30 s.
        if alone:
            signal.signal(number, signal.SIG_DFL)

    with handled([signal.SIGINT, signal.SIGTERM], on_signal):
        yield signals


@contextlib.contextmanager
def handled(numbers, handler):
    """Inside, these signals call the handler."""
    if threading.current_thread() is not threading.main_thread():
        yield                                           # only the main thread may catch a signal
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number] or signal.SIG_DFL)


class Children:
    """Programs that this one has started. They can be stopped with it, and save."""

    def __init__(self):
        self.processes = []
        self.stopped = False
        self.lock = threading.Lock()                    # several threads may start one

    def run(self, command, **options):
        """Run a command to its end, as subprocess.run. Returns its exit status. Raises Stopped if
        this program was stopped before."""
        with self.lock:
            if self.stopped:
                raise Stopped
            # In a group of its own: Ctrl-C in a terminal reaches all of a group, and with `stop` it
            # would come twice. The second one could fall into what the first one saves.
            process = subprocess.Popen(command, process_group=0, **options)
            self.processes.append(process)
        return process.wait()

    def stop(self):
        """Tell those that are still at work to save and stop, and start no more."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()                     # SIGTERM; nothing if it has ended


# ------------------------------------------------------------------------------------ writing files
@contextlib.contextmanager
def whole_file(path):
    """An open binary file. What is written to it appears at `path` at the end, whole. Before, and
    if the program fails or is killed, the path holds what it held. Raises UserError if the file
    cannot be written, for example because the disk is full."""
    path = Path(path)
    building = path.with_name(path.name + ".tmp")
    try:
        with full_disk_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(building, "wb") as file:
                yield file
                file.flush()
                # Or a power cut could leave the new name with no content.
                os.fsync(file.fileno())
            os.replace(building, path)                  # in one step
    finally:
        building.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk_named(path):
    """Inside, what the system says of a write that failed becomes a UserError that names `path`."""
    try:
        yield
    except Exception as problem:
        # torch.save hides a full disk behind an error of its own, "unexpected pos"; numpy has words
        # of its own, and no strerror.
        reason = problem if isinstance(problem, OSError) else problem.__context__
        if not isinstance(reason, OSError):
            raise
        reason = reason.strerror or "is the disk full?"
        raise UserError(f"{path} could not be written ({reason}): what was there before is still "
                        f"there; make room, then go on") from None


def write_json(path, content):
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def write_image(path, image, **options):
    """Write a PIL image, whole or not at all. The path's ending names its type; options: of PIL's
    `save`."""
    kind = Image.registered_extensions()[Path(path).suffix.lower()]
    content = io.BytesIO()              # Pillow says nothing of use when a disk is full
    image.save(content, kind, **options)
    with whole_file(path) as file:
        file.write(content.getvalue())


def check_seed(seed):
    """Raise UserError for a seed that numpy, the narrowest of the random generators, refuses."""
    if not 0 <= seed < 2 ** 32:
        raise UserError(f"--seed must be between 0 and {2 ** 32 - 1}, got {seed}")


def check_steps(steps):
    """Raise UserError for a number of diffusion steps that no sampler takes."""
    if not 1 <= steps <= 1000:                          # T of every process here
        raise UserError(f"--steps must be between 1 and 1000, got {steps}")


def check_writable(path, ending=""):
    """Raise UserError if no file can be written at this path, or its name has another ending than
    this one. Called before the work whose result goes there: found out afterwards, the result would
    be lost."""
    place = Path(path)
    if place.suffix.lower() != (ending or place.suffix.lower()):
        # `evaluate.py --json model.pt` would overwrite the model that it measures.
        raise UserError(f"cannot write {str(path)!r}: its name must end in {ending}")
    if place.is_dir():                                  # "" is the folder we are in
        raise UserError(f"cannot write {str(path)!r}: name a file, not a folder")
    if not place.parent.is_dir():
        raise UserError(f"cannot write {path}: its folder does not exist")
    if place.exists() and not place.is_file():          # /dev/full, a pipe
        raise UserError(f"cannot write {path}: it is not an ordinary file")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise UserError(f"cannot write {path}: you have no permission to")


def pick_device():
    """The torch.device on which one process trains a VAE, samples and measures: CUDA, otherwise
    Apple's GPU, otherwise the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():               # not run here; float32, as on the CPU
        return torch.device("mps")
    return torch.device("cpu")


# ----------------------------------------------------------------------------------------- pictures
def open_picture(path, size, say=False):
    """(size, size, 3) uint8 of an image file, or of an open binary file.

    say     print a line if the file holds something else than that, or than the same enlarged
    Raises UserError, naming the file, if it cannot be read as a picture."""
    try:
        check_ordinary(path, " as a picture")
        with open_header(path) as image:
            check_pixels(path, image)
            turned = image.getexif().get(0x0112, 1) != 1                # 0x0112: EXIF's orientation
            width, height = image.size
            mode = image.mode
            pixels = crop_and_resize(image, size)
            kept = mode == "RGB" and not turned and is_enlarged(image, pixels)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no file {path or repr(path)}") from None
    except Exception as problem:
        # Pillow's decoders have no common error. A damaged file ends in whatever they stumble over:
        # OSError, SyntaxError, struct.error (EXIF), RuntimeError (AVIF), NotImplementedError (DDS).
        reason = str(problem) or type(problem).__name__
        raise UserError(f"{path} cannot be read as a picture ({reason}): is it truncated or of "
                        f"another type?") from None
    if say and not kept:
        print(f"{path}: {width}x{height} {mode}, converted to {size}x{size} RGB")
    return pixels


def open_header(path):
    """PIL's Image of a file, of which nothing but the header has been read."""
    with warnings.catch_warnings():
        # Pillow warns of large pictures; `check_pixels` refuses them.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def check_pixels(path, image):
    """Raise UserError if the header promises too many pixels."""
    width, height = image.size
    if width * height > MOST_PIXELS:                    # a file of 21 kB can decode to 2 GB
        raise UserError(f"{path} cannot be read as a picture: its header promises {width}x{height} "
                        f"pixels, more than {MOST_PIXELS // 1_000_000} million; make it smaller")


def crop_and_resize(image, size):
    """(size, size, 3) uint8 of any PIL image: centre-cropped to a square and resized."""
    image = ImageOps.exif_transpose(image)              # telephones store pictures on their side
    if image.mode.startswith("I"):
        # 16 bits of grey. Pillow's own conversion would clip nearly all of it to white.
        levels = np.asarray(image).clip(0, 65535) // 257
        image = Image.fromarray(levels.astype(np.uint8))
    # Transparency is laid on black: the colour below a transparent pixel is arbitrary.
    image = image.convert("RGBA")
    black = Image.new("RGBA", image.size, "black")
    image = Image.alpha_composite(black, image).convert("RGB")
    # `figures.save_picture` enlarges what a model draws, for the eye. Read again, it must be what
    # was drawn: LANCZOS would blur it.
    drawn = np.array(image.resize((size, size), Image.Resampling.NEAREST))
    if is_enlarged(image, drawn):
        return drawn
    # Paper: §4.1. Pictures are cropped at the centre, then resized.
    square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.array(square)                             # a copy: torch warns of read-only arrays


def is_enlarged(image, pixels):
    """Whether a PIL image in RGB is pixels (size, size, 3) uint8, each of them k x k times; k = 1
    counts."""
    size = len(pixels)
    k = image.width // size
    if k < 1 or image.size != (k * size, k * size):
        return False
    # One row of each k first: photographs stop here.
    rows = np.asarray(image)
    wide = pixels.repeat(k, axis=1)
    return all(np.array_equal(rows[first::k], wide) for first in range(k))


# ------------------------------------------------------------------------------ text and JSON lines
def check_ordinary(path, as_what=""):
    """Raise UserError if a path leads to a folder, a pipe or a device. A pipe would wait forever,
    and /dev/zero never ends. as_what: " as a picture", for the sentence.
    Raises FileNotFoundError if there is nothing."""
    if not isinstance(path, (str, os.PathLike)):        # an open file
        return
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no file {path}") from None
    except (OSError, ValueError) as problem:            # a link to itself, a NUL in the name
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"{path} cannot be read{as_what}: {reason}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} cannot be read{as_what}: it is a folder, a pipe or a device, not "
                        f"a file")


def read_whole(path, most=MOST_BYTES):
    """The bytes of a file. Raises UserError if it is no ordinary file, or has too many, and
    FileNotFoundError if there is none."""
    check_ordinary(path)
    size = os.stat(path).st_size
    if size > most:
        raise UserError(f"{path} has {size:,} bytes: that is more than the {most:,} that are read "
                        f"as a whole")
    return Path(path).read_bytes()


def read_lines(path, wanted):
    """[(line number, line)] of a JSON-lines file, without empty lines. wanted: what a line must
    hold, for the sentence. Raises UserError if the file is missing or is not text."""
    try:
        text = read_whole(path).decode("utf-8-sig")     # -sig: with a BOM, too
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it must hold one {wanted} per line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: save it as UTF-8") from None
    # Not splitlines: it would also cut at U+2028 and U+0085, which JSON allows inside a string.
    lines = enumerate(text.split("\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


def read_json(path):
    """What a JSON file says. Raises ValueError if it is not JSON, or no file that can be read, and
    FileNotFoundError if there is none."""
    return load_json(read_whole(path).decode("utf-8-sig"))


def load_json(text):
    """What a JSON text says. Raises ValueError if it is not JSON."""
    try:
        return json.loads(text, parse_int=whole_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def whole_number(digits):
    """The int of a JSON number. Raises ValueError for one that is beyond every float: JSON allows
    it, and whoever computes with it would end in an OverflowError."""
    if len(digits) > 300:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def read_records(path, keys):
    """[(line number, [the string under each key])] of a JSON-lines file of your own.
    Raises UserError that names the first line that is something else."""
    wanted = "{" + ", ".join(f'"{key}": ...' for key in keys) + "}"
    records = []
    for number, line in read_lines(path, wanted):
        try:
            entry = load_json(line)
            values = [entry[key] for key in keys]
        except (ValueError, KeyError, TypeError):
            values = [None]
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{path} line {number} is not {wanted}: {line[:60]!r}")
        records.append((number, values))
    return records
