"""A worker's CUDA tensors: reads, puts, layers, staging and pages, with every byte compared."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from derived import chain, contents, namespace, wrong
from kvstore_client import STORED, Client, Keys, KVLayout, Namespace, PagedCache, TensorSpec, device
from kvstore_client.testing import FakeDaemon
from paged_rig import AXES, DTYPES, layout_of, plain_blocks, random_layers
from polling import eventually

pytestmark = pytest.mark.gpu

N = 24
NBYTES = 256 << 10


@pytest.fixture
def client() -> Iterator[Client]:
    with FakeDaemon(warm_bytes=64 << 20) as daemon, Client(daemon.address, staging_bytes=16 << 20) as attached:
        yield attached


@pytest.fixture
def space(client: Client) -> Namespace:
    return namespace(client, "gpu", NBYTES)


@pytest.fixture
def keys(space: Namespace) -> Keys:
    made = chain(space, N)
    assert space.put(made, contents(made, NBYTES)) == [STORED] * N
    return made


def rows(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).cpu().numpy().reshape(N, NBYTES)


def pins_are_tried() -> bool:
    return all(pin.tried.is_set() for pin in list(device.device(0).pins._pins.values()))


@pytest.mark.parametrize("form", ["bytes", "bfloat16", "rows apart", "one a block", "segments"])
def test_read_into(space: Namespace, keys: Keys, form: str) -> None:
    whole = torch.zeros((N, NBYTES), dtype=torch.uint8, device="cuda")
    apart = torch.zeros((N, NBYTES + 4096), dtype=torch.uint8, device="cuda")
    out = {
        "bytes": whole,
        "bfloat16": whole.view(torch.bfloat16).view(N, 2, -1),
        "rows apart": apart[:, :NBYTES],
        "one a block": list(whole),
        "segments": [list(row.view(16, -1)) for row in whole],
    }[form]
    with space.acquire(keys) as lease:
        for _ in range(3):  # unpinned at first, pinned later
            whole.zero_()
            apart.zero_()
            assert lease.read_into(out, verify=True) == N
            assert wrong(keys, rows(apart[:, :NBYTES] if form == "rows apart" else whole)) == []
            eventually(pins_are_tried, "the slabs to be registered, or not")


class OnlyDlpack:
    """A tensor as a library gives it that speaks DLPack and nothing else."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: object) -> object:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> object:
        return self._tensor.__dlpack_device__()


def test_memory_of_other_libraries(space: Namespace, keys: Keys) -> None:
    whole = torch.zeros((N, NBYTES), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with space.acquire(keys) as lease:
        assert lease.read_into(OnlyDlpack(whole), verify=True) == N
        assert wrong(keys, rows(whole)) == []
        whole.zero_()
        torch.cuda.synchronize()
        interface = SimpleNamespace(__cuda_array_interface__=whole.__cuda_array_interface__)
        assert lease.read_into(interface, verify=True) == N
    assert wrong(keys, rows(whole)) == []


def test_slabs_are_let_go_with_the_client(space: Namespace, keys: Keys, client: Client) -> None:
    out = torch.zeros((N, NBYTES), dtype=torch.uint8, device="cuda")
    with space.acquire(keys) as lease:
        lease.read_into(out)
    del lease
    client.close()
    eventually(lambda: device.device(0).pins.pinned_bytes() == 0, "nothing to be pinned any more")


def test_put_waits_for_what_writes_the_blocks(space: Namespace) -> None:
    wanted = contents(chain(space, N, seed=1), NBYTES)
    source = torch.from_numpy(wanted).pin_memory()
    blocks = torch.zeros((N, NBYTES), dtype=torch.uint8, device="cuda")
    side, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the kernel that is still writing
        blocks.copy_(source, non_blocking=True)
        event.record()
    keys = chain(space, N, seed=1)
    assert space.put(keys, blocks, after=event) == [STORED] * N
    out = np.zeros((N, NBYTES), np.uint8)
    with space.acquire(keys) as lease:
        lease.read_into(out, verify=True)
    assert wrong(keys, out) == []


def test_staging_takes_copies_from_the_device(space: Namespace) -> None:
    keys = chain(space, 8, seed=2)
    blocks = torch.from_numpy(contents(keys, NBYTES)).cuda()
    with space.stage(8, device=0) as staged:
        assert staged.is_pinned
        target = torch.from_numpy(staged.array)
        target.copy_(blocks, non_blocking=True)
        torch.cuda.synchronize()
        assert staged.put(keys) == [STORED] * 8
    out = torch.zeros((8, NBYTES), dtype=torch.uint8, device="cuda")
    with space.acquire(keys) as lease:
        assert lease.read_into(out, verify=True) == 8
    assert wrong(keys, out.cpu().numpy()) == []


def test_layers(client: Client) -> None:
    layout = KVLayout([TensorSpec("kv", "bfloat16", (2, 8, 16, 4, 64), "kv layer token head dim")])
    space = client.namespace(model="layers", revision="1", block_tokens=16, layout=layout)
    keys = chain(space, N)
    wanted = contents(keys, layout.nbytes)
    space.put(keys, wanted)
    bits = torch.from_numpy(wanted).view(torch.int16).view(N, 2, 8, -1)
    out = torch.zeros((N, layout.nbytes), dtype=torch.uint8, device="cuda")
    seen = []
    with space.acquire(keys) as lease:
        for layer in lease.read_layers(out):
            got = out.view(torch.int16).view(N, 2, 8, -1)[:, :, layer].cpu()
            assert torch.equal(got, bits[:, :, layer])
            seen.append(layer)
    assert seen == list(range(8))


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("pages_per_block", [1, 3])
def test_pages(kernels: bool, kind: str, dtype: str, pages_per_block: int) -> None:
    axes, ids = AXES[kind], [7, 0, 10, 3, 4, 9]
    layout = layout_of(axes, dtype, pages_per_block)
    on_host = random_layers(axes, dtype)
    cache = PagedCache([layer.cuda() for layer in on_host], axes, layout, kernels=kernels)
    blocks = cache.gather(ids)
    assert torch.equal(blocks.cpu(), plain_blocks(on_host, axes, layout, ids))
    target = PagedCache([layer.cuda() for layer in random_layers(axes, dtype, seed=1)], axes, layout, kernels=kernels)
    target.scatter(blocks, ids[::-1])
    assert torch.equal(target.gather(ids[::-1]), blocks)
