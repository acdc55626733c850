"""Reads frames of version 1, which the build before this one wrote: whole-block codecs, numpy only, nothing to write.

Header, little-endian, 176 bytes: magic, u16 version, u16 header bytes, u16 codec id, u16 codec version, u32 flags
(1: root), 4 zeros, namespace digest, key, parent key, u64 epoch, u64 raw bytes, u64 payload bytes, xxh3-128 of the
raw bytes, xxh3-64 of the payload, xxh3-64 of the header.

Its codecs, all of version 1: 1 raw; 2 and 3 planes of bfloat16 and float16, a table of tiles, one byte a value of what
is not exponent, the tiles, the odd last byte; 4 a table of tiles, and the tiles. A table is a u32 tile size and a u32
stored length a tile; a tile is a zstd frame, or its bytes.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.codec.base import Bytes, CodecError, UnknownFormatError
from kvstore.codec.header import FLAG_ROOT, FrameError, read_prelude
from kvstore.codec.huf import read_lengths
from kvstore.codec.zstd import ZstdContexts

VERSION: Final = 1

_HEADER: Final = struct.Struct("<8sHHHHI4x32s32s32sQQQ16sQ")
_HEADER_BYTES: Final = _HEADER.size + 8
_RAW, _BFLOAT16, _FLOAT16, _ZSTD = 1, 2, 3, 4
_SHIFTS: Final = {_BFLOAT16: 7, _FLOAT16: 8}
_MASKS: Final = {_BFLOAT16: 0x807F, _FLOAT16: 0x00FF}
_MIN_TILE_BYTES: Final = 4 << 10
_MAX_TILE_BYTES: Final = 1 << 20


class HeaderV1(NamedTuple):
    """What a header of version 1 says."""

    codec_id: int
    codec_version: int
    namespace: bytes
    key: bytes
    parent: bytes
    epoch: int
    raw_bytes: int
    payload_bytes: int
    checksum: bytes
    payload_hash: int


def parse(frame: memoryview) -> tuple[HeaderV1, memoryview]:
    """Header and payload of a frame of version 1.

    Raises:
        FrameError: damaged or cut off.
        UnknownFormatError: flags that version 1 does not have.
    """
    _, head = read_prelude(frame)
    if head.nbytes != _HEADER.size:
        raise FrameError(f"header of {head.nbytes + 8} bytes where version 1 has {_HEADER_BYTES}")
    _, _, _, codec_id, codec_version, flags, *fields = _HEADER.unpack_from(head)
    if flags & ~FLAG_ROOT:
        raise UnknownFormatError(f"frame flags {flags:#x} are not known to this build")
    header = HeaderV1(codec_id, codec_version, *fields)
    payload = frame[_HEADER_BYTES:]
    if header.payload_bytes != payload.nbytes:
        raise FrameError(f"payload of {payload.nbytes} bytes where {header.payload_bytes} belong")
    return header, payload


def decode(header: HeaderV1, payload: memoryview, zstd: ZstdContexts, out: Bytes) -> None:
    """Decode the payload into `out`, which has the header's raw size.

    Raises:
        FrameError: the payload is damaged.
        CodecError: it does not fill `out` exactly.
        UnknownFormatError: a codec that version 1 did not have.
    """
    if header.codec_version != 1 or header.codec_id not in (_RAW, _BFLOAT16, _FLOAT16, _ZSTD):
        raise UnknownFormatError(f"codec {header.codec_id} version {header.codec_version} is not known to this build")
    if xxhash.xxh3_64_intdigest(payload) != header.payload_hash:
        raise FrameError("the payload is damaged")
    if header.codec_id == _RAW:
        if payload.nbytes != out.nbytes:
            raise CodecError(f"raw payload of {payload.nbytes} bytes for a block of {out.nbytes}")
        np.copyto(out, np.frombuffer(payload, dtype=np.uint8))
    elif header.codec_id == _ZSTD:
        np.copyto(out, _plane(payload, 0, out.nbytes, zstd))
    else:
        _merge(header.codec_id, payload, zstd, out)


def _merge(codec_id: int, payload: memoryview, zstd: ZstdContexts, out: Bytes) -> None:
    values = out[: out.nbytes & ~1].view(np.uint16)
    tail_bytes = out.nbytes % 2
    exponents = _plane(payload[: payload.nbytes - tail_bytes], values.size, values.size, zstd)
    start = payload.nbytes - tail_bytes
    table_bytes = 4 * (1 + _tile_count(payload, values.size))
    rest = np.frombuffer(payload[table_bytes : table_bytes + values.size], dtype=np.int8).astype(np.int16)
    np.left_shift(exponents, np.uint16(_SHIFTS[codec_id]), out=values)
    values |= rest.view(np.uint16) & np.uint16(_MASKS[codec_id])
    out[values.nbytes :] = np.frombuffer(payload[start:], dtype=np.uint8)


def _tile_count(payload: memoryview, nbytes: int) -> int:
    (tile_bytes,) = read_lengths(payload, 1).tolist()
    if not _MIN_TILE_BYTES <= tile_bytes <= _MAX_TILE_BYTES:
        raise CodecError(f"tile size {tile_bytes} is outside {_MIN_TILE_BYTES}..{_MAX_TILE_BYTES}")
    return -(-nbytes // int(tile_bytes))


def _plane(payload: memoryview, between: int, nbytes: int, zstd: ZstdContexts) -> NDArray[np.uint8]:
    """The plane of `nbytes` whose table the payload begins with; `between` bytes lie before its tiles."""
    table = read_lengths(payload, 1 + _tile_count(payload, nbytes))
    tile_bytes, *lengths = table.tolist()
    position = table.nbytes + between
    if position + sum(lengths) != payload.nbytes:
        raise CodecError(f"payload of {payload.nbytes} bytes does not encode a plane of {nbytes}")
    plane = np.empty(nbytes, dtype=np.uint8)
    for index, length in enumerate(lengths):
        target = plane[index * tile_bytes : (index + 1) * tile_bytes]
        stored = payload[position : position + length]
        plain = np.frombuffer(stored, np.uint8) if length == target.nbytes else zstd.decompress(stored, target.nbytes)
        np.copyto(target, plain)
        position += length
    return plane
