"""
test_coco.py: do CIDEr, FID and CLIP score say what the field's own programs say?
                                                        (metrics/coco.py; Transfusion App. B.1)

THE IDEA    A yardstick is right if it agrees with the one that everybody uses, and if it gives the
            known answer where there is one.
COMPARED    with pycocoevalcap, scipy and transformers, where they are installed; and with cases
            whose answer is known: the same crowd, a crowd moved by a known way, an artist who hands
            in the photo itself.
RUN IT      pytest -n 0 tests/test_coco.py
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


# ------------------------------------------------------------------------------------------ CIDEr
def some_texts(n, seed=0, most=9):
    """n texts of 0 to `most` - 1 words out of seven."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        words = rng.choice(list("abcdefg"), rng.integers(most))
        texts.append(" ".join(words))
    return texts


def test_cider_is_pycocoevalcap():
    """Random captions, some of them empty or of one word, with 1 to 4 references each. Our number
    is that of the program that COCO's papers use."""
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    answers = some_texts(40)
    rng = np.random.default_rng(1)
    references = []
    for k in range(40):
        references.append(some_texts(rng.integers(1, 5), seed=k + 10, most=12))
    references[0] = ["a b c d e f g a b c d e f g"] * 2         # much longer than its answer

    theirs = scorer.CiderScorer(n=4, sigma=6.0)
    for answer, texts in zip(answers, references):
        theirs += (answer, texts)
    wanted = 100 * theirs.compute_score()[0]

    assert coco.cider(answers, references) == pytest.approx(wanted, rel=1e-9)


def test_cider_of_known_captions():
    """The same words score 1000. Captions that share nothing score 0, and so do captions that share
    only what is said of every picture. Capitals and full stops do not count."""
    texts = ["a b c d e", "f g h i j", "k l m n o"]
    references = [[text] for text in texts]
    loud = [text.upper() + "." for text in texts]
    mixed_up = texts[1:] + texts[:1]
    assert coco.cider(texts, references) == pytest.approx(1000)
    assert coco.cider(loud, references) == pytest.approx(1000)
    assert coco.cider(mixed_up, references) == 0
    assert coco.cider(["the", "the"], [["the cat sat on it"], ["the dog ran to him"]]) == 0

    # n-grams of 1 to 4 words, a quarter each. Three words have no four in a row.
    four = coco.cider(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]])
    three = coco.cider(["a b c", "e f g"], [["a b c"], ["e f g"]])
    assert four == pytest.approx(1000)
    assert three == pytest.approx(750)

    # One answer of two is right. A second reference that it does not match lowers its score: CIDEr
    # takes the mean over references, not the best.
    answers = ["a b c d e", "x"]
    one = coco.cider(answers, [["a b c d e"], ["f g h i j"]])
    two = coco.cider(answers, [["a b c d e", "p q r s"], ["f g h i j"]])
    assert one == pytest.approx(500)
    assert 0 < two < one


# ----------------------------------------------------------------------------- FID and CLIP score
def test_frechet_of_known_crowds():
    """Catches a variance in place of a deviation, a missing cross term, a mean that is not squared,
    and features that are counted by rows."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=g, dtype=torch.float64)
    x = x - x.mean(0)                                           # mean 0, exactly
    root = torch.linalg.cholesky(torch.cov(x.T))
    x = x @ torch.linalg.inv(root).T                            # covariance 1, exactly

    assert coco.frechet(x, x) == pytest.approx(0, abs=1e-8)
    assert coco.frechet(x, x + 2) == pytest.approx(5 * 4)       # 5 axes, each moved by 2, squared
    # Of Gaussians on a line: the difference of their deviations, squared.
    assert coco.frechet(x, 3 * x) == pytest.approx(5 * (3 - 1) ** 2)
    # Three pictures and five features: no NaN.
    assert coco.frechet(x[:3], x[3:6]) > 0


def test_frechet_is_scipys():
    """Two crowds whose covariances have full rank and do not commute. scipy's general matrix root
    computes (S S')^(1/2) itself; our way around it must give the same."""
    linalg = pytest.importorskip("scipy.linalg")
    g = torch.Generator().manual_seed(0)

    def crowd(mean):
        return torch.randn(50, 8, generator=g) @ torch.randn(8, 8, generator=g) + mean

    x = crowd(0)
    y = crowd(1)
    S = np.cov(x.numpy().T)
    S2 = np.cov(y.numpy().T)
    means = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    wanted = means + np.trace(S + S2 - 2 * linalg.sqrtm(S @ S2).real)

    assert coco.frechet(x, y) == pytest.approx(wanted, rel=1e-5)
    assert coco.frechet(y, x) == pytest.approx(wanted, rel=1e-5)


class Stand_in(torch.nn.Module):
    """The interface of the published Inception: uint8 (n, 3, h, w) of any size -> features."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8 and return_features and img.shape[1] == 3
        return img.double().mean(dim=(2, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_inception_is_a_torchscript_file(tmp_path):
    """Catches channels that come last, floats in place of bytes, and logits where features are
    wanted; and a traceback for a file that is something else."""
    torch.jit.save(torch.jit.script(Stand_in()), tmp_path / "inception.pt")
    pixels = np.random.default_rng(0).integers(256, size=(3, 20, 30, 3), dtype=np.uint8)
    features = coco.load_inception(tmp_path / "inception.pt", "cpu")
    assert np.allclose(features(pixels).numpy(), pixels.mean((1, 2)))

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


def random_clip(transformers, folder):
    """(a small CLIP model with random weights, its processor), of transformers. The vocabulary is
    the two special tokens and seven letters, each inside a word and at its end."""
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefg"]
    words += [f"{letter}</w>" for letter in "abcdefg"]
    ids = {word: k for k, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))

    small = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    text = dict(vocab_size=16, max_position_embeddings=12, bos_token_id=0, eos_token_id=1)
    vision = dict(image_size=32, patch_size=16)
    config = transformers.CLIPConfig(
        text_config=small | text,
        vision_config=small | vision,
        projection_dim=8,
    )
    model = transformers.CLIPModel(config)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    return model, transformers.CLIPProcessor(images, tokenizer)


def test_clip_is_transformers(tmp_path):
    """A CLIP model with random weights, saved as transformers saves it: our cosines are its logits.
    Catches pictures in another order than their texts, and vectors that do not have unit length."""
    transformers = pytest.importorskip("transformers")
    model, prepare = random_clip(transformers, tmp_path)
    model.save_pretrained(tmp_path / "clip")
    prepare.save_pretrained(tmp_path / "clip")
    pixels = np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
    texts = ["a b", "c", "d e f g " * 9, "g"]                   # the third is too long, and is cut

    with torch.no_grad():
        inputs = prepare(
            text=texts,
            images=list(pixels),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=12,
        )
        out = model.eval()(**inputs)
    # Each picture with its own text; CLIP multiplies its cosines by a learned scale.
    wanted = out.logits_per_image.diagonal() / model.logit_scale.exp()
    cosines = coco.load_clip(tmp_path / "clip", "cpu")(pixels, texts).detach()
    assert torch.allclose(cosines, wanted, atol=1e-5)
    assert cosines.std() > 1e-4

    with pytest.raises(UserError, match="absent has no CLIP model"):
        coco.load_clip(tmp_path / "absent", "cpu")

    # A damaged file: what its reader raises does not speak of CLIP.
    for weights in (tmp_path / "clip").glob("model*"):
        weights.unlink()
    (tmp_path / "clip/pytorch_model.bin").write_bytes(b"garbage")
    with pytest.raises(UserError, match="clip has no CLIP model"):
        coco.load_clip(tmp_path / "clip", "cpu")


# ---------------------------------------------------------------------- pictures and their captions
@pytest.fixture
def folder(tmp_path):
    """Nine pictures of one colour each, with two captions each, and a tenth that cannot be read."""
    short = []
    long = []
    for k in range(10):
        Image.new("RGB", (40, 30), (25 * k, 0, 0)).save(tmp_path / f"{k}.png")
        short.append({"image": f"{k}.png", "caption": "a circle"})
        long.append({"image": f"{k}.png", "caption": "A red circle"})
    (tmp_path / "9.png").write_text("no picture")
    # The two captions of a picture stand ten lines apart.
    lines = [json.dumps(line) for line in short + long]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_folders(folder):
    """Catches a picture that is listed once per caption, a caption that goes to another picture,
    and the first n pictures in place of any n."""
    items = coco.read_folder(folder, 32, 9, seed=0)
    assert all(texts == ["a circle", "A red circle"] for _, texts in items)
    assert len(items) == 9

    names = []
    for seed in (0, 0, 1, 2):
        chosen = coco.read_folder(folder, 32, 4, seed)
        names.append([picture.args[0].name for picture, _ in chosen])
    assert names[0] == names[1]                                 # the same seed
    assert len({tuple(row) for row in names}) > 1               # another seed
    assert all(row == sorted(set(row)) for row in names)        # none twice, in the folder's order

    picture, _ = coco.read_folder(folder, 32, 10)[3]
    assert picture().shape == (32, 32, 3)
    assert picture()[0, 0].tolist() == [75, 0, 0]               # the picture of number 3


def test_an_empty_caption_is_no_reference(folder, capsys):
    """An empty caption is named and left out. Catches one that every answer is compared with, which
    lowers CIDEr, and one that becomes a prompt."""
    with open(folder / "captions.jsonl", "a") as file:
        file.write('\n{"image": "3.png", "caption": "  "}\n')
    items = coco.read_folder(folder, 32, 10)
    assert [texts for _, texts in items] == [["a circle", "A red circle"]] * 10
    assert "skipped 1 of 21 captions" in capsys.readouterr().out


def test_scenes_have_true_captions_of_their_own():
    """Catches captions that leave an object out, and a scene whose only caption is the one that it
    was drawn for."""
    items = coco.draw_scenes(scenes.WORLDS["six"], 32, 60)
    for picture, texts in items:
        things = scenes.parse(picture())
        assert 1 <= len(texts) == len(set(texts)) <= 5
        assert all(scenes.holds(scenes.read_caption(text), things) for text in texts)
    assert max(len(texts) for _, texts in items) == 5


# ------------------------------------------------------------------------------------- the judging
@pytest.fixture
def trained():
    """No model, but what `measure` asks of one: words, and how long its context is."""
    weight = torch.zeros(3)
    model = SimpleNamespace(
        config=SimpleNamespace(context=30, patches=16, latent=(4, 8, 8), layers=2, width=8),
        embedding=SimpleNamespace(weight=weight),
        head=SimpleNamespace(weight=weight),
    )
    return SimpleNamespace(
        tokenizer=data.Words(scenes.vocabulary()),
        vae=SimpleNamespace(f=4),
        model=model,
        kind="transfusion",
    )


def play(monkeypatch, draws, says):
    """Stand-ins for the model: draws(text) -> picture; says(number of a picture) -> caption. A
    picture's number is the value of its first pixel."""
    def encode(trained, pixels):
        return pixels[:, 0, 0, 0]

    def draw(trained, texts, seed, first=0, **_):
        return np.stack([draws(text) for text in texts])

    def describe(trained, numbers, **_):
        return [says(int(k)) for k in numbers]

    monkeypatch.setattr(coco, "encode_pixels", encode)
    monkeypatch.setattr(sample, "draw", draw)
    monkeypatch.setattr(sample, "describe", describe)


def grey(k):
    """A picture of one grey, which is its number."""
    return np.full((32, 32, 3), k, np.uint8)


def missing():
    """A picture that cannot be read."""
    return open_picture("absent.png", 32)


def see(pixels):
    """What stands for Inception: two features (n, 2) of pictures."""
    return torch.from_numpy(pixels[:, 0, 0, :2] / 25.0)


def test_measure(monkeypatch, trained, folder, capsys):
    """An artist who hands in the photo, and a writer who knows a caption of it; then two who mix
    the pictures up. Catches captions that are compared with another picture's references, also
    after a picture that cannot be read; and prompts that are judged with another's picture."""
    words = "circle square triangle cross circles squares triangles crosses red".split()
    items = []
    for k, word in enumerate(words):
        unreadable = partial(open_picture, folder / "9.png", 32)
        picture = unreadable if k == 4 else partial(grey, 25 * k)
        items.append((picture, [f"a {word}", f"A {word} above"]))

    def number(text):
        """Which of the nine a caption speaks of."""
        return words.index(text.split()[1])

    def clip(pixels, texts):                                    # 1 if the picture is the text's
        fits = []
        for picture, text in zip(pixels, texts):
            fits.append(float(picture[0, 0, 0] == 25 * number(text)))
        return torch.tensor(fits)

    # 1. Everything is right.
    play(
        monkeypatch,
        draws=lambda text: grey(25 * number(text)),
        says=lambda k: f"a {words[k // 25]} above",
    )
    right, said = coco.measure(trained, items, see, clip, steps=3)
    assert right["distance"] == pytest.approx(0, abs=1e-9)
    assert right["clip"] == 100
    assert (right["n"], right["references"]) == (8, 2)
    assert all(answer == texts[1].lower() for answer, texts in said)
    assert "skipped 1 of 9" in capsys.readouterr().out
    # How far apart are real ones? Every second of them, and the others.
    real = see(np.stack([grey(25 * k) for k in range(9) if k != 4]))
    assert right["halves"] > 0
    assert right["halves"] == pytest.approx(coco.frechet(real[::2], real[1::2]))

    # 2. Each picture is drawn for another prompt, and each caption is another picture's.
    play(
        monkeypatch,
        draws=lambda text: grey(25 * (8 - number(text))),
        says=lambda k: f"a {words[8 - k // 25]} above",
    )
    mixed, _ = coco.measure(trained, items, see, clip, steps=3)
    assert mixed["cider"] < 0.2 * right["cider"]
    assert mixed["clip"] == 0
    assert mixed["distance"] == pytest.approx(0, abs=1e-9)      # a crowd is a crowd: FID is blind

    # 3. Always the same picture.
    play(monkeypatch, draws=lambda text: grey(25), says=lambda k: "a circle")
    alike, _ = coco.measure(trained, items, see, steps=3)
    assert alike["distance"] > 1

    # 4. What is not asked for is not in the answer.
    only_captions, _ = coco.measure(trained, items, steps=3)
    assert {"cider"} < only_captions.keys()
    assert not {"distance", "clip"} & only_captions.keys()
    only_pictures, _ = coco.measure(trained, items, see, captions=False, steps=3)
    assert {"distance"} < only_pictures.keys()
    assert "cider" not in only_pictures


def test_measure_is_the_same_in_any_pieces(monkeypatch, trained):
    """Noise belongs to a picture. It does not depend on the picture's place in a batch, on its
    rank, or on a picture before it that cannot be read. Catches parts that are put together in
    another order, and noise that is drawn twice."""
    readable = [k for k in range(50) if k % 7 != 3]
    items = []
    for k in range(50):
        picture = partial(grey, k) if k in readable else missing
        items.append((picture, ["a circle", "a square"]))
    seen = []

    def draw(trained, texts, seed, **_):
        seen.extend(seed)
        return np.stack([grey(s * 37 % 251) for s in seed])     # a picture of its noise

    def features(pixels):
        return torch.from_numpy(pixels[:, 0, 0, :2] * [1.0, 0.5])

    def whole(work, part):
        return [work(part, 0)]

    def divided(work, part):                                    # as on two ranks
        return [work(part[:20], 0), work(part[20:], 20)]

    play(monkeypatch, draws=None, says=str)
    monkeypatch.setattr(sample, "draw", draw)
    results = []
    for n, split_work in ((64, whole), (9, whole), (9, divided), (1, whole)):
        monkeypatch.setattr(coco, "pictures_per_batch", lambda trained, n=n: n)
        monkeypatch.setattr(distributed, "split_work", split_work)
        results.append(coco.measure(trained, items, features, seed=1))
        assert seen == [100003 + k for k in readable]
        seen.clear()

    assert all(other == results[0] for other in results)
    _, said = results[0]
    assert [answer for answer, _ in said] == [str(k) for k in readable]


def test_measure_looks_before_it_draws(monkeypatch, trained):
    """Catches a mistake that is found after hours: an unknown word, a caption that is too long, and
    pictures of which none can be read."""
    cases = {
        "a purple circle": "'purple'",
        "a red circle " * 4: "31 positions",
        "a circle": "absent.png",
    }
    monkeypatch.setattr(sample, "draw", lambda *_, **__: pytest.fail("drawn"))
    for text, message in cases.items():
        items = [(missing, [text])] * 5
        with pytest.raises(UserError, match=message):
            coco.measure(trained, items, lambda pixels: torch.zeros(2, 2))


# ----------------------------------------------------------------------------------------- GenEval
def test_geneval_folders(monkeypatch, trained, tmp_path):
    """The folders that GenEval's script reads. Catches a prompt's pictures in the next one's
    folder, finished work that is done again, and a folder that is taken for whole although a stop
    left it half full."""
    prompts = tmp_path / "metadata.jsonl"
    out = tmp_path / "out"
    texts = ["a red circle", "a square"]
    lines = []
    for text in texts:
        lines.append(json.dumps({"tag": "colors", "include": [], "prompt": text}))
    prompts.write_text("\n".join(lines))
    drawn = []

    def draw(trained, texts, seed, first=0, **_):
        drawn.append(texts)
        return np.full((len(texts), 8, 8, 3), len(texts[0]), np.uint8)

    monkeypatch.setattr(sample, "draw", draw)

    # 1. Four pictures per prompt. Their grey is the length of the prompt that they were drawn for.
    assert coco.draw_geneval(trained, prompts, out) == 2
    assert drawn == [["a red circle"] * 4, ["a square"] * 4]
    for k, text in enumerate(texts):
        folder = out / f"0000{k}"
        greys = []
        for j in range(4):
            picture = np.array(Image.open(folder / f"samples/000{j}.png"))
            greys.append(picture[0, 0, 0])
        assert json.loads((folder / "metadata.jsonl").read_text())["prompt"] == text
        assert greys == [len(text)] * 4

    # 2. Drawn again: a prompt whose folder is not finished, and a prompt that has changed.
    (out / "00001/metadata.jsonl").unlink()
    coco.draw_geneval(trained, prompts, out)
    prompts.write_text("\n".join([lines[0], lines[1].replace("square", "cross")]))
    coco.draw_geneval(trained, prompts, out)
    assert drawn[2:] == [["a square"] * 4, ["a cross"] * 4]

    # 3. Refused: other options, another checkpoint, another kind of file.
    with pytest.raises(UserError, match="of another|name another --out"):
        coco.draw_geneval(trained, prompts, out, guidance=5.0)
    trained.model.head.weight = torch.ones(3)
    with pytest.raises(UserError, match="name another --out"):
        coco.draw_geneval(trained, prompts, out)
    trained.model.head.weight = torch.zeros(3)
    prompts.write_text('{"tag": "colors"}')
    with pytest.raises(UserError, match="metadata.jsonl is not GenEval's"):
        coco.draw_geneval(trained, prompts, out)


# -------------------------------------------------------------------------------- the command line
def test_the_command_line(tmp_path, folder, capsys):
    """The shipped model from end to end, on a folder and on scenes: the numbers that are printed
    are the numbers in the file."""
    numbers = tmp_path / "numbers.json"
    few = ["--limit", "8", "--steps", "4", "--sampler", "dpm++", "--json", str(numbers)]
    for pictures in (str(folder), "scenes"):
        found = coco.main([pictures, *few])
        said = capsys.readouterr().out
        assert json.loads(numbers.read_text()) == found
        assert f"CIDEr {found['cider']:.1f} (" in said
        assert "n = 8" in said
        assert "it says: " in said
        assert "FID" not in said                                # the features are the VAE's
        assert found["distance"] > 0
        assert "unreliable" in said                             # of eight pictures
        assert "with every weight" not in said                  # there is one
    coco.main([])
    assert "Fréchet distance" in capsys.readouterr().out


def test_prompts_on_a_shipped_model(tmp_path):
    """GenEval's prompts by the real command line, started from another folder. Catches what
    stand-ins hide: weights that want gradients have no numpy."""
    prompts = tmp_path / "g.jsonl"
    prompts.write_text('{"prompt": "a red circle"}\n')
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME)}
    line = [sys.executable, "-m", "metrics.coco", "g.jsonl", "--steps", "2"]
    done = subprocess.run(
        line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "1 prompts in out/geneval" in done.stdout, done.stderr
    out = tmp_path / "out/geneval"
    pictures = sorted((out / "00000/samples").iterdir())
    assert [path.name for path in pictures] == [f"000{j}.png" for j in range(4)]
    assert len({path.read_bytes() for path in pictures}) == 4   # other noise for each

    with pytest.raises(UserError, match="name another --out"):
        coco.main([str(prompts), "--steps", "3", "--out", str(out)])
    for name in ("", str(prompts)):
        with pytest.raises(UserError, match="--out must name a folder"):
            coco.main([str(prompts), "--steps", "2", "--out", name])


def test_a_grey_vae_has_features(tmp_path):
    """Catches three channels that are given to a VAE of one."""
    vae = VAE(VAEConfig(image_channels=1, channels=4, multipliers=(1, 1, 1), z=2))
    checkpoint.save(tmp_path / "grey.pt", checkpoint.pack_vae(vae))
    features = coco.vae_features(tmp_path / "grey.pt", "cpu")
    pixels = np.zeros((3, 32, 32, 3), np.uint8)
    assert features(pixels).shape == (3, 2 * 8 * 8)


def test_how_many_at_a_time(make_model):
    """Catches 64 rows of a 7B's keys and values: 275 GB."""
    def trained(**shape):
        config = SimpleNamespace(**shape)
        model = SimpleNamespace(config=config, embedding=torch.nn.Embedding(1, 1))
        return SimpleNamespace(model=model)

    small = coco.pictures_per_batch(trained(layers=4, width=128, patches=16))
    assert small == 64

    large = coco.pictures_per_batch(trained(layers=32, width=4096, patches=256))
    # Keys and values (2) of guidance's three caches, float32 (4 bytes), 100 words and 256 patches.
    row = 3 * 2 * 32 * 4096 * 356 * 4
    assert 1 <= large < 8
    assert large * row <= 2 ** 32
