"""Defects that the simulation (tests/simulation) found, each as the shortest story that shows it."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from core_checks import check
from core_world import World, chain
from kvstore.core.block import COLD, HOT
from kvstore.core.puts import PutStatus, Reject
from kvstore.engine.catalogue import Catalogue
from kvstore.engine.store import Store, StoreConfig
from kvstore.protocol.layout import KVLayout, TensorSpec
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.v1 import kvstore_pb2

PAGE = 4096
NBYTES = 1024


class _Peer:
    pid = 1
    uid = 1


def test_a_put_that_waits_for_a_slab_does_not_outlive_a_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room_bytes = [0]
    store = Store(StoreConfig(tmp_path, warm_bytes=1 << 20, lock_pages=False), lambda: room_bytes[0])
    session = store.open_session(_Peer(), "worker", "tenant")
    store.attach_staging(session, 1 << 16)
    layout = KVLayout([TensorSpec("kv", "uint8", (NBYTES,), "layer")])
    space = store.open_namespace(session, NamespaceSpec("model", "1", 16, "chain", layout))

    def cleared_meanwhile(*_: object) -> None:
        store._lock.release()  # as the wait does
        room_bytes[0] = 1 << 40
        store.clear(session, space.digest)
        store._lock.acquire()

    monkeypatch.setattr(store._slabs, "await_slabs", cleared_meanwhile)
    assert session.staging is not None
    session.staging.array[:NBYTES] = np.arange(NBYTES, dtype=np.uint16).astype(np.uint8)
    request = kvstore_pb2.PutRequest(namespace=space.digest, keys=chain(1)[0], block_nbytes=NBYTES)
    statuses, reasons = store.put(session, request, deadline_s=1e12)
    assert (statuses[0], reasons[0]) == (PutStatus.REJECTED, Reject.CLEARED)
    assert store.exists(session, space.digest, chain(1)[0]) == b"\0"
    store.close_session(session)
    store._slabs.close()


def test_a_block_that_comes_back_from_hot_is_not_to_be_saved_where_there_is_no_cold_tier() -> None:
    world = World(hot_bytes=4 * PAGE, promote_hits=2)
    space = world.open()
    world.put(space, chain(1))
    for _ in range(2):
        world.release(world.lease(space, chain(1)))
    assert world.promote_all() == 1
    world.cache.residency.evict_warm(space.blocks[chain(1)[0]])
    world.lease(space, chain(1))
    world.load_all()
    check(world)
    assert not world.cache.residency.urgent


def test_a_hole_that_is_filled_again_forgets_the_lossy_copy_that_it_had() -> None:
    world = World(cold_bytes=16 * PAGE)
    space = world.open(cold_codec="int8kv")
    world.put(space, chain(2))
    world.save_all()
    above, below = (space.blocks[key] for key in chain(2))
    for block in (below, above):
        world.cache.residency.evict_warm(block)
    assert above.lossy
    world.cache.residency.evict_below(above, COLD)  # as a check of the medium does with a copy that is damaged
    assert below.orphan
    world.put(space, chain(1), variant=7)
    # What a save tells the agent; it would refuse bytes of another checksum for ever.
    assert (above.lossy or above.checksum) == above.checksum == world.memory.contents[above.slot.ref].checksum


def test_what_an_agent_took_before_it_died_is_lost_with_it() -> None:
    world = World(hot_bytes=4 * PAGE, promote_hits=1)
    space = world.open()
    world.put(space, chain(1))
    world.release(world.lease(space, chain(1)))
    [save] = world.start_promotions()
    world.lose_tier(HOT)
    world.cache.residency.up[HOT] = True  # the next one serves before the answer of the last one is told
    world.end_save(save)
    world.media[HOT].clear()
    assert not space.blocks[chain(1)[0]].copies & HOT
    check(world)


def test_a_clear_is_durable_also_where_the_namespace_could_not_be_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(catalogue: Catalogue) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    spec = NamespaceSpec("model", "1", 16, "chain", KVLayout([TensorSpec("kv", "uint8", (NBYTES,), "layer")]))
    digest, catalogue = spec.digest("tenant"), Catalogue(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Catalogue, "_write", full)
        with pytest.raises(OSError, match="no space"):
            catalogue.add(digest, "tenant", spec, 0)
        with pytest.raises(OSError, match="no space"):  # it is not cleared, then
            catalogue.set_epoch(digest, 1)
        assert digest not in catalogue.entries
    catalogue.set_epoch(digest, 1)
    restarted = Catalogue(tmp_path)
    restarted.load()
    assert restarted.entries[digest].epoch == 1
