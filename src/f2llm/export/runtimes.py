"""Exported folders in the runtimes that they are for: each function gives one from texts to unit vectors.

The exported files alone are used, the tokenizer too, so that what agrees here agrees for whoever gets the folder.

Shape suffixes: N texts, L tokens of the longest, D dims.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from f2llm.errors import F2Error
from f2llm.text import clean
from f2llm.tokenizer_file import load_tokenizer

Vectors = npt.NDArray[np.float32]
Encode = Callable[[Sequence[str]], Vectors]
Run = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], Vectors]

TEXTS_IN_A_BATCH = 16
LEAST_CONTEXT = 32  # tokens; llama.cpp refuses to go far below


def require(name: str) -> Any:
    """A library of the extra `export`; F2Error if it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        raise F2Error(f"the export needs {name}, which is missing; install f2llm[export].") from None


def onnx_encode(folder: Path, max_length: int) -> Encode:
    """model.onnx in ONNX Runtime, on the CPU."""
    ort = require("onnxruntime")
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def run(ids_NL: npt.NDArray[np.int64], mask_NL: npt.NDArray[np.int64]) -> Vectors:
        vectors_ND: Vectors = session.run(None, {"input_ids": ids_NL, "attention_mask": mask_NL})[0]
        return vectors_ND

    return padded(folder, run, max_length)


def openvino_encode(folder: Path, max_length: int) -> Encode:
    """openvino_model.xml in OpenVINO, on the CPU.

    Without the hint it computes in bfloat16 on processors that have it, which costs three digits.
    """
    core = require("openvino").Core()
    compiled = core.compile_model(folder / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(ids_NL: npt.NDArray[np.int64], mask_NL: npt.NDArray[np.int64]) -> Vectors:
        return np.array(compiled({"input_ids": ids_NL, "attention_mask": mask_NL})[0])

    return padded(folder, run, max_length)


def padded(folder: Path, run: Run, max_length: int) -> Encode:
    """Texts of similar length in rectangles of token ids and their mask, as the folder's tokenizer.json gives them."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    tokenizer.enable_truncation(max_length)  # cut before EOS, which its post-processor appends

    def encode(texts: Sequence[str]) -> Vectors:
        ids = [encoded.ids for encoded in tokenizer.encode_batch([clean(text) for text in texts])]
        parts = [(batch, run(*rectangle([ids[i] for i in batch]))) for batch in _batches(ids)]
        vectors_ND = np.empty((len(ids), parts[0][1].shape[1]), np.float32)
        for batch, part_ND in parts:
            vectors_ND[batch] = part_ND
        return vectors_ND

    return encode


def rectangle(
    ids: Sequence[Sequence[int]], left: bool = False, fill: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Token ids and their mask, int64 [N, L] each, padded with `fill` on the right or left."""
    longest = max(map(len, ids))
    ids_NL = np.full((len(ids), longest), fill, np.int64)
    mask_NL = np.zeros_like(ids_NL)
    for row, sequence in enumerate(ids):
        place = slice(longest - len(sequence), None) if left else slice(len(sequence))
        ids_NL[row, place], mask_NL[row, place] = sequence, 1
    return ids_NL, mask_NL


def _batches(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    return (order[start : start + TEXTS_IN_A_BATCH] for start in range(0, len(order), TEXTS_IN_A_BATCH))


@contextmanager
def llama_cpp_encode(path: Path, max_length: int) -> Iterator[Encode]:
    """A GGUF file in llama.cpp, on the CPU, with the tokenizer and the pooling that the file asks for.

    Raises:
        F2Error: llama_cpp is not installed, or stopped.
    """
    if find_spec("llama_cpp") is None:
        raise F2Error("llama-cpp-python is not installed.")
    command = [
        sys.executable,
        "-m",
        "f2llm.export.llama_cpp_worker",
        str(path),
        str(max(max_length, LEAST_CONTEXT)),
    ]
    with subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as worker:
        assert worker.stdin and worker.stdout
        questions, answers = worker.stdin, worker.stdout

        def encode(texts: Sequence[str]) -> Vectors:
            try:
                questions.write(json.dumps([clean(text) for text in texts]) + "\n")
                questions.flush()
                answer = answers.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                raise F2Error(f"llama.cpp stopped on {path.name} with exit code {worker.wait()}.")
            return np.array(json.loads(answer), np.float32)

        try:
            yield encode
        finally:
            worker.kill()
            with suppress(BrokenPipeError):  # a question that it did not live to read
                questions.close()


def static_encode(folder: Path) -> Encode:
    """A folder of token vectors by NumPy: their mean, divided to unit length."""
    table_VD: Vectors = load_file(folder / "0_StaticEmbedding" / "model.safetensors")["embedding.weight"]
    tokenizer = load_tokenizer(folder / "0_StaticEmbedding" / "tokenizer.json")

    def encode(texts: Sequence[str]) -> Vectors:
        encoded = tokenizer.encode_batch_fast([clean(text) for text in texts], add_special_tokens=False)
        vectors_ND = np.zeros((len(encoded), table_VD.shape[1]), np.float32)
        for row, one in enumerate(encoded):
            if one.ids:
                vectors_ND[row] = table_VD[one.ids].mean(0)
        length_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        unit_ND: Vectors = vectors_ND / np.maximum(length_N1, np.finfo(np.float32).tiny)
        return unit_ND

    return encode
