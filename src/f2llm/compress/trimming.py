"""The command around vocabulary trimming: a model and a corpus in, a smaller model and what it covers out.

Of the corpus, one text in HELD_OUT is not counted: on these it is measured how many texts of each language keep their
tokens, and so their vectors, and how much longer the others become.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from f2llm.compress.vocabulary import NOTHING, TEXTS_AT_ONCE, Coverage, coverage, tokens_to_keep, trim, usage
from f2llm.data.corpus_texts import iterate_corpus
from f2llm.data.parts import carry_decontamination
from f2llm.errors import UsageError
from f2llm.files import write_json
from f2llm.model.base import load_base
from f2llm.model.folder import ModelFacts, model_size, save_model
from f2llm.model.prompts import query_prefix
from f2llm.model.slices import load_basis, save_basis

HELD_OUT = 20
REPORT_FILE = "vocabulary.json"


@dataclass(frozen=True)
class Trimmed:
    """What came of a model."""

    facts: ModelFacts
    tokens: tuple[int, int]  # of the vocabulary, before and after
    parameters: tuple[int, int]
    languages: dict[str, Coverage]  # of held-out texts; by language, sorted


def trim_model(
    model: str | Path,
    out: Path,
    corpus: Sequence[Path],
    *,
    languages: Collection[str] | None = None,
    keep: int | None = None,
    column: str = "text",
) -> Trimmed:
    """Write the folder of the model with the tokens that a corpus uses.

    Args:
        model: as `load_base` takes it.
        corpus, languages, column: as `iterate_corpus` takes them. Texts count as they are and behind the model's own
            prompt.
        keep: most tokens, by their uses in a mean text of each language; all that the corpus uses without it.

    Raises:
        UsageError: the corpus has no text of these languages, or `keep` is too small.
    """
    whole = load_base(model)
    prefix = query_prefix(whole.facts.instruction, whole.facts.template) if whole.facts.instruction else ""

    def texts(held_out: bool) -> Iterator[tuple[str, str]]:
        found = iterate_corpus(corpus, languages, column)
        return ((of, text) for of, text in found if (zlib.crc32(text.encode()) % HELD_OUT == 0) == held_out)

    uses_V = _uses_of_languages(whole.tokenizer, texts(held_out=False), prefix)
    if uses_V is None:
        of = f" of {', '.join(sorted(languages))}" if languages else ""
        raise UsageError(
            f"{', '.join(map(str, corpus))} has no text{of} to count tokens in; give another corpus."
        )
    kept_K = tokens_to_keep(whole.tokenizer, uses_V, keep)
    small = trim(whole, kept_K)
    covered = _by_language(
        texts(held_out=True),
        lambda some: coverage(whole.tokenizer, small.tokenizer, kept_K, _also_asked(some, prefix)),
    )
    carry_decontamination([Path(model)] if Path(model).is_dir() else [], out)
    if (
        Path(model).is_dir()
        and (basis_EE := load_basis(Path(model), whole.decoder.config.hidden_size)) is not None
    ):
        save_basis(out, basis_EE)
    write_json(out / REPORT_FILE, {"kept": kept_K.tolist(), "of": whole.facts.identity})
    facts = save_model(out, small)
    return Trimmed(
        facts,
        (whole.decoder.config.vocab_size, len(kept_K)),
        (model_size(whole.decoder), model_size(small.decoder)),
        covered,
    )


def _uses_of_languages(
    tokenizer: Tokenizer, texts: Iterator[tuple[str, str]], prefix: str
) -> npt.NDArray[np.float64] | None:
    """Uses of each token in a mean text, added up over languages [V], so that each counts alike; None without texts."""
    uses: dict[str, npt.NDArray[np.int64]] = {}
    counts: Counter[str] = Counter()
    for language, own in _grouped(texts):
        found_V = usage(tokenizer, _also_asked(own, prefix))
        uses[language] = uses.get(language, 0) + found_V
        counts[language] += len(own)
    each = [uses[language] / count for language, count in counts.items()]
    return np.sum(each, axis=0) if each else None


def _also_asked(texts: Iterable[str], prefix: str) -> Iterator[str]:
    """Each text, and it behind the prompt: the space in front changes a text's first token."""
    return chain.from_iterable((text, prefix + text) if prefix else (text,) for text in texts)


def _by_language(
    texts: Iterator[tuple[str, str]], measure: Callable[[list[str]], Coverage]
) -> dict[str, Coverage]:
    total: dict[str, Coverage] = {}
    for language, own in _grouped(texts):
        total[language] = total.get(language, NOTHING) + measure(own)
    return dict(sorted(total.items()))


def _grouped(texts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Some texts of a language at a time."""
    while some := list(islice(texts, TEXTS_AT_ONCE)):
        found: dict[str, list[str]] = {}
        for language, text in some:
            found.setdefault(language, []).append(text)
        yield from found.items()
