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

FLUSH_EVERY_S = 0.01
"""How long a release may wait for a call that takes it along."""
_DOZE_AFTER_S = 0.5  # without a call there is nothing to flush, and waking up costs others the GIL
_RETIRED_EVERY_RENEWALS = 6
"""A session that is never idle hears of retired slabs by a Renew of its own, every so many periods."""
_LOOK_AGAIN_S = 0.001  # the connection has ended, and a caller who is reading the last answers will notice


class Keeper:
    """Starts with a session's first lease and ends with the session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fd_lock = threading.Lock()
        self._renewed_s = time.monotonic()
        self._dozes = False
        try:
            threading.Thread(target=self._run, name="kvstore-client-keeper", daemon=True).start()
        except RuntimeError:  # no thread to be had
            self.abandon()
            raise

    def wake(self) -> None:
        """Make the thread look at its session now."""
        with self._fd_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def expect_flush(self) -> None:
        """Something was deferred: make sure that the thread looks within FLUSH_EVERY_S."""
        if self._dozes:
            self._dozes = False
            self.wake()

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
        if fd >= 0:  # no POLLIN: answers belong to the callers. A closed connection wakes this thread at once
            poller.register(fd, select.POLLRDHUP)
        elif session.shares_memory:
            return
        while not session.is_lost:
            for ready, _ in poller.poll(self._sleep_s() * 1000):
                if ready == fd:
                    self._check_peer()
                else:
                    os.eventfd_read(ready)
            if session.attach.has_late:
                session.attach.pump()
            if session.link.has_deferred:
                session.link.flush()
            self._renew()

    def _check_peer(self) -> None:
        self._session.attach.check_peer()
        if not self._session.is_lost:
            time.sleep(_LOOK_AGAIN_S)

    def _sleep_s(self) -> float:
        session, now = self._session, time.monotonic()
        silent_s = now - session.link.last_sent_s
        self._dozes = silent_s > _DOZE_AFTER_S
        # Asked after _dozes was set: whoever defers something from here on wakes this thread. Late answers are taken
        # in soon: the daemon hangs up on a client whose buffer stays full.
        if not self._dozes or session.link.has_deferred or session.attach.has_late:
            return FLUSH_EVERY_S
        if session.wants_renewal:
            return min(max(session.renew_every_s - silent_s, 0.001), session.renew_every_s)
        return session.renew_every_s

    def _renew(self) -> None:
        session, now = self._session, time.monotonic()
        if session.is_lost:
            return
        is_silent = session.wants_renewal and now - session.link.last_sent_s >= session.renew_every_s
        wants_news = len(session.slabs) > 0 and now - self._renewed_s >= session.renew_every_s * _RETIRED_EVERY_RENEWALS
        if not is_silent and not wants_news:
            return
        self._renewed_s = now
        with contextlib.suppress(KVStoreError):  # the next call of a user will say what is wrong
            reply = session.link.call(RENEW, pb.RenewRequest(), now + session.renew_every_s)
            session.slabs.drop(reply.retired_slab_ids)
