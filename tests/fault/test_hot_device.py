"""A hot tier on a CUDA device as a whole daemon sees it; the driver that its agent imports has host memory.

What a real driver does differently is for tests/gpu to find out.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from daemon_fixtures import StartDaemon
from daemon_process import DaemonProcess
from derived import chain, contents, fetch, namespace
from fake_site import FakeSite
from kvstore.v1 import admin_pb2, types_pb2
from kvstore_client import STORED, Keys, Namespace
from polling import eventually

BLOCKS = 32
NBYTES = 256 << 10
MIB = 1 << 20


@pytest.fixture
def site(tmp_path: Path) -> FakeSite:
    return FakeSite(tmp_path / "site")


def start(start_daemon: StartDaemon, site: FakeSite, **settings: object) -> DaemonProcess:
    wanted = {"warm_bytes": "64MiB", "hot_device": "cuda:0", "hot_bytes": "32MiB", "agent_timeout_s": 1, **settings}
    return start_daemon(environment=site.environment(), staging_max_bytes="16MiB", **wanted)


def space_on(daemon: DaemonProcess) -> Namespace:
    return namespace(daemon.client(staging_bytes=16 * MIB), "hot", NBYTES)


def make_hot(daemon: DaemonProcess, space: Namespace, seed: int = 0) -> Keys:
    """Blocks that hot has, and warm no more."""
    keys = chain(space, BLOCKS, seed)
    assert space.put(keys, contents(keys, NBYTES), timeout_s=30.0) == [STORED] * BLOCKS
    assert daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000)).unsaved == 0
    for _ in range(3):
        assert fetch(space, keys) == (BLOCKS, [])
    eventually(lambda: space.match(keys).by_tier["hot"] == BLOCKS, "every block to be in hot")
    evict_warm(daemon)
    return keys


def evict_warm(daemon: DaemonProcess) -> None:
    daemon.ask("Evict", admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1 << 40))


def test_blocks_come_back_from_the_device_byte_by_byte(start_daemon: StartDaemon, site: FakeSite) -> None:
    daemon = start(start_daemon, site)
    space = space_on(daemon)
    keys = make_hot(daemon, space)
    assert fetch(space, keys) == (BLOCKS, [])
    hot = daemon.tier("hot")
    assert (hot.device, hot.state, hot.capacity_bytes) == ("cuda:0 (Fake GPU, CUDA 13.0)", "ok", 32 * MIB)
    assert hot.hits == BLOCKS and daemon.tier("cold").hits == 0
    eventually(lambda: daemon.tier("hot").medium["pinned_bytes"] > 0, "the agent to say what it pinned")


def test_what_is_deleted_and_stored_anew_is_never_the_old_bytes(start_daemon: StartDaemon, site: FakeSite) -> None:
    daemon = start(start_daemon, site)
    space = space_on(daemon)
    old = make_hot(daemon, space)
    space.delete(old)
    fresh = make_hot(daemon, space, seed=1)
    assert fetch(space, old) == (0, [])
    assert fetch(space, fresh) == (BLOCKS, [])


def test_the_agent_sees_the_devices_that_the_daemon_sees(start_daemon: StartDaemon, site: FakeSite) -> None:
    environment = {**site.environment(), "CUDA_VISIBLE_DEVICES": "3", "SECRET": "x"}
    daemon = start_daemon(environment=environment, hot_device="cuda:0", hot_bytes="16MiB", cold_bytes=0)
    found = daemon.agents()[0].environ()
    assert found["CUDA_VISIBLE_DEVICES"] == "3" and "SECRET" not in found


def test_a_share_is_of_what_the_device_has_free(start_daemon: StartDaemon, site: FakeSite) -> None:
    daemon = start(start_daemon, site, hot_bytes="25%")
    assert daemon.tier("hot").capacity_bytes == 16 * MIB


def test_the_hot_tier_is_resized_while_it_serves(start_daemon: StartDaemon, site: FakeSite) -> None:
    daemon = start(start_daemon, site)
    space = space_on(daemon)
    keys = make_hot(daemon, space)
    request = admin_pb2.ResizeRequest(tier=types_pb2.TIER_HOT, capacity_bytes=4 * MIB)
    assert daemon.ask("Resize", request).capacity_bytes == 4 * MIB
    eventually(lambda: daemon.tier("hot").used_bytes <= 4 * MIB, "what is over it to leave")
    eventually(lambda: daemon.tier("hot").medium["slabs"] == 1, "the memory to be given back")
    assert fetch(space, keys) == (BLOCKS, []), "from hot and cold"
    request.capacity_bytes = 48 * MIB
    assert daemon.ask("Resize", request).capacity_bytes == 48 * MIB
    assert daemon.tier("hot").capacity_bytes == 48 * MIB
    daemon.agent("hot").kill()
    eventually(lambda: daemon.tier("hot").restarts == 1 and daemon.tier("hot").state == "ok", "a fresh hot agent")
    assert daemon.tier("hot").capacity_bytes == 48 * MIB, "the next agent has the new size"


def test_a_device_with_less_memory_serves_what_it_has(start_daemon: StartDaemon, site: FakeSite) -> None:
    site.has(6 * MIB)
    daemon = start(start_daemon, site)
    space = space_on(daemon)
    keys = chain(space, BLOCKS)
    assert space.put(keys, contents(keys, NBYTES), timeout_s=30.0) == [STORED] * BLOCKS
    for _ in range(3):
        assert fetch(space, keys) == (BLOCKS, [])
    eventually(lambda: daemon.tier("hot").blocks >= 12, "what fits to be promoted")
    hot = daemon.tier("hot")
    assert (hot.capacity_bytes, hot.state) == (4 * MIB, "ok"), "one slab of 4 MiB of the eight wanted"
    assert hot.used_bytes <= hot.capacity_bytes
    evict_warm(daemon)
    assert fetch(space, keys) == (BLOCKS, []), "from hot and cold together"


@pytest.mark.parametrize(
    ("call", "result", "device", "reason"),
    [
        ("cuInit", "CUDA_ERROR_NO_DEVICE", "cuda:0", "no usable CUDA driver: cuInit: CUDA_ERROR_NO_DEVICE"),
        ("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY", "cuda:0", "not even one slab of"),
        ("cuMemCreate", "CUDA_ERROR_LAUNCH_FAILED", "cuda:0", "cuMemCreate: CUDA_ERROR_LAUNCH_FAILED"),
        ("", "", "cuda:3", "there is no cuda:3: the driver sees 1 CUDA devices"),
    ],
)
def test_without_its_device_hot_is_off_with_the_reason(
    start_daemon: StartDaemon, site: FakeSite, call: str, result: str, device: str, reason: str
) -> None:
    if call:
        site.fault(call, result)
    daemon = start(start_daemon, site, hot_device=device)
    hot = daemon.tier("hot")
    assert hot.state.startswith("down: ") and reason in hot.state
    space = space_on(daemon)
    keys = chain(space, BLOCKS)
    assert space.put(keys, contents(keys, NBYTES), timeout_s=30.0) == [STORED] * BLOCKS
    for _ in range(3):
        assert fetch(space, keys) == (BLOCKS, [])


def test_without_the_package_hot_is_off_with_what_to_install(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(hot_device="cuda:0")
    assert "install the package cuda-bindings" in daemon.tier("hot").state


def test_a_killed_agent_costs_hot_its_blocks_and_nothing_else(start_daemon: StartDaemon, site: FakeSite) -> None:
    daemon = start(start_daemon, site)
    space = space_on(daemon)
    keys = make_hot(daemon, space)
    daemon.agent("hot").send_signal(signal.SIGKILL)
    eventually(lambda: daemon.tier("hot").restarts == 1 and daemon.tier("hot").state == "ok", "a fresh hot agent")
    assert space.match(keys).by_tier["hot"] == 0
    assert fetch(space, keys) == (BLOCKS, []), "from cold"


@pytest.mark.parametrize("what", ["hang", "CUDA_ERROR_LAUNCH_FAILED"])
def test_a_driver_that_hangs_or_breaks_costs_its_agent(start_daemon: StartDaemon, site: FakeSite, what: str) -> None:
    """Nobody waits for longer than the agent's time-out, the blocks come from cold, and a fresh agent serves."""
    daemon = start(start_daemon, site)
    space = space_on(daemon)
    keys = make_hot(daemon, space)
    site.fault("cuEventQuery", what)
    assert fetch(space, keys)[1] == [], "what goes with its agent is a miss"
    site.mend("cuEventQuery")
    eventually(lambda: daemon.tier("hot").restarts >= 1 and daemon.tier("hot").state == "ok", "a fresh hot agent")
    assert fetch(space, keys) == (BLOCKS, []), "from cold"
    assert fetch(space, make_hot(daemon, space, seed=2)) == (BLOCKS, [])
