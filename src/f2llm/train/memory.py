"""How a step is cut to fit into memory, chosen before the first one.

A run must not die at step 5,000 because the longest texts met in one micro-batch. So the budget of tokens is chosen
from the memory that is free and from what a token costs in the graph, and then the worst micro-batches that it admits
are computed, forward and backward. No random number is drawn and no weight moves.

Between micro-batches a large model leaves no room for whole gradients: whether it does follows from its size and the
memory of a GPU alone (`sums_each`), so that a plan says the same as the run does.
"""

import os
from pathlib import Path

import torch

from f2llm.errors import F2Error
from f2llm.model.batches import forward
from f2llm.model.decoder import Decoder
from f2llm.progress import say
from f2llm.recipe_train import TrainStage
from f2llm.train.optim import is_sharded
from f2llm.train.ranks import Ranks, collect
from f2llm.train.training import precision_of

FP32 = 4  # bytes
SHARE_FOR_WHOLE = 0.25  # of a rank's memory, for weights and gradients that are whole between micro-batches
SHARE_OF_FREE = 0.5  # of the memory that is free at the start; the rest is for what others and we take later
GRAPH_TO_PEAK = 1.5  # the backward pass holds its own buffers beside the graph
STATES_OF_ADAMW = 3  # gradient and two moments, each as large as the weights


def tokens_per_microbatch(decoder: Decoder, config: TrainStage, most_tokens: int, ranks: Ranks) -> int:
    """The recipe's budget of tokens, or the largest that fits; tried, and on every rank the same.

    Args:
        most_tokens: more than this is never needed, since no batch has so many.

    Raises:
        F2Error if not even the recipe's budget, or one text of `config.max_length` tokens, can be computed.
    """
    least = config.tokens_per_microbatch or config.max_length
    if not _all_can(decoder, least, config.max_length, ranks):
        raise F2Error(
            f"a micro-batch of {max(least, config.max_length)} tokens does not fit into the memory of "
            f"{ranks.device}; lower tokens_per_microbatch or max_length, or set activation_checkpointing."
        )
    estimate = config.tokens_per_microbatch or min(_estimate(decoder, config.max_length, ranks), most_tokens)
    budget = min(collect(estimate, ranks))
    while budget > least and not _all_can(decoder, budget, config.max_length, ranks):
        budget //= 2
    say(f"micro-batches of at most {budget:,} tokens")
    return budget


def sums_each(parameters: int, trained: int, width: int, memory: float) -> bool:
    """Whether ranks have to sum gradients after each micro-batch, and not after the last one of a step only.

    Until they are summed, FSDP2 keeps on each rank the float32 gradients of all that is trained, and the weights as
    they were gathered, in `width` bytes each. That saves time, as long as it takes no more than SHARE_FOR_WHOLE of the
    `memory` of a rank (bytes).
    """
    return width * parameters + FP32 * trained > SHARE_FOR_WHOLE * memory


def choose_sum_each(decoder: Decoder, config: TrainStage, ranks: Ranks) -> bool:
    """`sums_each` for a decoder that is to be trained on these ranks; on every one the same."""
    sizes = [(p.numel(), p.requires_grad) for p in decoder.parameters()]
    parameters, trained = sum(size for size, _ in sizes), sum(size for size, moves in sizes if moves)
    width = FP32 if precision_of(config, ranks) == "fp32" else 2
    return sums_each(parameters, trained, width, min(collect(_memory(ranks), ranks)))


def _memory(ranks: Ranks) -> float:
    """Bytes that a rank could take if nothing else ran."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_properties(ranks.device).total_memory
    limit = _container_limit()
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (machine if limit is None else min(machine, limit)) / _ranks_here(ranks)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU, or of the machine and of its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        free.append(int(line.split()[1]) * 1024)
    limit, used = _container_limit(), Path("/sys/fs/cgroup/memory.current")
    if limit is not None and used.exists():
        free.append(limit - int(used.read_text()))
    return min(free)


def _container_limit() -> int | None:
    """Bytes that the container of this process may take, if it is limited."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return None if text == "max" else int(text)


def _ranks_here(ranks: Ranks) -> int:
    """How many ranks share the memory of this one's device; torchrun says how many it started on a machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if ranks.device.type == "cpu" else 1


def graph_bytes(decoder: Decoder, length: int) -> int:
    """Bytes that the graph of one text of `length` tokens holds for the backward pass, beside the weights."""
    held: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Asked for each time: a sharded decoder has the weights of a layer in one place only while it computes it.
        weights = (p.untyped_storage().data_ptr() for p in decoder.parameters() if not is_sharded(p))
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        forward(decoder, [[0] * length])
    return sum(held.values())


def _estimate(decoder: Decoder, max_length: int, ranks: Ranks) -> int:
    """The largest power of two of tokens whose graph should fit, at least `max_length`."""
    length = min(
        max_length, 256
    )  # enough for the cost of a token; attention keeps nothing of the order of its square
    weights = sum(p.numel() * p.element_size() for p in decoder.parameters()) // ranks.world
    free = SHARE_OF_FREE * free_memory(ranks.device) / _ranks_here(ranks) - STATES_OF_ADAMW * weights
    tokens = free / (GRAPH_TO_PEAK * graph_bytes(decoder, length) / length)
    return max(max_length, 1 << max(1, int(tokens)).bit_length() - 1)


def _all_can(decoder: Decoder, budget: int, max_length: int, ranks: Ranks) -> bool:
    """Whether every rank can compute the worst micro-batches of a budget, forward and backward."""
    try:
        for ids in worst_microbatches(budget, max_length):
            vectors_MD = forward(decoder, ids)
            vectors_MD.backward(torch.zeros_like(vectors_MD))
        fits = True
    except (torch.OutOfMemoryError, MemoryError):
        fits = False
    except RuntimeError as error:  # what torch's allocator on the CPU raises
        if "DefaultCPUAllocator" not in str(error):
            raise
        fits = False
    decoder.zero_grad(set_to_none=True)
    return all(collect(fits, ranks))


def worst_microbatches(budget: int, max_length: int) -> list[list[list[int]]]:
    """Token ids of the longest texts that fill a budget, and of the shortest.

    Long texts take most in attention. Of short ones more tokens are final, and only those go through the last layer.
    """
    return [[[0] * max_length] * max(1, budget // max_length), [[0]] * budget]
