"""Files: the old one or the new one, never half of either; hashes that notice everything; errors that name the file."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm.errors import F2Error
from f2llm.files import (
    atomic_write,
    read_json,
    read_object,
    sha256_file,
    sha256_folder,
    write_json,
    write_table,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Writing


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_write(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert names(path.parent) == ["a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_write(path) as file:
            file.write(b"half of the ne")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from f2llm.files import atomic_write

with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"x" * 1_000_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=dict(os.environ), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    left = [name for name in names(tmp_path) if name != "a.txt"]
    assert all(name.startswith(".a.txt.") and name.endswith(".tmp") for name in left)
    write_text(path, "new")
    assert path.read_text() == "new"


def test_text_and_json_are_utf_8_and_readable(tmp_path: Path) -> None:
    value = {"z": ["नाम", "日本"], "a": {"x": None, "y": 1.5}}
    write_json(tmp_path / "a.json", value)
    content = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert "नाम" in content and content.endswith("}\n") and content.index('"z"') < content.index('"a"')
    assert read_json(tmp_path / "a.json") == value == read_object(tmp_path / "a.json")


def test_tables_come_back(tmp_path: Path) -> None:
    table = pa.table({"text": ["नाम", ""], "n": [1, None]})
    write_table(tmp_path / "t.parquet", table)
    assert pq.read_table(tmp_path / "t.parquet").equals(table)
    assert names(tmp_path) == ["t.parquet"]


# --- Reading


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"{'a': 1}"])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(
        F2Error, match=r"a\.json is not valid JSON \(.+\); restore it or make the folder again\.$"
    ):
        read_json(path)


def test_the_line_of_broken_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{\n  "a": 1,\n  "b" 2\n}')
    with pytest.raises(F2Error, match="line 3"):
        read_json(path)


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(F2Error, match=rf"{tmp_path}/a\.json is missing; check the path"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", ["[1]", "3", '"a"', "null"])
def test_json_that_is_no_object_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(F2Error, match=r"a\.json holds a \w+, expected a JSON object"):
        read_object(tmp_path / "a.json")


# --- Hashes


def test_file_hash_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "b").write_bytes(b"x" * 3_000_000)  # more than one chunk
    (tmp_path / "c").write_bytes(b"x" * 2_999_999 + b"y")
    assert sha256_file(tmp_path / "b") != sha256_file(tmp_path / "c")


def folder_of(path: Path, files: dict[str, str]) -> str:
    for name, content in files.items():
        write_text(path / name, content)
    return sha256_folder(path, skip=["manifest.json", "checkpoints"])


def test_folder_hash_notices_names_and_contents_and_nothing_else(tmp_path: Path) -> None:
    files = {"a.txt": "1", "b.txt": "2", "deep/c.txt": "3"}
    same = folder_of(tmp_path / "0", files)
    assert folder_of(tmp_path / "1", dict(reversed(files.items()))) == same
    os.utime(tmp_path / "1" / "a.txt", (1, 1))
    assert sha256_folder(tmp_path / "1") == same
    skipped = {**files, "manifest.json": "m", "checkpoints/step/w": "w"}
    assert folder_of(tmp_path / "2", skipped) == same
    variants = [
        {**files, "a.txt": "x"},
        {**files, "new.txt": ""},
        {"a.txt": "1", "b.txt": "2"},
        {"a.txt": "2", "b.txt": "1", "deep/c.txt": "3"},
        {"a.txt": "1", "b.txt": "2", "c.txt": "3"},
        {"a.txt": "1", "b.txt": "2", "Deep/c.txt": "3"},
        {**files, "deep/manifest.json": "m"},
    ]
    hashes = {folder_of(tmp_path / f"v{number}", variant) for number, variant in enumerate(variants)}
    assert len(hashes) == len(variants) and same not in hashes
