from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvstore.agents.memory import MappedSlabs
from kvstore.protocol.errors import InvalidRequest, NotFound
from kvstore.tiers.base import SlabRange

NBYTES = 1 << 16


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(made, NBYTES)
    yield made
    os.close(made)


def test_a_view_is_the_shared_memory_itself(fd: int) -> None:
    memory = MappedSlabs()
    memory.map(7, fd, NBYTES)
    memory.view(SlabRange(7, 100, 3))[:] = (1, 2, 3)
    assert os.pread(fd, 3, 100) == b"\1\2\3"
    os.pwrite(fd, b"\4", 101)
    assert memory.view(SlabRange(7, 101, 1)).tolist() == [4]


def test_the_whole_slab_is_a_range(fd: int) -> None:
    memory = MappedSlabs()
    memory.map(7, fd, NBYTES)
    memory.check(SlabRange(7, 0, NBYTES))
    assert memory.view(SlabRange(7, 0, NBYTES)).nbytes == NBYTES


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, NBYTES + 1), (NBYTES, 1), (1, NBYTES), (0, 0), (1 << 63, 1 << 63), (1 << 64, 1)]
)
def test_a_range_outside_its_slab_is_refused_twice(fd: int, offset: int, nbytes: int) -> None:
    memory = MappedSlabs()
    memory.map(7, fd, NBYTES)
    with pytest.raises(InvalidRequest, match="slab 7"):
        memory.check(SlabRange(7, offset, nbytes))
    with pytest.raises(KeyError):
        memory.view(SlabRange(7, offset, nbytes))


def test_an_unknown_slab_has_no_bytes(fd: int) -> None:
    memory = MappedSlabs()
    memory.check(SlabRange(1, 0, 1))  # the tier answers for it, so that it does not cost the rest of its batch
    with pytest.raises(KeyError):
        memory.view(SlabRange(1, 0, 1))
    with pytest.raises(NotFound, match="slab 1 is not mapped"):
        memory.unmap(1)


def test_a_number_is_taken_until_it_is_unmapped(fd: int) -> None:
    memory = MappedSlabs()
    memory.map(7, fd, NBYTES)
    with pytest.raises(InvalidRequest, match="mapped already"):
        memory.map(7, fd, NBYTES)
    memory.unmap(7)
    memory.map(7, fd, NBYTES)


@pytest.mark.parametrize("segment_bytes", [0, NBYTES + 1, 1 << 62])
def test_a_segment_longer_than_its_file_is_refused_and_no_later_sigbus(fd: int, segment_bytes: int) -> None:
    with pytest.raises(InvalidRequest, match="in a file of 65536 bytes"):
        MappedSlabs().map(7, fd, segment_bytes)


def test_a_view_outlives_its_unmapping(fd: int) -> None:
    memory = MappedSlabs()
    memory.map(7, fd, NBYTES)
    view = memory.view(SlabRange(7, 0, 1))
    memory.unmap(7)
    memory.close()
    os.pwrite(fd, b"\x09", 0)
    assert view.tolist() == [9]
