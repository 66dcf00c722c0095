"""One request to a server that speaks OpenAI's chat protocol: text in, text and tokens out, or what went wrong.

Nothing is asked twice here; `asking` decides what a failure means. What a server may not know (a JSON schema, a seed,
a temperature, the old name of the limit) is left out from then on once it says so.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal, NamedTuple

import httpx2

from f2llm.endpoints import BUSY, NOT_ALLOWED, in_one_line, seconds_to_wait
from f2llm.progress import say
from f2llm.synthetic.journal import NO_TOKENS, Tokens

# Parameters that a server may refuse, and the name that it may know one by.
OPTIONAL: dict[str, str | None] = {
    "response_format": None,
    "seed": None,
    "temperature": None,
    "max_tokens": "max_completion_tokens",
}


class Reply(NamedTuple):
    """What a model wrote."""

    text: str
    used: Tokens | None
    """None where the server did not tell."""
    model: str | None = None
    is_cut: bool = False
    """Whether it stopped for the limit on tokens."""


class FailedError(Exception):
    """A request without an answer.

    Args:
        reason: in a word or two, to be counted.
        used: tokens it cost; None where nobody knows.
        then: what may help: to ask again, never to ask this again, or to stop and mend something first.
        wait: seconds that the server wants to be left alone.
        detail: what the server said.
    """

    def __init__(
        self,
        reason: str,
        used: Tokens | None,
        then: Literal["again", "never", "stop"] = "again",
        wait: float | None = None,
        detail: str = "",
    ) -> None:
        super().__init__(reason)
        self.reason, self.used, self.then, self.wait, self.detail = reason, used, then, wait, detail


Complete = Callable[[str, dict[str, Any], int], Awaitable[Reply]]
"""From a prompt, the JSON schema of the answer and a seed to the reply; raises FailedError."""


@asynccontextmanager
async def endpoint(
    url: str,
    model: str,
    *,
    key: str | None,
    at_once: int,
    timeout: float,
    temperature: float,
    max_tokens: int,
) -> AsyncIterator[Complete]:
    """The model `model` of the server at `url` (as in `http://localhost:8000/v1`).

    Args:
        key: sent along, and nowhere else: neither logged nor in an error's text.
        timeout: seconds for a whole answer.
    """
    parameters: dict[str, Any] = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
    refused: set[str] = set()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=at_once, max_keepalive_connections=at_once)

    def body(text: str, schema: dict[str, Any], seed: int) -> dict[str, Any]:
        form = {"name": "answer", "schema": schema, "strict": True}
        whole = {
            **parameters,
            "messages": [{"role": "user", "content": text}],
            "seed": seed,
            "response_format": {"type": "json_schema", "json_schema": form},
        }
        for name in refused:
            value = whole.pop(name)
            if other := OPTIONAL[name]:
                whole[other] = value
        return whole

    def drop(sent: dict[str, Any], said: str) -> bool:
        """Leave out from now on what the server refused, if it can be left out; whether to ask again at once."""
        names = [name for name in OPTIONAL if name in sent and name in said] or [
            name for name in ("response_format",) if name in sent
        ]
        for name in set(names) - refused:
            say(f"{url} does not take {name!r}; it is left out from now on.")
        refused.update(names)
        return bool(names)

    async def complete(text: str, schema: dict[str, Any], seed: int) -> Reply:
        while True:
            sent = body(text, schema, seed)
            answer = await _post(client, f"{url.rstrip('/')}/chat/completions", sent, timeout)
            if answer.status_code in (400, 422) and drop(sent, answer.text):
                continue
            if answer.status_code == 200:
                return _reply(answer)
            detail = in_one_line(answer.text, key)
            raise _failure(answer.status_code, answer.headers.get("Retry-After"), detail)

    async with httpx2.AsyncClient(headers=headers, limits=limits, timeout=timeout) as client:
        yield complete


async def _post(
    client: httpx2.AsyncClient, url: str, body: dict[str, Any], timeout: float
) -> httpx2.Response:
    try:
        async with asyncio.timeout(timeout):  # of the whole; the client's own is for each of its parts
            return await client.post(url, json=body)
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise FailedError("no connection", NO_TOKENS, detail=str(error)) from None
    except (TimeoutError, httpx2.TimeoutException):
        raise FailedError("timeout", None, detail=f"no answer within {timeout:g} seconds") from None
    except httpx2.TransportError as error:
        raise FailedError("connection broken", None, detail=str(error)) from None


def _reply(answer: httpx2.Response) -> Reply:
    try:
        value = answer.json()
        choice, usage = value["choices"][0], value.get("usage")
        used = usage and Tokens(int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
        text = choice["message"].get("content") or ""
        return Reply(str(text), used, value.get("model"), choice.get("finish_reason") == "length")
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
    ):
        raise FailedError("not a completion", None, detail="the answer is not one of a chat server") from None


def _failure(status: int, retry_after: str | None, detail: str) -> FailedError:
    if status in BUSY:
        return FailedError(str(status), NO_TOKENS, "again", seconds_to_wait(retry_after), detail)
    return FailedError(str(status), NO_TOKENS, "stop" if status in NOT_ALLOWED else "never", None, detail)
