"""Encoding with an export in its own runtime, from strings to vectors."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from f2llm.export.onnx_model import MODEL, OUTPUT
from f2llm.export.openvino_model import IR
from f2llm.export.runtimes import rectangle, require
from f2llm.files import read_json
from f2llm.model.batches import token_batches
from f2llm.text import clean
from f2llm.tokenizer_file import load_tokenizer

Run = Callable[[np.ndarray, np.ndarray], np.ndarray]


def onnx(folder: Path) -> Run:
    """ONNX Runtime, with as many threads as the contender has."""
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / MODEL, options)

    def run(ids_NL: np.ndarray, mask_NL: np.ndarray) -> np.ndarray:
        vectors_ND: np.ndarray = session.run([OUTPUT], {"input_ids": ids_NL, "attention_mask": mask_NL})[0]
        return vectors_ND

    return run


def openvino(folder: Path) -> Run:
    """OpenVINO as it is by itself, which on processors that have bfloat16 is in that."""
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = require("openvino").Core().compile_model(folder / IR, "CPU", settings)

    def run(ids_NL: np.ndarray, mask_NL: np.ndarray) -> np.ndarray:
        return np.array(compiled({"input_ids": ids_NL, "attention_mask": mask_NL})[0])

    return run


def commands(
    runtime: str, model_folder: str, export_folder: str, texts_file: str, max_length: str
) -> dict[str, Callable[..., Any]]:
    run = {"onnx": onnx, "openvino": openvino}[runtime](Path(export_folder))
    tokenizer = load_tokenizer(Path(model_folder) / "tokenizer.json")
    tokenizer.enable_truncation(int(max_length))
    texts = read_json(Path(texts_file))

    def vectors(tokens: int) -> np.ndarray:
        """float32 [N, D], in batches of similar length and at most `tokens` tokens."""
        ids = [encoded.ids for encoded in tokenizer.encode_batch([clean(text) for text in texts])]
        batches = list(token_batches([len(sequence) for sequence in ids], tokens))
        vectors_ND = np.concatenate([run(*rectangle([ids[i] for i in batch])) for batch in batches])
        return vectors_ND[np.argsort([i for batch in batches for i in batch])]

    def encode(tokens: int) -> float:
        """Seconds for all texts."""
        started = time.perf_counter()
        vectors(tokens)
        return time.perf_counter() - started

    def save_vectors(path: str, tokens: int) -> None:
        np.save(path, vectors(tokens))

    return {"encode": encode, "save_vectors": save_vectors}
