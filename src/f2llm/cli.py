"""The command line: one verb, one thin function; its docstring is its help.

Exit codes: 0 done, 2 wrong use, 1 failed. Errors are one sentence on standard error; `--debug` adds the traceback.
"""

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn

import typer

from f2llm import __version__, cli_data, cli_models, cli_serve, cli_verify, runtime
from f2llm.errors import F2Error, UsageError, plain_errors
from f2llm.progress import say

app = typer.Typer(
    help="The open factory for multilingual text-embedding models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Force = Annotated[
    bool, typer.Option("--force", help="Go on with interrupted training though data or settings changed.")
]
Dim = Annotated[
    int | None, typer.Option(help="Dimensions of the vectors; the model's full width by default.")
]
TextColumn = Annotated[str, typer.Option(help="The column of a JSONL, CSV, TSV or Parquet file.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass  # `main` looks for --debug itself, since an error may come before any verb runs


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, such as recipes/quickstart.yaml.")],
    force: Force = False,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Who works on rows: processes here, or the Ray cluster that RAY_ADDRESS names."),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="How many work on rows at once; as many as there are cores by default."),
    ] = None,
) -> None:
    """Run a recipe: do what is not done yet, print the scores, write the report."""
    from f2llm import pipeline
    from f2llm.engine import Engine, using
    from f2llm.recipe import load

    with using(Engine(engine, workers)):
        pipeline.run(load(recipe), recipe, force)


@app.command()
def train(
    rows: Annotated[
        list[Path], typer.Argument(help="JSONL, CSV, TSV or Parquet: query and positive, or text and label.")
    ],
    base: Annotated[str, typer.Option(help="The model to fine-tune: a folder, or owner/name on the hub.")],
    out: Annotated[Path, typer.Option(help="The folder of the new model.")],
    form: Annotated[
        Literal["retrieval", "clustering", "classification"] | None,
        typer.Option("--format", help="How rows are trained on; told by the columns by default."),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="What stands in front of queries; the base's own by default.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the rows, at most.")] = 3.0,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Queries in a step; 64, or fewer for few rows, by default.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="AdamW's highest; chosen by the base's width by default.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens of a text, longer ones are cut; 512 or the base's limit by default."
        ),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train low-rank adapters only.")] = False,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    force: Force = False,
) -> None:
    """Fine-tune a model on your own rows; prints scores before and after on rows held out."""
    from f2llm.train.before_after import render
    from f2llm.train.finetune import Choices, finetune

    choices = Choices(form, instruction, epochs, batch_size, learning_rate, max_length, lora, seed)
    if outcome := finetune(rows, base, out, choices, force):
        typer.echo(render(outcome))


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, such as recipes/family/0.6B.yaml.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs.")] = 1,
    gpu: Annotated[str, typer.Option(help="Their kind: h100, h200, b200, a100-80gb, l40s ...")] = "h100",
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of an epoch, where a stage's data is not there.")
    ] = None,
    tokens_per_text: Annotated[
        int, typer.Option(min=1, help="Tokens of a text, where the data is not there.")
    ] = 128,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the GPUs' peak that is reached.")
    ] = 0.4,
    price: Annotated[
        float | None, typer.Option(min=0, help="Dollars for a GPU and hour; assumed by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe costs: parameters, memory per GPU, FLOPs, tokens, hours and dollars of each stage."""
    from f2llm.plan.stages import Machine, as_dict, plan, render
    from f2llm.recipe import load

    loaded, machine = load(recipe), Machine(gpus, gpu, utilisation, price)
    stages = plan(loaded, machine, rows=rows, tokens_per_text=tokens_per_text)
    print(
        json.dumps(as_dict(loaded, machine, stages), indent=2) if as_json else render(loaded, machine, stages)
    )
    if problems := [stage.problem for stage in stages if stage.problem]:
        raise F2Error(" ".join(problems))


app.add_typer(cli_data.app, name="data")
app.add_typer(cli_models.app)
app.add_typer(cli_serve.app)
app.add_typer(cli_verify.app)


@app.command()
def embed(
    model: Annotated[str, typer.Argument(help="A model's folder, or owner/name on the hub.")],
    texts: Annotated[
        Path, typer.Argument(help="A file of texts, one a line or in a column; - for standard input.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A .npy, .parquet or .lance; goes on where it was interrupted. JSON lines are printed without.",
        ),
    ] = None,
    text_column: TextColumn = "text",
    prompt: Annotated[str | None, typer.Option(help="query or document; bare texts by default.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Another instruction for queries.")] = None,
    dim: Dim = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = False,
    precision: cli_serve.PrecisionOption = "float32",
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Who computes: processes here, or the Ray cluster that RAY_ADDRESS names."),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many compute at once; one on all cores here, with Ray one on each core."
        ),
    ] = None,
) -> None:
    """Turn texts into vectors."""
    found = read_texts(texts, text_column)
    too_long: Literal["error", "truncate"] = "truncate" if truncate else "error"
    if output is None:
        from f2llm.embed.embedder import Embedder

        stream = Embedder(model, precision).encode_stream(
            found, prompt=prompt, instruction=instruction, dim=dim, too_long=too_long
        )
        for vector in stream:
            print(json.dumps([round(float(x), 7) for x in vector]))
        return

    from f2llm.embed.bulk import Job, embed_file
    from f2llm.engine import Engine

    who = Engine(engine, workers or (1 if engine == "local" else None))
    done = embed_file(Job(model, precision, prompt, instruction, dim, too_long), found, output, who)
    cut = f", {done.cut} of the texts cut" if done.cut else ""
    typer.echo(f"{done.texts} vectors in {output}{cut}")


@app.command()
def index(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    texts: Annotated[Path, typer.Argument(help="A file of texts, one a line or in a column.")],
    out: Annotated[Path, typer.Argument(help="The folder of the index.")],
    text_column: TextColumn = "text",
    dim: Dim = None,
) -> None:
    """Index texts for search."""
    from f2llm.search.store import build_index

    found = list(read_texts(texts, text_column))
    blank = [""] * len(found)
    facts = build_index(model, found, blank, blank, out, dim)
    typer.echo(f"{facts['texts']} texts in {out}")


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="An index folder, such as runs/quickstart/index.")],
    query: Annotated[str, typer.Argument(help="What to look for, in any language.")],
    limit: Annotated[int, typer.Option(min=1, help="How many to show.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Find the texts of an index that are nearest to a query."""
    from f2llm.search.store import search

    hits = search(index, query, limit)
    if as_json:
        print(json.dumps([hit._asdict() for hit in hits], ensure_ascii=False))
        return
    for hit in hits:
        print(
            "  ".join(
                filter(None, (f"{hit.score:.3f}", hit.text, f"({hit.lang})" if hit.lang else "", hit.thing))
            )
        )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions and settings that results and speed depend on."""
    from f2llm.doctor import examine

    facts = examine()
    print(
        json.dumps(facts, indent=2)
        if as_json
        else "\n".join(f"{name}: {value}" for name, value in facts.items())
    )


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def read_texts(path: Path, column: str) -> Iterator[str]:
    """The texts of a file or of standard input, one at a time."""
    from f2llm.data.user_files import iterate_texts

    if str(path) == "-":
        yield from (line.rstrip("\r\n") for line in sys.stdin)
    else:
        yield from iterate_texts(path, column)


class Interrupted(BaseException):
    """Ctrl-C. Not an Exception, so that no library's `except Exception` swallows it."""


def main() -> None:
    """Entry point of the `f2llm` command: whatever goes wrong is one sentence, unless --debug is given."""
    runtime.keep_memory()
    signal.signal(signal.SIGINT, _interrupt)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        with plain_errors("the command", Path.cwd()):
            app()
    except F2Error as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"{_rank()}error: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except Interrupted:
        say("interrupted; what was finished is kept, and a run that is started again goes on from there.")
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read our output has gone; what Python would still flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _rank() -> str:
    """Who speaks, where torchrun started several of us."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
    raise Interrupted
