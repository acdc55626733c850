"""Tiles: a plane of bytes cut into equal pieces, each one zstd frame, with a table of their lengths in front.

Layout of the table, all u32 little-endian: tile size in bytes, then one length per tile. A tile that did not
shrink is stored as it is, which its length says: equal to the tile's size.

Tiles exist so that decoding needs 128 KiB of scratch instead of a whole block, which stays in the L2 cache. Merging
two planes ran at 0.21 / 0.23 / 0.24 of memcpy with tiles of 32 / 64 / 128 KiB; the larger ones cost 0.2 % of the
ratio and let two threads scale.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from kvstore.codec.base import CodecError

TILE_BYTES = 128 << 10
MIN_TILE_BYTES = 4 << 10  # bounds the table of a hostile payload, together with the payload's own length
MAX_TILE_BYTES = 1 << 20

_U32 = struct.Struct("<I")


def huffman_parameters() -> zstandard.ZstdCompressionParameters:
    """Zstd reduced to its Huffman coder.

    Exponents of K/V have an entropy of 2.6 to 2.8 bits and no repeats: every match zstd finds is a spurious one (level
    3 reaches a ratio of 1.415 where this reaches 1.48). A target length of 1, like any negative level, would switch
    the coding of literals off.
    """
    return zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        window_log=17,
        chain_log=6,
        hash_log=6,
        search_log=1,
        min_match=7,
        target_length=0,
        write_content_size=1,
        write_checksum=0,
        write_dict_id=0,
    )


def level_parameters(level: int) -> zstandard.ZstdCompressionParameters:
    """Plain zstd of a level, without a checksum of its own (the frame around has one)."""
    return zstandard.ZstdCompressionParameters.from_level(
        level, write_content_size=1, write_checksum=0, write_dict_id=0
    )


class TileCoder:
    """Compresses and decompresses single tiles. Belongs to one thread: so do the zstd contexts in it."""

    def __init__(self, parameters: zstandard.ZstdCompressionParameters) -> None:
        """Make the contexts; they are reused for every tile."""
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, tile: NDArray[np.uint8]) -> bytes:
        """One zstd frame, or the tile's own bytes where that is not shorter."""
        frame: bytes = self._compressor.compress(tile.data)
        return frame if len(frame) < tile.nbytes else tile.tobytes()

    def decode(self, stored: memoryview, nbytes: int) -> NDArray[np.uint8]:
        """The `nbytes` bytes of a tile, read-only; may be a view of `stored`.

        Raises:
            CodecError: not a frame of exactly `nbytes` bytes. Nothing was allocated for what it claims to hold.
        """
        if stored.nbytes == nbytes:
            return np.frombuffer(stored, dtype=np.uint8)
        try:
            if zstandard.frame_content_size(stored) != nbytes:
                raise CodecError(f"tile does not hold {nbytes} bytes")
            plain = self._decompressor.decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CodecError(f"damaged tile: {error}") from error
        if len(plain) != nbytes:
            raise CodecError(f"tile of {len(plain)} bytes where {nbytes} belong")
        return np.frombuffer(plain, dtype=np.uint8)


class Tile(NamedTuple):
    """Where one tile belongs: plane[start : start + nbytes], stored in `length` bytes."""

    start: int
    nbytes: int
    length: int


class TileTable(NamedTuple):
    """A parsed table: its own size in bytes, the tiles, and the bytes that they take together."""

    nbytes: int
    tiles: list[Tile]
    stored_bytes: int


def pack_table(lengths: Sequence[int], tile_bytes: int) -> bytes:
    """The table for tiles of these stored lengths."""
    return _U32.pack(tile_bytes) + np.asarray(lengths, dtype="<u4").tobytes()


def read_table(payload: memoryview, plane_bytes: int) -> TileTable:
    """Parse the table in front of a payload that encodes a plane of `plane_bytes`.

    Raises:
        CodecError: the table is cut off, or a tile's size or length is impossible.
    """
    if payload.nbytes < _U32.size:
        raise CodecError("payload ends inside its tile table")
    (tile_bytes,) = _U32.unpack_from(payload)
    if not MIN_TILE_BYTES <= tile_bytes <= MAX_TILE_BYTES:
        raise CodecError(f"tile size {tile_bytes} is outside {MIN_TILE_BYTES}..{MAX_TILE_BYTES}")
    count = -(-plane_bytes // tile_bytes)
    end = _U32.size * (1 + count)
    if payload.nbytes < end:
        raise CodecError("payload ends inside its tile table")
    lengths = np.frombuffer(payload[_U32.size : end], dtype="<u4").tolist()
    tiles = []
    for index, length in enumerate(lengths):
        start = index * tile_bytes
        nbytes = min(tile_bytes, plane_bytes - start)
        if not 0 < length <= nbytes:
            raise CodecError(f"tile {index} of {nbytes} bytes claims {length} stored ones")
        tiles.append(Tile(start, nbytes, length))
    return TileTable(end, tiles, sum(lengths))
