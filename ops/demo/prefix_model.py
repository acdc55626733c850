"""A Llama-style transformer, its byte-level prompts, and the way between its KV cache and blocks.

The weights are random from a seed: what a prefill costs, and whether a restored cache is exact, does not depend on
what the weights have learnt.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvstore_client import KVLayout, TensorSpec

# Renamed in transformers 5; the older name warns at every call.
_CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

SEED = 20_240_607
THREADS = 2
BLOCK_TOKENS = 16
PREFIX_TOKENS = 4096
QUESTIONS = (
    "\n\nQ: May I sell a product that contains this software?\nA:",
    "\n\nQ: What must I keep in the files that I change?\nA:",
    "\n\nQ: Who is liable if it does not work?\nA:",
    "\n\nQ: Does this grant me a patent licence?\nA:",
)


@dataclass(frozen=True)
class Prompt:
    """Token ids: a prefix that all share (whole blocks), and one question."""

    prefix: torch.Tensor
    question: torch.Tensor

    @property
    def whole(self) -> torch.Tensor:
        """Both, (1, tokens)."""
        return torch.cat([self.prefix, self.question], dim=1)


def build_model() -> LlamaForCausalLM:
    """36M parameters, 12 layers, 8 query heads on 2 key/value heads, float32."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def prompts(text_file: Path) -> list[Prompt]:
    """The text's bytes as tokens, cut to whole blocks, with each question after it."""
    data = np.frombuffer(text_file.read_bytes()[:PREFIX_TOKENS], np.uint8).astype(np.int64)
    prefix = torch.from_numpy(data[: len(data) // BLOCK_TOKENS * BLOCK_TOKENS])[None]
    return [Prompt(prefix, torch.tensor([list(question.encode())])) for question in QUESTIONS]


def layout(model: LlamaForCausalLM) -> KVLayout:
    """One block: keys and values of BLOCK_TOKENS tokens in every layer."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (2, config.num_hidden_layers, BLOCK_TOKENS, config.num_key_value_heads, head_dim)
    return KVLayout([TensorSpec("kv", "float32", shape, "kv layer token head dim")])


@torch.inference_mode()
def prefill(model: LlamaForCausalLM, tokens: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
    """Logits of the last token, (vocabulary,); `cache` (if any) is read and extended."""
    output = model(tokens, **{_CACHE: cache}, use_cache=cache is not None, logits_to_keep=1)
    return output.logits[0, -1]


def cache_to_blocks(cache: DynamicCache, tokens: int) -> np.ndarray:
    """The first `tokens` positions as blocks, (blocks, block bytes) of uint8."""
    # Per layer (1, heads, tokens, dim) -> (kv, layer, tokens, heads, dim) -> (blocks, kv, layer, block tokens, ...)
    pairs = [torch.stack([layer.keys[0, :, :tokens], layer.values[0, :, :tokens]]) for layer in cache.layers]
    stacked = torch.stack(pairs, dim=1).transpose(2, 3)
    kv, layers, _, heads, dim = stacked.shape
    blocks = stacked.reshape(kv, layers, -1, BLOCK_TOKENS, heads, dim).permute(2, 0, 1, 3, 4, 5).contiguous()
    return blocks.numpy().reshape(blocks.shape[0], -1).view(np.uint8)


def blocks_to_cache(model: LlamaForCausalLM, blocks: np.ndarray) -> DynamicCache:
    """The inverse: a cache that holds exactly those positions."""
    shape = layout(model).tensors[0].shape
    stacked = torch.from_numpy(blocks.view(np.float32)).reshape(-1, *shape)
    # (blocks, kv, layer, block tokens, heads, dim) -> (kv, layer, heads, tokens, dim)
    ordered = stacked.permute(1, 2, 4, 0, 3, 5).flatten(3, 4).contiguous()
    cache = DynamicCache(config=model.config)
    for index in range(shape[1]):
        cache.update(ordered[0, index][None], ordered[1, index][None], index)
    return cache
