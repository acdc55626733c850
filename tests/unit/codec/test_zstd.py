"""Zstd frames: blocks with tables of their own, and nothing believed that a frame says of itself."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard

from kvstore.codec.base import CodecError
from kvstore.codec.zstd import ZstdContexts


def skewed(size: int, spread: float, middle: int = 0) -> np.ndarray:
    normal = np.random.default_rng(size).standard_normal(size) * spread
    return (np.abs(normal).astype(np.int64) + middle).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [1, 7, 256, 1000, 24 << 10, 65535, 131072])
@pytest.mark.parametrize("block", [1000, 24 << 10, 131072])
def test_frames_of_several_blocks(size: int, block: int) -> None:
    plain = skewed(size, 8)
    frame = ZstdContexts().huffman_blocks(plain, block)
    assert zstandard.frame_content_size(frame) == size
    assert np.array_equal(ZstdContexts().decompress(memoryview(frame), size), plain)


def test_every_block_has_a_table_that_suits_it() -> None:
    """Two stretches with quite different symbols: one table for both would cost a bit a symbol."""
    plain = np.concatenate([skewed(24 << 10, 4), skewed(24 << 10, 4, middle=100)])
    contexts = ZstdContexts()
    two, one = (contexts.huffman_blocks(plain, block) for block in (24 << 10, 48 << 10))
    assert len(two) < 0.85 * len(one)


def test_contexts_forget_the_frame_before() -> None:
    contexts = ZstdContexts()
    for spread in (1, 90, 8):
        plain = skewed(100_000, spread)
        for frame in (
            contexts.huffman_blocks(plain, 30_000),
            contexts.huffman(plain),
            contexts.level_1(plain),
        ):
            assert np.array_equal(contexts.decompress(memoryview(frame), plain.size), plain)


@pytest.mark.parametrize("nbytes", [0, 1, 999, 1001, 1 << 40])
def test_a_frame_of_another_size_is_an_error(nbytes: int) -> None:
    frame = ZstdContexts().huffman(skewed(1000, 8))
    with pytest.raises(CodecError):
        ZstdContexts().decompress(memoryview(frame), nbytes)


def test_cut_and_garbage() -> None:
    frame = ZstdContexts().huffman(skewed(1000, 8))
    for length in range(len(frame)):
        with pytest.raises(CodecError):
            ZstdContexts().decompress(memoryview(frame)[:length], 1000)
    with pytest.raises(CodecError):
        ZstdContexts().decompress(memoryview(frame + b"x"), 1000)
    without_size = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 1000)
    with pytest.raises(CodecError):
        ZstdContexts().decompress(memoryview(without_size), 1000)
