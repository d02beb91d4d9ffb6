"""
test_sample_command_line.py: what a user sees      (sample.py; support/sample_options.py, figures)

THE IDEA    A tiny model.pt and a few pictures lie in a folder of the test's own. The program runs
            there, and the test looks at what it says and what it leaves behind.
PARTS       films, titles, `draw` and `edit` from Python; then the command line; then the memory
            that reading a checkpoint takes.
TRY IT      pytest -n 0 tests/test_sample_command_line.py
"""
import io
import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from model import Transfusion, count, sized
from sample import generate
from small_documents import noise, parts_of, script
from support import checkpoint, figures, sample_options
from support.common import ASSETS, UserError, run_command


# ---------------------------------------------------------------------------- films, and two calls
def test_a_film_ends_with_its_picture(tmp_path, monkeypatch):
    """Catches a film that stands still on another moment than the last, and a strip that shows
    other moments, or has another size."""

    def decode_latents(trained, x):
        return x.expand(-1, 8, 8, 3).to(torch.uint8).numpy()

    monkeypatch.setattr(figures, "decode_latents", decode_latents)
    # 19 moments, t = 18 to 0. Each is one grey, 10 t.
    frames = []
    for t in range(18, -1, -1):
        x = torch.full((1, 1, 1, 1), 10.0 * t)
        frames.append(SimpleNamespace(t=t, x=x, x0=torch.zeros(1, 1, 1, 1)))

    figures.save_film(None, frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        film.seek(film.n_frames - 1)
        assert film.convert("L").getextrema() == (0, 0)
        assert film.info["duration"] == 6 * 200         # Pillow keeps equal frames as one
        assert film.info["loop"] == 0                   # for ever
        film.seek(0)
        assert film.convert("L").getextrema() == (180, 180)

    figures.save_film(None, frames, tmp_path / "strip.png")
    greys = []
    with Image.open(tmp_path / "strip.png") as strip:
        # 10 by 2 pictures of 8 pixels, with a gap of 1 on each side; each pixel is 4 pixels wide.
        assert strip.size == (4 * (10 * 10 + 2), 4 * (2 * 10 + 2))
        for k in range(10):
            greys.append(strip.convert("L").getpixel((4 * (10 * k + 6), 4 * 6)))
    assert greys == list(range(180, -1, -20))


def test_a_title_has_two_lines_if_it_is_long():
    """Catches a short caption that is cut in two, and a single long word after an empty line."""
    assert figures.two_lines("a red circle") == "a red circle"
    assert figures.two_lines("x" * 40) == "x" * 40
    long = "a red circle above a blue square"
    assert figures.two_lines(long) == "a red circle\nabove a blue square"


def test_draw_draws_and_writes_nothing(monkeypatch, make_trained):
    """Catches words after the picture: the last part of the document would be no picture."""
    trained = make_trained()
    asked = []

    def generate(trained, prompts, **options):
        asked.append((prompts, options))
        return [[*prompt, torch.tensor([float(len(prompt[0]))])] for prompt in prompts]

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample, "decode_latents", lambda trained, latents: latents)
    assert sample.draw(trained, ["a", "abc"], steps=3).tolist() == [[1], [3]]
    assert asked == [([["a"], ["abc"]], dict(draw_now=True, max_words=0, steps=3))]


def test_edit_is_the_picture_after_the_words(make_trained):
    """Catches an edit that gives back the picture before, or that mixes up the rows of a batch."""
    trained = make_trained()
    before = noise(2, seed=3)
    instructions = ["the blue square", "a red circle"]
    after = sample.edit(trained, before, instructions, steps=3, seed=[1, 2])

    assert after.shape == before.shape
    for k in range(2):
        (document,) = generate(
            trained,
            [[before[k], instructions[k]]],
            draw_now=True,
            max_words=0,
            steps=3,
            over="both",
            seed=[k + 1],
        )
        assert torch.allclose(document[-1], after[k], atol=1e-2)
        assert not torch.allclose(before[k], after[k], atol=1e-1)


# ------------------------------------------------------------------------------------- command line
@pytest.fixture
def here(make_trained, tmp_path, monkeypatch):
    """The trained model, saved as model.pt in this test's own folder, with pictures: plain.png is
    what the model reads; the others have to be converted."""
    trained = make_trained()
    checkpoint.save_trained(tmp_path / "model.pt", trained)

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    Image.fromarray(pixels).resize((20, 12)).save(tmp_path / "wide.png")
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                    # orientation: on its side
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)

    monkeypatch.chdir(tmp_path)
    return checkpoint.load_trained(tmp_path / "model.pt")       # in 16 bits, as the program does


def command_line(arguments):
    """Run sample.py's main on model.pt, in few steps."""
    sample.main([*arguments, "--checkpoint", "model.pt", "--steps", "2"])


def command(*arguments):
    """The same, with words as arguments."""
    command_line(arguments)


def sheet(path, k=None):
    """Picture k of a sheet of pictures of 8x8 that sample.py wrote, or the only one, as it was
    before it was enlarged 8 times."""
    pixels = np.asarray(Image.open(path))[::8, ::8]
    if k is None:
        return pixels
    left = 1 + 9 * k                                    # a gap of 1 before each picture
    return pixels[1: 9, left: left + 8]


def test_prompts_with_pictures(here, capsys):
    """Catches words and pictures in another order than they were written, a picture that is read at
    another size or on its side, and a conversion that nobody is told of."""

    def read(text):
        return sample.read_prompt(text, here)

    # 1. In order; the one that lies on its side is turned, and the user is told.
    parts = read("a red [plain.png] the  blue square [turned.png]")
    assert parts_of(parts) == ["a red", "[picture]", "the  blue square", "[picture]"]
    printed = capsys.readouterr().out
    assert "turned.png: 8x8 RGB, converted to 8x8 RGB" in printed
    assert "plain.png" not in printed
    plain = np.asarray(Image.open("plain.png"))
    latents = checkpoint.encode_pixels(here, np.stack([plain, np.rot90(plain, -1)]))
    assert torch.allclose(parts[1], latents[0], atol=1e-5)
    assert torch.allclose(parts[3], latents[1], atol=1e-5)

    # 2. Pictures alone, words alone, nothing.
    assert parts_of(read("[wide.png][clear.png]")) == ["[picture]", "[picture]"]
    assert read("a circle") == ["a circle"]
    assert read(" ") == []
    printed = capsys.readouterr().out
    assert "wide.png: 20x12 RGB, converted to 8x8 RGB" in printed
    assert "clear.png: 8x8 RGBA, converted" in printed

    # 3. A picture that we drew is enlarged, for the eye. It is read as it was drawn.
    figures.save_picture(plain, "drawn.png")
    assert torch.equal(read("[drawn.png]")[0], parts[1])
    assert capsys.readouterr().out == ""
    # Not if one pixel is another, here in the last row and column.
    touched = np.array(Image.open("drawn.png"))
    touched[-1, -1] ^= 255
    Image.fromarray(touched).save("touched.png")
    read("[touched.png]")
    assert "converted to 8x8 RGB" in capsys.readouterr().out

    # 4. Brackets in a name, as a browser names a second download.
    Path("photo[1].png").write_bytes(Path("plain.png").read_bytes())
    parts_of_both = read("[photo[1].png] and [plain.png]")
    assert torch.equal(parts_of_both[0], parts[1])
    assert len(parts_of_both) == 3

    with pytest.raises(UserError, match="absent.png"):
        read("a [absent.png]")


def test_command_line(here, tmp_path, capsys):
    """Every way to call sample.py, and what it leaves behind. Catches the picture of the first edit
    in place of the last, a film that is missing, and a trace that leaves a mode out."""
    # 1. Draw two documents, with a film and a trace.
    command(
        "a red circle",
        "the [plain.png] blue square",
        "--film", "film.gif",
        "--trace",
        "-o", "two.png",
    )
    printed = capsys.readouterr().out
    assert "a red circle [picture]" in printed
    assert "the [picture] blue square [picture]" in printed
    assert "wrote two.png (3 pictures" in printed

    lines = [line for line in printed.splitlines() if line.startswith("rows 0,1")]
    assert len(lines) == 4
    assert "prompt read" in lines[0]
    assert "t = 1000" in lines[1]
    assert "t = 0" in lines[2]
    assert "t = 0, then <eoi>" in lines[3]
    assert "cache 5,11" in lines[0]                     # with P = 4 and EOI, the cache grows by 5
    assert "cache 10,16" in lines[3]
    assert Image.open("film.gif").n_frames > 2
    assert Image.open("two.png").size == (3 * 8 * 8 + 4 * 8, 8 * 8 + 2 * 8)

    # 2. Describe.
    command("--image", "plain.png")
    assert capsys.readouterr().out.startswith("plain.png: [picture]")
    assert not (tmp_path / "sample.png").exists()

    # 3. Edit two pictures, twice: the sheet shows the last edit of each.
    command(
        "--image", "plain.png",
        "--image", "wide.png",
        "--edit", "the blue square",
        "--edit", "a red circle",
    )
    line = "plain.png: [picture] the blue square [picture] a red circle [picture]"
    assert line in capsys.readouterr().out
    latents = torch.stack([sample.read_picture(name, here) for name in ("plain.png", "wide.png")])
    for text in ("the blue square", "a red circle"):
        latents = sample.edit(here, latents, [text] * 2, steps=2, seed=0)
    pictures = checkpoint.decode_latents(here, latents).astype(int)
    for k, wanted in enumerate(pictures):
        assert np.abs(sheet("sample.png", k).astype(int) - wanted).max() <= 2

    # 4. Edit one picture.
    command("--image", "plain.png", "--edit", "the blue square", "-o", "one.png")
    before = sample.read_picture("plain.png", here)[None]
    after = sample.edit(here, before, ["the blue square"], steps=2, seed=0)
    (wanted,) = checkpoint.decode_latents(here, after)
    assert np.abs(sheet("one.png").astype(int) - wanted).max() <= 2


@pytest.mark.parametrize("line, kept", [
    (["--image", "sample.png", "--edit", "a red circle"], "sample.png"),
    (["[sample.png] a red circle"], "sample.png"),
    (["--image", "./sample.png", "--image", "sample_2.png", "--edit", "the square"],
     "sample_2.png"),
    (["a red circle"], "sample.png"),
], ids=str)
def test_a_default_overwrites_nothing(here, capsys, tmp_path, line, kept):
    """Catches a picture of the user's that is replaced, by the edit of it for example, because
    nobody said -o. kept: the last file that is there already."""
    for name in ("sample.png", kept):
        Image.new("RGB", (8, 8), "red").save(name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    # 1. Without -o: everything stays, and a new name is found.
    command(*line)
    for path, content in before.items():
        assert path.read_bytes() == content
    (new,) = [path for path in tmp_path.iterdir() if path not in before]
    assert new.name == ("sample_2.png" if kept == "sample.png" else "sample_3.png")
    assert f"wrote {new.name}" in capsys.readouterr().out

    # 2. Who says so may overwrite.
    command(*line, "-o", "sample.png")
    assert (tmp_path / "sample.png").read_bytes() != before[tmp_path / "sample.png"]


@pytest.mark.parametrize("name", ["kreis_\u00fc.png", "photo[1].png", "\udcff.png"], ids=ascii)
def test_names_of_pictures(here, tmp_path, monkeypatch, name):
    """Catches a drawn picture that is lost because stdout cannot print the name of another, and
    brackets in a name that are read as a prompt's."""
    Image.new("RGB", (20, 12), "red").save(name)
    printed = io.BytesIO()
    ascii_only = io.TextIOWrapper(printed, encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", ascii_only)

    run_command(command_line, ["--image", name, "--edit", "the blue square"])
    assert (tmp_path / "sample.png").exists()
    assert b"converted" in printed.getvalue()
    line = f"{name}: [picture] the blue square [picture]"
    assert line.encode("ascii", "backslashreplace") in printed.getvalue()

    command("--image", name)


def test_figures_leave_a_notebook_alone():
    """Catches a module that makes a choice for the whole program when it is imported: pictures
    would come under the wrong cell of a notebook."""
    code = (
        "import sys, support.figures; "
        "support.figures.new_figure(2, 1); "
        "assert 'matplotlib.figure' in sys.modules; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    folder = Path(sample.__file__).parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)


def test_the_picture_is_saved_before_it_is_told_of(here, tmp_path, monkeypatch):
    """Catches a picture that is gone because the output is closed, or full."""

    def broken(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(OSError):
        command("a red circle", "--film", "film.png")
    assert (tmp_path / "sample.png").exists()
    assert (tmp_path / "film.png").exists()


def test_open_command_line(here, tmp_path, capsys, monkeypatch):
    """Catches a picture too many, one that is missing, and a film of a picture that was never
    drawn."""
    # 1. A model that draws by itself, twice: the third BOI is one too many.
    script(monkeypatch, "circle <boi> and <boi> a <boi>")
    command("a red", "--open", "--pictures", "2", "--film", "film.png")
    assert "a red circle [picture] and [picture] a" in capsys.readouterr().out
    assert (tmp_path / "film.png").exists()

    # 2. A model that does not draw.
    script(monkeypatch, "circle")
    command("a red", "--open", "--film", "none.gif", "-o", "none.png")
    assert "a red circle" in capsys.readouterr().out
    assert not list(tmp_path.glob("none.*"))

    # 3. The only picture is the prompt's.
    script(monkeypatch, "circle")
    command("[plain.png] a red", "--open", "--film", "none.gif", "-o", "none.png")
    assert "[picture] a red circle" in capsys.readouterr().out
    assert not (tmp_path / "none.gif").exists()


@pytest.mark.parametrize("name, good, bad", [
    ("seed", 0, -1),
    ("seed", 2 ** 32 - 1, 2 ** 32),
    ("guidance", 0, -0.1),
    ("temperature", 0, -0.1),
    ("top-p", 0.01, 0),
    ("top-p", 1, 1.01),
    ("steps", 1, 0),
    ("steps", 1000, 1001),
])
def test_the_ends_of_the_options(name, good, bad):
    """Catches a range that ends one number too early or too late."""
    sample_options.parse_arguments(["a circle", f"--{name}={good}"], ("both",))
    with pytest.raises(UserError, match=f"--{name} must be"):
        sample_options.parse_arguments(["a circle", f"--{name}={bad}"], ("both",))


# ------------------------------------------------------------------------------------------- memory
def memory(what):
    """Bytes: a line of /proc/self/status, which has kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return 1024 * int(line.split()[1])


def read_checkpoint(path):
    """Load a model.pt; returns (parameters, bytes that this process had more at the peak)."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")       # the peak counts from here on
    trained = checkpoint.load_trained(path)
    peak = memory("VmHWM") - before

    # Nothing is missing.
    assert trained.model.head.weight.dtype == torch.float32
    for weight in trained.model.parameters():
        assert weight.requires_grad
        assert not weight.is_meta
        assert (weight == 0.5).all()
    return count(trained.model), peak


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="the peak of memory is read from Linux' /proc",
)
def test_reading_a_checkpoint_takes_one_copy_of_it(tmp_path):
    """Catches first weights that are drawn for nothing, and 16 bits that lie beside 32: ten bytes
    per parameter at the peak, 530 GB for eight processes that read the 7B. Here it is 0.16B, Table
    8's smallest."""
    # 1. A checkpoint of that size.
    words = data.Words([f"w{k}" for k in range(32000)])
    shape = sized("0.16b", vocabulary=len(words), latent=(4, 8, 8), context=4096)
    with torch.device("meta"):
        empty = Transfusion(shape)
    weights = {}
    for name, tensor in empty.state_dict().items():
        weights[name] = torch.full(tensor.shape, 0.5, dtype=torch.float16)
    shipped = checkpoint.load_trained(ASSETS / "scenes.pt")
    content = {
        "kind": "model",
        "config": vars(shape),
        "words": words.vocabulary,
        "vae": checkpoint.pack_vae(shipped.vae),
        "weights": weights,
        "diffusion": {"kind": "ddpm", "T": 1000, "shift": 1.0},
    }
    torch.save(content, tmp_path / "model.pt")

    # 2. Read it, in a process of its own: memory that other tests have given back would hide as
    #    much of the peak, or add to it.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        parameters, peak = pool.apply(read_checkpoint, (tmp_path / "model.pt",))
    assert parameters > 1.6e8
    assert peak / parameters <= 4.5                     # 4 of these are the weights themselves
