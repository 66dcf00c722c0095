"""Recipes: one YAML file says what a run does, stage by stage, in the order in which data flows.

A recipe is strict: an unknown key, a wrong type or a reference to nothing is one sentence with file and line. What
a stage takes from earlier ones is marked in its fields with `Takes`, and nowhere else: the check of references here
and the wiring in pipeline.py both read those marks (`inputs`).
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from f2llm.errors import UsageError
from f2llm.recipe_corpus import (
    CleanStage,
    DecontaminateStage,
    MineStage,
    SourcesStage,
    SyntheticStage,
    TokeniseStage,
)
from f2llm.recipe_data import FilesStage, NamesStage
from f2llm.recipe_errors import explain, nearest, problem
from f2llm.recipe_fields import (
    DATA,
    DATA_OR_FOLDER,
    MODEL,
    MODELS,
    NAMES,
    ROWS,
    STAGE_OR_MODEL,
    Input,
    Strict,
    Takes,
)
from f2llm.recipe_models import ExportStage, MergeStage, SliceStage, TrimStage
from f2llm.recipe_train import TrainStage
from f2llm.yaml_lines import Location, read_yaml


class TokenizerStage(Strict):
    """A byte-level BPE trained on the texts of `data`."""

    stage: Literal["tokenizer"]
    data: Annotated[str, DATA] = Field(description="the names or files stage whose texts to learn from")
    vocab_size: int = Field(
        ge=258, description="entries, at most: at least the 256 bytes and 2 special tokens"
    )
    lowercase: bool = Field(False, description="whether capital and small letters are the same to the model")
    decompose: bool = Field(
        False,
        description="whether accents and Hangul letters are tokens of their own (NFD inside the tokenizer)",
    )


class PruneStage(Strict):
    """A smaller copy of a model: the weakest units of both widths and some layers are cut, and heads if wanted."""

    stage: Literal["prune"]
    model: Annotated[str, STAGE_OR_MODEL] = Field(
        description="the train or prune stage whose model to cut, or a model folder or hub model as in 'base'"
    )
    data: Annotated[str, DATA_OR_FOLDER] = Field(
        description="the names or files stage with texts to measure activations on, or a folder of rows"
    )
    hidden_size: int = Field(ge=8, description="hidden width to keep")
    intermediate_size: int = Field(ge=1, description="MLP width to keep")
    layers: int = Field(ge=1, description="layers to keep")
    heads: int | None = Field(
        None, ge=1, description="query heads to keep, in groups that share a key/value head; all if left out"
    )
    score: Literal["activation", "taylor"] = Field(
        "activation",
        description="what the strongest units are: those of the largest activations, or those that a contrastive loss "
        "of queries and positives depends on most",
    )
    depth: Literal["first", "change", "even"] = Field(
        "first",
        description="which layers to keep: the first, those that change a text's tokens most, or some at "
        "even distances",
    )
    calibration_texts: int = Field(1000, ge=1, description="texts, or with 'taylor' pairs, to measure on")


class EvaluateStage(Strict):
    """Accuracy of models on held-out names, by language and embedding size."""

    stage: Literal["evaluate"]
    data: Annotated[str, NAMES] = Field(description="the names stage with the held-out names")
    models: Annotated[list[str], MODEL] = Field(
        min_length=1, description="the train or prune stages to score"
    )
    baselines: bool = Field(True, description="score character n-grams and exact look-up beside them")


class IndexStage(Strict):
    """The names embedded and stored for search."""

    stage: Literal["index"]
    data: Annotated[str, NAMES] = Field(description="the names stage with the names to index")
    model: Annotated[str, MODEL] = Field(description="the train or prune stage whose model embeds them")
    dim: int | None = Field(None, ge=1, description="dimensions to store; the model's full width if left out")
    examples: list[str] = Field(
        default_factory=list, description="queries to search for when the run is done"
    )


Stage = Annotated[
    NamesStage
    | FilesStage
    | SourcesStage
    | SyntheticStage
    | CleanStage
    | DecontaminateStage
    | MineStage
    | TokeniseStage
    | TokenizerStage
    | TrainStage
    | PruneStage
    | SliceStage
    | TrimStage
    | MergeStage
    | ExportStage
    | EvaluateStage
    | IndexStage,
    Field(discriminator="stage"),
]
# A stage's name is its folder's: lower case, since some file systems do not tell the cases apart.
StageName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Recipe(Strict):
    """A whole run."""

    name: str = Field(min_length=1, description="what to call the run")
    seed: int = Field(0, ge=0, description="everything random follows from it")
    output: Path = Field(strict=False, description="folder of the run, relative to the current directory")
    stages: dict[StageName, Stage] = Field(
        min_length=1, description="the stages by name, in the order they run"
    )

    @model_validator(mode="after")
    def _references_hold(self) -> Self:
        wrong = list(_wrong_references(self.stages))
        if wrong:
            sentence, location = wrong[0]
            raise problem(sentence, *location, more=len(wrong) - 1)
        return self


def load(path: Path) -> Recipe:
    """Read a recipe file; whatever is wrong with it is a `UsageError` of one sentence with file and line."""
    document = read_yaml(path)
    try:
        return Recipe.model_validate(document.value)
    except ValidationError as error:
        raise UsageError(explain(path, document, error, Recipe)) from None


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of what decides the result: seed and stages, but neither the run's name nor where it is written."""
    values = recipe.model_dump(mode="json", exclude={"name", "output"})
    return hashlib.sha256(canonical_json(values)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one way to write `value` as JSON: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def inputs(stage: Stage) -> Iterator[Input]:
    """What a stage takes, in the order of its fields."""
    for field, info in type(stage).model_fields.items():
        for takes in info.metadata:
            value = getattr(stage, field)
            if isinstance(takes, Takes) and isinstance(value, str):
                yield Input((field,), value, takes)
            elif isinstance(takes, Takes) and value is not None:
                yield from (Input((field, number), name, takes) for number, name in enumerate(value))


def _wrong_references(stages: dict[str, Stage]) -> Iterator[tuple[str, Location]]:
    """A sentence and its place for every input that is not an earlier stage of a right kind."""
    earlier: dict[str, Stage] = {}
    for name, stage in stages.items():
        for item in inputs(stage):
            valid = [other for other, config in earlier.items() if config.stage in item.takes.kinds]
            if item.is_path or item.is_url or item.name in valid:
                continue
            if item.name in earlier:
                what = f"a {earlier[item.name].stage} stage"
            else:
                what = "which comes no earlier" if item.name in stages else "which is no stage of this recipe"
            wanted = f"an earlier {' or '.join(item.takes.kinds)} stage"
            for group, what_it_ends_in in ((ROWS, "rows"), (MODELS, "a model")):
                if item.takes.kinds[: len(group)] == group:
                    others = [f"an earlier {kind} stage" for kind in item.takes.kinds[len(group) :]]
                    wanted = " or ".join([f"an earlier stage of {what_it_ends_in}", *others])
            if item.takes.or_path:
                wanted += ", or a path with a slash"
            yield (
                f"{item.location[0]!r} of stage {name!r} ({stage.stage}) is {item.name!r}, {what}, "
                f"but it should name {wanted}: {nearest(item.name, valid, 'stage')}",
                ("stages", name, *item.location),
            )
        earlier[name] = stage
