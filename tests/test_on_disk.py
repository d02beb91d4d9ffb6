"""
test_on_disk.py: pictures that stay on disk              (sources/on_disk.py; Transfusion App. C)

THE IDEA    Thirty pictures, each of a colour that says its number, lie in folders and in a tar.
            Read one by one when they are asked for, they must be the array that they stand for:
            in number, order and split, and in the weights of a VAE that is trained on them.
TRY IT      python -m pytest -n 0 tests/test_on_disk.py
"""
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder import train as vae_training
from autoencoder.train import train_vae
from sources import on_disk
from support.checkpoint import load_vae
from support.common import UserError
from vae import VAEConfig


def picture(k):
    """PIL's image number k: a colour of its own."""
    return Image.new("RGB", (16, 16), (5 * k, 255 - 5 * k, k))


def numbers(pixels):
    """Which pictures these are: their blue says it."""
    return [int(p[0, 0, 2]) for p in pixels]


def add_to_tar(tar, name, content):
    """Add a file with these bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    """30 pictures: in a folder, in a folder within it, and in a tar, beside files that are none."""
    root = tmp_path / "pictures"
    (root / "deep/er").mkdir(parents=True)
    for k in range(20):
        place = root / "deep/er" if k % 2 else root
        picture(k).save(place / f"{k}.png")
    (root / "captions.jsonl").write_text("{}")

    with tarfile.open(root / "more.tar", "w") as tar:
        for k in range(20, 30):
            png = io.BytesIO()
            picture(k).save(png, "PNG")
            add_to_tar(tar, f"{k}.png", png.getvalue())
            add_to_tar(tar, f"{k}.txt", b"a caption")
    return root


# -------------------------------------------------------------------------- they stand for an array
def test_they_are_the_arrays_they_stand_for(folder, monkeypatch):
    """Catches a picture that is lost, or read twice, and bytes of a neighbour in a tar.

    Also catches another shape or order than its index says."""
    with monkeypatch.context() as patch:
        opened = "opened a picture that nobody asked for"
        patch.setattr(on_disk, "open_picture", lambda *_: pytest.fail(opened))
        train, test = on_disk.load_on_disk(folder, 16)
    assert train.shape == (27, 16, 16, 3)
    assert len(train) == 27
    assert len(test) == 3

    whole = train[:]
    assert whole.dtype == np.uint8
    assert whole.shape == train.shape
    assert sorted(numbers(whole) + numbers(test[:])) == list(range(30))

    for chosen in ([3, 3, 0], np.array([26, 5]), slice(2, 7)):
        assert np.array_equal(train[chosen], whole[chosen])
    for k, pixels in zip(numbers(whole), whole):
        assert (pixels == np.array(picture(k))).all()

    # A sorted folder must not give sorted pictures.
    assert numbers(whole) != sorted(numbers(whole))


def test_streamed_training_is_training_in_memory(folder):
    """Catches pictures in another order, or of another step.

    The weights must be those of a training on the array, to the bit."""
    train, _ = on_disk.load_on_disk(folder, 16)

    trained = []
    for pixels in (train, train[:]):
        config = VAEConfig(channels=4, multipliers=(1, 1), z=2)
        vae = train_vae(pixels, config, steps=2, batch=4, progress=False)
        trained.append(vae.state_dict().values())

    for streamed, in_memory in zip(*trained, strict=True):
        assert torch.equal(streamed, in_memory)


# -------------------------------------------------------------------------- the order and the split
def test_the_order_is_that_of_the_names(folder):
    """Catches a folder that is moved, and whose test pictures are then others.

    Those were trained on."""
    before = [place[0] for place in on_disk.list_pictures(folder)]
    assert before != sorted(before)                     # what was made together is apart

    moved = folder.rename(folder.parent / "elsewhere")

    assert [place[0] for place in on_disk.list_pictures(moved)] == before


def test_the_test_split_stays(folder):
    """Catches a picture that moves into the test split, or out of it, when another one is added."""
    _, before = on_disk.load_on_disk(folder, 16)
    picture(40).save(folder / "40.png")

    train, _ = on_disk.load_on_disk(folder, 16)

    moved = set(numbers(before[:])) & set(numbers(train[:]))
    assert len(moved) <= 1                  # the new one may push the last one out, into training


@pytest.mark.parametrize("n, wanted", [(2, 1), (19, 1), (20, 2), (2559, 255), (9999, 256)])
def test_how_many_are_for_the_test(monkeypatch, n, wanted):
    """Catches a test of nothing, of everything, or of so many that encoding them takes minutes."""
    places = [("name", "path", None, None)] * n
    monkeypatch.setattr(on_disk, "list_pictures", lambda folder: places)

    train, test = on_disk.load_on_disk("here", 16)

    assert len(test) == wanted
    assert len(train) == n - wanted


# ------------------------------------------------------------------------------------- what is bad
def test_bad_pictures_are_named_once_and_replaced(folder, capsys):
    """Catches a run of days that ends at a broken file, and one that names it at every step."""
    for path in (folder / "0.png", folder / "deep/er/1.png"):
        path.write_bytes(path.read_bytes()[:40])

    train, test = on_disk.load_on_disk(folder, 16)
    found = numbers(train[:]) + numbers(test[:])
    train[:]                                            # once more

    # In the place of each bad picture stands a good one.
    assert len(found) == 30
    assert set(found) == set(range(2, 30))
    printed = capsys.readouterr().out
    assert printed.count("skipped: ") == 2
    assert "0.png" in printed
    assert "1.png" in printed

    # None is good.
    for path in folder.rglob("*.png"):
        path.write_bytes(b"none")
    (folder / "more.tar").unlink()
    train, _ = on_disk.load_on_disk(folder, 16, silent=True)
    with pytest.raises(UserError, match="none of 18 pictures can be read"):
        train[:2]


def test_five_bad_pictures_are_named(folder, capsys):
    """Catches thousands of sentences about a folder that is broken.

    Also catches fewer than would show what is the matter."""
    for path in sorted(folder.rglob("*.png"))[:12]:
        path.write_bytes(b"none")

    train, _ = on_disk.load_on_disk(folder, 16)
    train[:]

    assert capsys.readouterr().out.count("skipped: ") == 5


def test_folders_that_are_none(folder, tmp_path):
    """Catches a traceback, and a tar that was cut short and is read as a short one."""
    with pytest.raises(UserError, match="there is no folder"):
        on_disk.load_on_disk(tmp_path / "absent", 16)

    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has 0 pictures"):
        on_disk.load_on_disk(tmp_path / "empty", 16)

    (folder / "more.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="more.tar is truncated or not a tar"):
        on_disk.load_on_disk(folder, 16)


# ------------------------------------------------------------------------------------- the command
def test_the_command_streams(folder, tmp_path, capsys):
    """Catches an autoencoder.train --stream that cannot read what --data folder could not.

    Also catches a --resume on other pictures."""
    out = tmp_path / "vae"
    command = [
        "--stream",
        "--data-dir", str(folder),
        "--image-size", "16",
        "--steps", "2",
        "--batch", "4",
        "--out", str(out),
    ]

    vae_training.main(command)
    assert "27 pictures on 1 x cpu" in capsys.readouterr().out
    assert load_vae(out / "vae.pt").config.image_channels == 3
    assert (out / "reconstructions.png").stat().st_size > 100

    picture(41).save(folder / "41.png")
    with pytest.raises(UserError, match="begun with pictures .27, 16"):
        vae_training.main([*command, "--resume"])

    with pytest.raises(UserError, match="--stream needs --data-dir"):
        vae_training.main(["--stream"])
    paper = ["--loss", "paper", "--image-size", "32", "--overwrite"]
    with pytest.raises(UserError, match="reads no captions"):
        vae_training.main([*command, *paper])
