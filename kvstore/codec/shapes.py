"""What a block is made of, read from its layout text, and the order in which codecs take a tensor's values.

The text is a hint ("bfloat16 kv=2 layer=6 token=64 head=12 dim=32", tensors separated by "; "): what it does not say,
or says in words that are not understood, is bytes of an unknown dtype, which every codec policy can store.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ITEM_BYTES = {
    "": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
}
"""Bytes of one item by dtype name; the empty name is bytes of no known dtype. Order matters: frames hold the index."""

DTYPES = tuple(ITEM_BYTES)

MAX_TENSORS = 64  # of a block; one with more is stored as bytes of its first dtype
MAX_AXES = 16
MIN_RUN = 32  # values; with shorter runs K and V alternate too finely for planes to pay
MIN_TOKENS = 8  # fewer say too little of a channel
NO_AXIS = -1

_STRETCH = 48 << 10  # values
_FLAT_STRETCH = 24 << 10  # where nobody knows what begins where
_SMALL_STRETCH = 32 << 10
_LONG_RUN = 4096  # values; longer ones are copied one by one

_AXIS = re.compile(r"([A-Za-z_]\w*)=([1-9]\d{0,9})")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a block.

    Attributes:
        dtype: a name in ITEM_BYTES.
        start: its offset in the block, bytes.
        nbytes: its size, bytes; not always whole items, where the layout is not understood.
        shape: axis sizes; empty where the layout is not understood.
        kv: index of the axis that tells K from V, or NO_AXIS; likewise `layer` and `token`.
    """

    dtype: str
    start: int
    nbytes: int
    shape: tuple[int, ...] = ()
    kv: int = NO_AXIS
    layer: int = NO_AXIS
    token: int = NO_AXIS


@lru_cache(maxsize=256)
def tensors_of(layout: str, nbytes: int) -> tuple[Tensor, ...]:
    """The tensors of a block of `nbytes`, which cover it without a gap or an overlap.

    A layout that does not add up to the block gives one tensor of its first dtype; an unknown dtype gives bytes.
    """
    found: list[Tensor] = []
    end = 0
    for words in layout.split(";"):
        tensor = _tensor(words.split(), end)
        if tensor is None or len(found) == MAX_TENSORS:
            return (_flat(layout, nbytes),)
        if tensor.start > end:  # alignment: a few bytes that belong to nobody
            found.append(Tensor("", end, tensor.start - end))
        found.append(tensor)
        end = tensor.start + tensor.nbytes
    if end != nbytes or len(found) > MAX_TENSORS:
        return (_flat(layout, nbytes),)
    return tuple(found)


def _tensor(words: list[str], end: int) -> Tensor | None:
    """The next tensor behind `end`; None if the words do not describe one."""
    if not 2 <= len(words) <= 1 + MAX_AXES or words[0] not in ITEM_BYTES:
        return None
    matches = [_AXIS.fullmatch(word) for word in words[1:]]
    axes = [(match[1], int(match[2])) for match in matches if match]
    if len(axes) != len(matches):
        return None
    names = [name for name, _ in axes]
    shape = tuple(size for _, size in axes)
    item_bytes = ITEM_BYTES[words[0]]
    kv, layer, token = (names.index(name) if name in names else NO_AXIS for name in ("kv", "layer", "token"))
    start = -(-end // item_bytes) * item_bytes
    return Tensor(words[0], start, math.prod(shape) * item_bytes, shape, kv, layer, token)


def _flat(layout: str, nbytes: int) -> Tensor:
    words = layout.replace(";", " ").split(maxsplit=1)
    return Tensor(words[0] if words and words[0] in ITEM_BYTES else "", 0, nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The order in which a tensor's values are coded: all of K, then all of V, each layer by layer.

    Attributes:
        values: whole items in the tensor.
        tiles: (first value, values) of each, in coding order; a tile is never of both K and V, and lies within a group
            of rows or is made of whole groups.
        stretch: values that one code for symbols suits: a layer, or some, or a part of one.
        tokens: rows of a group, which share a prediction; 0 where there is nothing to predict by.
        inner: values of a row, which is what one token has in one layer.
        runs: None where the order in memory is already this one; else the number of each run of `run` values, in
            coding order.
        run: values of a run.
    """

    values: int
    tiles: tuple[tuple[int, int], ...]
    stretch: int
    tokens: int = 0
    inner: int = 1
    runs: NDArray[np.intp] | None = None
    run: int = 1


@lru_cache(maxsize=64)
def plan_of(tensor: Tensor, tile_values: int) -> Plan:
    """The plan for a tensor, with tiles of at most `tile_values`; a function of its arguments alone."""
    values = tensor.nbytes // ITEM_BYTES[tensor.dtype]
    flat = Plan(values, _tiles(values, values, (), tile_values), _FLAT_STRETCH)
    if not tensor.shape or not values:
        return flat
    leading = [axis for axis in (tensor.kv, tensor.layer) if axis != NO_AXIS]
    order = leading + [axis for axis in range(len(tensor.shape)) if axis not in leading]
    runs, run = _runs(tensor.shape, order, leading)
    if runs is not None and run < MIN_RUN:
        return flat
    unit = values // (tensor.shape[tensor.kv] if tensor.kv != NO_AXIS else 1)
    layer = unit // (tensor.shape[tensor.layer] if tensor.layer != NO_AXIS else 1)
    tokens, inner = _rows(tensor, order, tile_values)
    group = tokens * inner
    if group > tile_values:
        tiles = _tiles(values, group, (inner,), tile_values)
    else:
        tiles = _tiles(values, unit, (layer, group or run), tile_values)
    stretch = _stretch(layer) if leading or tokens else _FLAT_STRETCH
    return Plan(values, tiles, stretch, tokens, inner, runs, run)


def _stretch(layer: int) -> int:
    """The largest equal part of a layer of at most _STRETCH values, or as many small layers as come close to that.

    Each code costs 30 bytes, and 3 µs to make and to read. A code for each layer of 24 Ki values gave a ratio of
    1.5234, one for two of them 1.5195; of 16 Ki values (8 heads of 128, 16 tokens) one for two is read 5 % faster, and
    takes no more bytes.
    """
    if layer > _STRETCH:
        return -(-layer // -(-layer // _STRETCH))
    return layer * max(1, _SMALL_STRETCH // layer)


def _tiles(values: int, unit: int, grains: tuple[int, ...], tile_values: int) -> tuple[tuple[int, int], ...]:
    """Tiles that start anew after `unit` values, as equal as whole grains allow: the first grain that fits is taken."""
    if not values:
        return ()
    grain = next((size for size in grains if size <= tile_values), 1)
    fair = -(-unit // -(-unit // tile_values))
    tile = min(-(-fair // grain) * grain, tile_values // grain * grain)
    return tuple(
        (start, min(tile, first + unit - start))
        for first in range(0, values, unit)
        for start in range(first, first + unit, tile)
    )


def _rows(tensor: Tensor, order: list[int], tile_values: int) -> tuple[int, int]:
    """Tokens, and values that each of them has in one layer; (0, 1) where a prediction would not pay."""
    if tensor.token == NO_AXIS or tensor.token in (tensor.kv, tensor.layer):
        return 0, 1
    tokens = tensor.shape[tensor.token]
    inner = math.prod(tensor.shape[axis] for axis in order[order.index(tensor.token) + 1 :])
    return (tokens, inner) if tokens >= MIN_TOKENS and MIN_RUN <= inner <= tile_values else (0, 1)


def _runs(shape: tuple[int, ...], order: list[int], leading: list[int]) -> tuple[NDArray[np.intp] | None, int]:
    """Numbers of the runs in the given order of axes (None: as in memory), and their length."""
    moved = [axis for axis in leading if shape[axis] > 1]
    first = max(moved, default=-1) + 1  # axes from here on stay together
    run = math.prod(shape[first:])
    if moved == sorted(moved) and all(shape[axis] == 1 for axis in range(first) if axis not in leading):
        return None, run
    numbers = np.arange(math.prod(shape[:first]), dtype=np.intp).reshape(shape[:first])
    return numbers.transpose([axis for axis in order if axis < first]).reshape(-1), run


def gather(source: NDArray[np.uint16], plan: Plan, start: int, tile: NDArray[np.uint16]) -> None:
    """Copy a tile from where the plan finds its values, without the interpreter's lock."""
    rows = _whole_runs(plan, start, tile.size)
    if rows is not None:
        np.take(source.reshape(-1, plan.run), rows, axis=0, out=tile.reshape(-1, plan.run), mode="clip")
        return
    for first, memory, length in _pieces(plan, start, tile.size):
        np.copyto(tile[first : first + length], source[memory : memory + length])


def scatter(tile: NDArray[np.uint16], plan: Plan, start: int, target: NDArray[np.uint16]) -> None:
    """Undo gather."""
    rows = _whole_runs(plan, start, tile.size)
    if rows is not None:
        target.reshape(-1, plan.run)[rows] = tile.reshape(-1, plan.run)
        return
    for first, memory, length in _pieces(plan, start, tile.size):
        np.copyto(target[memory : memory + length], tile[first : first + length])


def _whole_runs(plan: Plan, start: int, values: int) -> NDArray[np.intp] | None:
    """The numbers of a tile's runs, where they are whole, and so short that copying one by one would not pay."""
    if plan.runs is None or plan.run >= _LONG_RUN or start % plan.run or values % plan.run:
        return None
    return plan.runs[start // plan.run : (start + values) // plan.run]


def _pieces(plan: Plan, start: int, values: int) -> Iterator[tuple[int, int, int]]:
    """(place in the tile, place in memory, values) of every contiguous piece of a tile."""
    if plan.runs is None:
        yield 0, start, values
        return
    position, end = start, start + values
    while position < end:
        number, within = divmod(position, plan.run)
        length = min(plan.run - within, end - position)
        yield position - start, int(plan.runs[number]) * plan.run + within, length
        position += length
