"""Pages to blocks and back by one Triton kernel; imported on CUDA only, where triton is.

Not measured on a card yet. PagedCache compares its bits with plain torch's before it uses it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from kvstore_client._lazy import torch

_ITEMS = 1024  # of one program
_AXES_MAX = 4  # beside the page


@triton.jit  # type: ignore[untyped-decorator]
def _copy(blocks: Any, pages: Any, ids: Any, shape: Any, TO_PAGES: tl.constexpr, ITEMS: tl.constexpr) -> None:  # noqa: ANN401
    """Program (page, part): `ITEMS` items of one page.

    shape: (items a page, pages a block, sizes of 4 axes, strides of page and 4 axes, strides of block, page in block
    and 4 axes), in items; the last axis is the one whose items are neighbours in a page.
    """
    number = tl.program_id(0)
    at = tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    valid = at < tl.load(shape)
    in_block = tl.load(shape + 1)
    page_at = tl.load(ids + number) * tl.load(shape + 6)
    block_at = (number // in_block) * tl.load(shape + 11) + (number % in_block) * tl.load(shape + 12)
    page_offset = at * 0 + page_at
    block_offset = at * 0 + block_at
    rest = at
    for axis in tl.static_range(3, -1, -1):
        size = tl.load(shape + 2 + axis)
        position = rest % size
        rest = rest // size
        page_offset += position * tl.load(shape + 7 + axis)
        block_offset += position * tl.load(shape + 13 + axis)
    if TO_PAGES:
        tl.store(pages + page_offset, tl.load(blocks + block_offset, mask=valid), mask=valid)
    else:
        tl.store(blocks + block_offset, tl.load(pages + page_offset, mask=valid), mask=valid)


def copy_pages(blocks: Any, pages: Any, ids: Any, to_pages: bool) -> None:  # noqa: ANN401 - tensors
    """As kvstore_client.paged.copy_pages.

    Raises:
        ValueError: there are more axes than the kernel knows.
    """
    count = pages.dim() - 1
    if count > _AXES_MAX:
        raise ValueError(f"{count} axes beside the page; the kernel knows {_AXES_MAX}")
    if not len(ids):
        return
    axes = zip(pages.shape[1:], pages.stride()[1:], blocks.stride()[2:], strict=True)
    ordered = [(1, 0, 0)] * (_AXES_MAX - count) + sorted(axes, key=lambda axis: -axis[1])
    sizes, page_strides, block_strides = zip(*ordered, strict=True)
    items = pages[0].numel()
    shape = (
        items, blocks.shape[1], *sizes, pages.stride(0), *page_strides, blocks.stride(0), blocks.stride(1),
        *block_strides,
    )  # fmt: skip
    grid = (len(ids), -(-items // _ITEMS))
    _copy[grid](blocks, pages, ids, _numbers(shape, pages.device), TO_PAGES=to_pages, ITEMS=_ITEMS)


@lru_cache(64)
def _numbers(shape: tuple[int, ...], device: Any) -> Any:  # noqa: ANN401 - a tensor, which takes a copy to make
    return torch.tensor(shape, dtype=torch.int64, device=device)
