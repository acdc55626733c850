"""The one background thread of a session: keeps leases alive while nobody calls, and notices a lost daemon."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from typing import TYPE_CHECKING

from kvstore.protocol.errors import KVStoreError
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client.rpc import RENEW

if TYPE_CHECKING:
    from kvstore_client.session import Session

_RELEASE_AGAIN_S = 0.005
_RETIRED_EVERY_RENEWALS = 6
"""A session that is never idle hears of retired slabs by a Renew of its own, every so many periods."""


class Keeper:
    """Starts with a session's first lease and ends with the session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fd_lock = threading.Lock()
        self._renewed_s = time.monotonic()
        threading.Thread(target=self._run, name="kvstore-client-keeper", daemon=True).start()

    def wake(self) -> None:
        """Make the thread look at its session now."""
        with self._fd_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def abandon(self) -> None:
        """Close the descriptor in a forked child, where the thread does not exist."""
        with contextlib.suppress(OSError):
            os.close(self._wake_fd)
        self._wake_fd = -1

    def _run(self) -> None:
        try:
            self._keep()
        finally:
            with self._fd_lock:
                os.close(self._wake_fd)
                self._wake_fd = -1

    def _keep(self) -> None:
        session = self._session
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        fd = session.attach.fileno()
        if fd < 0:
            return
        # No POLLIN: answers belong to the callers. A closed connection wakes this thread at once.
        poller.register(fd, select.POLLRDHUP)
        while not session.is_lost:
            if poller.poll(self._sleep_s() * 1000):
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
                session.attach.check_peer()
            session.flush_releases()
            self._renew()

    def _sleep_s(self) -> float:
        session = self._session
        if session.has_releases:
            return _RELEASE_AGAIN_S
        due_s = session.link.last_sent_s + session.renew_every_s - time.monotonic()
        return min(max(due_s, 0.001), session.renew_every_s) if session.lease_count else session.renew_every_s

    def _renew(self) -> None:
        session, now = self._session, time.monotonic()
        if session.is_lost:
            return
        is_silent = session.lease_count > 0 and now - session.link.last_sent_s >= session.renew_every_s
        wants_news = len(session.slabs) > 0 and now - self._renewed_s >= session.renew_every_s * _RETIRED_EVERY_RENEWALS
        if not is_silent and not wants_news:
            return
        self._renewed_s = now
        with contextlib.suppress(KVStoreError):  # the next call of a user will say what is wrong
            reply = session.link.call(RENEW, pb.RenewRequest(), now + session.renew_every_s)
            session.slabs.drop(reply.retired_slab_ids)
