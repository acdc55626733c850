"""Settings of the transports."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.access import RemoteAccess
from kvstore.protocol.errors import InvalidRequest

ATTACH_SUFFIX = ".attach"
SOCKET_PATH_BYTES_MAX = 107  # sun_path has 108, one of them for the NUL


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of everything that a peer could otherwise make us hold or wait for.

    Attributes:
        max_sessions: attached peers (a few more may be at their hello).
        hello_timeout_s: for a connection to say hello.
        send_timeout_s: for a peer to take a reply before its session is ended.
        default_deadline_s: of a call that names none.
        max_deadline_s: of any call.
        wait_threads: threads for waits of attached sessions; they are started when needed.
        waits_per_session: waits of one session that run at a time (its others wait their turn).
        grpc_rpcs: RPCs at a time, each on a thread; further ones get RESOURCE_EXHAUSTED.
        grpc_waits: of these, how many may be Wait or Put, so that others and the health check find a thread.
        grpc_public_streams: of these, how many may be streams that need no token (health Watch, reflection).
        remote_sessions: clients over TCP, each with a thread for its Hello.
        remote_calls: calls at a time over TCP, each on a thread; further ones get RESOURCE_EXHAUSTED.
        remote_waits: of these, how many may be Wait.
        calls_per_session: of these, how many of one session.
        remote_streams: and how many Fetch or Store.
        streams_per_session: of these, how many of one session.
        remote_connections: TCP connections, with those that have not said yet who they are.
        spin_s: how long a reader polls for a next frame before it sleeps, when frames come closely one after the
            other; 0: never.
    """

    max_sessions: int = 1024
    hello_timeout_s: float = 5.0
    send_timeout_s: float = 5.0
    default_deadline_s: float = 5.0
    max_deadline_s: float = 300.0
    wait_threads: int = 256
    waits_per_session: int = 32
    grpc_rpcs: int = 64
    grpc_waits: int = 40
    grpc_public_streams: int = 8
    remote_sessions: int = 64
    remote_calls: int = 64
    remote_waits: int = 32
    calls_per_session: int = 16
    remote_streams: int = 32
    streams_per_session: int = 4
    remote_connections: int = 256
    spin_s: float = 50e-6


@dataclass(frozen=True, slots=True)
class TransportConfig:
    """Where and how the daemon is reached.

    Attributes:
        socket_path: of the gRPC socket; the attach socket is this plus ".attach".
        socket_mode: permissions of both.
        socket_group: group of both, by name or number; None leaves the daemon's.
        owns_paths: the caller holds the lock that makes these paths its own, so what an earlier daemon left there
            may be removed (never a socket that somebody still listens on).
        instance_id: differs after every start.
        server_version: told to every client.
        remote: the TCP listener; None: there is none.
        lease_ttl_s: after which a silent session's leases end; told to every client with how often to renew.
    """

    socket_path: Path
    instance_id: str
    server_version: str
    socket_mode: int = 0o600
    socket_group: str | int | None = None
    owns_paths: bool = False
    remote: RemoteAccess | None = None
    lease_ttl_s: float = 30.0
    limits: Limits = field(default_factory=Limits)

    @property
    def grpc_path(self) -> Path:
        """Absolute path of the gRPC socket."""
        return self.socket_path.absolute()

    @property
    def attach_path(self) -> Path:
        """Absolute path of the attach socket."""
        return self.grpc_path.with_name(self.grpc_path.name + ATTACH_SUFFIX)

    @property
    def grpc_target(self) -> str:
        """The gRPC socket as gRPC names it."""
        return f"unix:{self.grpc_path}"

    def validate(self) -> None:
        """Check what the kernel would say less clearly.

        Raises:
            InvalidRequest: the paths are too long for a socket, or the mode is no mode.
        """
        size = len(os.fsencode(self.attach_path))
        if size > SOCKET_PATH_BYTES_MAX:
            raise InvalidRequest(
                f"socket path {self.attach_path} has {size} bytes with its suffix {ATTACH_SUFFIX}; "
                f"a Unix socket's may have {SOCKET_PATH_BYTES_MAX}: choose a shorter --socket"
            )
        if not 0 <= self.socket_mode <= 0o777:
            raise InvalidRequest(f"socket mode is {self.socket_mode:o}; it must be 0 to 777 (octal)")


def _own_uid_or_root(uid: int) -> bool:
    return uid in (0, os.geteuid())


def _no_log_level(level: str) -> str:
    raise ValueError("this daemon's log level is fixed")


def _nothing() -> None:
    return


@dataclass(frozen=True, slots=True)
class TransportHooks:
    """What the transports ask of whoever put the daemon together.

    Attributes:
        resolve_tenant: tenant of a peer by its uid and its groups; raises PermissionDenied where it may not attach.
        is_operator: whether a uid may call what changes the daemon (Admin).
        set_log_level: sets the level and returns its name; ValueError for an unknown one.
        on_drain: called after an operator's Drain.
    """

    resolve_tenant: Callable[[int, Sequence[int]], str]
    is_operator: Callable[[int], bool] = _own_uid_or_root
    set_log_level: Callable[[str], str] = _no_log_level
    on_drain: Callable[[], None] = _nothing
