"""Fine-tuning on one's own rows: what it trains on, what it reports, what it keeps, and how it goes on."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from statistics import NormalDist, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.train.runs import Stopped, interrupt

from f2llm.embed.embedder import Embedder
from f2llm.errors import F2Error, UsageError
from f2llm.model.folder import Model, load_model, save_model
from f2llm.recipe_train import TrainStage
from f2llm.train.before_after import Found, Outcome, answer, compare, render
from f2llm.train.finetune import WORK, Choices, finetune
from f2llm.train.sampler import Sampler
from f2llm.train.sources import SourceRows
from f2llm.train.stage import make_sampler
from f2llm.train.trials import Trial, prepare

INSTRUCTION = "Find this name in another language"  # the tiny base's
PREFIX = f"Instruct: {INSTRUCTION}\nQuery: "
FAST = Choices(epochs=2, learning_rate=4e-3)
Row = dict[str, str]


def write(file: Path, rows: Sequence[Row]) -> Path:
    """Rows in the format that the ending of `file` says."""
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), file)
        return file
    with open(file, "w", encoding="utf-8", newline="") as out:
        if file.suffix == ".jsonl":
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif file.suffix == ".csv":
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            out.writelines("\t".join(line) + "\n" for line in ([*rows[0]], *(row.values() for row in rows)))
    return file


@pytest.fixture(scope="module")
def pairs(things: list[dict[str, str]]) -> list[Row]:
    """Two things in English, and the same two in French: 300 rows of different queries and different positives."""
    rows = [
        {"query": f"{a['eng']} and {b['eng']}", "positive": f"{a['fra']} et {b['fra']}"}
        for a, b in permutations(things, 2)
    ][:300]
    assert len({row["query"] for row in rows}) == len({row["positive"] for row in rows}) == 300
    return rows


@dataclass
class Seen:
    """What passes through a fine-tune."""

    trained: set[str] = field(default_factory=set)
    """Queries of all batches, with their prompts."""
    dev: list[SourceRows] = field(default_factory=list)
    tests: list[Trial] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Notes what the run trains on, chooses by and reports from."""
    return watch(monkeypatch)


def watch(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()

    def make(*arguments: Any) -> Sampler:
        sampler = make_sampler(*arguments)
        for step in range(sampler.steps):
            batch = sampler[step]
            seen.trained.update(batch.texts[number] for number in batch.query_B)
        return sampler

    def prepare_dev(config: TrainStage, held_out: Sequence[SourceRows], *rest: Any) -> list[Trial]:
        seen.dev += held_out
        return prepare(config, held_out, *rest)

    def answer_test(model: Model, trial: Trial, *rest: Any) -> Found:
        seen.tests.append(trial)
        return answer(model, trial, *rest)

    monkeypatch.setattr("f2llm.train.stage.make_sampler", make)
    monkeypatch.setattr("f2llm.train.trainer.prepare", prepare_dev)
    monkeypatch.setattr("f2llm.train.finetune.answer", answer_test)
    return seen


def questions(trial: Trial) -> set[str]:
    return {trial.texts[question.text] for question in trial.questions}


@dataclass(frozen=True)
class Straight:
    """A fine-tune that nothing disturbed."""

    file: Path
    out: Path
    outcome: Outcome
    seen: Seen


@pytest.fixture(scope="module")
def straight(pairs: list[Row], model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder = tmp_path_factory.mktemp("straight")
    file, out = write(folder / "pairs.jsonl", pairs), folder / "tuned"
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = watch(monkeypatch)
        outcome = finetune([file], model_folder, out, FAST)
    assert outcome
    return Straight(file, out, outcome, seen)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# --- What is trained on, and what is reported


def test_training_dev_and_test_rows_are_all_rows_and_have_no_query_in_common(
    straight: Straight, pairs: list[Row]
) -> None:
    train, seen = {query.removeprefix(PREFIX) for query in straight.seen.trained}, straight.seen
    dev = set(seen.dev[0].query)
    test = {query.removeprefix(PREFIX) for query in questions(seen.tests[0])}
    assert {"train": len(train), "dev": len(dev), "test": len(test)} == straight.outcome.rows
    assert straight.outcome.rows == {"train": 243, "dev": 27, "test": 30}
    assert train | dev | test == {row["query"] for row in pairs}
    assert not train & dev and not train & test and not dev & test


def naive_scores(folder: Path, rows: Sequence[Row]) -> dict[str, float]:
    """Each query among the positives of all rows, by the public embedder; wrong ties come first."""
    embedder = Embedder(folder)
    queries = embedder.encode([row["query"] for row in rows], prompt="query").astype(np.float64)
    documents = embedder.encode([row["positive"] for row in rows], prompt="document").astype(np.float64)
    cosines = queries @ documents.T
    rank = (cosines >= np.diag(cosines)[:, None]).sum(axis=1)
    top = rank <= 10
    return {
        "ndcg_at_10": float((top / np.log2(1 + rank)).mean()),
        "mrr_at_10": float((top / rank).mean()),
        "accuracy_at_1": float((rank == 1).mean()),
    }


def test_the_table_is_what_the_embedder_finds_of_the_base_and_of_the_saved_model(
    straight: Straight, pairs: list[Row], model_folder: Path
) -> None:
    asked = {query.removeprefix(PREFIX) for query in questions(straight.seen.tests[0])}
    rows = [row for row in pairs if row["query"] in asked]
    before, after = naive_scores(model_folder, rows), naive_scores(straight.out, rows)
    scores = straight.outcome.scores
    assert {name: score.before for name, score in scores.items()} == pytest.approx(before, abs=1e-4)
    assert {name: score.after for name, score in scores.items()} == pytest.approx(after, abs=1e-4)
    ndcg = scores["ndcg_at_10"]
    assert ndcg.margin is not None and ndcg.after - ndcg.before > ndcg.margin, "it learns"


def test_the_margin_is_that_of_the_mean_of_paired_differences() -> None:
    rng = np.random.default_rng(0)
    before, after = {"accuracy_at_1": rng.random(50)}, {"accuracy_at_1": rng.random(50)}
    score = compare(before, after)["accuracy_at_1"]
    spread = stdev((after["accuracy_at_1"] - before["accuracy_at_1"]).tolist())
    expected = NormalDist().inv_cdf(0.975) * spread / 50**0.5
    assert score.margin == pytest.approx(expected, abs=1e-4)
    few = compare({"accuracy_at_1": np.zeros(6)}, {"accuracy_at_1": np.ones(6)})["accuracy_at_1"]
    assert few.margin is None


def test_the_words_and_the_file_say_what_was_found(straight: Straight) -> None:
    outcome, text = straight.outcome, render(straight.outcome)
    for score in outcome.scores.values():
        assert (
            f"{score.before:.4f}  {score.after:.4f}  {score.after - score.before:+.4f} ± {score.margin:.4f}"
            in text
        )
    assert "on 30 rows held out, which neither trained nor chose the weights" in text
    assert f"kept: the weights after {outcome.kept_step} of {outcome.steps} steps" in text
    kept = json.loads((straight.out / "finetune.json").read_text())
    assert kept["rows"] == outcome.rows and kept["kept_step"] == outcome.kept_step
    assert kept["scores"]["mrr_at_10"]["after"] == outcome.scores["mrr_at_10"].after


# --- Files


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_every_format_of_file_gives_the_same_model(
    ending: str, pairs: list[Row], model_folder: Path, tmp_path: Path
) -> None:
    choices = Choices(epochs=0.5, learning_rate=1e-3)
    for name in ("jsonl", ending):
        finetune([write(tmp_path / f"rows.{name}", pairs[:45])], model_folder, tmp_path / name, choices)
    assert weights(tmp_path / "jsonl") == weights(tmp_path / ending) != weights(model_folder)


@pytest.mark.parametrize("form", ["clustering", "classification"])
def test_texts_with_labels(
    form: Any, things: list[dict[str, str]], names: list[str], model_folder: Path, tmp_path: Path, seen: Seen
) -> None:
    kinds = {thing[lang]: thing["kind"] for thing in things for lang in ("eng", "fra", "rus", "hin")}
    file = write(tmp_path / "kinds.csv", [{"text": text, "label": kind} for text, kind in kinds.items()])
    outcome = finetune([file], model_folder, tmp_path / "out", Choices(form, epochs=1))
    assert outcome and outcome.format == form and list(outcome.scores) == ["accuracy_at_1"]
    candidates = set(kinds.values()) if form == "classification" else questions(seen.tests[0])
    assert outcome.candidates >= len({text.removeprefix(PREFIX) for text in candidates})
    assert not seen.trained & questions(seen.tests[0])
    by_columns = finetune([file], model_folder, tmp_path / "told", Choices(epochs=1))
    assert by_columns and by_columns.format == "clustering"


def test_few_rows_are_all_trained_on_and_it_is_said(
    pairs: list[Row], model_folder: Path, tmp_path: Path, seen: Seen
) -> None:
    file = write(tmp_path / "few.jsonl", pairs[:39])
    outcome = finetune([file], model_folder, tmp_path / "out", Choices(epochs=1))
    assert outcome and outcome.rows == {"train": 39, "dev": 0, "test": 0}
    assert {query.removeprefix(PREFIX) for query in seen.trained} == {row["query"] for row in pairs[:39]}
    assert "no scores: 39 rows are too few, so none were held out and all were trained on" in render(outcome)


def test_too_few_rows_to_choose_by_only_report(
    pairs: list[Row], model_folder: Path, tmp_path: Path, seen: Seen
) -> None:
    outcome = finetune([write(tmp_path / "few.jsonl", pairs[:100])], model_folder, tmp_path / "out", FAST)
    assert outcome and outcome.rows == {"train": 90, "dev": 0, "test": 10}
    assert outcome.kept_step == outcome.steps and not seen.dev
    assert len(seen.trained) == 90 and not seen.trained & questions(seen.tests[0])
    text = render(outcome)
    assert "the rows are too few to choose by" in text and "too few for a margin of error" in text


# --- Instruction, base


@pytest.mark.parametrize("instruction", ["Say it in French", ""])
def test_an_instruction_that_is_given_is_trained_scored_and_kept(
    instruction: str, pairs: list[Row], model_folder: Path, tmp_path: Path, seen: Seen
) -> None:
    out = tmp_path / "out"
    choices = Choices(epochs=0.3, instruction=instruction)
    finetune([write(tmp_path / "rows.jsonl", pairs)], model_folder, out, choices)
    prefix = f"Instruct: {instruction}\nQuery: " if instruction else ""
    asked = {row["query"] for row in pairs}
    assert {query.removeprefix(prefix) for query in seen.trained} <= asked
    assert {query.removeprefix(prefix) for query in questions(seen.tests[0])} <= asked
    assert seen.dev[0].source.instruction == instruction
    assert load_model(out).facts.instruction == instruction
    assert json.loads((out / "config_sentence_transformers.json").read_text())["prompts"]["query"] == prefix


def test_the_bases_instruction_is_trained_scored_and_kept(straight: Straight, model_folder: Path) -> None:
    trial = straight.seen.tests[0]
    assert all(query.startswith(PREFIX) for query in straight.seen.trained | questions(trial))
    facts, base = load_model(straight.out).facts, load_model(model_folder).facts
    assert (facts.instruction, facts.template, facts.parent) == (INSTRUCTION, base.template, base.identity)
    assert facts.max_length == base.max_length == 64, "not beyond what the base was trained for"


def test_the_instruction_of_a_folder_that_is_not_ours_is_found_in_its_prompts(
    pairs: list[Row], make_model: Callable[..., Model], tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    save_model(base, make_model())
    (base / "f2llm.json").unlink()
    finetune([write(tmp_path / "rows.jsonl", pairs[:45])], base, out, Choices(epochs=0.3))
    assert load_model(out).facts.instruction == INSTRUCTION


def test_a_run_that_never_beats_the_base_leaves_it_as_it_is_and_says_so(
    straight: Straight, tmp_path: Path
) -> None:
    """A model that has learnt, and a learning rate that tears it apart."""
    outcome = finetune([straight.file], straight.out, tmp_path / "out", replace(FAST, learning_rate=20.0))
    assert outcome and outcome.kept_step == 0
    base, *others = outcome.dev_scores.values()
    assert others and max(others) < base and max(outcome.dev_scores) < outcome.steps, "it stops early"
    ours, theirs = (load_model(folder).decoder.state_dict() for folder in (tmp_path / "out", straight.out))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert all(score.before == score.after for score in outcome.scores.values())
    assert "kept: the base's own weights, since training did not help" in render(outcome)


def test_the_best_weights_are_kept(straight: Straight) -> None:
    scores = straight.outcome.dev_scores
    assert scores[straight.outcome.kept_step] == max(scores.values()) > scores[0]


# --- Going on


def interrupted(step: int, file: Path, base: Path, out: Path) -> None:
    """A run with a Ctrl-C before one of its steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            "f2llm.train.stage.make_sampler", lambda *args: Stopped(make_sampler(*args), {step: interrupt})
        )
        with pytest.raises(KeyboardInterrupt):
            finetune([file], base, out, FAST)
    assert not (out / "f2llm.json").exists()


def test_an_interrupted_run_ends_in_the_same_bits(
    straight: Straight, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before the first checkpoint, after some, and in the last moment; then no trace of it is left."""
    out = tmp_path / "out"
    for step in (1, 9, 20):
        interrupted(step, straight.file, model_folder, out)
    (out / ".model.safetensors.half.tmp").write_text("half")
    monkeypatch.setattr("f2llm.train.finetune.compare", lambda *_: interrupt())
    with pytest.raises(KeyboardInterrupt):
        finetune([straight.file], model_folder, out, FAST)
    monkeypatch.undo()
    assert (out / "f2llm.json").exists()
    with pytest.raises(UsageError, match="holds a model already"):
        finetune([straight.file], model_folder, out, Choices(epochs=1))
    outcome = finetune([straight.file], model_folder, out, FAST)
    assert weights(out) == weights(straight.out)
    assert outcome == replace(straight.outcome, model=str(out))
    assert files_in(out) == files_in(straight.out)


def test_changes_are_refused_by_name(
    straight: Straight,
    pairs: list[Row],
    model_folder: Path,
    make_model: Callable[..., Model],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    interrupted(9, straight.file, model_folder, out)
    other_rows = write(tmp_path / "other.jsonl", [*pairs[1:], {"query": "x", "positive": "y"}])
    save_model(tmp_path / "base", make_model(seed=3))
    with pytest.raises(UsageError, match=r"inputs\.rows was \"300 rows \(\w+\)\" and is \"300 rows"):
        finetune([other_rows], model_folder, out, FAST)
    with pytest.raises(UsageError, match=r"inputs\.base was"):
        finetune([straight.file], tmp_path / "base", out, FAST)
    changed = replace(FAST, learning_rate=1e-3, instruction="Say it in French")
    with pytest.raises(
        UsageError, match=r"inputs\.instruction .*recipe\.learning_rate was 0\.004 and is 0\.001"
    ):
        finetune([straight.file], model_folder, out, changed)
    outcome = finetune([straight.file], model_folder, out, FAST)
    assert outcome and weights(out) == weights(straight.out), "the refused starts left nothing in the way"


def test_a_forced_run_goes_on_with_the_change(straight: Straight, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(9, straight.file, model_folder, out)
    assert finetune([straight.file], model_folder, out, replace(FAST, learning_rate=1e-3), force=True)
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    rates = [record["learning_rate"] for record in records if "learning_rate" in record]
    assert max(rates[:9]) > 1e-3 > max(rates[9:])


def test_a_folder_in_use_is_left_alone(straight: Straight, model_folder: Path, tmp_path: Path) -> None:
    before = {name: (straight.out / name).stat().st_mtime_ns for name in files_in(straight.out)}
    with pytest.raises(UsageError, match="tuned holds a model already; remove it or name another folder"):
        finetune([straight.file], model_folder, straight.out, FAST)
    assert before == {name: (straight.out / name).stat().st_mtime_ns for name in files_in(straight.out)}
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files that fine-tuning did not leave"):
        finetune([straight.file], model_folder, tmp_path, FAST)
    with pytest.raises(UsageError, match=r"cannot be made, since .*mine\.txt is a file"):
        finetune([straight.file], model_folder, tmp_path / "rows" / "mine.txt" / "out", FAST)
    assert files_in(tmp_path) == {"rows", "rows/mine.txt"}


# --- Refusals


def refusals(folder: Path) -> dict[str, tuple[Path, Choices, str]]:
    """File, choices, and what the sentence must say."""

    def rows(name: str, count: int, query: str, positive: str, **more: str) -> Path:
        made = [{"query": query.format(i), "positive": positive.format(i), **more} for i in range(count)]
        return write(folder / f"{name}.jsonl", made)

    def labelled(name: str, label: str) -> Path:
        return write(folder / f"{name}.csv", [{"text": f"t{i}", "label": label.format(i)} for i in range(60)])

    fine = rows("fine", 50, "q{}", "p{}")
    return {
        "one row": (rows("one", 1, "q", "p"), FAST, "two or more different queries, got 'q' alone"),
        "all the same": (rows("same", 60, "q", "p"), FAST, "two or more different queries, got 'q' alone"),
        "one positive": (rows("p", 60, "q{}", "p"), FAST, "two or more different positives, got 'p' alone"),
        "query is positive": (rows("own", 60, "t{}", "t{}"), FAST, "60 rows in which it is its own positive"),
        "one label": (labelled("label", "x"), FAST, "have the label 'x'"),
        "as many labels": (labelled("labels", "l{}"), FAST, "60 labels of one text each"),
        "no epochs": (fine, Choices(epochs=0), "epochs is 0; give a number above 0"),
        "no rate": (fine, Choices(learning_rate=-1.0), "learning_rate is -1.0; give a number above 0"),
        "a batch of one": (fine, Choices(batch_size=1), "batch_size is 1; give a number above 1"),
        "endless": (fine, Choices(epochs=float("inf")), "epochs is inf"),
    }


@pytest.mark.parametrize("case", range(10))
def test_what_cannot_be_trained_on_is_one_sentence_and_leaves_nothing(
    case: int, model_folder: Path, tmp_path: Path
) -> None:
    cases = list(refusals(tmp_path).values())
    assert len(cases) == 10
    file, choices, says = cases[case]
    with pytest.raises(UsageError) as refused:
        finetune([file], model_folder, tmp_path / "out", choices)
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_none_leaves_nothing(straight: Straight, tmp_path: Path) -> None:
    for base, says in ((tmp_path, "config.json is missing"), (straight.file, "is not a folder")):
        with pytest.raises(F2Error, match=says):
            finetune([straight.file], base, tmp_path / "out", FAST)
    assert not any(tmp_path.iterdir())


def test_rows_whose_query_is_their_positive_are_told(
    pairs: list[Row], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*pairs[:20], {"query": "same", "positive": "same"}]
    finetune([write(tmp_path / "rows.jsonl", rows)], model_folder, tmp_path / "out", Choices(epochs=0.3))
    assert "warning: in 1 of 21 rows the query is its own positive" in capsys.readouterr().err


# --- The command


def command(*arguments: str | Path, ranks: int = 1) -> list[str]:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *start, "-m", "f2llm", "train", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_a_command_that_was_killed_goes_on_to_the_same_bits(
    straight: Straight, model_folder: Path, tmp_path: Path
) -> None:
    def arguments(out: Path) -> list[str | Path]:
        return [straight.file, "--base", model_folder, "--out", out, "--epochs", "8"]

    process = subprocess.Popen(command(*arguments(tmp_path / "killed")), env=environment())
    while process.poll() is None and not list(tmp_path.glob("killed/checkpoints/step-*")):
        pass
    process.kill()
    assert process.wait() < 0, "it was killed before its end"
    for name in ("killed", "whole"):
        subprocess.run(command(*arguments(tmp_path / name)), env=environment(), check=True)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")
    assert not (tmp_path / "killed" / WORK).exists()


@pytest.mark.slow
def test_two_ranks_come_to_what_one_does_and_one_of_them_speaks(
    straight: Straight, model_folder: Path, tmp_path: Path
) -> None:
    arguments: list[str | Path] = [straight.file, "--base", model_folder]
    arguments += ["--epochs", "2", "--learning-rate", "4e-3"]
    out = tmp_path / "two"
    done = subprocess.run(
        command(*arguments, "--out", out, ranks=2),
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    scores = json.loads((out / "finetune.json").read_text())["dev_scores"]
    expected = {str(step): score for step, score in straight.outcome.dev_scores.items()}
    assert scores == pytest.approx(expected, abs=0.02)
    assert done.stdout.count("kept: ") == 1 and done.stderr.count("rows to train on") == 1
    assert files_in(out) == files_in(straight.out)
