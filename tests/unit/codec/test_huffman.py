"""The Huffman coder: what it writes, zstd reads; and its codes are as good as Huffman's, but for the limit."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvstore.codec.huffman import MAX_BITS, MAX_SYMBOL, code_lengths, limit_lengths
from kvstore.codec.kernels import Kernels, compiled_loops, make_kernels
from kvstore.codec.zstd import FrameWriter, ZstdContexts

CHOICES = (False, True) if compiled_loops() else (False,)


def optimal_bits(counts: list[int]) -> int:
    heap = list(counts)
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=129))
def test_code_lengths_are_optimal_and_after_the_cut_complete(counts: list[int]) -> None:
    counts.sort()
    lengths = list(counts)
    code_lengths(lengths, len(lengths))
    assert lengths == sorted(lengths, reverse=True)
    assert sum(map(int.__mul__, counts, lengths)) == optimal_bits(counts)
    limit_lengths(lengths, len(lengths))
    assert max(lengths) <= MAX_BITS
    assert sum(2.0**-length for length in lengths) == 1


def test_a_code_that_is_far_too_deep_is_cut() -> None:
    counts = [1, 1]
    while len(counts) < 40:
        counts.append(counts[-1] + counts[-2])
    lengths = list(counts)
    code_lengths(lengths, len(lengths))
    assert lengths[0] == 39
    limit_lengths(lengths, len(lengths))
    assert max(lengths) == MAX_BITS
    assert sum(2.0**-length for length in lengths) == 1


def written(kernels: Kernels, symbols: np.ndarray, block: int) -> bytes:
    out = np.zeros(symbols.size + 64, dtype=np.uint8)
    work = np.zeros(symbols.size, dtype=np.uint8)  # a memory of its own, whose end is the end of the symbols
    work[:] = symbols
    nbytes = FrameWriter(kernels, ZstdContexts()).write(work, int(symbols.max()), block, out)
    return out[:nbytes].tobytes()


def skewed(size: int, top: int, spread: float) -> np.ndarray:
    rng = np.random.default_rng(size * 131 + top)
    symbols = np.minimum(np.abs(rng.standard_normal(size) * spread).astype(np.int64), top)
    symbols[-1] = top
    return symbols.astype(np.uint8)


@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 1000, 1023, 8192, 24577, 65535, 131072])
@pytest.mark.parametrize(
    ("top", "spread"), [(0, 1), (1, 0.5), (5, 0.2), (40, 8), (MAX_SYMBOL, 20), (129, 20), (255, 90)]
)
def test_zstd_reads_every_frame(size: int, top: int, spread: float) -> None:
    symbols = skewed(size, top, spread)
    frames = {written(make_kernels(choice), symbols, 24 << 10) for choice in CHOICES}
    assert len(frames) == 1, "numba and numpy write the same bytes"
    assert zstandard.ZstdDecompressor().decompress(frames.pop()) == symbols.tobytes()


@pytest.mark.parametrize("block", [8, 64, 4096, 131072])
def test_blocks_of_any_size(block: int) -> None:
    symbols = np.concatenate([skewed(5000, 30, 6), np.zeros(5000, np.uint8), np.arange(5003).astype(np.uint8) % 100])
    for choice in CHOICES:
        frame = written(make_kernels(choice), symbols, block)
        assert len(frame) <= symbols.size
        assert zstandard.ZstdDecompressor().decompress(frame) == symbols.tobytes()


def test_close_to_the_entropy() -> None:
    symbols = skewed(131072, 60, 8)
    counts = np.bincount(symbols)
    share = counts[counts > 0] / symbols.size
    entropy = -(share * np.log2(share)).sum() / 8 * symbols.size
    for choice in CHOICES:
        assert len(written(make_kernels(choice), symbols, 24 << 10)) < 1.02 * entropy
