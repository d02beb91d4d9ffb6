"""
test_forks.py: each fork is a diff that still applies, trains, and does what it says       (forks/)

THE IDEA    A diff is kept as text, so nothing else would notice that the lines around it have
            changed. Each is applied to a copy of the files and trained for twenty steps, in a
            process of its own. Then a few lines of code, its row of CHECKS, ask what is true of it.
RUN IT      pytest -n 0 tests/test_forks.py
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FORKS = ROOT / "forks"
ROOMS = ("sources", "autoencoder", "scale", "metrics", "support")
SHORT = [
    "--steps", "20", "--log-every", "10", "--pairs", "40", "--documents", "4", "--warmup", "5",
    "--out", "run",
]
# What turns a fork on.
OPTIONS = {
    "linear_betas": ["--preset", "flow", "--diffusion", "linear", "--samples", "0"],
    "v_prediction": ["--preset", "flow", "--diffusion", "v", "--samples", "0"],
    "rope_2d": ["--preset", "flow", "--no-patch-position", "--samples", "0"],
    "conv_patches": ["--preset", "flow", "--encoder", "conv", "--samples", "0"],
    "bars": [
        "--data", "bars", "--preset", "flow", "--vae-steps", "2", "--samples", "6",
        "--sample-steps", "2",
    ],
    "lora": ["--preset", "edit", "--samples", "0"],
}
# What is true of a fork after its training, as code that runs in the copy, in the process that has
# trained: a new one for each would take seconds.
CHECKS = {
    # The tests of diffusion.py take a new row of KINDS without being told.
    "linear_betas": """
        import pytest
        tests = ["tests/test_diffusion.py", "-k", "linear"]
        assert pytest.main(["-p", "no:cacheprovider", *tests]) == 0
        """,
    "v_prediction": """
        import pytest
        tests = ["tests/test_diffusion.py", "-k", "[v or v]"]
        assert pytest.main(["-p", "no:cacheprovider", *tests]) == 0
        """,
    # Neighbours in a column are as close as in a row, and cached decoding still equals the plain
    # forward.
    "rope_2d": """
        import sample, torch
        from support.checkpoint import load_trained
        trained = load_trained("run/model.pt")

        # Three words, a picture of 4 x 4 patches, a word.
        image_id = torch.full((1, 20), -1)
        image_id[:, 3:19] = 0
        places = trained.model.rope_positions(torch.arange(20)[None], image_id)[0, :, :2].tolist()
        wanted = {2: [2, 2], 3: [3, 3], 4: [3, 4], 7: [4, 3], 18: [6, 6], 19: [19, 19]}
        assert {k: places[k] for k in wanted} == wanted, places

        prompt = ["a circle", torch.randn(4, 8, 8), "a square"]
        noise = torch.randn(1, 4, 8, 8)
        decoder = sample.Decoder(trained, [prompt], draw_now=True)
        steps = decoder.diffusion_steps([0], noise, guidance=1.0, steps=3, sampler="ddim")
        *_, (_, fast, _) = steps

        tokens = sample.prompt_tokens(trained, prompt, draw_now=True) + [sample.PATCH] * 16
        def network(x, t):
            _, out = sample.read_all(trained.model, tokens, [prompt[1], x[0]], t)
            return out[1:]                          # of the second picture
        x0_max = float(trained.vae.x0_max)
        with torch.no_grad():
            *_, (_, plain, _) = sample.diffusion.sample(
                network, noise, trained.diffusion, 3, "ddim", None, x0_max)
        assert torch.allclose(fast, plain, atol=1e-4)
        """,
    # The convolutions are in the model, and learn. The tests of patchify.py take a new row of
    # PATCHES without being told.
    "conv_patches": """
        import pytest
        from support.checkpoint import load_trained
        encoder = load_trained("run/model.pt").model.patch_encoder
        assert encoder.before.weight.shape == (4, 4, 3, 3)
        assert encoder.after.bias.any()
        tests = ["tests/test_patchify.py", "-k", "conv"]
        assert pytest.main(["-p", "no:cacheprovider", *tests]) == 0
        """,
    # The report counts with the judge that came with the data. No other file knows of them.
    "bars": """
        import evaluate, json
        from sources import choose
        report = json.load(open("run/report.json"))
        assert 0 <= report["judged"] <= 1
        assert 0 <= report["captions"] <= 1
        pairs = choose.load_pairs("bars", n=50)
        for text, picture in zip(pairs.captions, pairs.pixels):
            assert pairs.judge(text, picture)
            assert not pairs.judge(text, 255 - picture)
        assert "bars" not in evaluate.REPORTS
        """,
    # Only the new weights have moved: the others are those of the checkpoint, to the bit.
    "lora": """
        import torch
        from support.checkpoint import load_trained
        before = load_trained("assets/scenes.pt").model.state_dict()
        after = load_trained("run/model.pt").model.state_dict()
        assert len(after) == len(before)
        assert sum("lora" in name for name in after) == 12
        for name, weight in after.items():
            if "lora" in name:
                assert weight.any(), name
            else:
                assert torch.equal(weight, before[name]), name
        """,
}

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="`git apply` needs git")


def apply(folder, name, *options):
    """The CompletedProcess of `git apply` of a fork in a folder, which is no repository."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    line = ["git", "apply", *options, str(FORKS / f"{name}.diff")]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


def changed_lines(diff):
    """How many lines a diff adds and takes away, empty ones not counted."""
    number = 0
    for line in diff.splitlines():
        header = line.startswith(("+++", "---"))
        changed = line.startswith(("+", "-")) and not header
        if changed and line[1:].strip():
            number += 1
    return number


@pytest.fixture
def copy(tmp_path):
    """A function (fork) -> a copy of the files that training needs, with that fork applied."""

    def make(name):
        folder = tmp_path / "copy"
        (folder / "tests").mkdir(parents=True)
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        for room in ROOMS:
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / room, folder / room, ignore=skip)
        for test in ("conftest.py", "test_diffusion.py", "test_patchify.py"):
            shutil.copy(ROOT / "tests" / test, folder / "tests")
        (folder / "assets").symlink_to(ROOT / "assets", target_is_directory=True)

        checked = apply(folder, name, "--check")
        assert checked.returncode == 0, checked.stderr
        assert apply(folder, name).returncode == 0
        return folder

    return make


def test_every_fork_is_tried():
    """Catches a diff that no test applies, and a test of a diff that has gone."""
    diffs = {path.stem for path in FORKS.glob("*.diff")}
    assert diffs == set(OPTIONS)
    assert diffs == set(CHECKS)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_fork_is_small(name):
    """Catches a fork that grew into a rewrite, and a README that counts other lines than there
    are."""
    lines = changed_lines((FORKS / f"{name}.diff").read_text())
    assert lines <= 15

    readme = (FORKS / "README.md").read_text()
    row = re.search(rf"^\| \[[^|]*\]\({name}\.diff\)[^|]*\| (\d+) \|", readme, re.M)
    assert row and int(row[1]) == lines, f"forks/README.md: {name} has {lines} lines"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_fork_applies_and_trains(copy, name):
    """Catches a core that moved on: a diff that no longer applies, or that applies and no longer
    trains, or trains the plain model."""
    folder = copy(name)
    training = f"import train\ntrain.main({OPTIONS[name] + SHORT})\n"
    code = training + textwrap.dedent(CHECKS[name])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = (folder / "run/log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert log[-1]["step"] == 20
    for row in log:
        assert math.isfinite(row["lm"])
        assert math.isfinite(row["diffusion"])


# ------------------------------------------------------------------------------------------- waves
def test_a_third_modality_is_trained_and_drawn(tmp_path):
    """Catches an example that no longer runs, and one that leaves no picture behind."""
    from PIL import Image

    from forks import waves

    numbers = waves.main(["--steps", "3", "--pairs", "30", "--out", str(tmp_path)])
    assert len(numbers) == 4
    assert all(0 <= share <= 1 for share in numbers.values())
    width, _ = Image.open(tmp_path / "waves.png").size
    assert width > 800


def test_waves_are_heard_as_they_were_made():
    """Catches a judge that takes one wave for another, at any phase or with a little noise; and
    places in another order than samples."""
    from forks import waves

    rng = np.random.default_rng(0)
    for caption in waves.SOUNDS:
        wave = waves.make_wave(caption, float(rng.random()))
        assert waves.hear(wave + 0.2 * torch.randn(64)) == caption

        latents = waves.to_latents(wave[None])              # 8 places of 8 samples each
        assert latents.shape == (1, 8, 1, 8)
        assert torch.equal(latents[0, :, 0, 3], wave[24:32])
        assert torch.equal(waves.to_samples(latents)[0], wave)


def test_two_kinds_of_block_in_one_row():
    """Catches a wave that is opened by the picture's token, and an end that the model would have to
    predict."""
    from forks import waves

    words = waves.make_tokenizer()
    kinds = waves.make_modalities(words)
    document = ["a red circle", ("picture", 5, 1000), "a fast saw", ("wave", 7, 300)]
    sequence = waves.lay_out(document, words, kinds)
    names = [words.vocabulary[token] for token in sequence.tokens]

    assert names == [
        "<bos>",
        *"a red circle <boi>".split(),
        *["<patch>"] * 16,
        *"<eoi> a fast saw <bow>".split(),
        *["<wave>"] * 8,
        "<eow>",
        "<eos>",
    ]
    assert sequence.image_id == [-1] * 5 + [0] * 16 + [-1] * 5 + [1] * 8 + [-1] * 2
    without_loss = [name for name, loss in zip(names, sequence.has_loss) if not loss]
    assert without_loss == ["<boi>", *["<patch>"] * 16, "<bow>", *["<wave>"] * 8, "<eos>"]
    assert sequence.images == [5, 7]
    assert sequence.t_max == [1000, 300]


def test_guidance_forgets_the_last_caption_only():
    """Catches a blind branch that forgets BOW too, is shorter, or forgets the picture's caption as
    well."""
    from forks import waves
    from model import sized

    words = waves.make_tokenizer()
    kinds = waves.make_modalities(words)
    model = waves.Hearing(sized("toy", vocabulary=len(words), context=64), kinds)
    picture = ("picture", torch.zeros(4, 8, 8))
    wave = ("wave", torch.zeros(8, 1, 8))
    document = waves.Document(model, words, ["a red circle", picture, "a fast saw", wave])
    # While a wave is drawn, its <eow> is not there yet.
    document.tokens.pop()
    document.block_id.pop()

    names = [words.vocabulary[token] for token in document.drop_caption()]
    assert names == [
        "<bos>",
        *"a red circle <boi>".split(),
        *["<patch>"] * 16,
        "<eoi>",
        *["<drop>"] * 3,
        "<bow>",
        *["<wave>"] * 8,
    ]


def test_a_wave_hears_its_caption_and_all_of_itself():
    """Catches a mask that knows pictures only: places of one wave that do not see each other, or a
    word that sees what follows."""
    from forks import waves
    from model import sized

    torch.manual_seed(0)
    words = waves.make_tokenizer()
    kinds = waves.make_modalities(words)
    model = waves.Hearing(sized("toy", vocabulary=len(words), context=64), kinds).eval()
    # Every layer passes on about as much as it takes in, so that a leak can be seen.
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)

    def read(caption, wave):
        """What the model says of a noisy wave beside its caption, (1, 8, 1, 8)."""
        document = waves.Document(model, words, [caption, ("wave", wave)])
        _, out = document.read(t=400)
        return out["wave"]

    x = torch.randn(8, 1, 8)
    changed = x.clone()
    changed[:, 0, 7] += 1                               # the last place
    with torch.no_grad():
        plain = read("a fast saw", x)
        last_changed = read("a fast saw", changed)
        other_caption = read("a slow saw", x)
    # Either change is heard at every place, the first one too.
    assert (plain != last_changed)[0, :, 0].any(0).all()
    assert (plain != other_caption)[0, :, 0].any(0).all()
