"""A block's bytes as the tensors of its layout, without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.layout import KVLayout
from kvstore_client._lazy import np, torch
from kvstore_client.memory import bytes_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

Framework: TypeAlias = Literal["numpy", "torch"]

_NUMPY_DTYPES = {"bfloat16": "uint16", "float8_e4m3": "uint8", "float8_e5m2": "uint8"}
"""numpy has no such types: their bit patterns."""
_TORCH_DTYPES = {"float8_e4m3": "float8_e4m3fn"}


def tensors_of(row: NDArray[np.uint8], layout: KVLayout, framework: Framework) -> dict[str, Any]:
    """The tensors of one block, by name.

    Args:
        row: (block_nbytes,) bytes of the block.
        layout: of the block.
        framework: "numpy" or "torch".

    Raises:
        InvalidRequest: another framework.
    """
    if framework == "numpy":
        return _numpy_tensors(row, layout)
    if framework == "torch":
        return _torch_tensors(row, layout)
    raise InvalidRequest(f"framework is {framework!r}; it must be 'numpy' or 'torch'")


def _numpy_tensors(row: NDArray[np.uint8], layout: KVLayout) -> dict[str, Any]:
    return {
        spec.name: row[first : first + spec.nbytes].view(_NUMPY_DTYPES.get(spec.dtype, spec.dtype)).reshape(spec.shape)
        for spec, first in zip(layout.tensors, layout.offsets, strict=True)
    }


def _torch_tensors(row: NDArray[np.uint8], layout: KVLayout) -> dict[str, Any]:
    # By address: torch warns at every read-only buffer, and has no read-only tensors anyway.
    raw = bytes_at(row.ctypes.data, row.nbytes)
    raw.owner = row  # type: ignore[attr-defined]  # keeps the slab mapped as long as a tensor lives
    return {
        spec.name: torch.frombuffer(
            raw,
            dtype=getattr(torch, _TORCH_DTYPES.get(spec.dtype, spec.dtype)),
            offset=first,
            count=spec.nbytes // spec.item_nbytes,
        ).reshape(spec.shape)
        for spec, first in zip(layout.tensors, layout.offsets, strict=True)
    }
