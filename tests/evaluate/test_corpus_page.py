"""The page of a corpus of full size, 157 sources in 282 languages: all of it shown, nothing beyond its place."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.evaluate.test_report import Page

from f2llm.evaluate.corpus_page import flow, share, shares
from f2llm.evaluate.report import write_report
from f2llm.files import write_json, write_text
from f2llm.languages import table
from f2llm.recipe import load

RECIPE = """\
name: whole-corpus
output: runs/whole-corpus
stages:
  rows: {stage: sources, records: [records]}
  clean: {stage: clean, data: [rows], language_check: report}
  mined: {stage: mine, data: [clean], model: owner/name}
"""
SOURCES, LANGUAGES = 157, 282
EVIL = "<b>source</b>"


def write_corpus(run: Path) -> dict[str, dict[str, int]]:
    """What the stages of such a run leave but for rows; how many rows of each source and language are left."""
    rng = np.random.default_rng(1)
    tags = [*sorted({language.code for language in table().values()})[: LANGUAGES - 1], "qqq"]
    names = [EVIL, *(f"source-{number:03}" for number in range(1, SOURCES))]
    made = {
        name: {tags[i]: int(n) for i, n in zip(places, rng.integers(10, 90_000, len(places)), strict=True)}
        for number, name in enumerate(names)
        for places in [sorted({number, *(rng.permutation(LANGUAGES)[:9].tolist())} | {number + 125})]
    }
    facts = {"task": "question answering", "symmetric": False, "instruction": "i", "licence": "CC-BY-SA-4.0"}
    sources = [{"name": name, "format": "retrieval", **facts} for name in made]
    tally = {
        name: {tag: {"kept": n, "no text": 3} for tag, n in counts.items()} for name, counts in made.items()
    }
    cleaned = {
        name: {
            tag: {"kept": n - 7, "dropped": {"exact duplicate": 7}, "changed": {"text tidied": 2}}
            for tag, n in counts.items()
        }
        for name, counts in made.items()
    }
    verdicts = {"language as tagged": 9, "too short to tell the language": 4}
    wrong = {"written in another language than tagged: deu": 1}
    checked = {name: dict.fromkeys(counts, verdicts | wrong) for name, counts in made.items()}
    counted = [
        {"source": name, "language": tag, "rows": n - 7, "candidates": {"0": 1, "5": n - 8}}
        for name, counts in made.items()
        for tag, n in counts.items()
    ]
    left = {name: {tag: n - 7 for tag, n in counts.items()} for name, counts in made.items()}
    after = {name: {tag: {"kept": n} for tag, n in counts.items()} for name, counts in left.items()}
    write_text(run / "recipe.yaml", RECIPE)
    write_json(run / "rows" / "tally.json", {"rows": tally, "changed": {}})
    write_json(run / "clean" / "report.json", {"sources": cleaned, "language_check": checked})
    write_json(run / "mined" / "tally.json", {"rows": after, "changed": {}})
    write_json(run / "mined" / "report.json", {"counts": counted})
    facts_of: dict[str, Any] = {
        "rows": {"sources": {name: {"read": 10**6} for name in made}},
        "clean": {},
        "mined": {},
    }
    for name, config in load(run / "recipe.yaml").stages.items():
        write_json(run / name / "sources.json", sources)
        manifest = {
            "stage": config.stage,
            "name": name,
            "config": config.model_dump(mode="json"),
            "seed": 1,
            "versions": {"f2llm": "0.1.0"},
            "content": "0" * 64,
            "seconds": 60.0,
            "peak_memory_gb": 1.0,
            "facts": facts_of[name],
            "finished": "2026-01-05T10:00:00+00:00",
        }
        write_json(run / name / "manifest.json", manifest)
    return left


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, int]]]:
    """The page, and rows by source and language."""
    run = tmp_path_factory.mktemp("whole")
    left = write_corpus(run)
    write_report(run)
    return (run / "report.html").read_text(encoding="utf-8"), left


def test_every_source_and_language_has_a_line(corpus: tuple[str, dict[str, dict[str, int]]]) -> None:
    text, left = corpus
    page = Page(text)
    by_source = {name: sum(counts.values()) for name, counts in left.items()}
    order = [attrs["data-source"] for attrs in page.all("tr") if "data-source" in attrs]
    assert order == sorted(by_source, key=lambda name: -by_source[name]) and len(order) == SOURCES
    by_language: Counter[str] = Counter()
    for counts in left.values():
        by_language.update(counts)
    tags = [attrs["data-tag"] for attrs in page.all("tr") if "data-tag" in attrs]
    assert tags == sorted(by_language, key=lambda tag: -by_language[tag]) and len(tags) == LANGUAGES
    words = " ".join(page.words)
    assert f"{by_language.total():,} rows from {SOURCES} sources in {LANGUAGES} languages" in words
    for number in (*by_source.values(), *by_language.values()):
        assert f"{number:,}" in page.words


def test_page_of_a_corpus_is_small_and_safe(corpus: tuple[str, dict[str, dict[str, int]]]) -> None:
    text, _ = corpus
    assert len(text) < 1_000_000
    assert EVIL not in text and "&lt;b&gt;source&lt;/b&gt;" in text
    page = Page(text)
    assert not {"src", "href", "onclick"} & {name for _, attrs in page.elements for name in attrs}
    width = height = 0.0
    drawn = 0
    for tag, attrs in page.elements:
        if tag == "svg":
            width, height = map(float, (attrs.get("viewbox") or "").split()[2:])
        elif tag == "rect":
            x, y, w, h = (float(attrs[name] or "nan") for name in ("x", "y", "width", "height"))
            assert x >= 0 and w > 0 and x + w <= width + 0.1 and 0 <= y <= y + h <= height
            drawn += 1
    assert drawn > 10


def test_bars_are_as_long_as_their_numbers() -> None:
    counts = Counter({f"task {number}": 1000 - 90 * number for number in range(10)} | {"none": 0})
    bar = shares(counts, 1000)
    assert [part["label"] for part in bar["parts"]] == [*(f"task {n}" for n in range(6)), "4 others"]
    total = counts.total()
    for number, part in enumerate(bar["parts"][:6]):
        assert part["width"] + 1 == pytest.approx(1000 * counts[f"task {number}"] / total, abs=0.2)
        assert part["colour"] == number
    ends = [part["x"] + part["width"] + 1 for part in bar["parts"]]
    assert ends[:-1] == pytest.approx([part["x"] for part in bar["parts"][1:]]) and ends[-1] == pytest.approx(
        1000
    )

    stages = [{"name": "rows", "read": 800, "kept": 600}, {"name": "clean", "read": 600, "kept": 600}]
    first, second = flow(stages, 820)["rows"]
    assert first["rejected"][1] / first["kept"][1] == pytest.approx(200 / 600, abs=0.01)
    assert first["rejected"][0] == pytest.approx(first["kept"][0] + first["kept"][1])
    assert second["kept"] == first["kept"] and second["rejected"][1] == 0


def test_small_shares_are_not_nothing() -> None:
    texts = [share(count, 10_000).replace("\N{NO-BREAK SPACE}", " ") for count in (0, 1, 5, 5000)]
    assert texts == ["0.0 %", "< 0.1 %", "0.1 %", "50.0 %"]
