"""Answers: how they are read, and how the journal keeps them."""

import json
from pathlib import Path
from typing import Any

import pytest

from f2llm.errors import F2Error
from f2llm.synthetic.journal import Ended, Journal, Tokens, open_journal
from f2llm.synthetic.kinds import (
    KINDS,
    LabelTasks,
    Triple,
    UnreadableError,
    read,
    row_form,
    schema,
    tasks_form,
)

TRIPLE = {"query": "a", "positive": "b", "negative": "c"}


def objects(value: Any) -> list[dict[str, Any]]:
    """All schemas of objects within a schema."""
    found: list[dict[str, Any]] = []
    if isinstance(value, dict):
        found += [value] if value.get("type") == "object" else []
        value = list(value.values())
    if isinstance(value, list):
        found += [one for part in value for one in objects(part)]
    return found


@pytest.mark.parametrize("kind", list(KINDS.values()), ids=lambda kind: kind.name)
def test_schemas_keep_the_rules_of_strict_servers(kind: Any) -> None:
    for form in (tasks_form(kind), row_form(kind)):
        made = schema(form)
        for one in objects(made):
            assert one["additionalProperties"] is False
            assert one["required"] == list(one["properties"])
        known = {"type", "properties", "required", "additionalProperties", "items", "$ref", "$defs"}
        assert {key for one in objects(made) for key in one} <= known
        assert not {"minLength", "minItems", "title", "default"} & set(json.dumps(made).split('"'))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(TRIPLE),
        f"```json\n{json.dumps(TRIPLE, indent=2)}\n```",
        f"<think>{{x}} or {{}}?</think> Sure! {json.dumps(TRIPLE)} I hope it helps.",
        json.dumps(TRIPLE | {"why": "because"}),
        json.dumps(TRIPLE | {"query": "  a\n"}),
    ],
)
def test_the_object_is_found(text: str) -> None:
    assert read(text, Triple).model_dump() == TRIPLE


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("no object", "not JSON"),
        (json.dumps(TRIPLE)[:-1], "not JSON"),
        ("<think>" + json.dumps(TRIPLE), "not JSON"),  # it never stopped thinking
        (json.dumps(TRIPLE | {"query": 3}), "wrong schema"),
        (json.dumps(TRIPLE | {"query": " "}), "wrong schema"),
        (json.dumps({"query": "a", "positive": "b"}), "wrong schema"),
    ],
)
def test_what_cannot_be_read(text: str, reason: str) -> None:
    with pytest.raises(UnreadableError, match=f"^{reason}$"):
        read(text, Triple)


@pytest.mark.parametrize("labels", [[], ["a"], ["a", "b", "A"]])
def test_labels_are_two_or_more_and_different(labels: list[str]) -> None:
    with pytest.raises(UnreadableError, match="wrong schema"):
        read(json.dumps({"tasks": [{"task": "t", "name": "n", "labels": labels}]}), LabelTasks)


def test_halves_of_characters_and_decomposed_letters_are_mended() -> None:
    answer = read('{"query": "e\\u0301", "positive": "\\ud83d\\ude00", "negative": "c"}', Triple)
    assert isinstance(answer, Triple) and (answer.query, answer.positive) == ("\u00e9", "\U0001f600")


def good(id: str, **answer: str) -> Ended:
    return Ended(id, Tokens(10, 2), answer=answer or {"x": "é"}, model="m")


def test_a_journal_gives_back_what_it_was_told(tmp_path: Path) -> None:
    bad = Ended("b", Tokens(5, 5), "not JSON", text="hm")
    with open_journal(tmp_path) as journal:
        for ended in (good("a", x="é"), bad, good("c", y="z")):
            journal.begin(ended.id, Tokens(100, 100))
            journal.end(ended)
            assert journal.get(ended.id) == ended
    with open_journal(tmp_path) as journal:
        assert [journal.get(id) for id in "abcd"] == [good("a", x="é"), bad, good("c", y="z"), None]
        assert (journal.used, journal.assumed, journal.requests) == (Tokens(25, 9), Tokens(0, 0), 3)
        assert (journal.answers, dict(journal.faults)) == (2, {"not JSON": 1})


def test_what_is_lost_counts_as_the_most_it_may_have_cost(tmp_path: Path) -> None:
    with open_journal(tmp_path) as journal:
        journal.begin("a", Tokens(100, 50))
        assert journal.spent == Tokens(100, 50)  # in flight
        journal.end(Ended("a", None, "timeout", is_final=False))
        assert "a" not in journal and journal.get("a") is None
        journal.begin("a", Tokens(100, 50))  # ... and the process is killed here
    with open_journal(tmp_path) as journal:
        assert journal.spent == Tokens(200, 100)
        journal.begin("a", Tokens(100, 50))
        assert journal.spent == Tokens(300, 150)
        journal.end(good("a"))
        assert journal.spent == Tokens(210, 102) and journal.requests == 3


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_was_cut_is_as_if_it_had_not_been(tmp_path: Path, cut: int) -> None:
    with open_journal(tmp_path) as journal:
        for id in "ab":
            journal.begin(id, Tokens(100, 100))
            journal.end(good(id))
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with open_journal(tmp_path) as journal:
        assert "a" in journal and "b" not in journal
        assert journal.spent == Tokens(110, 102)
        journal.begin("b", Tokens(100, 100))
        journal.end(good("b"))
    with Journal(path) as journal:
        assert journal.get("b") == good("b") and journal.requests == 3


def test_a_journal_that_somebody_broke_is_not_gone_on_with(tmp_path: Path) -> None:
    with open_journal(tmp_path) as journal:
        journal.begin("a", Tokens(1, 1))
    path = tmp_path / "answers.jsonl"
    path.write_text(path.read_text() + "what is this\n")
    with pytest.raises(F2Error, match=r"answers\.jsonl:2 is not a line of a journal"), open_journal(tmp_path):
        pass
    assert path.read_text().endswith("what is this\n")  # nothing is thrown away
    assert Journal(tmp_path / "other.jsonl").requests == 0
