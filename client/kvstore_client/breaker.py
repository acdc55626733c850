"""Stops asking a daemon that does not answer, and tries in the background until it does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from kvstore.protocol.errors import KVStoreError

FAILURES_TO_OPEN = 3
FIRST_PROBE_S = 0.1
MAX_PROBE_S = 2.0

_log = logging.getLogger(__name__)


class Breaker:
    """Opens after consecutive failures; a thread that lives only while it is open probes and closes it.

    Attributes:
        is_open: whether calls should answer a miss at once, without asking.
    """

    def __init__(self, probe: Callable[[], None]) -> None:
        """Start closed.

        Args:
            probe: asks the daemon something cheap, in bounded time; raises KVStoreError if it does not answer.
        """
        self.is_open = False
        self._probe = probe
        self._lock = threading.Lock()
        self._failures = 0
        self._stopped = threading.Event()

    def succeeded(self) -> None:
        """A call was answered."""
        self._failures = 0

    def failed(self, error: KVStoreError) -> None:
        """A call was not answered."""
        with self._lock:
            self._failures += 1
            if self.is_open or self._failures < FAILURES_TO_OPEN or self._stopped.is_set():
                return
            self.is_open = True
        _log.warning("kvstored does not answer (%s); calls are misses until it does", error)
        try:
            threading.Thread(target=self._run, name="kvstore-client-probe", daemon=True).start()
        except RuntimeError:  # no thread to be had: nobody would close it
            self.is_open = False

    def stop(self) -> None:
        """End the probing thread."""
        self._stopped.set()

    def _run(self) -> None:
        pause_s = FIRST_PROBE_S
        while not self._stopped.wait(pause_s):
            pause_s = min(2 * pause_s, MAX_PROBE_S)
            try:
                self._probe()
            except KVStoreError as error:
                _log.debug("kvstored still does not answer: %s", error)
                continue
            self._failures = 0
            self.is_open = False
            _log.info("kvstored answers again")
            return
