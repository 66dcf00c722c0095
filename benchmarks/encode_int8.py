"""int8 inside our engine against int8 exports in ONNX Runtime and OpenVINO: same weights, same texts, in turns.

The exports are our own (`f2llm export`), since nobody else exports these models to int8; each runtime gets the batch
size at which it is fastest, found first, and as many threads as we have. OpenVINO computes in what it takes by itself.
"""

from functools import partial
from pathlib import Path

import numpy as np

from f2llm.amx.hardware import why_not
from f2llm.export.onnx_graph import int8_linear
from f2llm.export.onnx_model import write_onnx
from f2llm.export.openvino_model import write_openvino
from harness import Part, Row, Worker, measured, skipped, take_turns, worker
from inputs import Size

BATCH_TOKENS = (128, 256, 512, 1024, 2048)

RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
SPEED = {key: Row(f"tokens/s of int8, peer {name} int8", bar=1) for key, name in RUNTIMES.items()}
COSINE = {
    key: Row(f"smallest cosine of int8 with float32, peer {name} int8", bar=1)
    for key, name in RUNTIMES.items()
}
GAIN = Row("tokens/s of int8, peer our float32")


def int8_part(folder: Path, size: Size, max_length: int) -> Part:
    """`folder` has the model and texts.json."""
    rows = [*SPEED.values(), *COSINE.values(), GAIN]
    if reason := why_not():
        return Part([skipped(row, f"no matrix units: {reason}") for row in rows], {}, {})
    model, texts = folder / "model", folder / "texts.json"
    width = size.decoder.hidden_size
    (folder / "onnx").mkdir()
    (folder / "openvino").mkdir()
    write_onnx(model, folder / "onnx", size.decoder, dim=width, linear=int8_linear)
    write_openvino(model, folder / "openvino", size.decoder, dim=width, precision="int8")
    figures, facts = [], {}
    with (
        worker("encode_ours", model, texts, keep_memory=True) as whole,
        worker("encode_ours", model, texts, "int8", keep_memory=True) as ours,
    ):
        tokens = ours.call("tokens")
        exact_ND = vectors(whole, folder / "float32.npy")
        lowest = smallest_cosine(vectors(ours, folder / "int8.npy"), exact_ND)
        for key in RUNTIMES:
            arguments = (key, model, folder / key, texts, max_length)
            with worker("exported", *arguments, keep_memory=True) as peer:
                best = best_batch(peer)
                seconds = take_turns(
                    {"ours": partial(ours.call, "encode"), "peer": partial(peer.call, "encode", tokens=best)}
                )
                figures.append(measured(SPEED[key], tokens / seconds["ours"], tokens / seconds["peer"]))
                theirs = smallest_cosine(vectors(peer, folder / f"{key}.npy", tokens=best), exact_ND)
                figures.append(measured(COSINE[key], lowest, theirs))
                facts[RUNTIMES[key]] = {**peer.facts, "tokens_in_a_batch": best}
        seconds = take_turns({"int8": partial(ours.call, "encode"), "float32": partial(whole.call, "encode")})
        figures.append(measured(GAIN, tokens / seconds["int8"], tokens / seconds["float32"]))
    return Part(figures, {}, facts)


def vectors(contender: Worker, path: Path, **options: int) -> np.ndarray:
    contender.call("save_vectors", path=str(path), **options)
    vectors_ND = np.load(path).astype(np.float64)
    normed: np.ndarray = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return normed


def smallest_cosine(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    return float((a_ND * b_ND).sum(1).min())


def best_batch(exported: Worker) -> int:
    """Tokens of the batches that are fastest, after a warm-up of each."""
    seconds = {}
    for tokens in BATCH_TOKENS:
        exported.call("encode", tokens=tokens)
        seconds[tokens] = exported.call("encode", tokens=tokens)
    print(f"int8, seconds by tokens of a batch: {seconds}", flush=True)
    return min(seconds, key=lambda tokens: seconds[tokens])
