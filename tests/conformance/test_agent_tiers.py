"""The tier contract over supervised agents: real processes, and blocks in a memfd that both sides map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from agent_rig import cold_config, hot_config
from kvstore.engine.supervisor import AgentSupervisor
from kvstore.tiers.base import SlabMemory
from kvstore.tiers.conformance import DURABLE_CHECKS, TIER_CHECKS, Check
from kvstore.tiers.memory import ArrayMemory
from kvstore.tiers.segment import Segment
from kvstore.v1 import agent_pb2

Configure = Callable[[Path, int], agent_pb2.AgentConfig]


def cold(path: Path, capacity_bytes: int) -> agent_pb2.AgentConfig:
    return cold_config(path / "cold", capacity_bytes)


def hot(_path: Path, capacity_bytes: int) -> agent_pb2.AgentConfig:
    return hot_config(capacity_bytes)


class Factory:
    """Makes supervised agents for the kit, whose memory becomes a segment that an agent can map."""

    def __init__(self, configure: Configure, path: Path) -> None:
        self._configure = configure
        self._path = path
        self._segment: Segment | None = None
        self.made: list[AgentSupervisor] = []

    def __call__(self, memory: SlabMemory, capacity_bytes: int) -> AgentSupervisor:
        kit_memory = cast(ArrayMemory, memory)
        if self._segment is None:  # the kit has not used its memory yet
            self._segment = Segment("kit", kit_memory.array.nbytes)
            kit_memory.array = self._segment.array
        config = self._configure(self._path, capacity_bytes)
        supervisor = AgentSupervisor(config.tier, config)
        self.made.append(supervisor)
        supervisor.start()
        supervisor.map_slab(kit_memory.slab_id, self._segment.fd, self._segment.nbytes)
        return supervisor

    def close(self) -> None:
        for supervisor in self.made:
            supervisor.close()
        if self._segment is not None:
            self._segment.close()


@pytest.fixture
def factory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Factory]:
    made = Factory(request.param, tmp_path)
    yield made
    made.close()
    assert all(supervisor.pid is None for supervisor in made.made)
    assert [supervisor.restarts for supervisor in made.made] == [0] * len(made.made)


@pytest.mark.parametrize("check", TIER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("factory", [cold, hot], indirect=True, ids=["cold", "hot"])
def test_supervised_tier(factory: Factory, check: Check) -> None:
    check(factory)


@pytest.mark.parametrize("check", DURABLE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("factory", [cold], indirect=True, ids=["cold"])
def test_supervised_durable_tier(factory: Factory, check: Check) -> None:
    check(factory)
