"""The chunked elementwise functions against formulas written out, and what they keep for the backward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from f2llm.model import fused
from f2llm.model.fused import norm_rope, plain_norm_rope, plain_rms_norm, plain_swiglu, rms_norm, swiglu

EPS = 1e-6
Function = Callable[..., Tensor]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps) ** -0.5 * weight


def naive_norm_rope(x_THD: Tensor, weight_D: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, eps: float) -> Tensor:
    """The rotation as a matrix per token."""
    half = len(weight_D) // 2
    swap_DD = torch.zeros(2 * half, 2 * half, dtype=x_THD.dtype)
    for i in range(half):
        swap_DD[i, half + i], swap_DD[half + i, i] = -1, 1
    turn_TDD = torch.diag_embed(cos_T1D[:, 0]) + torch.diag_embed(sin_T1D[:, 0]) @ swap_DD
    return torch.einsum("tde,the->thd", turn_TDD, naive_rms_norm(x_THD, weight_D, eps))


def naive_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def norm_inputs(rows: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    return [random(rows, 6, dtype=dtype), 1 + 0.3 * random(6, seed=1, dtype=dtype), EPS]


def rope_inputs(rows: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    # Tables whose halves differ, as no rope has them: a wrong half would show.
    tables = [random(rows, 1, 6, seed=seed, dtype=dtype) for seed in (2, 3)]
    return [random(rows, 3, 6, dtype=dtype), 1 + 0.3 * random(6, seed=1, dtype=dtype), *tables, EPS]


def glu_inputs(rows: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    return [3 * random(rows, 7, dtype=dtype), random(rows, 7, seed=1, dtype=dtype)]


# name: (function, the formula written out, the formula in torch's functions, inputs)
CASES: dict[str, tuple[Function, Function, Function, Callable[..., list[Any]]]] = {
    "rms_norm": (rms_norm, naive_rms_norm, plain_rms_norm, norm_inputs),
    "norm_rope": (norm_rope, naive_norm_rope, plain_norm_rope, rope_inputs),
    "swiglu": (swiglu, naive_swiglu, plain_swiglu, glu_inputs),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Function, Function, Function, Callable[..., list[Any]]]:
    return CASES[request.param]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 1 to 4 rows of these inputs instead of hundreds, so that few rows are many chunks."""
    monkeypatch.setattr(fused, "CHUNK", 24 // torch.get_num_threads())


def gradients(function: Function, inputs: list[Any], direction: Tensor) -> list[Tensor]:
    """The value, and the gradients with respect to the first two inputs."""
    first, second, *rest = inputs
    first, second = first.detach().requires_grad_(), second.detach().requires_grad_()
    value = function(first, second, *rest)
    return [value.detach(), *torch.autograd.grad(value, (first, second), direction)]


def far(got: Tensor, expected: Tensor) -> float:
    """Relative distance of two tensors."""
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-300))


@pytest.mark.parametrize("rows", [4, 5, 6, 7, 8, 9, 12, 13])
def test_values_and_gradients_equal_the_formula(case: Any, rows: int) -> None:
    function, naive, plain, inputs = case
    direction = random(*inputs(rows)[0].shape, seed=9)
    expected = gradients(naive, inputs(rows), direction)
    for got in (
        gradients(function, inputs(rows), direction),
        gradients(plain, inputs(rows), direction),
    ):
        assert [far(g, e) < 1e-13 for g, e in zip(got, expected, strict=True)] == [True] * 3


def test_float32_is_as_exact_as_the_plain_formula(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CHUNK", 1000)
    function, naive, plain, inputs = case
    rows = 3000
    direction = random(*inputs(rows)[0].shape, seed=9)
    single = [x.float() if isinstance(x, Tensor) else x for x in inputs(rows)]
    exact = [x.double() if isinstance(x, Tensor) else x for x in single]
    expected = gradients(naive, exact, direction.float().double())
    got = gradients(function, single, direction.float())
    assert all(g.dtype == torch.float32 for g in got)
    for ours, formula, truth in zip(got, gradients(plain, single, direction.float()), expected, strict=True):
        assert far(ours, truth) < max(5e-7, 2 * far(formula, truth))


def test_gradients_pass_gradcheck(case: Any) -> None:
    function, _, _, inputs = case
    first, second, *rest = inputs(5)
    assert torch.autograd.gradcheck(
        lambda a, b: function(a, b, *rest), (first.requires_grad_(), second.requires_grad_())
    )


def test_no_rows_give_no_rows_and_zero_gradients(case: Any) -> None:
    function, _, _, inputs = case
    value, first, second = gradients(function, inputs(0), inputs(0)[0])
    assert value.shape == first.shape == inputs(0)[0].shape
    assert float(second.abs().sum()) == 0.0


def test_inputs_and_gradients_may_lie_anyhow_in_memory(case: Any) -> None:
    function, naive, _, inputs = case
    first, second, *rest = inputs(7)
    wide = torch.cat((first, first), dim=-1)[..., : first.shape[-1]]  # rows with gaps
    turned = first.transpose(0, -1).contiguous().transpose(0, -1)  # columns first
    assert not wide.is_contiguous() and not turned.is_contiguous()
    direction = torch.ones(1, dtype=torch.float64).expand(first.shape)
    expected = gradients(naive, [first, second, *rest], direction)
    for strange in (wide, turned):
        got = gradients(function, [strange, second, *rest], direction)
        assert max(far(g, e) for g, e in zip(got, expected, strict=True)) < 1e-13


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_gradients_of_some_inputs_alone(case: Any, wanted: tuple[bool, bool]) -> None:
    function, naive, _, inputs = case
    first, second, *rest = inputs(7)
    first.requires_grad_(wanted[0])
    second.requires_grad_(wanted[1])
    direction = random(*first.shape, seed=9)
    function(first, second, *rest).backward(direction)
    _, *expected = gradients(naive, [first, second, *rest], direction)
    for tensor, gradient, asked in zip((first, second), expected, wanted, strict=True):
        assert tensor.grad is None if not asked else far(tensor.grad, gradient) < 1e-13


def test_a_frozen_weight_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    real = fused._norm_backward

    def record(*given: Any) -> None:
        sums.append(given[-1])
        real(*given)

    monkeypatch.setattr(fused, "_norm_backward", record)
    x, weight, eps = norm_inputs(7)
    rms_norm(x.requires_grad_(), weight, eps).sum().backward()
    assert sums == [None, None]  # one per chunk


def test_without_gradients_the_values_are_the_same_and_no_graph_is_kept(case: Any) -> None:
    function, _, _, inputs = case
    first, second, *rest = inputs(7)
    with_graph = function(first.requires_grad_(), second, *rest).detach()
    with torch.no_grad():
        without_graph = function(first, second, *rest)
    with torch.inference_mode():
        inferred = function(first, second, *rest)
    assert torch.equal(with_graph, without_graph) and torch.equal(with_graph, inferred)
    assert without_graph.grad_fn is None and not inferred.requires_grad


def test_inputs_are_left_alone(case: Any) -> None:
    function, _, _, inputs = case
    given = inputs(7)
    direction = random(*given[0].shape, seed=9)
    copies = [x.clone() if isinstance(x, Tensor) else x for x in (*given, direction)]
    gradients(function, given, direction)
    for now, before in zip((*given, direction), copies, strict=True):
        assert torch.equal(now, before) if isinstance(now, Tensor) else now == before


def test_backward_twice_through_one_graph_and_under_checkpointing(case: Any) -> None:
    function, _, _, inputs = case
    first, second, *rest = inputs(7)
    leaves = (first.requires_grad_(), second.requires_grad_())
    direction = random(*first.shape, seed=9)
    value = function(first, second, *rest)
    once = torch.autograd.grad(value, leaves, direction, retain_graph=True)
    again = torch.autograd.grad(value, leaves, direction)
    through = checkpoint(function, first, second, *rest, use_reentrant=False)
    recomputed = torch.autograd.grad(through, leaves, direction)
    for a, b, c in zip(once, again, recomputed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_second_derivative_is_refused(case: Any) -> None:
    function, _, _, inputs = case
    first, second, *rest = inputs(7)
    first.requires_grad_()
    (gradient,) = torch.autograd.grad(function(first, second, *rest).square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_plain_formula(case: Any, dtype: torch.dtype) -> None:
    function, _, plain, inputs = case
    given = inputs(7, dtype)
    assert not fused.runs_fused(given[0], given[1])
    assert torch.equal(function(*given), plain(*given))


def test_mixed_dtypes_other_devices_and_few_rows_are_not_fused() -> None:
    x = torch.ones(8, 4)
    assert fused.runs_fused(x, x)
    assert not fused.runs_fused(x, x.double())
    assert not fused.runs_fused(x, x.to("meta"))
    few = x[: fused.CHUNK // 4]
    assert not fused.runs_fused(few, few)


def bytes_kept(function: Function, inputs: list[Any]) -> int:
    """What autograd keeps for the backward pass, beyond nothing: every storage once, inputs included."""
    first, second, *rest = inputs
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = function(first.requires_grad_(), second.requires_grad_(), *rest)
    assert value.requires_grad
    return sum(kept.values())


def test_little_more_than_the_inputs_is_kept_for_the_backward_pass(case: Any) -> None:
    function, _, plain, inputs = case
    given = inputs(512, torch.float32)
    input_bytes = sum(x.nbytes for x in given if isinstance(x, Tensor))
    ours = bytes_kept(function, given)
    assert ours <= input_bytes + given[0].nbytes // 6  # the inverse root-mean-squares, one in 6 numbers here
    assert ours < 0.8 * bytes_kept(plain, given)


def test_silu_of_large_numbers_stays_finite() -> None:
    gate = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4]]).repeat(8, 1).requires_grad_()
    swiglu(gate, torch.ones_like(gate)).sum().backward()
    assert gate.grad is not None
    assert gate.grad.tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0]] * 8
    assert torch.equal(swiglu(gate, torch.ones_like(gate)), F.silu(gate))
