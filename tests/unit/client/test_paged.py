"""Pages to blocks and back, against a plain loop over every token, for every layout and every dtype."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fake_triton
from kvstore_client import STORED, Client, InvalidRequest, KVLayout, PagedCache, TensorSpec
from kvstore_client.testing import FakeDaemon
from paged_rig import (
    AXES,
    DIM,
    DTYPES,
    HEADS,
    LAYERS,
    PAGE_TOKENS,
    PAGES,
    layout_of,
    plain_blocks,
    random_layers,
    same_bits,
)


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Both ways; Triton's in numpy."""
    if request.param == "triton":
        for name, module in fake_triton.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        fake_triton.forget_kernels()
    yield request.param == "triton"
    fake_triton.forget_kernels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("pages_per_block", [1, 3])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_there_and_back(kernels: bool, kind: str, dtype: str, pages_per_block: int, strided: bool) -> None:
    axes = AXES[kind]
    layout = layout_of(axes, dtype, pages_per_block)
    layers = random_layers(axes, dtype, strided=strided)
    ids = [7, 0, 10, 3, 4, 9]
    cache = PagedCache(layers, axes, layout, kernels=kernels)
    assert (cache.pages, cache.page_tokens, cache.pages_per_block) == (PAGES, PAGE_TOKENS, pages_per_block)
    blocks = cache.gather(ids)
    assert torch.equal(blocks, plain_blocks(layers, axes, layout, ids))

    other = random_layers(axes, dtype, strided=strided, seed=1)
    before = [layer.clone() for layer in other]
    target = PagedCache(other, axes, layout, kernels=kernels)
    target.scatter(blocks, torch.tensor(ids[::-1]))
    assert torch.equal(target.gather(ids[::-1]), blocks)
    rest = [page for page in range(PAGES) if page not in ids]
    if pages_per_block == 1:
        untouched = PagedCache(before, axes, layout, kernels=False)
        assert torch.equal(target.gather(rest), untouched.gather(rest)), "a page that was not named changed"


def test_some_layers_only(kernels: bool) -> None:
    axes, layout = AXES["flash"], layout_of(AXES["flash"], "bfloat16", 1)
    layers = random_layers(axes, "bfloat16")
    cache = PagedCache(layers, axes, layout, kernels=kernels)
    out = torch.zeros((2, layout.nbytes), dtype=torch.uint8)
    cache.gather([1, 2], out, layers=[2])
    wanted = plain_blocks(layers, axes, layout, [1, 2]).view(torch.int16).view(2, 2, LAYERS, -1)
    got = out.view(torch.int16).view(2, 2, LAYERS, -1)
    assert torch.equal(got[:, :, 2], wanted[:, :, 2]) and not got[:, :, :2].any()
    other = random_layers(axes, "bfloat16", seed=1)
    kept = [layer.clone() for layer in other]
    PagedCache(other, axes, layout, kernels=kernels).scatter(cache.gather([1, 2]), [5, 6], layers=[0])
    assert torch.equal(other[0][:, 5].view(torch.int16), layers[0][:, 1].view(torch.int16))
    assert same_bits(other[1:], kept[1:])


def test_a_tensor_of_its_own_for_each_layer_of_different_width() -> None:
    specs = [TensorSpec(f"layer {at}", "float16", (PAGE_TOKENS, 6 + 2 * at), "token dim") for at in range(3)]
    layout = KVLayout(specs)
    layers = [torch.randn(PAGES, PAGE_TOKENS, 6 + 2 * at).half() for at in range(3)]
    cache = PagedCache(layers, "block token dim", layout)
    blocks = cache.gather([4, 2])
    rows = torch.cat([layer[[4, 2]].flatten(1) for layer in layers], dim=1)
    assert torch.equal(blocks.view(torch.float16), rows)


@pytest.mark.parametrize("wrong", ["nothing", "scatter", "gather"])
@pytest.mark.parametrize("filled", [True, False], ids=["noise", "zeros"])
def test_kernels_that_give_other_bytes_are_not_used(monkeypatch: pytest.MonkeyPatch, wrong: str, filled: bool) -> None:
    """Also where the cache is all zero, as an engine's is when it starts."""
    axes, layout = AXES["flash"], layout_of(AXES["flash"], "bfloat16", 1)
    for name, module in fake_triton.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    fake_triton.forget_kernels()
    import kvstore_client.paged_triton as kernels_module

    right = kernels_module.copy_pages

    def copy_pages(blocks: torch.Tensor, pages: torch.Tensor, ids: torch.Tensor, to_pages: bool) -> None:
        if wrong != "nothing" and to_pages != (wrong == "scatter"):
            right(blocks, pages, ids, to_pages)

    monkeypatch.setattr(kernels_module, "copy_pages", copy_pages)
    layers = [layer if filled else torch.zeros_like(layer) for layer in random_layers(axes, "bfloat16")]
    before = [layer.clone() for layer in layers]
    with pytest.raises(InvalidRequest, match="gave other bytes than plain torch"):
        PagedCache(layers, axes, layout, kernels=True)
    assert same_bits(layers, before), "the engine's own pages were written to"
    fake_triton.forget_kernels()


def test_kernels_are_not_even_looked_for_on_the_cpu() -> None:
    axes = AXES["mla"]
    assert PagedCache(random_layers(axes, "float16"), axes, layout_of(axes, "float16", 1))._kernels is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": "block token head dim"}, "axes are .*; they must be block and those of tensor 'kv': kv token"),
        ({"count": 2}, "2 layers were given; the layout has 3"),
        ({"dtype": "float32"}, "a layer is of torch.float32, tensor 'kv' of bfloat16"),
        ({"layout_tokens": 6}, "a block's 6 tokens must be whole pages"),
        ({"layout_heads": 5}, "the other axes the same"),
        ({"flat": True}, "has shape .* and 5 axes"),
    ],
)
def test_tensors_that_do_not_fit_the_layout(change: dict[str, Any], message: str) -> None:
    axes = AXES["flash"]
    shape = (2, LAYERS, change.get("layout_tokens", PAGE_TOKENS), change.get("layout_heads", HEADS), DIM)
    layout = KVLayout([TensorSpec("kv", "bfloat16", shape, "kv layer token head dim")])
    layers = random_layers(axes, change.get("dtype", "bfloat16"))[: change.get("count", LAYERS)]
    if change.get("flat"):
        layers = [layer.flatten() for layer in layers]
    with pytest.raises(InvalidRequest, match=message):
        PagedCache(layers, change.get("axes", axes), layout)


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([0, PAGES], None, "page ids from 0 to 11; the cache has 11"),
        ([-1, 0], None, "page ids from -1 to 0"),
        ([0, 1, 2], None, r"\(3,\) page ids; a block has 2 pages"),
        ([0, 1], (2, 512), "give contiguous"),
        ([0, 1], (1, 7), "give contiguous"),
    ],
)
def test_calls_that_do_not_fit(ids: list[int], rows: tuple[int, ...] | None, message: str) -> None:
    axes = AXES["flash"]
    cache = PagedCache(random_layers(axes, "bfloat16"), axes, layout_of(axes, "bfloat16", 2))
    out = None if rows is None else torch.zeros(rows, dtype=torch.uint8)
    with pytest.raises(InvalidRequest, match=message):
        cache.gather(ids, out)


def test_from_one_engines_pages_to_anothers(daemon: FakeDaemon, client: Client) -> None:
    """Prefill on one side, put; acquire on the other, and its pages have the same bits layer by layer."""
    axes, layout = AXES["flashinfer"], layout_of(AXES["flashinfer"], "bfloat16", 2)
    space = client.namespace(model="paged", revision="1", block_tokens=2 * PAGE_TOKENS, layout=layout)
    source, target = random_layers(axes, "bfloat16"), random_layers(axes, "bfloat16", seed=1)
    keys = space.keys(list(range(4 * 2 * PAGE_TOKENS)))
    ids, others = [3, 1, 4, 0, 5, 9, 2, 6], [10, 9, 8, 7, 6, 5, 4, 3]
    assert space.put(keys, PagedCache(source, axes, layout).gather(ids)) == [STORED] * 4
    pages = PagedCache(target, axes, layout)
    with space.acquire(keys) as lease:
        for layer in pages.load(lease, others):
            for page, other in zip(ids, others, strict=True):
                assert torch.equal(source[layer][page].view(torch.int16), target[layer][other].view(torch.int16))
        with pytest.raises(InvalidRequest, match="2 pages for 4 blocks of 2 pages"):
            list(pages.load(lease, [0, 1]))
