"""Encoding with an int8 export in ONNX Runtime, from strings to vectors."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from f2llm.export.onnx_model import MODEL, OUTPUT
from f2llm.export.runtimes import rectangle, require
from f2llm.files import read_json
from f2llm.model.batches import token_batches
from f2llm.text import clean
from f2llm.tokenizer_file import load_tokenizer


def commands(
    model_folder: str, export_folder: str, texts_file: str, max_length: str
) -> dict[str, Callable[..., Any]]:
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as the contender has
    session = onnxruntime.InferenceSession(Path(export_folder) / MODEL, options)
    tokenizer = load_tokenizer(Path(model_folder) / "tokenizer.json")
    tokenizer.enable_truncation(int(max_length))
    texts = read_json(Path(texts_file))

    def vectors(tokens: int) -> np.ndarray:
        """float32 [N, D], in batches of similar length and at most `tokens` tokens."""
        ids = [encoded.ids for encoded in tokenizer.encode_batch([clean(text) for text in texts])]
        vectors_ND = np.empty((len(ids), session.get_outputs()[0].shape[1]), np.float32)
        for batch in token_batches([len(sequence) for sequence in ids], tokens):
            ids_NL, mask_NL = rectangle([ids[i] for i in batch])
            feeds = {"input_ids": ids_NL, "attention_mask": mask_NL}
            vectors_ND[batch] = session.run([OUTPUT], feeds)[0]
        return vectors_ND

    def encode(tokens: int) -> float:
        """Seconds for all texts."""
        started = time.perf_counter()
        vectors(tokens)
        return time.perf_counter() - started

    def save_vectors(path: str, tokens: int) -> None:
        np.save(path, vectors(tokens))

    return {"encode": encode, "save_vectors": save_vectors}
