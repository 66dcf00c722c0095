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


class _Block:
    """What one `using` block has started: worker processes, a Ray of its own. The next call works with these too."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.pool: ProcessPoolExecutor | None = None
        self.ray: Any = None

    def workers(self) -> ProcessPoolExecutor:
        if self.pool is None:
            # Processes are started anew: a fork of one with threads (torch's, arrow's) may wait for a lock for ever.
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.engine.at_once, context, initializer=_begin_worker)
        return self.pool

    def stop_workers(self) -> None:
        """End them at once, and with them what is still to be done: nobody waits for it."""
        pool, self.pool = self.pool, None
        # From Python 3.14 on this is `pool.terminate_workers()`.
        if pool:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown()

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown()
        if self.ray:
            self.ray.shutdown()


LOCAL = Engine()
_block: ContextVar[_Block] = ContextVar("block")


@contextmanager
def using(engine: Engine | None = None) -> Iterator[None]:
    """Let `map_items` in this block work on `engine`, the one around it by default; workers end with the block."""
    block = _Block(engine or current_engine())
    token = _block.set(block)
    try:
        yield
    finally:
        _block.reset(token)
        block.close()


def current_engine() -> Engine:
    block = _block.get(None)
    return block.engine if block else LOCAL


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
    block = _block.get(None) or _Block(LOCAL)
    local = block.engine.kind == "local"
    one_by_one = not items or (local and (block.engine.at_once == 1 or len(items) < 2))
    results = map(function, items) if one_by_one else ENGINES[block.engine.kind](function, items, block)
    try:
        with progress(total=len(items), what=what, unit=unit) as bar:
            for result in results:
                yield result
                bar.advance()
    finally:
        if block is not _block.get(None):
            block.close()


def _local(function: Callable[[Any], Any], items: Sequence[Any], block: _Block) -> Iterator[Any]:
    pool = block.workers()
    rest = iter(items)
    running: deque[Future[Any]] = deque()
    try:
        running.extend(
            pool.submit(_attempt, function, item) for item in islice(rest, 2 * block.engine.at_once)
        )
        while running:
            result, error = running.popleft().result()
            if error:
                raise error
            yield result
            running.extend(pool.submit(_attempt, function, item) for item in islice(rest, 1))
    except BrokenProcessPool:
        block.stop_workers()
        raise F2Error(
            f"a worker process of {_name(function)} was killed, perhaps for want of memory; "
            "start again with fewer workers, what is done is kept."
        ) from None
    except BaseException:  # an interrupt too, and a caller who wants no more
        block.stop_workers()
        raise


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


def _ray(function: Callable[[Any], Any], items: Sequence[Any], block: _Block) -> Iterator[Any]:
    """Ray Data: on the cluster that RAY_ADDRESS names, or on this machine; all machines must see the same files."""
    try:
        import ray
        from ray.data import DataContext
    except ImportError:
        raise UsageError("the engine 'ray' needs ray; install it with pip install 'f2llm[ray]'.") from None

    if not ray.is_initialized():
        on_cluster = "RAY_ADDRESS" in os.environ
        ray.init(
            num_cpus=None if on_cluster else block.engine.at_once,
            include_dashboard=None if on_cluster else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        block.ray = ray
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


def _answer_call(row: dict[str, Any]) -> dict[str, bytes]:
    """One call on a Ray worker; an error goes back as it is, in place of Ray's report around it."""
    return {"result": pickle.dumps(_attempt(*pickle.loads(row["call"])))}


ENGINES = {"local": _local, "ray": _ray}
