"""The scheduler against a recorder of batches: who is served when, what is refused, and what becomes of the rest."""

import asyncio
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from f2llm.embed.embedder import Embedder
from f2llm.serve.scheduler import Overloaded, Scheduler

Text = list[int]


class Recorder:
    """Stands for `raw`: a vector tells its text (first id, length, sum); a batch after the `allow`ed ones waits."""

    def __init__(self, seconds_per_token: float = 0.0, poison: int | None = None) -> None:
        self.batches: list[list[Text]] = []
        self._allowed = math.inf
        self._changed = threading.Condition()
        self._seconds_per_token, self._poison = seconds_per_token, poison

    def __call__(self, ids: list[Sequence[int]], alone: bool) -> np.ndarray:
        batch = [list(text) for text in ids]
        if batch:
            self.batches.append(batch)
            with self._changed:
                assert self._changed.wait_for(lambda: len(self.batches) <= self._allowed, 10)
            time.sleep(self._seconds_per_token * sum(map(len, batch)))
        if any(self._poison in text for text in batch):
            raise ValueError("poison")
        return told(batch)

    def allow(self, batches: float = math.inf) -> None:
        """Let so many batches come to an end, counted from the first."""
        with self._changed:
            self._allowed = batches
            self._changed.notify()

    def owners(self) -> list[Counter[int]]:
        """Texts in each batch by their first id."""
        return [Counter(text[0] for text in batch) for batch in self.batches]


def told(ids: Sequence[Text]) -> np.ndarray:
    return np.array([(text[0], len(text), sum(text)) for text in ids], np.float32).reshape(len(ids), 3)


def texts(owner: int, count: int, length: int = 10) -> list[Text]:
    """Different ones, whose first id is their owner's."""
    return [[owner, *range(i, i + length - 1)] for i in range(count)]


def play(raw: Any, scene: Callable[[Scheduler], Awaitable[None]], **limits: Any) -> None:
    """Run a scene with a scheduler that was started; ten seconds at most."""

    async def run() -> None:
        scheduler = Scheduler(raw, **limits)
        await scheduler.start()
        try:
            async with asyncio.timeout(10):
                await scene(scheduler)
        finally:
            if isinstance(raw, Recorder):
                raw.allow()
            await scheduler.drain()

    asyncio.run(run())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def held(raw: Recorder, scheduler: Scheduler) -> asyncio.Task[np.ndarray]:
    """Keeps the thread busy with one text of owner 0 until more batches are allowed."""
    before = len(raw.batches)
    raw.allow(before)
    task = asyncio.create_task(scheduler.vectors("busy", texts(0, 1)))
    await until(lambda: len(raw.batches) > before)
    return task


def ask(scheduler: Scheduler, owner: int, ids: list[Text]) -> asyncio.Task[np.ndarray]:
    return asyncio.create_task(scheduler.vectors(f"client {owner}", ids))


# --- Turns


@pytest.mark.parametrize("others", [1, 5])
def test_one_query_does_not_wait_for_thousands_of_texts_of_other_clients(others: int) -> None:
    raw = Recorder()

    async def scene(scheduler: Scheduler) -> None:
        await held(raw, scheduler)
        many = [ask(scheduler, owner, texts(owner, 1000)) for owner in range(1, 1 + others)]
        await until(lambda: scheduler.waiting_texts == 1000 * others)
        raw.allow(20)
        await until(lambda: len(raw.batches) == 21)
        one = ask(scheduler, 9, texts(9, 1))
        await until(lambda: scheduler.waiting_texts == 1000 * others - 200 + 1)
        raw.allow(22)  # the batch in work and the next
        assert np.array_equal(await one, told(texts(9, 1)))
        raw.allow()
        await asyncio.gather(*many)

    play(raw, scene, tokens_per_batch=100, max_waiting_tokens=10**6)


def test_tokens_are_shared_not_texts_nor_requests() -> None:
    """One sends long texts, one short ones, one many requests: of the first half of the work each has a third."""
    raw = Recorder()

    async def scene(scheduler: Scheduler) -> None:
        await held(raw, scheduler)
        tasks = [ask(scheduler, 1, texts(1, 30, length=100)), ask(scheduler, 2, texts(2, 300, length=10))]
        tasks += [ask(scheduler, 3, texts(3, 1, length=50)) for _ in range(60)]
        await until(lambda: scheduler.waiting_tokens == 9000)
        raw.allow()
        await asyncio.gather(*tasks)

    play(raw, scene, tokens_per_batch=200, max_waiting_tokens=10_000)
    had: Counter[int] = Counter()
    for text in (text for batch in raw.batches[1:] for text in batch):
        had[text[0]] += len(text)
        if sum(had.values()) < 8000:
            assert max(had.values()) - min(had[owner] for owner in (1, 2, 3)) <= 200


def test_silence_is_not_made_up_for() -> None:
    """A client that comes late gets its share from then on, not what the other one had in the meantime."""
    raw = Recorder()

    async def scene(scheduler: Scheduler) -> None:
        await held(raw, scheduler)
        first = ask(scheduler, 1, texts(1, 200))
        await until(lambda: scheduler.waiting_texts == 200)
        raw.allow(10)
        await until(lambda: len(raw.batches) == 11)
        second = ask(scheduler, 2, texts(2, 200))
        await until(lambda: scheduler.waiting_texts == 100 + 200)
        raw.allow()
        await asyncio.gather(first, second)
        both = sum(raw.owners()[11:21], Counter())
        assert abs(both[1] - both[2]) <= 2

    play(raw, scene, tokens_per_batch=100)


def test_ever_new_clients_do_not_starve_an_old_one() -> None:
    """Six at a time ask for one text under a name of their own and go; the old client still gets its seventh."""
    raw = Recorder(seconds_per_token=1e-4)
    names = count(1000)

    async def scene(scheduler: Scheduler) -> None:
        await held(raw, scheduler)
        old = ask(scheduler, 1, texts(1, 10, length=20))

        async def newcomers() -> None:
            while not old.done():
                await ask(scheduler, next(names), texts(2, 1))

        loops = [asyncio.create_task(newcomers()) for _ in range(6)]
        await until(lambda: scheduler.waiting_texts == 16)
        raw.allow()
        await asyncio.gather(old, *loops)

    play(raw, scene, tokens_per_batch=30)
    others = 10 * sum(raw.owners(), Counter())[2]  # tokens, while the old client had 200
    assert others < 1.5 * 6 * 200


# --- Batches


@pytest.mark.parametrize("seed", range(5))
def test_random_clients(seed: int) -> None:
    """Every answer is right and in order, whoever else asks, errs or goes; no batch is over its budget."""
    rng = random.Random(seed)
    raw = Recorder(poison=-1)
    budget = 64
    gone: list[int] = []
    failed: list[int] = []
    counted: list[tuple[int, int]] = []

    async def client(scheduler: Scheduler, owner: int) -> None:
        for _ in range(rng.randint(1, 6)):
            await asyncio.sleep(rng.random() * 0.01)
            ids = [
                [owner, *(rng.randrange(100) for _ in range(rng.choice((0, 3, 9, 40, 90))))]
                for _ in range(rng.randint(1, 30))
            ]
            fate = rng.random()
            if fate < 0.1:
                ids[rng.randrange(len(ids))].append(-1)
            task = ask(scheduler, owner, ids)
            if fate > 0.85:
                await asyncio.sleep(rng.random() * 0.005)
                task.cancel()
            try:
                vectors = await task
            except asyncio.CancelledError:
                gone.append(owner)
            except ValueError:
                failed.append(owner)
            else:
                assert np.array_equal(vectors, told(ids))
                assert vectors.dtype == np.float32

    async def scene(scheduler: Scheduler) -> None:
        scheduler.on_batch = lambda texts, tokens, seconds: counted.append((texts, tokens))
        await asyncio.gather(*(client(scheduler, owner) for owner in range(40)))
        assert (scheduler.waiting_texts, scheduler.waiting_tokens) == (0, 0)

    play(raw, scene, tokens_per_batch=budget, max_waiting_tokens=10**6)
    assert gone and failed
    assert all(len(batch) == 1 or sum(map(len, batch)) <= budget for batch in raw.batches)
    good = [batch for batch in raw.batches if not any(-1 in text for text in batch)]
    assert counted == [(len(batch), sum(map(len, batch))) for batch in good]


def test_batches_fill_while_the_thread_computes() -> None:
    raw = Recorder()

    async def scene(scheduler: Scheduler) -> None:
        await held(raw, scheduler)
        tasks = [ask(scheduler, owner, texts(owner, 1)) for owner in range(1, 26)]
        await until(lambda: scheduler.waiting_texts == 25)
        raw.allow()
        await asyncio.gather(*tasks)

    play(raw, scene, tokens_per_batch=100)
    assert [len(batch) for batch in raw.batches] == [1, 10, 10, 5]


def test_a_lone_query_is_computed_at_once() -> None:
    raw = Recorder()
    seconds = []

    async def scene(scheduler: Scheduler) -> None:
        for _ in range(50):
            started = time.perf_counter()
            await scheduler.vectors("one", texts(1, 1))
            seconds.append(time.perf_counter() - started)

    play(raw, scene)
    assert sorted(seconds)[25] < 0.002  # typically 0.0001; no window in which company is waited for


def test_vectors_are_those_of_raw(model_folder: Path) -> None:
    embedder = Embedder(model_folder)
    ids = embedder.token_ids(["lion", "tembo", "Ujerumani na Japani", "lion", "", "德国"] * 3)

    async def scene(scheduler: Scheduler) -> None:
        answers = await asyncio.gather(*(scheduler.vectors(str(i % 3), ids[: i + 1]) for i in range(18)))
        for i, vectors in enumerate(answers):
            np.testing.assert_allclose(vectors, embedder.raw(ids[: i + 1]), rtol=1e-4, atol=1e-5)
        assert (await scheduler.vectors("x", [])).shape == (0, embedder.dim)

    play(embedder.raw, scene, tokens_per_batch=20)


# --- Requests that go, fail or are refused


def test_what_is_cancelled_is_never_computed() -> None:
    raw = Recorder()

    async def scene(scheduler: Scheduler) -> None:
        await held(raw, scheduler)
        kept = ask(scheduler, 1, texts(1, 20))
        dropped = ask(scheduler, 2, texts(2, 500))
        same_client = ask(scheduler, 2, texts(3, 20))
        await until(lambda: scheduler.waiting_texts == 540)
        dropped.cancel()
        await until(dropped.done)
        assert (scheduler.waiting_texts, scheduler.waiting_tokens) == (40, 400)
        raw.allow()
        await asyncio.gather(kept, same_client)

    play(raw, scene, tokens_per_batch=100)
    assert sum(raw.owners(), Counter()) == {0: 1, 1: 20, 3: 20}


def test_an_error_goes_to_the_requests_of_its_batch_alone() -> None:
    raw = Recorder(poison=-1)

    async def scene(scheduler: Scheduler) -> None:
        await held(raw, scheduler)
        before = ask(scheduler, 1, texts(1, 10))
        await until(lambda: scheduler.waiting_texts == 10)
        bad = ask(scheduler, 1, [[2, -1, *range(98)], *texts(2, 300)])  # a batch is full with the first
        after = ask(scheduler, 1, texts(3, 5))
        await until(lambda: scheduler.waiting_texts == 316)
        raw.allow()
        assert np.array_equal(await before, told(texts(1, 10)))
        with pytest.raises(ValueError, match="poison"):
            await bad
        assert np.array_equal(await after, told(texts(3, 5)))
        assert np.array_equal(await scheduler.vectors("later", texts(4, 3)), told(texts(4, 3)))
        assert sum(raw.owners(), Counter())[2] < 100  # of a request that failed the rest was dropped

    play(raw, scene, tokens_per_batch=100)


def test_overload_is_refused_with_an_honest_time_and_passes() -> None:
    raw = Recorder(seconds_per_token=1e-4)

    async def scene(scheduler: Scheduler) -> None:
        for _ in range(5):
            await scheduler.vectors("client 9", texts(9, 10))  # the rate is measured
        await held(raw, scheduler)
        tasks = [ask(scheduler, owner, texts(owner, 10)) for owner in range(1, 12)]
        await until(lambda: scheduler.waiting_tokens == 1100)
        with pytest.raises(Overloaded, match="1100 tokens would be .* the limit is 1000") as refused:
            await scheduler.vectors("client 12", texts(12, 10))
        started = time.perf_counter()
        raw.allow()
        assert (await scheduler.vectors("client 13", texts(13, 1))).shape == (
            1,
            3,
        )  # less is ahead of a short one
        await asyncio.gather(*tasks)
        taken = time.perf_counter() - started
        assert 0.5 * taken < refused.value.retry_after < 1.5 * taken
        assert np.array_equal(await scheduler.vectors("client 12", texts(12, 10)), told(texts(12, 10)))

    play(raw, scene, tokens_per_batch=100, max_waiting_tokens=1000)
    assert sum(raw.owners(), Counter())[12] == 10  # what was refused was not computed


def test_a_text_counts_whole_for_what_comes_after_it() -> None:
    raw = Recorder()

    async def scene(scheduler: Scheduler) -> None:
        await held(raw, scheduler)
        tasks = [ask(scheduler, owner, texts(owner, 1, length=101)) for owner in range(1, 11)]
        await until(lambda: scheduler.waiting_texts == 10)
        with pytest.raises(Overloaded, match="1010 tokens"):
            await scheduler.vectors("short", texts(11, 1))
        raw.allow()
        await asyncio.gather(*tasks)

    play(raw, scene, tokens_per_batch=100, max_waiting_tokens=1000)


def test_one_request_of_any_size_is_admitted_and_holds_up_nobody() -> None:
    raw = Recorder()

    async def scene(scheduler: Scheduler) -> None:
        await held(raw, scheduler)
        large = ask(scheduler, 1, texts(1, 2000, length=150))
        await until(lambda: scheduler.waiting_tokens == 300_000)
        for owner in (1, 2):  # the same client, and another
            with pytest.raises(Overloaded):
                await ask(
                    scheduler, owner, texts(owner, 100)
                )  # while it had 1,000 tokens, the large one would, too
        short = [ask(scheduler, owner, texts(3, 2)) for owner in (1, 3)]
        await until(lambda: scheduler.waiting_texts == 2004)
        raw.allow(2)
        await asyncio.gather(*short)
        assert not large.done()
        raw.allow()
        await large

    play(raw, scene, tokens_per_batch=500, max_waiting_tokens=500)


def test_drain_finishes_what_waits_and_refuses_what_is_new() -> None:
    raw = Recorder()

    async def scene(scheduler: Scheduler) -> None:
        first = await held(raw, scheduler)
        tasks = [ask(scheduler, owner, texts(owner, 40)) for owner in (1, 2)]
        await until(lambda: scheduler.waiting_texts == 80)
        draining = asyncio.create_task(scheduler.drain())
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="stopping"):
            await scheduler.vectors("new", texts(3, 1))
        assert not draining.done()
        raw.allow()
        await draining
        answers = await asyncio.gather(first, *tasks)
        assert [len(vectors) for vectors in answers] == [1, 40, 40]
        with pytest.raises(Overloaded):
            await scheduler.vectors("new", texts(3, 1))

    play(raw, scene, tokens_per_batch=100)
    assert sum(raw.owners(), Counter()) == {0: 1, 1: 40, 2: 40}
    assert not [thread for thread in threading.enumerate() if thread.name == "f2llm vectors"]


def test_lanes_compute_at_once_and_answer_all() -> None:
    """Two batches are in work at the same time, and every text has its own vector."""
    inside, most = 0, 0
    lock = threading.Lock()

    def counted(ids: list[Text], alone: bool) -> np.ndarray:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        with lock:
            inside -= 1
        return told(ids)

    async def scene(scheduler: Scheduler) -> None:
        tasks = [ask(scheduler, owner, texts(owner, 3)) for owner in range(1, 21)]
        answers = await asyncio.gather(*tasks)
        for owner, answer in enumerate(answers, 1):
            assert np.array_equal(answer, told(texts(owner, 3)))

    play(counted, scene, lanes=2, tokens_per_batch=50)
    assert most == 2
