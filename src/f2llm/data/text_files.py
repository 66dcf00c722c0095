"""Records of text files, one at a time: JSONL, arrays of JSON, CSV, TSV and plain lines.

A record that cannot be read (broken JSON, too few fields, not UTF-8) is a fault in its place; the next one is read all
the same. An array of JSON alone has no such places to start from again: it is whole or refused.
"""

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from f2llm.errors import UsageError
from f2llm.files import CHUNK_BYTES

LONGEST = 1 << 26  # characters of one record; beyond that a quotation mark or a bracket was never closed
ALL = range(sys.maxsize)
SPACE = re.compile(r"\s*")
SHOWN = 200  # characters of a raw record that are worth keeping to find it again


class Fault(NamedTuple):
    """What is wrong with one record."""

    number: int
    """Of its line, row or item, from 1."""
    reason: str
    """In few words, the same for all faults of a kind: they are counted by it."""
    problem: str
    """In full: what was expected, what is there."""
    fix: str
    column: str | int | None = None
    """Its name, or for a line the place in it; None where it is the record as a whole."""
    raw: str = ""
    """How the record begins."""
    lang: str = "und"

    def sentence(self, file: Path | str, unit: str) -> str:
        """As in: pairs.jsonl, line 3, column 'query': expected a text, got 5; mend the row or leave it out."""
        column = "" if self.column is None else f", column {self.column!r}"
        return f"{file}, {unit} {self.number}{column}: {self.problem}; {self.fix}."


class Record(NamedTuple):
    """One record of a text file, and how much of the file it takes."""

    number: int
    values: dict[str, Any] | Fault
    size: int


# --- Lines


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes, str | Fault]]:
    """Number, bytes and text of each line, without the mark that some programs put before UTF-8."""
    offset = 0
    for number, raw in enumerate(stream, start=1):
        line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        try:
            yield number, raw, line.decode()
        except UnicodeDecodeError as error:
            place = offset + len(raw) - len(line) + error.start
            yield number, raw, _not_utf8(number, f"{error.reason} at byte {place}", line)
        offset += len(raw)


def _not_utf8(number: int, what: str, raw: bytes) -> Fault:
    shown = raw[:SHOWN].decode(errors="backslashreplace").rstrip()
    return Fault(number, "not UTF-8", f"is not UTF-8 ({what})", "save it as UTF-8", raw=shown)


def _jsonl(stream: BinaryIO, only: Container[int], file: Path) -> Iterator[Record]:
    index = -1
    for number, raw, line in _lines(stream):
        if isinstance(line, str) and not line.strip():
            continue
        index += 1
        if index in only:
            values = line if isinstance(line, Fault) else _parse(line, number)
            yield Record(number, values, len(raw))


def _parse(line: str, number: int) -> dict[str, Any] | Fault:
    try:
        values = json.loads(line.rstrip("\r\n"))  # a place after these would be in another line
    except (json.JSONDecodeError, RecursionError) as error:
        column, what = (
            (error.colno, error.msg) if isinstance(error, json.JSONDecodeError) else (1, "too deep")
        )
        problem = f"not valid JSON ({what})"
        return Fault(
            number, "broken JSON", problem, "write one JSON object a line", column, line[:SHOWN].rstrip()
        )
    return values if isinstance(values, dict) else _no_object(number, line, "write one object a line")


def _no_object(number: int, text: str, fix: str) -> Fault:
    text = text.strip()
    return Fault(
        number, "not a JSON object", f"expected a JSON object, got {text:.60}", fix, raw=text[:SHOWN]
    )


def _csv(stream: BinaryIO, only: Container[int], file: Path) -> Iterator[Record]:
    return _separated(stream, only, file, delimiter=",", strict=True)


def _tsv(stream: BinaryIO, only: Container[int], file: Path) -> Iterator[Record]:
    # In TSV a quotation mark is a letter.
    return _separated(stream, only, file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _separated(stream: BinaryIO, only: Container[int], file: Path, **dialect: Any) -> Iterator[Record]:
    csv.field_size_limit(LONGEST)  # documents are longer than the 128 KiB that csv takes for a slip
    faults: dict[int, Fault] = {}  # lines of the record being read that are not UTF-8
    size = 0

    def lines() -> Iterator[str]:
        nonlocal size
        for number, raw, line in _lines(stream):
            size += len(raw)
            if isinstance(line, Fault):
                faults[number] = line
                yield raw.decode(errors="replace")
            else:
                yield line

    reader = csv.reader(lines(), **dialect)
    header: list[str] | None = None
    index = -1
    while True:
        first, before = reader.line_num + 1, size
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fields = []
            faults[first] = Fault(first, "broken quotation marks", str(error), "check the quotation marks")
        fault = next(iter(faults.values()), None)
        if header is None:
            if fault:
                raise UsageError(fault.sentence(file, "line"))
            header = fields
            continue
        if not fields and not fault:
            continue
        index += 1
        if index in only:
            yield Record(first, fault or _fields(header, fields, first), size - before)
        faults.clear()


def _fields(header: list[str], fields: list[str], number: int) -> dict[str, Any] | Fault:
    if len(fields) == len(header):
        return dict(zip(header, fields, strict=True))
    return Fault(
        number,
        "wrong number of fields",
        f"expected {len(header)} columns as in the first line, got {len(fields)}",
        "check the separators and quotation marks",
        raw=" | ".join(fields)[:SHOWN],
    )


def _txt(stream: BinaryIO, only: Container[int], file: Path) -> Iterator[Record]:
    for number, raw, line in _lines(stream):
        if number - 1 in only:
            yield Record(number, line if isinstance(line, Fault) else {"text": line.rstrip("\r\n")}, len(raw))


# --- JSON arrays


def _json(stream: BinaryIO, only: Container[int], file: Path) -> Iterator[Record]:
    """The objects of an array, one at a time; a file of lines of JSON that is called .json is taken as such."""
    start = stream.peek(64)  # type: ignore[attr-defined]  # of BufferedReader
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{":
        yield from _jsonl(stream, only, file)
        return
    for index, (text, value) in enumerate(_items(stream, file)):
        if index in only:
            values = value if isinstance(value, dict) else _no_object(index + 1, text, "write an object")
            # Bytes that are not UTF-8 stand in the text as lone surrogates, which JSON writes as escapes.
            bad = not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)
            raw = text[:SHOWN].encode(errors="surrogateescape")
            yield Record(
                index + 1,
                _not_utf8(index + 1, "bytes that are no letters", raw) if bad else values,
                len(text),
            )


class _Text:
    """The text of a stream, of which no more is held than is being read."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self.stream, self.file = stream, file
        self.decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.parse = json.JSONDecoder().raw_decode
        self.held, self.place, self.ended = "", 0, False

    def refuse(self, what: str) -> UsageError:
        near = self.held[self.place : self.place + 40]
        return UsageError(
            f"{self.file} is not a JSON array ({what} at {near!r}); write one array of objects, or JSONL."
        )

    def more(self) -> None:
        """Hold as much again, so that a long item is not begun anew too often."""
        data = self.stream.read(max(CHUNK_BYTES, len(self.held) - self.place))
        self.ended = not data
        self.held, self.place = self.held[self.place :] + self.decode(data, final=self.ended), 0

    def ahead(self) -> str:
        """Go past white space; the letter that follows, none at the end."""
        while True:
            self.place = SPACE.match(self.held, self.place).end()  # type: ignore[union-attr]  # it matches nothing too
            if self.place < len(self.held) or self.ended:
                return self.held[self.place : self.place + 1]
            self.more()

    def expect(self, letters: str) -> str:
        """Go past white space and one of `letters`, and tell which."""
        letter = self.ahead()
        if not letter or letter not in letters:
            raise self.refuse(f"expected {' or '.join(letters)}, got {letter or 'the end'}")
        self.place += 1
        return letter

    def value(self) -> tuple[str, Any]:
        """Go past a value; its text, and itself."""
        self.ahead()
        while True:
            try:
                value, end = self.parse(self.held, self.place)
                if end < len(self.held) or self.ended:  # else a number may go on
                    text, self.place = self.held[self.place : end], end
                    return text, value
            except json.JSONDecodeError as error:
                if self.ended or len(self.held) - self.place > LONGEST:
                    raise self.refuse(error.msg) from None
            self.more()


def _items(stream: BinaryIO, file: Path) -> Iterator[tuple[str, Any]]:
    """Text and value of each item of an array."""
    text = _Text(stream, file)
    text.expect("[")
    if text.ahead() == "]":
        return
    while True:
        yield text.value()
        if text.expect(",]") == "]":
            return


Reader = Callable[[BinaryIO, Container[int], Path], Iterator[Record]]
READERS: dict[str, tuple[Reader, str]] = {
    ".jsonl": (_jsonl, "line"),
    ".ndjson": (_jsonl, "line"),
    ".json": (_json, "item"),
    ".csv": (_csv, "line"),
    ".tsv": (_tsv, "line"),
    ".txt": (_txt, "line"),
}
