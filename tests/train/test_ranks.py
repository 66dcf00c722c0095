"""Ranks: what they tell each other, and that a decoder spread over them learns what one plain decoder would."""

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.train.gloo import on_ranks
from torch import Tensor
from torch.profiler import profile

from f2llm.errors import F2Error, UsageError
from f2llm.model.decoder import Decoder, DecoderConfig
from f2llm.train.ranks import (
    ALONE,
    Ranks,
    collect,
    gather,
    gathered,
    join,
    on_main,
    same_on_all,
    shard,
    sync_gradients,
    total,
    whole_weights,
)

LENGTHS = [3, 1, 7, 3, 12, 2, 5, 9]
# Texts of each micro-batch of each rank; the last rank has less to do, and runs a text of another for nothing.
SHARES = {
    1: [[[0, 1, 2, 3, 4, 5, 6, 7]]],
    2: [[[0, 1], [2, 3, 4]], [[5], [6, 7]]],
    3: [[[0, 1], [2, 3]], [[4, 5], [6]], [[7], []]],
}


def make_decoder() -> Decoder:
    """A decoder whose dimensions three ranks cannot share evenly."""
    decoder = Decoder(DecoderConfig(50, 24, 40, 2, 4, 2, 8))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * noise if name.endswith("norm.weight") else 0.3 * noise
    return decoder


def encode(decoder: Decoder, texts: list[int]) -> Tensor:
    ids = [torch.arange(text, text + LENGTHS[text]) * 7 % 50 for text in texts]
    vectors: Tensor = decoder(torch.cat(ids), [LENGTHS[text] for text in texts])
    return vectors


def objective(vectors: Tensor) -> Tensor:
    """Of all vectors at once: every even one looks for the odd one after it."""
    unit = F.normalize(vectors, dim=-1)
    return F.cross_entropy(unit[0::2] @ unit[1::2].T / 0.1, torch.arange(len(unit) // 2))


def gradients(decoder: Decoder, ranks: Ranks) -> dict[str, Tensor]:
    """Gradients of the objective, each rank encoding its texts twice: without a graph, then with it."""
    shares = SHARES[ranks.world]
    mine = shares[ranks.rank]
    with gathered(decoder):
        with torch.no_grad():
            local = torch.cat([encode(decoder, texts) for texts in mine if texts])
        counts = [sum(map(len, share)) for share in shares]
        vectors = gather(local, counts, ranks).requires_grad_()
        (wanted,) = torch.autograd.grad(objective(vectors), vectors)
        first = sum(counts[: ranks.rank])
        for number, texts in enumerate(mine):
            sync_gradients(decoder, on=number == len(mine) - 1)
            again = encode(decoder, texts or [0])
            again.backward(wanted[first : first + len(texts)] if texts else torch.zeros_like(again))
            first += len(texts)
    return {
        name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None
    }


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def refusal(ranks: Ranks) -> str:
    try:
        same_on_all(f"commit {min(ranks.rank, 1)}", "the version of the code", ranks)
    except F2Error as error:
        return str(error)
    return "none"


def refused_by_main(ranks: Ranks) -> str:
    def fail() -> None:
        assert ranks.is_main
        raise OSError(28, "No space left on device")

    try:
        on_main(fail, ranks)
    except OSError as error:
        return f"{error.errno}"
    return "none"


def talk_and_train(ranks: Ranks) -> dict[str, Any]:
    """All that is asked of three ranks."""
    rows = torch.arange(8.0).reshape(4, 2) + 100 * ranks.rank
    same_on_all("one", "what is the same", ranks)
    decoder = make_decoder()
    shard(decoder, ranks, "fp32", activation_checkpointing=False)
    return {
        "uneven": gather(rows[: [2, 0, 4][ranks.rank]], [2, 0, 4], ranks),
        "none": gather(rows[:0], [0, 0, 0], ranks),
        "number": total(0.1 + ranks.rank, ranks),
        "tensor": total(torch.tensor([1.0, 10.0**ranks.rank]), ranks),
        "collected": collect({"rank": ranks.rank}, ranks),
        "main": on_main(lambda: f"from rank {ranks.rank}", ranks),
        "refused by main": refused_by_main(ranks),
        "refusal": refusal(ranks),
        "gradients": {name: whole(gradient) for name, gradient in gradients(decoder, ranks).items()},
    }


def facts_of_half(ranks: Ranks, activation_checkpointing: bool) -> dict[str, Any]:
    """What a decoder that computes in bf16 gives, and what it keeps."""
    half = make_decoder()
    shard(half, ranks, "bf16", activation_checkpointing)
    return {
        "vectors": encode(half, list(range(8))).detach(),
        "gradients": {name: whole(gradient) for name, gradient in gradients(half, ranks).items()},
        "parameters": {str(parameter.dtype) for parameter in half.parameters()},
    }


def train_in_other_ways(ranks: Ranks) -> dict[str, Any]:
    """All that is asked of two ranks."""
    decoder = make_decoder()
    shard(decoder, ranks, "fp32", activation_checkpointing=True)
    results: dict[str, Any] = {"names": list(decoder.state_dict())}
    with profile() as operations:
        step = gradients(decoder, ranks)
    results["operations"] = Counter(event.name for event in operations.events())
    results["gradients"] = {name: whole(gradient) for name, gradient in step.items()}
    results["half"] = facts_of_half(ranks, activation_checkpointing=False)
    with torch.no_grad():
        held = list(decoder.parameters())  # as an optimizer holds them
        with gathered(decoder):
            encode(decoder, [0])  # leaves the weights gathered, which then change
        for parameter in held:
            parameter.mul_(1.5)
        results["after a change"] = encode(decoder, [0, 4])
        plain = whole_weights(decoder, ranks)
        results["plain"] = (
            plain.state_dict() if ranks.is_main else {p.device.type for p in plain.parameters()}
        )
        results["local rows"] = decoder.embed_tokens.weight.to_local().shape[0]  # type: ignore[attr-defined]
    return results


@pytest.fixture(scope="module")
def three() -> list[dict[str, Any]]:
    return on_ranks(3, talk_and_train)


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return on_ranks(2, train_in_other_ways)


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    """The gradients of one decoder that computes everything in one pass."""
    decoder = make_decoder()
    objective(encode(decoder, list(range(8)))).backward()
    return {name: whole(parameter.grad) for name, parameter in decoder.named_parameters()}


def difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of an element, relative to the largest element of its tensor."""
    assert got.keys() == expected.keys()
    return max(float((got[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in expected)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without what torchrun sets, and without a GPU."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def test_rows_of_all_ranks_come_in_rank_order(three: list[dict[str, Any]]) -> None:
    expected = torch.tensor([[0, 1], [2, 3], [200, 201], [202, 203], [204, 205], [206, 207]])
    for result in three:
        assert torch.equal(result["uneven"], expected.float())
        assert result["none"].shape == (0, 2)


def test_sums_and_messages_are_the_same_on_every_rank(three: list[dict[str, Any]]) -> None:
    for result in three:
        assert result["number"] == pytest.approx(3.3, rel=1e-15)
        assert result["tensor"].tolist() == [3.0, 111.0]
        assert result["collected"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert result["main"] == "from rank 0"
        assert result["refused by main"] == "28"


def test_ranks_that_disagree_are_named(three: list[dict[str, Any]]) -> None:
    for result in three:
        assert "the version of the code is 'commit 1' on rank 1 and 'commit 0' on rank 0" in result["refusal"]


def test_ranks_together_have_the_gradient_of_one(
    three: list[dict[str, Any]], two: list[dict[str, Any]], plain: dict[str, Tensor]
) -> None:
    """Two and three ranks, with and without recomputed activations, and a rank that has a micro-batch less."""
    for result in [*three, *two]:
        assert difference(result["gradients"], plain) < 1e-5
    assert difference(gradients(make_decoder(), ALONE), plain) < 1e-5


def test_names_stay_as_they_are(two: list[dict[str, Any]]) -> None:
    assert two[0]["names"] == list(make_decoder().state_dict())
    assert two[0]["gradients"].keys() == dict(make_decoder().named_parameters()).keys()


def test_a_step_gathers_and_sums_each_weight_once(two: list[dict[str, Any]]) -> None:
    """Two layers and the rest, over four passes without and with graphs."""
    for result in two:
        counts = result["operations"]
        assert [counts[f"c10d::{name}"] for name in ("_allgather_base_", "_reduce_scatter_base_")] == [
            3,
            3,
        ], counts


def test_each_rank_holds_a_part(two: list[dict[str, Any]]) -> None:
    assert [result["local rows"] for result in two] == [25, 25]


def test_weights_that_change_are_gathered_again(two: list[dict[str, Any]]) -> None:
    decoder = make_decoder()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.5)
        expected = encode(decoder, [0, 4])
    for result in two:
        torch.testing.assert_close(result["after a change"], expected, rtol=1e-5, atol=1e-5)


def test_the_whole_decoder_is_put_together_on_rank_0(two: list[dict[str, Any]]) -> None:
    expected = {name: 1.5 * weight for name, weight in make_decoder().state_dict().items()}
    weights, devices = two[0]["plain"], two[1]["plain"]
    assert weights.keys() == expected.keys()
    assert all(type(weight) is Tensor and torch.equal(weight, expected[n]) for n, weight in weights.items())
    assert devices == {"meta"}


def check_half(half: dict[str, Any], plain: dict[str, Tensor]) -> None:
    """Master weights, gradients and vectors in float32, the last two with errors of bfloat16's size."""
    assert half["parameters"] == {"torch.float32"}
    vectors = encode(make_decoder(), list(range(8))).detach()
    assert half["vectors"].dtype == torch.float32
    assert F.cosine_similarity(half["vectors"], vectors).min() > 0.999
    assert not torch.equal(half["vectors"], vectors)
    for name, gradient in half["gradients"].items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0) > 0.99, name


def test_bf16_computes_nearly_the_same(two: list[dict[str, Any]], plain: dict[str, Tensor]) -> None:
    for result in two:
        check_half(result["half"], plain)


def test_bf16_in_one_process(environment: pytest.MonkeyPatch, plain: dict[str, Tensor]) -> None:
    """It takes a group of one, which is gone afterwards."""
    for _ in range(2):
        with join() as ranks:
            check_half(facts_of_half(ranks, activation_checkpointing=True), plain)
        assert not dist.is_initialized()


def test_all_layers_get_the_same_layout(environment: pytest.MonkeyPatch) -> None:
    """Attention keeps masks by layout, so a copy for each layer would cost a mask for each."""
    layouts: list[Any] = []
    with join() as ranks:
        half = make_decoder()
        shard(half, ranks, "bf16", activation_checkpointing=False)
        for layer in half.layers:
            layer.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[1]))
        encode(half, [0, 1])
    assert len(layouts) == 2 and layouts[0] is layouts[1]


def test_activation_checkpointing_computes_layers_again(plain: dict[str, Tensor]) -> None:
    for on in (False, True):
        decoder, calls = make_decoder(), Counter[bool]()
        decoder.layers[1].mlp.register_forward_pre_hook(lambda *_, on=on, calls=calls: calls.update([on]))  # type: ignore[union-attr]
        shard(decoder, ALONE, "fp32", activation_checkpointing=on)
        assert list(decoder.state_dict()) == list(make_decoder().state_dict())
        loss = objective(encode(decoder, list(range(8))))
        assert calls.total() == 1
        loss.backward()
        assert calls.total() == 1 + on
        got = {name: whole(parameter.grad) for name, parameter in decoder.named_parameters()}
        assert difference(got, plain) == 0


def test_alone_everything_is_as_it_is(environment: pytest.MonkeyPatch) -> None:
    with join() as ranks:
        assert ranks == ALONE and ranks.is_main
        rows = torch.ones(2, 3, requires_grad=True)
        assert torch.equal(gather(rows, [2], ranks), rows) and not gather(rows, [2], ranks).requires_grad
        assert total(0.1, ranks) == 0.1 and collect("x", ranks) == ["x"] and on_main(lambda: 3, ranks) == 3
        same_on_all("anything", "it", ranks)
        decoder = make_decoder()
        vectors = encode(whole_weights(decoder, ranks), [0, 4])
        assert torch.equal(vectors, encode(decoder, [0, 4]))
        with pytest.raises(F2Error, match=r"has 2 rows to gather, but the counts are \[3\]"):
            gather(rows, [3], ranks)


def test_alone_nothing_that_ranks_need_is_imported() -> None:
    """FSDP2, DTensors and DCP cost half a second, which no quick run on a laptop should pay."""
    script = """
import sys
import torch
from f2llm.model.decoder import Decoder, DecoderConfig
import f2llm.train.checkpoint, f2llm.train.watchdog
from f2llm.train.ranks import join, gathered, shard, sync_gradients
with join() as ranks:
    decoder = Decoder(DecoderConfig(50, 24, 40, 2, 4, 2, 8))
    shard(decoder, ranks, "fp32", activation_checkpointing=False)
    with gathered(decoder):
        sync_gradients(decoder, True)
    assert not torch.distributed.is_initialized()
    assert type(decoder) is Decoder
print([m for m in sys.modules if m.startswith(("torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.distributed.checkpoint"))])
"""
    bare = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = {**bare, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    assert output.strip() == "[]"


def test_an_incomplete_environment_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"WORLD_SIZE=2 and RANK=''.*torchrun"), join():
        pass


def test_more_ranks_than_gpus_are_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "7"), ("LOCAL_RANK", "3")):
        environment.setenv(name, value)
    with pytest.raises(UsageError, match="rank 7 is number 3 on its machine, which has 2 GPUs"), join():
        pass
