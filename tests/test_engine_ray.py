"""The Ray engine: a real cluster of this machine with two workers gives what worker processes give."""

from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from f2llm.data.clean_stage import clean_stage
from f2llm.data.rows import Source, rows_table, write_rows
from f2llm.data.token_store_build import build
from f2llm.engine import Engine, map_items, using
from f2llm.errors import F2Error
from f2llm.files import ROWS_IN_A_GROUP, sha256_folder
from f2llm.model.tokenizer import train_bpe
from f2llm.recipe_corpus import CleanStage

RAY, LOCAL = Engine("ray", workers=2), Engine(workers=2)
SOURCE = Source(
    name="pairs", format="retrieval", task="t", symmetric=False, instruction="Find it", licence="CC0-1.0"
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part and a bit of rows, some of them twice and some with characters that cleaning takes away."""
    folder = tmp_path_factory.mktemp("rows")
    count = ROWS_IN_A_GROUP + 2000
    query = [f"question {n % (count - 500)}" + "\x07" * (n % 7 == 0) for n in range(count)]
    columns: dict[str, list[Any]] = {
        "query": query,
        "positives": [[f"answer {n % (count - 500)}"] for n in range(count)],
        "query_lang": ["eng"] * count,
    }
    write_rows(folder, rows_table(SOURCE, columns), [SOURCE])
    return folder


@pytest.mark.slow
def test_ray_cleans_and_tokenises_as_worker_processes_do(rows: Path, tmp_path: Path) -> None:
    config = CleanStage(stage="clean", data=["rows"])
    tokenizer = tmp_path / "tokenizer.json"
    train_bpe(["question answer 0123456789"] * 3, 300).save(str(tokenizer))
    found = {}
    for name, engine in (("ray", RAY), ("local", LOCAL)):
        clean, store = tmp_path / name / "clean", tmp_path / name / "store"
        with using(engine):
            counted = clean_stage(config, [rows], clean, 1)
            facts = build([clean], tokenizer, store, {"pairs": "Find it: "})
        found[name] = counted, facts, sha256_folder(clean), sha256_folder(store)
    assert found["ray"][0]["dropped"] == {"exact duplicate": 500}
    assert found["ray"] == found["local"]


@pytest.mark.slow
def test_an_error_on_a_worker_is_one_sentence() -> None:
    with using(RAY):
        assert list(map_items(sqrt, [9.0, 4.0, 1.0], what="roots")) == [3.0, 2.0, 1.0]
        with pytest.raises(F2Error, match=r"^sqrt failed \(ValueError: math domain error\)"):
            list(map_items(sqrt, [1.0, -1.0], what="roots"))
