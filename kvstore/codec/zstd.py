"""Zstd over whole bytes, for what is not a two-byte float.

fp8 and int8 get Huffman codes alone (e4m3 1.19, e5m2 1.38); wider types and unknown ones get a low level, which
also finds repeats. Payload: tile table, tiles.
"""

from __future__ import annotations

import numpy as np
import zstandard
from numpy.typing import NDArray

from kvstore.codec.base import CodecError
from kvstore.codec.tiles import (
    MAX_TILE_BYTES,
    TILE_BYTES,
    TileCoder,
    huffman_parameters,
    level_parameters,
    pack_table,
    read_table,
)

_MAX_LEVEL = 3  # higher levels only find more spurious matches in K/V


class ZstdCodec:
    """Stores a block as zstd frames. One instance per thread.

    Every variant has the same codec id: they differ in how they write, not in how they are read.
    """

    codec_id = 4
    version = 1

    def __init__(self, name: str, parameters: zstandard.ZstdCompressionParameters, tile_bytes: int) -> None:
        """Use `huffman()` or `level()`."""
        self.name = name
        self._tile_bytes = tile_bytes
        self._coder = TileCoder(parameters)

    @classmethod
    def huffman(cls) -> ZstdCodec:
        """Huffman codes alone."""
        return cls("zstd-huffman", huffman_parameters(), TILE_BYTES)

    @classmethod
    def level(cls, level: int) -> ZstdCodec:
        """Plain zstd of level 1 to 3, in tiles of 1 MiB so that it has a window to search."""
        if not 1 <= level <= _MAX_LEVEL:
            raise ValueError(f"zstd level {level} is outside 1..{_MAX_LEVEL}")
        return cls(f"zstd-{level}", level_parameters(level), MAX_TILE_BYTES)

    def encode(self, raw: NDArray[np.uint8]) -> list[bytes | memoryview]:
        """Compress; never larger than the block by more than the tile table."""
        size = self._tile_bytes
        frames = [self._coder.encode(raw[start : start + size]) for start in range(0, raw.nbytes, size)]
        return [pack_table([len(frame) for frame in frames], size), *frames]

    def decode(self, payload: memoryview, out: NDArray[np.uint8]) -> None:
        """Decompress tile by tile into `out`.

        Raises:
            CodecError: the payload is damaged or does not fill `out` exactly.
        """
        table = read_table(payload, out.nbytes)
        if payload.nbytes != table.nbytes + table.stored_bytes:
            raise CodecError(f"payload of {payload.nbytes} bytes does not encode a block of {out.nbytes}")
        position = table.nbytes
        for tile in table.tiles:
            plain = self._coder.decode(payload[position : position + tile.length], tile.nbytes)
            np.copyto(out[tile.start : tile.start + tile.nbytes], plain)
            position += tile.length
