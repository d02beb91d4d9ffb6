"""
test_doctor.py: does the doctor name the disease?                              (metrics/doctor.py; ours; docs/PAPER.md §4)

The shipped model is healthy. Each disease is planted in a copy of it; the sentence must be that of the disease and of no other.
"""
import copy
import re

import numpy as np
import pytest
import torch

import sample
import vae as vae_module
from data import DROP, SPECIAL
from diffusion import Diffusion
from metrics import doctor
from model import Cache, Transfusion
from support import checkpoint
from support.common import ASSETS, UserError

QUICK = {"steps": 6}


@pytest.fixture(scope="module")
def shipped():
    """The shipped model of scenes."""
    return checkpoint.load_trained(ASSETS / "scenes.pt")


@pytest.fixture
def trained(shipped):
    """A copy of it that may fall ill."""
    return copy.deepcopy(shipped)


def visit(trained, n=20):
    """(diagnosis, what was measured) of a model."""
    found = doctor.examine(doctor.find_patient(trained, n=n), **QUICK)
    return doctor.diagnose(found), found


def break_vae(trained, monkeypatch):
    """A VAE of random weights."""
    trained.vae = vae_module.VAE(trained.vae.config).eval()


def clip_schedule(trained, monkeypatch):
    """Noise that never wins, as a schedule has it whose last betas are clipped too low."""
    clipped = Diffusion("ddpm", shift=1e-4)
    trained.diffusion.a = clipped.a
    trained.diffusion.s = clipped.s


def misplace_in_cache(trained, monkeypatch):
    """Keys and values one slot off."""
    write = Cache.write
    monkeypatch.setattr(Cache, "write", lambda self, layer, slots, k, v: write(self, layer, (slots - 1).clamp(min=0), k, v))


def forget_training(trained, monkeypatch):
    """The weights of step 0."""
    trained.model = Transfusion(trained.model.config).eval()


def ignore_captions(trained, monkeypatch):
    """Every word is heard as <drop>: the model draws as well as one can who hears none."""
    table = trained.model.embedding.weight.data
    table[len(SPECIAL):] = table[DROP]


def read_the_caption_anyway(trained, monkeypatch):
    """The unconditional row of sample.py has not lost its caption."""
    monkeypatch.setattr(sample.Decoder, "unconditional", lambda *_: None)


def fear_noise(trained, monkeypatch):
    """A network that where there is much noise hears another's caption: it begins other pictures."""
    outputs = doctor.outputs

    def deaf(model, tokenizer, texts, xt, t, before):
        return outputs(model, tokenizer, texts[::-1] if t[0] > 300 else texts, xt, t, before)

    monkeypatch.setattr(doctor, "outputs", deaf)


@pytest.mark.parametrize("plant, sentence", [
    (break_vae, "the VAE is broken: .* dB"),
    (clip_schedule, "the schedule does not end in noise"),
    (misplace_in_cache, "the cache is wrong"),
    (forget_training, "it is undertrained: its loss is .*%"),
    (ignore_captions, "it ignores its captions"),
    (read_the_caption_anyway, "guidance is off"),
    (fear_noise, "it finishes pictures and cannot begin them: from t = 250 on"),
], ids=lambda part: getattr(part, "__name__", ""))
def test_the_disease_is_named(trained, monkeypatch, plant, sentence):
    """Catches a sentence for another disease, or for a healthy model."""
    torch.manual_seed(0)
    if plant != fear_noise:                             # what hides the rest: redrawing would change nothing
        monkeypatch.setattr(doctor, "redraw", lambda patient, *_: patient.latents)
    plant(trained, monkeypatch)
    diagnosis, found = visit(trained)
    assert re.match(sentence, diagnosis), (diagnosis, found)


def test_a_healthy_model(trained, capsys):
    """Catches a doctor who finds something in everybody; and numbers that are not those of the model."""
    diagnosis, found = visit(trained)
    assert diagnosis == "nothing is wrong: from noise, 100% come out right", found
    assert found["db"] > 25 and found["left"] < 1e-3 and found["uncached"] < 1e-4 < 0.1 < found["unguided"] and found["z"] > 5
    assert all(right < wrong for right, wrong in zip(found["right"], found["wrong"]))
    assert max(found["redrawn"]) == 1000 and found["judged"]


def test_small_latents_of_digits_are_no_disease():
    """What a model of MNIST measures that draws 99% of its digits as asked: of weak noise in them little can be known. Catches a limit
    that is only right for the world of scenes."""
    found = {"db": 24.5, "left": 0.0, "uncached": 8e-4, "unguided": 5.0, "judged": False, "z": 10.5,
             "right": [0.416, 0.229, 0.110, 0.043, 0.012], "no_network": [0.706, 0.387, 0.213, 0.083, 0.010],
             "redrawn": {250: 1.0, 500: 0.96, 750: 0.79, 1000: 0.25}}
    assert doctor.diagnose(found) == "nothing is wrong: from t = 250 on, 100% come out as themselves"
    assert doctor.diagnose(found | {"right": found["no_network"]}).startswith("it is undertrained: its loss is 100%")
    assert doctor.diagnose(found | {"z": 2.0}).startswith("it ignores")


def test_decibels_by_hand(monkeypatch):
    """Catches an amplitude for a square, and a logarithm of another base, on which the limit of 20 dB would say something else."""
    pixels = np.full((2, 4, 4, 3), 100, np.uint8)
    monkeypatch.setattr(doctor, "encode_pixels", lambda trained, pixels: pixels)
    monkeypatch.setattr(doctor, "decode_latents", lambda trained, latents: latents + 25)
    assert doctor.round_trip(None, pixels) == pytest.approx(20 * np.log10(255 / 25)) == pytest.approx(20.17, abs=0.01)


@pytest.mark.parametrize("from_noise, words", [(0.95, "95% come out right$"), (0.51, "51% come out right; train longer for more$"),
                                               (0.49, "^it finishes pictures and cannot begin them")])
def test_half_as_many_from_noise_is_the_limit(from_noise, words):
    """Catches a model that is called ill because it draws a little worse from noise than from a quarter of it."""
    found = {"db": 30, "left": 0.0, "uncached": 0.0, "unguided": 5.0, "judged": True, "z": 10, "right": [0.1], "no_network": [1.0],
             "redrawn": {250: 1.0, 1000: from_noise}}
    assert re.search(words, doctor.diagnose(found))


def test_without_a_judge_the_nearest_picture_counts(trained):
    """Catches data of one's own that nobody can examine."""
    patient = doctor.find_patient(trained, n=12)
    patient.judge = None
    assert doctor.share_right(patient, patient.latents) == 1
    assert doctor.share_right(patient, patient.latents.roll(1, 0)) == 0
    quarter = doctor.redraw(patient, 250, 4, 3.0, 0)
    assert doctor.share_right(patient, quarter) == 1


def test_no_network_is_the_best_that_knows_no_picture():
    """In a world of independent Gaussians nothing is better: its loss there is the one that a formula gives. Catches a yardstick
    that is too short, at which a model looks trained."""
    torch.manual_seed(0)
    diffusion = Diffusion("flow")
    mean = torch.randn(1, 2, 4, 4)
    x0 = mean + 0.5 * torch.randn(4000, 2, 4, 4)
    for t in (100, 500, 900):
        eps = torch.randn(x0.shape)
        xt = diffusion.add_noise(x0, eps, t)
        found = doctor.loss(diffusion.target(x0, eps, t), doctor.guess(diffusion, x0, xt, t)).mean()
        s = float(diffusion.s[t])
        # eps - x0 = (xt - x0) / s, so its error is that of x0, divided by s. Var(x0 | xt) = v s^2 / (a^2 v + s^2).
        a, v = float(diffusion.a[t]), 0.25
        assert float(found) == pytest.approx(v / (a ** 2 * v + s ** 2), rel=0.02)


def test_mistakes(tmp_path):
    """Catches a traceback for a rival, and for too few pictures."""
    for n in ("1", "1000000000000"):                    # the second asked for 2.7 PiB
        with pytest.raises(UserError, match="--n must be from 2 to 10,000"):
            doctor.main(["--n", n])
    content = checkpoint.load(ASSETS / "scenes.pt", "model")
    content["about"] = {"kind": "llama", "text_share": -1.0}
    checkpoint.save(tmp_path / "model.pt", content)
    with pytest.raises(UserError, match="is a llama: the doctor"):
        doctor.main([str(tmp_path / "model.pt")])


def test_the_command(capsys):
    """The shipped model of edits, whose words have a picture before them. Catches a command line that cannot be used."""
    doctor.main([str(ASSETS / "scenes_edit.pt"), "--data", "edits", "--n", "6"])
    said = capsys.readouterr().out
    assert "diagnosis: nothing is wrong" in said and "nearest to its own picture" in said and "VAE, there and back" in said
