"""One inference worker process of the demo. It answers each question once and reports the times to first token.

    worker.py MODE ADDRESS TEXT RESULT

MODE: recompute   no KV cache at all
      live        the model's own cache, cold prompt; stores the prefix's blocks; its logits are the reference
      fetch       takes the prefix from the daemon
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM

import prefix_model as pm
from kvstore_client import STORED, Client, Namespace

_TIMEOUT_S = 30.0


class Worker:
    """A model with its prompts, and where wanted a client."""

    def __init__(self, text: Path) -> None:
        self.model: LlamaForCausalLM = pm.build_model()
        self.prompts = pm.prompts(text)
        pm.prefill(self.model, torch.zeros((1, 64), dtype=torch.long), None)  # first-use costs are nobody's answer
        self.client: Client | None = None

    def connect(self, address: str) -> Namespace:
        """Attach to the daemon, before any request comes."""
        self.client = Client(address)
        return self.client.namespace(
            model="demo/llama-36m", revision=str(pm.SEED), block_tokens=pm.BLOCK_TOKENS, layout=pm.layout(self.model)
        )

    def recompute(self, prompt: pm.Prompt) -> torch.Tensor:
        """Everything again, and nothing kept."""
        return pm.prefill(self.model, prompt.whole, None)

    def live(self, prompt: pm.Prompt) -> tuple[torch.Tensor, DynamicCache]:
        """The prefix into a cache of the model's own, then the question."""
        cache = DynamicCache(config=self.model.config)
        pm.prefill(self.model, prompt.prefix, cache)
        return pm.prefill(self.model, prompt.question, cache), cache

    def fetch(self, prompt: pm.Prompt, namespace: Namespace) -> tuple[torch.Tensor, int]:
        """The prefix from the daemon, then the question; returns the logits and the tokens that were fetched."""
        keys = namespace.keys(prompt.prefix[0].numpy())
        with namespace.acquire(keys, timeout_s=_TIMEOUT_S) as lease:
            blocks = np.empty((lease.blocks, namespace.block_nbytes), np.uint8)
            lease.wait(lease.blocks, timeout_s=_TIMEOUT_S)
            lease.read_into(blocks)
            tokens = lease.tokens
        cache = pm.blocks_to_cache(self.model, blocks)
        rest = torch.cat([prompt.prefix[:, tokens:], prompt.question], dim=1)
        return pm.prefill(self.model, rest, cache), tokens


def run(mode: str, address: str, text: Path) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Answer every question; returns the report and the logits."""
    worker = Worker(text)
    namespace = worker.connect(address) if mode != "recompute" else None
    seconds: list[float] = []
    logits: list[torch.Tensor] = []
    fetched: list[int] = []
    for number, prompt in enumerate(worker.prompts):
        started = time.perf_counter()
        if mode == "recompute":
            answer = worker.recompute(prompt)
        elif mode == "live":
            answer, cache = worker.live(prompt)
        else:
            answer, tokens = worker.fetch(prompt, namespace)
            fetched.append(tokens)
        seconds.append(time.perf_counter() - started)
        logits.append(answer)
        if mode == "live" and number == 0:
            store(worker, namespace, prompt, cache)
    report = {
        "mode": mode,
        "ttft_s": seconds,
        "median_s": statistics.median(seconds),
        "prompt_tokens": [prompt.whole.shape[1] for prompt in worker.prompts],
        "fetched_tokens": fetched,
        "parameters": sum(weight.numel() for weight in worker.model.parameters()),
    }
    if worker.client is not None:
        worker.client.close()
    return report, logits


def store(worker: Worker, namespace: Namespace, prompt: pm.Prompt, cache: DynamicCache) -> None:
    """Put the prefix's blocks, and insist that each was stored: the rest of the demo is about them."""
    blocks = pm.cache_to_blocks(cache, prompt.prefix.shape[1])
    outcomes = namespace.put(namespace.keys(prompt.prefix[0].numpy()), blocks)
    refused = [outcome for outcome in outcomes if outcome != STORED]
    if refused:
        raise SystemExit(f"{len(refused)} of {len(outcomes)} blocks were not stored: {refused[0]}")


def main() -> None:
    """Run as a process of its own."""
    mode, address, text, result = sys.argv[1:]
    report, logits = run(mode, address, Path(text))
    np.save(Path(result).with_suffix(".npy"), torch.stack(logits).numpy())
    Path(result).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
