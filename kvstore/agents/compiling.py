"""Compiled codecs once they are worth it: compiling takes seconds, which a restart and a short life can do without."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import threading
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.agents.loads import Loads
from kvstore.tiers.base import TierItem

if TYPE_CHECKING:  # a hot agent has no use for codecs
    from kvstore.codec.frame import Encoded

# Raw bytes coded before compiling begins: about as long as it takes, on one core.
WORTH_BYTES = 256 << 20
_NICENESS = 19
# Compiling takes 4 s of a core, and after a restart the first reads are what a worker waits for. Then it begins anyway.
_PATIENCE_S = 10.0

_log = logging.getLogger(__name__)


def give_back_heap() -> None:
    """Return what compiling has left of the heap to the kernel; nothing where the C library cannot."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Compilable(Protocol):
    """A format that has a compiled path."""

    def encode(self, item: TierItem, raw: NDArray[np.uint8]) -> Encoded:
        """The block as it is to be stored."""

    def decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> None:
        """The block as it was."""

    def compile(self) -> bool:
        """Take the compiled path from now on; False where there is none."""

    def describe(self) -> str:
        """Which path it takes, for people."""


class CompilingFormat:
    """A BlockFormat that has the one it wraps compiled, in the background, once it has done some work."""

    def __init__(self, inner: Compilable, loads: Loads, worth_bytes: int = WORTH_BYTES) -> None:
        """Wrap `inner`; `worth_bytes`: after so many raw bytes, and once `loads` are through."""
        self._inner = inner
        self._loads = loads
        self._left_bytes = worth_bytes
        self._lock = threading.Lock()
        self._started = False

    def encode(self, item: TierItem, raw: NDArray[np.uint8]) -> Encoded:
        """As the wrapped one."""
        self._count(raw.nbytes)
        return self._inner.encode(item, raw)

    def decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> None:
        """As the wrapped one."""
        self._count(out.nbytes)
        self._inner.decode(frame, item, out)

    def _count(self, nbytes: int) -> None:
        if self._started:
            return
        with self._lock:
            self._left_bytes -= nbytes
            if self._left_bytes > 0 or self._started:
                return
            self._started = True
        try:
            threading.Thread(target=self._compile, name="agent-compiler", daemon=True).start()
        except RuntimeError as error:  # no thread to be had: slower, and nothing worse
            _log.warning("codecs are not compiled: %s", error)

    def _compile(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        self._loads.await_none(_PATIENCE_S)
        try:
            if self._inner.compile():
                give_back_heap()
                _log.info("codec %s", self._inner.describe())
        except Exception:  # noqa: BLE001 - a defect of a library that only makes things faster must not end the agent
            _log.exception("codecs could not be compiled")
