"""A daemon as kvctl sees it: an attach socket that says hello, and an Admin service with fixed answers."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

from kvstore.cli.kvctl import main
from kvstore.protocol.errors import KVStoreError, Unavailable
from kvstore.protocol.frames import PROTOCOL_VERSION, FrameSocket
from kvstore.v1 import admin_pb2 as pb
from kvstore.v1 import types_pb2
from kvstore.v1.admin_pb2_grpc import AdminServicer, add_AdminServicer_to_server
from kvstore.v1.kvstore_pb2 import HelloRequest, HelloResponse

TOKEN = bytes(range(32))
KEY = bytes.fromhex("ab" * 32)

STATS = pb.GetStatsResponse(
    version="9.9",
    instance_id="i-1",
    uptime_ms=3_723_000,
    health="serving",
    tiers=[
        pb.TierStats(name="hot", state="off"),
        pb.TierStats(name="warm", state="ok", capacity_bytes=1 << 30, used_bytes=1 << 29, blocks=256, hits=75),
        pb.TierStats(
            name="cold", state="ok", capacity_bytes=1 << 34, used_bytes=300, blocks=2, hits=25, stored_bytes=300,
            raw_bytes=450, restarts=1,
        ),
    ],
    sessions=1,
    lookups=200,
    hit_blocks=100,
    put_stored=258,
    put_rejected={"no_room": 3},
    counters={"dirty_blocks": 7},
)  # fmt: skip


class FakeAdmin(AdminServicer):
    """Answers from `answers` by method (a message, an iterator of them, or an error to fail with); notes requests."""

    def __init__(self) -> None:
        self.requests: list[object] = []
        self.answers: dict[str, object] = {
            "GetStats": STATS,
            "ListSessions": pb.ListSessionsResponse(
                sessions=[pb.SessionInfo(session_id=4, client_name="worker-0", pid=77, tenant="default", age_ms=5000)]
            ),
            "ListNamespaces": pb.ListNamespacesResponse(
                namespaces=[pb.NamespaceInfo(namespace=KEY, tenant="default", block_nbytes=2 << 20, blocks=3)]
            ),
            "InspectBlock": pb.InspectBlockResponse(
                blocks=[pb.BlockInfo(key=KEY, namespace=KEY, tiers=["warm", "cold"], nbytes=2 << 20)]
            ),
            "Evict": pb.EvictResponse(blocks=2, bytes=4 << 20),
            "Flush": pb.FlushResponse(saved=5, unsaved=0),
            "Verify": pb.VerifyResponse(checked=9, corrupt=0),
            "Resize": pb.ResizeResponse(capacity_bytes=1),
            "Compact": pb.CompactResponse(before_bytes=2, after_bytes=1),
            "Drain": pb.DrainResponse(),
            "SetLogLevel": pb.SetLogLevelResponse(level="debug"),
            "Record": pb.RecordResponse(recording=1),
            "Pin": pb.PinResponse(key=KEY, namespace=KEY),
            "SetTerms": pb.SetTermsResponse(
                terms=types_pb2.NamespaceTerms(priority=3, ttl_ms=90_000, warm_bytes=1 << 30)
            ),
        }

    def __getattribute__(self, name: str) -> Any:
        answers = object.__getattribute__(self, "__dict__").get("answers", {})
        if name not in answers:
            return object.__getattribute__(self, name)

        def handle(request: object, context: grpc.ServicerContext) -> object:
            metadata = dict(context.invocation_metadata())
            if metadata.get("kvstore-token") != TOKEN.hex():
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            self.requests.append(request)
            answer = answers[name]
            if isinstance(answer, grpc.StatusCode):
                context.abort(answer, "said by the daemon")
            return next(answer) if isinstance(answer, Iterator) else answer

        return handle


class FakeDaemon:
    """Listens in a folder of its own. `hello` may be replaced by an error."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "k.sock"
        self.address = f"unix:{self.path}"
        self.admin = FakeAdmin()  # type: ignore[abstract]
        self.hello: HelloResponse | KVStoreError = HelloResponse(
            protocol_version=PROTOCOL_VERSION,
            server_version="9.9",
            token=TOKEN,
            instance_id="i-1",
            grpc_target=self.address,
        )
        self.greeted: list[HelloRequest] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        add_AdminServicer_to_server(self.admin, self._server)
        self._server.add_insecure_port(self.address)
        self._server.start()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"{self.path}.attach")
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        self._server.stop(0).wait(10)

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            frames = FrameSocket(sock)
            try:
                frame = frames.recv()
                self.greeted.append(HelloRequest.FromString(frame.payload))
                failed = self.hello if isinstance(self.hello, KVStoreError) else None
                payload = str(failed).encode() if failed else self.hello.SerializeToString()  # type: ignore[union-attr]
                frames.send(frame.call_id, frame.method, payload, status=failed.code if failed else 0)
                frames.recv()
            except Unavailable:
                pass
            finally:
                frames.close()


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with tempfile.TemporaryDirectory(prefix="kvcli-") as folder:  # pytest's own folders are too long for a socket
        fake = FakeDaemon(Path(folder))
        try:
            yield fake
        finally:
            fake.close()


@pytest.fixture
def kvctl(daemon: FakeDaemon) -> Callable[..., Result]:
    """Run a verb against the fake daemon."""

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["--address", daemon.address, *arguments])

    return run


@pytest.fixture
def kvctl_json(kvctl: Callable[..., Result]) -> Callable[..., Any]:
    """The JSON answer of a verb."""

    def run(*arguments: str) -> Any:
        result = kvctl(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run
