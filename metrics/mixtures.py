"""
mixtures.py: documents of several parts, measured                       (Transfusion §3 "Inference", §4.5 "Image Editing")

THE IDEA    One decoding algorithm makes any mixture of words and pictures, and edits. Whether it does is measured in the world
            of scenes as evaluate.py measures single pictures: with the exact parser, the grammar, and the known language.
THE TABLE   edits of unseen scenes: exact; untouched objects in place; chains of three; "what changed ?"        `editing`
            a second picture in a document against the same caption alone; BOI where the language has it;
            open documents that are well formed; a batch of 16 mixed prompts against one by one                 `mixing`
PAPER/HERE  the paper shows edits (Figs. 6, 10) and counts none; all of these numbers are ours.
READ NEXT   edits.py, evaluate.py, which prints them      TEST  tests/test_mixtures.py
TRY IT      python evaluate.py --data mixtures --n 40 --steps 25 --sampler dpm++
"""
import time
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

import data
from sample import edit, generate
from sources import edits
from sources import scenes
from support.checkpoint import decode_latents, device_of, encode_pixels


# ------------------------------------------------------------------------------------------------------------------ editing
def beside(before, after):
    """(h, 2w + 2, 3) uint8: two pictures of (h, w, 3), a white line between them."""
    return np.concatenate([before, np.full_like(before[:, :2], 255), after], 1)


def editing(trained, n=200, seed=0, size=32, progress=True, **drawing):
    """Numbers of edits of unseen scenes: {"edits": share of n single edits after which the picture holds exactly what the
    instruction asks for, "kept": share of untouched objects that stand within 2 pixels of their place, "chains": share of n
    chains of three edits that end in the right scene, "asked": share of n questions "what changed ?" answered with an
    instruction that does lead from the one picture to the other, "kinds": {kind: exact}}; and (instruction, before |
    after, exact) to show. Each edit of a chain starts from the model's own picture. drawing: as `sample.edit`."""
    found = edits.scene_edits(max(4 * n, 60), [seed, 12], single=0, size=size, progress=False)
    pixels = lambda index: np.stack([found.pixels[k] for k in index])
    change = lambda x, said, seed: torch.cat([edit(trained, x[k: k + 100], said[k: k + 100], seed=seed + k, **drawing)
                                              for k in range(0, len(said), 100)])
    before, said, after = map(list, zip(*[(pictures[0], texts[0], pictures[1]) for pictures, texts in found.chains[:n]]))
    drawn = decode_latents(trained, change(encode_pixels(trained, pixels(before)), said, seed))
    verdicts = [edits.judge(found.scenes[a], text, scenes.parse(picture), size) for a, text, picture in zip(before, said, drawn)]
    table = {kind: [v[0] for v, text in zip(verdicts, said) if edits.kind_of(text) == kind] for kind in edits.KINDS}
    shown = [(text, beside(a, b), v[0]) for text, a, b, v in zip(said, pixels(before), drawn, verdicts)]

    two = [encode_pixels(trained, pixels(index)) for index in (before, after)]
    answers, asked = generate(trained, [[a, b, "what changed ?"] for a, b in zip(*two)], max_pictures=0), []
    for answer, a, b in zip(answers, before, after):
        try:
            asked.append(edits.judge(found.scenes[a], answer[-1].removeprefix("what changed ? "), found.scenes[b], size)[0])
        except ValueError:                              # no instruction, or one that does not fit the picture
            asked.append(False)

    threes = [chain for chain in found.chains if len(chain[1]) == 3][:n]
    latents = encode_pixels(trained, pixels([pictures[0] for pictures, _ in threes]))
    for step in tqdm(range(3), desc="editing", disable=not progress, leave=False):
        latents = change(latents, [texts[step] for _, texts in threes], seed + 1000 * (step + 1))
    ends = [edits.judge_end(found.scenes[pictures[0]], found.scenes[pictures[-1]], scenes.parse(picture), size)
            for (pictures, _), picture in zip(threes, decode_latents(trained, latents))]
    return {"edits": float(np.mean([v[0] for v in verdicts])), "kept": sum(v[1] for v in verdicts) / max(1, sum(v[2] for v in verdicts)),
            "chains": float(np.mean(ends)), "asked": float(np.mean(asked)),
            "kinds": {kind: float(np.mean(v)) for kind, v in table.items() if v}}, shown


# ----------------------------------------------------------------------------------------------------------------- mixtures
def next_words(texts):
    """{words so far, a tuple: set of what may follow} over texts; "<boi>" follows a whole text."""
    table = {}
    for text in texts:
        words = (*text.split(), "<boi>")
        for k, word in enumerate(words):
            table.setdefault(words[:k], set()).add(word)
    return table


def well_formed(document):
    """Whether words and pictures alternate, and every stretch of words is a caption; or a deduction is all there is."""
    kinds = [isinstance(part, str) for part in document]
    words = document[0].split() if kinds == [True] else []
    end = words.index(".") if "." in words else 0
    if end > 4:
        a, b = words[1:3], words[end - 2: end]          # "a red circle is ... a blue square ."
        return any(document[0] == scenes.deduction_text((a, b), rel) for rel in scenes.RELATIONS)
    return len(document) > 1 and all(a != b for a, b in zip(kinds, kinds[1:])) and \
        all(scenes.read_caption(part) for part in document if isinstance(part, str))


@torch.no_grad()
def mixing(trained, n=200, seed=0, categories=scenes.WORLDS["six"], **drawing):
    """Numbers about documents of several parts: {"single", "second": share of n pictures that are exactly what their caption
    says, alone, and, the same captions, after another caption and its picture; "boi": share of places in unseen captions
    at which the likeliest token is rightly BOI or rightly not, where the language leaves no choice; "well_formed": share of
    n documents that the model ends, greedily, from unseen captions; "sampled": of n that it begins, too, at temperature 1; "batch": see
    `batch_speed`}."""
    rng, world = np.random.default_rng([seed, 13]), scenes.World(tuple(categories))
    texts, claims = zip(*[world.caption(rng) for _ in range(n)])
    exact = lambda latents: float(np.mean([scenes.holds(claim, scenes.parse(picture))
                                           for claim, picture in zip(claims, decode_latents(trained, latents))]))
    run = lambda prompts, seed: torch.stack([parts[-1] for k in range(0, n, 100) for parts in generate(
        trained, prompts[k: k + 100], draw_now=True, max_words=0, seed=seed + k, **drawing)])
    single = run([[text] for text in texts], seed)
    second = run([[texts[k - 1], single[k - 1], texts[k]] for k in range(n)], seed + 1000)

    follow, right = next_words([text for text in scenes.all_claims()] +
                               [scenes.deduction_text(claim.objects, "left of").split(" is ")[0] + " is" for _, claim in scenes.captions("color_attr")]), []
    for k in range(0, n, 50):
        rows = [data.lay_out([text, ("image", j, 0)], trained.tokenizer, trained.model.config.patches) for j, text in enumerate(texts[k: k + 50])]
        batch = data.pack(rows, max(len(row.tokens) for row in rows))
        batch = replace(batch, latents=single[k: k + 50][batch.images], t=torch.zeros_like(batch.images)).to(device_of(trained.model))
        logits, _ = trained.model(batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, batch.latents, batch.t)
        said = torch.full_like(batch.tokens, -1)
        said[batch.has_loss] = logits.argmax(-1)
        for b, row in zip(said.tolist(), batch.tokens.tolist()):
            words = tuple(trained.tokenizer.vocabulary[w] for w in row[1: row.index(data.BOI)])
            for m in range(len(words) + 1):
                options = follow[words[:m]]
                if options == {"<boi>"} or "<boi>" not in options:
                    right.append((b[m] == data.BOI) == (options == {"<boi>"}))

    grown = lambda prompts, **choice: float(np.mean([well_formed(parts) for k in range(0, n, 50) for parts in generate(
        trained, prompts[k: k + 50], max_words=trained.model.config.context, max_pictures=4, seed=seed + k, **choice, **drawing)]))
    return {"single": exact(single), "second": exact(second), "boi": float(np.mean(right)),
            "well_formed": grown([[text] for text in texts]), "sampled": grown([[]] * n, temperature=1.0),
            "batch": batch_speed(trained, texts, single, **drawing)}


def batch_speed(trained, texts, pictures, **drawing):
    """How many times faster 16 mixed prompts are together than one at a time: words; a picture; both; and a second caption."""
    n, times = len(texts), []
    mixed = [[[texts[k % n]], [pictures[k % n]], [texts[k % n], pictures[k % n]], [texts[k % n], pictures[k % n], texts[(k + 1) % n]]][k % 4]
             for k in range(16)]
    for groups in ([[k] for k in range(16)], [list(range(16))]):
        began = time.time()
        for group in groups:
            generate(trained, [mixed[k] for k in group], seed=list(group), max_words=20, **drawing)
        times.append(time.time() - began)
    return times[0] / times[1]
