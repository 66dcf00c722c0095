"""A run whose ranks wait for one that does not come: say which, and what it does instead, and end.

What may keep a rank (a step and its parts, a validation, a checkpoint) is entered through
`watched("gather the vectors", ranks)`, which notes a phase and costs two microseconds. Two threads read the note. One
publishes it about once a second in the store through which the ranks met. The other notices a phase that outlasts the
timeout, reads where all ranks are, and writes one line:

    f2llm watchdog: rank 0 of 2 (host a, process 71) is in 'gather the vectors' of step 12 for 600 s, which may take
    600 s: rank 1 is still in 'encode the texts' of step 12 (for 601 s); ranks [0] are in 'gather the vectors' of step
    12.

Then the process ends, since nothing can take it out of a collective, and whoever started the ranks ends the others.

On a GPU a call returns before its work is done. The phase named is then the one in which a rank first waited for the
GPU, which is at the collective or soon after it. `gather` waits by itself.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

from f2llm.train.ranks import Ranks

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: it may well work the next time
OPEN_SECONDS = 60.0  # how long the store may take to be reached at first
STORE_SECONDS = 5.0  # how long it may take to answer in the end
SILENT_BEATS = 5  # so many missed messages mean that a whole process stands still


class Phase(NamedTuple):
    """What a rank does."""

    what: str
    step: int | None
    since: float  # time.monotonic() when it began, or came back from a phase within it
    timed: bool  # False between phases, where the run may take any time


_phase = Phase("start", None, time.monotonic(), timed=False)  # of this process; one thread writes it


@contextmanager
def watched(what: str, ranks: Ranks, step: int | None = None) -> Iterator[None]:
    """A phase of the run, which the watchdog may have to name; phases within it have its step if they give none."""
    global _phase
    if ranks.world == 1:
        yield
        return
    around = _phase
    _phase = Phase(what, around.step if step is None else step, time.monotonic(), timed=True)
    try:
        yield
    finally:
        now = time.monotonic()
        _phase = around._replace(since=now) if around.timed else _phase._replace(since=now, timed=False)


@contextmanager
def watchdog(ranks: Ranks, timeout: float, exit_code: int = EXIT_CODE) -> Iterator[None]:
    """Within, a phase that outlasts `timeout` ends the process with `exit_code`, after a line on standard error.

    Args:
        timeout: seconds; more than the longest phase of a healthy run takes, and less than the process group's.
        exit_code: of the process, not 0.
    """
    if ranks.world == 1:
        yield
        return
    store, left = _open_store(), threading.Event()
    beat = min(1.0, timeout / 10)
    publisher = threading.Thread(target=_publish, args=(store, ranks, beat, left), daemon=True)
    watcher = threading.Thread(
        target=_watch, args=(store, ranks, beat, left, timeout, exit_code), daemon=True
    )
    publisher.start()
    watcher.start()
    try:
        yield
    finally:
        left.set()
        publisher.join(STORE_SECONDS)
        watcher.join(STORE_SECONDS)


def _open_store() -> Any:
    """A connection of our own to the store of the ranks: the process group may block the one it uses."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore("watchdog", TCPStore(address, port, timeout=timedelta(seconds=OPEN_SECONDS)))


def _publish(store: Any, ranks: Ranks, beat: float, left: threading.Event) -> None:
    """Tell the others once a beat what this rank does, until it leaves or the store is gone."""
    with suppress(Exception):  # without a store there is less to say in the end, and no reason to end
        while True:
            last, phase = left.is_set(), _phase
            message = {
                "doing": "" if last else _doing(phase),
                "seconds": time.monotonic() - phase.since,
                "told": time.time(),
            }
            store.set(str(ranks.rank), json.dumps(message))
            if last:
                return
            left.wait(beat)


def _doing(phase: Phase) -> str:
    of = "" if phase.step is None else f" of step {phase.step}"
    return f"{'in' if phase.timed else 'past'} '{phase.what}'{of}"


def _watch(
    store: Any, ranks: Ranks, beat: float, left: threading.Event, timeout: float, exit_code: int
) -> None:
    """Look once a beat whether this rank's phase outlasts `timeout`."""
    while not left.wait(beat):
        phase = _phase
        seconds = time.monotonic() - phase.since
        if phase.timed and seconds > timeout:
            where = _within(STORE_SECONDS, partial(_whereabouts, store, ranks, beat, _doing(phase)))
            sys.stderr.write(
                f"f2llm watchdog: rank {ranks.rank} of {ranks.world} (host {socket.gethostname()}, process "
                f"{os.getpid()}) is {_doing(phase)} for {seconds:.0f} s, which may take {timeout:.0f} s: "
                f"{where or 'the store that could tell where the others are does not answer'}.\n"
            )
            sys.stderr.flush()
            # Whoever started the ranks ends all of them when one ends, and the others have their line to write.
            time.sleep(3 * beat)
            os._exit(exit_code)


def _whereabouts(store: Any, ranks: Ranks, beat: float, here: str) -> str:
    """Which ranks are elsewhere, and which are here, as this one is."""
    waiting, elsewhere = [ranks.rank], []
    for rank in set(range(ranks.world)) - {ranks.rank}:
        if not store.check([str(rank)]):
            elsewhere.append(f"rank {rank} has not begun")
            continue
        message = json.loads(store.get(str(rank)))
        silent = time.time() - message["told"]  # clocks of hosts differ, but hardly by the length of a hang
        if message["doing"] == here:
            waiting.append(rank)
        elif not message["doing"]:
            elsewhere.append(f"rank {rank} has left the run")
        elif silent > SILENT_BEATS * beat + 1:
            elsewhere.append(f"rank {rank} was last heard of {silent:.0f} s ago, {message['doing']}")
        else:
            elsewhere.append(f"rank {rank} is still {message['doing']} (for {message['seconds']:.0f} s)")
    if not elsewhere:
        return "all ranks are, so look at the network between them"
    return "; ".join([*elsewhere, f"ranks {sorted(waiting)} are {here}"])


def _within(seconds: float, work: Callable[[], str]) -> str:
    """The result of work that may block or fail; empty if it does."""
    results = []

    def run() -> None:
        with suppress(Exception):
            results.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return "".join(results)
