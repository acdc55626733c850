"""Whether a tensor is worth compressing, from a sample: 30 to 60 µs, where a failed attempt costs a millisecond."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvstore.codec.base import Bytes
from kvstore.codec.huf import ONE_BYTE_DTYPES
from kvstore.codec.loops import U8
from kvstore.codec.shapes import Tensor

_SHIFTS: Final = {"bfloat16": 7, "float16": 8}  # of what is not noise
_RUN: Final = 64  # values side by side in the sample
_RUNS: Final = 64
_SMALL_VALUES: Final = 8 * _RUN * _RUNS  # trying less than that takes no longer than the sample
_LEAST_BITS_OF_FIELDS: Final = 0.5  # of 8 that must be saved, which are a 32nd of a value
_LEAST_BITS_OF_BYTES: Final = 0.25  # likewise
_LEAST_BITS_OF_OTHERS: Final = 0.02  # repeats, which the histogram cannot see, may save as well


def worth_trying(raw: Bytes, tensor: Tensor) -> bool:
    """Whether the histogram of a sample has less than 8 bits of entropy: of exponents, or else of bytes."""
    floats = tensor.dtype in _SHIFTS
    values = raw[: raw.nbytes & ~1].view(np.uint16) if floats else raw
    if values.size < _SMALL_VALUES:
        return True
    rows = values[: values.size // _RUN * _RUN].reshape(-1, _RUN)
    sample = rows[:: rows.shape[0] // _RUNS][:_RUNS]
    if floats:
        exponents = (sample >> np.uint16(_SHIFTS[tensor.dtype])).astype(np.uint8)
        return 8 - _entropy_bits(exponents.reshape(-1)) >= _LEAST_BITS_OF_FIELDS
    least = _LEAST_BITS_OF_BYTES if tensor.dtype in ONE_BYTE_DTYPES else _LEAST_BITS_OF_OTHERS
    return 8 - _entropy_bits(sample.reshape(-1).astype(np.uint8)) >= least


def _entropy_bits(sample: U8) -> float:
    """Entropy of the bytes in a sample, corrected for its size (Miller and Madow)."""
    counts = np.bincount(sample)
    counts = counts[counts > 0]
    share = counts / sample.size
    return float(-(share * np.log2(share)).sum() + (counts.size - 1) / (2 * np.log(2) * sample.size))
