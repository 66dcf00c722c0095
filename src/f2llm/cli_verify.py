"""`f2llm verify`: whether a model folder or a server gives the vectors that its model was trained for."""

import json
from pathlib import Path
from typing import Annotated

import typer

from f2llm.errors import UsageError
from f2llm.recipe_fields import is_url

app = typer.Typer(rich_markup_mode=None)


@app.command()
def verify(
    target: Annotated[
        str,
        typer.Argument(
            help="A model's folder, owner/name on the hub, or the URL of an embeddings server, up to /v1."
        ),
    ],
    peer: Annotated[
        bool, typer.Option("--peer", help="Of a folder: compute with sentence-transformers as well.")
    ] = False,
    golden: Annotated[
        Path | None, typer.Option(help="Golden vectors to compare with; a folder's own by default.")
    ] = None,
    write_golden: Annotated[
        bool, typer.Option("--write-golden", help="Write golden.json into the folder, if no check fails.")
    ] = False,
    query_prompt: Annotated[
        str | None,
        typer.Option(
            help="What should stand in front of queries, to the letter; what the target says by default."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="At a URL, the model's name there.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="The environment variable with the URL's key.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Judge a folder or a server, ours or another's: EOS, pooling, padding, norm, prompts, sizes, protocol."""
    from f2llm.endpoints import api_key
    from f2llm.verify.folder import verify_folder
    from f2llm.verify.remote import verify_server

    if golden is not None and not golden.is_file():
        raise UsageError(f"--golden is {golden}, which is no file; give a model's golden.json.")
    if golden is not None and write_golden:
        raise UsageError("--golden compares and --write-golden writes; give one of them.")
    if is_url(target):
        if peer or write_golden:
            raise UsageError(f"--peer and --write-golden need a model's folder, {target} is a server.")
        report = verify_server(
            target, model=model, key=api_key(api_key_env), golden=golden, query_prompt=query_prompt
        )
    else:
        if model or api_key_env:
            raise UsageError(f"--model and --api-key-env are for servers, {target} is not a URL.")
        report = verify_folder(
            target, peer=peer, golden=golden, query_prompt=query_prompt, make_golden=write_golden
        )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        report.show()
    if report.failed:
        raise typer.Exit(1)
