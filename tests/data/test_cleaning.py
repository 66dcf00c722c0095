"""Cleaning: what it does to texts and rows, and that no row is lost, doubled or miscounted on the way."""

import random
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm.data import clean_stage as stage
from f2llm.data import cleaning
from f2llm.data.clean_stage import clean_stage, over
from f2llm.data.licences import NOT_COMMERCIAL, NOT_KNOWN, obstacle
from f2llm.data.parts import write_part
from f2llm.data.rows import Source, read_rows, row_hash, rows_table
from f2llm.data.tidy import tidy, tidy_all
from f2llm.engine import Engine, using
from f2llm.errors import F2Error
from f2llm.files import read_json, sha256_folder, write_json
from f2llm.recipe_corpus import CleanStage

settings = partial(CleanStage, stage="clean", data=["rows"])
ONE = Engine(workers=1)


def source(name: str, licence: str = "CC0-1.0") -> Source:
    return Source(name=name, format="retrieval", task="t", symmetric=False, instruction="i", licence=licence)


def row(query: str, *positives: str, negatives: tuple[str, ...] = (), lang: str = "eng") -> dict[str, Any]:
    return {"query": query, "positives": list(positives), "negatives": list(negatives), "query_lang": lang}


def write(folder: Path, parts: list[tuple[Source, list[dict[str, Any]]]]) -> Path:
    """A folder with a part for each list of rows."""
    for number, (of, rows) in enumerate(parts):
        columns = {name: [one[name] for one in rows] for name in rows[0]}
        write_part(folder, number, rows_table(of, columns))
    sources = {of.name: of for of, _ in parts}
    write_json(folder / "sources.json", [of.model_dump() for of in sources.values()])
    return folder


def clean(tmp_path: Path, rows: list[dict[str, Any]], of: Source | None = None, **changes: Any) -> Any:
    """What is kept of the rows of one source, and the report."""
    folder = write(tmp_path / "in", [(of or source("a"), rows)])
    with using(ONE):
        clean_stage(settings(**changes), [folder], tmp_path / "out", seed=0)
    return read_rows(tmp_path / "out")[0].to_pylist(), read_json(tmp_path / "out" / "report.json")


def all_rows(folder: Path, name: str = "rows.parquet") -> list[dict[str, Any]]:
    """Rows as they stand in the files, whatever is wrong with them."""
    return [one for file in sorted((folder / name).iterdir()) for one in pq.read_table(file).to_pylist()]


def rejects(out: Path) -> list[dict[str, Any]]:
    return all_rows(out, "rejects.parquet")


# --- Texts


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a\x00b\x07c", "abc"),
        ("\ufeffword\u00ad\u2060s", "words"),
        ("\u202eabc\u202c \u2067de\u2069", "abc de"),
        ("one\r\ntwo\rthree\u2028four\x0cfive", "one\ntwo\nthree\nfour\nfive"),
        ("don\x92t \x93so\x94 \x81", "don’t “so”"),
        ("e\u00ad\u0301", "é"),
        ("  \n\t x \u3000\n", "x"),
        ("\n  \n    if a:\n        b\n", "    if a:\n        b"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        (
            "क\u094d\u200dष \U0001f469\u200d\U0001f469\ufe0f",
            "क\u094d\u200dष \U0001f469\u200d\U0001f469\ufe0f",
        ),
        ("ភាសា\u200bខ្មែរ \u200fא\u200e", "ភាសា\u200bខ្មែរ \u200fא\u200e"),
        (
            "\U0001f3f4\U000e0067\U000e0062\U000e007f x\U000e0068\U000e0069",
            "\U0001f3f4\U000e0067\U000e0062\U000e007f x",
        ),
        ("\ufffea\ufdd0\ufff9b", "ab"),
    ],
)
def test_a_text_is_tidied(given: str, expected: str) -> None:
    assert tidy(given) == expected


def test_texts_are_tidied_together_as_they_are_alone_and_once_is_enough() -> None:
    draw = random.Random(0)
    odd = "\x00\r\n\t\x85\x93 \u00a0\u3000\u200b\u200d\u00ad\u2028\u202e\ufeff\u0301\u0300ea\u1100\u1161\u11a8ö가"
    texts: list[str | None] = ["".join(draw.choices(odd, k=draw.randrange(9))) for _ in range(10_000)]
    planes = (*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE0200))
    texts += [f"a{chr(code)}" for code in planes]
    together = tidy_all(pa.array(texts, pa.large_string())).to_pylist()
    assert together == [tidy(text) for text in texts if text is not None]
    assert all(tidy(text) == text for text in together)
    assert all(unicodedata.is_normalized("NFC", text) for text in together)
    assert tidy_all(pa.array([None, " a"], pa.large_string())).to_pylist() == [None, "a"]


# --- Rows


def test_texts_are_left_out_of_lists_and_the_row_stays(tmp_path: Path) -> None:
    given = [
        row(" q ", "q", "p", "p\u00ad", "x" * 30, "", negatives=("n", "p", "q", "n", "", "m")),
        row("r", "s", negatives=("n",)),
    ]
    kept, report = clean(tmp_path, given, max_characters=20)
    assert [(one["query"], one["positives"], one["negatives"]) for one in kept] == [
        ("q", ["p"], ["n", "m"]),
        ("r", ["s"], ["n"]),
    ]
    assert [one["hash"] for one in kept] == [
        row_hash("q", ["p"], ["n", "m"], None, "a"),
        row_hash("r", ["s"], ["n"], None, "a"),
    ]
    assert report["changed"] == {
        "text tidied": 1,
        "positive left out: empty": 1,
        "positive left out: longer than 20 characters": 1,
        "positive left out: same text as the query": 1,
        "positive left out: listed twice": 1,
        "negative left out: empty": 1,
        "negative left out: same text as the query": 1,
        "negative left out: same text as a positive": 1,
        "negative left out: listed twice": 1,
    }


def test_a_row_without_a_usable_query_or_positive_is_rejected_with_the_reason(tmp_path: Path) -> None:
    given = [
        row("\u00ad ", "p"),
        row("q", " q"),
        row("long", "p" * 21, "p" * 22),
        row("ab", "p"),
        row("none"),
        row("good", "enough"),
    ]
    kept, report = clean(tmp_path, given, min_characters=3, max_characters=20)
    assert [one["query"] for one in kept] == ["good"]
    assert report["dropped"] == {
        "query empty": 1,
        "query shorter than 3 characters": 2,
        "positive longer than 20 characters": 1,
        "neither a positive nor a label": 1,
    }
    assert sorted(one["reason"] for one in rejects(tmp_path / "out")) == sorted(
        reason for reason, rows in report["dropped"].items() for _ in range(rows)
    )


def test_equal_pairs_and_long_texts_may_stay(tmp_path: Path) -> None:
    given = [row("Berlin", "Berlin"), row("q", "x" * 10 + " " + "y" * 10)]
    kept, _ = clean(tmp_path, given, equal_pairs="keep", max_characters=11, too_long="cut")
    assert [one["positives"] for one in kept] == [["Berlin"], ["x" * 10]]


def test_rows_with_labels_need_no_positives(tmp_path: Path) -> None:
    given = [{"query": " text", "label": "l", "query_lang": "eng"}]
    kept, _ = clean(tmp_path, given, source("a").model_copy(update={"format": "clustering"}))
    assert (kept[0]["query"], kept[0]["label"], kept[0]["positives"]) == ("text", "l", [])


def test_language_tags_get_one_name(tmp_path: Path) -> None:
    tags = ["zho", "cmn", "zho_Hant", "ara", "arz", "yue", "que", "deu", "und"]
    given = [row(f"q {tag}", "p", lang=tag) for tag in tags]
    kept, report = clean(tmp_path, given, language_tags="individual")
    expected = ["cmn", "cmn", "cmn_Hant", "arb", "arz", "yue", "que", "deu", "und"]
    assert [one["query_lang"] for one in kept] == expected
    assert {tag: counts["read"] for tag, counts in report["sources"]["a"].items()} == Counter(expected)


def test_the_first_of_repeated_rows_is_kept_over_all_parts(tmp_path: Path) -> None:
    parts = [
        (source("best"), [row("One  query", "p"), row("other", "p")]),
        (source("rest"), [row("one query", "P"), row("one query", "q")]),
    ]
    folder = write(tmp_path / "in", parts)
    with using(ONE):
        facts = clean_stage(settings(), [folder], tmp_path / "out", seed=0)
    kept = read_rows(tmp_path / "out")[0].to_pylist()
    assert [(one["source"], one["query"]) for one in kept] == [
        ("best", "One  query"),
        ("best", "other"),
        ("rest", "one query"),
    ]
    assert facts == {"read": 4, "kept": 3, "dropped": {"exact duplicate": 1}}
    assert [one["reason"] for one in rejects(tmp_path / "out")] == ["exact duplicate"]


# --- Licences and people's wishes


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("Apache-2.0", None),
        ("cc-by-sa-4.0", None),
        ("CC-BY-NC-4.0", NOT_COMMERCIAL),
        ("CC-BY-NC-SA-3.0 OR MIT", None),
        ("CC-BY-NC-SA-3.0 AND MIT", NOT_COMMERCIAL),
        ("unknown AND CC-BY-NC-4.0", NOT_COMMERCIAL),
        ("MIT AND unknown", NOT_KNOWN),
        ("GPL-2.0-only WITH Classpath-exception-2.0", None),
        ("(MIT)", NOT_KNOWN),
        ("unknown", NOT_KNOWN),
        ("", NOT_KNOWN),
        ("commercial", NOT_KNOWN),
    ],
)
def test_what_a_licence_allows(licence: str, expected: str | None) -> None:
    assert obstacle(licence) == expected


def test_only_rows_known_to_be_for_commercial_use(tmp_path: Path) -> None:
    licences = {"free": "MIT", "paid": "CC-BY-NC-4.0", "dark": "unknown"}
    folder = write(
        tmp_path / "in", [(source(name, licence), [row(name, "p")]) for name, licence in licences.items()]
    )
    with using(ONE):
        clean_stage(settings(commercial_only=True), [folder], tmp_path / "out", seed=0)
    rows, sources = read_rows(tmp_path / "out")
    assert rows["source"].to_pylist() == ["free"]
    assert [of.name for of in sources] == ["free"]
    assert {one["source"]: one["reason"] for one in rejects(tmp_path / "out")} == {
        "paid": NOT_COMMERCIAL,
        "dark": NOT_KNOWN,
    }


def test_what_is_opted_out_goes_and_is_not_written_again(tmp_path: Path) -> None:
    secret = row("by its hash", "p")
    listed = tmp_path / "list.txt"
    listed.write_text(f"\ufeffMY  story\n\n{row_hash('by its hash', ['p'], [], None, 'a')}\ngone\n", "utf-8")
    parts = [
        (source("a"), [row("my Story ", "p"), secret, row("q", "p", "my story"), row("r", "My Story")]),
        (source("gone"), [row("whole source", "p")]),
    ]
    folder, out = write(tmp_path / "in", parts), tmp_path / "out"
    with using(ONE):
        clean_stage(settings(opt_out=[str(listed)]), [folder], out, seed=0)
    kept = read_rows(out)[0].to_pylist()
    assert [(one["query"], one["positives"]) for one in kept] == [("q", ["p"])]
    rejected = rejects(out)
    assert Counter(one["reason"] for one in rejected) == {
        "query opted out": 1,
        "opted out": 2,
        "positive opted out": 1,
    }
    assert all(not one["query"] and not one["positives"] and one["hash"] for one in rejected)


def test_personal_data_is_masked_or_its_rows_dropped_and_nowhere_left(tmp_path: Path) -> None:
    address, number = "jo@example.org", "+49 30 1234567"
    given = [
        row(f"a {address}", "p"),
        row("b", f"call {number}"),
        row(f"{address}", f"x{number}", lang="deu"),
    ]
    kept, report = clean(tmp_path, given, emails="drop", phones="mask")
    assert [(one["query"], one["positives"]) for one in kept] == [("b", ["call <PHONE NUMBER>"])]
    assert report["dropped"] == {"query with e-mail address": 2}
    assert report["sources"]["a"]["eng"]["changed"] == {"phone number masked": 1}
    assert address not in str(rejects(tmp_path / "out"))


# --- Limits


def test_limits_take_the_same_rows_in_whatever_order_they_come(tmp_path: Path) -> None:
    rows = [row(f"q{n}", "p", lang="deu" if n % 4 else "eng") for n in range(200)]
    found = []
    for number, (shuffle, seed) in enumerate([(0, 5), (1, 5), (1, 6)]):
        given = rows[:]
        random.Random(shuffle).shuffle(given)
        halves = [(source("a"), given[:90]), (source("a"), given[90:])]
        folder, out = write(tmp_path / f"in{number}", halves), tmp_path / f"out{number}"
        with using(ONE):
            clean_stage(settings(rows_per_language=30, rows_per_source=50), [folder], out, seed=seed)
        kept = read_rows(out)[0]
        counts = Counter(kept["query_lang"].to_pylist())
        assert counts.total() == 50 and max(counts.values()) <= 30
        found.append(set(kept["query"].to_pylist()))
        dropped = read_json(out / "report.json")["dropped"]
        assert dropped == {
            "more than 30 rows of a language of its source": 200 - 60,
            "more than 50 rows of its source": 10,
        }
    assert found[0] == found[1] != found[2]


def test_over_is_what_sorting_each_group_says() -> None:
    draw = np.random.default_rng(0)
    groups = draw.integers(5, size=300).astype(np.int32)
    keys = draw.integers(40, size=300).astype(np.uint64)  # many are equal
    eligible = draw.random(300) < 0.7
    expected = np.zeros(300, bool)
    for group in range(5):
        members = [n for n in range(300) if groups[n] == group and eligible[n]]
        expected[sorted(members, key=lambda n: (keys[n], n))[20:]] = True
    assert (over(groups, keys, 20, eligible) == expected).all()


# --- The stage as a whole


def messy(folder: Path, parts: int = 5, rows: int = 60) -> Path:
    """Rows in which nearly everything is wrong somewhere."""
    draw = random.Random(1)
    texts = [
        "",
        " ",
        "a",
        "b ",
        "\u00ad",
        "c\x00",
        "d@example.org",
        "long" * 9,
        "e\u0301",
        "é",
        "good",
        "Good",
        "fine",
    ]
    texts += [f"text {n}" for n in range(30)]

    def some(most: int) -> list[str]:
        return draw.choices(texts, k=draw.randrange(most))

    def one() -> dict[str, Any]:
        return row(
            draw.choice(texts) or "-",
            *some(4),
            negatives=tuple(some(4)),
            lang=draw.choice(["deu", "zho", "cmn"]),
        )

    sources = [source("a"), source("b", "CC-BY-NC-4.0"), source("c")]
    return write(folder, [(draw.choice(sources), [one() for _ in range(rows)]) for _ in range(parts)])


MESSY = settings(
    max_characters=30,
    min_characters=2,
    emails="drop",
    commercial_only=True,
    language_tags="individual",
    duplicates="near",
    rows_per_language=40,
)


def test_every_row_is_kept_or_rejected_once_and_counted(tmp_path: Path) -> None:
    folder, out = messy(tmp_path / "in"), tmp_path / "out"
    with using(ONE):
        facts = clean_stage(MESSY, [folder], out, seed=0)
    report, kept = read_json(out / "report.json"), read_rows(out)[0].to_pylist()
    given = all_rows(folder)
    tag = {"zho": "cmn", "cmn": "cmn", "deu": "deu"}
    assert facts["read"] == len(given) == len(kept) + len(rejects(out))
    assert len(facts["dropped"]) >= 8, "the data is not messy enough"

    def cells(rows: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
        return Counter((one["source"], tag[one["query_lang"]]) for one in rows)

    counted = {
        (name, lang): counts for name, langs in report["sources"].items() for lang, counts in langs.items()
    }
    assert {cell: counts["read"] for cell, counts in counted.items()} == cells(given)
    assert {cell: counts["kept"] for cell, counts in counted.items() if counts["kept"]} == cells(kept)
    by_reason = Counter((one["source"], one["query_lang"], one["reason"]) for one in rejects(out))
    assert by_reason == {
        (*cell, reason): rows
        for cell, counts in counted.items()
        for reason, rows in counts["dropped"].items()
    }
    for counts in [report, *counted.values()]:
        assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    # A row that came in goes out in its place or is rejected under its own hash.
    unchanged = {one["hash"] for one in kept} & {one["hash"] for one in given}
    assert len(unchanged) > 20


def naive(one: dict[str, Any]) -> tuple[str, list[str], list[str]] | None:
    """A row as MESSY without its comparisons should leave it, the slow way."""

    def usable(text: str) -> bool:
        return 2 <= len(text) <= 30 and "@" not in text

    query = tidy(one["query"])
    positives = list(dict.fromkeys(tidy(text) for text in one["positives"]))
    negatives = list(dict.fromkeys(tidy(text) for text in one["negatives"]))
    left = [text for text in positives if usable(text) and text != query]
    if one["source"] == "b" or not usable(query) or not left:
        return None
    return query, left, [text for text in negatives if usable(text) and text not in (query, *positives)]


def test_rows_come_out_as_the_slow_way_makes_them(tmp_path: Path) -> None:
    folder, out = messy(tmp_path / "in"), tmp_path / "out"
    config = MESSY.model_copy(update={"duplicates": "keep", "rows_per_language": None})
    with using(ONE):
        clean_stage(config, [folder], out, seed=0)
    expected = [made for one in all_rows(folder) if (made := naive(one))]
    kept = read_rows(out)[0].to_pylist()
    assert [(one["query"], one["positives"], one["negatives"]) for one in kept] == expected
    for one in kept:
        content = (one[name] for name in ("query", "positives", "negatives", "label", "source"))
        assert one["hash"] == row_hash(*content)


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path) -> None:
    folder = messy(tmp_path / "in", parts=3)
    for workers in (1, 2):
        with using(Engine(workers=workers)):
            clean_stage(MESSY, [folder], tmp_path / f"out{workers}", seed=0)
    assert sha256_folder(tmp_path / "out1") == sha256_folder(tmp_path / "out2")


def stop_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, until it was called so often."""
    left = iter(range(calls))

    def stopping(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return stopping


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [(cleaning, "encode", 3), (stage, "find_duplicates", 0), (stage, "_divide", 2), (stage, "_report", 0)],
)
def test_a_stage_that_was_stopped_ends_in_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int
) -> None:
    folder = messy(tmp_path / "in")
    with using(ONE):
        clean_stage(MESSY, [folder], tmp_path / "straight", seed=0)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop_after(calls, getattr(module, name)))
            with pytest.raises(KeyboardInterrupt):
                clean_stage(MESSY, [folder], tmp_path / "stopped", seed=0)
        clean_stage(MESSY, [folder], tmp_path / "stopped", seed=0)
        again = clean_stage(MESSY, [folder], tmp_path / "stopped", seed=0)
    assert sha256_folder(tmp_path / "stopped") == sha256_folder(tmp_path / "straight")
    assert again["read"] == 300


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", [(source("a"), [row("q", "q")])])
    with using(ONE), pytest.raises(F2Error, match="none of 1 rows is left .*same text as the query"):
        clean_stage(settings(), [folder], tmp_path / "out", seed=0)
