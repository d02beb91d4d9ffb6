"""
mixtures.py: documents of several parts, measured         (Transfusion §3 "Inference", §4.5)

THE IDEA    One decoding algorithm makes any mixture of words and pictures, and edits. Whether it
            does is measured in the world of scenes as scenes.py measures single pictures: with the
            exact parser, the grammar, and the known language.
A PICTURE   `editing`   [picture] make the circle blue --model--> [picture'] --parse--> is it blue?
                        [picture] [picture'] what changed ? --model--> make the circle blue
            `mixing`    a circle [picture] two squares --model--> [picture'] --parse--> two squares?
THE RULE    An edit is exact if the parsed picture is what the instruction asks for and nothing
            else. An object that was not named must stand within 2 pixels of its place.
            BOI is right where a caption is over for certain, and wrong where it cannot be over.
SHAPES      pictures (N, h, w, 3) uint8; latents (N, c, h, w) float32
PAPER/HERE  The paper shows edits (Figs. 6, 10) and counts none. All of these numbers are ours.
READ NEXT   ../sources/edits.py, ../evaluate.py, which prints them
TRY IT      python evaluate.py --data mixtures --n 40 --steps 25 --sampler dpm++
TEST        tests/test_mixtures.py
"""
import numpy as np
import torch
from tqdm import tqdm

import data
from sample import edit, generate
from sources import edits, scenes
from support.checkpoint import decode_latents, device_of, encode_pixels


# ---------------------------------------------------------------------------------------- editing
def beside(*pictures):
    """(h, W, 3) uint8: pictures of (h, w, 3) or (h, w, 1) side by side, white lines between."""
    strip = []
    for picture in pictures:
        h, w, _ = picture.shape
        if strip:
            line = np.full((h, 2, 3), 255, np.uint8)
            strip.append(line)
        strip.append(np.broadcast_to(picture, (h, w, 3)))   # grey ones, too
    return np.concatenate(strip, axis=1)


def editing(trained, n=200, seed=0, size=32, progress=True, **options):
    """Numbers about edits of unseen scenes, and [(instruction, before | after, exact)].

    edits     share of n single edits after which the picture holds exactly what was asked for
    kept      share of untouched objects that stand within 2 pixels of their place
    chains    share of n chains of three edits that end in the right scene
    asked     share of n questions "what changed ?" answered with an instruction that does lead
              from the one picture to the other
    kinds     {kind of edit: share that is exact}

    size: pixels per side; options: as `sample.edit`."""
    # Chains of three edits. Some end early, where nothing in a picture can be named: so many that n
    # whole ones are among them.
    enough = max(4 * n, 60)
    truth = edits.scene_edits(enough, [seed, 12], single=0, size=size, progress=False)
    numbers, results = single_edits(trained, truth, n, seed, size, options)
    numbers["chains"] = chains_of_edits(trained, truth, n, seed, size, progress, options)
    numbers["asked"] = what_changed(trained, truth, n, size)
    return numbers, results


def first_edits(truth, n):
    """[(number of the picture before, instruction, number of the picture after)] of n chains."""
    triples = []
    for pictures, texts in truth.chains[:n]:
        before, after = pictures[:2]
        triples.append((before, texts[0], after))
    return triples


def pixels_of(truth, numbers):
    """(N, h, w, 3) uint8: some of the true pictures."""
    return np.stack([truth.pixels[k] for k in numbers])


def change(trained, latents, instructions, seed, options):
    """Latents of the edited pictures."""
    parts = []                                          # 100 at a time: their caches take memory
    for k in range(0, len(instructions), 100):
        before = latents[k: k + 100]
        texts = instructions[k: k + 100]
        parts.append(edit(trained, before, texts, seed=seed + k, **options))
    return torch.cat(parts)


def single_edits(trained, truth, n, seed, size, options):
    """{"edits", "kept", "kinds"} of `editing`, and [(instruction, before | after, exact)]."""
    triples = first_edits(truth, n)
    instructions = [text for _, text, _ in triples]
    pictures = pixels_of(truth, [before for before, _, _ in triples])
    latents = change(trained, encode_pixels(trained, pictures), instructions, seed, options)
    edited = decode_latents(trained, latents)

    right = []                                          # per edit: is it exact?
    kept = 0                                            # untouched objects that are still in place
    untouched = 0
    kinds = {kind: [] for kind in edits.KINDS}
    results = []
    for k, (before, text, _) in enumerate(triples):
        things = scenes.parse(edited[k])
        exact, in_place, others = edits.judge(truth.scenes[before], text, things, size)
        right.append(exact)
        kept += in_place
        untouched += others
        kinds[edits.kind_of(text)].append(exact)
        results.append((text, beside(pictures[k], edited[k]), exact))

    by_kind = {}
    for kind, rows in kinds.items():
        if rows:                                        # else it did not come up
            by_kind[kind] = float(np.mean(rows))
    numbers = {
        "edits": float(np.mean(right)),
        "kept": kept / max(1, untouched),               # in a few pictures nothing is untouched
        "kinds": by_kind,
    }
    return numbers, results


def chains_of_edits(trained, truth, n, seed, size, progress, options):
    """The share "chains" of `editing`."""
    whole = [chain for chain in truth.chains if len(chain[1]) == 3]
    chains = whole[:n]
    first_ones = [pictures[0] for pictures, _ in chains]
    starts = pixels_of(truth, first_ones)
    # Each edit starts from the picture that the model drew before, so its mistakes add up, as they
    # do for a user. Each step has other noise.
    latents = encode_pixels(trained, starts)
    for step in tqdm(range(3), desc="editing", disable=not progress, leave=False):
        instructions = [texts[step] for _, texts in chains]
        noise = seed + 1000 * (step + 1)
        latents = change(trained, latents, instructions, noise, options)

    ends = decode_latents(trained, latents)
    right = []
    for (pictures, _), end in zip(chains, ends, strict=True):
        first = truth.scenes[pictures[0]]
        last = truth.scenes[pictures[-1]]
        things = scenes.parse(end)
        right.append(edits.judge_end(first, last, things, size))
    return float(np.mean(right))


def what_changed(trained, truth, n, size):
    """The share "asked" of `editing`: from two true pictures to the instruction between them."""
    triples = first_edits(truth, n)
    before = pixels_of(truth, [number for number, _, _ in triples])
    after = pixels_of(truth, [number for _, _, number in triples])
    prompts = []
    both = zip(encode_pixels(trained, before), encode_pixels(trained, after), strict=True)
    for x, y in both:
        prompts.append([x, y, "what changed ?"])
    documents = generate(trained, prompts, max_pictures=0)

    right = []
    for parts, (a, _, b) in zip(documents, triples, strict=True):
        answer = parts[-1].removeprefix("what changed ? ")
        first = truth.scenes[a]
        last = truth.scenes[b]
        # Not compared with the instruction that was carried out: another may lead there, too.
        try:
            exact, _, _ = edits.judge(first, answer, last, size)
        except ValueError:                              # no instruction, or not of this picture
            exact = False
        right.append(exact)
    return float(np.mean(right))


# --------------------------------------------------------------------------------------- mixtures
@torch.no_grad()
def mixing(trained, n=200, seed=0, categories=scenes.WORLDS["six"], **options):
    """Numbers about documents of several parts.

    single        share of n pictures that are exactly what their caption says
    second        the same captions, each after another caption and its picture
    boi           share of places in unseen captions where the likeliest token is rightly BOI or
                  rightly not; where the language leaves a choice, nothing is counted
    well_formed   share of n documents that the model ends, greedily, from unseen captions
    sampled       share of n documents that it begins, too, at temperature 1

    categories: of the captions; options: as `sample.draw`."""
    rng = np.random.default_rng([seed, 13])
    world = scenes.World(tuple(categories))
    texts = []
    claims = []
    for _ in range(n):
        text, claim = world.caption(rng)
        texts.append(text)
        claims.append(claim)

    # A caption alone; then the same caption behind another one and the picture that the model drew
    # for that. The first text follows the last one.
    captions = [[text] for text in texts]
    single = draw_last(trained, captions, seed, options)
    prompts = []
    for k in range(n):
        prompts.append([texts[k - 1], single[k - 1], texts[k]])
    second = draw_last(trained, prompts, seed + 1000, options)

    return {
        "single": share_exact(trained, single, claims),
        "second": share_exact(trained, second, claims),
        "boi": share_of_boi(trained, texts, single),
        "well_formed": share_well_formed(trained, captions, seed, 0.0, options),
        "sampled": share_well_formed(trained, [[]] * n, seed, 1.0, options),
    }


def draw_last(trained, prompts, seed, options):
    """Latents (N, c, h, w): the picture that follows each prompt."""
    latents = []
    for k in range(0, len(prompts), 100):               # their caches take memory
        part = prompts[k: k + 100]
        documents = generate(trained, part, draw_now=True, max_words=0, seed=seed + k, **options)
        latents += [parts[-1] for parts in documents]
    return torch.stack(latents)


def share_exact(trained, latents, claims):
    """Share of pictures that are exactly what their Claim says."""
    right = []
    pictures = decode_latents(trained, latents)
    for claim, picture in zip(claims, pictures, strict=True):
        things = scenes.parse(picture)
        right.append(scenes.holds(claim, things))
    return float(np.mean(right))


def next_words(texts):
    """{words so far, a tuple: set of what may follow} over texts; "<boi>" follows a whole text."""
    table = {}
    for text in texts:
        words = (*text.split(), "<boi>")
        for k, word in enumerate(words):
            table.setdefault(words[:k], set()).add(word)
    return table


def beginnings():
    """All that a document may begin with, as texts: the captions, and what the deductions say up to
    their first "is"."""
    texts = list(scenes.all_claims())
    for _, claim in scenes.captions("color_attr"):
        text = scenes.deduction_text(claim.objects, "left of")
        first, _ = text.split(" is ", 1)
        texts.append(f"{first} is")
    return texts


def share_of_boi(trained, texts, latents):
    """The share "boi" of `mixing`. latents: the pictures that follow the texts."""
    follow = next_words(beginnings())
    right = []
    for k in range(0, len(texts), 50):
        part = slice(k, k + 50)
        for words, says_boi in read_captions(trained, texts[part], latents[part]):
            for m, boi in enumerate(says_boi):
                may_follow = follow[words[:m]]
                only_boi = may_follow == {"<boi>"}
                # "a circle": is that all, or "a circle left of ..."? Both are right: no matter.
                if only_boi or "<boi>" not in may_follow:
                    right.append(boi == only_boi)
    return float(np.mean(right))


def read_captions(trained, texts, latents):
    """[(words of a caption, says_boi)]: the model reads captions with their finished pictures, one
    document per row. says_boi[m]: whether, after m words, it finds BOI the likeliest token."""
    model = trained.model
    rows = []
    for k, text in enumerate(texts):
        document = [text, ("image", k, 0)]
        rows.append(data.lay_out(document, trained.tokenizer, model.config.patches))
    longest = max(len(row.tokens) for row in rows)
    batch = data.pack(rows, longest)
    batch.latents = latents[batch.images]
    batch.t = torch.zeros_like(batch.images)
    batch = batch.to(device_of(model))
    logits, _ = model(
        batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, batch.latents, batch.t,
    )
    greedy = torch.full_like(batch.tokens, -1)
    greedy[batch.has_loss] = logits.argmax(-1)

    captions = []
    for tokens, likeliest in zip(batch.tokens.tolist(), greedy.tolist(), strict=True):
        end = tokens.index(data.BOI)
        words = tuple(trained.tokenizer.vocabulary[token] for token in tokens[1:end])
        # Position 0 is <bos>: what it predicts comes after no word.
        says_boi = [token == data.BOI for token in likeliest[:end]]
        captions.append((words, says_boi))
    return captions


def share_well_formed(trained, prompts, seed, temperature, options):
    """Share of documents that are well formed when the model itself has ended them."""
    right = []
    context = trained.model.config.context              # as many words as fit
    for k in range(0, len(prompts), 50):
        documents = generate(trained, prompts[k: k + 50], max_words=context, max_pictures=4,
                             seed=seed + k, temperature=temperature, **options)
        right += [well_formed(parts) for parts in documents]
    return float(np.mean(right))


def well_formed(document):
    """Whether words and pictures alternate, and every stretch of words is a caption; or a deduction
    is all there is."""
    is_text = [isinstance(part, str) for part in document]
    if is_text == [True]:
        return is_deduction(document[0])
    if len(document) < 2:                               # nothing, or a picture alone
        return False
    for part, following in zip(is_text, is_text[1:], strict=False):
        if part == following:
            return False
    return all(scenes.read_caption(part) for part in document if isinstance(part, str))


def is_deduction(text):
    """Whether a text is one of the world's: "a red circle is left of a blue square . the ..."."""
    # Cut out the two objects that it names, and see whether a deduction about them says the same.
    words = text.split()
    end = words.index(".") if "." in words else 0
    if end <= 4:
        return False
    first = words[1:3]                                  # "red circle"
    second = words[end - 2: end]                        # "blue square"
    for relation in scenes.RELATIONS:
        if text == scenes.deduction_text((first, second), relation):
            return True
    return False
