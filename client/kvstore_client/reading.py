"""The blocks of one namespace under a lease, and the ways to read them."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from kvstore.protocol.errors import DeadlineExceeded, InternalError, InvalidRequest, LeaseExpired
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client._lazy import np, xxhash
from kvstore_client.buffers import BlockBuffers, Wanted, block_buffers
from kvstore_client.placement import Placement
from kvstore_client.rpc import deadline_after
from kvstore_client.slabs import Slab
from kvstore_client.tensors import Framework, tensors_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

READ_TIMEOUT_S = 5.0
_WAIT_STEP_BYTES = 16 << 20
"""How much read_into() waits for at once: it copies what is there while the daemon loads what follows."""


class Owner(Protocol):
    """What a group asks of its lease."""

    lease_id: int
    released: int
    is_fail_open: bool

    def check_alive(self) -> None:
        """Raise LeaseExpired if the lease is over."""

    def end(self, reason: str) -> None:
        """The lease is over."""

    def await_ready(self, stop: int, deadline_s: float) -> None:
        """Ask the daemon once to say when blocks [0, stop) are readable."""

    def populate(self, slab: Slab) -> None:
        """A slab is read for the first time."""


class LeaseGroup:
    """The blocks of one namespace under a lease; `Lease` has the same methods for its first group.

    Attributes:
        namespace: what was said of the namespace.
        first: index of the first block listed: 0, or of the one block of a "last" group.
    """

    def __init__(self, lease: Owner, namespace: NamespaceSpec, message: pb.LeaseGroup | None = None) -> None:
        self.namespace = namespace
        self.first = 0 if message is None else message.first_block
        self._lease = lease
        self._placement = Placement(message or pb.LeaseGroup())
        self._stop = self.first + self._placement.count
        self._viewed: set[int] = set()
        self._fence = threading.Lock()
        nbytes = namespace.layout.nbytes
        if message is not None and message.block_nbytes != nbytes:
            raise InternalError(f"the daemon has blocks of {message.block_nbytes} bytes, this namespace of {nbytes}")

    @property
    def blocks(self) -> int:
        """The index after the last block promised."""
        return self._stop

    @property
    def ready(self) -> int:
        """The index after the last of the leading blocks that are readable now. Asks nobody."""
        first = max(self.first, self._lease.released)
        return self._readable_to(first, self._stop) if first < self._stop else self._stop

    def read_into(
        self,
        out: Any,  # noqa: ANN401 - any buffer
        start: int = 0,
        stop: int | None = None,
        verify: bool = False,
        *,
        timeout_s: float = READ_TIMEOUT_S,
    ) -> int:
        """Copy blocks [start, stop) into the caller's memory. See `Lease.read_into`."""
        start = max(start, self.first) if start == 0 else start
        stop = self._check_range(start, stop)
        if start == stop:
            return 0
        buffers = block_buffers(out, self.namespace.layout, Wanted("out", stop - start, False, True))
        deadline_s = deadline_after(timeout_s)
        done = start
        while done < min(stop, self._stop):
            ready = self._readable_to(done, min(stop, self._stop))
            if ready > done:
                self._copy(done, ready, _Target(buffers, start), verify)
                done = ready
            elif not self._await(done, stop, deadline_s):
                break
        return done - start

    def view(self, block: int) -> NDArray[np.uint8]:
        """The bytes of one block where they lie. See `Lease.view`."""
        self._check_range(block, block + 1)
        deadline_s = deadline_after(READ_TIMEOUT_S)
        while self._readable_to(block, block + 1) == block:
            if not self._await(block, block + 1, deadline_s):
                raise DeadlineExceeded(f"block {block} was not loaded in time")
            if block >= self._stop:
                raise LeaseExpired(f"block {block} was lost while it was loaded")
        self._viewed.add(block)
        return self._placement.row(block - self.first, self.namespace.layout.nbytes)

    def tensors(self, block: int, framework: Framework = "numpy") -> dict[str, Any]:
        """The tensors of one block where they lie, by name. See `Lease.tensors`."""
        return tensors_of(self.view(block), self.namespace.layout, framework)

    def check(self) -> None:
        """Prove every view so far. See `Lease.check`."""
        self._lease.check_alive()
        with self._fence:  # a barrier: the caller's reads come before these
            pass
        for block in self._viewed:
            if self._readable_to(block, block + 1) == block:
                self._expire(block)

    # --- for Lease

    @property
    def placement(self) -> Placement:
        """Where the blocks lie."""
        return self._placement

    def cut(self, stop: int) -> None:
        """Blocks from `stop` on will never be readable."""
        self._stop = max(min(self._stop, stop), self.first)

    # --- inside

    def _check_range(self, start: int, stop: int | None) -> int:
        lease = self._lease
        end = self._stop if stop is None else stop
        if stop is None and self._stop == self.first and not lease.lease_id:
            return start
        lease.check_alive()
        if not (max(self.first, lease.released) <= start <= end <= self._stop):
            raise InvalidRequest(
                f"blocks [{start}, {end}) were asked for; this lease has "
                f"[{max(self.first, lease.released)}, {self._stop})"
            )
        return end

    def _readable_to(self, start: int, stop: int) -> int:
        first = self.first
        return self._placement.readable_to(start - first, stop - first) + first

    def _await(self, block: int, stop: int, deadline_s: float) -> bool:
        """Wait until `block` is readable; False if a fail-open client gives up.

        Raises:
            LeaseExpired: it cannot become readable.
            DeadlineExceeded: not in time.
        """
        lease = self._lease
        lease.check_alive()
        if self._placement.is_reused(block - self.first):
            self._expire(block)
        ahead = max(1, _WAIT_STEP_BYTES // self.namespace.layout.nbytes)
        lease.await_ready(min(block + ahead, stop, self._stop), deadline_s)
        if self._stop <= block or self._readable_to(block, block + 1) > block or time.monotonic() < deadline_s:
            return True
        if lease.is_fail_open:
            return False
        raise DeadlineExceeded(f"block {block} was not loaded in time")

    def _copy(self, start: int, stop: int, target: _Target, verify: bool) -> None:
        """Copy readable blocks and prove the copy: nobody may have reused a slot meanwhile."""
        placement, first = self._placement, self.first
        for slab in placement.slabs():
            if not slab.is_populated:
                self._lease.populate(slab)
        with self._fence:  # barriers: the generations are read before the first byte and after the last one
            pass
        nbytes = self.namespace.layout.nbytes
        for run in placement.runs(start - first, stop - first):
            target.take(run.slab.rows[run.slot : run.slot + run.blocks, :nbytes], start + run.first)
        with self._fence:
            pass
        good = self._readable_to(start, stop)
        if good != stop:
            self._expire(good)
        if verify:
            self._verify(start, stop, target)

    def _verify(self, start: int, stop: int, target: _Target) -> None:
        for block in range(start, stop):
            wanted = self._placement.checksum(block - self.first)
            if wanted is not None and target.digest(block) != wanted:
                raise InternalError(f"block {block} differs from its checksum; the copy must not be used")

    def _expire(self, block: int) -> NoReturn:
        self._lease.end(f"the daemon took block {block} back: the lease had expired")
        raise LeaseExpired(f"block {block} was taken back by the daemon; what was read of it must not be used")


class _Target:
    """The caller's memory, by block."""

    def __init__(self, buffers: BlockBuffers, start: int) -> None:
        self._whole, self._pieces, self._start = buffers.whole, buffers.pieces, start

    def take(self, rows: NDArray[np.uint8], block: int) -> None:
        """Copy the rows of consecutive blocks, from `block` on, to their places."""
        at = block - self._start
        if self._whole is not None:
            np.copyto(self._whole[at : at + len(rows)], rows)
            return
        for row, pieces in zip(rows, self._pieces[at : at + len(rows)], strict=True):
            first = 0
            for piece in pieces:
                np.copyto(piece, row[first : first + len(piece)])
                first += len(piece)

    def digest(self, block: int) -> bytes:
        """xxh3-128 of what was copied for a block."""
        at = block - self._start
        hasher = xxhash.xxh3_128()
        for piece in (self._whole[at],) if self._whole is not None else self._pieces[at]:
            hasher.update(piece.data)
        return bytes(hasher.digest())
