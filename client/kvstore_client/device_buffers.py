"""The caller's device memory: CUDA tensors of torch, what has `__cuda_array_interface__`, and DLPack, in one form."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.layout import KVLayout
from kvstore_client._lazy import np, torch
from kvstore_client.buffers import Wanted, check_count
from kvstore_client.device import After, ordinal_of

_DLPACK_CUDA = 2


class DevicePart(NamedTuple):
    """Contiguous bytes on a device."""

    address: int
    nbytes: int


class DeviceBuffers(NamedTuple):
    """Device memory for some blocks.

    Attributes:
        ordinal: of the device.
        address: of the first block, where one array holds all; the next are `pitch` bytes apart. 0: see pieces.
        pitch: bytes from one block to the next.
        pieces: for every block its segments in order, together block_nbytes.
        after: the work that copies must not overtake.
        owner: keeps the memory alive.
    """

    ordinal: int
    address: int
    pitch: int
    pieces: Sequence[Sequence[DevicePart]]
    after: Sequence[After]
    owner: object


class _View(NamedTuple):
    """One array on a device; strides in bytes."""

    ordinal: int
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_nbytes: int
    is_read_only: bool
    after: After | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.item_nbytes

    def is_contiguous(self, first_axis: int = 0) -> bool:
        """Whether the axes from `first_axis` on lie in C order without gaps."""
        expected = self.item_nbytes
        for axis in range(len(self.shape) - 1, first_axis - 1, -1):
            if self.shape[axis] > 1 and self.strides[axis] != expected:
                return False
            expected *= self.shape[axis]
        return True


def device_buffers(memory: Any, layout: KVLayout, wanted: Wanted) -> DeviceBuffers | None:  # noqa: ANN401 - any buffer
    """The caller's device memory in one form; None where it is host memory.

    Args:
        memory: one array of n blocks on a device, or n arrays, or n lists of arrays, all on one device.
        layout: of one block.
        wanted: what it must be like.

    Raises:
        InvalidRequest: it is not; the message names what is wrong and what would be right.
    """
    if isinstance(memory, (list, tuple)):
        return _of_list(memory, layout, wanted)
    view = _view(memory)
    if view is None:
        return None
    _check(view, layout, wanted, wanted.what)
    rows = _rows(view, layout.nbytes, wanted)
    check_count(rows, wanted)
    pitch = view.strides[0] if len(view.shape) >= 2 and rows > 1 else layout.nbytes
    return DeviceBuffers(view.ordinal, view.address, pitch, (), _after([view]), memory)


def is_device_memory(item: Any) -> bool:  # noqa: ANN401 - any buffer
    """Whether something is an array on a CUDA device, as far as can be told without the driver."""
    if isinstance(item, np.ndarray):
        return False
    if hasattr(item, "data_ptr") and hasattr(item, "device"):
        return getattr(item.device, "type", "") == "cuda"
    if hasattr(item, "__cuda_array_interface__"):
        return True
    return hasattr(item, "__dlpack_device__") and int(item.__dlpack_device__()[0]) == _DLPACK_CUDA


def after_of(what: Any) -> After:  # noqa: ANN401 - a stream or an event of any library
    """A torch event or stream, or whatever has `__cuda_stream__`, as copies wait for it.

    Raises:
        InvalidRequest: it is none of these, or an event that was never recorded.
    """
    if hasattr(what, "cuda_event"):
        if not what.cuda_event:
            raise InvalidRequest("the event was never recorded, so there is nothing to wait for")
        return After(int(what.cuda_event), True)
    if hasattr(what, "cuda_stream"):
        return After(int(what.cuda_stream), False)
    if hasattr(what, "__cuda_stream__"):
        return After(int(what.__cuda_stream__()[1]), False)
    raise InvalidRequest(
        f"a {type(what).__name__} is no CUDA stream or event; give one of torch's, or a __cuda_stream__"
    )


def _of_list(memory: Sequence[Any], layout: KVLayout, wanted: Wanted) -> DeviceBuffers | None:
    first = memory[0] if memory else None
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    if first is None or not is_device_memory(first):
        return None
    check_count(len(memory), wanted)
    blocks: list[list[DevicePart]] = []
    views: list[_View] = []
    for index, item in enumerate(memory[: wanted.blocks]):
        parts = [_part(part, layout, wanted, index) for part in (item if isinstance(item, (list, tuple)) else (item,))]
        nbytes = sum(view.nbytes for view in parts)
        if nbytes != layout.nbytes:
            what = f"{wanted.what}[{index}]"
            raise InvalidRequest(f"{what} has {nbytes} bytes; a block of this namespace has {layout.nbytes}")
        blocks.append([DevicePart(view.address, view.nbytes) for view in parts])
        views += parts
    ordinals = {view.ordinal for view in views}
    if len(ordinals) > 1:
        raise InvalidRequest(f"{wanted.what} lies on several devices: {sorted(ordinals)}; give memory of one")
    return DeviceBuffers(views[0].ordinal if views else 0, 0, 0, blocks, _after(views), memory)


def _part(part: Any, layout: KVLayout, wanted: Wanted, index: int) -> _View:  # noqa: ANN401 - any buffer
    what = f"{wanted.what}[{index}]"
    view = _view(part)
    if view is None:
        raise InvalidRequest(f"{what} mixes host and device memory; give one kind")
    _check(view, layout, wanted, what)
    if not view.is_contiguous():
        raise InvalidRequest(f"an array in {what} is not contiguous; give its pieces as a list of segments")
    return view


def _check(view: _View, layout: KVLayout, wanted: Wanted, what: str) -> None:
    if wanted.is_writable and view.is_read_only:
        raise InvalidRequest(f"{what} is read-only memory")
    sizes = {tensor.item_nbytes for tensor in layout.tensors}
    if view.item_nbytes != 1 and sizes != {view.item_nbytes}:
        raise InvalidRequest(f"{what} has items of {view.item_nbytes} bytes, the layout of {sorted(sizes)}; give bytes")


def _rows(view: _View, block_nbytes: int, wanted: Wanted) -> int:
    what = wanted.what
    if len(view.shape) < 2:
        if not view.is_contiguous() or view.nbytes % block_nbytes:
            raise InvalidRequest(f"{what} is {view.nbytes} bytes, not contiguous blocks of {block_nbytes}")
        return view.nbytes // block_nbytes
    row_nbytes = view.nbytes // view.shape[0] if view.shape[0] else block_nbytes
    if row_nbytes != block_nbytes:
        raise InvalidRequest(
            f"{what} has shape {view.shape}, {row_nbytes} bytes a block; a block of this namespace has {block_nbytes}"
        )
    if not view.is_contiguous(1) or (view.shape[0] > 1 and view.strides[0] < block_nbytes):
        raise InvalidRequest(f"{what} is not contiguous; give a C-contiguous array or a list of arrays")
    return int(view.shape[0])


def _after(views: Sequence[_View]) -> Sequence[After]:
    return tuple({view.after: None for view in views if view.after is not None})


def _view(item: Any) -> _View | None:  # noqa: ANN401 - any buffer
    if not is_device_memory(item):
        return None
    if hasattr(item, "data_ptr"):
        return _of_torch(item)
    if hasattr(item, "__cuda_array_interface__"):
        return _of_interface(item.__cuda_array_interface__)
    return _of_torch(torch.from_dlpack(item))


def _of_torch(tensor: Any) -> _View:  # noqa: ANN401 - torch need not be there
    item_nbytes = tensor.element_size()
    ordinal = tensor.device.index or 0
    library = sys.modules.get("torch")
    stream = After(int(library.cuda.current_stream(ordinal).cuda_stream), False) if library is not None else None
    strides = tuple(stride * item_nbytes for stride in tensor.stride())
    return _View(ordinal, tensor.data_ptr(), tuple(tensor.shape), strides, item_nbytes, False, stream)


def _of_interface(interface: dict[str, Any]) -> _View:
    """Version 3 of the interface: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""
    shape, item_nbytes = tuple(interface["shape"]), int(interface["typestr"][2:])
    address, is_read_only = interface["data"]
    strides = interface.get("strides")
    if strides is None:
        strides = tuple(math.prod(shape[axis + 1 :]) * item_nbytes for axis in range(len(shape)))
    stream = interface.get("stream")
    after = None if stream is None else After(int(stream), False)
    return _View(ordinal_of(address), address, shape, tuple(strides), item_nbytes, bool(is_read_only), after)
