"""
test_likelihood.py: is text judged by its probability, and by nothing else?       (metrics/likelihood.py; Transfusion App. B.1)

The slow way is one forward per request and a softmax; the reference is lm-evaluation-harness, where it is installed.
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
    """A random model whose context is 20 tokens."""
    return SimpleNamespace(model=make_model(context=20).requires_grad_(False), tokenizer=WORDS)


def some_requests(n, longest, seed=0):
    """n requests of random ids, of many lengths."""
    g = torch.Generator().manual_seed(seed)

    def ids(least):
        n = int(torch.randint(least, longest, (1,), generator=g))
        return torch.randint(len(data.SPECIAL), 16, (n,), generator=g).tolist()

    return [(ids(0), ids(1)) for _ in range(n)]


def slowly(trained, context, answer):
    """ln p of an answer, token by token, each by a forward of its own."""
    nats, tokens = 0.0, [BOS] + context
    for token in answer:
        row = torch.tensor([tokens])
        has_loss = torch.zeros_like(row, dtype=torch.bool)
        has_loss[0, -1] = True
        logits, _ = trained.model(row, torch.full_like(row, -1), torch.zeros_like(row), has_loss, torch.zeros(0, 4, 4, 4), torch.zeros(0, dtype=torch.long))
        nats, tokens = nats + float(logits[0].log_softmax(-1)[token]), tokens + [token]
    return nats


@pytest.mark.parametrize("together", [1, 40, 8192])
def test_log_likelihood_is_the_slow_one(trained, monkeypatch, together):
    """Catches scores one position off, of a neighbour in the batch, in the order of their lengths, or with padding counted."""
    monkeypatch.setattr(likelihood, "TOKENS_PER_FORWARD", together)
    requests = some_requests(13, 9)
    found = likelihood.log_likelihood(trained.model, requests)
    assert [nats for nats, _ in found] == pytest.approx([slowly(trained, *request) for request in requests], abs=1e-4)


def test_the_next_token_is_one_of_all(trained):
    """Catches a softmax over anything but the vocabulary: the probabilities of all continuations of one token add up to 1."""
    found = likelihood.log_likelihood(trained.model, [([8, 9], [token]) for token in range(16)])
    assert sum(math.exp(nats) for nats, _ in found) == pytest.approx(1, abs=1e-5)
    assert sum(greedy for _, greedy in found) == 1 and max(found)[1]    # the likeliest is the greedy one


def test_a_long_context_loses_its_beginning(trained):
    """Catches one that loses its end, or pushes <bos> out; and an answer that is cut instead of refused."""
    context, answer = (some_requests(1, 99, seed=3)[0][0] * 9)[:40], [7, 8, 9]
    assert likelihood.log_likelihood(trained.model, [(context, answer)])[0][0] == pytest.approx(slowly(trained, context[-16:], answer), abs=1e-4)
    assert likelihood.log_likelihood(trained.model, [([], [7] * 19)])[0][0] == pytest.approx(slowly(trained, [], [7] * 19), abs=1e-4)
    with pytest.raises(UserError, match="a continuation is empty"):
        likelihood.log_likelihood(trained.model, [([8], [9]), ([8], [])])
    with pytest.raises(UserError, match="continuation of 20 tokens.*context of 20"):
        likelihood.log_likelihood(trained.model, [([], [7] * 20)])


@pytest.mark.parametrize("stride, contexts", [(None, 10), (19, 0), (1, 18), (7, 12)])
def test_perplexity(trained, stride, contexts):
    """Of a model that knows nothing: V, whatever the text. Of any: the mean over all tokens, each predicted once, also those of
    a text longer than the context, which follow at least `contexts` others. Catches a mean of means, a token between two
    windows that is lost or counted twice, and a long text that is cut into independent pieces."""
    texts = ["a b c", "", "a c i g d f " * 8 + "b", "d"]
    found = likelihood.perplexity(trained, texts, stride=stride)
    nats, step = 0.0, stride or 9
    for ids in map(WORDS.encode, texts):
        nats -= slowly(trained, [], ids[:19])
        for k in range(19, len(ids), step):
            nats -= slowly(trained, ids[k - contexts: k], ids[k: k + step])
    assert found["tokens"] == 53 and math.log(found["perplexity"]) == pytest.approx(nats / 53, abs=1e-4)
    trained.model.head.weight.zero_()
    found = likelihood.perplexity(trained, texts, stride=stride)
    assert found["perplexity"] == pytest.approx(16, rel=1e-5)
    with pytest.raises(UserError, match="empty"):
        likelihood.perplexity(trained, ["", " "])
    with pytest.raises(UserError, match="--stride 20 is longer than this model's window of 19"):
        likelihood.perplexity(trained, texts, stride=20)


def test_perplexity_per_word_and_byte(trained):
    """What models of different tokenizers are compared by. Catches letters for bytes, tokens for words, bits for nats."""
    class Letters:
        def encode(self, text):
            return [7 + ord(letter) % 9 for letter in text]
    trained.tokenizer = Letters()
    trained.model.head.weight.zero_()                   # ln 16 nats, 4 bits, for each letter
    found = likelihood.perplexity(trained, ["äb c", "dd"])
    assert (found["tokens"], found["words"], found["bytes"]) == (6, 3, 7)
    assert found["bits_per_byte"] == pytest.approx(4 * 6 / 7) and found["word_perplexity"] == pytest.approx(16 ** 2)
    assert likelihood.perplexity(trained, ["x" * 2000])["word_perplexity"] == math.inf


def test_perplexity_of_so_many_tokens(trained):
    """§4.1, "on 20M held-out tokens". Catches a limit that cuts nothing, counts texts, or reads the whole corpus first."""
    def corpus():
        for _ in range(3):
            yield "a b c d"
        pytest.fail("read further than it needs to")
    for tokens, wanted in ((1, 4), (4, 4), (5, 8), (9, 12)):
        assert likelihood.perplexity(trained, corpus(), tokens=tokens)["tokens"] == wanted


class Joining:
    """A tokenizer of pieces that joins a space and the letter after it, and "b c" to one."""

    def encode(self, text):
        ids, k = [], 0
        while k < len(text):
            piece = next(p for p in (" b c", " b", " c", "b", "c", "a", " ") if text.startswith(p, k))
            ids, k = ids + [[" b c", " b", " c", "b", "c", "a", " "].index(piece)], k + len(piece)
        return ids


def test_split_where_the_context_ends():
    """Catches a continuation that is encoded alone: its first piece would be one that never follows its context."""
    assert likelihood.split(Joining(), "a", " b c") == ([5], [0])
    assert likelihood.split(Joining(), "a  ", "b") == ([5], [6, 1])     # the spaces belong to what follows
    assert likelihood.split(Joining(), "a b", " c") == ([5], [0])       # nothing left to score: the joined piece
    assert likelihood.split(Joining(), "a c", " b") == ([5, 2], [1])
    assert likelihood.split(WORDS, "A b", " C") == (WORDS.encode("a b"), WORDS.encode("c"))          # whole words: lower case


def test_split_is_lm_evaluation_harness():
    """As the library cuts; but where a piece reaches over the cut, it scores nothing or loses a piece, and we score that piece."""
    TemplateLM = pytest.importorskip("lm_eval.api.model").TemplateLM
    theirs = type("Theirs", (TemplateLM,), {name: None for name in TemplateLM.__abstractmethods__})()
    theirs.tok_encode, theirs.backend = lambda text, **_: Joining().encode(text), "causal"
    same = 0
    for context in ("a", "a b", "a ", "b c", "a c  "):
        for answer in (" b", "b", " b c", "c", " c b"):
            before, after = theirs._encode_pair(context, answer)
            if after and before + after == Joining().encode(context + answer):
                same += 1
                assert likelihood.split(Joining(), context, answer) == (before, after), (context, answer)
    assert same > 15


def test_ranked(trained, monkeypatch):
    """Catches answers ranked across questions, the lowest taken, or the sum and the mean per character given for one another."""
    scores = {" a": -1.0, " b": -2.0, " a a a": -2.4, " c": -0.5, " d d": -1.4}
    monkeypatch.setattr(likelihood, "split", lambda tokenizer, context, answer: (context, answer))
    monkeypatch.setattr(likelihood, "log_likelihood", lambda model, requests, progress: [(scores[a], False) for _, a in requests])
    questions = [("x", ["a", "b"], 0), ("y", ["b", "a a a", "a"], 2), ("z", ["c", "d d"], 1)]
    # sums: a; a; c (wrong). Per character: a; "a a a" (-0.48 against -2 and -1: wrong); "d d" (-0.47 against -0.5)
    assert likelihood.ranked(trained, questions) == {"acc": pytest.approx(2 / 3), "acc_norm": pytest.approx(2 / 3), "n": 3,
                                                 "chance": pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)}
    assert likelihood.ranked(trained, questions[1:2])["acc_norm"] == 0 and likelihood.ranked(trained, questions[2:])["acc"] == 0


def test_a_broken_model_says_so(trained):
    """Catches weights that are NaN or inf taken for a model that is right wherever the right answer stands first."""
    for bad in (math.nan, math.inf):
        trained.model.head.weight[3] = bad
        with pytest.raises(UserError, match="not finite"):
            likelihood.ranked(trained, [("a b", ["c", "d"], 0)])
        with pytest.raises(UserError, match="not finite"):
            likelihood.perplexity(trained, ["a b c"])


def test_the_command_line_on_a_shipped_model(tmp_path, capsys):
    """Catches what stand-ins hide, numbers that are printed and not written, and a file that is never read."""
    (tmp_path / "one.txt").write_text("a red circle\na circle\n")
    numbers = tmp_path / "numbers.json"
    for names, tokens in ((["scenes"], 19), (["scenes", str(tmp_path / "one.txt")], 22)):
        found = likelihood.main(["perplexity", *names, "--limit", "1", "--json", str(numbers)])
        assert json.loads(numbers.read_text()) == found and 1 < found["perplexity"] < 5
        assert found["tokens"] == pytest.approx(tokens, abs=1)          # a deduction has 18 words, or 20
        assert f"tokens {found['tokens']}" in capsys.readouterr().out
    found = likelihood.main(["perplexity", "scenes", "--tokens", "100", "--stride", "20"])
    assert 100 <= found["tokens"] < 120 and "bits_per_byte" in capsys.readouterr().out
    found = likelihood.main(["choices", "scenes", "--limit", "6", "--json", str(numbers)])
    assert json.loads(numbers.read_text()) == found == {"acc": 1, "acc_norm": 1, "n": 6, "chance": 0.5}
    likelihood.main([])
    assert "(the right one)" in capsys.readouterr().out


def test_two_processes_are_one(tmp_path):
    """The command line, alone and on two ranks, from another folder. Catches requests that only one of them answers, or in another
    order, and a program that must be started where it lies."""
    line = ["-m", "metrics.likelihood", "choices", "scenes", "--limit", "9", "--json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME)}
    subprocess.run([sys.executable, *line, tmp_path / "one.json"], cwd=tmp_path, env=env, check=True, timeout=300)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *line, tmp_path / "two.json"],
                   cwd=tmp_path, env=env, check=True, timeout=300)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two and one["acc"] == 1 and one["n"] == 9        # the shipped model knows them


def test_texts_of_files(tmp_path):
    """Catches empty lines counted, a file read to its end where n texts were wanted, and one that is never read because
    the name before it has used up the limit."""
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n\n{"text": "c"}\n')
    (tmp_path / "b.txt").write_text("d e\nf\nbad \xff", encoding="latin-1")
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")
    assert [*likelihood.read_texts([a, b], 2)] == ["a b", "c", "d e", "f"] and [*likelihood.read_texts([a, a])] == ["a b", "c"] * 2
    assert [*likelihood.read_texts(["scenes"], 5)] == [*likelihood.read_texts(["scenes"], 9)][:5]
    with pytest.raises(UserError, match="b.txt line 3"):
        list(likelihood.read_texts([b], 3))
    for limit, scenes_first in ((5, 5), (None, 1000)):
        texts = list(likelihood.read_texts(["scenes", a], limit))
        assert len(texts) == scenes_first + 2 and texts[-2:] == ["a b", "c"]


def test_a_suite_without_names_is_the_papers(monkeypatch, capsys):
    """Catches tasks that were named and not asked, and a suite of none."""
    asked = []
    monkeypatch.setattr(likelihood, "suite", lambda trained, tasks, **_: asked.append(tasks) or {"acc": 0.5})
    likelihood.main(["suite"])
    likelihood.main(["suite", "my_task"])
    assert asked == [likelihood.SUITE, ["my_task"]] and "my_task: acc 0.5" in capsys.readouterr().out
