"""int8 on the CPU: our export in ONNX Runtime against our own decoder in float32, same weights and texts, in turns.

The speed is that of the 80M shape with random weights, on real texts, from strings to vectors; ONNX Runtime gets the
batch size at which it is fastest (found first, one pass each), our decoder its own, and either the same number of
threads and our memory policy. Ours runs by torch, as on machines without matrix units. What is lost is measured on a
trained model, the largest of the quickstart.
"""

from functools import partial
from pathlib import Path

import numpy as np

from encode_int8 import best_batch
from f2llm.export.export import export_model
from f2llm.export.onnx_graph import int8_linear
from f2llm.export.onnx_model import write_onnx
from f2llm.files import write_json
from harness import ROOT, Figure, Part, Row, Worker, measured, skipped, take_turns, worker
from inputs import EVERYTHING, FULL, SMALL, describe, draw_texts, make_model, token_ids

TRAINED = ROOT / "runs" / "quickstart" / "large"
MAX_LENGTH = 512  # tokens

SPEED = Row("tokens/s of int8 in ONNX Runtime, peer our decoder in float32 by torch", bar=1.5)
COSINE = Row("smallest cosine between vectors of int8 and of float32, random weights", bar=0.98)
LOST = Row("share of nDCG@10 that int8 loses, model trained by the quickstart", bar=0.005, better="lower")


def int8(folder: Path, small: bool) -> Part:
    """Write the model and its export, encode in turns, and compare a trained model with its export."""
    size, count = (SMALL, 24) if small else (FULL, 128)
    texts, origin = draw_texts(size, EVERYTHING, count)
    model = make_model(folder / "model", size, texts, MAX_LENGTH)
    (folder / "onnx").mkdir()
    write_onnx(
        folder / "model", folder / "onnx", size.decoder, dim=size.decoder.hidden_size, linear=int8_linear
    )
    write_json(folder / "texts.json", texts)
    arguments = (folder / "model", folder / "onnx", folder / "texts.json", MAX_LENGTH)
    with (
        worker("encode_ours", folder / "model", folder / "texts.json", "torch", keep_memory=True) as ours,
        worker("exported", "onnx", *arguments, keep_memory=True) as exported,
    ):
        best = best_batch(exported)
        seconds = take_turns(
            {"float32": partial(ours.call, "encode"), "int8": partial(exported.call, "encode", tokens=best)}
        )
        speed = {name: ours.call("tokens") / value for name, value in seconds.items()}
        figures = [
            measured(SPEED, speed["int8"], speed["float32"]),
            measured(COSINE, smallest_cosine(ours, exported, best, folder)),
            lost(folder, small),
        ]
    facts = {"float32": ours.facts, "int8": {**exported.facts, "tokens_in_a_batch": best}}
    return Part(figures, {"int8": describe(size, model, token_ids(model, texts), origin)}, facts)


def smallest_cosine(ours: Worker, exported: Worker, tokens: int, folder: Path) -> float:
    ours.call("save_vectors", path=str(folder / "float32.npy"))
    exported.call("save_vectors", path=str(folder / "int8.npy"), tokens=tokens)
    return float((np.load(folder / "float32.npy") * np.load(folder / "int8.npy")).sum(1).min())


def lost(folder: Path, small: bool) -> Figure:
    """By the measure that every export is given, on names in 13 languages."""
    if small or not TRAINED.is_dir():
        return skipped(LOST, "a trial" if small else "no runs/quickstart/large; make it with the quickstart")
    parity = export_model(TRAINED, folder / "trained", "onnx", quantize="int8")
    before, change = parity.rows[0].ndcg_at_10, parity.ndcg_change
    assert before and change is not None  # the names are questions and answers
    return measured(LOST, -change / before)
