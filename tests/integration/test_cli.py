"""kvctl against a real daemon with a few blocks in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvstore.bench import worker
from kvstore.bench.daemon import SpawnedDaemon, spawned
from kvstore_client import STORED, Client, InvalidRequest

BLOCK_NBYTES = 64 << 10
BLOCKS = 24
WAIT_S = 120


@pytest.fixture(scope="module")
def daemon() -> Iterator[SpawnedDaemon]:
    with spawned(64 << 20, 64 << 20) as running:
        yield running


@pytest.fixture(scope="module")
def keys(daemon: SpawnedDaemon) -> Iterator[Any]:
    """Keys of a stored prefix; its session stays attached and holds a lease."""
    with Client(daemon.address) as client:
        space = worker.namespace(client, BLOCK_NBYTES, "cli")
        made = space.keys(worker.tokens(BLOCKS))
        blocks = np.arange(BLOCKS * BLOCK_NBYTES, dtype=np.uint32).view(np.uint8)[: BLOCKS * BLOCK_NBYTES]
        assert space.put(made, blocks.reshape(BLOCKS, BLOCK_NBYTES), timeout_s=30) == [STORED] * BLOCKS
        with space.acquire(made, timeout_s=30) as lease:
            assert lease.blocks == BLOCKS
            yield made


def kvctl(daemon: SpawnedDaemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvstore.cli.kvctl", "--address", daemon.address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


def answer(daemon: SpawnedDaemon, *arguments: str) -> Any:
    done = kvctl(daemon, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ping(daemon: SpawnedDaemon) -> None:
    assert answer(daemon, "ping")["health"] == "serving"


@pytest.mark.usefixtures("keys")
def test_stats_count_what_is_stored(daemon: SpawnedDaemon) -> None:
    stats = answer(daemon, "stats")
    warm, cold = stats["tiers"]["warm"], stats["tiers"]["cold"]
    assert warm["capacity_bytes"] == 64 << 20
    assert warm["blocks"] == BLOCKS
    assert warm["used_bytes"] >= BLOCKS * BLOCK_NBYTES
    assert (cold["state"], stats["tiers"]["hot"]["state"]) == ("ok", "off")
    assert 0 < cold["capacity_bytes"] <= 64 << 20
    assert stats["put_stored"] == BLOCKS
    assert stats["leases"] == 1


@pytest.mark.usefixtures("keys")
def test_status_shows_tiers_and_sessions(daemon: SpawnedDaemon) -> None:
    done = kvctl(daemon, "status")
    assert done.returncode == 0, done.stderr
    assert "serving" in done.stdout
    assert f"{BLOCKS} blocks" in done.stdout


@pytest.mark.usefixtures("keys")
def test_namespaces_and_sessions(daemon: SpawnedDaemon) -> None:
    (space,) = answer(daemon, "namespaces")
    assert (space["spec"]["model"], space["block_nbytes"], space["blocks"]) == ("bench/cli", BLOCK_NBYTES, BLOCKS)
    holder = [session for session in answer(daemon, "sessions") if session["leases"]]
    assert [session["pinned_blocks"] for session in holder] == [BLOCKS]


def test_inspect_finds_a_block_by_the_beginning_of_its_key(daemon: SpawnedDaemon, keys: Any) -> None:
    (block,) = answer(daemon, "inspect", keys[3].hex()[:12])
    assert (block["key"], block["parent"], block["nbytes"]) == (keys[3].hex(), keys[2].hex(), BLOCK_NBYTES)
    assert "warm" in block["tiers"]
    assert kvctl(daemon, "inspect", "00" * 32).returncode == 1


@pytest.mark.usefixtures("keys")
def test_flush_saves_and_verify_checks_every_block(daemon: SpawnedDaemon) -> None:
    assert answer(daemon, "flush")["unsaved"] == 0
    sound = {"checked": BLOCKS, "corrupt": 0, "missing": 0, "repaired": 0}
    assert answer(daemon, "verify", "cold") == sound
    assert answer(daemon, "verify", "warm") == sound
    cold = answer(daemon, "tiers")["cold"]
    assert cold["raw_bytes"] == BLOCKS * BLOCK_NBYTES
    assert cold["stored_bytes"] > 0


def test_evict_spares_what_is_leased(daemon: SpawnedDaemon, keys: Any) -> None:
    assert answer(daemon, "evict", "warm", "1GiB") == {"blocks": 0, "bytes": 0}
    assert "warm" in answer(daemon, "inspect", keys[0].hex())[0]["tiers"]


def test_log_level(daemon: SpawnedDaemon) -> None:
    assert answer(daemon, "log-level", "debug") == {"level": "debug"}
    assert answer(daemon, "log-level", "info") == {"level": "info"}


def test_a_drained_daemon_reads_on_and_stores_nothing() -> None:
    with spawned(64 << 20, 0) as daemon, Client(daemon.address) as client:
        space = worker.namespace(client, BLOCK_NBYTES, "drained")
        stored = space.keys(worker.tokens(2))
        blocks = np.full((2, BLOCK_NBYTES), 7, dtype=np.uint8)
        assert space.put(stored, blocks, timeout_s=30) == [STORED] * 2
        assert kvctl(daemon, "drain").returncode == 0
        assert answer(daemon, "ping")["health"] == "draining"
        refused = space.put(space.keys(worker.tokens(2, seed=1)), blocks, timeout_s=30)
        assert [repr(outcome) for outcome in refused] == ["REJECTED(DRAINING)"] * 2
        out = np.zeros_like(blocks)
        with space.acquire(stored, timeout_s=30) as lease:
            lease.read_into(out)
        assert (out == blocks).all()


@pytest.mark.parametrize("warm_bytes", [1 << 20, 2 << 20], ids=["half a block", "a block without its slab's header"])
def test_a_pool_smaller_than_a_block_says_so_and_goes_on(warm_bytes: int) -> None:
    with spawned(warm_bytes, 0) as daemon, Client(daemon.address) as client:
        with pytest.raises(InvalidRequest, match=r"does not fit the warm tier of .* larger --warm-bytes"):
            worker.namespace(client, 2 << 20, "too-big")
        small = worker.namespace(client, BLOCK_NBYTES, "fits")
        blocks = np.full((2, BLOCK_NBYTES), 7, dtype=np.uint8)
        assert small.put(small.keys(worker.tokens(2)), blocks, timeout_s=30) == [STORED] * 2
        assert answer(daemon, "ping")["health"] == "serving"


def test_bench_reports_every_result_with_its_targets() -> None:
    command = [sys.executable, "-m", "kvstore.cli.kvctl", "bench", "--spawn", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    missing = set() if shutil.which("openssl") else {"remote_get"}  # it makes its certificates
    assert done.returncode == len(missing), done.stderr
    report = json.loads(done.stdout)
    results = {result["name"]: result for result in report["results"]}
    assert set(results) == {
        "get_256", "get_64", "get_8", "get_1", "get_256k_256", "get_256k_64", "get_256k_8", "get_256k_1", "put_256",
        "put_spill", "call_local_us", "call_grpc_us", "call_busy_p99_us", "match_8192_us", "keys_131072_ms", "idle",
        "import_ratio", "kvctl_help_s", "remote_get",
    } - missing  # fmt: skip
    for result in results.values():
        assert {"must", "goal", "ok"} <= set(result)
    assert results["get_64"]["bytes"] == 16 << 20
    assert results["get_64"]["ratio_memcpy"] > 0
    assert results["put_spill"]["ratio_empty"] > 0
    assert set(report["failures"]) == missing
    assert report["memcpy_gb_s"] > 0
    assert report["environment"]["full_scale"] is False
