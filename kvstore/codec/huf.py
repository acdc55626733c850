"""Whole bytes through zstd, for what is not a two-byte float.

One-byte dtypes get Huffman codes alone (fp8 e4m3 1.19, e5m2 1.38). Wider ones, and bytes of which nothing is known, get
zstd's level 1, which also finds repeats.

Payload, little-endian: a u32 for each tile of 128 KiB, its stored bytes; the tiles, a zstd frame each. A tile that did
not shrink is stored as it is, which its length says.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.codec.base import Bytes, CodecError, Pieces
from kvstore.codec.shapes import Tensor
from kvstore.codec.zstd import ZstdContexts

TILE_BYTES: Final = 128 << 10

ONE_BYTE_DTYPES: Final = ("float8_e4m3", "float8_e5m2", "int8", "uint8")

_LENGTH: Final = np.dtype("<u4")


class HufCodec:
    """Stores bytes as zstd frames. One instance per thread."""

    name = "huf"
    codec_id = 6
    version = 1

    def __init__(self, zstd: ZstdContexts) -> None:
        self._zstd = zstd

    def encode(self, raw: Bytes, tensor: Tensor) -> Pieces:
        """Compress; never larger than the tensor by more than the table."""
        compress = self._zstd.huffman if tensor.dtype in ONE_BYTE_DTYPES else self._zstd.level_1
        tiles: Pieces = []
        for start in range(0, raw.nbytes, TILE_BYTES):
            tile = raw[start : start + TILE_BYTES]
            frame = compress(tile)
            tiles.append(frame if len(frame) < tile.nbytes else tile.data)
        return [np.array([len(tile) for tile in tiles], dtype=_LENGTH).tobytes(), *tiles]

    def decode(self, payload: memoryview, tensor: Tensor, out: Bytes) -> None:
        """Decompress tile by tile into `out`.

        Raises:
            CodecError: the payload is damaged or does not fill `out` exactly.
        """
        lengths = read_lengths(payload, -(-out.nbytes // TILE_BYTES))
        position = lengths.nbytes
        if position + int(lengths.sum(dtype=np.uint64)) != payload.nbytes:
            raise CodecError(f"payload of {payload.nbytes} bytes does not encode a tensor of {out.nbytes}")
        for index, length in enumerate(lengths.tolist()):
            target = out[index * TILE_BYTES : (index + 1) * TILE_BYTES]
            stored = payload[position : position + length]
            if length == target.nbytes:
                np.copyto(target, np.frombuffer(stored, dtype=np.uint8))
            else:
                np.copyto(target, self._zstd.decompress(stored, target.nbytes))
            position += length


def read_lengths(payload: memoryview, count: int) -> NDArray[np.uint32]:
    """The u32 numbers that a payload begins with.

    Raises:
        CodecError: it ends before.
    """
    if payload.nbytes < count * _LENGTH.itemsize:
        raise CodecError("payload ends inside its table of lengths")
    return np.frombuffer(payload[: count * _LENGTH.itemsize], dtype=_LENGTH)
