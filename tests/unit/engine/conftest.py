from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from played_media import EngineRig


@pytest.fixture
def make_rig() -> Iterator[Callable[..., EngineRig]]:
    """Makes rigs that end with the test."""
    made: list[EngineRig] = []

    def make(**settings: int) -> EngineRig:
        made.append(EngineRig(**settings))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., EngineRig]) -> EngineRig:
    """64 slots of warm, plenty of cold, no hot."""
    return make_rig()
