"""Leases: a claim that blocks stay where they are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client._lazy import np
from kvstore_client.claim import Claim
from kvstore_client.outcomes import WithheldReason, withheld_reason
from kvstore_client.placement import Placement
from kvstore_client.reading import READ_TIMEOUT_S, LeaseGroup
from kvstore_client.rpc import HANDOFF, deadline_after
from kvstore_client.tensors import Framework

if TYPE_CHECKING:
    from numpy.typing import NDArray

HANDOFF_TIMEOUT_S = 1.0


class Lease:
    """Blocks that stay where they are until release(), or the daemon's time limit passes without a sign of life.

    Use it as a context manager. A lease of zero blocks is one on nothing: every method works and reads nothing.

    Attributes:
        groups: one for each namespace asked for, in order. The methods of the lease itself are those of the first.
    """

    __slots__ = ("__weakref__", "_claim", "_promised", "_tokens", "groups")

    def __init__(self, claim: Claim, tokens: int, namespaces: Sequence[NamespaceSpec]) -> None:
        """Made by Namespace.acquire(), Namespace.adopt() and Client.acquire()."""
        self._claim = claim
        self._tokens = tokens
        placements = claim.placements or [Placement(pb.LeaseGroup()) for _ in namespaces]
        self.groups = tuple(
            LeaseGroup(claim, placement, namespace) for placement, namespace in zip(placements, namespaces, strict=True)
        )
        self._promised = self.groups[0].blocks

    # --- what is promised

    @property
    def blocks(self) -> int:
        """Blocks promised: indexes below this one can be read, now or after a wait. Blocks that are lost cut it."""
        return self.groups[0].blocks

    @property
    def released(self) -> int:
        """Blocks [0, released) have been given back by release_to()."""
        return self._claim.released

    @property
    def tokens(self) -> int:
        """Tokens covered by the blocks."""
        lost = self._promised - self.blocks
        return max(0, self._tokens - lost * self.groups[0].namespace.block_tokens)

    @property
    def lossy(self) -> frozenset[int]:
        """Indexes of the blocks that come from a lossy copy; none but in a namespace with a cold_codec."""
        return self.groups[0].lossy

    @property
    def withheld(self) -> int:
        """Further blocks that are stored and were not promised: `withheld_reason` says why.

        Once they are computed there is nothing to put but what follows them: keys[lease.blocks + lease.withheld :].
        """
        return self._claim.withheld

    @property
    def withheld_reason(self) -> WithheldReason | None:
        """Why blocks were withheld; None where none were."""
        return withheld_reason(self._claim.withheld, self._claim.withheld_reason)

    @property
    def ready(self) -> int:
        """Leading blocks that are readable now, in every group; reads shared memory, asks nobody."""
        if self._claim.ended is not None:
            return 0
        if len(self.groups) == 1:
            return self.groups[0].ready
        waiting = [ready for group in self.groups if (ready := group.ready) < group.blocks]
        return min([*waiting, self.blocks])

    def wait(self, stop: int | None = None, timeout_s: float = READ_TIMEOUT_S) -> int:
        """Wait until blocks [0, stop) are readable.

        Args:
            stop: index after the last block waited for; None: all.
            timeout_s: bound of the wait.

        Returns:
            How many leading blocks are readable: fewer than `stop` when time ran out, or when blocks were lost,
            which cuts `blocks`.

        Raises:
            LeaseExpired: the lease is over.
            InvalidRequest: `stop` is beyond the lease.
        """
        wanted = self.blocks if stop is None else stop
        if not 0 <= wanted <= self._promised:
            raise InvalidRequest(f"stop is {wanted}; the lease was given for {self._promised} blocks")
        deadline_s = deadline_after(timeout_s)
        if not self._claim.lease_id:
            return 0
        self._claim.check_alive()
        while (ready := self.ready) < min(wanted, self.blocks) and time.monotonic() < deadline_s:
            self._claim.await_ready(min(wanted, self.blocks), deadline_s)
        return ready

    # --- reading

    def read_into(
        self,
        out: Any,  # noqa: ANN401 - any buffer
        start: int = 0,
        stop: int | None = None,
        verify: bool = False,
        *,
        timeout_s: float = READ_TIMEOUT_S,
    ) -> int:
        """Copy blocks [start, stop) into the caller's memory, waiting for those that are still loaded.

        This is the recommended way to read: the bytes are the caller's, and proven to be the right ones.

        Args:
            out: one contiguous (n, block_nbytes) uint8 array, or n-D array of the layout's item size whose first
                axis is the block; or n buffers; or n lists of segments, each a buffer or (address, length). Block
                `start` goes to the first place; there may be more places than blocks. Memory of one CUDA device too:
                tensors of torch, or what has `__cuda_array_interface__` or DLPack; the bytes are there, for every
                stream, when the call returns.
            start: first block.
            stop: after the last block; None: `blocks`.
            verify: hash what was copied and compare it with the daemon's checksum; over TCP it always is.
            timeout_s: bound of the wait for blocks that are not readable yet; over TCP of each 128 MiB.

        Returns:
            Blocks copied: stop - start, or fewer if blocks were lost (or time ran out, for a fail-open client).

        Raises:
            LeaseExpired: the lease ended before the copy was proven; nothing in `out` may be used.
            DeadlineExceeded: a block was not loaded in time.
            InvalidRequest: the range or `out` does not fit the lease.
            InternalError: a copy differs from its checksum.
        """
        return self.groups[0].read_into(out, start, stop, verify, timeout_s=timeout_s)

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
        """Copy blocks [start, stop) layer by layer: the next layer is copied while the caller computes with this one.

            for layer in lease.read_layers(out):
                forward(layer, out)

        Nothing of a layer may be used before its number came, and everything of it may then, from any stream.

        Args:
            out: as in read_into().
            layers: which ones, in which order; None: all. Where not every tensor of the layout has an axis "layer",
                each tensor is one.
            stream: a CUDA stream or event whose work must be done before `out` is written to; None: for tensors of
                torch its current stream.
            start: first block.
            stop: after the last block; None: `blocks`.
            timeout_s: bound of the wait for blocks that are not readable yet, all of them before the first layer.

        Yields:
            The number of each layer that has been copied. None at all where a fail-open client's blocks did not come.

        Raises:
            LeaseExpired: the lease ended, or blocks were lost; nothing of a layer not yet yielded may be used.
            DeadlineExceeded: a block was not loaded in time.
            InvalidRequest: the range, the layers or `out` do not fit the lease.
        """
        return self.groups[0].read_layers(out, layers, stream, start=start, stop=stop, timeout_s=timeout_s)

    def view(self, block: int) -> NDArray[np.uint8]:
        """The bytes of one block where they lie, (block_nbytes,) read-only, without a copy.

        Valid inside the lease only, and only if check() passes after the use. Waits like read_into().

        Raises:
            LeaseExpired: the lease is over, or the block was lost.
            DeadlineExceeded: the block was not loaded in time.
            InvalidRequest: the lease has no such block.
        """
        return self.groups[0].view(block)

    def tensors(self, block: int, framework: Framework = "numpy") -> dict[str, Any]:
        """The tensors of one block where they lie, by name, without a copy; valid as view() is.

        Args:
            block: its index.
            framework: "numpy": arrays, read-only; bfloat16 and float8 come as uint16 and uint8 bit patterns.
                "torch": CPU tensors of the real dtype, which must not be written to.

        Raises:
            As view() does.
        """
        return self.groups[0].tensors(block, framework)

    def check(self) -> None:
        """Prove every view() and tensors() so far: to be called after their last use.

        Raises:
            LeaseExpired: one of them was no longer the promised block; whatever was made of it must not be used.
        """
        for group in self.groups:
            group.check()

    # --- the end

    def release_to(self, block: int) -> None:
        """Give blocks [0, block) back early: long prefixes stream through a small warm tier.

        Raises:
            LeaseExpired: the lease is over.
            InvalidRequest: the lease has fewer blocks.
        """
        if not 0 <= block <= self._promised:
            raise InvalidRequest(f"release_to({block}): the lease was given for {self._promised} blocks")
        claim = self._claim
        if claim.session is None:
            return
        claim.check_alive()
        if block > claim.released:
            claim.released = block
            claim.session.release(claim.lease_id, block)

    def release(self) -> None:
        """Give everything back; idempotent, and never waits for the daemon."""
        self._claim.release()

    def handoff(self, timeout_s: float = HANDOFF_TIMEOUT_S) -> bytes:
        """Give the lease away: whoever calls Namespace.adopt() with the token has it, once, within the tenant.

        Raises:
            LeaseExpired: the lease is over.
            InvalidRequest: it is a lease on nothing.
        """
        claim = self._claim
        if not claim.lease_id:
            raise InvalidRequest("a lease of zero blocks cannot be handed off")
        claim.check_alive()
        token = claim.ask(HANDOFF, pb.HandoffRequest(lease_id=claim.lease_id), deadline_after(timeout_s)).token
        claim.end("the lease was handed off")
        return token

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Lease belongs to its session; use handoff() and adopt() to pass it on")

    def __repr__(self) -> str:
        state = self._claim.ended or f"ready {self.ready}"
        return f"<Lease {self._claim.lease_id}: {self.blocks} blocks, {self.tokens} tokens, {state}>"
