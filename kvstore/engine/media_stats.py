"""What the media count themselves, asked for now and then so that nobody who looks has to wait for an agent."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from kvstore.engine.spokes import AgentedTier
from kvstore.protocol.errors import KVStoreError

_INTERVAL_S = 2.0

_log = logging.getLogger(__name__)


class MediaStats:
    """The last answer of every medium. Call sequence: start, latest, close."""

    def __init__(
        self, media: Callable[[], Mapping[int, AgentedTier]], heard: Callable[[int, Mapping[str, int]], None]
    ) -> None:
        """`media` gives the spokes by tier; `heard` is told of each answer."""
        self._media = media
        self._heard = heard
        self._latest: dict[int, Mapping[str, int]] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="media-stats", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def latest(self, tier: int) -> Mapping[str, int]:
        """What the medium said last; empty where it has said nothing yet."""
        return self._latest.get(tier, {})

    def close(self) -> None:
        """Ask no more. Does not wait: a call under way ends with its agent."""
        self._closing.set()

    def _run(self) -> None:
        while True:
            for tier, medium in self._media().items():
                if medium.state == "ok":
                    self._ask(tier, medium)
            if self._closing.wait(_INTERVAL_S):
                return

    def _ask(self, tier: int, medium: AgentedTier) -> None:
        try:
            self._latest[tier] = medium.stats()
            self._heard(tier, self._latest[tier])
        except KVStoreError as error:  # its agent has gone meanwhile
            _log.debug("%s: no statistics: %s", medium.name, error)
        except Exception:  # noqa: BLE001 - a defect of ours, said in full; the next answer may be better
            _log.exception("statistics of a medium failed")
