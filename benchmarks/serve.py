"""The server against the engine inside it: at saturation, for one query, overloaded, at its start, over half an hour.

`f2llm serve` runs in a process of its own on the 80M shape with random weights and the real tokenizer; clients are
another process that speaks HTTP by hand (workers/serve_clients.py), because both share the machine; the engine is
`Embedder.encode` in a third (workers/serve_engine.py). Texts are real ones, one a request. At saturation 64 clients ask
on as soon as they are answered, and one that is refused waits as it is told. Overload is twice the requests a second
that were answered at saturation, for a minute, whatever comes back.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from f2llm.errors import F2Error
from f2llm.files import write_json
from f2llm.text import clean
from harness import ROOT, Figure, Part, Row, Worker, finish, measured, skipped, start, take_turns, worker
from inputs import EVERYTHING, FULL, SMALL, Size, describe, draw_texts, make_model, token_ids

MAX_LENGTH = 512  # tokens; longer texts are left out, as a server refuses them
CLIENTS = 64
QUERY = "what is the capital of France?"
START_LIMIT = 120.0  # seconds
SAMPLE = 10.0  # seconds between two looks at the memory
WARM_UP = 0.2  # of the run, before its memory counts

SATURATED = Row("texts/s with 64 clients, peer the engine alone", bar=0.90)
LATENCY = Row("median seconds of a request with 64 clients", better="lower")
ALONE = Row("milliseconds that the server adds to a lone query", bar=2, better="lower")
UNANSWERED = Row("share of answers under twice that load that are neither 200 nor 429", bar=0, better="lower")
REFUSED = Row("share of answers under twice that load that are 429", better="lower")
OVERLOADED = Row("median seconds of an accepted request, peer with 64 clients", bar=2, better="lower")
START = Row("seconds from start to first answer, without import torch", bar=1, better="lower")
MEMORY = Row("resident MB that the server grows in a minute", bar=1, better="lower")


@dataclass(frozen=True)
class Work:
    """How much is done: figures are taken with FULL_WORK, SMALL_WORK only tries the script."""

    size: Size
    texts: int
    queries: int  # how often the lone query is asked in a turn
    overload_seconds: float


FULL_WORK = Work(FULL, texts=512, queries=100, overload_seconds=60)
SMALL_WORK = Work(SMALL, texts=128, queries=10, overload_seconds=2)


@dataclass(frozen=True)
class Server:
    """A running server, and how long it took to its first answer."""

    process: subprocess.Popen[bytes]
    port: int
    seconds: float

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024 / 1e6


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """`f2llm serve FOLDER/model` on a free port, from its first answer on; its log is FOLDER/server.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "f2llm", "serve", str(folder / "model"), "--port", str(port)]
    paths = filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH", "")))
    log = folder / "server.log"
    with open(log, "wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            while not answers(port):
                seconds = time.perf_counter() - started
                if process.poll() is not None or seconds > START_LIMIT:
                    last = log.read_text(errors="replace").strip().splitlines()[-1:]
                    raise F2Error(f"the server gave no answer in {seconds:.0f} seconds; it said: {last}.")
                time.sleep(0.01)
            yield Server(process, port, time.perf_counter() - started)
        finally:
            process.kill()
            process.wait()


def answers(port: int) -> bool:
    """Whether a query gets its vector."""
    connection = HTTPConnection("127.0.0.1", port, timeout=START_LIMIT)
    try:
        body = json.dumps({"model": "any", "input": QUERY})
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def saturated(clients: Worker, engine: Worker, texts: int) -> tuple[list[Figure], float, float]:
    """Every text once, in turns; requests a second, and the median seconds of one."""
    medians = []

    def turn() -> float:
        result = clients.call("all_texts", clients=CLIENTS)
        medians.append(result["median"])
        return float(result["seconds"])

    seconds = take_turns({"server": turn, "engine": partial(engine.call, "encode")})
    latency = statistics.median(medians[1:])  # the first was the warm-up
    speed = {name: texts / value for name, value in seconds.items()}
    figures = [measured(SATURATED, speed["server"], speed["engine"]), measured(LATENCY, latency)]
    return figures, speed["server"], latency


def alone(clients: Worker, engine: Worker, times: int) -> Figure:
    """One short query at a time over a connection that is kept alive, and in the engine's process."""
    contenders = {"server": clients, "engine": engine}
    seconds = take_turns(
        {name: partial(one.call, "alone", query=QUERY, times=times) for name, one in contenders.items()}
    )
    return measured(ALONE, 1000 * (seconds["server"] - seconds["engine"]))


def overloaded(clients: Worker, rate: float, latency: float, seconds: float) -> list[Figure]:
    """`rate` requests a second; `latency` is the median with 64 clients."""
    result = clients.call("overload", rate=rate, seconds=seconds)
    statuses = result["statuses"]  # keys are strings by now: they came as JSON
    answered = sum(statuses.values())
    accepted, refused = statuses.get("200", 0), statuses.get("429", 0)
    print(f"overload, {rate:.1f} requests/s: {statuses}", flush=True)
    return [
        measured(UNANSWERED, (answered - accepted - refused) / answered),
        measured(REFUSED, refused / answered),
        measured(OVERLOADED, result["median"], latency),
    ]


def starting(folder: Path) -> Figure:
    """A server from start to first answer, and a process that only imports torch, in turns."""

    def server() -> float:
        with serving(folder) as running:
            return running.seconds

    def torch() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        return time.perf_counter() - started

    seconds = take_turns({"server": server, "torch": torch})
    print(f"start: {seconds}", flush=True)
    return measured(START, seconds["server"] - seconds["torch"])


def memory(server: Server, clients: Worker, minutes: float) -> Figure:
    """The slope of a line through the resident memory, under load, after a warm-up."""
    started = time.perf_counter()
    samples: list[tuple[float, float]] = []  # minutes, MB
    while (now := (time.perf_counter() - started) / 60) < minutes:
        samples.append((now, server.resident_mb()))
        clients.call("go_on", clients=CLIENTS, seconds=min(SAMPLE, minutes * 60 / 20))
    at, mb = np.array([sample for sample in samples if sample[0] >= WARM_UP * minutes]).T
    print(
        f"memory: {samples[0][1]:.0f} MB, {mb[0]:.0f} after the warm-up, {mb[-1]:.0f} in the end", flush=True
    )
    return measured(MEMORY, float(np.polyfit(at, mb, 1)[0]))


def parts(folder: Path, work: Work, minutes: float) -> list[Part]:
    inputs = prepare(folder, work)
    with worker("serve_engine", folder / "model", folder / "texts.json", keep_memory=True) as engine:
        with (
            serving(folder) as server,
            worker("serve_clients", server.port, folder / "texts.json") as clients,
        ):
            figures, rate, latency = saturated(clients, engine, inputs["texts"])
            figures.append(alone(clients, engine, work.queries))
            figures += overloaded(clients, 2 * rate, latency, work.overload_seconds)
            inputs["resident_mb_of_the_server"] = round(server.resident_mb())
            grown = memory(server, clients, minutes) if minutes else skipped(MEMORY, "needs --minutes")
        figures += [starting(folder), grown]
    inputs["minutes_of_memory"] = minutes
    return [Part(figures, inputs, {"engine": engine.facts, "clients": clients.facts})]


def prepare(folder: Path, work: Work) -> dict[str, Any]:
    """Write model and texts.json; what they are."""
    drawn, origin = draw_texts(work.size, EVERYTHING, work.texts)
    texts = list(dict.fromkeys(map(clean, drawn)))
    model = make_model(folder / "model", work.size, texts, MAX_LENGTH)
    # What was cut to the longest is left out, with the few that have just this length.
    texts = [
        text
        for text, ids in zip(texts, token_ids(model, texts), strict=True)
        if text and len(ids) < MAX_LENGTH
    ]
    write_json(folder / "texts.json", texts)
    inputs = describe(work.size, model, token_ids(model, texts), origin)
    print(f"texts: {inputs}", flush=True)
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny models and few texts: a trial, no figures")
    parser.add_argument(
        "--minutes",
        type=float,
        help="how long memory is watched, 0 for not at all (default: 30, or 0 with --small)",
    )
    options = parser.parse_args()
    work, minutes = (SMALL_WORK, 0.0) if options.small else (FULL_WORK, 30.0)
    minutes = minutes if options.minutes is None else options.minutes
    started = start()
    with tempfile.TemporaryDirectory() as folder:
        result = parts(Path(folder), work, minutes)
    finish(result, started)


if __name__ == "__main__":
    main()
