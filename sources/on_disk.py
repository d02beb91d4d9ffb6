"""
on_disk.py: pictures that stay on disk until they are wanted        (Transfusion App. C, "Data")

THE IDEA    The VAE learns from more pictures than fit in memory: five million of 256 x 256 are a
            terabyte. It wants a few at a time, at random. So this keeps a list of where they lie,
            and opens those that are asked for. It looks like the array that it stands for.
A PICTURE   folder of .jpg .png .webp, .tar files, in any depth
               |  list_pictures                  (file)  or  (tar, where in it, how long)
               v
            PicturesOnDisk  [[7, 3, 9]] --> (3, h, w, 3) uint8
THE RULE    The order is that of a hash of the names: a random one, the same on every machine. The
            first pictures, 256 or a tenth, are for the test, and are never trained on.
PAPER/HERE  same: pictures are cropped at the centre and resized to a square.
            our choice: in place of a picture that cannot be read comes the next one.
READ NEXT   folder.py, ../autoencoder/train.py        TEST  tests/test_on_disk.py
"""
import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sources.pairs import hash_name
from support.common import UserError, open_picture

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
TEST = 256                                              # pictures of the test split, at most
READERS = 8                                             # files that are opened at once


def list_pictures(folder):
    """[(name, path, where, length)] of all pictures in a folder, its folders, and their tars, in
    the order of a hash of their names. where, length: of the bytes in a tar; None for a file.
    Raises UserError if there are fewer than two."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} of pictures")
    places = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in ENDINGS:
            places.append((name, path, None, None))
        elif path.suffix.lower() == ".tar":
            places += list_tar(name, path)
    if len(places) < 2:
        raise UserError(f"{folder} has {len(places)} pictures ({', '.join(ENDINGS)}, or .tar files "
                        f"of them): at least two are needed, one for the test")
    return sorted(places, key=lambda place: (hash_name(place[0]), place[0]))


def list_tar(name, path):
    """[(name, path, where, length)] of the pictures in a tar. Only headers are read."""
    places = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # A sparse member is stored otherwise than as its bytes in a row.
                picture = Path(member.name).suffix.lower() in ENDINGS
                if member.isreg() and not member.issparse() and picture:
                    places.append((f"{name}/{member.name}", path, member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError):
        raise UserError(f"{path} is truncated or not a tar: fetch it again, or take it "
                        f"away") from None
    return places


class PicturesOnDisk:
    """Pictures as an array (N, size, size, 3) uint8 of which only what is indexed is read.

    places    as `list_pictures` has them          size      pixels per side
    silent    whether not to name pictures that cannot be read"""

    def __init__(self, places, size, silent=False):
        self.places = places
        self.shape = (len(places), size, size, 3)
        self.silent = silent
        self.unreadable = set()             # the numbers of those that were met

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        """(n, size, size, 3) uint8 of a slice, or of an array of n numbers."""
        numbers = np.arange(len(self))[index]
        with ThreadPoolExecutor(READERS) as pool:       # decoding leaves Python's lock to others
            return np.stack(list(pool.map(self.read, numbers.tolist())))

    def read(self, k):
        """Picture k, or the next one that can be read. Raises UserError if there is none."""
        for number in range(k, k + len(self)):
            number %= len(self)
            try:
                return self.open(number)
            except UserError as problem:
                if number not in self.unreadable and len(self.unreadable) < 5 and not self.silent:
                    print(f"skipped: {problem}")
                self.unreadable.add(number)
        raise UserError(f"none of {len(self)} pictures can be read")

    def open(self, k):
        """Picture k, (size, size, 3) uint8. Raises UserError if it cannot be read."""
        name, path, where, length = self.places[k]
        size = self.shape[1]
        if where is None:
            return open_picture(path, size)
        with open(path, "rb") as file:
            file.seek(where)
            content = io.BytesIO(file.read(length))
        try:
            return open_picture(content, size)
        except UserError as problem:
            # The name of the picture, in place of the name of the bytes.
            raise UserError(str(problem).replace(str(content), name)) from None


def load_on_disk(folder, size, silent=False):
    """(pictures to learn from, pictures for the test), two PicturesOnDisk of a folder."""
    places = list_pictures(folder)
    n = max(1, min(TEST, len(places) // 10))
    test = PicturesOnDisk(places[:n], size, silent)
    return PicturesOnDisk(places[n:], size, silent), test
