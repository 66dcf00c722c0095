"""Fine-tuning on one's own rows: a file and a base model in, a model folder and a table of before and after out.

The rows are read into a hidden folder beside the model's, which is gone afterwards. Everything else is the training
stage itself, with a part of the rows held out and scored as the run goes on, so that it stops when it no longer
gains and leaves the best weights.
"""

import hashlib
import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from f2llm.data.rows import ROWS_FILE
from f2llm.data.user_files import files_stage, guess_format
from f2llm.errors import UsageError
from f2llm.files import alone_in, read_object, sha256_file
from f2llm.model.base import model_folder
from f2llm.model.folder import FACTS
from f2llm.recipe import FilesStage, Format, Lora, TrainStage, Validation, canonical_json
from f2llm.train.ranks import join, on_main
from f2llm.train.stage import train_stage
from f2llm.train.validate import best_so_far, table

SOURCE = "rows"
FEWEST_ROWS = 40  # with fewer, a tenth says nothing
MOST_HELD_OUT = 1000
VALIDATIONS_PER_EPOCH, PATIENCE = 4, 4  # so a run goes on for an epoch without a better score
# Wider models take smaller steps: 2e-5 at 1024 dimensions, which is between F2LLM-v2's rates for 0.6B and 330M.
RATE_TIMES_WIDTH = 2e-5 * 1024
LORA_RATE = 10.0  # adapters begin at zero and bear more


@dataclass(frozen=True)
class Choices:
    """What a user may choose; None is chosen here."""

    format: Format | None = None
    instruction: str | None = None
    epochs: float = 3.0
    batch_size: int = 64
    learning_rate: float | None = None
    max_length: int = 512
    lora: bool = False
    seed: int = 0


def finetune(files: list[Path], base: str, out: Path, choices: Choices, force: bool = False) -> str:
    """Fine-tune `base` on `files` and write the model folder `out`; started again, it goes on where it was left.

    Args:
        files: JSONL, CSV, TSV or Parquet: query, positive(s) and optional negative(s), or text and label.
        base: a model folder or a hub model.
        out: a folder that is not there yet, or that an interrupted run of the same kind left.
        force: go on although data or settings changed.

    Returns:
        A table of scores before and after on the rows held out, or why there is none.
    """
    if (out / FACTS).exists():
        raise UsageError(f"{out} holds a model already; remove it or name another folder with --out.")
    hidden = out.with_name(f".{out.name}.rows")
    with join() as ranks, alone_in(out) if ranks.is_main else nullcontext():
        count, form = on_main(lambda: _import(files, choices, hidden), ranks)
        config = _settings(choices, count, form, base)
        train_stage(
            config,
            data=hidden,
            base=base,
            tokenizer=None,
            teacher=None,
            out=out,
            seed=choices.seed,
            recipe_hash=hashlib.sha256(canonical_json(config.model_dump(mode="json"))).hexdigest(),
            inputs={"rows": sha256_file(hidden / ROWS_FILE), "base": base},
            force=force,
            ranks=ranks,
        )
        on_main(lambda: shutil.rmtree(hidden), ranks)
    return _before_and_after(out, config)


def _import(files: list[Path], choices: Choices, folder: Path) -> tuple[int, Format]:
    """Write the rows to `folder`, anew each time: that takes less than to find out whether the files changed."""
    form = choices.format or guess_format(files[0])
    stage = FilesStage(
        stage="files",
        files=[str(file) for file in files],
        format=form,
        task="fine-tuning",
        instruction=choices.instruction or "-",
    )
    return files_stage(stage, SOURCE, folder)["rows"][SOURCE], form


def _settings(choices: Choices, rows: int, form: Format, base: str) -> TrainStage:
    """The training stage that the choices and the size of the data ask for."""
    folder = model_folder(base)
    width = read_object(folder / "config.json")["hidden_size"]
    rate = choices.learning_rate or RATE_TIMES_WIDTH / width * (LORA_RATE if choices.lora else 1.0)
    held_out = min(rows // 10, MOST_HELD_OUT) if rows >= FEWEST_ROWS else 0
    batch_size = max(2, min(choices.batch_size, rows - held_out))
    steps_per_epoch = math.ceil((rows - held_out) / batch_size)
    steps = math.ceil(choices.epochs * steps_per_epoch)
    validation = Validation(
        rows=max(2, held_out), every=math.ceil(steps_per_epoch / VALIDATIONS_PER_EPOCH), patience=PATIENCE
    )
    return TrainStage(
        stage="train",
        data="./rows",
        base=base if "/" in base else f"./{base}",
        formats=[form],
        instructions=bool(choices.instruction),
        steps=steps,
        batch_size=batch_size,
        max_length=choices.max_length,
        learning_rate=rate,
        warmup_steps=steps // 10,
        lora=Lora() if choices.lora else None,
        checkpoint_every=max(1, steps // 10),
        validation=validation if held_out else None,
    )


def _before_and_after(out: Path, config: TrainStage) -> str:
    if not config.validation:
        return f"no scores: with fewer than {FEWEST_ROWS} rows, all are trained on"
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    validations = [record for record in map(json.loads, lines) if "validation" in record]
    best = best_so_far(validations, PATIENCE)
    after = next(record for record in validations if record["step"] == best.step)
    return (
        f"scores on the rows held out, before and after (weights of step {best.step} of {config.steps})\n"
        + table(validations[0]["validation"], after["validation"])
    )
