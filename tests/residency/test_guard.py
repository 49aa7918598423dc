"""The schedule of proofs, over a simulated clock, device and engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.guard import LONGEST_AGE_S, POLICY_INTERVAL_S, SealGuard

READ_S = 1e-4  # simulated seconds to prove one byte of the simulated slices


@dataclass(frozen=True)
class Size:
    size_bytes: int


@dataclass
class World:
    """A clock, slices in which bits can change, and a guard over them."""

    sizes: list[int]
    max_age_s: float = 4.0
    now: float = 1000.0
    flipped: set[int] = field(default_factory=set)
    reads: list[int] = field(default_factory=list)
    seal_holds: bool = True
    residency_checks: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slices = [Size(size) for size in self.sizes]
        self.guard: SealGuard[tuple[int, bool], object] = SealGuard(
            self,
            max_age_s=self.max_age_s,
            proved_s=self.now,
            verify_seal=self._verify_seal,
            check_residency=lambda _: self.residency_checks.append(self.now),
            on_pass=self.passes.append,
            on_late=self.late.append,
            clock=lambda: self.now,
        )

    def _verify_seal(self) -> None:
        if not self.seal_holds:
            raise OrcdError(ErrorCode.SEAL_VERIFICATION_FAILED, "the seal does not hold")

    def begin(self, index: int) -> tuple[int, bool]:
        self.reads.append(index)
        return index, index in self.flipped  # what lay there when the device read it

    def finish(self, pending: tuple[int, bool]) -> None:
        index, broken = pending
        self.now += self.sizes[index] * READ_S
        if broken:
            raise OrcdError(ErrorCode.SEAL_VERIFICATION_FAILED, "differs", field=f"slice {index}")

    def step(self, seconds: float) -> None:
        """One turn of a busy engine: the guard's turn, a step of the device, tokens that want to leave."""
        self.guard.turn(None)
        self.now += seconds
        self.guard.settle()

    def idle(self) -> None:
        """One turn of an engine that waits for work."""
        self.now += self.guard.wait_s()
        self.guard.turn(None)


sizes = st.lists(st.integers(1, 500), min_size=1, max_size=12)


@pytest.mark.requirement("WORKER-4121")
@settings(max_examples=100, deadline=None)
@given(sizes=sizes, steps=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=50), data=st.data())
def test_under_load_a_flip_is_found_within_the_bound_and_no_token_leaves_later(
    sizes: list[int], steps: list[float], data: st.DataObject
) -> None:
    world = World(sizes)
    flip_at = data.draw(st.integers(0, len(steps) - 1))
    slot = data.draw(st.integers(0, len(sizes) - 1))
    flipped_s = None
    found = False
    try:
        for number in range(flip_at + 3000):
            if number == flip_at:
                world.flipped.add(slot)
                flipped_s = world.now
            world.step(steps[number % len(steps)])
            if flipped_s is not None:  # this step's tokens left
                assert world.now - flipped_s <= world.guard.detection_bound_s
    except OrcdError as error:
        found = error.field == f"slice {slot}"
    assert found


@pytest.mark.requirement("WORKER-4121")
@settings(max_examples=100, deadline=None)
@given(sizes=sizes, data=st.data())
def test_when_idle_a_flip_is_found_within_the_bound(sizes: list[int], data: st.DataObject) -> None:
    world = World(sizes)
    for _ in range(data.draw(st.integers(0, 40))):
        world.idle()
    slot = data.draw(st.integers(0, len(sizes) - 1))
    world.flipped.add(slot)
    flipped_s = world.now
    found = None
    while found is None and world.now - flipped_s <= 2 * world.guard.detection_bound_s:
        try:
            world.idle()
        except OrcdError as error:
            found = error.field
    assert found == f"slice {slot}"
    assert world.now - flipped_s <= world.guard.detection_bound_s


@pytest.mark.requirement("WORKER-4121")
@settings(max_examples=30, deadline=None)
@given(sizes=sizes, step=st.floats(0.02, 0.2))
def test_passes_come_evenly_and_no_more_often_than_needed(sizes: list[int], step: float) -> None:
    world = World(sizes)
    ends_s = world.now + 20 * world.max_age_s
    while world.now < ends_s:
        world.step(step)
    assert not world.late
    passes = len(world.reads) / len(sizes)
    assert 20 - 1 <= passes <= 20 / 0.8 + 2


@pytest.mark.requirement("WORKER-4121")
def test_a_job_begins_on_a_fresh_proof_without_a_new_one() -> None:
    world = World([10, 10])
    world.now += 3.9
    world.guard.admit()
    assert world.reads == []


@pytest.mark.requirement("WORKER-4121")
def test_a_job_waits_for_a_whole_proof_when_the_last_is_too_old() -> None:
    world = World([10, 10, 10])
    world.now += 4.0
    world.guard.admit()
    assert sorted(world.reads) == [0, 1, 2]
    assert world.guard.age_s() < 0.1


@pytest.mark.requirement("WORKER-4121")
def test_zero_proves_everything_before_each_job() -> None:
    world = World([10, 10], max_age_s=0)
    assert world.guard.detection_bound_s == LONGEST_AGE_S
    for _ in range(2):
        world.now += 0.001
        world.guard.admit()
    assert len(world.reads) == 4
    world.now += 0.001
    world.flipped.add(1)
    with pytest.raises(OrcdError, match="differs"):
        world.guard.admit()


@pytest.mark.requirement("WORKER-4121")
def test_a_broken_seal_admits_nobody() -> None:
    world = World([10])
    world.seal_holds = False
    with pytest.raises(OrcdError, match="seal does not hold"):
        world.guard.admit()


@pytest.mark.requirement("WORKER-4121")
def test_tokens_that_come_late_wait_for_a_proof_and_somebody_is_told() -> None:
    world = World([10, 10])
    world.now += 60.0  # the device hung, and came back
    world.guard.settle()
    assert world.late == [pytest.approx(60.0)]
    assert sorted(world.reads) == [0, 1]
    assert world.guard.age_s() < world.max_age_s


@pytest.mark.requirement("WORKER-4255")
def test_a_wanted_pass_begins_after_it_was_wanted_and_is_made_at_every_turn() -> None:
    world = World([10, 10, 10])
    world.idle()  # slice 0 is in flight, from before
    told: list[OrcdError | None] = []
    world.now += 0.001
    world.guard.request(told.append)
    for _ in range(3):
        world.step(0.001)
    assert told == []  # slice 0 was read before it was wanted
    world.step(0.001)
    world.step(0.001)
    assert told == [None]
    assert world.guard.wait_s() > 0


@pytest.mark.requirement("WORKER-4255")
def test_who_waits_for_a_pass_is_told_when_none_will_come() -> None:
    world = World([10])
    told: list[OrcdError | None] = []
    world.guard.request(told.append)
    reason = OrcdError(ErrorCode.CANCELLED, "stopped")
    world.guard.close(reason)
    world.guard.close(reason)
    assert told == [reason]


@pytest.mark.requirement("WORKER-4101")
def test_residency_is_checked_every_minute_busy_or_idle() -> None:
    world = World([10, 10])
    began_s = world.now
    while world.now < began_s + 5 * POLICY_INTERVAL_S:
        world.step(0.05)
    while world.now < began_s + 10 * POLICY_INTERVAL_S:
        world.idle()
    gaps = [b - a for a, b in zip([began_s, *world.residency_checks], world.residency_checks, strict=False)]
    assert len(gaps) >= 9
    assert max(gaps) <= POLICY_INTERVAL_S + 1


def test_a_pass_reports_how_long_it_took() -> None:
    world = World([10, 10, 10])
    while len(world.passes) < 3:
        world.idle()
    assert all(0 < seconds <= world.max_age_s for seconds in world.passes)


@pytest.mark.requirement("WORKER-4122")
def test_what_the_model_cannot_have_computed_makes_it_prove_everything() -> None:
    world = World([10, 10])
    world.now += 0.001
    world.guard.suspect()
    assert sorted(world.reads) == [0, 1]
    world.flipped.add(0)
    world.now += 0.001
    with pytest.raises(OrcdError, match="differs"):
        world.guard.suspect()


@pytest.mark.requirement("WORKER-4121")
def test_a_proof_that_could_not_be_made_does_not_count_as_made() -> None:
    """The device ran out of memory in it: what was not read is read before any token leaves."""
    world = World([10, 10])
    real, failures = world.finish, [OrcdError(ErrorCode.VRAM_OOM, "no memory")]

    def finish(pending: tuple[int, bool]) -> None:
        if failures:
            raise failures.pop()
        real(pending)

    world.finish = finish  # type: ignore[method-assign]
    world.now += 6.0
    with pytest.raises(OrcdError, match="no memory"):
        world.guard.settle()
    world.guard.settle()
    assert world.guard.age_s() < world.max_age_s


@pytest.mark.requirement("WORKER-4120")
def test_an_attestation_of_a_broken_seal_is_refused_and_its_asker_told() -> None:
    world = World([10])
    world.seal_holds = False
    told: list[OrcdError | None] = []
    with pytest.raises(OrcdError, match="seal does not hold") as broken:
        world.guard.request(told.append)
    world.guard.close(broken.value)
    assert told == [broken.value]
