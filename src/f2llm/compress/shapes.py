"""The shape to cut a model to: a size of the family, widths and depth as given, or what comes nearest to a budget.

Widths of a budget's shape are multiples of what matrix multiplications like. Among shapes about as large as asked,
those come first that shrink all directions alike: a model of which one direction alone was cut is the worst way to
its size (Muralidharan et al. 2024, Compact language models via pruning and knowledge distillation).

Axes of the grid: hidden width, MLP width, layers, key/value groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from f2llm.errors import UsageError
from f2llm.family import FAMILY, parameter_count
from f2llm.model.decoder import DecoderConfig, parameters_of

HIDDEN_STEP, MLP_STEP = 64, 128
CLOSE = 0.02  # shapes within this share of the budget are as good in size
LISTED = 5
AXES = {  # names of `parameter_count` -> field of the configuration, step of the grid
    "hidden_size": ("hidden_size", HIDDEN_STEP),
    "intermediate_size": ("intermediate_size", MLP_STEP),
    "layers": ("num_hidden_layers", 1),
    "kv_heads": ("num_key_value_heads", 1),
}
BODY = ("hidden_size", "intermediate_size", "layers")  # what shrinks unless heads are to go as well

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Candidate:
    """A shape and what speaks for it."""

    config: DecoderConfig
    parameters: int
    spread: float
    """ln(largest / smallest) of what is left of each direction, as a share; 0 if all shrink alike."""


def shapes_to_cut(
    whole: DecoderConfig,
    *,
    size: str | None = None,
    parameters: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
) -> list[Candidate]:
    """What to cut a model of the shape `whole` to, the best first; one alone unless a budget leaves the choice.

    Args:
        size: "80M" and the like: hidden width, MLP width and layers as in `f2llm.family`. Heads stay.
        parameters: a budget; what is not given is searched for, but for heads, which stay.
        hidden_size, intermediate_size, layers, heads: what is given holds, whatever the size says; query heads go in
            whole groups that share a key/value head.

    Raises:
        UsageError: nothing or two things were asked for, or something that the model does not have.
    """
    if size and parameters:
        raise UsageError("a size and a number of parameters were given; give one of them.")
    given = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "layers": layers}
    given = {name: value for name, value in given.items() if value is not None}
    if not size and not parameters and not given and heads is None:
        raise UsageError("no shape was given; give a size, a number of parameters, widths or layers.")
    if size:
        if size not in FAMILY:
            raise UsageError(f"the size is {size!r}, expected one of {', '.join(FAMILY)}.")
        member = FAMILY[size]
        named = {name: getattr(member, name) for name in ("hidden_size", "intermediate_size", "layers")}
        given = {**named, **given}
    fixed = smaller(whole, **given, heads=heads)
    if not parameters:
        return [Candidate(fixed, parameters_of(fixed), _spread_of(fixed, whole))]
    searched = [name for name in BODY if name not in given]
    if not searched:
        raise UsageError(
            "a number of parameters was given, and all widths and layers; leave out one of them."
        )
    return nearest_shapes(fixed, parameters, searched=searched)


def smaller(
    whole: DecoderConfig,
    *,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
) -> DecoderConfig:
    """The shape with these in place of its own; a UsageError names what the model does not have."""
    for what, wanted, there in (
        ("hidden_size", hidden_size, whole.hidden_size),
        ("intermediate_size", intermediate_size, whole.intermediate_size),
        ("layers", layers, whole.num_hidden_layers),
        ("heads", heads, whole.num_attention_heads),
    ):
        if wanted is not None and not 1 <= wanted <= there:
            raise UsageError(f"{what} is to be {wanted}, but the model has {there}; ask for 1 to {there}.")
    shared = whole.num_attention_heads // whole.num_key_value_heads
    heads = heads or whole.num_attention_heads
    if heads % shared:
        raise UsageError(
            f"heads is to be {heads}, but {shared} query heads share each key/value head and stay or go together; "
            f"ask for a multiple of {shared}."
        )
    return replace(
        whole,
        hidden_size=hidden_size or whole.hidden_size,
        intermediate_size=intermediate_size or whole.intermediate_size,
        num_hidden_layers=layers or whole.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // shared,
    )


def nearest_shapes(
    whole: DecoderConfig, parameters: int, *, searched: Sequence[str] = BODY, listed: int = LISTED
) -> list[Candidate]:
    """Shapes near a budget of parameters, at most `listed` of them, the best first.

    All within CLOSE of the budget by how evenly they shrink what was searched, then by how near they are; where there
    is none, the nearest.

    Args:
        searched: of AXES, what may shrink; the others stay. With "kv_heads" go the query heads that share them.

    Raises:
        UsageError: the budget is more than the model has.
    """
    if parameters < 1 or parameters > parameters_of(whole):
        raise UsageError(
            f"{parameters:,} parameters were asked for, but the model has {parameters_of(whole):,}; ask for less."
        )
    axes = [_axis(whole, name, name in searched) for name in AXES]
    grid = dict(zip(AXES, (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")), strict=True))
    shared = whole.num_attention_heads // whole.num_key_value_heads
    counts = parameter_count(
        **grid,  # type: ignore[arg-type]  # the formula holds for arrays as it does for numbers
        heads=grid["kv_heads"] * shared,  # type: ignore[arg-type]
        head_dim=whole.head_dim,
        vocab_size=whole.vocab_size,
    )
    distances = np.abs(np.asarray(counts) - parameters) / parameters
    left = np.stack([grid[name] / getattr(whole, AXES[name][0]) for name in searched])
    spreads = np.log(left.max(axis=0) / left.min(axis=0))
    close = np.flatnonzero(distances <= CLOSE)
    near_to_budget = np.lexsort((spreads, distances))
    best = close[np.lexsort((distances[close], spreads[close]))] if len(close) else near_to_budget
    return [
        Candidate(_at(whole, grid, i), int(np.asarray(counts)[i]), float(spreads[i]))
        for i in best[:listed].tolist()
    ]


def _axis(whole: DecoderConfig, name: str, is_searched: bool) -> Numbers:
    """The values that one direction may have: multiples of its step, and all of it."""
    field, step = AXES[name]
    there = getattr(whole, field)
    return np.array([*(range(step, there, step) if is_searched else ()), there], np.int64)


def _at(whole: DecoderConfig, grid: dict[str, Numbers], i: int) -> DecoderConfig:
    values = {AXES[name][0]: int(axis[i]) for name, axis in grid.items()}
    shared = whole.num_attention_heads // whole.num_key_value_heads
    return replace(whole, **values, num_attention_heads=values["num_key_value_heads"] * shared)


def _spread_of(config: DecoderConfig, whole: DecoderConfig) -> float:
    left = [getattr(config, AXES[name][0]) / getattr(whole, AXES[name][0]) for name in BODY]
    return float(np.log(max(left) / min(left)))
