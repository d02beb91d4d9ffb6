"""
writing.py: the mode switch, the exercise and its check                      (sample.py, exercise 8)

THE IDEA    The model is a script: it says what is written in it, and remembers what it was asked.
            So the answer's every question is on record. The document that comes out is compared
            with what sample.write makes of the same script.
A PICTURE   tokens   <bos> a red | circle   <boi>    ~~~~        ~~::       [##]   <eoi> | <eos>
            asked                  word     word   noise 1000  noise 500 ...               word
                                 LM mode         diffusion mode                          LM mode
PROPERTIES  in the order in which they are looked at: see PROPERTIES, below
READ NEXT   ../sample.py        TEST  ../tests/test_exercises.py
"""
import functools
import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import data
import sample
from data import BOI, BOS, EOI, EOS, PATCH
from diffusion import Diffusion, ddim_step, respace
from exercises.trial import Advice, kind_of, near, need_several

WORDS = data.Words("a red blue circle cross".split())
A, RED, BLUE, CIRCLE, CROSS = (WORDS.ids[word] for word in "a red blue circle cross".split())
STEPS = 4
SEED = 7
PATIENCE = 100                                          # questions, before a loop is called endless


def write(model, tokens, generator, max_words=64, max_pictures=1):
    """(tokens, pictures): the document that goes on from `tokens`; its pictures, each (c, h, w).
    Both are new lists; the one that is given stays as it is. Transfusion §3 "Inference".

    model         what is asked. It has
                  model.next_token(tokens, pictures): LM mode; the id that comes next
                  model.denoise(tokens, pictures, t): diffusion mode; the last picture, at step t in
                      `pictures`, one step cleaner (c, h, w). It stands as PATCH in `tokens`
                  model.times: the steps t at which to denoise, from T down
                  model.patches, model.latent, model.context: P, (c, h, w), and the most tokens
    tokens        list of ids, BOS first
    generator     torch.Generator: each new picture starts as torch.randn(latent) from it
    max_words     stop after so many new words
    max_pictures  stop at the BOI of one picture more, or of one that has no room with its EOI

    Stop also after EOS, and at a full context. What the model says is appended: a word, BOI or EOS.
    So is EOI after a picture, but that is not predicted."""
    # The module's function wants a trained model, and reads a prompt of words.
    said = sample.write(model.as_trained(), [WORDS.decode(tokens)], max_words, max_pictures,
                        guidance=1.0, steps=STEPS, sampler="ddim", seed=generator.initial_seed())
    return (model.read_tokens or list(tokens),          # None: the model was asked nothing
            [part for part in said if isinstance(part, torch.Tensor)])


class Script:
    """Stands for a trained model. It says at each place what its script has there.

    script      {number of tokens so far: the id that comes next}, or one id for all places
    log         what it was asked: a list of Question
    """
    remembers = True
    patches = 4
    latent = (2, 2, 2)

    def __init__(self, script, context=40):
        self.script = script
        self.context = context
        self.diffusion = Diffusion()
        self.times = respace(self.diffusion.T, STEPS)[:-1]
        self.log = []
        self.read_tokens = None

    # ---------------------------------------------------------------------- what a student calls
    def next_token(self, tokens, pictures):
        """LM mode: the id that comes next."""
        self.remember("word", tokens, pictures, None)
        return self.says(len(tokens))

    def denoise(self, tokens, pictures, t):
        """Diffusion mode: the last picture, one step cleaner."""
        self.remember("noise", tokens, pictures, t)
        if not len(pictures):
            raise Advice("There is no picture to denoise: put the noise in `pictures` first.")
        if t not in self.times:
            raise Advice(f"denoise is asked for t = {t!r}, which is not one of model.times.")
        x = pictures[-1]
        if not isinstance(x, torch.Tensor) or x.shape != self.latent:
            raise Advice(f"A picture must be a tensor (c, h, w), {self.latent}.")
        following = [*self.times, 0][self.times.index(t) + 1]
        out = self.network(x[None])
        x0, eps = self.diffusion.x0_and_eps(x[None], out, t)
        answer = ddim_step(self.diffusion, x0, eps, following)[0]
        self.log[-1].answer = answer.clone()
        return answer

    # ------------------------------------------------------------------------------ how it works
    def says(self, place):
        """The id of the script at a place."""
        if isinstance(self.script, dict):
            return self.script.get(place, EOS)
        return self.script

    @staticmethod
    def network(x):
        """What it takes for the noise in x (1, c, h, w). Any function would do."""
        return torch.tanh(x + 0.1)

    def remember(self, mode, tokens, pictures, t):
        """Log a question. Raises Advice if it makes no sense, or if there are too many."""
        if not isinstance(tokens, (list, tuple)):
            raise Advice(f"model wants the tokens as a list of ids, not {kind_of(tokens)}.")
        if not isinstance(pictures, (list, tuple)):
            raise Advice(f"model wants the pictures as a list, not {kind_of(pictures)}.")
        if len(self.log) >= PATIENCE:
            raise Advice("It never stops: the model was asked 100 times for a short document. "
                         "What ends the loop at EOS, at max_words, at the BOI of a picture too "
                         "many, and at a full context?")
        kept = [x.clone() if isinstance(x, torch.Tensor) else x for x in pictures]
        self.log.append(Question(mode, list(tokens), kept, t))

    def as_trained(self):
        """What sample.write takes for a checkpoint.Trained."""
        config = SimpleNamespace(patches=self.patches, latent=self.latent, context=self.context)

        def forward(tokens, image_id, doc_id, has_loss, latents, times):
            """model.Transfusion's call: (logits (n, V), outputs (M, c, h, w))."""
            row = tokens[0].tolist()
            drawing = row[-1] == PATCH
            self.remember("noise" if drawing else "word", row, list(latents), int(times[-1:].sum()))
            token = EOI if drawing else self.says(len(row))
            self.read_tokens = [*row, token]            # sample.write appends it, and keeps it
            logits = torch.zeros(len(row), len(WORDS))
            logits[-1, token] = 1
            return logits, self.network(latents)

        forward.config = config
        return SimpleNamespace(model=forward, tokenizer=WORDS, diffusion=self.diffusion,
                               vae=SimpleNamespace(x0_max=torch.tensor(1e9)))


@dataclass
class Question:
    """One thing that the script was asked. mode: "word" or "noise"; answer: the picture, one step
    cleaner."""
    mode: str
    tokens: list
    pictures: list
    t: int
    answer: torch.Tensor = None


@dataclass
class Case:
    """A script, and what the answer makes of it, beside what is right."""
    name: str
    script: Script
    tokens: list
    pictures: list
    right_tokens: list
    right_pictures: list


PROMPT = (BOS, A, RED)
# A picture after `circle`: BOI at place 4, patches from 5 on, then EOI. Then AFTER tokens stand.
AFTER = 5 + Script.patches + 1
PICTURE = {3: CIRCLE, 4: BOI}
TWO_PICTURES = {**PICTURE, AFTER: A, AFTER + 1: CROSS, AFTER + 2: BOI}
SCRIPTS = {                                             # script, max_words, max_pictures, context
    "words alone": ({3: CIRCLE, 4: EOS, 5: BLUE}, 64, 1, 40),
    "words and a picture": (PICTURE, 64, 1, 40),
    "words, a picture, words": ({**PICTURE, AFTER: A, AFTER + 1: CROSS}, 64, 1, 40),
    "two pictures": (TWO_PICTURES, 64, 2, 40),
    "two pictures, with max_pictures=1": (TWO_PICTURES, 64, 1, 40),
    "a picture, with max_pictures=0": (PICTURE, 64, 0, 40),
    "two words, with max_words=1": ({3: BLUE, 4: CIRCLE}, 1, 1, 40),
    "words without end, with max_words=5": (A, 5, 1, 40),
    "a picture among words, with max_words=2": (
        {**PICTURE, AFTER: CROSS, AFTER + 1: RED}, 2, 1, 40),
    "a picture, with max_words=0": (PICTURE, 0, 1, 40),
    "words without end, in a context of 9": (A, 64, 1, 9),
    "a picture that fits exactly": (PICTURE, 64, 1, AFTER),
    "a picture without room for EOI": (PICTURE, 64, 1, AFTER - 1),
    "pictures without end": (BOI, 64, 2, 40),
}


def play(function, name):
    """(the Script, what a function like `write` makes of it). name: one of SCRIPTS."""
    script, max_words, max_pictures, context = SCRIPTS[name]
    script = Script(script, context)
    generator = torch.Generator().manual_seed(SEED)
    try:
        return script, function(script, list(PROMPT), generator, max_words, max_pictures)
    except Advice as problem:
        raise Advice(explain(str(problem), script, name)) from None


@functools.cache
def right_document(name):
    """(tokens, pictures): what the module makes of a script."""
    _, document = play(write, name)
    return document


def try_write(trial):
    """The answer, tried with SCRIPTS: {name: Case}, up to the first that comes out wrong."""
    # It stops at the first that is wrong: the simplest one, which is the easiest to talk about.
    cases = {}
    for name in SCRIPTS:
        script, result = play(trial, name)
        case = Case(name, script, *need_document(result), *right_document(name))
        cases[name] = case
        if not is_right(case):
            break
    return cases


def explain(problem, script, name):
    """A failure, with the script in which it happened; or what led to it, if that is known."""
    # An exception often has a cause further up, such as a question that made no sense.
    for asked in script.log:
        advice = odd_question(asked)
        if advice:
            return advice
    return f"{problem} (In the script: {name}.)"


def need_document(result):
    """(tokens, pictures) as lists. Raises Advice for something else."""
    tokens, pictures = need_several(result, ("tokens", "pictures"))
    for name, part in (("tokens", tokens), ("pictures", pictures)):
        if not isinstance(part, (list, tuple)):
            raise Advice(f"`{name}` must be a list, but it is {kind_of(part)}.")
    for x in pictures:
        if not isinstance(x, torch.Tensor) or x.shape != Script.latent:
            raise Advice("`pictures` must be a list of tensors (c, h, w).")
    try:
        return [int(token) for token in tokens], [x.detach() for x in pictures]
    except (TypeError, ValueError):
        raise Advice("`tokens` must be a list of ids.") from None


def without_last_boi(tokens):
    """A BOI that no picture follows may stand or not: it ends the document either way."""
    return tokens[:-1] if tokens and tokens[-1] == BOI else tokens


def is_right(case):
    """Whether a case comes out as the module has it."""
    if without_last_boi(case.tokens) != without_last_boi(case.right_tokens):
        return False
    if len(case.pictures) != len(case.right_pictures):
        return False
    if any(odd_question(asked) for asked in case.script.log):
        return False
    if odd_steps(case.script) or asked_again(case.script):
        return False
    return all(near(a, b, atol=1e-4) for a, b in zip(case.pictures, case.right_pictures))


# --------------------------------------------------------------------------------- single questions
def odd_question(asked):
    """Advice on one question to the script that should never be asked, or None."""
    tokens = asked.tokens
    P = Script.patches
    if asked.mode == "word":
        if tokens[-1:] == [BOI]:
            return ("After BOI the model is asked for a word. BOI switches to diffusion mode: the "
                    "patches come next, all at once.")
        if tokens[-1:] == [PATCH]:
            return ("After the last patch the model is asked for a word. EOI is not predicted: "
                    "append it when the picture is finished.")
        if EOS in tokens:
            return "After EOS the model is asked for more: EOS ends the document."
        if tokens.count(PATCH) != P * len(asked.pictures):
            return ("A word is asked for while `tokens` has places for other pictures than there "
                    "are in `pictures`: the finished picture must be in both.")
        return None
    if tokens[-1:] == [EOI]:
        return ("EOI stands there while the picture is still being denoised. It is appended when "
                "the picture is finished.")
    if tokens[-P:] != [PATCH] * P or tokens[-P - 1: -P] != [BOI]:
        return (f"While a picture is denoised it must have its places in `tokens`: BOI, then P = "
                f"{P} times PATCH, at the end.")
    if len(asked.pictures) * P < tokens.count(PATCH):
        return ("`pictures` must have all the pictures of the document, the earlier ones, too: the "
                "model reads them.")
    if len(asked.pictures) * P > tokens.count(PATCH):
        return ("`pictures` grows with each step. A picture that is denoised is overwritten, in "
                "place: x_(t-1) takes the place of x_t.")
    return None


def odd_steps(script):
    """Advice on how the pictures of a script were denoised, or None."""
    noise = [asked for asked in script.log if asked.mode == "noise"]
    pictures = {}
    for asked in noise:
        pictures.setdefault(len(asked.pictures), []).append(asked)
    for steps in pictures.values():
        times = [asked.t for asked in steps]
        if times == sorted(times) and len(times) > 1:
            return ("model.times is walked the wrong way round: from T, noise, down to the clean "
                    "end.")
        if times != script.times:
            return (f"A picture is denoised at every t of model.times, {script.times}; you ask for "
                    f"{times}.")
        for before, asked in itertools.pairwise(steps):
            x = asked.pictures[-1]
            if before.answer is None or near(x, before.answer, atol=1e-4):
                continue
            if torch.equal(x, before.pictures[-1]):
                return ("Every step sees the same picture: put what denoise returns in the place "
                        "of the last picture, for the next step to see.")
            return ("A step does not see what the step before it returned: put that in the place "
                    "of the last picture as it is. Noise is drawn once for each picture, not for "
                    "each step.")
    return None


# --------------------------------------------------------------------------------------- properties
def last_of(cases):
    """The case that was tried last: the wrong one, if there is one."""
    return list(cases.values())[-1]


def asks_well(cases):
    """The right question in each mode, and each step of the diffusion"""
    script = last_of(cases).script
    for asked in script.log:
        advice = odd_question(asked)
        if advice:
            return advice
    return odd_steps(script)


def one_eoi(cases):
    """After each picture: EOI, once"""
    # Paper: §3, EOI is appended when the diffusion is done.
    case = last_of(cases)
    drawn = case.tokens.count(PATCH) // Script.patches
    eois = case.tokens.count(EOI)
    if drawn and eois < drawn:
        return "EOI is missing: a picture is closed with EOI, which you append."
    if eois > drawn and drawn:
        return "EOI stands there twice: one for each picture."


def goes_on(cases):
    """After the picture: back to LM mode"""
    case = last_of(cases)
    names = [asked.mode for asked in case.script.log]
    right = case.right_tokens
    as_far_as_it_goes = case.tokens == right[:len(case.tokens)]
    stopped = as_far_as_it_goes and len(case.tokens) < len(without_last_boi(right))
    if stopped and names[-1:] == ["noise"] and "max_words" not in case.name:
        return ("It stops after the picture. The document goes on: back to LM mode, until EOS or a "
                "limit.")


def asked_again(script):
    """Advice if an answer of the script was thrown away, or None."""
    # A model is deterministic here: the same question has the same answer, for ever.
    words = [asked.tokens for asked in script.log if asked.mode == "word"]
    for before, tokens in itertools.pairwise(words):
        if before == tokens:
            return ("What the model has said is thrown away, and the same question asked again. "
                    "Each token stands in the document, and a BOI of a picture too many ends it.")
    return None


def keeps_what_is_said(cases):
    """What the model says is kept"""
    return asked_again(last_of(cases).script)


def boi_and_eos_stand(cases):
    """BOI and EOS are part of the document"""
    case = last_of(cases)
    if case.tokens == case.right_tokens:
        return None
    if without_last_boi(case.right_tokens) == without_last_boi(case.tokens[:-1]):
        if case.tokens[-1] == EOS:
            return ("EOS is appended though the model has not said it: a document that ends at a "
                    "limit stays open.")
    for token, name in ((EOS, "EOS"), (BOI, "BOI")):
        if [other for other in case.right_tokens if other != token] == case.tokens:
            return f"{name} is missing: the model has said it, so it is appended like a word."


def draws_when_asked(cases):
    """BOI draws a picture, and nothing else does"""
    case = last_of(cases)
    never = not any(asked.mode == "noise" for asked in case.script.log)
    if never and case.right_pictures and "fits exactly" not in case.name:
        return "No picture is drawn: when the model says BOI, switch to diffusion mode."
    if len(case.pictures) > len(case.right_pictures):
        if "without room" in case.name:
            return (f"A picture is drawn that does not fit: its patches and EOI must have room in "
                    f"model.context, {case.script.context}. (In the script: {case.name}.)")
        return (f"Too many pictures: {len(case.pictures)} instead of {len(case.right_pictures)}. "
                f"max_pictures is counted down by each. (In the script: {case.name}.)")


def fresh_noise(cases):
    """Each picture starts from noise of its own, from the generator"""
    # With the generator seeded again for each picture, the pictures of a story look alike.
    case = last_of(cases)
    starts = {}
    for asked in case.script.log:
        if asked.mode == "noise" and asked.t == case.script.times[0]:
            starts.setdefault(len(asked.pictures), asked.pictures[-1])
    generator = torch.Generator().manual_seed(SEED)
    right = [torch.randn(Script.latent, generator=generator) for _ in starts]
    noise = list(starts.values())
    if len(noise) > 1 and torch.equal(noise[0], noise[1]):
        return ("Both pictures start from the same noise, so they will look alike: draw it anew "
                "for each, and do not seed the generator again.")
    for found, wanted in zip(noise, right):
        if not near(found, wanted):
            if (found == 0).all():
                return "The picture starts from zeros. It starts from pure noise."
            return ("The noise is not the next torch.randn(model.latent, generator=generator): is "
                    "it another generator, or is something else drawn from this one?")


def finished_picture(cases):
    """What comes out, and what later words see, is the finished picture"""
    # TRAP: what follows reads the last *noisy* step, not the finished picture (docs/PAPER.md §4.7).
    case = last_of(cases)
    for asked in case.script.log:
        if asked.mode != "word":
            continue
        for found, wanted in zip(asked.pictures, case.right_pictures):
            if not near(found, wanted, atol=1e-4):
                return ("The words after a picture must see it finished: keep what the last step "
                        "returns.")
    for found, wanted in zip(case.pictures, case.right_pictures):
        if not near(found, wanted, atol=1e-4):
            return ("The picture that is returned is not the finished one: keep what the last step "
                    "returns.")
    if len(case.pictures) < len(case.right_pictures):
        return (f"{len(case.right_pictures)} pictures are wanted, {len(case.pictures)} are "
                f"returned. (In the script: {case.name}.)")


def limits(cases):
    """max_words, max_pictures, and the context"""
    case = last_of(cases)
    found = without_last_boi(case.tokens)
    right = without_last_boi(case.right_tokens)
    if found == right:
        return None
    where = f"(In the script: {case.name}. You write: {spell(found)}; right is: {spell(right)}.)"
    if found[:3] != right[:3]:
        return f"The document must start with the tokens that it goes on from. {where}"
    if len(found) > case.script.context:
        return f"The document is longer than model.context, {case.script.context}. {where}"
    if "max_words" in case.name:
        if len(found) > len(right):
            return f"Too many words: stop after max_words new ones. {where}"
        return ("It stops too early: max_words counts words, not BOI, patches or the tokens that "
                f"were there before. {where}")
    if "max_pictures" in case.name:
        return f"A BOI beyond max_pictures ends the document. {where}"
    if "without room" in case.name:
        return f"A BOI of a picture that has no room, with its EOI, ends the document. {where}"
    if "fits exactly" in case.name:
        return f"This picture has room, with its EOI: the context may be filled to its end. {where}"
    if "context" in case.name:
        return f"Words may fill the context to its end, and not go beyond. {where}"
    return f"Not yet. {where}"


def spell(tokens):
    """Tokens as words."""
    names = []
    for token, group in itertools.groupby(tokens):
        count = len(list(group))
        name = WORDS.vocabulary[token] if 0 <= token < len(WORDS) else str(token)
        names.append(name if count == 1 else f"{name} x {count}")
    return " ".join(names)


PROPERTIES = (asks_well, one_eoi, draws_when_asked, keeps_what_is_said, goes_on,
              boi_and_eos_stand, fresh_noise, limits, finished_picture)
