"""How a namespace is to be treated, as Client.namespace() is told."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from kvstore.protocol.errors import InvalidRequest
from kvstore.v1 import types_pb2

Priority: TypeAlias = Literal["low", "normal", "high"]

_PRIORITIES: dict[str, types_pb2.Priority.ValueType] = {
    "low": types_pb2.PRIORITY_LOW,
    "normal": types_pb2.PRIORITY_NORMAL,
    "high": types_pb2.PRIORITY_HIGH,
}
_TTL_MAX_S = 10 * 366 * 86_400.0


def checked_terms(priority: str | None, ttl_s: float | None) -> types_pb2.NamespaceTerms | None:
    """The message; None where nothing was said.

    Raises:
        InvalidRequest: a value that cannot be.
    """
    if priority is None and ttl_s is None:
        return None
    terms = types_pb2.NamespaceTerms()
    if priority is not None:
        if priority not in _PRIORITIES:
            raise InvalidRequest(f"priority is {priority!r}; it must be one of {', '.join(_PRIORITIES)}")
        terms.priority = _PRIORITIES[priority]
    if ttl_s is not None:
        if not (isinstance(ttl_s, int | float) and math.isfinite(ttl_s) and 0 <= ttl_s <= _TTL_MAX_S):
            raise InvalidRequest(f"ttl_s is {ttl_s!r}; it must be seconds, from 0 (no end) to {_TTL_MAX_S:.0f}")
        terms.ttl_ms = math.ceil(ttl_s * 1000)
    return terms
