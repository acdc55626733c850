"""One thread that notices when attached processes go away, or never say hello.

A process's pidfd becomes readable the moment it dies, even when a forked child still holds its socket (its EOF
came 2.8 s late in that case). Kernels before 6.5 have no SO_PEERPIDFD: there only EOF is left.

The watcher is also the only place where a connection's descriptors are closed, between two polls: a number that
an event was reported for can then not have been given to another connection meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from typing import Protocol

log = logging.getLogger(__name__)

_SO_PEERPIDFD = 77
_TICK_S = 0.25  # only while somebody has not said hello


class Watched(Protocol):
    """A connection as the watcher sees it. `end` must be idempotent, quick, and raise nothing."""

    sock: socket.socket

    def end(self, reason: str) -> None:
        """The peer is gone: free what it held, now."""

    def dispose(self) -> None:
        """Nobody uses the socket any more: close it."""


def peer_pidfd(sock: socket.socket) -> int | None:
    """A pidfd of the process that connected `sock`; None where the kernel cannot say.

    Raises:
        ProcessLookupError: that process is gone already.
    """
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise
        return None


class PeerWatcher:
    """Watches connections from `add` to `retire`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._by_fd: dict[int, tuple[Watched, bool]] = {}  # bool: the descriptor is a pidfd
        self._fds: dict[Watched, tuple[int, ...]] = {}
        self._silent: dict[Watched, float] = {}  # in order of their deadlines
        self._retired: deque[Watched] = deque()
        self._lock = threading.Lock()  # so that nobody writes to a descriptor that is closed
        self._closed = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="peer-watcher", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Dispose of what was retired and end the thread."""
        self._stopping = True
        self._notify()
        self._thread.join(timeout_s)

    def add(self, connection: Watched, hello_timeout_s: float) -> None:
        """Watch a connection, which has `hello_timeout_s` to call `greeted`.

        Raises:
            ProcessLookupError: the peer is dead already; the connection is not watched.
        """
        pidfd = peer_pidfd(connection.sock)
        fds = (connection.sock.fileno(),) if pidfd is None else (pidfd, connection.sock.fileno())
        self._fds[connection] = fds
        self._silent[connection] = time.monotonic() + hello_timeout_s
        for fd in fds:
            self._by_fd[fd] = (connection, fd == pidfd)
        # ONESHOT: a dead peer's descriptors stay readable until they are closed.
        if pidfd is not None:
            self._epoll.register(pidfd, select.EPOLLIN | select.EPOLLONESHOT)
        self._epoll.register(connection.sock, select.EPOLLRDHUP | select.EPOLLONESHOT)
        self._notify()

    def greeted(self, connection: Watched) -> None:
        """The connection said hello in time."""
        self._silent.pop(connection, None)

    def retire(self, connection: Watched) -> None:
        """Nobody uses the connection any more; its descriptors are closed soon."""
        self._retired.append(connection)
        self._notify()

    def _notify(self) -> None:
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        while not self._stopping:
            events = self._epoll.poll(_TICK_S if self._silent else None)
            self._end_gone(events)
            self._end_silent()
            self._dispose_retired()
        self._dispose_retired()
        with self._lock:
            self._closed = True
            self._epoll.close()
            os.close(self._wake)

    def _end_gone(self, events: list[tuple[int, int]]) -> None:
        gone: list[tuple[Watched, bool]] = []
        for fd, _ in events:
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            elif fd in self._by_fd:
                gone.append(self._by_fd[fd])
        for connection, is_pidfd in sorted(gone, key=lambda item: not item[1]):
            connection.end("the process died" if is_pidfd else "the peer closed the connection")

    def _end_silent(self) -> None:
        now_s = time.monotonic()
        late = [connection for connection, until_s in list(self._silent.items()) if until_s <= now_s]
        for connection in late:
            self._silent.pop(connection, None)
            connection.end("no hello in time")

    def _dispose_retired(self) -> None:
        while self._retired:
            connection = self._retired.popleft()
            self._silent.pop(connection, None)
            for fd in self._fds.pop(connection, ()):
                is_pidfd = self._by_fd.pop(fd)[1]
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)
                if is_pidfd:
                    os.close(fd)
            connection.dispose()
