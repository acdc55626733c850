"""Binding Unix sockets so that nobody else can reach or lose them."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from kvstore.protocol.errors import InvalidRequest

_PROBE_TIMEOUT_S = 1.0
_umask_lock = threading.Lock()


class PathTaken(InvalidRequest):
    """A socket's path is in use, or holds something that is not ours to remove."""


@contextlib.contextmanager
def private_umask() -> Iterator[None]:
    """Sockets bound inside are 0600 from their first moment; a chmod afterwards would leave a gap.

    The umask is the whole process's, so this is for start-up, before other threads make files.
    """
    with _umask_lock:
        before = os.umask(0o177)
        try:
            yield
        finally:
            os.umask(before)


def free_path(path: Path, owned: bool) -> None:
    """Make sure that nothing is at `path`; where the caller owns it, remove the socket that a dead daemon left.

    gRPC binds over a living server's socket silently, so somebody who listens there is found by connecting.

    Raises:
        PathTaken: something is there that may not be removed.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise PathTaken(f"{path} exists and is no socket; remove it or choose another --socket")
    if not owned:
        raise PathTaken(f"{path} exists; another daemon may be using it")
    if _listened_on(path):
        raise PathTaken(f"somebody listens on {path}; stop that daemon or choose another --socket")
    path.unlink(missing_ok=True)


def _listened_on(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
        return True


def open_up(path: Path, mode: int, group: str | int | None) -> None:
    """Give a private socket its group, then its mode: in this order nobody gets in for a moment.

    Raises:
        InvalidRequest: there is no such group, or the daemon may not give it.
    """
    if group is not None:
        try:
            os.chown(path, -1, _group_id(group))
        except PermissionError as error:
            raise InvalidRequest(f"socket group {group!r}: this user is no member of it ({error})") from error
    if mode != 0o600:
        path.chmod(mode)


def _group_id(group: str | int) -> int:
    if isinstance(group, int):
        return group
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise InvalidRequest(f"socket group {group!r} does not exist") from error


def inode(path: Path) -> tuple[int, int]:
    """What tells this socket file from a later one of the same name."""
    status = path.lstat()
    return status.st_dev, status.st_ino


def unlink_own(path: Path, own: tuple[int, int]) -> None:
    """Remove a socket file if it is still the one that was bound."""
    with contextlib.suppress(FileNotFoundError):
        if inode(path) == own:
            path.unlink()
