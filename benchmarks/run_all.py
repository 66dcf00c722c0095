"""Run the benchmarks of this folder, one after the other, and write docs/benchmarks.md from their last lines.

A benchmark is any other script here with a `main`; it is known by its name, and its docstring opens its section. All
are run, or those that are named: then the page keeps its sections of the others.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from f2llm.files import write_json, write_text
from harness import ROOT

HERE = Path(__file__).resolve().parent

INTRODUCTION = """\
# Benchmarks

Written by `make bench`, or for some topics by `python benchmarks/run_all.py NAME ...`; do not edit. Each section has \
the date of its measurement.

Every figure of ours stands beside its peer's from the same run: both in processes of their own, in turns (ours, \
peer, ours, peer ...), the median of three turns after a warm-up. The ratio is ours / peer; the bar is for the ratio \
or, without a peer, for our figure itself. Figures are good only from a quiet machine: look at the load average.
"""

TRIAL = (
    "**A trial with tiny models (`--small`): it shows that the scripts work, its figures mean nothing.**\n"
)


def topics() -> list[Path]:
    """The benchmark scripts of this folder."""
    scripts = sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)
    return [path for path in scripts if "main" in functions(path)]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def run(script: Path, options: list[str]) -> dict[str, Any] | str:
    """The script's result, or why there is none; what it prints before its last line is passed on."""
    process = subprocess.Popen([sys.executable, str(script), *options], stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout or ():
        print(last, end="", flush=True)
        last = line
    if code := process.wait():
        return f"failed with exit code {code}"
    try:
        return dict(json.loads(last))
    except ValueError:
        return "its last line is not a JSON object"


def page(sections: Mapping[str, str], small: bool) -> str:
    """docs/benchmarks.md: a section a topic, in the order of `topics`."""
    ordered = [sections[name] for name in sorted(sections)]
    return "\n".join([INTRODUCTION, *([TRIAL] if small else []), *ordered])


def sections_of(text: str) -> dict[str, str]:
    """The sections of a page that was written before, by topic."""
    _, *parts = re.split(r"^## (\w+)$", text, flags=re.MULTILINE)
    return {name: f"## {name}{rest.rstrip()}\n" for name, rest in zip(parts[::2], parts[1::2], strict=True)}


def section(name: str, result: dict[str, Any] | str) -> str:
    docstring = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    if isinstance(result, str):
        return f"## {name}\n\n{docstring}\n\nNo figures: {result}.\n"
    return "\n".join(
        [
            f"## {name}\n\n{docstring}\n",
            *table(result["figures"]),
            "",
            f"- Command: `{result['command']}`, {result['date']}",
            f"- Load average at the start: {', '.join(map(str, result['load_average']))}",
            f"- Machine: {facts(result['machine'])}",
            f"- Input: {facts(result['inputs'])}",
            *(f"- Process of {who}: {facts(values)}" for who, values in result["workers"].items()),
            "",
        ]
    )


def table(figures: Iterable[dict[str, Any]]) -> list[str]:
    """Markdown lines of one table of figures."""
    head = ["| figure | ours | peer | ratio | bar | met |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    return head + [f"| {' | '.join(cells(figure))} |" for figure in figures]


def cells(figure: dict[str, Any]) -> list[str]:
    sign = {"higher": "at least", "lower": "at most"}[figure["better"]]
    met = {True: "yes", False: "no", None: "no bar"}[figure["met"]]
    return [
        figure["name"],
        number(figure["ours"]),
        number(figure["peer"]),
        "" if figure["ratio"] is None else f"{figure['ratio']:.2f}",
        "" if figure["bar"] is None else f"{sign} {figure['bar']:g}",
        met if figure["status"] == "measured" else figure["status"],
    ]


def number(value: float | None) -> str:
    """Three digits, or as many as tell a value just below one (a cosine) from one."""
    if value is None:
        return ""
    if 0.99 < value < 1:
        return f"{value:.7f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def facts(values: dict[str, Any]) -> str:
    """{"texts": 128, "threads": {"ours": 2}} -> "texts 128, threads (ours 2)"."""
    return ", ".join(
        f"{key.replace('_', ' ')} {f'({facts(value)})' if isinstance(value, dict) else value}"
        for key, value in values.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = [script.stem for script in topics()]
    parser.add_argument("topics", nargs="*", metavar="NAME", help=f"benchmarks to run: {', '.join(names)}")
    parser.add_argument("--small", action="store_true", help="tiny models and few texts: a trial, no figures")
    parser.add_argument(
        "--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="Markdown to write"
    )
    parser.add_argument("--json", type=Path, help="write all results to this file as well")
    arguments = parser.parse_args()
    if unknown := set(arguments.topics) - set(names):
        parser.error(f"there is no benchmark {min(unknown)!r}; take some of {', '.join(names)}")
    results = {}
    for name in arguments.topics or names:
        print(f"== {name}", flush=True)
        results[name] = run(HERE / f"{name}.py", ["--small"] if arguments.small else [])
    kept = sections_of(arguments.page.read_text()) if arguments.topics and arguments.page.exists() else {}
    measured = {name: section(name, result) for name, result in results.items()}
    write_text(arguments.page, page(kept | measured, arguments.small))
    if arguments.json:
        write_json(arguments.json, results)
    failed = {name: result for name, result in results.items() if isinstance(result, str)}
    print(f"wrote {arguments.page}", *(f"{name}: {why}" for name, why in failed.items()), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
