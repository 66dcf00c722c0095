"""Reading a token store: real and odd texts against plain tokenisation, and every kind of damage."""

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from f2llm.data.rows import Source, read_rows, read_sources, rows_table, write_rows
from f2llm.data.token_store import TokenStore, open_store
from f2llm.data.token_store_build import build
from f2llm.data.token_store_format import layout
from f2llm.errors import F2Error, UsageError
from f2llm.model.prompts import query_prefix
from f2llm.model.tokenizer import append_eos, encode
from f2llm.tokenizer_file import load_tokenizer

PREFIX = query_prefix("Find this name in another language")
FILE = "part-00000.bin"


@pytest.fixture(scope="module")
def store_folder(rows_folder: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    tokenizer.save(str(folder / "tokenizer.json"))
    prefixes = {source.name: query_prefix(source.instruction) for source in read_sources(rows_folder)}
    build([rows_folder], folder / "tokenizer.json", folder / "store", prefixes)
    return folder / "store"


def odd_texts(real: list[str], seed: int) -> list[str]:
    """Texts that begin, end and are made of whatever a rule about words may stumble over."""
    rng = random.Random(seed)
    pieces = [
        *(
            "",
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "\u00a0",
            "\u3000",
            "\u200b",
            "0",
            "12",
            "Ⅷ",
            "½",
            "१२",
            ".",
            "...",
            "'s",
            "'LL",
        ),
        *(
            "(",
            "«",
            "?!",
            "\u0301",
            "\u0e31",
            "\u094d",
            "\u200d",
            "👩‍👩‍👧",
            "🇫🇷",
            "水",
            "한국",
            "ไทย",
            "\u202e",
            "ß",
            "Word",
            "word",
        ),
        *("<|im_end|>", "<|eos|>", "<", ":", "Query: ", "\ufb01", "ı̇", "\x00"),
    ]
    mixed = ["".join(rng.choices(pieces, k=rng.randrange(1, 6))) for _ in range(400)]
    begun = [rng.choice(pieces) + text for text in real]
    return [text for text in dict.fromkeys([*pieces, *mixed, *begun]) if text]


def check_against_plain(path: Path, texts: list[str], eos: int, folder: Path, prefix: str) -> None:
    source = Source(
        name="s", format="retrieval", task="t", symmetric=True, instruction="i", licence="CC0-1.0"
    )
    columns: dict[str, list[Any]] = {
        "query": texts,
        "query_lang": ["und"] * len(texts),
        "positives": [[text] for text in texts],
    }
    write_rows(folder / "rows", rows_table(source, columns), [source])
    build([folder / "rows"], path, folder / "store", {"s": prefix})
    store, plain = open_store(folder / "store"), load_tokenizer(path)
    rows = store.rows(np.arange(len(texts)))
    for numbers, before in ((rows.query, ""), (rows.query_asked, prefix), (rows.positives_asked, prefix)):
        flat = np.concatenate([np.atleast_1d(number) for number in numbers])
        for longest in (1, 2, 7, 10_000):
            asked = [before + text for text in texts]
            expected = encode(plain, asked, eos_id=eos, max_length=longest, too_long="truncate")
            assert [tokens.tolist() for tokens in store.tokens(flat, longest)] == expected


def test_odd_texts_read_as_the_trainer_tokenises_them(
    tokenizer: Tokenizer, names: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    check_against_plain(path, odd_texts(names, 0), tokenizer.encode("").ids[-1], tmp_path, PREFIX)


def test_real_texts_read_as_qwen3_tokenises_them(shared: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / "qwen3" / "tokenizer.json")
    append_eos(tokenizer, "<|im_end|>")
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    files = [*shared.glob("data/retrieval/*.parquet"), shared / "data" / "parallel" / "udhr.parquet"]
    texts = []
    for file in sorted(files):
        column = "text" if file.name == "udhr.parquet" else "query"
        texts += pq.read_table(file, columns=[column])[column].to_pylist()[::997]
    assert len(texts) > 100
    # A prefix without a space at its end merges into the text; the whole is what counts.
    for number, prefix in enumerate((PREFIX, "Query:", "e")):
        folder = tmp_path / str(number)
        check_against_plain(path, odd_texts(texts, number), tokenizer.encode("").ids[-1], folder, prefix)


def test_a_large_vocabulary_is_stored_whole(tokenizer: Tokenizer, rows_folder: Path, tmp_path: Path) -> None:
    large = Tokenizer.from_str(tokenizer.to_str())
    large.add_tokens([f"<{n}>" for n in range(70_000)])
    large.save(str(tmp_path / "tokenizer.json"))
    source = Source(
        name="s", format="retrieval", task="t", symmetric=False, instruction="", licence="CC0-1.0"
    )
    columns: dict[str, list[Any]] = {
        "query": ["<69999>", "<1>"],
        "query_lang": ["und"] * 2,
        "positives": [["<68000>"], ["x"]],
    }
    write_rows(tmp_path / "rows", rows_table(source, columns), [source])
    build([tmp_path / "rows"], tmp_path / "tokenizer.json", tmp_path / "store", {})
    store = open_store(tmp_path / "store")
    (tokens,) = store.tokens(store.rows([0]).query)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == large.encode("<69999>").ids and tokens[0] > 1 << 16


def test_order_and_repetition_are_the_callers(store_folder: Path) -> None:
    store = open_store(store_folder)
    every = [tokens.tolist() for tokens in store.tokens(range(len(store)))]
    numbers = np.random.default_rng(0).integers(len(store), size=500)
    assert [tokens.tolist() for tokens in store.tokens(numbers)] == [every[n] for n in numbers]
    assert store.tokens([]) == []
    assert len(store.rows([]).query) == 0
    rows = store.rows(np.arange(store.row_count))
    picked = store.rows([5, 3, 5])
    for name, column in rows._asdict().items():
        for got, row in zip(getattr(picked, name), (5, 3, 5), strict=True):
            assert np.array_equal(got, column[row])
    assert (store.column("query") == rows.query).all()


def test_what_is_read_is_the_callers_own(store_folder: Path) -> None:
    store = open_store(store_folder)
    first, rows = store.tokens([0])[0], store.rows([0])
    before = first.tolist(), rows.positives[0].tolist()
    first[:], rows.positives[0][:] = 0, 0
    assert (store.tokens([0])[0].tolist(), store.rows([0]).positives[0].tolist()) == before


@pytest.mark.parametrize("number", [-1, 10**6, 2**40])
def test_numbers_that_are_not_there_are_refused(number: int, store_folder: Path) -> None:
    store = open_store(store_folder)
    with pytest.raises(UsageError, match=f"no text {number};"):
        store.tokens([0, number])
    with pytest.raises(UsageError, match=f"no row {number};"):
        store.rows([0, number])


def test_no_length_below_one(store_folder: Path) -> None:
    with pytest.raises(UsageError, match="at least its EOS"):
        open_store(store_folder).tokens([0], 0)


def read_everything(store: TokenStore) -> None:
    store.tokens(range(len(store)))
    store.rows(range(store.row_count))


def edit(path: Path, at: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.fixture
def copy(store_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store_folder, tmp_path / "copy"))


def place_of(store: TokenStore, column: str, item: int) -> int:
    """The byte at which an item of a column of part 0 begins."""
    dtype, start = layout(store.header.parts[0].counts, store.header.vocab_size)[0][column]
    return start + item * np.dtype(dtype).itemsize


@pytest.mark.parametrize(
    ("column", "item", "content"),
    [
        ("offsets", 3, (2**63 + 5).to_bytes(8, "little")),
        ("offsets", 3, (2**64 - 1).to_bytes(8, "little")),
        ("offsets", 3, (10**9).to_bytes(8, "little")),
        ("offsets", 3, bytes(8)),
        ("offsets", 0, bytes(8)),
        ("offsets", 3, (50).to_bytes(8, "little")),
        ("tokens", 0, b"\xff\xff"),
        ("tokens", -1, b"\x07\x00"),
        ("query", 2, (10**9).to_bytes(4, "little")),
        ("query", 2, b"\xff" * 4),
        ("query_asked", 2, (10**9).to_bytes(4, "little")),
        ("label", 2, (10**9).to_bytes(4, "little")),
        ("source", 2, b"\x09\x00"),
        ("query_lang", 2, b"\xff\x00"),
        ("positive_lang", 2, b"\xff\x00"),
        ("positives_offsets", 1, b"\xff" * 4),
        ("positives_offsets", 1, (10**6).to_bytes(4, "little")),
        ("positives", 4, (10**9).to_bytes(4, "little")),
        ("positives_asked", 4, (10**9).to_bytes(4, "little")),
        ("negatives_offsets", 1, (10**6).to_bytes(4, "little")),
    ],
)
def test_a_column_that_lies_is_named(column: str, item: int, content: bytes, copy: Path) -> None:
    store = open_store(copy)
    item %= store.header.parts[0].counts[column]
    edit(copy / FILE, place_of(store, column, item), content)
    with pytest.raises(F2Error, match=f"{FILE} is damaged"):
        read_everything(open_store(copy))
    with pytest.raises(F2Error, match=f"{FILE} was changed"):
        open_store(copy).verify()


def test_any_edited_byte_is_found_and_none_leads_astray(copy: Path) -> None:
    whole = (copy / FILE).read_bytes()
    open_store(copy).verify()
    rng, named = random.Random(0), []
    for _ in range(150):
        at = rng.randrange(len(whole))
        edit(copy / FILE, at, bytes([whole[at] ^ (1 << rng.randrange(8))]))
        store = open_store(copy)
        try:
            read_everything(store)
        except F2Error as error:
            named.append(FILE in str(error))
        with pytest.raises(F2Error, match=FILE):
            store.verify()
        edit(copy / FILE, at, whole[at : at + 1])
    open_store(copy).verify()
    assert named and all(named)


def test_a_file_of_another_length_is_named(copy: Path) -> None:
    whole = (copy / FILE).read_bytes()
    store = open_store(copy)
    for content in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
        (copy / FILE).write_bytes(content)
        with pytest.raises(F2Error, match=f"{FILE} has {len(content):,} bytes, expected {len(whole):,}"):
            open_store(copy)
        with pytest.raises(F2Error, match=f"{FILE} has"):  # opened before, mapped only now
            store.tokens([0])
    (copy / FILE).unlink()
    with pytest.raises(F2Error, match=f"{FILE} is missing"):
        open_store(copy)


def test_too_many_open_files_are_one_sentence(store_folder: Path) -> None:
    store, (soft, hard) = open_store(store_folder), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(F2Error, match=rf"{FILE} cannot be opened \(Too many open files\).*ulimit -n"):
            store.tokens([0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _more(counts: dict[str, Any], column: str) -> None:
    counts[column] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.update(version=9), "of version 1"),
        (lambda header: header.pop("parts"), "parts: Field required"),
        (lambda header: header.update(vocab_size=0), "vocab_size"),
        (lambda header: header["parts"][0].update(size="many"), "parts.0.size"),
        (lambda header: header["parts"][0]["counts"].pop("query"), "part 0 do not fit"),
        (lambda header: header["parts"][0]["counts"].update(tokens=-1), "part 0 do not fit"),
        *(
            (lambda header, column=column: _more(header["parts"][0]["counts"], column), "part 0 do not fit")
            for column in (
                "offsets",
                "query",
                "hash",
                "positives",
                "positives_asked",
                "negatives_offsets",
            )
        ),
    ],
)
def test_a_header_that_does_not_fit_is_named(change: Callable[[Any], Any], message: str, copy: Path) -> None:
    path = copy / "store.json"
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))
    with pytest.raises(F2Error, match=rf"store\.json.*{message}"):
        open_store(copy)


def test_a_count_that_the_padding_hides_is_found(copy: Path) -> None:
    path = copy / "store.json"
    header = json.loads(path.read_text())
    counts = header["parts"][0]["counts"]
    # One token more or less, whichever leaves every column where it was.
    counts["tokens"] += 1 if counts["tokens"] % 4 else -1
    path.write_text(json.dumps(header))
    with pytest.raises(F2Error, match=f"{FILE} is damaged: its offsets do not lead"):
        open_store(copy).tokens([0])


def test_a_folder_that_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(F2Error, match=r"store\.json is missing"):
        open_store(tmp_path)


def test_the_store_has_as_many_rows_as_the_folder(store_folder: Path, rows_folder: Path) -> None:
    assert open_store(store_folder).row_count == len(read_rows(rows_folder)[0])
