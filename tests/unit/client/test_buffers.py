"""What `out` and `blocks` may be, and what is refused."""

from __future__ import annotations

import ctypes
from array import array

import numpy as np
import pytest

from kvstore_client import InvalidRequest, KVLayout, TensorSpec
from kvstore_client.buffers import BlockBuffers, Wanted, block_buffers

LAYOUT = KVLayout([TensorSpec("kv", "bfloat16", (2, 4, 8), "kv token dim")])
N = 128  # bytes of a block


def of(memory: object, count: int = 3, *, is_exact: bool = True, is_writable: bool = False) -> BlockBuffers:
    return block_buffers(memory, LAYOUT, Wanted("blocks", count, is_exact, is_writable))


def whole(memory: object, count: int = 3) -> np.ndarray:
    found = of(memory, count).whole
    assert found is not None
    assert found.shape == (count, N)
    return found


RAW = np.arange(3 * N, dtype=np.uint8)


@pytest.mark.parametrize(
    "memory",
    [
        RAW.reshape(3, N),
        RAW,
        RAW.view(np.uint16).reshape(3, 2, 4, 8),
        RAW.view(np.int8).reshape(3, 2, -1),
        RAW.tobytes(),
        bytearray(RAW),
        memoryview(RAW),
        array("B", RAW.tobytes()),
        (RAW.ctypes.data, RAW.nbytes),
    ],
    ids=["rows", "flat", "n-d", "int8", "bytes", "bytearray", "memoryview", "array", "address"],
)
def test_one_piece(memory: object) -> None:
    assert (whole(memory) == RAW.reshape(3, N)).all()


def test_one_piece_is_not_copied() -> None:
    assert np.shares_memory(whole(RAW.reshape(3, N)), RAW)
    raw = (ctypes.c_ubyte * (3 * N))()
    whole(raw)[2, 5] = 9
    assert raw[2 * N + 5] == 9


@pytest.mark.parametrize("kind", ["buffers", "segments", "addresses"])
def test_a_buffer_or_segments_for_each_block(kind: str) -> None:
    rows = RAW.reshape(3, N)
    memory: dict[str, list[object]] = {
        "buffers": [rows[0].view(np.uint16).reshape(2, 4, 8), bytes(rows[1]), memoryview(rows[2])],
        "segments": [[row[:40], row[40:].view(np.uint16)] for row in rows],
        "addresses": [[(row.ctypes.data, 100), (row.ctypes.data + 100, 28)] for row in rows],
    }
    found = of(memory[kind])
    assert found.whole is None
    assert [np.concatenate(list(pieces)).tobytes() for pieces in found.pieces] == [row.tobytes() for row in rows]


def test_rows_apart_are_taken_one_by_one() -> None:
    pool = np.zeros((6, N), np.uint8)
    found = of(pool[::2])
    assert [len(pieces) for pieces in found.pieces] == [1, 1, 1]
    assert np.shares_memory(found.pieces[2][0], pool[4])


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(3 * N // 2, dtype=torch.int16).view(torch.bfloat16).reshape(3, 2, 4, 8)
    assert whole(tensor).tobytes() == np.arange(3 * N // 2, dtype=np.int16).tobytes()
    assert len(of([tensor[0], tensor[1], tensor[2]]).pieces) == 3
    with pytest.raises(InvalidRequest, match="not contiguous"):
        of(tensor.transpose(1, 2))
    with pytest.raises(InvalidRequest, match="meta"):
        of(tensor.to("meta"))


def test_more_room_than_needed_is_fine_for_reading() -> None:
    assert of(bytearray(5 * N), is_exact=False, is_writable=True).whole is not None
    assert len(of([bytearray(N)] * 5, is_exact=False, is_writable=True).pieces) == 3


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (np.zeros((3, N - 1), np.uint8), f"{N - 1} bytes a block; a block of this namespace has {N}"),
        (np.zeros((2, N), np.uint8), "holds 2 blocks; it must hold 3"),
        (np.zeros((4, N), np.uint8), "holds 4 blocks; it must hold 3"),
        (bytes(3 * N + 1), "not a multiple"),
        (np.zeros((3, N // 4), np.float32), "dtype float32, the layout bfloat16"),
        (np.zeros((3, N // 8), object), "Python objects"),
        (np.zeros((N, 3), np.uint8).T, "not contiguous"),
        ([bytes(N)] * 2, "holds 2 blocks"),
        ([bytes(N), bytes(N), bytes(N - 2)], rf"blocks\[2\] has {N - 2} bytes"),
        ([[bytes(N)], [bytes(N)], [bytes(N), bytes(1)]], rf"blocks\[2\] has {N + 1} bytes"),
        ([np.zeros((8, 16), np.uint8).T] * 3, "not C-contiguous"),
        ([[(0, N)]] * 3, "address 0"),
        ("text", "is a str, not a contiguous buffer"),
        (None, "is a NoneType"),
        (7, "is a int"),
        ([7, 8, 9], r"blocks\[0\] is a int"),
    ],
)
def test_what_is_refused(memory: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        of(memory)


@pytest.mark.parametrize("memory", [bytes(3 * N), [bytes(N)] * 3, [[bytes(N)]] * 3])
def test_read_only_memory_cannot_be_written(memory: object) -> None:
    with pytest.raises(InvalidRequest, match="read-only"):
        of(memory, is_writable=True)


def test_mixed_widths_take_bytes_only() -> None:
    layout = KVLayout([TensorSpec("k", "bfloat16", (4,), "x"), TensorSpec("scale", "float32", (2,), "x")])
    with pytest.raises(InvalidRequest, match="bfloat16, float32"):
        block_buffers(np.zeros((1, 8), np.uint16), layout, Wanted("out", 1, True, True))
    assert block_buffers(np.zeros((1, 16), np.uint8), layout, Wanted("out", 1, True, True)).whole is not None
