"""What the cold tier writes beside the blocks: one small record per block, and totals.

Records live in an environment of their own, so that recovery reads 104 bytes a block and no payloads. LMDB has no
page checksums, so every record carries one, over its key as well.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import xxhash

from kvstore.tiers.base import BlockRef, StoredRecord

PAGE_BYTES: Final = 4096
NAME_BYTES: Final = 32  # of a namespace digest, of a key
ENTRY_BYTES: Final = 2 * NAME_BYTES

# version, flags, codec, hits, parent, checksum, nbytes, stored bytes, epoch, stored at, page
_RECORD = struct.Struct("<BBHI32s16sQQQQQ")
_RECORD_1 = struct.Struct("<BB6x32s16sQQQ")  # of format 1: version, root, parent, checksum, nbytes, stored bytes, epoch
_HASH = struct.Struct("<Q")
RECORD_BYTES: Final = _RECORD.size + _HASH.size
_VERSION = 2
_FLAG_ROOT, _FLAG_LOSSY = 1, 2
_HITS_MAX = (1 << 32) - 1
_TOTALS = struct.Struct("<QQQ")

# A node of up to 2,038 bytes (8 of them its head) stays in its leaf page; a larger value gets whole pages of its own,
# 16 bytes of the first being their header.
INLINE_BYTES: Final = 2038 - 8 - ENTRY_BYTES
OVERFLOW_HEADER_BYTES: Final = 16
_NODE_BYTES = 2 * (ENTRY_BYTES + 10) + 8 + RECORD_BYTES  # a block's nodes in the leaves of both environments
_LEAF_SLACK = 2  # random keys leave leaves half empty at worst
_SHARE_BYTES = _NODE_BYTES * _LEAF_SLACK
_SHARE_1_BYTES = 488  # the same in format 1


class Entry(NamedTuple):
    """A stored record, and the page where its payload lay when it was written (0: not known, or in a leaf page)."""

    record: StoredRecord
    page: int


class Totals(NamedTuple):
    """Sums over all blocks, kept in the same transactions as the records."""

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
    """What a frame of this size takes on the medium: pages, and its share of the trees of both environments."""
    if frame_bytes <= INLINE_BYTES:
        return frame_bytes * _LEAF_SLACK + _SHARE_BYTES
    return -(-(frame_bytes + OVERFLOW_HEADER_BYTES) // PAGE_BYTES) * PAGE_BYTES + _SHARE_BYTES


def payload_bytes(stored_bytes: int) -> int:
    """The pages of a block's own that footprint_bytes counted; 0 for a block in a leaf page."""
    return max(0, stored_bytes - _SHARE_BYTES) // PAGE_BYTES * PAGE_BYTES


def entry_key(ref: BlockRef) -> bytes:
    """The block's key in LMDB: namespace, then key.

    Raises:
        ValueError: one of them is not 32 bytes.
    """
    if len(ref.namespace) != NAME_BYTES or len(ref.key) != NAME_BYTES:
        raise ValueError(f"namespace and key must be {NAME_BYTES} bytes, not {len(ref.namespace)} and {len(ref.key)}")
    return ref.namespace + ref.key


def entry_ref(entry: bytes) -> BlockRef:
    """The block that an LMDB key names."""
    return BlockRef(entry[:NAME_BYTES], entry[NAME_BYTES:])


def pack_record(record: StoredRecord, page: int = 0) -> bytes:
    """A block's record for the medium."""
    flags = (0 if record.parent else _FLAG_ROOT) | (_FLAG_LOSSY if record.lossy else 0)
    body = _RECORD.pack(
        _VERSION,
        flags,
        record.codec,
        min(record.hits, _HITS_MAX),
        record.parent,
        record.checksum,
        record.nbytes,
        record.stored_bytes,
        record.epoch,
        record.stored_s,
        page,
    )
    return body + _seal(entry_key(record.ref), body)


def unpack_record(entry: bytes, data: bytes) -> Entry:
    """Parse a record.

    Raises:
        ValueError: damaged, or of a version that this build does not know.
    """
    if len(entry) != ENTRY_BYTES or len(data) != RECORD_BYTES:
        raise ValueError(f"record of {len(data)} bytes under a key of {len(entry)}")
    body = data[: _RECORD.size]
    if _seal(entry, body) != data[_RECORD.size :]:
        raise ValueError("damaged record")
    version, flags, codec, hits, parent, checksum, nbytes, stored_bytes, epoch, stored_s, page = _RECORD.unpack(body)
    if version != _VERSION:
        raise ValueError(f"record version {version} is not known to this build")
    parent = b"" if flags & _FLAG_ROOT else parent
    lossy = bool(flags & _FLAG_LOSSY)
    ref = BlockRef(entry[:NAME_BYTES], entry[NAME_BYTES:])
    return Entry(
        StoredRecord(ref, parent, checksum, nbytes, stored_bytes, epoch, codec, hits, stored_s, lossy),
        page,
    )


def unpack_record_1(entry: bytes, data: bytes) -> StoredRecord:
    """Parse a record of format 1, which had no codec, times or uses.

    Raises:
        ValueError: damaged.
    """
    if len(entry) != ENTRY_BYTES or len(data) != _RECORD_1.size + _HASH.size:
        raise ValueError(f"record of {len(data)} bytes under a key of {len(entry)}")
    body = data[: _RECORD_1.size]
    version, root, parent, checksum, nbytes, stored_bytes, epoch = _RECORD_1.unpack(body)
    if _seal(entry, body) != data[_RECORD_1.size :] or version != 1:
        raise ValueError("damaged record")
    stored_bytes += _SHARE_BYTES - _SHARE_1_BYTES
    return StoredRecord(entry_ref(entry), b"" if root else parent, checksum, nbytes, stored_bytes, epoch)


def _seal(entry: bytes, body: bytes) -> bytes:
    return _HASH.pack(xxhash.xxh3_64_intdigest(entry + body))
