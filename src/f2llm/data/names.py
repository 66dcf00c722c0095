"""Names of things in hundreds of languages, from Unicode CLDR through babel: the training data that needs no network.

locales -> names (thing, kind, language, text) -> split (train | pair | thing) -> names.parquet for the evaluation,
and from the training names alone canonical rows in the three formats:

- cldr-names, retrieval: a name -> names of the same thing in other languages;
- cldr-kinds, clustering: a name, its kind as class;
- cldr-territory-or-currency, two-way classification: is it a territory or a currency?
"""

import hashlib
import pickle
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from babel import localedata

from f2llm import languages as lang
from f2llm.data.rows import Source, rows_table, write_rows
from f2llm.errors import UsageError
from f2llm.files import write_table
from f2llm.progress import progress
from f2llm.recipe_data import NamesStage
from f2llm.rng import generator
from f2llm.text import clean

NAMES_FILE = "names.parquet"
ENGLISH = "eng"
KINDS = ("territory", "language", "script", "currency", "unit", "month", "weekday")
TWO_WAY = ("territory", "currency")
LICENCE = "Unicode-3.0"

RETRIEVAL = Source(
    name="cldr-names",
    format="retrieval",
    task="translation",
    symmetric=True,
    instruction="Translate this name",
    licence=LICENCE,
)
CLUSTERING = Source(
    name="cldr-kinds",
    format="clustering",
    task="kind",
    symmetric=True,
    instruction="Tell what kind of thing this name is for",
    licence=LICENCE,
)
CLASSIFICATION = Source(
    name="cldr-territory-or-currency",
    format="classification",
    task="territory-or-currency",
    symmetric=False,
    instruction="Decide whether this is the name of a territory or of a currency",
    licence=LICENCE,
)

Split = Literal["train", "pair", "thing"]


class Name(NamedTuple):
    """What one thing is called in one language."""

    thing: str
    """What is named: kind and CLDR code, such as "territory:DE", "month:1", "weekday:0" (Monday)."""
    kind: str
    lang: str
    text: str


def collect(min_names: int, languages: list[str] | None = None) -> list[Name]:
    """All names in CLDR, ordered by thing and language, of every language that has at least `min_names` of them.

    `languages` (any form that languages.tag takes) keeps those alone, and English, whose names are the candidates of
    the evaluation. Raises UsageError for a language that is unknown or has too few names.
    """
    asked = {ENGLISH, *map(lang.tag, languages or ())}
    names: list[Name] = []
    found: Counter[str] = Counter()
    locales = [locale for locale in localedata.locale_identifiers() if _is_language(locale)]
    with progress(total=len(locales), what="read CLDR", unit="locale") as bar:
        for locale in locales:
            tag = lang.tag(locale)
            if languages is None or tag in asked:
                own = list(_names_of(tag, _own_data(locale)))
                found[tag] = len(own)
                if len(own) >= min_names:
                    names += own
            bar.advance()
    for tag in sorted(asked):
        if found[tag] < min_names:
            raise UsageError(
                f"CLDR has {found[tag]} names in {lang.english_name(tag)} ({tag}), fewer than min_names = {min_names}; "
                f"lower min_names{'' if tag == ENGLISH else ' or leave the language out'}."
            )
    return sorted(names)


def _is_language(locale: str) -> bool:
    """Whether a locale is a language, perhaps in a script, but not in a region: `zh` and `zh_Hant`, not `zh_TW`."""
    return all(len(part) == 4 for part in locale.split("_")[1:])


def _own_data(locale: str) -> dict[str, Any]:
    """What CLDR says in this very locale, without what it inherits (codes like `M01` from the root, English...).

    Read from babel's own file: localedata.load would put the part where other users of babel expect the whole. (The
    file is a pickle, but one that came with the installed library, as much code as the library itself.)
    """
    with open(localedata.resolve_locale_filename(locale), "rb") as file:
        return pickle.load(file)


def _names_of(tag: str, data: dict[str, Any]) -> Iterator[Name]:
    by_kind: dict[str, dict[Any, str]] = {
        "territory": data.get("territories", {}),
        "language": data.get("languages", {}),
        "script": data.get("scripts", {}),
        "currency": data.get("currency_names", {}),
        "unit": {code: _long(forms) for code, forms in data.get("unit_display_names", {}).items()},
        "month": _wide(data.get("months", {})),
        "weekday": _wide(data.get("days", {})),
    }
    for kind, texts in by_kind.items():
        for code, text in texts.items():
            # A text that repeats its code stands for a missing name, save in English ("Thai" is a script's name).
            if text.strip() and (text != str(code) or tag == ENGLISH):
                yield Name(f"{kind}:{code}", kind, tag, clean(text))


def _long(forms: dict[str, str]) -> str:
    """The long name of a unit, which CLDR leaves out where it is the short one, as in German `Meter`."""
    return forms.get("long") or forms.get("short", "")


def _wide(forms: dict[str, Any]) -> dict[int, str]:
    """Full names of months or weekdays as they stand alone; where a language makes no difference, as in a date."""
    return {**forms.get("format", {}).get("wide", {}), **forms.get("stand-alone", {}).get("wide", {})}


def split(names: Iterable[Name], *, seed: int, held_out_pairs: float, held_out_things: float) -> list[Split]:
    """For each name: "thing" where its whole thing is held out, "pair" where this name is, otherwise "train".

    The two shares are in [0, 1]. A name's lot depends on the seed, its thing and its language alone, never on the
    other names. English names are not held out as pairs: they are the candidates that held-out names must find.
    """

    def lot(name: Name) -> Split:
        if _chance(seed, name.thing) < held_out_things:
            return "thing"
        if name.lang != ENGLISH and _chance(seed, name.thing, name.lang) < held_out_pairs:
            return "pair"
        return "train"

    return [lot(name) for name in names]


def _chance(*keys: int | str) -> float:
    """A number in [0, 1) that is a function of `keys` alone."""
    digest = hashlib.sha256("\x1f".join(map(str, keys)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def retrieval_rows(names: Iterable[Name], *, positives: int, seed: int) -> pa.Table:
    """One row for each distinct name of a thing that has another one.

    Its positives are the English name, if it is another, and then names drawn from the other languages, `positives`
    in all at most. A string that several languages share stands once, with the language `mul`.
    """
    columns: dict[str, list[Any]] = defaultdict(list)
    ordered = sorted(names)
    with progress(total=len(ordered), what="pair names", unit="name") as bar:
        for thing, named in groupby(ordered, key=lambda name: name.thing):
            group = list(named)
            langs: dict[str, set[str]] = defaultdict(set)  # of each distinct text
            for name in group:
                langs[name.text].add(name.lang)
            english = [text for text in langs if ENGLISH in langs[text]]  # one or none
            # The others lie in a shuffled ring, and a name's positives are those that follow it: a fair draw in which
            # every name is the positive of equally many.
            ring = [text for text in langs if text not in english]
            generator(seed, RETRIEVAL.name, thing).shuffle(ring)
            others = {text: english + ring[place + 1 :] + ring[:place] for place, text in enumerate(ring)}
            others |= dict.fromkeys(english, ring)
            for text, answers in others.items():
                if answers := answers[:positives]:
                    columns["query"].append(text)
                    columns["positives"].append(answers)
                    columns["label"].append(thing)
                    columns["query_lang"].append(_sole(langs[text]))
                    columns["positive_lang"].append(
                        _sole(set().union(*(langs[answer] for answer in answers)))
                    )
            bar.advance(len(group))
    return rows_table(RETRIEVAL, columns)


def labelled_rows(source: Source, names: Iterable[Name], kinds: Collection[str] = KINDS) -> pa.Table:
    """One row for each distinct (name, kind) of `kinds`, with the kind as its label."""
    langs: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in names:
        if name.kind in kinds:
            langs[name.text, name.kind].add(name.lang)
    columns = {
        "query": [text for text, _ in langs],
        "label": [kind for _, kind in langs],
        "query_lang": [_sole(tags) for tags in langs.values()],
    }
    return rows_table(source, columns)


def _sole(langs: set[str]) -> str:
    return next(iter(langs)) if len(langs) == 1 else lang.MIXED


def names_stage(config: NamesStage, out: Path, seed: int) -> dict[str, Any]:
    """Write names.parquet (thing, kind, lang, text, split) and the canonical rows of the training names to `out`.

    Returns counts: names, languages, things, names of each kind and of each split, rows of each source.
    """
    names = collect(config.min_names, config.languages)
    lots = split(
        names, seed=seed, held_out_pairs=config.held_out_pairs, held_out_things=config.held_out_things
    )
    things, kinds, langs, texts = zip(*names, strict=True)
    columns = {"thing": things, "kind": kinds, "lang": langs, "text": texts, "split": lots}
    write_table(out / NAMES_FILE, pa.table(columns))

    training = [name for name, lot in zip(names, lots, strict=True) if lot == "train"]
    tables = [
        retrieval_rows(training, positives=config.positives, seed=seed),
        labelled_rows(CLUSTERING, training),
        labelled_rows(CLASSIFICATION, training, TWO_WAY),
    ]
    sources = write_rows(out, pa.concat_tables(tables), [RETRIEVAL, CLUSTERING, CLASSIFICATION])
    return {
        "names": len(names),
        "languages": len(set(langs)),
        "things": len(set(things)),
        "kinds": dict(Counter(kinds)),
        "splits": dict(Counter(lots)),
        "rows": {source.name: source.rows for source in sources},
    }
