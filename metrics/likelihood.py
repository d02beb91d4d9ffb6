"""
likelihood.py: text, judged by how probable a model finds it                  (Transfusion §4.1 "Evaluation", Table 7, App. B.1)

THE IDEA    A language model gives every text a probability. How probable it finds text that it has never seen is its perplexity;
            which of a question's answers it finds likeliest is its choice. Nothing is generated, and nobody has to judge.
A PICTURE   <bos> a red circle is left of a blue square . the blue square is | right of the red circle .       ln p = -0.01
                  '------------------- context ------------------------------' '---- continuation ----'
                                                                             | left of the red circle .        ln p = -9.2
THE RULE    perplexity = exp( - sum of ln p(token | all before it) / number of tokens )                           eq. 1
            ranked classification: the answer of the highest ln p, or of the highest ln p per character (`acc_norm`)
SHAPES      a request is (context, continuation), two lists of ids; its answer (ln p in nats, is it what greedy decoding says?)
PAPER/HERE  same: perplexity on held-out text (the paper: 20M tokens of C4, and of Wikipedia), answers by ranked classification,
            0-shot. The Llama suite's seven tasks come from lm-evaluation-harness (`suite`), which asks `log_likelihood`.
            our choice: documents are cut where the context ends; each piece begins with <bos>, as in training; EOS does not count.
            Run here: shipped models, texts and tasks of the scenes world. Not run: C4, Wikipedia, the suite (no network).
READ NEXT   coco.py, evaluate.py        TRY IT  python likelihood.py        TEST  tests/test_likelihood.py
"""
import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import BOS
from scale import distributed
from scale import streams
from sources import scenes
from support.checkpoint import device_of, load_trained
from support.common import ASSETS, UserError, read_lines, run_command

SUITE = ("hellaswag", "piqa", "social_iqa", "winogrande", "arc_easy", "arc_challenge", "boolq")    # Paper App. B.1, note 4
TOKENS_PER_FORWARD = 8192                                         # tokens of one forward: at V = 32,000 their logits take 1 GB, and once more


def split(words, context, continuation):
    """(ids of the context, ids of the continuation: at least one, unless there is nothing in it). TRAP: a tokenizer of pieces may
    join the last letters of the one and the first of the other, so both are encoded together and cut where the context alone,
    without spaces at its end, ends."""
    whole, first = words.encode(context + continuation), len(words.encode(context.rstrip()))
    first = min(first, len(whole) - bool(continuation.strip()))
    return whole[:first], whole[first:]


@torch.no_grad()
def log_likelihood(model, requests, progress=False):
    """[(ln p(continuation | <bos> context) in nats, whether every token of it is the likeliest)] of a list of requests, each two
    lists of ids; no pictures, but for a Chameleon's codes. Divided among the ranks: every one must call it. A context that is too long loses its beginning.
    Raises UserError for a continuation that is empty or does not fit in the model's context. eq. 1."""
    room = model.config.context - 1                     # beside <bos>
    if long := [len(answer) for _, answer in requests if len(answer) > room]:
        raise UserError(f"a continuation of {max(long)} tokens does not fit in this model's context of {room + 1}, with <bos>")
    if not all(answer for _, answer in requests):
        raise UserError("a continuation is empty: its probability would be 1, the highest there is")

    def work(part, _):
        rows = [(([BOS] + context[max(0, len(context) + len(answer) - room):] + answer), len(answer)) for context, answer in part]
        order, found = sorted(range(len(rows)), key=lambda k: -len(rows[k][0])), [None] * len(rows)
        bar = tqdm(total=len(rows), desc="reading", disable=not progress or distributed.rank() > 0, leave=False)
        while order:                                    # rows of like length together: little padding
            longest = len(rows[order[0]][0])
            now, order = order[: max(1, TOKENS_PER_FORWARD // longest)], order[max(1, TOKENS_PER_FORWARD // longest):]
            packed = [data.Sequence(tokens, [-1] * len(tokens), [k >= len(tokens) - n - 1 for k in range(len(tokens) - 1)] + [False])
                      for tokens, n in (rows[k] for k in now)]
            batch = data.to_batch([[row] for row in packed], longest).to(device_of(model))
            none = torch.zeros(0, *model.config.latent, device=batch.tokens.device)              # pictures: there are none,
            no_t = torch.zeros(0, dtype=torch.long, device=batch.tokens.device)                  # so no noise
            logits, _ = model(batch.tokens, batch.image_id, batch.doc_id, batch.has_loss, none, no_t)
            right = batch.tokens.roll(-1, 1)[batch.has_loss]
            nats = F.cross_entropy(logits.float(), right, reduction="none").split([rows[k][1] for k in now])
            greedy = (logits.argmax(-1) == right).split([rows[k][1] for k in now])
            for k, loss, same in zip(now, nats, greedy):
                found[k] = (-loss.double().sum().item(), bool(same.all()))
            bar.update(len(now))
        bar.close()
        return found
    return sum(distributed.split_work(work, requests), [])


def perplexity(trained, texts, progress=False):
    """{"perplexity", per token; "tokens"} of a list of texts."""
    room, ids = trained.model.config.context - 1, [trained.tokenizer.encode(text) for text in texts]
    pieces = [([], row[k: k + room]) for row in ids for k in range(0, len(row), room)]
    if not pieces:
        raise UserError("there is no text to read: all documents are empty")
    nats, tokens = -sum(found for found, _ in log_likelihood(trained.model, pieces, progress)), sum(map(len, ids))
    return {"perplexity": math.exp(nats / tokens), "tokens": tokens}


def ranked(trained, questions, progress=False):
    """{"acc", "acc_norm": share of questions whose right answer has the highest ln p, and the highest ln p per character; "n",
    "chance"}. questions: list of (context, answers, number of the right one); an answer follows its context after a space."""
    requests = [split(trained.tokenizer, context, " " + answer) for context, answers, _ in questions for answer in answers]
    scores, right, normed = iter(log_likelihood(trained.model, requests, progress)), 0, 0
    for _, answers, truth in questions:
        these = np.array([next(scores)[0] for _ in answers])
        right += these.argmax() == truth
        normed += (these / [len(answer) for answer in answers]).argmax() == truth
    return {"acc": right / len(questions), "acc_norm": normed / len(questions), "n": len(questions),
            "chance": float(np.mean([1 / len(answers) for _, answers, _ in questions]))}


def suite(trained, tasks=SUITE, **options):
    """lm-evaluation-harness' own results {task: its numbers}, 0-shot, of tasks that it knows by name, and their "mean", which the
    paper reports; it downloads their questions. options: as its simple_evaluate, e.g. limit, task_manager. Raises UserError if
    the library is not there, or does not know a task."""
    try:
        import lm_eval
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("the suite's tasks are lm-evaluation-harness': pip install lm-eval==0.4.13") from None

    class Judge(LM):                                    # here, because its base class is optional
        def loglikelihood(self, requests):
            return log_likelihood(trained.model, [split(trained.tokenizer, *request.args) for request in requests], progress=True)

        def loglikelihood_rolling(self, requests):
            raise UserError("for perplexity use `python likelihood.py perplexity`")

        def generate_until(self, requests):
            raise UserError("only tasks of ranked classification (multiple choice) can be asked here")
    manager = options.pop("task_manager", None) or TaskManager()
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"lm-evaluation-harness has no task {unknown[0]!r}: `lm_eval ls tasks` lists them")
    found = lm_eval.simple_evaluate(Judge(), tasks=list(tasks), num_fewshot=0, task_manager=manager, **options)["results"]
    return found | {"mean": {"acc": float(np.mean([row["acc,none"] for row in found.values()]))}}


# ------------------------------------------------------------------------------------------------------------ command line
def read_texts(names, n):
    """Up to n texts of .txt, one per line, .jsonl with {"text": ...}, folders of them, or of the word scenes, as `data.py pack`
    takes them."""
    texts, options = [], SimpleNamespace(world="one", scenes=n, image_size=32)
    for name in streams.find_sources("text", names, n):
        for _, read in streams.items_of("text", name, options):
            if len(texts) == n:
                return texts
            texts.append(read()[0])
    return texts


def read_questions(name, n, seed=0):
    """Up to n questions of a .jsonl, or, of the word scenes, two-choice deductions."""
    if name == "scenes":
        rng, found = np.random.default_rng([seed, 10]), []
        pairs = scenes.captions("color_attr")
        for k in range(n):
            (_, claim), rel = pairs[rng.integers(len(pairs))], list(scenes.RELATIONS)[rng.integers(4)]
            (context, right), (_, wrong) = (scenes.deduction_text(claim.objects, rel, turned).rsplit(" is ", 1) for turned in (False, True))
            found.append((f"{context} is", [[right, wrong], [wrong, right]][k % 2], k % 2))         # the first wins a tie
        return found
    wanted, questions = '{"context": ..., "choices": [at least two], "answer": number of the right one, from 0}', []
    for number, line in read_lines(Path(name), wanted)[:n]:
        try:
            entry = json.loads(line)
            context, choices, answer = entry["context"], entry["choices"], entry["answer"]
            assert isinstance(context, str) and len(choices) > 1 and all(isinstance(c, str) and c.strip() for c in choices) and \
                type(answer) is int and 0 <= answer < len(choices)
            questions.append((context, choices, answer))
        except (ValueError, KeyError, TypeError, AssertionError):
            raise UserError(f"{name} line {number} is not {wanted}: {line[:60]!r}") from None
    if not questions:
        raise UserError(f"{name} is empty: it must hold one {wanted} per line")
    return questions


def demo(trained):
    """Both answers to a few of the world's questions, and how probable the model finds them."""
    for context, answers, truth in read_questions("scenes", 3):
        found = log_likelihood(trained.model, [split(trained.tokenizer, context, " " + answer) for answer in answers])
        print(context, *(f"    ln p = {nats:7.2f}  {answer}{'   (the right one)' if k == truth else ''}"
                         for k, (answer, (nats, _)) in enumerate(zip(answers, found))), sep="\n")


def main(argv=None):
    """Judge a model by the texts that the command line names, and print the numbers."""
    parser = argparse.ArgumentParser(description="Text, judged by likelihood: perplexity; choices; the Llama suite of lm-evaluation-harness.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("perplexity", "choices", "suite"), help="how to judge; without it: a small example")
    parser.add_argument("names", nargs="*", help='perplexity: .txt (a document per line), .jsonl with {"text": ...}, folders of them, or the '
                                                 'word scenes; choices: one .jsonl, or the word scenes; suite: tasks of '
                                                 'lm-evaluation-harness, default: the paper\'s')
    parser.add_argument("--checkpoint", default=str(ASSETS / "scenes.pt"), help="a model.pt of train.py")
    parser.add_argument("--limit", type=int, help="at most so many documents, or questions (of a task); default: all, of scenes 1000")
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    if args.what in ("perplexity", "choices") and (not args.names or (args.what == "choices" and len(args.names) > 1)):
        raise UserError(f"say what to read: python likelihood.py {args.what} " + ("a.jsonl b.txt" if args.what == "perplexity" else "questions.jsonl"))
    if args.json and not Path(args.json).parent.is_dir():
        raise UserError(f"cannot write {args.json}: its folder does not exist")
    ranks = distributed.start()
    trained, most = load_trained(args.checkpoint, ranks.device), args.limit or (1000 if "scenes" in args.names else sys.maxsize)
    trained.model.to(ranks.dtype)
    if args.what is None:
        return demo(trained)
    if args.what == "perplexity":
        found = perplexity(trained, read_texts(args.names, most), progress=True)
    elif args.what == "choices":
        found = ranked(trained, read_questions(args.names[0], most), progress=True)
    else:
        found = suite(trained, args.names or SUITE, limit=args.limit)
    if distributed.rank() == 0:
        rows = found if args.what == "suite" else {" ".join(args.names): found}
        for name, row in rows.items():
            print(f"{name}: " + ", ".join(f"{k} {v:,}" if type(v) is int else f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, (int, float))))
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1, default=str))
    return found


if __name__ == "__main__":
    run_command(main)
