"""Outcomes from their wire form."""

from __future__ import annotations

import pytest

from kvstore.v1 import types_pb2
from kvstore_client import EXISTS, REJECTED, STORED, InternalError, RejectReason
from kvstore_client.outcomes import decode


def test_decode() -> None:
    assert decode(bytes([1, 2, 3, 3, 3]), bytes([0, 0, 1, 8, 99])) == [
        STORED,
        EXISTS,
        REJECTED(RejectReason.NO_ROOM),
        REJECTED(RejectReason.DRAINING),
        REJECTED(RejectReason.UNKNOWN),
    ]
    assert decode(b"", b"") == []


def test_unknown_status_is_a_defect() -> None:
    with pytest.raises(InternalError, match="status 7"):
        decode(b"\x07", b"\x00")


def test_is_stored_and_repr() -> None:
    assert STORED.is_stored
    assert EXISTS.is_stored
    assert not REJECTED(RejectReason.QUOTA).is_stored
    assert [repr(outcome) for outcome in (STORED, EXISTS, REJECTED(RejectReason.QUOTA))] == [
        "STORED",
        "EXISTS",
        "REJECTED(QUOTA)",
    ]


def test_reasons_are_those_of_the_wire() -> None:
    wire = {name.removeprefix("REJECT_REASON_"): number for name, number in types_pb2.RejectReason.items()}
    assert {"UNSPECIFIED" if reason.name == "UNKNOWN" else reason.name: int(reason) for reason in RejectReason} == wire
