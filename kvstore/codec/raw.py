"""No compression: the bytes as they are, and the fallback of every codec that does not pay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.codec.base import CodecError


class RawCodec:
    """Stores a block as it is."""

    name = "raw"
    codec_id = 1
    version = 1

    def encode(self, raw: NDArray[np.uint8]) -> list[bytes | memoryview]:
        """The block itself, without a copy: valid as long as `raw` is."""
        return [raw.data]

    def decode(self, payload: memoryview, out: NDArray[np.uint8]) -> None:
        """Copy the payload.

        Raises:
            CodecError: the payload is not as long as `out`.
        """
        if payload.nbytes != out.nbytes:
            raise CodecError(f"raw payload of {payload.nbytes} bytes for a block of {out.nbytes}")
        np.copyto(out, np.frombuffer(payload, dtype=np.uint8))
