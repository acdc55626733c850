"""AgentTier against an agent that a test plays on the other end of the socket."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore.engine import agent_tier
from kvstore.engine.agent_channel import IN_FLIGHT, AgentLost
from kvstore.engine.agent_tier import READ_FRAME_BYTES, WRITE_FRAME_BYTES, AgentTier
from kvstore.protocol.errors import InternalError, InvalidRequest, KVStoreError, Unavailable
from kvstore.protocol.frames import HEADER, MAX_CALLS_IN_FLIGHT, MAX_PAYLOAD_BYTES, AgentMethod, Frame, FrameSocket
from kvstore.tiers.base import BlockRef, CheckPage, CompactResult, Outcome, SlabRange, TierItem, WriteResult
from kvstore.v1 import agent_pb2

PATIENCE_S = 30.0
LATE_S = 0.2

Script = Callable[["FakeAgent", Frame], None]


class FakeAgent:
    """Answers each frame as its script says; end() is what a supervisor would do, and takes its time over it."""

    def __init__(self, timeout_s: float = PATIENCE_S) -> None:
        ours, theirs = socket.socketpair()
        self.frames = FrameSocket(theirs)
        self.script: Script = FakeAgent.ok
        self.seen: list[Frame] = []
        self.reasons: list[str] = []
        self.reaped = threading.Event()
        ready = agent_pb2.AgentReady(device="cpu")
        self.tier = AgentTier("cold", 1000, FrameSocket(ours), ready, self.end, timeout_s)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def end(self, why: str) -> None:
        self.reasons.append(why)
        time.sleep(0.02)  # a caller that does not wait for the end would be seen
        self.reaped.set()
        self.frames.sock.shutdown(socket.SHUT_RDWR)

    def ok(self, frame: Frame) -> None:
        items = agent_pb2.AgentItems.FromString(frame.payload).items
        outcomes = [agent_pb2.AgentOutcome(outcome=0, stored_bytes=item.range.nbytes) for item in items]
        self.reply(frame, agent_pb2.AgentOutcomes(outcomes=outcomes).SerializeToString())

    def silent(self, frame: Frame) -> None:
        pass

    def reply(self, frame: Frame, payload: bytes = b"", status: int = 0) -> None:
        self.frames.send(frame.call_id, frame.method, payload, status)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.frames.sock.shutdown(socket.SHUT_RDWR)
        self.tier.disconnect()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self.frames.close()

    def _serve(self) -> None:
        while True:
            try:
                frame = self.frames.recv()
                self.seen.append(frame)
                self.script(self, frame)
            except KVStoreError:
                self.frames.sock.shutdown(socket.SHUT_RDWR)
                return


@pytest.fixture
def agent() -> Iterator[FakeAgent]:
    made = FakeAgent()
    yield made
    made.close()


@pytest.fixture
def late_agent() -> Iterator[FakeAgent]:
    made = FakeAgent(LATE_S)
    yield made
    made.close()


def item(number: int, nbytes: int = 100) -> TierItem:
    ref = BlockRef(b"n" * 32, number.to_bytes(32, "big"))
    place = SlabRange(number, 4096, nbytes)
    return TierItem(ref, place, b"c" * 16, b"p" * 32, epoch=7, layout="bfloat16", lossy="int8kv", hits=3)


def items(count: int, nbytes: int = 100) -> list[TierItem]:
    return [item(number, nbytes) for number in range(count)]


def test_what_is_sent_is_what_was_asked(agent: FakeAgent) -> None:
    assert agent.tier.write([item(5)]) == [WriteResult(Outcome.OK, 100)]
    assert agent.tier.read([item(5), item(6)]) == [Outcome.OK] * 2
    write, read = agent.seen
    assert (write.method, read.method) == (AgentMethod.WRITE, AgentMethod.READ)
    (sent,) = agent_pb2.AgentItems.FromString(write.payload).items
    assert (sent.namespace, sent.key) == item(5).ref
    assert (sent.range.slab_id, sent.range.offset, sent.range.nbytes) == item(5).range
    assert (sent.checksum, sent.parent, sent.epoch, sent.layout, sent.lossy, sent.hits) == item(5)[2:]
    asked, _ = agent_pb2.AgentItems.FromString(read.payload).items
    assert (asked.namespace, asked.key, asked.checksum) == (*item(5).ref, item(5).checksum)
    assert (asked.range.slab_id, asked.range.offset, asked.range.nbytes) == item(5).range
    assert not (asked.parent or asked.epoch or asked.layout), "write only"


def test_an_empty_batch_is_not_sent(agent: FakeAgent) -> None:
    assert agent.tier.write([]) == []
    assert agent.tier.read([]) == []
    agent.tier.delete([])
    assert agent.seen == []


def test_a_batch_is_split_by_bytes_and_its_outcomes_stay_in_order(agent: FakeAgent) -> None:
    def by_number(agent: FakeAgent, frame: Frame) -> None:
        asked = agent_pb2.AgentItems.FromString(frame.payload).items
        outcomes = [agent_pb2.AgentOutcome(outcome=message.range.slab_id % 3) for message in asked]
        agent.reply(frame, agent_pb2.AgentOutcomes(outcomes=outcomes).SerializeToString())

    agent.script = by_number
    assert agent.tier.read(items(50, 2 << 20)) == [Outcome(number % 3) for number in range(50)]
    sizes = [len(agent_pb2.AgentItems.FromString(frame.payload).items) for frame in agent.seen]
    assert sizes == [READ_FRAME_BYTES // (2 << 20), 50 - READ_FRAME_BYTES // (2 << 20)]
    agent.seen.clear()
    agent.tier.write(items(9, 2 << 20))
    sizes = [len(agent_pb2.AgentItems.FromString(frame.payload).items) for frame in agent.seen]
    assert sizes == [WRITE_FRAME_BYTES // (2 << 20), 1]


def test_a_block_above_the_frame_size_goes_alone(agent: FakeAgent) -> None:
    assert agent.tier.read(items(3, 100 << 20)) == [Outcome.OK] * 3
    assert len(agent.seen) == 3


def test_frames_stay_small_whatever_the_number_of_blocks(agent: FakeAgent) -> None:
    assert agent.tier.read(items(5000, 1)) == [Outcome.OK] * 5000
    agent.tier.delete([item(number).ref for number in range(20_000)])
    assert len(agent.seen) == 5 + 3
    assert max(len(frame.payload) for frame in agent.seen) < MAX_PAYLOAD_BYTES / 4


def test_a_batch_that_cannot_be_sent_is_refused_before_anything_is(agent: FakeAgent) -> None:
    absurd = [item(1, READ_FRAME_BYTES), item(2)._replace(layout="x" * (MAX_PAYLOAD_BYTES + 1))]
    with pytest.raises(InvalidRequest, match="absurdly long"):
        agent.tier.write(absurd)
    assert agent.seen == []


def test_the_windows_stay_within_what_an_agent_takes() -> None:
    assert sum(IN_FLIGHT.values()) <= MAX_CALLS_IN_FLIGHT
    assert set(IN_FLIGHT) == set(AgentMethod) - {AgentMethod.CONFIGURE}


def test_replies_find_their_callers_in_any_order(agent: FakeAgent) -> None:
    held: list[Frame] = []

    def in_reverse(agent: FakeAgent, frame: Frame) -> None:
        held.append(frame)
        if len(held) == IN_FLIGHT[AgentMethod.READ]:
            for frame in reversed(held):
                (asked,) = agent_pb2.AgentItems.FromString(frame.payload).items
                answer = agent_pb2.AgentOutcome(outcome=asked.range.slab_id % 5)
                agent.reply(frame, agent_pb2.AgentOutcomes(outcomes=[answer]).SerializeToString())
            held.clear()

    agent.script = in_reverse
    count = 4 * IN_FLIGHT[AgentMethod.READ]
    with ThreadPoolExecutor(IN_FLIGHT[AgentMethod.READ]) as pool:
        found = list(pool.map(lambda number: agent.tier.read([item(number)]), range(count), timeout=PATIENCE_S))
    assert found == [[Outcome(number % 5)] for number in range(count)]


def test_a_reply_nobody_waits_for_is_dropped(agent: FakeAgent) -> None:
    def twice(agent: FakeAgent, frame: Frame) -> None:
        agent.reply(frame._replace(call_id=frame.call_id + 1000), b"garbage")
        agent.ok(frame)
        agent.ok(frame)

    agent.script = twice
    for _ in range(20):
        assert agent.tier.read([item(1)]) == [Outcome.OK]


def test_a_late_read_returns_only_once_its_agent_is_reaped(late_agent: FakeAgent) -> None:
    late_agent.script = FakeAgent.silent
    settled: list[int] = []
    assert late_agent.tier.read(items(20, 2 << 20), lambda first, _: settled.append(first)) == [Outcome.MISSING] * 20
    assert settled == []
    assert late_agent.reaped.is_set()
    assert "no answer to READ within 0.2 s" in late_agent.reasons[0]


def test_a_late_write_is_busy_and_ends_its_agent(late_agent: FakeAgent) -> None:
    late_agent.script = FakeAgent.silent
    results = late_agent.tier.write(items(20, 2 << 20))
    assert {result.outcome for result in results} == {Outcome.BUSY}
    assert late_agent.reaped.is_set()


def test_what_was_answered_before_the_end_counts(agent: FakeAgent) -> None:
    def first_only(agent: FakeAgent, frame: Frame) -> None:
        if len(agent.seen) == 1:
            agent.ok(frame)
        else:
            agent.frames.sock.shutdown(socket.SHUT_RDWR)

    agent.script = first_only
    assert agent.tier.read(items(6, READ_FRAME_BYTES // 2)) == [Outcome.OK] * 2 + [Outcome.MISSING] * 4


@pytest.mark.parametrize("count", [1, 200])
def test_a_lost_connection_answers_at_once(agent: FakeAgent, count: int) -> None:
    agent.script = lambda agent, _frame: agent.frames.sock.shutdown(socket.SHUT_RDWR)
    assert agent.tier.read(items(count, READ_FRAME_BYTES)) == [Outcome.MISSING] * count
    assert agent.reaped.is_set()
    assert agent.tier.write(items(count)) == [WriteResult(Outcome.BUSY)] * count
    assert agent.tier.stats() == {}
    for call in (lambda: agent.tier.delete([item(1).ref]), lambda: list(agent.tier.scan()), agent.tier.flush):
        with pytest.raises(Unavailable):
            call()
    assert set(agent.reasons) == {""}


def test_without_a_place_nothing_is_sent_and_nobody_is_blamed(late_agent: FakeAgent) -> None:
    busy, go_on = threading.Event(), threading.Event()

    def slow(agent: FakeAgent, frame: Frame) -> None:
        if len(agent.seen) == IN_FLIGHT[AgentMethod.READ]:
            busy.set()
            go_on.wait(PATIENCE_S)
        if go_on.is_set():
            for seen in agent.seen if len(agent.seen) == IN_FLIGHT[AgentMethod.READ] else [frame]:
                agent.ok(seen)

    late_agent.script = slow
    with ThreadPoolExecutor(1) as pool:  # one block of 100 frames' bytes has 100 times the time
        huge = pool.submit(late_agent.tier.read, items(IN_FLIGHT[AgentMethod.READ], 100 * READ_FRAME_BYTES))
        assert busy.wait(PATIENCE_S)
        assert late_agent.tier.read([item(1)]) == [Outcome.BUSY]
        assert late_agent.reasons == []
        go_on.set()
        assert huge.result(PATIENCE_S) == [Outcome.OK] * IN_FLIGHT[AgentMethod.READ]
    assert late_agent.tier.read([item(1, 100 * READ_FRAME_BYTES)]) == [Outcome.OK]


# -- answers in parts -----------------------------------------------------------------------------------------


def part(first: int, *outcomes: int, more: bool = True) -> bytes:
    answers = [agent_pb2.AgentOutcome(outcome=outcome) for outcome in outcomes]
    return agent_pb2.AgentOutcomes(outcomes=answers, first=first, more=more).SerializeToString()


def test_each_block_is_settled_as_soon_as_it_is_answered(agent: FakeAgent) -> None:
    """Before the call ends, in whatever order the parts come."""
    settled: dict[int, Outcome] = {}
    heard = threading.Semaphore(0)

    def settle(first: int, outcomes: Sequence[Outcome]) -> None:
        settled.update(enumerate(outcomes, first))
        heard.release()

    def in_parts(agent: FakeAgent, frame: Frame) -> None:
        for payload in (part(3, 0), part(0, 0, 1)):
            agent.reply(frame, payload)
            assert heard.acquire(timeout=PATIENCE_S), "a part waits for the rest"
        assert settled == {3: Outcome.OK, 0: Outcome.OK, 1: Outcome.MISSING}
        agent.reply(frame, part(2, 2, more=False))

    agent.script = in_parts
    assert agent.tier.read(items(4), settle) == [Outcome.OK, Outcome.MISSING, Outcome.CORRUPT, Outcome.OK]
    assert settled[2] is Outcome.CORRUPT


def test_positions_go_on_from_one_frame_of_a_batch_to_the_next(agent: FakeAgent) -> None:
    settled: list[int] = []
    batch = items(5, READ_FRAME_BYTES // 2)
    assert agent.tier.read(batch, lambda first, found: settled.extend(range(first, first + len(found)))) == [0] * 5
    assert sorted(settled) == list(range(5))
    assert len(agent.seen) == 3


def test_what_was_settled_before_the_end_stays_and_the_rest_is_not_heard_of(agent: FakeAgent) -> None:
    settled: list[int] = []

    def dies_halfway(agent: FakeAgent, frame: Frame) -> None:
        agent.reply(frame, part(0, 0, 0))
        agent.frames.sock.shutdown(socket.SHUT_RDWR)

    agent.script = dies_halfway
    outcomes = agent.tier.read(items(4), lambda first, found: settled.extend(range(first, first + len(found))))
    assert outcomes == [Outcome.OK] * 2 + [Outcome.MISSING] * 2
    assert settled == [0, 1]
    assert agent.reaped.is_set()


def test_a_part_that_comes_after_the_call_was_given_up_settles_nothing(late_agent: FakeAgent) -> None:
    """Its slot may belong to somebody else by then."""
    frames: list[Frame] = []
    settled: list[int] = []
    late_agent.script = lambda _agent, frame: frames.append(frame)
    late_agent.end = lambda why: late_agent.reply(frames[0], part(0, 0, 0, more=False))  # type: ignore[method-assign]
    late_agent.tier._end_agent = late_agent.end
    assert late_agent.tier.read(items(2), lambda first, _: settled.append(first)) in (
        [Outcome.MISSING] * 2,
        [Outcome.OK] * 2,  # it came before the door was shut: then it was settled, too
    )
    before = list(settled)
    late_agent.tier.stats()
    assert settled == before


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (part(1, 0, 0, more=False), "2 answers from 1 on to 2 items"),
        (part(0, 0, more=False), "1 answers"),
        (part(0, 0, 0, more=True), "2 answers"),
        (part(1 << 63, 0), "1 answers from"),
    ],
)
def test_parts_that_do_not_fit_end_the_agent(agent: FakeAgent, payload: bytes, why: str) -> None:
    agent.script = lambda agent, frame: agent.reply(frame, payload)
    assert agent.tier.read(items(2)) == [Outcome.MISSING] * 2
    assert agent.reaped.is_set()
    assert why in agent.reasons[0]


def test_an_answer_given_twice_ends_the_agent(agent: FakeAgent) -> None:
    def twice(agent: FakeAgent, frame: Frame) -> None:
        agent.reply(frame, part(0, 0))
        agent.reply(frame, part(0, 0))

    agent.script = twice
    agent.tier.read(items(3))
    assert "1 answers from 0 on" in agent.reasons[0]


def test_a_defect_in_a_settler_ends_the_agent_and_not_the_hearing_of_it(
    agent: FakeAgent, caplog: pytest.LogCaptureFixture
) -> None:
    def settle(first: int, outcomes: Sequence[Outcome]) -> None:
        raise ZeroDivisionError("nobody thought of this")

    assert agent.tier.read(items(1), settle)
    assert agent.reaped.is_set()
    assert "nobody thought of this" in caplog.text


def test_a_write_tells_codec_and_checksum(agent: FakeAgent) -> None:
    answer = agent_pb2.AgentOutcome(outcome=0, stored_bytes=7, codec=3, lossy=True, checksum=b"l" * 16)
    agent.script = lambda agent, frame: agent.reply(
        frame, agent_pb2.AgentOutcomes(outcomes=[answer]).SerializeToString()
    )
    assert agent.tier.write(items(1)) == [WriteResult(Outcome.OK, 7, 3, True, b"l" * 16)]


def test_writes_can_be_on_their_way_side_by_side(agent: FakeAgent) -> None:
    held: list[Frame] = []

    def in_reverse(agent: FakeAgent, frame: Frame) -> None:
        held.append(frame)
        if len(held) == 3:
            for frame in reversed(held):
                agent.ok(frame)

    agent.script = in_reverse
    pending = [agent.tier.begin_write(items(2, nbytes)) for nbytes in (10, 20, 30)]
    assert [[result.stored_bytes for result in write.results()] for write in pending] == [[10] * 2, [20] * 2, [30] * 2]


# -- refusals -------------------------------------------------------------------------------------------------


def refused(agent: FakeAgent, frame: Frame) -> None:
    agent.reply(frame, b"no", InternalError.code)


def test_a_refused_call_costs_nothing_but_itself(agent: FakeAgent) -> None:
    agent.script = refused
    assert agent.tier.read(items(3)) == [Outcome.BUSY] * 3  # no reason to forget what the medium holds
    assert agent.tier.write(items(3)) == [WriteResult(Outcome.BUSY)] * 3
    with pytest.raises(InternalError, match="no"):
        agent.tier.delete([item(1).ref])
    with pytest.raises(InternalError):
        agent.tier.flush()
    assert agent.reasons == []


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"\xff", "unreadable answer to READ"),
        (b"", "0 answers from 0 on to 2 items"),
        (agent_pb2.AgentOutcomes(outcomes=[agent_pb2.AgentOutcome()] * 3).SerializeToString(), "3 answers"),
        (agent_pb2.AgentOutcomes(outcomes=[agent_pb2.AgentOutcome(outcome=99)] * 2).SerializeToString(), "unknown"),
    ],
)
def test_an_agent_that_talks_nonsense_is_ended(agent: FakeAgent, payload: bytes, why: str) -> None:
    agent.script = lambda agent, frame: agent.reply(frame, payload)
    assert agent.tier.read(items(2)) == [Outcome.MISSING] * 2
    assert agent.reaped.is_set()
    assert why in agent.reasons[0]


def test_an_oversize_reply_is_the_end(agent: FakeAgent) -> None:
    def oversize(agent: FakeAgent, frame: Frame) -> None:
        agent.frames.sock.sendall(HEADER.pack(MAX_PAYLOAD_BYTES + 1, frame.call_id, frame.method, 0, 0))

    agent.script = oversize
    assert agent.tier.read(items(2)) == [Outcome.MISSING] * 2
    assert agent.reaped.is_set()


def test_an_agent_that_takes_nothing_in_is_lost_within_the_time(late_agent: FakeAgent) -> None:
    go_on = threading.Event()
    late_agent.script = lambda _agent, _frame: go_on.wait(PATIENCE_S)
    late_agent.tier.stats()  # holds the reader of the fake agent, so that what is sent from now on fills the socket
    refs = [item(number).ref for number in range(8192)]
    try:
        with pytest.raises(AgentLost):
            for _ in range(10):
                late_agent.tier.delete(refs)
        assert late_agent.reaped.is_set()
    finally:
        go_on.set()


def page(*numbers: int) -> bytes:
    records = [agent_pb2.AgentRecord(namespace=b"n" * 32, key=item(n).ref.key, nbytes=n, epoch=7) for n in numbers]
    return agent_pb2.AgentScanResponse(records=records).SerializeToString()


def test_a_scan_asks_for_page_after_page(agent: FakeAgent) -> None:
    def pages(agent: FakeAgent, frame: Frame) -> None:
        after = agent_pb2.AgentScanRequest.FromString(frame.payload).after
        first = int.from_bytes(after[32:], "big") + 1 if after else 0
        agent.reply(frame, page(*range(first, min(first + 3, 8))))

    agent.script = pages
    assert [record.nbytes for record in agent.tier.scan()] == list(range(8))
    assert len(agent.seen) == 4


def test_a_scan_that_does_not_advance_ends(agent: FakeAgent) -> None:
    agent.script = lambda agent, frame: agent.reply(frame, page(1))
    with pytest.raises(InternalError, match="does not advance"):
        list(agent.tier.scan())


def test_unreadable_pages_are_an_error(agent: FakeAgent) -> None:
    agent.script = lambda agent, frame: agent.reply(frame, b"\xff")
    with pytest.raises(InternalError, match="unreadable page"):
        list(agent.tier.scan())


def test_a_scan_can_begin_behind_a_block(agent: FakeAgent) -> None:
    agent.script = lambda agent, frame: agent.reply(frame)
    assert list(agent.tier.scan(item(3).ref)) == []
    assert agent_pb2.AgentScanRequest.FromString(agent.seen[0].payload).after == b"".join(item(3).ref)


def test_a_check_is_asked_for_page_by_page(agent: FakeAgent) -> None:
    last = b"".join(item(9).ref)
    reply = agent_pb2.AgentCheckResponse(last=last, checked=5, corrupt=2, missing=1, repaired=3)
    agent.script = lambda agent, frame: agent.reply(frame, reply.SerializeToString())
    assert agent.tier.check(item(3).ref, 8, True) == CheckPage(item(9).ref, 5, 2, 1, 3)
    request = agent_pb2.AgentCheckRequest.FromString(agent.seen[0].payload)
    assert (request.after, request.limit, request.repair) == (b"".join(item(3).ref), 8, True)
    with pytest.raises(InternalError, match="does not advance"):
        agent.tier.check(item(9).ref, 8, False)
    agent.script = lambda agent, frame: agent.reply(frame)
    assert agent.tier.check(None, 8, False) == CheckPage(None, 0)


def test_a_compaction_tells_what_it_gained(agent: FakeAgent) -> None:
    reply = agent_pb2.AgentCompactResponse(before_bytes=9, after_bytes=4)
    agent.script = lambda agent, frame: agent.reply(frame, reply.SerializeToString())
    assert agent.tier.compact() == CompactResult(9, 4)
    agent.script = refused
    with pytest.raises(InternalError):
        agent.tier.compact()
    assert agent.reasons == []


def test_a_resize_tells_what_the_medium_gives(agent: FakeAgent) -> None:
    reply = agent_pb2.AgentResizeResponse(capacity_bytes=7 << 20)
    agent.script = lambda agent, frame: agent.reply(frame, reply.SerializeToString())
    assert agent.tier.resize(8 << 20) == agent.tier.capacity_bytes == 7 << 20
    agent.script = refused
    with pytest.raises(InternalError):
        agent.tier.resize(1 << 20)
    assert (agent.tier.capacity_bytes, agent.reasons) == (7 << 20, [])


def test_a_slow_check_does_not_end_the_agent(late_agent: FakeAgent) -> None:
    late_agent.script = FakeAgent.silent
    with pytest.raises(Unavailable, match="no answer to CHECK"):
        late_agent.tier.check(None, 8, False)
    assert late_agent.reasons == []


def test_statistics_do_not_end_a_slow_agent(monkeypatch: pytest.MonkeyPatch, agent: FakeAgent) -> None:
    monkeypatch.setattr(agent_tier, "STATS_TIMEOUT_S", 0.05)
    agent.script = FakeAgent.silent
    assert agent.tier.stats() == {}
    assert agent.tier.stats() == {}  # its place is still taken
    assert agent.reasons == []


def test_a_slow_flush_does_not_end_the_agent(late_agent: FakeAgent) -> None:
    late_agent.script = FakeAgent.silent
    with pytest.raises(Unavailable, match="no answer to FLUSH"):
        late_agent.tier.flush()
    assert late_agent.reasons == []


def test_close_is_bounded_and_raises_nothing(late_agent: FakeAgent) -> None:
    late_agent.script = FakeAgent.silent
    late_agent.tier.close()
    late_agent.tier.close(0.01)
    assert late_agent.seen[0].method == AgentMethod.CLOSE


def test_name_capacity_and_device_are_there(agent: FakeAgent) -> None:
    assert (agent.tier.name, agent.tier.capacity_bytes, agent.tier.device) == ("cold", 1000, "cpu")
