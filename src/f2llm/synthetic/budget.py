"""The budget: no request is sent that could carry the bill past the cap, whatever all those in flight will cost.

Each request is counted beforehand with the most it may cost: a token has at least a byte, so its text cannot have more
tokens than bytes, and its answer not more than the limit that is sent along. When an answer comes, what it really cost
takes the place of that bound, and requests that had no room may fit.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from f2llm.synthetic.journal import Journal, Tokens

FRAME_TOKENS = 256  # that a server may put around a message: roles, marks, its own words on JSON


def most_tokens(texts: list[str], max_tokens: int) -> Tokens:
    """More than a request can cost."""
    return Tokens(FRAME_TOKENS + sum(len(text.encode()) for text in texts), max_tokens)


@dataclass
class Budget:
    """Caps on what all requests of a journal cost together."""

    journal: Journal
    most_tokens: int | None
    most_money: float | None
    price_in: float
    """Of a million tokens that are sent."""
    price_out: float
    is_spent: bool = False
    """Whether a request was not sent for want of budget."""
    _in_flight: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def money(self, tokens: Tokens) -> float:
        return (tokens.read * self.price_in + tokens.written * self.price_out) / 1e6

    @asynccontextmanager
    async def room_for(self, id: str, bound: Tokens) -> AsyncIterator[bool]:
        """Begin a request in the journal, once it fits; False, and nothing begun, where it never will.

        The journal must know how the request ended before the block is left.
        """
        async with self._changed:
            while not (fits := self._fits(bound)) and self._in_flight:
                await self._changed.wait()
            if fits:
                self.journal.begin(id, bound)
                self._in_flight += 1
            else:
                self.is_spent = True
        try:
            yield fits
        finally:
            if fits:
                self._in_flight -= 1
                async with self._changed:
                    self._changed.notify_all()

    def _fits(self, bound: Tokens) -> bool:
        total = self.journal.spent.plus(bound)
        return (self.most_tokens is None or total.both <= self.most_tokens) and (
            self.most_money is None or self.money(total) <= self.most_money
        )
