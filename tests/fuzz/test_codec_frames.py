"""Stored frames and records under damage: found, or the very bytes; and nothing is allocated for what they claim."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz_messages import fuzzing
from kv_content import content, item_for
from kvstore.codec.frame import FrameFormat, UnknownFormatError
from kvstore.codec.header import MAX_HEADER_BYTES
from kvstore.codec.kernels import compiled_loops
from kvstore.tiers.base import TierItem
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.cold_records import RECORD_BYTES, Totals, unpack_record, unpack_record_1

LAYOUTS = (
    ("bfloat16 kv=2 layer=2 token=16 head=2 dim=64", 2 * 2 * 16 * 2 * 64 * 2, ""),
    ("float16 kv=2 token=16 dim=64", 2 * 16 * 64 * 2, ""),
    ("float8_e4m3 token=16 dim=300; bfloat16 kv=2 token=8 dim=33", 16 * 300 + 2 * 8 * 33 * 2, ""),
    ("bfloat16 kv=2 layer=2 token=16 head=2 dim=64", 2 * 2 * 16 * 2 * 64 * 2, "int8kv"),
    ("float32 token=16 dim=100", 6400, ""),
    ("", 777, ""),
)
FORMATS = [FrameFormat(numba=choice) for choice in ((False, True) if compiled_loops() else (False,))]
# A decode needs a tile or two beside the block, and tables.
ALLOCATED_BYTES_MAX = 2 << 20
EDGES = (0, 1, 0x7F, 0x80, 0xFF, (1 << 16) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_HEADER_BYTES_AT, _PAYLOAD_HASH_AT, _FIXED_BYTES = 10, 160, 168


def stored(number: int) -> tuple[bytes, TierItem]:
    """A frame as it is written, and what it was made of."""
    layout, nbytes, lossy = LAYOUTS[number]
    raw = content("bf16" if number % 2 else "channels", nbytes)
    item = item_for(raw, layout, lossy=lossy)
    encoded = FORMATS[0].encode(item, raw)
    return b"".join(encoded.pieces), item._replace(checksum=encoded.checksum)


FRAMES = [stored(number) for number in range(len(LAYOUTS))]


def check_decode(frame: bytes, item: TierItem) -> None:
    """Decode as the cold tier does: damaged, of another build, or the bytes that the checksum is of."""
    for codec_format in FORMATS:
        out = np.zeros(item.range.nbytes, np.uint8)
        tracemalloc.start()  # for this alone: it makes all else slow
        try:
            codec_format.decode(memoryview(frame), item, out)
        except (ValueError, UnknownFormatError) as error:
            assert str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < ALLOCATED_BYTES_MAX, f"{peak} bytes were allocated"


def sealed(frame: bytes) -> bytes:
    """A frame whose hashes are right again, so that what is behind them is reached."""
    if len(frame) < _FIXED_BYTES + 8:
        return frame
    (header_bytes,) = struct.unpack_from("<H", frame, _HEADER_BYTES_AT)
    header_bytes = min(max(header_bytes, _FIXED_BYTES + 8), len(frame), MAX_HEADER_BYTES)
    head, payload = bytearray(frame[: header_bytes - 8]), frame[header_bytes:]
    struct.pack_into("<H", head, _HEADER_BYTES_AT, header_bytes)
    struct.pack_into("<Q", head, _PAYLOAD_HASH_AT, xxhash.xxh3_64_intdigest(payload))
    return bytes(head) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(head))) + payload


@st.composite
def damage(draw: st.DrawFn, sizes: tuple[int, ...]) -> tuple[int, list[tuple[int, bytes]], int]:
    """Which frame, what is written over it and where, and how many bytes are cut off (or, below 0, added)."""
    number = draw(st.integers(0, len(sizes) - 1))
    places = st.one_of(st.integers(0, min(400, sizes[number]) - 1), st.integers(0, sizes[number] - 1))
    numbers = st.tuples(st.sampled_from(EDGES), st.sampled_from("BHIQ")).map(
        lambda both: struct.pack(f"<{both[1]}", both[0] & (1 << 8 * struct.calcsize(both[1])) - 1)
    )
    patches = draw(st.lists(st.tuples(places, st.one_of(numbers, st.binary(min_size=1, max_size=9))), max_size=4))
    return number, patches, draw(st.one_of(st.just(0), st.just(0), st.integers(-20, 300)))


def damaged(frame: bytes, patches: list[tuple[int, bytes]], cut: int) -> bytes:
    buffer = bytearray(frame)
    for at, patch in patches:
        buffer[at : at + len(patch)] = patch
    return bytes(buffer[:-cut]) if cut > 0 else bytes(buffer) + bytes(-cut)


SIZES = tuple(len(frame) for frame, _ in FRAMES)


@fuzzing(300, "random frames")
@given(st.binary(max_size=600), st.integers(0, len(LAYOUTS) - 1), st.booleans())
def test_random_bytes_are_no_frame(junk: bytes, number: int, begins_well: bool) -> None:
    frame, item = FRAMES[number]
    check_decode(frame[:12] + junk if begins_well else junk, item)
    assert not np.array_equal(np.frombuffer(junk, np.uint8), np.frombuffer(frame, np.uint8))


@fuzzing(400, "damaged frames")
@given(damage(SIZES))
def test_damage_is_found(wrong: tuple[int, list[tuple[int, bytes]], int]) -> None:
    """Without new hashes nothing gets through but the frame as it was."""
    frame, item = FRAMES[wrong[0]]
    changed = damaged(frame, *wrong[1:])
    for codec_format in FORMATS:
        out = np.zeros(item.range.nbytes, np.uint8)
        try:
            codec_format.decode(memoryview(changed), item, out)
        except (ValueError, LookupError):
            assert changed != frame
        else:
            assert changed == frame
            assert block_checksum(out) == item.checksum


@fuzzing(1200, "sealed frames")
@given(damage(SIZES))
@example(wrong=(3, [(285, b"|")], 0))  # a scale that no float32 holds once it is multiplied
def test_absurd_numbers_behind_good_hashes(wrong: tuple[int, list[tuple[int, bytes]], int]) -> None:
    """What the hashes cannot tell, as of a frame that somebody made on purpose, the parser does, or the checksum."""
    frame, item = FRAMES[wrong[0]]
    check_decode(sealed(damaged(frame, *wrong[1:])), item)


@fuzzing(300, "records")
@given(st.binary(max_size=200), st.binary(max_size=200), st.booleans())
def test_records_and_totals(entry: bytes, data: bytes, sized: bool) -> None:
    """ValueError or a record, and nothing else."""
    if sized:
        entry, data = entry.ljust(64, b"e")[:64], data.ljust(RECORD_BYTES, b"d")[:RECORD_BYTES]
    for unpack in (unpack_record, unpack_record_1):
        with pytest.raises(ValueError):
            unpack(entry, data)
    if len(data) == 24:
        assert Totals.unpack(data).pack() == data
    else:
        with pytest.raises(ValueError):
            Totals.unpack(data)
