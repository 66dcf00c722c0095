"""The shape of every model of a recipe, and its parameters as the trainer would shard them over ranks.

Neither needs weights: a shape comes from the recipe, from a folder's config.json or from a size in a path's name, and
the decoder is made on the meta device, where tensors have shapes and no memory, in a process group of ranks that are
not there.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from f2llm.errors import F2Error, UsageError
from f2llm.family import FAMILY, size_in
from f2llm.files import read_object
from f2llm.model.decoder import Decoder, DecoderConfig, config_from_json
from f2llm.plan.cost import Sharded, lora_parameters
from f2llm.recipe import PruneStage, Recipe, TokenizerStage
from f2llm.recipe_models import MergeStage, SliceStage, TrimStage
from f2llm.recipe_train import TrainStage
from f2llm.train.ranks import Ranks, shard


class Shapes:
    """The shape of every model of a recipe, known from the recipe alone where that is possible."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def of(self, name: str) -> DecoderConfig:
        """The shape of the model that a stage ends in, or of the one in a folder.

        Raises:
            UsageError: a folder is not there, and its name is of no known size.
        """
        stage = None if "/" in name else self._recipe.stages[name]
        if stage is None:
            return _shape_at(name)
        if isinstance(stage, PruneStage):
            return self._cut(name, stage)
        if isinstance(stage, SliceStage):
            whole = self.of(stage.model)
            return replace(whole, num_hidden_layers=stage.layers or whole.num_hidden_layers)
        if isinstance(stage, TrimStage):  # at most: how many tokens the corpus uses is not known
            whole = self.of(stage.model)
            return replace(whole, vocab_size=min(stage.keep or whole.vocab_size, whole.vocab_size))
        if isinstance(stage, MergeStage):
            return self.of(stage.models[0])
        assert isinstance(stage, TrainStage)  # the recipe sees to it
        if stage.base:
            return self.of(stage.base)
        assert stage.shape is not None and stage.tokenizer is not None
        tokenizer = self._recipe.stages[stage.tokenizer]
        assert isinstance(tokenizer, TokenizerStage)
        shape = stage.shape
        return DecoderConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )

    def _cut(self, name: str, stage: PruneStage) -> DecoderConfig:
        whole = self.of(stage.model)
        for what, wanted, there in (
            ("hidden_size", stage.hidden_size, whole.hidden_size),
            ("intermediate_size", stage.intermediate_size, whole.intermediate_size),
            ("layers", stage.layers, whole.num_hidden_layers),
            ("heads", stage.heads or 1, whole.num_attention_heads),
        ):
            if wanted > there:
                raise UsageError(
                    f"{what} of stage {name!r} (prune) is {wanted}, but {stage.model} has {there}; ask for less."
                )
        heads = stage.heads or whole.num_attention_heads
        return replace(
            whole,
            hidden_size=stage.hidden_size,
            intermediate_size=stage.intermediate_size,
            num_hidden_layers=stage.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads * whole.num_key_value_heads // whole.num_attention_heads,
        )

    def tokenizer(self, name: str) -> Path | None:
        """The tokenizer.json that a stage's texts go through, if it is there already."""
        stage = None if "/" in name else self._recipe.stages[name]
        path = Path(name) if stage is None else self._recipe.output / name
        if (path / "tokenizer.json").is_file():
            return path / "tokenizer.json"
        if isinstance(stage, PruneStage | SliceStage | TrimStage):
            return self.tokenizer(stage.model)
        if isinstance(stage, MergeStage):
            return self.tokenizer(stage.models[0])
        origin = (stage.base or stage.tokenizer) if isinstance(stage, TrainStage) else None
        return self.tokenizer(origin) if origin else None


def _shape_at(path: str) -> DecoderConfig:
    """The shape that a folder's config.json states; of a folder that is not there, the size in its name."""
    file = Path(path) / "config.json"
    if file.is_file():
        return config_from_json(read_object(file), str(file))
    if (size := size_in(path)) is None:
        raise UsageError(
            f"the shape of {path} is not known: it has no config.json here, and no part of its name ends in one of "
            f"{', '.join(FAMILY)}; put the model's config.json into that folder."
        )
    member = FAMILY[size]
    return DecoderConfig(
        vocab_size=member.vocab_size,
        hidden_size=member.hidden_size,
        intermediate_size=member.intermediate_size,
        num_hidden_layers=member.layers,
        num_attention_heads=member.heads,
        num_key_value_heads=member.kv_heads,
        head_dim=member.head_dim,
    )


# --- Parameters


@contextmanager
def fake_ranks(world: int) -> Iterator[Ranks]:
    """Rank 0 of a process group of `world` in which nobody else is, and whose collectives do nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise F2Error(
            "a plan was asked for inside a run of several processes; ask for it in a process of its own."
        )
    hook = sys.excepthook  # which the group replaces, so that tracebacks name a rank
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield Ranks(0, world, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


@lru_cache(maxsize=32)  # stages share shapes
def sharded(config: DecoderConfig, ranks: int, lora_rank: int | None = None) -> Sharded:
    """Parameters of a decoder, and how many of them the trainer's own sharding puts on rank 0."""
    with torch.device("meta"):
        decoder = Decoder(config)
    total = sum(p.numel() for p in decoder.parameters())
    layer = sum(p.numel() for p in decoder.layers[0].parameters())
    with fake_ranks(ranks) as here:
        shard(decoder, here, "bf16", activation_checkpointing=False)
        local = sum(p.to_local().numel() for p in decoder.parameters())  # type: ignore[attr-defined]
    adapters = lora_parameters(config, lora_rank) if lora_rank else 0
    return Sharded(
        total=total + adapters,
        local=local + math.ceil(adapters / ranks),
        trained=adapters or total,
        trained_local=math.ceil(adapters / ranks) or local,
        largest_layer=layer,
        table=total - config.num_hidden_layers * layer,
    )
