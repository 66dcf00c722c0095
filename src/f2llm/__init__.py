"""f2llm: the open factory for multilingual text-embedding models."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from f2llm.embed.embedder import Embedder

__all__ = ["Embedder", "__version__"]


def __getattr__(name: str) -> Any:
    # The embedder brings torch, which takes seconds to import; `f2llm --help` should not wait for it.
    if name == "Embedder":
        from f2llm.embed.embedder import Embedder

        return Embedder
    raise AttributeError(f"module 'f2llm' has no attribute {name!r}")
