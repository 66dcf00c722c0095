"""Real ranks for tests: a function of a test file, run by processes that meet over gloo, and never a hang."""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from f2llm.train.ranks import join

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int  # exit code; negative is a signal, as in subprocess
    errors: str  # its standard error
    result: Any  # what the function returned, None if it did not


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """What `function(ranks, *arguments)` returns on each of `world` ranks; it must stand at a file's top level."""
    ended = end_of_ranks(world, function, *arguments, timeout=timeout)
    for rank, end in enumerate(ended):
        assert end.code == 0, f"rank {rank} ended with {end.code}:\n{end.errors}"
    return [end.result for end in ended]


def end_of_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 120,
    awaited: Sequence[int] | None = None,
) -> list[Ended]:
    """Like `on_ranks` for ranks that may fail. Those that live longer than `timeout` seconds fail the test.

    `awaited` are the ranks that have to end by themselves, all if it is left out; the others are killed then.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((function, arguments)))
        processes = [_start(rank, world, folder, port) for port in [_free_port()] for rank in range(world)]
        try:
            deadline = time.monotonic() + timeout
            for process in processes if awaited is None else [processes[rank] for rank in awaited]:
                process.wait(max(0.01, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            errors = "\n".join((folder / f"errors-{rank}").read_text() for rank in range(world))
            pytest.fail(f"{function.__name__} on {world} ranks hung for {timeout:.0f} seconds:\n{errors}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [_end(process.returncode, rank, folder) for rank, process in enumerate(processes)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(rank: int, world: int, folder: Path, port: int) -> subprocess.Popen[bytes]:
    """One rank, with the environment that torchrun gives it."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with open(folder / f"errors-{rank}", "wb") as errors:
        return subprocess.Popen([sys.executable, __file__, str(folder)], stderr=errors, env=environment)


def _end(code: int, rank: int, folder: Path) -> Ended:
    result = folder / f"result-{rank}"
    return Ended(
        code,
        (folder / f"errors-{rank}").read_text(),
        pickle.loads(result.read_bytes()) if result.exists() else None,
    )


def _run(folder: Path) -> None:
    """The whole life of one rank."""
    function, arguments = pickle.loads((folder / "call").read_bytes())
    with join(timeout=100) as ranks:
        result = function(ranks, *arguments)
    (folder / f"result-{ranks.rank}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
