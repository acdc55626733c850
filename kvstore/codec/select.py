"""Which codec writes a block, and which reads a stored one.

Adding a codec is one new file and one line in CodecSet.
"""

from __future__ import annotations

import threading
from typing import Final, Protocol

from kvstore.codec.base import Codec
from kvstore.codec.planes import BFLOAT16, FLOAT16, PlanesCodec
from kvstore.codec.raw import RawCodec
from kvstore.codec.zstd import ZstdCodec

POLICIES: Final = ("auto", "raw", "planes")

_ONE_BYTE_DTYPES: Final = ("float8_e4m3", "float8_e5m2", "int8", "uint8")


class UnknownFormatError(LookupError):
    """Stored by a frame version or a codec that this build does not know: intact, and not for us to read."""


class VersionedCodec(Codec, Protocol):
    """A codec as the frame knows it: the same id and version always mean the same payload."""

    version: int  # u16


class CodecSet:
    """Every codec, for one thread only (a zstd context shared between threads corrupts decodes)."""

    def __init__(self, policy: str = "auto") -> None:
        """`policy` decides how blocks are written; all that is known can be read under each.

        auto    by dtype
        raw     no compression
        planes  two-byte floats in planes, anything else raw
        """
        if policy not in POLICIES:
            raise ValueError(f"codec {policy!r} is none of {', '.join(POLICIES)}")
        self.raw: VersionedCodec = RawCodec()
        bf16, fp16 = PlanesCodec(BFLOAT16), PlanesCodec(FLOAT16)
        huffman = ZstdCodec.huffman()
        self._default: VersionedCodec = ZstdCodec.level(1) if policy == "auto" else self.raw
        self._by_dtype: dict[str, VersionedCodec] = {}
        if policy != "raw":
            self._by_dtype |= {"bfloat16": bf16, "float16": fp16}
        if policy == "auto":
            self._by_dtype |= dict.fromkeys(_ONE_BYTE_DTYPES, huffman)
        readers: tuple[VersionedCodec, ...] = (self.raw, bf16, fp16, huffman)
        self._by_id = {(codec.codec_id, codec.version): codec for codec in readers}

    def for_dtype(self, dtype: str) -> VersionedCodec:
        """The codec that writes blocks whose main tensor has this dtype (any string)."""
        return self._by_dtype.get(dtype, self._default)

    def by_id(self, codec_id: int, version: int) -> VersionedCodec:
        """The codec that reads what was stored under this id and version.

        Raises:
            UnknownFormatError: no such codec in this build.
        """
        try:
            return self._by_id[codec_id, version]
        except KeyError:
            raise UnknownFormatError(f"codec {codec_id} version {version} is not known to this build") from None


class ThreadCodecs(threading.local):
    """`.codecs` is the calling thread's own CodecSet, made on its first use."""

    def __init__(self, policy: str = "auto") -> None:
        """Runs once in every thread that touches the object, with the arguments of the first."""
        super().__init__()
        self.codecs = CodecSet(policy)
