"""Which language a text is written in, by a detector that needs no network, and what that says of the text's tag.

text -> its first 200 characters -> py3langid (naive Bayes on byte n-grams; its model comes with the package) ->
language and probability -> a verdict on the tag. The detector knows 139 languages. Of the other languages, of short
texts and of scripts that a language is not usually written in it can only be wrong, so these are not judged, and the
source's tag stays. A verdict against a tag needs a probability of `sure` and a language that is neither of the same
macrolanguage nor easily confused with it.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

from f2llm import languages as lang
from f2llm.data.macrolanguages import family, in_form
from f2llm.errors import F2Error, UsageError

JUDGED_CHARACTERS = 200  # more make it slower and no better
LEAST_BYTES = 40  # of letters in UTF-8: about 40 letters of Latin, 20 of Cyrillic, 13 of Chinese
NO_LANGUAGE = "zxx"

# Languages in a line are told apart badly, or one is often tagged as another, so none speaks against another.
CONFUSED = [
    set(line.split())
    for line in (
        "nor nob nno dan",
        "hbs bos cnr hrv srp slv",
        "msa zsm ind jav bjn min sun",
        "zho cmn wuu yue lzh nan",
        "ces slk",
        "spa ast glg por ext arg cat",
        "oci cat",
        "ita vec lij",
        "fra wln gcf gcr hat",
        "eng pcm",
        "afr nld",
        "aze azj azb tur crh tuk",
        "tat bak",
        "uzb uzn uzs",
        "zul xho ssw nbl nde",
        "sot nso tsn",
        "lav lvs ltg",
        "fas pes prs tgk",
        "hin mar nep npi san bho mai awa mag hne",
        "ben asm",
        "grc ell",
        "heb hbo",
        "deu ltz",
        "kin run",
        "bul mkd",
    )
]

# Written in several scripts, so that without a script in its tag a text in another than the usual one proves nothing.
MANY_SCRIPTS = frozenset(
    "aze azj fuv hau jav kas kaz khk kir kmr kur mon msa pan pli san snd sun tat tgk tuk uig uzb uzn zsm".split()
)

AGREES: Final = "language as tagged"
SHORT: Final = "too short to tell the language"
UNKNOWN: Final = "language not known to the detector"
UNSURE: Final = "language not sure"
OTHER: Final = "written in another language than tagged"


class Guess(NamedTuple):
    """What the detector says of a text."""

    language: str
    """ISO 639-3."""
    probability: float


@cache
def _detector() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise F2Error(
            "telling languages apart needs py3langid, which is not installed; run `pip install 'f2llm[data]'`."
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _code(label: str) -> str:
    return label if label == NO_LANGUAGE else _tag(label)


def _tag(label: str) -> str:
    try:
        return lang.tag(label)
    except UsageError:  # of languages that CLDR has not, labels are ISO 639-3 already
        return label


@cache
def known() -> frozenset[str]:
    """ISO 639-3 codes of the languages that the detector tells apart; a macrolanguage as the language meant by it."""
    return frozenset(in_form(_code(label), "individual") for label in _detector().labels) - {NO_LANGUAGE}


def detect(texts: Iterable[str]) -> list[Guess]:
    """The most probable language of each text, by its first 200 characters."""
    classify = _detector().classify
    guesses = []
    for text in texts:
        label, probability = classify(text[:JUDGED_CHARACTERS])
        guesses.append(Guess(_code(label), float(probability)))
    return guesses


@cache
def can_judge(tag: str) -> bool:
    """Whether the detector knows the language of a tag in the script that it is written in."""
    code = tag.partition("_")[0]
    usual = "_" not in tag or _script(code) == _script(tag)
    return usual and in_form(code, "individual") in known()


@cache
def may_be(tag: str, language: str) -> bool:
    """Whether a text with this tag may well be found to be in the language."""
    code = tag.partition("_")[0]
    return family(code) == family(language) or any({code, language} <= group for group in CONFUSED)


def verdict(tag: str, text: str, guess: Guess, sure: float) -> str:
    """One of the five verdicts above on a text's tag."""
    if not can_judge(tag):
        return UNKNOWN
    if is_short(text):
        return SHORT
    if may_be(tag, guess.language):
        return AGREES
    if guess.probability < sure or guess.language == NO_LANGUAGE or _may_be_transcribed(tag, guess.language):
        return UNSURE
    # Names quoted in another script weigh more than the text around them.
    main = in_main_script(text[:JUDGED_CHARACTERS])
    return OTHER if main == text[:JUDGED_CHARACTERS] else verdict(tag, main, detect([main])[0], sure)


@cache
def _may_be_transcribed(tag: str, language: str) -> bool:
    return tag in MANY_SCRIPTS and lang.script(tag) != _script(language)


def _script(language: str) -> str:
    try:
        return lang.script(language)
    except UsageError:
        return ""


def is_short(text: str) -> bool:
    """Whether a text has too few letters for a guess to count."""
    letters = (c for c in text[:JUDGED_CHARACTERS] if unicodedata.category(c)[0] in "LM")
    return len("".join(letters).encode()) < LEAST_BYTES


def in_main_script(text: str) -> str:
    """The text without the letters of scripts other than that of most of its letters."""
    scripts = [_alphabet(c) for c in text]
    counts = Counter(script for script in scripts if script)
    main = counts.most_common(1)[0][0] if counts else ""
    return "".join(c for c, script in zip(text, scripts, strict=True) if script in ("", main))


@cache
def _alphabet(character: str) -> str:
    """The first word of a letter's name in Unicode, which is its script's; the scripts of East Asia are one."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    word = unicodedata.name(character, "").partition(" ")[0]
    return "CJK" if word in ("HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO") else word


def accuracy(texts: Sequence[str], tags: Sequence[str]) -> dict[str, dict[str, float]]:
    """How well the detector does on texts whose tags are right: by tag its texts, and the shares it tells.

    `known` is 1 where the detector can judge the tag, `right` the share of texts found to be of that very language
    (or of its macrolanguage's), `dropped` the share that `verdict` would hold against the tag at a probability of 0.9.
    """
    found: dict[str, dict[str, float]] = {}
    for text, tag, guess in zip(texts, tags, detect(texts), strict=True):
        row = found.setdefault(
            tag, {"texts": 0, "known": float(can_judge(tag)), "right": 0.0, "dropped": 0.0}
        )
        row["texts"] += 1
        row["right"] += in_form(tag.partition("_")[0], "individual") == in_form(guess.language, "individual")
        row["dropped"] += verdict(tag, text, guess, 0.9) == OTHER
    for row in found.values():
        row["right"] /= row["texts"]
        row["dropped"] /= row["texts"]
    return found
