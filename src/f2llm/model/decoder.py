"""The Qwen3 decoder, ragged: a flat list of token ids and their lengths in, one vector per sequence out.

Parameter names and outputs equal transformers' `Qwen3Model`, so weights go either way. There is no padding: linear
layers and norms see each real token once, attention runs per group of sequences of equal length, and in the last
layer only the final token of each sequence (EOS, the one that is pooled) goes on after keys and values.

Shape suffixes: T tokens of all sequences, N sequences, C sequences in one group, L length of a group's sequences,
H query heads, G key/value heads, D head width, E hidden width, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from f2llm.errors import F2Error
from f2llm.family import parameter_count
from f2llm.model.attention import KeysValues, attend_behind, attend_groups
from f2llm.model.fused import norm_rope, rms_norm, swiglu
from f2llm.model.layout import Layout, make_layout

TRANSFORMERS_ROPE_THETA = 10_000.0  # what it takes where a config.json gives none


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a Qwen3 decoder; field names are those of transformers' `Qwen3Config`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 40_960


def config_from_json(values: dict[str, Any], where: str) -> DecoderConfig:
    """Read a `config.json`; whatever this decoder would compute differently is refused by name."""

    def refuse(what: str, got: object, expected: str) -> None:
        raise F2Error(
            f"{where} has {what} = {got!r}, but the decoder supports {expected}; use another model."
        )

    if values.get("model_type") != "qwen3":
        refuse("model_type", values.get("model_type"), "'qwen3' only")
    if values.get("attention_bias"):
        refuse("attention_bias", True, "attention without biases")
    if values.get("use_sliding_window"):
        refuse("use_sliding_window", True, "full attention only")
    if set(values.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        refuse("layer_types", values["layer_types"], "'full_attention' only")
    if values.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", values["hidden_act"], "'silu' only")
    # As in transformers: rope_scaling wins over rope_parameters, and a rope_theta in either over one beside them.
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        refuse("rope type", rope_type, "'default' only")
    if unknown := sorted(rope.keys() - {"rope_type", "type", "rope_theta"}):
        refuse(f"rope parameter {unknown[0]}", rope[unknown[0]], "'rope_theta' only")
    known = {name: values[name] for name in DecoderConfig.__dataclass_fields__ if name in values}
    known["rope_theta"] = rope.get("rope_theta") or values.get("rope_theta", TRANSFORMERS_ROPE_THETA)
    try:
        return DecoderConfig(**known)
    except TypeError as error:
        raise F2Error(f"{where} is incomplete ({error}); restore the file from the model's source.") from None


def config_to_json(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a Qwen3 model, with the keys of transformers 4, which transformers 5 reads too."""
    return {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        **{name: getattr(config, name) for name in DecoderConfig.__dataclass_fields__},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": False,
        "use_sliding_window": False,
    }


def parameters_of(config: DecoderConfig) -> int:
    """Parameters of a decoder of this shape, without making one."""
    return parameter_count(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
    )


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, as in Qwen3."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class HeadNorm(RMSNorm):
    """The norm of each query or key head, and the rotary embedding that follows it."""

    def forward(self, x_THD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return norm_rope(x_THD, self.weight, *rope, self.eps)


def rope_tables(config: DecoderConfig, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each [T, 1, D]; computed in float32 as transformers does."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions_T.device)
    frequencies = 1.0 / (config.rope_theta ** (half / config.head_dim))
    angles_T1D = torch.outer(positions_T.float(), frequencies).repeat(1, 2).unsqueeze(1)
    return angles_T1D.cos().to(dtype), angles_T1D.sin().to(dtype)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.head_dim
        self.head_dim = width
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, hidden, bias=False)
        self.q_norm = HeadNorm(width, config.rms_norm_eps)
        self.k_norm = HeadNorm(width, config.rms_norm_eps)

    def forward(
        self,
        x_TE: Tensor,
        layout: Layout,
        rope: tuple[Tensor, Tensor],
        last_only: bool,
        prefix: KeysValues | None = None,
    ) -> Tensor:
        """Returns [T, E], or [N, E] for the final tokens alone if `last_only`."""
        k_TGD, v_TGD = self.keys_values(x_TE, rope)
        if last_only:
            x_TE, cos_T1D, sin_T1D = (t.index_select(0, layout.last_N) for t in (x_TE, *rope))
            rope = cos_T1D, sin_T1D
        q_THD = self.q_norm(self.q_proj(x_TE).unflatten(-1, (-1, self.head_dim)), rope)
        of_batch = q_THD, k_TGD, v_TGD, layout, last_only
        mixed_THD = attend_behind(prefix, *of_batch) if prefix else attend_groups(*of_batch)
        return self.o_proj(mixed_THD.flatten(1))

    def keys_values(self, x_TE: Tensor, rope: tuple[Tensor, Tensor]) -> KeysValues:
        """[T, G, D] each."""
        k_TGD = self.k_norm(self.k_proj(x_TE).unflatten(-1, (-1, self.head_dim)), rope)
        return k_TGD, self.v_proj(x_TE).unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    """The gated MLP (SwiGLU)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TE: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_TE), self.up_proj(x_TE)))


class Layer(nn.Module):
    """One decoder layer: attention and MLP, each behind a norm and around a residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_TE: Tensor,
        layout: Layout,
        rope: tuple[Tensor, Tensor],
        last_only: bool,
        prefix: KeysValues | None = None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_TE), layout, rope, last_only, prefix)
        if last_only:
            x_TE = x_TE.index_select(0, layout.last_N)
        x_TE = x_TE + attended
        return x_TE + self.mlp(self.post_attention_layernorm(x_TE))


@dataclass(frozen=True)
class Cuts:
    """Smaller models inside a decoder, whose vectors are computed with its own (three-dimensional Matryoshka)."""

    exits: Sequence[int] = ()  # numbers of layers, fewer than all
    table_EE: Tensor | None = None  # projects rows of the embedding table onto fewer directions


WHOLE = Cuts()


@dataclass(frozen=True)
class Prefix:
    """What the tokens that several sequences begin with leave to those behind them."""

    length: int  # tokens
    layers: Sequence[KeysValues]


class Decoder(nn.Module):
    """A Qwen3 decoder that returns one vector per sequence."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        # On the meta device nothing is drawn, and trying to would import torch._dynamo, which takes a second.
        table_VE = torch.empty(config.vocab_size, config.hidden_size)
        given = table_VE if table_VE.is_meta else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=given)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, ids_T: Tensor, lengths: Sequence[int], cuts: Cuts = WHOLE, prefix: Prefix | None = None
    ) -> Tensor:
        """Vectors of the final tokens, before any normalisation to unit length.

        Args:
            ids_T: int64 [T], the token ids of all sequences one after another, each ending in EOS.
            lengths: number of tokens of each sequence, N of them, adding up to T.
            prefix: of all sequences, whose ids and lengths are then what follows it (CPU, no gradient, no cuts).

        Returns:
            [N, E] in the weights' dtype, in the order given; with exits [N, exits * E + E], theirs in front.
        """
        layout = make_layout(lengths, ids_T.device)
        x_TE = self.embed_tokens(ids_T.index_select(0, layout.token_order_T))
        if cuts.table_EE is not None:
            x_TE = x_TE @ cuts.table_EE.to(x_TE)
        left: list[Tensor] = []
        positions_T = layout.positions_T + prefix.length if prefix else layout.positions_T
        rope = rope_tables(self.config, positions_T, x_TE.dtype)
        final = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            before = prefix.layers[number] if prefix else None
            x_TE = layer(x_TE, layout, rope, last_only=number == final, prefix=before)
            if number + 1 in cuts.exits:
                left.append(self.norm(x_TE.index_select(0, layout.last_N)))
        vectors_NE = self.norm(x_TE)
        together = torch.cat([*left, vectors_NE], dim=1) if left else vectors_NE
        return together.index_select(0, layout.restore_N)

    @torch.no_grad()
    def prefix(self, ids_P: Tensor) -> Prefix:
        """What sequences that begin with these P tokens need of them, since no token sees a later one."""
        layout = make_layout([len(ids_P)], ids_P.device)
        x_PE = self.embed_tokens(ids_P)
        rope = rope_tables(self.config, layout.positions_T, x_PE.dtype)
        kept = []
        for layer in cast(Iterable[Layer], self.layers):
            kept.append(layer.self_attn.keys_values(layer.input_layernorm(x_PE), rope))
            x_PE = layer(x_PE, layout, rope, last_only=False)
        return Prefix(len(ids_P), kept)


def initialise(decoder: Decoder, generator: torch.Generator) -> None:
    """Random weights as transformers draws them: normal with standard deviation 0.02, norms at one."""
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02, generator=generator)
