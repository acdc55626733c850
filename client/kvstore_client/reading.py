"""The blocks of one namespace under a lease, and the ways to read them."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

from kvstore.protocol.errors import DeadlineExceeded, InternalError, InvalidRequest, LeaseExpired
from kvstore.protocol.namespace import NamespaceSpec
from kvstore_client._lazy import np, xxhash
from kvstore_client.buffers import BlockBuffers, Wanted, block_buffers
from kvstore_client.claim import Claim
from kvstore_client.fetching import RemotePlacement, fetch_into
from kvstore_client.placement import Placement
from kvstore_client.rpc import deadline_after
from kvstore_client.tensors import Framework, tensors_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

READ_TIMEOUT_S = 5.0
_WAIT_STEP_BYTES = 16 << 20
"""How much read_into() waits for at once: it copies what is there while the daemon loads what follows."""


class LeaseGroup:
    """The blocks of one namespace under a lease; `Lease` has the same methods for its first group.

    Attributes:
        namespace: what was said of the namespace.
        first: index of the first block listed: 0, or of the one block of a "last" group.
    """

    __slots__ = ("_claim", "_fence", "_placement", "_viewed", "first", "namespace")

    def __init__(self, claim: Claim, placement: Placement, namespace: NamespaceSpec) -> None:
        """Made by Lease."""
        self.namespace = namespace
        self.first = placement.first
        self._claim = claim
        self._placement = placement
        self._viewed: set[int] = set()
        self._fence = threading.Lock()

    @property
    def blocks(self) -> int:
        """The index after the last block promised."""
        return self._placement.stop

    @property
    def lossy(self) -> frozenset[int]:
        """Indexes of the blocks that come from a lossy copy."""
        return self._placement.lossy

    @property
    def ready(self) -> int:
        """The index after the last of the leading blocks that are readable now. Asks nobody."""
        return self._placement.ready_from(self._claim.released)

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
        start = start or self.first
        stop = self._check_range(start, stop)
        if start == stop:
            return 0
        buffers = block_buffers(out, self.namespace.layout, Wanted("out", stop - start, False, True))
        done, placement, deadline_s = start, self._placement, deadline_after(timeout_s)
        if isinstance(placement, RemotePlacement):
            return fetch_into(self._claim, placement, range(start, stop), _Target(buffers, start), timeout_s)
        while done < min(stop, placement.stop):
            ready = placement.readable_to(done, min(stop, placement.stop))
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
        while self._placement.readable_to(block, block + 1) == block:
            if not self._await(block, block + 1, deadline_s):
                raise DeadlineExceeded(f"block {block} was not loaded in time")
            if block >= self._placement.stop:
                raise LeaseExpired(f"block {block} was lost while it was loaded")
        self._viewed.add(block)
        return self._placement.row(block, self.namespace.layout.nbytes)

    def tensors(self, block: int, framework: Framework = "numpy") -> dict[str, Any]:
        """The tensors of one block where they lie, by name. See `Lease.tensors`."""
        return tensors_of(self.view(block), self.namespace.layout, framework)

    def check(self) -> None:
        """Prove every view so far. See `Lease.check`."""
        self._claim.check_alive()
        with self._fence:  # a barrier: the caller's reads come before these
            pass
        for block in self._viewed:
            if self._placement.readable_to(block, block + 1) == block:
                self._expire(block)

    # --- inside

    def _check_range(self, start: int, stop: int | None) -> int:
        claim, placement = self._claim, self._placement
        end = placement.stop if stop is None else stop
        if stop is None and not claim.lease_id:
            return start
        claim.check_alive()
        first = max(placement.first, claim.released)
        if not first <= start <= end <= placement.stop:
            raise InvalidRequest(f"blocks [{start}, {end}) were asked for; this lease has [{first}, {placement.stop})")
        return end

    def _await(self, block: int, stop: int, deadline_s: float) -> bool:
        """Wait until `block` is readable; False if a fail-open client gives up.

        Raises:
            LeaseExpired: it cannot become readable.
            DeadlineExceeded: not in time.
        """
        claim, placement = self._claim, self._placement
        claim.check_alive()
        if placement.is_reused(block):
            self._expire(block)
        ahead = max(1, _WAIT_STEP_BYTES // self.namespace.layout.nbytes)
        claim.await_ready(min(block + ahead, stop, placement.stop), deadline_s)
        is_decided = placement.stop <= block or placement.readable_to(block, block + 1) > block
        if is_decided or time.monotonic() < deadline_s:
            return True
        if claim.is_fail_open:
            return False
        raise DeadlineExceeded(f"block {block} was not loaded in time")

    def _copy(self, start: int, stop: int, target: _Target, verify: bool) -> None:
        """Copy readable blocks and prove the copy: nobody may have reused a slot meanwhile."""
        nbytes = self.namespace.layout.nbytes
        runs = self._placement.runs(start, stop)
        with self._fence:  # barriers: the generations are read before the first byte and after the last one
            pass
        for run in runs:
            if not run.slab.is_populated:
                self._claim.populate(run.slab)
        begin_s = time.perf_counter()
        for run in runs:
            target.take(run.slab.rows[run.slot : run.slot + run.stop - run.first, :nbytes], run.first)
        self._claim.note_copy((stop - start) * nbytes, time.perf_counter() - begin_s)
        with self._fence:
            pass
        good = self._placement.readable_to(start, stop)  # asks for the runs again: none is left if the lease ended
        if good != stop:
            self._expire(good)
        if verify:
            self._verify(start, stop, target)

    def _verify(self, start: int, stop: int, target: _Target) -> None:
        for block in range(start, stop):
            wanted = self._placement.checksum(block)
            if wanted is not None and target.digest(block) != wanted:
                raise InternalError(f"block {block} differs from its checksum; the copy must not be used")

    def _expire(self, block: int) -> NoReturn:
        self._claim.end(f"the daemon took block {block} back: the lease had expired")
        raise LeaseExpired(f"block {block} was taken back by the daemon; what was read of it must not be used")


class _Target:
    """The caller's memory, by block."""

    __slots__ = ("_pieces", "_start", "_whole")

    def __init__(self, buffers: BlockBuffers, start: int) -> None:
        self._whole, self._pieces = buffers
        self._start = start

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

    def write(self, block: int, offset: int, data: memoryview) -> None:
        """Put a piece of a block to its place."""
        source, at = np.frombuffer(data, np.uint8), block - self._start
        for piece in (self._whole[at],) if self._whole is not None else self._pieces[at]:
            if not len(source):
                break
            part = source[: max(len(piece) - offset, 0)]
            np.copyto(piece[offset : offset + len(part)], part)
            source, offset = source[len(part) :], max(offset - len(piece), 0)

    def digest(self, block: int) -> bytes:
        """xxh3-128 of what was copied for a block."""
        at = block - self._start
        hasher = xxhash.xxh3_128()
        for piece in (self._whole[at],) if self._whole is not None else self._pieces[at]:
            hasher.update(piece.data)
        return bytes(hasher.digest())
