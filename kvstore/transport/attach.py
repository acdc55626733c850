"""The attach socket: who may come in, the hello, and a thread for each session."""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import socket
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import DecodeError

from kvstore.protocol.errors import InvalidRequest, ProtocolMismatch, QuotaExceeded, Unauthenticated
from kvstore.protocol.frames import PROTOCOL_VERSION, Method
from kvstore.transport import sockets
from kvstore.transport.config import TransportConfig, TransportHooks
from kvstore.transport.connection import Connection, Services
from kvstore.transport.engine import DataEngine, Peer, SessionView
from kvstore.transport.framing import Request
from kvstore.transport.handlers import Handlers
from kvstore.transport.lanes import WaitPool
from kvstore.transport.methods import MethodSpec, defects_logged
from kvstore.transport.registry import SessionRegistry
from kvstore.transport.watcher import PeerWatcher
from kvstore.v1 import kvstore_pb2 as pb

log = logging.getLogger(__name__)

_BACKLOG = 128
_HALF_OPEN_MAX = 64  # connections beyond max_sessions that may be about to say hello, or to be refused
_CREDENTIALS = struct.Struct("3i")
_SO_PEERGROUPS = 59  # Linux 4.13; Python's socket module does not name it
_GROUPS_MAX = 256  # as many as Python's getsockopt has room for
_NAME_BYTES_MAX = 128
_VERSION_BYTES_MAX = 128
_RETRY_S = 0.1  # after accept failed for want of descriptors or memory
_TICK_S = 0.01


def peer_of(sock: socket.socket) -> Peer:
    """Process, user and groups that connected `sock`, as the kernel noted them then."""
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    groups = array.array("I")
    try:
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_MAX * groups.itemsize))
    except OSError as error:  # more than that, or an old kernel: uid and gid still say who it is
        log.warning("groups of pid %d are not known: %s", pid, error)
    return Peer(pid, uid, gid, tuple(groups))


class AttachServer:
    """Listens on the attach socket. Call sequence: start, (close_door), stop."""

    def __init__(
        self,
        engine: DataEngine,
        handlers: Handlers,
        specs: Mapping[int, MethodSpec],
        config: TransportConfig,
        hooks: TransportHooks,
        registry: SessionRegistry,
    ) -> None:
        self._engine = engine
        self._config = config
        self._hooks = hooks
        self._registry = registry
        limits = config.limits
        self._waits = WaitPool(limits.wait_threads, limits.waits_per_session)
        self._services = Services(
            engine=engine,
            handlers=handlers,
            specs=specs,
            waits=self._waits,
            limits=limits,
            greet=self._greet,
            on_gone=self._forget,
        )
        self._watcher = PeerWatcher()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._inode = (0, 0)
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()  # over _connections and _closing
        self._closing = False
        self._opening = threading.Lock()  # so that no two hellos take the last place
        self._connections_max = limits.max_sessions + _HALF_OPEN_MAX
        self._acceptor = threading.Thread(target=self._accept_all, name="attach-accept", daemon=True)

    @property
    def path(self) -> Path:
        """Of the socket."""
        return self._config.attach_path

    def start(self) -> None:
        """Bind, then listen.

        Raises:
            PathTaken: the path is in use.
            InvalidRequest: the group cannot be given.
            OSError: the directory is missing or not writable.
        """
        sockets.free_path(self.path, self._config.owns_paths)
        with sockets.private_umask():
            self._listener.bind(str(self.path))
        self._inode = sockets.inode(self.path)
        sockets.open_up(self.path, self._config.socket_mode, self._config.socket_group)
        self._listener.listen(_BACKLOG)
        self._watcher.start()
        self._acceptor.start()

    def close_door(self) -> None:
        """Take no new connections and give the path back; sessions go on. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        if self._acceptor.ident is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            self._acceptor.join(_BACKLOG * _TICK_S)
        self._listener.close()
        sockets.unlink_own(self.path, self._inode)

    def stop(self, grace_s: float) -> None:
        """Close the door, let calls in flight finish for up to `grace_s`, then end every session."""
        self.close_door()
        until_s = time.monotonic() + grace_s
        while time.monotonic() < until_s and any(each.calls_in_flight for each in self._snapshot()):
            time.sleep(_TICK_S)
        self._waits.close()
        for connection in self._snapshot():
            connection.wait_sent(max(until_s - time.monotonic(), _TICK_S))
            connection.end("the daemon is shutting down")
        until_s = time.monotonic() + max(grace_s, 1.0)
        while self._snapshot() and time.monotonic() < until_s:
            time.sleep(_TICK_S)
        if self._acceptor.ident is not None:
            self._watcher.stop(max(grace_s, 1.0))

    def _snapshot(self) -> list[Connection]:
        with self._lock:
            return list(self._connections)

    # -- the acceptor's thread

    def _accept_all(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._closing or error.errno in (errno.EBADF, errno.EINVAL):
                    return
                log.error("accept failed: %s", error)  # EMFILE, ENOMEM: sessions go on, new ones come later
                time.sleep(_RETRY_S)
                continue
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        connection = Connection(sock, self._services)
        with self._lock:
            admitted = not self._closing and len(self._connections) < self._connections_max
            if admitted:
                self._connections.add(connection)
        if not admitted:  # the acceptor waits for nobody, so there is no call to answer yet
            log.warning("a connection was closed: %d are open", self._connections_max)
            sock.close()
            return
        try:
            self._watcher.add(connection, self._config.limits.hello_timeout_s)
            threading.Thread(target=self._serve, args=(connection,), name="session", daemon=True).start()
        except (OSError, RuntimeError) as error:  # the peer died; or no descriptor, no thread to be had
            log.warning("a connection was dropped before its hello: %s", error)
            self._gone(connection)

    def _serve(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            self._gone(connection)

    def _gone(self, connection: Connection) -> None:
        connection.end("dropped")
        self._watcher.retire(connection)
        with self._lock:
            self._connections.discard(connection)

    # -- hello, on the session's thread

    def _greet(self, connection: Connection, request: Request) -> tuple[SessionView, bytes]:
        with defects_logged("HELLO"):
            peer = peer_of(connection.sock)
            tenant = self._hooks.resolve_tenant(peer.uid, (peer.gid, *peer.groups))
            hello = _parse_hello(request)
            session = self._open_session(connection, peer, hello.client_name, tenant)
        self._watcher.greeted(connection)
        log.info(
            "session began: session=%d pid=%d uid=%d tenant=%r name=%r version=%r",
            session.id,
            peer.pid,
            peer.uid,
            tenant,
            hello.client_name,
            hello.client_version,
        )
        reply = pb.HelloResponse(
            protocol_version=PROTOCOL_VERSION,
            server_version=self._config.server_version,
            token=session.token,
            instance_id=self._config.instance_id,
            grpc_target=self._config.grpc_target,
        )
        return session, reply.SerializeToString()

    def _open_session(self, connection: Connection, peer: Peer, name: str, tenant: str) -> SessionView:
        limit = self._config.limits.max_sessions
        with self._opening:
            if len(self._registry) >= limit:
                raise QuotaExceeded(f"{limit} sessions are attached, which is this daemon's limit; end one first")
            session = self._engine.open_session(peer, name, tenant)
            self._registry.add(session.token, connection)
            return session

    def _forget(self, session: SessionView) -> None:
        self._registry.remove(session.token)


def _parse_hello(request: Request) -> pb.HelloRequest:
    if request.method != Method.HELLO or request.status:
        raise Unauthenticated("the first frame must be a HELLO")
    try:
        hello = pb.HelloRequest.FromString(request.payload)
    except DecodeError as error:
        raise InvalidRequest("HELLO: the payload is no HelloRequest") from error
    if hello.protocol_version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"the client speaks protocol {hello.protocol_version} and this daemon {PROTOCOL_VERSION}; "
            "install the same version of kvtier on both sides"
        )
    for name, limit in (("client_name", _NAME_BYTES_MAX), ("client_version", _VERSION_BYTES_MAX)):
        size = len(getattr(hello, name).encode())
        if size > limit:
            raise InvalidRequest(f"{name} has {size} bytes; it may have {limit}")
    return hello
