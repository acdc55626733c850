"""A CUDA device through the driver API: its context, and what may be asked of it.

Everything is called through CudaCalls, so that every result is checked and a recorded driver can stand in for it.
"""

from __future__ import annotations

import re
import threading
from typing import Any

from kvstore.protocol.cuda_calls import CudaCalls, CudaError, CudaMissing, load_driver

_NAME = re.compile(r"cuda:(\d{1,3})")
_NAME_BYTES = 256


class CudaDevice:
    """One device and its primary context, which it shares with whatever else this process does there.

    Call sequence: make, enter() on every thread before its first call, close().

    Attributes:
        name: "cuda:0".
        label: the product's name and the driver's version, for people.
        calls: the driver.
    """

    def __init__(self, name: str, api: Any = None) -> None:  # noqa: ANN401 - a module without types
        """Open device `name` ("cuda:N") of the driver `api`; None: that of cuda-bindings.

        Raises:
            CudaMissing: there is no driver, or no such device.
            CudaError: the driver refuses.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise CudaMissing(f"{name!r} is no CUDA device; they are cuda:0, cuda:1, …")
        self.name = name
        self.calls = calls = CudaCalls(load_driver() if api is None else api)
        self.ordinal = int(found[1])
        self._init()
        count = calls("cuDeviceGetCount")
        if self.ordinal >= count:
            raise CudaMissing(f"there is no {name}: the driver sees {count} CUDA devices")
        self._device = calls("cuDeviceGet", self.ordinal)
        version = calls("cuDriverGetVersion")
        product = calls("cuDeviceGetName", _NAME_BYTES, self._device).split(b"\0")[0].decode(errors="replace")
        self.label = f"{product}, CUDA {version // 1000}.{version % 1000 // 10}"
        self._context = calls("cuDevicePrimaryCtxRetain", self._device)
        self._entered = threading.local()
        self._closed = False
        self.enter()

    def _init(self) -> None:
        try:
            self.calls("cuInit", 0)
        except CudaError as error:
            raise CudaMissing(f"no usable CUDA driver: {error}") from error

    def enter(self) -> None:
        """Make the context this thread's, once."""
        if not getattr(self._entered, "done", False):
            self.calls("cuCtxSetCurrent", self._context)
            self._entered.done = True

    def memory_bytes(self) -> tuple[int, int]:
        """Free and total bytes of the device, now."""
        free, total = self.calls("cuMemGetInfo")
        return int(free), int(total)

    def has_attribute(self, name: str) -> bool:
        """Whether the device has a property, by the end of its name after CU_DEVICE_ATTRIBUTE_."""
        attribute = getattr(self.calls.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None)
        return attribute is not None and bool(self.calls("cuDeviceGetAttribute", attribute, self._device))

    def close(self) -> None:
        """Let go of the context; idempotent."""
        if self._closed:
            return
        self._closed = True
        self.calls("cuDevicePrimaryCtxRelease", self._device)
