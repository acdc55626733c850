"""Fetch and Store by themselves, over a pool of real slabs and an engine that says what a test wants."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

from kvstore.access import Identity
from kvstore.protocol.errors import DeadlineExceeded, InvalidRequest, LeaseExpired, QuotaExceeded, Unavailable
from kvstore.protocol.slab import SlabGeometry
from kvstore.tiers.segment import Segment
from kvstore.tiers.warm import SlabInfo, WarmPool
from kvstore.transport import byte_streams
from kvstore.transport.byte_streams import ByteStreams
from kvstore.transport.remote_sessions import RemoteSession
from kvstore.transport.slab_views import SlabViews
from kvstore.transport.stalls import Stream
from kvstore.v1 import kvstore_pb2 as pb

NBYTES = 10_000
SLAB = 4
LEASE = 9
SOON_S = 20.0
NS = bytes(32)


class Engine:
    """Slabs of a pool, a staging segment, and scripted answers."""

    def __init__(self, staging_bytes: int = 64 << 10) -> None:
        self.pool = WarmPool(1 << 20, lock_pages=False)
        self.pool.make(SLAB, SlabGeometry.for_class(12_288, 256 << 10))
        self.segment = Segment("staging", staging_bytes) if staging_bytes else None
        self.waits: list[tuple[int, int]] = []  # answers to wait; the last one stays
        self.asked: list[tuple[int, float]] = []
        self.puts: list[pb.PutRequest] = []
        self.stored: dict[bytes, bytes] = {}
        self.answers: list[tuple[bytes, bytes]] = []
        self.touches = 0

    def fill(self, slot: int) -> None:
        self.pool.view(self.pool.range_of(SLAB, slot, NBYTES))[:] = slot + 1
        self.pool.set_generation(SLAB, slot, 100 + slot)

    def map_slabs(self, session: object, ids: list[int]) -> list[Any]:
        if ids == [0]:
            if self.segment is None:
                return []
            size = self.segment.nbytes
            return [(SlabInfo(0, size, size, 1, 0), os.dup(self.segment.fd))]
        info = self.pool.info(ids[0])
        assert info is not None
        return [(info[0], os.dup(info[1]))]

    def wait(self, session: object, lease_id: int, stop: int, timeout_s: float) -> tuple[int, int]:
        self.asked.append((stop, timeout_s))
        return self.waits.pop(0) if len(self.waits) > 1 else self.waits[0]

    def touch(self, session: object) -> None:
        self.touches += 1

    def put(self, session: object, request: pb.PutRequest, deadline_s: float) -> tuple[bytes, bytes]:
        copy = pb.PutRequest()
        copy.CopyFrom(request)
        self.puts.append(copy)
        assert self.segment is not None
        count = len(request.keys) // 32
        for i in range(count):
            at = i * request.staging_stride
            body = self.segment.array[at : at + request.block_nbytes].tobytes()
            assert xxhash.xxh3_128(body).digest() == request.checksums[16 * i : 16 * i + 16]
            self.stored[request.keys[32 * i : 32 * i + 32]] = body
        return self.answers.pop(0) if self.answers else (b"\x01" * count, bytes(count))


class Bench:
    """Both streams over an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        view: Any = SimpleNamespace(id=1)
        self.session = RemoteSession(view, Identity("red", "red"), 0.0, kinds={NS: True, bytes([1]) * 32: False})
        sessions: Any = SimpleNamespace(touch=lambda session: engine.touch(session))
        self.views = SlabViews(engine)  # type: ignore[arg-type]
        self.streams = ByteStreams(engine, sessions, self.views)  # type: ignore[arg-type]
        self.active = True
        self.stream = Stream("test", SimpleNamespace(is_active=lambda: self.active))  # type: ignore[arg-type]

    def lease(self, blocks: int, first: int = 0) -> None:
        group = pb.LeaseGroup(
            first_block=first,
            slab_ids=SLAB.to_bytes(4, "little") * blocks,
            slots=b"".join(i.to_bytes(4, "little") for i in range(blocks)),
            generations=b"".join((100 + i).to_bytes(8, "little") for i in range(blocks)),
            checksums=b"".join(bytes([i + 1]) * 16 for i in range(blocks)),
            block_nbytes=NBYTES,
        )
        self.session.keep(pb.LeaseReply(lease_id=LEASE, groups=[group]))

    def fetch(self, start: int, stop: int, within_s: float = SOON_S) -> list[pb.FetchChunk]:
        request = pb.FetchRequest(lease_id=LEASE, start=start, stop=stop)
        messages = self.streams.fetch(self.session, request, time.monotonic() + within_s, self.stream)
        return [pb.FetchChunk.FromString(message) for message in messages]

    def store(self, messages: Iterator[bytes] | list[bytes], within_s: float = SOON_S) -> pb.PutResponse:
        return self.streams.store(self.session, iter(messages), time.monotonic() + within_s, self.stream)


@pytest.fixture
def bench() -> Iterator[Bench]:
    engine = Engine()
    made = Bench(engine)
    yield made
    made.views.close()
    engine.pool.close()


def key(i: int) -> bytes:
    return bytes([i]) * 32


def body(i: int) -> bytes:
    return bytes([i + 1]) * NBYTES


def put_of(blocks: int, **fields: Any) -> bytes:
    put = pb.PutRequest(
        **{
            "namespace": NS,
            "keys": b"".join(map(key, range(blocks))),
            "checksums": b"".join(xxhash.xxh3_128(body(i)).digest() for i in range(blocks)),
            "block_nbytes": NBYTES,
            **fields,
        }
    )
    return pb.StoreChunk(put=put).SerializeToString()


def data(raw: bytes) -> bytes:
    return pb.StoreChunk(data=raw).SerializeToString()


# Fetch


def test_blocks_that_are_ready_come_in_order_with_their_checksums(bench: Bench) -> None:
    for slot in range(3):
        bench.engine.fill(slot)
    bench.lease(3)
    bench.engine.waits = [(3, 0)]
    chunks = bench.fetch(1, 3)
    assert [(c.block, c.offset, c.checksum, c.data) for c in chunks] == [
        (1, 0, b"\x02" * 16, body(1)),
        (2, 0, b"\x03" * 16, body(2)),
    ]
    assert bench.engine.touches == 2, "each block is a sign of life"
    assert bench.fetch(1, 1) == []


def test_a_block_is_cut_into_chunks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_streams, "FETCH_CHUNK_BYTES", 4096)
    bench.engine.fill(0)
    bench.lease(1)
    bench.engine.waits = [(1, 0)]
    chunks = bench.fetch(0, 1)
    assert [(c.offset, len(c.data), len(c.checksum)) for c in chunks] == [
        (0, 4096, 16),
        (4096, 4096, 0),
        (8192, 1808, 0),
    ]
    assert b"".join(c.data for c in chunks) == body(0)


def test_the_numbers_of_a_last_block_are_those_of_its_keys(bench: Bench) -> None:
    bench.engine.fill(0)
    bench.lease(1, first=7)
    bench.engine.waits = [(8, 0)]
    assert [c.block for c in bench.fetch(7, 8)] == [7]
    with pytest.raises(InvalidRequest, match=r"the lease has \[7, 8\)"):
        bench.fetch(0, 1)


def test_each_comes_once_it_is_readable(bench: Bench) -> None:
    for slot in range(3):
        bench.engine.fill(slot)
    bench.lease(3)
    bench.engine.waits = [(1, 0), (1, 0), (1, 0), (2, 0), (3, 0)]
    assert [c.block for c in bench.fetch(0, 3)] == [0, 1, 2]
    assert [(stop, timeout_s > 0) for stop, timeout_s in bench.engine.asked] == [
        (3, False),
        (3, False),
        (2, True),
        (2, True),
        (3, False),
    ]


def test_a_block_that_loads_before_one_that_is_lost_is_waited_for(bench: Bench) -> None:
    for slot in range(2):
        bench.engine.fill(slot)
    bench.lease(4)
    # Block 2 is lost; 1 still loads. Asked for all, the engine answers at once; asked for block 1, it waits.
    bench.engine.waits = [(1, 3), (1, 3), (2, 0), (2, 3)]
    chunks = bench.fetch(0, 4)
    assert [(c.block, c.lost) for c in chunks] == [(0, 0), (1, 0), (0, 3)]
    assert [(stop, timeout_s > 0) for stop, timeout_s in bench.engine.asked] == [
        (4, False),
        (4, False),
        (2, True),
        (4, False),
    ]


def test_a_slot_that_was_reused_is_no_block(bench: Bench) -> None:
    bench.engine.fill(0)
    bench.lease(2)
    bench.engine.waits = [(2, 0)]
    with pytest.raises(LeaseExpired, match="block 1 was taken back"):
        bench.fetch(0, 2)


def test_waits_are_bounded(bench: Bench) -> None:
    bench.lease(1)
    bench.engine.waits = [(0, 0)]
    with pytest.raises(DeadlineExceeded, match="block 0 was not loaded"):
        bench.fetch(0, 1, within_s=0.01)
    bench.active = False
    with pytest.raises(LeaseExpired, match="takes no more"):
        bench.fetch(0, 1)
    bench.active = True
    bench.session.ended.set()
    with pytest.raises(LeaseExpired, match="has ended"):
        bench.fetch(0, 1)


# Store


@pytest.mark.parametrize("cut", [1_000, 9_999, 10_000, 10_001, 40_000])
def test_bytes_may_be_cut_anywhere(bench: Bench, cut: int) -> None:
    whole = b"".join(map(body, range(4)))
    reply = bench.store([put_of(4), *(data(whole[at : at + cut]) for at in range(0, len(whole), cut))])
    assert (reply.statuses, reply.reasons) == (b"\x01" * 4, bytes(4))
    assert bench.engine.stored == {key(i): body(i) for i in range(4)}


def test_the_first_message_may_bring_bytes(bench: Bench) -> None:
    first = pb.StoreChunk.FromString(put_of(1))
    first.data = body(0)[:7]
    assert bench.store([first.SerializeToString(), data(body(0)[7:])]).statuses == b"\x01"


def test_windows_hang_on_one_another_and_only_the_last_pins(bench: Bench) -> None:
    root = bytes([99]) * 32
    bench.store([put_of(8, parent=root, pin=True), *(data(body(i)) for i in range(8))])
    first, second = bench.engine.puts
    assert (len(first.keys), len(second.keys)) == (6 * 32, 2 * 32), "six blocks fit the staging"
    assert (first.parent, second.parent) == (root, key(5))
    assert (first.pin, second.pin) == (False, True)
    assert first.staging_offset == 0
    assert first.staging_stride == 10_048


def test_in_a_set_every_window_pins_and_goes_on(bench: Bench) -> None:
    bench.engine.answers = [(b"\x03" * 6, b"\x01" * 6), (b"\x01" * 2, bytes(2))]
    namespace = bytes([1]) * 32
    reply = bench.store([put_of(8, namespace=namespace, pin=True), *(data(body(i)) for i in range(8))])
    assert reply.statuses == b"\x03" * 6 + b"\x01" * 2
    assert [put.pin for put in bench.engine.puts] == [True, True]


def test_what_hangs_on_a_rejected_block_is_not_waited_for(bench: Bench) -> None:
    bench.engine.answers = [(b"\x01" * 5 + b"\x03", bytes(5) + b"\x01")]
    taken = 0

    def messages() -> Iterator[bytes]:
        nonlocal taken
        yield put_of(20)
        for i in range(20):
            taken += 1
            yield data(body(i))

    reply = bench.store(messages())
    assert (reply.statuses, reply.reasons) == (b"\x01" * 5 + b"\x03" * 15, bytes(5) + b"\x01" + b"\x02" * 14)
    assert taken == 6


def test_a_store_waits_its_turn_but_not_for_ever(bench: Bench) -> None:
    assert bench.session.storing.acquire()
    with pytest.raises(DeadlineExceeded, match="another Store"):
        bench.store([put_of(1)], within_s=0.01)
    threading.Timer(0.05, bench.session.storing.release).start()
    assert bench.store([put_of(1), data(body(0))]).statuses == b"\x01"


def test_a_store_that_breaks_off_puts_nothing_and_leaves_the_turn(bench: Bench) -> None:
    for messages, error in (
        ([put_of(2), data(body(0))], InvalidRequest),
        ([put_of(1), data(b"")], InvalidRequest),
        ([put_of(1, block_nbytes=70_000), data(body(0))], QuotaExceeded),
        ([data(body(0))], InvalidRequest),
        ([], InvalidRequest),
    ):
        with pytest.raises(error):
            bench.store(messages)
    assert not bench.engine.puts
    assert bench.store([put_of(1), data(body(0))]).statuses == b"\x01"


def test_a_session_that_ends_meanwhile_stores_nothing_more(bench: Bench) -> None:
    def messages() -> Iterator[bytes]:
        yield put_of(1)
        bench.session.ended.set()
        yield data(body(0))

    with pytest.raises(Unavailable, match="the session has ended"):
        bench.store(messages())
    assert not bench.engine.puts


def test_without_staging_there_is_no_store() -> None:
    bench = Bench(Engine(staging_bytes=0))
    with pytest.raises(QuotaExceeded, match="the 0 bytes of staging"):
        bench.store([put_of(1), data(body(0))])
    bench.engine.pool.close()
