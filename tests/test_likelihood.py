"""
test_likelihood.py: is text judged by its probability, and by nothing else?
                                             (metrics/likelihood.py; Transfusion §4.1, App. B.1)

THE IDEA    The program packs many requests into one forward, with padding, sorted by length, and
            cut where they are too long. None of it may change a number.
COMPARED    with the slow way, which is one forward per token and a softmax (`slowly`), and with
            lm-evaluation-harness, where it is installed.
RUN IT      pytest -n 0 tests/test_likelihood.py
"""
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
from data import BOS
from metrics import likelihood
from support.common import UserError

WORDS = data.Words("a b c d e f g h i".split())         # V = 16, as make_model has it
HOME = Path(__file__).resolve().parents[1]


@pytest.fixture
def trained(make_model):
    """A random model whose context is 20 tokens: <bos> and 19 more."""
    model = make_model(context=20).requires_grad_(False)
    return SimpleNamespace(model=model, tokenizer=WORDS)


# ------------------------------------------------------------------------------------- likelihood
def some_requests(n, longest, seed=0):
    """n requests of random ids, of many lengths: [(context, answer)]. A context may be empty."""
    g = torch.Generator().manual_seed(seed)

    def ids(least):
        n = int(torch.randint(least, longest, (1,), generator=g))
        return torch.randint(len(data.SPECIAL), 16, (n,), generator=g).tolist()

    return [(ids(0), ids(1)) for _ in range(n)]


def slowly(trained, context, answer):
    """ln p of an answer, token by token, each by a forward of its own."""
    nats = 0.0
    tokens = [BOS] + context
    no_pictures = torch.zeros(0, 4, 4, 4)
    no_t = torch.zeros(0, dtype=torch.long)
    for token in answer:
        row = torch.tensor([tokens])                            # (1, T)
        no_image = torch.full_like(row, -1)
        one_document = torch.zeros_like(row)
        has_loss = torch.zeros_like(row, dtype=torch.bool)
        has_loss[0, -1] = True                                  # only the last position answers
        logits, _ = trained.model(row, no_image, one_document, has_loss, no_pictures, no_t)
        nats += float(logits[0].log_softmax(-1)[token])         # logits (1, V)
        tokens.append(token)
    return nats


@pytest.mark.parametrize("together", [1, 40, 8192])
def test_log_likelihood_is_the_slow_one(trained, monkeypatch, together):
    """Catches scores that are one position off, or a neighbour's in the batch, or in the order of
    their lengths, or that count padding."""
    monkeypatch.setattr(likelihood, "TOKENS_PER_FORWARD", together)
    requests = some_requests(13, 9)
    wanted = [slowly(trained, *request) for request in requests]
    results = likelihood.log_likelihood(trained.model, requests)
    assert [nats for nats, _ in results] == pytest.approx(wanted, abs=1e-4)


def test_the_next_token_is_one_of_all(trained):
    """The probabilities of all continuations by one token add up to 1. Catches a softmax over
    anything but the vocabulary."""
    requests = [([8, 9], [token]) for token in range(16)]
    results = likelihood.log_likelihood(trained.model, requests)
    assert sum(math.exp(nats) for nats, _ in results) == pytest.approx(1, abs=1e-5)
    assert sum(greedy for _, greedy in results) == 1
    _, greedy = max(results)
    assert greedy                                               # it is the likeliest one


def test_a_long_context_loses_its_beginning(trained):
    """Catches a context that loses its end, or pushes <bos> out; and an answer that is cut where it
    should be refused."""
    ids, _ = some_requests(1, 99, seed=3)[0]
    context = (ids * 9)[:40]
    answer = [7, 8, 9]
    nats, _ = likelihood.log_likelihood(trained.model, [(context, answer)])[0]
    # Beside <bos> and the answer there is room for 16.
    assert nats == pytest.approx(slowly(trained, context[-16:], answer), abs=1e-4)

    nats, _ = likelihood.log_likelihood(trained.model, [([], [7] * 19)])[0]     # just fits
    assert nats == pytest.approx(slowly(trained, [], [7] * 19), abs=1e-4)

    with pytest.raises(UserError, match="a continuation is empty"):
        likelihood.log_likelihood(trained.model, [([8], [9]), ([8], [])])
    with pytest.raises(UserError, match="continuation of 20 tokens.*context of 20"):
        likelihood.log_likelihood(trained.model, [([], [7] * 20)])


# ------------------------------------------------------------------------------------- perplexity
@pytest.mark.parametrize("stride, contexts", [(None, 10), (19, 0), (1, 18), (7, 12)])
def test_perplexity(trained, stride, contexts):
    """Perplexity is the mean over all tokens, and each is predicted once. Those of a text that is
    longer than the context follow at least `contexts` others. A model that knows nothing has
    perplexity V, whatever the text. Catches a mean of means, a token between two windows that is
    lost or counted twice, and a long text that is cut into independent pieces."""
    texts = ["a b c", "", "a c i g d f " * 8 + "b", "d"]        # 3 + 0 + 49 + 1 tokens
    found = likelihood.perplexity(trained, texts, stride=stride)

    nats = 0.0
    step = stride or 9                                          # None: half the window of 19
    for ids in map(WORDS.encode, texts):
        nats -= slowly(trained, [], ids[:19])
        for k in range(19, len(ids), step):
            nats -= slowly(trained, ids[k - contexts: k], ids[k: k + step])
    assert found["tokens"] == 53
    assert math.log(found["perplexity"]) == pytest.approx(nats / 53, abs=1e-4)

    trained.model.head.weight.zero_()                           # it knows nothing: all logits are 0
    found = likelihood.perplexity(trained, texts, stride=stride)
    assert found["perplexity"] == pytest.approx(16, rel=1e-5)

    with pytest.raises(UserError, match="empty"):
        likelihood.perplexity(trained, ["", " "])
    with pytest.raises(UserError, match="--stride 20 is longer than this model's window of 19"):
        likelihood.perplexity(trained, texts, stride=20)


def test_perplexity_per_word_and_byte(trained):
    """Models of different tokenizers are compared per word and per byte. Catches letters that are
    counted for bytes, tokens for words, and bits for nats."""
    class Letters:
        def encode(self, text):
            return [7 + ord(letter) % 9 for letter in text]

    trained.tokenizer = Letters()
    trained.model.head.weight.zero_()                   # ln 16 nats, 4 bits, for each letter
    found = likelihood.perplexity(trained, ["äb c", "dd"])
    assert (found["tokens"], found["words"], found["bytes"]) == (6, 3, 7)       # ä has two bytes
    assert found["bits_per_byte"] == pytest.approx(4 * 6 / 7)
    assert found["word_perplexity"] == pytest.approx(16 ** 2)                   # 6 letters, 3 words

    # One word of 2,000 letters: exp() of its nats is more than a float can hold.
    endless = likelihood.perplexity(trained, ["x" * 2000])
    assert endless["word_perplexity"] == math.inf


def test_perplexity_of_so_many_tokens(trained):
    """§4.1: "on 20M held-out tokens". Catches a limit that cuts nothing, or counts texts, or reads
    the whole corpus first."""
    def corpus():
        for _ in range(3):
            yield "a b c d"
        pytest.fail("read further than it needs to")

    for tokens, wanted in ((1, 4), (4, 4), (5, 8), (9, 12)):    # always whole texts, of 4 tokens
        found = likelihood.perplexity(trained, corpus(), tokens=tokens)
        assert found["tokens"] == wanted


# ---------------------------------------------------------------------------------- cutting a text
class Joining:
    """A tokenizer of pieces. It joins a space and the letter after it, and also " b c", to one."""
    PIECES = (" b c", " b", " c", "b", "c", "a", " ")           # a piece's id is its place here

    def encode(self, text):
        ids = []
        k = 0
        while k < len(text):
            piece = next(piece for piece in self.PIECES if text.startswith(piece, k))
            ids.append(self.PIECES.index(piece))
            k += len(piece)
        return ids


def test_split_where_the_context_ends():
    """Catches a continuation that is encoded alone: its first piece would be one that never follows
    its context."""
    assert likelihood.split(Joining(), "a", " b c") == ([5], [0])
    # Spaces at the end of a context belong to what follows.
    assert likelihood.split(Joining(), "a  ", "b") == ([5], [6, 1])
    # "a b" + " c" is "a" and " b c": nothing is left to score, so the joined piece is scored.
    assert likelihood.split(Joining(), "a b", " c") == ([5], [0])
    assert likelihood.split(Joining(), "a c", " b") == ([5, 2], [1])
    # Of whole words nothing is joined; capitals become small.
    assert likelihood.split(WORDS, "A b", " C") == (WORDS.encode("a b"), WORDS.encode("c"))


def test_split_is_lm_evaluation_harness():
    """We cut as the library cuts. There is one difference: where a piece reaches over the cut, the
    library scores nothing or loses a piece, and we score that piece."""
    TemplateLM = pytest.importorskip("lm_eval.api.model").TemplateLM
    # A model of the library of which only the cutting is used: its other methods are not there.
    nothing = {name: None for name in TemplateLM.__abstractmethods__}
    theirs = type("Theirs", (TemplateLM,), nothing)()
    theirs.backend = "causal"

    def encode(text, **_):
        return Joining().encode(text)

    theirs.tok_encode = encode

    same = 0
    for context in ("a", "a b", "a ", "b c", "a c  "):
        for answer in (" b", "b", " b c", "c", " c b"):
            before, after = theirs._encode_pair(context, answer)
            if after and before + after == Joining().encode(context + answer):
                same += 1
                ours = likelihood.split(Joining(), context, answer)
                assert ours == (before, after), (context, answer)
    assert same > 15                                            # of 25


# ------------------------------------------------------------------------------- choosing an answer
def test_ranked(trained, monkeypatch):
    """Catches answers that are ranked across questions, the lowest taken for the best, and the sum
    given for the mean per character, or the other way round."""
    scores = {" a": -1.0, " b": -2.0, " a a a": -2.4, " c": -0.5, " d d": -1.4}

    def split(tokenizer, context, answer):
        return context, answer

    def log_likelihood(model, requests, progress):
        return [(scores[answer], False) for _, answer in requests]

    monkeypatch.setattr(likelihood, "split", split)
    monkeypatch.setattr(likelihood, "log_likelihood", log_likelihood)
    questions = [
        ("x", ["a", "b"], 0),           # sum: a.           per character: a
        ("y", ["b", "a a a", "a"], 2),  # sum: a.           per character: "a a a" (-0.48), wrong
        ("z", ["c", "d d"], 1),         # sum: c, wrong.    per character: "d d" (-0.47)
    ]
    assert likelihood.ranked(trained, questions) == {
        "acc": pytest.approx(2 / 3),
        "acc_norm": pytest.approx(2 / 3),
        "n": 3,
        "chance": pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3),
    }
    assert likelihood.ranked(trained, questions[1:2])["acc_norm"] == 0
    assert likelihood.ranked(trained, questions[2:])["acc"] == 0


def test_a_broken_model_says_so(trained):
    """Catches a model whose weights are NaN or inf and that counts as right wherever the right
    answer stands first."""
    for bad in (math.nan, math.inf):
        trained.model.head.weight[3] = bad
        with pytest.raises(UserError, match="not finite"):
            likelihood.ranked(trained, [("a b", ["c", "d"], 0)])
        with pytest.raises(UserError, match="not finite"):
            likelihood.perplexity(trained, ["a b c"])


# -------------------------------------------------------------------------------- the command line
def test_the_command_line_on_a_shipped_model(tmp_path, capsys):
    """Catches what stand-ins hide, numbers that are printed and not written, and a file that is
    never read."""
    text = tmp_path / "one.txt"
    text.write_text("a red circle\na circle\n")
    numbers = tmp_path / "numbers.json"

    # One document of the scenes has 18 words, or 20; the first line of the file has three.
    for names, tokens in ((["scenes"], 19), (["scenes", str(text)], 22)):
        line = ["perplexity", *names, "--limit", "1", "--json", str(numbers)]
        found = likelihood.main(line)
        assert json.loads(numbers.read_text()) == found
        assert 1 < found["perplexity"] < 5
        assert found["tokens"] == pytest.approx(tokens, abs=1)
        assert f"tokens {found['tokens']}" in capsys.readouterr().out

    found = likelihood.main(["perplexity", "scenes", "--tokens", "100", "--stride", "20"])
    assert 100 <= found["tokens"] < 120                         # it stops after a whole document
    assert "bits_per_byte" in capsys.readouterr().out

    found = likelihood.main(["choices", "scenes", "--limit", "6", "--json", str(numbers)])
    assert json.loads(numbers.read_text()) == found
    assert found == {"acc": 1, "acc_norm": 1, "n": 6, "chance": 0.5}

    likelihood.main([])
    assert "(the right one)" in capsys.readouterr().out


def test_two_processes_are_one(tmp_path):
    """The command line, alone and on two ranks, from another folder. Catches requests that only one
    rank answers, answers in another order, and a program that must be started where it lies."""
    line = ["-m", "metrics.likelihood", "choices", "scenes", "--limit", "9", "--json"]
    two_ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME)}

    def start(*words):
        subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, check=True, timeout=300)

    start(*line, tmp_path / "one.json")
    start(*two_ranks, *line, tmp_path / "two.json")
    one = json.loads((tmp_path / "one.json").read_text())
    two = json.loads((tmp_path / "two.json").read_text())
    assert one == two
    assert one["acc"] == 1                                      # the shipped model knows them
    assert one["n"] == 9


def test_texts_of_files(tmp_path):
    """Catches empty lines that are counted, a file that is read to its end where n texts were
    wanted, and a file that is never read because the name before it has used up the limit."""
    a = str(tmp_path / "a.jsonl")
    b = str(tmp_path / "b.txt")
    Path(a).write_text('{"text": "a b"}\n\n{"text": "c"}\n')
    Path(b).write_text("d e\nf\nbad \xff", encoding="latin-1")  # its third line is not UTF-8

    assert [*likelihood.read_texts([a, b], 2)] == ["a b", "c", "d e", "f"]
    assert [*likelihood.read_texts([a, a])] == ["a b", "c"] * 2
    five = [*likelihood.read_texts(["scenes"], 5)]
    assert five == [*likelihood.read_texts(["scenes"], 9)][:5]
    with pytest.raises(UserError, match="b.txt line 3"):
        list(likelihood.read_texts([b], 3))

    for limit, scenes_first in ((5, 5), (None, 1000)):
        texts = list(likelihood.read_texts(["scenes", a], limit))
        assert len(texts) == scenes_first + 2
        assert texts[-2:] == ["a b", "c"]


def test_a_suite_without_names_is_the_papers(monkeypatch, capsys):
    """Catches tasks that were named and not asked, and a suite of none."""
    asked = []

    def suite(trained, tasks, **_):
        asked.append(tasks)
        return {"acc": 0.5}

    monkeypatch.setattr(likelihood, "suite", suite)
    likelihood.main(["suite"])
    likelihood.main(["suite", "my_task"])
    assert asked == [likelihood.SUITE, ["my_task"]]
    assert "my_task: acc 0.5" in capsys.readouterr().out
