"""The cold tier's codecs by themselves, on one core: how small, how fast, and against what else there is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from kvstore.bench.figures import Result, Value
from kvstore.bench.memory import kv_like_blocks
from kvstore.bench.scale import Scale
from kvstore.codec.exphuf import ExpHufCodec
from kvstore.codec.frame import FrameFormat
from kvstore.codec.kernels import make_kernels
from kvstore.codec.shapes import tensors_of
from kvstore.codec.zstd import ZstdContexts
from kvstore.tiers.base import BlockRef, SlabRange, TierItem

_BLOCK_NBYTES = 2 << 20
_BLOCKS = 16
_MADE_LAYOUT = "bfloat16 kv=2 layer=32 token=16 head=8 dim=128"
_SAMPLES = {"minilm": "minilm_l6_bf16_t64.npy", "small_lm": "tinylm_rope_gqa_bf16_t64.npy"}
_AXES = ("layer", "kv", "token", "head", "dim")


class NoSample(LookupError):
    """What is to be measured is not on this machine; the message says what would be needed."""


@dataclass(frozen=True, slots=True)
class _Content:
    """Blocks, (count, bytes) uint8, and what they are."""

    blocks: NDArray[np.uint8]
    layout: str

    def items(self) -> list[TierItem]:
        """What a tier would say of each."""
        return [
            TierItem(
                BlockRef(bytes(32), index.to_bytes(32, "little")),
                SlabRange(1, 0, block.nbytes),
                xxhash.xxh3_128_digest(block.data),
                layout=self.layout,
            )
            for index, block in enumerate(self.blocks)
        ]


class ColdCodecs:
    """Measurements of codecs, in this process."""

    def __init__(self, scale: Scale, data: Path | None) -> None:
        """`data` is the folder that has kv_samples/."""
        self._rounds = max(3, scale.rounds)
        self._data = data

    def jobs(self) -> dict[str, Callable[[str], Result]]:
        """What measures each result, by its name."""
        return {
            "cold_ratio_minilm": partial(self.ratio, sample="minilm"),
            "cold_ratio_small_lm": partial(self.ratio, sample="small_lm"),
            "cold_decode_numba": partial(self.decode, numba=True),
            "cold_decode_numpy": partial(self.decode, numba=False),
            "cold_decode_zipnn": self.against_zipnn,
            "cold_encode": self.encode,
        }

    def ratio(self, name: str, sample: str) -> Result:
        """Raw bytes to bytes of frames, every block read back and compared."""
        content = self._sample(sample)
        frames = FrameFormat("auto", numba=False)
        stored, out = 0, np.empty(content.blocks.shape[1], np.uint8)
        for item, block in zip(content.items(), content.blocks, strict=True):
            frame = b"".join(frames.encode(item, block).pieces)
            stored += len(frame)
            frames.decode(memoryview(frame), item, out)
            if (out != block).any():
                raise ArithmeticError(f"{sample}: a block came back wrong")
        return Result(name, {"ratio": round(content.blocks.nbytes / stored, 4), "blocks": len(content.blocks)})

    def decode(self, name: str, *, numba: bool) -> Result:
        """Frames to blocks of 2 MiB on one core, to memcpy of the same blocks.

        `zstd_alone` is what reading the Huffman codes takes by itself: no decoder of these frames comes above it.
        """
        content, frames = self._content(), _format(numba)
        items, encoded = content.items(), self._encoded(frames, content)
        out = np.empty(_BLOCK_NBYTES, np.uint8)

        def copy() -> None:
            for block in content.blocks:
                np.copyto(out, block)

        def decode() -> None:
            for item, frame in zip(items, encoded, strict=True):
                frames.decode(frame, item, out)

        symbols, zstd = _symbols(content), ZstdContexts()

        def by_zstd() -> None:
            for one in symbols:
                zstd.decompress(one.frame, one.plain.size)

        return self._compared(name, "ratio_memcpy", copy, decode, content, by_zstd)

    def encode(self, name: str) -> Result:
        """Blocks to frames on one core, to zstd of level 3 over the raw bytes; `zstd_alone` as for decode()."""
        content, frames = self._content(), _format(None)
        items, zstd = content.items(), zstandard.ZstdCompressor(level=3)
        self._encoded(frames, content)  # compiles

        def by_zstd() -> None:
            for block in content.blocks:
                zstd.compress(block.data)

        def by_us() -> None:
            for item, block in zip(items, content.blocks, strict=True):
                frames.encode(item, block)

        symbols, contexts = _symbols(content), ZstdContexts()

        def huffman() -> None:
            for one in symbols:
                contexts.huffman_blocks(one.plain, one.block)

        return self._compared(name, "ratio_zstd3", by_zstd, by_us, content, huffman)

    def against_zipnn(self, name: str) -> Result:
        """Decoding, to zipnn's of the same blocks with one thread; and both ratios."""
        try:
            from zipnn import ZipNN  # noqa: PLC0415 - only for this comparison
        except ImportError as error:
            raise NoSample("zipnn is not installed: pip install zipnn==0.5.4") from error
        content, frames = self._content(), _format(None)
        items, encoded = content.items(), self._encoded(frames, content)
        theirs = ZipNN(method="huffman", input_format="byte", bytearray_dtype="bfloat16", threads=1)
        packed = [bytes(theirs.compress(bytearray(block.tobytes()))) for block in content.blocks]
        out = np.empty(_BLOCK_NBYTES, np.uint8)

        def by_zipnn() -> None:
            for frame in packed:
                theirs.decompress(frame)

        def by_us() -> None:
            for item, frame in zip(items, encoded, strict=True):
                frames.decode(frame, item, out)

        result = self._compared(name, "ratio_zipnn", by_zipnn, by_us, content)
        ours_bytes, theirs_bytes = sum(frame.nbytes for frame in encoded), sum(map(len, packed))
        ratios = {"ratio": content.blocks.nbytes / ours_bytes, "zipnn_ratio": content.blocks.nbytes / theirs_bytes}
        return Result(name, {**result.figures, **{key: round(value, 4) for key, value in ratios.items()}})

    def _compared(
        self,
        name: str,
        figure: str,
        theirs: Callable[[], None],
        ours: Callable[[], None],
        content: _Content,
        zstd: Callable[[], None] | None = None,
    ) -> Result:
        """Ratios of processor time, in turn; `zstd`: what zstd has to do of it at least."""
        ratios, alone, taken_s = [], [], []
        for _ in range(self._rounds):
            base_s = _seconds(theirs)
            taken_s.append(_seconds(ours))
            ratios.append(base_s / taken_s[-1])
            if zstd is not None:
                alone.append(base_s / _seconds(zstd))
        figures: dict[str, Value] = {
            figure: round(statistics.median(ratios), 4),
            "ratio_min": round(min(ratios), 4),
            "ratio_max": round(max(ratios), 4),
            "gb_s": round(content.blocks.nbytes / statistics.median(taken_s) / 1e9, 3),
        }
        if alone:
            figures["zstd_alone"] = round(statistics.median(alone), 4)
        return Result(name, figures)

    def _encoded(self, frames: FrameFormat, content: _Content) -> list[memoryview]:
        pairs = zip(content.items(), content.blocks, strict=True)
        return [memoryview(b"".join(frames.encode(item, block).pieces)) for item, block in pairs]

    def _content(self) -> _Content:
        """Blocks of 2 MiB: of a sample where there is one, else made."""
        try:
            sample = self._sample("minilm").blocks.reshape(-1)
        except NoSample:
            return _Content(kv_like_blocks(_BLOCKS, _BLOCK_NBYTES), _MADE_LAYOUT)
        count = min(_BLOCKS, sample.nbytes // _BLOCK_NBYTES)
        return _Content(sample[: count * _BLOCK_NBYTES].reshape(count, -1), _SAMPLE_2MIB_LAYOUT)

    def _sample(self, name: str) -> _Content:
        path = None if self._data is None else self._data / "kv_samples" / _SAMPLES[name]
        if path is None or not path.is_file():
            raise NoSample(f"{_SAMPLES[name]} is not here; give the folder that has kv_samples with --data")
        values = np.load(path, allow_pickle=False)
        return _Content(values.reshape(len(values), -1).view(np.uint8), _words(values.shape[1:]))


class _Symbols(NamedTuple):
    """A tile's symbols, how many share a code, and the zstd frame of them."""

    plain: NDArray[np.uint8]
    block: int
    frame: memoryview


class _RecordingZstd(ZstdContexts):
    """Keeps what is to be coded."""

    def __init__(self) -> None:
        self.symbols: list[_Symbols] = []

    def huffman_blocks(self, plain: NDArray[np.uint8], block: int) -> bytes:
        frame = super().huffman_blocks(plain, block)
        self.symbols.append(_Symbols(plain.copy(), block, memoryview(frame)))
        return frame


def _symbols(content: _Content) -> list[_Symbols]:
    """All that zstd has to do for these blocks."""
    zstd = _RecordingZstd()
    codec = ExpHufCodec(make_kernels(False), zstd)
    for block in content.blocks:
        for tensor in tensors_of(content.layout, block.nbytes):
            codec.encode(block[tensor.start : tensor.start + tensor.nbytes], tensor)
    return zstd.symbols


# What 2 MiB cut out of the sample's row of blocks are: no whole number of its layers, so only their dtype is true.
_SAMPLE_2MIB_LAYOUT = "bfloat16"


def _format(numba: bool | None) -> FrameFormat:
    try:
        made = FrameFormat("auto", numba=numba)
    except ImportError as error:
        raise NoSample(str(error)) from error
    made.warm()
    return made


def _words(shape: Sequence[int]) -> str:
    return " ".join(["bfloat16", *(f"{axis}={size}" for axis, size in zip(_AXES, shape, strict=True))])


def _seconds(call: Callable[[], None]) -> float:
    """Of processor time: what else runs on the machine shall not count, but threads that the call starts do."""
    started = time.process_time()
    call()
    return time.process_time() - started
