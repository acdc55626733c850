"""The frame notices every damage, allocates nothing on anybody's word, and tells a newer format from a broken one."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import xxhash
import zstandard

from kv_content import Bytes, content, item_for
from kvstore.codec import header as header_module
from kvstore.codec.frame import FrameError, FrameFormat, FrameHeader, UnknownFormatError
from kvstore.codec.header import FRAME_VERSION, MAX_HEADER_BYTES
from kvstore.tiers.base import BlockRef, SlabRange, TierItem
from kvstore.tiers.checksums import block_checksum

LAYOUT = "bfloat16 kv=2 layer=1 token=8 dim=32; int8 x=100"
NBYTES = 2 * 512 + 100
HASH_BYTES = 8
SECTIONS = 168 + len(LAYOUT)  # where the first section lies


def small_block() -> Bytes:
    """Two tensors, the first of which exphuf takes."""
    return np.concatenate([content("channels", 1024), content("sparse", 100)])


def framed(raw: Bytes, item: TierItem) -> bytearray:
    return bytearray(b"".join(FrameFormat(numba=False).encode(item, raw).pieces))


def decode(frame: bytes | bytearray, item: TierItem) -> Bytes:
    out = np.zeros(item.range.nbytes, dtype=np.uint8)
    FrameFormat(numba=False).decode(memoryview(bytes(frame)), item, out)
    return out


def header_bytes(frame: bytearray) -> int:
    return int(struct.unpack_from("<H", frame, 10)[0])


def rehashed(frame: bytearray, nbytes: int = 0) -> bytearray:
    """The frame with a header hash that fits what is in the header, and a payload hash that fits the payload."""
    nbytes = nbytes or header_bytes(frame)
    struct.pack_into("<Q", frame, 160, xxhash.xxh3_64_intdigest(bytes(frame[nbytes:])))
    digest = xxhash.xxh3_64_intdigest(bytes(frame[: nbytes - HASH_BYTES]))
    struct.pack_into("<Q", frame, nbytes - HASH_BYTES, digest)
    return frame


def test_round_trip_of_two_tensors() -> None:
    raw = small_block()
    item = item_for(raw, LAYOUT)
    encoded = FrameFormat(numba=False).encode(item, raw)
    assert (encoded.codec, encoded.checksum, encoded.lossy) == (5, item.checksum, False)
    assert np.array_equal(decode(b"".join(encoded.pieces), item), raw)


def test_every_single_flipped_bit_is_noticed() -> None:
    raw = small_block()
    item = item_for(raw, LAYOUT)
    frame = framed(raw, item)
    parsed, _ = FrameHeader.parse(memoryview(frame))
    assert [section.codec_id for section in parsed.sections] == [5, 6], "the flips must reach compressed payloads"
    codec_format = FrameFormat(numba=False)
    out = np.zeros(raw.nbytes, dtype=np.uint8)
    for bit in range(8 * len(frame)):
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):  # never LookupError: damage is not mistaken for a newer version
            codec_format.decode(memoryview(frame), item, out)
        frame[bit // 8] ^= 1 << bit % 8
    assert np.array_equal(decode(frame, item), raw)


@pytest.mark.parametrize("kind", ["channels", "random", "some zeros"])
def test_sampled_bits_of_a_large_frame(kind: str) -> None:
    raw = content(kind, 2 << 20)
    item = item_for(raw, "bfloat16 kv=2 layer=4 token=64 head=32 dim=64")
    frame = framed(raw, item)
    codec_format = FrameFormat()
    out = np.zeros(raw.nbytes, dtype=np.uint8)
    for bit in np.random.default_rng(5).integers(0, 8 * len(frame), 300).tolist():
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            codec_format.decode(memoryview(frame), item, out)
        frame[bit // 8] ^= 1 << bit % 8
    codec_format.decode(memoryview(frame), item, out)
    assert np.array_equal(out, raw)


def test_every_truncation_and_any_tail_is_noticed() -> None:
    raw = small_block()
    item = item_for(raw, LAYOUT)
    frame = framed(raw, item)
    for length in range(len(frame)):
        with pytest.raises(FrameError):
            decode(frame[:length], item)
    for tail in (b"\0", b"\0" * 4096, bytes(frame)):
        with pytest.raises(FrameError):
            decode(frame + tail, item)


ABSURD = [0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1]
LENGTHS = {
    "raw": (128, "<Q"),
    "payload": (136, "<Q"),
    "sections": (20, "<H"),
    "layout": (22, "<H"),
    "section's start": (SECTIONS + 12, "<Q"),
    "section's raw": (SECTIONS + 20, "<Q"),
    "section's stored": (SECTIONS + 28, "<Q"),
    "axes": (SECTIONS + 8, "<B"),
    "axis": (SECTIONS + 36, "<I"),
}


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize("field", LENGTHS)
def test_absurd_lengths_under_a_true_hash_allocate_nothing(field: str, value: int) -> None:
    raw = small_block()
    item = item_for(raw, LAYOUT)
    frame = framed(raw, item)
    offset, size = LENGTHS[field]
    value &= (1 << 8 * struct.calcsize(size)) - 1
    if struct.unpack_from(size, frame, offset) == (value,):  # the truth, for once
        value += 1
    struct.pack_into(size, frame, offset, value)
    rehashed(frame)
    codec_format = FrameFormat(numba=False)
    out = np.zeros(raw.nbytes, dtype=np.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            codec_format.decode(memoryview(frame), item, out)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def with_payload(raw: Bytes, item: TierItem, payload: bytes) -> bytearray:
    """A frame of one section whose payload is this one, every hash true."""
    frame = framed(raw, item)
    head = frame[: header_bytes(frame)]
    struct.pack_into("<Q", head, 136, len(payload))
    struct.pack_into("<Q", head, 168 + len(item.layout) + 28, len(payload))
    return rehashed(head + payload, len(head))


def test_zstd_bombs_allocate_nothing() -> None:
    """Frames that claim, or hold, gigabytes; and one whose window alone would be 2 GiB."""
    raw = content("sparse", 4096)
    item = item_for(raw, "int8")
    small = zstandard.ZstdCompressor().compress(b"\0" * (64 << 20))
    claimed = b"\x28\xb5\x2f\xfd\xe0" + (2**63).to_bytes(8, "little") + b"\x01\x00\x00"
    window = b"\x28\xb5\x2f\xfd\x40\xa8" + (4096 - 256).to_bytes(2, "little") + b"\x03\x00\x00" + b"\0" * 20
    for bomb in (small, claimed, window):
        assert len(bomb) < 4096
        frame = with_payload(raw, item, len(bomb).to_bytes(4, "little") + bomb)
        out = np.zeros(raw.nbytes, dtype=np.uint8)
        codec_format = FrameFormat(numba=False)
        tracemalloc.start()
        try:
            with pytest.raises(ValueError):
                codec_format.decode(memoryview(frame), item, out)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("nbytes", [0, 1, 11, 12, 19, 167, 175, 176, 184, 4096, 4097, 65535])
def test_absurd_header_sizes(nbytes: int) -> None:
    raw = small_block()
    item = item_for(raw, LAYOUT)
    frame = framed(raw, item)
    struct.pack_into("<H", frame, 10, nbytes)
    if 20 <= nbytes <= len(frame):
        digest = xxhash.xxh3_64_intdigest(bytes(frame[: nbytes - HASH_BYTES]))
        struct.pack_into("<Q", frame, nbytes - HASH_BYTES, digest)
    with pytest.raises(FrameError):
        decode(frame, item)


def test_a_newer_frame_version_is_unknown_not_damaged() -> None:
    raw = small_block()
    item = item_for(raw, LAYOUT)
    frame = framed(raw, item)
    longer = header_bytes(frame) + 8  # a longer header, hashed at its own end
    struct.pack_into("<HH", frame, 8, FRAME_VERSION + 1, longer)
    digest = xxhash.xxh3_64_intdigest(bytes(frame[: longer - HASH_BYTES]))
    struct.pack_into("<Q", frame, longer - HASH_BYTES, digest)
    with pytest.raises(UnknownFormatError, match=f"version {FRAME_VERSION + 1}"):
        decode(frame, item)
    frame[30] ^= 1
    with pytest.raises(FrameError):
        decode(frame, item)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(16, 4), (16, 0x8000), (SECTIONS, 999), (SECTIONS + 2, 2), (SECTIONS + 4, 0x50)],
    ids=["flag 4", "flag 32768", "codec", "codec version", "dtype"],
)
def test_unknown_codecs_flags_and_dtypes_are_unknown_not_damaged(offset: int, value: int) -> None:
    raw = small_block()
    item = item_for(raw, LAYOUT)
    frame = framed(raw, item)
    frame[offset] = value & 255
    frame[offset + 1] |= value >> 8
    with pytest.raises(UnknownFormatError, match="not known to this build"):
        decode(rehashed(frame), item)


def test_another_codec_of_ours_cannot_read_the_payload() -> None:
    raw = small_block()
    item = item_for(raw, LAYOUT)
    for codec_id in (1, 6, 7):
        frame = framed(raw, item)
        struct.pack_into("<H", frame, SECTIONS, codec_id)
        with pytest.raises(ValueError):
            decode(rehashed(frame), item)


def test_the_frame_serves_only_the_block_it_holds() -> None:
    raw = small_block()
    item = item_for(raw, LAYOUT)
    frame = framed(raw, item)
    for other in (
        item._replace(ref=BlockRef(b"N" * 32, b"k" * 32)),
        item._replace(ref=BlockRef(b"n" * 32, b"K" * 32)),
        item._replace(checksum=bytes(16)),
        item._replace(range=SlabRange(1, 0, NBYTES - 1)),
        item._replace(range=SlabRange(1, 0, NBYTES + 1)),
    ):
        with pytest.raises(FrameError):
            decode(frame, other)


def test_a_frame_says_what_it_holds_without_help_from_outside() -> None:
    raw = small_block()
    frame = framed(raw, item_for(raw, LAYOUT))
    head, _ = FrameHeader.parse(memoryview(frame))
    assert head.layout == LAYOUT
    first, second = (section.tensor for section in head.sections)
    assert (first.dtype, first.shape, first.kv, first.layer, first.token) == ("bfloat16", (2, 1, 8, 32), 0, 1, 2)
    assert (second.dtype, second.shape, second.start, second.nbytes) == ("int8", (100,), 1024, 100)
    assert np.array_equal(decode(frame, item_for(raw)), raw), "the item's layout is not asked"


def test_root_and_epoch() -> None:
    raw = small_block()
    root, _ = FrameHeader.parse(memoryview(framed(raw, item_for(raw, parent=b""))))
    child, _ = FrameHeader.parse(memoryview(framed(raw, item_for(raw, parent=bytes(32)))))
    assert (root.parent, child.parent) == (b"", bytes(32)), "no parent is not a parent of zeros"
    assert (root.epoch, root.raw_bytes, root.checksum) == (5, NBYTES, block_checksum(raw))


@pytest.mark.parametrize(
    "layout", ["x" * 5000, "é" * 5000, "; ".join(["int8 a=1"] * 51), "; ".join(["int8 a=1"] * 500)]
)
def test_no_layout_makes_a_header_too_long(layout: str) -> None:
    raw = content("ramp", layout.count("int8") or 40)
    item = item_for(raw, layout)
    frame = framed(raw, item)
    assert header_bytes(frame) <= MAX_HEADER_BYTES
    assert np.array_equal(decode(frame, item), raw)


def test_the_worst_header_fits() -> None:
    """51 tensors of one axis, the most that a layout text has room for, and padding between every two of them."""
    layout = "; ".join(["int8 a=1", "float64 b=1"] * 16)
    raw = content("ramp", 16 * 16)
    frame = framed(raw, item_for(raw, layout))
    assert len(FrameHeader.parse(memoryview(frame))[0].sections) == 48
    assert header_bytes(frame) <= header_module.MAX_HEADER_BYTES
    assert np.array_equal(decode(frame, item_for(raw)), raw)


def test_raw_bytes_cost_a_header_and_nothing_else() -> None:
    raw = content("random", 1 << 20)
    frame = framed(raw, item_for(raw, "bfloat16 kv=2 layer=4 token=64 head=16 dim=64"))
    assert len(frame) == raw.nbytes + header_bytes(frame) <= 1.001 * raw.nbytes
