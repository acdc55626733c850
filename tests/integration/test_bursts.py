"""Many puts at once: every outcome is honest. Defect 3 of peers: 7 of 16 blocks dropped, 16 of 16 successes told."""

from __future__ import annotations

import threading

from daemon_fixtures import StartDaemon, StartWorker
from derived import chain, contents, fetch, namespace, wrong
from kvstore_client import EXISTS, STORED, Client, Namespace, PutOutcome

NBYTES = 1 << 20
WAIT_S = 30.0


def test_defect_3_every_block_of_a_burst_that_was_stored_is_there(start_daemon: StartDaemon) -> None:
    """Sixteen threads put at once, into a pool that holds it all."""
    daemon = start_daemon(warm_bytes="256MiB", cold_bytes=0, staging_max_bytes="64MiB")
    client = daemon.client(staging_bytes=64 << 20)
    space = namespace(client, "burst", NBYTES)
    outcomes = burst(space, range(16), blocks=8)
    assert {outcome for told in outcomes.values() for outcome in told} == {STORED}
    for seed in outcomes:
        assert fetch(space, chain(space, 8, seed)) == (8, [])


def test_defect_3_a_burst_into_a_full_pool_says_what_was_not_stored(start_daemon: StartDaemon) -> None:
    """Leases hold 40 of 63 blocks: what finds no room is REJECTED, and exactly what was STORED can be read."""
    daemon = start_daemon(warm_bytes="64MiB", cold_bytes=0, staging_max_bytes="32MiB")
    with Client(daemon.address, staging_bytes=32 << 20) as client:
        space = namespace(client, "full", NBYTES)
        held = chain(space, 40, seed=1000)
        assert space.put(held, contents(held, NBYTES), timeout_s=WAIT_S) == [STORED] * 40
        with space.acquire(held) as lease:
            leases = []
            told = {}
            for seed in range(8):  # each is leased at once, so that the next cannot have its room
                keys = chain(space, 8, seed)
                told[seed] = space.put(keys, contents(keys, NBYTES), timeout_s=WAIT_S)
                leases.append(space.acquire(keys))
            stored = {seed: sum(outcome.is_stored for outcome in found) for seed, found in told.items()}
            assert 0 < sum(stored.values()) <= 23
            reasons = {repr(outcome) for found in told.values() for outcome in found}
            assert reasons <= {"STORED", "REJECTED(NO_ROOM)", "REJECTED(NO_PARENT)"}
            assert "REJECTED(NO_ROOM)" in reasons
            for seed, count in stored.items():
                assert fetch(space, chain(space, 8, seed)) == (count, [])
                assert leases[seed].blocks == count
            assert (lease.blocks, daemon.stats().put_rejected["no_room"] > 0) == (40, True)
            for other in leases:
                other.release()
        keys = chain(space, 8, seed=77)
        assert space.put(keys, contents(keys, NBYTES), timeout_s=WAIT_S) == [STORED] * 8, "it recovers (defect 7)"


def test_defect_7_a_full_pool_goes_on_to_take_blocks(start_daemon: StartDaemon, start_worker: StartWorker) -> None:
    """Three workers put eight times what fits: each put is stored, whatever the eviction has to do."""
    daemon = start_daemon(warm_bytes="64MiB", cold_bytes="128MiB", staging_max_bytes="16MiB")
    workers = [start_worker(daemon, staging_bytes=16 << 20) for _ in range(3)]
    for round_ in range(20):
        for number, worker in enumerate(workers):
            worker.tell("put", model="m", blocks=8, seed=10 * round_ + number, block_nbytes=NBYTES)
        for worker in workers:
            assert set(worker.take()) == {"STORED"}
    for number, worker in enumerate(workers):
        assert worker.ask("get", model="m", blocks=8, seed=190 + number, block_nbytes=NBYTES) == [8, []]
    for number, worker in enumerate(workers):
        for round_ in range(20):
            assert worker.ask("get", model="m", blocks=8, seed=10 * round_ + number, block_nbytes=NBYTES)[1] == []


def burst(space: Namespace, seeds: range, blocks: int) -> dict[int, list[PutOutcome]]:
    """Put a chain of each seed, all at once."""
    outcomes: dict[int, list[PutOutcome]] = {}
    begin = threading.Barrier(len(seeds))

    def put(seed: int) -> None:
        keys = chain(space, blocks, seed)
        rows = contents(keys, NBYTES)
        begin.wait(WAIT_S)
        outcomes[seed] = space.put(keys, rows, timeout_s=WAIT_S)

    threads = [threading.Thread(target=put, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_the_same_blocks_put_by_many_threads_are_stored_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(warm_bytes="64MiB", cold_bytes=0)
    space = namespace(daemon.client(staging_bytes=16 << 20), "same", 64 << 10)
    keys = chain(space, 16)
    rows = contents(keys, 64 << 10)
    told: list[list[PutOutcome]] = []
    threads = [threading.Thread(target=lambda: told.append(space.put(keys, rows, timeout_s=WAIT_S))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outcomes in zip(*told, strict=True):
        assert sorted(outcomes, key=repr) == [EXISTS] * 7 + [STORED]
    with space.acquire(keys) as lease:
        out = rows * 0
        lease.read_into(out, verify=True)
    assert not wrong(keys, out)
