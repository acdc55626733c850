"""A damaged disk: never a wrong byte, never a lookup that fails for ever. Defects 2 and 8 of peers."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon_fixtures import StartDaemon
from daemon_process import DaemonProcess
from derived import chain, contents, fetch, namespace
from kvstore.v1 import admin_pb2, types_pb2
from kvstore_client import STORED, Keys, Namespace, Unavailable
from polling import eventually

BLOCKS = 64
NBYTES = 64 << 10
PAGE = 4096
PARTS = ("payload", "records")


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon(warm_bytes="64MiB", cold_bytes="64MiB")


@pytest.fixture
def space(daemon: DaemonProcess) -> Namespace:
    return namespace(daemon.client(staging_bytes=8 << 20), "m", NBYTES)


@pytest.fixture
def saved(daemon: DaemonProcess, space: Namespace) -> Keys:
    """A prefix that is in the cold tier and nowhere else."""
    keys = chain(space, BLOCKS)
    assert space.put(keys, contents(keys, NBYTES)) == [STORED] * BLOCKS
    assert daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000)).unsaved == 0
    evict(daemon)
    return keys


def evict(daemon: DaemonProcess) -> None:
    daemon.ask("Evict", admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1 << 40))


def data_file(daemon: DaemonProcess, part: str = "payload") -> Path:
    """The file of the payloads, or of the records."""
    return daemon.state_dir / "cold" / part / "data.mdb"


def used_pages(path: Path) -> int:
    """Pages of the sparse file that hold something; a page of zeros does not count."""
    size = path.stat().st_size
    return min(size, path.stat().st_blocks * 512) // PAGE


def flip(path: Path, bits: int, seed: int, first_page: int = 2) -> None:
    """Flip so many bits at random places of what has been written."""
    dice = random.Random(seed)
    pages = used_pages(path)
    with path.open("r+b", buffering=0) as file:
        for _ in range(bits):
            at = dice.randrange(first_page * PAGE, pages * PAGE)
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1 << dice.randrange(8)]))


def check_goes_on(daemon: DaemonProcess, space: Namespace, saved: Keys) -> None:
    """Whatever happened to the disk: it heals, and the same blocks and new ones can be stored and read from cold.

    Damage that nobody has met yet may cost another agent, and what that one had just saved, but no more than once.
    """
    both = (saved, chain(space, BLOCKS, seed=7))

    def comes_back() -> bool:
        try:
            for keys in both:
                if not all(outcome.is_stored for outcome in space.put(keys, contents(keys, NBYTES), timeout_s=30)):
                    return False
            if daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000)).unsaved:
                return False
        except Unavailable:
            return False
        evict(daemon)
        found = [fetch(space, keys) for keys in both]
        assert [bad for _, bad in found] == [[], []]
        return [count for count, _ in found] == [BLOCKS, BLOCKS]

    eventually(comes_back, "the cold tier to keep what it is given")


# -- bits


def test_defect_2_flipped_bits_under_a_running_daemon(daemon: DaemonProcess, space: Namespace, saved: Keys) -> None:
    """Ten rounds of twenty bits in the data pages: what fails its checksum is dropped, counted, and a miss."""
    missing = 0
    for round_ in range(10):
        flip(data_file(daemon), 20, seed=round_)
        count, bad = fetch(space, saved)
        assert not bad
        missing += BLOCKS - count
        evict(daemon)
        eventually(lambda: daemon.tier("cold").state == "ok", "the cold tier to serve")
    assert missing > 0, "two hundred bits were flipped and nothing was lost: that were not the blocks' pages"
    check_goes_on(daemon, space, saved)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bits", [1, 50, 2000])
def test_defect_2_flipped_bits_at_a_restart(
    daemon: DaemonProcess, space: Namespace, saved: Keys, bits: int, part: str
) -> None:
    """Anywhere in the file, its trees and the blocks' records included."""
    for round_ in range(2):
        daemon.stop()
        flip(data_file(daemon, part), bits, seed=100 * bits + round_)
        daemon.start()
        assert fetch(space, saved)[1] == []
        evict(daemon)
    check_goes_on(daemon, space, saved)


def test_defect_2_one_bad_block_costs_one_block(start_daemon: StartDaemon) -> None:
    """A hole in a chain: the blocks behind it are orphans, count as absent, and are back with the lost one."""
    daemon = start_daemon(codec="raw")  # so that the block can be found in the file
    space = namespace(daemon.client(staging_bytes=8 << 20), "m", NBYTES)
    keys = chain(space, BLOCKS)
    assert space.put(keys, contents(keys, NBYTES)) == [STORED] * BLOCKS
    daemon.stop()
    path = data_file(daemon)
    at = path.read_bytes().find(contents(keys[10:11], NBYTES)[0][:1000].tobytes())
    assert at > 0
    with path.open("r+b") as file:
        file.seek(at + 500)
        file.write(bytes(1))
    daemon.start()
    assert fetch(space, keys) == (10, [])
    assert daemon.tier("cold").corrupt == 1
    assert space.match(keys).blocks == 10
    assert space.exists(keys) == [True] * 10 + [False] * (BLOCKS - 10)
    assert daemon.stats().orphans == BLOCKS - 11
    one = keys[10:11]
    assert space.put(one, contents(one, NBYTES)) == [STORED]
    assert space.match(keys).blocks == BLOCKS, "found again, without being stored again"
    assert fetch(space, keys) == (BLOCKS, [])
    assert daemon.tier("cold").corrupt == 1


# -- the whole file


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: cut(path, 0),
    "one byte": lambda path: cut(path, 1),
    "one page": lambda path: cut(path, PAGE),
    "two pages": lambda path: cut(path, 2 * PAGE),
    "a quarter": lambda path: cut(path, used_pages(path) // 4 * PAGE),
    "all but a page": lambda path: cut(path, (used_pages(path) - 1) * PAGE),
    "half a page": lambda path: cut(path, used_pages(path) // 2 * PAGE + 1000),
    "random bytes": lambda path: path.write_bytes(random.Random(1).randbytes(64 * PAGE)) and None,
    "a text": lambda path: path.write_text("not a database at all") and None,
    "bad meta pages": lambda path: flip_meta(path),
}


def flip_meta(path: Path) -> None:
    with path.open("r+b") as file:
        for page in (0, 1):
            file.seek(page * PAGE + 16)
            file.write(b"\xff" * 64)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_defect_2_a_damaged_file_is_set_aside_and_the_tier_works(
    daemon: DaemonProcess, space: Namespace, saved: Keys, damage: str, part: str
) -> None:
    daemon.stop()
    DAMAGE[damage](data_file(daemon, part))
    daemon.start()
    assert fetch(space, saved)[1] == []
    assert fetch(space, saved)[1] == []
    check_goes_on(daemon, space, saved)


@pytest.mark.parametrize("part", PARTS)
def test_defect_2_a_file_cut_under_a_running_daemon(
    daemon: DaemonProcess, space: Namespace, saved: Keys, part: str
) -> None:
    """SIGBUS for whoever reads it: the agent may die, the daemon does not, and the next agent starts afresh."""
    path = data_file(daemon, part)
    cut(path, used_pages(path) // 2 * PAGE)
    for _ in range(3):
        assert fetch_or_nothing(space, saved)[1] == []
        eventually(lambda: daemon.tier("cold").state == "ok", "the cold tier to serve")
    check_goes_on(daemon, space, saved)


def fetch_or_nothing(space: Namespace, keys: Keys) -> tuple[int, list[int]]:
    return fetch(space, keys) if space.match(keys).blocks else (0, [])


def test_a_cold_folder_that_is_gone_is_made_again(daemon: DaemonProcess, space: Namespace, saved: Keys) -> None:
    daemon.stop()
    shutil.rmtree(daemon.state_dir / "cold")
    daemon.start()
    assert fetch(space, saved) == (0, [])
    check_goes_on(daemon, space, saved)


@pytest.mark.parametrize("damage", ["gone", "garbage", "cut"])
def test_defect_8_without_its_catalogue_cold_blocks_are_swept_and_not_orphaned(
    daemon: DaemonProcess, space: Namespace, saved: Keys, damage: str
) -> None:
    """The file that says which namespaces there are, and at which epoch: without it no block can be trusted."""
    daemon.stop()
    catalogue = daemon.state_dir / "namespaces.bin"
    if damage == "gone":
        catalogue.unlink()
    elif damage == "garbage":
        catalogue.write_bytes(random.Random(2).randbytes(500))
    else:
        cut(catalogue, catalogue.stat().st_size // 2)
    daemon.start()
    assert fetch(space, saved) == (0, [])
    eventually(lambda: daemon.tier("cold").used_bytes == 0, "what nobody can name to be swept")
    check_goes_on(daemon, space, saved)
