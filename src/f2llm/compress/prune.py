"""Pruning: a smaller model cut out of a larger one (arXiv 2603.19223, section 3.3).

calibration texts -> scores of units, heads and layers (`layerwise`) -> what is kept -> a new model folder, tensor by
tensor. Neither the old model nor the new one is ever in memory as a whole. Kept indices stay in ascending order, so
the Matryoshka order of dimensions survives; the same hidden units are kept everywhere, MLP units and heads layer by
layer.

Shape suffixes: B rows, N texts, E hidden width, I MLP width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from f2llm.compress.calibration import Row, draw_rows
from f2llm.compress.cutting import Kept, cut_config, cut_shapes, cut_tensor, kept_of_the_uncut, strongest
from f2llm.compress.layerwise import (
    TOKENS_AT_ONCE,
    Loss,
    Score,
    Scores,
    activation_scores,
    taylor_scores,
)
from f2llm.compress.shapes import CLOSE, Candidate, shapes_to_cut, smaller
from f2llm.data.parts import carry_decontamination
from f2llm.errors import UsageError
from f2llm.files import complete_or_not_there
from f2llm.model.base import Base, read_base
from f2llm.model.decoder import DecoderConfig, parameters_of
from f2llm.model.folder import WEIGHTS, ModelFacts, complete_folder, open_weights
from f2llm.model.tensor_files import TensorFiles, write_tensors
from f2llm.model.tokenizer import encode
from f2llm.progress import say
from f2llm.recipe import PruneStage
from f2llm.train.objective import NONE, TEMPERATURE, Roles, contrastive_terms, matryoshka_sizes

Depth = Literal["first", "change", "even"]
CALIBRATION_TEXTS: dict[Score, int] = {"activation": 1000, "taylor": 256}  # by default


@dataclass(frozen=True)
class Pruned:
    """What came of a model."""

    facts: ModelFacts
    shape: Candidate
    others: list[Candidate]  # shapes that would have been as near to the budget, the better first


def prune_model(
    source: str | Path,
    out: Path,
    *,
    calibration: Sequence[Path],
    size: str | None = None,
    parameters: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    score: Score = "activation",
    depth: Depth = "first",
    calibration_texts: int | None = None,
    seed: int = 0,
) -> Pruned:
    """Write the folder of a smaller model; it is there when it is complete, and not before.

    Args:
        source: as `load_base` takes it; bf16 and several files are no matter.
        out: a folder that is not there yet, or is empty.
        calibration: folders of rows or files of texts, as `draw_rows` takes them; with positives for "taylor".
        size, parameters, hidden_size, intermediate_size, layers, heads: as `shapes_to_cut` takes them.
        score: how units and heads are compared (`layerwise`).
        depth: keep the "first" layers, as in the paper, those that "change" a token's direction most, or layers at
            "even" distances, the first and the last among them.
        calibration_texts: texts, or for "taylor" pairs of them, to measure on; by default CALIBRATION_TEXTS.
            Of each the first TOKENS_AT_ONCE tokens count.

    Raises:
        UsageError: a shape that the model does not have, no texts to measure on, or an `out` that is in the way.
        F2Error: a base that our decoder cannot compute, or too little room for hidden states beside `out`.
    """
    _check_choices(score, depth, calibration_texts)
    with complete_or_not_there(out) as folder:
        base = read_base(source)
        shape, *others = shapes_to_cut(
            base.config,
            size=size,
            parameters=parameters,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            layers=layers,
            heads=heads,
        )
        if parameters and abs(shape.parameters - parameters) > CLOSE * parameters:
            say(f"no shape has about {parameters:,} parameters; the nearest has {shape.parameters:,}.")
        count = calibration_texts or CALIBRATION_TEXTS[score]
        rows = draw_rows(calibration, count, seed, answered=score == "taylor")
        facts = _prune(base, shape.config, rows, score, depth, folder, recipe_hash=None)
    return Pruned(facts, shape, others)


def prune_stage(
    config: PruneStage, *, model: Path, data: Path, out: Path, seed: int, recipe_hash: str
) -> dict[str, Any]:
    """Cut the model to the recipe's shape and leave a model folder in `out`."""
    base = read_base(model)
    shape = smaller(
        base.config,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.layers,
        heads=config.heads,
    )
    rows = draw_rows([data], config.calibration_texts, seed, answered=config.score == "taylor")
    out.mkdir(parents=True, exist_ok=True)
    facts = _prune(base, shape, rows, config.score, config.depth, out, recipe_hash)
    return {"parameters": parameters_of(shape), "identity": facts.identity}


def _check_choices(score: Score, depth: Depth, calibration_texts: int | None) -> None:
    for what, value, expected in (("score", score, get_args(Score)), ("depth", depth, get_args(Depth))):
        if value not in expected:
            raise UsageError(f"{what} is {value!r}; expected {' or '.join(map(repr, expected))}.")
    if calibration_texts is not None and calibration_texts < 1:
        raise UsageError(f"calibration_texts is {calibration_texts}; give a number above 0.")


def _prune(
    base: Base,
    shape: DecoderConfig,
    rows: Sequence[Row],
    score: Score,
    depth: Depth,
    out: Path,
    recipe_hash: str | None,
) -> ModelFacts:
    with open_weights(base.folder, base.config) as weights:
        kept = _choose(_measure(base, weights, rows, score, out), shape, depth)
        config = cut_config(base.config, kept)
        write_tensors(out / WEIGHTS, cut_shapes(config), partial(cut_tensor, weights, base.config, kept))
    nested = len(base.facts.matryoshka_sizes) > 1
    facts = ModelFacts(
        eos_id=base.facts.eos_id,
        max_length=base.facts.max_length,
        matryoshka_sizes=matryoshka_sizes(config.hidden_size) if nested else [config.hidden_size],
        instruction=base.facts.instruction,
        template=base.facts.template,
        parent=base.facts.identity,
        recipe=recipe_hash,
        kept=kept_of_the_uncut(base.facts, base.config, kept),
    )
    carry_decontamination([base.folder], out)
    return complete_folder(out, config, base.tokenizer, facts)


# --- Choosing


def _choose(scores: Scores, shape: DecoderConfig, depth: Depth) -> Kept:
    layers = _layers(scores, shape.num_hidden_layers, depth)
    return Kept(
        hidden_E=strongest(scores.hidden_E, shape.hidden_size),
        layers=layers,
        mlp=[strongest(scores.mlp[layer], shape.intermediate_size) for layer in layers],
        groups=[strongest(scores.groups[layer], shape.num_key_value_heads) for layer in layers],
    )


def _layers(scores: Scores, count: int, depth: Depth) -> list[int]:
    if depth == "change":
        chosen: list[int] = strongest(scores.change, count).tolist()
        return chosen
    if depth == "even" and count > 1:
        return torch.linspace(0, len(scores.change) - 1, count).round().int().tolist()
    return list(range(count))


def _measure(base: Base, weights: TensorFiles, rows: Sequence[Row], score: Score, folder: Path) -> Scores:
    """Scores on the rows' queries, or for "taylor" of a loss of queries and positives; texts as they are, no prompt."""
    texts = [row.query for row in rows]
    if score == "taylor":
        texts += [row.positives[0] for row in rows]
    ids = encode(
        base.tokenizer,
        texts,
        eos_id=base.facts.eos_id,
        max_length=min(base.facts.max_length, TOKENS_AT_ONCE),
        too_long="truncate",
    )
    if score == "activation":
        return activation_scores(weights, base.config, ids, folder)
    return taylor_scores(
        weights, base.config, ids, contrastive_loss(rows, base.facts.matryoshka_sizes), folder
    )


def contrastive_loss(rows: Sequence[Row], sizes: list[int]) -> Loss:
    """The in-batch loss of training over the queries and, behind them, the first positives of all rows: [2 B, E].

    Another row's positive is no negative where it is known to be right: by the text, or by the label.
    """
    if len(rows) < 2:
        raise UsageError("the score 'taylor' needs two or more rows with positives, got 1; give more rows.")
    positives = [row.positives[0] for row in rows]
    same = [
        [
            text in row.positives or (row.label is not None and row.label == other.label)
            for text, other in zip(positives, rows, strict=True)
        ]
        for row in rows
    ]
    query_B = torch.arange(len(rows))
    roles = Roles(
        query_B,
        query_B + len(rows),
        negative_BK=torch.full((len(rows), 0), NONE),
        same_BB=torch.tensor(same),
        known_P2=torch.zeros(0, 2, dtype=torch.int64),
        in_batch=True,
    )

    def loss_of(vectors_NE: Tensor) -> Tensor:
        return contrastive_terms(vectors_NE, roles, sizes, torch.tensor(TEMPERATURE))["in_batch"]

    return loss_of
