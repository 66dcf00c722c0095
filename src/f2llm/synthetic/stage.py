"""Synthetic training data as a stage: settings in, a folder of rows out.

prompts -> requests -> answers/answers.jsonl (paid for, kept) -> checks -> rows, rejects and provenance, part by part

What stands after the arrow behind the journal is made of it alone, and made anew by each run.
"""

import asyncio
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from f2llm.data.parts import KEPT, REJECT_SCHEMA, REJECTS, Tally, write_part, write_sources
from f2llm.data.rows import ROWS_FILE, SCHEMA, Source, rows_table
from f2llm.endpoints import api_key
from f2llm.files import ROWS_IN_A_GROUP, write_json
from f2llm.progress import progress, say
from f2llm.recipe_corpus import SyntheticStage
from f2llm.synthetic.asking import Asker
from f2llm.synthetic.budget import Budget
from f2llm.synthetic.checks import Checks, Encoder, IsOther, Reason, Row, check_languages, columns, make_row
from f2llm.synthetic.client import Complete, endpoint
from f2llm.synthetic.generate import Author, Tasks, ask_all
from f2llm.synthetic.journal import Journal, open_journal
from f2llm.synthetic.kinds import KINDS, Kind
from f2llm.synthetic.local import local_model
from f2llm.synthetic.prompt_files import load_prompts

PROVENANCE = "provenance.parquet"
ANSWERS_FOLDER = "answers"  # in the order in which they came, so no part of what a run results in
PROVENANCE_SCHEMA = pa.schema(
    [
        pa.field("hash", pa.string(), nullable=False),  # the row's
        pa.field("model", pa.string(), nullable=False),  # as in the settings
        pa.field("answered_by", pa.string()),  # the model's name in the server's words
        pa.field("prompt", pa.string(), nullable=False),  # Prompt.id of the row
        pa.field("tasks_prompt", pa.string(), nullable=False),  # Prompt.id of its task
        pa.field("kind", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),  # in English, as the model proposed it
        pa.field("number", pa.int64(), nullable=False),  # of the row within its task
        pa.field("request", pa.string(), nullable=False),  # Request.id, as in answers.jsonl
    ]
)


def synthetic_stage(
    config: SyntheticStage,
    out: Path,
    *,
    load_encoder: Callable[[], Encoder] | None = None,
    is_other: IsOther | None = None,
) -> dict[str, Any]:
    """Have a model write rows, and leave those that pass all checks in `out`.

    Goes on from the answers that are there. A run that the budget ends has the rows that were paid for.

    Args:
        load_encoder: gives the model of `config.embedder`.
        is_other: in place of the detector that `config.language_sure` asks for.

    Returns:
        Rows by source, those rejected by language and reason, requests without an answer by language and reason, and
        what all requests of the journal came to.

    Raises:
        UsageError: a prompt, the key or the local model is not there or not right.
        F2Error: the server refuses, or does not answer; what is finished is kept.
    """
    author = Author(config, load_prompts(Path(config.prompts) if config.prompts else None))
    if is_other is None and config.language_sure is not None:
        is_other = check_languages(config.language_sure)
    with open_journal(Path(config.answers) if config.answers else out / ANSWERS_FOLDER) as journal:
        tasks, budget = asyncio.run(_answers(author, journal))
        checks = Checks(is_other, load_encoder() if load_encoder else None)
        counts = _write(author, tasks, journal, checks, out)
        return {**counts, **_bill(budget, journal)}


async def _answers(author: Author, journal: Journal) -> tuple[Tasks, Budget]:
    config = author.config
    money = (config.budget_money, config.price_in, config.price_out)
    budget = Budget(journal, config.budget_tokens, *money)
    total = len(author.topics()) * config.tasks * config.rows
    async with _model(config) as complete:
        asker = Asker(
            complete,
            journal,
            budget,
            retries=config.retries,
            pause=config.retry_pause,
            max_tokens=config.max_tokens,
        )
        with progress(total=total, what="write rows", unit="row") as bar:
            tasks = await ask_all(author, asker, bar.advance)
    if asker.problem:
        raise asker.problem
    if budget.is_spent:
        say("The budget is spent before all rows are written; raise it and run the same again to go on.")
    return tasks, budget


def _model(config: SyntheticStage) -> AbstractAsyncContextManager[Complete]:
    if config.url is None:
        return local_model(config.model, temperature=config.temperature, max_tokens=config.max_tokens)
    return endpoint(
        config.url,
        config.model,
        key=api_key(config.api_key_env),
        at_once=config.concurrency,
        timeout=config.timeout,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
    )


def source_of(kind: Kind, config: SyntheticStage) -> Source:
    """The source of all rows of a kind: `synthetic/qwen3-32b/short-long`."""
    model = re.sub(r"[^a-z0-9.]+", "-", config.model.lower()).strip("-.")
    return Source(
        name=f"synthetic/{model}/{kind.name}",
        format=kind.format,
        task=kind.task,
        symmetric=kind.symmetric,
        instruction=kind.instruction,
        licence=config.licence,
    )


def _write(author: Author, tasks: Tasks, journal: Journal, checks: Checks, out: Path) -> dict[str, Any]:
    """All files of the stage beside the journal; returns what is counted in them."""
    sources = {kind: source_of(KINDS[kind], author.config) for kind in author.config.kinds}
    for name in (ROWS_FILE, REJECTS, PROVENANCE):
        shutil.rmtree(out / name, ignore_errors=True)  # of an earlier run, with fewer answers
    fates: Tally = defaultdict(lambda: defaultdict(Counter))
    unanswered: Tally = defaultdict(lambda: defaultdict(Counter))
    requests = author.row_requests(tasks)
    for part in count():
        asked = list(islice(requests, ROWS_IN_A_GROUP))
        if part and not asked:
            break
        rows = []
        for one in asked:
            ended = journal.get(one.request.id)
            if ended is not None and ended.answer is not None:
                rows.append(make_row(one, ended, author.config.other_language))
            else:
                fault = (ended and ended.fault) or "not asked"
                unanswered[sources[one.kind.name].name][one.language][fault] += 1
        reasons = checks.reasons(rows)
        for row, reason in zip(rows, reasons, strict=True):
            fates[sources[row.kind.name].name][row.query_lang][reason or KEPT] += 1
        kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
        table = _table(kept, sources)
        write_part(out, part, table)
        write_part(out, part, _provenance(kept, table, author), PROVENANCE)
        if len(kept) < len(rows):
            write_part(out, part, _rejects(rows, reasons, sources), REJECTS)
    write_json(out / "tally.json", {"rows": fates, "changed": {}, "unanswered": unanswered})
    write_sources(out, sources.values(), fates)
    return {
        "tasks": sum(map(len, tasks.values())),
        "tasks_wanted": len(tasks) * author.config.tasks,
        "rows": {source.name: _kept(fates[source.name]) for source in sources.values()},
        "rejected": _by_language(fates, without=KEPT),
        "unanswered": _by_language(unanswered),
    }


def _table(rows: Sequence[Row], sources: dict[Any, Source]) -> pa.Table:
    """Canonical rows, in their order: rows of a kind stand together."""
    tables = [
        rows_table(source, columns([row for row in rows if row.kind.name == kind]))
        for kind, source in sources.items()
    ]
    return pa.concat_tables([SCHEMA.empty_table(), *tables])


def _rejects(rows: Sequence[Row], reasons: Sequence[Reason], sources: dict[Any, Source]) -> pa.Table:
    rejected = [(row, reason) for row, reason in zip(rows, reasons, strict=True) if reason]
    table = _table([row for row, _ in rejected], sources)
    return table.append_column(
        REJECT_SCHEMA.field("reason"), pa.array([reason for _, reason in rejected], pa.string())
    )


def _provenance(rows: Sequence[Row], table: pa.Table, author: Author) -> pa.Table:
    return pa.table(
        {
            "hash": table["hash"],
            "model": [author.config.model] * len(rows),
            "answered_by": [row.ended.model for row in rows],
            "prompt": [row.asked.request.prompt_id for row in rows],
            "tasks_prompt": [author.prompts[row.kind.tasks_prompt].id for row in rows],
            "kind": [row.kind.name for row in rows],
            "task": [row.asked.task.task for row in rows],
            "number": [row.asked.number for row in rows],
            "request": [row.ended.id for row in rows],
        },
        schema=PROVENANCE_SCHEMA,
    )


def _kept(fates: dict[str, Counter[str]]) -> int:
    return sum(counts[KEPT] for counts in fates.values())


def _by_language(tally: Tally, without: str | None = None) -> dict[str, dict[str, int]]:
    """Language -> reason -> rows, of all sources."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for languages in tally.values():
        for language, counts in languages.items():
            found[language].update({reason: n for reason, n in counts.items() if reason != without})
    return {language: dict(sorted(counts.items())) for language, counts in sorted(found.items()) if counts}


def _bill(budget: Budget, journal: Journal) -> dict[str, Any]:
    """What the journal's requests came to; tokens that no server told of are counted at the most they may be."""
    spent = journal.spent
    return {
        "requests": journal.requests,
        "faults": dict(sorted(journal.faults.items())),
        "tokens_in": journal.used.read,
        "tokens_out": journal.used.written,
        "tokens_assumed": spent.both - journal.used.both,
        "money": budget.money(spent),
        "budget_is_spent": budget.is_spent,
    }
