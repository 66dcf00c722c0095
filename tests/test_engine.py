"""The local engine: results in order whoever works, errors in one sentence, and no worker that outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import pytest

from f2llm.engine import Engine, map_items, using
from f2llm.errors import F2Error, UsageError

TWO = Engine(workers=2)
SOON = 20.0  # seconds in which what should end does, on a busy machine


def square_later(number: int) -> int:
    """The square, and the sooner the higher the number."""
    time.sleep(max(0, 5 - number) * 0.05)
    return number * number


def refuse_three(number: int) -> int:
    if number == 3:
        raise UsageError(f"the item {number} is wrong; leave it out.")
    return number


class OddError(Exception):
    """One that pickle cannot make again, as it wants two arguments."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}\nand more")


def slip(number: int) -> int:
    raise OddError("a slip", "item")


def full_disk(number: int) -> int:
    raise OSError(28, "No space left on device", "rows.parquet")


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def sleep_long(folder: str) -> None:
    """Tell who works, then do so for longer than anybody waits."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


def sleep_unless_first(number: int) -> int:
    time.sleep(600 if number else 0)
    return number


def run(function: Callable[[Any], Any], items: Sequence[Any], engine: Engine = TWO) -> list[Any]:
    with using(engine):
        return list(map_items(function, items, what="test"))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_are_in_the_order_of_the_items(workers: int) -> None:
    assert run(square_later, range(8), Engine(workers=workers)) == [n * n for n in range(8)]


def test_no_items() -> None:
    assert run(square_later, []) == []


def test_an_error_is_the_one_sentence_that_was_raised() -> None:
    with using(TWO):
        results = map_items(refuse_three, range(50), what="test")
        assert [next(results) for _ in range(3)] == [0, 1, 2]  # what was done before it is given
        with pytest.raises(UsageError) as error:
            next(results)
    assert str(error.value) == "the item 3 is wrong; leave it out."
    assert error.value.__cause__ is None  # a traceback of another process would stand here
    assert error.value.__context__ is None


def test_a_mistake_is_a_sentence_with_the_traceback_as_a_note() -> None:
    with pytest.raises(F2Error) as error:
        run(slip, range(4))
    assert str(error.value) == (
        "slip failed (OddError: a slip in item); this is a mistake in f2llm, please report it."
    )
    assert "line" in error.value.__notes__[0] and "OddError" in error.value.__notes__[0]


def test_what_the_system_refused_stays_what_it_is() -> None:
    with pytest.raises(OSError, match="No space left") as error:
        run(full_disk, range(4))
    assert (error.value.errno, error.value.filename) == (28, "rows.parquet")


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(F2Error, match=r"a worker process of die was killed.* fewer workers") as error:
        run(die, range(20))
    assert "\n" not in str(error.value)


class Counted(Sequence[int]):
    """Numbers, and how many of them were taken."""

    def __init__(self, length: int) -> None:
        self.length, self.taken = length, 0

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        raise AssertionError("items are gone through in order")

    def __iter__(self) -> Iterator[int]:
        for number in range(self.length):
            self.taken += 1
            yield number


def test_few_items_are_on_their_way_at_once() -> None:
    items = Counted(1000)
    with using(TWO):
        results = map_items(abs, items, what="test")
        for given in range(1, 100):
            assert next(results) == given - 1
            assert items.taken <= given + 2 * 2
        results.close()  # type: ignore[attr-defined]  # of generators


def test_leaving_the_loop_ends_the_work() -> None:
    began = time.monotonic()
    with using(TWO):
        for result in map_items(sleep_unless_first, range(10), what="test"):
            assert result == 0
            break
        del result
    assert time.monotonic() - began < SOON


SCRIPT = """
import sys
from f2llm.engine import Engine, map_items, using
from test_engine import sleep_long
if __name__ == "__main__":
    with using(Engine(workers=2)):
        list(map_items(sleep_long, [sys.argv[1]] * 8, what="test"))
"""


@pytest.mark.parametrize(
    ("how", "all_of_them"),
    [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)],
    ids=["interrupt", "interrupt on a terminal", "terminate", "kill"],
)
def test_workers_end_with_their_parent(tmp_path: Path, how: signal.Signals, all_of_them: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    pids = tmp_path / "pids"
    pids.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, str(script), str(pids)]
    with subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as parent:
        wait_until(lambda: len(list(pids.iterdir())) == 2)
        (os.killpg if all_of_them else os.kill)(parent.pid, how)
        assert parent.wait(SOON) != 0
        wait_until(lambda: not any(alive(int(file.name)) for file in pids.iterdir()))
        assert parent.stderr is not None
        said = parent.stderr.read()
    assert said.count("Traceback") <= 1  # the parent's own; workers say nothing


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < end, "did not come to hold in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
