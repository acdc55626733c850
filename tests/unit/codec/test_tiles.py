"""The tile table is bounds-checked and a hostile tile allocates nothing."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import zstandard

from kvstore.codec.base import CodecError
from kvstore.codec.tiles import (
    MAX_TILE_BYTES,
    MIN_TILE_BYTES,
    TILE_BYTES,
    TileCoder,
    huffman_parameters,
    level_parameters,
    pack_table,
    read_table,
)


def test_table_round_trip() -> None:
    table = read_table(memoryview(pack_table([10, 20, 3], 4096) + b"rest"), 2 * 4096 + 5)
    assert [tuple(tile) for tile in table.tiles] == [(0, 4096, 10), (4096, 4096, 20), (8192, 5, 3)]
    assert (table.nbytes, table.stored_bytes) == (16, 33)


@pytest.mark.parametrize("tile_bytes", [0, 1, MIN_TILE_BYTES - 1, MAX_TILE_BYTES + 1, 2**32 - 1])
def test_impossible_tile_sizes(tile_bytes: int) -> None:
    with pytest.raises(CodecError, match="tile size"):
        read_table(memoryview(pack_table([1], tile_bytes)), 100)


@pytest.mark.parametrize("lengths", [[0, 1], [4097, 1], [1, 2], [2**32 - 1, 1]])
def test_impossible_lengths(lengths: list[int]) -> None:
    with pytest.raises(CodecError, match="claims"):
        read_table(memoryview(pack_table(lengths, 4096)), 4097)


def test_a_table_that_is_cut_off() -> None:
    whole = pack_table([1, 1, 1], 4096)
    for length in range(len(whole)):
        with pytest.raises(CodecError, match="ends inside"):
            read_table(memoryview(whole[:length]), 3 * 4096)


def test_incompressible_tile_is_stored_as_it_is() -> None:
    coder = TileCoder(huffman_parameters())
    tile = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    assert coder.encode(tile) == tile.tobytes()
    assert np.array_equal(coder.decode(memoryview(tile.tobytes()), 5000), tile)


@pytest.mark.parametrize("claimed", [0, 4095, 4097, 2**30, 2**40, 2**63])
def test_a_tile_that_claims_another_size_allocates_nothing(claimed: int) -> None:
    coder = TileCoder(huffman_parameters())
    # Magic, a descriptor with an 8-byte content size in a single segment, the size, an empty last block.
    frame = struct.pack("<IBQ", 0xFD2FB528, 0xE0, claimed) + b"\x01\0\0"
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            coder.decode(memoryview(frame), 4096)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


def test_a_tile_without_its_size_or_with_a_tail() -> None:
    tile = bytes(4096)
    coder = TileCoder(huffman_parameters())
    sizeless = zstandard.ZstdCompressor(write_content_size=False).compress(tile)
    for stored in (sizeless, coder.encode(np.frombuffer(tile, np.uint8)) + b"x", b"x", b"not a zstd frame at all"):
        with pytest.raises(CodecError):
            coder.decode(memoryview(stored), 4096)


def test_huffman_finds_no_matches_and_beats_levels_on_exponents() -> None:
    values = np.random.default_rng(1).standard_normal(TILE_BYTES, dtype=np.float32).view(np.uint32)
    exponents = (values >> 23).astype(np.uint8)
    huffman = len(TileCoder(huffman_parameters()).encode(exponents))
    assert huffman < 0.34 * TILE_BYTES
    assert huffman <= len(TileCoder(level_parameters(3)).encode(exponents))
