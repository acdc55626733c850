"""One attached worker: a thread that reads its frames, answers what does not block, and hands on the rest."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from kvstore.protocol.errors import (
    InvalidRequest,
    KVStoreError,
    ProtocolMismatch,
    QuotaExceeded,
    Unavailable,
)
from kvstore.protocol.frames import MAX_CALLS_IN_FLIGHT, MAX_PAYLOAD_BYTES, PROTOCOL_VERSION, Method
from kvstore.transport.config import Limits
from kvstore.transport.engine import DataEngine, SessionView
from kvstore.transport.framing import FrameReader, OversizeFrame, ReplyWriter, Request
from kvstore.transport.handlers import Handlers
from kvstore.transport.lanes import Job, Lane, WaitPool
from kvstore.transport.methods import Kind, MethodSpec, answer, defects_logged, internal_error, parse
from kvstore.transport.polling import Activity, Poller
from kvstore.v1 import kvstore_pb2 as pb

log = logging.getLogger(__name__)

_MESSAGE_CHARS_MAX = 1000  # of an error: a status is no place for a novel
_HELLO_BYTES_MAX = 4096  # who has not said who he is gets no 4 MiB for a header that announces them
_HOT_GAP_S = 200e-6  # a peer that asked again this soon is likely to do so once more


@dataclass(frozen=True, slots=True)
class Services:
    """What all connections share.

    Attributes:
        handlers: those of the data service.
        specs: its methods by frame number.
        waits: where Wait runs.
        greet: opens the session that a first frame asks for and returns it with the reply, or raises KVStoreError.
        on_gone: called once when a session ends, before the engine is told.
    """

    engine: DataEngine
    handlers: Handlers
    specs: Mapping[int, MethodSpec]
    waits: WaitPool
    limits: Limits
    greet: Callable[[Connection, Request], tuple[SessionView, bytes]]
    on_gone: Callable[[SessionView], None]
    activity: Activity = field(default_factory=Activity)


class Connection:
    """Serves one attach socket from accept to end. `run` is its thread's body."""

    def __init__(self, sock: socket.socket, services: Services) -> None:
        self.sock = sock
        self.session: SessionView | None = None
        self.puts = Lane("puts")
        self._services = services
        self._reader = FrameReader(sock, services.limits.spin_s)
        self._writer = ReplyWriter(sock, services.limits.send_timeout_s)
        self._pending: set[int] = set()  # ids of calls handed to the lane or the pool; set operations are atomic
        self._end_lock = threading.Lock()
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the session is over."""
        return self._ended

    @property
    def calls_in_flight(self) -> int:
        """Calls that run on the lane or the pool."""
        return len(self._pending)

    def run(self) -> None:
        """Greet, then answer frames until the peer or the daemon ends it."""
        reason = "the peer closed the connection"
        try:
            if self._greet():
                self._serve()
        except OversizeFrame as error:
            reason = "oversize frame"
            self._reply_error(error.call_id, error.method, error)
        except Unavailable as error:
            reason = str(error)
        finally:
            self.end(reason)
            self.puts.close()

    def end(self, reason: str) -> None:
        """End the session now: wake the reader, free what it holds in the engine. Idempotent, any thread."""
        with self._end_lock:
            if self._ended:
                return
            self._ended = True
            session = self.session
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            log.debug("socket was gone already")
        if session is not None:
            self._close_session(session, reason)

    def wait_sent(self, timeout_s: float) -> None:
        """Wait, within bounds, until the replies of calls that are no longer in flight have been sent."""
        self._writer.wait_idle(timeout_s)

    def dispose(self) -> None:
        """Close the socket. Only once `run` has returned."""
        self._writer.close()

    def put(self, spec: MethodSpec, payload: bytes, deadline_s: float) -> bytes:
        """A put that came over gRPC, in its turn on the session's lane.

        Raises:
            KVStoreError: as the handler does.
            TimeoutError: no answer by the deadline.
        """
        done: Future[bytes] = Future()
        session = cast("SessionView", self.session)

        def job() -> None:
            self._services.activity.putting.add(self)
            try:
                done.set_result(answer(spec, payload, session, deadline_s))
            except KVStoreError as error:
                done.set_exception(error)
            finally:
                self._services.activity.putting.discard(self)

        self.puts.submit(job)
        return done.result(max(deadline_s - time.monotonic(), 0.0))

    def _close_session(self, session: SessionView, reason: str) -> None:
        log.info("session ended: session=%d pid=%d reason=%r", session.id, session.pid, reason)
        self._services.on_gone(session)
        try:
            self._services.engine.close_session(session)
        except Exception as error:  # noqa: BLE001 - the watcher's thread runs this for every session
            internal_error("close_session", error)

    # -- the reader thread

    def _greet(self) -> bool:
        request = self._reader.receive(_HELLO_BYTES_MAX)
        try:
            session, payload = self._services.greet(self, request)
        except KVStoreError as error:
            self._reply_error(request.call_id, request.method, error)
            return False
        with self._end_lock:
            self.session = session
            ended = self._ended
        if ended:  # died, or took too long, while it was greeted: nobody else closes this session
            self._close_session(session, "ended during the hello")
            return False
        self._writer.reply(request.call_id, Method.HELLO, payload)
        return True

    def _serve(self) -> None:
        session = cast("SessionView", self.session)
        reader, poller = self._reader, Poller(self._reader, self._services.activity)
        may_poll = self._services.limits.spin_s > 0
        replied_s, hot = 0.0, False
        while not self._ended:
            if hot and not self._pending:
                poller.poll()
            request = reader.receive()
            received_s = time.monotonic()
            hot = may_poll and received_s - replied_s < _HOT_GAP_S
            self._on_request(request, session, received_s)
            replied_s = time.monotonic()

    def _on_request(self, request: Request, session: SessionView, received_s: float) -> None:
        call_id, method, status, deadline_ms, payload = request
        services, limits = self._services, self._services.limits
        try:
            services.engine.touch(session)
            spec = services.specs.get(method)
            if spec is None or status or len(self._pending) >= MAX_CALLS_IN_FLIGHT:
                raise _refusal(method, spec, status)
            deadline_s = received_s + (
                min(deadline_ms / 1000, limits.max_deadline_s) if deadline_ms else limits.default_deadline_s
            )
            if spec.kind is Kind.INLINE:
                self._reply(call_id, method, answer(spec, payload, session, deadline_s))
            elif spec.kind is Kind.PUT:
                self._start(request, self.puts.submit, partial(self._put, request, spec, session, deadline_s))
            elif spec.kind is Kind.WAIT:
                self._wait_or_poll(request, spec, session, deadline_s)
            else:
                self._map_slabs(request, spec, session)
        except KVStoreError as error:
            self._reply_error(call_id, method, error)

    def _start(self, request: Request, submit: Callable[[Job], None], job: Job) -> None:
        if request.call_id in self._pending:
            raise InvalidRequest(f"call id {request.call_id} is in flight already; every call needs its own")
        self._pending.add(request.call_id)
        try:
            submit(job)
        except Unavailable:
            self._pending.discard(request.call_id)
            raise

    def _wait_or_poll(self, request: Request, spec: MethodSpec, session: SessionView, deadline_s: float) -> None:
        """Answer at once where nothing needs waiting for (no change of thread: the usual case), else hand on."""
        with defects_logged(spec.name):
            message = cast("pb.WaitRequest", parse(spec, request.payload))
            response = self._services.handlers.poll_wait(message, session)
        if response.lost or response.ready >= message.stop:
            self._reply(request.call_id, request.method, response.SerializeToString())
        else:
            job = partial(self._wait, request, message, session, deadline_s)
            self._start(request, partial(self._services.waits.submit, self), job)

    def _map_slabs(self, request: Request, spec: MethodSpec, session: SessionView) -> None:
        with defects_logged(spec.name):
            message = cast("pb.MapSlabsRequest", parse(spec, request.payload))
            response, fds = self._services.handlers.map_slabs(message, session)
        try:
            self._writer.reply_with_descriptors(request.call_id, request.method, response.SerializeToString(), fds)
        except Unavailable as error:
            self.end(str(error))
        finally:
            for fd in fds:
                os.close(fd)

    # -- threads of the lane and of the pool

    def _put(self, request: Request, spec: MethodSpec, session: SessionView, deadline_s: float) -> None:
        self._services.activity.putting.add(self)
        try:
            payload = answer(spec, request.payload, session, deadline_s)
        except KVStoreError as error:
            self._finish(request, error)
        else:
            self._finish(request, payload)
        finally:
            self._services.activity.putting.discard(self)

    def _wait(self, request: Request, message: pb.WaitRequest, session: SessionView, deadline_s: float) -> None:
        try:
            with defects_logged("Wait"):
                response = self._services.handlers.wait(message, session, deadline_s, lambda: not self._ended)
        except KVStoreError as error:
            self._finish(request, error)
        else:
            self._finish(request, response.SerializeToString())

    def _finish(self, request: Request, result: bytes | KVStoreError) -> None:
        if isinstance(result, KVStoreError):
            self._reply_error(request.call_id, request.method, result, self._pending)
        else:
            self._reply(request.call_id, request.method, result, settles=self._pending)

    # -- any thread

    def _reply(
        self, call_id: int, method: int, payload: bytes, status: int = 0, settles: set[int] | None = None
    ) -> None:
        if len(payload) > MAX_PAYLOAD_BYTES:
            text = f"reply of {len(payload)} bytes is above the limit of {MAX_PAYLOAD_BYTES}; split the batch"
            payload = text.encode()
            status = InvalidRequest.code
        try:
            self._writer.reply(call_id, method, payload, status, settles)
        except Unavailable as error:
            self.end(str(error))

    def _reply_error(self, call_id: int, method: int, error: KVStoreError, settles: set[int] | None = None) -> None:
        text = str(error)[:_MESSAGE_CHARS_MAX]
        self._reply(call_id, method, text.encode(errors="replace"), error.code, settles)


def _refusal(method: int, spec: MethodSpec | None, status: int) -> KVStoreError:
    """Why a frame cannot even be tried."""
    if method == Method.HELLO:
        return InvalidRequest("this session has said hello already")
    if spec is None:
        return ProtocolMismatch(f"method {method} is unknown to this daemon, which speaks protocol {PROTOCOL_VERSION}")
    if status:
        return InvalidRequest(f"status is {status}; it must be 0 in a request")
    return QuotaExceeded(
        f"{MAX_CALLS_IN_FLIGHT} calls of this session are in flight; wait for a reply before the next, "
        "or batch more keys in a call"
    )
