"""What a recipe will cost before it is run: `f2llm plan`.

recipe -> shapes of models, and their parameters sharded over ranks (shapes.py) -> rows and tokens (survey.py) -> bytes
and operations (cost.py) -> hours and money. No weights, no data and no network are needed; what is there is used: a
model folder's config.json, a stage's rows, a tokenizer.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from f2llm.errors import UsageError
from f2llm.model.decoder import DecoderConfig
from f2llm.plan.cost import (
    GIB,
    GPUS,
    PRICES_OF,
    Gpu,
    Load,
    budgets,
    forward_flops,
    memory_per_gpu,
    training_flops,
)
from f2llm.plan.shapes import Shapes, sharded
from f2llm.plan.survey import TOKENS_PER_TEXT, Survey, survey
from f2llm.recipe import EvaluateStage, IndexStage, PruneStage, Recipe, TokenizerStage
from f2llm.recipe_fields import is_url
from f2llm.recipe_models import ExportStage, MergeStage, SliceStage, TrimStage
from f2llm.recipe_train import TrainStage

UTILISATION = 0.4  # share of the peak that a training run reaches on real texts, if nothing is known


@dataclass(frozen=True)
class Machine:
    """What a plan is for: so many GPUs of a kind, the share of their peak that is reached, and what one costs."""

    gpus: int = 1
    kind: str = "h100"
    utilisation: float = UTILISATION
    price: float | None = None
    """Dollars for a GPU and hour; None for what is assumed of its kind."""

    @property
    def gpu(self) -> Gpu:
        if self.kind not in GPUS:
            raise UsageError(f"--gpu is {self.kind!r}, which is not known; take one of {', '.join(GPUS)}.")
        return GPUS[self.kind]

    @property
    def dollars_per_hour(self) -> float:
        return self.gpus * (self.gpu.dollars_per_hour if self.price is None else self.price)


@dataclass(frozen=True)
class StagePlan:
    """One stage: numbers are None where a stage has none. Bytes are of one GPU, everything else is of all."""

    name: str
    kind: str
    remark: str
    parameters: int | None = None
    steps: int | None = None
    tokens: float | None = None
    tokens_per_microbatch: int | None = None
    memory: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    hours: float = 0.0
    dollars: float = 0.0
    problem: str | None = None
    """Why it cannot be done on these GPUs, and what would help."""


def plan(
    recipe: Recipe, machine: Machine, *, rows: int | None = None, tokens_per_text: int = TOKENS_PER_TEXT
) -> list[StagePlan]:
    """A plan of every stage, in order.

    Args:
        rows, tokens_per_text: what to assume of data that is not there; see `survey`.

    Raises:
        UsageError: the kind of GPU is not known, or the shape of a model cannot be found out.
    """
    shapes, plans = Shapes(recipe), []
    for name, stage in recipe.stages.items():
        if isinstance(stage, TrainStage):
            data = Path(stage.data) if "/" in stage.data else recipe.output / stage.data
            surveyed = survey(stage, data, shapes.tokenizer(name), rows, tokens_per_text)
            plans.append(_plan_training(name, stage, shapes, surveyed, machine))
        elif isinstance(stage, PruneStage):
            plans.append(_plan_pruning(name, stage, shapes, tokens_per_text))
        elif isinstance(stage, SliceStage | TrimStage | MergeStage):
            remark = "tensors of models that are there, on the CPU; not counted"
            parameters = sharded(shapes.of(name), 1).total
            plans.append(StagePlan(name, stage.stage, remark, parameters=parameters))
        else:
            plans.append(StagePlan(name, stage.stage, _remark(stage)))
    return plans


def _remark(stage: Any) -> str:
    """What can be said of a stage that uses no GPU to speak of."""
    if isinstance(stage, TokenizerStage):
        return f"at most {stage.vocab_size:,} entries, learned on the CPU; not counted"
    if isinstance(stage, EvaluateStage):
        return f"held-out names through {len(stage.models)} models, forward passes only; not counted"
    if isinstance(stage, IndexStage):
        return "names through one model, forward passes only; not counted"
    if isinstance(stage, ExportStage):
        return f"written for {stage.to} and compared there, on the CPU; not counted"
    return "rows, made on the CPU; not counted"


# --- Stages


@dataclass(frozen=True)
class _Training:
    """What decides whether a train stage fits."""

    config: DecoderConfig
    stage: TrainStage
    batch: Load
    teacher: DecoderConfig | None

    def memory(self, machine: Machine) -> tuple[int, dict[str, float]]:
        """The largest budget of tokens that fits, and the items; those of the smallest budget if none fits."""
        lora_rank = self.stage.lora.rank if self.stage.lora else None
        placed = sharded(self.config, machine.gpus, lora_rank)
        teacher = sharded(self.teacher, machine.gpus) if self.teacher else None
        for budget in budgets(self.stage, self.batch, machine.gpus):
            items = memory_per_gpu(
                self.config,
                self.stage,
                placed,
                ranks=machine.gpus,
                batch=self.batch,
                budget=budget,
                teacher=teacher,
                gpu=machine.gpu,
            )
            if sum(items.values()) <= machine.gpu.memory_gib * GIB:
                break
        return budget, items

    def fits(self, machine: Machine) -> bool:
        return sum(self.memory(machine)[1].values()) <= machine.gpu.memory_gib * GIB

    def remedies(self, machine: Machine) -> Iterator[str]:
        """Single changes after which it fits."""
        if not self.stage.activation_checkpointing:
            other = self.stage.model_copy(update={"activation_checkpointing": True})
            if replace(self, stage=other).fits(machine):
                yield "set activation_checkpointing: true"
        more = machine.gpus
        while (more := 2 * more) <= self.stage.batch_size:
            if self.fits(replace(machine, gpus=more)):
                yield f"take {more} GPUs"
                break
        for kind in sorted(GPUS, key=lambda name: GPUS[name].memory_gib):
            if self.fits(replace(machine, kind=kind)):
                yield f"take GPUs of the kind {kind}"
                break


def _plan_training(name: str, stage: TrainStage, shapes: Shapes, data: Survey, machine: Machine) -> StagePlan:
    config = shapes.of(name)
    teacher = shapes.of(stage.teacher) if stage.teacher and not is_url(stage.teacher) else None
    batch = data.query * stage.batch_size
    # With a cache the teacher has gone before the first step.
    training = _Training(config, stage, batch, None if stage.distillation.cache else teacher)
    budget, memory = training.memory(machine)
    steps = stage.steps or math.ceil((stage.epochs or 0) * data.rows / stage.batch_size)
    # All micro-batches but the last are computed once without a graph, and again with one.
    micro_batches = max(1, math.ceil(batch.tokens / machine.gpus / budget))
    flops = steps * training_flops(
        config,
        batch,
        again=1 - 1 / micro_batches,
        recompute=stage.activation_checkpointing,
        lora=stage.lora,
    )
    if teacher:
        flops += steps * sum(forward_flops(teacher, batch))
    if stage.validation:
        validations = 1 + math.ceil(steps / stage.validation.every)
        flops += validations * sum(forward_flops(config, data.query * data.held_out))
    remark = (
        f"{data.rows:,} rows an epoch ({data.basis}); {steps:,} steps of {stage.batch_size} queries, "
        f"{data.query.texts:.1f} texts and {data.query.tokens:,.0f} tokens each"
    )
    problem = None
    if (needed := sum(memory.values())) > machine.gpu.memory_gib * GIB:
        remedies = list(training.remedies(machine)) or ["train with lora, or shorten max_length"]
        problem = (
            f"stage {name!r} needs {needed / GIB:,.1f} GiB on each GPU even with micro-batches of {budget:,} tokens, "
            f"but {machine.kind} has {machine.gpu.memory_gib} GiB; {' or '.join(remedies)}."
        )
    return StagePlan(
        name,
        stage.stage,
        remark,
        parameters=sharded(config, machine.gpus).total,
        steps=steps,
        tokens=steps * batch.tokens,
        tokens_per_microbatch=budget,
        memory=memory,
        problem=problem,
        flops=flops,
        hours=(hours := _hours(flops, machine, fp32=stage.precision == "fp32")),
        dollars=hours * machine.dollars_per_hour,
    )


def _plan_pruning(name: str, stage: PruneStage, shapes: Shapes, tokens_per_text: int) -> StagePlan:
    whole, small = sharded(shapes.of(stage.model), 1), sharded(shapes.of(name), 1)
    calibration = Load.of([tokens_per_text]) * stage.calibration_texts
    return StagePlan(
        name,
        stage.stage,
        f"{stage.model} of {whole.total:,} parameters is cut after a forward pass of {stage.calibration_texts:,} "
        f"texts, on the CPU, where both models take {4 * (whole.total + small.total) / GIB:.1f} GiB",
        parameters=small.total,
        tokens=calibration.tokens,
        flops=sum(forward_flops(shapes.of(stage.model), calibration)),
    )


def _hours(flops: float, machine: Machine, fp32: bool) -> float:
    """Time that so much work takes."""
    peak = machine.gpu.tflops_fp32 if fp32 else machine.gpu.tflops_bf16
    return flops / (machine.gpus * peak * 1e12 * machine.utilisation) / 3600


# --- For people and for scripts


def as_dict(recipe: Recipe, machine: Machine, plans: list[StagePlan]) -> dict[str, Any]:
    """All numbers of a plan; `total` adds up the stages."""
    stages = [asdict(one) | {"memory_total": sum(one.memory.values())} for one in plans]
    return {
        "recipe": recipe.name,
        "machine": asdict(machine) | {"dollars_per_hour": machine.dollars_per_hour},
        "stages": stages,
        "total": total(plans),
    }


def total(plans: list[StagePlan]) -> dict[str, float]:
    """Tokens, operations, hours and dollars of all stages together."""
    return {
        what: sum(getattr(one, what) or 0 for one in plans)
        for what in ("tokens", "flops", "hours", "dollars")
    }


def render(recipe: Recipe, machine: Machine, plans: list[StagePlan]) -> str:
    """The plan as text: a paragraph a stage, then a table with a line for each that takes GPU time."""
    gpu = machine.gpu
    price = machine.dollars_per_hour / machine.gpus
    whose = f"assumed on {PRICES_OF}, --price sets another" if machine.price is None else "as given"
    lines = [
        f"{recipe.name} on {machine.gpus} x {machine.kind}. Each has {gpu.memory_gib} GiB and a peak of "
        f"{gpu.tflops_bf16:,} TFLOP/s (bf16), {machine.utilisation:.0%} of it reached, for ${price:.2f} an hour "
        f"({whose}).",
    ]
    for one in plans:
        lines += ["", f"{one.name} ({one.kind}): {one.remark}."]
        if one.tokens_per_microbatch:
            lines.append(f"  micro-batches of at most {one.tokens_per_microbatch:,} tokens on each GPU")
        width = max(map(len, one.memory), default=0)
        lines += [f"  {item:<{width}} {size / GIB:8.2f} GiB" for item, size in one.memory.items()]
    heads = ("stage", "parameters", "GiB per GPU", "tokens", "FLOPs", "hours", "dollars")
    table = [heads, *(_cells(one) for one in plans), ("total", "", "", *_sums(total(plans)))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines.append("")
    for row in table:
        cells = (
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(one: StagePlan) -> tuple[str, ...]:
    if one.parameters is None:
        return (one.name, *["-"] * 6)
    memory = f"{sum(one.memory.values()) / GIB:,.1f}" + ("!" if one.problem else "") if one.memory else "-"
    work = ["-"] * 4 if one.tokens is None else _sums(asdict(one))
    return (one.name, f"{one.parameters:,}", memory, *work)


def _sums(numbers: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{numbers['tokens']:.3g}",
        f"{numbers['flops']:.3g}",
        *(f"{x:,.2f}" if x >= 0.01 else f"{x:.1g}" for x in (numbers["hours"], numbers["dollars"])),
    )
