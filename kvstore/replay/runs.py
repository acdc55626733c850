"""Runs of a replay: one policy at one size, and sweeps over sizes and policies; results as JSON can hold them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kvstore.core.adaptive import Adaptive
from kvstore.core.leaf_lru import LeafLru
from kvstore.core.policy import PolicyFactory
from kvstore.replay.optimum import optimum
from kvstore.replay.rivals import Arc, Lru2, S3Fifo
from kvstore.replay.simulator import PROMOTE_HITS, TIERS, Counts, Simulator
from kvstore.replay.trace import Trace

OPT = "opt"
BASELINE = "leaf-lru"
POLICIES: dict[str, PolicyFactory] = {BASELINE: LeafLru, "adaptive": Adaptive}
RIVALS: dict[str, PolicyFactory] = {"lru-2": Lru2, "s3-fifo": S3Fifo, "arc": Arc}
NAMES = (*POLICIES, OPT, *RIVALS)

CAPACITIES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)  # per cent of a trace's unique blocks

Progress = Callable[[int], None]


def replay(
    trace: Trace,
    tiers: Mapping[str, int],
    policy: str,
    block_bytes: int = 0,
    progress: Progress | None = None,
    promote_hits: int = PROMOTE_HITS,
) -> dict[str, Any]:
    """One replay, and the optimum of one cache with the room of all tiers together. Two steps of progress a request.

    Args:
        trace: the requests.
        tiers: capacity in blocks by tier; warm is needed, but for the optimum alone.
        policy: one of NAMES.
        block_bytes: for the figures in bytes; 0: there are none.
        progress: told of every request, by the replay and by the optimum.
        promote_hits: acquires of a block until it is copied to hot.

    Raises:
        ValueError: unknown policy, or tiers that cannot be.
    """
    if policy not in NAMES:
        raise ValueError(f"unknown policy {policy!r}; there are {', '.join(NAMES)}")
    best = optimum(trace, sum(tiers.values()), progress) / trace.references
    result: dict[str, Any] = {"block_hit_ratio": best, "policy": policy, "trace": trace.name}
    result |= {"requests": len(trace.requests), "references": trace.references, "unique": trace.unique}
    if policy == OPT:
        return result | {"capacity_blocks": dict(tiers), "optimum": best}
    simulator = Simulator(tiers, (POLICIES | RIVALS)[policy], promote_hits)
    with no_collection():
        start = time.perf_counter()
        counts = simulator.run(trace, progress)
        seconds = time.perf_counter() - start
    hits = sum(counts.hits.values())
    result["block_hit_ratio"] = hits / counts.references
    result |= {"optimum": best, "share_of_optimum": hits / counts.references / best if best else None}
    result |= _figures(counts, tiers, block_bytes)
    seen = simulator.cache.residency.counts
    result["promotions"] = {name: seen[TIERS[name]].promotions for name in ("hot", "warm") if tiers.get(name)}
    return result | {"seconds": seconds, "references_per_s": counts.references / max(seconds, 1e-9)}


def one_tier(trace: Trace, tiers: Mapping[str, int], policy: str, progress: Progress | None = None) -> dict[str, Any]:
    """One warm tier with the room of all `tiers`, under the same policy. One step of progress a request.

    Raises:
        ValueError: the policy is the optimum, which knows one tier only.
    """
    if policy == OPT:
        raise ValueError(f"{OPT} knows one tier only; compare another policy")
    blocks = sum(tiers.values())
    return {"capacity_blocks": blocks, "block_hit_ratio": _hit_ratio(trace, blocks, policy, progress)}


def sweep(
    trace: Trace, policies: Sequence[str], percents: Sequence[float] = CAPACITIES, progress: Progress | None = None
) -> dict[str, Any]:
    """Every policy at every capacity (per cent of the unique blocks), in one warm tier.

    Two steps of progress a request and cell, and one for each optimum.

    Returns:
        {"trace", "references", "unique", "cells": […], "means": {policy: …}}: each cell has the ratio to leaf-first LRU
        at the same size, its difference in points, and its share of the optimum.
    """
    cells: list[dict[str, Any]] = []
    for percent in percents:
        blocks = max(1, int(trace.unique * percent / 100))
        best = optimum(trace, blocks, progress) / trace.references
        base = _hit_ratio(trace, blocks, BASELINE, progress)
        for policy in policies:
            ratio = best if policy == OPT else base
            if policy not in (OPT, BASELINE):
                ratio = _hit_ratio(trace, blocks, policy, progress)
            cell = {"percent": percent, "blocks": blocks, "policy": policy, "block_hit_ratio": ratio}
            cell["ratio_to_leaf_lru"] = ratio / base if base else None
            cell["points_to_leaf_lru"] = 100 * (ratio - base)
            cells.append(cell | {"share_of_optimum": ratio / best if best else None})
    means = {policy: _means([cell for cell in cells if cell["policy"] == policy]) for policy in policies}
    return {
        "trace": trace.name, "references": trace.references, "unique": trace.unique, "cells": cells, "means": means
    }  # fmt: skip


def sweep_steps(trace: Trace, policies: Sequence[str], percents: Sequence[float]) -> int:
    """How much progress a sweep will tell of."""
    runs = 2 + len(set(policies) - {OPT, BASELINE})
    return len(percents) * runs * len(trace.requests)


def _hit_ratio(trace: Trace, blocks: int, policy: str, progress: Progress | None) -> float:
    simulator = Simulator({"warm": blocks}, (POLICIES | RIVALS)[policy])
    with no_collection():
        counts = simulator.run(trace, progress)
    return sum(counts.hits.values()) / counts.references


def _means(cells: list[dict[str, Any]]) -> dict[str, float | None]:
    def mean(name: str) -> float | None:
        values = [cell[name] for cell in cells if cell[name] is not None]
        return sum(values) / len(values) if values else None

    worst = min((cell["points_to_leaf_lru"] for cell in cells), default=0.0)
    return {name: mean(name) for name in ("ratio_to_leaf_lru", "share_of_optimum")} | {"worst_points": worst}


def _figures(counts: Counts, tiers: Mapping[str, int], block_bytes: int) -> dict[str, Any]:
    """What one replay has counted."""
    moved = {f"{source} to {target}": blocks for (source, target), blocks in sorted(counts.moved.items())}
    ssd = counts.moved.get(("warm", "cold"), 0)
    figures: dict[str, Any] = {
        "tiers": {
            tier: {"capacity_blocks": tiers[tier], "hit_ratio": counts.hits[tier] / counts.references}
            for tier in TIERS
            if tiers.get(tier)
        },
        "prefix_hit_ratio": counts.prefix_hit / counts.requests,
        "tokens": counts.tokens,
        "tokens_saved": counts.tokens_saved,
        "stored_blocks": counts.stored,
        "refused_blocks": counts.refused,
        "moved_blocks": moved,
        "ssd_written_blocks": ssd,
        "ssd_written_exclusive_blocks": counts.left_warm if tiers.get("cold") else 0,
    }
    if block_bytes:
        figures["moved_bytes"] = {name: blocks * block_bytes for name, blocks in moved.items()}
        figures["ssd_written_bytes"] = ssd * block_bytes
        figures["ssd_written_exclusive_bytes"] = figures["ssd_written_exclusive_blocks"] * block_bytes
    return figures


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: it looks through hundreds of thousands of living blocks for nothing.

    What a replay makes has no cycles but parent and child, and those go with it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
