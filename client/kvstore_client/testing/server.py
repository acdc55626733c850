"""The fake daemon's attach socket: the local RPC, one thread a client."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from google.protobuf.message import DecodeError, Message

from kvstore.protocol.errors import InternalError, InvalidRequest, KVStoreError, ProtocolMismatch, Unavailable
from kvstore.protocol.frames import PROTOCOL_VERSION, Frame, FrameSocket, Method
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client.testing.store import FakeSession

if TYPE_CHECKING:
    from kvstore_client.testing.daemon import FakeDaemon

_FOREVER_S = 3600.0


class Handler(NamedTuple):
    """How a method is handled: its request class, and what answers it."""

    request: type[Message]
    answer: Callable[[FakeDaemon, FakeSession, Any, float], Message]


def _open_session(daemon: FakeDaemon, session: FakeSession, request: pb.OpenSessionRequest, _s: float) -> Message:
    given = min(request.staging_bytes, daemon.staging_bytes_max)
    daemon.store.attach_staging(session, given)
    return pb.OpenSessionResponse(
        session_id=session.session_id,
        staging_bytes=given,
        lease_ttl_ms=int(daemon.renew_every_s * 6000),
        renew_every_ms=max(1, int(daemon.renew_every_s * 1000)),
        tenant=daemon.store.tenant,
    )


HANDLERS: dict[Method, Handler] = {
    Method.OPEN_SESSION: Handler(pb.OpenSessionRequest, _open_session),
    Method.OPEN_NAMESPACE: Handler(
        pb.OpenNamespaceRequest, lambda daemon, _, request, __: daemon.store.open_namespace(request.spec)
    ),
    Method.MATCH: Handler(pb.MatchRequest, lambda daemon, _, request, __: daemon.store.match(request)),
    Method.EXISTS: Handler(
        pb.ExistsRequest, lambda daemon, _, request, __: daemon.store.exists(request.namespace, request.keys)
    ),
    Method.ACQUIRE: Handler(
        pb.AcquireRequest, lambda daemon, session, request, _: daemon.store.acquire(session, request)
    ),
    Method.WAIT: Handler(
        pb.WaitRequest, lambda daemon, session, request, deadline_s: daemon.store.wait(session, request, deadline_s)
    ),
    Method.RENEW: Handler(pb.RenewRequest, lambda daemon, session, _, __: daemon.store.renew(session)),
    Method.RELEASE: Handler(
        pb.ReleaseRequest, lambda daemon, session, request, _: daemon.store.release(session, request)
    ),
    Method.HANDOFF: Handler(
        pb.HandoffRequest, lambda daemon, session, request, _: daemon.store.handoff(session, request)
    ),
    Method.ADOPT: Handler(pb.AdoptRequest, lambda daemon, session, request, _: daemon.store.adopt(session, request)),
    Method.PUT: Handler(
        pb.PutRequest, lambda daemon, session, request, deadline_s: daemon.store.put(session, request, deadline_s)
    ),
    Method.PREFETCH: Handler(
        pb.PrefetchRequest, lambda daemon, _, request, __: daemon.store.prefetch(request.namespace, request.keys)
    ),
    Method.DELETE: Handler(
        pb.DeleteRequest, lambda daemon, _, request, __: daemon.store.delete(request.namespace, request.keys)
    ),
    Method.CLEAR: Handler(pb.ClearRequest, lambda daemon, _, request, __: daemon.store.clear(request.namespace)),
}


def answer(daemon: FakeDaemon, session: FakeSession, method: Method, payload: bytes, deadline_s: float) -> Message:
    """Answer one call.

    Args:
        daemon: whose knobs and store.
        session: of the caller.
        method: of the call.
        payload: its message.
        deadline_s: of the call, on time.monotonic().

    Raises:
        KVStoreError: the answer is an error.
    """
    if daemon.latency_s:
        time.sleep(daemon.latency_s)
    daemon.running.wait()
    handler = HANDLERS[method]
    try:
        request = handler.request.FromString(payload)
    except DecodeError as error:
        raise InvalidRequest(f"not a {handler.request.__name__}") from error
    if daemon.failure is not None:
        raise daemon.failure
    return handler.answer(daemon, session, request, deadline_s)


class Served:
    """One client's connection."""

    def __init__(self, daemon: FakeDaemon, sock: socket.socket) -> None:
        self._daemon = daemon
        self._frames = FrameSocket(sock)
        self._session = daemon.store.open_session("")
        self._puts: queue.SimpleQueue[tuple[Frame, float] | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Begin to answer."""
        for target in (self._read, self._put):
            threading.Thread(target=target, name=f"fake-kvstored-{target.__name__}", daemon=True).start()

    def close(self) -> None:
        """Hang up."""
        self._frames.close()

    def _read(self) -> None:
        with contextlib.suppress(Unavailable, InvalidRequest, TimeoutError, OSError):
            while True:
                self._dispatch(self._frames.recv())
        self._puts.put(None)
        self._frames.close()
        self._daemon.store.close_session(self._session)

    def _put(self) -> None:
        """The puts of one session, in order."""
        while (put := self._puts.get()) is not None:
            self._answer(*put)

    def _dispatch(self, frame: Frame) -> None:
        self._daemon.calls[Method(frame.method).name] += 1
        deadline_s = time.monotonic() + (frame.deadline_ms / 1000 if frame.deadline_ms else _FOREVER_S)
        if frame.method == Method.HELLO:
            self._hello(frame)
        elif frame.method == Method.MAP_SLABS:
            self._map_slabs(frame)
        elif frame.method == Method.PUT:
            self._puts.put((frame, deadline_s))
        elif frame.method == Method.WAIT:
            threading.Thread(
                target=self._answer, args=(frame, deadline_s), name="fake-kvstored-wait", daemon=True
            ).start()
        else:
            self._answer(frame, deadline_s)

    def _answer(self, frame: Frame, deadline_s: float) -> None:
        try:
            reply = answer(self._daemon, self._session, Method(frame.method), frame.payload, deadline_s)
        except KVStoreError as error:
            self._send(frame, str(error).encode(), error.code)
        except AttributeError as error:  # the session was closed under a put
            self._send(frame, str(error).encode(), InternalError.code)
        else:
            self._send(frame, reply.SerializeToString())

    def _hello(self, frame: Frame) -> None:
        daemon = self._daemon
        daemon.running.wait()
        hello = pb.HelloRequest.FromString(frame.payload)
        if hello.protocol_version != PROTOCOL_VERSION or daemon.protocol_version != PROTOCOL_VERSION:
            message = f"this daemon speaks protocol {daemon.protocol_version}, the client {hello.protocol_version}"
            self._send(frame, message.encode(), ProtocolMismatch.code)
            return
        self._session.name = hello.client_name
        reply = pb.HelloResponse(
            protocol_version=PROTOCOL_VERSION,
            server_version="fake",
            token=self._session.token,
            instance_id=daemon.instance_id,
            grpc_target=daemon.grpc_target,
        )
        self._send(frame, reply.SerializeToString())

    def _map_slabs(self, frame: Frame) -> None:
        daemon, session = self._daemon, self._session
        daemon.running.wait()
        reply, fds = pb.MapSlabsResponse(), []
        for slab_id in pb.MapSlabsRequest.FromString(frame.payload).slab_ids:
            slab = daemon.store.pool.slabs.get(slab_id)
            if slab_id == 0 and session.staging is not None:
                reply.slabs.append(pb.SlabInfo(segment_bytes=session.staging.memory.nbytes))
                fds.append(session.staging.fd)
            elif slab is not None:
                reply.slabs.append(slab.info())
                fds.append(slab.segment.fd)
        self._send(frame, reply.SerializeToString(), fds=fds)

    def _send(self, frame: Frame, payload: bytes, status: int = 0, fds: list[int] | None = None) -> None:
        with contextlib.suppress(Unavailable, OSError):
            self._frames.send(frame.call_id, frame.method, payload, status, fds=fds or ())
