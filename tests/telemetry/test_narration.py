"""Narration: sentences that a person would write."""

from __future__ import annotations

import inspect

import pytest

from orcd_jax.telemetry import narration


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 KB"), (538_095_360, "538 MB"), (16_060_000_000, "16.1 GB")],
)
def test_sizes_are_said_in_powers_of_ten(count: int, said: str) -> None:
    assert narration.size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "40 ms"),
        (3.21, "3.2 s"),
        (59.9, "59.9 s"),
        (125, "2 min 5 s"),
        (3600, "1 h 0 min"),
        (86_399, "23 h 59 min"),
        (5 * 86_400 + 7200, "5 d 2 h"),
    ],
)
def test_durations_are_said_in_the_unit_that_fits(seconds: float, said: str) -> None:
    assert narration.duration(seconds) == said


def test_one_is_singular() -> None:
    assert [narration.count(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]


@pytest.mark.requirement("WORKER-4820")
def test_every_sentence_begins_like_one_and_ends_like_one() -> None:
    said = [
        narration.startup(version="1.0", platform="cpu", address="127.0.0.1:50051"),
        narration.model_load_start(model_ref="SmolLM2"),
        narration.model_load_progress(stage="restore", percent=50),
        narration.model_load_complete(model_ref="SmolLM2", weights_bytes=10, seconds=1.0),
        narration.ready(model_ref="SmolLM2", slots=1, emulated=True),
        narration.execute_start(job_id="j1", tokens_in=3, token_fingerprint="a1b2c3"),
        narration.execute_end(job_id="j1", tokens_out=5, seconds=0.5, finish_reason="eos"),
        narration.job_failed(job_id="j1", message="the caller cancelled it."),
        narration.callback_delivered(attempts=1),
        narration.callback_retry(attempt=2, reason="HTTP 503", wait_s=1.0),
        narration.drain(jobs=0, timeout_s=30),
        narration.drain(jobs=2, timeout_s=30),
        narration.shutdown(exit_code=0),
        narration.shutdown(exit_code=9),
    ]
    for sentence in said:
        assert sentence.endswith("."), sentence
        assert "_" not in sentence, sentence
        assert sentence[0].isupper() or sentence[:4] in ("orcd", "Smol"), sentence


@pytest.mark.requirement("WORKER-4820")
def test_a_start_names_the_token_by_its_fingerprint() -> None:
    assert "token a1b2c3" in narration.execute_start(job_id="j", tokens_in=1, token_fingerprint="a1b2c3")


@pytest.mark.requirement("WORKER-4800")
@pytest.mark.requirement("WORKER-4803")
def test_no_sentence_can_be_given_a_prompt_or_an_answer() -> None:
    for name, function in inspect.getmembers(narration, inspect.isfunction):
        assert not {"prompt", "text", "output", "token", "answer"} & set(inspect.signature(function).parameters), name


def test_a_cpu_worker_never_claims_vram() -> None:
    assert "VRAM" not in narration.ready(model_ref="m", slots=4, emulated=True)
