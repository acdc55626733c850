"""The frame notices every damage, allocates nothing on anybody's word, and tells a newer format from a broken one."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from kvstore.codec.frame import HEADER_BYTES, FrameError, FrameFormat, FrameHeader
from kvstore.codec.select import UnknownFormatError
from kvstore.tiers.base import BlockRef, SlabRange, TierItem
from kvstore.tiers.checksums import block_checksum

HASH_BYTES = 8


def bf16_block(nbytes: int) -> NDArray[np.uint8]:
    values = np.random.default_rng(3).standard_normal(nbytes // 2 + 1, dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)[:nbytes]


def item_for(raw: NDArray[np.uint8], parent: bytes = b"p" * 32, dtype: str = "bfloat16") -> TierItem:
    return TierItem(BlockRef(b"n" * 32, b"k" * 32), SlabRange(1, 0, raw.nbytes), block_checksum(raw), parent, 5, dtype)


def framed(raw: NDArray[np.uint8], item: TierItem) -> bytearray:
    return bytearray(b"".join(FrameFormat().encode(item, raw)))


def decode(frame: bytes | bytearray, item: TierItem) -> NDArray[np.uint8]:
    out = np.zeros(item.range.nbytes, dtype=np.uint8)
    FrameFormat().decode(memoryview(frame), item, out)
    return out


def rehashed(frame: bytearray, header_bytes: int = HEADER_BYTES) -> bytearray:
    """The frame with a header hash that fits what is in the header."""
    digest = xxhash.xxh3_64_intdigest(bytes(frame[: header_bytes - HASH_BYTES]))
    struct.pack_into("<Q", frame, header_bytes - HASH_BYTES, digest)
    return frame


def test_every_single_flipped_bit_is_noticed() -> None:
    raw = bf16_block(700)
    item = item_for(raw)
    frame = framed(raw, item)
    assert frame[12] == 2, "the flips must reach a compressed payload"
    codec_format = FrameFormat()
    out = np.zeros(raw.nbytes, dtype=np.uint8)
    for bit in range(8 * len(frame)):
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):  # never LookupError: damage is not mistaken for a newer version
            codec_format.decode(memoryview(bytes(frame)), item, out)
        frame[bit // 8] ^= 1 << bit % 8
    assert np.array_equal(decode(frame, item), raw)


def test_every_truncation_and_any_tail_is_noticed() -> None:
    raw = bf16_block(700)
    item = item_for(raw)
    frame = framed(raw, item)
    for length in range(len(frame)):
        with pytest.raises(FrameError):
            decode(frame[:length], item)
    for tail in (b"\0", b"\0" * 4096, bytes(frame)):
        with pytest.raises(FrameError):
            decode(frame + tail, item)


@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("offset", [128, 136], ids=["raw bytes", "payload bytes"])
def test_absurd_lengths_under_a_true_hash_allocate_nothing(offset: int, value: int) -> None:
    raw = bf16_block(5000)
    item = item_for(raw)
    frame = framed(raw, item)
    struct.pack_into("<Q", frame, offset, value)
    rehashed(frame)
    codec_format = FrameFormat()
    out = np.zeros(raw.nbytes, dtype=np.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            codec_format.decode(memoryview(frame), item, out)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("header_bytes", [0, 1, 11, 12, 19, 175, 177, 184, 4096, 4097, 65535])
def test_absurd_header_sizes(header_bytes: int) -> None:
    raw = bf16_block(700)
    item = item_for(raw)
    frame = framed(raw, item)
    struct.pack_into("<H", frame, 10, header_bytes)
    if 20 <= header_bytes <= len(frame):
        rehashed(frame, header_bytes)
    with pytest.raises(FrameError):
        decode(frame, item)


def test_a_newer_frame_version_is_unknown_not_damaged() -> None:
    raw = bf16_block(700)
    item = item_for(raw)
    frame = framed(raw, item)
    struct.pack_into("<HH", frame, 8, 2, 240)  # a longer header, hashed at its own end
    with pytest.raises(UnknownFormatError, match="version 2"):
        decode(rehashed(frame, 240), item)
    frame[30] ^= 1
    with pytest.raises(FrameError):
        decode(frame, item)


@pytest.mark.parametrize(("offset", "value"), [(12, 999), (14, 2), (16, 2), (16, 3), (16, 0x8000)])
def test_unknown_codecs_and_flags_are_unknown_not_damaged(offset: int, value: int) -> None:
    raw = bf16_block(700)
    item = item_for(raw)
    frame = framed(raw, item)
    struct.pack_into("<H", frame, offset, value)
    with pytest.raises(UnknownFormatError, match="not known to this build"):
        decode(rehashed(frame), item)


def test_another_codec_of_ours_cannot_read_the_payload() -> None:
    raw = bf16_block(700)
    item = item_for(raw)
    for codec_id in (1, 3, 4):
        frame = framed(raw, item)
        struct.pack_into("<H", frame, 12, codec_id)
        try:
            out = decode(rehashed(frame), item)
        except ValueError:
            continue
        assert block_checksum(out) != item.checksum, "what is left is the tier's checksum"


def test_the_frame_serves_only_the_block_it_holds() -> None:
    raw = bf16_block(700)
    item = item_for(raw)
    frame = framed(raw, item)
    for other in (
        item._replace(ref=BlockRef(b"N" * 32, b"k" * 32)),
        item._replace(ref=BlockRef(b"n" * 32, b"K" * 32)),
        item._replace(checksum=bytes(16)),
        item._replace(range=SlabRange(1, 0, 699)),
        item._replace(range=SlabRange(1, 0, 701)),
    ):
        with pytest.raises(FrameError):
            decode(frame, other)


def test_header_fields() -> None:
    raw = bf16_block(1001)
    root = FrameHeader.parse(memoryview(framed(raw, item_for(raw, parent=b""))))
    child = FrameHeader.parse(memoryview(framed(raw, item_for(raw, parent=bytes(32)))))
    assert (root.parent, child.parent) == (b"", bytes(32)), "no parent is not a parent of zeros"
    assert (root.epoch, root.raw_bytes, root.checksum) == (5, 1001, block_checksum(raw))


def test_golden_frame() -> None:
    """What is on disks today; if this fails, the frame's or the codec's version must go up."""
    raw = np.arange(8, dtype=np.uint8)
    frame = framed(raw, item_for(raw, parent=b"", dtype=""))
    assert frame.hex() == (
        "4b564652414d45000100b000010001000100000000000000"  # magic, version, header bytes, codec, flags
        + "6e" * 32
        + "6b" * 32
        + "00" * 32
        + "050000000000000008000000000000000800000000000000"  # epoch, raw bytes, payload bytes
        + "e1e4432a62217fe4cfd50c61c8bb98c1"  # xxh3-128 of the raw bytes
        + "f888af857c2d1c3a3ce8649e2144ff67"  # xxh3-64 of the payload, of the header
        + "0001020304050607"
    )
