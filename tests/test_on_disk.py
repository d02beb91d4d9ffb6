"""
test_on_disk.py: are pictures that stay on disk the pictures that are there?             (sources/on_disk.py; App. C)
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


@pytest.fixture
def folder(tmp_path):
    """30 pictures: in a folder, in a folder within it, and in a tar, beside what is none."""
    root = tmp_path / "pictures"
    (root / "deep/er").mkdir(parents=True)
    for k in range(20):
        picture(k).save(root / ("deep/er" if k % 2 else "") / f"{k}.png")
    (root / "captions.jsonl").write_text("{}")
    with tarfile.open(root / "more.tar", "w") as tar:
        for k in range(20, 30):
            content = io.BytesIO()
            picture(k).save(content, "PNG")
            for name, data in ((f"{k}.png", content.getvalue()), (f"{k}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return root


def numbers(pixels):
    """Which pictures these are."""
    return [int(p[0, 0, 2]) for p in pixels]


def test_they_are_the_arrays_they_stand_for(folder, monkeypatch):
    """Catches a picture that is lost, or read twice, bytes of a neighbour in a tar, and another shape or order than its index."""
    with monkeypatch.context() as patch:
        patch.setattr(on_disk, "open_picture", lambda *a: pytest.fail("opened a picture that nobody asked for"))
        train, test = on_disk.load_on_disk(folder, 16)
    assert train.shape == (27, 16, 16, 3) and len(train) == 27 and len(test) == 3
    whole = train[:]
    assert whole.dtype == np.uint8 and whole.shape == train.shape
    assert sorted(numbers(whole) + numbers(test[:])) == list(range(30))
    for chosen in ([3, 3, 0], np.array([26, 5]), slice(2, 7)):
        assert np.array_equal(train[chosen], whole[chosen])
    for pixels in whole:
        k = int(pixels[0, 0, 2])
        assert (pixels == np.array(picture(k))).all()
    assert numbers(whole) != sorted(numbers(whole))     # a sorted folder must not give sorted pictures


def test_the_test_split_stays(folder):
    """Catches a picture that moves into the test split, or out of it, because another one was added."""
    _, before = on_disk.load_on_disk(folder, 16)
    picture(40).save(folder / "40.png")
    train, _ = on_disk.load_on_disk(folder, 16)
    moved = set(numbers(before[:])) & set(numbers(train[:]))
    assert len(moved) <= 1                              # the new one may push the last one out, into training


def test_bad_pictures_are_named_once_and_replaced(folder, capsys):
    """Catches a run of days that ends at a broken file, and one that names it at every step."""
    for k in (0, 1):
        path = folder / ("deep/er" if k else "") / f"{k}.png"
        path.write_bytes(path.read_bytes()[:40])
    train, test = on_disk.load_on_disk(folder, 16)
    found = numbers(train[:]) + numbers(test[:])
    train[:]
    assert len(found) == 30 and set(found) == set(range(2, 30))
    said = capsys.readouterr().out
    assert said.count("skipped: ") == 2 and "0.png" in said and "1.png" in said
    for path in folder.rglob("*.png"):
        path.write_bytes(b"none")
    (folder / "more.tar").unlink()
    train, _ = on_disk.load_on_disk(folder, 16, silent=True)
    with pytest.raises(UserError, match="none of 18 pictures can be read"):
        train[:2]


def test_the_order_is_that_of_the_names(folder):
    """Catches a folder that is moved, and whose test pictures are then others: they were trained on."""
    before = [place[0] for place in on_disk.list_pictures(folder)]
    assert before != sorted(before)                     # files that were made together do not stand together
    moved = folder.rename(folder.parent / "elsewhere")
    assert [place[0] for place in on_disk.list_pictures(moved)] == before


def test_five_bad_pictures_are_named(folder, capsys):
    """Catches thousands of sentences about a folder that is broken, or fewer than would show what is the matter."""
    for path in sorted(folder.rglob("*.png"))[:12]:
        path.write_bytes(b"none")
    train, test = on_disk.load_on_disk(folder, 16)
    train[:]
    assert capsys.readouterr().out.count("skipped: ") == 5


@pytest.mark.parametrize("n, wanted", [(2, 1), (19, 1), (20, 2), (2559, 255), (9999, 256)])
def test_how_many_are_for_the_test(monkeypatch, n, wanted):
    """Catches a test of nothing, of everything, or of so many that encoding them takes minutes."""
    monkeypatch.setattr(on_disk, "list_pictures", lambda folder: [("name", "path", None, None)] * n)
    train, test = on_disk.load_on_disk("here", 16)
    assert (len(test), len(train)) == (wanted, n - wanted)


def test_folders_that_are_none(folder, tmp_path):
    """Catches a traceback, and a tar that was cut short and read as a short one."""
    with pytest.raises(UserError, match="there is no folder"):
        on_disk.load_on_disk(tmp_path / "absent", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has 0 pictures"):
        on_disk.load_on_disk(tmp_path / "empty", 16)
    tar = folder / "more.tar"
    tar.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="more.tar is truncated or not a tar"):
        on_disk.load_on_disk(folder, 16)


def test_streamed_training_is_training_in_memory(folder):
    """Catches pictures in another order, or of another step: the weights are those of the array, to the bit."""
    train, _ = on_disk.load_on_disk(folder, 16)
    config = {"channels": 4, "multipliers": (1, 1), "z": 2}
    one, two = (train_vae(pixels, VAEConfig(**config), steps=2, batch=4, progress=False) for pixels in (train, train[:]))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_the_command_streams(folder, tmp_path, capsys):
    """autoencoder.train --stream, with a kind of folder that --data folder could not read; and --resume."""
    line = ["--stream", "--data-dir", str(folder), "--image-size", "16", "--steps", "2", "--batch", "4", "--out", str(tmp_path / "vae")]
    vae_training.main(line)
    assert "27 pictures on 1 x cpu" in capsys.readouterr().out and load_vae(tmp_path / "vae/vae.pt").config.image_channels == 3
    assert (tmp_path / "vae/reconstructions.png").stat().st_size > 100
    with pytest.raises(UserError, match="begun with pictures .27, 16"):
        picture(41).save(folder / "41.png")
        vae_training.main([*line, "--resume"])
    for options, words in ((["--stream"], "--stream needs --data-dir"), ([*line, "--loss", "paper", "--image-size", "32", "--overwrite"], "reads no captions")):
        with pytest.raises(UserError, match=words):
            vae_training.main(options)
