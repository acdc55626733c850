"""Ratios and speed of the codecs on one core: `python ops/bench/codec.py [--data DIR] [--json]`.

Every speed is a ratio of two things measured in turn in this process: decoding to memcpy of the same blocks (beyond
the caches), encoding to zstd of level 3 on the raw bytes, decoding to zipnn where that is installed (one thread each).
Times are processor time, so that neighbours on a shared machine disturb less. Blocks are of about 2 MiB: those of the
samples are put together as if they were further layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from kvstore.bench.memory import kv_like_blocks
from kvstore.codec.frame import FrameFormat
from kvstore.tiers.base import BlockRef, SlabRange, TierItem
from kvstore.tiers.checksums import block_checksum

SAMPLES = {"minilm": "minilm_l6_bf16_t64.npy", "small_lm": "tinylm_rope_gqa_bf16_t64.npy"}
BLOCK_NBYTES = 2 << 20
PLACES = 48  # blocks that are decoded to in turn: 96 MiB, beyond the caches

Bytes = NDArray[np.uint8]


class Content(NamedTuple):
    """Blocks of one layout."""

    name: str
    layout: str
    blocks: Bytes

    def items(self) -> list[TierItem]:
        """What a tier would say of each."""
        ref = BlockRef(bytes(32), bytes(32))
        return [
            TierItem(ref, SlabRange(1, 0, block.nbytes), block_checksum(block), layout=self.layout)
            for block in self.blocks
        ]


def contents(data: Path | None) -> Iterator[Content]:
    """The samples in `data`, and blocks that this project makes."""
    for name, file in SAMPLES.items():
        path = data / "kv_samples" / file if data else Path()
        if path.is_file():
            yield sample(name, np.load(path, allow_pickle=False))
    made = kv_like_blocks(8, BLOCK_NBYTES)
    yield Content("made", "bfloat16 kv=2 layer=16 token=16 head=16 dim=128", made)
    yield Content("made, layout not known", "bfloat16", made)


def sample(name: str, values: NDArray[np.uint16]) -> Content:
    """Blocks (count, layer, kv, token, head, dim) as fewer blocks of about 2 MiB with more layers."""
    count, layers, kv, *rest = values.shape
    together = min(count, max(1, round(BLOCK_NBYTES / values[0].nbytes)))
    fewer = values[: count // together * together].reshape(-1, together * layers, kv, *rest).swapaxes(1, 2)
    shape = zip(("kv", "layer", "token", "head", "dim"), fewer.shape[1:], strict=True)
    layout = " ".join(["bfloat16", *(f"{axis}={size}" for axis, size in shape)])
    return Content(name, layout, np.ascontiguousarray(fewer).reshape(len(fewer), -1).view(np.uint8))


def frames_of(codec_format: FrameFormat, content: Content) -> list[memoryview]:
    """Every block's frame, each decoded and compared."""
    frames = []
    out = np.zeros(content.blocks.shape[1], dtype=np.uint8)
    for item, block in zip(content.items(), content.blocks, strict=True):
        frame = memoryview(b"".join(codec_format.encode(item, block).pieces))
        codec_format.decode(frame, item, out)
        if (out != block).any():
            raise ArithmeticError(f"{content.name}: a block came back wrong")
        frames.append(frame)
    return frames


def against(theirs: Callable[[], None], ours: Callable[[], None], rounds: int) -> float:
    """How many times faster `ours` is: the median over rounds in which both run in turn."""
    ratios = []
    theirs()
    ours()
    for _ in range(rounds):
        started = time.process_time()
        theirs()
        between = time.process_time()
        ours()
        ratios.append((between - started) / (time.process_time() - between))
    return round(statistics.median(ratios), 4)


def decode_to_memcpy(codec_format: FrameFormat, content: Content, rounds: int) -> float:
    """Decoding into PLACES blocks in turn, to copying the raw blocks there."""
    frames, items = frames_of(codec_format, content), content.items()
    out = np.ones((PLACES, content.blocks.shape[1]), dtype=np.uint8)
    source = np.resize(content.blocks, out.shape)

    def copy() -> None:
        for target, block in zip(out, source, strict=True):
            np.copyto(target, block)

    def decode() -> None:
        for place, target in enumerate(out):
            codec_format.decode(frames[place % len(frames)], items[place % len(frames)], target)

    return against(copy, decode, rounds)


def encode_to_zstd_3(codec_format: FrameFormat, content: Content, rounds: int) -> float:
    """Encoding to zstd of level 3."""
    compressor, items = zstandard.ZstdCompressor(level=3), content.items()

    def by_zstd() -> None:
        for block in content.blocks:
            compressor.compress(block.data)

    def by_us() -> None:
        for item, block in zip(items, content.blocks, strict=True):
            codec_format.encode(item, block)

    return against(by_zstd, by_us, rounds)


def decode_to_zipnn(codec_format: FrameFormat, content: Content, rounds: int) -> dict[str, float]:
    """Decoding to zipnn with one thread, and its ratio; empty where it is not installed."""
    try:
        from zipnn import ZipNN
    except ImportError:
        return {}
    zipnn = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)
    packed = [bytes(zipnn.compress(bytearray(block.tobytes()))) for block in content.blocks]
    if zipnn.decompress(packed[0]) != content.blocks[0].tobytes():
        raise ArithmeticError("zipnn came back with other bytes")
    frames, items = frames_of(codec_format, content), content.items()
    out = np.ones_like(content.blocks)

    def by_zipnn() -> None:
        for data in packed:
            zipnn.decompress(data)

    def by_us() -> None:
        for frame, item, target in zip(frames, items, out, strict=True):
            codec_format.decode(frame, item, target)

    speed = against(by_zipnn, by_us, rounds)
    return {"decode_to_zipnn": speed, "zipnn_ratio": round(content.blocks.nbytes / sum(map(len, packed)), 4)}


def measured(content: Content, formats: dict[str, FrameFormat], rounds: int) -> dict[str, float]:
    """Every figure of one content."""
    stored = sum(frame.nbytes for frame in frames_of(formats["numpy"], content))
    figures = {"ratio": round(content.blocks.nbytes / stored, 4)}
    for name, codec_format in formats.items():
        figures[f"decode_to_memcpy_{name}"] = decode_to_memcpy(codec_format, content, rounds)
        figures[f"encode_to_zstd_3_{name}"] = encode_to_zstd_3(codec_format, content, rounds)
    return figures | decode_to_zipnn(list(formats.values())[-1], content, rounds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder that has kv_samples")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    formats = {"numpy": FrameFormat(numba=False)}
    fast = FrameFormat(numba=False)
    if fast.compile():
        formats["numba"] = fast
    results = {content.name: measured(content, formats, arguments.rounds) for content in contents(arguments.data)}
    if arguments.json:
        print(json.dumps(results))
        return
    for name, figures in results.items():
        print(name)
        for figure, value in figures.items():
            print(f"  {figure:28} {value:7.3f}")


if __name__ == "__main__":
    main()
