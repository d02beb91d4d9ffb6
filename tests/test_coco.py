"""
test_coco.py: do CIDEr, FID and CLIP score say what the field's own programs say?          (metrics/coco.py; Transfusion App. B.1)

The references are pycocoevalcap, scipy and transformers, where they are installed, and cases whose answer is known: the same
crowd, a crowd moved by a known way, an artist who hands in the photo itself.
"""
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from metrics import coco
from scale import distributed
from sources import scenes
from support import checkpoint
from support.common import UserError, open_picture
from vae import VAE, VAEConfig

HOME = Path(__file__).resolve().parents[1]


def some_texts(n, seed=0, most=9):
    """n texts of 0 to `most` - 1 words out of seven."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(list("abcdefg"), rng.integers(most))) for _ in range(n)]


def test_cider_is_pycocoevalcap():
    """Random captions, some empty or of one word, with 1 to 4 references each."""
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    answers, rng = some_texts(40), np.random.default_rng(1)
    references = [some_texts(rng.integers(1, 5), seed=k + 10, most=12) for k in range(40)]
    references[0] = ["a b c d e f g a b c d e f g"] * 2 # much longer than its answer
    theirs = scorer.CiderScorer(n=4, sigma=6.0)
    for answer, texts in zip(answers, references):
        theirs += (answer, texts)
    assert coco.cider(answers, references) == pytest.approx(100 * theirs.compute_score()[0], rel=1e-9)


def test_cider_of_known_captions():
    """The same words: 1000; nothing shared, or only what is said of every picture: 0. Capitals and full stops do not count."""
    texts = ["a b c d e", "f g h i j", "k l m n o"]
    assert coco.cider(texts, [[t] for t in texts]) == pytest.approx(1000)
    assert coco.cider([t.upper() + "." for t in texts], [[t] for t in texts]) == pytest.approx(1000)
    assert coco.cider(texts[1:] + texts[:1], [[t] for t in texts]) == 0
    assert coco.cider(["the", "the"], [["the cat sat on it"], ["the dog ran to him"]]) == 0
    # n-grams of 1 to 4 words, a quarter each: four words have them all, three have no four in a row.
    assert coco.cider(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]]) == pytest.approx(1000)
    assert coco.cider(["a b c", "e f g"], [["a b c"], ["e f g"]]) == pytest.approx(750)
    one, two = coco.cider(["a b c d e", "x"], [["a b c d e"], ["f g h i j"]]), coco.cider(["a b c d e", "x"], [["a b c d e", "p q r s"], ["f g h i j"]])
    assert one == pytest.approx(500) and 0 < two < one                  # the mean over references, not the best


def test_frechet_of_known_crowds():
    """Catches a variance for a deviation, a missing cross term, a mean that is not squared, and features counted by rows."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=g, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T          # mean 0, covariance 1, exactly
    assert coco.frechet(x, x) == pytest.approx(0, abs=1e-8)
    assert coco.frechet(x, x + 2) == pytest.approx(5 * 4)
    assert coco.frechet(x, 3 * x) == pytest.approx(5 * (3 - 1) ** 2)    # of Gaussians on a line: difference of deviations, squared
    assert coco.frechet(x[:3], x[3:6]) > 0                              # fewer pictures than features: no NaN


def test_frechet_is_scipys():
    """Two crowds with covariances of full rank that do not commute: (S S')^(1/2) by scipy's general matrix root."""
    linalg = pytest.importorskip("scipy.linalg")
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 8, generator=g) @ torch.randn(8, 8, generator=g) + k for k in (0, 1))
    S, S2 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(S + S2 - 2 * linalg.sqrtm(S @ S2).real)
    assert coco.frechet(x, y) == pytest.approx(wanted, rel=1e-5) == coco.frechet(y, x)


class Stand_in(torch.nn.Module):
    """The interface of the published Inception: uint8 (n, 3, h, w) of any size -> features."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8 and return_features and img.shape[1] == 3
        return img.double().mean(dim=(2, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_inception_is_a_torchscript_file(tmp_path):
    """Catches channels last, floats, or logits where features are wanted; and a traceback for another file."""
    torch.jit.save(torch.jit.script(Stand_in()), tmp_path / "inception.pt")
    pixels = np.random.default_rng(0).integers(256, size=(3, 20, 30, 3), dtype=np.uint8)
    assert np.allclose(coco.load_inception(tmp_path / "inception.pt", "cpu")(pixels).numpy(), pixels.mean((1, 2)))
    (tmp_path / "text.pt").write_text("no network")
    for name in ("absent.pt", "text.pt"):
        with pytest.raises(UserError, match=f"{name} is missing or not TorchScript"):
            coco.load_inception(tmp_path / name, "cpu")


@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "folder", "absent.pt", "text.pt"])
def test_an_inception_that_is_none(tmp_path, what):
    """Catches a command that waits for ever for what a pipe does not say."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.pt").write_text("not TorchScript")
    with pytest.raises(UserError, match="is missing or not TorchScript"):
        coco.load_inception(tmp_path / what, "cpu")


def test_clip_is_transformers(tmp_path):
    """A CLIP model of random weights, saved as transformers does: our cosines are its logits. Catches pictures in another order
    than their texts, and vectors that are not of unit length."""
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefg", *(f"{c}</w>" for c in "abcdefg")]
    (tmp_path / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(small, vocab_size=16, max_position_embeddings=12, bos_token_id=0, eos_token_id=1),
        vision_config=dict(small, image_size=32, patch_size=16), projection_dim=8))
    prepare = transformers.CLIPProcessor(transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer)
    model.save_pretrained(tmp_path / "clip")
    prepare.save_pretrained(tmp_path / "clip")
    pixels, texts = np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8), ["a b", "c", "d e f g " * 9, "g"]
    with torch.no_grad():
        out = model.eval()(**prepare(text=texts, images=list(pixels), return_tensors="pt", padding=True, truncation=True, max_length=12))
    found = coco.load_clip(tmp_path / "clip", "cpu")(pixels, texts).detach()
    assert torch.allclose(found, out.logits_per_image.diagonal() / model.logit_scale.exp(), atol=1e-5) and found.std() > 1e-4
    with pytest.raises(UserError, match="absent has no CLIP model"):
        coco.load_clip(tmp_path / "absent", "cpu")
    for weights in (tmp_path / "clip").glob("model*"):
        weights.unlink()
    (tmp_path / "clip/pytorch_model.bin").write_bytes(b"garbage")           # unpickling it says nothing of CLIP
    with pytest.raises(UserError, match="clip has no CLIP model"):
        coco.load_clip(tmp_path / "clip", "cpu")


@pytest.fixture
def folder(tmp_path):
    """Nine pictures of one colour each with two captions, a tenth that cannot be read."""
    lines = []
    for k in range(10):
        Image.new("RGB", (40, 30), (25 * k, 0, 0)).save(tmp_path / f"{k}.png")
        lines += [{"image": f"{k}.png", "caption": "a circle"}, {"image": f"{k}.png", "caption": "A red circle"}]
    (tmp_path / "9.png").write_text("no picture")
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines[::2] + lines[1::2])))
    return tmp_path


def test_folders(folder):
    """Catches a picture listed once per caption, a caption that goes to another picture, and the first n instead of any n."""
    items = coco.read_folder(folder, 32, 9, seed=0)
    assert all(texts == ["a circle", "A red circle"] for _, texts in items) and len(items) == 9
    chosen = [coco.read_folder(folder, 32, 4, seed) for seed in (0, 0, 1, 2)]
    names = [[picture.args[0].name for picture, _ in items] for items in chosen]
    assert names[0] == names[1] and len({tuple(row) for row in names}) > 1 and all(row == sorted(set(row)) for row in names)
    picture, _ = coco.read_folder(folder, 32, 10)[3]
    assert picture().shape == (32, 32, 3) and picture()[0, 0].tolist() == [75, 0, 0]


def test_an_empty_caption_is_no_reference(folder, capsys):
    """Catches one that is compared with every answer, which lowers CIDEr, or drawn as a prompt; it is named."""
    with open(folder / "captions.jsonl", "a") as file:
        file.write('\n{"image": "3.png", "caption": "  "}\n')
    items = coco.read_folder(folder, 32, 10)
    assert [texts for _, texts in items] == [["a circle", "A red circle"]] * 10
    assert "skipped 1 of 21 captions" in capsys.readouterr().out


def test_scenes_have_true_captions_of_their_own():
    """Catches captions that leave an object out, and the one that the scene was drawn for given as the only one."""
    items = coco.draw_scenes(scenes.WORLDS["six"], 32, 60)
    for picture, texts in items:
        things = scenes.parse(picture())
        assert 1 <= len(texts) == len(set(texts)) <= 5 and all(scenes.holds(scenes.read_caption(text), things) for text in texts)
    assert max(len(texts) for _, texts in items) == 5


@pytest.fixture
def trained():
    """No model, but what `measure` asks of one: words, and how long its context is."""
    weight = torch.zeros(3)
    config = SimpleNamespace(context=30, patches=16, latent=(4, 8, 8), layers=2, width=8)
    model = SimpleNamespace(config=config, embedding=SimpleNamespace(weight=weight), head=SimpleNamespace(weight=weight))
    return SimpleNamespace(tokenizer=data.Words(scenes.vocabulary()), vae=SimpleNamespace(f=4), model=model, kind="transfusion")


def play(monkeypatch, items, draws, says):
    """Stand-ins: draws(text) -> picture; says(number of the picture) -> caption. Pictures carry their number."""
    monkeypatch.setattr(coco, "encode_pixels", lambda trained, pixels: pixels[:, 0, 0, 0])
    monkeypatch.setattr(sample, "draw", lambda trained, texts, seed, first=0, **_: np.stack([draws(text) for text in texts]))
    monkeypatch.setattr(sample, "describe", lambda trained, numbers, **_: [says(int(k)) for k in numbers])


def grey(k):
    """A picture of one grey, which is its number."""
    return np.full((32, 32, 3), k, np.uint8)


def missing():
    """A picture that cannot be read."""
    return open_picture("absent.png", 32)


def test_measure(monkeypatch, trained, folder, capsys):
    """An artist who hands in the photo, and a writer who knows a caption of it; then ones who mix them up. Catches captions
    beside another picture's references, also after one that cannot be read; and prompts judged with another's picture."""
    words = "circle square triangle cross circles squares triangles crosses red".split()
    items = []
    for k, word in enumerate(words):
        picture = partial(grey, 25 * k) if k != 4 else partial(open_picture, folder / "9.png", 32)
        items.append((picture, [f"a {word}", f"A {word} above"]))

    def number(text):
        return words.index(text.split()[1])

    def see(pixels):
        return torch.from_numpy(pixels[:, 0, 0, :2] / 25.0)

    def clip(pixels, texts):
        return torch.tensor([float(p[0, 0, 0] == 25 * number(text)) for p, text in zip(pixels, texts)])

    play(monkeypatch, items, lambda text: grey(25 * number(text)), lambda k: f"a {words[k // 25]} above")
    found, said = coco.measure(trained, items, see, clip, steps=3)
    assert found["distance"] == pytest.approx(0, abs=1e-9) and found["clip"] == 100 and (found["n"], found["references"]) == (8, 2)
    assert all(answer == texts[1].lower() for answer, texts in said) and "skipped 1 of 9" in capsys.readouterr().out
    real = see(np.stack([grey(25 * k) for k in range(9) if k != 4]))    # how far apart are real ones? Every second, and the others
    assert found["halves"] > 0 and found["halves"] == pytest.approx(coco.frechet(real[::2], real[1::2]))
    play(monkeypatch, items, lambda text: grey(25 * (8 - number(text))), lambda k: f"a {words[8 - k // 25]} above")
    mixed, _ = coco.measure(trained, items, see, clip, steps=3)
    assert mixed["cider"] < 0.2 * found["cider"] and mixed["clip"] == 0
    assert mixed["distance"] == pytest.approx(0, abs=1e-9)              # a crowd is a crowd: FID cannot see it
    play(monkeypatch, items, lambda text: grey(25), lambda k: "a circle")
    assert coco.measure(trained, items, see, steps=3)[0]["distance"] > 1
    only = coco.measure(trained, items, steps=3)[0]
    assert {"cider"} < only.keys() and not {"distance", "clip"} & only.keys()
    assert {"distance"} < coco.measure(trained, items, see, captions=False, steps=3)[0].keys() - {"cider"}


def test_measure_is_the_same_in_any_pieces(monkeypatch, trained):
    """Noise belongs to a picture, not to its place in a batch, among the ranks, or behind one that cannot be read. Catches parts put
    together in another order, and noise that is drawn twice."""
    items = [(missing if k % 7 == 3 else partial(grey, k), ["a circle", "a square"]) for k in range(50)]
    play(monkeypatch, items, None, lambda k: f"{k}")
    seen = []
    monkeypatch.setattr(sample, "draw", lambda trained, texts, seed, **_: seen.extend(seed) or np.stack([
        np.full((32, 32, 3), s * 37 % 251, np.uint8) for s in seed]))

    def features(pixels):
        return torch.from_numpy(pixels[:, 0, 0, :2] * [1.0, 0.5])

    def whole(work, part):
        return [work(part, 0)]

    def divided(work, part):
        return [work(part[:20], 0), work(part[20:], 20)]

    found = []
    for pieces, split_work in ((64, whole), (9, whole), (9, divided), (1, whole)):
        monkeypatch.setattr(coco, "pictures_per_batch", lambda trained, pieces=pieces: pieces)
        monkeypatch.setattr(distributed, "split_work", split_work)
        found.append(coco.measure(trained, items, features, seed=1))
        assert seen == [100003 + k for k in range(50) if k % 7 != 3]
        seen.clear()
    assert all(other == found[0] for other in found) and [answer for answer, _ in found[0][1]] == [str(k) for k in range(50) if k % 7 != 3]


def test_measure_looks_before_it_draws(monkeypatch, trained):
    """Catches a mistake that is found after hours: an unknown word, a caption that is too long, and nothing that can be read."""
    monkeypatch.setattr(sample, "draw", lambda *_, **__: pytest.fail("drawn"))
    for text, message in (("a purple circle", "'purple'"), ("a red circle " * 4, "31 positions"), ("a circle", "absent.png")):
        with pytest.raises(UserError, match=message):
            coco.measure(trained, [(missing, [text])] * 5, lambda pixels: torch.zeros(2, 2))


def test_geneval_folders(monkeypatch, trained, tmp_path):
    """The folders that GenEval's script reads. Catches a prompt's pictures in the next one's folder, finished work done again, and
    a folder that a stop left half full taken for whole."""
    lines = [json.dumps({"tag": "colors", "include": [], "prompt": text}) for text in ("a red circle", "a square")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    drawn = []
    monkeypatch.setattr(sample, "draw", lambda trained, texts, seed, first=0, **_: drawn.append(texts) or np.full((len(texts), 8, 8, 3), len(texts[0]), np.uint8))
    assert coco.draw_geneval(trained, tmp_path / "metadata.jsonl", tmp_path / "out") == 2
    assert drawn == [["a red circle"] * 4, ["a square"] * 4]
    for k, text in enumerate(("a red circle", "a square")):
        folder = tmp_path / f"out/0000{k}"
        assert json.loads((folder / "metadata.jsonl").read_text())["prompt"] == text
        assert [np.array(Image.open(folder / f"samples/000{j}.png"))[0, 0, 0] for j in range(4)] == [len(text)] * 4
    (tmp_path / "out/00001/metadata.jsonl").unlink()
    coco.draw_geneval(trained, tmp_path / "metadata.jsonl", tmp_path / "out")
    (tmp_path / "metadata.jsonl").write_text("\n".join([lines[0], lines[1].replace("square", "cross")]))      # another set of prompts
    coco.draw_geneval(trained, tmp_path / "metadata.jsonl", tmp_path / "out")
    assert drawn[2:] == [["a square"] * 4, ["a cross"] * 4]
    with pytest.raises(UserError, match="of another|name another --out"):
        coco.draw_geneval(trained, tmp_path / "metadata.jsonl", tmp_path / "out", guidance=5.0)
    trained.model.head.weight = torch.ones(3)               # another checkpoint
    with pytest.raises(UserError, match="name another --out"):
        coco.draw_geneval(trained, tmp_path / "metadata.jsonl", tmp_path / "out")
    trained.model.head.weight = torch.zeros(3)
    (tmp_path / "metadata.jsonl").write_text('{"tag": "colors"}')
    with pytest.raises(UserError, match="metadata.jsonl is not GenEval's"):
        coco.draw_geneval(trained, tmp_path / "metadata.jsonl", tmp_path / "out")


def test_the_command_line(tmp_path, folder, capsys):
    """The shipped model from end to end, on a folder and on scenes: the numbers that are printed are those in the file."""
    few = ["--limit", "8", "--steps", "4", "--sampler", "dpm++", "--json", str(tmp_path / "numbers.json")]
    for pictures in (str(folder), "scenes"):
        found = coco.main([pictures, *few])
        said = capsys.readouterr().out
        assert json.loads((tmp_path / "numbers.json").read_text()) == found and f"CIDEr {found['cider']:.1f} (" in said and "n = 8" in said
        assert "it says: " in said and "FID" not in said and found["distance"] > 0 and "unreliable" in said
        assert "with every weight" not in said          # there is one
    coco.main([])
    assert "Fréchet distance" in capsys.readouterr().out


def test_prompts_on_a_shipped_model(tmp_path):
    """GenEval's prompts by the real command line, from another folder, as it is started. Catches what stand-ins hide: weights
    that want gradients have no numpy."""
    (tmp_path / "g.jsonl").write_text('{"prompt": "a red circle"}\n')
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME)}
    line = [sys.executable, "-m", "metrics.coco", "g.jsonl", "--steps", "2"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 prompts in out/geneval" in done.stdout, done.stderr
    pictures = sorted((tmp_path / "out/geneval/00000/samples").iterdir())
    assert [path.name for path in pictures] == [f"000{j}.png" for j in range(4)]
    assert len({path.read_bytes() for path in pictures}) == 4           # other noise for each
    with pytest.raises(UserError, match="name another --out"):
        coco.main([str(tmp_path / "g.jsonl"), "--steps", "3", "--out", str(tmp_path / "out/geneval")])
    for out in ("", str(tmp_path / "g.jsonl")):
        with pytest.raises(UserError, match="--out must name a folder"):
            coco.main([str(tmp_path / "g.jsonl"), "--steps", "2", "--out", out])


def test_a_grey_vae_has_features(tmp_path):
    """Catches three channels given to a VAE of one."""
    vae = VAE(VAEConfig(image_channels=1, channels=4, multipliers=(1, 1, 1), z=2))
    checkpoint.save(tmp_path / "grey.pt", checkpoint.pack_vae(vae))
    assert coco.vae_features(tmp_path / "grey.pt", "cpu")(np.zeros((3, 32, 32, 3), np.uint8)).shape == (3, 2 * 8 * 8)


def test_how_many_at_a_time(make_model):
    """Catches 64 rows of a 7B's keys and values: 275 GB."""
    def trained(**shape):
        model = SimpleNamespace(config=SimpleNamespace(**shape), embedding=torch.nn.Embedding(1, 1))
        return SimpleNamespace(model=model)

    assert coco.pictures_per_batch(trained(layers=4, width=128, patches=16)) == 64
    many = coco.pictures_per_batch(trained(layers=32, width=4096, patches=256))
    assert 1 <= many < 8 and many * 3 * 2 * 32 * 4096 * 356 * 4 <= 2 ** 32
