"""Agents that die, hang, or do not start; real processes throughout."""

from __future__ import annotations

import itertools
import logging
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent_rig import PATIENCE_S, Slots, cold_config, hot_config, wait_until
from kvstore.engine.supervisor import AgentSupervisor
from kvstore.protocol.errors import InvalidRequest, Unavailable
from kvstore.tiers.base import BlockRef, Outcome, TierItem
from kvstore.v1 import agent_pb2

HUNG_S = 0.5
IDLE_RSS_BYTES_MAX = 45 << 20

Supervise = Callable[..., AgentSupervisor]


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Supervise]:
    """Makes started supervisors, of a cold agent unless told otherwise; in the end what they started is gone."""
    made: list[AgentSupervisor] = []

    def start(
        config: agent_pb2.AgentConfig | None = None,
        on_up: Callable[[], None] = lambda: None,
        on_down: Callable[[], None] = lambda: None,
        call_timeout_s: float = 30.0,
    ) -> AgentSupervisor:
        config = config or cold_config(tmp_path / "cold")
        supervisor = AgentSupervisor(config.tier, config, on_up=on_up, on_down=on_down, call_timeout_s=call_timeout_s)
        made.append(supervisor)
        supervisor.start()
        return supervisor

    yield start
    for supervisor in made:
        supervisor.close()
        assert supervisor.pid is None


@pytest.fixture
def slots() -> Iterator[Slots]:
    made = Slots()
    yield made
    made.segment.close()


def is_replaced(supervisor: AgentSupervisor, restarts: int) -> None:
    wait_until(lambda: supervisor.restarts >= restarts and supervisor.state == "ok", "a fresh agent")


def write_all(supervisor: AgentSupervisor, items: list[TierItem]) -> None:
    assert {result.outcome for result in supervisor.write(items)} == {Outcome.OK}


# -- killed ---------------------------------------------------------------------------------------------------


def test_a_killed_cold_agent_is_replaced_and_finds_its_blocks(supervise: Supervise, slots: Slots) -> None:
    supervisor = supervise()
    slots.map_into(supervisor)
    write_all(supervisor, slots.sources(range(8)))
    first_pid = supervisor.pid
    supervisor.kill()
    is_replaced(supervisor, 1)
    assert supervisor.pid not in (None, first_pid)
    targets = slots.targets(range(8))
    assert supervisor.read(targets) == [Outcome.OK] * 8
    assert all(slots.is_whole(target) for target in targets)
    assert len(list(supervisor.scan())) == 8
    write_all(supervisor, slots.sources(range(8, 16)))


def test_a_killed_hot_agent_is_replaced_and_empty(supervise: Supervise, slots: Slots) -> None:
    supervisor = supervise(hot_config())
    assert supervisor.device == "cpu"
    slots.map_into(supervisor)
    write_all(supervisor, slots.sources(range(8)))
    supervisor.kill()
    is_replaced(supervisor, 1)
    assert supervisor.read(slots.targets(range(8))) == [Outcome.MISSING] * 8
    write_all(supervisor, slots.sources(range(8)))
    assert supervisor.read(slots.targets(range(8))) == [Outcome.OK] * 8


def test_killed_in_the_middle_of_writes_nothing_acknowledged_is_lost(supervise: Supervise, slots: Slots) -> None:
    supervisor = supervise()
    slots.map_into(supervisor)
    acknowledged: set[int] = set()
    busy = 0
    numbers = itertools.count()
    for kill in range(5):
        threading.Timer(0.01 + 0.02 * kill, supervisor.kill).start()
        while supervisor.restarts == kill:
            batch = [next(numbers) for _ in range(8)]
            results = supervisor.write(slots.sources(batch))
            assert {result.outcome for result in results} <= {Outcome.OK, Outcome.BUSY}
            acknowledged |= {n for n, result in zip(batch, results, strict=True) if result.outcome is Outcome.OK}
            busy += any(result.outcome is Outcome.BUSY for result in results)
        is_replaced(supervisor, kill + 1)
    assert acknowledged
    assert busy
    for number in acknowledged:
        target = slots.target(number)
        assert supervisor.read([target]) == [Outcome.OK], f"block {number} was acknowledged"
        assert slots.is_whole(target)
    known = {int.from_bytes(record.ref.key, "big") for record in supervisor.scan()}
    for number in known - acknowledged:  # committed, and killed before the answer: whole, or not there
        target = slots.target(number)
        assert supervisor.read([target]) == [Outcome.OK]
        assert slots.is_whole(target)


def test_killed_in_the_middle_of_reads_no_slot_is_touched_after_its_answer(supervise: Supervise) -> None:
    slots = Slots(slots=16, block_bytes=4 << 20)
    supervisor = supervise()
    slots.map_into(supervisor)
    write_all(supervisor, slots.sources(range(8)))
    missing = 0
    for kill in range(5):
        threading.Timer(0.005 * kill, supervisor.kill).start()
        while supervisor.restarts == kill:
            targets = slots.targets(range(8))
            for target, outcome in zip(targets, supervisor.read(targets), strict=True):
                assert outcome in (Outcome.OK, Outcome.MISSING)
                if outcome is Outcome.OK:
                    assert slots.is_whole(target)
                else:
                    missing += 1
                    slots.bytes_at(target.range)[:] = 0xEE  # ours again: a late write of the dead would show
            strays = [t for t in targets if not slots.is_whole(t) and (slots.bytes_at(t.range) != 0xEE).any()]
            assert not strays
        is_replaced(supervisor, kill + 1)
    assert missing
    slots.segment.close()


def test_a_read_that_misses_for_want_of_an_agent_returns_after_on_down(supervise: Supervise, slots: Slots) -> None:
    is_up, go_on = threading.Event(), threading.Event()
    is_up.set()

    def on_down() -> None:
        go_on.wait(1.0)
        is_up.clear()

    supervisor = supervise(on_up=is_up.set, on_down=on_down)
    slots.map_into(supervisor)
    write_all(supervisor, slots.sources(range(4)))
    restarts = supervisor.restarts
    os.kill(supervisor.pid or 0, signal.SIGSTOP)
    threading.Timer(0.05, supervisor.kill).start()
    threading.Timer(0.2, go_on.set).start()
    assert supervisor.read(slots.targets(range(4))) == [Outcome.MISSING] * 4
    assert not is_up.is_set() or supervisor.restarts > restarts


def test_up_and_down_alternate(supervise: Supervise) -> None:
    events: list[str] = []
    supervisor = supervise(on_up=lambda: events.append("up"), on_down=lambda: events.append("down"))
    for restarts in (1, 2):
        wait_until(lambda: events[-1:] == ["up"], "on_up")
        supervisor.kill()
        is_replaced(supervisor, restarts)
    supervisor.close()
    assert events == ["up", "down"] * 3
    assert supervisor.state == "down: closed"


# -- down -----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(supervise: Supervise, slots: Slots, tmp_path: Path) -> AgentSupervisor:
    """A supervisor whose agent held blocks 0 to 3 and cannot start again: a file is in its directory's place."""
    supervisor = supervise()
    slots.map_into(supervisor)
    write_all(supervisor, slots.sources(range(4)))
    supervisor.flush()
    (tmp_path / "cold").rename(tmp_path / "kept")
    (tmp_path / "cold").write_text("in the way")
    supervisor.kill()
    wait_until(lambda: "is not a directory" in supervisor.state, "a start that fails")
    return supervisor


def repair(path: Path) -> None:
    (path / "cold").unlink()
    (path / "kept").rename(path / "cold")


def test_while_it_cannot_start_everything_is_answered(broken: AgentSupervisor, slots: Slots, tmp_path: Path) -> None:
    assert broken.state.startswith("down: the cold tier's path")
    assert broken.pid is None
    assert broken.read(slots.targets(range(4))) == [Outcome.MISSING] * 4
    assert {result.outcome for result in broken.write(slots.sources(range(4)))} == {Outcome.BUSY}
    assert broken.stats() == {}
    with pytest.raises(Unavailable, match="the cold agent is down"):
        broken.flush()
    with pytest.raises(Unavailable):
        list(broken.scan())
    tried = broken.restarts
    wait_until(lambda: broken.restarts > tried, "another attempt")
    repair(tmp_path)
    is_replaced(broken, tried + 1)
    assert broken.read(slots.targets(range(4))) == [Outcome.OK] * 4


def test_slabs_wait_for_the_next_agent_and_deletes_are_to_be_asked_for_again(
    broken: AgentSupervisor, slots: Slots, tmp_path: Path
) -> None:
    refs = [slots.source_name(number).ref for number in (1, 2, 99)]
    with pytest.raises(Unavailable, match="the cold agent is down"):
        broken.delete(refs)
    late = Slots(slab_id=2)
    late.map_into(broken)
    broken.unmap_slab(1)
    repair(tmp_path)
    is_replaced(broken, broken.restarts)
    broken.delete(refs)
    outcomes = broken.read(late.targets(range(4)))
    assert outcomes == [Outcome.OK, Outcome.MISSING, Outcome.MISSING, Outcome.OK]
    assert broken.read(slots.targets([0])) == [Outcome.BUSY]
    write_all(broken, late.sources([1]))
    broken.kill()
    is_replaced(broken, broken.restarts + 1)
    assert broken.read(late.targets([1])) == [Outcome.OK]
    late.segment.close()


def test_closing_does_not_wait_for_the_next_attempt(broken: AgentSupervisor) -> None:
    broken.close()
    assert broken.state == "down: closed"


# -- upkeep ---------------------------------------------------------------------------------------------------


def test_every_stored_block_is_checked_page_by_page_and_what_is_bad_goes(
    supervise: Supervise, slots: Slots, tmp_path: Path
) -> None:
    supervisor = supervise()
    slots.map_into(supervisor)
    write_all(supervisor, slots.sources(range(16)))
    supervisor.flush()
    assert pages(supervisor, repair=False) == (16, 0, 0)
    broken = flip_middle(tmp_path / "cold", slots)
    checked, corrupt, repaired = pages(supervisor, repair=False)
    assert (checked, repaired) == (16, 0)
    assert corrupt == 1
    assert pages(supervisor, repair=True) == (16, 1, 1)
    assert pages(supervisor, repair=False) == (15, 0, 0)
    outcomes = supervisor.read(slots.targets(range(16)))
    assert outcomes == [Outcome.MISSING if number == broken else Outcome.OK for number in range(16)]
    assert supervisor.restarts == 0


def pages(supervisor: AgentSupervisor, *, repair: bool) -> tuple[int, int, int]:
    """Blocks checked, corrupt and repaired, over as many calls as it takes."""
    after: BlockRef | None = None
    checked = corrupt = repaired = 0
    while True:
        page = supervisor.check(after, 5, repair)
        checked, corrupt, repaired = checked + page.checked, corrupt + page.corrupt, repaired + page.repaired
        after = page.last
        if after is None:
            return checked, corrupt, repaired


def flip_middle(folder: Path, slots: Slots) -> int:
    """Flip one bit in the middle of block 7, wherever the store keeps it; its number."""
    wanted = slots.content(7).tobytes()[30_000:30_032]  # random bytes, which are stored as they are
    for path in folder.rglob("data.mdb"):
        at = path.read_bytes().find(wanted)
        if at >= 0:
            with path.open("r+b", buffering=0) as file:
                file.seek(at)
                file.write(bytes([wanted[0] ^ 1]))
            return 7
    raise AssertionError("the block is not where it is looked for")


def test_a_compaction_gives_space_back_and_loses_nothing(supervise: Supervise, slots: Slots) -> None:
    supervisor = supervise()
    slots.map_into(supervisor)
    write_all(supervisor, slots.sources(range(16)))
    supervisor.delete([slots.source_name(number).ref for number in range(12)])
    supervisor.flush()
    result = supervisor.compact()
    assert result.after_bytes < result.before_bytes
    targets = slots.targets(range(12, 16))
    assert supervisor.read(targets) == [Outcome.OK] * 4
    assert all(slots.is_whole(target) for target in targets)
    write_all(supervisor, slots.sources(range(12)))
    supervisor.kill()
    is_replaced(supervisor, 1)
    assert supervisor.read(slots.targets(range(16))) == [Outcome.OK] * 16


def test_upkeep_of_a_tier_that_keeps_nothing_is_refused(supervise: Supervise) -> None:
    supervisor = supervise(hot_config())
    for call in (lambda: supervisor.check(None, 1, False), supervisor.compact):
        with pytest.raises(InvalidRequest, match="keeps nothing"):
            call()
    assert supervisor.restarts == 0


# -- hung -----------------------------------------------------------------------------------------------------


def test_a_hung_agent_is_killed_and_replaced(
    supervise: Supervise, slots: Slots, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = supervise(call_timeout_s=HUNG_S)
    slots.map_into(supervisor)
    slots_2 = Slots(slab_id=2)
    slots_2.map_into(supervisor)
    write_all(supervisor, slots.sources(range(8)))
    for restarts, call in enumerate((supervisor.read, supervisor.write), 1):
        pid = supervisor.pid or 0
        os.kill(pid, signal.SIGSTOP)
        with caplog.at_level(logging.WARNING), ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(call, slots_2.targets(range(8))) for _ in range(4)]
            outcomes = [getattr(found, "outcome", found) for made in calls for found in made.result(PATIENCE_S)]
        assert set(outcomes) == {Outcome.MISSING if call == supervisor.read else Outcome.BUSY}
        assert not Path(f"/proc/{pid}").exists(), "a call returned before its agent was reaped"
        is_replaced(supervisor, restarts)
        assert f"killed: no answer to {'READ' if restarts == 1 else 'WRITE'} within 0.5 s" in caplog.text
        targets = slots_2.targets(range(8))
        assert supervisor.read(targets) == [Outcome.OK] * 8
        assert all(slots_2.is_whole(target) for target in targets)
    slots_2.segment.close()


@pytest.mark.parametrize("method", ["delete", "map", "unmap", "scan"])
def test_every_call_of_a_hung_agent_ends(supervise: Supervise, slots: Slots, method: str) -> None:
    supervisor = supervise(call_timeout_s=HUNG_S)
    slots.map_into(supervisor)
    write_all(supervisor, slots.sources(range(2)))
    os.kill(supervisor.pid or 0, signal.SIGSTOP)
    other = Slots(slab_id=2)
    if method == "delete":
        with pytest.raises(Unavailable, match="no answer to DELETE"):
            supervisor.delete([slots.source_name(0).ref])
    elif method == "map":
        other.map_into(supervisor)
    elif method == "unmap":
        supervisor.unmap_slab(1)
    else:
        with pytest.raises(Unavailable, match="no answer to SCAN"):
            list(supervisor.scan())
    is_replaced(supervisor, 1)
    if method == "map":
        assert supervisor.read(other.targets([0])) == [Outcome.OK]
    elif method == "unmap":
        assert supervisor.read(slots.targets([0])) == [Outcome.BUSY]
    else:
        assert supervisor.read(slots.targets([0])) == [Outcome.OK], "nothing was replayed"
    other.segment.close()


def test_closing_a_hung_agent_is_bounded(supervise: Supervise) -> None:
    supervisor = supervise()
    pid = supervisor.pid or 0
    os.kill(pid, signal.SIGSTOP)
    supervisor.close(HUNG_S)
    assert not Path(f"/proc/{pid}").exists()


# -- ending ---------------------------------------------------------------------------------------------------


def test_a_clean_close_leaves_a_clean_environment(supervise: Supervise, slots: Slots, tmp_path: Path) -> None:
    supervisor = supervise()
    slots.map_into(supervisor)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(supervisor.write, slots.sources(range(16)))
        supervisor.close()
        outcomes = {result.outcome for result in writing.result(PATIENCE_S)}
    assert outcomes <= {Outcome.OK, Outcome.BUSY}
    assert not (tmp_path / "cold" / "session").exists()
    assert supervisor.restarts == 0


def test_the_daemons_signals_are_not_the_agents(supervise: Supervise) -> None:
    supervisor = supervise()
    pid = supervisor.pid or 0
    assert os.getpgid(pid) != os.getpgid(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert supervisor.stats()["blocks"] == 0
    assert (supervisor.pid, supervisor.restarts) == (pid, 0)
    assert os.getpriority(os.PRIO_PROCESS, pid) == 10 + os.getpriority(os.PRIO_PROCESS, 0)


PARENT = """
import sys, time
from kvstore.engine.supervisor import AgentSupervisor
from kvstore.v1 import agent_pb2
supervisor = AgentSupervisor("hot", agent_pb2.AgentConfig(tier="hot", device="cpu", capacity_bytes=1 << 20))
supervisor.start()
print(supervisor.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_an_agent_dies_with_its_daemon(stopped: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        agent = int(parent.stdout.readline())
        pidfd = os.pidfd_open(agent)
        try:
            if stopped:
                os.kill(agent, signal.SIGSTOP)
            parent.kill()
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            assert poller.poll(PATIENCE_S * 1000), "the agent outlives its daemon"
        finally:
            os.close(pidfd)


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_no_descriptor_is_left(supervise: Supervise, slots: Slots) -> None:
    before = open_descriptors()
    supervisor = supervise(hot_config())
    for slab_id in range(300):
        supervisor.map_slab(slab_id, slots.segment.fd, slots.segment.nbytes)
    supervisor.kill()
    is_replaced(supervisor, 1)
    write_all(supervisor, slots.sources(range(4)))
    for slab_id in range(100):
        supervisor.unmap_slab(slab_id)
    maps = Path(f"/proc/{supervisor.pid}/maps").read_text()
    assert maps.count("memfd:") == 200
    supervisor.close()
    assert open_descriptors() == before


# -- starting -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"path": "/dev/null"}, "path /dev/null is not a directory"),
        ({"path": "/dev/null/below"}, "Not a directory.*/dev/null/below"),
        ({"path": "/proc/nowhere"}, "/proc/nowhere"),
        ({"path": ""}, "needs a path"),
        ({"capacity_bytes": 0}, "capacity of more than 0 bytes"),
        ({"codec": "mp3"}, "codec 'mp3'"),
        ({"durability": "sometimes"}, "durability 'sometimes'"),
        ({"reader_threads": 1000}, "1000 reader threads; the limit is 16"),
        ({"tier": "lukewarm"}, "unknown tier 'lukewarm'"),
        ({"tier": "hot", "device": "tpu:0"}, "unknown device 'tpu:0'"),
    ],
)
def test_a_start_that_cannot_succeed_says_why(tmp_path: Path, change: dict[str, str | int], why: str) -> None:
    config = cold_config(tmp_path / "cold")
    for field, value in change.items():
        setattr(config, field, value)
    supervisor = AgentSupervisor("cold", config)
    with pytest.raises(Unavailable, match=f"the cold agent did not start: .*{why}"):
        supervisor.start()
    assert re.search(why, supervisor.state)
    assert (supervisor.pid, supervisor.restarts) == (None, 0)
    supervisor.close()
    assert supervisor.read([]) == []


def test_a_start_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    supervisor = AgentSupervisor("cold", cold_config(tmp_path / "cold"), start_timeout_s=0.001)
    with pytest.raises(Unavailable, match=r"did not start: not ready within 0\.001 s"):
        supervisor.start()
    assert supervisor.pid is None


def test_a_process_that_dies_first_is_told_from_one_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    supervisor = AgentSupervisor("cold", cold_config(tmp_path / "cold"))
    with pytest.raises(Unavailable, match="exited with status 1 before it was ready"):
        supervisor.start()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-such-python"))
    supervisor = AgentSupervisor("cold", cold_config(tmp_path / "cold"))
    with pytest.raises(Unavailable, match="no-such-python"):
        supervisor.start()


def test_a_slab_that_cannot_be_mapped_is_refused_and_forgotten(supervise: Supervise, slots: Slots) -> None:
    supervisor = supervise(hot_config())
    with pytest.raises(InvalidRequest, match="in a file of"):
        supervisor.map_slab(1, slots.segment.fd, slots.segment.nbytes + 1)
    slots.map_into(supervisor)
    with pytest.raises(InvalidRequest, match="mapped already"):
        slots.map_into(supervisor)
    supervisor.unmap_slab(404)
    write_all(supervisor, slots.sources([1]))
    assert supervisor.restarts == 0


def test_an_impossible_range_costs_its_call_only(supervise: Supervise, slots: Slots) -> None:
    supervisor = supervise(hot_config())
    slots.map_into(supervisor)
    write_all(supervisor, slots.sources([1]))
    good = slots.target(1)
    wild = good._replace(range=good.range._replace(offset=slots.segment.nbytes))
    assert supervisor.read([good, wild]) == [Outcome.BUSY] * 2
    assert supervisor.read([good]) == [Outcome.OK]
    assert supervisor.restarts == 0


# -- idle -----------------------------------------------------------------------------------------------------


def switches(pid: int) -> int:
    """How often a thread of the process went to sleep so far."""
    statuses = [status.read_text() for status in Path(f"/proc/{pid}/task").glob("*/status")]
    return sum(int(count) for status in statuses for count in re.findall(r"\nvoluntary_ctxt_switches:\s+(\d+)", status))


def sleeps_for_a_second(pid: int) -> bool:
    before = switches(pid)
    threading.Event().wait(1.0)
    return switches(pid) == before


def test_an_idle_agent_sleeps_and_is_small(supervise: Supervise, slots: Slots) -> None:
    supervisor = supervise()
    slots.map_into(supervisor)
    supervisor.stats()
    pid = supervisor.pid or 0
    wait_until(lambda: sleeps_for_a_second(pid), "a second without a wake-up")
    resident = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert resident is not None
    assert int(resident[1]) << 10 <= IDLE_RSS_BYTES_MAX
    assert not re.search(r"grpc|torch|numba", Path(f"/proc/{pid}/maps").read_text())
