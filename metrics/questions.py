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
    activity = entry["activity_label"]
    first = entry["ctx_a"]
    second = entry["ctx_b"].capitalize()                # it breaks off, and an ending completes it
    context = clean(f"{activity}: {first} {second}")
    answers = [clean(ending) for ending in entry["endings"]]
    truth = int(entry["label"])
    return context, answers, truth


def clean(text):
    """A text of HellaSwag without the marks that WikiHow has left in it."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)                 # [step], [substeps]
    return text.replace("  ", " ")


def piqa(entry):
    """How does one reach a goal? From valid.jsonl, labels in valid-labels.lst."""
    context = f"Question: {entry['goal']}\nAnswer:"
    answers = [entry["sol1"], entry["sol2"]]
    truth = int(entry["label"])
    return context, answers, truth


def social_iqa(entry):
    """What do people feel or do? From dev.jsonl, labels 1 to 3 in dev-labels.lst."""
    context = f"Q: {entry['context']} {entry['question']}\nA:"
    answers = [entry["answerA"], entry["answerB"], entry["answerC"]]
    truth = int(entry["label"]) - 1                     # ours count from 0
    return context, answers, truth


def winogrande(entry):
    """To whom does the blank refer? From dev.jsonl. Two contexts, one continuation."""
    # TRAP: to rank the two options, as in other tasks, asks which name is likelier. What follows
    # the blank tells them apart. So that is what is scored, after each of the two names.
    before, after = entry["sentence"].split("_", 1)
    after = after.strip()
    contexts = [before + entry["option1"], before + entry["option2"]]
    truth = int(entry["answer"]) - 1
    return contexts, [after, after], truth


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
    context = f"Question: {question}\nAnswer:"
    return context, choices["text"], truth


def boolq(entry):
    """Yes or no, about a passage. From dev.jsonl, or val.jsonl of SuperGLUE."""
    # As it was published, or as SuperGLUE has it.
    truth = entry["answer"] if "answer" in entry else entry["label"]
    passage = entry["passage"]
    question = entry["question"]
    context = f"{passage}\nQuestion: {question}?\nAnswer:"
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
    labels = read_labels(Path(name), len(lines))        # of all lines, before some are left out
    numbered = list(zip(lines, labels, strict=True))
    questions = []
    for (number, line), label in numbered[:n]:
        try:
            questions.append(read_question(load_json(line), label))
        except (ValueError, KeyError, TypeError, AttributeError):
            where = f"{name} line {number}"
            start = line[:60]
            raise UserError(f"{where} is no {wanted} with its answer: {start!r}") from None
    if not questions:
        raise UserError(f"{name} is empty: it must hold one {wanted} per line")
    return questions


def read_labels(path, n):
    """The labels of n lines, from valid-labels.lst beside valid.jsonl; n times None without it."""
    beside = path.with_name(f"{path.stem}-labels.lst")
    if not beside.exists():
        return [None] * n
    labels = [line.strip() for _, line in read_lines(beside, "label")]
    found = len(labels)
    if found != n:
        raise UserError(f"{beside} has {found} labels, but {path} has {n} lines")
    return labels


def read_question(entry, label=None):
    """(context, answers, truth) of one line's dict. Raises ValueError, KeyError, TypeError or
    AttributeError if it is none."""
    # A label in the line itself counts more than one from the file beside it.
    if label is not None:
        entry = {"label": label, **entry}
    read = find_format(entry)
    context, answers, truth = read(entry)
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
    for answer in answers:
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError("an empty choice")

    # One context for all answers, or, as in WinoGrande, one for each.
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
        # A deduction that is true, and one whose second sentence has the wrong relation.
        _, claim = pairs[rng.integers(len(pairs))]
        relation = relations[rng.integers(len(relations))]
        text = scenes.deduction_text(claim.objects, relation)
        false_text = scenes.deduction_text(claim.objects, relation, wrong=True)

        # Both begin alike; what comes behind the last "is" is the answer.
        context, right = text.rsplit(" is ", 1)
        _, wrong = false_text.rsplit(" is ", 1)

        # In turn, the right one first and second: a model that cannot tell takes the first.
        truth = k % 2
        answers = [right, wrong] if truth == 0 else [wrong, right]
        questions.append((f"{context} is", answers, truth))
    return questions
