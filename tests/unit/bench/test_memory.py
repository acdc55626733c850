"""Working sets: what is copied from and to."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.bench.memory import WorkingSet, kv_like_blocks


def test_no_two_blocks_are_alike_and_the_bits_are_those_of_a_normal_distribution() -> None:
    blocks = kv_like_blocks(12, 4 << 20)
    assert blocks.shape == (12, 4 << 20)
    assert len({block.tobytes() for block in blocks}) == 12
    values = (blocks[3].view(np.uint16)[4:].astype(np.uint32) << 16).view(np.float32)
    assert abs(float(values.mean())) < 0.01
    assert 0.95 < float(values.std()) < 1.05


def test_the_same_seed_gives_the_same_blocks() -> None:
    assert (kv_like_blocks(2, 4096) == kv_like_blocks(2, 4096)).all()
    assert (kv_like_blocks(2, 4096) != kv_like_blocks(2, 4096, seed=8)).any()


def test_memcpy_copies_every_block() -> None:
    working_set = WorkingSet(8, 4096)
    assert working_set.memcpy_seconds() > 0
    assert (working_set.out == working_set.source).all()
    working_set.check()


def test_one_wrong_byte_is_found() -> None:
    working_set = WorkingSet(8, 4096)
    working_set.memcpy_seconds()
    working_set.out[5, -1] ^= 1
    with pytest.raises(ArithmeticError, match=r"blocks \[5\] came back wrong"):
        working_set.check()
