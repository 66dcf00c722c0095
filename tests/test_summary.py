"""What a run prints at its end."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from f2llm.recipe import Recipe
from f2llm.summary import summarise

REPORT: dict[str, Any] = {
    "names": 12345,
    "languages": 17,
    "languages_scored": 16,
    "models": [
        {
            "name": "large",
            "parameters": 1_234_567,
            "dim": 128,
            "tokens_per_second": 9876.5,
            "accuracy_at_1": {"16": {"mean": 0.5}, "64": {"mean": 0.6125}, "128": {"mean": 0.75}},
        },
        {
            "name": "small",
            "parameters": 99,
            "dim": 32,
            "tokens_per_second": 5.0,
            "accuracy_at_1": {"16": {"mean": 0.25}, "32": {"mean": 0.375}},
        },
    ],
    "baseline": {"tfidf": {"full": {"mean": 0.321}}, "lookup": {"full": {"mean": 0.1}}},
}


class Hit(NamedTuple):
    text: str
    lang: str
    thing: str
    score: float


def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "output": "unused",
            "stages": {
                "names": {"stage": "names"},
                "words": {"stage": "tokenizer", "data": "names", "vocab_size": 300},
                "large": {
                    "stage": "train",
                    "data": "names",
                    "base": "./model",
                    "instructions": True,
                    "steps": 1,
                    "batch_size": 2,
                    "learning_rate": 1.0,
                },
                "scores": {"stage": "evaluate", "data": "names", "models": ["large"]},
                "shop": {
                    "stage": "index",
                    "data": "names",
                    "model": "large",
                    "examples": ["Ujerumani", "[x]"],
                },
            },
        }
    )


def test_summary_is_a_plain_table_and_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def search(index: Path, query: str, limit: int) -> list[Hit]:
        assert index == tmp_path / "shop"
        hits = [
            Hit(query, "swa", "territory:DE", 1.0),
            Hit(f"like {query}", "deu", "territory:DE", 0.9),
            Hit("日本", "jpn", "territory:JP", 0.5),
            Hit("Jarman", "hau", "territory:DE", 0.1),
        ]
        return hits[:limit]

    report = SimpleNamespace(write_report=lambda run: REPORT if run == tmp_path else None)
    monkeypatch.setitem(sys.modules, "f2llm.evaluate.report", report)
    monkeypatch.setitem(sys.modules, "f2llm.search.store", SimpleNamespace(search=search))
    summarise(recipe(), tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["12,345", "names", "in", "17", "languages"],
        ["accuracy@1", "on", "held-out", "names,", "mean", "over", "16", "languages"],
        ["model", "parameters", "tokens/s", "full", "64", "dims", "16", "dims"],
        ["large", "1,234,567", "9,876", "0.750", "0.613", "0.500"],
        ["small", "99", "5", "0.375", "-", "0.250"],
        ["baseline:", "tfidf", "0.321"],
        ["baseline:", "lookup", "0.100"],
        ["Report:", str(tmp_path / "report.html")],
        "Ujerumani is territory:DE: like Ujerumani (deu), Jarman (hau)".split(),
        "[x] is territory:DE: like [x] (deu), Jarman (hau)".split(),
    ]
