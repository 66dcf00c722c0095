"""The token store against bare `tokenizers` (building it) and `datasets` (reading batches from it).

Building: texts of the development data, two a row, become a store, from Parquet files of rows to files of token
ids, with a worker process for each core; starting the workers counts. The peer only tokenises the same texts,
`encode_batch` with a thread for each core, at the best of several batch sizes, and throws the ids away.

Reading: a store of ten million documents of random token ids, their lengths spread like those of real texts. It is
opened in a fresh process, whose memory is that of the whole process, Python and libraries included. Then random
batches of 512 documents are read; the peer is a memory-mapped dataset of the same lists of ids, in the faster of its
formats that give lists or arrays, and in Arrow tables cut up by hand. All end in a list of NumPy arrays.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from f2llm.data.parts import write_part
from f2llm.data.rows import SOURCES_FILE, Source, rows_table
from f2llm.data.token_store_format import (
    COLUMNS,
    LABELS_FILE,
    NO_LABEL,
    STORE_FILE,
    TOKENS,
    VERSION,
    Header,
    PartFacts,
    layout,
    part_file,
)
from f2llm.files import sha256_file, write_json
from f2llm.model.tokenizer import append_eos, train_bpe
from f2llm.rng import generator
from f2llm.tokenizer_file import load_tokenizer
from harness import (
    ROOT,
    SHARED,
    Part,
    PeerMissing,
    Row,
    Worker,
    measured,
    skipped,
    take_turns,
    worker,
)
from inputs import EVERYTHING, FULL, QWEN3_EOS, SEED, SMALL, Size, draw_texts

BUILDING = Row("tokens/s of building, peer tokenizers' encode_batch alone", bar=0.85)
OPENING = Row("seconds to open a store of ten million documents", bar=0.1, better="lower")
RESIDENT = Row("resident MB of a process that opened ten million documents", bar=100, better="lower")
READING = Row("random batches of 512 documents a second, peer datasets", bar=5)
READING_ARROW = Row("random batches of 512 documents a second, peer datasets, its Arrow cut up by hand")

BATCH_SIZES = (256, 1024, 8192)  # texts, of encode_batch
PARTS = 8  # of rows
FORMATS = ("python", "numpy")  # of datasets
ARROW = "arrow"
PART_TEXTS, RECORDS = (
    1 << 16,
    1000,
)  # documents in a part of ours, and in a record batch of the peer's, its default
VOCABULARY, EOS = 151_669, 151_645
SOURCE = Source(
    name="texts", format="retrieval", task="t", symmetric=False, instruction="", licence="unknown"
)

OPEN = """
import sys, time
from pathlib import Path
from f2llm.data.token_store import open_store
started = time.perf_counter()
store = open_store(Path(sys.argv[1]))
seconds = time.perf_counter() - started
pages = int(Path("/proc/self/statm").read_text().split()[1])
import resource
print(len(store), seconds, pages * resource.getpagesize() / 2**20)
"""


def building(folder: Path, size: Size, count: int) -> Part:
    """Texts as rows, then ours and the peer in turns."""
    drawn, origin = draw_texts(size, EVERYTHING, 2 * count)
    texts = [drawn[place] for place in generator(SEED, "building").permutation(2 * count)]
    columns: dict[str, list[Any]] = {
        "query": texts[:count],
        "query_lang": ["und"] * count,
        "positives": [[text] for text in texts[count:]],
    }
    # More parts than workers, so that none of these waits long for the other at the end.
    table, rows = rows_table(SOURCE, columns), -(-count // PARTS)
    for number in range(PARTS):
        write_part(folder / "rows", number, table.slice(number * rows, rows))
    write_json(folder / "rows" / SOURCES_FILE, [SOURCE.model_dump()])
    write_json(folder / "texts.json", texts)
    path = SHARED / "tokenizers" / "qwen3" / "tokenizer.json"
    if size.real and path.exists():
        tokenizer = load_tokenizer(path)
        append_eos(tokenizer, QWEN3_EOS)
    else:
        tokenizer = train_bpe(texts, size.decoder.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    inputs = {"building": {"texts": len(texts), "origin": origin, "seed": SEED}}
    workers: dict[str, dict[str, Any]] = {}
    try:
        with (
            worker("token_store_ours", folder) as ours,
            worker("token_store_tokenizers", folder, peer=True) as peer,
        ):
            workers = {"ours, building": ours.facts, "tokenizers": peer.facts}
            batch_size, seconds = _fastest(peer, "encode_batch", "batch_size", BATCH_SIZES)
            contenders = {
                "ours": lambda: ours.call("build")["seconds"],
                "peer": lambda: peer.call("encode_batch", batch_size=batch_size),
            }
            medians = take_turns(contenders)
            facts = ours.call("build")
            tokens = peer.call("tokens")
    except PeerMissing as missing:
        return Part([skipped(BUILDING, str(missing))], inputs, workers)
    if facts["tokens"] != tokens or facts["texts"] != len(texts):
        raise SystemExit(f"ours stored {facts['tokens']} tokens, the peer made {tokens} of the same texts.")
    inputs["building"] |= {
        "tokens": tokens,
        "batch_size_of_peer": batch_size,
        "seconds_by_batch_size": seconds,
    }
    figure = measured(BUILDING, tokens / medians["ours"], tokens / medians["peer"])
    return Part([figure], inputs, workers)


def reading(folder: Path, documents: int) -> Part:
    """A store and a dataset of the same lists: opened, then read in turns."""
    tokens = write_both(folder, documents)
    os.sync()  # otherwise the first of the contenders to read waits for the disk to write
    opened = [
        subprocess.run(
            [sys.executable, "-c", OPEN, str(folder / "store")],
            env={"PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(4)
    ][1:]  # the first reads store.json from the disk
    seconds, megabytes = (float(np.median([float(line[place]) for line in opened])) for place in (1, 2))
    figures = [measured(OPENING, seconds), measured(RESIDENT, megabytes)]
    inputs: dict[str, Any] = {"reading": {"documents": documents, "tokens": tokens, "seed": SEED}}
    workers: dict[str, dict[str, Any]] = {}
    try:
        with (
            worker("token_store_ours", folder) as ours,
            worker("token_store_datasets", folder, peer=True) as peer,
        ):
            workers = {"ours, reading": ours.facts, "datasets": peer.facts}
            form, by_form = _fastest(peer, "read", "form", FORMATS)
            for _ in range(1 + len(FORMATS)):  # as often as the peer has read
                ours.call("read")
            if ours.call("sum_of_first", count=1000) != peer.call("sum_of_first", count=1000, form=form):
                raise SystemExit("ours and the peer do not hold the same lists of ids.")
            contenders: dict[str, Callable[[], float]] = {
                "ours": lambda: ours.call("read"),
                "peer": lambda: peer.call("read", form=form),
                "arrow": lambda: peer.call("read", form=ARROW),
            }
            medians = take_turns(contenders)
    except PeerMissing as missing:
        rows = (READING, READING_ARROW)
        return Part([*figures, *(skipped(row, str(missing)) for row in rows)], inputs, workers)
    inputs["reading"] |= {"format_of_peer": form, "seconds_by_format": by_form}
    speed = {name: 1 / median for name, median in medians.items()}
    figures += [
        measured(READING, speed["ours"], speed["peer"]),
        measured(READING_ARROW, speed["ours"], speed["arrow"]),
    ]
    return Part(figures, inputs, workers)


def _fastest(
    peer: Worker, command: str, option: str, values: tuple[Any, ...]
) -> tuple[Any, dict[str, float]]:
    """The value of an option with which a command takes the least time, and the seconds of all."""
    peer.call(command, **{option: values[0]})
    seconds = {value: peer.call(command, **{option: value}) for value in values}
    print(f"{command}, seconds by {option}: {seconds}", flush=True)
    return min(seconds, key=seconds.__getitem__), {str(key): value for key, value in seconds.items()}


def write_both(folder: Path, documents: int) -> int:
    """Write the documents as a store and as a dataset's Arrow file; returns their tokens."""
    (folder / "store").mkdir(parents=True)
    facts: list[PartFacts] = []
    total = 0
    schema = pa.schema([("ids", pa.list_(pa.uint32()))])
    with pa.OSFile(str(folder / "dataset.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for ids, offsets in random_documents(documents):
            first = sum(part.texts for part in facts)
            path = folder / "store" / part_file(len(facts))
            facts.append(write_store_part(path, ids, offsets, first))
            lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids))
            for batch in pa.table([lists], schema=schema).to_batches(RECORDS):
                stream.write_batch(batch)
            total += len(ids)
    header = Header(
        version=VERSION,
        tokenizer="",
        vocab_size=VOCABULARY,
        eos_id=EOS,
        prefixes={},
        sources=[SOURCE],
        languages=["und"],
        parts=facts,
    )
    write_json(folder / "store" / LABELS_FILE, {})
    write_json(folder / "store" / STORE_FILE, header.model_dump())
    return total


def random_documents(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids (uint32) and offsets (int64) of documents: log-normal lengths, 45 tokens at the median."""
    for first in range(0, count, PART_TEXTS):
        rng = generator(SEED, "documents", first)
        texts = min(PART_TEXTS, count - first)
        lengths = np.minimum(2048, 2 + rng.lognormal(3.8, 0.9, texts).astype(np.int64))
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        ids = rng.integers(EOS, size=offsets[-1], dtype=np.uint32)
        ids[offsets[1:] - 1] = EOS
        yield ids, offsets


def write_store_part(path: Path, ids: np.ndarray, offsets: np.ndarray, first: int) -> PartFacts:
    """A part in which each document is the query of a row."""
    texts = len(offsets) - 1
    none = np.zeros(texts + 1)
    columns = {
        TOKENS: np.concatenate(([EOS], ids)),
        "offsets": offsets + 1,
        "query": np.arange(first, first + texts),
        "label": np.full(texts, NO_LABEL),
        "positives_offsets": none,
        "negatives_offsets": none,
        **dict.fromkeys(("query_key", "source", "query_lang", "positive_lang", "hash"), none[:-1]),
    }
    counts = {name: len(columns.get(name, ())) for name in COLUMNS}
    places, size = layout(counts, VOCABULARY)
    with open(path, "wb") as file:
        for name, (dtype, at) in places.items():
            file.seek(at)
            file.write(columns.get(name, none[:0]).astype(dtype).tobytes())
        file.truncate(size)
    return PartFacts(size=size, sha256=sha256_file(path), counts=counts)


def token_store(folder: Path, small: bool) -> list[Part]:
    """Both comparisons, each in a folder of its own below `folder`."""
    return [
        building(folder / "building", SMALL if small else FULL, count=500 if small else 100_000),
        reading(folder / "reading", documents=5_000 if small else 10_000_000),
    ]
