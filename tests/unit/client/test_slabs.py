"""Mapped memory: lazily, read-only, in bounded batches, and gone when it should be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from derived import chain, contents, fetch, namespace
from kvstore.protocol.slab import SlabGeometry, write_header
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import Client, Namespace, ProtocolMismatch
from kvstore_client.memory import POPULATE_STEP_BYTES, map_segment, populate_read
from kvstore_client.slabs import SlabCache
from kvstore_client.testing import FakeDaemon
from polling import eventually

BLOCK_NBYTES = 16 << 10
NOW = 0.0


def mappings() -> int:
    """Segments of the fake daemon that this process has mapped read-only."""
    return sum("r--s" in line and "kvstore-fake" in line for line in Path("/proc/self/maps").read_text().splitlines())


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_slabs_are_mapped_by_the_first_lease_that_names_them(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 20)
    ns.put(keys, contents(keys, BLOCK_NBYTES))
    before = daemon.calls["MAP_SLABS"]
    fetch(ns, keys[:3])
    assert daemon.calls["MAP_SLABS"] == before + 1
    fetch(ns, keys[:3])
    assert daemon.calls["MAP_SLABS"] == before + 1
    fetch(ns, keys)
    assert daemon.calls["MAP_SLABS"] == before + 2, "the second slab"


def test_descriptors_are_closed_after_mapping(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 60)
    ns.put(keys, contents(keys, BLOCK_NBYTES))
    fetch(ns, keys[:1])
    before = descriptors(), mappings()
    assert fetch(ns, keys) == (60, [])
    assert (descriptors(), mappings()) == (before[0], before[1] + 3)


def test_many_slabs_are_asked_for_in_batches() -> None:
    asked: list[int] = []

    class Link:
        def map_slabs(self, request: pb.MapSlabsRequest, deadline_s: float) -> tuple[pb.MapSlabsResponse, list[int]]:
            asked.append(len(request.slab_ids))
            return pb.MapSlabsResponse(), []

    SlabCache(Link()).ensure(range(1, 602), NOW)  # type: ignore[arg-type]
    assert asked == [250, 250, 101]


def test_mapped_memory_cannot_be_written(ns: Namespace) -> None:
    keys = chain(ns, 1)
    ns.put(keys, contents(keys, BLOCK_NBYTES))
    with ns.acquire(keys) as lease, pytest.raises(ValueError, match="read-only"):
        lease.view(0)[0] = 1


def test_a_retired_slab_is_unmapped(daemon: FakeDaemon) -> None:
    daemon.renew_every_s = 0.02
    with Client(daemon.address) as impatient:
        ns = namespace(impatient, "model", BLOCK_NBYTES)
        keys = chain(ns, 20)
        ns.put(keys, contents(keys, BLOCK_NBYTES))
        before = mappings()
        lease = ns.acquire(keys)
        out = np.empty((20, BLOCK_NBYTES), np.uint8)
        lease.read_into(out)
        assert mappings() == before + 2
        lease.release()
        daemon.retire_slabs()
        eventually(lambda: mappings() == before, "retired slabs to be unmapped")


def test_everything_is_unmapped_at_close(daemon: FakeDaemon) -> None:
    before = mappings()
    client = Client(daemon.address)
    ns = namespace(client, "model", BLOCK_NBYTES)
    keys = chain(ns, 5)
    ns.put(keys, contents(keys, BLOCK_NBYTES))
    lease = ns.acquire(keys)
    kept = lease.view(2)
    client.close()
    assert mappings() == before + 1, "a view that somebody still has keeps its slab"
    assert (kept == contents(keys, BLOCK_NBYTES)[2]).all()
    del kept
    eventually(lambda: mappings() == before, "the last view's slab to be unmapped")


def segment(nbytes: int) -> int:
    fd = os.memfd_create("test")
    os.ftruncate(fd, nbytes)
    return fd


def test_a_segment_shorter_than_announced_is_refused() -> None:
    fd = segment(4096)
    try:
        with pytest.raises(ProtocolMismatch, match="4096 bytes was announced with 8192"):
            map_segment(fd, 8192, is_writable=False)
    finally:
        os.close(fd)


@pytest.mark.parametrize("wrong", ["slab_id", "slot_bytes", "magic"])
def test_a_slab_that_is_not_as_announced_is_refused(wrong: str) -> None:
    cut = SlabGeometry.for_class(4096, 64 << 10)
    fd = segment(cut.segment_bytes)
    write_header(map_segment(fd, cut.segment_bytes, is_writable=True).data, 7, cut)
    if wrong == "magic":
        os.pwrite(fd, bytes(8), 0)
    info = pb.SlabInfo(
        slab_id=8 if wrong == "slab_id" else 7,
        segment_bytes=cut.segment_bytes,
        slot_bytes=8192 if wrong == "slot_bytes" else 4096,
        slots=cut.slots,
        data_offset=cut.data_offset,
    )

    class Link:
        def map_slabs(self, request: pb.MapSlabsRequest, deadline_s: float) -> tuple[pb.MapSlabsResponse, list[int]]:
            return pb.MapSlabsResponse(slabs=[info]), [fd]

    with pytest.raises(ProtocolMismatch):
        SlabCache(Link()).ensure([info.slab_id], NOW)  # type: ignore[arg-type]
    with pytest.raises(OSError):
        os.fstat(fd)  # closed all the same


def test_populate_enters_pages_and_says_when_the_kernel_cannot() -> None:
    fd = segment(POPULATE_STEP_BYTES + 4096)
    memory = map_segment(fd, POPULATE_STEP_BYTES + 4096, is_writable=False)
    os.close(fd)
    assert populate_read(memory, 0) in (True, False)
    assert populate_read(memory, POPULATE_STEP_BYTES) in (True, False)
    assert not populate_read(np.zeros(0, np.uint8), POPULATE_STEP_BYTES)


def test_no_more_descriptors_is_a_miss_in_time_not_a_wrong_slab(daemon: FakeDaemon) -> None:
    """The kernel drops descriptors that do not fit: the next ones must not be taken for them."""
    code = f"""
import os, resource
from kvstore_client import Client, Unavailable
from derived import chain, contents, fetch, namespace
client = Client({daemon.address!r})
ns = namespace(client, "model", {BLOCK_NBYTES})
keys = chain(ns, 40)
ns.put(keys, contents(keys, {BLOCK_NBYTES}))
assert fetch(ns, keys[:1]) == (1, [])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    fetch(ns, keys, 1.0)
except Unavailable:
    print("unavailable")
for fd in held:
    os.close(fd)
print(fetch(ns, keys[:1]))
"""
    helpers = str(Path(__file__).parents[2] / "helpers")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": helpers},
    )
    assert done.stdout.splitlines() == ["unavailable", "(1, [])"], done.stderr
