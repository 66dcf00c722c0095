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
from workers.train_objective import clock, loss_of, part, report

SQUARE = 1536
REPEATS = 5


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
        config = decoder.config
        width, wide = config.hidden_size, config.intermediate_size
        heads = [n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)]
        linear = [(width, out) for out in (*heads, wide)] + [(heads[0], width), (wide, width)]
        shapes = [(tokens, fan_in, fan_out) for fan_in, fan_out in linear]
        shapes += [(fan_out, tokens, fan_in) for fan_in, fan_out in linear]  # gradients of the weights
        return max(map(products_per_second, [(SQUARE, SQUARE, SQUARE), *shapes]))

    return {"step": step, "matrix_product": matrix_product}


def products_per_second(shape: tuple[int, int, int]) -> float:
    """Multiply-adds per second of (rows, inner) times (inner, columns), the best of some runs after a warm-up."""
    rows, inner, columns = shape
    left, right, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    torch.mm(left, right, out=out)
    seconds = []
    for _ in range(REPEATS):
        started = clock("cpu")
        torch.mm(left, right, out=out)
        seconds.append(clock("cpu") - started)
    return rows * inner * columns / min(seconds)
