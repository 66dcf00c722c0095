"""The processes of one training run: who they are, what they tell each other, and how a decoder is spread over them.

Every rank makes the whole batch, computes its share of the vectors, and gets the vectors of all (`gather`); the
objective is then the same everywhere, and each rank takes its own rows of the gradient back through its texts. So no
gradient ever passes through a collective of ours: FSDP2 (`shard`) keeps a part of the weights, gradients and optimizer
state on each rank, and sums gradients over ranks. It sums and does not average, because the ranks hold parts of one
loss.

One process on a CPU has no process group, and its decoder stays the plain module it is. `import torch` brings
torch.distributed along, but the parts of it that cost time (FSDP2, DTensor) are imported by those who use them.

Shape suffixes: M rows of this rank, W rows of all ranks, P rows of the rank that has most, D width of a vector.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from f2llm.errors import F2Error, UsageError
from f2llm.model.decoder import Decoder

T = TypeVar("T")
TIMEOUT = 1800.0  # seconds that a collective may take; the watchdog is there to speak long before
SECONDS_TO_LET_GO = 0.2


@dataclass(frozen=True)
class Ranks:
    """Where a process stands among those of its run."""

    rank: int  # 0 .. world - 1
    world: int  # how many there are
    device: torch.device  # where this one computes

    @property
    def is_main(self) -> bool:
        """Whether this rank does what is done once: files, logs, words to the user."""
        return self.rank == 0


ALONE = Ranks(0, 1, torch.device("cpu"))


@contextmanager
def join(timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """Take the place that torchrun's environment gives this process; without torchrun it is alone.

    Args:
        timeout: seconds after which a collective that not all ranks have joined fails.

    Raises:
        UsageError: the environment is incomplete, or names a GPU that is not there.
        F2Error: a collective failed within, mostly because another rank has ended.
    """
    world = _from_environment("WORLD_SIZE", least=1) if "WORLD_SIZE" in os.environ else 1
    rank, local = (_from_environment("RANK"), _from_environment("LOCAL_RANK")) if world > 1 else (0, 0)
    if rank >= world:
        raise _incomplete("RANK", f"a number below {world}")
    ranks = Ranks(rank, world, _device(rank, local))
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    try:
        if world > 1:
            if not os.environ.get("MASTER_ADDR"):
                raise _incomplete("MASTER_ADDR", "the host of rank 0")
            _from_environment("MASTER_PORT", least=1)
            _make_group(ranks, timeout)
        yield ranks
    except RuntimeError as error:
        if not (lost := _loss_of_others(error)):
            raise
        raise F2Error(
            f"rank {rank} of {world} lost the others ({lost}); one that ended first has said why, and the same command "
            "goes on from the last checkpoint."
        ) from error
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
            if ranks.device.type == "cpu":
                # FSDP2 remembers the group, so that gloo's threads stay, and one that lets go of its last tensor while
                # Python ends would abort the process.
                time.sleep(SECONDS_TO_LET_GO)


def _loss_of_others(error: RuntimeError) -> str:
    """What became of a collective that failed; empty for other errors."""
    # Gloo has no type of its own for that.
    if of_gloo := re.match(r"\[\S*gloo/transport\S*\] (.+?)(\. |$)", str(error)):
        return of_gloo[1]
    return str(error).partition("\n")[0] if isinstance(error, dist.DistError) else ""


def _from_environment(name: str, least: int = 0) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal() or int(value) < least:
        raise _incomplete(name, f"a number from {least}")
    return int(value)


def _incomplete(name: str, expected: str) -> UsageError:
    world = "" if name == "WORLD_SIZE" else f"WORLD_SIZE={os.environ['WORLD_SIZE']} and "
    return UsageError(
        f"the environment says {world}{name}={os.environ.get(name, '')!r}, expected {expected} there; start ranks with "
        "torchrun, or unset WORLD_SIZE to train in one process."
    )


def _device(rank: int, local: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"rank {rank} is number {local} on its machine, which has {torch.cuda.device_count()} GPUs; start at most "
            "that many (torchrun --nproc-per-node), or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on CPUs."
        )
    return torch.device("cuda", local)


def _make_group(ranks: Ranks, timeout: float) -> None:
    on_gpu = ranks.device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        # A group of one needs nobody to meet at an address.
        store=dist.HashStore() if ranks.world == 1 else None,  # type: ignore[attr-defined]
        rank=ranks.rank if ranks.world == 1 else -1,
        world_size=ranks.world if ranks.world == 1 else -1,
        timeout=timedelta(seconds=timeout),
        device_id=ranks.device if on_gpu else None,
    )


def gather(local_MD: Tensor, counts: list[int], ranks: Ranks) -> Tensor:
    """The rows of all ranks, in rank order.

    Args:
        local_MD: this rank's rows, on its device; no gradient is taken back through the result.
        counts: number of rows of each rank, which every rank knows; some may be 0.

    Returns:
        [W, D], W the sum of `counts`, the same bits on every rank.
    """
    if [len(local_MD), len(counts)] != [counts[ranks.rank], ranks.world]:
        raise F2Error(
            f"rank {ranks.rank} of {ranks.world} has {len(local_MD)} rows to gather, but the counts are {counts}; "
            "this is a mistake in the program."
        )
    local_MD = local_MD.detach()
    if ranks.world == 1:
        return local_MD
    # Collectives of gloo need equal shapes.
    padded_PD = local_MD.new_zeros(max(counts), *local_MD.shape[1:])
    padded_PD[: len(local_MD)] = local_MD
    parts = [torch.empty_like(padded_PD) for _ in counts]
    dist.all_gather(parts, padded_PD)
    if ranks.device.type == "cuda":
        # The call only queues the work. Waiting costs little here, where the objective needs the rows at once, and a
        # rank that does not come is missed in this phase and not in some later one.
        torch.cuda.current_stream().synchronize()
    return torch.cat([part_PD[:count] for part_PD, count in zip(parts, counts, strict=True)])


@overload
def total(value: float, ranks: Ranks) -> float: ...
@overload
def total(value: Tensor, ranks: Ranks) -> Tensor: ...
def total(value: float | Tensor, ranks: Ranks) -> float | Tensor:
    """Sum over ranks, the same bits on every rank; numbers are added in float64, tensors in their own dtype."""
    if not isinstance(value, Tensor):
        return total(torch.tensor(value, dtype=torch.float64), ranks).item()
    if ranks.world == 1:
        return value.detach()
    summed = value.detach().to(ranks.device, copy=True)
    dist.all_reduce(summed)
    return summed.to(value.device)


def collect(value: T, ranks: Ranks) -> list[T]:
    """The value of each rank, in rank order, on every rank; any object that can be pickled. No rank passes alone."""
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value)
    return values


def on_main(action: Callable[[], T], ranks: Ranks) -> T:
    """Do something on rank 0 only; every rank gets its result, or raises what it raised."""
    outcome: Any = None
    if ranks.is_main:
        try:
            outcome = action()
        except Exception as error:
            outcome = error
    outcome = collect(outcome, ranks)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def same_on_all(value: str, what: str, ranks: Ranks) -> None:
    """Refuse to go on if the ranks disagree about `value`; `what` names it ("the version of f2llm").

    Raises:
        F2Error: on every rank, naming the first rank that differs from rank 0.
    """
    values = collect(value, ranks)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise F2Error(
                f"{what} is {other!r} on rank {rank} and {values[0]!r} on rank 0, expected the same on all; give every "
                "rank the same code, recipe and data, and start again."
            )


def shard(
    decoder: Decoder, ranks: Ranks, precision: Literal["fp32", "bf16"], activation_checkpointing: bool
) -> None:
    """Move a decoder to the ranks' devices, in place, for training; names of parameters stay as they are.

    With several ranks, or in bf16, parameters become float32 DTensors of which each rank holds a part. Layers compute
    in `precision`; the vectors that come out, and the sums of gradients, are float32 in both cases.

    Args:
        decoder: float32, the same on every rank; on the CPU, so that a GPU never holds more than one whole layer of it.
        activation_checkpointing: compute each layer again in the backward pass, and keep its input alone.
    """
    if activation_checkpointing:
        for layer in decoder.layers:
            # A wrapping module would put its name into those of the parameters.
            recomputed = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            layer.forward = recomputed
    if ranks.world == 1 and precision == "fp32":
        decoder.to(ranks.device)
        return

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        _make_group(ranks, TIMEOUT)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    # What goes into a layer has its dtype from the embeddings. A cast by FSDP2 would rebuild the layout for each layer,
    # and what attention remembers of a layout would be forgotten.
    layers = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=layers, reshard_after_forward=True)
    root = replace(layers, output_dtype=torch.float32)
    fully_shard(decoder, mesh=mesh, mp_policy=root, reshard_after_forward=True)
    for module in _sharded_modules(decoder):
        # Sums in place of averages; gloo has no scaled sum, so plain ones are asked for as well.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def _sharded_modules(decoder: nn.Module) -> list[Any]:
    """The modules that FSDP2 has taken, told by a method of theirs: to name their class would be to import it."""
    return [module for module in decoder.modules() if hasattr(module, "set_requires_gradient_sync")]


def sync_gradients(decoder: nn.Module, on: bool) -> None:
    """Whether the next backward passes sum gradients over ranks (the last micro-batch) or add them up here."""
    for module in _sharded_modules(decoder):
        module.set_requires_gradient_sync(on, recurse=False)
        module.set_reshard_after_backward(on, recurse=False)


@contextmanager
def gathered(decoder: nn.Module) -> Iterator[None]:
    """Within this, weights that are gathered for one pass are kept for the next ones, so a step gathers them once.

    They are let go by the backward pass that sums gradients, and at the end. Until then each rank holds all weights
    in the precision of the computation, no more than the float32 gradients of several micro-batches take anyway.
    Outside, each pass gathers for itself, and nothing remains that a change of the weights would leave stale.
    """
    modules = _sharded_modules(decoder)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def whole_weights(decoder: Decoder, ranks: Ranks) -> Decoder:
    """A plain decoder in evaluation mode with the weights that the ranks hold together; every rank calls it.

    Rank 0 gets it on the CPU (it shares what was there already), the others one without numbers, on the meta device.
    """
    with torch.device("meta"):
        plain = Decoder(decoder.config)
    weights = {}
    for name, tensor in decoder.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if ranks.is_main:
            weights[name] = whole.cpu()
    if ranks.is_main:
        plain.load_state_dict(weights, assign=True)
    return plain.eval()
