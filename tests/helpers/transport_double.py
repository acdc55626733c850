"""A small engine double for the transports, a peer that speaks raw frames, and a transport between them."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.message import Message

from kvstore.core.benefit import WorkerCosts
from kvstore.protocol.errors import KVStoreError, LeaseExpired, NotFound, PermissionDenied, from_code
from kvstore.protocol.frames import HEADER, PROTOCOL_VERSION, Frame, FrameSocket, Method
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.transport.config import Limits, TransportConfig, TransportHooks
from kvstore.transport.engine import Engine
from kvstore.transport.server import Transport
from kvstore.v1 import admin_pb2, types_pb2
from kvstore.v1 import kvstore_pb2 as pb

BOUND_S = 10.0  # of every wait in these tests; nothing is expected to take long


class Slab(NamedTuple):
    slab_id: int
    segment_bytes: int
    slot_bytes: int
    slots: int
    data_offset: int


@dataclass(eq=False)
class FakeSession:
    id: int
    token: bytes
    name: str
    pid: int
    uid: int
    tenant: str
    staging_fd: int = -1
    touches: int = 0
    closed: threading.Event = field(default_factory=threading.Event)


class FakeEngine:
    """Keeps keys, not bytes. `gate` holds puts back, `ready` says how far every lease is readable."""

    def __init__(self) -> None:
        self.sessions: dict[int, FakeSession] = {}
        self.stored: set[bytes] = set()
        self.put_order: list[bytes] = []
        self.put_deadlines_s: list[float] = []
        self.gate = threading.Event()
        self.gate.set()
        self.ready = 10
        self.readiness = threading.Condition()
        self.waiting = 0
        self.fail_with: Exception | None = None
        self.drained = False
        self.withheld = 0
        self.workers: list[WorkerCosts | None] = []  # what match and acquire were told
        self._lock = threading.Lock()

    @property
    def draining(self) -> bool:
        return self.drained

    def open_session(self, peer: Any, name: str, tenant: str) -> FakeSession:
        with self._lock:
            session = FakeSession(len(self.sessions) + 1, secrets.token_bytes(32), name, peer.pid, peer.uid, tenant)
            self.sessions[session.id] = session
            return session

    def attach_staging(self, session: FakeSession, staging_bytes: int) -> int:
        if staging_bytes:
            session.staging_fd = os.memfd_create("staging", os.MFD_CLOEXEC)
            os.ftruncate(session.staging_fd, staging_bytes)
        return staging_bytes

    def close_session(self, session: FakeSession) -> None:
        if not session.closed.is_set() and session.staging_fd >= 0:
            os.close(session.staging_fd)
        session.closed.set()
        with self.readiness:
            self.readiness.notify_all()

    def bulk(self, nbytes: int) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def touch(self, session: FakeSession) -> None:
        session.touches += 1

    def open_namespace(
        self, session: FakeSession, spec: NamespaceSpec, terms: types_pb2.NamespaceTerms | None = None
    ) -> Any:
        return SimpleNamespace(digest=spec.digest(session.tenant), block_nbytes=spec.block_nbytes, epoch=1)

    def map_slabs(self, session: FakeSession, ids: Sequence[int]) -> list[tuple[Slab, int]]:
        return [(Slab(0, 4096, 4096, 1, 0), os.dup(session.staging_fd)) for slab_id in ids if slab_id == 0]

    def match(self, session: FakeSession, namespace: bytes, keys: bytes, worker: WorkerCosts | None = None) -> Any:
        if self.fail_with is not None:
            raise self.fail_with
        blocks = 0
        while keys[blocks * 32 : blocks * 32 + 32] in self.stored:
            blocks += 1
        self.workers.append(worker)
        return SimpleNamespace(blocks=blocks, tokens=16 * blocks, hot=0, warm=blocks, cold=0, withheld=self.withheld)

    def exists(self, session: FakeSession, namespace: bytes, keys: bytes) -> bytes:
        return bytes(keys[i : i + 32] in self.stored for i in range(0, len(keys), 32))

    def acquire(
        self,
        session: FakeSession,
        groups: Sequence[tuple[bytes, bytes, int]],
        exact: bool = False,
        worker: WorkerCosts | None = None,
    ) -> pb.LeaseReply:
        self.workers.append(worker)
        return pb.LeaseReply(lease_id=7, tokens=16, ready=self.ready)

    def wait(self, session: FakeSession, lease_id: int, stop: int, timeout_s: float) -> tuple[int, int]:
        if lease_id != 7:
            raise NotFound(f"lease {lease_id} does not exist")
        with self.readiness:
            self.waiting += 1
            self.readiness.wait_for(lambda: self.ready >= stop or session.closed.is_set(), timeout_s)
            self.waiting -= 1
            if session.closed.is_set():
                raise LeaseExpired("its session has ended")
            return self.ready, 0

    def set_ready(self, count: int) -> None:
        with self.readiness:
            self.ready = count
            self.readiness.notify_all()

    def renew(self, session: FakeSession) -> tuple[int, list[int]]:
        return 1, [3]

    def release(self, session: FakeSession, lease_id: int, upto: int) -> None:
        if lease_id != 7:
            raise NotFound(f"lease {lease_id} does not exist")

    def handoff(self, session: FakeSession, lease_id: int) -> bytes:
        return b"t" * 16

    def adopt(self, session: FakeSession, token: bytes) -> pb.LeaseReply:
        return pb.LeaseReply(lease_id=7)

    def put(self, session: FakeSession, request: pb.PutRequest, deadline_s: float) -> tuple[bytes, bytes]:
        assert self.gate.wait(BOUND_S)
        self.put_order.append(request.keys)
        self.put_deadlines_s.append(deadline_s)
        count = len(request.keys) // 32
        self.stored.update(request.keys[i * 32 : i * 32 + 32] for i in range(count))
        return bytes([1]) * count, bytes(count)

    def prefetch(self, session: FakeSession, namespace: bytes, keys: bytes) -> int:
        return 2

    def delete(self, session: FakeSession, namespace: bytes, keys: bytes) -> int:
        return 1

    def clear(self, session: FakeSession, namespace: bytes) -> int:
        return 2

    def stats(self) -> admin_pb2.GetStatsResponse:
        return admin_pb2.GetStatsResponse(version="1", sessions=len(self.sessions))

    def list_namespaces(self, session: FakeSession) -> list[admin_pb2.NamespaceInfo]:
        return [admin_pb2.NamespaceInfo(tenant=session.tenant)]

    def list_sessions(self, session: FakeSession) -> list[admin_pb2.SessionInfo]:
        return [admin_pb2.SessionInfo(session_id=session.id)]

    def inspect(self, session: FakeSession, key: bytes, namespace: bytes) -> list[admin_pb2.BlockInfo]:
        return [admin_pb2.BlockInfo(key=key)]

    def evict(self, tier: int, nbytes: int) -> tuple[int, int]:
        return 1, nbytes

    def flush(self, timeout_s: float) -> tuple[int, int]:
        return 3, round(timeout_s * 1000)

    def verify(self, request: admin_pb2.VerifyRequest) -> admin_pb2.VerifyResponse:
        return admin_pb2.VerifyResponse(checked=4)

    def compact(self) -> admin_pb2.CompactResponse:
        return admin_pb2.CompactResponse(before_bytes=8192, after_bytes=4096)

    def resize(self, request: admin_pb2.ResizeRequest) -> admin_pb2.ResizeResponse:
        return admin_pb2.ResizeResponse(capacity_bytes=request.capacity_bytes)

    def record(self, request: admin_pb2.RecordRequest) -> admin_pb2.RecordResponse:
        return admin_pb2.RecordResponse(recording=request.recording or 1)

    def pin(self, session: FakeSession, request: admin_pb2.PinRequest) -> admin_pb2.PinResponse:
        return admin_pb2.PinResponse(key=request.key)

    def set_terms(self, session: FakeSession, request: admin_pb2.SetTermsRequest) -> types_pb2.NamespaceTerms:
        return request.terms

    def start_drain(self) -> None:
        self.drained = True


def _satisfies(engine: FakeEngine) -> Engine:
    return engine


class RawPeer:
    """A client that does exactly what a test tells it, well or badly."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(BOUND_S)
        self.sock.connect(str(path))
        self.frames = FrameSocket(self.sock)
        self.hello_reply = pb.HelloResponse()
        self._last_id = 0

    def hello(self, version: int = PROTOCOL_VERSION, name: str = "test") -> RawPeer:
        request = pb.HelloRequest(protocol_version=version, client_version="0", client_name=name)
        self.hello_reply = pb.HelloResponse.FromString(self.call(Method.HELLO, request))
        return self

    def send(
        self, method: int, request: Message | bytes = b"", call_id: int | None = None, deadline_ms: int = 0
    ) -> int:
        if call_id is None:
            self._last_id = call_id = self._last_id + 1
        payload = request if isinstance(request, bytes) else request.SerializeToString()
        self.frames.send(call_id, method, payload, deadline_ms=deadline_ms)
        return call_id

    def send_raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def recv(self) -> Frame:
        return self.frames.recv()

    def call(self, method: int, request: Message | bytes = b"", deadline_ms: int = 0) -> bytes:
        """The reply's payload; raises what its status says."""
        call_id = self.send(method, request, deadline_ms=deadline_ms)
        frame = self.recv()
        assert (frame.call_id, frame.method) == (call_id, method)
        if frame.status:
            raise from_code(frame.status, frame.payload.decode())
        return frame.payload

    def ended(self) -> bool:
        """Whether the daemon closes the connection (within the bound)."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self.frames.close()


class Setup:
    """A transport over a fake engine, with ways in."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.engine = FakeEngine()
        self.levels: list[str] = []
        self.refused_uids: set[int] = set()
        self.operators = True
        limits = Limits(**{"hello_timeout_s": BOUND_S, **changes.pop("limits", {})})
        self.config = TransportConfig(folder / "kv.sock", "instance-1", "9.9", limits=limits, **changes)
        hooks = TransportHooks(self._tenant, lambda uid: self.operators, self._set_level)
        self.transport = Transport(_satisfies(self.engine), self.config, hooks)
        self._open: list[Callable[[], None]] = []

    def _tenant(self, uid: int, gids: Sequence[int]) -> str:
        if uid in self.refused_uids:
            raise PermissionDenied(f"uid {uid} may not attach")
        return "tenant-a"

    def _set_level(self, level: str) -> str:
        if level == "loud":
            raise ValueError("no such level")
        self.levels.append(level)
        return level

    def connect(self) -> RawPeer:
        peer = RawPeer(self.config.attach_path)
        self._open.append(peer.close)
        return peer

    def attach(self) -> RawPeer:
        return self.connect().hello()

    def session(self) -> FakeSession:
        """The session that attached last."""
        return self.engine.sessions[max(self.engine.sessions)]

    def channel(self) -> grpc.Channel:
        channel = grpc.insecure_channel(self.config.grpc_target, options=[("grpc.use_local_subchannel_pool", 1)])
        self._open.append(channel.close)
        return channel

    def close(self) -> None:
        self.engine.gate.set()
        self.engine.set_ready(1 << 30)
        for close in self._open:
            close()
        self.transport.stop(1.0)


def eventually(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds; fail after the bound."""
    until_s = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < until_s, "the condition did not come true"
        time.sleep(0.005)


def packed(payload: bytes, call_id: int = 1, method: int = 0, length: int | None = None) -> bytes:
    """A frame made by hand; `length` may lie."""
    return HEADER.pack(len(payload) if length is None else length, call_id, method, 0, 0) + payload


def error_of(call: Callable[[], object]) -> KVStoreError:
    """The KVStoreError that a call raises."""
    with pytest.raises(KVStoreError) as caught:
        call()
    return caught.value
