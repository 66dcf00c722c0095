"""A model of one's own: an http server on this machine that speaks the chat protocol, writes rows, and misbehaves.

What it writes is a function of the prompt alone. It counts every request, and the tokens of every answer that it began
to make, whether or not that answer arrives.
"""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.data.hub_server import serving

KEY = "sk-secret-1234567890"
LONG = " ".join(f"word{number}" for number in range(20))


@dataclass
class Seen:
    """One request, as the server met it."""

    prompt: str
    body: dict[str, Any]
    at: float
    status: int = 0
    drips: bool = False
    """The answer comes byte by byte."""


@dataclass
class Chat:
    """What the server does, and what it was asked."""

    address: str = ""
    misdeeds: Callable[[int, str], str] = lambda number, prompt: ""
    """From the number of the request (0, 1, ...) and its prompt to what goes wrong: `429`, `500`, `not json` ..."""
    change_row: Callable[[str, dict[str, str]], dict[str, str]] = lambda prompt, row: row
    """From a prompt and the good answer to the one that is given."""
    delay: float = 0.0
    retry_after: str = "0.3"
    seen: list[Seen] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    """Good answers by prompt."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    active: int = 0
    most_active: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def words_of(prompt: str) -> str:
    """Eight letters that depend on the prompt alone."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:8]


def answer_to(prompt: str) -> dict[str, Any]:
    """What a good model would write."""
    word = words_of(prompt)
    if count := re.search(r"Think up (\d+)", prompt):
        names = [f"{word} {number}" for number in range(int(count[1]))]
        if '"labels"' in prompt:
            labels = ["red", "green", "blue {known}"]
            return {"tasks": [{"task": f"Sort {name}.", "name": name, "labels": labels} for name in names]}
        return {"tasks": [{"task": f"Find {name}."} for name in names]}
    if label := re.search(r'"label": the label, copied letter by letter: (.*)', prompt):
        others = [one for one in ("red", "green") if one != label[1]]
        return {"text": f"{word} {LONG}", "label": label[1], "other_label": others[0]}
    return {part: f"{part} {word} {LONG}" for part in ("query", "positive", "negative")}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    chat: Chat

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        chat, length = self.chat, int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        prompt = body["messages"][0]["content"]
        with chat.lock:
            number = len(chat.seen)
            seen = Seen(prompt, body, time.monotonic())
            chat.seen.append(seen)
            chat.active += 1
            chat.most_active = max(chat.most_active, chat.active)
        try:
            time.sleep(chat.delay)
            misdeed = chat.misdeeds(number, prompt)
            if self.path != "/v1/chat/completions":
                self.send(seen, 404, {"error": "no such path"})
            elif self.headers.get("Authorization") != f"Bearer {KEY}":
                self.send(seen, 401, {"error": f"wrong key {self.headers.get('Authorization')}"})
            elif misdeed.isdigit():
                self.send(seen, int(misdeed), {"error": f"no luck with {KEY}"})
            elif misdeed.startswith("no "):
                name = misdeed.removeprefix("no ")
                refused = name in body
                if refused:
                    self.send(seen, 400, {"error": f"unknown parameter {name}"})
                else:
                    self.complete(seen, body, prompt, "")
            else:
                self.complete(seen, body, prompt, misdeed)
        finally:
            with chat.lock:
                chat.active -= 1

    def complete(self, seen: Seen, body: dict[str, Any], prompt: str, misdeed: str) -> None:
        chat = self.chat
        answer = answer_to(prompt)
        if "tasks" not in answer:
            answer = chat.change_row(prompt, answer)
        content = {
            "not json": "I am sorry, {no",
            "wrong schema": '{"query": 3}',
            "fences": f"<think>{{hm}}</think>Here:\n```json\n{json.dumps(answer)}\n```\nAnything else?",
        }.get(misdeed, json.dumps(answer))
        # A token is taken to have three bytes.
        limit: int = body.get("max_tokens") or body["max_completion_tokens"]
        read, written = len(json.dumps(body["messages"])) // 3, min(len(content) // 3, limit)
        with chat.lock:
            chat.tokens[0] += read
            chat.tokens[1] += written
            if misdeed in ("", "fences"):
                chat.answered[prompt] += 1
        if misdeed == "slow":
            time.sleep(0.6)
        if misdeed == "closed":
            self.close_connection = True
            self.connection.close()
            return
        seen.drips = misdeed == "drip"
        usage = {"prompt_tokens": read, "completion_tokens": written}
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        self.send(seen, 200, {"model": "tester-1", "choices": [choice], "usage": usage})

    def send(self, seen: Seen, status: int, value: dict[str, Any]) -> None:
        seen.status = status
        data = json.dumps(value).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status == 429:
                self.send_header("Retry-After", self.chat.retry_after)
            self.end_headers()
            for byte in data[:8] if seen.drips else b"":
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
            self.wfile.write(data[8:] if seen.drips else data)
        except OSError:  # who asked has gone
            self.close_connection = True

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):
            self.close_connection = True


@contextmanager
def serving_chat(**settings: Any) -> Iterator[Chat]:
    chat = Chat(**settings)
    with serving(type("ChatHandler", (Handler,), {"chat": chat})) as address:
        chat.address = f"{address}/v1"
        yield chat
