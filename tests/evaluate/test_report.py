"""The report of a made-up run of real size: its figures against the scores, its page against what a page may be."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from f2llm.errors import F2Error
from f2llm.evaluate.page import duration, scalars, short_count
from f2llm.evaluate.report import teacher_gains, write_report
from f2llm.files import read_json, write_json, write_text

VOID = {"meta", "input", "br", "hr", "img", "link"}


class Page(HTMLParser):
    """All elements with their attributes; the stack must be empty at the end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [
            attrs
            for name, attrs in self.elements
            if name == tag and all(value in (attrs.get(key) or "").split() for key, value in wanted.items())
        ]


@pytest.fixture(scope="module")
def report(pretend_run: Path) -> dict[str, Any]:
    return write_report(pretend_run)


@pytest.fixture(scope="module")
def page(pretend_run: Path, report: dict[str, Any]) -> Page:
    return Page((pretend_run / "report.html").read_text(encoding="utf-8"))


def test_json_has_the_promised_keys(pretend_run: Path, report: dict[str, Any]) -> None:
    assert report == read_json(pretend_run / "report.json")
    promised = {"seconds", "peak_memory_gb", "languages", "names", "models", "baseline", "schema_version"}
    assert promised <= set(report)
    assert report["seconds"] == pytest.approx(461.1)
    assert report["peak_memory_gb"] == pytest.approx(0.4 + 0.21 * 9)
    assert (report["languages"], report["names"]) == (256, 220370)
    large = report["models"][0]
    assert {"name", "parameters", "dim", "tokens_per_second", "accuracy_at_1"} <= set(large)
    assert (large["name"], large["dim"], large["tokens_per_second"]) == ("large", 256, 41210)
    assert list(large["accuracy_at_1"]) == ["8", "16", "32", "64", "128", "192", "256"]
    assert set(large["accuracy_at_1"]["64"]) == {"mean", "median", "p10"}
    assert set(report["baseline"]) == {"tfidf", "tfidf_nearest", "lookup"}
    assert set(report["baseline"]["lookup"]) == {"full"}


def test_figures_are_those_of_the_scores(pretend_run: Path, report: dict[str, Any]) -> None:
    pairs = read_json(pretend_run / "scores" / "scores.json")["models"][0]["pairs"]["256"]
    accuracies = [row["accuracy_at_1"] for row in report["per_language"]]
    assert len(accuracies) == report["languages_scored"] == pairs["languages"]
    assert np.mean(accuracies) == pytest.approx(report["models"][0]["accuracy_at_1"]["256"]["mean"], abs=1e-4)
    nearest = [row["tfidf_nearest"] for row in report["per_language"]]
    assert np.mean(nearest) == pytest.approx(report["baseline"]["tfidf_nearest"]["full"]["mean"], abs=1e-4)
    for script, figures in report["scripts"].items():
        rows = [row for row in report["per_language"] if row["script"] == script]
        assert len(rows) == figures["languages"]
        for key in ("accuracy_at_1", "tfidf", "tfidf_nearest", "lookup"):
            assert np.mean([row[key] for row in rows]) == pytest.approx(figures[key], abs=1e-4)
    hardest = sorted(accuracies)[:10]
    assert [row["accuracy_at_1"] for row in report["worst"]] == hardest


def test_page_needs_nothing_else(pretend_run: Path, page: Page) -> None:
    text = (pretend_run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("// The table of languages", ""))
    for tag, attrs in page.elements:
        assert tag not in {"link", "img", "iframe", "object"}
        assert not {"src", "href", "onclick"} & set(attrs), tag
    assert len(text) < 600_000


def test_page_shows_every_language_in_table_and_pictures(page: Page, report: dict[str, Any]) -> None:
    tags = {row["language"] for row in report["per_language"]}
    assert {attrs["data-row"] for attrs in page.all("tr") if "data-row" in attrs} == tags
    dots = [attrs["data-language"] for attrs in page.all("circle", **{"class": "dot"})]
    assert {tag: dots.count(tag) for tag in tags} == dict.fromkeys(tags, 3)  # strip wide and narrow, scatter
    text = " ".join(page.words)
    assert "Abkhazian" in text and "Cyrillic" in text
    for heading in (
        "The family",
        "Fewer dimensions",
        "The languages",
        "With and without a teacher",
        "Training",
    ):
        assert heading in text


def test_everything_drawn_lies_on_its_canvas(page: Page) -> None:
    size = (0.0, 0.0)
    checked = 0
    for tag, attrs in page.elements:
        if tag == "svg":
            width, height = (attrs.get("viewbox") or "").split()[2:]
            size = (float(width), float(height))
        for x, y in (("cx", "cy"), ("x", "y")):
            if tag in {"circle", "text"} and x in attrs:
                assert -1 <= float(attrs[x] or "nan") <= size[0] + 1, attrs
                assert -1 <= float(attrs[y] or "nan") <= size[1] + 1, attrs
                checked += 1
    assert checked > 700


def test_nothing_from_outside_is_markup(pretend_run: Path, page: Page, tmp_path: Path) -> None:
    text = (pretend_run / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;not bold&lt;/b&gt;" in text and "<b>not bold" not in text  # from the recipe

    run = shutil.copytree(pretend_run, tmp_path / "run")
    evil = '"><script>alert(1)</script>\N{RIGHT-TO-LEFT OVERRIDE}العربية'
    manifest = read_json(run / "names" / "manifest.json")
    write_json(run / "names" / "manifest.json", manifest | {"facts": manifest["facts"] | {"note": evil}})
    first = json.loads((run / "base" / "log.jsonl").read_text().splitlines()[0])
    write_text(run / "base" / "log.jsonl", json.dumps(first | {"source": evil}) + "\n")
    write_report(run)
    changed = (run / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in changed and "<script>alert" not in changed
    assert len(Page(changed).all("script")) == len(page.all("script")) == 1


def test_run_without_scores_has_a_report_too(pretend_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(pretend_run, tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    write_text(run / "recipe.yaml", recipe[: recipe.index("  base:")])
    figures = write_report(run)
    assert (figures["models"], figures["baseline"], figures["seconds"]) == ([], {}, 13.5)
    text = " ".join(Page((run / "report.html").read_text(encoding="utf-8")).words)
    assert "none of them scored a model" in text and "The family" not in text and "Training" not in text


def test_run_without_baselines_or_held_out_things(pretend_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(pretend_run, tmp_path / "run")
    scores = read_json(run / "scores" / "scores.json")
    for model in scores["models"]:
        model["things"] = {size: {} for size in model["things"]}
    write_json(run / "scores" / "scores.json", scores | {"baseline": {}})
    figures = write_report(run)
    assert figures["models"][0]["things"] == {"accuracy_at_1": {}}
    assert all(row["things"] is None for row in figures["per_language"])
    text = " ".join(Page((run / "report.html").read_text(encoding="utf-8")).words)
    assert "TF-IDF" not in text and "hardest" in text


def test_broken_files_are_named(pretend_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(pretend_run, tmp_path / "run")
    write_text(run / "base" / "log.jsonl", "{")
    with pytest.raises(F2Error, match=r"base/log\.jsonl cannot be read"):
        write_report(run)
    (run / "medium" / "manifest.json").unlink()
    with pytest.raises(F2Error, match=r"medium/manifest\.json is missing"):
        write_report(run)


def test_teacher_gains_compare_like_with_like(report: dict[str, Any]) -> None:
    (pair,) = report["distillation"]
    assert (pair["with"], pair["without"], pair["teacher"]) == ("small", "small-alone", "large")
    by_name = {model["name"]: model["accuracy_at_1"] for model in report["models"]}
    assert pair["sizes"]["16"] == {
        "with": by_name["small"]["16"]["mean"],
        "without": by_name["small-alone"]["16"]["mean"],
    }
    summary = {"pairs": {"8": {"accuracy_at_1": {"mean": 0.5}}}}
    models = [{"name": "taught", **summary}, {"name": "alone", **summary}]
    configs: dict[str, Any] = {
        "taught": {"base": "cut", "steps": 10, "teacher": "large", "distillation": {"target": "kept"}},
        "alone": {"base": "cut", "steps": 10, "teacher": None, "distillation": {"target": "prefix"}},
    }
    assert len(teacher_gains(models, configs)) == 1
    assert teacher_gains(models, configs | {"alone": configs["alone"] | {"steps": 20}}) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (5.13, "5.1 s"),
        (41.7, "42 s"),
        (59.7, "1 min 0 s"),
        (432, "7 min 12 s"),
        (7265, "2 h 1 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


def test_short_figures() -> None:
    assert [short_count(n) for n in (999, 5_680_000, 80_000_000, 13_500_000_000)] == [
        "999",
        "5.68M",
        "80M",
        "13.5B",
    ]
    facts = {
        "steps": 12000,
        "loss": 0.12345,
        "rate": 31234.5,
        "kinds": {"a": 1},
        "identity": "0" * 64,
        "who": "x",
    }
    assert scalars(facts) == [("steps", "12,000"), ("loss", "0.123"), ("rate", "31,234"), ("who", "x")]
