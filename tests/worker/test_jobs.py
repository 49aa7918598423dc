"""Jobs of a worker: whose they are, when they are refused, how they end."""

from __future__ import annotations

import threading

import pytest

from orcd_jax.engine.request import Ended, Failed, FinishReason, Tokens
from orcd_jax.errors import ErrorCode
from orcd_jax.worker import jobs as jobs_module
from orcd_jax.worker.lifecycle import State
from orcd_jax.worker.loader import ResidentModel
from orcd_jax.worker.types import ChatMessage, ChatPrompt, Metrics, Started
from tests.worker.running import (
    SLOTS,
    WAIT_S,
    LongJob,
    Running,
    events_of,
    ids_of,
    job,
    long_job,
    outcome,
    refusal,
)

# -- a job that ends well ----------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4240")
def test_a_job_is_started_then_tokens_then_one_end(running: Running) -> None:
    events = running.run(events_of(running.worker, job("a", seed=7)))
    kinds = [type(event) for event in events if not isinstance(event, Metrics)]
    assert kinds[0] is Started
    assert kinds[-1] is Ended
    assert set(kinds[1:-1]) == {Tokens}
    started, ended = events[0], events[-1]
    assert isinstance(started, Started)
    assert (started.job_id, started.model, started.seed) == ("a", "Tiny-Test", 7)
    assert isinstance(ended, Ended)
    assert (ended.finish_reason, ended.tokens_out, len(ids_of(events))) == (FinishReason.LENGTH, 4, 4)


def test_the_state_follows_the_jobs(running: Running) -> None:
    before = len(running.states)
    running.run(events_of(running.worker, job("b")))
    assert running.states[before:] == [State.EXECUTING, State.READY]


@pytest.mark.requirement("WORKER-4248")
def test_text_token_ids_and_chat_are_the_same_prompt(running: Running) -> None:
    worker = running.worker
    ids = running.run(worker.tokenize("in the", add_special=True))
    chat = ChatPrompt(messages=(ChatMessage(role="user", content="in the"),))  # its template is the content alone
    answers = [
        ids_of(running.run(events_of(worker, job("c", prompt=prompt)))) for prompt in ("in the", tuple(ids), chat)
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.requirement("WORKER-4710")
def test_one_seed_gives_the_same_tokens_and_others_differ(running: Running) -> None:
    def sampled(seed: int) -> tuple[int, ...]:
        return ids_of(running.run(events_of(running.worker, job("d", max_tokens=16, temperature=1.0, seed=seed))))

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in (1, 2, 2**32 + 1, 2**64 - 1)}) == 4


@pytest.mark.requirement("WORKER-4247")
def test_a_job_without_a_seed_says_which_it_got(running: Running) -> None:
    first = running.run(events_of(running.worker, job("e", max_tokens=16, temperature=1.0)))
    assert isinstance(first[0], Started)
    again = running.run(events_of(running.worker, job("e", max_tokens=16, temperature=1.0, seed=first[0].seed)))
    assert ids_of(again) == ids_of(first)


# -- who may do what ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4250")
def test_only_the_owner_can_cancel_and_nothing_follows(running: Running) -> None:
    held = LongJob(running, long_job("f"), "mine")
    assert not running.run(running.worker.cancel("f", "theirs"))
    assert running.run(running.worker.cancel("f", "mine"))
    assert not running.run(running.worker.cancel("f", "mine"))
    read = len(held.events)
    ended = held.end()
    assert isinstance(ended, Failed)
    assert ended.error.code is ErrorCode.CANCELLED
    assert len(held.events) == read + 1


@pytest.mark.requirement("WORKER-4250")
@pytest.mark.requirement("WORKER-4252")
def test_the_same_job_id_of_another_owner_is_another_job(running: Running) -> None:
    held = LongJob(running, long_job("g"), "one")
    other = running.run(events_of(running.worker, job("g"), "two"))
    assert isinstance(other[-1], Ended)
    held.abandon()


@pytest.mark.requirement("WORKER-4250")
@pytest.mark.requirement("WORKER-4252")
def test_a_live_duplicate_is_refused_and_leaves_the_first_alone(running: Running) -> None:
    held = LongJob(running, long_job("h", max_tokens=60))
    error = refusal(running, job("h"))
    assert (error.code, error.field) == (ErrorCode.INVALID_PARAMS, "job_id")
    assert isinstance(held.end(), Ended)


@pytest.mark.requirement("WORKER-4500")
def test_beyond_the_slots_a_job_is_refused_with_a_hint_and_runs_when_one_is_free(running: Running) -> None:
    held = [LongJob(running, long_job(f"i{n}")) for n in range(SLOTS)]
    error = refusal(running, job("i"))
    assert error.code is ErrorCode.BUSY
    assert error.retry_after_ms
    held[0].abandon()
    assert isinstance(running.run(events_of(running.worker, job("i")))[-1], Ended)
    held[1].abandon()


@pytest.mark.requirement("WORKER-4254")
def test_a_client_that_goes_away_ends_its_job(running: Running) -> None:
    held = LongJob(running, long_job("j"))
    assert running.worker.status().slots_used == 1
    held.abandon()
    assert running.worker.status().slots_used == 0
    assert running.worker.lifecycle.state is State.READY


@pytest.mark.requirement("WORKER-4254")
def test_a_client_that_goes_away_after_the_end_but_before_reading_it_leaves_nothing_behind(running: Running) -> None:
    """As many of them as there are slots would otherwise close the worker for good."""
    for n in range(SLOTS + 1):
        held = LongJob(running, long_job(f"o{n}", max_tokens=5))
        running.until_end_is_unread(f"o{n}")
        held.abandon()
    assert running.worker.status().slots_used == 0
    assert running.worker.lifecycle.state is State.READY


@pytest.mark.requirement("WORKER-4250")
def test_after_an_acknowledged_cancel_only_the_error_comes_even_when_the_end_was_on_its_way(running: Running) -> None:
    held = LongJob(running, long_job("p", max_tokens=5))
    running.until_end_is_unread("p")
    read = len(held.events)
    assert running.run(running.worker.cancel("p", "o"))
    ended = held.end()
    assert isinstance(ended, Failed)
    assert ended.error.code is ErrorCode.CANCELLED
    assert len(held.events) == read + 1


@pytest.mark.requirement("WORKER-4254")
def test_a_cancel_while_the_prompt_is_tokenised_refuses_the_job(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenising, go_on = threading.Event(), threading.Event()
    real = jobs_module._tokenize_prompt

    def slowly(model: ResidentModel, prompt: str | ChatPrompt) -> tuple[int, ...]:
        tokenising.set()
        assert go_on.wait(WAIT_S)
        return real(model, prompt)

    monkeypatch.setattr(jobs_module, "_tokenize_prompt", slowly)
    refused = running.begin(outcome(running.worker, job("q")))
    assert tokenising.wait(WAIT_S)
    assert running.worker.status().slots_used == 1  # a slot is taken before anything is done for a job
    assert running.run(running.worker.cancel("q", "o"))
    assert running.worker.status().slots_used == 0
    go_on.set()
    assert refused.result(WAIT_S) is ErrorCode.CANCELLED


@pytest.mark.requirement("WORKER-4240")
@pytest.mark.requirement("WORKER-4244")
def test_metrics_come_two_times_a_second_while_a_job_runs(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "METRICS_INTERVAL_S", 0.0)
    events = running.run(events_of(running.worker, long_job("r", max_tokens=50)))
    metrics = [event for event in events if isinstance(event, Metrics)]
    assert metrics
    assert [m.tokens_out for m in metrics] == sorted(m.tokens_out for m in metrics)
    assert metrics[-1].tokens_out <= 50
    assert isinstance(events[-1], Ended)


# -- what is refused before it starts ----------------------------------------------------------------------------------


def test_a_handle_that_is_not_loaded_is_not_found(running: Running) -> None:
    assert refusal(running, job("k", handle_id="h-other")).code is ErrorCode.NOT_FOUND
    (handle,) = running.worker.ready().handles
    assert isinstance(running.run(events_of(running.worker, job("k", handle_id=handle.handle_id)))[-1], Ended)


@pytest.mark.requirement("WORKER-4410")
@pytest.mark.requirement("WORKER-4411")
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": (0, 10_000)}, "prompt_token_ids"),
        ({"prompt": tuple([5] * 500), "max_tokens": 13}, "max_tokens"),
    ],
)
def test_a_job_that_can_never_run_is_refused_with_its_field(
    running: Running, changes: dict[str, object], field: str
) -> None:
    error = refusal(running, job("l", **changes))
    assert (error.code, error.field) == (ErrorCode.INVALID_PARAMS, field)
    assert running.worker.status().slots_used == 0


def test_a_context_that_is_just_full_is_taken(running: Running) -> None:
    events = running.run(events_of(running.worker, job("m", prompt=tuple([5] * 500), max_tokens=12)))
    assert isinstance(events[-1], Ended)
    assert events[-1].tokens_in + events[-1].tokens_out == 512


@pytest.mark.requirement("WORKER-4240")
@pytest.mark.requirement("WORKER-4242")
def test_a_job_past_its_deadline_ends_with_timeout(running: Running) -> None:
    """Refused when it passed before the start, else the terminal event; which of them is the clock's choice."""
    assert running.run(outcome(running.worker, long_job("n", timeout_ms=1))) is ErrorCode.TIMEOUT
