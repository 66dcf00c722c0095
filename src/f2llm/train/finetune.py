"""Fine-tuning on one's own rows: files and a base model in; a model folder, and scores before and after, out.

files -> rows -> training rows | dev rows, which choose | test rows, which report -> the training stage -> the outcome

The three parts are cut by a hash of the query (`hold_out`), so equal queries are on one side. Training stops when it no
longer gains on the dev rows and leaves the best weights, the base's own among them. What is reported is from the test
rows, which neither train nor choose: the base as it was read, against the model folder as it was written.

While a run is not finished, its folder holds another, WORK, by which a run that was interrupted, and may go on, is told
from a model or from anything else that must not be overwritten.
"""

import hashlib
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from f2llm.data.rows import Source, rows_table, write_rows
from f2llm.errors import UsageError
from f2llm.files import alone_in, read_object, write_json
from f2llm.model.base import load_base, read_base
from f2llm.model.folder import FACTS, Model, load_model
from f2llm.progress import say
from f2llm.recipe import canonical_json
from f2llm.recipe_fields import Format, is_url
from f2llm.recipe_train import Distillation, Lora, TrainStage, Validation, wrong_distillation
from f2llm.train.before_after import Found, Outcome, answer, compare
from f2llm.train.checkpoint import drop_checkpoints
from f2llm.train.own_rows import MOST_HELD_OUT, Parts, asks_nothing, divide, read_own
from f2llm.train.ranks import Ranks, join, on_main
from f2llm.train.sources import COLUMNS
from f2llm.train.stage import train_stage
from f2llm.train.terms import TEACHER
from f2llm.train.trials import Trial
from f2llm.train.validate import best_so_far
from f2llm.train.watch import Record, read_log

WORK = ".finetune"  # the folder that an unfinished run has: its rows and its lock
RESULT = "finetune.json"

VALIDATIONS_PER_EPOCH, PATIENCE = 4, 4  # so a run goes on for an epoch without a better score
# Wider models take smaller steps: 2e-5 at 1024 dimensions, which is between F2LLM-v2's rates for 0.6B and 330M.
RATE_TIMES_WIDTH = 2e-5 * 1024
LORA_RATE = 10.0  # adapters begin at zero and bear more
LONGEST = 512  # tokens of a text, unless the base stops earlier
LARGEST_BATCH, SMALLEST_BATCH = 64, 8
STEPS_PER_EPOCH = (
    16  # at least, as far as batches can be made smaller: few rows need steps more than wide batches
)
MOST_STEPS_AT_RISK = 200  # between two checkpoints


@dataclass(frozen=True)
class Choices:
    """What a user may choose; what is None is chosen here."""

    format: Format | None = None
    """Told by the first file's columns: retrieval by a query, clustering by a label."""
    instruction: str | None = None
    """What stands in front of queries; the base's own, or "" for nothing."""
    epochs: float = 3.0
    batch_size: int | None = None
    """Queries in a step; 64, or fewer where there are not 1,024 rows to train on."""
    learning_rate: float | None = None
    max_length: int | None = None
    """Tokens of a text; 512, or the base's limit if that is lower."""
    lora: bool = False
    seed: int = 0
    teacher: str | None = None
    """To distil from: a model folder, a hub model, or the URL of an embeddings server; files
    may then hold texts alone."""
    distillation: Distillation | None = None
    """What to learn from the teacher (`distillation_of` says what suits); goes with it."""


@dataclass(frozen=True)
class Plan:
    """What is settled before the first step."""

    config: TrainStage
    inputs: dict[str, str]
    rows: dict[str, int]
    trial: Trial | None
    before: Found

    @property
    def hash(self) -> str:
        settings = {"config": self.config.model_dump(mode="json"), "inputs": self.inputs}
        return hashlib.sha256(canonical_json(settings)).hexdigest()


def finetune(
    files: Sequence[str | Path],
    base: str | Path,
    out: str | Path,
    choices: Choices | None = None,
    force: bool = False,
) -> Outcome | None:
    """Fine-tune `base` on `files` and write the model folder `out`; started again, it goes on where it was left.

    Under torchrun every rank calls it.

    Args:
        files: JSONL, CSV, TSV or Parquet: query, positive(s) and optional negative(s), or text and label.
        base: a model folder, or `owner/name` or `owner/name@revision` of the hub.
        out: a folder that is not there yet, or that an interrupted run left.
        force: go on with an interrupted run although data or settings changed.

    Returns:
        The outcome on rank 0 (`before_after.render` puts it into words), None on the others.

    Raises:
        UsageError: files, rows or choices that cannot be trained on, an `out` that is in the way, or an interrupted run
            that began otherwise.
        F2Error: a base that our decoder cannot compute, or a run that broke.
    """
    paths, name, folder, choices = [Path(file) for file in files], str(base), Path(out), choices or Choices()
    with join() as ranks, ExitStack() as until_done:
        plan = on_main(lambda: _prepare(paths, name, folder, choices, ranks, until_done), ranks)
        if not on_main(lambda: (folder / FACTS).exists(), ranks):
            train_stage(
                plan.config,
                data=folder / WORK,
                base=name,
                tokenizer=None,
                teacher=choices.teacher,
                out=folder,
                seed=choices.seed,
                recipe_hash=plan.hash,
                inputs=plan.inputs,
                force=force,
                ranks=ranks,
            )
        outcome = on_main(lambda: _finish(folder, plan, ranks), ranks)
    return outcome if ranks.is_main else None


# --- Before the first step


def _prepare(
    files: list[Path], base: str, out: Path, choices: Choices, ranks: Ranks, until_done: ExitStack
) -> Plan:
    """Read everything, refuse what will not do, score the base; nothing is written before that."""
    _check_choices(choices)
    _check_folder(out)
    rows, content = read_own(files, choices.format, texts_alone=choices.teacher is not None)
    model = load_base(base)
    instruction = model.facts.instruction if choices.instruction is None else choices.instruction
    rows = replace(rows, source=rows.source.model_copy(update={"instruction": instruction}))
    draft = _draft(choices, rows.source, base, model)
    parts = divide(rows, draft, choices.seed, model.facts.template)
    config = _scheduled(draft, parts, choices)
    say(_in_words(config, parts, instruction, own=choices.instruction is None))
    plan = Plan(
        config,
        {"rows": content, "base": model.facts.identity[:16], "instruction": instruction},
        {"train": parts.train, "dev": parts.dev, "test": parts.test},
        parts.trial,
        answer(model, parts.trial, config.max_length, ranks) if parts.trial else {},
    )
    if (out / FACTS).exists() and read_object(out / FACTS).get("recipe") != plan.hash:
        raise _holds_a_model(out)
    until_done.enter_context(alone_in(out / WORK))
    for leftover in out.rglob(".*.tmp"):  # of files that were being written when a run was killed
        leftover.unlink()
    source = parts.rest.source
    columns = {name: getattr(parts.rest, name) for name in COLUMNS}
    write_rows(out / WORK, rows_table(source, columns), [source])
    return plan


def _check_choices(choices: Choices) -> None:
    bounds = {"epochs": 0.0, "learning_rate": 0.0, "batch_size": 1, "max_length": 1}
    for name, bound in bounds.items():
        value = getattr(choices, name)
        if value is not None and not bound < value < math.inf:
            raise UsageError(f"{name} is {value}; give a number above {bound:g}.")


def _check_folder(out: Path) -> None:
    """Only a folder that is not there, is empty, or has WORK of an interrupted run may be written to."""
    if file := next((path for path in (out, *out.parents) if path.is_file()), None):
        raise UsageError(f"{out} cannot be made, since {file} is a file; name another folder with --out.")
    if (out / WORK).is_dir() or not out.exists() or not any(out.iterdir()):
        return
    if (out / FACTS).exists():
        raise _holds_a_model(out)
    raise UsageError(f"{out} holds files that fine-tuning did not leave; name another folder with --out.")


def _holds_a_model(out: Path) -> UsageError:
    return UsageError(f"{out} holds a model already; remove it or name another folder with --out.")


def _draft(choices: Choices, source: Source, base: str, model: Model) -> TrainStage:
    """The training stage, but for what depends on the number of rows."""
    rate = RATE_TIMES_WIDTH / model.decoder.config.hidden_size * (LORA_RATE if choices.lora else 1.0)
    return TrainStage(
        stage="train",
        data="./rows",
        base=str(Path(base).resolve()) if Path(base).is_dir() else base,
        formats=[source.format],
        instructions=bool(source.instruction),
        epochs=choices.epochs,
        batch_size=choices.batch_size or LARGEST_BATCH,
        max_length=choices.max_length or min(LONGEST, model.facts.max_length),
        learning_rate=choices.learning_rate or rate,
        lora=Lora() if choices.lora else None,
        **_taught(choices, asks_nothing(source)),
    )


def _taught(choices: Choices, alone: bool) -> dict[str, Any]:
    """The fields of the training stage that speak of a teacher."""
    if choices.teacher is None or choices.distillation is None:
        return {}
    asked = choices.distillation.model_copy(update={"contrastive": 0.0}) if alone else choices.distillation
    path = Path(choices.teacher)
    return {"teacher": str(path.resolve()) if path.is_dir() else choices.teacher, "distillation": asked}


def distillation_of(student: str | Path, teacher: str, **settings: Any) -> Distillation:
    """What a student learns from a teacher: `settings` that are not None, and for the others what suits the two.

    Without `terms` that is the paper's mse, and cosine and similarity from a server, which gives no raw vectors;
    without a `target` the dimensions that pruning kept where the teacher has them, the first ones where it has enough,
    and a projection otherwise.

    Raises:
        UsageError: settings that do not go together.
    """
    asked = {name: value for name, value in settings.items() if value is not None}
    asked.setdefault("terms", {"cosine": 1.0, "similarity": 1.0} if is_url(teacher) else {"mse": 1.0})
    if "target" not in asked and {"mse", "cosine"} & set(asked["terms"]):
        asked["target"] = _fitting_target(student, teacher)
    try:
        distillation = Distillation(**asked)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"{'.'.join(map(str, first['loc'][:2]))} of distillation: {first['msg']}, got {first['input']!r:.60}."
        ) from None
    if sentence := wrong_distillation(teacher, distillation):
        raise UsageError(f"{sentence}.")
    return distillation


def _fitting_target(student: str | Path, teacher: str) -> str:
    if is_url(teacher):
        return "projection"
    pupil, known = read_base(student), read_base(teacher)
    kept = pupil.facts.kept
    if kept and kept["of"] in (known.facts.identity, known.facts.parent):
        return "kept"
    return "prefix" if pupil.config.hidden_size <= known.config.hidden_size else "projection"


def _scheduled(draft: TrainStage, parts: Parts, choices: Choices) -> TrainStage:
    """The training stage with a length, and with validation if there are rows for it."""
    chosen = min(LARGEST_BATCH, max(SMALLEST_BATCH, parts.train // STEPS_PER_EPOCH))
    batch_size = max(2, min(choices.batch_size or chosen, parts.train))
    steps_per_epoch = parts.train / batch_size
    steps = math.ceil(choices.epochs * steps_per_epoch)
    every = math.ceil(steps_per_epoch / VALIDATIONS_PER_EPOCH)
    return draft.model_copy(
        update={
            "epochs": None,
            "steps": steps,
            "batch_size": batch_size,
            "warmup_steps": steps // 10,
            "checkpoint_every": min(MOST_STEPS_AT_RISK, max(1, steps // 10)),
            "validation": Validation(rows=MOST_HELD_OUT, every=every, patience=PATIENCE)
            if parts.dev
            else None,
        }
    )


def _in_words(config: TrainStage, parts: Parts, instruction: str, own: bool) -> str:
    divided = (
        f"{parts.train:,} rows to train on, {parts.dev:,} to choose the weights by, {parts.test:,} to report from; "
        f"at most {config.steps:,} steps of {config.batch_size:,} rows at a learning rate of {config.learning_rate:.1e}"
    )
    if not instruction:
        return f"{divided}\nqueries stand bare, without an instruction"
    whose = "the base's" if own else "the"
    return f"{divided}\nqueries carry {whose} instruction: {instruction}"


# --- After the last step


def _finish(out: Path, plan: Plan, ranks: Ranks) -> Outcome:
    """Score the model as it was written, and take away what only an unfinished run needs."""
    config = plan.config
    log = list(read_log(out / "log.jsonl"))
    kept = best_so_far(log, PATIENCE).step if config.validation else config.steps
    after = answer(load_model(out), plan.trial, config.max_length, ranks) if plan.trial else {}
    assert kept is not None and config.steps is not None
    outcome = Outcome(
        model=str(out),
        format=config.formats[0],
        rows=plan.rows,
        steps=config.steps,
        kept_step=kept,
        dev_scores={r["step"]: r["validation"]["score"] for r in log if "validation" in r},
        questions=len(plan.trial.questions) if plan.trial else 0,
        candidates=len(plan.trial.candidate_C) if plan.trial else 0,
        scores=compare(plan.before, after),
        teacher=_of_teacher(log),
    )
    write_json(out / RESULT, asdict(outcome))
    drop_checkpoints(out / "checkpoints")
    shutil.rmtree(out / WORK)
    return outcome


def _of_teacher(log: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Of each of a teacher's terms the means over the first and over the last tenth of the steps."""
    steps = [record for record in log if "loss" in record]
    tenth = max(1, len(steps) // 10)
    names = [name for name in steps[0] if name.startswith(TEACHER)] if steps else []
    return {
        name: tuple(sum(record[name] for record in part) / tenth for part in (steps[:tenth], steps[-tenth:]))
        for name in names
    }
