"""The decoder's elementwise steps, on a CPU as fast as memory allows: norms, rotary embedding and SwiGLU.

Between its matrix multiplications a decoder only moves memory. Written as plain formulas, every multiplication of a
norm reads and writes whole activations; here each step goes through them once, in chunks of rows that stay in the
cache of a core while all operations on them are done, and keeps its inputs alone for the backward pass, which
computes the rest again. Large tensors on CPUs in float32 and float64 take these, anything else the plain formulas.
The choice is made in one place, `runs_fused`.

Shape suffixes: T tokens, H heads, D head width, R rows (all leading dimensions of a tensor as one), W their width,
I intermediate width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = (
    1 << 16
)  # numbers of one tensor that a core works on at once: four float32 tensors fill 1 MB of its cache


def rms_norm(x: Tensor, weight_W: Tensor, eps: float) -> Tensor:
    """RMSNorm, x / sqrt(mean(x²) + eps) * weight, over the last dimension (Zhang and Sennrich 2019).

    Args:
        x: [R, ..., W], at least two dimensions.
    """
    if runs_fused(x, weight_W):
        out: Tensor = _RMSNorm.apply(x, weight_W, eps)  # type: ignore[no-untyped-call]
        return out
    return plain_rms_norm(x, weight_W, eps)


def norm_rope(x_THD: Tensor, weight_D: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, eps: float) -> Tensor:
    """The norm of each head and then the rotary embedding, in half-split form as in transformers' Qwen3 (D even)."""
    if runs_fused(x_THD, weight_D, cos_T1D, sin_T1D):
        out: Tensor = _NormRope.apply(x_THD, weight_D, cos_T1D, sin_T1D, eps)  # type: ignore[no-untyped-call]
        return out
    return plain_norm_rope(x_THD, weight_D, cos_T1D, sin_T1D, eps)


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    if runs_fused(gate_TI, up_TI):
        out: Tensor = _SwiGLU.apply(gate_TI, up_TI)  # type: ignore[no-untyped-call]
        return out
    return plain_swiglu(gate_TI, up_TI)


def runs_fused(x: Tensor, *others: Tensor) -> bool:
    """Whether these go through the chunked functions: all on a CPU, all float32 or all float64, x of many rows.

    What fits into one chunk stays in the cache by itself, and plain formulas have less to set up.
    """
    return (
        x.numel() > CHUNK
        and x.dtype in (torch.float32, torch.float64)
        and all(t.device.type == "cpu" and t.dtype == x.dtype for t in (x, *others))
    )


# --- plain formulas


def plain_rms_norm(x: Tensor, weight_W: Tensor, eps: float) -> Tensor:
    """`rms_norm` on any device, in any dtype."""
    return F.rms_norm(x, weight_W.shape, weight_W, eps)


def plain_norm_rope(x_THD: Tensor, weight_D: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, eps: float) -> Tensor:
    """`norm_rope` on any device, in any dtype."""
    normed_THD = plain_rms_norm(x_THD, weight_D, eps)
    first, second = normed_THD.chunk(2, dim=-1)
    return normed_THD * cos_T1D + torch.cat((-second, first), dim=-1) * sin_T1D


def plain_swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """`swiglu` on any device, in any dtype."""
    return F.silu(gate_TI) * up_TI


# --- the same in chunks


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all tensors (rows along their first dimension), a chunk at a time."""
    a_row = tensors[0].numel() // max(1, len(tensors[0]))
    rows = max(1, CHUNK * torch.get_num_threads() // max(1, a_row))
    return zip(*(t.split(rows) for t in tensors), strict=True)


def _inverse_rms(x: Tensor, eps: float, out: Tensor) -> None:
    """Write 1 / sqrt(mean(x²) + eps) over the last dimension, which stays as 1, to `out`."""
    torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=out)  # several times as fast as square().sum()
    out.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _turn(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, out_THD: Tensor) -> None:
    """Write x * cos + (-second half, first half of x) * sin to `out_THD`."""
    torch.mul(x_THD, cos_T1D, out=out_THD)
    half = x_THD.shape[-1] // 2
    out_THD[..., :half].addcmul_(x_THD[..., half:], sin_T1D[..., :half], value=-1)
    out_THD[..., half:].addcmul_(x_THD[..., :half], sin_T1D[..., half:])


def _norm_backward(
    grad: Tensor, x: Tensor, inverse: Tensor, weight_W: Tensor, out: Tensor, grad_weight_W: Tensor | None
) -> None:
    """Write the gradient of a norm's input x to `out`, which may be `grad` itself; add to that of its weight.

    With r = 1 / rms(x) and `grad` g that of x * r * weight, row by row:
    dx = r * (g * weight - x * r * mean(g * x * r * weight)), and dweight = sum over rows of g * x * r.
    """
    product_RW = (grad * x).mul_(inverse).reshape(-1, len(weight_W))
    if grad_weight_W is not None:
        grad_weight_W.add_(product_RW.sum(0))
    shrink = torch.mv(product_RW, weight_W).view(inverse.shape).mul_(inverse).div_(len(weight_W))
    torch.mul(grad, weight_W, out=out).addcmul_(x, shrink, value=-1).mul_(inverse)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_W: Tensor, eps: float) -> Tensor:
        inverse, out = x.new_empty(*x.shape[:-1], 1), torch.empty_like(x)
        for x_, inverse_, out_ in _chunks(x, inverse, out):
            _inverse_rms(x_, eps, inverse_)
            torch.mul(x_, weight_W, out=out_).mul_(inverse_)
        ctx.save_for_backward(x, weight_W, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_W, inverse = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight_W = torch.zeros_like(weight_W) if ctx.needs_input_grad[1] else None
        for grad_, x_, inverse_, out_ in _chunks(grad, x, inverse, grad_x):
            _norm_backward(grad_, x_, inverse_, weight_W, out_, grad_weight_W)
        return grad_x, grad_weight_W, None


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_THD: Tensor, weight_D: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, eps: float
    ) -> Tensor:
        inverse_TH1, out_THD = x_THD.new_empty(*x_THD.shape[:-1], 1), torch.empty_like(x_THD)
        # The norm's weight goes into the tables, each entry to where its number is turned to.
        weighted = cos_T1D * weight_D, sin_T1D * weight_D.roll(len(weight_D) // 2)
        for x_, cos_, sin_, inverse_, out_ in _chunks(x_THD, *weighted, inverse_TH1, out_THD):
            _inverse_rms(x_, eps, inverse_)
            _turn(x_, cos_, sin_, out_)
            out_.mul_(inverse_)
        ctx.save_for_backward(x_THD, weight_D, cos_T1D, sin_T1D, inverse_TH1)
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        x_THD, weight_D, cos_T1D, sin_T1D, inverse_TH1 = ctx.saved_tensors
        grad_x_THD = torch.empty_like(x_THD)
        grad_weight_D = torch.zeros_like(weight_D) if ctx.needs_input_grad[1] else None
        back_T1D = -sin_T1D.roll(sin_T1D.shape[-1] // 2, dims=-1)  # the transposed rotation
        rows = _chunks(grad_THD, x_THD, cos_T1D, back_T1D, inverse_TH1, grad_x_THD)
        for grad_, x_, cos_, sin_, inverse_, out_ in rows:
            _turn(grad_, cos_, sin_, out_)
            _norm_backward(out_, x_, inverse_, weight_D, out_, grad_weight_D)
        return grad_x_THD, grad_weight_D, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        out_TI = torch.empty_like(gate_TI)
        for gate_, up_, out_ in _chunks(gate_TI, up_TI, out_TI):
            torch.ops.aten.silu.out(gate_, out=out_).mul_(up_)
        ctx.save_for_backward(gate_TI, up_TI)
        return out_TI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TI: Tensor) -> tuple[Tensor, Tensor]:
        gate_TI, up_TI = ctx.saved_tensors
        grad_gate_TI, grad_up_TI = torch.empty_like(gate_TI), torch.empty_like(up_TI)
        for grad_, gate_, up_, to_gate_, to_up_ in _chunks(grad_TI, gate_TI, up_TI, grad_gate_TI, grad_up_TI):
            torch.ops.aten.silu.out(gate_, out=to_up_).mul_(grad_)
            torch.mul(grad_, up_, out=to_gate_)
            torch.ops.aten.silu_backward.grad_input(to_gate_, gate_, grad_input=to_gate_)
        return grad_gate_TI, grad_up_TI
