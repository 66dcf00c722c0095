"""How an embedder computes a decoder: on the processor's matrix units, or by torch. The choice is made in one place.

Shape suffixes: N sequences, B sequences of a batch, E hidden width.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch

from f2llm.amx.hardware import why_not
from f2llm.errors import F2Error
from f2llm.model.batches import forward, token_batches
from f2llm.model.decoder import Decoder, Prefix

TOKENS_PER_BATCH = 8192  # of torch

Tokens = Sequence[int]
Precision = Literal["float32", "int8"]


class Compute(Protocol):
    """A decoder and how it is computed; a prefix is of the same object that uses it."""

    lanes: int
    """How many threads may ask for a batch at once before they take cores from each other."""

    def vectors(self, sequences: Sequence[Tokens], prefix: Any = None, alone: bool = True) -> np.ndarray:
        """float32 [N, E] of token sequences, which all stand behind the prefix if there is one.

        `alone` is false where as many threads ask at once as there are lanes: then no other ones are used.
        """

    def prefix(self, ids: Tokens) -> Any:
        """What sequences that begin with these tokens need of them."""


def make_ready() -> None:
    """Load what `compute_for` will need, which takes a moment: while files are read, say."""
    if why_not() is None:
        from f2llm.amx.decoder import load_kernels

        load_kernels()


def compute_for(decoder: Decoder, precision: Precision = "float32") -> Compute:
    """The fastest way that this machine has; it takes the decoder over.

    Raises F2Error for int8 where there are no matrix units, or the model's sizes do not fit them.
    """
    reason = why_not()
    if reason is None:
        from f2llm.amx.decoder import AmxDecoder, why_not_fitting

        reason = why_not_fitting(decoder.config, precision == "int8")
        if reason is None:
            return AmxDecoder(decoder, torch.get_num_threads(), precision == "int8")
    if precision == "int8":
        raise F2Error(
            f"int8 needs the processor's matrix units, which this model cannot use here ({reason}); leave it in "
            "float32, or export it: f2llm export MODEL OUT --to onnx --quantize int8."
        )
    return TorchDecoder(decoder)


class TorchDecoder:
    """The decoder as it is trained."""

    lanes = 1

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    @torch.inference_mode()
    def vectors(
        self, sequences: Sequence[Tokens], prefix: Prefix | None = None, alone: bool = True
    ) -> np.ndarray:
        vectors_NE = np.empty((len(sequences), self._decoder.config.hidden_size), dtype=np.float32)
        for batch in token_batches([len(sequence) for sequence in sequences], TOKENS_PER_BATCH):
            vectors_BE = forward(self._decoder, [sequences[i] for i in batch], prefix=prefix)
            vectors_NE[batch] = vectors_BE.numpy()
        return vectors_NE

    @torch.inference_mode()
    def prefix(self, ids: Tokens) -> Prefix:
        return self._decoder.prefix(torch.tensor(ids))
