"""Verbs that make models out of models: prune, distil, trim, slice, merge, export."""

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
        Literal["first", "change", "even"],
        typer.Option(help="Keep the first layers, those that change most, or some at even distances."),
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
def distil(
    rows: Annotated[
        list[Path],
        typer.Argument(help="Rows as for `f2llm train`, or texts alone: lines, or a column of that name."),
    ],
    student: Annotated[str, typer.Option(help="The model that learns: a folder, or owner/name on the hub.")],
    teacher: Annotated[
        str,
        typer.Option(
            help="The model to learn from: a folder, owner/name, or the URL of an embeddings server."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the new model.")],
    terms: Annotated[
        str | None,
        typer.Option(help="mse, cosine, similarity, ranking with weights: cosine=1,similarity=0.5."),
    ] = None,
    target: Annotated[
        Literal["prefix", "kept", "projection"] | None,
        typer.Option(help="Which of the teacher's dimensions mse and cosine look at; what fits by default."),
    ] = None,
    contrastive: Annotated[
        float, typer.Option(min=0, help="Weight of what the rows themselves teach.")
    ] = 1.0,
    cache: Annotated[
        Path | None, typer.Option(help="A folder that keeps the teacher's vectors for further runs.")
    ] = None,
    cache_precision: Annotated[Literal["float16", "int8"], typer.Option(help="Of the cache.")] = "float16",
    teacher_model: Annotated[str | None, typer.Option(help="At a URL, the model's name there.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="The environment variable with the URL's key.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the rows, at most.")] = 3.0,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Queries in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="By the student's width by default.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a text.")] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Go on with an interrupted run although its settings changed.")
    ] = False,
) -> None:
    """Teach a model another one's vectors, on rows or on texts alone; goes on where it was interrupted."""
    from f2llm.train.before_after import render
    from f2llm.train.finetune import Choices, distillation_of, finetune

    distillation = distillation_of(
        student,
        teacher,
        terms=_weights(terms) if terms else None,
        target=target,
        contrastive=contrastive,
        cache=str(cache) if cache else None,
        cache_precision=cache_precision if cache else None,
        model=teacher_model,
        api_key_env=api_key_env,
    )
    choices = Choices(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        seed=seed,
        teacher=teacher,
        distillation=distillation,
    )
    if outcome := finetune(rows, student, out, choices, force):
        typer.echo(render(outcome))


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


@app.command("slice")
def slice_(
    model: Model,
    out: Out,
    layers: Annotated[int | None, typer.Option(min=1, help="Keep the first so many layers.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Project the embedding table onto this rank.")
    ] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Dimensions of the vectors.")] = None,
) -> None:
    """Take a smaller model out of one that was trained for it, without training."""
    from f2llm.compress.slicing import slice_model

    _fresh(out)
    facts = slice_model(model, out, layers=layers, rank=rank, dim=dim)
    typer.echo(f"{out}, identity {facts.identity[:16]}")


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
        typer.Option(
            help="int8, int8-weights (onnx), q8_0 (gguf), f32 or f16; the first that the target has by default."
        ),
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


def _weights(text: str) -> dict[str, float]:
    """cosine=1,similarity=0.5; a name alone counts once."""
    found = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            found[name] = float(weight or 1)
        except ValueError:
            raise UsageError(
                f"--terms is {text!r}; expected names and weights: cosine=1,similarity=0.5."
            ) from None
    return found


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
