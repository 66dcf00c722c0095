"""Which files are meant, and their bytes: paths, folders and globs to files, compressed or not to a stream.

The endings tell everything: `pairs.jsonl.zst` is JSONL within Zstandard.
"""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from f2llm.errors import UsageError


def _zstandard(file: Path) -> Any:
    return pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")


def _zip(file: Path) -> Any:
    archive = zipfile.ZipFile(file)
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) != 1:
        raise UsageError(f"{file} holds {len(members)} files, expected one; unpack it and give the folder.")
    return archive.open(members[0])


PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
    ".zip": _zip,
}


def kind(file: Path) -> str:
    """The ending that tells how to read a file, compression aside: `.jsonl` of `pairs.jsonl.zst`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return ([suffix for suffix in suffixes if suffix not in PACKED] or [""])[-1]


def open_stream(file: Path) -> BinaryIO:
    """The bytes of a file, unpacked on the way."""
    unpack = PACKED.get(file.suffix.lower())
    return io.BufferedReader(unpack(file) if unpack else open(file, "rb", buffering=0), 1 << 20)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Say in one sentence what the system, or the library of a file's format, has against it."""
    try:
        yield
    except FileNotFoundError:
        raise UsageError(
            f"{file} is missing; check the path, which is relative to the current folder."
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, pa.ArrowException) as error:
        raise UsageError(f"{file} cannot be read ({error}); check the file.") from None


def find_files(patterns: Sequence[str], root: Path, kinds: Sequence[str]) -> list[Path]:
    """The files that `patterns` mean, in their order, each once; those of one pattern by name.

    Args:
        patterns: paths, folders (all files below with an ending in `kinds`, hidden ones left out) and globs (`**` for
            any depth), relative to `root`.

    Raises:
        UsageError: a pattern means no file.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = root / pattern
        if path.is_dir():
            files = [file for file in path.rglob("*") if kind(file) in kinds and not _hidden(file, path)]
        elif path.exists():
            files = [path]
        else:
            base = Path(path.anchor) if path.is_absolute() else Path()
            files = [file for file in base.glob(str(path.relative_to(base))) if not _hidden(file, base)]
        files = sorted(file for file in files if file.is_file())
        if not files:
            raise UsageError(
                f"{path} means no file of {', '.join(kinds)}; check the path, folder or pattern."
            )
        found |= dict.fromkeys(files)
    return list(found)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
