"""`f2llm serve` as a process: its address, its keys, and its end while requests are in work."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.serve.conftest import assert_same

from f2llm.cli_serve import app
from f2llm.embed.embedder import Embedder
from f2llm.errors import UsageError

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
import httpx
from typer.testing import CliRunner

from f2llm.serve.models import named

COMMAND = [sys.executable, "-c", "from f2llm.cli_serve import app; app()"]


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, on a free port, and its address."""
    running = subprocess.Popen(
        [*COMMAND, *arguments, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert running.stderr
        line = running.stderr.readline()
        address = re.search(r"http://\S+", line)
        assert address, line
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{address[0]}/health").status_code == 200:
                    break
            except httpx.ConnectError:
                pass
            time.sleep(0.02)
        yield running, address[0]
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_what_is_in_work_is_answered_before_the_end(
    model_folder: Path, embedder: Embedder, number: signal.Signals
) -> None:
    texts = [f"lion {n} " + "Égypte " * 8 for n in range(2048)]
    answers: list[httpx.Response] = []
    with process(f"mine={model_folder}") as (running, url):

        def ask() -> None:
            body = {"input": texts, "model": "mine"}
            answers.append(httpx.post(f"{url}/v1/embeddings", json=body, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        waiting = 0.0
        while not waiting:  # until the texts are in the queue
            found = re.search(r'f2llm_waiting_texts{model="mine"} (\S+)', httpx.get(f"{url}/metrics").text)
            assert found and asking.is_alive()
            waiting = float(found[1])
        running.send_signal(number)
        time.sleep(0.05)
        assert not answers, "the request was done too early to tell anything"
        _, errors = running.communicate(timeout=60)
        asking.join()
        assert running.returncode == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    (answer,) = answers
    assert answer.status_code == 200
    assert_same([item["embedding"] for item in answer.json()["data"]], embedder.encode(texts))
    lines = [json.loads(line) for line in errors.splitlines()]  # nothing but the log, and no traceback
    assert lines[-1]["texts"] == 2048 and lines[-1]["status"] == 200


def test_keys_from_a_file_and_from_the_environment(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-one\n\n  sk-two  \n")
    options = ["--api-keys", str(file), "--api-key-env", "THE_KEY"]
    with process(str(model_folder), *options, THE_KEY="sk-three") as (_, url):
        for key, status in (("sk-one", 200), ("sk-two", 200), ("sk-three", 200), ("sk-four", 401), ("", 401)):
            headers = {"authorization": f"Bearer {key}x"[:-1]} if key else {}
            answer = httpx.post(f"{url}/embed", json={"inputs": "lion"}, headers=headers)
            assert answer.status_code == status


def refused(*arguments: str) -> str:
    """The one sentence with which the verb refuses."""
    error = CliRunner().invoke(app, list(arguments)).exception
    assert isinstance(error, UsageError), error
    return str(error)


def test_wrong_use_is_told_in_one_sentence(model_folder: Path, tmp_path: Path) -> None:
    folder = str(model_folder)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"127.0.0.1:{port} cannot be listened on" in refused(folder, "--port", port)
    assert "not a folder" in refused(str(tmp_path / "nothing"), "--port", "0")
    assert "second model" in refused(folder, folder)
    assert "'NO_SUCH_KEY'" in refused(folder, "--api-key-env", "NO_SUCH_KEY")
    (tmp_path / "empty").write_text("\n \n")
    assert "no keys" in refused(folder, "--api-keys", str(tmp_path / "empty"))
    assert "cannot be read" in refused(folder, "--api-keys", str(tmp_path / "absent"))


def test_names_of_models(model_folder: Path) -> None:
    assert named([str(model_folder)]) == {model_folder.name: str(model_folder)}
    assert named(["owner/name", "x=owner/name"]) == {"owner/name": "owner/name", "x": "owner/name"}


def test_importing_the_server_stays_light() -> None:
    """What takes seconds to import is not needed to serve."""
    code = "import sys, f2llm.serve.server; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())
    assert "torch" in loaded and "f2llm.serve.app" in loaded
    heavy = {
        "transformers",
        "sentence_transformers",
        "huggingface_hub",
        "tiktoken",
        "babel",
        "sklearn",
        "pandas",
    }
    assert not loaded & heavy
