r"""The header of a frame: what a stored block is, whose it is, and how it is cut.

Little-endian:

offset  bytes  field
0       8      magic "KVFRAME\0"
8       2      frame version (2)
10      2      header bytes, all of them
12      2      codec id, of the largest section
14      2      codec version
16      4      flags (1: the block has no parent; 2: lossy, the checksum is of what decoding gives)
20      2      number of sections
22      2      bytes of the layout text
24      32     namespace digest
56      32     key
88      32     parent key
120     8      namespace epoch
128     8      raw bytes
136     8      payload bytes
144     16     xxh3-128 of the raw bytes (big-endian digest)
160     8      xxh3-64 of the payload
168            layout text, UTF-8
               sections
        8      xxh3-64 of the header up to here

A section is one tensor: u16 codec id, u16 codec version, u8 dtype (place in shapes.DTYPES), i8 each for the places of
the axes kv, layer and token (-1: none), u8 number of axes, three zeros, u64 offset in the block, u64 raw bytes, u64
stored bytes, and a u32 for the size of every axis. Sections cover the block, and their payloads the payload, in order
and without a gap.

Every version keeps magic, version and header bytes where they are, and ends its header with the hash of it. So a frame
of another version is told apart from a damaged one.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Final, NamedTuple

import xxhash

from kvstore.codec.base import UnknownFormatError
from kvstore.codec.shapes import DTYPES, ITEM_BYTES, MAX_AXES, MAX_TENSORS, NO_AXIS, Tensor

MAGIC: Final = b"KVFRAME\0"
FRAME_VERSION: Final = 2
MAX_HEADER_BYTES: Final = 8192  # of any version; 64 sections of 16 axes take 7,088
MAX_LAYOUT_BYTES: Final = 512
FLAG_ROOT: Final = 1
FLAG_LOSSY: Final = 2

_PRELUDE: Final = struct.Struct("<8sHH")
_FIXED: Final = struct.Struct("<8sHHHHIHH32s32s32sQQQ16sQ")
_SECTION: Final = struct.Struct("<HHBbbbBxxxQQQ")
_HASH: Final = struct.Struct("<Q")


class FrameError(ValueError):
    """A frame that is damaged, or is not the one that was asked for."""


class Section(NamedTuple):
    """One tensor of a block, and how it is stored."""

    codec_id: int
    codec_version: int
    tensor: Tensor
    stored_bytes: int

    def pack(self) -> bytes:
        """The section's bytes in the header."""
        tensor = self.tensor
        places = DTYPES.index(tensor.dtype), tensor.kv, tensor.layer, tensor.token, len(tensor.shape)
        fixed = _SECTION.pack(
            self.codec_id, self.codec_version, *places, tensor.start, tensor.nbytes, self.stored_bytes
        )
        return fixed + struct.pack(f"<{len(tensor.shape)}I", *tensor.shape)


class FrameHeader(NamedTuple):
    """A parsed header; `parent` is empty for the root."""

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
    lossy: bool
    layout: str
    sections: tuple[Section, ...]

    def pack(self) -> bytes:
        """The header's bytes."""
        flags = (0 if self.parent else FLAG_ROOT) | (FLAG_LOSSY if self.lossy else 0)
        layout = self.layout.encode("utf-8", "replace")[:MAX_LAYOUT_BYTES]
        tail = layout + b"".join(section.pack() for section in self.sections)
        nbytes = _FIXED.size + len(tail) + _HASH.size
        assert nbytes <= MAX_HEADER_BYTES
        codec = (self.codec_id, self.codec_version, flags, len(self.sections), len(layout))
        fields = (self.namespace, self.key, self.parent, self.epoch, self.raw_bytes, self.payload_bytes)
        head = _FIXED.pack(MAGIC, FRAME_VERSION, nbytes, *codec, *fields, self.checksum, self.payload_hash) + tail
        return head + _HASH.pack(xxhash.xxh3_64_intdigest(head))

    @classmethod
    def parse(cls, frame: memoryview, prelude: tuple[int, memoryview] | None = None) -> tuple[FrameHeader, memoryview]:
        """Read and check the header of a whole frame of version 2; the header, and the payload.

        Nothing is allocated for what it claims. `prelude` is what read_prelude() has said, where it was asked before.

        Raises:
            FrameError: damaged, cut off, or not a frame.
            UnknownFormatError: an intact frame of a version, with flags or of a dtype that this build does not know.
        """
        version, head = prelude or read_prelude(frame)
        if version != FRAME_VERSION:
            raise UnknownFormatError(f"frame version {version} is not known to this build (it knows {FRAME_VERSION})")
        if head.nbytes < _FIXED.size:
            raise FrameError(f"header of {head.nbytes} bytes is too short")
        _, _, nbytes, codec_id, codec_version, flags, count, layout_bytes, *names = _FIXED.unpack_from(head)
        namespace, key, parent, epoch, raw, stored, checksum, digest = names
        if flags & ~(FLAG_ROOT | FLAG_LOSSY):
            raise UnknownFormatError(f"frame flags {flags:#x} are not known to this build")
        payload = frame[nbytes:]
        if stored != payload.nbytes:
            raise FrameError(f"payload of {payload.nbytes} bytes where {stored} belong")
        behind = _FIXED.size + layout_bytes
        if behind > head.nbytes or count > MAX_TENSORS:
            raise FrameError(f"a layout of {layout_bytes} bytes and {count} sections do not fit into the header")
        sections = _read_sections(head[behind:], count, raw, stored)
        parent = b"" if flags & FLAG_ROOT else parent
        layout = bytes(head[_FIXED.size : behind]).decode("utf-8", "replace")
        fields = (namespace, key, parent, epoch, raw, stored, checksum, digest, bool(flags & FLAG_LOSSY))
        return cls(codec_id, codec_version, *fields, layout, sections), payload


def read_prelude(frame: memoryview) -> tuple[int, memoryview]:
    """Frame version, and the header without its hash, which has been checked; of any version.

    Raises:
        FrameError: it is not a frame, or the header is damaged or cut off.
    """
    if frame.nbytes < _PRELUDE.size + _HASH.size:
        raise FrameError(f"{frame.nbytes} bytes are too few for a frame")
    magic, version, header_bytes = _PRELUDE.unpack_from(frame)
    if magic != MAGIC:
        raise FrameError("not a frame")
    if not _PRELUDE.size + _HASH.size <= header_bytes <= min(frame.nbytes, MAX_HEADER_BYTES):
        raise FrameError(f"impossible header of {header_bytes} bytes")
    head = frame[: header_bytes - _HASH.size]
    if (xxhash.xxh3_64_intdigest(head),) != _HASH.unpack_from(frame, head.nbytes):
        raise FrameError("the header is damaged")
    return int(version), head


def _read_sections(table: memoryview, count: int, raw_bytes: int, payload_bytes: int) -> tuple[Section, ...]:
    """Parse `count` sections that take exactly `table`, `raw_bytes` and `payload_bytes`."""
    sections = []
    position = start = stored = 0
    for _ in range(count):
        if table.nbytes < position + _SECTION.size:
            raise FrameError("the header ends inside its sections")
        codec_id, version, dtype, kv, layer, token, axes, *sizes = _SECTION.unpack_from(table, position)
        position += _SECTION.size
        if axes > MAX_AXES or table.nbytes < position + 4 * axes:
            raise FrameError(f"a section of {axes} axes, or a header that ends inside it")
        shape = struct.unpack_from(f"<{axes}I", table, position)
        position += 4 * axes
        if dtype >= len(DTYPES):
            raise UnknownFormatError(f"dtype {dtype} is not known to this build")
        tensor = _tensor(DTYPES[dtype], (sizes[0], sizes[1]), shape, (kv, layer, token))
        if tensor.start != start:
            raise FrameError(f"a section at {tensor.start} where {start} belongs")
        sections.append(Section(codec_id, version, tensor, sizes[2]))
        start += tensor.nbytes
        stored += sizes[2]
    if (position, start, stored) != (table.nbytes, raw_bytes, payload_bytes):
        raise FrameError("the sections do not add up to the block, or to the payload")
    return tuple(sections)


@lru_cache(maxsize=1024)  # blocks of one layout have the same tensors
def _tensor(dtype: str, extent: tuple[int, int], shape: tuple[int, ...], axes: tuple[int, int, int]) -> Tensor:
    tensor = Tensor(dtype, *extent, shape, *axes)
    named = [axis for axis in axes if axis != NO_AXIS]
    if len(set(named)) != len(named) or not all(0 <= axis < len(tensor.shape) for axis in named):
        raise FrameError("a section names an axis that it does not have, or one twice")
    if tensor.shape and math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] != tensor.nbytes:
        raise FrameError(f"a section of shape {tensor.shape} has {tensor.nbytes} bytes")
    return tensor
