"""What a codec is: the bytes of one tensor to a payload and back.

A codec knows nothing of files, tiers or checksums: the frame around its payload has them. One instance is used
by one thread only (a zstandard context shared between threads corrupts decodes).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.codec.shapes import Tensor

Bytes = NDArray[np.uint8]
Pieces = list[bytes | memoryview]


class CodecError(ValueError):
    """A payload that cannot be what this codec wrote."""


class UnknownFormatError(LookupError):
    """Stored by a frame version or a codec that this build does not know: intact, and not for us to read."""


class Codec(Protocol):
    """One way of writing a tensor's bytes."""

    name: str
    codec_id: int  # u16, in the frame; never reused
    version: int  # u16; the same id and version always mean the same payload

    def encode(self, raw: Bytes, tensor: Tensor) -> Pieces | None:
        """Encode `raw`, the tensor's bytes; the pieces are written one after the other.

        None says that it does not pay, or that the codec has no way with such a tensor.
        """

    def decode(self, payload: memoryview, tensor: Tensor, out: Bytes) -> None:
        """Decode into `out`, which has the tensor's raw size.

        Raises:
            CodecError: the payload is damaged or does not fill `out` exactly; `out` may hold anything then.
        """


def pieces_nbytes(pieces: Pieces) -> int:
    """Bytes of all pieces together."""
    return sum(map(len, pieces))
