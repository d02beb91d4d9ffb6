"""
conftest.py: what all tests share

THE IDEA    Every test starts from one seed, on one thread. Tests of the network take a tiny model
            that has something to say. Tests of train.py take runs of seconds: see small_runs.py.
            Tests of packed data take a folder of shards: see packing.py.
            Tests of sample.py take random models that write: see small_documents.py.
"""
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from model import SIZES, ModelConfig, Transfusion

# Models this small would only wait for a second thread.
torch.set_num_threads(1)
# A shell that starts the tests in the background has them ignore Ctrl-C; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def make_run(config, out):
    """The scale.run.Run of a Config at step 0, as train.main builds it. out: the run's folder."""
    # Imported here: the test of one concept must not need every room.
    import chameleon
    from scale.run import prepare

    return prepare(config, Path(out), False, False, partial(chameleon.view, config.model))


def draw_batch(run, step, micro):
    """The data.Batch of a micro-batch with its noise, as train.train_step draws it."""
    import train

    batch = run.feed.batch(run.config.seed, step, micro)
    train.draw_noise(batch)
    return batch


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture
def make_model():
    """A function (encoder, **ModelConfig) -> a Transfusion of 2 layers and width 32, with P = 4
    patches per picture of (4, 4, 4)."""

    def make(encoder="linear", **options):
        small = dict(
            vocabulary=16,
            layers=2,
            width=32,
            heads=2,
            latent=(4, 4, 4),
            patch=2,
            context=64,
        )
        config = ModelConfig(encoder=encoder, **{**small, **options})
        model = Transfusion(config).eval()
        # At its real initialisation the picture output is zero and attention nearly uniform: a leak
        # would be too faint to see. Here every layer passes on about as much as it takes in, so
        # that whatever is wrong is loud.
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        return model

    return make


@pytest.fixture(params=["linear", "unet"])
def model(request, make_model):
    """The tiny model, once with either patch encoder."""
    return make_model(request.param)


# -------------------------------------------------------- small runs of train.py: see small_runs.py
@pytest.fixture(scope="module")
def tiny_size():
    """While a file that uses this is tested, "toy" has 2 layers of width 32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "toy", (2, 32, 2))
        yield


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory):
    """Path of an untrained VAE: (3, 32, 32) -> (2, 8, 8). It stands in for a trained one."""
    from small_runs import save_tiny_vae

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    save_tiny_vae(path)
    return path


@pytest.fixture(scope="module")
def pretrained(tiny_size, tiny_vae, tmp_path_factory):
    """Path of a tiny model.pt, what --init starts from: 32x32 pixels, flow, context 128."""
    from small_runs import save_tiny_model

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("pretrained") / "model.pt"
    save_tiny_model(path, tiny_vae)
    return path


@pytest.fixture
def command(tiny_size, tiny_vae, tmp_path):
    """A function: the argument list of a small run, in this test's own folder, with the untrained
    VAE. Options, as keywords, are those of train.py."""
    from small_runs import small_run

    def arguments(out="run", **options):
        return small_run(**{"vae": tiny_vae, "out": tmp_path / out, **options})

    return arguments


# --------------------------------------------------- the toy world packed in shards: see packing.py
@pytest.fixture(scope="session")
def vae_path(tmp_path_factory):
    """Path of an untrained VAE, (3, 32, 32) -> (2, 8, 8), with latents of about unit size."""
    from packing import make_vae
    from support import checkpoint

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    vae = make_vae()
    vae.scale.fill_(0.1)
    checkpoint.save(path, checkpoint.pack_vae(vae))
    return path


@pytest.fixture
def other_vae(vae_path, tmp_path):
    """Path of a VAE that differs in one number."""
    from support import checkpoint

    content = torch.load(vae_path, weights_only=True)
    content["weights"]["shift"][0] += 1e-3
    checkpoint.save(tmp_path / "other.pt", content)
    return tmp_path / "other.pt"


@pytest.fixture(scope="session")
def packed(vae_path, tmp_path_factory):
    """The toy world in shards, packed without interruption. Tests read it; none may change it."""
    from packing import command
    from scale import pack

    out = tmp_path_factory.mktemp("packed") / "packed"
    pack.main(command(vae_path, out))
    return out


@pytest.fixture
def own(packed, tmp_path):
    """A copy of that folder to break."""
    return Path(shutil.copytree(packed, tmp_path / "packed"))


# --------------------------------------- runs that are stopped, damaged or spoiled: small_runs.py
@pytest.fixture(scope="module")
def one_layer():
    """While a file that uses this is tested, "toy" has 1 layer, and there are few scenes."""
    from small_runs import small_world

    with small_world():
        yield


@pytest.fixture(scope="session")
def vae_file(tmp_path_factory):
    """Path of an untrained VAE."""
    from small_runs import untrained_vae
    from support import checkpoint

    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    checkpoint.save(path, checkpoint.pack_vae(untrained_vae()))
    return path


@pytest.fixture(scope="session")
def whole_run(vae_file, tmp_path_factory):
    """The folder of a run of six steps that nothing interrupted; checkpoints 4 and 6 are kept."""
    import train
    from small_runs import small_run, small_world

    out = tmp_path_factory.mktemp("whole") / "run"
    with small_world():
        train.main(small_run(vae=vae_file, out=out, save_every=2))
    return out


@pytest.fixture
def copied_run(whole_run, tmp_path):
    """A copy of the whole run, in this test's own folder, to be damaged."""
    return shutil.copytree(whole_run, tmp_path / "run")


@pytest.fixture
def short_run(one_layer, vae_file, tmp_path):
    """A function: the argument list of a small run, as whole_run was made, in this test's own
    folder. Options, as keywords, are those of train.py."""
    from small_runs import small_run

    def arguments(**options):
        ours = {"vae": vae_file, "out": tmp_path / "run", "save_every": 2}
        return small_run(**{**ours, **options})

    return arguments


# -------------------------------------------- tiny random models that write: see small_documents.py
@pytest.fixture
def make_trained(make_model):
    """A function (encoder, kind, **ModelConfig) -> checkpoint.Trained, with a random model and a
    VAE that has learned nothing: pictures of 8x8 pixels, latents (4, 4, 4), P = 4."""
    from diffusion import Diffusion
    from small_documents import WORDS
    from support.checkpoint import Trained
    from vae import VAE, VAEConfig

    def make(encoder="linear", kind="ddpm", **options):
        vae = VAE(VAEConfig(channels=8, multipliers=(1, 2)))
        model = make_model(encoder, vocabulary=len(WORDS), **options)
        return Trained(model.requires_grad_(False), WORDS, vae.eval(), Diffusion(kind))

    return make


@pytest.fixture
def eager(monkeypatch):
    """Makes a random model eager to write: it seldom ends its document, and often draws. Otherwise
    there would be little to compare."""
    import sample
    from data import BOI, EOS
    from small_documents import WORDS

    lean = torch.zeros(len(WORDS))
    lean[EOS] = -3.0
    lean[BOI] = 1.0
    real = sample.choose

    def leaning(logits, **choice):
        return real(logits + lean, **choice)

    monkeypatch.setattr(sample, "choose", leaning)
