"""The models that a server serves: each an embedder, the scheduler in front of it, and its name.

One model answers to any name, since clients must send one and many cannot be told which; the answer names the model
that is served. Of several a request must name one, and unknown names are refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from f2llm.embed.embedder import Embedder
from f2llm.errors import UsageError
from f2llm.progress import say
from f2llm.serve.errors import ApiError
from f2llm.serve.precision import Calibration
from f2llm.serve.scheduler import Scheduler

WARM_UP_TOKENS = 512  # of the long text; what is slow the first time is slow at this length too


@dataclass
class Served:
    """A model that is served."""

    name: str
    embedder: Embedder
    scheduler: Scheduler
    calibration: Calibration = field(init=False)

    def __post_init__(self) -> None:
        self.calibration = Calibration(self.embedder, self.scheduler)

    async def warm_up(self) -> None:
        """Compute one short and one long text, so that no user's request is the first."""
        (short,) = self.embedder.token_ids(["a"])
        (long,) = self.embedder.token_ids(["a b c d " * WARM_UP_TOKENS])
        length = min(WARM_UP_TOKENS, self.embedder.max_length)
        await self.scheduler.vectors("warm-up", [short])
        await self.scheduler.vectors("warm-up", [[*long[: length - 1], long[-1]]])


class Models:
    """The models by name, in the order in which they were given."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._by_name = {one.name: one for one in served}
        self.ready = False

    def __iter__(self) -> Iterator[Served]:
        return iter(self._by_name.values())

    def pick(self, name: str | None) -> Served:
        """The model that a request means; ApiError where that cannot be told."""
        if len(self._by_name) == 1:
            return next(iter(self))
        if name is None:
            raise ApiError("invalid", f"`model` is missing; this server has {self._names()}.", field="model")
        if name not in self._by_name:
            raise ApiError(
                "model", f"there is no such model here; this server has {self._names()}.", field="model"
            )
        return self._by_name[name]

    def _names(self) -> str:
        return ", ".join(self._by_name)

    async def start(self) -> None:
        for one in self:
            await one.scheduler.start()

    async def warm_up(self) -> None:
        """Then, and not before, /health says that the server is ready."""
        try:
            for one in self:
                await one.warm_up()
        except Exception as error:
            say(f"the models cannot be warmed up ({type(error).__name__}: {error}), so /health stays at 503.")
        else:
            self.ready = True

    async def drain(self) -> None:
        """Answer what waits, and take nothing more."""
        self.ready = False
        for one in self:
            await one.scheduler.drain()


def named(sources: Sequence[str]) -> dict[str, str]:
    """From `NAME=MODEL` or `MODEL` to models by name; a folder is called as its last part, a hub model by its id."""
    found: dict[str, str] = {}
    for given in sources:
        name, equals, source = given.partition("=")
        if not equals:
            name, source = (Path(given).resolve().name if Path(given).is_dir() else given), given
        if not name or name in found:
            raise UsageError(
                f"{given} is the second model called {name!r}; name it otherwise: NAME={source}."
            )
        found[name] = source
    return found
