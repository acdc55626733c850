"""A Huffman coder that writes zstd blocks, in the part of Python that numba compiles (loops.compile_loops does that).

Zstd's own encoder spends half of its time in looking for matches, and those it finds make the result larger: 1.494
where Huffman codes alone give 1.497. Any zstd reads the result. RFC 8878 has the format: a block here is a section of
literals in four Huffman streams with a table of weights, and a section of no sequences.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Numbers = MutableSequence[int] | I64

MAX_BITS: Final = 11  # of a code, by the zstd format
STORED, REPEATED, COMPRESSED = 0, 1, 2  # kinds of blocks, by the zstd format
MAX_SYMBOL: Final = 128  # that a table of weights can name without an entropy coder of its own


class Work(NamedTuple):
    """Memory for writing blocks, of one thread. `pairs` is all zeros between two blocks."""

    counts: I64
    order: I64
    lengths: I64
    codes: U32
    pairs: U32
    words: U64


ContentWriter = Callable[[U8, int, U8, Work], int]
BlocksWriter = Callable[[U8, int, int, U8, Work], int]


def make_work(symbols_max: int) -> Work:
    """Memory for blocks of at most so many symbols: 256 KiB, and a fifth of a byte a symbol."""
    counts, order, lengths = (np.zeros(256, dtype=np.int64) for _ in range(3))
    words = np.zeros(symbols_max * MAX_BITS // 256 + 8, dtype=np.uint64)
    return Work(counts, order, lengths, np.zeros(256, np.uint32), np.zeros(1 << 16, np.uint32), words)


def count_symbols(symbols: U8, top: int, counts: I64, pairs: U32) -> None:
    """counts[:top + 1] = histogram of an even number of symbols up to `top`.

    Two at a time, which is half as many increments (0.31 against 0.18 ns a symbol), and then sums of rows and columns.
    """
    two = symbols.view(np.uint16)
    for index in range(two.size):
        pairs[two[index]] += 1
    counts[:] = 0
    for symbol in range(top + 1):
        row = pairs[symbol << 8 : (symbol << 8) + top + 1]
        total = 0
        for other in range(top + 1):
            total += row[other]
            counts[other] += row[other]
            row[other] = 0
        counts[symbol] += total


def rank_symbols(counts: I64, top: int, order: I64, ranked: I64) -> int:
    """Symbols that occur, rare ones first, in `order`, with their counts in `ranked`; answers how many there are."""
    number = 0
    for symbol in range(top + 1):
        total = counts[symbol]
        if total:
            slot = number
            number += 1
            while slot > 0 and ranked[slot - 1] > total:
                ranked[slot], order[slot] = ranked[slot - 1], order[slot - 1]
                slot -= 1
            ranked[slot], order[slot] = total, symbol
    return number


def code_lengths(counts: Numbers, number: int) -> None:
    """Replace counts[:number], ascending and positive, by Huffman code lengths, descending. At least two symbols.

    In place, by Moffat and Katajainen (1995). Works on arrays and on lists alike, as limit_lengths does, so that both
    implementations come to the same code.
    """
    counts[0] += counts[1]
    root, leaf = 0, 2
    for node in range(1, number - 1):
        total = 0
        for _ in range(2):
            if leaf >= number or (root < node and counts[root] < counts[leaf]):
                total += counts[root]
                counts[root] = node
                root += 1
            else:
                total += counts[leaf]
                leaf += 1
        counts[node] = total
    counts[number - 2] = 0
    for node in range(number - 3, -1, -1):
        counts[node] = counts[counts[node]] + 1
    free, depth, node, slot = 1, 0, number - 2, number - 1
    while free > 0:
        used = 0
        while node >= 0 and counts[node] == depth:
            used += 1
            node -= 1
        for _ in range(free - used):
            counts[slot] = depth
            slot -= 1
        free, depth = 2 * used, depth + 1


def limit_lengths(lengths: Numbers, number: int) -> None:
    """Cut code lengths, descending, to MAX_BITS, and make the code complete again.

    First the longest of the others are lengthened, then the most frequent shortened.
    """
    spare = 1 << MAX_BITS
    for index in range(number):
        lengths[index] = min(lengths[index], MAX_BITS)
        spare -= 1 << (MAX_BITS - lengths[index])
    index = 0
    while spare < 0:
        if lengths[index] < MAX_BITS:
            lengths[index] += 1
            spare += 1 << (MAX_BITS - lengths[index])
        else:
            index += 1
    index = number - 1
    while spare > 0:
        if 1 << (MAX_BITS - lengths[index]) <= spare:
            spare -= 1 << (MAX_BITS - lengths[index])
            lengths[index] -= 1
        else:
            index -= 1


def write_table(lengths: I64, top: int, codes: U32, out: U8) -> int:
    """codes[symbol] = code << 4 | length for every symbol up to `top`, and the table of weights; answers its bytes.

    Canonical in zstd's way: the longest codes begin at 0, symbols of one length in their own order.
    """
    longest = 0
    last = 0
    for symbol in range(top + 1):
        longest = max(longest, lengths[symbol])
        last = symbol if lengths[symbol] else last
        codes[symbol] = 0
    code = 0
    for length in range(longest, 0, -1):
        for symbol in range(last + 1):
            if lengths[symbol] == length:
                codes[symbol] = code << 4 | length
                code += 1
        code >>= 1
    out[0] = 127 + last  # whose weight follows from the others
    for symbol in range(0, last, 2):
        left = longest + 1 - lengths[symbol] if lengths[symbol] else 0
        right = longest + 1 - lengths[symbol + 1] if symbol + 1 < last and lengths[symbol + 1] else 0
        out[1 + symbol // 2] = left << 4 | right
    return 1 + (last + 1) // 2


def pair_codes(codes: U32, top: int, pairs: U32) -> None:
    """pairs[first | second << 8] = the codes of two symbols that follow each other, << 8 | their length."""
    for second in range(top + 1):
        row = pairs[second << 8 : (second << 8) + top + 1]
        code, length = codes[second] >> 4, codes[second] & 15
        for first in range(top + 1):
            row[first] = (code | (codes[first] >> 4) << length) << 8 | (length + (codes[first] & 15))


def write_stream(symbols: U8, pairs: U32, words: U64) -> int:
    """One bit stream into words of 64 bits, the last symbol first, a one behind it all; answers its bytes.

    Four codes, 44 bits at most, are put together before the words are looked at. An even number of symbols.
    """
    one, eight, all_six, length_mask = np.uint64(1), np.uint64(8), np.uint64(63), np.uint64(255)
    two = symbols.view(np.uint16)
    hold, bits, word = np.uint64(0), np.uint64(0), np.uint64(0)
    at = np.uint64(two.size)  # unsigned: a negative index would have to be looked for
    if two.size % 2:
        at -= one
        last = np.uint64(pairs[two[at]])
        hold, bits = last >> eight, last & length_mask
    for _ in range(two.size // 2):
        at -= np.uint64(2)
        later, earlier = np.uint64(pairs[two[at + one]]), np.uint64(pairs[two[at]])
        length = later & length_mask
        part = (later >> eight) | ((earlier >> eight) << length)
        merged = hold | (part << bits)
        words[word] = merged
        after = bits + (length + (earlier & length_mask))
        full = after >> np.uint64(6)
        spilled = (part >> (all_six - bits)) >> one
        hold = spilled if full else merged  # a select: a branch would be mispredicted every third time
        word += full
        bits = after & all_six
    words[word] = hold | (one << bits)
    return int(word) * 8 + int(bits) // 8 + 1


class Parts(NamedTuple):
    """The functions that a block writer calls, compiled."""

    histogram: Callable[[U8, int, I64, U32], None]
    rank: Callable[[I64, int, I64, I64], int]
    lengths: Callable[[Numbers, int], None]
    limit: Callable[[Numbers, int], None]
    table: Callable[[I64, int, U32, U8], int]
    pairs: Callable[[U32, int, U32], None]
    stream: Callable[[U8, U32, U64], int]
    put: Callable[[U8, int, int], None]


def put_number(out: U8, number: int, nbytes: int) -> None:
    """A little-endian number at the start of `out`."""
    for index in range(nbytes):
        out[index] = (number >> (8 * index)) & 255


def content_writer(parts: Parts) -> ContentWriter:
    """The writer of a compressed block's content, to be compiled."""
    histogram, rank, lengths_of, limit, table, pairs_of, stream, put = parts

    def write_content(symbols: U8, top: int, out: U8, work: Work) -> int:
        """The content of one compressed block of a multiple of 8 symbols up to `top`; answers its bytes.

        0 where it would not be shorter than the symbols, 1 where all of them are the same.
        """
        counts, order, lengths, codes, pairs, words = work
        histogram(symbols, top, counts, pairs)
        number = rank(counts, top, order, lengths)
        if number == 1:
            return 1
        lengths_of(lengths, number)
        limit(lengths, number)
        bits = 0
        for slot in range(number):
            symbol = order[slot]
            bits += counts[symbol] * lengths[slot]
            counts[symbol] = lengths[slot]
        if bits // 8 + 64 + top // 2 > symbols.size:
            return 0
        jump = 5 + table(counts, top, codes, out[5:])
        pairs_of(codes, top, pairs)
        at, step = jump + 6, symbols.size // 4
        for quarter in range(4):
            nbytes = stream(symbols[quarter * step : (quarter + 1) * step], pairs, words)
            out[at : at + nbytes] = words.view(np.uint8)[:nbytes]
            at += nbytes
            if quarter < 3:
                put(out[jump + 2 * quarter :], nbytes, 2)
        for symbol in range(top + 1):
            pairs[symbol << 8 : (symbol << 8) + top + 1] = 0
        head = 2 | 3 << 2 | symbols.size << 4 | (at - 5) << 22  # compressed literals, four streams, sizes of 18 bits
        put(out, head, 5)
        out[at] = 0  # no sequences
        return at + 1

    return write_content


def blocks_writer(content: ContentWriter, put: Callable[[U8, int, int], None]) -> BlocksWriter:
    """The writer of all blocks of a zstd frame, to be compiled, over a compiled content writer."""

    def write_blocks(symbols: U8, top: int, step: int, out: U8, work: Work) -> int:
        """Blocks of `step` symbols, a multiple of 8, each with a table of its own; answers their bytes.

        The last symbols, which do not fill four streams evenly, are stored. `out` has room for 64 bytes more than there
        are symbols.
        """
        at, coded = 0, symbols.size - symbols.size % 8
        for start in range(0, coded, step):
            end = min(start + step, coded)
            last = 1 if end == symbols.size else 0
            kind, nbytes = COMPRESSED, content(symbols[start:end], top, out[at + 3 :], work)
            size = nbytes
            if nbytes == 1:
                kind, size = REPEATED, end - start
                out[at + 3] = symbols[start]
            elif nbytes == 0:
                kind, nbytes, size = STORED, end - start, end - start
                out[at + 3 : at + 3 + nbytes] = symbols[start:end]
            put(out[at:], last | kind << 1 | size << 3, 3)
            at += 3 + nbytes
        left = symbols.size - coded
        if left:
            put(out[at:], 1 | STORED << 1 | left << 3, 3)
            out[at + 3 : at + 3 + left] = symbols[coded:]
            at += 3 + left
        return at

    return write_blocks
