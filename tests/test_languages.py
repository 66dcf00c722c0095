"""The table of languages is what CLDR says, or ISO 639 where CLDR is silent, and every tag finds its language.

`python tests/test_languages.py` prints the table as it is with babel's CLDR of today.
"""

import json
import re
from collections.abc import Container
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import pytest
from babel import Locale, localedata
from babel.core import get_global

from f2llm import languages
from f2llm.data import catalogue
from f2llm.errors import UsageError

# ISO 639-2 has two codes for these; ISO 639-3 took the other one. And three retired codes for single languages.
BIBLIOGRAPHIC = set("alb arm baq bur chi cze dut fre geo ger gre ice mac mao may per rum slo tib wel".split())
RETIRED = {"in", "iw", "ji", "jw", "mo", "mol", "scc", "scr"}
# ISO 639-3 codes that CLDR folds into another language, or maps to more than one candidate.
ISO_639_3 = {"ak": "aka", "gu": "guj", "sh": "hbs", "tl": "tgl", "tw": "twi"}
# No language in particular.
SPECIAL = {"mul", "und", "zxx"}
# Scripts that CLDR's likely subtags leave open, and those that are another's than that of the language's open corpora.
SCRIPTS = {
    "crr": "Latn",
    "elx": "Xsux",
    "hbs": "Latn",
    "sux": "Xsux",
    "tlh": "Latn",
    "twi": "Latn",
    "zbl": "Blis",
}
IN_OTHER_SCRIPTS = {"btm": "Latn", "cjs": "Cyrl", "ctd": "Latn", "zdj": "Latn"}
# Names in ISO 639-3 that differ from ours, which keep apart what CLDR's would not, and spell as CLDR does.
IN_OTHER_WORDS = {
    "diq": "Dimli",
    "ory": "Odia (individual language)",
    "pnb": "Western Punjabi",
}


def file_rows() -> dict[str, list[str]]:
    """The fields of languages.tsv by code."""
    text = resources.files("f2llm").joinpath("languages.tsv").read_text(encoding="utf-8")
    return {fields[0]: fields for fields in (line.split("\t") for line in text.splitlines())}


def english_of_cldr() -> dict[str, str]:
    return {code: name for code, name in Locale("en").languages.items() if "_" not in code}


def likely_script(*codes: str) -> str | None:
    """What CLDR has as the script of the first of these codes that it knows one of."""
    likely = get_global("likely_subtags")
    return next((likely[code].split("_")[1] for code in codes if code in likely), None)


def rows_from_babel(without: Container[str]) -> dict[str, list[str]]:
    """The rows of languages.tsv that babel's copy of CLDR gives, but those of some codes."""
    aliases = {
        old: new
        for old, new in get_global("language_aliases").items()
        if re.fullmatch("[a-z]{2,3}", old) and re.fullmatch("[a-z]{2}", new) and old not in ISO_639_3
    }
    iso_639_3 = {new: old for old, new in aliases.items() if old not in BIBLIOGRAPHIC | RETIRED} | ISO_639_3
    english = english_of_cldr()

    others: dict[str, set[str]] = {}
    for old, new in aliases.items():
        if old in BIBLIOGRAPHIC | RETIRED:
            others.setdefault(iso_639_3[new], set()).add(old)

    rows = {}
    # The individual languages come first (`arb`, by the name of `ar`), so that a language's own entry wins.
    individual = [(old, english[new]) for old, new in aliases.items() if new in english]
    for cldr, name in [*individual, *english.items()]:
        code = iso_639_3.get(cldr, cldr)
        if len(code) != 3 or code in BIBLIOGRAPHIC | RETIRED or code in without:
            continue
        likely = SCRIPTS.get(code) or likely_script(cldr, code, aliases.get(code, code)) or "Zyyy"
        script = "Zyyy" if code in SPECIAL else likely
        first = [cldr] if len(cldr) == 2 else []
        rows[code] = [code, " ".join(first + sorted(others.get(code, ()))), script, name, "CLDR"]
    return rows


def rows_from_elsewhere() -> dict[str, list[str]]:
    header = next(iter(file_rows()))
    return {code: row for code, row in file_rows().items() if code != header and row[-1] != "CLDR"}


def test_the_table_is_what_cldr_says_where_cldr_knows() -> None:
    elsewhere = rows_from_elsewhere()
    header = ["iso639_3", "other_codes", "script", "english_name", "from"]
    rows = rows_from_babel(elsewhere) | elsewhere
    assert list(file_rows().values()) == [header, *(rows[code] for code in sorted(rows))]
    assert not elsewhere.keys() & english_of_cldr().keys()


def test_scripts_of_other_rows_are_those_that_cldr_finds_likely() -> None:
    known = set(Locale("en").scripts)
    for code, _, script, _, _ in rows_from_elsewhere().values():
        expected = IN_OTHER_SCRIPTS.get(code) or likely_script(code)
        assert script == expected if expected else script in known - {"Zyyy"}, code


def test_names_of_other_rows_are_those_of_iso_639() -> None:
    if (found := find_spec("mteb")) is None:
        pytest.skip("the package mteb, which has the names of ISO 639-3, is not installed")
    folder = Path(str(found.origin)).parent / "languages"
    names = json.loads((folder / "iso_639_3_to_language.json").read_text(encoding="utf-8"))
    rows = [row for row in rows_from_elsewhere().values() if row[0] in names]
    assert len(rows) > 200
    for code, _, _, name, source in rows:
        assert IN_OTHER_WORDS.get(code) or names[code].replace("'", "’") == name, code
        assert source == "ISO 639-3"


def test_every_code_names_one_language() -> None:
    codes = [code for row in set(languages.table().values()) for code in (row.code, *row.others)]
    assert len(codes) == len(set(codes)) == len(languages.table())


def test_every_locale_of_cldr_has_a_tag() -> None:
    for locale in localedata.locale_identifiers():
        assert re.fullmatch("[a-z]{3}(_[A-Z][a-z]{3})?", languages.tag(locale))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("de", "deu"),
        ("deu", "deu"),
        ("ger", "deu"),
        ("DE-at", "deu"),
        ("de-CH-1901", "deu"),
        ("de_DE-u-co-phonebk", "deu"),
        ("iw", "heb"),
        ("no", "nor"),
        ("nb", "nob"),
        ("sh", "hbs"),
        ("tl", "tgl"),
        ("fil", "fil"),
        ("arb", "arb"),
        ("ar-001", "ara"),
        ("zh", "zho"),
        ("zh-Hant", "zho_Hant"),
        ("zh_Hant_TW", "zho_Hant"),
        ("zho_hant", "zho_Hant"),
        ("sr-latn-rs", "srp_Latn"),
        ("und", "und"),
        ("mul", "mul"),
    ],
)
def test_tag(given: str, expected: str) -> None:
    assert languages.tag(given) == expected
    assert languages.tag(expected) == expected


def test_every_language_of_the_published_training_set_is_known(shared: Path) -> None:
    for line in (shared / "spec" / "languages.csv").read_text(encoding="utf-8").splitlines()[1:]:
        code, name, _ = line.split(",")
        assert languages.tag(code) == code
        assert languages.script(code) != "Zyyy", name


def test_every_language_of_the_development_data_is_known(shared: Path) -> None:
    lines = (shared / "data" / "languages.tsv").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [line.split("\t")[:2] for line in lines]
    assert len(pairs) > 800
    for tag, code in pairs:
        assert languages.tag(tag) == "_".join([languages.tag(code), *tag.split("_")[1:]])
        assert languages.english_name(languages.tag(tag)) and (
            languages.script(tag) != "Zyyy" or tag in SPECIAL
        ), tag


def test_every_language_of_the_catalogue_is_known() -> None:
    records = catalogue.load()
    assert len(records) == 157
    for record in records.values():
        for tag in [] if record.languages == "unknown" else record.languages:
            assert languages.tag(tag) == tag


@pytest.mark.parametrize(
    ("tag", "script", "name"),
    [
        ("deu", "Latn", "German"),
        ("zho", "Hans", "Chinese"),
        ("zho_Hant", "Hant", "Chinese (Hant)"),
        ("jpn", "Jpan", "Japanese"),
        ("hbs", "Latn", "Serbo-Croatian"),
        ("srp", "Cyrl", "Serbian"),
        ("azj", "Latn", "North Azerbaijani"),
        ("kek", "Latn", "Kekchí"),
        ("sjd", "Cyrl", "Kildin Sami"),
        ("zlm_Arab", "Arab", "Malay (individual language) (Arab)"),
        ("mul", "Zyyy", "Multiple languages"),
    ],
)
def test_script_and_english_name(tag: str, script: str, name: str) -> None:
    assert languages.script(tag) == script
    assert languages.english_name(tag) == name


@pytest.mark.parametrize("given", ["qqz", "xx", "dex-Latn"])
def test_unknown_language_names_the_nearest(given: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown language '{given}': the nearest known code is '\w+'"):
        languages.tag(given)


@pytest.mark.parametrize("given", ["", "german", "d", "zh-yue", "de Latn", "deu_", "de--DE"])
def test_not_a_tag(given: str) -> None:
    with pytest.raises(UsageError, match="is not a language tag"):
        languages.tag(given)


if __name__ == "__main__":
    rows = rows_from_babel(rows_from_elsewhere()) | rows_from_elsewhere()
    for row in [next(iter(file_rows().values())), *(rows[code] for code in sorted(rows))]:
        print(*row, sep="\t")
