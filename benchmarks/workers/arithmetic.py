"""How fast this machine multiplies matrices, which no decoder can exceed."""

import time
from collections.abc import Iterable

import torch

from f2llm.model.decoder import DecoderConfig

SQUARE = 1536
REPEATS = 5

Shape = tuple[int, int, int]  # rows, inner, columns


def linear_shapes(config: DecoderConfig, tokens: int) -> list[Shape]:
    """The products of a layer's linear maps on so many tokens."""
    width, wide = config.hidden_size, config.intermediate_size
    heads = [n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)]
    linear = [(width, out) for out in (*heads, wide)] + [(heads[0], width), (wide, width)]
    return [(tokens, fan_in, fan_out) for fan_in, fan_out in linear]


def most_products(shapes: Iterable[Shape]) -> float:
    """Most multiply-adds per second of `torch.mm(out=)`: on large squares and at these shapes."""
    return max(map(products_per_second, [(SQUARE, SQUARE, SQUARE), *shapes]))


def products_per_second(shape: Shape) -> float:
    """Multiply-adds per second of (rows, inner) times (inner, columns), the best of some runs after a warm-up."""
    rows, inner, columns = shape
    left, right, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    torch.mm(left, right, out=out)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - started)
    return rows * inner * columns / min(seconds)
