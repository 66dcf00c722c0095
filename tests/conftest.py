"""Fixtures shared by all tests: the development data, 20 things named in six languages, and a tiny model of them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer

from f2llm.data.rows import Source, rows_table, write_rows
from f2llm.model.decoder import Decoder, DecoderConfig
from f2llm.model.folder import Model, ModelFacts, save_model
from f2llm.model.tokenizer import EOS, train_bpe
from f2llm.train.objective import matryoshka_sizes

SHARED = Path(__file__).resolve().parents[2] / "shared"
LANGUAGES = ("eng", "fra", "rus", "hin", "swa", "zho")
INSTRUCTION = "Find this name in another language"

MakeModel = Callable[..., Model]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development data beside the checkout; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the development data folder {SHARED} is absent")
    return SHARED


@pytest.fixture(scope="session")
def things() -> list[dict[str, str]]:
    """Twenty things, each with `thing`, `kind` and a name in each of six languages."""
    with open(Path(__file__).with_name("things.tsv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="session")
def names(things: list[dict[str, str]]) -> list[str]:
    """The distinct names of all things, sorted."""
    return sorted({thing[lang] for thing in things for lang in LANGUAGES})


@pytest.fixture(scope="session")
def rows_folder(things: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Canonical rows of the three formats: 120 names, the kind of each, and whether it is a country."""
    facts = {"task": "names", "symmetric": True, "licence": "CC0-1.0"}
    named = [(thing, lang, thing[lang]) for thing in things for lang in LANGUAGES]
    query = {"query": [name for _, _, name in named], "query_lang": [lang for _, lang, _ in named]}
    others = [[n for n in (thing[lang] for lang in LANGUAGES) if n != name] for thing, _, name in named]
    sources = [
        Source(name="names", format="retrieval", instruction=INSTRUCTION, **facts),
        Source(name="kinds", format="clustering", instruction="Say what kind of thing this is", **facts),
        Source(name="country", format="classification", instruction="Is this a country", **facts),
    ]
    labels: list[dict[str, list[Any]]] = [
        {"positives": others, "label": [thing["thing"] for thing, _, _ in named]},
        {"label": [thing["kind"] for thing, _, _ in named]},
        {"label": ["country" if thing["kind"] == "country" else "other" for thing, _, _ in named]},
    ]
    tables = [rows_table(source, {**query, **label}) for source, label in zip(sources, labels, strict=True)]
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder, pa.concat_tables(tables), sources)
    return folder


@pytest.fixture(scope="session")
def tokenizer(names: list[str]) -> Tokenizer:
    """A byte-level BPE of at most 512 entries, trained on the names."""
    return train_bpe(names, 512)


@pytest.fixture(scope="session")
def make_model(tokenizer: Tokenizer) -> MakeModel:
    """Makes a tiny model of random weights; keywords are fields of `DecoderConfig`, and `seed`.

    The weights are far larger than those training starts with, and norms are not at one, so that nothing that a
    mistake would change is hidden by being small.
    """

    def make(seed: int = 0, max_length: int = 64, **changes: int | float) -> Model:
        shape = {
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
        config = DecoderConfig(**{**shape, **changes})  # type: ignore[arg-type]
        decoder = Decoder(config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in decoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 1 + 0.3 * noise if name.endswith("norm.weight") else 0.3 * noise
        sizes = matryoshka_sizes(config.hidden_size)
        eos_id = tokenizer.token_to_id(EOS)
        assert eos_id is not None
        facts = ModelFacts(eos_id, max_length, sizes, instruction=INSTRUCTION)
        return Model(decoder.eval(), tokenizer, facts)

    return make


@pytest.fixture(scope="session")
def model_folder(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk; tests that change the folder copy it first."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, make_model())
    return folder
