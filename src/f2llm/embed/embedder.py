"""The one way from text to vectors: library, evaluator and search all call `Embedder.encode`.

Texts are cleaned and tokenised, each distinct one is computed once, in batches of similar length under a token
budget; vectors are truncated to a Matryoshka size and then normalised, in this order, in one function.

Shape suffixes: N texts, U distinct token sequences, D dims.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from f2llm.errors import UsageError
from f2llm.model.batches import forward, token_batches
from f2llm.model.folder import load_model, model_size
from f2llm.model.prompts import query_prefix
from f2llm.model.tokenizer import TooLong, encode

TOKENS_PER_BATCH = 8192
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


class Embedder:
    """A model folder, ready to turn texts into vectors."""

    def __init__(self, path: str | Path) -> None:
        self._model = load_model(Path(path))
        self.facts = self._model.facts
        self.sizes = self.facts.matryoshka_sizes
        self.dim = self.facts.dim or self._model.decoder.config.hidden_size
        self.identity = self.facts.identity
        self.parameters = model_size(self._model.decoder)

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
            too_long: "error", or "truncate" (EOS stays) for texts longer than the model was trained on.

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
        width = self._check_dim(dim)
        ids = self._tokenize(texts, self.prefix(prompt, instruction), too_long)
        return truncate(self._forward(ids), width, normalize)

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
        width, prefix = self._check_dim(dim), self.prefix(prompt, instruction)
        remaining, done = iter(texts), 0
        while chunk := list(islice(remaining, STREAM_CHUNK)):
            ids = self._tokenize(chunk, prefix, too_long, first=done)
            yield from truncate(self._forward(ids), width, normalize)
            done += len(chunk)

    def tokens(self, texts: Sequence[str], prompt: str | None = None) -> int:
        """Number of tokens that `encode` computes for these texts: distinct ones once, prompt and EOS included."""
        return sum(map(len, set(map(tuple, self._tokenize(texts, self.prefix(prompt, None), "truncate")))))

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

    def _check_dim(self, dim: int | None) -> int:
        if dim is None:
            return self.dim
        if not 1 <= dim <= self.dim:
            raise UsageError(f"dim is {dim}; this model gives 1 to {self.dim} (trained sizes: {self.sizes}).")
        return dim

    def _tokenize(
        self, texts: Sequence[str], prefix: str, too_long: TooLong, first: int = 0
    ) -> list[list[int]]:
        return encode(
            self._model.tokenizer,
            texts,
            prefix=prefix,
            eos_id=self.facts.eos_id,
            max_length=self.facts.max_length,
            too_long=too_long,
            first=first,
        )

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> np.ndarray:
        """Raw vectors [N, D] of token sequences: distinct ones once, sorted by length, by token budget."""
        number: dict[tuple[int, ...], int] = {}
        row_N = [number.setdefault(tuple(sequence), len(number)) for sequence in ids]
        distinct = list(number)
        vectors_UD = np.empty((len(distinct), self._model.decoder.config.hidden_size), dtype=np.float32)
        for batch in token_batches([len(sequence) for sequence in distinct], TOKENS_PER_BATCH):
            vectors_UD[batch] = forward(self._model.decoder, [distinct[i] for i in batch]).numpy()
        return vectors_UD[row_N]
