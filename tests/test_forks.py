"""
test_forks.py: each fork is a diff that still applies, trains, and does what it says             (forks/)

A diff is kept as text, so nothing else would notice that the lines around it have changed. Each is applied to a copy of
the files and trained for twenty steps, in a process of its own.
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
SHORT = ["--steps", "20", "--log-every", "10", "--pairs", "40", "--documents", "4", "--warmup", "5", "--out", "run"]
OPTIONS = {                                             # what turns the fork on
    "linear_betas": ["--preset", "flow", "--diffusion", "linear", "--samples", "0"],
    "v_prediction": ["--preset", "flow", "--diffusion", "v", "--samples", "0"],
    "rope_2d": ["--preset", "flow", "--no-patch-position", "--samples", "0"],
    "conv_patches": ["--preset", "flow", "--encoder", "conv", "--samples", "0"],
    "bars": ["--data", "bars", "--preset", "flow", "--vae-steps", "2", "--samples", "6", "--sample-steps", "2"],
    "lora": ["--preset", "edit", "--samples", "0"],
}
# What is true of a fork after its training, as code that runs in the copy: a new process for each would take seconds.
CHECKS = {
    # The tests of diffusion.py take a new row of KINDS without being told.
    "linear_betas": """
        import pytest
        assert pytest.main(["-p", "no:cacheprovider", "tests/test_diffusion.py", "-k", "linear"]) == 0
        """,
    "v_prediction": """
        import pytest
        assert pytest.main(["-p", "no:cacheprovider", "tests/test_diffusion.py", "-k", "[v or v]"]) == 0
        """,
    # Neighbours in a column are as close as in a row, and cached decoding still equals the plain forward.
    "rope_2d": """
        import sample, torch
        from support.checkpoint import load_trained
        trained = load_trained("run/model.pt")
        image_id = torch.full((1, 20), -1)
        image_id[:, 3:19] = 0
        places = trained.model.rope_positions(torch.arange(20)[None], image_id)[0, :, :2].tolist()
        assert [places[k] for k in (2, 3, 4, 7, 18, 19)] == [[2, 2], [3, 3], [3, 4], [4, 3], [6, 6], [19, 19]], places
        prompt = ["a circle", torch.randn(4, 8, 8), "a square"]
        decoder = sample.Decoder(trained, [prompt], draw_now=True)
        noise = torch.randn(1, 4, 8, 8)
        *_, (_, fast, _) = decoder.diffusion_steps([0], noise, guidance=1.0, steps=3, sampler="ddim")
        tokens = sample.prompt_tokens(trained, prompt, draw_now=True) + [sample.PATCH] * 16
        def network(x, t):
            return sample.read_all(trained.model, tokens, [prompt[1], x[0]], t)[1][1:]
        with torch.no_grad():
            *_, (_, plain, _) = sample.diffusion.sample(network, noise, trained.diffusion, 3, "ddim", None, float(trained.vae.x0_max))
        assert torch.allclose(fast, plain, atol=1e-4)
        """,
    # The convolutions are in the model, and learn.
    "conv_patches": """
        from support.checkpoint import load_trained
        encoder = load_trained("run/model.pt").model.patch_encoder
        assert encoder.before.weight.shape == (4, 4, 3, 3) and encoder.after.bias.any()
        """,
    # The report counts with the judge that came with the data, and no other file knows of them.
    "bars": """
        import evaluate, json
        from sources import choose
        report = json.load(open("run/report.json"))
        assert 0 <= report["judged"] <= 1 and 0 <= report["captions"] <= 1
        pairs = choose.load_pairs("bars", n=50)
        assert all(pairs.judge(text, picture) for text, picture in zip(pairs.captions, pairs.pixels))
        assert not any(pairs.judge(text, 255 - picture) for text, picture in zip(pairs.captions, pairs.pixels))
        assert "bars" not in evaluate.REPORTS
        """,
    # Only the new weights have moved: the others are those of the checkpoint, to the bit.
    "lora": """
        import torch
        from support.checkpoint import load_trained
        before = load_trained("assets/scenes.pt").model.state_dict()
        after = load_trained("run/model.pt").model.state_dict()
        assert len(after) == len(before) and sum("lora" in name for name in after) == 12
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
    return subprocess.run(["git", "apply", *options, str(FORKS / f"{name}.diff")], cwd=folder, env=environment,
                          capture_output=True, text=True)


def changed_lines(diff):
    """How many lines a diff adds and takes away, empty ones not counted."""
    lines = [line for line in diff.splitlines() if line.startswith(("+", "-")) and not line.startswith(("+++", "---"))]
    return sum(bool(line[1:].strip()) for line in lines)


@pytest.fixture
def copy(tmp_path):
    """A function (fork) -> a copy of the files that training needs, with that fork applied."""

    def make(name):
        folder = tmp_path / "copy"
        (folder / "tests").mkdir(parents=True)
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        for room in ROOMS:
            shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
        for test in ("conftest.py", "test_diffusion.py"):
            shutil.copy(ROOT / "tests" / test, folder / "tests")
        (folder / "assets").symlink_to(ROOT / "assets", target_is_directory=True)
        checked = apply(folder, name, "--check")
        assert checked.returncode == 0, checked.stderr
        assert apply(folder, name).returncode == 0
        return folder

    return make


def test_every_fork_is_tried():
    """A diff that no test applies, and a test of a diff that has gone."""
    assert {path.stem for path in FORKS.glob("*.diff")} == set(OPTIONS) == set(CHECKS)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_fork_is_small(name):
    """A fork that grew into a rewrite, and a README that counts other lines than there are."""
    lines = changed_lines((FORKS / f"{name}.diff").read_text())
    assert lines <= 15
    row = re.search(rf"^\| \[[^|]*\]\({name}\.diff\)[^|]*\| (\d+) \|", (FORKS / "README.md").read_text(), re.M)
    assert row and int(row[1]) == lines, f"forks/README.md: {name} has {lines} lines"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_fork_applies_and_trains(copy, name):
    """A core that moved on: a diff that no longer applies, or that applies and no longer trains, or trains the plain model."""
    folder = copy(name)
    code = f"import train\ntrain.main({OPTIONS[name] + SHORT})\n" + textwrap.dedent(CHECKS[name])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    log = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 20 and all(math.isfinite(row["lm"]) and math.isfinite(row["diffusion"]) for row in log)


# ----------------------------------------------------------------------------------------------------------------- waves
def test_a_third_modality_is_trained_and_drawn(tmp_path):
    """An example that no longer runs, and one that leaves no picture behind."""
    from PIL import Image

    from forks import waves

    numbers = waves.main(["--steps", "3", "--pairs", "30", "--out", str(tmp_path)])
    assert len(numbers) == 4 and all(0 <= share <= 1 for share in numbers.values())
    assert Image.open(tmp_path / "waves.png").size[0] > 800


def test_waves_are_heard_as_they_were_made():
    """A judge that takes one wave for another, at any phase or with a little noise; places in another order than samples."""
    from forks import waves

    rng = np.random.default_rng(0)
    for caption in waves.SOUNDS:
        wave = waves.make_wave(caption, float(rng.random()))
        assert waves.hear(wave + 0.2 * torch.randn(64)) == caption
        latents = waves.to_latents(wave[None])
        assert latents.shape == (1, 8, 1, 8) and torch.equal(latents[0, :, 0, 3], wave[24:32])
        assert torch.equal(waves.to_samples(latents)[0], wave)


def test_two_kinds_of_block_in_one_row():
    """A wave opened by the picture's token, or an end that the model would have to predict."""
    from forks import waves

    words = waves.make_tokenizer()
    kinds = waves.make_modalities(words)
    sequence = waves.lay_out(["a red circle", ("picture", 5, 1000), "a fast saw", ("wave", 7, 300)], words, kinds)
    names = [words.vocabulary[token] for token in sequence.tokens]
    assert names == ["<bos>", *"a red circle <boi>".split(), *["<patch>"] * 16, *"<eoi> a fast saw <bow>".split(),
                     *["<wave>"] * 8, "<eow>", "<eos>"]
    assert sequence.image_id == [-1] * 5 + [0] * 16 + [-1] * 5 + [1] * 8 + [-1] * 2
    assert [name for name, loss in zip(names, sequence.has_loss) if not loss] == \
        ["<boi>", *["<patch>"] * 16, "<bow>", *["<wave>"] * 8, "<eos>"]
    assert sequence.images == [5, 7] and sequence.t_max == [1000, 300]


def test_guidance_forgets_the_last_caption_only():
    """A blind branch that forgets BOW too, is shorter, or forgets the picture's caption as well."""
    from forks import waves
    from model import sized

    words = waves.make_tokenizer()
    kinds = waves.make_modalities(words)
    model = waves.Hearing(sized("toy", vocabulary=len(words), context=64), kinds)
    picture, wave = ("picture", torch.zeros(4, 8, 8)), ("wave", torch.zeros(8, 1, 8))
    document = waves.Document(model, words, ["a red circle", picture, "a fast saw", wave])
    document.tokens.pop()                               # while a wave is drawn, its <eow> is not there yet
    document.block_id.pop()
    names = [words.vocabulary[token] for token in document.drop_caption()]
    assert names == ["<bos>", *"a red circle <boi>".split(), *["<patch>"] * 16, "<eoi>", *["<drop>"] * 3, "<bow>", *["<wave>"] * 8]


def test_a_wave_hears_its_caption_and_all_of_itself():
    """A mask that knows pictures only: places of one wave that do not see each other, or a word that sees what follows."""
    from forks import waves
    from model import sized

    torch.manual_seed(0)
    words = waves.make_tokenizer()
    kinds = waves.make_modalities(words)
    model = waves.Hearing(sized("toy", vocabulary=len(words), context=64), kinds).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    x = torch.randn(8, 1, 8)
    changed = x.clone()
    changed[:, 0, 7] += 1                               # the last place
    with torch.no_grad():
        seen = [waves.Document(model, words, ["a fast saw", ("wave", wave)]).read(t=400)[1]["wave"] for wave in (x, changed)]
        other = waves.Document(model, words, ["a slow saw", ("wave", x)]).read(t=400)[1]["wave"]
    assert (seen[0] != seen[1])[0, :, 0].any(0).all()   # heard at every place, the first one too
    assert (seen[0] != other)[0, :, 0].any(0).all()
