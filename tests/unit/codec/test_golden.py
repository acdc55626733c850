"""What is on disks: frames of every version, written once. If one cannot be read any more, data is lost.

The content is a formula and not a random generator, whose stream may change. `python -m pytest` never writes these
files; a new version's are made by calling FrameFormat once, with content() and item() as they are here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from kvstore.codec.frame import FrameFormat
from kvstore.codec.kernels import compiled_loops
from kvstore.tiers.base import BlockRef, SlabRange, TierItem
from kvstore.tiers.checksums import block_checksum

GOLDEN = Path(__file__).parent / "golden"
MADE_WITH_ZSTD = (1, 5, 7)

# name: (kind of content, bytes, layout)
VERSION_1 = {
    "v1-bfloat16": ("bfloat16", 4001, "bfloat16"),
    "v1-float16": ("float16", 4001, "float16"),
    "v1-int8": ("bytes", 4001, "int8"),
    "v1-float32": ("bytes", 4001, "float32"),
    "v1-raw": ("bfloat16", 301, "bfloat16"),
}
VERSION_2 = {
    "v2-exphuf": ("bfloat16", 16384, "bfloat16 kv=2 layer=2 token=32 dim=64"),
    "v2-exphuf-layers-first": ("bfloat16", 16384, "bfloat16 layer=2 kv=2 token=32 dim=64"),
    "v2-exphuf-float16": ("float16", 16384, "float16 kv=2 layer=2 token=32 dim=64"),
    "v2-flat": ("bfloat16", 4001, "bfloat16"),
    "v2-huf": ("bytes", 4001, "int8"),
    "v2-unknown": ("bytes", 4001, ""),
    "v2-three-tensors": ("bfloat16", 8204, "bfloat16 token=16 dim=64; int8 x=3; float16 token=16 dim=192"),
    "v2-raw": ("noise", 300, "bfloat16"),
    "v2-int8kv": ("bfloat16", 16384, "bfloat16 kv=2 layer=2 token=32 dim=64"),
}


def content(kind: str, nbytes: int) -> NDArray[np.uint8]:
    index = np.arange(nbytes // 2 + 1, dtype=np.uint64)
    mixed = index * np.uint64(0x9E3779B97F4A7C15)
    noise = (mixed >> np.uint64(40)) | np.uint64(1 << 12)
    zeros = np.array([(value & -value).bit_length() - 1 for value in noise.tolist()], dtype=np.uint64)
    sign = (mixed >> np.uint64(63)) << np.uint64(15)
    if kind == "bfloat16":
        made = sign | ((np.uint64(127) - zeros) << np.uint64(7)) | ((mixed >> np.uint64(20)) & np.uint64(0x7F))
    elif kind == "float16":
        made = sign | ((np.uint64(15) - zeros) << np.uint64(10)) | ((mixed >> np.uint64(20)) & np.uint64(0x3FF))
    elif kind == "noise":
        made = mixed >> np.uint64(48)
    else:
        made = zeros | (zeros << np.uint64(8))
    return made.astype("<u2").view(np.uint8)[:nbytes].copy()


def item(name: str) -> tuple[TierItem, NDArray[np.uint8]]:
    kind, nbytes, layout = (VERSION_1 | VERSION_2)[name]
    raw = content(kind, nbytes)
    parent = b"" if name in ("v1-int8", "v1-float32", "v2-huf") else bytes(range(64, 96))
    lossy = "int8kv" if name.endswith("int8kv") else ""
    ref = BlockRef(bytes(range(32)), bytes(range(32, 64)))
    return TierItem(ref, SlabRange(1, 0, nbytes), block_checksum(raw), parent, 5, layout, lossy), raw


def stored(name: str) -> memoryview:
    return memoryview((GOLDEN / f"{name}.bin").read_bytes())


@pytest.mark.parametrize("name", [*VERSION_1, *VERSION_2])
def test_every_golden_frame_is_read(name: str) -> None:
    named, raw = item(name)
    if named.lossy:
        named = named._replace(checksum=FrameFormat(numba=False).encode(named, raw).checksum)
    for numba in (False, True) if compiled_loops() else (False,):
        out = np.zeros(raw.nbytes, dtype=np.uint8)
        FrameFormat(numba=numba).decode(stored(name), named, out)
        assert block_checksum(out) == named.checksum


@pytest.mark.parametrize("name", VERSION_2)
def test_what_is_written_is_what_was_written(name: str) -> None:
    """If this fails, the codec's or the frame's version must go up, and the files of the old one stay."""
    if zstandard.ZSTD_VERSION != MADE_WITH_ZSTD:
        pytest.skip("predictions and bytes go through zstd's own encoder, of which every version has its own bytes")
    named, raw = item(name)
    for numba in (False, True) if compiled_loops() else (False,):
        assert b"".join(FrameFormat(numba=numba).encode(named, raw).pieces) == stored(name)


@pytest.mark.parametrize("name", VERSION_1)
def test_damage_in_version_1_is_noticed(name: str) -> None:
    named, raw = item(name)
    frame = bytearray(stored(name))
    out = np.zeros(raw.nbytes, dtype=np.uint8)
    codec_format = FrameFormat(numba=False)
    for bit in range(0, 8 * len(frame), 1 if len(frame) < 600 else 7):
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            codec_format.decode(memoryview(frame), named, out)
        frame[bit // 8] ^= 1 << bit % 8
    for length in range(0, len(frame), 5):
        with pytest.raises(ValueError):
            codec_format.decode(memoryview(frame[:length]), named, out)
