"""Arrays of token ids instead of texts: refused, unless the server was started to take them.

Clients send ids of OpenAI's vocabulary to servers that they do not know. Read as ids of another vocabulary they give
wrong vectors without any sign of it, so which they are has to be said when the server is started.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from f2llm.embed.embedder import Embedder
from f2llm.errors import F2Error
from f2llm.serve.errors import ApiError

Item = str | list[int]
TokenArrays = Literal["reject", "native", "cl100k"]
TokenIds = Callable[[Embedder, Sequence[Item], str, str | None, str | None], list[list[int]]]
"""From texts and token arrays, the name of their field, prompt and instruction to ids of the model's vocabulary."""


def token_policy(name: TokenArrays) -> TokenIds | None:
    """What the server does with token arrays: None refuses them; F2Error where cl100k's file cannot be had."""
    return {"reject": lambda: None, "native": lambda: _native, "cl100k": _cl100k}[name]()


def _native(
    embedder: Embedder, items: Sequence[Item], field: str, prompt: str | None, instruction: str | None
) -> list[list[int]]:
    """Ids of the model's own vocabulary as they are, EOS behind those that have none."""
    if embedder.prefix(prompt, instruction):
        raise ApiError(
            "invalid", "a prompt cannot be put in front of token ids; send texts for queries.", field=field
        )
    size = embedder.tokenizer.get_vocab_size()
    eos_id = embedder.facts.eos_id
    found = []
    for number, item in enumerate(items):
        if isinstance(item, str):
            found += embedder.token_ids([item])
            continue
        outside = next((token for token in item if not 0 <= token < size), None)
        if outside is not None:
            raise ApiError(
                "invalid",
                f"`{field}`: token array {number} has an id outside this model's vocabulary of {size}; "
                "send texts, or ids of this model's own tokenizer.",
                field=field,
            )
        found.append(item if item[-1] == eos_id else [*item, eos_id])
    return found


def _cl100k() -> TokenIds:
    """Ids of OpenAI's cl100k_base, which clients take for unknown models: back to texts, then to our ids."""
    try:
        import tiktoken

        encoding = tiktoken.get_encoding("cl100k_base")
    except Exception as error:  # whatever client tiktoken downloads with raises errors of its own
        raise F2Error(
            f"--token-arrays cl100k needs tiktoken and its file of cl100k_base, which cannot be had "
            f"({type(error).__name__}); pip install tiktoken, and where there is no network put the file into the "
            "folder that TIKTOKEN_CACHE_DIR names."
        ) from None

    def texts(
        embedder: Embedder, items: Sequence[Item], field: str, prompt: str | None, instruction: str | None
    ) -> list[list[int]]:
        found = []
        for number, item in enumerate(items):
            try:
                found.append(item if isinstance(item, str) else encoding.decode(item))
            except Exception:  # of Rust, for an id that is none
                raise ApiError(
                    "invalid",
                    f"`{field}`: token array {number} has an id that is not of cl100k_base; send texts.",
                    field=field,
                ) from None
        return embedder.token_ids(found, prompt=prompt, instruction=instruction)

    return texts
