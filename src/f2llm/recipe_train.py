"""The train stage of a recipe: what is drawn, what is minimised, how a step is made, and how a run is kept."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from f2llm.recipe_errors import problem
from f2llm.recipe_fields import (
    FORMATS,
    ROWS,
    STAGE_OR_MODEL,
    TEACHER,
    TOKENIZER,
    Format,
    Strict,
    Takes,
    is_url,
)

DistillationTerm = Literal["mse", "cosine", "similarity", "ranking"]


class Shape(Strict):
    """The shape of a new Qwen3 decoder; the vocabulary is the tokenizer's."""

    hidden_size: int = Field(ge=8, description="width of the residual stream and of the embedding")
    intermediate_size: int = Field(ge=1, description="width of the MLP")
    layers: int = Field(ge=1, description="number of decoder layers")
    heads: int = Field(ge=1, description="number of query heads")
    kv_heads: int = Field(ge=1, description="number of key and value heads; divides heads")
    head_dim: int = Field(ge=2, multiple_of=2, description="width of one head; even, for rotary positions")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.heads % self.kv_heads:
            raise problem(f"'kv_heads' ({self.kv_heads}) must divide 'heads' ({self.heads})", "kv_heads")
        return self


class HardNegatives(Strict):
    """How many hard negatives each query gets, by format (defaults: F2LLM-v2's)."""

    retrieval: int = Field(7, ge=0, description="for retrieval rows")
    clustering: int = Field(9, ge=0, description="for clustering rows")
    classification: int = Field(1, ge=0, description="for two-way classification rows")


class Lora(Strict):
    """Low-rank adapters on all linear layers in place of their weights; merged into them when the run is done."""

    rank: int = Field(16, ge=1, description="inner width of each adapter")
    alpha: float = Field(32.0, gt=0, description="adapters count alpha / rank times")


class Distillation(Strict):
    """What a student learns from its teacher's vectors, beside the contrastive terms."""

    terms: dict[DistillationTerm, Annotated[float, Field(gt=0)]] = Field(
        {"mse": 1.0},
        min_length=1,
        description="weights of: mse (squared distance of raw vectors, as in the paper), cosine (1 - cosine), "
        "similarity (KL divergence between the two's softmax of a query over the batch's documents), ranking (the "
        "order of the teacher's nearest documents)",
    )
    target: Literal["prefix", "kept", "projection"] = Field(
        "prefix",
        description="what mse and cosine compare with: a wider teacher's first dimensions, as in the paper, those "
        "that pruning kept, where the student was cut from a model the teacher was trained from, or all of them, "
        "through a matrix that is trained along and left out of the model",
    )
    temperature: float = Field(0.05, gt=0, description="what similarity and ranking divide cosines by")
    contrastive: float = Field(
        1.0, ge=0, description="weight of the contrastive terms; 0 learns from the teacher alone"
    )
    cache: str | None = Field(
        None,
        min_length=1,
        description="folder that keeps the teacher's vectors, for all runs: they are computed before the first step, "
        "and the teacher is not in memory after it",
    )
    cache_precision: Literal["float16", "int8"] = Field("float16", description="of the vectors in the cache")
    model: str | None = Field(None, min_length=1, description="of a teacher behind a URL, its name there")
    api_key_env: str | None = Field(
        None, min_length=1, description="environment variable that holds the key of the URL"
    )


class Validation(Strict):
    """Rows kept out of training, on which the loss and a retrieval score are taken as the run goes on."""

    rows: int = Field(256, ge=2, description="rows held out of each source, at most a tenth of it")
    every: int = Field(
        100, ge=1, description="steps between two validations; step 0 and the last have one too"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after this many validations without a better score, and keep the best weights",
    )


class TrainStage(Strict):
    """Contrastive training of a new decoder (`shape` and `tokenizer`) or of an earlier one (`base`)."""

    stage: Literal["train"]
    data: Annotated[str, Takes((*ROWS, "tokenise"), or_path=True)] = Field(
        description="the stage with the rows, or the tokenise stage that has them as token ids, which trains to the "
        "same weights; or the path (with a slash) of such a folder"
    )
    base: Annotated[str | None, STAGE_OR_MODEL] = Field(
        None,
        description="the train or prune stage to go on from, the path (with a slash) of a model folder, or a model "
        "of the hub, as owner/name or owner/name@revision",
    )
    shape: Shape | None = Field(None, description="the shape of a new decoder, with random weights")
    tokenizer: Annotated[str | None, TOKENIZER] = Field(
        None, description="the tokenizer stage of a new decoder"
    )
    teacher: Annotated[str | None, TEACHER] = Field(
        None,
        description="the train stage to distil from, a model folder or hub model as in 'base', or the URL of an "
        "OpenAI-compatible server, such as http://localhost:8000/v1",
    )
    distillation: Distillation = Field(Distillation(), description="what to learn from the teacher")

    # What is drawn.
    formats: list[Format] = Field(FORMATS, min_length=1, description="which formats' rows to train on")
    source_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="how often each source is drawn, relative to its number of rows (1)"
    )
    cap: int | None = Field(None, ge=1, description="most rows of a source (or of its languages) in an epoch")
    cap_by: Literal["source", "language"] = Field(
        "source", description="whether the cap is for a source or for each language of a source"
    )
    language_temperature: float = Field(
        1.0,
        ge=1,
        description="languages of a source are drawn by their rows to the power of 1 / this: 1 as they are, "
        "more evens them out",
    )
    instructions: bool = Field(description="whether queries carry their source's instruction")
    document_instruction_rate: float = Field(
        0.3, ge=0, le=1, description="share of documents of symmetric sources that carry the instruction too"
    )
    steps: int | None = Field(None, ge=1, description="optimizer steps")
    epochs: float | None = Field(None, gt=0, description="passes over the rows, in place of steps")
    batch_size: int = Field(ge=2, description="queries in a step, over all ranks")
    max_length: int = Field(512, ge=2, description="tokens of a text, EOS included; longer ones are cut")
    hard_negatives: HardNegatives = Field(
        HardNegatives(), description="hard negatives for each query, by format"
    )

    # The objective.
    objective: Literal["f2llm-v2", "joint"] = Field(
        "f2llm-v2",
        description="two softmaxes (in-batch and hard) as in the paper, or one over all documents of the batch",
    )
    both_directions: bool = Field(
        False, description="with the joint objective, find the query of a positive as well"
    )
    gather_gradient: bool = Field(
        True, description="whether in-batch positives get a gradient; false is what the reference code does"
    )
    matryoshka: bool = Field(True, description="train the prefixes of 8, 16, 32 ... dimensions as well")
    exits: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list,
        description="numbers of layers that are trained to be enough too, so that a model can be cut there later",
    )
    table_ranks: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list,
        description="ranks of the embedding table that are trained to be enough too; each step draws one or the whole",
    )
    temperature: float = Field(0.05, gt=0, description="what cosine similarities are divided by")
    learn_temperature: bool = Field(False, description="whether the temperature is trained too")

    # The step.
    learning_rate: float = Field(gt=0, description="AdamW's highest learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the learning rate falls"
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises from 0")
    floor: float = Field(0.0, ge=0, lt=1, description="share of the learning rate below which it never falls")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay")
    clip_norm: float = Field(1.0, gt=0, description="gradients longer than this are scaled down to it")
    embedding_rows: Literal["dense", "exact", "lazy"] = Field(
        "dense",
        description="how AdamW moves rows of the embedding table that a step does not touch: always, "
        "later but to the same value, or not at all",
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="keep a moving average of the weights with this decay, and save that"
    )
    lora: Lora | None = Field(None, description="train low-rank adapters only")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of the computation: auto is bf16 on a GPU and fp32 on a CPU; weights stay in fp32",
    )
    tokens_per_microbatch: int | None = Field(
        None,
        ge=1,
        description="most tokens computed at once on a rank; what memory allows, found by trying, if left out",
    )
    activation_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass instead of keeping them"
    )

    # Keeping and watching.
    checkpoint_every: int = Field(100, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = Field(1, ge=1, description="newest checkpoints that are kept during a run")
    validation: Validation | None = Field(None, description="rows held out, and when to score them")
    tensorboard: bool = Field(False, description="write TensorBoard events beside log.jsonl")

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        for name in ("exits", "table_ranks"):
            values = getattr(self, name)
            if values != sorted(set(values)):
                raise problem(f"{name!r} is {values}; write each number once, in ascending order", name)
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.base is None) == (self.shape is None):
            raise problem("exactly one of 'base' (go on from a model) and 'shape' (a new one) must be given")
        if (self.shape is None) != (self.tokenizer is None):
            raise problem("'tokenizer' goes with 'shape': a new decoder needs one, a 'base' brings its own")
        if (self.steps is None) == (self.epochs is None):
            raise problem("exactly one of 'steps' and 'epochs' must be given")
        for field, needs, there in (
            ("distillation", "a 'teacher'", self.teacher is not None),
            ("document_instruction_rate", "'instructions'", self.instructions),
            ("cap_by", "a 'cap'", self.cap is not None),
            ("both_directions", "the joint 'objective'", self.objective == "joint"),
        ):
            if field in self.model_fields_set and not there:
                raise problem(f"{field!r} has no effect without {needs}", field)
        if self.objective == "joint" and not self.gather_gradient:
            raise problem(
                "'gather_gradient: false' exists for the f2llm-v2 'objective' only", "gather_gradient"
            )
        if sentence := wrong_distillation(self.teacher, self.distillation):
            raise problem(sentence, "distillation")
        if self.lora and self.shape:
            raise problem("'lora' adapts a trained model: give a 'base' instead of a 'shape'", "lora")
        if self.lora and self.embedding_rows != "dense":
            raise problem(
                "'embedding_rows' has no effect with 'lora', which keeps the table", "embedding_rows"
            )
        if self.steps and self.warmup_steps > self.steps:
            raise problem(
                f"'warmup_steps' ({self.warmup_steps}) exceeds 'steps' ({self.steps})", "warmup_steps"
            )
        return self


def wrong_distillation(teacher: str | None, distillation: Distillation) -> str | None:
    """What is wrong between a teacher and what is to be learnt from it, if anything."""
    behind_url = teacher is not None and is_url(teacher)
    if behind_url and not distillation.model:
        return (
            "a teacher behind a URL needs its name there: give 'model' of 'distillation', or --teacher-model"
        )
    if behind_url and "mse" in distillation.terms:
        return (
            "a teacher behind a URL gives vectors of unit length, so there are no raw ones for 'mse'; take 'terms' of "
            "cosine, similarity and ranking"
        )
    for name in ("model", "api_key_env"):
        if getattr(distillation, name) and not behind_url:
            return f"{name!r} is for a teacher behind a URL"
    if "cache_precision" in distillation.model_fields_set and not distillation.cache:
        return "'cache_precision' has no effect without a 'cache'"
    if distillation.target != "prefix" and not distillation.terms.keys() & {"mse", "cosine"}:
        return f"'target: {distillation.target}' has no effect without the terms mse or cosine"
    if "temperature" in distillation.model_fields_set and not distillation.terms.keys() & {
        "similarity",
        "ranking",
    }:
        return "'temperature' has no effect without the terms similarity or ranking"
    return None
