"""Reading over TCP: the blocks of a lease as a stream of chunks, each block checked against its checksum."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeAlias

from google.protobuf.message import DecodeError

from kvstore.protocol.chunks import FETCH_DATA_FIELD, split
from kvstore.protocol.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    KVStoreError,
    LeaseExpired,
    QuotaExceeded,
    Unavailable,
)
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client._lazy import xxhash
from kvstore_client.claim import Claim
from kvstore_client.placement import Placement
from kvstore_client.rpc import deadline_after
from kvstore_client.slabs import SlabCache

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Fetch: TypeAlias = Callable[[pb.FetchRequest, float], Iterator[bytes]]

FETCH_BYTES_MAX = 128 << 20
"""Of one Fetch, each with a time limit of its own: a slow network is no reason to give up what arrives steadily."""
_BUSY_PAUSE_S = 0.01  # before a stream is asked for again that the daemon had no room for


class RemotePlacement(Placement):
    """The blocks of one group of a lease over TCP: how many and how far, but nowhere to be seen.

    Attributes:
        index: of the group in its lease.
        fetch: serialized FetchChunks of a request, by a deadline.
    """

    __slots__ = ("_ready", "fetch", "index")

    def __init__(self, message: pb.LeaseGroup, index: int, ready: int, fetch: Fetch) -> None:
        super().__init__(message)
        self.index = index
        self.fetch = fetch
        self._ready = self.first + ready

    def find_slabs(self, slabs: SlabCache, block_nbytes: int, deadline_s: float) -> None:
        """Nothing to look up; see Placement."""
        if self._message.block_nbytes != block_nbytes:
            raise InternalError(
                f"the daemon has blocks of {self._message.block_nbytes} bytes, this namespace {block_nbytes}"
            )

    def note_ready(self, stop: int) -> None:
        """The daemon says that blocks before `stop` are readable."""
        self._ready = max(self._ready, stop)

    def readable_to(self, start: int, stop: int) -> int:
        """The end of the readable blocks that begin at `start`, as far as the daemon has said."""
        return max(start, min(stop, self._ready))

    def is_reused(self, block: int) -> bool:
        """Never known here: the daemon says so when the block is fetched."""
        return False

    def row(self, block: int, nbytes: int) -> NDArray[np.uint8]:
        """Refused: there is no memory to look into."""
        raise InvalidRequest(
            "view() and tensors() need shared memory, and this client reads over TCP: copy with read_into()"
        )


class FetchTarget(Protocol):
    """Where blocks go."""

    def write(self, block: int, offset: int, data: memoryview) -> None:
        """Put a piece of a block to its place."""


def fetch_into(claim: Claim, placement: RemotePlacement, blocks: range, target: FetchTarget, timeout_s: float) -> int:
    """Copy blocks to `target`; returns how many came before one was lost, or time ran out for a fail-open client.

    `timeout_s` bounds each Fetch, and there is one for each FETCH_BYTES_MAX.

    Raises:
        LeaseExpired: the lease is over.
        DeadlineExceeded: not in time.
        InternalError: a block differs from its checksum.
    """
    receiver = _Receiver(claim, placement, blocks, target)
    was_ready = placement.readable_to(blocks.start, blocks.stop) == blocks.stop
    begin_s = time.perf_counter()
    deadline_s = deadline_after(timeout_s)
    while not receiver.is_done:
        try:
            receiver.receive(deadline_s)
            deadline_s = deadline_after(timeout_s)
        except QuotaExceeded:
            if time.monotonic() + _BUSY_PAUSE_S >= deadline_s:
                raise
            time.sleep(_BUSY_PAUSE_S)
        except DeadlineExceeded as error:
            if claim.is_fail_open:
                break
            raise DeadlineExceeded(f"block {receiver.block} did not arrive in time") from error
        except (LeaseExpired, Unavailable) as error:
            _expire(claim, error)
    if was_ready:  # a rate that waits for loads are part of would count them twice
        claim.note_copy(receiver.received_bytes, time.perf_counter() - begin_s)
    return receiver.block - blocks.start


def _expire(claim: Claim, error: KVStoreError) -> NoReturn:
    """The lease is over, unless only the call has failed."""
    session = claim.session
    if isinstance(error, Unavailable) and session is not None and not session.is_lost:
        raise error
    claim.end(f"the lease is over: {error}")
    raise LeaseExpired(str(claim.ended)) from error


class _Receiver:
    """Takes chunks in. `block` is the first one that is not whole yet."""

    def __init__(self, claim: Claim, placement: RemotePlacement, blocks: range, target: FetchTarget) -> None:
        self._claim = claim
        self._placement = placement
        self._stop = blocks.stop
        self._target = target
        self._nbytes: int = placement.block_nbytes
        self._at = 0  # bytes of `block` that have come
        self._checksum = b""
        self._hasher: Any = None
        self._is_cut = False
        self.block = blocks.start
        self.received_bytes = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing more is to come."""
        return self._is_cut or self.block >= self._stop

    def receive(self, deadline_s: float) -> None:
        """One Fetch of what is still missing.

        Raises:
            KVStoreError: what the daemon answered, no answer in time, or a chunk that makes no sense.
        """
        claim = self._claim
        claim.check_alive()
        self._at = 0
        stop = min(self._stop, self.block + max(1, FETCH_BYTES_MAX // self._nbytes))
        request = pb.FetchRequest(lease_id=claim.lease_id, group=self._placement.index, start=self.block, stop=stop)
        for message in self._placement.fetch(request, deadline_s):
            rest, data = split(message, FETCH_DATA_FIELD)
            try:
                head = pb.FetchChunk.FromString(rest)
            except DecodeError as error:
                raise InternalError("the daemon's answer to Fetch cannot be read") from error
            if head.lost:
                for placement in claim.placements:
                    placement.cut(head.lost - 1)
                self._is_cut = True
                return
            self._take(head, data)
        if self.block < stop:
            raise InternalError(f"the daemon's answer to Fetch ended before block {self.block}")

    def _take(self, head: pb.FetchChunk, data: memoryview) -> None:
        if self.is_done or (head.block, head.offset) != (self.block, self._at) or not data:
            raise InternalError(f"the daemon sent byte {head.offset} of block {head.block} out of turn")
        if self._at + len(data) > self._nbytes:
            raise InternalError(f"the daemon sent more than the {self._nbytes} bytes of block {head.block}")
        if not self._at:
            self._checksum, self._hasher = head.checksum, xxhash.xxh3_128()
        self._hasher.update(data)  # before the copy, which then finds the bytes in the cache
        self._target.write(head.block, self._at, data)
        self._at += len(data)
        if self._at == self._nbytes:
            if self._checksum and self._checksum != self._hasher.digest():
                raise InternalError(f"block {head.block} differs from its checksum; what was read must not be used")
            self._at = 0
            self.block += 1
            self.received_bytes += self._nbytes
            self._placement.note_ready(self.block)
