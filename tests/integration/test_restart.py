"""A daemon that comes back: cold blocks are byte-exact or misses, what was cleared stays cleared, workers go on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from daemon_fixtures import StartDaemon, StartWorker
from daemon_process import DaemonProcess
from derived import chain, contents, fetch, namespace, wrong
from kvstore.v1 import admin_pb2
from kvstore_client import STORED, Client, Keys, LeaseExpired, Namespace
from polling import eventually

NBYTES = 256 << 10
BLOCKS = 32
WAIT_S = 30.0

End = Callable[[DaemonProcess], None]


@pytest.fixture(params=["SIGTERM", "SIGKILL"])
def end(request: pytest.FixtureRequest) -> End:
    """The two ways in which a daemon ends."""
    return DaemonProcess.stop if request.param == "SIGTERM" else DaemonProcess.kill


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon(warm_bytes="64MiB", cold_bytes="256MiB")


def store(space: Namespace, keys: Keys, flip: int = 0) -> Keys:
    blocks = contents(keys, space.block_nbytes) ^ np.uint8(flip)
    assert space.put(keys, blocks, timeout_s=WAIT_S) == [STORED] * len(keys)
    return keys


def flush(daemon: DaemonProcess) -> None:
    """Everything is in the cold tier, durably."""
    assert daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000)).unsaved == 0


def test_a_daemon_that_is_stopped_keeps_every_block(daemon: DaemonProcess, transport: str) -> None:
    with Client(daemon.address, transport=transport, staging_bytes=16 << 20) as client:  # type: ignore[arg-type]
        keys = store(*prefix_of(client, "stop"))
    daemon.stop()
    assert not (daemon.folder / "k.sock").exists()
    daemon.start()
    assert "after a clean shutdown" in daemon.log()
    with Client(daemon.address, transport=transport, staging_bytes=0) as client:  # type: ignore[arg-type]
        space, same = prefix_of(client, "stop")
        assert same == keys
        assert space.match(keys).by_tier == {"hot": 0, "warm": 0, "cold": BLOCKS}
        assert fetch(space, keys) == (BLOCKS, [])


def prefix_of(client: Client, model: str) -> tuple[Namespace, Keys]:
    space = namespace(client, model, NBYTES)
    return space, chain(space, BLOCKS)


def test_a_daemon_that_is_killed_keeps_what_was_saved(daemon: DaemonProcess) -> None:
    space = namespace(daemon.client(staging_bytes=16 << 20), "kill", NBYTES)
    saved = store(space, chain(space, BLOCKS))
    flush(daemon)
    unsaved = store(space, chain(space, BLOCKS, seed=1))
    daemon.kill()
    daemon.start()
    assert "no clean shutdown before" in daemon.log()
    assert fetch(space, saved) == (BLOCKS, [])
    assert fetch(space, unsaved)[1] == []


def test_killed_while_it_saves_it_serves_no_wrong_byte(daemon: DaemonProcess) -> None:
    """Three times: kill it in the middle of the spilling of 64 MiB; what it finds again is whole."""
    client = daemon.client(staging_bytes=16 << 20)
    space = namespace(client, "mid-save", NBYTES)
    found = 0
    for round_ in range(3):
        for seed in range(8):
            keys = chain(space, BLOCKS, seed=10 * round_ + seed)
            space.put(keys, contents(keys, NBYTES), timeout_s=WAIT_S)
        eventually(lambda: daemon.tier("cold").writes > 0, "the spilling to begin")
        daemon.kill()
        daemon.start()
        for seed in range(10 * round_ + 8):
            count, bad = fetch(space, chain(space, BLOCKS, seed))
            assert not bad
            found += count
    assert found > 0
    assert daemon.tier("cold").corrupt == 0


def test_clear_survives_a_restart(daemon: DaemonProcess, end: End) -> None:
    """What was cleared must not come back from the dead: the weights have changed."""
    client = daemon.client(staging_bytes=16 << 20)
    space, keys = prefix_of(client, "cleared")
    other, kept = prefix_of(client, "kept")
    store(space, keys)
    store(other, kept)
    flush(daemon)
    epoch = space.clear()
    end(daemon)
    daemon.start()
    assert space.match(keys).blocks == 0
    assert space.exists(keys) == [False] * BLOCKS
    assert fetch(other, kept) == (BLOCKS, [])
    store(space, keys, flip=0xFF)
    flush(daemon)
    end(daemon)
    daemon.start()
    out = np.zeros((BLOCKS, NBYTES), np.uint8)
    with space.acquire(keys) as lease:
        assert lease.read_into(out, verify=True, timeout_s=WAIT_S) == BLOCKS
    assert not wrong(keys, out ^ np.uint8(0xFF)), "bytes of the epoch before"
    assert space.clear() == epoch + 1


def test_deleted_blocks_that_were_saved_stay_deleted(daemon: DaemonProcess) -> None:
    space = namespace(daemon.client(staging_bytes=16 << 20), "deleted", NBYTES)
    keys = store(space, chain(space, BLOCKS))
    flush(daemon)
    assert space.delete(keys[20]) == BLOCKS - 20
    daemon.stop()
    daemon.start()
    assert space.match(keys).blocks == 20
    assert fetch(space, keys) == (20, [])


def test_a_smaller_cold_tier_keeps_what_fits(daemon: DaemonProcess) -> None:
    space = namespace(daemon.client(staging_bytes=16 << 20), "shrunk", NBYTES)
    for seed in range(6):
        store(space, chain(space, BLOCKS, seed))
        flush(daemon)
    daemon.stop()
    daemon.settings["cold_bytes"] = "24MiB"
    daemon.start()
    cold = daemon.tier("cold")
    assert 0 < cold.used_bytes <= cold.capacity_bytes <= 24 << 20
    counts = []
    for seed in range(6):
        count, bad = fetch(space, chain(space, BLOCKS, seed))
        assert not bad
        counts.append(count)
    assert 0 < sum(counts) < 6 * BLOCKS
    store(space, chain(space, BLOCKS, seed=9))
    assert fetch(space, chain(space, BLOCKS, seed=9)) == (BLOCKS, [])


def test_without_a_cold_tier_a_restart_starts_empty(start_daemon: StartDaemon, end: End) -> None:
    daemon = start_daemon(cold_bytes=0)
    space, keys = prefix_of(daemon.client(staging_bytes=16 << 20), "volatile")
    store(space, keys)
    end(daemon)
    daemon.start()
    assert fetch(space, keys) == (0, [])
    store(space, keys)
    assert fetch(space, keys) == (BLOCKS, [])


def test_defect_16_workers_re_attach_after_a_restart(
    daemon: DaemonProcess, start_worker: StartWorker, transport: str, end: End
) -> None:
    """Peers' workers crashed on the vanished shared memory, or never registered again."""
    worker = start_worker(daemon, transport=transport, staging_bytes=16 << 20)
    assert set(worker.ask("put", model="m", blocks=BLOCKS)) == {"STORED"}
    assert worker.ask("hold", model="m", blocks=BLOCKS) == BLOCKS
    flush(daemon)
    end(daemon)
    daemon.start()
    assert worker.ask("get", model="m", blocks=BLOCKS) == [BLOCKS, []]
    assert set(worker.ask("put", model="m", blocks=BLOCKS, seed=1)) == {"STORED"}
    assert worker.ask("get", model="m", blocks=BLOCKS, seed=1) == [BLOCKS, []]
    assert [session.pid for session in daemon.sessions()] == [worker.pid]


def test_defect_16_views_of_a_daemon_that_is_gone_do_not_crash(daemon: DaemonProcess, end: End) -> None:
    space, keys = prefix_of(daemon.client(staging_bytes=16 << 20), "views")
    store(space, keys)
    lease = space.acquire(keys)
    view = lease.view(0)
    end(daemon)
    assert view.sum() >= 0, "the memory is still mapped here"
    with pytest.raises(LeaseExpired):
        lease.check()
    with pytest.raises(LeaseExpired):
        lease.read_into(np.zeros((BLOCKS, NBYTES), np.uint8))
    lease.release()
    daemon.start()
    assert fetch(space, keys)[1] == []
