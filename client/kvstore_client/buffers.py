"""The caller's memory: what `out` and `blocks` may be, brought into one form.

A caller gives one array for all blocks, or one buffer a block, or a list of segments a block (an engine keeps K
and V of every layer in different places). Whatever cannot be right is refused before anything is sent or copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.layout import KVLayout
from kvstore_client._lazy import np
from kvstore_client.memory import bytes_at

if TYPE_CHECKING:
    from numpy.typing import NDArray


class BlockBuffers(NamedTuple):
    """Caller memory for some blocks: one of the two is set.

    Attributes:
        whole: (n, block_nbytes) bytes in one contiguous piece; n may be more than was asked for.
        pieces: for every block its segments in order, each 1-D contiguous bytes; together block_nbytes.
    """

    whole: NDArray[np.uint8] | None = None
    pieces: Sequence[Sequence[NDArray[np.uint8]]] = ()


class Wanted(NamedTuple):
    """What the memory must be like.

    Attributes:
        what: name of the argument, for messages.
        blocks: how many.
        is_exact: whether there must be room for exactly that many, not at least.
        is_writable: whether it will be written to.
    """

    what: str
    blocks: int
    is_exact: bool
    is_writable: bool


def block_buffers(memory: Any, layout: KVLayout, wanted: Wanted) -> BlockBuffers:  # noqa: ANN401 - any buffer
    """The caller's memory in one form.

    Args:
        memory: one contiguous array or buffer of n blocks; or a list of n buffers; or a list of n lists of
            segments, a segment being a buffer or (address, length). CPU tensors count as buffers.
        layout: of one block.
        wanted: what it must be like.

    Raises:
        InvalidRequest: it is not; the message names what is wrong and what would be right.
    """
    if _is_plain(memory, layout.nbytes, wanted):
        return BlockBuffers(memory)
    if isinstance(memory, (list, tuple)) and not _is_address(memory):
        check_count(len(memory), wanted)
        picked = memory[: wanted.blocks]
        return BlockBuffers(pieces=[_segments(item, i, layout, wanted) for i, item in enumerate(picked)])
    array = _as_array(memory, wanted.what)
    _check_dtype(array, layout, wanted.what)
    rows = _row_count(array, layout.nbytes, wanted)
    check_count(rows, wanted)
    if array.flags.c_contiguous:
        return BlockBuffers(whole=_raw(array, wanted).reshape(rows, layout.nbytes))
    if array.ndim < 2 or not array[:1].flags.c_contiguous:
        raise InvalidRequest(f"{wanted.what} is not contiguous; give a C-contiguous array or a list of buffers")
    return BlockBuffers(pieces=[[_raw(row, wanted)] for row in array[: wanted.blocks]])


def _is_plain(memory: Any, block_nbytes: int, wanted: Wanted) -> bool:  # noqa: ANN401 - any buffer
    """Whether it is the usual thing, an array of bytes with a row for each block: a tenth of the other checks' time."""
    if type(memory) is not np.ndarray or memory.dtype.char != "B" or memory.shape != (wanted.blocks, block_nbytes):
        return False
    flags = memory.flags
    return bool(flags.c_contiguous and (flags.writeable or not wanted.is_writable))


def check_count(count: int, wanted: Wanted) -> None:
    """Refuse memory for another number of blocks."""
    if count < wanted.blocks or (wanted.is_exact and count != wanted.blocks):
        least = "" if wanted.is_exact else "at least "
        raise InvalidRequest(f"{wanted.what} holds {count} blocks; it must hold {least}{wanted.blocks}")


def _row_count(array: NDArray[Any], block_nbytes: int, wanted: Wanted) -> int:
    if array.ndim >= 2:
        row_nbytes = array.nbytes // array.shape[0] if array.shape[0] else block_nbytes
        if row_nbytes != block_nbytes:
            raise InvalidRequest(
                f"{wanted.what} has shape {array.shape} of {array.dtype}, {row_nbytes} bytes a block; "
                f"a block of this namespace has {block_nbytes}"
            )
        return int(array.shape[0])
    if array.nbytes % block_nbytes:
        raise InvalidRequest(f"{wanted.what} has {array.nbytes} bytes, not a multiple of a block's {block_nbytes}")
    return array.nbytes // block_nbytes


def _check_dtype(array: NDArray[Any], layout: KVLayout, what: str) -> None:
    if array.dtype.hasobject:
        raise InvalidRequest(f"{what} holds Python objects; give uint8 bytes, or the dtype of the layout")
    if array.dtype.itemsize == 1:
        return
    sizes = {tensor.item_nbytes for tensor in layout.tensors}
    if sizes != {array.dtype.itemsize}:
        names = ", ".join(sorted({tensor.dtype for tensor in layout.tensors}))
        raise InvalidRequest(f"{what} has dtype {array.dtype}, the layout {names}; give uint8 bytes, or that width")


def _segments(item: Any, index: int, layout: KVLayout, wanted: Wanted) -> list[NDArray[np.uint8]]:  # noqa: ANN401
    """The segments of one block."""
    what = f"{wanted.what}[{index}]"
    several = isinstance(item, (list, tuple)) and not _is_address(item)
    parts = [_raw(_as_array(part, what), wanted) for part in (item if several else (item,))]
    nbytes = sum(part.nbytes for part in parts)
    if nbytes != layout.nbytes:
        raise InvalidRequest(f"{what} has {nbytes} bytes; a block of this namespace has {layout.nbytes}")
    return parts


def _raw(array: NDArray[Any], wanted: Wanted) -> NDArray[np.uint8]:
    """The bytes of a contiguous array, 1-D."""
    if wanted.is_writable and not array.flags.writeable:
        raise InvalidRequest(f"{wanted.what} is read-only memory")
    if not array.flags.c_contiguous:
        raise InvalidRequest(f"a buffer in {wanted.what} is not C-contiguous; give its pieces as a list of segments")
    if array.dtype == np.uint8 and array.ndim == 1:
        return array
    if array.dtype.hasobject:
        raise InvalidRequest(f"a buffer in {wanted.what} holds Python objects")
    return array.reshape(-1).view(np.uint8)


def _as_array(memory: Any, what: str) -> NDArray[Any]:  # noqa: ANN401 - any buffer
    if isinstance(memory, np.ndarray):
        return memory
    if _is_address(memory):
        return _at_address(memory[0], memory[1], what)
    if hasattr(memory, "data_ptr"):
        return _of_tensor(memory, what)
    try:
        view = memoryview(memory)
        return np.frombuffer(view if view.nbytes else b"", np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise InvalidRequest(
            f"{what} is a {type(memory).__name__}, not a contiguous buffer; give an array, a list of buffers, or a "
            "list of lists of segments"
        ) from error


def _of_tensor(tensor: Any, what: str) -> NDArray[np.uint8]:  # noqa: ANN401 - torch is never imported for this
    """A CPU tensor's bytes by its address: numpy knows neither bfloat16 nor fp8."""
    if tensor.device.type != "cpu":
        raise InvalidRequest(f"{what} is a tensor on {tensor.device}; only host memory can be used")
    if not tensor.is_contiguous():
        raise InvalidRequest(f"{what} is a tensor that is not contiguous")
    flat = _at_address(tensor.data_ptr(), tensor.numel() * tensor.element_size(), what, tensor)
    return flat.reshape(tensor.shape[0], -1) if tensor.dim() >= 2 and tensor.shape[0] else flat


def _is_address(item: Any) -> bool:  # noqa: ANN401
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], int) and isinstance(item[1], int)


def _at_address(address: int, nbytes: int, what: str, owner: object = None) -> NDArray[np.uint8]:
    if nbytes == 0:
        return np.empty(0, np.uint8)
    if address <= 0 or nbytes < 0:
        raise InvalidRequest(f"{what} has a segment of {nbytes} bytes at address {address}")
    raw = bytes_at(address, nbytes)
    raw.owner = owner  # type: ignore[attr-defined]  # keeps the memory alive as long as the array
    return np.frombuffer(memoryview(raw), np.uint8)
