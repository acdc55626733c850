"""Two-byte floats split into two planes: the exponents, compressed, and all the rest, which is noise.

The mantissa of a cached K or V is noise (6.97 of 7 bits), its exponent is not (2.6 to 2.8 of 8). Compressing only the
exponents, with Huffman codes alone, stores bf16 K/V at a ratio of 1.48 to 1.50 against a ceiling of 1.53, and leaves
half of the bytes to a plain merge when it decodes.

Payload: tile table of the exponent plane, plane of the rest (one byte per value), the tiles, and the odd last
byte of a block that has one.

dtype     exponent byte                          byte of the rest
bfloat16  the 8 exponent bits                    sign, 7 bits of mantissa
float16   sign, 5 exponent bits, 2 of mantissa   8 bits of mantissa
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.codec.base import CodecError
from kvstore.codec.tiles import TILE_BYTES, TileCoder, huffman_parameters, pack_table, read_table


class Split(NamedTuple):
    """How a 16-bit value falls into two bytes: `value >> shift`, and the bits under the two masks."""

    name: str
    codec_id: int
    shift: int
    low_mask: int  # bits of the value's low byte that go to the rest
    high_mask: int  # bits of its high byte that do


BFLOAT16 = Split("planes-bf16", codec_id=2, shift=7, low_mask=0x7F, high_mask=0x80)
FLOAT16 = Split("planes-fp16", codec_id=3, shift=8, low_mask=0xFF, high_mask=0x00)


class PlanesCodec:
    """Stores a block of two-byte floats as two planes. One instance per thread.

    A tile of exponents that does not compress is stored as it is, so the payload is never larger than the block
    by more than the tile table: 4 bytes and 4 per 256 KiB.
    """

    version = 1

    def __init__(self, split: Split) -> None:
        self.name = split.name
        self.codec_id = split.codec_id
        self._split = split
        self._coder = TileCoder(huffman_parameters())
        self._exponents = np.empty(TILE_BYTES, dtype=np.uint8)
        self._high = np.empty(TILE_BYTES, dtype=np.uint8)
        self._wide = np.empty(TILE_BYTES, dtype=np.int16)

    def encode(self, raw: NDArray[np.uint8]) -> list[bytes | memoryview]:
        """Split and compress; `raw` may be of any length and hold any bits (NaNs and payloads are kept)."""
        values = _values(raw)
        rest = np.empty(values.size, dtype=np.uint8)
        frames: list[bytes] = []
        for start in range(0, values.size, TILE_BYTES):
            tile = values[start : start + TILE_BYTES]
            frames.append(self._coder.encode(self._split_tile(tile, rest[start : start + tile.size])))
        table = pack_table([len(frame) for frame in frames], TILE_BYTES)
        return [table, rest.data, *frames, raw[2 * values.size :].tobytes()]

    def decode(self, payload: memoryview, out: NDArray[np.uint8]) -> None:
        """Merge the planes straight into `out`, one tile at a time.

        Raises:
            CodecError: the payload is damaged or does not fill `out` exactly.
        """
        values = _values(out)
        table = read_table(payload, values.size)
        frames_start = table.nbytes + values.size
        tail_start = frames_start + table.stored_bytes
        if payload.nbytes != tail_start + out.nbytes % 2:
            raise CodecError(f"payload of {payload.nbytes} bytes does not encode a block of {out.nbytes}")
        rest = np.frombuffer(payload[table.nbytes : frames_start], dtype=np.int8)
        position = frames_start
        for tile in table.tiles:
            exponents = self._coder.decode(payload[position : position + tile.length], tile.nbytes)
            self._merge_tile(exponents, rest[tile.start : tile.start + tile.nbytes], values[tile.start :])
            position += tile.length
        if out.nbytes % 2:
            out[-1] = payload[tail_start]

    def _split_tile(self, tile: NDArray[np.uint16], rest: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Fill `rest`; the exponents are returned in scratch that the next tile overwrites."""
        exponents, high = self._exponents[: tile.size], self._high[: tile.size]
        np.copyto(rest, tile, casting="unsafe")  # the low bytes
        np.bitwise_and(rest, self._split.low_mask, out=rest)
        if self._split.high_mask:
            np.right_shift(tile, 8, out=high, casting="unsafe")
            np.bitwise_and(high, self._split.high_mask, out=high)
            np.bitwise_or(rest, high, out=rest)
        np.right_shift(tile, self._split.shift, out=exponents, casting="unsafe")
        return exponents

    def _merge_tile(self, exponents: NDArray[np.uint8], rest: NDArray[np.int8], values: NDArray[np.uint16]) -> None:
        """Three passes. Sign extension puts the top bit of the rest where the sign belongs."""
        wide, into = self._wide[: rest.size], values[: rest.size]
        mask = np.uint16(self._split.low_mask | self._split.high_mask << 8).astype(np.int16)
        np.bitwise_and(rest, mask, out=wide)
        np.left_shift(exponents, np.uint16(self._split.shift), out=into)
        np.bitwise_or(into, wide.view(np.uint16), out=into)


def _values(block: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """The whole 16-bit values of a block, as a view (blocks and this machine are little-endian)."""
    return block[: block.nbytes & ~1].view(np.uint16)
