"""The embedded store against a search by hand, and its refusal of a model that did not make it."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from f2llm.data.names import NAMES_FILE
from f2llm.embed.embedder import Embedder
from f2llm.errors import F2Error, UsageError
from f2llm.files import write_table
from f2llm.model.folder import save_model
from f2llm.recipe import IndexStage
from f2llm.search.store import build_index, index_stage, search


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.mark.parametrize("dim", [None, 8])
def test_hits_are_the_exact_nearest_texts(
    model: Path, names: list[str], tmp_path: Path, dim: int | None
) -> None:
    blank = [""] * len(names)
    build_index(model, names, blank, blank, tmp_path / "index", dim)
    embedder = Embedder(model)
    scores_N = embedder.encode(names, dim=dim) @ embedder.encode("Germany", prompt="query", dim=dim)
    hits = search(tmp_path / "index", "Germany", 5)
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores_N)[::-1][:5], atol=1e-5)
    for hit in hits:
        assert hit.score == pytest.approx(scores_N[names.index(hit.text)], abs=1e-5)


def test_an_index_moves_with_its_model_and_refuses_another(
    model: Path, make_model: object, names: list[str], tmp_path: Path
) -> None:
    blank = [""] * len(names)
    build_index(model, names, blank, blank, tmp_path / "index", None)
    before = search(tmp_path / "index", "Germany", 3)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(tmp_path / "index", moved / "index")
    shutil.move(model, moved / "model")
    assert search(moved / "index", "Germany", 3) == before
    save_model(moved / "model", make_model(seed=1))  # type: ignore[operator]
    with pytest.raises(F2Error, match="build the index again"):
        search(moved / "index", "Germany", 3)


def test_a_wrong_size_leaves_the_index_as_it_was(model: Path, names: list[str], tmp_path: Path) -> None:
    blank = [""] * len(names)
    build_index(model, names, blank, blank, tmp_path / "index", 8)
    before = search(tmp_path / "index", "Germany", 3)
    with pytest.raises(UsageError, match="dim is 999"):
        build_index(model, names, blank, blank, tmp_path / "index", 999)
    with pytest.raises(UsageError, match="no texts"):
        build_index(model, [], [], [], tmp_path / "index", 8)
    assert search(tmp_path / "index", "Germany", 3) == before


def test_the_names_stage_is_indexed_with_each_text_of_a_thing_once(model: Path, tmp_path: Path) -> None:
    rows = [
        ("territory:DE", "deu", "Deutschland"),
        ("territory:DE", "lux", "Deutschland"),
        ("territory:DE", "swa", "Ujerumani"),
        ("language:th", "eng", "Thai"),
        ("script:Thai", "eng", "Thai"),
    ]
    thing, lang, text = zip(*rows, strict=True)
    write_table(tmp_path / "data" / NAMES_FILE, pa.table({"thing": thing, "lang": lang, "text": text}))
    config = IndexStage(stage="index", data="names", model="large")
    facts = index_stage(config, data=tmp_path / "data", model=model, out=tmp_path / "index")
    assert facts["texts"] == 4
    found = {(hit.text, hit.thing): hit.lang for hit in search(tmp_path / "index", "Deutschland", 10)}
    assert found["Deutschland", "territory:DE"] == "deu, lux"
    assert {("Thai", "language:th"), ("Thai", "script:Thai")} <= found.keys()
