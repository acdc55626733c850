"""As much of Triton as the kernels use, run program by program in numpy, so that their indexing can be tested."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch


class _Pointer:
    def __init__(self, memory: np.ndarray, at: Any) -> None:
        self.memory = memory
        self.at = at

    def __add__(self, offset: Any) -> _Pointer:
        return _Pointer(self.memory, self.at + offset)


def _pointer(tensor: torch.Tensor) -> _Pointer:
    items = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = torch.as_strided(tensor, (items,), (1,), 0)
    return _Pointer(whole.numpy(), tensor.storage_offset())


def _load(pointer: _Pointer, mask: Any = None) -> Any:
    if mask is None:
        return pointer.memory[pointer.at]
    return np.where(mask, pointer.memory[np.where(mask, pointer.at, 0)], 0)


def _store(pointer: _Pointer, values: Any, mask: Any) -> None:
    at = np.asarray(pointer.at)[mask]
    assert len(set(at.tolist())) == len(at), "two lanes write to one place"
    pointer.memory[at] = np.asarray(values)[mask]


class _Kernel:
    def __init__(self, function: Callable[..., None], language: Any) -> None:
        self._function = function
        self._language = language
        self.launches = 0

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*tensors: torch.Tensor, **constants: Any) -> None:
            self.launches += 1
            for program in itertools.product(*map(range, grid)):
                self._language.program_id = lambda axis, program=program: program[axis]
                self._function(*map(_pointer, tensors), **constants)

        return launch


def modules() -> dict[str, ModuleType]:
    """What to put into sys.modules."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    for name, value in {
        "arange": np.arange,
        "constexpr": object,
        "load": _load,
        "static_range": range,
        "store": _store,
    }.items():
        setattr(language, name, value)
    triton.jit = lambda function: _Kernel(function, language)  # type: ignore[attr-defined]
    triton.language = language  # type: ignore[attr-defined]
    return {"triton": triton, "triton.language": language}


def forget_kernels() -> None:
    """The kernels' module is to be imported anew."""
    sys.modules.pop("kvstore_client.paged_triton", None)
