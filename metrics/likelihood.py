"""
likelihood.py: text, judged by how probable a model finds it         (Transfusion §4.1, App. B.1)

THE IDEA    A language model gives every text a probability. How probable it finds text that it has
            never seen is its perplexity. Which of a question's answers it finds likeliest is its
            choice. Nothing is generated, and nobody has to judge.
A PICTURE   a question of the world of scenes, and what the shipped model says (`TRY IT`):

            a white square is left of a red circle .   right of the white square .   ln p = -0.00
            the red circle is                          left of the white square .    ln p = -9.57
            '-------------- context ---------------'   '----- continuation -----'
THE RULE    perplexity = exp( - sum of ln p(token | all before it) / number of tokens )      eq. 1
            ranked classification: the answer of the highest ln p (`acc`), or of the highest ln p
            per character (`acc_norm`)
SHAPES      a request is (context, continuation), two lists of ids. Its answer is (ln p in nats,
            whether greedy decoding would say the same).
PAPER/HERE  same: perplexity on held-out text (the paper: 20M tokens of C4, and of Wikipedia);
            answers by ranked classification, 0-shot. The Llama suite's seven tasks come from
            lm-evaluation-harness (`suite`), which asks `log_likelihood`.
            our choice: documents are cut where the context ends; each piece begins with <bos>, as
            in training; EOS does not count.
            Run here: shipped models, texts and tasks of the scenes world. Not run: C4, Wikipedia,
            the suite (no network).
READ NEXT   coco.py, ../evaluate.py        TRY IT  python -m metrics.likelihood
TEST        tests/test_likelihood.py
"""
import argparse
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import BOS
from scale import distributed, streams
from sources import scenes
from support.checkpoint import device_of, load_trained
from support.common import (
    ASSETS,
    UserError,
    check_writable,
    load_json,
    read_lines,
    run_command,
)

# Paper: App. B.1, note 4. The Llama suite.
SUITE = ("hellaswag", "piqa", "social_iqa", "winogrande", "arc_easy", "arc_challenge", "boolq")
TOKENS_PER_FORWARD = 8192                               # at V = 32,000 their logits take 1 GB
COMMAND = "python -m metrics.likelihood"


# ------------------------------------------------------------------------------------- likelihood
def split(tokenizer, context, continuation):
    """(ids of the context, ids of the continuation). The latter has at least one id, unless the
    continuation is empty."""
    # TRAP: a tokenizer of pieces may join the last letters of the one and the first of the other.
    # Encoded apart, the answer would begin with a piece that never follows this context. So both
    # are encoded together, and cut where the context alone, without spaces at its end, ends.
    whole = tokenizer.encode(context + continuation)
    cut = len(tokenizer.encode(context.rstrip()))
    if continuation.strip():
        cut = min(cut, len(whole) - 1)                  # a piece across the cut is scored
    else:
        cut = min(cut, len(whole))
    return whole[:cut], whole[cut:]


def log_likelihood(model, requests, progress=False):
    """[(ln p(continuation | <bos> context) in nats, whether each of its tokens is the likeliest)],
    of a list of requests. Every process must call it.

    requests: list of (context, continuation), each a list of ids. A Chameleon's codes are ids,
    too; there are no other pictures. A context that is too long loses its beginning. Raises
    UserError for a continuation that is empty or longer than the model's context, and if the
    model's answers are no numbers. eq. 1."""
    check_requests(model, requests)

    def score_part(part, _):
        return score(model, part, progress)

    results = []
    for part in distributed.split_work(score_part, requests):
        results += part
    # TRAP: of answers that are all NaN, argmax takes the first: a broken model would be right where
    # the right answer stands first. Every process looks at all results, or some would wait.
    if not all(math.isfinite(log_p) for log_p, _ in results):
        raise UserError("this model's probabilities are not finite: its weights are damaged, or "
                        "its training has diverged. Measure an earlier checkpoint")
    return results


def check_requests(model, requests):
    """Raise UserError for a continuation that cannot be scored."""
    room = model.config.context - 1                     # beside <bos>
    longest = max((len(answer) for _, answer in requests), default=0)
    if longest > room:
        raise UserError(f"a continuation of {longest} tokens does not fit in this model's context "
                        f"of {room + 1}, with <bos>")
    if not all(answer for _, answer in requests):
        raise UserError("a continuation is empty: its probability would be 1, the highest there is")


def score(model, requests, progress):
    """One process's part of `log_likelihood`."""
    room = model.config.context - 1
    rows = []
    for context, answer in requests:
        surplus = len(context) + len(answer) - room
        rows.append(row_of(context[max(0, surplus):], answer))

    # Rows of like length go together, longest first: little padding, and the first forward takes
    # the most memory.
    waiting = sorted(range(len(rows)), key=lambda k: -len(rows[k].tokens))
    results = [None] * len(rows)
    silent = not progress or distributed.rank() > 0
    bar = tqdm(total=len(rows), desc="reading", disable=silent, leave=False)
    while waiting:
        longest = len(rows[waiting[0]].tokens)
        n = max(1, TOKENS_PER_FORWARD // longest)
        together = waiting[:n]
        waiting = waiting[n:]
        answers = score_batch(model, [rows[k] for k in together], longest)
        for k, answer in zip(together, answers, strict=True):
            results[k] = answer
        bar.update(len(together))
    bar.close()
    return results


def row_of(context, answer):
    """data.Sequence of <bos>, a context and an answer, with loss for the answer's tokens alone."""
    tokens = [BOS, *context, *answer]
    # Position q predicts token q + 1: the first of the answer is predicted by what is before it.
    before = len(tokens) - len(answer) - 1
    has_loss = [False] * before + [True] * len(answer) + [False]
    return data.Sequence(tokens, image_id=[-1] * len(tokens), has_loss=has_loss)


@torch.no_grad()
def score_batch(model, sequences, T):
    """[(ln p, greedy)] of a few sequences by one forward. T: tokens of the longest."""
    batch = data.to_batch([[sequence] for sequence in sequences], T).to(device_of(model))
    device = batch.tokens.device
    # The model wants pictures and their noise levels, too: there are none.
    no_pictures = torch.zeros(0, *model.config.latent, device=device)
    no_t = torch.zeros(0, dtype=torch.long, device=device)
    logits, _ = model(
        batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, no_pictures, no_t,
    )                                                   # (all answers' tokens, V)
    right = batch.tokens.roll(-1, 1)[batch.has_loss]
    nats = F.cross_entropy(logits.float(), right, reduction="none")
    likeliest = logits.argmax(-1) == right

    # All answers' tokens stand in one row; cut it where each of them ends.
    lengths = [sum(sequence.has_loss) for sequence in sequences]
    results = []
    for own, same in zip(nats.split(lengths), likeliest.split(lengths), strict=True):
        log_p = -own.double().sum().item()
        results.append((log_p, bool(same.all())))
    return results


# ----------------------------------------------------------------------- what is measured with it
def perplexity(trained, texts, progress=False):
    """{"perplexity", per token; "tokens"} of a list of texts. Every process must call it."""
    room = trained.model.config.context - 1
    # Our choice: a text is cut where the context ends. Every token is predicted once, the first of
    # a piece from <bos> alone. A window that slides would be kinder to the model, and slower.
    pieces = []
    for text in texts:
        ids = trained.tokenizer.encode(text)
        for k in range(0, len(ids), room):
            pieces.append(([], ids[k: k + room]))
    if not pieces:
        raise UserError("there is no text to read: all documents are empty")

    results = log_likelihood(trained.model, pieces, progress)
    nats = -sum(log_p for log_p, _ in results)
    tokens = sum(len(ids) for _, ids in pieces)
    # The mean over all tokens. A mean over documents would weigh those of short ones more.
    return {"perplexity": math.exp(nats / tokens), "tokens": tokens}


def ranked(trained, questions, progress=False):
    """{"acc", "acc_norm": share of questions whose right answer has the highest ln p, and the
    highest ln p per character; "n", "chance"}. Every process must call it.

    questions: list of (context, answers, number of the right one); an answer follows its context
    after a space."""
    requests = []
    for context, answers, _ in questions:
        for answer in answers:
            requests.append(split(trained.tokenizer, context, " " + answer))
    results = iter(log_likelihood(trained.model, requests, progress))

    right = []
    right_per_character = []
    chance = []
    for _, answers, truth in questions:
        # Of a tie, argmax takes the first.
        log_p = np.array([next(results)[0] for _ in answers])
        characters = np.array([len(answer) for answer in answers])
        right.append(log_p.argmax() == truth)
        right_per_character.append((log_p / characters).argmax() == truth)
        chance.append(1 / len(answers))
    return {
        "acc": float(np.mean(right)),
        "acc_norm": float(np.mean(right_per_character)),
        "n": len(questions),
        "chance": float(np.mean(chance)),
    }


def suite(trained, tasks=SUITE, **options):
    """lm-evaluation-harness' own results {task: its numbers}, 0-shot, and their "mean", which the
    paper reports. The library downloads the questions. Every process must call it.

    tasks: names that the library knows; options: as its simple_evaluate, e.g. limit, task_manager.
    Raises UserError if the library is not there, or does not know a task."""
    try:
        import lm_eval
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("the suite's tasks are lm-evaluation-harness': "
                        "pip install lm-eval==0.4.13") from None

    class Judge(LM):                                    # here, because its base class is optional
        """Our model, as the library asks one."""

        def loglikelihood(self, requests):
            pairs = [split(trained.tokenizer, *request.args) for request in requests]
            return log_likelihood(trained.model, pairs, progress=True)

        def loglikelihood_rolling(self, requests):
            raise UserError(f"for perplexity use `{COMMAND} perplexity`")

        def generate_until(self, requests):
            raise UserError("only tasks of ranked classification (multiple choice) can be asked "
                            "here")

    manager = options.pop("task_manager", None) or TaskManager()
    for task in tasks:
        if task not in manager.all_tasks:
            raise UserError(f"lm-evaluation-harness has no task {task!r}: `lm_eval ls tasks` lists "
                            f"them")
    answer = lm_eval.simple_evaluate(
        Judge(), tasks=list(tasks), num_fewshot=0, task_manager=manager, **options,
    )
    results = answer["results"]
    mean = float(np.mean([row["acc,none"] for row in results.values()]))
    return results | {"mean": {"acc": mean}}


# --------------------------------------------------------------------------- texts and questions
def limit_of(name, limit=None):
    """How many of a name of the command line: `limit`, if given; else of scenes 1000, of others
    all (None)."""
    if limit is None and name == "scenes":
        return 1000
    return limit


def read_texts(names, limit=None):
    """List of texts, up to `limit` of each name: a .txt with one per line, a .jsonl with {"text":
    ...}, a folder of them, or the word scenes, as `python -m scale.pack` takes them. Raises
    UserError, naming the line, for one that cannot be read."""
    texts = []
    for name in names:
        # Counted by name: else the first could use up the limit, and the next would go unread.
        n = limit_of(name, limit)
        texts += itertools.islice(texts_of(name, n), n)
    return texts


def texts_of(name, n):
    """Generator of the texts of one name of the command line. n: how many scenes there are."""
    options = SimpleNamespace(world="one", scenes=n, image_size=32)
    for source in streams.find_sources("text", [name], n):
        for _, read in streams.items_of("text", source, options):
            text, _ = read()
            yield text


def read_questions(name, n=None, seed=0):
    """Up to n questions, as `ranked` takes them, of a .jsonl; or, for the word scenes, n of that
    world. Raises UserError, naming the line, for one that is no question."""
    if name == "scenes":
        return deduction_questions(n, seed)
    wanted = ('{"context": ..., "choices": [at least two], "answer": number of the right one, '
              'from 0}')
    questions = []
    for number, line in read_lines(Path(name), wanted)[:n]:
        try:
            questions.append(read_question(load_json(line)))
        except (ValueError, KeyError, TypeError):
            where = f"{name} line {number}"
            raise UserError(f"{where} is not {wanted}: {line[:60]!r}") from None
    if not questions:
        raise UserError(f"{name} is empty: it must hold one {wanted} per line")
    return questions


def read_question(entry):
    """(context, choices, answer) of one line's dict. Raises ValueError, KeyError or TypeError if it
    is none."""
    # Raised, not asserted: under PYTHONOPTIMIZE=1 an assert is not there.
    context = entry["context"]
    choices = entry["choices"]
    answer = entry["answer"]
    if not isinstance(context, str) or not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("no context, or no choice")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("an empty choice")
    if type(answer) is not int or not 0 <= answer < len(choices):   # True is an int, too
        raise ValueError("no such answer")
    return context, choices, answer


def deduction_questions(n, seed=0):
    """n two-choice questions of the scenes world: a fact about two objects, and the same fact seen
    from the other side."""
    rng = np.random.default_rng([seed, 10])
    pairs = scenes.captions("color_attr")
    relations = list(scenes.RELATIONS)
    questions = []
    for k in range(n):
        _, claim = pairs[rng.integers(len(pairs))]
        relation = relations[rng.integers(len(relations))]
        text = scenes.deduction_text(claim.objects, relation)
        false_text = scenes.deduction_text(claim.objects, relation, wrong=True)
        context, right = text.rsplit(" is ", 1)
        _, wrong = false_text.rsplit(" is ", 1)
        # In turn, the right one first and second: a model that cannot tell takes the first.
        answers = [right, wrong] if k % 2 == 0 else [wrong, right]
        questions.append((f"{context} is", answers, k % 2))
    return questions


# --------------------------------------------------------------------------------- command line
def demo(trained):
    """Both answers to a few of the world's questions, and how probable the model finds them."""
    for context, answers, truth in deduction_questions(3):
        requests = [split(trained.tokenizer, context, " " + answer) for answer in answers]
        results = log_likelihood(trained.model, requests)
        print(context)
        for k, (log_p, _) in enumerate(results):
            remark = "   (the right one)" if k == truth else ""
            print(f"    ln p = {log_p:7.2f}  {answers[k]}{remark}")


def parse_arguments(argv=None):
    """The options of the command line, checked."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Text, judged by likelihood: perplexity; choices; the Llama suite of "
                    "lm-evaluation-harness.")
    add = parser.add_argument
    add("what", nargs="?", choices=("perplexity", "choices", "suite"),
        help="how to judge; without it: a small example")
    add("names", nargs="*",
        help='perplexity: .txt (a document per line), .jsonl with {"text": ...}, folders of them, '
             "or the word scenes; choices: one .jsonl, or the word scenes; suite: tasks of "
             "lm-evaluation-harness, default: the paper's")
    add("--checkpoint", default=str(ASSETS / "scenes.pt"), help="a model.pt of train.py")
    add("--limit", type=int,
        help="at most so many documents of each name, or questions (of each task); default: all, "
             "of scenes 1000")
    add("--json", help="also write the numbers here")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args):
    """Raise UserError for options that do not make sense, before any work is done."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    if args.what == "perplexity" and not args.names:
        raise UserError(f"say what to read: {COMMAND} perplexity a.jsonl b.txt")
    if args.what == "choices" and len(args.names) != 1:
        raise UserError(f"say what to read, one file: {COMMAND} choices questions.jsonl")
    if args.json is not None:
        check_writable(args.json)


def print_numbers(args, numbers):
    """One line per task, or one line."""
    rows = numbers if args.what == "suite" else {" ".join(args.names): numbers}
    for name, row in rows.items():
        cells = []
        for key, value in row.items():
            if type(value) is int:
                cells.append(f"{key} {value:,}")
            elif isinstance(value, (int, float)):
                cells.append(f"{key} {value:.4f}")
        print(f"{name}: " + ", ".join(cells))


def main(argv=None):
    """Judge a model by the texts that the command line names, print the numbers, return them."""
    args = parse_arguments(argv)
    ranks = distributed.start()
    trained = load_trained(args.checkpoint, ranks.device)
    trained.model.to(ranks.dtype)                       # bfloat16 on a GPU
    if args.what is None:
        return demo(trained)

    if args.what == "perplexity":
        texts = read_texts(args.names, args.limit)
        numbers = perplexity(trained, texts, progress=True)
    elif args.what == "choices":
        [name] = args.names
        questions = read_questions(name, limit_of(name, args.limit))
        numbers = ranked(trained, questions, progress=True)
    else:
        numbers = suite(trained, args.names or SUITE, limit=args.limit)

    if distributed.rank() == 0:
        if args.json:                                   # first: a name may not be printable
            Path(args.json).write_text(json.dumps(numbers, indent=1, default=str))
        print_numbers(args, numbers)
    return numbers


if __name__ == "__main__":
    run_command(main)
