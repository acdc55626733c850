"""Storing blocks: a pipeline of sub-batches through the staging segment.

While the daemon copies one sub-batch out of staging and hashes it, this side copies the next one in. The daemon
handles the puts of one session in the order in which they come, so a chain may be cut anywhere. Over gRPC calls
overtake each other: there a sub-batch of a chain is sent when the one before it has been answered.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from kvstore.protocol.errors import InternalError, KVStoreError
from kvstore.protocol.keys import Keys
from kvstore.protocol.slab import align_up
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client._lazy import np, xxhash
from kvstore_client.buffers import BlockBuffers
from kvstore_client.device import UnfinishedCopy
from kvstore_client.device_buffers import DeviceBuffers
from kvstore_client.outcomes import PutOutcome, PutStatus, RejectReason, decode
from kvstore_client.rpc import PUT, Pending
from kvstore_client.staging import Range, Staging
from kvstore_client.targets import copy_to_host

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore_client.session import Session

SUB_BATCH_BYTES = 8 << 20
FIRST_SUB_BATCH_BYTES = 2 << 20
"""Sub-batches start small and double: the daemon idles until the first one has been copied."""
MAX_SUB_BATCH_KEYS = 16_384
MAX_IN_FLIGHT = 6
_STRIDE_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class PutTarget:
    """Where blocks go.

    Attributes:
        namespace: its digest.
        block_nbytes: size of a block.
        is_chain: whether a block without its parent is refused.
        pin: whether they are to leave last, in a chain once all are stored.
    """

    namespace: bytes
    block_nbytes: int
    is_chain: bool
    pin: bool = False

    @property
    def stride(self) -> int:
        """Bytes from one block to the next in staging."""
        return align_up(self.block_nbytes, _STRIDE_ALIGNMENT)


class Storing(Protocol):
    """A put of many blocks under way."""

    def run(self, keys: Keys, blocks: BlockBuffers | DeviceBuffers) -> None:
        """Store the blocks. Raises KVStoreError; outcomes() still says what is known."""

    def outcomes(self) -> list[PutOutcome]:
        """What became of every block."""


class Flight:
    """A Put that was sent. Its range is the daemon's until the answer has come."""

    def __init__(self, staging: Staging, pending: Pending[pb.PutResponse], place: Range, count: int) -> None:
        self.place = place
        self._staging = staging
        self._pending = pending
        self._count = count

    @property
    def was_answered(self) -> bool:
        """Whether the range is this side's again. If it never is, the late answer will free it."""
        return self._pending.was_answered

    def take(self, deadline_s: float) -> tuple[bytes, bytes]:
        """Take the answer: statuses and reasons, one byte a block each.

        Raises:
            KVStoreError: the daemon's error, or no answer in time; was_answered says which.
        """
        reply = self._pending.take(deadline_s)
        self._staging.clear_suspicion(self.place)
        if len(reply.statuses) != self._count or len(reply.reasons) != self._count:
            raise InternalError(f"the daemon answered {len(reply.statuses)} outcomes for {self._count} blocks")
        return reply.statuses, reply.reasons


def start_put(
    session: Session,
    staging: Staging,
    target: PutTarget,
    place: Range,
    keys: Keys,
    deadline_s: float,
) -> Flight:
    """Send a Put for blocks that lie at the front of a range.

    Raises:
        KVStoreError: it was not sent; the range is still the caller's.
    """
    checksums = b""
    if staging.is_suspect(place):
        checksums = checksums_of(staging.rows(place, len(keys), target.stride, target.block_nbytes))
    request = pb.PutRequest(
        namespace=target.namespace,
        parent=keys.parent,
        keys=keys.data,
        staging_offset=place.offset,
        staging_stride=target.stride,
        checksums=checksums,
        block_nbytes=target.block_nbytes,
        pin=target.pin,
    )
    pending = session.link.start(PUT, request, deadline_s)
    pending.on_late(lambda _: staging.give(place, is_suspect=True))
    return Flight(staging, pending, place, len(keys))


class PutPipeline:
    """One put of many blocks: copies them in, sends and collects."""

    def __init__(self, session: Session, target: PutTarget, count: int, deadline_s: float) -> None:
        """Prepare a put of `count` blocks; until a block is answered its outcome is REJECTED(UNAVAILABLE)."""
        self._session = session
        self._target = target
        self._deadline_s = deadline_s
        self._staging = session.staging(target.block_nbytes, deadline_s)
        self._flights: deque[tuple[int, Flight]] = deque()  # with the index of the first block
        self._count = count
        self._statuses = bytearray([PutStatus.REJECTED]) * count
        self._reasons = bytearray([RejectReason.UNAVAILABLE]) * count
        self._lacks_parent = False
        self._unsent_reason = RejectReason.STAGING_BUSY  # of blocks for which there was no room

    def run(self, keys: Keys, blocks: BlockBuffers | DeviceBuffers) -> None:
        """Store the blocks.

        Raises:
            KVStoreError: outcomes() still says what is known.
        """
        try:
            first = self._send_all(keys, blocks)
            while self._flights:
                self._land(self._deadline_s)
        finally:
            while self._flights:  # after an error: each range comes free with its answer
                with contextlib.suppress(KVStoreError):
                    self._land(0.0)
        reason = RejectReason.NO_PARENT if self._lacks_parent else self._unsent_reason
        self._reasons[first:] = bytes([reason]) * (self._count - first)

    def _send_all(self, keys: Keys, blocks: BlockBuffers | DeviceBuffers) -> int:
        """Copy and send sub-batches; returns the index of the first block that was not sent."""
        first, nbytes = 0, FIRST_SUB_BATCH_BYTES
        while first < self._count and not self._lacks_parent:
            count, place = self._find_room(self._count - first, nbytes)
            if place is None:
                break
            if time.monotonic() >= self._deadline_s:
                self._staging.give(place)
                self._unsent_reason = RejectReason.DEADLINE
                break
            try:
                self._copy_in(place, blocks, first, count)
                self._await_parent()
                if self._lacks_parent:
                    self._staging.give(place)
                    break
                part = keys[first : first + count]
                # In a chain the last block holds all others: a put that ends early is not pinned.
                pin = self._target.pin and (first + count == self._count or not self._target.is_chain)
                target = replace(self._target, pin=pin)
                flight = start_put(self._session, self._staging, target, place, part, self._deadline_s)
            except UnfinishedCopy:  # the device may write there later: the range is nobody's any more
                raise
            except BaseException:
                self._staging.give(place)
                raise
            self._flights.append((first, flight))
            first, nbytes = first + count, min(2 * nbytes, SUB_BATCH_BYTES)
            self._session.link.pump()
            while self._flights and self._flights[0][1].was_answered:
                self._land(self._deadline_s)
        return first

    def outcomes(self) -> list[PutOutcome]:
        """What became of every block."""
        return decode(bytes(self._statuses), bytes(self._reasons))

    def _find_room(self, count: int, nbytes: int) -> tuple[int, Range | None]:
        """Staging for the next blocks: as many as `nbytes` holds, or fewer where room is short."""
        stride = self._target.stride
        most = min(nbytes, self._staging.nbytes // 3)
        count = min(max(1, most // stride), count, MAX_SUB_BATCH_KEYS)
        while True:
            if len(self._flights) < MAX_IN_FLIGHT:
                for fewer in (count, -(-count // 2), 1):
                    place = self._staging.take(fewer * stride, 0.0)
                    if place is not None:
                        return fewer, place
            if not self._flights:
                return 1, self._staging.take(stride, self._deadline_s)
            self._land(self._deadline_s)

    def _copy_in(self, place: Range, blocks: BlockBuffers | DeviceBuffers, first: int, count: int) -> None:
        rows = self._staging.rows(place, count, self._target.stride, self._target.block_nbytes)
        if isinstance(blocks, DeviceBuffers):
            copy_to_host(blocks, rows, first, self._staging, self._staging.memory)
            return
        if blocks.whole is not None:
            np.copyto(rows, blocks.whole[first : first + count])
            return
        for row, pieces in zip(rows, blocks.pieces[first : first + count], strict=True):
            at = 0
            for piece in pieces:
                np.copyto(row[at : at + len(piece)], piece)
                at += len(piece)

    def _await_parent(self) -> None:
        """In a chain the next sub-batch hangs on the last one, which must not be overtaken on its way."""
        while self._flights and self._target.is_chain and not self._session.link.keeps_order:
            self._land(self._deadline_s)

    def _land(self, deadline_s: float) -> None:
        """Take the oldest answer."""
        first, flight = self._flights.popleft()
        try:
            statuses, reasons = flight.take(deadline_s)
        finally:
            if flight.was_answered:
                self._staging.give(flight.place)
        self._statuses[first : first + len(statuses)] = statuses
        self._reasons[first : first + len(reasons)] = reasons
        if self._target.is_chain and PutStatus.REJECTED in statuses:
            self._lacks_parent = True


def checksums_of(rows: NDArray[np.uint8]) -> bytes:
    """xxh3-128 of every row, 16 bytes each."""
    return b"".join([xxhash.xxh3_128(row).digest() for row in rows])
