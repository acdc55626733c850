"""The agent's half of the wire: requests into tier values, results into replies, everything checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from kvstore.agents.memory import MappedSlabs
from kvstore.protocol.errors import InvalidRequest
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

NAME_BYTES = 32  # of a namespace digest and of a key
CHECKSUM_BYTES = 16
REF_BYTES = 2 * NAME_BYTES
SCAN_RECORDS_MAX = 4000  # a page of them is 0.8 MiB, well below the limit of a frame
CHECK_BLOCKS_MAX = 1024  # in one call, which nobody can interrupt

MessageT = TypeVar("MessageT", bound=Message)


def parse(kind: type[MessageT], payload: bytes) -> MessageT:
    """The message in `payload`.

    Raises:
        InvalidRequest: it is no such message.
    """
    message = kind()
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise InvalidRequest(f"payload is no {kind.DESCRIPTOR.name}: {error}") from error
    return message


def decode_items(payload: bytes, memory: MappedSlabs) -> list[TierItem]:
    """The blocks of a WRITE or READ, every range checked against its slab.

    Raises:
        InvalidRequest: a name, checksum or range is not what it should be; nothing was touched.
    """
    items = []
    for message in parse(agent_pb2.AgentItems, payload).items:
        _need_bytes("checksum", message.checksum, CHECKSUM_BYTES)
        if message.parent:
            _need_bytes("parent", message.parent, NAME_BYTES)
        place = SlabRange(message.range.slab_id, message.range.offset, message.range.nbytes)
        memory.check(place)
        items.append(
            TierItem(
                _ref(message),
                place,
                message.checksum,
                message.parent,
                message.epoch,
                message.layout,
                message.lossy,
                message.hits,
            ),
        )
    return items


def decode_refs(payload: bytes) -> list[BlockRef]:
    """The blocks of a DELETE.

    Raises:
        InvalidRequest: a name has the wrong length.
    """
    return [_ref(message) for message in parse(agent_pb2.AgentItems, payload).items]


def decode_scan(payload: bytes) -> tuple[BlockRef | None, int]:
    """Behind which block a SCAN goes on (None: from the start), and how many records it may answer.

    Raises:
        InvalidRequest: the position is no namespace and key.
    """
    request = parse(agent_pb2.AgentScanRequest, payload)
    return _position(request.after), min(request.limit or SCAN_RECORDS_MAX, SCAN_RECORDS_MAX)


def decode_check(payload: bytes) -> tuple[BlockRef | None, int, bool]:
    """Behind which block a CHECK goes on (None: from the start), how many it looks at, and whether it drops bad ones.

    Raises:
        InvalidRequest: the position is no namespace and key.
    """
    request = parse(agent_pb2.AgentCheckRequest, payload)
    return _position(request.after), min(request.limit or CHECK_BLOCKS_MAX, CHECK_BLOCKS_MAX), request.repair


def encode_written(results: Sequence[WriteResult]) -> bytes:
    """The reply to a WRITE."""
    reply = agent_pb2.AgentOutcomes()
    for result in results:
        reply.outcomes.add(
            outcome=result.outcome,
            stored_bytes=result.stored_bytes,
            codec=result.codec,
            lossy=result.lossy,
            checksum=result.checksum,
        )
    return reply.SerializeToString()


def encode_outcomes(outcomes: Sequence[Outcome], first: int = 0, *, more: bool = False) -> bytes:
    """Reply to a READ: what became of its items from `first` on; `more`: other frames answer the rest."""
    reply = agent_pb2.AgentOutcomes(first=first, more=more)
    for outcome in outcomes:
        reply.outcomes.add(outcome=outcome)
    return reply.SerializeToString()


def encode_records(records: Iterable[StoredRecord]) -> bytes:
    """The reply to a SCAN."""
    reply = agent_pb2.AgentScanResponse()
    for record in records:
        reply.records.add(
            namespace=record.ref.namespace,
            key=record.ref.key,
            parent=record.parent,
            checksum=record.checksum,
            nbytes=record.nbytes,
            stored_bytes=record.stored_bytes,
            epoch=record.epoch,
            codec=record.codec,
            hits=record.hits,
            stored_s=record.stored_s,
            lossy=record.lossy,
        )
    return reply.SerializeToString()


def encode_checked(page: CheckPage) -> bytes:
    """The reply to a CHECK."""
    return agent_pb2.AgentCheckResponse(
        last=b"" if page.last is None else page.last.namespace + page.last.key,
        checked=page.checked,
        corrupt=page.corrupt,
        missing=page.missing,
        repaired=page.repaired,
    ).SerializeToString()


def encode_compacted(result: CompactResult) -> bytes:
    """The reply to a COMPACT."""
    return agent_pb2.AgentCompactResponse(
        before_bytes=result.before_bytes, after_bytes=result.after_bytes
    ).SerializeToString()


def _position(after: bytes) -> BlockRef | None:
    if not after:
        return None
    _need_bytes("after", after, REF_BYTES)
    return BlockRef(after[:NAME_BYTES], after[NAME_BYTES:])


def _ref(message: agent_pb2.AgentItem) -> BlockRef:
    _need_bytes("namespace", message.namespace, NAME_BYTES)
    _need_bytes("key", message.key, NAME_BYTES)
    return BlockRef(message.namespace, message.key)


def _need_bytes(what: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise InvalidRequest(f"{what} of {len(value)} bytes; it has {size}")
