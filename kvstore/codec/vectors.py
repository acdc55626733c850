"""The inner loops of exphuf in numpy: the same bytes as loops.py and huffman.py, where numba is not installed.

Decoding runs at two thirds of the speed of the compiled loops, encoding at a seventh.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvstore.codec.huffman import (
    COMPRESSED,
    MAX_BITS,
    REPEATED,
    STORED,
    U8,
    U32,
    U64,
    code_lengths,
    limit_lengths,
    put_number,
)
from kvstore.codec.loops import BIASED, MANTISSA_BITS, SPREAD, U16, Form, Rows


def survey(values: U16, shift: int, codes: U8) -> None:
    """See loops.surveyor."""
    tokens, inner = values.shape[1:]
    exponents = (values & np.uint16(0x7FFF)) >> np.uint16(MANTISSA_BITS[shift])
    away = np.add.reduce(exponents, axis=1, dtype=np.uint16).astype(np.int64)
    away = 2 * (away - away.sum(axis=1, keepdims=True) // inner)
    excess = 2 * np.add.reduce(values >> np.uint16(15), axis=1, dtype=np.uint16).astype(np.int64) - tokens
    square = excess * excess
    sure = np.where(square.sum(axis=1, keepdims=True) > BIASED * tokens * inner, 0, 16 * tokens)
    spread = (away * away).sum(axis=1, keepdims=True) > SPREAD * tokens * inner
    margin = tokens + np.where(spread, 2, 6) * math.isqrt(tokens)
    codes[:] = 2 * (1 + (away > margin).astype(np.int64) - (away < -margin)) + ((excess > 0) & (square > sure))


def subtract(values: U16, rows: Rows, out: U16) -> None:
    """Out = values - the offsets in `rows`, modulo 2^16; `out` may be `values`."""
    if out is not values:
        np.copyto(out, values)
    if rows.offsets.any():
        for part, row in _rows(out, rows):
            np.subtract(part, row, out=part)


def split_values(values: U16, rows: Rows, shift: int, left: U16) -> tuple[int, int]:
    """See loops.split_values."""
    subtract(values, rows, left)
    unsigned = left << np.uint16(1)
    return int(unsigned.min()) >> (shift + 1), int(unsigned.max()) >> (shift + 1)


def pack_values(left: U16, form: Form, symbols: U8, rest: U8) -> None:
    """See loops.packer."""
    base, shift = form
    wide = left >> np.uint16(shift - 1)
    wide &= np.uint16((1 << (16 - shift)) - 2)
    wide -= np.uint16(2 * base)
    wide += left >> np.uint16(15)
    np.copyto(symbols, wide, casting="unsafe")
    np.right_shift(left, np.uint16(16 - shift), out=wide)
    wide &= np.uint16(1 << (shift - 1))
    left ^= wide
    left &= np.uint16((1 << shift) - 1)
    np.copyto(rest, left[: rest.size], casting="unsafe")
    tail = left[rest.size :].astype(np.uint8)
    for plane in range(7 if tail.size else 0):
        rest[plane * tail.size : (plane + 1) * tail.size] |= (tail >> np.uint8(plane)) << np.uint8(7)


def join_values(symbols: U8, rest: U8, rows: Rows, form: Form, out: U16) -> None:
    """See loops.join_values. Every pass stays in the second-level cache."""
    base, shift = form
    np.multiply(symbols, np.uint16((1 << 15) + (1 << (shift - 1))), out=out)
    spare = out.size - rest.size
    if spare:
        tail = rest[:spare] >> np.uint8(7)
        for plane in range(1, 7):
            bits = rest[plane * spare : (plane + 1) * spare] >> np.uint8(7 - plane)
            bits &= np.uint8(1 << plane)
            tail |= bits
        out[rest.size :] ^= tail
        rest = rest & np.uint8(0x7F)
    target = out[: rest.size]
    np.bitwise_xor(target, rest, out=target)
    first = np.uint16(base << shift & 0xFFFF)
    if rows.offsets.any():
        for part, row in _rows(out, Rows(rows.offsets + first, rows.tokens)):
            np.add(part, row, out=part)
    elif first:
        np.add(out, first, out=out)


def _rows(values: U16, rows: Rows) -> Iterator[tuple[U16, U16]]:
    """`values` in pieces with the offsets that broadcast over them: all whole groups in one, then what is left."""
    offsets, tokens = rows
    inner = offsets.shape[1]
    span = inner * min(tokens, -(-values.size // inner))  # a tile may lie within one group
    groups = values.size // span
    yield values[: groups * span].reshape(groups, -1, inner), offsets[:groups, None, :]
    left = values[groups * span :]
    whole = left.size // inner
    if whole:
        yield left[: whole * inner].reshape(whole, inner), offsets[groups]
    if left.size % inner:
        yield left[whole * inner :], offsets[groups, : left.size % inner]


def write_blocks(symbols: U8, top: int, step: int, out: U8) -> int:
    """See huffman.blocks_writer."""
    at, coded = 0, symbols.size - symbols.size % 8
    for start in range(0, coded, step):
        part = symbols[start : min(start + step, coded)]
        kind, nbytes = COMPRESSED, _write_content(part, top, out[at + 3 :])
        size = nbytes
        if nbytes == 1:
            kind, size = REPEATED, part.size
            out[at + 3] = part[0]
        elif nbytes == 0:
            kind, nbytes, size = STORED, part.size, part.size
            out[at + 3 : at + 3 + nbytes] = part
        put_number(out[at:], int(start + part.size == symbols.size) | kind << 1 | size << 3, 3)
        at += 3 + nbytes
    left = symbols.size - coded
    if left:
        put_number(out[at:], 1 | STORED << 1 | left << 3, 3)
        out[at + 3 : at + 3 + left] = symbols[coded:]
        at += 3 + left
    return at


def _write_content(symbols: U8, top: int, out: U8) -> int:
    """See huffman.content_writer."""
    counts = np.bincount(symbols, minlength=top + 1)
    present = np.flatnonzero(counts)
    if present.size == 1:
        return 1
    order = present[np.argsort(counts[present], kind="stable")]
    depths = counts[order].tolist()
    code_lengths(depths, len(depths))
    limit_lengths(depths, len(depths))
    lengths = np.zeros(top + 1, dtype=np.uint32)
    lengths[order] = depths
    if int(counts @ lengths) // 8 + 64 + top // 2 > symbols.size:
        return 0
    table = _table(lengths)
    jump = 5 + table.size
    out[5:jump] = table
    at = jump + 6
    for quarter, stream in enumerate(_streams(symbols, _pairs(_canonical(lengths), lengths))):
        out[at : at + stream.size] = stream
        at += stream.size
        if quarter < 3:
            put_number(out[jump + 2 * quarter :], stream.size, 2)
    put_number(out, 2 | 3 << 2 | symbols.size << 4 | (at - 5) << 22, 5)
    out[at] = 0
    return at + 1


def _canonical(lengths: U32) -> U32:
    """Codes for code lengths, as huffman.write_table has them: multiples of 2^-length, the longest codes first."""
    share = np.where(lengths > 0, 1 << (MAX_BITS - lengths.astype(np.int64)), 0)
    order = np.argsort(share, kind="stable")
    starts = np.empty(share.size, dtype=np.int64)
    starts[order] = np.cumsum(share[order]) - share[order]
    return (starts >> (MAX_BITS - lengths.astype(np.int64))).astype(np.uint32)


def _table(lengths: U32) -> U8:
    """The table of weights; see huffman.write_table."""
    last = int(np.flatnonzero(lengths)[-1])
    weights = np.zeros(last + last % 2, dtype=np.uint8)
    weights[:last] = np.where(lengths > 0, lengths.max() + 1 - lengths, 0)[:last]
    table = np.empty(1 + weights.size // 2, dtype=np.uint8)
    table[0] = 127 + last
    table[1:] = weights[::2] << np.uint8(4) | weights[1::2]
    return table


def _pairs(codes: U32, lengths: U32) -> U32:
    """See huffman.pair_codes; for all 65536 pairs, so that two symbols index it as one number."""
    table = np.zeros((256, 256), dtype=np.uint32)
    part = table[: codes.size, : codes.size]
    np.left_shift(codes[None, :], lengths[:, None], out=part)
    part |= codes[:, None]
    part <<= np.uint32(8)
    part += lengths[:, None] + lengths[None, :]
    return table.reshape(-1)


def _streams(symbols: U8, table: U32) -> Iterator[U8]:
    """The four bit streams; see huffman.write_stream. All four at once, each beginning in a word of its own."""
    pairs = symbols.view(np.uint16).reshape(4, -1)[:, ::-1]
    entries = np.zeros((4, pairs.shape[1] + pairs.shape[1] % 2), dtype=np.uint32)
    np.take(table, pairs, out=entries[:, : pairs.shape[1]], mode="clip")
    lengths = entries & np.uint32(255)
    entries >>= np.uint32(8)
    later, earlier = entries[:, ::2].astype(np.uint64), entries[:, 1::2].astype(np.uint64)
    earlier <<= lengths[:, ::2]
    later |= earlier
    ends = np.cumsum(lengths[:, ::2] + lengths[:, 1::2], axis=1, dtype=np.int64)
    bits = ends[:, -1].tolist()
    first_words = [0]
    for total in bits:
        first_words.append(first_words[-1] + total // 64 + 1)
    starts = np.zeros_like(ends)
    starts[:, 1:] = ends[:, :-1]
    starts += 64 * np.array(first_words[:4])[:, None]
    words = _words(later.reshape(-1), starts.reshape(-1), first_words[4])
    for first, total in zip(first_words, bits, strict=False):
        words[first + total // 64] |= np.uint64(1 << total % 64)
        yield words[first:].view(np.uint8)[: total // 8 + 1]


def _words(codes: U64, starts: NDArray[np.int64], count: int) -> U64:
    """`count` words of 64 bits with each of the bit strings `codes`, of at most 44 bits, at the bit where it starts."""
    bit = (starts & 63).view(np.uint64)
    number = starts >> 6
    fresh = np.empty(number.size, dtype=np.bool_)
    fresh[0] = True
    np.not_equal(number[1:], number[:-1], out=fresh[1:])
    first = np.flatnonzero(fresh)  # string of each word that has one
    words = np.zeros(count + 1, dtype=np.uint64)
    words[number[first]] = np.bitwise_or.reduceat(codes << bit, first)
    last = np.empty_like(first)
    last[:-1], last[-1] = first[1:] - 1, codes.size - 1
    words[number[last] + 1] |= (codes[last] >> (np.uint64(63) - bit[last])) >> np.uint64(1)
    return words
