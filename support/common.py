"""
common.py: what every room needs: the user's mistakes, the device, reading pictures and lines
"""
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps


ASSETS = Path(__file__).resolve().parents[1] / "assets"               # what the repository ships


class UserError(ValueError):
    """A mistake of the user's, with one sentence that says what to do. `run_command` prints it and exits with 2."""


@contextlib.contextmanager
def finish_step_first(alone=True):
    """A list that is empty until Ctrl-C is pressed, so that a step is finished first. TRAP: an exception here could fall
    between weights, average and count. alone: a second Ctrl-C stops at once. Not so under torchrun, which passes one
    Ctrl-C on twice, and kills what goes on for 30 s."""
    pressed = []

    def on_ctrl_c(*_):
        pressed.append(True)
        if alone:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():       # only there may Python catch a signal
        yield pressed
        return
    before = signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def run_command(main, argv=None):
    """Run a command line's main(argv). A user's mistake (ValueError, OSError) becomes one sentence on stderr and exit
    status 2; anything else is a bug of ours and keeps its traceback."""
    try:
        main(argv)
    except (ValueError, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


def check_writable(path):
    """Raise UserError if no file can be written at this path. Called before the work whose result
    goes there: found out afterwards, the result would be lost."""
    place = Path(path)
    if place.is_dir():                                  # "" is the folder we are in
        raise UserError(f"cannot write {str(path)!r}: name a file, not a folder")
    if not place.parent.is_dir():
        raise UserError(f"cannot write {path}: its folder does not exist")
    if place.exists() and not place.is_file():          # /dev/full, a pipe
        raise UserError(f"cannot write {path}: it is not an ordinary file")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise UserError(f"cannot write {path}: you have no permission to")


def pick_device():
    """The torch.device on which one process trains a VAE, samples and measures: CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():                   # not run here: float32, as on the CPU
        return torch.device("mps")
    return torch.device("cpu")


def crop_and_resize(image, size):
    """(size, size, 3) uint8 of any PIL image: centre-cropped to a square, resized, as in Transfusion §4.1.
    Transparency is laid on black; an EXIF rotation is applied."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                      # 16 bits of grey: Pillow's own conversion would clip it to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return np.array(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))       # a copy: torch warns of read-only ones


def open_picture(path, size, say=False):
    """(size, size, 3) uint8 of an image file; `say` tells when that is not what the file holds. Raises UserError, naming
    the file, if it cannot be read as a picture."""
    try:
        with Image.open(path) as image:
            if say and (image.size, image.mode, image.getexif().get(0x0112, 1)) != ((size, size), "RGB", 1):
                print(f"{path}: {image.size[0]}x{image.size[1]} {image.mode}, converted to {size}x{size} RGB")
            return crop_and_resize(image, size)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise UserError(f"{path} cannot be read as a picture ({problem}): is it truncated or of another type?") from None


def read_lines(path, wanted):
    """[(line number, line)] of a JSON-lines file, empty ones left out. Raises UserError, saying what is wanted in it."""
    try:
        return [line for line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line[1].strip()]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: it must hold one {wanted} per line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: save it as UTF-8") from None
