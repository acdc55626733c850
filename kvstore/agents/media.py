"""From an agent's configuration to the tier that it serves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvstore.agents.devices import device_for
from kvstore.protocol.errors import InvalidRequest
from kvstore.tiers.base import BlockRef, SlabMemory, StoredRecord, Tier
from kvstore.v1 import agent_pb2


class Durable(Protocol):
    """What a tier has that keeps its blocks across restarts."""

    @property
    def failure(self) -> str:
        """Why only opening it anew, in another process, can help; empty while there is nothing wrong."""

    def scan(self, after: BlockRef | None = None) -> Iterator[StoredRecord]:
        """Every record behind `after`, ordered by namespace and key; holds nothing open between two of them."""

    def flush(self) -> None:
        """Return once everything written before is durable. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Medium:
    """A tier ready to serve; `durable` is the same tier, where it is one."""

    tier: Tier
    durable: Durable | None = None
    device: str = ""


def open_medium(config: agent_pb2.AgentConfig, memory: SlabMemory) -> Medium:
    """Open what `config` names.

    Raises:
        InvalidRequest: it names nothing that there is.
        ValueError: the codec is not known.
        OSError: the medium cannot be used.
    """
    if config.capacity_bytes < 1:
        raise InvalidRequest(f"the {config.tier} tier needs a capacity of more than 0 bytes")
    if config.tier == "cold":
        return _open_cold(config, memory)
    if config.tier == "hot":
        device = device_for(config.device)
        return Medium(device.make_tier(config.capacity_bytes, memory), device=device.name)
    raise InvalidRequest(f"unknown tier {config.tier!r}; agents serve cold and hot")


def _open_cold(config: agent_pb2.AgentConfig, memory: SlabMemory) -> Medium:
    # Here and not above: a hot agent has no use for lmdb and zstandard.
    from kvstore.codec.frame import FrameFormat  # noqa: PLC0415
    from kvstore.tiers.cold import LmdbTier  # noqa: PLC0415

    if not config.path:
        raise InvalidRequest("the cold tier needs a path")
    path = Path(config.path)
    if path.exists() and not path.is_dir():
        raise InvalidRequest(f"the cold tier's path {path} is not a directory")
    tier = LmdbTier(path, config.capacity_bytes, memory, FrameFormat(config.codec or "auto"))
    return Medium(tier, durable=tier)
