"""One file over http: whatever the connection does, the bytes in the end are the server's."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from tests.data.hub_server import serving

from f2llm.data.download import download
from f2llm.errors import F2Error, UsageError

CONTENT = bytes(range(256)) * 4000  # about 1 MB


@dataclass
class Server:
    """What the server does next, and what it was asked for."""

    address: str = ""
    content: bytes = CONTENT
    breaks_after: list[int] = field(default_factory=list)
    """Bytes after which each of the next answers breaks off."""
    takes_ranges: bool = True
    marked: bool = True
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            data, tag = state.content, f'"{hashlib.sha256(state.content).hexdigest()}"'
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            if not self.path.startswith("/rows"):
                self.send_error(404)
                return
            first = 0
            if asked and state.takes_ranges and self.headers.get("If-Range") == tag:
                first = int(asked.removeprefix("bytes=").removesuffix("-"))
                if first >= len(data):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data) - first))
            if state.marked:
                self.send_header("ETag", tag)
            self.end_headers()
            stop = state.breaks_after.pop(0) if state.breaks_after else len(data)
            self.wfile.write(data[first : first + stop])

    with serving(Handler) as address:
        state.address = f"{address}/rows.jsonl"
        yield state


def test_a_broken_connection_costs_no_byte(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    server.breaks_after = [300_000, 1]
    for come in ("300,000", "300,001"):
        with pytest.raises(F2Error, match=f"failed after {come} bytes"):
            download(server.address, path)
        assert not path.exists()
    download(server.address, path)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=300001-"]
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
    download(server.address, path)  # is here, so nobody is asked
    assert len(server.ranges) == 3


def test_a_file_that_changed_meanwhile_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    server.breaks_after = [300_000]
    with pytest.raises(F2Error):
        download(server.address, tmp_path / "rows.jsonl")
    server.content = CONTENT[::-1]
    download(server.address, tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("cannot", ["takes_ranges", "marked"])
def test_a_server_that_cannot_go_on_starts_again(server: Server, tmp_path: Path, cannot: str) -> None:
    setattr(server, cannot, False)
    server.breaks_after = [300_000]
    with pytest.raises(F2Error):
        download(server.address, tmp_path / "rows.jsonl")
    download(server.address, tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_bytes() == CONTENT


def test_stopped_after_the_last_byte(server: Server, tmp_path: Path) -> None:
    server.breaks_after = [300_000]
    with pytest.raises(F2Error):
        download(server.address, tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl.partial").write_bytes(CONTENT)
    download(server.address, tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_bytes() == CONTENT


def test_what_is_not_there_is_one_sentence(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="answers 404 Not Found; correct the address"):
        download(server.address.replace("rows", "none"), tmp_path / "none.jsonl")
    with pytest.raises(F2Error, match="the connection failed after 0 bytes"):
        download("http://127.0.0.1:1/rows.jsonl", tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())
