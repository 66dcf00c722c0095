"""The table of languages is what CLDR says, and every tag finds its language.

`python tests/test_languages.py` prints the table as babel's CLDR has it today.
"""

import re
from importlib import resources
from pathlib import Path

import pytest
from babel import Locale, localedata
from babel.core import get_global

from f2llm import languages
from f2llm.errors import UsageError

# ISO 639-2 has two codes for these; ISO 639-3 took the other one. And three retired codes for single languages.
BIBLIOGRAPHIC = set("alb arm baq bur chi cze dut fre geo ger gre ice mac mao may per rum slo tib wel".split())
RETIRED = {"in", "iw", "ji", "jw", "mo", "mol", "scc", "scr"}
# ISO 639-3 codes that CLDR folds into another language, or maps to more than one candidate.
ISO_639_3 = {"ak": "aka", "gu": "guj", "sh": "hbs", "tl": "tgl", "tw": "twi"}
# No language in particular.
SPECIAL = {"mul", "und", "zxx"}
# Scripts that CLDR's likely subtags leave open.
SCRIPTS = {
    "crr": "Latn",
    "dik": "Latn",
    "diq": "Latn",
    "elx": "Xsux",
    "hbs": "Latn",
    "mhr": "Cyrl",
    "pnb": "Arab",
    "prs": "Arab",
    "sux": "Xsux",
    "tlh": "Latn",
    "twi": "Latn",
    "zbl": "Blis",
}
# Languages of published training sets that have no English name of their own in CLDR.
NAMES = {
    "acm": "Mesopotamian Arabic",
    "acq": "Ta’izzi-Adeni Arabic",
    "als": "Tosk Albanian",
    "apc": "Levantine Arabic",
    "azb": "South Azerbaijani",
    "azj": "North Azerbaijani",
    "cdo": "Min Dong Chinese",
    "cjk": "Chokwe",
    "dik": "Southwestern Dinka",
    "diq": "Dimli",
    "ekk": "Standard Estonian",
    "fuv": "Nigerian Fulfulde",
    "gaz": "West Central Oromo",
    "hne": "Chhattisgarhi",
    "kbp": "Kabiyè",
    "khk": "Halh Mongolian",
    "kmr": "Northern Kurdish",
    "knc": "Central Kanuri",
    "lld": "Ladin",
    "lvs": "Standard Latvian",
    "mhn": "Mócheno",
    "mhr": "Eastern Mari",
    "npi": "Nepali (individual language)",
    "ory": "Odia (individual language)",
    "pbt": "Southern Pashto",
    "pbu": "Northern Pashto",
    "pes": "Iranian Persian",
    "pnb": "Western Punjabi",
    "plt": "Plateau Malagasy",
    "prs": "Dari",
    "quy": "Ayacucho Quechua",
    "skr": "Saraiki",
    "swh": "Swahili (individual language)",
    "taq": "Tamasheq",
    "uzn": "Northern Uzbek",
    "ydd": "Eastern Yiddish",
    "zsm": "Standard Malay",
}


def table_from_babel() -> str:
    """languages.tsv, made from babel's copy of CLDR."""
    aliases = {
        old: new
        for old, new in get_global("language_aliases").items()
        if re.fullmatch("[a-z]{2,3}", old) and re.fullmatch("[a-z]{2}", new) and old not in ISO_639_3
    }
    iso_639_3 = {new: old for old, new in aliases.items() if old not in BIBLIOGRAPHIC | RETIRED} | ISO_639_3
    likely = get_global("likely_subtags")
    english = {code: name for code, name in Locale("en").languages.items() if "_" not in code}

    others: dict[str, set[str]] = {}
    for old, new in aliases.items():
        if old in BIBLIOGRAPHIC | RETIRED:
            others.setdefault(iso_639_3[new], set()).add(old)

    rows = {}
    # The individual languages come first (`arb`, by the name of `ar`), so that a language's own entry wins.
    for cldr, name in [(old, english[new]) for old, new in aliases.items() if new in english] + [
        *english.items(),
        *NAMES.items(),
    ]:
        code = iso_639_3.get(cldr, cldr)
        if len(code) != 3 or code in BIBLIOGRAPHIC | RETIRED:
            continue
        parent = aliases.get(code, code)
        subtags = likely.get(cldr) or likely.get(code) or likely.get(parent) or ""
        script = "Zyyy" if code in SPECIAL else SCRIPTS.get(code) or [*subtags.split("_"), "Zyyy"][1]
        first = [cldr] if len(cldr) == 2 else []
        rows[code] = "\t".join((code, " ".join(first + sorted(others.get(code, ()))), script, name))
    header = "iso639_3\tother_codes\tscript\tenglish_name"
    return "\n".join([header, *(rows[code] for code in sorted(rows)), ""])


def test_the_table_is_what_cldr_says() -> None:
    table = resources.files("f2llm").joinpath("languages.tsv").read_text(encoding="utf-8")
    assert table == table_from_babel()


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
    print(table_from_babel(), end="")
