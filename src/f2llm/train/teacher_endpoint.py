"""Vectors from a server that speaks OpenAI's embeddings protocol (POST url/embeddings), for learning from them.

Shape suffixes: N texts, M texts of a request, T dims of the server's vectors.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt

from f2llm.endpoints import BUSY, in_one_line, seconds_to_wait
from f2llm.errors import F2Error

TEXTS_AT_ONCE = 64  # of a request; servers allow 32 to 2,048
ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE = (
    6,
    1.0,
    60.0,
)  # at a request; seconds before the second, doubled each time
TIMEOUT = 120.0  # seconds for an answer

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Endpoint:
    """The model `model` at `url` (as in `http://localhost:8000/v1`)."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)

    def width(self) -> int:
        """Of its vectors, by asking for one."""
        return int(self.vectors(["width"]).shape[1])

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """float32 [N, T], as the server gives them, which is of unit length nearly everywhere.

        Raises:
            F2Error: the server refuses, stays busy after ATTEMPTS, or answers with something else than N vectors of
                finite numbers.
        """
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with httpx2.Client(headers=headers, timeout=TIMEOUT) as client:
            parts = [
                self._ask(client, texts[at : at + TEXTS_AT_ONCE])
                for at in range(0, len(texts), TEXTS_AT_ONCE)
            ]
        if len({part.shape[1] for part in parts}) > 1:
            raise self._strange("vectors of several widths")
        return np.concatenate(parts)

    def _ask(self, client: httpx2.Client, texts: Sequence[str]) -> Vectors:
        body = {"model": self.model, "input": list(texts), "encoding_format": "float"}
        said = ""
        for pause in _pauses():
            wait: float | None = None
            try:
                answer = client.post(f"{self.url.rstrip('/')}/embeddings", json=body)
            except httpx2.TransportError as error:
                said = f"{type(error).__name__}: {error}"
            else:
                if answer.status_code == 200:
                    return self._read(answer, len(texts))
                said = f"status {answer.status_code}, {in_one_line(answer.text, self.key)}"
                if answer.status_code not in BUSY:
                    break
                wait = seconds_to_wait(answer.headers.get("Retry-After"))
            time.sleep(pause if wait is None or pause == 0 else min(wait, LONGEST_PAUSE))
        raise F2Error(
            f"the teacher {self.model} at {self.url} gave no vectors ({said}); mend that and start again, what a cache "
            "has is kept."
        )

    def _read(self, answer: httpx2.Response, count: int) -> Vectors:
        try:
            items: list[Any] = sorted(answer.json()["data"], key=lambda item: item["index"])
            found = np.array([item["embedding"] for item in items], np.float32)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
            raise self._strange("no list of embeddings") from None
        if [item["index"] for item in items] != list(range(count)) or found.ndim != 2:
            raise self._strange(f"vectors of shape {list(found.shape)}")
        if not np.isfinite(found).all():
            raise self._strange("numbers that are not finite")
        return found

    def _strange(self, what: str) -> F2Error:
        return F2Error(
            f"the teacher {self.model} at {self.url} answered with {what}, expected one vector of finite numbers for "
            "each text, all of one width; give the address of an embeddings server."
        )


def _pauses() -> Iterator[float]:
    """Seconds to wait after each attempt, should it fail; none after the last."""
    for attempt in range(ATTEMPTS - 1):
        yield min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)
    yield 0.0
