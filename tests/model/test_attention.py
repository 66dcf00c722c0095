"""Attention over ragged batches against softmax written out per sequence, and which kernel runs where."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from f2llm.model import attention
from f2llm.model.attention import attend_flex, attend_groups, kernel_for
from f2llm.model.layout import Layout, make_layout

CPU = torch.device("cpu")
Inputs = tuple[Tensor, Tensor, Tensor]  # queries, keys, values
Given = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, int, int
]  # the same, boundaries of both, longest of both
# Below, at and above the border of the two CPU kernels and of one block, in groups and alone.
LENGTHS = [1, 1, 3, 7, 7, 63, 64, 65, 65, 128, 150]
SHORT = [5, 1, 17, 5, 2, 1]
HEADS = {"grouped-query": (4, 2, 8), "one key head": (3, 1, 6), "as many key heads as heads": (2, 2, 10)}


def naive(q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, lengths: list[int], last_only: bool) -> Tensor:
    """Per sequence, head and query: softmax over what came before. Sequences in ascending length."""
    rows, key, query = [], 0, 0
    share = q_QHD.shape[1] // k_TGD.shape[1]
    for length in sorted(lengths):
        for position in [length - 1] if last_only else range(length):
            heads = []
            for head in range(q_QHD.shape[1]):
                seen = slice(key, key + position + 1)
                scores = k_TGD[seen, head // share] @ q_QHD[query, head] / q_QHD.shape[2] ** 0.5
                weights = scores.exp() / scores.exp().sum()
                heads.append(weights @ v_TGD[seen, head // share])
            rows.append(torch.stack(heads))
            query += 1
        key += length
    return torch.stack(rows)


def leaves(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def detached(inputs: Inputs) -> Inputs:
    q, k, v = inputs
    return q.detach(), k.detach(), v.detach()


def doubled(inputs: Inputs) -> Inputs:
    q, k, v = detached(inputs)
    return q.double(), k.double(), v.double()


def draw(
    lengths: list[int], heads: str, last_only: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Inputs, Layout, Tensor]:
    """Queries, keys, values; the layout; a direction to take gradients in."""
    query_heads, key_heads, width = HEADS[heads]
    queries, tokens = len(lengths) if last_only else sum(lengths), sum(lengths)
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(queries, query_heads), (tokens, key_heads), (tokens, key_heads), (queries, query_heads)]
    q, k, v, direction = (torch.randn(*s, width, generator=generator, dtype=dtype) for s in shapes)
    return leaves(q, k, v), make_layout(lengths, CPU), direction


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.detach() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_values_and_gradients_equal_a_softmax_per_query(heads: str, last_only: bool) -> None:
    inputs, layout, direction = draw(LENGTHS, heads, last_only)
    out = attend_groups(*inputs, layout, last_only)
    expected = naive(*inputs, LENGTHS, last_only)
    assert out.shape == direction.shape
    assert distance(out, expected) < 1e-13
    got = torch.autograd.grad(out, inputs, direction)
    for ours, theirs in zip(got, torch.autograd.grad(expected, inputs, direction), strict=True):
        assert distance(ours, theirs) < 1e-12


@pytest.mark.parametrize("lengths", [[1], [64], [70, 2], [130, 130, 130]])
def test_float32_is_exact_to_rounding(lengths: list[int]) -> None:
    inputs, layout, direction = draw(lengths, "grouped-query", dtype=torch.float32)
    exact = leaves(*doubled(inputs))
    out, expected = attend_groups(*inputs, layout, False), naive(*exact, lengths, False)
    assert out.dtype == torch.float32 and distance(out, expected) < 1e-6
    got = torch.autograd.grad(out, inputs, direction)
    for ours, theirs in zip(got, torch.autograd.grad(expected, exact, direction.double()), strict=True):
        # The gradient of scores of a sequence of one token is zero, of which no relative error can be taken.
        assert float((ours - theirs).norm()) < 1e-6 * float(theirs.norm() + direction.norm())


def test_gradients_pass_gradcheck_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCKED_FROM", 4)
    monkeypatch.setattr(attention, "BLOCK", 3)
    inputs, layout, _ = draw([2, 5, 5], "one key head")
    assert torch.autograd.gradcheck(lambda q, k, v: attend_groups(q, k, v, layout, False), inputs)


def test_scores_too_large_for_exp_do_no_harm() -> None:
    inputs, layout, direction = draw([3, 100], "grouped-query")
    q, k, v = detached(inputs)
    inputs = q, k, v = leaves(1e4 * q.float(), k.float(), v.float())
    out = attend_groups(*inputs, layout, False)
    gradients = torch.autograd.grad(out, inputs, direction.float())
    assert all(bool(t.isfinite().all()) for t in (out, *gradients))
    # With such scores each query takes the value of its best key.
    best = (k[3:, 0] @ q[102, 0]).argmax()
    torch.testing.assert_close(out[102, 0], v[3 + best, 0])


@pytest.mark.parametrize("last_only", [False, True])
def test_the_batch_around_a_sequence_does_not_change_it(last_only: bool) -> None:
    (q, k, v), layout, _ = draw(LENGTHS, "grouped-query", last_only, torch.float32)
    together = attend_groups(q, k, v, layout, last_only)
    query = key = 0
    for length in LENGTHS:  # in the layout's order already
        rows = 1 if last_only else length
        alone = attend_groups(
            q[query : query + rows],
            k[key : key + length],
            v[key : key + length],
            make_layout([length], CPU),
            last_only,
        )
        assert distance(alone, together[query : query + rows]) < 1e-6
        query, key = query + rows, key + length


def test_final_queries_alone_give_the_rows_of_final_tokens() -> None:
    (q, k, v), layout, _ = draw(LENGTHS, "grouped-query")
    every = attend_groups(q, k, v, layout, False)
    finals = attend_groups(q[layout.last_N], k, v, layout, True)
    assert distance(finals, every[layout.last_N]) < 1e-13


def test_no_sequences_give_nothing() -> None:
    inputs, layout, direction = draw([], "grouped-query")
    out = attend_groups(*inputs, layout, False)
    assert out.shape == direction.shape == (0, 4, 8)
    assert [g.shape[0] for g in torch.autograd.grad(out, inputs, direction)] == [0, 0, 0]


def test_inputs_may_lie_anyhow_in_memory_and_are_left_alone() -> None:
    inputs, layout, direction = draw([7, 70], "grouped-query")
    expected = torch.autograd.grad(attend_groups(*inputs, layout, False), inputs, direction)

    def columns_first(t: Tensor) -> Tensor:
        return t.permute(2, 0, 1).contiguous().permute(1, 2, 0)

    q, k, v = detached(inputs)
    strange = leaves(columns_first(q), columns_first(k), columns_first(v))
    before = [t.detach().clone() for t in strange]
    got = torch.autograd.grad(attend_groups(*strange, layout, False), strange, columns_first(direction))
    assert not strange[0].is_contiguous()
    assert all(distance(a, b) < 1e-13 for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(strange, before, strict=True))


def test_without_gradients_and_under_checkpointing_the_numbers_are_the_same() -> None:
    inputs, layout, direction = draw([7, 7, 70], "grouped-query")
    out = attend_groups(*inputs, layout, False)
    expected = torch.autograd.grad(out, inputs, direction)
    with torch.inference_mode():
        assert torch.equal(attend_groups(*inputs, layout, False), out)
    again: Tensor = checkpoint(attend_groups, *inputs, layout, False, use_reentrant=False)
    got = torch.autograd.grad(again, inputs, direction)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_what_is_kept_grows_with_the_tokens_and_not_with_their_square() -> None:
    inputs, layout, _ = draw([512], "grouped-query", dtype=torch.float32)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = attend_groups(*inputs, layout, False)
    assert sum(kept) <= sum(t.nbytes for t in (*inputs, out))


def test_bfloat16_on_a_cpu_is_attention_too_and_the_values_say_so() -> None:
    (q, k, v), layout, direction = draw([2, 70], "grouped-query", dtype=torch.bfloat16)
    expected = naive(*doubled((q, k, v)), [2, 70], False)
    for queries, keys in ((q, k), (q.float(), k.float())):  # the second as under autocast
        out = attend_groups(queries, keys, v, layout, False)
        assert out.dtype == torch.bfloat16
        assert distance(out.double(), expected) < 1e-2
        assert torch.autograd.grad(out, q, direction)[0].dtype == torch.bfloat16


# --- GPU kernels, as far as a CPU shows them


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_flex_attention_sees_what_the_groups_see(heads: str, last_only: bool) -> None:
    inputs, layout, _ = draw(SHORT, heads, last_only)
    q, k, v = detached(inputs)  # on a CPU, FlexAttention has no backward pass
    assert distance(attend_flex(q, k, v, layout, last_only), naive(q, k, v, SHORT, last_only)) < 1e-12


class FakeGPU:
    """What `kernel_for` asks of a device."""

    type = "cuda"


@pytest.mark.parametrize(
    ("capability", "dtype", "installed", "expected"),
    [
        ((9, 0), torch.bfloat16, {"torch", "flash-attn"}, "torch"),
        ((8, 0), torch.float16, {"flash-attn"}, "flash-attn"),
        ((8, 0), torch.bfloat16, set(), "flex"),
        ((7, 5), torch.float16, {"torch", "flash-attn"}, "flex"),
        ((9, 0), torch.float32, {"torch", "flash-attn"}, "flex"),
    ],
)
def test_a_gpu_gets_the_fastest_kernel_that_it_can_run(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    installed: set[str],
    expected: str,
) -> None:
    kernels: dict[str, Any] = {"torch": object(), "flash-attn": object(), "flex": attend_flex}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    for name, finder in (("torch", "_torch_varlen"), ("flash-attn", "_flash_attn")):
        found = kernels[name] if name in installed else None
        monkeypatch.setattr(attention, finder, lambda found=found: found)
    chosen: Any = kernel_for(FakeGPU(), dtype)  # type: ignore[arg-type]
    assert chosen is kernels[expected]


def fake_varlen(
    q_QHD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
) -> Tensor:
    """What variable-length kernels compute, from the boundaries that they are given."""
    share = q_QHD.shape[1] // k_TGD.shape[1]
    out = torch.empty_like(q_QHD)
    lengths_q, lengths_k = ends_q.diff(), ends_k.diff()
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert (max_q, max_k) == (int(lengths_q.max()), int(lengths_k.max()))
    for i in range(len(lengths_q)):
        a, b = slice(int(ends_q[i]), int(ends_q[i + 1])), slice(int(ends_k[i]), int(ends_k[i + 1]))
        k, v = (t[b].repeat_interleave(share, 1) for t in (k_TGD, v_TGD))
        scores = torch.einsum("qhd,khd->hqk", q_QHD[a], k) / q_QHD.shape[2] ** 0.5
        if causal:
            scores += torch.full(scores.shape[1:], float("-inf")).triu(1)
        out[a] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("source", ["torch", "flash-attn"])
def test_variable_length_kernels_get_the_boundaries_of_sequences(
    monkeypatch: pytest.MonkeyPatch, source: str, last_only: bool
) -> None:
    finder = attention._torch_varlen if source == "torch" else attention._flash_attn
    name = "torch.nn.attention.varlen" if source == "torch" else "flash_attn"
    module = ModuleType(name)

    def varlen_attn(*given: *Given, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        assert enable_gqa
        return fake_varlen(*given, {(-1, 0): True, (-1, -1): False}[window_size])

    def flash_attn_varlen_func(*given: *Given, causal: bool) -> Tensor:
        return fake_varlen(*given, causal)

    vars(module).update(varlen_attn=varlen_attn, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, name, module)
    inputs, layout, _ = draw(SHORT, "grouped-query", last_only)
    q, k, v = detached(inputs)
    finder.cache_clear()
    try:
        kernel = finder()
        assert kernel is not None
        assert distance(kernel(q, k, v, layout, last_only), naive(q, k, v, SHORT, last_only)) < 1e-12
    finally:
        finder.cache_clear()


def test_the_installed_torch_has_the_variable_length_kernel_we_call() -> None:
    """Its signature is what a CPU can tell; a newer torch that renames an argument should fail here, not on a GPU."""
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch is older than its varlen attention")
    assert attention._torch_varlen() is not None


def test_a_kernel_that_is_not_installed_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if absent
    attention._flash_attn.cache_clear()
    try:
        assert attention._flash_attn() is None
    finally:
        attention._flash_attn.cache_clear()
