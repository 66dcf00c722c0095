"""The verb that serves models over HTTP."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from f2llm.endpoints import api_key
from f2llm.errors import UsageError

app = typer.Typer(rich_markup_mode=None)

PrecisionOption = Annotated[
    Literal["float32", "int8"],
    typer.Option(help="Of linear maps. int8 gives other vectors, under an identity of their own."),
]


@app.command()
def serve(
    models: Annotated[
        list[str],
        typer.Argument(help="A model's folder, or owner/name on the hub; NAME=MODEL gives it another name."),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any that is free.")] = 8080,
    api_key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds the key clients must send.")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="A file of keys, one a line; any of them will do.")
    ] = None,
    token_arrays: Annotated[
        Literal["reject", "native", "cl100k"],
        typer.Option(
            help="What arrays of token ids are: refused, the model's own ids, or OpenAI's, made texts again."
        ),
    ] = "reject",
    precision: PrecisionOption = "float32",
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens that a thread computes at once; 768 or 1,024 by default."),
    ] = None,
    max_waiting_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens computed before a request from which on it is refused; 5,120 by default."
        ),
    ] = None,
) -> None:
    """Serve vectors over HTTP, by the protocols of OpenAI, Cohere and Text Embeddings Inference."""
    keys = [api_key(api_key_env)] if api_key_env else []
    if api_keys:
        keys += _keys(api_keys)
    try:
        from f2llm.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise UsageError(
            f"serving needs {error.name}, which is not installed; pip install 'f2llm[serve]'."
        ) from None
    run(
        models,
        host=host,
        port=port,
        keys=[key for key in keys if key],
        token_arrays=token_arrays,
        precision=precision,
        tokens_per_batch=tokens_per_batch,
        max_waiting_tokens=max_waiting_tokens,
    )


def _keys(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); give a text file with one key a line.") from None
    if not (keys := [line for line in lines if line]):
        raise UsageError(f"{path} has no keys; write one a line, or leave --api-keys out.")
    return keys
