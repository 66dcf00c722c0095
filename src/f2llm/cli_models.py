"""Verbs that make models out of models: prune, trim, merge, export."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from f2llm.errors import UsageError

app = typer.Typer(rich_markup_mode=None)

Model = Annotated[str, typer.Argument(help="A model's folder, or owner/name on the hub.")]
Out = Annotated[Path, typer.Argument(help="The folder of the new model.")]


@app.command()
def prune(
    model: Model,
    out: Out,
    calibration: Annotated[
        list[Path],
        typer.Option(
            help="A folder of rows (a stage's output) or your own file of them; may be given again."
        ),
    ],
    size: Annotated[str | None, typer.Option(help="80M, 160M, 330M: the shape of that size.")] = None,
    params: Annotated[
        str | None, typer.Option(help="A budget, 250M or 1.2B: the nearest shape that shrinks evenly.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden width.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=1, help="MLP width.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads; they go in groups.")] = None,
    score: Annotated[
        Literal["activation", "taylor"], typer.Option(help="What tells the units that matter.")
    ] = "activation",
    depth: Annotated[
        Literal["first", "change"], typer.Option(help="Keep the first layers, or those that change most.")
    ] = "first",
    seed: Annotated[int, typer.Option(help="Of the calibration rows that are drawn.")] = 0,
) -> None:
    """Cut a smaller model out of a larger one, a layer in memory at a time."""
    from f2llm.compress.prune import prune_model

    _fresh(out)
    result = prune_model(
        model,
        out,
        calibration=calibration,
        size=size,
        parameters=_count(params) if params else None,
        hidden_size=hidden,
        intermediate_size=intermediate,
        layers=layers,
        heads=heads,
        score=score,
        depth=depth,
        seed=seed,
    )
    table = _table("the shape, and others of about this size" if result.others else "the shape")
    for heading in ("parameters", "hidden", "MLP", "layers", "heads"):
        table.add_column(heading, justify="right")
    for candidate in (result.shape, *result.others):
        shape = candidate.config
        widths = (
            shape.hidden_size,
            shape.intermediate_size,
            shape.num_hidden_layers,
            shape.num_attention_heads,
        )
        table.add_row(f"{candidate.parameters:,}", *map(str, widths))
    Console(highlight=False).print(table)
    typer.echo(f"{out}, identity {result.facts.identity[:16]}")


@app.command()
def trim(
    model: Model,
    out: Out,
    corpus: Annotated[
        list[Path],
        typer.Option(help="A folder of rows (a stage's output) or a file of texts; may be given again."),
    ],
    languages: Annotated[
        str | None, typer.Option(help="Of the rows, those of these languages: deu,fra,swh.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to keep; all that the corpus uses by default.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="The column of a file of texts.")] = "text",
) -> None:
    """Leave out tokens that a corpus does not use; texts whose tokens are all kept keep their vectors."""
    from f2llm.compress.trimming import trim_model
    from f2llm.languages import english_name, tag

    _fresh(out)
    wanted = {tag(one.strip()) for one in languages.split(",")} if languages else None
    result = trim_model(model, out, corpus, languages=wanted, keep=keep, column=text_column)
    console = Console(highlight=False)
    table = _table("texts held out, as they are and behind the model's prompt")
    table.add_column("language")
    for heading in ("texts", "same vectors", "tokens a text, before", "after"):
        table.add_column(heading, justify="right")
    for language, found in result.languages.items():
        table.add_row(
            f"{language} {english_name(language)}",
            f"{found.texts:,}",
            f"{found.unchanged / found.texts:.1%}",
            f"{found.tokens / found.texts:.1f}",
            f"{found.tokens_trimmed / found.texts:.1f}",
        )
    console.print(table)
    before, after = result.parameters
    console.print(
        f"{result.tokens[0]:,} -> {result.tokens[1]:,} tokens, {before:,} -> {after:,} parameters: {out}"
    )


@app.command()
def merge(
    models: Annotated[list[Path], typer.Argument(help="Folders of models of one shape and tokenizer.")],
    out: Annotated[Path, typer.Option(help="The folder of the new model.")],
    method: Annotated[
        Literal["average", "spherical", "task"],
        typer.Option(
            help="A mean, a spherical mean of two, or a base and what each model has learnt from it."
        ),
    ] = "average",
    weights: Annotated[str | None, typer.Option(help="One for each model: 2,1,1. Equal by default.")] = None,
    base: Annotated[Path | None, typer.Option(help="What the models were trained from, for 'task'.")] = None,
) -> None:
    """Make one model out of several."""
    from f2llm.compress.merge import merge_models

    _fresh(out)
    try:
        shares = [float(one) for one in weights.split(",")] if weights else None
    except ValueError:
        raise UsageError(f"--weights is {weights!r}; expected numbers with commas between: 2,1,1.") from None
    facts = merge_models(models, out, method=method, weights=shares, base=base)
    typer.echo(f"{len(models)} models merged: {out}, identity {facts.identity[:16]}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    out: Annotated[Path, typer.Argument(help="The folder of the export.")],
    to: Annotated[
        Literal["onnx", "openvino", "gguf", "static"],
        typer.Option(help="ONNX Runtime, OpenVINO, llama.cpp, or a table of token vectors."),
    ],
    quantize: Annotated[
        str | None,
        typer.Option(help="int8 (onnx, openvino), q8_0 (gguf), or f32 or f16 where there is a choice."),
    ] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Dimensions of the vectors; all by default.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="A file of texts to compare on; names of things by default.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="The column of a file of texts.")] = "text",
) -> None:
    """Write a model for another runtime, and compare its vectors there with the original's."""
    from f2llm.data.user_files import iterate_texts
    from f2llm.export.export import export_model

    sample = list(iterate_texts(texts, text_column)) if texts else None
    typer.echo(export_model(model, out, to, dim=dim, quantize=quantize, texts=sample).render())


def _count(text: str) -> int:
    """250M -> 250,000,000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper())
    if not found:
        raise UsageError(f"--params is {text!r}; expected a number such as 250M or 1.2B.")
    return round(float(found[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[found[2]])


def _fresh(out: Path) -> None:
    """A model is not written over what is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty; give another folder for the new model.")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
