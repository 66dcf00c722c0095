"""What a run prints when it is done: the models beside the baselines, where the report is, some searches."""

import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from f2llm.recipe import IndexStage, Recipe

PLAIN_WIDTH = 110  # columns where standard output is not a terminal
SMALL_SIZES = ("64", "16")
NEAREST, SHOWN = 60, 8  # texts looked at for each example search, and names shown of them


def summarise(recipe: Recipe, run: Path) -> None:
    """Write the report of a finished run, and print what is in it that one wants to know first."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    from f2llm.data.corpus_report import CORPUS

    kinds = {config.stage for config in recipe.stages.values()}
    if kinds & {"evaluate", *CORPUS}:
        from f2llm.evaluate.report import write_report

        report = write_report(run)
        if "evaluate" in kinds:
            console.print(f"{report['names']:,} names in {report['languages']} languages")
            console.print(scores_table(report, plain=not console.is_terminal))
        console.print(f"Report: {run / 'report.html'}", markup=False, soft_wrap=True)
    for name, config in recipe.stages.items():
        if isinstance(config, IndexStage):
            _print_searches(console, run / name, config.examples)


def scores_table(report: dict[str, Any], *, plain: bool) -> Table:
    """Models and baselines of a report, with mean accuracy@1 over languages at full width and at small sizes."""
    title = f"accuracy@1 on held-out names, mean over {report['languages_scored']} languages"
    table = Table(title=title, title_justify="left", box=None if plain else box.SIMPLE_HEAD)
    table.add_column("model")
    for heading in ("parameters", "tokens/s", "full", *(f"{size} dims" for size in SMALL_SIZES)):
        table.add_column(heading, justify="right")
    for model in report["models"]:
        scores = model["accuracy_at_1"]
        table.add_row(
            model["name"],
            f"{model['parameters']:,}",
            f"{model['tokens_per_second']:,.0f}",
            *(_mean(scores, size) for size in (str(model["dim"]), *SMALL_SIZES)),
        )
    for name, scores in (report.get("baseline") or {}).items():
        table.add_row(f"baseline: {name}", "", "", _mean(scores, "full"))
    return table


def _mean(scores: dict[str, Any], size: str) -> str:
    return f"{scores[size]['mean']:.3f}" if size in scores else "-"


def _print_searches(console: Console, index: Path, queries: list[str]) -> None:
    """For each query the thing that it is taken for, and that thing's other names among the nearest texts."""
    from f2llm.search.store import search

    for query in queries:
        hits = search(index, query, NEAREST)
        thing = hits[0].thing
        names = [f"{hit.text} ({hit.lang})" for hit in hits if hit.thing == thing and hit.text != query]
        console.print(f"{query} is {thing}: {', '.join(names[:SHOWN])}", markup=False, soft_wrap=True)
