"""Reading and writing files so that nothing half-written is ever seen, whatever kills the process."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from f2llm.errors import F2Error, UsageError

CHUNK_BYTES = 1 << 20
ROWS_IN_A_GROUP = 1 << 16  # of Parquet; stages on rows hold one group at a time


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary binary file beside `path`; on success it is fsynced and takes the name, else it goes away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp gives 0600; a model folder is to be shared
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder against a second run; the system lets go of it however this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as lock:
        try:
            # A record lock, unlike flock, is not kept alive by worker processes that outlive a killed parent.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise F2Error(
                f"{folder} is in use by another run (process {lock.read().strip() or 'unknown'}); "
                "wait until it ends or give another output."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; a missing or broken file is one clear sentence."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise F2Error(f"{path} is missing; check the path, or make the folder again.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise F2Error(f"{path} is not valid JSON ({error}); restore it or make the folder again.") from None


def read_object(path: Path) -> dict[str, Any]:
    """`read_json` for a file that must hold an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise F2Error(
            f"{path} holds a {type(value).__name__}, expected a JSON object; restore it or make the folder again."
        )
    return value


def write_table(path: Path, table: pa.Table) -> None:
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="zstd", row_group_size=ROWS_IN_A_GROUP)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_folder(folder: Path, skip: Iterable[str] = ()) -> str:
    """Hash of the names and contents of all files below `folder`, save those whose first path part is in `skip`."""
    skipped = set(skip)
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder)
        if relative.parts[0] not in skipped:
            digest.update(f"{relative.as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


@contextmanager
def complete_or_not_there(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to, which takes its name in the end."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} is there already; remove it, or name another folder.")
    folder = out.with_name(f".{out.name}.part")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(out.parent)
