"""A session without the client library: any message, also one that the library would never send."""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Any, Self

import grpc

from kvstore.protocol.errors import from_code
from kvstore.protocol.frames import PROTOCOL_VERSION, FrameSocket, Method
from kvstore.v1 import kvstore_pb2 as pb
from kvstore.v1.kvstore_pb2_grpc import KVStoreStub
from polling import PATIENCE_S


def connect(address: str) -> FrameSocket:
    """The attach socket of a daemon, without a word said."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE_S)
    sock.connect(address.removeprefix("unix:") + ".attach")
    return FrameSocket(sock)


class RawSession:
    """Attached, with a staging segment if asked for; calls go as frames, or over gRPC with the session's token."""

    def __init__(self, address: str, transport: str = "auto", staging_bytes: int = 0) -> None:
        self.frames = connect(address)
        self._channel: grpc.Channel | None = None
        self._last_id = 0
        try:
            self.hello = pb.HelloResponse.FromString(
                self.frame(Method.HELLO, pb.HelloRequest(protocol_version=PROTOCOL_VERSION, client_name="raw"))
            )
            if transport == "grpc":
                self._channel = grpc.insecure_channel(self.hello.grpc_target)
            self.opened = self.call("OpenSession", pb.OpenSessionRequest(staging_bytes=staging_bytes))
        except BaseException:
            self.close()
            raise

    def call(self, name: str, request: Any) -> Any:
        """One call by its name in the proto file.

        Raises:
            KVStoreError: as the daemon answered.
        """
        if self._channel is None:
            reply = self.frame(Method[_frame_name(name)], request)
            return _RESPONSES[name].FromString(reply)
        try:
            return getattr(KVStoreStub(self._channel), name)(
                request, timeout=PATIENCE_S, metadata=[("kvstore-token", self.hello.token.hex())]
            )
        except grpc.RpcError as error:
            raise from_code(error.code().value[0], error.details()) from error  # type: ignore[attr-defined]

    def frame(self, method: int, request: Any, status: int = 0) -> bytes:
        """One frame there and the reply's payload; a request may be a message or raw bytes.

        Raises:
            KVStoreError: as the daemon answered.
        """
        call_id = self.send(method, request, status)
        reply = self.frames.recv(PATIENCE_S)
        assert (reply.call_id, reply.method) == (call_id, method)
        if reply.status:
            raise from_code(reply.status, reply.payload.decode())
        return reply.payload

    def send(self, method: int, request: Any, status: int = 0) -> int:
        """Send a frame and wait for nothing; its call id."""
        self._last_id += 1
        payload = request if isinstance(request, bytes) else request.SerializeToString()
        self.frames.send(self._last_id, method, payload, status)
        return self._last_id

    def close(self) -> None:
        """Detach. Idempotent."""
        if self._channel is not None:
            self._channel.close()
        self.frames.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _frame_name(name: str) -> str:
    return "".join(f"_{letter}" if letter.isupper() and at else letter for at, letter in enumerate(name)).upper()


_RESPONSES: dict[str, Any] = {
    method.name: getattr(pb, method.output_type.name) for method in pb.DESCRIPTOR.services_by_name["KVStore"].methods
}
