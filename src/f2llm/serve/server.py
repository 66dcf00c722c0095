"""`f2llm serve` as a process: its address, its models, and its end.

The address is taken before models are read, so that one that is taken already is told at once. SIGTERM and Ctrl-C stop
new connections, and what waits is still computed.
"""

import signal
import socket
from collections.abc import Sequence

import uvicorn

from f2llm.embed.compute import Precision
from f2llm.embed.embedder import Embedder
from f2llm.errors import UsageError
from f2llm.progress import say
from f2llm.serve.app import make_app
from f2llm.serve.models import Served, named
from f2llm.serve.scheduler import Scheduler
from f2llm.serve.token_arrays import TokenArrays

SECONDS_TO_FINISH = 60  # for requests in work when the server is told to stop
SECONDS_IDLE = 75  # longer than clients keep connections, so that none is closed just when it is used again
CONNECTIONS_WAITING = 2048


def serve(
    sources: Sequence[str],
    *,
    host: str,
    port: int,
    keys: Sequence[str],
    token_arrays: TokenArrays,
    precision: Precision = "float32",
    tokens_per_batch: int | None = None,
    max_waiting_tokens: int | None = None,
) -> None:
    """Serve models until the process is told to stop.

    Args:
        sources: `MODEL` or `NAME=MODEL` each.
        port: 0 takes a free one; which, is said on standard error.
        precision: of all models.
        tokens_per_batch, max_waiting_tokens: as of `Scheduler`.

    Raises UsageError for an address that cannot be had, and whatever loading a model raises.
    """
    by_name = named(sources)
    with listening(host, port) as address:
        served = []
        for name, source in by_name.items():
            embedder = Embedder(source, precision)
            scheduler = Scheduler(
                embedder.raw,
                lanes=embedder.lanes,
                tokens_per_batch=tokens_per_batch,
                max_waiting_tokens=max_waiting_tokens,
            )
            served.append(Served(name, embedder, scheduler))
        app = make_app(served, keys=keys, token_arrays=token_arrays)
        shown = f"[{host}]" if ":" in host else host
        say(f"{', '.join(by_name)} at http://{shown}:{address.getsockname()[1]}")
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn raises the signal again when all is done; by then nothing is left to be stopped.
            signal.signal(number, lambda *_: None)
        config = uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            backlog=CONNECTIONS_WAITING,
            timeout_keep_alive=SECONDS_IDLE,
            timeout_graceful_shutdown=SECONDS_TO_FINISH,
            server_header=False,
        )
        uvicorn.Server(config).run(sockets=[address])


def listening(host: str, port: int) -> socket.socket:
    """The address as a socket that does not listen yet: nobody waits in it for a model that does not load."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where the protocol is named; with it an answer takes 40 ms more.
    address = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        address.bind((host, port))
    except (OSError, OverflowError) as error:
        address.close()
        raise UsageError(
            f"{host}:{port} cannot be listened on ({error}); give another --host or --port."
        ) from None
    return address
