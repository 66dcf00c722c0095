"""One training step, ragged: forward of all texts, objective, backward; no optimizer step."""

import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from f2llm.files import read_json
from f2llm.model.folder import load_model
from workers.train_objective import loss_of, report


def commands(model_folder: str, ids_file: str, queries: str) -> dict[str, Callable[..., Any]]:
    decoder = load_model(Path(model_folder)).decoder.train()
    ids = read_json(Path(ids_file))

    def step() -> dict[str, float]:
        started = time.perf_counter()
        decoder.zero_grad(set_to_none=True)
        vectors_ND = decoder(torch.tensor(list(chain.from_iterable(ids))), [len(i) for i in ids])
        loss = loss_of(vectors_ND, int(queries))
        loss.backward()
        return report(time.perf_counter() - started, loss, decoder.parameters())

    return {"step": step}
