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
            answers by ranked classification, 0-shot: of the Llama suite's seven tasks, from files
            (`choices`, see questions.py) or by lm-evaluation-harness (`suite`), which asks
            `log_likelihood`.
            our choice: over a document that is longer than the context a window slides
            (`--stride`). Each window begins with <bos>, as in training; EOS does not count.
            Run here: shipped models, texts and tasks of the scenes world. Not run: C4, Wikipedia,
            the suite (no network).
READ NEXT   questions.py, coco.py        TRY IT  python -m metrics.likelihood
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
from metrics.questions import deduction_questions, read_questions
from scale import distributed, streams
from support.checkpoint import device_of, load_trained
from support.common import (
    ASSETS,
    Parser,
    UserError,
    check_writable,
    run_command,
    whole_file,
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
def perplexity(trained, texts, progress=False, stride=None, tokens=None):
    """What a list or generator of texts costs: {"perplexity" per token, "word_perplexity",
    "bits_per_byte"; "tokens", "words", "bytes"}. Every process must call it.

    stride    how far the window moves over a text that is longer than the context; None: half of it
    tokens    stop after the text in which this many are reached; None: read all
    Models of different tokenizers can be compared per word and per byte, not per token.
    Raises UserError if there is no text, and for a stride that is longer than the window."""
    room = trained.model.config.context - 1             # beside <bos>
    stride = stride or max(1, room // 2)
    if stride > room:
        raise UserError(f"--stride {stride} is longer than this model's window of {room} tokens: "
                        f"those between two windows would not be read")
    pieces = []
    numbers = {"tokens": 0, "words": 0, "bytes": 0}
    for text in texts:
        ids = trained.tokenizer.encode(text)
        pieces += windows(ids, room, stride)
        numbers["tokens"] += len(ids)
        numbers["words"] += len(text.split())
        numbers["bytes"] += len(text.encode())
        if tokens and numbers["tokens"] >= tokens:
            break
    if not pieces:
        raise UserError("there is no text to read: all documents are empty")

    results = log_likelihood(trained.model, pieces, progress)
    nats = -sum(log_p for log_p, _ in results)
    # Means over all tokens. A mean over documents would weigh those of short ones more.
    # In torch, where exp() of a language without spaces, one word a line, is inf and no error.
    nats_per_word = torch.tensor(nats / max(1, numbers["words"]))
    return {
        "perplexity": math.exp(nats / numbers["tokens"]),
        "word_perplexity": nats_per_word.exp().item(),
        "bits_per_byte": nats / math.log(2) / numbers["bytes"],
        **numbers,
    }


def windows(ids, room, stride):
    """[(context, answer)] of one text, so that the answers are its ids, each once.

    ids       the text's
    room      how many ids the model can read at once
    stride    how many of them are new, from the second window on"""
    # Our choice: a window that slides, of which the older part is context only. So no token but
    # the first `room` is predicted from fewer than room - stride others. Cut into independent
    # pieces (stride = room), every piece would begin as if nothing had been said before.
    if not ids:
        return []
    pieces = [([], ids[:room])]
    for k in range(room, len(ids), stride):
        context = ids[k - (room - stride): k]
        pieces.append((context, ids[k: k + stride]))
    return pieces


def ranked(trained, questions, progress=False):
    """{"acc", "acc_norm": share of questions whose right answer has the highest ln p, and the
    highest ln p per character; "n", "chance"}. Every process must call it.

    questions: list of (context, answers, number of the right one); an answer follows its context
    after a space. A list of contexts has one for each answer."""
    requests = []
    for context, answers, _ in questions:
        contexts = context if isinstance(context, list) else [context] * len(answers)
        for own, answer in zip(contexts, answers, strict=True):
            requests.append(split(trained.tokenizer, own, " " + answer))
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


def rank_files(trained, names, limit=None):
    """`ranked` of each file of questions, {name: its numbers}, and their "mean", which the paper
    reports; of a single file its numbers alone. Every process must call it.

    names: as `read_questions` takes them; limit: at most so many questions of each."""
    # All are read before the first is ranked: a mistake in the last one must not cost hours.
    files = {name: read_questions(name, limit_of(name, limit)) for name in names}
    rows = {name: ranked(trained, questions, True) for name, questions in files.items()}
    if len(rows) == 1:
        return rows[names[0]]
    mean = float(np.mean([row["acc"] for row in rows.values()]))
    return rows | {"mean": {"acc": mean}}


def suite(trained, tasks=SUITE, include_path=None, **options):
    """lm-evaluation-harness' own results {task: its numbers}, 0-shot, and their "mean", which the
    paper reports. The library downloads the questions. Every process must call it.

    tasks: names that the library knows; include_path: a folder with tasks of your own, .yaml files,
    e.g. such as read local files; options: as its simple_evaluate, e.g. limit. Raises UserError if
    the library is not there, or does not know a task."""
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

    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            raise UserError(f"lm-evaluation-harness has no task {task!r}: `lm_eval ls tasks` lists "
                            f"them, --include-path adds your own")
    answer = lm_eval.simple_evaluate(
        Judge(), tasks=list(tasks), num_fewshot=0, task_manager=manager, **options,
    )
    results = answer["results"]
    mean = float(np.mean([row["acc,none"] for row in results.values()]))
    return results | {"mean": {"acc": mean}}


# ----------------------------------------------------------------------------------------- texts
def limit_of(name, limit=None):
    """How many of a name of the command line: `limit`, if given; else of scenes 1000, of others
    all (None)."""
    if limit is None and name == "scenes":
        return 1000
    return limit


def read_texts(names, limit=None):
    """Generator of texts, up to `limit` of each name: a .txt with one per line, a .jsonl with
    {"text": ...}, a folder of them, or the word scenes, as `python -m scale.pack` takes them.
    Raises UserError, naming the line, for one that cannot be read."""
    for name in names:
        # Counted by name: else the first could use up the limit, and the next would go unread.
        n = limit_of(name, limit)
        yield from itertools.islice(texts_of(name, n), n)


def texts_of(name, n):
    """Generator of the texts of one name of the command line. n: how many scenes there are."""
    options = SimpleNamespace(world="one", scenes=n, image_size=32)
    for source in streams.find_sources("text", [name], n):
        for _, read in streams.items_of("text", source, options):
            text, _ = read()
            yield text


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
    parser = Parser(
        prog=COMMAND, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Text, judged by likelihood: perplexity; choices; the Llama suite of "
                    "lm-evaluation-harness.")
    add = parser.add_argument
    add("what", nargs="?", choices=("perplexity", "choices", "suite"),
        help="how to judge; without it: a small example")
    add("names", nargs="*",
        help='perplexity: .txt (a document per line), .jsonl with {"text": ...}, folders of them, '
             "or the word scenes; choices: .jsonl files as the Llama suite's tasks are published "
             "(labels of x.jsonl in x-labels.lst), or the word scenes; suite: tasks of "
             "lm-evaluation-harness, default: the paper's")
    add("--checkpoint", default=str(ASSETS / "scenes.pt"), help="a model.pt of train.py")
    add("--limit", type=int,
        help="at most so many documents of each name, or questions (of each task); default: all, "
             "of scenes 1000")
    add("--tokens", type=int,
        help="perplexity: read no further than the document with this token (the paper: 20000000)")
    add("--stride", type=int,
        help="perplexity: by how many tokens the window moves over a long document; default: half "
             "the model's context")
    add("--include-path", help="suite: a folder with tasks of your own, as .yaml files")
    add("--json", help="also write the numbers here")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args):
    """Raise UserError for options that do not make sense, before any work is done."""
    for name in ("limit", "tokens", "stride"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if (args.tokens or args.stride) and args.what != "perplexity":
        raise UserError("--tokens and --stride are for perplexity")
    if args.what == "perplexity" and not args.names:
        raise UserError(f"say what to read: {COMMAND} perplexity a.jsonl b.txt")
    if args.what == "choices" and not args.names:
        raise UserError(f"say what to read: {COMMAND} choices questions.jsonl")
    if args.include_path and args.what != "suite":
        raise UserError(f"--include-path is for tasks of the suite: {COMMAND} suite my_task "
                        f"--include-path {args.include_path}")
    if args.include_path and not Path(args.include_path).is_dir():
        raise UserError(f"there is no folder {args.include_path} with tasks")
    if args.json is not None:
        check_writable(args.json, ".json")


def print_numbers(args, numbers):
    """One line per task, or one line."""
    # Of several files, or tasks, each has a row; of what is one number there is one.
    single = args.what == "perplexity" or "acc" in numbers
    rows = {" ".join(args.names): numbers} if single else numbers
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
        numbers = perplexity(trained, texts, True, args.stride, args.tokens)
    elif args.what == "choices":
        numbers = rank_files(trained, args.names, args.limit)
    else:
        tasks = args.names or SUITE
        numbers = suite(trained, tasks, include_path=args.include_path, limit=args.limit)

    if distributed.rank() == 0:
        if args.json:                                   # first: a name may not be printable
            with whole_file(args.json) as file:         # str: the harness's own objects
                file.write(json.dumps(numbers, indent=1, default=str).encode())
        print_numbers(args, numbers)
    return numbers


if __name__ == "__main__":
    run_command(main)
