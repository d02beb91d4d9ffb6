"""
packing.py: what the tests of packed data share: the toy world in shards, and a training on it

Not a file of tests. test_pack.py, test_streams.py, test_shards.py, test_pieces.py,
test_shards_training.py and test_mixture.py use it. Its fixtures (`packed` ...) are in conftest.py.

A PICTURE   150 scenes --an untrained VAE--> packed/  text-000000/ ...  pairs-000000/ ...
SHAPES      pictures (3, 32, 32), latents (2, 8, 8) in patches of 2x2: P = 16; rows of T = 64
"""
import io
import itertools
import json
import tarfile
from pathlib import Path

import torch
from PIL import Image

import vae as vae_module
from data import PAD
from scale import streams

ROOT = Path(__file__).resolve().parents[1]
T = 64
P = 16


def make_vae(codes=0):
    """An untrained VAE: (3, 32, 32) -> (2, 8, 8). codes: how many a VQ-VAE has."""
    config = vae_module.VAEConfig(channels=4, multipliers=(1, 1, 1), z=2, codes=codes)
    return vae_module.VAE(config)


class Killed(BaseException):
    """Stands for a power cut: nothing may catch it."""


# ------------------------------------------------------------------------------------ command lines
def to_words(options):
    """The words of a command line with these options. None leaves one out, a list repeats it."""
    words = []
    for name, values in options.items():
        if values is None:
            continue
        for value in values if isinstance(values, list) else [values]:
            words.append("--" + name.replace("_", "-"))
            words.append(str(value))
    return words


def command(vae, out, **options):
    """The argument list of a small packing."""
    small = dict(text="scenes", pairs="scenes", scenes=150, vae=vae, seq_len=T, patch=2,
                 image_size=32, shard_rows=8, out=out)
    return to_words(small | options)


def training(folder, out, **options):
    """The argument list of a small training on a packed folder."""
    small = dict(data="shards", data_dir=folder, size="toy", patch=2, seq_len=T, documents=6,
                 steps=6, warmup=2, log_every=2, gap_every=6, save_every=3, samples=0, out=out)
    return to_words(small | options)


# -------------------------------------------------------------------------------- what is in shards
def all_rows(stream, kind):
    """Every stored row of a kind: [(documents, latents)]."""
    n = int(stream.begins[kind][-1])
    return [stream.read_row(kind, k) for k in range(n)]


def stored_texts(stream, kind):
    """Every text or caption in the rows of a kind, as words."""
    texts = []
    for documents, _ in all_rows(stream, kind):
        for ids in itertools.chain(*documents):         # a document is a list of parts
            texts.append(stream.tokenizer.decode(ids))
    return texts


def stored_pairs(stream):
    """Every stored pair: [(ids of the caption, latent or codes)]."""
    pairs = []
    for documents, latents in all_rows(stream, "pairs"):
        pairs += zip(itertools.chain(*documents), latents, strict=True)
    return pairs


def texts_of_world(world, n):
    """The texts of n scenes, as a packing reads them."""
    return [read()[0] for _, read in streams.scenes_of("text", world, n, 32)]


def documents_of(batch):
    """For each row of a Batch, the ids of its documents, without the padding."""
    rows = []
    for tokens, doc_id in zip(batch.tokens, batch.doc_id):
        documents = []
        for d in range(int(doc_id.max()) + 1):
            ids = tokens[doc_id == d].tolist()
            if ids[0] != PAD:
                documents.append(ids)
        rows.append(documents)
    return rows


def same(a, b):
    """Whether two Batches agree in everything."""
    for name, value in vars(a).items():
        if isinstance(value, torch.Tensor) and not torch.equal(value, getattr(b, name)):
            return False
    return True


# ------------------------------------------------------------------------------ sources of the user
def picture(color, kind="PNG", size=(40, 30)):
    """The bytes of a picture file."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def write_tar(path, members):
    """A tar of [(name, bytes)]; a name may stand in it twice. Returns its path."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_json_lines(path, entries):
    """A .jsonl file of dicts."""
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
