"""Continuous batching: the texts of all requests in one fair queue, computed by threads of their own.

The event loop only queues and answers. A thread takes a batch under a budget of tokens as soon as anything waits and
its last batch is done: a lone query is computed at once, and under load batches fill by themselves. Threads form their
batches themselves, so that they never wait for a busy event loop, nor for each other.

Clients get equal shares of the tokens that are computed, text by text (fair_queue.py).

Admission looks at what would be computed before a request, not at the request: one of any size is admitted while
little waits, and a short query is admitted while somebody's thousands of texts wait.

Shape suffixes: N texts of a request, B texts of a batch, D dims.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from f2llm.serve.fair_queue import FairQueue, Request, Share

TOKENS_PER_BATCH = 1024
"""With one lane: 96 % of the tokens/s of 8,192 (80M shape, CPU), and a new query waits for an eighth of the time."""
TOKENS_PER_LANE = 768
"""Of each of several lanes: with 512, a batch ends at the first text that does not fit too far below its budget."""
WAITING_PER_LANE = 2560
"""Tokens, for two lanes at least. 64 clients with one text of usual length each (60 tokens) have 3,900 in work or
waiting: with this limit they are all admitted, and twice as many make nobody wait for twice as long."""
RATE_MEMORY = 0.9  # weight of all earlier batches in the measured tokens/s, at each further one

Raw = Callable[[list[Sequence[int]], bool], np.ndarray]
OnBatch = Callable[[int, int, float], None]


class Overloaded(Exception):  # noqa: N818  not an error of anybody: come again
    """Too much waits; `retry_after` seconds from now what waits today will have been computed."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(f"{reason}; try again in {retry_after:.1f} seconds.")
        self.retry_after = retry_after


class Scheduler:
    """Vectors for many clients at once."""

    def __init__(
        self,
        raw: Raw,
        *,
        lanes: int = 1,
        tokens_per_batch: int | None = None,
        max_waiting_tokens: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> None:
        """Give it `Embedder.raw`, then `start` it.

        Args:
            raw: token sequences, and whether nothing else is to be computed at the same time, to vectors, float32
                [B, D]; called in the scheduler's threads.
            lanes: how many threads call it at once.
            tokens_per_batch: the most tokens that a thread computes at once (a longer text is computed alone), and so
                the time that a query may have to wait before it can be in a batch.
            max_waiting_tokens: a request is refused while more tokens than this would be computed before it.
            on_batch: called on the event loop after each batch that succeeded, with its number of texts, its number
                of tokens and the seconds it took.
        """
        self.on_batch = on_batch
        self._raw = raw
        self.tokens_per_batch = tokens_per_batch or (TOKENS_PER_BATCH if lanes == 1 else TOKENS_PER_LANE)
        self._max_waiting_tokens = max_waiting_tokens or WAITING_PER_LANE * max(2, lanes)
        self._queue = FairQueue()
        self._changed = threading.Condition()  # guards the queue and the four values below
        self._draining = False
        self._computing = 0  # tokens of the batches in work
        self._past_tokens = 0.0
        self._past_seconds = 0.0
        self._threads = [
            threading.Thread(target=self._work, name="f2llm vectors", daemon=True) for _ in range(lanes)
        ]

    @property
    def waiting_tokens(self) -> int:
        return self._queue.tokens

    @property
    def waiting_texts(self) -> int:
        return self._queue.texts

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        for thread in self._threads:
            thread.start()

    async def drain(self) -> None:
        """Refuse what is new, and return when all that waited has been computed."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    async def vectors(self, client: str, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Un-normalised vectors of a client's token sequences, float32 [N, D].

        Raises Overloaded at once where too much would be computed before them, and whatever `raw` raises on a batch
        that one of them was in. Cancelled, it takes along all that no batch has taken.
        """
        if not ids:
            return self._raw([], False)  # nothing to compute, but its shape is known there
        request = Request(client, ids, self._loop.create_future())
        with self._changed:
            self._admit(client, request.tokens)
            self._queue.add(request)
            self._changed.notify()
        try:
            return await request.answer
        finally:
            with self._changed:
                self._queue.remove(request)

    def _admit(self, client: str, tokens: int) -> None:
        ahead = self._queue.ahead(client, tokens)
        limit = self._max_waiting_tokens
        if self._draining or ahead > limit:
            rate = self._past_tokens / self._past_seconds if self._past_seconds else None  # of one thread
            retry_after = (ahead + self._computing) / (rate * len(self._threads)) if rate else 1.0
            too_much = f"{ahead} tokens would be computed before this request, the limit is {limit}"
            raise Overloaded("the server is stopping" if self._draining else too_much, retry_after)

    def _work(self) -> None:
        """A thread: batch after batch, until nothing waits and nothing more will come."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue.texts or self._draining)
                batch = self._queue.take(self.tokens_per_batch)
                ids = [text for share in batch for text in share.request.ids[share.first : share.stop]]
                tokens = sum(map(len, ids))
                alone = not self._computing and not self._queue.texts
                self._computing += tokens
            if not batch:
                return
            started = time.perf_counter()
            try:
                vectors_BD = self._raw(ids, alone)
            except Exception as error:
                self._loop.call_soon_threadsafe(_fail, batch, error)
            else:
                seconds = time.perf_counter() - started
                self._loop.call_soon_threadsafe(self._answer, batch, vectors_BD, tokens, seconds)
                with self._changed:
                    self._past_tokens = RATE_MEMORY * self._past_tokens + tokens
                    self._past_seconds = RATE_MEMORY * self._past_seconds + seconds
            finally:
                with self._changed:
                    self._computing -= tokens

    def _answer(self, batch: list[Share], vectors_BD: np.ndarray, tokens: int, seconds: float) -> None:
        row = 0
        for share in batch:
            request, texts = share.request, share.stop - share.first
            request.pieces_BD.append(vectors_BD[row : row + texts])
            row += texts
            if share.stop == len(request.ids) and not request.answer.done():
                request.answer.set_result(np.concatenate(request.pieces_BD))
        if self.on_batch:
            self.on_batch(row, tokens, seconds)


def _fail(batch: list[Share], error: Exception) -> None:
    for share in batch:
        if not share.request.answer.done():
            share.request.answer.set_exception(error)
