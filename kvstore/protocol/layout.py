"""Layout of one block: an ordered list of named tensors.

Every attention variant is just such a list: MHA, GQA and MQA differ in a size, MLA has a latent and a rope
tensor of different width, cross-layer sharing has fewer layers, an indexer is one more tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvstore.protocol.errors import InvalidRequest

MAX_STRING_BYTES = 1024
MAX_TENSORS = 4096
MAX_AXES = 16
MAX_AXIS_SIZE = 1 << 32
MAX_TEXT_CHARS = 512

ITEM_BYTES = {
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
"""Bytes of one item, by dtype name."""


def check_string(value: object, what: str, *, empty: bool = False) -> str:
    """A string fit for a name: UTF-8, no NUL, at most MAX_STRING_BYTES, not empty unless `empty`.

    Raises:
        InvalidRequest: it is not; the message names `what`, its size and the limit.
    """
    if not isinstance(value, str):
        raise InvalidRequest(f"{what} must be a string, not {type(value).__name__}")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what} cannot be written in UTF-8") from error
    if size > MAX_STRING_BYTES:
        raise InvalidRequest(f"{what} has {size} bytes; the limit is {MAX_STRING_BYTES}")
    if not value and not empty:
        raise InvalidRequest(f"{what} is empty")
    if "\0" in value:
        raise InvalidRequest(f"{what} contains a NUL character")
    return value


def check_integer(value: object, what: str, low: int, high: int) -> int:
    """An integer within low..high.

    Raises:
        InvalidRequest: it is not; the message names `what`, the value and the range.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # the TypeError is the point
    except TypeError as error:
        raise InvalidRequest(f"{what} must be an integer, not {type(value).__name__}") from error
    if not low <= number <= high:
        raise InvalidRequest(f"{what} is {number}; it must be within {low}..{high}")
    return number


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a block, in C order.

    Attributes:
        name: unique within the layout.
        dtype: a name in ITEM_BYTES.
        shape: size of every axis, each at least 1.
        axes: a name for every axis, blank separated, for example "kv layer token head dim".

    Raises:
        InvalidRequest: dtype, shape and axes do not make sense together.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: str

    def __post_init__(self) -> None:
        """Check, and bring shape and axes into their one canonical form."""
        check_string(self.name, "tensor name")
        what = f"tensor {self.name!r}"
        if check_string(self.dtype, f"dtype of {what}") not in ITEM_BYTES:
            raise InvalidRequest(f"{what} has dtype {self.dtype!r}; known are {', '.join(ITEM_BYTES)}")
        try:
            sizes = tuple(self.shape)
        except TypeError as error:
            raise InvalidRequest(f"shape of {what} must be a sequence of integers") from error
        shape = tuple(check_integer(size, f"axis size of {what}", 1, MAX_AXIS_SIZE) for size in sizes)
        names = check_string(self.axes, f"axes of {what}").split()
        if not 1 <= len(shape) <= MAX_AXES:
            raise InvalidRequest(f"{what} has {len(shape)} axes; it must be within 1..{MAX_AXES}")
        if len(names) != len(shape):
            raise InvalidRequest(f"{what} has shape {shape} and names {len(names)} axes: {self.axes!r}")
        if len(set(names)) != len(names):
            raise InvalidRequest(f"{what} names an axis twice: {self.axes!r}")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "axes", " ".join(names))

    @property
    def item_nbytes(self) -> int:
        """Bytes of one item."""
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_nbytes

    def axis_size(self, axis: str) -> int | None:
        """Size of the named axis; None if the tensor has no such axis."""
        names = self.axes.split()
        return self.shape[names.index(axis)] if axis in names else None


@dataclass(frozen=True)
class KVLayout:
    """The tensors of one block, packed in order; each starts at a multiple of its item size.

    Attributes:
        tensors: at least one, with unique names; any iterable is accepted and kept as a tuple.
        offsets: byte offset of every tensor in the block.
        nbytes: bytes of one block.

    Raises:
        InvalidRequest: there is none, too many, or a name twice.
    """

    tensors: tuple[TensorSpec, ...]
    offsets: tuple[int, ...] = field(repr=False, compare=False)
    nbytes: int = field(repr=False, compare=False)

    def __init__(self, tensors: Iterable[TensorSpec]) -> None:
        specs = tuple(tensors)
        if not 1 <= len(specs) <= MAX_TENSORS:
            raise InvalidRequest(f"the layout has {len(specs)} tensors; it must be within 1..{MAX_TENSORS}")
        seen: set[str] = set()
        for spec in specs:
            if not isinstance(spec, TensorSpec):
                raise InvalidRequest(f"a layout is made of TensorSpec, not {type(spec).__name__}")
            if spec.name in seen:
                raise InvalidRequest(f"the layout names tensor {spec.name!r} twice")
            seen.add(spec.name)
        offsets, nbytes = _place(specs)
        object.__setattr__(self, "tensors", specs)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "nbytes", nbytes)

    @property
    def text(self) -> str:
        """The tensors in order, as `bfloat16 kv=2 layer=6 token=64 head=12 dim=32`, with "; " between two.

        A hint for codecs: at most MAX_TEXT_CHARS; a layout that would be longer says only the first tensor's dtype.
        """
        tensors = (
            " ".join(
                (spec.dtype, *(f"{axis}={size}" for axis, size in zip(spec.axes.split(), spec.shape, strict=True)))
            )
            for spec in self.tensors
        )
        text = "; ".join(tensors)
        return text if len(text) <= MAX_TEXT_CHARS else self.tensors[0].dtype


def _in_words(spec: TensorSpec) -> str:
    sizes = (f"{axis}={size}" for axis, size in zip(spec.axes.split(), spec.shape, strict=True))
    return " ".join((spec.dtype, *sizes))


def _place(tensors: Iterable[TensorSpec]) -> tuple[tuple[int, ...], int]:
    offsets: list[int] = []
    end = 0
    for spec in tensors:
        start = -(-end // spec.item_nbytes) * spec.item_nbytes
        offsets.append(start)
        end = start + spec.nbytes
    return tuple(offsets), end
