"""Agents that are sent any frames, and the daemon's end of the connection that is sent any replies."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from agent_rig import NAMESPACE, Slots, cold_config, hot_config
from fuzz_messages import Known, fuzzing, payloads, sized, tag
from fuzz_target import open_files
from kvstore.engine.agent_process import AgentProcess
from kvstore.engine.agent_tier import AgentTier
from kvstore.protocol.errors import KVStoreError, Unavailable
from kvstore.protocol.frames import HEADER, MAX_PAYLOAD_BYTES, AgentMethod, Frame, FrameSocket
from kvstore.tiers.base import BlockRef, Outcome, StoredRecord, TierItem
from kvstore.v1 import agent_pb2 as pb

PATIENCE_S = 30.0
KEPT = range(100, 104)
STRAYS_MAX = 400  # descriptors; it hangs up on who leaves more than 500 with it
REQUESTS: dict[AgentMethod, type[Message]] = {
    AgentMethod.MAP_SLAB: pb.AgentMapSlab,
    AgentMethod.UNMAP_SLAB: pb.AgentUnmapSlab,
    AgentMethod.WRITE: pb.AgentItems,
    AgentMethod.READ: pb.AgentItems,
    AgentMethod.DELETE: pb.AgentItems,
    AgentMethod.SCAN: pb.AgentScanRequest,
    AgentMethod.STATS: pb.AgentStatsRequest,
    AgentMethod.FLUSH: pb.AgentFlushRequest,
    AgentMethod.CHECK: pb.AgentCheckRequest,
    AgentMethod.COMPACT: pb.AgentCompactRequest,
}
REPLIES: dict[AgentMethod, type[Message]] = {
    AgentMethod.WRITE: pb.AgentOutcomes,
    AgentMethod.READ: pb.AgentOutcomes,
    AgentMethod.SCAN: pb.AgentScanResponse,
    AgentMethod.STATS: pb.AgentStatsResponse,
    AgentMethod.CHECK: pb.AgentCheckResponse,
    AgentMethod.COMPACT: pb.AgentCompactResponse,
    AgentMethod.FLUSH: pb.AgentFlushResponse,
    AgentMethod.DELETE: pb.AgentFlushResponse,
}


@pytest.fixture
def slots() -> Iterator[Slots]:
    made = Slots(slots=16, block_bytes=16 << 10)
    yield made
    made.segment.close()


class Fed:
    """A real agent without a supervisor, with a slab and a few blocks that must come to no harm."""

    def __init__(self, config: pb.AgentConfig, slots: Slots) -> None:
        self.process, self.slots = AgentProcess(), slots
        self.frames = self.process.frames
        self.ready = pb.AgentReady.FromString(self.ask(AgentMethod.CONFIGURE, config.SerializeToString()).payload)
        assert not self.ready.error
        self.map_slab()
        assert self.outcomes(AgentMethod.WRITE, slots.sources(KEPT)) == [Outcome.OK] * len(KEPT)

    def ask(self, method: int, payload: bytes, fds: list[int] | None = None) -> Frame:
        """A call and its last answer."""
        self.frames.send(5, method, payload, fds=fds or [])
        while True:
            answer = self.frames.recv(PATIENCE_S)
            assert (answer.call_id, answer.method) == (5, method)
            if method != AgentMethod.READ or answer.status or not pb.AgentOutcomes.FromString(answer.payload).more:
                return answer

    def map_slab(self) -> None:
        """Give it the whole slab, of which it may have all or a part."""
        self.ask(AgentMethod.UNMAP_SLAB, pb.AgentUnmapSlab(slab_id=self.slots.slab_id).SerializeToString())
        request = pb.AgentMapSlab(slab_id=self.slots.slab_id, segment_bytes=self.slots.segment.nbytes)
        self.ask(AgentMethod.MAP_SLAB, request.SerializeToString(), [self.slots.segment.fd])

    def outcomes(self, method: AgentMethod, items: list[TierItem]) -> list[int]:
        """Write or read properly; a small batch is one part."""
        answer = self.ask(method, pb.AgentItems(items=map(message_of, items)).SerializeToString())
        assert not answer.status, answer.payload
        return [one.outcome for one in pb.AgentOutcomes.FromString(answer.payload).outcomes]

    def check(self) -> None:
        """It lives, and has what it was given."""
        self.map_slab()
        targets = self.slots.targets(KEPT)
        assert self.outcomes(AgentMethod.READ, targets) == [Outcome.OK] * len(KEPT)
        assert all(map(self.slots.is_whole, targets))
        assert not self.process.reaped.is_set()

    def close(self) -> int:
        """End it in order; its exit status."""
        self.ask(AgentMethod.CLOSE, b"")
        assert self.process.reaped.wait(PATIENCE_S)
        return int(self.process.ending.removeprefix("exited with status "))


def message_of(item: TierItem) -> pb.AgentItem:
    place = pb.SlabRange(slab_id=item.range.slab_id, offset=item.range.offset, nbytes=item.range.nbytes)
    return pb.AgentItem(namespace=item.ref.namespace, key=item.ref.key, range=place, checksum=item.checksum)


def known_of(slots: Slots) -> Known:
    """Blocks of the fuzz's own, their places and checksums."""
    sources, targets = slots.sources(range(3)), slots.targets(range(3))
    items = [message_of(item) for item in (*sources, *targets)]
    return {
        "namespace": [NAMESPACE],
        "key": [item.ref.key for item in sources],
        "checksum": [item.checksum for item in sources],
        "range": [item.range.SerializeToString() for item in items],
        "items": [item.SerializeToString() for item in items],
        "parent": [b"", bytes(32)],
        "layout": [
            b"bfloat16 kv=2 token=16 dim=256",
            b"float8_e4m3 token=16 dim=1024",
            b"nonsense = 1; ;",
            b"a=" * 400,
        ],
        "lossy": [b"", b"int8kv"],
        "slab_id": [slots.slab_id],
        "segment_bytes": [slots.segment.nbytes, 4096],
        "after": [b"", bytes(64)],
        "limit": [0, 1, 100],
    }


@pytest.mark.parametrize("tier", ["cold", "hot"])
def test_an_agent_answers_any_frame(tmp_path: Path, slots: Slots, capfd: pytest.CaptureFixture[str], tier: str) -> None:
    """Descriptors come with some, wanted or not. What it answers is its business; that it answers is ours."""
    config = cold_config(tmp_path / "cold") if tier == "cold" else hot_config()
    config.kernels = "numpy"
    agent = Fed(config, slots)
    known = known_of(slots)
    calls = st.sampled_from(list(REQUESTS)).flatmap(
        lambda method: st.tuples(st.just(int(method)), payloads(REQUESTS[method].DESCRIPTOR, known))
    )
    unknown = st.tuples(st.sampled_from((0, 12, 77, 65_535)), st.binary(max_size=20))
    # The slab's own: the next call that wants one takes the first that came, and the daemon is its only peer.
    fds = st.sampled_from(([], [], [], [slots.segment.fd], [slots.segment.fd] * 9))

    strays: list[int] = []

    @fuzzing(120, f"agent {tier}")
    @given(st.one_of(calls, calls, calls, unknown), fds)
    def is_answered(call: tuple[int, bytes], passed: list[int]) -> None:
        passed = passed if len(strays) + len(passed) < STRAYS_MAX else []
        strays.extend(passed)
        answer = agent.ask(*call, passed)
        if answer.status:
            assert 0 < len(answer.payload.decode()) < 1000
        if call[0] == AgentMethod.UNMAP_SLAB:
            agent.map_slab()

    try:
        is_answered()
        agent.check()
        assert agent.close() == 0
    finally:
        agent.process.end()
        agent.frames.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "end",
    [
        HEADER.pack(MAX_PAYLOAD_BYTES + 1, 1, AgentMethod.READ, 0, 0),
        HEADER.pack((1 << 32) - 1, 1, 77, 9, 9) + bytes(100),
        HEADER.pack(1000, 1, AgentMethod.WRITE, 0, 0) + b"half",
        b"\xff" * 40,
        b"\0",
        b"too many descriptors",
    ],
    ids=["above the limit", "4 GiB", "half a frame", "ones", "a byte", "descriptors"],
)
def test_an_agent_whose_stream_is_out_of_step_ends_in_order(
    slots: Slots, capfd: pytest.CaptureFixture[str], end: bytes
) -> None:
    agent = Fed(hot_config(), slots)
    sock = agent.frames.sock
    try:
        if end.startswith(b"too many"):
            for _ in range(3):
                socket.send_fds(sock, [HEADER.pack(0, 1, AgentMethod.STATS, 0, 0)], [slots.segment.fd] * 250)
        else:
            sock.sendall(end)
        sock.shutdown(socket.SHUT_WR)
        with pytest.raises(Unavailable):
            while agent.frames.recv(PATIENCE_S):
                pass
        assert agent.process.reaped.wait(PATIENCE_S)
        assert agent.process.ending == "exited with status 0"
    finally:
        agent.process.end()
        agent.frames.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"tier": "lukewarm"},
        {"path": "a\0b"},
        {"path": "x" * 300},
        {"path": "/proc/version/x"},
        {"capacity_bytes": 0},
        {"capacity_bytes": (1 << 64) - 1},
        {"reader_threads": 17},
        {"codec": "gzip"},
        {"kernels": "abacus"},
        {"durability": "sometimes"},
        {"sync_interval_ms": (1 << 64) - 1},
        {"free_reserve_bytes": (1 << 64) - 1},
        {"tier": "hot", "device": "toaster"},
        {"tier": "hot", "device": "cpu", "capacity_bytes": (1 << 64) - 1},
    ],
    ids=str,
)
def test_an_agent_of_any_configuration(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    """It serves, or says why not."""
    config = cold_config(tmp_path / "cold")
    config.kernels = "numpy"
    for name, value in changes.items():
        setattr(config, name, value)
    process = AgentProcess()
    try:
        process.frames.send(0, AgentMethod.CONFIGURE, config.SerializeToString())
        ready = pb.AgentReady.FromString(process.frames.recv(PATIENCE_S).payload)
        process.frames.sock.shutdown(socket.SHUT_WR)
        assert process.reaped.wait(PATIENCE_S)
        assert process.ending == f"exited with status {1 if ready.error else 0}"
    finally:
        process.end()
        process.frames.close()
    assert "Traceback" not in capfd.readouterr().err


# -- the other direction


Script = list[tuple[int, int, bytes | None]]
"""Replies to one frame: how far the call id is off, the status, the payload (None: the connection ends here)."""

ITEMS = 3
_OUTCOME = b"".join(sized(1, tag(1, 0) + bytes([outcome])) for outcome in (0, 1, 0))
KNOWN_REPLY: Known = {
    "outcome": [0, 1, 2, 3, 4],
    "first": [0, 0, 1, ITEMS],
    "more": [0, 1],
    "namespace": [NAMESPACE],
    "key": [bytes(32)],
    "checksum": [bytes(16)],
    "last": [b"", bytes(64)],
}


def scripts(method: AgentMethod) -> st.SearchStrategy[Script]:
    """What an agent that has lost its mind answers."""
    bodies = st.one_of(payloads(REPLIES[method].DESCRIPTOR, KNOWN_REPLY), st.just(_OUTCOME), st.just(b""))
    statuses = st.one_of(st.just(0), st.just(0), st.just(0), st.sampled_from((2, 3, 13, 14, 999, 65_535)))
    reply = st.tuples(st.sampled_from((0, 0, 0, 1, -1)), statuses, st.one_of(bodies, bodies, bodies, st.none()))
    return st.lists(reply, max_size=4)


class Mad:
    """An agent's end of a socket pair, which answers each frame by a script and then hangs up."""

    def __init__(self, script: Script) -> None:
        ours, theirs = socket.socketpair()
        self._frames, self._script = FrameSocket(theirs), script
        self.tier = AgentTier("cold", 1000, FrameSocket(ours), pb.AgentReady(), self._end, timeout_s=PATIENCE_S)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _end(self, why: str) -> None:
        self._frames.sock.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        try:
            frame = self._frames.recv(PATIENCE_S)
            for off, status, payload in self._script:
                if payload is None:
                    break
                self._frames.send((frame.call_id + off) & 0xFFFFFFFF, frame.method, payload, status)
        except KVStoreError:
            pass
        finally:
            self._frames.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self.tier.disconnect()
        self._frames.close()


def items_of(slots: Slots) -> list[TierItem]:
    return [slots.source_name(number) for number in range(ITEMS)]


def read(tier: AgentTier, items: list[TierItem]) -> None:
    settled: list[int] = []
    outcomes = tier.read(items, lambda first, found: settled.extend(range(first, first + len(found))))
    assert len(outcomes) == len(items)
    assert all(isinstance(outcome, Outcome) for outcome in outcomes)
    assert len(set(settled)) == len(settled)
    assert set(settled) <= set(range(len(items)))


def write(tier: AgentTier, items: list[TierItem]) -> None:
    results = tier.write(items)
    assert len(results) == len(items)
    assert all(isinstance(result.outcome, Outcome) for result in results)


def scan(tier: AgentTier, items: list[TierItem]) -> None:
    assert all(isinstance(record, StoredRecord) for record in tier.scan())


def check(tier: AgentTier, items: list[TierItem]) -> None:
    last = tier.check(None, 9, False).last
    assert last is None or isinstance(last, BlockRef)


CALLS: dict[AgentMethod, Callable[[AgentTier, list[TierItem]], object]] = {
    AgentMethod.READ: read,
    AgentMethod.WRITE: write,
    AgentMethod.SCAN: scan,
    AgentMethod.CHECK: check,
    AgentMethod.STATS: lambda tier, items: tier.stats(),
    AgentMethod.COMPACT: lambda tier, items: tier.compact(),
    AgentMethod.FLUSH: lambda tier, items: tier.flush(),
    AgentMethod.DELETE: lambda tier, items: tier.delete([item.ref for item in items]),
}


@pytest.mark.parametrize("method", CALLS, ids=lambda method: method.name)
def test_any_reply_is_taken_or_refused(slots: Slots, caplog: pytest.LogCaptureFixture, method: AgentMethod) -> None:
    """An outcome an item, or an error of the tree; no thread dies of it, and no descriptor stays."""
    caplog.set_level(logging.CRITICAL, "kvstore.engine.agent_tier")
    items, before = items_of(slots), open_files(os.getpid())

    @fuzzing(60, f"reply {method.name}")
    @given(scripts(method))
    def ends(script: Script) -> None:
        mad = Mad(script)
        try:
            with contextlib.suppress(KVStoreError):
                CALLS[method](mad.tier, items)
        finally:
            mad.close()

    ends()
    assert "defect" not in caplog.text, caplog.text
    assert open_files(os.getpid()) <= before
