"""The training loop: sampler -> batch -> objective -> gradients -> step -> checkpoint.

`train` is a plain loop over steps. A step makes its batch from (seed, step), computes each distinct text once, takes
the objective of the vectors, and moves the weights; nothing outside the checkpoint is carried from one step to the
next, so a run that is killed and continued ends in the same bits. Every rank runs the same loop; who computes what is
step.py's affair.

Shape suffixes: N texts of a batch, D dims.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from f2llm.model.folder import Model
from f2llm.model.slices import save_basis
from f2llm.progress import progress, say
from f2llm.recipe_train import TrainStage
from f2llm.train.checkpoint import (
    MAY_DIFFER,
    MUST_MATCH,
    check_same,
    find_checkpoint,
    keep_only,
    load_checkpoint,
    read_meta,
    save_checkpoint,
    step_of,
    steps_kept,
)
from f2llm.train.distillation import Target
from f2llm.train.lora import merge_lora
from f2llm.train.memory import choose_sum_each, tokens_per_microbatch
from f2llm.train.optim import learning_rate_at
from f2llm.train.ranks import ALONE, Ranks, on_main
from f2llm.train.sampler import Batch, Sampler, SourceRows
from f2llm.train.sources import Text
from f2llm.train.step import Ids, accumulate_gradients, vectors_of
from f2llm.train.teacher import Given, Teacher, fit_projection, open_teacher, target_of
from f2llm.train.terms import Read, Taught, Terms, make_loss, token_ids
from f2llm.train.training import Training, begin, check_cuts, cuts_of
from f2llm.train.trials import Trial, prepare
from f2llm.train.validate import Best, best_so_far, validate
from f2llm.train.watch import (
    Log,
    Record,
    Spread,
    check_finite,
    check_spread,
    memory_gigabytes,
    note,
    open_log,
    read_log,
    spread,
)
from f2llm.train.watchdog import watchdog, watched

LOOK_EVERY = 50  # steps between two looks at whether the vectors have collapsed
SECONDS_OF_A_PHASE = 1200.0  # that a step, a validation or a checkpoint of several ranks may take at most
PROBED_STEPS = 8  # batches looked at to learn how many tokens one has
# Settings that may change between two parts of a run: they say how it is kept and watched, not what it computes.
NOT_COMPUTED = {"checkpoint_every", "keep_checkpoints", "tensorboard"}


@dataclass(frozen=True)
class Run:
    """What stays the same from step to step."""

    config: TrainStage  # its `steps` are the run's
    training: Training
    teacher: Teacher | None
    target: Target | None  # of distillation
    read: Read
    tokens_per_microbatch: int
    sum_each: bool  # see `accumulate_gradients`
    out: Path
    ranks: Ranks
    seed: int

    @property
    def log_file(self) -> Path:
        return self.out / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @property
    def best_checkpoints(self) -> Path:
        """Where the weights of the best validation are kept, and beside them those that were the best at the newest
        checkpoint: a run that goes on from there may not meet the later ones again.
        """
        return self.checkpoints / "best"


def train(
    config: TrainStage,
    model: Model,
    sampler: Sampler,
    teacher: Given | None,
    out: Path,
    *,
    held_out: Sequence[SourceRows] = (),
    read: Read = token_ids,
    inputs: dict[str, str] | None = None,
    force: bool = False,
    ranks: Ranks = ALONE,
) -> Record:
    """Run the steps that are not done yet; changes `model.decoder` in place, to the weights that the run is to leave.

    Args:
        sampler: batches of the run; its seed and number of steps hold, also where `config` counts epochs.
        teacher: to distil from: a model, or a folder or a server to be opened here.
        out: folder of log.jsonl and, until the model is written, of the checkpoints.
        held_out: rows for `config.validation`, by source.
        read: how the texts of `sampler` and `held_out` become token ids.
        inputs: hashes of what the run reads, by name; a run is not continued with others.
        force: continue although data or settings changed.

    Returns:
        The last step's record.

    Raises:
        F2Error if a number is not finite, or if memory does not suffice for the worst micro-batch.
        UsageError if the run began with other data or settings.
    """
    # AdamW's moments of embeddings that are no longer met fade to numbers with which a CPU computes ten times slower.
    torch.set_flush_denormal(True)
    config = config.model_copy(update={"steps": sampler.steps})
    trials = prepare(config, held_out, sampler.seed, model.facts.template) if config.validation else []
    record: Record = {}
    with ExitStack() as stack:
        stack.enter_context(watchdog(ranks, SECONDS_OF_A_PHASE))
        with watched("begin", ranks):
            run, meta, done = _begin(config, model, sampler, teacher, read, out, inputs or {}, force, ranks)
            best, collapsed = on_main(lambda: _standing(run, done), ranks)
            on_main(lambda: keep_only(run.best_checkpoints, {best.step}), ranks)
        training = run.training
        log = None
        if ranks.is_main:
            log = stack.enter_context(open_log(run.log_file, done, config.tensorboard))
        bar = stack.enter_context(progress(total=sampler.steps, what=f"train {out.name}", unit="step"))
        bar.advance(done)
        for step, batch, ids in _batches(sampler, run, done):
            if trials and step % config.validation.every == 0:  # type: ignore[union-attr]
                best = _validate(run, trials, step, best, log)
                if best.stop:
                    break
            with watched("step", ranks, step):
                record, vectors_ND = _step(run, step, batch, ids)
            collapsed = _look(run, batch, vectors_ND, record, log, collapsed)
            if log:
                log.write(record)
            bar.advance(1, note=note(record))
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < sampler.steps:
                with watched("save a checkpoint", ranks):
                    save_checkpoint(
                        run.checkpoints, step + 1, training.state(), meta, config.keep_checkpoints, ranks
                    )
                    on_main(lambda: keep_only(run.best_checkpoints, {best.step}), ranks)  # noqa: B023 - called at once
        else:
            if trials:
                best = _validate(run, trials, sampler.steps, best, log)
    _leave(run, best)
    return record


def _begin(
    config: TrainStage,
    model: Model,
    sampler: Sampler,
    teacher: Given | None,
    read: Read,
    out: Path,
    inputs: dict[str, str],
    force: bool,
    ranks: Ranks,
) -> tuple[Run, dict[str, Any], int]:
    """All that the loop needs, what checkpoints are to say of the run, and the number of steps done."""
    check_cuts(config, model.decoder.config)
    meta = _meta(config, sampler.seed, inputs, ranks)
    then: dict[str, Any] | None = None
    if found := find_checkpoint(out / "checkpoints", ranks):
        check_same(then := read_meta(found), meta, force)
    # What a teacher's cache lacks is computed before anything else is in memory.
    taught = None
    if teacher:
        taught = open_teacher(config, teacher, sampler, read, ranks, step_of(found) if found else 0)
    projects = taught is not None and config.distillation.target == "projection"
    training = begin(config, model, sampler.seed, ranks, taught.width if taught and projects else None)
    target = target_of(config, training, taught) if taught else None
    done = 0
    if found and then:
        done = load_checkpoint(found, training.state())
        # What was chosen is kept: another number would cut batches otherwise, and change last bits.
        budget = config.tokens_per_microbatch or then["tokens_per_microbatch"]
        sum_each: bool = then["sum_each"]
    else:
        most_tokens = _most_tokens(config, model, sampler, read) // ranks.world
        budget = tokens_per_microbatch(model.decoder, config, most_tokens, ranks)
        sum_each = choose_sum_each(model.decoder, config, ranks)
        if taught and projects:
            fit_projection(config, training, taught, sampler, read, budget, ranks)
    meta |= {"tokens_per_microbatch": budget, "sum_each": sum_each}
    return Run(config, training, taught, target, read, budget, sum_each, out, ranks, sampler.seed), meta, done


def _standing(run: Run, done: int) -> tuple[Best, bool]:
    """By the log: the best validation before step `done`, and whether the last look found the vectors collapsed."""
    patience = run.config.validation.patience if run.config.validation else None
    behind = [record for record in read_log(run.log_file) if record["step"] < done]
    collapsed = False
    for record in behind:
        if "mean_cosine" in record:
            seen = Spread(*(record[name] for name in Spread._fields))
            collapsed = bool(_collapse(run, seen, record["step"], collapsed))
    best = best_so_far(behind, patience)
    if patience and best.step is not None and best.step not in steps_kept(run.best_checkpoints):
        say(
            f"the best weights, of step {best.step}, are gone; {run.out.name} looks for the best from here on."
        )
        best = Best(patience)
    return best, collapsed


def _batches(sampler: Sampler, run: Run, done: int) -> Iterator[tuple[int, Batch, Ids]]:
    """Steps not done yet with their batches and token ids; beside a GPU, the next ones are made while it works."""

    def make(step: int) -> tuple[int, Batch, Ids]:
        batch = sampler[step]
        return step, batch, run.read(run.training.model, batch.texts, run.config.max_length)

    if run.ranks.device.type == "cpu":  # where another busy thread would take its time from the computation
        yield from map(make, range(done, sampler.steps))
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, done) if done < sampler.steps else None
        while coming:
            ready = coming.result()
            step = ready[0] + 1
            coming = pool.submit(make, step) if step < sampler.steps else None
            yield ready


def _step(run: Run, step: int, batch: Batch, ids: Ids) -> tuple[Record, Tensor]:
    """One optimizer step: its record, and the raw vectors [N, D] of its texts before it."""
    config, training, ranks = run.config, run.training, run.ranks
    optimizer = training.optimizer
    started = time.perf_counter()
    learning_rate = learning_rate_at(config, step)
    optimizer.set_learning_rate(learning_rate)
    optimizer.zero_grad()
    optimizer.prepare(torch.tensor(list(chain.from_iterable(ids))))
    taught = None
    if run.teacher and run.target:
        taught = Taught(run.teacher.vectors(batch.texts), run.target)
    terms: Terms = {}
    loss_of = make_loss(config, batch, taught, training.temperature, terms, config.exits)
    cuts = cuts_of(config, training, run.seed, step)
    loss, vectors_ND = accumulate_gradients(
        training.model.decoder, ids, loss_of, run.tokens_per_microbatch, ranks, run.sum_each, cuts
    )
    vectors_ND = vectors_ND[:, -training.model.decoder.config.hidden_size :]  # those of exits are in front
    norm = optimizer.clip(config.clip_norm)
    check_finite(
        step, loss.item(), norm.item(), run.out.name, source=batch.source, checkpoints=run.checkpoints
    )
    optimizer.step()
    training.after_step(step)
    record = {"step": step, "source": batch.source, "loss": loss.item()}
    record |= {name: term.item() for name, term in terms.items()}
    record |= {"gradient_norm": norm.item(), "learning_rate": learning_rate}
    if config.learn_temperature:
        record["temperature"] = training.temperature.item()
    record["tokens_per_second"] = sum(map(len, ids)) / (time.perf_counter() - started)
    record["memory_gigabytes"] = memory_gigabytes(ranks.device)
    return record, vectors_ND


def _look(run: Run, batch: Batch, vectors_ND: Tensor, record: Record, log: Log | None, ongoing: bool) -> bool:
    """Now and then, whether the vectors of a batch of texts that mean different things have collapsed."""
    if not batch.in_batch or record["step"] % LOOK_EVERY:
        return ongoing
    seen = spread(vectors_ND)
    record |= seen._asdict()
    sentence = _collapse(run, seen, record["step"], ongoing)
    if sentence and log and not ongoing:
        log.alarm(record["step"], sentence)
    return sentence is not None


def _collapse(run: Run, seen: Spread, step: int, ongoing: bool) -> str | None:
    """A warning if the vectors have collapsed; `ongoing` says whether they had at the last look."""
    warmup_steps = run.config.warmup_steps
    return check_spread(seen, step=step, warmup_steps=warmup_steps, where=run.out.name, ongoing=ongoing)


def _validate(run: Run, trials: Sequence[Trial], step: int, best: Best, log: Log | None) -> Best:
    """Score the weights after `step` steps; if the run may stop early, keep the best."""
    config, model = run.config, run.training.model

    def encode(texts: list[Text]) -> Tensor:
        ids = run.read(model, texts, config.max_length)
        return vectors_of(model.decoder, ids, run.tokens_per_microbatch, run.ranks)

    def terms_of(batch: Batch, vectors_ND: Tensor) -> dict[str, float]:
        terms: Terms = {}
        make_loss(config, batch, None, run.training.temperature, terms)(vectors_ND)
        return {name: term.item() for name, term in terms.items()}

    with run.training.finished(), watched("validate", run.ranks, step):
        figures = validate(encode, trials, terms_of)
        best = best.after(figures["score"], step)
        if best.patience and best.step == step:
            _keep_best(run, step)
    if log:
        log.write({"step": step, "validation": figures})
    return best


def _keep_best(run: Run, step: int) -> None:
    """Save the weights as the best so far, in place of any that came after the newest checkpoint."""
    folder, ranks = run.best_checkpoints, run.ranks
    before = on_main(lambda: steps_kept(folder), ranks)
    save_checkpoint(
        folder, step, {"model": run.training.model.decoder.state_dict()}, {}, len(before) + 1, ranks
    )
    on_main(lambda: keep_only(folder, {step, *before[-1:]}), ranks)


def _leave(run: Run, best: Best) -> None:
    """Leave the decoder with the weights that the run was for: the best, or the last, averaged if asked for."""
    decoder = run.training.model.decoder
    run.training.finish()
    if best.patience and (found := find_checkpoint(run.best_checkpoints, run.ranks)):
        load_checkpoint(found, {"model": decoder.state_dict()})
    if (basis_EE := run.training.table_basis_EE) is not None:
        on_main(lambda: save_basis(run.out, basis_EE.cpu()), run.ranks)
    if run.config.lora:
        merge_lora(decoder)
    decoder.eval()


def _most_tokens(config: TrainStage, model: Model, sampler: Sampler, read: Read) -> int:
    """More tokens than a batch is likely to have, from a look at some; one that has more is only cut once more."""
    steps = range(0, sampler.steps, max(1, sampler.steps // PROBED_STEPS))
    seen = [sum(map(len, read(model, sampler[step].texts, config.max_length))) for step in steps]
    return 3 * max(seen) // 2


def _meta(config: TrainStage, seed: int, inputs: dict[str, str], ranks: Ranks) -> dict[str, Any]:
    """What a checkpoint says of its run: what must not change when it goes on, and what may."""
    recipe = config.model_dump(mode="json", exclude=NOT_COMPUTED)
    # Where a teacher's vectors are kept decides nothing, but that they are kept does: it rounds them.
    recipe["distillation"] |= {"cache": config.distillation.cache is not None, "api_key_env": None}
    versions = {library: version(library) for library in ("f2llm", "torch", "tokenizers")}
    may_differ = {"ranks": ranks.world, "threads": torch.get_num_threads(), "device": ranks.device.type}
    return {
        MUST_MATCH: {"recipe": recipe, "seed": seed, "inputs": inputs},
        MAY_DIFFER: may_differ | versions,
    }
