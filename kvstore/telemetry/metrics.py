"""Prometheus metrics, read from the engine's statistics when somebody scrapes: the hot path counts nothing twice.

Nothing is served over TCP; `Metrics.render` gives the text for whoever passes it on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.v1 import admin_pb2

PREFIX = "kvstore"

# (field of TierStats, name, help)
_TIER_GAUGES = (
    ("capacity_bytes", "tier_capacity_bytes", "Bytes the tier may hold"),
    ("used_bytes", "tier_used_bytes", "Bytes the tier holds"),
    ("blocks", "tier_blocks", "Blocks the tier holds"),
    ("stored_bytes", "tier_stored_bytes", "Bytes on the medium, after compression"),
    ("raw_bytes", "tier_raw_bytes", "The same blocks' bytes before compression"),
    ("populated_bytes", "tier_populated_bytes", "Slab bytes made and touched"),
    ("fetch_bytes_per_s", "tier_fetch_bytes_per_second", "Learned rate of loads; of warm: a worker's own copies"),
    ("fetch_fixed_us", "tier_fetch_fixed_microseconds", "Learned time before the first byte of a load"),
)
_TIER_COUNTERS = (
    ("hits", "tier_hits", "Blocks served from the tier"),
    ("evictions", "tier_evictions", "Blocks dropped to make room"),
    ("restarts", "tier_restarts", "Restarts of the tier's agent"),
    ("corrupt", "tier_corrupt", "Copies dropped because their checksum failed"),
    ("writes", "tier_writes", "Blocks moved into the tier"),
    ("promotions", "tier_promotions", "Blocks that earned a place in the tier by hits in a slower one"),
    ("write_failures", "tier_write_failures", "Blocks that could not be moved into the tier"),
)
# What a medium counts itself.
_MEDIUM_COUNTERS = {
    "written_bytes": "Bytes of blocks written to the medium",
    "device_bytes": "Bytes written to the device for them, an estimate: pages, trees and copies",
    "syncs": "Times the medium was synced",
    "swept": "Payloads without a record that were dropped",
    "full": "Writes refused for want of room",
}
_GAUGES = (
    ("sessions", "sessions", "Attached workers"),
    ("leases", "leases", "Leases held"),
    ("namespaces", "namespaces", "Open namespaces"),
    ("staging_bytes", "staging_bytes", "Staging memory of all sessions"),
    ("quarantined_bytes", "quarantined_bytes", "Slots whose filler has not answered"),
    ("orphans", "orphans", "Blocks whose parent is gone"),
    ("anonymous_bytes", "anonymous_bytes", "Anonymous memory of the daemon's process"),
)
_COUNTERS = (
    ("lookups", "lookup_blocks", "Blocks asked for by acquire"),
    ("hit_blocks", "hit_blocks", "Blocks promised by acquire"),
    ("match_lookups", "match_lookup_blocks", "Blocks asked for by match"),
    ("match_hit_blocks", "match_hit_blocks", "Blocks found by match"),
    ("put_stored", "put_stored_blocks", "Blocks stored by put"),
    ("put_exists", "put_existing_blocks", "Blocks put that were there already"),
    ("dropped_unsaved", "dropped_unsaved_blocks", "Blocks evicted from warm without a lower copy"),
)


class StatsSource(Protocol):
    """Whoever has the statistics: the engine."""

    def stats(self) -> admin_pb2.GetStatsResponse:
        """Everything countable."""


class EngineCollector(Collector):
    """Turns one snapshot of the engine's statistics into metric families."""

    def __init__(self, source: StatsSource) -> None:
        self._source = source

    def describe(self) -> list[Metric]:
        """Nothing beforehand, so that registering asks the engine nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, from one snapshot."""
        stats = self._source.stats()
        yield InfoMetricFamily(
            f"{PREFIX}_daemon", "The daemon", {"version": stats.version, "instance_id": stats.instance_id}
        )
        yield GaugeMetricFamily(f"{PREFIX}_uptime_seconds", "Time since start", stats.uptime_ms / 1000)
        yield GaugeMetricFamily(f"{PREFIX}_serving", "1 while not draining", float(stats.health == "serving"))
        for field, name, text in _GAUGES:
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, getattr(stats, field))
        for field, name, text in _COUNTERS:
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, getattr(stats, field))
        yield _labelled("put_rejected_blocks", "Blocks that put refused", "reason", dict(stats.put_rejected))
        yield _labelled("events", "Everything else that is counted", "event", dict(stats.counters))
        yield from _tiers(stats)


class Metrics:
    """A registry with the engine's metrics."""

    def __init__(self, source: StatsSource) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(source))

    def render(self) -> bytes:
        """The metrics in Prometheus's text format, as of now."""
        return generate_latest(self._registry)


def _labelled(name: str, text: str, label: str, values: dict[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=[label])
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family


def _tiers(stats: admin_pb2.GetStatsResponse) -> Iterator[Metric]:
    for field, name, text in _TIER_GAUGES:
        gauge = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["tier"])
        for tier in stats.tiers:
            gauge.add_metric([tier.name], getattr(tier, field))
        yield gauge
    for field, name, text in _TIER_COUNTERS:
        counter = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=["tier"])
        for tier in stats.tiers:
            counter.add_metric([tier.name], getattr(tier, field))
        yield counter
    for name, text in _MEDIUM_COUNTERS.items():
        counter = CounterMetricFamily(f"{PREFIX}_tier_{name}", text, labels=["tier"])
        for tier in stats.tiers:
            if name in tier.medium:
                counter.add_metric([tier.name], tier.medium[name])
        yield counter
    state = GaugeMetricFamily(f"{PREFIX}_tier_up", "1 while the tier serves", labels=["tier", "device"])
    for tier in stats.tiers:
        state.add_metric([tier.name, tier.device], float(tier.state == "ok"))
    yield state
