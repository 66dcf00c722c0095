"""What a check says: passed, failed or skipped, why, and in one sentence what mends it.

A check is data: a name, and a function from a target to a `Finding`. `run_checks` is the one loop; an error inside a
check is a failed check, so that whatever is broken, all the others are still made.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from f2llm.errors import F2Error

# What comes of a number where a text should be, in files and answers that others wrote.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
STYLES = {"pass": "green", "fail": "bold red", "skip": "dim"}

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    status: Literal["pass", "fail", "skip"]
    why: str
    fix: str = ""  # of a failed check: one sentence


Check = tuple[str, Callable[[T], Finding]]


@dataclass(frozen=True)
class Report:
    """All findings of a target, by the names of checks, in the order in which they were made."""

    target: str
    findings: dict[str, Finding]

    @property
    def failed(self) -> list[str]:
        return [name for name, finding in self.findings.items() if finding.status == "fail"]

    def as_dict(self) -> dict[str, Any]:
        """For scripts."""
        checks = [{"check": name, **asdict(finding)} for name, finding in self.findings.items()]
        return {"target": self.target, "passed": not self.failed, "checks": checks}

    def show(self) -> None:
        """Print a table, and how many checks passed, failed and were skipped."""
        table = Table(title=self.target, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("check", "result"):
            table.add_column(heading, no_wrap=True)
        table.add_column("why, and what mends it")
        for name, finding in self.findings.items():
            said = "\n".join(filter(None, (finding.why, finding.fix and f"-> {finding.fix}")))
            table.add_row(name, finding.status, said, style=STYLES[finding.status])
        # A model's own words may have square brackets and colons in them.
        console = Console(highlight=False, markup=False, emoji=False)
        console.print(table)
        counts = [finding.status for finding in self.findings.values()]
        console.print(
            f"{counts.count('pass')} passed, {counts.count('fail')} failed, {counts.count('skip')} skipped"
        )


def passed(why: str) -> Finding:
    return Finding("pass", why)


def failed(why: str, fix: str) -> Finding:
    return Finding("fail", why, fix)


def skipped(why: str) -> Finding:
    return Finding("skip", why)


def run_checks(checks: Iterable[Check[T]], target: T) -> dict[str, Finding]:
    """The finding of each check, by its name."""
    found = {}
    for name, check in checks:
        try:
            found[name] = check(target)
        except (F2Error, *MALFORMED) as error:
            found[name] = failed_by(error)
    return found


def failed_by(error: Exception) -> Finding:
    """The failed check that an error inside it is."""
    if isinstance(error, F2Error):
        return failed(str(error), "Mend what the sentence says, then verify again.")
    return failed(
        f"what is there has another form than expected ({type(error).__name__}: {error}).",
        "Compare the file or the answer with one that passes, and mend it.",
    )
