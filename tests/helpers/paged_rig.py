"""Paged caches of noise in every layout and dtype, and a plain loop that says what their blocks must be."""

from __future__ import annotations

import torch

from kvstore_client import KVLayout, TensorSpec

LAYERS, PAGES, PAGE_TOKENS, HEADS, DIM = 3, 11, 4, 2, 8
SIZES = {"block": PAGES, "token": PAGE_TOKENS, "head": HEADS, "dim": DIM, "kv": 2}
AXES = {
    "flash": "kv block token head dim",
    "flashinfer": "block kv token head dim",
    "heads first": "block kv head token dim",
    "mla": "block token dim",
}
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float32": torch.float32,
}


def spec_axes(axes: str) -> list[str]:
    return [name for name in ["kv", "layer", "token", "head", "dim"] if name == "layer" or name in axes.split()]


def layout_of(axes: str, dtype: str, pages_per_block: int) -> KVLayout:
    names = spec_axes(axes)
    sizes = {**SIZES, "layer": LAYERS, "token": PAGE_TOKENS * pages_per_block}
    return KVLayout([TensorSpec("kv", dtype, tuple(sizes[name] for name in names), " ".join(names))])


def random_layers(axes: str, dtype: str, *, strided: bool = False, seed: int = 0) -> list[torch.Tensor]:
    """Noise in every bit, also those that are no number."""
    shape = [SIZES[name] for name in axes.split()]
    size = DTYPES[dtype].itemsize
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(LAYERS):
        wide = [*shape[:-1], shape[-1] * size * (2 if strided else 1)]
        raw = torch.randint(0, 256, wide, generator=generator, dtype=torch.uint8)
        typed = raw.view(DTYPES[dtype])
        made.append(typed[..., : shape[-1]] if strided else typed)
    return made


def plain_blocks(layers: list[torch.Tensor], axes: str, layout: KVLayout, ids: list[int]) -> torch.Tensor:
    """What gather() must give, token by token."""
    spec = layout.tensors[0]
    names, own = axes.split(), spec.axes.split()
    per_block = (spec.axis_size("token") or 0) // PAGE_TOKENS
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[spec.item_nbytes]
    out = torch.zeros((len(ids) // per_block, *spec.shape), dtype=bits)
    for position, page in enumerate(ids):
        for number, layer in enumerate(layers):
            for token in range(PAGE_TOKENS):
                at = [{"block": page, "token": token}.get(name, slice(None)) for name in names]
                to = {"layer": number, "token": position % per_block * PAGE_TOKENS + token}
                found = layer.view(bits)[tuple(at)]
                left = [name for name in names if name not in ("block", "token")]
                order = [left.index(name) for name in own if name in left]
                out[(position // per_block, *(to.get(name, slice(None)) for name in own))] = found.permute(order)
    return out.flatten(1).view(torch.uint8)


def same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        for one, other in zip(left, right, strict=True)
    )
