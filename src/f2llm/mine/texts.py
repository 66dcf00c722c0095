"""The texts of retrieval rows, each once: on disk as the miner reads them, with a number and a vector each.

part of rows -> its distinct texts and their hashes, and which of them each row names      (each part alone, anywhere)
hashes of all parts -> numbers of the texts                                                (data/token_store_numbers.py)
8,192 texts at a time -> their vectors, in one mapped file                                 (each time alone)

Queries stand behind the instruction of their source, documents bare. Texts have a second number, that of what is left
when case and white space are made equal (their key), by which those that say the same are known; labels have one too.
Each file is complete or not there, so work that was killed goes on with those that are missing.

Shape suffixes: N distinct texts, D dims.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from f2llm.data.folded import fold
from f2llm.data.parts import Part, read_part
from f2llm.data.token_store_numbers import HashFile, number_texts, text_hashes
from f2llm.embed.embedder import Embedder
from f2llm.engine import map_items
from f2llm.files import atomic_write, read_json, write_json
from f2llm.mine.search import Numbers, Vectors

VECTORS = "vectors.f32"
FIRST_PLACES = "first_places.npy"
TEXTS_AT_ONCE = (
    8192  # encoded together: a vector may depend on its neighbours in the last digits, so it is fixed
)
NO_LABEL = -1
COLUMNS = ["query", "positives", "negatives", "label", "source", "query_lang", "positive_lang"]


@dataclass(frozen=True)
class PartRows:
    """The retrieval rows of a part as numbers."""

    row: Numbers  # of each of R rows, its place in the part
    source: list[str]
    query_lang: list[str]
    positive_lang: list[str]
    query: Numbers  # [R] number of the query's text, behind its instruction
    query_key: Numbers  # [R] key of the query's own text
    label_key: Numbers  # [R] NO_LABEL where there is none
    positives: Numbers  # [R] how many
    negatives: Numbers
    positive: Numbers  # numbers of their texts, row by row
    positive_key: Numbers
    negative: Numbers
    negative_key: Numbers


@dataclass(frozen=True)
class Corpus:
    """The distinct texts of rows that have been read; opened anew by each process."""

    work: Path
    counts: tuple[int, ...]  # distinct texts of each part
    key_counts: tuple[int, ...]

    @cached_property
    def _numbering(self) -> tuple[npt.NDArray[np.uint32], Numbers]:
        return number_texts(_hash_files(self.work, "texts", self.counts), self.work / "numbers-texts")

    @cached_property
    def _key_numbering(self) -> tuple[npt.NDArray[np.uint32], Numbers]:
        return number_texts(_hash_files(self.work, "keys", self.key_counts), self.work / "numbers-keys")

    @cached_property
    def _first_place(self) -> Numbers:
        """Where each text first stands, counted through all parts; numbers ascend in that order."""
        first: Numbers = np.load(self.work / FIRST_PLACES, mmap_mode="r")
        return first

    def __len__(self) -> int:
        return len(self._first_place)

    def number(self) -> None:
        """Give the texts their numbers, where that is not done."""
        numbers, _ = self._numbering
        if not (self.work / FIRST_PLACES).exists():
            with atomic_write(self.work / FIRST_PLACES) as file:
                np.save(file, np.unique(numbers, return_index=True)[1].astype(np.int64))
        _ = self._key_numbering

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("work", "counts", "key_counts")}

    def languages(self) -> list[str]:
        """Of the queries, sorted."""
        facts = (read_json(_at(self.work, part, "facts.json")) for part in range(len(self.counts)))
        return sorted({language for of_part in facts for language in of_part["query_lang"]})

    def rows(self, part: int) -> PartRows:
        numbers, starts = self._numbering
        keys, key_starts = self._key_numbering
        with np.load(_at(self.work, part, "rows.npz")) as saved:
            places = dict(saved)
        facts = read_json(_at(self.work, part, "facts.json"))
        columns: dict[str, Any] = {name: places[name] for name in ("row", "positives", "negatives")}
        for name in ("source", "query_lang", "positive_lang"):
            columns[name] = [facts[name][code] for code in places[name].tolist()]
        for name in ("query", "positive", "negative"):
            columns[name] = numbers[starts[part] + places[name]].astype(np.int64)
            key = keys[key_starts[part] + places[f"{name}_key"]]
            columns[f"{name}_key"] = key.astype(np.int64)
        label = places["label_key"]
        columns["label_key"] = np.where(
            label < 0, NO_LABEL, keys[np.minimum(key_starts[part] + label, len(keys) - 1)].astype(np.int64)
        )
        return PartRows(**columns)

    def texts(self, numbers: Numbers) -> pa.Array:
        """The texts of these numbers (large strings), in their order."""
        distinct, place = np.unique(numbers, return_inverse=True)
        starts = self._numbering[1]
        where = self._first_place[distinct]
        part = np.searchsorted(starts, where, side="right") - 1
        taken = [
            _stored_texts(_at(self.work, int(one), "texts.arrow")).take(
                pa.array(where[part == one] - starts[one])
            )
            for one in np.unique(part)
        ]
        whole = pa.chunked_array(taken, pa.large_string()).combine_chunks()
        return whole.take(pa.array(place))

    def vectors(self) -> Vectors:
        """Float32 [N, D], mapped."""
        width = read_json(self.work / "vectors.json")["dim"]
        mapped: Vectors = np.memmap(self.work / VECTORS, "<f4", mode="r", shape=(len(self), width))
        return mapped.view(np.ndarray)


def read_corpus(parts: Sequence[Part], prefixes: Mapping[str, str], work: Path) -> Corpus:
    """Read the rows of `parts` that are of retrieval, and number their texts.

    Args:
        prefixes: what stands in front of the queries of each retrieval source.
    """
    items = [_Reading(number, part, work, dict(prefixes)) for number, part in enumerate(parts)]
    facts = list(map_items(_read, items, what="read texts"))
    corpus = Corpus(work, tuple(fact["texts"] for fact in facts), tuple(fact["keys"] for fact in facts))
    corpus.number()
    return corpus


def _hash_files(work: Path, name: str, counts: Sequence[int]) -> list[HashFile]:
    return [HashFile(_at(work, number, f"{name}.hashes"), count) for number, count in enumerate(counts)]


def _at(work: Path, part: int, name: str) -> Path:
    return work / "parts" / f"{part:05}" / name


@lru_cache(maxsize=64)
def _stored_texts(path: Path) -> pa.ChunkedArray:
    """Mapped, not read."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["text"]


# --- Reading a part


@dataclass(frozen=True)
class _Reading:
    number: int
    part: Part
    work: Path
    prefixes: dict[str, str]


def _read(item: _Reading) -> dict[str, Any]:
    """Write a part's texts, the hashes of texts and keys, and its rows as places among these."""

    def at(name: str) -> Path:
        return _at(item.work, item.number, name)

    if at("facts.json").exists():
        return read_json(at("facts.json"))
    rows = read_part(item.part, COLUMNS)
    own = pc.is_in(rows["source"], pa.array(item.prefixes, pa.string()))
    rows = rows.filter(own)
    names, prefixes = list(item.prefixes), pa.array(item.prefixes.values(), pa.large_string())
    prefix = prefixes.take(pc.index_in(rows["source"], pa.array(names, pa.string())).combine_chunks())
    bare = {
        "query": _large(rows["query"]),
        "positive": _large(pc.list_flatten(rows["positives"])),
        "negative": _large(pc.list_flatten(rows["negatives"])),
    }
    asked = pc.binary_join_element_wise(prefix, bare["query"], pa.scalar("", pa.large_string()))
    texts, places = _distinct({**bare, "query": asked})
    keys, key_places = _keys(bare, rows)
    for name in ("positives", "negatives"):
        lengths = pc.fill_null(pc.list_value_length(rows[name]), 0)
        places[name] = lengths.to_numpy().astype(np.int64)
    places["row"] = np.flatnonzero(own.to_numpy())
    facts: dict[str, Any] = {"texts": len(texts), "keys": len(keys)}
    for name in ("source", "query_lang", "positive_lang"):
        encoded = rows[name].combine_chunks().dictionary_encode()
        facts[name] = encoded.dictionary.to_pylist()
        places[name] = _numpy(encoded.indices)
    with (
        atomic_write(at("texts.arrow")) as file,
        pa.ipc.new_file(file, pa.schema([("text", texts.type)])) as out,
    ):
        out.write_table(pa.table({"text": texts}))
    HashFile.write(at("texts.hashes"), text_hashes(texts.to_pylist()))
    HashFile.write(at("keys.hashes"), text_hashes(keys))
    with atomic_write(at("rows.npz")) as file:
        np.savez(file, allow_pickle=False, **places, **key_places)
    write_json(at("facts.json"), facts)
    return facts


def _large(column: pa.ChunkedArray) -> pa.Array:
    return column.cast(pa.large_string()).combine_chunks()


def _numpy(array: pa.Array) -> Numbers:
    numbers: Numbers = array.to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers


def _distinct(columns: Mapping[str, pa.Array]) -> tuple[pa.Array, dict[str, Numbers]]:
    """The texts of the columns, each once, and the places of all among these."""
    encoded = pa.concat_arrays(list(columns.values())).dictionary_encode()
    ends = np.cumsum([len(column) for column in columns.values()])[:-1]
    return encoded.dictionary, dict(zip(columns, np.split(_numpy(encoded.indices), ends), strict=True))


def _keys(bare: Mapping[str, pa.Array], rows: pa.Table) -> tuple[list[str], dict[str, Numbers]]:
    """What names the texts of the columns and the labels of the rows, each once, and the places of all among these."""
    texts, places = _distinct(bare)
    label = pc.binary_join_element_wise(rows["source"], rows["label"], "\x1f").combine_chunks()
    labels = label.dictionary_encode()
    written = ["t" + text for text in fold(texts).strings()] + [
        "l" + text for text in labels.dictionary.to_pylist()
    ]
    number: dict[str, int] = {}
    key = np.array([number.setdefault(one, len(number)) for one in written], np.int64)
    found = {f"{name}_key": key[place] for name, place in places.items()}
    label_place = _numpy(labels.indices.fill_null(-1))
    found["label_key"] = np.full(len(label_place), NO_LABEL)
    named = label_place >= 0
    found["label_key"][named] = key[len(texts) + label_place[named]]
    return list(number), found


# --- Vectors


@dataclass(frozen=True)
class Encoding:
    """Texts whose vectors are computed together."""

    corpus: Corpus
    model: Path
    dim: int | None
    first: int
    last: int


def plan_vectors(corpus: Corpus, model: Path, dim: int | None) -> list[Encoding]:
    """Make room for the vectors of all texts; what is to be done for them."""
    width = embedder(model).dim if dim is None else dim
    write_json(corpus.work / "vectors.json", {"dim": width})
    with open(corpus.work / VECTORS, "ab") as file:
        file.truncate(len(corpus) * width * 4)
    starts = range(0, len(corpus), TEXTS_AT_ONCE)
    return [Encoding(corpus, model, dim, first, min(first + TEXTS_AT_ONCE, len(corpus))) for first in starts]


def encode(item: Encoding) -> int:
    """Write the vectors of some texts to their place; returns how many texts."""
    done = item.corpus.work / "done" / f"vectors-{item.first // TEXTS_AT_ONCE:06}.json"
    if not done.exists():
        texts = item.corpus.texts(np.arange(item.first, item.last)).to_pylist()
        vectors_ND = embedder(item.model).encode(texts, dim=item.dim, too_long="truncate")
        shape = (len(item.corpus), vectors_ND.shape[1])
        mapped = np.memmap(item.corpus.work / VECTORS, "<f4", mode="r+", shape=shape)
        mapped[item.first : item.last] = vectors_ND
        mapped.flush()
        write_json(done, {"texts": len(texts)})
    return item.last - item.first


@lru_cache(maxsize=1)
def embedder(model: Path) -> Embedder:
    """The miner, read once in each process."""
    return Embedder(model)
