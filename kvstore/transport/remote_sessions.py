"""Sessions over TCP: they begin with a Hello, and end with its stream or after a lease's time without a call."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.access import Identity
from kvstore.protocol.errors import LeaseExpired, NotFound, QuotaExceeded, Unauthenticated, Unavailable
from kvstore.transport.engine import DataEngine, Peer, SessionView
from kvstore.transport.methods import internal_error
from kvstore.transport.slab_views import map_staging
from kvstore.v1 import kvstore_pb2 as pb

log = logging.getLogger(__name__)

_NOBODY = (1 << 32) - 1  # no process of this machine has this uid, so nothing is granted by it
_TOKEN_BYTES = 32
LEASES_MAX = 256
LEASED_BLOCKS_MAX = 1 << 18  # 48 bytes each are kept for Fetch


@dataclass(slots=True, eq=False)
class RemoteSession:
    """One client over TCP.

    Attributes:
        view: the engine's session.
        identity: who it is; every call of the session must come from the same.
        seen_s: its last call, time.monotonic.
        leases: where the blocks of its leases lie, by lease id.
        kinds: whether a namespace that it opened is a chain, by digest.
        storing: held by the one Store that has its staging.
        ended: set once it is over.
    """

    view: SessionView
    identity: Identity
    seen_s: float
    leases: dict[int, Sequence[pb.LeaseGroup]] = field(default_factory=dict)
    kinds: dict[bytes, bool] = field(default_factory=dict)
    storing: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)
    _staging: memoryview | None = None

    def check_room(self, blocks: int) -> None:
        """Refuse a lease that this session has no room for.

        Raises:
            QuotaExceeded: it has too many leases, or on too many blocks.
        """
        held = sum(len(group.slots) // 4 for groups in list(self.leases.values()) for group in groups)
        if len(self.leases) >= LEASES_MAX or held + blocks > LEASED_BLOCKS_MAX:
            raise QuotaExceeded(
                f"the session holds {len(self.leases)} leases on {held} blocks; over TCP it may hold {LEASES_MAX} on "
                f"{LEASED_BLOCKS_MAX}: release some"
            )

    def keep(self, reply: pb.LeaseReply) -> None:
        """A lease was given."""
        if reply.lease_id:
            self.leases[reply.lease_id] = tuple(reply.groups)

    def groups_of(self, lease_id: int) -> Sequence[pb.LeaseGroup]:
        """Where the blocks of a lease lie.

        Raises:
            LeaseExpired: the session has no such lease.
        """
        groups = self.leases.get(lease_id)
        if groups is None:
            raise LeaseExpired(f"lease {lease_id} is none of this session, or has ended; acquire again")
        return groups

    def is_chain(self, namespace: bytes) -> bool:
        """Whether blocks of a namespace hang on one another.

        Raises:
            NotFound: the session has not opened it.
        """
        if namespace not in self.kinds:
            raise NotFound(f"namespace {namespace.hex()[:16]} was not opened by this session; call OpenNamespace first")
        return self.kinds[namespace]

    def staging(self, engine: DataEngine) -> memoryview:
        """Its staging segment, mapped on first use; only with `storing` held."""
        if self._staging is None or not self._staging:
            self._staging = map_staging(engine, self.view)
        return self._staging


class RemoteSessions:
    """All sessions over TCP. Any thread may use it."""

    def __init__(self, engine: DataEngine, sessions_max: int, tenant_max: int, ttl_s: float) -> None:
        self._engine = engine
        self._sessions_max = sessions_max
        self._tenant_max = tenant_max
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._by_token: dict[bytes, RemoteSession] = {}
        self._by_id: dict[int, RemoteSession] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._by_token)

    def open(self, identity: Identity, name: str, where: str) -> RemoteSession:
        """Begin a session for `identity`, which connects from `where` and calls itself `name`.

        Raises:
            QuotaExceeded: there are too many.
            Unavailable: the daemon is shutting down.
        """
        with self._lock:
            if self._closed:
                raise Unavailable("the daemon is shutting down")
            if len(self._by_token) >= self._sessions_max:
                raise QuotaExceeded(
                    f"{self._sessions_max} sessions are open over TCP, which is the limit; end one first"
                )
            mine = sum(1 for other in self._by_id.values() if other.identity.tenant == identity.tenant)
            if mine >= self._tenant_max:
                raise QuotaExceeded(f"this tenant has {mine} sessions over TCP, which is its share; end one first")
            view = self._engine.open_session(Peer(0, _NOBODY, _NOBODY), f"{name} ({where})", identity.tenant)
            session = RemoteSession(view, identity, time.monotonic())
            self._by_token[view.token] = self._by_id[view.id] = session
        log.info(
            "remote session began: session=%d identity=%r tenant=%r from=%r name=%r",
            view.id,
            identity.name,
            identity.tenant,
            where,
            name,
        )
        return session

    def find(self, text: str | bytes | None, identity: Identity) -> RemoteSession:
        """The session of a token in hex; its call renews it.

        Raises:
            Unauthenticated: there is none, or it is somebody else's.
        """
        if text is None:
            raise Unauthenticated(
                "no session token: call Hello first and send its token as metadata kvstore-token, in hex"
            )
        try:
            token = bytes.fromhex(text if isinstance(text, str) else text.decode("ascii"))
        except (ValueError, UnicodeDecodeError):
            token = b""
        session = self._by_token.get(token) if len(token) == _TOKEN_BYTES else None
        if session is None or session.identity[1:] != identity[1:] or session.ended.is_set():
            raise Unauthenticated("the session token is unknown: the session has ended, or it is not yours")
        self.touch(session)
        return session

    def of(self, view: SessionView) -> RemoteSession:
        """The session that the engine knows as `view`.

        Raises:
            Unauthenticated: it has ended meanwhile.
        """
        session = self._by_id.get(view.id)
        if session is None:
            raise Unauthenticated("the session has ended")
        return session

    def touch(self, session: RemoteSession) -> None:
        """A sign of life: leases are renewed."""
        session.seen_s = time.monotonic()
        self._engine.touch(session.view)

    def end(self, session: RemoteSession, reason: str) -> None:
        """End a session with all it holds; idempotent."""
        with self._lock:
            if session.ended.is_set():
                return
            session.ended.set()
            self._by_token.pop(session.view.token, None)
            self._by_id.pop(session.view.id, None)
        log.info("remote session ended: session=%d reason=%r", session.view.id, reason)
        session.leases.clear()
        try:
            self._engine.close_session(session.view)
        except Exception as error:  # noqa: BLE001 - one thread ends every session that falls silent
            internal_error("close_session", error)

    def end_silent(self) -> None:
        """End the sessions that gave no sign of life for a lease's time."""
        before_s = time.monotonic() - self._ttl_s
        for session in list(self._by_token.values()):
            if session.seen_s < before_s:
                self.end(session, f"no call for {self._ttl_s:g} s")

    def close(self) -> None:
        """End all; none begins from now on."""
        with self._lock:
            self._closed = True
            left = list(self._by_token.values())
        for session in left:
            self.end(session, "the daemon is shutting down")
