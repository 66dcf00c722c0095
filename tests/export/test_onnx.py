"""ONNX and OpenVINO files in their own runtimes against the model that they were made from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.export.conftest import LIMIT, cosines

from f2llm.embed.embedder import Embedder
from f2llm.export import onnx_model
from f2llm.export.export import export_model
from f2llm.export.onnx_graph import Graph, int8_linear, quantised
from f2llm.export.runtimes import Vectors, onnx_encode, openvino_encode, rectangle, require
from f2llm.model.folder import Model, save_model
from f2llm.tokenizer_file import load_tokenizer

pytest.importorskip("onnx", reason="the export needs onnx")
pytest.importorskip("onnxruntime", reason="the export needs onnxruntime")

ENCODE = {"onnx": onnx_encode, "openvino": openvino_encode}
KINDS = [
    ("onnx", "f32"),
    ("onnx", "int8"),
    ("onnx", "int8-weights"),
    ("openvino", "f32"),
    ("openvino", "f16"),
    ("openvino", "int8"),
]
LEAST = {"f32": 0.9999, "f16": 0.9999, "int8": 0.98, "int8-weights": 0.98}

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def export(model_folder: Path, names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The tiny model's export, made once for each target, precision and dim."""
    made: dict[tuple[str, str, int | None], Path] = {}

    def get(to: str, precision: str, dim: int | None = None) -> Path:
        pytest.importorskip(to.replace("onnx", "onnxruntime"), reason=f"the export needs {to}")
        if (to, precision, dim) not in made:
            out = tmp_path_factory.mktemp("export") / to
            export_model(model_folder, out, to, quantize=precision, dim=dim, texts=names[:5])
            made[to, precision, dim] = out
        return made[to, precision, dim]

    return get


def vectors_of(folder: Path, to: str, ids_NL: Any, mask_NL: Any) -> Vectors:
    """By the runtime alone."""
    feeds = {"input_ids": ids_NL, "attention_mask": mask_NL}
    if to == "onnx":
        session = require("onnxruntime").InferenceSession(folder / "model.onnx")
        found: Vectors = session.run(["sentence_embedding"], feeds)[0]
        return found
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = require("openvino").Core().compile_model(folder / "openvino_model.xml", "CPU", hint)
    return np.array(compiled(feeds)["sentence_embedding"])


@pytest.mark.parametrize(("to", "precision"), KINDS)
def test_vectors_are_the_models(
    export: Export, model_folder: Path, texts: list[str], to: str, precision: str
) -> None:
    found_ND = ENCODE[to](export(to, precision), LIMIT)(texts)
    expected_ND = Embedder(model_folder).encode(texts)
    assert cosines(found_ND, expected_ND).min() > LEAST[precision]


@pytest.mark.parametrize(("to", "precision"), KINDS)
@pytest.mark.parametrize("left", [False, True])
def test_padding_and_neighbours_change_nothing(
    export: Export, model_folder: Path, texts: list[str], to: str, precision: str, left: bool
) -> None:
    folder = export(to, precision)
    ids = [encoded.ids for encoded in load_tokenizer(folder / "tokenizer.json").encode_batch(texts)]
    alone_ND = np.concatenate([vectors_of(folder, to, *rectangle([one])) for one in ids[-6:]])
    # Padding with a token that means something, and in two batches of different width.
    for others in (ids[:10], []):
        batch_ND = vectors_of(folder, to, *rectangle([*others, *ids[-6:]], left=left, fill=300))[-6:]
        assert cosines(batch_ND, alone_ND).min() > 0.99999
    both = [ids[3], ids[3]]  # the same text padded on either side of a longer one
    wide_ids, wide_mask = rectangle([both[0], ids[-1]], left=left)
    twice_ND = vectors_of(folder, to, np.concatenate([wide_ids] * 2), np.concatenate([wide_mask] * 2))
    assert cosines(twice_ND[:2], twice_ND[2:]).min() > 0.999999


@pytest.mark.parametrize(("to", "precision"), [("onnx", "f32"), ("onnx", "int8"), ("openvino", "f32")])
def test_a_smaller_size_is_cut_then_normalised(
    export: Export, model_folder: Path, texts: list[str], to: str, precision: str
) -> None:
    found_ND = ENCODE[to](export(to, precision, 8), LIMIT)(texts)
    assert found_ND.shape == (len(texts), 8)
    assert cosines(found_ND, Embedder(model_folder).encode(texts, dim=8)).min() > LEAST[precision]


def test_texts_at_and_beyond_the_limit_end_in_eos(
    export: Export, model_folder: Path, names: list[str]
) -> None:
    folder, embedder = export("onnx", "f32"), Embedder(model_folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    long = ", ".join(names)
    words = 1
    while len(tokenizer.encode(long[: words + 1]).ids) <= LIMIT:
        words += 1
    at_limit = long[:words]
    assert len(tokenizer.encode(at_limit).ids) == LIMIT
    tokenizer.enable_truncation(LIMIT)
    assert [len(tokenizer.encode(text).ids) for text in (at_limit, long)] == [LIMIT, LIMIT]
    assert tokenizer.encode(long).ids[-1] == embedder.facts.eos_id
    found_ND = onnx_encode(folder, LIMIT)([at_limit, long])
    assert cosines(found_ND, embedder.encode([at_limit, long], too_long="truncate")).min() > 0.9999


@pytest.mark.parametrize(
    "shape",
    [{"num_hidden_layers": 1}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"rope_theta": 100.0}],
)
def test_other_shapes(
    make_model: Callable[..., Model], texts: list[str], tmp_path: Path, shape: dict[str, Any]
) -> None:
    save_model(tmp_path / "model", make_model(**shape))
    parity = export_model(tmp_path / "model", tmp_path / "out", "onnx", texts=texts)
    assert parity.exported.smallest_cosine is not None and parity.exported.smallest_cosine > 0.9999


@pytest.mark.parametrize(("to", "precision"), KINDS)
def test_weights_of_large_models_stand_beside_the_graph(
    model_folder: Path,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: str,
    precision: str,
) -> None:
    pytest.importorskip(to.replace("onnx", "onnxruntime"), reason=f"the export needs {to}")
    monkeypatch.setattr(onnx_model, "MOST_IN_ONE_FILE", 0)
    parity = export_model(model_folder, tmp_path / "out", to, quantize=precision, texts=texts)
    names = {
        path.name
        for path in (tmp_path / "out").iterdir()
        if path.name.partition(".")[2] not in ("json", "md")
    }
    whole = {
        "onnx": {"model.onnx", "model.onnx.data"},
        "openvino": {"openvino_model.xml", "openvino_model.bin"},
    }
    assert names == whole[to]
    assert parity.exported.smallest_cosine is not None and parity.exported.smallest_cosine > LEAST[precision]


@pytest.mark.parametrize("precision", ["f32", "int8", "int8-weights"])
def test_the_file_is_standard_onnx_and_small(export: Export, precision: str) -> None:
    import onnx

    model = onnx.load(export("onnx", precision) / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    matrices = [
        tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 1
    ]
    assert len(matrices) == 1 + 2 * 7
    expected = onnx.TensorProto.INT8 if precision != "f32" else onnx.TensorProto.FLOAT
    assert {tensor.data_type for tensor in matrices} == {expected}


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_the_code_in_the_readme_works(
    export: Export, model_folder: Path, names: list[str], monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    folder = export(to, "f32")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    defined: dict[str, Any] = {}
    exec(code, defined)
    assert cosines(defined["encode"](names[:7]), Embedder(model_folder).encode(names[:7])).min() > 0.9999


@pytest.mark.parametrize("most", [63, 127])
def test_quantised_weights_are_the_nearest(most: int) -> None:
    weight_OI = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    weight_OI[2] = 0
    numbers_OI, scale_O1 = quantised(weight_OI, most)
    assert np.abs(numbers_OI).max() == most
    assert (np.abs(numbers_OI * scale_O1 - weight_OI) <= scale_O1 / 2 + 1e-6).all()


def test_a_row_in_8_bits_is_the_same_beside_any_other() -> None:
    rng = np.random.default_rng(0)
    weight_OI = rng.standard_normal((24, 40)).astype(np.float32)
    x_TI = rng.standard_normal((5, 40)).astype(np.float32)
    x_TI[1] *= 1000
    x_TI[2] = 0
    x_TI[3] = np.abs(x_TI[3])
    x_TI[4] = -np.abs(x_TI[4])
    graph = Graph()
    rows = graph.cast("rows", "FLOAT")  # inputs of a graph are whole numbers
    x = graph("Mul", rows, graph.real(1e-3))
    content = graph.model({"rows": ["T", "I"]}, int8_linear(graph, x, "w", weight_OI), "y", ["T", 24])
    session = require("onnxruntime").InferenceSession(content)
    rows_TI = np.rint(x_TI * 1000).astype(np.int64)

    def run(rows_TI: Any) -> Vectors:
        found: Vectors = session.run(None, {"rows": rows_TI})[0]
        return found

    together_TO = run(rows_TI)
    assert (np.concatenate([run(row_I[None]) for row_I in rows_TI]) == together_TO).all()
    # Either factor is off by half a step at most: x of 127 steps, the weight of 63.
    x_TI = (rows_TI / 1000).astype(np.float32)
    largest_T1, largest_O = np.abs(x_TI).max(1, keepdims=True), np.abs(weight_OI).max(1)
    off_TO = (
        largest_T1 / 254 * np.abs(weight_OI).sum(1) + np.abs(x_TI).sum(1, keepdims=True) * largest_O / 126
    )
    off_TO += 40 * largest_T1 / 254 * largest_O / 126
    assert (np.abs(together_TO - x_TI @ weight_OI.T) <= off_TO * 1.001).all()
    assert (together_TO[2] == 0).all()


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_row_of_padding_alone_harms_no_other(export: Export, to: str) -> None:
    folder = export(to, "f32")
    ids_NL, mask_NL = rectangle([[5, 6, 7], [8, 9, 10, 11, 12]])
    expected_ND = vectors_of(folder, to, ids_NL, mask_NL)
    found_ND = vectors_of(
        folder, to, np.insert(ids_NL, [0, 1, 2], 0, axis=0), np.insert(mask_NL, [0, 1, 2], 0, axis=0)
    )
    assert np.isfinite(found_ND).all()
    assert cosines(found_ND[[1, 3]], expected_ND).min() > 0.99999
