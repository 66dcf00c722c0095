"""One file over http(s), so that a broken connection costs nothing: what has come stays, and the next call goes on.

What has come so far is in `NAME.partial`, and in `NAME.partial.json` how the server marked that very file (ETag, or
when it was last changed). The next call asks for the rest on the condition that the mark is the same; where the server
cannot go on, or the file is another by now, it starts from the beginning.
"""

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from f2llm.errors import F2Error, UsageError
from f2llm.files import CHUNK_BYTES, read_object, sync_folder, write_json
from f2llm.progress import progress

TIMEOUT = 60.0  # seconds without a byte


def download(url: str, path: Path) -> None:
    """Fetch `url` to `path`, which is complete or not there; one that is there is left alone.

    Raises F2Error where the connection breaks (what has come is kept), UsageError where there is no such file.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, marks = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.partial.json")
    with _plain_answers(url, partial), _open(url, partial, marks) as answer:
        begun = _begun(answer)
        expected = answer.headers.get("Content-Length")
        total = None if expected is None else begun + int(expected)
        if not begun:
            partial.unlink(missing_ok=True)  # of another file, by its mark
            write_json(marks, {"url": url, "mark": _mark(answer)})
        with (
            open(partial, "ab") as file,
            progress(total=total, what=f"fetch {path.name}", unit="B") as bar,
        ):
            bar.advance(begun)
            while chunk := answer.read1(CHUNK_BYTES):
                file.write(chunk)
                bar.advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        if total is not None and partial.stat().st_size < total:
            raise http.client.IncompleteRead(b"")
    os.replace(partial, path)
    sync_folder(path.parent)
    marks.unlink()


def _open(url: str, partial: Path, marks: Path) -> http.client.HTTPResponse:
    headers = {"User-Agent": "f2llm", "Accept-Encoding": "identity"}
    known = read_object(marks) if marks.exists() and partial.exists() else {}
    if known.get("url") == url and known.get("mark") and partial.stat().st_size:
        headers |= {"Range": f"bytes={partial.stat().st_size}-", "If-Range": known["mark"]}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or "Range" not in headers:
            raise
        marks.unlink()  # nothing is left to come, so what is here is not what the server has
        return _open(url, partial, marks)
    assert isinstance(answer, http.client.HTTPResponse)
    return answer


def _begun(answer: http.client.HTTPResponse) -> int:
    """The first byte that the server sends: `Content-Range: bytes 100-199/200`."""
    if answer.status != 206:
        return 0
    return int(answer.headers["Content-Range"].removeprefix("bytes ").partition("-")[0])


def _mark(answer: http.client.HTTPResponse) -> str | None:
    """What tells this very content from another at the same address; a weak ETag does not."""
    tag = answer.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified")


@contextmanager
def _plain_answers(url: str, partial: Path) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        raise UsageError(
            f"{url} answers {error.code} {error.reason}; correct the address, or download the file by hand."
        ) from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        come = partial.stat().st_size if partial.exists() else 0
        reason = getattr(error, "reason", None) or type(error).__name__
        raise F2Error(
            f"{url}: the connection failed after {come:,} bytes ({reason}), which are kept; run the same command "
            "again to go on, or download the file by hand."
        ) from None
