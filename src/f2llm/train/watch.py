"""Watching a run: its log, what the progress bar says, and the alarms.

log.jsonl is the record, one JSON object a line. Each has `step`, the number of optimizer steps that are behind it, and
is one of: a step (source, loss, terms, speed ...), a validation (`validation`, see validate.py) or an alarm (`alarm`, a
sentence). TensorBoard can show the same numbers. A continued run drops the lines of what it does again.

A run can be lost without a crash. A number that is not finite stops it (`check_finite`). A collapse, where all texts
get one vector or lie on one line, is told and logged but does not stop it (`spread`, `check_spread`).

Shape suffixes: N vectors, D dims, S singular values.
"""

import json
import math
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from f2llm.errors import F2Error, UsageError
from f2llm.files import write_text
from f2llm.progress import say
from f2llm.runtime import peak_memory

Record = dict[str, Any]


# --- The log


@dataclass(frozen=True)
class Log:
    """An open log; `open_log` makes it."""

    _file: IO[str]
    _events: "Events | None"

    def write(self, record: Record) -> None:
        """Append a record; `record["step"]` says where it belongs."""
        self._file.write(json.dumps(record) + "\n")
        if self._events:
            self._events.write(record["step"], scalars(record))

    def alarm(self, step: int, sentence: str) -> None:
        """Show a warning to whoever watches, and record it."""
        say(f"warning: {sentence}")
        self.write({"step": step, "alarm": sentence})


@contextmanager
def open_log(path: Path, done: int, tensorboard: bool = False) -> Iterator[Log]:
    """Append to a log of one JSON object a line, without the lines of steps that a continued run does again.

    Args:
        path: of the log; it may end in half a line, as a kill leaves it.
        done: steps that the run has behind it, from its checkpoint.
        tensorboard: write events to the folder `tensorboard` beside the log as well.

    Raises:
        UsageError if TensorBoard is asked for and tensorboardX is missing; nothing is written then.
    """
    with ExitStack() as stack:
        events = (
            stack.enter_context(closing(Events(path.parent / "tensorboard", done))) if tensorboard else None
        )
        kept = [record for record in read_log(path) if record["step"] < done]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        file = stack.enter_context(open(path, "a", encoding="utf-8", buffering=1))  # a line at a time
        yield Log(file, events)


def read_log(path: Path) -> Iterator[Record]:
    """The whole lines of a log, none if it is not there; half a line is passed over."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            yield record


class Events:
    """A TensorBoard event file, written record by record.

    tensorboardX brings the messages and the checksum. Its SummaryWriter is not used: it hands events to a thread
    through a bounded queue, and where the thread dies, as of a full disk, the run would wait for it for ever.
    """

    def __init__(self, folder: Path, done: int) -> None:
        """Open a new file; what earlier ones say of step `done` and later ones becomes void."""
        try:
            from tensorboardX.proto import event_pb2, summary_pb2
            from tensorboardX.record_writer import masked_crc32c
        except ImportError:
            raise UsageError(
                "'tensorboard: true' needs tensorboardX, which is missing; install f2llm[tensorboard] or leave it out."
            ) from None
        self._event, self._summary, self._checksum = event_pb2.Event, summary_pb2.Summary, masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        self._file = open(folder / f"events.out.tfevents.{time.time_ns()}", "wb", buffering=0)  # noqa: SIM115
        self._append(file_version="brain.Event:2")
        self._append(step=done, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, values: Iterable[tuple[str, float]]) -> None:
        named = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values]
        if named:
            self._append(step=step, summary=self._summary(value=named))

    def close(self) -> None:
        self._file.close()

    def _append(self, **fields: Any) -> None:
        """One record: length and data, each with its checksum (TensorFlow's TFRecord format)."""
        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        parts = (length, self._sum(length), data, self._sum(data))
        self._file.write(b"".join(parts))

    def _sum(self, data: bytes) -> bytes:
        return struct.pack("<I", self._checksum(data))


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """A record's numbers under the names that TensorBoard groups them by: train/loss, validation/names/ndcg_at_10."""
    for key, value in record.items():
        if key == "validation":
            yield from _flat("validation", value)
        elif key != "step":
            yield from _flat(f"train/{key}", value)


def _flat(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{tag}/{key}", inner)
    elif _is_number(value):
        yield tag, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- The progress bar

# How a number of a record is shown beside the bar; others by their own name, as the loss terms are. Empty: not at all.
NOTES = {
    "step": "",
    "loss": "loss {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "gradient_norm": "norm {:.2f}",
    "learning_rate": "lr {:.1e}",
    "memory_gigabytes": "{:.1f} GB",
    "mean_cosine": "",
    "effective_rank": "",
    "full_rank": "",
}


def note(record: Record) -> str:
    """A record of a step in a few words for the progress bar, in the record's order."""
    shown = (
        NOTES.get(key, f"{key} {{:.3f}}").format(value) for key, value in record.items() if _is_number(value)
    )
    return ", ".join(filter(None, shown))


def memory_gigabytes(device: torch.device) -> float:
    """Most memory held so far, in units of 10^9 bytes: torch's on a GPU, the whole process's on a CPU."""
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    return held / 1e9


# --- Alarms


def check_finite(step: int, loss: float, norm: float, where: str, *, source: str, checkpoints: Path) -> None:
    """Raise F2Error if the loss or the gradient norm of a step is not finite; to be called before weights move.

    Args:
        where: the run, as the user calls it.
        source: whose batch it is.
        checkpoints: the folder of the run's checkpoints, of which the last one stays.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    kept = max(checkpoints.glob("step-*"), default=None)
    checkpoint = f"the last checkpoint, {kept}, is kept" if kept else "there is no checkpoint yet"
    raise F2Error(
        f"the loss at step {step} of {where} is {loss} (gradient norm {norm}) on a batch of source {source!r}, "
        f"expected finite numbers; no weight was moved by it and {checkpoint}; lower learning_rate or lengthen "
        "warmup_steps."
    )


class Spread(NamedTuple):
    """How far a set of vectors fills its space."""

    mean_cosine: float
    """Mean cosine over all pairs of two different vectors; 1 when all point the same way."""
    effective_rank: float
    """Number of directions in use, from 1 to `full_rank`."""
    full_rank: int
    """The smaller of the number of vectors and of their dimensions."""


MOST_VECTORS = (
    256  # that a spread is taken of; their singular values cost 2 to 20 ms at widths of 128 to 1024
)


def spread(vectors_ND: Tensor) -> Spread:
    """Mean pairwise cosine and effective rank of at most MOST_VECTORS of the vectors, evenly picked.

    The mean over the N (N - 1) pairs comes from the sum s of the N unit vectors, as (|s|^2 - N) / (N (N - 1)). The
    effective rank is that of Roy and Vetterli (2007, "The effective rank: a measure of effective dimensionality"):
    exp of the entropy of the singular values, divided by their sum, of the matrix of unit vectors.

    Args:
        vectors_ND: at least two; any float dtype and device. Vectors that are not finite give NaN.
    """
    step = -(-len(vectors_ND) // MOST_VECTORS)
    unit_ND = F.normalize(vectors_ND.detach()[::step].to("cpu", torch.float64), dim=-1)
    count, width = unit_ND.shape
    if not unit_ND.isfinite().all():
        return Spread(math.nan, math.nan, min(count, width))
    sum_D = unit_ND.sum(0)
    mean_cosine = (sum_D @ sum_D - unit_ND.square().sum()) / (count * (count - 1))
    share_S = F.normalize(torch.linalg.svdvals(unit_ND), p=1, dim=0)
    effective_rank = torch.special.entr(share_S).sum().exp()
    return Spread(mean_cosine.item(), effective_rank.item(), min(count, width))


class Bounds(NamedTuple):
    """A mean cosine above, or an effective rank below, is out of bounds."""

    mean_cosine: float
    effective_rank: float


# A collapse begins beyond the first and ends within the second, so that a run at the bound is told of once.
COLLAPSED, RECOVERED = Bounds(0.99, 2.0), Bounds(0.97, 3.0)
FEWEST = 16  # vectors and dimensions; fewer have a low rank by nature
SETTLED = 100  # steps that a run may take to spread out, or its warm-up if that is longer


def has_collapsed(found: Spread) -> bool:
    """Whether vectors of finished models, of texts that mean different things, are beyond any bound."""
    beyond = found.mean_cosine > COLLAPSED.mean_cosine or found.effective_rank < COLLAPSED.effective_rank
    return found.full_rank >= FEWEST and beyond


def check_spread(
    now: Spread, *, step: int, warmup_steps: int, where: str, ongoing: bool = False
) -> str | None:
    """A warning if the vectors have collapsed, else None; `ongoing` says whether the last look gave a warning.

    Give it the spread of texts that mean different things, as those of a retrieval batch do: two classes that are
    learned perfectly are two points, and rightly so.

    A high mean cosine alone is no collapse at the start. Random weights give up to 0.98 behind an instruction, 0.99
    behind one that is far longer than the texts, and healthy runs pass 0.98 in their first steps; but all of these keep
    an effective rank of at least 3 of 24 and 6 of 128. A learning rate 30 times too high takes the same runs above 0.99
    and below a rank of 2 in their second to fourth step, and they stay about there. So both bounds must be broken until
    the warm-up is over, and for SETTLED steps at least; after that either.
    """
    if now.full_rank < FEWEST:
        return None
    bounds = RECOVERED if ongoing else COLLAPSED
    broken = [now.mean_cosine > bounds.mean_cosine, now.effective_rank < bounds.effective_rank]
    if not (any(broken) if ongoing or step >= max(warmup_steps, SETTLED) else all(broken)):
        return None
    return (
        f"the vectors of {where} have collapsed at step {step}: mean pairwise cosine {now.mean_cosine:.4f} and "
        f"effective rank {now.effective_rank:.1f} of {now.full_rank}, expected at most {COLLAPSED.mean_cosine} and at "
        f"least {COLLAPSED.effective_rank:.0f}; if the loss does not fall any more, stop the run and lower "
        "learning_rate or lengthen warmup_steps."
    )
