"""Sessions: one attached worker process each, with its staging segment."""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.protocol.errors import QuotaExceeded
from kvstore.tiers.segment import Segment

TOKEN_BYTES = 32


class Peer(Protocol):
    """Who attached, as the kernel says."""

    @property
    def pid(self) -> int:
        """Process id."""

    @property
    def uid(self) -> int:
        """User id."""


@dataclass(slots=True, eq=False)
class Session:
    """One attached worker process."""

    id: int
    token: bytes
    name: str
    pid: int
    uid: int
    tenant: str
    created_s: float
    last_frame_s: float
    calls: int = 0
    staging: Segment | None = None
    retired_slabs: list[int] = field(default_factory=list)
    closed: bool = False


class Sessions:
    """All sessions, and the bytes their staging segments may take together."""

    def __init__(self, staging_max_bytes: int, staging_total_bytes: int) -> None:
        self._staging_max_bytes = staging_max_bytes
        self._staging_total_bytes = staging_total_bytes
        self._lock = threading.Lock()
        self._sessions: dict[int, Session] = {}
        self._last_id = 0
        self.staging_bytes = 0

    def open(self, peer: Peer, name: str, tenant: str) -> Session:
        """Begin a session."""
        now = time.monotonic()
        with self._lock:
            self._last_id += 1
            session = Session(
                self._last_id, secrets.token_bytes(TOKEN_BYTES), name, peer.pid, peer.uid, tenant, now, now
            )
            self._sessions[session.id] = session
            return session

    def attach_staging(self, session: Session, wanted: int) -> int:
        """Give a session its staging segment, at most what is left; returns its size.

        The daemon touches it, so that its pages are charged to the daemon and no put waits for them.

        Raises:
            QuotaExceeded: nothing is left for another segment.
        """
        if session.staging is not None:
            return session.staging.nbytes
        with self._lock:
            given = min(wanted, self._staging_max_bytes, self._staging_total_bytes - self.staging_bytes) & ~4095
            if wanted and given <= 0:
                raise QuotaExceeded(
                    f"staging memory is used up ({self.staging_bytes} of {self._staging_total_bytes} bytes); "
                    "close idle sessions or raise staging_total_bytes"
                )
            self.staging_bytes += given
        if not given:
            return 0
        segment = self._make_staging(session, given)
        with self._lock:
            if not session.closed and session.staging is None:
                session.staging = segment
                return given
            self.staging_bytes -= given  # it ended meanwhile, or another call was first
        segment.close()
        return session.staging.nbytes if session.staging is not None else 0

    def _make_staging(self, session: Session, nbytes: int) -> Segment:
        segment: Segment | None = None
        try:
            segment = Segment(f"kvtier-staging-{session.id}", nbytes)
            segment.populate()
        except (OSError, MemoryError) as error:
            if segment is not None:
                segment.close()
            with self._lock:
                self.staging_bytes -= nbytes
            raise QuotaExceeded(f"no memory for a staging segment of {nbytes} bytes: {error}") from error
        return segment

    def close(self, session: Session) -> bool:
        """End a session; False if it has ended before. A put that still copies keeps the pages until it is done.

        Under the engine's lock, so that nobody passes on a descriptor that is being closed.
        """
        with self._lock:
            if session.closed:
                return False
            session.closed = True
            self._sessions.pop(session.id, None)
            staging, session.staging = session.staging, None
            if staging is not None:
                self.staging_bytes -= staging.nbytes
        if staging is not None:
            staging.close()
        return True

    def slab_retired(self, slab_id: int) -> None:
        """Tell every session, at its next renewal, that a slab has gone."""
        with self._lock:
            for session in self._sessions.values():
                session.retired_slabs.append(slab_id)

    def take_retired(self, session: Session) -> list[int]:
        """The slabs retired since the session last asked."""
        with self._lock:
            retired, session.retired_slabs = session.retired_slabs, []
            return retired

    def all(self) -> list[Session]:
        """The living sessions."""
        with self._lock:
            return list(self._sessions.values())

    def __len__(self) -> int:
        return len(self._sessions)
