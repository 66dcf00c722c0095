"""The one way from text to vectors: library, server, evaluator, miner and search all call `Embedder`.

Texts are cleaned and tokenised (`token_ids`, `fit`), each distinct one is computed once, in batches of similar length
under a token budget (`raw`); vectors are truncated to a Matryoshka size and then normalised, in this order, in one
function (`truncate`). `encode` is all of it; a server does the steps one by one.

Shape suffixes: N texts, U distinct token sequences, D dims.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from f2llm.embed.compute import Precision, compute_for, make_ready
from f2llm.embed.prefixes import Prefixes, in_common
from f2llm.errors import UsageError
from f2llm.model.base import load_base
from f2llm.model.folder import model_size
from f2llm.model.prompts import query_prefix
from f2llm.model.tokenizer import TooLong, fit, token_ids

STREAM_CHUNK = 4096  # texts of an endless stream that are in memory at once


def truncate(vectors_ND: np.ndarray, dim: int, normalize: bool = True) -> np.ndarray:
    """The first `dim` dimensions, then (if `normalize`) divided to unit length: the only place that does either.

    A zero vector stays zero.
    """
    cut = np.ascontiguousarray(vectors_ND[..., :dim], dtype=np.float32)
    if not normalize:
        return cut
    length = np.linalg.norm(cut, axis=-1, keepdims=True)
    return cut / np.maximum(length, np.finfo(np.float32).tiny)


def identity_in(precision: Precision, identity: str) -> str:
    """That of a model whose vectors are computed in a precision: the model's own for float32."""
    if precision == "float32":
        return identity
    return hashlib.sha256(f"{identity}\0{precision}".encode()).hexdigest()


class Embedder:
    """A model, ready to turn texts into vectors."""

    def __init__(self, source: str | Path, precision: Precision = "float32") -> None:
        """Any Qwen3 embedding model: a folder, or a model of the hub as `owner/name` or `owner/name@revision`.

        Args:
            precision: of linear maps. int8 is smaller and faster, gives other vectors, and has an identity of its own,
                so that they are never compared with those of float32.

        Raises F2Error for a model whose vectors this decoder would compute otherwise (see `f2llm.model.base`).
        """
        with ThreadPoolExecutor(1) as pool:
            ready = pool.submit(make_ready)
            model = load_base(source)
            ready.result()
        self.facts = model.facts
        self.tokenizer = model.tokenizer
        self.sizes = self.facts.matryoshka_sizes
        self._width = model.decoder.config.hidden_size
        self.dim = self.facts.dim or self._width
        self.max_length = self.facts.max_length
        self.precision = precision
        self.identity = identity_in(precision, self.facts.identity)
        self.parameters = model_size(model.decoder)
        self._compute = compute_for(model.decoder, precision)
        self.lanes = self._compute.lanes
        self._prefixes = Prefixes(self._compute.prefix)

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt: str | None = None,
        instruction: str | None = None,
        dim: int | None = None,
        normalize: bool = True,
        too_long: TooLong = "error",
    ) -> np.ndarray:
        """Vectors of texts.

        Args:
            texts: strings, cleaned by `f2llm.text.clean`; an empty one is legal and gives the vector of EOS alone.
            prompt: "query" puts the instruction in front of each text; "document" or None leaves it bare.
            instruction: the query's instruction instead of the model's default; implies prompt="query".
            dim: any size from 1 to the model's width (the trained Matryoshka sizes are in `sizes`).
            normalize: unit length at every dim.
            too_long: "error", or "truncate" (EOS stays, and a warning counts them) for texts longer than the model
                was trained on.

        Returns:
            float32 [N, D], or [D] for a single string.
        """
        if isinstance(texts, str):
            return self.encode(
                [texts],
                prompt=prompt,
                instruction=instruction,
                dim=dim,
                normalize=normalize,
                too_long=too_long,
            )[0]
        vectors_ND, cut = self.encode_part(
            texts, prompt=prompt, instruction=instruction, dim=dim, normalize=normalize, too_long=too_long
        )
        _warn_of_cut(cut, self.max_length)
        return vectors_ND

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        prompt: str | None = None,
        instruction: str | None = None,
        dim: int | None = None,
        normalize: bool = True,
        too_long: TooLong = "error",
    ) -> Iterator[np.ndarray]:
        """`encode` for endless input: one float32 [D] vector per text, in order, in constant memory."""
        self.check_dim(dim)  # before any text is taken
        asked: Any = {"prompt": prompt, "instruction": instruction, "dim": dim, "normalize": normalize}
        remaining, done, cut = iter(texts), 0, 0
        while chunk := list(islice(remaining, STREAM_CHUNK)):
            vectors_ND, more = self.encode_part(chunk, **asked, too_long=too_long, first=done)
            yield from vectors_ND
            done, cut = done + len(chunk), cut + more
        _warn_of_cut(cut, self.max_length)

    def encode_part(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        instruction: str | None = None,
        dim: int | None = None,
        normalize: bool = True,
        too_long: TooLong = "error",
        first: int = 0,
    ) -> tuple[np.ndarray, int]:
        """`encode` of some texts among many: also how many were cut, and errors number texts from `first` on."""
        width = self.check_dim(dim)
        ids = self.token_ids(texts, prompt=prompt, instruction=instruction, first=first)
        ids, cut = self.fit(ids, too_long, first=first)
        return truncate(self.raw(ids), width, normalize), cut

    def tokens(self, texts: Sequence[str], prompt: str | None = None) -> int:
        """Number of tokens of these texts, distinct ones once, cut where too long, prompt and EOS included."""
        ids, _ = self.fit(self.token_ids(texts, prompt=prompt), "truncate")
        return sum(map(len, set(map(tuple, ids))))

    def prefix(self, prompt: str | None, instruction: str | None) -> str:
        """What `encode` puts in front of each text."""
        if prompt not in (None, "query", "document"):
            raise UsageError(f"prompt is {prompt!r}; expected 'query', 'document' or None.")
        if prompt == "document" and instruction is not None:
            raise UsageError(
                "an instruction was given for documents; only queries carry one, so leave it out."
            )
        if prompt is None and instruction is None:
            return ""
        chosen = self.facts.instruction if instruction is None else instruction
        return query_prefix(chosen, self.facts.template) if prompt != "document" and chosen else ""

    def check_dim(self, dim: int | None) -> int:
        """The number of dimensions that is meant; UsageError if the model has not so many."""
        if dim is None:
            return self.dim
        if not 1 <= dim <= self.dim:
            raise UsageError(f"dim is {dim}; this model gives 1 to {self.dim} (trained sizes: {self.sizes}).")
        return dim

    def token_ids(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        instruction: str | None = None,
        first: int = 0,
    ) -> list[list[int]]:
        """Token ids of each text with its prompt, EOS included, however many; `first` numbers texts in errors."""
        prefix = self.prefix(prompt, instruction)
        ids = token_ids(self.tokenizer, texts, prefix, self.facts.eos_id, first)
        if prefix and ids:
            self._prefixes.offer(self._tokens_of_prompt(prefix, ids[0]))
        return ids

    def fit(self, ids: Sequence[list[int]], too_long: TooLong, first: int = 0) -> tuple[list[list[int]], int]:
        """Token sequences that the model takes, and how many were cut (EOS stays); UsageError unless "truncate"."""
        return fit(ids, self.max_length, too_long, first)

    def raw(self, ids: Sequence[Sequence[int]], alone: bool = True) -> np.ndarray:
        """Vectors as the decoder gives them, float32 [N, width], of token sequences that `fit` gave.

        Distinct ones are computed once, sorted by length, by token budget, and a prefix that many share once for all.
        Where up to `lanes` threads call it at once, `alone` is false: each computes by itself.
        """
        number: dict[tuple[int, ...], int] = {}
        row_N = [number.setdefault(tuple(sequence), len(number)) for sequence in ids]
        distinct = list(number)
        vectors_UD = np.empty((len(distinct), self._width), dtype=np.float32)
        for tokens, members in self._prefixes.groups(distinct):
            prefix = self._prefixes.state(tokens) if tokens else None
            behind = [distinct[i][len(tokens) :] for i in members]
            vectors_UD[members] = self._compute.vectors(behind, prefix, alone)
        return vectors_UD[row_N]

    def _tokens_of_prompt(self, prefix: str, ids: list[int]) -> tuple[int, ...]:
        """Those that a prompt has in front of every text: not its last ones, which may change with what follows."""
        (alone,) = token_ids(self.tokenizer, [prefix], "", self.facts.eos_id)
        return tuple(ids[: in_common(alone, ids)])


def _warn_of_cut(cut: int, max_length: int) -> None:
    if cut:
        warnings.warn(f"{cut} of the texts cut to {max_length} tokens", stacklevel=3)
