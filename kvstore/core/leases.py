"""Leases: a session's time-limited claim that blocks stay where they are.

A lease ends by release, when its time runs out, or with its session. Ending it gives its pins back and nothing
else: a slot that is still being filled for it goes on being filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvstore.core.block import Block, Namespace
from kvstore.core.slots import Slot
from kvstore.protocol.errors import LeaseExpired, NotFound, PermissionDenied


@dataclass(slots=True, eq=False)
class LeasePart:
    """The pinned blocks of one namespace: blocks[i] lies in slots[i]; [0, released) have been given back."""

    namespace: Namespace
    first_block: int
    blocks: list[Block]
    slots: list[Slot]
    released: int = 0


@dataclass(slots=True, eq=False)
class Lease:
    """One claim of one session."""

    lease_id: int
    session_id: int
    tenant: str
    parts: list[LeasePart]
    tokens: int
    expires_s: float = 0.0
    handoff: bytes = b""  # set while it waits to be adopted

    @property
    def pinned(self) -> int:
        """Number of slots it pins."""
        return sum(len(part.slots) - part.released for part in self.parts)


@dataclass(slots=True)
class LeaseTable:
    """All leases. `unpin(part, start, stop)` gives the pins of part.slots[start:stop] back."""

    ttl_s: float
    unpin: Callable[[LeasePart, int, int], None]
    _leases: dict[int, Lease] = field(default_factory=dict)
    _by_session: dict[int, dict[int, Lease]] = field(default_factory=dict)
    _tokens: dict[bytes, Lease] = field(default_factory=dict)
    _seen: dict[int, float] = field(default_factory=dict)  # last sign of life of a session that has leases
    _last_id: int = 0

    def __len__(self) -> int:
        return len(self._leases)

    def open(self, session_id: int, tenant: str, parts: list[LeasePart], tokens: int, now_s: float) -> Lease:
        """Register pins that the caller has just taken."""
        self._last_id += 1
        lease = Lease(self._last_id, session_id, tenant, parts, tokens, now_s + self.ttl_s)
        self._leases[lease.lease_id] = lease
        self._by_session.setdefault(session_id, {})[lease.lease_id] = lease
        return lease

    def get(self, session_id: int, lease_id: int) -> Lease:
        """The session's own, living lease.

        Raises:
            LeaseExpired: it has ended, or never was.
            PermissionDenied: it belongs to another session.
        """
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseExpired(f"lease {lease_id} has ended; acquire again")
        if lease.session_id != session_id:
            raise PermissionDenied(f"lease {lease_id} belongs to another session; use handoff and adopt to pass one on")
        return lease

    def size(self, lease_id: int) -> int:
        """Blocks of a lease, 0 where it has ended; safe beside one thread that changes the table."""
        lease = self._leases.get(lease_id)
        return sum(len(part.slots) for part in lease.parts) if lease is not None else 0

    def of_session(self, session_id: int) -> list[Lease]:
        """The leases of a session."""
        return list(self._by_session.get(session_id, {}).values())

    def renew(self, session_id: int, now_s: float) -> int:
        """A sign of life renews all leases of a session; returns how many. O(1): it comes with every call."""
        mine = self._by_session.get(session_id)
        if not mine:
            return 0
        self._seen[session_id] = now_s
        return len(mine)

    def release(self, lease: Lease, upto: int = 0) -> None:
        """Give back blocks [0, upto), counted as the caller asked for them, of every part; upto 0: the whole lease."""
        if upto == 0:
            self._end(lease)
            return
        for part in lease.parts:
            stop = min(upto - part.first_block, len(part.slots))
            if stop > part.released:
                self.unpin(part, part.released, stop)
                part.released = stop

    def offer_handoff(self, lease: Lease, token: bytes) -> None:
        """Let whoever shows `token` adopt the lease, once."""
        if lease.handoff:
            del self._tokens[lease.handoff]
        lease.handoff = token
        self._tokens[token] = lease

    def adopt(self, session_id: int, tenant: str, token: bytes, now_s: float) -> Lease:
        """Move an offered lease to another session of the same tenant.

        Raises:
            NotFound: the token was never given, has been used, or its lease has ended.
            PermissionDenied: the lease is another tenant's.
        """
        lease = self._tokens.get(token)
        if lease is None:
            raise NotFound("no lease is offered under this token: it is single use and ends with its lease")
        if lease.tenant != tenant:
            raise PermissionDenied("the lease offered under this token belongs to another tenant")
        del self._tokens[token]
        lease.handoff = b""
        self._leave(lease)
        lease.session_id = session_id
        lease.expires_s = now_s + self.ttl_s
        self._by_session.setdefault(session_id, {})[lease.lease_id] = lease
        return lease

    def expire(self, now_s: float) -> list[Lease]:
        """End every lease whose time has run out."""
        for lease in self._leases.values():
            self._count_renewals(lease)
        expired = [lease for lease in self._leases.values() if lease.expires_s <= now_s]
        for lease in expired:
            self._end(lease)
        return expired

    def end_session(self, session_id: int) -> list[Lease]:
        """End a session's leases, but those it has handed off and nobody has adopted yet."""
        ended = []
        for lease in self.of_session(session_id):
            self._count_renewals(lease)
            if not lease.handoff:
                self._end(lease)
                ended.append(lease)
        self._seen.pop(session_id, None)
        return ended

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._leases.values()))

    def _end(self, lease: Lease) -> None:
        del self._leases[lease.lease_id]
        self._leave(lease)
        if lease.handoff:
            del self._tokens[lease.handoff]
        for part in lease.parts:
            self.unpin(part, part.released, len(part.slots))
            part.released = len(part.slots)

    def _leave(self, lease: Lease) -> None:
        mine = self._by_session[lease.session_id]
        del mine[lease.lease_id]
        if not mine:
            del self._by_session[lease.session_id]
            self._seen.pop(lease.session_id, None)

    def _count_renewals(self, lease: Lease) -> None:
        seen_s = self._seen.get(lease.session_id)
        if seen_s is not None:
            lease.expires_s = max(lease.expires_s, seen_s + self.ttl_s)
