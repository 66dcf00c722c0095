"""Vocabulary trimming to twenty languages: what it saves, how many texts it leaves as they are, and whether it does.

A model of the 80M shape with the Qwen3 tokenizer is trimmed to below 50 million parameters, on all texts of the
development data that are as short as what people search with and store: queries, titles, messages, sentences. Held
out are the texts that `trim_model` itself does not count. Two choices of languages: those of the European Union that
have most text, which share a script but for one; and the languages that have most text at all, Chinese, Japanese and
Korean among them, whose tokens do not fit together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from f2llm.compress.trimming import REPORT_FILE, Trimmed, trim_model
from f2llm.compress.vocabulary import Coverage
from f2llm.data.macrolanguages import table
from f2llm.data.parts import write_part
from f2llm.data.rows import Source, rows_table
from f2llm.embed.embedder import Embedder
from f2llm.files import read_object
from f2llm.model.decoder import parameters_of
from f2llm.rng import generator
from f2llm.text import clean
from f2llm.tokenizer_file import load_tokenizer
from harness import SHARED, Figure, Part, Row, measured, skipped
from inputs import FULL, SEED, SMALL, Size, make_model, synthetic_texts

PARAMETERS = Row("million parameters of an 80M model trimmed to 20 languages", bar=50, better="lower")
COVERED = Row("share of texts whose tokens were all kept, 20 languages of the EU", bar=0.99)
WORST = Row("share of texts whose tokens were all kept, the worst language of the EU")
IDENTICAL = Row("share of such texts whose vectors are the same to the bit", bar=1.0)
COVERED_ANY = Row("share of texts whose tokens were all kept, 20 languages with most text")
WORST_ANY = Row("share of texts whose tokens were all kept, the worst language with most text")

EU = "eng spa fra deu nld ita por pol swe dan ces ell hrv est ron lav slv fin hun slk"
MOST = "eng spa zho jpn fra deu nld ita por rus pol kor hau ibo fas yor tur ara swa ind"
BUDGET = 50_000_000  # parameters
LONGEST = 200  # characters
MAX_LENGTH = 512  # tokens
COMPARED = 10  # texts of a language whose vectors are compared
TEXT_COLUMNS = {
    "text": "lang",
    "query": "query_lang",
    "positive": "positive_lang",
    "sentence1": "lang",
    "sentence2": "lang",
}
SOURCE = Source(
    name="short texts", format="retrieval", task="t", symmetric=True, instruction="", licence="unknown"
)
Texts = dict[str, list[str]]  # by language


@dataclass(frozen=True)
class Choice:
    """Twenty languages, and what is told of them."""

    name: str
    languages: Sequence[str]
    covered: Row
    worst: Row


CHOICES = (
    Choice("languages of the EU", EU.split(), COVERED, WORST),
    Choice("languages with most text", MOST.split(), COVERED_ANY, WORST_ANY),
)


def trimmed_vocabulary(folder: Path, small: bool) -> Part:
    """Trim one model for each choice of languages; vectors are compared for the first."""
    size = SMALL if small else FULL
    if not small and not (SHARED / "tokenizers" / "qwen3").exists():
        rows = (PARAMETERS, COVERED, WORST, IDENTICAL, COVERED_ANY, WORST_ANY)
        return Part([skipped(row, f"{SHARED}/tokenizers/qwen3 is missing") for row in rows], {}, {})
    make_model(folder / "whole", size, synthetic_texts(1000), MAX_LENGTH)
    keep = 400 if small else tokens_within(BUDGET, size)
    figures: list[Figure] = []
    inputs: dict[str, Any] = {}
    for number, choice in enumerate(CHOICES):
        texts = synthetic_corpus(choice.languages) if small else short_texts(choice.languages)
        out = folder / f"trimmed-{number}"
        trimmed = trim(folder / "whole", out, texts, keep)
        shares = {language: share(covered) for language, covered in trimmed.languages.items()}
        if choice is CHOICES[0]:
            identical = share_identical(folder / "whole", out, texts)
            figures += [measured(PARAMETERS, trimmed.parameters[1] / 1e6), measured(IDENTICAL, identical)]
        figures += [
            measured(choice.covered, float(np.mean(list(shares.values())))),
            measured(choice.worst, min(shares.values())),
        ]
        inputs[choice.name] = describe(texts, trimmed, shares)
        print(f"{choice.name}: {inputs[choice.name]}", flush=True)
    return Part(figures, inputs, {})


def tokens_within(parameters: int, size: Size) -> int:
    """How large a vocabulary a model of this size can have."""
    rest = parameters_of(size.decoder) - size.decoder.vocab_size * size.decoder.hidden_size
    return (parameters - rest) // size.decoder.hidden_size


def trim(whole: Path, out: Path, texts: Texts, keep: int) -> Trimmed:
    """The texts as a folder of rows, and the model trimmed to it."""
    corpus = out.with_name(f"{out.name}-corpus")
    columns: dict[str, list[Any]] = {
        "query": [text for of_language in texts.values() for text in of_language],
        "query_lang": [language for language, of_language in texts.items() for _ in of_language],
    }
    write_part(corpus, 0, rows_table(SOURCE, columns))
    return trim_model(whole, out, [corpus], languages=list(texts), keep=keep)


def share(covered: Coverage) -> float:
    return covered.unchanged / covered.texts


def share_identical(whole: Path, trimmed: Path, texts: Texts) -> float:
    """Of some texts of each language whose tokens were all kept."""
    tokenizer = load_tokenizer(whole / "tokenizer.json")
    kept = set(read_object(trimmed / REPORT_FILE)["kept"])
    compared = [
        text
        for language, of_language in texts.items()
        for text in _covered(tokenizer, kept, of_language, language)
    ]
    before, after = (Embedder(folder).encode(compared).view(np.uint32) for folder in (whole, trimmed))
    return float((before == after).all(axis=1).mean())


def _covered(tokenizer: Any, kept: set[int], texts: Sequence[str], language: str) -> list[str]:
    """COMPARED texts of these, in random order, whose tokens were all kept."""
    drawn = (texts[place] for place in generator(SEED, "compared", language).permutation(len(texts)))
    covered = (text for text in drawn if kept.issuperset(tokenizer.encode(clean(text)).ids))
    return [text for text, _ in zip(covered, range(COMPARED), strict=False)]


# --- Texts


def short_texts(languages: Sequence[str]) -> Texts:
    """All distinct texts of the development data that are short and of these languages."""
    found: dict[str, dict[str, None]] = {language: {} for language in languages}
    for path in sorted((SHARED / "data").glob("*/*.parquet")):
        for text, tag in _texts(path):
            language = _language(tag, found)
            if language in found and len(text) <= LONGEST:
                found[language][text] = None
    return {language: list(texts) for language, texts in found.items()}


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Text and language tag."""
    names = pq.read_schema(path).names
    for column, tag in TEXT_COLUMNS.items():
        if column in names:
            read = pq.read_table(path, columns=[column, tag])
            yield from zip(read[column].to_pylist(), read[tag].to_pylist(), strict=True)


def _language(tag: str, wanted: dict[str, Any]) -> str:
    """A tag without its script; one of a macrolanguage stands for it, unless it is wanted itself."""
    code = tag.partition("_")[0]
    return code if code in wanted or code not in table() else table()[code].code


def synthetic_corpus(languages: Sequence[str]) -> Texts:
    """Texts of no meaning, dealt out to the languages."""
    texts = synthetic_texts(100 * len(languages))
    return {language: texts[number :: len(languages)] for number, language in enumerate(languages)}


def describe(texts: Texts, trimmed: Trimmed, shares: dict[str, float]) -> dict[str, Any]:
    """The corpus, and the worst languages."""
    worst = sorted(shares, key=shares.__getitem__)[:5]
    return {
        "languages": " ".join(texts),
        "texts": sum(map(len, texts.values())),
        "texts_of_a_language": f"{min(map(len, texts.values()))} to {max(map(len, texts.values()))}",
        "held_out": sum(covered.texts for covered in trimmed.languages.values()),
        "longest_text": f"{LONGEST} characters",
        "tokens_of_vocabulary": f"{trimmed.tokens[1]} of {trimmed.tokens[0]}",
        "worst": {language: round(shares[language], 3) for language in worst},
    }
