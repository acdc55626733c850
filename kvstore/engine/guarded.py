"""A net below the loops that must not end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_PAUSE_S = 0.1  # so that a defect that stays does not take a core

_log = logging.getLogger(__name__)


def guarded(step: Callable[[], None]) -> bool:
    """Run one step of such a loop; whether it went well. What it raises is logged in full, and followed by a pause."""
    try:
        step()
    except Exception:  # noqa: BLE001 - a defect of ours; the next step may do better, and without it nothing would
        _log.exception("a step of %s failed", getattr(step, "__qualname__", step))
        time.sleep(_PAUSE_S)
        return False
    return True
