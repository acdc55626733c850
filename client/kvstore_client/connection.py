"""The client's current session: attaches, attaches again after a loss, and decides what a failure means."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kvstore.protocol.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    KVStoreError,
    ProtocolMismatch,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
)
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client.breaker import Breaker
from kvstore_client.remote import open_session
from kvstore_client.rpc import RENEW, deadline_after
from kvstore_client.session import Options, Session

T = TypeVar("T")

DEFAULT_TENANT = "default"
PROBE_TIMEOUT_S = 1.0
FIRST_BACK_OFF_S = 0.05
MAX_BACK_OFF_S = 1.0

FAIL_OPEN_ERRORS = (Unavailable, DeadlineExceeded, InternalError)
"""What a fail-open client turns into a miss; everything else is a mistake that somebody has to see."""
_SWALLOWED = (*FAIL_OPEN_ERRORS, QuotaExceeded, Unauthenticated, ProtocolMismatch)
"""Later on also a full daemon, and one that was replaced; the constructor raises these."""


class Connection:
    """Shared by a client and its namespaces. Any thread may use it.

    Attributes:
        options: of every session.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._session: Session | None = None
        self._attach_lock = threading.Lock()
        self._dead: str | None = None
        self._back_off_s = 0.0
        self._retry_at_s = 0.0
        self._last_error = ""
        self._tenant = DEFAULT_TENANT
        self._specs: dict[bytes, NamespaceSpec] = {}
        self._breaker = Breaker(self._probe)

    @property
    def tenant(self) -> str:
        """Given by the daemon when last attached; a guess before."""
        return self._tenant

    @property
    def breaker_is_open(self) -> bool:
        """Whether a fail-open client answers misses without asking."""
        return self._breaker.is_open

    def learn(self, digest: bytes, spec: NamespaceSpec) -> None:
        """A namespace was opened."""
        self._specs[digest] = spec

    def spec_of(self, digest: bytes) -> NamespaceSpec:
        """The namespace of a digest.

        Raises:
            InvalidRequest: this client has not opened it.
        """
        spec = self._specs.get(digest)
        if spec is None:
            raise InvalidRequest(f"call client.namespace(...) first for the namespace {digest.hex()[:16]} of the lease")
        return spec

    def run(self, operation: Callable[[Session, float], T], timeout_s: float, *, is_repeatable: bool = True) -> T:
        """Do something on the session, within a deadline.

        A connection that had died while nobody used it is no reason to fail: then once more on a new one.

        Args:
            operation: gets the session and the deadline.
            timeout_s: bound of everything, attaching included.
            is_repeatable: whether it may be done twice.

        Raises:
            InvalidRequest: the client is closed, or belongs to the parent of a forked process.
            KVStoreError: what the operation raises.
        """
        deadline_s = deadline_after(timeout_s)
        session, is_fresh = self._attached(deadline_s)
        try:
            return operation(session, deadline_s)
        except (Unavailable, Unauthenticated):
            if is_fresh or not session.is_lost or not is_repeatable or self._dead is not None:
                raise
        session, _ = self._attached(deadline_s)
        return operation(session, deadline_s)

    def run_or(
        self,
        operation: Callable[[Session, float], T],
        timeout_s: float,
        miss: Callable[[], T],
        *,
        is_repeatable: bool = True,
    ) -> T:
        """Like run(); for a fail-open client a daemon that does not answer is `miss()`."""
        if not self.options.is_fail_open:
            return self.run(operation, timeout_s, is_repeatable=is_repeatable)
        if self._breaker.is_open:
            self.check_usable()
            return miss()
        try:
            result = self.run(operation, timeout_s, is_repeatable=is_repeatable)
        except _SWALLOWED as error:
            self._breaker.failed(error)
            return miss()
        self._breaker.succeeded()
        return result

    def check_usable(self) -> None:
        """Raise InvalidRequest if the client is closed or forked."""
        if self._dead is not None:
            raise InvalidRequest(self._dead)

    def close(self) -> None:
        """End the session; idempotent."""
        if self._dead is not None:
            return
        self._dead = "this client is closed; make a new one"
        self._breaker.stop()
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def abandon(self) -> None:
        """In a forked child: the client is dead, its descriptors are closed, the parent notices nothing."""
        self._dead = "this client was made before fork() and belongs to the parent process; make a new one in the child"
        session, self._session = self._session, None
        if session is not None:
            session.abandon()

    def _attached(self, deadline_s: float) -> tuple[Session, bool]:
        """The session, and whether this call attached it."""
        session = self._session
        if session is not None and not session.is_lost:
            return session, False
        self.check_usable()
        if not self._attach_lock.acquire(timeout=max(deadline_s - time.monotonic(), 0)):
            raise DeadlineExceeded("another thread of this client is still attaching to the daemon")
        try:
            session = self._session
            if session is not None and not session.is_lost:
                return session, False
            return self._attach(deadline_s), True
        finally:
            self._attach_lock.release()

    def _attach(self, deadline_s: float) -> Session:
        now = time.monotonic()
        if now < self._retry_at_s:
            wait_s = self._retry_at_s - now
            raise Unavailable(f"{self._last_error}; the next attempt is made in {wait_s:.2f} s at the earliest")
        try:
            session = open_session(self.options, deadline_s)
        except KVStoreError as error:
            self._back_off_s = min(max(2 * self._back_off_s, FIRST_BACK_OFF_S), MAX_BACK_OFF_S)
            self._retry_at_s = time.monotonic() + self._back_off_s
            self._last_error = str(error)
            raise
        self._back_off_s = self._retry_at_s = 0.0
        self._tenant = session.tenant
        self._session = session
        if self._dead is not None:  # closed meanwhile
            session.close()
            self.check_usable()
        return session

    def _probe(self) -> None:
        self._retry_at_s = 0.0  # the breaker paces its probes itself
        self.run(lambda session, deadline_s: session.link.call(RENEW, pb.RenewRequest(), deadline_s), PROBE_TIMEOUT_S)
