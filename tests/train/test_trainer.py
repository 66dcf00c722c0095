"""The training loop: its schedule, its optimizer, that it learns, and that a continued run ends in the same bits."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from f2llm.compress.prune import prune_model
from f2llm.data.rows import read_rows
from f2llm.errors import F2Error, UsageError
from f2llm.model.folder import Model, load_model, save_model
from f2llm.recipe_fields import FORMATS
from f2llm.recipe_train import Shape, TrainStage
from f2llm.tokenizer_file import load_tokenizer
from f2llm.train.optim import learning_rate_at
from f2llm.train.sampler import Sampler
from f2llm.train.sources import load_sources
from f2llm.train.stage import make_sampler, train_stage
from f2llm.train.teacher import Teacher, taught_dimensions
from f2llm.train.terms import token_ids
from f2llm.train.trainer import train
from f2llm.train.watch import read_log as read_records

Settings = Callable[..., TrainStage]
Batches = Callable[[TrainStage], Sampler]
MakeModel = Callable[..., Model]
SHAPE = Shape(hidden_size=24, intermediate_size=40, layers=2, heads=4, kv_heads=2, head_dim=8)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The steps of the log, without what the clock and the machine say."""
    noise = {"tokens_per_second", "memory_gigabytes"}
    return [
        {key: value for key, value in record.items() if key not in noise}
        for record in read_records(folder / "log.jsonl")
        if "loss" in record
    ]


# --- Learning


def test_training_learns_the_names(
    settings: Settings, batches: Batches, make_model: MakeModel, tmp_path: Path
) -> None:
    config = settings(
        steps=60, batch_size=24, formats=["retrieval"], learning_rate=5e-3, checkpoint_every=1000
    )
    train(config, make_model(hidden_size=32), batches(config), None, tmp_path)
    losses = [line["loss"] for line in read_log(tmp_path)]
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


def test_loss_is_the_sum_of_its_terms(
    settings: Settings, batches: Batches, make_model: MakeModel, tmp_path: Path
) -> None:
    config = settings(teacher="teacher", distillation={"terms": {"mse": 0.25}}, steps=9)
    train(config, make_model(), batches(config), make_model(seed=1, hidden_size=30), tmp_path)
    log = read_log(tmp_path)
    assert [line["step"] for line in log] == list(range(9))
    assert {line["source"] for line in log} == {"names", "kinds", "country"}
    for line in log:
        assert ("in_batch" in line) == (line["source"] == "names")
        assert ("hard" in line) == (line["source"] != "names")
        total = line.get("in_batch", 0) + line.get("hard", 0) + 0.25 * line["teacher_mse"]
        assert line["loss"] == pytest.approx(total, rel=1e-6)
        assert line["learning_rate"] == learning_rate_at(config, line["step"])


def test_a_student_of_the_teachers_weights_has_nothing_to_learn_from_it(
    settings: Settings, batches: Batches, make_model: MakeModel, tmp_path: Path
) -> None:
    config = settings(teacher="teacher", steps=1)
    train(config, make_model(seed=4), batches(config), make_model(seed=4), tmp_path)
    assert read_log(tmp_path)[0]["teacher_mse"] < 1e-10


def test_a_narrower_teacher_is_refused(
    settings: Settings, batches: Batches, make_model: MakeModel, tmp_path: Path
) -> None:
    config = settings(teacher="teacher")
    with pytest.raises(UsageError, match=r"teacher .* 16 wide.* 24"):
        train(config, make_model(), batches(config), make_model(hidden_size=16), tmp_path)
    assert list(tmp_path.iterdir()) == []


def facing(model: Model) -> Teacher:
    """A model as a teacher whose vectors nobody asks for."""
    return Teacher(lambda texts: torch.empty(len(texts), 0), model.decoder.config.hidden_size, model.facts)


def test_a_cut_student_learns_the_first_dimensions_or_those_that_were_kept(
    settings: Settings, make_model: MakeModel
) -> None:
    teacher = make_model()
    kept = [0, 1, 2, 5, 8, 13, 21, 23]
    small = make_model(hidden_size=8)
    student = replace(small, facts=replace(small.facts, kept={"of": "uncut", "hidden": kept}))
    prefix = settings(teacher="teacher", distillation={"target": "prefix"})
    assert taught_dimensions(prefix, student, facing(teacher)) == list(range(8))
    assert taught_dimensions(prefix, small, facing(teacher)) == list(range(8))
    of_kept = settings(teacher="teacher", distillation={"target": "kept"})
    for facts in (replace(teacher.facts, identity="uncut"), replace(teacher.facts, parent="uncut")):
        relative = replace(teacher, facts=facts)
        assert taught_dimensions(of_kept, student, facing(relative)) == kept
    strangers = [(small, teacher), (student, replace(teacher, facts=replace(teacher.facts, identity="x")))]
    for pupil, other in strangers:
        with pytest.raises(UsageError, match="do not correspond; take 'prefix'"):
            taught_dimensions(
                of_kept, pupil, facing(replace(other, facts=replace(other.facts, parent="another")))
            )


def test_a_cut_of_the_teacher_as_it_is_has_nothing_to_learn_of_what_was_kept(
    settings: Settings, batches: Batches, make_model: MakeModel, rows_folder: Path, tmp_path: Path
) -> None:
    """Units that are zero in the teacher are cut, so the student's vectors are the teacher's at the kept units."""
    teacher, gone_E = make_model(), torch.tensor([3, 4, 17])
    for name, parameter in teacher.decoder.named_parameters():
        part = name.split(".")[-2]
        if part == "embed_tokens":
            parameter.data[:, gone_E] = 0
        elif part in ("o_proj", "down_proj"):
            parameter.data[gone_E] = 0
    save_model(tmp_path / "teacher", teacher)
    prune_model(tmp_path / "teacher", tmp_path / "student", calibration=[rows_folder], hidden_size=24 - 3)
    teacher, student = (load_model(tmp_path / name) for name in ("teacher", "student"))
    config = settings(teacher="teacher", distillation={"target": "kept"}, steps=1)
    train(config, student, batches(config), teacher, tmp_path)
    assert read_log(tmp_path)[0]["teacher_mse"] < 1e-10


def test_the_teacher_stays_as_it_is(
    settings: Settings, batches: Batches, make_model: MakeModel, tmp_path: Path
) -> None:
    teacher = make_model(seed=1)
    config = settings(teacher="teacher")
    train(config, make_model(), batches(config), teacher, tmp_path)
    untouched = make_model(seed=1).decoder.state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in teacher.decoder.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.decoder.parameters())


def test_long_texts_are_cut_and_keep_eos(make_model: MakeModel) -> None:
    model = make_model()
    text = "lion tembo chien 大象 " * 5
    whole, short = token_ids(model, [text, "lion"], 200)
    cut, same = token_ids(model, [text, "lion"], 7)
    assert cut == [*whole[:6], model.facts.eos_id] != whole
    assert same == short


def test_decoder_is_left_ready_for_use(
    settings: Settings, batches: Batches, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model()
    config = settings(steps=1)
    train(config, model, batches(config), None, tmp_path)
    assert not model.decoder.training


# --- A loss that is not a number


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_loss_stops_the_run_and_changes_nothing(
    value: float, settings: Settings, batches: Batches, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model()
    with torch.no_grad():
        model.decoder.norm.weight[0] = value
    before = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    config = settings(checkpoint_every=1)
    with pytest.raises(F2Error, match=f"loss at step 0 of {tmp_path.name} is nan.*learning_rate"):
        train(config, model, batches(config), None, tmp_path)
    for name, tensor in model.decoder.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    assert not (tmp_path / "checkpoints").exists()


# --- The stage


@pytest.fixture
def tokenizer_folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run_stage(config: TrainStage, out: Path, **given: Any) -> dict[str, Any]:
    paths = {"base": None, "tokenizer": None, "teacher": None, **given}
    return train_stage(config, out=out, seed=7, recipe_hash="the recipe's hash", **paths)


def test_stage_leaves_a_model_and_no_checkpoints(
    settings: Settings, rows_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """A new model without instructions, and then one that goes on from it with them."""
    first, second = tmp_path / "first", tmp_path / "second"
    config = settings(
        base=None, shape=SHAPE, tokenizer="tokenizer", instructions=False, formats=["retrieval"]
    )
    facts = run_stage(config, first, data=rows_folder, tokenizer=tokenizer_folder)
    model = load_model(first)
    assert sorted(path.name for path in first.iterdir() if "checkpoint" in path.name) == []
    assert len(read_log(first)) == 6 and facts["last"]["step"] == 5
    assert facts["identity"] == model.facts.identity
    assert facts["parameters"] == sum(p.numel() for p in model.decoder.parameters())
    assert (model.facts.parent, model.facts.recipe) == (None, "the recipe's hash")
    assert (model.facts.instruction, model.facts.matryoshka_sizes) == ("", [8, 16, 24])
    assert model.facts.max_length == 64

    run_stage(settings(matryoshka=False), second, data=rows_folder, base=first, teacher=first)
    child = load_model(second)
    assert child.facts.parent == model.facts.identity != child.facts.identity
    assert child.facts.instruction == "Find this name in another language"
    assert child.facts.matryoshka_sizes == [24]


def test_stage_gives_the_same_model_each_time_and_another_with_another_seed(
    settings: Settings, rows_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    config = settings(base=None, shape=SHAPE, tokenizer="tokenizer", steps=2)
    common: dict[str, Any] = {
        "data": rows_folder,
        "base": None,
        "teacher": None,
        "tokenizer": tokenizer_folder,
    }
    identities = [
        train_stage(config, **common, out=tmp_path / str(number), seed=seed, recipe_hash="")["identity"]
        for number, seed in enumerate([7, 7, 8])
    ]
    assert identities[0] == identities[1] != identities[2]


def test_an_instruction_that_leaves_no_room_for_a_query_is_refused(
    settings: Settings, rows_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """One token of a query must be left beside the prompt and EOS, of the source with the longest instruction."""
    given: dict[str, Any] = {"data": rows_folder, "tokenizer": tokenizer_folder}
    new: dict[str, Any] = {"base": None, "shape": SHAPE, "tokenizer": "tokenizer", "steps": 1}
    tokenizer = load_tokenizer(tokenizer_folder / "tokenizer.json")
    sources = json.loads((rows_folder / "sources.json").read_text())
    prompts = [f"Instruct: {source['instruction']}\nQuery: " for source in sources]
    longest = max(len(tokenizer.encode(prompt).ids) for prompt in prompts)  # EOS included
    run_stage(settings(**new, max_length=longest + 1), tmp_path / "fits", **given)
    with pytest.raises(UsageError, match=f"takes all {longest} tokens of max_length"):
        run_stage(settings(**new, max_length=longest), tmp_path / "does not", **given)


def test_a_bases_own_template_is_trained_with_and_kept(
    settings: Settings, make_model: MakeModel, rows_folder: Path, tmp_path: Path
) -> None:
    """Models are about that write their queries without the space behind `Query:`."""
    base = make_model()
    other = Model(
        base.decoder, base.tokenizer, replace(base.facts, template="Instruct: {instruction}\nQuery:")
    )
    left = {}
    for name, model in (("ours", base), ("other", other)):
        save_model(tmp_path / name, model)
        run_stage(settings(steps=2), tmp_path / f"{name} tuned", data=rows_folder, base=tmp_path / name)
        left[name] = load_model(tmp_path / f"{name} tuned")
        assert left[name].facts.template == model.facts.template
    losses = [read_log(tmp_path / f"{name} tuned")[0]["loss"] for name in left]
    assert losses[0] != losses[1]
    table, sources = read_rows(rows_folder)
    rows = load_sources(table, sources, FORMATS)
    batch = make_sampler(settings(), rows, 5, other.facts.template)[0]
    assert sum("\nQuery:" in text for text in batch.texts) > 0
    assert not any("\nQuery: " in text for text in batch.texts)
