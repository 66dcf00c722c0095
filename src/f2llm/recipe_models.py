"""The stages of a recipe that make models out of models without training, and write them for other runtimes."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from f2llm.recipe_errors import problem
from f2llm.recipe_fields import DATA_OR_FOLDER, FILES, STAGE_OR_MODEL, Strict

OF_WHICH = "the stage whose model to take, or a model folder or hub model as in a train stage's 'base'"


class SliceStage(Strict):
    """A smaller model out of one that was trained for it: fewer layers, a table of a lower rank, shorter vectors."""

    stage: Literal["slice"]
    model: Annotated[str, STAGE_OR_MODEL] = Field(description=OF_WHICH)
    layers: int | None = Field(None, ge=1, description="keep the first so many layers")
    rank: int | None = Field(None, ge=1, description="project the embedding table onto this rank")
    dim: int | None = Field(None, ge=1, description="dimensions of the vectors")

    @model_validator(mode="after")
    def _cuts_something(self) -> Self:
        if self.layers is None and self.rank is None and self.dim is None:
            raise problem("give one or more of 'layers', 'rank' and 'dim'")
        return self


class TrimStage(Strict):
    """A copy of a model with the tokens that a corpus uses; texts whose tokens are all kept keep their vectors."""

    stage: Literal["trim"]
    model: Annotated[str, STAGE_OR_MODEL] = Field(description=OF_WHICH)
    data: Annotated[list[str], DATA_OR_FOLDER] = Field(
        min_length=1, description="stages or folders of rows whose texts to count tokens in"
    )
    languages: list[str] | None = Field(
        None, min_length=1, description="of the rows, those of these languages; all if left out"
    )
    keep: int | None = Field(None, ge=1, description="most tokens; all that the corpus uses if left out")


class MergeStage(Strict):
    """One model out of several of one shape and tokenizer."""

    stage: Literal["merge"]
    models: Annotated[list[str], STAGE_OR_MODEL] = Field(min_length=1, description="the models to merge")
    method: Literal["average", "spherical", "task"] = Field(
        "average", description="a mean, a spherical mean of two, or a base and what each has learnt from it"
    )
    weights: list[float] | None = Field(None, description="one for each model; equal if left out")
    base: Annotated[str | None, STAGE_OR_MODEL] = Field(
        None, description="what the models were trained from, for 'task'"
    )


class ExportStage(Strict):
    """A model for another runtime, compared there with the original; README.md has the table."""

    stage: Literal["export"]
    model: Annotated[str, STAGE_OR_MODEL] = Field(description=OF_WHICH)
    to: Literal["onnx", "openvino", "gguf", "static"] = Field(description="the runtime")
    quantize: str | None = Field(
        None,
        description="int8, int8-weights (onnx), q8_0 (gguf), f32 or f16; the first that the target has, if left out",
    )
    dim: int | None = Field(None, ge=1, description="dimensions of the vectors; all if left out")
    texts: Annotated[str | None, FILES] = Field(
        None, description="a file of texts to compare on; names of things if left out"
    )
