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

from f2llm.amx import products_of_bytes
from f2llm.amx.forward import PART, Prefix, Team, Weights, forward
from f2llm.amx.hardware import why_not
from f2llm.amx.maps import Map
from f2llm.amx.products import DEPTH, PANEL, RIGHT_STEP, ROWS
from f2llm.amx.products_of_bytes import pack_bytes
from f2llm.amx.steps import pack_right
from f2llm.errors import F2Error
from f2llm.model.batches import token_batches
from f2llm.model.decoder import Decoder, DecoderConfig, Layer, rope_tables

TOKENS = 512
"""Of a thread's batch: its numbers stay in a core's second cache, and the weights are read once for all of them."""
FEW = 64
"""Tokens for each thread; with fewer, all work on one batch, since each batch reads all weights."""

Tokens = Sequence[int]


def why_not_fitting(config: DecoderConfig, in_bytes: bool = False) -> str | None:
    """Which of the model's sizes fits no tile, in a few words; None where all do."""
    depth = products_of_bytes.DEPTH if in_bytes else DEPTH
    of_group = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    for what, size, unit in (
        ("hidden width", config.hidden_size, depth),
        ("head width", config.head_dim, DEPTH),
        ("width of the heads that share a key", of_group, depth),
        ("MLP width", config.intermediate_size, PART),
    ):
        if size % unit:
            return f"its {what} is {size}, no multiple of {unit}"
    return None


def load_kernels() -> None:
    """Have the compiler ready, and the kernel that packs weights."""
    pack_right(np.zeros((PANEL, DEPTH), np.float32), np.empty(PANEL * DEPTH, np.uint32))


class AmxDecoder:
    """A decoder's weights in tiles, and the threads that work with them. Safe to use from several threads."""

    def __init__(self, decoder: Decoder, threads: int, in_bytes: bool = False) -> None:
        """Takes the weights over: those of `decoder` are gone, layer by layer, so that no second copy is needed.

        Args:
            in_bytes: linear maps in int8, with a scale for each output and for each row that goes through.

        Raises F2Error where the units or the model's sizes do not allow it.
        """
        # Without leave, the first tile would end the process.
        if reason := why_not() or why_not_fitting(decoder.config, in_bytes):
            raise F2Error(f"matrix units cannot be used here: {reason}; use torch's decoder.")
        self.config = decoder.config
        self._weights = _take(decoder, in_bytes)
        self._angles = np.zeros((2, 0, self.config.head_dim // 2), np.float32)
        self._none = self._empty_prefix(0)
        self.lanes = threads
        self._pool = ThreadPoolExecutor(threads, "f2llm amx")
        self._lock = Lock()  # the members of a team must all be at work at once

    def vectors(
        self, sequences: Sequence[Tokens], prefix: Prefix | None = None, alone: bool = True
    ) -> np.ndarray:
        """float32 [N, E] of token sequences, which all stand behind the prefix if there is one.

        All threads work for a caller who is alone; one who is not has no other than its own.
        """
        prefix = prefix or self._none
        lengths = [len(sequence) for sequence in sequences]
        vectors_NE = np.empty((len(sequences), self.config.hidden_size), np.float32)

        def work(batch: list[int], members: int = 1) -> None:
            vectors_NE[batch] = self._batch([sequences[i] for i in batch], prefix, members)

        if not alone:
            for batch in token_batches(lengths, TOKENS):
                work(batch)
            return vectors_NE
        with self._lock:
            batches = self._batches(lengths)
            for_one = len(batches) // self.lanes * self.lanes
            list(self._pool.map(work, batches[:for_one]))
            for batch in batches[for_one:]:
                work(batch, min(self.lanes, self.config.num_key_value_heads))
        return vectors_NE

    def prefix(self, ids: Tokens) -> Prefix:
        """What sequences that begin with these tokens need of them."""
        kept = self._empty_prefix(len(ids))
        self._batch([ids], kept, 1, keep=True)
        return kept

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """As many for each thread, where there are tokens enough; the longest first, so that threads end together."""
        tokens = sum(lengths)
        if tokens < FEW * self.lanes:
            return list(token_batches(lengths, tokens))
        rounds = -(-tokens // (TOKENS * self.lanes))
        return list(token_batches(lengths, -(-tokens // (rounds * self.lanes))))[::-1]

    def _batch(self, batch: Sequence[Tokens], prefix: Prefix, members: int, keep: bool = False) -> np.ndarray:
        lengths_N = np.array([len(sequence) for sequence in batch])
        ids_T = np.fromiter(chain.from_iterable(batch), np.int64, int(lengths_N.sum()))
        width = self.config.hidden_size
        vectors_NE = np.empty((len(batch), width), np.float32)
        angles = self._angles_up_to((0 if keep else prefix.length) + int(lengths_N.max()))
        rows = -(-len(ids_T) // ROWS) * ROWS if members > 1 else 1
        team = Team(members, np.empty((2, members, rows, width), np.float32), np.zeros(1, np.int64))

        def work(member: int) -> None:
            forward(self._weights, ids_T, lengths_N, angles, prefix, keep, team, member, vectors_NE)

        if members == 1:
            work(0)
        else:
            list(self._pool.map(work, range(members)))
        return vectors_NE

    def _angles_up_to(self, positions: int) -> np.ndarray:
        """float32 [2, positions or more, D / 2]: cosines and sines."""
        angles = self._angles
        if angles.shape[1] < positions:
            tables = rope_tables(self.config, torch.arange(2 * positions), torch.float32)
            angles = np.stack([table[:, 0, : self.config.head_dim // 2].numpy() for table in tables])
            self._angles = angles  # another thread may put shorter ones there: then they are made again
        return angles

    def _empty_prefix(self, length: int) -> Prefix:
        size = -(-length // PANEL) * (self.config.head_dim // DEPTH) * RIGHT_STEP // 4
        shape = (self.config.num_hidden_layers, self.config.num_key_value_heads, size)
        return Prefix(length, np.zeros(shape, np.uint32), np.zeros(shape, np.uint32))


@torch.no_grad()
def _take(decoder: Decoder, in_bytes: bool) -> Weights:
    config = decoder.config
    width, head, groups = config.hidden_size, config.head_dim, config.num_key_value_heads
    repeats, parts = config.num_attention_heads // groups, config.intermediate_size // PART
    layers: list[Layer] = list(decoder.layers)  # type: ignore[arg-type]

    def room(count: int, outputs: int, inputs: int) -> Map:
        size = outputs * inputs * (1 if in_bytes else 4)
        # numpy asks for huge pages, which a virtual machine may take ten times as long to give.
        right = torch.empty((len(layers), count, size), dtype=torch.uint8).numpy()
        return Map(right, np.empty((len(layers), count, outputs) if in_bytes else (0, 0, 0), np.float32))

    weights = Weights(
        in_bytes=in_bytes,
        repeats=repeats,
        table_VE=decoder.embed_tokens.weight.numpy(),
        qkv=room(groups, (repeats + 2) * head, width),
        out=room(groups, width, repeats * head),
        gate=room(parts, PART, width),
        up=room(parts, PART, width),
        down=room(parts, width, PART),
        query_norm_LD=np.empty((len(layers), head), np.float32),
        key_norm_LD=np.empty((len(layers), head), np.float32),
        norm_E=decoder.norm.weight.numpy(),
        eps=np.float32(config.rms_norm_eps),
    )
    for number, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        before, between = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        by_group = [(map_.weight * before).unflatten(0, (groups, -1)) for map_ in projections]
        _pack(torch.cat(by_group, 1), weights.qkv, number)
        _pack(attention.o_proj.weight.unflatten(1, (groups, -1)).transpose(0, 1), weights.out, number)
        _pack((mlp.gate_proj.weight * between).unflatten(0, (parts, PART)), weights.gate, number)
        _pack((mlp.up_proj.weight * between).unflatten(0, (parts, PART)), weights.up, number)
        _pack(mlp.down_proj.weight.unflatten(1, (parts, PART)).transpose(0, 1), weights.down, number)
        # Scores are powers of two, so that no exponential is needed.
        weights.query_norm_LD[number] = attention.q_norm.weight * (head**-0.5 * math.log2(math.e))
        weights.key_norm_LD[number] = attention.k_norm.weight
        layer.to_empty(device="meta")
    return weights


def _pack(weights: Tensor, map_: Map, layer: int) -> None:
    """The parts of a map, [parts, F, E], into its right factors."""
    for part, weight_FE in enumerate(weights.contiguous().numpy()):
        if map_.scale.size:
            pack_bytes(weight_FE, map_.right[layer, part].view(np.int8), map_.scale[layer, part])
        else:
            pack_right(weight_FE, map_.right[layer, part].view(np.uint32))
