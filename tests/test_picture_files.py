"""
test_picture_files.py: a picture file becomes a square of pixels       (support/common.py; §4.1)

THE IDEA    Any picture that users have, of any mode, shape and type, is cropped at the centre and
            resized to (size, size, 3) uint8. Small pictures with known colours show what came out.
            Files that are damaged, hostile or no pictures at all get one sentence with their name.
TRY IT      python -m pytest -n 0 tests/test_picture_files.py
"""
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from support import common
from support.common import UserError, crop_and_resize, open_picture

MODES = ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "YCbCr", "I", "F", "I;16"]


def striped(w=60, h=20, mode="RGB"):
    """A wide picture: left third red, middle green, right blue. Its centre square is green."""
    picture = np.zeros((h, w, 3), np.uint8)
    for k in range(3):
        left = k * w // 3
        right = (k + 1) * w // 3
        picture[:, left:right, k] = 255
    return Image.fromarray(picture).convert(mode)


# ------------------------------------------------------------------------ crop, resize, convert
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("w, h", [(60, 20), (20, 60), (7, 5), (16, 16)])
def test_any_picture_becomes_a_square_of_three_channels(mode, w, h):
    """Catches a mode, or a shape, that ends in an error or in another array."""
    picture = crop_and_resize(Image.new(mode, (w, h)), 16)
    assert picture.shape == (16, 16, 3)
    assert picture.dtype == np.uint8


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_centre_crop(mode):
    """Transfusion §4.1 crops at the centre. Catches a squeezed picture, or its left end."""
    wide = striped(mode=mode)
    high = striped(mode="RGB").rotate(90, expand=True).convert(mode)
    green = np.array([0, 255, 0])

    for picture in (wide, high):
        square = crop_and_resize(picture, 16)
        inner = square[2:-2, 2:-2].astype(int)          # the border may be blurred
        assert (np.abs(inner - green).max(-1) < 8).all()


def test_resize_keeps_the_directions():
    """Catches rows and columns swapped, or a picture turned upside down."""
    corner = np.zeros((40, 40, 3), np.uint8)
    corner[:20, 20:] = 255                              # top right

    small = crop_and_resize(Image.fromarray(corner), 8)

    assert small[1, 6].min() > 250                      # top right
    assert small[1, 1].max() < 5                        # top left
    assert small[6, 6].max() < 5                        # bottom right
    assert small[6, 1].max() < 5                        # bottom left


def test_transparency_is_laid_on_black():
    """Catches the arbitrary colour that hides under a transparent pixel."""
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert crop_and_resize(clear, 16).max() == 0

    # A palette says which of its colours is transparent: here number 0, which is red.
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([255, 0, 0] + [0] * 765)
    palette.info["transparency"] = 0
    assert crop_and_resize(palette, 16).max() == 0


def test_sixteen_bit_pictures(tmp_path):
    """Catches 16-bit grey (scanners, microscopes) that is clipped to white.

    Pillow's own conversion does that."""
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")

    picture = open_picture(tmp_path / "deep.png", 32)

    assert picture.shape == (32, 32, 3)
    assert picture.dtype == np.uint8
    assert picture[0].max() < 20
    assert abs(int(picture[16, 16, 0]) - 128) < 10
    assert picture[-1].min() > 235


def test_exif_rotation(tmp_path):
    """Catches photographs from telephones that lie on their side."""
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, :16] = 255                               # bright on the left
    exif = Image.Exif()
    exif[0x0112] = 6                                    # orientation: turn it clockwise
    Image.fromarray(picture).save(tmp_path / "photo.jpg", exif=exif, quality=95)

    turned = open_picture(tmp_path / "photo.jpg", 32)

    assert turned[4].min() > 240                        # bright on top
    assert turned[-4].max() < 15


# -------------------------------------------------------------------- pictures that are too large
def png_chunk(kind, content):
    """A piece of a PNG file: its length, its kind, what it holds, and a checksum."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def black_png(width, height):
    """A PNG of black pixels, one bit each: a few kilobytes for millions of them."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)      # 1: bit per pixel
    bytes_per_row = 1 + (width + 7) // 8                                # 1: the row's filter
    rows = bytes(height * bytes_per_row)
    chunks = [
        png_chunk(b"IHDR", header),
        png_chunk(b"IDAT", zlib.compress(rows)),
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("width, height", [(8001, 8000), (13300, 13300), (60000, 60000)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(
        tmp_path, monkeypatch, width, height):
    """Catches a file of 21 kB that decodes to 2 GB.

    Of the second size Pillow warns; the third is an error of its own."""
    png = black_png(8001, 8000)
    small = struct.pack(">II", 8001, 8000)
    large = struct.pack(">II", width, height)
    (tmp_path / "bomb.png").write_bytes(png.replace(small, large))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))

    with pytest.raises(UserError, match="bomb.png cannot be read as a picture"):
        open_picture(tmp_path / "bomb.png", 32)


def test_the_limit_is_the_limit(tmp_path, monkeypatch):
    """Catches a picture of exactly so many pixels that is refused."""
    monkeypatch.setattr(common, "MOST_PIXELS", 400)
    (tmp_path / "20.png").write_bytes(black_png(20, 20))
    (tmp_path / "21.png").write_bytes(black_png(20, 21))

    assert open_picture(tmp_path / "20.png", 8).max() == 0
    with pytest.raises(UserError, match="20x21 pixels"):
        open_picture(tmp_path / "21.png", 8)


# ----------------------------------------------------------------- no picture, or a damaged one
def test_pipes_devices_and_folders_are_no_pictures(tmp_path):
    """Catches a program that waits for a pipe forever, or reads /dev/zero to its end."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)

    for name in (pipe, str(pipe), "/dev/zero", "/dev/null", tmp_path):
        with pytest.raises(UserError, match=f"{name} cannot be read as a picture.*not a file"):
            open_picture(name, 32)


def exif_block(tag, kind, count, value):
    """The bytes of an EXIF block with orientation 6 and one more entry. value: 4 bytes."""
    orientation = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
    entries = sorted([orientation, (tag, kind, count, value)])

    # II: of a number, the lowest byte comes first.
    block = b"Exif\0\0" + b"II*\0"
    block += struct.pack("<IH", 8, len(entries))        # where the entries begin; how many
    for tag, kind, count, value in entries:
        block += struct.pack("<HHI", tag, kind, count) + value
    return block + struct.pack("<I", 0)                 # no more entries elsewhere


@pytest.mark.parametrize("entry", [
    (0x0100, 9, 1, struct.pack("<i", -5)),              # the width
    (0x0103, 2, 4, b"abc\0"),                           # the compression
    (0x0103, 11, 1, struct.pack("<f", 1.5)),
    (0x011A, 2, 4, b"abc\0"),                           # pixels per inch
    (0x8825, 9, 1, struct.pack("<i", -5)),              # where the GPS entries are
], ids=["negative", "text", "fraction", "ratio", "pointer"])
def test_garbage_in_exif(tmp_path, entry):
    """Catches struct.error and TypeError as tracebacks.

    They are neither OSErrors nor ValueErrors."""
    red = Image.new("RGB", (32, 32), "red")
    red.save(tmp_path / "photo.jpg", exif=exif_block(*entry))

    with pytest.raises(UserError, match="photo.jpg cannot be read as a picture"):
        open_picture(tmp_path / "photo.jpg", 32)


def test_a_dds_of_an_unknown_kind(tmp_path):
    """Catches Pillow's NotImplementedError."""
    size_and_flags = struct.pack("<7I", 124, 0x1007, 32, 32, 0, 0, 0) + bytes(44)
    unknown = b"ABCD"                                   # the name of a compression
    pixel_format = struct.pack("<2I4s10I", 32, 4, unknown, *[0] * 5, 0x1000, *[0] * 4)
    content = b"DDS " + size_and_flags + pixel_format + bytes(5000)
    (tmp_path / "texture.dds").write_bytes(content)

    with pytest.raises(UserError, match="texture.dds cannot be read as a picture"):
        open_picture(tmp_path / "texture.dds", 32)


@pytest.mark.filterwarnings("ignore::UserWarning")      # Pillow's, of damaged TIFFs
@pytest.mark.parametrize("kind", ["AVIF", "PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damaged_pictures_of_any_type(tmp_path, kind):
    """Catches a decoder's own error. A damaged picture is either read, or named."""
    noise = np.random.default_rng(0).integers(0, 256, (28, 28)).astype(np.uint8)
    Image.fromarray(noise).convert("RGB").save(tmp_path / "whole", kind)
    whole = (tmp_path / "whole").read_bytes()

    refused = 0
    for place in range(0, len(whole), 1 + len(whole) // 150):           # 150 places
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            assert open_picture(tmp_path / "damaged", 8).shape == (8, 8, 3)
        except UserError as problem:
            assert "damaged cannot be read as a picture" in str(problem)
            refused += 1
    assert refused > 0
