"""What numba has no words for: Intel's tile instructions (AMX), and operations on sixteen float32 numbers at once.

A function here is a few LLVM instructions and takes addresses in memory as integers; nothing is checked. Numbers are
split into two bfloat16 halves, the high one nearest to the number and the low one nearest to the rest, which together
have 16 of float32's 24 bits.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16

# The layout of all eight tiles: palette 1, then bytes of a row (16 bits each), then rows (8 bits each).
CONFIGURATION = np.zeros(64, np.uint8)
CONFIGURATION[0] = 1
CONFIGURATION[16:32].view(np.uint16)[:] = 64
CONFIGURATION[48:56] = 16

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_F32S, _I32S, _I16S, _I8S = (ir.VectorType(kind, LANES) for kind in (_F32, _I32, _I16, _I8))


# --- Tiles, which are numbered and hold 16 rows of 64 bytes


def _call(builder: Any, name: str, *arguments: Any, returns: Any = None) -> Any:
    kind = ir.FunctionType(returns or ir.VoidType(), [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _bytes(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I8.as_pointer())


def _tile(number: types.IntegerLiteral) -> Any:
    return ir.Constant(_I8, number.literal_value)


def _nothing(*kinds: Any, emit: Callable[[Any, Any], None]) -> Any:
    """Signature and code of an instruction that returns nothing."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        emit(builder, arguments)
        return context.get_dummy_value()

    return types.void(*kinds), generate


@intrinsic  # type: ignore[untyped-decorator]
def configure(_typing: Any, address: Any) -> Any:
    """Set the layout of this thread's tiles."""
    return _nothing(types.intp, emit=lambda b, a: _call(b, "llvm.x86.ldtilecfg", _bytes(b, a[0])))


@intrinsic  # type: ignore[untyped-decorator]
def release(_typing: Any) -> Any:
    """Give the tiles of this thread back, so that the system need not keep them."""
    return _nothing(emit=lambda b, a: _call(b, "llvm.x86.tilerelease"))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def zero(_typing: Any, tile: Any) -> Any:
    return _nothing(tile, emit=lambda b, a: _call(b, "llvm.x86.tilezero", _tile(tile)))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def load(_typing: Any, tile: Any, address: Any, stride: Any) -> Any:
    return _nothing(
        tile,
        types.intp,
        types.intp,
        emit=lambda b, a: _call(b, "llvm.x86.tileloadd64", _tile(tile), _bytes(b, a[1]), a[2]),
    )


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def store(_typing: Any, tile: Any, address: Any, stride: Any) -> Any:
    return _nothing(
        tile,
        types.intp,
        types.intp,
        emit=lambda b, a: _call(b, "llvm.x86.tilestored64", _tile(tile), _bytes(b, a[1]), a[2]),
    )


@intrinsic  # type: ignore[untyped-decorator]
def fetch(_typing: Any, address: Any) -> Any:
    """Ask for 64 bytes that will be needed soon, in the second cache."""

    def emit(b: Any, a: Any) -> None:
        how = [ir.Constant(_I32, number) for number in (0, 2, 1)]  # to read, keep in the second cache, data
        _call(b, "llvm.prefetch.p0", _bytes(b, a[0]), *how)

    return _nothing(types.intp, emit=emit)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_product(_typing: Any, total: Any, left: Any, right: Any) -> Any:
    """Tile `total` (float32) += left (bfloat16, 16 x 32) times right (bfloat16, pairs of its 32 rows side by side)."""
    tiles = (total, left, right)
    return _nothing(*tiles, emit=lambda b, a: _call(b, "llvm.x86.tdpbf16ps", *map(_tile, tiles)))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_product_of_bytes(_typing: Any, total: Any, left: Any, right: Any) -> Any:
    """Tile `total` (int32) += left (int8, 16 x 64) times right (int8, fours of its 64 rows side by side)."""
    tiles = (total, left, right)
    return _nothing(*tiles, emit=lambda b, a: _call(b, "llvm.x86.tdpbssd", *map(_tile, tiles)))


# --- Members of a team


@intrinsic  # type: ignore[untyped-decorator]
def arrive(_typing: Any, address: Any) -> Any:
    """Count one more member."""

    def emit(b: Any, a: Any) -> None:
        counter = b.inttoptr(a[0], _I64.as_pointer())
        b.atomic_rmw("add", counter, ir.Constant(_I64, 1), "acq_rel")

    return _nothing(types.intp, emit=emit)


@intrinsic  # type: ignore[untyped-decorator]
def glance(_typing: Any, address: Any) -> Any:
    """How many members have arrived."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        counter = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.load_atomic(counter, "acquire", 8)

    return types.int64(types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def pause(_typing: Any) -> Any:
    """Let another thread of this core go first."""
    return _nothing(emit=lambda b, _: _call(b, "llvm.x86.sse2.pause"))


# --- Sixteen numbers


def _number(value: float) -> Any:
    return ir.Constant(_F32, float(np.float32(value)))


def _all(value: Any) -> Any:
    """A constant, sixteen times."""
    kind = _F32S if isinstance(value, float) else _I32S
    return ir.Constant(kind, [_number(value) if isinstance(value, float) else value] * LANES)


def _spread(builder: Any, value: Any) -> Any:
    """A value, sixteen times."""
    kind = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_I32S, [0] * LANES))


def _read(builder: Any, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, _F32S.as_pointer()), align=4)


def _write(builder: Any, value: Any, address: Any) -> None:
    align = {_I16S: 2, _I8S: 1}.get(value.type, 4)
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def _high(builder: Any, x: Any) -> Any:
    """The bfloat16 nearest to each number (of two, the even one), in the upper halves of 32 bits."""
    bits = builder.bitcast(x, _I32S)
    odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
    return builder.and_(builder.add(builder.add(bits, _all(0x7FFF)), odd), _all(0xFFFF0000))


def _halves(builder: Any, x: Any) -> tuple[Any, Any]:
    high = _high(builder, x)
    return high, _high(builder, builder.fsub(x, builder.bitcast(high, _F32S)))


def _write_halves(builder: Any, x: Any, to_high: Any, to_low: Any) -> None:
    for half, address in zip(_halves(builder, x), (to_high, to_low), strict=True):
        _write(builder, builder.trunc(builder.lshr(half, _all(16)), _I16S), address)


def _power_of_two(builder: Any, x: Any) -> Any:
    """2^x to 2 in 10^7: the whole part goes into the exponent, the rest by its series; NaN stays NaN."""
    whole = _call(builder, "llvm.rint.v16f32", x, returns=_F32S)
    rest = builder.fsub(x, whole)
    total = _all(0.00015403530393381608)
    for term in (
        0.0013333558146428443,
        0.009618129107628477,
        0.05550410866482158,
        0.2402265069591007,
        0.6931471805599453,
        1.0,
    ):
        total = _call(builder, "llvm.fma.v16f32", total, rest, _all(term), returns=_F32S)
    everywhere, as_set = (
        ir.Constant(_I16, -1),
        ir.Constant(_I32, 4),
    )  # all lanes, the thread's way of rounding
    name = "llvm.x86.avx512.mask.scalef.ps.512"
    return _call(builder, name, total, whole, total, everywhere, as_set, returns=_F32S)


def _largest(*, absolute: bool) -> Any:
    """Signature and code of the largest of so many numbers at an address; NaN is passed over."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x, count = arguments
        lanes = ir.Constant(count.type, LANES)
        most = cgutils.alloca_once_value(builder, _all(0.0 if absolute else -math.inf))
        rounds = builder.sdiv(builder.add(count, ir.Constant(count.type, LANES - 1)), lanes)
        with cgutils.for_range(builder, rounds) as loop:
            done = builder.mul(loop.index, lanes)
            numbers = _read(builder, builder.add(x, builder.mul(done, ir.Constant(x.type, 4))))
            if absolute:
                numbers = _call(builder, "llvm.fabs.v16f32", numbers, returns=_F32S)
            left = _spread(builder, builder.trunc(builder.sub(count, done), _I32))
            counted = builder.icmp_signed("<", ir.Constant(_I32S, list(range(LANES))), left)
            before = builder.load(most)
            larger = builder.and_(counted, builder.fcmp_ordered(">", numbers, before))
            builder.store(builder.select(larger, numbers, before), most)
        return _call(builder, "llvm.vector.reduce.fmax.v16f32", builder.load(most), returns=_F32)

    return types.float32(types.intp, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def largest(_typing: Any, x: Any, count: Any) -> Any:
    """The largest of `count` numbers; minus infinity of none."""
    return _largest(absolute=False)


@intrinsic  # type: ignore[untyped-decorator]
def largest_size(_typing: Any, x: Any, count: Any) -> Any:
    """The largest absolute value of `count` numbers; 0 of none."""
    return _largest(absolute=True)


@intrinsic  # type: ignore[untyped-decorator]
def split(_typing: Any, x: Any, factor: Any, to_high: Any, to_low: Any) -> Any:
    """Write the halves of x * factor, 16 bits each."""

    def emit(b: Any, a: Any) -> None:
        _write_halves(b, b.fmul(_read(b, a[0]), _spread(b, a[1])), a[2], a[3])

    return _nothing(types.intp, types.float32, types.intp, types.intp, emit=emit)


def _swiglu(builder: Any, gate: Any, up: Any) -> Any:
    gate = _read(builder, gate)
    power = _power_of_two(builder, builder.fmul(gate, _all(-1.4426950408889634)))
    silu = builder.fdiv(gate, builder.fadd(power, _all(1.0)))
    return builder.fmul(silu, _read(builder, up))


@intrinsic  # type: ignore[untyped-decorator]
def split_swiglu(_typing: Any, gate: Any, up: Any, to_high: Any, to_low: Any) -> Any:
    """Write the halves of silu(gate) * up."""

    def emit(b: Any, a: Any) -> None:
        _write_halves(b, _swiglu(b, a[0], a[1]), a[2], a[3])

    return _nothing(types.intp, types.intp, types.intp, types.intp, emit=emit)


@intrinsic  # type: ignore[untyped-decorator]
def swiglu(_typing: Any, gate: Any, up: Any) -> Any:
    """Write silu(gate) * up where gate was."""

    def emit(b: Any, a: Any) -> None:
        _write(b, _swiglu(b, a[0], a[1]), a[0])

    return _nothing(types.intp, types.intp, emit=emit)


@intrinsic  # type: ignore[untyped-decorator]
def multiply_by(_typing: Any, x: Any, factor: Any) -> Any:
    """Write x * factor where x was."""

    def emit(b: Any, a: Any) -> None:
        _write(b, b.fmul(_read(b, a[0]), _spread(b, a[1])), a[0])

    return _nothing(types.intp, types.float32, emit=emit)


@intrinsic  # type: ignore[untyped-decorator]
def to_bytes(_typing: Any, x: Any, factor: Any, to: Any) -> Any:
    """Write x * factor, rounded, as bytes; it is between -127 and 127."""

    def emit(b: Any, a: Any) -> None:
        scaled = b.fmul(_read(b, a[0]), _spread(b, a[1]))
        nearest = _call(b, "llvm.rint.v16f32", scaled, returns=_F32S)
        _write(b, b.trunc(b.fptosi(nearest, _I32S), _I8S), a[2])

    return _nothing(types.intp, types.float32, types.intp, emit=emit)


@intrinsic  # type: ignore[untyped-decorator]
def from_ints(_typing: Any, x: Any, factor: Any, of_columns: Any, kept: Any, to: Any) -> Any:
    """Write x (int32) * factor * what its columns have, plus `kept` (0 or 1) times what is there."""

    def emit(b: Any, a: Any) -> None:
        ints = b.load(b.inttoptr(a[0], _I32S.as_pointer()), align=4)
        scale = b.fmul(_read(b, a[2]), _spread(b, a[1]))
        before = b.select(b.fcmp_ordered("==", a[3], _number(0.0)), _all(0.0), _read(b, a[4]))
        _write(b, _call(b, "llvm.fma.v16f32", b.sitofp(ints, _F32S), scale, before, returns=_F32S), a[4])

    return _nothing(types.intp, types.float32, types.intp, types.float32, types.intp, emit=emit)


@intrinsic  # type: ignore[untyped-decorator]
def split_pairs(_typing: Any, x: Any, y: Any, to_high: Any, to_low: Any) -> Any:
    """Write the halves of x and y side by side, 32 bits for each x and its y."""

    def emit(b: Any, a: Any) -> None:
        parts = zip(_halves(b, _read(b, a[0])), _halves(b, _read(b, a[1])), (a[2], a[3]), strict=True)
        for first, second, address in parts:
            _write(b, b.or_(b.lshr(first, _all(16)), second), address)

    return _nothing(types.intp, types.intp, types.intp, types.intp, emit=emit)


@intrinsic  # type: ignore[untyped-decorator]
def split_powers(_typing: Any, x: Any, most: Any, valid: Any, totals: Any, to_high: Any, to_low: Any) -> Any:
    """Add 2^(x - most) to sixteen totals and write their halves; x <= most, and behind `valid` numbers they are 0."""

    def emit(b: Any, a: Any) -> None:
        lanes = ir.Constant(_I32S, list(range(LANES)))
        counted = b.icmp_signed("<", lanes, _spread(b, b.trunc(a[2], _I32)))
        power = _power_of_two(b, b.fsub(_read(b, a[0]), _spread(b, a[1])))
        result = b.select(counted, power, _all(0.0))
        _write(b, b.fadd(_read(b, a[3]), result), a[3])
        _write_halves(b, result, a[4], a[5])

    a = types.intp
    return _nothing(a, types.float32, a, a, a, a, emit=emit)


@intrinsic  # type: ignore[untyped-decorator]
def turn(_typing: Any, x: Any, half: Any, weight: Any, factor: Any, cosine: Any, sine: Any, out: Any) -> Any:
    """Sixteen of each half of a head: times weight and factor, then the rotary embedding; `half` in bytes."""

    def emit(b: Any, a: Any) -> None:
        x, half, weight, factor, cosine, sine, out = a
        scale = _spread(b, factor)
        first, second = (
            b.fmul(b.fmul(_read(b, b.add(x, to)), _read(b, b.add(weight, to))), scale)
            for to in (ir.Constant(x.type, 0), half)
        )
        cosine, sine = _read(b, cosine), _read(b, sine)
        _write(b, b.fsub(b.fmul(first, cosine), b.fmul(second, sine)), out)
        _write(b, b.fadd(b.fmul(second, cosine), b.fmul(first, sine)), b.add(out, half))

    a = types.intp
    return _nothing(a, a, a, types.float32, a, a, a, emit=emit)
