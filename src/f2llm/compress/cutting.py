"""Cutting: the tensors of a smaller model out of a larger one's, one at a time, and what f2llm.json says of it.

RMSNorm divides by the mean square over the width: a norm over E' of E units gets its weight times sqrt(E / E'), and
eps times E / E', so that removing units that are always zero changes nothing. (The query and key norms keep their
width; config.json has one eps for all norms, and theirs changes with it, by far less than the mean square of what
they divide.)

Shape suffixes: E hidden width, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from f2llm.model.decoder import Decoder, DecoderConfig
from f2llm.model.folder import ModelFacts
from f2llm.model.tensor_files import TensorFiles

TABLE = "embed_tokens.weight"
ROWS_AT_ONCE = 4096  # of the embedding table


@dataclass(frozen=True)
class Kept:
    """What stays of a model, all numbers ascending."""

    hidden_E: Tensor  # the same ones in every tensor
    layers: list[int]
    mlp: list[Tensor]  # units of each kept layer
    groups: list[Tensor]  # key/value heads of each kept layer, each with the query heads that share it


def strongest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def cut_config(config: DecoderConfig, kept: Kept) -> DecoderConfig:
    """The shape of what is kept."""
    groups = len(kept.groups[0])
    return replace(
        config,
        hidden_size=len(kept.hidden_E),
        intermediate_size=len(kept.mlp[0]),
        num_hidden_layers=len(kept.layers),
        num_attention_heads=groups * _shared(config),
        num_key_value_heads=groups,
        rms_norm_eps=config.rms_norm_eps * _wider(config, kept),
    )


def cut_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a decoder of this shape, by name."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}


def cut_tensor(
    weights: TensorFiles, config: DecoderConfig, kept: Kept, name: str
) -> Tensor | Iterator[Tensor]:
    """The tensor `name` of the smaller model, out of those of the larger one, whose configuration is `config`.

    The embedding table comes as blocks of its rows.
    """
    if name == TABLE:
        return _table(weights, config.vocab_size, kept.hidden_E)
    if name == "norm.weight":
        return weights.read(name)[kept.hidden_E] * _wider(config, kept) ** 0.5
    _, number, part = name.split(".", 2)
    new = int(number)
    tensor = weights.read(f"layers.{kept.layers[new]}.{part}")
    query, key = (_columns_of(kept.groups[new], heads * config.head_dim) for heads in (_shared(config), 1))
    match part.split(".")[-2]:
        case "input_layernorm" | "post_attention_layernorm":
            return tensor[kept.hidden_E] * _wider(config, kept) ** 0.5
        case "q_norm" | "k_norm":
            return tensor
        case "q_proj":
            return _select(tensor, query, kept.hidden_E)
        case "k_proj" | "v_proj":
            return _select(tensor, key, kept.hidden_E)
        case "o_proj":
            return _select(tensor, kept.hidden_E, query)
        case "down_proj":
            return _select(tensor, kept.hidden_E, kept.mlp[new])
        case _:
            return _select(tensor, kept.mlp[new], kept.hidden_E)


def _shared(config: DecoderConfig) -> int:
    """Query heads of a key/value head."""
    return config.num_attention_heads // config.num_key_value_heads


def _wider(config: DecoderConfig, kept: Kept) -> float:
    return config.hidden_size / len(kept.hidden_E)


def _columns_of(groups: Tensor, width: int) -> Tensor:
    """What belongs to each of some groups, of which each is `width` wide."""
    return (groups[:, None] * width + torch.arange(width)).flatten()


def _select(tensor: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return tensor.index_select(0, rows).index_select(1, columns)


def _table(weights: TensorFiles, entries: int, kept_E: Tensor) -> Iterator[Tensor]:
    for start in range(0, entries, ROWS_AT_ONCE):
        block_VE = weights.read_rows(TABLE, range(start, min(start + ROWS_AT_ONCE, entries)))
        yield block_VE.index_select(1, kept_E)


# --- What f2llm.json says


def kept_of_the_uncut(facts: ModelFacts, config: DecoderConfig, kept: Kept) -> dict[str, Any]:
    """The model that nothing was cut from yet, and the numbers that all that is kept has in it.

    Args:
        facts, config: of the model that was cut now.

    Returns:
        `of`, its identity; `hidden` and `layers`, lists of numbers; and for each kept layer `mlp` and `kv_groups`, as
        ranges ("0-4,7"), for a list would be as long as all that else is said.
    """
    before = facts.kept or _whole(facts, config)
    numbers = {
        "of": before["of"],
        "hidden": _pick(before["hidden"], kept.hidden_E.tolist()),
    }
    if "layers" in before:  # what was cut by an early version says nothing of the rest
        numbers["layers"] = _pick(before["layers"], kept.layers)
        for name, chosen in (("mlp", kept.mlp), ("kv_groups", kept.groups)):
            numbers[name] = [
                as_ranges(_pick(from_ranges(before[name][layer]), units.tolist()))
                for layer, units in zip(kept.layers, chosen, strict=True)
            ]
    return numbers


def _whole(facts: ModelFacts, config: DecoderConfig) -> Mapping[str, Any]:
    layers = config.num_hidden_layers
    return {
        "of": facts.identity,
        "hidden": range(config.hidden_size),
        "layers": range(layers),
        "mlp": [f"0-{config.intermediate_size - 1}"] * layers,
        "kv_groups": [f"0-{config.num_key_value_heads - 1}"] * layers,
    }


def _pick(numbers: Sequence[int], places: Iterable[int]) -> list[int]:
    return [numbers[place] for place in places]


def as_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: 0, 1, 2, 5 is "0-2,5"."""
    breaks = [i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1]
    runs = [(numbers[a], numbers[b - 1]) for a, b in pairwise([0, *breaks, len(numbers)])]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_ranges(text: str) -> list[int]:
    """The numbers that `as_ranges` wrote."""
    runs = (part.split("-") for part in text.split(","))
    return [number for run in runs for number in range(int(run[0]), int(run[-1]) + 1)]
