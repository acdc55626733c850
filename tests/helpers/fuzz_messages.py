"""Payloads for a protobuf message, made from its descriptor: right ones, nearly right ones, and what nobody would send.

They are put together as bytes and not through the generated classes, which could neither repeat a singular field, nor
hold broken UTF-8, nor a field that the daemon does not know.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple
from zlib import crc32

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st

EXAMPLES_VARIABLE = "KVTIER_FUZZ_EXAMPLES"

# Field name to values that mean something to the target; of messages the encoded bytes.
Known = Mapping[str, Sequence[Any]]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRE_TYPES = {FieldDescriptor.TYPE_DOUBLE: _FIXED64}
_EDGES = (0, 1, 2, 3, 5, 31, 32, 255, 4096, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_DOUBLES = (0.0, -0.0, 1.0, -1.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))
_LENGTHS = (0, 1, 3, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 1024, 1025, 65_537)
_TEXTS = (
    b"",
    b"\0",
    b"a\0b",
    b"bfloat16",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xc3",
    "ü§漢\N{ZERO WIDTH SPACE}".encode(),
    b"../../etc/passwd",
    b"%s%n{0}",
    b"\x1b[2J\n",
    b"x" * 1025,
    b"x" * 70_000,
)
_ANEW = random.SystemRandom().randrange(1 << 32)
_DEPTH_MAX = 3
_MANY_BYTES_MAX = 1 << 20


class Rpc(NamedTuple):
    """A method of a service, as its descriptor has it."""

    service: str  # the full name
    name: str
    request: Descriptor
    response: Descriptor

    @property
    def path(self) -> str:
        """As gRPC calls it."""
        return f"/{self.service}/{self.name}"


def rpcs(file: Any, service: str) -> list[Rpc]:
    """Every method of a service of a generated module."""
    found = file.DESCRIPTOR.services_by_name[service]
    return [Rpc(found.full_name, method.name, method.input_type, method.output_type) for method in found.methods]


def fuzzing(examples: int, what: str) -> Callable[[Any], Any]:
    """Makes a fuzz test: the same `examples` in every run, which `what` sets apart from those of other tests.

    With $KVTIER_FUZZ_EXAMPLES it is so many, and others in each run.
    """
    wanted = int(os.environ.get(EXAMPLES_VARIABLE) or 0)
    checks = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large)
    fixed = settings(max_examples=wanted or examples, database=None, deadline=None, suppress_health_check=checks)

    def make(test: Any) -> Any:
        return seed(crc32(what.encode()) ^ (_ANEW if wanted else 0))(fixed(test))

    return make


# -- the wire


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def tag(number: int, wire_type: int) -> bytes:
    """What stands before a field's value."""
    return varint(number << 3 | wire_type)


def sized(number: int, value: bytes) -> bytes:
    """A field of bytes, text, or an inner message."""
    return tag(number, _BYTES) + varint(len(value)) + value


# -- strategies


class Care(IntEnum):
    """How far a message is what its receiver wants."""

    RIGHT = 0  # every field, each with a value that the target knows where it knows one
    LIKELY = 1  # most fields, most of them with such values
    NONE = 2  # fields left out, given twice, in any order, unknown ones; any values


def payloads(descriptor: Descriptor, known: Known) -> st.SearchStrategy[bytes]:
    """Payloads of a request, from right ones to junk."""
    right, likely, careless = (message(descriptor, known, care) for care in Care)
    torn = st.tuples(careless, st.integers(1, 40)).map(lambda both: both[0][: -both[1]])
    doubled = st.tuples(right, careless).map(b"".join)
    junk = st.binary(max_size=80)
    large = st.tuples(junk, st.integers(0, 3000)).map(lambda both: both[0] * both[1])
    usual = (right, right, right, right, likely, likely, careless, careless)
    return _weighted(*usual, doubled, torn, junk, large)


def message(descriptor: Descriptor, known: Known, care: Care, depth: int = 0) -> st.SearchStrategy[bytes]:
    """A message and all that is in it."""
    fields = st.tuples(*(_field(field, known, care, depth) for field in descriptor.fields))
    if care < Care.NONE:
        return fields.map(b"".join)
    shuffled = fields.flatmap(lambda found: st.permutations(list(found)).map(b"".join))
    strange = _weighted(st.just(b""), st.just(b""), _unknown_field())
    return st.tuples(st.one_of(fields.map(b"".join), shuffled), strange).map(b"".join)


def _field(field: FieldDescriptor, known: Known, care: Care, depth: int) -> st.SearchStrategy[bytes]:
    one, absent = _value(field, known, care, depth), st.just(b"")
    twice = st.tuples(one, one).map(b"".join)
    if care == Care.RIGHT:
        return one
    if not field.is_repeated:
        return _weighted(one, one, one, one, absent) if care == Care.LIKELY else st.one_of(one, absent, twice)
    few = st.lists(one, max_size=3).map(b"".join)
    if care == Care.LIKELY:
        return st.one_of(one, few)
    many = st.tuples(one, st.sampled_from((64, 65, 251, 5000))).map(lambda both: _times(*both))
    packed = st.binary(max_size=20).map(lambda raw: sized(field.number, raw))
    return st.one_of(one, few, many, packed)


def _value(field: FieldDescriptor, known: Known, care: Care, depth: int) -> st.SearchStrategy[bytes]:
    """One occurrence of a field, with its tag."""
    number, wire_type = field.number, _wire_type(field)
    if wire_type == _VARINT:
        numbers = st.one_of(st.sampled_from(_EDGES), st.integers(0, (1 << 64) - 1))
        return _mixed(field, known, numbers, care).map(lambda value: tag(number, _VARINT) + varint(value))
    if wire_type == _FIXED64:
        doubles = st.one_of(st.sampled_from(_DOUBLES), st.floats())
        return _mixed(field, known, doubles, care).map(lambda value: tag(number, _FIXED64) + struct.pack("<d", value))
    return _mixed(field, known, _bytes(field, known, care, depth), care).map(lambda value: sized(number, value))


def _bytes(field: FieldDescriptor, known: Known, care: Care, depth: int) -> st.SearchStrategy[bytes]:
    lengths = st.tuples(st.binary(min_size=1, max_size=4), st.sampled_from(_LENGTHS))
    filled = lengths.map(lambda both: (both[0] * (both[1] // len(both[0]) + 1))[: both[1]])
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        if depth == _DEPTH_MAX:
            return filled
        inner = message(field.message_type, known, care, depth + 1)
        return inner if care < Care.NONE else _weighted(inner, inner, filled)
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.one_of(st.sampled_from(_TEXTS), st.text(max_size=20).map(str.encode), filled)
    wholes = [value for value in known.get(field.name, ()) if isinstance(value, bytes)]
    near = [cut for whole in wholes for cut in (whole[:-1], whole + b"\0", whole * 2, whole[: len(whole) // 2])]
    return st.one_of(filled, st.binary(max_size=40), st.sampled_from(near or [b""]))


def _mixed(field: FieldDescriptor, known: Known, others: st.SearchStrategy[Any], care: Care) -> st.SearchStrategy[Any]:
    kind = {_VARINT: int, _FIXED64: float, _BYTES: bytes}[_wire_type(field)]
    values = [value for value in known.get(field.name, ()) if isinstance(value, kind)]
    if not values:
        return others
    good = st.sampled_from(values)
    return {
        Care.RIGHT: good,
        Care.LIKELY: _weighted(good, good, good, good, others),
        Care.NONE: st.one_of(good, others),
    }[care]


def _weighted(*strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One of them, the more often the more often it is named: one_of() takes no notice of that."""
    return st.sampled_from(strategies).flatmap(lambda chosen: chosen)


def _times(part: bytes, count: int) -> bytes:
    """So many of a part, unless they are too large: there may be many of what it is a part of, too."""
    return part * max(1, min(count, _MANY_BYTES_MAX // max(1, len(part))))


def _unknown_field() -> st.SearchStrategy[bytes]:
    number = st.integers(100, (1 << 29) - 1)
    return st.one_of(
        st.tuples(number, st.binary(max_size=30)).map(lambda both: sized(*both)),
        number.map(lambda found: tag(found, _VARINT) + varint((1 << 64) - 1)),
        number.map(lambda found: tag(found, _FIXED32) + bytes(4)),
        st.integers(1, 15).map(lambda found: tag(found, _BYTES) + varint((1 << 31) - 1)),  # longer than all there is
        st.integers(1, 15).map(lambda found: tag(found, _VARINT) + b"\xff" * 11),  # a number without an end
        number.map(lambda found: tag(found, 3) * 200),  # groups, one in another
    )


def _wire_type(field: FieldDescriptor) -> int:
    if field.type in (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        return _BYTES
    return _WIRE_TYPES.get(field.type, _VARINT)
