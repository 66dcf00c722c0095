"""Shapes: the family's sizes to the parameter, and budgets against a search that tries everything."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from f2llm.compress.shapes import nearest_shapes, shapes_to_cut, smaller
from f2llm.errors import UsageError
from f2llm.family import FAMILY
from f2llm.model.decoder import Decoder, DecoderConfig, parameters_of

SMALLEST = DecoderConfig(151_936, 1024, 3072, 28, 16, 8, 128)  # Qwen3-0.6B
LARGEST = DecoderConfig(151_936, 5120, 17_408, 40, 40, 8, 128)  # Qwen3-14B
NARROW = DecoderConfig(1000, 200, 700, 6, 12, 4, 16)  # no multiple of a step


def built(config: DecoderConfig) -> int:
    """Parameters of a decoder that is really made."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config).parameters())


@pytest.mark.parametrize(
    ("size", "parameters"), [("80M", 80_084_288), ("160M", 159_185_024), ("330M", 334_349_184)]
)
def test_sizes_of_the_family_have_their_exact_number_of_parameters(size: str, parameters: int) -> None:
    (shape,) = shapes_to_cut(SMALLEST, size=size)
    assert shape.parameters == parameters == built(shape.config)
    assert shape.config.num_attention_heads == 16 and shape.config.num_key_value_heads == 8


def tried(
    whole: DecoderConfig, parameters: int, heads: bool = False
) -> list[tuple[float, float, DecoderConfig]]:
    """All shapes of the grid: how far from the budget, how uneven, and the shape."""
    found = []
    shared = whole.num_attention_heads // whole.num_key_value_heads
    for hidden, mlp, layers, groups in product(
        {*range(64, whole.hidden_size, 64), whole.hidden_size},
        {*range(128, whole.intermediate_size, 128), whole.intermediate_size},
        range(1, whole.num_hidden_layers + 1),
        range(1, whole.num_key_value_heads + 1) if heads else [whole.num_key_value_heads],
    ):
        config = DecoderConfig(whole.vocab_size, hidden, mlp, layers, shared * groups, groups, whole.head_dim)
        left = [
            hidden / whole.hidden_size,
            mlp / whole.intermediate_size,
            layers / whole.num_hidden_layers,
            *([groups / whole.num_key_value_heads] if heads else []),
        ]
        table = whole.vocab_size * hidden
        attention = 2 * hidden * whole.head_dim * (shared * groups + groups)
        count = table + layers * (attention + 3 * hidden * mlp + 2 * hidden + 2 * whole.head_dim) + hidden
        found.append((abs(count - parameters) / parameters, math.log(max(left) / min(left)), config))
    return found


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    ("whole", "parameters"), [(SMALLEST, 250_000_000), (SMALLEST, 80_000_000), (NARROW, 900_000)]
)
def test_a_budget_finds_what_trying_everything_finds(
    whole: DecoderConfig, parameters: int, heads: bool
) -> None:
    searched = ["hidden_size", "intermediate_size", "layers", *(["kv_heads"] if heads else [])]
    got = nearest_shapes(whole, parameters, searched=searched)
    close = sorted((uneven, far) for far, uneven, _ in tried(whole, parameters, heads) if far <= 0.02)
    assert close and len(got) == min(5, len(close))
    by_shape = {config: (uneven, far) for far, uneven, config in tried(whole, parameters, heads)}
    for candidate, expected in zip(got, close, strict=False):
        assert by_shape[candidate.config] == pytest.approx(expected)
        assert candidate.spread == pytest.approx(expected[0])
        assert candidate.parameters == parameters_of(candidate.config) == built(candidate.config)
        assert abs(candidate.parameters - parameters) <= 0.02 * parameters


def test_without_any_close_shape_the_nearest_come() -> None:
    got = nearest_shapes(NARROW, 30_000)  # the table alone has 64,000 numbers at the least width
    nearest = sorted(far for far, _, _ in tried(NARROW, 30_000))
    assert nearest[0] > 0.02
    assert [abs(c.parameters - 30_000) / 30_000 for c in got] == pytest.approx(nearest[:5])


def test_a_laptop_finds_a_shape_for_the_largest_model() -> None:
    best, *others = shapes_to_cut(LARGEST, parameters=1_000_000_000)
    assert 0.98e9 <= best.parameters <= 1.02e9 and len(others) == 4
    assert all(best.spread <= other.spread for other in others)


def test_what_is_given_holds_in_a_budget() -> None:
    for shape in shapes_to_cut(SMALLEST, parameters=200_000_000, hidden_size=640, heads=8):
        assert shape.config.hidden_size == 640
        assert (shape.config.num_attention_heads, shape.config.num_key_value_heads) == (8, 4)
    (fixed,) = shapes_to_cut(SMALLEST, size="80M", layers=10)
    assert fixed.config == replace(SMALLEST, hidden_size=320, intermediate_size=2048, num_hidden_layers=10)


def test_heads_go_in_whole_groups() -> None:
    cut = smaller(LARGEST, heads=15)
    assert (cut.num_attention_heads, cut.num_key_value_heads, cut.head_dim) == (15, 3, 128)
    with pytest.raises(UsageError, match="heads is to be 16, but 5 query heads share .* a multiple of 5"):
        smaller(LARGEST, heads=16)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "no shape was given"),
        ({"size": "80M", "parameters": 1}, "give one of them"),
        ({"size": "81M"}, "'81M', expected one of 80M, 160M"),
        ({"size": "1.7B"}, "hidden_size is to be 2048, but the model has 1024"),
        ({"layers": 29}, "layers is to be 29, but the model has 28"),
        ({"layers": 0}, "layers is to be 0"),
        ({"parameters": 600_000_000}, "600,000,000 parameters .* has 596,049,920"),
        ({"parameters": 1, "hidden_size": 64, "intermediate_size": 128, "layers": 1}, "leave out one"),
    ],
)
def test_what_cannot_be_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shapes_to_cut(SMALLEST, **asked)


def test_every_size_of_the_family_can_be_cut_to_the_smaller_ones() -> None:
    """From the models of other head counts as well, whose heads stay."""
    for name in ("1.7B", "4B", "8B", "14B"):
        member = FAMILY[name]
        whole = DecoderConfig(
            151_936, member.hidden_size, member.intermediate_size, member.layers, member.heads, 8, 128
        )
        (shape,) = shapes_to_cut(whole, size="80M")
        assert shape.parameters == built(shape.config) >= 80_084_288
        assert shape.config.num_attention_heads == member.heads
