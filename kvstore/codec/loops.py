"""Inner loops of exphuf over values, in the part of Python that numba compiles; vectors.py does the same with numpy.

Nothing here imports numba: `compile_loops` does. Each kernel is compiled at its first call, to run without the GIL, and
without a cache on disk (numba's is made of pickles). Every step on 16-bit numbers is cast back to 16 bits, and shifts
are constants: otherwise they run in 64 bits, at a third of the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
Form = tuple[int, int]  # base, shift

SHIFTS: Final = (7, 8)  # of the field: bfloat16, float16
MANTISSA_BITS: Final = {7: 7, 8: 10}
BIASED: Final = 2  # mean square excess of signs over half, in units of what chance gives: from here on all pay
SPREAD: Final = 16  # mean square distance of exponents from the group's, twice, a token; chance gives 8

_U16 = np.uint16


class Rows(NamedTuple):
    """What is subtracted from a tile: offsets (groups, inner), one row of them for `tokens` rows of values."""

    offsets: U16
    tokens: int


class Loops(NamedTuple):
    """The compiled kernels; `survey` and `pack` by the shift of the field that they cut."""

    survey: dict[int, Callable[[U16, U8], None]]
    pack: dict[int, Callable[[U16, int, U8, U8], None]]
    split: Callable[[U16, Rows, int, U16], tuple[int, int]]
    join: Callable[[U8, U8, Rows, Form, U16], None]
    pack_fields: Callable[[U16, U8, U8], None]
    join_fields: Callable[[U8, U8, Rows, U16], None]
    offsets: Callable[[U8, int, U16], None]


def compile_loops() -> Loops:
    """Wrap the kernels for compilation at their first call.

    Raises:
        ImportError: numba is not installed.
    """
    from numba import njit  # noqa: PLC0415 - half a second and tens of megabytes, which the numpy path must not cost

    jit = njit(nogil=True)
    return Loops(
        {shift: jit(surveyor(shift)) for shift in SHIFTS},
        {shift: jit(packer(shift)) for shift in SHIFTS},
        jit(split_values),
        jit(join_values),
        jit(pack_fields),
        jit(join_fields),
        jit(offsets_of),
    )


def surveyor(shift: int) -> Callable[..., None]:
    """The survey kernel; by a shift that is not a constant, a vector of 16-bit numbers takes three times as long."""
    sign_at, mantissa_bits, unsigned = _U16(15), _U16(MANTISSA_BITS[shift]), _U16(0x7FFF)

    def survey(values: U16, codes: U8) -> None:
        """Codes (groups, inner) for the channels of `values` (groups, tokens, inner); see prediction.py."""
        tokens, inner = values.shape[1], values.shape[2]
        signs, exponents = np.empty(inner, dtype=np.uint16), np.empty(inner, dtype=np.uint16)
        for group in range(values.shape[0]):
            signs[:] = 0
            exponents[:] = 0
            for token in range(tokens):
                row = values[group, token]
                for index in range(inner):
                    value = row[index]
                    signs[index] = _U16(signs[index] + _U16(value >> sign_at))
                    exponents[index] = _U16(exponents[index] + _U16(_U16(value & unsigned) >> mantissa_bits))
            total = 0
            for index in range(inner):
                total += exponents[index]
            center = total // inner
            bias, spread = 0, 0
            for index in range(inner):
                excess = 2 * np.int64(signs[index]) - tokens
                away = 2 * (np.int64(exponents[index]) - center)
                bias += excess * excess
                spread += away * away
            sure = 0 if bias > BIASED * tokens * inner else 16 * tokens
            root = 0
            while (root + 1) * (root + 1) <= tokens:
                root += 1
            margin = tokens + (2 if spread > SPREAD * tokens * inner else 6) * root
            code = codes[group]
            for index in range(inner):
                excess = 2 * np.int64(signs[index]) - tokens
                away = 2 * (np.int64(exponents[index]) - center)
                step = 1 + np.int64(away > margin) - np.int64(away < -margin)
                code[index] = 2 * step + np.int64(excess > 0 and excess * excess > sure)

    return survey


def split_values(values: U16, rows: Rows, shift: int, left: U16) -> tuple[int, int]:
    """Fill `left` with values - offsets, modulo 2^16; answers the least and the greatest field above `shift` in it."""
    offsets, tokens = rows
    low, high = np.uint16(0xFFFF), np.uint16(0)  # min() would leave 16 bits
    inner = offsets.shape[1]
    for start in range(0, values.size, inner):
        end = min(start + inner, values.size)
        source, target, row = values[start:end], left[start:end], offsets[start // inner // tokens]
        for index in range(end - start):
            value = _U16(source[index] - row[index])
            target[index] = value
            unsigned = _U16(value << 1)
            low = unsigned if unsigned < low else low
            high = unsigned if unsigned > high else high
    return int(low) >> (shift + 1), int(high) >> (shift + 1)


def packer(shift: int) -> Callable[[U16, int, U8, U8], None]:
    """The packing kernel, for a shift that is a constant in it (see surveyor)."""
    up, back, sign_at = _U16(shift - 1), _U16(16 - shift), _U16(15)
    mask, low, highest = _U16((1 << (16 - shift)) - 2), _U16((1 << shift) - 1), _U16(1 << (shift - 1))

    def pack(left: U16, base: int, symbols: U8, rest: U8) -> None:
        """Cut each value into its symbol, 2 * (field - base) + sign, and the bits below the field.

        The highest of the bits below is written exclusive-or the sign: so one multiplication puts field and sign back.
        With 7 bits below (bfloat16) the last eighth of the values has them in the eighth bit of the others' bytes.
        """
        twice = _U16(2 * base)
        for index in range(left.size):
            value = left[index]
            symbols[index] = _U16(_U16(_U16(_U16(value >> up) & mask) - twice) + _U16(value >> sign_at))
        for index in range(rest.size):
            value = left[index]
            rest[index] = _U16(_U16(value ^ _U16(_U16(value >> back) & highest)) & low)
        tail = left[rest.size :]
        for index in range(tail.size):
            value = tail[index]
            tail[index] = _U16(value ^ _U16(_U16(value >> back) & highest))
        if tail.size:
            for plane in range(7):
                part = rest[plane * tail.size : (plane + 1) * tail.size]
                for index in range(tail.size):
                    part[index] |= ((tail[index] >> plane) & 1) << 7

    return pack


def join_values(symbols: U8, rest: U8, rows: Rows, form: Form, out: U16) -> None:
    """Undo pack.

    Every step is cast back to 16 bits: without that they run in 64, at 0.25 instead of 0.10 ns a value.
    """
    base, shift = form
    offsets, tokens = rows
    kept = rest.size
    tail = np.zeros(out.size - kept, dtype=np.uint8)
    if tail.size:
        for plane in range(7):
            part = rest[plane * tail.size : (plane + 1) * tail.size]
            for index in range(tail.size):
                tail[index] |= (part[index] >> 7) << plane
    low, factor, first = _U16((1 << shift) - 1), _U16((1 << 15) + (1 << (shift - 1))), _U16(base << shift)
    inner = offsets.shape[1]
    for start in range(0, kept, inner):
        end = min(start + inner, kept)
        row = offsets[start // inner // tokens]
        target, symbol, bits = out[start:end], symbols[start:end], rest[start:end]
        for index in range(end - start):
            below = _U16(_U16(bits[index]) & low)
            target[index] = _U16(_U16(_U16(_U16(symbol[index]) * factor) ^ below) + _U16(row[index] + first))
    start = kept
    while start < out.size:
        number = start // inner
        end = min((number + 1) * inner, out.size)
        row = offsets[number // tokens][start - number * inner :]
        target, symbol, bits = out[start:end], symbols[start:end], tail[start - kept : end - kept]
        for index in range(end - start):
            below = _U16(bits[index])
            target[index] = _U16(_U16(_U16(_U16(symbol[index]) * factor) ^ below) + _U16(row[index] + first))
        start = end


def pack_fields(left: U16, symbols: U8, rest: U8) -> None:
    """Cut bfloat16 values into fields, and mantissa and sign: for fields too wide to share a byte with the sign."""
    low, sign = _U16(0x7F), _U16(0x80)
    for index in range(left.size):
        value = left[index]
        symbols[index] = _U16(value >> _U16(7))
        rest[index] = _U16(_U16(value & low) | _U16(_U16(value >> _U16(8)) & sign))


def join_fields(symbols: U8, rest: U8, rows: Rows, out: U16) -> None:
    """Undo pack_fields."""
    offsets, tokens = rows
    low, sign = _U16(0x7F), _U16(0x80)
    inner = offsets.shape[1]
    for start in range(0, out.size, inner):
        end = min(start + inner, out.size)
        row = offsets[start // inner // tokens]
        target, symbol, bits = out[start:end], symbols[start:end], rest[start:end]
        for index in range(end - start):
            below = _U16(bits[index])
            value = _U16(_U16(_U16(symbol[index]) << _U16(7)) | _U16(below & low))
            target[index] = _U16(_U16(value | _U16(_U16(below & sign) << _U16(8))) + row[index])


def offsets_of(codes: U8, mantissa_bits: int, offsets: U16) -> None:
    """What prediction codes stand for; both arrays are flat."""
    step = _U16(1 << mantissa_bits)
    for index in range(codes.size):
        code = _U16(codes[index])
        offsets[index] = _U16(_U16(_U16(_U16(code >> _U16(1)) - _U16(1)) * step) + _U16(code << _U16(15)))
