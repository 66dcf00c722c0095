"""`f2llm data list` and `f2llm data fetch` as one types them: on a terminal of any width, in a pipe, and unattended."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from f2llm import cli_data
from f2llm.data import fetch as fetching
from f2llm.data.catalogue import find, load
from f2llm.data.records import UNKNOWN, SourceRecord, read_record, write_record
from f2llm.errors import UsageError


def data(*arguments: str | Path, given: str = "") -> Result:
    return CliRunner().invoke(cli_data.app, [str(argument) for argument in arguments], input=given)


def drawn(records: list[SourceRecord], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, no_color=True, highlight=False)
    console.print(cli_data.sources_table(records, width=width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 140])
def test_names_and_samples_are_whole_on_a_terminal(width: int) -> None:
    records = list(load().values())
    lines = drawn(records, width)
    assert all(len(line.replace("\x1b[1m", "").replace("\x1b[0m", "")) <= width for line in lines)
    for record in records:
        (line,) = [line for line in lines if line.split()[:1] == [record.name]]
        assert f" {record.samples:,} " in line


def test_a_pipe_gets_a_line_for_each_source_with_nothing_cut() -> None:
    *lines, total = data("list").stdout.splitlines()
    assert total.startswith("157 sources, 60,147,938 samples")
    assert len(lines) == 1 + 157
    for line, record in zip(lines[1:], load().values(), strict=True):
        assert line.startswith(record.name)
        assert record.task in line
        assert record.format in line
        assert f" {record.samples:,}" in line
        assert "…" not in line


def test_list_says_how_many_sources_it_cannot_judge() -> None:
    lines = data("list", "--language", "de", "--format", "clustering").stdout.splitlines()
    found = find(language="deu", format="clustering")
    assert [line.split()[0] for line in lines[1:-2]] == [record.name for record in found.records]
    assert lines[-2].startswith(f"{len(found.records)} sources, ")
    assert lines[-1] == f"{len(found.unlisted)} more are left out: nobody has listed their languages yet."
    assert data("list", "--language", "yor").stdout.startswith("0 sources, 0 samples")


def test_list_for_scripts() -> None:
    printed = json.loads(data("list", "--stage", "1", "--json").stdout)
    assert printed["samples"] == 26_693_280
    assert [SourceRecord.model_validate(source) for source in printed["sources"]] == find(stage=1).records
    unlisted = json.loads(data("list", "--language", "fas", "--json").stdout)["languages_unknown"]
    assert unlisted == [record.name for record in find(language="fas").unlisted]


def test_wrong_words_are_one_sentence() -> None:
    wrong = data("list", "--task", "question").exception
    assert isinstance(wrong, UsageError)
    assert "the nearest is 'question answering'" in str(wrong)


# --- fetch: rows that are here already need no network


@pytest.fixture
def fetched(tmp_path: Path) -> Path:
    """A folder whose sources have all their raw rows: of pairs, of labels, and of neither."""
    columns = {
        "pairs": {
            "question": ["Where?", "Who?"],
            "passage": ["Here [bold]", "Me"],
            "extra": [None, "x" * 1000],
        },
        "labels": {"text": ["a", "b"], "label": [0, 1]},
        "puzzle": {"alpha": ["a"], "beta": ["b"]},
    }
    for name, values in columns.items():
        form = "clustering" if name == "labels" else "retrieval"
        facts = {"title": name, "task": "t", "symmetric": False, "instruction": "i", "columns": UNKNOWN}
        location = f"huggingface.co/datasets/own/{name}"
        record = {**facts, "name": name, "format": form, "location": location}
        write_record(tmp_path / f"{name}.yaml", SourceRecord.model_validate(record))
        folder = tmp_path / "out" / name
        (folder / "raw").mkdir(parents=True)
        pq.write_table(pa.table(values), folder / "raw" / "part-00000.parquet")
        names = {"label": {"0": "bad", "1": "good"}} if name == "labels" else {}
        state = fetching.State(
            location=location, config=None, split="train", revision="r", label_names=names, complete=True
        )
        (folder / "state.json").write_text(state.model_dump_json())
    return tmp_path


@pytest.mark.parametrize("width", [60, 80, 140])
def test_columns_and_what_they_are_read_as_are_whole(fetched: Path, width: int) -> None:
    record = read_record(fetched / "pairs.yaml")
    fetched_pairs = fetching.fetch(record, fetched / "out")
    console = Console(width=width, file=io.StringIO(), no_color=True, highlight=False)
    console.print(cli_data.sample_table(fetched_pairs, width))
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert all(len(line) <= width for line in lines)
    words = {line.split()[0]: line.split()[1:3] for line in lines if line}
    assert words["question"] == ["query", "string"]
    assert words["passage"] == ["positive", "string"]
    assert words["extra"][0] == "string"


def test_without_a_terminal_the_question_is_not_asked(fetched: Path) -> None:
    wrong = data("fetch", "squad", "--out", fetched).exception
    assert isinstance(wrong, UsageError)
    assert "give --yes to take what is proposed" in str(wrong)
    assert not (fetched / "squad").exists()  # nothing was fetched in vain


def test_an_unknown_name_is_told_before_anything_else(fetched: Path) -> None:
    wrong = data("fetch", "sqad", "--out", fetched).exception
    assert isinstance(wrong, UsageError)
    assert re.search(r"no source 'sqad', the nearest is 'squad', then '\w+'.*`f2llm data list`", str(wrong))
    assert "--yes" not in str(wrong)


def test_yes_takes_what_is_proposed(fetched: Path) -> None:
    done = data("fetch", fetched / "pairs.yaml", fetched / "labels.yaml", "--out", fetched / "out", "--yes")
    assert done.exit_code == 0
    shown = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert shown["question"].split()[1:3] == ["query", "string"]
    assert "Here [bold]" in shown["passage"]
    labels = read_record(fetched / "out" / "labels" / "record.yaml")
    assert labels.label_names == {"0": "bad", "1": "good"}
    pairs = read_record(fetched / "out" / "pairs" / "record.yaml")
    assert pairs.columns != UNKNOWN
    assert pairs.columns.positive == "passage"
    again = data("fetch", fetched / "pairs.yaml", "--out", fetched / "out", "--yes")
    assert "the columns are known" in again.stdout


@pytest.mark.parametrize(("answer", "read"), [("y", True), ("", True), ("n", False)])
def test_on_a_terminal_somebody_decides(
    fetched: Path, monkeypatch: pytest.MonkeyPatch, answer: str, read: bool
) -> None:
    monkeypatch.setattr(cli_data, "on_terminal", lambda: True)
    done = data("fetch", fetched / "pairs.yaml", "--out", fetched / "out", given=f"{answer}\n")
    assert "Read pairs like this? [Y/n]" in done.stdout
    columns = read_record(fetched / "out" / "pairs" / "record.yaml").columns
    assert (columns != UNKNOWN) == read
    assert isinstance(done.exception, UsageError) != read


def test_what_cannot_be_read_is_kept_and_said(fetched: Path) -> None:
    done = data("fetch", fetched / "puzzle.yaml", fetched / "pairs.yaml", "--out", fetched / "out", "--yes")
    assert isinstance(done.exception, UsageError)
    assert f"write it under 'columns' in {fetched / 'out' / 'puzzle' / 'record.yaml'}." in str(done.exception)
    assert read_record(fetched / "out" / "puzzle" / "record.yaml").columns == UNKNOWN
    assert read_record(fetched / "out" / "pairs" / "record.yaml").columns != UNKNOWN


def test_the_list_needs_neither_the_library_nor_torch() -> None:
    code = (
        "import sys; sys.argv = ['f2llm', 'list', '--stage', '1']; from f2llm.cli_data import app\n"
        "try: app()\n"
        "except SystemExit: print(sorted({'torch', 'datasets', 'huggingface_hub', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
