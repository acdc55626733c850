"""Where the daemon listens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvstore.protocol.errors import InvalidRequest

ADDRESS_VARIABLE = "KVSTORE_ADDRESS"
ATTACH_SUFFIX = ".attach"
SYSTEM_SOCKET = "/run/kvstore/kvstore.sock"
MAX_SOCKET_PATH_BYTES = 107
"""sun_path has 108 bytes and the last one is a NUL; the longest path used is the attach socket's."""


@dataclass(frozen=True, slots=True)
class Address:
    """A daemon's socket on this machine.

    Attributes:
        path: of the gRPC socket.
    """

    path: str

    @property
    def attach_path(self) -> str:
        """Path of the attach socket."""
        return self.path + ATTACH_SUFFIX

    def __str__(self) -> str:
        return f"unix:{self.path}"


def resolve(address: str | os.PathLike[str] | None = None) -> Address:
    """The daemon to talk to.

    Args:
        address: "unix:/path/to.sock" or the bare path. None: $KVSTORE_ADDRESS if set; then
            $XDG_RUNTIME_DIR/kvstore/kvstore.sock if a daemon is there (or nowhere else); then
            /run/kvstore/kvstore.sock.

    Raises:
        InvalidRequest: it is not the address of a Unix socket, or too long for one.
    """
    given = os.fspath(address) if address is not None else os.environ.get(ADDRESS_VARIABLE) or _default_path()
    path = _path_of(given)
    size = len(os.fsencode(path + ATTACH_SUFFIX))
    if size > MAX_SOCKET_PATH_BYTES:
        raise InvalidRequest(
            f"the socket path has {size} bytes with its suffix {ATTACH_SUFFIX!r}; "
            f"a Unix socket path can have {MAX_SOCKET_PATH_BYTES}: {path!r}"
        )
    return Address(path)


def _path_of(given: str) -> str:
    scheme, colon, rest = given.partition(":")
    path = given
    if colon and "/" not in scheme:
        if scheme != "unix":
            raise InvalidRequest(f"address {given!r} is not a Unix socket; give unix:/path/to.sock")
        path = rest[2:] if rest.startswith("//") else rest
    if not path or "\0" in path:
        raise InvalidRequest(f"address {given!r} names no socket path; give unix:/path/to.sock")
    return path


def _default_path() -> str:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        return SYSTEM_SOCKET
    path = Path(runtime) / "kvstore" / "kvstore.sock"
    return SYSTEM_SOCKET if not path.exists() and Path(SYSTEM_SOCKET).exists() else str(path)
