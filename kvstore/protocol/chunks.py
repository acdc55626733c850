"""Messages that carry block bytes, put together and taken apart without the copies that protobuf's own classes make.

They are protobuf all the same: any generated code reads what is written here, and what it writes is read here.
"""

from __future__ import annotations

from kvstore.protocol.errors import InvalidRequest

CHUNK_BYTES_MAX = 2 << 20
FETCH_DATA_FIELD = 5
STORE_DATA_FIELD = 2

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES_MAX = 10


def join(head: bytes, data_field: int, data: memoryview) -> bytes:
    """One message: `head` is a serialized message of the same type without its data."""
    return b"".join((head, bytes((data_field << 3 | _LENGTH,)), _varint(len(data)), data))


def split(message: bytes, data_field: int) -> tuple[bytes, memoryview]:
    """The message without its data, and the data where it lies.

    Raises:
        InvalidRequest: the bytes are no protobuf message.
    """
    view = memoryview(message)
    rest, data, at = b"", view[:0], 0
    while at < len(view):
        begin = at
        tag, at = _read_varint(view, at)
        start, at = _skip(view, at, tag & 7)
        if tag == data_field << 3 | _LENGTH:
            data = view[start:at]
        else:
            rest += view[begin:at]
    return rest, data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(view[at : at + _VARINT_BYTES_MAX]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise InvalidRequest("the bytes are no protobuf message: a number does not end")


def _skip(view: memoryview, at: int, wire_type: int) -> tuple[int, int]:
    """Where a field's content begins and ends."""
    if wire_type == _VARINT:
        return at, _read_varint(view, at)[1]
    if wire_type == _LENGTH:
        size, at = _read_varint(view, at)
    elif wire_type in (_FIXED64, _FIXED32):
        size = 8 if wire_type == _FIXED64 else 4
    else:
        raise InvalidRequest(f"the bytes are no protobuf message: there is no wire type {wire_type}")
    if at + size > len(view):
        raise InvalidRequest("the bytes are no protobuf message: a field ends behind them")
    return at, at + size
