"""The TCP listener: the gRPC service for workers on other hosts, who have to prove who they are with every call.

Who calls is said by the client's certificate, or by a token; the session token of Hello only says which session.
Health and reflection stay on the Unix socket: nothing here answers somebody unknown.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError

from kvstore.access import Identity, RemoteAccess
from kvstore.protocol.errors import InvalidRequest, KVStoreError, ProtocolMismatch, Unavailable
from kvstore.protocol.frames import PROTOCOL_VERSION
from kvstore.transport.byte_streams import ByteStreams
from kvstore.transport.config import TransportConfig
from kvstore.transport.engine import Engine
from kvstore.transport.grpc_server import (
    ADMIN_SERVICE,
    KVSTORE_SERVICE,
    MESSAGE_CHARS_MAX,
    REPLY_S,
    STATUS,
    budget_s,
    server_options,
    token_of,
)
from kvstore.transport.handlers import Handlers, check_deadline
from kvstore.transport.methods import Kind, MethodSpec, answer, defects_logged, parse
from kvstore.transport.remote_handlers import admin_methods, audit_always, data_methods
from kvstore.transport.remote_sessions import RemoteSession, RemoteSessions
from kvstore.transport.slab_views import SlabViews
from kvstore.transport.stalls import Streams
from kvstore.v1 import kvstore_pb2 as pb

log = logging.getLogger(__name__)


StreamBehavior: TypeAlias = Callable[[Iterator[bytes], grpc.ServicerContext], bytes]

ACCESS_METADATA = "kvstore-access-bin"
_SAN = "x509_subject_alternative_name"
_TICK_S = 0.25
_NAME_BYTES_MAX = 128
_STOP_S = 5.0
_STOP_POLL_S = 0.01
_REFUSAL_EVERY_S = 1.0
_NO_SHARED_MEMORY = "{} needs shared memory, which there is none of over TCP; use {}"


class RemoteServer:
    """The server. Call sequence: start, stop."""

    def __init__(
        self,
        engine: Engine,
        handlers: Handlers,
        admin: Mapping[str, MethodSpec],
        config: TransportConfig,
        access: RemoteAccess,
    ) -> None:
        limits = config.limits
        self._handlers = handlers
        self._config = config
        self._access = access
        tenant_max = limits.remote_sessions * 3 // 4 if len(access.tenants) > 1 else limits.remote_sessions
        self._sessions = RemoteSessions(engine, limits.remote_sessions, tenant_max, config.lease_ttl_s)
        self._views = SlabViews(engine)
        self._bytes = ByteStreams(engine, self._sessions, self._views)
        self._streams = Streams(limits.remote_streams, limits.streams_per_session, limits.send_timeout_s)
        self._calls = Streams(limits.remote_calls, limits.calls_per_session, limits.send_timeout_s)
        self._waits = Streams(limits.remote_waits, limits.calls_per_session, limits.send_timeout_s)
        self._refusals = Refusals()
        threads = limits.remote_sessions + limits.remote_calls + limits.remote_streams
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="remote")
        options = [
            *server_options(),
            ("grpc.max_allowed_incoming_connections", limits.remote_connections),
            ("grpc.http2.max_ping_strikes", 0),  # a client's keepalive is no attack: it costs a frame
        ]
        self._server = grpc.server(self._pool, options=options, maximum_concurrent_rpcs=threads)
        self._register(data_methods(handlers.methods(), self._sessions), admin_methods(admin, self._sessions, engine))
        self._stopping = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="remote-ticker", daemon=True)

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be had, or the certificate is none.
        """
        access = self._access
        try:
            if access.certificate:
                port = self._server.add_secure_port(access.address, _credentials(access))
            else:
                port = self._server.add_insecure_port(access.address)
        except (RuntimeError, ValueError) as error:
            raise OSError(f"could not listen on {access.address}: {error}") from error
        if not port:
            raise OSError(f"could not listen on {access.address}; is it taken, and the certificate in order?")
        audit_always()
        self._server.start()
        self._ticker.start()
        log.info("serving on tcp://%s:%d", f"[{access.host}]" if ":" in access.host else access.host, port)

    def stop(self, grace_s: float) -> None:
        """Refuse new calls, give those that run `grace_s`, end every session. Idempotent."""
        self._stopping.set()
        until_s = time.monotonic() + grace_s
        ended = self._server.stop(grace_s)
        while time.monotonic() < until_s and (len(self._calls) or len(self._streams)):
            time.sleep(_STOP_POLL_S)
        self._sessions.close()  # ends the Hello streams, which would otherwise outlast any grace
        ended.wait(_STOP_S)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._ticker.ident is not None:
            self._ticker.join(_STOP_S)
        self._views.close()

    def _register(self, data: Mapping[str, MethodSpec], admin: Mapping[str, MethodSpec]) -> None:
        # All as streams, which a unary call is on the wire too: nothing is read of a caller that was not let in.
        table = {name: grpc.stream_unary_rpc_method_handler(self._behavior(spec)) for name, spec in data.items()}
        table["Hello"] = grpc.stream_stream_rpc_method_handler(self._hello)
        table["Fetch"] = grpc.stream_stream_rpc_method_handler(self._fetch)
        table["Store"] = grpc.stream_unary_rpc_method_handler(self._store)
        for name, instead in (("MapSlabs", "Fetch"), ("Put", "Store")):
            table[name] = grpc.stream_unary_rpc_method_handler(_refusing(_NO_SHARED_MEMORY.format(name, instead)))
        ops = {name: grpc.stream_unary_rpc_method_handler(self._behavior(spec)) for name, spec in admin.items()}
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(KVSTORE_SERVICE, table),
                grpc.method_handlers_generic_handler(ADMIN_SERVICE, ops),
            )
        )

    def _tick(self) -> None:
        while not self._stopping.wait(_TICK_S):
            self._sessions.end_silent()
            for running in (self._calls, self._streams):
                running.cut_stalled()
            self._views.drop_retired()

    # -- who calls

    def _identity(self, context: grpc.ServicerContext) -> Identity:
        if self._access.client_ca:
            return self._access.by_certificate(cast("Iterable[bytes]", context.auth_context().get(_SAN, ())))
        shown = next((value for key, value in context.invocation_metadata() if key == ACCESS_METADATA), None)
        return self._access.by_token(shown.encode() if isinstance(shown, str) else shown)

    def _session(self, context: grpc.ServicerContext) -> RemoteSession:
        return self._sessions.find(token_of(context), self._identity(context))

    # -- what is called

    def _behavior(self, spec: MethodSpec) -> StreamBehavior:
        def behave(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            began_s = time.monotonic()
            try:
                session = self._session(context)
                with self._calls.place(spec.name, session.view.id, context) as call:
                    payload = _only(call.take(messages), spec.name)
                    deadline_s = began_s + budget_s(self._config.limits, context)
                    check_deadline(spec.name, deadline_s)
                    if spec.kind is Kind.WAIT:
                        return self._wait(spec, payload, session, deadline_s, context)
                    return answer(spec, payload, session.view, deadline_s)
            except KVStoreError as error:
                _abort(context, error)

        return behave

    def _wait(
        self,
        spec: MethodSpec,
        payload: bytes,
        session: RemoteSession,
        deadline_s: float,
        context: grpc.ServicerContext,
    ) -> bytes:
        with self._waits.place(spec.name, session.view.id, context), defects_logged(spec.name):
            request = cast("pb.WaitRequest", parse(spec, payload))
            until_s = deadline_s - min(REPLY_S, (deadline_s - time.monotonic()) / 4)
            return self._handlers.wait(request, session.view, until_s, context.is_active).SerializeToString()

    def _hello(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            identity = self._identity(context)
            with self._calls.place("Hello", identity, context) as call:
                hello = _parse_hello(_only(call.take(messages), "Hello"))
            session = self._sessions.open(identity, hello.client_name, context.peer())
        except KVStoreError as error:
            self._refusals.note(context.peer(), error)
            _abort(context, error)
        if not context.add_callback(lambda: self._sessions.end(session, "the connection ended")):
            self._sessions.end(session, "the connection ended during the hello")
            return
        yield pb.HelloResponse(
            protocol_version=PROTOCOL_VERSION,
            server_version=self._config.server_version,
            token=session.view.token,
            instance_id=self._config.instance_id,
        ).SerializeToString()
        session.ended.wait()
        _abort(context, Unavailable("the session has ended"))

    def _fetch(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        began_s = time.monotonic()
        try:
            session = self._session(context)
            with self._streams.place("Fetch", session.view.id, context) as stream, defects_logged("Fetch"):
                payload = _only(stream.take(messages), "Fetch")
                deadline_s = began_s + budget_s(self._config.limits, context)
                try:
                    request = pb.FetchRequest.FromString(payload)
                except DecodeError as error:
                    raise InvalidRequest("Fetch: the bytes are no FetchRequest") from error
                yield from self._bytes.fetch(session, request, deadline_s, stream)
        except KVStoreError as error:
            _abort(context, error)

    def _store(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        began_s = time.monotonic()
        try:
            session = self._session(context)
            with self._streams.place("Store", session.view.id, context) as stream, defects_logged("Store"):
                deadline_s = began_s + budget_s(self._config.limits, context)
                return self._bytes.store(session, messages, deadline_s, stream).SerializeToString()
        except KVStoreError as error:
            _abort(context, error)


class Refusals:
    """Hellos that were refused, told of at most once a second: nobody unknown may fill the log."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told_s = 0.0
        self._untold = 0

    def note(self, where: str, error: KVStoreError) -> None:
        """One was refused."""
        with self._lock:
            now_s, untold = time.monotonic(), self._untold
            if now_s - self._told_s < _REFUSAL_EVERY_S:
                self._untold += 1
                return
            self._told_s, self._untold = now_s, 0
        log.warning("a hello over TCP was refused: from=%r reason=%r, and %d before it", where, str(error), untold)


def _only(message: bytes | None, name: str) -> bytes:
    """The one request of a call."""
    if message is None:
        raise InvalidRequest(f"{name}: the call has no request")
    return message


def _credentials(access: RemoteAccess) -> grpc.ServerCredentials:
    pair = [(access.key, access.certificate)]
    return grpc.ssl_server_credentials(pair, access.client_ca or None, bool(access.client_ca))


def _parse_hello(payload: bytes) -> pb.HelloRequest:
    try:
        hello = pb.HelloRequest.FromString(payload)
    except DecodeError as error:
        raise InvalidRequest("Hello: the bytes are no HelloRequest") from error
    if hello.protocol_version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"the client speaks protocol {hello.protocol_version} and this daemon {PROTOCOL_VERSION}; "
            "install the same version of kvtier on both sides"
        )
    if len(hello.client_name.encode()) > _NAME_BYTES_MAX:
        raise InvalidRequest(f"client_name is longer than {_NAME_BYTES_MAX} bytes")
    return hello


def _refusing(message: str) -> StreamBehavior:
    def behave(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, message)

    return behave


def _abort(context: grpc.ServicerContext, error: KVStoreError) -> NoReturn:
    context.abort(STATUS[error.code], str(error)[:MESSAGE_CHARS_MAX])
