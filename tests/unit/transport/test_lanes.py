"""Where blocking calls run."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from kvstore.protocol.errors import Unavailable
from kvstore.transport.lanes import Lane, WaitPool
from transport_double import BOUND_S, eventually


def test_a_lane_keeps_the_order_and_needs_no_thread_before_its_first_job() -> None:
    before = threading.active_count()
    lane = Lane("test")
    assert threading.active_count() == before
    done: list[int] = []
    for i in range(200):
        lane.submit(partial(done.append, i))
    lane.close()
    eventually(lambda: len(done) == 200)
    assert done == list(range(200))


def test_a_closed_lane_takes_nothing() -> None:
    lane = Lane("test")
    lane.close()
    lane.close()
    with pytest.raises(Unavailable):
        lane.submit(lambda: None)


def test_an_owners_jobs_beyond_its_share_wait_for_its_own() -> None:
    pool = WaitPool(threads_max=4, owner_max=2)
    gate, running, done = threading.Event(), threading.Semaphore(0), []

    def job(name: str) -> None:
        running.release()
        assert gate.wait(BOUND_S)
        done.append(name)

    for _ in range(5):
        pool.submit("greedy", partial(job, "greedy"))
    pool.submit("modest", partial(job, "modest"))
    assert all(running.acquire(timeout=BOUND_S) for _ in range(3))
    assert not running.acquire(timeout=0.05)
    gate.set()
    eventually(lambda: len(done) == 6)
    pool.close()
    with pytest.raises(Unavailable):
        pool.submit("late", lambda: None)


def test_the_pool_never_has_more_threads_than_its_limit_and_loses_no_job() -> None:
    pool = WaitPool(threads_max=3, owner_max=100)
    lock, now, most, done = threading.Lock(), [0], [0], []

    def job(i: int) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        with lock:
            now[0] -= 1
            done.append(i)

    for i in range(500):
        pool.submit(i % 7, partial(job, i))
    eventually(lambda: len(done) == 500)
    assert most[0] <= 3
    pool.close()


def _no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_call_that_gets_no_thread_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lane, pool, done = Lane("test"), WaitPool(threads_max=2, owner_max=2), threading.Event()
    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", _no_thread)
        with pytest.raises(Unavailable, match="no thread"):
            lane.submit(lambda: None)
        with pytest.raises(Unavailable, match="no thread"):
            pool.submit("owner", lambda: None)
    order: list[str] = []
    lane.submit(partial(order.append, "lane"))
    pool.submit("owner", done.set)
    assert done.wait(BOUND_S), "the pool works again, and the call before left nothing behind"
    eventually(lambda: order == ["lane"])
    lane.close()
    pool.close()


def test_where_there_is_one_thread_already_calls_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, gate, done = WaitPool(threads_max=2, owner_max=4), threading.Event(), threading.Semaphore(0)
    pool.submit("owner", lambda: gate.wait(BOUND_S) and None)
    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", _no_thread)
        pool.submit("owner", lambda: done.release() and None)
    gate.set()
    assert done.acquire(timeout=BOUND_S)
    pool.close()
