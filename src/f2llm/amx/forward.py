"""A decoder's forward pass as one compiled function: no interpreter and no barrier between its steps.

A batch is worked on by one thread, and other threads work on other batches. Of each layer only what one key/value head
or one part of the MLP needs is in memory at a time, which for a few hundred tokens stays in a core's second cache.
Where there are fewer batches than threads, several members of a team share one: each takes some of the heads and some
parts of the MLP, and twice in a layer they add up what they have found.

Shape suffixes: T tokens, N sequences, E hidden width, G key/value heads, D head width, V vocabulary, L layers, I parts
of the MLP, W numbers of a part; Q queries and S keys of one product in attention.
"""

from typing import NamedTuple

import numpy as np

from f2llm.amx.attention import Scratch, attend, scratch
from f2llm.amx.compiling import kept_on_disk, kernel
from f2llm.amx.instructions import CONFIGURATION, arrive, configure, glance, pause, release
from f2llm.amx.maps import Left, Map, apply, empty_left, norm_rows, put_rows, swiglu_rows
from f2llm.amx.products import DEPTH, LEFT_STEP, PANEL, RIGHT_STEP, ROWS
from f2llm.amx.steps import inverse_rms, put_column, put_row, put_values, turn_head

PART = 128  # numbers of the MLP's inner width that are worked on at once


class Weights(NamedTuple):
    """A decoder's weights; maps have the norms before them inside."""

    in_bytes: bool  # whether maps are in int8
    repeats: int  # query heads of a key/value head
    table_VE: np.ndarray
    qkv: Map  # a part for each of G: query heads of a key/value head, its key, its value
    out: Map  # G parts
    gate: Map  # I parts
    up: Map  # I parts
    down: Map  # I parts
    query_norm_LD: np.ndarray  # times log2(e) / sqrt(D)
    key_norm_LD: np.ndarray
    norm_E: np.ndarray
    eps: np.float32


class Prefix(NamedTuple):
    """Keys and values of the tokens that all sequences of a batch stand behind."""

    length: int
    keys: np.ndarray  # uint32 [L, G, size of a right factor]
    values: np.ndarray


class Team(NamedTuple):
    """Who works on a batch."""

    members: int
    found: np.ndarray  # float32 [2, members, T, E]: what each member adds to the tokens, at every other step
    arrived: np.ndarray  # int64 [1]: members who have come to the end of a step, all steps together


class Batch(NamedTuple):
    """Sequences and where they stand."""

    lengths_N: np.ndarray
    before: int  # tokens of the prefix
    angles: np.ndarray  # float32 [2, positions, D / 2]: cosines and sines


class _Room(NamedTuple):
    """Memory of one batch."""

    left: Left
    last_left: Left
    queries_TD: np.ndarray
    keys_values_TD: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    mixed_TD: np.ndarray
    mixed: Left
    gate_TW: np.ndarray
    up_TW: np.ndarray
    inner: Left
    turned_D: np.ndarray
    halves_2D: np.ndarray
    zeros_D: np.ndarray
    ints: np.ndarray
    of_attention: Scratch


@kernel
def _room(batch: Batch, weights: Weights) -> _Room:
    tokens, longest, tiles, panels = 0, 0, 0, 0
    for length in batch.lengths_N:
        tokens += length
        longest = max(longest, length)
        tiles += -(-length // ROWS)
        panels += -(-length // PANEL)
    width, head = weights.table_VE.shape[1], weights.key_norm_LD.shape[1]
    rows, of_head = -(-tokens // ROWS) * ROWS, head // DEPTH
    of_queries = weights.repeats * head
    most_panels = -(-longest // PANEL) + -(-batch.before // PANEL)
    most_outputs = max(max(width, of_queries), max(2 * head, PART)) if weights.in_bytes else 0
    return _Room(
        empty_left(tokens, width),
        empty_left(len(batch.lengths_N), width),
        np.empty((rows, of_queries), np.float32),
        np.empty((rows, 2 * head), np.float32),
        np.zeros(tiles * of_head * LEFT_STEP, np.uint8),
        np.zeros(panels * of_head * RIGHT_STEP // 4, np.uint32),
        np.zeros(panels * of_head * RIGHT_STEP // 4, np.uint32),
        np.zeros((rows + ROWS, of_queries), np.float32),
        empty_left(tokens, of_queries),
        np.empty((rows, PART), np.float32),
        np.empty((rows, PART), np.float32),
        empty_left(tokens, PART),
        np.empty(head, np.float32),
        np.empty((2, head // 2), np.uint32),
        np.zeros(head, np.float32),
        np.empty((rows, most_outputs), np.int32),
        scratch(most_panels),
    )


@kernel
def _put_queries(
    batch: Batch, room: _Room, first: int, last_only: bool, weight_D: np.ndarray, eps: np.float32
) -> None:
    """One head's queries, the numbers from `first` on, into a left factor with tiles of its own for each sequence."""
    width = len(weight_D)
    row, tile = 0, 0
    for length in batch.lengths_N:
        asked = 1 if last_only else length
        for i in range(asked):
            position = batch.before + length - asked + i
            turn_head(room.queries_TD, row + i, first, weight_D, eps, batch.angles, position, room.turned_D)
            to = room.queries.ctypes.data
            put_row(room.turned_D.ctypes.data, width, np.float32(1), to, tile * ROWS + i)
        row, tile = row + asked, tile + -(-asked // ROWS)


@kernel
def _put_keys_and_values(
    batch: Batch,
    room: _Room,
    keys: np.ndarray,
    values: np.ndarray,
    weight_D: np.ndarray,
    eps: np.float32,
) -> None:
    """A key/value head's keys and values into right factors with panels of their own for each sequence."""
    width = len(weight_D)
    row, panel = 0, 0
    for length in batch.lengths_N:
        start, panels = panel * (width // DEPTH) * RIGHT_STEP // 4, -(-length // PANEL)
        for i in range(length):
            turn_head(
                room.keys_values_TD, row + i, 0, weight_D, eps, batch.angles, batch.before + i, room.turned_D
            )
            put_column(room.turned_D.ctypes.data, room.halves_2D, keys, start, i)
        for i in range(0, panels * PANEL, 2):
            # What is behind the last token has no share, but must be a number.
            x, y = room.zeros_D.ctypes.data, room.zeros_D.ctypes.data
            if i < length:
                x = room.keys_values_TD.ctypes.data + ((row + i) * 2 + 1) * width * 4
            if i + 1 < length:
                y = room.keys_values_TD.ctypes.data + ((row + i) * 2 + 3) * width * 4
            put_values(x, y, width, values.ctypes.data + start * 4, panels * RIGHT_STEP, i // 2)
        row, panel = row + length, panel + panels


@kernel
def _attention(
    weights: Weights, layer: int, group: int, batch: Batch, room: _Room, prefix: Prefix, keep: bool, last_only: bool,
    asking: Left, asking_tokens: int, tokens: int, to: int,
) -> None:  # fmt: skip
    """Add what the heads of one key/value head give to the tokens at `to`; `asking` are the rows that have queries."""
    width, head = weights.table_VE.shape[1], weights.key_norm_LD.shape[1]
    of_queries, of_head, panel = weights.repeats * head, head // DEPTH, head // DEPTH * RIGHT_STEP
    apply(
        weights.qkv, layer, group, 0, of_queries // PANEL, asking, asking_tokens, room.queries_TD.ctypes.data,
        of_queries * 4, False, room.ints,
    )  # fmt: skip
    apply(
        weights.qkv, layer, group, of_queries // PANEL, 2 * head // PANEL, room.left, tokens,
        room.keys_values_TD.ctypes.data, 2 * head * 4, False, room.ints,
    )  # fmt: skip
    keys, values = room.keys, room.values
    if keep:
        keys, values = prefix.keys[layer, group], prefix.values[layer, group]
    _put_keys_and_values(batch, room, keys, values, weights.key_norm_LD[layer], weights.eps)
    for number in range(weights.repeats):
        _put_queries(batch, room, number * head, last_only, weights.query_norm_LD[layer], weights.eps)
        tile, key_panel, row = 0, 0, 0
        for length in batch.lengths_N:
            asked = 1 if last_only else length
            attend(
                room.queries.ctypes.data + tile * of_head * LEFT_STEP, asked, length - asked, head,
                keys.ctypes.data + key_panel * panel, values.ctypes.data + key_panel * panel, -(-length // PANEL),
                batch.before, prefix.keys[layer, group].ctypes.data, prefix.values[layer, group].ctypes.data,
                room.mixed_TD.ctypes.data + (row * of_queries + number * head) * 4, of_queries * 4,
                room.of_attention,
            )  # fmt: skip
            tile, key_panel, row = tile + -(-asked // ROWS), key_panel + -(-length // PANEL), row + asked
    put_rows(room.mixed_TD, asking_tokens, room.mixed, weights.in_bytes)
    apply(
        weights.out,
        layer,
        group,
        0,
        width // PANEL,
        room.mixed,
        asking_tokens,
        to,
        width * 4,
        True,
        room.ints,
    )


@kernel
def _mlp(weights: Weights, layer: int, part: int, room: _Room, tokens: int, to: int) -> None:
    """Add what one part of the MLP gives to the tokens at `to`."""
    width, panels = weights.table_VE.shape[1], PART // PANEL
    gate, up = room.gate_TW.ctypes.data, room.up_TW.ctypes.data
    apply(weights.gate, layer, part, 0, panels, room.left, tokens, gate, PART * 4, False, room.ints)
    apply(weights.up, layer, part, 0, panels, room.left, tokens, up, PART * 4, False, room.ints)
    swiglu_rows(room.gate_TW, room.up_TW, tokens, room.inner, weights.in_bytes)
    apply(weights.down, layer, part, 0, width // PANEL, room.inner, tokens, to, width * 4, True, room.ints)


@kernel
def _begin(x_TE: np.ndarray, team: Team, member: int, step: int) -> int:
    """Where this member adds what it finds: to the tokens themselves, or to what a team adds up later."""
    if team.members == 1:
        return x_TE.ctypes.data
    found_TE = team.found[step % 2, member]
    found_TE[:] = 0
    return found_TE.ctypes.data


@kernel
def _end(x_TE: np.ndarray, team: Team, step: int) -> None:
    """Wait for all members, and add what they have found to this member's copy of the tokens."""
    if team.members == 1:
        return
    address = team.arrived.ctypes.data
    arrive(address)
    while glance(address) < (step + 1) * team.members:
        pause()
    for member in range(team.members):
        found_TE = team.found[step % 2, member]
        for row in range(found_TE.shape[0]):
            for i in range(found_TE.shape[1]):
                x_TE[row, i] += found_TE[row, i]


@kernel
def _gather_last(x_TE: np.ndarray, lengths_N: np.ndarray) -> None:
    """Move the last token of each sequence to the first rows; none of them overwrites one that is still to come."""
    token = 0
    for number, length in enumerate(lengths_N):
        token += length
        x_TE[number] = x_TE[token - 1]


@kept_on_disk
def forward(
    weights: Weights,
    ids_T: np.ndarray,
    lengths_N: np.ndarray,
    angles: np.ndarray,
    prefix: Prefix,
    keep: bool,
    team: Team,
    member: int,
    vectors_NE: np.ndarray,
) -> None:
    """Write the vectors of sequences to `vectors_NE`, float32; all members of a team call it, the first one writes.

    Args:
        ids_T: int64, the tokens of one sequence after another; lengths_N: their numbers.
        angles: float32 [2, positions, D / 2], for all positions, those of the prefix included.
        prefix: length 0 for none.
        keep: write the keys and values of a single sequence to the prefix's arrays, and no vector.
    """
    configure(CONFIGURATION.ctypes.data)
    batch = Batch(lengths_N, 0 if keep else prefix.length, angles)
    tokens, width = len(ids_T), weights.table_VE.shape[1]
    room, step = _room(batch, weights), 0
    x_TE = np.zeros((-(-tokens // ROWS) * ROWS, width), np.float32)
    for row in range(tokens):
        x_TE[row] = weights.table_VE[ids_T[row]]

    layers, groups = weights.key_norm_LD.shape[0], weights.qkv.right.shape[1]
    parts = weights.down.right.shape[1]
    for layer in range(layers):
        # In the last layer most tokens are needed for their keys and values alone.
        last_only = layer == layers - 1 and not keep
        norm_rows(x_TE, tokens, weights.eps, room.left, weights.in_bytes)
        asking, asking_tokens = room.left, tokens
        if last_only:
            _gather_last(x_TE, lengths_N)
            asking, asking_tokens = room.last_left, len(lengths_N)
            norm_rows(x_TE, asking_tokens, weights.eps, asking, weights.in_bytes)
        to = _begin(x_TE, team, member, step)
        for group in range(member, groups, team.members):
            _attention(
                weights, layer, group, batch, room, prefix, keep, last_only, asking, asking_tokens, tokens, to
            )
        _end(x_TE, team, step)
        norm_rows(x_TE, asking_tokens, weights.eps, room.left, weights.in_bytes)
        to = _begin(x_TE, team, member, step + 1)
        for part in range(member, parts, team.members):
            _mlp(weights, layer, part, room, asking_tokens, to)
        _end(x_TE, team, step + 1)
        step += 2
    release()
    if member == 0 and not keep:
        for number in range(len(lengths_N)):
            factor = inverse_rms(x_TE, number, 0, width, weights.eps)
            for i in range(width):
                vectors_NE[number, i] = x_TE[number, i] * factor * weights.norm_E[i]
