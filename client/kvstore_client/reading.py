"""The blocks of one namespace under a lease, and the ways to read them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

from kvstore.protocol.errors import DeadlineExceeded, InternalError, InvalidRequest, LeaseExpired
from kvstore.protocol.namespace import NamespaceSpec
from kvstore_client._lazy import np
from kvstore_client.buffers import Wanted, block_buffers
from kvstore_client.claim import Claim
from kvstore_client.device_buffers import after_of
from kvstore_client.fetching import RemotePlacement, fetch_into
from kvstore_client.layers import layer_ranges
from kvstore_client.placement import Placement
from kvstore_client.rpc import deadline_after
from kvstore_client.targets import HostTarget, Ranges, Target, target_of
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
        layout = self.namespace.layout
        done, placement, deadline_s = start, self._placement, deadline_after(timeout_s)
        if isinstance(placement, RemotePlacement):
            buffers = block_buffers(out, layout, Wanted("out", stop - start, False, True))
            host = HostTarget(buffers, layout.nbytes, start)
            return fetch_into(self._claim, placement, range(start, stop), host, timeout_s)
        target, whole = target_of(out, layout, stop - start, start), ((0, layout.nbytes),)
        while done < min(stop, placement.stop):
            ready = placement.readable_to(done, min(stop, placement.stop))
            if ready > done:
                self._copy(done, ready, target, whole)
                if verify:
                    self._verify(done, ready, target)
                done = ready
            elif not self._await(done, stop, deadline_s):
                break
        return done - start

    def read_layers(
        self,
        out: Any,  # noqa: ANN401 - any buffer
        layers: Sequence[int] | None = None,
        stream: Any = None,  # noqa: ANN401 - a stream or event of any library
        *,
        start: int = 0,
        stop: int | None = None,
        timeout_s: float = READ_TIMEOUT_S,
    ) -> Iterator[int]:
        """Copy blocks [start, stop) layer by layer. See `Lease.read_layers`."""
        start = start or self.first
        stop = self._check_range(start, stop)
        if isinstance(self._placement, RemotePlacement):
            raise InvalidRequest(
                "read_layers() needs shared memory, and this client reads over TCP: copy with read_into()"
            )
        steps = layer_ranges(self.namespace.layout, layers)
        if start == stop:
            return iter(())
        after = None if stream is None else after_of(stream)
        target = target_of(out, self.namespace.layout, stop - start, start, after)
        return self._copy_layers(steps, target, (start, stop), deadline_after(timeout_s))

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

    def _copy_layers(
        self, steps: Sequence[tuple[int, Ranges]], target: Target, blocks: tuple[int, int], deadline_s: float
    ) -> Iterator[int]:
        start, stop = blocks
        while self._placement.readable_to(start, stop) < stop:
            if not self._await(self._placement.readable_to(start, stop), stop, deadline_s):
                return
            if self._placement.stop < stop:
                raise LeaseExpired(f"block {self._placement.stop} was lost while it was loaded")
        layers = self._layers_in_flight if target.is_asynchronous else self._layers_by_thread
        yield from layers(steps, target, blocks)

    def _layers_in_flight(
        self, steps: Sequence[tuple[int, Ranges]], target: Target, blocks: tuple[int, int]
    ) -> Iterator[int]:
        """The device copies the next layer by itself while the caller computes with this one.

        Without a thread: to get the interpreter back from a caller that is busy can take 5 ms, for each layer.
        """
        try:
            for at, (layer, ranges) in enumerate(steps):
                if at == 0:
                    self._begin_copy(*blocks, target, ranges)
                self._end_copy(*blocks, target)
                for _, following in steps[at + 1 : at + 2]:
                    self._begin_copy(*blocks, target, following)
                yield layer
        finally:
            target.finish()

    def _layers_by_thread(
        self, steps: Sequence[tuple[int, Ranges]], target: Target, blocks: tuple[int, int]
    ) -> Iterator[int]:
        """One thread: while the caller computes with a layer the next one is copied, and no more than that."""
        with ThreadPoolExecutor(1, "kvstore-client-layers") as pool:
            copying = [pool.submit(self._copy, *blocks, target, ranges) for _, ranges in steps[:1]]
            for at, (layer, _) in enumerate(steps):
                copying.pop().result()
                copying += [pool.submit(self._copy, *blocks, target, ranges) for _, ranges in steps[at + 1 : at + 2]]
                yield layer

    def _copy(self, start: int, stop: int, target: Target, ranges: Ranges) -> None:
        """Copy bytes of readable blocks and prove the copy."""
        begin_s = time.perf_counter()
        try:
            self._begin_copy(start, stop, target, ranges)
        except BaseException:
            target.finish()
            raise
        self._end_copy(start, stop, target)
        first, end = ranges[0]
        nbytes = end - first if len(ranges) == 1 else sum([last - begin for begin, last in ranges])
        self._claim.note_copy((stop - start) * nbytes, time.perf_counter() - begin_s)

    def _begin_copy(self, start: int, stop: int, target: Target, ranges: Ranges) -> None:
        """Begin to copy bytes of readable blocks; target.finish() must follow, whatever happens."""
        runs = self._placement.runs(start, stop)
        with self._fence:  # barriers: the generations are read before the first byte and after the last one
            pass
        for run in runs:
            if not run.slab.is_populated:
                self._claim.populate(run.slab)
            target.take(run, ranges)

    def _end_copy(self, start: int, stop: int, target: Target) -> None:
        """Wait for the copy and prove it: nobody may have reused a slot meanwhile."""
        target.finish()
        with self._fence:
            pass
        good = self._placement.readable_to(start, stop)  # asks for the runs again: none is left if the lease ended
        if good != stop:
            self._expire(good)

    def _verify(self, start: int, stop: int, target: Target) -> None:
        for block in range(start, stop):
            wanted = self._placement.checksum(block)
            if wanted is not None and target.digest(block) != wanted:
                raise InternalError(f"block {block} differs from its checksum; the copy must not be used")

    def _expire(self, block: int) -> NoReturn:
        self._claim.end(f"the daemon took block {block} back: the lease had expired")
        raise LeaseExpired(f"block {block} was taken back by the daemon; what was read of it must not be used")
