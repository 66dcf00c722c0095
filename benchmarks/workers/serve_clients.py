"""Clients of an embeddings server, all in one process: one text a request, asked for in base64 as OpenAI's client does.

They speak HTTP/1.1 over asyncio's streams, by hand: server and clients share the machine, and a client library would
take a core's milliseconds for every request that the server answers in about as many.
"""

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

from f2llm.errors import F2Error
from f2llm.files import read_json

PATIENCE = 120.0  # seconds until a request counts as unanswered


@dataclass
class Connection:
    """A connection that is kept alive."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def post(self, request: bytes) -> tuple[int, float | None]:
        """The status of the answer and its Retry-After in seconds; the body is read and left alone."""
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").splitlines()
        headers = {name.lower(): value for name, _, value in (line.partition(":") for line in lines)}
        await self.reader.readexactly(int(headers["content-length"]))
        wait = headers.get("retry-after")
        return int(first.split()[1]), None if wait is None else float(wait)


Connect = Callable[[], Awaitable[Connection]]


def commands(port: str, texts_file: str) -> dict[str, Callable[..., Any]]:
    requests = [request(text) for text in read_json(Path(texts_file))]
    connect = partial(open_connection, int(port))

    def all_texts(clients: int) -> dict[str, float]:
        """Every text once, by so many clients at a time: seconds in all, and the median seconds of a request."""
        return asyncio.run(closed_loop(connect, iter(requests), clients, PATIENCE * len(requests)))

    def go_on(clients: int, seconds: float) -> dict[str, float]:
        """The texts over and over, for so many seconds."""
        return asyncio.run(closed_loop(connect, cycle(requests), clients, seconds))

    def alone(query: str, times: int) -> float:
        """Median seconds of one query, asked again and again over one connection."""
        result = asyncio.run(closed_loop(connect, repeat(request(query), times), 1, PATIENCE * times))
        return result["median"]

    def overload(rate: float, seconds: float) -> dict[str, Any]:
        """So many requests a second whether or not earlier ones are answered: statuses, and the median of 200s."""
        return asyncio.run(open_loop(connect, cycle(requests), rate, seconds))

    return {"all_texts": all_texts, "go_on": go_on, "alone": alone, "overload": overload}


def request(text: str) -> bytes:
    """The whole HTTP request for a text's vector."""
    body = json.dumps({"model": "any", "input": text, "encoding_format": "base64"}).encode()
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def open_connection(port: int) -> Connection:
    return Connection(*await asyncio.open_connection("127.0.0.1", port))


async def closed_loop(
    connect: Connect, remaining: Iterator[bytes], clients: int, seconds: float
) -> dict[str, float]:
    """Clients that ask on as soon as they are answered, until no request remains or the time is up.

    One that is refused for load comes again when the server says so; its latency is that of the attempt that was
    answered. Connections are open before the clock starts.
    """
    connections = [await connect() for _ in range(clients)]
    latencies: list[float] = []
    started = time.perf_counter()

    async def client(connection: Connection) -> None:
        while time.perf_counter() < started + seconds and (body := next(remaining, None)) is not None:
            asked = time.perf_counter()
            while (answer := await connection.post(body))[0] == 429 and answer[1] is not None:
                await asyncio.sleep(answer[1])
                asked = time.perf_counter()
            if answer[0] != 200:
                raise F2Error(f"the server answered {answer}, expected 200, or 429 with Retry-After.")
            latencies.append(time.perf_counter() - asked)
        connection.writer.close()

    await asyncio.gather(*map(client, connections))
    return {"seconds": time.perf_counter() - started, "median": statistics.median(latencies)}


async def open_loop(connect: Connect, bodies: Iterator[bytes], rate: float, seconds: float) -> dict[str, Any]:
    """`rate` requests a second, each over a connection that is idle or new.

    Status 0 stands for no answer, and for a 429 that does not say when to come again.
    """
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    idle: list[Connection] = []

    async def arrival(body: bytes) -> None:
        asked = time.perf_counter()
        while idle and idle[-1].reader.at_eof():  # the server has closed it meanwhile
            idle.pop().writer.close()
        try:
            async with asyncio.timeout(PATIENCE):
                connection = idle.pop() if idle else await connect()
                status, retry_after = await connection.post(body)
        except (OSError, EOFError, TimeoutError):
            status = 0
        else:
            idle.append(connection)
            if status == 429 and retry_after is None:
                status = 0
        statuses[status] += 1
        if status == 200:
            latencies.append(time.perf_counter() - asked)

    started = time.perf_counter()
    arrivals = []
    for i in range(int(rate * seconds)):
        await asyncio.sleep(started + i / rate - time.perf_counter())
        arrivals.append(asyncio.create_task(arrival(next(bodies))))
    await asyncio.gather(*arrivals)
    for connection in idle:
        connection.writer.close()
    return {"statuses": dict(statuses), "median": statistics.median(latencies)}
