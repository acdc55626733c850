"""The parts of the TCP listener by themselves: places, stalls, sessions, mapped slabs, refusals in the log."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from kvstore.access import Identity
from kvstore.protocol.errors import (
    LeaseExpired,
    NotFound,
    PermissionDenied,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
)
from kvstore.protocol.slab import SlabGeometry
from kvstore.tiers.warm import WarmPool
from kvstore.transport import remote_sessions
from kvstore.transport.remote import Refusals
from kvstore.transport.remote_sessions import RemoteSession, RemoteSessions
from kvstore.transport.slab_views import SlabViews
from kvstore.transport.stalls import Streams
from kvstore.v1 import kvstore_pb2 as pb
from transport_double import FakeEngine

RED = Identity("red-1", "red")


class Context:
    """What a stream needs of gRPC's."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def place(streams: Streams, owner: object, context: Context | None = None) -> Any:
    return streams.place("Fetch", owner, context or Context())  # type: ignore[arg-type]


def test_so_many_streams_and_so_many_of_one_owner() -> None:
    streams = Streams(streams_max=3, owner_max=2, stall_s=1.0)
    with place(streams, 1), place(streams, 1):
        with pytest.raises(QuotaExceeded, match="2 of them yours"), place(streams, 1):
            pass
        with place(streams, 2), pytest.raises(QuotaExceeded, match="3 such calls are running"), place(streams, 3):
            pass
    assert len(streams) == 0
    with place(streams, 1):
        assert len(streams) == 1


def test_a_place_is_given_back_by_an_error() -> None:
    streams = Streams(1, 1, 1.0)
    with pytest.raises(ZeroDivisionError), place(streams, 1):
        raise ZeroDivisionError
    assert len(streams) == 0


def test_only_who_keeps_waiting_for_too_long_is_cut() -> None:
    streams = Streams(4, 4, stall_s=0.0)
    waiting, working, done = Context(), Context(), Context()
    with place(streams, 1, waiting) as first, place(streams, 1, working), place(streams, 1, done) as third:
        first.wait_begins()
        third.wait_begins()
        third.wait_ends()
        time.sleep(0.001)
        streams.cut_stalled()
        assert (waiting.cancelled, working.cancelled, done.cancelled) == (True, False, False)
    patient = Streams(4, 4, stall_s=60.0)
    context = Context()
    with place(patient, 1, context) as stream:
        stream.wait_begins()
        patient.cut_stalled()
        assert not context.cancelled


def test_a_peer_that_goes_away_is_unavailable_and_one_that_ends_is_not() -> None:
    streams = Streams(1, 1, 1.0)

    def messages() -> Iterator[bytes]:
        yield b"one"
        raise grpc.RpcError

    with place(streams, 1) as stream:
        arriving = messages()
        assert stream.take(arriving) == b"one"
        with pytest.raises(Unavailable, match="the client has gone"):
            stream.take(arriving)
        assert stream.take(iter([])) is None
        assert stream.since_s == 0.0


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def opened(sessions: RemoteSessions, identity: Identity = RED) -> RemoteSession:
    return sessions.open(identity, "worker", "ipv4:10.0.0.9:1")


def test_a_session_is_found_by_its_token_and_its_own_identity(engine: FakeEngine) -> None:
    sessions = RemoteSessions(engine, 2, 2, 30.0)
    session = opened(sessions)
    token = session.view.token.hex()
    assert sessions.find(token, RED) is session
    assert sessions.find(token, Identity("red-2", "red")) is session, "another name of the tenant's"
    assert engine.sessions[session.view.id].touches == 2
    for other in (Identity("blue", "blue"), Identity("red-1", "red", is_admin=True)):
        with pytest.raises(Unauthenticated, match="not yours"):
            sessions.find(token, other)
    for wrong in (None, "", "zz", "00" * 32, token[:-2]):
        with pytest.raises(Unauthenticated):
            sessions.find(wrong, RED)
    assert session.view.uid == (1 << 32) - 1, "no uid of this machine is granted anything by it"
    assert engine.sessions[session.view.id].name == "worker (ipv4:10.0.0.9:1)"


def test_sessions_have_a_limit_and_an_end(engine: FakeEngine) -> None:
    sessions = RemoteSessions(engine, 2, 2, 30.0)
    first, _ = opened(sessions), opened(sessions)
    with pytest.raises(QuotaExceeded, match="2 sessions are open"):
        opened(sessions)
    sessions.end(first, "test")
    sessions.end(first, "again")
    assert engine.sessions[first.view.id].closed.is_set()
    assert first.ended.is_set()
    with pytest.raises(Unauthenticated):
        sessions.find(first.view.token.hex(), RED)
    with pytest.raises(Unauthenticated):
        sessions.of(first.view)
    opened(sessions)
    sessions.close()
    assert len(sessions) == 0
    with pytest.raises(Unavailable):
        opened(sessions)


def test_a_tenant_has_a_share_of_the_sessions(engine: FakeEngine) -> None:
    sessions = RemoteSessions(engine, 4, 3, 30.0)
    mine = [opened(sessions) for _ in range(3)]
    with pytest.raises(QuotaExceeded, match="this tenant has 3 sessions over TCP"):
        opened(sessions, Identity("another name", "red"))
    opened(sessions, Identity("blue", "blue"))
    sessions.end(mine[0], "test")
    opened(sessions)


def test_the_silent_are_ended_and_the_others_not(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = RemoteSessions(engine, 2, 2, 30.0)
    silent, lively = opened(sessions), opened(sessions)
    now_s = time.monotonic()
    monkeypatch.setattr(remote_sessions.time, "monotonic", lambda: now_s + 20)
    sessions.find(lively.view.token.hex(), RED)
    monkeypatch.setattr(remote_sessions.time, "monotonic", lambda: now_s + 31)
    sessions.end_silent()
    assert (silent.ended.is_set(), lively.ended.is_set()) == (True, False)


def test_leases_of_a_session_are_bounded(engine: FakeEngine) -> None:
    session = opened(RemoteSessions(engine, 1, 1, 30.0))
    session.keep(pb.LeaseReply())
    assert not session.leases, "no lease, nothing to keep"
    session.keep(pb.LeaseReply(lease_id=7, groups=[pb.LeaseGroup(slots=bytes(400))]))
    assert len(session.groups_of(7)) == 1
    session.check_room((1 << 18) - 100)
    with pytest.raises(QuotaExceeded, match="1 leases on 100 blocks"):
        session.check_room((1 << 18) - 99)
    with pytest.raises(LeaseExpired):
        session.groups_of(8)
    with pytest.raises(NotFound, match="OpenNamespace"):
        session.is_chain(bytes(32))


class SlabEngine:
    """Maps the slabs of a pool for everybody."""

    def __init__(self, pool: WarmPool) -> None:
        self.pool = pool
        self.mapped = 0

    def map_slabs(self, session: object, ids: list[int]) -> list[Any]:
        found = [self.pool.info(slab_id) for slab_id in ids]
        self.mapped += 1
        return [(info[0], os.dup(info[1])) for info in found if info is not None]


def test_slabs_are_mapped_once_and_dropped_when_retired() -> None:
    pool = WarmPool(1 << 20, lock_pages=False)
    pool.make(3, SlabGeometry.for_class(4096, 64 << 10))
    engine = SlabEngine(pool)
    views = SlabViews(engine)  # type: ignore[arg-type]
    session: Any = SimpleNamespace(id=1)
    pool.view(pool.range_of(3, 5, 4096))[:4] = [1, 2, 3, 4]
    pool.set_generation(3, 5, 77)
    view = views.get(session, 3)
    assert views.get(session, 3) is view
    assert engine.mapped == 1
    assert bytes(view.bytes_of(5, 1, 3)) == b"\x02\x03\x04"
    assert int.from_bytes(view.generation(5), "little") == 77
    views.drop_retired()
    assert len(views) == 1
    pool.drop(3)
    assert view.generation(5) == bytes(8), "a reader that is at it sees that the block is gone"
    views.drop_retired()
    assert len(views) == 0
    with pytest.raises(LeaseExpired, match="slab 3 was retired"):
        views.get(session, 3)


def test_a_flood_of_refusals_is_a_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            refusals.note("ipv4:10.0.0.9:1", PermissionDenied("no"))
    assert len(caplog.records) == 1
    assert "10.0.0.9" in caplog.text
