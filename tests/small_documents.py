"""
small_documents.py: what the tests of sample.py share

THE IDEA    A tiny random model with seven words writes documents: lists of str and of latents
            (4, 4, 4), each of P = 4 patches. What it writes makes no sense, and need not: tests
            compare two ways to compute it.
HERE        documents       WORDS, noise, parts_of, as_layout
            one decoder     go_on, finish, script (chooses the words), listen_to_denoise
            comparisons     uncached, check_against_uncached
            conftest.py has the models themselves: make_trained, eager.
"""
import pytest
import torch

import data
import sample
from data import EOS
from sample import Decoder

WORDS = data.Words("a and blue circle red square the".split())
BOTH = pytest.mark.parametrize("encoder", ["linear", "unet"])


def parts_of(document):
    """A document to compare: its words, and the places of its pictures."""
    return [part if isinstance(part, str) else "[picture]" for part in document]


def noise(how_many=1, seed=0):
    """Starting noise (n, 4, 4, 4); picture k is the same whatever n is."""
    pictures = []
    for k in range(how_many):
        generator = torch.Generator().manual_seed(100 * seed + k)
        pictures.append(torch.randn(4, 4, 4, generator=generator))
    return torch.stack(pictures)


def go_on(decoder, b, text):
    """Row b goes on with `text`, as if the model had chosen these words; "<boi>" opens a picture.
    """
    for word in text.split():
        decoder.tokens[b].append(WORDS.ids[word])
        decoder.advance()


def finish(steps):
    """Run a diffusion to its end; return the (t, x, x0) on the way."""
    return list(steps)


def listen_to_denoise(trained, monkeypatch):
    """Listen to every denoising forward: returns the list in which (x, t, output) will lie."""
    seen = []
    real = trained.model.denoise

    def listening(x, t, pos, cache):
        out = real(x, t, pos, cache)
        seen.append((x, t.tolist(), out))
        return out

    monkeypatch.setattr(trained.model, "denoise", listening)
    return seen


def script(monkeypatch, *rows):
    """Make the model "choose" the given words, a str per row; "<eos>" from then on."""
    queues = []
    for row in rows:
        queues.append([WORDS.ids[word] for word in row.split()])
    writing = []                                        # the rows whose next word is chosen now
    real = Decoder.lm_step

    def scripted(logits, **choice):
        assert len(logits) == len(writing)              # one row of logits per row that writes
        tokens = []
        for b in writing:
            tokens.append(queues[b][0] if queues[b] else EOS)
        return torch.tensor(tokens)

    def lm_step(decoder, active, **choice):
        writing[:] = active
        tokens = real(decoder, active, **choice)
        for b in active:
            del queues[b][:1]
        return tokens

    monkeypatch.setattr(sample, "choose", scripted)
    monkeypatch.setattr(Decoder, "lm_step", lm_step)


def uncached(trained, document, latents, t):
    """(logits (n, V), picture outputs (M, c, h, w)) of one training forward of a whole document.

    document   as `data.lay_out` takes it; n is its length
    latents    its M pictures, as the network reads them
    t          the step of each of them"""
    row = data.lay_out(document, WORDS, trained.model.config.patches, ends=False)
    batch = data.pack([row], len(row.tokens))
    everywhere = torch.ones_like(batch.has_loss)
    xt = torch.stack(latents) if latents else torch.zeros(0, 4, 4, 4)
    t = torch.tensor(t, dtype=torch.long)
    return trained.model(batch.tokens, batch.image_id, batch.doc_id, everywhere, xt, t)


def as_layout(document):
    """(document with its pictures replaced by ("image", index, t_max), the pictures)."""
    layout = []
    pictures = []
    for part in document:
        if isinstance(part, str):
            layout.append(part)
        else:
            layout.append(("image", len(pictures), 0))
            pictures.append(part)
    return layout, pictures


def check_against_uncached(trained, decoder, b):
    """The logits of row b are those of a training forward of all that it holds so far, with every
    picture clean."""
    document, pictures = as_layout(decoder.document(b))
    assert data.lay_out(document, WORDS, 4, ends=False).tokens == decoder.tokens[b]
    logits, _ = uncached(trained, document, pictures, [0] * len(pictures))
    assert torch.allclose(decoder.logits[b], logits[-1], atol=1e-4)
