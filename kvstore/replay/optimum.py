"""The most that any order could hit: Belady's rule with bypass.

Of all blocks, stored or just asked for, those whose next use is farthest away are not kept; of blocks with the same
next use the deeper one goes. The next use of a parent is never later than its child's, so what is kept is always a set
of whole prefixes, and the result is exact for the ratio of block hits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from kvstore.replay.trace import Trace

_NEVER = 1 << 60


def optimum(trace: Trace, blocks: int, progress: Callable[[int], None] | None = None) -> int:
    """Block hits of a cache of `blocks` blocks that knows the future."""
    uses = _next_uses(trace)
    kept: dict[bytes, int] = {}
    farthest: list[tuple[int, int, bytes]] = []
    hits = 0
    for request, following in zip(trace.requests, uses, strict=True):
        for depth, (key, use) in enumerate(zip(request.keys, following, strict=True)):
            hits += key in kept
            if use == _NEVER or depth >= request.full:
                kept.pop(key, None)
                continue
            kept[key] = use
            heapq.heappush(farthest, (-use, -depth, key))
            while len(kept) > blocks:
                use, _, last = heapq.heappop(farthest)
                if kept.get(last) == -use:  # else an entry of an earlier use
                    del kept[last]
        if progress is not None:
            progress(1)
    return hits


def _next_uses(trace: Trace) -> list[list[int]]:
    """For each block of each request, the number of the next request that asks for it."""
    upcoming: dict[bytes, int] = {}
    uses: list[list[int]] = []
    for number in range(len(trace.requests) - 1, -1, -1):
        keys = trace.requests[number].keys
        uses.append([upcoming.get(key, _NEVER) for key in keys])
        upcoming.update(dict.fromkeys(keys, number))
    uses.reverse()
    return uses
