"""What benchmarks feed to their contenders: texts of a real length mix, and a model folder with random weights.

Texts come from the development data beside the checkout, the same number from each of its files, so that many
languages and lengths are in; where it is absent (or for a trial with --small), from a built-in synthetic mix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from f2llm.data.names import RETRIEVAL, collect, retrieval_rows
from f2llm.errors import F2Error
from f2llm.family import FAMILY
from f2llm.model.decoder import Decoder, DecoderConfig, initialise
from f2llm.model.folder import Model, ModelFacts, model_size, save_model
from f2llm.model.prompts import query_prefix
from f2llm.model.tokenizer import append_eos, encode, train_bpe
from f2llm.rng import generator
from f2llm.tokenizer_file import load_tokenizer
from f2llm.train.objective import matryoshka_sizes
from harness import SHARED

SEED = 0
QWEN3_EOS = "<|im_end|>"

QUERIES = [("retrieval", "query")]
DOCUMENTS = [("retrieval", "positive")]
EVERYTHING = [*QUERIES, *DOCUMENTS, ("parallel", "text")]

# Words for texts of no meaning in five scripts, where real ones are not at hand.
WORDS = (
    "water mountain to read between seven evening quickly",
    "вода гора читать между семь вечер быстро дорога",
    "ماء جبل يقرأ بين سبعة مساء بسرعة طريق",
    "पानी पहाड़ पढ़ना बीच सात शाम जल्दी सड़क",
    "水 山 读书 之间 七 傍晚 很快 道路",
)


@dataclass(frozen=True)
class Size:
    """How much work a benchmark does: the figures are taken at FULL, SMALL only tries the scripts."""

    name: str
    decoder: DecoderConfig
    real: bool  # real texts and the real tokenizer, where they are at hand


def family_size(name: str) -> Size:
    """A member of the family, on real texts."""
    member = FAMILY[name]
    decoder = DecoderConfig(
        vocab_size=member.vocab_size,
        hidden_size=member.hidden_size,
        intermediate_size=member.intermediate_size,
        num_hidden_layers=member.layers,
        num_attention_heads=member.heads,
        num_key_value_heads=member.kv_heads,
        head_dim=member.head_dim,
    )
    return Size(name, decoder, real=True)


FULL = family_size("80M")
SMALL = Size("small", DecoderConfig(1024, 64, 128, 2, 4, 2, 32), real=False)  # fits the tiles of matrix units


def draw_texts(size: Size, columns: list[tuple[str, str]], count: int) -> tuple[list[str], str]:
    """`count` distinct texts and where they come from.

    Args:
        columns: (folder of the development data, column of its files).
    """
    files = [
        (p, column) for folder, column in columns for p in sorted(SHARED.glob(f"data/{folder}/*.parquet"))
    ]
    if not size.real or not files:
        return synthetic_texts(count), "synthetic words, five scripts"
    drawn = [_column(path, column, count) for path, column in files]
    # One of each file in turn; a file's turns come in an order of their own, so that no file rules a short list.
    order = generator(SEED, "files").permutation(len(files))
    in_turn = (drawn[i][turn] for turn in range(count) for i in order if turn < len(drawn[i]))
    texts = list(dict.fromkeys(in_turn))[:count]
    if len(texts) < count:
        raise F2Error(f"{SHARED}/data has {len(texts)} distinct texts for this draw, expected {count}.")
    return texts, f"shared/data: {', '.join(f'{folder} ({column})' for folder, column in columns)}"


def _column(path: Path, column: str, count: int) -> list[str]:
    values = pq.read_table(path, columns=[column])[column]
    rows = generator(SEED, path.name, column).permutation(len(values))[:count]
    return [str(text) for text in values.take(rows).to_pylist()]


def synthetic_texts(count: int) -> list[str]:
    """Distinct texts of log-normal length, 12 words at the median and 200 at most."""
    rng = generator(SEED, "synthetic")
    texts: dict[str, None] = {}
    while len(texts) < count:
        words = WORDS[rng.integers(len(WORDS))].split()
        texts[" ".join(rng.choice(words, min(200, 1 + int(rng.lognormal(2.5, 1.0)))))] = None
    return list(texts)


def draw_names(count: int) -> tuple[list[str], str]:
    """`count` names of things as queries, with their instruction, then as many in other languages as their positives.

    They come from Unicode CLDR, which is always at hand.
    """
    table = retrieval_rows(collect(min_names=100), positives=1, seed=SEED)
    drawn = table.take(generator(SEED, "names").permutation(len(table))[:count])
    prefix = query_prefix(RETRIEVAL.instruction)
    queries = [prefix + name for name in drawn["query"].to_pylist()]
    positives = [names[0] for names in drawn["positives"].to_pylist()]
    return [*queries, *positives], "names from Unicode CLDR, half of them behind an instruction"


def make_model(folder: Path, size: Size, texts: Sequence[str], max_length: int) -> Model:
    """Write a model folder with random weights of this size, and return the model.

    The tokenizer is Qwen3's where it is at hand, otherwise one trained on `texts`; either appends EOS.
    """
    path = SHARED / "tokenizers" / "qwen3" / "tokenizer.json"
    if size.real and path.exists():
        tokenizer = load_tokenizer(path)
        append_eos(tokenizer, QWEN3_EOS)
    else:
        tokenizer = train_bpe(texts, size.decoder.vocab_size)
    decoder = Decoder(size.decoder)
    initialise(decoder, torch.Generator().manual_seed(SEED))
    facts = ModelFacts(
        eos_id=tokenizer.encode("").ids[-1],
        max_length=max_length,
        matryoshka_sizes=matryoshka_sizes(size.decoder.hidden_size),
        instruction="",
    )
    model = Model(decoder, tokenizer, facts)
    save_model(folder, model)
    return model


def token_ids(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, cut to the model's longest, EOS at the end."""
    facts = model.facts
    return encode(
        model.tokenizer, texts, eos_id=facts.eos_id, max_length=facts.max_length, too_long="truncate"
    )


def describe(size: Size, model: Model, ids: list[list[int]], origin: str) -> dict[str, Any]:
    """Model and length mix, for the reader of a figure."""
    lengths = [len(sequence) for sequence in ids]
    low, median, high = np.quantile(lengths, [0.1, 0.5, 0.9]).round().astype(int).tolist()
    return {
        "model": f"{size.name} shape, random weights",
        "parameters": model_size(model.decoder),
        "tokenizer_entries": model.tokenizer.get_vocab_size(),
        "texts": len(ids),
        "origin": origin,
        "seed": SEED,
        "tokens": sum(lengths),
        "tokens_per_text": {"p10": low, "median": median, "p90": high, "max": max(lengths)},
        "cut_at_tokens": model.facts.max_length,
        "texts_cut": sum(length == model.facts.max_length for length in lengths),
    }
