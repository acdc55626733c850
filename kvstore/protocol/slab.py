"""Layout of a slab: a 64-byte header, one u64 generation a slot, then the slots.

The generation of a slot is 0 while nobody may read it. The owner sets it to 0 before the first byte is
overwritten and to a number never used before once the new bytes are published; a reader reads it, copies,
puts a barrier, and reads it again. Two equal reads of the number it was promised prove the copy.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvstore.protocol.errors import ProtocolMismatch

MAGIC = b"KVSLAB01"
HEADER_BYTES = 64
GENERATION_BYTES = 8
PAGE_BYTES = 4096
TARGET_SLAB_BYTES = 64 << 20

_HEADER = struct.Struct("<8sQQQQ")  # magic, slab id, slot bytes, slots, data offset


def align_up(value: int, unit: int) -> int:
    """`value` rounded up to a multiple of `unit`."""
    return -(-value // unit) * unit


def slot_bytes_for(block_nbytes: int) -> int:
    """Size class of a block: whole pages, so that a slot can be a DMA target and a hole."""
    return align_up(max(block_nbytes, 1), PAGE_BYTES)


def slab_target_bytes(warm_bytes: int) -> int:
    """Nominal slab size for a warm pool of `warm_bytes`.

    At most an eighth of the pool, so that a small one can serve several tenants and size classes too.
    """
    return max(min(TARGET_SLAB_BYTES, warm_bytes // 8), warm_bytes // 1024)


@dataclass(frozen=True, slots=True)
class SlabGeometry:
    """How a slab is cut; all in bytes but `slots`."""

    slot_bytes: int
    slots: int
    data_offset: int
    segment_bytes: int

    @classmethod
    def for_class(cls, slot_bytes: int, target_bytes: int) -> SlabGeometry:
        """Geometry of a slab of size class `slot_bytes` (a multiple of PAGE_BYTES)."""
        slots = max(1, target_bytes // slot_bytes)
        data_offset = align_up(HEADER_BYTES + GENERATION_BYTES * slots, PAGE_BYTES)
        return cls(slot_bytes, slots, data_offset, data_offset + slots * slot_bytes)

    def offset(self, slot: int) -> int:
        """Byte offset of a slot in the segment."""
        return self.data_offset + slot * self.slot_bytes


def write_header(segment: memoryview, slab_id: int, geometry: SlabGeometry) -> None:
    """Stamp a fresh segment (all generations 0)."""
    _HEADER.pack_into(segment, 0, MAGIC, slab_id, geometry.slot_bytes, geometry.slots, geometry.data_offset)


def read_header(segment: memoryview) -> tuple[int, SlabGeometry]:
    """Slab id and geometry of a mapped segment: a reader compares them with what it was told before it trusts a slot.

    Raises:
        ProtocolMismatch: it is not a slab of this version (a slab punched by its owner reads as zeros), or it is
            cut off before its last slot.
    """
    if len(segment) < HEADER_BYTES:
        raise ProtocolMismatch(f"a segment of {len(segment)} bytes is no slab")
    magic, slab_id, slot_bytes, slots, data_offset = _HEADER.unpack_from(segment, 0)
    if magic != MAGIC:
        raise ProtocolMismatch(f"not a slab: magic {magic!r}, expected {MAGIC!r}")
    end = data_offset + slots * slot_bytes
    if not HEADER_BYTES + GENERATION_BYTES * slots <= data_offset <= end <= len(segment):
        raise ProtocolMismatch(f"slab {slab_id} claims to end at byte {end} of {len(segment)}")
    return slab_id, SlabGeometry(slot_bytes, slots, data_offset, len(segment))


def generations(segment: memoryview, slots: int) -> memoryview:
    """The generations as a memoryview of u64, one per slot (native order: both sides share one machine)."""
    return segment[HEADER_BYTES : HEADER_BYTES + GENERATION_BYTES * slots].cast("Q")
