"""Progress on everything that takes longer than two seconds: a bar on a terminal, silence elsewhere.

Of several ranks only the first speaks: the others would say the same.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_console = Console(stderr=True)


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        of = "" if task.total is None else f"/{task.total:,.0f}"
        return Text(f"{task.completed:,.0f}{of}")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.1f} {task.fields['unit']}/s")


class _Bars(Progress):
    """Bars with a note below each, where it takes no room from the count and the time left."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", no_wrap=True, overflow="ellipsis")


class Bar:
    """Handle of one running bar."""

    def __init__(self, progress: Progress, task: object) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=amount, note=note)  # type: ignore[arg-type]


@contextmanager
def progress(*, total: float | None, what: str, unit: str) -> Iterator[Bar]:
    """`with progress(total=500, what="train base", unit="step") as bar: bar.advance(1, note="loss 3.21")`.

    `total` is None where nobody knows it, as for a stream.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Count(),
        _Rate(),
        TimeRemainingColumn(),
    )
    silent = _is_follower() or not sys.stderr.isatty()
    with _Bars(*columns, console=_console, transient=True, disable=silent) as bars:
        yield Bar(bars, bars.add_task(what, total=total, unit=unit, note=""))


def say(message: str) -> None:
    """One line of status on standard error."""
    if not _is_follower():
        print(message, file=sys.stderr, flush=True)


def _is_follower() -> bool:
    """Whether torchrun started this process as another than the first."""
    return os.environ.get("RANK", "0") != "0"
