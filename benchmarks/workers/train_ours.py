"""Our own training step: ragged vectors of all texts, objective, backward; no optimizer step.

On a CPU everything is float32; on a GPU weights are float32 and the computation bfloat16.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from f2llm.files import read_json
from f2llm.model.folder import load_model
from f2llm.train.objective import Kind
from f2llm.train.optim import clear_gradients
from f2llm.train.ranks import ALONE, shard
from f2llm.train.step import accumulate_gradients
from workers.arithmetic import linear_shapes, most_products
from workers.train_objective import clock, loss_of, part, report


def commands(
    model_folder: str, ids_file: str, queries_in_file: str, device: str = "cpu"
) -> dict[str, Callable[..., Any]]:
    decoder = load_model(Path(model_folder)).decoder.train()
    ranks = replace(ALONE, device=torch.device(device))
    shard(decoder, ranks, "bf16" if device == "cuda" else "fp32", activation_checkpointing=False)
    decoder.embed_tokens.sparse = (
        device == "cpu"
    )  # as the trainer has it, whose optimizer clears the gradients
    parameters = dict(decoder.named_parameters())
    ids, queries = read_json(Path(ids_file)), int(queries_in_file)
    tokens = sum(map(len, ids))

    def step(
        tokens_per_microbatch: int = tokens, kind: Kind = "f2llm-v2", batches: int = 1
    ) -> dict[str, float]:
        """One step, or one for each of `batches` equal parts of the batch; seconds are those of all."""
        parts = [part(ids, queries, number, batches) for number in range(batches)]
        objective = partial(loss_of, queries=queries // batches, kind=kind)
        started = clock(device)
        for batch in parts:
            clear_gradients(parameters)
            loss, _ = accumulate_gradients(decoder, batch, objective, tokens_per_microbatch, ranks)
        return report(clock(device) - started, loss, decoder.parameters())

    def matrix_product() -> float:
        """Most multiply-adds per second of `torch.mm(out=)`: on large squares and at the shapes of the step."""
        shapes = linear_shapes(decoder.config, tokens)
        weights = [(fan_out, rows, fan_in) for rows, fan_in, fan_out in shapes]  # gradients of the weights
        return most_products([*shapes, *weights])

    return {"step": step, "matrix_product": matrix_product}
