"""A cold tier that becomes slow, and quick again, under a real daemon: nobody waits for it longer than for computing.

The cold agent is stopped while it should read: so a fetch takes as long as the test wants, on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from daemon_fixtures import StartDaemon
from daemon_process import DaemonProcess
from derived import BLOCK_TOKENS, chain, contents, fetch, namespace
from kvstore.core.benefit import WINDOW
from kvstore.v1 import admin_pb2, types_pb2
from kvstore_client import STORED, Client, Keys, Match, Namespace, WithheldReason
from polling import eventually

BLOCKS = 8
STALL_S = 0.3
RECOMPUTE_S = STALL_S / 2  # of the whole prefix; a fetch that is not held up takes some milliseconds
PER_TOKEN_S = RECOMPUTE_S / (BLOCKS * BLOCK_TOKENS)


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon(warm_bytes="64MiB", cold_bytes="256MiB")


@pytest.fixture
def client(daemon: DaemonProcess, transport: str) -> Iterator[Client]:
    with Client(daemon.address, transport=transport, staging_bytes=16 << 20) as made:  # type: ignore[arg-type]
        yield made


def cool(daemon: DaemonProcess) -> None:
    """What is stored is in cold only."""
    assert daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000)).unsaved == 0
    eventually(lambda: not daemon.stats().counters["slots_filling"], "the loads to end")

    def emptied() -> bool:  # a release may still be on its way
        daemon.ask("Evict", admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1 << 40))
        return daemon.tier("warm").blocks == 0

    eventually(emptied, "warm to be empty")


def stored(daemon: DaemonProcess, space: Namespace) -> Keys:
    keys = chain(space, BLOCKS)
    assert space.put(keys, contents(keys)) == [STORED] * BLOCKS
    cool(daemon)
    return keys


def fetch_slowly(daemon: DaemonProcess, space: Namespace, keys: Keys) -> None:
    """Load a cold prefix from an agent that does nothing for a while."""
    agent = daemon.agent("cold")
    agent.suspend()
    try:
        lease = space.acquire(keys, recompute_s_per_token=0.0)
        assert lease.blocks == BLOCKS, "who does not say what recomputing takes is promised everything"
        time.sleep(STALL_S)
    finally:
        agent.resume()
    assert lease.wait() == BLOCKS
    lease.release()
    cool(daemon)


def test_the_gate_closes_on_a_slow_tier_and_opens_again(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "gate", recompute_s_per_token=PER_TOKEN_S)
    keys = stored(daemon, space)
    with space.acquire(keys) as lease:
        assert (lease.blocks, lease.withheld, lease.withheld_reason) == (BLOCKS, 0, None), "nothing is known yet"
        assert lease.wait() == BLOCKS
    cool(daemon)
    for _ in range(WINDOW):
        fetch_slowly(daemon, space, keys)

    expected = Match(0, 0, {"hot": 0, "warm": 0, "cold": 0}, BLOCKS, WithheldReason.NOT_WORTH)
    assert space.match(keys) == expected
    assert space.match(keys, recompute_s_per_token=10 * PER_TOKEN_S).blocks == BLOCKS, "a slower worker waits gladly"
    with space.acquire(keys) as lease:
        assert (lease.blocks, lease.withheld, lease.withheld_reason) == (0, BLOCKS, WithheldReason.NOT_WORTH)
    counters = daemon.stats().counters
    assert (counters["gated_acquires"], counters["withheld_blocks"]) == (1, BLOCKS)
    cold = daemon.tier("cold")
    assert 0 < cold.fetch_bytes_per_s < BLOCKS * space.block_nbytes / RECOMPUTE_S

    def opens() -> bool:
        cool(daemon)
        with space.acquire(keys) as lease:
            return lease.blocks == BLOCKS

    eventually(opens, "the gate to open")
    assert daemon.stats().counters["probes"] > 0, "by loads that nobody waited for"
    cool(daemon)
    assert fetch(space, keys) == (BLOCKS, [])


def test_without_a_recompute_cost_nothing_changes(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "open")
    keys = stored(daemon, space)
    for _ in range(WINDOW // 2):
        fetch_slowly(daemon, space, keys)
    assert space.match(keys) == Match(BLOCKS, BLOCKS * BLOCK_TOKENS, {"hot": 0, "warm": 0, "cold": BLOCKS})
    assert fetch(space, keys) == (BLOCKS, [])
    counters = daemon.stats().counters
    assert (counters["gated_acquires"], counters["withheld_blocks"], counters["probes"]) == (0, 0, 0)


def test_a_worker_tells_how_fast_it_copies(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "copies", recompute_s_per_token=PER_TOKEN_S)
    keys = chain(space, BLOCKS)
    assert space.put(keys, contents(keys)) == [STORED] * BLOCKS
    assert fetch(space, keys) == (BLOCKS, [])
    assert daemon.tier("warm").fetch_bytes_per_s == 0
    assert fetch(space, keys) == (BLOCKS, [])
    assert daemon.tier("warm").fetch_bytes_per_s > 0
