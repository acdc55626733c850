"""Which capacities pay: hits over capacity, and what of it should be memory, what SSD."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from kvstore.replay.optimum import optimum
from kvstore.replay.runs import NAMES, OPT, POLICIES, RIVALS, no_collection
from kvstore.replay.simulator import Simulator
from kvstore.replay.trace import Trace

POINTS = 12
SHARES = (0.90, 0.95, 0.99)  # of what an infinite cache hits
# Warm ends where a doubling of it brings less than this, of what an infinite cache hits. From 0.1 to 100 % there are
# ten doublings, so the mean one brings 10 %: below half of that the curve is flat. It is five times what the seed
# moves, and fewer than one hit in twenty comes from the SSD instead.
WORTH = 0.05

_LOWEST = 0.001  # of the unique blocks
_REFINEMENTS = 2  # replays between two points for each share: 1.9 times apart becomes 1.05 times or so


class Point(NamedTuple):
    """What so many blocks hit."""

    blocks: int
    hits: int


class Curve:
    """Hits by capacity, each measured once, when it is asked for."""

    def __init__(self, trace: Trace, policy: str, progress: Callable[[int], None] | None = None) -> None:
        """`policy` is one of runs.NAMES."""
        self._trace = trace
        self._policy = policy
        self._progress = progress
        self._hits: dict[int, int] = {}

    def at(self, blocks: int) -> Point:
        """One warm tier of so many blocks."""
        if blocks not in self._hits:
            self._hits[blocks] = self._replayed({"warm": blocks})
        return Point(blocks, self._hits[blocks])

    def reach(self, hits: int) -> Point:
        """The smallest capacity, of those measured and a few between, that hits so many blocks."""
        for _ in range(_REFINEMENTS):
            below, above = self._around(hits)
            if below is None or above.blocks - below.blocks <= 1:
                break
            share = (hits - below.hits) / (above.hits - below.hits)
            guess = math.ceil(below.blocks * (above.blocks / below.blocks) ** share)
            self.at(min(max(guess, below.blocks + 1), above.blocks - 1))
        return self._around(hits)[1]

    def _around(self, hits: int) -> tuple[Point | None, Point]:
        below = None
        for point in sorted(map(Point._make, self._hits.items())):
            if point.hits >= hits:
                return below, point
            below = point
        raise ValueError(f"no capacity that was tried hits {hits} blocks")

    def split(self, warm: int, cold: int) -> int:
        """Hits of both tiers together; of the optimum, which knows one tier, those of the larger."""
        return self.at(warm).hits if not cold else self._replayed({"warm": warm, "cold": cold})

    def _replayed(self, tiers: Mapping[str, int]) -> int:
        if self._policy == OPT:
            return optimum(self._trace, max(tiers.values()), self._progress)
        with no_collection():
            counts = Simulator(tiers, (POLICIES | RIVALS)[self._policy]).run(self._trace, self._progress)
        return sum(counts.hits.values())


def capacities(unique: int) -> list[int]:
    """POINTS capacities from 0.1 % of the unique blocks to all of them, by equal factors."""
    span = [_LOWEST ** (1 - step / (POINTS - 1)) for step in range(POINTS)]
    return sorted({max(1, round(unique * share)) for share in span})


def advise(
    trace: Trace, policy: str, block_bytes: int = 0, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Hits over capacity, the knee, what 90, 95 and 99 % of an infinite cache's hits need, and a split warm and cold.

    Args:
        trace: the requests.
        policy: one of runs.NAMES.
        block_bytes: for figures in bytes; 0: there are none.
        progress: told of every request of every replay.

    Raises:
        ValueError: unknown policy, or no block is ever asked for twice.
    """
    if policy not in NAMES:
        raise ValueError(f"unknown policy {policy!r}; there are {', '.join(NAMES)}")
    curve = Curve(trace, policy, progress)
    infinite = curve.at(trace.unique).hits
    if not infinite:
        raise ValueError(f"{trace.name} asks for no full block twice: no cache of any size would hit")
    points = [curve.at(blocks) for blocks in capacities(trace.unique)]
    gains = _gains(points)

    def told(point: Point) -> dict[str, Any]:
        figures = {"blocks": point.blocks, "percent": 100 * point.blocks / trace.unique}
        figures |= {"hit_ratio": point.hits / trace.references, "share_of_infinite": point.hits / infinite}
        return figures | ({"bytes": point.blocks * block_bytes} if block_bytes else {})

    reached = {share: curve.reach(math.ceil(share * infinite)) for share in SHARES}
    warm = _worth(points, gains, WORTH * infinite)
    result = {"trace": trace.name, "policy": policy, "references": trace.references, "unique": trace.unique}
    result["infinite_hit_ratio"] = infinite / trace.references
    result["points"] = [
        told(point) | {"gain_per_doubling": gain and gain / trace.references}
        for point, gain in zip(points, gains, strict=True)
    ]
    result["knee"] = told(_knee(points))
    result["reach"] = [{"share": share} | told(point) for share, point in reached.items()]
    cold = reached[SHARES[-1]].blocks
    split = {"warm_blocks": warm.blocks, "cold_blocks": cold if cold > warm.blocks else 0}
    if block_bytes:
        split |= {"warm_bytes": warm.blocks * block_bytes, "cold_bytes": split["cold_blocks"] * block_bytes}
    hits = curve.split(warm.blocks, split["cold_blocks"])
    measured = {"hit_ratio": hits / trace.references, "share_of_infinite": hits / infinite}
    return result | {"split": split | (measured if policy != OPT else {})}


def steps(trace: Trace) -> int:
    """How much progress it will tell of, at most."""
    return (POINTS + _REFINEMENTS * len(SHARES) + 1) * len(trace.requests)


def _gains(points: Sequence[Point]) -> list[float | None]:
    """Hits that a doubling brings, on the way to each point from the one before."""
    gains: list[float | None] = [None]
    for before, after in pairwise(points):
        gains.append((after.hits - before.hits) / math.log2(after.blocks / before.blocks))
    return gains


def _worth(points: Sequence[Point], gains: Sequence[float | None], threshold: float) -> Point:
    """The last point to which a doubling brought so many hits; a curve may rise late, so not the first that fails."""
    worth = [point for point, gain in zip(points, gains, strict=True) if gain is not None and gain >= threshold]
    return worth[-1] if worth else points[0]


def _knee(points: Sequence[Point]) -> Point:
    """Farthest above the line from first to last, over the logarithm of capacity (Satopaa et al. 2011)."""
    first, last = points[0], points[-1]
    width, height = math.log(last.blocks / first.blocks) or 1.0, (last.hits - first.hits) or 1

    def above(point: Point) -> float:
        return (point.hits - first.hits) / height - math.log(point.blocks / first.blocks) / width

    return max(points, key=above)
