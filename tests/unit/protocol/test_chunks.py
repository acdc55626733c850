"""Messages with block bytes are protobuf, whoever wrote them and in whichever order."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvstore.protocol.chunks import FETCH_DATA_FIELD, STORE_DATA_FIELD, join, split
from kvstore.protocol.errors import InvalidRequest
from kvstore.v1 import kvstore_pb2 as pb

CHUNKS = st.builds(
    pb.FetchChunk,
    block=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**64 - 1),
    checksum=st.binary(max_size=16),
    lost=st.integers(0, 2**64 - 1),
    data=st.binary(max_size=300),
)


@given(CHUNKS)
def test_protobuf_reads_what_is_joined(chunk: pb.FetchChunk) -> None:
    head = pb.FetchChunk()
    head.CopyFrom(chunk)
    head.ClearField("data")
    joined = join(head.SerializeToString(), FETCH_DATA_FIELD, memoryview(chunk.data))
    assert pb.FetchChunk.FromString(joined) == chunk


@given(CHUNKS)
def test_what_protobuf_writes_is_split(chunk: pb.FetchChunk) -> None:
    rest, data = split(chunk.SerializeToString(), FETCH_DATA_FIELD)
    head = pb.FetchChunk.FromString(rest)
    assert data == chunk.data
    assert not head.data
    head.data = bytes(data)
    assert head == chunk


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2 << 20])
def test_sizes_at_the_edges_of_a_number(size: int) -> None:
    data = bytes(size)
    message = join(b"", STORE_DATA_FIELD, memoryview(data))
    assert len(pb.StoreChunk.FromString(message).data) == size
    assert len(split(message, STORE_DATA_FIELD)[1]) == size


def test_the_data_may_come_first_or_twice() -> None:
    head = pb.FetchChunk(block=7).SerializeToString()
    first, second = (join(b"", FETCH_DATA_FIELD, memoryview(each)) for each in (b"one", b"two"))
    rest, data = split(first + head + second, FETCH_DATA_FIELD)
    assert (pb.FetchChunk.FromString(rest).block, bytes(data)) == (7, b"two"), "the last one counts, as in protobuf"


def test_the_data_is_not_copied() -> None:
    message = join(b"", STORE_DATA_FIELD, memoryview(b"x" * 100))
    assert split(message, STORE_DATA_FIELD)[1].obj is message


def test_fields_that_are_not_known_stay_in_the_rest() -> None:
    fixed = b"\x79" + bytes(8) + b"\x7d" + bytes(4)  # field 15 as fixed64 and fixed32
    assert split(fixed + join(b"", FETCH_DATA_FIELD, memoryview(b"x")), FETCH_DATA_FIELD) == (fixed, b"x")


@pytest.mark.parametrize(
    "message",
    [b"\x2a\x05abc", b"\x2a", b"\x80" * 11, b"\x0b", b"\x79\x00", b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"],
    ids=["cut", "no size", "endless number", "group", "half a fixed64", "huge size"],
)
def test_bytes_that_are_no_message_are_refused(message: bytes) -> None:
    with pytest.raises(InvalidRequest, match="no protobuf message"):
        split(message, FETCH_DATA_FIELD)


@given(st.binary(max_size=200))
def test_any_bytes_are_split_or_refused(message: bytes) -> None:
    try:
        rest, data = split(message, FETCH_DATA_FIELD)
    except InvalidRequest:
        return
    assert len(rest) + len(data) <= len(message)
    try:
        whole = pb.FetchChunk.FromString(message)
    except DecodeError:
        return
    assert whole.data == data
