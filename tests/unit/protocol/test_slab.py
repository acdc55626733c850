"""Geometry, header and generations of a slab."""

import json
import mmap
from pathlib import Path

import pytest

from kvstore.protocol.errors import ProtocolMismatch
from kvstore.protocol.slab import (
    GENERATION_BYTES,
    HEADER_BYTES,
    PAGE_BYTES,
    SlabGeometry,
    align_up,
    generations,
    read_header,
    slab_target_bytes,
    slot_bytes_for,
    write_header,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "slab.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: str(case["slot_bytes"]))
def test_golden_geometry_and_header(case: dict[str, int]) -> None:
    geometry = SlabGeometry.for_class(case["slot_bytes"], case["target_bytes"])
    assert geometry == SlabGeometry(case["slot_bytes"], case["slots"], case["data_offset"], case["segment_bytes"])
    segment = memoryview(bytearray(PAGE_BYTES))
    write_header(segment, case["slab_id"], geometry)
    assert bytes(segment[:40]).hex() == case["header"]
    assert not any(segment[40:])


@pytest.mark.parametrize(("value", "unit", "up"), [(0, 64, 0), (1, 64, 64), (64, 64, 64), (65, 64, 128)])
def test_align_up(value: int, unit: int, up: int) -> None:
    assert align_up(value, unit) == up


@pytest.mark.parametrize(("nbytes", "slot"), [(0, 4096), (1, 4096), (4096, 4096), (4097, 8192), (2 << 20, 2 << 20)])
def test_a_size_class_is_whole_pages(nbytes: int, slot: int) -> None:
    assert slot_bytes_for(nbytes) == slot


def test_target_grows_with_the_pool() -> None:
    assert slab_target_bytes(64 << 30) == slab_target_bytes(512 << 20) == 64 << 20
    assert slab_target_bytes(64 << 20) == 8 << 20
    assert slab_target_bytes(1 << 40) == 1 << 30


@pytest.mark.parametrize("slot_bytes", [4096, 12_288, 2 << 20, 63 << 20, 200 << 20])
def test_slots_lie_whole_and_apart_behind_the_generations(slot_bytes: int) -> None:
    geometry = SlabGeometry.for_class(slot_bytes, 64 << 20)
    assert geometry.offset(0) == geometry.data_offset >= HEADER_BYTES + GENERATION_BYTES * geometry.slots
    assert geometry.offset(0) % PAGE_BYTES == 0
    assert geometry.offset(geometry.slots) == geometry.segment_bytes


def test_header_reads_back_from_shared_memory() -> None:
    geometry = SlabGeometry.for_class(PAGE_BYTES, 8 * PAGE_BYTES)
    with mmap.mmap(-1, geometry.segment_bytes) as mapped, memoryview(mapped) as segment:
        write_header(segment, 17, geometry)
        assert read_header(segment) == (17, geometry)
        slots = generations(segment, geometry.slots)
        assert slots.tolist() == [0] * 8
        slots[7] = 2**64 - 1
        assert bytes(segment[HEADER_BYTES + 56 : HEADER_BYTES + 64]) == b"\xff" * 8
        assert not any(segment[geometry.data_offset :])
        slots.release()


def test_a_punched_slab_is_no_slab() -> None:
    with pytest.raises(ProtocolMismatch, match="magic"):
        read_header(memoryview(bytes(PAGE_BYTES)))


def test_a_cut_segment_is_refused() -> None:
    geometry = SlabGeometry.for_class(PAGE_BYTES, 8 * PAGE_BYTES)
    whole = bytearray(geometry.segment_bytes)
    write_header(memoryview(whole), 1, geometry)
    for size in (0, HEADER_BYTES - 1):
        with pytest.raises(ProtocolMismatch, match="no slab"):
            read_header(memoryview(whole)[:size])
    for size in (HEADER_BYTES, geometry.segment_bytes - 1):
        with pytest.raises(ProtocolMismatch, match="claims to end"):
            read_header(memoryview(whole)[:size])


def test_a_header_whose_generations_reach_into_the_slots_is_refused() -> None:
    segment = memoryview(bytearray(64 << 10))
    write_header(segment, 1, SlabGeometry(4096, 2, HEADER_BYTES, 64 << 10))
    with pytest.raises(ProtocolMismatch):
        read_header(segment)
