"""
test_benchmark.py: does the benchmark count what it says it counts?         (tests/benchmark.py)

THE IDEA    A wrong stopwatch makes every later number wrong. So its counts are compared with what
            can be counted by hand: the work of a step, the documents, the calls that are timed.
RUN IT      pytest -n 0 tests/test_benchmark.py
"""
import time

import pytest
import torch

from model import count
from tests import benchmark


def test_a_quick_run_measures_everything(capsys):
    """Catches a changed name that the benchmark uses, a share above the peak, and parts that are
    not the whole."""
    threads = torch.get_num_threads()
    numbers = benchmark.main(["--quick", "--busy"])
    torch.set_num_threads(threads)                      # the benchmark sets its own
    assert all(number >= 0 for number in numbers.values())

    for width in (128, 256):
        parts = []
        for name, share in numbers.items():
            if name.startswith(f"step, width {width}: time in"):
                parts.append(share)
        assert sum(parts) == pytest.approx(1)
        assert 0.05 < numbers[f"step, width {width}: share_of_peak"] < 1.2

    for command in ("sample.py, 25 steps, to the png", "train.py to its first step"):
        assert 100 < numbers[f"{command}: MiB at most"] < 3000
        assert numbers[f"{command}: CPU s"] > 0.5


def test_a_step_s_work_is_six_times_weights_times_positions(tmp_path):
    """Forward, each weight is multiplied and added once per position, which makes 2 operations.
    Backward does it twice, for the gradient of what was read and for the weight's own: 6 in all.
    Catches work of one direction only, or of several steps."""
    run = benchmark.make_run(128, tmp_path)
    work, tokens = benchmark.count_work(run, 0)
    positions = run.feed.batch(run.config.seed, 0, 0).tokens.numel()
    assert tokens < positions
    assert work == pytest.approx(6 * count(run.model.blocks) * positions, rel=0.1)


def test_the_peer_reads_the_same_documents(tmp_path):
    """Catches a lost document, words among patches, and padding taken for a document."""
    run = benchmark.make_run(128, tmp_path)
    batch = run.feed.batch(run.config.seed, 0, 0)
    documents = benchmark.peer_documents(run, 0)
    words = []
    pictures = []
    for document in documents:
        words += [part for part in document if part.ndim == 1]
        pictures += [part for part in document if part.ndim == 3]

    assert len(documents) == run.feed.rows
    assert len(pictures) == len(batch.latents)
    assert pictures[0].shape == (4, 4, 16)
    dropped = batch.tokens == benchmark.data.DROP       # captions that the model must do without
    ordinary = batch.tokens >= len(benchmark.data.SPECIAL)
    assert sum(len(part) for part in words) == int((ordinary | dropped).sum())


def test_the_median_leaves_the_first_call_out():
    """Catches a warm-up that counts."""
    waits = iter([0.2, 0.0, 0.0, 0.0])                  # seconds; the first call is slow

    def wait():
        time.sleep(next(waits))

    assert benchmark.median_of(wait, time.perf_counter, 3) < 0.1
