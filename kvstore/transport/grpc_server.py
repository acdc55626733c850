"""The public gRPC service on a Unix socket: the same handlers as on the attach socket, plus Admin, health, reflection.

gRPC says nothing of who calls over a Unix socket, so every RPC of ours carries the token of an attached session;
only health and reflection do without.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstore.protocol.errors import DeadlineExceeded, KVStoreError, QuotaExceeded
from kvstore.protocol.frames import MAX_PAYLOAD_BYTES
from kvstore.transport import sockets
from kvstore.transport.config import Limits, TransportConfig
from kvstore.transport.connection import Connection
from kvstore.transport.engine import DataEngine, SessionView
from kvstore.transport.handlers import Handlers, check_deadline
from kvstore.transport.methods import Kind, MethodSpec, answer, defects_logged, parse
from kvstore.transport.registry import SessionRegistry
from kvstore.v1 import admin_pb2, kvstore_pb2

TOKEN_METADATA = "kvstore-token"
KVSTORE_SERVICE = kvstore_pb2.DESCRIPTOR.services_by_name["KVStore"].full_name
ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name

MESSAGE_CHARS_MAX = 1000  # of an error: it travels in a header
_FRAMING_BYTES = 64 << 10  # on top of the largest message, so that the limit said is the one of the local RPC
_NO_DEADLINE_S = 365 * 86400.0  # where a client gives no deadline, gRPC tells of one in the year 2262
REPLY_S = 0.03  # what a wait leaves for its answer to travel: gRPC cancels at the deadline and the answer is lost
STATUS = {status.value[0]: status for status in grpc.StatusCode}
_NO_DESCRIPTORS = (
    "MapSlabs answers only on the attach socket, {path}: descriptors cannot travel over gRPC. "
    "Send it there as a frame, on the connection that gave the session token"
)


class GrpcCall(NamedTuple):
    """One RPC whose token was good."""

    payload: bytes
    context: grpc.ServicerContext
    connection: Connection
    session: SessionView
    deadline_s: float  # time.monotonic


Run: TypeAlias = Callable[[MethodSpec, GrpcCall], bytes]
Behavior: TypeAlias = Callable[[bytes, grpc.ServicerContext], bytes]
AnyHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def server_options() -> list[tuple[str, int]]:
    """Bounds of messages and connections, for gRPC's core."""
    size = MAX_PAYLOAD_BYTES + _FRAMING_BYTES
    return [
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", size),
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", 5_000),  # closes connections that never speak
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),  # closes those whose process is stopped
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.max_connection_idle_ms", 600_000),
    ]


class StreamLimit(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Bounds the streams that need no token: each holds a thread and counts against the RPCs at a time."""

    def __init__(self, streams: int) -> None:
        self._places = threading.BoundedSemaphore(streams)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], AnyHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> AnyHandler | None:
        """Wrap what streams; unary calls pass."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        serializers = handler.request_deserializer, handler.response_serializer
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._bounded(handler.unary_stream), *serializers)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(self._bounded(handler.stream_stream), *serializers)
        return handler

    def _bounded(self, behavior: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def stream(request: object, context: grpc.ServicerContext) -> Iterator[Any]:
            if not self._places.acquire(blocking=False):
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many health or reflection streams are open")
            if not context.add_callback(self._places.release):
                self._places.release()
                return iter(())
            return behavior(request, context)

        return stream


class GrpcServer:
    """The server. Call sequence: start, (set_serving), stop."""

    def __init__(
        self,
        engine: DataEngine,
        handlers: Handlers,
        admin: Mapping[str, MethodSpec],
        config: TransportConfig,
        registry: SessionRegistry,
    ) -> None:
        self._engine = engine
        self._handlers = handlers
        self._config = config
        self._registry = registry
        limits = config.limits
        self._waiting = threading.BoundedSemaphore(limits.grpc_waits)
        self._health = health.HealthServicer(experimental_non_blocking=False)
        self._pool = ThreadPoolExecutor(limits.grpc_rpcs, thread_name_prefix="grpc")
        # Not together with max_concurrent_streams: that would turn RESOURCE_EXHAUSTED into UNAVAILABLE.
        self._server = grpc.server(
            self._pool,
            interceptors=[StreamLimit(limits.grpc_public_streams)],
            options=server_options(),
            maximum_concurrent_rpcs=limits.grpc_rpcs,
        )
        self._register(handlers.methods(), admin)
        self._inode: tuple[int, int] | None = None

    def start(self) -> None:
        """Bind and serve.

        Raises:
            PathTaken: the path is in use.
            InvalidRequest: the group cannot be given.
            OSError: the directory is missing or not writable.
        """
        path = self._config.grpc_path
        sockets.free_path(path, self._config.owns_paths)
        with sockets.private_umask():
            try:
                self._server.add_insecure_port(self._config.grpc_target)
            except RuntimeError as error:
                raise OSError(f"could not bind {path}: {error}") from error
        self._inode = sockets.inode(path)
        sockets.open_up(path, self._config.socket_mode, self._config.socket_group)
        self._server.start()

    def set_serving(self, serving: bool) -> None:
        """What the health service says of everything."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", KVSTORE_SERVICE, ADMIN_SERVICE):
            self._health.set(service, status)

    def stop(self, grace_s: float) -> None:
        """Refuse new RPCs, give those that run `grace_s`, then cancel them. Removes the socket. Idempotent."""
        self._server.stop(grace_s).wait(grace_s + 5.0)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._inode is not None:  # gRPC unlinks it as a rule
            sockets.unlink_own(self._config.grpc_path, self._inode)

    def _register(self, data: Mapping[str, MethodSpec], admin: Mapping[str, MethodSpec]) -> None:
        for service, methods in ((KVSTORE_SERVICE, data), (ADMIN_SERVICE, admin)):
            table = {
                # Bytes in, bytes out: our own parsing says INVALID_ARGUMENT where gRPC's would say INTERNAL.
                name: grpc.unary_unary_rpc_method_handler(self._behavior(spec))
                for name, spec in methods.items()
            }
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, table),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (KVSTORE_SERVICE, ADMIN_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.set_serving(True)

    def _behavior(self, spec: MethodSpec) -> Behavior:
        runs: dict[Kind, Run] = {
            Kind.INLINE: _run_inline,
            Kind.PUT: self._run_put,
            Kind.WAIT: self._run_wait,
            Kind.DESCRIPTORS: self._refuse_descriptors,
        }
        run = runs[spec.kind]

        def behave(payload: bytes, context: grpc.ServicerContext) -> bytes:
            began_s = time.monotonic()
            try:
                connection, session = self._registry.find(token_of(context))
                self._engine.touch(session)
                deadline_s = began_s + budget_s(self._config.limits, context)
                check_deadline(spec.name, deadline_s)
                return run(spec, GrpcCall(payload, context, connection, session, deadline_s))
            except KVStoreError as error:
                context.abort(STATUS[error.code], str(error)[:MESSAGE_CHARS_MAX])

        return behave

    def _run_wait(self, spec: MethodSpec, call: GrpcCall) -> bytes:
        with self._place_to_block(), defects_logged(spec.name):
            request = cast("kvstore_pb2.WaitRequest", parse(spec, call.payload))
            until_s = call.deadline_s - min(REPLY_S, (call.deadline_s - time.monotonic()) / 4)
            response = self._handlers.wait(request, call.session, until_s, call.context.is_active)
            return response.SerializeToString()

    def _run_put(self, spec: MethodSpec, call: GrpcCall) -> bytes:
        with self._place_to_block():
            try:
                return call.connection.put(spec, call.payload, call.deadline_s)
            except TimeoutError as error:
                raise DeadlineExceeded("Put: no answer by the deadline; part of it may be stored") from error

    def _refuse_descriptors(self, spec: MethodSpec, call: GrpcCall) -> bytes:
        call.context.abort(grpc.StatusCode.UNIMPLEMENTED, _NO_DESCRIPTORS.format(path=self._config.attach_path))

    @contextlib.contextmanager
    def _place_to_block(self) -> Iterator[None]:
        if not self._waiting.acquire(blocking=False):
            limit = self._config.limits.grpc_waits
            raise QuotaExceeded(f"{limit} Wait or Put calls are running over gRPC; retry, or use the attach socket")
        try:
            yield
        finally:
            self._waiting.release()


def _run_inline(spec: MethodSpec, call: GrpcCall) -> bytes:
    return answer(spec, call.payload, call.session, call.deadline_s)


def budget_s(limits: Limits, context: grpc.ServicerContext) -> float:
    """Seconds that a call may take: what its client gave, within what the daemon allows."""
    remaining_s = context.time_remaining()
    if remaining_s is None or remaining_s > _NO_DEADLINE_S:
        return limits.default_deadline_s
    return min(remaining_s, limits.max_deadline_s)


def token_of(context: grpc.ServicerContext) -> str | bytes | None:
    """The session token that a call carries."""
    return next((value for key, value in context.invocation_metadata() if key == TOKEN_METADATA), None)
