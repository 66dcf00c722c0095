"""Memory of pruning a model that would not fit: the 4B shape in bf16, in a process of its own.

Its random weights go to disk shard by shard, a layer each, as transformers would have written them. Three quarters of
widths and layers are kept, by the norms of activations over a few calibration texts. The peak is that of the whole
process, Python and libraries included.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from f2llm.compress.cutting import cut_shapes
from f2llm.files import write_json
from f2llm.model.decoder import DecoderConfig, config_to_json, parameters_of
from f2llm.model.folder import WEIGHTS_INDEX
from harness import Part, Row, measured, skipped, worker
from inputs import DOCUMENTS, SEED, SMALL, Size, draw_texts, family_size, make_model

MEMORY = Row("peak memory in GB of pruning the 4B shape", bar=6, better="lower")
SECONDS = Row("seconds of pruning the 4B shape", better="lower")

FREE_GB = 20  # of disk: 8 for the model, 7 for what is cut out of it in float32, and some for hidden states
TEXTS = 200  # more than the calibration's tokens need


@dataclass(frozen=True)
class Work:
    """What is pruned, and by how many tokens it is judged."""

    size: Size
    tokens: int


FULL = Work(family_size("4B"), tokens=2000)
TRIAL = Work(SMALL, tokens=200)


def prune_memory(folder: Path, small: bool) -> Part:
    """Write the large model, then prune it in a worker."""
    work = TRIAL if small else FULL
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free / 2**30
    if free < FREE_GB and not small:
        reason = f"{free:.0f} GB of disk are free, {FREE_GB} are needed"
        return Part([skipped(row, reason) for row in (MEMORY, SECONDS)], {}, {})
    calibration, inputs = prepare(folder, work)
    print(f"pruning: {inputs}", flush=True)
    kept = three_quarters(work.size.decoder)
    with worker("prune_ours", keep_memory=True) as ours:
        started = time.perf_counter()
        parameters = ours.call(
            "prune",
            source=str(folder / "large"),
            out=str(folder / "pruned"),
            calibration=str(calibration),
            texts=inputs["texts"],
            **kept,
        )
        seconds = time.perf_counter() - started
        peak = ours.call("peak_memory") / 2**30
    shutil.rmtree(folder)  # the parts that follow may need the room
    inputs |= {"parameters_kept": parameters, "kept": kept}
    return Part(
        [measured(MEMORY, peak), measured(SECONDS, seconds)], {"pruning": inputs}, {"prune": ours.facts}
    )


def prepare(folder: Path, work: Work) -> tuple[Path, dict[str, Any]]:
    """Write `large`, a folder as of the hub, and the file of calibration texts; what they are."""
    texts, origin = draw_texts(work.size, DOCUMENTS, TEXTS)
    # The tokenizer comes with a model of one thin layer, made as for any benchmark.
    thin = replace(work.size.decoder, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    tokenizer = make_model(folder / "thin", replace(work.size, decoder=thin), texts, max_length=512).tokenizer
    chosen, tokens = [], 0
    for text in texts:
        if tokens >= work.tokens:
            break
        chosen.append(text)
        tokens += len(tokenizer.encode(text).ids)
    calibration = folder / "calibration.jsonl"
    calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")
    write_model(folder / "large", work.size.decoder)
    tokenizer.save(str(folder / "large" / "tokenizer.json"))
    return calibration, {
        "model": f"{work.size.name} shape, random weights in bf16",
        "parameters": parameters_of(work.size.decoder),
        "texts": len(chosen),
        "tokens": tokens,
        "origin": origin,
        "seed": SEED,
    }


def write_model(folder: Path, config: DecoderConfig) -> None:
    """Weights in bf16, a layer in memory at a time, with the index that says where each tensor is."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(SEED)
    where: dict[str, str] = {}
    for shard, tensors in _shards(config, generator):
        save_file(tensors, folder / shard)
        where |= dict.fromkeys(tensors, shard)
    write_json(folder / WEIGHTS_INDEX, {"metadata": {}, "weight_map": where})
    write_json(folder / "config.json", config_to_json(config))


def _shards(config: DecoderConfig, generator: torch.Generator) -> Iterator[tuple[str, dict[str, Tensor]]]:
    def layer_of(item: tuple[str, tuple[int, ...]]) -> str:
        return ".".join(item[0].split(".")[:2])  # layers.7, embed_tokens.weight, norm.weight

    for number, (_, items) in enumerate(groupby(cut_shapes(config).items(), layer_of)):
        yield (
            f"model-{number:05}.safetensors",
            {name: _random(shape, generator) for name, shape in items},
        )


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:  # of a norm
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def three_quarters(config: DecoderConfig) -> dict[str, int]:
    """The shape to cut to; heads stay."""
    return {
        "hidden_size": config.hidden_size * 3 // 4,
        "intermediate_size": config.intermediate_size * 3 // 4,
        "layers": max(1, config.num_hidden_layers * 3 // 4),
    }
