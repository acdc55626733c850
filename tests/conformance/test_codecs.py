"""The codec contract: every codec, on every kind of bytes, in awkward sizes, gives back exactly what it was given."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.codec.base import CodecError
from kvstore.codec.frame import FrameFormat, FrameHeader
from kvstore.codec.planes import BFLOAT16, FLOAT16, PlanesCodec
from kvstore.codec.raw import RawCodec
from kvstore.codec.select import POLICIES, VersionedCodec
from kvstore.codec.tiles import TILE_BYTES
from kvstore.codec.zstd import ZstdCodec
from kvstore.tiers.base import BlockRef, SlabRange, TierItem
from kvstore.tiers.checksums import block_checksum

Bytes = NDArray[np.uint8]

CODECS: dict[str, Callable[[], VersionedCodec]] = {
    "raw": RawCodec,
    "planes-bf16": lambda: PlanesCodec(BFLOAT16),
    "planes-fp16": lambda: PlanesCodec(FLOAT16),
    "zstd-huffman": ZstdCodec.huffman,
    "zstd-1": lambda: ZstdCodec.level(1),
    "zstd-3": lambda: ZstdCodec.level(3),
}
DTYPES = (
    "bfloat16",
    "float16",
    "float32",
    "float64",
    "float8_e4m3",
    "float8_e5m2",
    "int8",
    "uint8",
    "int32",
    "",
    "new",
)
SIZES = (0, 1, 2, 3, 255, 4096, 2 * TILE_BYTES - 1, 2 * TILE_BYTES, 2 * TILE_BYTES + 1, 2 * TILE_BYTES + 3, 1_000_003)
CONTENTS = ("zeros", "ones", "random", "gaussian_bf16", "gaussian_fp16", "nans", "ramp", "sparse")


def content(kind: str, nbytes: int) -> Bytes:
    """`nbytes` bytes of a kind, the same ones each time."""
    rng = np.random.default_rng(nbytes)
    count = nbytes // 2 + 1
    if kind == "zeros":
        made = np.zeros(nbytes, dtype=np.uint8)
    elif kind == "ones":
        made = np.full(nbytes, 0xFF, dtype=np.uint8)
    elif kind == "gaussian_bf16":
        made = (rng.standard_normal(count, dtype=np.float32).view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    elif kind == "gaussian_fp16":
        made = rng.standard_normal(count).astype("<f2").view(np.uint8)
    elif kind == "nans":  # with payloads and signs, quiet and signalling
        made = (rng.integers(0, 1 << 16, count) | 0x7F80).astype("<u2").view(np.uint8)
    elif kind == "ramp":  # every 16-bit pattern in turn
        made = np.arange(count).astype("<u2").view(np.uint8)
    elif kind == "sparse":
        made = (rng.random(nbytes) < 0.01).astype(np.uint8)
    else:
        made = rng.integers(0, 256, nbytes, dtype=np.uint8)
    return made[:nbytes]


def joined(pieces: list[bytes | memoryview]) -> memoryview:
    return memoryview(b"".join(pieces))


def decoded(codec: VersionedCodec, payload: memoryview, nbytes: int) -> Bytes:
    """The decoded block; fails if a byte beside it changed."""
    around = np.full(nbytes + 2, 0xA5, dtype=np.uint8)
    codec.decode(payload, around[1:-1])
    assert around[0] == around[-1] == 0xA5
    return around[1:-1]


@pytest.fixture(params=CODECS.values(), ids=list(CODECS))
def codec(request: pytest.FixtureRequest) -> VersionedCodec:
    made: VersionedCodec = request.param()
    return made


@pytest.mark.parametrize("kind", CONTENTS)
def test_exact_both_ways(codec: VersionedCodec, kind: str) -> None:
    for nbytes in SIZES:
        raw = content(kind, nbytes)
        before = raw.copy()
        payload = joined(codec.encode(raw))
        assert np.array_equal(raw, before), "encode changed its source"
        assert np.array_equal(decoded(codec, payload, nbytes), raw), f"{kind}, {nbytes} bytes"


def test_misaligned_source_and_destination(codec: VersionedCodec) -> None:
    raw = content("gaussian_bf16", 300_001)
    shifted = np.zeros(raw.nbytes + 1, dtype=np.uint8)
    shifted[1:] = raw
    assert np.array_equal(decoded(codec, joined(codec.encode(shifted[1:])), raw.nbytes), raw)


def test_read_only_source(codec: VersionedCodec) -> None:
    raw = content("gaussian_bf16", 70_001)
    raw.flags.writeable = False
    assert np.array_equal(decoded(codec, joined(codec.encode(raw)), raw.nbytes), raw)


def test_one_instance_forgets_the_block_before(codec: VersionedCodec) -> None:
    blocks = [content(kind, nbytes) for kind in CONTENTS for nbytes in (600_001, 5, 4096)]
    payloads = [joined(codec.encode(block)) for block in blocks]
    for block, payload in zip(blocks, payloads, strict=True):
        assert np.array_equal(decoded(codec, payload, block.nbytes), block)


def test_incompressible_bytes_cost_no_more_than_a_table(codec: VersionedCodec) -> None:
    raw = content("random", 1 << 20)
    assert joined(codec.encode(raw)).nbytes <= 1.001 * raw.nbytes


def test_a_payload_of_another_size_is_an_error(codec: VersionedCodec) -> None:
    raw = content("gaussian_bf16", 300_001)
    payload = joined(codec.encode(raw))
    for nbytes in (0, 1, raw.nbytes - 2, raw.nbytes - 1, raw.nbytes + 1, raw.nbytes + 2, 2 * raw.nbytes):
        with pytest.raises(CodecError):
            codec.decode(payload, np.zeros(nbytes, dtype=np.uint8))
    for cut in (0, 1, 3, 4, 5, payload.nbytes // 2, payload.nbytes - 1):
        with pytest.raises(CodecError):
            codec.decode(payload[:cut], np.zeros(raw.nbytes, dtype=np.uint8))
    with pytest.raises(CodecError):
        codec.decode(memoryview(bytes(payload) + b"x"), np.zeros(raw.nbytes, dtype=np.uint8))


def test_arbitrary_payloads_never_do_harm(codec: VersionedCodec) -> None:
    """Whatever the bytes, a decode either raises CodecError or fills `out` and nothing else."""
    rng = np.random.default_rng(11)
    raw = content("gaussian_bf16", 20_001)
    good = np.frombuffer(joined(codec.encode(raw)), dtype=np.uint8)
    for _ in range(300):
        bad = good.copy()
        bad[rng.integers(0, bad.size, 3)] = rng.integers(0, 256, 3)
        around = np.full(raw.nbytes + 2, 0xA5, dtype=np.uint8)
        with contextlib.suppress(CodecError):
            codec.decode(bad.data, around[1:-1])
        assert around[0] == around[-1] == 0xA5


def frame_of(codec_format: FrameFormat, raw: Bytes, dtype: str) -> tuple[memoryview, TierItem]:
    place = SlabRange(1, 0, raw.nbytes)
    item = TierItem(BlockRef(b"n" * 32, b"k" * 32), place, block_checksum(raw), b"p" * 32, 5, dtype)
    return memoryview(b"".join(codec_format.encode(item, raw))), item


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_dtype_through_the_frame(policy: str, dtype: str) -> None:
    codec_format = FrameFormat(policy)
    for kind in CONTENTS:
        for nbytes in (1, 4097, 300_001):
            raw = content(kind, nbytes)
            frame, item = frame_of(codec_format, raw, dtype)
            assert FrameHeader.parse(frame).payload_bytes <= raw.nbytes, "a codec that does not pay gives way to raw"
            out = np.zeros(nbytes, dtype=np.uint8)
            codec_format.decode(frame, item, out)
            assert np.array_equal(out, raw)


def test_what_one_policy_wrote_every_other_reads() -> None:
    raw = content("gaussian_bf16", 300_001)
    for writer in POLICIES:
        frame, item = frame_of(FrameFormat(writer), raw, "bfloat16")
        for reader in POLICIES:
            out = np.zeros(raw.nbytes, dtype=np.uint8)
            FrameFormat(reader).decode(frame, item, out)
            assert np.array_equal(out, raw)


def test_threads_share_a_format_but_no_codec() -> None:
    """A zstd context shared between threads corrupts decodes; every thread must get contexts of its own."""
    codec_format = FrameFormat()
    wrong: list[str] = []

    def run(seed: int) -> None:
        raw = np.roll(content("gaussian_bf16", 600_001), seed)
        for turn in range(15):
            frame, item = frame_of(codec_format, raw, "bfloat16" if turn % 2 else "")
            out = np.zeros(raw.nbytes, dtype=np.uint8)
            codec_format.decode(frame, item, out)
            if not np.array_equal(out, raw):
                wrong.append(f"thread {seed}, turn {turn}")

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def samples(folder: Path) -> Iterator[Bytes]:
    for path in sorted((folder / "kv_samples").glob("*bf16*.npy")):
        flat = np.load(path).reshape(-1).view(np.uint8)
        yield flat[: flat.nbytes // (2 << 20) * (2 << 20)]


def test_real_keys_and_values(kvtier_data: Path) -> None:
    """Exact, and worth it: real K/V in bfloat16 shrinks by a factor of more than 1.45 (raw zstd-3: 1.27 to 1.31)."""
    codec_format, found = FrameFormat(), 0
    for flat in samples(kvtier_data):
        stored = 0
        for start in range(0, flat.nbytes, 2 << 20):
            raw = flat[start : start + (2 << 20)]
            frame, item = frame_of(codec_format, raw, "bfloat16")
            out = np.zeros(raw.nbytes, dtype=np.uint8)
            codec_format.decode(frame, item, out)
            assert np.array_equal(out, raw)
            stored += frame.nbytes
        assert flat.nbytes / stored > 1.45
        found += 1
    assert found, "no kv_samples/*bf16*.npy"


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 1.45), ("float16", 1.1)])
def test_two_byte_floats_shrink(dtype: str, least: float) -> None:
    kind = {"bfloat16": "gaussian_bf16", "float16": "gaussian_fp16"}[dtype]
    raw = content(kind, 2 << 20)
    frame, _ = frame_of(FrameFormat(), raw, dtype)
    assert raw.nbytes / frame.nbytes > least
