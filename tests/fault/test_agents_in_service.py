"""The daemon's own agents killed or hung under load: their blocks miss for a while, no byte is ever wrong."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from daemon_fixtures import StartDaemon
from daemon_process import DaemonProcess
from derived import chain, contents, fetch, namespace, wrong
from kvstore.v1 import admin_pb2, types_pb2
from kvstore_client import STORED, Client, DeadlineExceeded, Keys, LeaseExpired, Namespace
from polling import eventually

BLOCKS = 96
NBYTES = 256 << 10
WAIT_S = 30.0


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon(
        warm_bytes="64MiB",
        cold_bytes="256MiB",
        hot_device="cpu",
        hot_bytes="48MiB",
        agent_timeout_s=1,
        staging_max_bytes="16MiB",
    )


@pytest.fixture
def space(daemon: DaemonProcess) -> Namespace:
    return namespace(daemon.client(staging_bytes=16 << 20), "m", NBYTES)


def store(space: Namespace, keys: Keys) -> Keys:
    assert space.put(keys, contents(keys, NBYTES), timeout_s=WAIT_S) == [STORED] * len(keys)
    return keys


def flush(daemon: DaemonProcess) -> None:
    assert daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000)).unsaved == 0


def evict(daemon: DaemonProcess, tier: int = types_pb2.TIER_WARM) -> None:
    daemon.ask("Evict", admin_pb2.EvictRequest(tier=tier, bytes=1 << 40))


def serves_again(daemon: DaemonProcess, name: str, restarts: int) -> None:
    def is_back() -> bool:
        tier = daemon.tier(name)
        return tier.restarts >= restarts and tier.state == "ok"

    eventually(is_back, f"a fresh {name} agent")


def read_what_comes(space: Namespace, keys: Keys) -> int:
    """Read a prefix while its agent may die: how many blocks came; every one of them right."""
    out = np.zeros((len(keys), NBYTES), np.uint8)
    with space.acquire(keys, timeout_s=WAIT_S) as lease:
        if not lease.blocks:
            return 0
        try:
            count = lease.read_into(out, timeout_s=WAIT_S)
        except (LeaseExpired, DeadlineExceeded):
            return 0
    assert not wrong(keys, out[:count])
    return count


# -- the cold agent


def test_a_cold_agent_killed_while_it_fills_slots(daemon: DaemonProcess, space: Namespace) -> None:
    """Four times, a little later each: its blocks are misses until it is back, then every one is there again."""
    keys = store(space, chain(space, BLOCKS))
    flush(daemon)
    lost = 0
    for kill in range(4):
        evict(daemon)
        evict(daemon, types_pb2.TIER_HOT)
        agent = daemon.agent("cold")
        timer = threading.Timer(0.004 * kill, agent.send_signal, (signal.SIGKILL,))
        timer.start()
        count = read_what_comes(space, keys)
        timer.join()
        lost += BLOCKS - count
        serves_again(daemon, "cold", kill + 1)
        eventually(lambda: daemon.stats().counters["slots_filling"] == 0, "no slot to be left half filled")
        assert fetch(space, keys) == (BLOCKS, [])
    assert lost > 0, "not one of the kills came in time to be seen"
    assert daemon.tier("cold").corrupt == 0
    eventually(lambda: daemon.stats().leases == 0, "the leases to end")


def test_a_cold_agent_killed_while_blocks_spill(daemon: DaemonProcess, space: Namespace) -> None:
    stop = threading.Event()
    killed: list[int] = []

    def kill_now_and_then() -> None:
        while not stop.wait(0.05):
            agent = daemon.agent("cold")
            killed.append(agent.pid)
            agent.send_signal(signal.SIGKILL)
            serves_again(daemon, "cold", len(killed))

    thread = threading.Thread(target=kill_now_and_then)
    thread.start()
    try:
        for seed in range(12):
            store(space, chain(space, 64, seed))  # puts never wait for the SSD
    finally:
        stop.set()
        thread.join()
    assert killed
    for seed in range(12):
        assert fetch(space, chain(space, 64, seed))[1] == []
    keys = store(space, chain(space, 64, seed=100))
    flush(daemon)
    evict(daemon)
    evict(daemon, types_pb2.TIER_HOT)
    assert fetch(space, keys) == (64, [])
    assert daemon.ask("Verify", admin_pb2.VerifyRequest(tier=types_pb2.TIER_COLD)).corrupt == 0


def test_a_hung_cold_agent_is_replaced(daemon: DaemonProcess, space: Namespace) -> None:
    """SIGSTOP: reads of its blocks end in time, others are not held up, and a fresh one has all blocks."""
    keys = store(space, chain(space, BLOCKS))
    flush(daemon)
    evict(daemon)
    other = store(space, chain(space, 8, seed=1))
    daemon.agent("cold").send_signal(signal.SIGSTOP)
    lease = space.acquire(keys)
    assert lease.blocks == BLOCKS
    assert lease.ready == 0
    assert lease.wait(BLOCKS, timeout_s=0.05) == 0
    assert fetch(space, other) == (8, []), "what is warm is served all the while"
    more = store(space, chain(space, 8, seed=2))
    with pytest.raises((LeaseExpired, DeadlineExceeded)):
        pytest.fail(f"blocks that nobody has read: {lease.view(0)}")
    lease.release()
    serves_again(daemon, "cold", 1)
    assert re.search(r"cold agent: no answer to [A-Z_]+ within 1 s; it is killed", daemon.log())
    assert fetch(space, keys) == (BLOCKS, [])
    assert fetch(space, more) == (8, [])


def test_an_agent_that_cannot_start_again_takes_its_blocks_along_and_nothing_else(
    daemon: DaemonProcess, space: Namespace
) -> None:
    """A file where its folder was: cold blocks are misses, warm goes on; when it is repaired they are back."""
    keys = store(space, chain(space, BLOCKS))
    flush(daemon)
    evict(daemon)
    evict(daemon, types_pb2.TIER_HOT)
    cold = daemon.state_dir / "cold"
    cold.rename(daemon.state_dir / "kept")
    cold.write_text("in the way")
    daemon.agent("cold").send_signal(signal.SIGKILL)
    eventually(lambda: daemon.tier("cold").state.startswith("down"), "the cold tier to be down")
    assert space.match(keys).blocks == 0
    assert not any(space.exists(keys))
    assert fetch(space, keys) == (0, [])
    others = store(space, chain(space, 8, seed=1))
    assert fetch(space, others) == (8, [])
    cold.unlink()
    (daemon.state_dir / "kept").rename(cold)
    eventually(lambda: daemon.tier("cold").state == "ok", "the cold tier to be back")
    assert fetch(space, keys) == (BLOCKS, [])


# -- the hot agent


@pytest.fixture
def promoted(daemon: DaemonProcess, space: Namespace) -> Keys:
    """A prefix that is hot and cold, and not warm."""
    keys = store(space, chain(space, BLOCKS))
    flush(daemon)
    for _ in range(3):
        assert fetch(space, keys) == (BLOCKS, [])
    eventually(lambda: daemon.tier("hot").blocks == BLOCKS, "every block to be in hot")
    evict(daemon)
    return keys


def test_a_hot_agent_killed_while_it_fills_slots(daemon: DaemonProcess, space: Namespace, promoted: Keys) -> None:
    """What it had is gone with it; the cold copies serve."""
    agent = daemon.agent("hot")
    timer = threading.Timer(0.003, agent.send_signal, (signal.SIGKILL,))
    timer.start()
    read_what_comes(space, promoted)
    timer.join()
    serves_again(daemon, "hot", 1)
    assert fetch(space, promoted) == (BLOCKS, [])
    assert daemon.tier("hot").blocks <= BLOCKS
    eventually(lambda: daemon.stats().counters["slots_filling"] == 0, "no slot to be left half filled")


def test_blocks_that_only_the_hot_agent_had_are_misses(daemon: DaemonProcess, space: Namespace, promoted: Keys) -> None:
    evict(daemon, types_pb2.TIER_COLD)
    assert space.match(promoted).by_tier == {"hot": BLOCKS, "warm": 0, "cold": 0}
    daemon.agent("hot").send_signal(signal.SIGKILL)
    serves_again(daemon, "hot", 1)
    assert space.match(promoted).blocks == 0
    assert fetch(space, promoted) == (0, [])
    assert daemon.stats().orphans == 0
    store(space, promoted)
    assert fetch(space, promoted) == (BLOCKS, [])


def test_a_hung_hot_agent_is_replaced(daemon: DaemonProcess, space: Namespace, promoted: Keys) -> None:
    daemon.agent("hot").send_signal(signal.SIGSTOP)
    read_what_comes(space, promoted)
    serves_again(daemon, "hot", 1)
    assert fetch(space, promoted) == (BLOCKS, [])


# -- both, under load


@pytest.fixture
def stopping() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_agents_are_killed_again_and_again_under_load(
    daemon: DaemonProcess, space: Namespace, stopping: threading.Event
) -> None:
    """Two workers put and get for a while as agents die: all that is read is right, and at the end all works."""
    failures: list[str] = []

    def work(first_seed: int) -> None:
        with Client(daemon.address, staging_bytes=8 << 20) as client:
            mine = namespace(client, "m", NBYTES)
            seed = first_seed
            while not stopping.is_set():
                keys = chain(mine, 24, seed)
                mine.put(keys, contents(keys, NBYTES), timeout_s=WAIT_S)
                for back in (0, 3, 6):
                    older = chain(mine, 24, max(first_seed, seed - back))
                    try:
                        read_what_comes(mine, older)
                    except AssertionError as error:
                        failures.append(str(error))
                seed += 1

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    children = set()
    for kill in range(8):
        time.sleep(0.15)  # not a wait for anything: a while of load between two kills
        agents = daemon.agents()
        victim = agents[kill % len(agents)] if agents else None
        if victim is not None and victim.pid not in children:
            children.add(victim.pid)
            victim.send_signal(signal.SIGKILL)
    stopping.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(children) > 2
    for name in ("cold", "hot"):
        serves_again(daemon, name, 0)
    assert all(isinstance(agent, psutil.Process) for agent in daemon.agents())
    keys = store(space, chain(space, 24, seed=9))
    assert fetch(space, keys) == (24, [])
    eventually(lambda: daemon.stats().counters["slots_filling"] == 0, "no slot to be left half filled")
