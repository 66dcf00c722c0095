"""The command around vocabulary trimming: which texts count, what a language keeps, what is refused."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from f2llm.compress.trimming import HELD_OUT, REPORT_FILE, trim_model
from f2llm.data.corpus_texts import iterate_corpus
from f2llm.data.rows import Source, read_rows, rows_table, write_rows
from f2llm.embed.embedder import Embedder
from f2llm.errors import UsageError
from f2llm.files import read_object
from f2llm.model.folder import Model, load_model, save_model

MakeModel = Callable[..., Model]


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    save_model(tmp_path / "whole", make_model())
    return tmp_path / "whole"


def test_a_corpus_is_all_queries_and_documents_with_their_languages(
    rows_folder: Path, tmp_path: Path
) -> None:
    table, _ = read_rows(rows_folder)
    expected = []
    for row in table.to_pylist():
        expected.append((row["query_lang"], row["query"]))
        expected += [(row["positive_lang"], text) for text in (*row["positives"], *row["negatives"])]
    assert sorted(iterate_corpus([rows_folder])) == sorted(expected)
    some = sorted(pair for pair in expected if pair[0] in ("fra", "hin"))
    assert sorted(iterate_corpus([rows_folder], {"fra", "hin"})) == some
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    assert (
        list(iterate_corpus([tmp_path / "x.txt", tmp_path / "x.txt"])) == [("und", "one"), ("und", "two")] * 2
    )
    with pytest.raises(UsageError, match=r"x.txt does not say of what language"):
        list(iterate_corpus([tmp_path / "x.txt"], {"fra"}))
    with pytest.raises(UsageError, match=r"y.txt is missing"):
        list(iterate_corpus([tmp_path / "y.txt"]))


def test_texts_of_the_corpus_keep_their_vectors_and_others_cost_tokens(
    folder: Path, things: list[dict[str, str]], tmp_path: Path
) -> None:
    french, hindi = (sorted({thing[language] for thing in things}) for language in ("fra", "hin"))
    (tmp_path / "french.txt").write_text("".join(f"{name}\n" for name in french))
    result = trim_model(folder, tmp_path / "out", [tmp_path / "french.txt"])
    whole, small = load_model(folder), load_model(tmp_path / "out")
    assert result.tokens == (whole.decoder.config.vocab_size, small.decoder.config.vocab_size)
    dropped = result.tokens[0] - result.tokens[1]
    assert result.parameters[0] - result.parameters[1] == dropped * whole.decoder.config.hidden_size > 0

    def same(texts: list[str]) -> list[bool]:
        one, other = (Embedder(path).encode(texts, prompt="query") for path in (folder, tmp_path / "out"))
        return [bool(np.allclose(*pair, atol=1e-5)) for pair in zip(one, other, strict=True)]

    learnt = [name for name in french if zlib.crc32(name.encode()) % HELD_OUT]
    assert all(same(learnt)) and len(learnt) > 10
    assert sum(same(hindi)) < len(hindi) / 2


def test_what_cannot_be_counted_is_refused(folder: Path, rows_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no text of deu to count"):
        trim_model(folder, tmp_path / "out", [rows_folder], languages={"deu"})
    with pytest.raises(
        UsageError, match="9 tokens were asked for, but bytes and special tokens alone are 258"
    ):
        trim_model(folder, tmp_path / "out", [rows_folder], keep=9)
    assert not (tmp_path / "out").exists()


def test_a_language_with_few_texts_has_its_share_of_a_budget(
    folder: Path, things: list[dict[str, str]], tmp_path: Path
) -> None:
    """However often the other language's texts come, it is their mean that counts: the same tokens are kept."""
    source = Source(name="s", format="retrieval", task="t", symmetric=True, instruction="", licence="unknown")
    names = [(thing[language], language) for thing in things for language in ("fra", "hin")]
    kept = {}
    for times in (1, 40):
        rows = [pair for pair in names for _ in range(times if pair[1] == "fra" else 1)]
        texts, langs = ([pair[i] for pair in rows] for i in (0, 1))
        columns: dict[str, list[Any]] = {
            "query": texts,
            "query_lang": langs,
            "positives": [[text] for text in texts],
        }
        write_rows(tmp_path / f"rows {times}", rows_table(source, columns), [source])
        trim_model(folder, tmp_path / f"out {times}", [tmp_path / f"rows {times}"], keep=300)
        kept[times] = read_object(tmp_path / f"out {times}" / REPORT_FILE)["kept"]
    assert len(kept[1]) == 300 and kept[1] == kept[40]
