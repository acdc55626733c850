"""A worker for the audit of pickle: `python audited_worker.py ADDRESS put|get`; exits 0 if every block was right."""

from __future__ import annotations

import sys

import numpy as np

from kvstore_client import EXISTS, STORED, Client, KVLayout, TensorSpec

BLOCKS = 12
TIMEOUT_S = 30.0


def main(address: str, job: str) -> int:
    """Put the blocks, or get them and compare."""
    layout = KVLayout([TensorSpec("kv", "bfloat16", (2, 2, 16, 2, 64), "kv layer token head dim")])
    with Client(address) as client:
        namespace = client.namespace(model="audit", revision="1", block_tokens=16, layout=layout)
        keys = namespace.keys(list(range(16 * BLOCKS)))
        blocks = np.random.default_rng(5).integers(0, 255, (BLOCKS, namespace.block_nbytes), dtype=np.uint8)
        if job == "put":
            return int(any(outcome not in (STORED, EXISTS) for outcome in namespace.put(keys, blocks, TIMEOUT_S)))
        out = np.zeros_like(blocks)
        with namespace.acquire(keys, TIMEOUT_S) as lease:
            if lease.wait(BLOCKS, TIMEOUT_S) != BLOCKS:
                return 2
            lease.read_into(out, verify=True)
        return int(not np.array_equal(out, blocks))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
