"""The fake daemon's gRPC front: the same answers as on the attach socket."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message

from kvstore.protocol.errors import KVStoreError, Unauthenticated
from kvstore.protocol.frames import Method
from kvstore.v1 import admin_pb2
from kvstore_client._lazy import grpc
from kvstore_client.grpc_link import TOKEN_KEY
from kvstore_client.testing.server import HANDLERS, answer
from kvstore_client.testing.store import FakeSession

if TYPE_CHECKING:
    from kvstore_client.testing.daemon import FakeDaemon

T = TypeVar("T", bound=Message)

_FOREVER_S = 3600.0


class GrpcFront:
    """Serves a FakeDaemon's store over gRPC."""

    def __init__(self, daemon: FakeDaemon, path: str) -> None:
        self._daemon = daemon
        self._path = path
        self._server: grpc.Server | None = None

    def start(self) -> None:
        """Listen."""
        Path(self._path).unlink(missing_ok=True)
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=8, thread_name_prefix="fake-kvstored-grpc"))
        calls = {_name(method): self._unary(method) for method in HANDLERS}
        stats = grpc.unary_unary_rpc_method_handler(
            self._stats, admin_pb2.GetStatsRequest.FromString, admin_pb2.GetStatsResponse.SerializeToString
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("kvstore.v1.KVStore", calls),
                grpc.method_handlers_generic_handler("kvstore.v1.Admin", {"GetStats": stats}),
            )
        )
        server.add_insecure_port(f"unix:{self._path}")
        server.start()
        self._server = server

    def stop(self) -> None:
        """Hang up."""
        if self._server is not None:
            self._server.stop(None).wait(5.0)
            self._server = None

    def _unary(self, method: Method) -> Any:  # noqa: ANN401
        def call(payload: bytes, context: Any) -> bytes:  # noqa: ANN401 - grpc has no type for it
            self._daemon.calls[method.name] += 1
            remaining_s = context.time_remaining()
            deadline_s = time.monotonic() + (_FOREVER_S if remaining_s is None else remaining_s)
            reply = self._guarded(context, lambda session: answer(self._daemon, session, method, payload, deadline_s))
            return reply.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(call)

    def _stats(self, _request: Message, context: Any) -> admin_pb2.GetStatsResponse:  # noqa: ANN401
        return self._guarded(context, lambda _: self._daemon_stats())

    def _daemon_stats(self) -> admin_pb2.GetStatsResponse:
        store = self._daemon.store
        blocks = [block for namespace in store.namespaces.values() for block in namespace.blocks.values()]
        used = sum(block.nbytes for block in blocks)
        return admin_pb2.GetStatsResponse(
            version="fake",
            instance_id=self._daemon.instance_id,
            health="serving",
            tiers=[admin_pb2.TierStats(name="warm", blocks=len(blocks), used_bytes=used, state="ok")],
            sessions=len(store.sessions),
            leases=len(store.leases),
            namespaces=len(store.namespaces),
        )

    def _guarded(self, context: Any, work: Callable[[FakeSession], T]) -> T:  # noqa: ANN401
        try:
            return work(self._session(context))
        except KVStoreError as error:
            codes = {code.value[0]: code for code in grpc.StatusCode}
            context.abort(codes[error.code], str(error))
            raise

    def _session(self, context: Any) -> FakeSession:  # noqa: ANN401
        token = dict(context.invocation_metadata()).get(TOKEN_KEY, "")
        for session in self._daemon.store.sessions.values():
            if session.token.hex() == token:
                return session
        raise Unauthenticated("no session has this token")


def _name(method: Method) -> str:
    return "".join(word.capitalize() for word in method.name.split("_"))
