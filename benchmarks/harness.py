"""What every benchmark shares: contenders in processes of their own, turns, figures, the last line.

A benchmark script builds its input, starts a worker process for ours and one for the peer (so that neither runs
under the other's memory settings or library versions) and lets them work in turns. Its command is `benchmark`, which
prints one JSON object as the last line.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, cast

from f2llm.errors import F2Error

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # the development data, where a checkout has it beside it
ROUNDS = 3  # turns of each contender after its warm-up; odd, so that the median is one of them


@dataclass(frozen=True)
class Row:
    """What a benchmark promises to measure, and the bar set for it, if any."""

    name: str
    bar: float | None = None
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class Figure:
    """A row filled in: ours beside the peer's; the bar is for `ratio` or, without a peer, for `ours`."""

    name: str
    ours: float | None
    peer: float | None
    ratio: float | None
    bar: float | None
    better: Literal["higher", "lower"]
    met: bool | None
    status: str


def measured(row: Row, ours: float, peer: float | None = None) -> Figure:
    """A figure with its ratio ours / peer; `met` stays open where there is no bar."""
    ratio = None if peer is None else ours / peer
    value = ours if ratio is None else ratio
    met = None
    if row.bar is not None:
        met = value >= row.bar if row.better == "higher" else value <= row.bar
    return Figure(row.name, ours, peer, ratio, row.bar, row.better, met, "measured")


def skipped(row: Row, reason: str) -> Figure:
    return Figure(row.name, None, None, None, row.bar, row.better, None, f"skipped: {reason}")


@dataclass(frozen=True)
class Part:
    """What one part of a benchmark contributes to its result."""

    figures: list[Figure]
    inputs: dict[str, Any]
    """What was measured: shape, texts, their lengths."""
    workers: dict[str, dict[str, Any]]
    """Facts of each worker process, by contender."""


def relative_difference(ours: float, peer: float) -> float:
    return abs(ours - peer) / abs(peer)


class PeerMissing(Exception):  # noqa: N818  not an error: the figure is skipped
    """The peer's library cannot be imported where the peer would run."""


@dataclass(frozen=True)
class Worker:
    """A running worker process (workers/start.py has the other end)."""

    name: str
    process: subprocess.Popen[str]
    facts: dict[str, Any]  # threads, memory_policy, versions

    def call(self, command: str, **arguments: Any) -> Any:
        """Have the worker do one command and wait for its answer."""
        print(json.dumps({"command": command, **arguments}), file=self.process.stdin, flush=True)
        return _answer(self.name, self.process)["value"]


def _answer(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    line = cast(IO[str], process.stdout).readline()
    if not line:
        raise F2Error(
            f"the worker {name} ended with exit code {process.wait()}; its own message stands above."
        )
    return cast(dict[str, Any], json.loads(line))


@contextmanager
def worker(name: str, *arguments: object, peer: bool = False, keep_memory: bool = False) -> Iterator[Worker]:
    """Start workers/NAME.py in a process of its own, and end it with the block.

    A peer runs in .venv-peers where that exists, otherwise in this environment; PeerMissing if its library cannot
    be imported there. `keep_memory` gives the process the memory policy of f2llm's own commands.
    """
    peers = ROOT / ".venv-peers" / "bin" / "python"
    python = str(peers) if peer and peers.exists() else sys.executable
    paths = (str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", ""))
    policy = ["--keep-memory"] if keep_memory else []
    process = subprocess.Popen(
        [python, "-m", "workers.start", *policy, name, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    try:
        facts = _answer(name, process)
        if "missing" in facts:
            raise PeerMissing(facts["missing"]) if peer else F2Error(f"{name}: {facts['missing']}.")
        yield Worker(name, process, facts)
    finally:
        process.kill()
        process.communicate()


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """The median of what each contender returns, measured a, b, a, b ... after one warm-up each."""
    for contender in contenders.values():
        contender()
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            results[name].append(contender())
    return {name: statistics.median(values) for name, values in results.items()}


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Start:
    """When a benchmark started, and what else the machine was doing."""

    date: str
    load_average: list[float]


def start() -> Start:
    """Call it first: later the load would be our own."""
    load = [round(value, 2) for value in os.getloadavg()]
    print(f"load average at the start: {load}", flush=True)
    return Start(datetime.now(UTC).isoformat(timespec="seconds"), load)


def benchmark(docstring: str | None, parts_of: Callable[[Path, bool], list[Part]]) -> None:
    """What the command of a benchmark script does: its parts, made in an empty folder, and the result of all.

    Args:
        parts_of: takes the folder, and whether this is a trial with tiny models and few texts.
    """
    parser = argparse.ArgumentParser(description=(docstring or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny models and few texts: a trial, no figures")
    small = parser.parse_args().small
    started = start()
    with tempfile.TemporaryDirectory() as folder:
        parts = parts_of(Path(folder), small)
    finish(parts, started)


def finish(parts: Sequence[Part], started: Start) -> None:
    """Print the result as the last line: one JSON object."""
    result = {
        "figures": [asdict(figure) for part in parts for figure in part.figures],
        "load_average": started.load_average,
        "date": started.date,
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "machine": machine(),
        "workers": {name: facts for part in parts for name, facts in part.workers.items()},
        "inputs": {name: value for part in parts for name, value in part.inputs.items()},
    }
    print(json.dumps(result), flush=True)
