"""Formulas of cost against what torch counts and keeps, on the meta device with the kernels of a GPU."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from f2llm.family import FAMILY
from f2llm.model import attention, fused
from f2llm.model.decoder import Decoder, DecoderConfig
from f2llm.plan.cost import (
    GIB,
    GPUS,
    Load,
    Sharded,
    forward_flops,
    lora_parameters,
    memory_per_gpu,
    saved_bytes,
    training_flops,
)
from f2llm.recipe_train import Lora, TrainStage
from f2llm.train.ranks import Ranks, shard
from f2llm.train.step import accumulate_gradients

META = Ranks(0, 1, torch.device("meta"))
SMALL = DecoderConfig(500, 64, 96, 3, 4, 2, 16)
WIDE = DecoderConfig(1000, 1024, 3072, 28, 16, 8, 128)  # 0.6B with few words


class CudaNorm(torch.autograd.Function):
    """What a GPU's RMSNorm keeps: its input, and 1 / rms in float32; elsewhere torch keeps more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_W: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_W, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_W, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight_W), None


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder on the meta device takes the attention that it takes on a GPU, and keeps of norms what it keeps."""
    kernel = attention._torch_varlen()
    if kernel is None:
        pytest.skip("this torch has no variable-length attention with grouped queries")
    monkeypatch.setattr(attention, "kernel_for", lambda device, dtype: kernel)
    monkeypatch.setattr(fused, "plain_rms_norm", CudaNorm.apply)


def on_meta(config: DecoderConfig, *, recompute: bool = False) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(config).to(torch.bfloat16)
    shard(decoder, META, "fp32", recompute)
    return decoder


def forward(decoder: Decoder, lengths: list[int]) -> Tensor:
    out: Tensor = decoder(torch.zeros(sum(lengths), dtype=torch.int64, device="meta"), lengths)
    return out


def square(lengths: list[int]) -> Load:
    """With every pair of tokens of a text, as torch counts: it does not know of the causal mask."""
    return Load(len(lengths), sum(lengths), sum(length**2 for length in lengths))


def count(work: Callable[[], Any]) -> FlopCounterMode:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter


# --- Operations


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "0.6B"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_flops_are_those_that_torch_counts(config: DecoderConfig, recompute: bool, as_on_gpu: None) -> None:
    """Texts of one length, so that torch, which takes the longest for all on this device, counts them exactly."""
    lengths = [24] * 5
    decoder = on_meta(config, recompute=recompute)
    assert count(lambda: forward(decoder.eval(), lengths)).get_total_flops() == sum(
        forward_flops(config, square(lengths))
    )
    counter = count(lambda: forward(decoder, lengths).sum().backward())
    expected = training_flops(config, square(lengths), recompute=recompute)
    assert counter.get_total_flops() == expected


def test_linear_flops_of_ragged_texts_are_those_that_torch_counts(as_on_gpu: None) -> None:
    lengths = [1, 5, 5, 9, 31]
    counter = count(lambda: forward(on_meta(SMALL), lengths))
    products: int = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert products == forward_flops(SMALL, Load.of(lengths))[0]


def test_flops_of_a_step_in_micro_batches(as_on_gpu: None) -> None:
    """The trainer's own step: four micro-batches, three of which are computed twice."""
    decoder, lengths = on_meta(SMALL), [16] * 8
    ids = [[0] * length for length in lengths]
    counter = count(lambda: accumulate_gradients(decoder, ids, lambda vectors_ND: vectors_ND.sum(), 32))
    assert counter.get_total_flops() == training_flops(SMALL, square(lengths), again=3 / 4)


def test_pairs_are_those_under_the_causal_mask() -> None:
    lengths = [1, 2, 3, 17]
    pairs = sum(key <= query for length in lengths for query in range(length) for key in range(length))
    assert Load.of(lengths) == Load(4, 23, pairs)
    assert Load.of([3, 5]) * 2 + Load.of([4]) == Load.of([3, 5, 3, 5, 4])


def test_lora_has_its_parameters_and_operations(as_on_gpu: None) -> None:
    """Adapters of the last layer are counted for every token, not for final ones alone: a few percent too much."""
    pytest.importorskip("peft", reason="LoRA needs peft")
    from f2llm.train.lora import add_lora

    decoder, lengths = on_meta(WIDE), [24] * 5
    add_lora(decoder, 16, 32.0, seed=0)
    adapters = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    assert adapters == lora_parameters(WIDE, 16)
    counted = count(lambda: forward(decoder, lengths).sum().backward()).get_total_flops()
    lora = training_flops(WIDE, square(lengths), lora=Lora(rank=16))
    assert lora == pytest.approx(counted, rel=0.03)
    assert lora < 0.75 * training_flops(WIDE, square(lengths))


# --- Memory


class Live(TorchDispatchMode):
    """Bytes of all tensors made within it that are still there, now and at most."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.known = {p.untyped_storage()._cdata for p in decoder.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("size", ["80M", "0.6B", "4B"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_activations_are_those_that_autograd_keeps(size: str, recompute: bool, as_on_gpu: None) -> None:
    member, lengths = FAMILY[size], list(range(64, 192))
    config = DecoderConfig(
        1000,
        member.hidden_size,
        member.intermediate_size,
        member.layers,
        member.heads,
        member.kv_heads,
        member.head_dim,
    )
    decoder = on_meta(config, recompute=recompute)
    for parameter in decoder.parameters():  # gradients are counted elsewhere
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    saved, backward = saved_bytes(config, Load.of(lengths), 2, recompute)
    with Live(decoder) as live:
        vectors_ND = forward(decoder, lengths)
        assert live.now == pytest.approx(saved, rel=0.01)
        vectors_ND.sum().backward()
    assert 0.8 * (saved + backward) < live.most <= saved + backward


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@pytest.fixture
def stage(settings: Callable[..., TrainStage]) -> TrainStage:
    return settings(batch_size=512, max_length=1024)


def memory(
    stage: TrainStage, budget: int = 8192, *, ranks: int = 8, trained: int = 10**9
) -> dict[str, float]:
    """Items of a made-up model of 10^9 parameters, 10^8 of them in the table."""
    total = 10**9
    placed = Sharded(total, total // ranks, trained, trained // ranks, largest_layer=10**7, table=10**8)
    batch = Load.of([128] * 512 * 9)
    return memory_per_gpu(
        WIDE, stage, placed, ranks=ranks, batch=batch, budget=budget, teacher=None, gpu=GPUS["h100"]
    )


def test_what_each_rank_keeps(stage: TrainStage) -> None:
    """Written out by hand: 4 bytes a parameter and eighth of the model, 8 for the moments."""
    items = memory(stage)
    assert items["weights (float32)"] == 4 * 10**9 / 8
    assert items["AdamW's two moments (float32)"] == 8 * 10**9 / 8
    assert items["gathered weights (all)"] == 2 * 10**9
    assert items["gradients (float32)"] == 4 * 10**9, "whole, as long as micro-batches add to them"
    assert "moving average (float32)" not in items
    averaged = memory(stage.model_copy(update={"ema": 0.999}))
    assert averaged["moving average (float32)"] == 4 * 10**9 / 8


def test_one_micro_batch_needs_no_whole_gradients(stage: TrainStage) -> None:
    longest = 512 * 9 * 1024 // 8
    assert memory(stage, longest)["gradients (float32)"] == 4 * 10**9 / 8
    assert memory(stage, longest - 1)["gradients (float32)"] == 4 * 10**9


def test_memory_follows_the_settings(stage: TrainStage) -> None:
    def change(**changes: Any) -> TrainStage:
        return stage.model_copy(update=changes)

    everything = sum(memory(stage).values())
    twice = memory(stage, 2 * 8192)
    assert twice["saved activations"] == 2 * memory(stage)["saved activations"]
    assert sum(memory(change(activation_checkpointing=True)).values()) < everything
    assert sum(memory(change(precision="fp32")).values()) > everything
    assert sum(memory(stage, trained=10**7).values()) < everything  # LoRA
    alone = memory(change(precision="fp32"), ranks=1)
    assert not [item for item in alone if "gathered" in item or "other ranks" in item], "plain modules"
    assert alone["gradients (float32)"] == 4 * 10**9


def test_every_gpu_is_described_sensibly() -> None:
    """bf16 is faster than float32, and nobody has a GPU without memory or price."""
    for name, gpu in GPUS.items():
        assert gpu.tflops_bf16 > gpu.tflops_fp32 > 0, name
        assert gpu.memory_gib * GIB > 20e9 and gpu.dollars_per_hour > 0, name
