"""The benchmark runs, and counts what it says it counts."""
import time

import pytest
import torch

from model import count
from tests import benchmark


def test_a_quick_run_measures_everything(capsys):
    """Catches a changed name that the benchmark uses, a share above the peak, parts that are not the whole."""
    threads = torch.get_num_threads()
    numbers = benchmark.main(["--quick", "--busy"])
    torch.set_num_threads(threads)
    assert all(number >= 0 for number in numbers.values())
    for width in (128, 256):
        parts = [share for name, share in numbers.items() if name.startswith(f"step, width {width}: time in")]
        assert sum(parts) == pytest.approx(1)
        assert 0.05 < numbers[f"step, width {width}: share_of_peak"] < 1.2
    for command in ("sample.py, 25 steps, to the png", "train.py to its first step"):
        assert 100 < numbers[f"{command}: MiB at most"] < 3000
        assert numbers[f"{command}: CPU s"] > 0.5


def test_a_step_s_work_is_six_times_weights_times_positions(tmp_path):
    """Catches work of one direction only, or of several steps. Forward each weight is multiplied with and added once per
    position, which are 2; backward twice, once for the gradient of what was read and once for its own: 6 in all."""
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
    pictures = [part for document in documents for part in document if part.ndim == 3]
    words = [part for document in documents for part in document if part.ndim == 1]
    assert len(documents) == run.feed.rows
    assert len(pictures) == len(batch.latents) and pictures[0].shape == (4, 4, 16)
    dropped = batch.tokens == benchmark.data.DROP
    assert sum(len(part) for part in words) == int(((batch.tokens >= len(benchmark.data.SPECIAL)) | dropped).sum())


def test_the_median_leaves_the_first_call_out():
    """Catches a warm-up that counts."""
    waits = iter([0.2, 0.0, 0.0, 0.0])
    assert benchmark.median_of(lambda: time.sleep(next(waits)), time.perf_counter, 3) < 0.1
