"""The schedule: arrival order, exact reservations, prefill and decode in turn."""

from __future__ import annotations

import pytest

from orcd_jax.engine.kv_pages import KvPagePool
from orcd_jax.engine.request import JobRequest
from orcd_jax.engine.scheduler import DecodeStep, PrefillStep, ScheduledJob, Scheduler


def scheduler(*, rows: int = 2, pages: int = 100, blocks: int = 2) -> Scheduler:
    return Scheduler(rows=rows, block_tokens=8, prefill_blocks=blocks, page_tokens=4, pool=KvPagePool(pages))


def job(prompt: int, max_tokens: int = 4) -> ScheduledJob:
    return ScheduledJob(JobRequest(job_id="j", prompt_ids=(1,) * prompt, max_tokens=max_tokens))


def drain(s: Scheduler) -> list[PrefillStep | DecodeStep]:
    """Runs until nothing can be dispatched; a job leaves when its last token has been dispatched."""
    steps = []
    while (step := s.next_step()) is not None:
        steps.append(step)
        for j in tuple(s.jobs()):
            if j.dispatched == j.request.max_tokens:
                s.remove(j)
    return steps


@pytest.mark.requirement("WORKER-4501")
def test_a_prompt_becomes_blocks_on_its_own_grid_and_then_rows() -> None:
    s, j = scheduler(), job(19, max_tokens=3)
    s.submit(j)
    first, second, *rest = drain(s)
    assert isinstance(first, PrefillStep)
    assert [(b.start, b.count, b.last) for b in first.blocks] == [(0, 8, False), (8, 8, False)]
    assert isinstance(second, PrefillStep)
    assert [(b.start, b.count, b.last) for b in second.blocks] == [(16, 3, True)]
    assert rest == [DecodeStep((j,)), DecodeStep((j,))]


def test_short_prompts_share_a_call() -> None:
    s, a, b = scheduler(), job(3), job(5)
    s.submit(a)
    s.submit(b)
    step = s.next_step()
    assert isinstance(step, PrefillStep)
    assert [(w.job, w.last) for w in step.blocks] == [(a, True), (b, True)]


@pytest.mark.requirement("WORKER-4501")
def test_a_long_prompt_stalls_running_streams_by_one_call_at_a_time() -> None:
    s, running, long = scheduler(), job(3, max_tokens=50), job(80)
    s.submit(running)
    s.next_step()
    s.submit(long)
    kinds = [type(s.next_step()) for _ in range(8)]
    assert kinds == [PrefillStep, DecodeStep] * 4


@pytest.mark.requirement("WORKER-4501")
def test_jobs_are_admitted_in_order_of_arrival_even_when_a_later_one_would_fit() -> None:
    s = scheduler(rows=3, pages=10)
    first, large, small = job(20), job(20), job(4)
    for j in (first, large, small):
        s.submit(j)
    s.next_step()
    assert [j.row >= 0 for j in (first, large, small)] == [True, False, False]
    s.remove(first)
    s.next_step()
    assert [j.row >= 0 for j in (large, small)] == [True, True]


@pytest.mark.requirement("WORKER-4422")
def test_a_job_reserves_every_page_it_can_ever_write() -> None:
    s, j = scheduler(), job(5, max_tokens=4)
    s.submit(j)
    s.next_step()
    assert len(j.pages) == 2  # positions 0 … 7: the fourth token is sampled but never stored


@pytest.mark.requirement("WORKER-4503")
def test_removing_a_job_frees_its_row_and_pages_once() -> None:
    s, j = scheduler(rows=1, pages=4), job(5)
    s.submit(j)
    s.next_step()
    s.remove(j)
    s.remove(j)
    assert s.running == 0
    assert s.pool.available == 4
    again = job(5)
    s.submit(again)
    s.next_step()
    assert again.row == 0


def test_a_waiting_job_can_be_removed() -> None:
    s, running, waiting = scheduler(rows=1), job(3), job(3)
    s.submit(running)
    s.submit(waiting)
    s.next_step()
    s.remove(waiting)
    assert list(s.jobs()) == [running]


def test_no_row_is_dispatched_beyond_max_tokens() -> None:
    s, j = scheduler(), job(3, max_tokens=1)
    s.submit(j)
    assert isinstance(s.next_step(), PrefillStep)
    assert s.next_step() is None
