"""`f2llm data ...`: the catalogue of sources, and how their rows get here."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from f2llm.data.catalogue import Found
from f2llm.data.fetch import Fetched
from f2llm.data.records import UNKNOWN, Layout, SourceRecord
from f2llm.errors import UsageError

app = typer.Typer(help="Sources of training rows.", no_args_is_help=True, rich_markup_mode=None)

SHOWN_LANGUAGES = 4  # more are a number
PLAIN_WIDTH = 200  # columns where standard output is not a terminal: no cell is cut
NARROW_BELOW = 100
NARROW = {"task": 12, "format": 9, "languages": 9, "licence": 7}  # columns of a terminal below that
LEAST_CELL, MOST_CELL = 8, 60  # columns of a terminal that an example takes


@app.command("list")
def list_sources(
    language: Annotated[
        str | None, typer.Option(help="Of this language: swh, sw, zho_Hant; or python, sql ...")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Of this task type, such as 'question answering'.")] = None,
    form: Annotated[
        Literal["retrieval", "clustering", "classification"] | None,
        typer.Option("--format", help="Trained on in this way."),
    ] = None,
    stage: Annotated[
        int | None, typer.Option(min=1, max=2, help="Of this stage of the paper's training.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """List the public sources of the catalogue."""
    from f2llm.data.catalogue import find

    found = find(language=language, task=task, format=form, stage=stage)
    if as_json:
        typer.echo(json.dumps(_as_dict(found), ensure_ascii=False, indent=2))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if found.records:
        console.print(sources_table(found.records, width=console.width if console.is_terminal else None))
    samples = sum(record.samples or 0 for record in found.records)
    starred = any(_languages(record).endswith("*") for record in found.records)
    star = "; * so many languages, not listed yet" if starred else ""
    console.print(f"{len(found.records)} sources, {samples:,} samples{star}", soft_wrap=True)
    if found.unlisted:
        console.print(
            f"{len(found.unlisted)} more are left out: nobody has listed their languages yet.", soft_wrap=True
        )


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="Names of the catalogue, or record files (.yaml).")],
    out: Annotated[Path, typer.Option(help="Each source gets a folder of its name in this one.")],
    config: Annotated[
        str | None, typer.Option(help="Configuration of a hub dataset; also ends the name.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub dataset; train by default.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Rows, at most; later calls go on from there.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Take the proposed columns without asking.")] = False,
) -> None:
    """Bring public sources here: raw rows, and a record of what their columns are."""
    from f2llm.data.catalogue import get
    from f2llm.data.fetch import fetch, settle
    from f2llm.data.records import read_record

    records = [read_record(Path(name)) if name.endswith((".yaml", ".yml")) else get(name) for name in names]
    if not yes and not on_terminal():
        raise UsageError(
            "which column holds what is asked on a terminal, and there is none; give --yes to take what is proposed."
        )
    unread = []
    for record in records:
        fetched = fetch(record, out, config=config, split=split, limit=limit)
        if fetched.is_settled:
            typer.echo(f"{fetched.folder}: the columns are known ({settle(fetched, None)})")
            continue
        _show(fetched)
        proposal = fetched.proposal
        if proposal and not (yes or typer.confirm(f"Read {record.name} like this?", default=True)):
            proposal = None
        path = settle(fetched, proposal)
        typer.echo(f"{path} is written" + (f"; {proposal.note} there" if proposal and proposal.note else ""))
        if proposal is None:
            unread.append(str(path))
    if unread:
        raise UsageError(
            f"the rows are here, but not what their columns are; write it under 'columns' in {', '.join(unread)}."
        )


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A file of rows, a folder or a glob.")],
    record: Annotated[Path | None, typer.Option(help="The source's record, which says how it reads.")] = None,
    layout: Annotated[
        Layout | None, typer.Option("--format", help="How it reads; told by the columns by default.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Problems told of each file.")] = 10,
    rejects: Annotated[Path | None, typer.Option(help="Write all bad records here, as JSONL.")] = None,
) -> None:
    """Say what is wrong with rows, and where; exit code 1 if anything is."""
    from f2llm.data.check import check_file

    reports = check_file(path, record=record, layout=layout, most=most, rejects=rejects)
    for report in reports:
        for line in report.lines():
            typer.echo(line)
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


def on_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


def sources_table(records: list[SourceRecord], *, width: int | None) -> Table:
    """Sources with what one chooses them by, for a terminal of `width` columns; None for a file or a program."""
    frame = None if width is None else box.SIMPLE_HEAD
    table = Table(box=frame, pad_edge=False, padding=(0, 2 if frame is None else 1, 0, 0))
    for heading in ("name", "task", "format", "languages", "samples", "licence"):
        # On a narrow terminal names and samples stay whole, and the others give way.
        most = NARROW.get(heading) if width and width < NARROW_BELOW else None
        justify: Literal["left", "right"] = "right" if heading == "samples" else "left"
        table.add_column(heading, no_wrap=True, overflow="ellipsis", max_width=most, justify=justify)
    for record in records:
        samples = "" if record.samples is None else f"{record.samples:,}"
        licence = "-" if record.licence == UNKNOWN else record.licence
        table.add_row(record.name, record.task, record.format, _languages(record), samples, licence)
    return table


def _languages(record: SourceRecord) -> str:
    """`dan nor swe`, or their number; a star where nobody knows which they are."""
    if record.programming_languages:
        return " ".join(record.programming_languages)
    if record.languages == UNKNOWN:
        return f"{record.language_count or ''}*"
    many = len(record.languages) > SHOWN_LANGUAGES
    return str(len(record.languages)) if many else " ".join(record.languages)


def _as_dict(found: Found) -> dict[str, object]:
    return {
        "sources": [record.model_dump(by_alias=True) for record in found.records],
        "samples": sum(record.samples or 0 for record in found.records),
        "languages_unknown": [record.name for record in found.unlisted],
    }


def _show(fetched: Fetched) -> None:
    """The first rows, a line for each column, and what it is taken for."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(sample_table(fetched, console.width))
    if fetched.proposal is None:
        console.print(f"No column is likely to be what {fetched.record.format} rows need.", soft_wrap=True)


def sample_table(fetched: Fetched, width: int) -> Table:
    """Columns with what each is read as, its type, and as much of the first rows as `width` has room for."""
    sample, uses = fetched.sample, fetched.proposal.uses() if fetched.proposal else {}
    facts = [
        (name, _read_as(name, uses), _type(sample.schema.field(name).type)) for name in sample.column_names
    ]
    headings = ("column", "read as", "type")
    widest = [max(map(len, column)) for column in zip(headings, *facts, strict=True)]
    gaps = 2 * (len(headings) + sample.num_rows)
    room = (width - sum(widest) - gaps) // max(sample.num_rows, 1)
    title = Text(fetched.record.name)
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left"
    )
    for heading, least in zip(headings, widest, strict=True):
        table.add_column(heading, no_wrap=True, min_width=least)
    for number in range(sample.num_rows):
        most = min(max(room, LEAST_CELL), MOST_CELL)
        table.add_column(f"row {number + 1}", no_wrap=True, overflow="ellipsis", max_width=most)
    for name, *rest in facts:
        values = (" ".join(str(value)[: 4 * MOST_CELL].split()) for value in sample[name].to_pylist())
        table.add_row(*map(Text, (name, *rest, *values)))
    return table


def _read_as(column: str, uses: dict[str, str]) -> str:
    """`query`; or `.text positive`, where what is inside of a column is read."""
    inside = {name.removeprefix(column): use for name, use in uses.items() if name.split(".")[0] == column}
    return ", ".join(f"{name} {use}".strip() for name, use in inside.items())


def _type(kind: object) -> str:
    return str(kind) if len(str(kind)) < 20 else str(kind).partition("<")[0]
