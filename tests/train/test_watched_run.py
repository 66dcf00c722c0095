"""What a run shows of itself and keeps beside its weights: rates, averages, validations, TensorBoard, alarms."""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.runs import (
    NOISE,
    MakeModel,
    Settings,
    Stopped,
    divided,
    interrupt,
    load_part,
    same_bits,
    steps_of,
    validations_of,
    weights,
    whole_log,
)
from tests.train.test_watch import events
from torch import Tensor

from f2llm.data.rows import read_rows
from f2llm.model.batches import forward
from f2llm.model.folder import Model, save_model
from f2llm.recipe_train import TrainStage, Validation
from f2llm.train import stage, trainer
from f2llm.train.sampler import Sampler
from f2llm.train.sources import load_sources
from f2llm.train.stage import train_stage
from f2llm.train.trainer import train
from f2llm.train.trials import prepare
from f2llm.train.validate import validate
from f2llm.train.watch import read_log

Train = Callable[..., Model]


@pytest.fixture
def run(make_model: MakeModel, rows_folder: Path) -> Train:
    """Trains in a folder, up to a Ctrl-C before step `cut`, and gives the model."""

    def go(config: TrainStage, out: Path, cut: int | None = None, model: Model | None = None) -> Model:
        batches, held_out = divided(config, rows_folder)
        model = model or make_model()
        with suppress(KeyboardInterrupt):
            made = Stopped(batches, {} if cut is None else {cut: interrupt})
            train(config, model, made, None, out, held_out=held_out)
        return model

    return go


# --- The learning rate


SHAPES: dict[str, Callable[[float], float]] = {  # of the fall from 1 to 0, by the share that is behind
    "cosine": lambda share: math.cos(share * math.pi / 2) ** 2,
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1,
}


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("schedule", SHAPES)
def test_the_learning_rate_in_the_log_is_the_schedules(
    schedule: str, floor: float, settings: Settings, run: Train, tmp_path: Path
) -> None:
    """In three steps up to the highest, which the fourth has too, and from there towards the floor."""
    run(settings(steps=9, warmup_steps=3, schedule=schedule, floor=floor, learning_rate=0.02), tmp_path)
    shape = [1 / 3, 2 / 3, 1, *(floor + (1 - floor) * SHAPES[schedule](n / 6) for n in range(6))]
    rates = [record["learning_rate"] for record in steps_of(tmp_path)]
    assert rates == pytest.approx([0.02 * share for share in shape], rel=1e-12)


def test_weights_move_by_the_rate_of_the_log(settings: Settings, run: Train, tmp_path: Path) -> None:
    """AdamW's first step moves each weight that has a gradient by the learning rate, but for its decay."""
    config = settings(steps=4, warmup_steps=4, learning_rate=0.04, weight_decay=0.0, checkpoint_every=1)
    model = run(config, tmp_path, cut=1)
    before = {name: torch.empty_like(tensor) for name, tensor in weights(model).items()}
    load_part(tmp_path / "checkpoints" / "step-00000001", "model", before)
    moved = (
        before["norm.weight"] - weights(run(settings(steps=4), tmp_path / "none", cut=0))["norm.weight"]
    ).abs()
    assert moved.tolist() == pytest.approx([0.01] * len(moved), rel=1e-3)
    assert steps_of(tmp_path)[0]["learning_rate"] == 0.01


# --- Averaged weights


def test_averaged_weights_are_those_of_a_loop(settings: Settings, run: Train, tmp_path: Path) -> None:
    """The weights after each step of a run without an average, averaged by hand in float64."""
    plain = settings(steps=8, checkpoint_every=1, keep_checkpoints=9)
    last = weights(run(plain, tmp_path / "plain"))
    averaged = weights(run(plain.model_copy(update={"ema": 0.3}), tmp_path / "averaged"))
    assert steps_of(tmp_path / "averaged") == steps_of(tmp_path / "plain")  # it has no part in training
    average = {
        name: tensor.double() for name, tensor in weights(run(plain, tmp_path / "none", cut=0)).items()
    }
    for step in range(8):
        now = {name: torch.empty_like(tensor) for name, tensor in last.items()}
        if step < 7:
            load_part(tmp_path / "plain" / "checkpoints" / f"step-{step + 1:08d}", "model", now)
        else:
            now = last
        decay = min(0.3, (1 + step) / (10 + step))  # 0.1, 0.18, 0.25, then 0.3
        average = {name: decay * average[name] + (1 - decay) * now[name].double() for name in average}
    for name, expected in average.items():
        torch.testing.assert_close(averaged[name].double(), expected, rtol=1e-5, atol=1e-6)
        assert (averaged[name] - last[name]).abs().max() > 1e-4, name


# --- Validation

SOURCES, LANGUAGES = {"names", "kinds", "country"}, {"eng", "fra", "rus", "hin", "swa", "zho"}


def test_validations_come_on_time_by_source_and_language(
    settings: Settings, run: Train, tmp_path: Path
) -> None:
    for every, steps in ((2, [0, 2, 4, 6]), (4, [0, 4, 6]), (100, [0, 6])):
        run(settings(validation=Validation(rows=12, every=every)), tmp_path / str(every))
        assert list(validations_of(tmp_path / str(every))) == steps
    # A validation comes before the step of its number.
    kinds = [("loss" in record, record["step"]) for record in whole_log(tmp_path / "4")]
    assert kinds == [(False, 0), *((True, n) for n in range(4)), (False, 4), (True, 4), (True, 5), (False, 6)]
    for figures in validations_of(tmp_path / "2").values():
        assert figures["sources"].keys() == SOURCES
        for found in figures["sources"].values():
            assert found["rows"] == 12 and found["queries"] <= 12
            assert found["languages"].keys() <= LANGUAGES | {"other"}
            assert sum(lang["queries"] for lang in found["languages"].values()) == found["queries"]


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"embedding_rows": "exact"}], ids=str)
def test_a_validation_is_of_the_weights_that_the_run_would_leave(
    changes: dict[str, Any],
    settings: Settings,
    run: Train,
    rows_folder: Path,
    make_model: MakeModel,
    tmp_path: Path,
) -> None:
    """The first is of the weights it began with, the last of those it left, each text computed by itself."""
    config = settings(validation=Validation(rows=12, every=3), **changes)
    untouched, left = make_model(), run(config, tmp_path)
    trials = prepare(config, divided(config, rows_folder)[1], seed=5)
    logged = validations_of(tmp_path)
    for step, model in ((0, untouched), (6, left)):

        def encode(texts: list[str], model: Model = model) -> Tensor:
            ids = [encoding.ids for encoding in model.tokenizer.encode_batch(texts)]
            with torch.no_grad():
                return torch.cat([forward(model.decoder, [sequence]) for sequence in ids])

        figures = validate(encode, trials, lambda batch, vectors_ND: {})
        assert figures["score"] == pytest.approx(logged[step]["score"], abs=2e-3)
        for source, found in figures["sources"].items():
            measure = found["measure"]
            assert found[measure] == pytest.approx(logged[step]["sources"][source][measure], abs=5e-3)
    assert logged[0]["score"] != logged[6]["score"]


@pytest.mark.parametrize(
    "changes", [{"embedding_rows": "exact"}, {"ema": 0.9, "learn_temperature": True}], ids=["rows", "average"]
)
def test_validation_has_no_part_in_training(
    changes: dict[str, Any], settings: Settings, rows_folder: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    """The same batches with and without it end in the same bits."""
    watched = settings(validation=Validation(rows=12, every=1), tensorboard=False, **changes)
    batches, held_out = divided(watched, rows_folder)
    models = [make_model(), make_model()]
    train(watched, models[0], batches, None, tmp_path / "watched", held_out=held_out)
    unwatched = watched.model_copy(update={"validation": None})
    train(unwatched, models[1], batches, None, tmp_path / "unwatched")
    assert len(validations_of(tmp_path / "watched")) == 7
    assert same_bits(weights(models[0]), weights(models[1]))
    assert steps_of(tmp_path / "watched") == steps_of(tmp_path / "unwatched")


def test_rows_held_out_are_not_trained_on(
    settings: Settings,
    rows_folder: Path,
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stage's own batches, of several epochs: of each source some queries never come, and those are validated."""
    taken: list[Stopped] = []

    def note(*args: Any) -> Sampler:
        taken.append(Stopped(make_sampler(*args)))
        return taken[-1]

    make_sampler = stage.make_sampler
    monkeypatch.setattr(stage, "make_sampler", note)
    save_model(tmp_path / "base", make_model())
    config = settings(steps=18, batch_size=36, validation=Validation(rows=12, every=100), matryoshka=False)
    train_stage(
        config,
        data=rows_folder,
        base=tmp_path / "base",
        tokenizer=None,
        teacher=None,
        out=tmp_path / "run",
        seed=7,
        recipe_hash="",
    )
    (batches,) = taken
    assert batches.made == list(range(18))
    met: dict[str, set[str]] = {name: set() for name in SOURCES}
    for batch in map(batches.__getitem__, batches.made):
        met[batch.source] |= {batch.texts[n].split("\nQuery: ")[-1] for n in batch.query_B}
    for rows in load_sources(*read_rows(rows_folder), config.formats):
        name = rows.source.name
        never = [query for query in rows.query if query not in met[name]]
        assert len(never) == validations_of(tmp_path / "run")[0]["sources"][name]["rows"] == 12


# --- TensorBoard


def shown(folder: Path) -> dict[tuple[int, str], float]:
    """What a reader shows of a folder of events: at a start, all from its step on is forgotten."""
    from tensorboardX.proto.event_pb2 import SessionLog

    kept: dict[tuple[int, str], float] = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            kept = {key: value for key, value in kept.items() if key[0] < event.step}
        for value in event.summary.value:
            assert (event.step, value.tag) not in kept
            kept[event.step, value.tag] = value.simple_value
    return kept


def test_tensorboard_shows_the_log_also_of_a_run_that_was_cut(
    settings: Settings, run: Train, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboardX")
    config = settings(tensorboard=True, steps=8, validation=Validation(rows=12, every=4))
    for cut in (5, 5, 7, None):
        run(config, tmp_path, cut=cut)
    seen, log = shown(tmp_path / "tensorboard"), list(read_log(tmp_path / "log.jsonl"))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 4
    for key in ("loss", "gradient_norm", "learning_rate", "tokens_per_second", "memory_gigabytes"):
        expected = {record["step"]: np.float32(record[key]) for record in log if "loss" in record}
        assert list(expected) == list(range(8))
        assert {step: value for (step, tag), value in seen.items() if tag == f"train/{key}"} == expected
    for step, figures in validations_of(tmp_path).items():
        assert seen[step, "validation/score"] == np.float32(figures["score"])
        found = figures["sources"]["names"]["ndcg_at_10"]
        assert seen[step, "validation/sources/names/ndcg_at_10"] == np.float32(found)
    # What was written twice, before and after a cut, is the same but for the clock.
    written: dict[tuple[int, str], set[float]] = {}
    for event in events(tmp_path / "tensorboard"):
        for value in event.summary.value:
            written.setdefault((event.step, value.tag), set()).add(value.simple_value)
    doubtful = [key for key, values in written.items() if len(values) > 1]
    assert {tag.removeprefix("train/") for _, tag in doubtful} <= NOISE


# --- The alarm


def collapsed(model: Model) -> Model:
    """A model that gives every text one vector: nothing is added to what EOS is."""
    for name, parameter in model.decoder.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.zero_()
    return model


def test_a_collapse_is_told_once_and_logged(
    settings: Settings,
    run: Train,
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Seen in three looks, in a run that is cut between them as in one that is not."""
    monkeypatch.setattr(trainer, "LOOK_EVERY", 2)
    config = settings(formats=["retrieval"], learning_rate=1e-12)
    run(config, tmp_path / "run", model=collapsed(make_model()))
    alarms = [record for record in whole_log(tmp_path / "run") if "alarm" in record]
    assert [record["step"] for record in alarms] == [0]
    sentence = alarms[0]["alarm"]
    assert (
        "vectors of run have collapsed at step 0: mean pairwise cosine 1.0000 and effective rank 1.0"
        in sentence
    )
    assert capsys.readouterr().err.count(sentence) == 1
    looks = [record["step"] for record in steps_of(tmp_path / "run") if "effective_rank" in record]
    assert looks == [0, 2, 4]

    again = tmp_path / "again" / "run"
    run(config, again, cut=4, model=collapsed(make_model()))
    run(config, again, model=collapsed(make_model()))
    assert whole_log(again) == whole_log(tmp_path / "run")


@pytest.mark.parametrize("formats", [["retrieval"], ["clustering", "classification"]])
def test_no_alarm_without_a_collapse_or_where_texts_share_their_meaning(
    formats: list[str],
    settings: Settings,
    run: Train,
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "LOOK_EVERY", 1)
    model = make_model() if formats == ["retrieval"] else collapsed(make_model())
    run(settings(formats=formats, learning_rate=1e-12), tmp_path, model=model)
    assert not [record for record in whole_log(tmp_path) if "alarm" in record]
    assert {"effective_rank" in record for record in steps_of(tmp_path)} == {formats == ["retrieval"]}
