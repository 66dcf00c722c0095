"""Pruning: a smaller model cut out of a larger one (arXiv 2603.19223, section 3.3).

Hidden and MLP width keep the units with the largest activation norms on calibration texts; depth keeps the first
layers; attention heads stay. Kept indices stay in ascending order, so the Matryoshka order of dimensions survives.

Shape suffixes: T tokens, E hidden width, I MLP width.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from f2llm.data.parts import carry_decontamination
from f2llm.data.rows import read_rows
from f2llm.errors import UsageError
from f2llm.model.base import load_base
from f2llm.model.batches import forward
from f2llm.model.decoder import Decoder, DecoderConfig
from f2llm.model.folder import Model, ModelFacts, model_size, save_model
from f2llm.progress import progress
from f2llm.recipe import PruneStage
from f2llm.rng import generator
from f2llm.train.objective import matryoshka_sizes
from f2llm.train.terms import token_ids

TEXTS_AT_ONCE = 64  # so that memory does not grow with the number of calibration texts


def prune_stage(
    config: PruneStage, *, model: Path, data: Path, out: Path, seed: int, recipe_hash: str
) -> dict[str, Any]:
    """Cut the model to the recipe's shape and leave a model folder in `out`."""
    parent = load_base(model)
    if config.layers > (layers := parent.decoder.config.num_hidden_layers):
        raise UsageError(f"{config.layers} layers were asked for, but {model} has {layers}; ask for less.")
    table, _ = read_rows(data)
    texts = sorted(pc.unique(table["query"]).to_pylist())
    chosen = generator(seed, "calibration").permutation(len(texts))[: config.calibration_texts]
    hidden_E, mlp_I = importance(parent, [texts[i] for i in chosen])
    kept_E = strongest(hidden_E, config.hidden_size)
    decoder = cut(
        parent.decoder, kept_E, [strongest(m, config.intermediate_size) for m in mlp_I[: config.layers]]
    )
    nested = len(parent.facts.matryoshka_sizes) > 1
    facts = ModelFacts(
        eos_id=parent.facts.eos_id,
        max_length=parent.facts.max_length,
        matryoshka_sizes=matryoshka_sizes(config.hidden_size) if nested else [config.hidden_size],
        instruction=parent.facts.instruction,
        template=parent.facts.template,
        parent=parent.facts.identity,
        recipe=recipe_hash,
        kept=_kept_of_the_uncut(parent, kept_E),
    )
    carry_decontamination([model], out)
    facts = save_model(out, Model(decoder, parent.tokenizer, facts))
    return {"parameters": model_size(decoder), "identity": facts.identity}


def _kept_of_the_uncut(parent: Model, kept_E: Tensor) -> dict[str, Any]:
    """The model that nothing was cut from yet, and the numbers that the kept units have in it."""
    width = parent.decoder.config.hidden_size
    uncut = parent.facts.kept or {"of": parent.facts.identity, "hidden": list(range(width))}
    return {"of": uncut["of"], "hidden": [uncut["hidden"][unit] for unit in kept_E.tolist()]}


@torch.no_grad()
def importance(model: Model, texts: list[str]) -> tuple[Tensor, list[Tensor]]:
    """L2 norm of each unit's activation over all tokens of `texts`.

    Returns:
        hidden units [E]: outputs of all norms in front of attention and MLP, added up over layers; and per layer
        the MLP units [I]: what enters the down projection. The last layer's MLP sees final tokens only.
    """
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    handles = []

    def watch(module: nn.Module, name: str, *, inputs: bool) -> None:
        def record(_module: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
            squares[name] = squares[name] + (given[0] if inputs else out).float().pow(2).sum(0)

        handles.append(module.register_forward_hook(record))

    for name, module in model.decoder.named_modules():
        if name.endswith("layernorm"):
            watch(module, "hidden", inputs=False)
        elif name.endswith("down_proj"):
            watch(module, name, inputs=True)
    try:
        with progress(total=len(texts), what="measure activations", unit="text") as bar:
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                part = texts[start : start + TEXTS_AT_ONCE]
                forward(model.decoder, token_ids(model, part, model.facts.max_length))
                bar.advance(len(part))
    finally:
        for handle in handles:
            handle.remove()
    hidden_E = squares.pop("hidden").sqrt()
    return hidden_E, [square_I.sqrt() for square_I in squares.values()]  # layers in their order


def strongest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending."""
    if not 1 <= count <= len(scores):
        raise UsageError(
            f"a width of {count} was asked for, but the model has {len(scores)} units; ask for less."
        )
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def cut(decoder: Decoder, kept_E: Tensor, kept_I: list[Tensor]) -> Decoder:
    """The decoder of the kept hidden units and, one entry per kept layer, MLP units.

    RMSNorm divides by the mean square over the width: a norm over E' of E units gets its weight times
    sqrt(E / E'), and eps times E / E', so that removing units that are always zero changes nothing. (The query and
    key norms keep their width; config.json has one eps for all norms, and theirs changes with it, by far less than
    the mean square of what they divide.)
    """
    old = decoder.config
    ratio = old.hidden_size / len(kept_E)
    config = DecoderConfig(
        vocab_size=old.vocab_size,
        hidden_size=len(kept_E),
        intermediate_size=len(kept_I[0]),
        num_hidden_layers=len(kept_I),
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.head_dim,
        rms_norm_eps=old.rms_norm_eps * ratio,
        rope_theta=old.rope_theta,
        max_position_embeddings=old.max_position_embeddings,
    )
    small = Decoder(config).to(decoder.norm.weight.dtype)
    source = decoder.state_dict()
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            rows, columns = _kept_of(name, kept_E, kept_I)
            tensor = source[name] if rows is None else source[name].index_select(0, rows)
            tensor = tensor if columns is None else tensor.index_select(1, columns)
            parameter.copy_(tensor * ratio**0.5 if tensor.dim() == 1 and rows is not None else tensor)
    return small.eval()


def _kept_of(name: str, kept_E: Tensor, kept_I: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Which rows and which columns of a parameter stay (None: all)."""
    part = name.split(".")[-2]
    if part == "embed_tokens":
        return None, kept_E
    if part in ("norm", "input_layernorm", "post_attention_layernorm"):
        return kept_E, None
    if part in ("q_proj", "k_proj", "v_proj"):
        return None, kept_E
    if part == "o_proj":
        return kept_E, None
    if part in ("q_norm", "k_norm"):
        return None, None
    units_I = kept_I[int(name.split(".")[1])]
    return (kept_E, units_I) if part == "down_proj" else (units_I, kept_E)
