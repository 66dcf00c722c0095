"""Plans: the family's sizes to the parameter, shards as torch makes them, and sums that follow from one another."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from f2llm.cli import app
from f2llm.data.rows import Source, rows_table, write_rows
from f2llm.errors import F2Error, UsageError
from f2llm.family import FAMILY, FamilyMember
from f2llm.files import write_json, write_text
from f2llm.model.decoder import Decoder, DecoderConfig, config_to_json, parameters_of
from f2llm.plan.cost import GIB, GPUS, Load, forward_flops, training_flops
from f2llm.plan.shapes import Shapes, sharded
from f2llm.plan.stages import Machine, StagePlan, as_dict, plan, render, total
from f2llm.recipe import Recipe, load

RECIPES = Path(__file__).parents[2] / "recipes"
EIGHT = Machine(8)


def shape_of(member: FamilyMember, vocab_size: int | None = None) -> DecoderConfig:
    return DecoderConfig(
        vocab_size or member.vocab_size,
        member.hidden_size,
        member.intermediate_size,
        member.layers,
        member.heads,
        member.kv_heads,
        member.head_dim,
    )


def recipe_of(folder: Path, **stages: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"name": "test", "output": str(folder / "run"), "stages": stages})


def training(
    base: str = "nowhere/Qwen3-0.6B/", data: str = "nowhere/rows/", **changes: Any
) -> dict[str, Any]:
    return {
        "stage": "train",
        "data": data,
        "base": base,
        "instructions": False,
        "steps": 1000,
        "batch_size": 512,
        "learning_rate": 1e-5,
        "max_length": 1024,
        **changes,
    }


def only(recipe: Recipe, machine: Machine = EIGHT, **options: Any) -> StagePlan:
    return plan(recipe, machine, **options)[-1]


# --- Parameters


@pytest.mark.parametrize("size", FAMILY)
def test_every_size_has_its_parameters(size: str, tmp_path: Path) -> None:
    """From its name alone: neither the model nor its data is there."""
    planned = only(recipe_of(tmp_path, train=training(f"nowhere/Qwen3-{size}/")))
    assert planned.parameters == FAMILY[size].total_parameters
    assert planned.flops and planned.hours and planned.dollars and planned.tokens
    assert planned.memory["weights (float32)"] == pytest.approx(FAMILY[size].total_parameters / 2, rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 3, 8, 1000])
def test_shards_are_torchs(ranks: int) -> None:
    """FSDP2 cuts the first dimension of every parameter into equal parts, rounded up; rank 0 has a full one."""
    config = DecoderConfig(515, 64, 100, 3, 4, 2, 16)
    parts = [math.ceil(p.shape[0] / ranks) * math.prod(p.shape[1:]) for p in Decoder(config).parameters()]
    placed = sharded(config, ranks)
    assert placed.local == sum(parts)
    assert placed.total == placed.table + 3 * placed.largest_layer == placed.trained


def test_nothing_is_left_of_the_ranks_that_are_not_there() -> None:
    sharded.cache_clear()
    sharded(DecoderConfig(500, 64, 96, 2, 4, 2, 16), 4)
    assert not dist.is_initialized()


def test_lora_trains_a_small_part(tmp_path: Path) -> None:
    """16 numbers for each input and output of seven matrices in 28 layers, from Table 1's widths."""
    lora = only(recipe_of(tmp_path, train=training(lora={"rank": 16})))
    widths = 2 * (1024 + 2048) + 2 * (1024 + 1024) + 3 * (1024 + 3072)
    assert lora.memory["AdamW's two moments (float32)"] == 8 * 16 * 28 * widths / 8
    assert lora.flops < only(recipe_of(tmp_path, train=training())).flops


# --- Shapes


def test_the_files_of_a_model_win_over_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-0.6B"
    assert Shapes(recipe_of(tmp_path, train=training(f"{folder}/"))).of("train") == shape_of(FAMILY["0.6B"])
    config = DecoderConfig(515, 64, 100, 3, 4, 2, 16)
    write_json(folder / "config.json", config_to_json(config))
    assert Shapes(recipe_of(tmp_path, train=training(f"{folder}/"))).of("train") == config


def test_slices_trims_and_merges_have_the_shapes_they_end_in(tmp_path: Path) -> None:
    """And what is trained from one of them its own; a cached teacher is not in memory."""
    recipe = recipe_of(
        tmp_path,
        texts={"stage": "names"},
        whole=training(),
        part={"stage": "slice", "model": "whole", "layers": 5},
        few={"stage": "trim", "model": "part", "data": ["texts"], "keep": 9000},
        both={"stage": "merge", "models": ["few", "few"]},
        student=training("both", teacher="whole"),
        cached=training("both", teacher="whole", distillation={"cache": "vectors"}),
        behind=training(
            "both", teacher="http://localhost/v1", distillation={"terms": {"cosine": 1.0}, "model": "m"}
        ),
    )
    shape = replace(shape_of(FAMILY["0.6B"]), num_hidden_layers=5, vocab_size=9000)
    *_, few, both, student, cached, behind = plan(recipe, EIGHT)
    assert few.parameters == both.parameters == student.parameters == parameters_of(shape)
    with_teacher = [any("teacher" in item for item in one.memory) for one in (student, cached, behind)]
    assert with_teacher == [True, False, False]
    assert student.flops == cached.flops > behind.flops


def test_a_cut_model_has_the_shape_that_it_is_cut_to(tmp_path: Path) -> None:
    small = FAMILY["80M"]
    recipe = recipe_of(
        tmp_path,
        texts={"stage": "names"},
        whole=training(),
        cut={
            "stage": "prune",
            "model": "whole",
            "data": "texts",
            "hidden_size": small.hidden_size,
            "intermediate_size": small.intermediate_size,
            "layers": small.layers,
        },
        student=training("cut", teacher="whole"),
    )
    names, _, cut, student = plan(recipe, EIGHT)
    assert names.parameters is None and names.remark
    assert cut.parameters == student.parameters == small.total_parameters
    assert any("teacher" in item for item in student.memory)
    again = recipe.stages["cut"].model_copy(update={"hidden_size": 2048})
    wrong = recipe.model_copy(update={"stages": recipe.stages | {"cut": again}})
    with pytest.raises(
        UsageError, match="hidden_size of stage 'cut' \\(prune\\) is 2048, but whole has 1024"
    ):
        plan(wrong, EIGHT)


def test_what_cannot_be_known_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shape of nowhere/mine/ is not known.*config.json"):
        only(recipe_of(tmp_path, train=training("nowhere/mine/")))
    with pytest.raises(UsageError, match="--gpu is 'h1000'.*h100, h200"):
        only(recipe_of(tmp_path, train=training()), Machine(1, "h1000"))


def test_every_stage_of_a_recipe_is_planned() -> None:
    recipe = load(RECIPES / "quickstart.yaml")
    planned = plan(recipe, EIGHT)
    assert [(one.name, one.kind) for one in planned] == [
        (name, stage.stage) for name, stage in recipe.stages.items()
    ]
    assert all(one.remark for one in planned)
    assert all(one.flops > 0 for one in planned if one.kind in ("train", "prune"))


# --- Work, time and money


def test_work_of_a_stage_written_out(tmp_path: Path) -> None:
    """9 texts of 100 tokens a query, a teacher, all computed twice but for the last of eight micro-batches."""
    config, teacher = shape_of(FAMILY["0.6B"]), shape_of(FAMILY["1.7B"])
    recipe = recipe_of(
        tmp_path,
        elder=training("nowhere/Qwen3-1.7B/"),
        train=training(
            teacher="elder", tokens_per_microbatch=512 * 9 * 100 // 64, activation_checkpointing=True
        ),
    )
    planned = only(recipe, tokens_per_text=100)
    batch = Load.of([100] * 9) * 512
    step = training_flops(config, batch, again=7 / 8, recompute=True) + sum(forward_flops(teacher, batch))
    assert planned.tokens == 1000 * 512 * 9 * 100
    assert planned.flops == pytest.approx(1000 * step)
    assert planned.hours == pytest.approx(planned.flops / (8 * 989e12 * 0.4) / 3600)
    assert planned.dollars == pytest.approx(planned.hours * 8 * GPUS["h100"].dollars_per_hour)
    other = only(recipe, Machine(8, "h100", utilisation=0.2, price=1.0), tokens_per_text=100)
    assert other.hours == pytest.approx(2 * planned.hours)
    assert other.dollars == pytest.approx(8 * other.hours)


def test_a_batch_that_fits_is_computed_once(tmp_path: Path) -> None:
    config, batch = shape_of(FAMILY["0.6B"]), Load.of([100] * 9) * 8
    planned = only(recipe_of(tmp_path, train=training(batch_size=8)), Machine(1), tokens_per_text=100)
    assert planned.flops == pytest.approx(1000 * training_flops(config, batch))


def test_steps_come_from_epochs_and_rows(tmp_path: Path) -> None:
    stage = training(epochs=1.5)
    del stage["steps"]
    assert only(recipe_of(tmp_path, train=stage), rows=1000).steps == math.ceil(1.5 * 1000 / 512)
    published = only(recipe_of(tmp_path, train=stage | {"data": "corpus/stage1/"}))
    assert published.steps == math.ceil(1.5 * 26_693_280 / 512)


def test_a_plan_uses_the_rows_that_are_there(tmp_path: Path) -> None:
    source = Source(name="s", format="clustering", task="t", symmetric=True, instruction="", licence="MIT")
    columns = {"query": [f"{i}" for i in range(60)], "query_lang": ["und"] * 60, "label": ["a", "b"] * 30}
    write_rows(tmp_path / "rows", rows_table(source, columns), [source])
    stage = training(data=f"{tmp_path}/rows/", epochs=3, batch_size=8)
    del stage["steps"]
    planned = only(recipe_of(tmp_path, train=stage), rows=10**6)
    assert planned.steps == math.ceil(3 * 60 / 8)
    assert "counted in" in planned.remark


# --- Memory


def in_use(planned: StagePlan) -> float:
    return sum(planned.memory.values()) / GIB


@pytest.mark.parametrize("size", ["160M", "1.7B", "4B"])
def test_micro_batches_are_as_large_as_fits(size: str, tmp_path: Path) -> None:
    """A power of two of tokens that fits, and the next one does not."""
    stage = training(f"nowhere/{size}/", activation_checkpointing=size == "4B")
    planned = only(recipe_of(tmp_path, train=stage))
    budget = planned.tokens_per_microbatch
    assert budget and budget.bit_count() == 1
    assert in_use(planned) <= GPUS["h100"].memory_gib and not planned.problem
    larger = only(recipe_of(tmp_path, train=stage | {"tokens_per_microbatch": 2 * budget}))
    assert in_use(larger) > GPUS["h100"].memory_gib and larger.problem


def test_what_does_not_fit_comes_with_what_helps(tmp_path: Path) -> None:
    """Each remedy of the sentence is tried, and holds."""

    def problem_of(machine: Machine, base: str = "nowhere/Qwen3-4B/", **changes: Any) -> str | None:
        return only(recipe_of(tmp_path, train=training(base, **changes)), machine).problem

    problem = problem_of(Machine(2, "a100-40gb")) or ""
    assert problem.startswith("stage 'train' needs ") and "but a100-40gb has 40.0 GiB; " in problem
    assert problem.endswith(
        "; set activation_checkpointing: true or take 4 GPUs or take GPUs of the kind l40s."
    )
    assert problem_of(Machine(2, "a100-40gb"), activation_checkpointing=True) is None
    assert problem_of(Machine(4, "a100-40gb")) is None
    assert problem_of(Machine(2, "l40s")) is None
    one = problem_of(Machine(1), "nowhere/8B/") or ""
    assert "take 2 GPUs" in one and "activation_checkpointing" not in one
    hopeless = problem_of(Machine(1, "rtx4090"), "nowhere/14B/", batch_size=2) or ""
    assert hopeless.endswith("; train with lora, or shorten max_length.")


# --- What is shown


def test_json_and_text_have_the_same_numbers(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, one=training(), two=training("one"))
    planned = plan(recipe, EIGHT)
    values = json.loads(json.dumps(as_dict(recipe, EIGHT, planned)))
    assert values["total"]["hours"] == pytest.approx(sum(stage["hours"] for stage in values["stages"]))
    assert values["total"] == total(planned)
    assert values["stages"][0]["memory_total"] == pytest.approx(sum(values["stages"][0]["memory"].values()))
    last = render(recipe, EIGHT, planned).splitlines()[-1].split()
    assert last[0] == "total" and float(last[-1].replace(",", "")) == pytest.approx(
        values["total"]["dollars"], abs=0.01
    )


def test_the_command_fails_where_a_stage_does_not_fit(tmp_path: Path) -> None:
    write_text(
        tmp_path / "recipe.yaml",
        "name: large\noutput: out\nstages:\n  train:\n"
        + "".join(f"    {key}: {json.dumps(value)}\n" for key, value in training("nowhere/8B/").items()),
    )
    arguments = ["plan", str(tmp_path / "recipe.yaml"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, F2Error) and "take 2 GPUs" in str(done.exception)
    assert json.loads(done.stdout)["stages"][0]["problem"] == str(done.exception)
    assert CliRunner().invoke(app, [*arguments, "--gpus", "2"]).exit_code == 0
