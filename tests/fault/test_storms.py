"""Short forms of `make chaos` and `make soak`, and that both would notice."""

from __future__ import annotations

import random

import chaos
import numpy as np
import pytest
import soak
from harness import Storm

import storm
from daemon_fixtures import StartDaemon
from derived import namespace
from kvstore_client import STORED, Client
from polling import eventually


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kills_and_stops_at_random() -> None:
    done = chaos.run(kills=15, workers=3, seed=7)
    assert sum(done.done.values()) >= 15
    assert {"daemon", "worker", "cold agent"} <= set(done.done)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nothing_grows_in_two_minutes() -> None:
    trends, workers, connects, deaths = soak.run(minutes=2.0, workers=2, seed=7)
    assert workers.operations > 1000 and connects > 100 and deaths > 10
    assert [trend for trend in trends if not trend.is_flat] == []


def test_a_wrong_byte_is_noticed(start_daemon: StartDaemon) -> None:
    """Somebody stores other bytes than belong under the keys that the storm reads."""
    daemon = start_daemon()
    with Client(daemon.address, staging_bytes=4 << 20) as client:
        space = namespace(client, "small", storm.SIZES["small"], kind="chain")
        for seed in range(storm.SEEDS):
            keys = storm.chain(space, storm.BLOCKS_MAX, seed)
            rows = storm.contents(keys, space.block_nbytes)
            rows[:, 5000] ^= 1
            assert set(space.put(keys, rows)) == {STORED}
    workers = Storm(daemon, 1, random.Random(3))
    try:
        eventually(lambda: workers.collect() or workers.wrong, "the storm to notice")
    finally:
        workers.end()
    assert workers.wrong[0].startswith("small chain: [")


def test_growth_is_told_from_noise() -> None:
    dice = np.random.default_rng(1)
    noise = [(float(i), 1000.0 + float(dice.normal(0, 20))) for i in range(120)]
    assert soak.trend("steady", 8, noise).is_flat
    grows = [(at, value + 3 * at) for at, value in noise]
    found = soak.trend("grows", 8, grows)
    assert not found.is_flat and found.growth == pytest.approx(3 * 79, rel=0.2)
    assert soak.trend("filled at first", 8, [(at, value * min(1.0, at / 20)) for at, value in noise]).is_flat
