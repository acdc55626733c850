"""What may be written to the SSD of what its order admits: what yields enough for the wear, within a budget of bytes.

Most blocks are never asked for again, and writing them all wears the drive: a peer wrote 1.24 TiB an hour at a hit
ratio of 1.2 %. So where blocks that were written after one use are hardly ever read, only what was used a second time
is written, until those that were refused show by coming back that they would have been worth it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.core.block import Block, Namespace
from kvstore.core.ghosts import Ghosts
from kvstore.core.shadows import name_of

YIELD_MIN = 0.01  # hits for each block that is written, or refused, after one use
EVIDENCE_MIN = 1024.0  # such blocks, before anything is refused
_HALF_LIFE = 2.0  # of evidence, in capacities of the tier
_SAMPLE = 32  # keys whose first byte is below it: an eighth
_GHOSTS = 4  # in capacities of the tier
_DAY_S = 86_400.0
_BURST_S = 3_600.0  # of the budget that may be written at once
_RESERVE = 0.5  # of the burst: below it only what was used again is written


@dataclass(slots=True)
class AdmissionCounts:
    """Blocks that were not saved, and why."""

    refused_order: int = 0
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
        self._hits = self._judged = 0.0
        self._span = EVIDENCE_MIN

    @property
    def writes_all(self) -> bool:
        """Whether blocks are saved that were used once only."""
        return self._judged < EVIDENCE_MIN or self._hits >= YIELD_MIN * self._judged

    def admits(self, block: Block, nbytes: int, now_s: float, wanted: bool = False) -> bool:
        """Whether to write the block now, which takes `nbytes` of the budget (see `settle`).

        `wanted`: it must be written, and what that takes beyond the budget is missing from what comes.
        """
        self._refill(now_s)
        if not wanted and self._rate and self._tokens < nbytes:
            self.counts.refused_budget += 1
            return False
        if not wanted and not block.reused and self._rate and self._tokens < _RESERVE * self._burst:
            self.counts.refused_budget += 1
            return False
        self._tokens -= nbytes
        return True

    def admits_first_use(self) -> bool:
        """Whether a block that was used once is worth the wear, in a tier that is full."""
        self._judged += 1.0
        self.counts.refused_first_use += not self.writes_all
        return self.writes_all

    def mark(self) -> tuple[float, float, int]:
        """How things stand; see `back_to`."""
        return self._tokens, self._judged, self.counts.refused_first_use

    def back_to(self, mark: tuple[float, float, int]) -> None:
        """What was judged since cannot be written after all, and will be judged again."""
        self._tokens, self._judged, self.counts.refused_first_use = mark

    def settle(self, nbytes: int, stored_bytes: int) -> None:
        """A block was written in fewer bytes than were taken for it, or not at all."""
        self._tokens += nbytes - stored_bytes

    def hit(self) -> None:
        """A copy was read that had been saved after one use."""
        self._hits += 1.0

    def left(self, block: Block) -> None:
        """A block that was refused has left the last tier that had it."""
        if block.key[0] < _SAMPLE:
            self._refused.add(name_of(block.key, block.namespace.salt))

    def missed(self, namespace: Namespace, keys: Sequence[bytes], held: int) -> None:
        """New blocks are about to be stored that nobody has; the tier holds `held` blocks."""
        if not self._span / 2 <= held <= 2 * self._span:
            self._span = max(EVIDENCE_MIN, float(held))
            self._refused.resize(int(_GHOSTS * self._span) * _SAMPLE // 256)
        fade = 0.5 ** (len(keys) / (_HALF_LIFE * self._span))
        self._hits, self._judged = self._hits * fade, self._judged * fade
        for key in keys:
            if key[0] < _SAMPLE and self._refused.take(name_of(key, namespace.salt)):
                self._hits += 256 / _SAMPLE

    def _refill(self, now_s: float) -> None:
        if self._filled_s is not None:
            self._tokens = min(self._burst, self._tokens + self._rate * (now_s - self._filled_s))
        self._filled_s = now_s
