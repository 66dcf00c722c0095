"""A made-up run of the size of a real one: all languages of CLDR, four models, baselines, losses."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from babel import localedata

from f2llm.evaluate.names import summarise
from f2llm.files import write_json, write_text
from f2llm.languages import script, tag
from f2llm.recipe import load

RECIPE = """\
name: pretend
seed: 7
output: runs/pretend   # <b>not bold</b>
stages:
  names: {stage: names}
  tokenizer: {stage: tokenizer, data: names, vocab_size: 8000}
  base:
    stage: train
    data: names
    shape: {hidden_size: 256, intermediate_size: 768, layers: 2, heads: 4, kv_heads: 2, head_dim: 64}
    tokenizer: tokenizer
    formats: [retrieval]
    instructions: false
    steps: 400
    batch_size: 512
    learning_rate: 2.0e-3
  large: &second
    stage: train
    data: names
    base: base
    instructions: true
    steps: 150
    batch_size: 256
    learning_rate: 1.0e-3
  medium-cut: {stage: prune, model: base, data: names, hidden_size: 192, intermediate_size: 512, layers: 2}
  medium: {<<: *second, base: medium-cut, teacher: large}
  small-cut: {stage: prune, model: base, data: names, hidden_size: 128, intermediate_size: 384, layers: 1}
  small: {<<: *second, base: small-cut, teacher: large}
  small-alone: {<<: *second, base: small-cut}
  scores: {stage: evaluate, data: names, models: [large, medium, small, small-alone]}
"""
SECONDS = [5.1, 8.4, 196.2, 88.7, 2.3, 61.0, 1.4, 31.9, 24.8, 41.3]
MODELS = {"large": (5_680_000, 256, 0.0), "medium": (3_110_000, 192, 0.03), "small": (1_420_000, 128, 0.055)}
SOURCES = ["cldr-kinds", "cldr-names", "cldr-territory-or-currency"]


def write_run(run: Path, languages: int = 230) -> Path:
    """Write a whole pretended run into `run`; everything is drawn from one seed."""
    rng = np.random.default_rng(3)
    write_text(run / "recipe.yaml", RECIPE)
    stages = load(run / "recipe.yaml").stages
    for number, (name, config) in enumerate(stages.items()):
        manifest = {
            "schema": 1,
            "stage": config.stage,
            "name": name,
            "config": config.model_dump(mode="json"),
            "seed": 7,
            "inputs": {},
            "versions": {"f2llm": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "numpy": "2.4.6"},
            "fingerprint": f"{number:064x}",
            "content": f"{number + 10:064x}",
            "seconds": SECONDS[number],
            "peak_memory_gb": 0.4 + 0.21 * number,
            "facts": FACTS.get(config.stage, {}),
            "finished": f"2026-01-05T10:{number:02d}:00+00:00",
        }
        write_json(run / name / "manifest.json", manifest)
        if config.stage == "train":
            write_text(run / name / "log.jsonl", pretend_log(rng, config))
    write_json(run / "scores" / "scores.json", pretend_scores(rng, languages))
    return run


def pretend_log(rng: np.random.Generator, config: Any) -> str:
    lines = []
    for step in range(0, config.steps, 5):
        source = SOURCES[1] if config.formats == ["retrieval"] else SOURCES[rng.integers(3)]
        height = {"cldr-kinds": 3.0, "cldr-names": 8.0, "cldr-territory-or-currency": 1.2}[source]
        decay = 0.25 + 0.75 * np.exp(-step / config.steps * 5)
        record = {
            "step": step,
            "source": source,
            "loss": height * decay * rng.lognormal(0, 0.07),
            "in_batch": 1.0,
        }
        if config.teacher:
            record["teacher_mse"] = 0.4 * decay * rng.lognormal(0, 0.05)
        lines.append(json.dumps(record))
    return "\n".join(lines) + "\n"


def pretend_scores(rng: np.random.Generator, languages: int) -> dict[str, Any]:
    """scores.json in which a language has one difficulty for everybody, and fewer dimensions cost accuracy."""
    locales = [name for name in localedata.locale_identifiers() if name not in ("root", "en")]
    tags = sorted({tag(name) for name in locales if all(len(p) == 4 for p in name.split("_")[1:])})[
        :languages
    ]
    asked = [lang for lang in tags for _ in range(rng.integers(2, 90))]
    ease = {lang: rng.beta(9, 3.2) for lang in tags}
    latin = {lang: script(lang) == "Latn" for lang in tags}

    def ranks(chance: Callable[[str], float]) -> Any:
        hit = np.array([rng.random() < chance(lang) for lang in asked])
        return np.where(hit, 1, rng.integers(2, 400, size=len(asked)))

    def found(lang: str, loss: float) -> float:
        return ease[lang] - loss

    def model(name: str, parameters: int, dim: int, loss: float) -> dict[str, Any]:
        sizes = [size for size in (8, 16, 32, 64, 128, 192, 256) if size <= dim]
        pairs = {
            str(size): summarise(asked, ranks(partial(found, loss=loss + 0.9 / size**0.75))) for size in sizes
        }
        things = {str(size): summarise(asked, ranks(partial(found, loss=0.4))) for size in sizes}
        return {
            "name": name,
            "parameters": parameters,
            "dim": dim,
            "sizes": sizes,
            "pairs": pairs,
            "things": things,
        }

    chances: dict[str, Callable[[str], float]] = {
        "tfidf": lambda lang: 0.6 * ease[lang] if latin[lang] else 0.01,
        "tfidf_nearest": lambda lang: 0.66 * ease[lang],
        "lookup": lambda lang: 0.012,
    }
    return {
        "schema_version": 1,
        "min_queries": 3,
        "candidates": 1622,
        "questions": {"pairs": len(asked), "things": len(asked)},
        "left_out": {
            "pairs": {"no_english_name": 62, "string_seen_in_training": 6916},
            "things": {"no_english_name": 51, "string_seen_in_training": 0},
        },
        "spelt_as_in_english": {"pairs": 3, "things": 4120},
        "models": [model(name, *facts) for name, facts in MODELS.items()]
        + [model("small-alone", 1_420_000, 128, 0.1)],
        "baseline": {
            name: {
                "pairs": {"full": summarise(asked, ranks(chance))},
                "things": {"full": summarise(asked, ranks(chance))},
            }
            for name, chance in chances.items()
        },
    }


FACTS: dict[str, dict[str, Any]] = {
    "names": {"names": 220370, "languages": 256, "things": 1685, "kinds": {"territory": 64648}},
    "tokenizer": {"vocab_size": 8000, "tokens_per_text": 6.42},
    "train": {"parameters": 5_680_000, "loss": 1.2345, "tokens_per_second": 31234.5},
    "prune": {"parameters": 3_110_000, "layers": 2},
    "evaluate": {
        "tokens_per_second": {"large": 41210, "medium": 60112, "small": 118034, "small-alone": 117990}
    },
}


@pytest.fixture(scope="session")
def pretend_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with 230 languages; tests that change it copy it first."""
    return write_run(tmp_path_factory.mktemp("pretend"))
