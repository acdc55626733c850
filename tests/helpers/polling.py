"""Bounded waiting: for what another process does, a test looks until it sees it, and fails if it never does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 45.0
_PAUSE_S = 0.01


def eventually(condition: Callable[[], T], what: str, timeout_s: float = PATIENCE_S) -> T:
    """The first result of `condition` that is true; fails with `what` if there is none in time."""
    deadline_s = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for: {what}"
        time.sleep(_PAUSE_S)
    return result
