"""How a step is cut to fit into memory: what a graph takes, what is tried, and that trying leaves no trace."""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.train.runs import MakeModel, Settings, Stopped, divided, interrupt
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from f2llm.errors import F2Error
from f2llm.model.batches import forward, token_batches
from f2llm.model.decoder import Decoder
from f2llm.train import memory
from f2llm.train.checkpoint import find_checkpoint, read_meta
from f2llm.train.memory import choose_sum_each, graph_bytes, sums_each, tokens_per_microbatch
from f2llm.train.optim import make_optimizer
from f2llm.train.ranks import ALONE
from f2llm.train.trainer import train

GB = 10**9
SHORT, MOST = 16, 10_000  # tokens of the longest text, and of a batch


# --- What a graph takes


def allocated(compute: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes that a computation leaves in memory beside its result, and the most that it held, by torch's profiler."""
    compute()  # what is remembered of a layout of texts is not counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = compute()
    sizes = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = np.cumsum([size for _, size in sorted(sizes, key=lambda pair: pair[0])])
    return int(held[-1]) - result.nbytes, int(held.max())


@pytest.mark.parametrize("length", [16, 64, 256])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_graph_takes_what_torch_allocates(length: int, layers: int, make_model: MakeModel) -> None:
    decoder = make_model(num_hidden_layers=layers).decoder
    left, _ = allocated(lambda: forward(decoder, [[0] * length]))
    assert graph_bytes(decoder, length) == pytest.approx(left, rel=0.03)


def test_the_graph_grows_with_length_and_layers(make_model: MakeModel) -> None:
    """In proportion: attention keeps no square of the length."""
    one, three = (make_model(num_hidden_layers=layers).decoder for layers in (1, 3))
    for decoder in (one, three):
        ends = [graph_bytes(decoder, length) for length in (128, 256, 512)]
        assert ends[2] - ends[1] == pytest.approx(2 * (ends[1] - ends[0]), rel=0.01)
    assert graph_bytes(three, 256) > 3 * graph_bytes(
        one, 256
    )  # the last layer, here the only one, takes less


@pytest.mark.parametrize("length", [2, 64, 256])
def test_the_backward_pass_takes_no_more_than_is_reckoned(length: int, make_model: MakeModel) -> None:
    """The most that forward and backward hold, beside the gradients of the weights."""
    decoder = make_model(hidden_size=64, intermediate_size=160, head_dim=16, num_hidden_layers=3).decoder
    ids = [[0] * length] * (1024 // length)

    def compute() -> Tensor:
        vectors_MD = forward(decoder, ids)
        vectors_MD.backward(torch.zeros_like(vectors_MD))
        decoder.zero_grad()
        return vectors_MD

    _, most = allocated(compute)
    weights = sum(parameter.nbytes for parameter in decoder.parameters())
    assert most - weights < memory.GRAPH_TO_PEAK * graph_bytes(decoder, length) * len(ids)


# --- The budget


@pytest.mark.parametrize("free", [2e6, 3e7, 1e9])
def test_the_budget_is_the_largest_power_of_two_that_fits(
    free: float, make_model: MakeModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, config = make_model().decoder, settings(max_length=SHORT)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(free))
    monkeypatch.setattr(memory, "forward", first_texts)
    budget = tokens_per_microbatch(decoder, config, 1 << 40, ALONE)
    states = 3 * sum(parameter.nbytes for parameter in decoder.parameters())
    per_token = 1.5 * graph_bytes(decoder, SHORT) / SHORT
    assert budget == 2 ** round(math.log2(budget))
    assert budget * per_token <= 0.5 * free - states < 2 * budget * per_token


def first_texts(decoder: Decoder, ids: Sequence[Sequence[int]]) -> Tensor:
    """A large micro-batch is not computed in a test."""
    return forward(decoder, ids[:4])


def test_one_text_is_the_least_and_a_batch_the_most(
    make_model: MakeModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, config = make_model().decoder, settings(max_length=SHORT)
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    assert tokens_per_microbatch(decoder, config, MOST, ALONE) == SHORT
    monkeypatch.setattr(memory, "free_memory", lambda device: GB)
    assert tokens_per_microbatch(decoder, config, 77, ALONE) == 77
    assert tokens_per_microbatch(decoder, settings(tokens_per_microbatch=5), MOST, ALONE) == 5


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def too_large_for_this_machine() -> None:
    torch.empty(1 << 58)  # what the CPU's allocator says is for torch to choose


SHORTAGES = [out_of_memory, too_large_for_this_machine]


@pytest.mark.parametrize("complain", SHORTAGES)
@pytest.mark.parametrize("room", [40, 700, MOST])
def test_a_budget_that_does_not_fit_is_halved_until_it_does(
    room: int,
    complain: Callable[[], None],
    make_model: MakeModel,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With room for some tokens and not for one more, in the forward pass or in the backward pass."""
    decoder, tried = make_model().decoder, []

    def limited(decoder: Decoder, ids: Sequence[Sequence[int]]) -> Tensor:
        tried.append(tokens := sum(map(len, ids)))
        vectors_MD = forward(decoder, ids)
        if tokens > room:
            vectors_MD.register_hook(lambda grad: complain())
        return vectors_MD

    monkeypatch.setattr(memory, "free_memory", lambda device: GB)
    monkeypatch.setattr(memory, "forward", limited)
    budget = tokens_per_microbatch(decoder, settings(max_length=SHORT), 1000, ALONE)
    assert budget == next(1000 >> n for n in range(9) if 1000 >> n <= room)
    assert all(parameter.grad is None for parameter in decoder.parameters())


@pytest.mark.parametrize("complain", SHORTAGES)
@pytest.mark.parametrize(("given", "said"), [(None, SHORT), (64, 64)])
def test_what_cannot_be_computed_is_refused(
    given: int | None,
    said: int,
    complain: Callable[[], None],
    make_model: MakeModel,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even one text fits; and what the recipe demands is not changed behind its back."""
    room = SHORT - 1 if given is None else given - 1

    def limited(decoder: Decoder, ids: Sequence[Sequence[int]]) -> Tensor:
        if sum(map(len, ids)) > room:
            complain()
        return forward(decoder, ids)

    monkeypatch.setattr(memory, "forward", limited)
    config = settings(max_length=SHORT, tokens_per_microbatch=given)
    with pytest.raises(F2Error, match=rf"^a micro-batch of {said} tokens does not fit [^.]*; lower [^.]*\.$"):
        tokens_per_microbatch(make_model().decoder, config, MOST, ALONE)


def test_other_errors_are_not_taken_for_a_shortage(
    make_model: MakeModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(decoder: Decoder, ids: Sequence[Sequence[int]]) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(memory, "forward", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        tokens_per_microbatch(make_model().decoder, settings(tokens_per_microbatch=9), MOST, ALONE)


@pytest.mark.parametrize("budget", [5, 16, 40, 63, 200])
def test_no_micro_batch_takes_more_than_what_was_tried(
    budget: int, make_model: MakeModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the graph, of micro-batches that any texts may be cut into: short, long, all lengths."""
    decoder, tried = make_model().decoder, []

    def noted(decoder: Decoder, ids: Sequence[Sequence[int]]) -> Tensor:
        tried.append(list(map(len, ids)))
        return forward(decoder, ids)

    def graph(lengths: Sequence[int]) -> int:
        return allocated(lambda: forward(decoder, [[0] * length for length in lengths]))[0]

    monkeypatch.setattr(memory, "forward", noted)
    tokens_per_microbatch(decoder, settings(max_length=SHORT, tokens_per_microbatch=budget), MOST, ALONE)
    most = max(map(graph, tried))
    draw = random.Random(budget)
    for longest in (1, 3, SHORT):
        lengths = [draw.randint(1, longest) for _ in range(60)]
        for batch in token_batches(lengths, budget):
            assert graph([lengths[n] for n in batch]) <= most


# --- No trace


def test_trying_leaves_no_trace(make_model: MakeModel, settings: Settings) -> None:
    """Neither in weights, gradients and the optimizer's state, nor in any generator of random numbers."""
    model = make_model()
    config = settings(max_length=SHORT, embedding_rows="exact")
    model.decoder.train()
    optimizer = make_optimizer(model.decoder, config)

    def everything() -> list[Tensor]:
        state = [*model.decoder.state_dict().values(), *optimizer.state().values()]
        numpy_state = torch.from_numpy(np.random.get_state()[1].astype(np.int64))  # type: ignore[index]  # noqa: NPY002
        return [tensor.clone() for tensor in (*state, torch.get_rng_state(), numpy_state)]

    before, python = everything(), random.getstate()
    tokens_per_microbatch(model.decoder, config, 500, ALONE)
    choose_sum_each(model.decoder, config, ALONE)
    after = everything()
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert random.getstate() == python
    assert all(parameter.grad is None for parameter in model.decoder.parameters())
    assert model.decoder.training


def test_what_was_found_is_kept_and_not_looked_for_again(
    make_model: MakeModel,
    settings: Settings,
    rows_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings()

    def go(cut: int | None = None) -> None:
        batches = Stopped(divided(config, rows_folder)[0], {} if cut is None else {cut: interrupt})
        with suppress(KeyboardInterrupt):
            train(config, make_model(), batches, None, tmp_path)

    def kept() -> int:
        checkpoint = find_checkpoint(tmp_path / "checkpoints", ALONE)
        assert checkpoint
        return int(read_meta(checkpoint)["tokens_per_microbatch"])

    monkeypatch.setattr(memory, "free_memory", lambda device: 2_500_000)
    go(cut=3)
    found = kept()
    assert found == 2 ** round(math.log2(found)) and found < 512
    monkeypatch.setattr(memory, "forward", lambda *_: pytest.fail("tried again"))
    go(cut=5)
    assert kept() == found


# --- Whole gradients between micro-batches


@pytest.mark.parametrize(
    ("parameters", "trained", "width", "gigabytes", "expected"),
    [
        (8e9, 8e9, 2, 80, True),  # 16 GB of weights and 32 GB of gradients
        (0.6e9, 0.6e9, 2, 80, False),  # 1.2 + 2.4
        (8e9, 0.04e9, 2, 80, False),  # adapters: 16 + 0.16
        (8e9, 0.04e9, 4, 80, True),  # in float32: 32 + 0.16
        (1e9, 1e9, 4, 32, False),  # a quarter, exactly
        (1e9, 1e9, 4, 31.9, True),
    ],
)
def test_gradients_stay_whole_where_they_take_a_quarter_at_most(
    parameters: float, trained: float, width: int, gigabytes: float, expected: bool
) -> None:
    assert sums_each(int(parameters), int(trained), width, gigabytes * GB) == expected


def test_what_a_decoder_trains_decides(
    make_model: MakeModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with just enough room, and with a little less; what is frozen needs less."""
    for config, width in ((settings(), 4), (settings(precision="bf16"), 2)):
        decoder = make_model().decoder
        count = sum(parameter.numel() for parameter in decoder.parameters())
        for room, expected in (
            (4 * (width + 4) * count, False),
            (4 * (width + 4) * count - 1, True),
        ):
            monkeypatch.setattr(memory, "_memory", lambda ranks, room=room: room)
            assert choose_sum_each(decoder, config, ALONE) == expected
        decoder.embed_tokens.requires_grad_(False)  # most of this decoder
        assert not choose_sum_each(decoder, config, ALONE)
