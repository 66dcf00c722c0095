"""The report of a run: what was done, how good the models are, in figures (report.json) and as a page.

recipe.yaml, the stages' manifests, tallies, scores.json, log.jsonl -> figures -> report.json, report.html.
"""

import json
from pathlib import Path

from f2llm.data.corpus_report import corpus_report
from f2llm.errors import F2Error
from f2llm.evaluate.page import Figures, render
from f2llm.files import read_json, write_json, write_text
from f2llm.languages import english_name, script
from f2llm.recipe import load

SCHEMA_VERSION = 1


def write_report(run: Path) -> Figures:
    """Write run/report.json and run/report.html for a run whose stages are all complete; returns the figures.

    Raises F2Error naming the file where the recipe, a manifest or the scores cannot be read.
    """
    manifests = [read_json(run / name / "manifest.json") for name in load(run / "recipe.yaml").stages]
    figures = collect(run, manifests)
    page = render(figures, logs(run, manifests), (run / "recipe.yaml").read_text(encoding="utf-8"))
    write_json(run / "report.json", figures)
    write_text(run / "report.html", page)
    return figures


def collect(run: Path, manifests: list[Figures]) -> Figures:
    """The contents of report.json; figures of a corpus, or of models and languages, only where a stage makes these."""
    facts_of = {manifest["stage"]: manifest["facts"] for manifest in manifests}
    names = facts_of.get("names", {})
    figures: Figures = {
        "schema_version": SCHEMA_VERSION,
        "name": load(run / "recipe.yaml").name,
        "finished": max(manifest["finished"] for manifest in manifests),
        "seconds": round(sum(manifest["seconds"] for manifest in manifests), 1),
        "peak_memory_gb": max(manifest["peak_memory_gb"] for manifest in manifests),
        "languages": names.get("languages", 0),
        "names": names.get("names", 0),
        "models": [],
        "baseline": {},
        "corpus": corpus_report(run, manifests),
        "versions": manifests[-1]["versions"],
        "seed": manifests[-1]["seed"],
        "stages": [
            {key: m[key] for key in ("name", "stage", "seconds", "peak_memory_gb", "facts", "content")}
            for m in manifests
        ],
    }
    evaluations = [manifest for manifest in manifests if manifest["stage"] == "evaluate"]
    if evaluations:
        scores = read_json(run / evaluations[-1]["name"] / "scores.json")
        figures |= score_figures(
            scores, evaluations[-1]["facts"], {m["name"]: m["config"] for m in manifests}
        )
    return figures


def score_figures(scores: Figures, facts: Figures, configs: dict[str, Figures]) -> Figures:
    """What report.json says of the models, the baselines and the languages; `configs` are those of all stages."""
    models = [
        {
            "name": model["name"],
            "parameters": model["parameters"],
            "dim": model["dim"],
            "tokens_per_second": facts["tokens_per_second"][model["name"]],
            "teacher": configs[model["name"]].get("teacher"),
            "accuracy_at_1": _at_sizes(model["pairs"], "accuracy_at_1"),
            "mrr": _at_sizes(model["pairs"], "mrr"),
            "things": {"accuracy_at_1": _at_sizes(model["things"], "accuracy_at_1")},
        }
        for model in scores["models"]
    ]
    best = max(scores["models"], key=lambda model: model["parameters"])
    full = str(best["dim"])
    columns = {"accuracy_at_1": best["pairs"][full]} | {
        name: baseline["pairs"]["full"] for name, baseline in scores["baseline"].items()
    }
    things = best["things"][full].get("per_language", {})
    return {
        "models": models,
        "baseline": {
            name: {"full": baseline["pairs"]["full"]["accuracy_at_1"]}
            for name, baseline in scores["baseline"].items()
        },
        "baseline_mrr": {name: b["pairs"]["full"]["mrr"] for name, b in scores["baseline"].items()},
        "baseline_things": {
            name: b["things"]["full"].get("accuracy_at_1") for name, b in scores["baseline"].items()
        },
        "largest": best["name"],
        "languages_scored": columns["accuracy_at_1"]["languages"],
        "questions_scored": columns["accuracy_at_1"]["queries"],
        **{
            key: scores[key]
            for key in ("candidates", "questions", "left_out", "spelt_as_in_english", "min_queries")
        },
        "worst": columns["accuracy_at_1"]["worst"],
        "scripts": {
            name: {"languages": row["languages"]}
            | {key: summary["scripts"][name]["accuracy_at_1"] for key, summary in columns.items()}
            for name, row in columns["accuracy_at_1"]["scripts"].items()
        },
        "per_language": [
            {
                "language": tag,
                "name": english_name(tag),
                "script": script(tag),
                **row,
                **{name: columns[name]["per_language"][tag]["accuracy_at_1"] for name in scores["baseline"]},
                "things": things[tag]["accuracy_at_1"] if tag in things else None,
            }
            for tag, row in columns["accuracy_at_1"]["per_language"].items()
        ],
        "distillation": teacher_gains(scores["models"], configs),
    }


def _at_sizes(by_size: Figures, key: str) -> Figures:
    return {size: summary[key] for size, summary in by_size.items() if summary}


def teacher_gains(models: list[Figures], configs: dict[str, Figures]) -> list[Figures]:
    """Models that differ in having a teacher or none: the two names and accuracies at each size."""

    def without_teacher(name: str) -> Figures:
        return {k: v for k, v in configs[name].items() if not k.startswith(("teacher", "distillation"))}

    return [
        {
            "with": taught["name"],
            "without": alone["name"],
            "teacher": configs[taught["name"]]["teacher"],
            "sizes": {
                size: {
                    "with": summary["accuracy_at_1"]["mean"],
                    "without": alone["pairs"][size]["accuracy_at_1"]["mean"],
                }
                for size, summary in taught["pairs"].items()
            },
        }
        for taught in models
        for alone in models
        if configs[taught["name"]].get("teacher")
        and "teacher" in configs[alone["name"]]
        and not configs[alone["name"]]["teacher"]
        and without_teacher(taught["name"]) == without_teacher(alone["name"])
    ]


def logs(run: Path, manifests: list[Figures]) -> dict[str, list[Figures]]:
    """Training stage -> its logged steps."""
    found = {}
    for name in (manifest["name"] for manifest in manifests if manifest["stage"] == "train"):
        path = run / name / "log.jsonl"
        try:
            found[name] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise F2Error(f"{path} cannot be read ({error}); remove {path.parent} and run again.") from None
    return found
