"""The family's recipes: they say what the published table says, fit together, can be planned, and run."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from f2llm.family import FAMILY, STAGES, FamilyMember
from f2llm.files import write_json
from f2llm.model.decoder import Decoder, DecoderConfig, config_to_json, initialise
from f2llm.model.folder import Model, ModelFacts, load_model, save_model
from f2llm.model.tokenizer import EOS
from f2llm.plan.shapes import Shapes
from f2llm.plan.stages import Machine, plan, render
from f2llm.recipe import PruneStage, Recipe, load
from f2llm.recipe_train import TrainStage
from f2llm.train.stage import train_stage

FOLDER = Path(__file__).parents[1] / "recipes"
ALL = sorted(FOLDER.glob("**/*.yaml"))


def recipe_of(size: str) -> Recipe:
    return load(FOLDER / "family" / f"{size}.yaml")


def training(size: str) -> dict[str, TrainStage]:
    return {n: stage for n, stage in recipe_of(size).stages.items() if isinstance(stage, TrainStage)}


# --- What they say


def test_every_size_has_a_recipe() -> None:
    assert {path.stem for path in ALL if path.parent.name == "family"} == set(FAMILY)


@pytest.mark.parametrize("size", FAMILY)
def test_settings_are_the_published_ones(size: str) -> None:
    member = FAMILY[size]
    stages = training(size)
    assert tuple(stages) == member.stages
    for name, stage in stages.items():
        published = STAGES[name]
        assert (stage.learning_rate, stage.epochs) == (member.learning_rate, member.epochs)
        assert stage.batch_size == member.batch_size
        assert (tuple(stage.formats), stage.instructions) == (published.formats, published.instructions)
        assert stage.cap == published.cap
        if published.document_instruction_rate is not None:
            assert stage.document_instruction_rate == published.document_instruction_rate
        assert stage.matryoshka and stage.objective == "f2llm-v2"
        assert list(stage.hard_negatives.model_dump().values()) == [7, 9, 1]
        assert stage.activation_checkpointing == (member.total_parameters > 4e9)
    assert all(stage.teacher is None for name, stage in stages.items() if name == "stage1")


@pytest.mark.parametrize("size", FAMILY)
def test_recipes_fit_together(size: str) -> None:
    """What a recipe reads of another one's run is what that one leaves."""

    def left_by(other: str, stage: str) -> str:
        recipe = recipe_of(other)
        assert stage in recipe.stages
        return f"{recipe.output}/{stage}/"

    member, stages = FAMILY[size], training(size)
    assert stages["stage2"].teacher == (left_by(member.teacher, "stage2") if member.teacher else None)
    if member.pruned_from:
        cut = recipe_of(size).stages["cut"]
        assert isinstance(cut, PruneStage) and stages["stage2"].base == "cut"
        assert cut.model == left_by(member.pruned_from, "stage1")
        assert (cut.hidden_size, cut.intermediate_size, cut.layers) == (
            member.hidden_size,
            member.intermediate_size,
            member.layers,
        )
    else:
        assert stages["stage1"].base == f"models/Qwen3-{size}/"
        assert stages["stage2"].base == "stage1"


@pytest.mark.parametrize("size", FAMILY)
def test_their_heads_say_how_to_run_them(size: str) -> None:
    text = (FOLDER / "family" / f"{size}.yaml").read_text(encoding="utf-8")
    path = f"recipes/family/{size}.yaml"
    for command in (
        f"f2llm plan {path} --gpus 8",
        f"f2llm run {path}",
        f"torchrun --nproc-per-node 8 -m f2llm run {path}",
    ):
        assert f"#     {command}" in text


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the quickstart has been run: of its model, the shape alone is asked for."""
    monkeypatch.chdir(tmp_path)
    large = Shapes(load(FOLDER / "quickstart.yaml")).of("large")
    write_json(tmp_path / "runs" / "quickstart" / "large" / "config.json", config_to_json(large))
    recipe = load(path)
    planned = plan(recipe, Machine(8, "b200"))
    assert [one.name for one in planned] == list(recipe.stages)
    written = render(recipe, Machine(8, "b200"), planned)
    assert all(f"\n{one.name} ({one.kind}): " in written for one in planned)
    for one in planned:
        if one.kind == "train":
            assert one.steps and one.hours > 0 and one.problem is None, one.problem
        if one.kind == "train" and path.stem in FAMILY:
            assert one.parameters == FAMILY[path.stem].total_parameters


# --- They run


def random_model(folder: Path, tokenizer: Tokenizer, member: FamilyMember, layers: int) -> Path:
    """A model of a family member's widths, with few words and random weights."""
    decoder = Decoder(
        DecoderConfig(
            tokenizer.get_vocab_size(),
            member.hidden_size,
            member.intermediate_size,
            layers,
            member.heads,
            member.kv_heads,
            member.head_dim,
        )
    )
    initialise(decoder, torch.Generator().manual_seed(0))
    eos_id = tokenizer.token_to_id(EOS)
    assert eos_id is not None
    save_model(folder, Model(decoder, tokenizer, ModelFacts(eos_id, 64, [member.hidden_size], "")))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size", ["80M", "160M"])
def test_the_small_ones_run(size: str, tokenizer: Tokenizer, rows_folder: Path, tmp_path: Path) -> None:
    """Two steps of the recipe's own stage at its real shape; only words, rows and the teacher's depth are fewer.

    The loss is a number, the student learns from its teacher, and what is left is a model of the size.
    """
    member = FAMILY[size]
    base = random_model(tmp_path / "base", tokenizer, member, member.layers)
    assert member.teacher
    teacher = random_model(tmp_path / "teacher", tokenizer, FAMILY[member.teacher], layers=1)
    stage = training(size)["stage2"].model_copy(
        update={"steps": 2, "epochs": None, "batch_size": 4, "warmup_steps": 0}
    )
    out = tmp_path / "out"
    train_stage(
        stage, data=rows_folder, base=base, tokenizer=None, teacher=teacher, out=out, seed=1, recipe_hash=""
    )
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in log if "loss" in record] == [0, 1]
    assert all(record["teacher_mse"] > 0 for record in log if "loss" in record)
    before, after = load_model(base).decoder, load_model(out).decoder
    assert after.config == before.config
    words = tokenizer.get_vocab_size()
    missing = (member.vocab_size - words) * member.hidden_size
    assert sum(p.numel() for p in after.parameters()) + missing == member.total_parameters
    assert not torch.equal(after.layers[0].mlp.up_proj.weight, before.layers[0].mlp.up_proj.weight)  # type: ignore[union-attr, arg-type]
