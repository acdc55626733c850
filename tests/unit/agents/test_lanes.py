from __future__ import annotations

import threading

from kvstore.agents.lanes import Lane

PATIENCE_S = 30.0


def test_one_thread_keeps_the_order() -> None:
    done: list[int] = []
    lane = Lane("test", 1)
    for number in range(100):
        lane.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    lane.stop(finish=True)
    lane.join()
    assert done == list(range(100))


def test_as_many_jobs_run_together_as_there_are_threads() -> None:
    lane = Lane("test", 3)
    meeting = threading.Barrier(3)
    met: list[int] = []
    for _ in range(3):
        lane.submit(lambda: met.append(meeting.wait(PATIENCE_S)))
    lane.stop(finish=True)
    lane.join()
    assert sorted(met) == [0, 1, 2]


def test_stopping_drops_what_waits_and_lets_the_running_job_end() -> None:
    lane = Lane("test", 1)
    running, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def job() -> None:
        running.set()
        assert go_on.wait(PATIENCE_S)
        done.append("running")

    lane.submit(job)
    assert running.wait(PATIENCE_S)
    lane.submit(lambda: done.append("waiting"))
    lane.stop(finish=False)
    go_on.set()
    lane.join()
    assert done == ["running"]
