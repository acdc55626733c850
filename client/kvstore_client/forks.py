"""fork(): the child must neither use nor disturb the parent's attachment."""

from __future__ import annotations

import os
import threading
import weakref

from kvstore_client.connection import Connection

_lock = threading.Lock()
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
_is_hooked = False


def register(connection: Connection) -> None:
    """Make a connection dead in every later child of this process; the first call installs the hook."""
    global _is_hooked
    with _lock:
        if not _is_hooked:
            os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_abandon_all)
            _is_hooked = True
        _connections.add(connection)


def _abandon_all() -> None:
    _lock.release()
    for connection in list(_connections):
        connection.abandon()
    _connections.clear()
