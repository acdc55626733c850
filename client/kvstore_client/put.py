"""Storing blocks: a pipeline of sub-batches through the staging segment.

While the daemon copies one sub-batch out of staging and hashes it, this side copies the next one in. The daemon
handles the puts of one session in order, so a chain may be cut anywhere.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvstore.protocol.errors import InternalError, KVStoreError
from kvstore.protocol.keys import KEY_BYTES, Keys
from kvstore.protocol.slab import align_up
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client._lazy import np, xxhash
from kvstore_client.buffers import BlockBuffers
from kvstore_client.outcomes import PutOutcome, PutStatus, RejectReason, decode
from kvstore_client.rpc import PUT, Pending
from kvstore_client.staging import Range, Staging

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore_client.session import Session

SUB_BATCH_BYTES = 8 << 20
FIRST_SUB_BATCH_BYTES = 2 << 20
"""The first sub-batches are smaller and double: the daemon idles until the first one has been copied."""
MAX_SUB_BATCH_KEYS = 16_384
_STRIDE_ALIGNMENT = 64
_NEVER_S = 0.0


@dataclass(frozen=True, slots=True)
class PutTarget:
    """Where blocks go.

    Attributes:
        namespace: its digest.
        block_nbytes: size of a block.
        is_chain: whether a block without its parent is refused.
    """

    namespace: bytes
    block_nbytes: int
    is_chain: bool

    @property
    def stride(self) -> int:
        """Bytes from one block to the next in staging."""
        return align_up(self.block_nbytes, _STRIDE_ALIGNMENT)


class _Flight(NamedTuple):
    """A sub-batch that was sent."""

    pending: Pending
    first: int
    count: int
    place: Range
    has_checksums: bool


class PutSender:
    """Sends Put requests for ranges of staging and takes the answers, in order."""

    def __init__(self, session: Session, staging: Staging, target: PutTarget, deadline_s: float) -> None:
        self._session = session
        self._staging = staging
        self._target = target
        self._deadline_s = deadline_s
        self._flying: deque[_Flight] = deque()

    @property
    def in_flight(self) -> int:
        """Sub-batches sent and not answered."""
        return len(self._flying)

    def send(self, place: Range, keys: Keys, first: int = 0) -> None:
        """Send a Put for blocks that lie in a range. The range belongs to the daemon from now on."""
        target, staging = self._target, self._staging
        checksums = b""
        if staging.is_suspect(place):
            checksums = _checksums(staging.rows(place, len(keys), target.stride, target.block_nbytes))
        request = pb.PutRequest(
            namespace=target.namespace,
            parent=keys.parent,
            keys=keys.data,
            staging_offset=place.offset,
            staging_stride=target.stride,
            checksums=checksums,
            block_nbytes=target.block_nbytes,
        )
        pending = self._session.link.start(PUT, request, self._deadline_s)
        self._flying.append(_Flight(pending, first, len(keys), place, bool(checksums)))

    def land(self) -> tuple[int, bytes, bytes]:
        """Take the oldest answer; its range is free then.

        Returns:
            Index of the sub-batch's first block, statuses, reasons.

        Raises:
            KVStoreError: no answer in time (the range stays quarantined until it comes), or an error as answer.
        """
        flight = self._flying.popleft()
        try:
            reply = self._take(flight, self._deadline_s)
        except KVStoreError:
            self._settle(flight)
            raise
        if len(reply.statuses) != flight.count or len(reply.reasons) != flight.count:
            raise InternalError(f"the daemon answered {len(reply.statuses)} outcomes for {flight.count} blocks")
        return flight.first, reply.statuses, reply.reasons

    def abandon(self) -> None:
        """Give up on every answer that is still out; each range comes free with its answer."""
        while self._flying:
            with contextlib.suppress(KVStoreError):
                self._take(self._flying.popleft(), _NEVER_S)

    def _take(self, flight: _Flight, deadline_s: float) -> pb.PutResponse:
        staging, place = self._staging, flight.place
        flight.pending.late = lambda: staging.give(place, is_suspect=True)
        reply = self._session.link.finish(flight.pending, PUT, deadline_s)
        if flight.has_checksums:
            staging.clear_suspicion(place)
        staging.give(place)
        return reply

    def _settle(self, flight: _Flight) -> None:
        """After an error answer."""


class PutPipeline:
    """One put call: copies, sends and collects."""

    def __init__(self, session: Session, target: PutTarget, deadline_s: float) -> None:
        self._target = target
        self._deadline_s = deadline_s
        self._staging = session.staging(target.block_nbytes, deadline_s)
        self._sender = PutSender(session, self._staging, target, deadline_s)
        self._statuses = bytearray()
        self._reasons = bytearray()

    def run(self, keys: Keys, blocks: BlockBuffers) -> list[PutOutcome]:
        """Store the blocks; see Namespace.put."""
        raise NotImplementedError
