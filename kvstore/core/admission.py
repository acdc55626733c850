"""What may be written to the SSD: everything, or only what was used a second time, and within a budget of bytes.

Most blocks are never asked for again, and writing them all wears the drive (a peer wrote 1.24 TiB an hour at a hit
ratio of 1.2 %). But refusing what is new costs hits where second uses come late: up to 10 points on a public trace. So
evidence decides, with older evidence counting less:

    for writing all       hits on copies that were saved after one use, and uses of blocks that were refused and left
    against it            uses of blocks that had been used again and had to leave the SSD for room

Everything is written as long as the first is the larger, and at least one in fifty of the blocks that were judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.core.block import Block, Namespace
from kvstore.core.ghosts import Ghosts
from kvstore.core.shadows import name_of

YIELD_MIN = 0.02  # hits for each block that is written or refused after one use
EVIDENCE_MIN = 64.0  # judged blocks before anything is refused
_HALF_LIFE_S = 2.0  # of evidence, in capacities of the tier
_SAMPLE = 32  # keys whose first byte is below it: an eighth
_GHOSTS = 4  # in capacities of the tier, of each kind
_DAY_S = 86_400.0
_BURST_S = 3_600.0  # of the budget that may be written at once
_RESERVE = 0.5  # of the burst: below it only what was used again is written


@dataclass(slots=True)
class AdmissionCounts:
    """Blocks that were not saved, and why; of those that were judged."""

    refused_first_use: int = 0
    refused_budget: int = 0


class Admission:
    """Judges blocks that are about to be saved."""

    def __init__(self, bytes_per_day: int = 0) -> None:
        """`bytes_per_day`: 0 is no limit."""
        self.counts = AdmissionCounts()
        self._rate = bytes_per_day / _DAY_S
        self._burst = self._rate * _BURST_S
        self._tokens = self._burst
        self._filled_s: float | None = None
        self._refused = Ghosts()
        self._evicted = Ghosts()
        self._for = self._against = self._judged = 0.0
        self._capacity = 1.0

    @property
    def writes_all(self) -> bool:
        """Whether blocks are saved that were used once only."""
        if self._judged < EVIDENCE_MIN:
            return True
        return self._for >= self._against and self._for >= YIELD_MIN * self._judged

    def admits(self, block: Block, nbytes: int, now_s: float) -> bool:
        """Whether to save the block now, which takes `nbytes` of the budget (see `settle`)."""
        self._refill(now_s)
        if self._rate and self._tokens < nbytes:
            self.counts.refused_budget += 1
            return False
        if not block.reused:
            self._judged += 1.0
            if not self.writes_all or (self._rate and self._tokens < _RESERVE * self._burst):
                self.counts.refused_first_use += 1
                return False
        self._tokens -= nbytes
        return True

    def settle(self, nbytes: int, stored_bytes: int) -> None:
        """A block was written in fewer bytes than were taken for it, or not at all."""
        self._tokens += nbytes - stored_bytes

    def hit(self, block: Block) -> None:
        """A copy on the SSD was read that had been saved after one use."""
        self._for += 1.0

    def left(self, block: Block) -> None:
        """A block that was refused has left the last tier that had it."""
        if _sampled(block.key):
            self._refused.add(name_of(block.key, block.namespace.salt))

    def evicted(self, block: Block, held: int) -> None:
        """A copy had to leave the SSD for room, where `held` blocks are."""
        if held > 1.5 * self._capacity or held < self._capacity / 2:
            self._capacity = float(max(1, held))
            span = max(1, _GHOSTS * held * _SAMPLE // 256)
            self._refused.resize(span)
            self._evicted.resize(span)
        if block.reused and _sampled(block.key):
            self._evicted.add(name_of(block.key, block.namespace.salt))

    def missed(self, namespace: Namespace, keys: Sequence[bytes]) -> None:
        """New blocks are about to be stored that nobody had."""
        fade = 0.5 ** (len(keys) / (_HALF_LIFE_S * max(self._capacity, EVIDENCE_MIN)))
        self._for, self._against, self._judged = self._for * fade, self._against * fade, self._judged * fade
        for key in keys:
            if _sampled(key):
                name = name_of(key, namespace.salt)
                self._for += self._refused.take(name) * 256 / _SAMPLE
                self._against += self._evicted.take(name) * 256 / _SAMPLE

    def _refill(self, now_s: float) -> None:
        if self._filled_s is not None:
            self._tokens = min(self._burst, self._tokens + self._rate * (now_s - self._filled_s))
        self._filled_s = now_s


def _sampled(key: bytes) -> bool:
    return key[0] < _SAMPLE
