"""The recorder: nothing while nobody asks, bounded memory, and every loss counted."""

from __future__ import annotations

import pytest

from kvstore.core.block import Namespace
from kvstore.core.reads import AcquireGroup
from kvstore.engine.recorder import Recorder
from kvstore.protocol.errors import NotFound, QuotaExceeded
from kvstore.v1.admin_pb2 import RecordRequest

CHAIN = Namespace(b"c" * 32, "tenant", 4096, 4096, 16, chain=True)
SET = Namespace(b"s" * 32, "tenant", 4096, 4096, 16, chain=False)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recorder(clock: Clock) -> Recorder:
    return Recorder(clock, ring_bytes=8 << 20)


def group(blocks: int, fill: int = 1, **changes: object) -> AcquireGroup:
    return AcquireGroup(CHAIN, bytes([fill]) * 32 * blocks)._replace(**changes)


def begin(recorder: Recorder) -> int:
    return recorder.take(RecordRequest()).recording


def test_it_notes_only_while_somebody_asks(recorder: Recorder, clock: Clock) -> None:
    assert not recorder.armed
    recorder.note([group(1)])
    number = begin(recorder)
    assert recorder.armed
    clock.now_s += 0.5
    recorder.note([group(2), group(3)])
    clock.now_s += 4
    reply = recorder.take(RecordRequest(recording=number))
    assert [(r.time_us, r.namespace, r.block_tokens, len(r.keys)) for r in reply.requests] == [
        (500_000, CHAIN.digest, 16, 64),
        (500_000, CHAIN.digest, 16, 96),
    ]
    clock.now_s += 5.1
    recorder.expire()
    assert not recorder.armed
    with pytest.raises(NotFound, match="has ended"):
        recorder.take(RecordRequest(recording=number))


def test_what_is_not_acknowledged_comes_again(recorder: Recorder) -> None:
    number = begin(recorder)
    for fill in (1, 2, 3):
        recorder.note([group(1, fill)])
    for after, fills in ((0, [1, 2, 3]), (0, [1, 2, 3]), (2, [3]), (3, []), (3, [])):
        reply = recorder.take(RecordRequest(recording=number, after=after))
        assert [request.keys[0] for request in reply.requests] == fills
    recorder.note([group(1, 4)])
    assert recorder.take(RecordRequest(recording=number, after=3)).requests[0].keys[0] == 4


def test_a_reply_is_bounded_and_says_what_waits(recorder: Recorder) -> None:
    number = begin(recorder)
    for _ in range(5):
        recorder.note([group(12_000)])
    got, counts = 0, []
    while not counts or counts[-1][1]:
        reply = recorder.take(RecordRequest(recording=number, after=got))
        got += len(reply.requests)
        counts.append((len(reply.requests), reply.waiting))
        assert reply.ByteSize() < 4 << 20
    assert counts == [(2, 3), (2, 1), (1, 0)]


def test_a_request_as_long_as_a_call_can_be_fits_a_reply_or_is_dropped(recorder: Recorder) -> None:
    number = begin(recorder)
    recorder.note([group(1), group(131_000), group(131_072)])
    first = recorder.take(RecordRequest(recording=number))
    second = recorder.take(RecordRequest(recording=number, after=1))
    assert [len(first.requests), len(second.requests[0].keys) // 32, second.dropped] == [1, 131_000, 1]
    assert second.ByteSize() < 4 << 20


def test_what_a_slow_recorder_does_not_fetch_is_dropped_and_counted(recorder: Recorder) -> None:
    number = begin(recorder)
    for _ in range(100):
        recorder.note([group(8192)])
    reply = recorder.take(RecordRequest(recording=number))
    held = len(reply.requests) + reply.waiting
    assert held == (8 << 20) // (8192 * 32 + 512)
    assert held + reply.dropped == 100
    recorder.note([group(8192)])
    assert recorder.take(RecordRequest(recording=number, after=held)).dropped == 101 - held
    recorder.note([group(1)])
    assert len(recorder.take(RecordRequest(recording=number, after=held)).requests) == 1


def test_sets_and_last_blocks_are_left_out_and_counted(recorder: Recorder) -> None:
    number = begin(recorder)
    recorder.note([group(4), group(4, last=True), group(4, namespace=SET)])
    reply = recorder.take(RecordRequest(recording=number))
    assert (len(reply.requests), reply.left_out, reply.dropped) == (1, 2, 0)


def test_one_recording_at_a_time(recorder: Recorder, clock: Clock) -> None:
    first = begin(recorder)
    with pytest.raises(QuotaExceeded, match="one recording at a time"):
        begin(recorder)
    with pytest.raises(NotFound):
        recorder.take(RecordRequest(recording=first ^ 1))
    recorder.note([group(1)])
    last = recorder.take(RecordRequest(recording=first, stop=True))
    assert len(last.requests) == 1
    assert not recorder.armed
    second = begin(recorder)
    assert second != first
    assert not recorder.take(RecordRequest(recording=second)).requests
    clock.now_s += 6  # the second one has died, and nobody has told the recorder the time since
    assert begin(recorder) not in (first, second)
