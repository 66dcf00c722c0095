"""Test texts in training data: what is planted is found in every script, as plain searches find it, no more goes."""

import hashlib
import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data import naive_texts as naive
from tests.data.naive_texts import SENTENCES

from f2llm.compress.prune import prune_stage
from f2llm.data import contamination, decontaminate
from f2llm.data.cleaning import clean_rows
from f2llm.data.contamination import METHODS, build_shards, judge, make_shard, open_shards
from f2llm.data.decontaminate import SAMPLES_FILE, decontaminate_stage
from f2llm.data.folded import fold
from f2llm.data.held_out import Batch, held_out_texts
from f2llm.data.parts import (
    DECONTAMINATION,
    REJECTS,
    carry_decontamination,
    parts,
    read_part,
    sift,
    write_part,
    write_sources,
)
from f2llm.data.rows import ROWS_FILE, Source, row_hash, rows_table
from f2llm.engine import Engine, using
from f2llm.errors import F2Error, UsageError
from f2llm.files import read_json, sha256_folder
from f2llm.recipe import PruneStage
from f2llm.recipe_corpus import CleanStage, Contamination, DecontaminateStage, Limits
from f2llm.recipe_train import TrainStage
from f2llm.rng import generator
from f2llm.train.stage import train_stage

FACTS: dict[str, Any] = {"task": "t", "symmetric": False, "instruction": "i", "licence": "CC0-1.0"}
PAIRS = Source(name="pairs", format="retrieval", **FACTS)
LIMITS = Limits()
FILLER = {
    lang: text[::-1] if lang in ("tha", "zho", "kor") else " ".join(reversed(text.split()))
    for lang, text in SENTENCES.items()
}

Texts = list[str]


def write(folder: Path, rows: list[tuple[str, Texts, Texts]], size: int = 1000) -> Path:
    for number, at in enumerate(range(0, len(rows), size)):
        columns = dict(
            zip(
                ("query", "positives", "negatives"),
                map(list, zip(*rows[at : at + size], strict=True)),
                strict=True,
            )
        )
        write_part(
            folder, number, rows_table(PAIRS, {**columns, "query_lang": ["und"] * len(columns["query"])})
        )
    write_sources(folder, [PAIRS], {"pairs": {"und": Counter(kept=len(rows))}})
    return folder


def held_out_folder(folder: Path, texts: Texts) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (folder / "held.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def run(
    folder: Path, rows: list[tuple[str, Texts, Texts]], texts: Texts, **settings: Any
) -> tuple[pa.Table, pa.Table]:
    """Rows kept, and rows rejected with the reason."""
    config = DecontaminateStage(
        stage="decontaminate", data=["x"], against=[held_out_folder(folder / "held", texts)], **settings
    )
    out = folder / "out"
    decontaminate_stage(config, [write(folder / "rows", rows)], out)
    kept = pa.concat_tables(read_part(part) for part in parts(out))
    return kept, pq.read_table(out / REJECTS) if (out / REJECTS).exists() else kept.slice(0, 0)


def methods_of(
    training: Texts, held_out: Texts, methods: tuple[Contamination, ...] = METHODS
) -> list[str | None]:
    """The method by which each training text hits, or None."""
    shard = make_shard(fold(pa.array(held_out, pa.string())), ["held"] * len(held_out), LIMITS)
    hits = judge(fold(pa.array(training, pa.string())), [shard], LIMITS, methods)
    return [(*METHODS, None)[number] for number in hits.methods_T]


def cut(text: str, words: int, skip: int = 0) -> str:
    """So many words of a text of a script with spaces, or as much of one without."""
    if " " in text:
        return " ".join(text.split()[skip : skip + words])
    per_word = naive.per_word(text[0])
    return text[skip * per_word : (skip + words) * per_word]


@pytest.mark.parametrize("lang", SENTENCES)
def test_each_kind_is_found_in_every_script(lang: str) -> None:
    text, filler = SENTENCES[lang], FILLER[lang]
    planted = {
        "exact": f" {text.upper()} ",
        "containment": f"{filler}. {text}! {filler}",
        "n-gram": f"{filler}: {cut(text, 13)} {filler}",
        "near duplicate": text[:8] + ("#" if lang in ("tha", "zho", "kor") else "a") + text[9:],
    }
    for method in METHODS:
        others = [name for name in METHODS if METHODS.index(name) < METHODS.index(method)]
        assert methods_of([planted[method], filler], [text], (method,)) == [method, None]
        if method != "near duplicate":  # an edit leaves runs on either side of it
            assert methods_of([planted[method]], [text], tuple(others)) == [None]
    assert methods_of([cut(text, 8, skip=2)], [text]) == [
        "containment"
    ]  # the training text within the test text
    assert methods_of([f"{filler}. {cut(text, 7)}. {filler}"], [cut(text, 7)]) == [None]


@pytest.mark.parametrize(
    "held", ["yes", "OK", "No.", "thank you", "的", "中国", "ใช่", "I do not know what it is", ""]
)
def test_short_texts_remove_nothing_by_standing_within(held: str) -> None:
    training = [f"{text} {held} {text}" for text in SENTENCES.values()]
    assert methods_of(training, [held]) == [None if len(held.split()) < 8 else "containment"] * len(training)


def test_single_words_remove_nothing_at_all(tmp_path: Path) -> None:
    rows = [
        (f"is this sentence {n} right", [answer], ["no"]) for n, answer in enumerate(["yes", "no", "OK"] * 5)
    ]
    kept, _ = run(tmp_path, rows, ["yes", "OK", "no"])
    assert kept.num_rows == len(rows)
    (report,) = read_json(tmp_path / "out" / DECONTAMINATION)
    counts = {"texts": 3, "too_short": 3, "too_short_to_be_contained": 3}
    assert report["test_sets"]["held.jsonl"].items() >= counts.items()


def random_texts(name: str, count: int) -> Texts:
    """Runs of words cut from few sentences and joined, so that much is shared by chance, of all lengths."""
    rng = generator(0, name)
    texts = []
    for _ in range(count):
        pieces = []
        for _ in range(rng.integers(1, 4)):
            text = list(SENTENCES.values())[rng.integers(3 if rng.random() < 0.5 else len(SENTENCES))]
            pieces.append(cut(text, int(rng.integers(1, 17)), int(rng.integers(4))))
        texts.append(rng.choice([" ", ". ", "  ", ""]).join(pieces))
    return texts


def test_agrees_with_plain_searches() -> None:
    training = random_texts("training", 250)
    held = [*random_texts("held", 60), *training[:10]]

    def exact(one: str, test: str) -> bool:
        return naive.fold(one) == naive.fold(test) and naive.long_enough(test, 3)

    def contained(one: str, test: str) -> bool:
        return any(naive.long_enough(a, 8) and naive.stands_in(a, b) for a, b in ((one, test), (test, one)))

    def ngram(one: str, test: str) -> bool:
        return bool(naive.runs(one, 13) & naive.runs(test, 13))

    plain = {"exact": exact, "containment": contained, "n-gram": ngram}
    for method in METHODS[:3]:
        expected = [method if any(plain[method](one, test) for test in held) else None for one in training]
        assert 3 < expected.count(method) < len(training)
        assert methods_of(training, held, (method,)) == expected


def test_near_duplicates_are_confirmed_exactly() -> None:
    training, held = random_texts("training", 250), random_texts("held", 60)
    got = methods_of(training, held, ("near duplicate",))
    for text, method in zip(training, got, strict=True):
        is_near = any(naive.jaccard(text, test) > 0.8 and naive.long_enough(test, 3) for test in held)
        assert (method is not None) == (is_near and naive.long_enough(text, 3))


def test_words_do_not_match_within_words() -> None:
    held = "art is long and life is short he said"
    assert methods_of([f"p{held}", f"{held}s", f"so {held}, once"], [held], ("containment",)) == [
        None,
        None,
        "containment",
    ]


def test_rows_go_and_negatives_are_taken_off(tmp_path: Path) -> None:
    held, other = SENTENCES["eng"], "a training text of no consequence, number"
    rows: list[tuple[str, Texts, Texts]] = [
        (held, [f"{other} 1"], []),
        (f"{other} 2", [f"{other} 3", held], []),
        (f"{other} 4", [f"{other} 5"], [f"{other} 6", held, f"{other} 7"]),
        (f"{other} 8", [f"{other} 9"], [held]),
        (f"{other} 10", [f"{other} 11"], [f"{other} 12"]),
        (held, [f"{other} 13"], [held]),
    ]
    kept, rejected = run(tmp_path, rows, [held])
    expected = [
        (query, positives, [n for n in negatives if n != held]) for query, positives, negatives in rows[2:5]
    ]
    assert [(r["query"], r["positives"], r["negatives"]) for r in kept.to_pylist()] == expected
    assert kept["hash"].to_pylist() == [row_hash(*row, None, "pairs") for row in expected]
    assert rejected["query"].to_pylist() == [rows[n][0] for n in (0, 1, 5)]
    assert set(rejected["reason"].to_pylist()) == {"exact: held.jsonl"}
    (report,) = read_json(tmp_path / "out" / DECONTAMINATION)
    assert report["rows"] == {"pairs": {"read": 6, "kept": 3, "contaminated": {"held.jsonl": {"exact": 3}}}}
    assert report["negatives_removed"] == {"pairs": {"held.jsonl": {"exact": 2}}}
    samples = read_json(tmp_path / "out" / SAMPLES_FILE)
    assert [(s["training_text"], s["test_text"]) for s in samples] == [(held, naive.fold(held))] * 3
    assert not (tmp_path / "out" / decontaminate.SHARDS).exists()


def test_the_report_shows_no_test_text_and_names_their_content(tmp_path: Path) -> None:
    texts = list(SENTENCES.values())
    rows: list[tuple[str, Texts, Texts]] = [(text, ["an answer"], []) for text in texts[:3]]
    contents = {}
    for name, held in (("one", texts), ("other", texts[::-1]), ("less", texts[1:])):
        run(tmp_path / name, rows, held)
        path = tmp_path / name / "out" / DECONTAMINATION
        assert not any(text in path.read_text() or naive.fold(text) in path.read_text() for text in texts)
        contents[name] = read_json(path)[0]["test_sets"]["held.jsonl"]["content"]
    assert contents["one"] == contents["other"] != contents["less"]
    total = sum(int(hashlib.sha256(text.encode()).hexdigest(), 16) for text in texts)
    assert contents["one"] == hex(total % 2**256)[2:].zfill(64)


def test_reports_go_where_the_rows_go(tmp_path: Path) -> None:
    """To later stages from rows to rows, each report once, in order; where there was none, there is none."""
    first, second = SENTENCES["eng"], SENTENCES["rus"]
    config = DecontaminateStage(
        stage="decontaminate", data=["x"], against=[held_out_folder(tmp_path / "b", [second])]
    )
    run(tmp_path / "a", [(first, ["x"], []), ("a question", ["y"], []), (second, ["z"], [])], [first])
    once = tmp_path / "a" / "out"
    decontaminate_stage(config, [once, tmp_path / "a" / "rows"], tmp_path / "twice")
    reports = read_json(tmp_path / "twice" / DECONTAMINATION)
    assert reports[:1] == read_json(once / DECONTAMINATION)
    assert [report["rows"]["pairs"]["read"] for report in reports] == [3, 2 + 3]

    clean = partial(clean_rows, CleanStage(stage="clean", data=["x"]))
    with using(Engine(workers=1)):
        sift([once, tmp_path / "twice", once], tmp_path / "cleaned", clean, "clean")
        sift([tmp_path / "a" / "rows"], tmp_path / "other", clean, "clean")
    assert read_json(tmp_path / "cleaned" / DECONTAMINATION) == reports
    assert not (tmp_path / "other" / DECONTAMINATION).exists()
    (once / DECONTAMINATION).write_text("{}")
    with pytest.raises(F2Error, match=r"decontamination\.json holds a dict, expected a list"):
        carry_decontamination([once], tmp_path / "cleaned")


def test_models_tell_what_they_and_their_bases_were_kept_from(
    rows_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    def trained(name: str, base: Path, data: Path) -> Path:
        config = TrainStage(
            stage="train",
            data="rows",
            base="./base",
            instructions=False,
            formats=["retrieval"],
            steps=1,
            batch_size=2,
            learning_rate=1e-3,
        )
        train_stage(
            config,
            data=data,
            base=base,
            tokenizer=None,
            teacher=None,
            out=tmp_path / name,
            seed=1,
            recipe_hash="",
        )
        return tmp_path / name

    datasets = {}
    for name in ("one", "two"):
        datasets[name] = shutil.copytree(rows_folder, tmp_path / f"rows-{name}")
        carry_decontamination([], datasets[name], {"test_sets": {name: {}}})
    none = trained("none", model_folder, rows_folder)
    one = trained("trained-one", none, datasets["one"])
    two = trained("trained-two", one, datasets["two"])
    cut = PruneStage(stage="prune", model="m", data="rows", hidden_size=16, intermediate_size=16, layers=1)
    prune_stage(cut, model=two, data=rows_folder, out=tmp_path / "cut", seed=1, recipe_hash="")
    assert not (none / DECONTAMINATION).exists()
    told = {
        folder.name: [
            *(name for report in read_json(folder / DECONTAMINATION) for name in report["test_sets"])
        ]
        for folder in (one, two, tmp_path / "cut")
    }
    assert told["trained-one"] == ["one"]
    assert sorted(told["trained-two"]) == sorted(told["cut"]) == ["one", "two"]


def test_the_surest_method_gives_the_reason(tmp_path: Path) -> None:
    text = SENTENCES["rus"]
    _, rejected = run(tmp_path, [(f"{text} {FILLER['rus']}", [text], [])], [text])
    assert rejected["reason"].to_pylist() == ["exact: held.jsonl"]


def test_parts_shards_and_stops_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, held = random_texts("training", 120), random_texts("held", 40)
    rows = [
        (one, [other], [one[::-1], other]) for one, other in zip(training[:60], training[60:], strict=True)
    ]
    config = DecontaminateStage(
        stage="decontaminate", data=["x"], against=[held_out_folder(tmp_path / "held", held)]
    )
    folder = write(tmp_path / "rows", rows, size=25)
    facts = decontaminate_stage(config, [folder], tmp_path / "whole")
    assert 0 < facts["contaminated"] < facts["rows"] + facts["contaminated"] == len(rows)
    monkeypatch.setattr(contamination, "SHARD_CHARACTERS", 1500)
    monkeypatch.setattr(contamination, "MATCHES", 3)
    monkeypatch.setattr(decontaminate, "SLICE", 7)
    sift_rows, calls = decontaminate._sift_rows, iter(range(6))

    def stopped(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return sift_rows(*arguments)

    monkeypatch.setattr(decontaminate, "_sift_rows", stopped)
    with using(Engine(workers=1)):
        with pytest.raises(KeyboardInterrupt):
            decontaminate_stage(config, [folder], tmp_path / "cut")
        assert len(list((tmp_path / "cut" / decontaminate.SHARDS).glob("0*"))) > 2
        monkeypatch.setattr(decontaminate, "_sift_rows", sift_rows)
        assert decontaminate_stage(config, [folder], tmp_path / "cut") == facts
    for name in (ROWS_FILE, REJECTS):
        assert pq.read_table(tmp_path / "cut" / name).equals(pq.read_table(tmp_path / "whole" / name))


@pytest.mark.slow
def test_worker_processes_make_no_difference(tmp_path: Path) -> None:
    training = random_texts("training", 60)
    rows = [(one, [one], [one]) for one in training]
    config = DecontaminateStage(
        stage="decontaminate", data=["x"], against=[held_out_folder(tmp_path / "held", training[::3])]
    )
    folder = write(tmp_path / "rows", rows, size=20)
    for workers in (1, 2):
        with using(Engine(workers=workers)):
            decontaminate_stage(config, [folder], tmp_path / str(workers))
    assert sha256_folder(tmp_path / "1") == sha256_folder(tmp_path / "2")


def test_shards_are_read_back_as_built(tmp_path: Path) -> None:
    held = random_texts("held", 50)
    counts = build_shards([Batch("one", held[:30]), Batch("two", held[20:])], tmp_path, LIMITS)
    assert counts["one"]["texts"] == counts["two"]["texts"] == 30
    (shard,) = open_shards(tmp_path)
    differing = [list(dict.fromkeys(map(naive.fold, some))) for some in (held[:30], held[20:])]
    assert shard.texts.strings() == [text for some in differing for text in some]
    assert shard.sets == ["one"] * len(differing[0]) + ["two"] * len(differing[1])


def test_test_texts_are_all_strings_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pq.write_table(
        pa.table({"n": [1], "q": ["one"], "more": [["two", "three"]]}), tmp_path / "a" / "x.parquet"
    )
    (tmp_path / "y.jsonl").write_text('{"q": {"text": "four"}, "n": 2.5, "tags": ["five", null]}\n')
    (tmp_path / "z.csv").write_text("q,a\nsix,seven\n")
    (tmp_path / "w.txt").write_text("eight\nnine\n")
    got = dict(held_out_texts([str(tmp_path)]))
    assert {name: set(texts) for name, texts in got.items()} == {
        "a/x.parquet": {"one", "two", "three"},
        "y.jsonl": {"four", "five"},
        "z.csv": {"six", "seven"},
        "w.txt": {"eight", "nine"},
    }
    (tmp_path / "y.jsonl").write_text('{"q": \n')
    with pytest.raises(UsageError, match="line 1"):
        list(held_out_texts([str(tmp_path)]))


def test_something_to_look_for_is_needed() -> None:
    with pytest.raises(ValueError, match="give test texts"):
        DecontaminateStage(stage="decontaminate", data=["x"])
