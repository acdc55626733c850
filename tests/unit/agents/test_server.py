from __future__ import annotations

import struct
import threading
import time

import pytest

from kvstore.protocol.errors import InternalError, InvalidRequest, NotFound, QuotaExceeded, Unavailable
from kvstore.protocol.frames import HEADER, MAX_CALLS_IN_FLIGHT, MAX_PAYLOAD_BYTES, AgentMethod
from kvstore.tiers.base import BlockRef, Outcome, StoredRecord
from kvstore.v1 import agent_pb2
from served_agent import PATIENCE_S, SLAB_BYTES, Served


def items(*numbers: int, offset: int = 0, nbytes: int = 10) -> bytes:
    return agent_pb2.AgentItems(
        items=[
            agent_pb2.AgentItem(
                namespace=b"n" * 32,
                key=bytes([number]) * 32,
                range=agent_pb2.SlabRange(slab_id=1, offset=offset, nbytes=nbytes),
                checksum=b"c" * 16,
            )
            for number in numbers
        ]
    ).SerializeToString()


def test_write_read_delete_stats_flush(served: Served) -> None:
    assert served.map_slab(1).status == 0
    served.ask(1, AgentMethod.WRITE, items(1, 2))
    reply = served.reply()
    assert (reply.call_id, reply.method, reply.status) == (1, AgentMethod.WRITE, 0)
    assert [r.stored_bytes for r in agent_pb2.AgentOutcomes.FromString(reply.payload).outcomes] == [10, 10]
    served.ask(2, AgentMethod.READ, items(1, 2, 3))
    answer = agent_pb2.AgentOutcomes.FromString(served.reply().payload)
    assert (len(answer.outcomes), answer.first, answer.more) == (3, 0, False), "small blocks share a frame"
    served.ask(3, AgentMethod.DELETE, items(2))
    assert served.reply().status == 0
    assert served.tier.deleted == [BlockRef(b"n" * 32, b"\2" * 32)]
    served.ask(4, AgentMethod.STATS)
    assert dict(agent_pb2.AgentStatsResponse.FromString(served.reply().payload).values) == {"blocks": 3}
    served.ask(5, AgentMethod.FLUSH)
    assert served.reply()[:3] == (5, AgentMethod.FLUSH, 0)


def test_reads_and_flushes_do_not_wait_behind_writes(served: Served) -> None:
    served.map_slab(1)
    go_on = threading.Event()
    served.tier.before_write = lambda: go_on.wait(PATIENCE_S)
    try:
        for call_id in (11, 12, 13):  # more than there are threads for
            served.ask(call_id, AgentMethod.WRITE, items(1))
        for call_id, method in enumerate((AgentMethod.READ, AgentMethod.FLUSH, AgentMethod.STATS), 2):
            served.ask(call_id, method, items(1) if method is AgentMethod.READ else b"")
            assert served.reply().call_id == call_id
    finally:
        go_on.set()
    assert sorted(served.reply().call_id for _ in range(3)) == [11, 12, 13]


def test_large_blocks_are_answered_one_by_one_as_they_come(served: Served) -> None:
    """The second reader is done while the first still reads: its block need not wait."""
    served.map_slab(1, 8 << 20, 8 << 20)
    go_on = threading.Event()
    served.tier.before_item = lambda item: go_on.wait(PATIENCE_S) if item.ref.key[0] == 1 else None
    served.ask(7, AgentMethod.READ, items(1, 2, 3, 4, nbytes=1 << 20))
    seen = [agent_pb2.AgentOutcomes.FromString(served.reply().payload) for _ in range(3)]
    assert [(answer.first, len(answer.outcomes), answer.more) for answer in seen] == [
        (1, 1, True),
        (2, 1, True),
        (3, 1, True),
    ]
    go_on.set()
    last = served.reply()
    answer = agent_pb2.AgentOutcomes.FromString(last.payload)
    assert (last.call_id, answer.first, answer.more) == (7, 0, False)


def test_an_empty_read_is_answered(served: Served) -> None:
    served.ask(1, AgentMethod.READ)
    assert served.reply()[:3] == (1, AgentMethod.READ, 0)


def test_what_a_failed_tier_does_not_find_may_be_there(served: Served) -> None:
    """Regression: a MISSING of a tier that had just failed made the daemon forget blocks that were intact."""
    served.map_slab(1)
    served.tier.missing = True
    served.ask(1, AgentMethod.READ, items(1))
    assert [a.outcome for a in agent_pb2.AgentOutcomes.FromString(served.reply().payload).outcomes] == [Outcome.MISSING]
    # Not before this read: the reader of the one before may still be looking whether to go on.
    served.tier.before_read = lambda: setattr(served.tier, "failure", "damaged page")
    served.ask(2, AgentMethod.READ, items(1))
    assert [a.outcome for a in agent_pb2.AgentOutcomes.FromString(served.reply().payload).outcomes] == [Outcome.BUSY]


def test_only_a_medium_that_can_is_resized(served: Served) -> None:
    request = agent_pb2.AgentResizeRequest(capacity_bytes=1 << 20).SerializeToString()
    served.ask(1, AgentMethod.RESIZE, request)
    assert served.reply().status == InvalidRequest.code


def test_check_and_compact(served: Served, served_hot: Served) -> None:
    after = b"n" * 32 + b"\1" * 32
    request = agent_pb2.AgentCheckRequest(after=after, limit=2, repair=True)
    served.ask(1, AgentMethod.CHECK, request.SerializeToString())
    page = agent_pb2.AgentCheckResponse.FromString(served.reply().payload)
    assert (page.last, page.checked, page.repaired) == (after, 2, 1)
    served.ask(2, AgentMethod.COMPACT)
    result = agent_pb2.AgentCompactResponse.FromString(served.reply().payload)
    assert (result.before_bytes, result.after_bytes) == (9, 4)
    for method in (AgentMethod.CHECK, AgentMethod.COMPACT):
        served_hot.ask(3, method)
        assert served_hot.reply().status == InvalidRequest.code


def test_deletes_do_not_wait_behind_writes(served: Served) -> None:
    """Whoever writes what was deleted before waits for the delete's answer first."""
    served.map_slab(1)
    go_on = threading.Event()
    served.tier.before_write = lambda: go_on.wait(PATIENCE_S)
    try:
        for call_id in (1, 2, 3):
            served.ask(call_id, AgentMethod.WRITE, items(1))
        served.ask(4, AgentMethod.DELETE, items(2))
        assert served.reply().call_id == 4
    finally:
        go_on.set()


def test_a_delete_that_is_not_sure_says_so(served: Served) -> None:
    def fail(refs: object) -> None:
        raise OSError(28, "no space")

    served.tier.delete = fail  # type: ignore[method-assign]
    served.ask(1, AgentMethod.DELETE, items(2))
    assert served.reply().status == InternalError.code


def test_a_call_too_many_is_refused_and_the_others_are_not(served: Served) -> None:
    served.map_slab(1)
    go_on = threading.Event()
    served.tier.before_write = lambda: go_on.wait(PATIENCE_S)
    try:
        for call_id in range(1, MAX_CALLS_IN_FLIGHT + 2):
            served.ask(call_id, AgentMethod.WRITE, items(1))
        refused = served.reply()
        assert (refused.call_id, refused.status) == (MAX_CALLS_IN_FLIGHT + 1, QuotaExceeded.code)
    finally:
        go_on.set()
    assert [served.reply().status for _ in range(MAX_CALLS_IN_FLIGHT)] == [0] * MAX_CALLS_IN_FLIGHT
    served.ask(99, AgentMethod.WRITE, items(1))
    assert served.reply()[:3] == (99, AgentMethod.WRITE, 0)


@pytest.mark.parametrize(
    ("method", "payload", "status"),
    [
        (77, b"", InvalidRequest.code),
        (AgentMethod.CONFIGURE, b"", InvalidRequest.code),
        (AgentMethod.WRITE, b"\xff\xff", InvalidRequest.code),
        (AgentMethod.READ, items(1, nbytes=SLAB_BYTES + 1), InvalidRequest.code),
        (AgentMethod.WRITE, items(1, offset=SLAB_BYTES), InvalidRequest.code),
        (AgentMethod.SCAN, agent_pb2.AgentScanRequest(after=b"x").SerializeToString(), InvalidRequest.code),
        (AgentMethod.UNMAP_SLAB, agent_pb2.AgentUnmapSlab(slab_id=9).SerializeToString(), NotFound.code),
        (AgentMethod.MAP_SLAB, agent_pb2.AgentMapSlab(slab_id=9, segment_bytes=1).SerializeToString(), 3),
        (AgentMethod.STATS, b"\xff", InvalidRequest.code),
    ],
)
def test_a_bad_frame_is_answered_and_the_next_one_served(
    served: Served, method: int, payload: bytes, status: int
) -> None:
    served.map_slab(1)
    served.ask(1, method, payload)
    reply = served.reply()
    assert (reply.call_id, reply.method, reply.status) == (1, method, status)
    assert reply.payload.decode()
    served.ask(2, AgentMethod.READ, items(1))
    assert served.reply()[:3] == (2, AgentMethod.READ, 0)


def test_an_oversize_frame_is_answered_before_the_end(served: Served) -> None:
    served.frames.sock.sendall(HEADER.pack(MAX_PAYLOAD_BYTES + 1, 5, AgentMethod.READ, 0, 0))
    reply = served.reply()
    assert reply.status == InvalidRequest.code
    assert b"announced a frame" in reply.payload
    assert served.ended()
    assert served.tier.closed.is_set()


def test_a_slab_is_known_from_map_to_unmap(served: Served) -> None:
    served.map_slab(1)
    assert served.map_slab(1).status == InvalidRequest.code
    assert served.map_slab(2, nbytes=SLAB_BYTES + 1).status == InvalidRequest.code
    served.ask(1, AgentMethod.UNMAP_SLAB, agent_pb2.AgentUnmapSlab(slab_id=1).SerializeToString())
    assert served.reply().status == 0
    served.ask(2, AgentMethod.UNMAP_SLAB, agent_pb2.AgentUnmapSlab(slab_id=1).SerializeToString())
    assert served.reply().status == NotFound.code


@pytest.mark.parametrize("error", [OSError(5, "disk"), KeyError("slab")])
def test_an_error_of_the_world_is_the_status_of_its_call(served: Served, error: Exception) -> None:
    """A read may have other parts under way, which still fill slots: its blocks are BUSY, and the call goes on."""
    served.map_slab(1)

    def fail() -> None:
        raise error

    served.tier.before_read = served.tier.before_write = fail
    served.ask(1, AgentMethod.WRITE, items(1))
    reply = served.reply()
    assert reply.status == InternalError.code
    assert type(error).__name__ in reply.payload.decode()
    served.ask(2, AgentMethod.READ, items(1))
    reply = served.reply()
    assert reply.status == 0
    assert [a.outcome for a in agent_pb2.AgentOutcomes.FromString(reply.payload).outcomes] == [Outcome.BUSY]


def record(number: int) -> StoredRecord:
    return StoredRecord(BlockRef(b"n" * 32, struct.pack(">32xQ", number)[-32:]), b"", b"c" * 16, 1, 1, 0)


def test_a_scan_comes_in_pages(served: Served) -> None:
    served.tier.records = [record(number) for number in range(10)]
    after, seen = b"", []
    while True:
        request = agent_pb2.AgentScanRequest(after=after, limit=4)
        served.ask(1, AgentMethod.SCAN, request.SerializeToString())
        page = agent_pb2.AgentScanResponse.FromString(served.reply().payload).records
        assert len(page) <= 4
        if not page:
            break
        seen += [message.key for message in page]
        after = page[-1].namespace + page[-1].key
    assert seen == [stored.ref.key for stored in served.tier.records]


def test_what_keeps_nothing_cannot_be_scanned_but_flushed(served_hot: Served) -> None:
    served_hot.ask(1, AgentMethod.SCAN)
    reply = served_hot.reply()
    assert reply.status == InvalidRequest.code
    assert b"nothing to scan" in reply.payload
    served_hot.ask(2, AgentMethod.FLUSH)
    assert served_hot.reply().status == 0


def test_close_finishes_what_is_queued_and_answers_last(served: Served) -> None:
    served.map_slab(1)
    go_on = threading.Event()
    served.tier.before_write = lambda: go_on.wait(PATIENCE_S)
    for call_id in (1, 2):
        served.ask(call_id, AgentMethod.WRITE, items(1))
    served.ask(3, AgentMethod.CLOSE)
    assert not served.tier.closed.is_set()
    go_on.set()
    assert sorted(served.reply().call_id for _ in range(2)) == [1, 2]
    assert served.reply().call_id == 3
    assert served.tier.closed.is_set()
    assert served.ended()


def test_the_end_of_the_connection_drops_the_queue_and_closes_the_tier(served: Served) -> None:
    served.map_slab(1)
    begun, go_on = threading.Event(), threading.Event()
    deletes: list[int] = []

    def delete(refs: object) -> None:
        deletes.append(1)
        begun.set()
        go_on.wait(PATIENCE_S)

    served.tier.delete = delete  # type: ignore[method-assign]
    for call_id in (1, 2, 3):
        served.ask(call_id, AgentMethod.DELETE, items(1))
    assert begun.wait(PATIENCE_S)
    served.frames.close()
    while not served.drops_its_queue():
        time.sleep(0.001)
    go_on.set()
    assert served.ended()
    assert served.tier.closed.is_set()
    assert deletes == [1]


def test_a_tier_that_failed_for_good_ends_the_agent_after_its_answer(served: Served) -> None:
    served.map_slab(1)
    served.tier.failure = "damaged page"
    served.ask(1, AgentMethod.WRITE, items(1))
    assert served.reply().status == 0
    with pytest.raises(Unavailable):
        served.reply()
    assert served.ended()
    assert served.tier.closed.is_set()
