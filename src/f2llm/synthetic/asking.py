"""Asking until there is an answer: retries, pauses, the journal and the budget around each attempt.

request -> is it in the journal? -> room in the budget -> send -> journal -> again, after a pause that doubles

A server that is busy or gone is asked again; an answer that does not fill its form as well, with another seed. A
request that gets no answer while others do is given up and counted, and so is one that got none in three runs. Where
none gets an answer the run stops: what is finished stays, and the next run goes on from there.
"""

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from f2llm.errors import F2Error
from f2llm.synthetic.budget import Budget, most_tokens
from f2llm.synthetic.client import Complete, FailedError
from f2llm.synthetic.journal import Ended, Journal
from f2llm.synthetic.kinds import Form, UnreadableError, read, schema

RUNS = 3  # that may stop for a request before it is given up
LONGEST_PAUSE = 120.0  # seconds between two attempts, unless the server asks for more

Item = TypeVar("Item")


@dataclass(frozen=True)
class Request:
    """A prompt, filled in."""

    text: str
    form: type[Form]
    prompt_id: str
    keys: tuple[str | int | float, ...]
    """All that the answer depends on beside the text: model, seed, temperature, kind, language, number."""

    @cached_property
    def id(self) -> str:
        """32 hexadecimal digits; a request of the same id is the same request."""
        content = "\x1f".join([self.prompt_id, *map(str, self.keys), self.text])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def seed(self, attempt: int) -> int:
        """Below 2 ** 31, another for each attempt."""
        return int(hashlib.sha256(f"{self.id}{attempt}".encode()).hexdigest()[:8], 16) >> 1


class Asker:
    """Answers to requests, each asked for once in the life of its journal.

    Args:
        retries: further attempts at a request.
        pause: seconds before the second attempt; half of it at least, and doubled with each further one.
        max_tokens: the limit on answers that `complete` sends along.
    """

    def __init__(
        self,
        complete: Complete,
        journal: Journal,
        budget: Budget,
        *,
        retries: int,
        pause: float,
        max_tokens: int,
    ) -> None:
        self.complete, self.journal, self.budget = complete, journal, budget
        self.retries, self.pause, self.max_tokens = retries, pause, max_tokens
        self.problem: F2Error | None = None
        """Why no more is asked."""
        self._replies = 0
        self._not_before = 0.0  # on the clock of the event loop

    async def ask(self, request: Request) -> Ended | None:
        """How a request ended, now or in an earlier run; None where it has not, and why is known elsewhere.

        That is `problem`, or the budget, which `is_spent`.
        """
        if request.id not in self.journal:
            await self._attempts(request)
        return self.journal.get(request.id)

    async def _attempts(self, request: Request) -> None:
        form, replies = schema(request.form), self._replies
        bound = most_tokens([request.text, str(form)], self.max_tokens)
        for attempt in range(self.retries + 1):
            await self._until_allowed()
            async with self.budget.room_for(request.id, bound) as fits:
                if not fits or self.problem:
                    return
                ended, failed = await self._attempt(request, form, attempt)
                if failed and (failed.then != "again" or attempt == self.retries):
                    # Others that were answered since the attempt before tell that the server is well.
                    ended = ended._replace(
                        is_final=self._is_to_blame(request, failed, self._replies > replies)
                    )
                    if not ended.is_final:
                        self.problem = self.problem or _problem(failed, attempt + 1)
                self.journal.end(ended)
                replies = self._replies
            if ended.is_final or self.problem:
                return
            if failed:
                await self._rest(failed, attempt)

    def _is_to_blame(self, request: Request, failed: FailedError, is_well: bool) -> bool:
        """Whether it is the request, not the server, for which it failed to the last."""
        if failed.then == "again":
            return is_well or self.journal.failures[request.id] + 1 >= RUNS * (self.retries + 1)
        return failed.then == "never" and self.journal.answers > 0

    async def _attempt(
        self, request: Request, form: dict[str, Any], attempt: int
    ) -> tuple[Ended, FailedError | None]:
        try:
            reply = await self.complete(request.text, form, request.seed(attempt))
        except FailedError as failed:
            return Ended(request.id, failed.used, failed.reason, is_final=False), failed
        self._replies += 1
        try:
            answer = read(reply.text, request.form).model_dump()
        except UnreadableError as error:
            fault = "cut off" if reply.is_cut else str(error)
            is_final = attempt == self.retries
            return Ended(request.id, reply.used, fault, is_final, text=reply.text, model=reply.model), None
        return Ended(request.id, reply.used, answer=answer, model=reply.model), None

    async def _rest(self, failed: FailedError, attempt: int) -> None:
        """Wait before the next attempt; where the server named a time, nobody asks it before that."""
        if failed.wait is not None:
            now = asyncio.get_running_loop().time()
            self._not_before = max(self._not_before, now + failed.wait)
        pause = min(self.pause * 2**attempt, LONGEST_PAUSE)
        await asyncio.sleep(pause * random.uniform(0.5, 1))

    async def _until_allowed(self) -> None:
        while (left := self._not_before - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(left)


async def each(items: Iterable[Item], work: Callable[[Item], Awaitable[None]], at_once: int) -> None:
    """`work` on all items, on so many at once; they are taken from `items` only as their turn comes."""
    rest = iter(items)

    async def worker() -> None:
        for item in rest:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _problem(failed: FailedError, attempts: int) -> F2Error:
    said = f"{failed.reason}: {failed.detail}" if failed.detail else failed.reason
    if failed.then == "again":
        what = f"the model did not answer in {attempts} attempts ({said}); see that its server is up"
    else:
        what = f"the server refused ({said}); correct the url, the model or the key"
    return F2Error(f"{what}, and run the same again, which asks for nothing that is finished.")
