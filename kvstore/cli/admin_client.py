"""How kvctl talks to a daemon: the hello on the attach socket for a token, then the Admin service over gRPC."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

import grpc

from kvstore.protocol.errors import (
    DeadlineExceeded,
    InvalidRequest,
    KVStoreError,
    PermissionDenied,
    ProtocolMismatch,
    Unavailable,
    from_code,
)
from kvstore.protocol.frames import PROTOCOL_VERSION, FrameSocket, Method
from kvstore.v1 import admin_pb2 as pb
from kvstore.v1.admin_pb2_grpc import AdminStub
from kvstore.v1.kvstore_pb2 import HelloRequest, HelloResponse

TOKEN_METADATA = "kvstore-token"
_ATTACH_SUFFIX = ".attach"


class AdminClient:
    """One attached session that asks as an operator.

    Attributes:
        address: unix:/path of the daemon.
        hello: what the daemon said of itself.
        attach_ms: how long connecting and the hello took, in milliseconds.

    Raises:
        Unavailable: nobody answers at the address.
        PermissionDenied: this user may not attach.
        ProtocolMismatch: this kvctl and the daemon are of different protocol versions.
    """

    def __init__(self, address: str, timeout_s: float = 10.0) -> None:
        """Attach; every later call answers or fails within `timeout_s` unless it is given a longer one."""
        self.address = address
        self._timeout_s = timeout_s
        path = socket_path(address)
        started = time.perf_counter()
        self._frames = _connect(path, timeout_s)
        try:
            self.hello = _hello(self._frames)
        except BaseException:
            self._frames.close()
            raise
        self.attach_ms = (time.perf_counter() - started) * 1e3
        self._channel = grpc.insecure_channel(self.hello.grpc_target or f"unix:{path}")
        self._stub = AdminStub(self._channel)

    def call(self, method: str, request: object, timeout_s: float | None = None) -> Any:  # noqa: ANN401 (by method)
        """One call of the Admin service, by the method's name in the proto file."""
        invoke: Callable[..., object] = getattr(self._stub, method)
        metadata = ((TOKEN_METADATA, self.hello.token.hex()),)
        try:
            return invoke(request, timeout=timeout_s or self._timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise _translated(error, method) from error

    def stats(self) -> pb.GetStatsResponse:
        """Everything the daemon counts."""
        answer = self.call("GetStats", pb.GetStatsRequest())
        assert isinstance(answer, pb.GetStatsResponse)
        return answer

    def close(self) -> None:
        """Detach; the token ends with the connection."""
        self._channel.close()
        self._frames.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def socket_path(address: str) -> str:
    """The path in unix:/path (or unix:///path, or a bare path).

    Raises:
        InvalidRequest: not a Unix socket's address.
    """
    path = address.removeprefix("unix://") if address.startswith("unix:///") else address.removeprefix("unix:")
    if not path or ":" in path.split("/", 1)[0]:
        raise InvalidRequest(f"address {address!r} is not of the form unix:/path/to/kvstore.sock")
    return path


def _connect(path: str, timeout_s: float) -> FrameSocket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(path + _ATTACH_SUFFIX)
    except OSError as error:
        sock.close()
        raise _connect_error(path, error) from error
    return FrameSocket(sock)


def _connect_error(path: str, error: OSError) -> KVStoreError:
    if isinstance(error, PermissionError):
        return PermissionDenied(
            f"unix:{path}: this user may not open the socket; run kvctl as the daemon's user or from its socket group"
        )
    reason = {
        FileNotFoundError: "there is no such socket",
        ConnectionRefusedError: "the socket is there but nobody listens (did the daemon die?)",
        TimeoutError: "the daemon does not accept connections",
    }.get(type(error), str(error))
    return Unavailable(f"no daemon at unix:{path}: {reason}; start kvstored, or give its --address")


def _hello(frames: FrameSocket) -> HelloResponse:
    request = HelloRequest(protocol_version=PROTOCOL_VERSION, client_version=version("kvtier"), client_name="kvctl")
    try:
        frames.send(1, Method.HELLO, request.SerializeToString())
        reply = frames.recv()
    except TimeoutError as error:
        raise Unavailable("the daemon accepted the connection but does not answer") from error
    if reply.status:
        raise from_code(reply.status, reply.payload.decode(errors="replace"))
    answer = HelloResponse.FromString(reply.payload)
    if answer.protocol_version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"this kvctl speaks protocol {PROTOCOL_VERSION}, the daemon (version {answer.server_version}) "
            f"{answer.protocol_version}; use the kvctl that came with the daemon"
        )
    return answer


def _translated(error: grpc.RpcError, method: str) -> KVStoreError:
    code, details = grpc.StatusCode.UNKNOWN, str(error)
    if isinstance(error, grpc.Call):
        code, details = error.code(), error.details() or code.name
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{method}: the daemon did not answer in time")
    number: int = code.value[0]
    return from_code(number, details)
