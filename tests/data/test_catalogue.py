"""The catalogue: all sources of the paper with their figures, and strict files whose mistakes have a line."""

import csv
import re
from pathlib import Path

import pytest

from f2llm import languages
from f2llm.data.catalogue import FOLDER, find, get, load
from f2llm.data.records import UNKNOWN, Columns, SourceRecord, read_record, read_records, write_record
from f2llm.errors import UsageError

# arXiv 2603.19223: Tables 8-9, the formats counted from them, and the sources that section 3.3 names for stage 1.
SAMPLES, STAGE_1_SAMPLES = 60_147_938, 26_693_280
FORMATS = {
    "retrieval": (118, 54_021_180),
    "clustering": (30, 5_554_559),
    "classification": (9, 572_199),
}
STAGE_1 = {"paracrawl", "webfaq", "mmarco", "clirmatrix", "codesearchnet", "codesearchnet-ccr", "ocgi"}


def test_the_totals_are_the_papers() -> None:
    records = load().values()
    assert len(records) == 157
    assert sum(record.samples or 0 for record in records) == SAMPLES
    for form, (sources, samples) in FORMATS.items():
        of_format = [record for record in records if record.format == form]
        assert (len(of_format), sum(record.samples or 0 for record in of_format)) == (sources, samples)
    stage_1 = find(stage=1).records
    assert {record.name for record in stage_1} == STAGE_1
    assert sum(record.samples or 0 for record in stage_1) == STAGE_1_SAMPLES
    assert len(find(stage=2).records) == 157


def test_every_row_of_the_papers_tables_is_a_record(shared: Path) -> None:
    with open(shared / "spec" / "sources.csv", encoding="utf-8", newline="") as file:
        rows = sorted(
            (
                row["name"],
                row["task_type"],
                row["format"],
                int(row["samples"]),
                row["location"],
                row["stage1"] == "true",
                row["languages"],
            )
            for row in csv.DictReader(file)
        )
    records = sorted(load().values(), key=lambda record: record.title)
    for (*facts, spoken), record in zip(rows, records, strict=True):
        ours = [record.title, record.task, record.format, record.samples, record.location, 1 in record.stages]
        assert ours == facts
        codes = spoken.split(", ")
        if spoken.isdigit():
            assert record.language_count == int(spoken)
            assert record.languages == UNKNOWN
        elif record.programming_languages:
            assert record.programming_languages == codes
            assert record.language_count == len(codes)
        else:
            assert record.languages == [languages.tag(code) for code in codes]


def test_records_say_where_facts_are_from_and_what_nobody_knows() -> None:
    for record in load().values():
        known = record.model_fields_set - {"name", "from_", "programming_languages", "language_count"}
        known = {"languages" if field == "language_count" else field for field in known}
        assert known - {"columns"} <= record.from_.keys(), record.name
        assert (record.licence == UNKNOWN) == ("licence" not in record.from_), record.name
        assert record.columns == UNKNOWN
        assert record.revision == UNKNOWN


def test_either_side_of_a_symmetric_source_may_carry_the_instruction() -> None:
    # Section 3.3: clustering, STS, bitext mining and paraphrase detection.
    for record in load().values():
        among = record.task in ("sts", "bitext mining", "paraphrase detection")
        assert record.symmetric == (among or record.format == "clustering"), record.name


def test_instructions_are_short_imperatives() -> None:
    for record in load().values():
        assert re.fullmatch(r"(Find|Judge|Tell|Choose) [^.:\n]{10,90}", record.instruction), record.name


def test_each_file_holds_one_task_type() -> None:
    for path in FOLDER.glob("*.yaml"):
        tasks = {placed.record.task for placed in read_records(path)}
        assert {re.sub(r"\W", "_", task) for task in tasks} == {path.stem}


def test_find_by_all_at_once() -> None:
    found = find(language="zh", task="question answering", format="retrieval")
    assert {"t2ranking", "medqa"} <= {record.name for record in found.records}
    assert all("zho" in record.languages for record in found.records)
    everything = find(task="question answering").records
    left_out = {record.name for record in everything} - {record.name for record in found.records}
    unlisted = {record.name for record in found.unlisted}
    assert unlisted < left_out
    assert all(get(name).languages == UNKNOWN for name in unlisted)
    assert all(get(name).languages != UNKNOWN for name in left_out - unlisted)


def test_find_a_programming_language() -> None:
    assert {record.name for record in find(language="SQL").records} == {"synthetictext2sql"}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"name": "SQUAD"}, "no source 'SQUAD', the nearest is 'squad'"),
        ({"name": "qqqq"}, "the nearest is"),
        ({"task": "question-answering"}, "no task 'question-answering', the nearest is 'question answering'"),
        ({"language": "xyz"}, "unknown language 'xyz': the nearest known code is"),
    ],
)
def test_unknown_names_are_one_sentence_with_the_nearest(asked: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        find(**asked)  # type: ignore[arg-type]


GOOD = """\
defaults:
  task: question answering
  format: retrieval
  symmetric: false
  instruction: Find it
  from:
    task: a book

sources:
  - name: one
    title: One
    languages: [de, zh-Hant]
    from: {title: a friend}

  - name: two
    title: Two
    format: clustering
    columns: {text: body, label: topic}
"""


def test_defaults_are_for_what_a_record_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD)
    (one, place), (two, _) = read_records(tmp_path / "a.yaml")
    assert place == f"{tmp_path}/a.yaml:10"
    assert (one.task, one.format, one.languages) == (
        "question answering",
        "retrieval",
        ["deu", "zho_Hant"],
    )
    assert one.from_ == {"task": "a book", "title": "a friend"}
    assert (two.format, two.columns) == ("clustering", Columns(text="body", label="topic"))


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (
            "    title: Two\n",
            "    titel: Two\n",
            "a.yaml:16: unknown key 'titel' of 'two': the nearest valid key",
        ),
        ("    title: Two\n", "", "a.yaml:15: 'two' lacks the key 'title'; add it."),
        ("{text: body", "{txet: body", "a.yaml:18: unknown key 'columns.txet'"),
        (
            "format: clustering",
            "format: clusters",
            "a.yaml:17: 'format' of 'two' is 'clusters', but it should be",
        ),
        ("[de, zh-Hant]", "[de, zzzz]", "a.yaml:12: 'zzzz' is not a language tag"),
        ("[de, zh-Hant]", "[de]\n    language_count: 3", "a.yaml:13: 'language_count' is for languages"),
        ("{title: a friend}", "{tilte: a friend}", "a.yaml:13: 'from' speaks of 'tilte'"),
        ("symmetric: false", "symmetric: perhaps", "a.yaml:4: 'symmetric' of 'one' is 'perhaps'"),
        ("name: two", "name: Two!", "a.yaml:15: 'name' of 'Two!' is 'Two!'"),
        ("name: two", "name: one", "a.yaml:15: the name 'one' stands at"),
        ("sources:\n", "sources:\n  - 5\n", "a.yaml:10: expected a record"),
        ("defaults:", "default:", "a.yaml:1: unknown key 'default' beside 'sources'"),
    ],
)
def test_mistakes_in_a_file_have_a_line(tmp_path: Path, before: str, after: str, says: str) -> None:
    assert GOOD.count(before) == 1
    (tmp_path / "a.yaml").write_text(GOOD.replace(before, after))
    with pytest.raises(UsageError, match=re.escape(says)):
        load(tmp_path)


def test_a_record_that_is_written_reads_back_the_same(tmp_path: Path) -> None:
    facts = {
        "title": "no: 'yes'\n#",
        "task": "true",
        "format": "retrieval",
        "symmetric": False,
        "instruction": "ü",
    }
    record = SourceRecord.model_validate(
        {
            **facts,
            "name": "a.b-c",
            "revision": "12e45",
            "licence": "1.0",
            "languages": ["nor"],
            "columns": {"query": "no", "positive": "1e3", "negatives": None},
            "label_names": {"0": "null", "1": "~"},
            "at_least": 0.5,
            "from": {"title": "12:30"},
        }
    )
    write_record(tmp_path / "r.yaml", record)
    again = read_record(tmp_path / "r.yaml")
    assert again == record
    assert again.model_fields_set == record.model_fields_set
