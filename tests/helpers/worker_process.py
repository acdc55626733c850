"""A worker in a process of its own, which a test tells what to do, stops and kills at moments of its choice.

The test holds a WorkerProcess; the process runs this very file. They talk in lines of JSON: a request has a verb (a
method of Worker) and its arguments, an answer either "result" or "error" and "message".
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from derived import BLOCK_NBYTES, chain, content, contents, fetch, namespace, wrong
from kvstore_client import Client, Keys, KVStoreError, Lease, Namespace, StagedBuffers
from polling import PATIENCE_S, eventually

_CALL_S = 30.0


class WorkerFailed(AssertionError):
    """The worker answered with an error; `kind` is the name of its class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


class WorkerProcess:
    """The test's end."""

    def __init__(self, address: str, uid: int | None = None, **options: Any) -> None:
        """Start it and wait until it has attached, as another user if told so; `options` are those of Client()."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, address, json.dumps(uid), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self.take()
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Have it do something and return what came of it.

        Raises:
            WorkerFailed: an error of the client.
        """
        self.tell(verb, **arguments)
        return self.take()

    def tell(self, verb: str, **arguments: Any) -> None:
        """Have it do something, without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
        self._process.stdin.flush()

    def take(self, timeout_s: float = PATIENCE_S) -> Any:
        """The next answer.

        Raises:
            WorkerFailed: an error of the client.
        """
        assert self._process.stdout is not None
        line, deadline_s = b"", time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                assert selector.select(max(0.0, deadline_s - time.monotonic())), "the worker does not answer"
                byte = os.read(self._process.stdout.fileno(), 1)
                assert byte, "the worker has died"
                line += byte
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"], answer["message"])
        return answer["result"]

    def kill(self) -> None:
        """SIGKILL, and reap it. Idempotent."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def pause(self) -> None:
        """SIGSTOP: it is there, and does nothing."""
        self._process.send_signal(signal.SIGSTOP)
        # Not before the last of its threads has stopped.
        eventually(lambda: os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG), "it to stop")

    def resume(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)


class Worker:
    """The process's end: one method a verb. `model`, `blocks`, `seed` and `block_nbytes` name a chain of blocks."""

    def __init__(self, address: str, options: dict[str, Any]) -> None:
        self._address = address
        self._client = Client(address, **options)
        self._held: list[tuple[Keys, Lease]] = []
        self._staged: StagedBuffers | None = None
        self._views: list[NDArray[np.uint8]] = []

    def put(self, model: str, blocks: int, seed: int = 0, block_nbytes: int = BLOCK_NBYTES) -> list[str]:
        """Store a chain; the outcome of every block."""
        space = self._space(model, block_nbytes)
        keys = chain(space, blocks, seed)
        return [repr(outcome) for outcome in space.put(keys, contents(keys, block_nbytes), timeout_s=_CALL_S)]

    def put_for_ever(self, model: str, blocks: int, block_nbytes: int = BLOCK_NBYTES) -> Iterator[int]:
        """Store one chain after the other, seeds 0, 1, …; says so before the first, and never again."""
        space = self._space(model, block_nbytes)
        prepared = [chain(space, blocks, seed) for seed in range(4)]
        bytes_of = [contents(keys, block_nbytes) for keys in prepared]
        yield len(prepared)
        while True:
            for keys, rows in zip(prepared, bytes_of, strict=True):
                space.put(keys, rows, timeout_s=_CALL_S)
            space.delete(bytes(b"".join(keys[0] for keys in prepared)))

    def stage_half(self, model: str, blocks: int, seed: int = 0, block_nbytes: int = BLOCK_NBYTES) -> int:
        """Take staging for a chain and fill the first half of it."""
        space = self._space(model, block_nbytes)
        keys = chain(space, blocks, seed)
        self._staged = space.stage(blocks)
        for row, key in zip(self._staged, keys[: blocks // 2], strict=False):
            row[:] = content(key, block_nbytes)
        return len(self._staged)

    def scribble(self, model: str, blocks: int, seed: int = 0, block_nbytes: int = BLOCK_NBYTES) -> list[str]:
        """Store a chain from staging, whose bytes are changed all the while by another thread."""
        space = self._space(model, block_nbytes)
        keys = chain(space, blocks, seed)
        done = threading.Event()
        with space.stage(blocks) as staged:
            staged.array[:] = contents(keys, block_nbytes)

            def change() -> None:
                while not done.is_set():
                    staged.array += np.uint8(1)

            thread = threading.Thread(target=change)
            thread.start()
            try:
                outcomes = staged.put(keys, timeout_s=_CALL_S)
            finally:
                done.set()
                thread.join()
        return [repr(outcome) for outcome in outcomes]

    def get(self, model: str, blocks: int, seed: int = 0, block_nbytes: int = BLOCK_NBYTES) -> tuple[int, list[int]]:
        """Read a chain: how many blocks came, and which of them are wrong."""
        space = self._space(model, block_nbytes)
        return fetch(space, chain(space, blocks, seed))

    def get_or_error(self, model: str, blocks: int) -> tuple[int, list[int]] | str:
        """Read a chain, or say in words why not."""
        try:
            return self.get(model, blocks)
        except KVStoreError as error:
            return f"{type(error).__name__}: {error}"

    def get_for_ever(
        self, model: str, blocks: int, seed: int = 0, block_nbytes: int = BLOCK_NBYTES
    ) -> Iterator[tuple[int, list[int]]]:
        """Read a chain over and over; tells of the first time."""
        yield self.get(model, blocks, seed, block_nbytes)
        while True:
            self.get(model, blocks, seed, block_nbytes)

    def hold(self, model: str, blocks: int, seed: int = 0, block_nbytes: int = BLOCK_NBYTES) -> int:
        """Acquire a chain and keep the lease; how many blocks it has."""
        space = self._space(model, block_nbytes)
        keys = chain(space, blocks, seed)
        lease = space.acquire(keys, timeout_s=_CALL_S)
        self._held.append((keys, lease))
        return lease.blocks

    def read_held(self) -> tuple[int, list[int]]:
        """Read the blocks of the lease that was taken last."""
        keys, lease = self._held[-1]
        out = np.zeros((len(keys), lease.groups[0].namespace.block_nbytes), np.uint8)
        count = lease.read_into(out, timeout_s=_CALL_S)
        return count, wrong(keys, out[:count])

    def read_held_for_ever(self) -> Iterator[tuple[int, list[int]]]:
        """Read the blocks of the lease that was taken last over and over; tells of the first time, and of a wrong one.

        Only an error ends it.
        """
        keys, lease = self._held[-1]
        expected = contents(keys, lease.groups[0].namespace.block_nbytes)
        out = np.zeros_like(expected)
        yield self.read_held()
        while True:
            count = lease.read_into(out, timeout_s=_CALL_S)
            if not np.array_equal(out[:count], expected[:count]):
                yield count, wrong(keys, out[:count])

    def view_held(self) -> int:
        """Look at every block of the lease that was taken last, where it lies; how many of them are right."""
        keys, lease = self._held[-1]
        self._views = [lease.view(at) for at in range(lease.blocks)]
        return sum(bool((view == content(key, len(view))).all()) for key, view in zip(keys, self._views, strict=True))

    def check_views(self) -> int:
        """Prove the views of view_held(); how many of them are right."""
        keys, lease = self._held[-1]
        right = sum(bool((view == content(key, len(view))).all()) for key, view in zip(keys, self._views, strict=True))
        lease.check()
        return right

    def handoff(self) -> str:
        """Give away the lease that was taken last; its token."""
        return self._held[-1][1].handoff().hex()

    def adopt(
        self, token: str, model: str, blocks: int, seed: int = 0, block_nbytes: int = BLOCK_NBYTES
    ) -> tuple[int, list[int]]:
        """Take a lease over and read its blocks; it is kept."""
        space = self._space(model, block_nbytes)
        self._held.append((chain(space, blocks, seed), space.adopt(bytes.fromhex(token), timeout_s=_CALL_S)))
        return self.read_held()

    def release(self) -> int:
        """Give every lease back; how many there were."""
        for _, lease in self._held:
            lease.release()
        count, self._held = len(self._held), []
        return count

    def clear(self, model: str) -> int:
        """Forget a namespace; its new epoch."""
        return self._space(model, BLOCK_NBYTES).clear()

    def fork(self, model: str, blocks: int) -> dict[str, str]:
        """Use the client in a forked child, where a fresh one has to work; then use it here."""
        space = self._space(model, BLOCK_NBYTES)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(writer, json.dumps(self._in_child(space, model, blocks)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            seen = json.loads(pipe.read())
        assert os.waitpid(child, 0) == (child, 0)
        return {**seen, "parent": json.dumps(fetch(space, chain(space, blocks)))}

    def fork_holder(self) -> int:
        """A child that holds this process's very descriptors and does nothing, as a fork() in C leaves it; its pid."""
        child = int(ctypes.CDLL(None).fork())  # past Python's own hooks
        if not child:
            time.sleep(4 * PATIENCE_S)
            os._exit(0)
        return child

    def count_sockets(self) -> int:
        """Descriptors of this process that are sockets."""
        return sum(name.startswith("socket:") for name in _open_files())

    def _in_child(self, space: Namespace, model: str, blocks: int) -> dict[str, str]:
        seen = {"sockets": str(self.count_sockets())}
        try:
            space.match(chain(space, blocks))
        except KVStoreError as error:
            seen["old"] = f"{type(error).__name__}: {error}"
        with Client(self._address) as fresh:
            own = namespace(fresh, model)
            seen["fresh"] = json.dumps(fetch(own, chain(own, blocks)))
        return seen

    def _space(self, model: str, block_nbytes: int) -> Namespace:
        return namespace(self._client, model, block_nbytes)


def _open_files() -> Iterator[str]:
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor that lists them
            yield str(entry.readlink())


def _answer(**answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _import_all(address: str, options: dict[str, Any]) -> None:
    """Do a little of everything: what is imported at its first use may not be readable for another user."""
    content(bytes(32), 64)
    with Client(address, **options) as client:
        client.stats()


def main() -> None:
    """Attach, say so, and do what the lines on stdin ask for."""
    address, uid, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    if uid is not None:
        _import_all(address, options)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    try:
        worker = Worker(address, options)
    except KVStoreError as error:
        _answer(error=type(error).__name__, message=str(error))
        return
    _answer(result=os.getpid())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            result = getattr(worker, request.pop("verb"))(**request)
            if isinstance(result, Iterator):
                for step in result:
                    _answer(result=step)
            else:
                _answer(result=result)
        except KVStoreError as error:
            _answer(error=type(error).__name__, message=str(error))


if __name__ == "__main__":
    main()
