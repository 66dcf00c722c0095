"""Waiting texts of many clients, and whose turn it is; knows neither threads nor the event loop.

Clients share by tokens, and the requests of a client share what it gets: a request is cut into texts, and the next
text is that of the client, and there of the request, that was served least. Who comes (back) starts at the share that
one waiting all the time would have had by now, the virtual time of fair queueing (Parekh and Gallager, 1993): it
neither waits for what others have had, nor makes up for its silence.

Shape suffixes: B texts of a batch, D dims.
"""

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count
from typing import Generic, Protocol, TypeVar

import numpy as np


class _Waiting(Protocol):
    """Something of which texts wait, that is, no batch has taken them."""

    texts: int
    tokens: int

    def next_length(self) -> int:
        """Tokens of the text that is next."""


@dataclass(eq=False)
class Request:
    """Texts of one call. Batches take them in order: the first `taken` have been in one."""

    client: str
    ids: Sequence[Sequence[int]]
    answer: asyncio.Future[np.ndarray]
    taken: int = 0
    pieces_BD: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.texts = len(self.ids)
        self.tokens = sum(map(len, self.ids))

    def next_length(self) -> int:
        return len(self.ids[self.taken])


@dataclass(frozen=True)
class Share:
    """Texts first ... stop - 1 of a request, which are in a batch."""

    request: Request
    first: int
    stop: int


W = TypeVar("W", bound=_Waiting)


class _Turns(Generic[W]):
    """Who of several is next: who was served least, in tokens.

    One with nothing left stays until its turn comes: going and coming back gains nothing.
    """

    def __init__(self) -> None:
        self._members: dict[Hashable, W] = {}
        self._order: list[tuple[float, int, Hashable]] = []  # a heap: served, who came first, key
        self._tickets = count()
        self._now = 0.0  # virtual time: tokens that one waiting all the time would have had

    def find(self, key: Hashable) -> W | None:
        return self._members.get(key)

    def join(self, key: Hashable, newcomer: W) -> None:
        self._members[key] = newcomer
        heappush(self._order, (self._now, next(self._tickets), key))

    def first(self) -> W | None:
        while self._order:
            key = self._order[0][-1]
            if self._members[key].texts:
                return self._members[key]
            heappop(self._order)
            del self._members[key]
        return None

    def serve(self, tokens: int) -> None:
        """Charge the first, before its tokens stop waiting."""
        served, _, key = self._order[0]
        heapreplace(self._order, (served + tokens, next(self._tickets), key))
        self._now += tokens / sum(1 for member in self._members.values() if member.texts)

    def ahead(self, tokens: int, but: W | None = None) -> int:
        """Tokens that the others get until one that comes now has had this many, about.

        Each gets as many, or the one text that is next, or all it waits for.
        """
        others = (member for member in self._members.values() if member.texts and member is not but)
        return sum(min(member.tokens, max(tokens, member.next_length())) for member in others)


class _Client:
    """What waits of one client."""

    def __init__(self) -> None:
        self.texts = self.tokens = 0
        self.requests = _Turns[Request]()

    def next_length(self) -> int:
        request = self.requests.first()
        return request.next_length() if request else 0


class FairQueue:
    """Waiting texts and whose turn it is; knows neither threads nor the event loop."""

    def __init__(self) -> None:
        self.texts = self.tokens = 0
        self._clients = _Turns[_Client]()

    def add(self, request: Request) -> None:
        client = self._clients.find(request.client)
        if client is None:
            client = _Client()
            self._clients.join(request.client, client)
        client.requests.join(request, request)
        self._count(client, request.texts, request.tokens)

    def remove(self, request: Request) -> None:
        """Forget what no batch has taken."""
        client = self._clients.find(request.client)
        if client and request.texts:
            self._count(client, -request.texts, -request.tokens)
            request.texts = request.tokens = 0

    def take(self, budget: int) -> list[Share]:
        """The next texts in fair order, at most `budget` tokens; a longer text is a batch of its own."""
        first: dict[Request, int] = {}
        tokens = 0
        while (client := self._clients.first()) and (request := client.requests.first()):
            length = request.next_length()
            if first and tokens + length > budget:
                break
            tokens += length
            first.setdefault(request, request.taken)
            self._clients.serve(length)
            client.requests.serve(length)
            request.taken += 1
            request.texts -= 1
            request.tokens -= length
            self._count(client, -1, -length)
        return [Share(request, start, request.taken) for request, start in first.items()]

    def ahead(self, name: str, tokens: int) -> int:
        """Tokens that would be computed before a further request of this client and so many tokens is done, about.

        Its own tokens are not among them.
        """
        client = self._clients.find(name)
        own = client.requests.ahead(tokens) if client else 0
        return own + self._clients.ahead(own + tokens, but=client)

    def _count(self, client: _Client, texts: int, tokens: int) -> None:
        for level in (self, client):
            level.texts += texts
            level.tokens += tokens
