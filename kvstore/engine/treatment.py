"""Terms of a namespace: between what callers say, what the catalogue keeps, and what the core carries out."""

from __future__ import annotations

from kvstore.core.block import COLD, HIGH, LOW, NORMAL, WARM
from kvstore.core.terms import Terms
from kvstore.protocol.errors import InvalidRequest
from kvstore.v1 import types_pb2

_LEVELS: dict[int, int] = {
    types_pb2.PRIORITY_UNSPECIFIED: NORMAL,
    types_pb2.PRIORITY_LOW: LOW,
    types_pb2.PRIORITY_NORMAL: NORMAL,
    types_pb2.PRIORITY_HIGH: HIGH,
}
_TTL_MAX_MS = 10 * 366 * 86_400_000  # far inside what a float of seconds tells apart


def merged(
    before: types_pb2.NamespaceTerms, said: types_pb2.NamespaceTerms, slot_bytes: int
) -> types_pb2.NamespaceTerms:
    """What holds once a caller has said something: what was not said stays.

    Raises:
        InvalidRequest: a value that cannot be; `slot_bytes` is what a block takes in warm.
    """
    if said.priority not in _LEVELS:
        raise InvalidRequest(f"priority is {said.priority}; it must be 1 (low), 2 (normal) or 3 (high)")
    if said.ttl_ms > _TTL_MAX_MS:
        raise InvalidRequest(f"ttl_ms is {said.ttl_ms}; it must be at most {_TTL_MAX_MS} (ten years), or 0 for no end")
    for name in ("warm_bytes", "cold_bytes"):
        limit = getattr(said, name)
        if 0 < limit < slot_bytes:
            raise InvalidRequest(f"{name} is {limit}; one block takes {slot_bytes} bytes, and 0 is no limit")
    result = types_pb2.NamespaceTerms()
    result.CopyFrom(before)
    result.MergeFrom(said)
    return result


def core_terms(terms: types_pb2.NamespaceTerms) -> Terms:
    """For the core."""
    limits = {WARM: terms.warm_bytes, COLD: terms.cold_bytes}
    return Terms(_LEVELS.get(terms.priority, NORMAL), terms.ttl_ms / 1000, limits)
