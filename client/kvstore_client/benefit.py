"""What a worker tells the daemon of itself, so that nothing is promised that is slower than recomputing."""

from __future__ import annotations

import math
import time
from typing import TypeAlias

from kvstore.protocol.errors import InvalidRequest
from kvstore.v1 import kvstore_pb2 as pb

Recompute: TypeAlias = float | tuple[float, float]
"""Seconds to compute a token; or (a, b), where token t, counted from the root, takes a + b * t seconds."""

_FRESH_S = 5.0  # a rate that keeps the worker from copying is not measured again: so long, and it is forgotten
_DECAY = 0.8
_CLIP = 3.0  # one stall counts as three copies of its size


class CopyRate:
    """How fast this process has lately copied out of warm. Threads may race: a lost sample does no harm."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state = (0.0, 0.0, 0.0)  # bytes and seconds, older ones fading; when

    def note(self, nbytes: int, seconds: float) -> None:
        """A copy has been made."""
        before_bytes, before_s, _ = self._state
        if before_bytes:
            seconds = min(seconds, _CLIP * nbytes * before_s / before_bytes)
        self._state = (_DECAY * before_bytes + nbytes, _DECAY * before_s + seconds, time.monotonic())

    @property
    def bytes_per_s(self) -> float:
        """The estimate; 0 where there is none, or none that is fresh."""
        nbytes, seconds, at_s = self._state
        return nbytes / seconds if seconds > 0 and time.monotonic() - at_s < _FRESH_S else 0.0


def checked(recompute: object) -> tuple[float, float]:
    """Both numbers of a Recompute; (0, 0): not known.

    Raises:
        InvalidRequest: it is none.
    """
    pair = recompute if isinstance(recompute, tuple) else (recompute, 0.0)
    if len(pair) != 2 or not all(_is_cost(each) for each in pair):
        raise InvalidRequest(
            f"recompute_s_per_token is {recompute!r}; it must be the seconds to compute a token, 0 or more, or two "
            "such numbers (a, b), where token t takes a + b * t seconds"
        )
    return float(pair[0]), float(pair[1])


def _is_cost(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def worker_costs(recompute: tuple[float, float], copies: CopyRate) -> pb.WorkerCosts | None:
    """As it travels; None where the daemon is to promise all it has."""
    if recompute == (0.0, 0.0):
        return None
    return pb.WorkerCosts(
        recompute_ns_per_token=recompute[0] * 1e9,
        recompute_ns_per_token2=recompute[1] * 1e9,
        copy_bytes_per_s=copies.bytes_per_s,
    )
