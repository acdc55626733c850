"""Runs of blocks: found, cut, and proven by their generations."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.protocol.slab import HEADER_BYTES, SlabGeometry, write_header
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import LeaseExpired
from kvstore_client.memory import map_segment
from kvstore_client.placement import Placement
from kvstore_client.slabs import Slab

BLOCK_NBYTES = 4096
SLOTS = 8


class Slabs:
    """Three slabs as SlabCache would give them, with a writable view of their generations."""

    def __init__(self) -> None:
        cut = SlabGeometry.for_class(BLOCK_NBYTES, SLOTS * BLOCK_NBYTES)
        self.slabs: dict[int, Slab] = {}
        self.generations: dict[int, np.ndarray] = {}
        for slab_id in (1, 2, 3):
            fd = os.memfd_create("test")
            os.ftruncate(fd, cut.segment_bytes)
            memory = map_segment(fd, cut.segment_bytes, is_writable=True)
            os.close(fd)
            write_header(memory.data, slab_id, cut)
            info = pb.SlabInfo(
                slab_id=slab_id,
                segment_bytes=cut.segment_bytes,
                slot_bytes=cut.slot_bytes,
                slots=cut.slots,
                data_offset=cut.data_offset,
            )
            self.slabs[slab_id] = Slab(info, memory)
            self.generations[slab_id] = memory[HEADER_BYTES : HEADER_BYTES + 8 * SLOTS].view(np.uint64)

    def get(self, slab_id: int) -> Slab | None:
        return self.slabs.get(slab_id)

    def ensure(self, slab_ids: object, deadline_s: float) -> None:
        assert slab_ids


def placement(slabs: Slabs, places: list[tuple[int, int]], first: int = 0) -> Placement:
    """Blocks at (slab, slot), with generation 100 + their index, all readable."""
    for index, (slab_id, slot) in enumerate(places):
        slabs.generations[slab_id][slot] = 100 + index
    message = pb.LeaseGroup(
        first_block=first,
        slab_ids=np.array([slab_id for slab_id, _ in places], "<u4").tobytes(),
        slots=np.array([slot for _, slot in places], "<u4").tobytes(),
        generations=np.arange(100, 100 + len(places), dtype="<u8").tobytes(),
        block_nbytes=BLOCK_NBYTES,
    )
    made = Placement(message)
    made.find_slabs(slabs, BLOCK_NBYTES, 0.0)  # type: ignore[arg-type]
    return made


def spans(made: Placement, start: int, stop: int) -> list[tuple[int, int, int, int]]:
    return [(run.slab.slab_id, run.slot, run.first, run.stop) for run in made.runs(start, stop)]


def test_runs() -> None:
    made = placement(Slabs(), [(1, 2), (1, 3), (1, 4), (2, 5), (2, 7), (2, 6), (3, 7)], first=10)
    assert (made.first, made.stop) == (10, 17)
    assert spans(made, 10, 17) == [(1, 2, 10, 13), (2, 5, 13, 14), (2, 7, 14, 15), (2, 6, 15, 16), (3, 7, 16, 17)]
    assert spans(made, 11, 14) == [(1, 3, 11, 13), (2, 5, 13, 14)]
    assert spans(made, 12, 12) == []
    assert made.row(16, 10).shape == (10,)


def test_nothing_is_readable_after_drop() -> None:
    made = placement(Slabs(), [(1, 0), (1, 1)])
    assert made.ready_from(0) == 2
    made.drop()
    assert made.ready_from(0) == 0
    assert made.is_reused(0)
    with pytest.raises(LeaseExpired):
        made.row(0, 1)


def test_a_slab_that_lives_no_more() -> None:
    slabs = Slabs()
    made = placement(slabs, [(1, 0), (2, 0), (3, 0)])
    del slabs.slabs[2]
    made.find_slabs(slabs, BLOCK_NBYTES, 0.0)  # type: ignore[arg-type]
    assert made.readable_to(0, 3) == 1
    assert made.readable_to(1, 3) == 1
    assert made.readable_to(2, 3) == 3
    assert made.is_reused(1)


def test_not_yet_and_never_again() -> None:
    slabs = Slabs()
    made = placement(slabs, [(1, 0), (1, 1)])
    slabs.generations[1][1] = 0
    assert (made.ready_from(0), made.is_reused(1)) == (1, False)
    slabs.generations[1][1] = 7
    assert (made.ready_from(0), made.is_reused(1)) == (1, True)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, SLOTS - 1)), min_size=1, max_size=20, unique=True),
    st.data(),
)
def test_readable_is_what_a_loop_over_blocks_says(places: list[tuple[int, int]], data: st.DataObject) -> None:
    slabs = Slabs()
    made = placement(slabs, places, first=3)
    bad = data.draw(st.sets(st.integers(0, len(places) - 1)))
    for index in bad:
        slabs.generations[places[index][0]][places[index][1]] = data.draw(st.sampled_from([0, 1 << 63]))
    start = data.draw(st.integers(0, len(places)))
    stop = data.draw(st.integers(start, len(places)))
    expected = next((index for index in range(start, stop) if index in bad), stop)
    assert made.readable_to(3 + start, 3 + stop) == 3 + expected
    covered = [block for run in made.runs(3 + start, 3 + stop) for block in range(run.first, run.stop)]
    assert covered == list(range(3 + start, 3 + stop))
    for run in made.runs(3 + start, 3 + stop):
        for block in range(run.first, run.stop):
            assert (run.slab.slab_id, run.slot + block - run.first) == places[block - 3]


def test_lossy_blocks_by_their_index() -> None:
    assert Placement(pb.LeaseGroup()).lossy == frozenset()
    message = pb.LeaseGroup(first_block=10, slab_ids=bytes(12), slots=bytes(12), generations=bytes(24))
    message.lossy = bytes([0, 1, 1])
    assert Placement(message).lossy == {11, 12}
