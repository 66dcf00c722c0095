"""The texts on which an export is compared with its model: the caller's, or names of places in many scripts.

Names come from Unicode CLDR through babel, so no network is needed. Each is a question whose answer is the English
name; lists of names stand for longer texts.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from tokenizers import Tokenizer

from f2llm.data.names import ENGLISH, Name, collect
from f2llm.errors import UsageError
from f2llm.text import clean

LANGUAGES = ("fra", "rus", "hin", "swa", "zho", "ara", "jpn", "kor", "tha", "tur", "amh", "vie")
KIND = "territory"
THINGS = 25
LISTED = (10, 40)  # names in the longer texts
MOST_TEXTS = 1000


@dataclass(frozen=True)
class Sample:
    """Texts without prompts, and which of them are questions and answers."""

    texts: list[str]
    pairs: list[tuple[int, int]] = field(default_factory=list)  # number of a question, number of its answer

    def prompted(self, prefix: str) -> list[str]:
        """The texts as they go into the model: with a prompt in front of questions."""
        questions = {question for question, _ in self.pairs}
        return [prefix + text if number in questions else text for number, text in enumerate(self.texts)]


def sample(tokenizer: Tokenizer, limit: int, prefix: str, texts: Sequence[str] | None) -> Sample:
    """The first texts of the caller, or our own; those of more than `limit` tokens are left out.

    Raises:
        UsageError: no text is left.
    """
    found = Sample([clean(text) for text in islice(texts, MOST_TEXTS)]) if texts is not None else _names()
    lengths = count_tokens(tokenizer, found.prompted(prefix))
    kept = [old for old, length in enumerate(lengths) if length <= limit]
    if not kept:
        raise UsageError(
            f"of {len(found.texts)} texts to compare none has {limit} tokens or less; give others."
        )
    new = {old: number for number, old in enumerate(kept)}
    pairs = [(new[q], new[a]) for q, a in found.pairs if q in new and a in new]
    return Sample([found.texts[old] for old in kept], pairs)


def count_tokens(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """Tokens of each text, EOS included."""
    return [len(encoded.ids) for encoded in tokenizer.encode_batch_fast(texts)]


def _names() -> Sample:
    things: dict[str, list[Name]] = defaultdict(list)
    for name in collect(1, list(LANGUAGES)):
        if name.kind == KIND:
            things[name.thing].append(name)
    everywhere = [names for names in things.values() if len(names) == len(LANGUAGES) + 1]
    texts: list[str] = []
    pairs = []
    for names in everywhere[:: len(everywhere) // THINGS][:THINGS]:
        answer = len(texts)
        texts += [name.text for name in sorted(names, key=lambda name: name.lang != ENGLISH)]
        pairs += [(question, answer) for question in range(answer + 1, len(texts))]
    for lang in LANGUAGES:
        listed = [name.text for names in everywhere for name in names if name.lang == lang]
        texts += [", ".join(listed[:count]) for count in LISTED]
    return Sample(texts, pairs)
