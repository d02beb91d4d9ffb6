"""
questions.py: questions with answers to choose from                 (Transfusion §4.1, App. B.1)

THE IDEA    The Llama suite is seven published sets of questions. Each has a file format of its own,
            and lm-evaluation-harness has a wording for each. Both stand here, so that a model can
            be asked from local files, without a network and without that library.
A PICTURE   {"goal": "to open a jar,", "sol1": "turn the lid", "sol2": "lick it"}       of PIQA
                |                                      its label 0 is in valid-labels.lst
                v
            ("Question: to open a jar,\\nAnswer:", ["turn the lid", "lick it"], 0)
THE RULE    A question is (context, answers, number of the right one). An answer follows its context
            after a space. WinoGrande is the other way round: each option makes a context of its
            own, and the rest of the sentence follows. There `context` is a list, one per answer.
PAPER/HERE  same: the seven tasks, 0-shot. Our choice: lm-evaluation-harness' wording.
            A test asks the same items of that library and of us: equal scores. Not run: the whole
            files (no network).
READ NEXT   likelihood.py, which ranks the answers
TRY IT      python -m metrics.likelihood choices hellaswag_val.jsonl winogrande/dev.jsonl
TEST        tests/test_questions.py
"""
import re
from pathlib import Path

import numpy as np

from sources import scenes
from support.common import UserError, load_json, read_lines

OURS = '{"context": ..., "choices": [at least two], "answer": number of the right one, from 0}'


# ------------------------------------------------------------------------- the seven, line by line
# Each of these turns one line's dict into a question. entry["label"] may come from a file of labels
# beside it. They raise ValueError, KeyError or TypeError for a line that is no question.
def hellaswag(entry):
    """How does the scene go on? From hellaswag_val.jsonl."""
    context = f"{entry['ctx_a']} {entry['ctx_b'].capitalize()}"
    answers = [clean(ending) for ending in entry["endings"]]
    return clean(f"{entry['activity_label']}: {context}"), answers, int(entry["label"])


def clean(text):
    """A text of HellaSwag without the marks that WikiHow has left in it."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)                 # [step], [substeps]
    return text.replace("  ", " ")


def piqa(entry):
    """How does one reach a goal? From valid.jsonl, labels in valid-labels.lst."""
    answers = [entry["sol1"], entry["sol2"]]
    return f"Question: {entry['goal']}\nAnswer:", answers, int(entry["label"])


def social_iqa(entry):
    """What do people feel or do? From dev.jsonl, labels 1 to 3 in dev-labels.lst."""
    answers = [entry["answerA"], entry["answerB"], entry["answerC"]]
    return f"Q: {entry['context']} {entry['question']}\nA:", answers, int(entry["label"]) - 1


def winogrande(entry):
    """To whom does the blank refer? From dev.jsonl. Two contexts, one continuation."""
    # TRAP: to rank the two options, as in other tasks, asks which name is likelier. What follows
    # the blank tells them apart. So that is what is scored, after each of the two names.
    before, after = entry["sentence"].split("_", 1)
    contexts = [before + entry["option1"], before + entry["option2"]]
    return contexts, [after.strip()] * 2, int(entry["answer"]) - 1


def arc(entry):
    """Science at school. From ARC-Easy-Test.jsonl and ARC-Challenge-Test.jsonl."""
    question = entry["question"]
    choices = entry.get("choices")                      # as the datasets library has it: two lists
    if isinstance(question, dict):                      # as it was published
        choices = {
            "text": [choice["text"] for choice in question["choices"]],
            "label": [choice["label"] for choice in question["choices"]],
        }
        question = question["stem"]
    # Some have the labels 1 to 4, most A to D.
    truth = choices["label"].index(entry["answerKey"])
    return f"Question: {question}\nAnswer:", choices["text"], truth


def boolq(entry):
    """Yes or no, about a passage. From dev.jsonl, or val.jsonl of SuperGLUE."""
    truth = entry["answer"] if "answer" in entry else entry["label"]
    context = f"{entry['passage']}\nQuestion: {entry['question']}?\nAnswer:"
    return context, ["no", "yes"], int(truth)


def ours(entry):
    """A question of your own, see OURS."""
    truth = entry["answer"]
    if type(truth) is not int:                          # True is an int, too
        raise TypeError("no number")
    return entry["context"], entry["choices"], truth


# What a line is, by the names in it; the first that fits.
FORMATS = {
    ("ctx_a", "ctx_b", "endings"): hellaswag,
    ("goal", "sol1", "sol2"): piqa,
    ("context", "question", "answerA", "answerB", "answerC"): social_iqa,
    ("sentence", "option1", "option2"): winogrande,
    ("question", "answerKey"): arc,
    ("question", "passage"): boolq,
    ("context", "choices", "answer"): ours,
}


# ----------------------------------------------------------------------------------- reading a file
def read_questions(name, n=None, seed=0):
    """Up to n questions of a .jsonl, or, for the word scenes, n of that world. Raises UserError,
    naming the line, for one that is no question."""
    if name == "scenes":
        return deduction_questions(n, seed)
    wanted = f"question of the Llama suite, or {OURS},"
    lines = read_lines(Path(name), wanted)
    labels = read_labels(Path(name), len(lines))
    questions = []
    for (number, line), label in list(zip(lines, labels, strict=True))[:n]:
        try:
            questions.append(read_question(load_json(line), label))
        except (ValueError, KeyError, TypeError, AttributeError):
            where = f"{name} line {number}"
            raise UserError(f"{where} is no {wanted} with its answer: {line[:60]!r}") from None
    if not questions:
        raise UserError(f"{name} is empty: it must hold one {wanted} per line")
    return questions


def read_labels(path, n):
    """The labels of n lines, from valid-labels.lst beside valid.jsonl; n times None without it."""
    beside = path.with_name(f"{path.stem}-labels.lst")
    if not beside.exists():
        return [None] * n
    labels = [line.strip() for _, line in read_lines(beside, "label")]
    if len(labels) != n:
        raise UserError(f"{beside} has {len(labels)} labels, but {path} has {n} lines")
    return labels


def read_question(entry, label=None):
    """(context, answers, truth) of one line's dict. Raises ValueError, KeyError, TypeError or
    AttributeError if it is none."""
    if label is not None:
        entry = {"label": label, **entry}
    context, answers, truth = find_format(entry)(entry)
    check_question(context, answers, truth)
    return context, answers, truth


def find_format(entry):
    """The function of FORMATS that reads a line's dict. Raises KeyError if there is none."""
    for names, read in FORMATS.items():
        if all(name in entry for name in names):
            return read
    raise KeyError("a format that is not known")


def check_question(context, answers, truth):
    """Raise ValueError for what cannot be ranked."""
    # Raised, not asserted: under PYTHONOPTIMIZE=1 an assert is not there.
    if not isinstance(answers, list) or len(answers) < 2:
        raise ValueError("no choice")
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError("an empty choice")
    contexts = context if isinstance(context, list) else [context]
    if not all(isinstance(text, str) for text in contexts):
        raise ValueError("no context")
    if not 0 <= truth < len(answers):
        raise ValueError("no such answer")


# ------------------------------------------------------------------------------- of our own world
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
