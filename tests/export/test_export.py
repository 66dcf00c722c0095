"""What every export has: facts, a whole folder or none, refusals in one sentence, a measure to be believed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from f2llm.data.names import collect
from f2llm.errors import F2Error, UsageError
from f2llm.export import export, onnx_model, runtimes
from f2llm.export.export import TARGETS, export_model
from f2llm.export.onnx_graph import Graph
from f2llm.export.parity import Side, measured, ndcg_at_10, neighbours_kept
from f2llm.export.runtimes import Vectors
from f2llm.export.sample import sample
from f2llm.model.folder import load_model, read_facts
from f2llm.tokenizer_file import load_tokenizer

pytest.importorskip("onnxruntime", reason="the export needs onnxruntime")


def test_the_folder_says_what_it_is(model_folder: Path, names: list[str], tmp_path: Path) -> None:
    parity = export_model(model_folder, tmp_path / "out", "onnx", dim=16, quantize="int8", texts=names)
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    facts = read_facts(model_folder)
    assert {name: written[name] for name in ("identity", "dim", "precision", "eos_id", "max_length")} == {
        "identity": facts.identity,
        "dim": 16,
        "precision": "int8",
        "eos_id": facts.eos_id,
        "max_length": facts.max_length,
    }
    assert written["matryoshka_sizes"] == [8, 16]
    assert written["parity"]["rows"][1]["smallest_cosine"] == parity.exported.smallest_cosine
    readme = (tmp_path / "out" / "README.md").read_text()
    assert facts.identity in readme and parity.render() in readme
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert parity.exported.megabytes == pytest.approx(size / 1e6, abs=0.01)


def test_an_export_is_replaced_and_anything_else_is_kept(
    model_folder: Path, names: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_model(model_folder, out, "onnx", texts=names[:3])
    export_model(model_folder, out, "static", texts=names[:3])
    assert not (out / "model.onnx").exists() and (out / "modules.json").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(UsageError, match="is no export"):
        export_model(model_folder, tmp_path / "mine", "onnx", texts=names[:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_failed_export_leaves_nothing_and_harms_nothing(
    model_folder: Path, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_model(model_folder, out, "onnx", texts=names[:3])
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "readme", fail)
    with pytest.raises(OSError, match="No space"):
        export_model(model_folder, out, "onnx", quantize="int8", texts=names[:3])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("to", "options", "expected"),
    [
        ("coreml", {}, "the target is 'coreml'"),
        (
            "onnx",
            {"quantize": "q8_0"},
            "onnx has no precision 'q8_0'; expected one of f32, int8, int8-weights",
        ),
        ("onnx", {"dim": 25}, "this model gives 1 to 24"),
        ("gguf", {"dim": 8}, "a GGUF file gives all 24"),
        ("onnx", {"texts": ["long " * 100]}, "none has 64 tokens or less"),
        ("onnx", {"texts": []}, "of 0 texts"),
    ],
)
def test_what_cannot_be_is_refused(
    model_folder: Path, tmp_path: Path, to: str, options: dict[str, object], expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        export_model(model_folder, tmp_path / "out", to, **options)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_a_missing_library_is_named(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(runtimes, "import_module", missing)
    with pytest.raises(F2Error, match=r"needs onnx, which is missing; install f2llm\[export\]"):
        export_model(model_folder, tmp_path / "out", "onnx")


def test_a_wrong_graph_does_not_look_right(
    model_folder: Path, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places_of = onnx_model._places

    def seeing_later(graph: Graph, blocks: int) -> onnx_model._Places:
        places = places_of(graph, 1)
        everything_LL = graph("Or", places.earlier_LL, graph("Not", places.earlier_LL))
        return replace(places, earlier_LL=everything_LL)

    monkeypatch.setattr(onnx_model, "_places", seeing_later)
    parity = export_model(model_folder, tmp_path / "out", "onnx", texts=names)
    assert parity.exported.smallest_cosine is not None and parity.exported.smallest_cosine < 0.99
    assert parity.exported.neighbours < 1


def test_our_own_sample_has_questions_and_lists(model_folder: Path) -> None:
    english = {name.text for name in collect(1, ["fra"]) if name.lang == "eng"}
    model = load_model(model_folder)
    found = sample(load_tokenizer(model_folder / "tokenizer.json"), 10_000, "Q: ", None)
    assert len(found.pairs) == 300 and max(map(len, found.texts)) > 200
    assert all(found.texts[answer] in english for _, answer in found.pairs)
    assert sum(text.startswith("Q: ") for text in found.prompted("Q: ")) == 300
    short = sample(model.tokenizer, 30, "Q: ", None)
    assert 0 < len(short.texts) < len(found.texts)
    by_text = {found.texts[q]: found.texts[a] for q, a in found.pairs}
    assert all(by_text[short.texts[q]] == short.texts[a] for q, a in short.pairs)


def test_every_target_has_a_readme_and_distinct_precisions(
    qwen_like_folder: Path, names: list[str], tmp_path: Path
) -> None:
    for to, target in TARGETS.items():
        for precision in target.precisions:
            pytest.importorskip(
                to if to in ("openvino", "gguf") else "onnxruntime", reason=f"{to} is not installed"
            )
            export_model(qwen_like_folder, tmp_path / "out", to, quantize=precision, texts=names[:2])
            readme = (tmp_path / "out" / "README.md").read_text()
            assert target.runtime in readme.splitlines()[0] and precision in readme
            assert "<" not in readme.replace("<module>", "")


def test_ndcg_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    vectors_ND = rng.standard_normal((40, 4)).astype(np.float32)
    pairs = [(question, 20 + question % 15) for question in range(20)]
    gains = []
    for question, answer in pairs:
        order = sorted({a for _, a in pairs}, key=lambda a: -float(vectors_ND[question] @ vectors_ND[a]))
        rank = order.index(answer) + 1
        gains.append(1 / np.log2(1 + rank) if rank <= 10 else 0)
    assert ndcg_at_10(vectors_ND, pairs) == pytest.approx(np.mean(gains))
    assert ndcg_at_10(np.zeros_like(vectors_ND), pairs) == 0  # all alike finds nothing


def test_neighbours_are_counted_without_the_text_itself() -> None:
    angles = np.array([0, 1, 2, 40, 41, 42], np.float32) / 50
    before_ND = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert neighbours_kept(before_ND, before_ND).tolist() == [1] * 6
    assert neighbours_kept(before_ND[:1], before_ND[:1]).tolist() == [1]
    far = np.concatenate([before_ND] * 4) * np.linspace(0.9, 1, 24, dtype=np.float32)[:, None]
    other = np.random.default_rng(0).standard_normal(far.shape).astype(np.float32)
    assert 0 < neighbours_kept(far, other).mean() < 0.9


def test_the_table_has_both_and_the_text_that_moved_most() -> None:
    unit_ND = np.eye(3, dtype=np.float32)
    moved_ND = unit_ND.copy()
    moved_ND[1] = [0.6, 0.8, 0]
    texts = ["a", "b", "c"]

    def side(vectors_ND: Vectors, runtime: str) -> Side:
        return Side(lambda some: vectors_ND[[texts.index(t) for t in some]], texts, 30, runtime, "f32", 1.5)

    parity = measured(side(unit_ND, "f2llm"), side(moved_ND, "other"), [(0, 2)])
    assert parity.furthest == "b"
    assert parity.exported.smallest_cosine == pytest.approx(0.8)
    assert parity.exported.mean_cosine == pytest.approx((1 + 0.8 + 1) / 3)
    assert parity.ndcg_change == 0
    lines = parity.render().splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1 and "0.800000" in lines[3]
