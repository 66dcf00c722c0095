"""Golden vectors: what is written is what the model gives, and whatever gives something else is told."""

import base64
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from f2llm.embed.embedder import Embedder
from f2llm.model.folder import Model, save_model
from f2llm.verify.findings import Finding
from f2llm.verify.folder import verify_folder
from f2llm.verify.golden import GOLDEN_TEXTS, LARGEST_DISTANCE

MakeModel = Callable[..., Model]


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """A model that reads every one of the texts, with its golden vectors."""
    save_model(tmp_path / "model", make_model(max_length=4096))
    report = verify_folder(str(tmp_path / "model"), make_golden=True)
    assert report.findings["golden"].status == "pass" and not report.failed
    return tmp_path / "model"


def golden(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "golden.json").read_text())
    return content


def finding(folder: Path, **options: Any) -> Finding:
    return verify_folder(str(folder), **options).findings["golden"]


def test_the_texts_are_of_many_scripts_and_lengths() -> None:
    scripts = {unicodedata.name(c).split()[0] for text in GOLDEN_TEXTS for c in text if c.isalpha()}
    assert {"LATIN", "CYRILLIC", "CJK", "HIRAGANA", "HANGUL", "ARABIC", "DEVANAGARI", "THAI"} <= scripts
    assert {"HEBREW", "ETHIOPIC"} <= scripts
    assert min(map(len, GOLDEN_TEXTS)) == 0 and max(map(len, GOLDEN_TEXTS)) > 500
    assert len(set(GOLDEN_TEXTS)) == len(GOLDEN_TEXTS)


def test_what_is_written_are_the_models_vectors(folder: Path) -> None:
    content, embedder = golden(folder), Embedder(folder)
    assert content["texts"] == list(GOLDEN_TEXTS) and content["identity"] == embedder.identity
    assert content["prompts"] == {"document": "", "query": embedder.prefix("query", None)}
    for prompt in ("document", "query"):
        written = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in content["vectors"][prompt]]
        np.testing.assert_allclose(written, embedder.encode(GOLDEN_TEXTS, prompt=prompt), atol=1e-6)


def test_the_folder_passes_with_them_and_keeps_its_identity(folder: Path) -> None:
    report = verify_folder(str(folder))
    assert not report.failed
    said = report.findings["golden"].why
    assert float(said.split("distance ")[1].split()[0]) < 1e-5 and f"over {len(GOLDEN_TEXTS)} texts" in said


def test_texts_too_long_for_the_model_are_left_out(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    verify_folder(str(folder), make_golden=True)
    texts = golden(folder)["texts"]
    assert 0 < len(texts) < len(GOLDEN_TEXTS) and finding(folder).status == "pass"


def test_nothing_is_written_while_a_check_fails(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "1_Pooling" / "config.json").write_text("{}")
    report = verify_folder(str(folder), make_golden=True)
    assert "pooling" in report.failed and report.findings["golden"].status == "skip"
    assert not (folder / "golden.json").exists()


def test_another_model_is_told_by_its_identity_then_by_its_vectors(
    folder: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    identity = save_model(other, make_model(seed=1, max_length=4096)).identity
    content = golden(folder)
    assert f"is of the model {content['identity'][:16]}" in finding(other, golden=folder / "golden.json").why
    (other / "golden.json").write_text(json.dumps(content | {"identity": identity}))
    told = finding(other)
    assert told.status == "fail" and "more than 0.001" in told.why
    content["vectors"]["document"] = [v[:32] for v in content["vectors"]["document"]]
    (other / "golden.json").write_text(json.dumps(content | {"identity": identity}))
    assert "8 dimensions" not in told.why and "golden vectors have 6 dimensions" in finding(other).why


@pytest.mark.parametrize(("cosine_distance", "status"), [(0.5, "pass"), (2.0, "fail")])
def test_one_vector_that_moved_is_told_with_its_text(
    folder: Path, cosine_distance: float, status: str
) -> None:
    """Moved by a known angle, on either side of the limit."""
    content = golden(folder)
    number = 7
    vector = np.frombuffer(base64.b64decode(content["vectors"]["query"][number]), "<f4").astype(float)
    across = np.random.default_rng(0).normal(size=vector.shape)
    across -= (across @ vector) * vector
    across /= np.linalg.norm(across)
    angle = np.arccos(1 - cosine_distance * LARGEST_DISTANCE)
    moved = np.cos(angle) * vector + np.sin(angle) * across
    content["vectors"]["query"][number] = base64.b64encode(moved.astype("<f4").tobytes()).decode()
    (folder / "golden.json").write_text(json.dumps(content))
    told = finding(folder)
    assert told.status == status
    assert float(told.why.split("distance ")[1].split()[0]) == pytest.approx(
        cosine_distance * LARGEST_DISTANCE, rel=0.05
    )
    assert (content["texts"][number][:20] in told.why) == (status == "fail")


def test_another_prompt_is_told(folder: Path) -> None:
    content = golden(folder)
    content["prompts"]["query"] = "Query: "
    (folder / "golden.json").write_text(json.dumps(content))
    assert "'Query: ' in front of queries" in finding(folder).why


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("vectors"),
        lambda content: content.update(schema_version=2),
        lambda content: content["texts"].pop(),
        lambda content: content["vectors"].update(document=["no base64!"]),
        lambda content: content.update(texts=3),
    ],
)
def test_a_broken_file_is_one_failed_check(folder: Path, damage: Callable[[Any], object]) -> None:
    content = golden(folder)
    damage(content)
    (folder / "golden.json").write_text(json.dumps(content))
    report = verify_folder(str(folder))
    assert report.failed == ["golden"] and "golden.json" in report.findings["golden"].why
