"""Which bytes of a block belong to which layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.layout import KVLayout, TensorSpec
from kvstore_client.targets import Ranges


def layer_ranges(layout: KVLayout, layers: Sequence[int] | None = None) -> list[tuple[int, Ranges]]:
    """The bytes of each layer of a block, in the order in which they are to be copied.

    Where every tensor of the layout has an axis "layer" of one size, a layer is its part of all of them. Otherwise
    each tensor counts as a layer, in the order of the layout.

    Args:
        layout: of a block.
        layers: which ones, in which order; None: all.

    Raises:
        InvalidRequest: there is no such layer.
    """
    sizes = {spec.axis_size("layer") for spec in layout.tensors}
    size = sizes.pop() if len(sizes) == 1 else None
    count = size or len(layout.tensors)
    wanted = range(count) if layers is None else layers
    strange = [layer for layer in wanted if not 0 <= layer < count]
    if strange:
        raise InvalidRequest(f"layers {strange} were asked for; the layout has {count}, numbered from 0")
    pairs = list(zip(layout.tensors, layout.offsets, strict=True))
    if size is None:
        return [(layer, ((pairs[layer][1], pairs[layer][1] + pairs[layer][0].nbytes),)) for layer in wanted]
    return [(layer, _joined([r for spec, offset in pairs for r in _part(spec, offset, layer)])) for layer in wanted]


def _part(spec: TensorSpec, offset: int, layer: int) -> list[tuple[int, int]]:
    axis = spec.axes.split().index("layer")
    chunk = math.prod(spec.shape[axis + 1 :]) * spec.item_nbytes
    firsts = (offset + (outer * spec.shape[axis] + layer) * chunk for outer in range(math.prod(spec.shape[:axis])))
    return [(first, first + chunk) for first in firsts]


def _joined(ranges: Sequence[tuple[int, int]]) -> Ranges:
    found: list[tuple[int, int]] = []
    for first, stop in ranges:
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((first, stop))
    return found
