"""The watchdog: a rank that does not come is named by those that wait for it, and nothing hangs for ever."""

import os
import signal
import threading
import time

import pytest
import torch
from tests.train.gloo import end_of_ranks, on_ranks

from f2llm.train import watchdog as watchdog_module
from f2llm.train.ranks import ALONE, Ranks, collect, gather
from f2llm.train.watchdog import EXIT_CODE, watchdog, watched

TIMEOUT = 4.0  # seconds; a busy machine may hold a healthy rank up for one or two


def hang(ranks: Ranks) -> None:
    """Two steps, in the second of which rank 1 does not come to the gathering."""
    with watchdog(ranks, TIMEOUT):
        for step in (11, 12):
            with watched("encode all", ranks, step):
                for number in (1, 2, 3):
                    with watched(f"encode micro-batch {number} of 3", ranks):
                        if (ranks.rank, step, number) == (1, 12, 2):
                            time.sleep(1000)
            with watched("gather the vectors", ranks, step):
                gather(torch.ones(1, 1), [1] * ranks.world, ranks)


def freeze(ranks: Ranks) -> None:
    """Rank 0, which holds the store of the ranks, stands still as a whole."""
    watchdog_module.STORE_SECONDS = 1.0
    with watchdog(ranks, TIMEOUT, exit_code=3):
        with watched("gather the vectors", ranks, 1):
            gather(torch.ones(1, 1), [1] * ranks.world, ranks)
        if ranks.is_main:
            os.kill(os.getpid(), signal.SIGSTOP)
        with watched("sum the gradients", ranks, 1):
            collect(None, ranks)


def take_turns(ranks: Ranks) -> float:
    """A healthy run that lives longer than the timeout, in phases that do not; what a phase costs, in microseconds."""
    with watchdog(ranks, 1.0):
        with watched("validate", ranks, 3):
            for _ in range(14):
                with watched("score", ranks):
                    time.sleep(0.1)
        time.sleep(1.5)  # between phases a run may take any time
        started = time.perf_counter()
        for _ in range(2000):
            with watched("count", ranks, 3):
                pass
        spent = (time.perf_counter() - started) / 2000 * 1e6
        collect(None, ranks)
    assert threading.active_count() == 1
    return spent


def test_the_rank_that_hangs_is_named() -> None:
    ends = end_of_ranks(3, hang, timeout=120)
    assert [end.code for end in ends] == [EXIT_CODE] * 3
    for rank in (0, 2):
        (line,) = [line for line in ends[rank].errors.splitlines() if "watchdog" in line]
        assert f"rank {rank} of 3 (host " in line
        assert "is in 'gather the vectors' of step 12 for " in line
        assert "rank 1 is still in 'encode micro-batch 2 of 3' of step 12 (for " in line
        assert "; ranks [0, 2] are in 'gather the vectors' of step 12" in line
    assert "rank 1 of 3 (host " in ends[1].errors
    assert "is in 'encode micro-batch 2 of 3' of step 12 for " in ends[1].errors


def test_ranks_end_although_the_store_stands_still() -> None:
    ends = end_of_ranks(2, freeze, timeout=120, awaited=[1])
    assert ends[1].code == 3
    assert "rank 1 of 2 (host " in ends[1].errors
    assert "is in 'sum the gradients' of step 1" in ends[1].errors
    assert "the store that could tell where the others are does not answer" in ends[1].errors


def test_a_healthy_run_is_left_alone() -> None:
    assert max(on_ranks(2, take_turns)) < 200  # about 2 on an idle machine


def test_it_is_off_for_one_process(capfd: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with watchdog(ALONE, 0.05), watched("sleep", ALONE, 1):
        assert threading.active_count() == before
        time.sleep(0.3)
    assert capfd.readouterr().err == ""
