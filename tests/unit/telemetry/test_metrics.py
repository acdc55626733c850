"""Metrics are the engine's statistics at the time of the scrape."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from kvstore.telemetry import metrics
from kvstore.v1 import admin_pb2


class Source:
    def __init__(self) -> None:
        self.asked = 0
        self.reply = admin_pb2.GetStatsResponse(
            version="1.0",
            instance_id="abc",
            uptime_ms=2500,
            health="serving",
            sessions=2,
            put_stored=7,
            put_rejected={"no_room": 3},
            counters={"slabs_made": 4, "withheld_blocks": 9},
            tiers=[
                admin_pb2.TierStats(
                    name="warm", capacity_bytes=100, used_bytes=40, hits=5, state="ok", device="mlocked"
                ),
                admin_pb2.TierStats(
                    name="cold", capacity_bytes=1000, stored_bytes=60, raw_bytes=90, state="down",
                    fetch_bytes_per_s=7, fetch_fixed_us=8,
                ),
            ],
        )  # fmt: skip

    def stats(self) -> admin_pb2.GetStatsResponse:
        self.asked += 1
        return self.reply


def samples(source: Source) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = metrics.Metrics(source).render().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_scrape_is_one_snapshot_and_registering_asks_for_none() -> None:
    source = Source()
    exporter = metrics.Metrics(source)
    assert source.asked == 0
    exporter.render()
    exporter.render()
    assert source.asked == 2


def test_values_have_their_tier_and_reason() -> None:
    found = samples(Source())
    assert found["kvstore_sessions", ()] == 2
    assert found["kvstore_uptime_seconds", ()] == 2.5
    assert found["kvstore_serving", ()] == 1
    assert found["kvstore_put_stored_blocks_total", ()] == 7
    assert found["kvstore_put_rejected_blocks_total", (("reason", "no_room"),)] == 3
    assert found["kvstore_events_total", (("event", "slabs_made"),)] == 4
    assert found["kvstore_events_total", (("event", "withheld_blocks"),)] == 9
    assert found["kvstore_tier_fetch_bytes_per_second", (("tier", "cold"),)] == 7
    assert found["kvstore_tier_fetch_fixed_microseconds", (("tier", "cold"),)] == 8
    assert found["kvstore_tier_capacity_bytes", (("tier", "warm"),)] == 100
    assert found["kvstore_tier_hits_total", (("tier", "warm"),)] == 5
    assert found["kvstore_tier_stored_bytes", (("tier", "cold"),)] == 60
    assert found["kvstore_tier_up", (("device", "mlocked"), ("tier", "warm"))] == 1
    assert found["kvstore_tier_up", (("device", ""), ("tier", "cold"))] == 0


def test_every_number_of_the_statistics_is_exported() -> None:
    """A field added to the .proto must come out here as well."""
    exported = {field for field, _, _ in (*metrics._GAUGES, *metrics._COUNTERS)}
    by_hand = {"version", "instance_id", "uptime_ms", "health", "tiers", "put_rejected", "counters"}
    assert exported | by_hand == {field.name for field in admin_pb2.GetStatsResponse.DESCRIPTOR.fields}
    tier = {field for field, _, _ in (*metrics._TIER_GAUGES, *metrics._TIER_COUNTERS)}
    by_hand = {"name", "state", "device", "medium"}
    assert tier | by_hand == {field.name for field in admin_pb2.TierStats.DESCRIPTOR.fields}


def test_what_a_medium_counts_itself() -> None:
    class Worn:
        def stats(self) -> admin_pb2.GetStatsResponse:
            cold = admin_pb2.TierStats(name="cold", medium={"device_bytes": 9, "map_bytes": 1})
            return admin_pb2.GetStatsResponse(tiers=[admin_pb2.TierStats(name="warm"), cold])

    text = metrics.Metrics(Worn()).render().decode()
    assert 'kvstore_tier_device_bytes_total{tier="cold"} 9.0' in text
    assert "map_bytes" not in text, "only what is known to be a counter"
