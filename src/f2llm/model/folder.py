"""The model folder on disk, which sentence-transformers and transformers load as it is.

The layout is the legacy sentence-transformers one, which old and new readers both accept; it is laid out for TEI,
vLLM and llama.cpp as well, with which it has not been tried yet. What is ours alone stands
in f2llm.json: EOS, prompt template, Matryoshka sizes, trained maximum length, and hashes of the model, its parent
and its recipe. Weights are read from safetensors only; pickles and code in a folder are never touched.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer

import f2llm
from f2llm.errors import F2Error
from f2llm.files import atomic_write, read_object, sha256_file, write_json, write_text
from f2llm.model.decoder import Decoder, DecoderConfig, config_from_json, config_to_json
from f2llm.model.prompts import TEMPLATE, query_prefix
from f2llm.model.tensor_files import TensorFiles, check_shapes, open_tensors
from f2llm.tokenizer_file import load_tokenizer

SCHEMA_VERSION = 1
FACTS = "f2llm.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"  # of a larger model, which is written in several files


@dataclass(frozen=True)
class ModelFacts:
    """The content of f2llm.json."""

    eos_id: int
    max_length: int  # most tokens of a text in training, EOS included
    matryoshka_sizes: list[int]  # ascending, the last is all that its vectors have
    instruction: str  # default instruction of queries; empty for a model trained without
    template: str = TEMPLATE
    parent: str | None = None  # identity of the model it was trained or cut from
    recipe: str | None = None  # hash of the recipe that made it
    kept: dict[str, Any] | None = None
    """Where it was cut: identity of the uncut model, and what is kept of its hidden units, layers, MLP and heads."""
    merged: dict[str, Any] | None = (
        None  # where it was merged: the method, and identities and weights of models
    )
    exits: list[int] = field(
        default_factory=list
    )  # numbers of layers that were trained to be enough, but for all
    table_ranks: list[int] = field(default_factory=list)  # ranks of the table that were, but for the full one
    table_rank: int | None = None  # the table's own, where it was cut
    dim: int | None = None  # dimensions of the vectors, where they were cut; the hidden width otherwise
    identity: str = ""  # filled in by save_model
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Model:
    """A model in memory: decoder, tokenizer and facts."""

    decoder: Decoder
    tokenizer: Tokenizer
    facts: ModelFacts


def identity_hash(weights: Iterable[Path], config: DecoderConfig, tokenizer: bytes, template: str) -> str:
    """What a vector depends on: weights and the decoder's settings, tokenizer and prompt template.

    Args:
        weights: the safetensors files, in order.
        tokenizer: the content of tokenizer.json.
    """
    settings = json.dumps(asdict(config), sort_keys=True)
    parts = (*map(sha256_file, weights), settings, hashlib.sha256(tokenizer).hexdigest(), template)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def save_model(folder: Path, model: Model) -> ModelFacts:
    """Write a complete model folder; f2llm.json comes last. Returns the facts with the identity filled in."""
    with atomic_write(folder / WEIGHTS) as file:
        tensors = {name: t.detach().contiguous() for name, t in model.decoder.state_dict().items()}
        file.write(save(tensors, metadata={"format": "pt"}))
    return complete_folder(folder, model.decoder.config, model.tokenizer, model.facts)


def complete_folder(
    folder: Path, config: DecoderConfig, tokenizer: Tokenizer, facts: ModelFacts
) -> ModelFacts:
    """Write all of a model folder but its weights, which are there; returns the facts with the identity."""
    description = tokenizer.to_str(pretty=False)
    write_text(folder / "tokenizer.json", description)
    matryoshka = {"is_matryoshka": True, "matryoshka_dimensions": facts.matryoshka_sizes}
    write_json(folder / "config.json", {**config_to_json(config), **matryoshka})
    write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, facts))
    for name, content in _sentence_transformers_files(config, facts).items():
        write_json(folder / name, content)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    identity = identity_hash([folder / WEIGHTS], config, description.encode(), facts.template)
    facts = replace(facts, identity=identity)
    write_json(folder / FACTS, asdict(facts))
    return facts


def pad_id(tokenizer: Tokenizer, eos_id: int) -> int:
    """The token that other runtimes fill up with: the first special one but EOS, or EOS if there is no other.

    Where both are one token, a runtime that looks for the last token that is no padding cuts EOS off.
    """
    special = sorted(
        number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special
    )
    return next((number for number in special if number != eos_id), eos_id)


def _tokenizer_config(tokenizer: Tokenizer, facts: ModelFacts) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts.max_length,
        "padding_side": "left",
        "eos_token": tokenizer.id_to_token(facts.eos_id),
        "pad_token": tokenizer.id_to_token(pad_id(tokenizer, facts.eos_id)),
        "add_eos_token": True,
        "clean_up_tokenization_spaces": False,
    }


def _sentence_transformers_files(config: DecoderConfig, facts: ModelFacts) -> dict[str, Any]:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    other_poolings = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
    query = query_prefix(facts.instruction, facts.template) if facts.instruction else ""
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            **{f"pooling_mode_{name}": False for name in other_poolings},
            "pooling_mode_lasttoken": True,
            "include_prompt": True,
        },
        "sentence_bert_config.json": {"max_seq_length": facts.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "__version__": {"f2llm": f2llm.__version__},
            "prompts": {"query": query, "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            **({"truncate_dim": facts.dim} if facts.dim else {}),
        },
    }


def load_model(folder: Path) -> Model:
    """Read a model folder, float32, and check that it is what its f2llm.json says.

    Raises F2Error if the folder is not a model, was changed after it was written, or needs another decoder.
    """
    facts = read_facts(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    decoder = load_decoder(folder)
    check_identity(folder, facts, decoder.config)
    return Model(decoder, tokenizer, facts)


def read_facts(folder: Path) -> ModelFacts:
    """What f2llm.json says."""
    if not (folder / FACTS).is_file():
        raise F2Error(f"{folder} is not a model folder: it has no {FACTS}; point to a folder made by f2llm.")
    values = read_object(folder / FACTS)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise F2Error(
            f"{folder}/{FACTS} has schema_version {values.get('schema_version')!r}, expected {SCHEMA_VERSION}; "
            "install the f2llm version that wrote it."
        )
    try:
        return ModelFacts(**values)
    except TypeError as error:
        raise F2Error(f"{folder}/{FACTS} is incomplete ({error}); make the folder again.") from None


def check_identity(folder: Path, facts: ModelFacts, config: DecoderConfig) -> None:
    """Raise F2Error if the folder's files do not give the identity in its f2llm.json."""
    content = (folder / "tokenizer.json").read_bytes()
    if identity_hash(weight_files(folder), config, content, facts.template) != facts.identity:
        raise F2Error(
            f"{folder} was changed after it was written: weights, settings, tokenizer and template do not give the "
            "identity in f2llm.json; copy or make the folder again."
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order: one, or those that its index names."""
    if (folder / WEIGHTS).is_file() or not (folder / WEIGHTS_INDEX).is_file():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise F2Error(f"{index} has no weight_map; copy the folder again from the model's source.")
    for name in names.values():
        # A path would read files from outside the folder, another ending a pickle.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise F2Error(
                f"{index} names {name!r}, expected a safetensors file beside it; use another model."
            )
    return [folder / name for name in sorted(set(names.values()))]


def read_config(folder: Path) -> DecoderConfig:
    return config_from_json(read_object(folder / "config.json"), f"{folder}/config.json")


@contextmanager
def open_weights(folder: Path, config: DecoderConfig) -> Iterator[TensorFiles]:
    """The tensors of a folder, to be read one at a time; F2Error if they are not those that `config` calls for."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}
    with open_tensors(weight_files(folder)) as tensors:
        check_shapes(tensors.shapes, expected, folder / WEIGHTS)
        yield tensors


def load_decoder(folder: Path) -> Decoder:
    """The decoder of any Qwen3 folder with safetensors, in float32 and evaluation mode.

    A language model's output head is left out.
    """
    config = read_config(folder)
    with open_weights(folder, config) as tensors:
        state = {name: tensors.read(name) for name in tensors.shapes}
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.load_state_dict(state, assign=True)
    return decoder.eval()


def model_size(decoder: Decoder) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in decoder.parameters())
