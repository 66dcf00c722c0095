"""The decoder as an ONNX graph with everything inside: padded token ids and their mask in, unit vectors out.

The graph is written node by node, not traced, so that it can be ragged as our own decoder is: the mask's ones are
gathered into one flat list of tokens, norms and matrices see that list alone, and only attention lays it out again in
a rectangle, with padding on the right. So padding costs next to nothing, on whichever side the caller's stands, and
cannot change a vector. Queries go through attention in blocks, each with the keys up to its end alone: of the scores,
half of which a causal mask would throw away, four blocks compute 5/8.
In the last layer the final tokens alone go on. Pooling, the Matryoshka size and the normalisation follow.

Shape suffixes: N texts, L tokens of the longest, T tokens without padding, H query heads, G key/value heads, D head
width, C = heads * D, E hidden width.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from f2llm.export.onnx_graph import TINY, Floats, Graph, Linear, float_linear, rows_of
from f2llm.files import atomic_write
from f2llm.model.decoder import DecoderConfig, parameters_of
from f2llm.model.folder import read_facts, weight_files
from f2llm.model.slices import table_basis
from f2llm.model.tensor_files import open_tensors

MODEL, DATA = "model.onnx", "model.onnx.data"
MOST_IN_ONE_FILE = 1 << 30  # bytes; a protobuf message ends at 2 GiB
INPUTS = {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
OUTPUT = "sentence_embedding"
BLOCKS = 4  # of queries

Read = Callable[[str], Floats]


def write_onnx(
    source: Path,
    folder: Path,
    config: DecoderConfig,
    *,
    dim: int,
    linear: Linear = float_linear,
    blocks: int = BLOCKS,
) -> None:
    """Write model.onnx of a model folder, with model.onnx.data beside it where it is large.

    Weights are read and written one at a time.

    Args:
        blocks: into which attention divides the queries.
    """
    size = 4 if linear is float_linear else 1
    large = size * parameters_of(config) > MOST_IN_ONE_FILE
    with (
        open_tensors(weight_files(source)) as tensors,
        atomic_write(folder / DATA) if large else nullcontext() as data,
    ):
        graph = Graph(data, DATA)
        rank = read_facts(source).table_rank
        vector = _vectors(graph, config, lambda name: tensors.read(name).numpy(), dim, linear, rank, blocks)
        content = graph.model(INPUTS, vector, OUTPUT, ["batch", dim])
    with atomic_write(folder / MODEL) as file:
        file.write(content)


@dataclass(frozen=True)
class _Places:
    """Where the tokens are; names of values."""

    given_T: str  # place of each token in the caller's rectangle
    token_T: str  # place of each token in ours, where padding stands on the right
    of_place_NL: str  # token at each of our places; some other one's at padding
    position_T: str  # of each token in its text
    last_N: str  # token that is pooled
    ends: tuple[str, ...]  # [1] each: where blocks of queries begin and end, 0 first and L last
    earlier_LL: str  # what a token may see: padding, which stands on the right, is later
    real_NL: str  # [N, 1, 1, L]: what a final token may see


def _places(graph: Graph, blocks: int) -> _Places:
    shape_N = graph("Shape", "input_ids", start=0, end=1)
    # At least one token for each block of queries: runtimes refuse empty ones.
    shape_L = graph("Max", graph("Shape", "input_ids", start=1, end=2), graph.ints(blocks))
    mask_NL = graph.cast(graph.cast("attention_mask", "BOOL"), "INT64")
    one, zero = graph.whole(1), graph.whole(0)
    given_T = graph("Squeeze", graph("NonZero", _flat(graph, mask_NL)), graph.ints(0))
    column_L = graph("Range", zero, graph("Squeeze", shape_L), one)
    row_N = graph("Range", zero, graph("Squeeze", shape_N), one)
    length_N1 = graph("ReduceSum", mask_NL, graph.ints(1), keepdims=1)
    first_N1 = graph("CumSum", length_N1, zero, exclusive=1)
    final_N1 = graph("Sub", graph("Add", first_N1, length_N1), one)
    position_NL = graph("Sub", graph("CumSum", mask_NL, one), one)
    width = graph("Squeeze", shape_L)
    place_NL = graph("Add", graph("Unsqueeze", graph("Mul", row_N, width), graph.ints(1)), position_NL)

    def of_tokens(x_NL: str) -> str:
        return graph("Gather", _flat(graph, x_NL), given_T, axis=0)

    return _Places(
        given_T=given_T,
        token_T=of_tokens(place_NL),
        of_place_NL=graph("Max", graph("Min", graph("Add", first_N1, column_L), final_N1), zero),
        position_T=of_tokens(position_NL),
        last_N=graph("Max", _flat(graph, final_N1), zero),
        ends=(
            *(graph("Div", graph("Mul", shape_L, graph.ints(n)), graph.ints(blocks)) for n in range(blocks)),
            shape_L,
        ),
        earlier_LL=graph("LessOrEqual", column_L, graph("Unsqueeze", column_L, graph.ints(1))),
        real_NL=graph("Unsqueeze", graph("Less", column_L, graph("Max", length_N1, one)), graph.ints(1, 2)),
    )


def _vectors(
    graph: Graph, config: DecoderConfig, read: Read, dim: int, linear: Linear, rank: int | None, blocks: int
) -> str:
    """Unit vectors [N, dim]."""
    places = _places(graph, blocks)
    ids_T = graph("Gather", _flat(graph, "input_ids"), places.given_T, axis=0)
    x_TE = _embedded(graph, ids_T, read, linear, rank)
    rope = _rope_tables(graph, config, places.position_T)
    final = config.num_hidden_layers - 1
    for number in range(config.num_hidden_layers):
        x_TE = _layer(graph, config, read, linear, places, rope, x_TE, number, last=number == final)
    x_NE = _norm(graph, config, read, x_TE, "norm.weight")
    if dim < config.hidden_size:
        x_NE = _slice(graph, x_NE, 0, dim)
    squares_N1 = graph("ReduceSum", graph("Mul", x_NE, x_NE), graph.ints(1), keepdims=1)
    length_N1 = graph("Max", graph("Sqrt", squares_N1), graph.real(TINY))
    return graph("Div", x_NE, length_N1)


def _embedded(graph: Graph, ids_T: str, read: Read, linear: Linear, rank: int | None) -> str:
    """Rows of the embedding table [T, E]; of a table that a slice left with a lower rank, from its two factors."""
    name, int8 = "embed_tokens.weight", linear is not float_linear
    table_VE = read(name)
    if rank is None or rank == table_VE.shape[1]:
        return rows_of(graph, ids_T, name, table_VE, int8=int8)
    strongest_ER = table_basis(torch.from_numpy(table_VE))[:, :rank].numpy()
    rows = rows_of(graph, ids_T, name, table_VE @ strongest_ER, int8=int8)
    return graph("MatMul", rows, graph.tensor(np.ascontiguousarray(strongest_ER.T), name + "_directions"))


def _layer(
    graph: Graph,
    config: DecoderConfig,
    read: Read,
    linear: Linear,
    places: _Places,
    rope: tuple[str, str],
    x_TE: str,
    number: int,
    last: bool,
) -> str:
    """One decoder layer: [T, E], or [N, E] of the final tokens in the last."""
    prefix = f"layers.{number}."

    def project(x: str, name: str) -> str:
        name = f"{prefix}{name}_proj.weight"
        return linear(graph, x, name, read(name))

    def heads(x: str, name: str) -> str:
        return graph("Reshape", project(x, name), graph.ints(-1, count[name], config.head_dim))

    def normed(x: str, name: str, rope: tuple[str, str]) -> str:
        normed = _norm(
            graph, config, read, heads(x, f"self_attn.{name}"), f"{prefix}self_attn.{name}_norm.weight"
        )
        return _rotated(graph, normed, rope)

    count = {
        "self_attn.q": config.num_attention_heads,
        "self_attn.k": config.num_key_value_heads,
        "self_attn.v": config.num_key_value_heads,
    }
    y_TE = _norm(graph, config, read, x_TE, prefix + "input_layernorm.weight")
    k_TGD, v_TGD = normed(y_TE, "k", rope), heads(y_TE, "self_attn.v")
    if last:
        x_TE, y_TE, *rope_N = (graph("Gather", v, places.last_N, axis=0) for v in (x_TE, y_TE, *rope))
        rope = rope_N[0], rope_N[1]
    q_THD = normed(y_TE, "q", rope)
    mixed = _attention(graph, config, places, q_THD, k_TGD, v_TGD, last)
    x_TE = graph("Add", x_TE, project(mixed, "self_attn.o"))
    y_TE = _norm(graph, config, read, x_TE, prefix + "post_attention_layernorm.weight")
    gate = project(y_TE, "mlp.gate")
    gated = graph("Mul", graph("Mul", gate, graph("Sigmoid", gate)), project(y_TE, "mlp.up"))
    return graph("Add", x_TE, project(gated, "mlp.down"))


def _attention(
    graph: Graph, config: DecoderConfig, places: _Places, q_THD: str, k_TGD: str, v_TGD: str, last: bool
) -> str:
    """[T, H * D], or [N, H * D] of the final tokens in the last layer."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    beginning, end_L = places.ends[0], places.ends[-1]

    def part(x: str, start: str, end: str, axis: int) -> str:
        return graph("Slice", x, start, end, graph.ints(axis))

    def laid_out(x: str, count: int, start: str, end: str) -> str:
        """Places `start` to `end` of each text, [N, end - start, C]: gathered at once, not sliced after it."""
        rows = graph("Reshape", x, graph.ints(-1, count * config.head_dim))
        return graph("Gather", rows, part(places.of_place_NL, start, end, 1), axis=0)

    def mixed(q: str, end: str, visible: str) -> str:
        k, v = (laid_out(x, groups, beginning, end) for x in (k_TGD, v_TGD))
        return graph("Attention", q, k, v, visible, q_num_heads=heads, kv_num_heads=groups)

    def block(start: str, end: str) -> str:
        earlier = part(part(places.earlier_LL, start, end, 0), beginning, end, 1)
        return mixed(laid_out(q_THD, heads, start, end), end, earlier)

    width = heads * config.head_dim
    if last:
        y_N1C = mixed(graph("Reshape", q_THD, graph.ints(-1, 1, width)), end_L, places.real_NL)
        return graph("Reshape", y_N1C, graph.ints(-1, width))
    y_NLC = graph("Concat", *(block(start, end) for start, end in pairwise(places.ends)), axis=1)
    return graph("Gather", graph("Reshape", y_NLC, graph.ints(-1, width)), places.token_T, axis=0)


def _rope_tables(graph: Graph, config: DecoderConfig, position_T: str) -> tuple[str, str]:
    """Cosine and sine of the rotary angles, each [T, 1, D / 2]."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1 / np.float32(config.rope_theta) ** half).astype(np.float32)
    position_T11 = graph("Unsqueeze", graph.cast(position_T, "FLOAT"), graph.ints(1, 2))
    angles = graph("Mul", position_T11, graph.tensor(frequencies, "rope_frequencies"))
    return graph("Cos", angles), graph("Sin", angles)


def _rotated(graph: Graph, x_THD: str, rope: tuple[str, str]) -> str:
    """Every token is a text of its own to this operator, with angles of its own: [T, H, 1, D], and [T, 1, D / 2]."""
    x_TH1D = graph("Unsqueeze", x_THD, graph.ints(2))
    return graph("Squeeze", graph("RotaryEmbedding", x_TH1D, *rope), graph.ints(2))


def _norm(graph: Graph, config: DecoderConfig, read: Read, x: str, weight: str) -> str:
    """Root-mean-square norm, in the operators that runtimes recognise and fuse."""
    mean = graph("ReduceMean", graph("Pow", x, graph.real(2)), graph.ints(-1), keepdims=1)
    root = graph("Sqrt", graph("Add", mean, graph.real(config.rms_norm_eps)))
    return graph("Mul", graph("Div", x, root), graph.tensor(read(weight), weight))


def _slice(graph: Graph, x: str, start: int, end: int) -> str:
    return graph("Slice", x, graph.ints(start), graph.ints(end), graph.ints(-1))


def _flat(graph: Graph, x: str) -> str:
    return graph("Reshape", x, graph.ints(-1))
