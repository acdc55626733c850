"""Calls of the CUDA driver, checked: the hot agent makes them, and a worker whose tensors are on a device.

The driver is whatever has the functions of `cuda.bindings.driver` (the package cuda-bindings): each returns a tuple of
a CUresult and what it gives. Nothing here imports it before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

DRIVER_MODULE: Final = "cuda.bindings.driver"

_SUCCESS = 0
_NOT_READY = "CUDA_ERROR_NOT_READY"
_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
# After one of these every later call of the process fails: only another process can go on.
_BROKEN: Final = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ASSERT",
        "CONTAINED",
        "CONTEXT_IS_DESTROYED",
        "DEINITIALIZED",
        "DEVICE_UNAVAILABLE",
        "ECC_UNCORRECTABLE",
        "EXTERNAL_DEVICE",
        "HARDWARE_STACK_ERROR",
        "ILLEGAL_ADDRESS",
        "ILLEGAL_INSTRUCTION",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "MISALIGNED_ADDRESS",
        "MPS_CLIENT_TERMINATED",
        "NVLINK_UNCORRECTABLE",
        "TENSOR_MEMORY_LEAK",
        "UNKNOWN",
    )
)


class CudaError(OSError):
    """The driver refused a call; the message begins with the call's name.

    Attributes:
        result: the CUresult's name, as CUDA_ERROR_NOT_SUPPORTED.
    """

    def __init__(self, message: str, result: str = "") -> None:
        super().__init__(message)
        self.result = result


class CudaMissing(CudaError):
    """There is no driver to be called: no package, no library, no device."""


class CudaOutOfMemory(CudaError):
    """The device has no such piece of memory."""


class CudaBroken(RuntimeError):
    """The process's context is beyond repair: no call of this process will succeed any more."""


def load_driver() -> Any:  # noqa: ANN401 - a module without types
    """The functions of cuda-bindings.

    Raises:
        CudaMissing: they cannot be imported.
    """
    try:
        return importlib.import_module(DRIVER_MODULE)
    except (ImportError, OSError, RuntimeError) as error:  # the package, its libraries, or the driver's
        raise CudaMissing(f"{DRIVER_MODULE} cannot be imported ({error}); install the package cuda-bindings") from error


class CudaCalls:
    """Makes calls by name and turns every result that is not success into an exception. Any thread.

    Attributes:
        api: the driver, for its constants and structures.
    """

    def __init__(self, api: Any) -> None:  # noqa: ANN401 - a module without types
        self.api = api

    def __call__(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401 - as the driver's function gives
        """What the function gives beside its result: nothing (None), a value, or a tuple of several.

        Raises:
            CudaOutOfMemory: there is no memory left on the device.
            CudaBroken: no further call will succeed.
            CudaError: any other failure, also a function that this driver does not have.
        """
        result, given = self._call(name, arguments)
        if int(result) != _SUCCESS:
            raise self._error(name, result)
        if len(given) <= 1:
            return given[0] if given else None
        return tuple(given)

    def is_done(self, event: Any) -> bool:  # noqa: ANN401 - a CUevent
        """Whether everything before an event's record has ended.

        Raises:
            CudaError, CudaBroken: it cannot be told.
        """
        result, _ = self._call("cuEventQuery", (event,))
        if int(result) == _SUCCESS:
            return True
        if getattr(result, "name", "") == _NOT_READY:
            return False
        raise self._error("cuEventQuery", result)

    def has(self, name: str) -> bool:
        """Whether the driver has a function of this name."""
        return hasattr(self.api, name)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        function = getattr(self.api, name, None)
        if function is None:
            raise CudaError(f"{name}: this version of cuda-bindings does not have it", "CUDA_ERROR_NOT_SUPPORTED")
        try:
            result, *given = function(*arguments)
        except TypeError as error:  # bindings of another version: what else can be done is the caller's to know
            raise CudaError(
                f"{name}: cuda-bindings takes other arguments: {error}", "CUDA_ERROR_NOT_SUPPORTED"
            ) from error
        except (KeyError, ValueError) as error:  # how the bindings meet a result that a newer driver has and they lack
            raise CudaError(f"{name}: cuda-bindings does not know what the driver answered: {error}") from error
        except RuntimeError as error:  # the bindings' own way to say that the library lacks a symbol, or is not there
            raise CudaMissing(f"{name}: {error}") from error
        return result, given

    def _error(self, call: str, result: Any) -> Exception:  # noqa: ANN401 - a CUresult
        name = getattr(result, "name", str(result))
        message = f"{call}: {name} ({int(result)}){self._words(result)}"
        if name == _OUT_OF_MEMORY:
            return CudaOutOfMemory(message, name)
        if name in _BROKEN:
            return CudaBroken(message)
        return CudaError(message, name)

    def _words(self, result: Any) -> str:  # noqa: ANN401 - a CUresult
        """The driver's own words; none where it does not know the result either."""
        status, text = self.api.cuGetErrorString(result)
        return f": {text.decode(errors='replace')}" if int(status) == _SUCCESS and text else ""
