"""What all parts of a lease share: whether it lives, and how to ask the daemon about it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.protocol.errors import DeadlineExceeded, LeaseExpired, NotFound, Unavailable
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client.placement import Placement
from kvstore_client.rpc import WAIT, Q, R, Rpc
from kvstore_client.slabs import Slab

if TYPE_CHECKING:
    from kvstore_client.session import Session

_ASK_AGAIN_S = 0.0005  # before the daemon is asked again that answered a wait too early


class Claim:
    """The state of a lease. It refers to none of its users, so that a lease that is dropped is gone at once.

    Attributes:
        session: that holds it; None for a lease on nothing.
        lease_id: the daemon's number for it; 0 for a lease on nothing.
        placements: of its groups.
        released: blocks [0, released) have been given back.
        ended: why it is over; None while it lives.
        anchor: keeps the client attached while the lease is in use.
        withheld: further blocks that are stored and were not promised.
        withheld_reason: why, as on the wire.
    """

    __slots__ = (
        "__weakref__",
        "anchor",
        "ended",
        "lease_id",
        "placements",
        "released",
        "session",
        "withheld",
        "withheld_reason",
    )

    def __init__(self, session: Session | None, reply: pb.LeaseReply) -> None:
        self.session = session if reply.lease_id else None
        self.lease_id = reply.lease_id
        self.released = 0
        self.withheld = reply.withheld
        self.withheld_reason: int = reply.withheld_reason
        self.ended: str | None = None
        self.anchor: object = None
        self.placements: Sequence[Placement] = ()
        if session is not None:  # last: if it raises, __del__ gives back
            ready = reply.ready if len(reply.groups) == 1 else 0
            self.placements = [session.placement(group, i, ready) for i, group in enumerate(reply.groups)]

    @property
    def is_fail_open(self) -> bool:
        """Whether a block that is not loaded in time is a miss."""
        return self.session is not None and self.session.is_fail_open

    def check_alive(self) -> None:
        """Raise LeaseExpired if the lease is over."""
        if self.ended is not None:
            raise LeaseExpired(self.ended)

    def end(self, reason: str) -> None:
        """The lease is over: let go of the slabs. Says nothing to the daemon."""
        if self.ended is None:
            self.ended = reason
            for placement in self.placements:
                placement.drop()
            if self.session is not None:
                self.session.forget(self.lease_id)

    def release(self) -> None:
        """Give everything back; idempotent."""
        session = self.session
        if self.ended is None and session is not None:
            self.end("the lease was released")
            session.release(self.lease_id, 0)

    def populate(self, slab: Slab) -> None:
        """A slab is read for the first time."""
        if self.session is not None:
            self.session.slabs.populate(slab)

    def note_copy(self, nbytes: int, seconds: float) -> None:
        """Blocks have been copied out of warm."""
        if self.session is not None:
            self.session.copies.note(nbytes, seconds)

    def await_ready(self, stop: int, deadline_s: float) -> None:
        """Ask the daemon once to say when blocks [0, stop) are readable; cuts the lease if some are lost.

        Raises:
            LeaseExpired: the lease is over.
        """
        self.check_alive()
        try:
            reply = self.ask(WAIT, pb.WaitRequest(lease_id=self.lease_id, stop=stop), deadline_s)
        except DeadlineExceeded:
            return
        for placement in self.placements:
            placement.note_ready(reply.ready)
            if reply.lost:
                placement.cut(reply.lost - 1)
        if reply.lost or reply.ready < stop:
            time.sleep(_ASK_AGAIN_S)
        elif any(each.ready_from(self.released) < min(stop, each.stop) for each in self.placements):
            self.end("the daemon took the blocks back: the lease had expired")
            self.check_alive()

    def ask(self, rpc: Rpc[Q, R], request: Q, deadline_s: float) -> R:
        """A call about this lease.

        Raises:
            LeaseExpired: the daemon does not know the lease any more, or is gone.
        """
        assert self.session is not None
        try:
            return self.session.link.call(rpc, request, deadline_s)
        except (NotFound, LeaseExpired, Unavailable) as error:
            if isinstance(error, Unavailable) and not self.session.is_lost:
                raise
            self.end(f"the lease is over: {error}")
            raise LeaseExpired(str(self.ended)) from error

    def __del__(self) -> None:
        # From the garbage collector, maybe in the middle of a call: only note it, the keeper sends the release.
        if getattr(self, "ended", "") is None and self.session is not None:
            self.session.release_later(self.lease_id)
