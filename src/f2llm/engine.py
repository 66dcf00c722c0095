"""Where work on many items is done: here in worker processes, or on the machines of a Ray cluster.

A step is a function of one item that stands at the top of a module, writes files of its own and returns something
small. Items are independent, results come in the order of the items, and whatever an item gives does not depend on who
works on it: so the engine is not part of a recipe, and changes no result.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from threading import Thread
from typing import Any, Literal, TypeVar

from f2llm.errors import F2Error, UsageError
from f2llm.progress import progress

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Engine:
    """Who works on items."""

    kind: Literal["local", "ray"] = "local"
    workers: int | None = None
    """How many at once; as many as there are cores, if left out."""

    @property
    def at_once(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))


LOCAL = Engine()
_engine: ContextVar[Engine] = ContextVar("engine", default=LOCAL)


@contextmanager
def using(engine: Engine) -> Iterator[None]:
    """Let `map_items` in this block work on `engine`."""
    token = _engine.set(engine)
    try:
        yield
    finally:
        _engine.reset(token)


def map_items(
    function: Callable[[Item], Result], items: Sequence[Item], *, what: str, unit: str = "part"
) -> Iterator[Result]:
    """`function` of each item, in the order of the items, with a bar that says `what` is done.

    No more than twice as many items as there are workers are on their way at once, so memory does not grow with their
    number. An error in one, an interrupt, or leaving the loop ends the work; what others have written stays. Workers
    end with this process, however it ends.

    Raises:
        F2Error: that of the first item to fail; a worker was killed; in a worker, a mistake of ours, whose traceback
            is the error's note.
    """
    engine = _engine.get()
    one_by_one = not items or (engine.kind == "local" and (engine.at_once == 1 or len(items) < 2))
    results = map(function, items) if one_by_one else ENGINES[engine.kind](function, items, engine)
    with progress(total=len(items), what=what, unit=unit) as bar:
        for result in results:
            yield result
            bar.advance()


def _local(function: Callable[[Any], Any], items: Sequence[Any], engine: Engine) -> Iterator[Any]:
    # Processes are started anew: a fork of one with threads (torch's, arrow's) may wait for a lock for ever.
    context = multiprocessing.get_context("spawn")
    workers = min(engine.at_once, len(items))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        rest = iter(items)
        running: deque[Future[Any]] = deque()
        try:
            running.extend(pool.submit(_attempt, function, item) for item in islice(rest, 2 * workers))
            while running:
                result, error = running.popleft().result()
                if error:
                    raise error
                yield result
                running.extend(pool.submit(_attempt, function, item) for item in islice(rest, 1))
        except BrokenProcessPool:
            _stop(pool)
            raise F2Error(
                f"a worker process of {_name(function)} was killed, perhaps for want of memory; "
                "start again with fewer workers, what is done is kept."
            ) from None
        except BaseException:  # an interrupt too, and a caller who wants no more
            _stop(pool)
            raise


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers at once, and with them what is still to be done: nobody waits for it."""
    # From Python 3.14 on this is `pool.terminate_workers()`.
    for process in list((pool._processes or {}).values()):
        process.terminate()


def _begin_worker() -> None:
    """In a worker, before its first item: live as long as the process that started it, no longer and no shorter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches all; the parent decides
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _attempt(function: Callable[[Item], Result], item: Item) -> tuple[Result | None, Exception | None]:
    """What the function gives, or the error to be raised; the traceback of a mistake goes along as its note."""
    try:
        return function(item), None
    except (F2Error, OSError) as error:
        return None, error
    except Exception as error:
        what = str(error).partition("\n")[0]
        failed = F2Error(
            f"{_name(function)} failed ({type(error).__name__}: {what}); this is a mistake in f2llm, please report it."
        )
        failed.add_note(traceback.format_exc())
        return None, failed


def _name(function: Callable[[Any], Any]) -> str:
    return str(getattr(function, "__name__", function))


def _ray(function: Callable[[Any], Any], items: Sequence[Any], engine: Engine) -> Iterator[Any]:
    """Ray Data: on the cluster that RAY_ADDRESS names, or on this machine; all machines must see the same files."""
    try:
        import ray
        from ray.data import DataContext
    except ImportError:
        raise UsageError("the engine 'ray' needs ray; install it with pip install 'f2llm[ray]'.") from None

    started = not ray.is_initialized()
    if started:
        on_cluster = "RAY_ADDRESS" in os.environ
        ray.init(
            num_cpus=None if on_cluster else engine.at_once,
            include_dashboard=None if on_cluster else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        context.print_on_execution_start = False
        context.enable_progress_bars = False  # ours is shown
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        calls = [{"call": pickle.dumps((function, item))} for item in items]
        results = ray.data.from_items(calls, override_num_blocks=len(calls)).map(_answer_call)
        for row in results.iter_rows():
            result, error = pickle.loads(row["result"])
            if error:
                raise error
            yield result
    finally:
        if started:
            ray.shutdown()


def _answer_call(row: dict[str, Any]) -> dict[str, bytes]:
    """One call on a Ray worker; an error goes back as it is, in place of Ray's report around it."""
    return {"result": pickle.dumps(_attempt(*pickle.loads(row["call"])))}


ENGINES = {"local": _local, "ray": _ray}
