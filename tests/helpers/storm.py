"""Workers that do everything at random, each in a process of its own, and count what came of it.

The bytes of every block follow from its key, so that each read is checked. What fails because the daemon, an agent or
the worker itself was stopped or killed is counted, and not a fault; a wrong byte always is.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from derived import chain, namespace
from kvstore_client import (
    REJECTED,
    Client,
    Keys,
    KVStoreError,
    Lease,
    LeaseExpired,
    Namespace,
    RejectReason,
)

# Small ones and few seeds: what counts is how often blocks come, go, and meet another worker's.
SIZES = {"small": 16 << 10, "medium": 64 << 10, "large": 256 << 10}
BLOCKS_MAX = 24
SEEDS = 40
CALL_S = 10.0
_REPORT_S = 0.25
_PAUSE_S = 0.02


class StormWorker:
    """The harness's end of one process."""

    def __init__(self, address: str, seed: int, **options: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, address, str(seed), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._rest = ""
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    @property
    def process(self) -> subprocess.Popen[str]:
        """To be stopped, continued or killed."""
        return self._process

    def collect(self) -> None:
        """Take the reports that have come."""
        assert self._process.stdout is not None
        with contextlib.suppress(TypeError, BlockingIOError):  # nothing there
            self._rest += self._process.stdout.read() or ""
        *lines, self._rest = self._rest.split("\n")
        for line in lines:
            report = json.loads(line)
            self.counts.update(report["counts"])
            self.wrong += report["wrong"]

    def end(self, timeout_s: float = 60.0) -> None:
        """Have it close its client and end, and take its last report; kill it where it does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.counts["hung"] += 1
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        self.collect()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def kill(self) -> None:
        """SIGKILL, and reap it."""
        self._process.kill()
        self._process.wait()
        self._close()


class _Storm:
    """The process's end."""

    def __init__(self, address: str, seed: int, options: dict[str, Any]) -> None:
        self._dice = random.Random(seed)
        self._client = Client(address, fail_open=True, name=f"storm {seed}", staging_bytes=4 << 20, **options)
        self._spaces: list[Namespace] = []
        self._held: list[tuple[Lease, Namespace, Keys]] = []
        self._tokens: list[tuple[bytes, Namespace, Keys]] = []
        self._counts: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._verbs: list[tuple[Callable[[], None], float]] = [
            (self._put, 6), (self._staged_put, 1), (self._read, 8), (self._hold, 2), (self._read_held, 3),
            (self._release, 2), (self._match, 4), (self._prefetch, 1), (self._handoff, 1), (self._adopt, 1),
            (self._delete, 0.3), (self._clear, 0.02), (self._exists, 1),
        ]  # fmt: skip

    def run(self) -> None:
        """Until standard input ends."""
        verbs, weights = zip(*self._verbs, strict=True)
        next_report_s = time.monotonic() + _REPORT_S
        while not select.select([sys.stdin], [], [], 0)[0]:
            verb = self._dice.choices(verbs, weights)[0]
            try:
                verb()
                self._counts[verb.__name__.strip("_")] += 1
            except KVStoreError as error:
                self._counts[f"error {type(error).__name__}"] += 1
            if time.monotonic() >= next_report_s:
                self._report()
                next_report_s = time.monotonic() + _REPORT_S
        while self._held:
            self._release()
        self._client.close()
        self._report()

    def _report(self) -> None:
        print(json.dumps({"counts": self._counts, "wrong": self._wrong}), flush=True)  # noqa: T201
        self._counts, self._wrong = Counter(), []

    # -- what it does

    def _space(self) -> Namespace:
        if not self._spaces:
            self._spaces = [
                namespace(self._client, name, size, kind=kind)
                for name, size in SIZES.items()
                for kind in (("chain", "set") if name == "small" else ("chain",))
            ]
        return self._dice.choice(self._spaces)

    def _keys(self, space: Namespace) -> Keys:
        return chain(space, self._dice.randint(1, BLOCKS_MAX), self._dice.randrange(SEEDS))

    def _put(self) -> None:
        space = self._space()
        keys = self._keys(space)
        pin = self._dice.random() < 0.02
        outcomes = space.put(keys, contents(keys, space.block_nbytes), timeout_s=CALL_S, pin=pin)
        self._counts.update(f"put {(outcome.reason or outcome.status).name.lower()}" for outcome in outcomes)
        if outcomes[0] == REJECTED(RejectReason.UNAVAILABLE):
            time.sleep(_PAUSE_S)  # nobody is there: calls that are misses at once would only burn the machine

    def _staged_put(self) -> None:
        space = self._space()
        keys = self._keys(space)[:4]
        with space.stage(len(keys), timeout_s=1.0) as buffers:
            buffers.array[:] = contents(keys, space.block_nbytes)
            buffers.put(keys, timeout_s=CALL_S)

    def _read(self) -> None:
        space = self._space()
        keys = self._keys(space)
        with space.acquire(keys, timeout_s=CALL_S) as lease:
            self._check(space, keys, lease)

    def _hold(self) -> None:
        if len(self._held) < 4:
            space = self._space()
            keys = self._keys(space)
            self._held.append((space.acquire(keys, timeout_s=CALL_S), space, keys))

    def _read_held(self) -> None:
        if self._held:
            lease, space, keys = self._dice.choice(self._held)
            self._check(space, keys, lease)

    def _check(self, space: Namespace, keys: Keys, lease: Lease) -> None:
        if not lease.blocks:
            self._counts["miss"] += 1
            return
        out = np.zeros((lease.blocks, space.block_nbytes), np.uint8)
        try:
            count = lease.read_into(out, timeout_s=CALL_S)
        except LeaseExpired:
            self._counts["expired"] += 1
            return
        self._counts["blocks read"] += count
        if bad := wrong(keys, out[:count]):
            self._wrong.append(f"{space.spec.model} {space.spec.kind}: {bad} of {count}")

    def _release(self) -> None:
        if self._held:
            self._held.pop(self._dice.randrange(len(self._held)))[0].release()

    def _match(self) -> None:
        space = self._space()
        space.match(self._keys(space), timeout_s=CALL_S)

    def _exists(self) -> None:
        space = self._space()
        space.exists(self._keys(space), timeout_s=CALL_S)

    def _prefetch(self) -> None:
        space = self._space()
        space.prefetch(self._keys(space), timeout_s=CALL_S)

    def _handoff(self) -> None:
        space = self._space()
        keys = self._keys(space)
        lease = space.acquire(keys, timeout_s=CALL_S)
        if lease.blocks and len(self._tokens) < 4:
            self._tokens.append((lease.handoff(), space, keys))
        else:
            lease.release()

    def _adopt(self) -> None:
        if self._tokens:
            token, space, keys = self._tokens.pop()
            with space.adopt(token) as lease:
                self._check(space, keys, lease)

    def _delete(self) -> None:
        space = self._space()
        space.delete(self._keys(space)[-1:], timeout_s=CALL_S)

    def _clear(self) -> None:
        self._space().clear(timeout_s=CALL_S)


def content(key: bytes, nbytes: int) -> NDArray[np.uint8]:
    """What belongs under a key: pages of noise that tell key and page, made as fast as they are copied."""
    page = np.frombuffer(np.random.Generator(np.random.SFC64(int.from_bytes(key, "little"))).bytes(4096), np.uint64)
    pages = np.tile(page, (nbytes // 4096, 1))
    pages[:, 0] = np.arange(len(pages))
    return pages.view(np.uint8).reshape(nbytes)


def contents(keys: Keys, nbytes: int) -> NDArray[np.uint8]:
    """(n, nbytes): what belongs under each of the keys."""
    return np.stack([content(key, nbytes) for key in keys])


def wrong(keys: Keys, rows: NDArray[np.uint8]) -> list[int]:
    """Positions at which the bytes are not those that belong under the key."""
    return [at for at, (key, row) in enumerate(zip(keys, rows, strict=False)) if (row != content(key, len(row))).any()]


if __name__ == "__main__":
    _Storm(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])).run()
