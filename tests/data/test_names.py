"""Names from CLDR: against babel's own reading of it, and the promises of the split and of the training rows."""

import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from babel import Locale, localedata

from f2llm.data import names as cldr
from f2llm.data.names import Name
from f2llm.data.rows import read_rows
from f2llm.errors import UsageError
from f2llm.files import sha256_folder
from f2llm.recipe_data import NamesStage
from f2llm.text import clean


@pytest.fixture(scope="module")
def names() -> list[Name]:
    return cldr.collect(100)


@pytest.fixture(scope="module")
def train(names: list[Name]) -> list[Name]:
    return [name for name, lot in zip(names, lots(names), strict=True) if lot == "train"]


def lots(names: list[Name], seed: int = 7) -> list[cldr.Split]:
    return cldr.split(names, seed=seed, held_out_pairs=0.1, held_out_things=0.1)


def test_there_are_as_many_as_promised(names: list[Name]) -> None:
    assert len(names) > 200_000
    per_lang = Counter(name.lang for name in names)
    assert len(per_lang) > 230
    assert min(per_lang.values()) >= 100
    assert {name.kind for name in names} == set(cldr.KINDS)
    assert len({(name.thing, name.lang) for name in names}) == len(names)
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("tag", "locale"), [("deu", "de"), ("swa", "sw"), ("zho_Hant", "zh_Hant"), ("ara", "ar")]
)
def test_the_names_are_those_that_babel_gives(
    names: list[Name], tag: str, locale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In babel 2.18 a locale's stand-alone weekdays overwrite the root's, and so those of every locale read later.
    monkeypatch.setattr(localedata, "_cache", {})
    peer = Locale.parse(locale)
    expected: dict[str, str] = {}
    for kind, texts in [
        ("territory", peer.territories),
        ("language", peer.languages),
        ("script", peer.scripts),
        ("currency", peer.currencies),
        ("month", peer.months["stand-alone"]["wide"]),
        ("weekday", peer.days["stand-alone"]["wide"]),
    ]:
        expected |= {f"{kind}:{code}": clean(text) for code, text in texts.items() if code != text}
    assert {n.thing: n.text for n in names if n.lang == tag and n.kind != "unit"} == expected


def test_nothing_inherited_and_no_codes(names: list[Name]) -> None:
    of: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        of[name.lang][name.thing] = name.text
    assert not any(
        name.text == "M01" or (name.kind == "weekday" and name.lang != "eng" and name.text == "Mon")
        for name in names
    )
    assert all(name.text != name.thing.split(":")[1] for name in names if name.lang != "eng")
    assert of["eng"]["script:Thai"] == "Thai"
    assert of["deu"]["month:1"] == "Januar"
    assert of["fin"]["month:1"] == "tammikuu"  # as it stands alone, not "tammikuuta" as in a date
    assert of["deu"]["territory:001"] == "Welt"
    assert of["deu"]["unit:length-kilometer"] == "Kilometer"
    assert of["swa"]["unit:length-kilometer"] == "kilomita"  # long and short are the same word
    assert "hin_Latn" not in of  # of its own it has few; the rest is English
    assert of["srp_Latn"]["territory:DE"] == "Nemačka"
    assert of["srp"]["territory:DE"] == "Немачка"


def test_chosen_languages_bring_english_along(names: list[Name]) -> None:
    chosen = cldr.collect(100, ["de", "zh-Hant"])
    assert {name.lang for name in chosen} == {"deu", "zho_Hant", "eng"}
    assert chosen == [name for name in names if name.lang in ("deu", "zho_Hant", "eng")]


@pytest.mark.parametrize(
    ("min_names", "languages", "message"),
    [
        (
            100,
            ["deu", "haw"],
            r"names in Hawaiian \(haw\), fewer than min_names = 100; lower min_names or leave",
        ),
        (100, ["grc"], r"0 names in Ancient Greek \(grc\)"),
        (100, ["xx"], "unknown language 'xx'"),
        (10**6, None, r"names in English \(eng\), fewer than min_names = 1000000; lower min_names\.$"),
    ],
)
def test_languages_that_cannot_be_had(min_names: int, languages: list[str] | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cldr.collect(min_names, languages)


def test_the_split_has_its_shares_and_keeps_whole_things_out(names: list[Name]) -> None:
    by_thing = defaultdict(set)
    share = Counter(lots(names))
    for name, lot in zip(names, lots(names), strict=True):
        by_thing[name.thing].add(lot)
        assert not (name.lang == "eng" and lot == "pair")
    held_out = [thing for thing, found in by_thing.items() if "thing" in found]
    assert all(by_thing[thing] == {"thing"} for thing in held_out)
    assert 0.07 < len(held_out) / len(by_thing) < 0.13
    assert 0.095 < share["pair"] / (share["pair"] + share["train"]) < 0.105


def test_the_split_of_a_name_depends_on_nothing_but_seed_thing_and_language(names: list[Name]) -> None:
    some = random.Random(0).sample(names, 5000)
    assert (
        dict(zip(some, lots(some), strict=True)).items() <= dict(zip(names, lots(names), strict=True)).items()
    )
    renamed = [name._replace(text="?") for name in some]
    assert lots(renamed) == lots(some)
    assert lots(some, seed=8) != lots(some)
    assert set(cldr.split(some, seed=7, held_out_pairs=0, held_out_things=0)) == {"train"}


def test_retrieval_rows_on_a_few_names() -> None:
    texts = {"eng": "Cuba", "deu": "Kuba", "pol": "Kuba", "fra": "Cuba", "rus": "Куба", "tha": "คิวบา"}
    few = [Name("territory:CU", "territory", tag, text) for tag, text in texts.items()]
    few += [Name("month:5", "month", tag, "mai") for tag in ("deu", "fra")]
    rows = cldr.retrieval_rows(few, positives=2, seed=1).to_pylist()
    assert {row["query"] for row in rows} == {"Cuba", "Kuba", "Куба", "คิวบา"}  # "mai" has no other name
    for row in rows:
        assert row["label"] == "territory:CU"
        assert len(set(row["positives"])) == 2
        assert row["query"] not in row["positives"]
        assert row["query"] == "Cuba" or row["positives"][0] == "Cuba"
    langs = {row["query"]: row["query_lang"] for row in rows}
    assert langs == {"Cuba": "mul", "Kuba": "mul", "Куба": "rus", "คิวบา": "tha"}
    one = cldr.retrieval_rows(few[4:6], positives=2, seed=1).to_pylist()
    assert {(row["query"], *row["positives"], row["positive_lang"]) for row in one} == {
        ("Куба", "คิวบา", "tha"),
        ("คิวบา", "Куба", "rus"),
    }


def test_retrieval_rows_of_many_names(train: list[Name]) -> None:
    train = [name for name in train if name.kind in ("script", "month", "weekday")]
    texts, english = defaultdict(set), {}
    for name in train:
        texts[name.thing].add(name.text)
        if name.lang == "eng":
            english[name.thing] = name.text
    rows = cldr.retrieval_rows(train, positives=8, seed=7).to_pylist()
    queries = [(row["label"], row["query"]) for row in rows]
    assert len(queries) == len(set(queries))
    assert set(queries) == {
        (thing, text) for thing, found in texts.items() if len(found) > 1 for text in found
    }
    uses: Counter[tuple[str, str]] = Counter()
    for row in rows:
        thing, positives = row["label"], row["positives"]
        assert len(set(positives)) == len(positives) == min(8, len(texts[thing]) - 1)
        assert set(positives) <= texts[thing] - {row["query"]}
        if english.get(thing, row["query"]) != row["query"]:
            assert positives[0] == english[thing]
        uses.update((thing, text) for text in positives if text != english.get(thing))
    assert set(uses) == {
        (t, text) for t, text in queries if text != english.get(t)
    }  # every name is someone's answer


def test_a_draw_depends_on_the_seed_and_not_on_the_order(train: list[Name]) -> None:
    few = [name for name in train if name.kind == "weekday"]
    rows = cldr.retrieval_rows(few, positives=4, seed=7)
    assert cldr.retrieval_rows(few[::-1], positives=4, seed=7).equals(rows)
    assert not cldr.retrieval_rows(few, positives=4, seed=8).equals(rows)


def config(**changes: Any) -> NamesStage:
    return NamesStage(stage="names", languages=["deu", "fra", "swa", "zho_Hant", "rus"], **changes)


def test_the_stage(tmp_path: Path) -> None:
    facts = cldr.names_stage(config(), tmp_path / "a", 7)
    again = cldr.names_stage(config(), tmp_path / "b", 7)
    assert facts == again
    assert sha256_folder(tmp_path / "a") == sha256_folder(tmp_path / "b")

    named = pq.read_table(tmp_path / "a" / cldr.NAMES_FILE)
    assert named.column_names == ["thing", "kind", "lang", "text", "split"]
    records = named.to_pylist()
    assert facts["names"] == len(records) == sum(facts["kinds"].values()) == sum(facts["splits"].values())
    assert facts["languages"] == 6

    table, sources = read_rows(tmp_path / "a")
    assert facts["rows"] == {source.name: source.rows for source in sources}
    rows = table.to_pylist()
    trained = {(r["text"], r["thing"]) for r in records if r["split"] == "train"}
    held_out = {r["thing"] for r in records if r["split"] == "thing"}
    kinds = {(text, thing.split(":")[0]) for text, thing in trained}
    for row in rows:
        assert row["licence"] == "Unicode-3.0"
        if row["source"] == "cldr-names":
            assert row["label"] not in held_out
            assert {(text, row["label"]) for text in [row["query"], *row["positives"]]} <= trained
    assert Counter((r["query"], r["label"]) for r in rows if r["source"] == "cldr-kinds") == Counter(kinds)
    two_way = {(r["query"], r["label"]) for r in rows if r["source"] == "cldr-territory-or-currency"}
    assert two_way == {(text, kind) for text, kind in kinds if kind in ("territory", "currency")}
