"""Blocks to frames and back: the codecs, what chooses among them, and the checks around them.

A frame says what it holds and whose it is (header.py), and any flipped bit in it is noticed. Frames of version 1 are
read (frame_v1.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.codec import frame_v1
from kvstore.codec.base import Codec, Pieces, UnknownFormatError, pieces_nbytes
from kvstore.codec.frame_v1 import HeaderV1
from kvstore.codec.header import MAX_LAYOUT_BYTES, FrameError, FrameHeader, Section, read_prelude
from kvstore.codec.rates import Rates, choose, measure
from kvstore.codec.select import CHOICES, POLICIES, CodecSet
from kvstore.codec.shapes import Tensor, tensors_of
from kvstore.codec.skip import worth_trying

__all__ = ["Encoded", "FrameError", "FrameFormat", "FrameHeader", "UnknownFormatError"]

# Below 1/32 saved a tensor is stored raw: reading it is a plain copy then, four to eight times faster than decoding.
_MIN_SAVED: Final = 32


class FrameRef(Protocol):
    """A block's name: namespace digest and key, 32 bytes each."""

    @property
    def namespace(self) -> bytes:
        """The namespace digest."""

    @property
    def key(self) -> bytes:
        """The key."""


class FrameItem(Protocol):
    """What the frame stores of a block besides its bytes; a tier's TierItem is one."""

    @property
    def ref(self) -> FrameRef:
        """The block's name."""

    @property
    def checksum(self) -> bytes:
        """The xxh3-128 digest (16 bytes) of the raw bytes; when decoding, of what is expected to come out."""

    @property
    def parent(self) -> bytes:
        """Key of the parent; empty for the root."""

    @property
    def epoch(self) -> int:
        """Epoch of the namespace."""

    @property
    def layout(self) -> str:
        """What the bytes are, as KVLayout.text says it: decides the codecs."""

    @property
    def lossy(self) -> str:
        """Name of the lossy codec that the namespace opted in to; empty: never lossy."""


class Encoded(NamedTuple):
    """A block as it is to be stored.

    Attributes:
        pieces: the frame, to be written one after the other; views of the raw bytes, or of memory that the next
            encode() in this thread uses again: copy or write them before.
        codec: id of the codec that has most of the bytes.
        checksum: xxh3-128 of what decoding gives: the item's own, unless `lossy`.
        lossy: decoding gives other bytes than the raw ones.
    """

    pieces: Sequence[bytes | memoryview]
    codec: int
    checksum: bytes
    lossy: bool


class FrameFormat:
    """Blocks to frames and back, for any number of threads; satisfies the tiers' BlockFormat."""

    def __init__(
        self, policy: str = "auto", *, numba: bool | None = None, ssd_bytes_s: float = 0.0, readers: int = 2
    ) -> None:
        """Nothing is compiled or measured before the first use, or warm().

        Args:
            policy: one of select.POLICIES: `raw`; `exphuf`, two-byte floats compressed, anything else raw; `auto`, by
                dtype, where warm() has found that reading is not slower for it.
            numba: True needs numba, False does without, None takes it where it is installed.
            ssd_bytes_s: what the medium reads in a second; 0: not known, then `auto` compresses.
            readers: threads that will decode at the same time.

        Raises:
            ValueError: no such policy.
            ImportError: numba was asked for and is not installed.
        """
        if policy not in POLICIES:
            raise ValueError(f"codec {policy!r} is none of {', '.join(POLICIES)}")
        self._policy = policy
        self._local = _ThreadCodecs(numba)
        self._choice = CHOICES[policy]
        self._ssd_bytes_s = ssd_bytes_s
        self._readers = readers
        self._rates: Rates | None = None

    def warm(self) -> None:
        """Measure decoding, after compiling what is to be compiled (4 s, once a process); then `auto` chooses."""
        self._measure(self._local)

    def compile(self) -> bool:
        """Go over to numba's path once it is compiled, in the calling thread; False where numba is not installed."""
        try:
            local = _ThreadCodecs(numba=True)
        except ImportError:
            return False
        self._measure(local)
        self._local = local
        return True

    def _measure(self, local: _ThreadCodecs) -> None:
        self._rates = measure(local.codecs)
        if self._policy == "auto":
            self._choice = choose(self._rates, self._ssd_bytes_s, self._readers)

    def describe(self) -> str:
        """Codec of two-byte floats and implementation, and after warm() what one thread decodes."""
        name = "exphuf" if self._choice.floats else "raw"
        rate = f", decodes {self._rates.exphuf / 1e9:.2f} GB/s a thread" if self._rates else ""
        return f"{name}, {self._local.codecs.kernels.name}{rate}"

    def encode(self, item: FrameItem, raw: NDArray[np.uint8]) -> Encoded:
        """Frame a block.

        `item.checksum` is taken as it is: the caller has just checked the bytes against it.
        """
        codecs = self._local.codecs
        tensors = tensors_of(item.layout, raw.nbytes)
        codecs.arena.begin(raw.nbytes)
        pieces: Pieces = []
        sections = []
        lossy = False
        for tensor in tensors:
            codec, stored = self._encode_tensor(codecs, raw[tensor.start : tensor.start + tensor.nbytes], tensor, item)
            sections.append(Section(codec.codec_id, codec.version, tensor, pieces_nbytes(stored)))
            lossy |= codec is codecs.int8kv
            pieces += stored
        checksum = _checksum_of(codecs, pieces, sections, raw.nbytes) if lossy else item.checksum
        largest = max(sections, key=lambda section: section.tensor.nbytes)
        header = FrameHeader(
            largest.codec_id,
            largest.codec_version,
            item.ref.namespace,
            item.ref.key,
            item.parent,
            item.epoch,
            raw.nbytes,
            pieces_nbytes(pieces),
            checksum,
            _hash(pieces),
            lossy,
            item.layout[:MAX_LAYOUT_BYTES],
            tuple(sections),
        )
        return Encoded([header.pack(), *pieces], largest.codec_id, checksum, lossy)

    def decode(self, frame: memoryview, item: FrameItem, out: NDArray[np.uint8]) -> None:
        """Decode a frame into `out` (`out.nbytes` is the raw size that is expected).

        Unverified bytes never reach a codec: the payload's hash is checked first, which at 1.5 times the speed of
        memcpy over two thirds of the bytes costs about a tenth of the decode. The checksum of what comes
        out is the caller's to check.

        Raises:
            ValueError: damaged, or another block or content than `item` names.
            LookupError: intact, and of a frame version or codec that this build does not know.
        """
        codecs = self._local.codecs
        prelude = read_prelude(frame)
        if prelude[0] == frame_v1.VERSION:
            old, payload = frame_v1.parse(frame)
            _check(old, item, out.nbytes)
            frame_v1.decode(old, payload, codecs.zstd, out)
            return
        header, payload = FrameHeader.parse(frame, prelude)
        _check(header, item, out.nbytes)
        readers = [codecs.reader(section.codec_id, section.codec_version) for section in header.sections]
        if xxhash.xxh3_64_intdigest(payload) != header.payload_hash:
            raise FrameError("the payload is damaged")
        _decode_sections(readers, header.sections, payload, out)

    def _encode_tensor(
        self, codecs: CodecSet, raw: NDArray[np.uint8], tensor: Tensor, item: FrameItem
    ) -> tuple[Codec, Pieces]:
        """The codec that a tensor is stored with, and its payload."""
        if item.lossy == codecs.int8kv.name:
            stored = codecs.int8kv.encode(raw, tensor)
            if stored is not None:
                return codecs.int8kv, stored
        codec = codecs.writer(tensor, self._choice)
        if codec is not codecs.raw and worth_trying(raw, tensor):
            stored = codec.encode(raw, tensor)
            if stored is not None and pieces_nbytes(stored) < raw.nbytes - raw.nbytes // _MIN_SAVED:
                return codec, stored
        return codecs.raw, codecs.raw.encode(raw, tensor)


class _ThreadCodecs(threading.local):
    """`.codecs` is the calling thread's own CodecSet, made on its first use."""

    def __init__(self, numba: bool | None) -> None:
        """Runs once in every thread that touches the object, with the arguments of the first."""
        super().__init__()
        self.codecs = CodecSet(numba)


def _check(header: FrameHeader | HeaderV1, item: FrameItem, raw_bytes: int) -> None:
    """Say whether this is the block that `item` names, with the content it expects.

    Raises:
        FrameError: another block, another length or another content.
    """
    if (header.namespace, header.key) != (item.ref.namespace, item.ref.key):
        raise FrameError("the frame holds another block")
    if header.raw_bytes != raw_bytes:
        raise FrameError(f"the frame holds a block of {header.raw_bytes} bytes, not of {raw_bytes}")
    if header.checksum != item.checksum:
        raise FrameError("the frame holds other content than expected")


def _decode_sections(
    readers: Sequence[Codec], sections: Sequence[Section], payload: memoryview, out: NDArray[np.uint8]
) -> None:
    position = 0
    for codec, section in zip(readers, sections, strict=True):
        tensor = section.tensor
        stored = payload[position : position + section.stored_bytes]
        codec.decode(stored, tensor, out[tensor.start : tensor.start + tensor.nbytes])
        position += section.stored_bytes


def _checksum_of(codecs: CodecSet, pieces: Pieces, sections: Sequence[Section], raw_bytes: int) -> bytes:
    """The xxh3-128 of what these sections decode to."""
    out = np.empty(raw_bytes, dtype=np.uint8)
    readers = [codecs.reader(section.codec_id, section.codec_version) for section in sections]
    _decode_sections(readers, sections, memoryview(b"".join(pieces)), out)
    digest: bytes = xxhash.xxh3_128_digest(out.data)
    return digest


def _hash(pieces: Pieces) -> int:
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece)
    digest: int = state.intdigest()
    return digest
