"""A hub of one's own: an http server on this machine that has datasets and answers as the Hugging Face hub does.

ROOT/owner/name/REVISION/... are the files of each revision; `newest` says which one `main` is.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

INFO = re.compile(r"/api/datasets/(?P<repo>\w+/\w+)(/revision/(?P<revision>.+))?")
TREE = re.compile(r"/api/datasets/(?P<repo>\w+/\w+)/tree/(?P<revision>\w+)/?(?P<path>.*)")
PATHS = re.compile(r"/api/datasets/(?P<repo>\w+/\w+)/paths-info/(?P<revision>\w+)")
FILE = re.compile(r"/datasets/(?P<repo>\w+/\w+)/resolve/(?P<revision>\w+)/(?P<path>.+)")


@dataclass
class Hub:
    root: Path
    newest: str
    address: str = ""
    gated: set[str] = field(default_factory=set)

    def folder(self, found: re.Match[str]) -> Path:
        revision = found["revision"] or "main"
        return self.root / found["repo"] / (self.newest if revision == "main" else revision)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, body: bytes, code: int = 200, /, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object) -> None:
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := INFO.fullmatch(path):
            self.info(found)
        elif found := TREE.fullmatch(path):
            base = self.hub.folder(found)
            self.answer_json([entry(base, file) for file in sorted((base / found["path"]).rglob("*"))])
        elif found := FILE.fullmatch(path):
            self.file(found)
        else:
            self.answer(b"{}", 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        found = PATHS.fullmatch(unquote(urlsplit(self.path).path))
        assert found, f"the hub does not know {self.path}"
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        base = self.hub.folder(found)
        self.answer_json([entry(base, base / name) for name in wanted if (base / name).exists()])

    def info(self, found: re.Match[str]) -> None:
        folder = self.hub.folder(found)
        if not folder.is_dir():
            missing = "RevisionNotFound" if folder.parent.is_dir() else "RepoNotFound"
            self.answer(b"{}", 404, X_Error_Code=missing)
            return
        card = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
        self.answer_json({"id": found["repo"], "sha": folder.name, "cardData": card, "siblings": []})

    def file(self, found: re.Match[str]) -> None:
        folder = self.hub.folder(found)
        if found["repo"] in self.hub.gated:
            self.answer(b"", 401, X_Error_Code="GatedRepo")
            return
        path = folder / found["path"]
        if not path.is_file():
            self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=folder.name)
            return
        data = path.read_bytes()
        marks = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": folder.name}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            span = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            self.answer(part, 206, Content_Range=span, **marks)
        else:
            self.answer(data, **marks)


def entry(base: Path, file: Path) -> dict[str, object]:
    kind = "directory" if file.is_dir() else "file"
    return {"type": kind, "path": str(file.relative_to(base)), "size": file.stat().st_size, "oid": "0" * 40}


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address at which `handler` answers, in a thread of this process."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@contextmanager
def serving_hub(root: Path, newest: str) -> Iterator[Hub]:
    hub = Hub(root, newest)
    with serving(type("HubHandler", (Handler,), {"hub": hub})) as address:
        hub.address = address
        yield hub
