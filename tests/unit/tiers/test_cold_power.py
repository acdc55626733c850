"""What a power loss leaves is walked before it is used; damaged trees are set aside, damaged payloads are misses."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

from cold_rig import NEXT_BOOT, THIS_BOOT, WRONG_BYTES_STATUS, ColdRig, fresh_seed, quick, ref, run_child
from kvstore.tiers.base import Outcome
from kvstore.tiers.cold_file import EnvironmentFile
from kvstore.tiers.cold_pages import DamagedPagesError, read_metas, subtree, verify, walk
from kvstore.tiers.cold_sync import Durability

OK, MISSING, CORRUPT, BUSY, FULL = Outcome
PAGE = 4096


def overwrite(path: Path, at: int, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(new)


def check(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        verify(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("durability", ["none", "interval", "commit"])
def test_a_whole_store_is_kept_after_a_power_loss(tmp_path: Path, durability: Durability) -> None:
    with ColdRig(tmp_path / "cold", quick(durability=durability)) as rig:
        rig.store(range(100))
        rig.tier.delete([ref(number) for number in range(0, 100, 3)])
        assert (tmp_path / "cold" / "session").read_text().split()[0] == THIS_BOOT
        rig.crash()
        rig.open(quick(boot_id=NEXT_BOOT))
        assert rig.tier.set_aside is None
        assert rig.read(range(100)) == [OK if number % 3 else MISSING for number in range(100)]
        rig.store(range(100))


@pytest.mark.parametrize("durability", ["none", "interval", "commit"])
@pytest.mark.parametrize("which", ["payload", "records"])
def test_a_tree_that_a_power_loss_damaged_is_set_aside(tmp_path: Path, durability: Durability, which: str) -> None:
    """A page that never reached the disk, though the page that names it did."""
    with ColdRig(tmp_path / "cold", quick(durability=durability)) as rig:
        rig.store(range(100))
        rig.crash()
        data = tmp_path / "cold" / which / "data.mdb"
        fd = os.open(data, os.O_RDONLY)
        main = read_metas(fd)[0].main
        tree = subtree(fd, main, b"blocks") if which == "payload" else main
        os.close(fd)
        assert tree is not None
        overwrite(data, tree.root * PAGE, bytes(PAGE))
        rig.open(quick(boot_id=NEXT_BOOT))
        assert rig.tier.set_aside is not None
        assert rig.tier.stats()["set_aside"] == 1
        assert rig.held() == set()
        rig.store(range(10))


def test_a_payload_that_a_power_loss_damaged_costs_that_block(tmp_path: Path) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(range(10))
        (found,) = rig.tier._reader.look_up([b"".join(ref(4))])
        assert found is not None
        rig.crash()
        overwrite(tmp_path / "cold" / "payload" / "data.mdb", (found.page + 3) * PAGE, bytes(2 * PAGE))
        rig.open(quick(boot_id=NEXT_BOOT))
        assert rig.tier.set_aside is None
        assert rig.read(range(10)) == [OK] * 4 + [CORRUPT] + [OK] * 5
        assert rig.read([4]) == [MISSING]


def test_after_a_sync_that_failed_the_next_opening_looks_at_the_trees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ColdRig(tmp_path / "cold", quick(durability="none")) as rig:
        rig.store(range(20))

        def fail(_file: EnvironmentFile) -> None:
            raise OSError("Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(EnvironmentFile, "sync", fail)
            with pytest.raises(OSError, match="Input/output"):
                rig.tier.flush()
        assert rig.tier.stats()["sync_failures"] == 1
        assert rig.read(range(20)) == [OK] * 20
        rig.tier.close()
        looked: list[int] = []
        monkeypatch.setattr("kvstore.tiers.cold_env.verify", looked.append)
        rig.open(quick())
        assert len(looked) == 2, "both environments"
        rig.reopen()
        assert len(looked) == 2, "once"


def test_who_died_again_and_again_had_a_reason_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMDB meets a damaged free list with SIGABRT at every write: without a look at it that would go on for ever."""
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(range(20))
        looked: list[int] = []

        def look(fd: int) -> None:
            looked.append(fd)
            verify(fd)

        monkeypatch.setattr("kvstore.tiers.cold_env.verify", look)
        for deaths, times in ((1, 0), (2, 0), (3, 2), (4, 4)):
            rig.crash()
            rig.open(quick())
            assert len(looked) == times, f"after {deaths} deaths"
            assert rig.tier.set_aside is None
        rig.reopen()
        rig.crash()
        rig.open(quick())
        assert len(looked) == 4, "a clean close makes good"
        for _ in range(2):
            rig.crash()
            rig.open(quick())
        rig.crash()
        data = tmp_path / "cold" / "payload" / "data.mdb"
        fd = os.open(data, os.O_RDONLY)
        meta = read_metas(fd)[0]
        os.close(fd)
        overwrite(data, meta.free.root * PAGE + 2096, bytes(2000))
        rig.open(quick())
        assert rig.tier.set_aside is not None


def test_every_flip_in_a_tree_is_noticed_or_does_no_harm(tmp_path: Path) -> None:
    """Whatever the walk lets through, LMDB can be used on: it has every page once, and every key in its place."""
    with ColdRig(tmp_path / "cold", block_bytes=6000) as rig:
        rig.store(range(60))
        rig.tier.delete([ref(number) for number in range(10)])
    data = tmp_path / "cold" / "payload" / "data.mdb"
    check(data)
    content = data.read_bytes()
    fd = os.open(data, os.O_RDONLY)
    meta = read_metas(fd)[0]
    tree = subtree(fd, meta.main, b"blocks")
    assert tree is not None
    keys = [node.key for node in walk(fd, tree)]
    os.close(fd)
    roots = {meta.free.root, meta.main.root, tree.root}
    noticed = 0
    rng = random.Random(3)
    for page in sorted(roots):
        for _ in range(300):
            at = page * PAGE + rng.randrange(PAGE)
            overwrite(data, at, bytes([content[at] ^ 1 << rng.randrange(8)]))
            try:
                check(data)
            except DamagedPagesError:
                noticed += 1
            overwrite(data, at, content[at : at + 1])
    check(data)
    assert noticed > 20, "node heads, page numbers, offsets, and the order of keys"
    assert len(keys) == 50


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[:PAGE],
        lambda content: bytes(PAGE * 8),
    ],
)
def test_a_file_that_is_none_is_damaged(tmp_path: Path, damage: object) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(range(5))
    data = tmp_path / "cold" / "payload" / "data.mdb"
    data.write_bytes(damage(data.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DamagedPagesError):
        check(data)


FLIPPED = """
import os, sys
from pathlib import Path
from cold_rig import ColdRig, WRONG_BYTES_STATUS, quick
from kvstore.tiers.base import Outcome
try:
    rig = ColdRig(Path(sys.argv[1]), quick(patience_s=5), block_bytes=8000)
    rig.read(range(120))
    rig.write(range(200, 210))
    rig.read(range(210))
    rig.tier.close()
except AssertionError:
    os._exit(WRONG_BYTES_STATUS)
except OSError:
    os._exit(3)
"""


@pytest.mark.slow
def test_flips_in_the_pages_of_lmdb_are_never_a_wrong_byte(tmp_path: Path) -> None:
    """The process that has it open may die of it, as an agent may; whoever starts the next one gets on."""
    rng = random.Random(fresh_seed())
    endings = []
    with ColdRig(tmp_path / "cold", block_bytes=8000) as rig:
        rig.store(range(120))
    files = [tmp_path / "cold" / name / "data.mdb" for name in ("payload", "records")]
    whole = [file.read_bytes() for file in files]
    for _ in range(12):
        for file, content in zip(files, whole, strict=True):
            damaged = bytearray(content)
            for _ in range(30):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
        done = run_child(FLIPPED, tmp_path / "cold")
        assert done.returncode != WRONG_BYTES_STATUS, done.stderr
        endings.append(done.returncode)
        for file, content in zip(files, whole, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        (tmp_path / "cold" / "condemned").unlink(missing_ok=True)
    sys.stdout.write(f"endings {endings}\n")
