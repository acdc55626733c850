"""What the cold tier writes beside the blocks: one small record per block, and totals.

Records live in a database of their own, so that recovery reads 88 bytes a block and no payloads. LMDB has no
page checksums, so every record carries one, over its key as well.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from kvstore.tiers.base import BlockRef, StoredRecord, TierItem

PAGE_BYTES = 4096
NAME_BYTES = 32  # of a namespace digest, of a key

_RECORD = struct.Struct("<BB6x32s16sQQQ")  # version, root, parent, checksum, nbytes, stored bytes, epoch
_HASH = struct.Struct("<Q")
RECORD_BYTES = _RECORD.size + _HASH.size
_VERSION = 1
_TOTALS = struct.Struct("<QQQ")

# A node of up to 2,038 bytes (8 of them its head) stays in its leaf page; a larger value gets whole pages of its own,
# 16 bytes of the first being their header.
_INLINE_BYTES = 2038 - 8 - 2 * NAME_BYTES
_OVERFLOW_HEADER_BYTES = 16
_ENTRY_BYTES = 2 * (2 * NAME_BYTES + 10) + 8 + RECORD_BYTES  # a block's nodes in the two leaves
_LEAF_SLACK = 2  # random keys leave leaves half empty at worst


class Totals(NamedTuple):
    """Sums over all blocks, kept in the same transactions as the blocks."""

    blocks: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0

    def plus(self, raw_bytes: int, stored_bytes: int) -> Totals:
        """With one more block."""
        return Totals(self.blocks + 1, self.raw_bytes + raw_bytes, self.stored_bytes + stored_bytes)

    def minus(self, raw_bytes: int, stored_bytes: int) -> Totals:
        """With one block less; never below zero, whatever a damaged record said."""
        return Totals(
            max(0, self.blocks - 1), max(0, self.raw_bytes - raw_bytes), max(0, self.stored_bytes - stored_bytes)
        )

    def pack(self) -> bytes:
        """For the medium."""
        return _TOTALS.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | None) -> Totals:
        """From the medium.

        Raises:
            ValueError: of another length than totals have.
        """
        if data is None:
            return cls()
        if len(data) != _TOTALS.size:
            raise ValueError(f"totals of {len(data)} bytes")
        return cls(*_TOTALS.unpack(data))


def footprint_bytes(frame_bytes: int) -> int:
    """What a frame of this size takes in the environment: pages, and its share of the trees."""
    share = _ENTRY_BYTES * _LEAF_SLACK
    if frame_bytes <= _INLINE_BYTES:
        return frame_bytes * _LEAF_SLACK + share
    return -(-(frame_bytes + _OVERFLOW_HEADER_BYTES) // PAGE_BYTES) * PAGE_BYTES + share


def entry_key(ref: BlockRef) -> bytes:
    """The block's key in LMDB: namespace, then key.

    Raises:
        ValueError: one of them is not 32 bytes.
    """
    if len(ref.namespace) != NAME_BYTES or len(ref.key) != NAME_BYTES:
        raise ValueError(f"namespace and key must be {NAME_BYTES} bytes, not {len(ref.namespace)} and {len(ref.key)}")
    return ref.namespace + ref.key


def pack_record(entry: bytes, item: TierItem, stored_bytes: int) -> bytes:
    """The record of a block that is about to be stored under `entry`."""
    root = not item.parent
    body = _RECORD.pack(_VERSION, root, item.parent, item.checksum, item.range.nbytes, stored_bytes, item.epoch)
    return body + _HASH.pack(xxhash.xxh3_64_intdigest(entry + body))


def unpack_record(entry: bytes, data: bytes) -> StoredRecord:
    """Parse a record.

    Raises:
        ValueError: damaged, or of a version that this build does not know.
    """
    if len(entry) != 2 * NAME_BYTES or len(data) != RECORD_BYTES:
        raise ValueError(f"record of {len(data)} bytes under a key of {len(entry)}")
    body = data[: _RECORD.size]
    if _HASH.pack(xxhash.xxh3_64_intdigest(entry + body)) != data[_RECORD.size :]:
        raise ValueError("damaged record")
    version, root, parent, checksum, nbytes, stored_bytes, epoch = _RECORD.unpack(body)
    if version != _VERSION:
        raise ValueError(f"record version {version} is not known to this build")
    ref = BlockRef(entry[:NAME_BYTES], entry[NAME_BYTES:])
    return StoredRecord(ref, b"" if root else parent, checksum, nbytes, stored_bytes, epoch)
