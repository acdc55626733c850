"""A real daemon under fuzz: two tenants, peers that send it any bytes, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import grpc

from daemon_process import DaemonProcess
from derived import BLOCK_NBYTES, chain, contents, fetch, layout_of, namespace
from fuzz_messages import Known, Rpc, varint
from kvstore.protocol import convert
from kvstore.protocol.errors import from_code
from kvstore.protocol.frames import MAX_PAYLOAD_BYTES, Method
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.v1 import admin_pb2
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import REJECTED, Client
from polling import PATIENCE_S, eventually
from raw_session import RawSession

OTHER_UID = 54321
BLOCKS = 8
WARM_BYTES = 64 << 20
STAGING_TOTAL_BYTES = 16 << 20
# On top of what is declared: frames on their way, the ring of a recording, what malloc keeps.
SLACK_BYTES = 160 << 20

DOCUMENTED = frozenset({0, 3, 4, 5, 7, 8, 9, 12, 14, 16})  # docs/protocol.md, less InternalError
_INSIDES = re.compile(r"Traceback|File \"|\.py\b|/tmp/|/home/|/usr/|/var/|site-packages|0x[0-9a-f]{8,}")
_DEADLINE_MS = 300
_GRPC_S = 0.5
# What stands in a payload for a lease and for a token that the peer has when it is sent.
_LEASE = (1 << 40) - 3
_TOKEN = b"a handed-off one"
_OWN_STAGING_BYTES = 4 << 20

SETTINGS: dict[str, Any] = {
    "warm_bytes": WARM_BYTES,
    "cold_bytes": "256MiB",
    "hot_device": "cpu",
    "hot_bytes": "16MiB",
    "staging_max_bytes": "4MiB",
    "staging_total_bytes": STAGING_TOTAL_BYTES,
    "lease_ttl_s": 3,  # a call of the fuzz may take more than one, and a lease of another must outlive it
    "socket_mode": "0666",
    "tenants": {"here": {"uids": [os.geteuid()]}, "there": {"uids": [OTHER_UID]}},
}


class Target:
    """The daemon, and what its tenant `here` has stored: nobody may lose, change or see that."""

    def __init__(self, daemon: DaemonProcess) -> None:
        daemon.folder.chmod(0o711)  # another user has to reach the sockets
        self.daemon = daemon
        self.codes: Counter[tuple[str, str, int]] = Counter()  # (transport, method, code)
        self._client = Client(daemon.address, staging_bytes=_OWN_STAGING_BYTES)
        self.kept = namespace(self._client, "kept")
        self.keys = chain(self.kept, BLOCKS)
        self.store()
        self._cap_bytes = peak_bytes(daemon.pid) + WARM_BYTES + STAGING_TOTAL_BYTES + SLACK_BYTES

    def store(self) -> None:
        """Store what is kept (again), and save it."""
        assert REJECTED not in self.kept.put(self.keys, contents(self.keys), timeout_s=PATIENCE_S)
        assert self.daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000)).unsaved == 0

    def peer(self, transport: str, uid: int | None = None, staging_bytes: int = 1 << 20) -> FuzzPeer:
        """A session that sends anything; of another user if told so."""
        return FuzzPeer(self, transport, uid, staging_bytes)

    @contextlib.contextmanager
    def holder(self) -> Iterator[Holder]:
        """A session of `here` with a lease and an offer, which must be there afterwards."""
        with RawSession(self.daemon.address) as session:
            group = pb.AcquireGroup(namespace=self.kept.digest, keys=bytes(self.keys))
            ids = [session.call("Acquire", pb.AcquireRequest(groups=[group])).lease_id for _ in range(2)]
            token = session.call("Handoff", pb.HandoffRequest(lease_id=ids[1])).token
            holder = Holder(session, ids[0], token)
            yield holder
            assert holder.renew() == 2, "a lease of another's has gone"
            assert session.call("Adopt", pb.AdoptRequest(token=token)).lease_id == ids[1]

    def known(self, peer: FuzzPeer, holder: Holder | None = None) -> Known:
        """What a request of the peer can name: its own things, and for another tenant those of `here`."""
        # One of the same tenant may change what it can name; another tenant may not.
        others = [] if peer.tenant == "here" else [self.kept.digest]
        keys = [peer.keys] if peer.tenant == "here" else [peer.keys, bytes(self.keys)]
        singles = [found[:32] for found in keys]
        return {
            "namespace": [peer.space, *others],
            "keys": [*keys, *keys, *keys, singles[0], keys[0] * 3, b"", keys[0][64:]],
            "key": [*singles, singles[-1][:4]],
            "parent": [b"", *singles],
            "checksums": [b"", b"", b"", bytes(16 * BLOCKS)],
            "block_nbytes": [BLOCK_NBYTES],
            "staging_offset": [0, 0, BLOCK_NBYTES],
            "staging_stride": [0, 0, BLOCK_NBYTES],
            "staging_bytes": [0, 1 << 20, (1 << 64) - 1],
            "lease_id": [_LEASE, *([holder.lease] if holder else [])],
            "token": [_TOKEN, *([holder.token] if holder else [])],
            "stop": [0, 1, BLOCKS, (1 << 64) - 1],
            "upto": [0, 1, BLOCKS, (1 << 64) - 1],
            "slab_ids": [0, 1, 2, 3, 4],
            "mode": [0, 1, 2],
            "tier": [1, 2, 3],
            "after": [b"", peer.space + singles[0], bytes(64)],
            "limit": [0, 1, 64],
            "timeout_ms": [1, 50, 0],
            "level": [b"info", b"debug", b"DEBUG"],
            "recording": [0, 0, 1],
            "spec": [_spec("fuzz"), _spec("fuzz", 4096)],
            "block_tokens": [16, 1, 65_536],
            "kind": [1, 2],
            "hash_algorithm": [b"sha256"],
            "cold_codec": [b"", b"int8kv"],
            "model": [b"fuzz"],
            "dtype": [b"bfloat16", b"uint8"],
            "shape": [1, 2, 16],
            "axes": [b"kv", b"kv token", b"token dim"],
            "priority": [0, 1, 2, 3],
            "ttl_ms": [0, 1 << 40],
            "recompute_ns_per_token": [0.0, 1e5],
            "recompute_ns_per_token2": [0.0, 1.0],
            "copy_bytes_per_s": [0.0, 1e9],
            "bytes": [0, 1, BLOCK_NBYTES, (1 << 64) - 1],
            "terms": [b"", bytes([8, 2])],
            "protocol_version": [1],
        }

    # -- what must hold

    def check_alive(self) -> None:
        """The daemon runs, and has not taken more memory than it declares."""
        peak = peak_bytes(self.daemon.pid)
        assert peak <= self._cap_bytes, f"{peak >> 20} MiB were resident, {self._cap_bytes >> 20} MiB are declared"

    def check_whole(self, *, may_be_gone: bool = False) -> None:
        """What was stored reads back byte for byte; `may_be_gone`: or is missing, because an operator dropped it."""
        count, bad = fetch(self.kept, self.keys)
        assert not bad, f"wrong bytes in blocks {bad}"
        assert count == BLOCKS or may_be_gone, f"{count} of {BLOCKS} blocks are left"

    def check_idle(self, timeout_s: float = PATIENCE_S) -> None:
        """Sessions, leases, staging and half-filled slots are back to what they were before the peers came."""
        eventually(self._is_idle, "a daemon that holds nothing for a peer any more", timeout_s)

    def _is_idle(self) -> bool:
        stats = self.daemon.stats()
        held = (stats.leases, stats.quarantined_bytes, stats.counters["slots_filling"])
        # Two sessions: ours, and the one that asks.
        return (stats.sessions, stats.staging_bytes, *held) == (2, _OWN_STAGING_BYTES, 0, 0, 0)

    def close(self) -> None:
        """Detach."""
        self._client.close()


class Holder(NamedTuple):
    """Who has a lease, and another one that is offered under a token."""

    session: RawSession
    lease: int
    token: bytes

    def renew(self) -> int:
        """A sign of life; how many leases there are."""
        return int(self.session.call("Renew", pb.RenewRequest()).leases)


class FuzzPeer:
    """One session without a client library, with some blocks of its own."""

    def __init__(self, target: Target, transport: str, uid: int | None, staging_bytes: int) -> None:
        self._target, self.transport = target, transport
        with as_user(uid):
            self.session = RawSession(target.daemon.address, staging_bytes=staging_bytes)
        self.tenant = self.session.opened.tenant
        self._token = [("kvstore-token", self.session.hello.token.hex())]
        self._channel = grpc.insecure_channel(self.session.hello.grpc_target)
        opened = self.session.call("OpenNamespace", pb.OpenNamespaceRequest.FromString(_open_bytes("fuzz")))
        self.space = opened.namespace
        self.keys = b"".join(sha256(self.space + bytes([number])).digest() for number in range(BLOCKS))
        self._lease, self._offer = 1, bytes(16)

    def send(self, rpc: Rpc, payload: bytes) -> int:
        """One call and its answer, checked; the code."""
        self._prepare(rpc)
        payload = payload.replace(varint(_LEASE), _padded(self._lease)).replace(_TOKEN, self._offer)
        ask = self._ask_grpc if self.transport == "grpc" else self._ask_frame
        code, reply = ask(rpc, payload)
        self._target.codes[self.transport, rpc.name, code] += 1
        check_answer(rpc, code, reply, self._known_paths())
        return code

    def close(self) -> None:
        """Detach."""
        self._channel.close()
        self.session.close()

    def _prepare(self, rpc: Rpc) -> None:
        """Have what the call is about: stored blocks, a lease of them, a token for it."""
        fields = set(rpc.request.fields_by_name)
        if not fields & {"key", "keys", "groups", "lease_id", "token"}:
            return
        call = self.session.call
        if rpc.name != "Put":
            call("Put", pb.PutRequest(namespace=self.space, keys=self.keys, block_nbytes=BLOCK_NBYTES))
        if fields & {"lease_id", "token"}:
            group = pb.AcquireGroup(namespace=self.space, keys=self.keys)
            self._lease = call("Acquire", pb.AcquireRequest(groups=[group])).lease_id or 1
        if "token" in fields and self._lease > 1:
            self._offer = call("Handoff", pb.HandoffRequest(lease_id=self._lease)).token

    def _ask_grpc(self, rpc: Rpc, payload: bytes) -> tuple[int, bytes]:
        call = self._channel.unary_unary(rpc.path)
        try:
            return 0, call(payload, timeout=_GRPC_S, metadata=self._token)
        except grpc.RpcError as error:
            return error.code().value[0], (error.details() or "").encode()  # type: ignore[attr-defined]

    def _ask_frame(self, rpc: Rpc, payload: bytes) -> tuple[int, bytes]:
        frames, method = self.session.frames, FRAME_METHODS[rpc.name]
        frames.send(7, method, payload[:MAX_PAYLOAD_BYTES], deadline_ms=_DEADLINE_MS)
        answer = frames.recv(PATIENCE_S)
        for fd in frames.take_fds(1000):
            os.close(fd)
        assert (answer.call_id, answer.method) == (7, method)
        return answer.status, answer.payload

    def _known_paths(self) -> tuple[str, ...]:
        path = self.session.hello.grpc_target.removeprefix("unix:")
        return (f"{path}.attach", path)


FRAME_METHODS = {method.name.title().replace("_", ""): int(method) for method in Method if method is not Method.HELLO}


def check_answer(rpc: Rpc, code: int, reply: bytes, known_paths: tuple[str, ...] = ()) -> None:
    """A documented code, and no word of the daemon's insides."""
    text = reply.decode() if code else ""
    assert code in DOCUMENTED, f"{rpc.name} was answered with {code} {from_code(code, text)!r}"
    if code:
        for path in known_paths:
            text = text.replace(path, "(socket)")
        check_text(rpc.name, text)


def check_text(what: str, text: str) -> None:
    """An error's text says something, is no novel, and shows nothing of the daemon's insides."""
    assert 0 < len(text) <= 1000, f"{what}: an error of {len(text)} characters"
    found = _INSIDES.search(text)
    assert not found, f"{what}: the error says {found.group()!r}: {text}"


@contextlib.contextmanager
def running(environment: Mapping[str, str] | None = None, *, in_order: bool = True) -> Iterator[Target]:
    """A target on a daemon of its own, which has to end in order and without a defect in its log."""
    with TemporaryDirectory(prefix="kv-") as folder:  # pytest's own folders are too long for a socket's path
        daemon = DaemonProcess(Path(folder), environment, **SETTINGS)
        try:
            target = Target(daemon.start())
            try:
                yield target
            finally:
                target.close()
            if in_order:
                daemon.close()
        finally:
            daemon.abandon()


@contextlib.contextmanager
def as_user(uid: int | None) -> Iterator[None]:
    """What connects in here is of that user, for the kernel notes the effective one."""
    if uid is None:
        yield
        return
    before = os.geteuid()
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(before)


def peak_bytes(pid: int) -> int:
    """The most that was ever resident of a process."""
    return _status_bytes(pid, "VmHWM")


def private_bytes(pid: int) -> int:
    """What is resident of a process and is neither file nor shared memory."""
    return _status_bytes(pid, "RssAnon")


def open_files(pid: int) -> int:
    """Open descriptors, less the slabs, which come and go with the blocks."""
    names = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            names.append(str(link.readlink()))
    return sum("slab" not in name for name in names)


def _status_bytes(pid: int, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def _spec(model: str, block_nbytes: int = BLOCK_NBYTES) -> bytes:
    spec = NamespaceSpec(model, "1", 16, "chain", layout_of(block_nbytes))
    return convert.to_proto(spec).SerializeToString()


def _open_bytes(model: str) -> bytes:
    request = pb.OpenNamespaceRequest()
    request.spec.ParseFromString(_spec(model))
    return request.SerializeToString()


def _padded(number: int) -> bytes:
    """A varint as long as that of _LEASE: longer than it need be is allowed."""
    return bytes(number >> 7 * at & 0x7F | 0x80 for at in range(len(varint(_LEASE)) - 1)) + b"\0"
