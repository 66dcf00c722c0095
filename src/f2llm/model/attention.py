"""Causal grouped-query attention inside each sequence of a ragged batch: one kernel per kind of machine.

`attend_groups` is the decoder's only way to attention. On a CPU, groups of short sequences go through torch's flash
attention; from `BLOCKED_FROM` tokens on, matrix multiplications over blocks of queries are faster, each block against
the keys up to its own end, so that little of what the causal mask forbids is computed. On a GPU it is variable-length
flash attention where the device and the dtype allow, otherwise FlexAttention.

Shape suffixes: T tokens of all sequences, Q queries (T of them, or N if only final tokens ask), N sequences, C
sequences of a group, L their length, H query heads, G key/value heads, D head width; inside a block, M rows of one
key/value head (its query heads times the block's queries) and S keys; P tokens of a prefix.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from f2llm.model.layout import Layout

BLOCKED_FROM = 128  # tokens of a sequence; below, torch's flash attention is as fast or faster
BLOCK = 128  # queries

Kernel = Callable[[Tensor, Tensor, Tensor, Layout, bool], Tensor]
KeysValues = tuple[Tensor, Tensor]  # [P, G, D] each, of a prefix of P tokens


def attend_groups(q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: Layout, last_only: bool) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v, each query over the tokens of its sequence up to its own (Vaswani et al. 2017).

    Args:
        q_QHD: queries of all tokens in the layout's order, or with `last_only` those of the final tokens alone.
        k_TGD, v_TGD: keys and values; H is a multiple of G, and consecutive query heads share one.

    Returns:
        [Q, H, D] in the values' dtype, which is the one of the arithmetic: under autocast, norms leave queries and
        keys in float32.
    """
    kernel = kernel_for(v_TGD.device, v_TGD.dtype)
    return kernel(q_QHD.to(v_TGD.dtype), k_TGD.to(v_TGD.dtype), v_TGD, layout, last_only)


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The one place where a kernel is chosen."""
    if device.type == "cpu":
        return _on_cpu
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if ampere and dtype in (torch.float16, torch.bfloat16):
        return _torch_varlen() or _flash_attn() or attend_flex
    return attend_flex


@torch.no_grad()
def attend_behind(
    prefix: KeysValues, q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: Layout, last_only: bool
) -> Tensor:
    """`attend_groups` for sequences that all stand behind one prefix, on a CPU and without gradient.

    Every query sees the whole prefix, so that is one attention for all of them, and one inside each sequence as ever.
    The two softmaxes become one by the logarithms of their sums: with shares e^a and e^b the prefix has a part of
    e^a / (e^a + e^b) = sigmoid(a - b).
    """
    own_QHD = torch.empty_like(q_QHD)
    sums = []
    for q, k, v, out in _groups(layout, last_only, (q_QHD, own_QHD), (k_TGD, v_TGD)):
        mixed, log_sum_CHL = _flash(*_heads_first(q, k, v), causal=not last_only)
        out.copy_(mixed.transpose(1, 2))
        sums.append(log_sum_CHL.transpose(1, 2).flatten(0, 1))
    before_1HQD, log_sum_1HQ = _flash(
        *_heads_first(*(t.unsqueeze(0) for t in (q_QHD, *prefix))), causal=False
    )
    part_QH1 = torch.sigmoid(log_sum_1HQ[0].T - torch.cat(sums)).unsqueeze(-1)
    return own_QHD.lerp_(before_1HQD[0].transpose(0, 1), part_QH1)


# --- CPU


def _flash(q_CHLD: Tensor, k_CGLD: Tensor, v_CGLD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """What is mixed, [C, H, L, D], and the logarithms of the softmax's sums, [C, H, L]."""
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_CHLD, k_CGLD, v_CGLD, is_causal=causal
    )
    return found


def _on_cpu(q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: Layout, last_only: bool) -> Tensor:
    out: Tensor = _GroupAttention.apply(  # type: ignore[no-untyped-call]
        q_QHD.contiguous(), k_TGD.contiguous(), v_TGD.contiguous(), layout, last_only
    )
    return out


class _GroupAttention(torch.autograd.Function):
    """All groups in one function: one output and one gradient per input, into which every group writes its part.

    Nothing of the size of the attention matrix is kept: the backward pass computes the probabilities again.
    """

    @staticmethod
    def forward(
        ctx: Any, q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: Layout, last_only: bool
    ) -> Tensor:
        out_QHD = torch.empty_like(q_QHD)
        sums: list[Tensor] = []  # logarithms of the softmax's sums, of the groups that flash attention does
        for q, k, v, out in _groups(layout, last_only, (q_QHD, out_QHD), (k_TGD, v_TGD)):
            if _blocked(q):
                for sequence in zip(q, k, v, out, strict=True):
                    _blocks_forward(*sequence)
            else:
                mixed, log_sum = _flash(*_heads_first(q, k, v), causal=not last_only)
                out.copy_(mixed.transpose(1, 2))
                sums.append(log_sum)
        ctx.save_for_backward(q_QHD, k_TGD, v_TGD, out_QHD, *sums)
        ctx.layout, ctx.last_only = layout, last_only
        return out_QHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QHD: Tensor) -> tuple[Tensor | None, ...]:
        q_QHD, k_TGD, v_TGD, out_QHD, *sums = ctx.saved_tensors
        grads = tuple(torch.empty_like(t) for t in (q_QHD, k_TGD, v_TGD))
        flash_sums = iter(sums)
        parts = _groups(
            ctx.layout, ctx.last_only, (q_QHD, out_QHD, grad_QHD, grads[0]), (k_TGD, v_TGD, *grads[1:])
        )
        for q, k, v, out, grad, *to in parts:
            if _blocked(q):
                for sequence in zip(q, k, v, grad, *to, strict=True):
                    _blocks_backward(*sequence)
            else:
                results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *_heads_first(grad, q, k, v, out), next(flash_sums), 0.0, not ctx.last_only
                )
                for target, result in zip(to, results, strict=True):
                    target.copy_(result.transpose(1, 2))
        return *grads, None, None


def _groups(
    layout: Layout, last_only: bool, of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, ...]]:
    """Views of each group, [C, L, heads, D] (one query long if `last_only`): q, k, v, then the rest of both lists."""
    query = key = 0
    for count, length in layout.groups:
        queries, keys = count * (1 if last_only else length), count * length
        q, *more_q = (t[query : query + queries].unflatten(0, (count, -1)) for t in of_queries)
        k, v, *more_k = (t[key : key + keys].unflatten(0, (count, -1)) for t in of_keys)
        yield q, k, v, *more_q, *more_k
        query, key = query + queries, key + keys


def _blocked(q_CLHD: Tensor) -> bool:
    return q_CLHD.shape[1] >= BLOCKED_FROM and q_CLHD.dtype in (torch.float32, torch.float64)


def _heads_first(*tensors_CLHD: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors_CLHD)


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def _by_key_head(x_LHD: Tensor, heads: int) -> Tensor:
    """[G, M, D], contiguous: the rows of all query heads that share a key/value head, one head after another."""
    return x_LHD.unflatten(1, (heads, -1)).permute(1, 2, 0, 3).reshape(heads, -1, x_LHD.shape[-1])


def _to_query_heads(x_GMD: Tensor, out_LHD: Tensor) -> None:
    """The way back from `_by_key_head`, written to `out_LHD`."""
    heads, _, width = x_GMD.shape
    out_LHD.unflatten(1, (heads, -1)).copy_(x_GMD.view(heads, -1, len(out_LHD), width).permute(2, 0, 1, 3))


def _probabilities(q_GMD: Tensor, k_GSD: Tensor, queries: int) -> Tensor:
    """[G, M, S]: what the last `queries` of S tokens attend to."""
    heads, rows, width = q_GMD.shape
    keys = k_GSD.shape[1]
    p_GMS = q_GMD.new_empty(heads, rows, keys)
    torch.baddbmm(p_GMS, q_GMD, k_GSD.transpose(1, 2), beta=0, alpha=width**-0.5, out=p_GMS)
    p_GMS.view(-1, queries, keys)[:, :, keys - queries :].add_(_future(queries, p_GMS.dtype))
    return torch.softmax(p_GMS, -1, out=p_GMS)


@lru_cache(maxsize=2 * BLOCK)
def _future(queries: int, dtype: torch.dtype) -> Tensor:
    """What to add to the scores of a block against itself: minus infinity where the key comes after the query."""
    return torch.full((queries, queries), float("-inf"), dtype=dtype).triu_(1)


def _blocks_forward(q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, out_LHD: Tensor) -> None:
    """The attention of one sequence, written to `out_LHD`."""
    k_GLD, v_GLD = k_LGD.transpose(0, 1), v_LGD.transpose(0, 1)
    for block in _blocks(len(q_LHD)):
        q_GMD = _by_key_head(q_LHD[block], len(k_GLD))
        p_GMS = _probabilities(q_GMD, k_GLD[:, : block.stop], block.stop - block.start)
        _to_query_heads(torch.bmm(p_GMS, v_GLD[:, : block.stop]), out_LHD[block])


def _blocks_backward(
    q_LHD: Tensor,
    k_LGD: Tensor,
    v_LGD: Tensor,
    grad_LHD: Tensor,
    grad_q_LHD: Tensor,
    grad_k_LGD: Tensor,
    grad_v_LGD: Tensor,
) -> None:
    """The gradients of one sequence, written to the last three."""
    k_GLD, v_GLD = k_LGD.transpose(0, 1), v_LGD.transpose(0, 1)
    # Sums over blocks are taken in contiguous memory: baddbmm_ on a view is done head by head.
    grad_k_GLD, grad_v_GLD = k_LGD.new_zeros(2, *k_GLD.shape)
    scale = q_LHD.shape[-1] ** -0.5
    for block in _blocks(len(q_LHD)):
        k_GSD, v_GSD = k_GLD[:, : block.stop], v_GLD[:, : block.stop]
        q_GMD, grad_GMD = (_by_key_head(t[block], len(k_GLD)) for t in (q_LHD, grad_LHD))
        p_GMS = _probabilities(q_GMD, k_GSD, block.stop - block.start)
        grad_v_GLD[:, : block.stop] += torch.bmm(p_GMS.transpose(1, 2), grad_GMD)
        grad_p_GMS = torch.bmm(grad_GMD, v_GSD.transpose(1, 2))
        grad_s_GMS = torch.ops.aten._softmax_backward_data.out(
            grad_p_GMS, p_GMS, -1, p_GMS.dtype, grad_input=grad_p_GMS
        )
        grad_k_GLD[:, : block.stop] += torch.bmm(grad_s_GMS.transpose(1, 2), q_GMD)
        grad_q_GMD = torch.baddbmm(q_GMD, grad_s_GMS, k_GSD, beta=0, alpha=scale)
        _to_query_heads(grad_q_GMD, grad_q_LHD[block])
    grad_k_LGD.copy_(grad_k_GLD.mul_(scale).transpose(0, 1))
    grad_v_LGD.copy_(grad_v_GLD.transpose(0, 1))


# --- GPU


@lru_cache(maxsize=1)
def _boundaries(layout: Layout) -> tuple[Tensor, Tensor]:
    """int32 [N + 1] each: where sequences begin and end among their tokens, and among their final tokens."""
    ends_N = layout.last_N + 1
    tokens = torch.cat((ends_N.new_zeros(1), ends_N)).to(torch.int32)
    return tokens, torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)


def _queries(layout: Layout, last_only: bool) -> tuple[Tensor, int]:
    """The queries' boundaries, and how many one sequence has at most."""
    tokens, finals = _boundaries(layout)
    return (finals, 1) if last_only else (tokens, layout.longest)


@cache
def _torch_varlen() -> Kernel | None:
    """Variable-length flash attention of torch, if this version has it with windows and grouped queries."""
    try:
        varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def attend(q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: Layout, last_only: bool) -> Tensor:
        boundaries, longest = _queries(layout, last_only)
        out: Tensor = varlen_attn(
            q_QHD,
            k_TGD,
            v_TGD,
            boundaries,
            _boundaries(layout)[0],
            longest,
            layout.longest,
            window_size=(-1, -1) if last_only else (-1, 0),
            enable_gqa=q_QHD.shape[1] != k_TGD.shape[1],
        )
        return out

    return attend


@cache
def _flash_attn() -> Kernel | None:
    """The same from the flash-attn package, if it is installed."""
    try:
        flash_attn_varlen_func = import_module("flash_attn").flash_attn_varlen_func
    except ImportError:
        return None

    def attend(q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: Layout, last_only: bool) -> Tensor:
        boundaries, longest = _queries(layout, last_only)
        out: Tensor = flash_attn_varlen_func(
            q_QHD,
            k_TGD,
            v_TGD,
            boundaries,
            _boundaries(layout)[0],
            longest,
            layout.longest,
            causal=not last_only,
        )
        return out

    return attend


def attend_flex(q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: Layout, last_only: bool) -> Tensor:
    """`attend_groups` by FlexAttention, compiled on GPUs: any dtype, and GPUs too old for flash attention."""
    q_1HQD, k_1GTD, v_1GTD = (t.transpose(0, 1).unsqueeze(0) for t in (q_QHD, k_TGD, v_TGD))
    attend: Any = _compiled_flex() if q_QHD.is_cuda else flex_attention
    out_1HQD: Tensor = attend(
        q_1HQD,
        k_1GTD,
        v_1GTD,
        block_mask=_document_mask(layout, last_only),
        enable_gqa=q_QHD.shape[1] != k_TGD.shape[1],
    )
    return out_1HQD.squeeze(0).transpose(0, 1)


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=2)
def _document_mask(layout: Layout, last_only: bool) -> BlockMask:
    """Which keys a query sees: those of its own sequence, up to itself. Made once per batch, not per layer."""
    positions_T = layout.positions_T
    tokens_T = torch.arange(len(positions_T), device=positions_T.device)
    first_T = tokens_T - positions_T  # of each token's sequence, which tells sequences apart
    asking_Q = layout.last_N if last_only else tokens_T

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        token = asking_Q[query]
        return (first_T[token] == first_T[key]) & (token >= key)

    return create_block_mask(
        visible, None, None, len(asking_Q), len(tokens_T), device=str(positions_T.device)
    )
