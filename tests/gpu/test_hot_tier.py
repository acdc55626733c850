"""The hot tier on a real device: the tier's contract, exported memory, and what an agent leaves behind."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from agent_rig import PATIENCE_S, Slots, hot_config, wait_until
from daemon_fixtures import StartDaemon
from derived import chain, contents, namespace, wrong
from kvstore.config import device_environment
from kvstore.engine.supervisor import AgentSupervisor
from kvstore.protocol.cuda_copies import Direction, Run
from kvstore.tiers import conformance
from kvstore.tiers.base import Outcome, SlabMemory, Tier
from kvstore.tiers.conformance import TIER_CHECKS, Check
from kvstore.tiers.cuda import CudaDevice
from kvstore.tiers.cuda_copies import Copier
from kvstore.tiers.cuda_memory import DeviceMemory
from kvstore.tiers.hot_cuda import HotCuda
from kvstore.tiers.memory import ArrayMemory
from kvstore.v1 import admin_pb2, types_pb2
from polling import eventually

pytestmark = pytest.mark.gpu

MIB = 1 << 20

# Run in another process: maps the memory behind descriptor 0 and prints what it finds there, as hex.
READER = """
import sys, numpy as np
from kvstore.protocol.cuda_copies import Direction, Run
from kvstore.tiers.cuda import CudaDevice
from kvstore.tiers.cuda_copies import Copier
from kvstore.tiers.cuda_memory import DeviceMemory
device = CudaDevice("cuda:0")
nbytes = int(sys.argv[1])
piece = DeviceMemory(device).import_read_only(0, nbytes)
host = np.zeros(nbytes, np.uint8)
Copier(device).start(Direction.FROM_DEVICE, [Run(host.ctypes.data, piece.address, nbytes)]).wait()
print(host[:64].tobytes().hex(), host[-64:].tobytes().hex())
"""


def plain(memory: SlabMemory, capacity_bytes: int) -> Tier:
    """Memory in pieces of any size, as the kit's many sizes of block need it in so small a tier."""
    assert isinstance(memory, ArrayMemory)
    return HotCuda(CudaDevice("cuda:0"), capacity_bytes, memory, exportable=False)


def exportable(memory: SlabMemory, capacity_bytes: int) -> Tier:
    assert isinstance(memory, ArrayMemory)
    return HotCuda(CudaDevice("cuda:0"), capacity_bytes, memory)


@pytest.mark.parametrize("check", TIER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Check) -> None:
    check(plain)


@pytest.mark.parametrize(
    "check",
    [conformance.check_threads, conformance.check_delete, conformance.check_write_replaces, conformance.check_close],
    ids=lambda check: check.__name__,
)
def test_contract_in_memory_that_can_be_exported(check: Check) -> None:
    check(exportable)


def test_another_process_reads_exported_memory() -> None:
    device = CudaDevice("cuda:0")
    memory, copier = DeviceMemory(device), Copier(device)
    if not memory.is_exportable:
        pytest.skip("this device's memory cannot be exported")
    nbytes = memory.granularity
    host = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    piece = memory.take(nbytes)
    copier.start(Direction.TO_DEVICE, [Run(piece.address, host.ctypes.data, nbytes)]).wait()
    fd = memory.export(piece)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(nbytes)], stdin=fd, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [host[:64].tobytes().hex(), host[-64:].tobytes().hex()]
    memory.give(piece)
    copier.close()
    device.close()


def free_bytes() -> int:
    return int(torch.cuda.mem_get_info(0)[0])


def test_a_killed_agent_leaves_nothing_on_the_device() -> None:
    slots = Slots()
    config = hot_config(256 * MIB)
    config.device = "cuda:0"
    before = free_bytes()
    agent = AgentSupervisor("hot", config)
    agent.environment = device_environment()
    agent.start()
    try:
        slots.map_into(agent)
        assert free_bytes() <= before - 256 * MIB
        items = slots.sources(range(8))
        assert [result.outcome for result in agent.write(items)] == [Outcome.OK] * 8
        targets = slots.targets(range(8))
        assert agent.read(targets) == [Outcome.OK] * 8
        assert all(slots.is_whole(target) for target in targets)
        agent.kill()
        wait_until(lambda: agent.restarts == 1 and agent.state == "ok", "a fresh agent")
        assert agent.read(slots.targets(range(8))) == [Outcome.MISSING] * 8
    finally:
        agent.close()
    wait_until(lambda: free_bytes() >= before - 64 * MIB, f"the memory to be free again within {PATIENCE_S:g} s")


def test_through_a_whole_daemon(start_daemon: StartDaemon) -> None:
    """put from the device, promote, drop from warm, read back to the device: hot to warm to worker."""
    daemon = start_daemon(warm_bytes="64MiB", cold_bytes=0, hot_device="cuda:0", hot_bytes="64MiB", promote_hits=1)
    space = namespace(daemon.client(staging_bytes=16 * MIB), "gpu", 256 << 10)
    keys = chain(space, 32)
    wanted = contents(keys, space.block_nbytes)
    space.put(keys, torch.from_numpy(wanted).cuda())
    out = torch.zeros((32, space.block_nbytes), dtype=torch.uint8, device="cuda")

    def read() -> int:
        out.zero_()
        with space.acquire(keys, timeout_s=10.0) as lease:
            return lease.read_into(out, verify=True)

    def is_hot() -> bool:
        return read() == 32 and space.match(keys).by_tier["hot"] == 32

    eventually(is_hot, "every block to be in hot")
    daemon.ask("Evict", admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1 << 40))
    assert read() == 32
    assert wrong(keys, out.cpu().numpy()) == []
    assert daemon.tier("hot").hits >= 32
    assert daemon.tier("hot").state == "ok"
