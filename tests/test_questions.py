"""
test_questions.py: is a published benchmark asked as its authors meant it?
                                              (metrics/questions.py; Transfusion §4.1, App. B.1)

THE IDEA    A benchmark is a set of items and a wording. One space or one label too few, and its
            numbers can be compared with nobody's.
COMPARED    with lm-evaluation-harness, where it is installed: its own task files, on the same
            items, in the form in which the datasets library would hand them over. The items are
            ours, two for each of the seven formats.
RUN IT      pytest -n 0 tests/test_questions.py
"""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from metrics import likelihood, questions
from sources import scenes
from support.common import UserError

# ------------------------------------------------------------------- two items of each of the seven
ARC = [
    {
        "id": "a1",
        "question": {
            "stem": "Which of these is a metal?",
            "choices": [
                {"text": "iron", "label": "A"},
                {"text": "a dry oak leaf", "label": "B"},
                {"text": "glass", "label": "C"},
            ],
        },
        "answerKey": "A",
    },
    {
        "id": "a2",
        "question": {
            "stem": "What does a plant need to grow?",
            "choices": [                                        # some have digits for letters
                {"text": "a hat", "label": "1"},
                {"text": "light and water", "label": "2"},
                {"text": "noise", "label": "3"},
                {"text": "a spoon", "label": "4"},
            ],
        },
        "answerKey": "2",
    },
]
SCENES = [
    {
        "ind": 1,
        "activity_label": "Making tea",
        "ctx_a": "[header] How to make tea [title] Boil some water.",
        "ctx_b": "a woman in red",
        "ctx": "not read",
        "endings": [
            "pours it over  the leaves.",
            "[step] sings to it.",
            "paints the kettle blue [substeps] twice.",
            "flies.",
        ],
        "label": 0,
    },
    {
        "ind": 2,
        "activity_label": "Rope skipping",
        "ctx_a": "A boy takes a rope.",
        "ctx_b": "",
        "ctx": "not read",
        "endings": [
            "he eats it.",
            "he jumps over it again and again.",
            "the rope is a house.",
            "a dog.",
        ],
        "label": 1,
    },
]
GOALS = [
    {"goal": "To open a jar,", "sol1": "turn the lid.", "sol2": "lick the lid for an hour."},
    {"goal": "To cool soup,", "sol1": "put it on the stove.", "sol2": "wait."},
]
FEELINGS = [
    {
        "context": "Ann lost her keys.",
        "question": "How would Ann feel?",
        "answerA": "annoyed",
        "answerB": "like a king",
        "answerC": "sleepy",
    },
    {
        "context": "Bo baked a cake.",
        "question": "Why did Bo do this?",
        "answerA": "to fix a car",
        "answerB": "to swim",
        "answerC": "for a birthday",
    },
]
BLANKS = [
    {
        "qID": "1",
        "sentence": "The cup did not fit into the box because _ was too big.",
        "option1": "the cup",
        "option2": "the box",
        "answer": "1",
    },
    {
        "qID": "2",
        "sentence": "_ paid, since Eva had no money.",
        "option1": "Eva",
        "option2": "Ulrike",
        "answer": "2",
    },
]
PASSAGES = [
    {
        "question": "is the sea salty",
        "title": "Sea",
        "answer": True,
        "passage": "The sea has salt in it.",
    },
    {
        "question": "can stones swim",
        "title": "Stone",
        "answer": False,
        "passage": "Most stones sink at once.",
    },
]


def with_labels(rows, labels):
    """The rows with a "label" each."""
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]


def flat(rows):
    """ARC as the datasets library has it: two lists in place of a list of choices."""
    flattened = []
    for row in rows:
        question = row["question"]
        choices = {
            "text": [choice["text"] for choice in question["choices"]],
            "label": [choice["label"] for choice in question["choices"]],
        }
        line = {"question": question["stem"], "answerKey": row["answerKey"], "choices": choices}
        flattened.append(line)
    return flattened


# {task: (its published file, that file's lines, the same as datasets has them, labels beside it)}
TASKS = {
    "hellaswag": ("hellaswag_val.jsonl", SCENES, with_labels(SCENES, ["0", "1"]), None),
    "piqa": ("valid.jsonl", GOALS, with_labels(GOALS, [0, 1]), ["0", "1"]),
    "social_iqa": ("dev.jsonl", FEELINGS, with_labels(FEELINGS, ["1", "3"]), ["1", "3"]),
    "winogrande": ("dev.jsonl", BLANKS, BLANKS, None),
    "arc_easy": ("ARC-Easy-Test.jsonl", ARC, flat(ARC), None),
    "arc_challenge": ("ARC-Challenge-Test.jsonl", ARC[1:], flat(ARC[1:]), None),
    "boolq": ("dev.jsonl", PASSAGES, with_labels(PASSAGES, [1, 0]), None),
}


def write_lines(path, rows):
    """A JSON-lines file; its name."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    """{task: name of its published file}, each in a folder of its own."""
    names = {}
    for task, (name, rows, _, labels) in TASKS.items():
        names[task] = write_lines(tmp_path / task / name, rows)
        if labels:
            beside = tmp_path / task / name.replace(".jsonl", "-labels.lst")
            beside.write_text("\n".join(labels) + "\n", encoding="utf-8")
    return names


class Letters:
    """A tokenizer of single letters, for a vocabulary of 16."""

    def encode(self, text):
        return [7 + ord(letter) % 9 for letter in text]


@pytest.fixture
def trained(make_model):
    """A random model that reads any letter. It prefers some texts to others, for no reason: a test
    of the wording needs no more."""
    model = make_model(context=128).requires_grad_(False)
    return SimpleNamespace(model=model, tokenizer=Letters())


# ------------------------------------------------------------------------------ the seven published
def test_the_seven_formats(files):
    """Catches a wrong label (PIQA counts from 0, SIQA and WinoGrande from 1), an answer that is
    ranked where what follows it should be, and a wording of our own."""
    asked = {task: questions.read_questions(name) for task, name in files.items()}
    assert set(asked) == set(likelihood.SUITE)

    context, endings, _ = asked["hellaswag"][0]
    assert context == "Making tea: How to make tea. Boil some water. A woman in red"
    assert endings[:3] == [
        "pours it over the leaves.",
        " sings to it.",
        "paints the kettle blue twice.",
    ]

    solutions = ["put it on the stove.", "wait."]
    assert asked["piqa"][1] == ("Question: To cool soup,\nAnswer:", solutions, 1)

    reasons = ["to fix a car", "to swim", "for a birthday"]
    wording = "Q: Bo baked a cake. Why did Bo do this?\nA:"
    assert asked["social_iqa"][1] == (wording, reasons, 2)

    before = "The cup did not fit into the box because "
    contexts = [before + "the cup", before + "the box"]
    assert asked["winogrande"][0] == (contexts, ["was too big."] * 2, 0)
    entry = {"sentence": "_ wrote a_b.", "option1": "Eva", "option2": "Bo", "answer": "1"}
    later = questions.winogrande(entry)
    assert later == (["Eva", "Bo"], ["wrote a_b."] * 2, 0)      # the first _ is the blank

    choices = ["a hat", "light and water", "noise", "a spoon"]
    wording = "Question: What does a plant need to grow?\nAnswer:"
    assert asked["arc_challenge"] == [(wording, choices, 1)]

    wording = "The sea has salt in it.\nQuestion: is the sea salty?\nAnswer:"
    assert asked["boolq"][0] == (wording, ["no", "yes"], 1)
    assert questions.read_questions(files["boolq"], 1) == asked["boolq"][:1]


# Where the library keeps its task files.
THEIRS = {
    "hellaswag": "hellaswag/hellaswag",
    "piqa": "piqa/piqa",
    "social_iqa": "siqa/siqa",
    "winogrande": "winogrande/default",
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
    "boolq": "super_glue/boolq/default",
}
# The same for a file of our own format.
OURS = """\
output_type: multiple_choice
doc_to_text: '{{context}}'
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def random_questions(n):
    """n lines of our own format, of random letters: many enough that accuracies can differ."""
    g = torch.Generator().manual_seed(1)

    def number(least, most):
        return int(torch.randint(least, most, (1,), generator=g))

    def text(most):
        letters = torch.randint(9, (number(1, most),), generator=g)
        return " ".join("abcdefghi"[int(k)] for k in letters)

    lines = []
    for _ in range(n):
        context = text(8)
        choices = [text(5) for _ in range(4)]
        lines.append({"context": context, "choices": choices, "answer": number(0, 4)})
    return lines


def task_file(lm_eval, task, data_file, cache):
    """A task of the library that reads a local file, as .yaml."""
    start = OURS
    if task in THEIRS:
        start = f"include: {Path(lm_eval.__file__).parent}/tasks/{THEIRS[task]}.yaml\n"
    return (
        f"{start}task: my_{task}\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{validation: {data_file}}}, cache_dir: {cache}}}\n"
        "training_split: null\ntest_split: null\nvalidation_split: validation\n"
    )


def test_scores_are_lm_evaluation_harness(trained, files, tmp_path, monkeypatch):
    """The library's own seven task files, on local items, and a task of the user's own. The model
    is asked the same, word for word. The accuracy is the same, also per character. Catches one
    space, one label, one letter of the wording."""
    asked = []
    score = likelihood.log_likelihood

    def listen(model, requests, progress):
        asked.extend(requests)
        return score(model, requests, progress)

    monkeypatch.setattr(likelihood, "log_likelihood", listen)
    lm_eval = pytest.importorskip("lm_eval")

    # 1. The items as datasets has them. We read either form, and it says the same.
    place = tmp_path / "theirs"
    local = {}
    for task, (_, _, rows, _) in TASKS.items():
        local[task] = write_lines(place / f"{task}.jsonl", rows)
    local["ours"] = write_lines(place / "ours.jsonl", random_questions(30))
    files["ours"] = local["ours"]
    for task, name in local.items():
        text = task_file(lm_eval, task, name, tmp_path / "cache")
        (place / f"my_{task}.yaml").write_text(text, encoding="utf-8")
        assert questions.read_questions(name) == questions.read_questions(files[task])

    # 2. The library asks, then we ask.
    tasks = [f"my_{task}" for task in local]
    theirs = likelihood.suite(trained, tasks, include_path=str(place), bootstrap_iters=0)
    they_asked = sorted(asked)
    asked.clear()
    ours = likelihood.rank_files(trained, list(files.values()))
    assert sorted(asked) == they_asked
    assert len(asked) > 120

    # 3. The same accuracies; not every task of theirs has one per character.
    for task, name in files.items():
        row = theirs[f"my_{task}"]
        assert ours[name]["acc"] == row["acc,none"], task
        assert ours[name]["acc_norm"] == row.get("acc_norm,none", ours[name]["acc_norm"]), task
    assert ours["mean"]["acc"] == pytest.approx(theirs["mean"]["acc"])
    assert 0 < ours["mean"]["acc"] < 1

    # 4. There was something to compare: our task is neither all right nor all wrong.
    own = ours[files["ours"]]
    assert 0.05 < own["acc"] < 0.9
    assert own["acc"] != own["acc_norm"]


# ------------------------------------------------------------------------------ what is no question
@pytest.mark.parametrize("task, change", [
    ("piqa", {"label": 2}),
    ("hellaswag", {"label": ""}),
    ("winogrande", {"sentence": "no blank"}),
    ("winogrande", {"answer": ""}),
    ("arc_easy", {"answerKey": "E"}),
    ("boolq", {"passage": 3, "answer": "no"}),
    ("hellaswag", {"ctx_b": None}),
    ("winogrande", {"sentence": "ends in _"}),
    ("piqa", {"sol2": ""}),
    ("social_iqa", {"label": 0}),
], ids=str)
def test_lines_that_are_no_question(tmp_path, task, change):
    """Catches a traceback, and a test split, whose answers are not published, that is taken for one
    with answers."""
    _, _, rows, _ = TASKS[task]
    first, second = rows
    name = write_lines(tmp_path / "q.jsonl", [first, second | change])
    with pytest.raises(UserError, match="q.jsonl line 2 is no .*answer"):
        questions.read_questions(name)


def test_labels_of_another_file(files, tmp_path):
    """Catches labels that are moved by a line, or missing."""
    beside = tmp_path / "piqa/valid-labels.lst"
    beside.write_text("0\n1\n0\n", encoding="utf-8")
    with pytest.raises(UserError, match="valid-labels.lst has 3 labels, but .* 2 lines"):
        questions.read_questions(files["piqa"])

    beside.unlink()
    with pytest.raises(UserError, match="valid.jsonl line 1 is no"):
        questions.read_questions(files["piqa"])


@pytest.mark.parametrize("line", [
    "",
    "{}",
    "[]",
    "[" * 100000,                                               # deeper than a parser can follow
    '{"context": "a", "choices": ["b"], "answer": 0}',
    '{"context": "a", "choices": "bc", "answer": 0}',
    '{"context": "a", "choices": ["b", "c"], "answer": 2}',
    '{"context": "a", "choices": ["b", "c"], "answer": -1}',
    '{"context": "a", "choices": ["b", "c"], "answer": true}',
    '{"context": "a", "choices": ["b", "  "], "answer": 0}',
    '{"context": "a", "choices": ["b", ""], "answer": 0}',
], ids=lambda line: line[:60])
def test_questions_that_are_none(tmp_path, line):
    """Catches a traceback, and an answer that does not exist and counts as a wrong one."""
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(UserError, match="q.jsonl.*answer"):
        questions.read_questions(str(tmp_path / "q.jsonl"), 9)


# ------------------------------------------------------------------------------- of our own world
def test_the_worlds_questions_have_one_right_answer():
    """Catches a right answer that always stands first, for a model that cannot tell would win every
    tie; and two answers that are the same."""
    asked = questions.read_questions("scenes", 40)
    for context, answers, truth in asked:
        texts = [f"{context} {answer}" for answer in answers]
        caption, *_ = texts[truth].split(" .")
        claim = scenes.read_caption(caption.replace(" is ", " "))
        right = scenes.deduction_text(claim.objects, claim.relation)
        wrong = scenes.deduction_text(claim.objects, claim.relation, wrong=True)
        assert texts[truth] == right
        assert texts[1 - truth] == wrong
        assert len(set(texts)) == 2

    assert {truth for *_, truth in asked} == {0, 1}
    assert asked == questions.read_questions("scenes", 40)
