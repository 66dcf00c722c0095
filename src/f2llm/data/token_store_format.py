"""The files of a token store: names, columns of a part and where they lie in it, and what store.json says.

    store.json       what is in the store: tokenizer, sources, languages, and of each part its sizes and checksum
    part-00007.bin   one part: token ids of the texts that first appear in part 7 of the rows, and the rows of part 7
    labels.json      the labels of clustering and classification sources, and the numbers of their texts
    hashes/, done/   what appending needs (token_store_build.py); readers never open them

A part is its columns one after the other, little-endian, without any header: counts of items say where each begins.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from f2llm.data.rows import Source
from f2llm.errors import F2Error
from f2llm.files import read_json

STORE_FILE, LABELS_FILE = "store.json", "labels.json"
VERSION = 1
NO_LABEL = 2**32 - 1  # in place of a text's number
ALIGNED = 8  # bytes; every column of a part begins at a multiple

TOKENS = "tokens"
COLUMNS = {
    TOKENS: "",  # two or four bytes, as the vocabulary needs; an EOS, then text after text, each with its EOS
    "offsets": "<u8",  # where each text begins among the tokens, and where the last one ends
    "query": "<u4",
    "query_asked": "<u4",
    "query_key": "<u8",  # the first 64 bits of the hash of the query's text, to order rows by content
    "label": "<u4",
    "label_asked": "<u4",
    "source": "<u2",
    "query_lang": "<u2",
    "positive_lang": "<u2",
    "hash": "<u8",  # of the row, f2llm.data.rows.row_hash
    "positives_offsets": "<u4",
    "positives": "<u4",
    "positives_asked": "<u4",
    "negatives_offsets": "<u4",
    "negatives": "<u4",
    "negatives_asked": "<u4",
}
"""The columns of a part in their order in the file. Those of `ASKED` are left out of a part that has no prompts."""

ASKED = {f"{name}_asked": name for name in ("query", "label", "positives", "negatives")}
ROW_COLUMNS = ("query", "query_key", "label", "source", "query_lang", "positive_lang", "hash")
LISTS = ("positives", "negatives")


class PartFacts(BaseModel):
    """Sizes and checksum of a part."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: int
    """Bytes."""
    sha256: str
    counts: dict[str, int]
    """Items of each column."""

    @property
    def texts(self) -> int:
        return self.counts["offsets"] - 1

    @property
    def tokens(self) -> int:
        """Those of texts."""
        return self.counts[TOKENS] - 1

    @property
    def rows(self) -> int:
        return self.counts["query"]


class Header(BaseModel):
    """What store.json holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    tokenizer: str
    """SHA-256 of its tokenizer.json."""
    vocab_size: int = Field(gt=0)
    eos_id: int
    prefixes: dict[str, str]
    """What stands in front of the queries of each source."""
    sources: list[Source]
    languages: list[str]
    parts: list[PartFacts]


def part_file(number: int) -> str:
    return f"part-{number:05}.bin"


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def layout(counts: Mapping[str, int], vocab_size: int) -> tuple[dict[str, tuple[str, int]], int]:
    """Type and first byte of each column of a part, and the bytes of the whole."""
    places, end = {}, 0
    for name, fixed in COLUMNS.items():
        dtype = fixed or token_dtype(vocab_size)
        places[name] = (dtype, end)
        end += counts[name] * np.dtype(dtype).itemsize
        end += -end % ALIGNED
    return places, end


def read_header(folder: Path) -> Header:
    """What store.json says; F2Error where it is missing, of another version, or does not fit together."""
    path = folder / STORE_FILE
    value = read_json(path)
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise F2Error(f"{path} is not of a token store of version {VERSION}; make the store again.")
    try:
        header = Header.model_validate(value)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise F2Error(
            f"{path} is damaged ({where}: {error.errors()[0]['msg']}); make the store again."
        ) from None
    for number, part in enumerate(header.parts):
        if not _fits(part, header.vocab_size):
            raise F2Error(
                f"{path}: the columns of part {number} do not fit together or not its size; make the store again."
            )
    return header


def _fits(part: PartFacts, vocab_size: int) -> bool:
    counts = part.counts
    return (
        counts.keys() == COLUMNS.keys()
        and min(counts.values()) >= 0
        and part.texts >= 0
        and all(counts[name] == part.rows for name in ROW_COLUMNS)
        and all(counts[f"{name}_offsets"] == part.rows + 1 for name in LISTS)
        and all(counts[asked] in (0, counts[name]) for asked, name in ASKED.items())
        and layout(counts, vocab_size)[1] == part.size
    )


def check_size(path: Path, expected: int) -> None:
    """F2Error where a file is missing or not as long as it was written."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise F2Error(f"{path} is missing; make the token store again.") from None
    if size != expected:
        raise F2Error(f"{path} has {size:,} bytes, expected {expected:,}; make the token store again.")
