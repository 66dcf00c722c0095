"""Languages of texts: what the detector tells on real text, whom it is not asked about, and names of one language."""

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from babel.core import get_global

from f2llm import languages as lang
from f2llm.data import language_id as lid
from f2llm.data.cleaning import clean_rows
from f2llm.data.macrolanguages import family, in_form, table
from f2llm.data.rows import Source, rows_table
from f2llm.recipe_corpus import CleanStage

pytest.importorskip("py3langid", reason="py3langid is not installed")

ENGLISH = "The harvest was good this year, and the whole village came together to celebrate it."
GERMAN = "Die Ernte war gut in diesem Jahr, und das ganze Dorf kam zusammen, um sie zu feiern."
RUSSIAN = "Урожай в этом году был хорошим, и вся деревня собралась, чтобы его отпраздновать."
PORTUGUESE = "A colheita foi boa este ano e toda a aldeia se reuniu para a celebrar com uma festa."
SANSKRIT_IN_BENGALI = "অহং স্ৱসুখ্যাতিং ন চেষ্টে কিন্তু চেষ্টিতা ৱিচাৰযিতা চাপৰ এক আস্তে মন্দিৰস্য সুন্দৰে দ্ৱাৰে"
QUOTING = "Greece (Ελλάδα; officially Ελληνική Δημοκρατία, Ελλάς) is a country in the south-east of Europe."


def judge(tag: str, text: str, sure: float = 0.9) -> str:
    return lid.verdict(tag, text, lid.detect([text])[0], sure)


@pytest.mark.parametrize(
    ("tag", "text", "expected"),
    [
        ("eng", ENGLISH, lid.AGREES),
        ("deu_Latn", GERMAN, lid.AGREES),
        ("eng", GERMAN, lid.OTHER),
        ("zho", RUSSIAN, lid.OTHER),
        ("deu", "Gut.", lid.SHORT),
        ("eng", "12:30 - 14:00, 3 x 5 = 15; 100 % (2019/2020), +49 30 1234567, 10.12.2019", lid.SHORT),
        ("glg", PORTUGUESE, lid.AGREES),  # confused
        ("bjn", ENGLISH, lid.UNKNOWN),
        ("und", ENGLISH, lid.UNKNOWN),
        ("mul", ENGLISH, lid.UNKNOWN),
        ("srp_Latn", ENGLISH, lid.UNKNOWN),  # known in another script alone
        ("san", SANSKRIT_IN_BENGALI, lid.UNSURE),
    ],
)
def test_the_verdict_on_a_tag(tag: str, text: str, expected: str) -> None:
    assert judge(tag, text) == expected


def test_a_text_is_judged_by_its_main_script() -> None:
    assert lid.detect([QUOTING])[0].language == "ell", "the text should mislead the detector"
    assert judge("eng", QUOTING) == lid.AGREES
    assert judge("deu", QUOTING) == lid.OTHER
    assert lid.in_main_script("aβc, дd") == "ac, d"
    assert lid.in_main_script("カな漢字abc") == "カな漢字"


def test_nothing_is_held_against_a_tag_below_what_counts_as_sure() -> None:
    guess = lid.Guess("deu", 0.8)
    assert lid.verdict("eng", GERMAN, guess, 0.9) == lid.UNSURE
    assert lid.verdict("eng", GERMAN, guess, 0.7) == lid.OTHER
    assert lid.verdict("eng", GERMAN, lid.Guess("zxx", 1.0), 0.7) == lid.UNSURE


def test_only_drop_drops() -> None:
    source = Source(name="a", format="retrieval", task="t", symmetric=False, instruction="i", licence="MIT")
    columns: dict[str, list[Any]] = {
        "query": [ENGLISH, GERMAN, ENGLISH],
        "positives": [["p"], ["p"], [GERMAN]],
        "query_lang": ["eng", "eng", "eng"],
    }
    rows = rows_table(source, columns)
    for check, kept in (("off", 3), ("report", 3), ("drop", 1)):
        config = CleanStage.model_validate({"stage": "clean", "data": ["a"], "language_check": check})
        sifted = clean_rows(config, rows)
        assert sifted.kept.num_rows == kept
        told = {key.split("\t")[3] for key in sifted.changed if key.startswith("language")}
        assert told == (set() if check == "off" else {lid.AGREES, lid.SHORT, f"{lid.OTHER}: deu"})
    assert sifted.rejected["reason"].to_pylist() == [
        f"query {lid.OTHER}",
        f"positive {lid.OTHER}",
    ]


def test_accuracy_on_real_text(shared: Path) -> None:
    """Where tags are right, next to nothing may be held against them; and languages said to be known must be."""
    sib = pq.read_table(
        shared / "data" / "clustering" / "sib200.parquet", columns=["text", "lang"]
    ).to_pylist()
    by_tag = defaultdict(list)
    for row in sib:
        by_tag[row["lang"]].append(row["text"])
    sample = [(text, tag) for tag in by_tag for text in random.Random(tag).sample(by_tag[tag], 12)]
    found = lid.accuracy(*zip(*sample, strict=True))
    assert len(found) == 205
    known = [row for row in found.values() if row["known"]]
    assert len(known) >= 110
    assert sum(row["dropped"] for row in found.values()) / 205 < 0.001
    assert sum(row["right"] for row in known) / len(known) > 0.95


def test_wrong_tags_are_found(shared: Path) -> None:
    """Texts of languages that are not each other's kin, tags exchanged: most that can be judged are caught."""
    sib = pq.read_table(
        shared / "data" / "clustering" / "sib200.parquet", columns=["text", "lang"]
    ).to_pylist()
    tags = {"deu_Latn": "fra", "fin_Latn": "deu", "tha_Thai": "hin", "yor_Latn": "eng", "zho_Hans": "jpn"}
    texts = [(tags[row["lang"]], row["text"]) for row in sib if row["lang"] in tags][::40]
    caught = sum(judge(tag, text) == lid.OTHER for tag, text in texts)
    assert caught / len(texts) > 0.8


# --- Macrolanguages


def test_the_table_has_each_language_once_and_agrees_with_cldr() -> None:
    rows = set(table().values())
    codes = [code for row in rows for code in (row.code, *row.members)]
    assert len(codes) == len(set(codes)) > 300
    # CLDR names a macrolanguage for the language most often meant by it, as in arb -> ar.
    meant = 0
    for alias, macro in get_global("language_aliases").items():
        code = lang.table()[macro].code if macro in lang.table() else macro
        if alias in table() and alias != table()[alias].code and code in table():
            assert family(alias) == family(code), (alias, code)
            meant += table()[alias].meant == alias
    assert meant >= 30


def test_a_language_with_two_names_gets_one() -> None:
    for tag, individual, macro in (
        ("zho", "cmn", "zho"),
        ("cmn_Hant", "cmn_Hant", "zho_Hant"),
        ("yue", "yue", "yue"),
        ("que", "que", "que"),
        ("eng", "eng", "eng"),
        ("und", "und", "und"),
    ):
        assert in_form(tag, "individual") == individual
        assert in_form(tag, "macrolanguage") == macro
    for code in table():
        assert in_form(in_form(code, "individual"), "macrolanguage") == in_form(code, "macrolanguage")
