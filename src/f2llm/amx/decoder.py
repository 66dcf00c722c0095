"""The decoder on Intel's matrix units: the same vectors as `f2llm.model.decoder`, to a few parts in a million.

float32 in and out; products are taken as `f2llm.amx.products` says. Threads share the work by batches, or by heads
where there are fewer batches than threads.

Shape suffixes: N sequences, E hidden width.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from f2llm.amx.forward import PART, Prefix, Team, Weights, forward
from f2llm.amx.hardware import why_not
from f2llm.amx.products import DEPTH, PANEL, RIGHT_STEP, ROWS
from f2llm.amx.steps import pack_right
from f2llm.model.batches import token_batches
from f2llm.model.decoder import Decoder, DecoderConfig, Layer, rope_tables

TOKENS = 512
"""Of a thread's batch: its numbers stay in a core's second cache, and the weights are read once for all of them."""
FEW = 64
"""Tokens for each thread; with fewer, all work on one batch, since each batch reads all weights."""

Tokens = Sequence[int]


def supports(config: DecoderConfig) -> bool:
    """Whether this machine has the units, and the model's sizes fit their tiles."""
    sizes = config.hidden_size % DEPTH, config.head_dim % DEPTH, config.intermediate_size % PART
    return why_not() is None and not any(sizes)


class AmxDecoder:
    """A decoder's weights in tiles, and the threads that work with them. Safe to use from several threads."""

    def __init__(self, decoder: Decoder, threads: int) -> None:
        """Takes the weights over: those of `decoder` are gone, layer by layer, so that no second copy is needed."""
        self.config = decoder.config
        self._weights = _take(decoder)
        self._angles = self._angles_up_to(0)
        self._none = self._empty_prefix(0)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "f2llm amx")
        self._lock = Lock()  # the members of a team must all be at work at once

    def vectors(self, sequences: Sequence[Tokens], prefix: Prefix | None = None) -> np.ndarray:
        """float32 [N, E] of token sequences, which all stand behind the prefix if there is one."""
        prefix = prefix or self._none
        lengths = [len(sequence) for sequence in sequences]
        vectors_NE = np.empty((len(sequences), self.config.hidden_size), np.float32)

        def work(batch: list[int], members: int) -> None:
            vectors_NE[batch] = self._batch([sequences[i] for i in batch], prefix, members)

        with self._lock:
            self._angles = self._angles_up_to(prefix.length + max(lengths, default=0))
            batches = self._batches(lengths)
            alone = len(batches) // self._threads * self._threads
            list(self._pool.map(lambda batch: work(batch, 1), batches[:alone]))
            for batch in batches[alone:]:
                work(batch, min(self._threads, self.config.num_key_value_heads))
        return vectors_NE

    def prefix(self, ids: Tokens) -> Prefix:
        """What sequences that begin with these tokens need of them."""
        kept = self._empty_prefix(len(ids))
        with self._lock:
            self._angles = self._angles_up_to(len(ids))
            self._batch([ids], kept, 1, keep=True)
        return kept

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """As many for each thread, where there are tokens enough; the longest first, so that threads end together."""
        tokens = sum(lengths)
        if tokens < FEW * self._threads:
            return list(token_batches(lengths, tokens))
        rounds = -(-tokens // (TOKENS * self._threads))
        return list(token_batches(lengths, -(-tokens // (rounds * self._threads))))[::-1]

    def _batch(self, batch: Sequence[Tokens], prefix: Prefix, members: int, keep: bool = False) -> np.ndarray:
        lengths_N = np.array([len(sequence) for sequence in batch])
        ids_T = np.fromiter(chain.from_iterable(batch), np.int64, int(lengths_N.sum()))
        width = self.config.hidden_size
        vectors_NE = np.empty((len(batch), width), np.float32)
        rows = -(-len(ids_T) // ROWS) * ROWS if members > 1 else 1
        team = Team(members, np.empty((2, members, rows, width), np.float32), np.zeros(1, np.int64))

        def work(member: int) -> None:
            forward(self._weights, ids_T, lengths_N, self._angles, prefix, keep, team, member, vectors_NE)

        if members == 1:
            work(0)
        else:
            list(self._pool.map(work, range(members)))
        return vectors_NE

    def _angles_up_to(self, positions: int) -> np.ndarray:
        """float32 [2, positions or more, D / 2]: cosines and sines."""
        known: np.ndarray | None = getattr(self, "_angles", None)
        if known is not None and known.shape[1] >= positions:
            return known
        tables = rope_tables(self.config, torch.arange(2 * positions), torch.float32)
        return np.stack([table[:, 0, : self.config.head_dim // 2].numpy() for table in tables])

    def _empty_prefix(self, length: int) -> Prefix:
        size = -(-length // PANEL) * (self.config.head_dim // DEPTH) * RIGHT_STEP // 4
        shape = (self.config.num_hidden_layers, self.config.num_key_value_heads, size)
        return Prefix(length, np.zeros(shape, np.uint32), np.zeros(shape, np.uint32))


@torch.no_grad()
def _take(decoder: Decoder) -> Weights:
    config = decoder.config
    groups, head = config.num_key_value_heads, config.head_dim
    to_powers_of_two = head**-0.5 * math.log2(math.e)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in Weights._fields}
    layers: list[Layer] = list(decoder.layers)  # type: ignore[arg-type]
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        before, between = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        by_group = [(map_.weight * before).unflatten(0, (groups, -1)) for map_ in projections]
        parts["qkv"].append(_pack_each(torch.cat(by_group, 1)))
        parts["out"].append(_pack_each(attention.o_proj.weight.unflatten(1, (groups, -1)).transpose(0, 1)))
        for name, map_ in (("gate", mlp.gate_proj), ("up", mlp.up_proj)):
            parts[name].append(_pack_each((map_.weight * between).unflatten(0, (-1, PART))))
        parts["down"].append(_pack_each(mlp.down_proj.weight.unflatten(1, (-1, PART)).transpose(0, 1)))
        parts["query_norm_LD"].append((attention.q_norm.weight * to_powers_of_two).numpy())
        parts["key_norm_LD"].append(attention.k_norm.weight.numpy())
        layer.to_empty(device="meta")
    stacked = {name: np.stack(values) for name, values in parts.items() if values}
    table_VE, norm_E = decoder.embed_tokens.weight.numpy(), decoder.norm.weight.numpy()
    return Weights(table_VE=table_VE, norm_E=norm_E, eps=np.float32(config.rms_norm_eps), **stacked)


def _pack_each(weights: Tensor) -> np.ndarray:
    """Right factors, uint32 [..., P, K, 4, 16, 16], of maps [..., F, E]."""
    count, outputs, inputs = weights.shape
    packed = np.empty((count, outputs // PANEL, inputs // DEPTH, 4, 16, 16), np.uint32)
    for weight_FE, right in zip(weights.contiguous().numpy(), packed, strict=True):
        pack_right(weight_FE, right.ravel())
    return packed
