"""The gate over real blocks: what it promises, what it counts, and how it learns that a tier is quick again.

Time is simulated: a medium that takes as long as a test says, and a worker that computes what it was not promised.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from core_checks import check
from core_world import PAGE, SESSION, TENANT, World, chain, packed, warm_bytes_for
from kvstore.core.benefit import ENOUGH, WINDOW, WorkerCosts
from kvstore.core.block import COLD, WARM
from kvstore.core.gate import BenefitGate, Verdict
from kvstore.core.reads import AcquireGroup
from kvstore.core.slots import SlotState

BLOCKS = 8
TOKENS = 16 * BLOCKS
RECOMPUTE_S = TOKENS * 1e-4
PATIENT = WorkerCosts(1e-4)


@dataclass
class Scene:
    """A prefix in cold, a medium, and a worker that asks for the prefix again and again."""

    block_s: float = 1e-3  # what the medium takes for a block
    fixed_s: float = 0.0
    world: World = field(default_factory=lambda: World(warm_bytes_for(32), cold_bytes=64 * PAGE))
    now_s: float = 0.0
    loaded: int = 0

    def __post_init__(self) -> None:
        self.space = self.world.open()
        self.keys = chain(BLOCKS)
        assert set(self.world.put(self.space, self.keys)) == {"STORED"}
        self.world.save_all()
        self.cool()

    @property
    def gate(self) -> BenefitGate:
        return self.world.cache.gate

    @property
    def group(self) -> AcquireGroup:
        return AcquireGroup(self.space, packed(self.keys))

    def cool(self) -> None:
        """What warm has leaves it."""
        self.world.cache.evict(WARM, 1 << 40)

    def judge(self, worker: WorkerCosts = PATIENT) -> Verdict:
        return self.gate.judge(self.group, worker, self.now_s)

    def request(self, worker: WorkerCosts | None = PATIENT) -> float:
        """Seconds until the worker has the whole prefix, fetched or computed. All of warm leaves after it."""
        reads, start_s, below = self.world.cache.reads, self.now_s, None
        verdict = Verdict(BLOCKS, 0)
        if worker is not None:
            verdict = self.gate.judge(self.group, worker, self.now_s)
            below = 16 * verdict.blocks if verdict.withheld else None
        lease = reads.acquire(SESSION, TENANT, [self.group], self.now_s, below)
        assert (0 if lease is None else len(lease.parts[0].slots)) == verdict.blocks
        if worker is not None:
            self.gate.note(self.group, verdict, worker, self.now_s)
        self.serve(verdict.blocks)
        took_s = self.now_s - start_s + (verdict.withheld * RECOMPUTE_S / BLOCKS)
        if lease is not None:
            self.world.release(lease)
        self.serve(BLOCKS)  # what is loaded for nobody, while the worker computes
        check(self.world)
        self.cool()
        self.now_s = max(self.now_s, start_s + took_s) + 1.0
        return took_s

    def serve(self, blocks: int) -> None:
        """The medium answers so many blocks, at most."""
        reads, costs = self.world.cache.reads, self.gate.costs
        if not (reads.loads and blocks):
            return
        costs.began(COLD, self.now_s)
        self.now_s += self.fixed_s
        while reads.loads and blocks:
            load = self.world.start_load()
            assert load is not None
            self.now_s += self.block_s
            self.world.end_load(load)
            costs.came(COLD, PAGE, self.now_s)
            self.loaded += 1
            blocks -= 1
        costs.ended(COLD)

    def learn(self, count: int = ENOUGH) -> None:
        for _ in range(count):
            self.request(None)


@pytest.fixture
def slow() -> Scene:
    """A medium that takes four times as long as computing, and the daemon knows."""
    scene = Scene(block_s=4 * RECOMPUTE_S / BLOCKS)
    scene.learn()
    return scene


def test_until_something_is_known_everything_is_promised() -> None:
    scene = Scene(block_s=1.0)
    scene.learn(ENOUGH - 1)
    assert scene.judge() == Verdict(BLOCKS, 0)
    scene.learn(1)
    assert scene.judge() == Verdict(0, BLOCKS)


def test_what_is_slower_than_recomputing_is_withheld_and_counted(slow: Scene) -> None:
    for number in range(1, 4):
        slow.request()
        assert (slow.gate.gated_acquires, slow.gate.withheld_blocks) == (number, number * BLOCKS)


def test_a_match_counts_nothing_and_loads_nothing(slow: Scene) -> None:
    assert slow.judge() == Verdict(0, BLOCKS)
    assert (slow.gate.gated_acquires, slow.gate.withheld_blocks, slow.gate.probes) == (0, 0, 0)
    assert not slow.world.cache.reads.loads


def test_a_quick_tier_is_promised_whole() -> None:
    scene = Scene(block_s=0.5 * RECOMPUTE_S / BLOCKS)
    scene.learn(WINDOW)
    assert scene.judge() == Verdict(BLOCKS, 0)
    assert scene.request() < RECOMPUTE_S
    assert scene.gate.gated_acquires == 0


def test_what_warm_has_is_promised_though_the_rest_is_not(slow: Scene) -> None:
    assert slow.world.cache.reads.prefetch(slow.space, packed(slow.keys[:3])) == 3
    slow.serve(3)
    assert slow.judge() == Verdict(3, BLOCKS - 3)
    assert slow.judge(PATIENT._replace(copy_s_per_byte=1.0)) == Verdict(0, BLOCKS)


def test_a_prompt_that_begins_elsewhere_counts_its_tokens_from_the_root(slow: Scene) -> None:
    """What the engine has on its GPU it does not ask for; what follows is as dear as its place says."""
    worker = WorkerCosts(0.0, 6e-6)  # half of the first 64 tokens' fetch, more than that of the last 64
    tail = AcquireGroup(slow.space, packed(slow.keys[BLOCKS // 2 :]))
    head = AcquireGroup(slow.space, packed(slow.keys[: BLOCKS // 2]))
    assert slow.gate.judge(head, worker, slow.now_s) == Verdict(0, BLOCKS // 2)
    assert slow.gate.judge(tail, worker, slow.now_s) == Verdict(BLOCKS // 2, 0)


def test_what_others_wait_for_makes_it_dearer() -> None:
    scene = Scene(block_s=0.5 * RECOMPUTE_S / BLOCKS)
    scene.learn()
    other = chain(10, "other")
    assert set(scene.world.put(scene.space, other)) == {"STORED"}
    scene.world.save_all()
    scene.cool()
    assert scene.judge() == Verdict(BLOCKS, 0)
    assert scene.world.cache.reads.prefetch(scene.space, packed(other)) == 10
    assert scene.judge() == Verdict(0, BLOCKS)
    scene.serve(10)
    assert scene.judge() == Verdict(BLOCKS, 0)
    assert not any(scene.world.cache.reads.queued_bytes.values())


def test_a_prefix_that_is_on_its_way_is_not_paid_for_twice() -> None:
    scene = Scene(block_s=0.8 * RECOMPUTE_S / BLOCKS)
    scene.learn()
    assert scene.world.cache.reads.prefetch(scene.space, packed(scene.keys)) == BLOCKS
    assert {block.slot.state for block in scene.space.blocks.values() if block.slot} == {SlotState.FILLING}
    assert scene.judge() == Verdict(BLOCKS, 0)


def test_nothing_is_promised_from_a_medium_that_hangs() -> None:
    scene = Scene(block_s=0.1 * RECOMPUTE_S / BLOCKS)
    scene.learn()
    scene.gate.costs.began(COLD, scene.now_s)
    assert scene.judge() == Verdict(BLOCKS, 0)
    scene.now_s += RECOMPUTE_S
    assert scene.judge() == Verdict(0, BLOCKS)
    scene.gate.costs.ended(COLD)
    assert scene.judge() == Verdict(BLOCKS, 0)


# -- it opens again -------------------------------------------------------------------------------------------


def test_the_gate_opens_again_by_probes_that_nobody_waits_for(slow: Scene) -> None:
    slow.learn(WINDOW)
    slow.block_s = 0.1 * RECOMPUTE_S / BLOCKS
    asked = 0
    while slow.judge().withheld:
        assert slow.request() == pytest.approx(RECOMPUTE_S), "the worker computes, whatever is loaded meanwhile"
        asked += 1
        assert asked <= 2 * WINDOW, "it never opens"
    assert slow.request() < RECOMPUTE_S / 2
    assert WINDOW // 2 < slow.gate.probes <= asked


def test_what_a_probe_brought_is_promised_to_the_next(slow: Scene) -> None:
    slow.gate.note(slow.group, slow.judge(), PATIENT, slow.now_s + 100.0)
    brought = len(slow.world.cache.reads.loads)
    assert (slow.gate.probes, brought > 0) == (1, True)
    slow.serve(brought)
    assert slow.judge() == Verdict(brought, BLOCKS - brought)


def test_one_probe_at_a_time_and_none_while_the_medium_rests(slow: Scene) -> None:
    verdict = slow.judge()
    for _ in range(5):
        slow.gate.note(slow.group, verdict, PATIENT, slow.now_s + 100.0)
    assert slow.gate.probes == 1
    slow.serve(BLOCKS)
    slow.cool()
    slow.gate.note(slow.group, verdict, PATIENT, slow.now_s)
    assert (slow.gate.probes, slow.gate.gated_acquires) == (1, 6)


def test_no_probe_where_the_worker_itself_is_slow(slow: Scene) -> None:
    slow.world.cache.reads.prefetch(slow.space, packed(slow.keys))
    slow.serve(BLOCKS)
    worker = PATIENT._replace(copy_s_per_byte=1.0)
    slow.gate.note(slow.group, slow.judge(worker), worker, slow.now_s + 100.0)
    assert (slow.gate.gated_acquires, slow.gate.probes) == (1, 0)
    assert slow.gate.copy_bytes_per_s == 1.0


# -- the defect of the others ---------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1.1, 4.0, 100.0])
def test_a_fetch_is_never_slower_than_no_cache_at_all(times: float) -> None:
    """Peers fetched from a disk or a network that was slower than the GPU (LMCache #1938, #1326, #3641).

    The medium is quick, becomes slow, and quick again. Only the loads it takes to believe that may cost anything.
    """
    scene = Scene(block_s=0.2 * RECOMPUTE_S / BLOCKS, fixed_s=0.05 * RECOMPUTE_S)
    seconds = [scene.request() for _ in range(2 * WINDOW)]
    assert max(seconds) < RECOMPUTE_S, "quick: everything is fetched"
    scene.block_s = times * RECOMPUTE_S / BLOCKS
    seconds = [scene.request() for _ in range(50)]
    late = [took_s for took_s in seconds if took_s > RECOMPUTE_S * 1.0001]
    assert len(late) <= WINDOW, "what it takes to believe it"
    assert seconds[WINDOW:] == [pytest.approx(RECOMPUTE_S)] * (50 - WINDOW)
    if times >= 4.0:
        assert len(late) <= WINDOW // 4 + 1
    scene.block_s = 0.2 * RECOMPUTE_S / BLOCKS
    seconds = [scene.request() for _ in range(50)]
    assert max(seconds) <= RECOMPUTE_S * 1.0001, "to learn of it costs nobody anything"
    assert max(seconds[-10:]) < RECOMPUTE_S, "and it is fetched from again"


def test_without_the_gate_the_same_worker_waits_for_the_disk() -> None:
    """The test above can fail."""
    scene = Scene(block_s=4.0 * RECOMPUTE_S / BLOCKS)
    assert [scene.request(None) for _ in range(2 * WINDOW)] == [pytest.approx(4 * RECOMPUTE_S)] * (2 * WINDOW)
    assert scene.loaded == 2 * WINDOW * BLOCKS
    assert (scene.gate.gated_acquires, scene.gate.probes) == (0, 0)


def test_stalls_do_not_shut_the_gate() -> None:
    """Two hangs of 2 s, a hundred times what a load takes, and the next request is served from cold."""
    scene = Scene(block_s=0.1 * RECOMPUTE_S / BLOCKS)
    scene.learn(WINDOW)
    for _ in range(2):
        scene.fixed_s = 2.0
        scene.request()
        scene.fixed_s = 0.0
        assert scene.judge() == Verdict(BLOCKS, 0)
