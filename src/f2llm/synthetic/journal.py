"""The journal: every answer is paid for once, so it is on disk before anything is done with it.

answers.jsonl has two kinds of lines. `{"begun": id, "bound": [in, out]}` is written before a request is sent, with the
most tokens it may cost; `{"ended": id, "used": [in, out], ...}` after it, with the answer or what was wrong. A request
that was begun and never ended (the process was killed, the connection broke) counts as if it had cost its bound. So
what the journal adds up to is never less than what was paid for, however often a run is stopped.

Answers are kept on disk alone; memory holds where each of them starts.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from f2llm.errors import F2Error
from f2llm.files import alone_in

ANSWERS = "answers.jsonl"


class Tokens(NamedTuple):
    """Tokens of a request and of its answer."""

    read: int
    written: int

    def plus(self, other: "Tokens") -> "Tokens":
        return Tokens(self.read + other.read, self.written + other.written)

    @property
    def both(self) -> int:
        return self.read + self.written


NO_TOKENS = Tokens(0, 0)


class Ended(NamedTuple):
    """How an attempt at a request ended."""

    id: str
    used: Tokens | None
    """None where nobody told: then it counts as the most it may have been."""
    fault: str | None = None
    """What was wrong, in a word or two; None where the answer is good."""
    is_final: bool = True
    """Whether the request is done, for good or bad."""
    answer: dict[str, Any] | None = None
    text: str | None = None
    """What was answered, where it could not be read."""
    model: str | None = None
    """Who answered, in the server's words."""


class Journal:
    """The attempts of a folder. Open and close it with `open_journal`."""

    def __init__(self, path: Path) -> None:
        self._finished: dict[str, int] = {}  # where the line starts that ends the request
        self._begun: dict[str, Tokens] = {}
        self.used, self.assumed = NO_TOKENS, NO_TOKENS
        """Tokens that servers told of, and those that are assumed where none did."""
        self.requests = 0
        self.answers = 0
        """Requests with a good answer."""
        self.faults: Counter[str] = Counter()
        """Of attempts, by what was wrong."""
        self.failures: Counter[str] = Counter()
        """The same, by request."""
        self._file = open(path, "a+b")  # noqa: SIM115
        self._read_all(path)

    @property
    def spent(self) -> Tokens:
        """Most tokens that all requests may have cost, those in flight included."""
        total = self.used.plus(self.assumed)
        for bound in self._begun.values():
            total = total.plus(bound)
        return total

    def __contains__(self, id: str) -> bool:
        return id in self._finished

    def get(self, id: str) -> Ended | None:
        """How a request ended; None where it is not finished."""
        if id not in self._finished:
            return None
        self._file.seek(self._finished[id])
        line = json.loads(self._file.readline())
        used = line["used"] and Tokens(*line["used"])
        return Ended(line["ended"], used, *(line.get(name) for name in Ended._fields[2:]))

    def begin(self, id: str, bound: Tokens) -> None:
        """Say that a request is about to be sent. A killed process does not lose it; a power cut may."""
        self._write({"begun": id, "bound": bound})
        self._note_begun(id, bound)

    def end(self, ended: Ended) -> None:
        """Write how an attempt ended; returns when it is on disk."""
        start = self._file.seek(0, os.SEEK_END)
        line = {"ended": ended.id, **ended._asdict()}
        del line["id"]
        self._write({name: value for name, value in line.items() if value is not None or name == "used"})
        os.fsync(self._file.fileno())
        self._note_ended(ended, start)

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _note_begun(self, id: str, bound: Tokens) -> None:
        self.requests += 1
        if id in self._begun:  # of a process that was killed
            self.assumed = self.assumed.plus(self._begun[id])
        self._begun[id] = bound

    def _note_ended(self, ended: Ended, start: int) -> None:
        bound = self._begun.pop(ended.id, NO_TOKENS)
        if ended.used is None:
            self.assumed = self.assumed.plus(bound)
        else:
            self.used = self.used.plus(ended.used)
        if ended.is_final:
            self._finished[ended.id] = start
        if ended.fault is None:
            self.answers += 1
        else:
            self.faults[ended.fault] += 1
            self.failures[ended.id] += 1

    def _read_all(self, path: Path) -> None:
        start = 0
        self._file.seek(0)
        for number, raw in enumerate(iter(self._file.readline, b""), 1):
            if not raw.endswith(b"\n"):  # the process was killed while it wrote
                break
            try:
                line = json.loads(raw)
                if "begun" in line:
                    self._note_begun(line["begun"], Tokens(*line["bound"]))
                else:
                    used = line["used"] and Tokens(*line["used"])
                    is_final = line["is_final"]
                    self._note_ended(Ended(line["ended"], used, line.get("fault"), is_final), start)
            except (ValueError, KeyError, TypeError):
                raise F2Error(
                    f"{path}:{number} is not a line of a journal; restore the file, or move it away to ask anew."
                ) from None
            start += len(raw)
        self._file.truncate(start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def open_journal(folder: Path) -> Iterator[Journal]:
    """The journal of a folder, which nobody else may write to meanwhile."""
    with alone_in(folder), Journal(folder / ANSWERS) as journal:
        yield journal
