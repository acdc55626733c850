"""Copies a put's blocks out of staging into their slots, hashing the daemon's own copy on the way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.core.puts import PutItem, PutStatus, Reject
from kvstore.protocol.errors import InvalidRequest
from kvstore.tiers.warm import WarmPool
from kvstore.v1 import kvstore_pb2

CHECKSUM_BYTES = 16
# Hashed while it is still in the cache that the copy left it in; of 128 KiB to 2 MiB this was fastest.
_STEP_BYTES = 256 << 10


@dataclass(slots=True)
class Source:
    """Where the blocks of a put lie in the worker's staging segment."""

    staging: NDArray[np.uint8]
    offset: int
    stride: int
    block_nbytes: int
    checksums: bytes

    def block(self, i: int) -> NDArray[np.uint8]:
        """The bytes of block i, as the worker may still be changing them."""
        start = self.offset + i * self.stride
        return self.staging[start : start + self.block_nbytes]

    def expected(self, i: int) -> bytes:
        """The worker's checksum of block i; empty: it gave none."""
        return self.checksums[i * CHECKSUM_BYTES : (i + 1) * CHECKSUM_BYTES]


def source_of(
    request: kvstore_pb2.PutRequest, staging: NDArray[np.uint8] | None, count: int, block_nbytes: int
) -> Source:
    """Check a put's staging range.

    Raises:
        InvalidRequest: sizes that do not fit each other, or the segment.
    """
    if request.block_nbytes != block_nbytes:
        raise InvalidRequest(
            f"blocks of {request.block_nbytes} bytes were put; this namespace has blocks of {block_nbytes} bytes"
        )
    if staging is None:
        raise InvalidRequest("the session has no staging segment; open it with staging_bytes above 0")
    stride = request.staging_stride or block_nbytes
    stop = request.staging_offset + (count - 1) * stride + block_nbytes
    if stride < block_nbytes or stop > staging.nbytes:
        raise InvalidRequest(
            f"{count} blocks of {block_nbytes} bytes every {stride} bytes from {request.staging_offset} "
            f"do not fit a staging segment of {staging.nbytes} bytes"
        )
    if len(request.checksums) not in (0, CHECKSUM_BYTES * count):
        raise InvalidRequest(
            f"{len(request.checksums)} bytes of checksums for {count} blocks; {CHECKSUM_BYTES} bytes each, or none"
        )
    return Source(staging, request.staging_offset, stride, block_nbytes, request.checksums)


def copy_in(items: Sequence[PutItem], source: Source, pool: WarmPool, deadline_s: float) -> None:
    """Fill the items' slots; an item without a checksum afterwards was not filled, and its reason says why."""
    for i, item in enumerate(items):
        if item.slot is None or item.status is PutStatus.EXISTS:
            continue
        if time.monotonic() >= deadline_s:
            item.reason = Reject.DEADLINE
            continue
        target = pool.view(pool.range_of(item.slot.slab_id, item.slot.index, source.block_nbytes))
        checksum = _copy_hashed(source.block(i), target)
        expected = source.expected(i)
        if expected and expected != checksum:
            item.reason = Reject.CHECKSUM
        else:
            item.checksum = checksum


def _copy_hashed(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> bytes:
    digest = xxhash.xxh3_128()
    for start in range(0, source.nbytes, _STEP_BYTES):
        piece = target[start : start + _STEP_BYTES]
        np.copyto(piece, source[start : start + _STEP_BYTES])
        digest.update(piece.data)
    return digest.digest()
