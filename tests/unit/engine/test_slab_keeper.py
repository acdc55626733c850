"""The thread that makes slabs must not end, whatever it meets."""

from __future__ import annotations

import pytest

from kvstore.core.block import Namespace
from kvstore.engine.slab_keeper import SlabKeeper
from kvstore.protocol.slab import slot_bytes_for
from played_media import NBYTES, EngineRig
from polling import eventually


def test_a_defect_costs_its_step_and_not_the_thread(
    rig: EngineRig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it was asked for is let go, so that it does not fail for ever; the next request is served."""

    def fail(slab_id: int) -> None:
        raise ZeroDivisionError("nobody thought of this")

    keeper = SlabKeeper(rig.lock, rig.cache, rig.pool, lambda: 1 << 40, lambda slab_id: None)
    space: Namespace = rig.space
    keeper.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(rig.pool, "populate", fail)
            keeper.expect(space)
            eventually(lambda: "nobody thought of this" in caplog.text, "the defect to be met")
            eventually(lambda: keeper._demand is None, "the demand to be let go")
        with rig.lock:
            keeper.starve(space, 1)
            keeper.await_slabs(space, 30.0)
        assert slot_bytes_for(NBYTES) == space.slot_bytes
        eventually(lambda: not keeper._starving, "the starving class to be answered")
    finally:
        keeper.close()
