from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from kvstore.agents import messages
from kvstore.agents.memory import MappedSlabs
from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.frames import MAX_PAYLOAD_BYTES
from kvstore.tiers.base import (
    BlockRef,
    CheckPage,
    CompactResult,
    Outcome,
    SlabRange,
    StoredRecord,
    TierItem,
    WriteResult,
)
from kvstore.v1 import agent_pb2

NBYTES = 1 << 16


@pytest.fixture
def memory() -> Iterator[MappedSlabs]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, NBYTES)
    slabs = MappedSlabs()
    slabs.map(1, fd, NBYTES)
    os.close(fd)
    yield slabs
    slabs.close()


def item_message() -> agent_pb2.AgentItem:
    return agent_pb2.AgentItem(
        namespace=b"n" * 32,
        key=b"k" * 32,
        range=agent_pb2.SlabRange(slab_id=1, offset=4096, nbytes=100),
        checksum=b"c" * 16,
        parent=b"p" * 32,
        epoch=1 << 63,
        layout="bfloat16",
        lossy="int8kv",
        hits=5,
    )


def payload(*items: agent_pb2.AgentItem) -> bytes:
    return agent_pb2.AgentItems(items=items).SerializeToString()


def test_an_item_arrives_as_it_was_sent(memory: MappedSlabs) -> None:
    ref, place = BlockRef(b"n" * 32, b"k" * 32), SlabRange(1, 4096, 100)
    assert messages.decode_items(payload(item_message()), memory) == [
        TierItem(ref, place, b"c" * 16, b"p" * 32, 1 << 63, "bfloat16", "int8kv", 5)
    ]


def spoilt(change: Callable[[agent_pb2.AgentItem], object]) -> bytes:
    message = item_message()
    change(message)
    return payload(item_message(), message)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: setattr(m, "namespace", b""), "namespace of 0 bytes; it has 32"),
        (lambda m: setattr(m, "key", b"k" * 33), "key of 33 bytes; it has 32"),
        (lambda m: setattr(m, "checksum", b"c"), "checksum of 1 bytes; it has 16"),
        (lambda m: setattr(m, "parent", b"p" * 31), "parent of 31 bytes; it has 32"),
        (lambda m: setattr(m.range, "offset", NBYTES - 99), "slab 1: "),
        (lambda m: setattr(m.range, "offset", (1 << 64) - 1), "slab 1: "),
        (lambda m: setattr(m.range, "nbytes", 0), "slab 1: "),
    ],
)
def test_one_bad_item_refuses_the_call(
    memory: MappedSlabs, change: Callable[[agent_pb2.AgentItem], object], why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why):
        messages.decode_items(spoilt(change), memory)


def test_an_unknown_slab_is_left_to_the_tier(memory: MappedSlabs) -> None:
    items = messages.decode_items(spoilt(lambda m: setattr(m.range, "slab_id", 2)), memory)
    assert [item.range.slab_id for item in items] == [1, 2]


def test_a_root_has_no_parent(memory: MappedSlabs) -> None:
    (item,) = messages.decode_items(spoilt(lambda m: m.ClearField("parent")), memory)[1:]
    assert item.parent == b""


@pytest.mark.parametrize("garbage", [b"\xff", b"\x0a\x7fabc", b"\x0a\x02\x0a\x7f"])
def test_garbage_is_an_invalid_request(memory: MappedSlabs, garbage: bytes) -> None:
    with pytest.raises(InvalidRequest, match="payload is no AgentItems"):
        messages.decode_items(garbage, memory)
    with pytest.raises(InvalidRequest):
        messages.decode_refs(garbage)


def test_refs_need_names_of_32_bytes() -> None:
    assert messages.decode_refs(payload(item_message())) == [BlockRef(b"n" * 32, b"k" * 32)]
    with pytest.raises(InvalidRequest, match="key of 0 bytes"):
        messages.decode_refs(payload(agent_pb2.AgentItem(namespace=b"n" * 32)))


@pytest.mark.parametrize(
    ("asked", "given"), [(0, messages.SCAN_RECORDS_MAX), (7, 7), ((1 << 64) - 1, messages.SCAN_RECORDS_MAX)]
)
def test_a_page_is_bounded(asked: int, given: int) -> None:
    request = agent_pb2.AgentScanRequest(limit=asked)
    assert messages.decode_scan(request.SerializeToString()) == (None, given)


def test_a_scan_goes_on_behind_a_block() -> None:
    request = agent_pb2.AgentScanRequest(after=b"n" * 32 + b"k" * 32, limit=1)
    assert messages.decode_scan(request.SerializeToString()) == (BlockRef(b"n" * 32, b"k" * 32), 1)
    with pytest.raises(InvalidRequest, match="after of 3 bytes"):
        messages.decode_scan(agent_pb2.AgentScanRequest(after=b"abc").SerializeToString())


def test_replies_say_what_the_tier_said() -> None:
    written = [WriteResult(Outcome.OK, 5, 2, True, b"l" * 16), WriteResult(Outcome.FULL)]
    reply = agent_pb2.AgentOutcomes.FromString(messages.encode_written(written))
    answers = [WriteResult(Outcome(r.outcome), r.stored_bytes, r.codec, r.lossy, r.checksum) for r in reply.outcomes]
    assert answers == written
    reply = agent_pb2.AgentOutcomes.FromString(messages.encode_outcomes(list(Outcome), 7, more=True))
    assert [r.outcome for r in reply.outcomes] == list(Outcome)
    assert (reply.first, reply.more) == (7, True)


def test_a_check_goes_on_behind_a_block_and_is_bounded() -> None:
    request = agent_pb2.AgentCheckRequest(after=b"n" * 32 + b"k" * 32, limit=(1 << 64) - 1, repair=True)
    ref = BlockRef(b"n" * 32, b"k" * 32)
    assert messages.decode_check(request.SerializeToString()) == (ref, messages.CHECK_BLOCKS_MAX, True)
    assert messages.decode_check(b"") == (None, messages.CHECK_BLOCKS_MAX, False)
    with pytest.raises(InvalidRequest, match="after of 1 bytes"):
        messages.decode_check(agent_pb2.AgentCheckRequest(after=b"x").SerializeToString())
    page = agent_pb2.AgentCheckResponse.FromString(messages.encode_checked(CheckPage(ref, 4, 3, 2, 1)))
    assert (page.last, page.checked, page.corrupt, page.missing, page.repaired) == (b"".join(ref), 4, 3, 2, 1)
    assert agent_pb2.AgentCheckResponse.FromString(messages.encode_checked(CheckPage(None, 0))).last == b""
    result = agent_pb2.AgentCompactResponse.FromString(messages.encode_compacted(CompactResult(9, 4)))
    assert (result.before_bytes, result.after_bytes) == (9, 4)


def test_the_longest_page_fits_a_frame() -> None:
    record = StoredRecord(BlockRef(b"n" * 32, b"k" * 32), b"p" * 32, b"c" * 16, *[(1 << 64) - 1] * 6, True)
    page = messages.encode_records([record] * messages.SCAN_RECORDS_MAX)
    assert len(page) < MAX_PAYLOAD_BYTES / 4
    (first, *_) = agent_pb2.AgentScanResponse.FromString(page).records
    assert (first.namespace, first.key, first.parent, first.checksum) == (*record.ref, record.parent, record.checksum)
    assert first.nbytes == first.stored_bytes == first.epoch == (1 << 64) - 1
    assert first.codec == first.hits == first.stored_s == (1 << 64) - 1
    assert first.lossy
