"""Where the daemon listens."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from kvstore.protocol.errors import InvalidRequest

TCP_PREFIX = "tcp://"
_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|\[::1\]", re.ASCII)
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):\d{1,5}", re.ASCII)
ADDRESS_VARIABLE = "KVSTORE_ADDRESS"
ATTACH_SUFFIX = ".attach"
SYSTEM_SOCKET = "/run/kvstore/kvstore.sock"
MAX_SOCKET_PATH_BYTES = 107
"""sun_path has 108 bytes and the last one is a NUL; the longest path used is the attach socket's."""


@dataclass(frozen=True, slots=True)
class TLS:
    """Files of a connection over TCP, in PEM form.

    Attributes:
        ca: the authority that signed the daemon's certificate; None: those that gRPC brings.
        certificate: this client's, with its chain, where the daemon wants one.
        key: of it.
        server_name: what the daemon's certificate must name, where that is not the host of the address.
    """

    ca: str | os.PathLike[str] | None = None
    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str = ""

    def read(self, which: str) -> bytes:
        """The content of the file `which` ("ca", "certificate", "key"); empty where there is none.

        Raises:
            InvalidRequest: it cannot be read.
        """
        path = getattr(self, which)
        if path is None:
            return b""
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise InvalidRequest(f"tls.{which}: {path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Address:
    """Where a daemon is: a socket on this machine, or over TCP.

    Attributes:
        path: of the gRPC socket; empty over TCP.
        target: HOST:PORT over TCP; else empty.
    """

    path: str
    target: str = ""

    @property
    def is_tcp(self) -> bool:
        """Whether it is reached over TCP."""
        return bool(self.target)

    @property
    def is_loopback(self) -> bool:
        """Whether it is reached without leaving this machine."""
        return not self.target or _LOOPBACK.fullmatch(self.target.rpartition(":")[0]) is not None

    @property
    def attach_path(self) -> str:
        """Path of the attach socket."""
        return self.path + ATTACH_SUFFIX

    def __str__(self) -> str:
        return f"tcp://{self.target}" if self.target else f"unix:{self.path}"


def resolve(address: str | os.PathLike[str] | None = None) -> Address:
    """The daemon to talk to.

    Args:
        address: "unix:/path/to.sock", the bare path, or "tcp://host:port". None: $KVSTORE_ADDRESS if set; then
            $XDG_RUNTIME_DIR/kvstore/kvstore.sock if a daemon is there (or nowhere else); then
            /run/kvstore/kvstore.sock.

    Raises:
        InvalidRequest: it is no address, or too long for a Unix socket.
    """
    given = os.fspath(address) if address is not None else os.environ.get(ADDRESS_VARIABLE) or _default_path()
    if given.startswith(TCP_PREFIX):
        return Address("", _target_of(given))
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
            raise InvalidRequest(
                f"address {given!r} is not a Unix socket; give unix:/path/to.sock, or tcp://host:port for another host"
            )
        path = rest[2:] if rest.startswith("//") else rest
    if not path or "\0" in path:
        raise InvalidRequest(f"address {given!r} names no socket path; give unix:/path/to.sock")
    return path


def _target_of(given: str) -> str:
    target = given.removeprefix(TCP_PREFIX)
    if not _HOST_PORT.fullmatch(target) or not 0 < int(target.rpartition(":")[2]) < 65536:
        raise InvalidRequest(f"address {given!r} is not of the form tcp://host:port, as tcp://10.0.0.1:7400")
    return target


def _default_path() -> str:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        return SYSTEM_SOCKET
    path = Path(runtime) / "kvstore" / "kvstore.sock"
    return SYSTEM_SOCKET if not path.exists() and Path(SYSTEM_SOCKET).exists() else str(path)
