"""The devices that a hot tier can live on."""

from __future__ import annotations

from typing import Protocol

from kvstore.protocol.errors import InvalidRequest
from kvstore.tiers.base import SlabMemory, Tier
from kvstore.tiers.host import HostMemoryTier


class Device(Protocol):
    """Memory that keeps raw blocks.

    All that an agent asks of it: a new kind of device is a class with this one method, and one line in `device_for`.
    """

    name: str  # "cpu", "cuda:0"

    def make_tier(self, capacity_bytes: int, memory: SlabMemory) -> Tier:
        """Reserve the device's memory and serve it as a tier, whose ranges `memory` resolves.

        Raises:
            OSError: the device is gone or does not have that much.
        """


class CpuDevice(Device):
    """Host memory: a test double where there is no device, never a tier worth having."""

    name = "cpu"

    def make_tier(self, capacity_bytes: int, memory: SlabMemory) -> Tier:
        """A tier in this process's memory, which grows with what is stored."""
        return HostMemoryTier(capacity_bytes, memory, name="hot")


def device_for(name: str) -> Device:
    """The device of a name.

    Raises:
        InvalidRequest: this build knows no such device.
    """
    if name == CpuDevice.name:
        return CpuDevice()
    raise InvalidRequest(f"unknown device {name!r}; this build has: {CpuDevice.name}")
