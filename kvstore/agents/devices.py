"""The devices that a hot tier can live on."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from kvstore.agents.memory import MappedSlabs
from kvstore.protocol.cuda_calls import CudaBroken, CudaError
from kvstore.protocol.errors import InvalidRequest
from kvstore.tiers.base import Tier
from kvstore.tiers.cuda import CudaDevice
from kvstore.tiers.host import HostMemoryTier
from kvstore.tiers.hot_cuda import HotCuda


class Wanted(NamedTuple):
    """How much memory a hot tier is to have: so many bytes, or where `permille` is set that share of what is free."""

    nbytes: int
    permille: int = 0


class ResizableTier(Tier, Protocol):
    """A tier in memory."""

    def resize(self, capacity_bytes: int) -> int:
        """Be of about that size; the capacity from now on."""


class Device(Protocol):
    """Memory that keeps raw blocks.

    All that an agent asks of it: a new kind of device is a class with this one method, and one line in `device_for`.
    """

    def make_tier(self, wanted: Wanted, memory: MappedSlabs) -> tuple[ResizableTier, str]:
        """Reserve the device's memory and serve it as a tier, whose ranges `memory` resolves; and its name for people.

        Raises:
            OSError: the device is gone or does not have that much.
            InvalidRequest: it cannot be asked for in that way.
        """


class HostStandIn:
    """Host memory: a test double where there is no device, never a tier worth having."""

    def make_tier(self, wanted: Wanted, memory: MappedSlabs) -> tuple[ResizableTier, str]:
        """A tier in this process's memory, which grows with what is stored."""
        if wanted.permille:
            raise InvalidRequest("a share of free memory can be had of a CUDA device only; give a size")
        return HostMemoryTier(wanted.nbytes, memory, name="hot"), "cpu"


class Cuda:
    """One CUDA device."""

    def __init__(self, name: str) -> None:
        self._name = name

    def make_tier(self, wanted: Wanted, memory: MappedSlabs) -> tuple[ResizableTier, str]:
        """A tier in the device's memory, all of which is taken now."""
        try:
            device = CudaDevice(self._name)
            nbytes = device.memory_bytes()[0] * wanted.permille // 1000 if wanted.permille else wanted.nbytes
            tier = HotCuda(device, nbytes, memory)
        except CudaBroken as error:
            raise CudaError(str(error)) from error
        memory.on_unmap = tier.slab_unmapped
        return tier, f"{device.name} ({device.label})"


def device_for(name: str) -> Device:
    """The device of a name.

    Raises:
        InvalidRequest: this build knows no such device.
    """
    if name == "cpu":
        return HostStandIn()
    if name.startswith("cuda:"):
        return Cuda(name)
    raise InvalidRequest(f"unknown device {name!r}; this build has: cpu, cuda:0, cuda:1, …")
